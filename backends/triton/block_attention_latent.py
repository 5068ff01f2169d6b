"""Attention over block lists for few queries with DeepSeek's latent, for Hopper in Gluon: the roles of latent_gluon.py over key blocks of 32.

An item is one query, up to 64 heads and one of `splits` equal shares of the blocks that the lengths on the device leave of its list; with more than one, parts are joined as on
the path "decode". Keys come by copies of threads, which leave zeros for those that are not seen: 0 * NaN would reach a product. The copy engine is no faster here.
"""
from functools import lru_cache

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from sparsetile.backends.contract import Problem, Resources
from sparsetile.backends.triton import latent_gluon, relaunch
from sparsetile.backends.triton.block_attention_decode import merge, merge_constants
from sparsetile.backends.triton.gluon_items import place_of
from sparsetile.backends.triton.latent_gluon import (HALF, HEADS, KEYS, LATENT, PIECE, STAGES, add_values, after, copy_keys, copy_query, give_last, make_memory,
                                                     score, store, store_through, take_last)
from sparsetile.backends.triton.launch import POINTER, known_start, list_steps
from sparsetile.backends.triton.pages import DEFAULT, one_tensor, page_of
from sparsetile.backends.triton.tiles import entries_of, finish

SPLITS = 64


@gluon.jit
def item_of(number, lists, at, sizes, BQ: gl.constexpr, SPLIT: gl.constexpr, EDGE: gl.constexpr, FROM_LENGTH: gl.constexpr):
    """(batch, query, first head, share, the query's row in its tile, keys that exist, the list, the share's blocks lo .. hi): the programs that run together have the heads
    of one query, so that keys come from memory once."""
    offsets, cols, list_of, slb, first, nq = lists
    Hq, parts, T, S = sizes
    y = number // parts
    line = y // SPLIT
    split = y - line * SPLIT
    b = line // T
    t = line - b * T
    limit, start = place_of(b, T, S, at, FROM_LENGTH)
    p = start + t
    row = p & (BQ - 1)
    run = entries_of((p - row) // BQ - first, gl.load(list_of + b * slb), offsets, cols, limit, nq, KEYS, EDGE)
    a, n, e, c, edge = run
    count = n - a + c - e + edge
    lo = (count.to(gl.int64) * split // SPLIT).to(gl.int32)
    hi = (count.to(gl.int64) * (split + 1) // SPLIT).to(gl.int32)
    return b, t, (number - y * parts) * HEADS, split, row, limit, run, lo, hi


@gluon.jit
def seen(kind, row, c, tables, BQ: gl.constexpr, INTERVALS: gl.constexpr, BITMAPS: gl.constexpr):
    """Which of the keys c of a block its picture `kind` shows the row. kind -1: all."""
    intervals, bitmaps = tables
    ok = c >= 0
    if INTERVALS:
        if (kind >= 0) & ((kind & 1) == 0):
            at = intervals + (kind >> 1).to(gl.int64) * (2 * BQ) + 2 * row
            ok = (c >= gl.load(at)) & (c < gl.load(at + 1))
    if BITMAPS:
        if (kind >= 0) & ((kind & 1) == 1):
            words = gl.load(bitmaps + (kind >> 1).to(gl.int64) * (BQ * (KEYS // 32)) + row * (KEYS // 32) + c // 32)
            ok = ((words >> (c % 32)) & 1) != 0
    return ok


@gluon.jit
def bring(q, k, table, lists, kinds, tables, at, sizes, strides, pages, items, BQ: gl.constexpr, SPLIT: gl.constexpr, EDGE: gl.constexpr, INTERVALS: gl.constexpr,
          BITMAPS: gl.constexpr, FROM_LENGTH: gl.constexpr, PAGE: gl.constexpr, queries, memory):
    B: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    cols = lists[1]
    Hq, parts, T, S = sizes
    sqb, sqh, sqt, skb, sks = strides
    table_b, pool = pages
    latents, rotary, found, full, free = memory
    c = gl.arange(0, KEYS, gl.SliceLayout(1, B))
    slot = 0
    phase = 0
    j = 0
    for number in range(gl.program_id(0), items, gl.num_programs(0)):
        b, t, head, split, row, limit, run, lo, hi = item_of(number, lists, at, sizes, BQ, SPLIT, EDGE, FROM_LENGTH)
        a, whole, e, end, edge = run
        if lo < hi:
            slot, phase = copy_query(q + b.to(gl.int64) * sqb + t.to(gl.int64) * sqt, head, Hq, sqh, slot, phase, j, queries, memory, B)
            j += 1
            keys = k + b.to(gl.int64) * skb
            for x in range(lo, hi):
                masked = x - (whole - a)  # from 0 on; a full block that the limit cuts stands before the others
                entry = gl.where(masked < 0, a + x, gl.where(masked < edge, whole, e + masked - edge))
                first = gl.load(cols + entry) * KEYS
                ok = first + c < limit
                if INTERVALS or BITMAPS:
                    if masked >= 0:
                        ok = ok & seen(gl.load(kinds + entry), row, c, tables, BQ, INTERVALS, BITMAPS)
                key = (first + gl.where(ok, c, 0)).to(gl.int64)
                if PAGE:
                    page, there = page_of(table + b.to(gl.int64) * table_b, first + c, limit, pool, PAGE)
                    ok = ok & there
                    key = page * PAGE + (first + c) % PAGE
                mbarrier.wait(free.index(slot), phase ^ 1)
                copy_keys(slot, keys + key * sks, ok, memory, B)
                slot, phase = after(slot, phase, STAGES)


@gluon.jit
def probabilities(q, lse, tops, sinks, lists, at, sizes, strides, items, scale, BQ: gl.constexpr, SPLIT: gl.constexpr, EDGE: gl.constexpr, FROM_LENGTH: gl.constexpr,
                  queries, keys, weights, end):
    Hq, parts, T, S = sizes
    sqb, sqh, sqt, skb, sks = strides
    slot = 0
    phase = 0
    j = 0
    turn = 0
    for number in range(gl.program_id(0), items, gl.num_programs(0)):
        b, t, head, split, row, limit, run, lo, hi = item_of(number, lists, at, sizes, BQ, SPLIT, EDGE, FROM_LENGTH)
        m, l, unit, slot, phase = score(scale * 1.4426950408889634, hi - lo, slot, phase, j, queries, keys, weights)
        r = gl.arange(0, HEADS, m.type.layout)
        exists = r < Hq - head
        h = head + gl.where(exists, r, 0)
        line = (b.to(gl.int64) * Hq + h) * T + t
        if SPLIT == 1:
            factor, logs = finish(m, l, scale, scale * 1.4426950408889634, sinks, h, sinks is not None)
            if lse is not None:
                gl.store(lse + line, logs, mask=exists)
        else:  # a share's sums, as they are held
            factor = gl.full([HEADS], 1.0, gl.float32, m.type.layout)
            to = tops + 2 * (line + split.to(gl.int64) * (items // (parts * SPLIT)) * Hq)
            gl.store(to, m, mask=exists)
            gl.store(to + 1, l, mask=exists)
        give_last(factor * unit, turn, end)
        j += (lo < hi).to(gl.int32)
        turn += 1


@gluon.jit
def values(W: gl.constexpr, to, lists, at, sizes, items, BQ: gl.constexpr, SPLIT: gl.constexpr, EDGE: gl.constexpr, FROM_LENGTH: gl.constexpr, keys, weights, end):
    """to: the answer, or sums of shares."""
    Hq, parts, T, S = sizes
    latents, rotary, found, full, free = keys
    slot = 0
    phase = 0
    turn = 0
    for number in range(gl.program_id(0), items, gl.num_programs(0)):
        b, t, head, split, row, limit, run, lo, hi = item_of(number, lists, at, sizes, BQ, SPLIT, EDGE, FROM_LENGTH)
        x, y, last, slot, phase = add_values(W, hi - lo, slot, phase, keys, weights)
        factor = gl.expand_dims(take_last(turn, end, gl.SliceLayout(1, x.type.layout)), 1)
        here = to + ((b + split * (items // (parts * SPLIT * T))).to(gl.int64) * Hq * T + t) * LATENT
        if SPLIT == 1:
            if lo < hi:
                store_through(W, x * factor, y * factor, last, keys, here, head, T, Hq)
            else:
                store(x, here, head, T, Hq, HALF * W)
                store(y, here, head, T, Hq, HALF * W + PIECE)
        else:
            store(x * factor, here, head, T, Hq, HALF * W)
            store(y * factor, here, head, T, Hq, HALF * W + PIECE)
            if lo < hi:
                mbarrier.arrive(free.index(last))
        turn += 1


@gluon.jit(do_not_specialize=["slb", "first", "nq", "Hq", "parts", "T", "S", "items", "q_start", "table_b", "pool"])
def attend_latent(q, k, out, lse, sums, tops, offsets, cols, kinds, intervals, bitmaps, list_of, kv_length, q_starts, sinks, table,
                  sqb, sqh, sqt, skb, sks, slb, first, nq, Hq, parts, T, S, items, q_start, scale, table_b, pool, BQ: gl.constexpr, SPLIT: gl.constexpr, EDGE: gl.constexpr,
                  INTERVALS: gl.constexpr, BITMAPS: gl.constexpr, FROM_LENGTH: gl.constexpr, PAGE: gl.constexpr):
    queries, keys, weights, end = make_memory(q.dtype.element_ty, STAGES)
    sizes = (Hq, parts, T, S)
    strides = (sqb, sqh, sqt, skb, sks)
    lists = (offsets, cols, list_of, slb, first, nq)
    at = (q_start, q_starts, kv_length)
    to = out if SPLIT == 1 else sums
    gl.warp_specialize([
        (values, (0, to, lists, at, sizes, items, BQ, SPLIT, EDGE, FROM_LENGTH, keys, weights, end)),
        (values, (1, to, lists, at, sizes, items, BQ, SPLIT, EDGE, FROM_LENGTH, keys, weights, end)),
        (probabilities, (q, lse, tops, sinks, lists, at, sizes, strides, items, scale, BQ, SPLIT, EDGE, FROM_LENGTH, queries, keys, weights, end)),
        (bring, (q, k, table, lists, kinds, (intervals, bitmaps), at, sizes, strides, (table_b, pool), items, BQ, SPLIT, EDGE, INTERVALS,
                 BITMAPS, FROM_LENGTH, PAGE, queries, keys)),
    ], [4, 4, 4], [160, 160, 32])


# ---------------------------------------------------------------------------------------------------------------- the host
def takes(q, k, v, lists, scale: float, softcap, kind: str, latent) -> bool:
    """Whether this call is one for `attend_latent`: no orders, one list for all heads, and what latent_gluon.fits asks for."""
    return latent is None and lists.q_order is None and lists.k_order is None and lists.list_of.shape[1] == 1 and latent_gluon.fits(q, k, v, scale, softcap, kind)


def resources(problem: Problem, config) -> Resources | str:
    if config["block_k"] != KEYS.value:
        return f"path latent takes blocks of {KEYS.value} keys, not {config['block_k']}"
    return latent_gluon.resources()


def splits_of(items: int, blocks: int, ragged: bool, sms: int) -> int:
    """Shares of a list: as few as leave no multiprocessor idle for more than a tenth of the time, a power of two (few kernels to compile)."""
    found = 1
    while found < min(SPLITS, blocks) and (ragged and items * found < 4 * sms or items * found < 0.9 * sms * -(-items * found // sms)):
        found *= 2
    return found


@lru_cache(1024)
def constants(block_q: int, splits: int, edge=False, intervals=False, bitmaps=False, from_length=False, page=0) -> relaunch.Constants:
    return relaunch.Constants(BQ=block_q, SPLIT=splits, EDGE=edge, INTERVALS=intervals, BITMAPS=bitmaps, FROM_LENGTH=from_length, PAGE=page, num_warps=4,
                              enable_fp_fusion=False)


@lru_cache(64)
def joined(splits: int) -> relaunch.Constants:
    return relaunch.Constants(merge_constants(LATENT.value, splits), num_warps=4, enable_fp_fusion=False)


def launch(q, k, v, lists, out, lse, kind, place, scale: float, *, sink_logits, kv_length, q_start, table):
    """Fills out [B,Hq,T,512] and lse [B,Hq,T] (or None)."""
    S, pool, page, _, k, _ = one_tensor(table, k, v)
    (B, Hq, T, _), parts, lines = q.shape, -(-q.shape[1] // HEADS.value), q.shape[0] * q.shape[1] * q.shape[2]
    (host, starts), sms = known_start(q_start), max(place.sms, 1)
    splits = splits_of(B * T * parts, lists.nk, kv_length is not None, sms)
    items = B * T * parts * splits
    made = constants(lists.block_q, splits, kv_length is not None or lists.nk * KEYS.value > S, lists.has_intervals, lists.has_bitmaps, q_start is None, page)
    sums = tops = None
    if splits > 1:
        sums, tops = place.empty((splits, lines, LATENT.value), "float32"), place.empty((splits, lines, 2), "float32")
    pointers = (q, k, out, lse, sums, tops, lists.offsets, lists.cols, lists.kinds, lists.intervals, lists.bitmaps, lists.list_of, kv_length, starts, sink_logits, table)
    numbers = (*q.stride()[:3], k.stride(0), k.stride(2), list_steps(lists)[0], lists.first, lists.nq, Hq, parts, T, S, items, host or 0, float(scale),
               None if table is None else table.stride(0), pool)
    relaunch.launch(attend_latent, (min(items, sms),), place, pointers, numbers, made, (q.dtype,))
    if splits > 1:
        relaunch.launch(merge, (-(-lines // joined(splits)["ROWS"]),), place, (sums, tops, out, lse, sink_logits), (Hq, T, lines, float(scale)), joined(splits), (kind,))


def artifacts(problem: Problem, config) -> list[dict]:
    has, pointer = problem.features.__contains__, POINTER[problem.dtype("q")]
    items = problem["B"] * problem["T"] * -(-problem["Hq"] // HEADS.value)
    splits = splits_of(items, -(-problem["S"] // KEYS.value), has("kv_length"), 132)
    made = constants(config["block_q"], splits, has("kv_length") or problem["S"] % KEYS.value != 0, has("interval"), has("bitmap"), has("kv_length") and not has("q_start"),
                     DEFAULT * has("paged"))
    names = ["offsets", "cols", "kinds", "intervals", "bitmaps", "list_of"] + ["kv_length"] * has("kv_length") + ["q_starts"] * has("q_start") + ["table"] * has("paged")
    sums = dict.fromkeys(("sums", "tops") * (splits > 1), "*fp32")
    arrays = dict(q=pointer, k=pointer, out=pointer, lse="*fp32") | sums | {name: "*i32" for name in names} | ({"sinks": "*fp32"} if has("sink") else {})
    integers = ("sqb", "sqh", "sqt", "skb", "sks", "slb", "first", "nq", "Hq", "parts", "T", "S", "items", "q_start") + ("table_b", "pool") * has("paged")
    return [relaunch.artifact(attend_latent, made, arrays, integers, ("scale",), aligned=integers[:5])]
