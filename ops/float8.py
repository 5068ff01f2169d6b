"""float8 operands of sparse_attention: which element types stand together, and their scales.

k [B,Hk,S,D] and v [B,Hk,S,Dv] float8_e4m3fn, with k_scale, v_scale float32 [B,Hk,ceil(S/128)]: one for 128 keys that follow each other. q [B,Hq,T,D] either float8_e4m3fn with q_scale
float32 [B,Hq,T], or float16 or bfloat16: a quantised cache of keys and values. A scale of None is 1.

    score = scale * q_scale[t] * k_scale[s // 128] * (q[t] . k[s])        value = v_scale[s // 128] * v[s]
"""
from sparsetile.backends import arrays
from sparsetile.backends.contract import Unsupported
from sparsetile.ops import checks

FLOAT8, GROUP = "float8_e4m3fn", 128  # keys that share a scale
OUTPUTS = ("bfloat16", "float16", "float32")  # the first by default


def types(kind: str, keys: str) -> None:
    """Element types of q and k, of which one is float8."""
    if keys != FLOAT8:
        raise ValueError(f"q: expected float8 queries beside float8 keys and values, got k of {keys}; quantise k and v too, or pass q in their type")
    if kind not in (FLOAT8, *checks.HALF):
        raise ValueError(f"k: expected float8 keys beside queries of {FLOAT8} or {' or '.join(checks.HALF)}, got q of {kind}; convert q to bfloat16")


def output(out_dtype, kind: str) -> str | None:
    """Element type of the output where it is not q's own."""
    if kind == FLOAT8:
        return OUTPUTS[0] if out_dtype is None else checks.choice("out_dtype", out_dtype, OUTPUTS)
    if out_dtype is not None and out_dtype != kind:
        raise ValueError(f"out_dtype: expected None or {kind}, the type of q, got {checks.shown(out_dtype)}; it is for float8 queries, cast the result")
    return None


def scales(given: dict, kinds: dict, shapes: dict, cached: bool) -> None:
    """Scales by name against what they belong to: its element type, and the shape they must have."""
    for name, x in given.items():
        if x is None:
            continue
        if cached:
            raise ValueError(f"{name}: expected None beside a cache, got an array; a cache holds its own scales, leave it out")
        if kinds[name] != FLOAT8:
            raise ValueError(f"{name}: expected None, got an array beside {name[0]} of {kinds[name]}; scales belong to float8_e4m3fn, multiply them in or leave them out")
        shape, what = shapes[name]
        checks.row(name, x, shape, what)


def no_gradients(*tensors) -> None:
    """Of PyTorch's tensors."""
    import torch
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise Unsupported("k: attention over float8 keys has no gradients; call under torch.no_grad(), or train with bfloat16 and quantise for use")


def natives(call, place) -> dict:
    """The scales that a call has, as its kernel takes them: contiguous."""
    return {name: place.packed(place.native(x)) for name, x in zip(("q_scale", "k_scale", "v_scale"), call.scales) if x is not None}


def shapes_of(B: int, Hq: int, Hk: int, T: int, S: int) -> dict:
    keys = (B, Hk, -(-S // GROUP)), "[B,Hk,ceil(S/128)]"
    return {"q_scale": ((B, Hq, T), "[B,Hq,T]"), "k_scale": keys, "v_scale": keys}


def is_float8(x) -> bool:
    return arrays.dtype_name(x) == FLOAT8
