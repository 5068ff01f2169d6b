"""Element types inside kernels: rows of any type become float32 scratch and back.

Numba knows no bfloat16, float16 or float8 arrays, so kernels hold addresses and a code. All conversions are exact (widening) or round to
nearest even (narrowing), NaN stays NaN, and they agree with ml_dtypes bit for bit (NaN payloads aside).
"""
from sparsetile.backends.numba.jit import kernel
from sparsetile.backends.numba.simd import F, F16, HALF, I8, I16, I32, I64, LANES, Vectors, op

F32_CODE, F16_CODE, BF16_CODE, FP8_CODE = 0, 1, 2, 3
CODE = {"float32": F32_CODE, "float16": F16_CODE, "bfloat16": BF16_CODE, "float8_e4m3fn": FP8_CODE}
SIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float64": 8, "int32": 4}


@kernel
def size_of(code):
    """Bytes of an element."""
    return 4 if code == F32_CODE else 1 if code == FP8_CODE else 2


def half_to_float(e, bits, hardware=HALF):
    """int16 lanes -> float32 lanes."""
    b = e.b
    if hardware:
        return b.fpext(b.bitcast(bits, e.of(F16)), e.V)
    wide = b.zext(bits, e.VI)
    magnitude = b.and_(wide, e.n(0x7fff))
    x = b.fmul(e.as_float(b.shl(magnitude, e.n(13))), e.f(2.0 ** 112))  # denormals come out right, exponent 31 does not
    special = b.or_(b.shl(magnitude, e.n(13)), e.n(0x7f800000))
    x = b.select(b.icmp_signed(">=", magnitude, e.n(0x7c00)), special, e.as_int(x))
    return e.as_float(b.or_(x, b.shl(b.and_(wide, e.n(0x8000)), e.n(16))))


def float_to_half(e, x, hardware=HALF):
    """float32 lanes -> int16 lanes."""
    b = e.b
    if hardware:
        return b.bitcast(b.fptrunc(x, e.of(F16)), e.of(I16))
    bits = e.as_int(x)
    magnitude = b.and_(bits, e.n(0x7fffffff))
    odd = b.and_(b.lshr(magnitude, e.n(13)), e.n(1))
    normal = b.lshr(b.add(b.sub(magnitude, e.n(112 << 23)), b.add(odd, e.n(0xfff))), e.n(13))
    # below 2**-14: adding 1/2 puts the rounded multiple of 2**-24 into the low bits
    tiny = b.sub(e.as_int(b.fadd(e.as_float(magnitude), e.f(0.5))), e.n(0x3f000000))
    y = b.select(b.icmp_signed("<", magnitude, e.n(113 << 23)), tiny, normal)
    y = b.select(b.icmp_signed(">=", magnitude, e.n(0x477ff000)), e.n(0x7c00), y)
    y = b.select(b.icmp_signed(">", magnitude, e.n(0x7f800000)), e.n(0x7e00), y)
    return b.trunc(b.or_(y, b.lshr(b.and_(bits, e.n(0x80000000)), e.n(16))), e.of(I16))


def bfloat_to_float(e, bits):
    return e.as_float(e.b.shl(e.b.zext(bits, e.VI), e.n(16)))


def float_to_bfloat(e, x):
    b, bits = e.b, e.as_int(x)
    even = b.add(bits, b.add(b.and_(b.lshr(bits, e.n(16)), e.n(1)), e.n(0x7fff)))
    nan = b.fcmp_unordered("uno", x, x)
    return b.trunc(b.lshr(b.select(nan, b.or_(bits, e.n(0x400000)), even), e.n(16)), e.of(I16))


def float8_to_float(e, bits):
    """e4m3fn, int8 lanes: as a float16 of 1/256 of the value, whose denormals the hardware knows; 0x7f is NaN."""
    b = e.b
    wide = b.zext(bits, e.of(I16))
    constant = lambda x: b.trunc(e.n(x), e.of(I16))
    magnitude = b.and_(wide, constant(0x7f))
    half = b.or_(b.shl(magnitude, constant(7)), b.shl(b.and_(wide, constant(0x80)), constant(8)))
    x = b.fmul(half_to_float(e, half), e.f(256))
    return b.select(b.icmp_unsigned("==", magnitude, constant(0x7f)), e.f(float("nan")), x)


def float_to_float8(e, x):
    """float32 lanes of at most 448 in size, or NaN -> e4m3fn, int8 lanes."""
    b, bits = e.b, e.as_int(x)
    magnitude = b.and_(bits, e.n(0x7fffffff))
    odd = b.and_(b.lshr(magnitude, e.n(20)), e.n(1))
    normal = b.lshr(b.add(b.sub(magnitude, e.n(120 << 23)), b.add(odd, e.n(0x7ffff))), e.n(20))
    # below 2**-6: adding 2**14 puts the rounded multiple of 2**-9 into the low bits
    tiny = b.sub(e.as_int(b.fadd(e.as_float(magnitude), e.f(2.0 ** 14))), e.n(141 << 23))
    y = b.select(b.icmp_signed("<", magnitude, e.n(121 << 23)), tiny, normal)
    y = b.select(b.icmp_signed(">", magnitude, e.n(0x43e00000)), e.n(0x7f), y)
    return b.trunc(b.or_(y, b.and_(b.lshr(bits, e.n(24)), e.n(0x80))), e.of(I8))


READ = {F32_CODE: (F, lambda e, x: x), F16_CODE: (I16, half_to_float), BF16_CODE: (I16, bfloat_to_float), FP8_CODE: (I8, float8_to_float)}
WRITE = {F32_CODE: (F, lambda e, x: x), F16_CODE: (I16, float_to_half), BF16_CODE: (I16, float_to_bfloat), FP8_CODE: (I8, float_to_float8)}


def load_as_float(e, code, address, offset=0):
    """`lanes` elements of the type `code` (known when emitting) -> float32 lanes. For emitters of kernels that convert as they read."""
    element, convert = READ[code]
    return convert(e, e.load(address, offset, e.of(element)))


def store_float_as(e, code, x, address, offset=0):
    element, convert = WRITE[code]
    e.store(convert(e, x), address, offset)


def _denormal(e, source, count):
    """How many of `count` bfloat16 are denormal, at least 1 if any is."""
    main, total = e.b.and_(count, e.i(-LANES)), e.i(0)
    for v, first, n in ((e, 0, main), (Vectors(e.b, 1), main, e.b.sub(count, main))):
        def body(k, found):
            magnitude = v.b.and_(v.b.zext(v.load(e.add(source, e.mul(e.add(k, first), 2)), 0, v.of(I16)), v.VI), v.n(0x7fff))
            hit = v.b.icmp_unsigned("<", v.b.sub(magnitude, v.n(1)), v.n(0x7f))
            return [v.b.or_(found[0], v.b.zext(hit, v.VI))]
        found = e.loop(n, [v.n(0)], body, v.lanes)[0]
        total = e.b.add(total, e.b.zext(v.any(v.b.icmp_unsigned("!=", found, v.n(0))), I64))
    return total


_denormal_row = op("ii", _denormal, "i")


@kernel
def denormal_rows(source, steps, shape):
    """Whether a bfloat16 tensor of these three steps and four sizes holds denormals: pair products take them for 0."""
    found = 0
    for b in range(shape[0]):
        for h in range(shape[1]):
            for t in range(shape[2]):
                found += _denormal_row(source + b * steps[0] + h * steps[1] + t * steps[2], shape[3])
    return found > 0


def _bytes(code):
    return 4 if code == F32_CODE else 1 if code == FP8_CODE else 2


def _row(code, read):
    """Convert `count` elements: whole vectors, then one by one."""
    def row(e, source, count, target):
        main = e.b.and_(count, e.i(-LANES))
        for v, first, n in ((e, 0, main), (Vectors(e.b, 1), main, e.b.sub(count, main))):
            def body(k, _):
                k = e.add(k, first)
                own, wide = e.mul(k, _bytes(code)), e.mul(k, 4)
                if read:
                    v.store(load_as_float(v, code, e.add(source, own)), e.add(target, wide))
                else:
                    store_float_as(v, code, v.load(e.add(source, wide)), e.add(target, own))
                return []
            e.loop(n, [], body, v.lanes)
    return row


_read_f32, _read_f16, _read_bf16, _read_fp8 = (op("iii", _row(code, True)) for code in range(4))
_write_f32, _write_f16, _write_bf16, _write_fp8 = (op("iii", _row(code, False)) for code in range(4))


def _rows(code, read):
    """Many rows in one loop: a call for each would cost more than its elements. Read rows get zeros behind `count` elements, up to `padded`."""
    row = _row(code, read)

    def rows_(e, source, step, rows, count, padded, target, target_step):
        def body(r, _):
            to = e.add(target, e.mul(r, target_step))
            row(e, e.add(source, e.mul(r, step)), count, to)
            if read:
                _fill(e, e.add(to, e.mul(count, 4)), e.b.sub(padded, count))
            return []
        e.loop(rows, [], body)
    return rows_


def _fill(e, target, count):
    main = e.b.and_(count, e.i(-LANES))
    for v, first, n in ((e, 0, main), (Vectors(e.b, 1), main, e.b.sub(count, main))):
        e.loop(n, [], lambda k, _: (v.store(v.f(0), e.add(target, e.mul(e.add(k, first), 4))), [])[1], v.lanes)


fill_zero = op("ii", _fill)
"""(target, count): float32 zeros."""
_rows_f32, _rows_f16, _rows_bf16, _rows_fp8 = (op("iiiiiii", _rows(code, True)) for code in range(4))
_out_f32, _out_f16, _out_bf16 = (op("iiiiiii", _rows(code, False)) for code in range(3))


@kernel
def read_row(code, source, count, target, padded):
    """count elements of type `code` at `source` -> float32 at `target`, zeros up to `padded` elements."""
    if code == 0:
        _read_f32(source, count, target)
    elif code == 1:
        _read_f16(source, count, target)
    elif code == 2:
        _read_bf16(source, count, target)
    else:
        _read_fp8(source, count, target)
    if padded > count:
        fill_zero(target + 4 * count, padded - count)


@kernel
def read_rows(code, source, step, rows, count, padded, target, target_step):
    """read_row of `rows` rows, `step` bytes apart, to `target_step` bytes apart."""
    if code == 0:
        _rows_f32(source, step, rows, count, padded, target, target_step)
    elif code == 1:
        _rows_f16(source, step, rows, count, padded, target, target_step)
    elif code == 2:
        _rows_bf16(source, step, rows, count, padded, target, target_step)
    else:
        _rows_fp8(source, step, rows, count, padded, target, target_step)


@kernel
def write_rows(code, source, step, rows, count, target, target_step):
    """write_row of `rows` rows, `step` bytes apart, to `target_step` bytes apart."""
    if code == 0:
        _out_f32(source, step, rows, count, 0, target, target_step)
    elif code == 1:
        _out_f16(source, step, rows, count, 0, target, target_step)
    else:
        _out_bf16(source, step, rows, count, 0, target, target_step)


@kernel
def write_row(code, source, count, target):
    """count float32 at `source` -> type `code` at `target`, rounded to nearest even; float8 takes at most 448 in size, or NaN."""
    if code == 0:
        _write_f32(source, count, target)
    elif code == 1:
        _write_f16(source, count, target)
    elif code == 2:
        _write_bf16(source, count, target)
    else:
        _write_fp8(source, count, target)


def _copy(e, source, count, target):
    """`count` bytes: whole vectors, then one by one."""
    main = e.b.and_(count, e.i(-LANES))
    for v, first, n in ((e, 0, main), (Vectors(e.b, 1), main, e.b.sub(count, main))):
        def body(k, _):
            k = e.add(k, first)
            v.store(v.load(e.add(source, k), 0, v.of(I8)), e.add(target, k))
            return []
        e.loop(n, [], body, v.lanes)


copy_row = op("iii", _copy)
"""(source, count, target): bytes as they are."""
