"""What the backwards need of every row, on the CPU.

    out, dout [B,Hq,T,Dv]  lse [B,Hq,T] over keys  sink_logits [Hq]  dlse [B,Hq,T]  ->  lse_total, delta [B,Hq,T], dsink [Hq] or None

lse_total = log(exp(lse) + exp(sink)), -inf for rows without keys; delta = sum_d dout*out - dlse * exp(lse_total - lse), rows without keys 0; the sum over d is float32.
dsink_h = -sum over b, t of exp(sink_h - lse_total) * sum_d dout*out, in a fixed order; nothing for a sink of -inf or +inf.
What is left once the rows are summed is small, and NumPy does it in float64.
"""
import numba
import numpy as np

from sparsetile.backends.contract import Resources
from sparsetile.backends.numba.far import far, make_record, on_threads, record_at, scratch
from sparsetile.backends.numba.convert import F32_CODE
from sparsetile.backends.numba.job import code_of
from sparsetile.backends.numba.rows import load_row
from sparsetile.backends.numba.simd import LANES, address, ask_row, get_f32, next_task, op, put_f32

TUNABLES = ()
FEATURES = ("lse", "out", "dout", "out_b", "out_h", "out_t", "dout_b", "dout_h", "dout_t", "out_code", "dout_code", "H", "T", "Dv", "rows", "sums",
            "counter", "memory", "memory_step", "left", "right")
DELTA = np.dtype([(name, "i8") for name in FEATURES])
job_at = record_at(DELTA)
BATCH = 64  # rows taken at a time
AHEAD = 16  # rows that are asked for before they are read
NOTHING, ZERO = np.float32(-np.inf), np.float32(0)
FAR_SINK = 80.0  # where the sink holds all but exp(-80) of a row, P is 0 in float32: a larger factor could only make 0 * inf of it


def supports(problem):
    return None


def resources(problem, config):
    return Resources(threads=1)


def default_config(problem):
    return {}


def _dot(e, left, right, count):
    total = e.loop(count, [e.f(0)], lambda k, acc: [e.fma(e.load(e.add(left, e.mul(k, 4))), e.load(e.add(right, e.mul(k, 4))), acc[0])], LANES)[0]
    return e.sum(total)


dot = op("iii", _dot, "f")


@far("ii")
def work(jobs, thread):
    job = job_at(jobs)
    left, right = job.memory + job.memory_step * thread + job.left, job.memory + job.memory_step * thread + job.right
    padded = (job.Dv + LANES - 1) // LANES * LANES
    in_place = job.out_code == F32_CODE and job.dout_code == F32_CODE and padded == job.Dv
    while True:
        first = next_task(job.counter) * BATCH
        if first >= job.rows:
            break
        for row in range(first, min(first + BATCH, job.rows)):
            b, h, t = row // (job.H * job.T), row // job.T % job.H, row % job.T
            out, dout = job.out + b * job.out_b + h * job.out_h + t * job.out_t, job.dout + b * job.dout_b + h * job.dout_h + t * job.dout_t
            if not in_place:
                load_row(job.out_code, out, job.Dv, left, padded)
                load_row(job.dout_code, dout, job.Dv, right, padded)
                out, dout = left, right
            else:
                ask_row(out + AHEAD * job.out_t, 4 * job.Dv)
                ask_row(dout + AHEAD * job.dout_t, 4 * job.Dv)
            put_f32(job.sums, row, dot(out, dout, padded) if get_f32(job.lse, row) != NOTHING else ZERO)


def _row_sums(out, dout, lse):
    """sum_d out * dout, float32 (float64 for float64); 0 for rows without keys."""
    if out.dtype == np.float64 or dout.dtype == np.float64:
        return np.where(lse == -np.inf, 0, np.einsum("bhtd,bhtd->bht", out.astype(np.float64, copy=False), dout.astype(np.float64, copy=False)))
    B, H, T, Dv = out.shape
    sums, counter, lse = np.empty((B, H, T), np.float32), np.zeros(1, np.int64), np.ascontiguousarray(lse, np.float32)
    if sums.size:
        values = dict(lse=address(lse), H=H, T=T, Dv=Dv, rows=sums.size, sums=address(sums), counter=address(counter))
        for name, x in (("out", out), ("dout", dout)):
            values |= {name: address(x), f"{name}_code": code_of(x.dtype), **{f"{name}_{axis}": step for axis, step in zip("bht", x.strides)}}
        job = make_record(DELTA, values)
        _memory = scratch(job, numba.get_num_threads(), left=4 * (Dv + LANES), right=4 * (Dv + LANES))
        on_threads(work, job)
    return sums


def run(out, dout, lse, *, place, config, sink_logits=None, dlse=None):
    sums = _row_sums(out, dout, lse)
    if sink_logits is None and dlse is None:
        return lse, sums.astype(lse.dtype, copy=False), None
    kind, keys, delta = lse.dtype, lse.astype(np.float64), sums
    empty = keys == -np.inf
    delta = delta.astype(np.float64)
    total, dsink = keys, None
    with np.errstate(all="ignore"):
        if sink_logits is not None:
            sink = np.asarray(sink_logits, np.float64)[:, None]
            total = np.where(np.isposinf(sink), np.inf, np.logaddexp(keys, sink))
            share = np.where(np.isfinite(sink), np.exp(sink - total), 0)
            dsink = -(share * delta).sum(axis=(0, 2)).astype(np.float32)
        if dlse is not None:
            delta = delta - np.where(empty, 0, dlse.astype(np.float64) * np.exp(np.minimum(total - keys, FAR_SINK)))
    # A row without keys is no row at all to the backwards, even beside a sink: whatever stands in its q and dout must not meet a product.
    return np.where(empty, -np.inf, total).astype(kind), delta.astype(kind), dsink
