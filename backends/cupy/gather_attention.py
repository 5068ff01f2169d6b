"""Attention over selected keys: q [B,Hq,T,D], k [B,Hk,S,D], v [B,Hk,S,Dv], indices [B,G,T,K], G in {1, Hk, Hq} -> out [B,Hq,T,Dv], lse [B,Hq,T].

Entry e stands for keys e * granularity ... + granularity - 1; what is no key (negative, past kv_length, past the query when causal) is a hole wherever
it stands, entries past `lengths` are not read, an entry given twice counts twice. Holes are never read. A row without keys: out 0, lse -inf.
latent (R, P): rows of k are bytes, the fp8 layout of a latent cache (latents.cuh), whose first R columns are the values; paths portable and hopper.
Where v is the first columns of k (the latent of MLA: same pointer and strides) each key is read once. The paths "hopper" (gather_attention_hopper.cu) and "tokens"
(gather_tokens_hopper.py, few heads) are for sm_90a and DeepSeek's latent, 576 wide, of which 512 are the values, the path "union" (gather_union.py) for sm_90a and blocks of keys,
as Native Sparse Attention selects them; calls that their copies cannot serve (`hopper_takes`, `gather_union.takes`) run on the portable one.
"""
import math
import struct

from sparsetile.backends.contract import Problem, Resources, Tunable, Unsupported
from sparsetile.backends.cupy import compile as nvrtc
from sparsetile.backends.cupy import gather_tokens_hopper, gather_union, hopper, split
from sparsetile.backends.cupy.operands import (HALVES, KINDS, POSITIONS, SELECTED, ceil_div, copy_bytes, first_fitting, fp8_defines, head_groups, latent_shape, padded,
                                               position_values, problem_copy_bytes, same_memory, selected_values, sliced)

TUNABLES = (
    Tunable("path", ("portable", "hopper", "union", "tokens"), "hopper, tokens: warpgroup products with 64 heads of one query as rows, with up to 32 as columns; 16-bit latents of width 576 whose first "
            "512 columns are the values. union: neighbouring queries read the blocks of keys that they share once; 16-bit, D and Dv up to 128. The rest is for portable"),
    Tunable("heads", (16, 32, 64), "rows of a tile: heads that share list and keys", ("portable",)),
    Tunable("tile_k", (32, 64, 128), "keys gathered a step", ("portable",)),
    Tunable("key_warps", (1, 2, 4), "warps that share 16 heads and divide a step's keys", ("portable",)),
    Tunable("stages", (1, 2), "2: the next keys arrive while these are multiplied", ("portable",)),
    Tunable("split", (0, 1), "1 splits the lists of few queries over the chip where whole ones would leave a sixth of it idle", ("hopper",)),
)
FIELDS = "6Q" + SELECTED + POSITIONS + "12q6i2f"
HOPPER_FIELDS = "4Q" + SELECTED + POSITIONS + split.SPLIT + "4q3iI2f"
HOPPER_HEADS, HOPPER_THREADS = 64, 512


def supports(problem: Problem) -> str | None:
    kinds = {problem.dtype(name) for name in "qkv"} - {"latent_fp8"}
    if latent_shape(problem) is not None and problem.dtype("q") not in HALVES:
        return f"CuPy reads the fp8 layout of a latent cache for queries of float16 and bfloat16, not {problem.dtype('q')}; pass cache.gather()"
    if len(kinds) > 1 or not kinds <= {"float32", *HALVES}:
        return f"CuPy gather attention takes q, k, v of one type, float32, float16 or bfloat16, not {'/'.join(str(problem.dtype(n)) for n in 'qkv')}; cast them to bfloat16"
    if max(problem["D"], problem["Dv"]) > 576:
        return f"CuPy gather attention takes D and Dv up to 576, not {problem['D']} and {problem['Dv']}"
    refusal = resources(problem, default_config(problem))
    return f"CuPy gather attention: {refusal}" if isinstance(refusal, str) else None


def shared_bytes(D: int, Dv: int, config: dict, float32: bool, shared_kv: bool) -> int:
    if float32:
        return 4 * (32 * (padded(D) + 1) + 32 * 65 + 32 * 33 + 33)
    rows, tk, kw, stages, wide = config["heads"], config["tile_k"], config["key_warps"], config["stages"], sliced(Dv)[1]
    tile = padded(D) + 8 + (0 if shared_kv else wide + 8)
    return max((rows * (padded(D) + 8) + stages * tk * tile) * 2 + (stages + 1) * (tk + tk // 32) * 4, rows * (wide + 2) * 4 if kw > 1 else 0)


def no_hopper(problem: Problem, path: str = "hopper") -> str | None:
    """Why a path of warpgroup products is not for this problem."""
    if path != "hopper" and latent_shape(problem) is not None:
        return f"path {path} reads latents of 16 bits, not the fp8 layout of a latent cache; take hopper or portable"
    if problem.arch != "sm_90a":
        return f"path {path}: {problem.arch} lacks its instructions; take portable"
    if problem.dtype("q") not in HALVES or problem.dtype("out", problem.dtype("q")) != problem.dtype("q"):
        return f"path {path} takes float16 or bfloat16 and answers in the same type, not {problem.dtype('q')} to {problem.dtype('out', problem.dtype('q'))}; take portable"
    if (problem["D"], problem["Dv"], problem["Hk"]) != (576, 512, 1) or "shared_kv" not in problem.features or problem.granularity != 1 or "softcap" in problem.features:
        return f"path {path} takes one key head of width 576 whose first 512 columns are the values, tokens (granularity 1) and no softcap; take portable"
    return None


def hopper_takes(q, k, v, indices, granularity: int, scale: float, softcap, out_kind: str, latent=None) -> bool:
    """The same for arrays: aligned rows that 32 bits can count, one list for all heads, and a scale that keeps the order of scores."""
    fits = (q.shape[3], v.shape[3], k.shape[1], indices.shape[1], granularity) == (576, 512, 1, 1, 1) and same_memory(k, v) and out_kind == q.dtype and softcap is None and 0 < scale <= 2 ** 64
    if latent is not None:
        return fits and latent == (512, 64) and hopper.can_map(q) and k.ptr % 16 == 0 and all(s % 16 == 0 for s in (k.strides[0], k.strides[2])) and 0 <= k.strides[2] < 2 ** 31
    return fits and copy_bytes(q, k) == 16 and 0 <= k.strides[2] < 2 ** 31


def resources(problem: Problem, config: dict):
    if config["path"] == "hopper":
        return no_hopper(problem) or Resources(HOPPER_THREADS, split.latent_shared(latent_shape(problem)), 128)
    if config["path"] == "union" and not config.get("split"):
        return gather_union.resources(problem)
    if config.get("split"):
        return "split is for path hopper; the others take 0"
    if config["path"] == "tokens":
        return no_hopper(problem, "tokens") or gather_tokens_hopper.resources(problem["Hq"])
    tk, kw, float32 = config["tile_k"], config["key_warps"], problem.dtype("q") == "float32"
    if float32 and (config["heads"], tk, kw, config["stages"]) != (32, 32, 1, 1):
        return "float32 takes heads 32, tile_k 32, key_warps 1 and stages 1"
    if tk % (16 * kw):
        return f"key_warps {kw} leave less than 16 of {tk} keys each"
    registers = sliced(problem["Dv"])[1] // 2 + tk // kw // 2 + 64
    if not float32 and registers > 255:
        return f"tile_k {tk} over {kw} key_warps needs about {registers} registers a thread, 255 are there"
    shared = shared_bytes(problem["D"], problem["Dv"], config, float32, "shared_kv" in problem.features)
    if shared > nvrtc.shared_limit(problem.arch):
        return f"{shared} bytes of shared memory, {problem.arch} has {nvrtc.shared_limit(problem.arch)}"
    return Resources(threads=_threads(config, float32), shared=shared, registers=registers)


def _threads(config: dict, float32: bool) -> int:
    return 128 if float32 else config["heads"] * 2 * config["key_warps"]


def default_config(problem: Problem) -> dict:
    if problem.dtype("q") == "float32":
        return dict(path="portable", heads=32, tile_k=32, key_warps=1, stages=1, split=0)
    group, wide = problem["Hq"] // problem["Hk"], problem["D"] > 256
    rows = 16 if group <= 16 else 32 if group <= 32 else 64
    tries = [(rows, 64, {16: 4, 32: 2, 64: 2 if wide else 1}[rows], 1 if wide else 2), (rows, 64, {16: 4, 32: 2, 64: 2}[rows], 1), (rows, 32, 2, 1), (min(rows, 32), 32, 2, 1), (16, 32, 2, 1)]
    tiles = first_fitting(problem, resources, [dict(path="portable", heads=h, tile_k=tk, key_warps=kw, stages=st, split=0) for h, tk, kw, st in tries])
    if gather_union.pays(problem):
        return {**tiles, "path": "union"}
    if no_hopper(problem):
        return tiles
    queries = problem["B"] * problem["T"]
    if problem["Hq"] <= gather_tokens_hopper.MOST and latent_shape(problem) is None and queries > 24:  # of 132: lists split over the chip take 38 us for 16 queries, 56 for 32, whole ones 48 and 53
        return {**tiles, "path": "tokens"}
    few = queries * ceil_div(problem["Hq"], HOPPER_HEADS) <= 32  # of 132: 16 items of 2048 keys in 38 us where whole ones take 71, but 64 in 78 for 73
    return {**tiles, "path": "hopper", "split": int(few)}  # 64 rows for one head are cheaper than the portable path, too: 2.1 ms against 6.1


def defines(kind: str, out_kind: str, D: int, Dv: int, config: dict, copy: int, softcap: bool, shared_kv: bool, latent) -> dict:
    common = dict(OUT_KIND=KINDS[out_kind], BH=config["heads"], DP=padded(D), DVP=sliced(Dv)[1], SOFTCAP=int(softcap))
    if kind == "float32":
        return common
    return dict(common, KIND=KINDS[kind], TK=config["tile_k"], KW=config["key_warps"], STAGES=config["stages"], SHARED_KV=int(shared_kv), COPY=copy, **fp8_defines(latent))


def artifacts(problem: Problem, config: dict) -> list[dict]:
    kind = problem.dtype("q")
    if config["path"] == "hopper":
        return [*(dict(source="gather_attention_hopper", defines=hopper_defines(kind, n, latent_shape(problem)), names=["gather_attention_hopper"]) for n in range(1 + config.get("split", 0))),
                dict(source="merge_split", defines=split.latent_merge_defines(kind, problem["B"] * problem["Hq"] * problem["T"]), names=["merge"])]
    if config["path"] == "tokens":
        return gather_tokens_hopper.artifacts(kind, problem["Hq"])
    own = gather_union.artifacts(problem) if config["path"] == "union" else []
    d = defines(kind, problem.dtype("out", kind), problem["D"], problem["Dv"], config, problem_copy_bytes(problem, "D", "Dv"), "softcap" in problem.features, "shared_kv" in problem.features, latent_shape(problem))
    return [*own, dict(source=_source(kind), defines=d, names=["forward"])]


def _source(kind: str) -> str:
    return "gather_attention_float32" if kind == "float32" else "gather_attention"


def hopper_defines(kind: str, is_split: int, latent) -> dict:
    return dict(KIND=KINDS[kind], SPLIT=is_split, **fp8_defines(latent))


def run_hopper(q, k, indices, out, lse, place, config, lengths, causal, scale, sink_logits, kv_length, q_start, latent):
    (B, Hq, T, D), S = q.shape, k.shape[2]
    parts = ceil_div(Hq, HOPPER_HEADS)
    items = B * T * parts
    if items >= 2 ** 31:
        raise Unsupported(f"CuPy gather attention takes at most 2^31 - 1 tiles of 64 heads, not {items}; split the batch")
    shares = split_shares(items, parts, indices.shape[3], max(place.sms, 1)) if config.get("split") else 0
    at, scratch, values = position_values(T, S, kv_length, q_start), None, split.NO_SPLIT
    if shares:
        scratch, values = split.split_values(place, 2 * shares * parts, HOPPER_HEADS, 512, B * T, 1, shares)
    if latent is None:
        fields, queries, size = "Q" + HOPPER_FIELDS, q.ptr, 2
    else:
        (qb, qh, qt), size = hopper.steps(q), 1
        queries = hopper.tensor_map(place, q, (64, Hq, D // 64, T, B), (1, qh, 64, qt, qb), (64, 32, D // 64, 1, 1))
        fields = "128s" + HOPPER_FIELDS
        fields += f"{-struct.calcsize(fields) % 64}x"  # the struct is as long as its alignment asks
    function = nvrtc.function("gather_attention_hopper", "gather_attention_hopper", fields, hopper_defines(q.dtype, int(shares > 0), latent), place)
    strides = *(2 * s for s in q.strides[:3]), size * k.strides[0]
    function(shares * parts or min(items, max(place.sms, 1)), HOPPER_THREADS, split.latent_shared(latent), place.stream, queries, k.ptr, out.ptr, nvrtc.ptr(lse), nvrtc.ptr(sink_logits),
             *selected_values(indices, lengths, 1, causal), *at, *values, *strides, Hq, parts, items, size * k.strides[2], scale, scale * math.log2(math.e))
    if shares:
        split.merge(place, split.latent_merge_defines(q.dtype, B * Hq * T), 512, out, lse, sink_logits, values, at, (Hq, 512, Hq, 1, T, parts, parts))
    return out, lse


def split_shares(items: int, parts: int, K: int, sms: int) -> int:
    """Into how many shares the lists of a call are split, 0: not at all. Where whole items would leave a sixth of the chip idle; lists of a few tiles are not worth it."""
    busy = items / (ceil_div(items, sms) * sms)
    return max(sms // parts, 1) if busy < 5 / 6 and K >= 128 else 0


def run(q, k, v, indices, *, place, config, lengths=None, granularity=1, causal=False, scale, sink_logits=None, softcap=None, kv_length=None, q_start=None, out_dtype=None, return_lse=True,
        latent=None):
    (B, Hq, T, D), (Hk, S), Dv = q.shape, k.shape[1:3], v.shape[3]
    kind, out_kind = q.dtype, out_dtype or q.dtype
    out = place.empty((B, Hq, T, Dv), out_kind)
    lse = place.empty((B, Hq, T), "float32") if return_lse else None
    if B * Hq * T == 0:
        return out, lse
    if config["path"] in ("hopper", "tokens") and hopper_takes(q, k, v, indices, granularity, scale, softcap, out_kind, latent):
        given = (lengths, causal, scale, sink_logits, kv_length, q_start)
        if config["path"] == "hopper":
            return run_hopper(q, k, indices, out, lse, place, config, *given, latent)
        if latent is None:
            return gather_tokens_hopper.run(q, k, indices, out, lse, place, *given)
    if config["path"] == "union" and latent is None and gather_union.takes(q, k, v, indices, out_kind):
        return gather_union.run(q, k, v, indices, out, lse, place=place, lengths=lengths, granularity=granularity, causal=causal, scale=scale, sink_logits=sink_logits, softcap=softcap,
                                kv_length=kv_length, q_start=q_start)
    float32, shared_kv, slices = kind == "float32", same_memory(k, v), sliced(Dv)[0]
    copy = copy_bytes(q, k) if shared_kv else copy_bytes(q, k, v)
    blocks = B * T * head_groups(indices.shape[1], Hq, Hk, config["heads"]) * slices
    if blocks >= 2 ** 31:
        raise Unsupported(f"CuPy gather attention launches at most 2^31 - 1 tiles, not {blocks}; split the batch")
    d = defines(kind, out_kind, D, Dv, config, copy, softcap is not None, shared_kv, latent)
    function = nvrtc.function(_source(kind), "forward", FIELDS, d, place)
    function(blocks, _threads(config, float32), shared_bytes(D, Dv, config, float32, shared_kv), place.stream,
             q.ptr, k.ptr, v.ptr, out.ptr, nvrtc.ptr(lse), nvrtc.ptr(sink_logits), *selected_values(indices, lengths, granularity, causal), *position_values(T, S, kv_length, q_start),
             *q.strides, *k.strides, *v.strides, Hq, Hq // Hk, D, Dv, slices, 0, scale, softcap or 0.0)
    return out, lse
