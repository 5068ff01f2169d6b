"""The top_k most important blocks of keys, by all importances and a full sort, NumPy float64.

    q [B,Hq,T,D]  k [B,Hk,C,D]  lse [B,Hq,T]  key_end, block_end [B,Hk,T] int32  ->  indices [B,Hk,T,top_k] int32 ascending, then -1; lengths [B,Hk,T]; scores or None

importance[j] = sum over the group's heads h, m < step, n < reach of exp(scale * q_h . k_i - lse_h) with i = step * j + m - n, 0 <= i < key_end.
Blocks j < block_end compete as scores do in `topk`; the first `force_first` and last `force_last` of them are taken whatever their importance.
"""
import numpy as np

from sparsetile.backends.contract import Resources
from sparsetile.backends.reference.attend import wide
from sparsetile.backends.reference.indexer_topk import choose
from sparsetile.backends.reference.topk import pad

TUNABLES = ()


def supports(problem):
    return None


def resources(problem, config):
    return Resources()


def default_config(problem):
    return {}


def importances(q, k, lse, key_end, blocks, reach, step, scale):
    """One group: q [G,T,D], k [C,D], lse [G,T], key_end [T] -> [T, blocks] float32."""
    C = k.shape[0]
    seen = np.arange(C) < np.asarray(key_end)[:, None]                               # [T, C]
    shares = np.zeros(seen.shape)
    for h in range(q.shape[0]):
        shares += np.where(seen, np.exp(scale * (wide(q[h]) @ wide(k).T) - wide(lse[h])[:, None]), 0.0)
    total = np.zeros((seen.shape[0], blocks))
    for m in range(step):
        for n in range(reach):
            i = step * np.arange(blocks) + m - n
            there = (i >= 0) & (i < C)
            total[:, there] += shares[:, i[there]]
    return total.astype(np.float32)


def run(q, k, lse, top_k, *, place=None, config=None, key_end, block_end, blocks, reach, step, scale, force_first=0, force_last=0, return_scores=False):
    (B, Hq, T, _), Hk = q.shape, k.shape[1]
    group = Hq // Hk
    indices, lengths = np.full((B, Hk, T, top_k), -1, np.int32), np.zeros((B, Hk, T), np.int32)
    chosen_scores = np.full((B, Hk, T, top_k), -np.inf, np.float32)
    with np.errstate(all="ignore"):
        for b in range(B):
            for j in range(Hk):
                heads = slice(j * group, (j + 1) * group)
                found = importances(q[b, heads], k[b, j], lse[b, heads], key_end[b, j], blocks, reach, step, scale)
                for t in range(T):
                    chosen = choose(found[t], np.arange(blocks) < block_end[b, j, t], top_k, force_first, force_last, not return_scores)
                    indices[b, j, t], lengths[b, j, t] = pad(chosen, top_k), len(chosen)
                    chosen_scores[b, j, t, :len(chosen)] = found[t, chosen]
    return indices, lengths, chosen_scores if return_scores else None
