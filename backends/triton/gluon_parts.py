"""Parts of a layout as Hopper's copy engine reads them: what their items and entries are, laid down once on the host for a static layout.

A residue class of a stride (every 128th position) and the summaries of Fixed (8 of each 128) are boxes of an array whose axis is seen as two, [B,H,x,y,D]; anything
else is not. Parts whose tiles hold the same queries are one pass: their key blocks are entries of one item. A later pass starts from the sums of the one before.
"""
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparsetile.backends.triton.gluon_maps import map_layout
from sparsetile.backends.triton.maps import steps

BLOCK = 128
PARTS = 2  # of a pass
PLANS = 8  # that are kept of a layout


@dataclass(frozen=True)
class Axis:
    """Position c of a block stands c // run * step + c % run after the block's first; those outside the call's do not exist. Contiguous: step = run = BLOCK.
    ragged: some stand behind the last whole step. Of residue classes the first few then have one position more than the rest (`short`), and are boxes of another view; with summaries the
    engine wants an array that ends with a whole step (`stretched`)."""
    step: int
    run: int
    ragged: bool = False
    short: bool = False

    def at(self, first):
        """(x, y) of positions in the array as the engine sees it."""
        return (first * 0, first) if self.run == BLOCK else (first % self.step, first // self.step) if self.run == 1 else (first // self.step, first % self.step)

    def positions(self, first):
        c = np.arange(BLOCK)
        return first[:, None] + c // self.run * self.step + c % self.run


def stretched(x, axis: Axis):
    """x [B,H,n,D], with zeros up to the end of a step where the axis is of ragged summaries."""
    rest = -x.shape[2] % axis.step
    if not (axis.ragged and rest) or axis.run == 1:
        return x
    from torch.nn.functional import pad
    return pad(x, (0, 0, 0, rest))


class Boxes(TensorDescriptor):
    """x [B,H,n,D] as [B,H,x,y,D] along an axis, in boxes of so many positions and columns; without the checks of its parent, which maps.can_map has made."""

    def __init__(self, x, axis: Axis, columns: int, positions: int = BLOCK):
        (B, H, n, D), (b, h, row, _), step, run = x.shape, steps(x), axis.step, axis.run
        assert run == 1 or not (axis.ragged and n % step), "an array that ends within a step: `stretched` makes it whole"
        classes = (n % step, n // step + 1) if axis.ragged and not axis.short else (step, n // step)
        two, between = ((1, n), (row, row)) if run == BLOCK else (classes, (row, row * step)) if run == 1 else ((n // step, step), (row * step, row))
        self.base, self.shape, self.strides, self.padding = x, [B, H, *two, D], [b, h, *between, 1], "zero"
        self.block_shape, self.layout = box(axis, columns, positions), map_layout(5, 8 * x.element_size())


def ends(axis: Axis) -> tuple:
    """The axis as views of it: where classes are ragged the long ones, then the short ones."""
    return (axis, replace(axis, short=True)) if axis.ragged and axis.run == 1 else (axis,)


def box(axis: Axis, columns: int, positions: int = BLOCK) -> list[int]:
    return [1, 1, positions // axis.run, axis.run, columns] if 1 < axis.run < BLOCK else [1, 1, 1, positions, columns]


@dataclass(frozen=True)
class Pass:
    """items [n, 6]: query of row 0 (negative where a tile starts before the call), first entry, entries that need no mask, entries, (x, y) of row 0;
    entries [n, 9]: (x, y) of the first key, kind, how many keys exist, part, four words of keys that some row sees or that do not exist. On the device."""
    rows: Axis
    keys: tuple       # of each part; a ragged class is two (`ends`)
    items: Any
    entries: Any
    masked: bool      # some block needs a mask
    before: bool      # some tile starts before the call


@dataclass(frozen=True)
class Plan:
    passes: tuple
    intervals: Any
    bitmaps: Any
    has_intervals: bool
    has_bitmaps: bool


def plan_of(parts, T: int, S: int, start: int, place) -> Plan | None:
    """None where the copy engine cannot address a part, or where the host does not know it. Kept with the first part's lists."""
    key, extras = ("triton.plan", start, T, S), parts[0].extras
    if key not in extras:
        kept = [other for other, made in extras.items() if isinstance(other, tuple) and other[0] == key[0] and made is None]  # graphs may hold the others
        if len(kept) >= PLANS:  # keys grow by one a step
            del extras[kept[0]]
        extras[key] = _plan(parts, T, S, start, place)
    return extras[key]


def _plan(parts, T, S, start, place):
    known = ("offsets", "cols", "kinds", "intervals", "bitmaps")
    if any((part.block_q, part.block_k) != (BLOCK, BLOCK) or part.list_of.shape != (1, 1) or any(name not in part.extras for name in known) for part in parts):
        return None
    rows = [axis_of(part.extras.get("q_order"), part.first, part.nq, start, start + T) for part in parts]
    keys = [axis_of(part.extras.get("k_order"), 0, part.nk, 0, S) for part in parts]
    if None in rows or None in keys:
        return None
    passes = {}
    for n in reversed(range(len(parts))):  # the plain part comes last
        passes.setdefault((rows[n][0], rows[n][1].tobytes()), []).append(n)
    for members in passes.values():
        axis, t = rows[members[0]]
        at = axis.positions(t)
        if sum(len(ends(keys[n][0])) for n in members) > PARTS or 1 < axis.run < BLOCK or ((at >= 0) & (at < T)).sum() < T:
            return None
    if axis.ragged:  # the last pass's results leave by the engine
        return None
    intervals, bitmaps, moved = _tables(parts)
    made = tuple(_pass([(parts[n], *keys[n], moved[n]) for n in members], *rows[members[0]], S, place) for members in passes.values())
    return Plan(made, place.upload(intervals), place.upload(bitmaps), any(part.has_intervals for part in parts), any(part.has_bitmaps for part in parts))


def axis_of(order, first: int, blocks: int, low: int, high: int):
    """(Axis, first position of each block) of an order, or of contiguous blocks from `first` on, over positions from low to high - 1. None: its blocks are no boxes."""
    c = np.arange(BLOCK)
    grid = order.reshape(blocks, BLOCK).astype(np.int64) if order is not None else (first + np.arange(blocks, dtype=np.int64))[:, None] * BLOCK + c
    there = grid >= 0 if order is not None else (grid >= low) & (grid < high)
    if not there.any(1).all():
        return None
    fullest = int(there.sum(1).argmax())
    jumps = np.diff(grid[fullest][there[fullest]])
    apart = np.flatnonzero(jumps != 1)
    run = int(apart[0]) + 1 if len(apart) else BLOCK
    axis = Axis(run - 1 + int(jumps[run - 1]) if run < BLOCK else BLOCK, run)
    one = there.argmax(1)  # the first that exists of each block
    starts = grid[np.arange(blocks), one] - one // run * axis.step - one % run
    line = axis.positions(starts)
    if BLOCK % run or axis.step < run or (((line >= low) & (line < high)) != there).any() or (line != grid)[there].any():
        return None
    inside = starts - low  # as the array counts
    if 1 < run < BLOCK and (inside % axis.step + run > axis.step).any():
        return None
    whole = (high - low) // axis.step * axis.step
    ragged = run < BLOCK and bool((line[there] - low >= whole).any())
    return None if ragged and not whole else (Axis(axis.step, run, ragged), inside)


def _tables(parts):
    """Masks of all parts as one table, and where each part's begin."""
    intervals, bitmaps, moved = [], [], []
    for part in parts:
        moved.append((sum(map(len, intervals)), sum(map(len, bitmaps))))
        intervals.append(part.extras["intervals"].reshape(-1, BLOCK, 2))
        bitmaps.append(part.extras["bitmaps"].reshape(-1, BLOCK, BLOCK // 32).view(np.int32))
    return np.concatenate(intervals), np.concatenate(bitmaps), moved


def _pass(members, rows: Axis, t, S, place) -> Pass:
    views = [ends(axis) for _, axis, _, _ in members]
    made = [_entries(sum(map(len, views[:number])), *member, S) for number, member in enumerate(members)]
    items, entries, first = np.zeros((len(t), 6), np.int64), [], 0
    for tile in range(len(t)):
        mine = np.concatenate([found[offsets[tile]:offsets[tile + 1]] for offsets, found in made])
        masked = (mine[:, 2] >= 0) | (mine[:, 3] < BLOCK)
        items[tile, :4] = t[tile], first, (~masked).sum(), len(mine)
        entries.append(mine[np.argsort(masked, kind="stable")])
        first += len(mine)
    items[:, 4], items[:, 5] = rows.at(t)
    masked, before = bool((items[:, 2] < items[:, 3]).any()), bool((t < 0).any())
    items = items[np.argsort(-(items[:, 3] // 4), kind="stable")]  # the longest first, but neighbours of about one length together: they read the same keys
    entries = np.concatenate([*entries, np.zeros((1, 9), np.int64)])
    words = lambda x: place.upload(np.ascontiguousarray((x & 0xFFFFFFFF).astype(np.uint32).view(np.int32)))  # noqa: E731
    return Pass(rows, sum(views, ()), words(items), words(entries), masked, before)


def _entries(number, part, axis: Axis, firsts, moved, S):
    """(offsets by tile [nq + 1], entries [n, 9]) of a part."""
    host = part.extras
    offsets = host["offsets"][::2].astype(np.int64)
    n = int(offsets[-1])
    cols, kinds = host["cols"][:n].astype(np.int64), host["kinds"][:n].astype(np.int64)
    key = firsts[cols]
    left = (axis.positions(firsts) < S).sum(1)[cols]
    seen = np.zeros((n, BLOCK // 32), np.int64)
    c, bit = np.arange(BLOCK), 1 << np.arange(32, dtype=np.int64)
    for kind in {*kinds.tolist()}:
        seen[kinds == kind] = _bits(host, kind).any(0).reshape(-1, 32) @ bit
    seen |= (c >= left[:, None]).reshape(n, BLOCK // 32, 32) @ bit  # zeros already
    kinds = np.where(kinds < 0, -1, kinds + 2 * np.where(kinds & 1, moved[1], moved[0]))
    x, y = axis.at(key)
    short = (x >= S % axis.step) & (len(ends(axis)) == 2)
    return offsets, np.concatenate([np.stack([x, y, kinds, left, number + short], 1), seen], 1)


def _bits(host, kind):
    """[BLOCK, BLOCK] what the rows of a tile see of a block of this kind."""
    c = np.arange(BLOCK)
    if kind < 0:
        return np.ones((BLOCK, BLOCK), bool)
    if kind & 1:
        return np.unpackbits(np.ascontiguousarray(host["bitmaps"].reshape(-1, BLOCK, BLOCK // 32)[kind >> 1]).view(np.uint8), axis=1, bitorder="little").astype(bool)
    low, high = host["intervals"].reshape(-1, BLOCK, 2)[kind >> 1].T[:, :, None]
    return (c >= low) & (c < high)
