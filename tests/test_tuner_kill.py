"""kill -9 at random moments, of the controller or its bench worker, on a journal file and on PostgreSQL, with recorded timings replayed: what was told is kept, at most the
trial in flight is lost, nothing is tried twice that was told, no file is broken, and the profile in the end is that of an undisturbed run."""
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparsetile.autotune import search
from sparsetile.ci import postgres
from sparsetile.profiles import schema

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {1: 8, 2: 24 * 2}  # of so many workloads


def start(storage, folder, workloads):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "RECORDED_LOG": str(folder / "log"), "SPARSETILE_CACHE_DIR": str(folder / "cache")}
    return subprocess.Popen([sys.executable, str(ROOT / "tests" / "recorded.py"), storage, str(folder / "profiles"), str(workloads)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def child_of(pid):
    with contextlib.suppress(OSError):
        return [int(n) for task in os.listdir(f"/proc/{pid}/task") for n in Path(f"/proc/{pid}/task/{task}/children").read_text().split()]
    return []


def running(pid) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def disturbed(storage, folder, workloads, kills, rng):
    """Runs until one ends by itself; the first `kills` of them are disturbed at a random moment after their first event. Returns how many orders were lost."""
    lost = 0
    while True:
        run = start(storage, folder, workloads)
        if kills:
            line = run.stdout.readline()
            assert line, run.stderr.read()[-2000:]
            time.sleep(rng.random() * 0.8)
            victim = (child_of(run.pid) or [run.pid])[0] if rng.random() < 0.4 else run.pid
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
            kills, lost = kills - 1, lost + 1
        said, errors = run.communicate(timeout=120)
        if run.returncode == 0 and not kills:
            return lost
        assert run.returncode in (0, -9), errors[-2000:]


def entries(folder):
    (path,) = (folder / "profiles").rglob("*.yaml")
    found = schema.load(path)["entries"]
    for e in found:
        e.pop("date"), e["search"].pop("seconds")
    return found


def check(storage, tmp_path, workloads, kills):
    rng, folder, calm = random.Random(kills), tmp_path / "killed", tmp_path / "calm"
    folder.mkdir(), calm.mkdir()
    undisturbed = start(str(calm / "journal"), calm, workloads)
    assert undisturbed.wait(120) == 0, undisturbed.stderr.read()[-2000:]
    undisturbed.stdout.close(), undisturbed.stderr.close()
    lost = disturbed(storage, folder, workloads, kills, rng)
    assert entries(folder) == entries(calm)
    optuna, held, told = search.engine(), search.storage_of(storage), []
    for name in optuna.study.get_all_study_names(held):
        trials = optuna.load_study(study_name=name, storage=held).get_trials(deepcopy=False)
        told += [(name, json.dumps(json.loads(t.user_attrs["result"])["config"])) for t in trials if t.state == optuna.trial.TrialState.COMPLETE and "result" in t.user_attrs]
    assert len(told) == len(set(told)) == CONFIGS[workloads]
    answered = len((folder / "log").read_text().splitlines())
    assert CONFIGS[workloads] <= answered <= CONFIGS[workloads] + lost, "a trial that was told was made again"
    for path in folder.rglob(".*.yaml.*"):
        pytest.fail(f"a half-written file is left: {path}")


@pytest.mark.parametrize("workloads, kills", [(1, 2), pytest.param(2, 20, marks=pytest.mark.slow)])
def test_journal(tmp_path, workloads, kills):
    check(str(tmp_path / "journal"), tmp_path, workloads, kills)


@pytest.mark.parametrize("workloads, kills", [(1, 1), pytest.param(2, 20, marks=pytest.mark.slow)])
def test_postgresql(tmp_path, workloads, kills):
    if postgres.missing():
        pytest.skip(postgres.missing())
    with postgres.server() as url:
        check(url, tmp_path, workloads, kills)


def test_the_processes_of_all_gpus_end_with_the_run_that_started_them(tmp_path):
    command = ["tune", "cpu/window-256/4096", "--seconds", "60", "--profiles", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    run = subprocess.Popen([sys.executable, "-c", f"from sparsetile.autotune import batch; batch._side_by_side([{command}], 1)"], env=env, stderr=subprocess.DEVNULL)
    family, until = [run.pid], time.monotonic() + 60
    while len(family) < 3 and time.monotonic() < until:  # the run, the tuner, its bench worker
        family = [run.pid, *(one := child_of(run.pid)), *(child_of(one[0]) if one else [])]
        time.sleep(0.05)
    run.kill(), run.wait()
    assert len(family) == 3
    while any(map(running, family)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(running, family))
