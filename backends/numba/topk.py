"""The top_k largest of every row: a stream of scores against a rising floor, one thread per row.

    scores [B,T,S] float32 (rows may be strided)  key_start, key_end [B,T] int32  ->  indices [B,T,top_k] int32 ascending, then -1; lengths [B,T] int32

Larger scores first, equal scores by the smaller index; -0.0 equals 0.0; NaN and -inf are never chosen. Any top_k, also past S; rows may be empty.
No sort: see selector.py. What a row costs hardly depends on its distribution; the worst case (ascending scores) stays linear in S.
"""
import numba
import numpy as np

from sparsetile.backends.contract import Resources
from sparsetile.backends.numba.far import far, on_threads, record_at
from sparsetile.backends.numba.selector import FLOOR, cut, offer, put_i32, put_i64, room_for, window
from sparsetile.backends.numba.simd import address, get_i32, get_i64, next_task, put_f32

TUNABLES = ()
TOPK = np.dtype([(name, "i8") for name in (
    "counter", "candidates", "room", "state", "scores", "step_b", "step_t", "key_start", "key_end", "B", "T", "S", "k", "top_k", "indices", "lengths")])
job_at = record_at(TOPK)


def supports(problem):
    return None


def resources(problem, config):
    return Resources()


def default_config(problem):
    return {}


@far("ii")
def work(jobs, thread):
    """One thread: rows until there are none left."""
    job = job_at(jobs)
    candidates, state = job.candidates + 8 * job.room * thread, job.state + 64 * thread
    while True:
        row = next_task(job.counter)
        if row >= job.B * job.T:
            break
        start, end = window(row, job.key_start, job.key_end, job.S)
        values = job.scores + row // job.T * job.step_b + row % job.T * job.step_t
        put_i64(state, 0, 0)
        put_f32(state, 2, FLOOR)
        offer(values + 4 * start, end - start, start, job.k, candidates, job.room, state)
        held = get_i64(state, 0)
        if held > job.k:
            cut(candidates, job.room, held, job.k)
            held = job.k
        indices = job.indices + 4 * row * job.top_k
        for n in range(held):
            put_i32(indices, n, get_i32(candidates, job.room + n))
        for n in range(held, job.top_k):
            put_i32(indices, n, -1)
        put_i32(job.lengths, row, held)


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
    candidates, state, counter = np.empty((threads, 2, room), np.int32), np.empty((threads, 8), np.int64), np.zeros(1, np.int64)
    job = np.array([(address(counter), address(candidates), room, address(state), address(scores), scores.strides[0], scores.strides[1],
                     address(key_start), address(key_end), B, T, S, k, top_k, address(indices), address(lengths))], TOPK)
    on_threads(work, job, threads)
    return indices, lengths
