"""Path "sum" of grouped_matmul: heads are inner elements of one product (grouped_sum_hopper.cu), x [B,H,T,N] and w [H,M,N] -> out [B,1,T,M] float32, read where they lie."""
from sparsetile.backends.contract import Resources, Unsupported
from sparsetile.backends.cupy import compile as nvrtc
from sparsetile.backends.cupy import hopper
from sparsetile.backends.cupy.operands import HALVES, KINDS, ceil_div

SOURCE, THREADS, SHARED, CLUSTER = "grouped_sum_hopper", 384, 4 * 3 * 128 * 128 + 2 * 4 * 8, 2
FIELDS = "128s" * 2 + "Q8i24x"  # the struct is as long as its alignment, 64, asks


def refusal(problem) -> str | None:
    """Why heads are not summed for this problem."""
    if problem.arch != "sm_90a":
        return f"CuPy sums products over heads by sm_90a's instructions, which {problem.arch} lacks; set the heads side by side as inner elements of one"
    if problem.dtype("x") not in HALVES or problem.dtype("w") != problem.dtype("x") or problem.dtype("out") != "float32":
        return f"CuPy sums products of float16 or bfloat16 over heads, in float32, not {problem.dtype('x')}; set the heads side by side as inner elements of one"
    if problem["N"] % 64 or problem["M"] % 256 or problem["N"] == 0 or "tail" in problem.features:
        return f"CuPy sums products over heads with N a multiple of 64, M of 256 and no tail, not {problem['N']} and {problem['M']}; set the heads side by side as inner elements of one"
    return None


def resources() -> Resources:
    return Resources(THREADS, SHARED, 168)


def artifacts(kind: str) -> list[dict]:
    return [dict(source=SOURCE, defines=dict(KIND=KINDS[kind], CLUSTER=CLUSTER), names=[SOURCE])]


def run(x, w, place):
    (B, H, T, N), M = x.shape, w.shape[1]
    if not (hopper.can_map(x) and hopper.can_map(w)):
        raise Unsupported("CuPy sums products over heads whose rows start at multiples of 16 bytes and do not overlap; make x and w contiguous")
    cluster = getattr(place, "cluster", CLUSTER)  # tests bring a place without clusters
    clusters, blocks = max(place.sms // cluster, 1), ceil_div(T, 128 * cluster)
    items, parts = B * blocks * (M // 256), 1
    if H > 1 and ceil_div(2 * items, clusters) < 2 * ceil_div(items, clusters):
        parts = 2  # rounds of half as many heads
    out = (place.zeros if parts > 1 else place.empty)((B, 1, T, M), "float32")
    (xb, xh, xt), (wh, wm) = hopper.steps(x), hopper.steps(w)
    maps = hopper.tensor_map(place, x, (N, T, H, B), (1, xt, xh, xb), (64, 128, 1, 1)), hopper.tensor_map(place, w, (N, M, H), (1, wm, wh), (64, 128, 1))
    function = nvrtc.function(SOURCE, SOURCE, FIELDS, dict(KIND=KINDS[x.dtype], CLUSTER=cluster), place)
    function(min(parts * items, clusters) * cluster, THREADS, SHARED, place.stream, *maps, out.ptr, T, H, M, N // 64, blocks, parts * items, ceil_div(H, parts), parts > 1)
    return out
