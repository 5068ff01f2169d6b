"""Attention over float8 keys and values, checked, then timed: python -m sparsetile.bench.float8 [--quick] [--backend NAME ...] [--only WORD ...]

A decode step (one query, 64 sequences of 32k keys, Hq 32, Hk 8), and causal prefill at 8k (Hq 32, Hk 32): bfloat16 and float8 queries over float8 keys and values with a float32 scale for 128
keys, beside the same backend on bfloat16 and torch's attention on bfloat16, in turn within each round (CUDA events, cold L2), medians. Decoding is told in GB/s of keys and values, prefill in TFLOP/s.
Without a GPU: a small size on the CPU, minima. Checked first: some queries of the first and the last sequence and head against the float64 formula by the numeric policy.
"""
import numpy as np

from sparsetile.autotune import numeric, plain
from sparsetile.bench.calls import started, without_gradients
from sparsetile.ops.attention import sparse_attention
from sparsetile.ops.float8 import GROUP
from sparsetile.ops.patterns import Causal

FLUSH_MB = 1024


def shapes(cuda: bool) -> dict:
    """name -> B, Hq, Hk, T, S, D"""
    return {"decode": (64, 32, 8, 1, 32768, 128), "causal": (1, 32, 32, 8192, 8192, 128)} if cuda else {"decode": (2, 4, 2, 1, 300, 32), "causal": (1, 2, 2, 260, 260, 32)}


def quantised(torch, x, rows):
    """Values [B,H,N,D] as float8, and a scale for each so many rows, [B,H,ceil(N/rows)]."""
    B, H, N, D = x.shape
    groups = -(-N // rows)
    padded = torch.nn.functional.pad(x, (0, 0, 0, groups * rows - N)).view(B, H, groups, rows * D)
    scale = padded.abs().amax(-1).float().clamp(min=1e-6) / 448
    values = (padded / scale[..., None]).view(B, H, groups * rows, D)[:, :, :N].to(torch.float8_e4m3fn)
    return values.contiguous(), scale


def inputs(torch, device, shape, seed=0):
    """q, k, v in bfloat16, the same in float8, and the scales of those by name."""
    B, Hq, Hk, T, S, D = shape
    generator = torch.Generator(device).manual_seed(seed)
    wide = [torch.randn((B, heads, n, D), generator=generator, device=device, dtype=torch.bfloat16) for heads, n in ((Hq, T), (Hk, S), (Hk, S))]
    eight, scales = zip(*(quantised(torch, x, rows) for x, rows in zip(wide, (1, GROUP, GROUP))))
    return wide, eight, dict(zip(("q_scale", "k_scale", "v_scale"), scales))


def check(name, got, q, k, v, scales):
    """A few queries of the first and the last sequence and head."""
    (B, Hq, T, D), (Hk, S) = q.shape, k.shape[1:3]
    rows = np.unique([0, T // 2, T - 1])
    for b, h in ((0, 0), (B - 1, Hq - 1)):
        hk = h * Hk // Hq
        query, keys, values = (numeric.to_numpy(x[b:b + 1, n:n + 1]) for x, n in ((q, h), (k, hk), (v, hk)))
        by = {what: numeric.to_numpy(x[b:b + 1, h:h + 1][:, :, rows] if what == "q_scale" else x[b:b + 1, hk:hk + 1]) for what, x in scales.items()}
        query, count = query[:, :, rows], (np.arange(S) <= S - T + rows[:, None]).astype(int)[None, None]
        of_keys = {what: np.repeat(by[what], GROUP, 2)[:, :, :S, None] for what in ("k_scale", "v_scale")}
        wide = [x.astype(np.float64) for x in (query, keys, values)]
        truth = plain.attention(wide[0] * (by["q_scale"][..., None] if "q_scale" in by else 1), wide[1] * of_keys["k_scale"], wide[2] * of_keys["v_scale"], count, scale=D ** -0.5)[0]
        formula = plain.attention(query, keys, values, count, scale=D ** -0.5, **by)[0]
        numeric.assert_close(f"{name}, sequence {b}, head {h}", numeric.to_numpy(got[b:b + 1, h:h + 1])[:, :, rows], truth, formula, reduction=S + D,
                             accumulator="float8" if "q_scale" in by else "float32")


def main(arguments=None):
    import torch
    run = started(torch, "float8", __doc__, "only shapes whose name begins so: decode, causal", FLUSH_MB, arguments)
    for name, shape in shapes(run.cuda).items():
        if not name.startswith(tuple(run.given.only)):
            continue
        (q, k, v), (q8, k8, v8), scales = inputs(torch, run.device, shape)
        keys, every = {what: scales[what] for what in ("k_scale", "v_scale")}, {}
        B, Hq, _, T, S, D = shape
        wide = {"torch": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=True)}
        for backend in run.backends:
            attend = lambda q, k, v, backend=backend, **how: sparse_attention(q, k, v, Causal(), backend=backend, **how)  # noqa: E731
            mixed, eight = lambda attend=attend: attend(q, k8, v8, **keys), lambda attend=attend: attend(q8, k8, v8, **keys, q_scale=scales["q_scale"])
            with torch.no_grad():
                check(f"{name}, {backend}", mixed(), q, k8, v8, keys)
                check(f"{name}, {backend}, float8 queries", eight(), q8, k8, v8, keys | {"q_scale": scales["q_scale"]})
            wide[backend or "auto"] = lambda attend=attend: attend(q, k, v)
            every |= {f"{backend or 'auto'}, bfloat16 over float8": mixed, f"{backend or 'auto'}, float8": eight}
        print(f"{name}: queries of 2 sequences and heads within the policy", flush=True)
        every = {what: without_gradients(torch, call) for what, call in {**{f"{who}, bfloat16": call for who, call in wide.items()}, **every}.items()}
        times = run.times(every, (1.0, 10), (10.0, 40))
        print(f"{name}, B {B}, Hq {Hq}, Hk {shape[2]}, T {T}, S {S}, D {D}, {run.on(torch)}")
        for what, ms in times.items():
            moved = 2 * k.numel() * (k.element_size() if what.endswith(", bfloat16") else 1)
            rate = f"{moved / ms / 1e6:8.0f} GB/s" if T == 1 else f"{4 * B * Hq * D * Causal().pairs(T, S) / ms / 1e9:8.1f} TFLOP/s"
            print(f"{what:32}{ms:10.3f} ms {rate}{ms / times['torch, bfloat16']:9.2f} of dense", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
