"""Path "gluon" of block_attention_backward, queries: dQ. An item is a tile of 128 queries of one head; its keys and values pass by, 128 a step.

A persistent block of threads has five roles, as in the forward: `take` draws items, `bring_keys` loads through the copy engine, `clear` makes keys that no query of the tile sees zero
(0 * NaN), and two groups of `multiply_queries` hold 64 rows each. Full blocks run no mask code.
"""
import triton
import triton.experimental.gluon.language as gl
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from sparsetile.backends.triton.block_attention_gluon import _look, clear, key_word
from sparsetile.backends.triton.gluon_items import KEYS, ROWS, make_queue, next_item, open_item, take

STAGES = gl.constexpr(2)
READERS = gl.constexpr(4)  # of an item: loading, clearing, two groups


@triton.jit
def probabilities(raw, lse, scale):
    """The score is rounded first, as the forward rounds it: score - lse is right however large both are."""
    return tl.math.exp2((raw * scale - lse) * 1.4426950408889634)


@gluon.jit
def known(lse, delta, at, ok):
    """(lse, delta) of rows; lse +inf, hence P = 0, where a row is not there, sees no key, or its sink holds all."""
    logs = gl.load(lse + at, mask=ok, other=float("inf"))
    return gl.where(gl.abs(logs) < float("inf"), logs, float("inf")), gl.load(delta + at, mask=ok, other=0.0)


@gluon.jit
def leave(y, out, out_map, at, row, rows, through, line, WIDTH: gl.constexpr, L: gl.constexpr):
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
    words = gl.expand_dims(key_word(kind, lo, hi, r, 0, tables, BITMAPS), 1)
    for n in gl.static_range(1, 4):
        words = gl.where(gl.expand_dims(c, 0) >= 32 * n, gl.expand_dims(key_word(kind, lo, hi, r, n, tables, BITMAPS), 1), words)
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
            logs, shift = known(lse + line, delta + line, t + r, (t + r >= 0) & (t + r < T))
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
            leave(y, dq, dq_map, [head, t + W * 64, 0], t + W * 64, T, None, line, D, O)
        else:
            leave(y, dq, dq_map, [head, t + W * 64, 0], t + W * 64, T, sq.index(W), line, D, O)
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
        (take, (gl.constexpr(open_item), ticket, items, lists, (q_start, q_starts, kv_length), (heads, tiles, ahead, 1), Hq, T, S, EDGE, FROM_LENGTH, queue, False)),
        (clear, (cols, kinds, tables, T, D0, INTERVALS, BITMAPS, MASKED, queue, sk, k_full, k_landed)),
    ], [4, 1, 1, 1], [232, 40, 40, 40])
