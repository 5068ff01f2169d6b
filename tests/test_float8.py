"""Attention over float8 keys and values with a scale for 128 keys, and float8 queries: every backend against the float64 oracle under the numeric policy."""
import numpy as np
import oracle
import pytest
from drivers import EVERY, arrays, numpy_dtype
from judge import attention, normal
from numeric import assert_same_bits
from test_kernels import RULES, placed

import sparsetile as st

every = pytest.mark.parametrize("backend", EVERY)
FP8, NAN = numpy_dtype("float8_e4m3fn"), np.float32(np.nan)


def attend(name, kind, B=1, Hq=2, Hk=1, T=20, S=200, D=64, Dv=64, **features):
    return pytest.param(name, kind, (B, Hq, Hk, T, S, D, Dv), features, id="-".join(map(str, (name, kind, f"h{Hq}:{Hk}", f"{T}x{S}", f"d{D}:{Dv}", *features))))


CASES = [
    attend("full", "bfloat16", B=2, Hq=4, Hk=2, T=1, S=300, lengths=True),
    attend("causal", "float16", Hq=3, T=40, D=72, Dv=40, sink=True),
    attend("window", "float8_e4m3fn", T=33, S=290, D=96, Dv=96, softcap=5.0, out_dtype="float32"),
    attend("sink", "float8_e4m3fn", B=2, Hq=8, Hk=2, T=2, S=270, D=128, Dv=128, starts=True),
    attend("strided", "bfloat16", Hq=2, Hk=2, T=150, S=150, D=32, Dv=32),
    attend("strided", "float8_e4m3fn", T=40, D=31, Dv=24, out_dtype="float16"),
    attend("blocks", "float16", B=2, T=30, S=190, lengths=True),
    attend("holes", "float8_e4m3fn", T=20, S=5, D=16, Dv=16, bare=True),
    attend("full", "bfloat16", T=3, D=192, Dv=128, bare=True),
    attend("causal", "float16", Hq=4, T=5, D=64, Dv=32, shared=True),
    attend("causal", "bfloat16", Hq=2, T=3, S=140, D=320, Dv=288),
    # more queries than one tile of the portable kernels: Hopper's own paths
    attend("causal", "bfloat16", Hq=4, Hk=2, T=140, S=300, D=128, Dv=128, sink=True),
    attend("window", "float16", B=2, Hq=2, T=70, S=270, D=64, Dv=48, lengths=True),
    attend("sink", "float8_e4m3fn", Hq=2, T=130, S=290, D=96, Dv=64, starts=True),
    attend("holes", "float8_e4m3fn", Hq=2, T=70, S=270, D=192, Dv=128, out_dtype="float16"),
]


def quantised(rng, shape, rows):
    """Values that fill float8's range, and float32 scales [B,H,ceil(N/rows)] (none a power of two) that bring them to about 1."""
    B, H, N, _ = shape
    return np.clip(normal(rng, shape, np.float32, 100), -448, 448).astype(FP8), (0.005 + 0.01 * rng.random((B, H, -(-N // rows)))).astype(np.float32)


def made(rng, kind, case):
    B, Hq, Hk, T, S, D, Dv = case
    q, q_scale = quantised(rng, (B, Hq, T, D), 1) if kind == FP8.name else (normal(rng, (B, Hq, T, D), numpy_dtype(kind)), None)
    (k, k_scale), (v, v_scale) = quantised(rng, (B, Hk, S, D), 128), quantised(rng, (B, Hk, S, Dv), 128)
    return q, k, v, dict(k_scale=k_scale, v_scale=v_scale) | ({} if q_scale is None else dict(q_scale=q_scale))


@every
@pytest.mark.parametrize("name, kind, case, features", CASES)
def test_attention(on, backend, name, kind, case, features, rng):
    q, k, v, scales = made(rng, kind, case)
    pattern, rule = RULES[name]
    options = placed(rng, case, features)
    count = oracle.visible(case[0], case[3], case[4], rule=rule, **options)
    scale = None
    if "bare" in features:  # a scale of None is 1
        scales, scale = {}, 1e-3
    if "shared" in features:
        v, scales["v_scale"] = None, scales["k_scale"]
    out, _ = attention(on, q, k, v, pattern(), count, scale=scale, value_width=case[6], softcap=features.get("softcap"), out_dtype=features.get("out_dtype"),
                       sink_logits=normal(rng, case[1], np.float32) if "sink" in features else None, **options, **scales)
    assert out.dtype == numpy_dtype(features.get("out_dtype") or ("bfloat16" if kind == FP8.name else kind))


@every
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float8_e4m3fn"])
@pytest.mark.parametrize("T", [2, 40, 70])
def test_scales_apart_by_ten_decades(on, backend, kind, T, rng):
    """Each 128 keys have a scale of their own, from 1e-4 to 1e6, which float16 does not hold; one of 0, one of values that are all 0 or all 448, one with the other sign, and one for the ragged end."""
    B, Hq, Hk, S, D = 1, 2, 1, 128 * 5 + 3, 64
    q, k, v, scales = made(rng, kind, (B, Hq, Hk, T, S, D, D))
    k[:, :, 128:256], v[:, :, 128:256] = FP8.type(0), FP8.type(0)
    k[:, :, 256:384], v[:, :, 256:384] = FP8.type(448), FP8.type(-448)
    scales["k_scale"] = np.float32([1e-2, 1e4, 1e-4, 0, -3e-3, 2e-2]).reshape(B, Hk, 6)
    scales["v_scale"] = np.float32([1e6, 0, 1e-4, 3e2, -1e-2, 1e3]).reshape(B, Hk, 6) * np.float32(1e-4 if kind == "float16" else 1)  # whose outputs end at 65504
    attention(on, q, k, v, st.Full(), np.ones((1, 1, 1, 1)), out_dtype="float32" if kind == FP8.name else None, **scales)


@every
@pytest.mark.parametrize("kind, T", [("bfloat16", 70), ("float8_e4m3fn", 1), ("float8_e4m3fn", 70)])
def test_what_nobody_sees_may_hold_anything(on, backend, kind, T, rng):
    """NaN in keys, values and scales of blocks that a window skips or a length cuts; queries far past it see nothing."""
    case = 1, 2, 1, T, 530, 64, 64
    q, k, v, scales = made(rng, kind, case)
    options = dict(kv_length=np.int32([400]), q_start=np.int32([390 - T // 2]))
    count = oracle.visible(1, T, 530, rule=lambda p, s: (s >= p - 9) & (s <= p - 3), **options)
    unseen = ~(count > 0).any(axis=(0, 1, 2))
    for x in (k, v):
        x[:, :, unseen] = FP8.type(np.nan)
    for name in ("k_scale", "v_scale"):
        scales[name][:, :, [0, 1, 4]] = NAN
    assert unseen[:256].all() and unseen[512:].all() and not unseen[256:384].all() and not unseen[384:512].all()
    attention(on, q, k, v, st.Window(9) & ~st.Window(2), count, **options, **scales)


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("T", [1, 40])
def test_products_that_float32_does_not_hold(on, backend, T, rng):
    """Scores are small all the same: the CPU does such rows again in float64."""
    q, k, v, scales = made(rng, "bfloat16", (1, 2, 1, T, 140, 64, 64))
    scales["k_scale"] = scales["k_scale"] * np.float32(3e37)
    attention(on, q, k, v, st.Full(), np.ones((1, 1, 1, 1)), scale=1e-37, **scales)


@every
@pytest.mark.parametrize("T", [3, 70])
def test_nan_that_is_seen_spreads(on, backend, T, rng):
    q, k, v, scales = made(rng, "bfloat16", (1, 2, 1, T, 140, 64, 64))
    v[:, :, 3, 5] = FP8.type(np.nan)
    out, lse = arrays(*on.sparse_attention(q, k, v, return_lse=True, **scales))
    assert np.isnan(out[..., 5].astype(np.float32)).all() and np.isfinite(np.delete(out.astype(np.float32), 5, -1)).all() and np.isfinite(lse).all()


@every
def test_strides_are_read_in_place(on, backend, rng):
    """[B,S,H,D] as serving engines keep it, and a column of a wider array; scales turned over too."""
    q, k, v, scales = made(rng, "bfloat16", (1, 2, 2, 2, 150, 64, 64))
    want = on.sparse_attention(q, k, v, st.Causal(), **scales)
    turned = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in (q, k, v)]
    q, k, v = (on.put(x).swapaxes(1, 2) if isinstance(on.put(x), np.ndarray) else on.put(x).transpose(1, 2) for x in turned)
    assert_same_bits("turned", want, st.sparse_attention(q, k, v, st.Causal(), backend=on.backend, **{name: on.put(x) for name, x in scales.items()}))


# ------------------------------------------------------------------------------------------------------------------ frameworks
def test_pytorch_eager_compiled_and_without_gradients(rng):
    torch = pytest.importorskip("torch")
    from drivers import to_torch
    for kind, out_dtype in (("bfloat16", None), ("float8_e4m3fn", "float16")):
        q, k, v, scales = made(rng, kind, (1, 4, 2, 20, 200, 64, 48))
        want = st.sparse_attention(q, k, v, st.Causal(), out_dtype=out_dtype, **scales)
        q, k, v, scales = *map(to_torch, (q, k, v)), {name: to_torch(x) for name, x in scales.items()}
        call = lambda q, k, v, scales: st.sparse_attention(q, k, v, st.Causal(), out_dtype=out_dtype, **scales)  # noqa: E731, B023
        assert_same_bits("eager", want, call(q, k, v, scales))
        assert_same_bits("compiled", want, torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v, scales))
        with pytest.raises(st.Unsupported, match="no gradients.*no_grad"):
            call(q, k, v, scales | {"k_scale": scales["k_scale"].clone().requires_grad_()})
        with torch.no_grad():
            assert_same_bits("no_grad", want, call(q, k, v, scales))
        bare = [st.sparse_attention(q, k, v, st.Causal(), scale=1e-3) for _ in range(3)]  # without scales a call like an earlier one goes straight to its kernel
        assert torch.equal(bare[0], bare[1]) and torch.equal(bare[0], bare[2]) and bare[0].dtype == torch.bfloat16
        one = {name: torch.ones_like(x) for name, x in scales.items()}
        assert torch.equal(bare[0], st.sparse_attention(q, k, v, st.Causal(), scale=1e-3, **one))


def test_jax_eager_and_jitted(rng):
    jax = pytest.importorskip("jax")
    q, k, v, scales = made(rng, "float8_e4m3fn", (1, 2, 1, 20, 200, 64, 48))
    call = lambda q, k, v, scales: st.sparse_attention(q, k, v, st.Causal(), out_dtype="float32", **scales)  # noqa: E731
    want, given = call(q, k, v, scales), jax.tree.map(jax.numpy.asarray, (q, k, v, scales))
    assert_same_bits("eager", want, np.asarray(call(*given)))
    assert_same_bits("jit", want, np.asarray(jax.jit(call)(*given)))


def test_selections_and_caches_are_refused(rng):
    q, k, v, scales = made(rng, "bfloat16", (1, 2, 1, 3, 140, 64, 64))
    with pytest.raises(st.Unsupported, match="pattern: a Selection over float8 keys"):
        st.sparse_attention(q, k, v, st.Selection(np.zeros((1, 1, 3, 4), np.int32)), **scales)
    cache = st.PagedKV.empty(q, sequences=1, pages=2, heads=1, width=64)
    with pytest.raises(ValueError, match="k_scale: expected None beside a cache"):
        st.sparse_attention(q, cache, k_scale=scales["k_scale"])
