"""The short way for packed sequences: a new Documents pattern comes with every batch, so its lists have to be made in a millisecond or two.

Every query sees one interval of keys, and the intervals of neighbouring queries touch, so the blocks of a row of blocks are one run: partial ones,
full ones, partial ones. Nothing has to be refined or sorted but the lists by key block.
"""
import numpy as np

from sparsetile.backends.contract import Lists
from sparsetile.ops import patterns as pt
from sparsetile.ops.tables import Table

_CHUNK = 4096  # pictures made at once


def applies(rule) -> bool:
    """Whether the rule is an intersection of Documents with windows, sinks or other Documents."""
    atoms = rule.parts if isinstance(rule, pt.And) else (rule,)
    return any(isinstance(a, pt.Documents) for a in atoms) and all(
        isinstance(a, (pt.Documents, pt.Sink)) or isinstance(a, pt.Window) and a.block == 1 for a in atoms)


def extent(rule) -> int:
    """How many positions its documents have."""
    return max(a.total for a in (rule.parts if isinstance(rule, pt.And) else (rule,)) if isinstance(a, pt.Documents))


def intervals(rule, p):
    """(lo, hi) int64 per position: keys lo <= s < hi are seen; lo = hi = 0 where none is."""
    lo, hi = np.zeros(len(p), np.int64), np.full(len(p), 2 ** 62)
    for atom in rule.parts if isinstance(rule, pt.And) else (rule,):
        if isinstance(atom, pt.Documents):
            lengths = np.asarray(atom.lengths, np.int64)
            inside = (p >= 0) & (p < atom.total)
            if inside.all() and len(p):
                which = slice(int(p[0]), int(p[-1]) + 1) if p[-1] - p[0] == len(p) - 1 else p
            else:
                which = np.where(inside, p, 0)
            if not atom.total:
                return lo, lo
            lo = np.maximum(lo, np.repeat(atom.ends - lengths, lengths)[which])
            hi = np.minimum(hi, np.repeat(atom.ends, lengths)[which])
            if not inside.all():
                hi = np.where(inside, hi, 0)
        elif isinstance(atom, pt.Sink):
            hi = np.minimum(hi, atom.n)
        else:
            lo = lo if atom.left is None else np.maximum(lo, p - atom.left)
            hi = hi if atom.right is None else np.minimum(hi, p + atom.right + 1)
    empty = hi <= lo
    if empty.any():
        lo, hi = np.where(empty, 0, lo), np.where(empty, 0, hi)
    return lo, hi


def build(rule, rows, keys, S: int, list_of) -> Lists:
    """Lists of one part over plain axes."""
    nq, bq, bk = rows.n, rows.block, keys.block
    p = np.arange(rows.first * bq, (rows.first + nq) * bq)
    lo, hi = intervals(rule, np.clip(p, rows.first_pos, rows.last_pos - 1))  # rows that do not exist repeat their neighbour
    hi = np.minimum(hi, S)
    lo, hi = (x.astype(np.int32).reshape(nq, bq) for x in (np.minimum(lo, hi), hi))  # positions
    lo_of_seen = lo if (hi > lo).all() else np.where(hi > lo, lo, S)
    start, stop = lo_of_seen.min(1) // bk, -(-hi.max(1) // bk)
    stop = np.maximum(stop, start)
    least_hi = hi.min(1)
    full_from, full_to = -(-lo_of_seen.max(1) // bk), np.where(least_hi >= S, keys.n, least_hi // bk)
    none = (full_to <= full_from) | (least_hi <= 0)
    full_from = np.clip(np.where(none, stop, full_from), start, stop)
    full_to = np.clip(np.where(none, stop, full_to), full_from, stop)

    counts = np.stack([full_to - full_from, full_from - start, stop - full_to], 1)
    starts = np.stack([full_from, start, full_to], 1).reshape(-1)
    ends = np.cumsum(counts.reshape(-1))
    total = int(ends[-1]) if nq else 0
    cols = np.arange(total) + np.repeat(starts - (ends - counts.reshape(-1)), counts.reshape(-1))
    row = np.repeat(np.arange(nq), counts.sum(1))
    offsets = np.zeros(2 * nq + 1, np.int32)
    offsets[1::2], offsets[2::2] = ends[0::3], ends[2::3]
    kinds = np.full(total, -1, np.int32)
    partial = np.repeat(np.tile([False, True, True], nq), counts.reshape(-1))
    where = np.flatnonzero(partial)
    table = Table(bq, bk)
    kinds[where] = _pictures(lo, hi, row[where], cols[where], bk, table)

    key = cols * 2 + partial
    by_key = np.argsort(key.astype(np.uint16) if keys.n < 2 ** 15 else key, kind="stable")  # 16-bit keys are sorted by radix
    by_key_offsets = np.zeros(2 * keys.n + 1, np.int32)
    np.cumsum(np.bincount(key, minlength=2 * keys.n), out=by_key_offsets[1:])
    ended = lambda x: np.append(x, 0).astype(np.int32)  # noqa: E731
    found, bitmaps = table.arrays()
    longest = max(int((o[2::2] - o[:-2:2]).max(initial=0)) for o in (offsets, by_key_offsets))
    return Lists(block_q=bq, block_k=bk, first=rows.first, nq=nq, nk=keys.n, offsets=offsets, cols=ended(cols), kinds=ended(kinds),
                 by_key_offsets=by_key_offsets, by_key_rows=ended(row[by_key]), by_key_kinds=ended(kinds[by_key]), intervals=found, bitmaps=bitmaps,
                 list_of=np.ascontiguousarray(list_of, np.int32), has_intervals=bool(len(where)), has_bitmaps=False, longest=longest)


def _pictures(lo, hi, row, col, block_k, table):
    """Kinds of the partial blocks (row, col), given in rows from left to right: their pictures, equal ones once."""
    if not len(row):
        return np.zeros(0, np.int64)
    width = int(col.max()) + 3
    edges = np.unique(np.concatenate([_edges(lo, block_k, width), _edges(hi, block_k, width)]))
    here = row * width + col
    # A picture is that of its left neighbour unless a row's interval begins or ends in one of the two blocks.
    new = (np.diff(here, prepend=-9) != 1) | _among(edges, here) | _among(edges, here - 1)
    number, where = np.cumsum(new) - 1, np.flatnonzero(new)
    i, left = row[where], col[where] * block_k
    signature = _signature(lo, i, left, block_k) * 2 ** 31 + _signature(hi, i, left, block_k)
    _, example, group = np.unique(signature, return_index=True, return_inverse=True)
    kinds = np.empty(len(example), np.int64)
    for a in range(0, len(example), _CHUNK):
        some = example[a:a + _CHUNK]
        pictures = np.stack([np.clip(x[i[some]] - left[some, None], 0, block_k) for x in (lo, hi)], 2).astype(np.int32)
        pictures[pictures[:, :, 0] >= pictures[:, :, 1]] = 0
        kinds[a:a + _CHUNK] = table.add_intervals(pictures)
    return kinds[group][number]


def _signature(x, i, left, block_k):
    """Numbers below 2 ** 31 for the ends x [nq, block_q] of rows i in the blocks that begin at keys `left`: equal ones mean equal ends there. All before the block, all behind it, constant or
    ascending by one from a place near it; of other rows each block has its own."""
    least, most = x.min(1), x.max(1)
    ascending = (np.diff(x, axis=1) == 1).all(1)
    regular, from_left = ascending | (least == most), least[i] - left
    near = 2 + 2 * (from_left + x.shape[1]) + ascending[i]  # a row that is no constant and touches the block begins at most block_q - 1 before it
    own = 2 + 2 * (x.shape[1] + block_k) + np.arange(len(i))
    return np.where(most[i] <= left, 0, np.where(from_left >= block_k, 1, np.where(regular[i], near, own)))


def _edges(x, block_k, width):
    """Numbers row * width + column of the blocks where the values x [nq, block_q] lie; repeats are mostly left out."""
    at = x // block_k
    moved = np.ones(at.shape, bool)
    moved[:, 1:] = at[:, 1:] != at[:, :-1]
    which = np.flatnonzero(moved)
    return which // x.shape[1] * width + np.minimum(at.reshape(-1)[which], width - 1)


def _among(ordered, values):
    return ordered[np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)] == values
