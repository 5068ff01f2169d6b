"""Attention over selected keys of DeepSeek's latent, checked, then timed: python -m sparsetile.bench.gather [--quick] [--bytes | --clustered] (a GPU with compute capability 9.0).

Checked by the numeric policy, in float64 on sampled queries: holes of every garbage, NaN behind every hole, rows cut short by lengths or the query's position, empty rows,
sinks. Timed: CuPy's and Triton's paths of the config in turn within each round (cold L2, median), 2 pairs (576 + 512) FLOPs, T 4096, K 2048, bfloat16.
--clustered: only the paths that calls take by themselves, over 128k keys, where 64 neighbouring queries choose from all keys and where they choose from the same 4096, as neighbours do on real data.
--bytes: a decode step instead, over DeepSeek's rows of 656 bytes in pages of 64, 128 sequences of 32k, positions translated in the call, as a CUDA graph; without a GPU at a small size on the CPU.
"""
import argparse

import numpy as np

from sparsetile.autotune import graphs, numeric, plain, timing
from sparsetile.ops.attention import sparse_attention
from sparsetile.ops.caches.latent import PagedLatent
from sparsetile.ops.selection import Selection

D, DV = 576, 512
PATHS = (("cupy", "hopper"), ("cupy", "tokens"), ("triton", "gluon"), ("triton", "tokens"), ("cupy", "portable"), ("triton", "portable"))


def inputs(torch, T, Hq, S, K, seed=0, pool=None):
    """q [1,Hq,T,D], latent [1,1,S,D], indices [1,1,T,K], distinct in each row; pool: 64 neighbouring queries choose from as many keys."""
    torch.manual_seed(seed)
    q, latent = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in ((1, Hq, T, D), (1, 1, S, D)))
    rows = [torch.rand(min(64, T - t), pool or S, device="cuda").topk(K, dim=1).indices.int() for t in range(0, T, 64)]
    if pool:
        rows = [torch.randperm(S, device="cuda", dtype=torch.int32)[:pool][row.long()] for row in rows]
    return q, latent, torch.cat(rows)[None, None, :, torch.randperm(K, device="cuda")].contiguous()


def config_of(path: str | None) -> dict | None:
    return None if path is None else {"path": path}


def check(torch, backend, path, T=300, Hq=128, S=8192, K=2048, causal=False):
    """One call with every trap, some queries of some heads against float64."""
    q, latent, indices = inputs(torch, T, Hq, S, K)
    indices %= S - 64  # the last keys are seen by nobody
    latent[:, :, S - 64:] = float("nan")
    garbage = torch.tensor([-1, -2 ** 31, -123456, S, 2 ** 31 - 1], device="cuda", dtype=torch.int32)
    holes = torch.rand(indices.shape, device="cuda") < 0.2
    indices[holes] = garbage[torch.randint(5, (int(holes.sum()),), device="cuda")]
    indices[0, 0, 5], indices[0, 0, 6, :K - 40] = -1, -1
    lengths = torch.full((1, 1, T), K, device="cuda", dtype=torch.int32)
    lengths[0, 0, 7:12] = torch.tensor([0, -3, 1, 33, K + 9], device="cuda")
    sink = torch.linspace(-3, 3, Hq, device="cuda")
    sink[:3] = torch.tensor([float("-inf"), float("inf"), 3e38])[:Hq]
    given = dict(value_width=DV, sink_logits=sink, q_start=4000, backend=backend, config=config_of(path))
    out, lse = sparse_attention(q, latent, None, Selection(indices, lengths=lengths, causal=causal), return_lse=True, **given)
    heads = np.unique([0, 1 % Hq, 2 % Hq, Hq // 2, Hq - 1]).tolist()
    for t in (0, 1, 5, 6, 7, 8, 9, 10, 11, 131, T // 2, T - 1):
        row = numeric.to_numpy(indices[0, 0, t])[:max(0, int(lengths[0, 0, t]))]
        row = row[(row >= 0) & (row < (min(S, 4000 + t + 1) if causal else S))]
        few = row if len(row) else np.zeros(1, np.int32)
        keys, query, sinks = numeric.to_numpy(latent[:, :, few.tolist()]), numeric.to_numpy(q[:, heads, t:t + 1]), numeric.to_numpy(sink[heads])
        count = np.full((1, 1, 1, len(few)), min(len(row), 1))
        wide = lambda x: x.astype(np.float64)  # noqa: E731
        truth = plain.attention(wide(query), wide(keys), wide(keys[..., :DV]), count, scale=D ** -0.5, sink_logits=sinks)
        formula = plain.attention(query, keys, keys[..., :DV], count, scale=D ** -0.5, sink_logits=sinks)
        for name, got, true, one in zip(("out", "lse"), (out[:, heads, t:t + 1], lse[:, heads, t:t + 1]), truth, formula):
            numeric.assert_close(f"{backend} {path}, {name} of query {t}", got, true, one, reduction=len(few) + D)
    assert torch.equal(out, sparse_attention(q, latent, None, Selection(indices, lengths=lengths, causal=causal), **given))
    print(f"{backend} {path or 'default'}{', causal' * causal}: 12 queries x {len(heads)} of {Hq} heads within the policy, the same bits twice", flush=True)


def cached(torch, device, B, S):
    """A cache of B sequences of S random latents in DeepSeek's bytes, and the same rows as numbers [B,S,576]."""
    torch.manual_seed(0)
    cache = PagedLatent.empty(torch.zeros(1, device=device), sequences=B, pages=B * -(-S // 64), dtype="float8")
    for first in range(0, S, 2048):
        n = min(2048, S - first)
        cache.append(torch.randn(B, n, DV, device=device), torch.randn(B, n, D - DV, device=device), backend="reference" if device == "cpu" else None)
    return cache, torch.cat(cache.gather("bfloat16"), -1)


def check_step(got, q, rows, indices):
    """The first and the last sequence, some heads, in float64 on the rows that gather() gives."""
    for b in (0, q.shape[0] - 1):
        heads, keys = [0, q.shape[1] - 1], numeric.to_numpy(rows[b][indices[b, 0, 0].long()])[None, None]
        query, count = numeric.to_numpy(q[b:b + 1, heads]), np.ones((1, 1, 1, keys.shape[2]))
        truth, formula = (plain.attention(query.astype(kind), keys.astype(kind), keys[..., :DV].astype(kind), count, scale=D ** -0.5)[0] for kind in (np.float64, query.dtype))
        numeric.assert_close(f"sequence {b}", numeric.to_numpy(got[b:b + 1, heads]), truth, formula, reduction=keys.shape[2] + D)


def step(torch, device, backends, B, S, K, heads, seconds):
    """A line for each number of heads: milliseconds of each backend, and whether graphs were timed."""
    cache, rows = cached(torch, device, B, S)
    indices = torch.stack([torch.rand(S, device=device).topk(K).indices.int() for _ in range(B)])[:, None, None]
    watch = timing.Stopwatch(None if device == "cpu" else 0)
    for Hq in heads:
        q = torch.randn(B, Hq, 1, D, device=device).bfloat16()
        calls = [lambda backend=backend: sparse_attention(q, cache, None, Selection(indices), backend=backend) for backend in backends]
        for call in calls:
            check_step(call(), q, rows, indices)
        recorded, how = (None, "calls") if device == "cpu" else graphs.record(calls, 0)
        times = [watch.centre(x) / 1e3 for x in timing.finals(watch, recorded or calls, seconds)]
        print(f"{Hq:6} heads, {B} x {S}, {K} keys: " + ", ".join(f"{backend} {ms:.4f} ms" for backend, ms in zip(backends, times)) + f" ({how})", flush=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repeats")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--bytes", action="store_true", help="a decode step over rows of 656 bytes")
    only.add_argument("--clustered", action="store_true", help="random beside clustered choices of 128k keys, by the default paths")
    given = parser.parse_args(arguments)
    import torch
    if given.clustered:
        clustered(torch, given.quick)
    elif not given.bytes:
        prefill(torch, given.quick)
    elif torch.cuda.is_available():
        step(torch, "cuda", ("cupy", "triton"), 128, 32768, 2048, (128, 64), 0.5 if given.quick else 2.0)
    else:
        step(torch, "cpu", ("reference",), 2, 150, 40, (4,), 0.0)


def prefill(torch, quick):
    for Hq in (128, 70, 17, 1):
        check(torch, "triton", "gluon", Hq=Hq)
        check(torch, "cupy", "hopper", Hq=Hq)
    check(torch, "triton", "gluon", causal=True)
    for Hq in (70, 32, 16, 8, 1):
        for backend in ("cupy", "triton"):
            check(torch, backend, "tokens", Hq=Hq)
    check(torch, "cupy", "portable"), check(torch, "triton", "portable")
    sizes = [(Hq, 32768, None) for Hq in (128, 64, 32, 16, 8)] + [(128, 131072, None), (128, 131072, 4096)]
    table(torch, PATHS, sizes if quick else sizes + [(64, 131072, None), (64, 131072, 4096), (1, 32768, None), (16, 131072, None), (16, 131072, 4096)], quick)


def clustered(torch, quick):
    paths, heads = (("cupy", None), ("triton", None)), (128, 16)
    for Hq in heads:
        for backend, path in paths:
            check(torch, backend, path, Hq=Hq)
    table(torch, paths, [(Hq, 131072, pool) for Hq in heads for pool in (None, 4096)], quick)


def table(torch, paths, sizes, quick, T=4096, K=2048):
    """A line for each (heads, keys, pool): milliseconds and rate of each path, in turn."""
    watch = timing.Stopwatch(0)
    print(f"{'heads':>6}{'S':>8}{'pool':>8}" + "".join(f"{backend + ' ' + (path or 'default') + ' ms':>20}{'TFLOP/s':>9}" for backend, path in paths), flush=True)
    for Hq, S, pool in sizes:
        q, latent, indices = inputs(torch, T, Hq, S, K, pool=pool)
        calls = [lambda backend=backend, path=path: sparse_attention(q, latent, None, Selection(indices), value_width=DV, backend=backend, config=config_of(path)) for backend, path in paths]
        for call in calls:
            call()
        samples = timing.finals(watch, calls, seconds=0.6 if quick else 5.0, most=10 if quick else 40)
        times = [watch.centre(x) / 1e3 for x in samples]
        print(f"{Hq:6}{S:8}{pool or 'all':>8}" + "".join(f"{ms:20.3f}{2 * T * Hq * K * (D + DV) / ms / 1e9:9.1f}" for ms in times), flush=True)


if __name__ == "__main__":
    main()
