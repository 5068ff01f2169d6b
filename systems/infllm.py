"""InfLLM-v2: compressed keys without parameters tell which blocks a group of heads sees, beside the first and the nearest ones; dense attention's weights serve both."""
from sparsetile.ops import array_operators as xp
from sparsetile.ops import checks
from sparsetile.ops.attention import sparse_attention
from sparsetile.ops.selection import Selection
from sparsetile.systems.scores import best_scores, check, masked_softmax, places, window_means

SCORES = 2 ** 24  # compressed scores held at once


def infllm_v2_selection(q, k, *, block=32, stride=16, select_block=64, top_k=96, force_first=1, force_last=32, scale=None, kv_length=None, q_start=None, backend=None) -> Selection:
    """The blocks of every query and group of heads, as sparse_attention's pattern.

    q [B,Hq,T,D], k [B,Hk,S,D]; scale, kv_length, q_start, backend as in sparse_attention.
    block, stride        compressed key i is the mean of keys i * stride ... i * stride + block - 1, seen once they all exist at or before the query
    select_block, top_k  blocks of so many keys, and how many of them a query sees; block and select_block are multiples of stride
    force_first, force_last   blocks at the start and at the end of what a query sees that are always taken; they count in top_k. The published 64 blocks with the first one
                         in them, and a window of 2048 beside them, are top_k = 96, force_first = 1, force_last = 32
    Score of a block: the largest, over the compressed keys that overlap it, of their softmax weights summed over the group's query heads. Of equal scores the earlier wins.
    Returns Selection [B,Hk,T,min(top_k, blocks)] of granularity select_block, causal. Costs Hq T S / stride products of width D. Memory O(T top_k + S D / stride) and 64 MB of scores,
    made for as many queries at a time. Not differentiable. Raises ValueError or TypeError for bad arguments, Unsupported where the backend has no topk.
    Source: InfLLM-V2 (arXiv 2509.24663), section 3; exact softmax where it approximates the denominator by coarser keys.
    """
    for name, value, least in (("block", block, 1), ("stride", stride, 1), ("select_block", select_block, 1), ("top_k", top_k, 1), ("force_first", force_first, 0),
                               ("force_last", force_last, 0)):
        checks.integer(name, value, least, 2 ** 24)
    for name, value in (("block", block), ("select_block", select_block)):
        if value % stride:
            raise ValueError(f"{name}: expected a multiple of stride = {stride}, got {value}; compressed keys start at multiples of it")
    if force_first + force_last > top_k:
        raise ValueError(f"force_first: expected force_first + force_last <= top_k = {top_k}, got {force_first} + {force_last}; forced blocks count in top_k")
    call = check(q, k, kv_length, q_start, backend)
    B, Hq, Hk, T, S, D, _ = call.sizes
    lib, (start, length) = xp.module(call.q), places(call)
    scale = D ** -0.5 if scale is None else checks.number("scale", scale)
    blocks = max(1, -(-S // select_block))
    if not B * Hq * T * S:
        return Selection(xp.full(call.q, (B, Hk, T, 1), -1), select_block, causal=True)
    keys = xp.astype(window_means(call.k, length, block, stride), "float32").swapaxes(2, 3)      # [B,Hk,D,n]
    found, run = [], max(1, SCORES // (B * Hq * keys.shape[3]))
    for t in range(0, T, run):
        rows = xp.astype(call.q[:, :, t:t + run], "float32")
        p = start + t + xp.arange(call.q, rows.shape[2])                                         # [B or 1, run]
        end = lib.minimum(p + 1, length)
        seen = xp.arange(call.q, keys.shape[3]) * stride + block <= end[..., None]               # [B or 1, run, n]
        weights = masked_softmax((rows.reshape(B, Hk, -1, D) @ keys * scale).reshape(B, Hk, Hq // Hk, rows.shape[2], -1), seen[:, None, None]).sum(2)
        j, last = xp.arange(call.q, blocks), (end[..., None] + select_block - 1) // select_block # the first block behind what is seen
        forced = (j < force_first) | (j >= last - force_last)
        scores = lib.where(forced[:, None], float("inf"), _pooled(weights, blocks, select_block // stride, block // stride))
        found.append(best_scores(scores, min(top_k, blocks), last[..., 0], backend=backend))
    return Selection(lib.concatenate(found, 2), select_block, causal=True, distinct=True)


def _pooled(weights, blocks, step, span):
    """Largest of the weights [...,n] of the windows that overlap each block: step windows start in a block, a window is span strides long."""
    lib, n, need = xp.module(weights), weights.shape[-1], blocks * step + span - 1
    pad = lambda size: xp.full(weights, (*weights.shape[:-1], size), 0, "float32")  # noqa: E731
    padded = lib.concatenate([pad(span - 1), weights, pad(max(0, need - span + 1 - n))], -1)
    best = padded[..., 0:blocks * step:step]
    for o in range(1, step + span - 1):
        best = lib.maximum(best, padded[..., o:o + (blocks - 1) * step + 1:step])
    return best


def infllm_v2(q, k, v, *, block=32, stride=16, select_block=64, top_k=96, force_first=1, force_last=32, scale=None, kv_length=None, q_start=None, backend=None, **options):
    """Attention over the blocks that infllm_v2_selection chooses: q [B,Hq,T,D], k [B,Hk,S,D], v [B,Hk,S,Dv] -> out [B,Hq,T,Dv] [, lse].

    The knobs as in infllm_v2_selection, the rest as in sparse_attention. Up to top_k * select_block keys all is seen: the same weights serve dense and sparse attention.
    Costs T * top_k * select_block (D + Dv) products beside the choice. Differentiable in PyTorch as sparse_attention is, the choice is not.
    """
    chosen = infllm_v2_selection(q, k, block=block, stride=stride, select_block=select_block, top_k=top_k, force_first=force_first, force_last=force_last, scale=scale,
                                 kv_length=kv_length, q_start=q_start, backend=backend)
    return sparse_attention(q, k, v, chosen, scale=scale, kv_length=kv_length, q_start=q_start, backend=backend, **options)
