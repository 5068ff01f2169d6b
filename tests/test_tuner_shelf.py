"""Profiles in an operator's hands: show, diff, merge, export, report, verify; recorded misses and the work list they make."""
import multiprocessing
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sparsetile as st
from sparsetile.autotune import fleet, hunt, provenance, report, retime, shelf, store, tasks, tune
from sparsetile.ops import dispatch
from sparsetile.profiles import lookup, misses, schema

ROOT = Path(__file__).resolve().parent.parent
DEVICE = {"name": "Some GPU", "arch": "sm_80"}


@pytest.fixture(autouse=True)
def own(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSETILE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("SPARSETILE_PROFILE_DIR", raising=False)
    monkeypatch.setattr(hunt, "FINALS", 0.2)
    lookup.forget(), dispatch.clear_plans(), misses.counts.clear(), misses._written.clear()
    yield
    tune.close(), lookup.forget(), dispatch.clear_plans()


def entry(T=64, **more):
    return {"key": {"dims": {"B": 1, "T": T}, "dtypes": {"scores": "float32"}, "features": [], "density": 1.0, "granularity": 1}, "backend": "cupy", "config": {"threads": 256},
            "time_us": 5.0, "default_us": 6.0, "status": "tuned", **more}


def put(root, *entries):
    for e in entries:
        store.add(root, "topk", DEVICE, e, {}, {})
    return root


def test_merge_keeps_the_higher_status_then_the_faster_whatever_the_order(tmp_path):
    a = put(tmp_path / "a", entry(), entry(128, time_us=3.0, config={"threads": 512}))
    b = put(tmp_path / "b", entry(time_us=4.0, config={"threads": 1024}), entry(128, time_us=9.0, status="pinned"), entry(256))
    texts = []
    for n, sources in enumerate(([a, b], [b, a])):
        conflicts = shelf.merge(tmp_path / f"m{n}", sources)
        assert len(conflicts) == 2 and any("'threads': 1024} (4.0 us) stays" in line for line in conflicts)
        texts.append((tmp_path / f"m{n}" / "some-gpu" / "topk.yaml").read_text())
    assert texts[0] == texts[1]
    kept = {e["key"]["dims"]["T"]: (e["time_us"], e["status"]) for e in schema.load(tmp_path / "m0/some-gpu/topk.yaml")["entries"]}
    assert kept == {64: (4.0, "tuned"), 128: (9.0, "pinned"), 256: (5.0, "tuned")}


def test_merge_prefers_a_time_of_the_kernel_as_it_is(tmp_path):
    """What was measured of older code may have been faster, or written by hand: it says nothing of today's. A pinned entry stays."""
    today = provenance.of(ROOT / "backends/cupy/topk.py")
    new = put(tmp_path / "new", *(entry(T, code=today, time_us=5.5) for T in (64, 128, 256, 512)))
    put(tmp_path / "shipped", entry(64, code="0" * 8), entry(128, code="0" * 8, status="manual"), entry(256, code="0" * 8, status="pinned"), entry(512, code=today))
    shelf.merge(tmp_path / "shipped", [new])
    kept = {e["key"]["dims"]["T"]: e["time_us"] for e in schema.load(tmp_path / "shipped/some-gpu/topk.yaml")["entries"]}
    assert kept == {64: 5.5, 128: 5.5, 256: 5.0, 512: 5.0}


def test_what_is_missing_is_what_no_kernel_of_today_has_an_entry_for(tmp_path, monkeypatch, capsys):
    from sparsetile.autotune import cli
    w, today = tasks.find("gpu/topk-128x131072"), provenance.of(ROOT / "backends/cupy/topk.py")
    lacks = lambda *backends: shelf.lacks(w, "Some GPU", backends, tmp_path)
    assert lacks("cupy") and not shelf.lacks(tasks.find("gpu/bitmaps-4096"), "Some GPU", ["numba"], tmp_path)  # which has no such kernel
    put(tmp_path, entry(workload=w.name, code="0" * 8))
    assert lacks("cupy")
    put(tmp_path, entry(workload=w.name, code=today))
    assert not lacks("cupy") and lacks("cupy", "triton") and shelf.lacks(w, "Another GPU", ["cupy"], tmp_path)
    monkeypatch.setattr(tune, "machine", lambda device: {"name": "Some CPU"})
    code = provenance.of(ROOT / "backends/numba/topk.py")
    store.add(tmp_path, "topk", {"name": "Some CPU", "arch": "cpu"}, entry(workload="cpu/topk-32", backend="numba", code=code), {}, {})
    tuned = []
    monkeypatch.setattr(tune, "tune", lambda op, w, **options: tuned.append(w.name))
    assert cli.main(["tune", "cpu/topk-32", "cpu/topk-128", "--missing", "--profiles", str(tmp_path)]) == 0 and tuned == ["cpu/topk-128"]
    assert "1 workloads have no entry of numba" in capsys.readouterr().err


def test_diff_says_speed_and_knobs(tmp_path):
    a, b = put(tmp_path / "a", entry(), entry(128)), put(tmp_path / "b", entry(time_us=4.0, config={"threads": 512}), entry(256))
    lines = shelf.diff(a, b)
    assert len(lines) == 3 and [line[0] for line in lines if "T64" in line] == ["~"] and any("5.0 -> 4.0 us (-20.0%), threads 256 -> 512" in line for line in lines)
    assert shelf.diff(a, a) == []


def test_show_export_and_report(tmp_path):
    a = put(tmp_path / "a", entry(code="00000000", workload="gpu/topk-128x131072", band=0.01, ties=2))
    (row,) = shelf.rows(a / "some-gpu/topk.yaml")
    assert row["stale"] and "stale" in shelf.table([row]) and "1.200 x" in shelf.table([row])
    assert shelf.to_csv([a]).splitlines()[0].startswith("device,op,workload") and len(shelf.to_csv([a]).splitlines()) == 2
    page = report.write(a / "some-gpu/topk.yaml", tmp_path / "report").read_text()
    assert "1.200 x" in page and "<script" not in page and "gpu/topk-128x131072" in page
    with pytest.raises(ValueError, match="profiles: expected files"):
        shelf.files([tmp_path / "nothing"])


def test_a_report_of_a_search_and_verify_of_its_entry(tmp_path):
    small = tasks.Workload.of("cpu/window-256/4096", "block_attention", "float32", dict(pattern=st.Window(16, 16)), B=1, Hq=2, Hk=2, T=128, S=128, D=16, Dv=16)
    tune.tune("block_attention", small, backend="numba", trials=4, storage=str(tmp_path / "journal"), profiles=tmp_path / "p")
    (path,) = (tmp_path / "p").rglob("*.yaml")
    page = report.write(path, tmp_path / "report", str(tmp_path / "journal")).read_text()
    assert "4 trials, best" in page and "block_q" in page
    data, said = schema.load(path), []
    one = data["entries"][0]

    def verified(**changed):
        one.update(changed), said.clear()
        store.write(path, store.dump(data))
        return retime.verify([path], None, said.append)
    default = dispatch.kernel("numba", "block_attention").default_config(retime.Again(None).problem("block_attention", one))
    other = next(n for n in (32, 64, 128) if n != default["block_q"])
    assert verified(config={**default, "block_q": other}, default_us=one["time_us"] * 2) in (0, 1) and len(said) == 1 and "cpu/window-256/4096" in said[0]
    assert verified(config={"block_q": 5}) == 1 and said[0].startswith("FAILS")
    assert verified(config=default) == 0 and said == ["not timed: 1 that are their kernel's default"]  # by its config
    assert verified(config={"block_q": 5}, default_us=one["time_us"]) == 0 and said == ["not timed: 1 that are their kernel's default"]  # by what it says


def test_verify_says_what_it_cannot_time(tmp_path):
    with pytest.raises(ValueError, match="expected entries of this device .*got 2 of sm_80"):
        retime.verify([put(tmp_path, entry(), entry(128))], None)


def test_a_report_shows_the_roofline():
    """By hand: two products of 2 x 64 operations for each of 512 * 513 / 2 pairs and 4 heads; four arrays of 4 x 512 x 64 halves; a row of 4096 scores and 8 indices."""
    device, halves = "NVIDIA H100 80GB HBM3", dict(B=1, Hq=4, Hk=4, T=512, S=512, D=64, Dv=64)
    task = tasks.Task(tasks.Workload.of("x", "block_attention", "bfloat16", dict(pattern=st.Causal()), **halves), None, hollow=True)
    least = max(4 * 512 * 513 / 2 * 4 * 64 / 989.4e6, 4 * 4 * 512 * 64 * 2 / 3.35e6)
    assert report.ceiling(task, 2 * least, device) == "50% (memory)" and report.ceiling(task, 1.0, "a chip of no data sheet") == ""
    wide = tasks.Task(tasks.Workload.of("x", "block_attention", "bfloat16", dict(pattern=st.Causal()), **{**halves, "T": 8192, "S": 8192}), None, hollow=True)
    assert report.ceiling(wide, 4 * 8192 * 8193 / 2 * 4 * 64 / 989.4e6 / 0.75, device) == "75% (products)"
    decode = tasks.Task(tasks.Workload.of("x", "block_attention", "bfloat16", dict(pattern=st.Window(63)), **{**halves, "T": 1, "S": 4096}), None, hollow=True)
    assert report.measure.traffic(decode) == 4 * 64 * 2 * (1 + 64 + 64 + 1)  # keys that no query sees are not read
    row = tasks.Task(tasks.Workload.of("x", "topk", "float32", B=1, T=1, S=4096, K=8), None, hollow=True)
    assert report.measure.traffic(row) == 4 * (4096 + 8)


# ------------------------------------------------------------------------------------------------------------------- misses
def test_misses_are_counted_and_become_a_work_list(tmp_path, monkeypatch, rng):
    path = tmp_path / "shapes.jsonl"
    monkeypatch.setenv("SPARSETILE_RECORD_SHAPES", str(path))
    for T in (40, 41, 100):
        x = rng.standard_normal((1, 2, T, 16)).astype(np.float32)
        st.sparse_attention(x, x, x, st.Window(3, 3), backend="numba")
    assert misses.counts["block_attention", "numba"] == 3 and len(path.read_text().splitlines()) == 2  # two of them share a bucket
    found = misses.read(path)
    assert [(problem.op, backend, text) for problem, backend, text in found] == [("block_attention", "numba", "Window(3, 3)")] * 2
    command = [sys.executable, "-m", "sparsetile", "tune", "--shapes", str(path), "--trials", "2", "--backend", "numba", "--profiles", str(tmp_path / "p"), "--json"]
    got = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert got.returncode == 0 and "SPARSETILE_PROFILE_DIR" not in got.stderr, got.stderr  # the directory was new: nobody's variable is wrong
    monkeypatch.delenv("SPARSETILE_RECORD_SHAPES")
    said = []
    for path in (tmp_path / "p").rglob("*.yaml"):  # whichever won
        data = schema.load(path)
        for e in data["entries"]:
            e |= {"config": {"block_q": 32, "block_k": 32}, "default_us": 2 * e["time_us"]}
        store.write(path, store.dump(data))
    assert retime.verify([tmp_path / "p"], None, said.append) in (0, 1, 2) and len(said) == 2 and all("recorded/block_attention/" in line and " us, default " in line for line in said)
    monkeypatch.setenv("SPARSETILE_PROFILE_DIR", str(tmp_path / "p"))
    lookup.forget(), dispatch.clear_plans()
    assert "user profile" in st.explain(st.sparse_attention, x, x, x, st.Window(3, 3), backend="numba").source


@pytest.mark.parametrize("path, why", [("/dev/full", "No space left"), ("/nowhere/shapes.jsonl", "No such file")])
def test_shapes_that_cannot_be_recorded_are_said_once_and_the_call_runs(path, why, monkeypatch, rng, caplog):
    monkeypatch.setenv("SPARSETILE_RECORD_SHAPES", path)
    for T in (40, 100):
        x = rng.standard_normal((1, 2, T, 16)).astype(np.float32)
        assert st.sparse_attention(x, x, x, st.Window(3, 3), backend="numba").shape == x.shape
    assert [why in record.getMessage() and path in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"op": "rm"}', '{"op": "topk", "backend": "numba", "arch": "cpu", "dims": {"B": -1}, "dtypes": {}, "features": [], "density": 1, "granularity": 1, '
                                  '"pattern": null}'])
def test_a_bad_work_list_is_refused_by_line(line, tmp_path):
    path = tmp_path / "shapes.jsonl"
    path.write_text("\n" + line + "\n")
    with pytest.raises(ValueError, match="shapes.jsonl: line 2"):
        misses.read(path)


# -------------------------------------------------------------------------------------------------------------------- leases
def _claims(path, queue):
    work = fleet.WorkList(path)
    for task in "abcdefgh":
        claim = work.claim(task)
        if claim:
            with claim:
                queue.put(task)
                claim.finish()


def test_no_task_is_done_twice_and_a_dead_one_returns(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue, path = context.Queue(), str(tmp_path / "journal")
    workers = [context.Process(target=_claims, args=(path, queue)) for _ in range(3)]
    [w.start() for w in workers], [w.join(60) for w in workers]
    done = [queue.get(timeout=1) for _ in range(8)]
    assert sorted(done) == list("abcdefgh") and queue.empty()
    work = fleet.WorkList(path)
    dead = [sys.executable, "-c", f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\nfrom sparsetile.autotune import fleet\nassert fleet.WorkList({path!r}).claim('x')\nos.kill(os.getpid(), 9)"]
    assert subprocess.run(dead, timeout=60).returncode == -9
    claim = work.claim("x")
    assert claim and work.claim("x") is None and work.claim("a") is None
    with claim:
        pass  # not finished: back on the list
    assert work.claim("x") is not None


@pytest.mark.parametrize("again", [False, True], ids=["once", "again"])
def test_a_task_that_another_does_between_look_and_claim_is_not_done_twice(again, tmp_path, monkeypatch):
    path = str(tmp_path / "journal")
    slow, quick = fleet.WorkList(path), fleet.WorkList(path)
    look = slow._claims

    def overtaken(task):
        found = look(task)
        monkeypatch.setattr(slow, "_claims", look)
        with quick.claim(task, again) as claim:
            claim.finish()
        return found
    with quick.claim("a") as claim:
        claim.finish() if again else None
    monkeypatch.setattr(slow, "_claims", overtaken)
    assert slow.claim("a", again) is None and slow.done("a")
    assert bool(slow.claim("a", again)) is again


def test_a_claim_of_another_host_lives_while_it_is_renewed_whatever_the_clocks_say(tmp_path, monkeypatch):
    path, now, here = str(tmp_path / "journal"), [1000.0], fleet._HERE
    monkeypatch.setattr(fleet.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(fleet, "_HERE", "elsewhere")
    theirs = fleet.WorkList(path).claim("a")
    monkeypatch.setattr(fleet, "_HERE", here)
    mine = fleet.WorkList(path)
    assert mine.claim("a") is None
    now[0] += fleet.LEASE - 1
    theirs.owner.study._storage.set_trial_user_attr(theirs.trial_id, "renewed", 1)
    assert mine.claim("a") is None
    now[0] += fleet.LEASE - 1
    assert mine.claim("a") is None
    now[0] += 2
    with mine.claim("a") as claim, theirs:  # that host only slept
        theirs.finish()
        assert not mine.done("a")
        claim.finish()
    assert mine.done("a")
