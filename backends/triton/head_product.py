"""One product per head, the tile that `latent_decompress` and `grouped_matmul` share: rows of x against a matrix of weights read in place at any strides."""
import triton
import triton.language as tl

from sparsetile.backends.contract import Tunable
from sparsetile.backends.triton.float8 import product_dtype, widen
from sparsetile.backends.triton.launch import power, shared_limit

TUNABLES = (
    Tunable("block_t", (64, 128, 256, 32), "rows of a tile"),
    Tunable("block_m", (64, 128, 256, 32), "columns of a tile"),
    Tunable("block_n", (32, 64, 128), "summed over at a time"),
    Tunable("warps", (4, 8), "warps of a program"),
    Tunable("stages", (2, 1, 3, 4), "loads in flight"),
    Tunable("group", (8, 1, 4, 16, 32), "tiles of rows that walk over all columns together, so that both stay in the cache"),
)


@triton.jit
def head_tile(x, x_t, scale, scale_t, w, w_n, w_m, out, out_t, rows, columns, T, N: tl.constexpr, M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr,
              BLOCK_N: tl.constexpr, DTYPE: tl.constexpr):
    """out[rows, columns] = sum over n of x[rows, n] * w[n, columns], each group of 128 n times its scale; float32 sums, rounded once."""
    n = tl.arange(0, BLOCK_N)
    at = x + rows.to(tl.int64)[:, None] * x_t + n[None, :]                                # [BLOCK_T, BLOCK_N]
    weights = w + n.to(tl.int64)[:, None] * w_n + columns.to(tl.int64)[None, :] * w_m     # [BLOCK_N, BLOCK_M]
    step = tl.full((1, 1), BLOCK_N, tl.int64) * w_n
    total = tl.zeros((BLOCK_T, BLOCK_M), tl.float32)
    for n0 in range(0, N, BLOCK_N):
        if N % BLOCK_N:
            left = widen(tl.load(at, mask=(rows < T)[:, None] & (n0 + n < N)[None, :], other=0.0), DTYPE)
            right = widen(tl.load(weights, mask=(n0 + n < N)[:, None] & (columns < M)[None, :], other=0.0), DTYPE)
        else:
            left = widen(tl.load(at, mask=(rows < T)[:, None], other=0.0), DTYPE)
            right = widen(tl.load(weights, mask=(columns < M)[None, :], other=0.0), DTYPE)
        if scale is None:
            total = tl.dot(left, right, total, input_precision="ieee")
        else:
            factor = tl.load(scale + rows.to(tl.int64) * scale_t + n0 // 128, mask=rows < T, other=0.0)
            total += tl.dot(left, right, input_precision="ieee") * factor[:, None]
        at += BLOCK_N
        weights += step
    places = out + rows.to(tl.int64)[:, None] * out_t + columns[None, :]
    tl.store(places, total.to(out.dtype.element_ty), mask=(rows < T)[:, None] & (columns < M)[None, :])


@triton.jit
def copy_tail(tail, tail_t, out, out_t, rows, T, P: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr):
    """out[rows, :P] = tail[rows, :P], bit by bit where the types agree."""
    for p0 in tl.static_range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        there = (rows < T)[:, None] & (p < P)[None, :]
        part = tl.load(tail + rows.to(tl.int64)[:, None] * tail_t + p[None, :], mask=there, other=0.0)
        if part.dtype != out.dtype.element_ty:
            part = widen(part, tl.float32).to(out.dtype.element_ty)
        tl.store(out + rows.to(tl.int64)[:, None] * out_t + p[None, :], part, mask=there)


@triton.jit
def place_of(pid, row_tiles, columns, GROUP: tl.constexpr):
    """(tile of rows, column): GROUP tiles of rows go through all columns before the next ones."""
    first = pid // (GROUP * columns) * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    inside = pid % (GROUP * columns)
    return first + inside % height, inside // height


def constants(config, dtype, T, N, M, P) -> dict:
    """Tiles cut to the problem."""
    return {"BLOCK_T": min(config["block_t"], power(T)), "BLOCK_M": min(config["block_m"], power(M)), "BLOCK_N": min(config["block_n"], power(N, 32)),
            "BLOCK_P": min(64, power(max(P, 1))), "DTYPE": dtype, "GROUP": config["group"]}


def default_config(arch, dtype, T) -> dict:
    if dtype == tl.float32:  # no tensor cores: operands live in registers
        return {"block_t": 64 if T > 32 else 32, "block_m": 64, "block_n": 32, "warps": 8, "stages": 2, "group": 8}
    few = T <= 64
    return {"block_t": 64 if few else 128, "block_m": 128, "block_n": 64, "warps": 4 if few else 8, "stages": 2 if arch == "gfx942" else 3, "group": 8}


def refusal(problem, config, x: str, w: str) -> str | int:
    """Bytes of shared memory, or why the tiles do not fit."""
    dtype = product_dtype(problem.dtype(x), problem.dtype(w), problem.arch)
    size = 4 if dtype == tl.float32 else 1 if dtype == tl.float8e4nv else 2
    shared = config["stages"] * size * config["block_n"] * (config["block_t"] + config["block_m"])
    limit = shared_limit(problem.arch)
    if shared > limit:
        return f"{config['stages']} stages of {config['block_t']} x {config['block_n']} and {config['block_n']} x {config['block_m']} need {shared} bytes, {problem.arch} has {limit}"
    held = config["block_t"] * config["block_m"] // (32 * config["warps"])
    if held > (32 if dtype == tl.float32 else 128):
        return f"a tile of {config['block_t']} x {config['block_m']} sums does not fit the registers of {config['warps']} warps; take a smaller tile or more warps"
    return shared
