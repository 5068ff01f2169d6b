"""The draw of RandomBlocks: integers only, so every machine gets the same blocks.

For query block i the allowed key blocks a_0 < a_1 < ... (those not excluded) form a stream. Slot 0 takes element J(h, n) of the n allowed blocks,
where h hashes (seed, i, slot) and J is the jump consistent hash (Lamping and Veach, arXiv:1406.2294) in integers: uniform over 0..n-1, and
growing n either keeps the answer or moves it to a new element. Slot 1 does the same among the blocks left, and so on: `count` distinct blocks, each
subset equally likely, and a draw for n blocks that lies inside the first n' of them is the draw for n' blocks too.
"""
from functools import lru_cache

import numpy as np

from sparsetile.ops import array_operators as xp
from sparsetile.ops import patterns as pt

_GOLDEN, _M1, _M2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_NEVER = 2 ** 40  # a block number past every key


def _mix(x):
    """splitmix64's step on uint64 arrays."""
    x = x + np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_M1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_M2)
    return x ^ (x >> np.uint64(31))


def hash64(seed: int, i, slot: int):
    """uint64 of (seed, i, slot), elementwise over i (negative numbers wrap)."""
    first = _mix(np.full(1, seed, np.uint64))
    return _mix(_mix(first ^ np.asarray(i, np.int64).astype(np.uint64)) ^ np.uint64(slot))


def jump(key, n):
    """Jump consistent hash: uint64 keys to 0..n-1, elementwise; -1 where n <= 0."""
    key, n = np.array(key, np.uint64), np.asarray(n, np.int64)
    place = np.full(len(key), -1, np.int64)
    following = np.zeros(len(key), np.int64)
    live = np.flatnonzero(following < n)
    while len(live):
        place[live] = following[live]
        key[live] = key[live] * np.uint64(2862933555777941757) + np.uint64(1)
        following[live] = ((place[live] + 1) << 31) // ((key[live] >> np.uint64(33)).astype(np.int64) + 1)
        live = live[following[live] < n[live]]
    return place


def _excluded(pattern, first: int, last: int, n: int):
    """Block pairs that the exclude patterns cover: (rows, columns) sorted, rows first..last-1, columns < n."""
    if not pattern.exclude or last <= first or not n:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    from sparsetile.ops.axes import Plain
    from sparsetile.ops.lowering import kept_exactly
    size = pattern.block
    joint = pt.union(pattern.exclude)
    rows, keys = Plain(first * size, last * size, size), Plain(0, n * size, size)
    i, j = kept_exactly(joint, rows, keys, n * size)
    if pattern.causal:  # the diagonal block: only its causal half has to be covered
        diagonal = kept_exactly((joint | ~pt.Causal()) & pt.Window(0, 0, block=size), rows, keys, n * size)
        below = i != j - rows.first
        i, j = np.concatenate((i[below], diagonal[0])), np.concatenate((j[below], diagonal[1]))
    order = np.lexsort((j, i))
    return i[order].astype(np.int64) + first, j[order].astype(np.int64)


@lru_cache(32)
def draws(pattern, first: int, last: int, n: int) -> np.ndarray:
    """int64 [last - first, count or as many as there are]: blocks drawn for query blocks first..last-1 out of n key blocks, -1 where fewer are left; in order of the slots."""
    i = np.arange(first, last)
    reach = np.where(i < 0, 0, i + 1) if pattern.causal else np.where(i < 0, 0, n)
    columns = int(reach.max(initial=0))
    out = np.full((len(i), min(pattern.count, columns)), -1, np.int64)  # a count may be any number
    if not out.size:
        return out
    rows_x, cols_x = _excluded(pattern, first, last, columns)
    inside = cols_x < reach[np.maximum(rows_x - first, 0)] if len(rows_x) else np.zeros(0, bool)
    rows_x, cols_x = rows_x[inside] - first, cols_x[inside]
    start = np.searchsorted(rows_x, np.arange(len(i) + 1))
    degree = np.diff(start)
    done = degree >= reach  # nothing left (a global row): no draw, and no wide table for it
    wide = np.flatnonzero(~done & (degree > 64))
    narrow = np.flatnonzero(~done & (degree <= 64))
    for rows in (narrow, *(wide[a:a + 64] for a in range(0, len(wide), 64))):
        if len(rows):
            out[rows] = _draw(pattern, out.shape[1], i[rows], reach[rows], cols_x, start[rows], degree[rows])
    return out


def _draw(pattern, count, i, reach, excluded, start, degree):
    """Draws for query blocks i; row r's excluded blocks are excluded[start[r]:start[r] + degree[r]], ascending."""
    taken = np.full((len(i), int(degree.max(initial=0)) + count), _NEVER, np.int64)  # ascending; excluded and drawn blocks
    row = np.repeat(np.arange(len(i)), degree)
    place = np.arange(len(row)) - np.repeat(np.cumsum(degree) - degree, degree)
    taken[row, place] = excluded[start[row] + place]
    out = np.full((len(i), count), -1, np.int64)
    for slot in range(count):
        place = jump(hash64(pattern.seed, i, slot), reach - degree - slot)
        block = place.copy()
        for column in taken.T:  # the place-th number that is not taken
            block += column <= block
        out[:, slot] = np.where(place >= 0, block, -1)
        taken[:, -1] = np.where(place >= 0, block, _NEVER)
        taken.sort(axis=1)
    return out


@lru_cache(32)
def cells(pattern, first: int, last: int, S: int):
    """The drawn block pairs of query blocks first..last-1 as a set, for ops/regions.py."""
    from sparsetile.ops.regions import Cells
    table = draws(pattern, first, last, 0 if pattern.causal else -(-S // pattern.block))
    i, slot = np.nonzero(table >= 0)
    return Cells(i + first, table[i, slot])


def visible(pattern, p, s, S):
    """Elementwise answer. PyTorch, CuPy and JAX do not say where queries stand: the table of draws is made for positions from 0 to S and as many more as the longest axis
    of p has, which holds every query that begins at S or before; those farther out see nothing."""
    if S is None and not pattern.causal:
        raise ValueError("visible: RandomBlocks that are not causal are drawn from all blocks of S keys; give S=")
    blocks = 0 if S is None else -(-S // pattern.block)
    i, j = p // pattern.block, s // pattern.block
    if xp.kind(p) == "numpy":
        first, last = (int(i.min()), int(i.max()) + 1) if i.size else (0, 0)
    elif S is None:
        raise ValueError("visible: RandomBlocks on device arrays needs the number of keys; give S=")
    else:
        first, last = 0, -(-(S + max(p.shape, default=0)) // pattern.block)
    seen = (i != i) | (j != j)
    if last <= first:
        return seen
    table = draws(pattern, first, last, 0 if pattern.causal else blocks)
    inside = (i >= first) & (i < last)
    row = (i - first) * inside
    for slot in range(table.shape[1]):
        seen = seen | (xp.lookup(table[:, slot], row) == j)
    return seen & inside & (j >= 0)
