"""Path "portable" of block_attention_backward where the copy engine brings what a program runs through: keys and values of `rows_maps`, queries and dO of `columns_maps` (tensor maps, zeros outside the arrays).

What both take and give: block_backward_portable.py. Which keys of a partial block no row sees is not asked here: one that is no number leaves NaN in dQ (0 * NaN), and such tiles are done once more by
pointers (`rows`, AGAIN), which reads dQ for it. Two programs share a multiprocessor, one multiplies while the other takes exponentials: registers and instructions are what counts, and maps save the addresses.
"""
import triton
import triton.language as tl

from sparsetile.backends.triton.launch import list_steps, turns
from sparsetile.backends.triton.maps import Map, can_map
from sparsetile.backends.triton.tiles import drawn, entries_of, load, place_of, product, queries_of, rebuilt, rows_known, rows_of, seen, seen_by_key, store

CACHED = 32 << 20  # bytes of what is streamed by the heads whose tiles are in flight together: the second-level cache holds it
ARCHS = ("sm_90a",)  # sm_100 lays sums out in another memory: not measured there


def _whole(made: dict) -> bool:
    """Whether tiles hold whole rows, in one piece."""
    return made["SLICES"] == 1 and not (made["CHUNK"] or made["D1"] or made["V1"])


def takes(q, k, v, dout, lists, made: dict, arch: str) -> bool:
    """Whether a call with these constants can go this way."""
    return arch in ARCHS and q.element_size() == 2 and lists.q_order is None and lists.k_order is None and _whole(made) and all(can_map(x) for x in (q, k, v, dout))


def takes_problem(problem, made: dict) -> bool:
    return problem.arch in ARCHS and problem.dtype("q", "float32") != "float32" and "order" not in problem.features and _whole(made)


@triton.jit
def _row_step(dq, q, g, logs, shift, k_map, v_map, b, h, row, mask, scale, inner, outer, D0: tl.constexpr, V0: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
              CAP: tl.constexpr, MASK: tl.constexpr):
    """One block of keys. MASK: `mask` [BQ, BK] hides pairs."""
    k = k_map.load([b, h, row, 0]).reshape(BK, D0)
    raw = product(q, tl.trans(k), tl.zeros([BQ, BK], tl.float32))
    grad = product(g, tl.trans(v_map.load([b, h, row, 0]).reshape(BK, V0)), tl.zeros([BQ, BK], tl.float32))
    p, ds = rebuilt(raw, grad, logs[:, None], shift[:, None], scale, inner, outer, CAP)
    if MASK:
        ds = tl.where(mask, ds, 0.0)
    return product(ds.to(k.dtype), k, dq)


@triton.jit(do_not_specialize=["slb", "slh", "Hq", "group", "T", "S", "first", "nq", "heads", "tiles", "ahead", "section", "q_start"])
def rows_maps(k_map, v_map, q, dout, lse, delta, dq, offsets, cols, kinds, intervals, bitmaps, list_of, schedule, kv_length, q_starts,
         sqb, sqh, sqt, sgb, sgh, sgt, slb, slh, Hq, group, T, S, first, nq, heads, tiles, ahead, section, q_start, scale, inner, outer,
         D: tl.constexpr, D0: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
         CAP: tl.constexpr, INTERVALS: tl.constexpr, BITMAPS: tl.constexpr, EDGE: tl.constexpr, FROM_LENGTH: tl.constexpr, FAR: tl.constexpr):
    own, i = drawn(tl.program_id(0), (heads, tiles, ahead, section))
    b = (own // Hq).to(tl.int64)
    h = own % Hq
    which = tl.load(list_of + b * slb + h * slh)
    limit, start = place_of(b, T, S, q_start, q_starts, kv_length, FROM_LENGTH)
    tile, base, t, row_ok = rows_of(i, which, schedule, None, start, T, first, nq, tiles, BQ, FAR)
    a, n, e, c, edge = entries_of(tile, which, offsets, cols, limit, nq, BK, EDGE)
    line = (b * Hq + h) * T + base
    logs, shift = rows_known(lse, delta, line, t, row_ok, True)
    q0 = load(q + b * sqb + h.to(tl.int64) * sqh + base * sqt, t * sqt, row_ok, 0, D0, D, True)
    g0 = load(dout + b * sgb + h.to(tl.int64) * sgh + base * sgt, t * sgt, row_ok, 0, V0, DV, True)
    batch = b.to(tl.int32)
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
            mask = tl.full([1, 1], True, tl.int1)
            if INTERVALS or BITMAPS:
                mask = seen(kind, intervals, bitmaps, BQ, BK, INTERVALS, BITMAPS)
            if EDGE:
                mask = mask & (key + tl.arange(0, BK) < limit)[None, :]
            sums = _row_step(sums, q0, g0, logs, shift, k_map, v_map, batch, head, key, mask, scale, inner, outer, D0, V0, BQ, BK, CAP, True)
    following = tl.load(cols + a)
    for f in tl.range(a, n):
        key = following * BK
        following = tl.load(cols + f + 1)
        sums = _row_step(sums, q0, g0, logs, shift, k_map, v_map, batch, head, key, True, scale, inner, outer, D0, V0, BQ, BK, CAP, False)
    store(dq + line * D, t * D, row_ok, sums * scale, 0, D0, D)


@triton.jit
def _column_step(dk, dv, k, v, q_map, g_map, b, h, row, lse, delta, line, r, ok, kind, intervals, bitmaps, scale, inner, outer,
                 D0: tl.constexpr, V0: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, CAP: tl.constexpr, INTERVALS: tl.constexpr, BITMAPS: tl.constexpr, ROWS: tl.constexpr):
    """One block of queries, rows line + r of lse and delta. ROWS: queries that are not ok do not count."""
    q = q_map.load([b, h, row, 0]).reshape(BQ, D0)
    g = g_map.load([b, h, row, 0]).reshape(BQ, V0)
    raw = product(k, tl.trans(q), tl.zeros([BK, BQ], tl.float32))
    grad = product(v, tl.trans(g), tl.zeros([BK, BQ], tl.float32))
    logs, shift = rows_known(lse, delta, line, r, ok, ROWS)
    p, ds = rebuilt(raw, grad, logs[None, :], shift[None, :], scale, inner, outer, CAP)
    if ROWS:
        p = tl.where(ok[None, :], p, 0.0)
        ds = tl.where(ok[None, :], ds, 0.0)
    if INTERVALS or BITMAPS:
        mask = seen_by_key(kind, intervals, bitmaps, BQ, BK, INTERVALS, BITMAPS)
        p = tl.where(mask, p, 0.0)
        ds = tl.where(mask, ds, 0.0)
    dv = product(p.to(v.dtype), g, dv)
    dk = product(ds.to(k.dtype), q, dk)
    return dk, dv


@triton.jit(do_not_specialize=["slb", "slh", "Hk", "group", "T", "S", "first", "nq", "nk", "lines", "tiles", "ahead", "section", "q_start"])
def columns_maps(q_map, g_map, k, v, lse, delta, dk, dv, offsets, entries, kinds, intervals, bitmaps, list_of, schedule, kv_length, q_starts,
            skb, skh, sks, svb, svh, svs, slb, slh, Hk, group, T, S, first, nq, nk, lines, tiles, ahead, section, q_start, scale, inner, outer,
            D: tl.constexpr, D0: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
            CAP: tl.constexpr, INTERVALS: tl.constexpr, BITMAPS: tl.constexpr, EDGE: tl.constexpr, FROM_LENGTH: tl.constexpr, FAR: tl.constexpr):
    own, j = drawn(tl.program_id(0), (lines, tiles, ahead, section))
    b = (own // Hk).to(tl.int64)
    hk = own % Hk
    if schedule is not None:
        j = tl.load(schedule + tl.load(list_of + b * slb + hk * group * slh) * nk + j)
    limit, start = place_of(b, T, S, q_start, q_starts, kv_length, FROM_LENGTH)
    w = tl.arange(0, BK)
    r = tl.arange(0, BQ)
    base = j.to(tl.int64) * BK
    exists = base + w < limit
    heads = tl.where(base < limit, group, 0)
    key = w.to(tl.int64) if FAR else w
    k0 = load(k + b * skb + hk.to(tl.int64) * skh + base * sks, key * sks, exists, 0, D0, D, True)
    v0 = load(v + b * svb + hk.to(tl.int64) * svh + base * svs, key * svs, exists, 0, V0, DV, True)
    sum_k = tl.zeros([BK, D0], tl.float32)
    sum_v = tl.zeros([BK, V0], tl.float32)
    origin = (first * BQ - start).to(tl.int32)
    batch = b.to(tl.int32)
    for member in tl.range(0, heads, num_stages=1):
        h = hk * group + member
        line = (b * Hk * group + h) * T + origin
        a, e, m, c = queries_of(j, tl.load(list_of + b * slb + h * slh), offsets, entries, start, T, first, nq, nk, BQ, EDGE)
        # ---- blocks with a mask
        if INTERVALS or BITMAPS:
            following = tl.load(entries + m)
            kind_ahead = tl.load(kinds + m)
            for f in tl.range(m, c):
                t = following * BQ
                kind = kind_ahead
                following = tl.load(entries + f + 1)
                kind_ahead = tl.load(kinds + f + 1)
                ok = (t + origin + r >= 0) & (t + origin + r < T)
                sum_k, sum_v = _column_step(sum_k, sum_v, k0, v0, q_map, g_map, batch, h, t + origin, lse, delta, line + t, r, ok, kind, intervals, bitmaps, scale, inner, outer,
                                            D0, V0, BQ, BK, CAP, INTERVALS, BITMAPS, EDGE)
        following = tl.load(entries + a)
        for f in tl.range(a, e):
            t = following * BQ
            following = tl.load(entries + f + 1)
            ok = (t + origin + r >= 0) & (t + origin + r < T)
            sum_k, sum_v = _column_step(sum_k, sum_v, k0, v0, q_map, g_map, batch, h, t + origin, lse, delta, line + t, r, ok, -1, intervals, bitmaps, scale, inner, outer,
                                        D0, V0, BQ, BK, CAP, False, False, EDGE)
    # ---- the answer: keys past the limit were computed from zeros, which means nothing
    line = (b * Hk + hk) * S + base
    there = exists[:, None]
    inside = base + w < S
    store(dk + line * D, key * D, inside, tl.where(there, sum_k * scale, 0.0), 0, D0, D)
    store(dv + line * DV, key * DV, inside, tl.where(there, sum_v, 0.0), 0, V0, DV)


def _own(made: dict) -> dict:
    """Those of the constants of block_attention_backward that these kernels have."""
    return {name: made[name] for name in ("D", "D0", "DV", "V0", "BQ", "BK", "CAP", "INTERVALS", "BITMAPS", "EDGE", "FROM_LENGTH", "FAR")}


def launch(q, k, v, dout, lists, lse, delta, dq, dk, dv, by_rows, by_columns, compiled, tiles, covers, kv_length, starts, start, scales):
    """Fills dq, but for tiles of NaN by keys that nobody sees, dk and dv."""
    (B, Hq, T, D), (Hk, S), DV = q.shape, k.shape[1:3], v.shape[3]
    group = Hq // Hk
    tables, steps = (lists.intervals, lists.bitmaps, lists.list_of), list_steps(lists)
    own, heads = _own(by_rows), B * Hq
    order, ahead, section = turns(lists, covers, heads, group, 2 * S * (D + DV), CACHED)
    rows_maps[(tiles * heads,)](Map(k, own["BK"], own["D0"]), Map(v, own["BK"], own["V0"]), q, dout, lse, delta, dq, lists.offsets, lists.cols, lists.kinds, *tables, order, kv_length, starts,
                                *q.stride()[:3], *dout.stride()[:3], *steps, Hq, group, T, S, lists.first, lists.nq, heads, tiles, ahead, section, start, *scales, **own, **compiled)
    own, heads = _own(by_columns), B * Hk
    tiles = -(-S // own["BK"])
    order, ahead, section = turns(lists, tiles == lists.nk, heads, 1, 2 * T * group * (D + DV), CACHED, by_key=True)
    columns_maps[(tiles * heads,)](Map(q, own["BQ"], own["D0"]), Map(dout, own["BQ"], own["V0"]), k, v, lse, delta, dk, dv, lists.by_key_offsets, lists.by_key_rows, lists.by_key_kinds, *tables, order,
                                   kv_length, starts, *k.stride()[:3], *v.stride()[:3], *steps, Hk, group, T, S, lists.first, lists.nq, lists.nk, heads, tiles, ahead, section, start, *scales, **own,
                                   **compiled)


def artifacts(problem, by_rows: dict, by_columns: dict, pointer: str, gradient: str, compiled: dict) -> list[dict]:
    has = problem.features.__contains__
    mapped = lambda rows, columns: f"tensordesc<{pointer[1:]}{[1, 1, rows, columns]}>"  # noqa: E731
    arrays = {"lse": "*fp32", "delta": "*fp32"} | {name: "*i32" for name in ("offsets", "kinds", "intervals", "bitmaps", "list_of")}
    arrays |= {name: "*i32" for name, on in (("kv_length", has("kv_length")), ("q_starts", has("q_start"))) if on}
    numbers = {name: "i32" for name in ("slb", "slh", "group", "T", "S", "first", "nq", "tiles", "ahead", "section", "q_start")} | {name: "fp32" for name in ("scale", "inner", "outer")}
    found = []
    for fn, maps, own, strides, integers, made in (
            (rows_maps, {"k_map": mapped(by_rows["BK"], by_rows["D0"]), "v_map": mapped(by_rows["BK"], by_rows["V0"])},
             {"q": pointer, "dout": pointer, "dq": gradient, "cols": "*i32", "schedule": "*i32"}, ("sqb", "sqh", "sqt", "sgb", "sgh", "sgt"), ("Hq", "heads"), by_rows),
            (columns_maps, {"q_map": mapped(by_columns["BQ"], by_columns["D0"]), "g_map": mapped(by_columns["BQ"], by_columns["V0"])},
             {"k": pointer, "v": pointer, "dk": gradient, "dv": gradient, "entries": "*i32", "schedule": "*i32"}, ("skb", "skh", "sks", "svb", "svh", "svs"), ("Hk", "nk", "lines"), by_columns)):
        aligned = strides if problem["D"] % 16 == 0 and problem["Dv"] % 16 == 0 else ()
        found.append(dict(fn=fn, signature=maps | arrays | own | numbers | {name: "i32" for name in (*strides, *integers)}, constexprs=_own(made), options=compiled, div16=(*arrays, *own, *aligned)))
    return found
