"""Attention over disjoint sets of keys, put together by their LSE, on the CPU.

    outs: N arrays [B,H,T,Dv]  lses: N arrays [B,H,T]  sink_logits [H]  ->  out [B,H,T,Dv], lse [B,H,T]

Parts are added in their order, in float32 (float64 for float64), and rounded once. A part whose lse is -inf holds nothing and is not read.
All empty: out 0, lse -inf. The sink enters the denominator, not the lse. Weights are few, and NumPy makes them in float64.
With weights, N arrays [B,H,T,1], in place of lses (None): out is the sum of weights[n] * outs[n], lse None.
"""
import numba
import numpy as np

from sparsetile.backends.contract import Resources
from sparsetile.backends.numba.convert import fill_zero
from sparsetile.backends.numba.far import far, on_threads, record_at, scratch
from sparsetile.backends.numba.job import CODES
from sparsetile.backends.numba.rows import load_row, store_row
from sparsetile.backends.numba.simd import LANES, address, get_f32, get_i64, next_task, op

TUNABLES = ()
MERGE = np.dtype([(name, "i8") for name in ("parts", "count", "weights", "given", "out", "code", "H", "T", "Dv", "rows", "counter", "memory", "memory_step", "part", "total")])
job_at = record_at(MERGE)
BATCH = 64  # rows taken at a time
NOTHING = -1.0  # weight of a part that is not read; among given weights a number like others


def supports(problem):
    return None


def resources(problem, config):
    return Resources(threads=1)


def default_config(problem):
    return {}


def _add_weighted(e, source, weight, target, count):
    weight = e.splat(weight)

    def body(k, _):
        at = e.add(target, e.mul(k, 4))
        e.store(e.fma(e.load(e.add(source, e.mul(k, 4))), weight, e.load(at)), at)
        return []
    e.loop(count, [], body, LANES)


add_weighted = op("ifii", _add_weighted)


@far("ii")
def work(jobs, thread):
    job = job_at(jobs)
    memory, padded = job.memory + job.memory_step * thread, (job.Dv + LANES - 1) // LANES * LANES
    part, total = memory + job.part, memory + job.total
    while True:
        first = next_task(job.counter) * BATCH
        if first >= job.rows:
            break
        for row in range(first, min(first + BATCH, job.rows)):
            b, h, t = row // (job.H * job.T), row // job.T % job.H, row % job.T
            fill_zero(total, padded)
            for n in range(job.count):
                weight, x = get_f32(job.weights, n * job.rows + row), job.parts + 40 * n
                if job.given or weight != NOTHING:
                    load_row(get_i64(x, 4), get_i64(x, 0) + b * get_i64(x, 1) + h * get_i64(x, 2) + t * get_i64(x, 3), job.Dv, part, padded)
                    add_weighted(part, weight, total, padded)
            store_row(job.code, total, job.Dv, job.out + row * job.Dv * (4 if job.code == 0 else 2))


def _weights(lses, sink_logits):
    """(weights [N,B,H,T], lse [B,H,T]) in float64."""
    parts = np.stack([x.astype(np.float64) for x in lses])  # [N, B, H, T]
    lse = np.logaddexp.reduce(parts, axis=0)
    total = lse
    if sink_logits is not None:
        sink = np.asarray(sink_logits, np.float64)[:, None]
        total = np.where(np.isposinf(sink), np.inf, np.logaddexp(lse, sink))
    return np.where(parts == -np.inf, NOTHING, np.exp(parts - total)), lse


def run(outs, lses, *, place, config, sink_logits=None, out_dtype=None, weights=None):
    kind, given = out_dtype or outs[0].dtype.name, weights is not None
    with np.errstate(all="ignore"):
        weights, lse = (np.stack([x[..., 0].astype(np.float64) for x in weights]), None) if given else _weights(lses, sink_logits)
    B, H, T, Dv = outs[0].shape
    out, lse = place.empty((B, H, T, Dv), kind), None if given else lse.astype(lses[0].dtype)
    if out.size == 0:
        return out, lse
    if "float64" in (kind, *(x.dtype.name for x in outs)):
        total = np.zeros(out.shape)
        for x, w in zip(outs, weights):
            there = given | (w != NOTHING)[..., None]
            total += np.where(there, np.where(there, x, 0) * w[..., None], 0)
        return total.astype(out.dtype), lse
    weights, counter, job = weights.astype(np.float32), np.zeros(1, np.int64), np.zeros(1, MERGE)
    parts = np.array([[address(x), *x.strides[:3], CODES[x.dtype.name]] for x in outs], np.int64)
    for name, x in dict(parts=address(parts), count=len(outs), weights=address(weights), given=given, out=address(out), code=CODES[kind], H=H, T=T, Dv=Dv, rows=B * H * T,
                        counter=address(counter)).items():
        job[name] = x
    _memory = scratch(job, numba.get_num_threads(), part=4 * (Dv + LANES), total=4 * (Dv + LANES))
    on_threads(work, job)
    return out, lse
