"""The k largest of a stream, exactly: what `topk` and `indexer_topk` share.

A row's candidates are pairs (order, index) in a buffer of `room` int32 each, indices ascending. `order` is the float32 as an int32 that compares the
same way (-0.0 is made 0.0 first). Only scores above `floor` enter; a full buffer is cut back to its k best and `floor` rises to the least of them.
What comes later has a larger index, so among equals it loses, and `>` is right. A floor of -inf turns NaN and -inf away. There is no sort.
"""
import numpy as np
from llvmlite import ir

from sparsetile.backends.numba.far import far
from sparsetile.backends.numba.jit import kernel
from sparsetile.backends.numba.simd import COMPRESS, F, I1, I8, I32, I64, get_f32, get_i32, get_i64, op, put_f32

STEP = 32   # scores looked at together
FORCED = 0x7fffffff  # order of an entry that is taken whatever its score; above that of +inf
LEAST = -0x80000000
FLOOR = np.float32(-np.inf)


def _above(e, values, floor):
    """One bit for each of STEP scores: above the floor."""
    b, bits, limit = e.b, e.i(0), e.splat(floor)
    for first in range(0, STEP, e.lanes):
        mask = b.bitcast(b.fcmp_ordered(">", e.load(values, 4 * first), limit), ir.IntType(e.lanes))
        bits = b.or_(bits, b.shl(b.zext(mask, I64), e.i(first)))
    return bits


def _ordered(b, x):
    x = b.bitcast(x, I32)
    return b.xor(x, b.and_(b.ashr(x, ir.Constant(I32, 31)), ir.Constant(I32, 0x7fffffff)))


def _push(e, candidates, room, count, value, index):
    at = e.add(candidates, e.mul(count, 4))
    e.store(_ordered(e.b, e.b.fadd(value, e.scalar(0))), at)  # -0.0 + 0.0 is 0.0
    e.store(e.b.trunc(index, I32), e.add(at, e.mul(room, 4)))


def _push_above(e, values, floor, candidates, room, count, index):
    """Those of STEP scores that are above the floor; behind them what is written next is overwritten. Returns the new count."""
    b, room, limit = e.b, e.mul(room, 4), e.splat(floor)
    index = b.add(e.splat(b.trunc(index, I32)), ir.Constant(e.VI, list(range(e.lanes))))
    for first in range(0, STEP, e.lanes):
        x = e.load(values, 4 * first)
        take, at = b.fcmp_ordered(">", x, limit), e.add(candidates, e.mul(count, 4))
        bits = e.as_int(b.fadd(x, e.f(0)))
        order = b.xor(bits, b.and_(b.ashr(bits, e.n(31)), e.n(0x7fffffff)))
        for y, to in ((order, at), (b.add(index, e.n(first)), e.add(at, room))):
            e.store(e.call(f"llvm.experimental.vector.compress.v{e.lanes}i32", e.VI, y, take, y), to)
        count = b.add(count, e.call("llvm.ctpop.i64", I64, b.zext(b.bitcast(take, ir.IntType(e.lanes)), I64)))
    return count


def _push_forced(e, candidates, room, count, index):
    at = e.add(candidates, e.mul(count, 4))
    e.store(ir.Constant(I32, FORCED), at)
    e.store(e.b.trunc(index, I32), e.add(at, e.mul(room, 4)))


def _score_of(e, order):
    x = e.b.trunc(order, I32)
    return e.b.bitcast(e.b.xor(x, e.b.and_(e.b.ashr(x, ir.Constant(I32, 31)), ir.Constant(I32, 0x7fffffff))), F)


def _count_from(e, orders, count, limit):
    """How many of `count` (a multiple of STEP) are at least `limit`."""
    b, limit = e.b, e.splat(e.b.trunc(limit, I32))

    def body(k, sums):
        at = e.add(orders, e.mul(k, 4))
        return [b.sub(s, b.sext(b.icmp_signed(">=", e.load(at, 4 * e.lanes * u, e.VI), limit), e.VI)) for u, s in enumerate(sums)]
    sums = e.loop(count, [e.n(0)] * (STEP // e.lanes), body, STEP)
    total = sums[0]
    for s in sums[1:]:
        total = b.add(total, s)
    return b.sext(e.call(f"llvm.vector.reduce.add.v{e.lanes}i32", I32, total), I64)


def _largest(e, orders, count):
    b = e.b

    def body(k, held):
        x = e.load(e.add(orders, e.mul(k, 4)), 0, e.VI)
        return [b.select(b.icmp_signed(">", x, held[0]), x, held[0])]
    top = e.loop(count, [e.n(LEAST)], body, e.lanes)[0]
    return b.sext(e.call(f"llvm.vector.reduce.smax.v{e.lanes}i32", I32, top), I64)


def _keep(e, candidates, room, count, limit, ties):
    """Keep orders above the limit and the first `ties` equal to it, in place and without branches; returns how many."""
    b, room, limit = e.b, e.mul(room, 4), e.b.trunc(limit, I32)

    def body(k, held):
        kept, left = held
        source, target = e.add(candidates, e.mul(k, 4)), e.add(candidates, e.mul(kept, 4))
        x, index = e.load(source, 0, I32), e.load(e.add(source, room), 0, I32)
        e.store(x, target)
        e.store(index, e.add(target, room))
        equal = b.icmp_signed("==", x, limit)
        take = b.or_(b.icmp_signed(">", x, limit), b.and_(equal, b.icmp_signed(">", left, e.i(0))))
        return [b.add(kept, b.zext(take, I64)), b.sub(left, b.zext(equal, I64))]
    return e.loop(count, [e.i(0), ties], body)[0]


def _keep_from(e, candidates, room, count, limit):
    """Keep orders from the limit on, LANES at a time, in place; what is stored behind them stood there or was read before."""
    b, room, limit = e.b, e.mul(room, 4), e.splat(e.b.trunc(limit, I32))

    def body(k, held):
        source, target = e.add(candidates, e.mul(k, 4)), e.add(candidates, e.mul(held[0], 4))
        x, index = e.load(source, 0, e.VI), e.load(e.add(source, room), 0, e.VI)
        take = b.icmp_signed(">=", x, limit)
        for y, to in ((x, target), (index, e.add(target, room))):
            e.store(e.call(f"llvm.experimental.vector.compress.v{e.lanes}i32", e.VI, y, take, y), to)
        bits = b.zext(b.bitcast(take, ir.IntType(e.lanes)), I64)
        return [b.add(held[0], e.call("llvm.ctpop.i64", I64, bits))]
    e.loop(count, [e.i(0)], body, e.lanes)


def _top_of(e, values, count, top):
    """The largest of `top` and `count` scores, NaN passed over."""
    b, main = e.b, e.b.and_(count, e.i(-e.lanes))
    top = e.loop(main, [e.splat(top)], lambda k, held: [e.max(e.load(e.add(values, e.mul(k, 4))), held[0])], e.lanes)[0]
    top = e.call(f"llvm.vector.reduce.fmax.v{e.lanes}f32", F, top)

    def one(k, held):
        x = e.load(e.add(values, e.mul(e.add(main, k), 4)), 0, F)
        return [b.select(b.fcmp_ordered(">", x, held[0]), x, held[0])]
    return e.loop(b.sub(count, main), [top], one)[0]


def _fill(e, orders, count):
    e.loop(count, [], lambda k, _: (e.store(ir.Constant(I32, LEAST), e.add(orders, e.mul(k, 4))), [])[1])


above = op("if", _above, "i")
push = op("iiifi", _push)
push_above = op("ifiiii", _push_above, "i")
push_forced = op("iiii", _push_forced)
score_of = op("i", _score_of, "f")
count_from = op("iii", _count_from, "i")
top_of = op("iif", _top_of, "f")
largest = op("ii", _largest, "i")
keep = op("iiiii", _keep, "i")
keep_from = op("iiii", _keep_from)
fill_least = op("ii", _fill)
put_i32 = op("iii", lambda e, address, index, x: e.store(e.b.trunc(x, I32), e.add(address, e.mul(index, 4))))
put_i64 = op("iii", lambda e, address, index, x: e.store(x, e.add(address, e.mul(index, 8))))
get_byte = op("ii", lambda e, address, index: e.b.zext(e.load(address, index, I8), I64), "i")
put_byte = op("iii", lambda e, address, index, x: e.store(e.b.trunc(x, I8), address, index))
lowest_bit = op("i", lambda e, x: e.b.cttz(x, ir.Constant(I1, 1)), "i")


def room_for(k: int, entries: int) -> int:
    """Candidates held for one row, so that a row of `entries` is cut seldom; a multiple of STEP, with slack for one more step and padding."""
    return (min(max(2 * k, k + 1024), entries) + 3 * STEP - 1) // STEP * STEP


@far("iiii", "f")
def cut(candidates, room, count, k):
    """Cut `count` > k candidates to the k best. Returns a floor: what does not exceed it is not among them."""
    padded = (count + STEP - 1) // STEP * STEP
    fill_least(candidates + 4 * count, padded - count)
    low, high = LEAST, largest(candidates, padded) + 1  # count_from(low) >= k > count_from(high)
    found = count
    while high - low > 1 and found != k:
        middle = (low + high) >> 1
        at_least = count_from(candidates, padded, middle)
        if at_least >= k:
            low, found = middle, at_least
        else:
            high = middle
    if COMPRESS and found == k:
        keep_from(candidates, room, padded, low)
    else:
        ties = k
        if found != k:
            ties = k - (count_from(candidates, padded, low + 1) if low < FORCED else 0)
        keep(candidates, room, count, low, ties)
    return score_of(low)


@far("iiiiiii")
def offer(values, count, base, k, candidates, room, state):
    """Let `count` float32 scores of the indices base, base + 1, ... compete. state: candidates held (int64) and floor (float32), updated."""
    held, floor, first = get_i64(state, 0), get_f32(state, 2), 0
    while first < count:
        if count - first >= STEP:
            bits = above(values + 4 * first, floor)
            if COMPRESS and bits != 0:
                held, bits = push_above(values + 4 * first, floor, candidates, room, held, base + first), 0
        else:
            bits = 0
            for n in range(count - first):
                if get_f32(values, first + n) > floor:
                    bits |= 1 << n
        while bits != 0:
            n = first + lowest_bit(bits)
            push(candidates, room, held, get_f32(values, n), base + n)
            held += 1
            bits &= bits - 1
        if held > room - 2 * STEP:
            floor = cut(candidates, room, held, k)
            held = k
        first += STEP
    put_i64(state, 0, held)
    put_f32(state, 2, floor)


@kernel
def window(row, key_start, key_end, S):
    """The keys [start, end) of a row, clipped to 0 .. S; addresses of int32, 0 where not given."""
    start, end = 0, S
    if key_start != 0:
        start = max(start, get_i32(key_start, row))
    if key_end != 0:
        end = min(end, get_i32(key_end, row))
    return start, max(start, end)
