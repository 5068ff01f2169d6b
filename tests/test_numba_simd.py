"""The vector helpers of the Numba backend: conversions bit for bit, functions to a few ulp, products for every remainder."""
import ml_dtypes
import numpy as np
import pytest
from numeric import assert_close

pytest.importorskip("numba")
import numba  # noqa: E402

from sparsetile.backends.numba import convert, simd  # noqa: E402
from sparsetile.backends.numba.simd import LANES, address, op  # noqa: E402

HALVES = np.arange(65536, dtype=np.uint16)


@numba.njit
def read(code, source, count, target, padded):
    convert.read_row(code, source, count, target, padded)


@numba.njit
def write(code, source, count, target):
    convert.write_row(code, source, count, target)


def same(x, y):
    """Bit for bit, any NaN equal to any NaN."""
    x, y = np.asarray(x), np.asarray(y)
    nan = np.isnan(x.astype(np.float32)) & np.isnan(y.astype(np.float32))
    word = {1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize]
    return bool(np.all(nan | (x.view(word) == y.view(word))))


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float8_e4m3fn"])
def test_every_value_is_read_exactly(name):
    bits = HALVES if name != "float8_e4m3fn" else np.arange(256, dtype=np.uint8)
    values = bits.view(np.float16 if name == "float16" else getattr(ml_dtypes, name))
    for count in (len(bits), len(bits) - 1, 3, 0):
        out = np.full(count + 5, np.nan, np.float32)
        read(convert.CODE[name], address(bits), count, address(out), count + 5)
        assert same(out[:count], values[:count].astype(np.float32))
        assert not out[count:].any()


@numba.njit
def there_and_back(code, source, step, rows, count, padded, wide, target, target_step):
    convert.read_rows(code, source, step, rows, count, padded, wide, 4 * padded)
    convert.write_rows(code, wide, 4 * padded, rows, count, target, target_step)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rows, count, padded", [(5, 40, 48), (3, 16, 16), (2, 3, 16), (0, 7, 16)])
def test_many_rows_at_once(rng, name, rows, count, padded):
    """Steps of their own on both sides; zeros up to the padded width; nothing between the rows is written."""
    kind = np.dtype(getattr(ml_dtypes, name) if name == "bfloat16" else name)
    source, wide, target = rng.normal(size=(rows, count + 5)).astype(kind), np.full((rows, padded), np.nan, np.float32), np.full((rows, count + 3), 7, kind)
    there_and_back(convert.CODE[name], address(source), source.strides[0], rows, count, padded, address(wide), address(target), target.strides[0])
    assert np.array_equal(wide[:, :count], source[:, :count].astype(np.float32)) and not wide[:, count:].any()
    assert np.array_equal(target[:, :count], source[:, :count]) and (target[:, count:] == 7).all()


def _hard_floats():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2 ** 32, 200_000, dtype=np.uint32)
    near = HALVES.view(np.float16).astype(np.float32)
    finite = near[np.isfinite(near)]
    ties = (finite + np.nextafter(finite.astype(np.float16), np.float16(np.inf)).astype(np.float32)) / 2
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.99, 65520, 1e38, 3.4e38, 2 ** -24, 2 ** -25, 2.0 ** -149], np.float32)
    return np.concatenate([bits.view(np.float32), near, ties, np.nextafter(ties, np.float32(9e9)), special])


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_floats_are_rounded_to_nearest_even(name):
    x = _hard_floats()
    kind = np.dtype(getattr(ml_dtypes, name) if name == "bfloat16" else name)
    out = np.empty(len(x), kind)
    write(convert.CODE[name], address(x), len(x), address(out))
    with np.errstate(over="ignore", invalid="ignore"):
        assert same(out, x.astype(kind))


def _log2(e, x):
    whole, fraction = e.log2(x)
    return e.b.fadd(fraction, e.b.sitofp(whole, e.V))


def _unary(function, lanes=LANES):
    def emit(e, source, target, count):
        e = simd.Vectors(e.b, lanes)
        e.loop(count, [], lambda k, _: (e.store(function(e, e.load(e.add(source, e.mul(k, 4)))), e.add(target, e.mul(k, 4))), [])[1], lanes)
    call = op("iii", emit)

    @numba.njit
    def run(source, target, count):
        call(source, target, count)

    def apply(x):
        padded = np.zeros(-(-len(x) // LANES) * LANES, np.float32)
        padded[:len(x)] = x
        out = np.empty_like(padded)
        run(address(padded), address(out), len(padded))
        return out[:len(x)]
    return apply


def _half_round_trip(e, x):
    return convert.half_to_float(e, convert.float_to_half(e, x, False), False)


def test_half_without_instructions():
    x = _hard_floats()
    with np.errstate(over="ignore", invalid="ignore"):
        assert same(_unary(_half_round_trip)(x), x.astype(np.float16).astype(np.float32))


def test_exp2_log2_tanh():
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.uniform(-99, 127, 20000), np.linspace(-1, 1, 9999), rng.uniform(-1e-3, 1e-3, 999)]).astype(np.float32)
    exact = np.exp2(x.astype(np.float64))
    assert np.max(np.abs(_unary(lambda e, x: e.exp2(x))(x) / exact - 1)) < 2.5e-7
    low = np.array([-100.5, -1e4, -3e38, -np.inf, 0, np.nan], np.float32)
    assert np.array_equal(_unary(lambda e, x: e.exp2(x))(low), np.array([0, 0, 0, 0, 1, np.nan], np.float32), equal_nan=True)
    for lanes in (LANES, 1):  # with the instructions of wide vectors, where there are any, and without
        high = _unary(lambda e, x: e.exp2(x), lanes)(np.array([128, 200, 1e9, 3e38, np.inf], np.float32))
        assert np.all(high == np.inf), "a weight that overflows must be seen: its row is done anew"
    y = np.exp2(rng.uniform(-126, 127, 20000)).astype(np.float32)
    assert np.max(np.abs(_unary(_log2)(y) - np.log2(y.astype(np.float64)))) < 8e-6
    y = rng.uniform(0.5, 2, 20000).astype(np.float32)
    assert np.max(np.abs(_unary(_log2)(y) - np.log2(y.astype(np.float64)))) < 2e-7
    x = np.concatenate([rng.uniform(-9, 9, 20000), 10.0 ** rng.uniform(-30, 1.5, 5000), [np.inf, -np.inf, -0.0, 3e38]]).astype(np.float32)
    exact = np.tanh(x.astype(np.float64))
    with np.errstate(invalid="ignore"):
        error = np.abs(_unary(lambda e, x: e.tanh(x))(x) - exact) / np.where(exact == 0, 1, np.abs(exact))
    assert error.max() < 4e-7
    assert np.isnan(_unary(lambda e, x: e.tanh(x))(np.array([np.nan], np.float32)))[0]


@pytest.mark.parametrize("rows, cols", [(4, 2), (6, 2)])
def test_product_in_registers(rows, cols):
    def emit(e, pa, ra, pb, ldb, K, pc):
        for i, x in enumerate(e.gemm(rows, cols, pa, ra, 4, pb, ldb, K)):
            e.store(x, pc, i * 4 * LANES)
    call = op("iiiiii", emit)

    @numba.njit
    def run(pa, ra, pb, ldb, K, pc):
        call(pa, ra, pb, ldb, K, pc)
    rng = np.random.default_rng(2)
    for K in (0, 1, 3, 4, 7, 64, 65):
        a, c = rng.normal(size=(rows, K + 3)).astype(np.float32), rng.normal(size=(K + 1, cols * LANES)).astype(np.float32)
        out = np.empty((rows, cols * LANES), np.float32)
        run(address(a), a.strides[0], address(c), c.strides[0], K, address(out))
        assert_close("product", out, a[:, :K].astype(float) @ c[:K].astype(float), a[:, :K] @ c[:K], reduction=K)


def test_transpose():
    @numba.njit
    def run(x, y):
        simd.transpose_tile(x.ctypes.data, x.strides[0], y.ctypes.data, y.strides[0])
    x = np.arange(LANES * LANES, dtype=np.float32).reshape(LANES, LANES)
    y = np.zeros_like(x)
    run(x, y)
    assert np.array_equal(y, x.T)
