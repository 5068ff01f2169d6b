"""Parts of one attention over disjoint keys into the whole: outs N x [B,H,T,Dv], lses N x [B,H,T] -> out [B,H,T,Dv], lse [B,H,T] float32.

Parts are added in the order given, in float32, and rounded once. A part with lse -inf adds nothing, whatever it holds; all -inf: out 0, lse -inf. The sink stands in the
denominator only. More than 24 parts are merged 24 at a time through float32.
"""
from sparsetile.backends.contract import Problem, Resources, Tunable
from sparsetile.backends.cupy import compile as nvrtc
from sparsetile.backends.cupy.operands import KINDS, ceil_div, copy_bytes

TUNABLES: tuple[Tunable, ...] = ()
MOST = 24
FIELDS = "3Q4iq" + "2Q7q" * MOST
_UNUSED = (0,) * 9


def supports(problem: Problem) -> str | None:
    kinds = {kind for name, kind in problem.dtypes if name != "lses"}
    if problem["B"] * problem["Hq"] * problem["T"] >= 2 ** 32:
        return "CuPy's merge_attention takes fewer than 2^32 rows; merge some batch entries or heads at a time"
    if kinds <= {"float32", "float16", "bfloat16"}:
        return None
    return f"CuPy's merge_attention takes float32, float16 and bfloat16 parts, not {'/'.join(sorted(kinds))}; cast the parts"


def resources(problem: Problem, config: dict):
    return Resources(threads=256, shared=0, registers=48)


def default_config(problem: Problem) -> dict:
    return {}


def artifacts(problem: Problem, config: dict) -> list[dict]:
    kind = problem.dtypes[0][1]
    vector = 16 // (4 if kind == "float32" else 2)
    return [dict(source="merge_attention", defines=_defines(kind, kind, vector, problem["Dv"], parts), names=["merge"]) for parts in (2, MOST)]


def _defines(kind: str, out_kind: str, vector: int, Dv: int, parts: int) -> dict:
    """16 bytes a lane, as many lanes as a row needs."""
    lanes = min(32, 1 << max(0, (ceil_div(Dv, vector) - 1).bit_length()))
    return dict(KIND=KINDS[kind], OUT_KIND=KINDS[out_kind], VECTOR=vector, LANES=lanes, PARTS=parts if parts <= 4 else 0)


def _merge(outs, lses, place, sink, out_dtype):
    B, H, T, Dv = outs[0].shape
    out, lse = place.empty((B, H, T, Dv), out_dtype), place.empty((B, H, T), "float32")
    if B * H * T == 0:
        return out, lse
    d = _defines(outs[0].dtype, out_dtype, copy_bytes(*outs) // outs[0].itemsize, Dv, len(outs))
    parts = [x for o, l in zip(outs, lses) for x in (o.ptr, l.ptr, *o.strides, *l.strides)]
    function = nvrtc.function("merge_attention", "merge", FIELDS, d, place)
    function(ceil_div(B * H * T, 256 // d["LANES"]), 256, 0, place.stream, out.ptr, lse.ptr, nvrtc.ptr(sink), H, T, Dv, len(outs), B * H * T, *parts, *_UNUSED * (MOST - len(outs)))
    return out, lse


def run(outs, lses, *, place, config=None, sink_logits=None, out_dtype=None):
    outs, lses = list(outs), list(lses)
    out_dtype = out_dtype or outs[0].dtype
    if len({o.dtype for o in outs}) > 1:
        outs = [place.cast(o, "float32") for o in outs]
    while len(outs) > MOST:
        out, lse = _merge(outs[:MOST], lses[:MOST], place, None, "float32")
        outs, lses = [out, *(place.cast(o, "float32") for o in outs[MOST:])], [lse, *lses[MOST:]]
    return _merge(outs, lses, place, sink_logits, out_dtype)
