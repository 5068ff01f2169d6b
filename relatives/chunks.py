"""Attention whose weights are products of features, weight(t, s) = fq[t] . fk[s] exp(log_k[s]), in time and memory linear in T and S.

Sums over keys are kept as one state [M, Dv + 1], whose last column sums the weights. The causal form goes chunk by chunk: products inside the chunk, the state before
it (arXiv 2006.16236, section 3.3). log_k counts from the largest that a query sees: nothing overflows, and no later key touches an earlier query.
"""
from sparsetile.ops import array_operators as xp


def attend(fq, fk, v, log_k, *, causal: bool, chunk: int):
    """fq [B,Hk,G,T,M] and fk [B,Hk,S,M], >= 0; v [B,Hk,S,Dv]; log_k [B,Hk,S]  ->  [B,Hk,G,T,Dv]

    Causal: query t stands at S - T + t. A query without keys, or whose weights are all 0 in this element type, gets 0.
    """
    lib, T, S = xp.module(fq), fq.shape[-2], fk.shape[-2]
    keys = fk[:, :, None], lib.concatenate((v, lib.ones_like(v[..., :1])), -1)[:, :, None], log_k[:, :, None]
    part = lambda a, b: (keys[0][..., a:b, :], keys[1][..., a:b, :], keys[2][..., a:b])  # noqa: E731
    blind = T if not S else max(0, T - S) if causal else 0                               # queries that see no key
    rows = [xp.zeros_of(fq, (*fq.shape[:-2], blind, v.shape[-1] + 1))]
    first = S - T if causal else S                                                       # keys before query 0
    state = _after(None, *part(0, first)) if first > 0 else None
    for a in range(blind, T, chunk):
        b = min(a + chunk, T)
        own = part(first + a, first + b) if causal else None
        rows.append(_rows(state, fq[..., a:b, :], own))
        state = _after(state, *own) if causal and b < T else state
    out = lib.concatenate(rows, -2)
    total = out[..., -1:]
    return out[..., :-1] / (total + (total == 0))


def _after(before, fk, v, log_k):
    """The state, and the log_k it counts from, after some more keys."""
    lib, top = xp.module(fk), xp.highest(log_k, -1)                                      # [B,Hk,1]
    if before is not None:
        top = lib.maximum(top, before[1])
    state = fk.swapaxes(-1, -2) @ (v * lib.exp(log_k - top[..., None])[..., None])       # [B,Hk,1,M,Dv+1]
    return state if before is None else state + before[0] * lib.exp(before[1] - top)[..., None, None], top


def _rows(before, fq, own):
    """Sums of weights and weighted values for queries [...,c,M]: over the keys before them and, of their `own` chunk, those up to themselves."""
    lib = xp.module(fq)
    if own is None:
        return fq @ before[0]
    fk, v, log_k = own
    seen = xp.arange(fq, fq.shape[-2])[:, None] >= xp.arange(fq, fq.shape[-2])
    log_k = lib.where(seen, log_k[..., None, :], -float("inf"))                          # [B,Hk,1,c,c]
    top = xp.highest(log_k, -1)[..., None]
    if before is not None:
        top = lib.maximum(top, before[1][..., None, None])
    out = ((fq @ fk.swapaxes(-1, -2)) * lib.exp(log_k - top)) @ v
    return out if before is None else out + (fq @ before[0]) * lib.exp(before[1][..., None, None] - top)
