"""Choosing a backend and a config: argument, environment, profiles; a named backend never falls back; explain says why."""
import dataclasses
import json

import numpy as np
import pytest
from drivers import EVERY

import sparsetile as st
from sparsetile.autotune import store
from sparsetile.backends import devices
from sparsetile.backends.contract import KERNELS, Problem, Resources, Unsupported
from sparsetile.ops import dispatch
from sparsetile.ops.latent_mode import latent_cost
from sparsetile.profiles import lookup, misses, schema

DEVICE = {"name": devices.device_info(None).name, "arch": "cpu"}


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in ("SPARSETILE_BACKEND", "SPARSETILE_BACKEND_SPARSE_ATTENTION", "SPARSETILE_TUNE", "SPARSETILE_PROFILE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SPARSETILE_CACHE_DIR", str(tmp_path / "cache"))
    lookup.forget(), dispatch.clear_plans()
    yield
    lookup.forget(), dispatch.clear_plans()


@pytest.fixture
def qkv(rng):
    return tuple(rng.standard_normal((1, 2, 40, 16)).astype(np.float32) for _ in range(3))


def entry(explanation, config, **more):
    return {"key": lookup.key_of(explanation.problem), "backend": "numba", "config": config, "time_us": 10.0, **more}


def write(root, explanation, config, **more):
    path = store.add(root, explanation.kernel, DEVICE, entry(explanation, config, **more), {}, {})
    dispatch.clear_plans()
    return path


def test_auto_takes_the_first_that_supports_it(qkv):
    found = st.explain(st.sparse_attention, *qkv)
    assert found.backend == "numba" and found.source == "the kernel's heuristic"
    assert set(found.reasons) == {"triton", "cupy", "reference"} and all(found.reasons.values())


def test_auto_takes_the_profiles_winner(qkv, monkeypatch, tmp_path):
    """Of two backends that run here it is the one that was faster, not the one that is preferred; a winner that refuses leaves the order."""
    pytest.importorskip("triton")
    plain, runs = st.explain(st.sparse_attention, *qkv), ["triton", "numba"]
    monkeypatch.setattr(dispatch, "refusal", lambda backend, problem, device: None if backend in runs else f"{backend} is not here")
    assert st.explain(st.sparse_attention, *qkv).backend == "triton"
    write(tmp_path, plain, {"block_q": 32})
    monkeypatch.setenv("SPARSETILE_PROFILE_DIR", str(tmp_path))
    found = st.explain(st.sparse_attention, *qkv)
    assert found.backend == "numba" and found.config["block_q"] == 32 and found.reasons["triton"].startswith("numba comes first: user profile")
    assert st.explain(st.sparse_attention, *qkv, backend="triton").backend == "triton"
    runs.remove("numba")
    assert st.explain(st.sparse_attention, *qkv).backend == "triton"


def test_precedence_of_backend(qkv, monkeypatch):
    monkeypatch.setenv("SPARSETILE_BACKEND", "reference")
    assert st.explain("sparse_attention", *qkv).backend == "reference"
    monkeypatch.setenv("SPARSETILE_BACKEND_SPARSE_ATTENTION", "numba")
    assert st.explain("sparse_attention", *qkv).backend == "numba"
    assert st.explain("topk", qkv[0][0], 3).backend == "reference"
    assert st.explain("sparse_attention", *qkv, backend="reference").backend == "reference"


def test_environment_is_read_at_each_call(qkv, monkeypatch):
    first = st.sparse_attention(*qkv)
    monkeypatch.setenv("SPARSETILE_BACKEND", "cupy")
    with pytest.raises(st.Unsupported, match="cupy"):
        st.sparse_attention(*qkv)
    monkeypatch.delenv("SPARSETILE_BACKEND")
    assert (st.sparse_attention(*qkv) == first).all()


@pytest.mark.parametrize("name", ["triton", "cupy"])
def test_a_named_backend_never_falls_back(qkv, name):
    if name == "triton" and dispatch.package("triton").interpreted():
        pytest.skip("the interpreter runs Triton on CPU arrays")
    with pytest.raises(st.Unsupported, match=rf"{name}.*numba"):
        st.sparse_attention(*qkv, backend=name)


def test_unknown_backend_is_an_error(qkv, monkeypatch):
    with pytest.raises(ValueError, match="backend: expected one of 'auto', 'triton'"):
        st.sparse_attention(*qkv, backend="cuda")
    monkeypatch.setenv("SPARSETILE_BACKEND", "cuda")
    with pytest.raises(ValueError, match="SPARSETILE_BACKEND: expected one of"):
        st.sparse_attention(*qkv)


@pytest.mark.parametrize("name, call", [
    ("SPARSE_ATTENTION", lambda x: st.sparse_attention(x, x, x)), ("MERGE_ATTENTION", lambda x: st.merge_attention([x], [x[..., 0]])), ("TOPK", lambda x: st.topk(x[0], 3)),
    ("INDEXER_SCORES", lambda x: st.indexer_scores(x, x[:, 0], x[..., 0])), ("INDEXER_TOPK", lambda x: st.indexer_topk(x, x[:, 0], x[..., 0], 3)),
    ("IMPORTANCE_TOPK", lambda x: st.importance_topk(x, x, x[..., 0], 3)), ("LATENT_DECOMPRESS", lambda x: st.latent_decompress(x[0], x.swapaxes(2, 3)[0], x.swapaxes(2, 3)[0])),
    ("LATENT_ATTENTION", lambda x: st.latent_attention(x, None, x[:, 0], None, *[np.zeros((2, 16, 16), np.float32)] * 2))], ids=lambda x: x if isinstance(x, str) else "")
def test_every_op_has_a_variable_of_its_own(qkv, monkeypatch, name, call):
    variable = f"SPARSETILE_BACKEND_{name}"
    assert st.explain(call, qkv[0]).backend == "numba"
    assert name.lower() in map(dispatch.op_of, KERNELS)  # what the doctor knows
    monkeypatch.setenv(variable, "reference")
    assert st.explain(call, qkv[0]).backend == "reference"
    for value in ("cuda", "NUMBA", " numba"):
        monkeypatch.setenv(variable, value)
        for _ in range(2):
            with pytest.raises(ValueError, match=f"^{variable}: expected one of auto, triton.*got '{value}'; choose"):
                call(qkv[0])
    monkeypatch.setenv(variable, "")
    monkeypatch.setenv("SPARSETILE_TUNE", "yes")
    with pytest.raises(ValueError, match="^SPARSETILE_TUNE: expected off, cache or on, got 'yes'; choose"):
        call(qkv[0])


def test_a_profile_directory_that_is_not_there_is_said_once(qkv, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("SPARSETILE_PROFILE_DIR", str(tmp_path / "none"))
    for _ in range(2):
        assert st.explain(st.sparse_attention, *qkv).source == st.explain(st.topk, qkv[0][0], 3).source == "the kernel's heuristic"
    assert len([r for r in caplog.records if "SPARSETILE_PROFILE_DIR: expected a directory" in r.getMessage()]) == 1


def test_unknown_knob_and_value(qkv):
    with pytest.raises(ValueError, match="config: expected knobs.*'tile'"):
        st.sparse_attention(*qkv, config={"tile": 3})
    with pytest.raises(ValueError, match="config: expected block_q in"):
        st.sparse_attention(*qkv, config={"block_q": 3})


def test_order_of_profiles(qkv, monkeypatch, tmp_path):
    plain = st.explain(st.sparse_attention, *qkv)
    knob = next(t for t in dispatch.kernel("numba", "block_attention").TUNABLES if t.name == "block_q")
    a, b, c = [v for v in knob.values][:3]
    write(lookup.user_cache(), plain, {"block_q": a})
    found = st.explain(st.sparse_attention, *qkv)
    assert found.config["block_q"] == a and "user cache" in found.source
    write(tmp_path / "mine", plain, {"block_q": b})
    monkeypatch.setenv("SPARSETILE_PROFILE_DIR", str(tmp_path / "mine"))
    found = st.explain(st.sparse_attention, *qkv)
    assert found.config["block_q"] == b and "user profile" in found.source
    assert st.explain(st.sparse_attention, *qkv, config={"block_q": c}).source == "the config argument"
    monkeypatch.setenv("SPARSETILE_TUNE", "off")
    assert st.explain(st.sparse_attention, *qkv).source == "the kernel's heuristic"


def test_pinned_wins_over_the_user_directory(qkv, monkeypatch, tmp_path):
    plain = st.explain(st.sparse_attention, *qkv)
    a, b = dispatch.kernel("numba", "block_attention").TUNABLES[0].values[:2]
    knob = dispatch.kernel("numba", "block_attention").TUNABLES[0].name
    write(lookup.user_cache(), plain, {knob: a}, status="pinned")
    write(tmp_path / "mine", plain, {knob: b})
    monkeypatch.setenv("SPARSETILE_PROFILE_DIR", str(tmp_path / "mine"))
    assert st.explain(st.sparse_attention, *qkv).config[knob] == a


def test_pinned_entries_are_never_overwritten(qkv, tmp_path):
    plain = st.explain(st.sparse_attention, *qkv)
    knob = dispatch.kernel("numba", "block_attention").TUNABLES[0]
    write(tmp_path, plain, {knob.name: knob.values[0]}, status="pinned")
    path = write(tmp_path, plain, {knob.name: knob.values[1]})
    from sparsetile.profiles import schema
    assert [e["config"] for e in schema.load(path)["entries"]] == [{knob.name: knob.values[0]}]


def test_a_bucket_away_serves_and_two_do_not(qkv, tmp_path, monkeypatch, rng):
    plain = st.explain(st.sparse_attention, *qkv)  # T = S = 40 fall into 64
    write(tmp_path, plain, {"block_q": 32})
    monkeypatch.setenv("SPARSETILE_PROFILE_DIR", str(tmp_path))
    sizes = {60: True, 100: False, 300: False}  # 100 is a bucket away along T and along S at once
    for n, serves in sizes.items():
        x = rng.standard_normal((1, 2, n, 16)).astype(np.float32)
        assert ("user profile" in st.explain(st.sparse_attention, x, x, x).source) == serves, n
    x = rng.standard_normal((1, 2, 100, 16)).astype(np.float32)
    assert "user profile" in st.explain(st.sparse_attention, qkv[0], x, x).source  # along S alone


def test_a_density_a_bucket_away_serves_and_two_do_not(qkv, tmp_path):
    plain = st.explain(st.sparse_attention, *qkv, st.Window(3))
    write(tmp_path, plain, {"block_q": 32})
    p = plain.problem
    found = lambda density, dims=p.dims: lookup.find(Problem(p.op, dims, p.dtypes, p.arch, p.features, density, p.granularity), DEVICE["name"], "numba", user=str(tmp_path))
    assert [found(p.density * times) is not None for times in (1 / 4, 1 / 2, 1, 2, 4)] == [False, True, True, True, False]
    longer = tuple((axis, size * 2 if axis == "S" else size) for axis, size in p.dims)
    assert found(p.density, longer) is not None and found(p.density * 2, longer) is None  # one axis at a time


def test_a_shipped_profile_of_the_same_architecture_is_said_once(qkv, tmp_path, monkeypatch, caplog):
    """It comes after everything of this very device, and the log says that it is another's. (This CPU says it is of a GPU's architecture: a CPU inherits from none.)"""
    mine = devices.device_info(None)
    monkeypatch.setattr(devices, "device_info", lambda index: devices.DeviceInfo(mine.name, "sm_90a", mine.sms, 0, 0, 0, "cpu"))
    monkeypatch.setitem(DEVICE, "arch", "sm_90a")
    plain = st.explain(st.sparse_attention, *qkv)
    monkeypatch.setattr(lookup, "SHIPPED", tmp_path / "shipped")
    store.add(lookup.SHIPPED, plain.kernel, {"name": "Sibling", "arch": "sm_90a"}, entry(plain, {"block_q": 32}), {}, {})
    for _ in range(3):
        lookup.forget(), dispatch.clear_plans()
        found = st.explain(st.sparse_attention, *qkv)
        assert found.config["block_q"] == 32 and "shipped profile of Sibling (same architecture)" in found.source
    said = [r.getMessage() for r in caplog.records if "Sibling" in r.getMessage()]
    assert len(said) == 1 and f"is used for {DEVICE['name']}; run `sparsetile tune`" in said[0]
    write(lookup.SHIPPED, plain, {"block_q": 128})
    found = st.explain(st.sparse_attention, *qkv)
    assert found.config["block_q"] == 128 and found.source.startswith("shipped profile " + lookup.slug(DEVICE["name"]))


def test_never_across_architectures(qkv, tmp_path, monkeypatch):
    plain = st.explain(st.sparse_attention, *qkv)
    path = write(tmp_path, plain, {"block_q": 32})
    path.write_text(path.read_text().replace("arch: cpu", "arch: sm_90a"))
    monkeypatch.setenv("SPARSETILE_PROFILE_DIR", str(tmp_path))
    lookup.forget(), dispatch.clear_plans()
    assert st.explain(st.sparse_attention, *qkv).source == "the kernel's heuristic"


@pytest.mark.parametrize("arch, inherits", [("sm_90a", True), ("cpu", False)])
def test_a_gpu_inherits_from_another_of_its_architecture_and_a_cpu_from_none(arch, inherits, qkv, tmp_path, monkeypatch):
    problem = dataclasses.replace(st.explain(st.sparse_attention, *qkv).problem, arch=arch)
    path = tmp_path / "other" / "block_attention.yaml"
    entry = {"key": lookup.key_of(problem), "backend": "numba", "config": {"block_q": 32}}
    store.write(path, store.dump({"schema": schema.VERSION, "op": "block_attention", "device": {"name": "Other", "arch": arch}, "dims": dict(lookup.DIMS), "entries": [entry]}))
    monkeypatch.setattr(lookup, "SHIPPED", tmp_path)
    lookup.forget()
    found = lookup.find(problem, "Mine")
    assert (found is not None and found.inherited) == inherits and lookup.find(problem, "Other").source.startswith("shipped profile ")
    lookup.forget()


def test_a_bad_file_is_one_error_and_the_call_runs(qkv, tmp_path, monkeypatch, caplog):
    plain = st.explain(st.sparse_attention, *qkv)
    path = write(tmp_path, plain, {"block_q": 32})
    path.write_text("schema: [unclosed")
    monkeypatch.setenv("SPARSETILE_PROFILE_DIR", str(tmp_path))
    lookup.forget(), dispatch.clear_plans()
    for _ in range(3):
        assert st.sparse_attention(*qkv).shape == (1, 2, 40, 16)
        dispatch.clear_plans()
    errors = [r for r in caplog.records if "block_attention.yaml" in r.getMessage()]
    assert len(errors) == 1


def test_an_infeasible_entry_is_said_and_ignored(qkv, tmp_path, monkeypatch, caplog):
    plain = st.explain(st.sparse_attention, *qkv)
    write(tmp_path, plain, {"no_such_knob": 32})
    monkeypatch.setenv("SPARSETILE_PROFILE_DIR", str(tmp_path))
    lookup.forget(), dispatch.clear_plans()
    assert st.explain(st.sparse_attention, *qkv).source == "the kernel's heuristic"
    assert any("no_such_knob" in r.getMessage() for r in caplog.records)


def test_explain_computes_nothing_and_names_unknown_ops(qkv):
    with pytest.raises(ValueError, match="op: expected a public function"):
        st.explain("attend", *qkv)
    found = st.explain("latent_attention", *(np.zeros(s, np.float32) for s in ((1, 2, 3, 8), (1, 2, 3, 4), (1, 5, 16), (1, 5, 4), (2, 16, 8), (2, 16, 8))), mode="absorbed")
    assert found.kernel == "block_attention" and dict(found.problem.dims)["D"] == 20
    json.dumps({"config": found.config, "reasons": found.reasons})


@pytest.mark.parametrize("backend", EVERY)
def test_explain_tells_who_prepares_the_call(on, backend, rng, monkeypatch):
    """A selection over a paged cache becomes rows of its pool before attention reads them, which is only looked for while a call is explained."""
    cache = st.PagedKV.empty(on.put(np.zeros(1, np.float32)), sequences=2, pages=8, page_size=4, heads=1, width=16)
    cache.append(on.put(rng.standard_normal((2, 1, 9, 16)).astype(np.float32)), on.put(rng.standard_normal((2, 1, 9, 16)).astype(np.float32)), backend=backend)
    q, entries = on.put(np.zeros((2, 1, 1, 16), np.float32)), st.Selection(on.put(np.array([[[[0, 3]]], [[[8, 1]]]], np.int32)), 2)
    for kernel in ("page_rows", "gather_attention"):
        monkeypatch.setattr(dispatch.kernel(backend, kernel), "run", None)
    found = st.explain(st.sparse_attention, q, cache, pattern=entries, backend=backend)
    assert found.kernel == "gather_attention" and found.problem["K"] == 4 and found.before == {"page_rows": backend}
    assert f"before it: {backend} runs page_rows" in str(found)
    assert st.explain(st.sparse_attention, q, q, q, backend=backend).before == {}


def test_work_that_can_be_done_without_a_kernel_finds_one_or_none(monkeypatch):
    """By itself the reference is never found: whatever the op does instead is faster; a name or a variable asks for it. A choice is remembered, as every other is."""
    products = Problem.of("grouped_matmul", dict(B=1, H=2, T=3, N=4, M=5, P=0), dict(x="float32", w="float32"), "cpu", ["inner_heads"])
    rows = Problem.of("page_rows", dict(B=1, Hk=1, T=1, K=4), dict(indices="int32"), "cpu")
    assert dispatch.before("page_rows", rows, None).backend == "numba"
    with pytest.raises(st.Unsupported, match="page_rows: cupy: cupy computes on CUDA devices"):
        dispatch.before("page_rows", rows, None, "cupy")
    assert dispatch.find("latent_attention", products, None) is None and dispatch.find("latent_attention", products, None, "numba") is None
    found = dispatch.find("latent_attention", products, None, "reference")
    assert found.backend == "reference" and found is dispatch.find("latent_attention", products, None, "reference")
    monkeypatch.setenv("SPARSETILE_BACKEND_LATENT_ATTENTION", "reference")
    assert dispatch.find("latent_attention", products, None).backend == "reference"
    monkeypatch.setenv("SPARSETILE_BACKEND_PAGE_ROWS", "cuda")
    with pytest.raises(ValueError, match="^SPARSETILE_BACKEND_PAGE_ROWS: expected one of auto"):
        dispatch.before("page_rows", rows, None)


def test_kernels_that_are_not_tuned_are_not_missed(monkeypatch):
    """Neither counted nor tuned, though some have knobs; a tuned one is both."""
    pytest.importorskip("triton")
    asked = []
    monkeypatch.setattr(dispatch, "refusal", lambda backend, problem, device: None)
    monkeypatch.setattr(dispatch, "tune_hook", lambda problem, *rest: asked.append(problem.op))
    monkeypatch.setenv("SPARSETILE_TUNE", "on")
    counted = dict(misses.counts)
    sizes = dict(B=1, Hq=2, Hk=2, T=7, S=7, D=16, Dv=16)
    for op, axes in (("attention_delta", ("B", "Hq", "T", "Dv")), ("block_attention", sizes)):
        problem = Problem.of(op, {axis: sizes[axis] for axis in axes}, dict(q="float32", k="float32", v="float32"), "sm_80")
        assert dispatch.choose("sparse_attention", problem, None, "triton").kernel.TUNABLES
    assert asked == ["block_attention"] and {key for key in misses.counts if misses.counts[key] != counted.get(key)} == {("block_attention", "triton")}


@pytest.mark.parametrize("T, S, pattern, mode", [(1, 4096, None, "absorbed"), (512, 512, None, "decompressed"), (512, 512, st.Causal(), "decompressed"), (64, 4096, st.Window(7), "absorbed"),
                                                 (4, 512, st.Selection(np.zeros((1, 1, 4, 16), np.int32)), "absorbed")])
def test_a_latents_mode_is_the_cheaper(T, S, pattern, mode):
    """Few queries make it dear to rebuild every key, many make the wide products dear. Counted by hand on DeepSeek's widths; the figures of latent_cost are the same."""
    B, H, R, Dn, Dv, P = 1, 4, 512, 128, 128, 64
    pairs = T * S if pattern is None else int(pattern.mask(T, S).sum())
    absorbed, rebuilt = 2 * H * (T * R * (Dn + Dv) + pairs * (2 * R + P)), 2 * H * (S * R * (Dn + Dv) + pairs * (Dn + P + Dv))
    assert (absorbed < rebuilt) == (mode == "absorbed")
    cost = latent_cost(T, S, H, R, Dn, Dv, P, pairs)
    assert (cost["absorbed"]["flops"], cost["decompressed"]["flops"]) == (absorbed, rebuilt)
    call = [np.zeros(s, np.float32) for s in ((B, H, T, Dn), (B, H, T, P), (B, S, R), (B, S, P), (H, R, Dn), (H, R, Dv))]
    kernel = st.explain("latent_attention", *call, pattern).kernel
    assert kernel == ("latent_decompress" if mode == "decompressed" else "gather_attention" if isinstance(pattern, st.Selection) else "block_attention")


@pytest.mark.parametrize("rule, mode", [(None, "decompressed"), (st.Causal(), "decompressed"), (st.Selection(np.zeros((1, 1, 4, 16), np.int32)), "decompressed"), (None, "absorbed")], ids=repr)
def test_a_profile_says_the_mode_of_latents(rule, mode, tmp_path, monkeypatch):
    """An entry overrides the stated cost, which says the other mode for these sizes; not where the mode is named, profiles are off, or the sizes are others."""
    B, H, T, S, R, Dn, Dv, P = (1, 4, 4, 512, 512, 128, 128, 64) if mode == "decompressed" else (1, 4, 512, 512, 512, 128, 128, 64)
    make = lambda S: [np.zeros(s, np.float32) for s in ((B, H, T, Dn), (B, H, T, P), (B, S, R), (B, S, P), (H, R, Dn), (H, R, Dv))]  # noqa: E731
    found = lambda S=S, **o: "decompressed" if st.explain("latent_attention", *make(S), rule, **o).kernel == "latent_decompress" else "absorbed"  # noqa: E731
    other = found()
    assert other != mode
    few = isinstance(rule, st.Selection)
    problem = Problem.of("latent_attention", dict(B=B, H=H, T=T, S=S, R=R, Dn=Dn, Dv=Dv, P=P), dict(latent="float32"), "cpu", ["selection"] * few, 1 / 32 if few else 1.0)
    store.add(tmp_path, "latent_attention", DEVICE, {"key": lookup.key_of(problem), "backend": "numba", "config": {"mode": mode}, "status": "manual"}, {}, {})
    monkeypatch.setenv("SPARSETILE_PROFILE_DIR", str(tmp_path))
    lookup.forget(), dispatch.clear_plans()
    assert found() == mode and found(mode=other) == other and found(8 * S) == ("absorbed" if mode == "decompressed" else "decompressed")
    monkeypatch.setenv("SPARSETILE_TUNE", "off")
    assert found() == other


def test_choice_is_cached_and_cheap(qkv):
    st.sparse_attention(*qkv)
    assert len(dispatch.PLAN_CACHES[0]) >= 1


@pytest.mark.parametrize("backend", ["triton", "cupy"])
@pytest.mark.parametrize("tiles", [(128, 128), (64, 64), (128, 64)], ids=str)
def test_tiles_of_a_layout_find_a_variant_with_room_for_them(backend, tiles):
    """On Hopper the default is a variant of blocks of 128; another layout's tiles leave the portable one."""
    pytest.importorskip("triton")
    problem = Problem.of("block_attention", dict(B=1, Hq=8, Hk=2, T=4096, S=4096, D=128, Dv=128), dict(q="bfloat16", k="bfloat16", v="bfloat16"), "sm_90a")
    kernel = dispatch.kernel(backend, "block_attention")
    assert kernel.default_config(problem)["path"] != "portable"
    full = dispatch.check_config(kernel, problem, dict(zip(("block_q", "block_k"), tiles)), "layout")
    assert (full["block_q"], full["block_k"]) == tiles and (full["path"] == "portable") == (tiles != (128, 128))
    with pytest.raises(Unsupported, match="path"):
        dispatch.check_config(kernel, problem, {"path": kernel.default_config(problem)["path"], "block_q": 64, "block_k": 64}, "config")


@pytest.mark.parametrize("D", [64, 128, 136, 176, 192])
@pytest.mark.parametrize("block_q, block_k", [(16, 128), (32, 128), (64, 64), (64, 128), (128, 32), (128, 64), (128, 128)])
def test_blocks_of_a_layout_that_the_default_cannot_have(D, block_q, block_k):
    """On a Hopper the default of Triton's backward has blocks of 128: a layout of others runs by the portable default where it has room, else by what has."""
    module = pytest.importorskip("sparsetile.backends.triton.block_attention_backward")
    problem = Problem.of("block_attention_backward", dict(B=1, Hq=4, Hk=4, T=4096, S=4096, D=D, Dv=min(D, 128)), dict(q="bfloat16", k="bfloat16", v="bfloat16"), "sm_90a", ["causal", "interval", "lse"])
    found = dispatch.check_config(module, problem, dict(block_q=block_q, block_k=block_k), "layout")
    usual = module.portable_config(problem) | dict(block_q=block_q, block_k=block_k)
    if found["path"] == "portable" and isinstance(module.resources(problem, usual), Resources):
        assert found == usual
    assert (found["block_q"], found["block_k"]) == (block_q, block_k)


def test_a_layouts_own_variable_holds(monkeypatch):
    """Without it the framework's operators make the lists where no backend has the kernel; named, a backend runs or raises."""
    torch = pytest.importorskip("torch")
    mask = torch.ones(1, 2, 2, dtype=torch.bool)
    monkeypatch.setenv("SPARSETILE_BACKEND", "numba")
    assert st.Layout.from_block_mask(mask, 32, 32) is not None
    monkeypatch.setenv("SPARSETILE_BACKEND_LAYOUT", "numba")
    with pytest.raises(Unsupported, match="numba has no layout kernel"):
        st.Layout.from_block_mask(mask, 32, 32)
