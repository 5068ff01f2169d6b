"""Devices: what each is, and what is current on it: the caller's stream, a thread's context."""
import contextlib
import os
import platform
import sys
import threading
from functools import lru_cache


class DeviceInfo:
    """Name, architecture and size of a device, read once."""

    def __init__(self, name, arch, sms, memory_gb, shared, l2_mb, vendor):
        self.name, self.arch, self.sms, self.memory_gb, self.shared, self.l2_mb, self.vendor = name, arch, sms, memory_gb, shared, l2_mb, vendor


def cpu_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@lru_cache(1)
def _cpu_name() -> str:
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
        return DeviceInfo(_cpu_name(), "cpu", cpu_count(), 0, 0, 0, "cpu")
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


# --------------------------------------------------------------------------------------------------------- streams and contexts
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


_THREAD = threading.local()


def has_context(device: int | None) -> bool:
    """Whether this thread has asked the runtime for something there."""
    return device in getattr(_THREAD, "devices", ())


def give_context(device: int, of_torch: bool) -> None:
    """A thread that is new, as autograd's is at first, has no context before it asks the runtime for something, and the driver's own calls (launches, tensor maps) want one."""
    if has_context(device):
        return
    if of_torch:
        import torch
        torch.cuda.mem_get_info(device)
    else:
        import cupy
        cupy.cuda.runtime.memGetInfo()
    _THREAD.devices = (*getattr(_THREAD, "devices", ()), device)


def is_current(device: int | None) -> bool:
    """Whether launches of this thread go to the device as it is: it is torch's current one, and the thread has a context."""
    return has_context(device) and _torch_device()() == device


def stream_of(caller: str, device: int | None) -> int:
    """The caller's current stream."""
    if device is None:
        return 0
    if caller == "torch":
        return _torch_stream()(device)
    import cupy
    return cupy.cuda.get_current_stream().ptr if caller == "cupy" else 0
