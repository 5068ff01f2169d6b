"""The inner loops of attention over selected keys: a few query heads against rows of K and V that stand anywhere. float32, on addresses.

Heads that share a selection are rows, lanes are features, so that keys and values are read as they lie: rows are given by a list of int64 addresses.
    scores  S [heads, keys] = Q K^T        four keys times three heads in registers, summed over lanes by a tree of shuffles
    mix     O [heads, width] += P V        P broadcast; the same loop makes dQ += dS K
    spread  row(key) += sum_heads P dO     for the gradients of K and V
Each element is made by the same chain of operations whatever tile it falls into, so results do not depend on how heads are split among threads.
"""
import math

from llvmlite import ir
from numba.core import cgutils

from sparsetile.backends.numba.far import far
from sparsetile.backends.numba.simd import F, I8, I32, I64, LANES, op

WIDE = 4 * LANES   # widths of O, of V's and of the gradients' rows are padded to this many float32
KEYS = 64          # at a time: a multiple of 16
STEP = 4 * KEYS    # bytes from head to head of S and P


def _four_sums(e, x):
    """Four vectors -> a vector of their four sums."""
    b, lanes, width = e.b, e.lanes, e.lanes
    while len(x) > 1:  # halves of the items of two vectors side by side
        half = width // 2
        low = [k for k in range(2 * lanes) if k % width < half]
        x = [b.fadd(*(b.shuffle_vector(x[n], x[n + 1], ir.Constant(e.VI, [k + shift for k in low])) for shift in (0, half))) for n in range(0, len(x), 2)]
        width = half
    x, count = x[0], lanes
    while width > 1:
        half, count = width // 2, count // 2
        low = [k for k in range(2 * count) if k % width < half]
        x = b.fadd(*(b.shuffle_vector(x, ir.Constant(x.type, ir.Undefined), ir.Constant(ir.VectorType(I32, count), [k + shift for k in low])) for shift in (0, half)))
        width = half
    return x


def _scores(heads):
    def scores(e, q, q_step, rows, D, out):
        """S of `heads` heads and the four keys whose addresses stand at `rows`; D a multiple of LANES."""
        key = [e.load(rows, 8 * n, I64) for n in range(4)]

        def body(d, acc):
            at, new = e.mul(d, 4), list(acc)
            left = [e.load(e.add(e.add(q, e.mul(q_step, r)), at)) for r in range(heads)]
            for n in range(4):
                x = e.load(e.add(key[n], at))
                for r in range(heads):
                    new[4 * r + n] = e.fma(x, left[r], acc[4 * r + n])
            return new
        acc = e.loop(D, [e.f(0)] * (4 * heads), body, e.lanes)
        for r in range(heads):
            e.store(_four_sums(e, acc[4 * r:4 * r + 4]), out, r * STEP)
    return scores


def _mix(heads, vectors):
    def mix(e, p, rows, count, column, out, out_step):
        """`heads` rows of O, `vectors` vectors from byte `column` on, += P V over `count` keys."""
        def steps(first, unroll):
            def body(k, acc):
                for u in range(unroll):
                    key, new = e.add(e.add(k, first), u), []
                    at = e.add(e.load(e.add(rows, e.mul(key, 8)), 0, I64), column)
                    right = [e.load(at, 4 * e.lanes * n) for n in range(vectors)]
                    for r in range(heads):
                        left = e.splat(e.load(e.add(p, e.mul(key, 4)), r * STEP, F))
                        new += [e.fma(left, right[n], acc[r * vectors + n]) for n in range(vectors)]
                    acc = new
                return acc
            return body
        main = e.b.and_(count, e.i(-2))
        acc = e.loop(main, [e.f(0)] * (heads * vectors), steps(0, 2), 2)
        acc = e.loop(e.b.sub(count, main), acc, steps(main, 1))
        for r in range(heads):
            at = e.add(e.add(out, e.mul(out_step, r)), column)
            for n in range(vectors):
                e.store(e.b.fadd(acc[r * vectors + n], e.load(at, 4 * e.lanes * n)), at, 4 * e.lanes * n)
    return mix


def _spread(keys):
    def spread(e, p, heads, left, left_step, column, target, target_step, list_of_keys, numbers):
        """Two vectors from byte `column` on of the rows target + s * target_step of `keys` keys += sum over heads of P left.
        P [chunks, heads, KEYS] is looked up by the keys' numbers (int64 at `numbers`), s by number in the list.
        Row after row is read, added to and written, so a key named twice collects twice."""
        b = e.b
        number = [e.load(numbers, 8 * r, I64) for r in range(keys)]
        chunk = [b.mul(b.sdiv(n, e.i(KEYS)), heads) for n in number]
        weight = [e.add(p, b.add(b.mul(c, e.i(STEP)), b.mul(b.srem(n, e.i(KEYS)), e.i(4)))) for c, n in zip(chunk, number)]

        def body(h, acc):
            row, new = e.add(e.add(left, column), e.mul(left_step, h)), []
            right = [e.load(row, 4 * e.lanes * n) for n in range(2)]
            for r in range(keys):
                x = e.splat(e.load(e.add(weight[r], e.mul(h, STEP)), 0, F))
                new += [e.fma(x, right[n], acc[2 * r + n]) for n in range(2)]
            return new
        acc = e.loop(heads, [e.f(0)] * (2 * keys), body)
        for r in range(keys):
            s = e.load(list_of_keys, e.mul(number[r], 8), I64)
            row = e.add(e.add(target, e.mul(s, target_step)), column)
            for n in range(2):
                e.store(b.fadd(e.load(row, 4 * e.lanes * n), acc[2 * r + n]), row, 4 * e.lanes * n)
    return spread


_scores_3, _scores_1 = (op("iiiii", _scores(heads)) for heads in (3, 1))
_mix_6, _mix_4, _mix_1 = (op("iiiiii", _mix(heads, vectors)) for heads, vectors in ((6, 2), (4, 2), (1, 4)))
_spread_4, _spread_1 = (op("iiiiiiiii", _spread(keys)) for keys in (4, 1))


@far("iiiiiii")
def score_rows(q, q_step, heads, rows, keys, D, out):
    """S [heads, KEYS] for `keys` rows of K; `rows` has addresses up to a multiple of four. Twelve heads at a time stay in the first cache."""
    for block in range(0, heads, 12):
        end = min(heads, block + 12)
        for key in range(0, keys, 4):
            h = block
            while h + 3 <= end:
                _scores_3(q + h * q_step, q_step, rows + 8 * key, D, out + h * STEP + 4 * key)
                h += 3
            while h < end:
                _scores_1(q + h * q_step, q_step, rows + 8 * key, D, out + h * STEP + 4 * key)
                h += 1


@far("iiiiiii")
def mix_rows(p, heads, rows, keys, width, out, out_step):
    """O [heads, width] += P V; width a multiple of WIDE."""
    sixes = heads // 6
    if heads - 6 * sixes not in (0, 4) and sixes > 0 and heads - 6 * (sixes - 1) == 8:
        sixes -= 1  # 8 = 4 + 4, not 6 and two alone
    fours = (heads - 6 * sixes) // 4
    single = 6 * sixes + 4 * fours
    for column in range(0, 4 * width, 8 * LANES):
        for h in range(0, 6 * sixes, 6):
            _mix_6(p + h * STEP, rows, keys, column, out + h * out_step, out_step)
        for h in range(6 * sixes, single, 4):
            _mix_4(p + h * STEP, rows, keys, column, out + h * out_step, out_step)
    for h in range(single, heads):
        for column in range(0, 4 * width, 16 * LANES):
            _mix_1(p + h * STEP, rows, keys, column, out + h * out_step, out_step)


@far("iiiiiiiiii")
def spread_rows(p, heads, left, left_step, width, target, target_step, list_of_keys, numbers, count):
    """For `count` keys: row(key) [width] += sum over heads of P[head, key] left[head]."""
    for n in range(0, count - 3, 4):
        for column in range(0, 4 * width, 8 * LANES):
            _spread_4(p, heads, left, left_step, column, target, target_step, list_of_keys, numbers + 8 * n)
    for n in range(count & ~3, count):
        for column in range(0, 4 * width, 8 * LANES):
            _spread_1(p, heads, left, left_step, column, target, target_step, list_of_keys, numbers + 8 * n)


def _cap(e, ps, count, constants, slope):
    """S = cap * tanh(S * inner); its derivative 1 - tanh**2 goes to `slope` where that is not 0. An infinite S becomes NaN: it may be a sum that
    went out of range on its way, even with the wrong sign."""
    b = e.b
    outer, inner = (e.splat(e.load(constants, offset, F)) for offset in (4, 8))

    def body(k, _):
        at = e.mul(k, 4)
        s = e.load(e.add(ps, at))
        x = e.tanh(b.fmul(s, inner))
        e.store(e.fma(s, e.f(0), b.fmul(x, outer)), e.add(ps, at))
        with b.if_then(b.icmp_signed("!=", slope, e.i(0))):
            e.store(b.fsub(e.f(1), b.fmul(x, x)), e.add(slope, at))
        return []
    e.loop(count, [], body, e.lanes)


cap_row = op("iiii", _cap)


def _soften(e, ps, count, state, constants):
    """One head's S -> P = 2 ** (c (S - m)) in place, m the maximum so far; zeros up to a whole vector. state: m, sum, and NaN once a score was not finite
    (a sum may have gone out of range on its way, even with the wrong sign). Returns what O made before must be multiplied by."""
    b = e.b
    c = e.splat(e.load(constants, 0, F))
    old, lanes = e.load(state, 0, F), ir.Constant(e.VI, list(range(e.lanes)))

    def look(k, held):
        at = e.add(ps, e.mul(k, 4))
        there = b.icmp_signed("<", lanes, e.splat(b.trunc(b.sub(count, k), I32)))
        s = e.load(at)
        x = b.select(there, s, e.f(-math.inf))
        e.store(x, at)
        return [e.max(x, held[0]), e.fma(b.select(there, s, e.f(0)), e.f(0), held[1])]
    top, odd = e.loop(count, [e.splat(old), e.f(0)], look, e.lanes)
    new = e.call(f"llvm.vector.reduce.fmax.v{e.lanes}f32", F, top)
    gap = e.exp2(b.fmul(e.splat(b.fsub(old, new)), c))
    factor = b.select(b.fcmp_ordered("==", old, new), e.scalar(1), b.extract_element(gap, ir.Constant(I32, 0)))
    base = e.splat(b.select(b.fcmp_ordered("==", new, e.scalar(-math.inf)), e.scalar(0), new))  # -inf - -inf would be NaN

    def body(k, total):
        at = e.add(ps, e.mul(k, 4))
        x = e.exp2(b.fmul(b.fsub(e.load(at), base), c))
        e.store(x, at)
        return [b.fadd(total[0], x)]
    total = e.sum(e.loop(count, [e.f(0)], body, e.lanes)[0])
    e.store(new, state)
    e.store(b.fadd(b.fmul(e.load(state, 4, F), factor), total), state, 4)
    e.store(b.fadd(e.load(state, 8, F), e.sum(odd)), state, 8)
    return factor


soften = op("iiii", _soften, "f")


def _differ(e, ps, pd, count, lse, delta, constants, slope):
    """One head's S and dP -> P = exp(S unit - lse) and dS = P (dP - delta) times the scale and the derivative at `slope` (0: none), in place.
    S unit is rounded before the lse is taken off, as the forward rounds its maximum: where one key is all of a row, P is 1.
    Returns 0, or NaN where a score or a gradient is not finite."""
    b = e.b
    scale, unit = (e.splat(e.load(constants, offset, F)) for offset in (12, 16))
    lse, delta, lanes = e.splat(lse), e.splat(delta), ir.Constant(e.VI, list(range(e.lanes)))

    def body(k, odd):
        at = e.mul(k, 4)
        there = b.icmp_signed("<", lanes, e.splat(b.trunc(b.sub(count, k), I32)))
        s = b.select(there, b.fmul(e.load(e.add(ps, at)), unit), lse)
        p = e.exp2(b.fmul(b.fsub(s, lse), e.f(math.log2(math.e))))
        d = b.select(there, b.fmul(b.fmul(p, b.fsub(e.load(e.add(pd, at)), delta)), scale), e.f(0))
        e.store(p, e.add(ps, at))
        e.store(d, e.add(pd, at))
        with b.if_then(b.icmp_signed("!=", slope, e.i(0))):
            e.store(b.fmul(d, e.load(e.add(slope, at))), e.add(pd, at))
        return [e.fma(d, e.f(0), e.fma(s, e.f(0), odd[0]))]
    return e.sum(e.loop(count, [e.f(0)], body, e.lanes)[0])


differ = op("iiiffii", _differ, "f")


def _fetch(e, base, step, keys, count, size):
    """Ask for the rows base + s * step of `count` keys (int64 at `keys`), `size` bytes each: named keys lie where no hardware guesses."""
    def row(n, _):
        at = e.add(base, e.mul(e.load(e.add(keys, e.mul(n, 8)), 0, I64), step))

        def line(k, _):
            kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
            function = cgutils.get_or_insert_function(e.b.module, kind, "llvm.prefetch.p0")
            e.b.call(function, [e.at(at, k, I8), *(ir.Constant(I32, x) for x in (0, 2, 1))])
            return []
        e.loop(size, [], line, 64)
        return []
    e.loop(count, [], row)


fetch_rows = op("iiiii", _fetch)


def _finite(e, row, count):
    """0 if all `count` float32 (padded to whole vectors by finite values) are finite, else NaN."""
    total = e.loop(count, [e.f(0)], lambda k, acc: [e.fma(e.load(e.add(row, e.mul(k, 4))), e.f(0), acc[0])], LANES)[0]
    return e.sum(total)


finite = op("ii", _finite, "f")


def _scale(e, row, count, factor):
    factor = e.splat(factor)
    e.loop(count, [], lambda k, _: (e.store(e.b.fmul(e.load(e.add(row, e.mul(k, 4))), factor), e.add(row, e.mul(k, 4))), [])[1], e.lanes)


scale_row = op("iif", _scale)
"""(row, elements, factor); elements a multiple of LANES."""
