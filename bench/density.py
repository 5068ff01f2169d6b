"""Does the cost follow the pairs? python -m sparsetile.bench.density [--quick] [--out FOLDER]

Random blocks of 128 at 32k, from 2 % to all of them, forward and backward on every GPU backend: time against pairs kept should be a straight line (least squares; R2 over 0.99), and all blocks
as random ones cost at most 5 % more than the dense pattern. Beside it ragged lengths: causal at 20011 against the next multiple of 128, per pair at most 5 % more. Every call is checked on a few rows
before it is timed, all calls of a backend and direction in turn. Writes FOLDER/density.json and FOLDER/density.png (needs matplotlib); leaves with 1 if an answer is wrong or an aim is missed.
"""
import argparse
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from sparsetile.autotune import tasks, timing  # noqa: E402
from sparsetile.bench import spot  # noqa: E402
from sparsetile.ops.patterns import Causal, Full, RandomBlocks  # noqa: E402

N, BLOCK, RAGGED = 32768, 128, 20011
PERCENT = (2, 5, 10, 25, 50, 75, 100)
LEAST_R2, MOST_OVER = 0.99, 1.05
BACKENDS, DIRECTIONS = ("cupy", "triton"), {"forward": "block_attention", "backward": "block_attention_backward"}


def cases() -> dict:
    """label -> (pattern, length)"""
    blocks = N // BLOCK
    return {**{f"{p} %": (RandomBlocks(max(1, round(p / 100 * blocks)), BLOCK, 1), N) for p in PERCENT}, "dense": (Full(), N), "ragged": (Causal(), RAGGED), "whole": (Causal(), -(-RAGGED // BLOCK) * BLOCK)}


def measured(kernel: str, backend: str, seconds: float) -> tuple[dict, dict]:
    """label -> (pairs of a head, milliseconds); label -> what is wrong"""
    watch, calls, pairs, wrong = timing.Stopwatch(0, flush_mb=1024), {}, {}, {}
    for label, (pattern, n) in cases().items():
        task = tasks.Task(tasks.Workload.of(f"gpu/{label}/{n}", kernel, "bfloat16", dict(pattern=pattern), B=1, Hq=32, Hk=32, T=n, S=n, D=128, Dv=128), 0)
        calls[label], pairs[label] = task.bound(backend), pattern.pairs(n, n)
        if found := spot.Judge(task).wrong(calls[label]()):
            wrong[label] = found
    times = timing.finals(watch, list(calls.values()), seconds)
    return {label: (pairs[label], watch.centre(x) / 1e3) for label, x in zip(calls, times)}, wrong


def line(found: dict) -> dict:
    """ms = start + slope * pairs of the random blocks; R2; all blocks beside dense; the ragged length's cost of a pair beside the whole one's."""
    x, y = np.array([found[f"{p} %"] for p in PERCENT]).T
    slope, start = np.polyfit(x, y, 1)
    of_pair = {label: found[label][1] / found[label][0] for label in ("ragged", "whole")}
    return {"start_ms": float(start), "ms_of_1e9_pairs": float(slope * 1e9), "r2": float(1 - ((y - start - slope * x) ** 2).sum() / ((y - y.mean()) ** 2).sum()),
            "all_over_dense": found["100 %"][1] / found["dense"][1], "ragged_over_whole": of_pair["ragged"] / of_pair["whole"]}


def missed(fit: dict) -> list[str]:
    aims = (("r2", fit["r2"] > LEAST_R2), ("all_over_dense", fit["all_over_dense"] <= MOST_OVER), ("ragged_over_whole", fit["ragged_over_whole"] <= MOST_OVER))
    return [f"{name} {fit[name]:.4f}" for name, reached in aims if not reached]


def plot(results: dict, path: Path, gpu: str):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    shown = [direction for direction in DIRECTIONS if any(name.startswith(direction) for name in results)]
    figure = Figure(figsize=(5.5 * len(shown), 4))
    for axes, direction in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown):
        for backend in BACKENDS:
            if f"{direction} {backend}" in results:
                x, y = np.array([results[f"{direction} {backend}"]["times"][f"{p} %"] for p in PERCENT]).T
                fit = results[f"{direction} {backend}"]["fit"]
                (dots,) = axes.plot(x / N ** 2 * 100, y, "o", label=f"{backend}, R2 {fit['r2']:.4f}")
                axes.plot(x / N ** 2 * 100, fit["start_ms"] + fit["ms_of_1e9_pairs"] * x / 1e9, color=dots.get_color(), linewidth=1)
        axes.set(xlabel="pairs kept (%)", ylabel="ms", title=f"{direction}, random blocks of 128 at 32k")
        axes.legend()
    figure.suptitle(gpu)
    figure.tight_layout()
    FigureCanvasAgg(figure).print_png(path)


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="five repeats, or what half a second holds; else three seconds")
    parser.add_argument("--backend", choices=BACKENDS, help="only this one")
    parser.add_argument("--direction", choices=DIRECTIONS, help="only this one")
    parser.add_argument("--out", type=Path, default=Path("density"), help="folder of the plot and the figures")
    args = parser.parse_args(arguments)
    results, bad, gpu = {}, 0, torch.cuda.get_device_name(0)
    args.out.mkdir(parents=True, exist_ok=True)
    for direction, kernel in DIRECTIONS.items():
        for backend in BACKENDS:
            if args.backend in (None, backend) and args.direction in (None, direction):
                times, wrong = measured(kernel, backend, 0.5 if args.quick else 3.0)
                fit = line(times)
                results[f"{direction} {backend}"] = {"times": times, "fit": fit, "wrong": wrong, "missed": missed(fit)}
                bad += bool(wrong or missed(fit))
                print(f"{direction} {backend}: " + "  ".join(f"{label} {ms:.2f}" for label, (_, ms) in times.items()) + f" ms | R2 {fit['r2']:.4f}, all / dense {fit['all_over_dense']:.3f}, "
                      f"ragged / whole {fit['ragged_over_whole']:.3f}" + "".join(f", {label} WRONG: {x[:120]}" for label, x in wrong.items()) + (f"; missed: {', '.join(missed(fit))}" if missed(fit) else ""), flush=True)
                (args.out / "density.json").write_text(json.dumps({"gpu": gpu, "n": N, "results": results}, indent=1))
                torch.cuda.empty_cache()
    plot(results, args.out / "density.png", gpu)
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
