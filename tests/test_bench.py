"""The benchmarks' own machinery, without a GPU: the judge of large answers, the counting of pairs, and a table that survives kernels which hang or kill their process."""
import json
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from sparsetile.autotune import measure, tasks
from sparsetile.backends import arrays
from sparsetile.backends.contract import TUNED
from sparsetile.bench import gpu_rows, gpu_table, spot
from sparsetile.ops import dispatch

GPU = {w.name: w for w in tasks.workloads()}


def test_every_row_has_a_workload_and_a_name_of_its_own():
    assert len({row.name for row in gpu_rows.ROWS}) == len(gpu_rows.ROWS)
    assert [row.name for row in gpu_rows.ROWS if row.make() != GPU[row.workload]] == []
    assert [row.name for row in gpu_rows.selected(["bigbird"])] == ["fwd BigBird 128", "bwd BigBird 128"]


@pytest.mark.parametrize("kernel", [k for k in TUNED if any(dispatch.has_kernel(gpu, k) for gpu in ("triton", "cupy"))])
def test_the_judge_accepts_the_reference_and_notices_a_change(kernel, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(spot, "ROWS", 12)
    rows = [row for row in gpu_rows.ROWS if GPU[row.workload].kernel == kernel]
    assert rows
    for row in rows[:: max(1, len(rows) // 3)]:
        task = tasks.Task(GPU[row.workload].small(), None)
        judge, right = spot.Judge(task), task.run("reference")
        assert judge.wrong(right) is None
        first = np.array(tasks.outputs(right)[0])
        n, take, *_ = judge.parts[0]
        marked = np.zeros(first.shape, bool)
        at = np.argwhere(take_indices(take, first.shape))[0]
        marked[tuple(at)] = True
        changed = np.where(marked, np.roll(first, 1, -1), first)
        assert changed.dtype == first.dtype and judge.wrong([changed, *tasks.outputs(right)[1:]]) is not None


def take_indices(take, shape):
    """Which elements of an answer the judge looks at."""
    numbered = np.arange(np.prod(shape)).reshape(shape)
    return np.isin(numbered, take(numbered))


def test_pairs_of_a_selection_are_those_of_its_mask():
    w = GPU["gpu/blocks-64"].small()
    task = tasks.Task(w, None)
    chosen, judge = task.inputs[3], spot.Judge(task)
    lists = chosen.indices.shape[1]
    every = sum(judge._count(chosen, h * w["Hq"] // lists, np.arange(w["T"])).sum() for h in range(lists))
    assert measure.selected_pairs(replace(chosen, indices=chosen.indices[-1:]), w["S"]) == every  # the judge looks at the last batch entry


@pytest.mark.parametrize("name", [row.name for row in gpu_rows.BLOCK if row.name.startswith("fwd")] + [f"fwd {kind} {n} Hk 8" for kind in ("documents", "random 10 %", "strided 128") for n in ("8k", "128k")])
def test_masks_given_to_flex_attention_are_the_patterns(name, rng):
    torch = pytest.importorskip("torch")
    from sparsetile.bench import peers
    w = gpu_rows.NAMED[name].make()
    rule = w.option("pattern")
    p, s = (np.unique(np.concatenate((np.arange(130), rng.integers(0, w["T"], 300), w["T"] - 1 - np.arange(130)))) for _ in range(2))
    got = peers._sees(rule, w, "cpu")(0, 0, torch.from_numpy(p)[:, None], torch.from_numpy(s)[None])
    assert (got.numpy() == rule.visible(p[:, None], s[None], w["S"])).all()


@pytest.mark.parametrize("name", ["gpu/causal/8192", "gpu/causal/8192/backward", "gpu/latent-4096"])
def test_peers_answer_what_we_answer(name, monkeypatch):
    torch = pytest.importorskip("torch")
    from sparsetile.bench import peers
    monkeypatch.setattr(peers, "_cudnn", lambda *x: peers.scaled_dot_product_attention(*(y.float() for y in x), attn_mask=mask).to(x[0].dtype))
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)
    w = GPU[name].small()
    w = replace(w, sizes=tuple((axis, 203 if axis == "T" else size) for axis, size in w.sizes))
    task = tasks.Task(w, None)
    judge, mask = spot.Judge(task), torch.ones(203, 203, dtype=torch.bool).tril()
    task.inputs = [arrays.as_torch(x) if isinstance(x, np.ndarray) else x for x in task.inputs]
    ours = [peer for peer in peers.peers(task, True) if peer.judged and peer.name != "Flex"]
    assert ours and [judge.wrong(peer.make()()) for peer in ours] == [None]


def in_pages(q, pool, table, lengths, scale, Dv):
    """Attention of q [B,h,D] over pages of latents [N,64,D], by its definition."""
    import torch
    outs = []
    for one, pages, n in zip(q.float(), table.long(), lengths.tolist()):
        keys = pool[pages].flatten(0, 1)[:n].float()
        outs.append((scale * one @ keys.T).softmax(-1) @ keys[:, :Dv])
    return torch.stack(outs).to(q.dtype)


class PagedWrapper:
    """As flashinfer.mla.BatchMLAPagedAttentionWrapper is documented."""

    def __init__(self, workspace): pass

    def plan(self, qo_indptr, kv_indptr, kv_indices, kv_len_arr, num_heads, head_dim_ckv, head_dim_kpe, page_size, causal, sm_scale, q_data_type, kv_data_type):
        assert qo_indptr.tolist() == list(range(len(kv_len_arr) + 1)) and (page_size, causal) == (64, False)
        self.table = [kv_indices[a:b] for a, b in zip(kv_indptr, kv_indptr[1:])]
        self.lengths, self.scale = kv_len_arr, sm_scale

    def run(self, q_nope, q_pe, ckv, kpe):
        import torch
        return in_pages(torch.cat((q_nope, q_pe), -1), torch.cat((ckv, kpe), -1), torch.stack(self.table), self.lengths, self.scale, q_nope.shape[-1])


def flash_mla_with_kvcache(q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits, softmax_scale=None, causal=False):
    """As FlashMLA documents it: q [B,1,h,576], k_cache [N,64,1,576]."""
    assert (tile_scheduler_metadata, num_splits) == ("plan", "splits") and k_cache.shape[1:3] == (64, 1)
    return in_pages(q[:, 0], k_cache[:, :, 0], block_table, cache_seqlens, softmax_scale, head_dim_v)[:, None], None


def test_peers_of_latent_decode_are_called_as_they_are_documented(monkeypatch):
    torch = pytest.importorskip("torch")
    from importlib.machinery import ModuleSpec
    from types import SimpleNamespace
    from sparsetile.bench import peers
    metadata = lambda lengths, per_key_head, key_heads: ("plan", "splits") if (per_key_head, key_heads) == (16, 1) else None  # noqa: E731
    for name, held in (("flash_mla", dict(get_mla_metadata=metadata, flash_mla_with_kvcache=flash_mla_with_kvcache)), ("flashinfer", {}), ("flashinfer.mla", dict(BatchMLAPagedAttentionWrapper=PagedWrapper))):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__spec__=ModuleSpec(name, None), __path__=[], **held))
    w = GPU["gpu/latent-decode-h16"]
    task = tasks.Task(replace(w, sizes=tuple((axis, dict(B=2, S=192).get(axis, size)) for axis, size in w.sizes)), None)
    judge, task.inputs = spot.Judge(task), [arrays.as_torch(x) if isinstance(x, np.ndarray) else x for x in task.inputs]
    found = {peer.name: judge.wrong(peer.make()()) for peer in peers.peers(task, False)}
    assert found == dict(torch=None, FlashMLA=None, FlashInfer=None) and torch is peers.torch


WORKER = '''
import json, os, sys, time
order = json.loads(sys.argv[1])
assert sys.stdin.readline()
without = {tuple(x) for x in order["without"]}
def say(**event): print(json.dumps(event), flush=True)
say(machine={"gpu": "none"}); say(ceilings={"bf16_tflops": 395.0})
for row in order["rows"]:
    say(row=row, who="inputs", trying=True)
    for who in ("triton", "cupy"):
        if (row, who) in without: continue
        say(row=row, who=who, trying=True)
        if row == "fwd causal 8k" and who == "triton": time.sleep(60)
        if row == "fwd window 4096" and who == "cupy": os._exit(7)
        say(row=row, who=who, time_us=1000.0, tflops=321.0, clock_mhz=1500)
    say(row=row, who="row", done=True)
'''


def test_the_table_goes_on_without_what_hangs_or_dies(tmp_path, capsys):
    names = [row.name for row in gpu_rows.ROWS[:4]]
    with open(tmp_path / "out.jsonl", "w") as out:
        found = gpu_table.Measured(out)
        gpu_table.supervise(dict(rows=list(names), without=[]), found, 3, time.monotonic() + 60, [sys.executable, "-c", WORKER])
    assert "silent" in found.rows["fwd causal 8k"]["triton"]["failed"] and "code 7" in found.rows["fwd window 4096"]["cupy"]["failed"]
    assert found.done == set(names) and found.rows["fwd causal 8k"]["cupy"]["tflops"] == 321.0
    text = gpu_table.table(found, names)
    assert "FA3* 336" in text and "fwd window 4096, cupy: the process ended with code 7" in text
    assert all(json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines())


def test_a_worker_that_cannot_start_ends_the_table():
    found = gpu_table.Measured(None)
    gpu_table.supervise(dict(rows=["fwd causal 8k"], without=[]), found, 5, time.monotonic() + 60, [sys.executable, "-c", "raise SystemExit(3)"])
    assert "code 3" in found.rows["fwd causal 8k"]["row"]["failed"]


def test_a_worker_started_before_waits_until_the_table_begins(capsys):
    order, found = dict(rows=["fwd causal 32k"], without=[]), gpu_table.Measured(None)
    first = gpu_table.start([sys.executable, "-c", WORKER], order)
    time.sleep(1)
    assert first.poll() is None
    gpu_table.supervise(order, found, 30, time.monotonic() + 60, [sys.executable, "-c", "raise SystemExit(3)"], first)
    assert found.done == {"fwd causal 32k"} and found.rows["fwd causal 32k"]["cupy"]["tflops"] == 321.0
    assert gpu_table.start([sys.executable, "-c", WORKER], order).communicate("")[0] == ""  # nobody is left to tell


def test_the_table_stops_when_its_time_is_over():
    found = gpu_table.Measured(None)
    start = time.monotonic()
    gpu_table.supervise(dict(rows=["fwd causal 8k", "fwd causal 32k"], without=[]), found, 30, start + 2, [sys.executable, "-c", WORKER])
    assert time.monotonic() - start < 10 and "out of time" in found.rows["fwd causal 32k"]["row"]["failed"]


def test_rows_are_listed_without_a_gpu(capsys):
    assert gpu_table.main(["--list", "--only", "decompress"]) == 0
    assert capsys.readouterr().out.count("gpu/latent-") == 3
    assert gpu_table.main(["--only", "no such row"]) == 2


def test_shares_are_all_rows_once_and_are_read_together(tmp_path, capsys):
    names = [row.name for row in gpu_rows.ROWS]
    shares = [gpu_table.share(names, f"{n}/4") for n in (1, 2, 3, 4)]
    assert sorted(sum(shares, [])) == sorted(names) and max(map(len, shares)) - min(map(len, shares)) <= 1
    for n, part in enumerate(shares):
        events = [{"ceilings": {"bf16_tflops": 790.0}}, *({"row": name, "who": "cupy", "time_us": 1000.0 + n, "tflops": 100.0 + n, "gbs": 9} for name in part), *({"row": name, "who": "row", "done": True} for name in part)]
        (tmp_path / f"{n}.jsonl").write_text("\n".join(map(json.dumps, events)))
    late = {"row": names[0], "who": "row", "failed": "not measured: out of time"}
    (tmp_path / "before.jsonl").write_text(json.dumps(late))
    paths = [str(tmp_path / "before.jsonl"), *(str(tmp_path / f"{n}.jsonl") for n in range(4))]
    found = gpu_table.read(paths)
    assert found.done == set(names) and found.rows[names[6]]["cupy"]["tflops"] == 102.0 and "row" not in found.rows[names[0]]
    assert gpu_table.main(["--read", *paths]) == 0
    text = capsys.readouterr().out
    assert "not measured" not in text and all(name in text for name in names)
    with pytest.raises(SystemExit):
        gpu_table.main(["--share", "5/4", "--list"])


def test_a_report_counts_and_names_what_failed(tmp_path):
    from sparsetile.ci import report
    part = tmp_path / "1-of-1.xml"
    part.write_text('<testsuites><testsuite name="chip, torch 2" time="3.5"><testcase classname="tests.test_a" name="x[cupy]"/>'
                    '<testcase classname="tests.test_a" name="y"><failure message="AssertionError: off by one&#10;more"/></testcase>'
                    '<testcase classname="tests.test_b" name="z"><skipped message="cupy: D 577 is too wide"/></testcase></testsuite></testsuites>')
    text = report.summary([str(part)])
    assert text.splitlines()[:2] == ["chip, torch 2", "1 passed, 1 failed, 1 skipped in 1 part, 4 s of processes' time"]
    assert "failed test_a::y: AssertionError: off by one" in text and "1 cupy: D # is too wide" in text
    assert report.main([str(part)]) == 1


def test_stability_tells_ties_from_another_pick_and_a_timing_that_fails():
    from sparsetile.bench import stability
    entries = [{"config": {"n": n}, "band": 0.01, "ties": 2} for n in (1, 1, 2)]
    picks = [{"n": 1}, {"n": 2}]
    found = stability.summary(entries, picks, [100.0, 100.9], 0.01)
    assert found["same"] and found["timing_ok"] and [p["runs"] for p in found["picks"]] == [2, 1] and "the same up to ties" in stability.text(found)
    assert not stability.summary(entries, picks, [100.0, 103.0], 0.01)["same"]
    wide = stability.summary([{**entries[0], "band": 0.05}], picks[:1], [100.0], 0.01)
    assert not wide["timing_ok"] and "FAILS" in stability.text(wide)


def test_runs_of_stability_are_spread_over_the_devices(monkeypatch):
    from sparsetile.bench import stability
    begun, both = [], threading.Barrier(2, timeout=20)

    def one(workload, backend, device, seconds, seed, beside):
        if len(begun) < 2:  # two runs are at work at once, or the barrier breaks
            begun.append(device)
            both.wait()
        return {"config": {"seed": seed}, "time_us": 1.0, "ties": 1, "band": 0.01, "search": {"evaluated": 1, "feasible": 1}, "device": device, "beside": beside, "workload": workload}

    monkeypatch.setattr(stability, "one", one)
    found = stability.runs(["a", "b"], "triton", ["0", "1"], 1.0, 3)
    assert {name: [(e["workload"], e["config"]["seed"], e["beside"]) for e in entries] for name, entries in found.items()} == {name: [(name, seed, 2) for seed in range(3)] for name in "ab"}
    assert {e["device"] for entries in found.values() for e in entries} == {"0", "1"}


def test_native_sparse_attention_is_checked_and_timed(capsys):
    pytest.importorskip("torch")
    from sparsetile.bench import nsa
    assert nsa.main(["--quick", "--length", "400"]) == 0
    text = capsys.readouterr().out
    assert "6 queries of each branch within the policy" in text and all(f"\n{name} " in text for name in ("selected", "NSA, all", "dense, torch", "selected, backward"))


def test_the_check_of_native_sparse_attention_notices(monkeypatch):
    torch = pytest.importorskip("torch")
    from sparsetile.bench import nsa
    q, k, v, _ = nsa.inputs(torch, "cpu", 2100, 4, 2, 16)
    nsa.check(q, k, v, None)
    whole = nsa.importance_topk
    monkeypatch.setattr(nsa, "importance_topk", lambda q, k, lse, top_k, **o: whole(-q, k, lse, top_k, **o))
    with pytest.raises(AssertionError, match="blocks"):
        nsa.check(q, k, v, None)


def test_operations_of_native_sparse_attention_are_the_pairs():
    from sparsetile.bench import nsa
    from sparsetile.ops.patterns import Causal, Compressed, Window
    N = 3000
    for name, rule, S, each in (("compressed", Compressed(32, 16), (N - 32) // 16 + 1, 4), ("choice", Compressed(32, 16), (N - 32) // 16 + 1, 2), ("sliding", Window(511), N, 4), ("dense, torch", Causal(), N, 4)):
        assert nsa.operations(name, N, 6, 32) == each * rule.pairs(N, S, q_start=0) * 6 * 32


# ------------------------------------------------------------------------------------------------- selectors of each head, float8
def test_selectors_of_each_head_are_checked_and_timed(capsys, monkeypatch):
    torch = pytest.importorskip("torch")
    from sparsetile.bench import selectors
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the small size, on the CPU
    assert selectors.main(["--quick", "--only", "300"]) == 0
    text = capsys.readouterr().out
    assert text.count("64 queries of 4 heads within the policy") == 2 and "MoBA 32 x 3, N 300" in text and "exact top-24, N 300" in text
    assert [text.count(f"\n{name} ") for name in ("dense, torch", "dense, torch, backward", "choice, auto", "attention, auto", "backward, auto", "all, auto")] == [2, 2, 2, 2, 2, 1]


def test_the_check_of_selectors_notices(monkeypatch):
    torch = pytest.importorskip("torch")
    from sparsetile.bench import selectors
    q, k, v = selectors.inputs(torch, "cpu", 200, 4, 2, 16)
    chosen = selectors.moba_selection(q, k, block=32, top_k=3)
    attend = selectors.sparse_attention
    for wrong in (lambda q, k, v, s, backend: attend(q, k, v, replace(s, causal=False)), lambda q, k, v, s, backend: attend(q, k, v, s) + (q.detach() - q)):  # keys too many; a gradient too many
        monkeypatch.setattr(selectors, "sparse_attention", wrong)
        with pytest.raises(AssertionError, match="out|dq"):
            selectors.check(torch, q, k, v, chosen, None)


def test_float8_is_checked_and_timed(capsys, monkeypatch):
    torch = pytest.importorskip("torch")
    from sparsetile.bench import float8
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert float8.main(["--quick"]) == 0
    text = capsys.readouterr().out
    assert text.count("queries of 2 sequences and heads within the policy") == 2
    assert all(text.count(f"\n{name}  ") == 2 for name in ("torch, bfloat16", "auto, bfloat16", "auto, bfloat16 over float8", "auto, float8"))


@pytest.mark.parametrize("scale", ["q_scale", "k_scale", "v_scale"])
def test_the_check_of_float8_notices(scale):
    torch = pytest.importorskip("torch")
    from sparsetile.bench import float8
    _, (q, k, v), scales = float8.inputs(torch, "cpu", (1, 2, 1, 9, 140, 16))
    how = dict(pattern=float8.Causal(), backend="reference")
    float8.check("right", float8.sparse_attention(q, k, v, **how, **scales), q, k, v, scales)
    with pytest.raises(AssertionError, match="wrong"):
        float8.check("wrong", float8.sparse_attention(q, k, v, **how, **scales | {scale: 1.1 * scales[scale]}), q, k, v, scales)


# ---------------------------------------------------------------------------------------------------------------------- latent KV
def test_latents_are_checked_and_timed_and_rows_are_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pytest.importorskip("torch").cuda, "is_available", lambda: False)  # the small size, on the CPU
    from sparsetile.bench import latent
    assert latent.main(["--out", str(tmp_path / "out.jsonl")]) == 0
    kept = {(event["row"], event["who"]) for event in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    assert {("q W_UK B 1 T 40", "numba"), ("q W_UK + rotary B 5 T 1", "torch"), ("o W_UV B 5 T 1", "numba"), ("backward S 50", "numba"), ("backward S 50", "torch, both products")} <= kept
    text = capsys.readouterr().out
    assert all(f"\n{row:28} {who:24} " in text for row, who in kept)
    assert latent.main(["--budget", "0", "--only", "backward"]) == 0 and "TimeoutError: out of time" in capsys.readouterr().out


@pytest.mark.parametrize("name, what, broken", [("matmul", "o W_UV", lambda got: got.roll(1, -1)), ("latent_decompress", "dlatent", lambda got: (got[0] * 1.01, got[1]))])
def test_the_check_of_latents_notices(name, what, broken, monkeypatch, capsys):
    monkeypatch.setattr(pytest.importorskip("torch").cuda, "is_available", lambda: False)
    from sparsetile.bench import latent
    right = getattr(latent.latent, name)
    monkeypatch.setattr(latent.latent, name, lambda *x, **o: (broken if name != "matmul" or x[0].shape[3] == latent.SMALL["R"] else lambda got: got)(right(*x, **o)))
    assert latent.main([]) == 1 and f"AssertionError: {what} of numba: error" in capsys.readouterr().out


def test_rows_of_latents_that_are_measured_in_workers():
    pytest.importorskip("torch")
    from argparse import Namespace
    from sparsetile.bench import latent
    names = latent.table_rows(Namespace(quick=False, only=[]))
    assert len(names) == 21 and sum("decompress" in name for name in names) == 3 and len(latent.table_rows(Namespace(quick=True, only=[]))) == 16
    assert latent.table_rows(Namespace(quick=True, only=["32k"])) == [name for name in names if "32k" in name or name in ("latent decode h 128", "latent decode h 16")]


@pytest.mark.parametrize("asked, how", [(True, "graph"), (True, "events: RuntimeError: no graph may hold this"), (False, None)])
def test_graphs_are_timed_where_they_are_asked_for(asked, how, monkeypatch, capsys):
    """All calls of a row or none: the graphs if each could be recorded, else the calls, and why; from the command line to the worker and in bench.latent's own rows."""
    torch = pytest.importorskip("torch")
    from argparse import Namespace

    from sparsetile.autotune import graphs
    from sparsetile.bench import gpu_worker, latent
    orders, timed, calls = [], [], {"triton": lambda: None, "cupy": lambda: None}
    monkeypatch.setattr(gpu_table, "supervise", lambda order, *rest: orders.append(order))
    gpu_table.main(["--only", "merge", *["--graphs"] * asked])
    assert orders[0]["rows"] == ["merge 32k"] and orders[0]["graph"] == asked

    class Watch:
        def __init__(self, *about, **more):
            self.centre = min
    graphs_of = lambda given, device: (["a graph"] * len(given) if how == "graph" else None, how)  # noqa: E731
    for where, name, value in ((graphs, "record", graphs_of), (latent.timing, "finals", lambda watch, given, *rest: timed.append(given) or [[3.0] * 5 for _ in given]), (latent.timing, "Stopwatch", Watch),
                               (gpu_worker, "clock_mhz", lambda: None), (gpu_worker.tasks, "Task", lambda w, device: Namespace(workload=w, inputs=())), (gpu_worker.spot, "Judge", lambda task: None),
                               (gpu_worker.measure, "operations", lambda task: 0), (gpu_worker, "candidates", lambda task, order: [Namespace(name=name) for name in calls]),
                               (gpu_worker, "ready", lambda who, judge, row: (calls[who.name], {}, 3.0)), (gpu_worker, "moved", lambda task: 6000), (torch.cuda, "synchronize", lambda: None)):
        monkeypatch.setattr(where, name, value)
    gpu_worker.measured(next(row for row in gpu_rows.ROWS if row.name == "merge 32k"), Watch(), orders[0] | dict(seconds=0.1), stages := {})
    assert list(stages) == ["inputs_s", "truth_s", "calls_s"]
    found = gpu_table.Measured(None)
    assert latent.here(torch, "cuda", Namespace(graphs=asked, seconds=0.1, quick=True), found, [("a row", lambda: [("a row", 1, 6000, calls)])], time.monotonic() + 60) == 0
    said = [event for event in map(json.loads, (line for line in capsys.readouterr().out.splitlines() if line.startswith("{"))) if "time_us" in event]
    assert len(said) == 4 and {event.get("timed") for event in said} == {how} and timed == [["a graph"] * 2 if how == "graph" else list(calls.values())] * 2


def test_peers_that_are_not_installed_are_said():
    pytest.importorskip("torch")
    from sparsetile.bench import latent
    assert latent.absent({"ours": "sparsetile", "theirs": "no_such_module"}) == ["theirs: not installed (no module no_such_module), so no row of latent decode has it"]


# ------------------------------------------------------------------------------------------------------ DeepSeek sparse attention
def test_a_step_over_rows_of_bytes_is_checked_and_timed(monkeypatch, capsys):
    torch = pytest.importorskip("torch")
    from sparsetile.bench import gather
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gather.main(["--bytes"])
    line = capsys.readouterr().out
    assert line.startswith("     4 heads, 2 x 150, 40 keys: reference ") and line.endswith(" ms (calls)\n") and float(line.split("reference ")[1].split()[0]) > 0
    right = gather.sparse_attention
    monkeypatch.setattr(gather, "sparse_attention", lambda q, cache, v, chosen, **how: right(q, cache, v, gather.Selection(chosen.indices // 2), **how))
    with pytest.raises(AssertionError, match="sequence 0"):
        gather.main(["--bytes"])


def test_clustered_choices_stand_beside_random_ones_of_the_same_size(monkeypatch):
    pytest.importorskip("torch")
    from sparsetile.bench import gather
    checked, asked = [], []
    monkeypatch.setattr(gather, "check", lambda torch, backend, path, Hq: checked.append((backend, path, Hq)))
    monkeypatch.setattr(gather, "table", lambda torch, paths, sizes, quick: asked.append((paths, sizes)))
    gather.main(["--clustered", "--quick"])
    (paths, sizes), = asked
    assert {path for _, path in paths} == {None} and {(*one, Hq) for one in paths for Hq, _, _ in sizes} == set(checked)
    assert sizes[0::2] == [(Hq, S, None) for Hq, S, _ in sizes[1::2]] and all(pool for _, _, pool in sizes[1::2])


def test_the_tables_of_sparse_attention_are_rows():
    pytest.importorskip("torch")
    from sparsetile.bench import dsa
    names = [row.name for row in gpu_rows.ROWS]
    assert [name for rows in dsa.TABLES.values() for name in rows if name not in names] == []


def test_rows_of_sparse_attention_are_shared_and_read_together(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    from sparsetile.bench import dsa
    listed = lambda *more: (dsa.main(["--list", *more]), capsys.readouterr().out.splitlines())[1]  # noqa: E731
    assert sorted(sum((listed("--share", f"{n}/4") for n in (1, 2, 3, 4)), [])) == sorted(listed()) and len(listed("--no-tables")) + len(listed("--no-calls")) == len(listed())
    if torch.cuda.is_available():
        return
    files = [str(tmp_path / f"{n}.jsonl") for n in (1, 2)]
    for n, file in enumerate(files):
        assert dsa.main(["--quick", "--share", f"{n + 1}/2", "--out", file]) == 0
    found = gpu_table.read(files)
    assert {row: set(events) for row, events in found.rows.items()} == {f"prefill {S}": {"DSA numba", "dense numba"} for S in (128, 512)}
    capsys.readouterr()
    assert dsa.main(["--read", *files, "--only", "prefill 2048", "decode", "DSA h"]) == 0
    text = capsys.readouterr().out
    assert "prefill 2048" in text and "FlashMLA* 0.194" in text and "DSA h 128" in text and "top-k 4096" not in text
    lines = dsa.lines_of(found, ["prefill 128", "prefill 512"])
    assert " x" in lines[0] and lines[2].startswith("prefill: sparse is ")


@pytest.mark.parametrize("ratios, words", [
    ([(100, 0.5), (200, 0.75), (400, 1.25)], "is faster from 300 keys on"), ([(100, 1.0), (200, 2.0)], "is not slower at any length from 100 keys on"),
    ([(100, 2.0), (200, 0.9)], "is not faster at 200 keys"), ([(100, 1.5), (200, 0.5), (400, 1.5)], "is faster from 300 keys on")])
def test_the_crossover(ratios, words):
    pytest.importorskip("torch")
    from sparsetile.bench import dsa
    assert words in dsa.crossover(ratios)


@pytest.mark.parametrize("in_pages", (False, True))
def test_the_check_of_whole_calls_notices(in_pages, monkeypatch):
    torch = pytest.importorskip("torch")
    from sparsetile.bench import dsa
    right = dsa.dsa_latent_attention
    model, index = dsa.inputs(torch, "cpu", 2, 9, 40, **dsa.SMALL)
    truths, cached = dsa.known(model, index), dsa.in_pages(torch, model, index, 8) if in_pages else None
    for top_k in (6, 40):
        dsa.check(model, index, top_k, "numba", truths, cached)
        monkeypatch.setattr(dsa, "dsa_latent_attention", lambda *x, **o: right(*x, **dict(o, index_weights=o["index_weights"].flip(1))))  # another choice
        if top_k == 6:
            with pytest.raises(AssertionError, match="choice"):
                dsa.check(model, index, top_k, "numba", truths, cached)
        monkeypatch.setattr(dsa, "dsa_latent_attention", lambda *x, **o: (lambda out, chosen: (out.roll(1, -1), chosen))(*right(*x, **o)))
        with pytest.raises(AssertionError, match="out of query"):
            dsa.check(model, index, top_k, "numba", truths, cached)
        monkeypatch.setattr(dsa, "dsa_latent_attention", right)


def test_the_small_model_learns_what_each_phase_says():
    """Names are told once and asked with the value they were told with; the warm-up moves indexers alone, and towards what attention looks at."""
    torch = pytest.importorskip("torch")
    from sparsetile.bench import train_dsa
    (x, y), told = train_dsa.source("facts", 0)(3, 64), 48
    for b in range(3):
        names = [tuple(name) for name in x[b, :, :2].tolist()]
        assert len({*names[:told]}) == told and (y[b, :told] == -100).all()
        assert y[b, told:].tolist() == [int(x[b, names.index(name), 2]) for name in names[told:]] and (x[b, told:, 2] == train_dsa.VALUES).all()
    torch.manual_seed(0)
    model = train_dsa.Model("facts", 16, 2, 1, 4)
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if "indexer" not in name}
    indexers = [p for name, p in model.named_parameters() if "indexer" in name]
    look = lambda: float((model.set("warmup")(x), model.attentions()[0].divergence.detach())[1])  # noqa: E731
    first = look()
    train_dsa.train(model, "warmup", train_dsa.source("facts", 1), 12, lambda n: (2, 32), 1e-2, "cpu", indexers)
    assert look() < 0.8 * first and all(torch.equal(kept[name], p) for name, p in model.named_parameters() if name in kept)
    train_dsa.train(model, "training", train_dsa.source("facts", 1), 1, lambda n: (2, 32), 1e-2, "cpu")
    assert not any(torch.equal(kept[name], p) for name, p in model.named_parameters() if name in kept)


@pytest.mark.parametrize("fp8", (True, False))
def test_the_check_of_cached_decoding_notices(fp8):
    torch = pytest.importorskip("torch")
    from sparsetile.bench import dsa
    cache, indices = dsa.latent_cache(torch, "cpu", 2, 128, fp8), torch.stack([torch.randperm(128)[:40] for _ in range(2)]).int()[:, None, None]
    q = torch.randn(2, 3, 1, 576, dtype=torch.bfloat16)
    out = dsa.sparse_attention(q, cache, None, dsa.Selection(indices), value_width=512, backend="reference")
    dsa.check_cached(q, cache, indices, out)
    with pytest.raises(AssertionError, match="cached decode"):
        dsa.check_cached(q, cache, indices, out.roll(1, -1))


def test_the_check_of_cached_scores_notices(monkeypatch, tmp_path):
    torch = pytest.importorskip("torch")
    from types import SimpleNamespace

    from sparsetile.autotune import timing
    from sparsetile.bench import dsa
    found, right = gpu_table.Measured(None), dsa.indexer_scores
    call = lambda: dsa.cached_scores(torch, SimpleNamespace(seconds=0.01), found, "decode of scores, fp8 pages, h 4", ["numba"], timing.Stopwatch(None), device="cpu", B=2, S=128, page=16)  # noqa: E731
    call()
    assert found.rows["decode of scores, fp8 pages, h 4"]["numba"]["time_us"] > 0
    monkeypatch.setattr(dsa, "indexer_scores", lambda *x, **o: right(*x, **o).roll(1, -1))
    with pytest.raises(AssertionError, match="scores of sequence 0"):
        call()


def test_the_bench_of_sparse_attention_says_what_came_of_its_rows(tmp_path, capsys):
    """Rates and milliseconds each their way round; few heads beside 64; a backend alone is not held against the other."""
    pytest.importorskip("torch")
    from sparsetile.bench import dsa
    figures = {"DSA h 64": dict(cupy=600.0, triton=500.0), "DSA h 16": dict(cupy=230.0, triton=100.0), "DSA h 8": dict(cupy=140.0), "scores 2048 x 32k": dict(cupy=1120.0, triton=900.0)}
    times = {"top-k 4096 x 128k": dict(cupy=0.55, triton=0.9, torch=0.8), "decode of chosen tokens, fp8 pages, h 64": dict(cupy=0.1, triton=0.16), "scores + top-k": dict(cupy=9.0)}
    with open(tmp_path / "lines.jsonl", "w") as out:
        found = gpu_table.Measured(out)
        for rows, make in ((figures, lambda x: dict(time_us=1.0, tflops=x)), (times, lambda x: dict(time_us=1e3 * x, scratch_mb=46.0, timed="graphs"))):
            for row, who in rows.items():
                for name, x in who.items():
                    found.take(dict(row=row, who=name, clock_mhz=1500, **make(x)))
    assert dsa.main(["--read", str(tmp_path / "lines.jsonl")]) == 0
    text = capsys.readouterr().out
    assert "floors reached by the better backend: 4 of 5; not scores 2048 x 32k 1120 of 1130" in text
    assert "of its time: 2 of 5; not " in text and "DSA h 16 100 of 153" in text and "top-k 4096 x 128k 0.900 of 0.825" in text and "fp8 pages, h 64 0.160 of 0.150" in text
    assert "ours ahead of torch: 0 of 1; not top-k 4096 x 128k 0.900 of 0.800" in text and "goals: 1 of 5" in text
    assert "few heads beside 64, floors: 2 of 2" in text and "few heads beside 64, goals: 0 of 2; not DSA h 16 230 of 375, DSA h 8 140 of 150" in text
    assert "MB beyond inputs and outputs: 1 of 1" in text


def test_cost_of_density_is_a_line_or_said_not_to_be(tmp_path):
    """A straight line, a bent one, and a ragged length that costs more."""
    pytest.importorskip("torch")
    from sparsetile.bench import density
    pairs = {label: pattern.pairs(n, n) for label, (pattern, n) in density.cases().items()}
    found = {label: (n, 0.5 + 2e-8 * n) for label, n in pairs.items()}
    fit = density.line(found)
    assert fit["start_ms"] == pytest.approx(0.5) and fit["ms_of_1e9_pairs"] == pytest.approx(20) and fit["r2"] > 0.9999 and density.missed(fit) == []
    bent = density.line({label: (n, 1e-17 * n ** 2) for label, (n, _) in found.items()})
    ragged = density.line({**found, "ragged": (pairs["ragged"], 1.1 * found["whole"][1])})
    assert [text.split()[0] for text in density.missed(bent)] == ["r2"] and [text.split()[0] for text in density.missed(ragged)] == ["ragged_over_whole"]
    pytest.importorskip("matplotlib")
    density.plot({"forward cupy": {"times": found, "fit": fit}}, tmp_path / "density.png", "a GPU")
    assert (tmp_path / "density.png").stat().st_size > 1000


@pytest.mark.parametrize("direction, backend, quick", [("forward", "cupy", True), ("forward", "triton", False), ("backward", "cupy", False), ("backward", "triton", True), (None, None, True)])
def test_density_does_what_its_command_line_says(direction, backend, quick, monkeypatch, tmp_path):
    """At a small size, answered by the reference, with a clock of our own: the kernels and backends that the words name, checked, timed as long as they say, written and drawn."""
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    from sparsetile.bench import density

    class OnCpu(tasks.Task):
        def __init__(self, workload, device):
            assert device == 0
            super().__init__(replace(workload, sizes=tuple((axis, {"Hq": 2, "Hk": 2, "D": 16, "Dv": 8}.get(axis, size)) for axis, size in workload.sizes)), None)

        def bound(self, backend):
            asked.append((self.workload.kernel, backend))
            return super().bound("reference")

    class Clock:
        def __init__(self, device, flush_mb):
            self.centre = min

    def finals(watch, calls, seconds, most=40):
        timed.append((len(calls), seconds, most))
        return [[1e3 * (n + 1)] * 5 for n in range(len(calls))]
    asked, timed = [], []
    for where, name, value in ((density, "N", 96), (density, "BLOCK", 8), (density, "RAGGED", 75), (density.tasks, "Task", OnCpu), (density.timing, "Stopwatch", Clock), (density.timing, "finals", finals),
                               (density.torch.cuda, "get_device_name", lambda device: "a GPU")):
        monkeypatch.setattr(where, name, value)
    words = ["--quick"] * quick + (["--backend", backend, "--direction", direction] if backend else [])
    assert density.main([*words, "--out", str(tmp_path / "out")]) == 1  # no line goes through such times
    pairs = [(d, b) for d in ("forward", "backward") for b in ("cupy", "triton") if backend is None or (d, b) == (direction, backend)]
    kernels = dict(forward="block_attention", backward="block_attention_backward")
    assert list(dict.fromkeys(asked)) == [(kernels[d], b) for d, b in pairs] and timed == [(10, 0.5 if quick else 3.0, 40)] * len(pairs)
    found = json.loads((tmp_path / "out/density.json").read_text())["results"]
    assert list(found) == [f"{d} {b}" for d, b in pairs] and all(x["wrong"] == {} and len(x["times"]) == 10 and x["missed"] for x in found.values())
    assert (tmp_path / "out/density.png").stat().st_size > 1000


# -------------------------------------------------------------------------------------------------------------- other lengths
def test_the_front_has_every_pattern_at_every_length():
    """Nine patterns forward and backward at three lengths with 32 and 8 key heads, each once, and D 64 and D 192; a tenth of the blocks is a tenth at every length."""
    rows = [(row, row.make()) for row in (*gpu_rows.BLOCK, *gpu_rows.GRID)]
    shapes = {(row.like or row.name, w.kernel, w["S"], w["Hk"], w["D"]): row for row, w in rows}
    assert len(shapes) == len(rows) == 9 * 2 * 3 * 2 + 4 and len({w.name for _, w in rows}) == len(rows)
    square = [(row, w) for row, w in rows if "-d" not in w.name]
    assert all(w["T"] == w["S"] and w["Hq"] == 32 for _, w in square) and {(w["S"], w["Hk"]) for _, w in square} == {(n, heads) for n in gpu_rows.LENGTHS for heads in gpu_rows.KEY_HEADS}
    for _, w in square:
        rule, n = w.option("pattern"), w["S"]
        if "random" in w.name:
            assert 0.09 < rule.pairs(n, n) / n ** 2 < 0.1
        if "documents" in w.name:
            lengths = next(part.lengths for part in rule.parts if hasattr(part, "lengths"))
            assert len(lengths) > 2 and sum(lengths) == n


def test_a_variant_is_the_default_config_with_knobs_set(monkeypatch):
    pytest.importorskip("torch")
    from sparsetile.bench import gpu_worker
    task = tasks.Task(GPU["gpu/causal/8192/backward"], None, hollow=True)
    task.bound = lambda backend, config: (backend, config)
    kernel = dispatch.kernel("cupy", "block_attention_backward")
    monkeypatch.setattr(kernel, "default_config", lambda problem: dict(path="hopper", heads=8, sums=1))
    assert gpu_worker.varied(task, "cupy:sums=2,heads=4").make() == ("cupy", dict(path="hopper", heads=4, sums=2))
    for wrong in ("cupy:sums=3", "cupy:nothing=1"):
        with pytest.raises((StopIteration, KeyError)):
            gpu_worker.varied(task, wrong).make()


def test_the_floor_of_another_length_follows_the_peer_there():
    """cuDNN before FlexAttention; by the stored figure of the row that it varies, else by what this table says of it."""
    found, floor = gpu_table.Measured(None), lambda name: gpu_table.by_peer(found, gpu_rows.NAMED[name])  # noqa: E731
    for row, figures in {"fwd causal 128k Hk 8": dict(cuDNN=302.0, Flex=1.0, cupy=9.0), "bwd causal 8k Hk 8": dict(cuDNN=504.0), "fwd window 4096 8k Hk 32": dict(Flex=820.0), "fwd BigBird 128 8k Hk 8": dict(cuDNN=820.0),
                         "fwd window 1024": dict(Flex=270.0), "fwd window 1024 8k Hk 8": dict(Flex=135.0), "fwd causal 32k": dict(cuDNN=604.0)}.items():
        for who, rate in figures.items():
            found.take(dict(row=row, who=who, time_us=1.0, tflops=rate))
    assert floor("fwd causal 128k Hk 8") == pytest.approx(325) and floor("bwd causal 8k Hk 8") == pytest.approx(570) and floor("fwd window 4096 8k Hk 32") == pytest.approx(1280)
    assert floor("fwd BigBird 128 8k Hk 8") is None and floor("fwd window 1024 8k Hk 8") == pytest.approx(270) and floor("fwd causal 32k") == pytest.approx(650)


def test_the_front_says_what_came_of_its_rows(tmp_path, capsys):
    pytest.importorskip("torch")
    from sparsetile.bench import block_attention
    figures = {"fwd causal 32k": dict(cupy=700.0, triton=600.0, portable=500.0, Flex=430.0), "bwd causal 32k": dict(cupy=500.0, triton=490.0, portable=420.0, Flex=400.0)}
    with open(tmp_path / "lines.jsonl", "w") as out:
        found = gpu_table.Measured(out)
        for row, rates in figures.items():
            for who, rate in rates.items():
                found.take(dict(row=row, who=who, time_us=1.0, tflops=rate, clock_mhz=1500))
    assert block_attention.main(["--read", str(tmp_path / "lines.jsonl"), "--only", "gpu/causal/32768"]) == 0
    text = capsys.readouterr().out
    assert "portable  floor" in text and "1 of 2; not bwd causal 32k 500 of 560" in text and "of its time: 1 of 2; not fwd causal 32k 600 of 609" in text
    assert "goals: 0 of 2" in text and "(causal backward 1.05 x): 1 of 2; not fwd causal 32k 500 of 516" in text
    assert block_attention.main(["--list", "--only", "bigbird"]) == 0 and len(capsys.readouterr().out.splitlines()) == 12
    assert block_attention.main(["--only", "no such row"]) == 2


@pytest.mark.parametrize("name", ["causal", "window-1024", "documents", "longformer-512", "bigbird-128", "strided-128", "fixed-128"])
def test_flex_attention_gets_the_blocks_that_torch_makes(name):
    """Of the table's own patterns over 2048 tokens, some rows at a time."""
    torch = pytest.importorskip("torch")
    from torch.nn.attention.flex_attention import create_block_mask

    from sparsetile.bench import peers
    w, n = GPU[f"gpu/{name}/32768"], 2048
    sees = peers._sees(w.option("pattern"), replace(w, sizes=tuple((dict(w.sizes) | dict(T=n, S=n)).items())), "cpu")
    theirs, ours = create_block_mask(sees, None, None, n, n, device="cpu"), peers.block_mask(sees, n, n, "cpu", rows=384)
    for part in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices"):
        a, b = getattr(theirs, part), getattr(ours, part)
        assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b), part
    assert ours.seq_lengths == theirs.seq_lengths and ours.BLOCK_SIZE == theirs.BLOCK_SIZE


COMPILER = """
import os, time
class Compiler:
    def __init__(self, order):
        self.at = order["at"]
    def compile(self, name, compiled):
        with open(os.path.join(self.at, "said"), "a") as file:
            file.write(f"{name} {compiled}\\n")
        if name == "dies":
            os._exit(3)
        if name == "hangs" and not compiled:
            time.sleep(60)
        return {"Flex" if compiled else "cupy": os.environ["TORCHINDUCTOR_COMPILE_THREADS"]}
"""


@pytest.mark.parametrize("peers_only", [False, True])
def test_what_is_compiled_ahead_is_every_row_once(peers_only, tmp_path, monkeypatch, capfd):
    """Peers of torch.compile before our kernels, by as many processes as were asked for; what dies or does not end in time costs that row alone."""
    (tmp_path / "made_ahead.py").write_text(COMPILER)
    monkeypatch.syspath_prepend(tmp_path)
    start, names = time.monotonic(), ["a", "dies", "b", "hangs", "c"]
    gpu_table.ahead(dict(rows=names, at=str(tmp_path)), 2, start + 6, peers_only, "made_ahead:Compiler")
    said, printed = (tmp_path / "said").read_text().splitlines(), capfd.readouterr()
    assert time.monotonic() - start < 20 and sorted(said) == sorted(f"{name} {compiled}" for compiled in (True, False)[:1 if peers_only else 2] for name in names)
    assert {line.split()[1] for line in said[:3]} == {"True"}
    assert '{"row": "c", "who": "Flex", "ahead": "1"}' in printed.out and "dies, ahead: exit: status 3" in printed.err and ("hangs, ahead: hang" in printed.err) == (not peers_only)


def test_a_gradients_forward_is_compiled_with_our_kernels_of_it(monkeypatch):
    torch = pytest.importorskip("torch")
    from argparse import Namespace

    from sparsetile.bench import gpu_worker, peers
    made = []
    for where, name, value in ((torch.cuda, "init", lambda: None), (torch.cuda, "synchronize", lambda: None), (torch.cuda, "empty_cache", lambda: None),
                               (gpu_worker.tasks, "Task", lambda w, device, hollow: made.append(hollow) or Namespace(workload=w, inputs=[torch.zeros(()).expand(3)], hollow=hollow)),
                               (gpu_worker, "candidates", lambda task, order: [peers.Peer(name, lambda name=name: lambda: made.append((name, task.inputs[0].stride(0)))) for name in ("triton", "portable", "cuDNN", "Flex")])):
        monkeypatch.setattr(where, name, value)
    compiler = gpu_worker.Compiler({})
    assert [list(compiler.compile(*asked)) for asked in (("bwd causal 8k", True), ("bwd causal 8k", False), ("fwd causal 8k", False))] == [["Flex"], ["triton", "portable"], ["triton", "portable"]]
    assert made == [True, ("Flex", 1), False, ("triton", 0), ("portable", 0), True, ("triton", 1), ("portable", 1)]


def test_scores_of_every_kind_are_told_beside_normal_ones(capsys):
    torch = pytest.importorskip("torch")
    from sparsetile.bench import topk
    assert topk.main(["--quick"]) == 0
    names = [*topk.listed(torch), *topk.against(torch)]
    lines = capsys.readouterr().out.splitlines()
    for heading in (n for n, line in enumerate(lines) if line.startswith("top ")):
        assert [line[:28].rstrip() for line in lines[heading + 2:heading + 2 + len(names)]] == names
