"""What the backward of attention needs of each row: out, dout [B,Hq,T,Dv], lse [B,Hq,T] -> lse_total, delta [B,Hq,T], dsink [Hq] or None.

lse_total = logaddexp(lse, sink), so that P = exp(s - lse_total); delta = sum(dout * out) - dlse * exp(lse_total - lse), 0 for rows without keys;
dsink = -sum over b, t of exp(sink - lse_total) * sum(dout * out), in a fixed order. A sink of -inf adds nothing; +inf gives lse_total +inf, P = 0, dsink 0.
"""
from sparsetile.backends.contract import Problem, Resources, Tunable
from sparsetile.backends.cupy import compile as nvrtc
from sparsetile.backends.cupy.operands import KINDS, ceil_div, copy_bytes

TUNABLES: tuple[Tunable, ...] = ()
FIELDS = "9Q11q4i"


def supports(problem: Problem) -> str | None:
    kinds = {kind for _, kind in problem.dtypes}
    if problem["B"] * problem["Hq"] * problem["T"] >= 2 ** 32:
        return "CuPy's attention_delta takes fewer than 2^32 rows; differentiate some batch entries or heads at a time"
    return None if kinds <= set(KINDS) - {"float8_e4m3fn"} else f"CuPy's attention_delta takes float32, float16 and bfloat16, not {'/'.join(sorted(kinds))}; cast the arrays"


def resources(problem: Problem, config: dict):
    return Resources(threads=256, shared=0, registers=40)


def default_config(problem: Problem) -> dict:
    return {}


def artifacts(problem: Problem, config: dict) -> list[dict]:
    kind = problem.dtype("out") or problem.dtype("q")
    return [dict(source="attention_delta", defines=_defines(kind, kind, 16 // (4 if kind == "float32" else 2), problem["Dv"]), names=["rows", "sinks"])]


def _defines(kind: str, dout_kind: str, vector: int, Dv: int) -> dict:
    """16 bytes a lane, as many lanes as a row needs."""
    lanes = min(32, 1 << max(0, (ceil_div(Dv, vector) - 1).bit_length()))
    return dict(KIND=KINDS[kind], DOUT_KIND=KINDS[dout_kind], VECTOR=vector, LANES=lanes)


def run(out, dout, lse, *, place, config=None, sink_logits=None, dlse=None):
    B, H, T, Dv = out.shape
    total, delta = place.empty((B, H, T), "float32"), place.empty((B, H, T), "float32")
    term, dsink = (None, None) if sink_logits is None else (place.empty((B, H, T), "float32"), place.full((H,), "float32", 0.0))
    if B * H * T == 0:
        return total, delta, dsink
    defines = _defines(out.dtype, dout.dtype, copy_bytes(out, dout) // out.itemsize if out.dtype == dout.dtype else 1, Dv)
    values = (out.ptr, dout.ptr, lse.ptr, nvrtc.ptr(dlse), nvrtc.ptr(sink_logits), total.ptr, delta.ptr, nvrtc.ptr(term), nvrtc.ptr(dsink), *out.strides, *dout.strides, *(dlse.strides if dlse is not None else (0, 0, 0)), B, H, T, Dv)
    nvrtc.function("attention_delta", "rows", FIELDS, defines, place)(ceil_div(B * H * T, 256 // defines["LANES"]), 256, 0, place.stream, *values)
    if dsink is not None:
        nvrtc.function("attention_delta", "sinks", FIELDS, defines, place)(H, 256, 64 if hasattr(place, "compile") else 0, place.stream, *values)
    return total, delta, dsink
