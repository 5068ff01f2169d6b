"""The inner loops of attention with few queries (decode): four rows against a run of keys, features as lanes.

With one query, lanes that are queries stay empty. Here LANES / 4 keys meet four rows at once: LANES sums over the width in registers, folded by a tree into one
vector, so scores lie as S [keys, 4]; O [4, width] gathers four rows times a few vectors of values. Keys and values are converted as they are read.
"""
import math

from llvmlite import ir

from sparsetile.backends.numba.convert import BF16_CODE, F16_CODE, F32_CODE, SIZE, load_as_float
from sparsetile.backends.numba.jit import kernel
from sparsetile.backends.numba.simd import F, I32, LANES, VECTORS, op

ROWS = 4
KEYS = LANES // ROWS
WIDTH = 4 * LANES
AHEAD = 64  # rows: a chunk
_BYTES = {F32_CODE: SIZE["float32"], F16_CODE: SIZE["float16"], BF16_CODE: SIZE["bfloat16"]}


def _folded(e, sums):
    """LANES vectors -> one: lane n is the sum of the n-th."""
    step = 1
    while len(sums) > 1:
        low = [k if not k & step else (k ^ step) + LANES for k in range(LANES)]
        high = [k | step if not k & step else k + LANES for k in range(LANES)]
        sums = [e.b.fadd(*(e.b.shuffle_vector(x, y, ir.Constant(e.VI, take)) for take in (low, high))) for x, y in zip(sums[::2], sums[1::2])]
        step *= 2
    return sums[0]


def _prefetch(e, address):
    """Ask for the line at an address of the next chunk, into the second cache: what is read once comes from memory, 64 rows are too far for the hardware to guess across,
    and the first cache has too few lines on their way for all of them."""
    pointer = e.b.inttoptr(address, ir.IntType(8).as_pointer())
    e.call("llvm.prefetch.p0", ir.VoidType(), pointer, ir.Constant(I32, 0), ir.Constant(I32, 2), ir.Constant(I32, 1))


def _dots(code):
    def dots(e, pk, k_step, pq, q_step, D, ps, keys):
        """S [keys, 4] = K Q^T. D a multiple of LANES, keys of KEYS."""
        def body(j, _):
            base = e.add(pk, e.mul(j, k_step))

            def inner(d, sums):
                own, at = e.mul(d, _BYTES[code]), e.mul(d, 4)
                q = [e.load(e.add(pq, e.add(e.mul(q_step, r), at))) for r in range(ROWS)]
                for u in range(KEYS):
                    _prefetch(e, e.add(base, e.add(e.mul(k_step, AHEAD + u), own)))
                k = [load_as_float(e, code, e.add(base, e.add(e.mul(k_step, u), own))) for u in range(KEYS)]
                return [e.fma(k[n // ROWS], q[n % ROWS], x) for n, x in enumerate(sums)]
            e.store(_folded(e, e.loop(D, [e.f(0)] * LANES, inner, LANES)), e.add(ps, e.mul(j, 4 * ROWS)))
            return []
        e.loop(keys, [], body, KEYS)
    return op("iiiiiii", dots)


def _values(code):
    def values(e, pv, v_step, ps, keys, po, o_step, wide, single):
        """O [4, width] += P^T V; width = (wide * VECTORS + single) vectors."""
        def group(count, first):
            def inner(j, sums):
                row = e.add(pv, e.add(e.mul(j, v_step), e.mul(first, _BYTES[code])))
                for n in range(0, count * LANES * _BYTES[code], 64):
                    _prefetch(e, e.add(row, e.add(e.mul(v_step, AHEAD), n)))
                v = [load_as_float(e, code, row, n * LANES * _BYTES[code]) for n in range(count)]
                p = [e.splat(e.load(e.add(ps, e.mul(j, 4 * ROWS)), 4 * r, F)) for r in range(ROWS)]
                return [e.fma(p[n // count], v[n % count], x) for n, x in enumerate(sums)]
            for n, x in enumerate(e.loop(keys, [e.f(0)] * (ROWS * count), inner)):
                at = e.add(po, e.add(e.mul(o_step, n // count), e.mul(first, 4)))
                e.store(e.b.fadd(x, e.load(at, n % count * WIDTH)), at, n % count * WIDTH)
            return []
        e.loop(wide, [], lambda g, _: group(VECTORS, e.mul(g, VECTORS * LANES)))
        e.loop(single, [], lambda g, _: group(1, e.mul(e.add(e.mul(wide, VECTORS), g), LANES)))
    return op("iiiiiiii", values)


_dots_f32, _dots_f16, _dots_bf16 = (_dots(code) for code in (F32_CODE, F16_CODE, BF16_CODE))
_values_f32, _values_f16, _values_bf16 = (_values(code) for code in (F32_CODE, F16_CODE, BF16_CODE))


@kernel
def dots(code, pk, k_step, pq, q_step, D, ps, keys):
    if code == 0:
        _dots_f32(pk, k_step, pq, q_step, D, ps, keys)
    elif code == 1:
        _dots_f16(pk, k_step, pq, q_step, D, ps, keys)
    else:
        _dots_bf16(pk, k_step, pq, q_step, D, ps, keys)


@kernel
def add_values(code, pv, v_step, ps, keys, po, o_step, wide, single):
    if code == 0:
        _values_f32(pv, v_step, ps, keys, po, o_step, wide, single)
    elif code == 1:
        _values_f16(pv, v_step, ps, keys, po, o_step, wide, single)
    else:
        _values_bf16(pv, v_step, ps, keys, po, o_step, wide, single)


def _cap(e, ps, keys, pc):
    """S = softcap * tanh(S * scale / softcap)."""
    outer, inner = e.splat(e.load(pc, 4, F)), e.splat(e.load(pc, 8, F))

    def body(j, _):
        at = e.add(ps, e.mul(j, 4 * ROWS))
        e.store(e.b.fmul(e.tanh(e.b.fmul(e.load(at), inner)), outer), at)
        return []
    e.loop(keys, [], body, KEYS)


softcap = op("iii", _cap)


def _weights(e, ps, keys, pm, pl, po, o_step, width, pc):
    """S -> probabilities against the maxima at pm (each row's in every fourth lane); sums at pl and O follow a maximum that rises."""
    b, c = e.b, e.splat(e.load(pc, 0, F))
    old = e.load(pm)
    top = e.loop(keys, [e.f(-math.inf)], lambda j, t: [e.max(e.load(e.add(ps, e.mul(j, 4 * ROWS))), t[0])], KEYS)[0]
    step = ROWS
    while step < LANES:
        top = e.max(top, b.shuffle_vector(top, top, ir.Constant(e.VI, [(k + step) % LANES for k in range(LANES)])))
        step *= 2
    new = e.max(top, old)
    with b.if_then(e.any(b.fcmp_ordered(">", new, old))):
        factor = e.exp2(b.fmul(b.fsub(old, new), c))
        e.store(new, pm)
        e.store(b.fmul(factor, e.load(pl)), pl)
        for r in range(ROWS):
            own, row = e.splat(b.extract_element(factor, ir.Constant(I32, r))), e.add(po, e.mul(o_step, r))
            e.loop(width, [], lambda d, _: (e.store(b.fmul(own, e.load(e.add(row, e.mul(d, 4)))), e.add(row, e.mul(d, 4))), [])[1], LANES)

    def body(j, total):
        at = e.add(ps, e.mul(j, 4 * ROWS))
        x = e.exp2(b.fmul(b.fsub(e.load(at), new), c))
        e.store(x, at)
        return [b.fadd(total[0], x)]
    e.store(b.fadd(e.load(pl), e.loop(keys, [e.f(0)], body, KEYS)[0]), pl)


weights = op("iiiiiiii", _weights)
