"""The top_k largest of every row: a stream of scores against a rising floor, one thread per row.

    scores [B,T,S] float32 (rows may be strided)  key_start, key_end [B,T] int32  ->  indices [B,T,top_k] int32 ascending, then -1; lengths [B,T] int32

Larger scores first, equal scores by the smaller index; -0.0 equals 0.0; NaN and -inf are never chosen. Any top_k, also past S; rows may be empty.
No sort: see selector.py. What a row costs hardly depends on its distribution; the worst case (ascending scores) stays linear in S.
"""
import numba
import numpy as np
from numba import prange

from sparsetile.backends.contract import Resources
from sparsetile.backends.numba.jit import kernel
from sparsetile.backends.numba.selector import FLOOR, cut, offer, put_i32, room_for, window
from sparsetile.backends.numba.simd import address, get_i32, next_task

TUNABLES = ()


def supports(problem):
    return None


def resources(problem, config):
    return Resources()


def default_config(problem):
    return {}


@kernel
def write_row(candidates, room, held, top_k, indices):
    """Indices of the candidates, then -1."""
    for n in range(held):
        put_i32(indices, n, get_i32(candidates, room + n))
    for n in range(held, top_k):
        put_i32(indices, n, -1)


@kernel
def _rows(counter, candidates, room, scores, step_b, step_t, key_start, key_end, B, T, S, k, top_k, indices, lengths):
    while True:
        row = next_task(counter)
        if row >= B * T:
            break
        start, end = window(row, key_start, key_end, S)
        values = scores + row // T * step_b + row % T * step_t
        held, floor = offer(values + 4 * start, end - start, start, k, candidates, room, 0, FLOOR)
        if held > k:
            cut(candidates, room, held, k)
            held = k
        write_row(candidates, room, held, top_k, indices + 4 * row * top_k)
        put_i32(lengths, row, held)


@kernel(parallel=True)
def _run(threads, counter, candidates, room, scores, step_b, step_t, key_start, key_end, B, T, S, k, top_k, indices, lengths):
    for thread in prange(threads):
        _rows(counter, candidates + 8 * room * thread, room, scores, step_b, step_t, key_start, key_end, B, T, S, k, top_k, indices, lengths)


def run(scores, top_k, *, place, config, key_start=None, key_end=None):
    B, T, S = scores.shape
    indices, lengths = place.empty((B, T, top_k), "int32"), place.empty((B, T), "int32")
    k = min(top_k, S)
    if B * T == 0 or k == 0:
        indices.fill(-1)
        lengths.fill(0)
        return indices, lengths
    threads = min(numba.get_num_threads(), B * T)
    room = room_for(k, S)
    candidates, counter = np.empty((threads, 2, room), np.int32), np.zeros(1, np.int64)
    _run(threads, address(counter), address(candidates), room, address(scores), scores.strides[0], scores.strides[1], address(key_start), address(key_end),
         B, T, S, k, top_k, address(indices), address(lengths))
    return indices, lengths
