"""What the backwards need of every row: the whole logsumexp with the sink, delta = sum(dO * O) less the LSE's own gradient, and the sink's gradient.

    out, dout [B,Hq,T,Dv], lse, dlse [B,Hq,T], sink_logits [Hq]  ->  lse_total, delta [B,Hq,T] float32, dsink [Hq] float32 or None

The sink's gradient is added in a fixed order: each program of `delta` writes one sum, `sink` adds a head's sums from first to last.
"""
import triton
import triton.language as tl

from sparsetile.backends.contract import Resources, Tunable
from sparsetile.backends.triton.launch import FLOATS, POINTER, power

TUNABLES = (Tunable("rows", (16, 8, 32, 64), "rows of a program"), Tunable("num_warps", (4, 8), "warps of a program"))


@triton.jit
def delta(out, dout, lse, dlse, sinks, total, delta, shares, T, Hq, so_b, so_h, so_t, sg_b, sg_h, sg_t, sl_b, sl_h, sl_t, sd_b, sd_h, sd_t,
          DV: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    tiles = (T + ROWS - 1) // ROWS
    tile, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    h, b = (head % Hq).to(tl.int64), (head // Hq).to(tl.int64)
    t = tile * ROWS + tl.arange(0, ROWS)
    t64, d = t.to(tl.int64), tl.arange(0, WIDTH)
    inside = t < T
    both = inside[:, None] & (d < DV)[None, :]
    value = tl.load(out + b * so_b + h * so_h + (t64 * so_t)[:, None] + d[None, :], both, 0.0).to(tl.float32)
    grad = tl.load(dout + b * sg_b + h * sg_h + (t64 * sg_t)[:, None] + d[None, :], both, 0.0).to(tl.float32)
    product = tl.sum(value * grad, 1)
    low, high = float("-inf"), float("inf")
    keys = tl.load(lse + b * sl_b + h * sl_h + t64 * sl_t, inside, low)
    whole = keys
    row = head.to(tl.int64) * T + t
    if sinks is not None:
        sink = tl.load(sinks + h)
        most = tl.maximum(keys, sink, propagate_nan=tl.PropagateNan.ALL)
        safe = tl.where(tl.abs(most) == high, 0.0, most)
        whole = tl.where(tl.abs(most) == high, most, safe + tl.log(tl.exp(keys - safe) + tl.exp(sink - safe)))
        endless = (tl.abs(whole) == high) | (t >= T)  # no key and no sink, or a sink of +inf
        share = tl.where(endless, 0.0, tl.exp(sink - tl.where(endless, 0.0, whole)) * product)
        tl.store(shares + tl.program_id(0), tl.sum(share, 0))
    if dlse is not None:
        own = tl.load(dlse + b * sd_b + h * sd_h + t64 * sd_t, inside, 0.0).to(tl.float32)
        apart = (keys == low) | (tl.abs(whole) == high)
        # the keys' own share of the row is 1 / exp(whole - keys) of P's; where the sink holds all but exp(-80), P is 0 and a larger factor could only make 0 * inf
        product -= tl.where(apart, 0.0, own * tl.exp(tl.minimum(tl.where(apart, 0.0, whole - keys), 80.0)))
    tl.store(total + row, whole, inside)
    tl.store(delta + row, tl.where(tl.abs(whole) == high, 0.0, product), inside)


@triton.jit
def sink(shares, dsink, B, Hq, tiles, BLOCK: tl.constexpr):
    h = tl.program_id(0)
    sums = tl.zeros([BLOCK], tl.float32)
    for b in range(B):
        for start in range(0, tiles, BLOCK):
            n = start + tl.arange(0, BLOCK)
            sums += tl.load(shares + (b * Hq + h) * tiles + n, n < tiles, 0.0)
    tl.store(dsink + h, -tl.sum(sums, 0))


def supports(problem):
    kind = problem.dtype("out", "float32")
    if kind not in FLOATS:
        return f"the triton kernel takes float32, float16 or bfloat16, not {kind}; cast the arrays, or move them to the CPU, where numba takes float64"
    return None


def default_config(problem):
    return dict(rows=8 if power(problem["Dv"]) > 256 else 16, num_warps=4)


def resources(problem, config):
    if config["rows"] * power(problem["Dv"]) > 16384:
        return f"{config['rows']} rows of {problem['Dv']} values do not fit a program's registers; use fewer rows"
    return Resources(threads=32 * config["num_warps"])


def run(out, dout, lse, *, place, config, sink_logits=None, dlse=None):
    B, Hq, T, DV = out.shape
    total, rows = place.empty((B, Hq, T), "float32"), place.empty((B, Hq, T), "float32")
    tiles = triton.cdiv(T, config["rows"])
    shares = None if sink_logits is None else place.empty((B * Hq * tiles,), "float32")
    dsink = None if sink_logits is None else place.zeros((Hq,), "float32")
    if B * Hq * T:
        delta[(B * Hq * tiles,)](out, dout, lse, dlse, sink_logits, total, rows, shares, T, Hq, *out.stride()[:3], *dout.stride()[:3], *lse.stride(),
                                 *((0, 0, 0) if dlse is None else dlse.stride()), DV=DV, ROWS=config["rows"], WIDTH=power(DV), num_warps=config["num_warps"])
        if dsink is not None:
            sink[(Hq,)](shares, dsink, B, Hq, tiles, BLOCK=256, num_warps=1)
    return total, rows, dsink


def artifacts(problem, config):
    kind = POINTER[problem.dtype("out", "float32")]
    sinks = "sink" in problem.features
    arrays = {"out": kind, "dout": kind, "lse": "*fp32", "dlse": "*fp32", "total": "*fp32", "delta": "*fp32"} | ({"sinks": "*fp32", "shares": "*fp32"} if sinks else {})
    integers = ("T", "Hq", "so_b", "so_h", "so_t", "sg_b", "sg_h", "sg_t", "sl_b", "sl_h", "sl_t", "sd_b", "sd_h", "sd_t")
    constants = dict(DV=problem["Dv"], ROWS=config["rows"], WIDTH=power(problem["Dv"])) | ({} if sinks else {"sinks": None, "shares": None})
    found = [dict(fn=delta, signature=arrays | {n: "i32" for n in integers}, constexprs=constants, options=dict(num_warps=config["num_warps"]), div16=tuple(arrays))]
    if sinks:
        found.append(dict(fn=sink, signature={"shares": "*fp32", "dsink": "*fp32", "B": "i32", "Hq": "i32", "tiles": "i32"}, constexprs=dict(BLOCK=256), options=dict(num_warps=1), div16=()))
    return found
