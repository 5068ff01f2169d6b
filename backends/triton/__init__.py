"""Triton on CUDA and ROCm devices; under TRITON_INTERPRET=1 on CPU arrays, for tests."""
import os
from functools import lru_cache
from importlib.util import find_spec

NATIVE = "torch"


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "") in ("1", "true", "on")


@lru_cache(1)
def unavailable() -> str | None:
    if not find_spec("triton") or not find_spec("torch"):
        return "Triton needs triton and torch: pip install 'sparsetile[triton]'"
    if interpreted():
        return None
    import torch
    return None if torch.cuda.is_available() else "no GPU is visible to torch (set TRITON_INTERPRET=1 to interpret the kernels slowly on the CPU)"
