"""The catalogue: its page is what the code says, its entries say what the calls do, its advice follows from what was measured or counted."""
import ast
import dataclasses
import inspect
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest

import sparsetile as st
from sparsetile.autotune import cli
from sparsetile.catalogue import calls, entries, page, recommend, speed, store
from sparsetile.catalogue.system import FAMILIES, FINDS, GPU, SMALL, Inputs
from sparsetile.ops import dispatch

ROOT = Path(__file__).resolve().parent.parent
SYSTEMS = [system for system in entries.SYSTEMS if not system.refusal]
CHOSEN = entries.find("exact-topk")
named = pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSETILE_CACHE_DIR", str(tmp_path))


def needs_every_kernel():
    pytest.importorskip("triton", reason="asking Triton's kernels needs triton: pip install 'sparsetile[triton]'")
    if dispatch.package("triton").interpreted():
        pytest.skip("under TRITON_INTERPRET=1 kernels answer for the interpreter")


# --------------------------------------------------------------------------------------------------------------------- page
def test_the_page_is_the_codes_own():
    needs_every_kernel()
    assert (ROOT / "docs/catalogue.md").read_text() == page.markdown(), "the page is old: sparsetile catalogue --markdown > docs/catalogue.md"


def test_the_page_notices(monkeypatch):
    """A kernel that is gone, or refuses, changes the answer, and the backward's apart from the forward's."""
    needs_every_kernel()
    system = entries.find("dsa")
    assert page.runs(system.kernels, "numba") == "f32 f16 bf16" and page.runs(("topk", "gather_attention"), "numba") == "f32 f16 bf16 f64"
    monkeypatch.setattr(page, "asked", lambda name, backend: None if name == "indexer_topk" else page.matrix.ask(name, backend))
    assert page.runs(system.kernels, "numba") == "numba has no indexer_topk kernel" and page.runs(system.backward, "numba") == "f32 f16 bf16 f64"
    monkeypatch.setattr(page, "asked", lambda name, backend: ([], [("not today; come tomorrow", "f32", "cpu")]))
    assert page.runs(system.kernels, "numba") == "not today; come tomorrow"


# ------------------------------------------------------------------------------------------------------------------ entries
def test_names_and_words():
    assert len({system.name for system in entries.SYSTEMS}) == len(entries.SYSTEMS)
    for system in entries.SYSTEMS:
        assert system.family in FAMILIES and (system.family == "out of scope") == bool(system.refusal) and re.match(r"\d{4}\.\d{5}", system.paper)
        assert system.refusal or system.finds in FINDS and system.call and system.sees and system.reach and system.trained and system.run
        for call in ast.walk(ast.parse(system.call)):  # every call shown names a public function, and arguments that it has
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
                assert call.func.attr in st.__all__
                inspect.signature(getattr(st, call.func.attr)).bind(*call.args, **{keyword.arg: keyword.value for keyword in call.keywords})
    with pytest.raises(ValueError, match="system: expected one of dense, .*got 'reformed'"):
        entries.find("reformed")


@named
def test_kernels_are_those_that_a_call_takes(system, monkeypatch):
    torch = pytest.importorskip("torch")
    if system.works(None):
        with pytest.raises(st.Unsupported, match="flash-linear-attention"):
            system.run(Inputs(SMALL, 8), None)
        return
    monkeypatch.setenv("SPARSETILE_BACKEND", "reference")
    taken, choose = [], dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda op, problem, *more: taken.append(problem.op) or choose(op, problem, *more))
    dispatch.clear_plans()
    x = Inputs(SMALL, 1024 if "merge_attention" in system.kernels else 64, gradient=True)
    out = system.run(x, system.real)
    forward, taken[:] = {*taken}, []
    dispatch.clear_plans()
    out.sum().backward()
    assert (forward, {*taken}) == ({*system.kernels}, {*system.backward})
    assert tuple(out.shape) == (1, SMALL.Hq, x.tokens, SMALL.D) and all(torch.isfinite(leaf.grad).all() for name, leaf in x.made.items() if leaf.grad is not None)


@named
def test_reach_is_that_of_the_picture(system):
    if system.small is None:
        return
    layers, window = system.small.hops(page.SIDE), int(system.small.mask(1, page.SIDE).sum())
    said = system.reach.partition(",")[0]
    assert layers == (int(said) if said.isdigit() else math.ceil((page.SIDE - 1) / ((window if system.name == "mistral" else 5) - 1)))


@named
def test_cache_keeps_what_a_query_sees(system):
    """A causal pattern needs as many keys as its last query sees, or all where others will be seen later; a picture has no query that sees more than is kept."""
    if system.real is None or system.name.startswith("sparse-transformer"):
        return
    N = 6000
    assert system.kept(N) == (int(system.real.mask(1, N).sum()) if system.causal else N)


def test_operations_are_those_of_the_pairs():
    N = 300
    pairs = lambda seen: 4 * int(seen.sum()) * GPU.Hq * GPU.D  # noqa: E731
    for system in SYSTEMS:
        if system.counted is None:
            assert system.operations(GPU, N) == pairs(system.real.mask(N, N)), system.name
    x = Inputs(SMALL, N)
    assert calls.first_pairs(SMALL.top_k, N) == int(st.dsa_selection(**calls.indexed(x)).lengths.sum()) == int(entries.find("dsa").chosen(x).sum()) == int(entries.find("exact-topk").chosen(x).sum())
    triangle = N * (N + 1) // 2
    assert entries.find("mla").operations(GPU, N) == 2 * GPU.Hq * (triangle * (2 * GPU.D + GPU.P) + 2 * N * GPU.R * GPU.D)


def test_pictures():
    seen = np.array([list(line) for line in page.picture(entries.find("dsa"))]) == "#"
    assert seen.shape == (page.SIDE, page.SIDE) and (seen.sum(1) == np.minimum(np.arange(page.SIDE) + 1, SMALL.top_k)).all() and not np.triu(seen, 1).any()
    x = Inputs(SMALL, page.SIDE)
    for name in ("exact-topk", "moba", "infllm-v2", "vertical-slash", "pooled-blocks", "routing", "reformer", "nsa"):
        drawn = entries.find(name).chosen(x)
        assert not np.triu(drawn, 1).any() and drawn.sum(1).max() <= {"routing": page.SIDE, "reformer": 8, "nsa": 3 * 4 + 2}.get(name, SMALL.top_k) and drawn.any()
    assert (np.diagonal(entries.find("moba").chosen(x))).all()  # its own block
    assert page.picture(entries.find("mistral"))[10] == "." * 5 + "#" * 6 + "." * 21 and page.picture(entries.find("linear")) == []


# ------------------------------------------------------------------------------------------------------------- measurements
def measured(path, tokens, names, passes=("forward",), **more):
    """What the command does, without its words."""
    data = store.begun(path, None, speed.shape_of(None))
    wanted = speed.lacking(None, tokens, [entries.find(name) for name in names], data["rows"], passes)
    for row in speed.rows(None, wanted, 0.0, **more):
        store.put(data, row)
        store.write(data, path)
        yield row


def test_rows_are_written_as_they_come_and_only_what_lacks_is_measured(tmp_path, monkeypatch):
    """A pass that is cut keeps its rows; the next one goes on, tries again what was refused, last, and changes nothing else."""
    path, names = store.file_of(None, tmp_path), ("gqa", "mistral", "gated-deltanet", "longformer", "linear")
    cut = measured(path, [16, 48], names, commit="one")
    first = [next(cut) for _ in range(3)]
    assert store.load(path)["rows"] == first and [row["system"] for row in first] == ["gqa", "mistral", "longformer"]
    cut.close()
    whole = [*first, *measured(path, [16, 48], names, commit="two")]
    data = store.load(path)
    assert data["rows"] == whole and data["device"]["arch"] == "cpu" and [row["commit"] for row in whole] == ["one"] * 3 + ["two"] * 7
    assert [row["system"] for row in whole[-2:]] == ["gated-deltanet"] * 2 and all("on a GPU" in row["refused"] or "not installed" in row["refused"] for row in whole[-2:])
    assert {store.key(row) for row in whole} == {(name, N, "forward", "numba" if entries.find(name).kernels else None) for name in names for N in (16, 48)}
    for row in whole[:-2]:
        assert row["n"] >= 3 and math.isclose(row["times_dense"], row["dense_us"] / row["time_us"], rel_tol=0.01)  # stored rounded
    again = [*measured(path, [16, 48, 24], names, commit="three")]
    assert [row["tokens"] for row in again[:4]] == [24] * 4 and [(row["system"], row["tokens"]) for row in again[4:]] == [("gated-deltanet", N) for N in (24, 16, 48)]
    assert store.load(path)["rows"][:8] == whole[:8]
    store.write(store.begun(path, None, speed.shape_of(None), "Beside others."), path)
    assert store.begun(path, None, speed.shape_of(None)) == data | {"note": "Beside others.", "rows": store.load(path)["rows"]}
    monkeypatch.setattr(speed, "CPU", dataclasses.replace(speed.CPU, D=32))
    assert store.begun(path, None, speed.shape_of(None))["rows"] == [], "other sizes: measured afresh"


def test_what_fails_is_a_row_that_says_so_and_the_others_are_measured(tmp_path, monkeypatch):
    path, found = store.file_of(None, tmp_path), entries.find("moba")
    monkeypatch.setitem(found.__dict__, "run", lambda x, rule: 1 / 0)
    rows = [*measured(path, [16], ("moba", "gqa"), speed.PASSES)]
    assert [row.get("failed") for row in rows] == ["ZeroDivisionError: division by zero", None] * 2
    assert store.load(path)["rows"] == rows and [one[0] for one in speed.lacking(None, [16], [found, entries.find("gqa")], rows)] == ["moba"] * 2


def test_the_backend_named_is_the_one_that_is_called_and_the_fastest_is_the_baseline(monkeypatch):
    """In the forward and in the backward; the environment is left as it was. The watch of this test has the reference take a hundred times as long."""
    pytest.importorskip("torch")
    monkeypatch.delenv("SPARSETILE_BACKEND", raising=False)
    monkeypatch.setattr(speed, "ours", lambda device: ("reference", "numba"))
    taken, choose, names, asked = [], dispatch.choose, [], speed.asked
    monkeypatch.setattr(dispatch, "choose", lambda *given: taken.append(choose(*given)) or taken[-1])
    monkeypatch.setattr(speed, "asked", lambda name: names.append(name) or asked(name))
    monkeypatch.setattr(speed.timing.Stopwatch, "samples", lambda self, call, count: (call(), [1000.0 if names[-1] == "reference" else 10.0])[1])
    dispatch.clear_plans()
    rows = [*speed.rows(None, speed.lacking(None, [16], [CHOSEN, entries.find("gqa")]), 0.0)]
    assert [(row["pass"], row["backend"]) for row in rows] == [(what, name) for what in speed.PASSES for _ in range(2) for name in ("reference", "numba")]
    kernels = {(choice.backend, choice.kernel.__name__.rpartition(".")[2]) for choice in taken}
    assert kernels == {(name, kernel) for name in ("reference", "numba") for system in (CHOSEN, entries.find("gqa")) for kernel in (*system.kernels, *system.backward)}
    assert [(row["time_us"], row["dense_us"], row["times_dense"]) for row in rows] == [(1000.0, 10.0, 0.01), (10.0, 10.0, 1.0)] * 4 and "SPARSETILE_BACKEND" not in os.environ


def test_the_fastest_backend_answers_at_the_longest_length_below():
    row = lambda tokens, backend, **found: {"system": "a", "tokens": tokens, "pass": "forward", "backend": backend} | found  # noqa: E731
    data = {"rows": [row(16, "triton", times_dense=3.0), row(48, "triton", times_dense=1.5), row(48, "cupy", times_dense=2.0), row(64, "triton", refused="no"), row(64, "cupy", times_dense=0.5)]}
    found = [store.row(data, "a", n) for n in (8, 16, 47, 48, 10 ** 6)]
    assert [(one["tokens"], one["backend"]) for one in found] == [(16, "triton")] * 3 + [(48, "cupy"), (64, "cupy")]
    assert store.row(data, "a", 48, "training") is None and store.row(data, "b", 48) is None and store.row(None, "a", 48) is None


def test_what_is_wanted_is_called_once_by_processes_side_by_side():
    """A process that cannot is said, and the measurement goes on."""
    assert speed.compiled(None, [("gqa", 16, "forward", "numba"), ("nothing", 16, "forward", "numba")], 2) == [f"nothing numba: ValueError: {error_of(lambda: entries.find('nothing'))}"]


def error_of(call):
    with pytest.raises(ValueError) as caught:
        call()
    return caught.value


def test_the_page_says_where_a_row_lacks():
    rows = [{"system": "gqa", "tokens": 64, "pass": "forward", "backend": "cupy", "commit": "abc", "time_us": 1500.0, "times_dense": 1.0}, {"system": "gqa", "tokens": 64, "pass": "forward", "backend": "triton", "commit": "abd", "failed": "out of memory"}]
    lines = page.measured({"device": {"name": "A GPU", "arch": "sm_90a"}, "measured_with": {"torch": "2"}, "note": "Cold.", "shape": dataclasses.asdict(GPU), "rows": rows})
    assert "`sparsetile catalogue --measure --device 0 --tokens 64` at abc, abd; torch 2. bfloat16, B 1, Hq 32, Hk 8, D 128, R 512, top_k 2048, M 256. Cold." in lines and "1. failed: out of memory" in lines
    assert "| gqa | cupy | 1.00 x (1.50 ms) |" in lines and "| gqa | triton | [1] |" in lines and "| nsa | triton | not measured |" in lines and lines.count("| nsa | cupy | not measured |") == 2


FILE = f"schema: 1\ndevice: {{name: x}}\nshape: {dataclasses.asdict(GPU)}\nrows: "


def test_the_smallest_file_is_read(tmp_path):
    (tmp_path / "x.yaml").write_text(FILE + "[{system: a, tokens: 1, pass: forward, refused: 'no'}]")
    assert store.load(tmp_path / "x.yaml")["rows"][0]["refused"] == "no"


@pytest.mark.parametrize("text", ["", "rows: 3", "schema: 1\ndevice: {name: x}\nrows: [{system: a}]", "schema: 2\ndevice: {name: x}\nrows: []", "{", "!!python/object/apply:os.getcwd []",
                                  "schema: 1\ndevice: {name: x}\nrows: []", "a: &a [1]\nb: *a", FILE + "[{system: a, tokens: 1, pass: forward}]", FILE + "[{system: a, tokens: 1, pass: forward, time_us: 1, times_dense: .nan}]"])
def test_a_bad_file_is_one_error(text, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"x\.yaml: expected measurements of schema 1"):
        store.load(tmp_path / "x.yaml")


def test_shipped_files_are_sound():
    for data in store.shipped():
        assert {row["system"] for row in data["rows"]} <= {system.name for system in SYSTEMS}


# ------------------------------------------------------------------------------------------------------------------- advice
def invented(**times):
    """Measurements as a file would hold them: times dense at 1024 and 65536 tokens."""
    rows = [{"system": name, "tokens": tokens, "pass": "forward", "time_us": 1.0, "times_dense": found} for name, both in times.items() for tokens, found in zip((1024, 65536), both)]
    return {"device": {"name": "a device"}, "shape": {"Hq": 32, "Hk": 8, "D": 128, "dtype": "bfloat16"}, "rows": rows}


MEASURED = invented(dense=(0.9, 0.9), gqa=(1, 1), mla=(0.8, 0.7), dsa=(0.3, 4), mistral=(1.2, 12), linear=(0.2, 30))


@pytest.mark.parametrize("asked, taken", [
    (dict(length=2048), "gqa"),                                       # nothing gains enough at short lengths: dense
    (dict(length=131072), "dsa"),                                     # any key may matter: selection
    (dict(length=131072, find="all"), "gqa"), (dict(length=131072, find="all", memory_gib=8), "mla"),  # the cache is the limit: latent
    (dict(length=131072, find="nearby"), "mistral"),                  # near text is enough: a window
    (dict(length=131072, find="gist"), "linear"), (dict(length=131072, gain=5.0), "gqa"), (dict(length=131072, memory_gib=1), None),
    (dict(length=131072, find="nearby", memory_gib=1), "mistral"), (dict(length=131072, training=True), None),  # no training was measured
])
def test_advice_follows_the_measurements(asked, taken):
    needs_every_kernel()
    answer = recommend.recommend(recommend.Need(**asked), None, MEASURED)
    assert answer["system"] == taken and "measured on a device" in answer["basis"]
    assert {*answer["reasons"]} == {system.name for system in entries.SYSTEMS} and all(answer["reasons"].values())


def test_shipped_measurements_advise():
    """What a device that was measured is told: by its own rows, and the exact one where giving up exactness brings too little."""
    needs_every_kernel()
    for data in store.shipped():
        device = None if data["device"]["arch"] == "cpu" else 0
        for find in ("chosen", "nearby"):
            answer = recommend.recommend(recommend.Need(16384, find=find), device, data)
            at = {name: store.row(data, name, 16384)["times_dense"] for name, sentence in answer["reasons"].items() if "(forward, measured by" in sentence}
            exact = max((name for name in at if entries.find(name).finds == "all"), key=at.get)
            assert f"measured on {data['device']['name']}" in answer["basis"] and answer["system"] == (max(at, key=at.get) if max(at.values()) >= 1.5 * at[exact] else exact)


def test_reasons_say_what_kept_a_system_out():
    needs_every_kernel()
    reasons = recommend.recommend(recommend.Need(131072, memory_gib=8), None, MEASURED)["reasons"]
    assert "64 GiB, more than the 8 GiB there are" in reasons["dense"] and "asked for: whichever keys" in reasons["mistral"] and reasons["jamba"].startswith("out of scope")
    assert "both ways" in recommend.recommend(recommend.Need(4096, find="gist"), None, MEASURED)["reasons"]["linformer"]
    assert reasons["dsa"].startswith("4.00 x as fast as dense at 65,536 tokens (forward, measured)")
    assert "not measured on a device" in recommend.recommend(recommend.Need(4096, find="gist"), None, MEASURED)["reasons"]["performer"]


def test_without_measurements_nothing_is_invented(monkeypatch, tmp_path):
    needs_every_kernel()
    monkeypatch.setattr(store, "SHIPPED", tmp_path)  # this machine's may be among them
    answer = recommend.recommend(recommend.Need(65536, find="nearby"), None)
    assert answer["basis"].startswith("counted operations and bytes only: nothing was measured") and not any("measured" in sentence for sentence in answer["reasons"].values())
    assert "as fast" not in answer["because"] and "counts" in answer["because"] and "counts the fewest operations" in recommend.recommend(recommend.Need(65536, find="all"), None)["because"]
    share = st.mistral(4096).pairs(65536, 65536) / st.Causal().pairs(65536, 65536)
    assert answer["reasons"]["mistral"].startswith(f"{share:.3g} of dense attention's operations, counted; its caches keep 0.5 GiB")
    both = recommend.recommend(recommend.Need(65536, find="landmarks", both_ways=True), None)
    assert both["system"] == "longformer" and both["reasons"]["dsa"] == "it is causal"


@pytest.mark.parametrize("wrong, argument", [(dict(length=0), "length"), (dict(length=1, find="it"), "find"), (dict(length=1, memory_gib=-1), "memory_gib"), (dict(length=1, heads=6, key_heads=4), "key_heads")])
def test_bad_needs_are_named(wrong, argument):
    with pytest.raises(ValueError, match=rf"^{argument}: expected"):
        recommend.Need(**wrong)


# ------------------------------------------------------------------------------------------------------------- command line
def test_commands(capsys, tmp_path):
    needs_every_kernel()
    assert cli.main(["catalogue"]) == 0
    out = capsys.readouterr().out
    assert all(system.name in out for system in SYSTEMS)
    assert cli.main(["catalogue", "mistral", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kernels"] == ["block_attention"] and found["backends"]["numba"] == "f32 f16 bf16 f64 fp8" and len(found["picture"]) == page.SIDE
    assert cli.main(["catalogue", "jamba"]) == 0 and "out of scope" in capsys.readouterr().out
    assert cli.main(["catalogue", "nothing"]) == 1 and "expected one of dense" in capsys.readouterr().err
    assert cli.main(["catalogue", "mistral", "--measure", "--tokens", "16", "--passes", "forward", "--seconds", "0", "--json"]) == 0
    path = Path(json.loads(capsys.readouterr().out.splitlines()[-1])["path"])
    assert path.parent == tmp_path / "catalogue" and store.load(path) == store.of(None)
    assert cli.main(["recommend", "--length", "512", "--find", "nearby", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["system"] in ("gqa", "mistral") and "measured on" in answer["basis"]
    assert cli.main(["recommend", "--length", "131072", "--memory", "0.001"]) == 1 and "nothing fits" in capsys.readouterr().out


def test_pictures_are_drawn(capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'sparsetile[plot]'")
    assert cli.main(["catalogue", "longformer", "mistral", "--pictures", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["longformer.png", "mistral.png"] and len(capsys.readouterr().out.splitlines()) == 2
