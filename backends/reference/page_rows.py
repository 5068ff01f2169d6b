"""Entries of a selection as rows of a cache's pool, NumPy.

    indices [B,G,T,K] int32  table [B,pages] int32  kv_length [B] int32  lengths [B,G,T] int32 or None  ->  rows [B,G,T,K * granularity] int32

Entry e stands for keys e * granularity ... + granularity - 1; key s of sequence b is row table[b, s // page_size] * page_size + s % page_size. -1 for what does not exist: past
`lengths`, outside the sequence's keys, past the query where causal (query t stands at q_start + t, by default at kv_length - T + t), in a page that is none of 0 .. pages_of_pool - 1.
"""
import numpy as np

from sparsetile.backends.contract import Resources
from sparsetile.backends.reference.positions import first_query, key_limit

TUNABLES = ()


def supports(problem):
    return None


def resources(problem, config):
    return Resources()


def default_config(problem):
    return {}


def run(indices, table, kv_length, *, place=None, config=None, page_size, pages_of_pool, lengths=None, granularity=1, causal=False, q_start=None):
    (B, G, T, K), S = indices.shape, table.shape[1] * page_size
    rows = np.full((B, G, T, K, granularity), -1, np.int32)
    for b in range(B):
        limit = key_limit(kv_length, b, S)
        keys = indices[b].astype(np.int64)[..., None] * granularity + np.arange(granularity)         # [G, T, K, granularity]
        there = (keys >= 0) & (keys < limit)
        if lengths is not None:
            there &= (np.arange(K) < lengths[b][..., None])[..., None]
        if causal:
            there &= keys <= first_query(q_start, b, limit, T) + np.arange(T)[:, None, None]
        keys = np.where(there, keys, 0)
        page = table[b].astype(np.int64)[keys // page_size] if S else keys
        there &= (page >= 0) & (page < pages_of_pool)
        rows[b][there] = (page * page_size + keys % page_size)[there]
    return rows.reshape(B, G, T, K * granularity)
