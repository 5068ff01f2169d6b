"""What a pattern does to whole rectangles of (query, key) positions, without looking at the pairs inside.

`state` answers for many rectangles at once: 0 nothing in it is seen, 2 everything is, 1 cannot tell (for the rectangles of plain, contiguous
axes 1 nearly always means "some"). Rules combine as in Kleene's logic: & is the minimum, | the maximum, ~ is 2 - x.
`signature` gives integer columns such that rectangles of one size with equal columns hold the same picture, so that one has to be looked at.
"""
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

from sparsetile.ops import patterns as pt


@dataclass(frozen=True, eq=False, repr=False)
class Columns(pt.Pattern):
    """s % stride >= stride - summary: the second half of Fixed. Made by the lowering only."""
    stride: int
    summary: int

    @property
    def _text(self):
        return f"Columns({self.stride}, {self.summary})"

    def _see(self, p, s, S):
        return (s % self.stride >= self.stride - self.summary) & (p == p)


@dataclass(frozen=True, eq=False, repr=False)
class Rows(pt.Pattern):
    """p in tokens: the second half of a symmetric Global. Made by the lowering only."""
    keys: pt.Global

    @property
    def _text(self):
        return f"Rows({self.keys._text})"

    def _see(self, p, s, S):
        return self.keys._holds(p) & (s == s)


@lru_cache(4096)
def plain(pattern):
    """Fixed and symmetric Global written as unions of their halves; other atoms as they are."""
    if isinstance(pattern, pt.Fixed):
        return pt.union((pt.Window(0, 0, block=pattern.stride), Columns(pattern.stride, pattern.summary)))
    if isinstance(pattern, pt.Global) and pattern.symmetric:
        keys = pt.Global(pattern.tokens, symmetric=False)
        return pt.union((keys, Rows(keys)))
    if isinstance(pattern, (pt.And, pt.Or)):
        join = pt.intersection if isinstance(pattern, pt.And) else pt.union
        return join([plain(part) for part in pattern.parts])
    return ~plain(pattern.part) if isinstance(pattern, pt.Not) else pattern


@dataclass
class Tiles:
    """N rectangles. lo and hi (inclusive) bound the positions that exist in it; the origins are those of its first row and column, which may lie outside.

    ordered axes (positions permuted): p and s of a rectangle are no ranges but lie inside lo..hi; `modulus` is that of the order, the
    residues of the rows lie in pr_lo..pr_hi, of the keys in sr_lo..sr_hi; `given` holds what the order itself decides (rule -> state).
    """
    p0: np.ndarray
    s0: np.ndarray
    p_lo: np.ndarray
    p_hi: np.ndarray
    s_lo: np.ndarray
    s_hi: np.ndarray
    S: int
    size: tuple = (0, 0)
    modulus: int = 0
    residues: tuple = ()
    given: dict = field(default_factory=dict)
    ordered: bool = False
    span: tuple | None = None  # the range of all rows of the layout, so that draws are made once
    states: dict = field(default_factory=dict)

    def take(self, index):
        pick = lambda x: x[index]  # noqa: E731
        return replace(self, p0=pick(self.p0), s0=pick(self.s0), p_lo=pick(self.p_lo), p_hi=pick(self.p_hi), s_lo=pick(self.s_lo), s_hi=pick(self.s_hi),
                       residues=tuple(map(pick, self.residues)), states={rule: pick(value) for rule, value in self.states.items()})


def state(rule, t: Tiles) -> np.ndarray:
    """int8 [N], 0 nothing, 1 cannot tell, 2 everything; `rule` is plain (see `plain`) and has no heads."""
    known = t.states.get(rule)
    if known is None:
        if rule in t.given:
            known = np.full(len(t.p0), t.given[rule], np.int8)
        elif isinstance(rule, (pt.And, pt.Or)):
            join = np.minimum if isinstance(rule, pt.And) else np.maximum
            known = state(rule.parts[0], t)
            for part in rule.parts[1:]:
                known = join(known, state(part, t))
        elif isinstance(rule, pt.Not):
            known = 2 - state(rule.part, t)
        else:
            known = _STATE[type(rule)](rule, t)
        t.states[rule] = known
    return known


def _tri(full, some) -> np.ndarray:
    return np.add(full & some, some, dtype=np.int8)


def _window(w, t):
    if w.left is None and w.right is None:
        return np.full(len(t.p0), 2, np.int8)
    p_lo, p_hi, s_lo, s_hi = (t.p_lo, t.p_hi, t.s_lo, t.s_hi) if w.block == 1 else (x // w.block for x in (t.p_lo, t.p_hi, t.s_lo, t.s_hi))
    far, near = p_hi - s_lo, p_lo - s_hi  # largest and smallest p - s
    full, some = True, True
    if w.left is not None:
        full, some = far <= w.left, near <= w.left
    if w.right is not None:
        full, some = full & (near >= -w.right), some & (far >= -w.right)
    return _tri(full, some)


def _multiples(t, step, left, right):
    """Whether (p - s) is a multiple of step and in -right..left: for all pairs, for some pairs."""
    near, far = t.p_lo - t.s_hi, t.p_hi - t.s_lo
    full, some = (near == far) & (near % step == 0), True
    if step == t.modulus and t.residues:
        pr_lo, pr_hi, sr_lo, sr_hi = t.residues
        full = (pr_lo == pr_hi) & (sr_lo == sr_hi) & (pr_lo == sr_lo)
        some = (pr_lo <= sr_hi) & (sr_lo <= pr_hi)
    elif step == 1:
        full = np.ones(len(near), bool)
    if left is not None:
        full, far = full & (far <= left), np.minimum(far, left)
    if right is not None:
        full, near = full & (near >= -right), np.maximum(near, -right)
    return _tri(full, some & (far // step * step >= near))


def _columns(c, t):
    first = c.stride - c.summary
    chunk, place = np.divmod(t.s_lo, c.stride)
    following = np.where(place >= first, t.s_lo, chunk * c.stride + first)
    return _tri((place >= first) & (t.s_hi < (chunk + 1) * c.stride), (following <= t.s_hi) & (c.summary > 0))


def _members(runs, lo, hi):
    """Of the integers lo..hi (inclusive): are all, are any in the runs [n, 2]."""
    if not len(runs):
        none = np.zeros(len(lo), bool)
        return none, none
    after = np.searchsorted(runs[:, 1], lo, side="right")  # first run that ends past lo
    run = runs[np.minimum(after, len(runs) - 1)]
    alive = after < len(runs)
    return alive & (run[:, 0] <= lo) & (run[:, 1] > hi), alive & (run[:, 0] <= hi)


def _documents(d, t):
    total = d.total
    if not total:
        return np.zeros(len(t.p0), np.int8)
    p_in = (t.p_lo >= 0) & (t.p_hi < total)
    p_first, p_last = np.searchsorted(d.ends, np.maximum(t.p_lo, 0), side="right"), np.searchsorted(d.ends, np.minimum(t.p_hi, total - 1), side="right")
    s_first, s_last = np.searchsorted(d.ends, t.s_lo, side="right"), np.searchsorted(d.ends, np.minimum(t.s_hi, total - 1), side="right")
    some = (p_first <= s_last) & (s_first <= p_last) & (t.p_hi >= 0) & (t.p_lo < total) & (t.s_lo < total)
    return _tri(p_in & (t.s_hi < total) & (p_first == p_last) & (s_first == s_last) & (p_first == s_first), some)


class Cells:
    """A set of block pairs (i, j), asked by ranges of blocks: through sets of 2^n x 2^n cells, so that a range meets at most four."""

    def __init__(self, i, j):
        self.i, self.j = np.asarray(i, np.int64), np.asarray(j, np.int64)
        self.levels = {}

    def has(self, level, i, j):
        """Is a pair of the set in cell (i, j) of this level."""
        if level not in self.levels:
            self.levels[level] = np.unique(((self.i >> level) << 32) + (self.j >> level))
        keys = self.levels[level]
        if not len(keys):
            return np.zeros(np.broadcast(i, j).shape, bool)
        wanted = (i << 32) + j
        return keys[np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)] == wanted

    def state(self, i_lo, i_hi, j_lo, j_hi):
        extent = int(max((i_hi - i_lo).max(initial=0), (j_hi - j_lo).max(initial=0)))
        if not extent:
            return self.has(0, i_lo, j_lo) * np.int8(2)
        level = extent.bit_length()
        i_lo, i_hi, j_lo, j_hi = (x >> level for x in (i_lo, i_hi, j_lo, j_hi))
        some = self.has(level, i_lo, j_lo) | self.has(level, i_lo, j_hi) | self.has(level, i_hi, j_lo) | self.has(level, i_hi, j_hi)
        return some.astype(np.int8)


@lru_cache(16)
def _cells(rule, S: int) -> Cells:
    """The set of block pairs of Blocks."""
    return Cells(*np.nonzero(rule.mask_bits))


def _block_ranges(rule, t):
    if isinstance(rule, pt.Blocks):
        return _cells(rule, 0), rule.block_q, rule.block_k
    from sparsetile.ops.random_blocks import cells
    first, last = t.span or (int(t.p_lo.min(initial=0)), int(t.p_hi.max(initial=-1)) + 1)
    return cells(rule, first // rule.block, -(-last // rule.block), t.S), rule.block, rule.block


def _explicit(rule, t):
    cells, block_q, block_k = _block_ranges(rule, t)
    out = cells.state(t.p_lo // block_q, t.p_hi // block_q, t.s_lo // block_k, t.s_hi // block_k)
    single = (t.p_lo // block_q == t.p_hi // block_q) & (t.s_lo // block_k == t.s_hi // block_k)
    if single.any() and not single.all():
        out = np.where(single, cells.has(0, t.p_lo // block_q, t.s_lo // block_k) * np.int8(2), out)
    return out


_STATE = {
    pt.Window: _window,
    pt.Dilated: lambda d, t: _multiples(t, d.step, d.left, d.right),
    pt.Strided: lambda d, t: _multiples(t, d.stride, None, None),
    pt.Compressed: lambda c, t: _tri(t.s_hi <= c.last(t.p_lo), t.s_lo <= c.last(t.p_hi)),
    Columns: _columns,
    pt.Global: lambda g, t: _tri(*_members(g.bounds, t.s_lo, t.s_hi)),
    Rows: lambda r, t: _tri(*_members(r.keys.bounds, t.p_lo, t.p_hi)),
    pt.Sink: lambda k, t: _tri(t.s_hi < k.n, t.s_lo < k.n),
    pt.Documents: _documents, pt.Blocks: _explicit, pt.RandomBlocks: _explicit,
}


# ------------------------------------------------------------------------------------------------ signatures
def signature(rule, t: Tiles) -> list:
    """Integer columns [N] for rectangles of one size and one shape of axes: equal columns, the same positions exist and the same pictures are on them."""
    columns = [t.p_lo - t.p0, t.p_hi - t.p0, t.s_hi - t.s0]
    _collect(rule, t, np.ones(len(t.p0), bool), columns)
    return columns


def _collect(rule, t, alive, columns):
    known = state(rule, t)
    open_ = alive & (known == 1)
    if isinstance(rule, (pt.And, pt.Or, pt.Not)):
        for part in rule._children():
            _collect(part, t, open_, columns)
        return
    columns.append(np.where(alive, known + 1, 0))
    if rule in t.given:
        return
    if open_.any():
        columns.extend(np.where(open_, column, 0) for column in _SIGNATURE[type(rule)](rule, t))
    else:  # as many columns as ever, since the columns of several calls are compared
        wide = isinstance(rule, (pt.Documents, pt.Blocks, pt.RandomBlocks)) or isinstance(rule, pt.Window) and rule.block > 1
        columns.extend([np.zeros(len(known), np.int64)] * (3 if wide else 1))


def _window_signature(w, t):
    if w.block == 1:
        return (t.p0 - t.s0,)
    return t.p0 % w.block, t.s0 % w.block, t.p0 // w.block - t.s0 // w.block


def _dilated_signature(d, t):
    distance = t.p0 - t.s0
    inside = state(d.window, t) == 2
    return (np.where(inside, distance % d.step, distance + np.where(distance >= 0, d.step, 0)),)  # the second never falls in 0..step-1


def _documents_signature(d, t):
    if t.ordered:
        return t.p0, t.s0, np.zeros(len(t.p0), np.int64)
    document = np.searchsorted(d.ends, np.clip(t.p_lo, 0, max(d.total - 1, 0)), side="right")
    end = d.ends[np.minimum(document, len(d.ends) - 1)]
    start = end - np.asarray(d.lengths, np.int64)[np.minimum(document, len(d.ends) - 1)]
    one = (t.p0 >= start) & (t.p0 + t.size[0] <= end)  # every row in one document: its columns decide
    return (np.where(one, -1, t.p0), np.where(one, np.clip(start - t.s0, 0, t.size[1]), t.s0), np.where(one, np.clip(end - t.s0, 0, t.size[1]), 0))


def _explicit_signature(rule, t):
    cells, block_q, block_k = _block_ranges(rule, t)
    i, j = t.p0 // block_q, t.s0 // block_k
    rows, cols = (-(-(size - 1) // block) + 1 for size, block in zip(t.size, (block_q, block_k)))
    if t.ordered or rows * cols > 62:
        return t.p0, t.s0, np.zeros(len(i), np.int64)
    bits = sum((cells.has(0, i + a, j + b).astype(np.int64) << (a * cols + b)) for a in range(rows) for b in range(cols))
    return t.p0 % block_q, t.s0 % block_k, bits


_SIGNATURE = {
    pt.Window: _window_signature, pt.Dilated: _dilated_signature,
    pt.Strided: lambda d, t: ((t.p0 - t.s0) % d.stride,),
    pt.Compressed: lambda c, t: (t.p0 - t.s0 * c.stride,),
    Columns: lambda c, t: (t.s0 % c.stride,),
    pt.Global: lambda g, t: (t.s0,), Rows: lambda r, t: (t.p0,), pt.Sink: lambda k, t: (t.s0,),
    pt.Documents: _documents_signature, pt.Blocks: _explicit_signature, pt.RandomBlocks: _explicit_signature,
}


def group(columns: list, n: int):
    """Rows of integer columns numbered by equality: (one example of each group, the group of every row)."""
    code, span = np.zeros(n, np.int64), 1
    for column in columns:
        if not n:
            break
        column = column.astype(np.int64)
        low = int(column.min())
        width = int(column.max()) - low + 1
        if width == 1:
            continue
        if span * width >= 2 ** 62:
            code = np.unique(code, return_inverse=True)[1]
            span = int(code.max()) + 1
            if span * width >= 2 ** 62:
                column = np.unique(column, return_inverse=True)[1]
                low, width = 0, int(column.max()) + 1
        code, span = code * width + (column - low), span * width
    _, example, inverse = np.unique(code, return_index=True, return_inverse=True)
    return example, inverse
