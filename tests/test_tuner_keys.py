"""What a profile's key tells apart, which workloads stand for each kernel, and what an entry's code digest covers."""
import inspect
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

import sparsetile as st
from sparsetile.autotune import provenance, tasks
from sparsetile.backends.contract import KERNELS, TUNED, Problem
from sparsetile.ops import dispatch
from sparsetile.profiles import lookup

ROOT = Path(__file__).resolve().parent.parent


def key(rule, T=4096):
    return lookup.key_of(tasks.Task(tasks.Workload.of("test/key", "block_attention", options=dict(pattern=rule), B=1, Hq=2, Hk=2, T=T, S=T, D=16, Dv=16), None, hollow=True).problem)


def test_longformer_is_no_window_of_its_density():
    window, longformer = key(st.Window(320, 320)), key(st.Window(256, 256) | st.Global(range(64)))
    assert window["density"] == longformer["density"] and window != longformer
    assert key(st.Window(300, 340)) == window and key(st.Window(260, 260) | st.Global(range(50))) == longformer


@pytest.mark.parametrize("rule, kind", [(st.Causal(), "causal"), (st.Window(3), "window"), (st.Full(), "full"), (st.Causal() & st.Documents([5, 3]), "causal+documents"),
                                        (st.bigbird(64), "global+random+window"), (~st.Sink(4), "sinks"), (st.PerHead([st.Window(3), st.Strided(4)]), "strided+window")])
def test_kinds(rule, kind):
    assert rule.kind == kind


def test_training_finds_what_inference_was_tuned_for():
    task = tasks.Task(tasks.find("cpu/causal/4096"), None, hollow=True)
    from sparsetile.ops import attention
    call = task._call(*task.inputs)
    assert lookup.key_of(attention.problem_of(call, "block_attention", lse=True)) == lookup.key_of(task.problem)


@pytest.mark.parametrize("kernel", TUNED)
def test_every_workload_has_a_bucket_of_its_own_and_each_tunable_kernel_three(kernel):
    for device, backends in ((None, ("numba",)), (0, ("triton", "cupy"))):
        found = [w for w in tasks.for_device(device) if w.kernel == kernel]
        keys = {str(lookup.key_of(tasks.Task(w, None, hollow=True).problem)) for w in found}
        assert len(keys) == len(found)
        if any(dispatch.has_kernel(backend, kernel) for backend in backends):
            assert len(keys) >= 3


def test_hollow_inputs_give_the_same_problem():
    for name in ("cpu/gather-32", "cpu/window-256/4096/backward", "cpu/indexer-512", "cpu/merge-512"):
        assert tasks.Task(tasks.find(name), None, hollow=True).problem == tasks.Task(tasks.find(name), None).problem


def test_drawn_entries_are_distinct_ascending_and_seen(rng):
    seen = np.array([1, 3, 40, 41, 500])
    rows = tasks._drawn(rng, 5, 40, seen)
    for row, n in zip(rows, seen):
        real = row[row >= 0]
        assert len(real) == min(n, 40) and (np.diff(real) > 0).all() and real[-1] < n and (row[len(real):] == -1).all()


def test_a_problem_travels_between_processes():
    problem = Problem.of("topk", dict(B=1), {}, "cpu", ["a", "b"])
    assert hash(problem) == hash(Problem.of("topk", dict(B=1), {}, "cpu", ["b", "a"]))
    assert "_hash" not in str(pickle.dumps(problem)) and pickle.loads(pickle.dumps(problem)) == problem


def test_stand_ins_have_the_key_of_the_problem_they_stand_for():
    for name in ("cpu/causal/4096", "cpu/window-256/4096", "cpu/gather-32", "cpu/indexer-topk-32", "cpu/latent-512", "cpu/longformer-512/4096", "gpu/float8-keys-causal/8192",
                 "gpu/float8-decode-b64/32768", "gpu/bitmaps-4096"):
        task = tasks.Task(tasks.find(name), None, hollow=True)
        for pattern in (None, task.workload.option("pattern")):
            stand_in = tasks.of_problem(task.problem, pattern)
            assert lookup.key_of(tasks.Task(stand_in, None, hollow=True).problem) == lookup.key_of(task.problem)
    assert tasks.of_problem(tasks.Task(tasks.find("gpu/strided-128/32768"), None, hollow=True).problem) is None


# ------------------------------------------------------------------------------------------------------------------ digests
@pytest.mark.parametrize("backend, kernel, beside", [
    ("cupy", "block_attention", {"block_attention.cu", "block_attention_float32.cu", "block_attention_hopper.cu", "hopper.cuh", "lists.cuh"}),
    ("cupy", "indexer_topk", {"indexer_topk_hopper.cu", "topk.cu", "indexer_scores.cu", "select.cuh"}), ("cupy", "latent_decompress", {"latent_decompress_hopper.cu", "gemm.cuh", "gemm.py"}),
    ("triton", "gather_attention_backward", {"gather_attention.py", "gather_backward_gluon.py", "gather_backward_keys_gluon.py", "gather_backward_queries_gluon.py", "tiles.py"}), ("triton", "latent_decompress", {"head_product.py", "latent_decompress_gluon.py"}), ("triton", "topk", {"select_rows.py", "topk_gluon.py"}), ("numba", "topk", {"simd.py"})])
def test_the_digest_covers_all_that_a_kernel_is_built_from(backend, kernel, beside, tmp_path):
    folder = tmp_path / "backends" / backend
    shutil.copytree(ROOT / "backends" / backend, folder)

    class Module:
        pass

    def digest():
        provenance.sources.cache_clear()
        return provenance.code(Module)
    original, inspect.getfile = inspect.getfile, lambda module: str(folder / f"{kernel}.py")
    try:
        before = digest()
        for name in sorted(beside | {f"{kernel}.py"}):
            with open(folder / name, "a") as file:
                file.write("\n")
            after = digest()
            assert after != before, name
            before = after
        with open(folder / ("layout.py" if backend != "numba" else "merge_attention.py"), "a") as file:
            file.write("\n")
        assert digest() == before
    finally:
        inspect.getfile = original
        provenance.sources.cache_clear()


def test_every_cuda_source_belongs_to_a_kernel():
    """A variant that no kernel names by a string would be left out of every digest."""
    folder = ROOT / "backends" / "cupy"
    covered = set().union(*(provenance.sources(folder / f"{kernel}.py") for kernel in KERNELS if (folder / f"{kernel}.py").exists()))
    assert {path.name for path in folder.glob("*.cu*")} <= {path.name for path in covered}
