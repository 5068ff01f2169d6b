"""A place on which the CuPy backend's kernels run on the CPU: g++ instead of NVRTC, fibers instead of threads (cuda_on_cpu.hpp).

    place = CpuPlace();  out, lse = block_attention.run(place.put(q), ..., place=place, config=...);  place.get(out)
"""
import ctypes
import hashlib
import os
import shutil
import struct
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
from sparsetile.backends.arrays import View, dtype_name, numpy_dtype
from sparsetile.backends.cupy import compile as nvrtc

HERE = Path(__file__).parent
CXX = shutil.which("g++")


class Emulated:
    """One kernel, called as compile.Function is."""

    def __init__(self, library, name, fields):
        library = ctypes.CDLL(str(library))
        self.entry, self.report = getattr(library, f"emulate_{name}"), library.emulate_report
        self.report.restype = ctypes.c_char_p
        self.pack = struct.Struct("@" + fields)

    def __call__(self, grid, threads, shared, stream, *values):
        x, y, z = (grid, 1, 1) if type(grid) is int else grid
        buffer = ctypes.create_string_buffer(self.pack.size + 16)
        self.pack.pack_into(buffer, 0, *values)
        if x and y and z and self.entry(x, y, z, threads, shared, buffer):
            raise AssertionError(self.report().decode())


class CpuPlace:
    device, stream, arch, sms, caller = 0, 0, "sm_80", 4, "numpy"
    refused = None  # a source that must not be asked for

    def __init__(self, folder=None):
        self.folder = Path(folder or os.environ.get("SPARSETILE_CACHE_DIR") or Path.home() / ".cache" / "sparsetile") / "emulated"

    def compile(self, source, name, fields, defines):
        assert source != self.refused
        key = hashlib.sha256((HERE / "cuda_on_cpu.hpp").read_bytes() + (HERE / "hopper_on_cpu.hpp").read_bytes() + repr(sorted(defines.items())).encode())
        for path in nvrtc.sources(source):
            key.update(path.read_bytes())
        library = self.folder / f"{source}-{name}-{key.hexdigest()[:24]}.so"
        if not library.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            main = self.folder / f"{library.stem}-{os.getpid()}.cpp"
            main.write_text(f'#include "{nvrtc.FOLDER}/{source}.cu"\nEMULATE({name})\n')
            made = main.with_suffix(".so")
            subprocess.run([CXX, "-std=c++17", "-O1", "-fPIC", "-shared", "-w", "-fno-strict-aliasing", "-include", str(HERE / "cuda_on_cpu.hpp"), f"-I{nvrtc.FOLDER}",
                            *(f"-D{k}={nvrtc._literal(v)}" for k, v in defines.items()), "-x", "c++", str(main), "-o", str(made)], check=True)
            main.unlink()
            os.replace(made, library)
        return Emulated(library, name, fields)

    def noted(self, call):
        return call

    def put(self, x) -> View | None:
        """A NumPy array as kernels take it; its strides stay."""
        if x is None:
            return None
        return View(x.ctypes.data, x.shape, tuple(s // x.itemsize for s in x.strides), dtype_name(x), 0, x)

    native = upload = put

    def get(self, x) -> np.ndarray:
        return x.owner

    give = get

    def empty(self, shape, dtype):
        """Poisoned: what a kernel forgets to write is seen."""
        kind = numpy_dtype(dtype)
        return self.put(np.full(int(np.prod(shape)) * kind.itemsize, 0x7F if kind.kind == "i" else 0xFF, np.uint8).view(kind).reshape(shape))

    def full(self, shape, dtype, value):
        return self.put(np.full(shape, value, numpy_dtype(dtype)))

    def zeros(self, shape, dtype):
        return self.full(shape, dtype, 0)

    def cast(self, x, dtype):
        return self.put(x.owner.astype(numpy_dtype(dtype)))


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
