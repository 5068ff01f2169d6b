"""One small matrix per head: absorbing queries into the latent width, taking outputs out of it.

    x [B,H,T,N]  w [H,M,N] (any strides with one contiguous axis of the last two)  tail [B,H,T,P]  ->  out [B,H,T,M+P]

out[..., :M] = sum_n x w in float32, rounded once to out_dtype (x's by default); out[..., M:] is the tail, bit for bit where the types are equal.
float16 and bfloat16 run on tensor cores, other types and mixes by fused multiply-adds in float32.
"""
from sparsetile.backends.cupy import compile as nvrtc
from sparsetile.backends.cupy import gemm
from sparsetile.backends.cupy.operands import KINDS, ceil_div, copy_bytes

TUNABLES = gemm.TUNABLES
FIELDS = "4Q" + "8q" + "8i"
ROW_BYTES = 3 * 8  # struct Rows


def supports(problem):
    kinds = {problem.dtype("x"), problem.dtype("w")}
    if not kinds <= KINDS.keys() or problem.dtype("w") == "float8_e4m3fn":
        return f"CuPy multiplies float32, float16, bfloat16 (x also float8_e4m3fn), not {'/'.join(sorted(map(str, kinds)))}; cast to bfloat16"
    if problem.dtype("out", "float32") not in ("float32", "float16", "bfloat16"):
        return f"CuPy writes float32, float16 or bfloat16, not {problem.dtype('out')}; ask for out_dtype='bfloat16'"
    return None


def _out(problem) -> str:
    return problem.dtype("out") or (problem.dtype("x") if problem.dtype("x") != "float8_e4m3fn" else "bfloat16")


def resources(problem, config):
    return gemm.resources(problem.arch, problem.dtype("x"), problem.dtype("w"), _out(problem), False, config, ROW_BYTES)


def default_config(problem):
    return gemm.default_config(problem["B"] * problem["T"], problem["M"], lambda config: resources(problem, config))


def artifacts(problem, config):
    out = _out(problem)
    return [dict(source="grouped_matmul", defines=gemm.defines(problem.dtype("x"), problem.dtype("w"), out, out, (16, 16, 16, 16), rows, False, config), names=["grouped_matmul"]) for rows in (0, 1)]


def run(x, w, *, place, config, tail=None, out_dtype=None):
    (B, H, T, N), M = x.shape, w.shape[1]
    P = 0 if tail is None else tail.shape[3]
    out = place.empty((B, H, T, M + P), out_dtype or (x.dtype if x.dtype != "float8_e4m3fn" else "bfloat16"))
    if B * H * T * (M + P) == 0:
        return out
    w_rows, stride = gemm.orientation(w, 2, 1)
    copies = copy_bytes(x), gemm.weight_copy(w, w_rows, 2, 1), gemm.out_copy(out, M + P), gemm.tail_copy(tail, out, M, M + P)
    d = gemm.defines(x.dtype, w.dtype, out.dtype, None if tail is None else tail.dtype, copies, w_rows, False, config)
    function = nvrtc.function("grouped_matmul", "grouped_matmul", FIELDS, d, place)
    m_tiles, n_tiles = ceil_div(B * T, config["block_m"]), ceil_div(M, config["block_n"])
    function(m_tiles * H * n_tiles, gemm.threads(config), gemm.shared_bytes(x.dtype, w.dtype, out.dtype, w_rows, config, ROW_BYTES), place.stream,
             x.ptr, w.ptr, nvrtc.ptr(tail), out.ptr, *x.strides[:3], w.strides[0], stride, *(tail.strides[:3] if P else (0, 0, 0)), B, T, H, N, M, P, m_tiles, n_tiles)
    return out
