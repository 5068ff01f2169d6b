"""Many workloads: one after the other here, shared with others where there is a storage, and on every GPU of the host."""
import contextlib
import os
import subprocess
import sys
import time

from sparsetile.autotune import fleet, isolate, tune
from sparsetile.backends.devices import cpu_count
from sparsetile.backends.contract import Unsupported
from sparsetile.profiles import lookup

WAIT = 3.0  # seconds between looks at what others work on
STOPPING = 3.0  # seconds that processes have to stop by themselves


def run(workloads: list, say, *, device, storage=None, profiles=None, backend=None, again=False, **options) -> int:
    """How many of the workloads failed. With a storage, what others have done or are at is theirs; what a dead one left is taken up."""
    shared = storage and fleet.WorkList(storage)
    where = _place(device) if shared else ""
    failed, todo, known = 0, list(workloads), set()
    while todo:
        later = []
        for n, w in enumerate(todo):
            claim = shared and shared.claim(f"{where}/{w.name}/{backend or 'all'}", again or not _written(w, device, profiles, where))
            if shared and claim is None:
                if shared.done(f"{where}/{w.name}/{backend or 'all'}"):
                    say({"event": "done before", "workload": w.name})
                else:
                    later.append(w)
                continue
            then = None if shared else next(iter(todo[n + 1:]), None)  # in a list that is shared another may take it
            failed += _one(w, claim, say, device=device, storage=storage, profiles=profiles, backend=backend, then=then, **options)
        if later and {w.name for w in later} != known:
            known = {w.name for w in later}
            say({"event": "waiting", "workloads": sorted(known)})
        todo = later
        if todo:
            time.sleep(WAIT)
    return failed


def _one(w, claim, say, **options) -> int:
    try:
        if not claim:
            tune.tune(w.kernel, w, progress=say, **options)
        else:
            with claim:
                tune.tune(w.kernel, w, progress=say, **options)
                claim.finish()
        return 0
    except (Unsupported, isolate.Lost, isolate.Failed) as error:
        say({"event": "failed", "workload": w.name, "error": str(error)})
        return 1


def _place(device) -> str:
    """The device's model: a task is one model's, whatever host it is in."""
    return lookup.slug(tune.machine(device)["name"])


def _written(w, device, profiles, where) -> bool:
    """Whether this host's profiles hold an entry of the workload: else a task that is done elsewhere is finished here from the trials in the storage."""
    from pathlib import Path

    from sparsetile.profiles import schema
    path = Path(profiles or lookup.user_cache()) / where / f"{w.kernel}.yaml"
    try:
        return any(entry.get("workload") == w.name for entry in schema.load(path)["entries"])
    except schema.ProfileError:
        return False


def every_gpu(count: int, arguments: list[str], names: list[str], storage, profiles=None) -> int:
    """One process for each GPU of the host: without a storage each takes every count-th workload, with one they share the list. At the end, when all are idle, each
    GPU times what others of its model have found. Exit code: the worst."""
    tuning = [["tune", *(names if storage else names[n::count]), "--device", str(n), *arguments] for n in range(count) if storage or names[n::count]]
    confirming = [["verify", *([str(profiles)] if profiles else []), "--device", str(n), "--write"] for n in range(count)] if count > 1 else []
    return max(_side_by_side(tuning, count), _side_by_side(confirming, count))


def _side_by_side(commands: list, count: int) -> int:
    env = {"SPARSETILE_COMPILERS": str(max(1, cpu_count() // count - 2)), **os.environ, "TERM": "dumb"}  # the processes that each has compile; and lines, for several tables on one terminal overwrite each other
    starting = f"from {isolate.__name__} import with_parent; with_parent(); from {__package__}.cli import main; raise SystemExit(main())"
    running = []
    try:
        running += [subprocess.Popen([sys.executable, "-c", starting, *command], env=env) for command in commands]
        return max((abs(process.wait()) for process in running), default=0)  # less than 0 where a signal ended it
    finally:  # Ctrl-C reaches them too, and they say what they have to; a signal for this process alone does not
        until = time.monotonic() + STOPPING
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0, until - time.monotonic()))
            process.terminate()
