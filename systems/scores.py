"""What the selectors share: where queries and keys stand, means over windows of keys, and the best keys of every query by plain products."""
from sparsetile.backends.contract import Unsupported
from sparsetile.ops import array_operators as xp
from sparsetile.ops import attention, attention_call, dispatch
from sparsetile.ops.caches.paged import Cache
from sparsetile.ops.indexer import indexer_topk, topk
from sparsetile.systems.compression import mean


def check(q, k, kv_length=None, q_start=None, backend=None) -> attention_call.Call:
    """The arguments of a selector, checked as those of sparse_attention are. The call's q and k carry no gradient."""
    if isinstance(k, Cache):
        raise Unsupported(f"k: a selector looks at keys in one piece, got a {type(k).__name__}; pass the arrays of cache.gather(), or a Selection with the cache to sparse_attention")
    return attention.check(xp.constant_of(q), xp.constant_of(k), None, None, None, None, None, kv_length, q_start, 1, True, backend, None)


def places(call: attention_call.Call):
    """Position of query 0 and number of keys that exist, int32 [B or 1, 1] beside q."""
    _, _, _, T, S, _, _ = call.sizes
    length = xp.full(call.q, (1,), S) if call.kv_length is None else xp.module(call.q).clip(call.kv_length, 0, S)
    start = length - T if call.q_start is None else xp.full(call.q, (1,), call.q_start) if isinstance(call.q_start, int) else call.q_start
    return start[:, None], length[:, None]


def positions(call: attention_call.Call):
    """Of all queries, int32 [B or 1, T]."""
    T = call.sizes[3]
    if isinstance(call.q_start, int) and -2 ** 31 <= call.q_start < 2 ** 31 - T:
        return xp.arange(call.q, call.q_start, call.q_start + T)[None]  # one launch
    return places(call)[0] + xp.arange(call.q, T)


def window_means(k, length, size: int, stride: int):
    """k [B,Hk,S,D], length [B or 1, 1] or None: all -> [B,Hk,ceil(S/stride),D]: mean of the existing keys among stride*n .. stride*n + size - 1; float32 sums (float64 of float64), k's type.

    size is a multiple of stride. Keys at or past length are not read.
    """
    lib, (B, Hk, S, D), n = xp.module(k), k.shape, -(-k.shape[2] // stride)
    if length is None:
        if size == stride and S == n * stride:  # read once, as they lie
            return mean(k.reshape(B, Hk, n, stride, D))
        length = xp.full(k, (1, 1), S)
    exists = (xp.arange(k, S) < length)[:, None, :, None]
    wide = lib.where(exists, xp.wide(k), 0)
    padded = lib.concatenate([wide, xp.zeros_of(wide, (B, Hk, (n + size // stride - 1) * stride - S, D))], 2)
    cells = padded.reshape(B, Hk, n + size // stride - 1, stride, D).sum(3)          # [B,Hk,n + size/stride - 1,D]
    total = sum(cells[:, :, i:i + n] for i in range(size // stride))                 # [B,Hk,n,D]
    count = lib.clip(length - xp.arange(k, n) * stride, 1, size)                     # [B or 1, n]
    return xp.as_type_of(total / count[:, None, :, None], k)


def masked_softmax(logits, seen):
    """Softmax over the last axis of float32 logits where seen; 0 elsewhere, and in rows that see nothing."""
    lib = xp.module(logits)
    logits = lib.where(seen, logits, -float("inf"))
    top = xp.highest(logits, -1)[..., None]
    weights = lib.exp(logits - lib.where(top > -float("inf"), top, 0))
    total = weights.sum(-1)[..., None]
    return weights / lib.where(total > 0, total, 1)


def best_keys(q, k, top_k: int, key_end, *, key_start=None, weight: float = 1.0, backend=None):
    """Indices int32 [B,Hq,T,top_k] of the best keys in [key_start, key_end) by weight * q . k, ascending, then -1. Memory O(T * top_k): no score is stored.

    q [B,Hq,T,D], k [B,Hk,N,D] (of float64 ones the float32 values are scored), key_end, key_start int32 [B or 1, T or 1]. Every query head chooses for itself.
    """
    (B, Hq, T, D), (Hk, N) = q.shape, k.shape[1:3]
    if dispatch.is_explaining():  # the attention kernel is the one to explain; entries of the right shape are all it needs
        return xp.full(q, (B, Hq, T, top_k), 0)
    if "float64" in str(q.dtype):
        q, k = xp.astype(q, "float32"), xp.astype(k, "float32")
    rows = Hq // Hk * T                                                              # the queries of a group stand one after another
    bound = lambda x: None if x is None else xp.module(q).broadcast_to(x[:, None, None], (B, Hk, Hq // Hk, T)).reshape(B * Hk, rows)  # noqa: E731
    chosen = indexer_topk(q.reshape(B * Hk, 1, rows, D), k.reshape(B * Hk, N, D), xp.full(q, (B * Hk, 1, rows), weight, "float32"), top_k,
                          causal=False, key_start=bound(key_start), key_end=bound(key_end), activation=None, backend=backend)
    return chosen.indices.reshape(B, Hq, T, top_k)


def best_scores(scores, top_k: int, key_end, *, backend=None):
    """Indices int32 [B,H,T,top_k] of the largest of scores [B,H,T,N] float32 below key_end [B or 1, T or 1], ascending, then -1."""
    B, H, T, N = scores.shape
    if dispatch.is_explaining():
        return xp.full(scores, (B, H, T, top_k), 0)
    ends = xp.module(scores).broadcast_to(key_end[:, None], (B, H, T)).reshape(B * H, T)
    return topk(scores.reshape(B * H, T, N), top_k, key_end=ends, backend=backend).indices.reshape(B, H, T, top_k)
