"""What the backwards need of every row: the whole logsumexp with the sink, delta = sum(dO * O) less the LSE's own gradient, and the sink's gradient.

    out, dout [B,Hq,T,Dv], lse, dlse [B,Hq,T], sink_logits [Hq]  ->  lse_total, delta [B,Hq,T], dsink [Hq] float32 or None

A head's rows belong to one thread, so the sink's gradient is added in one order whatever the number of threads.
"""
import numpy as np
from numba import prange

from sparsetile.backends.contract import Resources
from sparsetile.backends.numba.jit import kernel

TUNABLES = ()
FLOATS = ("float32", "float16", "bfloat16", "float64")


@kernel(parallel=True)
def rows_of_heads(out, dout, lse, dlse, sinks, total, delta, shares):
    """out, dout [heads,T,Dv], the rest [heads,T]; sinks, shares [heads]"""
    heads, T, Dv = out.shape
    for n in prange(heads):
        h = np.int64(n)
        sink, share = sinks[h], 0.0
        for t in range(T):
            product = 0.0
            for d in range(Dv):
                product += np.float64(out[h, t, d]) * np.float64(dout[h, t, d])
            keys = np.float64(lse[h, t])
            most = max(keys, sink)
            whole = most
            if not np.isinf(most):
                whole = most + np.log(np.exp(keys - most) + np.exp(sink - most))
            total[h, t] = whole
            if np.isinf(keys):  # nothing was seen: out is 0 and nothing flows
                product = 0.0
            elif not np.isinf(whole):
                if not np.isinf(sink):
                    share += np.exp(sink - whole) * product
                # P holds exp(keys - whole) of the keys' own share; where that is under exp(-80), P is 0 and a larger factor could only make 0 * inf of it
                product -= np.float64(dlse[h, t]) * np.exp(min(whole - keys, 80.0))
            delta[h, t] = product
        shares[h] = share


def supports(problem):
    kind = problem.dtype("out", "float32")
    return None if kind in FLOATS else f"the numba kernel takes {', '.join(FLOATS)}, not {kind}; cast the arrays"


def resources(problem, config):
    return Resources()


def default_config(problem):
    return {}


def run(out, dout, lse, *, place, config, sink_logits=None, dlse=None):
    B, Hq, T, Dv = out.shape
    wide = np.float64 if out.dtype == np.float64 else np.float32
    flat = lambda x: np.ascontiguousarray(x, wide).reshape(B * Hq, T, *x.shape[3:])  # noqa: E731
    sinks = np.full(Hq, -np.inf) if sink_logits is None else sink_logits.astype(np.float64)
    total, delta, shares = np.empty((B * Hq, T), wide), np.empty((B * Hq, T), wide), np.zeros(B * Hq)
    slopes = np.zeros((B * Hq, T), wide) if dlse is None else flat(dlse)
    rows_of_heads(flat(out), flat(dout), flat(lse), slopes, np.tile(sinks, B), total, delta, shares)
    dsink = None if sink_logits is None else -shares.reshape(B, Hq).sum(0).astype(np.float32)
    return total.reshape(B, Hq, T), delta.reshape(B, Hq, T), dsink
