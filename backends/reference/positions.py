"""Where queries stand and where keys end: the rules of lengths and offsets, once for every reference kernel."""
import numpy as np


def key_limit(kv_length, b, S):
    """Keys at or past this do not exist in batch b."""
    return S if kv_length is None else int(np.clip(np.asarray(kv_length)[b], 0, S))


def first_query(q_start, b, limit, T):
    """Absolute position of query 0 of batch b: given, or such that the last query stands on the last key."""
    if q_start is None:
        return limit - T
    return int(q_start) if np.ndim(q_start) == 0 else int(np.asarray(q_start)[b])


def through_pages(pool, table):
    """Pages [N,...,page,D] by a table [B,pages] -> rows [B,...,pages * page,D], and [B,pages * page] whether they exist: an entry outside 0 .. N - 1 is a hole, 0 here."""
    table = np.asarray(table).astype(np.int64)
    there = (table >= 0) & (table < len(pool))
    pages = pool[np.where(there, table, 0)]                                           # [B, pages, ..., page, D]
    pages[~there] = 0
    rows = np.concatenate(list(np.moveaxis(pages, 1, 0)), axis=-2)
    return rows, np.repeat(there, pool.shape[-2], axis=1)


def latents(rows, R, P):
    """Bytes [...,R + 4 R / 128 + 2 P] of the fp8 layout of latent caches -> (keys [...,R + P], values [...,R]) in float64: float8_e4m3fn times a float32 scale for each 128, then bfloat16."""
    import ml_dtypes
    rows, end = np.ascontiguousarray(rows), R + R // 32
    values = rows[..., :R].copy().view(ml_dtypes.float8_e4m3fn).astype(np.float64) * np.repeat(rows[..., R:end].copy().view(np.float32).astype(np.float64), 128, -1)
    return np.concatenate([values, rows[..., end:].copy().view(ml_dtypes.bfloat16).astype(np.float64)], -1), values


def scaled(x, scale, rows):
    """x [B,H,N,width] times scale [B,H,ceil(N/rows)], one for so many rows that follow each other, in float64; x itself without scales."""
    return x if scale is None else x.astype(np.float64) * np.repeat(np.asarray(scale, np.float64), rows, axis=2)[:, :, :x.shape[2], None]


def lse_dtype(x):
    return np.float64 if x.dtype == np.float64 else np.float32


def dtype_of(name, default):
    """numpy dtype by its contract name; bfloat16 and float8 live in ml_dtypes."""
    if name is None:
        return default
    import ml_dtypes
    return np.dtype(getattr(ml_dtypes, name, None) or name)
