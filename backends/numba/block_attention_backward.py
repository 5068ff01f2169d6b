"""Gradients of attention over the blocks of a layout on the CPU.

    q [B,Hq,T,D]  k [B,Hk,S,D]  v [B,Hk,S,Dv]  lse, delta [B,Hq,T]  dout [B,Hq,T,Dv]  ->  dq, dk, dv shaped like q, k, v

lse is the total logsumexp (sink included), delta that of `attention_delta`; with out [B,Hq,T,Dv] in its place (MAKES_DELTA) it is made where the rows of dout are read anyway,
for a call whose sink and lse have no gradient. Rows whose lse is not finite have no gradient.
P = exp(s - lse), dS = P (dout v^T - delta) ds/dx; dv = P^T dout, dq = scale dS k, dk = scale dS^T q; dk and dv are summed over the group.

One pass over the forward's own lists: P and dS of a tile stay in the cache and serve all three gradients. A task is a share of the query blocks of
one batch and key head, and adds its dK and dV up in float32 memory of its own; shares are then summed in order. How many shares there are, and where
they are cut, follows from the problem alone: results do not depend on the number of threads, and two calls agree bit for bit.
float64 inputs are done one query at a time (exact_backward.py).
"""
import math
import weakref

import numba
import numpy as np

from sparsetile.backends.contract import Resources
from sparsetile.backends.numba import block_attention, tiles
from sparsetile.backends.numba.attention_delta import dot
from sparsetile.backends.numba import gradient_tiles as gt
from sparsetile.backends.numba.ahead import ROOM as ASKS, ask_for
from sparsetile.backends.numba.block_attention import sizes, supports  # noqa: F401
from sparsetile.backends.numba.convert import F32_CODE, fill_zero, size_of
from sparsetile.backends.numba.exact_backward import exact_backward
from sparsetile.backends.numba.far import far, keep, on_threads, scratch, set_fields, take
from sparsetile.backends.numba.gradient_tiles import add_row
from sparsetile.backends.numba.jit import kernel
from sparsetile.backends.numba.job import START_FROM_ARGUMENT, job_at, key_limit, key_of, list_block, list_ends, make_job, tile_block, tile_rows
from sparsetile.backends.numba.panels import CHUNK, WORDS, chunk_words, load_keys, load_panel, number_rows, run_of, span_of, store_panel, up, whole
from sparsetile.backends.numba.rows import load_row, store_rows
from sparsetile.backends.numba.simd import VECTORS, address, get_byte, get_f32, get_i32, get_i64, next_task, put_byte, put_f32, put_i64
from sparsetile.backends.numba.tiles import PANEL, STEP, WIDTH, run_of_lanes, split

TUNABLES = tuple(knob for knob in block_attention.TUNABLES if knob.name in ("block_q", "block_k"))
MAKES_DELTA = True
TASKS = 16  # at least so many, if the query blocks suffice
SPARE = 1 << 25  # bytes of dK and dV in float32: so many key heads at a time as fit, at least one
ROOM = 1 << 29  # the same for all shares; of a window each share touches its own part alone, and most of that in the result
APART = 64  # bytes between rows of Q and dO: a step of 512 would let a column of them fall into few sets of the nearest cache
GRAIN = 32  # keys whose sums are cleared together, when first touched


def resources(problem, config):
    return Resources(threads=1)


def default_config(problem):
    config = block_attention.default_config(problem)
    return {knob.name: config[knob.name] for knob in TUNABLES}


@kernel
def _gradients(job, asks, pk, k_step, pv, v_step, qt, g, dqt, P, dS, lse, words, masked, first, keys, cols):
    """P, dS and dQ of one panel against a run of keys, for the vectors of its lanes that see any of them."""
    D, Dv, pc, step = job.D, job.Dv, job.constants, STEP * job.panels
    sixes, fours = split((keys + 3) & ~3)
    sixes_d, fours_d = split((D + 3) & ~3)
    if job.capped != 0:
        gt.probability_capped(asks, pk, k_step, qt, D, P, step, lse, pc, sixes, fours, words, first, dS)
        gt.score_gradient_capped(asks, pv, v_step, g, Dv, P, dS, step, lse + 2 * STEP, pc, sixes, fours)
    else:
        if masked != 0:
            gt.probability_masked(cols, asks, pk, k_step, qt, D, P, step, lse, pc, sixes, fours, words, first)
        else:
            gt.probability(asks, pk, k_step, qt, D, P, step, lse, pc, sixes, fours)
        gt.score_gradient(cols, asks, pv, v_step, g, Dv, P, dS, step, lse + 2 * STEP, pc, sixes, fours)
    gt.add_queries(cols, asks, pk, k_step, dS, step, keys, dqt, sixes_d, fours_d)


@far("iiiiii")
def _products(jobs, memory, masked, low, high, where):
    """P, dS and dQ of all panels against keys low .. high - 1 of a chunk. where: addresses and row steps of K and V."""
    job = job_at(jobs)
    pk, k_step, pv, v_step = get_i64(where, 0), get_i64(where, 1), get_i64(where, 2), get_i64(where, 3)
    step, spans, padded = STEP * job.panels, memory + job.spans, (high - low + 3) & ~3
    for p in range(job.panels):
        P, dS, words = memory + job.p + STEP * p, memory + job.ds + STEP * p, memory + job.words + STEP * WORDS * p
        if get_i64(memory + job.rows, job.panels * PANEL + p) == 0 or span_of(spans + 16 * WORDS * p)[1] == 0:
            for r in range(padded):
                fill_zero(P + r * step, PANEL)
                fill_zero(dS + r * step, PANEL)
            continue
        if job.capped != 0 and masked == 0:
            tiles.every_word(words, WORDS)
        parted, first = masked != 0 and job.capped == 0, low
        while first < high:
            end, at_lanes, cols = run_of_lanes(words, first, high) if parted else (high, 0, VECTORS)
            own, keys, to = WIDTH * at_lanes, end - first, step * (first - low)
            if cols < VECTORS:
                tiles.clear_rows(P + to, step, (keys + 3) & ~3)
                tiles.clear_rows(dS + to, step, (keys + 3) & ~3)
            if cols > 0:
                _gradients(job, memory + job.asks, pk + first * k_step, k_step, pv + first * v_step, v_step, memory + job.qt + STEP * job.Dp * p + own, memory + job.gt + STEP * job.width * p + own,
                           memory + job.dqt + STEP * job.Dp * p + own, P + to + own, dS + to + own, memory + job.rows_lse + 3 * STEP * p + own, words + own, masked, first, keys, cols)
            first = end
    for r in range(high - low, padded):  # what register tiles read past the keys
        fill_zero(memory + job.p + r * step, job.panels * PANEL)
        fill_zero(memory + job.ds + r * step, job.panels * PANEL)


@far("iiiiii")
def _sums(jobs, memory, at, count, bounds, where):
    """dV += P^T dO and dK += dS^T Q for the keys at slots at .. at + count - 1. where: this task's sums of K and V, its bytes of what is touched, where rows of Q and dO are, and its share with where the gradients will stand."""
    job = job_at(jobs)
    sums_k, sums_v, touched, limit = get_i64(where, 4), get_i64(where, 5), get_i64(where, 6), get_i64(where, 7)
    step, padded = STEP * job.panels, (count + 3) & ~3
    sixes, fours = split(padded)
    if job.owners != 0 and get_i64(job.owners, at // job.block_k) == get_i64(where, 14):
        sums_k, sums_v = get_i64(where, 15), get_i64(where, 16)
    to_k, to_v = sums_k + 4 * job.Dp * at, sums_v + 4 * job.width * at
    # Register tiles may reach three rows past the keys: past the sums, or to keys that another share adds up.
    apart = job.k_order != 0 or at + padded > job.S or (at + padded - 1) // job.block_k != (at + count - 1) // job.block_k
    if not apart:
        for grain in range(at // GRAIN, (at + padded - 1) // GRAIN + 1):
            _clear(job, sums_k, sums_v, touched, grain)
    else:
        to_k, to_v = memory + job.more, memory + job.more + 4 * job.Dp * (CHUNK + 4)
        fill_zero(to_k, (job.Dp + job.width) * (CHUNK + 4))
    gt.add_keys(memory + job.p, step, bounds, get_i64(where, 12), get_i64(where, 13), job.width, to_v, sixes, fours)
    gt.add_keys(memory + job.ds, step, bounds, get_i64(where, 10), get_i64(where, 11), job.Dp, to_k, sixes, fours)
    if apart:
        for c in range(count):
            s = key_of(job, at + c, limit, 0)
            if s >= 0:
                _clear(job, sums_k, sums_v, touched, s // GRAIN)
                add_row(to_k + 4 * job.Dp * c, sums_k + 4 * job.Dp * s, job.Dp)
                add_row(to_v + 4 * job.width * c, sums_v + 4 * job.width * s, job.width)


@kernel
def _clear(job, sums_k, sums_v, touched, grain):
    if get_byte(touched, grain) == 0:
        put_byte(touched, grain, 1)
        rows = min(GRAIN, job.S - GRAIN * grain)
        fill_zero(sums_k + 4 * job.Dp * GRAIN * grain, job.Dp * rows)
        fill_zero(sums_v + 4 * job.width * GRAIN * grain, job.width * rows)


@far("iiiiii")
def _block(jobs, memory, kind, slot, limit, where):
    job = job_at(jobs)
    panels, rows, spans, base_k, base_v = job.panels, memory + job.rows, memory + job.spans, get_i64(where, 8), get_i64(where, 9)
    total = spans + 16 * WORDS * panels
    for first in range(0, job.block_k, CHUNK):
        at, count = slot + first, min(CHUNK, job.block_k - first)
        if job.k_order == 0 and at >= limit:
            break
        masked = 1 if kind >= 0 or job.k_order != 0 or at + count > limit else 0
        if masked != 0:
            chunk_words(jobs, kind, at, first, count, limit, rows, panels, memory + job.words, spans, 0)
        else:
            whole(spans, panels, count)
        low, high, dense = span_of(total)
        if high == 0:
            continue
        inside = masked == 0 or dense and at + high + 3 <= job.S  # register tiles may read three rows more
        pk, k_step, pv, v_step = base_k + at * job.k_t, job.k_t, base_v + at * job.v_t, job.v_t
        if not (job.direct_k != 0 and inside):
            pk, k_step = memory + job.keys, 4 * job.Dp
            load_keys(jobs, base_k, job.k_t, job.k_code, job.D, job.Dp, at, high, limit, total, pk, at, 0)
        if not (job.direct_v != 0 and inside):
            pv, v_step = memory + job.values, 4 * job.width
            load_keys(jobs, base_v, job.v_t, job.v_code, job.Dv, job.width, at, high, limit, total, pv, at, 0)
        put_i64(where, 0, pk)
        put_i64(where, 1, k_step)
        put_i64(where, 2, pv)
        put_i64(where, 3, v_step)
        _products(jobs, memory, masked, low, high, where)
        bounds = memory + job.bounds
        if masked != 0:
            bounds += 8 * (CHUNK + 4)
            gt.reach(memory + job.words, STEP * WORDS, panels, low, (high - low + 3) & ~3, bounds)
        _sums(jobs, memory, at + low, high - low, bounds, where)


@kernel
def _no_gradient(job, memory, b, h, t):
    """dQ of a row that has none. The tile's dQ^T is still 0."""
    store_rows(job.dq_code, memory + job.dqt, 0, 1, job.D, job.dq + b * job.dq_b + h * job.dq_h + t * job.dq_t, 0)


@kernel
def _in_place(job, rows, code, width, padded):
    """Whether the rows of a tile can be read where they are: float32 that follow each other, as they are multiplied. A step of 512 bytes would let a column of them fall into few sets of the nearest cache."""
    first = get_i64(rows, 0)
    for p in range(job.panels):
        if get_i64(rows, PANEL * p) != first + PANEL * p or run_of(rows + 8 * PANEL * p, 0, job.T) != PANEL:
            return False
    return code == F32_CODE and width == padded and 4 * width < 512 and first >= 0


@far("iiiii")
def _load_rows(jobs, memory, b, h, where):
    """Q and dO of a tile as rows and transposed, and of each row the lse (two float32, in powers of two) and delta. Rows without gradient become 0, theirs is stored at once (dqt is 0)."""
    job = job_at(jobs)
    unit = job.unit / np.float64(get_f32(job.constants, 0))  # ln 2 but for the rounding of c
    for p in range(job.panels):
        rows, lse = memory + job.rows + 8 * PANEL * p, memory + job.rows_lse + 3 * STEP * p
        for n in range(PANEL):
            t = get_i64(rows, n)
            high, low, delta = np.float32(math.inf), np.float32(0), np.float32(0)
            if t >= 0:
                at = (b * job.Hq + h) * job.T + t
                x = np.float64(get_f32(job.lse, at))
                if math.isfinite(x):
                    x = min(max(x / unit, -3e38), 3e38)
                    high = np.float32(x)
                    low = np.float32(x - high)
                    if job.out == 0:
                        delta = get_f32(job.delta, at)
                else:
                    put_i64(rows, n, -1)
                    _no_gradient(job, memory, b, h, t)
            put_f32(lse, n, high)
            put_f32(lse, PANEL + n, low)
            put_f32(lse, 2 * PANEL + n, delta)
    q, dout = job.q + b * job.q_b + h * job.q_h, job.dout + b * job.dout_b + h * job.dout_h
    first = get_i64(memory + job.rows, 0)
    q_there = job.sign == 1 and _in_place(job, memory + job.rows, job.q_code, job.D, job.Dp)
    g_there = _in_place(job, memory + job.rows, job.dout_code, job.Dv, job.width)
    put_i64(where, 10, q + first * job.q_t if q_there else memory + job.q_rows)
    put_i64(where, 11, job.q_t if q_there else 4 * job.Dp + APART)
    put_i64(where, 12, dout + first * job.dout_t if g_there else memory + job.g_rows)
    put_i64(where, 13, job.dout_t if g_there else 4 * job.width + APART)
    for p in range(job.panels):
        rows = memory + job.rows + 8 * PANEL * p
        load_panel(q, 0, job.q_t, job.T, job.q_code, job.D, job.Dp, rows, job.sign, memory + job.q_rows + PANEL * (4 * job.Dp + APART) * p, 4 * job.Dp + APART,
                   memory + job.qt + STEP * job.Dp * p, 0 if q_there else 1)
        load_panel(dout, 0, job.dout_t, job.T, job.dout_code, job.Dv, job.width, rows, 1.0, memory + job.g_rows + PANEL * (4 * job.width + APART) * p, 4 * job.width + APART,
                   memory + job.gt + STEP * job.width * p, 0 if g_there else 1)
    if job.out != 0:
        _deltas(job, memory, job.out + b * job.out_b + h * job.out_h, where)
    number_rows(memory + job.rows, job.panels, job.T, 1, 0)


@kernel
def _deltas(job, memory, out, where):
    """Of each row of a tile dO times the output, as `attention_delta` makes it."""
    in_place = job.out_code == F32_CODE and job.Dv == job.width
    for n in range(job.panels * PANEL):
        t, row = get_i64(memory + job.rows, n), memory + job.flat
        if t >= 0:
            if in_place:
                row = out + t * job.out_t
            else:
                load_row(job.out_code, out + t * job.out_t, job.Dv, row, job.width)
            put_f32(memory + job.rows_lse + 3 * STEP * (n // PANEL), 2 * PANEL + n % PANEL, dot(row, get_i64(where, 12) + n * get_i64(where, 13), job.width))


@far("iiii")
def _store_queries(jobs, memory, b, h):
    job = job_at(jobs)
    for p in range(job.panels):
        dqt = memory + job.dqt + STEP * job.Dp * p
        if job.sign != 1:
            tiles.times(dqt, job.Dp * PANEL, np.float32(job.sign))
        store_panel(dqt, job.Dp, memory + job.flat, memory + job.rows + 8 * PANEL * p, job.dq + b * job.dq_b + h * job.dq_h, 0, job.dq_t, job.T, job.dq_code, job.D)


@kernel
def _ask_ahead(job, memory, where, b, h, i, more):
    """Ask for this tile's rows of dQ and, if the share has a tile after block i (more), for its rows of Q and dO, the key block
    that this tile has not seen, and where its sums will stand."""
    asks, row, count = memory + job.asks, get_i64(memory + job.rows, 0), job.block_q
    n = ask_for(asks, 0, 0, 0, 0, 0)
    if job.q_order != 0 or row < 0:
        return
    n = ask_for(asks, n, job.dq + b * job.dq_b + h * job.dq_h + row * job.dq_t, job.dq_t, job.D * size_of(job.dq_code), min(count, job.T - row))
    row, i = row + count, i + 1
    if not more or i >= job.nq or row >= job.T:
        return
    rows = min(count, job.T - row)
    n = ask_for(asks, n, job.q + b * job.q_b + h * job.q_h + row * job.q_t, job.q_t, job.D * size_of(job.q_code), rows)
    n = ask_for(asks, n, job.dout + b * job.dout_b + h * job.dout_h + row * job.dout_t, job.dout_t, job.Dv * size_of(job.dout_code), rows)
    if job.out != 0:
        n = ask_for(asks, n, job.out + b * job.out_b + h * job.out_h + row * job.out_t, job.out_t, job.Dv * size_of(job.out_code), rows)
    last = list_ends(job, b, h, i)[1]
    at, rows = last * job.block_k, min(job.block_k, job.S - last * job.block_k)
    if job.k_order != 0 or last <= list_ends(job, b, h, i - 1)[1]:
        return
    own = 15 if job.owners != 0 and get_i64(job.owners, last) == get_i64(where, 14) else 4
    n = ask_for(asks, n, get_i64(where, 8) + at * job.k_t, job.k_t, job.D * size_of(job.k_code), rows)
    n = ask_for(asks, n, get_i64(where, 9) + at * job.v_t, job.v_t, job.Dv * size_of(job.v_code), rows)
    n = ask_for(asks, n, get_i64(where, own) + at * 4 * job.Dp, 4 * job.Dp, 4 * job.Dp, rows)
    n = ask_for(asks, n, get_i64(where, own + 1) + at * 4 * job.width, 4 * job.width, 4 * job.width, rows)


@far("ii")
def work(jobs, thread):
    job = job_at(jobs)
    memory, group = job.memory + job.memory_step * thread, job.Hq // job.Hk
    where = memory + job.spans + 16 * WORDS * (job.panels + 1)
    for c in range(CHUNK + 4):  # of chunks that all queries see
        put_i64(memory + job.bounds, c, job.panels * PANEL << 32)
    while True:
        task = next_task(job.counter)
        if task >= job.heads * job.shares:
            break
        share, head = task % job.shares, job.head + task // job.shares
        b, j = head // job.Hk, head % job.Hk
        limit = key_limit(job, b)
        put_i64(where, 4, job.sums_k + 4 * job.Dp * job.sum_rows * task)
        put_i64(where, 5, job.sums_v + 4 * job.width * job.sum_rows * task)
        put_i64(where, 6, job.touched + job.touched_step * task)
        put_i64(where, 7, limit)
        put_i64(where, 8, job.k + b * job.k_b + j * job.k_h)
        put_i64(where, 9, job.v + b * job.v_b + j * job.v_h)
        put_i64(where, 14, share)
        put_i64(where, 15, job.dk + b * job.dk_b + j * job.dk_h)
        put_i64(where, 16, job.dv + b * job.dv_b + j * job.dv_h)
        for h in range(j * group, (j + 1) * group):
            for tile in range(get_i64(job.cuts, share), get_i64(job.cuts, share + 1)):
                if tile_rows(jobs, b, tile, memory + job.rows, job.panels * PANEL) == 0:
                    continue
                i = tile_block(job, b, tile)
                fill_zero(memory + job.dqt, job.panels * job.Dp * PANEL)
                if i >= 0:
                    _load_rows(jobs, memory, b, h, where)
                    begin, partial, end = list_block(job, b, h, i)
                    _ask_ahead(job, memory, where, b, h, i, tile + 1 < get_i64(job.cuts, share + 1))
                    for entry in range(begin, end):
                        _block(jobs, memory, get_i32(job.kinds, entry) if entry >= partial else -1, get_i32(job.cols, entry) * job.block_k, limit, where)
                _store_queries(jobs, memory, b, h)


@kernel
def _finish_rows(job, head, grain, sums, padded, code, width, target, step):
    """GRAIN rows: the shares that touched them are added to the first that did, in order."""
    first, count, there = -1, min(GRAIN, job.S - GRAIN * grain), target + GRAIN * grain * step
    owner = get_i64(job.owners, GRAIN * grain // job.block_k) if job.owners != 0 else -1
    for share in range(job.shares):
        if get_byte(job.touched + job.touched_step * (head * job.shares + share), grain) != 0:
            own = there if share == owner else sums + 4 * padded * (job.sum_rows * (head * job.shares + share) + GRAIN * grain)
            if first < 0:
                first = own
            else:
                add_row(own, first, padded * count)
    if first < 0:
        first = there if owner >= 0 else sums + 4 * padded * (job.sum_rows * head * job.shares + GRAIN * grain)
        fill_zero(first, padded * count)
    if first != there:
        store_rows(code, first, 4 * padded, count, width, there, step)


@far("ii")
def finish(jobs, thread):
    """One thread: sums of shares, in their order, for GRAIN keys at a time; what nobody touched is 0."""
    job = job_at(jobs)
    grains = (job.S + GRAIN - 1) // GRAIN
    while True:
        task = next_task(job.counter)
        if task >= job.heads * grains:
            break
        head, grain = task // grains, task % grains
        b, j = (job.head + head) // job.Hk, (job.head + head) % job.Hk
        _finish_rows(job, head, grain, job.sums_k, job.Dp, job.dk_code, job.D, job.dk + b * job.dk_b + j * job.dk_h, job.dk_t)
        _finish_rows(job, head, grain, job.sums_v, job.width, job.dv_code, job.Dv, job.dv + b * job.dv_b + j * job.dv_h, job.dv_t)


_PLANS = weakref.WeakKeyDictionary()


def _plan(lists, *how):
    """Cuts and owners of a layout's lists, as the last call had them."""
    found = _PLANS.get(lists)
    if found is None or found[0] != how:
        cuts = _cuts(lists, *how)
        found = _PLANS[lists] = how, cuts, _owners(lists, cuts, how[-1])
    return found[1:]


def _cuts(lists, tiles_, shares, start):
    """Where the query blocks of a head are cut into shares of about equal numbers of entries, as the first batch stands; start: the block of tile 0."""
    offsets, cost = np.asarray(lists.offsets), np.ones(tiles_)
    entries = (offsets[2::2] - offsets[:-2:2]).reshape(-1, lists.nq).sum(0)
    i = start + np.arange(tiles_)
    there = (i >= 0) & (i < lists.nq)
    cost[there] += entries[i[there]]
    middles = np.cumsum(cost) - cost / 2  # a tile past whose middle a cut would fall comes before it
    return np.concatenate([[0], np.searchsorted(middles, np.arange(1, shares) * cost.sum() / shares), [tiles_]]).astype(np.int64)


def _owners(lists, cuts, start):
    """Of each key block the share that adds up where the gradients will stand: the first that has it in its part of the first list. Any other would be as right."""
    offsets, cols, owners = np.asarray(lists.offsets), np.asarray(lists.cols), np.zeros(lists.nk + 1, np.int64)
    blocks = np.clip(start + cuts, 0, lists.nq)
    for share in reversed(range(len(cuts) - 1)):
        owners[cols[offsets[2 * blocks[share]]:offsets[2 * blocks[share + 1]]]] = share
    return owners


def run(q, k, v, lists, lse, delta, dout, *, place, config, scale, softcap=None, kv_length=None, q_start=None, deterministic=True, out_dtype=None, out=None):
    (B, Hq, T, D), (_, Hk, S, Dv) = q.shape, v.shape
    make = place.empty if lists.q_order is None and q.dtype != np.float64 else place.zeros  # rows that no tile holds
    dq = make(q.shape, out_dtype or q.dtype.name)
    if q.dtype == np.float64:
        dk, dv = place.zeros(k.shape, "float64"), place.zeros(v.shape, "float64")
    else:
        dk, dv = place.empty(k.shape, out_dtype or k.dtype.name), place.empty(v.shape, out_dtype or v.dtype.name)
    if not (dq.size and dk.size):
        for x in (dq, dk, dv):
            x.fill(0)
        return dq, dk, dv
    lse, delta = (None if x is None else np.ascontiguousarray(x, np.float64 if q.dtype == np.float64 else np.float32) for x in (lse, delta))
    job, alive = make_job(lists, q=q, k=k, v=v, dout=dout, dq=dq, dk=dk, dv=dv, lse=lse, delta=delta, scale=scale, softcap=softcap,
                          kv_length=kv_length, q_start=q_start, **({"out": out} if delta is None else {}))
    shared = sizes(job, D, Dv, lists.block_q, k, v, lists.k_order)
    threads = numba.get_num_threads()
    if q.dtype == np.float64:
        _memory = scratch(job, threads, rows=shared["rows"])
        on_threads(exact_backward, job)
        return dq, place.cast(dk, out_dtype or k.dtype.name), place.cast(dv, out_dtype or v.dtype.name)
    panels, Dp, width = (int(job[name][0]) for name in ("panels", "Dp", "width"))
    job["direct_k"] &= D % 4 == 0
    job["direct_v"] = v.dtype == np.float32 and lists.k_order is None
    sum_rows = up(S, GRAIN)
    one = 4 * sum_rows * (Dp + width)
    heads = -(-B * Hk // -(-B * Hk // max(1, min(B * Hk, SPARE // one))))  # groups of about the same size
    one *= heads
    tiles_, mode, start = (int(job[name][0]) for name in ("tiles", "q_start_mode", "q_start"))
    start = 0 if lists.q_order is not None else start // lists.block_q - lists.first if mode == START_FROM_ARGUMENT else lists.nq - tiles_
    shares = max(1, min(-(-TASKS // heads), tiles_, ROOM // one))
    sums, (cuts, owners) = take(shares * one), _plan(lists, tiles_, shares, start)
    sums_k, sums_v = address(sums), address(sums) + shares * one // (Dp + width) * Dp
    # Rows that are as long in the result as in a sum are summed there by one of the shares.
    direct = D == Dp and Dv == width and lists.k_order is None and lists.block_k % GRAIN == 0 and dk.dtype == dv.dtype == np.float32
    touched = np.zeros((shares * heads, sum_rows // GRAIN), np.uint8)
    set_fields(job, shares=shares, owners=address(owners if direct else None), cuts=address(cuts), sums_k=sums_k, sums_v=sums_v, sum_rows=sum_rows, touched=address(touched), touched_step=touched.shape[1])
    rows, chunk = panels * PANEL, CHUNK + 4
    shared |= dict(spans=shared["spans"] + 192, gt=panels * width * STEP, dqt=panels * Dp * STEP, q_rows=rows * (4 * Dp + APART), g_rows=rows * (4 * width + APART), p=4 * rows * chunk,
                   ds=4 * rows * chunk, bounds=16 * chunk, asks=ASKS, rows_lse=3 * panels * STEP, more=4 * chunk * (Dp + width))
    _memory = scratch(job, threads, **shared)
    for head in range(0, B * Hk, heads):
        set_fields(job, head=head, heads=min(heads, B * Hk - head))
        touched[:] = alive[0]["counter"][:] = 0
        on_threads(work, job, min(threads, shares * min(heads, B * Hk - head)))
        alive[0]["counter"][:] = 0
        on_threads(finish, job)
    keep(sums)
    return dq, dk, dv
