"""Block attention's forward for Hopper in Gluon, Triton's language of explicit layouts: float16 and bfloat16, tiles of 128 queries of one head, key blocks of 128.

A persistent block of threads has five roles. `take` draws items (a tile of a head, longest first among the heads that the cache holds, by an atomic ticket), `bring`
loads them through the copy engine, `clear` (gluon_keys.py) makes values that no row of the tile sees zero, and two groups of
`multiply` hold 64 rows each: while one group's products run, the other makes exponentials. Full blocks run no mask code. Rows that do not exist are zeros on the way in
and dropped on the way out. Scores and sums are rounded as in the portable source (tiles.py), hence as in the backward.
"""
from functools import lru_cache

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from sparsetile.backends.contract import Resources
from sparsetile.backends.triton import relaunch
from sparsetile.backends.triton.gluon_items import KEYS, ROWS, make_bars, make_queue, next_item, open_item, take
from sparsetile.backends.triton.gluon_keys import clear, look, seen_or
from sparsetile.backends.triton.gluon_maps import Map, map_type
from sparsetile.backends.triton.launch import POINTER, covered, known_start, list_steps, power, scales, turns
from sparsetile.backends.triton.maps import can_map
from sparsetile.backends.triton.tiles import capped, finish

STAGES = gl.constexpr(2)
CACHED = 32 << 20  # bytes of keys and values whose heads are in flight together: they share the second-level cache
READERS = gl.constexpr(4)  # of an item: bring, clear, two groups of multiply


def _exponents(n: int = KEYS.value // 2) -> tuple[str, str]:
    """PTX and its operands for a thread's n scores, which lie in pairs of its two rows in turn: outputs, scores, maxima, rounded maxima * scale, scale.
    A fused score * scale - rounded product is off by what that rounding lost, the same for all of a row: nothing while products are small. Where one of a warp passes 2^8 (0f43800000), the maximum
    is subtracted first, so that the largest gives 1 exactly: one more instruction for each score. The branch gave causal and windows of D 128 2-3 %; D 64 and parts are slower
    than without it (435 for 469 and 474 for 539 TFLOP/s, notebook)."""
    fused = "".join(f"fma.rn.f32 ${i}, ${n + i}, ${4 * n}, {'ab'[i // 2 % 2]};\n" for i in range(n))
    apart = "".join(f"sub.rn.f32 a, ${n + i}, ${2 * n + i}; mul.rn.f32 ${i}, a, ${4 * n};\n" for i in range(n))
    text = f"""{{.reg .pred p; .reg .f32 a, b;
abs.f32 a, ${3 * n}; abs.f32 b, ${3 * n + 2}; max.f32 a, a, b;
setp.gt.f32 p, a, 0f43800000; vote.sync.any.pred p, p, -1;
@p bra FAR;
neg.f32 a, ${3 * n}; neg.f32 b, ${3 * n + 2};
{fused}bra DONE;
FAR:
{apart}DONE: }}"""
    return text, ",".join(["=&f"] * n + ["f"] * 4 * n)


EXPONENTS, OPERANDS = map(gl.constexpr, _exponents())


# ---------------------------------------------------------------------------------------------------------------- loading
@gluon.jit
def bring_tile(desc0, desc1, bar, to0, to1, at, D1: gl.constexpr):
    tma.async_copy_global_to_shared(desc0, at, bar, to0)
    if D1:
        tma.async_copy_global_to_shared(desc1, [at[0], at[1], at[2], desc0.block_shape[3]], bar, to1)


@gluon.jit
def bring(maps, cols, Hq, group, D0: gl.constexpr, D1: gl.constexpr, V0: gl.constexpr, QUERIES: gl.constexpr, queue, tiles, q_bars, k_bars, v_bars):
    """Queries of an item, then its keys and values; those of a masked block go by way of `clear`."""
    q0, q1, k0, k1, v = maps
    sq0, sq1, sk0, sk1, sv = tiles
    q_full, q_free = q_bars
    k_full, k_free = k_bars
    v_full, v_free, v_landed = v_bars
    n = 0
    turn = 0
    head, t, first, plain, kept, count, gap, limit = next_item(0, queue, 1)
    while head >= 0:
        b = head // Hq
        h = head - b * Hq
        hk = h // group
        u = turn % QUERIES
        mbarrier.wait(q_free.index(u), ((turn // QUERIES) & 1) ^ 1)
        if count == 0:
            mbarrier.arrive(q_full.index(u))
        else:
            mbarrier.expect(q_full.index(u), 2 * ROWS * (D0 + D1))
            for w in gl.static_range(2):
                bring_tile(q0, q1, q_full.index(u), sq0.index(2 * u + w), sq1.index(2 * u + w), [b, h, t + 64 * w, 0], D1)
            following = gl.load(cols + first + gl.where(kept == 0, gap, 0))
            for e in range(count):
                row = following * KEYS
                following = gl.load(cols + first + gl.minimum(e + 1, count - 1) + gl.where(e + 1 >= kept, gap, 0))
                s = n % STAGES
                phase = ((n // STAGES) & 1) ^ 1
                mbarrier.wait(k_free.index(s), phase)
                mbarrier.expect(k_full.index(s), 2 * KEYS * (D0 + D1))
                bring_tile(k0, k1, k_full.index(s), sk0.index(s), sk1.index(s), [b, hk, row, 0], D1)
                mbarrier.wait(v_free.index(s), phase)
                if e < plain:
                    mbarrier.expect(v_full.index(s), 2 * KEYS * V0)
                    tma.async_copy_global_to_shared(v, [b, hk, row, 0], v_full.index(s), sv.index(s))
                else:
                    mbarrier.expect(v_landed.index(s), 2 * KEYS * V0)
                    tma.async_copy_global_to_shared(v, [b, hk, row, 0], v_landed.index(s), sv.index(s))
                n += 1
        turn += 1
        head, t, first, plain, kept, count, gap, limit = next_item(turn, queue, 1)


# ---------------------------------------------------------------------------------------------------------------- multiplying
@gluon.jit
def _scores(q0, q1, k0, k1, zero, D1: gl.constexpr):
    s = warpgroup_mma(q0, k0.permute((1, 0)), zero, use_acc=False, is_async=True)
    if D1:
        s = warpgroup_mma(q1, k1.permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def _soften(s, m, l, scale, GUARD: gl.constexpr, R: gl.constexpr):
    """tiles.soften, but with the maxima of pairs first: the compiler's reduction is one chain of 32 maxima a row, while the matrix unit waits; and exponents as `_exponents` says."""
    a, b = gl.split(gl.reshape(s, [64, KEYS // 2, 2]))
    new = gl.maximum(m, gl.convert_layout(gl.max(gl.maximum(a, b), 1), R))
    ref = new
    if GUARD:
        ref = gl.where(new == float("-inf"), 0.0, new)
    p = gl.exp2(gl.inline_asm_elementwise(EXPONENTS, OPERANDS, [s, gl.expand_dims(ref, 1), gl.expand_dims(ref * scale, 1), scale], gl.float32, True, KEYS // 2))
    f = gl.exp2((m - ref) * scale)
    return p, f, new, l * f + gl.sum(p, 1)


@gluon.jit
def _give_back(turn, u, q_free, QUERIES: gl.constexpr):
    """The query tile of the item before: its output has left shared memory by now."""
    if QUERIES == 2:
        if turn > 0:
            tma.store_wait(0)
            mbarrier.arrive(q_free.index(1 - u))


@gluon.jit
def _look(e, place, r, lists, tables, INTERVALS: gl.constexpr, EDGE: gl.constexpr):
    first, kept, gap, limit = place
    cols, kinds = lists
    return look(e, first, kept, gap, limit, r, cols, kinds, tables, INTERVALS, EDGE)


@gluon.jit
def attend(LOOK: gl.constexpr, W: gl.constexpr, place, plain, count, n, turn, sums, lists, tables, scales, D1: gl.constexpr, QUERIES: gl.constexpr, CAP: gl.constexpr,
           INTERVALS: gl.constexpr, BITMAPS: gl.constexpr, EDGE: gl.constexpr, MASKED: gl.constexpr, AGAIN: gl.constexpr, tiles, q_bars, k_bars, v_bars):
    """(maximum, sum, sum of values, blocks met) after an item's blocks, from those before. LOOK: `_look` or another of its kind. AGAIN: there were keys before."""
    m, l, acc = sums
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    O: gl.constexpr = acc.type.layout
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    R: gl.constexpr = gl.SliceLayout(1, L)
    sq0, sq1, sk0, sk1, sv = tiles
    q_full, q_free = q_bars
    k_full, k_free = k_bars
    v_full, v_free, v_landed = v_bars
    scale2, inner, outer = scales
    kind_of = sv.dtype
    zero = gl.zeros([64, KEYS], gl.float32, L)
    r = W * 64 + gl.arange(0, 64, R)
    u = turn % QUERIES
    q0 = sq0.index(2 * u + W)
    q1 = sq1.index(2 * u + W)
    mbarrier.wait(q_full.index(u), (turn // QUERIES) & 1)
    if count == 0:
        _give_back(turn, u, q_free, QUERIES)
    else:
        mbarrier.wait(k_full.index(n % STAGES), (n // STAGES) & 1)
        st = _scores(q0, q1, sk0.index(n % STAGES), sk1.index(n % STAGES), zero, D1)
        kind = -1
        lo, hi = r, r
        if MASKED:  # while the products run
            if plain == 0:
                kind, lo, hi = LOOK(0, place, r, lists, tables, INTERVALS, EDGE)
        _give_back(turn, u, q_free, QUERIES)
        s = warpgroup_mma_wait(0, deps=(st, ))
        mbarrier.arrive(k_free.index(n % STAGES))
        if CAP:
            s = capped(s, inner, outer)
        if MASKED:
            if plain == 0:
                s = seen_or(s, float("-inf"), kind, lo, hi, r, 0, tables, BITMAPS, L)
        x, f, m, l = _soften(s, m, l, scale2, MASKED, R)
        if AGAIN:
            acc = acc * gl.expand_dims(gl.convert_layout(f, gl.SliceLayout(1, O)), 1)
        p = gl.convert_layout(x.to(kind_of), P)
        for e in range(1, count):
            s0 = n % STAGES  # of the block before
            phase = (n // STAGES) & 1
            n += 1
            s1 = n % STAGES
            mbarrier.wait(k_full.index(s1), (n // STAGES) & 1)
            st = _scores(q0, q1, sk0.index(s1), sk1.index(s1), zero, D1)
            mbarrier.wait(v_full.index(s0), phase)
            ot = warpgroup_mma(p, sv.index(s0), acc, is_async=True)
            if MASKED:
                if e >= plain:
                    kind, lo, hi = LOOK(e, place, r, lists, tables, INTERVALS, EDGE)
            s = warpgroup_mma_wait(1, deps=(st, ))
            mbarrier.arrive(k_free.index(s1))
            if CAP:
                s = capped(s, inner, outer)
            if MASKED:
                if e >= plain:
                    s = seen_or(s, float("-inf"), kind, lo, hi, r, 0, tables, BITMAPS, L)
            x, f, m, l = _soften(s, m, l, scale2, MASKED, R)
            p2 = gl.convert_layout(x.to(kind_of), P)
            acc = warpgroup_mma_wait(0, deps=(ot, ))
            mbarrier.arrive(v_free.index(s0))
            acc = acc * gl.expand_dims(gl.convert_layout(f, gl.SliceLayout(1, O)), 1)
            p = p2
        mbarrier.wait(v_full.index(n % STAGES), (n // STAGES) & 1)
        ot = warpgroup_mma(p, sv.index(n % STAGES), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(ot, ))
        mbarrier.arrive(v_free.index(n % STAGES))
        n += 1
    return m, l, acc, n


@gluon.jit
def multiply(W: gl.constexpr, out_map, out, lse, sinks, cols, kinds, tables, Hq, T, scale, inner, outer,
             D1: gl.constexpr, V0: gl.constexpr, DV: gl.constexpr, QUERIES: gl.constexpr, CAP: gl.constexpr, INTERVALS: gl.constexpr, BITMAPS: gl.constexpr,
             EDGE: gl.constexpr, BEFORE: gl.constexpr, MASKED: gl.constexpr, queue, tiles, q_bars, k_bars, v_bars):
    """A group of warps with rows 64 W .. of each item."""
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V0, 16])
    R: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16]))
    sq0, sq1, sk0, sk1, sv = tiles
    q_full, q_free = q_bars
    kind_of = sv.dtype
    scale2 = scale * 1.4426950408889634
    r = W * 64 + gl.arange(0, 64, R)
    n = 0
    turn = 0
    head, t, first, plain, kept, count, gap, limit = next_item(0, queue, 4)
    while head >= 0:
        m = gl.full([64], float("-inf"), gl.float32, R)
        l = gl.zeros([64], gl.float32, R)
        acc = gl.zeros([64, V0], gl.float32, O)
        m, l, acc, n = attend(_look, W, (first, kept, gap, limit), plain, count, n, turn, (m, l, acc), (cols, kinds), tables, (scale2, inner, outer),
                              D1, QUERIES, CAP, INTERVALS, BITMAPS, EDGE, MASKED, False, tiles, q_bars, k_bars, v_bars)
        h = head - head // Hq * Hq
        factor, logs = finish(m, l, scale, scale2, sinks, h, sinks is not None)
        query = t + r
        ok = (query >= 0) & (query < T)
        line = head.to(gl.int64) * T
        if lse is not None:
            gl.store(lse + line + query, logs, mask=ok)
        y = (acc * gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, O)), 1)).to(kind_of)
        to = sq0.index(2 * (turn % QUERIES) + W)._reinterpret(kind_of, [64, V0], sq0.layout)
        to.store(y)
        fence_async_shared()
        # the copy engine zero-fills rows before the first on the way in, but takes none on the way out (illegal instruction)
        if BEFORE:
            if t + W * 64 < 0:
                rows = t + W * 64 + gl.arange(0, 64, gl.SliceLayout(1, O))
                c = gl.arange(0, V0, gl.SliceLayout(0, O))
                inside = gl.expand_dims((rows >= 0) & (rows < T), 1) & gl.expand_dims(c < DV, 0)
                gl.store(out + line * DV + gl.expand_dims(rows.to(gl.int64) * DV, 1) + gl.expand_dims(c, 0), y, mask=inside)
            else:
                tma.async_copy_shared_to_global(out_map, [head, t + W * 64, 0], to)
        else:
            tma.async_copy_shared_to_global(out_map, [head, t + W * 64, 0], to)
        if QUERIES == 1:
            tma.store_wait(0)
            mbarrier.arrive(q_free.index(0))
        turn += 1
        head, t, first, plain, kept, count, gap, limit = next_item(turn, queue, 4)
    tma.store_wait(0)


@gluon.jit
def make_memory(kind: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, V0: gl.constexpr, QUERIES: gl.constexpr):
    """Query tiles in halves of 64 rows, keys in two widths, values; barriers of each."""
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    sq0 = gl.allocate_shared_memory(kind, [2 * QUERIES, 64, D0], tile)
    sk0 = gl.allocate_shared_memory(kind, [STAGES, KEYS, D0], tile)
    sq1 = sq0
    sk1 = sk0
    if D1:
        sq1 = gl.allocate_shared_memory(kind, [2 * QUERIES, 64, D1], tile)
        sk1 = gl.allocate_shared_memory(kind, [STAGES, KEYS, D1], tile)
    sv = gl.allocate_shared_memory(kind, [STAGES, KEYS, V0], tile)
    q_bars = make_bars(QUERIES, (1, 2))
    k_full, k_free, v_full, v_free, v_landed = make_bars(STAGES, (1, 2, 1, 2, 1))
    fence_async_shared()
    return (sq0, sq1, sk0, sk1, sv), q_bars, (k_full, k_free), (v_full, v_free, v_landed)


@gluon.jit(do_not_specialize=["slb", "slh", "heads", "Hq", "group", "T", "S", "first", "nq", "tiles", "ahead", "section", "items", "q_start"])
def forward_gluon(q0, q1, k0, k1, v, out_map, out, lse, offsets, cols, kinds, intervals, bitmaps, list_of, schedule, kv_length, q_starts, sinks, ticket,
            slb, slh, heads, Hq, group, T, S, first, nq, tiles, ahead, section, items, q_start, scale, inner, outer,
            D0: gl.constexpr, D1: gl.constexpr, DV: gl.constexpr, V0: gl.constexpr, QUERIES: gl.constexpr, CAP: gl.constexpr,
            INTERVALS: gl.constexpr, BITMAPS: gl.constexpr, EDGE: gl.constexpr, FROM_LENGTH: gl.constexpr, BEFORE: gl.constexpr):
    """q0, q1, k0, k1, v, out_map: tensor maps; q1 and k1 None where one part holds the width. ticket: 0, or None where every program has one item.
    BEFORE: a tile may start before the call's first query."""
    queue = make_queue(READERS)
    memory, q_bars, k_bars, v_bars = make_memory(v.dtype, D0, D1, V0, QUERIES)
    MASKED: gl.constexpr = INTERVALS or BITMAPS or EDGE
    FEW: gl.constexpr = 56 if BITMAPS or EDGE else 40 if MASKED or CAP else 24  # registers of a thread that does not multiply; three times four warps share 504
    tables = (intervals, bitmaps)
    lists = (offsets, cols, list_of, slb, slh, first, nq, schedule)
    gl.warp_specialize([
        (multiply, (0, out_map, out, lse, sinks, cols, kinds, tables, Hq, T, scale, inner, outer, D1, V0, DV, QUERIES, CAP, INTERVALS, BITMAPS, EDGE, BEFORE, MASKED,
                    queue, memory, q_bars, k_bars, v_bars)),
        (multiply, (1, out_map, out, lse, sinks, cols, kinds, tables, Hq, T, scale, inner, outer, D1, V0, DV, QUERIES, CAP, INTERVALS, BITMAPS, EDGE, BEFORE, MASKED,
                    queue, memory, q_bars, k_bars, v_bars)),
        (bring, ((q0, q1, k0, k1, v), cols, Hq, group, D0, D1, V0, QUERIES, queue, memory, q_bars, k_bars, v_bars)),
        (take, (gl.constexpr(open_item), ticket, items, lists, (q_start, q_starts, kv_length), (heads, tiles, ahead, section), Hq, T, S, EDGE, FROM_LENGTH, queue, False)),
        (clear, (cols, kinds, tables, T, INTERVALS, BITMAPS, MASKED, 1, False, STAGES, queue, memory[4], memory[4], v_bars[0], v_bars[2])),
    ], [4, 1, 1, 1], [(504 - FEW) // 2, FEW, FEW, FEW])


# ---------------------------------------------------------------------------------------------------------------- the host
def widths(D: int, DV: int) -> dict:
    """Columns as they lie in shared memory: of queries and keys D0 + D1 (0: none), of values V0 <= D0, since the output leaves by the queries' memory."""
    V0 = power(DV, 64)
    return dict(D0=max(64 if D <= 64 else 128, V0), D1=64 if D > 128 else 0, V0=V0, QUERIES=1 if D > 128 else 2)


def resources(D: int, DV: int) -> Resources:
    w = widths(D, DV)
    return Resources(threads=384, shared=256 * (w["QUERIES"] + STAGES.value) * (w["D0"] + w["D1"]) + 256 * STAGES.value * w["V0"] + 256, registers=168)


def takes(q, k, v, lists, scale: float, out_kind: str) -> bool:
    """Whether this call is one for `forward_gluon`: no orders, a positive scale, out of q's type, arrays as the copy engine addresses them."""
    return lists.q_order is None and lists.k_order is None and 1e-30 < scale < 1e38 and out_kind == str(q.dtype)[6:] and all(map(can_map, (q, k, v)))


@lru_cache(1024)
def constants(D: int, DV: int, cap=False, intervals=False, bitmaps=False, edge=False, from_length=False, before=True) -> relaunch.Constants:
    made = dict(DV=DV, **widths(D, DV), CAP=cap, INTERVALS=intervals, BITMAPS=bitmaps, EDGE=edge, FROM_LENGTH=from_length, BEFORE=before)
    return relaunch.Constants(made, num_warps=4, enable_fp_fusion=False)


def launch(q, k, v, lists, out, lse, place, scale: float, *, sink_logits, softcap, kv_length, q_start):
    """Fills out [B,Hq,T,Dv] and lse [B,Hq,T] (or None)."""
    (B, Hq, T, D), (Hk, S), DV = q.shape, k.shape[1:3], v.shape[3]
    host, starts = known_start(q_start)
    n, covers, _ = covered(T, ROWS.value, host, lists.first, lists.nq)
    order, ahead, section = turns(lists, covers, B * Hq, Hq // Hk, 2 * S * (D + DV), CACHED)
    items, sms = B * Hq * n, max(place.sms, 1)
    made = constants(D, DV, softcap is not None, lists.has_intervals, lists.has_bitmaps, kv_length is not None or lists.nk * KEYS.value > S, q_start is None,
                     host is None or host % ROWS.value != 0)
    size, inner, outer, _ = scales(scale, softcap)
    D0, D1, V0 = made["D0"], made["D1"], made["V0"]
    maps = (Map(q, 64, D0), Map(q, 64, D1) if D1 else None, Map(k, KEYS.value, D0), Map(k, KEYS.value, D1) if D1 else None,
            Map(v, KEYS.value, V0), Map(out.view(B * Hq, T, DV), 64, V0))
    pointers = (out, lse, lists.offsets, lists.cols, lists.kinds, lists.intervals, lists.bitmaps, lists.list_of, order, kv_length, starts, sink_logits, place.zeros((1,), "int32") if items > sms else None)
    numbers = (*list_steps(lists), B * Hq, Hq, Hq // Hk, T, S, lists.first, lists.nq, n,
               ahead, section, items, host or 0, size, inner, outer)
    relaunch.launch(forward_gluon, (min(items, sms),), place, pointers, numbers, made, (q.dtype,), maps)


def artifacts(problem) -> list[dict]:
    has, pointer = problem.features.__contains__, POINTER[problem.dtype("q")]
    made = constants(problem["D"], problem["Dv"], has("softcap"), has("interval"), has("bitmap"), has("kv_length") or problem["S"] % KEYS.value != 0,
                     has("kv_length") and not has("q_start"), has("kv_length") or has("q_start"))
    halves = [(half, made[f"D{half}"]) for half in (0, 1) if made[f"D{half}"]]
    maps = {f"q{half}": map_type(pointer, [1, 1, 64, width]) for half, width in halves} | {f"k{half}": map_type(pointer, [1, 1, KEYS.value, width]) for half, width in halves}
    maps |= dict(v=map_type(pointer, [1, 1, KEYS.value, made["V0"]]), out_map=map_type(pointer, [1, 64, made["V0"]]))
    names = ["offsets", "cols", "kinds", "intervals", "bitmaps", "list_of", "schedule", "ticket"] + ["kv_length"] * has("kv_length") + ["q_starts"] * has("q_start")
    arrays = dict(out=pointer, lse="*fp32") | dict.fromkeys(names, "*i32") | ({"sinks": "*fp32"} if has("sink") else {})
    integers = ("slb", "slh", "heads", "Hq", "group", "T", "S", "first", "nq", "tiles", "ahead", "section", "items", "q_start")
    return [relaunch.artifact(forward_gluon, made, arrays, integers, ("scale", "inner", "outer"), maps)]
