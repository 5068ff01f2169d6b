"""Path "portable" of block_attention_backward where the copy engine brings what a program runs through: keys and values of `rows_maps`, queries and dO of `columns_maps` (tensor maps, zeros outside the arrays).

What both take and give: block_backward_portable.py. Which keys of a partial block no row sees is not asked here: one that is no number leaves NaN in dQ (0 * NaN), and such tiles, which `rows_maps` marks,
are done once more by pointers (`rows_again`). Two programs share a multiprocessor, one multiplies while the other takes exponentials: registers and instructions are what counts, and maps save the addresses.
The compiler asks for a block at the end of a turn; with two blocks in shared memory that is just before it is wanted, so what can be kept elsewhere is, for a third.
"""
from functools import lru_cache

import triton
import triton.language as tl

from sparsetile.backends.triton import relaunch
from sparsetile.backends.triton.launch import list_steps, turns
from sparsetile.backends.triton.maps import Map, can_map
from sparsetile.backends.triton.tiles import drawn, entries_of, place_of, product, queries_of, rows_known, rows_of, seen, seen_by_key, store, tanh

CACHED = 32 << 20  # bytes of what is streamed by the heads whose tiles are in flight together: the second-level cache holds it
OWN = ("D", "D0", "DV", "V0", "BQ", "BK", "CAP", "INTERVALS", "BITMAPS", "EDGE", "FROM_LENGTH", "FAR")  # constants of both kernels
ARCHS = ("sm_90a",)  # sm_100 lays sums out in another memory: not measured there


def _whole(made: dict) -> bool:
    """Whether tiles hold whole rows, in one piece, of a width that the copy engine can write."""
    return made["D"] % 8 == made["DV"] % 8 == 0 and made["SLICES"] == 1 and not (made["CHUNK"] or made["D1"] or made["V1"])


def takes(q, k, v, dout, lists, made: dict, arch: str) -> bool:
    """Whether a call with these constants can go this way."""
    return arch in ARCHS and q.element_size() == 2 and lists.q_order is None and lists.k_order is None and _whole(made) and all(can_map(x) for x in (q, k, v, dout))


def takes_problem(problem, made: dict) -> bool:
    return problem.arch in ARCHS and problem.dtype("q", "float32") != "float32" and "order" not in problem.features and _whole(made)


@triton.jit
def _held(x, R: tl.constexpr, C: tl.constexpr):
    """x, in registers as a product's left side: or-ed to a product of zeros it takes that product's layout, where tensors that were loaded are read from shared memory for every product."""
    none = tl.dot(tl.zeros([R, 16], x.dtype), tl.zeros([16, C], x.dtype)).to(x.dtype)
    return (x.to(tl.int16, bitcast=True) | none.to(tl.int16, bitcast=True)).to(x.dtype, bitcast=True)


@triton.jit
def _logits(raw, scale, inner, outer, CAP: tl.constexpr):
    """(logits of the products q.k, their slope less the scale)."""
    if CAP:
        y = tanh(inner * raw)
        return outer * y, 1.0 - y * y
    else:
        return raw * scale, 1.0


@triton.jit
def _ends(kind, intervals, BQ: tl.constexpr):
    """First key that each row of a picture sees, and the one past its last, by one load."""
    r = tl.arange(0, BQ)
    return tl.split(tl.load(intervals + (kind >> 1).to(tl.int64) * (2 * BQ) + 2 * r[:, None] + tl.arange(0, 2)[None, :]))


@triton.jit
def _seen_from(lo, hi, c):
    """Whether lo <= c < hi, by one comparison. Tables have no lo above its hi."""
    return (c - lo).to(tl.uint32) < (hi - lo).to(tl.uint32)


@triton.jit
def _row_step(dq, q, g, logs, shift, k_map, v_map, b, h, row, kind, limit, intervals, bitmaps, scale, inner, outer, D0: tl.constexpr, V0: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
              CAP: tl.constexpr, INTERVALS: tl.constexpr, BITMAPS: tl.constexpr, EDGE: tl.constexpr):
    """One block of keys, the first of which is `row`. EDGE: keys from `limit` on do not exist."""
    k = k_map.load([b, h, row, 0]).reshape(BK, D0)
    s, slope = _logits(product(q, tl.trans(k), tl.zeros([BQ, BK], tl.float32)), scale, inner, outer, CAP)
    c = tl.arange(0, BK)
    if INTERVALS or BITMAPS:
        if BITMAPS or EDGE:
            s = tl.where(seen(kind, intervals, bitmaps, BQ, BK, INTERVALS, BITMAPS), s, float("-inf"))
        else:
            lo, hi = _ends(kind, intervals, BQ)
            s = tl.where(_seen_from(lo[:, None], hi[:, None], c[None, :]), s, float("-inf"))
    if EDGE:
        s = tl.where((row + c < limit)[None, :], s, float("-inf"))
    grad = product(g, tl.trans(v_map.load([b, h, row, 0]).reshape(BK, V0)), tl.zeros([BQ, BK], tl.float32)) - shift[:, None]
    ds = tl.math.exp2((s - logs[:, None]) * 1.4426950408889634) * grad * slope
    return product(ds.to(k.dtype), k, dq)


@triton.jit(do_not_specialize=["slb", "slh", "Hq", "group", "T", "S", "first", "nq", "heads", "tiles", "ahead", "section", "q_start"])
def rows_maps(q_map, g_map, k_map, v_map, dq_map, lse, delta, dq, bad, offsets, cols, kinds, intervals, bitmaps, list_of, schedule, kv_length, q_starts,
         slb, slh, Hq, group, T, S, first, nq, heads, tiles, ahead, section, q_start, scale, inner, outer,
         D: tl.constexpr, D0: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
         CAP: tl.constexpr, INTERVALS: tl.constexpr, BITMAPS: tl.constexpr, EDGE: tl.constexpr, FROM_LENGTH: tl.constexpr, FAR: tl.constexpr, HELD: tl.constexpr):
    """bad [heads, tiles]: where dQ holds NaN; None where no block has a mask. dq_map: None where the copy engine cannot take dQ."""
    own, i = drawn(tl.program_id(0), (heads, tiles, ahead, section))
    b = (own // Hq).to(tl.int64)
    h = own % Hq
    which = tl.load(list_of + b * slb + h * slh)
    limit, start = place_of(b, T, S, q_start, q_starts, kv_length, FROM_LENGTH)
    tile, base, t, row_ok = rows_of(i, which, schedule, None, start, T, first, nq, tiles, BQ, FAR)
    a, n, e, c, edge = entries_of(tile, which, offsets, cols, limit, nq, BK, EDGE)
    line = (b * Hq + h) * T + base
    logs, shift = rows_known(lse, delta, line, t, row_ok, True)
    batch = b.to(tl.int32)
    q0 = q_map.load([batch, h, base.to(tl.int32), 0]).reshape(BQ, D0)
    g0 = g_map.load([batch, h, base.to(tl.int32), 0]).reshape(BQ, V0)
    if HELD:
        q0 = _held(q0, BQ, D0)
        g0 = _held(g0, BQ, V0)
    head = h // group
    sums = tl.zeros([BQ, D0], tl.float32)
    # ---- blocks with a mask; entries and kinds are loaded one turn early, those past the end are readable
    if EDGE or INTERVALS or BITMAPS:
        begin = tl.where(edge > 0, n, e)
        following = tl.load(cols + begin)
        kind_ahead = tl.load(kinds + begin)
        for f in tl.range(e - edge, c):
            key = following * BK
            kind = kind_ahead
            following = tl.load(cols + f + 1)
            kind_ahead = tl.load(kinds + f + 1)
            sums = _row_step(sums, q0, g0, logs, shift, k_map, v_map, batch, head, key, kind, limit, intervals, bitmaps, scale, inner, outer, D0, V0, BQ, BK, CAP, INTERVALS, BITMAPS, EDGE)
    following = tl.load(cols + a)
    for f in tl.range(a, n):
        key = following * BK
        following = tl.load(cols + f + 1)
        sums = _row_step(sums, q0, g0, logs, shift, k_map, v_map, batch, head, key, -1, limit, intervals, bitmaps, scale, inner, outer, D0, V0, BQ, BK, CAP, False, False, False)
    if bad is not None:
        total = tl.sum(tl.sum(sums, 1), 0)
        tl.store(bad + own * tiles + i, (total != total).to(tl.int32))
    if dq_map is None:
        store(dq + line * D, t * D, row_ok, sums * scale, 0, D0, D)
    else:
        dq_map.store([own, base.to(tl.int32), 0], (sums * scale).to(dq_map.dtype).reshape(1, BQ, D0))


@triton.jit
def _known(lse, delta, line, row, r, T, ROWS: tl.constexpr):
    """[rows, 2]: lse and delta of queries row + r of a head, whose query 0 stands at `line`. One load of both: one alone would be few enough for every thread to load all it uses. ROWS: 0 where there is no such query."""
    at = tl.where(tl.arange(0, 2)[None, :] == 0, lse, delta) + line + row + r[:, None]
    if ROWS:
        return tl.load(at, mask=((row + r >= 0) & (row + r < T))[:, None], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _column_step(dk, dv, k, v, q_map, g_map, b, h, row, known, lse, delta, line, r, T, kind, intervals, bitmaps, scale, inner, outer, D0: tl.constexpr, V0: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
                 CAP: tl.constexpr, INTERVALS: tl.constexpr, BITMAPS: tl.constexpr, ROWS: tl.constexpr, HELD: tl.constexpr):
    """One block of queries, row + r. ROWS: not all of them are there; of those that are not, q, dO, lse and delta are 0. Where every query sees all keys none has an lse of -inf. HELD: `known` is here already."""
    q = q_map.load([b, h, row, 0]).reshape(BQ, D0)
    g = g_map.load([b, h, row, 0]).reshape(BQ, V0)
    s, slope = _logits(product(k, tl.trans(q), tl.zeros([BK, BQ], tl.float32)), scale, inner, outer, CAP)
    grad = product(v, tl.trans(g), tl.zeros([BK, BQ], tl.float32))
    if not HELD:
        known = _known(lse, delta, line, row, r, T, ROWS)
    logs, shift = tl.split(known)
    if INTERVALS or BITMAPS:
        if BITMAPS:
            mask = seen_by_key(kind, intervals, bitmaps, BQ, BK, INTERVALS, BITMAPS)
        else:
            lo, hi = _ends(kind, intervals, BQ)
            mask = _seen_from(lo[None, :], hi[None, :], tl.arange(0, BK)[:, None])
        if ROWS:
            mask = mask & ((row + r >= 0) & (row + r < T))[None, :]
        s = tl.where(mask, s, float("-inf"))
        grad = tl.where(mask, grad, 0.0)
        logs = tl.maximum(logs, -3e38, propagate_nan=tl.PropagateNan.ALL)
    p = tl.math.exp2((s - logs[None, :]) * 1.4426950408889634)
    ds = p * (grad - shift[None, :]) * slope
    dv = product(p.to(q.dtype), g, dv)
    dk = product(ds.to(q.dtype), q, dk)
    return dk, dv


@triton.jit(do_not_specialize=["slb", "slh", "Hk", "group", "T", "S", "first", "nq", "nk", "heads", "tiles", "ahead", "section", "q_start"])
def columns_maps(q_map, g_map, k_map, v_map, dk_map, dv_map, lse, delta, offsets, entries, kinds, intervals, bitmaps, list_of, schedule, kv_length, q_starts,
            slb, slh, Hk, group, T, S, first, nq, nk, heads, tiles, ahead, section, q_start, scale, inner, outer,
            D: tl.constexpr, D0: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
            CAP: tl.constexpr, INTERVALS: tl.constexpr, BITMAPS: tl.constexpr, EDGE: tl.constexpr, FROM_LENGTH: tl.constexpr, FAR: tl.constexpr, HELD: tl.constexpr):
    own, j = drawn(tl.program_id(0), (heads, tiles, ahead, section))
    b = (own // Hk).to(tl.int64)
    hk = own % Hk
    if schedule is not None:
        j = tl.load(schedule + tl.load(list_of + b * slb + hk * group * slh) * nk + j)
    limit, start = place_of(b, T, S, q_start, q_starts, kv_length, FROM_LENGTH)
    w = tl.arange(0, BK)
    r = tl.arange(0, BQ)
    base = j.to(tl.int64) * BK
    members = tl.where(base < limit, group, 0)
    batch = b.to(tl.int32)
    k0 = k_map.load([batch, hk, base.to(tl.int32), 0]).reshape(BK, D0)
    v0 = v_map.load([batch, hk, base.to(tl.int32), 0]).reshape(BK, V0)
    if HELD:
        k0 = _held(k0, BK, D0)
    sum_k = tl.zeros([BK, D0], tl.float32)
    sum_v = tl.zeros([BK, V0], tl.float32)
    origin = (first * BQ - start).to(tl.int32)
    for member in tl.range(0, members, num_stages=1):
        h = hk * group + member
        line = (b * Hk * group + h) * T
        a, e, m, c = queries_of(j, tl.load(list_of + b * slb + h * slh), offsets, entries, start, T, first, nq, nk, BQ, EDGE)
        # ---- blocks with a mask
        if INTERVALS or BITMAPS:
            following = tl.load(entries + m)
            kind_ahead = tl.load(kinds + m)
            for f in tl.range(m, c):
                row = following * BQ + origin
                kind = kind_ahead
                following = tl.load(entries + f + 1)
                kind_ahead = tl.load(kinds + f + 1)
                sum_k, sum_v = _column_step(sum_k, sum_v, k0, v0, q_map, g_map, batch, h, row, 0.0, lse, delta, line, r, T, kind, intervals, bitmaps, scale, inner, outer,
                                            D0, V0, BQ, BK, CAP, INTERVALS, BITMAPS, EDGE, False)
        following = tl.load(entries + a) * BQ + origin
        known = 0.0
        if HELD:  # by registers, one turn early: in shared memory there is no room; what stands past the end of a list may be anything
            known = _known(lse, delta, line, following, r, T, True)
        for f in tl.range(a, e):
            row = following
            following = tl.load(entries + f + 1) * BQ + origin
            sum_k, sum_v = _column_step(sum_k, sum_v, k0, v0, q_map, g_map, batch, h, row, known, lse, delta, line, r, T, -1, intervals, bitmaps, scale, inner, outer,
                                        D0, V0, BQ, BK, CAP, False, False, EDGE, HELD)
            if HELD:
                known = _known(lse, delta, line, following, r, T, True)
    # ---- the answer: of keys past the limit anything was read, which means nothing
    if base + BK > limit:
        there = (base + w < limit)[:, None]
        sum_k = tl.where(there, sum_k, 0.0)
        sum_v = tl.where(there, sum_v, 0.0)
    dk_map.store([own, base.to(tl.int32), 0], (sum_k * scale).to(dk_map.dtype).reshape(1, BK, D0))
    dv_map.store([own, base.to(tl.int32), 0], sum_v.to(dv_map.dtype).reshape(1, BK, V0))


def _of(made, **more) -> relaunch.Constants:
    """Constants and options of a kernel, from those of block_attention_backward."""
    return relaunch.Constants({name: made[name] for name in (*OWN, *relaunch.OPTIONS) if name in made} | more)


@lru_cache(4096)
def _of_rows(made: relaunch.Constants) -> relaunch.Constants:
    """Queries and dO are held in registers where these suffice, and leave room in shared memory for blocks that come earlier. Three programs of narrow heads fit a multiprocessor."""
    BQ, BK, D0, V0 = (made[name] for name in ("BQ", "BK", "D0", "V0"))
    each = BQ * (D0 + 2 * BK + (D0 + V0) // 2) // (32 * made["num_warps"])  # words a thread
    held = each <= 192
    return _of(made, HELD=held, num_stages=made["num_stages"] + BQ // BK * held, **(dict(maxnreg=168) if each <= 128 else {}))


@lru_cache(4096)
def _of_columns(made: relaunch.Constants) -> relaunch.Constants:
    """So are keys, but where blocks have masks, for which registers would not suffice. Narrow heads leave room for one block more in any case."""
    BQ, BK, D0, V0 = (made[name] for name in ("BQ", "BK", "D0", "V0"))
    held = not (made["INTERVALS"] or made["BITMAPS"]) and BK * (D0 + V0 + 2 * BQ + D0 // 2) <= 224 * 32 * made["num_warps"]
    return _of(made, HELD=held, num_stages=made["num_stages"] + (BQ <= BK and (held or D0 + V0 <= 128)))


def _stored(x, rows: int, columns: int) -> Map:
    """A map to store x [B,H,N,W] by, heads of all batches on one axis."""
    return Map(x.view(-1, *x.shape[2:]), rows, columns)


def launch(q, k, v, dout, lists, lse, delta, dq, bad, dk, dv, place, by_rows, by_columns, tiles, covers, kv_length, starts, start, scales):
    """Fills dq, but for the tiles that it marks in `bad`, dk and dv. start: position of query 0, None if the host does not know it."""
    (B, Hq, T, D), (Hk, S), DV = q.shape, k.shape[1:3], v.shape[3]
    group, kinds = Hq // Hk, (q.dtype, dq.dtype)
    tables, steps = (lists.intervals, lists.bitmaps, lists.list_of), list_steps(lists)
    own, heads = _of_rows(by_rows), B * Hq
    BQ, BK, D0, V0 = (own[name] for name in ("BQ", "BK", "D0", "V0"))
    order, ahead, section = turns(lists, covers, heads, group, 2 * S * (D + DV), CACHED)
    whole = start is not None and start % BQ == 0  # else a head's first tile begins before its first query: the copy engine brings zeros for such rows, but takes none (an illegal instruction)
    made = _stored(dq, BQ, D0) if whole else None
    relaunch.launch(rows_maps, (tiles * heads,), place, (lse, delta, dq, bad, lists.offsets, lists.cols, lists.kinds, *tables, order, kv_length, starts),
                    (*steps, Hq, group, T, S, lists.first, lists.nq, heads, tiles, ahead, section, start or 0, *scales), own, (*kinds, made is None),
                    (Map(q, BQ, D0), Map(dout, BQ, V0), Map(k, BK, D0), Map(v, BK, V0), made))
    own, heads, tiles = _of_columns(by_columns), B * Hk, -(-S // BK)
    D0, V0 = own["D0"], own["V0"]
    order, ahead, section = turns(lists, tiles == lists.nk, heads, 1, 2 * T * group * (D + DV), CACHED, by_key=True)
    relaunch.launch(columns_maps, (tiles * heads,), place, (lse, delta, lists.by_key_offsets, lists.by_key_rows, lists.by_key_kinds, *tables, order, kv_length, starts),
                    (*steps, Hk, group, T, S, lists.first, lists.nq, lists.nk, heads, tiles, ahead, section, start or 0, *scales), own, kinds,
                    (Map(q, BQ, D0), Map(dout, BQ, V0), Map(k, BK, D0), Map(v, BK, V0), _stored(dk, BK, D0), _stored(dv, BK, V0)))


def artifacts(problem, by_rows, by_columns, masked: bool, pointer: str, gradient: str) -> list[dict]:
    has = problem.features.__contains__
    mapped = lambda kind, lead, rows, columns: f"tensordesc<{kind[1:]}{[*lead, rows, columns]}>"  # noqa: E731
    arrays = {"lse": "*fp32", "delta": "*fp32"} | dict.fromkeys(("offsets", "kinds", "intervals", "bitmaps", "list_of", "schedule"), "*i32")
    arrays |= {name: "*i32" for name, on in (("kv_length", has("kv_length")), ("q_starts", has("q_start"))) if on}
    integers = ("slb", "slh", "group", "T", "S", "first", "nq", "tiles", "heads", "ahead", "section", "q_start")
    found = []
    for fn, made, own, more, stored in ((rows_maps, _of_rows(by_rows), {"dq": gradient, "cols": "*i32"} | ({"bad": "*i32"} if masked else {}), ("Hq",), () if has("kv_length") or has("q_start") else ("dq",)),
                                        (columns_maps, _of_columns(by_columns), {"entries": "*i32"}, ("Hk", "nk"), ("dk", "dv"))):
        maps = {name: mapped(pointer, (1, 1), made[rows], made[columns]) for name, rows, columns in (("q_map", "BQ", "D0"), ("g_map", "BQ", "V0"), ("k_map", "BK", "D0"), ("v_map", "BK", "V0"))}
        maps |= {f"{name}_map": mapped(gradient, (1,), made["BQ" if name == "dq" else "BK"], made["V0" if name == "dv" else "D0"]) for name in stored}
        found.append(relaunch.artifact(fn, made, arrays | own, (*integers, *more), ("scale", "inner", "outer"), maps))
    return found
