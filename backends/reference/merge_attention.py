"""Attention over disjoint sets of keys, put together by their LSE, NumPy float64.

    outs: N arrays [B,H,T,Dv]  lses: N arrays [B,H,T]  sink_logits [H]  ->  out [B,H,T,Dv], lse [B,H,T]

A part whose lse is -inf holds nothing and is not read. All empty: out 0, lse -inf. The sink enters the denominator, not the lse.
With weights, N arrays [B,H,T,1], in place of lses (None): out is the sum of weights[n] * outs[n], lse None.
"""
import numpy as np

from sparsetile.backends.contract import Resources
from sparsetile.backends.reference.attend import wide
from sparsetile.backends.reference.positions import dtype_of, lse_dtype

TUNABLES = ()


def supports(problem):
    return None


def resources(problem, config):
    return Resources()


def default_config(problem):
    return {}


def run(outs, lses, *, place=None, config=None, sink_logits=None, out_dtype=None, weights=None):
    with np.errstate(all="ignore"):
        if weights is not None:
            out = sum(wide(w) * wide(o) for w, o in zip(weights, outs))
            return out.astype(dtype_of(out_dtype, outs[0].dtype)), None
        parts = np.stack([wide(e) for e in lses])                                     # [N, B, H, T]
        lse = np.logaddexp.reduce(parts, axis=0)
        total = lse
        if sink_logits is not None:
            sink = wide(sink_logits)[:, None]
            total = np.where(np.isposinf(sink), np.inf, np.logaddexp(lse, sink))
        out = np.zeros(outs[0].shape)
        for o, e in zip(outs, parts):
            weight = np.exp(e - total)
            holds = (e != -np.inf)[..., None]
            out += np.where(holds, weight[..., None] * np.where(holds, wide(o), 0.0), 0.0)
    return out.astype(dtype_of(out_dtype, outs[0].dtype)), lse.astype(lse_dtype(lses[0]))
