"""A layout of two passes in one launch (block_attention_classes_hopper.cu): residue classes, then contiguous queries that start from their sums. Laid down once on the host for a static layout.

A unit is 64 queries of a head, an entry 64 keys that some of them see. A chunk is the first, second, .. unit of every class; a unit of the second pass waits for the chunks that hold its
queries, and comes `lag` units of the first pass behind them: as many as are being worked on at once, and few enough that the second-level cache still holds what lies between.
"""
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsetile.backends.cupy import compile as nvrtc
from sparsetile.backends.cupy import hopper
from sparsetile.backends.cupy.operands import KINDS, ceil_div, padded

ROWS = KEYS = 128
STEP, TEAMS = 64, 3  # queries of a unit, keys of an entry; groups of threads of a block
WIDEST = 128  # D and Dv: three groups have 152 registers a thread
LAG = 1.5  # units of the first pass for each multiprocessor, half of the groups, before one of the second: 132 to 1024 units gave 0.909, 0.833 (200), 0.843, 0.872, 0.886, 0.891, 0.892 ms on an H200 (strided 128, 32k)
LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Plan:
    """items [n, 8]: t, pass (2: short classes of the first), first entry, entries, plain, how many heads behind, the chunk that it belongs to or those that it waits for;
    entries [n, 8]: key, kind, left, view, seen (2 words), where its keys and the unit's rows stand in the tables; on the device."""
    items: Any
    entries: Any
    members: Any      # units of each chunk
    intervals: Any
    bitmaps: Any
    axes: tuple       # of each pass
    views: tuple      # (part, short) of each view of keys: ragged classes have two
    shift: int        # row t + shift of the sums between is query t
    rows: int
    behind: int       # the most heads


def plan(parts, axes, passes, first_rows, views, tables, T: int, S: int, place) -> Plan:
    intervals, bitmaps, moved = tables
    units, entries, count = ([], []), [], 0
    for number, members in enumerate(passes):
        at, t = axes[members[0]], first_rows[members[0]]
        made = [_entries(views.index((n, False)), parts[n], axes[n], moved[n], t, at.row_step, T, S) for n in members]
        for half in range(2):
            first = t + at.row_step * STEP * half
            for tile in np.flatnonzero((first < T) & (first + at.row_step * (STEP - 1) >= 0)):
                mine = np.concatenate([rows[half][offsets[half][tile]:offsets[half][tile + 1]] for offsets, rows in made])
                masked = mine[:, 1] >= -1
                mine = mine[np.argsort(masked, kind="stable")]
                units[number].append((first[tile], number, count, len(mine), int((~masked).sum())))
                entries.append(mine)
                count += len(mine)
    first, second = (np.asarray(x, np.int64) for x in units)
    at = axes[passes[0][0]]
    chunk = (first[:, 0] - first[:, 0].min()) // (STEP * at.row_step)
    order = np.lexsort((first[:, 0], chunk))
    first, chunk = first[order], chunk[order]
    chunk_of = np.zeros(T, np.int64)
    rows = lambda x, step: x[:, :1] + step * np.arange(STEP)  # noqa: E731
    queries = rows(first, at.row_step)
    inside = (queries >= 0) & (queries < T)
    chunk_of[queries[inside]] = np.broadcast_to(chunk[:, None], queries.shape)[inside]
    if at.ragged_rows:
        first[first[:, 0] % at.row_step >= T % at.row_step, 1] = 2
    seen = chunk_of[rows(second, 1).clip(0, T - 1)]
    low, high = seen.min(1), seen.max(1) + 1
    order = np.lexsort((second[:, 0], high))
    second, low, high = second[order], low[order], high[order]
    ready = np.asarray([np.flatnonzero(chunk < end)[-1] + 1 for end in range(1, chunk.max() + 2)])[high - 1] / len(first)  # what the first pass has taken before
    place_of = np.arange(len(second)) / len(second)
    lag = int(LAG * max(place.sms, 1))
    time = np.concatenate([np.arange(len(first)) / len(first), place_of + (ready - place_of).max() + lag / len(first)])
    items = np.concatenate([np.column_stack([first, 0 * chunk, chunk, chunk + 1]), np.column_stack([second, 0 * low, low, high])])
    items[:, 5] = time.astype(np.int64)
    items = items[np.argsort(time % 1, kind="stable")]
    words = lambda x: place.upload(np.ascontiguousarray((x & 0xFFFFFFFF).astype(np.uint32).view(np.int32)))  # noqa: E731
    shift = -int(first_rows[passes[1][0]][0])
    return Plan(words(items), words(np.concatenate([*entries, np.zeros((1, 8), np.int64)])), words(np.bincount(chunk)), place.upload(intervals), place.upload(bitmaps),
                tuple(axes[members[0]] for members in passes), views, shift, ceil_div(shift + T, STEP) * STEP, int(items[:, 5].max()))


def bits_of(host, kind):
    """[ROWS, KEYS] what the rows of a tile see of a block of this kind."""
    c = np.arange(KEYS)
    if kind < 0:
        return np.ones((ROWS, KEYS), bool)
    if kind & 1:
        return np.unpackbits(np.ascontiguousarray(host["bitmaps"].reshape(-1, ROWS, KEYS // 32)[kind >> 1]).view(np.uint8), axis=1, bitorder="little").astype(bool)
    low, high = host["intervals"].reshape(-1, ROWS, 2)[kind >> 1].T[:, :, None]
    return (c >= low) & (c < high)


def _entries(view, part, at, moved, t, step, T, S):
    """Of the first and of the second half of a part's tiles, (offsets by tile [2][nq + 1], entries [2][n, 8])."""
    host = part.extras
    offsets = host["offsets"][::2].astype(np.int64)
    n = int(offsets[-1])
    cols, kinds = host["cols"][:n].astype(np.int64), host["kinds"][:n].astype(np.int64)
    key = host["k_order"].reshape(-1, KEYS)[cols, 0].astype(np.int64) if "k_order" in host else cols * KEYS
    left = np.minimum((S - key) // at.key_step * at.key_run + np.minimum((S - key) % at.key_step, at.key_run), KEYS)
    tile = np.repeat(np.arange(part.nq), np.diff(offsets))
    r = t[tile][:, None] + step * np.arange(ROWS)
    begin, end = (r < 0).sum(1), (r < T).sum(1)
    seen, whole = np.zeros((n, 2, KEYS), bool), np.zeros((n, 2, KEYS), bool)  # by some, by all rows of a half
    for kind, a, b in {*zip(kinds.tolist(), begin.tolist(), end.tolist())}:
        these, bits = (kinds == kind) & (begin == a) & (end == b), bits_of(host, kind)
        for half in range(2):
            mine = bits[max(a, STEP * half):min(b, STEP * half + STEP)]
            seen[these, half], whole[these, half] = mine.any(0), mine.all(0)
    exists = np.arange(KEYS) < left[:, None]
    short = at.ragged_keys & (key % at.key_step >= S % at.key_step)
    apart = STEP if at.key_run == KEYS else STEP // at.key_run * at.key_step
    kinds = np.where(kinds < 0, -1, kinds + 2 * np.where(kinds & 1, moved[1], moved[0]))
    made = []
    for half in range(2):
        some, all_of, there = ((x if x.ndim == 2 else x[:, half]).reshape(n, 2, STEP) for x in (seen, whole, exists))
        some = some & there
        kept, plain = some.any(2), (all_of & there).all(2)
        words = (some | ~there).reshape(n, 2, 2, 32) @ (1 << np.arange(32, dtype=np.int64))
        which, word = np.nonzero(kept)
        made.append((np.bincount(tile[which] + 1, minlength=part.nq + 1).cumsum(), np.column_stack([key[which] + apart * word, np.where(plain[which, word], -2, kinds[which]), left[which], (view + short)[which],
                                                                                                    words[which, word], 2 * word, np.full(len(which), STEP * half)])))
    return [x[0] for x in made], [x[1] for x in made]


# ------------------------------------------------------------------------------------------------------------------ the launch
def fields(views: int) -> str:
    text = "128s" * (4 + 2 * views) + f"12Q{2 + views}i10i2f"
    return text + f"{-struct.calcsize(text) % 64}x"  # the struct is as long as its alignment asks


def slots_of(D: int, Dv: int) -> int:
    """Of the ring of each group."""
    return 6 if max(D, Dv) <= 64 else 3


def shared_bytes(D: int, Dv: int) -> int:
    """A tile of queries, the ring, barriers and small tables of each group."""
    return 1024 + TEAMS * (8192 * ceil_div(max(D, Dv), 64) * (1 + slots_of(D, Dv)) + 1024)


def defines(kind: str, D: int, Dv: int, parts: int) -> dict:
    return dict(KIND=KINDS[kind], WIDTH=padded(D), VALUES=64 if Dv <= 64 else 128, SLOTS=slots_of(D, Dv), PARTS=parts)


def run(q, k, v, plan, axes, out, lse, *, place, scale, sink_logits):
    """out and lse of all parts; axes: of each part."""
    (B, Hq, T, D), Hk, Dv, n = q.shape, k.shape[1], v.shape[3], len(plan.views)
    tiles, chunks, d, heads = plan.items.shape[0], plan.members.shape[0], defines(q.dtype, D, Dv, n), B * Hq
    partial, before = place.empty((heads, plan.rows, d["VALUES"]), "float32"), place.empty((heads, plan.rows), "float32")
    counters = place.zeros((1 + heads * chunks,), "int32")
    first, second = plan.axes
    keys = [(axes[part], short) for part, short in plan.views]
    maps = (first.rows(place, q, STEP), second.rows(place, q, STEP), first.rows(place, q, STEP, True), hopper.tensor_map(place, out, (Dv, T, heads), (1, Dv, T * Dv), (64, 64, 1)),
            *(at.keys(place, x, short, STEP) for at, short in keys for x in (k, v)))
    everything = (heads + plan.behind) * tiles
    function = nvrtc.function("block_attention_classes_hopper", "forward", fields(n), d, place)
    function(min(ceil_div(everything, TEAMS), max(place.sms, 1)), 128 + 128 * TEAMS, shared_bytes(D, Dv), place.stream, *maps, out.ptr, nvrtc.ptr(lse), nvrtc.ptr(sink_logits), partial.ptr, before.ptr,
             counters.ptr, counters.ptr + 4, plan.items.ptr, plan.entries.ptr, plan.members.ptr, plan.intervals.ptr, plan.bitmaps.ptr, first.row_step, second.row_step,
             *(at.key_step if at.key_run < KEYS else 0 for at, _ in keys), T, Hq, Hq // Hk, Dv, heads, tiles, plan.rows, plan.shift, chunks, everything, scale, scale * LOG2E)
