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
from numba import prange

from sparsetile.backends.contract import Resources
from sparsetile.backends.numba.convert import CODE
from sparsetile.backends.numba.indexer_tile import CHUNK, load_queries, scratch, score_chunk, seen_by, tile_of, wide_scores
from sparsetile.backends.numba.jit import kernel
from sparsetile.backends.numba.selector import FLOOR, cut, offer, push, push_forced, put_i32, put_i64, room_for, score_of, top_of
from sparsetile.backends.numba.simd import address, get_f32, get_i32, get_i64, next_task, put_f32

TUNABLES = ()
SHARE = 8 * CHUNK  # a share of keys is not smaller: merging would cost more than it brings
HELD, FIRST, LAST = 0, 1, 2    # int64 state of a row: candidates held, its first and last entry


def supports(problem):
    return None


def resources(problem, config):
    return Resources()


def default_config(problem):
    return {}


@kernel
def _compete(values, base, start, end, share_end, k, pool, force_first, force_last, state, floats, candidates, room, forced):
    """Scores of the keys start .. end of one row (values[0] is key `base`); floats: the floor, and the maximum of a block begun before."""
    held, floor = get_i64(state, HELD), get_f32(floats, 0)
    if pool == 1 and force_first + force_last == 0:
        held, floor = offer(values + 4 * (start - base), end - start, start, k, candidates, room, held, floor)
    else:
        first, last = get_i64(state, FIRST), get_i64(state, LAST)
        s, top = start, get_f32(floats, 1)
        while s < end:
            entry = s // pool
            stop = min(end, (entry + 1) * pool)
            top = get_f32(values, s - base) if pool == 1 else top_of(values + 4 * (s - base), stop - s, top)
            s = stop
            if stop == end and stop < share_end and stop < (entry + 1) * pool:
                break  # the block goes on in the next chunk
            place = -1
            if entry - first < force_first:
                place = entry - first
            elif last - entry < force_last:
                place = force_first + last - entry
            if place >= 0:
                push_forced(candidates, room, held, entry)
                if forced != 0:
                    put_f32(forced, place, top)
                held += 1
            elif top > floor:
                push(candidates, room, held, top, entry)
                held += 1
            if held > room - 64:
                floor = cut(candidates, room, held, k)
                held = k
            top = FLOOR
        put_f32(floats, 1, top)
    put_i64(state, HELD, held)
    put_f32(floats, 0, floor)


@kernel
def _write(row, candidates, room, held, top_k, first, last, force_first, forced, indices, lengths, scores):
    """One row of the answer: indices, then -1; their scores, then -inf."""
    for n in range(held):
        entry = get_i32(candidates, room + n)
        put_i32(indices, row * top_k + n, entry)
        if scores != 0:
            order = get_i32(candidates, n)
            score = score_of(order)
            if order == 0x7fffffff:
                score = get_f32(forced, entry - first if entry - first < force_first else force_first + last - entry)
            put_f32(scores, row * top_k + n, score)
    for n in range(held, top_k):
        put_i32(indices, row * top_k + n, -1)
        if scores != 0:
            put_f32(scores, row * top_k + n, FLOOR)
    put_i32(lengths, row, held)


@kernel
def _tiles(counter, given, queries, shares, share, state, floats, candidates, room, qf, wf, rows, panel, scale, scores, padded, qcode, q, q_step_b, q_step_h,
           q_step_t, kcode, k, k_step_b, k_step_s, weights, k_scale, key_start, key_end, causal, q_start, q_starts, low, B, H, T, S, D,
           top_k, keep, pool, force_first, force_last, forced, parts, indices, lengths, chosen):
    tiles = (T + queries - 1) // queries
    while True:
        task = next_task(counter)
        if task >= B * tiles * shares:
            break
        b, t0, s0 = task // (tiles * shares), task // shares % tiles * queries, task % shares * share
        count, s1 = min(queries, T - t0), min(S, s0 + share)
        starts, ends = state, state + 8 * queries
        low_key, high_key = s1, s0
        for n in range(count):
            start, end = seen_by(b, t0 + n, T, S, key_start, key_end, causal, q_start, q_starts)
            first, last = start // pool, (end - 1) // pool
            if end <= start:
                first, last = 0, -1
            if chosen == 0 and last - first < top_k:  # all of them, whatever their scores
                if s0 == 0:
                    row = b * T + t0 + n
                    for entry in range(first, last + 1):
                        put_i32(indices, row * top_k + entry - first, entry)
                    for entry in range(last + 1 - first, top_k):
                        put_i32(indices, row * top_k + entry, -1)
                    put_i32(lengths, row, last + 1 - first)
                first, last, start, end = 0, -2, 0, 0
            start, end = max(start, s0), min(end, s1)
            own = state + 16 * queries + 24 * n
            put_i64(own, HELD, 0)
            put_i64(own, FIRST, first)
            put_i64(own, LAST, last)
            put_i64(starts, n, start)
            put_i64(ends, n, max(start, end))
            put_f32(floats, 2 * n, FLOOR)
            put_f32(floats, 2 * n + 1, FLOOR)
            if end > start:
                low_key, high_key = min(low_key, start), max(high_key, end)
        if high_key > low_key and given == 0:
            load_queries(qcode, q + b * q_step_b, q_step_h, q_step_t, weights + 4 * b * H * T, T, t0, count, H, D, padded, qf, wf)
        for first_key in range(low_key, high_key, CHUNK):
            last_key = min(high_key, first_key + CHUNK)
            if given == 0:
                score_chunk(qf, wf, count, H, D, padded, kcode, k + b * k_step_b, k_step_s, k_scale + 4 * b * S if k_scale != 0 else 0, S,
                            first_key, last_key, starts, ends, rows, panel, scale, low, scores)
            for n in range(count):
                start, end = max(first_key, get_i64(starts, n)), min(last_key, get_i64(ends, n))
                if start < end:
                    values = scores + 4 * CHUNK * n if given == 0 else given + 4 * ((b * T + t0 + n) * S + first_key)
                    _compete(values, first_key, start, end, get_i64(ends, n), keep, pool, force_first, force_last, state + 16 * queries + 24 * n,
                             floats + 8 * n, candidates + 8 * room * n, room, forced + 4 * (b * T + t0 + n) * (force_first + force_last) if forced != 0 else 0)
        for n in range(count):
            own, row = state + 16 * queries + 24 * n, b * T + t0 + n
            held, last = get_i64(own, HELD), get_i64(own, LAST)
            mine = candidates + 8 * room * n
            if held > keep:
                cut(mine, room, held, keep)
                held = keep
            if shares > 1:
                part = parts + 4 * (row * shares + task % shares) * (2 * keep + 1)
                put_i32(part, 0, held if last != -2 else -1)
                for m in range(held):
                    put_i32(part, 1 + m, get_i32(mine, m))
                    put_i32(part, 1 + keep + m, get_i32(mine, room + m))
            elif last != -2:
                _write(row, mine, room, held, top_k, get_i64(own, FIRST), last, force_first,
                       forced + 4 * row * (force_first + force_last) if forced != 0 else 0, indices, lengths, chosen)


@kernel(parallel=True)
def _run(threads, counter, given, queries, shares, share, state, state_step, floats, floats_step, candidates, candidates_step, room, base, step,
         o0, o1, o2, o3, o4, o5, padded, qcode, q, q_step_b, q_step_h,
         q_step_t, kcode, k, k_step_b, k_step_s, weights, k_scale, key_start, key_end, causal, q_start, q_starts, low, B, H, T, S, D,
         top_k, keep, pool, force_first, force_last, forced, parts, indices, lengths, chosen):
    for thread in prange(threads):
        own = base + step * thread
        _tiles(counter, given, queries, shares, share, state + state_step * thread, floats + floats_step * thread, candidates + candidates_step * thread, room,
               own + o0, own + o1, own + o2, own + o3, own + o4, own + o5, padded, qcode, q, q_step_b, q_step_h,
               q_step_t, kcode, k, k_step_b, k_step_s, weights, k_scale, key_start, key_end, causal, q_start, q_starts, low, B, H, T, S, D,
               top_k, keep, pool, force_first, force_last, forced, parts, indices, lengths, chosen)


@kernel
def _merge(shares, parts, candidates, room, key_start, key_end, causal, q_start, q_starts, B, T, S, top_k, keep, pool, force_first, forced_count, forced,
           indices, lengths, chosen):
    """The winners of all shares compete once more."""
    for row in range(B * T):
        held, there = 0, True
        for share in range(shares):
            part = parts + 4 * (row * shares + share) * (2 * keep + 1)
            count = get_i32(part, 0)
            if count < 0:
                there = False
            for n in range(count):
                put_i32(candidates, held, get_i32(part, 1 + n))
                put_i32(candidates, room + held, get_i32(part, 1 + keep + n))
                held += 1
        if there:
            if held > keep:
                cut(candidates, room, held, keep)
                held = keep
            start, end = seen_by(row // T, row % T, T, S, key_start, key_end, causal, q_start, q_starts)
            _write(row, candidates, room, held, top_k, start // pool, (end - 1) // pool, force_first,
                   forced + 4 * row * forced_count if forced != 0 else 0, indices, lengths, chosen)


def run(q, k, weights, top_k, *, place, config, k_scale=None, key_start=None, key_end=None, causal=True, q_start=0, activation="relu",
        pool=1, force_first=0, force_last=0, return_scores=False):
    (B, H, T, D), S = q.shape, k.shape[1]
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
        _launch(q, k, weights, k_scale, key_start, key_end, q_start, None, indices, lengths, chosen, keep, **arguments)
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


def _launch(q, k, weights, k_scale, key_start, key_end, q_start, given, indices, lengths, chosen, keep, *, causal, activation, pool, force_first, force_last):
    """Fill the answer. given [B,T,S] float32: scores made before (float64 arguments), or None."""
    (B, H, T, D), S, top_k = q.shape, k.shape[1], indices.shape[2]
    force_first, force_last = min(force_first, keep), min(force_last, keep)
    forced = np.empty((B * T, force_first + force_last), np.float32) if chosen is not None and force_first + force_last else None
    queries, threads = tile_of(H, T), numba.get_num_threads()
    tasks = B * -(-T // queries)
    shares = 1 if tasks >= 4 * threads else max(1, min(4 * threads // tasks, S // SHARE))
    share = -(-(-(-S // shares)) // pool) * pool
    shares = -(-S // share)
    each = not isinstance(q_start, (int, np.integer))
    where = address(key_start), address(key_end), int(causal), 0 if each else int(q_start), address(q_start) if each else 0
    padded, memory, offsets = scratch(threads, queries, H, D)
    room = room_for(keep, -(-S // pool))
    state, floats, counter = np.empty((threads, 5, queries), np.int64), np.empty((threads, queries, 2), np.float32), np.zeros(1, np.int64)
    candidates = np.empty((threads, queries, 2, room), np.int32)
    parts = np.empty((B * T, shares, 2 * keep + 1), np.int32) if shares > 1 else None
    _run(threads, address(counter), address(given), queries, shares, share, address(state), state.strides[0], address(floats), floats.strides[0],
         address(candidates), candidates.strides[0], room, address(memory), memory.strides[0], *(4 * o for o in offsets), padded,
         CODE.get(q.dtype.name, 0), address(q), *q.strides[:3], CODE.get(k.dtype.name, 0), address(k), *k.strides[:2], address(weights), address(k_scale), *where,
         np.float32(0 if activation == "relu" else -np.inf), B, H, T, S, D, top_k, keep, pool, force_first, force_last, address(forced), address(parts),
         address(indices), address(lengths), address(chosen))
    if shares > 1:
        room = shares * keep + 32
        candidates = np.empty((2, room), np.int32)
        _merge(shares, address(parts), address(candidates), room, *where, B, T, S, top_k, keep, pool, force_first, force_first + force_last, address(forced),
               address(indices), address(lengths), address(chosen))
