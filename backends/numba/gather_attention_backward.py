"""Gradients of attention over selected keys on the CPU.

    q [B,Hq,T,D]  k [B,Hk,S,D]  v [B,Hk,S,Dv]  indices [B,G,T,K]  lse, delta [B,Hq,T]  dout [B,Hq,T,Dv]  ->  dq, dk, dv in the types of q, k, v

lse is the total logsumexp (sink included), delta = sum_d dout*out - dlse * exp(lse_keys - lse). P = exp(s - lse), dS = P (dout.v - delta) softcap';
dq = scale dS k, dk = scale dS^T q, dv = P^T dout; a key named twice collects twice. Rows whose lse is not finite have no gradient.

Queries are done in runs that keep P and dS in memory. First threads take queries: P, dS and dq. Then threads take bins of keys (bin of s = s / 8 mod bins) and
add, query after query and entry after entry, what each named key collects: one owner for each row of dk and dv, one order of additions, no atomics.
So the bits depend neither on the number of threads nor on the length of a run. float64 inputs, and calls whose float32 sums overflow, are done by NumPy.
"""
import numba
import numpy as np

from sparsetile.backends.contract import Resources
from sparsetile.backends.numba.convert import fill_zero
from sparsetile.backends.numba.far import far, on_threads, scratch
from sparsetile.backends.numba.gather_job import job_at, load_heads, make_gather, named_keys, place_rows, unit_of
from sparsetile.backends.numba.gather_tiles import KEYS, STEP, cap_row, differ, fetch_rows, mix_rows, scale_row, score_rows, spread_rows
from sparsetile.backends.numba.gather_wide import gradients
from sparsetile.backends.numba.jit import kernel
from sparsetile.backends.numba.rows import store_row
from sparsetile.backends.numba.selector import put_i64
from sparsetile.backends.numba.simd import LANES, address, get_f32, get_i64, next_task

TUNABLES = ()
MEMORY = 64 << 20  # bytes of P and dS held at a time


def supports(problem):
    kinds = [problem.dtype(name, "float32") for name in ("q", "k", "v")]
    return "float64 together with other types: convert q, k and v to one type" if 0 < kinds.count("float64") < 3 else None


def resources(problem, config):
    return Resources(threads=1)


def default_config(problem):
    return {}


@kernel
def _sort(keys, found, bins, numbers, offsets):
    """Numbers 0 .. found by the bin of their keys, in order within a bin; offsets [bins + 1]."""
    for n in range(bins + 1):
        put_i64(offsets, n, 0)
    for n in range(found):
        place = (get_i64(keys, n) >> 3) % bins + 1
        put_i64(offsets, place, get_i64(offsets, place) + 1)
    for n in range(bins):
        put_i64(offsets, n + 1, get_i64(offsets, n + 1) + get_i64(offsets, n))
    for n in range(found):
        place = (get_i64(keys, n) >> 3) % bins
        put_i64(numbers, get_i64(offsets, place), n)
        put_i64(offsets, place, get_i64(offsets, place) + 1)
    for n in range(bins, 0, -1):
        put_i64(offsets, n, get_i64(offsets, n - 1))
    put_i64(offsets, 0, 0)


@kernel
def _query(job, b, t, unit, slot, memory):
    """P, dS and dq of one query and the heads of a unit."""
    krow, vrow, krows, vrows = memory + job.rows, memory + job.more_rows, memory + job.k_rows, memory + job.v_rows
    slope, dq = memory + job.s, memory + job.head_q
    h, j = unit_of(job, unit)
    heads, chunks = job.heads, (job.room + KEYS - 1) // KEYS
    keys, numbers, offsets = job.list + 8 * job.room * slot, job.numbers + 8 * job.room * slot, job.offsets + 8 * (job.bins + 1) * slot
    q, o = job.left_q + 4 * heads * job.row * slot, job.left_o + 4 * heads * job.Dvp * slot
    found = named_keys(job, b, unit, t, keys)
    _sort(keys, found, job.bins, numbers, offsets)
    fill_zero(dq, heads * job.row)
    if found > 0:
        load_heads(job, job.q + b * job.q_b + t * job.q_t, job.q_h, job.q_code, h, heads, job.D, job.row, job.sign, q)
        load_heads(job, job.dout + b * job.dout_b + t * job.dout_t, job.dout_h, job.dout_code, h, heads, job.Dv, job.Dvp, 1.0, o)
    base_k, base_v = job.k + b * job.k_b + j * job.k_h, job.v + b * job.v_b + j * job.v_h
    value_width = (job.Dv + LANES - 1) // LANES * LANES
    odd = np.float32(0)
    for first in range(0, found, KEYS):
        count = min(KEYS, found - first)
        ahead = max(0, min(KEYS, found - first - KEYS))
        fetch_rows(base_k, job.k_t, keys + 8 * (first + KEYS), ahead, job.D * job.k_size)
        fetch_rows(base_v, job.v_t, keys + 8 * (first + KEYS), ahead, job.Dv * job.v_size)
        p = job.p + (slot * chunks + first // KEYS) * heads * STEP
        ds = job.ds + (slot * chunks + first // KEYS) * heads * STEP
        place_rows(base_k, job.k_t, job.k_code, job.D, job.row, job.here_k, keys + 8 * first, count, krows, 4 * job.row, krow)
        place_rows(base_v, job.v_t, job.v_code, job.Dv, job.Dvp, job.here_v, keys + 8 * first, count, vrows, 4 * job.Dvp, vrow)
        score_rows(q, 4 * job.row, heads, krow, count, job.Dp, p)
        score_rows(o, 4 * job.Dvp, heads, vrow, count, value_width, ds)
        for r in range(heads):
            at = (b * job.Hq + h + r) * job.T + t
            lse, delta = get_f32(job.lse, at), get_f32(job.delta, at)
            if np.isinf(lse):
                fill_zero(p + r * STEP, KEYS)
                fill_zero(ds + r * STEP, KEYS)
                continue
            if job.capped:
                cap_row(p + r * STEP, count, job.constants, slope)
            odd += differ(p + r * STEP, ds + r * STEP, count, lse, delta, job.constants, slope if job.capped else 0)
        mix_rows(ds, heads, krow, count, job.row, dq, 4 * job.row)
    for r in range(heads):
        row = dq + 4 * job.row * r
        if job.sign != 1:
            scale_row(row, job.row, np.float32(job.sign))
        store_row(job.dq_code, row, job.D, job.dq + b * job.dq_b + (h + r) * job.dq_h + t * job.dq_t)
    if odd != 0:
        put_i64(job.odd, 0, 1)


@far("ii")
def take_queries(jobs, thread):
    """One thread: the run's queries until there are none left."""
    job = job_at(jobs)
    while True:
        slot = next_task(job.counter)
        item = job.first + slot
        if item >= job.last:
            break
        unit, query = item % job.units, item // job.units
        _query(job, query // job.T, query % job.T, unit, slot, job.memory + job.memory_step * thread)


@far("ii")
def take_keys(jobs, thread):
    """One thread: bins of keys until there are none left; what each named key collects from the run's queries, in their order."""
    job = job_at(jobs)
    heads, chunks = job.heads, (job.room + KEYS - 1) // KEYS
    while True:
        place = next_task(job.counter + 8)
        if place >= job.bins:
            break
        for slot in range(job.last - job.first):
            offsets = job.offsets + 8 * ((job.bins + 1) * slot + place)
            first, count = get_i64(offsets, 0), get_i64(offsets, 1) - get_i64(offsets, 0)
            if count == 0:
                continue
            item = job.first + slot
            _, j = unit_of(job, item % job.units)
            head = item // job.units // job.T * job.Hk + j
            keys, numbers = job.list + 8 * job.room * slot, job.numbers + 8 * (job.room * slot + first)
            spread_rows(job.ds + slot * chunks * heads * STEP, heads, job.left_q + 4 * heads * job.row * slot, 4 * job.row, job.row,
                        job.sum_k + 4 * head * job.S * job.row, 4 * job.row, keys, numbers, count)
            spread_rows(job.p + slot * chunks * heads * STEP, heads, job.left_o + 4 * heads * job.Dvp * slot, 4 * job.Dvp, job.Dvp,
                        job.sum_v + 4 * head * job.S * job.Dvp, 4 * job.Dvp, keys, numbers, count)


@far("ii")
def finish(jobs, thread):
    """One thread: sums of keys -> gradients, rounded once."""
    job = job_at(jobs)
    while True:
        row = next_task(job.counter)
        if row >= job.B * job.Hk * job.S:
            break
        if job.sum_k != job.dk:
            store_row(job.dk_code, job.sum_k + 4 * job.row * row, job.D, job.dk + row * job.dk_t)
        if job.sum_v != job.dv:
            store_row(job.dv_code, job.sum_v + 4 * job.Dvp * row, job.Dv, job.dv + row * job.dv_t)


def run(q, k, v, indices, lse, delta, dout, *, place, config, lengths=None, granularity=1, causal=False, scale, softcap=None, kv_length=None, q_start=None,
        deterministic=True, out_dtype=None):
    (B, Hq, T, _), (_, Hk, S, _) = q.shape, v.shape
    dq, dk, dv = (place.empty(x.shape, out_dtype or x.dtype.name) for x in (q, k, v))
    arguments = dict(lengths=lengths, granularity=granularity, causal=causal, scale=scale, softcap=softcap, kv_length=kv_length, q_start=q_start)
    if q.dtype == np.float64:
        gradients(q, k, v, indices, lse, delta, dout, dq, dk, dv, **arguments)
        return dq, dk, dv
    if B * T * S * Hq == 0 or indices.shape[3] == 0:
        for grad in (dq, dk, dv):
            grad[...] = 0
        return dq, dk, dv
    job, _alive = make_gather(indices, lse=lse, delta=delta, q=q, k=k, v=v, dout=dout, dq=dq, dk=dk, dv=dv, **arguments)
    x, threads = job[0], numba.get_num_threads()
    x["shared"], x["here_k"], x["Dp"] = 0, k.dtype == np.float32 and k.shape[3] == x["row"], -(-k.shape[3] // LANES) * LANES
    heads, items, room = int(x["heads"]), B * T * int(x["units"]), max(1, indices.shape[3] * min(granularity, S))
    chunks, bins = -(-room // KEYS), 1 if threads == 1 else 4 * threads
    size = 2 * chunks * heads * STEP + 4 * heads * int(x["row"] + x["Dvp"]) + 16 * room + 8 * (bins + 1)
    slots = max(1, min(items, max(MEMORY // size, threads)))
    sums = [grad if grad.dtype == np.float32 and grad.shape[3] == width else np.empty((B, Hk, S, width), np.float32)
            for grad, width in ((dk, int(x["row"])), (dv, int(x["Dvp"])))]
    for total in sums:
        total.fill(0)
    counter = np.zeros(3, np.int64)
    _scratch = scratch(job, threads, rows=8 * KEYS, more_rows=8 * KEYS, k_rows=4 * KEYS * x["row"], v_rows=4 * KEYS * x["Dvp"], s=4 * KEYS,
                       head_q=4 * heads * x["row"])
    memory = dict(list=np.empty((slots, room), np.int64), numbers=np.empty((slots, room), np.int64), offsets=np.empty((slots, bins + 1), np.int64),
                  p=np.empty((slots, chunks, heads, KEYS), np.float32), ds=np.empty((slots, chunks, heads, KEYS), np.float32),
                  left_q=np.empty((slots, heads, int(x["row"])), np.float32), left_o=np.empty((slots, heads, int(x["Dvp"])), np.float32),
                  sum_k=sums[0], sum_v=sums[1], counter=counter, odd=counter[2:])
    for name, array in memory.items():
        job[name] = address(array)
    job["room"], job["bins"] = room, bins
    for first in range(0, items, slots):
        counter[:2] = 0
        job["first"], job["last"] = first, min(items, first + slots)
        on_threads(take_queries, job)
        on_threads(take_keys, job)
    if sums[0] is not dk or sums[1] is not dv:
        counter[0] = 0
        on_threads(finish, job)
    if counter[2] and all(np.isfinite(x.astype(np.float32, copy=False)).all() for x in (q, k, v, dout)):
        gradients(q, k, v, indices, lse, delta, dout, dq, dk, dv, **arguments)
    return dq, dk, dv
