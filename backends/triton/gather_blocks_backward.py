"""Path "blocks" of gather_attention_backward: pairs sorted by entry as in the forward (gather_blocks.py). `keys` gives KEYS keys of a block to one program, which runs through the pairs of
that block in their order; `queries` sums dq of each pair, [lists, pairs, D] in float32, of so many key heads at a time as SCRATCH holds, which are added in the order of a row's list.
"""
import triton
import triton.language as tl

from sparsetile.backends.contract import Resources
from sparsetile.backends.triton import gather_blocks
from sparsetile.backends.triton.gather_blocks import list_of, lists_at_once, sorted_pairs
from sparsetile.backends.triton.launch import POINTER, known_start, power
from sparsetile.backends.triton.tiles import load, place_of, product, rebuilt, rows_known, store

KEYS, QUERIES, STEP = 128, 32, 64  # a tile of `keys`; keys of a step of `queries`, whose tile has gather_blocks.ROWS pairs
OPTIONS = dict(num_warps=8, num_stages=3, enable_fp_fusion=False), dict(num_warps=8, num_stages=2, enable_fp_fusion=False)


@triton.jit
def rows_of_pairs(x, ok, b, hk, q, dout, lse, delta, sqb, sqh, sqt, sgb, sgh, sgt, Hq, Hk, T, K, D: tl.constexpr, D0: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr):
    """Of pairs x: query, q [rows, D0], dout [rows, V0], lse and delta."""
    h = (hk * (Hq // Hk) + x // K // T).to(tl.int64)
    t = (x // K % T).to(tl.int64)
    q0 = load(q + b * sqb, h * sqh + t * sqt, ok, 0, D0, D, True)
    g0 = load(dout + b * sgb, h * sgh + t * sgt, ok, 0, V0, DV, True)
    logs, shift = rows_known(lse, delta, 0, (b * Hq + h) * T + t, ok, True)
    return t, q0, g0, logs, shift


@triton.jit(do_not_specialize=["first", "Hq", "Hk", "T", "S", "K", "bins", "capacity", "q_start"])
def keys(q, k, v, dout, lse, delta, dk, dv, order, begins, totals, kv_length, q_starts, sqb, sqh, sqt, skb, skh, sks, svb, svh, svs, sgb, sgh, sgt, first, Hq, Hk, T, S, K, bins,
         capacity, q_start, scale, inner, outer, D: tl.constexpr, D0: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
         GRANULARITY: tl.constexpr, CAUSAL: tl.constexpr, CAP: tl.constexpr, FROM_LENGTH: tl.constexpr):
    list_, b, hk = list_of(first, Hk)
    TILES: tl.constexpr = (GRANULARITY + BK - 1) // BK
    block = tl.program_id(0) // TILES
    limit, start = place_of(b, T, S, q_start, q_starts, kv_length, FROM_LENGTH)
    offset = tl.program_id(0) % TILES * BK + tl.arange(0, BK)
    key = block.to(tl.int64) * GRANULARITY + offset
    there = (offset < GRANULARITY) & (key < S)
    ok_k = there & (key < limit)
    k0 = load(k + b * skb + hk * skh, key * sks, ok_k, 0, D0, D, True)
    v0 = load(v + b * svb + hk * svh, key * svs, ok_k, 0, V0, DV, True)
    sum_k = tl.zeros([BK, D0], tl.float32)
    sum_v = tl.zeros([BK, V0], tl.float32)
    total = tl.load(totals + list_ * bins + block)
    order += list_ * capacity + tl.load(begins + list_ * bins + block)
    for n in tl.range(0, total, BQ):
        place = n + tl.arange(0, BQ)
        ok = place < total
        x = tl.load(order + place, mask=ok, other=0)
        t, q0, g0, logs, shift = rows_of_pairs(x, ok, b, hk, q, dout, lse, delta, sqb, sqh, sqt, sgb, sgh, sgt, Hq, Hk, T, K, D, D0, DV, V0)
        raw = product(k0, tl.trans(q0), tl.zeros([BK, BQ], tl.float32))
        grad = product(v0, tl.trans(g0), tl.zeros([BK, BQ], tl.float32))
        p, ds = rebuilt(raw, grad, logs[None, :], shift[None, :], scale, inner, outer, CAP)
        seen = ok_k[:, None] & ok[None, :]
        if CAUSAL:
            seen = seen & (key[:, None] <= (start + t)[None, :])
        sum_v = product(tl.where(seen, p, 0.0).to(g0.dtype), g0, sum_v)
        sum_k = product(tl.where(seen, ds, 0.0).to(q0.dtype), q0, sum_k)
    rows = (b * Hk + hk) * S + key
    store(dk, rows * D, there, sum_k * scale, 0, D0, D)
    store(dv, rows * DV, there, sum_v, 0, V0, DV)


@triton.jit(do_not_specialize=["first", "Hq", "Hk", "G", "T", "S", "K", "pairs", "capacity", "q_start"])
def queries(q, k, v, dout, lse, delta, dq, order, indices, lengths, kv_length, q_starts, sqb, sqh, sqt, skb, skh, sks, svb, svh, svs, sgb, sgh, sgt, first, Hq, Hk, G, T, S, K, pairs,
            capacity, q_start, scale, inner, outer, D: tl.constexpr, D0: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
            GRANULARITY: tl.constexpr, CAUSAL: tl.constexpr, CAP: tl.constexpr, FROM_LENGTH: tl.constexpr):
    list_, b, hk = list_of(first, Hk)
    order += list_ * capacity + tl.program_id(0) * BQ
    one = tl.load(order)
    if one >= 0:
        limit, start = place_of(b, T, S, q_start, q_starts, kv_length, FROM_LENGTH)
        x = tl.load(order + tl.arange(0, BQ))
        ok = x >= 0
        x = tl.where(ok, x, one)
        line = (b * G + (hk * (Hq // Hk) + one // K // T) // (Hq // G)) * T + one // K % T
        begin = tl.load(indices + line * K + one % K).to(tl.int64) * GRANULARITY
        end = tl.minimum(begin + GRANULARITY, limit)
        t, q0, g0, logs, shift = rows_of_pairs(x, ok, b, hk, q, dout, lse, delta, sqb, sqh, sqt, sgb, sgh, sgt, Hq, Hk, T, K, D, D0, DV, V0)
        p_last = tl.max(start + t, 0)
        if CAUSAL:
            end = tl.minimum(end, p_last + 1)
        rest = (end - begin).to(tl.int32)
        k += b * skb + hk * skh + begin * sks
        v += b * svb + hk * svh + begin * svs
        acc = tl.zeros([BQ, D0], tl.float32)
        for n in tl.range(0, rest, BK):
            key = (n + tl.arange(0, BK)).to(tl.int64)
            ok_k = key < rest
            k0 = load(k, key * sks, ok_k, 0, D0, D, True)
            v0 = load(v, key * svs, ok_k, 0, V0, DV, True)
            raw = product(q0, tl.trans(k0), tl.zeros([BQ, BK], tl.float32))
            grad = product(g0, tl.trans(v0), tl.zeros([BQ, BK], tl.float32))
            _, ds = rebuilt(raw, grad, logs[:, None], shift[:, None], scale, inner, outer, CAP)
            seen = ok_k[None, :] & ok[:, None]
            if CAUSAL:
                seen = seen & ((begin + key)[None, :] <= (start + t)[:, None])
            acc = product(tl.where(seen, ds, 0.0).to(k0.dtype), k0, acc)
        store(dq, (list_ * pairs + x) * D, ok, acc * scale, 0, D0, D)


def resources():
    return Resources(threads=256, shared=(gather_blocks.ROWS * 2 + 2 * 2 * STEP) * 256)


def artifacts(problem) -> list[dict]:
    pointer, has, D, DV = POINTER[problem.dtype("q")], problem.features.__contains__, problem["D"], problem["Dv"]
    tile = dict(D=D, D0=power(D), DV=DV, V0=power(DV), CAP=has("softcap"), GRANULARITY=problem.granularity, CAUSAL=has("causal"), FROM_LENGTH=has("kv_length") and not has("q_start"))
    arrays = dict.fromkeys(("indices", "lengths", "order", "begins", "totals"), "*i32") | {n: "*i32" for n, on in (("kv_length", has("kv_length")), ("q_starts", has("q_start"))) if on}
    arrays |= dict.fromkeys(("q", "k", "v", "dout"), pointer) | dict.fromkeys(("lse", "delta"), "*fp32")
    found = gather_blocks.artifacts(problem)[:2]  # count and place
    for fn, made, rows, step, compiled in ((keys, dict(dk=pointer, dv=pointer), QUERIES, KEYS, OPTIONS[0]), (queries, dict(dq="*fp32"), gather_blocks.ROWS, STEP, OPTIONS[1])):
        found.append(gather_blocks.artifact(problem, fn, arrays | made, dict(tile, BQ=rows, BK=step), compiled))
    return found


def run(q, k, v, indices, lse, delta, dout, kind, place, *, lengths, granularity, causal, scale, softcap, kv_length, q_start):
    (B, Hq, T, D), (Hk, S), DV, (G, K) = q.shape, k.shape[1:3], v.shape[3], indices.shape[1::2]
    pairs, bins = Hq // Hk * T * K, -(-S // granularity)
    host, starts = known_start(q_start)
    host = host or 0
    inner, outer = (0.0, 0.0) if softcap is None else (scale / softcap, softcap)
    how = dict(GRANULARITY=granularity, CAUSAL=causal, FROM_LENGTH=q_start is None)
    tile = dict(D=D, D0=power(D), DV=DV, V0=power(DV), CAP=softcap is not None, **how)
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3]
    dq, dk, dv = (place.empty(shape, kind) for shape in ((B * Hk, Hq // Hk, T, D), (B, Hk, S, D), (B, Hk, S, DV)))
    at_once = lists_at_once(pairs, D, bins)
    for first in range(0, B * Hk, at_once):
        lists = min(at_once, B * Hk - first)
        given, sizes = (indices, lengths, kv_length, starts), (first, Hq, Hk, G, T, S, K, pairs)
        order, begins, totals = sorted_pairs(given, sizes, lists, host, place, how)
        capacity, shares = order.shape[1], place.zeros((lists, Hq // Hk, T, K, D), "float32")
        keys[(bins * -(-granularity // KEYS), lists)](q, k, v, dout, lse, delta, dk, dv, order, begins, totals, kv_length, starts, *strides, first, Hq, Hk, T, S, K, bins, capacity, host,
                                                      scale, inner, outer, BQ=QUERIES, BK=KEYS, **tile, **OPTIONS[0])
        queries[(capacity // gather_blocks.ROWS, lists)](q, k, v, dout, lse, delta, shares, order, *given, *strides, *sizes, capacity, host, scale, inner, outer,
                                                         BQ=gather_blocks.ROWS, BK=STEP, **tile, **OPTIONS[1])
        added = shares[:, :, :, 0]
        for n in range(1, K):
            added = added.add_(shares[:, :, :, n])
        dq[first:first + lists] = added
    return dq.view(B, Hq, T, D), dk, dv
