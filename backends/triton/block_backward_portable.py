"""Path "portable" of block_attention_backward, on any chip: `rows` makes dQ, a tile of queries a program, `columns` dK and dV, a block of keys a program, head after head of the group.

What they take and give, and in which order sums are made: block_attention_backward.py.
"""
import triton
import triton.language as tl

from sparsetile.backends.triton.tiles import (chunked, entries_of, load, load_at, place_of, product, queries_of, rebuilt, rows_known, rows_of, seen, seen_by_key,
                                              store)


@triton.jit
def program(tiles, heads, together, SLICES: tl.constexpr):
    """(slice, tile, head, batch) of this program, slices fastest, then `together` heads, then tiles."""
    x = tl.program_id(0)
    piece = x % SLICES
    x = x // SLICES
    own = x % together
    x = x // together
    tile = x % tiles
    x = x // tiles
    groups = heads // together
    return piece, tile, (x % groups) * together + own, (x // groups).to(tl.int64)


@triton.jit
def products(a0, a1, a, a_rows, a_ok, b, b_rows, b_ok, col, R: tl.constexpr, C: tl.constexpr, N: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr,
             CHUNK: tl.constexpr, ROWS: tl.constexpr):
    """(a . b^T [R, C], and the two tiles of b). With CHUNK both are read from memory and b's tile is that of the program's columns."""
    b1 = 0.0
    if CHUNK:
        s = chunked(a, a_rows, a_ok, b, b_rows, b_ok, R, C, N, CHUNK, False)
        b0 = load_at(b, b_rows, b_ok, col, N0, N)
    else:
        b0 = load(b, b_rows, b_ok, 0, N0, N, ROWS)
        s = product(a0, tl.trans(b0), tl.zeros([R, C], tl.float32))
        if N1:
            b1 = load(b, b_rows, b_ok, N0, N1, N, ROWS)
            s = product(a1, tl.trans(b1), s)
    return s, b0, b1


@triton.jit
def _row_step(dq0, dq1, q0, q1, g0, g1, q, q_rows, dout, g_rows, row_ok, logs, shift, k, k_rows, v, v_rows, ok, mask, col, scale, inner, outer, D: tl.constexpr,
              D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, CHUNK: tl.constexpr,
              CAP: tl.constexpr, MASK: tl.constexpr):
    """One block of keys. MASK: `mask` [BQ, BK] hides pairs, keys that are not ok are read as 0."""
    raw, k0, k1 = products(q0, q1, q, q_rows, row_ok, k, k_rows, ok, col, BQ, BK, D, D0, D1, CHUNK, MASK)
    grad, v0, v1 = products(g0, g1, dout, g_rows, row_ok, v, v_rows, ok, col, BQ, BK, DV, V0, V1, CHUNK, MASK)
    p, ds = rebuilt(raw, grad, logs[:, None], shift[:, None], scale, inner, outer, CAP)
    if MASK:
        ds = tl.where(mask, ds, 0.0)
    ds = ds.to(k.dtype.element_ty)
    dq0 = product(ds, k0, dq0)
    if D1:
        dq1 = product(ds, k1, dq1)
    return dq0, dq1


@triton.jit
def _tile(piece, i, h, b, q, k, v, dout, lse, delta, dq, offsets, cols, kinds, intervals, bitmaps, list_of, schedule, q_order, k_order, kv_length, q_starts,
          sqb, sqh, sqt, skb, skh, sks, svb, svh, svs, sgb, sgh, sgt, slb, slh, Hq, group, T, S, first, nq, tiles, q_start, scale, inner, outer,
          D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
          CHUNK: tl.constexpr, CAP: tl.constexpr, INTERVALS: tl.constexpr, BITMAPS: tl.constexpr, EDGE: tl.constexpr,
          FROM_LENGTH: tl.constexpr, FAR: tl.constexpr, QT: tl.constexpr, KT: tl.constexpr, VT: tl.constexpr, GT: tl.constexpr):
    """dQ of tile i of head h: columns from piece * D0 on."""
    if QT:
        sqt = QT
        sks = KT
        svs = VT
        sgt = GT
    hk = (h // group).to(tl.int64)
    which = tl.load(list_of + b * slb + h * slh)
    limit, start = place_of(b, T, S, q_start, q_starts, kv_length, FROM_LENGTH)
    tile, base, t, row_ok = rows_of(i, which, schedule, q_order, start, T, first, nq, tiles, BQ, FAR)
    a, n, e, c, edge = entries_of(tile, which, offsets, cols, limit, nq, BK, EDGE)
    q += b * sqb + h.to(tl.int64) * sqh + base * sqt
    dout += b * sgb + h.to(tl.int64) * sgh + base * sgt
    k += b * skb + hk * skh
    v += b * svb + hk * svh
    q_rows = t * sqt
    g_rows = t * sgt
    line = (b * Hq + h) * T + base
    logs, shift = rows_known(lse, delta, line, t, row_ok, True)
    q0 = 0.0
    q1 = 0.0
    g0 = 0.0
    g1 = 0.0
    if CHUNK == 0:
        q0 = load(q, q_rows, row_ok, 0, D0, D, True)
        g0 = load(dout, g_rows, row_ok, 0, V0, DV, True)
        if D1:
            q1 = load(q, q_rows, row_ok, D0, D1, D, True)
        if V1:
            g1 = load(dout, g_rows, row_ok, V0, V1, DV, True)
    dq0 = tl.zeros([BQ, D0], tl.float32)
    dq1 = 0.0
    if D1:
        dq1 = tl.zeros([BQ, D1], tl.float32)
    col = piece * D0
    w = tl.arange(0, BK)
    span = w.to(tl.int64) if FAR else w
    # ---- blocks with a mask
    if k_order is not None:
        for f in tl.range(a, c, num_stages=1):
            key = tl.load(k_order + tl.load(cols + f).to(tl.int64) * BK + w)
            exists = (key >= 0) & (key < limit)
            mask = exists[None, :] & row_ok[:, None]
            if INTERVALS or BITMAPS:
                mask = mask & seen(tl.load(kinds + f), intervals, bitmaps, BQ, BK, INTERVALS, BITMAPS)
            ok = tl.max(mask.to(tl.int32), 0) > 0
            key = tl.where(ok, key, 0)
            if FAR:
                key = key.to(tl.int64)
            dq0, dq1 = _row_step(dq0, dq1, q0, q1, g0, g1, q, q_rows, dout, g_rows, row_ok, logs, shift, k, key * sks, v, key * svs, ok, mask, col,
                                 scale, inner, outer, D, D0, D1, DV, V0, V1, BQ, BK, CHUNK, CAP, True)
    else:
        if EDGE or INTERVALS or BITMAPS:
            for f in tl.range(e - edge, c, num_stages=1):
                entry = tl.where(f < e, n, f)
                key = tl.load(cols + entry) * BK
                mask = (key + w < limit)[None, :] & row_ok[:, None]
                if INTERVALS or BITMAPS:
                    mask = mask & seen(tl.load(kinds + entry), intervals, bitmaps, BQ, BK, INTERVALS, BITMAPS)
                ok = tl.max(mask.to(tl.int32), 0) > 0
                far = key.to(tl.int64)
                dq0, dq1 = _row_step(dq0, dq1, q0, q1, g0, g1, q, q_rows, dout, g_rows, row_ok, logs, shift, k + far * sks, span * sks, v + far * svs, span * svs, ok, mask, col,
                                     scale, inner, outer, D, D0, D1, DV, V0, V1, BQ, BK, CHUNK, CAP, True)
        following = tl.load(cols + a)  # one turn early, as in the forward
        for f in tl.range(a, n):
            far = following.to(tl.int64) * BK
            following = tl.load(cols + f + 1)
            dq0, dq1 = _row_step(dq0, dq1, q0, q1, g0, g1, q, q_rows, dout, g_rows, row_ok, logs, shift, k + far * sks, span * sks, v + far * svs, span * svs, w >= 0, True, col,
                                 scale, inner, outer, D, D0, D1, DV, V0, V1, BQ, BK, CHUNK, CAP, False)
    dq += line * D
    store(dq, t * D, row_ok, dq0 * scale, col, D0, D)
    if D1:
        store(dq, t * D, row_ok, dq1 * scale, D0, D1, D)


@triton.jit(do_not_specialize=["slb", "slh", "Hq", "group", "T", "S", "first", "nq", "tiles", "together", "q_start"])
def rows(q, k, v, dout, lse, delta, dq, offsets, cols, kinds, intervals, bitmaps, list_of, schedule, q_order, k_order, kv_length, q_starts,
         sqb, sqh, sqt, skb, skh, sks, svb, svh, svs, sgb, sgh, sgt, slb, slh, Hq, group, T, S, first, nq, tiles, together, q_start, scale, inner, outer,
         D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
         SLICES: tl.constexpr, CHUNK: tl.constexpr, CAP: tl.constexpr, INTERVALS: tl.constexpr, BITMAPS: tl.constexpr, EDGE: tl.constexpr,
         FROM_LENGTH: tl.constexpr, FAR: tl.constexpr, QT: tl.constexpr, KT: tl.constexpr, VT: tl.constexpr, GT: tl.constexpr):
    piece, i, h, b = program(tiles, Hq, together, SLICES)
    _tile(piece, i, h, b, q, k, v, dout, lse, delta, dq, offsets, cols, kinds, intervals, bitmaps, list_of, schedule, q_order, k_order, kv_length, q_starts,
          sqb, sqh, sqt, skb, skh, sks, svb, svh, svs, sgb, sgh, sgt, slb, slh, Hq, group, T, S, first, nq, tiles, q_start, scale, inner, outer,
          D, D0, D1, DV, V0, V1, BQ, BK, CHUNK, CAP, INTERVALS, BITMAPS, EDGE, FROM_LENGTH, FAR, QT, KT, VT, GT)


@triton.jit(do_not_specialize=["slb", "slh", "Hq", "group", "T", "S", "first", "nq", "tiles", "heads", "q_start"])
def rows_again(bad, q, k, v, dout, lse, delta, dq, offsets, cols, kinds, intervals, bitmaps, list_of, schedule, q_order, k_order, kv_length, q_starts,
               sqb, sqh, sqt, skb, skh, sks, svb, svh, svs, sgb, sgh, sgt, slb, slh, Hq, group, T, S, first, nq, tiles, heads, q_start, scale, inner, outer,
               D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
               CHUNK: tl.constexpr, CAP: tl.constexpr, INTERVALS: tl.constexpr, BITMAPS: tl.constexpr, EDGE: tl.constexpr,
               FROM_LENGTH: tl.constexpr, FAR: tl.constexpr, QT: tl.constexpr, KT: tl.constexpr, VT: tl.constexpr, GT: tl.constexpr, MANY: tl.constexpr):
    """`rows` of those tiles of all heads that `bad` [heads, tiles] marks. A program looks at MANY of them: almost always none is."""
    begin = tl.program_id(0) * MANY
    end = tl.minimum(begin + MANY, heads * tiles)
    some = begin + tl.arange(0, MANY)
    if tl.max(tl.load(bad + some, mask=some < end, other=0), 0) > 0:
        for place in tl.range(begin, end, num_stages=1):
            if tl.load(bad + place) > 0:
                own = place // tiles
                _tile(0, place % tiles, own % Hq, (own // Hq).to(tl.int64), q, k, v, dout, lse, delta, dq, offsets, cols, kinds, intervals, bitmaps, list_of, schedule, q_order, k_order, kv_length, q_starts,
                      sqb, sqh, sqt, skb, skh, sks, svb, svh, svs, sgb, sgh, sgt, slb, slh, Hq, group, T, S, first, nq, tiles, q_start, scale, inner, outer,
                      D, D0, D1, DV, V0, V1, BQ, BK, CHUNK, CAP, INTERVALS, BITMAPS, EDGE, FROM_LENGTH, FAR, QT, KT, VT, GT)


@triton.jit
def _column_step(dk0, dk1, dv0, dv1, k0, k1, v0, v1, k, k_rows, v, v_rows, key_ok, q, q_rows, dout, g_rows, lse, delta, line, t, ok, kind, intervals, bitmaps, col, scale, inner, outer, D: tl.constexpr,
                 D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, CHUNK: tl.constexpr,
                 CAP: tl.constexpr, INTERVALS: tl.constexpr, BITMAPS: tl.constexpr, ROWS: tl.constexpr):
    """One block of queries, rows line + t of lse and delta. ROWS: queries that are not ok do not count."""
    raw, q0, q1 = products(k0, k1, k, k_rows, key_ok, q, q_rows, ok, col, BK, BQ, D, D0, D1, CHUNK, ROWS)
    grad, g0, g1 = products(v0, v1, v, v_rows, key_ok, dout, g_rows, ok, col, BK, BQ, DV, V0, V1, CHUNK, ROWS)
    logs, shift = rows_known(lse, delta, line, t, ok, ROWS)
    p, ds = rebuilt(raw, grad, logs[None, :], shift[None, :], scale, inner, outer, CAP)
    if ROWS:  # their lse alone would not do: a key of NaN that only they would see
        p = tl.where(ok[None, :], p, 0.0)
        ds = tl.where(ok[None, :], ds, 0.0)
    if INTERVALS or BITMAPS:
        mask = seen_by_key(kind, intervals, bitmaps, BQ, BK, INTERVALS, BITMAPS)  # this late: the registers are needed before
        p = tl.where(mask, p, 0.0)
        ds = tl.where(mask, ds, 0.0)
    p = p.to(v.dtype.element_ty)
    ds = ds.to(k.dtype.element_ty)
    dv0 = product(p, g0, dv0)
    dk0 = product(ds, q0, dk0)
    if V1:
        dv1 = product(p, g1, dv1)
    if D1:
        dk1 = product(ds, q1, dk1)
    return dk0, dk1, dv0, dv1


@triton.jit(do_not_specialize=["slb", "slh", "Hk", "group", "T", "S", "first", "nq", "nk", "tiles", "together", "q_start"])
def columns(q, k, v, dout, lse, delta, dk, dv, offsets, entries, kinds, intervals, bitmaps, list_of, q_order, k_order, kv_length, q_starts,
            sqb, sqh, sqt, skb, skh, sks, svb, svh, svs, sgb, sgh, sgt, slb, slh, Hk, group, T, S, first, nq, nk, tiles, together, q_start, scale, inner, outer,
            D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
            SLICES: tl.constexpr, CHUNK: tl.constexpr, CAP: tl.constexpr, INTERVALS: tl.constexpr, BITMAPS: tl.constexpr, EDGE: tl.constexpr,
            FROM_LENGTH: tl.constexpr, FAR: tl.constexpr, QT: tl.constexpr, KT: tl.constexpr, VT: tl.constexpr, GT: tl.constexpr):
    if QT:
        sqt = QT
        sks = KT
        svs = VT
        sgt = GT
    piece, j, hk, b = program(tiles, Hk, together, SLICES)
    limit, start = place_of(b, T, S, q_start, q_starts, kv_length, FROM_LENGTH)
    w = tl.arange(0, BK)
    r = tl.arange(0, BQ)
    if k_order is not None:
        base = tl.full([], 0, tl.int64)
        key = tl.load(k_order + j.to(tl.int64) * BK + w)
        inside = (key >= 0) & (key < S)
        exists = inside & (key < limit)
        key = tl.where(inside, key, 0)
        heads = group
    else:
        base = j.to(tl.int64) * BK
        key = w
        inside = base + w < S
        exists = base + w < limit
        heads = tl.where(base < limit, group, 0)
    if FAR:
        key = key.to(tl.int64)
    span = r.to(tl.int64) if FAR else r
    k += b * skb + hk.to(tl.int64) * skh + base * sks
    v += b * svb + hk.to(tl.int64) * svh + base * svs
    k_rows = key * sks
    v_rows = key * svs
    k0 = 0.0
    k1 = 0.0
    v0 = 0.0
    v1 = 0.0
    if CHUNK == 0:
        k0 = load(k, k_rows, exists, 0, D0, D, True)
        v0 = load(v, v_rows, exists, 0, V0, DV, True)
        if D1:
            k1 = load(k, k_rows, exists, D0, D1, D, True)
        if V1:
            v1 = load(v, v_rows, exists, V0, V1, DV, True)
    dk0 = tl.zeros([BK, D0], tl.float32)
    dv0 = tl.zeros([BK, V0], tl.float32)
    dk1 = 0.0
    dv1 = 0.0
    if D1:
        dk1 = tl.zeros([BK, D1], tl.float32)
    if V1:
        dv1 = tl.zeros([BK, V1], tl.float32)
    col = piece * D0
    # what a loop adds to is folded into the pointers: two sums and two products of D 128 leave few registers
    origin = first * BQ - start
    h = hk * group
    line = (b * Hk * group + h) * T
    list_of += b * slb + h * slh
    q += b * sqb + h.to(tl.int64) * sqh
    dout += b * sgb + h.to(tl.int64) * sgh
    if q_order is None:
        q += origin * sqt
        dout += origin * sgt
        line += origin
    for member in tl.range(0, heads, num_stages=1):
        a, e, m, c = queries_of(j, tl.load(list_of), offsets, entries, start, T, first, nq, nk, BQ, EDGE)
        # ---- blocks with a mask
        if q_order is not None:
            for f in tl.range(a, c, num_stages=1):
                place = tl.load(q_order + tl.load(entries + f).to(tl.int64) * BQ + r)
                t = place.to(tl.int64) - start
                ok = (place >= 0) & (t >= 0) & (t < T)
                t = tl.where(ok, t, 0)
                row = t if FAR else t.to(tl.int32)
                dk0, dk1, dv0, dv1 = _column_step(dk0, dk1, dv0, dv1, k0, k1, v0, v1, k, k_rows, v, v_rows, exists, q, row * sqt, dout, row * sgt, lse, delta, line, row, ok, tl.load(kinds + f),
                                                  intervals, bitmaps, col, scale, inner, outer, D, D0, D1, DV, V0, V1, BQ, BK, CHUNK, CAP, INTERVALS, BITMAPS, True)
        else:
            if INTERVALS or BITMAPS:
                for f in tl.range(m, c):
                    t = tl.load(entries + f).to(tl.int64) * BQ
                    ok = (t + origin + r >= 0) & (t + origin + r < T)
                    dk0, dk1, dv0, dv1 = _column_step(dk0, dk1, dv0, dv1, k0, k1, v0, v1, k, k_rows, v, v_rows, exists, q + t * sqt, span * sqt, dout + t * sgt, span * sgt, lse, delta, line + t, r,
                                                      ok, tl.load(kinds + f), intervals, bitmaps, col, scale, inner, outer, D, D0, D1, DV, V0, V1, BQ, BK, CHUNK, CAP,
                                                      INTERVALS, BITMAPS, EDGE)
            following = tl.load(entries + a)
            for f in tl.range(a, e):
                t = following.to(tl.int64) * BQ
                following = tl.load(entries + f + 1)
                ok = (t + origin + r >= 0) & (t + origin + r < T)
                dk0, dk1, dv0, dv1 = _column_step(dk0, dk1, dv0, dv1, k0, k1, v0, v1, k, k_rows, v, v_rows, exists, q + t * sqt, span * sqt, dout + t * sgt, span * sgt, lse, delta, line + t, r,
                                                  ok, -1, intervals, bitmaps, col, scale, inner, outer, D, D0, D1, DV, V0, V1, BQ, BK, CHUNK, CAP, False, False, EDGE)
        list_of += slh
        q += sqh
        dout += sgh
        line += T
    # ---- the answer: keys past the limit were computed from zeros, which means nothing
    line = (b * Hk + hk) * S + base
    there = exists[:, None]
    dk += line * D
    dv += line * DV
    store(dk, key * D, inside, tl.where(there, dk0 * scale, 0.0), col, D0, D)
    store(dv, key * DV, inside, tl.where(there, dv0, 0.0), col, V0, DV)
    if D1:
        store(dk, key * D, inside, tl.where(there, dk1 * scale, 0.0), D0, D1, D)
    if V1:
        store(dv, key * DV, inside, tl.where(there, dv1, 0.0), V0, V1, DV)
