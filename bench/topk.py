"""Exact top-k over scores of every kind beside normal ones: python -m sparsetile.bench.topk [--quick] [--backend NAME ...]

Top 2048 of 4096 rows of 131072 and of 32768 float32 scores. A kernel looks at a sample of a row first, so each distribution is told as a ratio to normal data of the same run: the listed ones are to cost
at most 3 times as much, rows made against the sample (their best scores stand where few samples are taken, or all samples lie) 5 times. Checked first: some rows against a stable sort. Calls in turn
within each round, cold L2, medians. Without a GPU: a small size on the CPU, minima.
"""
import argparse

from sparsetile.autotune import numeric, timing
from sparsetile.ops.indexer import topk

ROWS = 8  # compared with a stable sort


def sizes(cuda: bool) -> tuple:
    """Rows, how many of each are chosen, widths."""
    return (4096, 2048, (131072, 32768)) if cuda else (8, 100, (16384,))


def listed(torch) -> dict:
    """name -> scores of normal ones x [T, S], the distributions that systems break on."""
    uniform, special = torch.rand_like, lambda x, low, what: torch.where(torch.rand_like(x) < low, what, x)
    return {"normal": lambda x: x, "ReLU-sparse": lambda x: (x - 1.5).relu(), "narrow band": lambda x: 10 + 0.2 * uniform(x), "all equal": lambda x: torch.full_like(x, 2.5),
            "sorted up": lambda x: x.sort(-1).values, "sorted down": lambda x: x.sort(-1, descending=True).values, "in blocks": lambda x: (3 * x[:, ::64]).repeat_interleave(64, -1) + 0.01 * x,
            "huge": lambda x: x * 1e37, "tiny": lambda x: x * 1e-38, "NaN and inf": lambda x: special(special(special(x, 0.1, float("nan")), 0.002, float("inf")), 0.1, -float("inf"))}


def against(torch) -> dict:
    """Rows made against a sample, whether it is the row's beginning, every so many scores, or pieces of them: what it shows is far above the rest, or far below."""
    def where(at, shift):
        return lambda x: torch.where(at(torch.arange(x.shape[-1], device=x.device)), x + shift, x)
    found = {}
    for name, shift in (("above", 20.0), ("below", -20.0)):
        found |= {f"first 4096 {name}": where(lambda s: s < 4096, shift), f"each 32nd {name}": where(lambda s: s % 32 == 0, shift), f"each 128th float4 {name}": where(lambda s: s % 512 < 4, shift),
                  f"even 1024s {name}": where(lambda s: s // 1024 % 2 == 0, shift)}
    return found


def check(torch, name, x, K, backends):
    """All backends choose the same, and some rows what a stable sort puts first."""
    rows = torch.linspace(0, len(x) - 1, ROWS, device=x.device).long()
    first = None
    for backend in backends:
        got = topk(x[None], K, backend=backend)
        numeric.assert_topk(f"{backend}, {name}", got.indices[0, 0, rows], got.lengths[0, 0, rows], x[rows], K)
        first = got if first is None else first
        assert torch.equal(got.indices, first.indices) and torch.equal(got.lengths, first.lengths), f"{name}: {backend} and {backends[0]} chose differently"


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="sparsetile.bench.topk", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--backend", nargs="+", help="backends; by default both of a GPU, and on a CPU numba")
    given = parser.parse_args(arguments)
    import torch
    cuda = torch.cuda.is_available()
    device, backends, (T, K, widths) = "cuda" if cuda else "cpu", given.backend or (["cupy", "triton"] if cuda else ["numba"]), sizes(cuda)
    missed, watch, kinds = 0, timing.Stopwatch(0 if cuda else None), {name: (most, make) for most, makes in ((3, listed(torch)), (5, against(torch))) for name, make in makes.items()}
    for S in widths:
        normal = torch.randn(T, S, device=device, generator=torch.Generator(device).manual_seed(0))
        print(f"top {K} of [{T}, {S}], {torch.cuda.get_device_name() if cuda else 'CPU'}\n{'scores':28}" + "".join(f"{backend + ' ms':>12}{'x normal':>10}" for backend in backends) + "  at most", flush=True)
        for name, (most, make) in kinds.items():
            torch.manual_seed(0)
            x = make(normal)
            check(torch, name, x, K, backends)
            calls = [lambda rows=rows, backend=backend: topk(rows[None], K, backend=backend) for rows in (x, normal) for backend in backends]
            times = [watch.centre(one) / 1e3 for one in timing.finals(watch, calls, seconds=0.0 if not cuda else 0.1 if given.quick else 1.0, most=5 if given.quick else 20)]
            ratios = [times[n] / times[n + len(backends)] for n in range(len(backends))]
            over = " OVER" if max(ratios) > most else ""
            missed += bool(over)
            print(f"{name:28}" + "".join(f"{ms:12.3f}{ratio:10.2f}" for ms, ratio in zip(times, ratios)) + f"{most:9}{over}", flush=True)
            del x, calls
    return int(cuda and missed > 0)  # a CPU's few scores are too quickly chosen from


if __name__ == "__main__":
    raise SystemExit(main())
