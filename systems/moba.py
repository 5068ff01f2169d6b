"""MoBA: mixture of block attention. Every query sees its own block causally and the past blocks whose mean key it likes best."""
from sparsetile.ops import array_operators as xp
from sparsetile.ops import checks
from sparsetile.ops.attention import sparse_attention
from sparsetile.ops.selection import Selection
from sparsetile.systems.scores import best_keys, check, places, positions, window_means


def moba_selection(q, k, *, block=512, top_k=3, kv_length=None, q_start=None, backend=None) -> Selection:
    """The blocks of every query, as sparse_attention's pattern.

    q [B,Hq,T,D], k [B,Hk,S,D]; kv_length, q_start, backend as in sparse_attention.
    block        keys of a block; block n holds positions n * block ...; the last one may be ragged
    top_k        blocks a query sees, its own counted: top_k = 1 is the own block alone. Of equal gates the earlier block wins
    Gate: q . mean(keys of the block), the mean rounded to k's type; only blocks that end before the query's own compete. Each query head chooses for itself.
    Returns Selection [B,Hq,T,K], K = min(top_k, blocks + 1), granularity block, causal: the own block is seen up to the query; a query before position 0 sees nothing.
    Costs T S / block products of width D. Memory O(T K + S D / block): no gate is stored. Not differentiable.
    Raises ValueError or TypeError for bad arguments, Unsupported where the backend has no indexer_topk for these. Source: MoBA (arXiv 2502.13189), section 2.2.
    """
    checks.integer("block", block, 1, 2 ** 31 - 1), checks.integer("top_k", top_k, 1)
    call = check(q, k, kv_length, q_start, backend)
    B, Hq, _, T, S, _, _ = call.sizes
    lib = xp.module(call.q)
    own = positions(call) // block                                              # [B or 1, T]
    block = min(block, max(S, 1))                                               # a longer one is the only one: its number stays
    indices = lib.broadcast_to(own[:, None, :, None], (B, Hq, T, 1))
    past = min(top_k - 1, -(-S // block))                                       # all of them for a query past the keys, whose own block does not exist
    if past > 0:
        length, ends = None, own
        if call.kv_length is not None or not isinstance(call.q_start, int) or call.q_start + T > S:  # else no query stands past the keys
            _, length = places(call)
            ends = lib.minimum(own, (length + block - 1) // block)
        chosen = best_keys(call.q, window_means(call.k, None if call.kv_length is None else length, block, block), past, ends, backend=backend)
        indices = lib.concatenate([chosen, indices], 3)
    return Selection(indices, block, causal=True, distinct=True)


def moba(q, k, v, *, block=512, top_k=3, kv_length=None, q_start=None, backend=None, **options):
    """Attention over the blocks that moba_selection chooses: q [B,Hq,T,D], k [B,Hk,S,D], v [B,Hk,S,Dv] -> out [B,Hq,T,Dv] [, lse].

    block, top_k as in moba_selection; kv_length, q_start, backend and `options` (scale, sink_logits, softcap, return_lse, deterministic, ...) as in
    sparse_attention. Costs T * top_k * block (D + Dv) products beside the choice. Differentiable in PyTorch as sparse_attention is, the choice is not.
    """
    chosen = moba_selection(q, k, block=block, top_k=top_k, kv_length=kv_length, q_start=q_start, backend=backend)
    return sparse_attention(q, k, v, chosen, kv_length=kv_length, q_start=q_start, backend=backend, **options)
