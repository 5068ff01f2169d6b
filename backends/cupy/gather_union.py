"""Path "union" of gather_attention (gather_attention_union.cu): neighbouring queries of one key head walk the union of their lists of blocks and read each block once.

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
FIELDS = "128s128s4Q" + SELECTED + POSITIONS + "3q8i2f"
FIELDS += f"{-struct.calcsize(FIELDS) % 64}x"  # the struct is as long as its alignment asks


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


def stage_bytes(D: int, Dv: int, keys: int) -> int:
    return (ceil_div(D, 64) + ceil_div(Dv, 64)) * keys * 128


def shared_bytes(D: int, Dv: int, keys: int) -> tuple[int, int]:
    """(stages, bytes): as many stages as fit beside the queries, 16 at most."""
    rest, stage = WARPS * ceil_div(max(D, Dv), 64) * 2048 + WINDOW * 4 + WARPS * MOST // 8, stage_bytes(D, Dv, keys)
    stages = min(16, (nvrtc.shared_limit("sm_90a") - rest) // (stage + 24))
    return stages, rest + stages * (stage + 24)


def resources(problem: Problem):
    return no_union(problem) or Resources(THREADS, shared_bytes(problem["D"], problem["Dv"], keys_of(problem.granularity))[1], 120)


def pays(problem: Problem) -> bool:
    """Whether items of 15 neighbouring queries fill a chip: of few queries each reads for itself."""
    return no_union(problem) is None and problem["B"] * problem["Hk"] * problem["T"] >= 2048


def defines(kind: str, D: int, Dv: int, granularity: int, softcap: bool) -> dict:
    keys = keys_of(granularity)
    return dict(KIND=KINDS[kind], WIDTH=padded(D), VALUES=padded(Dv), KEYS=keys, STAGES=shared_bytes(D, Dv, keys)[0], SOFTCAP=int(softcap))


def artifacts(problem: Problem) -> list[dict]:
    d = defines(problem.dtype("q"), problem["D"], problem["Dv"], problem.granularity, "softcap" in problem.features)
    return [dict(source="gather_attention_union", defines=d, names=["forward"])]


def run(q, k, v, indices, out, lse, *, place, lengths, granularity, causal, scale, sink_logits, softcap, kv_length, q_start):
    (B, Hq, T, D), (Hk, S), Dv = q.shape, k.shape[1:3], v.shape[3]
    keys, parts = keys_of(granularity), ceil_div(Hq // Hk, 16)
    tiles = ceil_div(T, WARPS // parts)
    items = B * Hk * tiles
    if items >= 2 ** 31:
        raise Unsupported(f"CuPy gather attention takes at most 2^31 - 1 tiles of queries, not {items}; split the batch")
    maps = []
    for x in (k, v):
        b, h, row = hopper.steps(x)
        maps.append(hopper.tensor_map(place, x, (x.shape[3], S, Hk, B), (1, row, h, b), (64, keys, 1, 1)))
    function = nvrtc.function("gather_attention_union", "forward", FIELDS, defines(q.dtype, D, Dv, granularity, softcap is not None), place)
    function(min(items, max(place.sms, 1)), THREADS, shared_bytes(D, Dv, keys)[1], place.stream, *maps, q.ptr, out.ptr, nvrtc.ptr(lse), nvrtc.ptr(sink_logits),
             *selected_values(indices, lengths, granularity, causal), *position_values(T, S, kv_length, q_start), *q.strides[:3],
             Hq, Hq // Hk, D, Dv, parts, tiles, items, granularity // keys, scale, softcap or 0.0)
    return out, lse
