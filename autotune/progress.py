"""What a tuning run shows: a live table with rich on a terminal, plain lines elsewhere, JSON events with --json."""
import contextlib
import json
import os
import sys
import time
from collections import Counter
from importlib.util import find_spec

from sparsetile.autotune import timing


@contextlib.contextmanager
def show(total: int, as_json: bool):
    """Yields the function that takes the tuner's events."""
    if as_json:
        yield lambda event: print(json.dumps(event, default=str), flush=True)
        return
    if find_spec("rich") is None or not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":  # a file or a pipe would see the table at the end only
        yield _Lines(total)
        return
    live = _Live(total)
    with live:
        yield live


def _us(value) -> str:
    return "-" if value is None else f"{value / 1e3:.3f} ms" if value >= 1e3 else f"{value:.1f} us"


def _ties(entry) -> str:
    """How many configs are as fast, and within what: a wide band says that the timing is not to be trusted."""
    return f"{entry['ties']} within {entry['band']:.1%}" + (" (noisy)" if entry["band"] > timing.WIDE else "")


class _Lines:
    def __init__(self, total):
        self.total, self.done, self.causes = total, 0, Counter()

    def __call__(self, event):
        kind = event["event"]
        if kind == "start":
            print(f"[{self.done + 1}/{self.total}] {event['workload']} on {event['backend']}: {event['feasible']} legal configs of {event['total']}" +
                  (f", {event['resumed']} known from before" if event["resumed"] else ""), file=sys.stderr)
        elif kind == "trial" and event["failure"]:
            self.causes[event["failure"].partition(":")[0]] += 1
        elif kind == "final":
            e = event["entry"]
            print(f"    {_us(e['time_us'])} (default {_us(e.get('default_us'))})  {e['config']}  tried {e['search']['evaluated']}, failed {e['search']['failed']}, tied {_ties(e)}", file=sys.stderr)
        elif kind == "failed":
            self.done += 1
            print(f"    {event['error']}", file=sys.stderr)
        elif kind == "done":
            self.done += 1
            print(f"    written to {event['path']}" + (f"; failures so far: {dict(self.causes)}" if self.causes else ""), file=sys.stderr)


class _Live:
    """A rich table of the workloads done, above a line on the one at work."""

    def __init__(self, total):
        from rich.live import Live
        self.total, self.rows, self.now, self.causes, self.start, self.done = total, [], {}, Counter(), time.monotonic(), 0
        self.live = Live(get_renderable=self._draw, refresh_per_second=4, transient=False)

    def __enter__(self):
        self.live.__enter__()
        return self

    def __exit__(self, *error):
        return self.live.__exit__(*error)

    def __call__(self, event):
        kind = event["event"]
        if kind in ("start", "trial"):
            self.now = {**self.now, **event} if kind == "trial" else dict(event)
            if kind == "trial" and event["failure"]:
                self.causes[event["failure"].partition(":")[0]] += 1
        elif kind == "final":
            e = event["entry"]
            gain = f"{e['default_us'] / e['time_us']:.2f} x" if e.get("default_us") else "-"
            self.rows.append((event["workload"], event["backend"], _us(e["time_us"]), _us(e.get("default_us")), gain, str(e["search"]["evaluated"]), str(e["search"]["failed"]), _ties(e)))
        elif kind in ("done", "failed"):
            self.done += 1
            if kind == "failed":
                self.rows.append((event["workload"], "-", event["error"][:60], "", "", "", "", ""))

    def _draw(self):
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text
        table = Table(title="sparsetile tune", title_justify="left")
        for name in ("workload", "backend", "best", "default", "gain", "tried", "failed", "tied"):
            table.add_column(name, overflow="fold")
        for row in self.rows[-40:]:
            table.add_row(*row)
        took = time.monotonic() - self.start
        left = took / self.done * (self.total - self.done) if self.done else None
        now = self.now
        line = f"{self.done}/{self.total} workloads, {took:.0f} s" + (f", about {left:.0f} s left" if left is not None else "")
        if now and self.done < self.total:
            line += f"   at work: {now['workload']} on {now['backend']}, {now.get('done', now.get('resumed', 0))} of {now.get('feasible', '?')} legal configs, best {_us(now.get('best_us'))}"
        if self.causes:
            line += "   failures: " + ", ".join(f"{cause} {n}" for cause, n in self.causes.most_common(4))
        return Group(table, Text(line))
