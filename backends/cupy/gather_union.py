"""Path "union" of gather_attention (gather_attention_union.cu) and of dQ in its backward (gather_backward_union.cu): neighbouring queries of one key head walk the union of their
lists of blocks and read each block once.

15 warps hold 16 heads of one query each: 15 queries of a group of up to 16 heads, 7 of one of 17 to 32, 3 of one of 49 to 64. A step is 16, 32 or 64 keys, the most that divides the
granularity; a warp passes by the steps that its query did not choose. What it saves is what neighbours share: forced blocks at least, and of short sequences most of what they chose.
"""
import struct

from sparsetile.backends.contract import Problem, Resources, Unsupported
from sparsetile.backends.cupy import compile as nvrtc
from sparsetile.backends.cupy import hopper
from sparsetile.backends.cupy.operands import HALVES, KINDS, POSITIONS, SELECTED, ceil_div, copy_bytes, padded, position_values, selected_values

WARPS, WINDOW, MOST = 15, 1024, 1024  # as in the source
THREADS = 32 * (WARPS + 1)
FIELDS, ROW_FIELDS = (f"{fields}{-struct.calcsize(fields) % 64}x"  # a struct is as long as its alignment asks
                      for fields in ("128s128s4Q" + SELECTED + POSITIONS + "3q8i2f", "128s128s5Q" + SELECTED + POSITIONS + "6q8i2f"))


def keys_of(granularity: int) -> int:
    """Keys of a step: the most that divides the granularity, 0 if nothing does."""
    return next((n for n in (64, 32, 16) if granularity % n == 0), 0)


def no_union(problem: Problem) -> str | None:
    """Why the path "union" is not for this problem."""
    D, Dv, group, keys = problem["D"], problem["Dv"], problem["Hq"] // problem["Hk"], keys_of(problem.granularity)
    if problem.arch != "sm_90a":
        return f"path union: {problem.arch} lacks its instructions; take portable"
    if problem.dtype("q") not in HALVES or problem.dtype("out", problem.dtype("q")) != problem.dtype("q"):
        return f"path union takes float16 or bfloat16 and answers in the same type, not {problem.dtype('q')} to {problem.dtype('out', problem.dtype('q'))}; take portable"
    if max(D, Dv) > 128 or D % 8 or Dv % 8 or group > 64:
        return f"path union takes D and Dv up to 128, multiples of 8, and up to 64 heads a key head, not {D}, {Dv} and {group}; take portable"
    if not keys or problem["K"] * (problem.granularity // keys) > MOST:
        return f"path union takes lists of up to {MOST} blocks of 16, 32 or 64 keys, not {problem['K']} entries of {problem.granularity} keys; take portable"
    return None


def takes(q, k, v, indices, out_kind: str) -> bool:
    """The same for arrays: aligned rows, the copy engine's strides, one list for the heads of a key head."""
    return out_kind == q.dtype and indices.shape[1] in (1, k.shape[1]) and copy_bytes(q) == 16 and hopper.can_map(k) and hopper.can_map(v)


def shared_bytes(D: int, Dv: int, keys: int, backward: bool = False) -> tuple[int, int]:
    """(stages, bytes): as many stages as fit beside the queries (the backward keeps dO beside q), 16 at most."""
    k, v = ceil_div(D, 64), ceil_div(Dv, 64)
    rest, stage = WARPS * (k + v if backward else max(k, v)) * 2048 + WINDOW * 4 + WARPS * MOST // 8, (k + v) * keys * 128
    stages = min(16, (nvrtc.shared_limit("sm_90a") - rest) // (stage + 24))
    return stages, rest + stages * (stage + 24)


def resources(problem: Problem, backward: bool = False):
    return no_union(problem) or Resources(THREADS, shared_bytes(problem["D"], problem["Dv"], keys_of(problem.granularity), backward)[1], 128)


def pays(problem: Problem) -> bool:
    """Whether items of 15 neighbouring queries fill a chip: of few queries each reads for itself."""
    return no_union(problem) is None and problem["B"] * problem["Hk"] * problem["T"] >= 2048


def defines(kind: str, D: int, Dv: int, granularity: int, softcap: bool, backward: bool = False) -> dict:
    keys = keys_of(granularity)
    return dict(KIND=KINDS[kind], WIDTH=padded(D), VALUES=padded(Dv), KEYS=keys, STAGES=shared_bytes(D, Dv, keys, backward)[0], SOFTCAP=int(softcap))


def artifacts(problem: Problem, backward: bool = False) -> list[dict]:
    d = defines(problem.dtype("q"), problem["D"], problem["Dv"], problem.granularity, "softcap" in problem.features, backward)
    return [dict(source="gather_backward_union", defines=d, names=["rows"]) if backward else dict(source="gather_attention_union", defines=d, names=["forward"])]


def tile_values(q, k, granularity: int) -> tuple[int, int, int, int]:
    """(parts, tiles, items, span): warps that share a query's heads, tiles of neighbouring queries, all of them, steps that an entry stands for."""
    (B, Hq, T, _), Hk = q.shape, k.shape[1]
    parts = ceil_div(Hq // Hk, 16)
    tiles = ceil_div(T, WARPS // parts)
    items = B * Hk * tiles
    if items >= 2 ** 31:
        raise Unsupported(f"CuPy gather attention takes at most 2^31 - 1 tiles of queries, not {items}; split the batch")
    return parts, tiles, items, granularity // keys_of(granularity)


def key_maps(k, v, granularity: int, place) -> list[bytes]:
    """How the copy engine sees k and v: boxes of a step's rows x 64 columns."""
    return [hopper.tensor_map(place, x, (x.shape[3], x.shape[2], x.shape[1], x.shape[0]), (1, row, h, b), (64, keys_of(granularity), 1, 1)) for x in (k, v) for b, h, row in (hopper.steps(x),)]


def run(q, k, v, indices, out, lse, *, place, lengths, granularity, causal, scale, sink_logits, softcap, kv_length, q_start):
    (_, Hq, T, D), (Hk, S), Dv = q.shape, k.shape[1:3], v.shape[3]
    tiles = tile_values(q, k, granularity)
    function = nvrtc.function("gather_attention_union", "forward", FIELDS, defines(q.dtype, D, Dv, granularity, softcap is not None), place)
    function(min(tiles[2], max(place.sms, 1)), THREADS, shared_bytes(D, Dv, keys_of(granularity))[1], place.stream, *key_maps(k, v, granularity, place), q.ptr, out.ptr, nvrtc.ptr(lse),
             nvrtc.ptr(sink_logits), *selected_values(indices, lengths, granularity, causal), *position_values(T, S, kv_length, q_start), *q.strides[:3],
             Hq, Hq // Hk, D, Dv, *tiles, scale, softcap or 0.0)
    return out, lse


def run_rows(q, k, v, indices, lse, delta, dout, dq, *, place, lengths, granularity, causal, scale, softcap, kv_length, q_start):
    """dQ alone."""
    (_, Hq, T, D), (Hk, S), Dv = q.shape, k.shape[1:3], v.shape[3]
    tiles = tile_values(q, k, granularity)
    function = nvrtc.function("gather_backward_union", "rows", ROW_FIELDS, defines(q.dtype, D, Dv, granularity, softcap is not None, True), place)
    function(min(tiles[2], max(place.sms, 1)), THREADS, shared_bytes(D, Dv, keys_of(granularity), True)[1], place.stream, *key_maps(k, v, granularity, place), q.ptr, dout.ptr, lse.ptr, delta.ptr,
             dq.ptr, *selected_values(indices, lengths, granularity, causal), *position_values(T, S, kv_length, q_start), *q.strides[:3], *dout.strides[:3],
             Hq, Hq // Hk, D, Dv, *tiles, scale, softcap or 0.0)
