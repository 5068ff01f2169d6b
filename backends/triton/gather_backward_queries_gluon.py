"""Path "gluon" of gather_attention_backward, queries: dQ, and what the keys' kernel needs: probabilities, dS, and for each key a bound of the sum of all contributions to it.

An item is one query and up to 64 heads. `gather` brings it and tiles of 32 keys into two slots (holes are zeros there), `score` makes probabilities and dS, `mix` holds the 64 x 576
sums of dQ in eight warps and sends both to the scratch through the copy engine: [query, group of GROUP blocks of 64 heads, tile of 64 keys, head of the group, key].
"""
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from sparsetile.backends.triton.gluon_items import limit_of

HEADS = gl.constexpr(64)
KEYS = gl.constexpr(32)
LATENT = gl.constexpr(512)
ROTARY = gl.constexpr(64)
SLOTS = gl.constexpr(2)
COPIERS = gl.constexpr(128)  # threads of `gather`, each of which arrives


@gluon.jit
def query_of(y, T, K, first, some, lengths):
    """Query y among those of a chunk: (batch, query, line of its list, how many entries)."""
    b = y // some
    t = first + y - b * some
    line = b * T + t
    count = K
    if lengths is not None:
        count = gl.minimum(gl.maximum(gl.load(lengths + line), 0), K)
    return b, t, line.to(gl.int64) * K, count


@gluon.jit
def item_of(number, sizes, lengths):
    """(batch, query, query among the chunk's, part of its heads, line of its list, how many entries)."""
    Hq, parts, T, S, K, first, some = sizes
    y = number // parts
    b, t, line, count = query_of(y, T, K, first, some, lengths)
    return b, t, y, number - y * parts, line, count


@gluon.jit
def _copy(tile, rows, ok, COL: gl.constexpr, B: gl.constexpr):
    c = COL + gl.arange(0, tile.shape[1], gl.SliceLayout(0, B))
    async_copy.async_copy_global_to_shared(tile, gl.expand_dims(rows, 1) + gl.expand_dims(c, 0), mask=gl.expand_dims(ok, 1), cache_modifier=".cg")


@gluon.jit
def gather(q_map, r_map, o_map, k, indices, lengths, at, sizes, skb, sks, items, CAUSAL: gl.constexpr, FROM_LENGTH: gl.constexpr, q_tiles, k_tiles, found, bars):
    B: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    Hq, parts, T, S, K, first_query, some = sizes
    q_full, q_free, full, ready, free = bars
    r = gl.arange(0, KEYS, gl.SliceLayout(1, B))
    n = 0
    j = 0
    for it in range(gl.program_id(0), items, gl.num_programs(0)):
        b, t, y, part, line, count = item_of(items - 1 - it, sizes, lengths)  # late queries have long rows: first
        if count > 0:
            limit = limit_of(b, t, at, T, S, CAUSAL, FROM_LENGTH)
            mbarrier.wait(q_free, (j & 1) ^ 1)
            mbarrier.expect(q_full, 2 * HEADS * (2 * LATENT + ROTARY))
            tma.async_copy_global_to_shared(q_map, [b, t, part * HEADS, 0], q_full, q_tiles[0].index(0))
            tma.async_copy_global_to_shared(r_map, [b, t, part * HEADS, LATENT], q_full, q_tiles[1].index(0))
            tma.async_copy_global_to_shared(o_map, [b, t, part * HEADS, 0], q_full, q_tiles[2].index(0))
            j += 1
            keys = k + b.to(gl.int64) * skb
            entry = gl.load(indices + line + r, mask=r < count, other=-1)
            for first in range(0, count, KEYS):
                s = n % SLOTS
                ok = (entry >= 0) & (entry < limit)
                key = gl.where(ok, entry, -1)
                rows = keys + gl.where(ok, entry, 0).to(gl.int64) * sks
                entry = gl.load(indices + line + first + KEYS + r, mask=first + KEYS + r < count, other=-1)  # asked for a tile ahead
                mbarrier.wait(free.index(s), ((n // SLOTS) & 1) ^ 1)
                found.index(s).store(key)
                _copy(k_tiles[0].index(s), rows, ok, 0, B)
                _copy(k_tiles[1].index(s), rows, ok, LATENT, B)
                async_copy.mbarrier_arrive(full.index(s), increment_count=False)
                gl.thread_barrier()
                mbarrier.arrive(full.index(s))
                n += 1


@gluon.jit
def _add_bound(bounds, x, key, rows):
    """Positive floats add up in eight integers, by the upper three bits of their exponents, rounded up to 9 bits; a ninth counts those that are not finite."""
    bits = x.to(gl.int32, bitcast=True) & 0x7fffffff
    e = bits >> 23
    finite = e < 255
    value = gl.where(finite, (((bits & 0x7fffff) >> 15) + 257).to(gl.int64) << (e & 31).to(gl.int64), 1)
    gl.atomic_add(bounds + gl.where(finite, e >> 5, 8).to(gl.int64) * rows + key, value, mask=(key >= 0) & (bits > 0), sem="relaxed")


@gluon.jit
def score(lse, delta, lengths, sizes, items, scale, q_tiles, k_tiles, images, found, bars):
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    R: gl.constexpr = gl.SliceLayout(1, L)
    Hq, parts, T, S, K, first_query, some = sizes
    q_full, q_free, full, ready, free = bars
    zero = gl.zeros([HEADS, KEYS], gl.float32, L)
    r = gl.arange(0, HEADS, R)
    kind = q_tiles[0].dtype
    n = 0
    j = 0
    for it in range(gl.program_id(0), items, gl.num_programs(0)):
        b, t, y, part, line, count = item_of(items - 1 - it, sizes, lengths)
        if count > 0:
            exists = r < Hq - part * HEADS
            row = (b.to(gl.int64) * Hq + part * HEADS + gl.where(exists, r, 0)) * T + t
            logs = gl.load(lse + row, mask=exists, other=float("inf"))
            logs = gl.expand_dims(gl.where(gl.abs(logs) != float("inf"), logs, float("inf")), 1)
            shift = gl.expand_dims(gl.load(delta + row, mask=exists, other=0.0), 1)
            mbarrier.wait(q_full, j & 1)
            j += 1
            for first in range(0, count, KEYS):
                s = n % SLOTS
                mbarrier.wait(full.index(s), (n // SLOTS) & 1)
                fence_async_shared()  # copies of threads, read by products
                z = gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r,r", [s], gl.int32, False, 1)  # else 68 descriptors of these tiles are kept in registers, and spill
                st = warpgroup_mma(q_tiles[0].index(z), k_tiles[0].index(s).permute((1, 0)), zero, use_acc=False, is_async=True)
                st = warpgroup_mma(q_tiles[1].index(z), k_tiles[1].index(s).permute((1, 0)), st, is_async=True)
                dt = warpgroup_mma(q_tiles[2].index(z), k_tiles[0].index(s).permute((1, 0)), zero, use_acc=False, is_async=True)
                key = found.index(s).load(gl.SliceLayout(0, L))
                ok = gl.expand_dims(key >= 0, 0)
                x = warpgroup_mma_wait(1, deps=(st, ))
                p = gl.where(ok, gl.exp2((x * scale - logs) * 1.4426950408889634), 0.0)  # as in tiles.rebuilt; beside the other product
                images[0].index(s).store(p.to(kind))
                g = warpgroup_mma_wait(0, deps=(dt, ))
                mbarrier.arrive(q_free, pred=first + KEYS >= count)
                ds = gl.where(ok, p * (g - shift), 0.0)
                images[1].index(s).store(ds.to(kind))
                fence_async_shared()
                gl.thread_barrier()
                mbarrier.arrive(ready.index(s))
                n += 1


@gluon.jit
def mix(dq, p_map, d_map, weights, bounds, rows, lengths, sizes, items, places, scale, GROUP: gl.constexpr, k_tiles, images, found, bars):
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 128, 16])
    E: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16])
    V: gl.constexpr = gl.BlockedLayout([1, 2], [16, 2], [1, 8], [1, 0])  # of sums over heads: a warp has all of four keys
    r = gl.arange(0, HEADS, gl.SliceLayout(1, V))
    Hq, parts, T, S, K, first_query, some = sizes
    q_full, q_free, full, ready, free = bars
    kind = k_tiles[0].dtype
    n = 0
    for it in range(gl.program_id(0), items, gl.num_programs(0)):
        b, t, y, part, line, count = item_of(items - 1 - it, sizes, lengths)
        acc = gl.zeros([HEADS, LATENT], gl.float32, O)
        end = gl.zeros([HEADS, ROTARY], gl.float32, E)
        image = ((y * (parts // GROUP) + part // GROUP) * places * GROUP + part % GROUP) * HEADS
        exists = r < Hq - part * HEADS
        row = weights + 2 * ((b.to(gl.int64) * Hq + part * HEADS + gl.where(exists, r, 0)) * T + t)
        weight = gl.expand_dims(gl.load(row, mask=exists, other=0.0), 1)
        worth = gl.expand_dims(gl.load(row + 1, mask=exists, other=0.0), 1)
        for first in range(0, count, KEYS):
            s = n % SLOTS
            mbarrier.wait(ready.index(s), (n // SLOTS) & 1)
            at = image + first // 64 * (GROUP * HEADS)
            tma.async_copy_shared_to_global(p_map, [at, first % 64], images[0].index(s))
            tma.async_copy_shared_to_global(d_map, [at, first % 64], images[1].index(s))
            ot = warpgroup_mma(images[1].index(s), k_tiles[0].index(s), acc, is_async=True)
            et = warpgroup_mma(images[1].index(s), k_tiles[1].index(s), end, is_async=True)
            bound = gl.sum(images[0].index(s).load(V).to(gl.float32) * worth + gl.abs(images[1].index(s).load(V).to(gl.float32)) * weight, 0)  # beside the products
            _add_bound(bounds + b.to(gl.int64) * S, bound, found.index(s).load(gl.SliceLayout(0, V)), rows)
            acc, end = warpgroup_mma_wait(0, deps=(ot, et))
            tma.store_wait(0)
            gl.thread_barrier()  # both groups of four warps have read the slot
            mbarrier.arrive(free.index(s))
            n += 1
        h = part * HEADS + gl.arange(0, HEADS, gl.SliceLayout(1, O))
        to = dq + ((b.to(gl.int64) * Hq + h) * T + t) * (LATENT + ROTARY)
        gl.store(gl.expand_dims(to, 1) + gl.expand_dims(gl.arange(0, LATENT, gl.SliceLayout(0, O)), 0), (acc * scale).to(kind), mask=gl.expand_dims(h < Hq, 1))
        h = part * HEADS + gl.arange(0, HEADS, gl.SliceLayout(1, E))
        to = dq + ((b.to(gl.int64) * Hq + h) * T + t) * (LATENT + ROTARY) + LATENT
        gl.store(gl.expand_dims(to, 1) + gl.expand_dims(gl.arange(0, ROTARY, gl.SliceLayout(0, E)), 0), (end * scale).to(kind), mask=gl.expand_dims(h < Hq, 1))


@gluon.jit(do_not_specialize=["Hq", "parts", "T", "S", "K", "first", "some", "items", "places", "rows", "q_start"])
def queries_gluon(q_map, r_map, o_map, p_map, d_map, k, dq, lse, delta, weights, bounds, indices, lengths, kv_length, q_starts, skb, sks, Hq, parts, T, S, K, first, some, items, places, rows,
            q_start, scale, GROUP: gl.constexpr, CAUSAL: gl.constexpr, FROM_LENGTH: gl.constexpr):
    """q_map, r_map, o_map: q's first 512 columns, its last 64, and dO as [B,T,Hq,..]; p_map, d_map: both halves of the scratch, [rows, 64]. weights [B,Hq,T,2]."""
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    small: gl.constexpr = gl.NVMMASharedLayout(64, 16, 2)
    B: gl.constexpr = mbarrier.MBarrierLayout()
    kind = k.dtype.element_ty
    q_tiles = (gl.allocate_shared_memory(kind, [1, HEADS, LATENT], tile), gl.allocate_shared_memory(kind, [1, HEADS, ROTARY], tile), gl.allocate_shared_memory(kind, [1, HEADS, LATENT], tile))
    k_tiles = (gl.allocate_shared_memory(kind, [SLOTS, KEYS, LATENT], tile), gl.allocate_shared_memory(kind, [SLOTS, KEYS, ROTARY], tile))
    images = (gl.allocate_shared_memory(kind, [SLOTS, HEADS, KEYS], small), gl.allocate_shared_memory(kind, [SLOTS, HEADS, KEYS], small))
    found = gl.allocate_shared_memory(gl.int32, [SLOTS, KEYS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [1], B)
    q_free = gl.allocate_shared_memory(gl.int64, [1], B)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], B)
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], B)
    free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], B)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_free, count=1)
    for s in gl.static_range(SLOTS):
        mbarrier.init(full.index(s), count=COPIERS + 1)
        mbarrier.init(ready.index(s), count=1)
        mbarrier.init(free.index(s), count=1)
    fence_async_shared()
    sizes = (Hq, parts, T, S, K, first, some)
    bars = (q_full, q_free, full, ready, free)
    gl.warp_specialize([
        (mix, (dq, p_map, d_map, weights, bounds, rows, lengths, sizes, items, places, scale, GROUP, k_tiles, images, found, bars)),
        (score, (lse, delta, lengths, sizes, items, scale, q_tiles, k_tiles, images, found, bars)),
        (gather, (q_map, r_map, o_map, k, indices, lengths, (q_start, q_starts, kv_length), sizes, skb, sks, items, CAUSAL, FROM_LENGTH, q_tiles, k_tiles, found, bars)),
    ], [4, 4], [80, 56])
