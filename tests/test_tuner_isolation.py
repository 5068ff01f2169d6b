"""What breaks a config breaks neither the tuner nor its neighbours: each fault is injected in a process of its own, recorded with its cause, and the search goes on."""
import os
import signal
import time

import faulty
import pytest

from sparsetile.autotune import ahead, decide, hunt, isolate, provenance, tasks, tune
from sparsetile.ops import dispatch
from sparsetile.profiles import lookup

TOPK = tasks.Workload.of("test/topk", "topk", B=1, T=8, S=64, K=5)


@pytest.fixture(autouse=True)
def own(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSETILE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("FAULTY_MARK", str(tmp_path / "mark"))
    monkeypatch.delenv("SPARSETILE_PROFILE_DIR", raising=False)
    monkeypatch.setattr(hunt, "FINALS", 0.2), monkeypatch.setattr(hunt, "LEAST", 1.0), monkeypatch.setattr(hunt, "COMPILING", 8.0)
    lookup.forget(), dispatch.clear_plans()
    yield
    tune.close(), lookup.forget(), dispatch.clear_plans()


class Faulty(faulty.Kernel):
    """The controller's view of it: only its space. What it runs, it would run in this process."""

    def run(self, *args, **rest):
        raise AssertionError("the controller ran a kernel")


def tuned(monkeypatch, faults, **options):
    kernel, module = dispatch.kernel, Faulty()
    module.TUNABLES = (faulty.Kernel.TUNABLES[0], faulty.Tunable("fault", faults))
    monkeypatch.setattr(dispatch, "kernel", lambda backend, name: module if (backend, name) == ("numba", "topk") else kernel(backend, name))
    monkeypatch.setattr(provenance, "code", lambda module: "0" * 8)
    events = []
    entry = tune.tune("topk", TOPK, backend="numba", sampler="random", bench="faulty:Bench", progress=events.append, **options)
    return entry, {(e["config"]["us"], e["config"]["fault"]): e for e in events if e["event"] == "trial" and e["config"]}


CAUSES = {"hang": "hang: no answer within", "crash": "crash: SIGSEGV", "nan": "wrong answer", "outside": "out of bounds", "exit": "exit: status 3", "leak": "leak: ", "raise": "RuntimeError: out of shared memory",
          "wrong": "wrong answer"}


def test_every_fault_is_recorded_with_its_cause_and_the_best_of_the_rest_wins(monkeypatch):
    entry, trials = tuned(monkeypatch, ("none", *CAUSES), trials=36)
    assert len(trials) == 2 + len(CAUSES)
    for (us, fault), trial in trials.items():
        assert (trial["time_us"] is None) == (fault != "none") and (trial["failure"] or "").startswith(CAUSES.get(fault, "")), trial
    assert entry["config"] == {"us": 1000, "fault": "none"} and entry["search"]["failed"] == len(CAUSES) and entry["default_us"] > entry["time_us"]
    log = (lookup.user_cache() / "tune.log").read_text()
    assert "crash 1" in log and "hang 1" in log and "a call gets numba {'fault': 'none', 'us': 1000} from user cache profile" in log


def test_a_config_that_dies_once_is_tried_again_on_a_fresh_process(monkeypatch):
    entry, trials = tuned(monkeypatch, ("none", "once"), trials=8)
    assert all(trial["failure"] is None for trial in trials.values())


def test_a_bucket_ends_in_time_whatever_hangs(monkeypatch):
    monkeypatch.setattr(hunt, "GRACE", 0.5), monkeypatch.setattr(hunt, "COMPILING", 30.0)
    start = time.monotonic()
    entry, trials = tuned(monkeypatch, ("none", "hang"), seconds=3.0, seed=1)
    assert time.monotonic() - start < 3 + 0.5 + 8  # two starts of a process, and the finals
    assert entry["search"]["stop"] == "seconds" and not any(trial["failure"] for trial in trials.values())  # the budget's end is no failure of a config


def test_the_worker_is_replaced_and_dies_with_its_parent(tmp_path):
    worker = isolate.Worker("os:getpid_of_nothing")
    with pytest.raises(isolate.Lost, match="AttributeError"):
        worker("anything", seconds=20)
    worker = isolate.Worker("faulty:Bench", None)
    worker.open(TOPK, 0)
    assert worker("facts", seconds=60)["refused"]["numba"] is None
    assert worker("facts", tasks.find("cpu/topk-32"), seconds=60)["problem"]["S"] == 4096 and worker("facts", seconds=60)["problem"]["S"] == TOPK["S"]  # of another it needs no inputs
    first = worker.process.pid
    os.kill(first, signal.SIGKILL)
    with pytest.raises(isolate.Lost, match="SIGKILL"):
        worker("facts", seconds=60)
    assert worker("facts", seconds=60)["problem"].op == "topk" and worker.process.pid != first
    worker.kill()


def test_the_finals_keep_the_default_among_the_best():
    tried = [decide.Tried("numba", {"n": n}, 10.0 + n) for n in range(9)] + [decide.Tried("numba", {"n": 10}, None, "hang")]
    assert [t.config["n"] for t in decide.finalists("numba", tried, [{"n": 8}, {"n": 10}])] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 10]
    assert [t.config["n"] for t in decide.finalists("numba", tried, [{"n": 0}])] == [0, 1, 2, 3, 4, 5, 6, 7]
    slow = [decide.Tried("numba", {"n": n}, 3e5 + n) for n in range(9)]  # of slow calls fewer
    assert [t.config["n"] for t in decide.finalists("numba", slow, [{"n": 8}])] == [0, 1, 8]


H200 = dict(name="NVIDIA H200", arch="sm_90a", sms=132, vendor="nvidia", mem_gb=141, l2_mb=50, smem_optin=232448)


@pytest.mark.aot
@pytest.mark.parametrize("name", ["gpu/decode-window/32768", "gpu/float8-decode-b64/32768", "gpu/merge-1024"])
def test_triton_is_compiled_ahead_by_the_call_itself(name):
    """In a process of its own, which can run nothing afterwards; None: nothing is left to the bench worker."""
    pytest.importorskip("triton")
    worker = isolate.Worker("sparsetile.autotune.ahead:Compiler", env={"CUDA_VISIBLE_DEVICES": ""})
    try:
        worker.open(H200)
        assert worker("compile", tasks.find(name), "triton", None, seconds=120.0) is None
    finally:
        worker.kill()


def test_compiling_ahead_tells_a_refusal_from_what_it_cannot_do(monkeypatch):
    monkeypatch.setattr(ahead.devices, "device_info", ahead.devices.device_info)  # put back afterwards
    compiler = ahead.Compiler()
    compiler.open(H200)
    workload = tasks.find("gpu/merge-1024")
    from sparsetile.backends.cupy import compile
    assert compiler.compile(workload, "cupy", {}) is None
    assert list((compile.cache_folder()).glob("merge_attention-*.bin")), "the worker finds it on disk"
    assert compiler.compile(workload, "cupy", None) is None  # the default, asked for before anyone knows it

    def refuse(*args):
        raise compile.CompileError("no such instruction")
    monkeypatch.setattr(compile, "cubin", refuse)
    with pytest.raises(compile.CompileError):
        compiler.compile(workload, "cupy", {})

    def miss(*args):
        raise OSError("no such file")
    monkeypatch.setattr(compile, "cubin", miss)
    assert compiler.compile(workload, "cupy", {}).startswith("OSError")
