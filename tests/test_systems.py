"""The systems of the literature on every backend: each equals its paper in loops (naive_systems.py) under the numeric policy, forward and backward.

Each selector has its anti-cheat pair: everything chosen equals dense, a small choice differs from it.
"""
import judge
import ml_dtypes
import naive_systems as naive
import numpy as np
import oracle
import pytest
from drivers import EVERY, LARGE, arrays
from judge import normal
from numeric import assert_close, plain

import sparsetile as st

KINDS = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float64": np.float64}
# name -> small knobs, knobs that choose everything (for T = S = 20)
SMALL = {"moba": dict(block_size=8, top_k=2), "exact_topk": dict(top_k=5)}
ALL = {"moba": dict(block_size=8, top_k=3), "exact_topk": dict(top_k=20)}
# name -> B, Hq, Hk, T, S, D, Dv, options of the call
CASES = {"ragged": (1, 2, 1, 7, 21, 13, 9, {}), "batch of lengths": (2, 2, 2, 5, 20, 8, 8, dict(kv_length=[20, 11])), "before the start": (1, 1, 1, 6, 17, 5, 3, dict(q_start=-3)),
         "past the keys": (1, 3, 1, 4, 18, 7, 7, dict(q_start=15)), "starts": (2, 1, 1, 3, 19, 8, 4, dict(kv_length=[0, 19], q_start=[4, 9])), "one query": (1, 4, 2, 1, 30, 16, 8, {}), "beyond the length": (1, 4, 1, 6, 24, 8, 8, dict(kv_length=[11], q_start=20))}


def made(rng, case, kind=np.float32):
    B, Hq, Hk, T, S, D, Dv, options = CASES[case]
    options = {name: np.asarray(x, np.int32) if isinstance(x, list) else x for name, x in options.items()}
    return normal(rng, (B, Hq, T, D), kind), normal(rng, (B, Hk, S, D), kind), normal(rng, (B, Hk, S, Dv), kind), options


def spoiled(x, kv_length):
    """Keys past the length hold NaN, or what many queries would like best: nothing may read them."""
    x = x.copy()
    for b, n in enumerate([] if kv_length is None else kv_length):
        x[b, :, n:] *= 1e3
        x[b, :, n + 1::2] = np.nan
    return x


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("system", SMALL)
def test_every_backend(on, backend, system, rng):
    q, k, v = normal(rng, (1, 2, 3, 8), np.float32), normal(rng, (1, 1, 19, 8), np.float32), normal(rng, (1, 1, 19, 5), np.float32)
    judge.attention(on, q, k, v, None, getattr(naive, system)(q, k, **SMALL[system]), op=system, **SMALL[system])


@pytest.mark.parametrize("backend", LARGE)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("system", SMALL)
def test_equals_the_paper(on, backend, system, case, rng):
    q, k, v, options = made(rng, case)
    bad_k, bad_v = (spoiled(x, options.get("kv_length")) for x in (k, v))
    out, lse = arrays(*getattr(on, system)(q, bad_k, bad_v, return_lse=True, **SMALL[system], **options))
    judge.answer(out, lse, q, k, v, getattr(naive, system)(q, k, **SMALL[system], **options))
    chosen = getattr(on, f"{system}_selection")(q, bad_k, **SMALL[system], **options)
    assert np.array_equal(arrays(on.sparse_attention(q, k, v, chosen, **options))[0], out), "the selection alone is the system"


@pytest.mark.parametrize("backend", LARGE)
@pytest.mark.parametrize("kind", ["bfloat16", "float64"])
@pytest.mark.parametrize("system", SMALL)
def test_types(on, backend, system, kind, rng):
    q, k, v, options = made(rng, "ragged", KINDS[kind])
    judge.attention(on, q, k, v, None, getattr(naive, system)(q, k, **SMALL[system]), op=system, **SMALL[system])


@pytest.mark.parametrize("backend", LARGE)
@pytest.mark.parametrize("system", SMALL)
def test_gradients(on, backend, system, rng):
    pytest.importorskip("torch")
    q, k, v, _ = made(rng, "ragged", np.float32)
    judge.gradients(on, q, k, v, None, getattr(naive, system)(q, k, **SMALL[system]), rng, op=system, with_lse=True, sink_logits=np.zeros(2, np.float32), **SMALL[system])


@pytest.mark.parametrize("backend", LARGE)
@pytest.mark.parametrize("system", SMALL)
def test_all_is_dense_and_few_are_not(on, backend, system, rng):
    q, k, v = (normal(rng, (1, 2, 20, 8), np.float32) for _ in range(3))
    causal = oracle.visible(1, 20, 20, rule=lambda p, s: s <= p)
    dense, _ = judge.attention(on, q, k, v, None, causal, op=system, **ALL[system])
    few = arrays(getattr(on, system)(q, k, v, **SMALL[system]))[0]
    assert np.abs(few - dense).max() > 0.01


# ---------------------------------------------------------------------------------------------------------------- Routing Transformer
ROUTES = {"ragged": ("ragged", 2, {}), "T = S": ("square", 2, {}), "one head of centroids": ("batch of lengths", 1, {}), "unit": ("one query", 4, dict(normalize="unit")),
          "both ways": ("batch of lengths", 2, dict(causal=False)), "as given": ("starts", 1, dict(normalize=None)), "before the start": ("before the start", 1, {}),
          "beyond the length": ("beyond the length", 4, dict(causal=False)), "fewer than a cluster": ("short", 2, {}), "fewer, both ways": ("short", 2, dict(causal=False))}
CASES |= {"square": (2, 2, 2, 15, 15, 6, 4, {}), "short": (2, 2, 1, 12, 12, 6, 4, dict(kv_length=[3, 12], q_start=0))}


def routed(call, q, k, v, centroids, size, rng, **options):
    """Out and gradients of a routing call on a backend, against the naive one in float64 and, as the measure, float32."""
    import torch
    out, leaves = call(q, k, v)
    dout = normal(rng, out.shape, np.float32)
    got = torch.autograd.grad(out, leaves, torch.from_numpy(dout).to(out.device), materialize_grads=True)
    answers = []
    for dtype in (torch.float64, torch.float32):
        naive_out, naive_leaves = naive.routing(q, k, v, centroids, size, dtype=dtype, **options)
        grads = torch.autograd.grad(naive_out, naive_leaves, torch.from_numpy(dout).to(dtype), materialize_grads=True)
        answers.append(arrays(naive_out, *grads))
    for name, mine, truth, measure in zip(("out", "dq", "dk", "dv"), arrays(out, *got), *answers):
        assert_close(name, mine, truth, measure, reduction=k.shape[2] + q.shape[3] + v.shape[3])


@pytest.mark.parametrize("backend", LARGE)
@pytest.mark.parametrize("route", ROUTES)
def test_routing(on, backend, route, rng):
    pytest.importorskip("torch")
    case, H, how = ROUTES[route]
    q, k, v, options = made(rng, case)
    centroids, size, lengths = normal(rng, (H, 3, q.shape[3]), np.float32), 4, options.get("kv_length")

    def call(q, k, v):
        leaves = [on.tensor(x, True) for x in (q, spoiled(k, lengths), spoiled(v, lengths))]
        given = {name: on.tensor(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
        return st.routing(*leaves, centroids=on.tensor(centroids), cluster_size=size, backend=backend, **how, **given), leaves
    routed(call, q, k, v, centroids, size, rng, **how, **options)


@pytest.mark.parametrize("backend", LARGE)
def test_routing_of_shared_queries_and_keys(on, backend, rng):
    torch = pytest.importorskip("torch")
    q, v, centroids = normal(rng, (2, 2, 15, 6), np.float32), normal(rng, (2, 2, 15, 4), np.float32), normal(rng, (2, 3, 6), np.float32)
    shared, values, apart = on.tensor(q, True), on.tensor(v, True), [on.tensor(x, True) for x in (q, q, v)]
    one = st.routing(shared, shared, values, centroids=on.tensor(centroids), cluster_size=6, backend=backend)
    two = st.routing(*apart, centroids=on.tensor(centroids), cluster_size=6, backend=backend)
    naive_out, _ = naive.routing(q, q, v, centroids, 6, dtype=torch.float64)
    measure, _ = naive.routing(q, q, v, centroids, 6, dtype=torch.float32)
    assert_close("shared", arrays(one)[0], *arrays(naive_out, measure), reduction=21), assert_close("apart", arrays(two)[0], *arrays(naive_out, measure), reduction=21)


@pytest.mark.parametrize("backend", EVERY)
def test_one_cluster_is_dense_and_more_are_not(on, backend, rng):
    q, k, v = (normal(rng, (1, 2, 9, 8), np.float32) for _ in range(3))
    out = arrays(on.routing(q, k, v, centroids=normal(rng, (1, 1, 8), np.float32)))[0]
    causal = oracle.visible(1, 9, 9, rule=lambda p, s: s <= p)
    truth, measure = oracle.attention(q, k, v, causal, scale=8 ** -0.5)[0], plain.attention(q, k, v, causal, scale=8 ** -0.5)[0]
    assert_close("out", out, truth, measure, reduction=17)
    assert np.abs(arrays(on.routing(q, k, v, centroids=normal(rng, (1, 3, 8), np.float32)))[0] - truth).max() > 0.01


JAX = {**SMALL, "routing": dict(centroids=np.eye(3, 13, dtype=np.float32)[None], cluster_size=4)}


@pytest.mark.parametrize("system", JAX)
def test_jax(system, rng):
    jax = pytest.importorskip("jax", reason="JAX is not installed: pip install 'sparsetile[jax]'")
    q, k, v, _ = made(rng, "ragged")
    own = {name: x for name, x in JAX[system].items() if not isinstance(x, np.ndarray)}
    tables = {name: x for name, x in JAX[system].items() if isinstance(x, np.ndarray)}
    call = lambda q, k, v, tables: getattr(st, system)(q, k, v, **own, **tables)  # noqa: E731
    want, given = call(q, k, v, tables), jax.tree.map(jax.numpy.asarray, (q, k, v, tables))
    for got in (call(*given), jax.jit(call)(*given)):
        assert isinstance(got, jax.Array)
        assert_close("JAX", np.asarray(got), want.astype(np.float64), want, reduction=21)


BAD = [("moba", dict(block_size=0), ValueError, "block_size: expected an integer from 1"), ("moba", dict(top_k=1.5), TypeError, "top_k: expected an integer"),
       ("exact_topk", dict(top_k=0), ValueError, "top_k: expected an integer from 1"), ("exact_topk", dict(causal=1), TypeError, "causal: expected True or False"),
       ("routing", dict(centroids=np.ones((3, 2, 13), np.float32)), ValueError, "centroids: expected .* with H in"), ("routing", dict(centroids=np.ones((1, 2, 12), np.float32)), ValueError, "centroids: expected width D"),
       ("routing", dict(centroids=np.ones((1, 2, 13), np.float32), return_lse=True), ValueError, "return_lse: expected False"),
       ("routing", dict(centroids=np.ones((1, 2, 13), np.float32), normalize="batch"), ValueError, "normalize: expected one of")]


@pytest.mark.parametrize("system, options, error, says", BAD, ids=range(len(BAD)))
def test_bad_arguments(system, options, error, says, rng):
    q, k, v, _ = made(rng, "ragged")
    with pytest.raises(error, match=says):
        getattr(st, system)(q, k, v, **options)


@pytest.mark.parametrize("system", SMALL)
def test_arguments_of_the_attention_are_checked_before_the_choice(system, rng):
    q, k, v, _ = made(rng, "ragged")
    for options, says in ((dict(kv_length=np.array([3.0])), "kv_length: expected element type int32"), (dict(backend="cuda"), "backend: expected one of")):
        with pytest.raises((TypeError, ValueError), match=says):
            getattr(st, system)(q, k, v, **options)
    with pytest.raises(ValueError, match="k: expected width D of q"):
        getattr(st, system)(q, k[..., 1:], v)
    assert getattr(st, system)(q, k[:, :, :0], v[:, :, :0]).shape == (1, 2, 7, 9), "no keys: zeros"
