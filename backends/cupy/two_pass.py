"""The path "two_pass" of the block attention backward (block_attention_backward_two_pass.cu): dK, dV and dS first, then dQ = dS K. No additions in device memory.

dS of a block of 128 x 128 is 32 KiB. Key heads, or key blocks of one, are worked on in pieces whose dS fits `scratch` GiB and `room`; a piece of one key block of one key head is the least.
Key blocks that far more rows see than the others come in sections, whose dK and dV are added up in order: a piece ends no earlier than its longest item.
"""
import struct

import numpy as np

from sparsetile.backends.cupy import compile as nvrtc
from sparsetile.backends.cupy.operands import LISTS, POSITIONS, ceil_div, lists_values, position_values

SLOPES, GIB = 128 * 128 * 2, 2 ** 30
SECTIONS = 4  # of the rows, where a part has far fewer key blocks than query tiles
SHARE = 0.25  # of what a multiprocessor does in a piece: no section of a far longer key block is a larger one
LOG2E = 1.4426950408889634
FIELDS = "19Q" + LISTS + POSITIONS + "22i2f4i5Q"


def fields(maps: int) -> str:
    text = "128s" * maps + FIELDS
    return text + f"{-struct.calcsize(text) % 64}x"  # the struct is as long as its alignment asks


def query_bytes(width: int) -> int:
    """Shared memory of `queries`: stages of 64 keys and their dS for 128 queries, dQ on its way out, barriers and items."""
    stage = (2 + width // 64) * 8192
    stages = 20 * 8192 // stage
    return 1024 + stages * stage + 128 * (width // 2 + 4) * 4 + 8 * (2 * stages + 4) + 32 + 4 * stages


def default_scratch(problem) -> int:
    """GiB: 4 where 2 hold less than two items for each multiprocessor of a large chip."""
    item = SLOPES * ceil_div(problem["T"], 128) * (problem["Hq"] // problem["Hk"])
    return 2 if 2 * GIB >= 264 * item else 4


def room(B: int, Hq: int, T: int, D: int, held: int = 0) -> int:
    """Bytes for dS that keep all scratch under 2.2 x dQ in float32: 2 x, less the sums of dQ of `held` heads, which pieces of key blocks need; rows and K's copy are under 0.2 x. Small calls
    may take 64 MiB all the same: pieces of a few blocks would cost more in launches."""
    return max(4 * T * D * (2 * B * Hq - held), 2 ** 26)


def pieces(lists, key_heads: int, group: int, key_tiles: int, most_bytes: int, most_of_blocks: int) -> tuple[int, int, int]:
    """(key heads, key blocks, entries of a head at most) of a piece: as many whole heads as most_bytes of dS hold, else key blocks of one in most_of_blocks bytes. The host knows a static
    layout's entries; of others what there is room for."""
    known, blocks = lists.extras.get("by_key_offsets"), min(lists.nk, key_tiles)
    most = min(lists.by_key_rows.shape[0], lists.nq * blocks)
    if known is not None and lists.nk:
        most = int((known[2 * lists.nk::2 * lists.nk] - known[:-1:2 * lists.nk]).max())
    each = max(most, 1) * group * SLOPES
    if each <= most_bytes:
        return ceil_div(key_heads, ceil_div(key_heads, most_bytes // each)), key_tiles, most
    blocks = max(1, min(blocks, most_of_blocks // (lists.nq * group * SLOPES)))
    return 1, blocks, min(most, lists.nq * blocks)


def sections_of(lists, heads: int, group: int, key_tiles: int, most: int, place) -> tuple[int, int]:
    """(key blocks of a head that come in sections, sections of each): else a piece lasts as long as the longest of them (BigBird at 32k, four heads to a key head: 1024 query tiles beside the 170 of a multiprocessor)."""
    count, longest = lists.far_longer("by_key_offsets", key_tiles)
    sections = min(lists.nq, ceil_div(int(longest * place.sms / SHARE), max(heads * most, 1)))
    return (count, sections) if count and sections > 1 and (group == 1 or lists.list_of.shape[1] == 1) else (0, 1)


def pieces_of_parts(parts, shape, width: int, most_bytes: int) -> tuple[int, int, int] | None:
    """(key heads, key blocks, entries of a head at most) of a piece of a layout of several parts: heads stay whole, and their gradients stand in float32 beside dS.
    None where one head alone would need twice the room."""
    B, Hq, Hk, T, S, D, Dv = shape
    most = max(int((known[2 * lists.nk::2 * lists.nk] - known[:-1:2 * lists.nk]).max()) for lists, known in ((part.lists, part.lists.extras["by_key_offsets"]) for part in parts))
    blocks = max(part.lists.nk for part in parts)
    sums = max(part.sections * part.lists.nk for part in parts if part.sections > 1) if any(part.sections > 1 for part in parts) else 0
    each = max(most, 1) * Hq // Hk * SLOPES + blocks * 128 * width * 2 + 4 * (Hq // Hk * T * width + (S + 128 * sums) * (width + Dv))
    return (ceil_div(B * Hk, ceil_div(B * Hk, max(most_bytes // each, 1))), blocks, most) if each <= 2 * room(B, Hq, T, D) else None


def held_before(parts, i: int, S: int, place):
    """Bits of the keys that stand in the parts before part i, or None: all of them. Kept with the part's lists."""
    if any(part.axes.every for part in parts[:i]) or not i:
        return None
    extras, key = parts[i].lists.extras, ("cupy.held", S)
    if key not in extras:
        seen = np.zeros(-(-S // 32) * 32, bool)
        for part in parts[:i]:
            order = part.lists.extras["k_order"]
            seen[order[order >= 0]] = True
        extras[key] = place.upload(np.packbits(seen, bitorder="little").view(np.int32))
    return extras[key]


class Part:
    """All of a layout, or one of its parts (with axes: hopper_axes.Axes), and what `prepare` and `arrange` make of it."""

    def __init__(self, lists, maps, tiles: int, axes=None, covered: bool = True):
        """covered: the host knows that the lists hold every query tile of the call."""
        self.lists, self.maps, self.tiles, self.axes, self.outside = lists, maps, tiles, axes, 0 if covered else tiles
        self.cut, self.sections = 0, 1  # so many of a head's key blocks, the longest, come in so many items each
        self.held = None   # keys of the parts before, or None: all

    def allocate(self, place, heads: int, key_tiles: int, cuts: int):
        lists = self.lists
        self.key_tiles, self.count = key_tiles, max(lists.offsets.shape[0] // 2 // max(lists.nq, 1), lists.by_key_offsets.shape[0] // 2 // max(lists.nk, 1))
        self.rows, self.ticket = place.empty((2 * heads * self.tiles, 196), "float32"), place.empty((2 * cuts,), "int32")
        self.order, self.order_rows, self.whole = (place.empty((self.count, n), "int32") for n in (key_tiles, lists.nq, lists.nk))
        self.walk, self.at = place.empty((lists.by_key_rows.shape[0], 4), "int32"), place.empty((lists.cols.shape[0],), "int32")
        self.intervals, self.bitmaps = (0 if table is None else table.shape[0] for table in (lists.intervals, lists.bitmaps))
        self.quarters = place.empty((2 * max(self.intervals, self.bitmaps), 2), "uint8")

    def pointers(self):
        return tuple(x.ptr for x in (self.order, self.order_rows, self.whole, self.walk, self.at, self.quarters, self.lists.by_key_offsets, self.lists.by_key_rows, self.lists.by_key_kinds))


def run(parts, dq, dk, dv, lse, delta, d, *, place, config, first_bytes, shape, scale, kv_length, q_start):
    """parts: of type Part, in the order in which they are added; shape: (B, Hq, Hk, T, S, D, Dv); d: defines; first_bytes: shared memory of `backward`.
    None where parts of a layout do not fit (pieces_of_parts)."""
    B, Hq, Hk, T, S, D, Dv = shape
    group, key_heads, width, parted = Hq // Hk, B * Hk, d["WIDTH"], parts[0].axes is not None
    most_bytes, most_of_blocks = (min(config["scratch"] * GIB, room(B, Hq, T, D, held)) for held in (0, group))
    tiles = ceil_div(S, 128)
    for i, part in enumerate(parts):
        part.held = held_before(parts, i, S, place) if parted else None
    for part in parts[:-1]:  # a few long items for all multiprocessors: the longest of 128 (fixed 128 + 8 at 32k) took twice the mean
        if part.lists.nk * SECTIONS <= part.lists.nq:
            part.cut, part.sections = part.lists.nk, SECTIONS
    piece = pieces_of_parts(parts, shape, width, most_bytes) if parted else pieces(parts[0].lists, key_heads, group, tiles, most_bytes, most_of_blocks)
    if piece is None:
        return None
    heads, blocks, most = piece
    tiles = blocks if parted else tiles
    cuts = [(head, min(heads, key_heads - head), block, min(blocks, tiles - block)) for head in range(0, key_heads, heads) for block in range(0, tiles, blocks)]
    whole = blocks >= tiles
    if whole and not parted:
        parts[0].cut, parts[0].sections = sections_of(parts[0].lists, heads, group, tiles, most, place)
    for part in parts:
        part.allocate(place, B * Hq, part.lists.nk if parted else tiles, len(cuts))
    sums = None if whole else place.empty((heads * group, parts[0].tiles, 128, width), "float32")
    slopes, keys = place.empty((heads * group * most, SLOPES // 2), dq.dtype), place.empty((heads * blocks, 128, width), dq.dtype)
    wide, between, sums_of_keys = (0, 0, 0), None, None

    def launch(part, name, grid, threads, shared, n=0, adds=0, rounds=1):
        (head, n_heads, block, n_blocks), lists, axes = cuts[n], part.lists, part.axes
        n_blocks = part.key_tiles if parted else n_blocks
        items = n_blocks + part.cut * (part.sections - 1)
        far = min(lists.far_longer("by_key_offsets", part.key_tiles)[0] * part.sections, items) if whole else 0
        nvrtc.function("block_attention_backward_two_pass", name, fields(len(part.maps)), d, place)(
            grid(n_heads, n_blocks), threads, shared, place.stream, *part.maps, dq.ptr, dk.ptr, dv.ptr, lse.ptr, delta.ptr, part.rows.ptr, nvrtc.ptr(sums), slopes.ptr, keys.ptr, part.ticket.ptr + 8 * n,
            *part.pointers(), *lists_values(lists), *position_values(T, S, kv_length, q_start), Hq, group, D, Dv, part.tiles, part.key_tiles, part.outside, min(config["heads"], n_heads), far,
            lists.far_longer("offsets")[0], len(cuts), head, n_heads, block, n_blocks if parted else blocks, most, n_heads * items,
            *((axes.row_step, axes.key_step, axes.key_run) if parted else (1, 128, 128)), adds, rounds, scale, scale * LOG2E, 2 * B * Hq * part.tiles, part.intervals, part.sections, part.cut, nvrtc.ptr(sums_of_keys), nvrtc.ptr(part.held), *wide)

    for part in parts:
        launch(part, "prepare", lambda *_, part=part: 2 * B * Hq * part.tiles + part.intervals + part.bitmaps, 64, 0)
        launch(part, "arrange", lambda *_, part=part: part.count * max(part.key_tiles, part.lists.nq), 32, 0)
    sms = max(place.sms, 1)
    for n, (_, n_heads, _, _) in enumerate(cuts):
        if len(parts) > 1:
            between = None  # the last piece's memory serves again
            between = place.empty((n_heads * group, T, width), "float32"), place.empty((n_heads, S, width), "float32"), place.empty((n_heads, S, d["VALUES"]), "float32")
            wide = tuple(x.ptr for x in between)
        for i, part in enumerate(parts):
            adds, rounds = 3 if i else 0, int(i == len(parts) - 1)
            sums_of_keys = None
            sums_of_keys = place.empty((n_heads * part.cut * part.sections, 128, width + d["VALUES"]), "float32") if part.cut else None
            launch(part, "backward", lambda heads, blocks, part=part: min(heads * (blocks + part.cut * (part.sections - 1)), sms), 384, first_bytes, n, adds, rounds)
            if part.cut:
                launch(part, "join", lambda heads, _, part=part: 16 * heads * part.cut, 128, 0, n, adds, rounds)
            launch(part, "queries", lambda heads, _, part=part: min(heads * group * (part.lists.nq + part.outside), sms), 384, query_bytes(width), n, adds, rounds)
    return dq, dk, dv
