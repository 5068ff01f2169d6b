"""float8 in groups with a scale each, and the rotation that spreads outliers before it: what the caches and DeepSeek's indexer store, as functions of arrays.

Plain array operators on the caller's arrays, where they lie; nothing comes back to the host, and a CUDA graph captures them. The bytes are those that a cache's `append` writes.
"""
from sparsetile.backends import arrays
from sparsetile.backends.contract import Unsupported
from sparsetile.ops import array_operators as xp
from sparsetile.ops import checks
from sparsetile.ops.float8 import FLOAT8

FLOATS = ("float32", "float16", "bfloat16")
LARGEST, SMALLEST = 448.0, 2.0 ** -126  # the largest value of e4m3; the smallest normal float32


def quantise_float8(x, *, group=128, power_of_two=False):
    """x [...,D] (float32, float16, bfloat16; NumPy, PyTorch or JAX) -> (values [...,D] float8_e4m3fn, scales [...,ceil(D/group)] float32): value * scale is near x.

    group         so many values of the last axis share a scale, the last group what is left; 128 is that of DeepSeek's latents (latent_scale), D that of indexer keys (k_scale)
    power_of_two  False: scale = max |x| of the group / 448, at least the smallest normal float32. True: the next power of two that is not smaller, so that scaling rounds nothing

    Values are x / scale in float32, rounded to the nearest, ties to even. A group that holds NaN or inf is NaN, its scale too. Carries no gradient.
    Source: DeepSeek-V3.2 (arXiv 2512.02556), its indexer and its cache of latents; DeepSeek-V3 (arXiv 2412.19437), section 3.3.2, groups of 128.
    """
    D = _columns(x, FLOATS)
    if arrays.framework(x) == "cupy":
        raise Unsupported("x: CuPy has no arrays of float8_e4m3fn; quantise a PyTorch tensor: torch.from_dlpack and cupy.from_dlpack share the memory")
    group, lib = checks.integer("group", group, 1), xp.module(x)
    checks.flag("power_of_two", power_of_two)
    wide = _grouped(xp.astype(xp.constant_of(x), "float32"), group)                  # [...,n,group]
    sizes = lib.abs(wide)
    bad = ~(sizes < lib.inf).all(-1)
    top = xp.highest(sizes, -1)
    scale = lib.maximum(_divided(lib.where(bad, 0, top), xp.full(top, top.shape, LARGEST, "float32")), xp.full(top, (), SMALLEST, "float32"))
    if power_of_two:  # any bit of the mantissa carries into the exponent
        scale = arrays.typed(arrays.typed(scale, "int32") + 0x7FFFFF & -0x800000, "float32")
    scale = lib.where(bad, lib.nan, scale)
    values = lib.clip(_divided(wide, lib.broadcast_to(scale[..., None], wide.shape)), -LARGEST, LARGEST)
    return arrays.cast(_flat(values, D), FLOAT8), scale


def dequantise_float8(values, scales, *, group=128, dtype="float32"):
    """values [...,D] float8_e4m3fn, scales [...,ceil(D/group)] float32 -> [...,D] in `dtype` (float32, float16, bfloat16 or float64): the other way, multiplied in float32 and rounded once.

    group must be that of quantise_float8. Differentiable in the scales.
    """
    D = _columns(values, (FLOAT8,), "values")
    checks.integer("group", group, 1), checks.array("scales", scales, values.ndim, "[...,ceil(D/group)]", ("float32",)), checks.choice("dtype", dtype, (*FLOATS, "float64"))
    checks.same("scales", "shape [...,ceil(D/group)]", [*values.shape[:-1], -(-D // group)], list(scales.shape), f"one for {group} values each; name the group that they were made with")
    checks.together({"values": values, "scales": scales})
    wide = _grouped(xp.astype(values, "float32"), group) * scales[..., None]
    return arrays.cast(_flat(wide, D), dtype)


def hadamard(x):
    """x [...,D] times the orthonormal Hadamard matrix of D rows, D a power of two: out[...,j] = D**-0.5 * sum_i (-1)**popcount(i & j) x[...,i], in Sylvester's order.

    x: float32, float16, bfloat16 or float64, of NumPy, PyTorch, CuPy or JAX; the answer is of its type and framework, summed in float32 (float64 for float64), rounded once.
    The matrix is symmetric and its own inverse: hadamard(hadamard(x)) is x, and q . k is hadamard(q) . hadamard(k), with no outlier in any one column. Differentiable in PyTorch and JAX.
    Source: QuaRot (arXiv 2404.00456), section 3; DeepSeek-V3.2's indexer (arXiv 2512.02556, its published inference code) rotates q and k so before they become float8.
    """
    D = _columns(x, (*FLOATS, "float64"))
    if D < 1 or D & D - 1:
        raise ValueError(f"x: expected a last axis of a power of two, got {D}; pad it with zeros")
    lib, out = xp.module(x), xp.wide(x)
    half = 1
    while half < D:
        out = out.reshape(*x.shape[:-1], D // (2 * half), 2, half)
        a, b = out[..., 0, :], out[..., 1, :]
        out = lib.stack((a + b, a - b), -2)
        half *= 2
    return xp.as_type_of(out.reshape(x.shape) * D ** -0.5, x)


def _columns(x, kinds, name="x") -> int:
    checks.array(name, x, None, "[...,D]", kinds)
    if not x.ndim:
        raise ValueError(f"{name}: expected at least one axis [...,D], got shape []; add one with reshape")
    return int(x.shape[-1])


def _grouped(x, group: int):
    """float32 [...,D] -> [...,ceil(D/group),group], zeros at the end."""
    D, lead = x.shape[-1], x.shape[:-1]
    if D % group:
        lib = xp.module(x)
        x = lib.concatenate((x, xp.zeros_of(x, (*lead, -D % group))), -1)
    return x.reshape(*lead, -(-D // group), group)


def _flat(x, D: int):
    """[...,n,group] -> [...,D]"""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])[..., :D]


def _divided(x, by):
    """x / by of one shape, truly: by a number PyTorch on CUDA multiplies with the reciprocal, and so does XLA by what it knows to be a broadcast."""
    if xp.kind(x) == "jax":
        import jax
        by = jax.lax.optimization_barrier(by)
    return x / by
