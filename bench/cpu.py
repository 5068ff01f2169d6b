"""The CPU beside PyTorch: every row with a floor, a sweep, and how time and memory grow: python -m sparsetile.bench.cpu [--quick] [--json results.json].

One process. Of each case our call, its peers and a loop of multiply-adds in registers (the peak of all threads) run in turn with a rotating start; minima
of all rounds are compared, for on a CPU noise only adds. The loop runs for as long as our call: a short one alone finds moments of a higher clock. ratio = ours / peer: below 1 is faster. "of peak" is the share of that register peak at the pairs
inside the pattern. A row that misses its floor says so; dense rows stand at theirs when they reach 75 % of the peak, for a BLAS may stand there too.
With --threads 1 it is the process's own CPU time that is compared, which a busy machine disturbs least.
"""
import argparse
import itertools
import json
import os
import platform
import resource
import sys
import time
from pathlib import Path

if __name__ == "__main__" and not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numba  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

import sparsetile as st  # noqa: E402
from sparsetile.backends import devices  # noqa: E402
from sparsetile.backends.numba.far import far, on_threads  # noqa: E402
from sparsetile.backends.numba.simd import LANES, get_i64, op  # noqa: E402
from sparsetile.bench import cpu_cases  # noqa: E402

CHAINS, STEPS, SHARE = 12, 500_000, 0.75


def _multiply_adds(e, memory, count):
    """CHAINS sums of their own, enough to hide the latency of each."""
    factor = e.load(memory)
    for n, x in enumerate(e.loop(count, [e.load(memory, 4 * LANES * n) for n in range(CHAINS)], lambda k, sums: [e.fma(x, factor, factor) for x in sums])):
        e.store(x, memory, 4 * LANES * n)


multiply_adds = op("ii", _multiply_adds)


@far("ii")
def _peak(memory, thread):
    multiply_adds(memory + 4096 * thread, get_i64(memory + 4096 * thread, 511))


def peak(times=1):
    """2 * times * STEPS * CHAINS * LANES operations on every thread."""
    memory = np.full((numba.get_num_threads(), 1024), 1e-3, np.float32)
    memory.view(np.int64)[:, 511] = times * STEPS
    on_threads(_peak, memory)


def took(call) -> float:
    """Microseconds."""
    clock = time.process_time if numba.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    return (clock() - start) * 1e6


def measure(case, seconds, few=3) -> dict:
    """One row: minima in milliseconds, ratio, share of the peak, verdict."""
    calls = case.make()
    for call in calls.values():
        call()
    peak()
    times = max(1, round(took(calls["ours"]) / took(peak)))
    calls["peak"] = lambda: peak(times)
    start, best, turn, names = time.monotonic(), dict.fromkeys(calls, float("inf")), 0, list(calls)
    while turn < few or time.monotonic() - start < seconds:
        for n in range(len(names)):
            name = names[(n + turn) % len(names)]
            best[name] = min(best[name], took(calls[name]), took(calls[name]))
        turn += 1
    top = 2 * times * STEPS * CHAINS * LANES * numba.get_num_threads() / best.pop("peak") / 1e3  # GFLOP/s
    ours, peers = best["ours"], {name: us for name, us in best.items() if name != "ours"}
    peer = case.peer or min(peers, key=peers.get)
    row = dict(case=case.name, peer=peer, ours_ms=round(ours / 1e3, 3), peers_ms={name: round(us / 1e3, 3) for name, us in peers.items()}, ratio=round(ours / peers[peer], 4), rounds=turn,
               gflops=round(case.flops / ours / 1e3, 1), of_peak=round(case.flops / ours / 1e3 / top, 3), peak_gflops=round(top, 1), floor=case.floor, goal=case.goal)
    return {**row, "verdict": verdict(case, row)}


def verdict(case, row) -> str:
    if case.floor is None:
        return "" if row["ratio"] <= 1 else "loses" + (f" at {row['of_peak']:.0%} of the peak" if case.dense else "")
    if row["ratio"] <= case.floor:
        return "goal" if row["ratio"] <= case.goal else "floor"
    return "floor by share of peak" if case.dense and row["of_peak"] >= SHARE else "MISSES ITS FLOOR"


def line(row) -> str:
    bounds = "" if row["floor"] is None else f"{row['floor']:.3f} / {row['goal']:.3f}"
    return f"{row['case']:54}{row['ours_ms']:10.2f}{row['peers_ms'][row['peer']]:10.2f}{row['ratio']:8.3f}{bounds:>15}{row['of_peak']:9.2f}  {row['peer']:24} {row['verdict']}"


def head(title) -> str:
    return f"\n{title}\n{'case':54}{'ours ms':>10}{'peer ms':>10}{'ratio':>8}{'floor / goal':>15}{'of peak':>9}  peer"


def resident_peak(call) -> float | None:
    """MB that the process grew by at its highest during call(); None where the system keeps no such mark."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        field = lambda name: int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) / 1024
        before = field("VmRSS")
        call()
        return field("VmHWM") - before
    except OSError:
        return None


def growth(lengths, seconds):
    """A window at growing lengths: forward, forward + backward; memory beyond what goes in and comes out (outputs; out, lse and three gradients)."""
    D, H, rule = 64, 8, cpu_cases.WINDOW
    for N in lengths:
        q, k, v = (cpu_cases.normal(1, H, N, D).requires_grad_() for _ in range(3))
        grad, size = torch.ones(1, H, N, D), H * N * D * 4 / 2 ** 20
        forward = lambda: st.sparse_attention(q.detach(), k.detach(), v.detach(), rule, backend="numba")
        both = lambda: torch.autograd.grad(st.sparse_attention(q, k, v, rule, backend="numba"), (q, k, v), grad)
        row = dict(case=f"window 256, N {N}", N=N)
        for name, call, outputs in (("forward", forward, size + H * N * 4 / 2 ** 20), ("both", both, 4 * size + 2 * H * N * 4 / 2 ** 20)):
            call()
            grown = resident_peak(call)
            best = min(took(call) for _ in range(max(3, int(seconds * 1e6 / took(call)))))
            row |= {f"{name}_ms": round(best / 1e3, 2), f"{name}_extra_mb": None if grown is None else round(max(0.0, grown - outputs), 1)}
        yield row


def write(path, found):
    """After every case: a long table that is cut off keeps its rows."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape: N 4096 (sweep: 1024), D 64")
    parser.add_argument("--parts", default="targets,sweep,growth", help="comma separated, of targets, sweep, growth and long (the sweep at N 16384: half an hour; default: all but long)")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=4.0, help="for the rounds of each case (default: 4)")
    parser.add_argument("--few", type=int, default=3, help="rounds of each case at least (default: 3)")
    parser.add_argument("--share", default="1/1", help="I/N: every N-th case from the I-th on, so that processes on cores of their own can divide the table")
    parser.add_argument("--threads", type=int, help="of Numba and PyTorch alike (default: all cores)")
    parser.add_argument("--json", type=Path, help="write all rows here too")
    args = parser.parse_args(arguments)
    parts = {"targets": ("targets", cpu_cases.targets((64,) if args.quick else (64, 128))),
             "sweep": ("sweep", cpu_cases.sweep((1024,), (64,)) if args.quick else cpu_cases.sweep((1024, 4096))),
             "long": ("long", cpu_cases.sweep((16384,), (64,) if args.quick else (64, 128)))}
    part, of = map(int, args.share.split("/"))
    numba.set_num_threads(args.threads or numba.get_num_threads())
    torch.set_num_threads(numba.get_num_threads())
    torch.manual_seed(0)
    machine = dict(cpu=devices.device_info(None).name, cores=os.cpu_count(), threads=numba.get_num_threads(), lanes=LANES, torch=torch.__version__, numba=numba.__version__,
                   python=platform.python_version())
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    found = {"machine": machine}
    for name in args.parts.split(","):
        if name in parts:
            print(head(name), flush=True)
            found[name] = []
            for make in itertools.islice(parts[name][1], part - 1, None, of):
                case = make()
                if args.only in case.name:
                    found[name].append(measure(case, args.seconds, args.few))
                    print(line(found[name][-1]), flush=True)
                    write(args.json, found)
    if "growth" in args.parts:
        print(f"\ngrowth: window 256, H 8, D 64{'':26}forward ms   extra MB   both ms   extra MB")
        found["growth"] = []
        for row in growth([2 ** n for n in range(12, 15 if args.quick else 18)], args.seconds / 4):
            found["growth"].append(row)
            print(f"{row['case']:54}{row['forward_ms']:10.2f}{str(row['forward_extra_mb']):>11}{row['both_ms']:10.2f}{str(row['both_extra_mb']):>11}", flush=True)
    print(f"\npeak resident memory of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")
    write(args.json, found)


if __name__ == "__main__":
    main()
