"""Path "hopper" of gather_attention_backward: the latent of width 576 whose first 512 columns are the values, by warpgroup products, every order of sums harmless.

For a chunk of queries: `queries` (gather_backward_queries_hopper.cu) makes dQ, leaves probabilities and dS in `tiles` and adds up, for each key, a bound of all contributions to it;
`units` turns bounds into powers of two; `keys` (gather_backward_keys_hopper.cu) adds the contributions as integers in these units; `finish` turns them into floats. Integers add up
to the same bits in any order, so that twice the same call gives the same bits. Five products as FLOPs are counted; scratch: SCRATCH bytes of tiles (at least one query's), and for
each key 72 bytes of bounds, a unit, 576 integers and, where there are several chunks, 576 floats.
"""
from sparsetile.backends.contract import Problem, Unsupported
from sparsetile.backends.cupy import compile as nvrtc
from sparsetile.backends.cupy.operands import HALVES, KINDS, POSITIONS, SELECTED, ceil_div, copy_bytes, position_values, same_memory, selected_values

D, DV, HEADS, BINS = 576, 512, 64, 9
SCRATCH = 1 << 30
QUERY_FIELDS, KEY_FIELDS = "8Q" + SELECTED + POSITIONS + "7q6iIf", "5Q" + SELECTED + POSITIONS + "7q6i2f"
QUERY_THREADS, KEY_THREADS = 512, 384
QUERY_SHARED = 17 * HEADS * 128 + 2 * 9 * 32 * 128 + 2 * 2 * HEADS * 64 + 2 * HEADS * 4 + 2 * 136 + 9 * 8


def key_shared(blocks: int) -> int:
    return 6 * blocks * HEADS * 128 + 2 * blocks * 4 * HEADS * 64 + 2 * 32 * (192 * 4 + 64) + 4 * 8


def no_hopper(problem: Problem) -> str | None:
    """Why the path "hopper" is not for this problem."""
    if problem.arch != "sm_90a":
        return f"path hopper: {problem.arch} lacks its instructions; take portable"
    if problem.dtype("q") not in HALVES:
        return f"path hopper takes float16 or bfloat16, not {problem.dtype('q')}; take portable"
    if (problem["D"], problem["Dv"], problem["Hk"]) != (D, DV, 1) or "shared_kv" not in problem.features or problem.granularity != 1 or "softcap" in problem.features:
        return "path hopper takes one key head of width 576 whose first 512 columns are the values, tokens (granularity 1) and no softcap; take portable"
    return None


def takes(q, k, v, dout, indices, granularity: int, scale: float, softcap) -> bool:
    """The same for arrays: aligned rows that 32 bits can count, one list for all heads, and a scale that keeps the order of scores."""
    fits = (q.shape[3], v.shape[3], k.shape[1], indices.shape[1], granularity) == (D, DV, 1, 1, 1) and same_memory(k, v) and softcap is None
    return fits and 0 < scale <= 2 ** 64 and copy_bytes(q, k, dout) == 16 and 0 <= k.strides[2] < 2 ** 31


def blocks_of(Hq: int) -> int:
    """Blocks of 64 heads that one item of `keys` takes."""
    return 1 if Hq <= HEADS else 2


def artifacts(problem: Problem) -> list[dict]:
    kind, blocks = problem.dtype("q"), blocks_of(problem["Hq"])
    return [dict(source="gather_backward_queries_hopper", defines=dict(KIND=KINDS[kind], BLOCKS=blocks), names=["queries"]),
            dict(source="gather_backward_keys_hopper", defines=dict(KIND=KINDS[kind], BLOCKS=blocks, OUT_KIND=KINDS[problem.dtype("out", kind)]), names=["keys", "units", "finish"])]


def run(q, k, indices, lse, delta, dout, *, place, lengths, causal, scale, kv_length, q_start, out_dtype):
    """dq in the type of q; dk, the sum of both gradients of the latent, in out_dtype; None for dv."""
    (B, Hq, T, _), S, K = q.shape, k.shape[2], indices.shape[3]
    blocks = blocks_of(Hq)
    groups, places = ceil_div(Hq, HEADS * blocks), ceil_div(K, 64)
    each = groups * blocks * places * 4 * HEADS * 64  # bytes of tiles of a query
    count = min(T, max(1, SCRATCH // (B * each)))
    if 3 * B * count * groups * blocks >= 2 ** 31:
        raise Unsupported(f"CuPy's gather attention backward takes at most 2^31 - 1 tiles of a chunk on its path hopper, not 3 x {B * count * groups * blocks}; split the batch")
    dq, dk = place.empty(q.shape, q.dtype), place.empty(k.shape, out_dtype)
    tiles, bounds, units, sums = place.empty((B * count * each,), "uint8"), place.zeros((B * S * BINS,), "int64"), place.empty((B * S,), "float32"), place.zeros((B * S * D,), "int32")
    before = place.empty((B * S * D,), "float32") if count < T else None
    d = dict(KIND=KINDS[q.dtype], BLOCKS=blocks)
    keyed = dict(d, OUT_KIND=KINDS[out_dtype])
    listed = *selected_values(indices, lengths, 1, causal), *position_values(T, S, kv_length, q_start)
    heads = [2 * s for s in (*q.strides[:3], *dout.strides[:3])]
    queries = nvrtc.function("gather_backward_queries_hopper", "queries", QUERY_FIELDS, d, place)
    unit, keys, finish = (nvrtc.function("gather_backward_keys_hopper", name, fields, keyed, place) for name, fields in (("units", "2Qq"), ("keys", KEY_FIELDS), ("finish", "4Qq2i")))
    for first in range(0, T, count):
        n = min(count, T - first)
        items = B * n * groups * blocks
        queries(min(items, max(place.sms, 1)), QUERY_THREADS, QUERY_SHARED, place.stream, q.ptr, k.ptr, dout.ptr, lse.ptr, delta.ptr, dq.ptr, tiles.ptr, bounds.ptr, *listed, *heads,
                2 * k.strides[0], Hq, groups * blocks, items, first, n, places, 2 * k.strides[2], scale)
        unit(ceil_div(B * S, 256), 256, 0, place.stream, bounds.ptr, units.ptr, B * S)
        items = 3 * B * n * groups
        keys(min(items, max(place.sms, 1)), KEY_THREADS, key_shared(blocks), place.stream, q.ptr, dout.ptr, tiles.ptr, units.ptr, sums.ptr, *listed, *heads, B * S,
             Hq, groups, items, first, n, places, scale, 0.0)
        finish(ceil_div(B * S * 144, 256), 256, 0, place.stream, sums.ptr, units.ptr, nvrtc.ptr(before), dk.ptr if first + n == T else 0, B * S, int(first == 0), 0)
    return dq, dk, None
