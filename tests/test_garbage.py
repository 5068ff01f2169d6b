"""No byte outside an array is read into a result or written, whatever indices, lengths and positions say.

Inputs lie between bands of NaN; what kernels allocate is filled with NaN (-1 for integers) and lies between bands that are looked at afterwards.
"""
import math

import numpy as np
import oracle
import pytest
from drivers import EVERY, arrays, numpy_dtype, to_torch
from judge import attention, gradients, indexer_scores, indexer_topk, normal, selection_arrays
from numeric import assert_close, assert_topk, plain

import sparsetile as st
from sparsetile.backends import arrays as places

every = pytest.mark.parametrize("backend", EVERY)
BAND, MARK, POISON = 4096, 0xA5, 0xFF
INT_MIN, INT_MAX = -2 ** 31, 2 ** 31 - 1
GARBAGE = np.array([INT_MIN, INT_MIN + 1, -123456, -2, -1, 0, 1, 59, 60, 61, 10 ** 6, 2 ** 30, INT_MAX - 1, INT_MAX], np.int64)


class Bands:
    """Every array made while it is in force lies between two bands."""

    def __init__(self):
        self.made = []

    def numpy(self, shape, dtype, band=MARK):
        size = math.prod(shape) * np.dtype(dtype).itemsize
        raw = np.full(size + 2 * BAND, band, np.uint8)
        raw[BAND:BAND + size] = POISON
        if band == MARK:
            self.made.append((raw, size))
        return raw[BAND:BAND + size].view(dtype).reshape(shape)

    def torch(self, shape, dtype, device, band=MARK):
        import torch
        size = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
        raw = torch.full((size + 2 * BAND,), band, dtype=torch.uint8, device=device)
        raw[BAND:BAND + size] = POISON
        if band == MARK:
            self.made.append((raw, size))
        return raw[BAND:BAND + size].view(dtype).reshape(shape)

    def check(self):
        assert self.made, "nothing was allocated through the place"
        for raw, size in self.made:
            assert bool((raw[:BAND] == MARK).all()) and bool((raw[BAND + size:] == MARK).all()), f"written outside an array of {size} bytes"


@pytest.fixture
def bands(on, monkeypatch):
    """Outputs and scratch by Bands.numpy and Bands.torch; inputs between NaN."""
    found = Bands()
    monkeypatch.setattr(places.NumpyPlace, "empty", lambda self, shape, dtype: found.numpy(tuple(shape), places.numpy_dtype(dtype)))

    def filled(empty):
        def full(self, shape, dtype, value):
            x = empty(self, shape, dtype)
            (x.owner if isinstance(x, places.View) else x)[...] = value
            return x
        return full
    monkeypatch.setattr(places.NumpyPlace, "full", filled(places.NumpyPlace.empty))
    monkeypatch.setattr(places.TorchPlace, "empty", lambda self, shape, dtype: found.torch(tuple(shape), places.torch_dtype(dtype), self.target))
    monkeypatch.setattr(places.TorchPlace, "full", filled(places.TorchPlace.empty))
    monkeypatch.setattr(places.ViewPlace, "empty", lambda self, shape, dtype: places.view(found.torch(tuple(shape), places.torch_dtype(dtype), self.target)))
    monkeypatch.setattr(places.ViewPlace, "full", filled(places.ViewPlace.empty))
    host = on.backend in ("reference", "numba")

    def put(x):
        if not isinstance(x, np.ndarray):
            return x
        if host:
            inside = found.numpy(x.shape, x.dtype, POISON)
            inside[...] = x
            return inside
        return tensor(x)

    def tensor(x, gradient=False):
        source = to_torch(np.ascontiguousarray(x), "cpu" if host or on.interpreted else "cuda")
        inside = found.torch(source.shape, source.dtype, source.device, POISON).copy_(source)
        return inside.requires_grad_() if gradient else inside
    on.put, on.tensor = put, tensor
    yield found
    if on.backend != "reference":  # the reference allocates with NumPy alone
        found.check()


def inputs(rng, T=7, S=60, dtype="float16", D=40, Dv=24):
    kind = numpy_dtype(dtype)
    return normal(rng, (2, 4, T, D), kind), normal(rng, (2, 2, S, D), kind), normal(rng, (2, 2, S, Dv), kind)


@every
@pytest.mark.parametrize("granularity", [1, 7, 64])
@pytest.mark.parametrize("causal", [False, True])
def test_entries(on, backend, bands, granularity, causal, rng):
    q, k, v = inputs(rng)
    indices = rng.choice(GARBAGE, (2, 2, 7, 15)).astype(np.int32)
    lengths = rng.choice(GARBAGE, (2, 2, 7)).astype(np.int32)
    where = {"kv_length": np.array([INT_MAX, 31], np.int32), "q_start": np.array([40, -3], np.int32)}
    count = oracle.selection_count(indices, 60, 4, lengths=lengths, granularity=granularity, causal=causal, **where)
    attention(on, q, k, v, on.selection(indices, lengths, granularity=granularity, causal=causal), count, sink_logits=normal(rng, 4, np.float32), **where)


@every
@pytest.mark.parametrize("granularity", [1, 64])
def test_entries_backward(on, backend, bands, granularity, rng):
    pytest.importorskip("torch")
    q, k, v = inputs(rng, T=4)
    indices = rng.choice(GARBAGE, (2, 1, 4, 12)).astype(np.int32)
    count = oracle.selection_count(indices, 60, 4, granularity=granularity)
    gradients(on, q, k, v, st.Selection(on.tensor(indices), granularity=granularity), count, rng)


@every
@pytest.mark.parametrize("length", [INT_MIN, -1, 0, 1, 59, 60, 61, INT_MAX])
def test_lengths(on, backend, bands, length, rng):
    q, k, v = inputs(rng, T=5)
    kv_length = np.array([length, 17], np.int32)
    count = oracle.visible(2, 5, 60, kv_length=kv_length, rule=lambda p, s: (s <= p) & (s >= p - 20))
    attention(on, q, k, v, st.Window(20), count, kv_length=kv_length)


@every
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["causal", "strided"])
def test_patterns_and_their_gradients(on, backend, bands, name, dtype, rng):
    pytest.importorskip("torch")
    q, k, v = inputs(rng, T=45, S=51, dtype=dtype)
    pattern, rule = {"causal": (st.Causal(), lambda p, s: s <= p), "strided": (st.Causal() & st.Strided(6), lambda p, s: (s <= p) & ((p - s) % 6 == 0))}[name]
    count = oracle.visible(2, 45, 51, rule=rule)
    attention(on, q, k, v, pattern, count)
    gradients(on, q, k, v, pattern, count, rng, with_lse=True)


@every
@pytest.mark.parametrize("width", [1, 7, 63, 130])
def test_topk(on, backend, bands, width, rng):
    x = rng.standard_normal((2, 3, width)).astype(np.float32)
    start, end = (rng.choice(GARBAGE, (2, 3)).astype(np.int32) for _ in range(2))
    seen = (np.arange(width) >= start[..., None]) & (np.arange(width) < end[..., None])
    assert_topk("topk", *selection_arrays(on.topk(x, 9, key_start=start, key_end=end)), x, 9, visible=seen)
    assert_topk("topk", *selection_arrays(on.topk(x, 40)), x, 40)


@every
@pytest.mark.parametrize("pool", [1, 7])
@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn"])
def test_indexer(on, backend, bands, pool, dtype, rng):
    kind = numpy_dtype(dtype)
    q, k, w = normal(rng, (2, 3, 5, 40), kind), normal(rng, (2, 61, 40), kind), normal(rng, (2, 3, 5), np.float32)
    window = {"key_start": rng.choice(GARBAGE, (2, 5)).astype(np.int32), "key_end": rng.choice(GARBAGE, (2, 5)).astype(np.int32), "q_start": np.array([50, -2], np.int32)}
    scale = (rng.random((2, 61)) + 0.2).astype(np.float32)
    for options in ({}, window):
        indexer_topk(on, q, k, w, 6, pool=pool, k_scale=scale, **options)
        if pool == 1:
            indexer_scores(on, q, k, w, k_scale=scale, **options)


@every
def test_latent_and_merge(on, backend, bands, rng):
    kind = np.dtype(np.float16)
    latent, w_uk, w_uv, rope = normal(rng, (2, 37, 72), kind), normal(rng, (3, 72, 20), kind, 0.1), normal(rng, (3, 72, 12), kind, 0.1), normal(rng, (2, 37, 6), kind)
    got = arrays(*on.latent_decompress(latent, w_uk, w_uv, k_rope=rope))
    for name, g, truth, measure in zip("kv", got, oracle.latent_decompress(latent, w_uk, w_uv, k_rope=rope), plain.latent_decompress(latent, w_uk, w_uv, k_rope=rope)):
        assert_close(name, g, truth, measure, reduction=72)
    outs, lses = [normal(rng, (2, 3, 17, 20), kind) for _ in range(3)], [normal(rng, (2, 3, 17), np.float32) for _ in range(3)]
    got = arrays(*on.merge_attention([on.put(x) for x in outs], [on.put(x) for x in lses]))
    for name, g, truth, measure in zip(("out", "lse"), got, oracle.merge_attention(outs, lses), plain.merge_attention(outs, lses)):
        assert_close(name, g, truth, measure, reduction=3)
