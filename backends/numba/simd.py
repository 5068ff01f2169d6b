"""Vectors in Numba, written as LLVM: as wide as the CPU at hand, one source for all widths.

LLVM leaves most of our loops scalar or half as wide as the machine, so the inner loops are written with explicit vectors. `op` turns an
emitter into a function that compiled code can call; it gets a `Vectors`, a builder that knows the width, and its arguments:

    axpy = op("iifi", emit)                    # i: int64 (addresses, counts), f: float32
    def emit(e, px, py, a, count): ...         # e.load, e.store, e.fma, e.loop, ...

Addresses are int64 and count bytes. Arrays must outlive the calls that use their addresses. Loads and stores need no alignment.
With lanes=1 the same emitter handles the elements past the last whole vector.
"""
import math
import os
import platform

import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils, config, types
from numba.extending import intrinsic

F, F16, F64 = ir.FloatType(), ir.HalfType(), ir.DoubleType()


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not know."""

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, _BFloat)

    def __hash__(self):
        return hash("bfloat")


I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))


def _cpu_features() -> frozenset:
    named = config.CPU_FEATURES  # what Numba compiles for, when the user narrows it
    if named is not None:
        return frozenset(word[1:] for word in named.split(",") if word.startswith("+"))
    return frozenset(name for name, there in binding.get_host_cpu_features().items() if there)


FEATURES = _cpu_features()
X86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")
ARM = platform.machine().lower() in ("aarch64", "arm64")
LANES = int(os.environ.get("SPARSETILE_CPU_LANES", 0)) or (16 if "avx512f" in FEATURES else 8 if "avx2" in FEATURES else 4)
"""float32 values in a vector: 16 with AVX-512, 8 with AVX2, 4 elsewhere (NEON, SSE)."""
REGISTERS = 16 if LANES == 8 or X86 and LANES == 4 else 32
VECTORS = REGISTERS // 8
"""Vectors side by side in a register tile: 6 x 2 accumulators fit 16 registers, 6 x 4 fit 32."""
HALF = ARM or "f16c" in FEATURES or "avx512f" in FEATURES
"""float16 conversions are instructions; otherwise they are done with integers."""
SCALES = LANES == 16 and {"avx512f", "avx512dq"} <= FEATURES
"""The part of a float32 behind its whole number, and a product with a power of two, are instructions."""
COMPRESS = LANES == 16 and "avx512f" in FEATURES
"""Chosen lanes are moved together by one instruction."""
PAIRS = LANES == 16 and "avx512bf16" in FEATURES
"""Pair products: one instruction adds two products of bfloat16 to each float32 lane."""
FAST_PAIRS = PAIRS and (config.CPU_NAME or binding.get_host_cpu_name()).startswith("znver")
"""AMD's (Zen 4 on) take as long as one multiply-add; Intel's take four times as long (measured on Emerald Rapids: 73 of float32's 159 GFLOP/s), so float32 is faster there."""


def _minimax(degree: int, target, weight, middle=0.0) -> list[float]:
    """Polynomial on an interval of length 1 with near-minimax error `weight * (p - target)`, by reweighted least squares on Chebyshev nodes."""
    x = np.cos(np.pi * (np.arange(400) + 0.5) / 400) / 2 + middle
    share = np.ones_like(x)
    basis = np.vander(x, degree + 1, increasing=True) * weight(x)[:, None]
    for _ in range(30):
        root = np.sqrt(share)
        coefficients = np.linalg.lstsq(basis * root[:, None], target(x) * weight(x) * root, rcond=None)[0]
        share *= np.abs(basis @ coefficients - target(x) * weight(x)) + 1e-12
        share /= share.sum()
    return [float(np.float32(c)) for c in coefficients]


def _expm1_ratio(x):  # (2**x - 1) / x
    return np.expm1(x * math.log(2)) / x


# of 2**x on [-1/2, 1/2], with SCALES on [0, 1]; exactly 1 at 0: the largest score's own weight
EXP2 = [1.0] + _minimax(4, _expm1_ratio, lambda x: np.abs(x) * 2.0 ** -x, 0.5 if SCALES else 0.0)
EXPM1 = _minimax(5, _expm1_ratio, lambda x: 1 / _expm1_ratio(x))
MAGIC = 12582912.0  # 1.5 * 2**23: adding it rounds to the nearest integer, kept in the low bits


class Vectors:
    """An LLVM builder `b` with vectors of `lanes` float32 (V) or int32 (VI)."""

    def __init__(self, builder, lanes=LANES):
        self.b, self.lanes = builder, lanes
        self.V, self.VI = ir.VectorType(F, lanes), ir.VectorType(I32, lanes)

    def of(self, element):
        return ir.VectorType(element, self.lanes)

    # constants; ints pass through as int64 values
    def i(self, x):
        return x if isinstance(x, ir.Value) else ir.Constant(I64, x)

    def f(self, x):
        return ir.Constant(self.V, [float(x)] * self.lanes)

    def n(self, x):
        return ir.Constant(self.VI, [x if x < 2 ** 31 else x - 2 ** 32] * self.lanes)

    def scalar(self, x):
        return ir.Constant(F, float(x))

    # addresses
    def add(self, x, y):
        if isinstance(x, int) and isinstance(y, int):
            return x + y
        return x if isinstance(y, int) and y == 0 else self.b.add(self.i(x), self.i(y))

    def mul(self, x, y):
        if isinstance(x, int) and isinstance(y, int):
            return x * y
        return x if isinstance(y, int) and y == 1 else self.b.mul(self.i(x), self.i(y))

    def at(self, address, offset, element):
        return self.b.inttoptr(self.add(address, offset), element.as_pointer())

    # memory
    def load(self, address, offset=0, kind=None, align=1):
        return self.b.load(self.at(address, offset, kind or self.V), align=align)

    def store(self, x, address, offset=0, align=1):
        self.b.store(x, self.at(address, offset, x.type), align=align)

    def ask(self, address):
        """For the cache line at an address, which will be read and written."""
        self.call("llvm.prefetch.p0", ir.VoidType(), self.at(address, 0, I8), *(ir.Constant(I32, x) for x in (1, 3, 1)))

    def fetch(self, address):
        """The cache line at an address, which will be read: into the second cache, for the first has few lines on their way."""
        self.call("llvm.prefetch.p0", ir.VoidType(), self.at(address, 0, I8), *(ir.Constant(I32, x) for x in (0, 2, 1)))

    def splat(self, x):
        """A scalar in all lanes."""
        kind = self.of(x.type)
        first = self.b.insert_element(ir.Constant(kind, ir.Undefined), x, ir.Constant(I32, 0))
        return self.b.shuffle_vector(first, ir.Constant(kind, ir.Undefined), self.n(0))

    # arithmetic
    def call(self, name, returns, *args):
        function = cgutils.get_or_insert_function(self.b.module, ir.FunctionType(returns, [a.type for a in args]), name)
        return self.b.call(function, list(args))

    def suffix(self):
        return f"v{self.lanes}f32"

    def fma(self, x, y, z):
        return self.call(f"llvm.fma.{self.suffix()}", self.V, x, y, z)

    def add_pairs(self, x, y, z):
        """z + x0 y0 + x1 y1; x, y int32 lanes that hold two bfloat16 each. Denormals count as 0."""
        bfloats = ir.VectorType(_BFloat(), 2 * self.lanes)
        return self.call("llvm.x86.avx512bf16.dpbf16ps.512", self.V, z, self.b.bitcast(x, bfloats), self.b.bitcast(y, bfloats))

    def sqrt(self, x):
        return self.call(f"llvm.sqrt.{self.suffix()}", self.V, x)

    def abs(self, x):
        return self.call(f"llvm.fabs.{self.suffix()}", self.V, x)

    def copysign(self, x, sign):
        return self.call(f"llvm.copysign.{self.suffix()}", self.V, x, sign)

    def max(self, x, y):
        """x where x > y, else y (also where either is NaN)."""
        return self.b.select(self.b.fcmp_ordered(">", x, y), x, y)

    def min(self, x, y):
        return self.b.select(self.b.fcmp_ordered("<", x, y), x, y)

    def any(self, mask):
        bits = self.b.bitcast(mask, ir.IntType(self.lanes)) if self.lanes > 1 else self.b.extract_element(mask, ir.Constant(I32, 0))
        return self.b.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0))

    def sum(self, x):
        """Of all lanes, in the fixed order of a halving tree."""
        width = self.lanes
        while width > 1:
            width //= 2
            take = [ir.Constant(ir.VectorType(I32, width), [k + half for k in range(width)]) for half in (0, width)]
            undefined = ir.Constant(x.type, ir.Undefined)
            x = self.b.fadd(*(self.b.shuffle_vector(x, undefined, t) for t in take))
        return self.b.extract_element(x, ir.Constant(I32, 0))

    def as_int(self, x):
        return self.b.bitcast(x, self.VI)

    def as_float(self, x):
        return self.b.bitcast(x, self.V)

    def horner(self, coefficients, x):
        y = self.f(coefficients[-1])
        for c in reversed(coefficients[:-1]):
            y = self.fma(y, x, self.f(c))
        return y

    def exp2(self, x):
        """2**x, exactly 0 below 2**-100 (no slow denormals), inf from 2**127.5 or 2**128 on, NaN where x is NaN; relative error 2.5e-7."""
        b = self.b
        if SCALES and self.lanes == 16:
            there = b.bitcast(b.fcmp_unordered(">=", x, self.f(-100)), I16)
            part = self.call("llvm.x86.avx512.mask.reduce.ps.512", self.V, x, ir.Constant(I32, 1), self.f(0), ir.Constant(I16, -1), ir.Constant(I32, 4))  # x - floor(x)
            return self.call("llvm.x86.avx512.mask.scalef.ps.512", self.V, self.horner(EXP2, part), x, self.f(0), there, ir.Constant(I32, 4))
        low = self.f(-100)
        below = b.fcmp_ordered("<", x, low)
        x = b.select(below, low, x)
        x = b.select(b.fcmp_ordered(">", x, self.f(128)), self.f(128), x)
        magic = self.f(MAGIC + 127)  # with float32's bias: the low bits shifted up are 2**round(x)
        z = b.fadd(x, magic)
        part = b.fsub(x, b.fsub(z, magic))
        power = self.as_float(b.shl(self.as_int(z), self.n(23)))
        return b.select(below, self.f(0), b.fmul(self.horner(EXP2, part), power))  # a product, so that NaN stays NaN

    def log2(self, x):
        """For normal x > 0: an integer and a fraction around 0, whose sum is the logarithm; absolute error 1e-7."""
        b = self.b
        bits = self.as_int(x)
        whole = b.ashr(b.sub(bits, self.n(0x3f3504f3)), self.n(23))  # mantissa in [sqrt(1/2), sqrt(2))
        y = b.fsub(self.as_float(b.sub(bits, b.shl(whole, self.n(23)))), self.f(1))
        s = b.fdiv(y, b.fadd(y, self.f(2)))
        t = b.fmul(s, s)
        series = self.horner([2 / math.log(2) / k for k in (1, 3, 5, 7, 9)], t)
        return whole, b.fmul(s, series)

    def tanh(self, x):
        """Relative error 3e-7, near zero too; +-1 at +-inf, NaN where x is NaN."""
        b = self.b
        # expm1(-2|x|) = 2**w (2**p - 1) + (2**w - 1): no cancellation where w = 0, that is for small x
        y = b.fmul(self.abs(x), self.f(-2 / math.log(2)))
        y = b.select(b.fcmp_ordered("<", y, self.f(-40)), self.f(-40), y)
        magic = self.f(MAGIC + 127)
        z = b.fadd(y, magic)
        part = b.fsub(y, b.fsub(z, magic))
        power = self.as_float(b.shl(self.as_int(z), self.n(23)))
        minus = self.fma(power, b.fmul(part, self.horner(EXPM1, part)), b.fsub(power, self.f(1)))
        return self.copysign(b.fdiv(minus, b.fadd(minus, self.f(2))), x)

    # control
    def loop(self, count, init, body, step=1):
        """for k in range(0, count, step): init = body(k, init); none is run for count <= 0. Returns the last values."""
        b, count = self.b, self.i(count)
        before, start, end = b.block, b.append_basic_block("loop"), b.append_basic_block("end")
        b.cbranch(b.icmp_signed(">", count, self.i(0)), start, end)
        b.position_at_end(start)
        k = b.phi(I64)
        k.add_incoming(self.i(0), before)
        held = [b.phi(x.type) for x in init]
        for phi, x in zip(held, init):
            phi.add_incoming(x, before)
        new = body(k, held)
        after = b.add(k, self.i(step))
        last = b.block
        k.add_incoming(after, last)
        for phi, x in zip(held, new):
            phi.add_incoming(x, last)
        b.cbranch(b.icmp_signed("<", after, count), start, end)
        b.position_at_end(end)
        out = [b.phi(x.type) for x in init]
        for phi, x, y in zip(out, init, new):
            phi.add_incoming(x, before)
            phi.add_incoming(y, last)
        return out

    def gemm(self, rows, cols, pa, ra, ka, pb, ldb, K, init=None, unroll=4, pairs=False):
        """acc[r * cols + n] = init + sum_k A(r, k) B[k, n]: `rows` broadcasts times `cols` vectors, in registers.

        A(r, k) is the float32 at pa + r*ra + k*ka, B[k, n] the vector at pb + k*ldb + n*4*lanes (bytes; ra, ka, ldb ints or values).
        pairs: elements of A and lanes of B are two bfloat16 each, K counts pairs. Any K: what is left over the unrolled steps is done one by one. At most 12 accumulators with 16 registers, 24 with 32.
        """
        width = 4 * self.lanes
        add, element, kind = (self.add_pairs, I32, self.VI) if pairs else (self.fma, F, self.V)

        def steps(count):
            def body(k, acc):
                for u in range(count):
                    a, c = self.add(pa, self.mul(self.add(k, u), ka)), self.add(pb, self.mul(self.add(k, u), ldb))
                    right = [self.load(c, n * width, kind) for n in range(cols)]
                    new = []
                    for r in range(rows):
                        left = self.splat(self.load(a, self.mul(ra, r) if not isinstance(ra, int) else r * ra, element))
                        new += [add(left, right[n], acc[r * cols + n]) for n in range(cols)]
                    acc = new
                return acc
            return body
        acc = init or [self.f(0)] * (rows * cols)
        if isinstance(K, int) and K % unroll == 0:
            return self.loop(K, acc, steps(unroll), unroll)
        K = self.i(K)
        main = self.b.and_(K, self.i(-unroll))
        acc = self.loop(main, acc, steps(unroll), unroll)
        pa, pb = self.add(pa, self.mul(main, ka)), self.add(pb, self.mul(main, ldb))
        return self.loop(self.b.sub(K, main), acc, steps(1))

    def transpose(self, rows):
        """`lanes` vectors -> their transpose."""
        b, count = self.b, self.lanes
        step = 1
        while step < count:
            new = list(rows)
            for r in range(count):
                if r & step:
                    continue
                x, y = rows[r], rows[r | step]
                low = [k if not k & step else (k ^ step) + count for k in range(count)]
                high = [k | step if not k & step else k + count for k in range(count)]
                new[r] = b.shuffle_vector(x, y, ir.Constant(self.VI, low))
                new[r | step] = b.shuffle_vector(x, y, ir.Constant(self.VI, high))
            rows, step = new, step * 2
        return rows


_TYPES = {"i": types.int64, "f": types.float32, "d": types.float64, None: types.void}


def op(takes: str, emit, returns: str | None = None):
    """A function for compiled code: `emit(e, *args)` writes its body at each call. takes, returns: letters i (int64), f (float32), d (float64)."""
    def make(context):
        signature = _TYPES[returns](*[_TYPES[letter] for letter in takes])

        def generate(context_, builder, signature_, args):
            result = emit(Vectors(builder), *args)
            return context_.get_dummy_value() if returns is None else result
        return signature, generate
    names = ", ".join(f"a{n}" for n in range(len(takes)))  # an intrinsic must name its arguments
    name = emit.__name__.strip("<>") + "_"
    scope = {"make": make}
    exec(f"def {name}(context, {names}):\n    return make(context)", scope)
    return intrinsic(scope[name])


def _next_task(e, counter):
    return e.b.atomic_rmw("add", e.at(counter, 0, I64), e.i(1), "monotonic")


next_task = op("i", _next_task, "i")
"""Take the next number from the int64 at an address: threads share tasks by it. Which thread does a task must not change its result."""


def _get(kind):
    def get(e, address, index):
        x = e.load(address, e.mul(index, kind.width // 8), kind)
        return x if kind is I64 else e.b.sext(x, I64)
    return get


get_i32 = op("ii", _get(I32), "i")
"""int32 at base + 4 * index. Addresses spare a compilation for each of Numba's array types (read-only, strided, ...)."""
get_i64 = op("ii", _get(I64), "i")
get_f32 = op("ii", lambda e, address, index: e.load(address, e.mul(index, 4), F), "f")


put_i32 = op("iii", lambda e, address, index, x: e.store(e.b.trunc(x, I32), address, e.mul(index, 4)))
put_i64 = op("iii", lambda e, address, index, x: e.store(x, address, e.mul(index, 8)))
get_byte = op("ii", lambda e, address, index: e.b.zext(e.load(address, index, I8), I64), "i")
put_byte = op("iii", lambda e, address, index, x: e.store(e.b.trunc(x, I8), address, index))
lowest_bit = op("i", lambda e, x: e.b.cttz(x, ir.Constant(I1, 1)), "i")
highest_bit = op("i", lambda e, x: e.b.sub(e.i(63), e.b.ctlz(x, ir.Constant(I1, 1))), "i")


def _put_f32(e, address, index, x):
    e.store(x, address, e.mul(index, 4))


put_f32 = op("iif", _put_f32)


def address(array) -> int:
    """Of the first element of a NumPy array, from Python; 0 for None."""
    return 0 if array is None else array.__array_interface__["data"][0]


def _ask_row(e, source, count):
    """For the cache lines of `count` bytes."""
    e.loop(count, [], lambda k, _: (e.fetch(e.add(source, k)), [])[1], 64)


ask_row = op("ii", _ask_row)


def _transpose_tile(e, source, source_step, target, target_step):
    rows = [e.load(e.add(source, e.mul(source_step, r))) for r in range(e.lanes)]
    for r, x in enumerate(e.transpose(rows)):
        e.store(x, e.add(target, e.mul(target_step, r)))


transpose_tile = op("iiii", _transpose_tile)
"""(source, source row step, target, target row step): LANES x LANES float32; steps in bytes."""
