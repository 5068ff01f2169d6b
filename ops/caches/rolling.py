"""A rolling window of keys and values: memory that does not grow."""
import numpy as np

from sparsetile.backends import arrays
from sparsetile.backends.contract import Unsupported
from sparsetile.ops import array_operators as xp
from sparsetile.ops import checks
from sparsetile.ops.caches import memory
from sparsetile.ops.caches.append import append
from sparsetile.ops.caches.kv import FLOATS, rows_of
from sparsetile.ops.caches.paged import Cache, Keys
from sparsetile.ops.caches.pages import of_each
from sparsetile.ops.layout import Layout
from sparsetile.ops.patterns import Causal, Full, Pattern, Sink, Window
from sparsetile.ops.selection import Selection


class RollingKV(Cache):
    """The last `window` keys and values of each sequence, and its first `pinned`: k [B,slots,Hk,D], v [B,slots,Hk,Dv], lengths [B] int32; slots = pinned + window.

    Position p stands in slot p where p < pinned, else in slot pinned + (p - pinned) % window. `lengths` counts all tokens that ever came. With pinned=0 this is
    Mistral's rolling buffer (arXiv 2310.06825, section 2: position % window), with pinned attention sinks StreamingLLM's cache (arXiv 2309.17453, section 3.2),
    which also gives each key the position it has inside the cache: store keys before their rotation, and rotate what `gather` returns by `positions(in_cache=True)`.
    A key that a later token took the slot of is seen by no query, also by those that came beside that token: T queries at once see a whole Window(W - 1) where window >= W - 1 + T.
    """

    def __init__(self, k, v, lengths, *, pinned=0):
        memory.pool("k", k, 4, "[B,slots,Hk,D]", FLOATS), memory.pool("v", v, 4, "[B,slots,Hk,Dv]", FLOATS)
        checks.same("v", "shape [B,slots,Hk] of k", list(k.shape[:3]), list(v.shape[:3]), "keys and values share their slots")
        checks.same("v", "element type of k", arrays.dtype_name(k), arrays.dtype_name(v), "keep both in one type")
        checks.lengths("lengths", lengths, (int(k.shape[0]),), "[B]")
        checks.together(dict(k=k, v=v, lengths=lengths))
        self.pinned = checks.integer("pinned", pinned, 0, int(k.shape[1]) - 1)
        self.window = int(k.shape[1]) - self.pinned
        self.pools, self.lengths = (k, v), lengths
        B = int(k.shape[0])
        self._table = xp.constant(np.arange(B, dtype=np.int32)[:, None], lengths)  # to the kernel each sequence is one page
        self.tokens = [max(0, int(n)) for n in xp.to_numpy(lengths)]

    @classmethod
    def empty(cls, like, *, sequences, window, heads, width, value_width=None, pinned=0, dtype=None) -> "RollingKV":
        """Beside the array `like`, in its element type unless `dtype` names another; heads Hk, width D, value_width Dv (D by default)."""
        kind = checks.choice("dtype", dtype or arrays.dtype_name(memory.writable("like", like)), FLOATS)
        slots = checks.integer("pinned", pinned, 0) + checks.integer("window", window, 1)
        shape = checks.integer("sequences", sequences, 1), slots, checks.integer("heads", heads, 1)
        widths = checks.integer("width", width, 1, 576), checks.integer("value_width", width if value_width is None else value_width, 1, 576)
        return cls(*(memory.zeros(like, (*shape, n), kind) for n in widths), memory.zeros(like, shape[:1], "int32"), pinned=pinned)

    @property
    def slots(self) -> int:
        return self.pinned + self.window

    def pattern(self) -> Pattern:
        """What a query at the end of the sequence sees, as a pattern over the whole of it."""
        return Window(self.window - 1) | Sink(self.pinned) & Causal() if self.pinned else Window(self.window - 1)

    # ---- writing
    def write(self, k, v, counts=None, *, backend=None) -> None:
        """k [B,Hk,n,D], v [B,Hk,n,Dv] over the oldest keys, then lengths += n (or counts [B] int32 on the device). Device work only."""
        append("copy", rows_of(self.pools, len(self.tokens), k, v), self.pools, self._table, self.lengths, page_size=self.slots, counts=counts, ring=(self.pinned, self.window),
               backend=backend)

    def append(self, k, v, counts=None, *, backend=None) -> None:
        """write, and remember on the host how many tokens came; counts: a list of how many of the n rows are real for each sequence."""
        rows_of(self.pools, len(self.tokens), k, v)
        n = int(k.shape[2])
        counts = None if counts is None else of_each("counts", counts, len(self.tokens), n)
        self.write(k, v, None if counts is None else xp.constant(np.array(counts, np.int32), self.lengths), backend=backend)
        self.advance(n if counts is None else counts)

    def advance(self, tokens) -> None:
        """Tell the host's count that so many tokens (one number, or a list of one each) were written by `write` (a graph's replay)."""
        self.tokens = [length + n for length, n in zip(self.tokens, of_each("tokens", tokens, len(self.tokens)))]

    def evict(self, sequence: int) -> None:
        """Forget a sequence. (Single keys leave by themselves, the oldest first.)"""
        self._set(checks.integer("sequence", sequence, 0, len(self.tokens) - 1), 0)

    def fork(self, source: int, target: int) -> None:
        """`target`, which must be empty, becomes a copy of `source`: a ring overwrites what it holds, so nothing can be shared."""
        source, target = (checks.integer(name, b, 0, len(self.tokens) - 1) for name, b in (("source", source), ("target", target)))
        if self.tokens[target]:
            raise ValueError(f"target: expected an empty sequence, got {target}, which holds {self.tokens[target]} tokens; evict it first")
        for pool in self.pools:
            pool[target] = pool[source]
        self._set(target, self.tokens[source])

    def _set(self, b, tokens):
        self.tokens[b] = tokens
        memory.put(self.lengths[b:b + 1], np.array([tokens], np.int32))

    # ---- reading
    def positions(self, *, in_cache=False):
        """[B,slots] int32: the position of the key that each slot holds, -1 for an empty slot. in_cache: its rank among the keys held, by age, as StreamingLLM counts."""
        lib, length = xp.module(self.lengths), self.lengths[:, None]
        slot = xp.arange(self.lengths, self.slots)[None]                              # [1, slots]
        newest, ring = length - 1 - self.pinned, slot - self.pinned
        rolling = newest - (newest - ring) % self.window                              # counted behind the pinned ones
        position = lib.where(slot < self.pinned, lib.where(slot < length, slot, -1), lib.where((rolling >= 0) & (newest >= 0), rolling + self.pinned, -1))
        if in_cache:
            gone = lib.where(length > self.slots, length - self.slots, 0)
            position = lib.where(position >= self.pinned, position - gone, position)
        return xp.astype(position, "int32")

    def keys(self, T, rule, kv_length, q_start, backend=None):
        """One query at the end of each sequence that sees all that is held: the slots, in any order. Else each slot by the position it holds, as a selection."""
        if isinstance(rule, (Layout, Selection)):
            raise Unsupported(f"pattern: a RollingKV takes patterns, got a {type(rule).__name__}; its slots are not positions")
        k, v = (pool.swapaxes(1, 2) for pool in self.pools)
        if T == 1 and q_start is None and kv_length is None and rule in (Full(), Causal(), self.pattern()):
            return Keys(k, v, Full(), xp.module(k).clip(self.lengths, 0, self.slots), None)
        position = self.positions()[:, None, None]                                    # [B, 1, 1, slots]
        shape = len(self.tokens), 1, T, self.slots
        position = position.expand(shape) if xp.kind(position) == "torch" else xp.module(position).broadcast_to(position, shape)
        length = self.shorter(kv_length)
        seen = Selection(position, restriction=rule).resolve(2 ** 31 - 1, q_start, length).indices
        seen = xp.module(seen).where((seen >= 0) & (seen < length.reshape(-1, 1, 1, 1)), xp.arange(seen, self.slots), -1)
        return Keys(k, v, Selection(xp.astype(seen, "int32")), None, 0)

    def gather(self):
        """(k [B,Hk,S,D], v [B,Hk,S,Dv]) by age, S what the longest sequence holds; 0 past the keys that a sequence holds."""
        rank = self.positions(in_cache=True)                                          # [B, slots]
        S = min(max(self.tokens), self.slots)
        lib, B = xp.module(rank), len(self.tokens)
        order = xp.astype(xp.arange(rank, B)[:, None] * (S + 1) + lib.where(rank >= 0, rank, S), "int64")
        slot = xp.scatter(B * (S + 1), order, xp.astype(xp.arange(rank, self.slots)[None] + 0 * rank, "int32"), -1).reshape(B, S + 1)[:, :S]
        b, there = xp.astype(xp.arange(rank, B), "int64")[:, None], xp.astype(lib.where(slot >= 0, slot, 0), "int64")
        out = []
        for pool in self.pools:
            x = pool[b, there]                                                        # [B, S, Hk, D]
            x[slot < 0] = 0
            out.append(x.swapaxes(1, 2))
        return tuple(out)
