"""Attention over the blocks of a layout on the CPU.

    q [B,Hq,T,D]  k [B,Hk,S,D]  v [B,Hk,S,Dv]  lists: contract.Lists  ->  out [B,Hq,T,Dv], lse [B,Hq,T]

Query t stands at q_start + t (None: the last T keys'). Keys at or past min(S, kv_length) do not exist. Rows without keys: out 0, lse -inf.
softcap comes before masking; the sink stands in the denominator only. Values of keys that no query of a tile sees are not read.
With table [B,pages] int32 keys and values are [N,Hk,page,D] and [N,Hk,page,Dv], rows of all pages one step apart: key s is row s % page of page table[b, s // page];
where that is not one of 0 .. N - 1 the key does not exist. Keys that lie in rows that follow each other are read in place.
With latent=(R, P) pages hold bytes, the fp8 layout of a latent cache, and the value is the first R columns: pages that the table names become rows of q's type first (latents.py).
Rows of float8 are multiplied by q_scale [B,Hq,T], k_scale and v_scale [B,Hk,ceil(S/128)] as they become float32.

A task is one block of queries of one batch and head (where queries are few, of the heads that share a key head); threads take tasks from a counter, and none shares a sum with another, so results do
not depend on their number. Keys and values are read in place where they are float32 rows; other types, permuted keys, holes between seen
keys and ragged ends go through float32 scratch, one chunk at a time. Sums are float32 (tiles.py); float64 inputs, and rows whose
float32 sums overflow, are done one query at a time in float64 (exact.py).
"""
import math

import numba
import numpy as np

from sparsetile.backends.arrays import numpy_name
from sparsetile.backends.contract import Resources, Tunable
from sparsetile.backends.numba import few, latents, tiles
from sparsetile.backends.numba.ahead import ROOM as ASKS, ask_for
from sparsetile.backends.numba.convert import denormal_rows, fill_zero, size_of
from sparsetile.backends.numba.exact import exact
from sparsetile.backends.numba.far import far, on_threads, scratch, set_fields
from sparsetile.backends.numba.finish import write_tile
from sparsetile.backends.numba.job import job_at, key_limit, list_block, list_ends, make_job, run_of_keys, scales_of, table_of, tile_block, tile_rows
from sparsetile.backends.numba.jit import kernel
from sparsetile.backends.numba.panels import CHUNK, WORDS, chunk_words, load_keys, load_pairs, load_panel, number_rows, scale_keys, scale_queries, span_of, up, whole
from sparsetile.backends.numba.simd import FAST_PAIRS, LANES, PAIRS, VECTORS, address, get_i32, get_i64, next_task, put_i64
from sparsetile.backends.numba.tiles import PANEL, STEP, WIDTH, run_of_lanes, split

TUNABLES = (Tunable("block_q", (64, 16, 32, 48, 96, 128, 160, 192, 224, 256, 320, 384), "queries per task"),
            Tunable("block_k", (64, 32, 96, 128, 160, 192, 256, 384, 512), "keys per block of the layout"),
            Tunable("pairs", (False, True), "bfloat16 by pair products (AVX-512 BF16), where widths are even, keys in order, the scale positive and no element denormal"))
SMALL = 1 << 20  # pairs times widths that one thread does faster than others are woken
NOTHING = np.float32(-np.inf)


def supports(problem):
    kinds = [problem.dtype(name, "float32") for name in ("q", "k", "v")]
    if "latent_fp8" in kinds:
        return latents.refusal(kinds)
    return "float64 together with other types: convert q, k and v to one type" if 0 < kinds.count("float64") < 3 else None


def resources(problem, config):
    if config.get("pairs") and not (PAIRS and {problem.dtype(name, "float32") for name in ("q", "k", "v")} == {"bfloat16"}):
        return "pairs: takes bfloat16 q, k and v, on a CPU with AVX-512 BF16"
    return Resources(threads=1)


def default_config(problem):
    long = problem.density == 1 and problem["T"] >= 1024  # two panels read keys that are in the nearest cache; in sparse lists the second often has no use for them
    return {"block_q": 128 if long else 64, "block_k": 64, "pairs": FAST_PAIRS and not isinstance(resources(problem, {"pairs": True}), str)}


@kernel
def scores_of(job, asks, pk, k_step, qt, D, ps, top, sixes, fours, words, low, plain, cols):
    """Scores of a run of keys. plain: no mask is needed. cols: how many vectors of lanes see any of them. What a softcap makes of them is masked later, and its maxima are others."""
    if job.capped != 0:
        top, plain = top + 3 * STEP, True
    if job.pairs != 0:
        if plain:
            tiles.score_pairs(asks, pk, k_step, qt, D, ps, top, sixes, fours)
        else:
            tiles.score_pairs_masked(asks, pk, k_step, qt, D, ps, top, sixes, fours, words, low)
    elif plain:
        tiles.score(asks, pk, k_step, qt, D, ps, top, sixes, fours)
    else:
        tiles.score_masked(cols, asks, pk, k_step, qt, D, ps, top, sixes, fours, words, low)


@far("iiiiii")
def _block(jobs, memory, kind, slot, limit, bases):
    """All panels against one block of keys, chunk by chunk. bases: addresses of this head's keys and values, its page table, and the scales of both."""
    job = job_at(jobs)
    D, Dvp, panels, pc, ps, rows, spans = job.D >> job.pairs, job.Dvp, job.panels, job.constants, memory + job.s, memory + job.rows, memory + job.spans
    asks, base_k, base_v, table, total = memory + job.asks, get_i64(bases, 0), get_i64(bases, 1), get_i64(bases, 2), spans + 16 * WORDS * panels
    sixes_v, fours_v = split(Dvp)
    for first in range(0, job.block_k, CHUNK):
        at, count = slot + first, min(CHUNK, job.block_k - first)
        if job.k_order == 0 and at >= limit:
            break
        row = run_of_keys(job, table, at, min(count, limit - at)) if job.k_order == 0 else at
        masked = kind >= 0 or job.k_order != 0 or at + count > limit or row < 0
        if masked:
            chunk_words(jobs, kind, at, first, count, limit, rows, panels, memory + job.words, spans, table if row < 0 else 0)
        else:
            whole(spans, panels, count)
        low, high, dense = span_of(total)
        if high == 0:
            continue
        pk, k_step, pv, v_step = base_k + row * job.k_t, job.k_t, base_v + row * job.v_t, job.v_t
        if not (job.direct_k != 0 and row >= 0 and (not masked or row + high + 3 <= job.pool)):  # register tiles of four rows may read three rows more
            pk, k_step = memory + job.keys, 4 * job.Dq
            load_keys(jobs, base_k, job.k_t, 0 if job.pairs else job.k_code, D, job.Dq, at, high, limit, total, pk, row, table)
            if get_i64(bases, 3) != 0:
                scale_keys(jobs, get_i64(bases, 3), at, high, limit, total, pk, job.Dq)
        if job.pairs != 0:
            pv, v_step = memory + job.values, 4 * job.width
            load_pairs(jobs, base_v, at, limit, total, pv, pv + 2 * (CHUNK + 4) * job.width)
        elif not (job.direct_v != 0 and dense and row >= 0):
            pv, v_step = memory + job.values, 4 * Dvp
            load_keys(jobs, base_v, job.v_t, job.v_code, job.Dv, Dvp, at, high, limit, total, pv, row, table)
            if get_i64(bases, 4) != 0:
                scale_keys(jobs, get_i64(bases, 4), at, high, limit, total, pv, Dvp)
        for p in range(panels):
            if get_i64(rows, job.panels * PANEL + p) == 0:
                continue
            low, high, dense = span_of(spans + 16 * WORDS * p)
            if high == 0:
                continue
            if low & job.pairs:  # pairs of keys start at even ones
                low, dense = low - 1, False
            qt, po, top, words = memory + job.qt + STEP * job.Dq * p, memory + job.ot + STEP * job.width * p, memory + job.state + 4 * STEP * p, memory + job.words + STEP * WORDS * p
            saw = memory + job.saw + STEP * p
            if masked:
                for w in range(WORDS):
                    tiles.merge_words(saw, words + STEP * w)
            else:
                put_i64(rows, job.panels * (PANEL + 1) + p, 1)
            if job.capped != 0 and not masked:
                tiles.every_word(words, WORDS)
            parted, plain = masked and job.capped == 0 and job.pairs == 0, dense and (high - low) & 3 == 0
            first_key = low
            while first_key < high:
                end, at_lanes, cols = run_of_lanes(words, first_key, high) if parted else (high, 0, VECTORS)
                sixes, fours = split((end - first_key + 3) & ~3)
                own = WIDTH * at_lanes
                if cols > 0:
                    scores_of(job, asks, pk + first_key * k_step, k_step, qt + own, D, ps + STEP * (first_key - low) + own, top + own, sixes, fours, words + own, first_key, plain, cols)
                first_key = end
            if job.capped != 0:
                tiles.softcap(ps, top, words, low, (high - low + 3) & ~3, pc)
            tiles.rescale(top, top + STEP, top + 2 * STEP, po, Dvp, pc)
            if job.pairs != 0:
                tiles.exponent_pairs(ps, (high - low + 3) & ~3, top + STEP, top + 2 * STEP, pc)
                tiles.add_values_pairs(asks, pv + (low >> 1) * v_step, v_step, ps, (high - low + 1) >> 1, po, sixes_v, fours_v)
                continue
            first_key = low
            while first_key < high:
                end, at_lanes, cols = run_of_lanes(words, first_key, high) if parted else (high, 0, VECTORS)
                own, state = WIDTH * at_lanes, top + STEP + WIDTH * at_lanes
                if cols > 0:
                    P = ps + STEP * (first_key - low) + own
                    tiles.exponent(cols, P, (end - first_key + 3) & ~3, state, state + STEP, pc)
                    tiles.add_values(cols, asks, pv + first_key * v_step, v_step, P, end - first_key, po + own, sixes_v, fours_v)
                first_key = end


@kernel
def _ask_ahead(job, memory, bases, b, h, i):
    """Ask for this tile's rows of the output and for what this thread is likely to read next, for tiles go down and threads take turns:
    rows of Q, and key blocks that this tile has not seen."""
    asks, row, count = memory + job.asks, get_i64(memory + job.rows, 0), job.block_q
    n = ask_for(asks, 0, 0, 0, 0, 0)
    if job.q_order != 0 or row < 0:
        return
    n = ask_for(asks, n, job.out + b * job.out_b + h * job.out_h + row * job.out_t, job.out_t, job.Dv * size_of(job.out_code), min(count, job.T - row))
    row, then = row - count * job.turns, i - job.turns
    if row < 0 or then < 0:
        return
    n = ask_for(asks, n, job.q + b * job.q_b + h * job.q_h + row * job.q_t, job.q_t, job.D * size_of(job.q_code), count)
    first, now = list_ends(job, b, h, then)[0], list_ends(job, b, h, i)[0]
    if job.k_order == 0 and job.table == 0:
        at, rows = first * job.block_k, min(now - first, job.turns) * job.block_k
        n = ask_for(asks, n, get_i64(bases, 0) + at * job.k_t, job.k_t, job.D * size_of(job.k_code), rows)
        n = ask_for(asks, n, get_i64(bases, 1) + at * job.v_t, job.v_t, job.Dv * size_of(job.v_code), rows)


@far("iiiiii")
def _tile(jobs, memory, b, h, heads, tile):
    """One block of queries of `heads` heads that share a list and a key head. state: for each panel new maxima, maxima in use, sums, scratch; PANEL float32 each."""
    job = job_at(jobs)
    rows, panels, state, bases = memory + job.rows, job.panels, memory + job.state, memory + job.spans + 16 * WORDS * (job.panels + 1)
    if tile_rows(jobs, b, tile, rows, panels * PANEL) == 0:
        return
    number_rows(rows, panels, job.T, heads, heads - 1)
    fill_zero(memory + job.ot, panels * job.width * PANEL)
    fill_zero(memory + job.saw, panels * PANEL)
    for p in range(panels):
        tiles.fill(state + 4 * STEP * p, 2 * PANEL, NOTHING)
        fill_zero(state + 4 * STEP * p + 2 * STEP, 2 * PANEL)
    i = tile_block(job, b, tile)
    if i >= 0:
        j, limit = h // (job.Hq // job.Hk), key_limit(job, b)
        put_i64(bases, 0, job.k + b * job.k_b + j * job.k_h)
        put_i64(bases, 1, job.v + b * job.v_b + j * job.v_h)
        put_i64(bases, 2, table_of(job, b))
        put_i64(bases, 3, scales_of(job, job.k_scale, b, j))
        put_i64(bases, 4, scales_of(job, job.v_scale, b, j))
        for p in range(panels):
            load_panel(job.q + b * job.q_b + h * job.q_h, job.q_h, job.q_t, job.T, 0 if job.pairs else job.q_code, job.D >> job.pairs, job.Dq, rows + 8 * PANEL * p, job.sign,
                       memory + job.flat, 4 * job.Dq, memory + job.qt + STEP * job.Dq * p, 0)
            if job.q_scale != 0:
                scale_queries(job.q_scale + 4 * (b * job.Hq + h) * job.T, rows + 8 * PANEL * p, memory + job.qt + STEP * job.Dq * p, job.Dq, 0, 0)
        begin, partial, end = list_block(job, b, h, i)
        _ask_ahead(job, memory, bases, b, h, i)
        for entry in range(begin, end):
            _block(jobs, memory, get_i32(job.kinds, entry) if entry >= partial else -1, get_i32(job.cols, entry) * job.block_k, limit, bases)
    write_tile(jobs, memory, b, h, 1 if i >= 0 else 0)


@far("ii")
def work(jobs, thread):
    """One thread: takes tasks until there are none left. Blocks of queries of one head follow each other, the last (causal: the longest) first."""
    job = job_at(jobs)
    memory = job.memory + job.memory_step * thread
    group = job.Hq // job.Hk
    parts = (group + job.stack - 1) // job.stack
    total = job.B * job.Hk * parts * job.tiles
    while True:
        task = next_task(job.counter)
        if task >= total:
            break
        unit, tile = task // job.tiles, job.tiles - 1 - task % job.tiles
        part, head = unit % parts, unit // parts
        first = part * job.stack
        _tile(jobs, memory, head // job.Hk, head % job.Hk * group + first, min(job.stack, group - first), tile)


def sizes(job, D, Dv, block_q, k, v, k_order):
    """Fill in panels and padded widths; bytes of scratch that forward and backward both need."""
    panels, Dp, width = up(block_q, PANEL) // PANEL, up(D, LANES), up(Dv, LANES)
    set_fields(job, panels=panels, Dp=Dp, Dq=Dp, Dvp=up(Dv, 4), width=width, direct_k=k.dtype == np.float32 and k_order is None,
               direct_v=v.dtype == np.float32 and k_order is None and Dv % 4 == 0)
    return dict(rows=8 * panels * (2 * PANEL + 2), flat=4 * PANEL * max(Dp, width), qt=panels * Dp * STEP, s=(CHUNK + 4) * STEP, words=panels * WORDS * STEP,
                spans=16 * WORDS * (panels + 1) + 40, keys=4 * (CHUNK + 4) * Dp, values=4 * (CHUNK + 4) * width)


def run(q, k, v, lists, *, place, config, scale, sink_logits=None, softcap=None, kv_length=None, q_start=None, out_dtype=None, return_lse=True,
        table=None, q_scale=None, k_scale=None, v_scale=None, latent=None):
    if latent is not None:
        k, v, table = latents.in_pages(k, table, kv_length, q.dtype, latent)
    B, Hq, T, D = q.shape
    Dv, wide = v.shape[3], q.dtype == np.float64
    kind = numpy_name(q.dtype)
    kind = out_dtype or (kind if kind != "float8_e4m3fn" else "bfloat16")
    make = place.empty if lists.q_order is None else place.zeros  # an order may leave queries out
    out, lse = make((B, Hq, T, Dv), kind), place.full((B, Hq, T), "float64" if wide else "float32", -math.inf)
    if lse.size == 0:
        return out, lse if return_lse else None
    job, alive = make_job(lists, q=q, k=k, v=v, out=out, lse=lse, scale=scale, softcap=softcap, kv_length=kv_length, q_start=q_start, sink_logits=sink_logits, table=table,
                          scales=(q_scale, k_scale, v_scale))
    shared = sizes(job, D, Dv, lists.block_q, k, v, lists.k_order)
    panels, width, tiles_ = up(lists.block_q, PANEL) // PANEL, up(Dv, LANES), int(job["tiles"][0])
    group, rows, stack = Hq // k.shape[1], min(T, lists.block_q), 1
    if lists.list_of.shape[1] == 1 and 2 * rows <= panels * PANEL:  # few queries: the heads of a group fill the lanes, and keys are read once for all
        stack = min(group, panels * PANEL // rows)
    units, parts, tasks = B * k.shape[1] * tiles_, None, B * Hq * tiles_
    if stack == group and group * rows <= few.MOST:
        parts, tasks = few.prepare(job, lists, group * rows, units, width)
    if config["pairs"] and table is None and parts is None and lists.k_order is None and scale > 0 and D % 2 == Dv % 2 == 0 and not any(denormal_rows(address(x), x.strides[:3], x.shape) for x in (q, k, v)):
        job["pairs"], job["Dq"], job["direct_k"] = 1, up(D // 2, LANES), 1
    threads = min(numba.get_num_threads(), tasks) if lse.size * int(job["S"][0]) * (D + Dv) > SMALL else 1
    _memory = scratch(job, threads, **shared, ot=panels * width * STEP, state=4 * panels * STEP, saw=panels * STEP, asks=ASKS)
    lost = np.full(lse.shape, wide, np.uint8)
    set_fields(job, lost=address(lost), stack=stack, turns=threads)
    counter = alive[0]["counter"]
    if not wide and parts is not None:
        on_threads(few.work, job, threads)
        counter[0] = 0
        on_threads(few.finish, job, min(threads, units))
    elif not wide:
        on_threads(work, job, threads)
    if wide or counter[1]:
        counter[:] = 0
        on_threads(exact, job, threads)
    return out, lse if return_lse else None
