"""PyTorch: gradients made of other kernels. Those of products are products; those of chosen scores are those of all scores, a run of queries at a time."""
from dataclasses import replace

import torch

from sparsetile.backends.contract import Unsupported
from sparsetile.ops import dispatch, indexer, latent

RUN = 4096          # rows, or inner elements, of one product: its operands stay small; sums over runs are made in order
ROWS = 2 ** 15      # tokens of a product of latents: more of them, and rounding in the sums of tensor cores would begin to show
SCORES = 2 ** 22    # scores held at once


def _wide(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _product(x, w, backend):
    """x [H,T,N], w [H,M,N] -> x w^T [H,T,M], not rounded; inner elements in runs."""
    total, kind = None, "float64" if x.dtype == torch.float64 else "float32"
    for n in range(0, x.shape[2], RUN):
        part = latent.matmul(x[None, :, :, n:n + RUN], w[:, :, n:n + RUN], None, backend, "torch", x.device.index if x.is_cuda else None, out_dtype=kind)[0]
        total = part if total is None else total.add_(part)
    return x.new_zeros((*x.shape[:2], w.shape[1]), dtype=_wide(x)) if total is None else total


def grouped_matmul(dout, x, w, backend):
    """out [B,H,T,M+P] = x w^T, then a tail: dx [B,H,T,N] = dout w, dw [H,M,N] = sum over batches and rows of dout^T x."""
    (B, H, T, _), M = x.shape, w.shape[1]
    dout = dout[..., :M].to(x.dtype)
    dx = latent.matmul(dout, w.transpose(1, 2), None, backend, "torch", x.device.index if x.is_cuda else None)
    dw = torch.zeros(w.shape, dtype=_wide(w), device=w.device)
    for b in range(B):
        dw += _product(dout[b].transpose(1, 2), x[b].transpose(1, 2), backend)
    return dx, dw.to(w.dtype)


def latent_decompress(dk, dv, c, w_uk, w_uv, k_rope, latent_scale, backend):
    """dk [B,H,S,Dn+P], dv [B,H,S,Dv] -> gradients of latent [B,S,R], w_uk [H,R,Dn], w_uv [H,R,Dv], k_rope [B,S,P].

    Heads are inner elements of one product for dlatent; the weights' gradients are a product for each head. Both are read in place where a kernel sums over heads.
    """
    (B, S, R), (H, _, Dn), Dv = c.shape, w_uk.shape, w_uv.shape[2]
    place, kind, once = c.device.index if c.is_cuda else None, w_uk.dtype, B == 1 and 0 < S <= ROWS
    product = lambda x, w, dtype: latent.matmul(x, w, None, backend, "torch", place, out_dtype=str(dtype).removeprefix("torch."))[0]  # noqa: E731
    dk, dv = dk.contiguous(), dv.contiguous()
    dlatent = torch.empty(c.shape, dtype=kind, device=c.device)
    dw = [torch.zeros(w.shape, dtype=_wide(w), device=w.device) for w in (w_uk, w_uv) if not once]
    for b in range(B):
        for s in range(0, S, ROWS):
            rows, scale, parts = c[b, s:s + ROWS], None, (dk[b, :, s:s + ROWS, :Dn], dv[b, :, s:s + ROWS])
            if latent_scale is not None:
                scale = latent_scale[b, s:s + ROWS].repeat_interleave(128, -1)[:, :R]
                rows = (rows.to(_wide(w_uk)) * scale).to(kind)
            columns = rows.t().contiguous().expand(1, H, R, -1)
            made = [product(columns, part.transpose(1, 2), kind if once else _wide(w_uk)) for part in parts]
            dw = made if once else [total.add_(part) for total, part in zip(dw, made)]
            d = _over_heads(parts, (w_uk, w_uv), backend, place)
            dlatent[b, s:s + ROWS] = d if scale is None else d * scale
    drope = None if k_rope is None else dk[..., Dn:].sum(1, dtype=_wide(dk)).to(k_rope.dtype)
    return dlatent, *(x.to(kind) for x in dw), drope


def _over_heads(parts, weights, backend, place):
    """Sum over heads and parts of part [H,T,N] w [H,R,N]^T -> [T,R] float32 or wider: by a kernel that sums over heads, else heads are set side by side, which copies every part."""
    wide = str(_wide(parts[0])).removeprefix("torch.")
    how = dict(out_dtype=wide, inner_heads=True)
    if all(dispatch.find("latent_attention", latent.product_problem(part[None], w, None, place, **how), place, backend) for part, w in zip(parts, weights)):
        a, b = (latent.matmul(_aligned(part)[None], _aligned(w), None, backend, "torch", place, **how)[0, 0] for part, w in zip(parts, weights))
        return a.add_(b)
    (H, T, _), R, widths = parts[0].shape, weights[0].shape[1], [part.shape[2] for part in parts]
    g, both = parts[0].new_empty(T, H, sum(widths)), torch.cat(weights, -1).transpose(0, 1).reshape(R, -1)
    for to, part in zip(g.split(widths, -1), parts):
        to, part = _in_words(to, part.transpose(0, 1))
        to.copy_(part)
    return latent.matmul(g.view(1, 1, T, -1), both[None], None, backend, "torch", place, out_dtype=wide)[0, 0]


def _aligned(x):
    """Itself where its rows start at multiples of 16 bytes, as copy engines ask, else a copy."""
    return x if x.stride(-1) == 1 and not any(n % 16 for n in (x.data_ptr(), *(step * x.element_size() for step in x.stride()[:-1]))) else x.contiguous()


def _in_words(*views):
    """The same rows in words of 64 bits where all of them allow it: PyTorch copies a transposed view element by element."""
    n = 8 // views[0].element_size()
    fit = all(x.stride(-1) == 1 and not any(size % n for size in (x.storage_offset(), x.shape[-1], *x.stride()[:-1])) for x in views)
    return [x.view(torch.int64) for x in views] if fit else views


def indexer_scores(call, dscores):
    """dq, dk, dweights in the types of q, k, weights."""
    if "float8" in str(call.q.dtype):
        raise Unsupported("indexer_scores: float8 q and k have no gradients; train with bfloat16 q and k")
    return tuple(g.to(x.dtype) for g, x in zip(scores_backward(call, dscores), (call.q, call.k, call.weights)))


def scores_backward(call, dscores):
    """Gradients of a checked call's scores, float32, by a backend's kernel; where none has one, by products: a few queries at a time

        x = q k^T, da = weights dscores where x > 0, rounded to q's type;   dq = da k, dk = da^T q, dweights = sum over keys of x dscores where x > 0
    """
    if dispatch.find(call.op, indexer.problem_of(call, "indexer_scores_backward"), call.device, call.backend):
        return indexer.scores_backward(call, dscores)
    (B, H, T, S, D), backend = call.sizes, call.backend
    totals = [torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (call.q, call.k, call.weights)]
    step = max(1, SCORES * 8 // max(1, B * H * S))
    for t in range(0, T if B * S * H else 0, step):
        end = min(T, t + step)
        S = min(call.sizes[3], max(1, call.q_start + end)) if call.causal and isinstance(call.q_start, int) else call.sizes[3]  # no query of the run sees a key past these
        scale = None if call.k_scale is None else call.k_scale[:, None, :S]
        seen = _seen(call, t, end)[..., :S]                                                  # [B,t,S]
        g = torch.where(seen, dscores[:, t:end, :S].float(), 0)
        g = g if scale is None else torch.where(seen, g * scale, 0)
        k = torch.where(seen.any(1)[..., None], call.k[:, :S], 0)
        q = call.q[:, :, t:end].reshape(B, -1, D)                                            # [B,H*t,D]
        x = _product(q, k, backend).view(B, H, -1, S)
        steep = x > 0 if call.activation == "relu" else torch.ones_like(x, dtype=torch.bool)
        totals[2][:, :, t:end] = torch.where(steep, x * g[:, None], 0).sum(-1)
        da = torch.where(steep, g[:, None] * call.weights[:, :, t:end, None].float(), 0).to(q.dtype).view(B, -1, S)
        totals[0][:, :, t:end] = _product(da, k.transpose(1, 2), backend).view(B, H, -1, D)
        totals[1][:, :S] += _product(da.transpose(1, 2), q.transpose(1, 2), backend)
    return totals


def _seen(call, t, end):
    """Which keys the queries t .. end - 1 score: [B,end - t,S] booleans."""
    B, _, _, S, _ = call.sizes
    s, rows = torch.arange(S, device=call.q.device), torch.arange(t, end, device=call.q.device)
    start = call.q_start if isinstance(call.q_start, int) else call.q_start[:, None]
    seen = s <= (start + rows)[..., None] if call.causal else torch.ones(end - t, S, dtype=torch.bool, device=s.device)
    for bound, keeps in ((call.key_start, torch.ge), (call.key_end, torch.lt)):
        if bound is not None:
            seen = seen & keeps(s, bound[..., t:end, None])
    return seen.expand(B, -1, -1)


def indexer_topk(call, indices, best, dbest, pool):
    """indices, best, dbest [B,T,K]: each chosen score's gradient goes to its key, of a block to the first of its best keys."""
    if "float8" in str(call.q.dtype):
        raise Unsupported("indexer_topk: float8 q and k have no gradients; train with bfloat16 q and k")
    B, _, T, S, _ = call.sizes
    totals = [torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (call.q, call.k, call.weights)]
    for t in range(0, T if S else 0, max(1, SCORES // max(1, B * S))):
        end = min(T, t + max(1, SCORES // max(1, B * S)))
        rows = lambda x: None if x is None else x[..., t:end]
        part = replace(call, op="indexer_scores", config=None, q=call.q[:, :, t:end], weights=rows(call.weights), q_start=call.q_start + t, key_start=rows(call.key_start),
                       key_end=rows(call.key_end))
        entries = indices[:, t:end].long()
        there = (entries >= 0) & (best[:, t:end] > -torch.inf)
        keys = entries.clamp(min=0)
        if pool > 1:
            scores = torch.nn.functional.pad(indexer.scores(part).nan_to_num(-torch.inf, torch.inf, -torch.inf), (0, -S % pool), value=-torch.inf)
            keys = keys * pool + scores.unflatten(-1, (-1, pool)).argmax(-1).gather(-1, keys)
        dscores = torch.zeros(B, end - t, S, dtype=torch.float32, device=indices.device)
        dscores.scatter_add_(-1, keys, torch.where(there, dbest[:, t:end], 0))               # entries differ: only zeros meet
        dq, dk, dweights = scores_backward(part, dscores)
        totals[0][:, :, t:end], totals[2][:, :, t:end] = dq, dweights
        totals[1] += dk
    return tuple(g.to(x.dtype) for g, x in zip(totals, (call.q, call.k, call.weights)))
