"""Selectors whose heads choose for themselves, checked, then timed: python -m sparsetile.bench.selectors [--quick] [--backend NAME ...] [--only WORD ...]

Hq 32, Hk 8, D 128, bfloat16: MoBA (blocks of 512, four of them) at 16k and 64k, exact top-2048 at 16k: the choice alone, attention over keys chosen before, its backward, and all of a MoBA call.
Beside them in the same run: torch's causal attention, forward and backward. Calls in turn within each round (CUDA events, cold L2, the host ahead), medians. Without a GPU: a small size on the CPU,
minima. Checked first: some queries of some heads, out and dq, against the float64 formula over the chosen keys by the numeric policy.
"""
import numpy as np

from sparsetile.autotune import numeric, plain
from sparsetile.bench.calls import backward, started, without_gradients
from sparsetile.bench.nsa import FLUSH_MB
from sparsetile.ops.attention import sparse_attention
from sparsetile.systems.exact_topk import exact_topk_selection
from sparsetile.systems.moba import moba, moba_selection


def cases(cuda: bool) -> list[tuple]:
    """(name, tokens, choice, whole call or None); both take q, k (and v) and a backend."""
    block, top_k, kept, lengths = (512, 4, 2048, (16384, 65536)) if cuda else (32, 3, 24, (300, 500))
    mixture = dict(block=block, top_k=top_k)
    found = [(f"MoBA {block} x {top_k}", N, lambda q, k, b: moba_selection(q, k, backend=b, **mixture), lambda q, k, v, b: moba(q, k, v, backend=b, **mixture)) for N in lengths]
    return found + [(f"exact top-{kept}", lengths[0], lambda q, k, b: exact_topk_selection(q, k, top_k=kept, backend=b), None)]


def inputs(torch, device, N, Hq, Hk, D, seed=0):
    """q [1,Hq,N,D], k, v [1,Hk,N,D]."""
    generator, kind = torch.Generator(device).manual_seed(seed), torch.bfloat16 if device != "cpu" else torch.float32
    return [torch.randn((1, heads, N, D), generator=generator, device=device, dtype=kind) for heads in (Hq, Hk, Hk)]


def counts(chosen, h, rows, N):
    """[rows, N] how often some queries of a head see each key."""
    g, p = chosen.granularity, rows[:, None, None]
    entries = numeric.to_numpy(chosen.indices[0, h])[rows][..., None]
    keys = entries * g + np.arange(g)
    seen = (entries >= 0) & (keys < N) & ((keys <= p) | (not chosen.causal))
    found = np.zeros((len(rows), N + 1), int)
    np.add.at(found, (np.broadcast_to(np.arange(len(rows))[:, None, None], keys.shape), np.where(seen, keys, N)), 1)
    return found[:, :N]


def check(torch, q, k, v, chosen, backend):
    """Some queries of some heads, the first among them: out and dq in float64, as they lie in the whole call."""
    dout, (_, Hq, N, D) = torch.randn_like(q), q.shape
    given = [x.detach().requires_grad_() for x in (q, k, v)]
    out = sparse_attention(*given, chosen, backend=backend)
    dq, dk, dv = torch.autograd.grad(out, given, dout)
    assert all(bool(x.isfinite().all()) for x in (out, dq, dk, dv)), "not finite everywhere"
    rows, heads = np.unique(np.concatenate((np.arange(16), np.linspace(16, N - 1, 48).astype(int)))), np.unique(np.linspace(0, Hq - 1, 8).astype(int))
    found = {"out": [], "dq": []}
    for h in heads:
        count = counts(chosen, h, rows, N)
        some = count.any(0)
        query, gradient, *got = (numeric.to_numpy(x[:, h:h + 1].detach())[:, :, rows] for x in (q, dout, out, dq))
        keys, values = (numeric.to_numpy(x[:, h * k.shape[1] // Hq])[:, some][:, None] for x in (k, v))
        held, seen, how = (query, keys, values), count[None, None, :, some], dict(scale=D ** -0.5)
        wide = [x.astype(np.float64) for x in held]
        found["out"].append((got[0], plain.attention(*wide, seen, **how)[0], plain.attention(*held, seen, **how)[0]))
        found["dq"].append((got[1], plain.attention_gradients(*wide, seen, gradient.astype(np.float64), **how)[0], plain.attention_gradients(*held, seen, gradient, **how)[0]))
    for name, parts in found.items():  # of all heads at once: of few rows of few keys even the plain formula may be right by luck
        numeric.assert_close(name, *(np.concatenate(x, 1) for x in zip(*parts)), reduction=N + D)
    print(f"{backend or 'auto'}: {len(rows)} queries of {len(heads)} heads within the policy", flush=True)


def calls(torch, q, k, v, choice, whole, chosen, backend) -> dict:
    """part -> a call."""
    found = {"choice": lambda: choice(q, k, backend), "attention": lambda: sparse_attention(q, k, v, chosen, backend=backend)}
    if whole is not None:
        found["all"] = lambda: whole(q, k, v, backend)
    found = {name: without_gradients(torch, call) for name, call in found.items()}
    return found | {"backward": backward(torch, lambda q, k, v: sparse_attention(q, k, v, chosen, backend=backend), q, k, v)}


def main(arguments=None):
    import torch
    run = started(torch, "selectors", __doc__, "only systems whose name and length contain one of these words (MoBA, exact, 16384, ...)", FLUSH_MB, arguments)
    Hq, Hk, D = (32, 8, 128) if run.cuda else (4, 2, 32)
    for system, N, choice, whole in cases(run.cuda):
        if not any(word.lower() in f"{system} {N}".lower() for word in run.given.only):
            continue
        q, k, v = inputs(torch, run.device, N, Hq, Hk, D)
        with torch.no_grad():
            chosen = choice(q, k, run.backends[-1])
        dense = lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: E731
        every = {"dense, torch": without_gradients(torch, lambda: dense(q, k, v)), "dense, torch, backward": backward(torch, dense, q, k, v)}
        for backend in run.backends:
            check(torch, q, k, v, chosen, backend)
            every |= {f"{part}, {backend or 'auto'}": call for part, call in calls(torch, q, k, v, choice, whole, chosen, backend).items()}
        times = run.times(every, (2.0, 5), (20.0, 40))
        print(f"{system}, N {N}, Hq {Hq}, Hk {Hk}, D {D}, {run.on(torch)}")
        for name, ms in times.items():
            print(f"{name:26}{ms:10.3f} ms{ms / times['dense, torch, backward' if 'backward' in name else 'dense, torch']:9.2f} of dense", flush=True)
        del q, k, v, chosen, every
        if run.cuda:
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
