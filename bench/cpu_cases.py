"""What bench/cpu.py times: each case is our call and its peers on the same arrays, with the operations of the pairs inside the pattern.

TARGETS are the rows with a floor; SWEEP the same ops over patterns, lengths, widths and head groups. Everything PyTorch, B 1, CPU.
"""
from dataclasses import dataclass
from functools import lru_cache
from typing import Callable

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import sparsetile as st

RANDOM = np.random.default_rng(0)
WINDOW = st.Window(256, 256)


@dataclass(frozen=True)
class Case:
    """make() -> {label: call}, ours first. peer: the label that ours is divided by (ours / peer <= floor); None: the fastest of them.
    flops: operations of one call, for the share of the register peak. dense: the share may stand in for the ratio."""
    name: str
    make: Callable
    flops: float = 0.0
    peer: str | None = None
    floor: float | None = None
    goal: float | None = None
    dense: bool = False


def normal(*shape, dtype=torch.float32):
    return torch.from_numpy(RANDOM.standard_normal(shape, dtype=np.float32)).to(dtype)


def random_blocks(N, block=64, share=0.1):
    """A share of all blocks, the same number in every row."""
    n = N // block
    mask = np.zeros((n, n), bool)
    for row in mask:
        row[RANDOM.choice(n, max(1, round(share * n)), replace=False)] = True
    return st.Blocks(mask, block, block)


PATTERNS = {"dense": lambda N: st.Full(), "causal": lambda N: st.Causal(), "window 256": lambda N: WINDOW, "Longformer": lambda N: WINDOW | st.Global(range(64)),
            "BigBird": lambda N: st.bigbird(64), "10 % blocks": random_blocks}


@lru_cache(1)
def rule_and_mask(name, N):
    rule = PATTERNS[name](N)
    return rule, None if name in ("dense", "causal") else torch.from_numpy(np.ascontiguousarray(rule.mask(N, N).reshape(N, N)))


@lru_cache(1)
def flex(N):
    """Compiled FlexAttention under the window."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    blocks = create_block_mask(lambda b, h, i, j: (i - j).abs() <= 256, None, None, N, N, device="cpu")
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])


def attention(pattern, N, D, *, heads=(8, 8), dtype=torch.float32, both=False, with_flex=False):
    """Forward, or forward + backward by autograd, against SDPA (with a mask where the pattern needs one)."""
    def make():
        Hq, Hk = heads
        q, k, v, grad = (normal(1, h, N, D, dtype=dtype) for h in (Hq, Hk, Hk, Hq))
        rule, mask = rule_and_mask(pattern, N)
        calls = {"ours": lambda q, k, v: st.sparse_attention(q, k, v, rule, backend="numba"),
                 "SDPA" if mask is None else "masked SDPA": lambda q, k, v: sdpa(q, k, v, attn_mask=mask, is_causal=pattern == "causal", enable_gqa=Hq != Hk)}
        if with_flex:
            calls["FlexAttention"] = flex(N)
        if both:
            leaves = [x.requires_grad_() for x in (q, k, v)]
            return {name: lambda f=f: torch.autograd.grad(f(*leaves), leaves, grad) for name, f in calls.items()}
        return {name: lambda f=f: f(q, k, v) for name, f in calls.items()}
    pairs = rule_and_mask(pattern, N)[0].pairs(N, N)
    return make, pairs * heads[0] * 4 * D * (3.5 if both else 1)


def selection(N, D, K, granularity, heads):
    """Keys chosen by content, 256 in all, against SDPA with the selection as its mask."""
    def make():
        Hq, Hk = heads
        q, k, v = (normal(1, h, N, D) for h in (Hq, Hk, Hk))
        indices = np.sort(np.argpartition(RANDOM.random((N, N // granularity), dtype=np.float32), K, 1)[:, :K], 1).astype(np.int32)
        mask = torch.zeros(N, N // granularity, dtype=torch.bool).scatter_(1, torch.from_numpy(indices).long(), True).repeat_interleave(granularity, 1)
        chosen = st.Selection(torch.from_numpy(indices)[None, None], granularity)
        return {"ours": lambda: st.sparse_attention(q, k, v, chosen, backend="numba"), "masked SDPA": lambda: sdpa(q, k, v, attn_mask=mask, enable_gqa=Hq != Hk)}
    return make, 4.0 * heads[0] * N * K * granularity * D


def decode(S, D, heads, dtype=torch.float32):
    """One query, long keys; the peer is the faster of SDPA's two ways."""
    def make():
        Hq, Hk = heads
        q, k, v = normal(1, Hq, 1, D, dtype=dtype), normal(1, Hk, S, D, dtype=dtype), normal(1, Hk, S, D, dtype=dtype)
        rows = q.view(1, Hk, Hq // Hk, D)
        return {"ours": lambda: st.sparse_attention(q, k, v, st.Causal(), backend="numba"), "SDPA, group as rows": lambda: sdpa(rows, k, v),
                "SDPA": lambda: sdpa(q, k, v, enable_gqa=Hq != Hk)}
    return make, 4.0 * heads[0] * S * D


def indexer(H=16, D=128, T=512, S=16384, K=512, chunk=32):
    def make():
        q, k, weights = normal(1, H, T, D), normal(1, S, D), normal(1, H, T)
        rows, w = q[0].transpose(0, 1).contiguous(), weights[0].T.contiguous()  # [T,H,D], [T,H]

        def torch_chunks():
            return torch.cat([torch.bmm(w[i:i + chunk, None], (rows[i:i + chunk].reshape(-1, D) @ k[0].T).relu_().view(-1, H, S))[:, 0].topk(K, 1)[1] for i in range(0, T, chunk)])
        return {"ours": lambda: st.indexer_topk(q, k, weights, K, causal=False, backend="numba"), "torch, 32 queries at a time": torch_chunks}
    return make, 2.0 * T * S * H * D


def topk(T=512, S=16384, K=512):
    def make():
        scores = normal(1, T, S)
        return {"ours": lambda: st.topk(scores, K, backend="numba"), "torch.topk": lambda: torch.topk(scores, K)}
    return make, 0.0


def decompression(dtype, S=4096, R=512, H=8, D=128):
    def make():
        latent, w_uk, w_uv = normal(1, S, R, dtype=dtype), normal(H, R, D, dtype=dtype) / R ** 0.5, normal(H, R, D, dtype=dtype) / R ** 0.5
        both = torch.cat((w_uk, w_uv), -1).permute(1, 0, 2).reshape(R, -1).contiguous()
        return {"ours": lambda: st.latent_decompress(latent, w_uk, w_uv, backend="numba"), "torch.matmul": lambda: torch.matmul(latent[0], both)}  # both make their outputs
    return make, 4.0 * S * R * H * D


def targets(widths=(64, 128)):
    """Every row with a floor. Dense bfloat16 is dense forward in float32 behind a conversion (no pair products worth using on Intel's CPUs, see simd.FAST_PAIRS): its share of the float32 peak stands in too."""
    bf16 = torch.bfloat16
    for D in widths:
        for pattern in ("dense", "causal"):
            yield lambda D=D, p=pattern: Case(f"forward {p}, D {D}", *attention(p, 4096, D), floor=0.5, goal=0.37, dense=True)
        yield lambda D=D: Case(f"forward window, D {D}", *attention("window 256", 4096, D, with_flex=True), "FlexAttention", 1 / 2.2, 1 / 3)
        yield lambda D=D: Case(f"forward + backward window, D {D}", *attention("window 256", 4096, D, both=True), floor=1 / 12, goal=1 / 20)
        yield lambda D=D: Case(f"forward + backward dense, D {D}", *attention("dense", 4096, D, both=True), floor=0.5, goal=0.35, dense=True)
        yield lambda D=D: Case(f"forward dense bfloat16, D {D}", *attention("dense", 4096, D, dtype=bf16), floor=0.3, goal=0.2, dense=True)
    yield lambda: Case("indexer + top-k", *indexer(), floor=1 / 2.5, goal=1 / 4)
    yield lambda: Case("latent decompression", *decompression(torch.float32), floor=0.6, goal=0.42)
    yield lambda: Case("latent decompression bfloat16", *decompression(bf16), floor=1.0, goal=0.85)
    yield lambda: Case("decode S 64k", *decode(65536, 128, (32, 8)), floor=0.85, goal=0.7)
    yield lambda: Case("decode S 64k bfloat16", *decode(65536, 128, (32, 8), bf16), floor=0.85, goal=0.7)


def sweep(lengths, widths=(64, 128)):
    """Patterns, selection and decode over lengths, widths and head groups. Forward + backward up to 4096: masked SDPA's takes minutes beyond."""
    if 4096 in lengths:
        yield lambda: Case("top-k 512 of 16k", *topk())
    for N in lengths:
        for heads, label in (((8, 8), "MHA"), ((8, 1), "GQA 8:1")):
            for D in widths:
                where = f"N {N}, D {D}, {label}"
                for pattern in PATTERNS:
                    dense = pattern in ("dense", "causal")
                    for both in (False, True) if N <= 4096 else (False,):
                        yield lambda p=pattern, a=(N, D), h=heads, b=both, d=dense, w=where: Case(f"{p}, {'forward + backward' if b else 'forward'}, {w}",
                                                                                                  *attention(p, *a, heads=h, both=b), dense=d)
                for K, granularity in ((256, 1), (4, 64)):
                    yield lambda a=(N, D, K, granularity), h=heads, w=where: Case(f"selection of {a[2]} x {a[3]}, forward, {w}", *selection(*a, h))
                yield lambda a=(N, D), h=heads, w=where: Case(f"decode, {w}", *decode(*a, h))
