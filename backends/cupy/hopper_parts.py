"""All parts of a layout in one launch (block_attention_parts_hopper.cu): what its items and entries are, laid down once on the host for a static layout.

Parts whose tiles hold the same queries are one pass. Of two passes the second starts from the sums of the first. Its tiles of a head follow the first pass of the next head: measured
faster than following groups of tiles of their own head more closely, where they wait more often.
"""
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsetile.backends.cupy import compile as nvrtc
from sparsetile.backends.cupy import hopper
from sparsetile.backends.cupy.operands import KINDS, ceil_div, padded

ROWS = KEYS = 128
MOST = 4          # parts
PLANS = 8  # that are kept of a layout
CACHED = 32 << 20  # bytes of keys and values whose heads are in flight together where there is one pass
LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Plan:
    """items [n, 8]: t, pass (2: short classes of the first), first entry, entries, plain, how many heads behind, wait, raises; entries [n, 8]: key, kind, left, view, seen; on the device."""
    items: Any
    entries: Any
    intervals: Any
    bitmaps: Any
    axes: tuple       # of each pass
    views: tuple      # (part, short) of each view of keys: ragged classes have two


def plan_of(parts, axes, T: int, S: int, start: int, place) -> Plan | None:
    """None where there are more than two passes, or where a tile of the second one has no entries. Kept with the first part's lists."""
    key = "cupy.plan", start, T, S
    extras = parts[0].extras
    if key not in extras:
        kept = [other for other in extras if isinstance(other, tuple) and other[0] == key[0]]
        if len(kept) >= PLANS:  # keys grow by one a step
            del extras[kept[0]]
        extras[key] = _plan(parts, axes, T, S, start, place)
    return extras[key]


def _plan(parts, axes, T, S, start, place):
    if len(parts) > MOST or any(name not in part.extras for part in parts for name in ("cols", "kinds")) or any(part.list_of.shape != (1, 1) for part in parts):
        return None
    views = tuple((n, short) for n, at in enumerate(axes) for short in ((False, True) if at.ragged_keys else (False, )))
    first_rows = [_first_rows(part, at, start) for part, at in zip(parts, axes)]
    passes = _passes(first_rows, axes)
    if len(passes) > 2 or len(views) > MOST or any(axes[members[0]].ragged_rows for members in passes[1:]):
        return None
    intervals, bitmaps, moved = _tables(parts)
    entries, items = [], []
    for number, members in enumerate(passes):
        at, t = axes[members[0]], first_rows[members[0]]
        made = [_entries(views.index((n, False)), parts[n], axes[n], moved[n], t, at.row_step, T, S) for n in members]
        for tile in range(len(t)):
            mine = np.concatenate([rows[offsets[tile]:offsets[tile + 1]] for offsets, rows in made])
            masked = (mine[:, 1] >= 0) | (mine[:, 2] < KEYS)
            items.append((t[tile], number, sum(map(len, entries)), len(mine), int((~masked).sum())))
            entries.append(mine[np.argsort(masked, kind="stable")])
    items = np.asarray(items, np.int64)
    if len(passes) == 2 and (items[items[:, 1] == 1, 3] == 0).any():
        return None
    items = _ordered(items)
    at = axes[passes[0][0]]
    if at.ragged_rows:
        items[(items[:, 1] == 0) & (items[:, 0] % at.row_step >= T % at.row_step), 1] = 2
    entries = np.concatenate([*entries, np.zeros((1, 8), np.int64)])
    words = lambda x: place.upload(np.ascontiguousarray((x & 0xFFFFFFFF).astype(np.uint32).view(np.int32)))  # noqa: E731
    return Plan(words(items), words(entries), place.upload(intervals), place.upload(bitmaps), tuple(axes[members[0]] for members in passes), views)


def _first_rows(part, at, start):
    """The query of row 0 of each tile; negative where a tile starts before the call."""
    if at.row_step > 1:
        return part.extras["q_order"].reshape(part.nq, ROWS)[:, 0].astype(np.int64) - start
    return (at.first + np.arange(part.nq, dtype=np.int64)) * ROWS - start


def _passes(first_rows, axes):
    """Parts by the queries of their tiles, contiguous ones last."""
    found = {}
    for n in reversed(range(len(axes))):
        found.setdefault((axes[n].row_step, first_rows[n].tobytes()), []).append(n)
    return [members for _, members in sorted(found.items(), key=lambda item: -item[0][0])]


def _tables(parts):
    """Masks of all parts as one table, and where each part's begin."""
    intervals, bitmaps, moved = [], [], []
    for part in parts:
        moved.append((sum(map(len, intervals)), sum(map(len, bitmaps))))
        intervals.append(part.extras["intervals"].reshape(-1, ROWS, 2))
        bitmaps.append(part.extras["bitmaps"].reshape(-1, ROWS, KEYS // 32).view(np.int32))
    return np.concatenate(intervals), np.concatenate(bitmaps), moved


def _entries(number, part, at, moved, t, step, T, S):
    """(offsets by tile [nq + 1], entries [n, 8]) of a part."""
    host = part.extras
    offsets = host["offsets"][::2].astype(np.int64)
    n = int(offsets[-1])
    cols, kinds = host["cols"][:n].astype(np.int64), host["kinds"][:n].astype(np.int64)
    key = host["k_order"].reshape(-1, KEYS)[cols, 0].astype(np.int64) if "k_order" in host else cols * KEYS
    left = np.minimum((S - key) // at.key_step * at.key_run + np.minimum((S - key) % at.key_step, at.key_run), KEYS)
    tile = np.repeat(np.arange(part.nq), np.diff(offsets))
    r = t[tile][:, None] + step * np.arange(ROWS)
    first, end = (r < 0).sum(1), (r < T).sum(1)
    seen = np.zeros((n, KEYS // 32), np.int64)
    for kind, a, b in {*zip(kinds.tolist(), first.tolist(), end.tolist())}:
        these, bits = (kinds == kind) & (first == a) & (end == b), _bits(host, kind) & ((np.arange(ROWS) >= a) & (np.arange(ROWS) < b))[:, None]
        seen[these] = bits.any(0).reshape(-1, 32) @ (1 << np.arange(32, dtype=np.int64))
    absent = np.arange(KEYS) >= left[:, None]  # zeros already
    seen |= absent.reshape(n, -1, 32) @ (1 << np.arange(32, dtype=np.int64))
    kinds = np.where(kinds < 0, -1, kinds + 2 * np.where(kinds & 1, moved[1], moved[0]))
    short = at.ragged_keys & (key % at.key_step >= S % at.key_step)
    return offsets, np.concatenate([np.stack([key, kinds, left, number + short], 1), seen], 1)


def _bits(host, kind):
    """[ROWS, KEYS] what the rows of a tile see of a block of this kind."""
    c = np.arange(KEYS)
    if kind < 0:
        return np.ones((ROWS, KEYS), bool)
    if kind & 1:
        return np.unpackbits(np.ascontiguousarray(host["bitmaps"].reshape(-1, ROWS, KEYS // 32)[kind >> 1]).view(np.uint8), axis=1, bitorder="little").astype(bool)
    low, high = host["intervals"].reshape(-1, ROWS, 2)[kind >> 1].T[:, :, None]
    return (c >= low) & (c < high)


def _ordered(items):
    """Items in the order in which they are taken with a head: the longest of a pass first, and the second pass of the head before. A tile of it waits for both groups of threads of all tiles of its first pass."""
    first, second = (items[items[:, 1] == n] for n in (0, 1))
    record = lambda x, *more: np.concatenate([x, np.broadcast_to(more, (len(x), 3))], 1)[np.argsort(-x[:, 3], kind="stable")]  # noqa: E731
    return np.concatenate([record(first, 0, 0, int(len(second) > 0)), record(second, -1, 2 * len(first), 0)])


# ------------------------------------------------------------------------------------------------------------------ the launch
def fields(views: int) -> str:
    text = "128s" * (4 + 2 * views) + f"10Q{2 + views}i9i2f"
    return text + f"{-struct.calcsize(text) % 64}x"  # the struct is as long as its alignment asks


def shared_bytes(D: int, Dv: int, stages: int, tiles: int) -> int:
    """Stages of keys and of values, query tiles; barriers, what stands in the stages, items."""
    keys, values = ceil_div(D, 64), ceil_div(Dv, 64)
    return 1024 + 128 * 128 * (stages * (keys + values) + tiles * max(keys, values)) + 32 * stages + 112 + 32 * stages + 4 * 96


def defines(kind: str, D: int, Dv: int, stages: int, tiles: int, parts: int) -> dict:
    return dict(KIND=KINDS[kind], WIDTH=padded(D), VALUES=64 if Dv <= 64 else 128, STAGES=stages, TILES=tiles, PARTS=parts)


def run(q, k, v, plan, axes, out, lse, *, place, scale, sink_logits, depth):
    """out and lse of all parts; axes: of each part, depth: (stages, query tiles)."""
    (B, Hq, T, D), (Hk, S), Dv, n = q.shape, k.shape[1:3], v.shape[3], len(plan.views)
    two, tiles, d = len(plan.axes) == 2, plan.items.shape[0], defines(q.dtype, D, Dv, *depth, n)
    heads, section = B * Hq, 1 if two else max(1, min(B * Hq, CACHED // max(1, 2 * S * (D + Dv)) * (Hq // Hk)))
    partial = place.empty((B * Hq, T, d["VALUES"]), "float32") if two else None
    counters = place.zeros((1 + heads,), "int32")
    steps = heads + two  # the second pass of the last head comes alone
    queries = [plan.axes[min(i, len(plan.axes) - 1)].rows(place, q, ROWS) for i in range(2)] + [plan.axes[0].rows(place, q, ROWS, True)]
    keys = [(axes[part], short) for part, short in plan.views]
    maps = (*queries, hopper.tensor_map(place, out, (Dv, T, heads), (1, Dv, T * Dv), (64, 64, 1)), *(at.keys(place, x, short) for at, short in keys for x in (k, v)))
    function = nvrtc.function("block_attention_parts_hopper", "forward", fields(n), d, place)
    function(min(steps * tiles, max(place.sms, 1)), 384, shared_bytes(D, Dv, *depth), place.stream, *maps, out.ptr, nvrtc.ptr(lse), nvrtc.ptr(sink_logits), nvrtc.ptr(partial),
             counters.ptr, counters.ptr + 4, plan.items.ptr, plan.entries.ptr, plan.intervals.ptr, plan.bitmaps.ptr, *(plan.axes[min(i, len(plan.axes) - 1)].row_step for i in range(2)),
             *(at.key_step if at.key_run < KEYS else 0 for at, _ in keys), T, Hq, Hq // Hk, Dv, heads, tiles, steps, section, steps * tiles, scale, scale * LOG2E)
