"""Path "hopper" of grouped_matmul: few rows, weights read once, all that is read asked for at once (grouped_matmul_hopper.cu)."""
from sparsetile.backends.arrays import View
from sparsetile.backends.contract import Resources
from sparsetile.backends.cupy import compile as nvrtc
from sparsetile.backends.cupy import hopper
from sparsetile.backends.cupy.operands import HALVES, KINDS, ceil_div

SOURCE, THREADS, TILE, ROWS = "grouped_matmul_hopper", 288, 128 * 128, 128
MOST = 8  # tiles of weights in flight: those of a head of 512 x 128
FIELDS = "128s" * 5 + "8i32x"  # the struct is as long as its alignment, 64, asks


def refusal(problem, out: str) -> str | None:
    """Why the path "hopper" is not for this problem."""
    if problem.arch != "sm_90a":
        return f"path hopper: {problem.arch} lacks its instructions; take portable"
    if problem.dtype("x") not in HALVES or {problem.dtype("w"), out} != {problem.dtype("x")}:
        return f"path hopper takes float16 or bfloat16 x, w and out of one type, not {problem.dtype('x')}, {problem.dtype('w')} and {out}; take portable"
    return None


def fits(N: int, M: int, P: int) -> bool:
    """Whether a head's rows have room, and the copy engine can address them; calls of other widths take the portable path."""
    return 0 < N <= 512 and P <= 64 and not any(n % 8 for n in (N, M, P))


def stages(N: int, M: int, P: int) -> int:
    """Tiles of weights in flight, beside the rows, two staged tiles of the result, and the tail."""
    return min(MOST, ceil_div(M, 128) * ceil_div(N, 64), 14 - ceil_div(N, 64) - 2 - (P > 0))


def shared_bytes(N: int, M: int, P: int) -> int:
    steps, held = ceil_div(N, 64), stages(N, M, P)
    return (steps + held + 2 + (P > 0)) * TILE + 8 * (2 * held + steps + 1)


def resources(problem) -> Resources:
    return Resources(THREADS, shared_bytes(*(problem[axis] for axis in "NMP")), 128)


def defines(kind: str, N: int, M: int, P: int, w_rows: int) -> dict:
    return dict(KIND=KINDS[kind], STEPS=ceil_div(N, 64), STAGES=stages(N, M, P), W_ROWS=w_rows, TAIL=int(P > 0))


def artifacts(problem) -> list[dict]:
    return [dict(source=SOURCE, defines=defines(problem.dtype("x"), *(problem[axis] for axis in "NMP"), rows), names=[SOURCE]) for rows in (0, 1)]


def takes(x, w, tail) -> bool:
    """Whether this call is one for `run`: widths that fit, arrays that the copy engine can address."""
    return fits(x.shape[3], w.shape[1], 0 if tail is None else tail.shape[3]) and hopper.can_map(x) and hopper.can_map_weight(w, 2, 1) and (tail is None or tail.dtype == x.dtype and hopper.can_map(tail))


def run(x, w, tail, out, w_rows: int, place):
    (B, H, T, N), M, width = x.shape, w.shape[1], out.shape[3]
    P, times = width - M, min(T, ROWS)
    batches = min(B, ROWS // times)
    rows = lambda a, columns: hopper.tensor_map(place, a, (columns, T, H, B), (1, *reversed(hopper.steps(a))), (64, times, 1, batches))  # noqa: E731
    weights = hopper.tensor_map(place, w, (N, M, H) if w_rows else (M, N, H), (1, w.strides[1 if w_rows else 2], w.strides[0]), (64, 64, 1))
    behind = View(out.ptr + M * out.itemsize, out.shape, out.strides, out.dtype, out.device, out.owner)
    time_tiles, tiles = ceil_div(T, times), ceil_div(M, 128)
    row_tiles = ceil_div(B, batches) * time_tiles
    span = min(range(1, tiles + 1), key=lambda n: (ceil_div(H * row_tiles * ceil_div(tiles, n), place.sms) * n, -n))  # rounds of the chip, then rows read seldom
    parts = ceil_div(tiles, span)
    maps = rows(x, N), weights, rows(out, M), *((rows(tail, P), rows(behind, P)) if P else (bytes(128),) * 2)
    function = nvrtc.function(SOURCE, SOURCE, FIELDS, defines(x.dtype, N, M, P, w_rows), place)
    function(H * row_tiles * parts, THREADS, shared_bytes(N, M, P), place.stream, *maps, batches, times, time_tiles, row_tiles, span, tiles, parts, 0)
    return out
