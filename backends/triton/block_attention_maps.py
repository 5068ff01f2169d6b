"""Path "portable" of block_attention where tensor maps bring the tiles (sm_90a, sm_100): a program has a tile of queries of one head and runs through the blocks of its list.

What it takes and gives: block_attention.py. Two programs share a multiprocessor, three of narrow heads, and one multiplies while another takes exponentials; so 255 or 168 registers a thread are
all there are, and each instruction of a loop counts. Which keys of a partial block no row sees is not asked: their probabilities are 0, and where their values are not finite the sums become NaN.
Then, and only then, the tile is done once more, with the values of such keys as 0.
"""
from functools import lru_cache

import triton
import triton.language as tl

from sparsetile.backends.triton import relaunch
from sparsetile.backends.triton.float8 import pointer
from sparsetile.backends.triton.launch import FAR, covered, known_start, list_steps, options, parts, power, scales, turns
from sparsetile.backends.triton.maps import Map, can_map
from sparsetile.backends.triton.tiles import capped, drawn, entries_of, finish, negated, opened, place_of, product, rows_of, seen, soften, unfused


@triton.jit
def scores(q0, q1, k0_map, k1_map, b, h, row, D0: tl.constexpr, D1: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr):
    """Products of the queries with the block of keys whose first is `row`. Columns past the width and keys past the last come as 0."""
    s = product(q0, tl.trans(k0_map.load([b, h, row, 0]).reshape(BK, D0)), tl.zeros([BQ, BK], tl.float32))
    if D1:
        s = product(q1, tl.trans(k1_map.load([b, h, row, D0]).reshape(BK, D1)), s)
    return s


@triton.jit
def step(s, acc, m, l, v_map, b, h, row, mask, read, scale, inner, outer, V0: tl.constexpr, BK: tl.constexpr, CAP: tl.constexpr, MASK: tl.constexpr, CLEAR: tl.constexpr):
    """Takes the block of keys at `row`, whose scores are s, into the sums. MASK: `mask` [BQ, BK] hides pairs. CLEAR: values of keys not `read` are 0."""
    if CAP:
        s = capped(s, inner, outer)
    if MASK:
        s = tl.where(mask, s, float("-inf"))
    p, a, m, l = soften(s, m, l, scale, MASK, True)
    v0 = v_map.load([b, h, row, 0]).reshape(BK, V0)
    if CLEAR:
        v0 = tl.where(read[:, None], v0, tl.zeros([BK, V0], v0.dtype))
    return product(p.to(v0.dtype), v0, acc * a[:, None]), m, l


@triton.jit
def shown(row, kind, intervals, bitmaps, limit, BQ: tl.constexpr, BK: tl.constexpr, INTERVALS: tl.constexpr, BITMAPS: tl.constexpr, EDGE: tl.constexpr, ANY: tl.constexpr):
    """(which pairs [BQ, BK] of a block with a mask are seen, which of its keys exist)."""
    read = tl.arange(0, BK) >= 0
    mask = read[None, :]
    if INTERVALS or BITMAPS:
        mask = seen(kind, intervals, bitmaps, BQ, BK, INTERVALS, BITMAPS, ANY)
    if EDGE:
        read = row + tl.arange(0, BK) < limit
        mask = mask & read[None, :]
    return mask, read


@triton.jit
def put_by(acc, AHEAD: tl.constexpr):
    """Sums as they go from turn to turn. AHEAD: as integers, or Triton would wait for them twice, and ptxas after every product (C7515)."""
    if AHEAD:
        return acc.to(tl.int32, bitcast=True)
    else:
        return acc


@triton.jit
def taken_up(kept, AHEAD: tl.constexpr):
    if AHEAD:
        return kept.to(tl.float32, bitcast=True)
    else:
        return kept


@triton.jit
def through(q0, q1, k0_map, k1_map, v_map, cols, kinds, intervals, bitmaps, a, n, e, c, edge, limit, b, h, scale, inner, outer,
            D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, CAP: tl.constexpr,
            INTERVALS: tl.constexpr, BITMAPS: tl.constexpr, EDGE: tl.constexpr, LENGTHS: tl.constexpr, AHEAD: tl.constexpr):
    """Sums over a tile's list: blocks with a mask, then the others. LENGTHS: values past the limit may be anything.

    With two stages Triton asks for a turn's tiles at the end of the turn before, and keys that are needed at its beginning are waited for, a tenth of the time. AHEAD: a turn takes a block's scores
    into the sums and then makes the next block's, whose keys came meanwhile; the last turn's next block is any. Columns and kinds are loaded earlier still, so that the pipeline has addresses,
    by pointers of their own, for an index of two words would take registers.
    """
    m = tl.full([BQ], float("-inf"), tl.float32)
    l = tl.zeros([BQ], tl.float32)
    kept = put_by(tl.zeros([BQ, V0], tl.float32), AHEAD)
    all_keys = tl.arange(0, BK) >= 0
    full = tl.load(cols + a) * BK
    row = full
    if EDGE or INTERVALS or BITMAPS:
        first = e - edge
        column_at = cols + first + 1
        kind_at = kinds + first + 1
        begin = tl.where(edge > 0, n, first)
        row = tl.where(first < c, tl.load(cols + begin) * BK, full)
        next_kind = tl.load(kinds + begin)
        following = tl.load(column_at, mask=first + 1 < c, other=0)
    if AHEAD:
        s = scores(q0, q1, k0_map, k1_map, b, h, row, D0, D1, BQ, BK)
    if EDGE or INTERVALS or BITMAPS:
        for f in tl.range(first, c):
            next_row = tl.where(f + 1 < c, following * BK, full)
            kind = next_kind
            next_kind = tl.load(kind_at)
            column_at += 1
            kind_at += 1
            following = tl.load(column_at, mask=f + 2 < c, other=0)
            mask, read = shown(row, kind, intervals, bitmaps, limit, BQ, BK, INTERVALS, BITMAPS, EDGE, EDGE)
            if not AHEAD:
                s = scores(q0, q1, k0_map, k1_map, b, h, row, D0, D1, BQ, BK)
            acc, m, l = step(s, taken_up(kept, AHEAD), m, l, v_map, b, h, row, mask, read, scale, inner, outer, V0, BK, CAP, True, LENGTHS)
            if AHEAD:
                s = scores(q0, q1, k0_map, k1_map, b, h, next_row, D0, D1, BQ, BK)
            kept = put_by(acc, AHEAD)
            row = next_row
    column_at = cols + a + 1
    following = tl.load(column_at, mask=a + 1 < n, other=0)
    for f in tl.range(a, n):
        next_row = following * BK
        column_at += 1
        following = tl.load(column_at, mask=f + 2 < n, other=0)
        if not AHEAD:
            s = scores(q0, q1, k0_map, k1_map, b, h, row, D0, D1, BQ, BK)
        acc, m, l = step(s, taken_up(kept, AHEAD), m, l, v_map, b, h, row, all_keys, all_keys, scale, inner, outer, V0, BK, CAP, False, False)
        if AHEAD:
            s = scores(q0, q1, k0_map, k1_map, b, h, next_row, D0, D1, BQ, BK)
        kept = put_by(acc, AHEAD)
        row = next_row
    return taken_up(kept, AHEAD), m, l


@triton.jit
def again(q0, q1, k0_map, k1_map, v_map, cols, kinds, intervals, bitmaps, a, c, limit, row_ok, b, h, scale, inner, outer,
          D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, CAP: tl.constexpr,
          INTERVALS: tl.constexpr, BITMAPS: tl.constexpr, EDGE: tl.constexpr):
    """`through`, where values of keys that no row sees may be anything; in one loop, for with two more ptxas would wait after every product (C7512)."""
    m = tl.full([BQ], float("-inf"), tl.float32)
    l = tl.zeros([BQ], tl.float32)
    acc = tl.zeros([BQ, V0], tl.float32)
    for f in tl.range(a, c):
        row = tl.load(cols + f) * BK
        mask, read = shown(row, tl.load(kinds + f), intervals, bitmaps, limit, BQ, BK, INTERVALS, BITMAPS, EDGE, True)
        read = tl.max((mask & row_ok[:, None]).to(tl.int32), 0) > 0
        s = scores(q0, q1, k0_map, k1_map, b, h, row, D0, D1, BQ, BK)
        acc, m, l = step(s, acc, m, l, v_map, b, h, row, mask, read, scale, inner, outer, V0, BK, CAP, True, True)
    return acc, m, l


@triton.jit(do_not_specialize=["slb", "slh", "heads", "Hq", "group", "T", "S", "first", "nq", "tiles", "ahead", "section", "q_start"])
def forward_maps(q0_map, q1_map, k0_map, k1_map, v_map, out_map, q, out, lse, offsets, cols, kinds, intervals, bitmaps, list_of, schedule, q_order, kv_length, q_starts, sinks,
                 sqb, sqh, sqt, slb, slh, heads, Hq, group, T, S, first, nq, tiles, ahead, section, q_start, scale, inner, outer,
                 D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, NEGATE: tl.constexpr, CAP: tl.constexpr,
                 INTERVALS: tl.constexpr, BITMAPS: tl.constexpr, EDGE: tl.constexpr, FROM_LENGTH: tl.constexpr, FAR: tl.constexpr, AHEAD: tl.constexpr):
    """q1_map, k1_map: None where one part holds the width. q0_map, out_map: None where queries have an order, or lie as the copy engine cannot address them, out_map too where a tile begins before the first query; FAR is about offsets without them."""
    head, i = drawn(tl.program_id(0), (heads, tiles, ahead, section))
    b = head // Hq
    h = head % Hq
    which = tl.load(list_of + b * slb + h * slh)
    limit, start = place_of(b, T, S, q_start, q_starts, kv_length, FROM_LENGTH)
    tile, base, row, row_ok = rows_of(i, which, schedule, q_order, start, T, first, nq, tiles, BQ, FAR)
    if q0_map is None:
        q0, q1 = opened(q + b.to(tl.int64) * sqb + h.to(tl.int64) * sqh + base * sqt, row * sqt, row_ok, D, D0, D1, NEGATE)
    else:
        q0 = q0_map.load([b, h, base.to(tl.int32), 0]).reshape(BQ, D0)
        q1 = 0.0
        if D1:
            q1 = q1_map.load([b, h, base.to(tl.int32), D0]).reshape(BQ, D1)
        if NEGATE:
            q0 = negated(q0)
            if D1:
                q1 = negated(q1)
    a, n, e, c, edge = entries_of(tile, which, offsets, cols, limit, nq, BK, EDGE)
    scale2 = scale * 1.4426950408889634
    LENGTHS: tl.constexpr = kv_length is not None
    acc, m, l = through(q0, q1, k0_map, k1_map, v_map, cols, kinds, intervals, bitmaps, a, n, e, c, edge, limit, b, h // group, scale2, inner, outer,
                        D0, D1, V0, BQ, BK, CAP, INTERVALS, BITMAPS, EDGE, LENGTHS, AHEAD)
    if INTERVALS or BITMAPS:
        total = tl.sum(tl.sum(acc, 1), 0)
        if total != total:
            acc, m, l = again(q0, q1, k0_map, k1_map, v_map, cols, kinds, intervals, bitmaps, a, c, limit, row_ok, b, h // group, scale2, inner, outer,
                              D0, D1, V0, BQ, BK, CAP, INTERVALS, BITMAPS, EDGE)
    l, own = unfused(m, l, scale2, out.dtype.element_ty)
    factor, logs = finish(m, l, scale, scale2, sinks, h, sinks is not None)
    line = head.to(tl.int64) * T + base
    if lse is not None:
        tl.store(lse + line + row, logs, mask=row_ok)
    found = (acc * (factor * own)[:, None]).to(out.dtype.element_ty)
    if out_map is None:
        column = tl.arange(0, V0)
        tl.store(out + line * DV + (row * DV)[:, None] + column[None, :], found, mask=row_ok[:, None] & (column < DV)[None, :])
    else:
        out_map.store([head, base.to(tl.int32), 0], found.reshape(1, BQ, V0))


# ---------------------------------------------------------------------------------------------------------------- the host
FEW = {"ptx_options": "--register-usage-level=0"}  # else ptxas keeps the 16 addresses of Q for both loops at once, and fetches them from memory between the products: 447 TFLOP/s for 510, causal 32k
THREE = {"maxnreg": 168}  # three programs of four warps a multiprocessor


@lru_cache(1024)
def constants(D: int, DV: int, config: tuple, arch: str, negate=False, cap=False, intervals=False, bitmaps=False, edge=False, from_length=False, far=False) -> relaunch.Constants:
    """The compile-time constants of `forward_maps`. config: items."""
    made, (D0, D1), V0 = dict(config), parts(D), power(DV, 64)
    BQ, BK = made["block_q"], made["block_k"]
    three = arch == "sm_90a" and made["num_warps"] == 4 and BQ == 64 and max(D, DV) <= 64
    return relaunch.Constants({**dict(D=D, D0=D0, D1=D1, DV=DV, V0=V0, BQ=BQ, BK=BK, NEGATE=negate, CAP=cap, INTERVALS=intervals, BITMAPS=bitmaps, EDGE=edge, FROM_LENGTH=from_length, FAR=far,
                                      AHEAD=made["num_warps"] == 4),
                               **options(made), **({} if arch == "cpu" else FEW), **(THREE if three else {})})


def launch(q, k, v, lists, out, lse, place, config, scale: float, *, sink_logits, softcap, kv_length, q_start):
    """Fills out [B,Hq,T,Dv] and lse [B,Hq,T] (or None)."""
    (B, Hq, T, D), (Hk, S), DV = q.shape, k.shape[1:3], v.shape[3]
    BQ, BK, ordered = lists.block_q, lists.block_k, lists.q_order is not None
    host, starts = known_start(q_start)
    n, covers, _ = (lists.nq, True, False) if ordered else covered(T, BQ, host, lists.first, lists.nq)
    order, ahead, section = turns(lists, covers, B * Hq, Hq // Hk, 2 * S * (D + DV))
    size, inner, outer, negate = scales(scale, softcap)
    made = constants(D, DV, tuple(config.items()), place.arch, negate, softcap is not None, lists.has_intervals, lists.has_bitmaps, kv_length is not None or lists.nk * BK > S, q_start is None,
                     (T if ordered else BQ) * max(abs(q.stride(2)), DV) >= FAR)
    D0, D1, V0 = (made[name] for name in ("D0", "D1", "V0"))
    whole = host is not None and host % BQ == 0  # else a head's first tile begins before its first query: the copy engine brings zeros for such rows, but takes none (an illegal instruction)
    mapped = not ordered and can_map(q), not ordered and whole and DV * out.element_size() % 16 == 0
    maps = (Map(q, BQ, D0) if mapped[0] else None, Map(q, BQ, D1) if mapped[0] and D1 else None, Map(k, BK, D0), Map(k, BK, D1) if D1 else None, Map(v, BK, V0),
            Map(out.view(B * Hq, T, DV), BQ, V0) if mapped[1] else None)
    relaunch.launch(forward_maps, (n * B * Hq,), place,
                    (q, out, lse, lists.offsets, lists.cols, lists.kinds, lists.intervals, lists.bitmaps, lists.list_of, order, lists.q_order, kv_length, starts, sink_logits),
                    (*q.stride()[:3], *list_steps(lists), B * Hq, Hq, Hq // Hk, T, S, lists.first, lists.nq, n, ahead, section, host or 0, size, inner, outer),
                    made, (q.dtype, out.dtype, mapped), maps)


def artifact(problem, config) -> dict:
    """What `launch` would compile for the problem."""
    has, kind = problem.features.__contains__, pointer(problem.dtype("q"), problem.arch)
    made = constants(problem["D"], problem["Dv"], tuple(config.items()), problem.arch, False, has("softcap"), has("interval"), has("bitmap"), has("kv_length") or problem["S"] % config["block_k"] != 0,
                     has("kv_length") and not has("q_start"))
    D0, D1, V0, BQ, BK = (made[name] for name in ("D0", "D1", "V0", "BQ", "BK"))
    ordered = has("order")
    blocks = {"k0_map": (BK, D0), "v_map": (BK, V0)} | ({"k1_map": (BK, D1)} if D1 else {})
    if not has("order"):
        blocks |= {"q0_map": (BQ, D0)} | ({"q1_map": (BQ, D1)} if D1 else {})
    maps = {name: f"tensordesc<{kind[1:]}{[1, 1, *block]}>" for name, block in blocks.items()}
    if not (ordered or has("q_start") or has("kv_length")) and problem["Dv"] % 8 == 0:
        maps["out_map"] = f"tensordesc<{kind[1:]}{[1, BQ, V0]}>"
    names = ["offsets", "cols", "kinds", "intervals", "bitmaps", "list_of", "schedule"] + ["q_order"] * ordered + ["kv_length"] * has("kv_length") + ["q_starts"] * has("q_start")
    arrays = {"q": kind, "out": kind, "lse": "*fp32"} | dict.fromkeys(names, "*i32") | ({"sinks": "*fp32"} if has("sink") else {})
    strides = ("sqb", "sqh", "sqt")
    integers = (*strides, "slb", "slh", "heads", "Hq", "group", "T", "S", "first", "nq", "tiles", "ahead", "section", "q_start")
    return relaunch.artifact(forward_maps, made, arrays, integers, ("scale", "inner", "outer"), maps, aligned=strides if problem["D"] % 16 == 0 else ())
