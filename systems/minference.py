"""MInference: what a head sees in prefill is estimated online, without training: vertical and slash lines by its last queries, or blocks by means of queries and keys."""
from sparsetile.backends.contract import Unsupported
from sparsetile.ops import array_operators as xp
from sparsetile.ops import checks, device_lists
from sparsetile.ops.attention import sparse_attention
from sparsetile.ops.layout import Layout
from sparsetile.ops.selection import Selection
from sparsetile.systems.scores import best_keys, best_scores, check, masked_softmax, places, window_means

FAR = 2 ** 30  # further back than any key


def vertical_slash_selection(q, k, *, vertical=1000, slash=6096, last_q=64, force_vertical=30, force_slash=100, scale=None, kv_length=None, q_start=None, backend=None) -> Selection:
    """Vertical and slash lines of every head, as sparse_attention's pattern: a query at p sees the keys s <= p with s among the verticals or p - s among the slashes.

    q [B,Hq,T,D], k [B,Hk,S,D]; scale, kv_length, q_start, backend as in sparse_attention.
    vertical, slash   lines of a head: keys with the largest sums of causal softmax weights of the last last_q queries, distances p - s with the largest sums along diagonals.
                      Of equal sums the smaller key wins, and the larger distance
    force_vertical, force_slash   so many first keys and nearest distances are always taken; they count (the published code's 30 and 100, cut to vertical and slash)
    Lines are exact: the published kernel widens slashes to blocks of 64, so it sees more. A key on two lines counts once.
    Returns Selection [B,Hq,T,vertical + slash] of single keys (fewer lines where there are fewer keys). Costs last_q S products of width D. Memory O(T (vertical + slash)) indices
    and O(last_q S) weights of a head: for long prefills give the queries in runs, with q_start, and the lines of the last run hold only there. Not differentiable.
    Raises ValueError or TypeError for bad arguments, Unsupported where the backend has no topk. Source: MInference 1.0 (arXiv 2407.02490), section 3, algorithm 1.
    """
    for name, value, least in (("vertical", vertical, 1), ("slash", slash, 1), ("last_q", last_q, 1), ("force_vertical", force_vertical, 0), ("force_slash", force_slash, 0)):
        checks.integer(name, value, least, 2 ** 24)
    call = check(q, k, kv_length, q_start, backend)
    B, Hq, Hk, T, S, D, _ = call.sizes
    scale = D ** -0.5 if scale is None else checks.number("scale", scale)
    if not B * Hq * T * S:
        return Selection(xp.full(call.q, (B, Hq, T, 1), -1), causal=True)
    lib, (start, length), n = xp.module(call.q), places(call), min(last_q, T)
    force_slash = min(force_slash, slash)                                                        # of equal sums the farthest would win
    rows = xp.astype(call.q[:, :, T - n:], "float32").reshape(B, Hk, -1, D)
    keys = lib.where((xp.arange(call.q, S) < length)[:, None, :, None], xp.astype(call.k, "float32"), 0)
    seen = (xp.arange(call.q, S) <= (start + T - n + xp.arange(call.q, n))[..., None]) & (xp.arange(call.q, S) < length[..., None])
    weights = masked_softmax((rows @ keys.swapaxes(2, 3) * scale).reshape(B, Hq, n, S), seen[:, None])
    # Row r of the last n shifted right by n - 1 - r: column x holds distance start + T - 1 - x.
    sheared = lib.concatenate([lib.flip(weights, (2,)), xp.full(weights, (B, Hq, n, n), 0, "float32")], 3).reshape(B, Hq, -1)[..., :n * (S + n - 1)].reshape(B, Hq, n, S + n - 1)
    nearest = lib.clip(start + T, 0, S + n - 1)                                                  # columns of distances >= 0
    v = _lines(weights.sum(2), min(vertical, S), length, (xp.arange(call.q, S) < force_vertical)[None], backend)
    x = _lines(sheared.sum(2), min(slash, S + n - 1), nearest, xp.arange(call.q, S + n - 1) > start + (T - 1 - force_slash), backend)
    p = (start + xp.arange(call.q, T))[:, None, :, None]
    s = lib.where(x >= 0, x - (start + T - 1)[:, :, None], -FAR)[:, :, None] + p                # [B,Hq,T,slash]
    row = xp.arange(call.q, B * Hq).reshape(B, Hq, 1) * S
    upright = xp.scatter(B * Hq * S, lib.where(v >= 0, row + v, -1), xp.full(call.q, (B, Hq, v.shape[2]), 1)).reshape(B, Hq, S)
    there = (s >= 0) & (s < S)
    again = xp.along(upright, lib.where(there, s, 0).reshape(B, Hq, -1)).reshape(s.shape) > 0
    chosen = lib.concatenate([lib.broadcast_to(v[:, :, None], (B, Hq, T, v.shape[2])), lib.where(there & ~again, s, -1)], 3)
    return Selection(xp.astype(chosen, "int32"), causal=True, distinct=True)


def _lines(sums, count, end, forced, backend):
    """Indices [B,Hq,count] of the largest sums [B,Hq,N] below end [B or 1, 1]; forced [1 or B, N] come first."""
    lib = xp.module(sums)
    return best_scores(lib.where(forced[:, None], float("inf"), sums)[:, :, None], count, end, backend=backend)[:, :, 0]


def vertical_slash(q, k, v, *, vertical=1000, slash=6096, last_q=64, force_vertical=30, force_slash=100, scale=None, kv_length=None, q_start=None, backend=None, **options):
    """Attention over the lines that vertical_slash_selection chooses: q [B,Hq,T,D], k [B,Hk,S,D], v [B,Hk,S,Dv] -> out [B,Hq,T,Dv] [, lse].

    The knobs as in vertical_slash_selection, the rest as in sparse_attention. Costs T (vertical + slash) (D + Dv) products beside the choice. Differentiable in PyTorch as
    sparse_attention is, the choice is not.
    """
    chosen = vertical_slash_selection(q, k, vertical=vertical, slash=slash, last_q=last_q, force_vertical=force_vertical, force_slash=force_slash, scale=scale,
                                      kv_length=kv_length, q_start=q_start, backend=backend)
    return sparse_attention(q, k, v, chosen, scale=scale, kv_length=kv_length, q_start=q_start, backend=backend, **options)


def pooled_blocks_layout(q, k, *, block=64, top_k=100, kv_length=None, q_start=None, backend=None) -> Layout:
    """Key blocks of every block of queries, by the products of their means, as sparse_attention's pattern: made on the device, run by the block kernel.

    q [B,Hq,T,D], k [B,Hk,S,D]. block, a multiple of 32: queries and keys of a block, by absolute position; top_k: key blocks of a block of queries, of those that begin no later
    than it. Of equal products the earlier wins; the own block is not forced, and is seen causally. kv_length as in sparse_attention; q_start an integer, a multiple of block
    (0 beside kv_length).
    Costs T S / block^2 products of width D. Memory O(T S / block^2) bytes of lists a head, as every layout made on a device; the products are not stored. Not differentiable.
    Raises ValueError or TypeError for bad arguments, Unsupported where the backend has no indexer_topk, and under jax.jit. Source: MInference 1.0 (arXiv 2407.02490),
    section 3, algorithm 2.
    """
    checks.integer("block", block, 1, 2 ** 15), checks.integer("top_k", top_k, 1, 2 ** 24)
    if block % 32:
        raise ValueError(f"block: expected a multiple of 32, got {block}; use 32, 64 or 128")
    call = check(q, k, kv_length, q_start, backend)
    B, Hq, _, T, S, _, _ = call.sizes
    if not isinstance(call.q_start, int) or call.q_start % block or call.q_start < 0:
        raise ValueError(f"q_start: expected an integer that is a multiple of block = {block}, got {'lengths that decide it' if call.q_start is None else call.q_start}; "
                         "prefill whole blocks of queries, and give their position as q_start")
    if "Tracer" in type(q).__name__:
        raise Unsupported("pooled_blocks_layout: layouts cannot be made under jax.jit; call it outside jit, where nothing is copied")
    lib, first, nq, nk = xp.module(call.q), call.q_start // block, -(-T // block), -(-S // block)
    kinds = xp.full(call.q, (B * Hq, nq, nk), -2)
    if B * Hq * nq * nk:
        length = places(call)[1]
        rows, keys = window_means(call.q, xp.full(call.q, (1, 1), T), block, block), window_means(call.k, length, block, block)
        i = xp.arange(call.q, nq)
        ends = lib.minimum(first + i + 1, (length + block - 1) // block)
        chosen = best_keys(rows, keys, min(top_k, nk), ends, backend=backend)                    # [B,Hq,nq,K]
        at = xp.arange(call.q, B * Hq * nq).reshape(B, Hq, nq, 1) * nk
        kind = lib.where(chosen == first + i[:, None], 0, -1)                                    # the own block is picture 0, the triangle; others are full
        kinds = xp.scatter(B * Hq * nq * nk, lib.where(chosen >= 0, at + chosen, -1), xp.astype(kind, "int32"), -2).reshape(B * Hq, nq, nk)
    row = xp.arange(call.q, block)
    triangle = lib.stack([row * 0, row + 1], 1)[None]                                            # row r of a block sees its keys 0 .. r
    return Layout((device_lists.lists(kinds, block, block, (B, Hq), intervals=triangle, first=first),), T, S, call.q_start)


def pooled_blocks(q, k, v, *, block=64, top_k=100, kv_length=None, q_start=None, backend=None, **options):
    """Attention over the blocks that pooled_blocks_layout chooses: q [B,Hq,T,D], k [B,Hk,S,D], v [B,Hk,S,Dv] -> out [B,Hq,T,Dv] [, lse].

    block, top_k as in pooled_blocks_layout, the rest as in sparse_attention. Costs T * top_k * block (D + Dv) products beside the choice. Differentiable in PyTorch as
    sparse_attention is, the choice is not.
    """
    chosen = pooled_blocks_layout(q, k, block=block, top_k=top_k, kv_length=kv_length, q_start=q_start, backend=backend)
    return sparse_attention(q, k, v, chosen, kv_length=kv_length, q_start=chosen.q_start, backend=backend, **options)
