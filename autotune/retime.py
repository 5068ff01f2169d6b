"""Entries timed again beside their kernel's default: on this machine (`verify`), and on a second GPU of the model that wrote them (`confirm`)."""
import statistics
from collections import Counter
from pathlib import Path

from sparsetile.autotune import hunt, isolate, shelf, space, store, tasks, timing, tune
from sparsetile.backends.contract import Problem
from sparsetile.ops import dispatch
from sparsetile.profiles import lookup, schema


class Again:
    """A device's bench worker, and the workloads that entries come from."""

    def __init__(self, device):
        self.named, self.worker = {w.name: w for w in tasks.workloads()}, tune._bench(tune.BENCH, device, True)
        self.machine, self.opened = tune.machine(device), None

    def workload(self, op: str, entry: dict):
        """The workload of the entry's name, else (it was recorded from a program) one that stands for its key; None where nothing does."""
        try:
            return self.named.get(entry.get("workload")) or tasks.of_problem(self.problem(op, entry))
        except KeyError:  # by hand: axes are missing
            return None

    def problem(self, op: str, entry: dict) -> Problem:
        """What the entry's key says."""
        key = entry["key"]
        return Problem.of(op, key["dims"], key["dtypes"], self.machine["arch"], key.get("features", ()), key.get("density", 1.0), key.get("granularity", 1))

    def is_default(self, op: str, entry: dict) -> bool:
        """Whether a call by the entry is the kernel's default call, which cannot be slower than itself."""
        module, problem = dispatch.kernel(entry["backend"], op), self.problem(op, entry)
        if lookup.keeps_default(entry):
            return True
        if not set(entry["config"]) <= {t.name for t in module.TUNABLES} or module.supports(problem) is not None:
            return False
        default = module.default_config(problem)
        return space.call_of(module, problem, {**default, **entry["config"]}) == space.call_of(module, problem, default)

    def facts(self, workload) -> dict:
        if self.opened != workload:
            self.worker.open(workload, 0)
            self.opened = workload
        return self.worker("facts", seconds=isolate.STARTING)

    def times(self, op: str, entry: dict, workload) -> dict:
        """time_us and default_us now, whether that is slower beyond the noise, and the default config; or failed: why there are none."""
        try:
            default = dispatch.kernel(entry["backend"], op).default_config(self.facts(workload)["problem"])
            (mine, base), _ = self.worker("finals", [(entry["backend"], dict(entry["config"])), (entry["backend"], default)], hunt.FINALS, (0, 1), seconds=hunt.COMPILING * 2)
        except (isolate.Lost, isolate.Failed) as error:
            self.opened = None
            return {"failed": str(error)}
        if not mine or not base:
            return {"failed": "its config or the default gives no right answer"}
        now, then = statistics.median(mine), statistics.median(base)
        return {"time_us": round(now, 2), "default_us": round(then, 2), "slower": now > then * (1 + max(0.01, timing.error(mine), timing.error(base))), "default": default}


def verify(paths, device, say=print) -> int:
    """Time each entry's config again beside its kernel's default, interleaved, on this machine; what makes the default's call is counted and not timed. Returns how many are slower than the default
    beyond the noise, or fail. ValueError if there is none of this device."""
    again, bad, left, timed = Again(device), 0, Counter(), 0
    for path in shelf.files(paths):
        data = schema.load(path)
        for n, e in enumerate(data["entries"]):
            w = again.workload(data["op"], e)
            if data["device"]["arch"] != again.machine["arch"] or w is None:
                left[f"of {data['device']['arch']}" if data["device"]["arch"] != again.machine["arch"] else "without a workload that stands for them"] += 1
                continue
            timed += 1
            if again.is_default(data["op"], e):
                left["that are their kernel's default"] += 1
                continue
            found, where = again.times(data["op"], e, w), f"{path.name}: entry {n}: {w.name} {e['backend']}"
            bad += found.get("slower", True)
            say(f"FAILS   {where}: {found['failed']}" if "failed" in found else
                f"{'SLOWER ' if found['slower'] else 'well   '} {where}: {found['time_us']:.1f} us, default {found['default_us']:.1f} us ({found['default_us'] / found['time_us']:.3f} x), written {e.get('time_us')} us")
    others = ", ".join(f"{count} {why}" for why, count in left.items())
    if not timed:
        raise ValueError(f"profiles: expected entries of this device ({again.machine['name']}, {again.machine['arch']}), got {others or 'none'}; name another directory or --device")
    if left:
        say(f"not timed: {others}")
    return bad


def confirm(root, device, say=print) -> int:
    """Time the entries that another GPU of this model made, and write into them what came of it; one that is slower than the default here, beyond the noise, gives way to
    the default. Processes on several GPUs share the work: none does what another has done. Returns how many gave way or failed."""
    again, bad = Again(device), 0
    mine = None
    for path in sorted((Path(root) / lookup.slug(again.machine["name"])).glob("*.yaml")):
        for e in schema.load(path)["entries"]:
            w = again.workload(path.stem, e)
            if w is None or "unit" not in e or e.get("status") == "pinned" or not _open(path, e):
                continue
            op = path.stem
            try:
                mine = mine or again.facts(w)["unit"]
            except (isolate.Lost, isolate.Failed) as error:  # its inputs, say, do not fit beside what others hold
                bad += 1
                say(f"NOT       {w.name} {op} {e['backend']}: {error}")
                continue
            if e["unit"] == mine:
                continue
            found = again.times(op, e, w)
            if not _open(path, e):  # another was faster
                continue
            kept = "failed" not in found and not found["slower"]
            bad += not kept
            said = {"unit": mine, **{name: found[name] for name in ("time_us", "default_us", "failed") if name in found}}
            new = {**e, "confirmed": said} if kept or "default" not in found else {**e, "config": found["default"], "time_us": e.get("default_us", found["default_us"]), "confirmed": {**said, "instead_of": str(e["config"])}}
            data = schema.load(path)
            store.add(Path(root), op, data["device"], new, data.get("tuned_with", {}), data.get("regime", {}))
            line = f"{w.name} {op} {e['backend']}: on {mine} " + (found["failed"] if "failed" in found else f"{found['time_us']:.1f} us, default {found['default_us']:.1f} us") + ("" if kept else "; it stays, and the entry says so" if "failed" in found else "; the default stays")
            tune.note(Path(root), line)
            say(("confirmed " if kept else "NOT       ") + line)
    return bad


def _open(path: Path, entry: dict) -> bool:
    """Whether the entry stands in the file and nobody has confirmed it."""
    return any(e["key"] == entry["key"] and e["backend"] == entry["backend"] and e["config"] == entry["config"] and "confirmed" not in e for e in schema.load(path)["entries"])
