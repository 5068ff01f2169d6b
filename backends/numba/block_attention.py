"""Attention over the blocks of a layout on the CPU.

    q [B,Hq,T,D]  k [B,Hk,S,D]  v [B,Hk,S,Dv]  lists: contract.Lists  ->  out [B,Hq,T,Dv], lse [B,Hq,T]

Query t stands at q_start + t (None: the last T keys'). Keys at or past min(S, kv_length) do not exist. Rows without keys: out 0, lse -inf.
softcap comes before masking; the sink stands in the denominator only. Values of keys that no query of a tile sees are not read.

A task is one block of queries of one batch and head; threads take tasks from a counter, and none shares a sum with another, so results do
not depend on their number. Keys and values are read in place where they are float32 rows; other types, permuted keys, holes between seen
keys and ragged ends go through float32 scratch, one chunk at a time. Sums are float32 (tiles.py); float64 inputs, and rows whose
float32 sums overflow, are done one query at a time in float64 (exact.py).
"""
import math

import numba
import numpy as np

from sparsetile.backends.contract import Resources, Tunable
from sparsetile.backends.numba import tiles
from sparsetile.backends.numba.convert import fill_zero, read_row, write_row
from sparsetile.backends.numba.exact import exact_row, row_factor
from sparsetile.backends.numba.job import F64_CODE, first_position, key_limit, key_of, list_block, make_job, row_word, tile_rows
from sparsetile.backends.numba.jit import kernel
from sparsetile.backends.numba.simd import LANES, get_i32, next_task, put_f32, transpose_tile
from sparsetile.backends.numba.tiles import PANEL, STEP, split

TUNABLES = (Tunable("block_q", (64, 32, 128), "queries per task"),
            Tunable("block_k", (64, 32, 128), "keys per block of the layout"))
CHUNK = 64  # keys at a time: their rows of K and V stay in the nearest cache


def supports(problem):
    kinds = [problem.dtype(name, "float32") for name in ("q", "k", "v")]
    return "float64 together with other types: convert q, k and v to one type" if 0 < kinds.count("float64") < 3 else None


def resources(problem, config):
    return Resources(threads=1)


def default_config(problem):
    return {"block_q": 64, "block_k": 64}


@kernel
def load_panel(job, base, step, code, width, padded, rows, first, sign, flat, panel):
    """Rows `rows[first:first+PANEL]` of a tensor, times sign, transposed: panel [padded, PANEL]; zeros where there is no row.
    flat is scratch and keeps them untransposed."""
    address = flat.ctypes.data
    for r in range(PANEL):
        t = rows[first + r]
        if t < 0:
            fill_zero(address + 4 * r * padded, padded)
        else:
            read_row(code, base + t * step, width, address + 4 * r * padded, padded)
    if sign != 1:
        flat[:PANEL * padded] *= sign
    for r in range(0, PANEL, LANES):
        for d in range(0, padded, LANES):
            transpose_tile(address + 4 * (r * padded + d), 4 * padded, panel + 4 * (d * PANEL + r), STEP)


@kernel
def load_keys(base, step, code, width, padded, job, slot, count, limit, seen, scratch):
    """Keys slot .. slot + count - 1 -> float32 rows of scratch [.., padded]; zeros for those that do not exist or that nobody sees."""
    address = scratch.ctypes.data
    for c in range(count):
        s = key_of(job, slot + c, limit) if (seen[c >> 5, 0] >> (c & 31)) & 1 else -1
        if s < 0:
            fill_zero(address + 4 * c * padded, padded)
        else:
            read_row(code, base + s * step, width, address + 4 * c * padded, padded)


@kernel
def chunk_words(job, kind, slot, ks, count, limit, rows, words, seen):
    """Masks of a chunk (keys ks .. ks + count - 1 of a block that starts at `slot`): words [panels, CHUNK / 32 + 1, PANEL], `seen` their union."""
    for w in range(count >> 5):
        there = 0xFFFFFFFF
        if job.k_order != 0:
            there = 0
            for c in range(32):
                if key_of(job, slot + ks + 32 * w + c, limit) >= 0:
                    there |= 1 << c
        elif slot + ks + 32 * w + 32 > limit:
            there = (1 << max(limit - slot - ks - 32 * w, 0)) - 1
        union = 0
        for p in range(words.shape[0]):
            for n in range(PANEL):
                r = p * PANEL + n
                word = 0
                if rows[r] >= 0:
                    word = there if kind < 0 else there & row_word(job, kind, r, (ks >> 5) + w)
                words[p, w, n] = word
                union |= word
        seen[w, 0] = union
    words[:, count >> 5:] = 0
    seen[count >> 5:] = 0


@kernel
def span(words, count):
    """First and last + 1 of the keys that some word of [words, lanes] has (0, 0: none), and whether all lanes have all between."""
    low, high, dense = 0, 0, True
    for w in range(count >> 5):
        union, common = 0, 0xFFFFFFFF
        for n in range(words.shape[1]):
            word = np.int64(words[w, n]) & 0xFFFFFFFF
            union |= word
            common &= word
        if union != 0:
            first, last = _lowest(union), _highest(union)
            dense = dense and common == union and union >> first == (1 << (last + 1 - first)) - 1 and high in (0, 32 * w + first)
            if high == 0:
                low = 32 * w + first
            high = 32 * w + last + 1
    return low, high, dense


@kernel
def _lowest(word):
    n = 0
    while (word >> n) & 1 == 0:
        n += 1
    return n


@kernel
def _highest(word):
    n = 31
    while (word >> n) & 1 == 0:
        n -= 1
    return n


@kernel
def _tile(job, b, h, tile, unit, sign, constants, rows, flat, qt, ot, s, state, words, seen, keys, values, saw):
    """One block of queries. state [panels, 4, PANEL]: new maxima, maxima in use, sums, scratch."""
    i, real = tile_rows(job, b, tile, rows)
    if real == 0:
        return
    panels, Dp = qt.shape[0], qt.shape[1]
    state[:, :2] = -math.inf
    state[:, 2] = 0
    ot[:] = 0
    if i >= 0 and job.q_code != F64_CODE:
        base_q = job.q + b * job.q_b + h * job.q_h
        j = h // (job.Hq // job.Hk)
        base_k, base_v = job.k + b * job.k_b + j * job.k_h, job.v + b * job.v_b + j * job.v_h
        limit = key_limit(job, b)
        saw[:] = 0
        for p in range(panels):
            load_panel(job, base_q, job.q_t, job.q_code, job.D, Dp, rows, p * PANEL, sign, flat, qt[p].ctypes.data)
        begin, partial, end = list_block(job, b, h, i)
        for entry in range(begin, end):
            _block(job, get_i32(job.kinds, entry) if entry >= partial else -1, get_i32(job.cols, entry) * job.block_k, limit,
                   base_k, base_v, constants, rows, qt, ot, s, state, words, seen, keys, values, saw)
    for p in range(panels):
        _store(job, b, h, i, p, unit, rows, flat, ot, state, saw)


@kernel
def _block(job, kind, slot, limit, base_k, base_v, constants, rows, qt, ot, s, state, words, seen, keys, values, saw):
    """All panels against one block of keys, chunk by chunk."""
    panels, D, Dvp = qt.shape[0], job.D, values.shape[1]
    direct_k = job.k_code == 0 and job.k_order == 0
    direct_v = job.v_code == 0 and job.k_order == 0 and job.Dv % 4 == 0
    pc, ps = constants.ctypes.data, s.ctypes.data
    sixes_v, fours_v = split(Dvp)
    for ks in range(0, job.block_k, CHUNK):
        count = min(CHUNK, job.block_k - ks)
        if job.k_order == 0 and slot + ks >= limit:
            break
        masked = kind >= 0 or job.k_order != 0 or slot + ks + count > limit
        low, high, dense = 0, count, True
        if masked:
            chunk_words(job, kind, slot, ks, count, limit, rows, words, seen)
            low, high, dense = span(seen, count)
            if high == 0:
                continue
        else:
            seen[:] = -1
        here_k = direct_k and (not masked or slot + ks + high + 3 <= job.S)  # register tiles of four rows may read three rows more
        here_v = direct_v and dense
        if here_k:
            pk, k_step = base_k + (slot + ks) * job.k_t, job.k_t
        else:
            load_keys(base_k, job.k_t, job.k_code, D, keys.shape[1], job, slot + ks, high, limit, seen, keys)
            pk, k_step = keys.ctypes.data, 4 * keys.shape[1]
        if here_v:
            pv, v_step = base_v + (slot + ks) * job.v_t, job.v_t
        else:
            load_keys(base_v, job.v_t, job.v_code, job.Dv, Dvp, job, slot + ks, high, limit, seen, values)
            pv, v_step = values.ctypes.data, 4 * Dvp
        for p in range(panels):
            if rows[p * PANEL] < 0 and rows[p * PANEL:p * PANEL + PANEL].max() < 0:
                continue
            if masked:
                low, high, dense = span(words[p], count)
                if high == 0:
                    continue
                for n in range(PANEL):
                    for w in range(count >> 5):
                        saw[p, n] |= words[p, w, n]
            else:
                saw[p] = 1
            padded = (high - low + 3) & ~3
            sixes, fours = split(padded)
            top, pm, pl, po, pw = state[p, 0].ctypes.data, state[p, 1].ctypes.data, state[p, 2].ctypes.data, ot[p].ctypes.data, words[p].ctypes.data
            if job.capped:
                if not masked:
                    words[p] = -1
                tiles.score(pk + low * k_step, k_step, qt[p].ctypes.data, D, ps, state[p, 3].ctypes.data, sixes, fours)
                tiles.softcap(ps, top, pw, low, padded, pc)
            elif dense and padded == high - low:
                tiles.score(pk + low * k_step, k_step, qt[p].ctypes.data, D, ps, top, sixes, fours)
            else:
                tiles.score_masked(pk + low * k_step, k_step, qt[p].ctypes.data, D, ps, top, sixes, fours, pw, low)
            tiles.rescale(top, pm, pl, po, Dvp, pc)
            tiles.exponent(ps, padded, pm, pl, pc)
            tiles.add_values(pv + low * v_step, v_step, ps, high - low, po, sixes_v, fours_v)


@kernel
def _store(job, b, h, i, p, unit, rows, flat, ot, state, saw):
    """Divide by the sums, write a panel's rows and their lse; rows that float32 could not hold are done again in float64."""
    Dv, width = job.Dv, ot.shape[1]
    for n in range(PANEL):
        total = state[p, 2, n]
        top = np.float64(state[p, 1, n]) * unit if total != 0 else -math.inf
        state[p, 0, n] = row_factor(job, h, top, np.float64(total))
        state[p, 1, n] = top + math.log(total) if total > 0 else -math.inf
    tiles.scale_panel(ot[p].ctypes.data, width, state[p, 0].ctypes.data)
    address = flat.ctypes.data
    for r in range(0, PANEL, LANES):
        if rows[p * PANEL + r:p * PANEL + r + LANES].max() < 0:
            continue
        for d in range(0, width, LANES):
            transpose_tile(ot[p].ctypes.data + 4 * (d * PANEL + r), STEP, address + 4 * d, 4 * width)
        for n in range(r, r + LANES):
            t = rows[p * PANEL + n]
            if t < 0:
                continue
            row = address + 4 * (n - r) * width
            lost = job.q_code == F64_CODE or i >= 0 and (tiles.finite(row, Dv) != 0 or state[p, 2, n] == 0 and saw[p, n] != 0)
            if lost:
                exact_row(job, b, h, i, p * PANEL + n, t)
            else:
                write_row(job.out_code, row, Dv, job.out + b * job.out_b + h * job.out_h + t * job.out_t)
                put_f32(job.lse, (b * job.Hq + h) * job.T + t, state[p, 1, n])


@kernel
def _work(jobs, unit, sign, constants):
    """One thread: takes tasks until there are none left. Blocks of queries of one head follow each other, the last (causal: the longest) first."""
    job = jobs[0]
    panels, Dp, Dvp = (job.block_q + PANEL - 1) // PANEL, _up(job.D, LANES), _up(job.Dv, 4)
    width = _up(job.Dv, LANES)
    rows = np.empty(panels * PANEL, np.int64)
    flat = np.empty(PANEL * max(Dp, width), np.float32)
    qt, ot = np.empty((panels, Dp, PANEL), np.float32), np.empty((panels, width, PANEL), np.float32)
    s, state = np.empty((CHUNK + 4, PANEL), np.float32), np.empty((panels, 4, PANEL), np.float32)
    words, seen = np.zeros((panels, CHUNK // 32 + 1, PANEL), np.int32), np.zeros((CHUNK // 32 + 1, 1), np.int32)
    keys, values = np.zeros((CHUNK + 4, Dp), np.float32), np.zeros((CHUNK + 4, Dvp), np.float32)
    saw = np.empty((panels, PANEL), np.int32)
    total = job.B * job.Hq * job.tiles
    while True:
        task = next_task(job.counter)
        if task >= total:
            break
        head, tile = task // job.tiles, job.tiles - 1 - task % job.tiles
        _tile(job, head // job.Hq, head % job.Hq, tile, unit, sign, constants, rows, flat, qt, ot, s, state, words, seen, keys, values, saw)


@kernel
def _up(x, step):
    return (x + step - 1) // step * step


@kernel(parallel=True)
def _launch(threads, jobs, unit, sign, constants):
    for _ in numba.prange(threads):
        _work(jobs, unit, sign, constants)


def factors(scale, softcap):
    """(unit, sign, constants): scores times sign times unit are natural logarithms; constants as tiles.py takes them."""
    unit, sign = (abs(scale), math.copysign(1, scale)) if scale else (1.0, 0.0)  # scale 0: all scores 0
    outer = inner = 0.0
    if softcap is not None:
        unit, outer, inner = 1.0, softcap, abs(scale) / softcap
    c = unit * math.log2(math.e)
    largest = float(np.finfo(np.float32).max)
    return unit, np.float32(sign), np.array([min(c, largest), max(-100 / c, -largest), min(tiles.TAU / c, largest), outer, inner], np.float32)


def run(q, k, v, lists, *, place, config, scale, sink_logits=None, softcap=None, kv_length=None, q_start=None, out_dtype=None, return_lse=True):
    B, Hq, T, _ = q.shape
    kind = out_dtype or (q.dtype.name if q.dtype.name != "float8_e4m3fn" else "bfloat16")
    make = place.empty if lists.q_order is None else place.zeros  # an order may leave queries out
    out, lse = make((B, Hq, T, v.shape[3]), kind), make((B, Hq, T), "float64" if kind == "float64" else "float32")
    if lists.q_order is not None:
        lse.fill(-math.inf)
    if out.size == 0 and lse.size == 0:
        return out, lse if return_lse else None
    job, _alive = make_job(lists, q=q, k=k, v=v, out=out, lse=lse, scale=scale, softcap=softcap, kv_length=kv_length, q_start=q_start, sink_logits=sink_logits)
    _launch(numba.get_num_threads(), job, *factors(scale, softcap))
    return out, lse if return_lse else None
