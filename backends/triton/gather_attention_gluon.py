"""Attention over selected keys for Hopper in Gluon, for keys of width 576 whose first 512 columns are the values (DeepSeek's latent), float16 and bfloat16.

A persistent block of threads takes one query and up to 64 heads that share its list at a time. `gather` brings the query, then tiles of 64 keys into two slots; holes are
zeros there, nothing is read for them. Two groups of `multiply` make the same scores each, for their own 256 value columns: half as much again is multiplied as would
have to be, but probabilities never leave registers, the groups never wait for each other, and the exponentials of one run beside the products of the other.
Scores and sums are rounded as in the portable source (tiles.py), hence as in the backward.
"""
from functools import lru_cache

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from sparsetile.backends.contract import Resources
from sparsetile.backends.triton import latent_rows, relaunch
from sparsetile.backends.triton.latents import latent_of
from sparsetile.backends.triton.launch import POINTER
from sparsetile.backends.triton.tiles import finish, soften

HEADS = gl.constexpr(64)
KEYS = gl.constexpr(64)
GROUP = gl.constexpr(128)  # float8 values with one scale
HALF = gl.constexpr(256)  # of the values
ROTARY = gl.constexpr(64)
STAGES = gl.constexpr(2)
COPIERS = gl.constexpr(128)  # threads of `gather`, each of which arrives


@gluon.jit
def item_of(number, sizes, lengths):
    """(batch, query, first head, line of its list, how many entries)."""
    Hq, parts, T, S, K = sizes
    y = number // parts
    b = y // T
    t = y - b * T
    count = K
    if lengths is not None:
        count = gl.minimum(gl.maximum(gl.load(lengths + y), 0), K)
    return b, t, (number - y * parts) * HEADS, y.to(gl.int64) * K, count


@gluon.jit
def _copy(tiles, s, rows, ok, B: gl.constexpr):
    """Rows of 576 columns, where `rows` points, into slot s: zeros where not ok."""
    for n in gl.static_range(3):
        c = n * HALF + gl.arange(0, tiles[n].shape[2], gl.SliceLayout(0, B))
        async_copy.async_copy_global_to_shared(tiles[n].index(s), gl.expand_dims(rows, 1) + gl.expand_dims(c, 0), mask=gl.expand_dims(ok, 1), cache_modifier=".cg")


@gluon.jit
def _bytes(keys, rows, ok, n: gl.constexpr, C: gl.constexpr):
    """Group n of 128 float8 values of rows in the fp8 layout of a latent cache, and its scale of each row."""
    c = n * GROUP + gl.arange(0, GROUP, gl.SliceLayout(0, C))
    scales = keys.to(gl.pointer_type(gl.float32), bitcast=True) + rows // 4 + (2 * HALF // 4 + n)
    return gl.load(keys + gl.expand_dims(rows, 1) + gl.expand_dims(c, 0), mask=gl.expand_dims(ok, 1), other=0), gl.load(scales, mask=ok, other=0.0)


@gluon.jit
def _convert(tiles, s, keys, rows, ok, bits, scale, C: gl.constexpr):
    """Such rows as elements into slot s, zeros where not ok: each group is asked for while the one before is converted. `bits` and `scale` are the first one's."""
    kind: gl.constexpr = tiles[0].dtype
    for n in gl.static_range(4):
        value = (bits.to(gl.float8e4nv, bitcast=True).to(gl.float32) * gl.expand_dims(scale, 1)).to(kind)
        if n < 3:
            bits, scale = _bytes(keys, rows, ok, n + 1, C)
        tiles[n // 2].index(s).slice(n % 2 * GROUP, GROUP, dim=1).store(value)
    c = gl.arange(0, ROTARY, gl.SliceLayout(0, C))
    at = keys.to(gl.pointer_type(gl.bfloat16), bitcast=True) + gl.expand_dims(rows // 2, 1) + (2 * HALF + 16) // 2 + gl.expand_dims(c, 0)
    tiles[2].index(s).store(gl.load(at, mask=gl.expand_dims(ok, 1), other=0.0).to(kind))


@gluon.jit
def gather(q, k, indices, lengths, at, sizes, strides, items, CAUSAL: gl.constexpr, FROM_LENGTH: gl.constexpr, LATENT: gl.constexpr, q_tiles, k_tiles, found, q_bars, k_bars):
    C: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    B: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    Hq, parts, T, S, K = sizes
    sqb, sqh, sqt, skb, sks = strides
    q_start, q_starts, kv_length = at
    q_full, q_free = q_bars
    full, free = k_bars
    h = gl.arange(0, HEADS, gl.SliceLayout(1, B))
    r = gl.arange(0, KEYS, gl.SliceLayout(1, B))
    n = 0
    j = 0
    for it in range(gl.program_id(0), items, gl.num_programs(0)):
        b, t, head, line, count = item_of(items - 1 - it, sizes, lengths)  # late queries have long rows: first
        if count > 0:
            limit = S
            if kv_length is not None:
                limit = gl.minimum(gl.maximum(gl.load(kv_length + b), 0), S)
            start = q_start
            if q_starts is not None:
                start = gl.load(q_starts + b)
            elif FROM_LENGTH:
                start += limit - T
            mbarrier.wait(q_free.index(0), (j & 1) ^ 1)
            exists = h < Hq - head
            _copy(q_tiles, 0, q + b.to(gl.int64) * sqb + t.to(gl.int64) * sqt + (head + gl.where(exists, h, 0)).to(gl.int64) * sqh, exists, B)
            async_copy.mbarrier_arrive(q_full.index(0), increment_count=False)
            j += 1
            keys = k + b.to(gl.int64) * skb
            entry = gl.load(indices + line + r, mask=r < count, other=-1)
            for first in range(0, count, KEYS):
                s = n % STAGES
                ok = (entry >= 0) & (entry < limit)
                if CAUSAL:
                    ok = ok & (entry <= start + t)
                rows = gl.where(ok, entry, 0).to(gl.int64) * sks
                entry = gl.load(indices + line + first + KEYS + r, mask=first + KEYS + r < count, other=-1)  # asked for a tile ahead
                if LATENT:
                    own = gl.convert_layout(rows, gl.SliceLayout(1, C))
                    there = gl.convert_layout(ok, gl.SliceLayout(1, C))
                    bits, factor = _bytes(keys, own, there, 0, C)
                    mbarrier.wait(free.index(s), ((n // STAGES) & 1) ^ 1)
                    _convert(k_tiles, s, keys, own, there, bits, factor, C)
                    fence_async_shared()
                else:
                    mbarrier.wait(free.index(s), ((n // STAGES) & 1) ^ 1)
                    _copy(k_tiles, s, keys + rows, ok, B)
                    async_copy.mbarrier_arrive(full.index(s), increment_count=False)
                found.index(s).store(ok.to(gl.int32))
                mbarrier.arrive(full.index(s))
                n += 1


@gluon.jit
def multiply(W: gl.constexpr, out, lse, lengths, sinks, sizes, items, scale, q_tiles, k_tiles, found, q_bars, k_bars):
    """A group of warps: scores of all 64 heads, sums of value columns 256 W .."""
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    R: gl.constexpr = gl.SliceLayout(1, L)
    Hq, parts, T, S, K = sizes
    q_full, q_free = q_bars
    full, free = k_bars
    kind = k_tiles[W].dtype
    scale2 = scale * 1.4426950408889634
    zero = gl.zeros([HEADS, KEYS], gl.float32, L)
    r = gl.arange(0, HEADS, R)
    n = 0
    j = 0
    for it in range(gl.program_id(0), items, gl.num_programs(0)):
        b, t, head, line, count = item_of(items - 1 - it, sizes, lengths)
        m = gl.full([HEADS], float("-inf"), gl.float32, R)
        l = gl.zeros([HEADS], gl.float32, R)
        acc = gl.zeros([HEADS, HALF], gl.float32, O)
        if count > 0:
            mbarrier.wait(q_full.index(0), j & 1)
            j += 1
        for first in range(0, count, KEYS):
            s = n % STAGES
            mbarrier.wait(full.index(s), (n // STAGES) & 1)
            fence_async_shared()  # copies of threads, read by products
            st = warpgroup_mma(q_tiles[0].index(0), k_tiles[0].index(s).permute((1, 0)), zero, use_acc=False, is_async=True)
            st = warpgroup_mma(q_tiles[1].index(0), k_tiles[1].index(s).permute((1, 0)), st, is_async=True)
            st = warpgroup_mma(q_tiles[2].index(0), k_tiles[2].index(s).permute((1, 0)), st, is_async=True)
            ok = found.index(s).load(gl.SliceLayout(0, L))
            x = warpgroup_mma_wait(0, deps=(st, ))
            mbarrier.arrive(q_free.index(0), pred=first + KEYS >= count)
            x = gl.where(gl.expand_dims(ok, 0) != 0, x, float("-inf"))
            p, f, m, l = soften(x, m, l, scale2, True)
            acc = acc * gl.expand_dims(gl.convert_layout(f, gl.SliceLayout(1, O)), 1)
            ot = warpgroup_mma(gl.convert_layout(p.to(kind), P), k_tiles[W].index(s), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(ot, ))
            mbarrier.arrive(free.index(s))
            n += 1
        h = head + gl.where(r < Hq - head, r, 0)
        factor, logs = finish(m, l, scale, scale2, sinks, h, sinks is not None)
        if lse is not None:
            if W == 0:
                gl.store(lse + (b.to(gl.int64) * Hq + h) * T + t, logs, mask=r < Hq - head)
        y = (acc * gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, O)), 1)).to(kind)
        row = gl.arange(0, HEADS, gl.SliceLayout(1, O))
        at = out + ((b.to(gl.int64) * Hq + head + row) * T + t) * (2 * HALF) + W * HALF
        gl.store(gl.expand_dims(at, 1) + gl.expand_dims(gl.arange(0, HALF, gl.SliceLayout(0, O)), 0), y, mask=gl.expand_dims(row < Hq - head, 1))


@gluon.jit(do_not_specialize=["Hq", "parts", "T", "S", "K", "items", "q_start"])
def gather_gluon(q, k, out, lse, indices, lengths, kv_length, q_starts, sinks, sqb, sqh, sqt, skb, sks, Hq, parts, T, S, K, items, q_start, scale,
                 CAUSAL: gl.constexpr, FROM_LENGTH: gl.constexpr, LATENT: gl.constexpr, MULTIPLY: gl.constexpr, GATHER: gl.constexpr):
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    B: gl.constexpr = mbarrier.MBarrierLayout()
    kind = q.dtype.element_ty
    q_tiles = (gl.allocate_shared_memory(kind, [1, HEADS, HALF], tile), gl.allocate_shared_memory(kind, [1, HEADS, HALF], tile),
               gl.allocate_shared_memory(kind, [1, HEADS, ROTARY], tile))
    k_tiles = (gl.allocate_shared_memory(kind, [STAGES, KEYS, HALF], tile), gl.allocate_shared_memory(kind, [STAGES, KEYS, HALF], tile),
               gl.allocate_shared_memory(kind, [STAGES, KEYS, ROTARY], tile))
    found = gl.allocate_shared_memory(gl.int32, [STAGES, KEYS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [1, 1], B)
    q_free = gl.allocate_shared_memory(gl.int64, [1, 1], B)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
    mbarrier.init(q_full.index(0), count=COPIERS)
    mbarrier.init(q_free.index(0), count=2)
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1 if LATENT else COPIERS + 1)
        mbarrier.init(free.index(s), count=2)
    fence_async_shared()
    sizes = (Hq, parts, T, S, K)
    q_bars = (q_full, q_free)
    k_bars = (full, free)
    gl.warp_specialize([
        (multiply, (0, out, lse, lengths, sinks, sizes, items, scale, q_tiles, k_tiles, found, q_bars, k_bars)),
        (multiply, (1, out, lse, lengths, sinks, sizes, items, scale, q_tiles, k_tiles, found, q_bars, k_bars)),
        (gather, (q, k, indices, lengths, (q_start, q_starts, kv_length), sizes, (sqb, sqh, sqt, skb, sks), items, CAUSAL, FROM_LENGTH, LATENT, q_tiles, k_tiles, found, q_bars, k_bars)),
    ], [4, 4], [MULTIPLY, GATHER])


# ---------------------------------------------------------------------------------------------------------------- the host
def takes(q, k, v, indices, granularity: int, scale: float, softcap, kind: str) -> bool:
    """Whether this call is one for `gather_gluon`: one key head of the latent's widths, one list for all heads, a positive scale, rows that 16-byte copies can read."""
    fits = (q.shape[3], v.shape[3], k.shape[1], indices.shape[1], granularity) == (576, 512, 1, 1, 1) and softcap is None and 1e-30 < scale < 1e38 and kind == str(q.dtype)[6:]
    shared = k.data_ptr() == v.data_ptr() and k.stride()[:3] == v.stride()[:3]
    return fits and shared and not any(x.data_ptr() % 16 or any(s % 16 for s in x.stride()[:3]) for x in (q, k))


def takes_bytes(q, k, indices, granularity: int, scale: float, softcap, kind: str, latent) -> bool:
    """The same for rows in the fp8 layout, of queries so few that the keys of a sequence may be written once more."""
    fits = (latent, k.shape[1], indices.shape[1], granularity) == ((512, 64), 1, 1, 1) and softcap is None and 1e-30 < scale < 1e38 and kind == str(q.dtype)[6:]
    return fits and not any(x.data_ptr() % 16 or any(s % 16 for s in x.stride()[:3]) for x in (q, k)) and latent_rows.sequences(q.shape[2], indices.shape[3], sum(latent)) > 0


def launch_on_bytes(q, k, indices, out, lse, place, latent, *, lengths, causal, kv_length, q_start, **given):
    """The same for rows in the fp8 layout: as many sequences at a time as their keys of 16 bits have room for."""
    T, K = q.shape[2], indices.shape[3]
    for b in range(0, len(q), step := latent_rows.sequences(T, K, sum(latent))):
        few = slice(b, b + step)
        some = lambda x: x if x is None or isinstance(x, int) else x[few]  # noqa: B023, E731
        keys, found = latent_rows.launch(k[few], indices[few], str(q.dtype)[6:], place, lengths=some(lengths), causal=causal, kv_length=some(kv_length), q_start=some(q_start), latent=latent)
        launch(q[few], keys, found, out[few], some(lse), place, lengths=some(lengths), causal=False, kv_length=None, q_start=0, **given)


@lru_cache
def constants(causal: bool, from_length: bool, latent: bool = False) -> relaunch.Constants:
    registers = dict(MULTIPLY=208, GATHER=88) if latent else dict(MULTIPLY=232, GATHER=40)
    return relaunch.Constants(CAUSAL=causal, FROM_LENGTH=from_length, LATENT=latent, **registers, num_warps=4, enable_fp_fusion=False)


def launch(q, k, indices, out, lse, place, *, lengths, causal, scale, sink_logits, kv_length, q_start, latent=None):
    """Fills out [B,Hq,T,512] and lse [B,Hq,T] (or None). latent: keys are rows of bytes."""
    (B, Hq, T, _), S, K = q.shape, k.shape[2], indices.shape[3]
    parts, host = -(-Hq // HEADS.value), q_start if isinstance(q_start, int) else None
    items = B * T * parts
    pointers = (q, k, out, lse, indices, lengths, kv_length, None if q_start is None or host is not None else q_start, sink_logits)
    numbers = (*q.stride()[:3], k.stride(0), k.stride(2), Hq, parts, T, S, K, items, host or 0, float(scale))
    relaunch.launch(gather_gluon, (min(items, max(place.sms, 1)),), place, pointers, numbers, constants(bool(causal), q_start is None, latent is not None), (q.dtype,))


def resources() -> Resources:
    slots, row = 1 + STAGES.value, 2 * (2 * HALF.value + ROTARY.value)
    return Resources(threads=384, shared=slots * KEYS.value * row + 4 * STAGES.value * KEYS.value + 512, registers=168)


def artifacts(problem) -> list[dict]:
    before = latent_rows.artifacts(problem) if latent_of(problem) is not None else []
    has, pointer = (problem.features & {"sink"} if before else problem.features).__contains__, POINTER[problem.dtype("q")]  # of keys that were made for it all else has been said
    made = dict(constants(has("causal"), has("kv_length") and not has("q_start")))
    options = {name: made.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    names = ["indices", "lengths"] + ["kv_length"] * has("kv_length") + ["q_starts"] * has("q_start")
    pointers = dict(q=pointer, k=pointer, out=pointer, lse="*fp32") | {name: "*i32" for name in names} | ({"sinks": "*fp32"} if has("sink") else {})
    strides = ("sqb", "sqh", "sqt", "skb", "sks")
    signature = pointers | {name: "i32" for name in strides + ("Hq", "parts", "T", "S", "K", "items", "q_start")} | {"scale": "fp32"}
    return [*before, dict(fn=gather_gluon, signature=signature, constexprs=made, options=options, div16=tuple(pointers) + strides)]
