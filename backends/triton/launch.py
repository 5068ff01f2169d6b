"""The host's side of a Triton kernel: widths cut into powers of two, limits of the chips, types of arguments. Imports no triton.

Launches go to torch's current device and stream: dispatch has made them the caller's (Place.guard).
"""
KIB = 1024
# Shared memory (LDS on AMD) that one block of threads may have.
SHARED = {"sm_80": 163 * KIB, "sm_86": 99 * KIB, "sm_89": 99 * KIB, "sm_90a": 227 * KIB, "sm_100": 227 * KIB, "gfx942": 64 * KIB}
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1}
POINTER = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16", "float8_e4m3fn": "*fp8e4nv", "int32": "*i32", "int64": "*i64"}
FLOATS = ("float32", "float16", "bfloat16")
FAR = 2 ** 31  # offsets of elements from here on need 64 bits


def power(n: int, least: int = 16) -> int:
    """The smallest power of two that is at least n and `least`."""
    return max(least, 1 << max(0, n - 1).bit_length())


def parts(width: int) -> tuple[int, int]:
    """A width as a power of two and a padded rest: 576 -> (512, 64), 96 -> (64, 32), 72 -> (64, 16), 100 -> (128, 0), 128 -> (128, 0)."""
    whole = power(width)
    if whole == width or whole == 16:
        return whole, 0
    half = whole // 2
    rest = power(width - half)
    return (half, rest) if rest < half else (whole, 0)


def shared_limit(arch: str) -> int:
    return SHARED.get(arch, 227 * KIB if arch == "cpu" else 99 * KIB)


def tiles(T: int, block: int, q_start: int | None) -> int:
    """Tiles of `block` positions that T queries from q_start on may touch (q_start None: known on the device only)."""
    if q_start is None:
        return (T + block - 2) // block + 1
    return (q_start + T - 1) // block - q_start // block + 1
