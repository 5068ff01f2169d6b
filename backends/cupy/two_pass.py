"""The path "two_pass" of the block attention backward (block_attention_backward_two_pass.cu): dK, dV and dS first, then dQ = dS K. No additions in device memory.

dS of a block of 128 x 128 is 32 KiB. Key heads, or key blocks of one, are worked on in pieces whose dS fits `scratch` GiB and `room`; a piece of one key block of one key head is the least.
"""
import struct

from sparsetile.backends.cupy import compile as nvrtc
from sparsetile.backends.cupy.operands import LISTS, POSITIONS, ceil_div, lists_values, position_values

SLOPES, GIB = 128 * 128 * 2, 2 ** 30
LOG2E = 1.4426950408889634
FIELDS = "128s" * 6 + "17Q" + LISTS + POSITIONS + "17i2f"
FIELDS += f"{-struct.calcsize(FIELDS) % 64}x"  # the struct is as long as its alignment asks


def query_bytes(width: int) -> int:
    """Shared memory of `queries`: stages of 64 keys and their dS for 128 queries, dQ on its way out, barriers and items."""
    stage = (2 + width // 64) * 8192
    stages = 20 * 8192 // stage
    return 1024 + stages * stage + 128 * (width // 2 + 4) * 4 + 8 * (2 * stages + 4) + 32


def default_scratch(problem) -> int:
    """GiB: 4 where 2 hold less than two items for each multiprocessor of a large chip."""
    item = SLOPES * ceil_div(problem["T"], 128) * (problem["Hq"] // problem["Hk"])
    return 2 if 2 * GIB >= 264 * item else 4


def room(B: int, Hq: int, T: int, D: int, group: int) -> int:
    """Bytes for dS that keep all scratch under 2.2 x dQ in float32: 2 x, less the sums of one key head's dQ, which pieces of key blocks need; rows and K's copy are under 0.2 x. Small calls
    may take 64 MiB all the same: pieces of a few blocks would cost more in launches."""
    return max(4 * T * D * (2 * B * Hq - group), 2 ** 26)


def pieces(lists, key_heads: int, group: int, key_tiles: int, most_bytes: int) -> tuple[int, int, int]:
    """(key heads, key blocks, entries of a head at most) of a piece. The host knows a static layout's entries; of others what there is room for."""
    known, blocks = lists.extras.get("by_key_offsets"), min(lists.nk, key_tiles)
    most = min(lists.by_key_rows.shape[0], lists.nq * blocks)
    if known is not None and lists.nk:
        most = int((known[2 * lists.nk::2 * lists.nk] - known[:-1:2 * lists.nk]).max())
    each = max(most, 1) * group * SLOPES
    if each <= most_bytes:
        return ceil_div(key_heads, ceil_div(key_heads, most_bytes // each)), key_tiles, most
    blocks = max(1, min(blocks, most_bytes // (lists.nq * group * SLOPES)))
    return 1, blocks, min(most, lists.nq * blocks)


def far_longer(lists, name: str, lines: int) -> int:
    """Of the lists by row or by key, how many lines are far longer than the rest, at most in a list; 0 where the host does not know."""
    offsets, key = lists.extras.get(name), f"cupy.far.{name}"
    if offsets is None or not lines:
        return 0
    if key not in lists.extras:
        length = (offsets[2::2] - offsets[:-2:2]).reshape(-1, lines)
        lists.extras[key] = int((length > 4 * length.mean()).sum(axis=1).max())
    return lists.extras[key]


def run(maps, dq, dk, dv, lse, delta, lists, d, *, place, config, first_bytes, shape, tiles, scale, kv_length, q_start):
    """shape: (B, Hq, Hk, T, S, D, Dv); d: defines; first_bytes: shared memory of `backward`."""
    B, Hq, Hk, T, S, D, Dv = shape
    group, key_heads, key_tiles, width = Hq // Hk, B * Hk, ceil_div(S, 128), d["WIDTH"]
    heads, blocks, most = pieces(lists, key_heads, group, key_tiles, min(config["scratch"] * GIB, room(B, Hq, T, D, group)))
    cuts = [(head, min(heads, key_heads - head), block, min(blocks, key_tiles - block)) for head in range(0, key_heads, heads) for block in range(0, key_tiles, blocks)]
    whole, count = blocks >= key_tiles, max(lists.offsets.shape[0] // 2 // max(lists.nq, 1), lists.by_key_offsets.shape[0] // 2 // max(lists.nk, 1))
    rows, ticket = place.empty((2 * B * Hq * tiles, 196), "float32"), place.empty((2 * len(cuts),), "int32")
    sums = None if whole else place.empty((heads * group, tiles, 128, width), "float32")
    slopes, keys = place.empty((heads * group * most, SLOPES // 2), dq.dtype), place.empty((heads * blocks, 128, width), dq.dtype)
    order, order_rows = place.empty((count, key_tiles), "int32"), place.empty((count, lists.nq), "int32")
    walk, at = place.empty((lists.by_key_rows.shape[0], 4), "int32"), place.empty((lists.cols.shape[0],), "int32")
    start = S - T if q_start is None and kv_length is None else q_start
    covered = isinstance(start, int) and start // 128 == lists.first and tiles == lists.nq
    outside = 0 if covered else tiles
    ahead = min(far_longer(lists, "by_key_offsets", lists.nk), key_tiles) if whole else 0
    ahead_rows = far_longer(lists, "offsets", lists.nq)

    def launch(name, grid, threads, shared, n=0):
        head, n_heads, block, n_blocks = cuts[n]
        nvrtc.function("block_attention_backward_two_pass", name, FIELDS, d, place)(
            grid, threads, shared, place.stream, *maps, dq.ptr, dk.ptr, dv.ptr, lse.ptr, delta.ptr, rows.ptr, nvrtc.ptr(sums), slopes.ptr, keys.ptr, ticket.ptr + 8 * n, order.ptr, order_rows.ptr, walk.ptr, at.ptr,
            lists.by_key_offsets.ptr, lists.by_key_rows.ptr, lists.by_key_kinds.ptr, *lists_values(lists), *position_values(T, S, kv_length, q_start),
            Hq, group, D, Dv, tiles, key_tiles, outside, min(config["heads"], n_heads), ahead, ahead_rows, len(cuts), head, n_heads, block, blocks, most, n_heads * n_blocks, scale, scale * LOG2E)

    launch("prepare", 2 * B * Hq * tiles, 64, 0)
    launch("arrange", count * max(key_tiles, lists.nq), 32, 0)
    for n, (_, n_heads, _, n_blocks) in enumerate(cuts):
        launch("backward", min(n_heads * n_blocks, max(place.sms, 1)), 384, first_bytes, n)
        launch("queries", min(n_heads * group * (lists.nq + outside), max(place.sms, 1)), 384, query_bytes(width), n)
    return dq, dk, dv
