"""Block attention's forward over all parts of a layout, for Hopper in Gluon: the roles of block_attention_gluon.py, with tiles and key blocks that may be residue classes
or summaries.

One launch a pass (gluon_parts.py), whose items and entries were laid down on the host. A pass before the last leaves normalised sums and logsumexps in float32; the next
one starts from them as if from one more key, so that parts are merged in a fixed order and rounded once. The sink stands in the last pass alone.
"""
from functools import lru_cache

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from sparsetile.backends.triton import relaunch
from sparsetile.backends.triton.block_attention_gluon import CACHED, READERS, STAGES, attend, make_memory, widths
from sparsetile.backends.triton.gluon_items import KEYS, ROWS, drawn, make_queue, next_item, take
from sparsetile.backends.triton.gluon_keys import clear_word, key_range
from sparsetile.backends.triton.gluon_maps import map_layout
from sparsetile.backends.triton.gluon_parts import BLOCK, Axis, Boxes, box, ends, plan_of, stretched
from sparsetile.backends.triton.launch import POINTER, scales
from sparsetile.backends.triton.maps import can_map
from sparsetile.backends.triton.tiles import finish

FIELDS = gl.constexpr(9)  # of an entry


# ---------------------------------------------------------------------------------------------------------------- loading, clearing
@gluon.jit
def open_tile(number, lists, at, order, Hq, T, S, EDGE: gl.constexpr, FROM_LENGTH: gl.constexpr):
    """An item as eight integers: head (batch * Hq + head), query of row 0, first entry, how many entries need no mask, how many there are, (x, y) of row 0, nothing."""
    head, rank = drawn(number, order)
    tile = lists + 6 * rank
    return head, gl.load(tile), gl.load(tile + 1), gl.load(tile + 2), gl.load(tile + 3), gl.load(tile + 4), gl.load(tile + 5), 0


@gluon.jit
def _bring_box(desc0, desc1, bar, to0, to1, at, D1: gl.constexpr):
    tma.async_copy_global_to_shared(desc0, at, bar, to0)
    if D1:
        tma.async_copy_global_to_shared(desc1, [at[0], at[1], at[2], at[3], desc0.block_shape[4]], bar, to1)


@gluon.jit
def _bring_values(parts, part, bar, to, at, V0: gl.constexpr, PARTS: gl.constexpr):
    mbarrier.expect(bar, 2 * KEYS * V0)
    for g in gl.static_range(PARTS):
        if part == g:
            tma.async_copy_global_to_shared(parts[g][2], at, bar, to)


@gluon.jit
def bring(queries, parts, entries, Hq, group, rest, D0: gl.constexpr, D1: gl.constexpr, V0: gl.constexpr, QUERIES: gl.constexpr, PARTS: gl.constexpr, RAGGED: gl.constexpr,
          queue, tiles, q_bars, k_bars, v_bars):
    """Queries of an item, then its keys and values; those of a masked block go by way of `clear`."""
    q0, q1, qs0, qs1 = queries
    sq0, sq1, sk0, sk1, sv = tiles
    q_full, q_free = q_bars
    k_full, k_free = k_bars
    v_full, v_free, v_landed = v_bars
    n = 0
    turn = 0
    head, t, first, plain, count, x, y, _ = next_item(0, queue, 1)
    while head >= 0:
        b = head // Hq
        h = head - b * Hq
        hk = h // group
        u = turn % QUERIES
        mbarrier.wait(q_free.index(u), ((turn // QUERIES) & 1) ^ 1)
        if count == 0:
            mbarrier.arrive(q_full.index(u))
        else:
            mbarrier.expect(q_full.index(u), 2 * ROWS * (D0 + D1))
            for w in gl.static_range(2):
                if RAGGED:
                    if x < rest:
                        _bring_box(q0, q1, q_full.index(u), sq0.index(2 * u + w), sq1.index(2 * u + w), [b, h, x, y + 64 * w, 0], D1)
                    else:
                        _bring_box(qs0, qs1, q_full.index(u), sq0.index(2 * u + w), sq1.index(2 * u + w), [b, h, x, y + 64 * w, 0], D1)
                else:
                    _bring_box(q0, q1, q_full.index(u), sq0.index(2 * u + w), sq1.index(2 * u + w), [b, h, x, y + 64 * w, 0], D1)
            entry = entries + first * FIELDS
            for e in range(count):
                at = [b, hk, gl.load(entry), gl.load(entry + 1), 0]
                part = 0
                if PARTS > 1:
                    part = gl.load(entry + 4)
                s = n % STAGES
                phase = ((n // STAGES) & 1) ^ 1
                mbarrier.wait(k_free.index(s), phase)
                mbarrier.expect(k_full.index(s), 2 * KEYS * (D0 + D1))
                for g in gl.static_range(PARTS):
                    if part == g:
                        _bring_box(parts[g][0], parts[g][1], k_full.index(s), sk0.index(s), sk1.index(s), at, D1)
                mbarrier.wait(v_free.index(s), phase)
                if e < plain:
                    _bring_values(parts, part, v_full.index(s), sv.index(s), at, V0, PARTS)
                else:
                    _bring_values(parts, part, v_landed.index(s), sv.index(s), at, V0, PARTS)
                entry += FIELDS
                n += 1
        turn += 1
        head, t, first, plain, count, x, y, _ = next_item(turn, queue, 1)


@gluon.jit
def clear(entries, MASKED: gl.constexpr, queue, v, v_full, v_landed):
    """A warp that zeroes values of a masked block which no row of the tile sees, once they have landed."""
    n = 0
    turns = 0
    turn = 0
    head, t, first, plain, count, x, y, _ = next_item(0, queue, 1)
    while head >= 0:
        if MASKED:
            for e in range(plain, count):
                seen = entries + (first + e) * FIELDS + 5
                w0 = gl.load(seen).to(gl.uint32, bitcast=True)
                w1 = gl.load(seen + 1).to(gl.uint32, bitcast=True)
                w2 = gl.load(seen + 2).to(gl.uint32, bitcast=True)
                w3 = gl.load(seen + 3).to(gl.uint32, bitcast=True)
                s = (n + e) % STAGES
                mbarrier.wait(v_landed.index(s), (turns >> s) & 1)
                turns ^= 1 << s
                if (w0 & w1 & w2 & w3) != 0xFFFFFFFF:
                    clear_word(w0, 0, v.index(s))
                    clear_word(w1, 1, v.index(s))
                    clear_word(w2, 2, v.index(s))
                    clear_word(w3, 3, v.index(s))
                    fence_async_shared()
                mbarrier.arrive(v_full.index(s))
            n += count
        turn += 1
        head, t, first, plain, count, x, y, _ = next_item(turn, queue, 1)


# ---------------------------------------------------------------------------------------------------------------- multiplying
@gluon.jit
def _look(e, first, r, entries, tables, INTERVALS: gl.constexpr, EDGE: gl.constexpr):
    """(kind, lo, hi) of an item's entry e: between which of its keys the rows r may see."""
    entry = entries + (first + e) * FIELDS
    kind = gl.load(entry + 2)
    lo, hi = key_range(kind, r, tables, INTERVALS)
    return kind, lo, gl.minimum(hi, gl.load(entry + 3))


@gluon.jit
def multiply(W: gl.constexpr, out_map, out, lse, sums, sinks, entries, tables, Hq, T, step, scale, inner, outer,
             D1: gl.constexpr, V0: gl.constexpr, DV: gl.constexpr, QUERIES: gl.constexpr, CAP: gl.constexpr, INTERVALS: gl.constexpr, BITMAPS: gl.constexpr,
             BEFORE: gl.constexpr, MASKED: gl.constexpr, AGAIN: gl.constexpr, LAST: gl.constexpr, queue, tiles, q_bars, k_bars, v_bars):
    """A group of warps with rows 64 W .. of each item."""
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V0, 16])
    R: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16]))
    q_free = q_bars[1]
    kind_of = tiles[4].dtype
    scale2 = scale * 1.4426950408889634
    r = W * 64 + gl.arange(0, 64, R)
    rows = W * 64 + gl.arange(0, 64, gl.SliceLayout(1, O))
    c = gl.arange(0, V0, gl.SliceLayout(0, O))
    n = 0
    turn = 0
    head, t, first, plain, count, x, y, _ = next_item(0, queue, 4)
    while head >= 0:
        line = head.to(gl.int64) * T
        query = t + r * step
        ok = (query >= 0) & (query < T)
        m = gl.full([64], float("-inf"), gl.float32, R)
        l = gl.zeros([64], gl.float32, R)
        acc = gl.zeros([64, V0], gl.float32, O)
        mine = t + rows * step
        there = gl.expand_dims((mine >= 0) & (mine < T), 1)
        if AGAIN:
            logs = gl.load(lse + line + query, mask=ok, other=float("-inf"))
            m = logs / scale
            l = gl.where(logs == float("-inf"), 0.0, 1.0)
            acc = gl.load(sums + gl.expand_dims((line + mine) * V0, 1) + gl.expand_dims(c, 0), mask=there & gl.expand_dims(c >= 0, 0), other=0.0)
        m, l, acc, n = attend(_look, W, first, plain, count, n, turn, (m, l, acc), entries, tables, (scale2, inner, outer),
                              D1, QUERIES, CAP, INTERVALS, BITMAPS, False, MASKED, AGAIN, tiles, q_bars, k_bars, v_bars)
        b = head // Hq
        h = head - b * Hq
        factor, logs = finish(m, l, scale, scale2, sinks, h, sinks is not None)
        if lse is not None:
            gl.store(lse + line + query, logs, mask=ok)
        acc = acc * gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, O)), 1)
        if LAST:  # as block_attention_gluon.multiply
            value = acc.to(kind_of)
            to = tiles[0].index(2 * (turn % QUERIES) + W)._reinterpret(kind_of, [64, V0], tiles[0].layout)
            to.store(value)
            fence_async_shared()
            if BEFORE:
                if y + W * 64 < 0:
                    gl.store(out + gl.expand_dims((line + mine) * DV, 1) + gl.expand_dims(c, 0), value, mask=there & gl.expand_dims(c < DV, 0))
                else:
                    tma.async_copy_shared_to_global(out_map, [b, h, x, y + W * 64, 0], to)
            else:
                tma.async_copy_shared_to_global(out_map, [b, h, x, y + W * 64, 0], to)
        else:
            gl.store(sums + gl.expand_dims((line + mine) * V0, 1) + gl.expand_dims(c, 0), acc, mask=there & gl.expand_dims(c >= 0, 0))
        if QUERIES == 1:
            tma.store_wait(0)
            mbarrier.arrive(q_free.index(0))
        turn += 1
        head, t, first, plain, count, x, y, _ = next_item(turn, queue, 4)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["step", "rest", "heads", "Hq", "group", "T", "tiles", "section", "items"])
def forward_parts_gluon(q0, q1, qs0, qs1, ka0, ka1, va, kb0, kb1, vb, out_map, out, lse, sums, lists, entries, intervals, bitmaps, sinks, ticket,
                        step, rest, heads, Hq, group, T, tiles, section, items, scale, inner, outer,
                        D0: gl.constexpr, D1: gl.constexpr, DV: gl.constexpr, V0: gl.constexpr, QUERIES: gl.constexpr, CAP: gl.constexpr, INTERVALS: gl.constexpr,
                        BITMAPS: gl.constexpr, BEFORE: gl.constexpr, MASKED: gl.constexpr, PARTS: gl.constexpr, RAGGED: gl.constexpr, AGAIN: gl.constexpr, LAST: gl.constexpr):
    """q0 .. out_map: tensor maps, None where a width is in one part, a part is not there, or the pass is not the last. step: between the queries of a tile; RAGGED: from class `rest` on they are short (qs0, qs1).
    sums [B,Hq,T,V0] float32: of the passes before (AGAIN) or for the next one (not LAST). ticket: 0, or None where every program has one item."""
    queue = make_queue(READERS)
    memory, q_bars, k_bars, v_bars = make_memory(va.dtype, D0, D1, V0, QUERIES)
    FEW: gl.constexpr = 24 if CAP else 40  # registers of a thread that does not multiply; three times four warps share 504
    tables = (intervals, bitmaps)
    gl.warp_specialize([
        (multiply, (0, out_map, out, lse, sums, sinks, entries, tables, Hq, T, step, scale, inner, outer, D1, V0, DV, QUERIES, CAP, INTERVALS, BITMAPS,
                    BEFORE, MASKED, AGAIN, LAST, queue, memory, q_bars, k_bars, v_bars)),
        (multiply, (1, out_map, out, lse, sums, sinks, entries, tables, Hq, T, step, scale, inner, outer, D1, V0, DV, QUERIES, CAP, INTERVALS, BITMAPS,
                    BEFORE, MASKED, AGAIN, LAST, queue, memory, q_bars, k_bars, v_bars)),
        (bring, ((q0, q1, qs0, qs1), ((ka0, ka1, va), (kb0, kb1, vb)), entries, Hq, group, rest, D0, D1, V0, QUERIES, PARTS, RAGGED, queue, memory, q_bars, k_bars, v_bars)),
        (take, (gl.constexpr(open_tile), ticket, items, lists, (0, ), (heads, tiles, 0, section), Hq, T, T, False, False, queue, False)),
        (clear, (entries, MASKED, queue, memory[4], v_bars[0], v_bars[2])),
    ], [4, 1, 1, 1], [(504 - FEW) // 2, FEW, FEW, FEW])


# ---------------------------------------------------------------------------------------------------------------- the host
@lru_cache(1024)
def constants(D: int, DV: int, cap=False, intervals=False, bitmaps=False, before=False, masked=True, parts=1, ragged=False, again=False, last=True) -> relaunch.Constants:
    made = dict(DV=DV, **widths(D, DV), CAP=cap, INTERVALS=intervals, BITMAPS=bitmaps, BEFORE=before, MASKED=masked, PARTS=parts, RAGGED=ragged, AGAIN=again, LAST=last)
    return relaunch.Constants(made, num_warps=4, enable_fp_fusion=False)


def run(q, k, v, parts, *, place, scale, sink_logits=None, softcap=None, kv_length=None, q_start=None, return_lse=True):
    """(out, lse) of a layout's parts, or None where they have to be run apart and merged: lengths or positions known on the device only, orders that are no boxes,
    more parts in one pass than PARTS."""
    (B, Hq, T, D), (Hk, S), DV = q.shape, k.shape[1:3], v.shape[3]
    start = S - T if q_start is None else q_start
    if kv_length is not None or not isinstance(start, int) or not 1e-30 < scale < 1e38 or not all(map(can_map, (q, k, v))):
        return None
    plan = plan_of(parts, T, S, start, place)
    if plan is None:
        return None
    out, passes = place.empty((B, Hq, T, DV), str(q.dtype)[6:]), plan.passes
    lse = place.empty((B, Hq, T), "float32") if return_lse or len(passes) > 1 else None
    sums = place.empty((B, Hq, T, widths(D, DV)["V0"]), "float32") if len(passes) > 1 else None
    for n in range(len(passes)):
        launch(q, k, v, plan, n, out, lse, sums, place, scale, sink_logits, softcap)
    return out, lse


def launch(q, k, v, plan, number: int, out, lse, sums, place, scale: float, sink_logits, softcap):
    """Pass `number` of a plan."""
    (B, Hq, T, D), (Hk, S), DV = q.shape, k.shape[1:3], v.shape[3]
    mine, last = plan.passes[number], number == len(plan.passes) - 1
    made = constants(D, DV, softcap is not None, plan.has_intervals, plan.has_bitmaps, mine.before, mine.masked, len(mine.keys), len(ends(mine.rows)) > 1, number > 0, last)
    size, inner, outer, _ = scales(scale, softcap)
    D0, D1, V0, rows = made["D0"], made["D1"], made["V0"], mine.rows
    found = [(stretched(k, at), stretched(v, at), at) for at in mine.keys]
    keys = [(Boxes(x, at, D0), Boxes(x, at, D1) if D1 else None, Boxes(y, at, V0)) for x, y, at in found] + [(None,) * 3] * (2 - len(found))
    queries = [x for at in ends(rows) for x in (Boxes(q, at, D0, 64), Boxes(q, at, D1, 64) if D1 else None)] + [None] * 2
    maps = (*queries[:4], *keys[0], *keys[1], Boxes(out, rows, V0, 64) if last else None)
    heads, n, sms = B * Hq, mine.items.shape[0], max(place.sms, 1)
    section = min(max(1, CACHED // max(1, 2 * S * (D + DV))) * (Hq // Hk), heads)
    sinks, ticket = sink_logits if last else None, place.zeros((1,), "int32") if heads * n > sms else None
    pointers = (out, lse, sums, mine.items, mine.entries, plan.intervals, plan.bitmaps, sinks, ticket)
    numbers = (rows.step if rows.run == 1 else 1, T % rows.step, heads, Hq, Hq // Hk, T, n, section, heads * n, size, inner, outer)
    relaunch.launch(forward_parts_gluon, (min(heads * n, sms),), place, pointers, numbers, made, (q.dtype, tuple(at.run for at in mine.keys)), maps)


def artifacts(problem) -> list[dict]:
    """The kernels of a pattern in two passes of one part each (strided), and of one in one pass of two (fixed)."""
    has, kind = problem.features.__contains__, problem.dtype("q")
    made = []
    for runs, ragged, again, last in (((1,), False, False, False), ((1, 1), True, False, False), ((BLOCK,), False, True, True), ((BLOCK, 8), False, False, True)):
        found = dict(constants(problem["D"], problem["Dv"], has("softcap"), has("interval"), has("bitmap"), has("q_start"), True, len(runs), ragged, again, last))
        options = {name: found.pop(name) for name in ("num_warps", "enable_fp_fusion")}
        pointer = POINTER[kind]
        mapped = lambda run, rows, columns: f"tensordesc<{pointer[1:]}{box(Axis(BLOCK, run), columns, rows)},{map_layout(5)!r}>"  # noqa: E731
        D0, D1, V0 = (found[name] for name in ("D0", "D1", "V0"))
        maps = {"out_map": mapped(runs[0], 64, V0)} if last else {}
        for name in ("q", "qs")[:1 + ragged]:
            maps |= {name + "0": mapped(runs[0], 64, D0)} | ({name + "1": mapped(runs[0], 64, D1)} if D1 else {})
        for name, run in zip("ab", runs):
            maps |= {f"k{name}0": mapped(run, BLOCK, D0), f"v{name}": mapped(run, BLOCK, V0)} | ({f"k{name}1": mapped(run, BLOCK, D1)} if D1 else {})
        arrays = dict(out=pointer, lse="*fp32") | {name: "*i32" for name in ("lists", "entries", "intervals", "bitmaps", "ticket")}
        arrays |= ({"sums": "*fp32"} if again or not last else {}) | ({"sinks": "*fp32"} if has("sink") and last else {})
        integers = ("step", "rest", "heads", "Hq", "group", "T", "tiles", "section", "items")
        signature = maps | arrays | {name: "i32" for name in integers} | {name: "fp32" for name in ("scale", "inner", "outer")}
        made.append(dict(fn=forward_parts_gluon, signature=signature, constexprs=found, options=options, div16=tuple(arrays)))
    return made
