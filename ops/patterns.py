"""Patterns: rules over positions that say which keys one query may see.

A pattern is a host value: frozen, hashable, printable, serialisable. `p` is a query's absolute position (it may be negative when T > S),
`s` a key's, 0 <= s < S. Equality is structural after normalisation: `&` and `|` are flattened, sorted and deduplicated, `~~a` is `a`,
`a | Full()` is `Full()`, `a & Full()` is `a`, `Causal()` is `Window(None, 0)`, `Full()` is `Window(None, None)`.

Sources: Sparse Transformer (arXiv:1904.10509, section 4), Longformer (arXiv:2004.05150, section 3), BigBird (arXiv:2007.14062, section 2),
Mistral 7B (arXiv:2310.06825, section 2), StreamingLLM (arXiv:2309.17453, section 3).
"""
from dataclasses import dataclass

import numpy as np

from sparsetile.ops import array_operators as xp
from sparsetile.ops.pattern import And, Not, Or, Pattern, PerHead, flag, integer, once, listed, shown, complement, intersection, union  # noqa: F401

_FAR = 2 ** 31 - 1  # positions are below it, so a wider window is an unbounded one


@dataclass(frozen=True, eq=False, repr=False)
class Window(Pattern):
    """p - left <= s <= p + right; None is unbounded. Mistral's W keys including self are `Window(W - 1)`.

    With `block` b > 1 the distance is counted in whole blocks: p // b - left <= s // b <= p // b + right (BigBird's window of blocks).
    """
    left: int | None = None
    right: int | None = 0
    block: int = 1

    def __post_init__(self):
        remedy = "use None for an unbounded side (FlashAttention's -1, see from_flash_attention)"
        for name in ("left", "right"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, integer("Window", name, value, 0, remedy))
        object.__setattr__(self, "block", 1 if self.left is None and self.right is None else integer("Window", "block", self.block, 1, most=_FAR))

    def _kinds(self):
        return {"full" if self.left is None and self.right is None else "window" if self.left is not None and self.right is not None else "causal"}

    def _see(self, p, s, S):
        if self.left is None and self.right is None:
            return (p == p) & (s == s)
        distance = p - s if self.block == 1 else p // self.block - s // self.block
        if self.left is None:
            return distance >= -min(self.right, _FAR)
        near = distance <= min(self.left, _FAR)
        return near if self.right is None else near & (distance >= -min(self.right, _FAR))


FULL, _CAUSAL = Window(None, None), Window(None, 0)  # made once: models name them in every call
NOTHING = Not(FULL)


def Full() -> Window:
    """All keys."""
    return FULL


def Causal() -> Window:
    """s <= p."""
    return _CAUSAL


@dataclass(frozen=True, eq=False, repr=False)
class Dilated(Pattern):
    """p - left <= s <= p + right and (p - s) % step == 0; None is unbounded. left and right are distances in positions, not numbers of keys."""
    left: int | None
    right: int | None
    step: int

    def __post_init__(self):
        for name in ("left", "right"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, integer("Dilated", name, value, 0, "use None for an unbounded side"))
        object.__setattr__(self, "step", integer("Dilated", "step", self.step, 1, most=_FAR))

    @once
    def window(self) -> Window:
        return Window(self.left, self.right)

    def _see(self, p, s, S):
        return self.window._see(p, s, S) & ((p - s) % self.step == 0)


@dataclass(frozen=True, eq=False, repr=False)
class Strided(Pattern):
    """(p - s) % stride == 0: the column of Sparse Transformer's strided attention (the paper's second head, without its causality)."""
    stride: int

    def __post_init__(self):
        object.__setattr__(self, "stride", integer("Strided", "stride", self.stride, 1, most=_FAR))

    def _see(self, p, s, S):
        return (p - s) % self.stride == 0


@dataclass(frozen=True, eq=False, repr=False)
class Compressed(Pattern):
    """s * stride + block - 1 <= p: key s stands for `block` positions from s * stride on and is seen once the last of them is not past the query.

    Queries count positions, keys count compressed blocks: the compressed branch of Native Sparse Attention (arXiv:2502.11089, equation 7).
    """
    block: int
    stride: int

    def __post_init__(self):
        for name in ("block", "stride"):
            object.__setattr__(self, name, integer("Compressed", name, getattr(self, name), 1, most=2 ** 30))

    def extent(self, S):
        return S * self.stride + self.block - 1

    def last(self, p):
        """The last key that a query at p sees; negative where it sees none."""
        return (p - (self.block - 1)) // self.stride

    def _see(self, p, s, S):
        return s <= self.last(p)


@dataclass(frozen=True, eq=False, repr=False)
class Fixed(Pattern):
    """s // stride == p // stride, or s % stride >= stride - summary: Sparse Transformer's fixed attention (stride l, summary c), without its causality."""
    stride: int
    summary: int

    def __post_init__(self):
        object.__setattr__(self, "stride", integer("Fixed", "stride", self.stride, 1, most=_FAR))
        object.__setattr__(self, "summary", integer("Fixed", "summary", self.summary, 0, f"at most the stride {self.stride}", self.stride))

    def _see(self, p, s, S):
        return (s // self.stride == p // self.stride) | (s % self.stride >= self.stride - self.summary)


@dataclass(frozen=True, eq=False, repr=False)
class Global(Pattern):
    """s in tokens, or (symmetric) p in tokens. A token given twice counts once; none at all sees nothing."""
    tokens: tuple
    symmetric: bool = True

    def __post_init__(self):
        tokens = self.tokens
        if isinstance(tokens, (int, np.integer)):
            tokens = (tokens,)
        if not isinstance(tokens, range):
            tokens = (integer("Global", "tokens", t, 0, "positions count from 0", _FAR) for t in listed("Global", "tokens", tokens))
        elif tokens and not (0 <= min(tokens[0], tokens[-1]) and max(tokens[0], tokens[-1]) < 2 ** 27):
            raise ValueError(f"Global: tokens must be integers in 0..{2 ** 27 - 1}, got {shown(tokens)}; positions count from 0")
        object.__setattr__(self, "tokens", tuple(sorted(set(tokens))))
        object.__setattr__(self, "symmetric", flag("Global", "symmetric", self.symmetric))

    @once
    def runs(self) -> tuple:
        """Maximal runs of tokens, ascending: ((first, one past the last), ...)."""
        runs = []
        for token in self.tokens:
            if runs and runs[-1][1] == token:
                runs[-1][1] = token + 1
            else:
                runs.append([token, token + 1])
        return tuple((lo, hi) for lo, hi in runs)

    @once
    def bounds(self) -> np.ndarray:
        """The runs as int64 [n, 2]."""
        return np.asarray(self.runs, np.int64).reshape(-1, 2)

    def _holds(self, x):
        if len(self.runs) > 8:  # position in the sorted ends: inside a run when odd
            return xp.rank(self.bounds.reshape(-1), x) % 2 == 1
        seen = x != x
        for lo, hi in self.runs:
            seen = seen | ((x >= lo) & (x < hi))
        return seen

    def _see(self, p, s, S):
        keys = self._holds(s) & (p == p)
        return keys | self._holds(p) if self.symmetric else keys


@dataclass(frozen=True, eq=False, repr=False)
class Sink(Pattern):
    """s < n: the first n keys, as StreamingLLM keeps them."""
    n: int

    def __post_init__(self):
        object.__setattr__(self, "n", integer("Sink", "n", self.n))

    def _kinds(self):
        return {"sinks"}  # "sink" among a problem's features is the sink's logits

    def _see(self, p, s, S):
        return (s < min(self.n, _FAR)) & (p == p)


@dataclass(frozen=True, eq=False, repr=False)
class RandomBlocks(Pattern):
    """`count` distinct key blocks for query block p // block, drawn by an integer hash of (seed, p // block): see ops/random_blocks.py.

    Drawn from blocks 0 .. p // block if causal (what they hold past p is not cut off: add `& Causal()`), else from all ceil(S / block) blocks;
    never from blocks all of whose pairs (if causal: whose pairs with s <= p) the `exclude` patterns together already see. Fewer than count where fewer are left.
    The same on every machine and backend. Causal draws do not depend on S. The others have this property: if the draw for S keys lies
    inside S' <= S keys, it is also the draw for S' keys; each draw is uniform over the allowed blocks. Queries at p < 0 see none.
    """
    count: int
    block: int
    seed: int = 0
    causal: bool = False
    exclude: tuple = ()

    def __post_init__(self):
        set_ = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        set_("count", integer("RandomBlocks", "count", self.count))
        set_("block", integer("RandomBlocks", "block", self.block, 1, most=_FAR))
        set_("seed", integer("RandomBlocks", "seed", self.seed, 0, most=2 ** 63 - 1))
        set_("causal", flag("RandomBlocks", "causal", self.causal))
        exclude = (self.exclude,) if isinstance(self.exclude, Pattern) else tuple(self.exclude) if isinstance(self.exclude, (list, tuple)) else (self.exclude,)
        for part in exclude:
            if not isinstance(part, Pattern) or part.heads is not None:
                raise TypeError(f"RandomBlocks: exclude must be patterns without heads, got {shown(part)}; make one RandomBlocks per head inside PerHead")
        joint = union(exclude) if exclude else None
        set_("exclude", () if joint is None else joint.parts if isinstance(joint, Or) else (joint,))

    def _children(self):
        return self.exclude

    def _kinds(self):
        return {"random"}

    @property
    def needs_exact_S(self):
        return not self.causal or super().needs_exact_S

    def _see(self, p, s, S):
        from sparsetile.ops.random_blocks import visible
        return visible(self, p, s, S)


@dataclass(frozen=True, eq=False, repr=False)
class Blocks(Pattern):
    """An explicit boolean block mask [nq, nk] or per head [heads, nq, nk]: (p, s) is seen when mask[p // block_q, s // block_k]; outside the mask nothing is."""
    mask_bits: object
    block_q: int = 64
    block_k: int = 64

    def __init__(self, mask, block_q: int = 64, block_k: int = 64):
        object.__setattr__(self, "block_q", integer("Blocks", "block_q", block_q, 1, most=_FAR))
        object.__setattr__(self, "block_k", integer("Blocks", "block_k", block_k, 1, most=_FAR))
        if not isinstance(mask, np.ndarray) and type(mask).__module__.partition(".")[0] in ("cupy", "torch", "jax", "jaxlib") and xp.on_device(mask):
            raise TypeError("Blocks: mask must be on the host, got a device array; use Layout.from_block_mask, which builds the layout on the device")
        try:
            bits = np.asarray(mask)
        except ValueError:
            raise ValueError("Blocks: mask must be [nq, nk] or [heads, nq, nk], got lists of unequal lengths; give every row as many blocks") from None
        if bits.dtype != bool and not (bits.dtype.kind in "iu" and np.isin(bits, (0, 1)).all()):
            raise TypeError(f"Blocks: mask must be boolean (or 0 and 1), got {bits.dtype}; compare it first, e.g. mask > 0")
        if bits.ndim not in (2, 3) or (bits.ndim == 3 and not bits.shape[0]):
            raise ValueError(f"Blocks: mask must be [nq, nk] or [heads, nq, nk], got shape {bits.shape}; per sample masks go through Layout.from_block_mask")
        bits = np.ascontiguousarray(bits, bool).copy()
        bits.setflags(write=False)
        object.__setattr__(self, "mask_bits", bits)

    @property
    def has_tensors(self):
        return True

    @property
    def heads(self):
        return self.mask_bits.shape[0] if self.mask_bits.ndim == 3 else None

    @once
    def _per_head(self):
        return PerHead([Blocks(bits, self.block_q, self.block_k) for bits in self.mask_bits])

    def rules(self):
        return (self,) if self.heads is None else self._per_head.rules()

    def head_map(self):
        return (0,) if self.heads is None else self._per_head.head_map()

    def _see(self, p, s, S):
        nq, nk = self.mask_bits.shape
        i, j = p // self.block_q, s // self.block_k
        inside = (i >= 0) & (i < nq) & (j >= 0) & (j < nk)
        return inside & xp.lookup(self.mask_bits, i * inside, j * inside) if nq and nk else inside


@dataclass(frozen=True, eq=False, repr=False)
class Documents(Pattern):
    """Packed sequences of the given lengths, one after the other from position 0: same document only. Positions outside every document see nothing and are not seen."""
    lengths: tuple

    def __post_init__(self):
        lengths = self.lengths
        if type(lengths).__module__.partition(".")[0] in ("cupy", "torch", "jax", "jaxlib") and xp.on_device(lengths):
            raise TypeError("Documents: lengths must be on the host, got a device array; use Layout.from_documents, which builds the layout on the device")
        remedy = "give the number of tokens of each document"
        values = tuple(integer("Documents", "lengths", n, 0, remedy) for n in listed("Documents", "lengths", lengths))
        if sum(values) > _FAR:
            raise ValueError(f"Documents: lengths must be fewer than 2**31 tokens together, got {sum(values)}; {remedy}")
        object.__setattr__(self, "lengths", values)

    @property
    def has_tensors(self):
        return True

    @once
    def ends(self) -> np.ndarray:
        return np.cumsum(np.asarray(self.lengths, np.int64))

    @property
    def total(self) -> int:
        return int(self.ends[-1]) if self.lengths else 0

    def _see(self, p, s, S):
        if not self.total:
            return (p != p) | (s != s)
        inside = (p >= 0) & (p < self.total) & (s >= 0) & (s < self.total)
        return inside & (xp.rank(self.ends, p) == xp.rank(self.ends, s))
