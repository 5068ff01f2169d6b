"""What all paged caches share: a page table and lengths on the device, the book of pages on the host, and rows found through the table."""
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from sparsetile.backends import devices, places
from sparsetile.backends.contract import Problem, Unsupported
from sparsetile.ops import array_operators as xp
from sparsetile.ops import checks, dispatch
from sparsetile.ops.caches import memory
from sparsetile.ops.caches.append import append
from sparsetile.ops.caches.pages import Sequences, of_each
from sparsetile.ops.selection import Selection


class Keys(NamedTuple):
    """What a cache hands to sparse_attention in the place of k: arrays, and what a query sees in them.

    With table [B,pages] int32, k [N,Hk,page,D] and v [N,Hk,page,Dv] are pages; without, k [B,Hk,S,D] and v [B,Hk,S,Dv] as ever. v None: the first columns of k.
    """
    k: Any
    v: Any
    rule: Any
    kv_length: Any
    q_start: Any
    table: Any = None
    latent: Any = None  # (R, P): rows are bytes, the fp8 layout of a latent cache


class Cache:
    """Stands where an op expects keys. Subclasses say what they hold."""

    def keys(self, T: int, rule, kv_length, q_start, backend=None) -> Keys:
        """Keys for T queries of each sequence that see what `rule` says; `backend` makes what is to be made for it."""
        raise Unsupported(f"k: {type(self).__name__} holds no keys of attention; pass a PagedKV, a PagedLatent or a RollingKV")

    def scored(self, T: int, q_start, key_end):
        """Keys for the indexer: k [N,page,D], k_scale [N,page], table [B,pages], and q_start and key_end with the sequences' own lengths in them."""
        raise Unsupported(f"k: {type(self).__name__} holds no keys of an indexer; pass an IndexerKeys")

    def shorter(self, kv_length):
        """lengths, or the smaller of both."""
        if kv_length is None:
            return self.lengths
        checks.lengths("kv_length", kv_length, tuple(self.lengths.shape), "[B]")
        return xp.module(kv_length).minimum(kv_length, self.lengths)


class PagedCache(Cache):
    """Pools of pages, and which page holds which tokens of which sequence.

    page_table [B,pages] int32   token s of sequence b stands in page page_table[b, s // page_size], offset s % page_size. What stands past a sequence's tokens
                                 is never read; below them an entry outside 0 .. N - 1 is a hole: its keys do not exist.
    lengths    [B] int32         tokens of each sequence; clamped to 0 .. pages * page_size where it is read
    book                         the host's side (pages.Sequences); None if the tensors came from elsewhere, whose owner then hands out pages

    Host before device: `reserve` takes pages and uploads the table, `write` is device work alone and may stand in a CUDA graph, `advance` tells the book that
    tokens were written. `append` is the three in a row; around a graph's replay: reserve, replay, advance. Addresses of all tensors stay.
    A write never lands in a page that two sequences share, replayed or not: `write` goes through a second table, which names only what one sequence owns. Rows that
    find no page are dropped, and `advance` raises and sets the lengths back.
    """

    def __init__(self, pools, page_size: int, page_table, lengths, book=None):
        checks.lengths("lengths", memory.writable("lengths", lengths), (int(lengths.shape[0]),) if getattr(lengths, "ndim", 0) == 1 else (0,), "[B]")
        checks.array("page_table", page_table, 2, "[B,pages]", ("int32",))
        checks.same("page_table", "one row for each of `lengths`, B =", lengths.shape[0], page_table.shape[0], "give each sequence its pages")
        checks.together({f"pools[{n}]": pool for n, pool in enumerate(pools)} | dict(page_table=page_table, lengths=lengths))
        self.pools, self.page_size, self.page_table, self.lengths, self.book = tuple(pools), page_size, page_table, lengths, book
        self._owned = page_table if book is None else memory.zeros(page_table, tuple(page_table.shape), "int32", -1)

    @staticmethod
    def book_of(like, sequences, pages, page_size, max_pages):
        """(page_table, lengths, book) of an empty cache."""
        checks.integer("page_size", page_size, 1, 2 ** 20)
        most = checks.integer("max_pages", max_pages, 1, 2 ** 31 - 1, optional=True) or checks.integer("pages", pages, 1)
        book = Sequences(sequences, pages, page_size, most)
        return memory.zeros(like, (sequences, most), "int32", -1), memory.zeros(like, (sequences,), "int32"), book

    @property
    def capacity(self) -> int:
        """Tokens that the page table can name for one sequence: S of a call."""
        return int(self.page_table.shape[1]) * self.page_size

    # ---- host
    def _own(self) -> Sequences:
        if self.book is None:
            raise ValueError("book: expected a cache made by empty(), got one over tensors of another owner; let that owner hand out pages and write page_table and lengths")
        return self.book

    def reserve(self, tokens) -> None:
        """Room for so many more tokens (one number, or a list of one each). A page that a fork shares is copied before its first write. CacheFull loses nothing."""
        book = self._own()
        before = [list(held) for held in book.pages]
        moved = book.reserve(tokens)
        if moved:
            old, new = (xp.constant(np.array(side, np.int64), self.lengths) for side in zip(*moved))
            for pool in self.pools:
                pool[new] = pool[old]
        if before != book.pages:
            self._publish()

    def advance(self, tokens) -> None:
        """Tell the book that so many tokens were written by `write`. ValueError where they found no room of their own: none of them counts, and the lengths go back."""
        book = self._own()
        tokens = book.counts(tokens)
        try:
            book.advance(tokens)
        except ValueError:
            self._publish(True)
            raise

    def fork(self, source: int, target: int) -> None:
        """`target`, an empty sequence, gets the tokens of `source` without a copy; `reserve` copies the last page before one of them writes: call it again after a fork,
        for until then neither can be written there. Tokens that the book was not told of by `advance` are forgotten."""
        self._own().fork(source, target)
        self._publish(True)

    def evict(self, sequence: int, keep: int = 0) -> None:
        """Drop the tokens of a sequence at and past `keep` and give its pages back. Tokens that the book was not told of by `advance` are forgotten."""
        self._own().evict(sequence, keep)
        self._publish(True)

    def _publish(self, lengths=False):
        table, owned = (np.full(tuple(self.page_table.shape), -1, np.int32) for _ in range(2))
        for b, held in enumerate(self.book.pages):
            x, own = self.book.own(b)
            table[b, :len(held)], owned[b, x:len(held)] = held, own
        memory.put(self.page_table, table), memory.put(self._owned, owned)
        if lengths:
            memory.put(self.lengths, np.array(self.book.lengths, np.int32))

    # ---- device
    def _write(self, given, counts, backend):
        """given: (form, rows [B,n,...], options) of `append`, checked."""
        form, rows, options = given
        append(form, rows, **dict(dict(pools=self.pools), **options), table=self._owned, lengths=self.lengths, page_size=self.page_size, counts=counts, backend=backend)

    def _append(self, given, counts, backend):
        """reserve, write, advance; counts: how many rows of each sequence are real, on the host."""
        n = int(given[1][0].shape[1])
        counts = None if counts is None else of_each("counts", counts, len(self._own().pages), n)
        self.reserve(n if counts is None else counts)
        self._write(given, None if counts is None else xp.constant(np.array(counts, np.int32), self.lengths), backend)
        self.advance(n if counts is None else counts)

    def held(self) -> int:
        """Tokens of the longest sequence: by the book, else by the lengths (a copy to the host)."""
        most = max(self.book.lengths) if self.book is not None else int(xp.to_numpy(self.lengths).max(initial=0))
        return min(max(most, 0), self.capacity)

    def rows(self, keys):
        """Rows (page * page_size + offset, int64) of keys [B,...] of sequences 0 .. B-1; -1 for what does not exist, whatever the key, the table or the lengths hold."""
        lib = xp.module(self.lengths)
        each = (-1, *[1] * (keys.ndim - 1))
        N = int(self.pools[0].shape[0])
        there = (keys >= 0) & (keys < self.capacity) & (keys < self.lengths.reshape(each))
        keys = lib.where(there, keys, 0)
        b = xp.astype(xp.arange(self.lengths, int(self.lengths.shape[0])), "int64").reshape(each)
        page = xp.astype(self.page_table[b, xp.astype(keys // self.page_size, "int64")], "int64")
        return lib.where(there & (page >= 0) & (page < N), page * self.page_size + keys % self.page_size, -1)

    def _gather(self, pool):
        """Rows [B,S,...] of a pool [N,page,...] in the order of the tokens, S of the longest sequence; 0 where a key does not exist."""
        rows = self.rows(xp.arange(self.lengths, self.held())[None])                  # [B, S]
        there = xp.module(rows).where(rows >= 0, rows, 0)
        out = pool[there // self.page_size, there % self.page_size]
        out[rows < 0] = 0
        return out

    def _keys(self, k, v, T, rule, kv_length, q_start, backend, latent=None) -> Keys:
        """k [N,page,Hk,D], v likewise or None. A selection becomes rows of the pool, which is then a tensor of N * page keys: any kernel reads it."""
        length = self.shorter(kv_length)
        if isinstance(rule, Selection):
            if rule.indices.shape[0] != self.lengths.shape[0] or rule.indices.shape[2] != T:
                raise ValueError(f"pattern.indices: expected [B,G,T,K] with B = {self.lengths.shape[0]} and T = {T}, got {list(rule.indices.shape)}; select for the same queries that attend")
            rule = self.select(rule.within(self.capacity).resolve(self.capacity, q_start, length), length, q_start, T, backend)
            return Keys(*(None if x is None else _one_tensor(x, int(self.lengths.shape[0])) for x in (k, v)), rule, None, 0, None, latent)
        return Keys(k.swapaxes(1, 2), None if v is None else v.swapaxes(1, 2), rule, length, q_start, self.page_table, latent)

    def select(self, selection: Selection, length, q_start, T: int, backend=None) -> Selection:
        """The selection's keys as rows of the pool: entries of granularity 1, -1 for keys that do not exist, or lie past a causal query. One pass over the entries, by the kernel
        `page_rows` (backends/reference/page_rows.py says what it does). While a call is explained they are looked for only: their shape is all that the choice of the next kernel needs."""
        indices, q_start = selection.indices, checks.start(q_start, int(self.lengths.shape[0]), None)
        caller, device = checks.together({"pattern.indices": indices, "k.page_table": self.page_table, "q_start": None if isinstance(q_start, int) else q_start})
        B, G, T, K = indices.shape
        problem = Problem.of("page_rows", dict(B=B, Hk=G, T=T, K=K), dict(indices="int32"), devices.device_info(device).arch, granularity=selection.granularity)
        choice = dispatch.before("page_rows", problem, device, backend)
        place = places.place_for(dispatch.package(choice.backend).NATIVE, caller, device)
        with place.guard():
            if dispatch.is_explaining():
                rows = place.empty((B, G, T, K * selection.granularity), "int32")
            else:
                native = lambda x: x if x is None or isinstance(x, int) else place.packed(place.native(x))  # noqa: E731
                rows = choice.kernel.run(
                    native(indices), native(self.page_table), native(length), place=place, config=choice.config, page_size=self.page_size, pages_of_pool=int(self.pools[0].shape[0]),
                    lengths=native(selection.lengths), granularity=selection.granularity, causal=selection.causal, q_start=native(q_start))
            return replace(selection, indices=place.give(rows), granularity=1, lengths=None, causal=False)


def _one_tensor(pool, B: int):
    """Pages [N,page,Hk,D] as keys [B,Hk,N * page,D] of one memory: its batch has no step."""
    x = pool.reshape(1, -1, *pool.shape[2:]).swapaxes(1, 2)
    shape = B, *x.shape[1:]
    return x.expand(shape) if xp.kind(x) == "torch" else xp.module(x).broadcast_to(x, shape)
