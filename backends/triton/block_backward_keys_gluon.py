"""Path "gluon" of block_attention_backward, keys: dK and dV. An item is a block of 128 keys of a key head; the queries that see it pass by, 64 a step, head after head of the group.

A persistent block of threads has four roles: `take` draws items, `bring_queries` loads, through the copy engine where it can, the next item's keys ahead, and two groups of `multiply_keys`
hold 64 keys each. Full blocks run no mask code.
"""
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from sparsetile.backends.triton.block_attention_gluon import bring_tile, clear_word, key_range, key_word
from sparsetile.backends.triton.block_backward_queries_gluon import known, leave, probabilities
from sparsetile.backends.triton.gluon_items import KEYS, ROWS, drawn, item_at, make_queue, next_item, place_of, take
from sparsetile.backends.triton.tiles import queries_of

STEP = gl.constexpr(64)  # queries
READERS = gl.constexpr(3)  # of an item: loading, two groups


@gluon.jit
def open_block(number, lists, at, order, Hk, T, S, EDGE: gl.constexpr, FROM_LENGTH: gl.constexpr):
    """An item as eight integers: key head (batch * Hk + head), block, first entry, how many are full, how many there are, what lies between, keys that exist, query of row 0 of query tile 0."""
    offsets, entries, list_of, slb, slh, first, nq, nk, group, schedule = lists
    head, block = drawn(number, order)
    b = head // Hk
    which = gl.load(list_of + b * slb + (head - b * Hk) * group * slh)
    if schedule is not None:
        block = gl.load(schedule + which * nk + block)
    limit, start = place_of(b, T, S, at, FROM_LENGTH)
    a, e, m, c = queries_of(gl.where(block * KEYS < limit, block, nk), which, offsets, entries, start, T, first, nq, nk, ROWS, EDGE)
    return head, block, a, e - a, e - a + c - m, m - e, limit, first * ROWS - start


@gluon.jit
def _bring_block(maps, at, bar, memory, u, D0: gl.constexpr, D1: gl.constexpr, V0: gl.constexpr):
    q0, q1, dout, k0, k1, v = maps
    sq0, sq1, sg, sk0, sk1, sv = memory
    mbarrier.expect(bar, 2 * KEYS * (D0 + D1 + V0))
    for w in gl.static_range(2):
        to = [at[0], at[1], at[2] + 64 * w, 0]
        bring_tile(k0, k1, bar, sk0.index(2 * u + w), sk1.index(2 * u + w), to, D1)
        tma.async_copy_global_to_shared(v, to, bar, sv.index(2 * u + w))


@gluon.jit
def _clear_unseen(block, first, count, limit, row0, T, entries, kinds, tables, sk, sv, INTERVALS: gl.constexpr, BITMAPS: gl.constexpr):
    """Keys and values that no query of the call sees become zero: in dQ they would be multiplied (0 * NaN)."""
    r = gl.arange(0, ROWS, gl.BlockedLayout([4], [32], [1], [0]))
    w0 = gl.to_tensor(0).to(gl.uint32)
    w1 = w0
    w2 = w0
    w3 = w0
    for e in range(first, first + count):
        kind = gl.load(kinds + e)
        t = row0 + gl.load(entries + e) * ROWS + r
        lo, hi = key_range(kind, r, tables, INTERVALS)
        hi = gl.where((t >= 0) & (t < T), gl.minimum(hi, limit - block * KEYS), 0)
        w0 |= gl.reduce_or(key_word(kind, lo, hi, r, 0, tables, BITMAPS), 0)
        w1 |= gl.reduce_or(key_word(kind, lo, hi, r, 1, tables, BITMAPS), 0)
        w2 |= gl.reduce_or(key_word(kind, lo, hi, r, 2, tables, BITMAPS), 0)
        w3 |= gl.reduce_or(key_word(kind, lo, hi, r, 3, tables, BITMAPS), 0)
    for x in gl.static_range(2):
        to = (sk, sv)[x]
        clear_word(w0, 0, to.index(0))
        clear_word(w1, 1, to.index(0))
        clear_word(w2, 0, to.index(1))
        clear_word(w3, 1, to.index(1))
    fence_async_shared()


@gluon.jit
def known_rows(lse, delta, line, t, T):
    """What is known of a step's rows t .. of a head: lse, +inf (P = 0) where a row is not there, sees no key, or its sink holds all, and -delta. The copy engine would bring it only where
    a row's address is a multiple of 16 bytes (T and first query multiples of four); elsewhere it raises an illegal instruction."""
    x = t + gl.arange(0, STEP, gl.BlockedLayout([2], [32], [1], [0]))
    logs, shift = known(lse + line, delta + line, x, (x >= 0) & (x < T))
    return logs, -shift


@gluon.jit
def bring_queries(maps, lse, delta, entries, kinds, tables, Hk, group, T, D0: gl.constexpr, D1: gl.constexpr, V0: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr, ORDERED: gl.constexpr,
                  INTERVALS: gl.constexpr, BITMAPS: gl.constexpr, queue, memory, rows, k_bars, q_bars):
    """Keys and values of an item, into one of so many BUFFERS, then queries, dout and what is known of their rows, 64 a step. ORDERED: keys that no query sees
    become zero, and the next item is drawn when all of this one is under way: an item that waits for another to be done would keep those back that wait for it."""
    q0, q1, dout, k0, k1, v = maps
    sq0, sq1, sg, sk0, sk1, sv = memory
    sl, sd = rows
    k_full, k_free, k_landed = k_bars
    q_full, q_free = q_bars
    n = 0
    j = 0
    turn = 0
    landed = 0
    head, block, first, full, count, gap, limit, row0 = item_at(0, queue, 1)
    if not ORDERED:
        mbarrier.arrive(queue[2].index(0))
    while head >= 0:
        b = head // Hk
        hk = head - b * Hk
        if count > 0:
            u = j % BUFFERS
            bar = k_full.index(u)
            some_unseen = False
            if ORDERED:  # blocks all partial, or keys end within
                some_unseen = (full == 0) | (block * KEYS + KEYS > limit)
            mbarrier.wait(k_free.index(u), ((j // BUFFERS) & 1) ^ 1)
            if ORDERED:
                if some_unseen:
                    _bring_block(maps, [b, hk, block * KEYS, 0], k_landed.index(0), memory, u, D0, D1, V0)
                    mbarrier.wait(k_landed.index(0), landed)
                    landed ^= 1
                    _clear_unseen(block, first, count, limit, row0, T, entries, kinds, tables, sk0, sv, INTERVALS, BITMAPS)
                    mbarrier.arrive(bar)
                else:
                    _bring_block(maps, [b, hk, block * KEYS, 0], bar, memory, u, D0, D1, V0)
            else:
                _bring_block(maps, [b, hk, block * KEYS, 0], bar, memory, u, D0, D1, V0)
            j += 1
            for m in range(group):
                h = hk * group + m
                line = (head * group + m).to(gl.int64) * T
                t = row0 + gl.load(entries + first + gl.where(full == 0, gap, 0)) * ROWS
                for e in range(count):
                    following = gl.load(entries + first + gl.minimum(e + 1, count - 1) + gl.where(e + 1 >= full, gap, 0))
                    for half in gl.static_range(2):
                        s = n % STAGES
                        logs, less = known_rows(lse, delta, line, t + STEP * half, T)
                        mbarrier.wait(q_free.index(s), ((n // STAGES) & 1) ^ 1)
                        mbarrier.expect(q_full.index(s), 2 * STEP * (D0 + D1 + V0))
                        bring_tile(q0, q1, q_full.index(s), sq0.index(s), sq1.index(s), [b, h, t + STEP * half, 0], D1)
                        tma.async_copy_global_to_shared(dout, [b, h, t + STEP * half, 0], q_full.index(s), sg.index(s))
                        sl.index(s).store(logs)
                        sd.index(s).store(less)
                        mbarrier.arrive(q_full.index(s))
                        n += 1
                    t = row0 + following * ROWS
        if ORDERED:
            mbarrier.arrive(queue[2].index(turn % 2))
        turn += 1
        head, block, first, full, count, gap, limit, row0 = item_at(turn, queue, 1)
        if not ORDERED:
            mbarrier.arrive(queue[2].index(turn % 2))


@gluon.jit
def seen_by(W: gl.constexpr, kind, r, exists, left, tables, INTERVALS: gl.constexpr, BITMAPS: gl.constexpr, L: gl.constexpr):
    """Which of the queries, columns, see each of this group's keys, rows, of which the block has `left`."""
    intervals, bitmaps = tables
    c = gl.arange(0, 64, gl.SliceLayout(1, L))
    key = gl.expand_dims(c + 64 * W, 1)
    seen = gl.expand_dims(exists, 0) & (key < left)
    if INTERVALS:
        rule = (kind >= 0) & ((kind & 1) == 0)
        both = gl.load(intervals.to(gl.pointer_type(gl.int64), bitcast=True) + gl.where(rule, kind >> 1, 0).to(gl.int64) * ROWS + r)  # two rows in one load
        both = gl.where(rule, both, KEYS << 32)
        seen = seen & (key >= gl.expand_dims(both.to(gl.int32), 0)) & (key < gl.expand_dims((both >> 32).to(gl.int32), 0))
    if BITMAPS:
        if kind >= 0:
            if (kind & 1) == 1:
                at = bitmaps + (kind >> 1).to(gl.int64) * (ROWS * 4) + r * 4 + 2 * W
                words = gl.where(gl.expand_dims(c, 1) >= 32, gl.expand_dims(gl.load(at + 1), 0), gl.expand_dims(gl.load(at), 0))
                seen = seen & ((words >> gl.expand_dims(c & 31, 1)) & 1 != 0)
    return seen


@gluon.jit
def multiply_keys(W: gl.constexpr, dk_maps, dv_map, dk, dv, entries, kinds, tables, group, T, S, scale, D: gl.constexpr, DV: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr,
                  V0: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr, INTERVALS: gl.constexpr, BITMAPS: gl.constexpr, queue, memory, rows, k_bars, q_bars):
    """A group of warps with keys 64 W .. of each item. Rows are keys, columns queries."""
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16])
    OK: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D0, 16])
    OK1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    OV: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V0, 16])
    C: gl.constexpr = gl.SliceLayout(0, L)
    sq0, sq1, sg, sk0, sk1, sv = memory
    sl, sd = rows
    k_full, k_free = k_bars
    q_full, q_free = q_bars
    kind_of = sv.dtype
    zero = gl.zeros([64, STEP], gl.float32, L)
    r = gl.arange(0, STEP, C)
    n = 0
    j = 0
    turn = 0
    head, block, first, full, count, gap, limit, row0 = next_item(0, queue, 4)
    while head >= 0:
        acc_k = gl.zeros([64, D0], gl.float32, OK)
        acc_k1 = gl.zeros([64, 64], gl.float32, OK1)
        acc_v = gl.zeros([64, V0], gl.float32, OV)
        u = j % BUFFERS
        if count > 0:
            mbarrier.wait(k_full.index(u), (j // BUFFERS) & 1)
            if BUFFERS == 2:
                if j > 0:  # the item before: its sums have left shared memory by now, or soon
                    tma.store_wait(0)
                    mbarrier.arrive(k_free.index(1 - u))
            for m in range(group):
                for e in range(count):
                    entry = first + e + gl.where(e >= full, gap, 0)
                    kind = gl.load(kinds + entry)
                    t0 = row0 + gl.load(entries + entry) * ROWS
                    masked = (kind >= 0) | (t0 < 0) | (t0 + ROWS > T)
                    for half in gl.static_range(2):
                        s = n % STAGES
                        mbarrier.wait(q_full.index(s), (n // STAGES) & 1)
                        if D1:  # fewer registers: one product of scores at a time, dV between them
                            st = warpgroup_mma(sk0.index(2 * u + W), sq0.index(s).permute((1, 0)), zero, use_acc=False, is_async=True)
                            st = warpgroup_mma(sk1.index(2 * u + W), sq1.index(s).permute((1, 0)), st, is_async=True)
                            x = warpgroup_mma_wait(0, deps=(st, ))
                            p = probabilities(x, gl.expand_dims(sl.index(s).load(C), 0), scale)
                            if masked:
                                t = t0 + STEP * half + r
                                seen = seen_by(W, kind, r + STEP * half, (t >= 0) & (t < T), KEYS, tables, INTERVALS, BITMAPS, L)
                                p = gl.where(seen, p, 0.0)
                            vt = warpgroup_mma(gl.convert_layout(p.to(kind_of), gl.DotOperandLayout(0, OV, 2)), sg.index(s), acc_v, is_async=True)
                            acc_v = warpgroup_mma_wait(0, deps=(vt, ))
                            less = gl.expand_dims(sd.index(s).load(C), 0) + zero
                            gt = warpgroup_mma(sv.index(2 * u + W), sg.index(s).permute((1, 0)), less, is_async=True)
                            ds = p * warpgroup_mma_wait(0, deps=(gt, ))
                            if masked:
                                ds = gl.where(p > 0, ds, 0.0)
                            ds = ds.to(kind_of)
                            kt = warpgroup_mma(gl.convert_layout(ds, gl.DotOperandLayout(0, OK, 2)), sq0.index(s), acc_k, is_async=True)
                            kt1 = warpgroup_mma(gl.convert_layout(ds, gl.DotOperandLayout(0, OK1, 2)), sq1.index(s), acc_k1, is_async=True)
                            acc_k, acc_k1 = warpgroup_mma_wait(0, deps=(kt, kt1))
                        else:
                            less = gl.expand_dims(sd.index(s).load(C), 0) + zero
                            gt = warpgroup_mma(sv.index(2 * u + W), sg.index(s).permute((1, 0)), less, is_async=True)  # first: its sums begin before any product is under way
                            st = warpgroup_mma(sk0.index(2 * u + W), sq0.index(s).permute((1, 0)), zero, use_acc=False, is_async=True)
                            logs = sl.index(s).load(C)
                            x, grad = warpgroup_mma_wait(0, deps=(st, gt))
                            p = probabilities(x, gl.expand_dims(logs, 0), scale)
                            ds = p * grad
                            if masked:
                                t = t0 + STEP * half + r
                                exists = (t >= 0) & (t < T)
                                seen = seen_by(W, kind, r + STEP * half, exists, KEYS, tables, INTERVALS, BITMAPS, L)
                                p = gl.where(seen, p, 0.0)
                                ds = gl.where(seen, ds, 0.0)
                            vt = warpgroup_mma(gl.convert_layout(p.to(kind_of), gl.DotOperandLayout(0, OV, 2)), sg.index(s), acc_v, is_async=True)
                            ds = ds.to(kind_of)
                            kt = warpgroup_mma(gl.convert_layout(ds, gl.DotOperandLayout(0, OK, 2)), sq0.index(s), acc_k, is_async=True)
                            acc_v, acc_k = warpgroup_mma_wait(0, deps=(vt, kt))
                        mbarrier.arrive(q_free.index(s))
                        n += 1
        row = block * KEYS + W * 64
        there_k = gl.expand_dims(row + gl.arange(0, 64, gl.SliceLayout(1, OK)) < limit, 1)
        there_v = gl.expand_dims(row + gl.arange(0, 64, gl.SliceLayout(1, OV)) < limit, 1)
        yk = gl.where(there_k, acc_k * scale, 0.0).to(kind_of)
        there_1 = gl.expand_dims(row + gl.arange(0, 64, gl.SliceLayout(1, OK1)) < limit, 1)
        yk1 = gl.where(there_1, acc_k1 * scale, 0.0).to(kind_of)
        yv = gl.where(there_v, acc_v, 0.0).to(kind_of)
        line = head.to(gl.int64) * S
        if count == 0:
            leave(yk, dk, dk_maps[0], head, row, S, None, line, 0, D, OK)
            leave(yv, dv, dv_map, head, row, S, None, line, 0, DV, OV)
            if D1:
                leave(yk1, dk, dk_maps[1], head, row, S, None, line, D0, D, OK1)
        else:
            leave(yk, dk, dk_maps[0], head, row, S, sk0.index(2 * u + W), line, 0, D, OK)
            leave(yv, dv, dv_map, head, row, S, sv.index(2 * u + W), line, 0, DV, OV)
            if D1:
                leave(yk1, dk, dk_maps[1], head, row, S, sk1.index(2 * u + W), line, D0, D, OK1)
            if BUFFERS == 1:
                tma.store_wait(0)
                mbarrier.arrive(k_free.index(0))
            j += 1
        turn += 1
        head, block, first, full, count, gap, limit, row0 = next_item(turn, queue, 4)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["slb", "slh", "heads", "Hk", "group", "T", "S", "first", "nq", "nk", "tiles", "ahead", "items", "q_start"])
def keys_gluon(q0, q1, dout, k0, k1, v, dk_map0, dk_map1, dv_map, dk, dv, lse, delta, offsets, entries, kinds, intervals, bitmaps, list_of, schedule, kv_length, q_starts, ticket,
               slb, slh, heads, Hk, group, T, S, first, nq, nk, tiles, ahead, items, q_start, scale,
               D: gl.constexpr, DV: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, V0: gl.constexpr, STAGES: gl.constexpr, INTERVALS: gl.constexpr, BITMAPS: gl.constexpr, EDGE: gl.constexpr,
               FROM_LENGTH: gl.constexpr):
    """q0 .. dv_map: tensor maps, 64 rows each; those of columns 128 on None where D is at most that. offsets, entries, kinds: the lists by key."""
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    B: gl.constexpr = mbarrier.MBarrierLayout()
    BUFFERS: gl.constexpr = 1 if D1 else 2  # keys and values of this item, and of the next where there is room
    sk0 = gl.allocate_shared_memory(v.dtype, [2 * BUFFERS, 64, D0], tile)
    sv = gl.allocate_shared_memory(v.dtype, [2 * BUFFERS, 64, V0], tile)
    sq0 = gl.allocate_shared_memory(v.dtype, [STAGES, STEP, D0], tile)
    sg = gl.allocate_shared_memory(v.dtype, [STAGES, STEP, V0], tile)
    sq1 = sq0
    sk1 = sk0
    if D1:
        sq1 = gl.allocate_shared_memory(v.dtype, [STAGES, STEP, D1], tile)
        sk1 = gl.allocate_shared_memory(v.dtype, [2 * BUFFERS, 64, D1], tile)
    sl = gl.allocate_shared_memory(gl.float32, [STAGES, STEP], line)
    sd = gl.allocate_shared_memory(gl.float32, [STAGES, STEP], line)
    queue = make_queue(READERS)
    k_full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], B)
    k_free = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], B)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
    q_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
    for u in gl.static_range(BUFFERS):
        mbarrier.init(k_full.index(u), count=1)
        mbarrier.init(k_free.index(u), count=2)
    for s in gl.static_range(STAGES):
        mbarrier.init(q_full.index(s), count=2)
        mbarrier.init(q_free.index(s), count=2)
    fence_async_shared()
    memory = (sq0, sq1, sg, sk0, sk1, sv)
    rows = (sl, sd)
    k_bars = (k_full, k_free)
    q_bars = (q_full, q_free)
    tables = (intervals, bitmaps)
    lists = (offsets, entries, list_of, slb, slh, first, nq, nk, group, schedule)
    gl.warp_specialize([
        (multiply_keys, (0, (dk_map0, dk_map1), dv_map, dk, dv, entries, kinds, tables, group, T, S, scale, D, DV, D0, D1, V0, STAGES, BUFFERS,
                         INTERVALS, BITMAPS, queue, memory, rows, k_bars, q_bars)),
        (multiply_keys, (1, (dk_map0, dk_map1), dv_map, dk, dv, entries, kinds, tables, group, T, S, scale, D, DV, D0, D1, V0, STAGES, BUFFERS,
                         INTERVALS, BITMAPS, queue, memory, rows, k_bars, q_bars)),
        (bring_queries, ((q0, q1, dout, k0, k1, v), lse, delta, entries, kinds, tables, Hk, group, T, D0, D1, V0, STAGES, BUFFERS, False,
                         INTERVALS, BITMAPS, queue, memory, rows, (k_full, k_free, None), q_bars)),
        (take, (gl.constexpr(open_block), ticket, items, lists, (q_start, q_starts, kv_length), (heads, tiles, ahead, 1), Hk, T, S, EDGE, FROM_LENGTH, queue, False)),
    ], [4, 1, 1], [240, 24, 24])
