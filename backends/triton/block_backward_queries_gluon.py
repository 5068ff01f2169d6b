"""Path "gluon" of block_attention_backward, queries: dQ. An item is a tile of 128 queries of one head; its keys and values pass by, 64 or 128 a step.

A persistent block of threads has five roles, as in the forward: `take` draws items, `bring_keys` loads through the copy engine, `clear` makes keys that no query of the tile sees zero
(0 * NaN), and two groups of `multiply_queries` hold 64 rows each. Full blocks run no mask code, and a group passes over keys that none of its rows sees.
"""
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from sparsetile.backends.triton.block_attention_gluon import bring_tile
from sparsetile.backends.triton.block_backward_steps_gluon import begin_by_query, end_by_query, known, leave, leave_sums
from sparsetile.backends.triton.gluon_items import KEYS, ROWS, cut, make_bars, make_queue, next_item, open_item, section_of, take
from sparsetile.backends.triton.gluon_keys import clear, look, seen_or

READERS = gl.constexpr(4)  # of an item: loading, clearing, two groups


@gluon.jit
def open_rows(number, lists, at, order, Hq, T, S, EDGE: gl.constexpr, FROM_LENGTH: gl.constexpr):
    """`open_item`, but far longer tiles come in sections: the head of a section is so many times `heads` further on as its number says, counted from 1."""
    item, n, slot = cut(number, order)
    head, t, first, plain, kept, count, gap, limit = open_item(item, lists, at, (order[0], order[1], order[2], order[3]), Hq, T, S, EDGE, FROM_LENGTH)
    first, kept, count, gap, before = section_of(first, kept, count, gap, n, gl.where(slot >= 0, order[4], 1))
    return head + (slot + 1) * order[0], t, first, gl.minimum(gl.maximum(plain - before, 0), count), kept, count, gap, limit


@gluon.jit
def bring_keys(maps, cols, heads, Hq, group, D0: gl.constexpr, D1: gl.constexpr, V0: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, queue, memory, q_bars, k_bars, v_bars):
    """Queries and dout of an item, then its keys and values, STEP at a time; keys of a masked block go by way of `clear`."""
    q0, q1, dout, k0, k1, v = maps
    sq0, sq1, sg, sk0, sk1, sv = memory
    q_full, q_free = q_bars
    k_full, k_free, k_landed = k_bars
    v_full, v_free = v_bars
    n = 0
    j = 0
    turn = 0
    head, t, first, plain, kept, count, gap, limit = next_item(0, queue, 1)
    while head >= 0:
        head %= heads
        b = head // Hq
        h = head - b * Hq
        hk = h // group
        if count > 0:
            mbarrier.wait(q_free, (j & 1) ^ 1)
            mbarrier.expect(q_full, 2 * ROWS * (D0 + D1 + V0))
            for w in gl.static_range(2):
                bring_tile(q0, q1, q_full, sq0.index(w), sq1.index(w), [b, h, t + 64 * w, 0], D1)
                tma.async_copy_global_to_shared(dout, [b, h, t + 64 * w, 0], q_full, sg.index(w))
            j += 1
            following = gl.load(cols + first + gl.where(kept == 0, gap, 0))
            for e in range(count):
                row = following * KEYS
                following = gl.load(cols + first + gl.minimum(e + 1, count - 1) + gl.where(e + 1 >= kept, gap, 0))
                for part in gl.static_range(KEYS // STEP):
                    s = n % STAGES
                    phase = ((n // STAGES) & 1) ^ 1
                    at = [b, hk, row + STEP * part, 0]
                    mbarrier.wait(k_free.index(s), phase)
                    if e < plain:
                        mbarrier.expect(k_full.index(s), 2 * STEP * (D0 + D1))
                        bring_tile(k0, k1, k_full.index(s), sk0.index(s), sk1.index(s), at, D1)
                    else:
                        mbarrier.expect(k_landed.index(s), 2 * STEP * (D0 + D1))
                        bring_tile(k0, k1, k_landed.index(s), sk0.index(s), sk1.index(s), at, D1)
                    mbarrier.wait(v_free.index(s), phase)
                    mbarrier.expect(v_full.index(s), 2 * STEP * V0)
                    tma.async_copy_global_to_shared(v, at, v_full.index(s), sv.index(s))
                    n += 1
        turn += 1
        head, t, first, plain, kept, count, gap, limit = next_item(turn, queue, 1)


@gluon.jit
def _quarters_of(entry, kinds, quarters):
    """What turn_kinds says of an entry: all bits of a full block."""
    kind = gl.load(kinds + entry)
    return gl.load(quarters + kind, mask=kind >= 0, other=255)


@gluon.jit
def multiply_queries(W: gl.constexpr, dq_maps, dq, sums, lse, delta, cols, kinds, quarters, tables, heads, T, scale, D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr,
                     STEP: gl.constexpr, STAGES: gl.constexpr, INTERVALS: gl.constexpr, BITMAPS: gl.constexpr, MASKED: gl.constexpr, queue, memory, q_bars, k_bars, v_bars):
    """A group of warps with rows 64 W .. of each item."""
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D0, 16])
    O1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    R: gl.constexpr = gl.SliceLayout(1, L)
    MASKS: gl.constexpr = INTERVALS or BITMAPS
    sq0, sq1, sg, sk0, sk1, sv = memory
    q_full, q_free = q_bars
    k_full, k_free, k_landed = k_bars
    v_full, v_free = v_bars
    kind_of = sv.dtype
    zero = gl.zeros([64, STEP], gl.float32, L)
    r = W * 64 + gl.arange(0, 64, R)
    n = 0
    j = 0
    turn = 0
    head, t, first, plain, kept, count, gap, limit = next_item(0, queue, 4)
    while head >= 0:
        acc = gl.zeros([64, D0], gl.float32, O)
        acc1 = gl.zeros([64, 64], gl.float32, O1)
        slot = head // heads - 1
        head %= heads
        line = head.to(gl.int64) * T
        if count > 0:
            logs, shift = known(lse + line, delta + line, t + r, (t + r >= 0) & (t + r < T))
            mbarrier.wait(q_full, j & 1)
            ahead = 255
            if MASKS:
                if plain == 0:
                    ahead = _quarters_of(first + gl.where(kept == 0, gap, 0), kinds, quarters)
            for e in range(count):
                seen = ahead
                following = -1
                if MASKS:
                    if e + 1 >= plain:
                        following = gl.load(kinds + first + gl.minimum(e + 1, count - 1) + gl.where(e + 1 >= kept, gap, 0))
                for part in gl.static_range(KEYS // STEP):
                    s = n % STAGES
                    phase = (n // STAGES) & 1
                    mbarrier.wait(k_full.index(s), phase)
                    if (seen >> (2 * W + part)) & (1 if STEP == 64 else 3) != 0:
                        st, gt = begin_by_query(memory, W, s, v_full, phase, zero, D1)
                        kind = -1
                        lo, hi = r, r
                        if MASKED:  # while the products run
                            if e >= plain:
                                kind, lo, hi = look(e, first, kept, gap, limit, r, cols, kinds, tables, INTERVALS, True)
                        ds = end_by_query(st, gt, logs, shift, scale, v_free, s)
                        if MASKED:
                            if e >= plain:
                                ds = seen_or(ds, 0.0, kind, lo, hi, r, part * STEP // 32, tables, BITMAPS, L)
                        ds = ds.to(kind_of)
                        at = warpgroup_mma(gl.convert_layout(ds, gl.DotOperandLayout(0, O, 2)), sk0.index(s), acc, is_async=True)
                        if D1:
                            at1 = warpgroup_mma(gl.convert_layout(ds, gl.DotOperandLayout(0, O1, 2)), sk1.index(s), acc1, is_async=True)
                            acc, acc1 = warpgroup_mma_wait(0, deps=(at, at1))
                        else:
                            acc = warpgroup_mma_wait(0, deps=(at, ))
                    else:
                        mbarrier.wait(v_full.index(s), phase)
                        mbarrier.arrive(v_free.index(s))
                    mbarrier.arrive(k_free.index(s))
                    n += 1
                if MASKS:
                    ahead = gl.load(quarters + following, mask=following >= 0, other=255)
        row = t + W * 64
        whole = True
        if sums is not None:
            whole = slot < 0
            if slot >= 0:
                to = sums + slot.to(gl.int64) * (ROWS * (D0 + D1))
                leave_sums(acc * scale, to, W * 64, 0, D0 + D1, O)
                if D1:
                    leave_sums(acc1 * scale, to, W * 64, D0, D0 + D1, O1)
        if whole:
            if (count == 0) | (row < 0):
                leave((acc * scale).to(kind_of), dq, dq_maps[0], head, row, T, None, line, 0, D, O)
                if D1:
                    leave((acc1 * scale).to(kind_of), dq, dq_maps[1], head, row, T, None, line, D0, D, O1)
            else:
                leave((acc * scale).to(kind_of), dq, dq_maps[0], head, row, T, sq0.index(W), line, 0, D, O)
                if D1:
                    leave((acc1 * scale).to(kind_of), dq, dq_maps[1], head, row, T, sq1.index(W), line, D0, D, O1)
        if count > 0:
            tma.store_wait(0)
            mbarrier.arrive(q_free)
            j += 1
        turn += 1
        head, t, first, plain, kept, count, gap, limit = next_item(turn, queue, 4)


@gluon.jit(do_not_specialize=["slb", "slh", "heads", "Hq", "group", "T", "S", "first", "nq", "tiles", "ahead", "sections", "items", "q_start"])
def queries_gluon(q0, q1, dout, k0, k1, v, dq_map0, dq_map1, dq, sums, lse, delta, offsets, cols, kinds, quarters, intervals, bitmaps, list_of, schedule, kv_length, q_starts, ticket,
                  slb, slh, heads, Hq, group, T, S, first, nq, tiles, ahead, sections, items, q_start, scale,
                  D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, V0: gl.constexpr, STEP: gl.constexpr, INTERVALS: gl.constexpr, BITMAPS: gl.constexpr,
                  EDGE: gl.constexpr, FROM_LENGTH: gl.constexpr):
    """q0 .. dq_map1: tensor maps; those of columns 128 on None where D is at most that. quarters: turn_kinds.
    sums: of sections, float32 [section, 128 queries, D0 + D1], or None where nothing is cut."""
    STAGES: gl.constexpr = 2 if STEP == KEYS else 3 if D1 else 4
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    B: gl.constexpr = mbarrier.MBarrierLayout()
    sq0 = gl.allocate_shared_memory(v.dtype, [2, 64, D0], tile)
    sg = gl.allocate_shared_memory(v.dtype, [2, 64, V0], tile)
    sk0 = gl.allocate_shared_memory(v.dtype, [STAGES, STEP, D0], tile)
    sv = gl.allocate_shared_memory(v.dtype, [STAGES, STEP, V0], tile)
    sq1 = sq0
    sk1 = sk0
    if D1:
        sq1 = gl.allocate_shared_memory(v.dtype, [2, 64, D1], tile)
        sk1 = gl.allocate_shared_memory(v.dtype, [STAGES, STEP, D1], tile)
    queue = make_queue(READERS)
    q_full = gl.allocate_shared_memory(gl.int64, [1], B)
    q_free = gl.allocate_shared_memory(gl.int64, [1], B)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_free, count=2)
    k_full, k_free, k_landed, v_full, v_free = make_bars(STAGES, (1, 2, 1, 1, 2))
    fence_async_shared()
    MASKED: gl.constexpr = INTERVALS or BITMAPS or EDGE
    memory = (sq0, sq1, sg, sk0, sk1, sv)
    q_bars = (q_full, q_free)
    k_bars = (k_full, k_free, k_landed)
    v_bars = (v_full, v_free)
    tables = (intervals, bitmaps)
    lists = (offsets, cols, list_of, slb, slh, first, nq, schedule)
    gl.warp_specialize([
        (multiply_queries, (0, (dq_map0, dq_map1), dq, sums, lse, delta, cols, kinds, quarters, tables, heads, T, scale, D, D0, D1, STEP, STAGES,
                            INTERVALS, BITMAPS, MASKED, queue, memory, q_bars, k_bars, v_bars)),
        (multiply_queries, (1, (dq_map0, dq_map1), dq, sums, lse, delta, cols, kinds, quarters, tables, heads, T, scale, D, D0, D1, STEP, STAGES,
                            INTERVALS, BITMAPS, MASKED, queue, memory, q_bars, k_bars, v_bars)),
        (bring_keys, ((q0, q1, dout, k0, k1, v), cols, heads, Hq, group, D0, D1, V0, STEP, STAGES, queue, memory, q_bars, k_bars, v_bars)),
        (take, (gl.constexpr(open_rows), ticket, items, lists, (q_start, q_starts, kv_length), (heads, tiles, ahead, 1, sections), Hq, T, S, EDGE, FROM_LENGTH, queue, False)),
        (clear, (cols, kinds, tables, T, INTERVALS, BITMAPS, MASKED, KEYS // STEP, D1 > 0, STAGES, queue, sk0, sk1, k_full, k_landed)),
    ], [4, 1, 1, 1], [232, 40, 40, 40])
