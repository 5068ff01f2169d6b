"""Tests call the public functions on any backend through this: NumPy arrays in and out, the backend named, never a fallback."""
from contextlib import contextmanager
from importlib import import_module
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from numeric import to_numpy

import sparsetile

# Tests marked interp run under TRITON_INTERPRET=1 in a process of their own, where only the Triton cases are taken.
EVERY = [pytest.param("reference", id="reference"), pytest.param("numba", id="numba"),
         pytest.param("triton", id="triton", marks=pytest.mark.interp), pytest.param("cupy", id="cupy")]
# For cases too large for the interpreter: Triton only where there is a GPU.
LARGE = [*EVERY[:2], pytest.param("triton", id="triton", marks=pytest.mark.gpu), EVERY[3]]
NUMPY = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn)}


def numpy_dtype(name):
    return NUMPY.get(name) or np.dtype(name)


@contextmanager
def through(name):
    """What stands inside calls this function, folder.module.function of the backends, at least once: a kernel that quietly takes another path fails."""
    module, _, function = f"sparsetile.backends.{name}".rpartition(".")
    module = import_module(module)
    with mock.patch.object(module, function, wraps=getattr(module, function)) as seen:
        yield
    assert seen.called, f"{name} was not called: another path was taken"


def to_torch(x, device="cpu"):
    import torch
    if x.dtype in NUMPY.values():
        bits, name = (np.int16, "bfloat16") if x.dtype.itemsize == 2 else (np.uint8, "float8_e4m3fn")
        return torch.from_numpy(x.view(bits).copy()).view(getattr(torch, name)).to(device)
    return torch.from_numpy(x).to(device)


class Driver:
    """One backend: `put` makes its arrays of NumPy ones, the methods are the public functions with that backend named."""

    def __init__(self, backend):
        self.backend = backend
        self.package = import_module(f"sparsetile.backends.{backend}")
        self.unavailable = self.package.unavailable()
        self.interpreted = backend == "triton" and self.package.interpreted()

    def put(self, x):
        if not isinstance(x, np.ndarray) or self.backend in ("reference", "numba"):
            return x
        return to_torch(x, "cpu" if self.interpreted else "cuda")

    def __getattr__(self, name):
        function = getattr(sparsetile, name)

        def call(*args, **kwargs):
            try:
                return function(*[self.put(a) for a in args], backend=self.backend, **{k: self.put(v) for k, v in kwargs.items()})
            except sparsetile.Unsupported as refusal:
                pytest.skip(f"{self.backend}: {refusal}")
        return call

    def selection(self, indices, lengths=None, **kwargs):
        return sparsetile.Selection(self.put(indices), lengths=self.put(lengths), **kwargs)

    def tensor(self, x, gradient=False):
        """A torch tensor where this backend computes on torch's memory."""
        x = to_torch(x, "cpu" if self.interpreted or self.backend in ("reference", "numba") else "cuda")
        return x.requires_grad_() if gradient else x


def arrays(*results):
    return tuple(None if x is None else to_numpy(x) for x in results)
