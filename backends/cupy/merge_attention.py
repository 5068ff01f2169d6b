"""Parts of one attention over disjoint keys into the whole: outs N x [B,H,T,Dv], lses N x [B,H,T] -> out [B,H,T,Dv], lse [B,H,T] float32.

Parts are added in the order given, in float32, and rounded once. A part with lse -inf adds nothing, whatever it holds; all -inf: out 0, lse -inf. The sink stands in the
denominator only. More than 24 parts are merged 24 at a time through float32. With weights, N x [B,H,T,1] of one type, in place of lses (None): out is the sum of
weights[n] * outs[n], lse None.
"""
from sparsetile.backends.contract import Problem, Resources, Tunable
from sparsetile.backends.cupy import compile as nvrtc
from sparsetile.backends.cupy.operands import KINDS, ceil_div, copy_bytes

TUNABLES: tuple[Tunable, ...] = ()
MOST = 24
FIELDS = "3Q4iq" + "2Q7q" * MOST
_UNUSED = (0,) * 9


def supports(problem: Problem) -> str | None:
    kinds = {kind for name, kind in problem.dtypes if name not in ("lses", "weights")}
    if problem["B"] * problem["Hq"] * problem["T"] >= 2 ** 32:
        return "CuPy's merge_attention takes fewer than 2^32 rows; merge some batch entries or heads at a time"
    if "weights" in problem.features and problem["N"] > MOST:
        return f"CuPy's merge_attention adds at most {MOST} parts with given weights, not {problem['N']}; add them in groups"
    if kinds <= {"float32", "float16", "bfloat16"}:
        return None
    return f"CuPy's merge_attention takes float32, float16 and bfloat16 parts, not {'/'.join(sorted(kinds))}; cast the parts"


def resources(problem: Problem, config: dict):
    return Resources(threads=256, shared=0, registers=48)


def default_config(problem: Problem) -> dict:
    return {}


def artifacts(problem: Problem, config: dict) -> list[dict]:
    kind = problem.dtypes[0][1]
    vector, weights = 16 // (4 if kind == "float32" else 2), problem.dtype("weights")
    return [dict(source="merge_attention", defines=_defines(kind, kind, vector, problem["Dv"], parts, weights), names=["merge"]) for parts in (3 if weights else 2, MOST)]


def _defines(kind: str, out_kind: str, vector: int, Dv: int, parts: int, weights: str | None) -> dict:
    """16 bytes a lane, as many lanes as a row needs."""
    lanes = min(32, 1 << max(0, (ceil_div(Dv, vector) - 1).bit_length()))
    return dict(KIND=KINDS[kind], OUT_KIND=KINDS[out_kind], VECTOR=vector, LANES=lanes, PARTS=parts if parts <= 4 else 0, WEIGHTS=KINDS[weights] if weights else -1)


def _merge(outs, lses, place, sink, out_dtype, given=False):
    B, H, T, Dv = outs[0].shape
    out, lse = place.empty((B, H, T, Dv), out_dtype), None if given else place.empty((B, H, T), "float32")
    if B * H * T == 0:
        return out, lse
    d = _defines(outs[0].dtype, out_dtype, copy_bytes(*outs) // outs[0].itemsize, Dv, len(outs), lses[0].dtype if given else None)
    parts = [x for o, l in zip(outs, lses) for x in (o.ptr, l.ptr, *o.strides, *l.strides[:3])]
    function = nvrtc.function("merge_attention", "merge", FIELDS, d, place)
    function(ceil_div(B * H * T, 256 // d["LANES"]), 256, 0, place.stream, out.ptr, nvrtc.ptr(lse), nvrtc.ptr(sink), H, T, Dv, len(outs), B * H * T, *parts,
             *_UNUSED * (MOST - len(outs)))
    return out, lse


def run(outs, lses, *, place, config=None, sink_logits=None, out_dtype=None, weights=None):
    outs, given = list(outs), weights is not None
    lses, out_dtype = list(weights if given else lses), out_dtype or outs[0].dtype
    if len({o.dtype for o in outs}) > 1:
        outs = [place.cast(o, "float32") for o in outs]
    while len(outs) > MOST:
        out, lse = _merge(outs[:MOST], lses[:MOST], place, None, "float32")
        outs, lses = [out, *(place.cast(o, "float32") for o in outs[MOST:])], [lse, *lses[MOST:]]
    return _merge(outs, lses, place, sink_logits, out_dtype, given)
