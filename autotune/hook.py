"""SPARSETILE_TUNE=on: a miss in the profiles tunes the problem first. Installed by the face when the environment asks for it; never while a graph is captured."""
import logging
import os
import sys

from sparsetile.autotune import tasks, tune
from sparsetile.ops import dispatch

log = logging.getLogger("sparsetile")
_running = False


def seconds() -> float:
    """The budget of a miss for each backend."""
    said = os.environ.get("SPARSETILE_TUNE_SECONDS") or "10"
    try:
        if 0 <= float(said) < float("inf"):
            return float(said)
    except ValueError:
        pass
    raise ValueError(f"SPARSETILE_TUNE_SECONDS: expected seconds, 0 or more, got {said!r}; set e.g. 10, or unset it")


def on_miss(problem, device, backend, rule=None):
    """Tune `problem` on a stand-in workload of the same sizes; what has none runs on the heuristic, said once."""
    global _running
    if _running or _capturing(device):
        return
    workload = tasks.of_problem(problem, rule)
    if workload is None:
        log.warning("SPARSETILE_TUNE=on: %s has no stand-in workload with features %s; its default config runs", problem.op, sorted(problem.features))
        return
    _running = True
    try:
        tune.tune(problem.op, workload, backend=backend, seconds=seconds(), device=device)
    except Exception as error:  # noqa: BLE001 (a call must not fail because tuning did; it is said)
        log.warning("SPARSETILE_TUNE=on: tuning %s failed: %s; its default config runs", problem.op, error)
    finally:
        tune.close()  # a program's memory is its own
        _running = False


def _capturing(device) -> bool:
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    return device is not None and bool(torch is not None and torch.cuda.is_current_stream_capturing() or cupy is not None and cupy.cuda.get_current_stream().is_capturing())


def install():
    dispatch.tune_hook = on_miss
