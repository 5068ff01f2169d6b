"""Attention over block lists: q [B,Hq,T,D], k [B,Hk,S,D], v [B,Hk,S,Dv], lists (contract.Lists) -> out [B,Hq,T,Dv], lse [B,Hq,T].

With table [B,pages] int32 keys and values are [N,Hk,page,D] and [N,Hk,page,Dv], rows of all pages one step apart (pages.cuh); keys in a page that is not one of 0 .. N - 1
do not exist. latent (R, P): rows of k are bytes, the fp8 layout of a latent cache (latents.cuh), whose first R columns are the values. The paths portable and decode read
both where they lie, and so does latent where a page holds whole tiles of 32 keys.

A row that sees no key: out 0, lse -inf. The sink stands in the denominator only. Keys at or past kv_length (clamped to 0..S) do not exist; what no row of
a tile sees is never read into a product. Tiles stand at absolute positions, so q_start and kv_length may change under a replayed graph.

float16 and bfloat16 run on tensor cores (block_attention.cu), float32 by fused multiply-adds (block_attention_float32.cu): no TF32. The path "hopper"
(block_attention_hopper.cu) is for sm_90a and blocks of 128; calls that it does not know (softcap, orders, scales that are not positive, outputs of another type,
arrays that the copy engine cannot address) take the portable one with the same blocks. It reads float8 keys and values too: a warpgroup of its own converts them, exactly, beside
those that multiply (block_float8_hopper.cuh); not in orders, and not for outputs of 32 bits. The paths "decode" and "latent" (split.py) are for few queries: heads of a group are
rows of one tile, keys are split over the chip; calls with orders take the portable one.
"""
import math
import struct

from sparsetile.backends.contract import Problem, Resources, Tunable, Unsupported
from sparsetile.backends.cupy import compile as nvrtc
from sparsetile.backends.cupy import hopper, hopper_parts, split
from sparsetile.backends.cupy.hopper_axes import Axes, axes_of, in_classes
from sparsetile.backends.cupy.operands import (HALVES, KINDS, LISTS, PAGES, POSITIONS, SCALES, ceil_div, copy_bytes, first_fitting, float8_defines, fp8_defines, is_float8, latent_shape,
                                               lists_values, output_kind, padded, page_defines, position_values, problem_copy_bytes, product_kind, query_tiles, scale_values, sliced, through_pages)

TUNABLES = (
    Tunable("path", ("portable", "hopper", "decode", "latent"), "hopper: warpgroup products fed by the copy engine; 16-bit types and float8 keys, blocks of 128, D up to 192, Dv up to 128. "
            "decode: up to 32 queries a tile, with the heads of a group as its rows, and keys split over the chip; 16-bit types. latent: the same for D 576 whose first 512 columns are the values, on sm_90a"),
    Tunable("block_q", (64, 32, 128, 192), "rows of a tile: queries of one head"),
    Tunable("block_k", (64, 128, 32), "keys of a block of the lists"),
    Tunable("tile_k", (32, 64, 128), "keys a step, divides block_k"),
    Tunable("row_tiles", (1, 2), "16-row tiles a warp holds: 2 halves what is read from shared memory, and doubles the registers"),
)
FIELDS = "6Q" + LISTS + POSITIONS + "12q6i2f"
LOG2E = 1.4426950408889634
CACHED = 32 << 20  # bytes of keys and values whose heads are in flight together: they share the second-level cache
HOPPER_FIELDS, FLOAT8_HOPPER_FIELDS = (f"{x}{-struct.calcsize(x) % 64}x" for x in ("128s" * 4 + "8Q" + LISTS + POSITIONS + "12i2f" + more for more in ("", SCALES)))  # the struct is as long as its alignment asks


def supports(problem: Problem) -> str | None:
    kinds = {problem.dtype(name) for name in "qkv"} - {"latent_fp8"}
    if is_float8(problem):
        if kinds - {"float8_e4m3fn", *HALVES} or problem.dtype("v") != "float8_e4m3fn" or "paged" in problem.features:
            return f"CuPy reads float8 keys and values both, in one piece, for queries of float8_e4m3fn, float16 and bfloat16, not {'/'.join(str(problem.dtype(n)) for n in 'qkv')}{' behind a page table' * ('paged' in problem.features)}; cast or gather them"
        kinds = set()
    if latent_shape(problem) is not None and problem.dtype("q") not in HALVES:
        return f"CuPy reads the fp8 layout of a latent cache for queries of float16 and bfloat16, not {problem.dtype('q')}; pass cache.gather()"
    if len(kinds) > 1 or not kinds <= {"float32", *HALVES}:
        return f"CuPy block attention takes q, k, v of one type, float32, float16 or bfloat16, not {'/'.join(str(problem.dtype(n)) for n in 'qkv')}; cast them to bfloat16"
    if max(problem["D"], problem["Dv"]) > 576:
        return f"CuPy block attention takes D and Dv up to 576, not {problem['D']} and {problem['Dv']}"
    if isinstance(resources(problem, default_config(problem)), str):
        return f"CuPy block attention of D {problem['D']} needs more shared memory than {problem.arch} has; float16 and bfloat16 up to D 576 fit from 99 KiB"
    return None


def shared_bytes(D: int, Dv: int, config: dict, float32: bool) -> int:
    bq, tk = config["block_q"], config["tile_k"]
    words = (2 * bq + 2) * (tk // 32) * 4 + bq * 4
    if float32:
        return (bq * (padded(D) + 1) + tk * 65 + bq * (tk + 1)) * 4 + words
    return (bq + tk) * (padded(D) + 8) * 2 + tk * (sliced(Dv)[1] + 8) * 2 + words


def no_hopper(problem: Problem) -> str | None:
    """Why the path "hopper" is not for this problem."""
    if "paged" in problem.features:
        return "path hopper reads keys in one piece, not through a page table; take portable"
    if problem.arch != "sm_90a":
        return f"path hopper: {problem.arch} lacks its instructions; take portable"
    float8 = is_float8(problem)
    if problem.dtype("q") not in (*HALVES, *["float8_e4m3fn"] * float8) or problem["D"] > 192 or problem["Dv"] > 128 or problem["D"] % 8 or problem["Dv"] % 8:
        return f"path hopper takes float16 and bfloat16 with D up to 192 and Dv up to 128, multiples of 8, not {problem.dtype('q')}, {problem['D']}, {problem['Dv']}; take portable"
    if float8 and (problem["D"] % 16 or problem["Dv"] % 16):
        return f"path hopper: the copy engine takes rows of float8 whose bytes are a multiple of 16, not {problem['D']} and {problem['Dv']}; take portable"
    if float8 and (in_classes(problem) or problem.dtype("out", output_kind(problem.dtype("q"))) not in HALVES):
        return "path hopper takes float8 keys in their own order, and gives outputs of 16 bits; take portable"
    return None


def hopper_bytes(D: int, Dv: int, block_q: int, stages: int, tiles: int) -> int:
    """Stages of keys and of values, query tiles, barriers and items; a row of 64 columns takes 128 bytes."""
    keys, values = ceil_div(D, 64), ceil_div(Dv, 64)
    return 1024 + 128 * (128 * stages * (keys + values) + tiles * block_q * max(keys, values)) + 40 * stages + 128


def hopper_depth(D: int, Dv: int, block_q: int) -> tuple[int, int]:
    """(stages, query tiles). Two tiles where they fit: the next item's is loaded while this one runs."""
    stages = 4 if max(D, Dv) <= 64 else 2
    return stages, 2 if hopper_bytes(D, Dv, block_q, stages, 2) <= nvrtc.shared_limit("sm_90a") else 1


BOX = 128 * 128  # bytes of float8 that the copy engine brings at once


def float8_bytes(D: int, Dv: int, stages: int, tiles: int, slots: int) -> int:
    """The same, and boxes of float8 with their barriers, and scales of the stages."""
    return hopper_bytes(D, Dv, 128, stages, tiles) + slots * (BOX + 16) + 16 * stages


def float8_depth(D: int, Dv: int) -> tuple[int, int, int]:
    """(stages, query tiles, boxes). Two boxes are enough to have one on its way while one is converted; a second query tile saves the wait for each item's queries."""
    stages = 4 if max(D, Dv) <= 64 else 2
    fits = [(tiles, slots) for tiles in (2, 1) for slots in (4, 3, 2, 1) if float8_bytes(D, Dv, stages, tiles, slots) <= nvrtc.shared_limit("sm_90a")]
    return stages, *next((x for x in fits if x[1] > 1), fits[0])


def float8_hopper_defines(kind: str, out_kind: str, D: int, Dv: int) -> dict:
    stages, tiles, slots = float8_depth(D, Dv)
    return dict(KIND=KINDS[product_kind(kind)], OUT_KIND=KINDS[out_kind], WIDTH=padded(D), VALUES=64 if Dv <= 64 else 128, ROWS=128, STAGES=stages, TILES=tiles, PARTED=0,
                FLOAT8=2 if kind == "float8_e4m3fn" else 1, SLOTS=slots)


def hopper_defines(kind: str, D: int, Dv: int, block_q: int, parted: bool = False) -> dict:
    stages, tiles = hopper_depth(D, Dv, block_q)
    return dict(KIND=KINDS[kind], WIDTH=padded(D), VALUES=64 if Dv <= 64 else 128, ROWS=block_q, STAGES=stages, TILES=tiles, PARTED=int(parted))


def resources(problem: Problem, config: dict):
    bq, bk, tk, mt = config["block_q"], config["block_k"], config["tile_k"], config["row_tiles"]
    if config["path"] == "hopper":
        if bk != 128 or bq not in (128, 192):
            return f"path hopper takes blocks of 128 or 192 x 128, not {bq} x {bk}"
        if bq == 192 and is_float8(problem):
            return "path hopper takes 128 queries a tile of float8 keys: a warpgroup converts beside those that multiply"
        if bq == 192 and max(problem["D"], problem["Dv"]) > 64:
            return f"path hopper takes 192 queries a tile up to D and Dv 64, not {problem['D']} and {problem['Dv']}: three groups leave 160 registers a thread"
        portable = resources(problem, {**config, "path": "portable"})  # where a call needs it
        if no_hopper(problem) or isinstance(portable, str):
            return no_hopper(problem) or portable
        if is_float8(problem):
            return Resources(512, float8_bytes(problem["D"], problem["Dv"], *float8_depth(problem["D"], problem["Dv"])), 128)
        return Resources(bq * 2 + 128, hopper_bytes(problem["D"], problem["Dv"], bq, *hopper_depth(problem["D"], problem["Dv"], bq)), 65536 // (bq * 2 + 128))
    if config["path"] in ("decode", "latent"):
        portable = resources(problem, {**config, "path": "portable"})
        return portable if isinstance(portable, str) else split.resources(problem, config) if config["path"] == "decode" else split.latent_resources(problem, config)
    float32 = problem.dtype("q") == "float32"
    if bq % 32 or bk % tk:
        return f"block_q is a multiple of 32 and block_k of tile_k {tk}, not {bq} and {bk}"
    if float32 and (mt > 1 or tk != 32):
        return "row_tiles and tile_k are for tensor cores; float32 takes 1 and 32"
    wide = sliced(problem["Dv"])[1]
    registers = mt * (wide // 2 + tk // 2) + (min(padded(problem["D"]), 128) // 4 if mt * padded(problem["D"]) <= 128 else 8 * mt) + 48
    if not float32 and registers > 255:
        return f"row_tiles {mt} and tile_k {tk} with {wide} value columns need about {registers} registers a thread, 255 are there"
    shared = shared_bytes(problem["D"], problem["Dv"], config, float32)
    if shared > nvrtc.shared_limit(problem.arch):
        return f"{shared} bytes of shared memory, {problem.arch} has {nvrtc.shared_limit(problem.arch)}"
    return Resources(threads=_threads(config, float32), shared=shared, registers=registers)


def _threads(config: dict, float32: bool) -> int:
    return 4 * config["block_q"] if float32 else config["block_q"] // config["row_tiles"] * 2


def default_config(problem: Problem) -> dict:
    D, T = problem["D"], problem["T"]
    rows = 32 if T <= 32 else 64 if T <= 64 else 128
    if rows == 128 and no_hopper(problem) is None and "softcap" not in problem.features:
        bq = 192 if max(D, problem["Dv"]) <= 64 and T >= 1024 and not in_classes(problem) and not is_float8(problem) else 128  # three groups of 64 rows fill each other's gaps: 483 against 444 TFLOP/s on an H100, causal 16k; classes seldom fill 192 rows: of stride 128 at 16k half as much work again
        return first_fitting(problem, resources, [dict(path="hopper", block_q=bq, block_k=128, tile_k=tk, row_tiles=1) for tk in (64, 32)])
    if rows == 32 and problem.dtype("q") != "float32" and (problem["S"] > 128 or "paged" in problem.features):  # one block of keys has nothing to split, and is one launch
        few = first_fitting(problem, resources, split.candidates(problem))
        if not isinstance(resources(problem, few), str):
            return few
    if problem.dtype("q") == "float32":
        tries = [(min(rows, 64), 64, 32), (32, 64, 32)]
    elif D <= 128:
        tries = [(rows, 128, 128)] * is_float8(problem) + [(rows, 128, 64), (min(rows, 64), 64, 32)]
    else:
        tries = [(min(rows, 64), 64, 32 if D > 256 else 64), (min(rows, 64), 64, 32), (32, 64, 32)]
    return first_fitting(problem, resources, [dict(path="portable", block_q=q, block_k=k, tile_k=tk, row_tiles=1) for q, k, tk in tries])


def defines(kind: str, out_kind: str, D: int, Dv: int, config: dict, copy: int, softcap: bool, q_order: bool, k_order: bool, more: dict) -> dict:
    common = dict(OUT_KIND=KINDS[out_kind], BQ=config["block_q"], BK=config["block_k"], TK=config["tile_k"], DP=padded(D), SOFTCAP=int(softcap), Q_ORDER=int(q_order), K_ORDER=int(k_order), **more)
    if kind == "float32":
        return dict(common, DVP=sliced(Dv)[1], COPY=4)
    return dict(common, KIND=KINDS[product_kind(kind)], MT=config["row_tiles"], DVP=sliced(Dv)[1], COPY=copy)


def artifacts(problem: Problem, config: dict) -> list[dict]:
    kind, order = problem.dtype("q"), "order" in problem.features
    d = defines(kind, problem.dtype("out", output_kind(kind)), problem["D"], problem["Dv"], config, problem_copy_bytes(problem, "D", "Dv"), "softcap" in problem.features, order, order, page_defines(problem) | fp8_defines(latent_shape(problem)) | float8_defines(kind, problem.dtype("k"), math.gcd(16, problem["D"], problem["Dv"])))
    portable = [dict(source="block_attention_float32" if kind == "float32" else "block_attention", defines=d, names=["forward"])]
    if config["path"] in ("decode", "latent"):
        return split.artifacts(problem, config) + portable
    if is_float8(problem) and config["path"] == "hopper":
        return [dict(source="block_attention_hopper", defines=float8_hopper_defines(kind, problem.dtype("out", output_kind(kind)), problem["D"], problem["Dv"]), names=["forward"]), *portable]
    own = [dict(source="block_attention_hopper", defines=hopper_defines(kind, problem["D"], problem["Dv"], config["block_q"], parted), names=["forward"])
           for parted in ((False, True) if order else (False,))]
    if order and config["block_q"] == hopper_parts.ROWS:
        own += [dict(source="block_attention_parts_hopper", defines=hopper_parts.defines(kind, problem["D"], problem["Dv"], *hopper_depth(problem["D"], problem["Dv"], 128), n), names=["forward"]) for n in (1, 2, 3)]
    return own + portable if config["path"] == "hopper" else portable


def takes_hopper(q, k, v, config, scale, softcap, out_kind, table) -> bool:
    if k.dtype == "float8_e4m3fn":  # scale: with that of a key between 2^-26 and 2^26 it stays a number that float32 holds
        return config["path"] == "hopper" and config["block_q"] == 128 and softcap is None and 1e-30 < scale < 1e30 and out_kind in HALVES and v.shape[3] % 8 == 0 and all(map(hopper.can_map, (q, k, v)))
    return config["path"] == "hopper" and table is None and k.dtype == q.dtype and softcap is None and 1e-30 < scale < 1e38 and out_kind == q.dtype and v.shape[3] % 8 == 0 and all(map(hopper.can_map, (q, k, v)))


def longest_first(lists, place):
    """[L, nq] tiles of each list, longest first, and how many are far longer than the rest; made once and kept. Lists from the device: None, 0."""
    found = lists.extras.get("cupy.longest_first")
    if found is None:
        offsets = lists.extras.get("offsets")
        if offsets is None or not lists.nq:
            return None, 0
        length = (offsets[2::2] - offsets[:-2:2]).reshape(-1, lists.nq)
        found = lists.extras["cupy.longest_first"] = place.upload((-length).argsort(axis=1, kind="stable").astype("int32")), lists.far_longer("offsets")[0]
    return found


def run_hopper(q, k, v, lists, out, lse, tiles, place, scale, sink_logits, kv_length, q_start, axes=None, before=(None, None), partial=None, scales=()):
    """axes: how the rows and keys of a part of several stand (hopper_axes.Axes); before: out and lse of the parts before; partial: float32 for the next part, instead of out."""
    (B, Hq, T, D), (Hk, S), Dv, bq = q.shape, k.shape[1:3], v.shape[3], lists.block_q
    at = axes or Axes()
    maps = at.rows(place, q, bq), at.keys(place, k), at.keys(place, v), hopper.tensor_map(place, out, (Dv, T, B * Hq), (1, Dv, T * Dv), (64, 64, 1))
    start = S - T if q_start is None and kv_length is None else q_start
    covered = axes is not None or isinstance(start, int) and start // bq == lists.first and tiles == lists.nq
    order, far = longest_first(lists, place) if covered else (None, 0)
    section = max(1, CACHED // max(1, 2 * S * (D + Dv))) * (Hq // Hk)
    items = B * Hq * tiles
    ticket = place.zeros((1,), "int32") if items > place.sms else None
    if k.dtype == "float8_e4m3fn":
        fields, d, threads, shared = FLOAT8_HOPPER_FIELDS, float8_hopper_defines(q.dtype, out.dtype, D, Dv), 512, float8_bytes(D, Dv, *float8_depth(D, Dv))
    else:
        fields, d, threads, shared = HOPPER_FIELDS, hopper_defines(q.dtype, D, Dv, bq, axes is not None), 2 * bq + 128, hopper_bytes(D, Dv, bq, *hopper_depth(D, Dv, bq))
    function = nvrtc.function("block_attention_hopper", "forward", fields, d, place)
    function(min(items, max(place.sms, 1)), threads, shared, place.stream, *maps, out.ptr, nvrtc.ptr(lse), nvrtc.ptr(sink_logits),
             *map(nvrtc.ptr, before), nvrtc.ptr(partial), nvrtc.ptr(ticket), nvrtc.ptr(order), *lists_values(lists), *position_values(T, S, kv_length, q_start),
             at.row_step, at.key_step, at.key_run, int(at.whole and kv_length is None), B * Hq, Hq, Hq // Hk, Dv, tiles, far, min(section, B * Hq), items, scale, scale * LOG2E, *scale_values(k, scales))
    return out, lse


def run_parts(q, k, v, parts, *, place, config, scale, sink_logits=None, softcap=None, kv_length=None, q_start=None, return_lse=True, table=None, latent=None):
    """(out, lse) of a layout's parts, each starting from the sums of the one before, or None where that is not possible: then they are run apart and merged.
    A tile without entries would forget what came before it."""
    if not takes_hopper(q, k, v, config, scale, softcap, q.dtype, table):
        return None
    (B, Hq, T, _), S, Dv = q.shape, k.shape[2], v.shape[3]
    start = S - T if q_start is None and kv_length is None else q_start
    axes = [axes_of(part, start, T, S) for part in parts]
    if None in axes or not all(at.complete for at in axes[:-1]) or any(B * Hq * part.nq >= 2 ** 31 - place.sms for part in parts):
        return None
    plan = hopper_parts.plan_of(parts, axes, T, S, start, place) if kv_length is None and config["block_q"] == hopper_parts.ROWS else None
    if plan is None and any(at.ragged_rows or at.ragged_keys for at in axes):
        return None
    out = place.empty((B, Hq, T, Dv), q.dtype)
    lse = place.empty((B, Hq, T), "float32") if return_lse or len(parts) > 1 else None
    if plan is not None:
        hopper_parts.run(q, k, v, plan, axes, out, lse, place=place, scale=scale, sink_logits=sink_logits, depth=hopper_depth(q.shape[3], Dv, hopper_parts.ROWS))
        return out, lse
    partial = place.empty((B, Hq, T, Dv), "float32") if len(parts) > 1 else None
    before = None, None
    for n in reversed(range(len(parts))):  # the plain part comes last: its rows leave through the copy engine
        last = n == 0
        run_hopper(q, k, v, axes[n].applied(parts[n]), out, lse, parts[n].nq, place, scale, sink_logits if last else None, kv_length, start, axes[n], before, None if last else partial)
        before = partial, lse
    return out, lse


def run(q, k, v, lists, *, place, config, scale, sink_logits=None, softcap=None, kv_length=None, q_start=None, out_dtype=None, return_lse=True, table=None, latent=None,
        q_scale=None, k_scale=None, v_scale=None):
    (B, Hq, T, D), Hk, Dv = q.shape, k.shape[1], v.shape[3]
    S = k.shape[2] * (1 if table is None else table.shape[1])
    kind, out_kind, scales = q.dtype, out_dtype or output_kind(q.dtype), (q_scale, k_scale, v_scale)
    out = place.empty((B, Hq, T, Dv), out_kind)
    lse = place.empty((B, Hq, T), "float32") if return_lse else None
    tiles = query_tiles(lists, T, q_start, S, kv_length)
    if B * Hq * tiles == 0:
        return out, lse
    if lists.q_order is not None or lists.k_order is not None:
        found = run_parts(q, k, v, (lists,), place=place, config=config, scale=scale, sink_logits=sink_logits, softcap=softcap, kv_length=kv_length, q_start=q_start,
                          return_lse=return_lse, table=table) if out_kind == kind == k.dtype else None
        if found is not None:
            return found
    elif takes_hopper(q, k, v, config, scale, softcap, out_kind, table) and B * Hq * tiles < 2 ** 31 - place.sms:
        return run_hopper(q, k, v, lists, out, lse, tiles, place, scale, sink_logits, kv_length, q_start, scales=scales)
    if split.takes(q, k, lists, config, out_kind):
        return split.run(q, k, v, lists, out, lse, place=place, config=config, scale=scale, sink_logits=sink_logits, softcap=softcap, kv_length=kv_length, q_start=q_start,
                         table=table, latent=latent, scales=scales)
    _, k, v, pages, page = through_pages(table, k, v)
    float32 = kind == "float32"
    slices = sliced(Dv)[0]
    d = defines(kind, out_kind, D, Dv, config, copy_bytes(q) if k.dtype == "float8_e4m3fn" else copy_bytes(q, k, v), softcap is not None, lists.q_order is not None, lists.k_order is not None,
                page | fp8_defines(latent) | float8_defines(kind, k.dtype, copy_bytes(k, v)))
    source = "block_attention_float32" if float32 else "block_attention"
    function = nvrtc.function(source, "forward", PAGES * bool(page) + FIELDS + SCALES * (k.dtype == "float8_e4m3fn"), d, place)
    if B * Hq * tiles * slices >= 2 ** 31:
        raise Unsupported(f"CuPy block attention launches at most 2^31 - 1 tiles, not {B * Hq * tiles * slices}; split the batch")
    function(B * Hq * tiles * slices, _threads(config, float32), shared_bytes(D, Dv, config, float32), place.stream, *pages,
             q.ptr, k.ptr, v.ptr, out.ptr, nvrtc.ptr(lse), nvrtc.ptr(sink_logits), *lists_values(lists), *position_values(T, S, kv_length, q_start),
             *q.strides, *k.strides, *v.strides, Hq, Hq // Hk, D, Dv, tiles, slices, scale, softcap or 0.0, *scale_values(k, scales))
    return out, lse
