"""Attention over selected keys, NumPy float64.

    q [B,Hq,T,D]  k [B,Hk,S,D]  v [B,Hk,S,Dv]  indices [B,G,T,K] int32, G in {1, Hk, Hq}  ->  out [B,Hq,T,Dv], lse [B,Hq,T]

Entry e >= 0 stands for keys e*granularity ... +granularity-1; entries outside 0 .. keys-1, keys at or past min(S, kv_length), and with `causal`
keys past the query's position mean nothing, wherever they stand. `lengths` [B,G,T] is clamped to 0..K; entries past it are not read.
An entry given twice counts twice. A row without keys: out 0, lse -inf.
latent (R, P): rows of k are bytes, the fp8 layout of a latent cache (positions.latents), whose first R columns are the values.
"""
import numpy as np

from sparsetile.backends.contract import Resources
from sparsetile.backends.reference import attend
from sparsetile.backends.reference.positions import dtype_of, first_query, key_limit, latents, lse_dtype

TUNABLES = ()


def supports(problem):
    return None


def resources(problem, config):
    return Resources()


def default_config(problem):
    return {}


def chosen_keys(entries, granularity, limit, last):
    """The keys that a row's entries stand for, in their order, a key as often as it is named. `last`: the last visible position."""
    entries = np.asarray(entries).astype(np.int64)                                   # e * granularity must not wrap around
    keys = (entries[:, None] * granularity + np.arange(granularity)).reshape(-1)
    named = np.repeat(entries >= 0, granularity)
    return keys[named & (keys < limit) & (keys <= last)]


def rows(indices, lengths, granularity, causal, B, Hq, Hk, T, S, kv_length, q_start):
    """(b, heads that share the row's list and its keys' head, that key head, t, keys) for every row that has keys."""
    G, K = indices.shape[1], indices.shape[3]
    together = Hq // max(G, Hk)
    for b in range(B):
        limit = key_limit(kv_length, b, S)
        start = first_query(q_start, b, limit, T)
        for h in range(0, Hq, together):
            g = h * G // Hq
            for t in range(T):
                length = K if lengths is None else int(np.clip(lengths[b, g, t], 0, K))
                keys = chosen_keys(indices[b, g, t, :length], granularity, limit, start + t if causal else S)
                if len(keys):
                    yield b, slice(h, h + together), h // (Hq // Hk), t, keys


def run(q, k, v, indices, *, place=None, config=None, lengths=None, granularity=1, causal=False, scale, sink_logits=None, softcap=None,
        kv_length=None, q_start=None, out_dtype=None, return_lse=True, latent=None):
    if latent is not None:
        k, v = latents(k, *latent)
    (B, Hq, T, _), (_, Hk, S, Dv) = q.shape, v.shape
    out = np.zeros((B, Hq, T, Dv), dtype_of(out_dtype, q.dtype))
    lse = np.full((B, Hq, T), -np.inf, lse_dtype(q))
    sinks = np.full(Hq, -np.inf) if sink_logits is None else attend.wide(sink_logits)
    with np.errstate(all="ignore"):
        for b, heads, j, t, keys in rows(indices, lengths, granularity, causal, B, Hq, Hk, T, S, kv_length, q_start):
            rk, rv = attend.wide(k[b, j][keys]), attend.wide(v[b, j][keys])
            for h in range(heads.start, heads.stop):
                o, e = attend.forward(attend.wide(q[b, h, t:t + 1]), rk, rv, np.ones((1, len(keys))), scale, softcap, sinks[h])
                out[b, h, t], lse[b, h, t] = o[0].astype(out.dtype), e[0]
    return out, lse if return_lse else None
