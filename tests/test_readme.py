"""What the README shows is tried: its Python runs, its commands are there, its matrix is what the kernels say."""
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sparsetile.autotune import cli, matrix, tasks
from sparsetile.backends.contract import KERNELS
from sparsetile.ops import dispatch

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
COMMANDS = [line.partition("  #")[0].strip() for block in re.findall(r"^```bash\n(.*?)^```", README, re.M | re.S) for line in block.splitlines()] + \
    [c for c in re.findall(r"`([^`\n]+)`", README) if c.startswith("sparsetile ")]


def test_frameworks_are_shown():
    assert len(BLOCKS) >= 4 and all(any(f"import {name}" in block for block in BLOCKS) for name in ("torch", "numpy", "jax"))


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split()[1])
def test_python_blocks_run(block):
    for name in re.findall(r"^import (torch|jax)$", block, re.M):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install 'sparsetile[{name}]'")
    got = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert got.returncode == 0 and got.stdout.strip(), got.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist(command):
    words = shlex.split(command)
    if words[0] != "sparsetile":
        assert (ROOT / words[0]).is_file()
        return
    args = cli._parser().parse_args(words[1:])  # ends the process where an option is unknown
    names = getattr(args, "workloads", []) + [getattr(args, "workload", None)]
    assert {*names} <= {w.name for w in tasks.workloads()} | {*KERNELS, None}


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert "CONTRIBUTING.md" in links and [link for link in links if "://" not in link and not (ROOT / link).is_file()] == []


def test_matrix_is_the_kernels_own():
    pytest.importorskip("triton", reason="asking Triton's kernels needs triton: pip install 'sparsetile[triton]'")
    if dispatch.package("triton").interpreted():
        pytest.skip("under TRITON_INTERPRET=1 kernels answer for the interpreter")
    assert matrix.section(README)[1] == matrix.markdown(), "the README's matrix is old: python -m sparsetile.autotune.matrix README.md"


def test_the_matrix_notices(monkeypatch):
    """A kernel that starts to refuse, or one that is gone, changes the answer."""
    before = matrix.ask("topk", "numba")
    assert before == (["float32"], [])
    monkeypatch.setattr(dispatch.kernel("numba", "topk"), "supports", lambda problem: "no rows at all; use another day" if problem["S"] > 2 ** 20 else None)
    kinds, refused = matrix.ask("topk", "numba")
    assert kinds == ["float32"] and [sentence for sentence, _, _ in refused] == ["no rows at all; use another day"]
    monkeypatch.setattr(dispatch, "has_kernel", lambda backend, name: False)
    assert matrix.ask("topk", "numba") is None
