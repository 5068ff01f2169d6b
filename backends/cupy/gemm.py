"""What the two products of this folder share (gemm.cuh): tiles, shared memory, how a weight stands in memory."""
import math

from sparsetile.backends.contract import Resources, Tunable, Unsupported
from sparsetile.backends.cupy import compile as nvrtc
from sparsetile.backends.cupy.operands import HALVES, KINDS

TUNABLES = (
    Tunable("block_m", (64, 128, 16), "rows of a tile"),
    Tunable("block_n", (64, 128, 256), "columns of a tile, all of one head"),
    Tunable("depth", (32, 64), "k values a step"),
    Tunable("stages", (2, 3, 4), "steps in flight"),
)
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1}


def on_tensor_cores(a: str, w: str) -> bool:
    return w in HALVES and a in (w, "float8_e4m3fn")


def threads(config: dict) -> int:
    return 256 if config["block_m"] >= 64 else 128


def shared_bytes(a: str, w: str, out: str, w_rows: int, config: dict, row_bytes: int) -> int:
    """`row_bytes`: what a kernel keeps of each row besides."""
    cell, gap = (2, 8) if on_tensor_cores(a, w) else (4, 4)
    bm, bn, depth = config["block_m"], config["block_n"], config["depth"]
    stage = bm * (depth + gap) + (bn * (depth + gap) if w_rows else depth * (bn + gap))
    staged = bm * (bn + (4 if out == "float32" else 8)) * ITEMSIZE[out]
    return -(-bm * row_bytes // 16) * 16 + max(config["stages"] * stage * cell, staged)


def resources(arch: str, a: str, w: str, out: str, scaled: bool, config: dict, row_bytes: int):
    bm, bn = config["block_m"], config["block_n"]
    warps_m = 2 if bm >= 64 else 1
    mi, ni = bm // 16 // warps_m, bn // 32
    registers = mi * ni * 4 * (2 if scaled else 1) + 4 * mi + 2 * ni + 60
    if registers > 255:
        return f"a tile of {bm} x {bn}{' with scales' if scaled else ''} needs about {registers} registers a thread, 255 are there"
    shared = max(shared_bytes(a, w, out, rows, config, row_bytes) for rows in (0, 1))
    if shared > nvrtc.shared_limit(arch):
        return f"a tile of {bm} x {bn} in {config['stages']} stages needs {shared} bytes of shared memory, {arch} has {nvrtc.shared_limit(arch)}"
    return Resources(threads(config), shared, registers)


def default_config(rows: int, width: int, fits) -> dict:
    """`fits(config)` gives Resources, or why not: chips with little shared memory get fewer stages, then smaller tiles."""
    best = dict(block_m=128 if rows > 64 else 64 if rows > 16 else 16, block_n=128 if width > 64 else 64, depth=32, stages=3)
    tries = (best, dict(best, stages=2), dict(best, stages=2, block_m=min(64, best["block_m"])), dict(best, stages=2, block_m=16, block_n=64))
    return next((config for config in tries if not isinstance(fits(config), str)), best)


def orientation(w, k_axis: int, n_axis: int) -> tuple[int, int]:
    """(W_ROWS, stride of the other axis) of w [H, ., .]: 1 where k is contiguous, 0 where n is."""
    if w.strides[n_axis] == 1 or w.shape[n_axis] == 1:
        return 0, w.strides[k_axis]
    if w.strides[k_axis] == 1 or w.shape[k_axis] == 1:
        return 1, w.strides[n_axis]
    raise Unsupported(f"CuPy reads weights in place when one of their last two axes is contiguous, not with strides {w.strides}; make them contiguous")


def weight_copy(w, w_rows: int, k_axis: int, n_axis: int) -> int:
    """Bytes that a copy may take along the contiguous axis."""
    along, other = (k_axis, n_axis) if w_rows else (n_axis, k_axis)
    size = ITEMSIZE[w.dtype]
    return max(size, math.gcd(16, w.ptr or 16, w.shape[along] * size, *(w.strides[i] * size for i in (0, other) if w.shape[i] > 1)))


def defines(a: str, w: str, out: str, tail: str | None, copies: tuple, w_rows: int, scaled: bool, config: dict) -> dict:
    """copies: bytes for (A, W, out, tail)."""
    return dict(A_KIND=KINDS[a], W_KIND=KINDS[w], OUT_KIND=KINDS[out], TAIL_KIND=KINDS[tail or out], A_COPY=copies[0], W_COPY=copies[1], OUT_COPY=copies[2],
                TAIL_COPY=copies[3], W_ROWS=w_rows, SCALED=int(scaled), BM=config["block_m"], BN=config["block_n"], DEPTH=config["depth"], STAGES=config["stages"])


def out_copy(out, *offsets: int) -> int:
    """Bytes that a store may take where every row starts at a multiple of `offsets` elements."""
    size = ITEMSIZE[out.dtype]
    return max(size, math.gcd(16, out.ptr or 16, *(n * size for n in offsets)))


def tail_copy(tail, out, *offsets: int) -> int:
    """The same for columns copied behind the product, `offsets` elements of `out`; one element where the types differ."""
    size = ITEMSIZE[out.dtype]
    if tail is None or tail.dtype != out.dtype:
        return size
    return max(size, math.gcd(16, out.ptr or 16, tail.ptr or 16, tail.shape[-1] * size, *(n * size for n in offsets), *(s * size for n, s in zip(tail.shape[:-1], tail.strides) if n > 1)))
