"""flash-linear-attention's MoBA (fla.ops.moba) without a GPU: it calls two functions of flash-attn, which are written out here; choice, merge and gradients stay its own."""
import torch


def _parts(q, k, cu_q, cu_k, causal, scale):
    """(rows, keys, scores [h,rows,keys]) of every sequence of a packed batch, q [n,h,D]."""
    for a, b, c, d in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), cu_k[:-1].tolist(), cu_k[1:].tolist()):
        scores = scale * q[a:b].transpose(0, 1) @ k[c:d].permute(1, 2, 0)
        yield slice(a, b), slice(c, d), scores.masked_fill(torch.ones(b - a, d - c).triu(1).bool(), -torch.inf) if causal else scores


def forward(*, q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, **_):
    out, lse = torch.empty(*q.shape[:2], v.shape[2], dtype=q.dtype), torch.empty(q.shape[1], q.shape[0], dtype=q.dtype)
    for rows, keys, scores in _parts(q, k, cu_seqlens_q, cu_seqlens_k, causal, softmax_scale):
        lse[:, rows] = scores.logsumexp(-1)
        out[rows] = (scores.softmax(-1) @ v[keys].transpose(0, 1)).transpose(0, 1)
    return out, lse, None, None


def backward(*, dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, **_):
    """Against an lse that may be that of more keys than these: probabilities do not add up to one."""
    for rows, keys, scores in _parts(q, k, cu_seqlens_q, cu_seqlens_k, causal, softmax_scale):
        p, do = (scores - softmax_lse[:, rows, None]).exp(), dout[rows].transpose(0, 1)
        ds = p * (do @ v[keys].permute(1, 2, 0) - (do * out[rows].transpose(0, 1)).sum(-1, keepdim=True)) * softmax_scale
        dv[keys], dk[keys] = (p.mT @ do).transpose(0, 1), (ds.mT @ q[rows].transpose(0, 1)).transpose(0, 1)
        dq[rows] = (ds @ k[keys].transpose(0, 1)).transpose(0, 1)


def moba(monkeypatch, module, q, k, v, lengths, *, block, top_k):
    """q, k, v [1,T,H,D] of packed sequences -> out [1,T,H,D]."""
    monkeypatch.setattr(module, "flash_attn_varlen_func", True)  # is it installed?
    monkeypatch.setattr(module, "_flash_attn_varlen_forward", forward)
    monkeypatch.setattr(module, "_flash_attn_varlen_backward", backward)
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()
    return module.parallel_moba(q, k, v, ends, max(lengths), block, top_k)
