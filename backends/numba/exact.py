"""One query at a time in float64: float64 inputs, and rows whose float32 sums left the range of float32.

Slow and plain. Scores of float32 inputs reach 1e77 before scaling and values sum up past 3e38: such rows come here, found by their result.
"""
import math

import numpy as np

from sparsetile.backends.numba.far import far
from sparsetile.backends.numba.jit import kernel
from sparsetile.backends.numba.job import F64_CODE, job_at, key_limit, key_of, list_block, row_word, scales_of, table_of, tile_block, tile_rows
from sparsetile.backends.numba.rows import load_row, store_row
from sparsetile.backends.numba.simd import F, F64, get_byte, get_f32, get_i32, get_i64, next_task, op

get_f64 = op("ii", lambda e, base, index: e.load(base, e.mul(index, 8), F64), "d")
put_f64 = op("iid", lambda e, base, index, x: e.store(x, base, e.mul(index, 8)))


@kernel
def read_wide(code, source, count, wide, narrow):
    """count elements of any type at an address -> the float64 array `wide`; `narrow` is float32 scratch."""
    if code == F64_CODE:
        for d in range(count):
            wide[d] = get_f64(source, d)
    else:
        load_row(code, source, count, narrow.ctypes.data, count)
        for d in range(count):
            wide[d] = narrow[d]


@kernel
def write_wide(code, wide, count, target, narrow):
    if code == F64_CODE:
        for d in range(count):
            put_f64(target, d, wide[d])
    else:
        for d in range(count):
            narrow[d] = wide[d]
        store_row(code, narrow.ctypes.data, count, target)


@kernel
def dot(x, y, count):
    total = 0.0
    for d in range(count):
        total += x[d] * y[d]
    return total


@kernel
def put_lse(job, b, h, t, x):
    at = (b * job.Hq + h) * job.T + t
    if job.q_code == F64_CODE:
        put_f64(job.lse, at, x)
    else:
        put_lse32(job.lse, at, x)


put_lse32 = op("iid", lambda e, base, index, x: e.store(e.b.fptrunc(x, F), base, e.mul(index, 4)))


@kernel
def exact_row(job, b, h, i, r, t):
    """Query t, row r of block i (-1: in no list), of batch b and head h: writes its row of out and its lse."""
    D, Dv, scale, cap = job.D, job.Dv, job.scale, job.softcap
    x, y, o, narrow = np.empty(D), np.empty(max(D, Dv)), np.zeros(Dv), np.empty(max(D, Dv), np.float32)
    read_wide(job.q_code, job.q + b * job.q_b + h * job.q_h + t * job.q_t, D, x, narrow)
    top, total = -math.inf, 0.0
    j = h // (job.Hq // job.Hk)
    pk, pv, limit = job.k + b * job.k_b + j * job.k_h, job.v + b * job.v_b + j * job.v_h, key_limit(job, b)
    table, scales_k, scales_v = table_of(job, b), scales_of(job, job.k_scale, b, j), scales_of(job, job.v_scale, b, j)
    if job.q_scale != 0:
        scale *= get_f32(job.q_scale, (b * job.Hq + h) * job.T + t)
    begin, partial, end = list_block(job, b, h, i) if i >= 0 else (0, 0, 0)
    for entry in range(begin, end):
        column = get_i32(job.cols, entry)
        kind = get_i32(job.kinds, entry) if entry >= partial else -1
        for w in range(job.block_k >> 5):
            word = 0xFFFFFFFF if kind < 0 else row_word(job, kind, r, w)
            for bit in range(32):
                if (word >> bit) & 1 == 0:
                    continue
                s = key_of(job, column * job.block_k + 32 * w + bit, limit, table)
                if s < 0:
                    continue
                read_wide(job.k_code, pk + s * job.k_t, D, y, narrow)
                score = dot(x, y, D) * scale
                if scales_k != 0:
                    score *= get_f32(scales_k, s >> 7)
                if job.capped:
                    score = math.tanh(score / cap) * cap
                if score > top:
                    factor = math.exp(top - score)
                    total *= factor
                    for d in range(Dv):
                        o[d] *= factor
                    top = score
                p = math.exp(score - top) if score > -math.inf else 0.0 * score if score != score else 0.0
                total += p
                read_wide(job.v_code, pv + s * job.v_t, Dv, y, narrow)
                weight = p * get_f32(scales_v, s >> 7) if scales_v != 0 else p
                for d in range(Dv):
                    o[d] += weight * y[d]
    put_lse(job, b, h, t, top + math.log(total) if total > 0 else -math.inf if total == 0 else math.nan)
    inverse = row_factor(job, h, top, total)
    for d in range(Dv):
        o[d] *= inverse
    write_wide(job.out_code, o, Dv, job.out + b * job.out_b + h * job.out_h + t * job.out_t, narrow)


@kernel
def row_factor(job, h, top, total):
    """What the sum of exp(score - top) * v is multiplied by: 1 over `total` and the sink's share; 0 for a row without keys."""
    if total == 0:
        return 0.0
    if job.sink == 0:
        return 1 / total
    sink = get_f32(job.sink, h)
    if sink <= top:
        return 1 / (total + math.exp(sink - top))
    factor = math.exp(top - sink)  # a sink of +inf leaves 0
    return factor / (total * factor + 1)


@far("ii")
def exact(jobs, thread):
    """One thread: rows whose byte at job.lost is set."""
    job = job_at(jobs)
    rows = job.memory + job.memory_step * thread + job.rows
    while True:
        task = next_task(job.counter)
        if task >= job.B * job.Hq * job.tiles:
            break
        head, tile = task // job.tiles, task % job.tiles
        b, h = head // job.Hq, head % job.Hq
        if tile_rows(jobs, b, tile, rows, job.block_q) > 0:
            i = tile_block(job, b, tile)
            for r in range(job.block_q):
                t = get_i64(rows, r)
                if t >= 0 and get_byte(job.lost, head * job.T + t) != 0:
                    exact_row(job, b, h, i, r, t)
