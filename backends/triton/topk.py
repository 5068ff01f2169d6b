"""The top_k largest of every row of scores, exact and deterministic.

    scores [B,T,S] float32 (rows may be strided)  key_start, key_end [B,T] int32  ->  indices [B,T,top_k] int32 ascending, then -1; lengths [B,T] int32

Larger scores first, equal scores by the smaller index; -0.0 equals 0.0; NaN and -inf are never chosen. Starts and ends outside 0..S are clamped, an end before
its start is an empty row. One read of a row where a sample of it gives a usable bound, four more where it does not: by three kernels (select_rows.py), or on Hopper,
path "gluon", by one (topk_gluon.py).
"""
from dataclasses import replace

from sparsetile.backends.contract import Resources, Tunable
from sparsetile.backends.triton import select_rows as rows
from sparsetile.backends.triton.gluon_paths import lacking

TUNABLES = (
    Tunable("path", ("portable", "gluon"), "gluon: one kernel instead of three, on sm_90a"),
    *(replace(knob, paths=("portable",)) if knob.name == "splits" else knob for knob in rows.TUNABLES),
    Tunable("programs", (2, 3, 1, 4), "programs that a multiprocessor should hold at once: bounds the registers", ("gluon",)),
)
LONGEST = 2 ** 31 - 2 ** 15  # positions of the last, partial block are still int32


def supports(problem):
    if problem.dtype("scores", "float32") != "float32":
        return f"top-k takes float32 scores, not {problem.dtype('scores')}; cast them"
    if problem["S"] > LONGEST:
        return f"rows of {problem['S']} scores are too long; split them into rows of at most {LONGEST} and merge"
    return None


def resources(problem, config):
    refused = rows.refusal(config)
    if config["path"] == "gluon":
        warps, programs = config["select_warps"], config["programs"]
        if warps * programs > 32 or config["capacity"] * programs > 12288:
            refused = refused or f"{programs} programs of {warps} warps leave too few registers for {config['capacity']} candidates; take fewer programs or candidates"
        if min(config["sample"], 4 * config["capacity"]) < 128 * warps:
            refused = refused or f"{warps} warps look at {128 * warps} scores at least; take a larger sample or fewer warps"
        refused = lacking(problem) or refused
    return refused or Resources(threads=32 * config["select_warps"], shared=8192 if config["path"] == "portable" else 4 * config["capacity"])


def default_config(problem):
    """Few rows: all warps on each. Long rows: three programs a multiprocessor, one of which searches while others read. (Measured on an H100, from 32768 scores on.)"""
    config = portable_config(problem)
    if problem["S"] >= 32768 and lacking(problem) is None and rows.candidates(problem["S"], problem["K"], config["sample"]) <= config["capacity"] <= 4096:
        few = problem["B"] * problem["T"] <= 264
        warps, programs = (16, 1) if few else (8, 3 if problem["S"] > 65536 else 2)
        config |= dict(path="gluon", select_warps=warps, programs=programs, sample=max(config["sample"], 128 * warps))
    return config


def portable_config(problem):
    return dict(path="portable", **rows.default_knobs(problem["B"] * problem["T"], problem["S"], problem["K"], 132), programs=2)


def artifacts(problem, config):
    windows = bool({"window", "key_start", "key_end"} & problem.features)
    if config["path"] == "gluon":
        from sparsetile.backends.triton import topk_gluon
        return topk_gluon.artifacts(config, windows)
    return rows.row_artifacts(config, problem.arch, causal=False, forced=False, everything=False, windows=windows, q_starts=False, values=False)


def run(scores, top_k, *, place, config, key_start=None, key_end=None):
    B, T, S = scores.shape
    indices, lengths = place.empty((B, T, top_k), "int32"), place.empty((B, T), "int32")
    if config["path"] == "gluon":
        from sparsetile.backends.triton import topk_gluon
        topk_gluon.launch(scores, top_k, indices, lengths, place, config, key_start, key_end)
    else:
        rows.select_rows(scores, top_k, indices, lengths, place=place, config=config, T_all=T, starts=key_start, ends=key_end)
    return indices, lengths
