"""Gradients of the scores of a lightning indexer, NumPy float64, rounded once to float32.

    q [B,H,T,D]  k [B,S,D]  weights [B,H,T]  k_scale [B,S]  dscores [B,T,S]  ->  dq [B,H,T,D], dk [B,S,D], dweights [B,H,T] float32

With x = q . k and g = dscores * k_scale where the query sees the key, else 0: dweights = sum_s g relu(x); dA = g weights where x > 0; dq = dA k; dk = sum dA^T q.
"""
import numpy as np

from sparsetile.backends.reference.attend import weighted_sum, wide
from sparsetile.backends.reference.indexer_scores import TUNABLES, default_config, resources, supports, visible_keys  # noqa: F401


def run(q, k, weights, dscores, *, place=None, config=None, k_scale=None, key_start=None, key_end=None, causal=True, q_start=0, activation="relu"):
    (B, H, T, D), S = q.shape, k.shape[1]
    dq, dk, dweights = np.zeros((B, H, T, D)), np.zeros((B, S, D)), np.zeros((B, H, T))
    with np.errstate(all="ignore"):
        for b in range(B):
            seen = visible_keys(b, T, S, key_start, key_end, causal, q_start)
            g = np.where(seen, wide(dscores[b]) * (1.0 if k_scale is None else wide(k_scale[b])), 0.0)
            for h in range(H):
                x = wide(q[b, h]) @ wide(k[b]).T
                steep = seen & ~(x <= 0) if activation == "relu" else seen
                da = np.where(steep, g * wide(weights[b, h])[:, None], 0.0)
                dweights[b, h] = np.where(steep, g * x, 0.0).sum(axis=1)
                dq[b, h] = weighted_sum(da, steep, wide(k[b]))
                dk[b] += weighted_sum(da.T, steep.T, wide(q[b, h]))
    return dq.astype(np.float32), dk.astype(np.float32), dweights.astype(np.float32)
