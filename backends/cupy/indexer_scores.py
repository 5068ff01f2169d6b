"""Scores of a lightning indexer, on tensor cores (float16, bfloat16, e4m3 as float16) or by fused multiply-adds (float32).

    q [B,H,T,D]  k [B,S,D]  weights [B,H,T] float32  k_scale [B,S] float32  key_start, key_end [B,T] int32  ->  scores [B,T,S] float32

score[t,s] = k_scale[s] * sum_h weights[h,t] * relu(q[h,t] . k[s]); exactly -inf outside [key_start, key_end) and, if causal, past q_start + t.
With table [B,pages] int32, k [N,page,D] and k_scale [N,page] are pages, read where they lie; keys in a page that is not one of 0 .. N - 1 score -inf.
On sm_90a e4m3 with 64 heads of width 128 (DeepSeek's) takes Hopper's own instructions (indexer_scores_hopper.cu), of pages those that fit its tiles: which one runs is decided by the arrays, not by
a knob, because their sums differ in the last bits. `launch` writes any rows of [B * T] into any float32 memory: indexer_topk selects from there, so both see the same bits. The knobs below move tiles, never sums.
"""
import struct
from functools import lru_cache

from sparsetile.backends.contract import Resources, Tunable
from sparsetile.backends.cupy import compile as nvrtc
from sparsetile.backends.cupy import hopper
from sparsetile.backends.cupy.operands import KINDS, PAGES, ceil_div, copy_bytes, padded, page_defines, pages_of

TUNABLES = (
    Tunable("warps", (1, 4, 2, 8), "warps of a block; each holds row_tiles x 16 keys"),
    Tunable("row_tiles", (1, 2), "16-key tiles of a warp: 2 halves what is read from shared memory, and doubles the registers"),
    Tunable("queries", (1, 2, 4, 8), "queries of a block, with all their heads"),
)
FIELDS = "8Q" + "11q" + "7i4i" + "f"


HOPPER_FIELDS = "128s128s" + "6Q6q" + "12i"
HOPPER_THREADS = 384


def supports(problem):
    if problem["D"] > 576:
        return f"CuPy indexer takes D up to 576, not {problem['D']}"
    kinds = {problem.dtype("q"), problem.dtype("k", problem.dtype("q"))}
    if len(kinds) > 1 or not kinds <= KINDS.keys():
        return f"CuPy indexer takes q and k of one type, float32, float16, bfloat16 or float8_e4m3fn, not {'/'.join(sorted(map(str, kinds)))}; cast both to bfloat16"
    fits = resources(problem, default_config(problem))
    return fits if isinstance(fits, str) else None


def head_columns(H: int) -> int:
    """Columns a query takes: its heads, padded so that whole queries or whole groups of 8 heads fill 8 columns."""
    return ceil_div(H, 8) * 8 if H > 8 else 8 if H > 4 else 4 if H > 2 else H


def row_bytes(D: int, kind: str) -> int:
    return (padded(D) + 4) * 4 if kind == "float32" else (padded(D) + 8) * 2


def column_chunk(H: int, D: int, kind: str, config: dict, limit: int) -> int:
    """(query, head) pairs in shared memory at a time: all of a block's if they fit, else what fits; a multiple of 16 (32 from there on), 0 if nothing does."""
    wanted = ceil_div(config["queries"] * head_columns(H), 16) * 16
    wanted = wanted if wanted <= 16 else ceil_div(wanted, 32) * 32
    keys = 16 * config["row_tiles"] * config["warps"] * row_bytes(D, kind)
    small = 4 * (wanted + 256) + 8 * config["queries"]
    room = (limit - keys - small) // row_bytes(D, kind)
    if room >= wanted:
        return wanted
    if room < 32:
        return 16 if room >= 16 else 0
    pieces = ceil_div(wanted, room // 32 * 32)
    return ceil_div(wanted, 32 * pieces) * 32


def shared_bytes(H: int, D: int, kind: str, config: dict, columns: int) -> int:
    pairs = ceil_div(config["queries"] * head_columns(H), columns) * columns
    return (16 * config["row_tiles"] * config["warps"] + columns) * row_bytes(D, kind) + 4 * pairs + 8 * config["queries"]


def resources(problem, config):
    H, D, kind = problem["H"], problem["D"], problem.dtype("q")
    columns = column_chunk(H, D, kind, config, nvrtc.shared_limit(problem.arch))
    if not columns:
        return f"{16 * config['row_tiles'] * config['warps']} keys of width {D} leave no shared memory for 16 heads on {problem.arch}; take fewer warps"
    resident = kind != "float32" and padded(D) * config["row_tiles"] <= 256
    registers = 60 + config["row_tiles"] * 20 + (padded(D) // 4 * config["row_tiles"] if resident else 24)
    return Resources(32 * config["warps"], shared_bytes(H, D, kind, config, columns), registers)


def default_config(problem):
    H, T, D, kind = problem["H"], problem["T"], problem["D"], problem.dtype("q")
    queries = 1
    while queries < 8 and queries < T and 2 * queries * head_columns(H) <= 128:
        queries *= 2
    wide = D > 128 or kind == "float32"
    config = dict(warps=4, row_tiles=1 if wide else 2, queries=queries)
    while config["warps"] > 1 and not column_chunk(H, D, kind, config, nvrtc.shared_limit(problem.arch)):
        config["warps"] //= 2
    return config


def defines(kind, H, D, activation, copy, config, arch, pages) -> dict:
    return dict(KIND=KINDS[kind], HEADS=H, WIDTH=D, COPY=copy, WARPS=config["warps"], ROW_TILES=config["row_tiles"], QUERIES=config["queries"],
                COLUMNS=column_chunk(H, D, kind, config, nvrtc.shared_limit(arch)), RELU=int(activation == "relu"), SHARE=int(activation == "share"), **pages)


def hopper_problem(kind: str, H: int, D: int, arch: str) -> bool:
    return arch == "sm_90a" and (kind, H, D) == ("float8_e4m3fn", 64, 128)


def takes_hopper(q, k, place, table=None) -> bool:
    return hopper_problem(q.dtype, q.shape[1], q.shape[3], place.arch) and hopper.can_map(q) and hopper.can_map(k) and (table is None or fits_tiles(k.shape[1]))


def fits_tiles(page: int) -> bool:
    """Whether copies of whole pages, or of equal parts of one, fill tiles of 128 keys."""
    return page % 128 == 0 or page >= 8 and 128 % page == 0


def hopper_defines(activation, queries: int, page: dict, scales: bool) -> dict:
    """One query alone takes a quarter of the products of four, and waits for memory: more of it is on its way."""
    return dict(RELU=int(activation == "relu"), SCALES=int(scales), **(dict(STAGES=12, QUERIES=1) if queries == 1 else dict(STAGES=6, QUERIES=4)), **page)


def copied_scales(k_scale, S: int, page: dict) -> bool:
    """Whether the copy engine can bring scales: neighbours, at multiples of 16 bytes."""
    return k_scale is not None and k_scale.ptr % 16 == 0 and k_scale.strides[1] == 1 and k_scale.strides[0] % 4 == 0 and (bool(page) or S % 4 == 0)


def hopper_shared(d: dict) -> int:
    return 1024 + d["QUERIES"] * 64 * 128 + d["STAGES"] * (128 * 128 + 128 * 4 + 4 + 16) + 16


def artifacts(problem, config, activation="relu"):
    kind, D = problem.dtype("q"), problem["D"]
    size = {"float32": 4, "float8_e4m3fn": 1}.get(kind, 2)
    copy = next(c for c in (16, 8, 4, size) if D * size % c == 0 and c >= size)
    portable = [dict(source="indexer_scores", defines=defines(kind, problem["H"], D, activation, copy, config, problem.arch, page_defines(problem)), names=["indexer_scores"])]
    own = [dict(source="indexer_scores_hopper", defines=hopper_defines("relu", problem["T"], page_defines(problem), "scale" in problem.features), names=["indexer_scores_hopper"])]
    return portable + own if hopper_problem(kind, problem["H"], D, problem.arch) else portable


def launch(q, k, weights, *, place, config, k_scale, bounds, activation, rows, out, out_row, enough=-1, fill=True, factor=0.0, table=None):
    """Scores (activation "share": sums over heads of exp(q.k * scale - weight), factor = scale * log2(e)) of rows = (b0, batches, t0, queries) into float32 memory at `out`, rows `out_row` elements apart. bounds: (key_start, key_end, q_starts, q_start, causal)."""
    S, pages, page = pages_of(table, k)
    (B, H, T, D), (b0, nb, t0, nt) = q.shape, rows
    start, end, q_starts, q_start, causal = bounds
    if takes_hopper(q, k, place, table):
        return launch_hopper(q, k, weights, place, k_scale, bounds, activation, rows, out, out_row, enough, fill, table)
    d = defines(q.dtype, H, D, activation, copy_bytes(q, k), config, place.arch, page)
    function = nvrtc.function("indexer_scores", "indexer_scores", PAGES * bool(page) + FIELDS, d, place)
    tiles, groups = ceil_div(S, 16 * config["row_tiles"] * config["warps"]), ceil_div(nt, config["queries"]) * nb
    per = max(1, min(ceil_div(tiles * groups, 24 * max(place.sms, 1)), tiles), ceil_div(tiles * groups, 2 ** 31 - 1))  # several blocks for each multiprocessor, each with many tiles
    scale_b, scale_s = k_scale.strides if k_scale is not None else (0, 0)
    function(groups * ceil_div(tiles, per), 32 * config["warps"], shared_bytes(H, D, q.dtype, config, d["COLUMNS"]), place.stream, *pages,
             q.ptr, k.ptr, weights.ptr, nvrtc.ptr(k_scale), nvrtc.ptr(start), nvrtc.ptr(end), nvrtc.ptr(q_starts), out,
             *q.strides[:3], *k.strides[:2], *weights.strides, scale_b, scale_s, out_row, T, S, b0, nb, t0, nt, per, q_start, int(causal), enough, int(fill), factor)


@lru_cache(1024)
def split(groups: int, tiles: int, sms: int) -> int:
    """Key tiles of one item, so that `sms` persistent blocks end together; starting an item costs about four tiles."""
    best = min(range(1, min(tiles, 64) + 1), key=lambda n: ceil_div(groups * n, sms) * (ceil_div(tiles, n) + 4))
    return ceil_div(tiles, best)


def launch_hopper(q, k, weights, place, k_scale, bounds, activation, rows, out, out_row, enough, fill, table):
    (B, H, T, D), (S, pages, page) = q.shape, pages_of(table, k)
    b0, nb, t0, nt = rows
    start, end, q_starts, q_start, causal = bounds
    (qb, qh, qt), (kb, ks), d = hopper.steps(q), hopper.steps(k), hopper_defines(activation, nt, page, copied_scales(k_scale, S, page))
    maps = (hopper.tensor_map(place, q, (D, H, T, B), (1, qh, qt, qb), (D, H, d["QUERIES"], 1)),
            hopper.tensor_map(place, k, (D, k.shape[1], k.shape[0]), (1, ks, kb), (D, min(page.get("PAGE", 128), 128), 1)))
    groups, tiles, sms = ceil_div(nt, d["QUERIES"]) * nb, ceil_div(S, 128), max(place.sms, 1)
    per = split(groups, tiles, sms)
    items = groups * ceil_div(tiles, per)
    fields = HOPPER_FIELDS + PAGES * bool(page)
    fields += f"{-struct.calcsize(fields) % 64}x"  # the struct is as long as its alignment asks
    function = nvrtc.function("indexer_scores_hopper", "indexer_scores_hopper", fields, d, place)
    scale_b, scale_s = k_scale.strides if k_scale is not None else (0, 0)
    function(min(items, sms), HOPPER_THREADS, hopper_shared(d), place.stream, *maps, weights.ptr, nvrtc.ptr(k_scale), nvrtc.ptr(start), nvrtc.ptr(end), nvrtc.ptr(q_starts),
             out, *weights.strides, scale_b, scale_s, out_row, T, S, b0, nb, t0, nt, per, items, q_start, int(causal), enough, int(fill), *pages)


def bounds_of(key_start, key_end, causal, q_start) -> tuple:
    """q_start is an int or a device array [B]."""
    return (key_start, key_end, None, q_start, causal) if isinstance(q_start, int) else (key_start, key_end, q_start, 0, causal)


def run(q, k, weights, *, place, config, k_scale=None, key_start=None, key_end=None, causal=True, q_start=0, activation="relu", table=None):
    (B, H, T, D), S = q.shape, pages_of(table, k)[0]
    scores = place.empty((B, T, S), "float32")
    if B * T * S == 0:
        return scores
    launch(q, k, weights, place=place, config=config, k_scale=k_scale, bounds=bounds_of(key_start, key_end, causal, q_start), activation=activation,
           rows=(0, B, 0, T), out=scores.ptr, out_row=S, table=table)
    return scores
