"""The command line: every command, --help that teaches, --json for machines, exit codes."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sparsetile.autotune import cli, commands
from sparsetile.backends import devices

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("demo", "tune", "bench", "warmup", "doctor", "explain", "pattern", "catalogue", "recommend", "plan")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSETILE_CACHE_DIR", str(tmp_path))


def test_python_m_and_no_command_show_help():
    got = subprocess.run([sys.executable, "-m", "sparsetile"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert got.returncode == 2 and all(c in got.stdout for c in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0 and "--json" in capsys.readouterr().out


def test_doctor_says_what_the_driver_does(monkeypatch, tmp_path):
    from sparsetile.autotune import doctor
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\ncase \"$1 $2\" in\n'--id=3 --query-gpu='*) echo '1410, 1980, 71, 0x0000000000000004, Enabled';;\n'--id=3 --query-compute-apps='*) printf '12\\n13\\n';;\n*) exit 9;;\nesac\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    state = doctor._state(1)
    assert doctor._now(state) == ", 1410 of 1980 MHz, 71 C, slowed by 0x0000000000000004, ECC enabled, 2 processes compute on it"
    assert doctor.busy(1).startswith("2 processes compute on GPU 1 already") and doctor.busy(0) is None is doctor.busy(None)
    assert doctor._now({**state, "slowed_by": "0x0000000000000001"}).count("slowed") == 0 and doctor._state(None) == {} == doctor._state(0)


def test_doctor(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["backends"]["numba"] is None and report["devices"][0]["index"] is None
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "numba      runs" in text and "cupy" in text


def test_doctor_says_which_variables_no_call_can_obey(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSETILE_BACKEND_SPARSE_ATENTION", "numba")
    monkeypatch.setenv("SPARSETILE_BACKEND_GATHER_ATTENTION", "numba")
    monkeypatch.setenv("SPARSETILE_BACKEND_PAGE_ROWS", "numba")  # can be obeyed
    monkeypatch.setenv("SPARSETILE_BACKEND_TOPK", "cuda")
    monkeypatch.setenv("SPARSETILE_TUNE", "yes"), monkeypatch.setenv("SPARSETILE_TUNE_SECONDS", "soon")
    monkeypatch.setenv("SPARSETILE_PROFILE_DIR", str(tmp_path / "none"))
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["environment"]["SPARSETILE_BACKEND_TOPK"] == "cuda" and len(report["mistakes"]) == 6
    assert all(any(sentence.startswith(f"{name}: expected") for sentence in report["mistakes"]) for name in ("SPARSETILE_BACKEND_SPARSE_ATENTION", "SPARSETILE_BACKEND_TOPK", "SPARSETILE_TUNE", "SPARSETILE_TUNE_SECONDS", "SPARSETILE_PROFILE_DIR"))
    assert any(s.startswith("SPARSETILE_BACKEND_GATHER_ATTENTION: ") and s.endswith("; of this kernel SPARSETILE_BACKEND_SPARSE_ATTENTION is read") for s in report["mistakes"])
    assert cli.main(["doctor"]) == 0 and report["mistakes"][0] in capsys.readouterr().out


def test_a_gpu_without_torch_is_refused_in_words(capsys, monkeypatch):
    monkeypatch.setattr(commands, "find_spec", lambda name: None)
    for words in (["explain", "--device", "0"], ["tune", "--device", "0"], ["tune", "--device", "all"], ["bench", "--device", "0"]):
        assert cli.main(words) == 1 and "--device: expected torch" in capsys.readouterr().err


def test_pattern_counts_and_draws(capsys, tmp_path):
    path = tmp_path / "mask.png"
    assert cli.main(["pattern", "Window(3) | Sink(1)", "--tokens", "16", "--json", "--plot", str(path)]) == 0
    report = json.loads(capsys.readouterr().out)
    picture = report["picture"]
    assert report["pairs"] == sum(row.count("#") for row in picture) and picture[10] == "#......####....."
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["__import__('os')", "Window(", "Window(3) + Sink(1)", "Blocks(3)", "Window(x)", "3"])
def test_pattern_evaluates_nothing(text, capsys):
    assert cli.main(["pattern", text]) == 1
    assert "sparsetile pattern:" in capsys.readouterr().err


def test_explain(capsys):
    assert cli.main(["explain", "cpu/topk-32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["backend"] == "numba" and set(found["reasons"]) == {"triton", "cupy", "reference"}
    assert cli.main(["explain", "cpu/topk-32", "--backend", "cupy", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["backend"] is None and set(found["reasons"]) == {"triton", "cupy", "numba", "reference"} and "cupy" in found["source"]


def test_tune_list_and_bench(capsys):
    assert cli.main(["tune", "--list", "--json"]) == 0
    names = [json.loads(line)["name"] for line in capsys.readouterr().out.splitlines()]
    assert "cpu/causal/4096" in names and len(names) == len(set(names))
    assert cli.main(["bench", "cpu/topk-32", "--seconds", "0.1", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert any(r["who"] == "numba" and r.get("time_us", 0) > 0 for r in rows)


def test_lists_of_a_device_that_is_not_here(capsys):
    assert cli.main(["tune", "topk", "--list", "--device", "0", "--json"]) == 0
    assert all(json.loads(line)["name"].startswith("gpu/") for line in capsys.readouterr().out.splitlines())


def test_bench_says_why_a_backend_was_not_timed(capsys):
    assert cli.main(["bench", "cpu/topk-32", "--seconds", "0.1"]) == 0
    assert "not timed: cupy: cupy computes on CUDA devices" in capsys.readouterr().out


def test_bench_times_the_default_beside_a_tuned_config(capsys, monkeypatch, tmp_path):
    """A profile with another config than the kernel's own: two rows of one backend."""
    from sparsetile.autotune import store, tasks
    from sparsetile.ops import dispatch
    from sparsetile.profiles import lookup
    task = tasks.Task(tasks.find("cpu/window-256/4096"), None)
    entry = {"key": lookup.key_of(task.problem), "backend": "numba", "config": {"block_q": 32, "block_k": 64}, "time_us": 10.0}
    store.add(tmp_path / "mine", "block_attention", {"name": devices.device_info(None).name, "arch": "cpu"}, entry, {}, {})
    monkeypatch.setenv("SPARSETILE_PROFILE_DIR", str(tmp_path / "mine"))
    lookup.forget(), dispatch.clear_plans()
    assert cli.main(["bench", "cpu/window-256/4096", "--seconds", "0.1", "--json"]) == 0
    timed = [row["who"] for row in map(json.loads, capsys.readouterr().out.splitlines()) if "time_us" in row]
    assert timed[:2] == ["numba", "numba (default config)"]


@pytest.mark.parametrize("text, kept, of", [("Full()", 1, 1), ("PerHead([Window(3), Causal(), Causal()])", 2, 2), ("Causal()", 1, 1)])
def test_pattern_counts_the_blocks_kept(text, kept, of, capsys):
    assert cli.main(["pattern", text, "--json"]) == 0
    blocks = json.loads(capsys.readouterr().out)["blocks"]
    assert (blocks["kept"], blocks["of"]) == (kept, of)


@pytest.mark.parametrize("arguments", [["tune", "no-such-workload"], ["tune", "page_rows"], ["tune", "--list", "--device", "0", "indexer_scores_backward"], ["explain", "no-such-workload"], ["tune", "--device", "x"], ["bench", "--device", "99"]])
def test_mistakes_are_one_sentence(arguments, capsys):
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"sparsetile {arguments[0]}: ") and "Traceback" not in error


def test_errors_as_json(capsys):
    assert cli.main(["explain", "no-such-workload", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"] == "ValueError"


def test_unknown_command_is_usage():
    with pytest.raises(SystemExit) as stop:
        cli.main(["fly"])
    assert stop.value.code == 2


def test_warmup_compiles_each_kernel_and_says_what_is_refused(capsys):
    assert cli.main(["warmup", "cpu/topk-32", "merge_attention", "--backend", "numba", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0]["workload"] == "cpu/topk-32" and len(rows) > 1 and all(row["backend"] == "numba" and row["seconds"] >= 0 for row in rows)
    assert cli.main(["warmup", "cpu/topk-32", "--backend", "cupy"]) == 1
    assert "cupy" in capsys.readouterr().out
