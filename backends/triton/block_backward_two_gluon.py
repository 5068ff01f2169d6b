"""Path "gluon" of block_attention_backward, its kernels from the host: dQ by the lists of queries (block_backward_queries_gluon.py), dK and dV by the lists of keys
(block_backward_keys_gluon.py); seven products, no sum has two owners. D up to 192.

Lists far longer than the rest come in sections where one alone would take longer than a multiprocessor's share of everything; their float32 sums are added in order
(block_backward_kinds.py).
"""
from functools import lru_cache

from sparsetile.backends.triton import relaunch
from sparsetile.backends.triton.block_backward_keys_gluon import keys_gluon
from sparsetile.backends.triton.block_backward_kinds import TOGETHER, join_keys, join_queries, turn_kinds
from sparsetile.backends.triton.block_backward_queries_gluon import queries_gluon
from sparsetile.backends.triton.gluon_items import KEYS, ROWS
from sparsetile.backends.triton.gluon_maps import Map
from sparsetile.backends.triton.launch import covered, known_start, list_steps, power, schedule

KEY_STAGES = 3  # steps of `keys_gluon` under way


def widths(D: int, DV: int) -> dict:
    """Columns as they lie in shared memory."""
    return dict(D0=64 if D <= 64 else 128, D1=64 if D > 128 else 0, V0=power(DV, 64))


@lru_cache(1024)
def constants(D: int, DV: int, intervals=False, bitmaps=False, edge_k=False, edge_q=False, from_length=False, own=False) -> dict:
    """Of each kernel by its name. edge_k: some keys of a block may not exist; edge_q: some queries of a tile; own: heads of a group have lists of their own.
    Keys of a step of dQ: 64, of which more are under way (Longformer 1.33 -> 1.19 ms, random blocks 3.60 -> 3.52), but at D 64 such a step has too little to do (1.49 -> 1.72)."""
    w, tables, place, gluon = widths(D, DV), dict(INTERVALS=intervals, BITMAPS=bitmaps), dict(FROM_LENGTH=from_length), dict(num_warps=4, enable_fp_fusion=False)
    halves, each = dict(D=D, D0=w["D0"], D1=w["D1"]), 512 if intervals and bitmaps else 256 if intervals or bitmaps else 0  # kinds of one table alone are every second number
    made = dict(queries_gluon=dict(D=D, **w, STEP=128 if D <= 64 else 64, EDGE=edge_k, **tables, **place, **gluon),
                keys_gluon=dict(D=D, DV=DV, **w, STAGES=KEY_STAGES, MASKS=each, OWN=own, EDGE=edge_q, **place, **gluon),
                turn_kinds=dict(**tables, EACH=each, TOGETHER=TOGETHER, num_warps=TOGETHER // 2),
                join_queries=dict(**halves, R=16, num_warps=4), join_keys=dict(D=D, DV=DV, **w, **place, R=16, num_warps=4))
    return {name: relaunch.Constants(values) for name, values in made.items()}


def sections_of(lists, name: str, heads: int, far: int, sms: int) -> int:
    """In how many sections the far longer lists, `far` of each head, come: 1 where the longest is no more than a multiprocessor's share of everything, else so many that one is half
    of that."""
    if not far:
        return 1
    offsets, longest = lists.extras[name], lists.far_longer(name)[1]
    different, entries = len(offsets) // 2 // (lists.nq if name == "offsets" else lists.nk), int(offsets[-1] - offsets[0])
    shares = longest * (different / entries) * sms / heads
    return 1 if shares <= 1 else min(-(-longest // 4), int(2 * shares) + 1)


class Call:
    """What the kernels of a call have in common."""

    def __init__(self, q, k, v, dout, lists, lse, delta, place, scale: float, kv_length, q_start):
        (self.B, self.Hq, self.T, D), (self.Hk, self.S), DV = q.shape, k.shape[1:3], v.shape[3]
        self.k, self.v, self.lists, self.known, self.place, self.scale, self.kind = k, v, lists, (lse, delta), place, float(scale), (q.dtype,)
        self.group, self.sms, (host, starts) = self.Hq // self.Hk, max(place.sms, 1), known_start(q_start)
        (self.tiles, covers, _), self.key_tiles = covered(self.T, ROWS.value, host, lists.first, lists.nq), -(-self.S // KEYS.value)
        exact = covers and host % ROWS.value == 0 and self.T % ROWS.value == 0
        self.own = lists.list_of.shape[1] > 1 and self.group > 1
        self.made = constants(D, DV, lists.has_intervals, lists.has_bitmaps, kv_length is not None or lists.nk * KEYS.value > self.S, not exact, q_start is None, self.own)
        self.D0, self.D1, self.V0 = (self.made["queries_gluon"][name] for name in ("D0", "D1", "V0"))
        self.order, self.order_by_key = schedule(lists) if covers else None, schedule(lists, True) if self.key_tiles == lists.nk else None
        self.far, self.far_by_key = (lists.far_longer(name)[0] if order is not None else 0 for name, order in (("offsets", self.order), ("by_key_offsets", self.order_by_key)))
        self.strides, self.positions, self.start = list_steps(lists), (kv_length, starts), host or 0
        self.maps = *self.halves(q, 64), Map(dout, 64, self.V0)

    def halves(self, x, rows: int) -> tuple:
        """Tensor maps of the first 128 columns and of the rest."""
        return Map(x, rows, self.D0), Map(x, rows, self.D1) if self.D1 else None

    def launch(self, kernel, programs: int, pointers: tuple, numbers: tuple, maps: tuple = ()):
        relaunch.launch(kernel, (programs,), self.place, pointers, numbers, self.made[kernel.__name__], self.kind, maps)

    def turn_kinds(self):
        """Partial blocks as keys see them, and which quarters of them hold a pair; None where there are none."""
        lists = self.lists
        self.words = self.quarters = None
        if lists.has_intervals or lists.has_bitmaps:
            intervals, bitmaps = lists.intervals.shape[0] if lists.has_intervals else 0, lists.bitmaps.shape[0] if lists.has_bitmaps else 0
            numbers, each = 2 * max(intervals, bitmaps), self.made["turn_kinds"]["EACH"]
            self.words, self.quarters = self.place.empty((numbers * each + 512 - each,), "int32"), self.place.empty((numbers,), "int32")
            self.launch(turn_kinds, -(-(intervals + bitmaps) // TOGETHER), (lists.intervals, lists.bitmaps, self.words, self.quarters), (intervals, intervals + bitmaps))


def flat(x):
    return x.view(-1, *x.shape[2:])


def launch(q, k, v, dout, lists, lse, delta, dq, dk, dv, place, scale: float, *, kv_length, q_start):
    """Fills dq, dk and dv."""
    call, ticket = Call(q, k, v, dout, lists, lse, delta, place, scale, kv_length, q_start), place.zeros((2,), "int32")
    call.turn_kinds()
    by_queries(call, dq, ticket[:1])
    by_keys(call, dk, dv, ticket[1:])


def by_queries(c: Call, dq, ticket):
    lists, heads, sections = c.lists, c.B * c.Hq, sections_of(c.lists, "offsets", c.B * c.Hq, c.far, c.sms)
    sums = c.place.empty((heads * c.far * sections, ROWS.value, c.D0 + c.D1), "float32") if sections > 1 else None
    items, step = heads * (c.tiles + c.far * (sections - 1)), c.made["queries_gluon"]["STEP"]
    c.launch(queries_gluon, min(items, c.sms),
             (dq, sums, *c.known, lists.offsets, lists.cols, lists.kinds, c.quarters, lists.intervals, lists.bitmaps, lists.list_of, c.order, *c.positions, ticket),
             (*c.strides, heads, c.Hq, c.group, c.T, c.S, lists.first, lists.nq, c.tiles, c.far, sections, items, c.start, c.scale),
             (*c.maps, *c.halves(c.k, step), Map(c.v, step, c.V0), *c.halves(flat(dq), 64)))
    if sections > 1:
        c.launch(join_queries, heads * c.far * 8, (sums, dq, lists.list_of, c.order), (*c.strides, heads, c.Hq, c.T, lists.nq, lists.first, heads * c.far, sections, c.start))


def by_keys(c: Call, dk, dv, ticket):
    lists, heads = c.lists, c.B * c.Hk
    sections = 1 if c.own else sections_of(lists, "by_key_offsets", heads, c.far_by_key, c.sms)  # a section is one list's
    sums = c.place.empty((heads * c.far_by_key * sections, KEYS.value, c.D0 + c.D1 + c.V0), "float32") if sections > 1 else None
    items = heads * (c.key_tiles + c.far_by_key * (sections - 1))
    c.launch(keys_gluon, min(items, c.sms),
             (dk, dv, sums, *c.known, lists.by_key_offsets, lists.by_key_rows, lists.by_key_kinds, c.words, c.quarters, lists.list_of, c.order_by_key, *c.positions, ticket),
             (*c.strides, heads, c.Hk, c.group, c.T, c.S, lists.first, lists.nq, lists.nk, c.key_tiles, c.far_by_key, sections, items, c.start, c.scale),
             (*c.maps, *c.halves(c.k, 64), Map(c.v, 64, c.V0), *c.halves(flat(dk), 64), Map(flat(dv), 64, c.V0)))
    if sections > 1:
        c.launch(join_keys, heads * c.far_by_key * 8, (sums, dk, dv, lists.list_of, c.order_by_key, *c.positions),
                 (*c.strides, heads, c.Hk, c.group, c.T, c.S, lists.nk, heads * c.far_by_key, sections, c.start))
