"""The house: who may import whom, what importing costs, what the wheel holds."""
import ast
import os
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
    shared = target.startswith(("backends.contract", "backends.arrays"))
    return shared or len(inside) > 1 and target.startswith(f"backends.{inside[0]}")


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
