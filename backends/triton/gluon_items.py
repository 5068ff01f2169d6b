"""Items of persistent Gluon kernels: tiles of 128 queries of one head over block lists, longest first, drawn by an atomic ticket and handed on through shared memory.

Every barrier is an allocation of its own: with an array of them the compiler puts a bar.sync before each use.
"""
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from sparsetile.backends.triton.tiles import drawn, entries_of

ROWS = gl.constexpr(128)
KEYS = gl.constexpr(128)


@gluon.jit
def place_of(b, T, S, at, FROM_LENGTH: gl.constexpr):
    """(keys that exist, position of query 0) of batch b."""
    q_start, q_starts, kv_length = at
    limit = S
    if kv_length is not None:
        limit = gl.minimum(gl.maximum(gl.load(kv_length + b), 0), S)
    start = q_start
    if q_starts is not None:
        start = gl.load(q_starts + b)
    elif FROM_LENGTH:
        start += limit - T
    return limit, start


@gluon.jit
def limit_of(b, t, at, T, S, CAUSAL: gl.constexpr, FROM_LENGTH: gl.constexpr):
    """Entries of a list from here on mean nothing to query t of batch b."""
    q_start, q_starts, kv_length = at
    limit = S
    if kv_length is not None:
        limit = gl.minimum(gl.maximum(gl.load(kv_length + b), 0), S)
    if CAUSAL:
        start = gl.to_tensor(q_start).to(gl.int64)  # may be any int32
        if q_starts is not None:
            start = gl.load(q_starts + b).to(gl.int64)
        elif FROM_LENGTH:
            start += limit - T
        limit = gl.maximum(gl.minimum(start + t + 1, limit), 0).to(gl.int32)
    return limit


@gluon.jit
def cut(number, order):
    """(item, section, its place among the sections or -1): the first `ahead` tiles of every head come `sections` times, before everything else."""
    heads, tiles, ahead, together, sections = order
    far = heads * ahead
    cut_up = (number < far * sections) & (sections > 1)
    n = gl.where(cut_up, number // gl.maximum(far, 1), 0)
    return gl.where(cut_up, number - n * far, number - far * (sections - 1)), n, gl.where(cut_up, number, -1)


@gluon.jit
def section_of(first, kept, count, gap, n, sections):
    """Entries of section n of an item: first, how many stand before the gap, how many there are, the gap; and how many of the item's come before."""
    a = count * n // sections
    b = count * (n + 1) // sections
    beyond = a >= kept
    return first + a + gl.where(beyond, gap, 0), gl.maximum(gl.minimum(kept, b) - a, 0), b - a, gl.where(beyond, 0, gap), a


@gluon.jit
def open_item(number, lists, at, order, Hq, T, S, EDGE: gl.constexpr, FROM_LENGTH: gl.constexpr):
    """An item as eight integers: head (batch * Hq + head), query of row 0 (negative where the tile starts before the call), first entry, how many entries need no mask,
    how many stand before the gap, how many there are, the gap, keys that exist."""
    offsets, cols, list_of, slb, slh, first, nq, schedule = lists
    head, rank = drawn(number, order)
    b = head // Hq
    h = head - b * Hq
    which = gl.load(list_of + b * slb + h * slh)
    limit, start = place_of(b, T, S, at, FROM_LENGTH)
    if schedule is not None:  # the call covers exactly the layout's tiles
        tile = gl.load(schedule + which * nq + rank)
        t = (first + tile) * ROWS - start
    else:  # later tiles first: under causal patterns they are the longer ones
        turned = order[1] - 1 - rank
        rest = start & (ROWS - 1)
        tile = (start - rest) // ROWS + turned - first
        t = turned * ROWS - rest
    tile = gl.where(t < T, tile, -1)
    a, n, e, c, edge = entries_of(tile, which, offsets, cols, limit, nq, KEYS, EDGE)
    return head, t, a, n - a, n - a + edge, n - a + edge + c - e, e - n - edge, limit


@gluon.jit
def take(OPEN: gl.constexpr, ticket, items, lists, at, order, heads, T, S, EDGE: gl.constexpr, FROM_LENGTH: gl.constexpr, queue, ORDERED: gl.constexpr):
    """A warp that opens items, by `open_item` or another of its kind, one ahead of their readers. ORDERED: programs that run late begin with late items."""
    slots, slot_full, slot_free = queue
    place = gl.arange(0, 8, gl.BlockedLayout([1], [32], [1], [0]))
    number = gl.program_id(0)
    if ORDERED:
        number = gl.atomic_add(ticket, 1)
    j = 0
    more = number < items
    while more:
        fields = OPEN(number, lists, at, order, heads, T, S, EDGE, FROM_LENGTH)
        x = place * 0
        for f in gl.static_range(8):
            x = gl.where(place == f, fields[f], x)
        slots.index(j % 2).store(x)
        mbarrier.arrive(slot_full.index(j % 2))
        mbarrier.wait(slot_free.index(j % 2), (j // 2) & 1)  # not before all have begun it: what one program has drawn, no other can take at the end
        j += 1
        number = items
        if ticket is not None:
            number = gl.atomic_add(ticket, 1)
            if not ORDERED:
                number += gl.num_programs(0)
        more = number < items
    slots.index(j % 2).store(place * 0 - 1)
    mbarrier.arrive(slot_full.index(j % 2))


@gluon.jit
def next_item(j, queue, WARPS: gl.constexpr):
    """Item j as `open_item` made it; its head is -1 after the last."""
    fields = item_at(j, queue, WARPS)
    mbarrier.arrive(queue[2].index(j % 2))
    return fields


@gluon.jit
def item_at(j, queue, WARPS: gl.constexpr):
    """`next_item` of a reader that says later that it has begun: `take` draws the next one then."""
    slots, slot_full, slot_free = queue
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [WARPS], [0])  # every thread holds all eight
    mbarrier.wait(slot_full.index(j % 2), (j // 2) & 1)
    x = slots.index(j % 2).load(layout)
    place = gl.arange(0, 8, layout)
    head = gl.sum(gl.where(place == 0, x, 0), 0)
    t = gl.sum(gl.where(place == 1, x, 0), 0)
    first = gl.sum(gl.where(place == 2, x, 0), 0)
    plain = gl.sum(gl.where(place == 3, x, 0), 0)
    kept = gl.sum(gl.where(place == 4, x, 0), 0)
    n = gl.sum(gl.where(place == 5, x, 0), 0)
    gap = gl.sum(gl.where(place == 6, x, 0), 0)
    limit = gl.sum(gl.where(place == 7, x, 0), 0)
    return head, t, first, plain, kept, n, gap, limit


@gluon.jit
def make_queue(READERS: gl.constexpr):
    """Two slots of an item, with a barrier that says that one is full and a barrier that says that all readers have it."""
    slots = gl.allocate_shared_memory(gl.int32, [2, 8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    slot_full, slot_free = make_bars(2, (1, READERS))
    return slots, slot_full, slot_free


@gluon.jit
def make_bars(STAGES: gl.constexpr, COUNTS: gl.constexpr):
    """For each of COUNTS barriers of so many stages, complete after so many arrivals."""
    bars = ()
    for n in gl.static_range(len(COUNTS)):
        bars = bars + (gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()), )
    for s in gl.static_range(STAGES):
        for n in gl.static_range(len(COUNTS)):
            mbarrier.init(bars[n].index(s), count=COUNTS[n])
    return bars
