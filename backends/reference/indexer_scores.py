"""Scores of a lightning indexer, NumPy float64, rounded once to float32.

    q [B,H,T,D]  k [B,S,D]  weights [B,H,T]  k_scale [B,S]  key_start, key_end [B,T]  ->  scores [B,T,S] float32

score[t,s] = k_scale[s] * sum_h weights[h,t] * relu(q[h,t] . k[s]); -inf outside [key_start, key_end) and, if causal, past q_start + t.
With table [B,pages] int32, k [N,page,D] and k_scale [N,page] are pages; keys in a page that is not one of 0 .. N - 1 score -inf.
"""
import numpy as np

from sparsetile.backends.contract import Resources
from sparsetile.backends.reference.attend import wide
from sparsetile.backends.reference.positions import through_pages

TUNABLES = ()


def supports(problem):
    return None


def resources(problem, config):
    return Resources()


def default_config(problem):
    return {}


def visible_keys(b, T, S, key_start, key_end, causal, q_start):
    """[T, S] booleans: in the row's window and, if causal, not past the query."""
    s, t = np.arange(S), np.arange(T)
    seen = np.ones((T, S), bool)
    if key_start is not None:
        seen &= s >= np.asarray(key_start)[b][:, None]
    if key_end is not None:
        seen &= s < np.asarray(key_end)[b][:, None]
    if causal:
        start = int(q_start if np.ndim(q_start) == 0 else q_start[b])
        seen &= s <= start + t[:, None]
    return seen


def keys_of(k, k_scale, table):
    """Keys and scales in the order of a page table, and [B,S] whether they exist."""
    if table is None:
        return k, k_scale, np.ones(k.shape[:2], bool)
    k, there = through_pages(k, table)
    return k, None if k_scale is None else through_pages(k_scale[..., None], table)[0][..., 0], there


def batch_scores(q, k, weights, k_scale, activation, seen):
    """One batch: q [H,T,D], k [S,D], weights [H,T], k_scale [S], seen [T,S] -> [T,S] float32."""
    total = np.zeros(seen.shape)
    for h in range(q.shape[0]):
        product = wide(q[h]) @ wide(k).T
        total += wide(weights[h])[:, None] * (np.where(product < 0, 0.0, product) if activation == "relu" else product)
    if k_scale is not None:
        total = total * wide(k_scale)
    return np.where(seen, total, -np.inf).astype(np.float32)


def run(q, k, weights, *, place=None, config=None, k_scale=None, key_start=None, key_end=None, causal=True, q_start=0, activation="relu", table=None):
    k, k_scale, there = keys_of(k, k_scale, table)
    B, T, S = q.shape[0], q.shape[2], k.shape[1]
    out = np.empty((B, T, S), np.float32)
    with np.errstate(all="ignore"):
        for b in range(B):
            seen = visible_keys(b, T, S, key_start, key_end, causal, q_start) & there[b]
            out[b] = batch_scores(q[b], k[b], weights[b], None if k_scale is None else k_scale[b], activation, seen)
    return out
