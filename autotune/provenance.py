"""Where an entry comes from: a digest of the kernel's code, the machine, the versions beside it."""
import ast
import contextlib
import hashlib
import inspect
import platform
import re
import subprocess
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from sparsetile.backends import devices

PACKAGES = ("sparsetile", "numpy", "numba", "torch", "triton", "cupy-cuda12x", "cupy-cuda13x", "optuna", "fla-core")
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.M)


@lru_cache(None)
def sources(path: Path) -> tuple[Path, ...]:
    """Every file of the backend's folder that a kernel's module is built from: itself, the modules of the folder that it imports, the .cu files that any of these
    names in a string (each variant is one), and the headers that those include; sorted."""
    folder, found, todo = path.parent, set(), [path]
    while todo:
        file = todo.pop()
        if file not in found:
            found.add(file)
            todo += _beside(folder, file)
    return tuple(sorted(found))


def _beside(folder: Path, file: Path) -> list[Path]:
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        return [folder / name for name in _INCLUDE.findall(text) if (folder / name).exists()]
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and f"backends.{folder.name}" in node.module:
            names |= {f"{name.name}.py" for name in node.names} | {f"{node.module.rpartition('.')[2]}.py"}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(f"{node.value}.cu")
    return [folder / name for name in sorted(names) if len(name) < 100 and (folder / name).is_file()]


def code(module) -> str:
    """A digest of the kernel's sources, its search space among them."""
    return of(Path(inspect.getfile(module)))


def of(module: Path) -> str:
    digest = hashlib.sha256()
    for path in sources(module):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:8]


def device(index) -> dict:
    info = devices.device_info(index)
    return {"name": info.name, "arch": info.arch, "sms": info.sms, "vendor": info.vendor, "mem_gb": info.memory_gb, "l2_mb": info.l2_mb, "smem_optin": info.shared}


def versions() -> dict:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def commit() -> str:
    """What runs: git's name of it, with -dirty where files differ; "unknown" outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # an installed package is part of no checkout, though it may lie inside one
        return "unknown"
    try:
        return subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=root).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def beside(backend: str, found: dict) -> str:
    """The versions that an entry of the backend depends on, in one word for the file's sake: every scalar of a profile is read by the first call."""
    packages = {"numba": ("numba",), "triton": ("torch", "triton"), "cupy": ("torch", "cupy-cuda12x", "cupy-cuda13x")}[backend]
    return ", ".join(f"{name} {found[name]}" for name in ("sparsetile", "python", *packages) if name in found)


def unit(index) -> str | None:
    """Which GPU of its model it is: the first digits of its identity; a CPU has none."""
    if index is None:
        return None
    import torch
    return str(getattr(torch.cuda.get_device_properties(index), "uuid", ""))[:8] or None
