"""The top_k most important blocks of keys: what compressed keys got of each query's attention, summed over the group and over what lies in a block, competes at once.

    q [B,Hq,T,D]  k [B,Hk,C,D]  lse [B,Hq,T]  key_end, block_end [B,Hk,T] int32  ->  indices [B,Hk,T,top_k] int32 ascending, then -1; lengths [B,Hk,T]; scores or None

importance[j] = sum over the group's heads h, m < step, n < reach of exp(scale * q_h . k_i - lse_h) with i = step * j + m - n, 0 <= i < key_end.
A tile of queries passes over transposed panels of keys as in the indexer (indexer_tile.py), the choice is the indexer's (indexer_topk.py). Sums run over heads, then over
compressed keys, in their order. Memory: a thread holds a row of C shares for each query of its tile; importances of at most SCRATCH bytes are held at a time.
"""
import math

import numba
import numpy as np

from sparsetile.backends.contract import Resources
from sparsetile.backends.numba.far import far, on_threads
from sparsetile.backends.numba.indexer_tile import HEADS, KEYS, VECTORS, job_at, load_keys, load_queries, make_indexer, seen_by
from sparsetile.backends.numba.indexer_topk import choose_given
from sparsetile.backends.numba.jit import kernel
from sparsetile.backends.numba.simd import F, LANES, address, get_f32, next_task, op, put_f32

TUNABLES = ()
SCRATCH = 32 << 20


def supports(problem):
    return None


def resources(problem, config):
    return Resources()


def default_config(problem):
    return {}


def _shares(e, q, q_step, lses, H, D, panel, factor, out):
    """KEYS sums over heads of 2 ** (factor * q.k - lse). q: rows of heads, q_step bytes apart, rows up to a multiple of HEADS readable."""
    b, factor, most = e.b, e.splat(factor), e.f(127)

    def group(h, sums):
        acc = e.gemm(HEADS, VECTORS, e.add(q, e.mul(h, q_step)), q_step, 4, panel, 4 * KEYS, D)
        for r in range(HEADS):
            less = e.splat(b.fneg(e.load(lses, e.mul(e.add(h, r), 4), F)))
            there = b.icmp_signed("<", e.add(h, r), H)
            # a share is at most 1 but for rounding; an lse of other keys must not leave exp2's range
            shares = [e.exp2(e.min(most, e.fma(acc[r * VECTORS + n], factor, less))) for n in range(VECTORS)]
            sums = [b.select(there, b.fadd(s, x), s) for s, x in zip(sums, shares)]
        return sums
    for n, x in enumerate(e.loop(H, [e.f(0)] * VECTORS, group, HEADS)):
        e.store(x, out, 4 * LANES * n)


sum_shares = op("iiiiiifi", _shares)


@kernel
def _pool(shares, end, blocks, reach, step, out):
    """Shares of compressed keys before `end` -> importances of blocks: each counts as often as its strides lie in the block."""
    for j in range(blocks):
        total, first, last = np.float32(0), step * j - reach + 1, step * j + step - 1
        for i in range(max(first, 0), min(last + 1, end)):
            total += np.float32(min(min(i - first, last - i) + 1, min(reach, step))) * get_f32(shares, i)
        put_f32(out, j, total)


@far("ii")
def work(jobs, thread):
    """One thread: tiles of queries, each with all compressed keys that it sees, until there are none left."""
    job = job_at(jobs)
    T, queries, tiles, memory = job.T, job.queries, (job.T + job.queries - 1) // job.queries, job.memory + job.memory_step * thread
    while True:
        task = next_task(job.counter)
        if task >= job.B * tiles:
            break
        b, t0 = task // tiles, task % tiles * queries
        count, last = min(queries, T - t0), 0
        for n in range(count):
            last = max(last, seen_by(job, b, t0 + n)[1])
        load_queries(jobs, b, t0, count, memory)
        for s in range(0, last, KEYS):
            load_keys(jobs, b, s, last, memory)
            for n in range(count):
                if seen_by(job, b, t0 + n)[1] > s:
                    sum_shares(memory + job.qf + 4 * job.padded * job.heads * n, 4 * job.padded, memory + job.wf + 4 * job.heads * n, job.H, job.D, memory + job.panel,
                               np.float32(job.factor), memory + job.scores + 4 * (job.row * n + s))
        for n in range(count):
            _pool(memory + job.scores + 4 * job.row * n, seen_by(job, b, t0 + n)[1], job.blocks, job.reach, job.step, job.out + 4 * job.blocks * (b * T + t0 + n))


def run(q, k, lse, top_k, *, place, config, key_end, block_end, blocks, reach, step, scale, force_first=0, force_last=0, return_scores=False):
    (B, Hq, T, D), (Hk, C) = q.shape, k.shape[1:3]
    indices, lengths = place.empty((B, Hk, T, top_k), "int32"), place.empty((B, Hk, T), "int32")
    chosen = place.empty((B, Hk, T, top_k), "float32") if return_scores else None
    q, lse, k = q.reshape(B * Hk, Hq // Hk, T, D), lse.reshape(B * Hk, Hq // Hk, T), k.reshape(B * Hk, C, D)
    key_end, block_end = key_end.reshape(B * Hk, T), block_end.reshape(B * Hk, T)
    answers = [None if x is None else x.reshape(B * Hk, *x.shape[2:]) for x in (indices, lengths, chosen)]
    rows = max(1, SCRATCH // (4 * blocks * B * Hk))
    for t in range(0, T, rows):
        part = slice(t, min(T, t + rows))
        ends, found = np.ascontiguousarray(key_end[:, part]), np.empty((B * Hk, part.stop - t, blocks), np.float32)
        if q.dtype == np.float64:
            _wide(q[:, :, part], k, lse[:, :, part], ends, found, reach, step, scale)
        else:
            _launch(q[:, :, part], k, lse[:, :, part], ends, found, reach, step, scale)
        whole = [None if x is None else np.empty((B * Hk, part.stop - t, *x.shape[2:]), x.dtype) for x in answers]
        choose_given(found, np.ascontiguousarray(block_end[:, part]), *whole, force_first=min(force_first, blocks), force_last=min(force_last, blocks))
        for x, got in zip(answers, whole):
            if x is not None:
                x[:, part] = got
    return indices, lengths, chosen


def _launch(q, k, lse, key_end, out, reach, step, scale):
    """Fill out [B*Hk, T, blocks]."""
    log2e = math.log2(math.e)
    job, _alive = make_indexer(q, k, np.ascontiguousarray(lse * np.float32(log2e)), k_scale=None, key_start=None, key_end=key_end, causal=False, q_start=0, activation=None,
                               row=-(-max(k.shape[1], 1) // KEYS) * KEYS)
    for name, x in dict(out=address(out), blocks=out.shape[2], reach=reach, step=step, factor=scale * log2e).items():
        job[name] = x
    on_threads(work, job)


def _wide(q, k, lse, key_end, out, reach, step, scale):
    """The same of float64 arguments, by NumPy, one query and group at a time."""
    C, blocks = k.shape[1], out.shape[2]
    first = step * np.arange(blocks)
    for b in range(q.shape[0]):
        for t in range(q.shape[2]):
            end = int(key_end[b, t])
            shares = np.zeros(C + 1)  # the last: what is not there
            shares[:end] = np.exp(scale * (q[b, :, t] @ k[b, :end].T) - lse[b, :, t, None]).sum(0)
            total = np.zeros(blocks)
            for m in range(step):
                for n in range(reach):
                    i = first + m - n
                    total += shares[np.where((i >= 0) & (i < C), i, C)]
            out[b, t] = total
