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
from numeric import assert_same_bits

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


@pytest.mark.parametrize("system", SMALL)
def test_jax(system, rng):
    jax = pytest.importorskip("jax", reason="JAX is not installed: pip install 'sparsetile[jax]'")
    q, k, v, _ = made(rng, "ragged")
    call = lambda q, k, v: getattr(st, system)(q, k, v, **SMALL[system])  # noqa: E731
    want, given = call(q, k, v), [jax.numpy.asarray(x) for x in (q, k, v)]
    for got in (call(*given), jax.jit(call)(*given)):
        assert isinstance(got, jax.Array)
        assert_same_bits("JAX", want, np.asarray(got))


BAD = [("moba", dict(block_size=0), ValueError, "block_size: expected an integer from 1"), ("moba", dict(top_k=1.5), TypeError, "top_k: expected an integer"),
       ("exact_topk", dict(top_k=0), ValueError, "top_k: expected an integer from 1"), ("exact_topk", dict(causal=1), TypeError, "causal: expected True or False")]


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
