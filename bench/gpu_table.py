"""The table of all kernels beside their peers, from one command on one GPU: python -m sparsetile.bench.gpu_table

Every kernel is checked against the float64 formula on a few rows before it is timed; a row's candidates are timed in turn (CUDA events, cold L2, median); operations
count only pairs inside the pattern. What fails is a row that says so. Rows are measured in a process of their own: a kernel that hangs or breaks the device
costs that one figure, and the table goes on without it. `--list` shows the rows, and needs no GPU. Several GPUs make one table together: `--share 1/4 --out a.jsonl`
and so on, one command on each, then `--read *.jsonl`. bench/block_attention.py is the front of block attention alone, at other lengths too.
"""
import argparse
import contextlib
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sparsetile.autotune import isolate, provenance  # noqa: E402
from sparsetile.bench.gpu_rows import NAMED, STORED_AT, Row, selected  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
OURS = ("triton", "cupy")
WORKER = (sys.executable, "-m", "sparsetile.bench.gpu_worker")


class Measured:
    """What came of all rows: events of the workers, kept as they come and written to `out` at once."""

    def __init__(self, out):
        self.out, self.machine, self.ceilings, self.rows, self.trying, self.done = out, {}, {}, {}, None, set()

    def take(self, event: dict, quiet: bool = False):
        if event.pop("trying", None):
            self.trying = event["row"], event["who"]
            return
        if not quiet:
            print(json.dumps(event), flush=True)
        if self.out:
            print(json.dumps(event), file=self.out, flush=True)
        if "row" not in event:
            self.machine |= event.get("machine", {})
            self.ceilings = self.ceilings or event.get("ceilings", {})
        elif event.get("done"):
            self.done.add(event["row"])
            self.rows.get(event["row"], {}).pop("row", None)  # an earlier command that did not come to it
        else:
            self.rows.setdefault(event["row"], {})[event["who"]] = event


def supervise(order: dict, found: Measured, limit: float, until: float, command=None, first=None):
    """Runs workers until every row of the order is done: one that dies, or is silent for `limit` seconds, is replaced by one that leaves out what it was trying. first: a worker that waits already."""
    while order["rows"]:
        found.trying = None
        end = work(first or start(command or WORKER, order), found, limit, until)
        first = None
        order["rows"] = [name for name in order["rows"] if name not in found.done]
        if not order["rows"]:
            return
        if found.trying is None or time.monotonic() > until:
            for name in order["rows"]:
                found.take({"row": name, "who": "row", "failed": f"not measured: {end}"})
            return
        row, who = found.trying
        known = found.rows.setdefault(row, {}).get(who, {})
        if "failed" not in known:
            found.take({"row": row, "who": who, "failed": end})
        if who in ("inputs", "timing"):
            order["rows"].remove(row)
        else:
            order["without"].append([row, who])


def ahead(order: dict, jobs: int, until: float, peers_only: bool = False, role: str = "sparsetile.bench.gpu_worker:Compiler"):
    """Compiles what rows with a peer of torch.compile need, by several processes before anything is timed: the workers find it on disk. The peers of all rows first, since they take longest; then our
    kernels, unless peers_only. What is not ready by `until` is compiled by its row."""
    steps = queue.SimpleQueue()
    for compiled in (True,) if peers_only else (True, False):
        for name in order["rows"]:
            steps.put((name, compiled))
    crew = [isolate.Worker(role, order, env={"TORCHINDUCTOR_COMPILE_THREADS": "1"}) for _ in range(min(jobs, len(order["rows"])))]
    for one in crew:
        one.start()
    with ThreadPoolExecutor(len(crew)) as pool:
        list(pool.map(lambda one: _compile(one, steps, until), crew))


def _compile(worker, steps, until: float):
    while (left := until - time.monotonic()) > 0:
        try:
            name, compiled = steps.get_nowait()
            for who, came in worker("compile", name, compiled, seconds=left).items():
                print(json.dumps({"row": name, "who": who, "ahead": came}), flush=True)
        except queue.Empty:
            break
        except (isolate.Failed, isolate.Lost) as error:  # its row says why
            print(f"{name}, ahead: {error}", file=sys.stderr, flush=True)
    worker.kill()


def start(command: list, order: dict):
    """A worker, which imports what it needs and waits for a line."""
    return subprocess.Popen([*command, json.dumps(order)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def work(worker, found: Measured, limit: float, until: float) -> str:
    """Lets a worker begin, to its end; why it ended."""
    with contextlib.suppress(OSError):  # it has ended
        worker.stdin.write("begin\n")
        worker.stdin.close()
    lines = queue.Queue()
    threading.Thread(target=_read, args=(worker, lines), daemon=True).start()
    while True:
        left = until - time.monotonic()
        try:
            line = lines.get(timeout=max(0.01, min(limit, left)))
        except queue.Empty:
            line = ""
        if not line or left < 0:
            worker.kill()
            worker.wait()
            return "out of time" if time.monotonic() > until else f"silent for {limit:.0f} s, stopped"
        if line is _END:
            return f"the process ended with code {worker.wait()}"
        if line.startswith("{"):
            found.take(json.loads(line))


_END = object()


def _read(worker, lines):
    for line in worker.stdout:
        lines.put(line)
    lines.put(_END)


# ---------------------------------------------------------------------------------------------------------------------- the table
def figure(event: dict, unit: str) -> float | None:
    if "time_us" not in event:
        return None
    return event["time_us"] / 1e3 if unit == "ms" else event.get("tflops") if unit == "TFLOP/s" else event.get("gbs")


def shown(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.3f}" if unit == "ms" else f"{value:.0f}"


def rates(found: Measured, row: Row) -> dict:
    return {who: figure(event, row.unit) for who, event in found.rows.get(row.name, {}).items() if "time_us" in event}


def by_peer(found: Measured, row: Row) -> float | None:
    """The floor of a row (of the row that it varies) times what a peer reaches here / reached there: cuDNN where it runs, else FlexAttention; there by the stored figure, or by this table's."""
    base = NAMED[row.like or row.name]
    here, there = rates(found, row), (rates(found, base) if row.like else {}) | dict(base.stored)
    return next((base.floor / there[who] * here[who] for who in ("cuDNN", "Flex") if base.floor and who in here and who in there), None)


def table(found: Measured, names: list[str]) -> str:
    """Why what is missing is missing; then short lines: ours, the floor as it stands and by a peer of this run, the clock, peers of this run, stored peers scaled by the product of this run (*)."""
    scale = found.ceilings.get("bf16_tflops", STORED_AT) / STORED_AT
    rows, lines, missing = [row for row in NAMED.values() if row.name in names], [], []
    ours = (*OURS, "portable") if any("portable" in found.rows.get(row.name, {}) for row in rows) else OURS
    varied = {row.name: by_peer(found, row) for row in rows}
    columns = [(name, 8) for name in ours] + [("floor", 6)] + [("by peer", 7)] * any(varied.values())
    for row in rows:
        events, seen = found.rows.get(row.name, {}), rates(found, row)
        figures = " ".join(f"{shown(x, row.unit):>{width}}" for (_, width), x in zip(columns, [seen.get(name) for name in ours] + [row.floor, varied[row.name]]))
        others = [f"{who} {shown(value, row.unit)}" for who, value in seen.items() if who not in ours]
        others += [f"{who}* {shown(value / scale if row.unit == 'ms' else value * scale, row.unit)}" for who, value in row.stored if seen.get(who) is None]
        clock = next((event["clock_mhz"] for event in events.values() if event.get("clock_mhz")), "-")
        lines.append(f"{row.name:30} {row.unit:7} {figures} {clock:>5}  {', '.join(others)}")
        missing += [f"{row.name}, {who}: {event['failed'][:150]}" for who, event in events.items() if "failed" in event]
        missing += [f"{row.name}, {who}: outside our numeric policy: {event['outside_policy'][:100]}" for who, event in events.items() if "outside_policy" in event]
    head = [" ".join(f"{k} {v}" for k, v in found.machine.items()), " ".join(f"{k} {v}" for k, v in found.ceilings.items()),
            f"{'row':30} {'unit':7} " + " ".join(f"{name:>{width}}" for name, width in columns) + f" {'MHz':>5}  peers (*: stored figure x {scale:.3f})"]
    return "\n".join(missing + head + lines)


def verdict(what: str, figures: dict) -> str:
    """One line: of name -> (reached, asked, unit) so many reached what was asked, and which did not. Of milliseconds less is more."""
    short = [f"{name} {shown(got, unit)} of {shown(asked, unit)}" for name, (got, asked, unit) in figures.items() if (got > asked if unit == "ms" else got < asked)]
    return f"{what}: {len(figures) - len(short)} of {len(figures)}" + (f"; not {', '.join(short)}" if short else "")


def share(names: list[str], part: str) -> list[str]:
    """Every N-th row from the I-th on, of I/N: costly rows stand together, so each share gets some."""
    one, of = map(int, part.split("/"))
    return names[one - 1::of]


def _part(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*/[1-9]\d*", text) or int(text.split("/")[0]) > int(text.split("/")[1]):
        raise argparse.ArgumentTypeError(f"expected I/N with 1 <= I <= N, got {text!r}; give e.g. 1/4")
    return text


def read(paths: list[str]) -> Measured:
    """What earlier commands wrote; of a row measured twice the later figures stand."""
    found = Measured(None)
    for path in paths:
        for line in Path(path).read_text().splitlines():
            found.take(json.loads(line), quiet=True)
    return found


def options(parser, seconds: float = 0.8, minutes: float = 8.5):
    """What every front of these rows takes."""
    parser.add_argument("--only", nargs="*", default=[], help="rows whose name or workload contains one of these words")
    parser.add_argument("--list", action="store_true", help="list the rows and stop")
    parser.add_argument("--seconds", type=float, default=seconds, help="time for a row's rounds, at least five rounds each (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=60, help="seconds of silence after which a worker is stopped (default: 60; 180 where something is compiled)")
    parser.add_argument("--minutes", type=float, default=minutes, help="stop and print what there is (default: %(default)s)")
    parser.add_argument("--out", help="file of JSON lines that the results are appended to")
    parser.add_argument("--commit", help="what is measured (default: git describe)")
    parser.add_argument("--share", type=_part, default="1/1", help="I/N: every N-th row from the I-th on, for N GPUs")
    parser.add_argument("--read", nargs="+", default=[], help="measure nothing: print the table of what these files hold")


def compiling(parser):
    """What fronts take whose rows may have peers of torch.compile."""
    parser.add_argument("--ahead", action="store_true", help="only compile the rows' peers that torch.compile makes: TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR keep them for a later command (on another machine under the same paths: Triton writes them down)")
    parser.add_argument("--jobs", type=int, default=max(1, min(12, os.cpu_count() - 1)), help="processes that compile ahead (default: %(default)s)")


def listed(rows: list, args) -> int:
    """What --list prints, which is also the answer where --only names nothing."""
    print("\n".join(f"{row.name:30} {row.workload}" for row in rows) or f"--only: no row's name or workload contains {args.only}")
    return 0 if rows else 2


def writing(args) -> Measured:
    """An empty table whose results are appended to --out, the commit first."""
    out = None
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        out = open(args.out, "a")
    found = Measured(out)
    found.take({"machine": {"commit": args.commit or provenance.commit()}})
    return found


def measured(args, names: list, **order) -> Measured:
    """What the files of --read hold, or what workers make of these rows. order: more for them than rows and seconds."""
    if args.read:
        return read(args.read)
    found, until = writing(args), time.monotonic() + 60 * args.minutes
    order = dict(rows=list(names), without=[], seconds=args.seconds) | order
    if args.ahead:
        ahead(order | dict(compiled=True), args.jobs, until, True)
        return found
    first = None
    if order["compiled"]:
        first = start(WORKER, order)  # its imports take as long as a few rows
        ahead(order, args.jobs, (time.monotonic() + until) / 2)
    supervise(order, found, max(args.limit, 180) if order["compiled"] else args.limit, until, None, first)
    return found


def main(argv=None) -> int:
    parser = argparse.ArgumentParser("gpu_table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiled", action="store_true", help="also peers that torch.compile makes: FlexAttention, decompression with split and concat (tens of seconds a row)")
    parser.add_argument("--graphs", action="store_true", help="CUDA graphs of the calls: short ones cost less than the host needs to launch them; every line says how it was timed")
    options(parser)
    compiling(parser)
    args = parser.parse_args(argv)
    names = share([row.name for row in selected(args.only)], args.share)
    if args.list or not names:
        return listed([NAMED[name] for name in names], args)
    found = measured(args, names, compiled=args.compiled, graph=args.graphs)
    if not args.ahead:
        print("\n" + table(found, names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
