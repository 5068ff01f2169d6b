"""The same work by others, on the inputs of one task (autotune/tasks.py): cuDNN, cuBLAS and PyTorch, compiled PyTorch, and FlashAttention-3, FlashMLA, DeepGEMM
and FlashInfer where they are installed. `peers(task, compiled)` gives Peers; making one may fail, which is then that peer's row.
"""
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Callable

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sparsetile.autotune import tasks
from sparsetile.ops import patterns as P


COMPILED = ("Flex", "compiled")  # what torch.compile makes
OF_LATENTS = {"FlashMLA": "flash_mla", "FlashInfer": "flashinfer"}  # who else decodes on latents, and the module that makes it


@dataclass(frozen=True)
class Peer:
    """make() prepares what is not timed and returns the call to time; judged: its answer has our shapes and is checked like ours."""
    name: str
    make: Callable
    judged: bool = True


def peers(task, compiled: bool) -> list[Peer]:
    """compiled: also what torch.compile makes (tens of seconds each to compile)."""
    w, found = task.workload, []
    if w.kernel.startswith("block_attention") and w["T"] > 1:
        rule, backward = task.inputs[3], w.kernel.endswith("_backward")
        if rule == P.Causal():
            found.append(Peer("cuDNN", lambda: _attention(task, _cudnn, backward)))
        if find_spec("flash_attn_interface") and isinstance(rule, P.Window):
            found.append(Peer("FA3", lambda: _attention(task, _flash(rule), backward)))
        if compiled:
            found.append(Peer("Flex", lambda: _attention(task, _flex(task), backward)))
    elif w.kernel == "block_attention" and task.inputs[3] == P.Full():
        found.append(Peer("torch", lambda: _few(task)))
        if w["D"] == 576 and w.option("shared_kv"):
            found += [Peer(name, lambda make=make: make(task)) for name, make in (("FlashMLA", _flash_mla_dense), ("FlashInfer", _flashinfer_latent)) if find_spec(OF_LATENTS[name])]
    elif w.kernel == "gather_attention" and w["D"] == 576 and find_spec("flash_mla"):
        found.append(Peer("FlashMLA", lambda: _flash_mla(task)))
    elif w.kernel == "indexer_scores" and w["B"] == 1 and find_spec("deep_gemm"):
        found.append(Peer("DeepGEMM", lambda: _deep_gemm(task)))
    elif w.kernel == "topk":
        found.append(Peer("torch", lambda: lambda: torch.topk(task.inputs[0], w["K"], dim=-1), judged=False))
        if find_spec("flashinfer"):
            found.append(Peer("FlashInfer", lambda: _flashinfer_top_k(task), judged=False))
    elif w.kernel == "latent_decompress":
        found.append(Peer("cuBLAS", lambda: _product(task), judged=False))
        if compiled:
            found.append(Peer("compiled", lambda: _decompressed(task)))
    elif w.kernel == "grouped_matmul":
        x, weights = task.inputs[0][0], task.inputs[1].swapaxes(1, 2)
        found.append(Peer("cuBLAS", lambda: lambda: torch.bmm(x, weights), judged=False))  # without the rotary tail
    return found


# --------------------------------------------------------------------------------------------------------------------- attention
def _attention(task, forward, backward: bool):
    """forward(q, k, v) -> out, or the gradients of it: everything that autograd does after the forward."""
    q, k, v = (x.detach().requires_grad_(backward) for x in task.inputs[:3])
    if not backward:
        return lambda: forward(q, k, v)
    dout, out = task.inputs[6], forward(q, k, v)
    return lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)


def _few(task):
    """One query a sequence: the heads of a group as queries of one."""
    q, k, v, _ = task.inputs
    (B, Hq, _, D), Hk = q.shape, k.shape[1]
    return lambda: scaled_dot_product_attention(q.view(B, Hk, Hq // Hk, D), k, k[..., :task.workload["Dv"]] if v is None else v).view(B, Hq, 1, -1)


def _cudnn(q, k, v):
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def _flash(rule):
    from flash_attn_interface import flash_attn_func
    window = (-1, -1) if rule == P.Causal() else tuple(-1 if side is None else side for side in (rule.left, rule.right))

    def forward(q, k, v):
        got = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=rule.right == 0, window_size=window)
        return (got[0] if isinstance(got, tuple) else got).transpose(1, 2)
    return forward


def _flex(task):
    from torch.nn.attention.flex_attention import flex_attention
    w, device = task.workload, task.inputs[0].device
    torch._dynamo.reset()  # a new pattern is a new program; after eight of one function dynamo would stop compiling
    blocks = block_mask(_sees(task.inputs[3], w, device), w["T"], w["S"], device)
    flex = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: flex(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])


def block_mask(sees, T: int, S: int, device, block: int = 128, rows: int | None = None):
    """What create_block_mask makes of lengths of whole blocks, some rows at a time: compiled it takes 20 to 40 s for each new length (16k: minutes), uncompiled it holds all T x S pairs."""
    from torch.nn.attention.flex_attention import BlockMask
    at, s = torch.arange(T, device=device).split(rows or max(1, 2 ** 27 // (S * block)) * block), torch.arange(S, device=device)
    count = torch.cat([sees(None, None, p[:, None], s).view(-1, block, S // block, block).sum((1, 3)) for p in at])
    lists = []
    for kept in ((count > 0) & (count < block ** 2), count == block ** 2):
        kept = kept.int()[None, None]
        lists += [kept.sum(-1).int(), torch.argsort(kept, dim=-1, descending=True, stable=True).int()]
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=block, mask_mod=sees, seq_lengths=(T, S))


def _sees(rule, w, device):
    """The pattern as a mask_mod of FlexAttention, written as its users would."""
    if rule == P.Causal():
        return lambda b, h, p, s: p >= s
    if isinstance(rule, P.Window):
        left = rule.left
        return lambda b, h, p, s: (p >= s) & (p - s <= left)
    if rule == tasks.LONGFORMER:
        return lambda b, h, p, s: (p - s <= 256) & (s - p <= 256) | (s < 64) | (p < 64)
    if rule == tasks.LONG["strided-128"]:
        return lambda b, h, p, s: (p >= s) & ((p - s <= 127) | ((p - s) % 128 == 0))
    if rule == tasks.LONG["fixed-128"]:
        return lambda b, h, p, s: (p >= s) & ((p // 128 == s // 128) | (s % 128 >= 120))
    if lengths := next((part.lengths for part in getattr(rule, "parts", ()) if isinstance(part, P.Documents)), None):
        document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
        return lambda b, h, p, s: (p >= s) & (document[p] == document[s])
    p, s = np.arange(0, w["T"], 128)[:, None], np.arange(0, w["S"], 128)  # block masks of 128
    kept = torch.from_numpy(rule.visible(p, s, w["S"])).to(device)
    return lambda b, h, p, s: kept[p // 128, s // 128]


def _flash_mla(task):
    from flash_mla import flash_mla_sparse_fwd
    q, k, _, chosen = task.inputs
    q, keys, indices = q[0].transpose(0, 1).contiguous(), k[0].transpose(0, 1).contiguous(), chosen.indices[0].transpose(0, 1).contiguous()  # [T,h,576] [S,1,576] [T,1,K]
    return lambda: flash_mla_sparse_fwd(q, keys, indices, task.workload["D"] ** -0.5)[0].transpose(0, 1)[None]


def _pages(task):
    """The latents as a pool of pages of 64 [B*S/64,64,576], the table of each sequence's pages, lengths."""
    k, w = task.inputs[1], task.workload
    table = torch.arange(w["B"] * w["S"] // 64, dtype=torch.int32, device=k.device).view(w["B"], -1)
    return k.view(-1, 64, w["D"]), table, torch.full((w["B"],), w["S"], dtype=torch.int32, device=k.device)


def _flash_mla_dense(task):
    from flash_mla import flash_mla_with_kvcache, get_mla_metadata
    pool, table, lengths = _pages(task)
    q, w = task.inputs[0].transpose(1, 2).contiguous(), task.workload  # [B,1,h,576]
    plan, splits = get_mla_metadata(lengths, w["Hq"], 1)
    return lambda: flash_mla_with_kvcache(q, pool[:, :, None], table, lengths, w["Dv"], plan, splits, softmax_scale=w["D"] ** -0.5)[0].transpose(1, 2)


def _flashinfer_latent(task):
    from flashinfer.mla import BatchMLAPagedAttentionWrapper
    (pool, table, lengths), w = _pages(task), task.workload
    q = task.inputs[0][:, :, 0]  # [B,h,576]
    count = lambda step: torch.arange(w["B"] + 1, dtype=torch.int32, device=q.device) * step  # noqa: E731
    wrapper = BatchMLAPagedAttentionWrapper(torch.empty(128 << 20, dtype=torch.int8, device=q.device))
    wrapper.plan(count(1), count(table.shape[1]), table.flatten(), lengths, w["Hq"], w["Dv"], w["D"] - w["Dv"], 64, False, w["D"] ** -0.5, q.dtype, pool.dtype)
    Dv = w["Dv"]
    return lambda: wrapper.run(q[..., :Dv], q[..., Dv:], pool[..., :Dv], pool[..., Dv:])[:, :, None]


# ------------------------------------------------------------------------------------------------------------ indexer and latent
def _deep_gemm(task):
    import deep_gemm
    q, k, weights, k_scale = task.inputs
    q, weights = q[0].transpose(0, 1).contiguous(), weights[0].transpose(0, 1).contiguous()  # [T,H,D] [T,H]
    T, S = task.workload["T"], task.workload["S"]
    first, last = (torch.full((T,), n, dtype=torch.int32, device=q.device) for n in (0, S))
    return lambda: deep_gemm.fp8_mqa_logits(q, (k[0], k_scale[0]), weights, first, last, clean_logits=False)[None]


def _flashinfer_top_k(task):
    import flashinfer
    rows = task.inputs[0][0]
    return lambda: flashinfer.top_k(rows, task.workload["K"])


def _both(task):
    """w_uk and w_uv side by side: [R, H * (Dn + Dv)]."""
    return torch.cat(task.inputs[1:3], -1).permute(1, 0, 2).reshape(task.workload["R"], -1).contiguous()


def _product(task):
    both, latent = _both(task), task.inputs[0]
    return lambda: latent @ both


def _decompressed(task):
    both, w, (latent, _, _, rope) = _both(task), task.workload, task.inputs
    H, Dn, Dv = w["H"], w["Dn"], w["Dv"]

    def run(latent, both, rope):
        keys, values = (latent @ both).unflatten(-1, (H, Dn + Dv)).split((Dn, Dv), -1)
        return torch.cat((keys, rope[:, :, None].expand(-1, -1, H, -1)), -1), values.contiguous()
    run = torch.compile(run, dynamic=False)

    def call():
        keys, values = run(latent, both, rope)
        return keys.transpose(1, 2), values.transpose(1, 2)
    return call
