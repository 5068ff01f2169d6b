"""Rows of a latent cache in the layout of DeepSeek-V3.2 (ops/caches/latent.py): R float8_e4m3fn, a float32 scale for each 128 of them, then bfloat16 rotary values.

A value is one product in float32, rounded once to the type of the queries. LATENT: 0 keys are elements of that type, 1 the bits are decoded, 2 the chip converts float8.
"""
import triton
import triton.language as tl

from sparsetile.backends.triton.float8 import decode_e4m3, native
from sparsetile.backends.triton.launch import parts, power


@triton.jit
def latent_tile(pool, rows, ok, R: tl.constexpr, DTYPE: tl.constexpr, LATENT: tl.constexpr):
    """[rows, R]: the dequantised latents; `rows` are offsets in bytes, rows not ok are 0."""
    bits = tl.load(pool + rows[:, None] + tl.arange(0, R)[None, :], mask=ok[:, None], other=0)
    groups = pool.to(tl.pointer_type(tl.float32), bitcast=True) + (rows // 4)[:, None] + R // 4 + tl.arange(0, R // 128)[None, :]
    scale = tl.load(groups, mask=ok[:, None], other=0.0)                             # [rows, R / 128]
    value = bits.to(tl.float8e4nv, bitcast=True).to(tl.float32) if LATENT == 2 else decode_e4m3(bits).to(tl.float32)
    N: tl.constexpr = bits.shape[0]
    scaled = tl.reshape(value, [N, R // 128, 128]) * scale[:, :, None]
    return tl.reshape(scaled, [N, R]).to(DTYPE)


@triton.jit
def rotary_tile(pool, rows, ok, R: tl.constexpr, P: tl.constexpr, P0: tl.constexpr, DTYPE: tl.constexpr):
    """[rows, P0]: the rotary parts, 0 past P columns."""
    c = tl.arange(0, P0)
    at = pool.to(tl.pointer_type(tl.bfloat16), bitcast=True) + (rows // 2)[:, None] + (R + R // 32) // 2 + c[None, :]
    return tl.load(at, mask=ok[:, None] & (c < P)[None, :], other=0.0).to(DTYPE)


def mode(latent, arch: str) -> int:
    """LATENT of a call or problem."""
    return 0 if latent is None else 2 if native(arch) else 1


def parts_of(D: int, latent) -> tuple[int, int]:
    """A width in two parts (launch.parts), of such rows the latent and the rotary part."""
    return parts(D) if latent is None else (latent[0], power(latent[1]) if latent[1] else 0)


def latent_of(problem) -> tuple | None:
    """(R, P) where keys are such rows."""
    return (problem["Dv"], problem["D"] - problem["Dv"]) if problem.dtype("k") == "latent_fp8" else None


def refusal(problem) -> str | None:
    R, _ = latent_of(problem) or (None, None)
    if R is None:
        return None
    if problem.dtype("q") not in ("float16", "bfloat16"):
        return f"triton reads the fp8 layout of a latent cache for queries of float16 and bfloat16, not {problem.dtype('q')}; pass cache.gather()"
    if R & (R - 1):
        return f"triton reads the fp8 layout of a latent cache with a rank that is a power of two, not {R}; pass cache.gather()"
    if problem.arch == "gfx942":
        return "tiles of the fp8 layout of a latent cache hold whole rows, for which gfx942 has too little shared memory; pass cache.gather()"
    return None
