"""Layouts of several parts (gluon_parts.py) in the backward, the host's side of block_backward_parts_gluon.py: path "gluon" of block_attention_backward.

Part after part, in the order in which parts that run apart are added: dQ by tiles of queries (parts with the same tiles go together), then dK and dV by key blocks. Sums between parts are float32.
"""
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from sparsetile.backends.triton import gluon_parts, relaunch
from sparsetile.backends.triton.block_backward_parts_gluon import part_keys_gluon, part_queries_gluon
from sparsetile.backends.triton.gluon_maps import map_type
from sparsetile.backends.triton.gluon_parts import BLOCK, Axis, Boxes, box, ends, stretched
from sparsetile.backends.triton.launch import POINTER, power
from sparsetile.backends.triton.maps import can_map

KEY_STEP = 64  # keys of a step of `part_queries_gluon`: 64 leave room for the next item's queries
LONG = 4  # so many times fewer key blocks than query tiles: the longest come first, of all heads


@dataclass(frozen=True)
class ByKey:
    """A part by its key blocks. items [n, 6]: first key, first entry, 0, entries, (x, y) of the first box; entries [n, 4]: query of row 0, (x, y) of its tile, kind: -1 all, else one of
    seen [kinds, 128, 4]: which of the tile's queries see each key, as bits. held [S]: which keys stand in the parts before it, None where all do. On the device."""
    rows: Axis
    keys: Axis
    items: Any
    entries: Any
    seen: Any
    held: Any
    long: bool


def by_key(parts, T: int, S: int, start: int, place) -> tuple | None:
    """Of each part, in the order in which they are added; None where the last one, whose results leave by the copy engine, lacks keys or is ragged. Kept with the first part's lists."""
    key, extras = ("triton.by_key", start, T, S), parts[0].extras
    if key not in extras:
        kept = [other for other, made in extras.items() if isinstance(other, tuple) and other[0] == key[0] and made is None]
        if len(kept) >= gluon_parts.PLANS:  # as plan_of
            del extras[kept[0]]
        extras[key] = _by_key(parts, T, S, start, place)
    return extras[key]


def _by_key(parts, T, S, start, place):
    made, before = [], np.zeros(S, bool)
    for n in reversed(range(len(parts))):
        part = parts[n]
        rows, t = gluon_parts.axis_of(part.extras.get("q_order"), part.first, part.nq, start, start + T)
        keys, firsts = gluon_parts.axis_of(part.extras.get("k_order"), 0, part.nk, 0, S)
        held = None if not made or before.all() else place.upload(before.astype(np.int32))
        made.append(ByKey(rows, keys, *(_words(x, place) for x in _lists_by_key(part, rows, t, keys, firsts)), held, part.nk * LONG <= part.nq))
        at = keys.positions(firsts)
        before[at[at < S]] = True
    return tuple(made) if len(np.unique(at[at < S])) == S and not keys.ragged else None


def _words(x, place):
    return place.upload(np.ascontiguousarray((x & 0xFFFFFFFF).astype(np.uint32).view(np.int32)))


def _lists_by_key(part, rows: Axis, t, keys: Axis, firsts):
    """(items, entries, seen) of ByKey."""
    host = part.extras
    offsets = host["offsets"][::2].astype(np.int64)
    n = int(offsets[-1])
    cols, kinds, tile = host["cols"][:n].astype(np.int64), host["kinds"][:n].astype(np.int64), np.repeat(np.arange(part.nq), np.diff(offsets))
    mine, seen = np.full(n, -1), []
    for kind in sorted({*kinds[kinds >= 0].tolist()}):
        mine[kinds == kind] = len(seen)
        seen.append(gluon_parts._bits(host, kind).T.reshape(BLOCK, BLOCK // 32, 32) @ (1 << np.arange(32, dtype=np.int64)))
    order = np.lexsort((tile, mine >= 0, cols))  # full tiles before those with a mask
    count = np.bincount(cols, minlength=part.nk)
    items = np.stack([firsts, np.cumsum(count) - count, count * 0, count, *keys.at(firsts)], 1)
    entries = np.stack([t[tile], *(x[tile] for x in rows.at(t)), mine], 1)[order]
    return items[np.argsort(-(count // 4), kind="stable")], np.concatenate([entries, np.zeros((1, 4), np.int64)]), np.asarray(seen, np.int64).reshape(-1, BLOCK, BLOCK // 32)


@lru_cache(1024)
def row_constants(D: int, DV: int, runs: tuple, ragged: bool, adds: bool, last: bool, before: bool, intervals: bool, bitmaps: bool, key_step: int) -> relaunch.Constants:
    """Of `part_queries_gluon`; runs: of its parts' keys."""
    run = [0 if n in (1, BLOCK) else n for n in runs]
    return relaunch.Constants(dict(D=D, D0=power(D, 64), V0=power(DV, 64), RUN=run[0], RUN1=run[-1], PARTS=len(runs), RAGGED=ragged, KEY_STEP=key_step, ADDS=adds, LAST=last, BEFORE=before, INTERVALS=intervals,
                                   BITMAPS=bitmaps), num_warps=4, enable_fp_fusion=False)


@lru_cache(1024)
def key_constants(D: int, DV: int, run: int, ragged_q: bool, ragged_k: bool, adds: bool, last: bool, masked: bool) -> relaunch.Constants:
    """Of `part_keys_gluon`."""
    return relaunch.Constants(dict(D=D, DV=DV, D0=power(D, 64), V0=power(DV, 64), RUN=0 if run in (1, BLOCK) else run, RAGGED_Q=ragged_q, RAGGED_K=ragged_k, ADDS=adds, LAST=last,
                                   MASKED=masked), num_warps=4, enable_fp_fusion=False)


def plans(q, k, v, dout, parts, q_start, kv_length, place):
    """(rows' plan, parts by key), or None where the parts are not as the copy engine can address them."""
    T, S = q.shape[2], k.shape[2]
    start = S - T if q_start is None and kv_length is None else q_start
    if kv_length is not None or not isinstance(start, int) or not all(map(can_map, (q, k, v, dout))):
        return None
    rows = gluon_parts.plan_of(parts, T, S, start, place)
    columns = rows and by_key(parts, T, S, start, place)
    return (rows, columns) if columns else None


def launch(q, k, v, dout, plan, lse, delta, dq, dk, dv, place, scale: float):
    """Fills dq, dk and dv; plan: of `plans`."""
    (B, Hq, T, D), (Hk, S), DV = q.shape, k.shape[1:3], v.shape[3]
    rows, columns = plan
    tables = rows.intervals, rows.bitmaps
    D0, V0, group, sms = power(D, 64), power(DV, 64), Hq // Hk, max(place.sms, 1)
    wide = max(len(rows.passes) > 1 and B * Hq * T * D, len(columns) > 1 and B * Hk * S * (D + DV))
    sums = place.empty((wide,), "float32") if wide else None
    whole = {}  # an array with a ragged axis is stretched once

    def boxes(name, x, axis, *size):
        key = name, axis.step * axis.ragged
        if key not in whole:
            whole[key] = stretched(x, axis)
        return Boxes(whole[key], axis, *size)

    def short(name, x, axis, *size):
        return boxes(name, x, ends(axis)[1], *size) if len(ends(axis)) == 2 else None
    tickets = place.zeros((len(rows.passes) + len(columns),), "int32")
    for n, at in enumerate(rows.passes):
        last, tiles = n == len(rows.passes) - 1, at.items.shape[0]
        made = row_constants(D, DV, tuple(axis.run for axis in at.keys), len(ends(at.rows)) == 2, n > 0, last, at.before, rows.has_intervals or at.masked, rows.has_bitmaps, KEY_STEP)  # keys may end within full blocks
        step = made["KEY_STEP"]
        keys = [one for axis in at.keys for one in (boxes("k", k, axis, D0, step), boxes("v", v, axis, V0, step))] + [None, None]
        relaunch.launch(part_queries_gluon, (min(B * Hq * tiles, sms),), place, (dq, sums, lse, delta, at.items, at.entries, *tables, tickets[n:n + 1]),
                        (B * Hq, Hq, group, T, tiles, 0, B * Hq * tiles, at.rows.step if at.rows.run == 1 else 1, T % at.rows.step, float(scale)), made, (q.dtype,),
                        (boxes("q", q, at.rows, D0, 64), boxes("dout", dout, at.rows, V0, 64), short("q", q, at.rows, D0, 64), short("dout", dout, at.rows, V0, 64), *keys[:4], Boxes(dq, at.rows, D0, 64) if last else None))
    sums_k, sums_v = (sums[:B * Hk * S * D], sums[B * Hk * S * D:]) if len(columns) > 1 else (None, None)
    for n, at in enumerate(columns):
        last, tiles = n == len(columns) - 1, at.items.shape[0]
        made, ticket = key_constants(D, DV, at.keys.run, len(ends(at.rows)) == 2, len(ends(at.keys)) == 2, n > 0, last, at.seen.shape[0] > 0), len(rows.passes) + n
        relaunch.launch(part_keys_gluon, (min(B * Hk * tiles, sms),), place, (sums_k, sums_v, at.held, lse, delta, at.items, at.entries, at.seen, tickets[ticket:ticket + 1]),
                        (B * Hk, Hk, group, T, S, tiles, tiles * at.long, B * Hk * tiles, at.rows.step if at.rows.run == 1 else 1, at.keys.step if at.keys.run < BLOCK else 1,
                         T % at.rows.step, S % at.keys.step, float(scale)), made, (q.dtype,),
                        (boxes("q", q, at.rows, D0, 64), boxes("dout", dout, at.rows, V0, 64), boxes("k", k, at.keys, D0, 64), boxes("v", v, at.keys, V0, 64),
                         short("q", q, at.rows, D0, 64), short("dout", dout, at.rows, V0, 64), short("k", k, at.keys, D0, 64), short("v", v, at.keys, V0, 64),
                         *((Boxes(dk, at.keys, D0, 64), Boxes(dv, at.keys, V0, 64)) if last else (None, None))))


CLASS, RAGGED, SUMMARY, PLAIN = Axis(BLOCK, 1), Axis(BLOCK, 1, True), Axis(BLOCK, 8), Axis(BLOCK, BLOCK)


def artifacts(problem, strided: bool) -> list[dict]:
    """Of the Sparse Transformer's patterns: the strided one's class and window, or the fixed one's summaries and own blocks."""
    kind, D, DV, has = POINTER[problem.dtype("q")], problem["D"], problem["Dv"], problem.features.__contains__
    words, found = {name: "*i32" for name in ("plan", "entries", "ticket")} | dict(lse="*fp32", delta="*fp32"), []

    def mapped(axis, columns, positions=64):
        return map_type(kind, box(axis, columns, positions))

    def artifact(fn, made, maps, arrays, integers):
        found.append(relaunch.artifact(fn, made, words | arrays, integers, ("scale",), maps, unaligned=("ticket",)))
    first, last = (False, False), (True, True)  # adds, last
    for rows, keys, how in ((CLASS, (CLASS,), first), (RAGGED, ends(RAGGED), first), (PLAIN, (PLAIN,), last)) if strided else ((PLAIN, (SUMMARY, PLAIN), (False, True)),):
        made = row_constants(D, DV, tuple(axis.run for axis in keys), rows.ragged, *how, True, True, has("bitmap"), KEY_STEP)  # calls may begin within a tile
        D0, V0 = made["D0"], made["V0"]
        maps = dict(q=mapped(rows, D0), dout=mapped(rows, V0)) | (dict(qs=mapped(rows, D0), douts=mapped(rows, V0)) if rows.ragged else {}) | (dict(dq_map=mapped(rows, D0)) if how[1] else {})
        for name, axis in zip(("", "1"), keys):
            maps |= {"k" + name: mapped(axis, D0, KEY_STEP), "v" + name: mapped(axis, V0, KEY_STEP)}
        artifact(part_queries_gluon, made, maps, dict(dq=kind, sums="*fp32", intervals="*i32", bitmaps="*i32"), ("heads", "Hq", "group", "T", "tiles", "ahead", "items", "apart", "rest"))
    for rows, keys, how in (*(((CLASS, CLASS, first), (RAGGED, RAGGED, first)) if strided else ((PLAIN, SUMMARY, first),)), (PLAIN, PLAIN, last)):
        made = key_constants(D, DV, keys.run, rows.ragged, rows.ragged, *how, True)
        D0, V0 = made["D0"], made["V0"]
        maps = dict(q=mapped(rows, D0), dout=mapped(rows, V0), k=mapped(keys, D0), v=mapped(keys, V0))
        maps |= dict(qs=maps["q"], douts=maps["dout"], ks=maps["k"], vs=maps["v"]) if rows.ragged else {}
        maps |= (dict(dk_map=mapped(keys, D0), dv_map=mapped(keys, V0)) if how[1] else {})
        artifact(part_keys_gluon, made, maps, dict(seen="*i32", k_sums="*fp32", v_sums="*fp32") | ({} if strided or not how[0] else dict(held="*i32")),
                 ("heads", "Hk", "group", "T", "S", "tiles", "ahead", "items", "apart", "key_step", "rest_q", "rest_k"))
    return found
