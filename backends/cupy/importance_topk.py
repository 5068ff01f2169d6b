"""The top_k most important blocks of keys of every query and key head; importances of T x blocks are never held.

    q [B,Hq,T,D]  k [B,Hk,C,D]  lse [B,Hq,T]  key_end, block_end [B,Hk,T] int32  ->  indices [B,Hk,T,top_k] int32 ascending, then -1; lengths [B,Hk,T]; scores or None

importance[j] = sum over the group's heads h, m < step, n < reach of exp(scale * q_h . k_i - lse_h) with i = step * j + m - n, 0 <= i < key_end.
Rows are queries of a key head. Some at a time: the score kernel of indexer_scores, with a group's heads for its heads, puts each compressed key's share into a scratch of at
most `scratch_mb` (one row where a row is longer), importance_topk.cu sums them over blocks, and the exact selection of topk.cu reads those. A row of no more than top_k blocks is
answered with all of them, unless scores are asked for. Forced blocks are always taken. Everything is queued on the stream; nothing comes back to the host.

The path "fused" (importance_topk_hopper.cu: sm_90a, float16 and bfloat16, groups of up to 32 heads, D up to 192, rows of blocks that fit shared memory) does all of it in one
launch without any scratch; arrays that its copy engine cannot address, and blocks of more than 64 strides, take the other path.
"""
import math
from dataclasses import replace

from sparsetile.backends.arrays import View
from sparsetile.backends.contract import Problem, Resources, Tunable
from sparsetile.backends.cupy import compile as nvrtc
from sparsetile.backends.cupy import hopper, indexer_scores, topk
from sparsetile.backends.cupy.indexer_topk import chunks
from sparsetile.backends.cupy.operands import HALVES, KINDS, ceil_div, padded

TUNABLES = (Tunable("path", ("scratch", "fused"), "fused: shares, sums and selection in one kernel"),
            *(replace(knob, paths=("scratch",)) for knob in (*indexer_scores.TUNABLES, *topk.TUNABLES,
                                                             Tunable("scratch_mb", (64, 16, 32), "MiB of shares and importances held at a time"))))
FIELDS, THREADS = "3Q3q4i", 256
FUSED_FIELDS = "128s128s" + "6Q10if20x"  # the struct is as long as its alignment, 64, asks
FUSED_KEYS, FUSED_MOST = 64, 32
FUSED_HALF = 113 * 1024  # bytes of shared memory that let two blocks of threads share a multiprocessor


def group_problem(problem) -> Problem:
    """The scores inside: a group's heads are the indexer's, batches and key heads its batches."""
    dims = dict(B=problem["B"] * problem["Hk"], H=problem["Hq"] // problem["Hk"], T=problem["T"], S=problem["C"], D=problem["D"])
    return Problem.of("indexer_scores", dims, dict(problem.dtypes), problem.arch)


def supports(problem):
    if problem.dtype("q") not in ("float32", "float16", "bfloat16"):
        return f"CuPy importance_topk takes float32, float16 or bfloat16, not {problem.dtype('q')}; cast q and k"
    return indexer_scores.supports(group_problem(problem)) or topk.supports(problem)


def no_fused(problem) -> str | None:
    """Why the path "fused" is not for this problem."""
    G, kind = problem["Hq"] // problem["Hk"], problem.dtype("q")
    if problem.arch != "sm_90a" or kind not in HALVES or G > 32 or problem["D"] > 192 or problem["K"] > FUSED_MOST:
        return f"path fused takes float16 or bfloat16, groups of up to 32 heads, D up to 192 and top_k up to {FUSED_MOST} on sm_90a; take scratch"
    shared = fused_shape(G, problem["D"], ceil_div(problem["S"], problem.granularity))[2]
    if shared > nvrtc.shared_limit(problem.arch):
        return f"path fused keeps the sums of all blocks in shared memory, {shared} bytes, {problem.arch} has {nvrtc.shared_limit(problem.arch)}; take scratch"
    return None


def queries_of(G: int) -> int:
    """Queries of a warpgroup of the path "fused": their heads, padded to 8, 16 or 32, are 128 columns."""
    return 16 if G <= 8 else 8 if G <= 16 else 4


def fused_shape(G: int, D: int, blocks: int) -> tuple[int, int, int]:
    """(warpgroups of a block of threads, stages, shared bytes): one group and two blocks a multiprocessor, where one chooses while the other multiplies (up to D 128: wider lacks the
    registers); else two groups that share what they load; else what fits at all."""
    slab = ceil_div(D, 64) * 128
    group = 128 * slab + 16 + 4 * queries_of(G) * (4 * FUSED_KEYS + 9 + sums_row(blocks))
    limit = nvrtc.shared_limit("sm_90a")
    shapes = [(groups, stages, groups * group + stages * (FUSED_KEYS * slab + 16)) for groups in (1, 2) for stages in (6, 5, 4, 3, 2)]
    fitting = [x for x in shapes[:5] if x[2] <= FUSED_HALF and D <= 128] + [x for x in shapes[5:] + shapes[:5] if x[2] <= limit]
    return fitting[0] if fitting else shapes[4]


def sums_row(blocks: int) -> int:
    """Neighbouring queries' sums begin four banks apart."""
    return ceil_div(blocks, 32) * 32 + 4


def resources(problem, config):
    if config["path"] == "fused":
        groups, _, shared = fused_shape(problem["Hq"] // problem["Hk"], problem["D"], ceil_div(problem["S"], problem.granularity))
        return no_fused(problem) or Resources(128 * (groups + 1), shared, 168 if groups == 2 else 128)
    scores, select = indexer_scores.resources(group_problem(problem), config), topk.resources(problem, config)
    for part in (scores, select):
        if isinstance(part, str):
            return part
    return Resources(max(scores.threads, select.threads), max(scores.shared, select.shared), max(scores.registers, select.registers))


def default_config(problem):
    config, blocks = dict(indexer_scores.default_config(group_problem(problem)), scratch_mb=64), ceil_div(problem["S"], problem.granularity)
    rows, G = problem["B"] * problem["Hk"] * problem["T"], problem["Hq"] // problem["Hk"]
    each = queries_of(G) * fused_shape(G, problem["D"], blocks)[0]
    busy = problem["B"] * problem["Hk"] * ceil_div(problem["T"], each) >= 66  # half of an H200: fewer items leave it idle, the other path splits the keys too
    config["path"] = "fused" if busy and not no_fused(problem) else "scratch"
    return {**config, **topk.heuristic(min(rows, rows_held(problem["C"], blocks, config)), blocks, problem["K"])}


def artifacts(problem, config):
    scratch = indexer_scores.artifacts(group_problem(problem), config, "share") + topk.artifacts(problem, config)
    scratch += [dict(source="importance_topk", defines=dict(THREADS=THREADS), names=["sum_blocks"])]
    if no_fused(problem):
        return scratch
    G, D = problem["Hq"] // problem["Hk"], problem["D"]
    d = fused_defines(problem.dtype("q"), G, D, 4, 2, *fused_shape(G, D, ceil_div(problem["S"], problem.granularity))[:2])  # the paper's blocks
    return scratch + [dict(source="importance_topk_hopper", defines=d, names=["importance_topk_hopper"])]


def fused_defines(kind, G, D, step, reach, groups, stages) -> dict:
    return dict(KIND=KINDS[kind], WIDTH=padded(D), HEADS=G, STEP=step, REACH=reach, GROUPS=groups, STAGES=stages)


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


def takes_fused(q, k, blocks, reach, step) -> bool:
    shared = fused_shape(q.shape[1] // k.shape[1], q.shape[3], blocks)[2]
    return k.shape[2] > 0 and step + reach <= FUSED_KEYS + 2 and shared <= nvrtc.shared_limit("sm_90a") and hopper.can_map(q) and hopper.can_map(k)


def run_fused(q, k, lse, top_k, place, key_end, block_end, blocks, reach, step, scale, force_first, force_last, indices, lengths, chosen):
    (B, Hq, T, D), (Hk, C) = q.shape, k.shape[1:3]
    G, (qb, qh, qt), (kb, kh, ks) = Hq // Hk, hopper.steps(q), hopper.steps(k)
    groups, stages, shared = fused_shape(G, D, blocks)
    each, items, resident = queries_of(G), B * Hk * ceil_div(T, groups * queries_of(G)), 2 if groups == 1 and shared <= FUSED_HALF else 1
    maps = (hopper.tensor_map(place, q, (D, G, T, Hk, B), (1, qh, qt, G * qh, qb), (64, 128 // each, each, 1, 1)),
            hopper.tensor_map(place, k, (D, C, Hk, B), (1, ks, kh, kb), (64, FUSED_KEYS, 1, 1)))
    function = nvrtc.function("importance_topk_hopper", "importance_topk_hopper", FUSED_FIELDS, fused_defines(q.dtype, G, D, step, reach, groups, stages), place)
    function(min(items, resident * max(place.sms, 1)), 128 * (groups + 1), shared, place.stream, *maps, lse.ptr, key_end.ptr, block_end.ptr, indices.ptr, lengths.ptr, nvrtc.ptr(chosen),
             Hk, T, C, blocks, sums_row(blocks), items, top_k, force_first, force_last, int(chosen is None), scale * math.log2(math.e))


def run(q, k, lse, top_k, *, place, config, key_end, block_end, blocks, reach, step, scale, force_first=0, force_last=0, return_scores=False):
    (B, Hq, T, _), (Hk, C) = q.shape, k.shape[1:3]
    indices, lengths = place.empty((B, Hk, T, top_k), "int32"), place.empty((B, Hk, T), "int32")
    chosen, G = place.empty((B, Hk, T, top_k), "float32") if return_scores else None, Hq // Hk
    if config["path"] == "fused" and takes_fused(q, k, blocks, reach, step):
        run_fused(q, k, lse, top_k, place, key_end, block_end, blocks, reach, step, scale, force_first, force_last, indices, lengths, chosen)
        return indices, lengths, chosen
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
