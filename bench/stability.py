"""Does tuning make the same pick again? python -m sparsetile.bench.stability cpu/window-256/4096 --backend numba --runs 10

Fresh runs, one after the other on each device (--device all: on every GPU of the host at once), each in a process of its own with a seed of its own and no profile to
lean on. Then one more process times every distinct pick beside the others, interleaved: picks within the tie band of the fastest are the same pick. A band over 2 % is a failure of the timing, not a tie.
Exit code 1 if a pick lies outside the band, or a band is over 2 %.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sparsetile.autotune import hunt, isolate, tasks, timing, tune  # noqa: E402
from sparsetile.backends.devices import cpu_count  # noqa: E402
from sparsetile.profiles import schema  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def one(workload: str, backend: str, device: str, seconds: float, seed: int, beside: int = 1) -> dict:
    """The entry that a fresh run writes. beside: so many runs at once share the host's cores."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sparsetile", "tune", workload, "--backend", backend, "--device", device, "--seconds", str(seconds), "--seed", str(seed), "--profiles", folder, "--json"]
        env = {**os.environ, "SPARSETILE_COMPILERS": str(max(1, cpu_count() // beside - 2))} if beside > 1 else None
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"run {seed} failed: {done.stdout[-500:]}{done.stderr[-500:]}")
        (path,) = Path(folder).rglob("*.yaml")
        return schema.load(path)["entries"][0]


def judged(workload, backend: str, device, picks: list) -> tuple[list, float]:
    """(microseconds of each pick, the band of ties), all timed in one process in turn."""
    worker = tune._bench(tune.BENCH, device, True)
    worker.open(workload, 1000)
    samples, _ = worker("finals", [(backend, config) for config in picks], 4 * hunt.FINALS, tuple(range(len(picks))), seconds=isolate.STARTING)
    lost = [config for config, found in zip(picks, samples) if not found]
    if lost:
        raise RuntimeError(f"{lost[0]} gives no right answer when it is timed again")
    times = [statistics.median(found) for found in samples]
    return times, max(0.01, timing.error(samples[times.index(min(times))]))


def summary(entries: list, picks: list, times: list, band: float) -> dict:
    """What came of it; picks within the band of the fastest are one."""
    counts = [sum(dict(e["config"]) == config for e in entries) for config in picks]
    apart = [time_us / min(times) - 1 for time_us in times]
    bands = [e["band"] for e in entries]
    return {"runs": len(entries), "picks": [{"config": config, "runs": n, "time_us": round(t, 2), "behind": round(a, 4)} for config, n, t, a in zip(picks, counts, times, apart)], "band": round(band, 4),
            "ties": [e["ties"] for e in entries], "bands": bands, "same": max(apart) <= band, "timing_ok": max(bands) <= timing.WIDE and band <= timing.WIDE}


def text(found: dict) -> str:
    lines = [f"{p['runs']:3} of {found['runs']} runs: {p['time_us']:10.2f} us, {p['behind']:+.2%}  {p['config']}" for p in sorted(found["picks"], key=lambda p: -p["runs"])]
    lines.append(f"tied configs of each run: {found['ties']}, bands: {', '.join(f'{b:.1%}' for b in found['bands'])}")
    lines.append(f"the picks beside each other: {'the same up to ties' if found['same'] else 'NOT the same'}, band {found['band']:.1%}" + ("" if found["timing_ok"] else "; a band over 2 %: the timing FAILS"))
    return "\n".join(lines)


def runs(workloads: list, backend: str, devices: list, seconds: float, count: int) -> dict:
    """name -> the entries of its runs; each device takes the next run as soon as it is free, so that four GPUs need a quarter of the time."""
    todo, found = [(name, seed) for seed in range(count) for name in workloads], {name: [None] * count for name in workloads}

    def work(device):
        while todo:
            name, seed = todo.pop(0)
            entry = found[name][seed] = one(name, backend, device, seconds, seed, len(devices))
            print(f"{name} run {seed} on {device}: {entry['time_us']} us, {entry['search']['evaluated']} of {entry['search']['feasible']} tried, {entry['ties']} tied within {entry['band']:.1%}: "
                  f"{entry['config']}", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(len(devices)) as threads:
        for ended in [threads.submit(work, device) for device in devices]:
            ended.result()
    return found


def main(argv=None) -> int:
    parser = argparse.ArgumentParser("stability", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="+")
    parser.add_argument("--backend", required=True, choices=("triton", "cupy", "numba"))
    parser.add_argument("--device", default="cpu", help="cpu, the index of a GPU, or all: the runs are spread over every GPU of this host, which must be of one model (default: cpu)")
    parser.add_argument("--seconds", type=float, default=60, help="budget of a run (default: 60)")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    devices, well = _devices(args.device), True
    for name, entries in runs([tasks.find(name).name for name in args.workloads], args.backend, devices, args.seconds, args.runs).items():
        picks = list({json.dumps(e["config"], sort_keys=True): dict(e["config"]) for e in entries}.values())
        found = summary(entries, picks, *judged(tasks.find(name), args.backend, None if devices[0] == "cpu" else int(devices[0]), picks))
        print(json.dumps({"workload": name, **found}) if args.json else f"{name} {args.backend}\n{text(found)}", flush=True)
        well = well and found["same"] and found["timing_ok"]
    return 0 if well else 1


def _devices(asked: str) -> list:
    if asked != "all":
        return [asked]
    import torch
    if not torch.cuda.device_count():
        raise ValueError("--device: expected GPUs for all, got none; use --device cpu, or see sparsetile doctor")
    names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    return [str(n) for n, name in enumerate(names) if name == names[0]]


if __name__ == "__main__":
    sys.exit(main())
