"""Attention over the blocks of a layout, NumPy float64.

    q [B,Hq,T,D]  k [B,Hk,S,D]  v [B,Hk,S,Dv]  lists: contract.Lists  ->  out [B,Hq,T,Dv], lse [B,Hq,T]

The lists are unfolded into a dense boolean mask, and the textbook formula applied to it: slow, and right by inspection.
Query t stands at q_start + t; keys at or past min(S, kv_length) do not exist. A row without keys: out 0, lse -inf.
The sink stands in the denominator only, not in the lse. NaN in a key that a query does not see does not reach it.
With table [B,pages] int32 keys and values are pages [N,Hk,page,D] and [N,Hk,page,Dv]; keys in a page that is not one of 0 .. N - 1 do not exist.
latent (R, P): rows of k are bytes, the fp8 layout of a latent cache (positions.latents), whose first R columns are the values.
q_scale [B,Hq,T], k_scale and v_scale [B,Hk,ceil(S/128)]: what rows of float8 are multiplied by.
"""
import numpy as np

from sparsetile.backends.contract import Resources, Tunable
from sparsetile.backends.reference import attend
from sparsetile.backends.reference.positions import dtype_of, first_query, key_limit, latents, lse_dtype, scaled, through_pages

TUNABLES = (Tunable("block_q", (64, 16, 32, 128), "queries per block of the layout"),
            Tunable("block_k", (64, 32, 128), "keys per block of the layout"))


def supports(problem):
    return None


def resources(problem, config):
    return Resources()


def default_config(problem):
    return {"block_q": 64, "block_k": 64}


def partial_block(lists, kind):
    """The [block_q, block_k] booleans of an entry: -1 full, 2n row n of intervals, 2n+1 row n of bitmaps."""
    columns = np.arange(lists.block_k)
    if kind < 0:
        return np.ones((lists.block_q, lists.block_k), bool)
    if kind % 2 == 0:
        low, high = np.asarray(lists.intervals)[kind // 2].astype(np.int64).T     # each [block_q]
        return (low[:, None] <= columns) & (columns < high[:, None])
    words = np.asarray(lists.bitmaps)[kind // 2].astype(np.int64) & 0xFFFFFFFF     # [block_q, block_k / 32]
    return (words[:, columns // 32] >> (columns % 32)) & 1 == 1


def unfold(lists, l, T, S, q_start, limit):
    """List l as a dense mask [T, S] of booleans, for queries q_start .. q_start + T - 1 and keys below the limit."""
    mask = np.zeros((T, S), bool)
    offsets, cols, kinds = (np.asarray(a).astype(np.int64) for a in (lists.offsets, lists.cols, lists.kinds))
    for i in range(lists.nq):
        slots = np.arange(i * lists.block_q, (i + 1) * lists.block_q)
        p = slots + lists.first * lists.block_q if lists.q_order is None else np.asarray(lists.q_order)[slots].astype(np.int64)
        t = p - q_start
        rows = (t >= 0) & (t < T) & ((p >= 0) | (lists.q_order is None))
        if not rows.any():
            continue
        x = 2 * (l * lists.nq + i)
        for entry in range(offsets[x], offsets[x + 2]):
            slots = np.arange(cols[entry] * lists.block_k, (cols[entry] + 1) * lists.block_k)
            s = slots if lists.k_order is None else np.asarray(lists.k_order)[slots].astype(np.int64)
            keys = (s >= 0) & (s < limit)
            block = partial_block(lists, -1 if entry < offsets[x + 1] else kinds[entry])
            mask[np.ix_(t[rows], s[keys])] |= block[np.ix_(rows, keys)]
    return mask


def masks(lists, B, Hq, T, S, kv_length, q_start):
    """((b, h, mask [T,S]) for every batch and head); a mask that several heads share is unfolded once."""
    list_of = np.asarray(lists.list_of)
    known = {}
    for b in range(B):
        limit = key_limit(kv_length, b, S)
        start = first_query(q_start, b, limit, T)
        for h in range(Hq):
            l = int(list_of[b if list_of.shape[0] > 1 else 0, h if list_of.shape[1] > 1 else 0])
            if (l, start, limit) not in known:
                known[l, start, limit] = unfold(lists, l, T, S, start, limit)
            yield b, h, known[l, start, limit]


def run(q, k, v, lists, *, place=None, config=None, scale, sink_logits=None, softcap=None, kv_length=None, q_start=None, out_dtype=None, return_lse=True,
        table=None, latent=None, q_scale=None, k_scale=None, v_scale=None):
    there = None
    if table is not None:
        (k, there), (v, _) = through_pages(k, table), through_pages(v, table)
    if latent is not None:
        k, v = latents(k, *latent)
    kind, log_kind = q.dtype, lse_dtype(q)
    q, k, v = scaled(q, q_scale, 1), scaled(k, k_scale, 128), scaled(v, v_scale, 128)
    (B, Hq, T, _), (_, Hk, S, Dv) = q.shape, v.shape
    out = np.zeros((B, Hq, T, Dv), dtype_of(out_dtype, kind))
    lse = np.full((B, Hq, T), -np.inf, log_kind)
    with np.errstate(all="ignore"):
        for b, h, mask in masks(lists, B, Hq, T, S, kv_length, q_start):
            mask = mask if there is None else mask & there[b]
            keys = np.flatnonzero(mask.any(axis=0))
            j = h // (Hq // Hk)
            sink = -np.inf if sink_logits is None else float(sink_logits[h])
            o, e = attend.forward(attend.wide(q[b, h]), attend.wide(k[b, j][keys]), attend.wide(v[b, j][keys]), mask[:, keys], scale, softcap, sink)
            out[b, h], lse[b, h] = o.astype(out.dtype), e
    return out, lse if return_lse else None
