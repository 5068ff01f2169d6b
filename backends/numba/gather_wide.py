"""Gradients of attention over selected keys in float64 by NumPy, one query and key head at a time: for float64 inputs, and for calls that
leave the range of float32. Slow and plain; a fixed order of additions."""
import numpy as np


def gradients(q, k, v, indices, lse, delta, dout, dq, dk, dv, *, lengths, granularity, causal, scale, softcap, kv_length, q_start):
    """Fills dq, dk, dv; arguments as in gather_attention_backward.run."""
    (B, Hq, T, _), (_, Hk, S, _), (G, K) = q.shape, v.shape, (indices.shape[1], indices.shape[3])
    units = max(G, Hk)
    heads = Hq // units
    sum_q, sum_k, sum_v = (np.zeros(x.shape) for x in (q, k, v))
    with np.errstate(all="ignore"):
        for b in range(B):
            limit = S if kv_length is None else min(max(int(kv_length[b]), 0), S)
            start = limit - T if q_start is None else int(q_start if np.ndim(q_start) == 0 else q_start[b])
            for unit in range(units):
                group, g = slice(unit * heads, unit * heads + heads), unit * G // units
                j = unit * heads // (Hq // Hk)
                for t in range(T):
                    count = K if lengths is None else min(max(int(lengths[b, g, t]), 0), K)
                    entries = indices[b, g, t, :count].astype(np.int64)
                    keys = (entries[entries >= 0][:, None] * granularity + np.arange(min(granularity, S))).reshape(-1)
                    keys = keys[keys < (min(limit, start + t + 1) if causal else limit)]
                    if not len(keys):
                        continue
                    x, y, total, shift, rk, rv = (a.astype(np.float64) for a in (q[b, group, t], dout[b, group, t], lse[b, group, t], delta[b, group, t],
                                                                                 k[b, j, keys], v[b, j, keys]))
                    score, slope = x @ rk.T * scale, 1.0
                    if softcap is not None:
                        share = np.tanh(score / softcap)
                        score, slope = share * softcap, 1 - share * share
                    there = np.isfinite(total)[:, None]
                    p = np.where(there, np.exp(score - np.where(there, total[:, None], 0)), 0)
                    ds = np.where(there, p * (y @ rv.T - shift[:, None]) * slope * scale, 0)
                    sum_q[b, group, t] = ds @ rk
                    np.add.at(sum_k[b, j], keys, ds.T @ x)
                    np.add.at(sum_v[b, j], keys, p.T @ y)
        for grad, total in ((dq, sum_q), (dk, sum_k), (dv, sum_v)):
            grad[...] = total.astype(grad.dtype)
