"""Gradients of attention over selected keys, NumPy float64; shapes and formulas as in block_attention_backward, entries as in gather_attention."""
import numpy as np

from sparsetile.backends.reference import attend
from sparsetile.backends.reference.gather_attention import TUNABLES, default_config, resources, rows, supports  # noqa: F401
from sparsetile.backends.reference.positions import dtype_of


def run(q, k, v, indices, lse, delta, dout, *, place=None, config=None, lengths=None, granularity=1, causal=False, scale, softcap=None,
        kv_length=None, q_start=None, deterministic=True, out_dtype=None):
    (B, Hq, T, _), (_, Hk, S, _) = q.shape, v.shape
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    with np.errstate(all="ignore"):
        for b, heads, j, t, keys in rows(indices, lengths, granularity, causal, B, Hq, Hk, T, S, kv_length, q_start):
            rk, rv = attend.wide(k[b, j][keys]), attend.wide(v[b, j][keys])
            row = [attend.wide(x[b, heads, t]) for x in (q, lse, delta, dout)]
            gq, gk, gv = attend.backward(row[0], rk, rv, np.ones((len(row[0]), len(keys))), *row[1:], scale, softcap)
            dq[b, heads, t] = gq
            np.add.at(dk[b, j], keys, gk)                                            # a key named twice collects twice
            np.add.at(dv[b, j], keys, gv)
    return tuple(g.astype(dtype_of(out_dtype, x.dtype)) for g, x in ((dq, q), (dk, k), (dv, v)))
