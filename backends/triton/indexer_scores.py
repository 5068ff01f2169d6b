"""Scores of a lightning indexer.

    q [B,H,T,D]  k [B,S,D]  weights [B,H,T] float32  k_scale [B,S] float32  key_start, key_end [B,T] int32  ->  scores [B,T,S] float32

score[t,s] = k_scale[s] * sum_h weights[h,t] * relu(q[h,t] . k[s]); exactly -inf outside [key_start, key_end) and, if causal, past q_start + t. Tiles that no query
sees are filled, not computed. With table [B,pages] int32, k [N,page,D] and k_scale [N,page] are pages, read where they lie; keys in a page that is not one of 0 .. N - 1
score -inf. NaN and infinities spread as in the formula and stay with their key.
"""
from sparsetile.backends.contract import Resources, Tunable
from sparsetile.backends.triton import index_score, pages
from sparsetile.backends.triton.launch import shared_limit

TUNABLES = (
    Tunable("queries", (16, 4, 8, 32, 64), "queries of one program, which share its tile of keys"),
    Tunable("stages", (2, 1, 3, 4), "loads of queries in flight"),
)


def supports(problem):
    return index_score.refusal(problem)


def resources(problem, config):
    shared = index_score.shared_bytes(problem, config["stages"])
    limit = shared_limit(problem.arch)
    if shared > limit:
        return f"{config['stages']} stages of queries need {shared} bytes of shared memory, {problem.arch} has {limit}; take fewer stages"
    return Resources(threads=128, shared=shared)


def default_config(problem):
    T = problem["T"]
    config = {"queries": 4 if T <= 4 else 16 if T < 512 else 32, "stages": 2 if problem.arch == "gfx942" else 3}
    while config["stages"] > 1 and isinstance(resources(problem, config), str):
        config["stages"] -= 1
    return config


def artifacts(problem, config):
    return [index_score.score_artifact(problem, queries=config["queries"], stages=config["stages"], fill=True)]


def run(q, k, weights, *, place, config, k_scale=None, key_start=None, key_end=None, causal=True, q_start=0, activation="relu", table=None):
    B, T, S = q.shape[0], q.shape[2], pages.sizes(table, k)[0]
    scores = place.empty((B, T, S), "float32")
    by_batch = not isinstance(q_start, int)
    index_score.score(q, k, index_score.near_heads(weights), scores, place=place, queries=config["queries"], stages=config["stages"], T_all=T, k_scale=k_scale, starts=key_start,
                      ends=key_end, q_starts=q_start if by_batch else None, causal=causal, position=0 if by_batch else q_start, activation=activation, table=table)
    return scores
