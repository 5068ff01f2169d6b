"""Path "portable" of block_attention, on any chip: a program has a tile of queries of one head and runs through the blocks of its list.

Where tensor maps bring the tiles: block_attention_maps.py. What `forward` takes and gives, and in which order blocks come: block_attention.py. Its step is that of path "decode" too (block_attention_decode.py).
"""
import triton
import triton.language as tl

from sparsetile.backends.triton.float8 import exact, key_scales, query_scales
from sparsetile.backends.triton.latents import latent_tile, rotary_tile
from sparsetile.backends.triton.pages import pages_of, rows_in
from sparsetile.backends.triton.tiles import capped, chunked, drawn, entries_of, finish, load, load_at, opened, place_of, product, rows_of, seen, soften


@triton.jit
def step(acc, m, l, q, q_rows, q_ok, q0, q1, k, v, keys_s, keys_v, ok_k, ok_v, mask, col, scale, inner, outer, sks, svs,
          D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
          CHUNK: tl.constexpr, SLICED: tl.constexpr, SHARED: tl.constexpr, NEGATE: tl.constexpr, CAP: tl.constexpr, MASK: tl.constexpr, ROWS: tl.constexpr,
          LATENT: tl.constexpr = 0, FLOAT8: tl.constexpr = False, by_query=1.0, k_scale=None, v_scale=None, key=0):
    """One block of keys. MASK: `mask` [BQ, BK] hides pairs. ROWS: rows of K where not ok_k, of V where not ok_v, are read as 0. SHARED: V is the first columns of K as loaded.
    LATENT: rows of K are bytes (latents.py), of which V is the first part. FLOAT8: of K and V; `key` is the block's first, of ROWS each key's own. Products with V are of bfloat16, whose
    range holds what v_scale makes of a probability."""
    if FLOAT8:
        by_key, by_value = key_scales(k_scale, v_scale, key, ok_v if ROWS else None)
    if CHUNK:
        s = chunked(q, q_rows, q_ok, k, keys_s, ok_k, BQ, BK, D, CHUNK, NEGATE)
    else:
        if LATENT:
            k0 = latent_tile(k, keys_s, ok_k, D0, q0.dtype, LATENT)
        else:
            k0 = load(k, keys_s, ok_k, 0, D0, D, ROWS)
            if FLOAT8:
                k0 = exact(k0).to(q0.dtype)
        s = product(q0, tl.trans(k0), tl.zeros([BQ, BK], tl.float32))
        if D1:
            if LATENT:
                k1 = rotary_tile(k, keys_s, ok_k, D0, D - D0, D1, q0.dtype)
            else:
                k1 = load(k, keys_s, ok_k, D0, D1, D, ROWS)
                if FLOAT8:
                    k1 = exact(k1).to(q0.dtype)
            s = product(q1, tl.trans(k1), s)
    if FLOAT8:
        s = s * (by_query * by_key)
    if CAP:
        s = capped(s, inner, outer)
    if MASK:
        s = tl.where(mask, s, float("-inf"))
    p, a, m, l = soften(s, m, l, scale, MASK)
    if SLICED:
        v0 = load_at(v, keys_v, ok_v, col, V0, DV)
    elif LATENT:
        v0 = k0 if SHARED else tl.where(ok_v[:, None], k0, tl.zeros([BK, D0], k0.dtype))
    elif SHARED:
        v0 = k0
    else:
        v0 = load(v, keys_v, ok_v, 0, V0, DV, ROWS)
    if FLOAT8:
        p = p * by_value
        v0 = exact(v0).to(tl.bfloat16)
    return product(p.to(v0.dtype), v0, acc * a[:, None]), m, l


@triton.jit(do_not_specialize=["slb", "slh", "heads", "Hq", "group", "T", "S", "first", "nq", "tiles", "ahead", "section", "q_start", "table_b", "count"])
def forward(q, k, v, out, lse, offsets, cols, kinds, intervals, bitmaps, list_of, schedule, q_order, k_order, kv_length, q_starts, sinks, table, q_scale, k_scale, v_scale,
            sqb, sqh, sqt, skb, skh, sks, svb, svh, svs, slb, slh, heads, Hq, group, T, S, first, nq, tiles, ahead, section, q_start, scale, inner, outer, table_b, count,
            D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
            SLICES: tl.constexpr, CHUNK: tl.constexpr, SHARED: tl.constexpr, NEGATE: tl.constexpr, CAP: tl.constexpr,
            INTERVALS: tl.constexpr, BITMAPS: tl.constexpr, EDGE: tl.constexpr,
            FROM_LENGTH: tl.constexpr, FAR: tl.constexpr, PAGE: tl.constexpr, LATENT: tl.constexpr, FLOAT8: tl.constexpr):
    x = tl.program_id(0)
    piece = x % SLICES
    head, i = drawn(x // SLICES, (heads, tiles, ahead, section))
    h = head % Hq
    b = (head // Hq).to(tl.int64)
    hk = (h // group).to(tl.int64)
    which = tl.load(list_of + b * slb + h * slh)
    limit, start = place_of(b, T, S, q_start, q_starts, kv_length, FROM_LENGTH)
    tile, base, t, row_ok = rows_of(i, which, schedule, q_order, start, T, first, nq, tiles, BQ, FAR)
    a, n, e, c, edge = entries_of(tile, which, offsets, cols, limit, nq, BK, EDGE)
    q += b * sqb + h.to(tl.int64) * sqh + base * sqt
    k += b * skb + hk * skh
    v += b * svb + hk * svh
    if PAGE:
        table += b * table_b
    by_query = 1.0
    if FLOAT8:
        by_query = query_scales(q_scale, (b * Hq + h) * T + base + t, row_ok)
        groups = (b * (Hq // group) + hk) * ((S + 127) // 128)
        if k_scale is not None:
            k_scale += groups
        if v_scale is not None:
            v_scale += groups
    scale2 = scale * 1.4426950408889634
    q_rows = t * sqt
    q0 = 0.0
    q1 = 0.0
    if CHUNK == 0:
        q0, q1 = opened(q, q_rows, row_ok, D, D0, D1, NEGATE)
    m = tl.full([BQ], float("-inf"), tl.float32)
    l = tl.zeros([BQ], tl.float32)
    acc = tl.zeros([BQ, V0], tl.float32)
    col = piece * V0
    w = tl.arange(0, BK)
    span = w.to(tl.int64) if FAR else w
    ok = w >= 0
    # ---- blocks with a mask
    if k_order is not None:
        for f in tl.range(a, c, num_stages=1):
            j = tl.load(cols + f)
            s_key = tl.load(k_order + j.to(tl.int64) * BK + w)
            exists = (s_key >= 0) & (s_key < limit)
            keys = tl.where(exists, s_key, 0)
            if PAGE:
                keys, exists = rows_in(tl.load(table + keys // PAGE, mask=exists, other=-1), keys, limit, count, PAGE, FAR)
            if FAR:
                keys = keys.to(tl.int64)
            mask = exists[None, :] & row_ok[:, None]
            if INTERVALS or BITMAPS:
                mask = mask & seen(tl.load(kinds + f), intervals, bitmaps, BQ, BK, INTERVALS, BITMAPS)
            any_row = tl.max(mask.to(tl.int32), 0) > 0
            acc, m, l = step(acc, m, l, q, q_rows, row_ok, q0, q1, k, v, keys * sks, keys * svs, exists, any_row, mask, col, scale2, inner, outer,
                              sks, svs, D, D0, D1, DV, V0, BQ, BK, CHUNK, SLICES > 1, False, NEGATE, CAP, True, True, LATENT, FLOAT8, by_query, k_scale, v_scale, s_key)
    else:
        if EDGE or INTERVALS or BITMAPS:
            for f in tl.range(e - edge, c, num_stages=1):
                entry = tl.where(f < e, n, f)
                s_key = tl.load(cols + entry) * BK
                exists = s_key + w < limit
                if PAGE:
                    keys, exists = rows_in(pages_of(table, s_key, limit, PAGE, BK), s_key + w, limit, count, PAGE, FAR)
                mask = exists[None, :] & row_ok[:, None]
                if INTERVALS or BITMAPS:
                    mask = mask & seen(tl.load(kinds + entry), intervals, bitmaps, BQ, BK, INTERVALS, BITMAPS)
                any_row = tl.max(mask.to(tl.int32), 0) > 0
                far = s_key.to(tl.int64)
                if PAGE:
                    acc, m, l = step(acc, m, l, q, q_rows, row_ok, q0, q1, k, v, keys * sks, keys * svs, exists, any_row, mask, col,
                                      scale2, inner, outer, sks, svs, D, D0, D1, DV, V0, BQ, BK, CHUNK, SLICES > 1, False, NEGATE, CAP, True, True, LATENT, FLOAT8, by_query, k_scale, v_scale, s_key + w)
                else:
                    acc, m, l = step(acc, m, l, q, q_rows, row_ok, q0, q1, k + far * sks, v + far * svs, span * sks, span * svs, exists, any_row, mask, col,
                                      scale2, inner, outer, sks, svs, D, D0, D1, DV, V0, BQ, BK, CHUNK, SLICES > 1, False, NEGATE, CAP, True, True, LATENT, FLOAT8, by_query, k_scale, v_scale, s_key + w)
        following = tl.load(cols + a)  # one turn early: + 3 %; the element past the end is readable
        if PAGE:
            ahead = pages_of(table, following * BK, limit, PAGE, BK)
        for f in tl.range(a, n):
            row = following * BK
            far = following.to(tl.int64) * BK
            if PAGE:
                keys, exists = rows_in(ahead, following * BK + w, limit, count, PAGE, FAR)
            following = tl.load(cols + f + 1)
            if PAGE:
                ahead = pages_of(table, following * BK, limit, PAGE, BK)
                acc, m, l = step(acc, m, l, q, q_rows, row_ok, q0, q1, k, v, keys * sks, keys * svs, exists, exists, exists[None, :], col,
                                  scale2, inner, outer, sks, svs, D, D0, D1, DV, V0, BQ, BK, CHUNK, SLICES > 1, SHARED, NEGATE, CAP, True, True, LATENT)
            else:
                acc, m, l = step(acc, m, l, q, q_rows, row_ok, q0, q1, k + far * sks, v + far * svs, span * sks, span * svs, ok, ok, ok, col,
                                  scale2, inner, outer, sks, svs, D, D0, D1, DV, V0, BQ, BK, CHUNK, SLICES > 1, SHARED, NEGATE, CAP, False, False, 0, FLOAT8, by_query, k_scale, v_scale, row)
    # ---- the answer
    factor, logs = finish(m, l, scale, scale2, sinks, h, sinks is not None)
    line = (b * Hq + h) * T + base
    if lse is not None:
        if piece == 0:
            tl.store(lse + line + t, logs, mask=row_ok)
    out += line * DV
    cv = col + tl.arange(0, V0)
    tl.store(out + (t * DV)[:, None] + cv[None, :], (acc * factor[:, None]).to(out.dtype.element_ty), mask=row_ok[:, None] & (cv < DV)[None, :])
