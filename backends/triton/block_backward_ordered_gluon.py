"""Path "gluon_ordered" of block_attention_backward: five products in one pass, dQ added in float32 in a fixed order. D 65 to 128.

An item is a block of 128 keys of a key head: keys and values stay in shared memory, dK and dV in registers, while the query tiles that see it pass by, 64 rows a step, head after head of the
group or all of them `abreast` at a tile: head after head, an item with fewer rows than its neighbour comes to the next head before it, and waits. Items are taken by a ticket, key blocks of
a head ascending, and a row's sum is added to in that order, whatever the order in which an item walks its rows and heads: of the items not finished the one with the lowest ticket waits for
nobody, and some block of threads holds it. How many come before an addition (its rank) is known from the lists (block_backward_order.py).

A persistent block of threads has six roles: `take` and `bring_queries` draw and load items (block_backward_ordered_rows_gluon.py), two warps `add` halves of dQ to its sums through the copy engine, two groups of
`multiply_ordered` hold 64 keys each. Each makes half the columns of dQ, from both groups' dS, a step late.
"""
import triton.experimental.gluon.language as gl
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from sparsetile.backends.triton.block_backward_keys_gluon import STEP
from sparsetile.backends.triton.block_backward_order import following
from sparsetile.backends.triton.block_backward_ordered_rows_gluon import bring_queries, seen_by
from sparsetile.backends.triton.block_backward_steps_gluon import leave, exist, probabilities
from sparsetile.backends.triton.gluon_items import KEYS, ROWS, drawn, make_bars, make_queue, next_item, place_of, take
from sparsetile.backends.triton.tiles import queries_of

READERS = gl.constexpr(5)  # of an item: loading, two that add, two groups
STAGES = gl.constexpr(2)  # of queries, dout, dS and dQ: the halves of a query tile


@builtin
def _add_shared_to_global(to, at, source, _semantic=None):
    """tma.async_copy_shared_to_global, but adds; Triton 3.6 has no name for it in Gluon."""
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, to.handle, _semantic._convert_to_ir_values(at, require_i64=False), source.handle)


@gluon.jit
def open_ordered(number, lists, at, order, Hk, T, S, EDGE: gl.constexpr, FROM_LENGTH: gl.constexpr):
    """An item as `open_block` has it, but its entries are those of the walk, one after the other."""
    offsets, entries, list_of, slb, slh, first, nq, nk, group, ascending = lists
    head, block = drawn(number, order)
    block = gl.where(ascending > 0, order[1] - 1 - block, block)
    b = head // Hk
    which = gl.load(list_of + b * slb + (head - b * Hk) * group * slh)
    limit, start = place_of(b, T, S, at, FROM_LENGTH)
    a, e, m, c = queries_of(gl.where(block * KEYS < limit, block, nk), which, offsets, entries, start, T, first, nq, nk, ROWS, EDGE)
    line = offsets + 2 * (which.to(gl.int64) * nk + gl.minimum(block, nk - 1))
    begin = gl.load(line)
    middle = gl.load(line + 1)
    skipped = gl.where(ascending > 0, a - begin + m - middle, middle - e + gl.load(line + 2) - c)
    count = e - a + c - m
    return head, block, gl.where(count > 0, begin + skipped, 0), e - a, count, 0, limit, first * ROWS - start


@gluon.jit
def _wait_turn(at, rank):
    """Until so many additions are complete, for the copy engine too."""
    done = gl.inline_asm_elementwise("ld.acquire.gpu.global.s32 $0, [$1];", "=r,l", [at], gl.int32, False, 1)
    while done != rank:
        done = gl.inline_asm_elementwise("ld.acquire.gpu.global.s32 $0, [$1];", "=r,l", [at], gl.int32, False, 1)
    gl.inline_asm_elementwise("fence.proxy.async.global; mov.b32 $0, $1;", "=r,r", [done], gl.int32, False, 1)


@gluon.jit
def _end_turn(at, done):
    """Once this warp's additions are complete: tma.store_wait waits until they are read."""
    gl.inline_asm_elementwise("cp.async.bulk.wait_group 0; bar.warp.sync 0xffffffff; st.release.gpu.global.s32 [$1], $2; mov.b32 $0, $2;", "=r,l,r", [at, done], gl.int32, False, 1)


@gluon.jit
def add(half: gl.constexpr, sums, turns, walk, ranks, group, abreast, tiles, queue, dq, full, free):
    """A warp that adds dQ of one half of each tile when its turn has come; the first addition stores."""
    n = 0
    turn = 0
    head, block, first, plain, count, gap, limit, row0 = next_item(0, queue, 1)
    while head >= 0:
        m = 0
        e = 0
        rank = gl.load(ranks + first)
        row = gl.load(walk + first)
        for _ in range(count * group):
            step = 2 * ((head * group + m) * tiles + (row0 + row * ROWS + ROWS - 1) // ROWS) + half
            now = rank
            m, e = following(m, e, count, group, abreast)
            rank = gl.load(ranks + first + e)
            row = gl.load(walk + first + e)  # before it waits: its release would wait for loads under way
            _wait_turn(turns + step, now)
            mbarrier.wait(full, n & 1)
            for w in gl.static_range(2):
                columns = dq.index(2 * half + w)._reinterpret(gl.float32, [2, STEP, 32], dq.layout)  # 32 columns lie together
                for c in gl.static_range(2):
                    if now == 0:
                        tma.async_copy_shared_to_global(sums, [(4 * step + 2 * w + c) * STEP, 0], columns.index(c))
                    else:
                        _add_shared_to_global(sums, [(4 * step + 2 * w + c) * STEP, 0], columns.index(c))
            tma.store_wait(0)
            mbarrier.arrive(free)
            _end_turn(turns + step, now + 1)
            n += 1
        turn += 1
        head, block, first, plain, count, gap, limit, row0 = next_item(turn, queue, 1)


@gluon.jit
def _zero(n):
    """Not known before a step: else the descriptors of all tiles are kept in registers, and spill."""
    return gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r,r", [n], gl.int32, False, 1)


@gluon.jit
def _rare(x):
    """x, where only some tiles come: what has no effect but its result would be computed for all of them."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], gl.float32, False, 1)


@gluon.jit
def _queries(W: gl.constexpr, half: gl.constexpr, z, ds, sk, O: gl.constexpr):
    """This group's columns of dQ of a step, from both groups' keys: two products under way."""
    zero = gl.zeros([STEP, 64], gl.float32, O)
    for w in gl.static_range(2):
        columns = sk.index(w + z)._reinterpret(sk.dtype, [2, 64, 64], sk.layout).index(W + z)  # 64 columns lie together
        zero = warpgroup_mma(ds.index(2 * half + w + z).permute((1, 0)), columns, zero, use_acc=w > 0, is_async=True)
    return zero


@gluon.jit
def multiply_ordered(W: gl.constexpr, dk_map, dv_map, dk, dv, walk, kinds, tables, group, abreast, T, S, scale, D: gl.constexpr, DV: gl.constexpr, V0: gl.constexpr,
                     INTERVALS: gl.constexpr, BITMAPS: gl.constexpr, queue, memory, rows, images, k_bars, q_bars, ds_full, dq_bars):
    """A group of warps with keys 64 W .. of each item. Rows are keys, columns queries."""
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16])
    OK: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    OV: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V0, 16])
    C: gl.constexpr = gl.SliceLayout(0, L)
    sq, sg, sk, sv = memory
    sl, sd = rows
    ds_tiles, dq_tiles = images
    k_full, k_free, k_done = k_bars
    q_full, q_free = q_bars
    dq_full, dq_free = dq_bars
    kind_of = sk.dtype
    zero = gl.zeros([64, STEP], gl.float32, L)
    r = gl.arange(0, STEP, C)
    n = 0
    j = 0
    turn = 0
    head, block, first, full, count, gap, limit, row0 = next_item(0, queue, 4)
    while head >= 0:
        acc_k = gl.zeros([64, 128], gl.float32, OK)
        acc_v = gl.zeros([64, V0], gl.float32, OV)
        left = limit - block * KEYS
        if count > 0:
            mbarrier.wait(k_full.index(0), j & 1)
            m = 0
            e = 0
            for i in range(count * group):
                for half in gl.static_range(2):
                    mbarrier.wait(q_full.index(half), n & 1)
                    z = _zero(n)
                    st = warpgroup_mma(sk.index(W + z), sq.index(half + z).permute((1, 0)), zero, use_acc=False, is_async=True)
                    mbarrier.wait(ds_full.index(1 - half), (n - 1 + half) & 1)  # of the step before; before an item's first step there is none, and what comes of it is left
                    dt = _queries(W, 1 - half, z, ds_tiles, sk, L)
                    if half == 0:  # while products run
                        kind = gl.load(kinds + first + e)
                        t0 = row0 + gl.load(walk + first + e) * ROWS
                        masked = (kind >= 0) | (t0 < 0) | (t0 + ROWS > T) | (left < KEYS)
                    logs = gl.expand_dims(sl.index(half).load(C), 0)
                    x = warpgroup_mma_wait(2, deps=(st, ))
                    p = probabilities(x, logs, scale)
                    if masked:
                        t = t0 + STEP * half + r
                        seen = seen_by(W, kind, r + STEP * half, (t >= 0) & (t < T), left, tables, INTERVALS, BITMAPS, L)
                        p = gl.where(seen, p, 0.0)
                    pt = gl.convert_layout(p.to(kind_of), gl.DotOperandLayout(0, OV, 2))
                    y = warpgroup_mma_wait(0, deps=(dt, ))
                    later = (i + half) > 0
                    if later:
                        mbarrier.wait(dq_free.index(1 - half), (n + half) & 1)
                        dq_tiles.index(2 * (1 - half) + W).store(y)
                    less = gl.expand_dims(sd.index(half).load(C), 0) + zero
                    gt = warpgroup_mma(sv.index(W + z), sg.index(half + z).permute((1, 0)), less, is_async=True)
                    vt = warpgroup_mma(pt, sg.index(half + z), acc_v, is_async=True)
                    grad = warpgroup_mma_wait(1, deps=(gt, ))
                    g = p * grad
                    if masked:
                        g = gl.where(p != 0, _rare(g), 0.0)
                    ds = g.to(kind_of)
                    ds_tiles.index(2 * half + W).store(ds)  # free: the other group wrote its dS of the step before after its dQ of the step before that
                    kt = warpgroup_mma(gl.convert_layout(ds, gl.DotOperandLayout(0, OK, 2)), sq.index(half + z), acc_k, is_async=True)
                    fence_async_shared()
                    mbarrier.arrive(ds_full.index(half))
                    mbarrier.arrive(dq_full.index(1 - half), pred=later)
                    acc_v, acc_k = warpgroup_mma_wait(0, deps=(vt, kt))
                    mbarrier.arrive(q_free.index(half))
                m, e = following(m, e, count, group, abreast)
                n += 1
            mbarrier.wait(ds_full.index(1), (n - 1) & 1)
            y = warpgroup_mma_wait(0, deps=(_queries(W, 1, _zero(n), ds_tiles, sk, L), ))
            mbarrier.wait(dq_free.index(1), n & 1)
            dq_tiles.index(2 + W).store(y)
            fence_async_shared()
            mbarrier.arrive(dq_full.index(1))
            mbarrier.arrive(k_done)
            mbarrier.wait(k_done, j & 1)  # the other group has read these keys for the last time
            j += 1
        row = block * KEYS + W * 64
        yk = gl.where(exist(row, limit, OK), acc_k * scale, 0.0).to(kind_of)
        yv = gl.where(exist(row, limit, OV), acc_v, 0.0).to(kind_of)
        line = head.to(gl.int64) * S
        if count == 0:
            leave(yk, dk, dk_map, head, row, S, None, line, 0, D, OK)
            leave(yv, dv, dv_map, head, row, S, None, line, 0, DV, OV)
        else:
            leave(yk, dk, dk_map, head, row, S, sk.index(W), line, 0, D, OK)
            leave(yv, dv, dv_map, head, row, S, sv.index(W), line, 0, DV, OV)
            tma.store_wait(0)
            mbarrier.arrive(k_free.index(0))
        turn += 1
        head, block, first, full, count, gap, limit, row0 = next_item(turn, queue, 4)


@gluon.jit(do_not_specialize=["slb", "slh", "heads", "Hk", "group", "T", "S", "first", "nq", "nk", "tiles", "q_tiles", "together", "ascending", "abreast", "items", "q_start"])
def ordered_gluon(q, dout, k, v, dk_map, dv_map, sums, dk, dv, lse, delta, offsets, entries, walk, kinds, ranks, turns, intervals, bitmaps, list_of, kv_length, q_starts, ticket,
                  slb, slh, heads, Hk, group, T, S, first, nq, nk, tiles, q_tiles, together, ascending, abreast, items, q_start, scale,
                  D: gl.constexpr, DV: gl.constexpr, D0: gl.constexpr, V0: gl.constexpr, INTERVALS: gl.constexpr, BITMAPS: gl.constexpr, EDGE: gl.constexpr, FROM_LENGTH: gl.constexpr):
    """q, dout, k, v, dk_map, dv_map: tensor maps, 64 rows each; sums: of float32 [heads, q_tiles, half, columns / 32, 64 rows, 32 columns], 64 x 32.
    offsets, entries: the lists by key; walk, kinds, ranks: block_backward_order.py.
    turns: zeros, [heads, q_tiles, 2]."""
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    sk = gl.allocate_shared_memory(k.dtype, [2, 64, D0], tile)
    sv = gl.allocate_shared_memory(k.dtype, [2, 64, V0], tile)
    sq = gl.allocate_shared_memory(k.dtype, [STAGES, STEP, D0], tile)
    sg = gl.allocate_shared_memory(k.dtype, [STAGES, STEP, V0], tile)
    ds = gl.allocate_shared_memory(k.dtype, [2 * STAGES, 64, STEP], tile)
    dq = gl.allocate_shared_memory(gl.float32, [2 * STAGES, STEP, 64], gl.NVMMASharedLayout(128, 32, 2))
    sl = gl.allocate_shared_memory(gl.float32, [STAGES, STEP], line)
    sd = gl.allocate_shared_memory(gl.float32, [STAGES, STEP], line)
    queue = make_queue(READERS)
    k_full, k_free, k_landed = make_bars(1, (1, 2, 1))
    k_done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(k_done, count=2)
    q_full, q_free, ds_full, dq_full, dq_free = make_bars(STAGES, (2, 2, 2, 2, 1))
    fence_async_shared()
    memory = (sq, sg, sk, sv)
    rows = (sl, sd)
    images = (ds, dq)
    k_bars = (k_full, k_free, k_done)
    q_bars = (q_full, q_free)
    dq_bars = (dq_full, dq_free)
    tables = (intervals, bitmaps)
    lists = (offsets, entries, list_of, slb, slh, first, nq, nk, group, ascending)
    gl.warp_specialize([
        (multiply_ordered, (0, dk_map, dv_map, dk, dv, walk, kinds, tables, group, abreast, T, S, scale, D, DV, V0, INTERVALS, BITMAPS, queue,
                            memory, rows, images, k_bars, q_bars, ds_full, dq_bars)),
        (multiply_ordered, (1, dk_map, dv_map, dk, dv, walk, kinds, tables, group, abreast, T, S, scale, D, DV, V0, INTERVALS, BITMAPS, queue,
                            memory, rows, images, k_bars, q_bars, ds_full, dq_bars)),
        (bring_queries, ((q, dout, k, v), lse, delta, walk, kinds, tables, Hk, group, abreast, T, D0, V0, STAGES, INTERVALS, BITMAPS, queue, memory, rows,
                         (k_full.index(0), k_free.index(0), k_landed.index(0)), q_bars)),
        (take, (gl.constexpr(open_ordered), ticket, items, lists, (q_start, q_starts, kv_length), (heads, tiles, 0, together), Hk, T, S, EDGE, FROM_LENGTH, queue, True)),
        (add, (0, sums, turns, walk, ranks, group, abreast, q_tiles, queue, dq, dq_full.index(0), dq_free.index(0))),
        (add, (1, sums, turns, walk, ranks, group, abreast, q_tiles, queue, dq, dq_full.index(1), dq_free.index(1))),
    ], [4, 1, 1, 1, 1], [240, 24, 24, 24, 24])
