"""The top_k best keys (or blocks of `pool` keys) of every query of a lightning indexer; the scores [T,S] are never held.

    q [B,H,T,D]  k [B,S,D]  weights [B,H,T]  ->  indices [B,T,top_k] int32 ascending, then -1; lengths [B,T] int32; scores [B,T,top_k] float32 or None

Some queries at a time: their scores go into a scratch of at most `scratch_mb` (one row where a row is longer), under 50 MB in every config, and the exact selection
of topk.cu reads them there. The score kernel is that of indexer_scores, so the sets are equal bit for bit. 44 MiB are 88 rows of 128k, an item of the score kernel for
each of 132 multiprocessors: 9.2 to 9.3 ms for 4096 rows on an H200, where 47 MiB took 9.5, 40 took 9.7 and 32 took 10.1. A row that sees no more than top_k entries is
answered with all of them, NaN too, and its scores are not computed, unless scores are asked for. Forced blocks are always taken: they are the ends of the row's window,
selection works between them. Everything is queued on the stream; nothing comes back to the host.

With table [B,pages] int32 keys and scales are pages, read where they lie (indexer_scores); an entry of which no key lies in a page is never chosen.

The path "fused" (indexer_topk_hopper.cu: sm_90a, e4m3, 64 heads of width 128, top_k up to 2048, plain selection) scores and selects in one kernel without
any scratch; arrays that its copy engine cannot address take the other path. Both give the same bits.
"""
from dataclasses import replace

from sparsetile.backends.contract import Resources, Tunable
from sparsetile.backends.cupy import compile as nvrtc
from sparsetile.backends.cupy import hopper, indexer_scores, topk
from sparsetile.backends.cupy.operands import PAGES, ceil_div, page_defines, pages_of

TUNABLES = (Tunable("path", ("scratch", "fused"), "fused: scores and selection in one kernel"),
            *(replace(knob, paths=("scratch",)) for knob in (*indexer_scores.TUNABLES, *topk.TUNABLES, Tunable("scratch_mb", (44, 16, 32), "MiB of scores held at a time, and of blocks' maxima"))))
FUSED_FIELDS = "128s128s" + "7Q5q6i8x"
FUSED_STAGES, FUSED_CAP, FUSED_MOST = 3, 4096, 2048
FUSED_SHARED = 1024 + 4 * 64 * 128 + FUSED_STAGES * (128 * 128 + 16) + 32 + 4 * FUSED_CAP * 8 + 2 * 2048 * 4 + 256
ORDER_SHARED = 4096 * 4 + FUSED_MOST * 4 + 64
POOL_FIELDS = "5Q3q8i"
HOLE_FIELDS = PAGES + "5Q6i"
POOL_THREADS = 256


def supports(problem):
    if "paged" in problem.features and problem.features & {"force_first", "force_last"}:
        return "CuPy takes forced blocks at the ends of a row's window, where a page table may have holes; pass cache.gather(), or select without them"
    return indexer_scores.supports(problem) or topk.supports(problem)


def no_fused(problem) -> str | None:
    """Why the path "fused" is not for this problem."""
    if "paged" in problem.features:
        return "path fused reads keys in one piece, not through a page table; take scratch"
    if not indexer_scores.hopper_problem(problem.dtype("q"), problem["H"], problem["D"], problem.arch):
        return "path fused takes float8_e4m3fn, 64 heads of width 128, on sm_90a; take scratch"
    if problem["K"] > FUSED_MOST or problem.features & {"pool", "force_first", "force_last", "return_scores"}:
        return f"path fused takes top_k up to {FUSED_MOST} without pool, forced blocks and returned scores; take scratch"
    return None


def resources(problem, config):
    if config["path"] == "fused":
        return no_fused(problem) or Resources(384, FUSED_SHARED, 168)
    scores, select = indexer_scores.resources(problem, config), topk.resources(problem, config)
    for part in (scores, select):
        if isinstance(part, str):
            return part
    return Resources(max(scores.threads, select.threads), max(scores.shared, select.shared), max(scores.registers, select.registers))


def default_config(problem):
    S, T = problem["S"], problem["T"] * problem["B"]
    busy = problem["B"] * ceil_div(problem["T"], 4) >= 66  # half of an H200: fewer groups of queries leave it idle, the other path splits the keys too
    long = S >= 65536  # at 32k thinning the first candidates weighs more than writing the scores: 1.33 ms against 1.24 for 2048 queries on an H100
    config = dict(indexer_scores.default_config(problem), scratch_mb=44, path="fused" if busy and long and not no_fused(problem) else "scratch")
    return {**config, **topk.heuristic(min(T, rows_held(S, config)), S, problem["K"])}


def artifacts(problem, config):
    pool = [dict(source="indexer_topk", defines=dict(THREADS=POOL_THREADS), names=["pool_scores"])]
    pool += [dict(source="indexer_topk", defines=dict(THREADS=POOL_THREADS, **page_defines(problem)), names=["drop_holes"])] * ("paged" in problem.features)
    fused = [] if no_fused(problem) else [dict(source="indexer_topk_hopper", defines=fused_defines("relu"), names=["indexer_topk_hopper", "order_rows"])]
    return indexer_scores.artifacts(problem, config) + topk.artifacts(problem, config) + pool + fused


def fused_defines(activation) -> dict:
    return dict(RELU=int(activation == "relu"), STAGES=FUSED_STAGES, CAP=FUSED_CAP)


def rows_held(columns: int, config: dict) -> int:
    """Rows of scores, and of the maxima of their blocks, that fit the scratch."""
    return max(1, config["scratch_mb"] * 2 ** 20 // (4 * max(columns, 1)))


def chunks(B: int, T: int, rows: int, queries: int):
    """(b0, batches, t0, queries) pieces of at most `rows` rows, in order; each is one run of rows of [B * T]."""
    if T <= rows:
        step = max(1, rows // T)
        return [(b, min(step, B - b), 0, T) for b in range(0, B, step)]
    step = max(1, rows // queries * queries) if rows >= queries else rows
    return [(b, 1, t, min(step, T - t)) for b in range(B) for t in range(0, T, step)]


def pool_scores(place, scores, scores_row, pooled, pooled_row, first_row, rows, T, S, pool, bounds):
    start, end, q_starts, q_start, causal = bounds
    blocks, lanes = ceil_div(S, pool), 1
    while lanes < 32 and lanes * 2 <= pool:
        lanes *= 2
    parts = ceil_div(blocks, POOL_THREADS // lanes)
    function = nvrtc.function("indexer_topk", "pool_scores", POOL_FIELDS, dict(THREADS=POOL_THREADS), place)
    function(rows * parts, POOL_THREADS, 0, place.stream, scores.ptr, pooled.ptr, nvrtc.ptr(start), nvrtc.ptr(end), nvrtc.ptr(q_starts),
             scores_row, pooled_row, first_row, T, S, pool, blocks, lanes, q_start, int(causal), parts)


def run_fused(q, k, weights, top_k, place, k_scale, bounds, activation, indices, lengths):
    (B, H, T, D), S = q.shape, k.shape[1]
    start, end, q_starts, q_start, causal = bounds
    (qb, qh, qt), (kb, ks) = hopper.steps(q), hopper.steps(k)
    maps = hopper.tensor_map(place, q, (D, H, T, B), (1, qh, qt, qb), (D, H, 4, 1)), hopper.tensor_map(place, k, (D, S, B), (1, ks, kb), (D, 16, 1))
    items = B * ceil_div(T, 4)
    scale_b, scale_s = k_scale.strides if k_scale is not None else (0, 0)
    values = (*maps, weights.ptr, nvrtc.ptr(k_scale), nvrtc.ptr(start), nvrtc.ptr(end), nvrtc.ptr(q_starts), indices.ptr, lengths.ptr,
              *weights.strides, scale_b, scale_s, T, S, items, top_k, q_start, int(causal))
    d = fused_defines(activation)
    nvrtc.function("indexer_topk_hopper", "indexer_topk_hopper", FUSED_FIELDS, d, place)(min(items, max(place.sms, 1)), 384, FUSED_SHARED, place.stream, *values)
    nvrtc.function("indexer_topk_hopper", "order_rows", FUSED_FIELDS, d, place)(B * T, 256, ORDER_SHARED, place.stream, *values)


def drop_holes(place, indices, lengths, table, k, bounds, T, pool):
    """Rows that were answered with all of their window lose the entries of which no key lies in a page."""
    start, end, q_starts, q_start, causal = bounds
    S, pages, page = pages_of(table, k)
    function = nvrtc.function("indexer_topk", "drop_holes", HOLE_FIELDS, dict(THREADS=POOL_THREADS, **page), place)
    function(lengths.size, POOL_THREADS, POOL_THREADS // 8, place.stream, *pages, indices.ptr, lengths.ptr, nvrtc.ptr(start), nvrtc.ptr(end), nvrtc.ptr(q_starts),
             T, S, pool, indices.shape[2], q_start, int(causal))


def run(q, k, weights, top_k, *, place, config, k_scale=None, key_start=None, key_end=None, causal=True, q_start=0, activation="relu",
        pool=1, force_first=0, force_last=0, return_scores=False, table=None):
    (B, H, T, D), S = q.shape, pages_of(table, k)[0]
    indices, lengths = place.empty((B, T, top_k), "int32"), place.empty((B, T), "int32")
    chosen = place.empty((B, T, top_k), "float32") if return_scores else None
    if B * T == 0 or top_k == 0:
        return indices, lengths, chosen
    bounds = indexer_scores.bounds_of(key_start, key_end, causal, q_start)
    plain = pool == 1 and not (force_first or force_last or return_scores)
    if config["path"] == "fused" and plain and top_k <= FUSED_MOST and indexer_scores.takes_hopper(q, k, place, table):
        run_fused(q, k, weights, top_k, place, k_scale, bounds, activation, indices, lengths)
        return indices, lengths, chosen
    row, pooled_row = ceil_div(S, 4) * 4, ceil_div(ceil_div(S, pool), 4) * 4  # rows start at 16 bytes
    pieces = chunks(B, T, rows_held(row + pooled_row * (pool > 1), config), config["queries"])
    most = max(nb * nt for _, nb, _, nt in pieces)
    scratch = place.empty((most, row), "float32")
    pooled = place.empty((most, pooled_row), "float32") if pool > 1 else None
    enough = -1 if return_scores else (top_k - 1) * pool + 1  # so many neighbouring keys lie in at most top_k blocks
    for b0, nb, t0, nt in pieces:
        rows, first_row = nb * nt, b0 * T + t0
        indexer_scores.launch(q, k, weights, place=place, config=config, k_scale=k_scale, bounds=bounds, activation=activation, rows=(b0, nb, t0, nt),
                              out=scratch.ptr, out_row=row, enough=min(enough, 2 ** 31 - 1), fill=False, table=table)
        source, source_row = scratch, row
        if pool > 1:
            pool_scores(place, scratch, row, pooled, pooled_row, first_row, rows, T, S, pool, bounds)
            source, source_row = pooled, pooled_row
        topk.launch(place, config, rows, source.ptr, (0, source_row), 2 ** 31 - 1, first_row, T, S, bounds, top_k, indices, lengths,
                    pool=pool, force_first=force_first, force_last=force_last, take_all=not return_scores, chosen=chosen)
    if table is not None and not return_scores:
        drop_holes(place, indices, lengths, table, k, bounds, T, pool)
    return indices, lengths, chosen
