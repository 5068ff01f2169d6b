"""tune: search a kernel's legal configs on a workload, and write the winner where the next call finds it.

The default is always measured, in the same run and in the finals; the result is adopted only for a real gain. A config is compiled by processes of their own, and
checked against the float64 formula before it is timed, by one process that holds the device and is replaced when a config breaks it (isolate.py): what
searches never touches a GPU. Failures are counted and kept with their cause.
"""
import datetime
import os
from collections import Counter
from pathlib import Path

from sparsetile.autotune import ahead, isolate, provenance, store
from sparsetile.autotune.hunt import Hunt
from sparsetile.autotune.tasks import Workload, find
from sparsetile.backends.contract import BACKENDS, Unsupported
from sparsetile.ops import checks, dispatch
from sparsetile.profiles import lookup

BENCH = "sparsetile.autotune.trial:Bench"
EFFORTS = {"quick": 20.0, "standard": 120.0, "thorough": 600.0}  # seconds for each backend; with inputs, compiling and finals two backends take under 2 and 10 minutes of the first two
_benches, _aheads = {}, {}  # processes live from one workload to the next
_next = {}  # device -> the Job that its last call was told of


def tune(op, workload, *, backend=None, trials=None, seconds=None, effort=None, storage=None, profiles=None, device=None, sampler="pool", seed=0, progress=None,
         isolated=True, bench=BENCH, then=None):
    """Tune a kernel on a workload and write the profile entry that the next call on this device finds.

    op        kernel ("block_attention", ...) or the public op that runs it; must fit the workload
    workload  a Workload or the name of one (sparsetile.autotune.tasks.workloads())
    backend   tune this backend only; None tunes every backend that supports the problem, and the fastest comes first in the profile
    trials, seconds   budget for each backend; whichever ends first (default 30 seconds). Without trials a search also ends that has found nothing better for long
    effort    instead of them: "quick" (20 s), "standard" (120 s) or "thorough" (600 s)
    storage   path of an Optuna journal file, or a storage URL: a killed run goes on where it stopped
    profiles  directory to write <device>/<kernel>.yaml into; the user cache by default
    device    CUDA device index, None for the CPU
    progress  called with a dict for each event (start, trial, final, done)
    isolated  False: everything in this process, which a config may then take down
    bench     what the bench worker runs, as "module:class"; tests bring one that breaks
    then      the Workload that the next call tunes, in the same way: its first configs are compiled while this one's last are timed
    Returns the winner's entry as written. Raises Unsupported if no backend runs the problem.
    """
    w = find(workload) if isinstance(workload, str) else workload
    if not isinstance(w, Workload):
        raise TypeError(f"workload: expected a Workload or its name, got {type(workload).__name__}; see sparsetile.autotune.tasks.workloads()")
    if op not in (w.kernel, dispatch.op_of(w.kernel)):
        raise ValueError(f"op: expected {w.kernel!r}, the kernel of workload {w.name}, or the op that runs it, {dispatch.op_of(w.kernel)!r}, got {op!r}; name one of them")
    checks.number("seconds", seconds, optional=True), checks.integer("trials", trials, 1, optional=True)
    if effort is not None and (effort not in EFFORTS or seconds is not None or trials is not None):
        raise ValueError(f"effort: expected one of {', '.join(EFFORTS)}, without seconds and trials, got {effort!r}; leave it out, or them")
    if seconds is None and trials is None:
        seconds = EFFORTS.get(effort, 30.0)
    say = progress or _silent
    entries, root = [], Path(profiles) if profiles else lookup.user_cache()
    store.writable(root)  # asked now, not after the search
    worker, compilers = _bench(bench, device, isolated), _compilers(device) if isolated and device is not None else None
    how = dict(worker=worker, compilers=compilers, say=say, backend=backend, trials=trials, storage=storage, sampler=sampler, seed=seed, root=root)
    job = _next.pop(device, None)
    if job is not None and job.asked != (w, how):
        job.drop()
        job = None
    if not compilers:
        worker.open(w, seed)
    job = job or Job(w, **how)
    if compilers:  # which are at work on the first configs while it makes the inputs
        job.begin(None if then is None else lambda: _foresee(device, then, how))
        worker.open(w, seed)
    facts, problem, names = worker("facts", seconds=isolate.STARTING), job.problem, [hunt.backend for hunt in job.hunts]
    for n, hunt in enumerate(job.hunts):
        job.prepare(n)
        hunt.search(seconds)
        entries.append(hunt.entry(_stands(problem, facts["device"]["name"], hunt.backend, root)))
        note(root, _summary(w, hunt.backend, entries[-1], hunt.failures()))
    entries = [e for e in entries if e is not None]
    if not entries:
        raise Unsupported(f"tune: {w.name}: no config of {', '.join(names)} ran and was right; see the failures in the progress events")
    entries.sort(key=lambda e: e["time_us"])
    if len(entries) > 1:
        entries[0]["runner_up"] = {"backend": entries[1]["backend"], "time_us": entries[1]["time_us"]}
    for entry in entries:
        entry["versions"] = provenance.beside(entry["backend"], facts["versions"])
        entry |= {"unit": facts["unit"]} if facts.get("unit") else {}
        path = store.add(root, w.kernel, facts["device"], entry, facts["versions"], {"l2": "cold" if device is not None else "warm", "clocks": "floating"})
    dispatch.clear_plans()
    used = lookup.find(problem, facts["device"]["name"], user=None if root == lookup.user_cache() else str(root))
    note(root, f"{w.name} {w.kernel}: a call gets {used.backend} {used.config or 'with its default'} from {used.source}")
    say({"event": "done", "workload": w.name, "entry": entries[0], "path": str(path)})
    return entries[0]


def _silent(event) -> None:
    pass


class Job:
    """A workload's searches, one for each backend, known without its inputs. Where configs are compiled ahead, those of a search come when the one before has asked for its last."""

    def __init__(self, w, *, worker, compilers, say, backend, trials, storage, sampler, seed, root):
        self.asked = w, dict(worker=worker, compilers=compilers, say=say, backend=backend, trials=trials, storage=storage, sampler=sampler, seed=seed, root=root)
        facts = worker("facts", *[w] * bool(compilers), seconds=isolate.STARTING)
        self.problem, self.device, refused, self.prepared = facts["problem"], facts["device"], facts["refused"], 0
        asked = dispatch.requested_backend(dispatch.op_of(w.kernel), backend)
        names = [asked] if asked != "auto" else [b for b in BACKENDS if b != "reference"]
        self.hunts = [Hunt(name, w, self.problem, worker, compilers and compilers.on(self.device), say) for name in names if refused.get(name, name) is None]
        if not self.hunts:
            raise Unsupported(f"tune: {w.name}: " + "; ".join(f"{name}: {refused.get(name) or 'is not tuned'}" for name in names))
        for n, hunt in enumerate(self.hunts[:-1] if compilers else ()):
            hunt.then = lambda n=n: self.prepare(n + 1)

    def begin(self, then=None) -> None:
        """Have the first configs compiled; `then` is called when the last search has asked for its last."""
        self.hunts[-1].then = then
        self.prepare(0)
        if self.prepared == len(self.hunts):  # few trials: all are asked for
            self.hunts[-1].fill()

    def prepare(self, n: int) -> None:
        """Search n, if it is not yet."""
        if self.prepared == n:
            self.prepared += 1
            hunt, how = self.hunts[n], self.asked[1]
            hunt.prepare(how["trials"], how["storage"], how["sampler"], how["seed"], lookup.related(self.problem, self.device["name"], hunt.backend, user=str(how["root"])))

    def drop(self) -> None:
        for hunt in self.hunts[:self.prepared]:
            hunt.drop()


def _foresee(device, w, how) -> None:
    """Begin with a workload that comes next; what is wrong with it is said at its turn."""
    try:
        _next[device] = Job(w, **how)
        _next[device].begin()
    except (Unsupported, isolate.Lost, isolate.Failed):
        _next.pop(device, None)


def _stands(problem, device: str, backend: str, root) -> dict | None:
    """The config that a profile of this very device gives this very bucket now."""
    found = lookup.find(problem, device, backend, user=str(root))
    return found.config if found and not found.inherited and found.entry["key"] == lookup.key_of(problem) else None


def note(root: Path, line: str) -> None:
    """A line of <root>/tune.log, in one write: processes that tune side by side share the file."""
    root.mkdir(parents=True, exist_ok=True)
    handle = os.open(root / "tune.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(handle, f"{datetime.datetime.now().isoformat(timespec='seconds')} {line}\n".encode())
    os.close(handle)


def _summary(w, backend, entry, failures: Counter) -> str:
    causes = f" ({', '.join(f'{cause} {n}' for cause, n in failures.most_common())})" if failures else ""
    if entry is None:
        return f"{w.name} {w.kernel} {backend}: no config ran and was right{causes}"
    s, default = entry["search"], entry.get("default_us")
    return (f"{w.name} {w.kernel} {backend}: {entry['time_us']} us, " + (f"default {default} us, {default / entry['time_us']:.3f} x" if default else "default failed") +
            f"; {entry['config']}; tried {s['evaluated']} of {s['feasible']}, failed {s['failed']}{causes}, {entry['ties']} tied within {entry['band']:.1%}, stop {s['stop']}, {s['seconds']} s")


def machine(device, bench=BENCH) -> dict:
    """The device as its bench worker describes it."""
    return _bench(bench, device, True)("machine", seconds=isolate.STARTING)


def _bench(role, device, isolated):
    """The device's bench worker, started once and kept."""
    if not isolated:
        return isolate.Inline(isolate.find(role), device)
    if (role, device) not in _benches:
        _benches[role, device] = isolate.Worker(role, device)
    return _benches[role, device]


def _compilers(device) -> ahead.Ahead:
    if device not in _aheads:
        _aheads[device] = ahead.Ahead()
    return _aheads[device]


def close() -> None:
    """Let the processes go that tuning has kept for the next workload."""
    for worker in _benches.values():
        worker.kill()
    for compilers in _aheads.values():
        compilers.close()
    _benches.clear(), _aheads.clear(), _next.clear()
