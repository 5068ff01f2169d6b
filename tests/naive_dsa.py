"""DeepSeek sparse attention and its training, the paper's equations written out over whole arrays. Shares nothing with systems/.

q [B,Hq,T,D], k [B,Hk,S,D], index_q [B,Hi,T,Di], index_k [B,S,Di], index_weights [B,Hi,T].
"""
import numpy as np
import oracle


def visible(T, S, *, q_start=None, kv_length=None, B=1):
    """[B,T,S] booleans."""
    return oracle.visible(B, T, S, q_start=q_start, kv_length=kv_length, rule=lambda p, s: s <= p)[:, 0]


def chosen(index_q, index_k, index_weights, seen, top_k):
    """[B,T,S] booleans: equation 1 in float64, then the best visible keys one row at a time, of equal scores the earlier key."""
    scores = oracle.indexer_scores(index_q, index_k, index_weights, seen=seen)
    kept = np.zeros(seen.shape, bool)
    for b, t in np.ndindex(seen.shape[:2]):
        keys = np.flatnonzero(seen[b, t])
        kept[b, t, sorted(keys, key=lambda s: (-scores[b, t, s], s))[:top_k]] = True
    return kept


def two_levels(index_q, index_k, index_weights, seen, top_k, block, blocks):
    """[B,T,S] booleans: a row's own block (the last that it sees) and the best of the others by the score of their mean key, then the best visible keys in them; a row sees the first keys."""
    means = np.stack([index_k[:, s:s + block].astype(np.float64).mean(1) for s in range(0, seen.shape[2], block)], 1)
    scores = oracle.indexer_scores(index_q, means, index_weights, seen=np.ones((*seen.shape[:2], means.shape[1]), bool))
    inside = np.zeros(seen.shape, bool)
    for b, t in np.ndindex(seen.shape[:2]):
        own = (np.count_nonzero(seen[b, t]) - 1) // block
        for n in [own, *sorted(range(own), key=lambda n: (-scores[b, t, n], n))[:blocks - 1]]:
            inside[b, t, n * block:(n + 1) * block] = n >= 0
    return chosen(index_q, index_k, index_weights, seen & inside, top_k)


def divergence(q, k, index_q, index_k, index_weights, kept, *, scale, sink_logits=None):
    """Equations 3 and 4 in float64, for autograd: q ... index_weights NumPy; kept [B,T,S] -> divergence [B,T], leaves of the indexer."""
    import torch
    wide = lambda x: torch.from_numpy(np.asarray(x, np.float64))  # noqa: E731
    seen, leaves = torch.from_numpy(kept), [wide(x).requires_grad_() for x in (index_q, index_k, index_weights)]
    logits = scale * wide(q) @ wide(k).repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    e = torch.where(seen[:, None], logits, -torch.inf).exp()
    total = e.sum(-1, keepdim=True) + (0 if sink_logits is None else wide(sink_logits)[:, None, None].exp())
    p = torch.where(seen[:, None], e / total, 0).sum(1)
    p = torch.where(seen, p / p.sum(-1, keepdim=True), 0)
    scores = ((leaves[0] @ leaves[1][:, None].mT).relu() * leaves[2][..., None]).sum(1)
    share = scores.masked_fill(~seen, -torch.inf).log_softmax(-1)
    return torch.where(seen & (p > 0), p * (p.clamp(min=1e-300).log() - share.masked_fill(~seen, 0)), 0).sum(-1), leaves
