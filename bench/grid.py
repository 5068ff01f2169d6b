"""Block attention at other lengths and with fewer key heads: python -m sparsetile.bench.grid [--quick] [--knobs BACKEND:KNOB=VALUE ...] [--share I/N] [--out FILE]

Every pattern that has a figure to compare with, at N 8k, 32k and 128k, with 32 and 8 key heads to 32 query heads, forward and backward, both GPU backends beside cuDNN
(causal) or the compiled FlexAttention (--flex: tens of seconds each to compile). The floor of a shape is the table's floor of its pattern times what the peer reaches here / what it reached in the table
(bench/gpu_rows.py). --knobs: variants of a backend's default config beside it, each with some knobs set, e.g. cupy:sums=1 cupy:sums=2. Each answer is checked on a few rows before it is timed, all of a shape in turn (CUDA events, cold L2, median). Leaves with 1 if an answer is wrong.
"""
import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from sparsetile.autotune import measure, tasks, timing  # noqa: E402
from sparsetile.bench import gpu_rows, gpu_table, gpu_worker, peers, spot  # noqa: E402
from sparsetile.ops import dispatch  # noqa: E402

LENGTHS, KEY_HEADS = (8192, 32768, 131072), (32, 8)
PATTERNS = ("causal", "window-4096", "window-1024", "longformer-512", "bigbird-128")
DIRECTIONS = ("", "/backward")


def cases() -> list[tuple]:
    """(name, workload, row of the table that it varies); what stands in the table itself is left out."""
    rows, found = {row.workload: row for row in gpu_rows.ROWS}, []
    for pattern in PATTERNS:
        for n in LENGTHS:
            for Hk in KEY_HEADS:
                for direction in DIRECTIONS:
                    row = rows[f"gpu/{pattern}/32768{direction}"]
                    if Hk == 8 or f"gpu/{pattern}/{n}{direction}" not in rows:
                        base = tasks.find(row.workload)
                        sizes = tuple({**dict(base.sizes), "Hk": Hk, "T": n, "S": n}.items())
                        found.append((f"{row.name.removesuffix(' 32k')} {n // 1024}k Hk {Hk}", replace(base, name=f"gpu/{pattern}-hk{Hk}/{n}{direction}", sizes=sizes), row))
    return found


def floor(row, rates: dict) -> float | None:
    """The row's floor times a peer's rate here / in the table: cuDNN's where it ran, else FlexAttention's."""
    stored = dict(row.stored)
    return next((row.floor / stored[who] * rates[who] for who in ("cuDNN", "Flex") if who in rates and who in stored), None)


def varied(task, variant: str) -> peers.Peer:
    """BACKEND:KNOB=VALUE,...: the backend's default config with these knobs."""
    backend, _, knobs = variant.partition(":")
    kernel = dispatch.kernel(backend, task.workload.kernel)
    known = {knob.name: knob.values for knob in kernel.TUNABLES}

    def make():
        chosen = {name: next(x for x in known[name] if str(x) == value) for name, value in (knob.split("=") for knob in knobs.split(","))}
        return task.bound(backend, {**kernel.default_config(task.problem), **chosen})
    return peers.Peer(variant, make)


def measured(workload, watch, seconds: float, compiled: bool, variants=()) -> tuple[dict, dict]:
    """who -> TFLOP/s; who -> why not"""
    task = tasks.Task(workload, 0)
    judge, flops, calls, failed = spot.Judge(task), measure.operations(task), {}, {}
    for who in gpu_worker.candidates(task, compiled) + [varied(task, x) for x in variants]:
        try:
            call = who.make()
            if wrong := judge.wrong(call()):
                failed[who.name] = f"wrong: {wrong[:150]}"
            if not wrong or who.name.partition(":")[0] not in gpu_worker.OURS:
                calls[who.name] = call
        except Exception as error:
            failed[who.name] = gpu_worker.failure(error)[:150]
    times = timing.finals(watch, list(calls.values()), seconds, 5)
    return {who: round(flops / watch.centre(x) / 1e6, 1) for who, x in zip(calls, times)}, failed


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--flex", action="store_true", help="the compiled FlexAttention beside patterns that cuDNN cannot have")
    parser.add_argument("--knobs", nargs="+", default=[], metavar="BACKEND:KNOB=VALUE", help="a backend's default config with these knobs (joined by commas), beside it")
    parser.add_argument("--share", type=gpu_table._part, default="1/1", help="every N-th shape from the I-th on, as I/N, for several GPUs")
    parser.add_argument("--only", nargs="+", default=[], help="shapes whose name contains one of these words")
    parser.add_argument("--out", type=Path, help="a line of JSON for each shape, appended")
    args = parser.parse_args(arguments)
    watch, bad, gpu = timing.Stopwatch(0, flush_mb=1024), 0, torch.cuda.get_device_name(0)
    chosen = [case for case in cases() if not args.only or any(word.lower() in case[0].lower() for word in args.only)]
    print(f"TFLOP/s, {gpu}\n{'':36}{'triton':>8}{'cupy':>8}{'floor':>8}  beside", flush=True)
    for name, workload, row in gpu_table.share(chosen, args.share):
        rates, failed = measured(workload, watch, 0.3 if args.quick else 2.0, args.flex and not row.name.endswith("causal 32k"), args.knobs)
        least = floor(row, rates)
        bad += any(who in failed for who in (*gpu_worker.OURS, *args.knobs))
        others = [f"{who} {rate:.0f}" for who, rate in rates.items() if who not in gpu_worker.OURS] + [f"{who}: {why}" for who, why in failed.items()]
        print(f"{name:36}" + "".join(f"{gpu_table.shown(x, 'TFLOP/s'):>8}" for x in (rates.get("triton"), rates.get("cupy"), least)) + "  " + ", ".join(others), flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps({"gpu": gpu, "shape": name, "tflops": rates, "floor": least and round(least, 1), "failed": failed}) + "\n")
        torch.cuda.empty_cache()
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
