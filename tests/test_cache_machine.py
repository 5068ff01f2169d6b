"""10,000 random operations on caches against plain Python lists: no divergence, no leak, and no page table's garbage tail read."""
import cache_format
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as some
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

import sparsetile as st

SEQUENCES, PAGES, PAGE, MOST = 4, 10, 3, 4
GARBAGE = (-1, -2 ** 31, 2 ** 31 - 1, 77, 0)
HOUSE = np.random.default_rng(0)
LATENTS, ROPES = HOUSE.standard_normal((16, 128)).astype(np.float32), HOUSE.standard_normal((16, 2)).astype(np.float32)
ROWS = {"kv": lambda x: np.repeat(np.float32(x), 3), "latent": lambda x: np.concatenate([LATENTS[x % 16], ROPES[x % 16]]),
        "float8": lambda x: np.frombuffer(cache_format.latent_token(LATENTS[x % 16], ROPES[x % 16], False), np.uint8),
        "indexer": lambda x: np.frombuffer(cache_format.indexer_page(LATENTS[x % 16:x % 16 + 1], False), np.uint8)}
for name in ("float8", "indexer"):
    ROWS[name] = {x: ROWS[name](x) for x in range(16)}.__getitem__


class Paged(RuleBasedStateMachine):
    kind = "kv"
    one = some.integers(0, SEQUENCES - 1)

    @initialize()
    def begin(self):
        like, sizes = np.zeros(1, np.float32), dict(sequences=SEQUENCES, pages=PAGES, page_size=PAGE, max_pages=MOST)
        self.cache = {"kv": lambda: st.PagedKV.empty(like, heads=1, width=2, value_width=1, **sizes), "latent": lambda: st.PagedLatent.empty(like, rank=128, rotary=2, **sizes),
                      "float8": lambda: st.PagedLatent.empty(like, rank=128, rotary=2, dtype="float8", **sizes), "indexer": lambda: st.IndexerKeys.empty(like, **sizes)}[self.kind]()
        self.model, self.next = [[] for _ in range(SEQUENCES)], 0

    def new(self, count):
        self.next += 1
        return [(self.next * 7 + n) % 16 for n in range(count)]

    def given(self, rows):
        """Rows of all sequences as the cache's append takes them."""
        x = np.array(rows)
        if self.kind == "kv":
            return np.repeat(x[:, None, :, None].astype(np.float32), 2, -1), x[:, None, :, None].astype(np.float32)
        return (LATENTS[x],) if self.kind == "indexer" else (LATENTS[x], ROPES[x])

    @rule(counts=some.lists(some.integers(0, 5), min_size=SEQUENCES, max_size=SEQUENCES))
    def append(self, counts):
        rows = [self.new(max(counts)) for _ in counts]
        try:
            if any(counts):
                self.cache.append(*self.given(rows), counts, backend="numba")
        except st.CacheFull:
            return
        for tokens, row, count in zip(self.model, rows, counts):
            tokens += row[:count]

    @rule(b=one, count=some.integers(0, 7))
    def reserve(self, b, count):
        try:
            self.cache.reserve([count if n == b else 0 for n in range(SEQUENCES)])
        except st.CacheFull:
            pass

    @rule(count=some.integers(1, 4))
    def write_without_reserving(self, count):
        """Whatever was reserved before a fork: no other sequence sees it, and what found no room is said."""
        rows = [self.new(count) for _ in self.model]
        self.cache.write(*self.given(rows), backend="numba")
        room = [self.cache.book.room(b) for b in range(SEQUENCES)]
        if min(room) < count:
            with pytest.raises(ValueError, match="which has so much room of its own"):
                self.cache.advance(count)
        else:
            self.cache.advance(count)
            for tokens, row in zip(self.model, rows):
                tokens += row

    @rule(b=one, share=some.floats(0, 1))
    def evict(self, b, share):
        keep = int(len(self.model[b]) * share)
        self.cache.evict(b, keep)
        del self.model[b][keep:]

    @rule(source=one, heir=one)
    def fork(self, source, heir):
        if self.cache.book.pages[heir]:
            with pytest.raises(ValueError, match="expected an empty sequence"):
                self.cache.fork(source, heir)
        else:
            self.cache.fork(source, heir)
            self.model[heir] = list(self.model[source])

    @rule(page=some.integers(-2, PAGES + 1))
    def give_what_is_not_held(self, page):
        owners = self.cache.book.allocator.owners
        if not (0 <= page < PAGES and owners[page]):
            with pytest.raises(ValueError, match="pages: expected"):
                self.cache.book.allocator.give([page])

    @rule(garbage=some.sampled_from(GARBAGE))
    def spoil_the_tails(self, garbage):
        for b, held in enumerate(self.cache.book.pages):
            self.cache.page_table[b, len(held):] = garbage

    def stored(self):
        """Rows [B,S,...] as the model has them."""
        if self.kind == "kv":
            k, v = self.cache.gather()
            return np.concatenate([k[:, 0], v[:, 0]], -1)
        if self.kind == "latent":
            return np.concatenate(self.cache.gather(), -1)
        parts = self.cache.gather(quantised=True) if self.kind == "float8" else self.cache.gather()
        flat = [np.ascontiguousarray(x if x.ndim > 2 else x[..., None]).view(np.uint8) for x in ((parts[0], parts[2], parts[1]) if self.kind == "float8" else parts)]
        return np.concatenate(flat, -1)

    @invariant()
    def holds_what_the_model_holds(self):
        got = self.stored()
        assert list(self.cache.lengths) == list(map(len, self.model)) == self.cache.book.lengths
        for row, tokens in zip(got, self.model):
            assert (row[:len(tokens)] == np.array([ROWS[self.kind](x) for x in tokens]).reshape(len(tokens), got.shape[-1])).all() and not row[len(tokens):].any()

    @invariant()
    def no_page_is_lost(self):
        book = self.cache.book
        held = [page for pages in book.pages for page in pages]
        assert [held.count(page) for page in range(PAGES)] == book.allocator.owners and book.allocator.free == book.allocator.owners.count(0)
        assert all(len(set(pages)) == len(pages) and len(pages) >= -(-len(tokens) // PAGE) for pages, tokens in zip(book.pages, self.model))


class Rolling(RuleBasedStateMachine):
    WINDOW, PINNED = 5, 2
    one = some.integers(0, SEQUENCES - 1)

    @initialize()
    def begin(self):
        self.cache = st.RollingKV.empty(np.zeros(1, np.float32), sequences=SEQUENCES, window=self.WINDOW, pinned=self.PINNED, heads=1, width=1)
        self.model, self.next = [[] for _ in range(SEQUENCES)], 1

    @rule(counts=some.lists(some.integers(0, 12), min_size=SEQUENCES, max_size=SEQUENCES))
    def append(self, counts):
        rows = np.arange(self.next, self.next + SEQUENCES * max(counts), dtype=np.float32).reshape(SEQUENCES, 1, max(counts), 1)
        self.next += rows.size
        self.cache.append(rows, -rows, counts, backend="numba")
        for tokens, row, count in zip(self.model, rows[:, 0, :, 0], counts):
            tokens += list(row[:count])

    @rule(b=one)
    def evict(self, b):
        self.cache.evict(b)
        self.model[b] = []

    @rule(source=one, heir=one)
    def fork(self, source, heir):
        if self.model[heir]:
            with pytest.raises(ValueError, match="expected an empty sequence"):
                self.cache.fork(source, heir)
        else:
            self.cache.fork(source, heir)
            self.model[heir] = list(self.model[source])

    @invariant()
    def holds_the_first_and_the_last(self):
        k, v = self.cache.gather()
        assert list(self.cache.lengths) == list(map(len, self.model)) and (v == -k).all()
        for row, tokens in zip(k[:, 0, :, 0], self.model):
            kept = tokens[:self.PINNED] + tokens[self.PINNED:][-self.WINDOW:]
            assert list(row[:len(kept)]) == kept and not row[len(kept):].any()


@pytest.mark.parametrize("kind", ["kv", "latent", "float8", "indexer", "rolling"])
def test_ten_thousand_operations(kind):
    machine = Rolling if kind == "rolling" else type(kind, (Paged,), {"kind": kind})
    run_state_machine_as_test(machine, settings=settings(max_examples=200, stateful_step_count=50, deadline=None, derandomize=True, database=None,
                                                        suppress_health_check=list(HealthCheck)))
