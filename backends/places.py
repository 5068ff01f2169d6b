"""Places: where one call runs. A place turns the caller's arrays into a backend's native kind ("numpy", "torch" or "view"), allocates, and hands results back in the caller's type
and on the caller's stream.
"""
import contextlib
import operator

import numpy as np

from sparsetile.backends import devices
from sparsetile.backends.arrays import View, as_cupy, as_numpy, as_torch, contiguous_last, held, numpy_dtype, torch_dtype, torch_name, unit_stride_within, view
from sparsetile.backends.host_memory import in_lines

_NOTHING = contextlib.nullcontext()


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


class NumpyPlace(Place):
    """CPU kernels on NumPy arrays; the caller may hold NumPy, torch or JAX arrays."""

    def __init__(self, caller: str):
        self.caller = caller
        self.sms = devices.cpu_count()

    def native(self, x):
        return contiguous_last(as_numpy(x))

    def weights(self, x):
        return unit_stride_within(as_numpy(x))

    def empty(self, shape, dtype):
        return in_lines(shape, numpy_dtype(dtype), np.empty)

    def zeros(self, shape, dtype):
        return in_lines(shape, numpy_dtype(dtype), np.zeros)  # new pages are zero already

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
        info = devices.device_info(device)
        self.arch, self.sms = info.arch, info.sms

    def native(self, x):
        if type(x) is self.torch.Tensor and not x.requires_grad and x.stride()[-1:] == (1,):
            return held(x)
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
            return as_cupy(x)
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
            devices.give_context(self.device, True)
        if self.device is None or self.caller == "torch" and devices.is_current(self.device):
            return _NOTHING
        return self.torch.cuda.device(self.device) if self.caller == "torch" else self._switch()


class ViewPlace(Place):
    """Raw CUDA kernels on pointers; memory comes from torch for a torch caller, else from CuPy."""

    def __init__(self, caller: str, device: int, stream: int):
        self.caller, self.device, self.stream = caller, device, stream
        info = devices.device_info(device)
        self.arch, self.sms = info.arch, info.sms
        if caller == "torch":
            import torch
            self.torch, self.target = torch, torch.device("cuda", device)
        else:
            import cupy
            self.cupy = cupy

    def native(self, x):
        if self.caller == "torch":
            x, strides = held(x), x.stride()
            if not strides or strides[-1] == 1:
                return View(x.data_ptr(), x.shape, strides, torch_name(x.dtype), self.device, x)
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
        return devices.has_context(self.device) and self.cupy.cuda.runtime.getDevice() == self.device and self.cupy.cuda.get_current_stream().ptr == self.stream

    @contextlib.contextmanager
    def _switch(self):
        import cupy
        with cupy.cuda.Device(self.device):
            devices.give_context(self.device, False)
            if self.stream:
                with cupy.cuda.ExternalStream(self.stream, self.device):
                    yield
            else:
                yield

    def guard(self):
        if self.caller != "torch":
            return _NOTHING if self._is_current() else self._switch()
        devices.give_context(self.device, True)
        return _NOTHING if devices.is_current(self.device) else self.torch.cuda.device(self.device)


_PLACES = {}


def place_for(native: str, caller: str, device: int | None) -> Place:
    """The place of a call: by the backend's native kind, the caller's framework, the device and the caller's current stream."""
    stream = devices.stream_of(caller, device)
    key = (native, caller, device, stream)
    place = _PLACES.get(key)
    if place is None:
        if len(_PLACES) > 256:  # streams come and go
            _PLACES.clear()
        make = {"numpy": lambda: NumpyPlace(caller), "torch": lambda: TorchPlace(caller, device, stream), "view": lambda: ViewPlace(caller, device, stream)}
        place = _PLACES[key] = make[native]()
    return place
