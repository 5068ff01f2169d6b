"""Parts of one attention joined by their LSE, in float32, in the given order.

    outs N x [B,Hq,T,Dv], lses N x [B,Hq,T] float32, sink_logits [Hq]  ->  out [B,Hq,T,Dv], lse [B,Hq,T] float32

Two passes over the logsumexps (they are small): the largest and the sum first, then each part times its share. One part a time is added by a loop on the
host's side of compilation (N is a constant): pointers of the parts come as a tuple. With weights N x [B,Hq,T,1], float32 or 16 bits, in the lses' place no lse is made:
out is the sum of the parts, each times its weight.
"""
from functools import lru_cache

import triton
import triton.language as tl

from sparsetile.backends.contract import Resources, Tunable
from sparsetile.backends.triton import relaunch
from sparsetile.backends.triton.launch import FLOATS, POINTER, power

TUNABLES = (Tunable("rows", (8, 16, 32, 64), "rows of a program"), Tunable("num_warps", (4, 8), "warps of a program"))
MOST = 64  # parts in one launch


@triton.jit
def merge(outs, lses, sinks, out, lse, rows_total, T, Hq, out_strides, lse_strides, N: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows_total
    t, h, b = row % T, row // T % Hq, row // T // Hq
    d = tl.arange(0, WIDTH)
    low = float("-inf")
    if lse is not None:
        top = tl.full([ROWS], low, tl.float32)
        for n in tl.static_range(N):
            top = tl.maximum(top, tl.load(lses[n] + b * lse_strides[n][0] + h * lse_strides[n][1] + t * lse_strides[n][2], inside, low))
        floor = tl.where(top == low, 0.0, top)  # -inf minus -inf is no number
        total = tl.zeros([ROWS], tl.float32)
        for n in tl.static_range(N):
            total += tl.exp(tl.load(lses[n] + b * lse_strides[n][0] + h * lse_strides[n][1] + t * lse_strides[n][2], inside, low) - floor)
        joined = tl.where(top == low, low, floor + tl.log(total))
        tl.store(lse + row, joined, inside)
        whole = joined
        if sinks is not None:
            sink = tl.load(sinks + h, inside, low)
            most = tl.maximum(joined, sink)
            safe = tl.where(tl.abs(most) == float("inf"), 0.0, most)
            whole = tl.where(tl.abs(most) == float("inf"), most, safe + tl.log(tl.exp(joined - safe) + tl.exp(sink - safe)))
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for n in tl.static_range(N):
        part = tl.load(lses[n] + b * lse_strides[n][0] + h * lse_strides[n][1] + t * lse_strides[n][2], inside, low)
        if lse is not None:
            share = tl.where((part == low) | (whole == float("inf")), 0.0, tl.exp(part - tl.where(whole == low, 0.0, whole)))
            read = inside & (share > 0)
        else:
            share, read = part.to(tl.float32), inside
        value = tl.load(outs[n] + (b * out_strides[n][0] + h * out_strides[n][1] + t * out_strides[n][2])[:, None] + d[None, :],
                        read[:, None] & (d < DV)[None, :], 0.0).to(tl.float32)
        sums += share[:, None] * value
    tl.store(out + row[:, None] * DV + d[None, :], sums.to(out.dtype.element_ty), inside[:, None] & (d < DV)[None, :])


def supports(problem):
    kind = problem.dtype("out", "float32")
    if kind not in FLOATS:
        return f"the triton merge takes float32, float16 or bfloat16, not {kind}; cast the parts, or move them to the CPU, where numba takes float64"
    if problem["N"] > MOST:
        return f"the triton merge joins at most {MOST} parts at once, not {problem['N']}; merge them in groups"
    return None


def default_config(problem):
    return dict(rows=8 if power(problem["Dv"]) > 128 else 32, num_warps=4)


def resources(problem, config):
    if config["rows"] * power(problem["Dv"]) > 32768:
        return f"{config['rows']} rows of {problem['Dv']} values do not fit a program's registers; use fewer rows"
    return Resources(threads=32 * config["num_warps"])


def run(outs, lses, *, place, config, sink_logits=None, out_dtype=None, weights=None):
    B, Hq, T, DV = outs[0].shape
    out, lse = place.empty((B, Hq, T, DV), out_dtype or str(outs[0].dtype)[6:]), place.empty((B, Hq, T), "float32") if weights is None else None
    lses = lses if weights is None else weights
    rows = B * Hq * T
    if rows:
        relaunch.launch(merge, (triton.cdiv(rows, config["rows"]),), place, (tuple(outs), tuple(lses), sink_logits, out, lse),
                        (rows, T, Hq, tuple(tuple(x.stride()[:3]) for x in outs), tuple(tuple(x.stride()[:3]) for x in lses)),
                        constants(len(outs), DV, config["rows"], config["num_warps"]), (*(x.dtype for x in outs), *(x.dtype for x in lses), out.dtype))
    return out, lse


@lru_cache(1024)
def constants(N, DV, rows, num_warps) -> relaunch.Constants:
    return relaunch.Constants(N=N, DV=DV, ROWS=rows, WIDTH=power(DV), num_warps=num_warps)


def artifacts(problem, config):
    N, kind, weight = problem["N"], POINTER[problem.dtype("out", "float32")], POINTER[problem.dtype("weights", "float32")]
    signature = {"outs": (kind,) * N, "lses": (weight,) * N, "out": kind, "rows_total": "i32", "T": "i32", "Hq": "i32",
                 "out_strides": (("i32",) * 3,) * N, "lse_strides": (("i32",) * 3,) * N}
    made = dict(N=N, DV=problem["Dv"], ROWS=config["rows"], WIDTH=power(problem["Dv"]))
    for name, there in (("lse", "weights" not in problem.features), ("sinks", "sink" in problem.features)):
        signature, made = (signature | {name: "*fp32"}, made) if there else (signature, made | {name: None})
    return [dict(fn=merge, signature=signature, constexprs=made, options=dict(num_warps=config["num_warps"]), div16=("out", "lse") if "lse" in signature else ("out",))]
