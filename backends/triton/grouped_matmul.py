"""One small matrix per head: absorbing queries into the latent width and taking outputs out of it.

    x [B,H,T,N]  w [H,M,N] (any strides, one of the last two 1)  tail [B,H,T,P]  ->  [B,H,T,M+P]: x w^T in float32, rounded once, then the tail as it is
"""
import triton
import triton.language as tl

from sparsetile.backends.contract import Resources
from sparsetile.backends.triton import head_product as product
from sparsetile.backends.triton.float8 import passed, pointer, product_dtype

TUNABLES = product.TUNABLES
FLOATS = ("float32", "float16", "bfloat16")


@triton.jit
def head_products(x, w, tail, out, H, T, x_b, x_h, x_t, w_h, w_m, w_n, tail_b, tail_h, tail_t, out_b, out_h, out_t, N: tl.constexpr, M: tl.constexpr, P: tl.constexpr,
                  BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, DTYPE: tl.constexpr, GROUP: tl.constexpr):
    COLUMNS: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    tiles = (T + BLOCK_T - 1) // BLOCK_T
    tile, column = product.place_of(tl.program_id(0) % (tiles * COLUMNS), tiles, COLUMNS, GROUP)
    b, h = (tl.program_id(0) // (tiles * COLUMNS) // H).to(tl.int64), (tl.program_id(0) // (tiles * COLUMNS) % H).to(tl.int64)
    rows = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    out += b * out_b + h * out_h
    product.head_tile(x + b * x_b + h * x_h, x_t, None, 0, w + h * w_h, w_n, w_m, out, out_t, rows, column * BLOCK_M + tl.arange(0, BLOCK_M), T, N, M,
                      BLOCK_T, BLOCK_M, BLOCK_N, DTYPE)
    if P > 0:
        if column == 0:
            product.copy_tail(tail + b * tail_b + h * tail_h, tail_t, out + M, out_t, rows, T, P, BLOCK_T, BLOCK_P)


def supports(problem):
    if "inner_heads" in problem.features:
        return "Triton multiplies heads one by one; set them side by side as inner elements of one"
    kinds = {problem.dtype("x"), problem.dtype("w")}
    if not kinds <= {*FLOATS, "float8_e4m3fn"}:
        return f"the product takes float32, float16, bfloat16 and float8_e4m3fn, not {', '.join(sorted(kinds))}; cast x and w"
    return None


def resources(problem, config):
    asked = product.refusal(problem, config, "x", "w")
    return asked if isinstance(asked, str) else Resources(threads=32 * config["warps"], shared=asked)


def default_config(problem):
    return product.default_config(problem.arch, product_dtype(problem.dtype("x"), problem.dtype("w"), problem.arch), problem["T"])


def artifacts(problem, config):
    """Both unit strides of w."""
    arch, N, M, P = problem.arch, problem["N"], problem["M"], problem["P"]
    dtype = product_dtype(problem.dtype("x"), problem.dtype("w"), arch)
    arrays = {"x": pointer(problem.dtype("x"), arch), "w": pointer(problem.dtype("w"), arch), "out": pointer(problem.dtype("out", problem.dtype("w")), arch)}
    absent = {} if P else {"tail": None}
    if P:
        arrays["tail"] = pointer(problem.dtype("x"), arch)
    numbers = ("H", "T", "x_b", "x_h", "x_t", "w_h", "w_m", "w_n", "tail_b", "tail_h", "tail_t", "out_b", "out_h", "out_t")
    fixed = {**absent, "N": N, "M": M, "P": P, **product.constants(config, dtype, problem["T"], N, M, P)}
    found = []
    for unit in ("w_n", "w_m"):
        signature = {**arrays, **{name: "i32" for name in numbers if name != unit}}
        aligned = [name for name in signature if name not in ("H", "T")] if not (N % 16 or M % 16 or P % 16) else list(arrays)
        found.append({"fn": head_products, "signature": signature, "constexprs": {**fixed, unit: 1}, "div16": tuple(aligned),
                      "options": {"num_warps": config["warps"], "num_stages": config["stages"]}})
    return found


def run(x, w, *, place, config, tail=None, out_dtype=None):
    B, H, T, N = x.shape
    M, P = w.shape[1], 0 if tail is None else tail.shape[3]
    names = [str(array.dtype).removeprefix("torch.") for array in (x, w)]
    out = place.empty((B, H, T, M + P), out_dtype or names[0])
    if not out.numel():
        return out
    fixed = product.constants(config, product_dtype(*names, place.arch), T, N, M, P)
    grid = (B * H * triton.cdiv(T, fixed["BLOCK_T"]) * triton.cdiv(M, fixed["BLOCK_M"]),)
    head_products[grid](passed(x, place.arch), passed(w, place.arch), None if tail is None else passed(tail, place.arch), out, H, T, *x.stride()[:3], *w.stride(),
                        *((0, 0, 0) if tail is None else tail.stride()[:3]), *out.stride()[:3], N, M, P, **fixed, num_warps=config["warps"], num_stages=config["stages"])
    return out
