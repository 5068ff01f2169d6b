"""tune: search a kernel's legal configs on a workload, and write the winner where the next call finds it.

The default is always measured, in the same run and in the finals; the result is adopted only for a real gain. A config is checked against the float64
formula before it is timed. Failures are counted and kept with their cause.
"""
import contextlib
import datetime
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from sparsetile.autotune import provenance, search, space, store, timing
from sparsetile.autotune.tasks import Task, Workload, find
from sparsetile.autotune.verify import Verifier
from sparsetile.backends.contract import BACKENDS, KERNELS, Unsupported
from sparsetile.ops import checks, dispatch
from sparsetile.profiles import lookup

FINALISTS = 6
GAIN = 0.02  # a winner must beat the default by this or by twice the noise, whichever is more


@dataclass
class Tried:
    """One config on one backend."""
    backend: str
    config: dict
    time_us: float | None = None
    failure: str | None = None
    samples: list = field(default_factory=list)


def tune(op, workload, *, backend=None, trials=None, seconds=None, storage=None, profiles=None, device=None, sampler="tpe", seed=0, progress=None):
    """Tune a kernel on a workload and write the profile entry that the next call on this device finds.

    op        kernel ("block_attention", ...) or the public op that runs it; must fit the workload
    workload  a Workload or the name of one (sparsetile.autotune.tasks.workloads())
    backend   tune this backend only; None tunes every backend that supports the problem, and the fastest comes first in the profile
    trials, seconds   budget for each backend; whichever ends first (default 30 seconds)
    storage   path of an Optuna journal file, or a storage URL: a killed run goes on where it stopped
    profiles  directory to write <device>/<kernel>.yaml into; the user cache by default
    device    CUDA device index, None for the CPU
    progress  called with a dict for each event (start, trial, final, done)
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
    task = Task(w, device, seed)
    problem = task.problem
    asked = dispatch.requested_backend("sparse_attention" if "attention" in w.kernel else w.kernel, backend)
    names = [asked] if asked != "auto" else [b for b in BACKENDS if b != "reference"]
    refused = {name: dispatch.refusal(name, problem, device) for name in names}
    names = [name for name in names if refused[name] is None]
    if not names:
        raise Unsupported(f"tune: {w.name}: " + "; ".join(f"{name}: {why}" for name, why in refused.items()))
    watch, verifier = timing.Stopwatch(device), Verifier(w, device)
    entries = []
    with _fixed_clock():
        for name in names:
            entries.append(_tune_backend(name, w, task, problem, watch, verifier, trials, seconds, storage, sampler, seed, say))
    entries = [e for e in entries if e is not None]
    if not entries:
        raise Unsupported(f"tune: {w.name}: no config of {', '.join(names)} ran and was right; see the failures in the progress events")
    entries.sort(key=lambda e: e["time_us"])
    if len(entries) > 1:
        entries[0]["runner_up"] = {"backend": entries[1]["backend"], "time_us": entries[1]["time_us"]}
    root = Path(profiles) if profiles else lookup.user_cache()
    for entry in entries:
        path = store.add(root, w.kernel, provenance.device(device), entry, provenance.versions(), {"launch": "eager", "l2": "cold" if device is not None else "warm", "clocks": "floating"})
    dispatch.clear_plans()
    used = lookup.find(problem, provenance.device(device)["name"], user=str(root))
    note(root, f"{w.name} {w.kernel}: a call gets {used.backend} {used.config} from {used.source}")
    say({"event": "done", "workload": w.name, "entry": entries[0], "path": str(path)})
    return entries[0]


def note(root: Path, line: str) -> None:
    """A line of <root>/tune.log, in one write: processes that tune side by side share the file."""
    root.mkdir(parents=True, exist_ok=True)
    handle = os.open(root / "tune.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(handle, f"{datetime.datetime.now().isoformat(timespec='seconds')} {line}\n".encode())
    os.close(handle)


def _summary(w, entry, failures: Counter) -> str:
    s, default = entry["search"], entry.get("default_us")
    causes = f" ({', '.join(f'{cause} {n}' for cause, n in failures.most_common())})" if failures else ""
    return (f"{w.name} {w.kernel} {entry['backend']}: {entry['time_us']} us, " + (f"default {default} us, {default / entry['time_us']:.3f} x" if default else "default failed") +
            f"; {entry['config']}; tried {s['evaluated']} of {s['feasible']}, failed {s['failed']}{causes}, {entry['ties']} tied within {entry['band']:.1%}, stop {s['stop']}, {s['seconds']} s")


def _tune_backend(name, w, task, problem, watch, verifier, trials, seconds, storage, sampler, seed, say):
    module = dispatch.kernel(name, w.kernel)
    pool, total = space.legal(module, problem, seed)
    study = search.searcher(module, pool, f"{w.kernel}/{name}/{problem.arch}/{w.name}/{provenance.code(module)}", storage, sampler, seed)
    known = getattr(study, "history", {})
    tried = [Tried(name, r["config"], r["time_us"], r.get("failure")) for r in known.values()]
    say({"event": "start", "workload": w.name, "backend": name, "feasible": len(pool), "total": total, "resumed": len(tried)})
    start, default = time.monotonic(), pool[0]
    while (trials is None or len(tried) < trials) and (seconds is None or time.monotonic() - start < seconds) or not tried:
        config = study.ask()
        if config is None:
            break
        best = min((t.time_us for t in tried if t.time_us), default=float("inf"))
        one = _try(name, config, task, watch, verifier, best)
        study.tell(config, one.time_us, failure=one.failure)
        tried.append(one)
        say({"event": "trial", "workload": w.name, "backend": name, "config": config, "time_us": one.time_us, "failure": one.failure, "done": len(tried),
             "best_us": min((t.time_us for t in tried if t.time_us), default=None)})
    stop = "exhausted" if len(tried) >= len(pool) else "trials" if trials is not None and len(tried) >= trials else "seconds"
    right = sorted((t for t in tried if t.time_us), key=lambda t: t.time_us)
    chosen = right[:FINALISTS]
    if not any(t.config == default for t in chosen):
        chosen += [t for t in right if t.config == default][:1] or [Tried(name, default)]
    finalists = [one for one in (_finalist(t, task, verifier, known) for t in chosen) if one]
    if not finalists:
        return None
    for one, samples in zip(finalists, timing.finals(watch, [task.bound(name, t.config) for t in finalists])):
        one.samples, one.time_us = samples, watch.centre(samples)
    entry = _decide(finalists, default, watch, module, problem)
    failed = sum(1 for t in tried if t.failure)
    entry |= {"key": lookup.key_of(problem), "backend": name, "workload": w.name, "code": provenance.code(module), "status": "tuned", "date": datetime.date.today().isoformat(),
              "search": {"sampler": study.name if isinstance(study, search.Walk) else sampler, "evaluated": len(tried), "feasible": len(pool), "failed": failed, "seed": seed,
                         "stop": stop, "seconds": round(time.monotonic() - start, 1)}}
    say({"event": "final", "workload": w.name, "backend": name, "entry": entry})
    return entry


def _try(name, config, task, watch, verifier, best) -> Tried:
    """One config: checked, then screened. A failure is recorded with its cause; only a user's interrupt ends the run."""
    one = Tried(name, config)
    try:
        wrong = verifier.wrong(name, config)
        if wrong:
            one.failure = f"wrong answer: {wrong}"[:300]
        else:
            one.time_us = watch.centre(timing.screen(watch, task.bound(name, config), best))
    except Exception as error:  # noqa: BLE001 (whatever a compiler or driver throws is this config's failure, told and counted)
        one.failure = f"{type(error).__name__}: {error}"[:300]
    return one


def _finalist(one: Tried, task, verifier, known):
    """A finalist from an earlier process is checked again in this one, and every finalist is warm."""
    try:
        if verifier.wrong(one.backend, one.config):
            return None
        task.bound(one.backend, one.config)()
        return one
    except Exception:  # noqa: BLE001 (recorded as a failure when it was tried)
        return None


def _decide(finalists, default, watch, module, problem) -> dict:
    """Ties go to the smaller config in a fixed order; the default stays unless the gain is real."""
    base = next((t for t in finalists if t.config == default), None)
    best = min(finalists, key=lambda t: t.time_us)
    band = max(0.01, timing.noise(best.samples, best.time_us) * 2)
    ties = [t for t in finalists if t.time_us <= best.time_us * (1 + band)]
    winner = min(ties, key=lambda t: space.cost_order(t.config, module, problem))
    if base is not None:
        need = max(GAIN, 2 * timing.noise(base.samples, base.time_us))
        if winner is not base and winner.time_us > base.time_us * (1 - need):
            winner = base
    entry = {"config": dict(winner.config), "time_us": round(winner.time_us, 2), "spread": timing.spread(winner.samples), "ties": len(ties), "band": round(band, 4)}
    if base is not None:
        entry["default_us"] = round(base.time_us, 2)
    return entry



@contextlib.contextmanager
def _fixed_clock():
    """The garbage collector would be timed with the call that triggers it."""
    import gc
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
