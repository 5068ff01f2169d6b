"""The inner loops of block attention: one panel of PANEL queries against a run of keys. Everything in float32, on addresses.

Lanes are queries: scores are kept transposed, S [keys, PANEL] = K Q^T and O^T [Dv, PANEL] += V^T P, so that keys and values are read by
broadcasts, in their own layout and with their own strides, and only Q is transposed, once per tile. Maxima, sums, rescaling and masks are
then lane by lane. Products run over register tiles of 6 rows, and of 4 where 6 does not divide: `split` says how many of each.

Masks are words: bit c of a lane's int32 word c // 32 tells whether its query sees key c of the chunk.
Scores are unscaled; `constants` holds c = scale * log2(e): probabilities are 2 ** (c * score - m), in one multiply-add, m a maximum that lags
behind by at most TAU, so that O is rescaled seldom. m is c times a score, rounded: all that is made with it, the lse too, is made with the rounded one.
"""
import math

from llvmlite import ir

from sparsetile.backends.numba.ahead import ask_next
from sparsetile.backends.numba.convert import float_to_bfloat
from sparsetile.backends.numba.jit import kernel
from sparsetile.backends.numba.simd import F, F64, I1, I16, I32, I64, LANES, PAIRS, VECTORS, Vectors, highest_bit, lowest_bit, op

PANEL = LANES * VECTORS
STEP = PANEL * 4  # bytes from row to row of S, Q^T and O^T
WIDTH = LANES * 4
RUN = max(LANES, 8)  # keys that go together where not all vectors of a panel see them: in a corner of a window each sees another part
STEPS = {VECTORS: 4}  # of a product in one turn of its loop; 2 for fewer vectors than a panel has: they come seldom, and every step is compiled
TAU = 8.0  # a maximum in use may lag behind by so many powers of two


@kernel
def split(count):
    """A multiple of 4 as sixes * 6 + fours * 4 with as many sixes as possible."""
    sixes = count // 6
    if (count - 6 * sixes) % 4:
        sixes -= 1
    return sixes, (count - 6 * sixes) // 4


def _groups(e, sixes, fours, state, body, cols=VECTORS):
    """body(rows, first, state) -> state, over register tiles of six rows, then of four; of one vector eight go first, for six sums would wait for each other."""
    many = 6
    if cols == 1:
        total, many = e.add(e.mul(sixes, 6), e.mul(fours, 4)), 8
        sixes, fours = e.b.lshr(total, e.i(3)), e.b.lshr(e.b.and_(total, e.i(7)), e.i(2))
    state = e.loop(sixes, state, lambda g, s: body(many, e.mul(g, many), s))
    base = e.mul(sixes, many)
    return e.loop(fours, state, lambda g, s: body(4, e.add(base, e.mul(g, 4)), s))


def by_vectors(emit):
    """An emitter of emit(cols) for each number of a panel's vectors, which is its first argument; all addresses of lanes are those of the first of them."""
    def emit_all(e, cols, *args):
        for n in range(1, VECTORS + 1):
            with e.b.if_then(e.b.icmp_signed("==", cols, e.i(n)), likely=n == VECTORS):
                emit(n)(e, *args)
    return emit_all


def _panel(e, address, offset=0, kind=None, cols=VECTORS):
    return [e.load(address, offset + n * WIDTH, kind) for n in range(cols)]


def _top(e, values):
    """The largest of a list of vectors, as a tree."""
    while len(values) > 1:
        values = [e.max(values[i], values[i + 1]) for i in range(0, len(values) - 1, 2)] + values[len(values) & ~1:]
    return values[0]


def _seen(e, words, key, cols=VECTORS):
    """Lane masks of a key: its bit moved to the sign."""
    b = e.b
    offset = e.mul(b.ashr(key, e.i(5)), STEP)
    shift = e.splat(b.trunc(b.sub(e.i(31), b.and_(key, e.i(31))), I32))
    return [b.icmp_signed("<", b.shl(e.load(e.add(words, offset), n * WIDTH, e.VI), shift), e.n(0)) for n in range(cols)]


def _score(masked, pairs=False, cols=VECTORS):
    def score(e, asks, pk, k_step, pq, D, ps, pm, sixes, fours, *mask):
        """S[rows] = K Q^T from address pk on; the lane-wise maximum is taken into pm."""
        def group(rows, first, top):
            ask_next(e, asks, rows, cols)
            acc = e.gemm(rows, cols, e.add(pk, e.mul(first, k_step)), k_step, 4, pq, STEP, D, pairs=pairs, unroll=STEPS.get(cols, 2))
            if masked:
                words, first_key = mask
                for r in range(rows):
                    seen = _seen(e, words, e.add(first_key, e.add(first, r)), cols)
                    for n in range(cols):
                        acc[r * cols + n] = e.b.select(seen[n], acc[r * cols + n], e.f(-math.inf))
            out = e.add(ps, e.mul(first, STEP))
            for i, x in enumerate(acc):
                e.store(x, out, i // cols * STEP + i % cols * WIDTH)
            return [_top(e, acc[n::cols] + [top[n]]) for n in range(cols)]
        top = _groups(e, sixes, fours, _panel(e, pm, cols=cols), group, cols)
        for n in range(cols):
            e.store(top[n], pm, n * WIDTH)
    return score


score = op("iiiiiiiii", _score(False))
"""(list of what to ask for, K, K's row step, Q^T, D, S, maxima, sixes, fours)"""
score_masked = op("iiiiiiiiiiii", by_vectors(lambda cols: _score(True, cols=cols)))
"""The same with (vectors, ..., words, first key): unseen pairs become -inf."""
score_pairs, score_pairs_masked = op("iiiiiiiii", _score(False, PAIRS)), op("iiiiiiiiiii", _score(True, PAIRS))
"""The same of bfloat16, two to a word: D counts words. Where the CPU has no pair products these are never called."""


def _cap(e, ps, pm, words, first_key, count, pc):
    """S = softcap * tanh(S * scale / softcap) where seen, else -inf; the maximum is taken into pm."""
    outer, inner = e.splat(e.load(pc, 4, F)), e.splat(e.load(pc, 8, F))

    def body(j, top):
        row, new = e.add(ps, e.mul(j, STEP)), []
        for n, seen in enumerate(_seen(e, words, e.add(first_key, j))):
            x = e.b.fmul(e.tanh(e.b.fmul(e.load(row, n * WIDTH), inner)), outer)
            x = e.b.select(seen, x, e.f(-math.inf))
            e.store(x, row, n * WIDTH)
            new.append(e.max(x, top[n]))
        return new
    for n, x in enumerate(e.loop(count, _panel(e, pm), body)):
        e.store(x, pm, n * WIDTH)


softcap = op("iiiiii", _cap)


def _rescale(e, top, pm, pl, po, Dv, pc):
    """Where some lane's new maximum is past the one in use by more than TAU: take the new ones, and scale sums and O^T."""
    b, c = e.b, e.splat(e.load(pc, 0, F))
    moved, tops = ir.Constant(e.of(I1), [0] * LANES), [b.fmul(x, c) for x in _panel(e, top)]
    for new, old in zip(tops, _panel(e, pm)):
        moved = b.or_(moved, b.fcmp_ordered(">", new, b.fadd(old, e.f(TAU))))
    with b.if_then(e.any(moved), likely=False):
        factor = []
        for n, (new, old) in enumerate(zip(tops, _panel(e, pm))):
            gap = b.select(b.fcmp_ordered("==", new, old), e.f(0), b.fsub(old, new))  # both may be -inf
            factor.append(e.exp2(gap))
            e.store(new, pm, n * WIDTH)
            e.store(b.fmul(e.load(pl, n * WIDTH), factor[n]), pl, n * WIDTH)

        def body(d, _):
            row = e.add(po, e.mul(d, STEP))
            for n in range(VECTORS):
                e.store(b.fmul(e.load(row, n * WIDTH), factor[n]), row, n * WIDTH)
            return []
        e.loop(Dv, [], body)


rescale = op("iiiiii", _rescale)
"""(new maxima of scores, maxima in use, sums, O^T, Dv, constants)"""


def _exponent(pairs, cols=VECTORS):
    def exponent(e, ps, count, pm, pl, pc):
        """P = 2 ** (c S - m) in place for a multiple of 4 keys; sums are added up at pl. pairs: as bfloat16, rows 2 j and 2 j + 1 together in row j."""
        b, c = e.b, e.splat(e.load(pc, 0, F))
        m = [b.fneg(b.select(b.fcmp_ordered("==", x, e.f(-math.inf)), e.f(0), x)) for x in _panel(e, pm, cols=cols)]  # -inf - -inf would be NaN
        rows = 2
        places = [r * STEP + n * WIDTH for r in range(rows) for n in range(cols)]

        def body(j, sums):
            row = e.add(ps, e.mul(j, STEP))
            new = [e.exp2(e.fma(e.load(row, at), c, m[i % cols])) for i, at in enumerate(places)]
            if pairs:
                words = [b.zext(float_to_bfloat(e, x), e.VI) for x in new]
                for n in range(VECTORS):
                    e.store(b.or_(words[n], b.shl(words[VECTORS + n], e.n(16))), e.add(ps, e.mul(j, STEP // 2)), n * WIDTH)
            else:
                for x, at in zip(new, places):
                    e.store(x, row, at)
            return [b.fadd(total, x) for total, x in zip(sums, new)]
        sums = e.loop(count, [e.f(0)] * (rows * cols), body, rows)
        for n in range(cols):  # a chunk's sum is made from zero: a smaller error than one long sum
            e.store(b.fadd(e.load(pl, n * WIDTH), b.fadd(sums[n], sums[cols + n])), pl, n * WIDTH)
    return exponent


exponent, exponent_pairs = op("iiiiii", by_vectors(lambda cols: _exponent(False, cols))), op("iiiii", _exponent(True))
"""([vectors,] S, keys, maxima in use, sums, constants)"""


def _values(pairs, cols=VECTORS):
    def values(e, asks, pv, v_step, ps, keys, po, sixes, fours):
        """O^T += V^T P over any number of keys."""
        def group(rows, first, _):
            ask_next(e, asks, rows, cols)
            acc = e.gemm(rows, cols, e.add(pv, e.mul(first, 4)), 4, v_step, ps, STEP, keys, pairs=pairs, unroll=STEPS.get(cols, 2))
            out = e.add(po, e.mul(first, STEP))
            for i, x in enumerate(acc):
                at = i // cols * STEP + i % cols * WIDTH
                e.store(e.b.fadd(x, e.load(out, at)), out, at)
            return []
        _groups(e, sixes, fours, [], group, cols)
    return values


add_values, add_values_pairs = op("iiiiiiiii", by_vectors(lambda cols: _values(False, cols))), op("iiiiiiii", _values(PAIRS))
"""([vectors,] list of what to ask for, V, V's row step, P, keys, O^T, sixes, fours); pairs: of keys, in V and P alike"""


def _interleave(e, source, step, pairs, width, target, padded):
    """Rows 2 j and 2 j + 1 of bfloat16 -> row j of `padded` words, first in the low halves; zeros behind `width`."""
    def body(j, _):
        row, to = e.add(source, e.mul(j, e.mul(step, 2))), e.add(target, e.mul(j, e.mul(padded, 4)))
        main = e.b.and_(width, e.i(-LANES))
        for v, first, n in ((e, 0, main), (Vectors(e.b, 1), main, e.b.sub(width, main))):
            def words(d, _):
                at = e.mul(e.add(d, first), 2)
                low, high = (e.b.zext(v.load(e.add(x, at), 0, v.of(I16)), v.VI) for x in (row, e.add(row, step)))
                v.store(e.b.or_(low, e.b.shl(high, v.n(16))), e.add(to, e.mul(at, 2)))
                return []
            e.loop(n, [], words, v.lanes)
        e.loop(e.b.sub(padded, width), [], lambda d, _: (e.store(ir.Constant(I32, 0), e.add(to, e.mul(e.add(width, d), 4))), [])[1])
        return []
    e.loop(pairs, [], body)


interleave = op("iiiiii", _interleave)


def _row_ends(e, state, unit):
    """Of a panel's rows 1 over the sum (0 for a row without keys) over the maxima, and the lse over those in use. The logarithm's fraction is float32, all that is added to it float64."""
    b, wide = e.b, e.of(F64)
    for n in range(VECTORS):
        top, total = (e.load(state, at * STEP + n * WIDTH) for at in (1, 2))
        power, fraction = e.log2(total)
        lse = b.fadd(b.fmul(b.fpext(top, wide), e.splat(unit)), b.fmul(b.fadd(b.sitofp(power, wide), b.fpext(fraction, wide)), ir.Constant(wide, [math.log(2)] * LANES)))
        e.store(b.select(b.fcmp_ordered("==", total, e.f(0)), e.f(0), b.fdiv(e.f(1), total)), state, n * WIDTH)
        e.store(b.select(b.fcmp_ordered(">", total, e.f(0)), b.fptrunc(lse, e.V), e.f(-math.inf)), state, STEP + n * WIDTH)


row_ends = op("id", _row_ends)


def _scale_panel(e, po, Dv, pf, odd):
    factor = _panel(e, pf)

    def body(d, found):
        row, new = e.add(po, e.mul(d, STEP)), []
        for n in range(VECTORS):
            x = e.b.fmul(e.load(row, n * WIDTH), factor[n])
            e.store(x, row, n * WIDTH)
            new.append(e.fma(x, e.f(0), found[n]))
        return new
    for n, x in enumerate(e.loop(Dv, [e.f(0)] * VECTORS, body)):
        e.store(x, odd, n * WIDTH)


scale_panel = op("iiii", _scale_panel)
"""(O^T, Dv, one factor per lane, where 0 is put for each lane that is finite, else NaN)"""


def _fill(e, target, count, x):
    x = e.splat(x)
    e.loop(count, [], lambda k, _: (e.store(x, e.add(target, e.mul(k, 4))), [])[1], LANES)


fill = op("iif", _fill)
"""(target, count, value); whole vectors."""


def _clear_rows(e, target, step, rows):
    def body(k, _):
        for n in range(VECTORS):
            e.store(e.f(0), e.add(target, e.mul(step, k)), n * WIDTH)
        return []
    e.loop(rows, [], body)


clear_rows = op("iii", _clear_rows)
"""(target, row step, rows): a panel's lanes"""


def _word_reduce(name):
    def reduce(e, words):
        x, *more = _panel(e, words, 0, e.VI)
        for y in more:
            x = getattr(e.b, name + "_")(x, y)
        return e.b.zext(e.call(f"llvm.vector.reduce.{name}.v{LANES}i32", I32, x), I64)
    return reduce


word_union, word_common = op("i", _word_reduce("or"), "i"), op("i", _word_reduce("and"), "i")
"""Of the PANEL int32 at an address, as 0 .. 2**32 - 1."""


def _interval_words(e, intervals, first, there, rows, words):
    """Words of the 32 keys from `first` on that PANEL rows see, of those that are `there`. Intervals (two int32 a row) and rows' numbers
    (int64, below 0: no row) follow each other."""
    b, first, there = e.b, e.splat(e.b.trunc(first, I32)), e.splat(e.b.trunc(there, I32))

    def below(x):
        """Bits before the x-th, x clipped to 0 .. 32."""
        x = b.select(b.icmp_signed(">", x, e.n(0)), x, e.n(0))
        return b.select(b.icmp_signed("<", x, e.n(32)), b.sub(b.shl(e.n(1), b.and_(x, e.n(31))), e.n(1)), e.n(-1))
    for n in range(VECTORS):
        pairs = [e.load(intervals, (2 * n + half) * WIDTH, e.VI) for half in (0, 1)]
        low, high = (b.sub(b.shuffle_vector(*pairs, ir.Constant(e.VI, [2 * lane + end for lane in range(LANES)])), first) for end in (0, 1))
        there_ = b.icmp_signed(">=", e.load(rows, 8 * LANES * n, e.of(I64)), ir.Constant(e.of(I64), [0] * LANES))
        e.store(b.select(there_, b.and_(b.and_(below(high), b.not_(below(low))), there), e.n(0)), words, n * WIDTH)


interval_words = op("iiiii", _interval_words)


def _vectors_that_see(e, words, first, count):
    b, found = e.b, e.i(0)
    words = e.add(words, e.mul(b.ashr(first, e.i(5)), STEP))
    shift, bits = b.trunc(b.and_(first, e.i(31)), I32), b.trunc(b.sub(b.shl(e.i(1), count), e.i(1)), I32)
    right, left, bits = e.splat(shift), e.splat(b.sub(ir.Constant(I32, 31), shift)), e.splat(bits)
    for n in range(VECTORS):
        low, high = (e.load(words, w * STEP + n * WIDTH, e.VI) for w in (0, 1))
        seen = b.and_(b.or_(b.lshr(low, right), b.shl(b.shl(high, left), e.n(1))), bits)
        found = b.or_(found, b.shl(b.zext(e.any(b.icmp_signed("!=", seen, e.n(0))), I64), e.i(n)))
    return found


vectors_that_see = op("iii", _vectors_that_see, "i")
"""(words, first key, keys, at most RUN): bit n where a lane of vector n sees one of them"""


@kernel
def run_of_lanes(words, first, high):
    """The masked keys from `first` on, before `high`, that the same vectors of a panel see: where they end, their first vector and how many up to their last, 0 if nobody sees them."""
    end = min(first + RUN, high)
    seen = vectors_that_see(words, first, end - first)
    while end < high and vectors_that_see(words, end, min(RUN, high - end)) == seen:
        end = min(end + RUN, high)
    if seen == 0:
        return end, 0, 0
    at = lowest_bit(seen)
    return end, at, highest_bit(seen) + 1 - at


def _merge_words(e, saw, words):
    for n in range(VECTORS):
        e.store(e.b.or_(e.load(saw, n * WIDTH, e.VI), e.load(words, n * WIDTH, e.VI)), saw, n * WIDTH)


merge_words = op("ii", _merge_words)


def _every_word(e, words, count):
    e.loop(e.mul(count, PANEL), [], lambda k, _: (e.store(ir.Constant(I32, -1), e.add(words, e.mul(k, 4))), [])[1])


every_word = op("ii", _every_word)


def _times(e, address, count, x):
    x = e.splat(x)
    e.loop(count, [], lambda k, _: (e.store(e.b.fmul(e.load(e.add(address, e.mul(k, 4))), x), e.add(address, e.mul(k, 4))), [])[1], LANES)


times = op("iif", _times)
"""(address, count, factor): float32 in place; whole vectors."""
