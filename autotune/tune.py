"""tune: search a kernel's legal configs on a workload, and write the winner where the next call finds it.

The default is always measured, in the same run and in the finals; the result is adopted only for a real gain. A config is compiled by processes of their own, and
checked against the float64 formula before it is timed, by one process that holds the device and is replaced when a config breaks it (isolate.py): what
searches never touches a GPU. Failures are counted and kept with their cause.
"""
import datetime
import os
import time
from collections import Counter, deque
from pathlib import Path

from sparsetile.autotune import ahead, isolate, provenance, search, space, store
from sparsetile.autotune.decide import Tried, decide, finalists
from sparsetile.autotune.tasks import Workload, find
from sparsetile.backends.contract import BACKENDS, KERNELS, Unsupported
from sparsetile.ops import checks, dispatch
from sparsetile.profiles import lookup

BENCH = "sparsetile.autotune.trial:Bench"
LEAST, TIMES = 5.0, 50  # a trial may take so many seconds, or so many times what the best one's calls take
COMPILING = 60.0        # and so long where the bench worker compiles
GRACE = 10.0            # a trial that the end of the budget finds at work may go on so long
_benches, _aheads = {}, {}  # processes live from one workload to the next


def tune(op, workload, *, backend=None, trials=None, seconds=None, storage=None, profiles=None, device=None, sampler="pool", seed=0, progress=None, isolated=True,
         bench=BENCH):
    """Tune a kernel on a workload and write the profile entry that the next call on this device finds.

    op        kernel ("block_attention", ...) or the public op that runs it; must fit the workload
    workload  a Workload or the name of one (sparsetile.autotune.tasks.workloads())
    backend   tune this backend only; None tunes every backend that supports the problem, and the fastest comes first in the profile
    trials, seconds   budget for each backend; whichever ends first (default 30 seconds)
    storage   path of an Optuna journal file, or a storage URL: a killed run goes on where it stopped
    profiles  directory to write <device>/<kernel>.yaml into; the user cache by default
    device    CUDA device index, None for the CPU
    progress  called with a dict for each event (start, trial, final, done)
    isolated  False: everything in this process, which a config may then take down
    bench     what the bench worker runs, as "module:class"; tests bring one that breaks
    Returns the winner's entry as written. Raises Unsupported if no backend runs the problem.
    """
    w = find(workload) if isinstance(workload, str) else workload
    if not isinstance(w, Workload):
        raise TypeError(f"workload: expected a Workload or its name, got {type(workload).__name__}; see sparsetile.autotune.tasks.workloads()")
    if op not in KERNELS + ("sparse_attention", "latent_attention", "merge_attention") or op in KERNELS and op != w.kernel:
        raise ValueError(f"op: expected {w.kernel!r}, the kernel of workload {w.name}, got {op!r}; name the kernel or leave the workload to it")
    checks.number("seconds", seconds, optional=True), checks.integer("trials", trials, 1, optional=True)
    if seconds is None and trials is None:
        seconds = 30.0
    say = progress or (lambda event: None)
    worker = _bench(bench, device, isolated)
    worker.open(w, seed)
    facts = worker("facts", seconds=isolate.STARTING)
    problem, refused = facts["problem"], facts["refused"]
    asked = dispatch.requested_backend("sparse_attention" if "attention" in w.kernel else w.kernel, backend)
    names = [asked] if asked != "auto" else [b for b in BACKENDS if b != "reference"]
    if not [name for name in names if refused.get(name, name) is None]:
        raise Unsupported(f"tune: {w.name}: " + "; ".join(f"{name}: {refused.get(name) or 'is not tuned'}" for name in names))
    entries, root = [], Path(profiles) if profiles else lookup.user_cache()
    for name in names:
        if refused.get(name, name) is None:
            hunt = _Hunt(name, w, problem, worker, _compilers(facts["device"], device) if isolated and name in ahead.BACKENDS else None, say)
            hunt.search(trials, seconds, storage, sampler, seed)
            entries.append(hunt.entry(seconds))
            note(root, _summary(w, name, entries[-1], hunt.failures()))
    entries = [e for e in entries if e is not None]
    if not entries:
        raise Unsupported(f"tune: {w.name}: no config of {', '.join(names)} ran and was right; see the failures in the progress events")
    entries.sort(key=lambda e: e["time_us"])
    if len(entries) > 1:
        entries[0]["runner_up"] = {"backend": entries[1]["backend"], "time_us": entries[1]["time_us"]}
    for entry in entries:
        path = store.add(root, w.kernel, facts["device"], entry, facts["versions"], {"launch": "eager", "l2": "cold" if device is not None else "warm", "clocks": "floating"})
    dispatch.clear_plans()
    used = lookup.find(problem, facts["device"]["name"], user=None if root == lookup.user_cache() else str(root))
    note(root, f"{w.name} {w.kernel}: a call gets {used.backend} {used.config} from {used.source}")
    say({"event": "done", "workload": w.name, "entry": entries[0], "path": str(path)})
    return entries[0]


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


def _bench(role, device, isolated):
    """The device's bench worker, started once and kept."""
    if not isolated:
        return isolate.Inline(isolate.find(role), device)
    if (role, device) not in _benches:
        _benches[role, device] = isolate.Worker(role, device)
    return _benches[role, device]


def _compilers(device: dict, index):
    if index not in _aheads:
        _aheads[index] = ahead.Ahead(device)
    return _aheads[index]


def close() -> None:
    """Let the processes go that tuning has kept for the next workload."""
    for worker in _benches.values():
        worker.kill()
    for compilers in _aheads.values():
        compilers.close()
    _benches.clear(), _aheads.clear()


class _Hunt:
    """The search of one backend's configs on one workload."""

    def __init__(self, backend, workload, problem, worker, compilers, say):
        self.backend, self.workload, self.problem, self.worker, self.compilers, self.say = backend, workload, problem, worker, compilers, say
        self.module = dispatch.kernel(backend, workload.kernel)
        self.tried, self.start = [], time.monotonic()

    def failures(self) -> Counter:
        return Counter(t.failure.partition(":")[0] for t in self.tried if t.failure)

    @property
    def best(self) -> float | None:
        return min((t.time_us for t in self.tried if t.time_us), default=None)

    def search(self, trials, seconds, storage, sampler, seed) -> None:
        w = self.workload
        self.pool, total = space.legal(self.module, self.problem, seed)
        study = search.searcher(self.module, self.pool, f"{w.kernel}/{self.backend}/{self.problem.arch}/{w.name}/{provenance.code(self.module)}", storage, sampler, seed)
        self.sampler, self.seed = study.name, seed
        self.tried = [Tried(self.backend, r["config"], r["time_us"], r.get("failure")) for r in getattr(study, "history", {}).values()]
        self.say({"event": "start", "workload": w.name, "backend": self.backend, "feasible": len(self.pool), "total": total, "resumed": len(self.tried)})
        self.end = None if seconds is None else self.start + seconds
        line, more = deque(), lambda: trials is None or len(self.tried) + len(line) < trials
        while True:
            while len(line) < (self.compilers.width if self.compilers else 1) and (more() and not self._over() or not self.tried and not line):
                config = study.ask()
                if config is None:
                    break
                line.append((config, self.compilers and self.compilers.submit(w, self.backend, config)))
            if not line or self._over() and self.tried:
                break
            config, compiled = line.popleft()
            begun = time.monotonic()
            one = self._try(config, compiled)
            if one is None:
                line.appendleft((config, compiled))
                break
            study.tell(config, one.time_us, failure=one.failure)
            self.tried.append(one)
            self.say({"event": "trial", "workload": w.name, "backend": self.backend, "config": config, "time_us": one.time_us, "failure": one.failure, "done": len(self.tried),
                      "best_us": self.best, "seconds": round(time.monotonic() - begun, 2)})
        for config, compiled in line:  # asked for, and never tried
            study.drop(config)
            compiled and compiled.cancel()
        self.stop = "exhausted" if len(self.tried) >= len(self.pool) else "trials" if trials is not None and len(self.tried) >= trials else "seconds"

    def _over(self) -> bool:
        return self.end is not None and time.monotonic() >= self.end

    def _left(self) -> float:
        return float("inf") if self.end is None else max(0.0, self.end - time.monotonic()) + GRACE

    def _try(self, config, compiled) -> Tried | None:
        """One config, by the bench worker. None if the budget ended before it did: that is no failure of the config's."""
        if compiled is not None:
            try:
                refused, left = compiled.result(self._left())
            except TimeoutError:
                return None
            if refused:
                return Tried(self.backend, config, None, refused)
        limit = max(LEAST, TIMES * (self.best or 0) / 1e6) + (COMPILING if compiled is None or left else 0)
        failure = None
        for turn in range(2):
            allowed = min(limit, self._left())
            try:
                told = self.worker("attempt", self.backend, config, self.best or float("inf"), seconds=allowed)
                return Tried(self.backend, config, told["time_us"], told["failure"])
            except (isolate.Lost, isolate.Failed) as error:
                failure = str(error)[:300]
                if failure.startswith("hang"):
                    if allowed < limit and self.tried:
                        return None
                    break
        return Tried(self.backend, config, None, failure)  # twice on fresh processes: never again

    def entry(self, seconds) -> dict | None:
        """The finals, interleaved in one process, and what is written of them."""
        default = self.pool[0]
        chosen = finalists(self.backend, self.tried, default)
        try:
            samples = self.worker("finals", [(t.backend, t.config) for t in chosen], 2.0, seconds=COMPILING * 2)
        except (isolate.Lost, isolate.Failed) as error:
            self.say({"event": "trial", "workload": self.workload.name, "backend": self.backend, "config": {}, "time_us": None, "failure": f"finals: {error}", "done": len(self.tried),
                      "best_us": self.best})
            return None
        for one, found in zip(chosen, samples):
            one.samples, one.time_us = found, found and self.worker("centre", found)
        chosen = [one for one in chosen if one.samples]
        if not chosen:
            return None
        entry = decide(chosen, default, self.module, self.problem)
        entry |= {"key": lookup.key_of(self.problem), "backend": self.backend, "workload": self.workload.name, "code": provenance.code(self.module), "status": "tuned",
                  "date": datetime.date.today().isoformat(),
                  "search": {"sampler": self.sampler, "evaluated": len(self.tried), "feasible": len(self.pool), "failed": sum(self.failures().values()), "seed": self.seed,
                             "stop": self.stop, "seconds": round(time.monotonic() - self.start, 1)}}
        self.say({"event": "final", "workload": self.workload.name, "backend": self.backend, "entry": entry})
        return entry
