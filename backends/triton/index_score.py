"""The one score function of the lightning indexer, used by `indexer_scores` and by `indexer_topk`, which must agree bit for bit.

    q [B,H,T,D]  k [B,S,D]  weights [B,H,T] float32  k_scale [B,S] float32  ->  scores [B,T,S] float32

score[t,s] = k_scale[s] * sum_h weights[h,t] * act(q[h,t] . k[s]). Whatever decides the order of the sums (tiles over keys, heads and D, warps) follows from the
problem alone and is no knob; how many queries a program takes is.
Sixteen heads or more: keys stand on the rows of the product and one query's heads on its columns, so that the sum over heads stays inside a few threads and few
queries (decoding) fill the tensor cores as well as many. Fewer heads: a tile of queries by keys for one head after the other.
With a table [B,pages] int32, k [N,page,D] and k_scale [N,page] are pages, k_b and scale_b apart (pages.py); what lies in no page scores -inf.
"""
from functools import lru_cache

import triton
import triton.language as tl

from sparsetile.backends.triton import pages, relaunch
from sparsetile.backends.triton.float8 import native, passed, pointer, product_dtype, widen


ALONE = 2  # queries of a call up to which each goes through the keys for itself


@triton.jit
def key_window(starts, ends, q_starts, b, T_all, t, S, position, short, CAUSAL: tl.constexpr, mask):
    """Keys lo <= s < hi that query t (number or tile) of batch b may see; (S, 0) where there is nothing to compute."""
    lo = t * 0
    hi = t * 0 + S
    item = b.to(tl.int64) * T_all + t
    if starts is not None:
        lo = tl.minimum(tl.maximum(tl.load(starts + item, mask=mask, other=0), 0), S)
    if ends is not None:
        hi = tl.minimum(tl.maximum(tl.load(ends + item, mask=mask, other=0), 0), S)
    if CAUSAL:
        end = t.to(tl.int64) + 1 + position  # wide: positions may be any int32
        if q_starts is not None:
            end += tl.load(q_starts + b)
        hi = tl.minimum(hi, tl.maximum(tl.minimum(end, S), 0).to(tl.int32))
    idle = (hi - lo <= short) | (mask == 0)
    return tl.where(idle, S, lo), tl.where(idle, 0, hi)


@triton.jit
def weigh(product, weight, factor, ACT: tl.constexpr):
    if ACT == "share":  # what a key got of the attention whose lse the weight is
        return tl.exp2(product * factor - weight * 1.4426950408889634)
    if ACT == "relu":  # a NaN stays one. (x + |x|) * (w / 2) has fewer instructions and was slower: 849 TFLOP/s where this has 925
        product = tl.maximum(product, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return product * weight


@triton.jit
def score_of(held, query, weight, factor, h, H: tl.constexpr, BLOCK_H: tl.constexpr, ACT: tl.constexpr):
    """The scores of a tile of keys for one query, without their scale, where heads and D are one tile each."""
    part = weigh(tl.dot(held, tl.trans(query), input_precision="ieee"), weight[None, :], factor, ACT)
    if H % BLOCK_H:  # a head that is not there would make NaN of an infinite key
        part = tl.where((h < H)[None, :], part, 0.0)
    return tl.zeros((held.shape[0],), tl.float32) + tl.sum(part, axis=1)


@triton.jit
def score_by_heads(q, k, weights, k_scale, starts, ends, q_starts, out, T, T_all, S, q_b, q_h, q_t, k_b, k_s, w_b, w_h, w_t, scale_b, out_b, out_t, position, short, factor, table, table_b, pool_pages,
                   H: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
                   DTYPE: tl.constexpr, ACT: tl.constexpr, CAUSAL: tl.constexpr, FILL: tl.constexpr, PAGE: tl.constexpr):
    HEAD_CHUNKS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    D_CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    s_blocks = (S + BLOCK_S - 1) // BLOCK_S
    t_blocks = (T + BLOCK_T - 1) // BLOCK_T
    pid = tl.program_id(0)
    s = (pid % s_blocks) * BLOCK_S + tl.arange(0, BLOCK_S)
    t0 = (pid // s_blocks % t_blocks) * BLOCK_T
    b = pid // s_blocks // t_blocks
    rows = t0 + tl.arange(0, BLOCK_T)
    lo, hi = key_window(starts, ends, q_starts, b, T_all, rows, S, position, short, CAUSAL, rows < T)
    s0 = (pid % s_blocks) * BLOCK_S
    count = tl.minimum(BLOCK_T, T - t0)
    out += b.to(tl.int64) * out_b
    if (tl.max(hi, axis=0) > s0) & (tl.min(lo, axis=0) < s0 + BLOCK_S):
        h, d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
        q += b.to(tl.int64) * q_b
        weights += b.to(tl.int64) * w_b
        if PAGE:
            page, exists = pages.page_of(table + b.to(tl.int64) * table_b, s, tl.max(hi, axis=0), pool_pages, PAGE)
            keys = k + (page * k_b + s % PAGE * k_s)[:, None] + d[None, :]
        else:
            keys = k + b.to(tl.int64) * k_b + s.to(tl.int64)[:, None] * k_s + d[None, :]                  # [BLOCK_S, BLOCK_D]
            exists = s < S
        if D_CHUNKS == 1:
            held = widen(tl.load(keys, mask=exists[:, None] & (d < D)[None, :], other=0.0), DTYPE)
        if k_scale is not None:
            scale = tl.load(k_scale + (page * scale_b + s % PAGE if PAGE else b.to(tl.int64) * scale_b + s), mask=exists, other=0.0)
        total = tl.zeros((BLOCK_S,), tl.float32)
        product = tl.zeros((BLOCK_S, BLOCK_H), tl.float32)
        for j in range(count * HEAD_CHUNKS * D_CHUNKS):  # one loop over queries, heads and D, so that its loads are pipelined
            t = t0 + j // (HEAD_CHUNKS * D_CHUNKS)
            head = (j // D_CHUNKS % HEAD_CHUNKS) * BLOCK_H + h
            column = (j % D_CHUNKS) * BLOCK_D + d
            queries = q + head.to(tl.int64)[:, None] * q_h + t.to(tl.int64) * q_t + column[None, :]       # [BLOCK_H, BLOCK_D]
            query = widen(tl.load(queries, mask=(head < H)[:, None] & (column < D)[None, :], other=0.0), DTYPE)
            if D_CHUNKS == 1:
                product = tl.dot(held, tl.trans(query), input_precision="ieee")
            else:
                if j % D_CHUNKS == 0:
                    product = tl.zeros((BLOCK_S, BLOCK_H), tl.float32)
                key = widen(tl.load(keys + (j % D_CHUNKS) * BLOCK_D, mask=exists[:, None] & (column < D)[None, :], other=0.0), DTYPE)
                product = tl.dot(key, tl.trans(query), product, input_precision="ieee")
            if j % D_CHUNKS == D_CHUNKS - 1:
                weight = tl.load(weights + head.to(tl.int64) * w_h + t.to(tl.int64) * w_t, mask=head < H, other=0.0)
                part = weigh(product, weight[None, :], factor, ACT)
                if H % BLOCK_H:  # a head that is not there would make NaN of an infinite key
                    part = tl.where((head < H)[None, :], part, 0.0)
                total += tl.sum(part, axis=1)
                if j // D_CHUNKS % HEAD_CHUNKS == HEAD_CHUNKS - 1:
                    score = total
                    if k_scale is not None:
                        score = score * scale
                    first, last = key_window(starts, ends, q_starts, b, T_all, t, S, position, short, CAUSAL, t < T)
                    if PAGE:
                        last = tl.where(exists, last, 0)
                    score = tl.where((s >= first) & (s < last), score, float("-inf"))
                    tl.store(out + t.to(tl.int64) * out_t + s, score, mask=s < S)
                    total = tl.zeros((BLOCK_S,), tl.float32)
    elif FILL:
        for i in range(count):
            tl.store(out + (t0 + i).to(tl.int64) * out_t + s, tl.full((BLOCK_S,), float("-inf"), tl.float32), mask=s < S)


@triton.jit
def score_alone(q, k, weights, k_scale, starts, ends, q_starts, out, T, T_all, S, q_b, q_h, q_t, k_b, k_s, w_b, w_h, w_t, scale_b, out_b, out_t, position, short, factor, table, table_b, pool_pages, splits,
                H: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
                DTYPE: tl.constexpr, ACT: tl.constexpr, CAUSAL: tl.constexpr, FILL: tl.constexpr, PAGE: tl.constexpr):
    """score_by_heads where heads and D are one tile each, for few queries: a program keeps its query and goes through a share of the keys, which are pipelined."""
    pid = tl.program_id(0)
    t = pid // splits % T
    b = pid // splits // T
    tiles = (S + BLOCK_S - 1) // BLOCK_S
    each = (tiles + splits - 1) // splits
    begin = pid % splits * each
    end = tl.minimum(begin + each, tiles)
    lo, hi = key_window(starts, ends, q_starts, b, T_all, t, S, position, short, CAUSAL, t < T)
    first = tl.minimum(tl.maximum(begin, lo // BLOCK_S), end)
    last = tl.maximum(tl.minimum(end, (hi + BLOCK_S - 1) // BLOCK_S), first)
    h, d, i = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
    out += b.to(tl.int64) * out_b + t.to(tl.int64) * out_t
    if FILL:
        for tile in range(begin, first):
            tl.store(out + tile * BLOCK_S + i, tl.full((BLOCK_S,), float("-inf"), tl.float32), mask=tile * BLOCK_S + i < S)
        for tile in range(last, end):
            tl.store(out + tile * BLOCK_S + i, tl.full((BLOCK_S,), float("-inf"), tl.float32), mask=tile * BLOCK_S + i < S)
    if first < last:
        queries = q + b.to(tl.int64) * q_b + h.to(tl.int64)[:, None] * q_h + t.to(tl.int64) * q_t + d[None, :]  # [BLOCK_H, BLOCK_D]
        query = widen(tl.load(queries, mask=(h < H)[:, None] & (d < D)[None, :], other=0.0), DTYPE)
        weight = tl.load(weights + b.to(tl.int64) * w_b + h.to(tl.int64) * w_h + t.to(tl.int64) * w_t, mask=h < H, other=0.0)
        for tile in range(first, last):
            s = tile * BLOCK_S + i
            if PAGE:
                page, exists = pages.page_of(table + b.to(tl.int64) * table_b, s, hi, pool_pages, PAGE)
                keys = k + (page * k_b + s % PAGE * k_s)[:, None] + d[None, :]
            else:
                keys = k + b.to(tl.int64) * k_b + s.to(tl.int64)[:, None] * k_s + d[None, :]              # [BLOCK_S, BLOCK_D]
                exists = s < S
            held = widen(tl.load(keys, mask=exists[:, None] & (d < D)[None, :], other=0.0), DTYPE)
            score = score_of(held, query, weight, factor, h, H, BLOCK_H, ACT)
            if k_scale is not None:
                score = score * tl.load(k_scale + (page * scale_b + s % PAGE if PAGE else b.to(tl.int64) * scale_b + s), mask=exists, other=0.0)
            tl.store(out + s, tl.where((s >= lo) & (s < hi) & exists, score, float("-inf")), mask=s < S)


@triton.jit
def score_by_queries(q, k, weights, k_scale, starts, ends, q_starts, out, T, T_all, S, q_b, q_h, q_t, k_b, k_s, w_b, w_h, w_t, scale_b, out_b, out_t, position, short, factor, table, table_b, pool_pages,
                     H: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
                     DTYPE: tl.constexpr, ACT: tl.constexpr, CAUSAL: tl.constexpr, FILL: tl.constexpr, PAGE: tl.constexpr):
    D_CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    s_blocks = (S + BLOCK_S - 1) // BLOCK_S
    t_blocks = (T + BLOCK_T - 1) // BLOCK_T
    pid = tl.program_id(0)
    s0 = (pid % s_blocks) * BLOCK_S
    s = s0 + tl.arange(0, BLOCK_S)
    t = (pid // s_blocks % t_blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    b = pid // s_blocks // t_blocks
    lo, hi = key_window(starts, ends, q_starts, b, T_all, t, S, position, short, CAUSAL, t < T)
    places = out + b.to(tl.int64) * out_b + t.to(tl.int64)[:, None] * out_t + s[None, :]
    there = (t < T)[:, None] & (s < S)[None, :]
    if (tl.max(hi, axis=0) > s0) & (tl.min(lo, axis=0) < s0 + BLOCK_S):
        d = tl.arange(0, BLOCK_D)
        if PAGE:
            page, exists = pages.page_of(table + b.to(tl.int64) * table_b, s, tl.max(hi, axis=0), pool_pages, PAGE)
            keys = k + (page * k_b + s % PAGE * k_s)[:, None] + d[None, :]
        else:
            keys = k + b.to(tl.int64) * k_b + s.to(tl.int64)[:, None] * k_s + d[None, :]                  # [BLOCK_S, BLOCK_D]
            exists = s < S
        queries = q + b.to(tl.int64) * q_b + t.to(tl.int64)[:, None] * q_t + d[None, :]                   # [BLOCK_T, BLOCK_D]
        if D_CHUNKS == 1:
            held = widen(tl.load(keys, mask=exists[:, None] & (d < D)[None, :], other=0.0), DTYPE)
        shares = weights + b.to(tl.int64) * w_b + t.to(tl.int64) * w_t
        weight = tl.load(shares, mask=t < T, other=0.0)
        total = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
        product = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
        for j in range(H * D_CHUNKS):
            column = (j % D_CHUNKS) * BLOCK_D + d
            query = widen(tl.load(queries + (j % D_CHUNKS) * BLOCK_D, mask=(t < T)[:, None] & (column < D)[None, :], other=0.0), DTYPE)
            if D_CHUNKS == 1:
                product = tl.dot(query, tl.trans(held), input_precision="ieee")
            else:
                if j % D_CHUNKS == 0:
                    product = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
                key = widen(tl.load(keys + (j % D_CHUNKS) * BLOCK_D, mask=exists[:, None] & (column < D)[None, :], other=0.0), DTYPE)
                product = tl.dot(query, tl.trans(key), product, input_precision="ieee")
            if j % D_CHUNKS == D_CHUNKS - 1:
                total += weigh(product, weight[:, None], factor, ACT)
                queries += q_h
                shares += w_h
                weight = tl.load(shares, mask=(t < T) & (j < (H - 1) * D_CHUNKS), other=0.0)  # a head ahead: behind the product it would be waited for
        if k_scale is not None:
            total = total * tl.load(k_scale + (page * scale_b + s % PAGE if PAGE else b.to(tl.int64) * scale_b + s), mask=exists, other=0.0)[None, :]
        seen = (s[None, :] >= lo[:, None]) & (s[None, :] < hi[:, None])
        if PAGE:
            seen = seen & exists[None, :]
        total = tl.where(seen, total, float("-inf"))
        tl.store(places, total, mask=there)
    elif FILL:
        tl.store(places, tl.full((BLOCK_T, BLOCK_S), float("-inf"), tl.float32), mask=there)


def refusal(problem) -> str | None:
    for name in ("q", "k"):
        if problem.dtype(name) not in ("float32", "float16", "bfloat16", "float8_e4m3fn"):
            return f"indexer {name} of {problem.dtype(name)} is not supported on a GPU; float32, float16, bfloat16 and float8_e4m3fn are"
    return None


def plan(H, D, q_dtype, k_dtype, arch):
    """(kernel, constants, warps): everything that decides the order of summation, from the problem alone."""
    dtype = product_dtype(q_dtype, k_dtype, arch)
    full = dtype == tl.float32  # products without tensor cores want small tiles
    narrow = 32 if dtype == tl.float8e4nv else 16
    width = max(narrow, 1 << (D - 1).bit_length())
    if full:
        width = min(width, 32)
    elif width > 256 or (width > 128 and D % 128):
        width = 64
    constants = {"H": H, "D": D, "BLOCK_S": 64 if full or H < 16 else 128, "BLOCK_D": width, "DTYPE": dtype}
    if H < 16:
        return score_by_queries, constants, 4
    constants["BLOCK_H"] = 16 if full else 64 if H > 32 else 32 if H > 16 else 16
    return score_by_heads, constants, 4


def is_alone(kernel, constants, T) -> bool:
    """Whether a call's queries go one by one (`score_alone`): too few to share tiles of keys, which then come in fewer, longer streams. Decided by the whole call's T: the same for all of its parts."""
    return kernel is score_by_heads and T <= ALONE and constants["H"] <= constants["BLOCK_H"] and constants["D"] <= constants["BLOCK_D"]


def share_plan(H, D, T, q_dtype, k_dtype, arch):
    """As `plan`, for the shares of importance_topk, which no other kernel has to repeat: many queries take a tile of them for one head after the other, with few heads or many."""
    kernel, constants, warps = plan(H, D, q_dtype, k_dtype, arch)
    if kernel is score_by_queries or T < 64 or constants["DTYPE"] == tl.float32:
        return kernel, constants, warps
    constants.pop("BLOCK_H")
    return score_by_queries, {**constants, "BLOCK_S": 128}, 4 if arch == "sm_90a" and constants["BLOCK_D"] <= 128 else 8  # of Hopper's products those of 128 columns read less


def near_heads(weights):
    """weights [B,H,T] with the axis that a tile of one query reads contiguous: its heads, where the kernel holds all of them at a time."""
    return weights if weights.shape[1] < 16 or weights.stride(1) == 1 else weights.transpose(1, 2).contiguous().transpose(1, 2)


def queries_per_program(kernel, constants, queries) -> int:
    """Rows of queries of one program: the knob for the one form, fixed by the tensor cores for the other."""
    return queries if kernel is score_by_heads else 32 if constants["DTYPE"] == tl.float32 else 64


@lru_cache(1024)
def _form(H, D, T, q_dtype, k_dtype, arch, activation, queries, stages, causal, fill, page) -> tuple:
    """Which kernel, and its constants."""
    kernel, constants, warps = plan(H, D, q_dtype, k_dtype, arch) if activation != "share" else share_plan(H, D, T, q_dtype, k_dtype, arch)
    more = dict(BLOCK_T=queries_per_program(kernel, constants, queries))
    if is_alone(kernel, constants, T):
        kernel, more = score_alone, {}
    return kernel, relaunch.Constants(PAGE=page, **constants, **more, ACT=activation, CAUSAL=causal, FILL=fill, num_warps=warps, num_stages=stages)


def score(q, k, weights, out, *, place, queries, stages, T_all, k_scale=None, starts=None, ends=None, q_starts=None, causal=True, position=0, activation="relu",
          fill=True, short=0, factor=None, table=None):
    """Launch. activation "relu", None, or "share": the sum over heads of 2 ** (factor * q.k - weight * log2(e)). starts and ends begin at the first query's element of arrays [B,T_all]. fill=False leaves what no
    query sees unwritten; rows with at most `short` visible keys are not computed."""
    B, H, T, D = q.shape
    S, count, page = pages.sizes(table, k)
    if not B * T * S:
        return
    names = [str(x.dtype).removeprefix("torch.") for x in (q, k)]
    kernel, made = _form(H, D, T_all, *names, place.arch, activation, queries, stages, causal, fill, page)
    blocks, splits = triton.cdiv(S, made["BLOCK_S"]), ()
    if kernel is score_alone:
        splits = max(1, min(4 * place.sms // (B * T), blocks)),
    programs = B * T * splits[0] if splits else B * triton.cdiv(T, made["BLOCK_T"]) * blocks
    pointers = passed(q, place.arch), passed(k, place.arch), weights, k_scale, starts, ends, q_starts if causal else None, out
    numbers = (T, T_all, S, *q.stride()[:3], *k.stride()[:2], *weights.stride(), 0 if k_scale is None else k_scale.stride(0), *out.stride()[:2], position, short, factor)
    if table is None:
        relaunch.launch(kernel, (programs,), place, pointers, (*numbers, None, None, count, *splits), made, tuple(None if x is None else x.dtype for x in pointers))
    else:
        place.noted(kernel[(programs,)])(*pointers, *numbers, table, table.stride(0), count, *splits, **made)


def score_artifact(problem, *, queries, stages, fill, activation="relu") -> dict:
    """What `score` launches, to compile ahead."""
    H, D, arch, has = problem["H"], problem["D"], problem.arch, problem.features
    kinds = problem.dtype("q"), problem.dtype("k"), arch
    kernel, constants, warps = plan(H, D, *kinds) if activation != "share" else share_plan(H, D, problem["T"], *kinds)
    arrays = {"q": pointer(problem.dtype("q"), arch), "k": pointer(problem.dtype("k"), arch), "weights": "*fp32", "k_scale": "*fp32", "starts": "*i32",
              "ends": "*i32", "q_starts": "*i32", "out": "*fp32", "table": "*i32"}
    windows = bool(has & {"window", "key_start", "key_end"})
    absent = {name: None for name, there in (("k_scale", "scale" in has or "k_scale" in has), ("starts", windows), ("ends", windows or activation == "share"),
                                           ("q_starts", "q_start" in has), ("factor", activation == "share"), ("table", "paged" in has), ("table_b", "paged" in has), ("pool_pages", "paged" in has)) if not there}
    near = "w_h" if kernel is score_by_heads else "w_t"
    block = {"BLOCK_T": queries_per_program(kernel, constants, queries)}
    if is_alone(kernel, constants, problem["T"]):
        kernel, block = score_alone, {}
    constants = {**absent, **constants, near: 1, **block, "ACT": activation, "CAUSAL": "causal" in has, "FILL": fill, "PAGE": pages.DEFAULT * ("paged" in has)}
    numbers = ("T", "T_all", "S", "q_b", "q_h", "q_t", "k_b", "k_s", "w_b", "w_h", "w_t", "scale_b", "out_b", "out_t", "position", "short", "table_b", "pool_pages") + ("splits",) * (not block)
    signature = {**{name: kind for name, kind in arrays.items() if name not in absent}, **{name: "i32" for name in numbers if name != near and name not in absent}, **({"factor": "fp32"} if activation == "share" else {})}
    aligned = tuple(name for name in arrays if name not in absent) + (("q_b", "q_h", "q_t", "k_b", "k_s") if D % 16 == 0 else ()) + (("w_t",) if near == "w_h" and H % 16 == 0 else ()) + ("out_t", "out_b")
    return {"fn": kernel, "signature": signature, "constexprs": constants, "options": dict(num_warps=warps, num_stages=stages), "div16": aligned}


def shared_bytes(problem, stages) -> int:
    """About what a program asks of shared memory: the keys, and the queries of each stage."""
    kernel, c, _ = plan(problem["H"], problem["D"], problem.dtype("q"), problem.dtype("k"), problem.arch)
    size = 4 if c["DTYPE"] == tl.float32 else 1 if c["DTYPE"] == tl.float8e4nv else 2
    rows = c.get("BLOCK_H") or queries_per_program(kernel, c, 0)
    whole = problem["D"] <= c["BLOCK_D"]
    return size * c["BLOCK_D"] * (c["BLOCK_S"] * (1 if whole else stages) + rows * stages)
