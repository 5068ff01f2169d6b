"""Gradients of attention over blocks one query at a time in float64, for float64 inputs. Slow and plain; a key head's sums belong to one thread."""
import math

import numpy as np

from sparsetile.backends.numba.exact import dot, get_f64, put_f64, read_wide, write_wide
from sparsetile.backends.numba.far import far
from sparsetile.backends.numba.jit import kernel
from sparsetile.backends.numba.job import job_at, key_limit, key_of, list_block, row_word, tile_block, tile_rows
from sparsetile.backends.numba.simd import get_i32, get_i64, next_task


@kernel
def _row(job, b, h, i, r, t):
    """Row r of block i: writes dq, adds to dk and dv (float64, rows of D and Dv without gaps)."""
    D, Dv, j, at = job.D, job.Dv, h // (job.Hq // job.Hk), (b * job.Hq + h) * job.T + t
    lse, delta = get_f64(job.lse, at), get_f64(job.delta, at)
    if math.isinf(lse):
        return
    x, y, z, g, dq, narrow = np.empty(D), np.empty(D), np.empty(Dv), np.empty(Dv), np.zeros(D), np.empty(max(D, Dv), np.float32)
    read_wide(job.q_code, job.q + b * job.q_b + h * job.q_h + t * job.q_t, D, x, narrow)
    read_wide(job.dout_code, job.dout + b * job.dout_b + h * job.dout_h + t * job.dout_t, Dv, g, narrow)
    pk, pv, limit = job.k + b * job.k_b + j * job.k_h, job.v + b * job.v_b + j * job.v_h, key_limit(job, b)
    begin, partial, end = list_block(job, b, h, i)
    for entry in range(begin, end):
        kind = get_i32(job.kinds, entry) if entry >= partial else -1
        for c in range(job.block_k):
            word = 0xFFFFFFFF if kind < 0 else row_word(job, kind, r, c >> 5)
            s = key_of(job, get_i32(job.cols, entry) * job.block_k + c, limit, 0) if (word >> (c & 31)) & 1 else -1
            if s < 0:
                continue
            read_wide(job.k_code, pk + s * job.k_t, D, y, narrow)
            read_wide(job.v_code, pv + s * job.v_t, Dv, z, narrow)
            score, slope = dot(x, y, D) * job.scale, job.scale
            if job.capped:
                bend = math.tanh(score / job.softcap)
                score, slope = bend * job.softcap, slope * (1 - bend * bend)
            p = math.exp(score - lse)
            ds = p * (dot(g, z, Dv) - delta) * slope
            dk, dv = job.dk + b * job.dk_b + j * job.dk_h + s * job.dk_t, job.dv + b * job.dv_b + j * job.dv_h + s * job.dv_t
            for d in range(D):
                dq[d] += ds * y[d]
                put_f64(dk, d, get_f64(dk, d) + ds * x[d])
            for d in range(Dv):
                put_f64(dv, d, get_f64(dv, d) + p * g[d])
    write_wide(job.dq_code, dq, D, job.dq + b * job.dq_b + h * job.dq_h + t * job.dq_t, narrow)


@far("ii")
def exact_backward(jobs, thread):
    job = job_at(jobs)
    rows, group = job.memory + job.memory_step * thread + job.rows, job.Hq // job.Hk
    while True:
        head = next_task(job.counter)
        if head >= job.B * job.Hk:
            break
        b, j = head // job.Hk, head % job.Hk
        for h in range(j * group, (j + 1) * group):
            for tile in range(job.tiles):
                i = tile_block(job, b, tile)
                if i >= 0 and tile_rows(jobs, b, tile, rows, job.block_q) > 0:
                    for r in range(job.block_q):
                        t = get_i64(rows, r)
                        if t >= 0:
                            _row(job, b, h, i, r, t)
