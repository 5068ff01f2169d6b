"""Native Sparse Attention, checked, then timed branch by branch: python -m sparsetile.bench.nsa [--quick] [--length N ...] [--backend NAME] [--parts NAME ...] [--alone]

Hq 64, Hk 4, D 128, blocks of 64, 16 of them, window 512, bfloat16, at 64k and 8k: the compressed branch (32 at stride 16) with the means it reads, the choice of blocks, the selected branch,
the sliding one, gates, and all of it in one call; the backward of the selected branch and of the whole. Beside them in the same run: torch's causal attention, forward and backward, and
flash-linear-attention's NSA where it is installed, which compresses to 64 at stride 64. Calls in turn within each round (cold L2 on a GPU, the host ahead; its own time for a call stands beside), medians. Without a GPU: a small size on the CPU, minima.
Checked first: some queries of every branch against the float64 formula by the numeric policy, and the choice by its float64 importances.
"""
import argparse
import time
from importlib.util import find_spec

import numpy as np

from sparsetile.autotune import numeric, plain, timing
from sparsetile.autotune.tasks import Workload
from sparsetile.bench.calls import backward, report_first, without_gradients
from sparsetile.ops.attention import sparse_attention
from sparsetile.ops.importance import importance_topk
from sparsetile.ops.patterns import Compressed, Window
from sparsetile.systems import nsa

FLUSH_MB = 8192  # two milliseconds of writing: longer than a busy host needs to launch all of a call, of which 8k tokens take no more than that
TUNED_AT = 2048
PAPER = dict(block=32, stride=16, select_block=64, top_k=16, window=512)


def inputs(torch, device, N, Hq, Hk, D, seed=0):
    """q [1,Hq,N,D], k, v [1,Hk,N,D], gates [1,Hq,N,3]."""
    generator, kind = torch.Generator(device).manual_seed(seed), torch.bfloat16 if device != "cpu" else torch.float32
    q, k, v = (torch.randn((1, heads, N, D), generator=generator, device=device, dtype=kind) for heads in (Hq, Hk, Hk))
    return q, k, v, torch.rand((1, Hq, N, 3), generator=generator, device=device, dtype=kind)


def check(q, k, v, backend):
    """A few queries of each branch and of the choice, in float64, as they lie in the whole call."""
    host, (N, D) = numeric.to_numpy, q.shape[2:]
    ck, cv = nsa.compressed_keys(k, v, "mean", 32, 16)
    coarse, lse = sparse_attention(q, ck, cv, Compressed(32, 16), return_lse=True, q_start=0, backend=backend)
    chosen = importance_topk(q, ck, lse, PAPER["top_k"], keys=N, backend=backend)
    fine, near = sparse_attention(q, k, v, chosen, backend=backend), sparse_attention(q, k, v, Window(PAPER["window"] - 1), backend=backend)
    rows, h, group = np.array([0, 30, 31, 700, N // 2 + 5, N - 1]) % N, q.shape[1] - 1, q.shape[1] // k.shape[1]
    w = Workload.of("nsa", "importance_topk", T=N, S=N)
    held = [host(x) for x in (q[:, -group:][:, :, rows], ck[:, -1:], lse[:, -group:][:, :, rows])]
    (forced, seen), found = plain.forced_blocks(w, rows), host(chosen.indices[:, -1:][:, :, rows])
    numeric.assert_chosen("blocks", found, (found >= 0).sum(-1).astype(np.int32), plain.importances(w, *(x.astype(np.float64) for x in held), rows),
                          plain.importances(w, *held, rows), PAPER["top_k"], visible=seen, forced=forced, reduction=group * D)
    s, p = np.arange(N), rows[:, None]
    masks = np.arange(ck.shape[2]) * 16 + 31 <= p, (s <= p) & (s[None, :, None] // 64 == found[0, 0][:, None]).any(-1), (s <= p) & (s > p - PAPER["window"])
    for name, out, keys, values, mask in zip(("compressed", "selected", "sliding"), (coarse, fine, near), (ck, k, k), (cv, v, v), masks):
        some = mask.any(0)
        some[0] = True
        got, query = host(out[:, h:][:, :, rows]), host(q[:, h:][:, :, rows])
        keys, values, mask = host(keys[:, -1:])[:, :, some], host(values[:, -1:])[:, :, some], mask[:, some].astype(int)[None, None]
        truth = plain.attention(*(x.astype(np.float64) for x in (query, keys, values)), mask, scale=D ** -0.5)[0]
        numeric.assert_close(name, got, truth, plain.attention(query, keys, values, mask, scale=D ** -0.5)[0], reduction=int(some.sum()) + D)
    print(f"N {N}: {len(rows)} queries of each branch within the policy", flush=True)


def calls(torch, q, k, v, gates, backend):
    """name -> a call; what one needs of another is made before."""
    N, options = q.shape[2], dict(backend=backend)
    with torch.no_grad():
        ck, cv = nsa.compressed_keys(k, v, "mean", 32, 16)
        coarse, lse = sparse_attention(q, ck, cv, Compressed(32, 16), return_lse=True, q_start=0, **options)
        chosen = importance_topk(q, ck, lse, PAPER["top_k"], keys=N, **options)
        outs = coarse, sparse_attention(q, k, v, chosen, **options), sparse_attention(q, k, v, Window(511), **options)
    whole = lambda *x: nsa.native_sparse_attention(*x, **PAPER, **options)  # noqa: E731
    dense = lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: E731
    found = {
        "means": lambda: nsa.compressed_keys(k, v, "mean", 32, 16), "compressed": lambda: sparse_attention(q, ck, cv, Compressed(32, 16), return_lse=True, q_start=0, **options),
        "choice": lambda: importance_topk(q, ck, lse, PAPER["top_k"], keys=N, **options), "selected": lambda: sparse_attention(q, k, v, chosen, **options),
        "sliding": lambda: sparse_attention(q, k, v, Window(511), **options), "gates": lambda: nsa.gated(outs, gates.unbind(-1), q, backend),
        "NSA, all": lambda: whole(q, k, v, gates), "dense, torch": lambda: dense(q, k, v)}
    found = {name: without_gradients(torch, call) for name, call in found.items()}
    found["selected, backward"] = backward(torch, lambda q, k, v: sparse_attention(q, k, v, chosen, **options), q, k, v)
    found["NSA, all, backward"], found["dense, torch, backward"] = backward(torch, whole, q, k, v, gates), backward(torch, dense, q, k, v)
    return found


def fla(torch, q, k, v, gates):
    """flash-linear-attention's parts: tokens before heads, a power-of-two group of 16 or more, its window by flash-attn, which is left out.

    Its kernels tune themselves at their first call, of 62 configs, by keys that know no length: call this with TUNED_AT tokens first, where a slow config takes 10 ms and not seconds.
    """
    from fla.ops.nsa.compression import parallel_nsa_compression
    from fla.ops.nsa.parallel import parallel_nsa, parallel_nsa_topk
    from fla.ops.utils.pooling import mean_pooling
    q, k, v, g = (x.transpose(1, 2).contiguous() for x in (q, k, v, gates))
    N, scale = q.shape[1], q.shape[3] ** -0.5
    with torch.no_grad():
        pooled = [mean_pooling(x, 64) for x in (k, v)]
        _, lse = parallel_nsa_compression(q=q, k=pooled[0], v=pooled[1], TK=N, block_size=64, scale=scale)
        blocks = parallel_nsa_topk(q=q, k=pooled[0], TK=N, lse=lse, block_counts=16, block_size=64, scale=scale)
    chosen = lambda q, k, v: parallel_nsa(q, k, v, g_slc=g[..., 1].contiguous(), block_indices=blocks, block_counts=16, block_size=64)  # noqa: E731
    found = {"FLA compressed": lambda: parallel_nsa_compression(q=q, k=pooled[0], v=pooled[1], TK=N, block_size=64, scale=scale),
             "FLA choice": lambda: parallel_nsa_topk(q=q, k=pooled[0], TK=N, lse=lse, block_counts=16, block_size=64, scale=scale), "FLA selected": lambda: chosen(q, k, v)}
    return {name: without_gradients(torch, call) for name, call in found.items()} | {"FLA, selected, backward": backward(torch, chosen, q, k, v)}


def operations(name, N, Hq, D) -> float | None:
    """Of the pairs that are seen: 4 D forward for a pair of a branch, 2 D for one of the choice, 10 D backward."""
    p = np.arange(N, dtype=np.int64)
    coarse, fine, near = np.clip((p - 31) // 16 + 1, 0, None).sum(), np.minimum(p + 1, 15 * 64 + p % 64 + 1).sum(), np.minimum(p + 1, 512).sum()
    pairs = {"compressed": 4 * coarse, "choice": 2 * coarse, "selected": 4 * fine, "sliding": 4 * near, "NSA, all": 6 * coarse + 4 * fine + 4 * near, "dense, torch": 4 * (p + 1).sum(),
             "selected, backward": 10 * fine, "dense, torch, backward": 10 * (p + 1).sum(), "NSA, all, backward": 10 * (coarse + fine + near)}
    return float(pairs[name]) * Hq * D if name in pairs else None


def main(arguments=None):
    import torch
    parser = argparse.ArgumentParser(prog="sparsetile.bench.nsa", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds; on a CPU the smallest size")
    parser.add_argument("--length", type=int, nargs="*", help="tokens")
    parser.add_argument("--backend", help="one backend; by default the profile's or the first")
    parser.add_argument("--parts", nargs="*", default=[""], help="only the rows whose names begin so (NSA, dense, FLA, 'FLA ' without its backward, ...)")
    parser.add_argument("--alone", action="store_true", help="without flash-linear-attention, whose own tuning takes most of a minute")
    given = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    Hq, Hk, D = (64, 4, 128) if cuda else (8, 2, 32)
    watch, wanted = timing.Stopwatch(0 if cuda else None, flush_mb=FLUSH_MB), lambda name: name.startswith(tuple(given.parts))
    peers = cuda and not given.alone and find_spec("fla") and any(part in "FLA" or part.startswith("FLA") for part in given.parts)
    if peers:
        report_first(watch, {f"{name}, {TUNED_AT} tokens": call for name, call in fla(torch, *inputs(torch, "cuda", TUNED_AT, Hq, Hk, D)).items() if wanted(name)})
    for N in given.length or ((65536, 8192) if cuda else (1100,)):
        q, k, v, gates = inputs(torch, "cuda" if cuda else "cpu", N, Hq, Hk, D)
        with torch.no_grad():
            check(q, k, v, given.backend)
        every = {**calls(torch, q, k, v, gates, given.backend), **(fla(torch, q, k, v, gates) if peers else {})}
        ours = {name: call for name, call in every.items() if wanted(name)}
        report_first(watch, ours)
        host = {name: f"{host_us(watch, call):8.0f} us of the host" for name, call in ours.items() if cuda and not name.endswith("backward")}
        samples = timing.finals(watch, list(ours.values()), seconds=0.0 if given.quick and not cuda else 2.0 if given.quick else 20.0, most=5 if given.quick else 40)
        times = {name: watch.centre(x) / 1e3 for name, x in zip(ours, samples)}
        print(f"N {N}, Hq {Hq}, Hk {Hk}, D {D}, {torch.cuda.get_device_name() if cuda else 'CPU'}")
        for name, ms in times.items():
            work, dense = operations(name, N, Hq, D), times.get("dense, torch, backward" if name.endswith("backward") else "dense, torch")
            beside = "" if dense is None else f"{ms / dense:9.2f} of dense"
            print(f"{name:26}{ms:10.3f} ms{'' if work is None else f'{work / ms / 1e6:11.0f} GFLOP/s':>20}{beside}{host.get(name, '')}", flush=True)
    return 0


def host_us(watch, call) -> float:
    """What the host needs until a call is queued, the least of three."""
    def once():
        watch.synchronize()
        begun = time.perf_counter()
        call()
        return (time.perf_counter() - begun) * 1e6
    return min(once() for _ in range(3))


if __name__ == "__main__":
    raise SystemExit(main())
