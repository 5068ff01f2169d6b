"""Scores of a lightning indexer.

    q [B,H,T,D]  k [B,S,D]  weights [B,H,T]  k_scale [B,S]  key_start, key_end [B,T] int32  ->  scores [B,T,S] float32

score[t,s] = k_scale[s] * sum_h weights[h,t] * relu(q[h,t] . k[s]); -inf outside [key_start, key_end) and, if causal, past q_start + t.
A tile of queries passes over transposed panels of keys (indexer_tile.py); float16, bfloat16 and float8 become float32 exactly as they are read.
With table [B,pages] int32, k [N,page,D] and k_scale [N,page] are pages; keys in a page that is not one of 0 .. N - 1 score -inf.
"""
import numpy as np

from sparsetile.backends.contract import Resources
from sparsetile.backends.numba.far import far, on_threads
from sparsetile.backends.numba.indexer_tile import CHUNK, job_at, make_indexer, score_chunk, seen_by, tile_of, wide_scores
from sparsetile.backends.numba.jit import kernel
from sparsetile.backends.numba.selector import FLOOR, put_i64
from sparsetile.backends.numba.simd import get_f32, get_i64, next_task, put_f32, address

TUNABLES = ()
SHARE = 16 * CHUNK  # keys of one task, so that a single query, too, has work for all threads


def supports(problem):
    return None


def resources(problem, config):
    return Resources()


def default_config(problem):
    return {}


@kernel
def _write_scores(values, first, last, start, end, out):
    """Scores of the keys first .. last, -inf outside [start, end)."""
    for s in range(first, last):
        put_f32(out, s, get_f32(values, s - first) if start <= s and s < end else FLOOR)


@far("ii")
def work(jobs, thread):
    """One thread: tiles of queries times shares of keys until there are none left."""
    job = job_at(jobs)
    S, T, queries = job.S, job.T, job.queries
    tiles, shares = (T + queries - 1) // queries, (S + SHARE - 1) // SHARE
    memory, starts = job.memory + job.memory_step * thread, job.bounds + 16 * queries * thread
    ends = starts + 8 * queries
    while True:
        task = next_task(job.counter)
        if task >= job.B * tiles * shares:
            break
        b, t0, s0 = task // (tiles * shares), task // shares % tiles * queries, task % shares * SHARE
        count, s1 = min(queries, T - t0), min(S, s0 + SHARE)
        for n in range(count):
            start, end = seen_by(job, b, t0 + n)
            put_i64(starts, n, start)
            put_i64(ends, n, end)
        for first in range(s0, s1, CHUNK):
            last = min(s1, first + CHUNK)
            score_chunk(jobs, b, t0, count, first, last, starts, ends, memory, 1 if first == s0 else 0)
            for n in range(count):
                _write_scores(memory + job.scores + 4 * CHUNK * n, first, last, get_i64(starts, n), get_i64(ends, n), job.out + 4 * (b * T + t0 + n) * S)


def run(q, k, weights, *, place, config, k_scale=None, key_start=None, key_end=None, causal=True, q_start=0, activation="relu", table=None):
    (B, H, T, D), S = q.shape, k.shape[1] * (1 if table is None else table.shape[1])
    out = place.empty((B, T, S), "float32")
    if out.size == 0:
        return out
    if q.dtype == np.float64 or k.dtype == np.float64:
        return _run_wide(q, k, weights, k_scale, key_start, key_end, causal, q_start, activation, out)
    job, _alive = make_indexer(q, k, weights, k_scale=k_scale, key_start=key_start, key_end=key_end, causal=causal, q_start=q_start, activation=activation, table=table)
    job["out"] = address(out)
    on_threads(work, job)
    return out


def _run_wide(q, k, weights, k_scale, key_start, key_end, causal, q_start, activation, out):
    B, T, S = out.shape
    queries, s = tile_of(q.shape[1], T), np.arange(S)
    for b in range(B):
        for t0 in range(0, T, queries):
            t1 = min(T, t0 + queries)
            out[b, t0:t1] = wide_scores(q[b], k[b], weights[b], None if k_scale is None else k_scale[b], activation, t0, t1)
        if key_start is not None:
            out[b][s < key_start[b][:, None]] = -np.inf
        if key_end is not None:
            out[b][s >= key_end[b][:, None]] = -np.inf
        if causal:
            out[b][s > np.arange(T)[:, None] + int(q_start if np.ndim(q_start) == 0 else q_start[b])] = -np.inf
    return out
