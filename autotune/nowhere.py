"""Triton's own launches without a device: tensors of torch's meta device, a driver that only says which chip it would be, and every launch ending after its
compilation. What is compiled is what the same call compiles on the chip, so its cache on disk holds it.
"""
import contextlib

from sparsetile.autotune import tasks
from sparsetile.backends import arrays, devices, places
from sparsetile.ops import dispatch


class Task(tasks.Task):
    """A task whose inputs have shapes, strides and types, and no memory."""

    def __init__(self, workload, device):
        super().__init__(workload, device, hollow=True)

    def filled(self, shape, dtype):
        import torch
        return torch.empty(tuple(shape), dtype=arrays.torch_dtype(dtype), device="meta")


class _Driver:
    """As much of Triton's driver as compiling asks for."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def _address(x) -> int:
    """An address as the device would give one: aligned, of its storage alone, the same for two views of one place."""
    return x.untyped_storage()._cdata * 256 + x.storage_offset() * x.element_size()


def settle(info) -> None:
    """From now on calls of this process compile for the device that `info` describes, and launch nothing. For a process that does nothing else: it is not undone."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from sparsetile.backends.triton import relaunch
    from sparsetile.ops import torch_ops
    if not info.arch.startswith("sm_"):
        raise RuntimeError(f"compiling ahead knows NVIDIA's chips, not {info.arch}")
    driver.set_active(_Driver(GPUTarget("cuda", int("".join(c for c in info.arch if c.isdigit())), 32)))
    launch, make = JITFunction.run, places.TorchPlace.__init__

    def place(self, caller, device, stream):
        make(self, caller, device, stream)
        self.target = torch.device("meta")
    JITFunction.run = lambda self, *args, grid, warmup, **rest: launch(self, *args, grid=grid, warmup=True, **rest)
    relaunch._KNOWN = False  # what never was launched cannot be launched again
    devices.device_info = lambda index: info
    arrays.device_of, devices.stream_of = lambda x: 0 if arrays.framework(x) == "torch" else None, lambda *_: 0
    places.TorchPlace.__init__, places.TorchPlace.guard = place, lambda self: contextlib.nullcontext()
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.Tensor.data_ptr = _address  # meta's is 0 for all, as if keys were values
    torch_ops.wanted = lambda *_: False  # its operators would answer for meta tensors by shape alone
    dispatch.package("triton").unavailable = lambda: None
