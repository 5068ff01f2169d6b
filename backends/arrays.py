"""Arrays of any framework as kernels take them, without a copy: NumPy, PyTorch, CuPy, JAX in; the caller's own type out.

`describe(x)` reads an array's framework, device, shape and element type without importing anything. A `Place` is where one call runs: it turns the
caller's arrays into a backend's native kind ("numpy", "torch" or "view"), allocates, and hands results back in the caller's type and on the caller's stream.
NumPy goes by its array interface (bfloat16 and float8 as ml_dtypes), PyTorch by pointer, the rest by DLPack.
"""
import contextlib
import math
import operator
import sys
import threading
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


def _torch_name(dtype) -> str:
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
    return _torch_name(dtype) if type(dtype).__module__ == "torch" else numpy_name(dtype)


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
        return View(x.data_ptr(), x.shape, x.stride(), _torch_name(x.dtype), x.get_device(), x)
    if name == "cupy":
        return View(x.data.ptr, x.shape, strides_of(x), dtype_name(x), x.device.id, x)
    if name == "jax":  # the producer's work must be done: the pointer carries no stream
        x = x.block_until_ready()
        return View(x.unsafe_buffer_pointer(), x.shape, strides_of(x), dtype_name(x), device_of(x), x)
    raise TypeError(f"expected an array on a CUDA device, got {type(x).__name__}; move it there with torch or CuPy first")


def as_numpy(x) -> np.ndarray:
    """A CPU array as NumPy sees it, sharing memory (bfloat16 and float8 as ml_dtypes)."""
    name = framework(x)
    if name == "numpy":
        return plain(x)
    if name == "torch":
        x = x.detach()
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
        return x.detach()
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


# ---------------------------------------------------------------------------------------------------------------- places
class Place:
    """Where one call runs. Subclasses: what `native` means and who allocates.

    device  index, None on the CPU      stream  pointer, 0 on the CPU       arch, sms  of the device
    """
    device = None
    stream = 0
    arch = "cpu"
    sms = 0

    def zeros(self, shape, dtype):
        return self.full(shape, dtype, 0)

    # Every place also has: native(x), the caller's array as the backend takes it; empty(shape, dtype) and full(shape, dtype, value); give(x), a native
    # result as the caller's own type; cast(x, dtype); upload(numpy array); concat(a, b) along the last axis; first_columns(x, n), the same memory;
    # weights(x), [H,M,N] native with either of the last two axes contiguous; add(a, b): a[..., :b's width] += b, returns a; packed(x), contiguous in all axes; rows(x, shape), [T] or [B,T] as a packed [B,T]

    def guard(self):
        """A context in which the device and the caller's stream are current for the backend's launches."""
        return contextlib.nullcontext()

    def noted(self, call):
        """What a kernel calls to launch. Here it is `call`; a Recorder (tape.py) also notes its arguments."""
        return call


_LEFT = {}  # size -> memory of results that nobody holds any more, the latest last
MOST_LEFT = 64 << 20  # bytes


class _Lines:
    """Memory in whole cache lines; when the last array over it is gone it waits for a result of the same size. A kernel's first touch of new pages costs more than
    a tenth of a sparse call, and several times that on a virtual machine whose host takes back what is free."""

    def __init__(self, memory):
        self.memory, self.__array_interface__ = memory, memory.__array_interface__

    def __del__(self):
        size = len(self.memory)
        if size <= MOST_LEFT:
            _LEFT.setdefault(size, []).append(self.memory)
            for old in list(_LEFT):  # in the order in which sizes came
                if sum(each * len(waiting) for each, waiting in list(_LEFT.items())) > MOST_LEFT:
                    _LEFT.pop(old, None)


def _in_lines(shape, dtype, make):
    """make(shape, dtype) on the CPU, but a large array begins on a cache line (NumPy begins 16 bytes behind one, and every vector that is stored would straddle two), in
    memory that a result before it left, if one of its size did. If none did, what waits is given back: memory waits for calls that repeat their shapes."""
    size = math.prod(shape) * dtype.itemsize
    if size < 1 << 16:
        return make(shape, dtype)
    try:
        memory = _LEFT[size].pop()  # one step: another thread may ask for it
        if make is np.zeros:
            memory.fill(0)
    except (KeyError, IndexError):
        _LEFT.clear()
        memory = make(size + 64, np.uint8)
        first = -memory.__array_interface__["data"][0] % 64
        memory = memory[first:first + size]
    return np.asarray(_Lines(memory)).view(dtype).reshape(shape)


class NumpyPlace(Place):
    """CPU kernels on NumPy arrays; the caller may hold NumPy, torch or JAX arrays."""

    def __init__(self, caller: str):
        self.caller = caller
        self.sms = _cpu_count()

    def native(self, x):
        return contiguous_last(as_numpy(x))

    def weights(self, x):
        return unit_stride_within(as_numpy(x))

    def empty(self, shape, dtype):
        return _in_lines(shape, numpy_dtype(dtype), np.empty)

    def zeros(self, shape, dtype):
        return _in_lines(shape, numpy_dtype(dtype), np.zeros)  # new pages are zero already

    def full(self, shape, dtype, value):
        return np.full(shape, value, numpy_dtype(dtype))

    def cast(self, x, dtype):
        return x.astype(numpy_dtype(dtype), copy=False)

    def upload(self, x):
        return x

    def concat(self, a, b):
        return np.concatenate((a, b), -1)

    def first_columns(self, x, n):
        return x[..., :n]

    def packed(self, x):
        return np.ascontiguousarray(x)

    def rows(self, x, shape):
        return np.ascontiguousarray(np.broadcast_to(x, shape))

    def add(self, a, b):
        a[..., :b.shape[-1]] += b
        return a

    def give(self, x):
        if self.caller == "torch":
            return as_torch(x)
        if self.caller == "jax":
            import jax.numpy as jnp
            return jnp.asarray(x)
        return x


class TorchPlace(Place):
    """Triton kernels on torch tensors; the caller may hold torch, CuPy or JAX arrays (NumPy under the interpreter)."""

    def __init__(self, caller: str, device: int | None, stream: int):
        import torch
        self.torch, self.caller, self.device, self.stream = torch, caller, device, stream
        self.target = torch.device("cpu") if device is None else torch.device("cuda", device)
        info = device_info(device)
        self.arch, self.sms = info.arch, info.sms

    def native(self, x):
        if type(x) is self.torch.Tensor and not x.requires_grad and x.stride()[-1:] == (1,):
            return x
        return contiguous_last(as_torch(x))

    def weights(self, x):
        return unit_stride_within(as_torch(x))

    address = staticmethod(operator.methodcaller("data_ptr"))

    def empty(self, shape, dtype):
        return self.torch.empty(shape, dtype=torch_dtype(dtype), device=self.target)

    def full(self, shape, dtype, value):
        return self.torch.full(shape, value, dtype=torch_dtype(dtype), device=self.target)

    def cast(self, x, dtype):
        return x.to(torch_dtype(dtype))

    def upload(self, x):
        return as_torch(x).to(self.target)

    def concat(self, a, b):
        return self.torch.cat((a, b), -1)

    def first_columns(self, x, n):
        return x[..., :n]

    def packed(self, x):
        return x.contiguous()

    def rows(self, x, shape):
        return x.expand(shape).contiguous()

    def add(self, a, b):
        a[..., :b.shape[-1]] += b
        return a

    def give(self, x):
        if self.caller == "torch":
            return x
        if self.caller == "numpy":
            return as_numpy(x)
        if self.caller == "cupy":
            return _to_cupy(x)
        import jax
        if self.device is not None:
            self.torch.cuda.current_stream(self.device).synchronize()  # JAX knows nothing of our stream
        return jax.dlpack.from_dlpack(x)

    @contextlib.contextmanager
    def _switch(self):
        cuda = self.torch.cuda
        stream = cuda.ExternalStream(self.stream, device=self.target) if self.stream else cuda.default_stream(self.target)  # torch takes a pointer of 0 for none: a stream of its own
        with cuda.device(self.device), cuda.stream(stream):
            yield

    def guard(self):
        if self.device is not None:
            _with_context(self.device, True)
        if self.device is None or self.caller == "torch" and is_current(self.device):
            return _NOTHING
        return self.torch.cuda.device(self.device) if self.caller == "torch" else self._switch()


class ViewPlace(Place):
    """Raw CUDA kernels on pointers; memory comes from torch for a torch caller, else from CuPy."""

    def __init__(self, caller: str, device: int, stream: int):
        self.caller, self.device, self.stream = caller, device, stream
        info = device_info(device)
        self.arch, self.sms = info.arch, info.sms
        if caller == "torch":
            import torch
            self.torch, self.target = torch, torch.device("cuda", device)
        else:
            import cupy
            self.cupy = cupy

    def native(self, x):
        if self.caller == "torch":
            strides = x.stride()
            if not strides or strides[-1] == 1:
                return View(x.data_ptr(), x.shape, strides, _torch_name(x.dtype), self.device, x)
        return view(contiguous_last(x))

    def weights(self, x):
        return view(unit_stride_within(x))

    def empty(self, shape, dtype):
        if self.caller == "torch":
            x = self.torch.empty(shape, dtype=torch_dtype(dtype), device=self.target)
            return View(x.data_ptr(), x.shape, x.stride(), dtype, self.device, x)
        return view(self.cupy.empty(shape, numpy_dtype(dtype)))

    def full(self, shape, dtype, value):
        if self.caller == "torch":
            return view(self.torch.full(shape, value, dtype=torch_dtype(dtype), device=self.target))
        return view(self.cupy.full(shape, value, numpy_dtype(dtype)))

    def cast(self, x, dtype):
        if x.dtype == dtype:
            return x
        return view(x.owner.to(torch_dtype(dtype)) if self.caller == "torch" else x.owner.astype(numpy_dtype(dtype)))

    def upload(self, x):
        return view(as_torch(x).to(self.target) if self.caller == "torch" else self.cupy.asarray(x))

    def concat(self, a, b):
        if self.caller == "torch":
            return view(self.torch.cat((a.owner, b.owner), -1))
        a, b = self.cupy.asarray(a.owner), self.cupy.asarray(b.owner)
        return view(self.cupy.concatenate((a, b), -1))

    def first_columns(self, x, n):
        return View(x.ptr, (*x.shape[:-1], n), x.strides, x.dtype, x.device, x.owner)

    def packed(self, x):
        return view(x.owner.contiguous() if self.caller == "torch" else x.owner if self.caller == "jax" and not isinstance(x.owner, self.cupy.ndarray) else self.cupy.ascontiguousarray(x.owner))

    def rows(self, x, shape):
        if tuple(x.shape) == tuple(shape):
            return self.packed(x)
        if self.caller == "torch":
            return view(x.owner.expand(shape).contiguous())
        return view(self.cupy.ascontiguousarray(self.cupy.broadcast_to(self.cupy.asarray(x.owner), shape)))

    def add(self, a, b):
        a.owner[..., :b.shape[-1]] += b.owner
        return a

    def give(self, x):
        if self.caller != "jax":
            return x.owner
        import jax
        self.cupy.cuda.ExternalStream(self.stream).synchronize()  # JAX knows nothing of our stream
        return jax.dlpack.from_dlpack(x.owner)

    def _is_current(self) -> bool:
        """Whether CuPy's calls go to the device and the stream as they are; asking the runtime which one is current gives a thread no context."""
        return self.device in getattr(_THREAD, "devices", ()) and self.cupy.cuda.runtime.getDevice() == self.device and self.cupy.cuda.get_current_stream().ptr == self.stream

    @contextlib.contextmanager
    def _switch(self):
        import cupy
        with cupy.cuda.Device(self.device):
            _with_context(self.device, False)
            if self.stream:
                with cupy.cuda.ExternalStream(self.stream, self.device):
                    yield
            else:
                yield

    def guard(self):
        if self.caller != "torch":
            return _NOTHING if self._is_current() else self._switch()
        _with_context(self.device, True)
        return _NOTHING if is_current(self.device) else self.torch.cuda.device(self.device)


class DeviceInfo:
    """Name, architecture and size of a device, read once."""

    def __init__(self, name, arch, sms, memory_gb, shared, l2_mb, vendor):
        self.name, self.arch, self.sms, self.memory_gb, self.shared, self.l2_mb, self.vendor = name, arch, sms, memory_gb, shared, l2_mb, vendor


def _cpu_count() -> int:
    import os
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@lru_cache(1)
def _cpu_name() -> str:
    import platform
    with contextlib.suppress(OSError):
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith(("model name", "Model Name", "Hardware")):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@lru_cache(None)
def device_info(device: int | None) -> DeviceInfo:
    """What a device is; None is the CPU."""
    if device is None:
        return DeviceInfo(_cpu_name(), "cpu", _cpu_count(), 0, 0, 0, "cpu")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        p = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            return DeviceInfo(p.name, p.gcnArchName.partition(":")[0], p.multi_processor_count, p.total_memory >> 30, 65536, p.L2_cache_size >> 20, "amd")
        return DeviceInfo(p.name, cuda_arch(p.major, p.minor), p.multi_processor_count, p.total_memory >> 30, p.shared_memory_per_block_optin, p.L2_cache_size >> 20, "nvidia")
    import cupy
    p = cupy.cuda.runtime.getDeviceProperties(device)
    return DeviceInfo(p["name"].decode(), cuda_arch(p["major"], p["minor"]), p["multiProcessorCount"], p["totalGlobalMem"] >> 30, p["sharedMemPerBlockOptin"], p["l2CacheSize"] >> 20, "nvidia")


def cuda_arch(major: int, minor: int) -> str:
    """The name whose instructions we may use: Hopper's own need the "a"."""
    return "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"


def _to_cupy(x):
    import cupy
    return cupy.from_dlpack(x)


@lru_cache(1)
def _torch_stream():
    """device -> pointer of torch's current stream; the raw call spares making a Stream object, 4 us."""
    import torch
    return getattr(torch._C, "_cuda_getCurrentRawStream", None) or (lambda device: torch.cuda.current_stream(device).cuda_stream)


@lru_cache(1)
def _torch_device():
    """() -> torch's current device; torch.cuda.current_device() first asks whether CUDA was initialised, which arrays on it prove."""
    import torch
    return getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


_NOTHING = contextlib.nullcontext()
_THREAD = threading.local()


def _with_context(device: int, of_torch: bool) -> None:
    """A thread that is new, as autograd's is at first, has no context before it asks the runtime for something, and the driver's own calls (launches, tensor maps) want one."""
    known = getattr(_THREAD, "devices", ())
    if device in known:
        return
    if of_torch:
        import torch
        torch.cuda.mem_get_info(device)
    else:
        import cupy
        cupy.cuda.runtime.memGetInfo()
    _THREAD.devices = (*known, device)


def is_current(device: int | None) -> bool:
    """Whether launches of this thread go to the device as it is: it is torch's current one, and the thread has a context."""
    return device in getattr(_THREAD, "devices", ()) and _torch_device()() == device


def stream_of(caller: str, device: int | None) -> int:
    """The caller's current stream."""
    if device is None:
        return 0
    if caller == "torch":
        return _torch_stream()(device)
    import cupy
    return cupy.cuda.get_current_stream().ptr if caller == "cupy" else 0


_PLACES = {}


def place_for(native: str, caller: str, device: int | None) -> Place:
    """The place of a call: by the backend's native kind, the caller's framework, the device and the caller's current stream."""
    stream = stream_of(caller, device)
    key = (native, caller, device, stream)
    place = _PLACES.get(key)
    if place is None:
        if len(_PLACES) > 256:  # streams come and go
            _PLACES.clear()
        make = {"numpy": lambda: NumpyPlace(caller), "torch": lambda: TorchPlace(caller, device, stream), "view": lambda: ViewPlace(caller, device, stream)}
        place = _PLACES[key] = make[native]()
    return place
