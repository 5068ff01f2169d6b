"""The lightning indexer in two levels, an approximation: blocks by the mean of their keys first, then the best keys inside the best blocks."""
from dataclasses import replace

from sparsetile.backends.contract import Unsupported
from sparsetile.ops import array_operators as xp
from sparsetile.ops import checks, dispatch, float8, indexer
from sparsetile.ops.quantise import quantise_float8
from sparsetile.ops.selection import Selection
from sparsetile.systems.dsa import dsa_selection, keys_of, standing


def dsa_two_level_selection(index_q, index_k, index_weights, *, top_k=2048, block=64, blocks=128, index_scale=None, kv_length=None, q_start=None, backend=None) -> Selection:
    """dsa_selection, approximated: the indexer scores the mean key of every block, then only the keys of the best blocks, of which the top_k best are chosen.

    index_q [B,Hi,T,Di], index_k [B,S,Di] or an IndexerKeys whose page_size divides `block`, index_weights [B,Hi,T]; the rest as in dsa_selection, and:
    block    keys of a block
    blocks   blocks of a query, blocks * block >= top_k; the query's own block, the last that it sees, is always one of them

    Not exact: a key that scores high in a block whose mean does not is missed, and a block with NaN in it is passed over. Where a query sees no more than `blocks` blocks nothing is: then it gets what dsa_selection gives it.
    A mean is rounded to the type of index_k (float8: with a scale of its own). Only blocks that a query sees whole compete by it, so later keys have no say; equal means: the earlier block.
    Returns Selection [B,1,T,min(top_k, S)] of single keys, causal. Costs T S / 2 block + T blocks block of the indexer's products where dsa_selection costs T S / 2. Memory O(T (top_k + blocks)).
    Besides, index_q is copied, and index_k stands in float32 for its means.
    The means are made in each call, by reading all keys once: it is for prefill, one query reads all keys for dsa_selection as well. Not differentiable.
    """
    checks.integer("top_k", top_k, 1, indexer.MOST), checks.integer("block", block, 1, 2 ** 20)
    if checks.integer("blocks", blocks, 1, indexer.MOST) * block < top_k:
        raise ValueError(f"blocks: expected blocks * block >= top_k = {top_k}, got {blocks} * {block}; all of a query's keys come from its blocks")
    index_q, index_k, index_weights = (xp.constant_of(x) for x in (index_q, index_k, index_weights))
    S = keys_of(index_k)
    if S <= blocks * block or dispatch.is_explaining():  # every block is taken
        return dsa_selection(index_q, index_k, index_weights, top_k=top_k, index_scale=index_scale, kv_length=kv_length, q_start=q_start, backend=backend)
    call = indexer.check("indexer_topk", index_q, index_k, index_weights, index_scale, True, key_start=None, activation="relu", backend=backend, config=None,
                         **dict(dict(key_end=None), **standing(index_q, index_k, kv_length, q_start)))
    _traced(call)
    pages, scales, table, each = _pages(call, block)
    means, scale = _means(call, pages, scales, table, each, block)
    ends = _ends(call)                                                               # [B,T] keys that a query sees: all before this one
    level = replace(call, k=means, k_scale=scale, table=None, causal=False, q_start=0, key_end=xp.astype((ends + block - 1) // block, "int32"))
    best, count, _ = indexer.select(level, blocks, dict(pool=1, force_first=0, force_last=1, return_scores=False))
    return _inside(replace(call, k=pages, k_scale=scales), table, best, count, ends, min(top_k, S), block, each)


def _pages(call, block: int):
    """(keys [N,page,D], scales [N,page] or None, table [B,nk * each] of the pages of every block of keys, pages to a block): of a cache its own, else blocks are the pages."""
    (B, _, _, S, D), lib = call.sizes, xp.module(call.q)
    if call.table is not None:
        page = int(call.k.shape[1])
        if block % page:
            raise ValueError(f"block: expected a multiple of the cache's page_size {page}, got {block}; blocks consist of whole pages")
        missing = -int(call.table.shape[1]) % (block // page)
        table = lib.concatenate((call.table, xp.full(call.table, (B, missing), -1)), 1) if missing else call.table
        return call.k, call.k_scale, table, block // page
    count = -(-S // block)
    padded = lambda x, *tail: x if not S % block else lib.concatenate((x, xp.zeros_of(x, (B, -S % block, *tail))), 1)  # noqa: E731
    scales = None if call.k_scale is None else padded(call.k_scale).reshape(B * count, block)
    return padded(call.k, D).reshape(B * count, block, D), scales, xp.arange(call.q, B * count).reshape(B, count), 1


def _means(call, pages, scales, table, each: int, block: int):
    """(mean key of every block [B,nk,D] in the keys' type, its scale [B,nk] or None). Of a block that no query sees whole, anything."""
    wide, N, (B, D) = xp.astype(pages, "float32"), int(pages.shape[0]), call.sizes[::4]
    sums = (wide if scales is None else wide * scales[..., None]).sum(1)              # [N,D]
    at = xp.module(table).clip(table, 0, N - 1)
    means = sums[at.long() if xp.kind(at) == "torch" else at].reshape(B, int(table.shape[1]) // each, each, D).sum(2) / block
    if not float8.is_float8(call.q):
        return xp.as_type_of(means, pages), None
    values, scale = quantise_float8(means, group=D)
    return values, scale[..., 0]


def _ends(call):
    """How many keys, from the first on, each query sees: int32 [B,T]."""
    B, _, T, S, _ = call.sizes
    lib, start = xp.module(call.q), call.q_start
    start = min(max(start, -T), S) if isinstance(start, int) else lib.clip(start, -T, S)[:, None]  # farther out is no different, and sums fit int32
    ends = lib.broadcast_to(start + xp.arange(call.q, T) + 1, (B, T))
    return lib.clip(ends if call.key_end is None else lib.minimum(ends, call.key_end), 0, S)


def _inside(call, table, best, count, ends, top_k: int, block: int, each: int) -> Selection:
    """The best keys inside the blocks best [B,T,n]: every query becomes a sequence whose pages are those of its blocks."""
    (B, H, T, _), D, n, lib = call.q.shape, call.q.shape[3], int(best.shape[2]), xp.module(call.q)
    first = lib.clip(best, 0, None) * each
    at = (first[..., None] + xp.arange(best, each)).reshape(B, T * n * each)
    mine = lib.where(best[..., None] >= 0, xp.along(table, at).reshape(B, T, n, each), -1)
    last = lib.where(ends > 0, (count - 1) * block + ends - (ends - 1) // block * block, 0)  # blocks ascend: the last one is the query's own, and alone may be seen in part
    part = replace(call, q=call.q.swapaxes(1, 2).reshape(B * T, H, 1, D), weights=call.weights.swapaxes(1, 2).reshape(B * T, H, 1), causal=False, q_start=0,
                   table=xp.astype(mine.reshape(B * T, n * each), "int32"), key_end=xp.astype(last.reshape(B * T, 1), "int32"))
    found, lengths, _ = indexer.select(part, top_k, dict(pool=1, force_first=0, force_last=0, return_scores=False))
    found = found.reshape(B, T, top_k)
    there = lib.clip(found, 0, None)
    keys = xp.along(best, there // block) * block + there % block
    return Selection(xp.astype(lib.where(found >= 0, keys, -1), "int32")[:, None], 1, lengths.reshape(B, 1, T), True, distinct=True)


def _traced(call):
    if call.caller == "torch":
        import torch
        if torch.compiler.is_compiling():
            raise Unsupported("dsa_two_level_selection: pages made in a call are not traced by torch.compile; call it outside the compiled function and pass its Selection")
    if call.caller == "jax":
        from sparsetile.ops import jax_ops
        if jax_ops.traced(call.q, call.k, call.weights, call.k_scale, call.q_start, call.key_end):
            raise Unsupported("dsa_two_level_selection: not traced by jax.jit; call it outside jit and pass its Selection")
