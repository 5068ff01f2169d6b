"""The top_k largest of every row, by one explicit stable sort.

    scores [B,T,S] float32  key_start, key_end [B,T]  ->  indices [B,T,top_k] int32 ascending, then -1; lengths [B,T] int32

Larger scores first, equal scores by the smaller index; -0.0 equals 0.0; NaN and -inf are never chosen.
"""
import numpy as np

from sparsetile.backends.contract import Resources

TUNABLES = ()


def supports(problem):
    return None


def resources(problem, config):
    return Resources()


def default_config(problem):
    return {}


def best(scores, candidates, count):
    """The `count` best of the candidate indices of one row of scores, ascending."""
    candidates = np.asarray(candidates)
    candidates = candidates[~np.isnan(scores[candidates]) & (scores[candidates] != -np.inf)]
    by_score = np.argsort(-scores[candidates], kind="stable")                        # candidates ascend, so ties keep the smaller index
    return np.sort(candidates[by_score[:count]])


def pad(chosen, top_k):
    row = np.full(top_k, -1, np.int32)
    row[:len(chosen)] = chosen
    return row


def run(scores, top_k, *, place=None, config=None, key_start=None, key_end=None):
    B, T, S = scores.shape
    indices, lengths = np.full((B, T, top_k), -1, np.int32), np.zeros((B, T), np.int32)
    for b in range(B):
        for t in range(T):
            start = 0 if key_start is None else max(0, int(key_start[b, t]))
            end = S if key_end is None else min(S, int(key_end[b, t]))
            chosen = best(scores[b, t], np.arange(start, max(start, end)), top_k)
            indices[b, t], lengths[b, t] = pad(chosen, top_k), len(chosen)
    return indices, lengths
