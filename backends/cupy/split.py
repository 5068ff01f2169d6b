"""Block attention for few queries: heads of a group become rows of one tile, keys are split over the chip, parts are merged (block_attention_decode.cu, split.cuh, merge_split.cu).

A tile holds the queries of one block of the lists times the heads that share their keys, 64 rows at most; more stand in several tiles. Heads with lists of their own are tiles of their own.
The path "latent" (block_attention_latent.cu, sm_90a) does the same for DeepSeek's latent by warpgroup products, 64 heads of a query at a time, of 16 bits or in the fp8 layout;
calls that its copies cannot serve (`takes_latent`) run on the path decode. The grid depends on the chip, not on lengths: every block of threads takes an equal share of all key blocks that the lengths on the device leave.
"""
import math
import struct

from sparsetile.backends.contract import Problem, Resources, Unsupported
from sparsetile.backends.cupy import compile as nvrtc
from sparsetile.backends.cupy import hopper
from sparsetile.backends.cupy.operands import (HALVES, KINDS, LISTS, PAGES, POSITIONS, SCALES, ceil_div, copy_bytes, float8_defines, fp8_defines, is_float8, latent_shape, lists_values,
                                               output_kind, padded, page_defines, position_values, problem_copy_bytes, product_kind, query_tiles, same_memory, scale_values, through_pages)

SPLIT = "3Q4i"  # struct Split
NO_SPLIT = (0,) * 7  # every item is whole
LATENT_FIELDS = "3Q" + LISTS + POSITIONS + SPLIT + "2i2f"
LATENT_HEADS, LATENT_KEYS, LATENT_THREADS, LATENT_TILE = 64, 32, 512, 9 * 32 * 128
# of six tiles, for gather_attention_hopper.cu; this path has five
LATENT_SHARED = 6 * LATENT_TILE + 64 * (128 + 32 + 4 + 4) + 6 * (16 + 4 + 4 * 8) + 8
LATENT_ROW = 512 + 4 * 4 + 2 * 64  # bytes of the fp8 layout
LATENT_FP8_SHARED = 4 * LATENT_TILE + 64 * (3 * 128 + 4 + 4) + 4 * (16 + 4 + 4 * 8) + 2 * (32 * LATENT_ROW + 4 * (8 + 16)) + LATENT_ROW + 8 + 8 + 128  # bytes stand at multiples of 128
FIELDS = "6Q" + LISTS + POSITIONS + SPLIT + "12q8i2f"
MERGE_FIELDS = "3Q" + SPLIT + POSITIONS + "8i"
MOST_STAGES = 8
QUERIES = 32  # of a tile: a lane holds the mask of one


def row_tiles(queries: int, pack: int, columns: int) -> int:
    """16-row tiles of a block of threads: 1, 2 or 4, as many as the sums leave registers for."""
    most = 4 if columns <= 128 else 2
    return next(n for n in (1, 2, 4) if 16 * n >= min(queries * pack, 16 * most))


class Tiles:
    """What the kernel is compiled for, and what it asks of the chip."""

    def __init__(self, D: int, Dv: int, queries: int, pack: int, tile_k: int, shared_kv: bool, limit: int, latent=None, float8=False):
        self.tile_k, self.columns = tile_k, ceil_div(Dv, 64) * 64  # each warp's quarter is a multiple of 16
        self.shared_kv = shared_kv and self.columns <= padded(D) and not float8  # whose values are of another type than its keys
        self.row_tiles = row_tiles(queries, pack, self.columns)
        self.rows, self.threads = 16 * self.row_tiles, 128
        stage = tile_k * (padded(D) + 8 + (0 if self.shared_kv else self.columns + 8)) * 2
        if float8:
            stage = tile_k * (padded(D) + self.columns + 16)
        fixed = self.rows * (padded(D) + 8 + tile_k + 8) * 2 + 4 * (2 * self.rows + 1) * 4 + 8
        room = lambda residents: limit // residents - 1024 * (residents > 1)  # noqa: E731  the chip keeps 1 KiB of each block for itself
        most = MOST_STAGES if latent is None else 2  # the fp8 layout passes through registers: no copy is in flight, another block of threads fills the gaps
        least = 2 * stage if float8 or latent is not None else max(3 * stage, 65536)
        beside = 3 if float8 and self.row_tiles == 1 and self.columns <= 128 else 2  # half the bytes a step wait for as many barriers; wider rows leave no registers for a third block
        self.residents = next(n for n in (beside, 2, 1) if n == 1 or fixed + least <= room(n))
        self.stages = max(2, min(most, (room(self.residents) - fixed) // stage))
        self.shared = fixed + self.stages * stage
        self.more = fp8_defines(latent)

    def defines(self, kind: str, D: int, lists: tuple, copy: int, softcap: bool, pages: dict) -> dict:
        return dict(KIND=KINDS[product_kind(kind)], BQ=lists[0], BK=lists[1], TK=self.tile_k, MT=self.row_tiles, DP=padded(D), DVP=self.columns, STAGES=self.stages, COPY=copy,
                    SHARED_KV=int(self.shared_kv), SOFTCAP=int(softcap), **self.more, **pages)

    def merge_defines(self, kind: str, block_q: int, rows: int) -> dict:
        return dict(KIND=KINDS[kind], BQ=block_q, ROWS=self.rows, COLUMNS=self.columns, LINES=merged_lines(rows))


def tiles_of(problem: Problem, config: dict) -> Tiles:
    pack = 1 if "per_head" in problem.features else problem["Hq"] // problem["Hk"]
    return Tiles(problem["D"], problem["Dv"], min(problem["T"], config["block_q"]), pack, config["tile_k"], "shared_kv" in problem.features, nvrtc.shared_limit(problem.arch), latent_shape(problem), is_float8(problem))


def resources(problem: Problem, config: dict):
    if problem.dtype("q") == "float32":
        return f"path decode takes float16 and bfloat16, not {problem.dtype('q')}; take portable"
    if min(problem["T"], config["block_q"]) > QUERIES:
        return f"path decode takes up to {QUERIES} queries a tile, not {min(problem['T'], config['block_q'])}; take block_q {QUERIES} or path portable"
    if config["tile_k"] > 64:
        return f"path decode takes tile_k 32 and 64, not {config['tile_k']}"
    t = tiles_of(problem, config)
    if t.shared > nvrtc.shared_limit(problem.arch):
        return f"{t.shared} bytes of shared memory, {problem.arch} has {nvrtc.shared_limit(problem.arch)}"
    return Resources(t.threads, t.shared, 168)


def no_latent(problem: Problem) -> str | None:
    """Why the path "latent" is not for this problem."""
    if problem.arch != "sm_90a":
        return f"path latent: {problem.arch} lacks its instructions; take decode"
    if is_float8(problem):
        return "path latent takes latents of 16 bits or in the fp8 layout of a cache, not float8 keys and values; take decode"
    if latent_shape(problem) is not None and "paged" not in problem.features:
        return "path latent reads the fp8 layout of a latent cache behind a page table only; take decode"
    if (problem["D"], problem["Dv"], problem["Hk"]) != (576, 512, 1) or "shared_kv" not in problem.features or "softcap" in problem.features:
        return "path latent takes one key head of width 576 whose first 512 columns are the values, and no softcap; take decode"
    return None


def latent_resources(problem: Problem, config: dict):
    decode = resources(problem, config)  # where a call needs it
    return decode if isinstance(decode, str) else no_latent(problem) or Resources(LATENT_THREADS, latent_shared(latent_shape(problem)), 128)


def latent_shared(latent) -> int:
    return LATENT_SHARED if latent is None else LATENT_FP8_SHARED


def latent_defines(kind: str, lists: tuple, pages: dict, latent) -> dict:
    return dict(KIND=KINDS[kind], BQ=lists[0], BK=lists[1], **pages, **fp8_defines(latent))


def latent_merge_defines(kind: str, rows: int) -> dict:
    return dict(KIND=KINDS[kind], BQ=0, ROWS=LATENT_HEADS, COLUMNS=512, LINES=merged_lines(rows))


def merged_lines(rows: int) -> int:
    """Rows of the output that a block of threads merges: many rows have few parts each."""
    return 8 if rows >= 2048 else 1


def candidates(problem: Problem) -> list[dict]:
    """Configs for up to 32 queries, the best first. Path latent where a key is read for more rows than a tile of mma.sync has, and for one query of 16 heads, where bytes decide:
    2942 GB/s on an H100 against 2894 of decode by 64 keys a step and 2311 by 32, which are for keys that do not fit otherwise (barriers a byte count for more than bytes in flight)."""
    group = problem["Hq"] // problem["Hk"]
    fp8 = latent_shape(problem) is not None
    latent = not is_float8(problem) and (group > 16 or (group, problem["T"]) == (16, 1) or fp8 and problem["T"] < 4)  # it takes queries one by one: more of 16 heads are one tile of decode, which converts fp8 in 3.6 times the time
    steps = (32,) if fp8 else (64, 32)  # of the fp8 layout two blocks of threads have to fit
    return [dict(path=path, block_q=QUERIES, block_k=128, tile_k=tk, row_tiles=1) for path in (["latent"] * latent + ["decode"]) for tk in steps]


def artifacts(problem: Problem, config: dict) -> list[dict]:
    t, kind = tiles_of(problem, config), problem.dtype("q")
    copy, out_kind = problem_copy_bytes(problem, *(("D",) if t.shared_kv else ("D", "Dv"))), output_kind(kind)
    more = page_defines(problem) | float8_defines(kind, problem.dtype("k"), math.gcd(16, problem["D"], problem["Dv"])) | (dict(OUT_KIND=KINDS[out_kind]) if is_float8(problem) else {})
    own = [dict(source="block_attention_latent", defines=latent_defines(kind, (config["block_q"], config["block_k"]), page_defines(problem), latent_shape(problem)), names=["attend_latent"]),
           dict(source="merge_split", defines=latent_merge_defines(kind, problem["B"] * problem["Hq"] * problem["T"]), names=["merge"])] if config["path"] == "latent" else []
    return own + [dict(source="block_attention_decode", defines=t.defines(kind, problem["D"], (config["block_q"], config["block_k"]), copy, "softcap" in problem.features, more), names=["attend"]),
            dict(source="merge_split", defines=t.merge_defines(out_kind, config["block_q"], problem["B"] * problem["Hq"] * problem["T"]), names=["merge"])]


def takes(q, k, lists, config: dict, out_kind: str) -> bool:
    """Whether a call may run on the path "decode", or "latent"."""
    return config["path"] in ("decode", "latent") and lists.q_order is None and lists.k_order is None and (out_kind == q.dtype or k.dtype == "float8_e4m3fn" and out_kind in HALVES) and min(q.shape[2], lists.block_q) <= QUERIES


def takes_latent(q, k, v, lists, config: dict, scale: float, softcap, table, latent) -> bool:
    """What the copy engine and the order of scores ask of a call on the path "latent": of pages, that one holds all keys of a tile; of rows of bytes, that they follow each other."""
    fits = (q.shape[3], v.shape[3], k.shape[1], lists.list_of.shape[1]) == (576, 512, 1, 1) and same_memory(k, v) and softcap is None and 0 < scale <= 2 ** 64 and hopper.can_map(q)
    keys = k.dtype == q.dtype and hopper.can_map(k) if latent is None else table is not None and k.strides[2] == LATENT_ROW and k.ptr % 16 == 0
    return config["path"] == "latent" and fits and keys and (table is None or k.shape[2] % LATENT_KEYS == 0)


def split_values(place, slots: int, rows: int, columns: int, jobs: int, members: int, shares: int) -> tuple:
    """Scratch, and the fields of struct Split."""
    scratch = place.empty((slots * rows * columns,), "float32"), place.empty((slots * rows * 2,), "float32"), place.empty((jobs + 1,), "int32")
    return scratch, (*(x.ptr for x in scratch), jobs, members, shares, 0)


def run_latent(q, k, lists, out, lse, place, scale, sink_logits, kv_length, q_start, table, latent):
    S, k, pages, page = through_pages(table, k)
    (B, Hq, T, D), rows, Dv = q.shape, k.shape[2], out.shape[3]
    parts = ceil_div(Hq, LATENT_HEADS)
    jobs, shares = B * T, max(place.sms // parts, 1)
    if max(jobs * max(lists.nk, parts), B * Hq * T) >= 2 ** 31:
        raise Unsupported(f"CuPy's path latent takes at most 2^31 - 1 key blocks and rows, not {jobs * lists.nk} and {B * Hq * T}; split the batch")
    scratch, split = split_values(place, 2 * shares * parts, LATENT_HEADS, Dv, jobs, 1, shares)
    (qb, qh, qt), (kb, _, kt), at = hopper.steps(q), hopper.steps(k), position_values(T, S, kv_length, q_start)
    tiles = lambda x, n, more, steps: hopper.tensor_map(place, x, (64, n, D // 64, *more), (1, steps[0], 64, *steps[1:]), (64, 32, D // 64, 1, 1))  # noqa: E731
    keys = ("128s", tiles(k, rows, (1, k.shape[0]), (kt, kt, kb))) if latent is None else ("Q", k.ptr)
    fields = "128s" + keys[0] + LATENT_FIELDS + PAGES * bool(page)
    fields += f"{-struct.calcsize(fields) % 64}x"  # the struct is as long as its alignment asks
    attend = nvrtc.function("block_attention_latent", "attend_latent", fields, latent_defines(q.dtype, (lists.block_q, lists.block_k), page, latent), place)
    attend(shares * parts, LATENT_THREADS, latent_shared(latent), place.stream, tiles(q, Hq, (T, B), (qh, qt, qb)), keys[1], out.ptr, nvrtc.ptr(lse), nvrtc.ptr(sink_logits),
           *lists_values(lists), *at, *split, Hq, parts, scale, scale * math.log2(math.e), *pages)
    merge(place, latent_merge_defines(q.dtype, B * Hq * T), Dv, out, lse, sink_logits, split, at, (Hq, Dv, Hq, 1, T, parts, parts))
    return out, lse


def run(q, k, v, lists, out, lse, *, place, config, scale, sink_logits=None, softcap=None, kv_length=None, q_start=None, table=None, latent=None, scales=()):
    if takes_latent(q, k, v, lists, config, scale, softcap, table, latent):
        return run_latent(q, k, lists, out, lse, place, scale, sink_logits, kv_length, q_start, table, latent)
    S, k, v, pages, page = through_pages(table, k, v)
    (B, Hq, T, D), Hk, Dv = q.shape, k.shape[1], v.shape[3]
    heads = Hq if lists.list_of.shape[1] > 1 else 1
    pack = Hq // Hk if heads == 1 else 1
    queries, tiles = min(T, lists.block_q), query_tiles(lists, T, q_start, S, kv_length)
    t = Tiles(D, Dv, queries, pack, config["tile_k"], same_memory(k, v), nvrtc.shared_limit(place.arch), latent, k.dtype == "float8_e4m3fn")
    parts = ceil_div(queries * pack, t.rows)
    jobs, members, shares = B * heads * tiles, parts * (Hk if heads == 1 else 1), max(place.sms, 1) * t.residents
    if max(jobs * lists.nk, B * Hq * T) >= 2 ** 31:
        raise Unsupported(f"CuPy's path decode takes at most 2^31 - 1 key blocks and rows, not {jobs * lists.nk} and {B * Hq * T}; split the batch or take path portable")
    scratch, split = split_values(place, 2 * shares, t.rows, t.columns, jobs, members, shares)
    float8 = k.dtype == "float8_e4m3fn"
    copy = copy_bytes(q) if float8 else copy_bytes(q, k) if t.shared_kv else copy_bytes(q, k, v)
    more = page | (float8_defines(q.dtype, k.dtype, copy_bytes(k, v)) | dict(OUT_KIND=KINDS[out.dtype]) if float8 else {})
    at = position_values(T, S, kv_length, q_start)
    attend = nvrtc.function("block_attention_decode", "attend", PAGES * bool(page) + FIELDS + SCALES * float8, t.defines(q.dtype, D, (lists.block_q, lists.block_k), copy, softcap is not None, more), place)
    attend(shares, t.threads, t.shared, place.stream, *pages, q.ptr, k.ptr, v.ptr, out.ptr, nvrtc.ptr(lse), nvrtc.ptr(sink_logits), *lists_values(lists), *at, *split,
           *q.strides, *k.strides, *v.strides, Hq, Hq // Hk, pack, heads, tiles, parts, D, Dv, scale, softcap or 0.0, *scale_values(k, scales))
    merge(place, t.merge_defines(out.dtype, lists.block_q, B * Hq * T), t.columns, out, lse, sink_logits, split, at, (Hq, Dv, pack, heads, tiles, parts, 1))
    return out, lse


def merge(place, defines: dict, columns: int, out, lse, sink_logits, split: tuple, at: tuple, sizes: tuple):
    B, Hq, T, _ = out.shape
    function = nvrtc.function("merge_split", "merge", MERGE_FIELDS, defines, place)
    groups, shares, lines = 256 // (columns // 4), split[5], defines["LINES"]
    shared = groups * (columns * 4 + 4) + 32 + 8 + 8 * shares if lines == 1 else 0
    function(ceil_div(B * Hq * T, lines), 256, shared, place.stream, out.ptr, nvrtc.ptr(lse), nvrtc.ptr(sink_logits), *split, *at, *sizes, B * Hq * T)
