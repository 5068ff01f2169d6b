"""Path "gluon" of gather_attention_backward, keys: each query's contributions to its keys, scale dS^T Q + P^T dO over its heads, from the scratch that gather_backward_queries_gluon.py left.

An item is one query, a group of up to 128 heads and a third of the columns: 192, as 128 + 64. Two groups of `multiply` take turns of 64 entries: while one multiplies, the other adds;
`bring` loads heads and tiles through the copy engine. Contributions are added as 32-bit integers in a unit of their key, to the same bits in any order; units keep every sum below 2^30.
The copy engine adds whole rows, which Gluon has no word for: each warp stages eight rows of its tile at a time in shared memory of its own.
"""
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from sparsetile.backends.triton.gather_backward_queries_gluon import query_of
from sparsetile.backends.triton.gluon_items import limit_of

ENTRIES = gl.constexpr(64)
WIDTH = gl.constexpr(576)
THIRDS = gl.constexpr(3)
WIDE = gl.constexpr(128)
NARROW = gl.constexpr(64)
STAGES = gl.constexpr(2)  # one for each group
ROW = gl.constexpr(4 * (128 + 64))  # bytes of a staged row
STAGED = 4 * 8 * ROW.value  # bytes of a group: eight rows of each warp
# an area whose address PTX knows, as Gluon's allocations have none; of each group its own, since braces make a scope
RESERVE = gl.constexpr(f"{{ .shared .align 1024 .b8 staged[{STAGED}]; mov.u32 $0, staged; }}")


@gluon.jit
def item_of(number, each, sizes, lengths):
    """(third of the columns, batch, query, query among the chunk's, group of heads, line of its list, how many entries): third by third, so that the sums under way stay in
    the second-level cache; late queries first."""
    groups, T, S, K, first, some = sizes
    third = number // each
    x = each - 1 - (number - third * each)
    y = x // groups
    b, t, line, count = query_of(y, T, K, first, some, lengths)
    return third, b, t, y, x - y * groups, line, count


@gluon.jit
def bring(q_maps, o_maps, p_map, d_map, lengths, sizes, each, items, places, heads, tiles, bars):
    groups, T, S, K, first_query, some = sizes
    loaded, left, full, free = bars
    ROWS: gl.constexpr = heads[0].shape[0]
    n = 0
    j = 0
    for it in range(gl.program_id(0), items, gl.num_programs(0)):
        third, b, t, y, group, line, count = item_of(it, each, sizes, lengths)
        if count > 0:
            c = third * (WIDE + NARROW)
            mbarrier.wait(left, (j & 1) ^ 1)
            mbarrier.expect(loaded, 4 * ROWS * (WIDE + NARROW))
            tma.async_copy_global_to_shared(q_maps[0], [b, t, group * ROWS, c], loaded, heads[0])
            tma.async_copy_global_to_shared(q_maps[1], [b, t, group * ROWS, c + WIDE], loaded, heads[1])
            tma.async_copy_global_to_shared(o_maps[0], [b, t, group * ROWS, c], loaded, heads[2])
            tma.async_copy_global_to_shared(o_maps[1], [b, t, group * ROWS, c + WIDE], loaded, heads[3])  # zeros in the last third: those are no columns of the values
            j += 1
            row = (y * groups + group) * places * ROWS
            for first in range(0, count, ENTRIES):
                s = n % STAGES
                mbarrier.wait(free.index(s), ((n // STAGES) & 1) ^ 1)
                mbarrier.expect(full.index(s), 4 * ROWS * ENTRIES)
                tma.async_copy_global_to_shared(d_map, [row, 0], full.index(s), tiles[0].index(s))
                tma.async_copy_global_to_shared(p_map, [row, 0], full.index(s), tiles[1].index(s))
                row += ROWS
                n += 1


@gluon.jit
def _blocks(x):
    """[32, W / 32, 8, 2, 2]: four blocks of eight columns in turn, from another one on in each row of four, since rows of 768 bytes begin at one bank."""
    low, high = gl.split(x)
    k0, k2 = gl.split(low)
    k1, k3 = gl.split(high)
    Q: gl.constexpr = k0.type.layout
    row = gl.expand_dims(gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(1, gl.SliceLayout(2, Q))), 1), 2)
    odd = (row & 1) != 0
    later = (row & 2) != 0
    s0 = gl.where(odd, k1, k0)
    s1 = gl.where(odd, k2, k1)
    s2 = gl.where(odd, k3, k2)
    s3 = gl.where(odd, k0, k3)
    return gl.where(later, s2, s0), gl.where(later, s3, s1), gl.where(later, s0, s2), gl.where(later, s1, s3)


@gluon.jit
def _halves(x):
    """Of each warp's sixteen rows the first eight and the last eight as `_blocks`: registers only."""
    W: gl.constexpr = x.shape[1]
    low, high = gl.split(gl.permute(gl.reshape(x, [4, 2, 8, W // 32, 2, 2, 8]), (0, 2, 3, 6, 4, 5, 1)))
    return _blocks(gl.reshape(low, [32, W // 32, 8, 2, 2])), _blocks(gl.reshape(high, [32, W // 32, 8, 2, 2]))


@gluon.jit
def _stage(x, to, k: gl.constexpr):
    """Block k of every four, [32, W / 32, 8], as `_blocks` turned it."""
    even, odd = gl.split(gl.reshape(x, [32, x.shape[1] * 4, 2]))
    Q: gl.constexpr = even.type.layout
    row = gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(1, Q)), 1)
    pair = gl.expand_dims(gl.arange(0, even.shape[1], gl.SliceLayout(0, Q)), 0)
    at = to + row * ROW + (pair >> 2) * 128 + ((row + k) & 3) * 32 + (pair & 3) * 8
    gl.inline_asm_elementwise("st.shared.v2.b32 [$1], {$2, $3}; mov.u32 $0, 0;", "=r,r,r,r", [at, even, odd], gl.int32, False, 1)


@gluon.jit
def _send(wide, narrow, staged, sums, e):
    """Eight rows of each warp to where `sums` points, an address in each lane (0: nowhere)."""
    gl.inline_asm_elementwise("cp.async.bulk.wait_group.read 0; bar.warp.sync 0xffffffff; mov.u32 $0, 0;", "=r,r", [e], gl.int32, False, 1)  # what was staged before
    for k in gl.static_range(4):
        _stage(wide[k], staged, k)
        _stage(narrow[k], staged + 4 * WIDE, k)
    row = staged + (e >> 5) * (8 * ROW) + (e & 7) * ROW
    fence_async_shared()
    gl.thread_barrier()  # a warp's rows are its own, but Triton's ptxas drops a barrier of one warp, and with it the wait for the stores
    gl.inline_asm_elementwise("""{ .reg .pred p;
        setp.ne.s64 p, $1, 0;
        @p cp.reduce.async.bulk.global.shared::cta.bulk_group.add.s32 [$1], [$2], 768;
        cp.async.bulk.commit_group;
        mov.u32 $0, 0; }""", "=r,l,r", [sums, row], gl.int32, False, 1)


@gluon.jit
def multiply(W: gl.constexpr, sums, units, indices, lengths, at, sizes, each, items, scale, CAUSAL: gl.constexpr, FROM_LENGTH: gl.constexpr, heads, tiles, bars):
    """A group of warps that takes every other tile."""
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 16])
    M: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, NARROW, 16])
    groups, T, S, K, first_query, some = sizes
    loaded, left, full, free = bars
    zero = gl.zeros([ENTRIES, WIDE], gl.float32, L)
    none = gl.zeros([ENTRIES, NARROW], gl.float32, M)
    r = gl.arange(0, ENTRIES, gl.SliceLayout(1, L))
    e = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    staged = gl.inline_asm_elementwise(RESERVE, "=r,r", [each], gl.int32, False, 1)
    n = 0
    j = 0
    for it in range(gl.program_id(0), items, gl.num_programs(0)):
        third, b, t, y, group, line, count = item_of(it, each, sizes, lengths)
        if count > 0:
            limit = limit_of(b, t, at, T, S, CAUSAL, FROM_LENGTH)
            mbarrier.wait(loaded, j & 1)
            j += 1
            base = sums + b.to(gl.int64) * S * WIDTH + third * (WIDE + NARROW)
            for first in range(((n ^ W) & 1) * ENTRIES, count, 2 * ENTRIES):
                m = n + first // ENTRIES
                s = m % STAGES
                entry = gl.load(indices + line + first + r, mask=first + r < count, other=-1)
                unit = gl.load(units + b.to(gl.int64) * S + entry, mask=(entry >= 0) & (entry < limit), other=0.0)
                mine = first + (e >> 5) * 16 + (e & 7)
                low = gl.load(indices + line + mine, mask=((e & 31) < 8) & (mine < count), other=-1)
                high = gl.load(indices + line + mine + 8, mask=((e & 31) < 8) & (mine + 8 < count), other=-1)
                mbarrier.wait(full.index(s), (m // STAGES) & 1)
                a = tiles[0].index(s).permute((1, 0))
                p = tiles[1].index(s).permute((1, 0))
                x = warpgroup_mma(a, heads[0], zero, use_acc=False, is_async=True)
                z = warpgroup_mma(a, heads[1], none, use_acc=False, is_async=True)
                x, z = warpgroup_mma_wait(0, deps=(x, z))
                x = warpgroup_mma(p, heads[2], x * scale, is_async=True)
                z = warpgroup_mma(p, heads[3], z * scale, is_async=True)
                x, z = warpgroup_mma_wait(0, deps=(x, z))
                mbarrier.arrive(free.index(s))
                x = gl.inline_asm_elementwise("cvt.rni.s32.f32 $0, $1;", "=r,f", [x * gl.expand_dims(unit, 1)], gl.int32, True, 1)
                z = gl.inline_asm_elementwise("cvt.rni.s32.f32 $0, $1;", "=r,f", [z * gl.expand_dims(gl.convert_layout(unit, gl.SliceLayout(1, M)), 1)], gl.int32, True, 1)
                wide = _halves(x)
                narrow = _halves(z)
                _send(wide[0], narrow[0], staged, gl.where((low >= 0) & (low < limit), (base + low.to(gl.int64) * WIDTH).to(gl.int64), 0), e)
                _send(wide[1], narrow[1], staged, gl.where((high >= 0) & (high < limit), (base + high.to(gl.int64) * WIDTH).to(gl.int64), 0), e)
            mbarrier.arrive(left)
            n += (count + ENTRIES - 1) // ENTRIES
    gl.inline_asm_elementwise("cp.async.bulk.wait_group 0; mov.u32 $0, 0;", "=r,r", [e], gl.int32, False, 1)


@gluon.jit(do_not_specialize=["groups", "T", "S", "K", "first", "some", "each", "items", "places", "q_start"])
def keys_gluon(q0_map, q1_map, o0_map, o1_map, p_map, d_map, sums, units, indices, lengths, kv_length, q_starts, groups, T, S, K, first, some, each, items, places, q_start, scale,
               ROWS: gl.constexpr, CAUSAL: gl.constexpr, FROM_LENGTH: gl.constexpr):
    """q0_map .. o1_map: q and dO as [B,T,Hq,..] in blocks of 128 and of 64 columns; p_map, d_map: both halves of the scratch, [rows, 64]. sums: int32 [B,S,576]."""
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    B: gl.constexpr = mbarrier.MBarrierLayout()
    kind = q0_map.dtype
    heads = (gl.allocate_shared_memory(kind, [ROWS, WIDE], layout), gl.allocate_shared_memory(kind, [ROWS, NARROW], layout),
             gl.allocate_shared_memory(kind, [ROWS, WIDE], layout), gl.allocate_shared_memory(kind, [ROWS, NARROW], layout))
    tiles = (gl.allocate_shared_memory(kind, [STAGES, ROWS, ENTRIES], layout), gl.allocate_shared_memory(kind, [STAGES, ROWS, ENTRIES], layout))
    loaded = gl.allocate_shared_memory(gl.int64, [1], B)
    left = gl.allocate_shared_memory(gl.int64, [1], B)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
    mbarrier.init(loaded, count=1)
    mbarrier.init(left, count=2)
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(free.index(s), count=1)
    fence_async_shared()
    sizes = (groups, T, S, K, first, some)
    at = (q_start, q_starts, kv_length)
    bars = (loaded, left, full, free)
    gl.warp_specialize([
        (multiply, (0, sums, units, indices, lengths, at, sizes, each, items, scale, CAUSAL, FROM_LENGTH, heads, tiles, bars)),
        (multiply, (1, sums, units, indices, lengths, at, sizes, each, items, scale, CAUSAL, FROM_LENGTH, heads, tiles, bars)),
        (bring, ((q0_map, q1_map), (o0_map, o1_map), p_map, d_map, lengths, sizes, each, items, places, heads, tiles, bars)),
    ], [4, 1], [232, 40])
