"""The textbook formula of attention for one head, in float64; block and gather attention differ only in which keys a query sees.

`count` [T, S] says how often query t sees key s: 0 not at all, 2 when a selection names the key twice.
Nothing is ever multiplied with a key that its query does not see, so NaN in such keys stays there.
"""
import numpy as np


def wide(x):
    return np.asarray(x).astype(np.float64)


def weighted_sum(weights, count, values):
    """sum_s weights[t, s] * values[s] over the keys that t sees -> [T, ...]. 0 * NaN of an unseen key does not count."""
    finite = np.isfinite(values).all(axis=-1)
    total = np.where(count > 0, weights, 0.0) @ np.where(finite[:, None], values, 0.0)
    for s in np.flatnonzero(~finite):
        seen = count[:, s] > 0
        total[seen] += weights[seen, s, None] * values[s]
    return total


def scores(q, k, scale, softcap):
    """[T, S] scores, and their derivative by q.k*scale."""
    x = (q @ k.T) * scale
    if softcap is None:
        return x, np.ones_like(x)
    squashed = np.tanh(x / softcap)
    return softcap * squashed, 1.0 - squashed ** 2


def forward(q, k, v, count, scale, softcap=None, sink=-np.inf):
    """q [T,D], k [S,D], v [S,Dv] -> out [T,Dv], lse [T] over the keys alone. A row without keys: 0, -inf."""
    x, _ = scores(q, k, scale, softcap)
    x = np.where(count > 0, x, -np.inf)
    top = np.max(x, axis=1, initial=-np.inf)
    base = np.where(top == -np.inf, 0.0, top)
    weights = np.where(count > 0, count * np.exp(x - base[:, None]), 0.0)
    lse = base + np.log(weights.sum(axis=1))
    # softmax over keys, then the share that the sink leaves to them: 1 / (1 + exp(sink - lse))
    probabilities = np.where(count > 0, count * np.exp(x - np.where(lse == -np.inf, 0.0, lse)[:, None]), 0.0)
    share = np.exp(lse - np.logaddexp(lse, sink)) if np.isfinite(sink) else np.full_like(lse, 0.0 if sink > 0 else 1.0)
    out = weighted_sum(probabilities, count, v) * share[:, None]
    return np.where((lse == -np.inf)[:, None], 0.0, out), lse


def backward(q, k, v, count, lse_total, delta, dout, scale, softcap=None):
    """Gradients of one head from the total logsumexp (sink included) and delta -> dq [T,D], dk [S,D], dv [S,Dv]."""
    # A row without keys (or with everything in the sink) has no gradient, whatever stands in it.
    count = np.where(np.isfinite(lse_total)[:, None], count, 0)
    x, slope = scores(q, k, scale, softcap)
    base = x.max(axis=1, initial=-np.inf, where=count > 0)
    base = np.where(np.isfinite(base), base, 0.0)
    whole = base + np.log((count * np.exp(np.where(count > 0, x - base[:, None], -np.inf))).sum(axis=1))
    lse_total = np.where(whole.astype(np.float32) == lse_total, whole, lse_total)    # as it was before it was rounded, where no sink is in it
    p = np.where(count > 0, count * np.exp(x - np.where(np.isfinite(lse_total), lse_total, 0.0)[:, None]), 0.0)
    ds = np.where(count > 0, p * (dout @ v.T - delta[:, None]) * slope * scale, 0.0)
    dq = weighted_sum(ds, count, k)
    dk = weighted_sum(ds.T, count.T, q)
    dv = weighted_sum(p.T, count.T, dout)
    return dq, dk, dv
