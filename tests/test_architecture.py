"""The house: who may import whom, what importing costs, what the wheel holds."""
import ast
import importlib
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("sparsetile", "ops", "systems", "relatives", "backends", "autotune", "catalogue", "profiles", "ci", "bench")
HEAVY = ("torch", "triton", "cupy", "numba", "optuna", "jax", "matplotlib", "rich", "scipy")
# room -> rooms whose modules it may import
MAY = {"profiles": {"profiles", "backends.contract"}, "ops": {"ops", "profiles", "backends"}, "systems": {"systems", "ops", "backends.contract"},
       "relatives": {"relatives", "ops.array_operators", "ops.checks", "backends.arrays", "backends.contract"},
       "autotune": {"autotune", "ops", "profiles", "backends", "systems", "relatives"},
       "catalogue": {"catalogue", "systems", "relatives", "autotune", "ops", "profiles", "backends"},
       "sparsetile": {"sparsetile", "autotune.cli"}, "ci": set(ROOMS), "bench": set(ROOMS)}


# the files beside the backends' folders, and which of them each may import; a kernel may import the first two
BESIDE = {"contract": (), "arrays": (), "devices": (), "host_memory": (), "places": ("arrays", "devices", "host_memory"), "tape": ("arrays",)}


def modules():
    for room in ROOMS:
        yield from sorted((ROOT / room).rglob("*.py"))


def imported(path: Path):
    """Dotted names that a file imports, at the top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{name.name}" for name in node.names)


def allowed(path: Path, name: str) -> bool:
    room, target = path.relative_to(ROOT).parts[0], name.removeprefix("sparsetile.")
    if room != "backends":
        return any(target == may or target.startswith(may + ".") for may in MAY[room])
    inside = path.relative_to(ROOT / "backends").parts
    beside = BESIDE[path.stem] if len(inside) == 1 and path.stem != "__init__" else ("contract", "arrays")
    return target.startswith(tuple(f"backends.{name}" for name in beside)) or len(inside) > 1 and target.startswith(f"backends.{inside[0]}")


@pytest.mark.parametrize("path", list(modules()), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    ours = [name for name in imported(path) if name.startswith("sparsetile.")]
    assert [name for name in ours if not allowed(path, name)] == []


def test_the_layer_test_notices():
    assert not allowed(ROOT / "backends/numba/topk.py", "sparsetile.ops.indexer.topk")
    assert not allowed(ROOT / "backends/numba/topk.py", "sparsetile.backends.reference.topk.run")
    assert not allowed(ROOT / "ops/indexer.py", "sparsetile.autotune.tune.tune")
    assert not allowed(ROOT / "relatives/linear.py", "sparsetile.ops.attention.sparse_attention")
    assert not allowed(ROOT / "ops/attention.py", "sparsetile.systems.moba") and not allowed(ROOT / "systems/moba.py", "sparsetile.backends.numba.topk.run")
    assert not allowed(ROOT / "profiles/lookup.py", "sparsetile.ops.dispatch")
    assert not allowed(ROOT / "backends/cupy/topk.py", "sparsetile.backends.places.ViewPlace") and not allowed(ROOT / "backends/arrays.py", "sparsetile.backends.places.Place")
    assert allowed(ROOT / "backends/places.py", "sparsetile.backends.devices") and allowed(ROOT / "backends/cupy/topk.py", "sparsetile.backends.cupy.operands.strides")


def test_optuna_is_imported_in_one_place():
    users = {str(p.relative_to(ROOT)) for p in modules() if any(name.partition(".")[0] == "optuna" for name in imported(p))}
    assert users == {"autotune/search.py"}


def fresh(code: str, **env):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120, env={**os.environ, **env})


def test_importing_the_package_imports_no_framework():
    got = fresh(f"import sys, sparsetile; assert sparsetile.Causal; print([m for m in {HEAVY} if m in sys.modules])")
    assert got.returncode == 0 and got.stdout.strip() == "[]", got.stderr


def test_importing_the_ops_imports_no_framework():
    got = fresh("import sys, sparsetile; sparsetile.sparse_attention; sparsetile.indexer_topk; sparsetile.latent_attention; "
                f"print([m for m in {HEAVY} if m in sys.modules])")
    assert got.returncode == 0 and got.stdout.strip() == "[]", got.stderr


EVERY_OP = """
import sys
import numpy as np
import sparsetile as st
x, lse = np.linspace(-1, 1, 2 * 16 * 16, dtype=np.float32).reshape(1, 2, 16, 16), np.zeros((1, 2, 16), np.float32)
entries = st.Selection(np.arange(48, dtype=np.int32).reshape(1, 1, 16, 3) % 16)
for backend in ("numba", "reference"):
    calls = dict(
        sparse_attention=lambda **o: [st.sparse_attention(x, x, x, rule, **o) for rule in (st.Causal() & (st.Window(3) | st.Sink(1)), st.Causal().layout(16, 16, 64, 64), entries, entries & st.Window(5))],
        merge_attention=lambda **o: st.merge_attention([x, x], [lse, lse], **o), indexer_scores=lambda **o: st.indexer_scores(x, x[:, 0], lse, **o), indexer_topk=lambda **o: st.indexer_topk(x, x[:, 0], lse, 3, **o),
        topk=lambda **o: st.topk(x[0], 3, **o), importance_topk=lambda **o: st.importance_topk(x, x, lse, 3, **o), latent_decompress=lambda **o: st.latent_decompress(x[0], x[0], x[0], k_rope=x[0], **o),
        latent_attention=lambda **o: [st.latent_attention(x, x, x[0][:1], x[0][:1], x[0], x[0], st.Causal(), mode=mode, **o) for mode in ("absorbed", "decompressed")])
    for name, call in calls.items():
        assert call(backend=backend) is not None and call() is not None, name
assert st.explain("sparse_attention", x, x, x).backend == "numba" and "#" in st.Causal().plot(4).replace("█", "#")
print([m for m in ("torch", "triton", "cupy", "jax", "optuna", "matplotlib", "scipy") if m in sys.modules], {name for name, home in st._HOME.items() if home in ("ops.attention", "ops.merge", "ops.indexer", "ops.importance", "ops.latent")} == {*calls})
"""


def test_every_op_runs_without_any_extra(tmp_path):
    """A Python that has the four dependencies and nothing else: the site's own packages are out of reach."""
    needed = re.search(r"^dependencies = (.*)$", (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert set(re.findall(r'"(\w+)>=', needed)) == {"numpy", "ml_dtypes", "pyyaml", "numba"}
    for name in ("numpy", "ml_dtypes", "yaml", "numba", "llvmlite"):
        for part in Path(importlib.import_module(name).__file__).parent.parent.glob(f"{name}*"):
            (tmp_path / part.name).symlink_to(part)
    got = subprocess.run([sys.executable, "-S", "-c", EVERY_OP], capture_output=True, text=True, cwd=tmp_path, timeout=300, env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert got.returncode == 0 and got.stdout.strip() == "[] True", got.stderr
    got = subprocess.run([sys.executable, "-S", "-m", "sparsetile", "doctor"], capture_output=True, text=True, cwd=tmp_path, timeout=100, env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert got.returncode == 0 and "numba      runs" in got.stdout and "pip install 'sparsetile[" in got.stdout, got.stderr


def test_import_is_quick():
    best = min(_import_seconds() for _ in range(5))
    assert best < 0.3, f"import sparsetile took {best:.3f} s"


def _import_seconds() -> float:
    got = fresh("import time; t = time.perf_counter(); import sparsetile; print(time.perf_counter() - t)")
    return float(got.stdout)


def test_every_public_name_loads():
    import sparsetile
    for name in sparsetile.__all__:
        assert getattr(sparsetile, name) is not None
    assert not {*ROOMS[1:]} & {*sparsetile.__all__}, "importing a room would hide the public name"


def test_the_wheel_holds_the_tree(tmp_path):
    start = time.monotonic()
    got = subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path, ROOT], capture_output=True, text=True, timeout=300)
    assert got.returncode == 0, got.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    held = {n.removeprefix("sparsetile/") for n in names if n.startswith("sparsetile/")}
    tracked = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", *ROOMS], capture_output=True, text=True, cwd=ROOT).stdout.split() or \
        [str(p.relative_to(ROOT)) for room in ROOMS for p in (ROOT / room).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    kept = (".py", ".cu", ".cuh", ".yaml", "schema.json", ".txt", "TEXT.md", "py.typed")
    wanted = {n.removeprefix("sparsetile/") for n in tracked if n.endswith(kept) and not n.startswith("bench/results/")}  # results stay with the source
    missing, extra = sorted(wanted - held), sorted(n for n in held - wanted if "__pycache__" not in n)
    assert missing == [] and extra == [], (missing, extra, time.monotonic() - start)
