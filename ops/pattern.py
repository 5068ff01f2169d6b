"""What every pattern answers, and the algebra of patterns: `&`, `|`, `~`, one rule per head. The rules themselves: ops/patterns.py."""
import operator
from dataclasses import dataclass

import numpy as np

from sparsetile.ops import array_operators as xp


class once:
    """A property computed once: functools.cached_property without the lock of Python 3.11, which torch.compile cannot trace."""

    def __init__(self, make):
        self.make, self.name, self.__doc__ = make, make.__name__, make.__doc__

    def __get__(self, owner, kind=None):
        if owner is None:
            return self
        value = owner.__dict__[self.name] = self.make(owner)
        return value


def shown(value) -> str:
    """A value as error messages quote it: short, whatever it is."""
    if type(value) is int and abs(value) >= 2 ** 70:
        return f"an integer of {value.bit_length()} bits"
    text = f"an array of shape {list(value.shape)}" if not isinstance(value, type) and getattr(value, "ndim", 0) else " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:60] + "..." + text[-17:]


def integer(owner: str, name: str, value, least: int | None = 0, remedy: str = "", most: int = 2 ** 63 - 1) -> int:
    bounds = " of 64 bits" if least is None else f" >= {least}" if most >= 2 ** 31 - 1 else f" in {least}..{most}"
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{owner}: {name} must be an integer{bounds}, got {shown(value)} of type {type(value).__name__}; {remedy or 'pass a Python int'}") from None
    if not (-2 ** 63 if least is None else least) <= number <= most:
        bounds += f" and <= {most}" if number > most >= 2 ** 31 - 1 else ""
        raise ValueError(f"{owner}: {name} must be an integer{bounds}, got {shown(number)}; {remedy or 'choose one in range'}")
    return number


def listed(owner, name, values) -> list:
    """A sequence (or an array of one axis) of integers to be, as a list."""
    if isinstance(values, (str, bytes, dict)) or getattr(values, "ndim", 1) != 1:
        raise TypeError(f"{owner}: {name} must be a list of integers, got {shown(values)}; give a list, a tuple or a range")
    try:
        return values.tolist() if hasattr(values, "tolist") else list(values)
    except TypeError:
        raise TypeError(f"{owner}: {name} must be a list of integers, got {shown(values)}; give a list, a tuple or a range") from None


def flag(owner, name, value) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{owner}: {name} must be True or False, got {shown(value)}; pass a bool")
    return bool(value)


class Pattern:
    """Base of all patterns. Combine with `&`, `|`, `~`; every pattern answers the methods below."""

    heads = None  # number of heads of a PerHead pattern (or of Blocks given per head), else None

    # ---- identity
    @once
    def _text(self) -> str:
        from sparsetile.ops.notation import write
        return write(self)

    @once
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

    @once
    def kind(self) -> str:
        """The kinds of rule it is made of, as one word: "window", "causal", "global+window". Of two patterns of equal density, lists are alike only within a kind."""
        return "+".join(sorted(self._kinds()))

    def _kinds(self) -> set:
        return set().union(*(part._kinds() for part in self._children())) or {type(self).__name__.lower()}

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

    def extent(self, S: int) -> int:
        """How many positions S keys stand for: queries at or past it are past all keys."""
        return max((part.extent(S) for part in self._children()), default=S)

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
        Hq, D = integer("flops", "Hq", Hq, 1), integer("flops", "D", D, 1)
        Dv = D if Dv is None else integer("flops", "Dv", Dv, 1)
        if self.heads is not None and Hq % self.heads:
            raise ValueError(f"flops: Hq must be a multiple of the pattern's {self.heads} heads, got {Hq}; give Hq={self.heads} or a multiple")
        return 2 * self.pairs(T, S, q_start) * (Hq // len(self.head_map())) * (D + Dv)

    def hops(self, T: int) -> int | None:
        """Layers until every position can reach every other, or for a causal pattern every earlier one; None if never, 0 if T is 1.

        A layer keeps what a position has (the residual) and adds what its keys have; the heads of a layer act together. The pattern is causal
        here when no position among the T sees a later one.
        """
        from sparsetile.ops.counting import hops
        return hops(self, integer("hops", "T", T, 1))

    def plot(self, T: int, S: int | None = None, path=None, width: int = 64) -> str:
        """The mask as text for a terminal; with `path` also a PNG, one colour per part of the union, as the papers draw it (needs matplotlib)."""
        from sparsetile.ops.plot import plot
        T, width = integer("plot", "T", T), integer("plot", "width", width, 1)
        return plot(self, T, T if S is None else integer("plot", "S", S), path, width)


def _sizes(pattern: Pattern, T, S, q_start):
    T, S = integer("pattern", "T", T), integer("pattern", "S", S)
    return T, S, S - T if q_start is None else integer("pattern", "q_start", q_start, None)


class PerHead(Pattern):
    """One pattern per head: length Hq, or Hk and expanded over the group. Kept as distinct rules and a head map; masks are [heads, T, S]."""

    def __init__(self, patterns):
        try:
            patterns = tuple(patterns)
        except TypeError:
            raise TypeError(f"PerHead: patterns must be a list of patterns, got {shown(patterns)}; give one per query head or per key head") from None
        if not patterns:
            raise ValueError("PerHead: patterns must not be empty, got none; give one per query head or per key head")
        for n, part in enumerate(patterns):
            if not isinstance(part, Pattern) or part.heads is not None:
                raise TypeError(f"PerHead: patterns[{n}] must be a pattern without heads, got {shown(part)}; give one plain pattern per head")
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
            raise ValueError(f"PerHead: patterns that are combined must have as many heads, or one a divisor of the other, got {part.heads} and {heads} heads; list as many patterns in both")
    rows = [[part] * heads if part.heads is None else [part.rules()[part.head_map()[h * part.heads // heads]] for h in range(heads)] for part in parts]
    return PerHead([join(column) for column in zip(*rows)])


def _ends():
    from sparsetile.ops.patterns import FULL, NOTHING
    return FULL, NOTHING


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
    full, nothing = _ends()
    return _join(Or, tuple(parts), nothing, full)


def intersection(parts) -> Pattern:
    """What all of the patterns see; of none: everything."""
    return _join(And, tuple(parts), *_ends())


def complement(part: Pattern) -> Pattern:
    """What the pattern does not see."""
    if part.heads is not None:
        return _by_head((part,), lambda column: complement(column[0]))
    return part.part if isinstance(part, Not) else Not(part)
