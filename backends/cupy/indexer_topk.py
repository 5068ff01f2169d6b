"""The top_k best keys (or blocks of `pool` keys) of every query of a lightning indexer; the scores [T,S] are never held.

    q [B,H,T,D]  k [B,S,D]  weights [B,H,T]  ->  indices [B,T,top_k] int32 ascending, then -1; lengths [B,T] int32; scores [B,T,top_k] float32 or None

Some queries at a time: their scores go into a scratch of at most `scratch_mb` (one row where a row is longer), and the exact selection of topk.cu reads
them there. The score kernel is that of indexer_scores, so the sets are equal bit for bit. A row that sees no more than top_k entries is answered with all of
them, NaN too, and its scores are not computed, unless scores are asked for. Forced blocks are always taken: they are the ends of the row's window, selection
works between them. Everything is queued on the stream; nothing comes back to the host.
"""
from sparsetile.backends.contract import Resources, Tunable
from sparsetile.backends.cupy import compile as nvrtc
from sparsetile.backends.cupy import indexer_scores, topk
from sparsetile.backends.cupy.operands import ceil_div

TUNABLES = (*indexer_scores.TUNABLES, *topk.TUNABLES, Tunable("scratch_mb", (64, 16, 32), "MiB of scores held at a time"))
POOL_FIELDS = "5Q3q8i"
POOL_THREADS = 256


def supports(problem):
    return indexer_scores.supports(problem) or topk.supports(problem)


def resources(problem, config):
    scores, select = indexer_scores.resources(problem, config), topk.resources(problem, config)
    for part in (scores, select):
        if isinstance(part, str):
            return part
    return Resources(max(scores.threads, select.threads), max(scores.shared, select.shared), max(scores.registers, select.registers))


def default_config(problem):
    S, T = problem["S"], problem["T"] * problem["B"]
    config = dict(indexer_scores.default_config(problem), scratch_mb=64)
    return {**config, **topk.heuristic(min(T, rows_held(S, config)), S, problem["K"])}


def artifacts(problem, config):
    pool = [dict(source="indexer_topk", defines=dict(THREADS=POOL_THREADS), names=["pool_scores"])]
    return indexer_scores.artifacts(problem, config) + topk.artifacts(problem, config) + pool


def rows_held(S: int, config: dict) -> int:
    return max(1, config["scratch_mb"] * 2 ** 20 // (4 * max(S, 1)))


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


def run(q, k, weights, top_k, *, place, config, k_scale=None, key_start=None, key_end=None, causal=True, q_start=0, activation="relu",
        pool=1, force_first=0, force_last=0, return_scores=False):
    (B, H, T, D), S = q.shape, k.shape[1]
    indices, lengths = place.empty((B, T, top_k), "int32"), place.empty((B, T), "int32")
    chosen = place.empty((B, T, top_k), "float32") if return_scores else None
    if B * T == 0 or top_k == 0:
        return indices, lengths, chosen
    bounds = indexer_scores.bounds_of(key_start, key_end, causal, q_start)
    row, pooled_row = ceil_div(S, 4) * 4, ceil_div(ceil_div(S, pool), 4) * 4  # rows start at 16 bytes
    pieces = chunks(B, T, rows_held(S, config), config["queries"])
    most = max(nb * nt for _, nb, _, nt in pieces)
    scratch = place.empty((most, row), "float32")
    pooled = place.empty((most, pooled_row), "float32") if pool > 1 else None
    enough = -1 if return_scores else (top_k - 1) * pool + 1  # so many neighbouring keys lie in at most top_k blocks
    for b0, nb, t0, nt in pieces:
        rows, first_row = nb * nt, b0 * T + t0
        indexer_scores.launch(q, k, weights, place=place, config=config, k_scale=k_scale, bounds=bounds, activation=activation, rows=(b0, nb, t0, nt),
                              out=scratch.ptr, out_row=row, enough=min(enough, 2 ** 31 - 1), fill=False)
        source, source_row = scratch, row
        if pool > 1:
            pool_scores(place, scratch, row, pooled, pooled_row, first_row, rows, T, S, pool, bounds)
            source, source_row = pooled, pooled_row
        topk.launch(place, config, rows, source.ptr, (0, source_row), 2 ** 31 - 1, first_row, T, S, bounds, top_k, indices, lengths,
                    pool=pool, force_first=force_first, force_last=force_last, take_all=not return_scores, chosen=chosen)
    return indices, lengths, chosen
