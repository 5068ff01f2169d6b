"""NVRTC: a .cu of this folder plus defines -> cubin, cached on disk; then a cheap launch through CuPy's driver binding.

    fn = compile.function("merge_attention", "merge", "QQiif", {"DV": 128}, place)     a kernel's handle, cached in the process
    fn((blocks, 1, 1), threads, shared_bytes, place.stream, out.ptr, lse.ptr, T, Dv, scale)

Every kernel takes ONE struct by value (`extern "C" __global__ void merge(const __grid_constant__ Params p)`), and the format is that struct in the
letters of Python's `struct` with native alignment: Q pointer, q int64, i int32, I uint32, f float. One pack instead of a list of boxed arguments: a launch
costs about 2 us of host time instead of CuPy's 10. A null pointer is 0: `ptr(x)` gives 0 for None.

The key of a cubin is everything that it depends on: source, the headers it includes from this folder, defines, flags, architecture, NVRTC's version.
Files are renamed into place whole and carry a digest; a damaged one is compiled again. `SPARSETILE_CACHE_DIR` moves the cache (default ~/.cache/sparsetile).
Compiling needs no GPU: cubin(source, defines, "sm_90a").
"""
import ctypes
import glob
import hashlib
import importlib.util
import os
import re
import struct
import tempfile
import threading
from functools import lru_cache
from pathlib import Path

FOLDER = Path(__file__).parent
FLAGS = ("--std=c++17", "--ptxas-options=-v")
SHARED_LIMIT = {"sm_80": 163, "sm_86": 99, "sm_87": 163, "sm_89": 99, "sm_90": 227, "sm_90a": 227, "sm_100": 227, "sm_103": 227, "sm_120": 99, "sm_121": 99}  # KiB a block may ask for


class CompileError(RuntimeError):
    """NVRTC refused a source of ours: its log."""


def shared_limit(arch: str) -> int:
    """Bytes of shared memory that one block may ask for; unknown architectures get the smallest."""
    return 1024 * SHARED_LIMIT.get(arch, 99)


def ptr(x) -> int:
    return 0 if x is None else x.ptr


# ------------------------------------------------------------------------------------------------------------------ sources
@lru_cache(None)
def _read(path: Path) -> str:
    return path.read_text()


@lru_cache(None)
def sources(source: str) -> tuple[Path, ...]:
    """The .cu file and every header of this folder that it includes, directly or not."""
    found, todo = [], [FOLDER / f"{source}.cu"]
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found.append(path)
        todo += [FOLDER / name for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', _read(path), re.M) if (FOLDER / name).exists()]
    return tuple(found)


@lru_cache(1)
def include_folders() -> tuple[str, ...]:
    """Where cuda_fp16.h and its like may be: wheels, then CUDA_PATH, then the usual place. May be empty: our sources need none."""
    roots = []
    if spec := importlib.util.find_spec("nvidia"):
        for base in spec.submodule_search_locations or ():
            roots += sorted(glob.glob(f"{base}/cu*/include")) + sorted(glob.glob(f"{base}/cuda_runtime/include"))
    roots += [os.path.join(os.environ[name], "include") for name in ("CUDA_PATH", "CUDA_HOME") if os.environ.get(name)] + ["/usr/local/cuda/include"]
    return tuple(r for r in dict.fromkeys(roots) if os.path.exists(os.path.join(r, "cuda_fp16.h")))


def cache_folder() -> Path:
    return Path(os.environ.get("SPARSETILE_CACHE_DIR") or Path.home() / ".cache" / "sparsetile") / "cupy"


# ------------------------------------------------------------------------------------------------------------------ NVRTC
class _CupyNvrtc:
    def __init__(self):
        from cupy.cuda import nvrtc
        self.nvrtc, self.version = nvrtc, nvrtc.getVersion()

    def compile(self, text: str, name: str, options: list[str]) -> tuple[bytes, str]:
        program = self.nvrtc.createProgram(text, name, [], [])
        try:
            try:
                self.nvrtc.compileProgram(program, options)
            except self.nvrtc.NVRTCError:
                raise CompileError(f"{name} {' '.join(options)}\n{self.nvrtc.getProgramLog(program)}") from None
            return self.nvrtc.getCUBIN(program), self.nvrtc.getProgramLog(program)
        finally:
            self.nvrtc.destroyProgram(program)


class _BindingsNvrtc:
    def __init__(self):
        from cuda.bindings import nvrtc
        self.nvrtc, self.version = nvrtc, tuple(nvrtc.nvrtcVersion()[1:])

    def compile(self, text: str, name: str, options: list[str]) -> tuple[bytes, str]:
        n = self.nvrtc
        _, program = n.nvrtcCreateProgram(text.encode(), name.encode(), 0, [], [])
        try:
            (status,) = n.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
            log = b" " * n.nvrtcGetProgramLogSize(program)[1]
            n.nvrtcGetProgramLog(program, log)
            log = log.rstrip(b"\0 ").decode(errors="replace")
            if status != n.nvrtcResult.NVRTC_SUCCESS:
                raise CompileError(f"{name} {' '.join(options)}\n{log}")
            cubin = b" " * n.nvrtcGetCUBINSize(program)[1]
            n.nvrtcGetCUBIN(program, cubin)
            return cubin, log
        finally:
            n.nvrtcDestroyProgram(program)


@lru_cache(1)
def compiler():
    """NVRTC through CuPy, else through cuda-bindings."""
    try:
        return _CupyNvrtc()
    except (ImportError, RuntimeError) as first:
        try:
            return _BindingsNvrtc()
        except (ImportError, RuntimeError):
            raise RuntimeError(f"NVRTC is not to be found ({first}); pip install 'sparsetile[cuda13]' or nvidia-cuda-nvrtc") from first


def options_of(defines: dict, arch: str) -> list[str]:
    return [f"--gpu-architecture={arch}", *FLAGS, f"-I{FOLDER}", *(f"-I{i}" for i in include_folders()), *(f"-D{k}={_literal(v)}" for k, v in sorted(defines.items()))]


def _literal(value) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def digest(source: str, defines: dict, arch: str) -> str:
    options = [o for o in options_of(defines, arch) if not o.startswith("-I")]  # folders move, what is in them is in NVRTC's version
    h = hashlib.sha256(repr((options, compiler().version)).encode())
    for path in sources(source):
        h.update(path.name.encode() + b"\0" + _read(path).encode() + b"\0")
    return h.hexdigest()[:32]


def cubin(source: str, defines: dict, arch: str) -> tuple[bytes, str]:
    """The machine code of one .cu for one architecture, and ptxas's report. From the disk cache where it is there and whole."""
    path = cache_folder() / f"{source}-{digest(source, defines, arch)}.bin"
    try:
        data = path.read_bytes()
        mark, size = data[:32], int.from_bytes(data[32:40], "little")
        if hashlib.sha256(data[32:]).digest() == mark:
            return data[40:40 + size], data[40 + size:].decode()
    except OSError:
        pass
    code, log = compiler().compile(_read(FOLDER / f"{source}.cu"), f"{source}.cu", options_of(defines, arch))
    body = len(code).to_bytes(8, "little") + code + log.encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as f:
            f.write(hashlib.sha256(body).digest() + body)
        os.replace(f.name, path)
    except OSError:  # a read-only home costs a compilation per process, no more
        pass
    return code, log


def report(source: str, defines: dict, arch: str) -> dict[str, dict[str, int]]:
    """ptxas's figures: kernel -> registers, spills (bytes stored + loaded), shared (static bytes), stack."""
    out, name = {}, None
    for line in cubin(source, defines, arch)[1].splitlines():
        if m := re.search(r"Compiling entry function '(\w+)'", line):
            name = m[1]
            out[name] = {"registers": 0, "spills": 0, "shared": 0, "stack": 0}
        elif name and (m := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line)):
            out[name]["stack"] += int(m[1])  # of the entry and of every function that it calls
            out[name]["spills"] += int(m[2]) + int(m[3])
        elif name and (m := re.search(r"Used (\d+) registers", line)):
            out[name]["registers"] = int(m[1])
            if s := re.search(r"(\d+) bytes smem", line):
                out[name]["shared"] = int(s[1])
    return out


# ------------------------------------------------------------------------------------------------------------------ launching
class Function:
    """One kernel of one cubin on one device. Call: (grid, threads, shared, stream, *fields of the struct)."""

    def __init__(self, code: bytes, name: str, fields: str):
        from cupy.cuda import function
        from cupy_backends.cuda.api import driver
        self.module = function.Module()
        self.module.load(code)
        self.handle, self.name = self.module.get_function(name), name
        self.pack, self.launch, self.driver = struct.Struct("@" + fields), driver.launchKernel, driver
        self.shared, self.local = 48 * 1024, threading.local()

    def buffer(self):
        """Where this thread packs its arguments: the driver copies them while it runs without the GIL."""
        buffer = ctypes.create_string_buffer(self.pack.size)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(buffer))
        self.local.value = value = (buffer, ctypes.addressof(pointers), pointers)
        return value

    def __call__(self, grid, threads: int, shared: int, stream: int, *values) -> None:
        x, y, z = (grid, 1, 1) if type(grid) is int else grid
        if x == 0 or y == 0 or z == 0:
            return
        buffer, pointers, _ = getattr(self.local, "value", None) or self.buffer()
        if shared > self.shared:
            self.driver.funcSetAttribute(self.handle.ptr, 8, shared)  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self.shared = shared
        self.pack.pack_into(buffer, 0, *values)
        self.launch(self.handle.ptr, x, y, z, threads, 1, 1, shared, stream, pointers, 0)


_FUNCTIONS: dict = {}
_LOCK = threading.Lock()


def function(source: str, name: str, fields: str, defines: dict, place) -> Function:
    """The kernel `name` of `source`.cu under these defines, for the place's device. Cheap when called again with equal arguments."""
    key = (source, name, place.device, place.arch, tuple(defines.items()))
    found = _FUNCTIONS.get(key)
    if found is None:
        with _LOCK:
            found = _FUNCTIONS.get(key)
            if found is None:
                found = _FUNCTIONS[key] = make(source, name, fields, defines, place)
    return place.noted(found)


def make(source: str, name: str, fields: str, defines: dict, place):
    if hasattr(place, "compile"):  # tests run kernels on the CPU: their place brings its own compiler
        return place.compile(source, name, fields, defines)
    return Function(cubin(source, defines, place.arch)[0], name, fields)
