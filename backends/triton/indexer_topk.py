"""The top_k keys of a lightning indexer, or blocks of `pool` keys, without ever holding all scores.

    q [B,H,T,D]  k [B,S,D]  weights [B,H,T]  ->  indices [B,T,top_k] int32 ascending, then -1; lengths [B,T] int32; scores [B,T,top_k] float32 or None

Two paths, both with a bounded scratch (under 50 MB, but one row at least) and the score function of `indexer_scores`. kept: only scores that may be chosen are ever stored (index_keep.py).
stored: scores of as many queries as fit are stored, and their best chosen exactly as `topk` does.
A row with no more than top_k visible entries is answered with all of them, and nothing is computed for it, unless scores are asked for.
pool > 1: entries are blocks, a block's score is the maximum over its visible keys, NaN passed over. The first `force_first` and last `force_last` blocks that hold
visible keys are always taken, whatever their score, and count in top_k. scores are those of the entries, -inf where the index is -1.
With table [B,pages] int32 keys and scales are pages, read where they lie (index_score.py); an entry of which no key lies in a page is never chosen.
"""
from dataclasses import replace

import triton
import triton.language as tl

from sparsetile.backends.contract import Tunable
from sparsetile.backends.triton import index_keep, index_score, indexer_scores, pages, select_few, select_rows

TUNABLES = (
    Tunable("path", ("stored", "kept"), "kept: scores that cannot be chosen are never stored; many queries of long rows"),
    *indexer_scores.TUNABLES,
    *(replace(knob, paths=("stored",)) if knob.name == "splits" else knob for knob in select_rows.TUNABLES),
    Tunable("scratch_mb", (32, 16, 44), "MiB of scores, of blocks' maxima and of candidates held at a time"),
)


@triton.jit
def pool_rows(scores, starts, ends, q_starts, out, T, T_all, S, blocks, pool, in_b, in_t, out_b, out_t, position, CAUSAL: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr):
    """Program (row, blocks): maxima over the visible keys of each block of `pool` keys; NaN is passed over, no visible key gives -inf."""
    r = tl.program_id(0)
    b, t = r // T, r % T
    lo, hi = index_score.key_window(starts, ends, q_starts, b, T_all, t, S, position, 0, CAUSAL, t < T)
    row = scores + b.to(tl.int64) * in_b + t.to(tl.int64) * in_t
    answer = out + b.to(tl.int64) * out_b + t.to(tl.int64) * out_t
    for first in range(tl.program_id(1) * BLOCKS, blocks, tl.num_programs(1) * BLOCKS):
        n = first + tl.arange(0, BLOCKS)
        best = tl.full((BLOCKS,), float("-inf"), tl.float32)
        if (hi > first * pool) & (lo < (first + BLOCKS) * pool):
            for c in range(0, pool, WIDTH):
                i = c + tl.arange(0, WIDTH)
                s = n[:, None] * pool + i[None, :]
                score = tl.load(row + s, mask=(i < pool)[None, :] & (s >= lo) & (s < hi), other=float("-inf"))
                best = tl.maximum(best, tl.max(tl.where(score == score, score, float("-inf")), axis=1))
        tl.store(answer + n, best, mask=n < blocks)


@triton.jit
def drop_holes(indices, lengths, starts, ends, q_starts, table, T, S, pool, top_k, table_b, count, position, CAUSAL: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """Program (row): entries of which no key lies in a page leave a row that was answered with all of its window, for there no score told."""
    r = tl.program_id(0)
    b, t = r // T, r % T
    lo, hi = index_score.key_window(starts, ends, q_starts, b, T, t, S, position, 0, CAUSAL, t < T)
    if (lo < hi) & ((hi - 1) // pool - lo // pool < top_k):
        row = indices + r.to(tl.int64) * top_k
        n = tl.load(lengths + r)
        table += b.to(tl.int64) * table_b
        kept = n * 0
        for first in range(0, n, BLOCK):
            i = first + tl.arange(0, BLOCK)
            entry = tl.load(row + i, mask=i < n, other=0)
            begin = tl.maximum(entry * pool, lo) // PAGE
            end = ((tl.minimum(entry.to(tl.int64) * pool + pool, hi) - 1) // PAGE).to(tl.int32)
            found = i < 0
            for step in range(0, pool // PAGE + 2):
                page = tl.load(table + begin + step, mask=(i < n) & (begin + step <= end), other=-1)
                found = found | ((page >= 0) & (page < count))
            keep = found.to(tl.int32)
            at = kept + tl.cumsum(keep, 0) - keep
            tl.debug_barrier()  # everyone has read its entry: those before may be written over
            tl.store(row + at, entry, mask=found)
            kept += tl.sum(keep, 0)
        for first in range(kept, n, BLOCK):
            i = first + tl.arange(0, BLOCK)
            tl.store(row + i, tl.full((BLOCK,), -1, tl.int32), mask=i < n)
        tl.store(lengths + r, kept)


def supports(problem):
    if "paged" in problem.features and problem.features & {"force_first", "force_last"}:
        return "the triton indexer takes forced blocks at the ends of a row's window, where a page table may have holes; pass cache.gather(), or select without them"
    if problem["S"] > 2 ** 31 - 2 ** 15:
        return f"{problem['S']} keys are too many; split them and merge the selections"
    return index_score.refusal(problem)


def resources(problem, config):
    refused = select_rows.refusal(config)
    if config["path"] == "kept":
        refused = refused or index_keep.refusal(problem, config)
    return refused or indexer_scores.resources(problem, config)


def rows_at_once(S, blocks, config) -> int:
    """Rows that the scratch holds with the maxima of their `blocks` blocks, if any, and their candidates; whole tiles of queries where some fit."""
    rows = (config["scratch_mb"] << 20) // (4 * (row_stride(S) + (row_stride(blocks) if blocks else 0)) + select_rows.row_bytes(config))
    return max(1, rows // config["queries"] * config["queries"] or rows)


def row_stride(S) -> int:
    """Rows start at multiples of 64 bytes, so that they are read 16 bytes at a time."""
    return -(-max(S, 1) // 16) * 16


def default_config(problem):
    B, T, S = problem["B"], problem["T"], problem["S"]
    rows = max(1, (44 << 20) // (4 * row_stride(S)))  # without candidates
    config = {"path": "stored", **indexer_scores.default_config(problem), **select_rows.default_knobs(min(B * T, rows), S, problem["K"], 132), "scratch_mb": 44}
    while config["splits"] > 1 and rows_at_once(S, 0, config) < min(B * T, 64, rows * 3 // 4):  # parts of a row have room for all of its candidates each: more parts, fewer rows
        config["splits"] //= 2
    seen = S - (T // 2 if "causal" in problem.features else 0)  # keys of a row in the mean; of shorter ones too large a part is kept
    kept = config | index_keep.default_knobs(S, problem["K"]) | {"path": "kept"}
    if problem.arch == "sm_90a" and T >= 1024:
        kept |= dict(queries=64, stages=4)
    return kept if seen >= 32768 and B * T >= 256 and not isinstance(resources(problem, kept), str) else config


def pool_width(pool) -> tuple[int, int]:
    """(blocks, keys of each) that a program reads at a time."""
    width = min(1024, 1 << (pool - 1).bit_length())
    return max(1, 2048 // width), width


def artifacts(problem, config):
    has = problem.features
    causal, scores, pooled = "causal" in has, "return_scores" in has, "pool" in has
    windows = bool(has & {"window", "key_start", "key_end"})
    if config["path"] == "kept":
        return index_keep.artifacts(problem, config, causal=causal, windows=windows)
    found = [index_score.score_artifact(problem, queries=config["queries"], stages=config["stages"], fill=False)]
    found += select_rows.row_artifacts(config, problem.arch, causal=causal, forced="force" in has, everything=not scores, windows=windows, q_starts="q_start" in has, values=scores)
    if "paged" in has:
        given = {name: None for name, there in (("starts", windows), ("ends", windows), ("q_starts", "q_start" in has)) if not there}
        arrays = {name: "*i32" for name in ("indices", "lengths", "starts", "ends", "q_starts", "table") if name not in given}
        numbers = {name: "i32" for name in ("T", "S", "pool", "top_k", "table_b", "count", "position")}
        found.append({"fn": drop_holes, "signature": {**arrays, **numbers}, "constexprs": {**given, "CAUSAL": causal, "PAGE": pages.DEFAULT, "BLOCK": 512},
                      "options": {"num_warps": 4}, "div16": tuple(arrays)})
    if pooled:
        absent = {name: None for name, there in (("starts", windows), ("ends", windows), ("q_starts", "q_start" in has)) if not there}
        arrays = {name: kind for name, kind in (("scores", "*fp32"), ("starts", "*i32"), ("ends", "*i32"), ("q_starts", "*i32"), ("out", "*fp32")) if name not in absent}
        numbers = {name: "i32" for name in ("T", "T_all", "S", "blocks", "pool", "in_b", "in_t", "out_b", "out_t", "position")}
        blocks, width = pool_width(max(2, problem.granularity))
        found.append({"fn": pool_rows, "signature": {**arrays, **numbers}, "constexprs": {**absent, "CAUSAL": causal, "BLOCKS": blocks, "WIDTH": width},
                      "options": {"num_warps": 4}, "div16": tuple(arrays) + ("in_b", "in_t")})
    return found


def run(q, k, weights, top_k, *, place, config, k_scale=None, key_start=None, key_end=None, causal=True, q_start=0, activation="relu", pool=1, force_first=0,
        force_last=0, return_scores=False, table=None):
    B, T, (S, count, page) = q.shape[0], q.shape[2], pages.sizes(table, k)
    indices, lengths = place.empty((B, T, top_k), "int32"), place.empty((B, T), "int32")
    values = place.empty((B, T, top_k), "float32") if return_scores else None
    if not B * T:
        return indices, lengths, values
    weights = index_score.near_heads(weights)
    if config["path"] == "kept" and pool == 1 and not (return_scores or force_first or force_last) and table is None:
        index_keep.launch(q, k, weights, top_k, indices, lengths, place=place, config=config, k_scale=k_scale, key_start=key_start, key_end=key_end, causal=causal, q_start=q_start, activation=activation)
        return indices, lengths, None
    blocks, stride = -(-S // pool), row_stride(S)
    at_once = min(B * T, rows_at_once(S, blocks if pool > 1 else 0, config))
    batches, queries = (at_once // T, T) if at_once >= T else (1, at_once)
    scratch = place.empty((batches * queries * stride,), "float32")
    pooled = place.empty((batches * queries * row_stride(blocks),), "float32") if pool > 1 else None
    kept = None if values is None and select_few.serves(blocks, top_k) else select_rows.buffers(batches * queries, place, config)
    by_batch = not isinstance(q_start, int)
    for b in range(0, B, batches):
        for t in range(0, T, queries):
            part = slice(b, min(B, b + batches)), slice(t, min(T, t + queries))
            nb, nt = part[0].stop - b, part[1].stop - t
            scores = scratch[:nb * nt * stride].view(nb, nt, stride)
            window = {"starts": None if key_start is None else key_start[part], "ends": None if key_end is None else key_end[part],
                      "q_starts": q_start[part[0]] if by_batch and causal else None}
            where = t if by_batch else t + q_start
            short = 0 if return_scores or pool > 1 else top_k
            keys, scale = (k, k_scale) if table is not None else (k[part[0]], None if k_scale is None else k_scale[part[0]])
            index_score.score(q[part[0], :, part[1]], keys, weights[part[0], :, part[1]], scores, place=place, queries=config["queries"], stages=config["stages"],
                              T_all=T, k_scale=scale, table=None if table is None else table[part[0]], causal=causal, position=where, activation=activation, fill=False,
                              short=short, **window)
            if pool > 1:
                scores = pool_launch(scores, pooled[:nb * nt * row_stride(blocks)].view(nb, nt, row_stride(blocks)), S, pool, T, where, causal, window)
            select_rows.select_rows(scores, top_k, indices[part], lengths[part], None if values is None else values[part], place=place, config=config, T_all=T,
                                    causal=causal, position=where, width=S, pool=pool, force_first=force_first, force_last=force_last,
                                    everything=not return_scores, scratch=kept, **window)
    if table is not None and not return_scores:
        drop_holes[(B * T,)](indices, lengths, key_start, key_end, q_start if by_batch and causal else None, table, T, S, pool, top_k, table.stride(0), count,
                             0 if by_batch else q_start, CAUSAL=causal, PAGE=page, BLOCK=512, num_warps=4)
    return indices, lengths, values


def pool_launch(scores, pooled, S, pool, T_all, position, causal, window):
    """Scores of keys -> maxima of blocks, for one part of the rows."""
    nb, nt = pooled.shape[:2]
    blocks, width = pool_width(pool)
    count = -(-S // pool)
    if count:
        pool_rows[(nb * nt, min(64, triton.cdiv(count, blocks)))](scores, *window.values(), pooled, nt, T_all, S, count, pool, *scores.stride()[:2],
                                                                  *pooled.stride()[:2], position, CAUSAL=causal, BLOCKS=blocks, WIDTH=width, num_warps=4)
    return pooled
