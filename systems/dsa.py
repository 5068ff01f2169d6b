"""DeepSeek sparse attention: a lightning indexer ranks the earlier keys of every query, attention runs on the best of them."""
from sparsetile.backends.contract import Unsupported
from sparsetile.ops import array_operators as xp
from sparsetile.ops import checks, indexer
from sparsetile.ops.attention import sparse_attention
from sparsetile.ops.caches.paged import Cache
from sparsetile.ops.latent import latent_attention
from sparsetile.ops.patterns import Causal
from sparsetile.ops.selection import Selection


def dsa_selection(index_q, index_k, index_weights, *, top_k=2048, index_scale=None, kv_length=None, q_start=None, backend=None) -> Selection:
    """The keys of every query, the same for all its heads, as sparse_attention's pattern.

    index_q [B,Hi,T,Di], index_k [B,S,Di] or an IndexerKeys, index_weights [B,Hi,T]; index_scale [B,S] float32: indexer_scores' q, k, weights and k_scale
    top_k    keys of a query; one that sees fewer gets all of them, and no score is computed for it. Of equal scores the earlier key wins
    kv_length, q_start, backend   as in sparse_attention; only keys at or before the query's position compete
    Returns Selection [B,1,T,min(top_k, S)] of single keys, causal. Exact. Memory O(T top_k): no score is stored. Not differentiable.
    Raises ValueError or TypeError for bad arguments, Unsupported where the backend has no indexer_topk for these. Source: DeepSeek-V3.2 (arXiv 2512.02556), section 2.1.
    """
    checks.integer("top_k", top_k, 1, indexer.MOST)
    plain = [xp.constant_of(x) for x in (index_q, index_k, index_weights)]
    return indexer.indexer_topk(*plain, min(top_k, max(keys_of(index_k), 1)), k_scale=index_scale, backend=backend, **standing(index_q, index_k, kv_length, q_start))


def dsa_attention(q, k, v=None, *, index_q, index_k, index_weights, top_k=2048, index_scale=None, kv_length=None, q_start=None, return_selection=False, backend=None, **options):
    """Attention over the keys that dsa_selection chooses: q [B,Hq,T,D], k [B,Hk,S,D], v [B,Hk,S,Dv] -> out [B,Hq,T,Dv] [, lse] [, selection].

    k may be a cache, and v None with value_width=Dv (MLA's latent as the one key and value head); index_q, index_k, index_weights, index_scale, top_k as in
    dsa_selection; kv_length, q_start, backend and `options` (scale, sink_logits, softcap, value_width, return_lse, deterministic, ...) as in sparse_attention.
    A query that sees no more than top_k keys sees them all, which the device finds out for each row; with S <= top_k (of caches: their capacity) the whole call is dense
    causal attention, and the indexer does not run unless its Selection is asked for. Nothing comes back to the host: once warmed up, a CUDA graph may record the call.
    Costs T S / 2 of the indexer's products and T * top_k (D + Dv). Differentiable in PyTorch as sparse_attention is, the choice is not: dsa_training trains the indexer.
    """
    checks.flag("return_selection", return_selection)
    rule = chosen_of(q, k, 2, index_q, index_k, index_weights, top_k, index_scale, kv_length, q_start, return_selection, backend)
    got = sparse_attention(q, k, v, rule[0], kv_length=kv_length, q_start=q_start, backend=backend, **options)
    return (*(got if isinstance(got, tuple) else (got,)), rule[1]) if return_selection else got


def dsa_latent_attention(q_nope, q_rope, latent, k_rope, w_uk, w_uv, *, index_q, index_k, index_weights, top_k=2048, index_scale=None, kv_length=None, q_start=None,
                         return_selection=False, backend=None, **options):
    """dsa_attention of MLA: q_nope [B,H,T,Dn], q_rope [B,H,T,P], latent [B,S,R] or a PagedLatent, k_rope [B,S,P], w_uk [H,R,Dn], w_uv [H,R,Dv] -> out [B,H,T,Dv] [, lse] [, selection].

    `options` as in latent_attention, but for its mode: chosen keys are read in the latent's width ("absorbed"), once for all heads; a dense call (S <= top_k) takes the cheaper mode.
    """
    checks.flag("return_selection", return_selection)
    if "mode" in options:
        raise ValueError(f"mode: expected no mode, got {checks.shown(options['mode'])}; chosen keys are read as latents ('absorbed'), for others call latent_attention with dsa_selection")
    rule = chosen_of(q_nope, latent, 1, index_q, index_k, index_weights, top_k, index_scale, kv_length, q_start, return_selection, backend)
    mode = "absorbed" if isinstance(rule[0], Selection) else "auto"
    got = latent_attention(q_nope, q_rope, latent, k_rope, w_uk, w_uv, rule[0], mode=mode, kv_length=kv_length, q_start=q_start, backend=backend, **options)
    return (*(got if isinstance(got, tuple) else (got,)), rule[1]) if return_selection else got


def chosen_of(q, k, axis, index_q, index_k, index_weights, top_k, index_scale, kv_length, q_start, wanted: bool, backend):
    """(what attention sees: Causal() where all keys are chosen, the Selection, or None if it is not wanted). Axis of k: its keys."""
    checks.integer("top_k", top_k, 1, indexer.MOST)
    S = same_queries_and_keys(q, k, axis, index_q, index_k)
    dense = S <= top_k
    chosen = dsa_selection(index_q, index_k, index_weights, top_k=top_k, index_scale=index_scale, kv_length=kv_length, q_start=q_start, backend=backend) if wanted or not dense else None
    return Causal() if dense else chosen, chosen


def same_queries_and_keys(q, k, axis, index_q, index_k) -> int:
    """S, once attention and the indexer are known to speak of the same queries and keys. Axis of k: its keys."""
    checks.array("q", q, 4, "[B,Hq,T,D]"), checks.array("index_q", index_q, 4, "[B,Hi,T,Di]")
    checks.same("index_q", "batch size and number of queries [B, T] of q", list(q.shape[::2]), list(index_q.shape[::2]), "the indexer ranks keys for the same queries")
    S, held = keys_of(index_k), isinstance(index_k, Cache)
    if isinstance(k, Cache):
        if not held:
            raise Unsupported("index_k: expected an IndexerKeys beside keys in a cache, got an array; append the indexer's keys to a cache as well, or pass the arrays of cache.gather()")
        return max(S, k.capacity)
    checks.array("k", k, (3, 4))
    if not held:
        checks.same("index_k", "number of keys S of k", int(k.shape[axis]), S, "one indexer key for each key")
    return S


def keys_of(index_k) -> int:
    """S, of a cache its capacity."""
    return index_k.capacity if isinstance(index_k, Cache) else int(checks.array("index_k", index_k, 3, "[B,S,Di]").shape[1])


def standing(index_q, index_k, kv_length, q_start) -> dict:
    """The indexer's q_start and key_end: as sparse_attention understands kv_length and q_start."""
    if kv_length is None:
        return dict(q_start=q_start)
    (B, _, T, _), S = checks.array("index_q", index_q, 4, "[B,Hi,T,Di]").shape, keys_of(index_k)
    checks.lengths("kv_length", kv_length, (B,), "[B]")
    length = xp.module(kv_length).clip(index_k.shorter(kv_length) if isinstance(index_k, Cache) else kv_length, 0, S)
    if q_start is None:  # the last query stands on the last key: causality alone ends every row
        return dict(q_start=xp.astype(length - T, "int32"))
    return dict(q_start=q_start, key_end=xp.astype(length[:, None] + xp.arange(length, T) * 0, "int32"))
