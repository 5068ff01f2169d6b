"""Arrays of any framework as kernels take them, without a copy: NumPy, PyTorch, CuPy, JAX.

Framework, device, shape and element type are read without importing anything. NumPy goes by its array interface (bfloat16 and float8 as ml_dtypes), PyTorch by pointer, the rest by
DLPack. Where a call runs is places.py's.
"""
import sys
from functools import lru_cache

import ml_dtypes
import numpy as np

FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn")
ITEMSIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "int64": 8, "int32": 4, "uint32": 4, "int16": 2, "uint16": 2, "int8": 1, "uint8": 1, "bool": 1}
_NUMPY = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn)}


numpy_name = lru_cache(None)(lambda dtype: np.dtype(dtype).name)  # a dtype takes microseconds to say its name


def numpy_dtype(name: str) -> np.dtype:
    return _NUMPY.get(name) or np.dtype(name)


@lru_cache(None)
def torch_dtype(name: str):
    import torch
    return getattr(torch, name)


_TORCH_NAMES = {}  # torch.dtype -> name


def torch_name(dtype) -> str:
    name = _TORCH_NAMES.get(dtype)
    if name is None:
        name = _TORCH_NAMES[dtype] = str(dtype).removeprefix("torch.")
    return name


_FRAMEWORKS = {}  # type of an array -> its framework: asked a dozen times a call


def framework(x) -> str | None:
    """"numpy", "torch", "cupy", "jax", or None for what is no array of these."""
    kind = type(x)
    found = _FRAMEWORKS.get(kind)
    if found is None:
        found = _framework(x)
        if found is not None:
            _FRAMEWORKS[kind] = found
    return found


def _framework(x) -> str | None:
    root = type(x).__module__.partition(".")[0]
    if root in ("numpy", "torch", "cupy"):
        return root if hasattr(x, "shape") and hasattr(x, "dtype") else None
    if root in ("jax", "jaxlib"):
        return "jax" if hasattr(x, "shape") and hasattr(x, "dtype") else None
    if isinstance(x, np.ndarray):
        return "numpy"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        return "torch"
    return None


def dtype_name(x) -> str:
    dtype = x.dtype
    if type(dtype) is str:
        return dtype
    return torch_name(dtype) if type(dtype).__module__ == "torch" else numpy_name(dtype)


def device_of(x) -> int | None:
    """Index of the CUDA (or ROCm) device an array is on, None for the CPU."""
    name = framework(x)
    if name == "numpy":
        return None
    if name == "torch":
        if x.is_cuda:
            return x.device.index
        if x.device.type in ("cpu", "meta"):
            return None
        raise TypeError(f"device: expected cpu or cuda, got {x.device}; move the tensor with .to('cuda') or .cpu()")
    if name == "cupy":
        return x.device.id
    if type(x).__name__.endswith("Tracer"):  # under jit an array has no device yet
        return None
    device = next(iter(x.devices()))
    return device.local_hardware_id if device.platform in ("gpu", "cuda", "rocm") else None


class View:
    """Memory of a device as raw-pointer kernels take it. Strides count elements. `owner` keeps the memory alive."""
    __slots__ = ("ptr", "shape", "strides", "dtype", "device", "owner")

    def __init__(self, ptr, shape, strides, dtype, device, owner):
        self.ptr, self.shape, self.strides, self.dtype, self.device, self.owner = ptr, shape, strides, dtype, device, owner

    @property
    def itemsize(self):
        return ITEMSIZE[self.dtype]

    @property
    def ndim(self):
        return len(self.shape)

    @property
    def size(self):
        n = 1
        for extent in self.shape:
            n *= extent
        return n


def strides_of(x) -> tuple[int, ...]:
    """Strides in elements."""
    if isinstance(x, View):
        return x.strides
    name = framework(x)
    if name == "torch":
        return x.stride()
    if name == "jax":
        strides, step = [], 1
        for extent in reversed(x.shape):
            strides.append(step)
            step *= extent
        return tuple(reversed(strides))
    return tuple(s // x.dtype.itemsize for s in x.strides)


def view(x) -> View:
    name = framework(x)
    if name == "torch":
        x = held(x)
        return View(x.data_ptr(), x.shape, x.stride(), torch_name(x.dtype), x.get_device(), x)
    if name == "cupy":
        return View(x.data.ptr, x.shape, strides_of(x), dtype_name(x), x.device.id, x)
    if name == "jax":  # the producer's work must be done: the pointer carries no stream
        x = x.block_until_ready()
        return View(x.unsafe_buffer_pointer(), x.shape, strides_of(x), dtype_name(x), device_of(x), x)
    raise TypeError(f"expected an array on a CUDA device, got {type(x).__name__}; move it there with torch or CuPy first")


def held(x):
    """A tensor whose memory holds its values: itself, unless it is lazily negated, or stands for zeros and has no memory (autograd makes both). torch.compile cannot ask."""
    if sys.modules["torch"].compiler.is_compiling():
        return x
    return x.resolve_neg().clone() if x._is_zerotensor() else x.resolve_neg() if x.is_neg() else x


def cast(x, dtype: str):
    """The same values in another element type."""
    return x.to(torch_dtype(dtype)) if framework(x) == "torch" else x.astype(numpy_dtype(dtype))


def typed(x, dtype: str):
    """The same bytes as elements of another type; the last axis is contiguous and counts them."""
    return x.view(torch_dtype(dtype) if framework(x) == "torch" else numpy_dtype(dtype))


def as_numpy(x) -> np.ndarray:
    """A CPU array as NumPy sees it, sharing memory (bfloat16 and float8 as ml_dtypes)."""
    name = framework(x)
    if name == "numpy":
        return plain(x)
    if name == "torch":
        x = held(x.detach())
        kind = dtype_name(x)
        if kind in _NUMPY:
            import torch
            return x.view(torch.uint16 if kind == "bfloat16" else torch.uint8).numpy().view(_NUMPY[kind])
        return x.numpy()
    return np.asarray(x)


def plain(x: np.ndarray) -> np.ndarray:
    """The array itself; a copy if its elements are misaligned (a field of a record) or of the other byte order, which no kernel can read in place."""
    if x.flags.aligned and x.dtype.isnative:
        return x
    return np.array(x, x.dtype.newbyteorder("="))


def as_torch(x):
    """An array as a torch tensor sharing memory. Read-only NumPy arrays are fine: kernels never write into arguments."""
    import torch
    name = framework(x)
    if name == "torch":
        return held(x.detach())
    if name == "numpy":
        kind, x = dtype_name(x), plain(x)
        if any(s < 0 for s in x.strides):
            x = np.ascontiguousarray(x)
        if not x.flags.writeable:  # torch warns on read-only memory, and no kernel writes there
            x = np.lib.stride_tricks.as_strided(np.asarray(_Writable(x)).view(x.dtype), x.shape, x.strides) if x.size else x.copy()
        if kind in _NUMPY:
            return torch.from_numpy(x.view(np.uint16 if kind == "bfloat16" else np.uint8)).view(torch_dtype(kind))
        return torch.from_numpy(x)
    return torch.from_dlpack(x)


def as_cupy(x):
    import cupy
    return cupy.from_dlpack(x)


class _Writable:
    """The memory of a read-only array under a writable description."""

    def __init__(self, x):
        extent = sum((n - 1) * abs(s) for n, s in zip(x.shape, x.strides)) + x.dtype.itemsize if x.size else 0
        self.owner = x
        self.__array_interface__ = {"version": 3, "shape": (extent // x.dtype.itemsize,), "typestr": f"|V{x.dtype.itemsize}", "data": (x.ctypes.data, False)}


def unit_stride_within(x):
    """Weights [H,M,N] as they lie if one of the last two axes is contiguous, else one contiguous copy."""
    return x if 1 in strides_of(x)[-2:] or min(x.shape[-2:]) <= 1 and strides_of(x)[-1] == 1 else contiguous_last(x)


def contiguous_last(x):
    """The array itself if its last axis is contiguous (or has one element), else one contiguous copy."""
    if not x.shape or x.shape[-1] <= 1 or strides_of(x)[-1] == 1:
        return x
    name = framework(x)
    if name == "torch":
        return x.contiguous()
    if name == "numpy":
        return np.ascontiguousarray(x)
    cupy = sys.modules["cupy"]
    return cupy.ascontiguousarray(x)
