"""Patterns: rules over positions that say which keys one query may see.

A pattern is a host value: frozen, hashable, printable, serialisable. `p` is a query's absolute position (it may be negative when T > S),
`s` a key's, 0 <= s < S. Equality is structural after normalisation: `&` and `|` are flattened, sorted and deduplicated, `~~a` is `a`,
`a | Full()` is `Full()`, `a & Full()` is `a`, `Causal()` is `Window(None, 0)`, `Full()` is `Window(None, None)`.

Sources: Sparse Transformer (arXiv:1904.10509, section 4), Longformer (arXiv:2004.05150, section 3), BigBird (arXiv:2007.14062, section 2),
Mistral 7B (arXiv:2310.06825, section 2), StreamingLLM (arXiv:2309.17453, section 3).
"""
import operator
from dataclasses import dataclass

import numpy as np

from sparsetile.ops import array_operators as xp

_FAR = 2 ** 31 - 1  # positions are below it, so a wider window is an unbounded one


class _kept:
    """A property computed once: functools.cached_property without the lock of Python 3.11, which torch.compile cannot trace."""

    def __init__(self, make):
        self.make, self.name, self.__doc__ = make, make.__name__, make.__doc__

    def __get__(self, owner, kind=None):
        if owner is None:
            return self
        value = owner.__dict__[self.name] = self.make(owner)
        return value


def _integer(owner: str, name: str, value, least: int | None = 0, remedy: str = "", most: int | None = None) -> int:
    bounds = "" if least is None else f" >= {least}" if most is None else f" in {least}..{most}"
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{owner}: {name} must be an integer{bounds}, got {value!r} of type {type(value).__name__}{remedy and '; ' + remedy}") from None
    if least is not None and number < least or most is not None and number > most:
        raise ValueError(f"{owner}: {name} must be an integer{bounds}, got {number}{remedy and '; ' + remedy}")
    return number


class Pattern:
    """Base of all patterns. Combine with `&`, `|`, `~`; every pattern answers the methods below."""

    heads = None  # number of heads of a PerHead pattern (or of Blocks given per head), else None

    # ---- identity
    @_kept
    def _text(self) -> str:
        from sparsetile.ops.notation import write
        return write(self)

    @_kept
    def _hash(self) -> int:
        return hash((type(self).__name__, self._text))

    def __eq__(self, other):
        if not isinstance(other, Pattern):
            return NotImplemented
        return type(self) is type(other) and self._text == other._text

    def __hash__(self):
        return self._hash

    def __repr__(self):
        return self._text if len(self._text) <= 400 else f"{self._text[:300]}...{self._text[-60:]}"

    def __reduce__(self):
        return Pattern.parse, (self._text,)

    # ---- algebra
    def __and__(self, other):
        return intersection((self, other)) if isinstance(other, Pattern) else NotImplemented

    def __or__(self, other):
        return union((self, other)) if isinstance(other, Pattern) else NotImplemented

    def __invert__(self):
        return complement(self)

    # ---- text and data
    def canonical(self) -> str:
        """One line of text that `Pattern.parse` turns back into an equal pattern; equal patterns have equal text."""
        return self._text

    @staticmethod
    def parse(text: str) -> "Pattern":
        """The pattern of a canonical text, or of one written by hand such as "Causal() & (Window(127) | Strided(128))". Nothing is executed."""
        from sparsetile.ops.notation import read
        return read(text)

    def to_data(self):
        """Plain dicts, lists and numbers, as they stand in YAML."""
        from sparsetile.ops.notation import to_data
        return to_data(self)

    @staticmethod
    def from_data(data) -> "Pattern":
        """The pattern of plain data, checked entry by entry; a string is parsed."""
        from sparsetile.ops.notation import from_data
        return from_data(data)

    def to_yaml(self) -> str:
        """YAML text that `Pattern.from_yaml` turns back into an equal pattern."""
        from sparsetile.ops.notation import to_yaml
        return to_yaml(self)

    @staticmethod
    def from_yaml(text: str) -> "Pattern":
        """The pattern of a YAML text: safe loader, no aliases, size limit, schema checked."""
        from sparsetile.ops.notation import from_yaml
        return from_yaml(text)

    @property
    def has_tensors(self) -> bool:
        """Whether Blocks or Documents stand in it, whose text grows with the data."""
        return any(part.has_tensors for part in self._children())

    def _children(self) -> tuple:
        return ()

    # ---- heads
    def rules(self) -> tuple:
        """The distinct single-head rules; without heads the pattern itself alone."""
        return (self,)

    def head_map(self) -> tuple:
        """For each head the number of its rule in `rules()`."""
        return (0,)

    def check(self, Hq: int, Hk: int) -> None:
        """ValueError if a pattern with heads does not fit a call of Hq query heads and Hk key heads."""
        if self.heads is not None and self.heads not in (Hq, Hk):
            raise ValueError(f"pattern: expected one rule per query head (Hq = {Hq}) or per key head (Hk = {Hk}), got {self.heads}; list as many patterns")

    @property
    def needs_exact_S(self) -> bool:
        """Whether it depends on the number of keys itself: RandomBlocks that are not causal. Others may be lowered once for a larger S."""
        return any(part.needs_exact_S for part in self._children())

    # ---- what is seen
    def visible(self, p, s, S: int | None = None):
        """Booleans: does the query at `p` see the key at `s`; p and s are integers or integer arrays (NumPy, PyTorch, CuPy, JAX) that broadcast.

        Keys below 0 are never seen. `S` is needed only by RandomBlocks that are not causal, which are drawn from all blocks of S keys.
        A pattern with heads answers with one more leading axis, [heads, ...].
        """
        p, s = xp.same_kind(p, s)
        if self.heads is not None:
            rules = [rule.visible(p, s, S) for rule in self.rules()]
            return xp.stack([rules[i] for i in self.head_map()], 0)
        return self._see(p, s, S) & (s >= 0)

    def _see(self, p, s, S):
        raise NotImplementedError

    def mask(self, T: int, S: int, q_start: int | None = None):
        """Dense booleans [T, S], or [heads, T, S] with heads. Query t stands at q_start + t; q_start defaults to S - T (bottom-right)."""
        T, S, q_start = _sizes(self, T, S, q_start)
        out = np.zeros((len(self.rules()), T, S), bool)
        step = max(1, 2 ** 22 // max(S, 1))  # bounds the temporaries
        s = np.arange(S)
        for n, rule in enumerate(self.rules()):
            for t in range(0, T, step):
                rows = slice(t, min(t + step, T))
                out[n, rows] = rule.visible(q_start + np.arange(rows.start, rows.stop)[:, None], s, S)
        return out[0] if self.heads is None else out[list(self.head_map())]

    def layout(self, T: int, S: int, block_q: int = 128, block_k: int = 128, q_start: int | None = None, heads: int | None = None):
        """The Layout that kernels read: see ops/layout.py."""
        from sparsetile.ops.layout import Layout
        return Layout.of(self, T, S, block_q=block_q, block_k=block_k, q_start=q_start, heads=heads)

    # ---- what it costs
    def pairs(self, T: int, S: int, q_start: int | None = None) -> int:
        """Exact number of (query, key) pairs seen, `mask(T, S).sum()` without the mask; summed over the heads of a pattern with heads."""
        from sparsetile.ops.counting import pairs
        T, S, q_start = _sizes(self, T, S, q_start)
        counts = [pairs(rule, q_start, q_start + T, S) for rule in self.rules()]
        return sum(counts[i] for i in self.head_map())

    def density(self, T: int, S: int, q_start: int | None = None) -> float:
        """Share of the T x S pairs that is seen; 0.0 where there are none."""
        return self.pairs(T, S, q_start) / (T * S * len(self.head_map())) if T and S else 0.0

    def flops(self, T: int, S: int, Hq: int = 1, D: int = 128, Dv: int | None = None, q_start: int | None = None) -> int:
        """Floating-point operations of one forward over Hq heads: 2 pairs (D + Dv), pairs inside the pattern only."""
        Hq = _integer("flops", "Hq", Hq, 1)
        if self.heads is not None and Hq % self.heads:
            raise ValueError(f"flops: Hq must be a multiple of the pattern's {self.heads} heads, got {Hq}; give Hq={self.heads} or a multiple")
        return 2 * self.pairs(T, S, q_start) * (Hq // len(self.head_map())) * (D + (D if Dv is None else Dv))

    def hops(self, T: int) -> int | None:
        """Layers until every position can reach every other, or for a causal pattern every earlier one; None if never, 0 if T is 1.

        A layer keeps what a position has (the residual) and adds what its keys have; the heads of a layer act together. The pattern is causal
        here when no position among the T sees a later one.
        """
        from sparsetile.ops.counting import hops
        return hops(self, _integer("hops", "T", T, 1))

    def plot(self, T: int, S: int | None = None, path=None, width: int = 64) -> str:
        """The mask as text for a terminal; with `path` also a PNG, one colour per part of the union, as the papers draw it (needs matplotlib)."""
        from sparsetile.ops.plot import plot
        return plot(self, T, T if S is None else S, path, width)


def _sizes(pattern: Pattern, T, S, q_start):
    T, S = _integer("pattern", "T", T), _integer("pattern", "S", S)
    return T, S, S - T if q_start is None else _integer("pattern", "q_start", q_start, None)


# ------------------------------------------------------------------------------------------------ atoms
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
                object.__setattr__(self, name, _integer("Window", name, value, 0, remedy))
        object.__setattr__(self, "block", 1 if self.left is None and self.right is None else _integer("Window", "block", self.block, 1))

    def _see(self, p, s, S):
        if self.left is None and self.right is None:
            return (p == p) & (s == s)
        distance = p - s if self.block == 1 else p // self.block - s // self.block
        if self.left is None:
            return distance >= -min(self.right, _FAR)
        near = distance <= min(self.left, _FAR)
        return near if self.right is None else near & (distance >= -min(self.right, _FAR))


def Full() -> Window:
    """All keys."""
    return Window(None, None)


def Causal() -> Window:
    """s <= p."""
    return Window(None, 0)


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
                object.__setattr__(self, name, _integer("Dilated", name, value, 0, "use None for an unbounded side"))
        object.__setattr__(self, "step", _integer("Dilated", "step", self.step, 1))

    @_kept
    def window(self) -> Window:
        return Window(self.left, self.right)

    def _see(self, p, s, S):
        return self.window._see(p, s, S) & ((p - s) % self.step == 0)


@dataclass(frozen=True, eq=False, repr=False)
class Strided(Pattern):
    """(p - s) % stride == 0: the column of Sparse Transformer's strided attention (the paper's second head, without its causality)."""
    stride: int

    def __post_init__(self):
        object.__setattr__(self, "stride", _integer("Strided", "stride", self.stride, 1))

    def _see(self, p, s, S):
        return (p - s) % self.stride == 0


@dataclass(frozen=True, eq=False, repr=False)
class Fixed(Pattern):
    """s // stride == p // stride, or s % stride >= stride - summary: Sparse Transformer's fixed attention (stride l, summary c), without its causality."""
    stride: int
    summary: int

    def __post_init__(self):
        object.__setattr__(self, "stride", _integer("Fixed", "stride", self.stride, 1))
        object.__setattr__(self, "summary", _integer("Fixed", "summary", self.summary, 0, f"at most the stride {self.stride}", self.stride))

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
            tokens = (_integer("Global", "tokens", t, 0, "positions count from 0") for t in _listed("Global", "tokens", tokens))
        elif len(tokens) and min(tokens) < 0:
            raise ValueError(f"Global: tokens must be integers >= 0, got {tokens!r}; positions count from 0")
        object.__setattr__(self, "tokens", tuple(sorted(set(tokens))))
        object.__setattr__(self, "symmetric", bool(self.symmetric))

    @_kept
    def runs(self) -> tuple:
        """Maximal runs of tokens, ascending: ((first, one past the last), ...)."""
        runs = []
        for token in self.tokens:
            if runs and runs[-1][1] == token:
                runs[-1][1] = token + 1
            else:
                runs.append([token, token + 1])
        return tuple((lo, hi) for lo, hi in runs)

    @_kept
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
        object.__setattr__(self, "n", _integer("Sink", "n", self.n))

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
        set_("count", _integer("RandomBlocks", "count", self.count))
        set_("block", _integer("RandomBlocks", "block", self.block, 1))
        set_("seed", _integer("RandomBlocks", "seed", self.seed, 0, most=2 ** 63 - 1))
        set_("causal", bool(self.causal))
        exclude = (self.exclude,) if isinstance(self.exclude, Pattern) else tuple(self.exclude)
        for part in exclude:
            if not isinstance(part, Pattern) or part.heads is not None:
                raise TypeError(f"RandomBlocks: exclude must be patterns without heads, got {part!r}; make one RandomBlocks per head inside PerHead")
        joint = union(exclude) if exclude else None
        set_("exclude", () if joint is None else joint.parts if isinstance(joint, Or) else (joint,))

    def _children(self):
        return self.exclude

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
        object.__setattr__(self, "block_q", _integer("Blocks", "block_q", block_q, 1))
        object.__setattr__(self, "block_k", _integer("Blocks", "block_k", block_k, 1))
        if not isinstance(mask, np.ndarray) and type(mask).__module__.partition(".")[0] in ("cupy", "torch", "jax", "jaxlib") and xp.on_device(mask):
            raise TypeError("Blocks: mask must be on the host, got a device array; use Layout.from_block_mask, which builds the layout on the device")
        bits = np.asarray(mask)
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

    @_kept
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
        values = np.asarray(_listed("Documents", "lengths", lengths))
        if values.size and values.dtype.kind not in "iu":
            raise TypeError(f"Documents: lengths must be integers >= 0, got {lengths!r}; give the number of tokens of each document")
        if values.size and values.min() < 0:
            raise ValueError(f"Documents: lengths must be integers >= 0, got {int(values.min())}; give the number of tokens of each document")
        object.__setattr__(self, "lengths", tuple(values.tolist()))

    @property
    def has_tensors(self):
        return True

    @_kept
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


def _listed(owner, name, values) -> list:
    if isinstance(values, (str, bytes)):
        raise TypeError(f"{owner}: {name} must be a list of integers, got the text {values!r}; give a list")
    try:
        return values.tolist() if hasattr(values, "tolist") else list(values)
    except TypeError:
        raise TypeError(f"{owner}: {name} must be a list of integers, got {values!r}; give a list, a tuple or a range") from None


class PerHead(Pattern):
    """One pattern per head: length Hq, or Hk and expanded over the group. Kept as distinct rules and a head map; masks are [heads, T, S]."""

    def __init__(self, patterns):
        patterns = tuple(patterns)
        if not patterns:
            raise ValueError("PerHead: patterns must not be empty, got none; give one per query head or per key head")
        for n, part in enumerate(patterns):
            if not isinstance(part, Pattern) or part.heads is not None:
                raise TypeError(f"PerHead: entry {n} must be a pattern without heads, got {part!r}; give one plain pattern per head")
        distinct = tuple(dict.fromkeys(patterns))
        number = {rule: n for n, rule in enumerate(distinct)}
        self.__dict__.update(_rules=distinct, _map=tuple(number[part] for part in patterns))

    def __setattr__(self, name, value):
        raise AttributeError("PerHead is frozen; build a new one")

    @property
    def heads(self):
        return len(self._map)

    @property
    def patterns(self) -> tuple:
        return tuple(self._rules[i] for i in self._map)

    def rules(self):
        return self._rules

    def head_map(self):
        return self._map

    def _children(self):
        return self._rules


# ------------------------------------------------------------------------------------------------ algebra
@dataclass(frozen=True, eq=False, repr=False)
class And(Pattern):
    """Intersection; made by `&`, which normalises."""
    parts: tuple

    def _children(self):
        return self.parts

    def _see(self, p, s, S):
        seen = self.parts[0]._see(p, s, S)
        for part in self.parts[1:]:
            seen = seen & part._see(p, s, S)
        return seen


@dataclass(frozen=True, eq=False, repr=False)
class Or(Pattern):
    """Union; made by `|`, which normalises."""
    parts: tuple

    def _children(self):
        return self.parts

    def _see(self, p, s, S):
        seen = self.parts[0]._see(p, s, S)
        for part in self.parts[1:]:
            seen = seen | part._see(p, s, S)
        return seen


@dataclass(frozen=True, eq=False, repr=False)
class Not(Pattern):
    """Complement; made by `~`, which normalises. `~Full()` sees nothing."""
    part: Pattern

    def _children(self):
        return (self.part,)

    def _see(self, p, s, S):
        return ~self.part._see(p, s, S)


def _by_head(parts, join):
    """`join` of each head's rules: patterns with heads stay on top, so every rule below is one of a single head."""
    heads = max(part.heads for part in parts if part.heads is not None)
    for part in parts:
        if part.heads is not None and heads % part.heads:
            raise ValueError(f"patterns of {part.heads} and {heads} heads cannot be combined; give both the same number, or one a divisor of the other")
    rows = [[part] * heads if part.heads is None else [part.rules()[part.head_map()[h * part.heads // heads]] for h in range(heads)] for part in parts]
    return PerHead([join(column) for column in zip(*rows)])


def _join(kind, parts, neutral, absorbing):
    if any(part.heads is not None for part in parts):
        return _by_head(parts, lambda column: _join(kind, column, neutral, absorbing))
    flat = {}
    for part in parts:
        for piece in part.parts if isinstance(part, kind) else (part,):
            if piece == absorbing:
                return absorbing
            if piece != neutral:
                flat[piece] = None
    if len(flat) < 2:
        return next(iter(flat), neutral)
    return kind(tuple(sorted(flat, key=Pattern.canonical)))


def union(parts) -> Pattern:
    """What any of the patterns sees; of none: nothing."""
    return _join(Or, tuple(parts), Not(Full()), Full())


def intersection(parts) -> Pattern:
    """What all of the patterns see; of none: everything."""
    return _join(And, tuple(parts), Full(), Not(Full()))


def complement(part: Pattern) -> Pattern:
    """What the pattern does not see."""
    if part.heads is not None:
        return _by_head((part,), lambda column: complement(column[0]))
    return part.part if isinstance(part, Not) else Not(part)
