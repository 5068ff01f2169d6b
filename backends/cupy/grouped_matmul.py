"""One small matrix per head: absorbing queries into the latent width, taking outputs out of it.

    x [B,H,T,N]  w [H,M,N] (any strides with one contiguous axis of the last two)  tail [B,H,T,P]  ->  out [B,H,T,M+P]

out[..., :M] = sum_n x w in float32, rounded once to out_dtype (x's by default); out[..., M:] is the tail, bit for bit where the types are equal.
float16 and bfloat16 run on tensor cores, other types and mixes by fused multiply-adds in float32. The path "cublas" is one call of cuBLAS and a copy of the tail; arrays
that it cannot address (rows or heads that overlap) take the portable path, and so does a call that a CUDA graph records: CuPy's binding refuses those. Decoding is
what graphs are for, so the default asks for cuBLAS from 256 queries on, and below, on sm_90a, for the path "hopper" (grouped_matmul_hopper.py), which reads weights once.
With inner_heads products are summed over heads too: path "sum" (grouped_sum.py).
"""
from dataclasses import replace

from sparsetile.backends.contract import Resources, Tunable
from sparsetile.backends.cupy import compile as nvrtc
from sparsetile.backends.cupy import cublas, gemm, grouped_matmul_hopper, grouped_sum
from sparsetile.backends.cupy.operands import HALVES, KINDS, ceil_div, copy_bytes

TUNABLES = (Tunable("path", ("portable", "cublas", "sum", "hopper"), "cublas: cuBLAS for 16-bit types, the tail copied by a kernel. sum: the one of products that are summed over heads. "
                    "hopper: few rows on sm_90a, weights read once"), *(replace(knob, paths=("portable",)) for knob in gemm.TUNABLES))
FIELDS = "4Q" + "8q" + "8i"
ROW_BYTES = 3 * 8  # struct Rows


def supports(problem):
    if "inner_heads" in problem.features:
        return grouped_sum.refusal(problem)
    kinds = {problem.dtype("x"), problem.dtype("w")}
    if not kinds <= KINDS.keys() or problem.dtype("w") == "float8_e4m3fn":
        return f"CuPy multiplies float32, float16, bfloat16 (x also float8_e4m3fn), not {'/'.join(sorted(map(str, kinds)))}; cast to bfloat16"
    if problem.dtype("out", "float32") not in ("float32", "float16", "bfloat16"):
        return f"CuPy writes float32, float16 or bfloat16, not {problem.dtype('out')}; ask for out_dtype='bfloat16'"
    return None


def _out(problem) -> str:
    return problem.dtype("out") or (problem.dtype("x") if problem.dtype("x") != "float8_e4m3fn" else "bfloat16")


def _fits(problem) -> bool:
    return grouped_matmul_hopper.fits(*(problem[axis] for axis in "NMP"))


def no_cublas(problem) -> str | None:
    """Why the path "cublas" is not for this problem."""
    if problem.dtype("x") not in HALVES or problem.dtype("w") != problem.dtype("x") or _out(problem) not in (problem.dtype("x"), "float32"):
        return f"path cublas takes float16 or bfloat16 of one type, not {problem.dtype('x')} and {problem.dtype('w')}; take portable"
    return cublas.missing()


def resources(problem, config):
    if (config["path"] == "sum") != ("inner_heads" in problem.features):
        return "path sum is for products that are summed over heads, and only it"
    if config["path"] == "sum":
        return grouped_sum.resources()
    if config["path"] == "hopper":
        if refused := grouped_matmul_hopper.refusal(problem, _out(problem)):
            return refused
        if _fits(problem):
            return grouped_matmul_hopper.resources(problem)
    if config["path"] == "cublas" and (refused := no_cublas(problem)):
        return refused
    return gemm.resources(problem.arch, problem.dtype("x"), problem.dtype("w"), _out(problem), False, config, ROW_BYTES)


def default_config(problem):
    if "inner_heads" in problem.features:
        return dict(path="sum", **{t.name: t.values[0] for t in gemm.TUNABLES})
    tiles = gemm.default_config(problem["B"] * problem["T"], problem["M"], lambda config: resources(problem, dict(config, path="portable")))
    few = "hopper" if grouped_matmul_hopper.refusal(problem, _out(problem)) is None and _fits(problem) else "portable"
    return dict(tiles, path=few if problem["T"] < 256 else "portable" if no_cublas(problem) else "cublas")


def captures(config):
    """None, or why a CUDA graph that records a call holds other work than the call does."""
    return "CuPy's binding refuses cuBLAS while a graph is recorded" if config["path"] == "cublas" else None


def artifacts(problem, config):
    if config["path"] == "sum":
        return grouped_sum.artifacts(problem.dtype("x"))
    out = _out(problem)
    own = grouped_matmul_hopper.artifacts(problem) if config["path"] == "hopper" and _fits(problem) else []
    return own + [dict(source="grouped_matmul", defines=gemm.defines(problem.dtype("x"), problem.dtype("w"), out, out, (16, 16, 16, 16), rows, False, config), names=["grouped_matmul", "copy_tails"]) for rows in (0, 1)]


def run(x, w, *, place, config, tail=None, out_dtype=None, inner_heads=False):
    if inner_heads:
        return grouped_sum.run(x, w, place)
    (B, H, T, N), M = x.shape, w.shape[1]
    P = 0 if tail is None else tail.shape[3]
    out = place.empty((B, H, T, M + P), out_dtype or (x.dtype if x.dtype != "float8_e4m3fn" else "bfloat16"))
    if B * H * T * (M + P) == 0:
        return out
    w_rows, stride = gemm.orientation(w, 2, 1)
    if config["path"] == "hopper" and grouped_matmul_hopper.takes(x, w, tail):
        return grouped_matmul_hopper.run(x, w, tail, out, w_rows, place)
    copies = copy_bytes(x), gemm.weight_copy(w, w_rows, 2, 1), gemm.out_copy(out, M + P), gemm.tail_copy(tail, out, M, M + P)
    d = gemm.defines(x.dtype, w.dtype, out.dtype, None if tail is None else tail.dtype, copies, w_rows, False, config)
    m_tiles, n_tiles = ceil_div(B * T, config["block_m"]), ceil_div(M, config["block_n"])
    shared = gemm.shared_bytes(x.dtype, w.dtype, out.dtype, w_rows, config, ROW_BYTES)
    values = (x.ptr, w.ptr, nvrtc.ptr(tail), out.ptr, *x.strides[:3], w.strides[0], stride, *(tail.strides[:3] if P else (0, 0, 0)), B, T, H, N, M, P, m_tiles, n_tiles)
    product = nvrtc.function("grouped_matmul", "grouped_matmul", FIELDS, d, place)  # loaded by the first call whatever it runs: a graph may ask for it
    if config["path"] == "cublas" and can_call(x, w, w_rows, stride) and not cublas.is_captured(place):
        multiply(x, w, out, w_rows, stride, place)
        if P:
            nvrtc.function("grouped_matmul", "copy_tails", FIELDS, d, place)(m_tiles * H, gemm.threads(config), shared, place.stream, *values)
        return out
    product(m_tiles * H * n_tiles, gemm.threads(config), shared, place.stream, *values)
    return out


def can_call(x, w, w_rows: int, stride: int) -> bool:
    """Whether cuBLAS can address the arrays: rows of its matrices do not overlap."""
    (B, H, T, N), M = x.shape, w.shape[1]
    apart = [(x.strides[0] if T == 1 else x.strides[2], N, B * T), (stride, *((N, M) if w_rows else (M, N)))]
    return N > 0 and M > 0 and x.strides[3] == 1 and all(step >= width or rows == 1 for step, width, rows in apart) and min(*x.strides, w.strides[0]) >= 0


def multiply(x, w, out, w_rows: int, stride: int, place) -> None:
    """One call for each batch entry; one for all of them where they have one row each."""
    (B, H, T, N), M, width = x.shape, w.shape[1], out.shape[3]
    rows, x_row, out_row = (B, x.strides[0], H * width) if T == 1 else (T, x.strides[2], width)
    for b in range(1 if T == 1 else B):
        cublas.products(place, (x.ptr + b * x.strides[0] * x.itemsize, max(x_row, N), x.strides[1]), (w.ptr, max(stride, N if w_rows else M), w.strides[0]),
                        (out.ptr + b * out.strides[0] * out.itemsize, out_row, out.strides[1]), rows, M, N, H, w_rows, (x.dtype, out.dtype))
