"""The tuner's loop: legality before compiling, correctness before timing, the default always measured, resume after a kill, the next call uses the winner."""
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import sparsetile as st
from sparsetile.autotune import decide, hunt, search, space, tasks, timing, tune, verify
from sparsetile.backends.contract import TUNED, Resources
from sparsetile.ops import dispatch
from sparsetile.profiles import lookup, schema

ROOT = Path(__file__).resolve().parent.parent
W = tasks.Workload.of
SMALL = W("test/window", "block_attention", "float32", dict(pattern=st.Window(16, 16)), B=1, Hq=2, Hk=2, T=128, S=128, D=16, Dv=16)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSETILE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("SPARSETILE_PROFILE_DIR", raising=False)
    monkeypatch.setattr(hunt, "FINALS", 0.2)
    lookup.forget(), dispatch.clear_plans()
    yield
    lookup.forget(), dispatch.clear_plans()


class FakeKernel:
    """A kernel whose time is a known function of its config."""
    __name__ = "sparsetile.backends.numba.block_attention"
    TUNABLES = dispatch.kernel("numba", "block_attention").TUNABLES


def test_legal_configs_start_with_the_default_and_fit():
    problem = tasks.Task(SMALL, None).problem
    for backend in ("numba", "triton", "cupy"):
        if not dispatch.has_kernel(backend, "block_attention"):
            continue
        try:
            module = dispatch.kernel(backend, "block_attention")
        except ImportError as missing:
            pytest.skip(f"{backend}: {missing}")
        pool, total = space.legal(module, problem)
        assert pool[0] == module.default_config(problem) and 1 <= len(pool) <= total
        assert len({tuple(sorted(c.items())) for c in pool}) == len(pool)
        assert all(isinstance(module.resources(problem, c), Resources) for c in pool)


@pytest.mark.parametrize("backend, kernel, sizes, options, paths", [
    ("cupy", "latent_decompress", dict(B=1, S=4096, H=128, R=512, Dn=128, Dv=128, P=64), {}, {"hopper": ("cluster", "windows"), "portable": ("block_m", "block_n", "depth", "stages")}),
    ("triton", "latent_decompress", dict(B=1, S=4096, H=128, R=512, Dn=128, Dv=128, P=64), {}, {"gluon": ("windows",), "portable": ("block_t", "block_m", "block_n", "warps", "stages", "group")}),
    ("triton", "topk", dict(B=1, T=512, S=32768, K=512), {}, {"gluon": ("capacity", "sample", "select_warps", "programs"), "portable": ("capacity", "sample", "select_warps", "splits")}),
    ("cupy", "gather_attention", dict(B=1, Hq=64, Hk=1, T=64, S=4096, D=576, Dv=512, K=512), dict(shared_kv=True), {"tokens": (), "hopper": ("split",), "portable": ("heads", "tile_k", "key_warps", "stages")}),
    ("triton", "gather_attention", dict(B=1, Hq=16, Hk=1, T=64, S=4096, D=576, Dv=512, K=512), dict(shared_kv=True), {"tokens": (), "gluon": (), "portable": ("heads", "block_k", "num_warps", "num_stages", "value_block")}),
    ("triton", "gather_attention_backward", dict(B=1, Hq=64, Hk=1, T=64, S=4096, D=576, Dv=512, K=512), dict(shared_kv=True), {"gluon": (), "portable": ("heads", "block_k", "num_warps", "num_stages")}),
    ("triton", "gather_attention", dict(B=1, Hq=16, Hk=4, T=64, S=4096, D=128, Dv=128, K=16), dict(granularity=64, causal=True, G=4), {"blocks": (), "portable": ("heads", "block_k", "num_warps", "num_stages", "value_block")}),
])
def test_of_configs_that_make_the_same_call_one_is_legal(backend, kernel, sizes, options, paths):
    """Which knobs each path has, by hand, and that as many value columns as there are are all: the pool holds no two configs that differ in others only, and every config that resources allow has one there that makes
    its call."""
    module = dispatch.kernel(backend, kernel)
    problem = dataclasses.replace(tasks.Task(W("test/x", kernel, "bfloat16", options, **sizes), None, hollow=True).problem, arch="sm_90a")
    pool, default = space.legal(module, problem)[0], module.default_config(problem)
    words = lambda c: (c["path"], *(0 if knob == "value_block" and c[knob] >= sizes["Dv"] else c[knob] for knob in paths[c["path"]]))  # noqa: E731
    calls = [words(c) for c in pool]
    every = [dict(zip((t.name for t in module.TUNABLES), values)) for values in itertools.product(*(t.values for t in module.TUNABLES))]
    asked = {words(c) for c in every if c["path"] in paths and isinstance(module.resources(problem, c), Resources)}
    assert len(set(calls)) == len(calls) and set(calls) == asked and pool[0] == default and {path for path, *_ in calls} == set(paths)
    some = [c for c in every[::7] if c["path"] in paths and words(c) in asked]
    found = space.members(module, problem, pool, [*some, {"path": "none"}])
    assert list(map(words, found)) == list(map(words, some)) and all(c in pool for c in found)


def test_a_space_is_as_large_as_its_calls(monkeypatch):
    """Not as the product of its knobs: of CuPy's block attention backward, 466 560 of which 264 are different and legal, a sample of the product had missed 36."""
    module = dispatch.kernel("cupy", "latent_decompress")
    problem = dataclasses.replace(tasks.Task(tasks.find("gpu/latent-4096"), None, hollow=True).problem, arch="sm_90a")
    whole, total = space.legal(module, problem)
    monkeypatch.setattr(space, "MOST", total - 1)
    assert space.legal(module, problem) == (whole, total)
    monkeypatch.setattr(space, "MOST", len(whole) // 2)
    assert len(space.legal(module, problem)[0]) < len(whole)


@pytest.mark.parametrize("sampler", search.SAMPLERS)
def test_search_repeats_nothing_and_can_exhaust(sampler):
    pool = [dict(zip((t.name for t in FakeKernel.TUNABLES), values)) for values in itertools.product(*(t.values for t in FakeKernel.TUNABLES))]
    study = search.Study(FakeKernel, pool, "x", None, sampler, 0)
    seen = []
    while (config := study.ask()) is not None:
        seen.append(tuple(config.items()))
        study.tell(config, float(config["block_q"]))
    assert len(seen) == len(set(seen)) == len(pool) and seen[0] == tuple(pool[0].items())


def test_tune_writes_what_the_next_call_uses(tmp_path):
    entry = tune.tune("block_attention", SMALL, backend="numba", trials=3, profiles=None)
    assert entry["time_us"] <= entry["default_us"] and entry["search"]["evaluated"] >= 1 and entry["status"] == "tuned"
    path = lookup.user_cache() / lookup.slug(_name()) / "block_attention.yaml"
    assert schema.load(path)["entries"][0]["config"] == entry["config"]
    q, k, v, rule = tasks.Task(SMALL, None).inputs
    found = st.explain(st.sparse_attention, q, k, v, rule)
    assert found.config == entry["config"] and "user cache" in found.source


def test_the_next_process_finds_the_profile_of_this_cpu():
    entry = tune.tune("block_attention", "cpu/window-256/4096", backend="numba", trials=2)
    command = [sys.executable, "-m", "sparsetile", "explain", "cpu/window-256/4096", "--json"]
    got = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100)
    found = json.loads(got.stdout)
    assert found["backend"] == "numba" and found["config"] == entry["config"] and "user cache" in found["source"]


def _name():
    from sparsetile.backends import devices
    return devices.device_info(None).name


def test_wrong_answers_are_never_timed(monkeypatch):
    module = dispatch.kernel("numba", "topk")
    right = module.run
    default = module.default_config(tasks.Task(W("test/topk", "topk", B=1, T=8, S=64, K=5), None).problem)

    def broken(scores, top_k, *, place, config, **rest):
        indices, lengths = right(scores, top_k, place=place, config=config, **rest)
        if config != default:
            indices[..., 0] += 1
        return indices, lengths
    monkeypatch.setattr(module, "run", broken)
    events = []
    entry = tune.tune("topk", W("test/topk", "topk", B=1, T=8, S=64, K=5), backend="numba", trials=4, progress=events.append, isolated=False)
    trials = [e for e in events if e["event"] == "trial"]
    assert all(e["failure"].startswith("wrong answer") and e["time_us"] is None for e in trials if e["config"] != default)
    assert entry["config"] == default and entry["search"]["failed"] == sum(e["config"] != default for e in trials)


def test_a_config_that_raises_is_a_failure_with_its_cause(monkeypatch):
    module = dispatch.kernel("numba", "block_attention")
    right, default = module.run, module.default_config(tasks.Task(SMALL, None).problem)

    def broken(*args, config, **rest):
        if config != default:
            raise RuntimeError("out of shared memory")
        return right(*args, config=config, **rest)
    monkeypatch.setattr(module, "run", broken)
    events = []
    entry = tune.tune("block_attention", SMALL, backend="numba", trials=3, progress=events.append, isolated=False)
    assert entry["config"] == default
    assert any(e.get("failure") == "RuntimeError: out of shared memory" for e in events)


@pytest.mark.parametrize("kernel", TUNED)
def test_the_verifier_accepts_the_reference_and_notices_a_change(kernel, monkeypatch):
    w = next(w for w in (*tasks.for_device(None), *tasks.for_device(0)) if w.kernel == kernel)
    verifier = verify.Verifier(w, None)
    assert verifier.wrong("reference", None) is None
    module, right = dispatch.kernel("reference", kernel), dispatch.kernel("reference", kernel).run

    def broken(*args, **kwargs):
        got = right(*args, **kwargs)
        first = np.array(got[0] if isinstance(got, tuple) else got)
        first[(0,) * (first.ndim - 1)] = np.roll(first[(0,) * (first.ndim - 1)], 1)  # one row turned by one
        return (first, *got[1:]) if isinstance(got, tuple) else first
    monkeypatch.setattr(module, "run", broken)
    assert verifier.wrong("reference", None) is not None


def test_the_verifier_compiles_nothing_for_its_twin(monkeypatch):
    """The answer whose gradient is checked is the reference's: another's would be compiled first."""
    kernel = dispatch.kernel
    monkeypatch.setattr(dispatch, "kernel", lambda backend, name: kernel(backend, name) if backend == "reference" else pytest.fail(f"{backend} was called"))
    dispatch.clear_plans()
    for name in ("gpu/strided-128/32768/backward", "gpu/blocks-64-backward"):
        verify.Verifier(tasks.find(name), None)
    dispatch.clear_plans()


def test_ties_go_to_the_smaller_config_and_small_gains_keep_the_default():
    module = dispatch.kernel("numba", "block_attention")
    problem = tasks.Task(SMALL, None).problem
    pool, _ = space.legal(module, problem)

    def tried(config, us):
        return decide.Tried("numba", config, us, samples=[us] * 9)
    default, other = pool[0], pool[1]
    assert decide.decide([tried(default, 100.0), tried(other, 99.0)], default, module, problem)["config"] == default
    entry = decide.decide([tried(default, 100.0), tried(other, 80.0)], default, module, problem)
    assert entry["config"] == other and entry["default_us"] == 100.0


def test_a_killed_run_goes_on(tmp_path):
    journal, profiles = tmp_path / "tune.journal", tmp_path / "profiles"
    command = [sys.executable, "-m", "sparsetile", "tune", "cpu/topk-32", "cpu/window-256/4096", "--backend", "numba", "--seconds", "60", "--storage", str(journal), "--profiles",
               str(profiles), "--json"]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    known = 0
    for line in run.stdout:
        event = json.loads(line)
        if event["event"] == "trial" and event["workload"] == "cpu/window-256/4096":
            known += 1
            if known == 2:
                break
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    run.stdout.close()
    again = subprocess.run(command[:-1] + ["--json", "--trials", "4"], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr
    events = [json.loads(line) for line in again.stdout.splitlines()]
    start = next(e for e in events if e["event"] == "start" and e["workload"] == "cpu/window-256/4096")
    assert known - 1 <= start["resumed"] <= known  # at most the trial in flight is lost
    assert {p.name for p in profiles.glob("*/*.yaml")} == {"topk.yaml", "block_attention.yaml"}
    for path in profiles.glob("*/*.yaml"):
        schema.load(path)


def test_tune_at_a_miss_when_asked(monkeypatch, rng):
    from sparsetile.autotune import hook
    monkeypatch.setenv("SPARSETILE_TUNE", "on"), monkeypatch.setenv("SPARSETILE_TUNE_SECONDS", "0.5")
    monkeypatch.setattr(dispatch, "tune_hook", hook.on_miss)
    x = rng.standard_normal((1, 2, 96, 16)).astype(np.float32)
    st.sparse_attention(x, x, x, st.Causal(), backend="numba")
    assert "user cache" in st.explain(st.sparse_attention, x, x, x, st.Causal(), backend="numba").source


def test_asked_too_late_is_said(monkeypatch, rng, caplog):
    monkeypatch.setenv("SPARSETILE_TUNE", "on")
    monkeypatch.setattr(dispatch, "tune_hook", None)
    monkeypatch.setattr(dispatch, "_said", set())
    x = rng.standard_normal((1, 2, 9, 16)).astype(np.float32)
    for _ in range(2):
        st.sparse_attention(x, x, x), st.topk(x[0], 3)
    assert len([r for r in caplog.records if "SPARSETILE_TUNE=on: expected before" in r.getMessage()]) == 1


@pytest.mark.parametrize("library", ["torch", "cupy"])
def test_nothing_is_tuned_while_a_graph_is_captured(monkeypatch, library):
    """By either library's own word; a CPU captures nothing."""
    from types import SimpleNamespace as Space

    from sparsetile.autotune import hook
    capturing = dict(torch=library == "torch", cupy=library == "cupy")
    monkeypatch.setitem(sys.modules, "torch", Space(cuda=Space(is_current_stream_capturing=lambda: capturing["torch"])))
    monkeypatch.setitem(sys.modules, "cupy", Space(cuda=Space(get_current_stream=lambda: Space(is_capturing=lambda: capturing["cupy"]))))
    tuned = []
    monkeypatch.setattr(tune, "tune", lambda *a, **o: tuned.append(a))
    problem = tasks.Task(tasks.find("cpu/topk-32"), None).problem
    hook.on_miss(problem, 0, "numba")
    assert not tuned
    hook.on_miss(problem, None, "numba")
    capturing[library] = False
    hook.on_miss(problem, 0, "numba")
    assert len(tuned) == 2


def test_bad_arguments_of_tune():
    with pytest.raises(ValueError, match="workload: expected the name of a workload"):
        tune.tune("topk", "cpu/nothing")
    with pytest.raises(ValueError, match="op: expected 'topk'"):
        tune.tune("block_attention", "cpu/topk-32")
    with pytest.raises(ValueError, match="op: expected 'block_attention'.*'sparse_attention', got 'latent_attention'"):
        tune.tune("latent_attention", "cpu/causal/4096")
    with pytest.raises(TypeError, match="workload"):
        tune.tune("topk", 3)
    with pytest.raises(ValueError, match="profiles: expected a directory that can be written, got '/dev/null/x'"):
        tune.tune("topk", W("test/topk", "topk", B=1, T=8, S=64, K=5), backend="numba", trials=1, progress=pytest.fail, isolated=False, profiles="/dev/null/x")


def test_stopwatch_measures():
    watch = timing.Stopwatch(None)
    samples = watch.samples(lambda: time.sleep(0.002), 3)
    assert all(1900 < s < 50_000 for s in samples) and watch.centre(samples) == min(samples)
