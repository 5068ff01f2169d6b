"""Block attention's backward for Hopper in Gluon, two kernels without atomics: float16 and bfloat16, D and Dv up to 128, blocks of 128 x 128.

`queries` makes dQ: an item is a tile of 128 queries of one head, its keys and values pass by. `keys` makes dK and dV: an item is a block of 128 keys of a key head, the queries that see
it pass by, 64 a step, head after head of the group. Each is a persistent block of threads: a warp draws items by an atomic ticket, one loads them through the copy engine, two groups
multiply 64 rows each, and where keys pass by one more warp makes zero what no query of the tile sees (0 * NaN). Each sum is one group's, in the order of the lists: twice the same call
gives the same bits. Full blocks run no mask code. Scores are rounded as in the portable source (tiles.py), hence as in the forward.
"""
from functools import lru_cache

import triton
import triton.experimental.gluon.language as gl
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparsetile.backends.contract import Resources
from sparsetile.backends.triton import relaunch
from sparsetile.backends.triton.block_attention_gluon import _layout, _look, _Map, _word, ahead, clear
from sparsetile.backends.triton.gluon_items import KEYS, ROWS, make_queue, next_item, take
from sparsetile.backends.triton.launch import POINTER, power, schedule, tiles
from sparsetile.backends.triton.maps import can_map
from sparsetile.backends.triton.tiles import first_from

STAGES = gl.constexpr(2)
STEP, KEY_STAGES = gl.constexpr(64), 3  # queries of a step of `keys`, and how many steps' are under way
READERS = gl.constexpr(4)  # of an item of `queries`: loading, clearing, two groups; one less of `keys`


@triton.jit
def probabilities(raw, lse, scale):
    """The score is rounded first, as the forward rounds it: score - lse is right however large both are."""
    return tl.math.exp2((raw * scale - lse) * 1.4426950408889634)


@gluon.jit
def _known(lse, delta, at, ok):
    """(lse, delta) of rows; lse +inf, hence P = 0, where a row is not there, sees no key, or its sink holds all."""
    logs = gl.load(lse + at, mask=ok, other=float("inf"))
    return gl.where(gl.abs(logs) < float("inf"), logs, float("inf")), gl.load(delta + at, mask=ok, other=0.0)


@gluon.jit
def _leave(y, out, out_map, at, row, rows, through, line, WIDTH: gl.constexpr, L: gl.constexpr):
    """64 rows of a gradient to where they stand: rows row .. of the `rows` that the head has, of `out` from `line` on. By the copy engine through shared memory, unless
    a row is negative (it takes none) or there is no such memory."""
    W0: gl.constexpr = y.shape[1]
    if through is None:
        r = row + gl.arange(0, 64, gl.SliceLayout(1, L))
        c = gl.arange(0, W0, gl.SliceLayout(0, L))
        inside = gl.expand_dims((r >= 0) & (r < rows), 1) & gl.expand_dims(c < WIDTH, 0)
        gl.store(out + line * WIDTH + gl.expand_dims(r.to(gl.int64) * WIDTH, 1) + gl.expand_dims(c, 0), y, mask=inside)
    else:
        through.store(y)
        fence_async_shared()
        tma.async_copy_shared_to_global(out_map, at, through)


# ---------------------------------------------------------------------------------------------------------------- dQ
@gluon.jit
def bring_keys(maps, cols, Hq, group, D0: gl.constexpr, V0: gl.constexpr, queue, memory, q_bars, k_bars, v_bars):
    """Queries and dout of an item, then its keys and values; keys of a masked block go by way of `clear`."""
    q, dout, k, v = maps
    sq, sg, sk, sv = memory
    q_full, q_free = q_bars
    k_full, k_free, k_landed = k_bars
    v_full, v_free = v_bars
    n = 0
    j = 0
    turn = 0
    head, t, first, plain, kept, count, gap, limit = next_item(0, queue, 1)
    while head >= 0:
        b = head // Hq
        h = head - b * Hq
        hk = h // group
        if count > 0:
            mbarrier.wait(q_free, (j & 1) ^ 1)
            mbarrier.expect(q_full, 2 * ROWS * (D0 + V0))
            for w in gl.static_range(2):
                tma.async_copy_global_to_shared(q, [b, h, t + 64 * w, 0], q_full, sq.index(w))
                tma.async_copy_global_to_shared(dout, [b, h, t + 64 * w, 0], q_full, sg.index(w))
            j += 1
            following = gl.load(cols + first + gl.where(kept == 0, gap, 0))
            for e in range(count):
                row = following * KEYS
                following = gl.load(cols + first + gl.minimum(e + 1, count - 1) + gl.where(e + 1 >= kept, gap, 0))
                s = n % STAGES
                phase = ((n // STAGES) & 1) ^ 1
                mbarrier.wait(k_free.index(s), phase)
                if e < plain:
                    mbarrier.expect(k_full.index(s), 2 * KEYS * D0)
                    tma.async_copy_global_to_shared(k, [b, hk, row, 0], k_full.index(s), sk.index(s))
                else:
                    mbarrier.expect(k_landed.index(s), 2 * KEYS * D0)
                    tma.async_copy_global_to_shared(k, [b, hk, row, 0], k_landed.index(s), sk.index(s))
                mbarrier.wait(v_free.index(s), phase)
                mbarrier.expect(v_full.index(s), 2 * KEYS * V0)
                tma.async_copy_global_to_shared(v, [b, hk, row, 0], v_full.index(s), sv.index(s))
                n += 1
        turn += 1
        head, t, first, plain, kept, count, gap, limit = next_item(turn, queue, 1)


@gluon.jit
def _unseen_out(x, kind, lo, hi, r, tables, BITMAPS: gl.constexpr, L: gl.constexpr):
    """0 where a query, a row of x, does not see the key."""
    c = gl.arange(0, KEYS, gl.SliceLayout(0, L))
    words = gl.expand_dims(_word(kind, lo, hi, r, 0, tables, BITMAPS), 1)
    for n in gl.static_range(1, 4):
        words = gl.where(gl.expand_dims(c, 0) >= 32 * n, gl.expand_dims(_word(kind, lo, hi, r, n, tables, BITMAPS), 1), words)
    return gl.where((words >> gl.expand_dims((c & 31).to(gl.uint32), 0)) & 1 != 0, x, 0.0)


@gluon.jit
def multiply_queries(W: gl.constexpr, dq_map, dq, lse, delta, cols, kinds, tables, T, scale, D: gl.constexpr, D0: gl.constexpr, INTERVALS: gl.constexpr, BITMAPS: gl.constexpr,
                     MASKED: gl.constexpr, queue, memory, q_bars, k_bars, v_bars):
    """A group of warps with rows 64 W .. of each item."""
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D0, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    R: gl.constexpr = gl.SliceLayout(1, L)
    sq, sg, sk, sv = memory
    q_full, q_free = q_bars
    k_full, k_free, k_landed = k_bars
    v_full, v_free = v_bars
    kind_of = sk.dtype
    zero = gl.zeros([64, KEYS], gl.float32, L)
    r = W * 64 + gl.arange(0, 64, R)
    n = 0
    j = 0
    turn = 0
    head, t, first, plain, kept, count, gap, limit = next_item(0, queue, 4)
    while head >= 0:
        acc = gl.zeros([64, D0], gl.float32, O)
        line = head.to(gl.int64) * T
        if count > 0:
            logs, shift = _known(lse + line, delta + line, t + r, (t + r >= 0) & (t + r < T))
            mbarrier.wait(q_full, j & 1)
            for e in range(count):
                s = n % STAGES
                phase = (n // STAGES) & 1
                mbarrier.wait(k_full.index(s), phase)
                st = warpgroup_mma(sq.index(W), sk.index(s).permute((1, 0)), zero, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(s), phase)
                gt = warpgroup_mma(sg.index(W), sv.index(s).permute((1, 0)), zero, use_acc=False, is_async=True)
                x = warpgroup_mma_wait(1, deps=(st, ))
                p = probabilities(x, gl.expand_dims(logs, 1), scale)
                grad = warpgroup_mma_wait(0, deps=(gt, ))
                mbarrier.arrive(v_free.index(s))
                ds = p * (grad - gl.expand_dims(shift, 1))
                if MASKED:
                    if e >= plain:
                        kind, lo, hi = _look(e, first, kept, gap, limit, r, cols, kinds, tables, INTERVALS, True)
                        ds = _unseen_out(ds, kind, lo, hi, r, tables, BITMAPS, L)
                at = warpgroup_mma(gl.convert_layout(ds.to(kind_of), P), sk.index(s), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=(at, ))
                mbarrier.arrive(k_free.index(s))
                n += 1
        y = (acc * scale).to(kind_of)
        if (count == 0) | (t + W * 64 < 0):
            _leave(y, dq, dq_map, [head, t + W * 64, 0], t + W * 64, T, None, line, D, O)
        else:
            _leave(y, dq, dq_map, [head, t + W * 64, 0], t + W * 64, T, sq.index(W), line, D, O)
        if count > 0:
            tma.store_wait(0)
            mbarrier.arrive(q_free)
            j += 1
        turn += 1
        head, t, first, plain, kept, count, gap, limit = next_item(turn, queue, 4)


@gluon.jit(do_not_specialize=["slb", "slh", "heads", "Hq", "group", "T", "S", "first", "nq", "tiles", "ahead", "items", "q_start"])
def queries_gluon(q, dout, k, v, dq_map, dq, lse, delta, offsets, cols, kinds, intervals, bitmaps, list_of, schedule, kv_length, q_starts, ticket,
                  slb, slh, heads, Hq, group, T, S, first, nq, tiles, ahead, items, q_start, scale,
                  D: gl.constexpr, D0: gl.constexpr, V0: gl.constexpr, INTERVALS: gl.constexpr, BITMAPS: gl.constexpr, EDGE: gl.constexpr, FROM_LENGTH: gl.constexpr):
    """q, dout, k, v, dq_map: tensor maps. ticket: 0, or None where every program has one item."""
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    B: gl.constexpr = mbarrier.MBarrierLayout()
    sq = gl.allocate_shared_memory(q.dtype, [2, 64, D0], tile)
    sg = gl.allocate_shared_memory(q.dtype, [2, 64, V0], tile)
    sk = gl.allocate_shared_memory(q.dtype, [STAGES, KEYS, D0], tile)
    sv = gl.allocate_shared_memory(q.dtype, [STAGES, KEYS, V0], tile)
    queue = make_queue(READERS)
    q_full = gl.allocate_shared_memory(gl.int64, [1], B)
    q_free = gl.allocate_shared_memory(gl.int64, [1], B)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
    k_landed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_free, count=2)
    for s in gl.static_range(STAGES):
        mbarrier.init(k_full.index(s), count=1)
        mbarrier.init(k_free.index(s), count=2)
        mbarrier.init(k_landed.index(s), count=1)
        mbarrier.init(v_full.index(s), count=1)
        mbarrier.init(v_free.index(s), count=2)
    fence_async_shared()
    MASKED: gl.constexpr = INTERVALS or BITMAPS or EDGE
    memory = (sq, sg, sk, sv)
    q_bars = (q_full, q_free)
    k_bars = (k_full, k_free, k_landed)
    v_bars = (v_full, v_free)
    tables = (intervals, bitmaps)
    lists = (offsets, cols, list_of, slb, slh, first, nq, schedule)
    gl.warp_specialize([
        (multiply_queries, (0, dq_map, dq, lse, delta, cols, kinds, tables, T, scale, D, D0, INTERVALS, BITMAPS, MASKED, queue, memory, q_bars, k_bars, v_bars)),
        (multiply_queries, (1, dq_map, dq, lse, delta, cols, kinds, tables, T, scale, D, D0, INTERVALS, BITMAPS, MASKED, queue, memory, q_bars, k_bars, v_bars)),
        (bring_keys, ((q, dout, k, v), cols, Hq, group, D0, V0, queue, memory, q_bars, k_bars, v_bars)),
        (take, (ticket, items, lists, (q_start, q_starts, kv_length), (heads, tiles, ahead, 1), Hq, T, S, EDGE, FROM_LENGTH, queue)),
        (clear, (cols, kinds, tables, T, D0, INTERVALS, BITMAPS, MASKED, queue, sk, k_full, k_landed)),
    ], [4, 1, 1, 1], [232, 40, 40, 40])


# ---------------------------------------------------------------------------------------------------------------- dK, dV
@gluon.jit
def take_blocks(ticket, items, lists, at, heads, Hk, T, S, tiles, ahead, EDGE: gl.constexpr, FROM_LENGTH: gl.constexpr, queue):
    """Items of `keys`: key head (batch * Hk + head), block, first entry, how many are full, how many there are, what lies between, keys that exist, query of row 0 of query tile 0."""
    offsets, entries, list_of, slb, slh, first, nq, nk, group, schedule = lists
    q_start, q_starts, kv_length = at
    slots, slot_full, slot_free = queue
    place = gl.arange(0, 8, gl.BlockedLayout([1], [32], [1], [0]))
    number = gl.program_id(0)
    j = 0
    more = number < items
    while more:
        before = ahead * heads
        each = gl.where(number < before, ahead, tiles - ahead)
        m = gl.where(number < before, number, number - before)
        head = m // each
        block = m - head * each + gl.where(number < before, 0, ahead)
        b = head // Hk
        which = gl.load(list_of + b * slb + (head - b * Hk) * group * slh)
        if schedule is not None:
            block = gl.load(schedule + which * nk + block)
        limit = S
        if kv_length is not None:
            limit = gl.minimum(gl.maximum(gl.load(kv_length + b), 0), S)
        start = q_start
        if q_starts is not None:
            start = gl.load(q_starts + b)
        elif FROM_LENGTH:
            start += limit - T
        a = 0
        e = 0
        m = 0
        c = 0
        if (block < nk) & (block * KEYS < limit):
            where = offsets + 2 * (which.to(gl.int64) * nk + block)
            a = gl.load(where)
            m = gl.load(where + 1)
            c = gl.load(where + 2)
            e = m
            if EDGE:  # query tiles that hold queries of the call only
                last = start + T - 1
                low = gl.minimum(gl.maximum((start - (start & (ROWS - 1))) // ROWS - first, 0), nq)
                high = gl.minimum(gl.maximum((last - (last & (ROWS - 1))) // ROWS - first + 1, 0), nq)
                e = first_from(entries, a, m, high)
                a = first_from(entries, a, e, low)
                c = first_from(entries, m, c, high)
                m = first_from(entries, m, c, low)
        fields = (head, block, a, e - a, e - a + c - m, m - e, limit, first * ROWS - start)
        x = place * 0
        for f in gl.static_range(8):
            x = gl.where(place == f, fields[f], x)
        slots.index(j % 2).store(x)
        mbarrier.arrive(slot_full.index(j % 2))
        mbarrier.wait(slot_free.index(j % 2), (j // 2) & 1)  # not before all have begun it, as in `take`
        j += 1
        number = items
        if ticket is not None:
            number = gl.num_programs(0) + gl.atomic_add(ticket, 1)
        more = number < items
    slots.index(j % 2).store(place * 0 - 1)
    mbarrier.arrive(slot_full.index(j % 2))


@gluon.jit
def bring_queries(maps, entries, Hk, group, T, D0: gl.constexpr, V0: gl.constexpr, STAGES: gl.constexpr, queue, memory, k_bars, q_bars):
    """Keys and values of an item, then queries, dout and what is known of their rows, 64 a step."""
    q, dout, k, v, lse, delta = maps
    sq, sg, sk, sv, sl, sd = memory
    k_full, k_free = k_bars
    q_full, q_free = q_bars
    n = 0
    j = 0
    turn = 0
    head, block, first, full, count, gap, limit, row0 = next_item(0, queue, 1)
    while head >= 0:
        b = head // Hk
        hk = head - b * Hk
        if count > 0:
            u = j % 2
            mbarrier.wait(k_free.index(u), ((j // 2) & 1) ^ 1)
            mbarrier.expect(k_full.index(u), 2 * KEYS * (D0 + V0))
            for w in gl.static_range(2):
                tma.async_copy_global_to_shared(k, [b, hk, block * KEYS + 64 * w, 0], k_full.index(u), sk.index(2 * u + w))
                tma.async_copy_global_to_shared(v, [b, hk, block * KEYS + 64 * w, 0], k_full.index(u), sv.index(2 * u + w))
            j += 1
            for m in range(group):
                h = hk * group + m
                line = (head * group + m) * T
                following = gl.load(entries + first + gl.where(full == 0, gap, 0))
                for e in range(count):
                    t = row0 + following * ROWS
                    following = gl.load(entries + first + gl.minimum(e + 1, count - 1) + gl.where(e + 1 >= full, gap, 0))
                    for half in gl.static_range(2):
                        s = n % STAGES
                        mbarrier.wait(q_free.index(s), ((n // STAGES) & 1) ^ 1)
                        mbarrier.expect(q_full.index(s), 2 * STEP * (D0 + V0 + 4))
                        tma.async_copy_global_to_shared(lse, [line + t + STEP * half], q_full.index(s), sl.index(s))
                        tma.async_copy_global_to_shared(delta, [line + t + STEP * half], q_full.index(s), sd.index(s))
                        tma.async_copy_global_to_shared(q, [b, h, t + STEP * half, 0], q_full.index(s), sq.index(s))
                        tma.async_copy_global_to_shared(dout, [b, h, t + STEP * half, 0], q_full.index(s), sg.index(s))
                        n += 1
        turn += 1
        head, block, first, full, count, gap, limit, row0 = next_item(turn, queue, 1)


@gluon.jit
def _seen_by(W: gl.constexpr, kind, r, exists, tables, INTERVALS: gl.constexpr, BITMAPS: gl.constexpr, L: gl.constexpr):
    """Which of the queries, columns, see each of this group's keys, rows."""
    intervals, bitmaps = tables
    c = gl.arange(0, 64, gl.SliceLayout(1, L))
    key = gl.expand_dims(c + 64 * W, 1)
    seen = gl.expand_dims(exists, 0) & (key >= 0)
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
def multiply_keys(W: gl.constexpr, dk_map, dv_map, dk, dv, entries, kinds, tables, group, T, S, scale, D: gl.constexpr, DV: gl.constexpr, D0: gl.constexpr, V0: gl.constexpr,
                  STAGES: gl.constexpr, INTERVALS: gl.constexpr, BITMAPS: gl.constexpr, queue, memory, k_bars, q_bars):
    """A group of warps with keys 64 W .. of each item. Rows are keys, columns queries."""
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16])
    OK: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D0, 16])
    OV: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V0, 16])
    C: gl.constexpr = gl.SliceLayout(0, L)
    sq, sg, sk, sv, sl, sd = memory
    k_full, k_free = k_bars
    q_full, q_free = q_bars
    kind_of = sk.dtype
    zero = gl.zeros([64, STEP], gl.float32, L)
    r = gl.arange(0, STEP, C)
    n = 0
    j = 0
    turn = 0
    head, block, first, full, count, gap, limit, row0 = next_item(0, queue, 4)
    while head >= 0:
        acc_k = gl.zeros([64, D0], gl.float32, OK)
        acc_v = gl.zeros([64, V0], gl.float32, OV)
        u = j % 2
        if count > 0:
            mbarrier.wait(k_full.index(u), (j // 2) & 1)
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
                        less = gl.expand_dims(-sd.index(s).load(C), 0) + zero
                        gt = warpgroup_mma(sv.index(2 * u + W), sg.index(s).permute((1, 0)), less, is_async=True)  # first: its sums begin before any product is under way
                        st = warpgroup_mma(sk.index(2 * u + W), sq.index(s).permute((1, 0)), zero, use_acc=False, is_async=True)
                        logs = sl.index(s).load(C)
                        logs = gl.where(gl.abs(logs) < float("inf"), logs, float("inf"))  # P = 0 where a row sees no key, or its sink holds all
                        x, grad = warpgroup_mma_wait(0, deps=(st, gt))
                        p = probabilities(x, gl.expand_dims(logs, 0), scale)
                        ds = p * grad
                        if masked:
                            t = t0 + STEP * half + r
                            exists = (t >= 0) & (t < T)
                            seen = _seen_by(W, kind, r + STEP * half, exists, tables, INTERVALS, BITMAPS, L)
                            p = gl.where(seen, p, 0.0)
                            ds = gl.where(seen, ds, 0.0)
                        vt = warpgroup_mma(gl.convert_layout(p.to(kind_of), gl.DotOperandLayout(0, OV, 2)), sg.index(s), acc_v, is_async=True)
                        kt = warpgroup_mma(gl.convert_layout(ds.to(kind_of), gl.DotOperandLayout(0, OK, 2)), sq.index(s), acc_k, is_async=True)
                        acc_v, acc_k = warpgroup_mma_wait(0, deps=(vt, kt))
                        mbarrier.arrive(q_free.index(s))
                        n += 1
        row = block * KEYS + W * 64
        there_k = gl.expand_dims(row + gl.arange(0, 64, gl.SliceLayout(1, OK)) < limit, 1)
        there_v = gl.expand_dims(row + gl.arange(0, 64, gl.SliceLayout(1, OV)) < limit, 1)
        yk = gl.where(there_k, acc_k * scale, 0.0).to(kind_of)
        yv = gl.where(there_v, acc_v, 0.0).to(kind_of)
        line = head.to(gl.int64) * S
        if count == 0:
            _leave(yk, dk, dk_map, [head, row, 0], row, S, None, line, D, OK)
            _leave(yv, dv, dv_map, [head, row, 0], row, S, None, line, DV, OV)
        else:
            _leave(yk, dk, dk_map, [head, row, 0], row, S, sk.index(2 * u + W), line, D, OK)
            _leave(yv, dv, dv_map, [head, row, 0], row, S, sv.index(2 * u + W), line, DV, OV)
            j += 1
        turn += 1
        head, block, first, full, count, gap, limit, row0 = next_item(turn, queue, 4)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["slb", "slh", "heads", "Hk", "group", "T", "S", "first", "nq", "nk", "tiles", "ahead", "items", "q_start"])
def keys_gluon(q, dout, k, v, lse, delta, dk_map, dv_map, dk, dv, offsets, entries, kinds, intervals, bitmaps, list_of, schedule, kv_length, q_starts, ticket,
               slb, slh, heads, Hk, group, T, S, first, nq, nk, tiles, ahead, items, q_start, scale,
               D: gl.constexpr, DV: gl.constexpr, D0: gl.constexpr, V0: gl.constexpr, STAGES: gl.constexpr, INTERVALS: gl.constexpr, BITMAPS: gl.constexpr, EDGE: gl.constexpr,
               FROM_LENGTH: gl.constexpr):
    """q, dout, k, v, lse, delta, dk_map, dv_map: tensor maps, 64 rows each. offsets, entries, kinds: the lists by key."""
    line: gl.constexpr = gl.NVMMASharedLayout(0, 32, 1)
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    B: gl.constexpr = mbarrier.MBarrierLayout()
    sk = gl.allocate_shared_memory(k.dtype, [4, 64, D0], tile)  # of this item and of the next
    sv = gl.allocate_shared_memory(k.dtype, [4, 64, V0], tile)
    sq = gl.allocate_shared_memory(k.dtype, [STAGES, STEP, D0], tile)
    sg = gl.allocate_shared_memory(k.dtype, [STAGES, STEP, V0], tile)
    sl = gl.allocate_shared_memory(gl.float32, [STAGES, STEP], line)
    sd = gl.allocate_shared_memory(gl.float32, [STAGES, STEP], line)
    queue = make_queue(3)
    k_full = gl.allocate_shared_memory(gl.int64, [2, 1], B)
    k_free = gl.allocate_shared_memory(gl.int64, [2, 1], B)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
    q_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
    for u in gl.static_range(2):
        mbarrier.init(k_full.index(u), count=1)
        mbarrier.init(k_free.index(u), count=2)
    for s in gl.static_range(STAGES):
        mbarrier.init(q_full.index(s), count=1)
        mbarrier.init(q_free.index(s), count=2)
    fence_async_shared()
    memory = (sq, sg, sk, sv, sl, sd)
    k_bars = (k_full, k_free)
    q_bars = (q_full, q_free)
    tables = (intervals, bitmaps)
    lists = (offsets, entries, list_of, slb, slh, first, nq, nk, group, schedule)
    gl.warp_specialize([
        (multiply_keys, (0, dk_map, dv_map, dk, dv, entries, kinds, tables, group, T, S, scale, D, DV, D0, V0, STAGES, INTERVALS, BITMAPS, queue, memory, k_bars, q_bars)),
        (multiply_keys, (1, dk_map, dv_map, dk, dv, entries, kinds, tables, group, T, S, scale, D, DV, D0, V0, STAGES, INTERVALS, BITMAPS, queue, memory, k_bars, q_bars)),
        (bring_queries, ((q, dout, k, v, lse, delta), entries, Hk, group, T, D0, V0, STAGES, queue, memory, k_bars, q_bars)),
        (take_blocks, (ticket, items, lists, (q_start, q_starts, kv_length), heads, Hk, T, S, tiles, ahead, EDGE, FROM_LENGTH, queue)),
    ], [4, 1, 1], [240, 24, 24])


# ---------------------------------------------------------------------------------------------------------------- the host
def widths(D: int, DV: int) -> dict:
    """Columns as they lie in shared memory."""
    return dict(D0=64 if D <= 64 else 128, V0=power(DV, 64))


@lru_cache(1024)
def constants(D: int, DV: int, intervals=False, bitmaps=False, edge_k=False, edge_q=False, from_length=False) -> tuple:
    """Of `queries_gluon` and `keys_gluon`. edge_k: some keys of a block may not exist; edge_q: some queries of a tile."""
    w, common = widths(D, DV), dict(INTERVALS=intervals, BITMAPS=bitmaps, FROM_LENGTH=from_length)
    return (relaunch.Constants(dict(D=D, **w, EDGE=edge_k, **common), num_warps=4, enable_fp_fusion=False),
            relaunch.Constants(dict(D=D, DV=DV, **w, STAGES=KEY_STAGES, EDGE=edge_q, **common), num_warps=4, enable_fp_fusion=False))


def launch(q, k, v, dout, lists, lse, delta, dq, dk, dv, place, scale: float, *, kv_length, q_start):
    """Fills dq, dk and dv."""
    (B, Hq, T, D), (Hk, S), DV = q.shape, k.shape[1:3], v.shape[3]
    group, sms, host = Hq // Hk, max(place.sms, 1), q_start if isinstance(q_start, int) else None
    n, key_tiles = tiles(T, ROWS.value, host), -(-S // KEYS.value)
    covers = host is not None and host // ROWS.value == lists.first and n == lists.nq
    exact = covers and host % ROWS.value == 0 and T % ROWS.value == 0
    order = schedule(lists) if covers else None
    by_rows, by_keys = constants(D, DV, lists.has_intervals, lists.has_bitmaps, kv_length is not None or lists.nk * KEYS.value > S, not exact, q_start is None)
    D0, V0, list_of = by_rows["D0"], by_rows["V0"], lists.list_of
    strides = (list_of.stride(0) if list_of.shape[0] > 1 else 0, list_of.stride(1) if list_of.shape[1] > 1 else 0)
    starts, flat = None if q_start is None or host is not None else q_start, lambda x: x.view(-1, *x.shape[2:])
    queries, grads = _Map(q, 64, D0), _Map(dout, 64, V0)
    ticket = place.zeros((2,), "int32")
    items = B * Hq * n
    relaunch.launch(queries_gluon, (min(items, sms),), place,
                    (dq, lse, delta, lists.offsets, lists.cols, lists.kinds, lists.intervals, lists.bitmaps, list_of, order, kv_length, starts, ticket[:1]),
                    (*strides, B * Hq, Hq, group, T, S, lists.first, lists.nq, n, ahead(lists) if order is not None else 0, items, host or 0, float(scale)), by_rows, (q.dtype,),
                    (queries, grads, _Map(k, KEYS.value, D0), _Map(v, KEYS.value, V0), _Map(flat(dq), 64, D0)))
    items, order = B * Hk * key_tiles, schedule(lists, True) if key_tiles == lists.nk else None
    relaunch.launch(keys_gluon, (min(items, sms),), place,
                    (dk, dv, lists.by_key_offsets, lists.by_key_rows, lists.by_key_kinds, lists.intervals, lists.bitmaps, list_of, order, kv_length, starts, ticket[1:]),
                    (*strides, B * Hk, Hk, group, T, S, lists.first, lists.nq, lists.nk, key_tiles, ahead(lists, "by_key_offsets") if order is not None else 0, items, host or 0, float(scale)), by_keys, (q.dtype,),
                    (queries, grads, _Map(k, 64, D0), _Map(v, 64, V0), _Line(lse), _Line(delta), _Map(flat(dk), 64, D0), _Map(flat(dv), 64, V0)))


class _Line(TensorDescriptor):
    """A number for each row, 64 rows at a time."""

    def __init__(self, x):
        self.base, self.shape, self.strides, self.padding, self.block_shape, self.layout = x, [x.numel()], [1], "zero", [STEP.value], LINE


LINE = gl.NVMMASharedLayout(0, 32, 1)


def takes(q, k, v, dout, lists, scale: float, softcap, out_kind: str) -> bool:
    """Whether this call is one for `launch`: no orders, no softcap, a positive scale, gradients of q's type, one list for the heads of a group, arrays as the copy engine addresses them."""
    return (lists.q_order is None and lists.k_order is None and softcap is None and 1e-30 < scale < 1e38 and out_kind == str(q.dtype)[6:]
            and (lists.list_of.shape[1] == 1 or q.shape[1] == k.shape[1]) and all(map(can_map, (q, k, v, dout))))


def artifacts(problem) -> list[dict]:
    has, kind = problem.features.__contains__, problem.dtype("q")
    pointer = POINTER[kind]
    both = constants(problem["D"], problem["Dv"], has("interval"), has("bitmap"), has("kv_length") or problem["S"] % KEYS.value != 0,
                     has("kv_length") or has("q_start") or problem["T"] % ROWS.value != 0, has("kv_length") and not has("q_start"))

    def mapped(rank, rows, columns):
        return f"tensordesc<{pointer[1:]}{[1] * (rank - 2) + [rows, columns]},{_layout(rank)!r}>"
    found = []
    for fn, made, rows, gradients, own, integers in (
            (queries_gluon, both[0], KEYS.value, dict(dq="D0"), ("cols", "schedule"), ("heads", "Hq", "tiles", "ahead")),
            (keys_gluon, both[1], 64, dict(dk="D0", dv="V0"), ("entries", "schedule"), ("heads", "Hk", "nk", "tiles", "ahead"))):
        made = dict(made)
        options = {name: made.pop(name) for name in ("num_warps", "enable_fp_fusion")}
        maps = dict(q=mapped(4, 64, made["D0"]), dout=mapped(4, 64, made["V0"]), k=mapped(4, rows, made["D0"]), v=mapped(4, rows, made["V0"]))
        if fn is keys_gluon:
            maps |= {name: f"tensordesc<fp32[{STEP.value}],{LINE!r}>" for name in ("lse", "delta")}
        maps |= {f"{name}_map": mapped(3, 64, made[width]) for name, width in gradients.items()}
        names = ["offsets", "kinds", "intervals", "bitmaps", "list_of", "ticket", *own] + ["kv_length"] * has("kv_length") + ["q_starts"] * has("q_start")
        arrays = {name: pointer for name in gradients} | ({} if fn is keys_gluon else dict(lse="*fp32", delta="*fp32")) | {name: "*i32" for name in names}
        numbers = {name: "i32" for name in ("slb", "slh", "group", "T", "S", "first", "nq", "items", "q_start", *integers)} | {"scale": "fp32"}
        found.append(dict(fn=fn, signature=maps | arrays | numbers, constexprs=made, options=options, div16=tuple(name for name in arrays if name != "ticket")))
    return found


def resources(D: int, DV: int) -> Resources:
    """Of `keys`, which asks for more: two items' keys and values, three steps of queries and dout with what is known of their rows, barriers and items."""
    w = widths(D, DV)
    return Resources(threads=384, shared=(2 * 256 + KEY_STAGES * 128) * (w["D0"] + w["V0"]) + KEY_STAGES * 512 + 640, registers=168)
