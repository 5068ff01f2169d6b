"""Raw CUDA C++ in .cu files, compiled by NVRTC, cached on disk, launched through CuPy."""
from functools import lru_cache
from importlib.util import find_spec

NATIVE = "view"


@lru_cache(1)
def unavailable() -> str | None:
    if not find_spec("cupy"):
        return "CuPy is not installed: pip install 'sparsetile[cuda13]' (or cuda12)"
    import cupy
    return None if cupy.cuda.is_available() else "CuPy sees no CUDA device"
