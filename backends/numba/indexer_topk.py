"""The top_k keys of a lightning indexer, or blocks of `pool` keys: scores are made for a few keys at a time and compete at once; [T,S] is never held.

    q [B,H,T,D]  k [B,S,D]  weights [B,H,T]  ->  indices [B,T,top_k] int32 ascending, then -1; lengths [B,T]; scores [B,T,top_k] or None

Scores are those of indexer_scores, bit for bit (indexer_tile.py); the choice is that of topk (selector.py). A row with no more than top_k visible
entries is answered with all of them, without a score, unless scores are asked for. pool > 1: entries are blocks, a block's score is the maximum over its
visible keys, NaN passed over. The first `force_first` and last `force_last` blocks that hold visible keys are taken whatever their score and count in top_k.
Memory: two int32 for about 2 * top_k candidates of each query of a tile; where there are few queries, keys are dealt out in shares whose winners,
top_k per share and query, compete once more. The result does not depend on the shares: it is exact.
"""
import numba
import numpy as np

from sparsetile.backends.contract import Resources
from sparsetile.backends.numba.far import far, on_threads
from sparsetile.backends.numba.indexer_tile import CHUNK, job_at, make_indexer, page_of, score_chunk, seen_by, tile_of, wide_scores
from sparsetile.backends.numba.jit import kernel
from sparsetile.backends.numba.selector import FLOOR, FORCED, cut, offer, push, push_forced, put_i32, put_i64, room_for, score_of, top_of
from sparsetile.backends.numba.simd import address, get_f32, get_i32, get_i64, next_task, put_f32

TUNABLES = ()
SHARE = 8 * CHUNK  # a share of keys is not smaller: merging would cost more than it brings
STATE = 64           # bytes of a row's state: candidates held (int64), floor, maximum of a block begun before (float32), then int64:
HELD, FIRST, LAST, START, END = 0, 2, 3, 4, 5  # its first and last entry, its keys still to score
NOT_CHOSEN = -2      # as LAST: the row is answered without scores


def supports(problem):
    return None


def resources(problem, config):
    return Resources()


def default_config(problem):
    return {}


@far("iiiiiiii")
def compete(jobs, values, base, start, end, state, candidates, forced):
    """Scores of the keys start .. end of one row (values[0] is key `base`), one by one or as the maximum of their block."""
    job = job_at(jobs)
    held, floor, top = get_i64(state, HELD), get_f32(state, 2), get_f32(state, 3)
    first, last, pool, s = get_i64(state, FIRST), get_i64(state, LAST), job.pool, start
    while s < end:
        entry = s // pool
        stop = min(end, (entry + 1) * pool)
        top = get_f32(values, s - base) if pool == 1 else top_of(values + 4 * (s - base), stop - s, top)
        s = stop
        if stop == end and stop < get_i64(state, END) and stop < (entry + 1) * pool:
            break  # the block goes on in the next chunk
        place = -1
        if entry - first < job.force_first:
            place = entry - first
        elif last - entry < job.force_last:
            place = job.force_first + last - entry
        if place >= 0:
            push_forced(candidates, job.room, held, entry)
            if forced != 0:
                put_f32(forced, place, top)
            held += 1
        elif top > floor:
            push(candidates, job.room, held, top, entry)
            held += 1
        if held > job.room - 64:
            floor = cut(candidates, job.room, held, job.keep)
            held = job.keep
        top = FLOOR
    put_i64(state, HELD, held)
    put_f32(state, 2, floor)
    put_f32(state, 3, top)


@kernel
def _forced_of(job, row):
    """Where the scores of a row's forced entries are kept, 0 where nobody asks for them."""
    return job.forced + 4 * row * (job.force_first + job.force_last) if job.forced != 0 else 0


@far("iiiii")
def write(jobs, row, candidates, room, held):
    """One row of the answer: the best candidates, then -1; their scores, then -inf."""
    job = job_at(jobs)
    if held > job.keep:
        cut(candidates, room, held, job.keep)
        held = job.keep
    start, end = seen_by(job, row // job.T, row % job.T)
    forced, first, last = _forced_of(job, row), start // job.pool, (end - 1) // job.pool
    for n in range(held):
        entry, order = get_i32(candidates, room + n), get_i32(candidates, n)
        put_i32(job.indices, row * job.top_k + n, entry)
        if job.chosen != 0:
            place = entry - first if entry - first < job.force_first else job.force_first + last - entry
            put_f32(job.chosen, row * job.top_k + n, get_f32(forced, place) if order == FORCED else score_of(order))
    for n in range(held, job.top_k):
        put_i32(job.indices, row * job.top_k + n, -1)
        if job.chosen != 0:
            put_f32(job.chosen, row * job.top_k + n, FLOOR)
    put_i32(job.lengths, row, held)


@kernel
def _exists(job, b, start, end):
    """Whether any of the keys start .. end lies in a page."""
    for s in range(start, end):
        if page_of(job, b, s) >= 0:
            return True
    return False


@kernel
def _begin(job, b, t, s0, s1, state):
    """A row's state for the share s0 .. s1 of the keys; rows with no more than top_k entries are answered here."""
    start, end = seen_by(job, b, t)
    first, last = (start // job.pool, (end - 1) // job.pool) if end > start else (0, -1)
    if job.chosen == 0 and last - first < job.top_k:  # all of them, whatever their scores
        if s0 == 0:
            row = b * job.T + t
            held = 0
            for entry in range(first, last + 1):
                if job.table == 0 or _exists(job, b, max(start, entry * job.pool), min(end, (entry + 1) * job.pool)):
                    put_i32(job.indices, row * job.top_k + held, entry)
                    held += 1
            for n in range(held, job.top_k):
                put_i32(job.indices, row * job.top_k + n, -1)
            put_i32(job.lengths, row, held)
        last, end = NOT_CHOSEN, start
    start, end = max(start, s0), min(end, s1)
    put_i64(state, HELD, 0)
    put_f32(state, 2, FLOOR)
    put_f32(state, 3, FLOOR)
    put_i64(state, FIRST, first)
    put_i64(state, LAST, last)
    put_i64(state, END, max(start, end))
    return start, max(start, end)


@kernel
def _finish(job, jobs, row, share, state, candidates):
    """A row's candidates: to the answer, or to the parts that are merged later."""
    held, last = get_i64(state, HELD), get_i64(state, LAST)
    if job.shares == 1:
        if last != NOT_CHOSEN:
            write(jobs, row, candidates, job.room, held)
        return
    if held > job.keep:
        cut(candidates, job.room, held, job.keep)
        held = job.keep
    part = job.parts + 4 * (row * job.shares + share) * (2 * job.keep + 1)
    put_i32(part, 0, held if last != NOT_CHOSEN else -1)
    for n in range(held):
        put_i32(part, 1 + n, get_i32(candidates, n))
        put_i32(part, 1 + job.keep + n, get_i32(candidates, job.room + n))


@far("ii")
def work(jobs, thread):
    """One thread: tiles of queries times shares of keys until there are none left."""
    job = job_at(jobs)
    T, S, queries, shares = job.T, job.S, job.queries, job.shares
    tiles = (T + queries - 1) // queries
    memory, starts = job.memory + job.memory_step * thread, job.bounds + 16 * queries * thread
    ends, states, candidates = starts + 8 * queries, job.state + STATE * queries * thread, job.candidates + 8 * job.room * queries * thread
    simple = job.pool == 1 and job.force_first + job.force_last == 0
    while True:
        task = next_task(job.counter)
        if task >= job.B * tiles * shares:
            break
        b, t0, s0 = task // (tiles * shares), task // shares % tiles * queries, task % shares * job.share
        count, s1 = min(queries, T - t0), min(S, s0 + job.share)
        low, high = s1, s0
        for n in range(count):
            start, end = _begin(job, b, t0 + n, s0, s1, states + STATE * n)
            put_i64(starts, n, start)
            put_i64(ends, n, end)
            if end > start:
                low, high = min(low, start), max(high, end)
        for first in range(low, high, CHUNK):
            last = min(high, first + CHUNK)
            if job.given == 0:
                score_chunk(jobs, b, t0, count, first, last, starts, ends, memory, 1 if first == low else 0)
            for n in range(count):
                start, end, row = max(first, get_i64(starts, n)), min(last, get_i64(ends, n)), b * T + t0 + n
                if start < end:
                    values = memory + job.scores + 4 * CHUNK * n if job.given == 0 else job.given + 4 * (row * S + first)
                    mine, state = candidates + 8 * job.room * n, states + STATE * n
                    if simple:
                        offer(values + 4 * (start - first), end - start, start, job.keep, mine, job.room, state)
                    else:
                        compete(jobs, values, first, start, end, state, mine, _forced_of(job, row))
        for n in range(count):
            _finish(job, jobs, b * T + t0 + n, task % shares, states + STATE * n, candidates + 8 * job.room * n)


@far("ii")
def merge(jobs, thread):
    """The winners of all shares compete once more. One thread; candidates have room for all."""
    job = job_at(jobs)
    room = job.shares * job.keep + 32
    for row in range(job.B * job.T):
        held, there = 0, True
        for share in range(job.shares):
            part = job.parts + 4 * (row * job.shares + share) * (2 * job.keep + 1)
            count = get_i32(part, 0)
            there = there and count >= 0
            for n in range(count):
                put_i32(job.candidates, held, get_i32(part, 1 + n))
                put_i32(job.candidates, room + held, get_i32(part, 1 + job.keep + n))
                held += 1
        if there:
            write(jobs, row, job.candidates, room, held)


def run(q, k, weights, top_k, *, place, config, k_scale=None, key_start=None, key_end=None, causal=True, q_start=0, activation="relu",
        pool=1, force_first=0, force_last=0, return_scores=False, table=None):
    (B, H, T, D), S = q.shape, k.shape[1] * (1 if table is None else table.shape[1])
    entries = -(-S // pool)
    indices, lengths = place.empty((B, T, top_k), "int32"), place.empty((B, T), "int32")
    chosen = place.empty((B, T, top_k), "float32") if return_scores else None
    keep = min(top_k, entries)
    if B * T == 0 or keep == 0:
        indices.fill(-1)
        lengths.fill(0)
        if return_scores:
            chosen.fill(-np.inf)
        return indices, lengths, chosen
    force_first, force_last = min(force_first, keep), min(force_last, keep)
    forced = np.empty((B * T, force_first + force_last), np.float32) if return_scores and force_first + force_last else None
    arguments = dict(causal=causal, activation=activation, pool=pool, force_first=force_first, force_last=force_last)
    if q.dtype != np.float64 and k.dtype != np.float64:
        _launch(q, k, weights, k_scale, key_start, key_end, q_start, None, indices, lengths, chosen, keep, table=table, **arguments)
        return indices, lengths, chosen
    queries = tile_of(H, T)
    for b in range(B):
        start = int(q_start if np.ndim(q_start) == 0 else q_start[b])
        for t0 in range(0, T, queries):
            rows = slice(t0, min(T, t0 + queries))
            given = wide_scores(q[b], k[b], weights[b], None if k_scale is None else k_scale[b], activation, rows.start, rows.stop)
            _launch(q[b:b + 1, :, rows], k[b:b + 1], weights, k_scale, *(x if x is None else x[b:b + 1, rows] for x in (key_start, key_end)), start + t0, given,
                    *(x if x is None else x[b:b + 1, rows] for x in (indices, lengths, chosen)), keep, **arguments)
    return indices, lengths, chosen


def choose_given(scores, key_end, indices, lengths, chosen, *, force_first, force_last):
    """The choice alone, of scores made elsewhere: scores [B,T,S] float32, the row's first key_end [B,T] of them compete. Fills the answer, [B,T,top_k] and [B,T]."""
    B, T, S = scores.shape
    nothing = np.broadcast_to(np.float32(0), (B, 1, T, 1)), np.broadcast_to(np.float32(0), (B, S, 1))
    _launch(*nothing, None, None, None, key_end, 0, scores, indices, lengths, chosen, min(indices.shape[2], S), causal=False, activation=None, pool=1,
            force_first=force_first, force_last=force_last)


def _launch(q, k, weights, k_scale, key_start, key_end, q_start, given, indices, lengths, chosen, keep, *, causal, activation, pool, force_first, force_last, table=None):
    """Fill the answer. given [B,T,S] float32: scores made before (float64 arguments), or None."""
    (B, H, T, D), S, top_k, threads = q.shape, k.shape[1] * (1 if table is None else table.shape[1]), indices.shape[2], numba.get_num_threads()
    job, alive = make_indexer(q, k, weights, k_scale=k_scale, key_start=key_start, key_end=key_end, causal=causal, q_start=q_start, activation=activation, table=table)
    queries = int(job["queries"][0])
    force_first, force_last = min(force_first, keep), min(force_last, keep)
    tasks, room = B * -(-T // queries), room_for(keep, -(-S // pool))
    shares = 1 if tasks >= 4 * threads else max(1, min(4 * threads // tasks, S // SHARE))
    share = -(-(-(-S // shares)) // pool) * pool
    shares = -(-S // share)
    arrays = dict(given=given, indices=indices, lengths=lengths, chosen=chosen, state=np.empty((threads, queries, STATE // 8), np.int64),
                  candidates=np.empty((threads, queries, 2, room), np.int32),
                  forced=np.empty((B * T, force_first + force_last), np.float32) if chosen is not None and force_first + force_last else None,
                  parts=np.empty((B * T, shares, 2 * keep + 1), np.int32) if shares > 1 else None)
    values = dict(shares=shares, share=share, room=room, top_k=top_k, keep=keep, pool=pool, force_first=force_first, force_last=force_last)
    for name, x in values.items():
        job[name] = x
    for name, x in arrays.items():
        job[name] = address(x)
    on_threads(work, job)
    if shares > 1:
        all_parts = np.empty((2, shares * keep + 32), np.int32)
        job["candidates"] = address(all_parts)
        on_threads(merge, job, 1)
