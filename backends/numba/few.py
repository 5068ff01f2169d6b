"""Block attention of few queries: decode, its keys dealt out in shares of their own so that one query, too, has work for all threads.

A unit is one block of queries of one batch, for all heads that share a key head: at most MOST rows. A task is a unit's share of the entries of its list; it leaves
maxima, sums and outputs, which are joined in the order of the shares. Shares depend on the problem alone, so results do not depend on the number of threads.
"""
import math

import numpy as np

from sparsetile.backends.numba import few_tiles, tiles
from sparsetile.backends.numba.convert import fill_zero
from sparsetile.backends.numba.far import far, set_fields
from sparsetile.backends.numba.few_tiles import KEYS, ROWS
from sparsetile.backends.numba.finish import write_tile
from sparsetile.backends.numba.job import LARGEST, job_at, key_limit, list_block, run_of_keys, scales_of, table_of, tile_block, tile_rows
from sparsetile.backends.numba.panels import CHUNK, WORDS, chunk_words, load_keys, load_panel, number_rows, scale_keys, scale_queries, span_of, up, whole
from sparsetile.backends.numba.simd import LANES, VECTORS, address, get_f32, get_i32, next_task, put_f32, put_i32
from sparsetile.backends.numba.tiles import PANEL, STEP

MOST = min(16, PANEL)
SHARE = 8192     # keys of a share
LOWEST = np.float32(-LARGEST)
NOTHING = np.float32(-np.inf)


@far("iiii")
def _mask(ps, words, first, keys):
    """S [keys, 4] of the rows from `first` on: -inf where a row does not see a key."""
    for r in range(ROWS):
        for c in range(keys):
            if (get_i32(words + STEP * (c >> 5), first + r) >> (c & 31)) & 1 == 0:
                put_f32(ps, c * ROWS + r, NOTHING)


@far("iiiiiiiiiii")
def _block(jobs, memory, kind, slot, limit, base_k, base_v, table, scales_k, scales_v, part):
    """All rows against one block of keys, chunk by chunk."""
    job = job_at(jobs)
    D, width, pc, ps, rows, spans, words = job.Dp, job.width, job.constants, memory + job.s, memory + job.rows, memory + job.spans, memory + job.words
    total, state, out = spans + 16 * WORDS * job.panels, part + 4 * MOST, part + 4 * MOST + 8 * LANES * job.quads
    vectors = width // LANES
    for first in range(0, job.block_k, CHUNK):
        at, count = slot + first, min(CHUNK, job.block_k - first)
        if job.k_order == 0 and at >= limit:
            break
        row = run_of_keys(job, table, at, min(count, limit - at)) if job.k_order == 0 else at
        masked = kind >= 0 or job.k_order != 0 or at + count > limit or row < 0
        if masked:
            chunk_words(jobs, kind, at, first, count, limit, rows, job.panels, words, spans, table if row < 0 else 0)
        else:
            whole(spans, job.panels, count)
        low, high, dense = span_of(total)
        if high == 0:
            continue
        for r in range(MOST):
            put_i32(part, r, get_i32(part, r) | (get_i32(words, r) | get_i32(words + STEP, r) if masked else 1))
        keys = (high + KEYS - 1) & -KEYS
        dense = dense and low == 0 and keys == high and row >= 0
        pk, k_step, k_code, pv, v_step, v_code = base_k + row * job.k_t, job.k_t, job.k_code, base_v + row * job.v_t, job.v_t, job.v_code
        if not (dense and job.k_order == 0 and k_code < 3 and D == job.D):
            pk, k_step, k_code = memory + job.keys, 4 * D, 0
            load_keys(jobs, base_k, job.k_t, job.k_code, job.D, D, at, keys, limit, total, pk, row, table)
            if scales_k != 0:
                scale_keys(jobs, scales_k, at, keys, limit, total, pk, D)
        if not (dense and job.k_order == 0 and v_code < 3 and width == job.Dv):
            pv, v_step, v_code = memory + job.values, 4 * width, 0
            load_keys(jobs, base_v, job.v_t, job.v_code, job.Dv, width, at, keys, limit, total, pv, row, table)
            if scales_v != 0:
                scale_keys(jobs, scales_v, at, keys, limit, total, pv, width)
        for g in range(job.quads):
            few_tiles.dots(k_code, pk, k_step, memory + job.flat + 4 * D * ROWS * g, 4 * D, D, ps, keys)
            if job.capped != 0:
                few_tiles.softcap(ps, keys, pc)
            if masked:
                _mask(ps, words, ROWS * g, keys)
            own = out + 4 * width * ROWS * g
            few_tiles.weights(ps, keys, state + 8 * LANES * g, state + 8 * LANES * g + 4 * LANES, own, 4 * width, width, pc)
            few_tiles.add_values(v_code, pv, v_step, ps, keys, own, 4 * width, vectors // VECTORS, vectors % VECTORS)


@far("iiiiiii")
def _share(jobs, memory, b, j, tile, share, part):
    """One share of a unit. part: which rows saw keys [MOST], maxima and sums [quads, 2, LANES], O [4 * quads, width]."""
    job = job_at(jobs)
    group, rows = job.Hq // job.Hk, memory + job.rows
    fill_zero(part, MOST + job.quads * (2 * LANES + ROWS * job.width))
    for g in range(job.quads):
        tiles.fill(part + 4 * MOST + 8 * LANES * g, LANES, LOWEST)
    i = tile_block(job, b, tile)
    if i < 0 or tile_rows(jobs, b, tile, rows, job.panels * PANEL) == 0:
        return
    number_rows(rows, job.panels, job.T, group, 1)
    load_panel(job.q + b * job.q_b + j * group * job.q_h, job.q_h, job.q_t, job.T, job.q_code, job.D, job.Dp, rows, job.sign, memory + job.flat, 4 * job.Dp, memory + job.qt, 1)
    if job.q_scale != 0:
        scale_queries(job.q_scale + 4 * (b * job.Hq + j * group) * job.T, rows, memory + job.qt, job.Dp, memory + job.flat, 4 * job.Dp)
    begin, partial, end = list_block(job, b, j * group, i)
    limit, first = key_limit(job, b), begin + share * job.few_entries
    for entry in range(first, min(end, first + job.few_entries)):
        _block(jobs, memory, get_i32(job.kinds, entry) if entry >= partial else -1, get_i32(job.cols, entry) * job.block_k, limit,
               job.k + b * job.k_b + j * job.k_h, job.v + b * job.v_b + j * job.v_h, table_of(job, b), scales_of(job, job.k_scale, b, j), scales_of(job, job.v_scale, b, j), part)


@far("iii")
def _join(jobs, memory, parts):
    """The shares of a unit -> O^T and state as `write_tile` wants them."""
    job = job_at(jobs)
    width, state, ot = job.width, memory + job.state, memory + job.ot
    unit = job.unit / np.float64(get_f32(job.constants, 0))
    for r in range(ROWS * job.quads):
        top, total, at = LOWEST, np.float32(0), 4 * MOST + 8 * LANES * (r // ROWS)
        for n in range(job.few_shares):
            top = max(top, get_f32(parts + n * job.few_step + at, r % ROWS))
            put_i32(memory + job.saw, r, get_i32(memory + job.saw, r) | get_i32(parts + n * job.few_step, r))
        m = top * get_f32(job.constants, 0)
        for n in range(job.few_shares):
            part, own = parts + n * job.few_step, np.float32(0)
            for k in range(r % ROWS, LANES, ROWS):
                own += get_f32(part + at + 4 * LANES, k)
            if own != 0:
                factor = np.float32(math.exp(np.float64(get_f32(part + at, r % ROWS)) * job.unit - m * unit))
                row = part + 4 * MOST + 8 * LANES * job.quads + 4 * width * r
                total += factor * own
                for d in range(width):
                    put_f32(ot, d * PANEL + r, get_f32(ot, d * PANEL + r) + factor * get_f32(row, d))
        put_f32(state, PANEL + r, m)
        put_f32(state, 2 * PANEL + r, total)


@far("ii")
def work(jobs, thread):
    """One thread: shares until there are none left."""
    job = job_at(jobs)
    memory = job.memory + job.memory_step * thread
    while True:
        task = next_task(job.counter)
        if task >= job.B * job.Hk * job.tiles * job.few_shares:
            break
        unit, share = task // job.few_shares, task % job.few_shares
        head = unit // job.tiles
        _share(jobs, memory, head // job.Hk, head % job.Hk, unit % job.tiles, share, job.few + task * job.few_step)


@far("ii")
def finish(jobs, thread):
    """One thread: units to be joined and written."""
    job = job_at(jobs)
    memory, group = job.memory + job.memory_step * thread, job.Hq // job.Hk
    rows = memory + job.rows
    while True:
        unit = next_task(job.counter)
        if unit >= job.B * job.Hk * job.tiles:
            break
        head, tile = unit // job.tiles, unit % job.tiles
        b, h = head // job.Hk, head % job.Hk * group
        if tile_rows(jobs, b, tile, rows, job.panels * PANEL) > 0:
            number_rows(rows, job.panels, job.T, group, 1)
            fill_zero(memory + job.ot, job.panels * job.width * PANEL)
            fill_zero(memory + job.saw, job.panels * PANEL)
            fill_zero(memory + job.state, 4 * job.panels * PANEL)
            _join(jobs, memory, job.few + unit * job.few_shares * job.few_step)
            write_tile(jobs, memory, b, h, 1 if tile_block(job, b, tile) >= 0 else 0)


def prepare(job, lists, rows, units, width):
    """Fill in the shares of units of `rows` rows; (memory of the shares, how many tasks they make)."""
    entries = max(1, SHARE // lists.block_k)
    shares, quads = max(1, -(-min(lists.nk, lists.longest or lists.nk) // entries)), -(-rows // ROWS)
    step = 4 * (MOST + quads * (2 * LANES + ROWS * width))
    parts = np.empty(units * shares * step, np.uint8)
    set_fields(job, few=address(parts), few_step=step, few_shares=shares, few_entries=entries, quads=quads)
    return parts, units * shares
