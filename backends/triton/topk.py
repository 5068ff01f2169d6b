"""The top_k largest of every row of scores, exact and deterministic.

    scores [B,T,S] float32 (rows may be strided)  key_start, key_end [B,T] int32  ->  indices [B,T,top_k] int32 ascending, then -1; lengths [B,T] int32

Larger scores first, equal scores by the smaller index; -0.0 equals 0.0; NaN and -inf are never chosen. Starts and ends outside 0..S are clamped, an end before
its start is an empty row. One read of a row where a sample of it gives a usable bound, four more where it does not.
"""
from sparsetile.backends.contract import Resources
from sparsetile.backends.triton import select_rows as rows

TUNABLES = rows.TUNABLES
LONGEST = 2 ** 31 - 2 ** 15  # positions of the last, partial block are still int32


def supports(problem):
    if problem.dtype("scores", "float32") != "float32":
        return f"top-k takes float32 scores, not {problem.dtype('scores')}; cast them"
    if problem["S"] > LONGEST:
        return f"rows of {problem['S']} scores are too long; split them into rows of at most {LONGEST} and merge"
    return None


def resources(problem, config):
    refused = rows.refusal(config)
    return refused or Resources(threads=32 * config["select_warps"], shared=8192)


def default_config(problem):
    return rows.default_knobs(problem["B"] * problem["T"], problem["S"], problem["K"], 132)


def artifacts(problem, config):
    return rows.row_artifacts(config, problem.arch, causal=False, forced=False, everything=False, windows=bool({"window", "key_start", "key_end"} & problem.features),
                              q_starts=False, values=False)


def run(scores, top_k, *, place, config, key_start=None, key_end=None):
    B, T, S = scores.shape
    indices, lengths = place.empty((B, T, top_k), "int32"), place.empty((B, T), "int32")
    rows.select_rows(scores, top_k, indices, lengths, place=place, config=config, T_all=T, starts=key_start, ends=key_end)
    return indices, lengths
