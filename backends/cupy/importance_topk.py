"""The top_k most important blocks of keys of every query and key head; importances of T x blocks are never held.

    q [B,Hq,T,D]  k [B,Hk,C,D]  lse [B,Hq,T]  key_end, block_end [B,Hk,T] int32  ->  indices [B,Hk,T,top_k] int32 ascending, then -1; lengths [B,Hk,T]; scores or None

importance[j] = sum over the group's heads h, m < step, n < reach of exp(scale * q_h . k_i - lse_h) with i = step * j + m - n, 0 <= i < key_end.
Rows are queries of a key head. Some at a time: the score kernel of indexer_scores, with a group's heads for its heads, puts each compressed key's share into a scratch of at
most `scratch_mb` (one row where a row is longer), importance_topk.cu sums them over blocks, and the exact selection of topk.cu reads those. A row of no more than top_k blocks is answered
with all of them, unless scores are asked for. Forced blocks are always taken. Everything is queued on the stream; nothing comes back to the host.
"""
import math

from sparsetile.backends.arrays import View
from sparsetile.backends.contract import Problem, Resources, Tunable
from sparsetile.backends.cupy import compile as nvrtc
from sparsetile.backends.cupy import indexer_scores, topk
from sparsetile.backends.cupy.indexer_topk import chunks
from sparsetile.backends.cupy.operands import ceil_div

TUNABLES = (*indexer_scores.TUNABLES, *topk.TUNABLES, Tunable("scratch_mb", (64, 16, 32), "MiB of shares and importances held at a time"))
FIELDS, THREADS = "3Q3q4i", 256


def group_problem(problem) -> Problem:
    """The scores inside: a group's heads are the indexer's, batches and key heads its batches."""
    dims = dict(B=problem["B"] * problem["Hk"], H=problem["Hq"] // problem["Hk"], T=problem["T"], S=problem["C"], D=problem["D"])
    return Problem.of("indexer_scores", dims, dict(problem.dtypes), problem.arch)


def supports(problem):
    if problem.dtype("q") not in ("float32", "float16", "bfloat16"):
        return f"CuPy importance_topk takes float32, float16 or bfloat16, not {problem.dtype('q')}; cast q and k"
    return indexer_scores.supports(group_problem(problem)) or topk.supports(problem)


def resources(problem, config):
    scores, select = indexer_scores.resources(group_problem(problem), config), topk.resources(problem, config)
    for part in (scores, select):
        if isinstance(part, str):
            return part
    return Resources(max(scores.threads, select.threads), max(scores.shared, select.shared), max(scores.registers, select.registers))


def default_config(problem):
    config, blocks = dict(indexer_scores.default_config(group_problem(problem)), scratch_mb=64), ceil_div(problem["S"], problem.granularity)
    rows = problem["B"] * problem["Hk"] * problem["T"]
    return {**config, **topk.heuristic(min(rows, rows_held(problem["C"], blocks, config)), blocks, problem["K"])}


def artifacts(problem, config):
    return indexer_scores.artifacts(group_problem(problem), config, "share") + topk.artifacts(problem, config) + [dict(source="importance_topk", defines=dict(THREADS=THREADS), names=["sum_blocks"])]


def row(n: int) -> int:
    """Rows of a scratch start at 16 bytes."""
    return max(4, ceil_div(n, 4) * 4)


def rows_held(C: int, blocks: int, config: dict) -> int:
    return max(1, config["scratch_mb"] * 2 ** 20 // (4 * (row(C) + row(blocks))))


def by_group(place, q, k):
    """q [B,Hq,T,D], k [B,Hk,C,D] as [B*Hk, G, T, D] and [B*Hk, C, D]: the same memory, or a packed copy where batches lie in another order than heads."""
    (B, Hq, T, D), (_, Hk, C, _) = q.shape, k.shape
    q, k = (x if B == 1 or x.strides[0] == x.shape[1] * x.strides[1] else place.packed(x) for x in (q, k))
    G, step = Hq // Hk, q.strides[1]
    return (View(q.ptr, (B * Hk, G, T, D), (G * step, step, *q.strides[2:]), q.dtype, q.device, q.owner),
            View(k.ptr, (B * Hk, C, D), k.strides[1:], k.dtype, k.device, k.owner))


def run(q, k, lse, top_k, *, place, config, key_end, block_end, blocks, reach, step, scale, force_first=0, force_last=0, return_scores=False):
    (B, Hq, T, _), (Hk, C) = q.shape, k.shape[1:3]
    indices, lengths = place.empty((B, Hk, T, top_k), "int32"), place.empty((B, Hk, T), "int32")
    chosen, G = place.empty((B, Hk, T, top_k), "float32") if return_scores else None, Hq // Hk
    q, k = by_group(place, q, k)
    weights = View(lse.ptr, (B * Hk, G, T), (G * T, T, 1), lse.dtype, lse.device, lse.owner)
    pieces = chunks(B * Hk, T, rows_held(C, blocks, config), config["queries"])
    most = max(nb * nt for _, nb, _, nt in pieces)
    shares, sums = place.empty((most, row(C)), "float32"), place.empty((most, row(blocks)), "float32")
    add = nvrtc.function("importance_topk", "sum_blocks", FIELDS, dict(THREADS=THREADS), place)
    for b0, nb, t0, nt in pieces:
        rows, first_row, parts = nb * nt, b0 * T + t0, ceil_div(blocks, THREADS)
        if C:
            indexer_scores.launch(q, k, weights, place=place, config=config, k_scale=None, bounds=(None, key_end, None, 0, False), activation="share", rows=(b0, nb, t0, nt),
                                  out=shares.ptr, out_row=row(C), fill=False, factor=scale * math.log2(math.e))
        add(rows * parts, THREADS, 0, place.stream, shares.ptr, key_end.ptr, sums.ptr, row(C), row(blocks), first_row, blocks, reach, step, parts)
        topk.launch(place, config, rows, sums.ptr, (0, row(blocks)), 2 ** 31 - 1, first_row, T, blocks, (None, block_end, None, 0, False), top_k, indices, lengths,
                    force_first=force_first, force_last=force_last, take_all=not return_scores, chosen=chosen)
    return indices, lengths, chosen
