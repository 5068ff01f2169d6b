"""Gradients of attention over the blocks of a layout, NumPy float64.

    q [B,Hq,T,D]  k [B,Hk,S,D]  v [B,Hk,S,Dv]  lse, delta [B,Hq,T]  dout [B,Hq,T,Dv]  ->  dq, dk, dv shaped like q, k, v

lse is the total logsumexp, sink included; delta is that of `attention_delta`. Rows whose lse is not finite have no gradient.
With P = exp(s - lse): dv = P^T dout, dS = P (dout v^T - delta) ds/dx, dq = scale dS k, dk = scale dS^T q; dk and dv are summed over the group.
"""
import numpy as np

from sparsetile.backends.reference import attend
from sparsetile.backends.reference.block_attention import TUNABLES, default_config, masks, resources, supports  # noqa: F401
from sparsetile.backends.reference.positions import dtype_of


def run(q, k, v, lists, lse, delta, dout, *, place=None, config=None, scale, softcap=None, kv_length=None, q_start=None, deterministic=True, out_dtype=None):
    (B, Hq, T, _), (_, Hk, S, _) = q.shape, v.shape
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    with np.errstate(all="ignore"):
        for b, h, mask in masks(lists, B, Hq, T, S, kv_length, q_start):
            keys = np.flatnonzero(mask.any(axis=0))
            j = h // (Hq // Hk)
            gq, gk, gv = attend.backward(attend.wide(q[b, h]), attend.wide(k[b, j][keys]), attend.wide(v[b, j][keys]), mask[:, keys],
                                         attend.wide(lse[b, h]), attend.wide(delta[b, h]), attend.wide(dout[b, h]), scale, softcap)
            dq[b, h] = gq
            dk[b, j][keys] += gk
            dv[b, j][keys] += gv
    return tuple(g.astype(dtype_of(out_dtype, x.dtype)) for g, x in ((dq, q), (dk, k), (dv, v)))
