"""bfloat16 by pair products: seen keys that begin and end at odd ones, ragged ends, groups, caps, poison between keys, and what pairs cannot do."""
import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("numba")

from drivers import Driver  # noqa: E402
from judge import attention, normal  # noqa: E402
from oracle import visible  # noqa: E402

import sparsetile as st  # noqa: E402
from sparsetile.backends.contract import Problem  # noqa: E402
from sparsetile.backends.numba import block_attention, simd  # noqa: E402

BFLOAT = np.dtype(ml_dtypes.bfloat16)
CONFIG = {"block_q": 64, "block_k": 64, "pairs": True}
able = pytest.mark.skipif(not simd.PAIRS, reason="this CPU has no pair products of bfloat16")
RULES = {"full": (st.Full(), lambda p, s: s == s), "causal": (st.Causal(), lambda p, s: s <= p), "window": (st.Window(37, 5), lambda p, s: (s >= p - 37) & (s <= p + 5)),
         "odd": (st.Global([3, 4, 5, 71], symmetric=False) | st.Window(0), lambda p, s: (s == 3) | (s == 4) | (s == 5) | (s == 71) | (s == p)),
         "strided": (st.Causal() & st.Strided(8), lambda p, s: (s <= p) & ((p - s) % 8 == 0))}


def tensors(rng, Hq=4, Hk=2, T=150, S=171, D=40, Dv=24):
    return tuple(normal(rng, (2, h, n, d), BFLOAT) for h, n, d in ((Hq, T, D), (Hk, S, D), (Hk, S, Dv)))


@able
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("D, Dv, block_q", [(40, 24, 64), (64, 64, 128), (2, 6, 32), (33, 8, 64)])  # odd widths go by float32
def test_against_the_oracle(rng, name, D, Dv, block_q):
    pattern, rule = RULES[name]
    attention(Driver("numba"), *tensors(rng, D=D, Dv=Dv), pattern, visible(2, 150, 171, rule=rule), config={**CONFIG, "block_q": block_q}, sink_logits=np.linspace(-3, 3, 4).astype(np.float32))


@able
@pytest.mark.parametrize("options", [dict(softcap=3.0), dict(scale=-0.2), dict(scale=0.0)], ids=str)
def test_options(rng, options):
    attention(Driver("numba"), *tensors(rng), st.Causal(), visible(2, 150, 171, rule=lambda p, s: s <= p), config=CONFIG, **options)


@able
def test_lengths_end_inside_a_pair_and_what_lies_behind_is_not_read(rng):
    q, k, v = tensors(rng)
    length = np.array([101, 64], np.int32)
    for b, end in enumerate(length):
        k[b, :, end:], v[b, :, end:] = np.nan, np.inf
    attention(Driver("numba"), q, k, v, st.Window(30), visible(2, 150, 171, kv_length=length, rule=lambda p, s: (s <= p) & (s >= p - 30)), kv_length=length, config=CONFIG)


@able
@pytest.mark.parametrize("place", ["q", "k", "v"])
def test_denormals_are_no_zeros(rng, place):
    """Pair products take them for 0: such calls go by float32."""
    q, k, v = (np.asarray(x, np.float32) for x in tensors(rng))
    if place == "v":
        v *= np.float32(1e-39)
    else:
        q, k = (q * np.float32(1e-39), k * np.float32(1e37)) if place == "q" else (q * np.float32(1e37), k * np.float32(1e-39))
    q, k, v = (x.astype(BFLOAT) for x in (q, k, v))
    attention(Driver("numba"), q, k, v, st.Causal(), visible(2, 150, 171, rule=lambda p, s: s <= p), config=CONFIG, scale=10.0 if place != "v" else 1.0)


def test_refused_where_they_cannot_be():
    problem = lambda kind: Problem.of("sparse_attention", dict(B=1, Hq=1, Hk=1, T=64, S=64, D=64, Dv=64), dict(q=kind, k=kind, v=kind), "cpu")
    for kind in ("float32", "float16"):
        assert "bfloat16" in block_attention.resources(problem(kind), CONFIG) and not block_attention.default_config(problem(kind))["pairs"]
    assert isinstance(block_attention.resources(problem("bfloat16"), CONFIG), str) != simd.PAIRS
    assert block_attention.default_config(problem("bfloat16"))["pairs"] == simd.FAST_PAIRS
