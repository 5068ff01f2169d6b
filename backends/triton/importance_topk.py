"""The top_k most important blocks of keys, without ever holding all importances.

    q [B,Hq,T,D]  k [B,Hk,C,D]  lse [B,Hq,T]  key_end, block_end [B,Hk,T] int32  ->  indices [B,Hk,T,top_k] int32 ascending, then -1; lengths [B,Hk,T]; scores or None

importance[j] = sum over the group's heads h, m < step, n < reach of exp(scale * q_h . k_i - lse_h) with i = step * j + m - n, 0 <= i < key_end.
As many rows (a query and a key head) as fit a bounded scratch at a time: what each compressed key got, summed over the group, by the kernel of `indexer_scores`; then, path "row",
a row's blocks are summed in registers and the cut among them found by halving; or, path "select", sums over blocks go through memory into the exact choice of `topk`.
A row with no more than top_k blocks is answered with all of them, unless scores are asked for. Forced blocks count in top_k.
"""
import math
from dataclasses import replace
from functools import lru_cache

import triton
import triton.language as tl

from sparsetile.backends.contract import Problem, Resources, Tunable
from sparsetile.backends.triton import index_score, indexer_scores, relaunch, select_few, select_rows
from sparsetile.backends.triton.indexer_topk import row_stride
from sparsetile.backends.triton.select import kth_key, order_keys

TUNABLES = (Tunable("path", ("select", "row"), "row: sums and choice of a row in one kernel's registers"), *indexer_scores.TUNABLES,
            *(replace(knob, paths=("select",)) for knob in select_rows.TUNABLES), Tunable("scratch_mb", (32, 16, 64, 256), "shares held at a time"))
BLOCKS, ROW_BLOCKS = 256, 4096  # of a program of sum_blocks; that a row's registers hold


@triton.jit
def sum_blocks(shares, ends, out, T, T_all, blocks, reach, step, in_b, in_t, out_b, out_t, BLOCKS: tl.constexpr):
    """Program (row, blocks): each compressed key before the row's end counts as often as its strides lie in the block; sums in the keys' order."""
    r = tl.program_id(0)
    b, t = r // T, r % T
    end = tl.load(ends + b.to(tl.int64) * T_all + t)
    row = shares + b.to(tl.int64) * in_b + t.to(tl.int64) * in_t
    answer = out + b.to(tl.int64) * out_b + t.to(tl.int64) * out_t
    for first in range(tl.program_id(1) * BLOCKS, blocks, tl.num_programs(1) * BLOCKS):
        j = first + tl.arange(0, BLOCKS)
        total = tl.zeros((BLOCKS,), tl.float32)
        for n in range(step + reach - 1):
            i = j * step + (n - reach + 1)
            times = tl.minimum(tl.minimum(n + 1, step + reach - 1 - n), tl.minimum(step, reach))
            total += times.to(tl.float32) * tl.load(row + i, mask=(i >= 0) & (i < end) & (j < blocks), other=0.0)
        tl.store(answer + j, total, mask=j < blocks)


@triton.jit
def choose_row(shares, key_ends, block_ends, out, lengths, values, T, T_all, k, force_first, force_last, in_b, in_t,
               STEP: tl.constexpr, REACH: tl.constexpr, BLOCKS: tl.constexpr, ALL: tl.constexpr):
    """Program r: the sums of a row's blocks as in sum_blocks, and its choice among them."""
    r = tl.program_id(0)
    b, t = r // T, r % T
    item = b.to(tl.int64) * T_all + t
    end, hi = tl.load(key_ends + item), tl.load(block_ends + item)
    row = shares + b.to(tl.int64) * in_b + t.to(tl.int64) * in_t
    j = tl.arange(0, BLOCKS)
    total = tl.zeros((BLOCKS,), tl.float32)
    for n in range(STEP + REACH - 1):
        i = j * STEP + (n - REACH + 1)
        times = tl.minimum(tl.minimum(n + 1, STEP + REACH - 1 - n), min(STEP, REACH))
        total += times.to(tl.float32) * tl.load(row + i, mask=(i >= 0) & (i < end), other=0.0)
    first = tl.minimum(force_first, hi)
    if ALL:
        first = tl.where(hi <= k, hi, first)
    forced = (j < first) | ((j >= hi - force_last) & (j < hi))
    keys = tl.where((j < hi) & (forced == 0) & (total >= 0), order_keys(total.to(tl.int32, bitcast=True)), tl.zeros((BLOCKS,), tl.uint32))
    need = k - tl.sum(forced.to(tl.int32), axis=0)
    reach = tl.sum((keys > 0).to(tl.int32), axis=0)
    taken = (keys > 0) & (need > 0)
    if (reach > need) & (need > 0):
        low, reach = kth_key(keys, reach, need, 0)
        taken = keys >= low
        if reach > need:  # equal ones at the cut
            alike = (keys == low).to(tl.int32)
            taken = taken & ((keys > low) | (tl.cumsum(alike, axis=0) <= need - reach + tl.sum(alike, axis=0)))
    forced = forced | taken
    place = tl.cumsum(forced.to(tl.int32), axis=0) - 1
    written = tl.sum(forced.to(tl.int32), axis=0)
    tl.store(out + item * k + place, j, mask=forced)
    tl.store(lengths + item, written)
    tl.store(out + item * k + j, -1, mask=(j >= written) & (j < k))
    if values is not None:
        tl.store(values + item * k + place, total, mask=forced)
        tl.store(values + item * k + j, float("-inf"), mask=(j >= written) & (j < k))


def group_problem(problem) -> Problem:
    """The scores inside: a group's heads are the indexer's, batches and key heads its batches."""
    dims = dict(B=problem["B"] * problem["Hk"], H=problem["Hq"] // problem["Hk"], T=problem["T"], S=problem["C"], D=problem["D"])
    return Problem.of("indexer_scores", dims, dict(problem.dtypes), problem.arch)


def supports(problem):
    kind = problem.dtype("q")
    return None if kind in ("float32", "float16", "bfloat16") else f"importance_topk takes float32, float16 or bfloat16 on a GPU, not {kind}; cast q and k, or move them to the CPU"


def no_row(blocks: int, top_k: int) -> str | None:
    """Why the path "row" is not for this problem."""
    return None if max(blocks, top_k) <= ROW_BLOCKS else f"path row holds {ROW_BLOCKS} blocks in registers, not {blocks} of which {top_k} are taken; take select"


def resources(problem, config):
    refused = no_row(triton.cdiv(problem["S"], problem.granularity), problem["K"]) if config["path"] == "row" else select_rows.refusal(config)
    return refused or indexer_scores.resources(group_problem(problem), config)


def rows_at_once(C, blocks, scratch_mb) -> int:
    return max(1, (scratch_mb << 20) // (4 * (row_stride(C) + row_stride(blocks))))


def default_config(problem):
    blocks = -(-problem["S"] // problem.granularity)
    rows = min(problem["B"] * problem["Hk"] * problem["T"], rows_at_once(problem["C"], blocks, 256))
    return {"path": "select" if no_row(blocks, problem["K"]) else "row", **indexer_scores.default_config(group_problem(problem)), **select_rows.default_knobs(rows, blocks, problem["K"], 132), "scratch_mb": 256}


def artifacts(problem, config):
    has = problem.features
    scores = "return_scores" in has
    found = [index_score.score_artifact(group_problem(problem), queries=config["queries"], stages=config["stages"], fill=False, activation="share")]
    if config["path"] == "row":
        return found + [row_artifact(triton.cdiv(problem["S"], problem.granularity), problem["K"], scores)]
    found += select_rows.row_artifacts(config, problem.arch, causal=False, forced=bool(has & {"force_first", "force_last"}), everything=not scores, windows=False, q_starts=False, values=scores, ends=True)
    arrays, numbers = {"shares": "*fp32", "ends": "*i32", "out": "*fp32"}, ("T", "T_all", "blocks", "reach", "step", "in_b", "in_t", "out_b", "out_t")
    return found + [{"fn": sum_blocks, "signature": {**arrays, **{name: "i32" for name in numbers}}, "constexprs": {"BLOCKS": BLOCKS}, "options": {"num_warps": 4},
                     "div16": tuple(arrays) + ("in_b", "in_t", "out_b", "out_t")}]


def row_artifact(blocks, top_k, scores):
    """For the paper's blocks."""
    arrays = {"shares": "*fp32", "key_ends": "*i32", "block_ends": "*i32", "out": "*i32", "lengths": "*i32", "values": "*fp32"}
    numbers = ("T", "T_all", "k", "force_first", "force_last", "in_b", "in_t")
    constexprs = dict(row_constants(blocks, top_k, 4, 2, not scores))
    options = dict(num_warps=constexprs.pop("num_warps"))
    if not scores:
        arrays.pop("values")
        constexprs["values"] = None
    return {"fn": choose_row, "signature": {**arrays, **{name: "i32" for name in numbers}}, "constexprs": constexprs, "options": options, "div16": tuple(arrays) + ("in_b", "in_t")}


@lru_cache(1024)
def row_constants(blocks, top_k, step, reach, everything) -> relaunch.Constants:
    held = triton.next_power_of_2(max(blocks, top_k, 32))
    return relaunch.Constants(STEP=step, REACH=reach, BLOCKS=held, ALL=everything, num_warps=max(1, held // 1024))


def run(q, k, lse, top_k, *, place, config, key_end, block_end, blocks, reach, step, scale, force_first=0, force_last=0, return_scores=False):
    (B, Hq, T, D), (Hk, C) = q.shape, k.shape[1:3]
    indices, lengths = place.empty((B, Hk, T, top_k), "int32"), place.empty((B, Hk, T), "int32")
    values = place.empty((B, Hk, T, top_k), "float32") if return_scores else None
    rows, log2e = B * Hk, math.log2(math.e)
    q, k, lse = q.reshape(rows, Hq // Hk, T, D), k.reshape(rows, C, D), lse.view(rows, Hq // Hk, T)
    key_end, block_end = key_end.view(rows, T), block_end.view(rows, T)
    answer = [None if x is None else x.view(rows, *x.shape[2:]) for x in (indices, lengths, values)]
    at_once = min(rows * T, rows_at_once(C, blocks, config["scratch_mb"]))
    batches, queries = (at_once // T, T) if at_once >= T else (1, at_once)
    by_row = config["path"] == "row"
    shares, sums = (place.empty((n,), "float32") for n in (batches * queries * row_stride(C), 0 if by_row else batches * queries * row_stride(blocks)))
    kept = None if by_row or values is None and select_few.serves(blocks, top_k) else select_rows.buffers(batches * queries, place, config)
    constants = row_constants(blocks, top_k, step, reach, not return_scores)
    for b in range(0, rows, batches):
        for t in range(0, T, queries):
            part = slice(b, min(rows, b + batches)), slice(t, min(T, t + queries))
            shape = part[0].stop - b, part[1].stop - t
            programs = shape[0] * shape[1]
            given, into = shares[:programs * row_stride(C)].view(*shape, row_stride(C)), [None if x is None else x[part] for x in answer]
            index_score.score(q[part[0], :, part[1]], k[part[0]], lse[part[0], :, part[1]], given, place=place, queries=config["queries"], stages=config["stages"],
                              T_all=T, ends=key_end[part], causal=False, activation="share", factor=scale * log2e, fill=False)
            if by_row:
                relaunch.launch(choose_row, (programs,), place, (given, key_end[part], block_end[part], *into), (shape[1], T, top_k, force_first, force_last, *given.stride()[:2]), constants)
                continue
            found = sums[:programs * row_stride(blocks)].view(*shape, row_stride(blocks))
            place.noted(sum_blocks[(programs, min(64, triton.cdiv(blocks, BLOCKS)))])(given, key_end[part], found, shape[1], T, blocks, reach, step, *given.stride()[:2],
                                                                                      *found.stride()[:2], BLOCKS=BLOCKS, num_warps=4)
            select_rows.select_rows(found, top_k, *into, place=place, config=config, T_all=T, ends=block_end[part], width=blocks, force_first=force_first, force_last=force_last,
                                    everything=not return_scores, scratch=kept)
    return indices, lengths, values
