"""Numba on the CPU: explicit LLVM vectors, threads by query block, results independent of the number of threads."""
from importlib.util import find_spec

NATIVE = "numpy"


def unavailable() -> str | None:
    return None if find_spec("numba") else "Numba is not installed: pip install numba"
