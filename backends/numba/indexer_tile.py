"""The score of the lightning indexer, once for `indexer_scores` and `indexer_topk`: that is why both give the same bits.

score[t, s] = k_scale[s] * sum_h weights[h, t] * relu(q[h, t] . k[s]).   Lanes are keys, register rows are heads. Every score is one chain of
multiply-adds over D per head, then one over heads in their order: no tile size, window, batch or thread changes it.
"""
import numpy as np

from sparsetile.backends.numba.convert import read_row
from sparsetile.backends.numba.jit import kernel
from sparsetile.backends.numba.selector import window
from sparsetile.backends.numba.simd import F, LANES, get_f32, get_i32, get_i64, op, put_f32, transpose_tile

HEADS, VECTORS = 4, 3          # 12 accumulators, 3 keys' vectors, 1 broadcast: AVX2's 16 registers
KEYS = VECTORS * LANES         # of a panel [D, KEYS], which stays in the first cache while all queries of a tile pass over it
CHUNK = 8 * KEYS               # keys whose scores are held before they compete


def _score(e, q, q_step, weights, H, D, panel, scale, out, low):
    """KEYS scores of one query. q: rows of heads, q_step bytes apart, rows up to a multiple of HEADS readable."""
    b, low = e.b, e.splat(low)

    def group(h, sums):
        acc = e.gemm(HEADS, VECTORS, e.add(q, e.mul(h, q_step)), q_step, 4, panel, 4 * KEYS, D)
        for r in range(HEADS):
            w = e.splat(e.load(weights, e.mul(e.add(h, r), 4), F))
            there = b.icmp_signed("<", e.add(h, r), H)  # a head that pads must not turn an infinite key into NaN
            # max(low, x) is x where x is NaN: it must be seen, so that it is never chosen
            sums = [b.select(there, e.fma(e.max(low, acc[r * VECTORS + n]), w, s), s) for n, s in enumerate(sums)]
        return sums
    for n, x in enumerate(e.loop(H, [e.f(0)] * VECTORS, group, HEADS)):
        e.store(b.fmul(x, e.load(scale, 4 * LANES * n)), out, 4 * LANES * n)


score_keys = op("iiiiiiiif", _score)


@kernel
def load_queries(code, q, q_step_h, q_step_t, weights, T, t0, count, H, D, padded, qf, wf):
    """Queries t0 .. t0 + count as float32: qf [count, heads, padded], wf [count, heads], heads = H rounded up to HEADS (rows past H are never used)."""
    heads = (H + HEADS - 1) // HEADS * HEADS
    for n in range(count):
        for h in range(heads):
            row = qf + 4 * padded * (n * heads + h)
            if h < H:
                read_row(code, q + h * q_step_h + (t0 + n) * q_step_t, D, row, padded)
                put_f32(wf, n * heads + h, get_f32(weights, h * T + t0 + n))
            else:
                read_row(0, row, 0, row, padded)
                put_f32(wf, n * heads + h, np.float32(0))


@kernel
def load_panel(code, k, k_step, k_scale, first, count, D, padded, rows, panel, scale):
    """Keys first .. first + count -> panel [padded, KEYS], transposed, zeros past count; scale [KEYS]."""
    for n in range(KEYS):
        read_row(code, k + (first + n) * k_step, D if n < count else 0, rows + 4 * padded * n, padded)
        put_f32(scale, n, get_f32(k_scale, first + n) if k_scale != 0 and n < count else np.float32(1))
    for n in range(0, KEYS, LANES):
        for d in range(0, padded, LANES):
            transpose_tile(rows + 4 * (padded * n + d), 4 * padded, panel + 4 * (KEYS * d + n), 4 * KEYS)


@kernel
def score_chunk(qf, wf, count, H, D, padded, code, k, k_step, k_scale, S, first, last, starts, ends, rows, panel, scale, low, out):
    """Scores of `count` queries and keys first .. last -> out [count, CHUNK]. Keys outside a query's [starts, ends) hold anything."""
    heads = (H + HEADS - 1) // HEADS * HEADS
    for s in range(first, last, KEYS):
        seen = False
        for n in range(count):
            seen |= get_i64(starts, n) < s + KEYS and get_i64(ends, n) > s
        if not seen:
            continue
        load_panel(code, k, k_step, k_scale, s, min(KEYS, last - s), D, padded, rows, panel, scale)
        for n in range(count):
            if get_i64(starts, n) < s + KEYS and get_i64(ends, n) > s:
                score_keys(qf + 4 * padded * heads * n, 4 * padded, wf + 4 * heads * n, H, D, panel, scale, out + 4 * (CHUNK * n + s - first), low)


@kernel
def seen_by(b, t, T, S, key_start, key_end, causal, q_start, q_starts):
    """The keys [start, end) that query t of batch b sees."""
    start, end = window(b * T + t, key_start, key_end, S)
    if causal:
        if q_starts != 0:
            q_start = get_i32(q_starts, b)
        end = min(end, q_start + t + 1)
    return start, max(start, end)


def wide_scores(q, k, weights, k_scale, activation, t0, t1):
    """float64 arguments: scores of queries t0 .. t1 of one batch with all its keys [t1 - t0, S], by NumPy. The same slices for both ops: the same bits."""
    total = np.zeros((t1 - t0, k.shape[0]))
    keys = k.astype(np.float64).T
    for h in range(q.shape[0]):
        product = q[h, t0:t1].astype(np.float64) @ keys
        if activation == "relu":
            product[product < 0] = 0
        total += weights[h, t0:t1, None] * product
    return (total if k_scale is None else total * k_scale).astype(np.float32)


def tile_of(H: int, T: int) -> int:
    """Queries that share a panel: enough rows to pay for transposing it, few enough to stay in the second cache."""
    return max(1, min(T, 32, -(-512 // H)))


def scratch(threads: int, queries: int, H: int, D: int):
    """Per thread, in float32: (padded width, elements, offsets of qf, wf, rows, panel, scale, scores)."""
    padded, heads = -(-D // LANES) * LANES, -(-H // HEADS) * HEADS
    sizes = (queries * heads * padded, queries * heads, KEYS * padded, KEYS * padded, KEYS, queries * CHUNK)
    offsets, total = [], 0
    for size in sizes:
        offsets.append(total)
        total += -(-size // 16) * 16
    return padded, np.empty((threads, total), np.float32), offsets
