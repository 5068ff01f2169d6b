"""Parts of a layout (gluon_parts.py), backward: dQ by tiles of 128 queries, dK and dV by blocks of 128 keys, as block_backward_queries_gluon.py and block_backward_keys_gluon.py, which say
what the roles are. Tiles and key blocks are boxes of arrays whose axes are seen as two; a part's sums begin where those of the part before end, float32 and not scaled, and the last part's
are rounded. Items of a layout of parts are short: queries, keys and sums of the next one come while this one's products run.
"""
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from sparsetile.backends.triton.block_attention_parts_gluon import FIELDS, _look, open_tile
from sparsetile.backends.triton.block_backward_keys_gluon import STEP
from sparsetile.backends.triton.block_backward_steps_gluon import add_by_key, begin_by_query, end_by_query, known, probabilities
from sparsetile.backends.triton.gluon_items import KEYS, ROWS, make_bars, make_queue, next_item, take
from sparsetile.backends.triton.gluon_keys import clear_word, seen_or


@gluon.jit
def bring_box(boxes, bar, to, b, h, x, y, n: gl.constexpr, SIZE: gl.constexpr, RUN: gl.constexpr):
    """Positions SIZE * n .. of the block whose first box is at (x, y). RUN: so many of them lie side by side; 0: they all have one x."""
    if RUN:
        tma.async_copy_global_to_shared(boxes, [b, h, x + n * (SIZE // RUN), y, 0], bar, to)
    else:
        tma.async_copy_global_to_shared(boxes, [b, h, x, y + n * SIZE, 0], bar, to)


@gluon.jit
def bring_end(boxes, short, rest, bar, to, b, h, x, y, n: gl.constexpr, SIZE: gl.constexpr, RUN: gl.constexpr, RAGGED: gl.constexpr):
    """`bring_box`; RAGGED: classes from `rest` on are boxes of the short view."""
    if RAGGED:
        if x < rest:
            bring_box(boxes, bar, to, b, h, x, y, n, SIZE, RUN)
        else:
            bring_box(short, bar, to, b, h, x, y, n, SIZE, RUN)
    else:
        bring_box(boxes, bar, to, b, h, x, y, n, SIZE, RUN)


@gluon.jit
def bring_of(parts, part, bar, to, b, h, x, y, n: gl.constexpr, SIZE: gl.constexpr, RUNS: gl.constexpr):
    """`bring_box` of the part that an entry is of."""
    for g in gl.static_range(len(parts)):
        if part == g:
            bring_box(parts[g], bar, to, b, h, x, y, n, SIZE, RUNS[g])


@gluon.jit
def elements(line, position, positions, width: gl.constexpr, W0: gl.constexpr, L: gl.constexpr):
    """(offsets, which exist) of rows at these positions of a head, which begins at row `line` of an array of rows of this width."""
    c = gl.arange(0, W0, gl.SliceLayout(0, L))
    there = gl.expand_dims((position >= 0) & (position < positions), 1)
    if width < W0:
        there = there & gl.expand_dims(c < width, 0)
    return gl.expand_dims((line + position) * width, 1) + gl.expand_dims(c, 0), there


@gluon.jit
def leave_box(rows, boxes, through, head, heads, x, y, W: gl.constexpr, RUN: gl.constexpr):
    """64 rows of a gradient through shared memory to where they stand."""
    through.store(rows)
    fence_async_shared()
    b = head // heads
    if RUN:
        tma.async_copy_shared_to_global(boxes, [b, head - b * heads, x + W * (64 // RUN), y, 0], through)
    else:
        tma.async_copy_shared_to_global(boxes, [b, head - b * heads, x, y + W * 64, 0], through)


@gluon.jit
def begin(sums, line, position, positions, held, width: gl.constexpr, W0: gl.constexpr, ADDS: gl.constexpr, L: gl.constexpr):
    """Sums of the parts before; held: which positions they have, None: all."""
    acc = gl.zeros([64, W0], gl.float32, L)
    if ADDS:
        at, there = elements(line, position, positions, width, W0, L)
        if held is not None:
            there = there & (gl.expand_dims(gl.load(held + position, mask=(position >= 0) & (position < positions), other=0), 1) != 0)
        acc = gl.load(sums + at, mask=there, other=0.0)
    return acc


@gluon.jit
def bring_part_keys(maps, entries, Hq, group, rest, D0: gl.constexpr, V0: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr, RUNS: gl.constexpr, RAGGED: gl.constexpr, queue, memory, q_bars, k_bars, v_bars):
    """Queries and dout of an item, then keys and values, a step at a time, of the part that each entry is of; keys of a masked block go by way of `clear_part`."""
    q, dout, qs, douts, k, v = maps
    sq, sg, sk, sv = memory
    q_full, q_free = q_bars
    k_full, k_free, k_landed = k_bars
    v_full, v_free = v_bars
    KEY_STEP: gl.constexpr = sk.shape[1]
    n = 0
    turn = 0
    head, t, first, plain, count, x, y, _ = next_item(0, queue, 1)
    while head >= 0:
        b = head // Hq
        h = head - b * Hq
        hk = h // group
        u = turn % BUFFERS
        mbarrier.wait(q_free.index(u), ((turn // BUFFERS) & 1) ^ 1)
        if count == 0:
            mbarrier.arrive(q_full.index(u))
        else:
            mbarrier.expect(q_full.index(u), 2 * ROWS * (D0 + V0))
            for w in gl.static_range(2):
                bring_end(q, qs, rest, q_full.index(u), sq.index(2 * u + w), b, h, x, y, w, 64, 0, RAGGED)
                bring_end(dout, douts, rest, q_full.index(u), sg.index(2 * u + w), b, h, x, y, w, 64, 0, RAGGED)
            for e in range(count):
                entry = entries + (first + e) * FIELDS
                kx = gl.load(entry)
                ky = gl.load(entry + 1)
                part = gl.load(entry + 4)
                for step in gl.static_range(KEYS // KEY_STEP):
                    s = n % STAGES
                    phase = ((n // STAGES) & 1) ^ 1
                    mbarrier.wait(k_free.index(s), phase)
                    if e < plain:
                        mbarrier.expect(k_full.index(s), 2 * KEY_STEP * D0)
                        bring_of(k, part, k_full.index(s), sk.index(s), b, hk, kx, ky, step, KEY_STEP, RUNS)
                    else:
                        mbarrier.expect(k_landed.index(s), 2 * KEY_STEP * D0)
                        bring_of(k, part, k_landed.index(s), sk.index(s), b, hk, kx, ky, step, KEY_STEP, RUNS)
                    mbarrier.wait(v_free.index(s), phase)
                    mbarrier.expect(v_full.index(s), 2 * KEY_STEP * V0)
                    bring_of(v, part, v_full.index(s), sv.index(s), b, hk, kx, ky, step, KEY_STEP, RUNS)
                    n += 1
        turn += 1
        head, t, first, plain, count, x, y, _ = next_item(turn, queue, 1)


@gluon.jit
def clear_part(entries, STAGES: gl.constexpr, queue, sk, full, landed):
    """Keys of a masked block that no query of the tile sees become zero when they have landed: 0 * NaN."""
    WORDS: gl.constexpr = sk.shape[1] // 32
    STEPS: gl.constexpr = KEYS // sk.shape[1]
    n = 0
    turns = 0
    turn = 0
    head, t, first, plain, count, x, y, _ = next_item(0, queue, 1)
    while head >= 0:
        for e in range(plain, count):
            for step in gl.static_range(STEPS):
                seen = entries + (first + e) * FIELDS + 5 + step * WORDS
                s = ((n + e) * STEPS + step) % STAGES
                mbarrier.wait(landed.index(s), (turns >> s) & 1)
                turns ^= 1 << s
                for w in gl.static_range(WORDS):
                    word = gl.load(seen + w).to(gl.uint32, bitcast=True)
                    if word != 0xFFFFFFFF:
                        clear_word(word, w, sk.index(s))
                fence_async_shared()
                mbarrier.arrive(full.index(s))
        n += count
        turn += 1
        head, t, first, plain, count, x, y, _ = next_item(turn, queue, 1)


@gluon.jit
def multiply_part_queries(W: gl.constexpr, dq_map, dq, sums, lse, delta, entries, tables, Hq, T, apart, scale, D: gl.constexpr, D0: gl.constexpr, STAGES: gl.constexpr,
                          BUFFERS: gl.constexpr, ADDS: gl.constexpr, LAST: gl.constexpr, BEFORE: gl.constexpr, INTERVALS: gl.constexpr, BITMAPS: gl.constexpr,
                          queue, memory, q_bars, k_bars, v_bars):
    """A group of warps with rows 64 W .. of each tile, so far `apart`."""
    sq, sg, sk, sv = memory
    KEY_STEP: gl.constexpr = sk.shape[1]
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEY_STEP, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D0, 16])
    q_full, q_free = q_bars
    k_full, k_free = k_bars
    v_full, v_free = v_bars
    kind_of = sv.dtype
    zero = gl.zeros([64, KEY_STEP], gl.float32, L)
    r = W * 64 + gl.arange(0, 64, gl.SliceLayout(1, L))
    ro = W * 64 + gl.arange(0, 64, gl.SliceLayout(1, O))
    n = 0
    turn = 0
    head, t, first, plain, count, x, y, _ = next_item(0, queue, 4)
    while head >= 0:
        line = head.to(gl.int64) * T
        acc = begin(sums, line, t + ro * apart, T, None, D, D0, ADDS, O)
        u = turn % BUFFERS
        at = t + r * apart
        logs, shift = known(lse + line, delta + line, at, (at >= 0) & (at < T))
        mbarrier.wait(q_full.index(u), (turn // BUFFERS) & 1)
        for e in range(count):
            if INTERVALS or BITMAPS:
                kind, lo, hi = _look(e, first, r, entries, tables, INTERVALS, True)
            for step in gl.static_range(KEYS // KEY_STEP):
                s = n % STAGES
                phase = (n // STAGES) & 1
                mbarrier.wait(k_full.index(s), phase)
                st, gt = begin_by_query((sq, None, sg, sk, None, sv), 2 * u + W, s, v_full, phase, zero, 0)
                ds = end_by_query(st, gt, logs, shift, scale, v_free, s)
                if INTERVALS or BITMAPS:
                    if e >= plain:
                        ds = seen_or(ds, 0.0, kind, lo, hi, r, step * KEY_STEP // 32, tables, BITMAPS, L)
                ds = ds.to(kind_of)
                acc = warpgroup_mma(gl.convert_layout(ds, gl.DotOperandLayout(0, O, 2)), sk.index(s), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=(acc, ))
                mbarrier.arrive(k_free.index(s))
                n += 1
        if LAST:
            out = (acc * scale).to(kind_of)
            if BEFORE:
                if t < 0:  # no coordinate of the copy engine on the way out
                    to, there = elements(line, t + ro * apart, T, D, D0, O)
                    gl.store(dq + to, out, mask=there)
                else:
                    leave_box(out, dq_map, sq.index(2 * u + W), head, Hq, x, y, W, 0)
            else:
                leave_box(out, dq_map, sq.index(2 * u + W), head, Hq, x, y, W, 0)
            tma.store_wait(0)
        mbarrier.arrive(q_free.index(u))
        if not LAST:
            to, there = elements(line, t + ro * apart, T, D, D0, O)
            gl.store(sums + to, acc, mask=there)
        turn += 1
        head, t, first, plain, count, x, y, _ = next_item(turn, queue, 4)


@gluon.jit(do_not_specialize=["heads", "Hq", "group", "T", "tiles", "ahead", "items", "apart", "rest"])
def part_queries_gluon(q, dout, qs, douts, k, v, k1, v1, dq_map, dq, sums, lse, delta, plan, entries, intervals, bitmaps, ticket, heads, Hq, group, T, tiles, ahead, items, apart, rest, scale,
                       D: gl.constexpr, D0: gl.constexpr, V0: gl.constexpr, RUN: gl.constexpr, RUN1: gl.constexpr, PARTS: gl.constexpr, RAGGED: gl.constexpr, KEY_STEP: gl.constexpr, ADDS: gl.constexpr, LAST: gl.constexpr,
                       BEFORE: gl.constexpr, INTERVALS: gl.constexpr, BITMAPS: gl.constexpr):
    """q .. dq_map: tensor maps, 64 rows or KEY_STEP keys each; k1 and v1 of a second part with the same tiles, or None, as dq_map is where the pass is not the last. apart: queries of a tile; RAGGED: from class `rest` on they are short (qs, douts). Tiles `ahead` come before all others, of all heads."""
    BUFFERS: gl.constexpr = 2 if KEY_STEP == 64 else 1  # of queries
    STAGES: gl.constexpr = 3 if KEY_STEP == 64 else 2
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    sq = gl.allocate_shared_memory(v.dtype, [2 * BUFFERS, 64, D0], tile)
    sg = gl.allocate_shared_memory(v.dtype, [2 * BUFFERS, 64, V0], tile)
    sk = gl.allocate_shared_memory(v.dtype, [STAGES, KEY_STEP, D0], tile)
    sv = gl.allocate_shared_memory(v.dtype, [STAGES, KEY_STEP, V0], tile)
    queue = make_queue(4)  # loading, clearing, two groups
    q_bars = make_bars(BUFFERS, (1, 2))
    k_full, k_free, k_landed, v_full, v_free = make_bars(STAGES, (1, 2, 1, 1, 2))
    fence_async_shared()
    memory = (sq, sg, sk, sv)
    v_bars = (v_full, v_free)
    tables = (intervals, bitmaps)
    gl.warp_specialize([
        (multiply_part_queries, (0, dq_map, dq, sums, lse, delta, entries, tables, Hq, T, apart, scale, D, D0, STAGES, BUFFERS, ADDS, LAST, BEFORE, INTERVALS, BITMAPS, queue, memory, q_bars,
                                 (k_full, k_free), v_bars)),
        (multiply_part_queries, (1, dq_map, dq, sums, lse, delta, entries, tables, Hq, T, apart, scale, D, D0, STAGES, BUFFERS, ADDS, LAST, BEFORE, INTERVALS, BITMAPS, queue, memory, q_bars,
                                 (k_full, k_free), v_bars)),
        (bring_part_keys, ((q, dout, qs, douts, (k, k1)[:PARTS], (v, v1)[:PARTS]), entries, Hq, group, rest, D0, V0, STAGES, BUFFERS, (RUN, RUN1), RAGGED, queue, memory, q_bars, (k_full, k_free, k_landed), v_bars)),
        (take, (gl.constexpr(open_tile), ticket, items, plan, (0, None, None), (heads, tiles, ahead, 1), Hq, T, T, False, False, queue, False)),
        (clear_part, (entries, STAGES, queue, sk, k_full, k_landed)),
    ], [4, 1, 1, 1], [232, 40, 40, 40])


# ---------------------------------------------------------------------------------------------------------------- by key blocks
@gluon.jit
def bring_part_queries(maps, shorts, rests, lse, delta, entries, Hk, group, T, apart, D0: gl.constexpr, V0: gl.constexpr, STAGES: gl.constexpr, RUN: gl.constexpr, RAGGED: gl.constexpr, queue, memory, rows, k_bars, q_bars):
    """Keys and values of an item, then queries, dout and what is known of their rows, 64 a step, head after head of the group."""
    q, dout, k, v = maps
    qs, douts, ks, vs = shorts
    rest_q, rest_k = rests
    sq, sg, sk, sv = memory
    sl, sd = rows
    k_full, k_free = k_bars
    q_full, q_free = q_bars
    n = 0
    turn = 0
    head, key, first, full, count, x, y, _ = next_item(0, queue, 1)
    while head >= 0:
        b = head // Hk
        hk = head - b * Hk
        u = turn % 2
        mbarrier.wait(k_free.index(u), ((turn // 2) & 1) ^ 1)
        if count == 0:
            mbarrier.arrive(k_full.index(u))
        else:
            mbarrier.expect(k_full.index(u), 2 * KEYS * (D0 + V0))
            for w in gl.static_range(2):
                bring_end(k, ks, rest_k, k_full.index(u), sk.index(2 * u + w), b, hk, x, y, w, 64, RUN, RAGGED[1])
                bring_end(v, vs, rest_k, k_full.index(u), sv.index(2 * u + w), b, hk, x, y, w, 64, RUN, RAGGED[1])
            for m in range(group):
                line = (head * group + m).to(gl.int64) * T
                for e in range(count):
                    entry = entries + (first + e) * 4
                    t = gl.load(entry)
                    qx = gl.load(entry + 1)
                    qy = gl.load(entry + 2)
                    for half in gl.static_range(2):
                        s = n % STAGES
                        at = t + (STEP * half + gl.arange(0, STEP, gl.BlockedLayout([2], [32], [1], [0]))) * apart
                        logs, less = known(lse + line, delta + line, at, (at >= 0) & (at < T))
                        mbarrier.wait(q_free.index(s), ((n // STAGES) & 1) ^ 1)
                        mbarrier.expect(q_full.index(s), 2 * STEP * (D0 + V0))
                        bring_end(q, qs, rest_q, q_full.index(s), sq.index(s), b, hk * group + m, qx, qy, half, 64, 0, RAGGED[0])
                        bring_end(dout, douts, rest_q, q_full.index(s), sg.index(s), b, hk * group + m, qx, qy, half, 64, 0, RAGGED[0])
                        sl.index(s).store(logs)
                        sd.index(s).store(-less)
                        mbarrier.arrive(q_full.index(s))
                        n += 1
        turn += 1
        head, key, first, full, count, x, y, _ = next_item(turn, queue, 1)


@gluon.jit
def _query_words(seen, kind, W: gl.constexpr, half: gl.constexpr, L: gl.constexpr):
    """Two words for each of this group's keys: which of the queries 64 half .. see it."""
    at = seen + kind.to(gl.int64) * (KEYS * 4) + (64 * W + gl.arange(0, 64, gl.SliceLayout(1, L))) * 4 + 2 * half
    return gl.load(at, mask=kind >= 0, other=-1), gl.load(at + 1, mask=kind >= 0, other=-1)


@gluon.jit
def multiply_part_keys(W: gl.constexpr, dk_map, dv_map, k_sums, v_sums, held, entries, seen, Hk, group, S, key_step, scale, D: gl.constexpr, DV: gl.constexpr, D0: gl.constexpr,
                       V0: gl.constexpr, STAGES: gl.constexpr, RUN: gl.constexpr, ADDS: gl.constexpr, LAST: gl.constexpr, MASKED: gl.constexpr, queue, memory, rows, k_bars, q_bars):
    """A group of warps with keys 64 W .. of each block. Rows are keys, columns queries."""
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16])
    OK: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D0, 16])
    OV: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V0, 16])
    C: gl.constexpr = gl.SliceLayout(0, L)
    sq, sg, sk, sv = memory
    sl, sd = rows
    k_full, k_free = k_bars
    q_full, q_free = q_bars
    kind_of = sv.dtype
    zero = gl.zeros([64, STEP], gl.float32, L)
    c = gl.expand_dims(gl.arange(0, STEP, C), 0)
    ck = W * 64 + gl.arange(0, 64, gl.SliceLayout(1, OK))
    cv = W * 64 + gl.arange(0, 64, gl.SliceLayout(1, OV))
    n = 0
    turn = 0
    head, key, first, full, count, x, y, _ = next_item(0, queue, 4)
    while head >= 0:
        line = head.to(gl.int64) * S
        at_k = key + (ck // RUN * key_step + ck % RUN if RUN else ck * key_step)
        at_v = key + (cv // RUN * key_step + cv % RUN if RUN else cv * key_step)
        acc_k = begin(k_sums, line, at_k, S, held, D, D0, ADDS, OK)
        acc_v = begin(v_sums, line, at_v, S, held, DV, V0, ADDS, OV)
        u = turn % 2
        mbarrier.wait(k_full.index(u), (turn // 2) & 1)
        if LAST:
            if turn > 0:  # the item before: its gradients have left shared memory by now, or soon
                tma.store_wait(0)
                mbarrier.arrive(k_free.index(1 - u))
        for m in range(group):
            for e in range(count):
                kind = gl.load(entries + (first + e) * 4 + 3)
                for half in gl.static_range(2):
                    s = n % STAGES
                    if MASKED:
                        low, high = _query_words(seen, kind, W, half, L)  # before products whose end would be waited for first
                    mbarrier.wait(q_full.index(s), (n // STAGES) & 1)
                    less = gl.expand_dims(sd.index(s).load(C), 0) + zero
                    gt = warpgroup_mma(sv.index(2 * u + W), sg.index(s).permute((1, 0)), less, is_async=True)  # first: its sums begin before any product is under way
                    st = warpgroup_mma(sk.index(2 * u + W), sq.index(s).permute((1, 0)), zero, use_acc=False, is_async=True)
                    logs = sl.index(s).load(C)
                    raw, grad = warpgroup_mma_wait(0, deps=(st, gt))
                    p = probabilities(raw, gl.expand_dims(logs, 0), scale)
                    ds = p * grad
                    if MASKED:
                        if kind >= 0:
                            there = (gl.where(c >= 32, gl.expand_dims(high, 1), gl.expand_dims(low, 1)) >> (c & 31)) & 1 != 0
                            p = gl.where(there, p, 0.0)
                            ds = gl.where(there, ds, 0.0)
                    acc_k, acc_v = add_by_key(p, ds, sq, sg, s, acc_k, acc_v)
                    mbarrier.arrive(q_free.index(s))
                    n += 1
        if LAST:
            leave_box((acc_k * scale).to(kind_of), dk_map, sk.index(2 * u + W), head, Hk, x, y, W, RUN)
            leave_box(acc_v.to(kind_of), dv_map, sv.index(2 * u + W), head, Hk, x, y, W, RUN)
        else:
            mbarrier.arrive(k_free.index(u))
            at, there = elements(line, at_k, S, D, D0, OK)
            gl.store(k_sums + at, acc_k, mask=there)
            at, there = elements(line, at_v, S, DV, V0, OV)
            gl.store(v_sums + at, acc_v, mask=there)
        turn += 1
        head, key, first, full, count, x, y, _ = next_item(turn, queue, 4)
    if LAST:
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["heads", "Hk", "group", "T", "S", "tiles", "ahead", "items", "apart", "key_step", "rest_q", "rest_k"])
def part_keys_gluon(q, dout, k, v, qs, douts, ks, vs, dk_map, dv_map, k_sums, v_sums, held, lse, delta, plan, entries, seen, ticket,
                    heads, Hk, group, T, S, tiles, ahead, items, apart, key_step, rest_q, rest_k, scale,
                    D: gl.constexpr, DV: gl.constexpr, D0: gl.constexpr, V0: gl.constexpr, RUN: gl.constexpr, RAGGED_Q: gl.constexpr, RAGGED_K: gl.constexpr, ADDS: gl.constexpr, LAST: gl.constexpr, MASKED: gl.constexpr):
    """q .. dv_map: tensor maps, 64 rows each, of gradients None where the part is not the last; qs .. vs: of the short classes, from class rest_q (rest_k) on, where those are ragged. seen [n, 128, 4]: for each kind of a block which queries see a key, as bits. held [S]: which keys stand in the parts before, None: all."""
    STAGES: gl.constexpr = 3
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    sk = gl.allocate_shared_memory(v.dtype, [4, 64, D0], tile)  # two items'
    sv = gl.allocate_shared_memory(v.dtype, [4, 64, V0], tile)
    sq = gl.allocate_shared_memory(v.dtype, [STAGES, STEP, D0], tile)
    sg = gl.allocate_shared_memory(v.dtype, [STAGES, STEP, V0], tile)
    sl = gl.allocate_shared_memory(gl.float32, [STAGES, STEP], line)
    sd = gl.allocate_shared_memory(gl.float32, [STAGES, STEP], line)
    queue = make_queue(3)  # loading, two groups
    k_bars = make_bars(2, (1, 2))
    q_bars = make_bars(STAGES, (2, 2))
    fence_async_shared()
    memory = (sq, sg, sk, sv)
    rows = (sl, sd)
    gl.warp_specialize([
        (multiply_part_keys, (0, dk_map, dv_map, k_sums, v_sums, held, entries, seen, Hk, group, S, key_step, scale, D, DV, D0, V0, STAGES, RUN, ADDS, LAST, MASKED, queue, memory, rows, k_bars, q_bars)),
        (multiply_part_keys, (1, dk_map, dv_map, k_sums, v_sums, held, entries, seen, Hk, group, S, key_step, scale, D, DV, D0, V0, STAGES, RUN, ADDS, LAST, MASKED, queue, memory, rows, k_bars, q_bars)),
        (bring_part_queries, ((q, dout, k, v), (qs, douts, ks, vs), (rest_q, rest_k), lse, delta, entries, Hk, group, T, apart, D0, V0, STAGES, RUN, (RAGGED_Q, RAGGED_K), queue, memory, rows, k_bars, q_bars)),
        (take, (gl.constexpr(open_tile), ticket, items, plan, (0, None, None), (heads, tiles, ahead, 1), Hk, T, S, False, False, queue, False)),
    ], [4, 1, 1], [240, 24, 24])
