"""Path "gluon" of block_attention_backward, keys: dK and dV. An item is a block of 128 keys of a key head; the queries that see it pass by, 64 a step, head after head of the group, whose heads
share a list or have one each (OWN).

A persistent block of threads has four roles: `take` draws items, `bring_steps` loads, through the copy engine where it can, the next item's keys ahead, and two groups of
`multiply_keys` hold 64 keys each. What a step is comes with it: steps whose queries see no key of the block are left out, a group passes over those that see none of its own, and only
quarters of a block seen in part run mask code. Above D 128 the groups take turns: one begins its scores when the other's are under way (D 192 on an H100: 440 -> 450 TFLOP/s).
"""
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from sparsetile.backends.triton.block_attention_gluon import bring_tile
from sparsetile.backends.triton.block_backward_steps_gluon import add_by_key, bring_step, known, leave, leave_sums, exist, probabilities
from sparsetile.backends.triton.gluon_items import KEYS, ROWS, cut, drawn, make_bars, make_queue, next_item, place_of, section_of, take
from sparsetile.backends.triton.gluon_keys import key_word
from sparsetile.backends.triton.tiles import queries_of

STEP = gl.constexpr(64)  # queries
READERS = gl.constexpr(3)  # of an item: loading, two groups


@gluon.jit
def open_block(number, lists, at, order, Hk, T, S, EDGE: gl.constexpr, FROM_LENGTH: gl.constexpr):
    """An item as eight integers: key head (batch * Hk + head), block, first entry, how many are full, how many there are, what lies between, keys that exist, query of row 0 of query tile 0.
    Of a section of a far longer block: -1 - its number in place of the keys that exist. With a list for each head of the group they speak of the first one's, but all entries are counted."""
    entries, offsets, list_of, slb, slh, first, nq, nk, group, schedule, OWN = lists
    item, n, slot = cut(number, order)
    head, block = drawn(item, (order[0], order[1], order[2], order[3]))
    b = head // Hk
    h = (head - b * Hk) * group
    if schedule is not None:
        block = gl.load(schedule + gl.load(list_of + b * slb + h * slh) * nk + block)
    limit, start = place_of(b, T, S, at, FROM_LENGTH)
    listed = gl.where(block * KEYS < limit, block, nk)
    a, full, count, gap = list_of_head(listed, b, h, lists, start, T, EDGE)
    a, full, count, gap, _ = section_of(a, full, count, gap, n, gl.where(slot >= 0, order[4], 1))
    if OWN:
        for member in range(1, group):
            count += list_of_head(listed, b, h + member, lists, start, T, EDGE)[2]
    return head, block, a, full, count, gap, gl.where(slot >= 0, -1 - slot, limit), first * ROWS - start


@gluon.jit
def list_of_head(block, b, h, lists, start, T, EDGE: gl.constexpr):
    """Of a block's entries in the list of query head h: the first, how many are full, how many there are, what lies between."""
    entries, offsets, list_of, slb, slh, first, nq, nk, group, schedule, OWN = lists
    a, e, m, c = queries_of(block, gl.load(list_of + b * slb + h * slh), offsets, entries, start, T, first, nq, nk, ROWS, EDGE)
    return a, e - a, e - a + c - m, m - e


@gluon.jit
def bring_block(maps, at, bar, memory, u, D0: gl.constexpr, D1: gl.constexpr, V0: gl.constexpr):
    k0, k1, v = maps
    sk0, sk1, sv = memory
    mbarrier.expect(bar, 2 * KEYS * (D0 + D1 + V0))
    for w in gl.static_range(2):
        to = [at[0], at[1], at[2] + 64 * w, 0]
        bring_tile(k0, k1, bar, sk0.index(2 * u + w), sk1.index(2 * u + w), to, D1)
        tma.async_copy_global_to_shared(v, to, bar, sv.index(2 * u + w))


@gluon.jit
def known_rows(lse, delta, line, t, T):
    """What is known of a step's rows t .. of a head: lse, +inf (P = 0) where a row is not there, sees no key, or its sink holds all, and -delta. The copy engine would bring it only where
    a row's address is a multiple of 16 bytes (T and first query multiples of four); elsewhere it raises an illegal instruction."""
    x = t + gl.arange(0, STEP, gl.BlockedLayout([2], [32], [1], [0]))
    logs, shift = known(lse + line, delta + line, x, (x >= 0) & (x < T))
    return logs, -shift


@gluon.jit
def bring_steps(maps, lse, delta, lists, kinds, quarters, Hk, T, D0: gl.constexpr, D1: gl.constexpr, V0: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr,
                MASKS: gl.constexpr, EDGE: gl.constexpr, queue, memory, rows, k_bars, q_bars):
    """Keys and values of an item, into one of so many BUFFERS, then queries, dout and what is known of their rows, 64 a step. With each step come its first row and a word: bits 0
    and 1 say which groups of keys are seen, 2 and 3 which entirely, 4 that it is the item's last (never left out), 5 which half of the tile it is, 6 in which buffer its keys are, and
    from bit 8 on stands the kind."""
    q0, q1, dout, k0, k1, v = maps
    entries, group, OWN = lists[0], lists[8], lists[10]
    sq0, sq1, sg, sk0, sk1, sv = memory
    sl, sd, sr, sf = rows
    k_full, k_free = k_bars
    q_full, q_free = q_bars
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    n = 0
    j = 0
    turn = 0
    head, block, first, full, count, gap, limit, row0 = next_item(0, queue, 1)
    while head >= 0:
        b = head // Hk
        hk = head - b * Hk
        if count > 0:
            u = j % BUFFERS
            mbarrier.wait(k_free.index(u), ((j // BUFFERS) & 1) ^ 1)
            bring_block((k0, k1, v), [b, hk, block * KEYS, 0], k_full.index(u), (sk0, sk1, sv), u, D0, D1, V0)
            j += 1
            left = count if OWN else count * group
            for m in range(group):
                h = hk * group + m
                line = (head * group + m).to(gl.int64) * T
                if OWN:
                    first, full, count, gap = list_of_head(gl.where(block * KEYS < limit, block, lists[7]), b, h, lists, lists[5] * ROWS - row0, T, EDGE)
                entry = first + gl.where(full == 0, gap, 0)
                its_entry = entry
                t0 = row0 + gl.load(entries + entry) * ROWS
                kind = gl.load(kinds + entry, mask=count > 0, other=-1)
                seen = 255
                if MASKS:
                    seen = gl.load(quarters + kind, mask=kind >= 0, other=255)
                for e in range(count):
                    left -= 1
                    entry = its_entry
                    its_entry = first + gl.minimum(e + 1, count - 1) + gl.where(e + 1 >= full, gap, 0)
                    following = gl.load(entries + its_entry)
                    its_kind = gl.load(kinds + its_entry)
                    for half in gl.static_range(2):
                        t = t0 + STEP * half
                        last = gl.where((left == 0) & (half == 1), 16, 0)
                        some = gl.where((t > -STEP) & (t < T), (seen >> (2 * half)) & 3, 0)
                        if (some | last) > 0:
                            s = n % STAGES
                            every = gl.where((t >= 0) & (t + STEP <= T), (seen >> (2 + 2 * half)) & 12, 0)
                            logs, less = known_rows(lse, delta, line, t, T)
                            bring_step((q0, q1, dout), [b, h, t, 0], logs, less, s, n // STAGES, D1, 2 * STEP * (D0 + D1 + V0), (sq0, sq1, sg), (sl, sd), q_bars)
                            sr.index(s).store(gl.full([1], 0, gl.int32, one) + t)
                            sf.index(s).store(gl.full([1], 0, gl.int32, one) + (some | every | last | (32 * half) | (u << 6) | (kind << 8)))
                            mbarrier.arrive(q_full.index(s))
                            n += 1
                    t0 = row0 + following * ROWS
                    kind = its_kind
                    if MASKS:
                        seen = gl.load(quarters + kind, mask=kind >= 0, other=255)
        turn += 1
        head, block, first, full, count, gap, limit, row0 = next_item(turn, queue, 1)


@gluon.jit
def _known(x):
    """The one number of a tensor that every thread holds."""
    return gl.sum(x, 0)


@gluon.jit
def _words(words, kind, partial, key, flags, t, T, MASKS: gl.constexpr):
    """Of each key two words: which of a step's queries, from t on, see it."""
    low = key_word(-1, -t, T - t, key, 0, None, False)
    high = key_word(-1, -t, T - t, key, 1, None, False)
    if MASKS:
        at = words + kind.to(gl.int64) * MASKS + key * 4 + ((flags >> 4) & 2)
        ok = partial & (kind >= 0)
        low &= gl.load(at, mask=ok, other=-1).to(gl.uint32, bitcast=True)
        high &= gl.load(at + 1, mask=ok, other=-1).to(gl.uint32, bitcast=True)
    return low, high


@gluon.jit
def _where_seen(x, low, high, L: gl.constexpr):
    """x [64 keys, 64 queries] where a bit of the keys' two words says that the query sees the key, else 0."""
    c = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, L)), 0)
    word = gl.where(c >= 32, gl.expand_dims(high, 1), gl.expand_dims(low, 1))
    return gl.where((word >> (c & 31).to(gl.uint32)) & 1 != 0, x, 0.0)


@gluon.jit
def multiply_keys(W: gl.constexpr, dk_maps, dv_map, dk, dv, sums, words, T, S, scale, D: gl.constexpr, DV: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr,
                  V0: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr, MASKS: gl.constexpr, queue, memory, rows, k_bars, q_bars):
    """A group of warps with keys 64 W .. of each item. Rows are keys, columns queries."""
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16])
    OK: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D0, 16])
    OK1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    OV: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V0, 16])
    C: gl.constexpr = gl.SliceLayout(0, L)
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    sq0, sq1, sg, sk0, sk1, sv = memory
    sl, sd, sr, sf = rows
    k_full, k_free = k_bars
    q_full, q_free, my_turn, your_turn = q_bars
    kind_of = sv.dtype
    zero = gl.zeros([64, STEP], gl.float32, L)
    key = W * 64 + gl.arange(0, 64, gl.SliceLayout(1, L))
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
            more = count > 0
            while more:
                s = n % STAGES
                mbarrier.wait(q_full.index(s), (n // STAGES) & 1)
                flags = _known(sf.index(s).load(one))
                t = _known(sr.index(s).load(one))
                if D1 == 0:  # all at once: the word alone would take as long
                    less = sd.index(s).load(C)
                    logs = sl.index(s).load(C)
                more = (flags & 16) == 0
                if D1:
                    mbarrier.wait(my_turn, (n & 1) ^ (1 - W))
                if (flags >> W) & 1 != 0:
                    kind = flags >> 8
                    at = 2 * ((flags >> 6) & 1) + W  # known within the step only: else the descriptors of all tiles are kept in registers, and spill
                    partial = ((flags >> (2 + W)) & 1) == 0
                    if D1:  # fewer registers: one product of scores at a time, dV between them
                        st = warpgroup_mma(sk0.index(at), sq0.index(s).permute((1, 0)), zero, use_acc=False, is_async=True)
                        st = warpgroup_mma(sk1.index(at), sq1.index(s).permute((1, 0)), st, is_async=True)
                        mbarrier.arrive(your_turn)
                        low, high = _words(words, kind, partial, key, flags, t, T, MASKS)
                        x = warpgroup_mma_wait(0, deps=(st, ))
                        p = probabilities(x, gl.expand_dims(sl.index(s).load(C), 0), scale)
                        if partial:
                            p = _where_seen(p, low, high, L)
                        vt = warpgroup_mma(gl.convert_layout(p.to(kind_of), gl.DotOperandLayout(0, OV, 2)), sg.index(s), acc_v, is_async=True)
                        acc_v = warpgroup_mma_wait(0, deps=(vt, ))
                        gt = warpgroup_mma(sv.index(at), sg.index(s).permute((1, 0)), gl.expand_dims(sd.index(s).load(C), 0) + zero, is_async=True)
                        ds = p * warpgroup_mma_wait(0, deps=(gt, ))
                        if partial:
                            ds = gl.where(p != 0, ds, 0.0)
                        ds = ds.to(kind_of)
                        kt = warpgroup_mma(gl.convert_layout(ds, gl.DotOperandLayout(0, OK, 2)), sq0.index(s), acc_k, is_async=True)
                        kt1 = warpgroup_mma(gl.convert_layout(ds, gl.DotOperandLayout(0, OK1, 2)), sq1.index(s), acc_k1, is_async=True)
                        acc_k, acc_k1 = warpgroup_mma_wait(0, deps=(kt, kt1))
                    else:
                        gt = warpgroup_mma(sv.index(at), sg.index(s).permute((1, 0)), gl.expand_dims(less, 0) + zero, is_async=True)  # before any product is under way
                        st = warpgroup_mma(sk0.index(at), sq0.index(s).permute((1, 0)), zero, use_acc=False, is_async=True)
                        low, high = _words(words, kind, partial, key, flags, t, T, MASKS)
                        x, grad = warpgroup_mma_wait(0, deps=(st, gt))
                        p = probabilities(x, gl.expand_dims(logs, 0), scale)
                        ds = p * grad
                        if partial:
                            p = _where_seen(p, low, high, L)
                            ds = _where_seen(ds, low, high, L)
                        acc_k, acc_v = add_by_key(p, ds, sq0, sg, s, acc_k, acc_v)
                elif D1:
                    mbarrier.arrive(your_turn)
                mbarrier.arrive(q_free.index(s))
                n += 1
        line = head.to(gl.int64) * S
        row = block * KEYS + W * 64
        whole = True
        if sums is not None:
            whole = limit >= 0
            if limit < 0:
                to = sums + (-1 - limit).to(gl.int64) * (KEYS * (D0 + D1 + V0))
                leave_sums(acc_k * scale, to, W * 64, 0, D0 + D1 + V0, OK)
                leave_sums(acc_v, to, W * 64, D0 + D1, D0 + D1 + V0, OV)
                if D1:
                    leave_sums(acc_k1 * scale, to, W * 64, D0, D0 + D1 + V0, OK1)
        if whole:
            yk = gl.where(exist(row, limit, OK), acc_k * scale, 0.0).to(kind_of)
            yk1 = gl.where(exist(row, limit, OK1), acc_k1 * scale, 0.0).to(kind_of)
            yv = gl.where(exist(row, limit, OV), acc_v, 0.0).to(kind_of)
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
        if count > 0:
            if BUFFERS == 1:
                tma.store_wait(0)
                mbarrier.arrive(k_free.index(0))
            j += 1
        turn += 1
        head, block, first, full, count, gap, limit, row0 = next_item(turn, queue, 4)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["slb", "slh", "heads", "Hk", "group", "T", "S", "first", "nq", "nk", "tiles", "ahead", "sections", "items", "q_start"])
def keys_gluon(q0, q1, dout, k0, k1, v, dk_map0, dk_map1, dv_map, dk, dv, sums, lse, delta, offsets, entries, kinds, words, quarters, list_of, schedule, kv_length, q_starts, ticket,
               slb, slh, heads, Hk, group, T, S, first, nq, nk, tiles, ahead, sections, items, q_start, scale,
               D: gl.constexpr, DV: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, V0: gl.constexpr, STAGES: gl.constexpr, MASKS: gl.constexpr, OWN: gl.constexpr, EDGE: gl.constexpr,
               FROM_LENGTH: gl.constexpr):
    """q0 .. dv_map: tensor maps, 64 rows each; those of columns 128 on None where D is at most that. offsets, entries, kinds: the lists by key. words, quarters: turn_kinds, MASKS words from one
    kind to the next, 0: no kinds. OWN: heads of a group have lists of their own.
    sums: of sections, float32 [section, 128 keys, D0 + D1 + V0], or None where nothing is cut."""
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
    sr = gl.allocate_shared_memory(gl.int32, [STAGES, 1], line)
    sf = gl.allocate_shared_memory(gl.int32, [STAGES, 1], line)
    queue = make_queue(READERS)
    k_bars = make_bars(BUFFERS, (1, 2))
    q_full, q_free = make_bars(STAGES, (2, 2))
    turn0 = gl.allocate_shared_memory(gl.int64, [1], B)
    turn1 = gl.allocate_shared_memory(gl.int64, [1], B)
    mbarrier.init(turn0, count=1)
    mbarrier.init(turn1, count=1)
    fence_async_shared()
    memory = (sq0, sq1, sg, sk0, sk1, sv)
    rows = (sl, sd, sr, sf)
    q_bars = (q_full, q_free)
    lists = (entries, offsets, list_of, slb, slh, first, nq, nk, group, schedule, OWN)
    gl.warp_specialize([
        (multiply_keys, (0, (dk_map0, dk_map1), dv_map, dk, dv, sums, words, T, S, scale, D, DV, D0, D1, V0, STAGES, BUFFERS, MASKS,
                         queue, memory, rows, k_bars, (q_full, q_free, turn0, turn1))),
        (multiply_keys, (1, (dk_map0, dk_map1), dv_map, dk, dv, sums, words, T, S, scale, D, DV, D0, D1, V0, STAGES, BUFFERS, MASKS,
                         queue, memory, rows, k_bars, (q_full, q_free, turn1, turn0))),
        (bring_steps, ((q0, q1, dout, k0, k1, v), lse, delta, lists, kinds, quarters, Hk, T, D0, D1, V0, STAGES, BUFFERS, MASKS, EDGE, queue, memory, rows, k_bars, q_bars)),
        (take, (gl.constexpr(open_block), ticket, items, lists, (q_start, q_starts, kv_length), (heads, tiles, ahead, 1, sections), Hk, T, S, EDGE, FROM_LENGTH, queue, False)),
    ], [4, 1, 1], [240, 24, 24])
