"""float8_e4m3fn on every GPU: the conversion exists on sm_89 and later; elsewhere the bits are decoded, exactly, from uint8.

Triton refuses tl.float8e4nv on sm_80 and gfx942 (whose own fp8 is another format), so there the arrays are handed over as uint8.
"""
import triton
import triton.language as tl


def native(arch: str) -> bool:
    """Whether a kernel for this architecture may load and multiply float8_e4m3fn itself."""
    return arch.startswith("sm_") and int(arch.removeprefix("sm_").rstrip("af")) >= 89


def passed(x, arch: str):
    """A tensor as a kernel takes it: float8 as uint8 where the architecture cannot convert it."""
    import torch
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn and not native(arch) else x


def of_keys(problem) -> bool:
    """Whether keys and values are float8."""
    return problem.dtype("k") == "float8_e4m3fn"


def refusal(problem) -> str | None:
    """What attention over float8 keys and values cannot do, in one sentence."""
    if problem.dtype("q") not in ("float8_e4m3fn", "float16", "bfloat16") or problem.dtype("v") != "float8_e4m3fn":
        return f"the triton kernel takes float8 keys and values both, with queries of float8_e4m3fn, float16 or bfloat16, not q {problem.dtype('q')} and v {problem.dtype('v')}; cast them"
    return "the triton kernel reads float8 keys in one piece, not through a page table; gather them" if "paged" in problem.features else None


def more_pointers(problem, arch: str) -> dict:
    """Of an attention kernel's signature: its output's, and those of the scales that a problem has."""
    eight, own = problem.dtype("q") == "float8_e4m3fn", problem.dtype("q", "float32")
    scales = ("q_scale", "k_scale", "v_scale")[not eight:] if of_keys(problem) and "scale" in problem.features else ()
    return {"out": pointer("bfloat16" if eight else own, arch)} | dict.fromkeys(scales, "*fp32")


POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16", "float64": "*fp64", "int32": "*i32", "uint8": "*u8"}


def pointer(dtype: str, arch: str) -> str:
    """The signature's word for an array of this element type, as `passed` hands it over."""
    if dtype == "float8_e4m3fn":
        return "*fp8e4nv" if native(arch) else "*u8"
    return POINTERS[dtype]


COMPUTE = {"float32": tl.float32, "float16": tl.float16, "bfloat16": tl.bfloat16}


def product_dtype(a: str, b: str, arch: str):
    """The type in which values of types a and b are multiplied: both convert to it exactly, sums are float32."""
    eight = "float8_e4m3fn"
    if a == b == eight:
        return tl.float8e4nv if native(arch) else tl.float16
    if a == eight or b == eight:
        return COMPUTE[b if a == eight else a]
    return COMPUTE[a] if a == b else tl.float32


@triton.jit
def decode_e4m3(bits):
    """uint8 bits of float8_e4m3fn -> float16, exactly: the fields in float16's places are 2^-8 of the value, subnormals too. 0x7f and 0xff are NaN."""
    wide = bits.to(tl.int16)
    size = wide & 0x7F
    half = ((wide & 0x80) << 8) | (size << 7)
    half = tl.where(size == 0x7F, 0x7E00, half).to(tl.int16)
    return half.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def exact(x):
    """A loaded tile as it is, of float8 as float16. To bfloat16 from there: two elements at once, which the direct way converts one by one (1482 against 1755 us of a decode step on an H100)."""
    if x.dtype == tl.uint8:
        return decode_e4m3(x)
    elif x.dtype == tl.float8e4nv:
        return x.to(tl.float16)
    else:
        return x


@triton.jit
def key_scales(k_scale, v_scale, s, ok):
    """(of scores, of probabilities): the scales of keys s, one for 128 keys; 1 without, and where not ok (None: all are)."""
    by_key = 1.0
    by_value = 1.0
    if k_scale is not None:
        by_key = tl.load(k_scale + (s >> 7)) if ok is None else tl.load(k_scale + (s >> 7), mask=ok, other=1.0)[None, :]
    if v_scale is not None:
        by_value = tl.load(v_scale + (s >> 7)) if ok is None else tl.load(v_scale + (s >> 7), mask=ok, other=1.0)[None, :]
    return by_key, by_value


@triton.jit
def query_scales(q_scale, line, ok):
    """[rows, 1]: the scales of queries, 1 without and where not ok."""
    if q_scale is not None:
        return tl.load(q_scale + line, mask=ok, other=1.0)[:, None]
    else:
        return 1.0


@triton.jit
def widen(x, DTYPE: tl.constexpr):
    """A loaded tile in the type of its product."""
    if x.dtype == tl.uint8:
        return decode_e4m3(x).to(DTYPE)
    return x.to(DTYPE)
