"""The two phases that train the indexer of DeepSeek sparse attention: a dense warm-up, then both the model and the indexer on selected keys. PyTorch."""
from dataclasses import replace

import torch

from sparsetile.backends.contract import Unsupported
from sparsetile.ops import array_operators as xp
from sparsetile.ops import checks, indexer, latent, torch_gradients
from sparsetile.ops.attention import sparse_attention
from sparsetile.ops.patterns import Causal
from sparsetile.systems.dsa import same_queries_and_keys

HELD = 2 ** 22  # products of attention held at once on the CPU; on a GPU eight times as many


def dsa_warmup(q, k, v=None, *, index_q, index_k, index_weights, scale=None, sink_logits=None, q_start=None, backend=None, **options):
    """Dense causal attention, and how far the indexer is from it: out [B,Hq,T,Dv], divergence [B,T] float32.

        divergence[b,t] = KL(p || softmax over keys s <= t of indexer score[b,t,s]),   p[b,t,s] = attention weight of key s, summed over heads, divided by its sum over keys

    q, k, v, scale, sink_logits, q_start, backend, `options` as in sparse_attention; index_q [B,Hi,T,Di], index_k [B,S,Di], index_weights [B,Hi,T] as in indexer_scores (no float8).
    divergence is differentiable in the three arrays of the indexer alone: q and k are constants to it, as the paper detaches the indexer from the model. The model's own
    gradients go through out; the paper freezes the model in this phase. A caller that also detaches the hidden states that the indexer reads trains it apart.
    A query without keys has divergence 0. torch.compile leaves the divergence out of its graph. Memory O(T): scores and weights are made for a few queries at a time, and again in the backward; the same bits twice.
    Costs T S / 2 products of the width D of every head more than attention, and as many in the backward. Source: DeepSeek-V3.2 (arXiv 2512.02556), equation 3.
    """
    scale = _check(q, k, index_q, index_k, index_weights, scale, options)
    out, lse = sparse_attention(q, k, v, Causal(), scale=scale, sink_logits=sink_logits, q_start=q_start, return_lse=True, backend=backend, **options)
    call = indexer.check("indexer_scores", index_q, index_k, index_weights, None, True, q_start, None, None, "relu", backend, None)
    return out, _of_all(index_q, index_k, index_weights, q.detach(), k.detach(), _denominators(lse, sink_logits), scale, call)


def dsa_training(q, k, v=None, *, index_q, index_k, index_weights, top_k=2048, scale=None, sink_logits=None, q_start=None, backend=None, **options):
    """dsa_attention, and how far the indexer is from it: out [B,Hq,T,Dv], divergence [B,T] float32.

    As dsa_warmup, but attention and both distributions are over the keys that the indexer selects (equation 4): p is what attention gives to them, the indexer's softmax runs
    over their scores. out is differentiable in q, k, v and sink_logits by the gradients of gather attention, the choice itself is not; divergence in the indexer's arrays alone.
    Memory O(T * top_k) for scores and weights of the keys selected.
    """
    scale = _check(q, k, index_q, index_k, index_weights, scale, options)
    checks.integer("top_k", top_k, 1, indexer.MOST)
    selection, scores = indexer.indexer_topk(index_q, index_k, index_weights, min(top_k, max(int(k.shape[2]), 1)), q_start=q_start, return_scores=True, backend=backend)
    out, lse = sparse_attention(q, k, v, selection, scale=scale, sink_logits=sink_logits, q_start=q_start, return_lse=True, backend=backend, **options)
    with torch.no_grad():
        p = _chosen_weights(q, k, _denominators(lse, sink_logits), scale, selection.indices[:, 0], backend)
    return out, divergence(p, scores[:, 0])


def divergence(p, scores):
    """KL(p || softmax(scores)) of every row: p [...,K] with sum 1 (or all 0), 0 where scores [...,K] are -inf -> [...]."""
    there = scores > -torch.inf
    share = torch.where(there, scores, torch.finfo(scores.dtype).min).log_softmax(-1)
    return (torch.special.xlogy(p, p) - p * share).sum(-1)


class _Dense(torch.autograd.Function):
    """divergence [B,T] of all visible keys, a few queries at a time."""

    @staticmethod
    def forward(ctx, index_q, index_k, index_weights, q, k, total, scale, call):
        ctx.save_for_backward(index_q, index_k, index_weights, q, k, total)
        ctx.scale, ctx.call = scale, call
        found = total.new_zeros(q.shape[0], q.shape[2])
        for rows, keys, part in _runs(call, q):
            scores = indexer.scores(part)
            found[:, rows] = divergence(_weights(q[:, :, rows], k[:, :, keys], total[:, :, rows], scale, scores > -torch.inf, call.backend), scores)
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, given):
        *of_indexer, q, k, total = ctx.saved_tensors
        call = replace(ctx.call, q=of_indexer[0], k=of_indexer[1], weights=of_indexer[2])
        dq, dk, dweights = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in of_indexer)
        for rows, keys, part in _runs(call, q):
            scores = indexer.scores(part)
            p = _weights(q[:, :, rows], k[:, :, keys], total[:, :, rows], ctx.scale, scores > -torch.inf, call.backend)
            dscores = (_softmax(scores) - p) * given[:, rows, None]
            dq[:, :, rows], more, dweights[:, :, rows] = torch_gradients.scores_backward(part, dscores)
            dk[:, keys] += more
        return *(g.to(x.dtype) for g, x in zip((dq, dk, dweights), of_indexer)), *[None] * 5


@torch.compiler.disable
def _of_all(*given):
    """divergence [B,T] over all visible keys: its products are kernels that a compiled graph cannot hold, so it stands beside the graph."""
    return _Dense.apply(*given)


def _runs(call: indexer.Call, q):
    """(slice of queries, slice of the keys that they may see, the indexer's call for them)."""
    B, Hq, T, _ = q.shape
    S, known = call.sizes[3], isinstance(call.q_start, int)
    step = max(1, HELD * (8 if q.is_cuda else 1) // max(1, B * Hq * S))
    for t in range(0, T if S else 0, step):
        rows, keys = slice(t, min(T, t + step)), slice(0, min(S, max(1, call.q_start + t + step)) if known else S)
        yield rows, keys, replace(call, q=call.q[:, :, rows], k=call.k[:, keys], weights=call.weights[:, :, rows], q_start=call.q_start + t)


def _weights(q, k, total, scale, seen, backend):
    """Attention weights of a few queries, summed over heads and divided by their sum: q [B,Hq,t,D], k [B,Hk,S,D], total [B,Hq,t], seen [B,t,S] -> [B,t,S]."""
    (B, Hq, t, D), (Hk, S) = q.shape, k.shape[1:3]
    keys = torch.where(seen.any(1)[:, None, :, None], k, 0).flatten(0, 1)                             # what no query sees is not read
    x = _products(q.reshape(B * Hk, Hq // Hk * t, D), keys, backend).view(B, Hq, t, S)
    x = torch.where(seen[:, None], x.mul_(scale), -torch.inf).sub_(total[..., None])
    return _normalised(x.exp_().sum(1))


@torch.compiler.disable
def _chosen_weights(q, k, total, scale, indices, backend):
    """The same over chosen keys: indices [B,T,K], -1 where there is none -> [B,T,K]."""
    (B, Hq, T, D), Hk, K = q.shape, k.shape[1], indices.shape[2]
    q, total, entries = q.transpose(1, 2).flatten(0, 1), total.transpose(1, 2).flatten(0, 1), indices.flatten(0, 1)  # [B*T,Hq,D] [B*T,Hq] [B*T,K]
    found = total.new_zeros(entries.shape)
    if 0 in (B * T, K, k.shape[2]):  # no query, or no key
        return found.view(B, T, K)
    step = max(1, HELD * (8 if q.is_cuda else 1) // max(1, K * max(Hq, Hk * D)))
    for n in range(0, B * T, step):
        at = entries[n:n + step].long()                                                               # [n,K]
        b = torch.arange(n, n + len(at), device=at.device)[:, None] // T
        keys = torch.where((at >= 0)[..., None, None], k[b, :, at.clamp(min=0)], 0).transpose(1, 2)   # [n,Hk,K,D]
        x = _products(q[n:n + step].reshape(len(at) * Hk, Hq // Hk, D), keys.flatten(0, 1), backend).view(len(at), Hq, K)
        x = torch.where((at >= 0)[:, None], x.mul_(scale), -torch.inf).sub_(total[n:n + step, :, None])
        found[n:n + step] = x.exp_().sum(1)
    return _normalised(found).view(B, T, K)


def _products(x, w, backend):
    """x [N,m,D], w [N,n,D] -> x w^T [N,m,n], not rounded."""
    kind = "float64" if x.dtype == torch.float64 else "float32"
    return latent.matmul(x[None], w, None, backend, "torch", x.device.index if x.is_cuda else None, out_dtype=kind)[0]


def _normalised(sums):
    """Rows divided by their sum; rows of zeros stay."""
    whole = sums.sum(-1, keepdim=True)
    return sums / torch.where(whole > 0, whole, 1)


def _softmax(scores):
    """Softmax over the last axis, 0 where scores are -inf, in whole rows too."""
    top = scores.amax(-1, keepdim=True)
    return _normalised((scores - torch.where(top > -torch.inf, top, 0)).exp())


def _denominators(lse, sink_logits):
    """[B,Hq,T]: logarithm of what attention weights are divided by; +inf for queries without keys, so that their weights are 0."""
    lse = lse.detach()
    if sink_logits is not None:
        lse = torch.logaddexp(lse, sink_logits.detach()[:, None].to(lse.dtype))
    return torch.where(lse > -torch.inf, lse, torch.inf)


def _check(q, k, index_q, index_k, index_weights, scale, options):
    """The scale of attention's products, once the arguments that attention and the indexer do not check themselves are."""
    for name, x in dict(q=q, k=k, index_q=index_q, index_k=index_k, index_weights=index_weights).items():
        if xp.kind(x) != "torch":
            raise TypeError(f"{name}: expected a PyTorch tensor, got {type(x).__name__}; training is PyTorch's, dsa_attention takes every framework")
    for name in ("softcap", "kv_length", "return_lse"):
        if options.get(name) is not None:
            raise Unsupported(f"{name}: training takes whole causal sequences and no softcap; pad at the end, and leave the padding's divergence out of the loss")
    same_queries_and_keys(q, k, 2, index_q, index_k)
    if "float8" in str(index_q.dtype):
        raise Unsupported("index_q: float8 has no gradients; train with bfloat16, and quantise for use")
    return q.shape[3] ** -0.5 if scale is None else checks.number("scale", scale)
