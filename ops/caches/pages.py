"""Who holds which page: free pages, owners of each page, pages and length of each sequence. Plain Python on the host, no arrays.

Every operation is checked whole before anything changes: one that fails has lost nothing.
"""
from sparsetile.ops import checks


class CacheFull(RuntimeError):
    """A cache has no room for what was asked: says what was needed and what is free. Nothing has changed."""


class PageAllocator:
    """Pages 0 .. count - 1. A page is free, or has one owner or more (sequences that share a prefix)."""

    def __init__(self, count: int):
        self.owners = [0] * checks.integer("pages", count, 1, 2 ** 31 - 1)
        self._free = list(range(count - 1, -1, -1))  # the smallest first

    @property
    def free(self) -> int:
        """How many pages nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` free pages, one owner each. CacheFull if there are fewer."""
        if checks.integer("count", count, 0) > self.free:
            raise CacheFull(f"pages: expected {count} free pages, got {self.free} of {len(self.owners)}; evict a sequence, or make the cache with more pages")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self.owners[page] = 1
        return pages

    def share(self, pages) -> None:
        """One owner more for each page."""
        for page in self._held(pages):
            self.owners[page] += 1

    def give(self, pages) -> None:
        """One owner less for each page; one without owners is free. ValueError for a page that is not held as often as it is given."""
        for page in self._held(pages):
            self.owners[page] -= 1
            if not self.owners[page]:
                self._free.append(page)

    def _held(self, pages) -> list[int]:
        pages, left = list(pages), {}
        for page in pages:
            if isinstance(page, bool) or not isinstance(page, int) or not 0 <= page < len(self.owners):
                raise ValueError(f"pages: expected pages of this cache, 0 to {len(self.owners) - 1}, got {checks.shown(page)}; give back what take() handed out")
            left[page] = left.get(page, self.owners[page]) - 1
            if left[page] < 0:
                raise ValueError(f"pages: expected pages that are held, got page {page}, which is free; it was given back twice")
        return pages


def of_each(name: str, x, count: int, most: int = 2 ** 31 - 1) -> list[int]:
    """One number 0 .. most for all of `count` sequences, or a list of one each -> the list."""
    if hasattr(x, "__index__") and not getattr(x, "ndim", 0):
        x = [x] * count
    if not isinstance(x, (list, tuple)) or len(x) != count:
        raise ValueError(f"{name}: expected one number, or a list of one for each of {count} sequences, got {checks.shown(x)}; 0 for a sequence that gets none")
    return [checks.integer(name, n, 0, most) for n in x]


class Sequences:
    """`count` sequences over the pages of one allocator, each a list of pages and a number of tokens; at most `most` pages each."""

    def __init__(self, count: int, pages: int, page_size: int, most: int):
        self.allocator = PageAllocator(pages)
        self.page_size, self.most = page_size, most
        self.pages = [[] for _ in range(checks.integer("sequences", count, 1, 2 ** 31 - 1))]
        self.lengths = [0] * count

    def check(self, name: str, b) -> int:
        return checks.integer(name, b, 0, len(self.pages) - 1)

    def counts(self, tokens) -> list[int]:
        """Tokens of each sequence: one number for all, or one each."""
        return of_each("tokens", tokens, len(self.pages))

    def reserve(self, tokens) -> list[tuple[int, int]]:
        """Room for so many more tokens of each sequence, in pages of its own. Returns (from, to) of the shared pages whose content must be copied."""
        tokens, size = self.counts(tokens), self.page_size
        needs, copies = [], []
        for b, (held, length, n) in enumerate(zip(self.pages, self.lengths, tokens)):
            total = -(-(length + n) // size)
            if n and total > self.most:
                raise CacheFull(f"sequence {b}: expected at most {self.most * size} tokens, got {length} and {n} more; make the cache with a longer page table")
            needs.append(max(0, total - len(held)) if n else 0)
            first = length // size  # the page that the next token falls into
            copies.append([(b, x) for x in range(first, min(len(held), total)) if self.allocator.owners[held[x]] > 1] if n else [])
        shared = self._one_keeps_it([at for found in copies for at in found])
        new = iter(self.allocator.take(sum(needs) + len(shared)))
        moved = []
        for b, x in shared:
            old, mine = self.pages[b][x], next(new)
            self.pages[b][x] = mine
            self.allocator.give([old])
            if x * size < self.lengths[b]:  # nothing of an empty page is worth a copy
                moved.append((old, mine))
        for b, need in enumerate(needs):
            self.pages[b] += [next(new) for _ in range(need)]
        return moved

    def _one_keeps_it(self, shared):
        """Of several sequences that leave a page at once the last owner keeps it."""
        left, moving = {}, []
        for b, x in shared:
            page = self.pages[b][x]
            left[page] = left.get(page, self.allocator.owners[page])
            if left[page] > 1:
                left[page] -= 1
                moving.append((b, x))
        return moving

    def own(self, b: int) -> tuple[int, list[int]]:
        """(x, pages): from its page x on, where the next token falls, the pages of a sequence, -1 for one it shares: where it may be written."""
        x = self.lengths[b] // self.page_size
        return x, [page if self.allocator.owners[page] == 1 else -1 for page in self.pages[b][x:]]

    def room(self, b: int) -> int:
        """How many more tokens a sequence can take in pages of its own."""
        x, owned = self.own(b)
        return max(0, (x + (owned + [-1]).index(-1)) * self.page_size - self.lengths[b])

    def advance(self, tokens) -> None:
        """So many tokens were written to each sequence, into room that was reserved. ValueError where there is none, or a fork has shared it since."""
        tokens = self.counts(tokens)
        for b, n in enumerate(tokens):
            if n and n > self.room(b):
                raise ValueError(f"tokens: expected at most {self.room(b)} for sequence {b}, which has so much room of its own, got {n}; reserve first, after a fork again, and then write")
        self.lengths = [length + n for length, n in zip(self.lengths, tokens)]

    def fork(self, source: int, target: int) -> None:
        """`target`, which is empty, gets the tokens of `source` by sharing its pages. What was reserved in a page that both now hold is no longer: neither owns it."""
        source, target = self.check("source", source), self.check("target", target)
        if self.pages[target]:
            raise ValueError(f"target: expected an empty sequence, got {target}, which holds {len(self.pages[target])} pages; evict it first")
        held = self.pages[source][:-(-self.lengths[source] // self.page_size)]  # not what is only reserved
        self.allocator.share(held)
        self.pages[target], self.lengths[target] = list(held), self.lengths[source]

    def evict(self, b: int, keep: int = 0) -> None:
        """Drop the tokens of a sequence at and past `keep`; pages that hold none of the rest are given back."""
        b = self.check("sequence", b)
        keep = checks.integer("keep", keep, 0, self.lengths[b])
        last = -(-keep // self.page_size)
        self.allocator.give(self.pages[b][last:])
        del self.pages[b][last:]
        self.lengths[b] = keep
