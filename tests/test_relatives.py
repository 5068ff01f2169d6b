"""The linear relatives against their papers' definitions: quadratic sums in float64, Performer's estimator against its variance, gradients, prefixes, edges."""
import math

import ml_dtypes
import numpy as np
import pytest
from drivers import arrays
from judge import normal
from numeric import EPS, assert_close

import sparsetile as st
from sparsetile.relatives import linear, performer

KINDS = {"float32": np.float32, "float64": np.float64, "bfloat16": ml_dtypes.bfloat16}
FRAMEWORKS = ("numpy", "torch", "jax", *(pytest.param(name, marks=pytest.mark.gpu, id=name) for name in ("torch on a gpu", "cupy")))
# B, Hq, Hk, T, S, chunk: ragged ends, grouped heads, more keys than queries and the other way round, one query, chunks longer than all
SHAPES = {"ragged": (2, 4, 2, 37, 37, 8), "whole": (1, 2, 2, 32, 32, 16), "prefix": (1, 3, 1, 9, 50, 4), "blind": (1, 2, 1, 30, 11, 8), "decode": (2, 6, 3, 1, 40, 16), "one chunk": (1, 1, 1, 20, 20, 128)}


def needed(framework):
    """Skips where the framework is not installed, or its device is not there. Returns the element types that are tried: those of the framework's own tests."""
    pytest.importorskip(framework.partition(" ")[0], reason=f"{framework} is not installed")
    if framework in ("torch on a gpu", "cupy"):
        import torch
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
    return ("float32",) if framework == "jax" else ("float32", "float64") if framework == "cupy" else KINDS


def put(x, framework):
    if framework == "numpy":
        return x
    if framework.startswith("torch"):
        from drivers import to_torch
        return to_torch(x, "cuda" if framework.endswith("gpu") else "cpu")
    if framework == "cupy":
        import cupy
        return cupy.asarray(x)
    import jax.numpy as jnp
    return jnp.asarray(x)


def inputs(rng, shape, dtype, D=8, Dv=5):
    B, Hq, Hk, T, S, _ = SHAPES[shape]
    return normal(rng, (B, Hq, T, D), dtype), normal(rng, (B, Hk, S, D), dtype), normal(rng, (B, Hk, S, Dv), dtype)


def quotient(weights, v, causal, dtype):
    """sum_s w v / sum_s w over the keys seen, in the weights' own type; weights [B,Hq,T,S]."""
    T, S = weights.shape[2:]
    w = np.where(np.tril(np.ones((T, S), bool), S - T), weights, 0) if causal else weights
    v = np.repeat(v.astype(w.dtype), w.shape[1] // v.shape[1], axis=1)
    total = w.sum(-1, keepdims=True)
    return (w @ v / np.where(total == 0, 1, total)).astype(dtype)


def products(fq, fk):
    return fq @ np.repeat(fk, fq.shape[1] // fk.shape[1], axis=1).swapaxes(-1, -2)


def linear_by_definition(q, k, v, causal, work, dtype):
    phi = lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))  # noqa: E731
    return quotient(products(phi(q.astype(work)), phi(k.astype(work))), v, causal, dtype)


def performer_by_definition(q, k, v, w, causal, work, dtype):
    def phi(x):
        x = x.astype(work) * work(x.shape[-1] ** -0.25)
        return np.exp(x @ w.astype(work).T - (x * x).sum(-1, keepdims=True) / 2) / work(len(w) ** 0.5)
    return quotient(products(phi(q), phi(k)), v, causal, dtype)


def linformer_by_definition(q, k, v, e, f, work, dtype):
    keys, values = (np.repeat(m.astype(work) @ x.astype(work), q.shape[1] // k.shape[1], axis=1) for m, x in ((e, k), (f, v)))
    x = q.astype(work) @ keys.swapaxes(-1, -2) * work(q.shape[-1] ** -0.5)
    p = np.exp(x - x.max(-1, keepdims=True))
    return (p / p.sum(-1, keepdims=True) @ values).astype(dtype)


def work_types(kind):
    """(the truth's type, the plain formula's)."""
    return (np.longdouble, np.float64) if kind == "float64" else (np.float64, np.float32)


# --------------------------------------------------------------------------------------------------------------- definitions
@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("causal", [False, True], ids=["all keys", "causal"])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_attention(shape, causal, framework, rng):
    for kind in needed(framework):
        q, k, v = inputs(rng, shape, KINDS[kind])
        got, = arrays(st.linear_attention(*(put(x, framework) for x in (q, k, v)), causal=causal, chunk=SHAPES[shape][-1]))
        true, plain = work_types(kind)
        assert_close(kind, got, linear_by_definition(q, k, v, causal, true, true), linear_by_definition(q, k, v, causal, plain, q.dtype), reduction=k.shape[2] + 8)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("causal", [False, True], ids=["all keys", "causal"])
@pytest.mark.parametrize("shape", SHAPES)
def test_performer_attention(shape, causal, framework, rng):
    """The chunked sums equal the quadratic ones over the same features, whatever the features approximate."""
    for kind in needed(framework):
        q, k, v = inputs(rng, shape, KINDS[kind])
        w = performer.orthogonal_features(20, 8, 3)
        w = w if kind == "float64" else w.astype(np.float32)
        got, = arrays(st.performer_attention(*(put(x, framework) for x in (q, k, v)), features=20, seed=3, causal=causal, chunk=SHAPES[shape][-1]))
        true, plain = work_types(kind)
        assert_close(kind, got, performer_by_definition(q, k, v, w, causal, true, true), performer_by_definition(q, k, v, w, causal, plain, q.dtype), reduction=k.shape[2] + 28)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_linformer_attention(shape, framework, rng):
    for kind in needed(framework):
        q, k, v = inputs(rng, shape, KINDS[kind])
        Hk, S = k.shape[1:3]
        e, f = normal(rng, (Hk, 6, S), KINDS[kind], S ** -0.5), normal(rng, (6, S), KINDS[kind], S ** -0.5)
        got, = arrays(st.linformer_attention(*(put(x, framework) for x in (q, k, v, e, f))))
        true, plain = work_types(kind)
        assert_close(kind, got, linformer_by_definition(q, k, v, e, f, true, true), linformer_by_definition(q, k, v, e, f, plain, q.dtype), reduction=S + 14)


def test_linformer_of_the_identity_is_attention(rng):
    """R = S and E = F = I leave nothing out; a smaller R does."""
    q, k, v = (normal(rng, (1, 2, 12, 8), np.float64) for _ in range(3))
    dense = st.sparse_attention(q, k, v, backend="reference")
    eye = np.eye(12)
    assert_close("identity", st.linformer_attention(q, k, v, eye), dense.astype(np.longdouble), dense, reduction=24)
    assert np.abs(st.linformer_attention(q, k, v, eye[:6]) - dense).max() > 0.1


# ------------------------------------------------------------------------------------------------------------ Performer's claims
def weights_estimated(x, y, features, draws, iid=False):
    """`draws` estimates of exp(x . y), each from features of its own."""
    found = []
    for seed in range(draws):
        w = np.random.default_rng(seed).standard_normal((features, len(x))) if iid else performer.orthogonal_features(features, len(x), seed)
        found.append(math.fsum(np.exp(performer.log_features(x, w) + performer.log_features(y, w))))
    return np.array(found)


@pytest.mark.parametrize("apart", [0.5, 1.0], ids=["near", "far"])
def test_the_estimate_has_no_bias_and_the_variance_of_the_paper(apart, rng):
    """Lemma 2: Var = (exp(|x + y|^2) - 1) exp(2 x . y) / M for independent features; theorem 2: orthogonal ones (M <= D) have less. The mean of n draws stays within five of its standard deviations."""
    D, M, draws = 8, 8, 3000
    x, y = (apart * z / np.linalg.norm(z) for z in rng.standard_normal((2, D)))
    truth, variance = np.exp(x @ y), (np.exp(np.sum((x + y) ** 2)) - 1) * np.exp(2 * x @ y) / M
    orthogonal, independent = weights_estimated(x, y, M, draws), weights_estimated(x, y, M, draws, iid=True)
    for found in (orthogonal, independent):
        assert abs(found.mean() - truth) < 5 * (variance / draws) ** 0.5
    assert ((orthogonal - truth) ** 2).mean() < ((independent - truth) ** 2).mean()
    assert ((orthogonal - truth) ** 2).mean() < variance


def test_orthogonal_features_are_orthogonal_and_as_long_as_gaussian_ones():
    w = performer.orthogonal_features(20, 8, 0)
    for a in range(0, 20, 8):
        gram = w[a:a + 8] @ w[a:a + 8].T
        assert np.abs(gram - np.diag(np.diag(gram))).max() < EPS["float64"] * 8 * gram.max()
    lengths = (performer.orthogonal_features(8000, 8, 1) ** 2).sum(1)  # chi-square of D: mean D, variance 2 D
    assert abs(lengths.mean() - 8) < 5 * (16 / 8000) ** 0.5
    assert abs(lengths.var() - 16) < 5 * ((1152 - 16 ** 2) / 8000) ** 0.5  # its fourth moment is 12 D (D + 4)
    assert not np.array_equal(w, performer.orthogonal_features(20, 8, 1)) and np.array_equal(w, performer.orthogonal_features(20, 8, 0))


@pytest.mark.parametrize("axis", [0, 7])
def test_no_direction_is_preferred(axis):
    """A basis whose diagonal has one sign, as a bare QR decomposition gives it, estimates too little along an axis."""
    M, draws, x = 8, 3000, np.eye(8)[axis] / 2 ** 0.5
    found = weights_estimated(x, x, M, draws)
    variance = (np.exp(np.sum((2 * x) ** 2)) - 1) * np.exp(2 * x @ x) / M
    assert abs(found.mean() - np.exp(x @ x)) < 5 * (variance / draws) ** 0.5


def test_performer_comes_near_to_attention_as_features_grow(rng):
    """Mean square error of the output over many features, against exact attention, falls as 1 / M: 64 x the features, at most a quarter of the error."""
    q, k, v = (normal(rng, (1, 4, 24, 16), np.float64, 0.5) for _ in range(3))
    exact = st.sparse_attention(q, k, v, st.Causal(), backend="reference")
    errors = [np.mean([np.square(st.performer_attention(q, k, v, features=m, seed=s, causal=True) - exact).mean() for s in range(4)]) for m in (16, 1024)]
    assert errors[1] < errors[0] / 16


@pytest.mark.parametrize("size", [6.0, 12.0])
def test_performer_does_not_overflow_and_no_later_key_touches_an_earlier_query(size, rng):
    """Keys whose features lie far apart in size: float32 equals float64's prefix, and a key of 50 x the length at the end changes nothing before it."""
    q, k, v = (normal(rng, (1, 1, 40, 64), np.float32) for _ in range(3))
    k[:, :, 20:] *= size
    options = dict(causal=True, features=32, chunk=16)
    first = st.performer_attention(q, k, v, **options)
    assert np.isfinite(first).all() and (first != 0).any(-1).all()
    k[:, :, -1] *= 50
    assert np.array_equal(st.performer_attention(q, k, v, **options)[:, :, :-1], first[:, :, :-1])


# ---------------------------------------------------------------------------------------------------------------- properties
CALLS = {"linear": lambda q, k, v, **more: st.linear_attention(q, k, v, **more), "performer": lambda q, k, v, **more: st.performer_attention(q, k, v, features=12, **more)}


@pytest.mark.parametrize("name", CALLS)
def test_causal_means_the_prefix(name, rng):
    """Row t of a causal call is the last row of a call, over all keys, on the first t + 1; and changing later keys changes no bit of it."""
    q, k, v = (normal(rng, (1, 2, 21, 8), np.float64) for _ in range(3))
    whole = CALLS[name](q, k, v, causal=True, chunk=8)
    for t in (0, 7, 8, 20):
        alone = CALLS[name](q[:, :, t:t + 1], k[:, :, :t + 1], v[:, :, :t + 1])
        assert_close("prefix", whole[:, :, t:t + 1], alone.astype(np.longdouble), alone, reduction=t + 9)
    k[:, :, 11:], v[:, :, 11:] = 3, 7
    assert np.array_equal(CALLS[name](q, k, v, causal=True, chunk=8)[:, :, :11], whole[:, :, :11]) and not np.array_equal(CALLS[name](q, k, v, causal=True, chunk=8)[:, :, 11:], whole[:, :, 11:])


@pytest.mark.parametrize("causal", [False, True], ids=["all keys", "causal"])
@pytest.mark.parametrize("name", [*CALLS, "linformer"])
def test_gradients(name, causal, rng):
    torch = pytest.importorskip("torch")
    if name == "linformer" and causal:
        assert "causal" not in st.linformer_attention.__code__.co_varnames  # it has no causal form: nothing to differentiate
        return
    q, k, v = (torch.from_numpy(normal(rng, shape, np.float64)).requires_grad_() for shape in ((1, 4, 7, 3), (1, 2, 9, 3), (1, 2, 9, 2)))
    if name == "linformer":
        e = torch.from_numpy(normal(rng, (4, 9), np.float64)).requires_grad_()
        assert torch.autograd.gradcheck(st.linformer_attention, (q, k, v, e))
    else:
        assert torch.autograd.gradcheck(lambda q, k, v: CALLS[name](q, k, v, causal=causal, chunk=4), (q, k, v))


def test_gradients_of_queries_without_keys_are_zero():
    torch = pytest.importorskip("torch")
    q, k, v = torch.ones(1, 1, 5, 2, requires_grad=True), torch.ones(1, 1, 3, 2, requires_grad=True), torch.ones(1, 1, 3, 2, requires_grad=True)
    for call in CALLS.values():
        out = call(q, k, v, causal=True)
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        assert (out[:, :, :2] == 0).all() and (grads[0][:, :, :2] == 0).all() and all(torch.isfinite(g).all() for g in grads)


def test_jax_compiles_and_differentiates(rng):
    jax = pytest.importorskip("jax")
    q, k, v = (jax.numpy.asarray(normal(rng, (1, 2, 11, 4), np.float32)) for _ in range(3))
    for call in CALLS.values():
        loss = jax.jit(lambda q, k, v, call=call: call(q, k, v, causal=True, chunk=4).sum())
        assert np.isfinite(jax.grad(loss, 1)(q, k, v)).all()


@pytest.mark.parametrize("T, S, B", [(0, 5, 1), (5, 0, 1), (0, 0, 1), (3, 4, 0)])
@pytest.mark.parametrize("name", [*CALLS, "linformer"])
def test_nothing_in_nothing_out(name, T, S, B):
    q, k, v = np.ones((B, 2, T, 4), np.float32), np.ones((B, 1, S, 4), np.float32), np.ones((B, 1, S, 3), np.float32)
    calls = [lambda: st.linformer_attention(q, k, v, np.ones((r, S), np.float32)) for r in (0, 2)] if name == "linformer" else [lambda c=c: CALLS[name](q, k, v, causal=c) for c in (False, True)]
    for call in calls:
        out = call()
        assert out.shape == (B, 2, T, 3) and out.dtype == np.float32 and (S > 0 or (out == 0).all())


def test_memory_grows_with_the_length_alone():
    """Four times the tokens take about four times the memory, not sixteen; T x S float32 would be 256 MiB."""
    import tracemalloc
    peaks = []
    for T in (2048, 8192):
        q = k = v = np.ones((1, 1, T, 16), np.float32)
        for call in CALLS.values():
            tracemalloc.start()
            call(q, k, v, causal=True)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[2] < 6 * peaks[0] and peaks[3] < 6 * peaks[1] and max(peaks) < 16 << 20


GOOD = np.ones((1, 2, 4, 8), np.float32)


@pytest.mark.parametrize("call, argument", [
    (lambda: st.linear_attention(GOOD, GOOD[:, :, :, :4], GOOD), "k"), (lambda: st.linear_attention(GOOD, GOOD, GOOD.astype(np.float64)), "v"),
    (lambda: st.linear_attention(GOOD[:, :1], GOOD, GOOD), "k"), (lambda: st.linear_attention(GOOD, GOOD, GOOD[0]), "v"), (lambda: st.linear_attention(GOOD, GOOD, GOOD, causal=1), "causal"),
    (lambda: st.linear_attention(GOOD, GOOD, GOOD, chunk=0), "chunk"), (lambda: st.performer_attention(GOOD, GOOD, GOOD, features=0), "features"),
    (lambda: st.performer_attention(GOOD, GOOD, GOOD, scale=-1), "scale"), (lambda: st.performer_attention(GOOD, GOOD, GOOD, projection=GOOD[0, 0, :, :4]), "projection"),
    (lambda: st.linformer_attention(GOOD, GOOD, GOOD, GOOD[0, 0]), "project_k"), (lambda: st.linformer_attention(GOOD, GOOD, GOOD, np.ones((2, 4), np.float32), np.ones((3, 4), np.float32)), "project_v"),
    (lambda: st.linear_attention([1.0], GOOD, GOOD), "q"), (lambda: st.linear_attention(GOOD, GOOD, GOOD, feature_map="elu"), "feature_map"),
    (lambda: st.linear_attention(GOOD, GOOD, GOOD, feature_map=lambda x: x.sum(-1)), "feature_map"),
])
def test_bad_input_is_named(call, argument):
    with pytest.raises((ValueError, TypeError), match=rf"^{argument}: .*expected .*got .*; "):
        call()


def test_a_feature_map_of_the_users_own(rng):
    q, k, v = (normal(rng, (1, 1, 9, 4), np.float64) for _ in range(3))
    assert np.array_equal(st.linear_attention(q, k, v, feature_map=linear.elu_plus_one), st.linear_attention(q, k, v))
    squared = quotient(products(q ** 2, k ** 2), v, True, np.longdouble)
    assert_close("squares", st.linear_attention(q, k, v, causal=True, feature_map=lambda x: x * x), squared, squared.astype(np.float64), reduction=13)
