"""Compiles Triton kernels for GPUs that are not there, and reads what they ask of the chip.

Works with triton 3.6 without any driver. Results are kept by digest (the kernel's source and its helpers, signature, constants, options, target, triton's
version) under SPARSETILE_TEST_CACHE (default: ~/.cache/sparsetile-tests), so that a second run of CI compiles nothing. Not under TRITON_INTERPRET=1.
"""
import hashlib
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90a": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32), "gfx942": ("hip", "gfx942", 64)}


def cache_folder() -> Path:
    return Path(os.environ.get("SPARSETILE_TEST_CACHE") or Path.home() / ".cache" / "sparsetile-tests") / "aot"


def compile_for(artifact: dict, arch: str):
    """Triton's compiled kernel of one entry of a kernel module's artifacts() for one of TARGETS."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource
    fn = artifact["fn"]
    names, kinds, fixed = fn.arg_names, artifact["signature"], artifact["constexprs"]
    constants = {(i,): fixed.get(name) for i, name in enumerate(names) if name not in kinds}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in artifact.get("div16", ())}
    kind = GluonASTSource if fn.is_gluon() else ASTSource
    source = kind(fn=fn, signature={name: kinds.get(name, "constexpr") for name in names}, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget(*TARGETS[arch]), options=dict(artifact.get("options", {})))


def cubin_resources(cubin: bytes) -> dict:
    """registers, stack and local memory of a CUDA binary's one kernel: stack or local above 0 are spills."""
    import triton.backends.nvidia as nvidia
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = [dict(re.findall(r"(\w+):(\d+)", line)) for line in text.splitlines() if "REG:" in line]
    assert len(found) == 1, f"expected one kernel in the binary, found {len(found)}"
    return dict(registers=int(found[0]["REG"]), spills=int(found[0]["STACK"]) + int(found[0]["LOCAL"]))


def said_by_ptxas(ptx: str, more: str = "") -> list:
    """Numbers of ptxas's messages on warpgroup products: C75xx it serialised them, C76xx it ignored a register budget."""
    import triton.backends.nvidia as nvidia
    tool = Path(nvidia.__file__).parent / "bin" / "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        text = subprocess.run([tool, "-arch=sm_90a", "-v", *more.split(), file.name, "-o", os.devnull], capture_output=True, text=True, check=True).stderr
    return sorted(set(re.findall(r"\bC7[56]\d\d\b", text)))


def amd_resources(text: str) -> dict:
    """The same from AMD's assembly; spilled registers are counted in bytes a thread."""
    number = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s*(\d+)", text)}
    return dict(registers=number["vgpr_count"], spills=4 * number["vgpr_spill_count"])


def digest(artifact: dict, arch: str) -> str:
    import triton
    fn = artifact["fn"]
    parts = [fn.cache_key, arch, triton.__version__, "said"] + [sorted(map(repr, artifact.get(name, {}).items())) for name in ("signature", "constexprs", "options")]
    return hashlib.sha256(repr(parts + [sorted(artifact.get("div16", ()))]).encode()).hexdigest()[:32]


def resources(artifact: dict, arch: str) -> dict:
    """{"registers", "spills" (bytes a thread), "shared" (bytes), "threads"} of one artifact on one target, on Hopper what ptxas "said"; compiled once per digest."""
    file = cache_folder() / f"{digest(artifact, arch)}.json"
    if file.is_file():
        return json.loads(file.read_text())
    kernel = compile_for(artifact, arch)
    if "cubin" in kernel.asm:
        found = cubin_resources(kernel.asm["cubin"])
        if arch == "sm_90a":
            found["said"] = said_by_ptxas(kernel.asm["ptx"], artifact.get("options", {}).get("ptx_options", ""))
    else:
        found = amd_resources(kernel.asm["amdgcn"])
    found |= dict(shared=kernel.metadata.shared, threads=kernel.metadata.num_warps * TARGETS[arch][2])
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(found))
    scratch.rename(file)
    return found
