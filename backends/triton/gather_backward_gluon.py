"""Path "gluon" of gather_attention_backward: the latent of width 576 whose first 512 columns are the values, by Hopper's own products, every order of sums harmless.

For a chunk of queries `queries_gluon` (gather_backward_queries_gluon.py) makes dQ, leaves probabilities and dS in scratch and adds up, for each key, a bound of all contributions to it;
`units` turns bounds into powers of two; `keys_gluon` (gather_backward_keys_gluon.py) adds the contributions as integers in these units; `finish` turns them into floats. Integers add up
to the same bits in any order. Five products as FLOPs are counted; scratch: SCRATCH bytes of probabilities and dS (at least one query's), 8 a row, and for each key 72 of bounds,
a unit, 576 integers and, where there are several chunks, 576 floats.
"""
from functools import lru_cache

import triton
import triton.language as tl

from sparsetile.backends.contract import Resources
from sparsetile.backends.triton import relaunch
from sparsetile.backends.triton.gather_backward_keys_gluon import ENTRIES, NARROW, STAGED, STAGES, THIRDS, WIDE, keys_gluon
from sparsetile.backends.triton.gather_backward_queries_gluon import HEADS, KEYS, LATENT, ROTARY, SLOTS, queries_gluon
from sparsetile.backends.triton.gluon_maps import Map, map_type
from sparsetile.backends.triton.launch import POINTER, known_start
from sparsetile.backends.triton.maps import can_map

SCRATCH = 1 << 30
BINS = 9  # of a key's bound
WIDTH = LATENT.value + ROTARY.value


@triton.jit
def weigh(q, dout, weights, sqb, sqh, sqt, sgb, sgh, sgt, Hq, T, scale, BT: tl.constexpr):
    """The largest magnitudes of each row: what a contribution may be at most for each unit of dS or of a probability; 1/16 more for the roundings of a bound's parts."""
    x = tl.program_id(0)
    t = x % tl.cdiv(T, BT) * BT + tl.arange(0, BT)
    h = x // tl.cdiv(T, BT) % Hq
    b = (x // tl.cdiv(T, BT) // Hq).to(tl.int64)
    c = tl.arange(0, 512)
    ok = (t < T)[:, None]
    q += b * sqb + h.to(tl.int64) * sqh + t.to(tl.int64)[:, None] * sqt
    dout += b * sgb + h.to(tl.int64) * sgh + t.to(tl.int64)[:, None] * sgt
    most = tl.max(tl.abs(tl.load(q + c[None, :], ok, 0.0).to(tl.float32)), 1)
    most = tl.maximum(most, tl.max(tl.abs(tl.load(q + 512 + tl.arange(0, 64)[None, :], ok, 0.0).to(tl.float32)), 1))
    worth = tl.max(tl.abs(tl.load(dout + c[None, :], ok, 0.0).to(tl.float32)), 1)
    at = weights + 2 * ((b * Hq + h) * T + t)
    tl.store(at, most * (scale * 1.0625), t < T)
    tl.store(at + 1, worth * 1.0625, t < T)


@triton.jit
def units(bounds, out, rows, BK: tl.constexpr):
    """A power of two for each key by which the sum of its bounds becomes at most 2^30; NaN where a bound is not finite. bounds int64 [9, rows], cleared for the next chunk."""
    row = tl.program_id(0).to(tl.int64) * BK + tl.arange(0, BK)
    ok = row < rows
    total = tl.zeros([BK], tl.float64)
    for i in tl.static_range(8):
        total = total * 4294967296.0 + tl.load(bounds + (7 - i) * rows + row, ok, 0).to(tl.float64)
    finite = tl.load(bounds + 8 * rows + row, ok, 0) == 0
    tl.debug_barrier()  # another thread may clear where this one reads
    for i in tl.static_range(9):
        tl.store(bounds + i * rows + row, tl.zeros([BK], tl.int64), ok)
    bits = total.to(tl.int64, bitcast=True)
    e = ((bits >> 52) - 1023 - 135 + ((bits & 0xfffffffffffff) != 0).to(tl.int64)).to(tl.int32)  # total <= 2^e
    e = tl.minimum(tl.maximum(30 - e, -126), 126)
    unit = ((e + 127) << 23).to(tl.float32, bitcast=True)
    tl.store(out + row, tl.where(finite, unit, float("nan")), ok)


@triton.jit
def finish(sums, scaled, before, dk, words, FIRST: tl.constexpr, LAST: tl.constexpr, BK: tl.constexpr):
    """Integers to floats, added to those of the chunks before; rounded at the end. sums int32 [rows, 576], cleared for the next chunk; before float32, alike."""
    x = tl.program_id(0).to(tl.int64) * BK + tl.arange(0, BK)
    ok = x < words
    y = tl.load(sums + x, ok, 0).to(tl.float32) / tl.load(scaled + x // 576, ok, 1.0)
    if not FIRST:
        y += tl.load(before + x, ok, 0.0)
    tl.debug_barrier()  # another thread may store where this one reads
    tl.store(sums + x, tl.zeros([BK], tl.int32), ok)
    if LAST:
        tl.store(dk + x, y.to(dk.dtype.element_ty), ok)
    else:
        tl.store(before + x, y, ok)


# ---------------------------------------------------------------------------------------------------------------- the host
def takes(q, k, v, dout, indices, granularity: int, scale: float, softcap) -> bool:
    """Whether this call is one for these kernels: one key head of the latent's widths, one list for all heads, a positive scale, rows that the copy engine can read."""
    fits = (q.shape[3], v.shape[3], k.shape[1], indices.shape[1], granularity) == (WIDTH, LATENT.value, 1, 1, 1) and softcap is None and 0 < scale <= 2 ** 64
    shared = k.data_ptr() == v.data_ptr() and k.stride()[:3] == v.stride()[:3]
    return fits and shared and all(map(can_map, (q, dout))) and not (k.data_ptr() % 16 or any(s % 16 for s in k.stride()[:3]))


def blocks_of(Hq: int) -> int:
    """Blocks of 64 heads that one item of `keys_gluon` takes."""
    return 1 if Hq <= HEADS.value else 2


@lru_cache
def constants(causal: bool, from_length: bool, group: int) -> relaunch.Constants:
    return relaunch.Constants(GROUP=group, CAUSAL=causal, FROM_LENGTH=from_length, num_warps=8, enable_fp_fusion=False)


@lru_cache
def key_constants(causal: bool, from_length: bool, group: int) -> relaunch.Constants:
    return relaunch.Constants(ROWS=group * HEADS.value, CAUSAL=causal, FROM_LENGTH=from_length, num_warps=4, enable_fp_fusion=False)


def run(q, k, indices, lse, delta, dout, *, place, lengths, causal, scale, kv_length, q_start, out_dtype):
    """dq in the type of q; dk [B,1,S,576], the sum of both gradients of the latent, in out_dtype; None for dv."""
    (B, Hq, T, _), S, K = q.shape, k.shape[2], indices.shape[3]
    group, places, kind = blocks_of(Hq), -(-K // ENTRIES.value), str(q.dtype)[6:]
    groups, sms = -(-Hq // (HEADS.value * group)), max(place.sms, 1)
    lines = groups * group * places * HEADS.value                                  # of the scratch, 2 x 128 bytes each, of a query
    some = min(T, max(1, SCRATCH // (B * lines * 256)))
    if sms < some < T:
        some -= some % sms  # or the last items of each chunk leave processors idle
    scratch = [place.empty((B * some * lines, ENTRIES.value), kind) for _ in range(2)]
    dq, dk, weights = place.empty((B, Hq, T, WIDTH), kind), place.empty((B, 1, S, WIDTH), out_dtype), place.empty((B, Hq, T, 2), "float32")
    bounds, scaled, sums = place.zeros((BINS, B * S), "int64"), place.empty((B * S,), "float32"), place.zeros((B * S, WIDTH), "int32")
    before = place.empty((B * S, WIDTH), "float32") if some < T else None
    weigh[(B * Hq * triton.cdiv(T, 8),)](q, dout, weights, *q.stride()[:3], *dout.stride()[:3], Hq, T, scale, BT=8)
    host, starts = known_start(q_start)
    listed = indices, lengths, kv_length, starts
    turned = q.transpose(1, 2), dout.transpose(1, 2)                               # a query's heads are neighbours
    brought = Map(turned[0], 64, 512), Map(turned[0], 64, 64), Map(turned[1], 64, 512)
    sent, read = (tuple(Map(x, rows, columns) for x in scratch) for rows, columns in ((HEADS.value, KEYS.value), (group * HEADS.value, ENTRIES.value)))
    pieces = [Map(x, group * HEADS.value, columns) for x in turned for columns in (WIDE.value, NARROW.value)]
    made = bool(causal), q_start is None, group
    for first in range(0, T, some):
        n = min(some, T - first)
        items = B * n * groups * group
        relaunch.launch(queries_gluon, (min(items, sms),), place, (k, dq, lse, delta, weights, bounds, *listed),
                        (k.stride(0), k.stride(2), Hq, groups * group, T, S, K, first, n, items, places, B * S, host or 0, float(scale)), constants(*made), (q.dtype,), (*brought, *sent))
        units[(triton.cdiv(B * S, 256),)](bounds, scaled, B * S, BK=256)
        each = B * n * groups
        relaunch.launch(keys_gluon, (min(THIRDS.value * each, sms),), place, (sums, scaled, *listed), (groups, T, S, K, first, n, each, THIRDS.value * each, places, host or 0, float(scale)),
                        key_constants(*made), (q.dtype,), (*pieces, *read))
        finish[(triton.cdiv(B * S * WIDTH, 2048),)](sums, scaled, before, dk, B * S * WIDTH, FIRST=first == 0, LAST=first + n == T, BK=2048)
    return dq, dk, None


def resources(problem) -> Resources:
    row, heads = 2 * WIDTH, blocks_of(problem["Hq"]) * HEADS.value
    first = HEADS.value * (row + 2 * LATENT.value) + SLOTS.value * KEYS.value * (row + 4 * HEADS.value) + 1024
    second = heads * 4 * (WIDE.value + NARROW.value + STAGES.value * ENTRIES.value) + 2 * STAGED + 512
    return Resources(threads=512, shared=max(first, second), registers=128)


def artifacts(problem) -> list[dict]:
    has, pointer = problem.features.__contains__, POINTER[problem.dtype("q")]
    made, group = (has("causal"), has("kv_length") and not has("q_start")), blocks_of(problem["Hq"])

    def mapped(rank, rows, columns):
        return map_type(pointer, [1] * (rank - 2) + [rows, columns])

    def artifact(fn, maps, arrays, integers, floats, constants):
        return relaunch.artifact(fn, constants, arrays, integers, floats, maps, aligned=[name for name in integers if name in strides])
    strides = ("skb", "sks", "sqb", "sqh", "sqt", "sgb", "sgh", "sgt")
    listed = {name: "*i32" for name in ["indices", "lengths"] + ["kv_length"] * has("kv_length") + ["q_starts"] * has("q_start")}
    sent, read, rows = mapped(2, 64, 32), mapped(2, group * 64, 64), group * 64
    found = [artifact(weigh, {}, dict(q=pointer, dout=pointer, weights="*fp32"), (*strides[2:], "Hq", "T"), ("scale",), dict(BT=8)),
             artifact(queries_gluon, dict(q_map=mapped(4, 64, 512), r_map=mapped(4, 64, 64), o_map=mapped(4, 64, 512), p_map=sent, d_map=sent),
                      dict(k=pointer, dq=pointer, lse="*fp32", delta="*fp32", weights="*fp32", bounds="*i64") | listed,
                      (*strides[:2], "Hq", "parts", "T", "S", "K", "first", "some", "items", "places", "rows", "q_start"), ("scale",), constants(*made, group)),
             artifact(units, {}, dict(bounds="*i64", out="*fp32"), ("rows",), (), dict(BK=256)),
             artifact(finish, {}, dict(sums="*i32", scaled="*fp32", before="*fp32", dk=POINTER[problem.dtype("out", problem.dtype("q"))]), ("words",), (), dict(FIRST=False, LAST=True, BK=2048))]
    wide, narrow = mapped(4, rows, WIDE.value), mapped(4, rows, NARROW.value)
    return found + [artifact(keys_gluon, dict(q0_map=wide, q1_map=narrow, o0_map=wide, o1_map=narrow, p_map=read, d_map=read), dict(sums="*i32", units="*fp32") | listed,
                             ("groups", "T", "S", "K", "first", "some", "each", "items", "places", "q_start"), ("scale",), key_constants(*made, group))]
