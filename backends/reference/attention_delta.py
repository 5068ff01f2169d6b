"""What the backwards need of every row, NumPy float64.

    out, dout [B,Hq,T,Dv]  lse [B,Hq,T] over keys  sink_logits [Hq]  dlse [B,Hq,T]  ->  lse_total, delta [B,Hq,T], dsink [Hq] or None

lse_total = log(exp(lse) + exp(sink)); delta = sum_d dout*out - dlse * exp(lse_total - lse), so that P (dout.v - delta) holds both gradients:
a key's share of the lse's gradient is dlse * exp(s - lse) = P * dlse * exp(lse_total - lse). Rows without keys: delta 0.
dsink_h = -sum over b, t of exp(sink_h - lse_total) * sum_d dout*out; nothing for a sink of -inf or +inf.
"""
import numpy as np

from sparsetile.backends.contract import Resources
from sparsetile.backends.reference.attend import wide
from sparsetile.backends.reference.positions import lse_dtype

TUNABLES = ()


def supports(problem):
    return None


def resources(problem, config):
    return Resources()


def default_config(problem):
    return {}


def run(out, dout, lse, *, place=None, config=None, sink_logits=None, dlse=None):
    with np.errstate(all="ignore"):
        keys = wide(lse)
        sink = np.full(lse.shape[1], -np.inf) if sink_logits is None else wide(sink_logits)
        total = np.where(np.isposinf(sink)[:, None], np.inf, np.logaddexp(keys, sink[:, None]))
        empty = keys == -np.inf
        delta0 = np.where(empty, 0.0, (wide(out) * wide(dout)).sum(axis=-1))
        delta = delta0
        if dlse is not None:
            # Where the sink holds all but exp(-80) of the row, P is 0 in float32: a larger factor could only make 0 * inf of it.
            delta = delta0 - np.where(empty, 0.0, wide(dlse) * np.exp(np.minimum(total - keys, 80.0)))
        dsink = None
        if sink_logits is not None:
            share = np.where(np.isfinite(sink)[:, None], np.exp(sink[:, None] - total), 0.0)
            dsink = -(share * delta0).sum(axis=(0, 2)).astype(np.float32)
    kind = lse_dtype(lse)
    return total.astype(kind), delta.astype(kind), dsink
