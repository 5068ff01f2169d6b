"""Compiled code on disk: found by the next process, and no reason to fail when it cannot be written, is damaged, is made twice at once, or the CPU is another."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")
ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import time
import numpy as np
import sparsetile as st
from sparsetile.backends.numba import topk
scores = np.random.default_rng(0).standard_normal((1, 9, 700)).astype(np.float32)
start = time.perf_counter()
found = np.sort(st.topk(scores, 20, backend="numba").indices[0, 0], 1)
seconds = time.perf_counter() - start
assert (found == np.sort(np.argsort(-scores[0], 1, kind="stable")[:, :20], 1)).all()
print(seconds)
"""


def start(cache, **more):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT), "NUMBA_NUM_THREADS": "2", **more}
    return subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def seconds(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return float(out)


def files(cache):
    return {path: path.stat().st_mtime_ns for path in Path(cache).rglob("*.nb*")}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Filled by two processes at once."""
    folder = tmp_path_factory.mktemp("numba")
    for process in [start(folder), start(folder)]:
        seconds(process)
    return folder


def test_the_next_process_compiles_nothing(cache):
    before = files(cache)
    assert before
    seconds(start(cache))
    assert files(cache) == before


def test_damaged_entries_are_compiled_again(cache):
    for path in files(cache):
        path.write_bytes(path.read_bytes()[:40])
    seconds(start(cache))


def test_another_cpu_does_not_take_this_ones_code(cache):
    seconds(start(cache))
    before = len(files(cache))
    seconds(start(cache, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES=""))
    assert len(files(cache)) > before


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    seconds(start(tmp_path / "file" / "cache"))
