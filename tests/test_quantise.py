"""float8 in groups and the Hadamard rotation: byte for byte against exact arithmetic, the caches' own writing and the float64 matrix, on NumPy, PyTorch and JAX."""
from importlib.util import find_spec

import ml_dtypes
import numpy as np
import pytest
import torch
from cache_format import quantised
from drivers import numpy_dtype, to_torch

import sparsetile as st
from sparsetile.autotune import numeric

KINDS = ("numpy", "torch", *(("jax", "jit") if find_spec("jax") else ()))
FLOATS = ("float32", "float16", "bfloat16")


def call(kind, function, *arrays):
    """The function on arrays of one framework; NumPy arrays come back."""
    if kind == "torch":
        got = function(*map(to_torch, arrays))
    elif kind == "numpy":
        got = function(*arrays)
    else:
        import jax
        got = (jax.jit(function) if kind == "jit" else function)(*map(jax.numpy.asarray, arrays))
    got = got if isinstance(got, tuple) else (got,)
    return tuple(numeric.to_numpy(x) if kind == "torch" else np.asarray(x) for x in got)


def rows(rng, D, dtype):
    """Rows of every size, with zeros, ties, the largest values and what is not finite."""
    x = rng.standard_normal((60, D)) * np.exp(rng.standard_normal((60, 1)) * (3 if dtype == "float16" else 20))
    x[1], x[2], x[3, 0], x[4, -1], x[5, D // 2] = 0, 448, np.nan, np.inf, -np.inf
    x[6, 1:], x[7] = 0, rng.integers(-8, 9, D)
    x[8] = 1e-42
    with np.errstate(over="ignore"):
        return x.astype(np.float32).astype(numpy_dtype(dtype))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("D, group", [(256, 128), (512, 128), (128, 128), (200, 128), (64, 64), (96, 128), (40, 16), (7, 3)])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_and_scales_are_those_of_exact_arithmetic(rng, kind, dtype, D, group, power_of_two):
    x = rows(rng, D, dtype)
    values, scales = call(kind, lambda x: st.quantise_float8(x, group=group, power_of_two=power_of_two), x)
    assert values.dtype == ml_dtypes.float8_e4m3fn and values.shape == x.shape and scales.dtype == np.float32 and scales.shape == (60, -(-D // group))
    with np.errstate(under="ignore"):
        want = [[quantised(part.astype(np.float32), power_of_two) for part in np.split(row, range(group, D, group))] for row in x]
    for n, parts in enumerate(want):
        if n == 8 and kind in ("jax", "jit"):
            continue  # XLA takes subnormal numbers for 0
        assert values[n].tobytes() == b"".join(code for code, _ in parts), n
        numeric.assert_same_bits(f"scales of row {n}", np.nan_to_num(scales[n], nan=-1), np.nan_to_num(np.frombuffer(b"".join(scale for _, scale in parts), "<f4"), nan=-1))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_caches_hold_the_same_bytes(rng, kind, power_of_two):
    put = (lambda x: x) if kind == "numpy" else torch.from_numpy
    latent, rope, keys = (put(rng.standard_normal(shape).astype(np.float32) * 30) for shape in ((2, 9, 256), (2, 9, 16), (2, 9, 64)))
    cache = st.PagedLatent.empty(latent, sequences=2, pages=4, rank=256, rotary=16, page_size=8, dtype="float8", power_of_two=power_of_two)
    cache.append(latent, rope)
    index = st.IndexerKeys.empty(latent, sequences=2, pages=4, width=64, page_size=8, power_of_two=power_of_two)
    index.append(keys)
    values, _, scale = cache.gather(quantised=True)
    for stored, made in (((values, scale), st.quantise_float8(latent, power_of_two=power_of_two)), (index.gather(), st.quantise_float8(keys, group=64, power_of_two=power_of_two))):
        for a, b in zip(stored, made):
            a, b = numeric.to_numpy(a), numeric.to_numpy(b)
            numeric.assert_same_bits("stored", a, b.reshape(a.shape))
    for dtype in FLOATS:
        numeric.assert_same_bits(dtype, cache.gather(dtype)[0], st.dequantise_float8(*st.quantise_float8(latent, power_of_two=power_of_two), dtype=dtype))


@pytest.mark.parametrize("D, group", [(256, 128), (200, 128), (64, 64), (48, 16)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_other_way_is_each_value_times_its_scale(rng, kind, D, group):
    x = rng.standard_normal((3, 5, D)).astype(np.float32)
    values, scales = st.quantise_float8(x, group=group)
    wide = values.astype(np.float32) * np.repeat(scales, group, -1)[..., :D]
    assert np.abs(wide - x).max() <= np.abs(x).max() / 448 * 16                         # half a step between the two largest values
    for dtype in FLOATS:
        got, = call(kind, lambda v, s: st.dequantise_float8(v, s, group=group, dtype=dtype), values, scales)
        numeric.assert_same_bits(dtype, got, wide.astype(numpy_dtype(dtype)))


def test_what_the_ops_take(rng):
    """Latents with their scales, and indexer keys with one scale each whose queries' scales are folded into the weights."""
    latent, w_uk, w_uv = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 9, 200), (2, 200, 8), (2, 200, 4)))
    values, scales = st.quantise_float8(latent)
    for a, b in zip(st.latent_decompress(values, w_uk, w_uv, latent_scale=scales, backend="numba"), st.latent_decompress(st.dequantise_float8(values, scales), w_uk, w_uv, backend="numba")):
        numeric.assert_same_bits("latent", a, b)
    q, k, weights = (rng.standard_normal(shape).astype(np.float32) for shape in ((1, 4, 6, 64), (1, 20, 64), (1, 4, 6)))
    (q8, qs), (k8, ks) = (st.quantise_float8(st.hadamard(x), group=64, power_of_two=True) for x in (q, k))
    got = st.indexer_scores(q8, k8, weights * qs[..., 0], k_scale=ks[..., 0], causal=False, backend="numba")
    q, k = (st.dequantise_float8(x, s, group=64).astype(np.float64) for x, s in ((q8, qs), (k8, ks)))
    truth = (np.maximum(np.einsum("bhtd,bsd->bhts", q, k), 0) * weights[..., None].astype(np.float64)).sum(1)
    numeric.assert_close("scores", got, truth, truth.astype(np.float32), reduction=64 * 4)


def sylvester(D):
    """float64, by Kronecker products."""
    found = np.ones((1, 1))
    while len(found) < D:
        found = np.kron(np.array([[1, 1], [1, -1]]), found)
    return found / np.sqrt(D)


@pytest.mark.parametrize("D", [1, 2, 8, 64, 128, 256, 1024])
@pytest.mark.parametrize("dtype", [*FLOATS, "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_rotation_is_the_matrix(rng, kind, dtype, D):
    if dtype == "float64" and kind in ("jax", "jit"):
        pytest.skip("JAX holds no float64 unless it is told to")
    x = rng.standard_normal((2, 3, D)).astype(numpy_dtype(dtype))
    truth = x.astype(np.longdouble if dtype == "float64" else np.float64) @ sylvester(D)
    wide = np.float64 if dtype == "float64" else np.float32
    got, = call(kind, st.hadamard, x)
    numeric.assert_close("rotated", got, truth, (x.astype(wide) @ sylvester(D).astype(wide)).astype(x.dtype), reduction=D, accumulator="float64" if dtype == "float64" else "float32")
    assert np.allclose(sylvester(D) @ sylvester(D), np.eye(D)) and (sylvester(D) == sylvester(D).T).all()


def test_the_rotation_is_its_own_inverse_and_transpose(rng):
    x, w = (torch.from_numpy(rng.standard_normal((2, 3, 128))).requires_grad_() for _ in range(2))
    numeric.assert_close("twice", st.hadamard(st.hadamard(x)).detach(), x.detach().numpy().astype(np.longdouble), x.detach(), reduction=256, accumulator="float64")
    grad, = torch.autograd.grad((st.hadamard(x) * w).sum(), x)
    rotated = st.hadamard(w).detach()
    numeric.assert_close("gradient", grad, rotated.numpy().astype(np.longdouble), rotated, reduction=128, accumulator="float64")
    assert torch.autograd.gradcheck(st.hadamard, x[:1, :1, :8].detach().requires_grad_())


def test_an_outlier_is_spread(rng):
    """What the rotation is for: one large column would set the scale of all its group."""
    x = rng.standard_normal((50, 128)).astype(np.float32)
    x[:, 7] *= 1e5
    assert np.abs(st.hadamard(x)).max() < np.abs(x).max() / 8


def test_compiles_whole(rng):
    x = torch.from_numpy(rng.standard_normal((3, 256)).astype(np.float32))
    both = lambda x: (*st.quantise_float8(st.hadamard(x)), st.dequantise_float8(*st.quantise_float8(x)))  # noqa: E731
    torch.compiler.reset()
    for a, b in zip(torch.compile(both, fullgraph=True, backend="aot_eager")(x), both(x)):
        numeric.assert_same_bits("compiled", a, b)


def test_gradients_stop_at_the_values_and_reach_the_scales():
    x = torch.randn(3, 128, requires_grad=True)
    values, scales = st.quantise_float8(x)
    assert not values.requires_grad and not scales.requires_grad
    st.dequantise_float8(values, scales.requires_grad_()).sum().backward()
    numeric.assert_close("scales", scales.grad, values.double().sum(-1, keepdim=True).numpy(), values.float().sum(-1, keepdim=True), reduction=128)


def test_nothing_in_nothing_out():
    for shape in ((0, 128), (3, 0), (2, 0, 64)):
        values, scales = st.quantise_float8(np.zeros(shape, np.float32))
        assert values.shape == shape and scales.shape == (*shape[:-1], -(-shape[-1] // 128)) and st.dequantise_float8(values, scales).shape == shape
    assert st.hadamard(np.zeros((0, 4), np.float32)).shape == (0, 4)


def test_bad_arguments_are_refused_in_words():
    x, values = np.zeros((2, 128), np.float32), np.zeros((2, 128), ml_dtypes.float8_e4m3fn)
    for error, words, bad in (
            (TypeError, "^x: expected element type float32 or float16 or bfloat16, got float64", lambda: st.quantise_float8(x.astype(np.float64))),
            (ValueError, "^group: expected ", lambda: st.quantise_float8(x, group=0)), (ValueError, r"^x: expected at least one axis \[...,D\]", lambda: st.hadamard(np.zeros((), np.float32))),
            (TypeError, "^power_of_two: ", lambda: st.quantise_float8(x, power_of_two=2)), (TypeError, "^values: expected element type float8_e4m3fn", lambda: st.dequantise_float8(x, x[:, :1])),
            (ValueError, "^scales: expected shape .* name the group", lambda: st.dequantise_float8(values, x[:1, :1])), (ValueError, "^scales: expected shape .* name the group", lambda: st.dequantise_float8(values, x[:, :2])),
            (ValueError, "^dtype: ", lambda: st.dequantise_float8(values, x[:, :1], dtype="int8")), (ValueError, "^x: expected a last axis of a power of two, got 96; pad it", lambda: st.hadamard(x[:, :96])),
            (ValueError, "^x: expected a last axis of a power of two, got 0", lambda: st.hadamard(x[:, :0]))):
        with pytest.raises(error, match=words):
            bad()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", FLOATS)
def test_on_a_gpu_and_in_a_cuda_graph(rng, dtype):
    """The same bytes as on the CPU, captured too; CuPy's arrays are rotated, and refused where they cannot hold float8."""
    x = rows(rng, 256, dtype)
    on_cpu, q = to_torch(x), to_torch(x, "cuda")
    calls = {"arbitrary": lambda x: st.quantise_float8(x), "powers": lambda x: st.quantise_float8(x, power_of_two=True), "ragged": lambda x: st.quantise_float8(x, group=100), "half": lambda x: (st.hadamard(x[..., :128]),),
             "back": lambda x: (st.dequantise_float8(*st.quantise_float8(x), dtype="bfloat16"),), "rotated": lambda x: (st.hadamard(x),)}
    for name, function in calls.items():
        want, got = function(on_cpu), function(q)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            held = function(q)
        graph.replay()
        torch.cuda.synchronize()
        for a, b, c in zip(want, got, held):
            plain = [np.nan_to_num(numeric.to_numpy(y.cpu()).astype(np.float32), nan=-1) for y in (a, b, c)]
            numeric.assert_same_bits(name, plain[0], plain[1])
            numeric.assert_same_bits(f"{name}, captured", plain[0], plain[2])
    cupy = pytest.importorskip("cupy")
    if dtype != "bfloat16":
        y = rng.standard_normal((3, 5, 256)).astype(dtype)
        formula = (y.astype(np.float32) @ sylvester(256).astype(np.float32)).astype(y.dtype)
        numeric.assert_close("cupy", cupy.asnumpy(st.hadamard(cupy.asarray(y))), y.astype(np.float64) @ sylvester(256), formula, reduction=256)
        with pytest.raises(st.Unsupported, match="CuPy has no arrays of float8_e4m3fn"):
            st.quantise_float8(cupy.asarray(x))
