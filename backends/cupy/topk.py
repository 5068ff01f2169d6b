"""Exact, deterministic top-k of float32 rows, one block of threads a row.

    scores [B,T,S] float32 (any strides, last axis contiguous)  key_start, key_end [B,T] int32  ->  indices [B,T,top_k] int32, lengths [B,T] int32

Largest first chosen, equal scores by the smaller index, -0.0 equals 0.0, NaN and -inf never; indices ascending, then -1. Bounds may be anything: they are
clipped to 0..S, an empty or negative window gives length 0. Two kernels (topk.cu) with one meaning: a sampled one for top_k up to its `candidates`, and
radix passes over the row for every other top_k. Nothing waits for anything: whatever a row holds, it ends.
"""
from sparsetile.backends.contract import Resources, Tunable
from sparsetile.backends.cupy import compile as nvrtc

TUNABLES = (
    Tunable("threads", (256, 512, 1024), "threads that share a row"),
    Tunable("ahead", (4, 2), "16-byte loads a thread has in flight"),
    Tunable("ctas", (1, 2, 3, 4, 6), "rows that a multiprocessor should hold at once: bounds the registers"),
    Tunable("candidates", (4608, 3584, 9216), "scores kept in shared memory; top_k beyond candidates - 100 takes the radix kernel"),
)
FIELDS = "QQQQQQQ" + "qqq" + "iiiiiiiiii"
BINS = 2048


def supports(problem):
    if problem["S"] > 2 ** 31 - 16:
        return f"positions are int32: S = {problem['S']} is more than 2^31 - 16; split the rows and merge"
    return None


def words(config) -> int:
    """Words of the bitmap that puts positions in order; what is selected is staged in it. A thread reads at least four at once."""
    return max(2048 if config["candidates"] < 4096 else 4096 if config["candidates"] < 8192 else 8192, 4 * config["threads"])


def is_fast(top_k: int, config) -> bool:
    return top_k <= min(config["candidates"] - 100, words(config))


def shared_bytes(config, fast: bool) -> int:
    meeting = 4 * (config["threads"] // 32) + 20
    row = 4 * 8 + 4 * 10
    head = meeting + (-meeting) % 8 + row + 4 + 8
    return 4 * words(config) + head + 8 * config["candidates"] if fast else 4 * BINS + head


def resources(problem, config):
    if config["threads"] * config["ctas"] > 1536:
        return f"ctas: {config['ctas']} blocks of {config['threads']} threads leave too few registers for each thread"
    shared = shared_bytes(config, is_fast(problem["K"], config))
    if shared > nvrtc.shared_limit(problem.arch):
        return f"candidates: {config['candidates']} of them need {shared} bytes of shared memory, {problem.arch} has {nvrtc.shared_limit(problem.arch)}"
    return Resources(config["threads"], shared, min(255, 65536 // (config["threads"] * config["ctas"])))


def default_config(problem):
    return heuristic(problem["B"] * problem["T"], problem["S"], problem["K"])


def heuristic(rows: int, S: int, K: int) -> dict:
    """Few rows: all threads on each. Long rows: two loads ahead, three rows a multiprocessor. Others: small blocks, four rows. (Measured on an H100.)"""
    if rows <= 264:
        return dict(threads=1024, ahead=2, ctas=1, candidates=4608)
    if S > 65536 or K > 2048:
        return dict(threads=512, ahead=2, ctas=3, candidates=4608)
    return dict(threads=256, ahead=4, ctas=4, candidates=3584)


def defines(config) -> dict:
    return dict(NT=config["threads"], AHEAD=config["ahead"], CTAS=config["ctas"], CAP=config["candidates"], WORDS=words(config))


def artifacts(problem, config):
    return [dict(source="topk", defines=defines(config), names=["topk_fast", "topk_any"])]


def launch(place, config, rows, scores, strides, period, first_row, T, S, bounds, k, out, lengths, *, pool=1, force_first=0, force_last=0, take_all=False, chosen=None):
    """Selects for rows first_row .. of [B * T]. bounds: (key_start, key_end, q_starts, q_start, causal)."""
    start, end, q_starts, q_start, causal = bounds
    fast = is_fast(k, config)
    function = nvrtc.function("topk", "topk_fast" if fast else "topk_any", FIELDS, defines(config), place)
    function(rows, config["threads"], shared_bytes(config, fast), place.stream, scores, nvrtc.ptr(start), nvrtc.ptr(end), nvrtc.ptr(q_starts), out.ptr, lengths.ptr, nvrtc.ptr(chosen),
             strides[0], strides[1], first_row, period, T, S, pool, q_start, int(causal), k, force_first, force_last, int(take_all))


def run(scores, top_k, *, place, config, key_start=None, key_end=None):
    B, T, S = scores.shape
    indices, lengths = place.empty((B, T, top_k), "int32"), place.empty((B, T), "int32")
    if B * T == 0 or top_k == 0:
        return indices, lengths
    launch(place, config, B * T, scores.ptr, scores.strides, T, 0, T, S, (key_start, key_end, None, 0, False), top_k, indices, lengths)
    return indices, lengths
