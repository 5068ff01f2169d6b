"""Tensors of a cache: made beside another array, written in place, read as another element type."""
import sys

from sparsetile.backends import arrays
from sparsetile.backends.contract import Unsupported
from sparsetile.ops import array_operators as xp
from sparsetile.ops import checks


def writable(name, x):
    """The array, if a cache can live in its framework."""
    checks.array(name, x)
    if arrays.framework(x) == "jax":
        raise Unsupported("a cache is written in place, and JAX arrays are immutable: keep the cache in NumPy, PyTorch or CuPy, or keep whole keys and values in JAX")
    return x


def float8(name, x):
    """The array, if its framework can read bytes as float8_e4m3fn."""
    if arrays.framework(writable(name, x)) == "cupy":
        raise Unsupported(f"{name}: CuPy has no arrays of float8_e4m3fn, so what such a cache stores could not be read; make it beside a PyTorch tensor: "
                          "torch.from_dlpack and cupy.from_dlpack share the memory of rows and queries")
    return x


def zeros(like, shape, dtype: str, value=0):
    """An array of one value beside `like`, in its framework and on its device."""
    name = arrays.framework(writable("like", like))
    if name == "torch":
        import torch
        return torch.full(shape, value, dtype=arrays.torch_dtype(dtype), device=like.device)
    if name == "cupy":
        with sys.modules["cupy"].cuda.Device(arrays.device_of(like)):
            return sys.modules["cupy"].full(shape, value, arrays.numpy_dtype(dtype))
    return xp.module(like).full(shape, value, arrays.numpy_dtype(dtype))


def put(target, host) -> None:
    """target[...] = a NumPy array of the host; the address stays, so that a captured CUDA graph reads it."""
    name = arrays.framework(target)
    if name == "torch":
        import torch
        target.copy_(torch.from_numpy(host))
    elif name == "cupy":
        target.set(host)
    else:
        target[...] = host


def pool(name, x, ndim, axes, dtypes):
    """An array that holds pages, checked: writable, of the right rank and type, contiguous, so that rows of all pages stand at one step."""
    checks.array(name, writable(name, x), ndim, axes, dtypes)
    strides, step = arrays.strides_of(x), 1
    for extent, stride in zip(reversed(x.shape), reversed(strides)):
        if extent > 1 and stride != step:
            raise ValueError(f"{name}: expected a contiguous array {axes}, got strides {list(strides)} of shape {list(x.shape)}; keep each pool in one piece")
        step *= extent
    if arrays.framework(x) == "torch" and arrays.held(x) is not x:
        raise TypeError(f"{name}: expected an array {axes} whose memory holds its values, for it is written in place, got a lazily negated view or zeros without memory; clone it first")
    if arrays.dtype_name(x) == "uint8" and (x.data_ptr() if arrays.framework(x) == "torch" else x.ctypes.data) % 4:
        raise ValueError(f"{name}: expected memory that starts at a multiple of 4 bytes, where float32 scales can stand, got a slice between; allocate the pool by itself")
    return x
