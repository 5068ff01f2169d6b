"""Layouts: patterns lowered to the block lists that kernels read, and layouts made on a device from its own tensors."""
from dataclasses import dataclass, replace

import numpy as np

from sparsetile.backends import arrays
from sparsetile.backends.contract import Lists
from sparsetile.ops import array_operators as xp
from sparsetile.ops import device_lists
from sparsetile.ops.pattern import flag, shown
from sparsetile.ops.patterns import Causal, Documents, Pattern, integer


@dataclass(frozen=True, eq=False)
class Layout:
    """What `pattern=` takes besides a Pattern and a Selection: block lists over absolute positions, on the host or on a device.

    parts   Lists with disjoint pairs; their outputs are merged by LSE, in this order
    T, S    queries and keys it was made for; kernels take their rows by position and clip the keys, so shorter calls need no new layout
    q_start   position of query 0, used by `mask`; calls go by their own q_start
    """
    parts: tuple
    T: int
    S: int
    q_start: int | None = None

    def __post_init__(self):
        if not isinstance(self.parts, tuple) or not self.parts or not all(isinstance(part, Lists) for part in self.parts):
            raise TypeError(f"Layout: parts must be a tuple of Lists and not empty, got {shown(self.parts)}; make layouts with Layout.of, from_block_mask, from_documents or from_global_tokens")

    @property
    def block_q(self) -> int:
        return self.parts[0].block_q

    @property
    def block_k(self) -> int:
        return self.parts[0].block_k

    def __repr__(self):
        lead = self.parts[0].list_of
        return f"Layout(T={self.T}, S={self.S}, blocks of {self.block_q} x {self.block_k}, {len(self.parts)} part(s), lists [{lead.shape[0]}, {lead.shape[1]}])"

    @classmethod
    def of(cls, pattern: Pattern, T: int, S: int, *, block_q: int = 128, block_k: int = 128, q_start: int | None = None, heads: int | None = None) -> "Layout":
        """The layout of a pattern for queries at q_start .. q_start + T - 1 (default S - T) and keys 0 .. S - 1. Host arrays."""
        from sparsetile.ops.lowering import lower
        if not isinstance(pattern, Pattern):
            raise TypeError(f"layout: pattern must be a Pattern, got {shown(pattern)} of type {type(pattern).__name__}; e.g. Causal() or Window(127)")
        T, S = integer("layout", "T", T, most=_MOST), integer("layout", "S", S, most=_MOST)
        heads = None if heads is None else integer("layout", "heads", heads, 1)
        block_q, block_k = _blocks(block_q, block_k)
        start = S - T if q_start is None else integer("layout", "q_start", q_start, None)
        return cls(tuple(lower(pattern, start, start + T, S, block_q, block_k, heads)), T, S, start)

    @classmethod
    def from_block_mask(cls, mask, block_q: int = 128, block_k: int = 128, *, T: int | None = None, S: int | None = None) -> "Layout":
        """From a block mask [nq,nk], [Hq,nq,nk] or [B,Hq,nq,nk] (boolean or 0/1; a head axis of 1 is shared by all heads), every kept block full.

        NumPy, PyTorch, CuPy or JAX; the lists are made on the mask's device without a host round trip, so inside a CUDA graph too. Block i holds
        queries at positions i * block_q ... T and S default to whole blocks.
        """
        block_q, block_k = _blocks(block_q, block_k)
        mask = _table("from_block_mask", "mask", mask, (2, 3, 4), "boolean (or 0 and 1) [nq,nk], [Hq,nq,nk] or [B,Hq,nq,nk]", ("bool", *_INTS))
        nq, nk = int(mask.shape[-2]), int(mask.shape[-1])
        T = nq * block_q if T is None else integer("from_block_mask", "T", T, max(nq - 1, 0) * block_q, "it ends in the mask's last row of blocks", nq * block_q)
        S = nk * block_k if S is None else integer("from_block_mask", "S", S, max(nk - 1, 0) * block_k, "it ends in the mask's last column of blocks", nk * block_k)
        lead = (1,) * (4 - mask.ndim) + tuple(int(n) for n in mask.shape[:-2])
        kinds = -1 - xp.astype(mask == 0, "int32").reshape(lead[0] * lead[1], nq, nk)  # -1 full, -2 absent
        return cls((device_lists.lists(kinds, block_q, block_k, lead[:2]),), T, S, 0)

    @classmethod
    def from_documents(cls, lengths=None, total: int | None = None, block_q: int = 128, block_k: int = 128, *, causal: bool = False, cu_seqlens=None) -> "Layout":
        """Packed sequences: each token sees its own document only (`Documents(lengths)`, and `& Causal()`).

        lengths [n] or cu_seqlens [n + 1] (0 first, ends after it), int32 or int64; total: number of tokens, T = S = total. It may be left out only on
        the host. Tokens at or past the last end see nothing. Zero lengths are allowed. Device tensors are read on the device, never on the host.
        """
        block_q, block_k = _blocks(block_q, block_k)
        if (lengths is None) == (cu_seqlens is None):
            raise ValueError("from_documents: expected either lengths or cu_seqlens, got " + ("neither" if lengths is None else "both") + "; pass one of them")
        flag("from_documents", "causal", causal)
        given, name = (lengths, "lengths") if cu_seqlens is None else (cu_seqlens, "cu_seqlens")
        given = _table("from_documents", name, given, (1,), f"integers [{'n' if cu_seqlens is None else 'n + 1'}]", ("int32", "int64"))
        if xp.kind(given) == "numpy":
            if cu_seqlens is not None and (not len(given) or given[0] != 0 or (given[1:] < given[:-1]).any()):
                raise ValueError(f"from_documents: cu_seqlens must be 0 and then ends that do not descend, got {shown(given.tolist())}; pass lengths instead")
            rule = Documents(given if cu_seqlens is None else np.diff(given))
            total = rule.total if total is None else integer("from_documents", "total", total, most=_MOST)
            return cls.of(rule & Causal() if causal else rule, total, total, block_q=block_q, block_k=block_k, q_start=0)
        if total is None:
            raise ValueError("from_documents: total must be given with tensors (their sum would be a host round trip), got None; give the number of tokens")
        total = integer("from_documents", "total", total, most=_MOST)
        ends = xp.running(given, 0) if cu_seqlens is None else xp.astype(given[1:], "int32")
        return cls((device_lists.documents(ends, total, block_q, block_k, bool(causal)),), total, total, 0)

    @classmethod
    def from_global_tokens(cls, tokens, T: int, S: int, block_q: int = 128, block_k: int = 128, *, window=None, causal: bool = False) -> "Layout":
        """Longformer with global tokens of its own for every sample: `Window(*window) | Global(tokens[b])`, and `& Causal()` if causal.

        tokens  [B, n] int32, padded with -1 (values outside 0 .. S-1 stand for nothing; repeats count once)
        window  (left, right) distances, or one number for both; None is no window. Queries stand bottom-right, at S - T ...
        """
        block_q, block_k = _blocks(block_q, block_k)
        flag("from_global_tokens", "causal", causal)
        T, S = integer("from_global_tokens", "T", T, most=_MOST), integer("from_global_tokens", "S", S, most=_MOST)
        tokens = _table("from_global_tokens", "tokens", tokens, (2,), "integers [B, n] padded with -1", ("int32", "int64"))
        sides = window if isinstance(window, (tuple, list)) else (window, window)
        if len(sides) != 2:
            raise ValueError(f"from_global_tokens: window must be one number or (left, right), got {shown(window)}; pass a pair of distances")
        sides = None if window is None else tuple(integer("from_global_tokens", "window", side) for side in sides)
        return cls((device_lists.global_tokens(tokens, T, S, block_q, block_k, sides, bool(causal)),), T, S, S - T)

    def check(self, B: int, Hq: int, T: int = 0, S: int = 0, q_start: int | None = None) -> None:
        """ValueError if the layout's lists are for another number of samples or heads than the call's, or end before its keys or queries (where known) do."""
        if S > self.S:
            raise ValueError(f"pattern: expected a layout for at least S = {S} keys, got one for {self.S}; make it for as many as the cache will hold")
        if T and q_start is not None and self.q_start is not None and not self.q_start <= q_start <= self.q_start + self.T - T:
            raise ValueError(f"pattern: expected a layout that holds the queries at {q_start} .. {q_start + T - 1}, got one for {self.q_start} .. {self.q_start + self.T - 1}; "
                             "make it with larger T, or pass q_start")
        for part in self.parts:
            samples, heads = part.list_of.shape
            if samples not in (1, B) or heads not in (1, Hq):
                raise ValueError(f"pattern: expected a layout for 1 or B = {B} samples and 1 or Hq = {Hq} heads, got lists for {samples} and {heads}; make it with 1 or as many of each")

    def on(self, key, carry) -> tuple:
        """`carry(part)` of every part, made once for each key (a place) and kept with the layout."""
        kept = self.__dict__.setdefault("_carried", {})
        if key not in kept:
            kept[key] = tuple(carry(part) for part in self.parts)
        return kept[key]

    def to_numpy(self) -> "Layout":
        """A copy whose arrays are NumPy's."""
        names = ("offsets", "cols", "kinds", "by_key_offsets", "by_key_rows", "by_key_kinds", "intervals", "bitmaps", "list_of", "q_order", "k_order")
        host = lambda x: None if x is None else xp.to_numpy(x)  # noqa: E731
        return replace(self, parts=tuple(replace(part, extras={}, **{name: host(getattr(part, name)) for name in names}) for part in self.parts))

    def mask(self, T: int | None = None, S: int | None = None, q_start: int | None = None):
        """Dense booleans, NumPy: [T,S], or [Hq,T,S] or [B,Hq,T,S] where lists differ by head or sample. q_start defaults to the layout's (S - T for other sizes)."""
        start = self.q_start if q_start is None and T is None and S is None else q_start
        T, S = self.T if T is None else T, self.S if S is None else S
        start = S - T if start is None else start
        seen = None
        for part in self.to_numpy().parts:
            one = decode(part, T, S, start)[part.list_of]  # [B,Hq,T,S]
            seen = one if seen is None else seen | one
        return seen if seen.shape[0] > 1 else seen[0] if seen.shape[1] > 1 else seen[0, 0]


def decode(lists: Lists, T: int, S: int, q_start: int) -> np.ndarray:
    """What the lists of one part (NumPy arrays) show: bool [L, T, S] for queries at q_start .. q_start + T - 1. Written for reading, block by block.

    Raises ValueError where the lists break their own rules: a pair twice, columns that do not ascend, full and partial in the wrong half.
    """
    if lists.list_of.size == 0:
        return np.zeros((1, T, S), bool)
    L = (len(lists.offsets) - 1) // (2 * lists.nq) if lists.nq else int(lists.list_of.max()) + 1
    seen = np.zeros((L, T, S), bool)
    for l in range(L):
        for i in range(lists.nq):
            x = 2 * (l * lists.nq + i)
            for half, (a, b) in enumerate(zip(lists.offsets[x:x + 2].tolist(), lists.offsets[x + 1:x + 3].tolist())):
                if (np.diff(lists.cols[a:b]) <= 0).any() or ((lists.kinds[a:b] >= 0) != bool(half)).any():
                    raise ValueError(f"list {l}, row block {i}: entries {a}..{b} are not ascending, or not all {'partial' if half else 'full'}")
                for j, kind in zip(lists.cols[a:b].tolist(), lists.kinds[a:b].tolist()):
                    _paint(seen[l], lists, i, j, kind, q_start)
    return seen


def _paint(seen, lists, i, j, kind, q_start):
    rows = (lists.first + i) * lists.block_q + np.arange(lists.block_q) if lists.q_order is None else lists.q_order[i * lists.block_q:(i + 1) * lists.block_q]
    keys = j * lists.block_k + np.arange(lists.block_k) if lists.k_order is None else lists.k_order[j * lists.block_k:(j + 1) * lists.block_k]
    t = rows - q_start
    t_in = (t >= 0) & (t < seen.shape[0]) & ((rows >= 0) | (lists.q_order is None))
    s_in = (keys >= 0) & (keys < seen.shape[1])
    where = np.ix_(t[t_in], keys[s_in])
    shown = picture(lists, kind)[np.ix_(t_in, s_in)]
    if (seen[where] & shown).any():
        raise ValueError(f"block ({i}, {j}) shows a pair that an earlier block has shown")
    seen[where] |= shown


def picture(lists: Lists, kind: int) -> np.ndarray:
    """bool [block_q, block_k] of an entry's kind."""
    c = np.arange(lists.block_k)
    if kind < 0:
        return np.ones((lists.block_q, lists.block_k), bool)
    if kind % 2 == 0:
        lo, hi = lists.intervals[kind // 2, :, 0, None], lists.intervals[kind // 2, :, 1, None]
        return (c >= lo) & (c < hi)
    words = lists.bitmaps[kind // 2].astype(np.int64)
    return (words[:, c // 32] >> (c % 32)) & 1 == 1


_MOST = 2 ** 31 - 1  # positions are int32
_INTS = ("int8", "uint8", "int16", "int32", "int64")


def _table(owner, name, x, axes, what, kinds):
    """An array argument, or nested lists as a NumPy array."""
    if isinstance(x, (list, tuple)):
        try:
            x = np.asarray(x) if x else np.zeros(0, kinds[0])
        except ValueError:
            raise ValueError(f"{owner}: {name} must be {what}, got lists of unequal lengths; pad them") from None
    if arrays.framework(x) is None:
        raise TypeError(f"{owner}: {name} must be {what}, got {shown(x)} of type {type(x).__name__}; give a list or an array")
    if arrays.dtype_name(x) not in kinds:
        raise TypeError(f"{owner}: {name} must be {what}, got element type {arrays.dtype_name(x)}; convert it to {kinds[0]}")
    if x.ndim not in axes:
        raise ValueError(f"{owner}: {name} must be {what}, got shape {list(x.shape)}; add or remove axes")
    return x


def _blocks(block_q, block_k):
    block_q, block_k = integer("layout", "block_q", block_q, 1, most=2 ** 15), integer("layout", "block_k", block_k, 1, most=2 ** 15)
    if block_k % 32:
        raise ValueError(f"layout: block_k must be a multiple of 32, got {block_k}; use 32, 64 or 128")
    return block_q, block_k
