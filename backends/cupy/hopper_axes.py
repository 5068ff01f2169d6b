"""Queries and keys of a layout's part as Hopper's copy engine can address them: contiguous, or an axis at even distances seen as two.

A residue class of a stride (every 128th position) and the summaries of Fixed (8 of each 128) are boxes of a [.., S / step, step, D] view; anything else is not.
"""
from dataclasses import dataclass, replace

import numpy as np

from sparsetile.backends.cupy import hopper

KEYS = 128  # of a block


@dataclass(frozen=True)
class Axes:
    """Row r of a tile stands r * row_step after the tile's first; key c of a block c // key_run * key_step + c % key_run after the block's first."""
    row_step: int = 1
    key_step: int = KEYS
    key_run: int = KEYS
    whole: bool = True        # every key of every block exists
    complete: bool = True     # every tile has entries
    first: int | None = None  # contiguous rows although there is an order: the first tile
    parted: bool = False
    every: bool = True        # every key of the call stands in a block
    ragged_rows: bool = False  # the call ends within a step: the first T % row_step classes have one query more than the others, which are boxes of the `short` view
    ragged_keys: bool = False

    def rows(self, place, q, block_q: int, short: bool = False):
        return self._map(place, q, self.row_step, 1 if self.row_step > 1 else block_q, block_q, short)

    def keys(self, place, x, short: bool = False):
        return self._map(place, x, self.key_step if self.key_run < KEYS else 1, self.key_run, KEYS, short)

    def _map(self, place, x, step: int, run: int, block: int, short: bool):
        B, H, n, D = x.shape
        b, h, row = hopper.steps(x)
        if not self.parted:
            return hopper.tensor_map(place, x, (D, n, H, B), (1, row, h, b), (128 // hopper.BYTES[x.dtype], block, 1, 1))
        if step == 1:
            return hopper.tensor_map(place, x, (D, n, 1, H, B), (1, row, row, h, b), (64, block, 1, 1, 1))
        classes = (step, n // step) if short or n % step == 0 else (n % step, n // step + 1)
        return hopper.tensor_map(place, x, (D, *classes, H, B), (1, row, row * step, h, b), (64, run, block // run, 1, 1))

    def applied(self, lists):
        """The lists with their first tile where rows are contiguous although there is an order; what is kept with them is not shared: other paths read the order."""
        if self.first is None or self.first == lists.first:
            return lists
        key = "cupy.contiguous", self.first
        if key not in lists.extras:
            lists.extras[key] = replace(lists, first=self.first, extras={name: x for name, x in lists.extras.items() if isinstance(name, str) and "." not in name})
        return lists.extras[key]


def in_classes(problem) -> bool:
    """Whether rows or keys of the problem's pattern may stand in residue classes or be summaries: a layout of several parts."""
    return not problem.words.isdisjoint(("strided", "fixed", "dilated", "order"))


def axes_of(lists, q_start, T: int, S: int) -> Axes | None:
    """None where the copy engine cannot address the part, or where the host does not know it. Kept with the lists."""
    if lists.block_k != KEYS or not isinstance(q_start, int) or "offsets" not in lists.extras:
        return None
    key = "cupy.axes", q_start, T, S
    if key not in lists.extras:
        lists.extras[key] = _axes(lists, q_start, T, S)
    return lists.extras[key]


def _axes(lists, q_start, T, S):
    rows, keys = _rows(lists, q_start, T), _keys(lists, S)
    offsets = lists.extras["offsets"]
    if rows is None or keys is None:
        return None
    order = lists.extras.get("k_order")
    every = order is None or int((order >= 0).sum()) == S
    return Axes(rows[0], *keys, bool((offsets[2::2] > offsets[:-2:2]).all()), rows[1], True, every, T % rows[0] > 0, keys[1] == 1 and S % keys[0] > 0)


def _rows(lists, q_start, T):
    """(row_step, first tile of contiguous rows)"""
    if lists.q_order is None:
        return (1, lists.first) if lists.first == q_start // lists.block_q and lists.nq == (q_start + T - 1) // lists.block_q - lists.first + 1 else None
    grid = lists.extras["q_order"].reshape(lists.nq, lists.block_q)
    there = grid >= 0
    if not there.any(1).all() or grid[there].min() != q_start or grid.max() != q_start + T - 1:
        return None
    r, step = np.arange(lists.block_q), 1
    if (there[:, 1] & there[:, 0]).any():
        tile = int(np.argmax(there[:, 1] & there[:, 0]))
        step = int(grid[tile, 1] - grid[tile, 0])
    start = grid.max(1) - step * (lists.block_q - 1 - there[:, ::-1].argmax(1))
    line = start[:, None] + step * r
    if step < 1 or ((line >= q_start) & (line < q_start + T) != there).any() or (line != grid)[there].any():
        return None
    if step == 1:
        first = int(start[0]) // lists.block_q
        return (1, first) if (start == (first + np.arange(lists.nq)) * lists.block_q).all() and first == q_start // lists.block_q else None
    return (step, None) if T >= step else None


def _keys(lists, S):
    """(key_step, key_run, whole)"""
    if lists.k_order is None:
        return KEYS, KEYS, S % KEYS == 0
    grid = lists.extras["k_order"].reshape(lists.nk, KEYS)
    there, c = grid >= 0, np.arange(KEYS)
    if not there[:, 0].all():
        return None
    apart = np.diff(grid[int(there.sum(1).argmax())])
    jump = np.flatnonzero(apart != 1)
    run = int(jump[0]) + 1 if len(jump) else KEYS
    step = run - 1 + int(apart[run - 1]) if run < KEYS else KEYS
    line = grid[:, :1] + c // run * step + c % run
    if KEYS % run or step < run or run < KEYS and (S < step or run > 1 and S % step or (grid[:, 0] % step + run > step).any()) or ((line < S) != there).any() or (line != grid)[there].any():
        return None
    return step, run, bool(there.all())
