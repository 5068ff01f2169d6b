"""Attention over selected keys on the CPU.

    q [B,Hq,T,D]  k [B,Hk,S,D]  v [B,Hk,S,Dv]  indices [B,G,T,K] int32, G in {1, Hk, Hq}  ->  out [B,Hq,T,Dv], lse [B,Hq,T]

Entry e >= 0 stands for keys e*granularity ... +granularity-1; what lies outside of 0 .. min(S, kv_length) or, if causal, past the query means
nothing, wherever it stands; entries past `lengths` are not read; an entry given twice counts twice. A row without keys: out 0, lse -inf.
Only named keys are touched, so nothing in others can leak.

A task is one query with the heads that share its entries and its key head. Its keys come KEYS at a time as a list of rows, read in place where they are
float32 of a fitting width, else converted into scratch (gather_tiles.py). Maxima are exact per chunk. Sums are float32; float64 inputs and rows
that float32 cannot hold are done in float64 (gather_exact.py). Tasks share no sum: results do not depend on the number of threads.
With latent=(R, P) rows are bytes, the fp8 layout of a latent cache, and the value is the first R columns: those that are named become rows of q's type first (latents.py).
"""
import math

import numba
import numpy as np

from sparsetile.backends.contract import Resources
from sparsetile.backends.numba import latents
from sparsetile.backends.numba.convert import fill_zero
from sparsetile.backends.numba.exact import row_factor
from sparsetile.backends.numba.far import far, on_threads, scratch
from sparsetile.backends.numba.gather_exact import exact
from sparsetile.backends.numba.gather_job import job_at, load_heads, make_gather, named_keys, place_rows, unit_of
from sparsetile.backends.numba.gather_tiles import KEYS, STEP, cap_row, fetch_rows, finite, mix_rows, scale_row, score_rows, soften
from sparsetile.backends.numba.jit import kernel
from sparsetile.backends.numba.rows import store_row
from sparsetile.backends.numba.selector import put_byte, put_i64
from sparsetile.backends.numba.simd import address, get_f32, next_task, put_f32

TUNABLES = ()
NOTHING = np.float32(-np.inf)


def supports(problem):
    kinds = [problem.dtype(name, "float32") for name in ("q", "k", "v")]
    if "latent_fp8" in kinds:
        return latents.refusal(kinds)
    return "float64 together with other types: convert q, k and v to one type" if 0 < kinds.count("float64") < 3 else None


def resources(problem, config):
    return Resources(threads=1)


def default_config(problem):
    return {}


@kernel
def _attend(job, b, t, h, heads, j, found, memory):
    """`heads` heads from h on against `found` keys: O [heads, Dvp] and state [heads, (maximum, sum, NaN if a score was not finite, -)]."""
    keys, rows, q, o = memory + job.keys, memory + job.rows, memory + job.head_q, memory + job.head_o
    s, state, krows, vrows = memory + job.s, memory + job.state, memory + job.k_rows, memory + job.v_rows
    load_heads(job, job.q + b * job.q_b + t * job.q_t, job.q_h, job.q_code, h, heads, job.D, job.Dp, job.sign, q)
    fill_zero(o, heads * job.Dvp)
    for r in range(heads):
        put_f32(state, 4 * r, NOTHING)
        put_f32(state, 4 * r + 1, np.float32(0))
        put_f32(state, 4 * r + 2, np.float32(0))
    base_k, base_v = job.k + b * job.k_b + j * job.k_h, job.v + b * job.v_b + j * job.v_h
    for first in range(0, found, KEYS):
        count = min(KEYS, found - first)
        ahead = max(0, min(KEYS, found - first - KEYS))
        fetch_rows(base_k, job.k_t, keys + 8 * (first + KEYS), ahead, job.D * job.k_size)
        if job.shared == 0:
            fetch_rows(base_v, job.v_t, keys + 8 * (first + KEYS), ahead, job.Dv * job.v_size)
        place_rows(base_k, job.k_t, job.k_code, job.D, job.row, job.here_k, keys + 8 * first, count, krows, 4 * job.row, rows)
        score_rows(q, 4 * job.Dp, heads, rows, count, job.Dp, s)
        if job.shared == 0:
            place_rows(base_v, job.v_t, job.v_code, job.Dv, job.Dvp, job.here_v, keys + 8 * first, count, vrows, 4 * job.Dvp, rows)
        for r in range(heads):
            row = s + r * STEP
            if job.capped:
                cap_row(row, count, job.constants, 0)
            factor = soften(row, count, state + 16 * r, job.constants)
            if factor != 1:
                scale_row(o + 4 * r * job.Dvp, job.Dvp, factor)
        mix_rows(s, heads, rows, count, job.Dvp, o, 4 * job.Dvp)


@kernel
def _in_logarithms(job, score):
    """A row's maximum as a natural logarithm, rounded to float32 as the backward rounds each score."""
    x = score * get_f32(job.constants, 4)
    return np.float64(x) if np.isfinite(x) else np.float64(score) * job.unit


@kernel
def _store(job, b, t, h, heads, found, o, state):
    """Divide by the sums, write rows and their lse; mark rows that float32 could not hold."""
    for r in range(heads):
        row, at = o + 4 * r * job.Dvp, (b * job.Hq + h + r) * job.T + t
        total = np.float64(get_f32(state, 4 * r + 1))
        top = _in_logarithms(job, get_f32(state, 4 * r)) if total != 0 else -math.inf
        scale_row(row, job.Dvp, np.float32(row_factor(job, h + r, top, total)))
        put_f32(job.lse, at, np.float32(top + math.log(total) if total > 0 else -math.inf))
        store_row(job.out_code, row, job.Dv, job.out + b * job.out_b + (h + r) * job.out_h + t * job.out_t)
        if found > 0 and (get_f32(state, 4 * r + 2) != 0 or finite(row, job.Dv) != 0):
            put_byte(job.lost, at, 1)
            put_i64(job.odd, 0, 1)


@far("ii")
def work(jobs, thread):
    """One thread: queries with the heads of a unit until there are none left, the last (causal: the longest) first."""
    job = job_at(jobs)
    heads, memory = job.split, job.memory + job.memory_step * thread
    parts = (job.heads + heads - 1) // heads
    total = job.B * job.T * job.units * parts
    while True:
        task = next_task(job.counter)
        if task >= total:
            break
        part, unit, query = task % parts, task // parts % job.units, task // (parts * job.units)
        b, t = query // job.T, job.T - 1 - query % job.T
        h, j = unit_of(job, unit)
        h, count = h + part * heads, min(heads, job.heads - part * heads)
        found = named_keys(job, b, unit, t, memory + job.keys)
        _attend(job, b, t, h, count, j, found, memory)
        _store(job, b, t, h, count, found, memory + job.head_o, memory + job.state)


def run(q, k, v, indices, *, place, config, lengths=None, granularity=1, causal=False, scale, sink_logits=None, softcap=None, kv_length=None, q_start=None,
        out_dtype=None, return_lse=True, latent=None):
    if latent is not None:
        k, v, indices = latents.selected(k, indices, q.dtype, latent)
    (B, Hq, T, _), (S, Dv) = q.shape, v.shape[2:]
    kind = out_dtype or (q.dtype.name if q.dtype.name != "float8_e4m3fn" else "bfloat16")
    out, lse = place.empty((B, Hq, T, Dv), kind), place.empty((B, Hq, T), "float64" if q.dtype == np.float64 else "float32")
    if lse.size == 0:
        return out, lse if return_lse else None
    job, _alive = make_gather(indices, lengths=lengths, granularity=granularity, causal=causal, scale=scale, softcap=softcap, kv_length=kv_length,
                              q_start=q_start, sink_logits=sink_logits, q=q, k=k, v=v, out=out, lse=lse)
    threads, tasks, heads = numba.get_num_threads(), B * T * int(job["units"][0]), int(job["heads"][0])
    if tasks < 2 * threads:  # few queries: heads are dealt out
        job["split"] = min(heads, max(4, -(-heads * tasks // (2 * threads) // 4) * 4))
    x, room, split = job[0], indices.shape[3] * min(granularity, S), int(job["split"][0])
    _memory = scratch(job, threads, keys=8 * room, rows=8 * KEYS, head_q=4 * split * x["Dp"], head_o=4 * split * x["Dvp"], s=split * STEP, state=16 * split,
                      k_rows=4 * KEYS * x["row"], v_rows=4 * KEYS * x["Dvp"])
    counter, lost = np.zeros(2, np.int64), np.full(lse.shape, q.dtype == np.float64, np.uint8)
    job["counter"], job["odd"], job["lost"], job["room"] = address(counter), address(counter[1:]), address(lost), room
    if q.dtype != np.float64:
        on_threads(work, job)
    if counter[1] or q.dtype == np.float64:
        counter[:] = 0
        on_threads(exact, job)
    return out, lse if return_lse else None
