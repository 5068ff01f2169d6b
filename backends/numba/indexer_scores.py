"""Scores of a lightning indexer.

    q [B,H,T,D]  k [B,S,D]  weights [B,H,T]  k_scale [B,S]  key_start, key_end [B,T] int32  ->  scores [B,T,S] float32

score[t,s] = k_scale[s] * sum_h weights[h,t] * relu(q[h,t] . k[s]); -inf outside [key_start, key_end) and, if causal, past q_start + t.
A tile of queries passes over transposed panels of keys (indexer_tile.py); float16, bfloat16 and float8 become float32 exactly as they are read.
"""
import numba
import numpy as np
from numba import prange

from sparsetile.backends.contract import Resources
from sparsetile.backends.numba.convert import CODE
from sparsetile.backends.numba.indexer_tile import CHUNK, load_queries, scratch, score_chunk, seen_by, tile_of, wide_scores
from sparsetile.backends.numba.jit import kernel
from sparsetile.backends.numba.simd import address, get_f32, get_i64, next_task, put_f32
from sparsetile.backends.numba.selector import FLOOR, put_i64

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


@kernel
def _tiles(counter, queries, bounds, qf, wf, rows, panel, scale, scores, padded, qcode, q, q_step_b, q_step_h, q_step_t, kcode, k, k_step_b, k_step_s,
           weights, k_scale, key_start, key_end, causal, q_start, q_starts, low, B, H, T, S, D, out):
    tiles, shares = (T + queries - 1) // queries, (S + SHARE - 1) // SHARE
    starts, ends = bounds, bounds + 8 * queries
    while True:
        task = next_task(counter)
        if task >= B * tiles * shares:
            break
        b, t0, s0 = task // (tiles * shares), task // shares % tiles * queries, task % shares * SHARE
        count, s1 = min(queries, T - t0), min(S, s0 + SHARE)
        some = False
        for n in range(count):
            start, end = seen_by(b, t0 + n, T, S, key_start, key_end, causal, q_start, q_starts)
            put_i64(starts, n, start)
            put_i64(ends, n, end)
            some |= start < s1 and end > max(start, s0)
        if some:
            load_queries(qcode, q + b * q_step_b, q_step_h, q_step_t, weights + 4 * b * H * T, T, t0, count, H, D, padded, qf, wf)
        for first in range(s0, s1, CHUNK):
            last = min(s1, first + CHUNK)
            score_chunk(qf, wf, count, H, D, padded, kcode, k + b * k_step_b, k_step_s, k_scale + 4 * b * S if k_scale != 0 else 0, S,
                        first, last, starts, ends, rows, panel, scale, low, scores)
            for n in range(count):
                _write_scores(scores + 4 * CHUNK * n, first, last, get_i64(starts, n), get_i64(ends, n), out + 4 * (b * T + t0 + n) * S)


@kernel(parallel=True)
def _run(threads, counter, queries, bounds, base, step, o0, o1, o2, o3, o4, o5, padded, qcode, q, q_step_b, q_step_h, q_step_t, kcode, k, k_step_b, k_step_s,
         weights, k_scale, key_start, key_end, causal, q_start, q_starts, low, B, H, T, S, D, out):
    for thread in prange(threads):
        own = base + step * thread
        _tiles(counter, queries, bounds + 16 * queries * thread, own + o0, own + o1, own + o2, own + o3, own + o4, own + o5, padded, qcode,
               q, q_step_b, q_step_h, q_step_t, kcode, k, k_step_b, k_step_s, weights, k_scale, key_start, key_end, causal, q_start, q_starts, low,
               B, H, T, S, D, out)


def run(q, k, weights, *, place, config, k_scale=None, key_start=None, key_end=None, causal=True, q_start=0, activation="relu"):
    (B, H, T, D), S = q.shape, k.shape[1]
    out = place.empty((B, T, S), "float32")
    if out.size == 0:
        return out
    each = not isinstance(q_start, (int, np.integer))
    if q.dtype == np.float64 or k.dtype == np.float64:
        return _run_wide(q, k, weights, k_scale, key_start, key_end, causal, q_start, activation, out)
    queries, threads = tile_of(H, T), numba.get_num_threads()
    padded, memory, offsets = scratch(threads, queries, H, D)
    bounds, counter = np.empty((threads, 2, queries), np.int64), np.zeros(1, np.int64)
    _run(threads, address(counter), queries, address(bounds), address(memory), memory.strides[0], *(4 * o for o in offsets), padded,
         CODE[q.dtype.name], address(q), *q.strides[:3], CODE[k.dtype.name], address(k), *k.strides[:2], address(weights), address(k_scale),
         address(key_start), address(key_end), int(causal), 0 if each else int(q_start), address(q_start) if each else 0,
         np.float32(0 if activation == "relu" else -np.inf), B, H, T, S, D, address(out))
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
