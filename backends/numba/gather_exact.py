"""Attention over selected keys one row at a time in float64: float64 inputs, and rows whose float32 sums left the range of float32. Slow and plain."""
import math

import numpy as np

from sparsetile.backends.numba.exact import dot, put_lse, read_wide, row_factor, write_wide
from sparsetile.backends.numba.far import far
from sparsetile.backends.numba.gather_job import job_at, named_keys
from sparsetile.backends.numba.jit import kernel
from sparsetile.backends.numba.selector import get_byte
from sparsetile.backends.numba.simd import get_i64, next_task


@kernel
def _row(job, b, h, t, keys, found):
    """Query t of head h against `found` keys (int64 at `keys`): writes its row of out and its lse."""
    D, Dv, j = job.D, job.Dv, h // (job.Hq // job.Hk)
    x, y, o, narrow = np.empty(D), np.empty(max(D, Dv)), np.zeros(Dv), np.empty(max(D, Dv), np.float32)
    read_wide(job.q_code, job.q + b * job.q_b + h * job.q_h + t * job.q_t, D, x, narrow)
    pk, pv = job.k + b * job.k_b + j * job.k_h, job.v + b * job.v_b + j * job.v_h
    top, total = -math.inf, 0.0
    for n in range(found):
        s = get_i64(keys, n)
        read_wide(job.k_code, pk + s * job.k_t, D, y, narrow)
        score = dot(x, y, D) * job.scale
        if job.capped:
            score = math.tanh(score / job.softcap) * job.softcap
        if score > top:
            factor = math.exp(top - score)
            total *= factor
            for d in range(Dv):
                o[d] *= factor
            top = score
        p = math.exp(score - top) if score > -math.inf else 0.0 * score if score != score else 0.0
        total += p
        read_wide(job.v_code, pv + s * job.v_t, Dv, y, narrow)
        for d in range(Dv):
            o[d] += p * y[d]
    put_lse(job, b, h, t, top + math.log(total) if total > 0 else -math.inf if total == 0 else math.nan)
    inverse = row_factor(job, h, top, total)
    for d in range(Dv):
        o[d] *= inverse
    write_wide(job.out_code, o, Dv, job.out + b * job.out_b + h * job.out_h + t * job.out_t, narrow)


@far("ii")
def exact(jobs, thread):
    """One thread: rows whose byte at job.lost is set."""
    job = job_at(jobs)
    keys = job.memory + job.memory_step * thread + job.keys
    while True:
        task = next_task(job.counter)
        if task >= job.B * job.Hq * job.T:
            break
        if get_byte(job.lost, task) != 0:
            b, h, t = task // (job.Hq * job.T), task // job.T % job.Hq, task % job.T
            _row(job, b, h, t, keys, named_keys(job, b, h // job.heads, t, keys))
