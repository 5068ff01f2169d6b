"""Every backend against the float64 oracle under the numeric policy, through the public API: property x backend x workload, pairwise, at tiny sizes.

Sets of keys come from rules written here, pair by pair; patterns and layouts have tests of their own.
"""
import numpy as np
import oracle
import pytest
from drivers import EVERY, LARGE, arrays, numpy_dtype
from judge import attention, gradients, indexer_scores, indexer_topk, normal
from numeric import assert_close, assert_same_bits, plain

import sparsetile as st
from sparsetile.ops import merge

every, large = pytest.mark.parametrize("backend", EVERY), pytest.mark.parametrize("backend", LARGE)
BLOCKS = np.random.default_rng(5).random((6, 6)) < 0.5

# name -> pattern, and what it means: rule(p, s) on arrays of positions
RULES = {
    "full": (lambda: st.Full(), lambda p, s: s == s),
    "causal": (lambda: st.Causal(), lambda p, s: s <= p),
    "window": (lambda: st.Window(9, 4), lambda p, s: (s >= p - 9) & (s <= p + 4)),
    "self": (lambda: st.Window(0), lambda p, s: s == p),
    "sink": (lambda: st.Sink(3) | st.Window(6), lambda p, s: (s < 3) | ((s >= p - 6) & (s <= p))),
    "dilated": (lambda: st.Dilated(20, 0, 4), lambda p, s: (s >= p - 20) & (s <= p) & ((p - s) % 4 == 0)),
    "strided": (lambda: st.Causal() & (st.Window(4) | st.Strided(8)), lambda p, s: (s <= p) & ((s >= p - 4) | ((p - s) % 8 == 0))),
    "fixed": (lambda: st.Causal() & st.Fixed(8, 2), lambda p, s: (s <= p) & ((s // 8 == p // 8) | (s % 8 >= 6))),
    "global": (lambda: st.Window(5, 5) | st.Global([0, 17]), lambda p, s: (abs(p - s) <= 5) | (s == 0) | (s == 17) | (p == 0) | (p == 17)),
    "blocks": (lambda: st.Blocks(BLOCKS, 32, 32), lambda p, s: BLOCKS[np.minimum(p // 32, 5), np.minimum(s // 32, 5)]),
    "holes": (lambda: ~st.Window(3, 3), lambda p, s: abs(p - s) > 3),
    "documents": (lambda: st.Documents([30, 1, 50, 200]) & st.Causal(), lambda p, s: (s <= p) & (np.searchsorted([30, 31, 81], p, "right") == np.searchsorted([30, 31, 81], s, "right"))),
}


def attend(name, dtype, B=1, Hq=2, Hk=2, T=40, S=40, D=32, Dv=32, **features):
    return pytest.param(name, dtype, (B, Hq, Hk, T, S, D, Dv), features, id="-".join(map(str, (name, dtype, f"h{Hq}:{Hk}", f"{T}x{S}", f"d{D}:{Dv}", *features))))


# Every value of each property beside every value of the others at least in pairs that meet in the kernels; head counts, groups and widths that no table of instantiations holds all of.
ATTENTION = [
    attend("full", "float32", Hq=3, Hk=1, T=33, S=70, D=31, Dv=24),
    attend("full", "bfloat16", B=2, Hq=1, Hk=1, T=1, S=65, D=64, Dv=64),
    attend("causal", "bfloat16", Hq=7, Hk=7, T=70, S=70, D=72, Dv=40, sink=True),
    attend("causal", "float16", B=2, Hq=12, Hk=1, T=17, S=90, D=64, Dv=64, softcap=5.0),
    attend("causal", "float32", Hq=5, Hk=5, T=90, S=41, D=1, Dv=1),
    attend("window", "bfloat16", Hq=4, Hk=2, T=100, S=100, D=96, Dv=96, lengths=True),
    attend("window", "float16", B=3, Hq=8, Hk=4, T=9, S=80, D=100, Dv=36, lengths=True, sink=True),
    attend("window", "float32", Hq=2, Hk=1, T=64, S=128, D=64, Dv=64, softcap=2.0, sink=True),
    attend("self", "float16", Hq=3, Hk=3, T=45, S=45, D=16, Dv=16),
    attend("sink", "bfloat16", Hq=6, Hk=2, T=130, S=130, D=48, Dv=80),
    attend("sink", "float16", B=2, Hq=2, Hk=2, T=1, S=200, D=128, Dv=128, starts=True),
    attend("dilated", "float32", Hq=2, Hk=2, T=67, S=67, D=24, Dv=24, sink=True),
    attend("strided", "bfloat16", Hq=2, Hk=1, T=80, S=80, D=64, Dv=64),
    attend("fixed", "float16", Hq=2, Hk=2, T=50, S=90, D=32, Dv=32, lengths=True),
    attend("global", "bfloat16", Hq=3, Hk=1, T=77, S=77, D=64, Dv=64, softcap=3.0),
    attend("blocks", "float16", B=2, Hq=4, Hk=4, T=150, S=150, D=40, Dv=56, sink=True),
    attend("blocks", "bfloat16", Hq=2, Hk=2, T=30, S=190, D=192, Dv=128),
    attend("holes", "float32", Hq=2, Hk=2, T=20, S=5, D=32, Dv=32),
    attend("documents", "bfloat16", Hq=2, Hk=1, T=120, S=120, D=256, Dv=256),
    attend("documents", "float16", Hq=1, Hk=1, T=50, S=20, D=8, Dv=8, q_start=60),
    attend("causal", "bfloat16", Hq=16, Hk=1, T=5, S=60, D=320, Dv=288),
    attend("causal", "bfloat16", Hq=16, Hk=1, T=3, S=70, D=576, Dv=512, shared=True),
]


def made(rng, case, dtype):
    B, Hq, Hk, T, S, D, Dv = case
    dtype = numpy_dtype(dtype)
    return normal(rng, (B, Hq, T, D), dtype), normal(rng, (B, Hk, S, D), dtype), normal(rng, (B, Hk, S, Dv), dtype)


def placed(rng, case, features):
    """Lengths and positions of a case, as arguments."""
    B, Hq, Hk, T, S, D, Dv = case
    options = {}
    if "lengths" in features:
        options["kv_length"] = rng.integers(1, S + 1, B).astype(np.int32)
    if "starts" in features:
        options["q_start"] = rng.integers(0, S, B).astype(np.int32)
    if "q_start" in features:
        options["q_start"] = features["q_start"]
    return options


def model(rng, case, features):
    softcap = features.get("softcap")
    return dict(softcap=softcap, sink_logits=normal(rng, case[1], np.float32) if "sink" in features else None)


@every
@pytest.mark.parametrize("name, dtype, case, features", ATTENTION)
def test_attention(on, backend, name, dtype, case, features, rng):
    q, k, v = made(rng, case, dtype)
    pattern, rule = RULES[name]
    options = placed(rng, case, features)
    count = oracle.visible(case[0], case[3], case[4], rule=rule, **options)
    if "shared" in features:
        v = None
    attention(on, q, k, v, pattern(), count, value_width=case[6], **model(rng, case, features), **options)


GRADIENTS = [
    attend("full", "float32", Hq=3, Hk=1, T=33, S=50, D=31, Dv=24),
    attend("causal", "bfloat16", B=2, Hq=4, Hk=2, T=40, S=40, D=64, Dv=64, sink=True),
    attend("causal", "float16", Hq=2, Hk=2, T=70, S=33, D=64, Dv=32, softcap=3.0),
    attend("causal", "bfloat16", Hq=2, Hk=1, T=64, S=64, D=32, Dv=32),               # tiles that hold queries of the call only
    attend("window", "float32", Hq=2, Hk=1, T=64, S=90, D=64, Dv=64, lengths=True, lse=True),
    attend("sink", "bfloat16", Hq=6, Hk=2, T=100, S=100, D=96, Dv=96),
    attend("strided", "float16", Hq=2, Hk=1, T=48, S=48, D=32, Dv=32, lse=True),
    attend("global", "bfloat16", Hq=3, Hk=3, T=50, S=50, D=128, Dv=128, softcap=5.0, sink=True, lse=True),
    attend("blocks", "bfloat16", Hq=2, Hk=2, T=60, S=150, D=192, Dv=128, starts=True),
    attend("holes", "float32", Hq=2, Hk=2, T=20, S=5, D=32, Dv=32, sink=True),
    attend("documents", "float16", Hq=2, Hk=1, T=90, S=90, D=256, Dv=256),
]


@every
@pytest.mark.parametrize("name, dtype, case, features", GRADIENTS)
def test_attention_gradients(on, backend, name, dtype, case, features, rng):
    pytest.importorskip("torch")
    q, k, v = made(rng, case, dtype)
    pattern, rule = RULES[name]
    options = placed(rng, case, features)
    count = oracle.visible(case[0], case[3], case[4], rule=rule, **options)
    gradients(on, q, k, v, pattern(), count, rng, with_lse="lse" in features, **model(rng, case, features), **options)


@every
def test_a_pattern_per_head(on, backend, rng):
    q, k, v = made(rng, (1, 4, 2, 50, 50, 32, 32), "float16")
    names = ("causal", "window", "sink", "global")
    count = np.concatenate([oracle.visible(1, 50, 50, rule=RULES[n][1]) for n in names], axis=1)
    attention(on, q, k, v, st.PerHead([RULES[n][0]() for n in names]), count)
    gradients(on, q, k, v, st.PerHead([RULES[n][0]() for n in names]), count, rng)


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("name", ["causal", "window", "strided", "blocks"])
def test_float64_on_the_cpu(on, backend, name, rng):
    q, k, v = made(rng, (1, 4, 2, 60, 60, 24, 16), "float64")
    pattern, rule = RULES[name]
    count = oracle.visible(1, 60, 60, rule=rule)
    attention(on, q, k, v, pattern(), count, sink_logits=normal(rng, 4, np.float32))
    gradients(on, q, k, v, pattern(), count, rng, with_lse=True)


# ---------------------------------------------------------------------------------------------------------------- selections
def select(dtype, B=1, Hq=2, Hk=2, G=1, T=20, S=60, D=32, Dv=32, K=12, **features):
    return pytest.param(dtype, (B, Hq, Hk, T, S, D, Dv), G, K, features, id="-".join(map(str, (dtype, f"h{Hq}:{Hk}:{G}", f"{T}x{S}", f"k{K}", f"d{D}:{Dv}", *features))))


SELECTIONS = [
    select("float32", Hq=3, Hk=1, T=13, D=31, Dv=24),
    select("bfloat16", B=2, Hq=16, Hk=1, T=7, D=64, Dv=64, K=33, causal=True),
    select("float16", Hq=4, Hk=2, G=2, K=5, sink=True, lengths=True),
    select("bfloat16", Hq=6, Hk=2, G=6, T=9, S=100, K=6, granularity=8, causal=True),
    select("float16", Hq=2, Hk=1, T=5, S=130, D=100, Dv=48, K=3, granularity=32, softcap=4.0),
    select("float32", B=2, Hq=4, Hk=4, G=4, T=8, K=70, kv_length=True, sink=True),
    select("bfloat16", Hq=16, Hk=1, T=3, S=90, D=576, Dv=512, K=40, causal=True, shared=True),
    select("bfloat16", Hq=8, Hk=2, G=2, T=6, S=128, D=128, Dv=128, K=2, granularity=64, causal=True, duplicates=True),
    select("float16", Hq=1, Hk=1, T=1, S=50, D=192, Dv=128, K=1),
    select("float32", Hq=5, Hk=5, G=1, T=8, D=72, Dv=40, K=20, duplicates=True),
]


def chosen(rng, case, G, K, features):
    """Indices with holes of every kind, and their lengths."""
    B, Hq, Hk, T, S, D, Dv = case
    g = features.get("granularity", 1)
    blocks = -(-S // g)
    indices = np.stack([rng.choice(blocks, K, replace="duplicates" in features or K > blocks) for _ in range(B * G * T)]).reshape(B, G, T, K).astype(np.int32)
    if K > blocks:                                                                   # then each entry once, the rest holes
        for row in indices.reshape(-1, K):
            row[:] = rng.permutation(np.concatenate([np.arange(blocks), np.full(K - blocks, -1)]))
    hole = rng.random(indices.shape) < 0.15
    indices[hole] = rng.choice([-1, -123456, -2 ** 31, blocks, 2 ** 31 - 1], int(hole.sum())).astype(np.int32)
    indices[:, :, T // 2] = -1
    lengths = rng.integers(-3, K + 5, (B, G, T)).astype(np.int32) if "lengths" in features else None
    return indices, lengths


@every
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype, case, G, K, features", SELECTIONS)
def test_selections(on, backend, dtype, case, G, K, features, gradient, rng):
    q, k, v = made(rng, case, dtype)
    indices, lengths = chosen(rng, case, G, K, features)
    options = {"kv_length": rng.integers(1, case[4] + 1, case[0]).astype(np.int32)} if "kv_length" in features else {}
    g, causal = features.get("granularity", 1), "causal" in features
    count = oracle.selection_count(indices, case[4], case[1], lengths=lengths, granularity=g, causal=causal, **options)
    if not gradient:
        attention(on, q, k, None if "shared" in features else v, on.selection(indices, lengths, granularity=g, causal=causal), count, value_width=case[6],
                  **model(rng, case, features), **options)
    else:
        pytest.importorskip("torch")
        rule = st.Selection(on.tensor(indices), lengths=None if lengths is None else on.tensor(lengths), granularity=g, causal=causal)
        gradients(on, q, k, v, rule, count, rng, with_lse=True, **model(rng, case, features), **options)


# ------------------------------------------------------------------------------------------------------------------- indexer
def index(dtype, B=1, H=4, T=9, S=70, D=32, k=8, **features):
    return pytest.param(dtype, (B, H, T, S, D), k, features, id="-".join(map(str, (dtype, f"h{H}", f"{T}x{S}", f"d{D}", f"k{k}", *features))))


INDEXERS = [
    index("float32", H=3, D=31),
    index("bfloat16", B=2, H=8, D=64, k=16, scale=True),
    index("float16", H=1, T=1, S=130, D=128, k=100, whole=True),
    index("float8_e4m3fn", H=16, D=128, S=150, k=33, scale=True),
    index("float8_e4m3fn", B=2, H=5, D=64, k=7, scale=True, whole=True, linear=True),
    index("bfloat16", B=2, H=2, D=40, k=4, windows=True),
    index("float32", H=4, T=20, S=20, D=16, k=64),
    index("float16", B=3, H=2, D=96, S=90, k=1, starts=True),
    index("float8_e4m3fn", B=2, H=16, T=1, S=300, D=64, k=33, scale=True),
    index("float16", H=20, T=2, S=270, D=40, k=20, windows=True),
]
POOLS = [
    index("float32", S=100, k=3, pool=8),
    index("bfloat16", B=2, S=130, D=64, k=4, pool=16, force_first=1, force_last=2),
    index("float16", S=75, k=2, pool=32, force_last=1, whole=True),
    index("float8_e4m3fn", S=90, D=64, k=5, pool=4, force_first=2, scale=True, windows=True),
    index("bfloat16", T=12, S=60, k=6, force_first=2, force_last=2),
]


def indexed(rng, dtype, case, features):
    B, H, T, S, D = case
    dtype = numpy_dtype(dtype)
    options = {name: features[name] for name in ("pool", "force_first", "force_last") if name in features}
    if "scale" in features:
        options["k_scale"] = (rng.random((B, S)) + 0.3).astype(np.float32)           # no powers of two
    if "linear" in features:
        options["activation"] = None
    if "whole" in features:
        options["causal"] = False
    if "windows" in features:
        options["key_start"] = rng.integers(-5, S // 2, (B, T)).astype(np.int32)
        options["key_end"] = rng.integers(S // 3, S + 9, (B, T)).astype(np.int32)
    if "starts" in features:
        options["q_start"] = rng.integers(0, S, B).astype(np.int32)
    return normal(rng, (B, H, T, D), dtype), normal(rng, (B, S, D), dtype), normal(rng, (B, H, T), np.float32), options


@every
@pytest.mark.parametrize("dtype, case, top_k, features", INDEXERS)
def test_indexer_scores(on, backend, dtype, case, top_k, features, rng):
    q, k, weights, options = indexed(rng, dtype, case, features)
    indexer_scores(on, q, k, weights, **options)


@every
@pytest.mark.parametrize("return_scores", [False, True], ids=["indices", "scores"])
@pytest.mark.parametrize("dtype, case, top_k, features", INDEXERS + POOLS)
def test_indexer_topk(on, backend, dtype, case, top_k, features, return_scores, rng):
    q, k, weights, options = indexed(rng, dtype, case, features)
    indexer_topk(on, q, k, weights, top_k, return_scores=return_scores, **options)


@every
@pytest.mark.parametrize("dtype, case, top_k, features", INDEXERS)
def test_indexer_topk_is_topk_of_the_scores(on, backend, dtype, case, top_k, features, rng):
    """Bit for bit the same set: one score function in both."""
    q, k, weights, options = indexed(rng, dtype, case, features)
    fused, best = on.indexer_topk(q, k, weights, top_k, return_scores=True, **options)
    scores = on.indexer_scores(q, k, weights, **options)
    two = on.topk(scores, top_k)
    for a, b in ((fused.indices, two.indices), (fused.lengths, two.lengths)):
        assert_same_bits("indices", a, b)
    indices, scores, best = arrays(fused.indices, scores, best)
    expected = np.where(indices[:, 0] >= 0, np.take_along_axis(scores, np.maximum(indices[:, 0], 0).astype(np.int64), -1), np.float32(-np.inf))
    assert_same_bits("scores", best[:, 0], expected)


# -------------------------------------------------------------------------------------------------------------------- latent
@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_float64_of_the_other_ops_on_the_cpu(on, backend, rng):
    """Selections, both modes of a latent, decompression with scales and a rotary part, and a merge whose empty parts hold NaN."""
    made64 = lambda *shape: normal(rng, shape, np.float64)  # noqa: E731
    q, k, v, entries = made64(1, 4, 30, 24), made64(1, 2, 50, 24), made64(1, 2, 50, 16), rng.integers(-2, 52, (1, 2, 30, 9)).astype(np.int32)
    count = oracle.selection_count(entries, 50, 4, causal=True)
    attention(on, q, k, v, on.selection(entries, causal=True), count, sink_logits=normal(rng, 4, np.float32))
    gradients(on, q, k, v, st.Selection(on.tensor(entries), causal=True), count, rng, with_lse=True)
    outs, lses, sinks = [made64(1, 3, 17, 8) for _ in range(3)], [made64(1, 3, 17) for _ in range(3)], np.array([0.5, -np.inf, 30.0], np.float32)
    for n in range(3):
        empty = (np.arange(17) % 4 == n) | (np.arange(17) > 12)
        outs[n][:, :, empty], lses[n][:, :, empty] = np.nan, -np.inf
    got, how = on.merge_attention([on.put(x) for x in outs], [on.put(x) for x in lses], sink_logits=sinks), dict(sink_logits=sinks)
    for name, g, truth, measure in zip(("out", "lse"), arrays(*got), oracle.merge_attention(outs, lses, **how), plain.merge_attention(outs, lses, **how)):
        assert_close(name, g, truth, measure, reduction=3)
    latent, rope, w_uk, w_uv, scale = made64(2, 50, 200), made64(2, 50, 6), made64(3, 200, 12) * 200 ** -0.5, made64(3, 200, 10) * 200 ** -0.5, (rng.random((2, 50, 2)) + 0.3).astype(np.float32)
    for how in (dict(k_rope=rope, latent_scale=scale), {}):
        for name, g, truth, measure in zip("kv", arrays(*on.latent_decompress(latent, w_uk, w_uv, **how)), oracle.latent_decompress(latent, w_uk, w_uv, **how), plain.latent_decompress(latent, w_uk, w_uv, **how)):
            assert_close(name, g, truth, measure, reduction=200)
    nope, rotary, count, how = made64(2, 3, 9, 12), made64(2, 3, 9, 6), oracle.visible(2, 9, 50, rule=RULES["causal"][1]), dict(scale=18 ** -0.5)
    for mode in ("absorbed", "decompressed"):
        out, = arrays(on.latent_attention(nope, rotary, latent, rope, w_uk, w_uv, st.Causal(), mode=mode))
        assert_close(mode, out, oracle.latent_attention(nope, rotary, latent, rope, w_uk, w_uv, count, **how)[0], plain.latent_attention(nope, rotary, latent, rope, w_uk, w_uv, count, mode=mode, **how)[0], reduction=250)


LATENTS = [pytest.param(dtype, sizes, scaled, id=f"{dtype}-{'x'.join(map(str, sizes))}{'-scaled' if scaled else ''}") for dtype, sizes, scaled in (
    ("float32", (2, 37, 3, 40, 24, 20, 8), False), ("bfloat16", (1, 70, 4, 128, 64, 64, 32), False), ("float16", (2, 33, 5, 64, 32, 48, 0), False),
    ("bfloat16", (1, 50, 2, 512, 128, 128, 64), False), ("bfloat16", (1, 40, 2, 256, 32, 32, 16), True), ("float16", (1, 20, 3, 200, 16, 24, 8), True))]


@every
@pytest.mark.parametrize("dtype, sizes, scaled", LATENTS)
def test_latent_decompress(on, backend, dtype, sizes, scaled, rng):
    B, S, H, R, Dn, Dv, P = sizes
    kind = numpy_dtype(dtype)
    latent = normal(rng, (B, S, R), numpy_dtype("float8_e4m3fn") if scaled else kind)
    w_uk, w_uv = normal(rng, (H, R, Dn), kind, R ** -0.5), normal(rng, (H, R, Dv), kind, R ** -0.5)
    how = dict(k_rope=normal(rng, (B, S, P), kind) if P else None, latent_scale=(rng.random((B, S, -(-R // 128))) + 0.3).astype(np.float32) if scaled else None)
    got, truths, measures = arrays(*on.latent_decompress(latent, w_uk, w_uv, **how)), oracle.latent_decompress(latent, w_uk, w_uv, **how), plain.latent_decompress(latent, w_uk, w_uv, **how)
    for name, g, truth, measure in zip(("k", "v"), got, truths, measures):
        assert_close(name, g, truth, measure, reduction=R)
    if P:
        assert_same_bits("rotary part", got[0][..., Dn:], np.broadcast_to(how["k_rope"][:, None], (B, H, S, P)))


@every
@pytest.mark.parametrize("mode", ["absorbed", "decompressed"])
@pytest.mark.parametrize("dtype, rule", [("float32", "causal"), ("bfloat16", "window"), ("float16", "sink")])
def test_latent_attention(on, backend, dtype, rule, mode, rng):
    B, H, T, S, R, Dn, P, Dv = 1, 4, 9, 50, 96, 32, 16, 24
    kind = numpy_dtype(dtype)
    q_nope, q_rope, latent, k_rope = (normal(rng, s, kind) for s in ((B, H, T, Dn), (B, H, T, P), (B, S, R), (B, S, P)))
    w_uk, w_uv = normal(rng, (H, R, Dn), kind, R ** -0.5), normal(rng, (H, R, Dv), kind, R ** -0.5)
    count, sinks = oracle.visible(B, T, S, rule=RULES[rule][1]), normal(rng, H, np.float32)
    out, lse = arrays(*on.latent_attention(q_nope, q_rope, latent, k_rope, w_uk, w_uv, RULES[rule][0](), mode=mode, sink_logits=sinks, return_lse=True))
    how = dict(scale=(Dn + P) ** -0.5, sink_logits=sinks)                             # of the rebuilt width in both modes
    truth, truth_lse = oracle.latent_attention(q_nope, q_rope, latent, k_rope, w_uk, w_uv, count, **how)
    measure, measure_lse = plain.latent_attention(q_nope, q_rope, latent, k_rope, w_uk, w_uv, count, mode=mode, **how)
    assert_close("out", out, truth, measure, reduction=R + S)
    assert_close("lse", lse, truth_lse, measure_lse, reduction=R + S)


@every
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("parts, sink", [(2, False), (5, True), (1, True)])
def test_merge(on, backend, dtype, parts, sink, rng):
    B, Hq, T, Dv = 2, 3, 17, 40
    outs = [normal(rng, (B, Hq, T, Dv), numpy_dtype(dtype)) for _ in range(parts)]
    lses = [normal(rng, (B, Hq, T), np.float32, 4) for _ in range(parts)]
    for out, lse in zip(outs, lses):
        empty = rng.random(lse.shape) < 0.3
        empty[:, :, 3] = True
        out[empty], lse[empty] = 0, -np.inf
    sinks = np.array([0.5, -np.inf, 30.0], np.float32) if sink else None
    got = arrays(*on.merge_attention([on.put(o) for o in outs], [on.put(e) for e in lses], sink_logits=sinks))
    truths, measures = oracle.merge_attention(outs, lses, sink_logits=sinks), plain.merge_attention(outs, lses, sink_logits=sinks)
    for name, g, truth, measure in zip(("out", "lse"), got, truths, measures):
        assert_close(name, g, truth, measure, reduction=parts)


@every
@pytest.mark.parametrize("dtype, gates", [("float32", "float32"), ("float16", "float16"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("parts", [1, 3])
def test_weighted_sum(on, backend, dtype, gates, parts, rng):
    """Weights side by side as a model makes them, with 0, negative ones and -1 among them; parts whose heads stand inside."""
    if on.unavailable:
        pytest.skip(on.unavailable)
    B, Hq, T, Dv = 2, 3, 17, 40
    outs = [normal(rng, (B, T, Hq, Dv), numpy_dtype(dtype)) for _ in range(parts)]
    weights = normal(rng, (B, Hq, T, parts), numpy_dtype(gates))
    weights[0, 0, :3], weights[1, 1, :2] = -1, 0
    swap = (lambda x: x.transpose(0, 2, 1, 3)) if backend in ("reference", "numba") else lambda x: x.transpose(1, 2)
    held = on.put(weights)
    got, = arrays(merge.weighted_sum([swap(on.put(o)) for o in outs], [held[..., n] for n in range(parts)], backend))
    terms = lambda kind: sum(weights[..., n, None].astype(kind) * outs[n].transpose(0, 2, 1, 3).astype(kind) for n in range(parts))  # noqa: E731
    assert_close("out", got, terms(np.float64), terms(np.float32).astype(numpy_dtype(dtype)), reduction=parts)


# --------------------------------------------------------------------------------------------------------------- same bits
@every
def test_twice_the_same_call_gives_the_same_bits(on, backend, rng):
    q, k, v = made(rng, (2, 4, 2, 50, 70, 64, 64), "float16")
    first, second = (arrays(*on.sparse_attention(q, k, v, st.Causal(), return_lse=True)) for _ in range(2))
    for a, b in zip(first, second):
        assert_same_bits("forward", a, b)
    indices, lengths = chosen(rng, (2, 4, 2, 50, 70, 64, 64), 2, 9, {})
    first, second = (arrays(*on.sparse_attention(q, k, v, on.selection(indices), return_lse=True)) for _ in range(2))
    for a, b in zip(first, second):
        assert_same_bits("selection", a, b)


@every
@pytest.mark.parametrize("kind", ["pattern", "selection"])
def test_gradients_have_the_same_bits_twice(on, backend, kind, rng):
    pytest.importorskip("torch")
    case = (2, 4, 2, 20, 60, 64, 64)
    q, k, v = made(rng, case, "float16")
    if kind == "pattern":
        rule, count = st.Causal(), oracle.visible(2, 20, 60, rule=RULES["causal"][1])
    else:
        indices, _ = chosen(rng, case, 1, 12, {})
        rule, count = st.Selection(on.tensor(indices)), oracle.selection_count(indices, 60, 4)
    state = rng.bit_generator.state
    runs = []
    for _ in range(2):
        rng.bit_generator.state = state
        runs.append(gradients(on, q, k, v, rule, count, rng)[:3])
    for name, a, b in zip(("dq", "dk", "dv"), *runs):
        assert_same_bits(name, a, b)


@large
def test_a_permuted_batch_gives_the_same_rows(on, backend, rng):
    q, k, w = normal(rng, (4, 2, 30, 64), numpy_dtype("bfloat16")), normal(rng, (4, 200, 64), numpy_dtype("bfloat16")), normal(rng, (4, 2, 30), np.float32)
    order = np.array([2, 0, 3, 1])
    straight, permuted = on.indexer_topk(q, k, w, 17), on.indexer_topk(q[order], k[order], w[order], 17)
    assert_same_bits("indices", arrays(straight.indices)[0][order], arrays(permuted.indices)[0])


# --------------------------------------------------------------------------------------------------------- memory as it lies
@every
@pytest.mark.parametrize("layout", ["heads last", "sliced", "expanded"])
def test_strides_are_read_in_place(on, backend, layout, rng):
    B, H, T, D = 2, 4, 40, 32
    if layout == "heads last":
        q, k, v = (on.put(normal(rng, (B, T, H, D), np.float16)).swapaxes(1, 2) for _ in range(3))
    elif layout == "sliced":
        q, k, v = (on.put(normal(rng, (B, H, T, 3 * D), np.float16))[..., n * D:(n + 1) * D] for n in range(3))
    else:
        q, k, v = (on.put(normal(rng, (1, 1, T, D), np.float16)) for _ in range(3))
        q, k, v = (x.expand(B, H, T, D) if hasattr(x, "expand") else np.broadcast_to(x, (B, H, T, D)) for x in (q, k, v))
    from numeric import to_numpy
    got, = arrays(on.sparse_attention(q, k, v, st.Causal()))
    q, k, v = (np.ascontiguousarray(to_numpy(x)) for x in (q, k, v))
    seen = oracle.visible(B, T, T, rule=RULES["causal"][1])
    assert_close("out", got, oracle.attention(q, k, v, seen, scale=D ** -0.5)[0], plain.attention(q, k, v, seen, scale=D ** -0.5)[0], reduction=T + D)
