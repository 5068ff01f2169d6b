"""The few operators that NumPy, PyTorch, CuPy and JAX spell differently, for code that runs on an array wherever it lies.

Everything stays on the array's device. Host constants are uploaded once per device and kept, so a second call may stand inside a CUDA graph.
"""
from functools import lru_cache

import numpy as np


def kind(x) -> str:
    """"torch", "cupy", "jax" or "numpy"."""
    name = type(x).__module__.partition(".")[0]
    return {"jaxlib": "jax"}.get(name, name) if name in ("torch", "cupy", "jax", "jaxlib") else "numpy"


def module(x):
    """The namespace of x: numpy, torch, cupy or jax.numpy."""
    name = kind(x)  # import statements, which torch.compile can trace
    if name == "torch":
        import torch as lib
    elif name == "cupy":
        import cupy as lib
    elif name == "jax":
        import jax.numpy as lib
    else:
        lib = np
    return lib


def on_device(x) -> bool:
    """Whether x lies outside host memory."""
    name = kind(x)
    if name == "torch":
        return x.device.type != "cpu"
    if name == "jax":
        return any(device.platform != "cpu" for device in x.devices()) if hasattr(x, "devices") else False
    return name == "cupy"


def same_kind(*values):
    """Python integers become arrays of the others' framework and device; all integers become NumPy."""
    like = next((v for v in values if kind(v) != "numpy"), None)
    if like is None:
        return tuple(np.asarray(v) for v in values)
    return tuple(v if kind(v) == kind(like) else constant(np.asarray(v), like) for v in values)


class _Constant:
    """A NumPy array as a dictionary key: by content."""

    def __init__(self, array):
        self.array = np.ascontiguousarray(array)
        self.key = (self.array.shape, self.array.dtype.str, self.array.tobytes())

    def __hash__(self):
        return hash(self.key)

    def __eq__(self, other):
        return self.key == other.key


@lru_cache(256)
def _torch_constant(constant: _Constant, device):
    import torch
    return torch.from_numpy(constant.array.copy()).to(device)


@lru_cache(256)
def _cupy_constant(constant: _Constant, device):
    import cupy
    with cupy.cuda.Device(device):
        return cupy.asarray(constant.array)


def constant(array: np.ndarray, like):
    """The NumPy array in the framework and on the device of `like`; the upload is remembered."""
    name = kind(like)
    if name == "torch":
        return _torch_constant(_Constant(array), like.device)
    if name == "cupy":
        return _cupy_constant(_Constant(array), like.device.id)
    if name == "jax":
        import jax.numpy as jnp
        return jnp.asarray(array.astype(np.int32) if array.dtype == np.int64 else array)
    return array


def rank(ends: np.ndarray, x):
    """How many of the sorted host values `ends` are <= x, elementwise."""
    name = kind(x)
    if name == "torch":
        import torch
        return torch.searchsorted(constant(ends.astype(np.int64), x), x.to(torch.int64).contiguous(), right=True)
    if name == "numpy":
        return np.searchsorted(ends, x, side="right")
    return module(x).searchsorted(constant(ends, x), x, side="right")


def lookup(table: np.ndarray, *index):
    """table[index] for index arrays that broadcast and are in range."""
    if kind(index[0]) == "torch":
        return constant(table, index[0])[tuple(i.long() for i in index)]
    return constant(table, index[0])[index]


def stack(arrays, axis: int):
    """Arrays of one framework, broadcast against each other and joined along a new axis."""
    lib = module(arrays[0])
    arrays = lib.broadcast_tensors(*arrays) if kind(arrays[0]) == "torch" else lib.broadcast_arrays(*arrays)
    return lib.stack(list(arrays), axis)


# ------------------------------------------------------------------------------------------------ making arrays beside another one
def arange(like, *bounds):
    """int32 of arange(*bounds) beside `like`."""
    lib = module(like)
    return lib.arange(*bounds, dtype=lib.int32, **_beside(like))


def full(like, shape, value, dtype="int32"):
    """An array of one value beside `like`."""
    lib = module(like)
    return lib.full(shape, value, dtype=getattr(lib, dtype), **_beside(like))


def _beside(like):
    return {"device": like.device} if kind(like) == "torch" else {}


def astype(x, dtype: str):
    """x as dtype: "int32", "int64", "uint8", "bool", "float32" or "float64"."""
    lib = module(x)
    return x.to(getattr(lib, dtype)) if kind(x) == "torch" else x.astype(dtype)


def as_type_of(x, like):
    """x in the element type of `like`, of the same framework."""
    return x.to(like.dtype) if kind(x) == "torch" else x.astype(like.dtype)


def wide(x):
    """x as float64 if it is float64, else as float32."""
    return astype(x, "float64" if "float64" in str(x.dtype) else "float32")


def zeros_of(like, shape):
    """Zeros in the element type of `like`, beside it."""
    return module(like).zeros(shape, dtype=like.dtype, **_beside(like))


def constant_of(x):
    """x as a constant of differentiation: a choice made from it carries no gradient."""
    return x.detach() if kind(x) == "torch" else x


def running(x, axis: int):
    """Inclusive running sum of integers along an axis, int32."""
    lib = module(x)
    return lib.cumsum(x, axis, dtype=lib.int32)


def total(x, axis: int):
    """Sum of integers along an axis, int32 (wrapping)."""
    lib = module(x)
    return lib.sum(x, axis, dtype=lib.int32)


def lowest(x, axis: int):
    return x.amin(axis) if kind(x) == "torch" else x.min(axis)


def highest(x, axis: int):
    return x.amax(axis) if kind(x) == "torch" else x.max(axis)


def scatter(size: int, index, values, fill: int = 0):
    """int32 [size], `fill` where nothing lands; entries whose index is outside 0..size-1 are dropped. Equal indices carry equal values."""
    lib = module(index)
    index = lib.where((index >= 0) & (index < size), index, size).reshape(-1)
    values = lib.broadcast_to(values, index.shape) if values.ndim == 0 else values.reshape(-1)
    out = full(index, (size + 1,), fill)
    if kind(index) == "torch":
        out.scatter_(0, index.long(), values.to(lib.int32))
    elif kind(index) == "jax":
        out = out.at[index].set(values)
    else:
        out[index] = values
    return out[:size]


def argsort(x):
    """Indices that sort the last axis, equal values in their order, int32."""
    name = kind(x)
    if name == "torch":
        import torch
        return torch.argsort(x, dim=-1, stable=True).to(torch.int32)
    return (np.argsort(x, -1, kind="stable") if name == "numpy" else x.argsort(-1)).astype("int32")  # CuPy's and JAX's are stable


def along(x, index):
    """x[..., index] along the last axis; all other axes are equal, the index is in range."""
    lib = module(x)
    return lib.take_along_dim(x, index.long(), -1) if kind(x) == "torch" else lib.take_along_axis(x, index, -1)


def add_rows(rows: int, index, values):
    """Sums [B,H,rows,D] of values [B,C,H,n,D] by their rows index [B,C,H,n], which differ within one [b,c,h] (-1 is the last row, where more may meet); the order of additions is fixed."""
    B, C, H, _, D = values.shape
    b, h = arange(index, B)[:, None, None], arange(index, H)[:, None]
    out = module(values).zeros((B, H, rows, D), dtype=values.dtype, **_beside(values))
    if kind(values) == "torch":  # in sorted order, on CUDA too
        b, h = b[:, None].expand(index.shape), h.expand(index.shape)
        return out.index_put((b.long(), h.long(), index.long()), values, accumulate=True)
    for c in range(C):
        if kind(values) == "jax":
            out = out.at[b, h, index[:, c]].add(values[:, c])
        else:
            out[b, h, index[:, c]] += values[:, c]
    return out


def take_rows(x, heads, index):
    """x [B,H,N,D] at rows index [B,C,Hq,n] of the heads [Hq]: [B,C,Hq,n,D]. An index below 0 takes some row."""
    b = arange(index, int(index.shape[0]))[:, None, None, None]
    return x[b.long(), heads[:, None].long(), index.long()] if kind(x) == "torch" else x[b, heads[:, None], index]


def to_numpy(x) -> np.ndarray:
    """A host copy, from any framework."""
    name = kind(x)
    return x.detach().cpu().numpy() if name == "torch" else x.get() if name == "cupy" else np.asarray(x)
