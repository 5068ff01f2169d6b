"""Paths "gluon" and "gluon_ordered" of block_attention_backward, the host's side: for Hopper, float16 and bfloat16, blocks of 128 x 128.

gluon: seven products in two kernels, no sum has two owners; D up to 192 (block_backward_two_gluon.py).
gluon_ordered: five products in one pass, dQ added in a fixed order (block_backward_ordered_gluon.py, block_backward_order.py); D 65 to 128. Each sum is in one order: twice the same call
gives the same bits. Scores are rounded as in the portable source (tiles.py), hence as in the forward.
"""
from functools import lru_cache

from sparsetile.backends.contract import Resources
from sparsetile.backends.triton import relaunch
from sparsetile.backends.triton.block_backward_keys_gluon import keys_gluon
from sparsetile.backends.triton.block_backward_kinds import join_keys, join_queries, turn_kinds
from sparsetile.backends.triton.block_backward_order import finish, order
from sparsetile.backends.triton.block_backward_ordered_gluon import ordered_gluon
from sparsetile.backends.triton.block_backward_queries_gluon import queries_gluon
from sparsetile.backends.triton.block_backward_two_gluon import KEY_STAGES, constants, flat, launch, widths
from sparsetile.backends.triton.gluon_items import KEYS, ROWS
from sparsetile.backends.triton.gluon_maps import Map, map_type
from sparsetile.backends.triton.launch import POINTER, covered, known_start, list_steps, power
from sparsetile.backends.triton.maps import can_map

__all__ = ["artifacts", "launch", "launch_ordered", "resources", "shares_lists", "takes"]


@lru_cache(1024)
def ordered_constants(D: int, DV: int, intervals=False, bitmaps=False, edge_q=False, from_length=False, ascending=False) -> tuple:
    """Of `order`, `ordered_gluon` and `finish`."""
    return (relaunch.Constants(ASCENDING=ascending, N=128, num_warps=4),
            relaunch.Constants(D=D, DV=DV, D0=128, V0=power(DV, 64), INTERVALS=intervals, BITMAPS=bitmaps, EDGE=edge_q, FROM_LENGTH=from_length, num_warps=4, enable_fp_fusion=False),
            relaunch.Constants(D=D, FROM_LENGTH=from_length, num_warps=8))


def launch_ordered(q, k, v, dout, lists, lse, delta, dq, dk, dv, place, scale: float, *, kv_length, q_start, heads: int, walk: str):
    """Fills dq, dk and dv; `heads` key heads are worked on at a time."""
    (B, Hq, T, D), (Hk, S), DV = q.shape, k.shape[1:3], v.shape[3]
    group, (host, starts) = Hq // Hk, known_start(q_start)
    (n, _, exact), key_tiles = covered(T, ROWS.value, host, lists.first, lists.nq), -(-S // KEYS.value)
    ascending = walk == "ascending" and kv_length is None  # key blocks past the last key would come first, and take their turns with every key masked
    before, made, after = ordered_constants(D, DV, lists.has_intervals, lists.has_bitmaps, not exact, q_start is None, ascending)
    entries, blocks = lists.by_key_rows.shape[0], lists.by_key_offsets.shape[0] // 2
    walked, kinds, ranks = (place.empty((max(entries, 1),), "int32") for _ in range(3))
    counters, sums = place.zeros((B * Hq * n * 2 + 4,), "int32"), place.empty((B * Hq * n * ROWS.value * 4, 32), "float32")
    ticket, turns = counters[:1], counters[4:]
    relaunch.launch(order, (blocks,), place, (lists.offsets, lists.cols, lists.by_key_offsets, lists.by_key_rows, lists.by_key_kinds, walked, kinds, ranks),
                    (lists.nq, lists.nk, key_tiles, max(lists.nq, lists.nk).bit_length() + 1), before)
    items = B * Hk * key_tiles
    relaunch.launch(ordered_gluon, (min(items, max(place.sms, 1)),), place,
                    (dk, dv, lse, delta, lists.by_key_offsets, lists.by_key_rows, walked, kinds, ranks, turns, lists.intervals, lists.bitmaps, lists.list_of, kv_length, starts, ticket),
                    (*list_steps(lists), B * Hk, Hk, group, T, S, lists.first, lists.nq, lists.nk, key_tiles, n, min(heads, B * Hk), int(ascending), int(walk == "abreast"), items, host or 0, float(scale)), made, (q.dtype,),
                    (Map(q, 64, 128), Map(dout, 64, made["V0"]), Map(k, 64, 128), Map(v, 64, made["V0"]), Map(flat(dk), 64, 128), Map(flat(dv), 64, made["V0"]), Map(sums, 64, 32)))
    relaunch.launch(finish, (B * Hq * n * 2,), place, (sums, turns, dq, kv_length, starts), (Hq, T, S, n, host or 0, float(scale)), after, (q.dtype,))


def takes(q, k, v, dout, lists, scale: float, softcap, out_kind: str) -> bool:
    """Whether this call is one for `launch`: no orders, no softcap, a positive scale, gradients of q's type, arrays as the copy engine addresses them."""
    return lists.q_order is None and lists.k_order is None and softcap is None and 1e-30 < scale < 1e38 and out_kind == str(q.dtype)[6:] and all(map(can_map, (q, k, v, dout)))


def shares_lists(q, k, lists) -> bool:
    """Whether the heads of a group have one list: only those add to dQ in one order of key blocks."""
    return lists.list_of.shape[1] == 1 or q.shape[1] == k.shape[1]


def artifacts(problem, path: str) -> list[dict]:
    has, pointer = problem.features.__contains__, POINTER[problem.dtype("q")]
    D, DV, tables, from_length = problem["D"], problem["Dv"], (has("interval"), has("bitmap")), has("kv_length") and not has("q_start")
    edge_q = has("kv_length") or has("q_start") or problem["T"] % ROWS.value != 0

    def mapped(rank, rows, columns, kind=pointer, bits=16):
        return map_type(kind, [1] * (rank - 2) + [rows, columns], bits)

    def artifact(fn, made, arrays, integers, floats=("scale",), maps=lambda made: {}):
        return relaunch.artifact(fn, made, arrays, integers, floats, maps(made), unaligned=("ticket",))
    positions = ["kv_length"] * has("kv_length") + ["q_starts"] * has("q_start")
    rows = dict(lse="*fp32", delta="*fp32")
    integers = ("slb", "slh", "heads", "group", "T", "S", "first", "nq", "tiles", "items", "q_start")

    def halves(name, rank, rows, made):
        return {f"{name}0": mapped(rank, rows, made["D0"])} | ({f"{name}1": mapped(rank, rows, made["D1"])} if made["D1"] else {})

    def inputs(made, keys):
        return halves("q", 4, 64, made) | dict(dout=mapped(4, 64, made["V0"])) | halves("k", 4, keys, made) | dict(v=mapped(4, keys, made["V0"]))

    def words(*names, tables=("intervals", "bitmaps")):
        return {name: "*i32" for name in (*names, *tables, "list_of", *positions)}
    if path == "gluon" or has("per_head") and problem["Hq"] != problem["Hk"]:
        made = constants(D, DV, *tables, has("kv_length") or problem["S"] % KEYS.value != 0, edge_q, from_length, has("per_head"))
        sums, turned = dict(sums="*fp32") if has("global") else {}, ["words", "quarters"] if any(tables) else []
        lists, more = ("offsets", "kinds", "schedule", "ticket"), ("ahead", "sections")
        found = [artifact(queries_gluon, made["queries_gluon"], dict(dq=pointer) | rows | sums | words(*lists, "cols", *turned[1:]), (*integers, "Hq", *more),
                          maps=lambda made: inputs(made, made["STEP"]) | halves("dq_map", 3, 64, made)),
                 artifact(keys_gluon, made["keys_gluon"], dict(dk=pointer, dv=pointer) | rows | sums | words(*lists, "entries", *turned, tables=()), (*integers, "Hk", "nk", *more),
                          maps=lambda made: inputs(made, 64) | halves("dk_map", 3, 64, made) | dict(dv_map=mapped(3, 64, made["V0"])))]
        if turned:
            found.append(artifact(turn_kinds, made["turn_kinds"], {name: "*i32" for name in ("intervals", "bitmaps", *turned)}, ("n_intervals", "n"), ()))
        if sums:
            of_joins = {name: "*i32" for name in ("list_of", "schedule")}
            found.append(artifact(join_queries, made["join_queries"], sums | dict(dq=pointer) | of_joins,
                                  ("slb", "slh", "heads", "Hq", "T", "nq", "first", "far", "sections", "q_start"), ()))
            found.append(artifact(join_keys, made["join_keys"], sums | dict(dk=pointer, dv=pointer) | of_joins | {name: "*i32" for name in positions},
                                  ("slb", "slh", "heads", "Hk", "group", "T", "S", "nk", "far", "sections", "q_start"), ()))
        return found
    before, made, after = ordered_constants(D, DV, *tables, edge_q, from_length)
    lists = ("offsets", "cols", "by_key_offsets", "by_key_rows", "by_key_kinds", "walk", "kinds", "ranks")
    return [artifact(order, before, {name: "*i32" for name in lists}, ("nq", "nk", "key_tiles", "bits"), ()),
            artifact(ordered_gluon, made, dict(dk=pointer, dv=pointer) | rows | words("offsets", "entries", "walk", "kinds", "ranks", "turns", "ticket"),
                     (*integers, "Hk", "nk", "q_tiles", "together", "ascending", "abreast"),
                     maps=lambda made: dict(q=mapped(4, 64, 128), dout=mapped(4, 64, made["V0"]), k=mapped(4, 64, 128), v=mapped(4, 64, made["V0"]),
                                            dk_map=mapped(3, 64, 128), dv_map=mapped(3, 64, made["V0"]), sums=mapped(2, 64, 32, "*fp32", 32))),
            artifact(finish, after, dict(sums="*fp32", turns="*i32", dq=pointer) | {name: "*i32" for name in positions}, ("Hq", "T", "S", "tiles", "q_start"))]


def resources(D: int, DV: int, path: str) -> Resources:
    """Of `keys_gluon`, which asks for more than `queries_gluon`: two items' keys and values (one's of D 192), three steps of queries and dout with what is known of their rows, barriers and
    items. Of `ordered_gluon`: one item's, two steps, and two of dS and dQ."""
    w = widths(D, DV)
    wide = w["D0"] + w["D1"] + w["V0"]
    two = (256 * (1 if w["D1"] else 2) + KEY_STAGES * 128) * wide + KEY_STAGES * 520 + 700
    return Resources(threads=384, shared=two if path == "gluon" else 512 * wide + 98304 + 1024 + 800, registers=168)
