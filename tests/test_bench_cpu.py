"""The CPU's benchmarks run: tiny sizes, every part once."""
import json

import pytest

pytest.importorskip("numba"), pytest.importorskip("torch")
from sparsetile.bench import cpu, cpu_cases, train_cpu  # noqa: E402


def test_a_case_is_measured_and_judged():
    case = cpu_cases.Case("dense", *cpu_cases.attention("dense", 256, 32, both=True), floor=1e-6, goal=1e-7)
    row = cpu.measure(case, 0)
    assert row["peer"] == "SDPA" and row["ours_ms"] > 0 and 0 < row["of_peak"] < 2 and row["verdict"] == "MISSES ITS FLOOR"
    assert case.name in cpu.line(row) and json.dumps(row)


def test_every_row_can_be_made():
    names = [make().name for make in [*cpu_cases.targets((64,)), *cpu_cases.sweep((1024,), (64,))]]
    assert len(set(names)) == len(names) > 20
    for N, D, heads in ((256, 32, (8, 1)),):
        for call in (*cpu_cases.decode(N, D, heads)[0]().values(), *cpu_cases.selection(N, D, 4, 16, heads)[0]().values()):
            assert call().shape[-1] == D


def test_growth_and_memory():
    row, = cpu.growth([1024], 0.0)
    assert row["forward_ms"] > 0 and row["both_ms"] > row["forward_ms"] / 2 and (row["both_extra_mb"] is None or row["both_extra_mb"] < 100)


def test_training(tmp_path, capsys):
    train_cpu.main(["--out", str(tmp_path), "--steps", "3", "--context", "64", "--long", "128", "--rounds", "1", "--batch", "1"])
    assert "million parameters" in capsys.readouterr().out
    assert json.loads((tmp_path / "train_cpu.json").read_text())["parameters"] > 2e6 and (tmp_path / "train_cpu.png").stat().st_size > 1000
