"""Hypothesis over shapes, patterns, selections and options, every backend against the float64 oracle. Derandomised: the same cases in every run."""
import numpy as np
import oracle
import pytest
from drivers import LARGE, numpy_dtype
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from judge import attention, gradients, indexer_scores, indexer_topk, normal, selection_arrays
from numeric import assert_topk
from pattern_cases import brute, fine, rules

import sparsetile

pytestmark = pytest.mark.parametrize("backend", LARGE)
some = settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
few = settings(some, max_examples=15, suppress_health_check=[*some.suppress_health_check, HealthCheck.filter_too_much])
floats = st.sampled_from(["float32", "float16", "bfloat16"])
seeds = st.integers(0, 2 ** 32 - 1)
groups = st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 3, 5, 7]))
# An error is measured against the plain formula's, so there must be enough of it: at least 16 rows of 16 values. Smaller ones are in test_traps_selection.
widths = st.sampled_from([16, 31, 33, 64, 72, 100, 128])
lengths = st.sampled_from([1, 2, 15, 16, 17, 33, 64, 65, 100])


@st.composite
def problems(draw, most=100):
    """B, Hq, Hk, T, S, D, Dv, element type, a generator, options of the model and of positions."""
    rng = np.random.default_rng(draw(seeds))
    B, (Hk, group), T, S = draw(st.integers(1, 2)), draw(groups), draw(lengths), draw(lengths)
    T = max(T, -(-16 // (B * Hk * group)))
    case = B, Hk * group, Hk, min(T, most), min(S, most), draw(widths), draw(widths)
    options = {}
    if draw(st.booleans()):
        options["sink_logits"] = normal(rng, Hk * group, np.float32)
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from([0.5, 4.0, 50.0]))
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([0.01, 0.2, -0.5]))
    where = draw(st.sampled_from(["", "", "q_start", "starts", "kv_length"]))
    if where == "q_start":
        options["q_start"] = draw(st.integers(-20, 120))
    if where == "starts":
        options["q_start"] = rng.integers(-min(case[3], 10), case[4] + 1, B).astype(np.int32)  # known on the device only: from -T to S
    if where == "kv_length":
        options["kv_length"] = rng.integers(-1, case[4] + 3, B).astype(np.int32)
    return case, numpy_dtype(draw(floats)), rng, options


def several(count):
    """Where a query sees one key its gradient is nothing but cancellation, to exactly 0 in the plain formula: enough queries must see more."""
    assume(((count > 0).sum(axis=-1) > 1).mean() > 0.2)
    return count


def inputs(case, dtype, rng):
    B, Hq, Hk, T, S, D, Dv = case
    return normal(rng, (B, Hq, T, D), dtype), normal(rng, (B, Hk, S, D), dtype), normal(rng, (B, Hk, S, Dv), dtype)


def counted(rule, case, options):
    """[B,1 or heads,T,S] from the pattern's definition, pair by pair."""
    B, _, _, T, S, _, _ = case
    limit = np.full(B, S) if "kv_length" not in options else np.clip(options["kv_length"], 0, S)
    start = np.broadcast_to(options["q_start"], (B,)) if "q_start" in options else limit - T
    seen = np.stack([brute(rule, T, S, int(start[b])).reshape(-1, T, S) & (np.arange(S) < limit[b]) for b in range(B)])
    return seen


@some
@given(problem=problems(), rule=st.one_of(rules, fine))
def test_attention_over_any_pattern(on, backend, problem, rule):
    case, dtype, rng, options = problem
    attention(on, *inputs(case, dtype, rng), rule, counted(rule, case, options), **options)


@few
@given(problem=problems(65), rule=st.one_of(rules, fine), with_lse=st.booleans())
def test_gradients_over_any_pattern(on, backend, problem, rule, with_lse):
    pytest.importorskip("torch")
    case, dtype, rng, options = problem
    gradients(on, *inputs(case, dtype, rng), rule, several(counted(rule, case, options)), rng, with_lse=with_lse, **options)


@st.composite
def entries(draw, case, rng):
    B, Hq, Hk, T, S, _, _ = case
    G, K, g = draw(st.sampled_from([1, Hk, Hq])), draw(st.sampled_from([1, 2, 7, 16, 33])), draw(st.sampled_from([1, 1, 2, 5, 16, 64]))
    low, high = draw(st.sampled_from([(0, -(-S // g)), (-3, -(-S // g) + 3), (-2 ** 31, 2 ** 31 - 1)]))
    indices = rng.integers(low, high, (B, G, T, K)).astype(np.int32)
    stops = rng.integers(-2, K + 2, (B, G, T)).astype(np.int32) if draw(st.booleans()) else None
    return indices, stops, g, draw(st.booleans())


@some
@given(problem=problems(40), data=st.data())
def test_attention_over_any_selection(on, backend, problem, data):
    case, dtype, rng, options = problem
    indices, stops, g, causal = data.draw(entries(case, rng))
    where = {name: options[name] for name in ("kv_length", "q_start") if name in options}
    count = oracle.selection_count(indices, case[4], case[1], lengths=stops, granularity=g, causal=causal, **where)
    attention(on, *inputs(case, dtype, rng), on.selection(indices, stops, granularity=g, causal=causal), count, **options)


@few
@given(problem=problems(33), data=st.data())
def test_gradients_over_any_selection(on, backend, problem, data):
    pytest.importorskip("torch")
    case, dtype, rng, options = problem
    indices, stops, g, causal = data.draw(entries(case, rng))
    where = {name: options[name] for name in ("kv_length", "q_start") if name in options}
    count = oracle.selection_count(indices, case[4], case[1], lengths=stops, granularity=g, causal=causal, **where)
    rule = sparsetile.Selection(on.tensor(indices), lengths=None if stops is None else on.tensor(stops), granularity=g, causal=causal)
    gradients(on, *inputs(case, dtype, rng), rule, several(count), rng, **options)


@some
@given(seed=seeds, B=st.integers(1, 2), T=st.sampled_from([1, 2, 17]), S=st.sampled_from([1, 3, 31, 64, 100, 513, 2000]), k=st.sampled_from([1, 2, 7, 30, 64, 100, 700]),
       kind=st.sampled_from(["normal", "ties", "specials", "narrow"]), windows=st.booleans())
def test_topk_is_exact(on, backend, seed, B, T, S, k, kind, windows):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((B, T, S)).astype(np.float32)
    if kind == "ties":
        x = np.round(2 * x)
    if kind == "specials":
        x = np.where(rng.random(x.shape) < 0.6, x, rng.choice(np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 3e38, 1e-45], np.float32), x.shape))
    if kind == "narrow":
        x = (10 + 1e-5 * x).astype(np.float32)
    window, seen = {}, None
    if windows:
        window = {"key_start": rng.integers(-3, S + 3, (B, T)).astype(np.int32), "key_end": rng.integers(-3, S + 3, (B, T)).astype(np.int32)}
        seen = (np.arange(S) >= window["key_start"][..., None]) & (np.arange(S) < window["key_end"][..., None])
    assert_topk("topk", *selection_arrays(on.topk(x, k, **window)), x, k, visible=seen)


@some
@given(seed=seeds, B=st.integers(1, 2), H=st.sampled_from([1, 2, 5, 16]), T=st.sampled_from([1, 3, 17, 40]), S=st.sampled_from([1, 5, 31, 64, 130]), D=st.sampled_from([1, 16, 31, 64, 128]),
       k=st.sampled_from([1, 4, 9, 33, 140]), dtype=st.sampled_from(["float32", "float16", "bfloat16", "float8_e4m3fn"]), causal=st.booleans(), data=st.data())
def test_indexer(on, backend, seed, B, H, T, S, D, k, dtype, causal, data):
    rng = np.random.default_rng(seed)
    q, keys, weights = normal(rng, (B, H, T, D), numpy_dtype(dtype)), normal(rng, (B, S, D), numpy_dtype(dtype)), normal(rng, (B, H, T), np.float32)
    options = {"causal": causal}
    if data.draw(st.booleans()):
        options["k_scale"] = (rng.random((B, S)) + 0.2).astype(np.float32)
    if data.draw(st.booleans()):
        options["key_start"] = rng.integers(-3, S + 1, (B, T)).astype(np.int32)
    if data.draw(st.booleans()):
        options["key_end"] = rng.integers(-3, S + 4, (B, T)).astype(np.int32)
    if data.draw(st.booleans()):
        options["q_start"] = data.draw(st.integers(-5, S + 5))
    options["activation"] = data.draw(st.sampled_from(["relu", "relu", None]))
    indexer_scores(on, q, keys, weights, **options)
    pool = data.draw(st.sampled_from([1, 1, 4, 32]))
    first = data.draw(st.integers(0, min(k, 2)))
    indexer_topk(on, q, keys, weights, k, pool=pool, force_first=first, force_last=data.draw(st.integers(0, min(k - first, 2))), return_scores=data.draw(st.booleans()), **options)
