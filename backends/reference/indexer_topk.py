"""The top_k keys of a lightning indexer, or blocks of `pool` keys, by a full sort of `indexer_scores`.

    q [B,H,T,D]  k [B,S,D]  weights [B,H,T]  ->  indices [B,T,top_k] int32 ascending, then -1; lengths [B,T]; scores [B,T,top_k] or None

A row with no more than top_k visible entries is answered with all of them, unless scores are asked for; else as in `topk`.
pool > 1: entries are blocks, a block's score is the maximum over its visible keys, NaN passed over. The first `force_first` and last `force_last`
blocks that hold visible keys are always taken, whatever their score, and count in top_k.
scores are those of the entries, -inf where the index is -1.
"""
import numpy as np

from sparsetile.backends.contract import Resources
from sparsetile.backends.reference.indexer_scores import batch_scores, keys_of, visible_keys
from sparsetile.backends.reference.topk import best, pad

TUNABLES = ()


def supports(problem):
    return None


def resources(problem, config):
    return Resources()


def default_config(problem):
    return {}


def pooled(scores, seen, pool):
    """[T,S] scores and visibility of keys -> [T, ceil(S / pool)] of blocks."""
    T, S = scores.shape
    blocks = -(-S // pool)
    padded = np.full((T, blocks * pool), -np.inf, np.float32)
    padded[:, :S] = np.where(np.isnan(scores) | ~seen, -np.inf, scores)
    held = np.zeros((T, blocks * pool), bool)
    held[:, :S] = seen
    return padded.reshape(T, blocks, pool).max(axis=2, initial=-np.inf), held.reshape(T, blocks, pool).any(axis=2)


def choose(scores, visible, top_k, force_first, force_last, take_all):
    """One row: entries chosen, ascending."""
    candidates = np.flatnonzero(visible)
    if take_all and len(candidates) <= top_k:
        return candidates
    forced = list(candidates[:force_first])
    forced += [c for c in candidates[len(candidates) - min(force_last, len(candidates)):] if c not in forced]
    forced = forced[:top_k]
    others = best(scores, np.setdiff1d(candidates, forced), top_k - len(forced))
    return np.sort(np.concatenate([np.array(forced, np.int64), others]))


def run(q, k, weights, top_k, *, place=None, config=None, k_scale=None, key_start=None, key_end=None, causal=True, q_start=0, activation="relu",
        pool=1, force_first=0, force_last=0, return_scores=False, table=None):
    k, k_scale, there = keys_of(k, k_scale, table)
    B, T, S = q.shape[0], q.shape[2], k.shape[1]
    indices, lengths = np.full((B, T, top_k), -1, np.int32), np.zeros((B, T), np.int32)
    chosen_scores = np.full((B, T, top_k), -np.inf, np.float32)
    with np.errstate(all="ignore"):
        for b in range(B):
            seen = visible_keys(b, T, S, key_start, key_end, causal, q_start) & there[b]
            scores, visible = batch_scores(q[b], k[b], weights[b], None if k_scale is None else k_scale[b], activation, seen), seen
            if pool > 1:
                scores, visible = pooled(scores, seen, pool)
            for t in range(T):
                chosen = choose(scores[t], visible[t], top_k, force_first, force_last, not return_scores)
                indices[b, t], lengths[b, t] = pad(chosen, top_k), len(chosen)
                chosen_scores[b, t, :len(chosen)] = scores[t, chosen]
    return indices, lengths, chosen_scores if return_scores else None
