"""Path "gluon" of block_attention_backward, the host's side: two kernels without atomics on sums, for Hopper: float16 and bfloat16, D and Dv up to 128, blocks of 128 x 128.

dQ by the lists of queries (block_backward_queries_gluon.py), dK and dV by the lists of keys (block_backward_keys_gluon.py); each sum is one group's of four warps, in the order of the
lists: twice the same call gives the same bits. Scores are rounded as in the portable source (tiles.py), hence as in the forward.
"""
from functools import lru_cache

from sparsetile.backends.contract import Resources
from sparsetile.backends.triton import relaunch
from sparsetile.backends.triton.block_attention_gluon import _layout, _Map, ahead
from sparsetile.backends.triton.block_backward_keys_gluon import keys_gluon
from sparsetile.backends.triton.block_backward_queries_gluon import queries_gluon
from sparsetile.backends.triton.gluon_items import KEYS, ROWS
from sparsetile.backends.triton.launch import POINTER, power, schedule, tiles
from sparsetile.backends.triton.maps import can_map

KEY_STAGES = 3  # steps of `keys_gluon` under way


def widths(D: int, DV: int) -> dict:
    """Columns as they lie in shared memory."""
    return dict(D0=64 if D <= 64 else 128, V0=power(DV, 64))


@lru_cache(1024)
def constants(D: int, DV: int, intervals=False, bitmaps=False, edge_k=False, edge_q=False, from_length=False) -> tuple:
    """Of `queries_gluon` and `keys_gluon`. edge_k: some keys of a block may not exist; edge_q: some queries of a tile."""
    w, common = widths(D, DV), dict(INTERVALS=intervals, BITMAPS=bitmaps, FROM_LENGTH=from_length)
    return (relaunch.Constants(dict(D=D, **w, EDGE=edge_k, **common), num_warps=4, enable_fp_fusion=False),
            relaunch.Constants(dict(D=D, DV=DV, **w, STAGES=KEY_STAGES, EDGE=edge_q, **common), num_warps=4, enable_fp_fusion=False))


def launch(q, k, v, dout, lists, lse, delta, dq, dk, dv, place, scale: float, *, kv_length, q_start):
    """Fills dq, dk and dv."""
    (B, Hq, T, D), (Hk, S), DV = q.shape, k.shape[1:3], v.shape[3]
    group, sms, host = Hq // Hk, max(place.sms, 1), q_start if isinstance(q_start, int) else None
    n, key_tiles = tiles(T, ROWS.value, host), -(-S // KEYS.value)
    covers = host is not None and host // ROWS.value == lists.first and n == lists.nq
    exact = covers and host % ROWS.value == 0 and T % ROWS.value == 0
    order = schedule(lists) if covers else None
    by_rows, by_keys = constants(D, DV, lists.has_intervals, lists.has_bitmaps, kv_length is not None or lists.nk * KEYS.value > S, not exact, q_start is None)
    D0, V0, list_of = by_rows["D0"], by_rows["V0"], lists.list_of
    strides = (list_of.stride(0) if list_of.shape[0] > 1 else 0, list_of.stride(1) if list_of.shape[1] > 1 else 0)
    starts, flat = None if q_start is None or host is not None else q_start, lambda x: x.view(-1, *x.shape[2:])
    queries, grads = _Map(q, 64, D0), _Map(dout, 64, V0)
    ticket = place.zeros((2,), "int32")
    items = B * Hq * n
    relaunch.launch(queries_gluon, (min(items, sms),), place,
                    (dq, lse, delta, lists.offsets, lists.cols, lists.kinds, lists.intervals, lists.bitmaps, list_of, order, kv_length, starts, ticket[:1]),
                    (*strides, B * Hq, Hq, group, T, S, lists.first, lists.nq, n, ahead(lists) if order is not None else 0, items, host or 0, float(scale)), by_rows, (q.dtype,),
                    (queries, grads, _Map(k, KEYS.value, D0), _Map(v, KEYS.value, V0), _Map(flat(dq), 64, D0)))
    items, order = B * Hk * key_tiles, schedule(lists, True) if key_tiles == lists.nk else None
    relaunch.launch(keys_gluon, (min(items, sms),), place,
                    (dk, dv, lse, delta, lists.by_key_offsets, lists.by_key_rows, lists.by_key_kinds, lists.intervals, lists.bitmaps, list_of, order, kv_length, starts, ticket[1:]),
                    (*strides, B * Hk, Hk, group, T, S, lists.first, lists.nq, lists.nk, key_tiles, ahead(lists, "by_key_offsets") if order is not None else 0, items, host or 0, float(scale)), by_keys, (q.dtype,),
                    (queries, grads, _Map(k, 64, D0), _Map(v, 64, V0), _Map(flat(dk), 64, D0), _Map(flat(dv), 64, V0)))


def takes(q, k, v, dout, lists, scale: float, softcap, out_kind: str) -> bool:
    """Whether this call is one for `launch`: no orders, no softcap, a positive scale, gradients of q's type, one list for the heads of a group, arrays as the copy engine addresses them."""
    return (lists.q_order is None and lists.k_order is None and softcap is None and 1e-30 < scale < 1e38 and out_kind == str(q.dtype)[6:]
            and (lists.list_of.shape[1] == 1 or q.shape[1] == k.shape[1]) and all(map(can_map, (q, k, v, dout))))


def artifacts(problem) -> list[dict]:
    has, kind = problem.features.__contains__, problem.dtype("q")
    pointer = POINTER[kind]
    both = constants(problem["D"], problem["Dv"], has("interval"), has("bitmap"), has("kv_length") or problem["S"] % KEYS.value != 0,
                     has("kv_length") or has("q_start") or problem["T"] % ROWS.value != 0, has("kv_length") and not has("q_start"))

    def mapped(rank, rows, columns):
        return f"tensordesc<{pointer[1:]}{[1] * (rank - 2) + [rows, columns]},{_layout(rank)!r}>"
    found = []
    for fn, made, rows, gradients, own, integers in (
            (queries_gluon, both[0], KEYS.value, dict(dq="D0"), ("cols", "schedule"), ("heads", "Hq", "tiles", "ahead")),
            (keys_gluon, both[1], 64, dict(dk="D0", dv="V0"), ("entries", "schedule"), ("heads", "Hk", "nk", "tiles", "ahead"))):
        made = dict(made)
        options = {name: made.pop(name) for name in ("num_warps", "enable_fp_fusion")}
        maps = dict(q=mapped(4, 64, made["D0"]), dout=mapped(4, 64, made["V0"]), k=mapped(4, rows, made["D0"]), v=mapped(4, rows, made["V0"]))
        maps |= {f"{name}_map": mapped(3, 64, made[width]) for name, width in gradients.items()}
        names = ["offsets", "kinds", "intervals", "bitmaps", "list_of", "ticket", *own] + ["kv_length"] * has("kv_length") + ["q_starts"] * has("q_start")
        arrays = {name: pointer for name in gradients} | dict(lse="*fp32", delta="*fp32") | {name: "*i32" for name in names}
        numbers = {name: "i32" for name in ("slb", "slh", "group", "T", "S", "first", "nq", "items", "q_start", *integers)} | {"scale": "fp32"}
        found.append(dict(fn=fn, signature=maps | arrays | numbers, constexprs=made, options=options, div16=tuple(name for name in arrays if name != "ticket")))
    return found


def resources(D: int, DV: int) -> Resources:
    """Of `keys`, which asks for more: two items' keys and values, three steps of queries and dout with what is known of their rows, barriers and items."""
    w = widths(D, DV)
    return Resources(threads=384, shared=(2 * 256 + KEY_STAGES * 128) * (w["D0"] + w["V0"]) + KEY_STAGES * 512 + 640, registers=168)
