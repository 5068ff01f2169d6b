"""Top-k of exact scores: every query sees the keys with its largest products, the upper bound that cheaper selectors are measured against."""
from sparsetile.ops import checks
from sparsetile.ops import array_operators as xp
from sparsetile.ops.attention import sparse_attention
from sparsetile.ops.indexer import MOST
from sparsetile.ops.selection import Selection
from sparsetile.systems.scores import best_keys, check, places


def exact_topk_selection(q, k, *, top_k=2048, causal=True, scale=None, kv_length=None, q_start=None, backend=None) -> Selection:
    """The top_k keys of every query by the scores that attention itself uses, as sparse_attention's pattern.

    q [B,Hq,T,D], k [B,Hk,S,D]; scale, kv_length, q_start, backend as in sparse_attention.
    top_k    keys of a query; one that sees fewer gets all of them. Of equal scores the earlier key wins, NaN is never chosen
    causal   only keys at or before the query's position compete
    Scores are float32 (of float64 arrays: of their float32 values). Each query head chooses for itself.
    Returns Selection [B,Hq,T,min(top_k, S)] of single keys, ascending, then -1. Costs T S products of width D, as dense attention's scores do. Memory O(T top_k): the
    scores are not stored. Not differentiable. Raises ValueError or TypeError for bad arguments, Unsupported where the backend has no indexer_topk for these.
    Source: the top-k attention of Gupta et al. (arXiv 2106.06899), section 3; oracle top-k in the literature of selectors.
    """
    checks.integer("top_k", top_k, 1, MOST), checks.flag("causal", causal)
    call = check(q, k, kv_length, q_start, backend)
    _, _, _, T, S, D, _ = call.sizes
    scale = D ** -0.5 if scale is None else checks.number("scale", scale)
    start, length = places(call)
    ends = xp.module(call.q).minimum(start + xp.arange(call.q, T) + 1, length) if causal else length
    return Selection(best_keys(call.q, call.k, min(top_k, max(S, 1)), ends, weight=scale, backend=backend), distinct=True)


def exact_topk(q, k, v, *, top_k=2048, causal=True, scale=None, kv_length=None, q_start=None, backend=None, **options):
    """Attention over the keys that exact_topk_selection chooses: q [B,Hq,T,D], k [B,Hk,S,D], v [B,Hk,S,Dv] -> out [B,Hq,T,Dv] [, lse].

    top_k, causal as in exact_topk_selection; the rest as in sparse_attention. Costs T * top_k (D + Dv) products beside the choice.
    Differentiable in PyTorch as sparse_attention is, the choice is not.
    """
    chosen = exact_topk_selection(q, k, top_k=top_k, causal=causal, scale=scale, kv_length=kv_length, q_start=q_start, backend=backend)
    return sparse_attention(q, k, v, chosen, scale=scale, kv_length=kv_length, q_start=q_start, backend=backend, **options)
