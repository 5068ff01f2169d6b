"""Attention over lists of blocks for few queries: the queries of a tile times the heads that share their keys are rows of one tile, and keys are split over programs.

q [B,Hq,T,D]  k [B,Hk,S,D]  v [B,Hk,S,Dv] (may lie inside k)  ->  out [B,Hq,T,Dv], lse [B,Hq,T]
Each of `splits` programs takes an equal share of the key blocks that the lengths on the device leave of a list: the grid does not depend on them. With more than one,
sums go to scratch, as they are held, with their maximum and total, and `merge` joins them by the formula of merge_attention in the order of the keys.
"""
from functools import lru_cache

import triton
import triton.language as tl

from sparsetile.backends.contract import Problem, Resources
from sparsetile.backends.triton.block_attention_portable import step
from sparsetile.backends.triton.float8 import more_pointers, of_keys, passed, pointer, query_scales
from sparsetile.backends.triton.latents import latent_of, mode, parts_of
from sparsetile.backends.triton.launch import BYTES, FAR, known_start, list_steps, options, power, scales, shared_limit, tiles
from sparsetile.backends.triton.pages import DEFAULT, one_tensor, pages_of, rows_in
from sparsetile.backends.triton.relaunch import Constants, launch
from sparsetile.backends.triton.tiles import entries_of, finish, interval_of, opened, place_of

QUERIES, SPLITS = 32, 64


@triton.jit
def seen_by(row, kind, intervals, bitmaps, M: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, INTERVALS: tl.constexpr, BITMAPS: tl.constexpr):
    """[M, BK]: which key of the block the rows row[M] of its picture see. kind -1: all."""
    c = tl.arange(0, BK)
    lo, hi = interval_of(kind, row, intervals, M, BQ, BK, INTERVALS)
    ok = (c[None, :] >= lo[:, None]) & (c[None, :] < hi[:, None])
    if BITMAPS:
        if kind >= 0:
            if (kind & 1) == 1:
                words = tl.load(bitmaps + (kind >> 1).to(tl.int64) * (BQ * (BK // 32)) + row[:, None] * (BK // 32) + (c // 32)[None, :])
                ok = ((words >> (c % 32)[None, :]) & 1) != 0
    return ok


@triton.jit(do_not_specialize=["slb", "slh", "Hq", "group", "T", "S", "first", "nq", "tiles", "q_start", "heads", "blocks", "lines", "table_b", "count"])
def attend(q, k, v, out, lse, sums, tops, offsets, cols, kinds, intervals, bitmaps, list_of, kv_length, q_starts, sinks, table, q_scale, k_scale, v_scale,
           sqb, sqh, sqt, skb, skh, sks, svb, svh, svs, slb, slh, Hq, group, T, S, first, nq, tiles, q_start, heads, blocks, lines, scale, inner, outer, table_b, count,
           D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, M: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
           PACK: tl.constexpr, SPLIT: tl.constexpr, SHARED: tl.constexpr, NEGATE: tl.constexpr, CAP: tl.constexpr, INTERVALS: tl.constexpr, BITMAPS: tl.constexpr,
           EDGE: tl.constexpr, FROM_LENGTH: tl.constexpr, FAR: tl.constexpr, PAGE: tl.constexpr, LATENT: tl.constexpr, FLOAT8: tl.constexpr):
    """heads: tiles of heads, Hq / PACK; blocks: tiles of M rows of one tile of queries; lines: B * Hq * T."""
    x = tl.program_id(0)
    split = x % SPLIT
    x = x // SPLIT
    block = x % blocks
    h0 = (x // blocks) % heads * PACK
    i = (x // blocks // heads) % tiles
    b = (x // blocks // heads // tiles).to(tl.int64)
    which = tl.load(list_of + b * slb + h0 * slh)
    limit, start = place_of(b, T, S, q_start, q_starts, kv_length, FROM_LENGTH)
    rest = start & (BQ - 1)
    low = tl.maximum(i * BQ - rest, 0).to(tl.int32)            # the tile's first query, and its row
    high = tl.minimum(i * BQ - rest + BQ, T).to(tl.int32)
    y = block * M + tl.arange(0, M)
    t = low + y // PACK
    row_ok = t < high
    t = tl.where(row_ok, t, 0)
    h = h0 + y % PACK
    row = tl.where(row_ok, t - (i * BQ - rest).to(tl.int32), 0)
    tile = tl.where(low < high, (start - rest) // BQ + i - first, -1)
    a, n, e, c, edge = entries_of(tile, which, offsets, cols, limit, nq, BK, EDGE)
    full = n - a
    some = c - e + edge
    lo = ((full + some).to(tl.int64) * split // SPLIT).to(tl.int32)
    hi = ((full + some).to(tl.int64) * (split + 1) // SPLIT).to(tl.int32)
    hk = (h0 // group).to(tl.int64)
    q += b * sqb
    k += b * skb + hk * skh
    v += b * svb + hk * svh
    if PAGE:
        table += b * table_b
    by_query = 1.0
    if FLOAT8:
        by_query = query_scales(q_scale, (b * Hq + h) * T + t, row_ok)
        groups = (b * (Hq // group) + hk) * ((S + 127) // 128)
        if k_scale is not None:
            k_scale += groups
        if v_scale is not None:
            v_scale += groups
    q_rows = h.to(tl.int64) * sqh + t.to(tl.int64) * sqt
    scale2 = scale * 1.4426950408889634
    q0, q1 = opened(q, q_rows, row_ok, D, D0, D1, NEGATE)
    m = tl.full([M], float("-inf"), tl.float32)
    l = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, V0], tl.float32)
    w = tl.arange(0, BK)
    span = w.to(tl.int64) if FAR else w
    ok = w >= 0
    if EDGE or INTERVALS or BITMAPS:
        for f in tl.range(e - edge + tl.maximum(lo - full, 0), e - edge + tl.maximum(hi - full, 0), num_stages=1):
            entry = tl.where(f < e, n, f)
            s_key = tl.load(cols + entry) * BK
            exists = s_key + w < limit
            if PAGE:
                rows, exists = rows_in(pages_of(table, s_key, limit, PAGE, BK), s_key + w, limit, count, PAGE, FAR)
            mask = exists[None, :] & row_ok[:, None]
            if INTERVALS or BITMAPS:
                mask = mask & seen_by(row, tl.load(kinds + entry), intervals, bitmaps, M, BQ, BK, INTERVALS, BITMAPS)
            any_row = tl.max(mask.to(tl.int32), 0) > 0
            if PAGE:
                acc, m, l = step(acc, m, l, q, q_rows, row_ok, q0, q1, k, v, rows * sks, rows * svs, any_row, any_row, mask, 0,
                                  scale2, inner, outer, sks, svs, D, D0, D1, DV, V0, M, BK, 0, False, SHARED, NEGATE, CAP, True, True, LATENT)
            else:
                far = s_key.to(tl.int64)
                acc, m, l = step(acc, m, l, q, q_rows, row_ok, q0, q1, k + far * sks, v + far * svs, span * sks, span * svs, any_row, any_row, mask, 0,
                                  scale2, inner, outer, sks, svs, D, D0, D1, DV, V0, M, BK, 0, False, False, NEGATE, CAP, True, True, 0, FLOAT8, by_query, k_scale, v_scale, s_key + w)
    here = a + tl.minimum(lo, full)
    following = tl.load(cols + here)  # one turn early; the element past the end is readable
    if PAGE:
        ahead = pages_of(table, following * BK, limit, PAGE, BK)
        for f in tl.range(here, a + tl.minimum(hi, full)):
            rows, exists = rows_in(ahead, following * BK + w, limit, count, PAGE, FAR)
            following = tl.load(cols + f + 1)
            ahead = pages_of(table, following * BK, limit, PAGE, BK)
            acc, m, l = step(acc, m, l, q, q_rows, row_ok, q0, q1, k, v, rows * sks, rows * svs, exists, exists, exists[None, :], 0,
                              scale2, inner, outer, sks, svs, D, D0, D1, DV, V0, M, BK, 0, False, SHARED, NEGATE, CAP, True, True, LATENT)
    else:
        for f in tl.range(here, a + tl.minimum(hi, full)):
            far = following.to(tl.int64) * BK
            key = following * BK
            following = tl.load(cols + f + 1)
            acc, m, l = step(acc, m, l, q, q_rows, row_ok, q0, q1, k + far * sks, v + far * svs, span * sks, span * svs, ok, ok, ok, 0,
                              scale2, inner, outer, sks, svs, D, D0, D1, DV, V0, M, BK, 0, False, SHARED, NEGATE, CAP, False, False, 0, FLOAT8, by_query, k_scale, v_scale, key)
    line = (b * Hq + h) * T + t
    cv = tl.arange(0, V0)
    if SPLIT > 1:
        line += split * lines.to(tl.int64)
        tl.store(tops + 2 * line, m, mask=row_ok)
        tl.store(tops + 2 * line + 1, l, mask=row_ok)
        tl.store(sums + line[:, None] * DV + cv[None, :], acc, mask=row_ok[:, None] & (cv < DV)[None, :])
    else:
        factor, logs = finish(m, l, scale, scale2, sinks, h, sinks is not None)
        if lse is not None:
            tl.store(lse + line, logs, mask=row_ok)
        tl.store(out + line[:, None] * DV + cv[None, :], (acc * factor[:, None]).to(out.dtype.element_ty), mask=row_ok[:, None] & (cv < DV)[None, :])


@triton.jit(do_not_specialize=["Hq", "T", "lines"])
def merge(sums, tops, out, lse, sinks, Hq, T, lines, scale, DV: tl.constexpr, V0: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr):
    """Parts left by `attend` -> out, lse."""
    line = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = line < lines
    h = (line // T % Hq).to(tl.int32)
    scale2 = scale * 1.4426950408889634
    low = float("-inf")
    top = tl.full([ROWS], low, tl.float32)
    for s in range(SPLIT):
        top = tl.maximum(top, tl.load(tops + 2 * (line + s * lines.to(tl.int64)), inside, low))
    ref = tl.where(top == low, 0.0, top)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, V0], tl.float32)
    c = tl.arange(0, V0)
    for s in range(SPLIT):
        at = line + s * lines.to(tl.int64)
        m = tl.load(tops + 2 * at, inside, low)
        share = tl.math.exp2((m - ref) * scale2)
        total += share * tl.load(tops + 2 * at + 1, inside, 0.0)
        acc += share[:, None] * tl.load(sums + at[:, None] * DV + c[None, :], inside[:, None] & (c < DV)[None, :], 0.0)
    factor, logs = finish(top, total, scale, scale2, sinks, h, sinks is not None)
    if lse is not None:
        tl.store(lse + line, logs, mask=inside)
    tl.store(out + line[:, None] * DV + c[None, :], (acc * factor[:, None]).to(out.dtype.element_ty), mask=inside[:, None] & (c < DV)[None, :])


# ---------------------------------------------------------------------------------------------------------------- the host
def rows_of_tile(queries: int, pack: int, width: int) -> int:
    return min(power(queries * pack), 64 if width <= 128 else 32 if width <= 256 else 16)


def widths(D: int, DV: int, latent=None) -> dict:
    D0, D1 = parts_of(D, latent)
    return dict(D=D, D0=D0, D1=D1, DV=DV, V0=power(DV, 64))


def pack_of(problem: Problem) -> int:
    return 1 if "per_head" in problem.features else problem["Hq"] // problem["Hk"]


def resources(problem: Problem, config) -> Resources | str:
    queries = min(problem["T"], config["block_q"])
    if problem.dtype("q") == "float32":
        return "path decode takes float16 and bfloat16, not float32; take portable"
    if queries > QUERIES:
        return f"path decode takes up to {QUERIES} queries a tile, not {queries}; take a smaller block_q, or path portable"
    if config["chunk"] or config["value_block"]:
        return "path decode holds whole rows: chunk and value_block are 0 there"
    w, size = widths(problem["D"], problem["Dv"], latent_of(problem)), max(2, BYTES[problem.dtype("q", "float32")])
    M, warps = rows_of_tile(queries, pack_of(problem), max(problem["D"], problem["Dv"])), config["num_warps"]
    if M * (w["V0"] + config["block_k"]) > warps * 32 * 160:
        return f"the sums of {M} rows x {w['V0']} value columns do not fit the registers of {warps} warps"
    shared = size * (M * (w["D0"] + w["D1"]) + max(1, config["num_stages"]) * config["block_k"] * (w["D0"] + w["D1"] + (0 if "shared_kv" in problem.features and w["V0"] == w["D0"] else w["V0"])))
    if shared > shared_limit(problem.arch):
        return f"about {shared // 1024} KiB of shared memory asked for, {problem.arch} has {shared_limit(problem.arch) // 1024}; use smaller blocks or fewer stages"
    return Resources(threads=warps * (64 if problem.arch == "gfx942" else 32), shared=shared)


def candidates(problem: Problem) -> list[dict]:
    """Configs for few queries, the best first."""
    wide = max(problem["D"], problem["Dv"])
    shape = dict(block_k=64, num_warps=4) if wide <= 128 else dict(block_k=32, num_warps=4 if wide <= 256 else 8)
    return [dict(path="decode", block_q=16, chunk=0, value_block=0, maps=False, num_stages=stages, **shape) for stages in (3, 2, 1)]


def takes(q, lists, config) -> bool:
    """Whether a call may run on the path "decode"."""
    return config["path"] == "decode" and lists.q_order is None and lists.k_order is None and min(q.shape[2], lists.block_q) <= QUERIES


def constants(D: int, DV: int, rows: int, block_q: int, block_k: int, pack: int, splits: int, *, shared_kv, negate, cap, intervals, bitmaps, edge, from_length, far, page, latent,
              arch, float8) -> dict:
    w = widths(D, DV, latent)
    return dict(**w, M=rows, BQ=block_q, BK=block_k, PACK=pack, SPLIT=splits, SHARED=shared_kv and DV == w["V0"] == w["D0"], NEGATE=negate, CAP=cap, INTERVALS=intervals,
                BITMAPS=bitmaps, EDGE=edge, FROM_LENGTH=from_length, FAR=far, PAGE=page, LATENT=mode(latent, arch), FLOAT8=float8)


def merge_constants(DV: int, splits: int) -> dict:
    V0 = power(DV, 64)
    return dict(DV=DV, V0=V0, ROWS=max(1, 512 // V0), SPLIT=splits)


@lru_cache(4096)
def _plan(shapes, strides, dtype, lists_key, flags, config, scale, softcap, sms):
    (B, Hq, T, D), (_, Hk, S, DV) = shapes
    block_q, block_k, nk, intervals, bitmaps, apart = lists_key
    kv_length, from_length, shared_kv, q_start, page, apart_far, latent, arch = flags
    config, queries, pack = dict(config), min(T, block_q), 1 if apart else Hq // Hk
    rows, n = rows_of_tile(queries, pack, max(D, DV)), tiles(T, block_q, q_start)
    blocks, heads = -(-queries * pack // rows), Hq // pack
    items = B * n * heads * blocks
    splits = 1
    while splits < min(SPLITS, nk) and items * splits < 4 * sms:  # a power of two: few kernels to compile
        splits *= 2
    size, inner, outer, negate = scales(scale, softcap)
    far = block_k * max(abs(strides[0]), abs(strides[1]), D, DV) >= FAR or apart_far
    made = constants(D, DV, rows, block_q, block_k, pack, splits, shared_kv=shared_kv, negate=negate, cap=softcap is not None, intervals=intervals, bitmaps=bitmaps,
                     edge=kv_length or nk * block_k > S, from_length=from_length, far=far, page=page, latent=latent, arch=arch,
                     float8=dtype[1].itemsize == 1 and latent is None)
    joined = merge_constants(DV, splits)
    return (items * splits,), n, heads, blocks, splits, (size, inner, outer), Constants({**made, **options(config)}), (-(-B * Hq * T // joined["ROWS"]),), Constants({**joined, "num_warps": 4, "enable_fp_fusion": False})


def run(q, k, v, lists, out, lse, kind, *, place, config, scale, sink_logits=None, softcap=None, kv_length=None, q_start=None, table=None, latent=None,
        float8_scales=(None, None, None)):
    S, count, page, far, k, v = one_tensor(table, k, v)
    (B, Hq, T, D), Hk, DV = q.shape, k.shape[1], v.shape[3]
    host, starts = known_start(q_start)
    shared_kv, apart = k.data_ptr() == v.data_ptr() and k.stride()[:3] == v.stride()[:3], lists.list_of.shape[1] > 1
    grid, n, heads, blocks, splits, (size, inner, outer), constant, merge_grid, joined = _plan(
        ((B, Hq, T, D), (B, Hk, S, DV)), (k.stride(2), v.stride(2)), (q.dtype, k.dtype), (lists.block_q, lists.block_k, lists.nk, lists.has_intervals, lists.has_bitmaps, apart),
        (kv_length is not None, q_start is None, shared_kv, host, page, far, latent, place.arch), tuple(config.items()), float(scale), None if softcap is None else float(softcap), max(1, place.sms))
    lines, sums, tops = B * Hq * T, None, None
    if splits > 1:
        sums, tops = place.empty((splits, lines, DV), "float32"), place.empty((splits, lines, 2), "float32")
    launch(attend, grid, place, (passed(q, place.arch), passed(k, place.arch), passed(v, place.arch), out, lse, sums, tops, lists.offsets, lists.cols, lists.kinds, lists.intervals, lists.bitmaps, lists.list_of, kv_length,
                                 starts, sink_logits, table, *float8_scales),
           (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *list_steps(lists),
            Hq, Hq // Hk, T, S, lists.first, lists.nq, n, host or 0, heads, blocks, lines, size, inner, outer, None if table is None else table.stride(0), count), constant, (q.dtype, kind))
    if splits > 1:
        launch(merge, merge_grid, place, (sums, tops, out, lse, sink_logits), (Hq, T, lines, size), joined, (kind,))
    return out, lse


def artifacts(problem: Problem, config) -> list[dict]:
    has, own, D, DV = problem.features.__contains__, pointer(problem.dtype("q", "float32"), problem.arch), problem["D"], problem["Dv"]
    pack, queries = pack_of(problem), min(problem["T"], config["block_q"])
    made = constants(D, DV, rows_of_tile(queries, pack, max(D, DV)), config["block_q"], config["block_k"], pack, 8, shared_kv=has("shared_kv"), negate=False, cap=has("softcap"),
                     intervals=has("interval"), bitmaps=has("bitmap"), edge=has("kv_length") or problem["S"] % config["block_k"] != 0, from_length=has("kv_length") and not has("q_start"), far=False, page=DEFAULT * has("paged"), latent=latent_of(problem), arch=problem.arch, float8=of_keys(problem))
    names = ["list_of", "offsets", "cols", "kinds", "intervals", "bitmaps"] + ["kv_length"] * has("kv_length") + ["q_starts"] * has("q_start") + ["table"] * has("paged")
    keys = "*u8" if latent_of(problem) else pointer(problem.dtype("k", "float32"), problem.arch)
    signature = {"q": own, "k": keys, "v": keys} | more_pointers(problem, problem.arch) | {name: "*fp32" for name in ("lse", "sums", "tops")} | {name: "*i32" for name in names} | ({"sinks": "*fp32"} if has("sink") else {})
    strides = ("sqb", "sqh", "sqt", "skb", "skh", "sks", "svb", "svh", "svs")
    integers = ("slb", "slh", "Hq", "group", "T", "S", "first", "nq", "tiles", "q_start", "heads", "blocks", "lines") + ("table_b", "count") * has("paged")
    div16 = tuple(signature) + (strides if D % 16 == 0 and DV % 16 == 0 else ())
    signature |= {name: "i32" for name in strides + integers} | {name: "fp32" for name in ("scale", "inner", "outer")}
    joined = {"sums": "*fp32", "tops": "*fp32", "out": signature["out"], "lse": "*fp32", "Hq": "i32", "T": "i32", "lines": "i32", "scale": "fp32"} | ({"sinks": "*fp32"} if has("sink") else {})
    return [dict(fn=attend, signature=signature, constexprs=made, options=options(config), div16=div16),
            dict(fn=merge, signature=joined, constexprs=merge_constants(DV, 8), options=dict(num_warps=4, enable_fp_fusion=False), div16=("sums", "tops", "out", "lse"))]
