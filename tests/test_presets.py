"""Presets against the sentences of their papers, converters against the libraries themselves, layer plans, plots."""
import numpy as np
import pytest

from sparsetile.ops import convert, presets
from sparsetile.ops.patterns import Blocks, Causal, Full, Global, PerHead, RandomBlocks, Window
from sparsetile.ops.plan import Call, LayerPlan, Selector


def mask_of(sees, T, S=None):
    S = T if S is None else S
    return np.array([[sees(i, j) for j in range(S)] for i in range(T)], bool)


# ------------------------------------------------------------------------------------------------ papers
@pytest.mark.parametrize("l", [1, 4, 7])
def test_sparse_transformer_strided(l):
    assert np.array_equal(presets.sparse_transformer_strided(l).mask(40, 40), mask_of(lambda i, j: max(0, i - l) <= j <= i or (j <= i and (i - j) % l == 0), 40))


@pytest.mark.parametrize("l, c", [(4, 1), (8, 3), (5, 5)])
def test_sparse_transformer_fixed(l, c):
    t = l - c
    assert np.array_equal(presets.sparse_transformer_fixed(l, c).mask(40, 40), mask_of(lambda i, j: j <= i and (j // l == i // l or j % l in range(t, l)), 40))


def test_longformer():
    assert np.array_equal(presets.longformer(8).mask(30, 30), mask_of(lambda i, j: abs(i - j) <= 4, 30))
    assert presets.longformer(8).mask(30, 30)[15].sum() == 9
    assert np.array_equal(presets.longformer(8, dilation=3, globals=[2, 9]).mask(40, 40),
                          mask_of(lambda i, j: (abs(i - j) <= 12 and (i - j) % 3 == 0) or i in (2, 9) or j in (2, 9), 40))
    heads = presets.longformer(8, dilation=(1, 1, 2, 4), globals=[0])
    assert heads.heads == 4 and np.array_equal(heads.mask(30, 30)[2], presets.longformer(8, dilation=2, globals=[0]).mask(30, 30))
    assert presets.longformer(512, globals=range(64)) == Window(256, 256) | Global(range(64))


def test_bigbird():
    b, n = 4, 16
    rule = presets.bigbird(b, window=3, globals=2, random=3, seed=5)
    blocks = rule.mask(n * b, n * b)[::b, ::b]
    assert np.array_equal(rule.mask(n * b, n * b), np.repeat(np.repeat(blocks, b, 0), b, 1))
    fixed = mask_of(lambda i, j: abs(i - j) <= 1 or i < 2 or j < 2, n)
    assert (blocks >= fixed).all() and ((blocks & ~fixed)[2:].sum(1) == 3).all()  # random blocks fall on nothing that is there already
    layers = [presets.bigbird(b, seed=5, layer=layer) for layer in range(12)]
    assert len(set(layers)) == 12 and len({layer.mask(64, 64).tobytes() for layer in layers}) == 12 and presets.bigbird(b, seed=5) == layers[0]
    assert presets.bigbird(b, seed=1, layer=0) != presets.bigbird(b, seed=0, layer=1) and presets.bigbird(b, seed=1) != presets.bigbird(b, seed=0)
    etc = presets.bigbird(b, globals=5, mode="etc").mask(64, 64)
    assert etc[:5].all() and etc[:, :5].all() and not etc[8:, 5:8].any(1).all()
    assert presets.bigbird(b, random=0).mask(64, 64).sum() == np.repeat(np.repeat(fixed, b, 0), b, 1).sum()


def test_windows_with_and_without_sinks():
    assert np.array_equal(presets.mistral(3).mask(9, 9), mask_of(lambda i, j: i - 3 < j <= i, 9)) and presets.mistral(3).mask(9, 9)[5].sum() == 3
    assert np.array_equal(presets.streaming_llm(2, 3).mask(12, 12), mask_of(lambda i, j: j <= i and (j < 2 or i - 3 < j), 12))
    assert presets.streaming_llm(4, 1020).mask(1, 5000).sum() == 1024 and presets.dense() == Full() and presets.dense(causal=True) == Causal()


@pytest.mark.parametrize("call, argument", [
    (lambda: presets.longformer(7), "window"), (lambda: presets.longformer(8, dilation=0), "dilation"), (lambda: presets.bigbird(window=2), "window"), (lambda: presets.bigbird(mode="x"), "mode"),
    (lambda: presets.bigbird(seed=-1), "seed"), (lambda: presets.mistral(0), "window"), (lambda: presets.streaming_llm(-1), "n"), (lambda: presets.sparse_transformer_strided(0), "stride"),
    (lambda: presets.sparse_transformer_fixed(4, 9), "summary"), (lambda: convert.from_flash_attention(-2), "left"), (lambda: convert.from_jax((1, 2, 3)), "local_window_size"), (lambda: convert.from_huggingface(0), "sliding_window")])
def test_bad_arguments_are_named(call, argument):
    with pytest.raises(ValueError, match=argument):
        call()


# ------------------------------------------------------------------------------------------------ other libraries
def test_huggingface_counts_the_query():
    masking = pytest.importorskip("transformers.masking_utils")
    overlay, causal = masking.sliding_window_overlay(5), masking.causal_mask_function
    want = mask_of(lambda i, j: bool(overlay(0, 0, i, j)) and bool(causal(0, 0, i, j)), 20)
    assert np.array_equal(convert.from_huggingface(5).mask(20, 20), want) and convert.from_huggingface(5) == presets.mistral(5) and convert.from_huggingface(None) == Causal()


@pytest.mark.parametrize("window, causal", [((3, 1), False), (2, False), ((4, 0), True), (None, True), ((2, 5), True)])
@pytest.mark.parametrize("T, S", [(9, 9), (5, 9), (9, 5)])
def test_jax_local_windows(window, causal, T, S):
    jax = pytest.importorskip("jax")
    v = np.broadcast_to(np.eye(S, dtype=np.float32), (1, S, S))[:, :, None, :]  # equal scores over one-hot values show who is seen
    out = jax.nn.dot_product_attention(np.zeros((1, T, 1, S), np.float32), np.zeros((1, S, 1, S), np.float32), v, local_window_size=window, is_causal=causal)
    want = convert.from_jax(window, causal).mask(T, S, q_start=0)
    some = want.any(1)  # JAX attends evenly to every key where a query sees none
    assert np.array_equal((np.asarray(out)[0, :, 0] > 0)[some], want[some])


def test_torch_causality_is_top_left():
    torch = pytest.importorskip("torch")
    T, S = 4, 7
    out = torch.nn.functional.scaled_dot_product_attention(torch.zeros(1, T, S), torch.zeros(1, S, S), torch.eye(S)[None], is_causal=True)
    assert np.array_equal(out[0].numpy() > 0, convert.from_torch_sdpa(True).mask(T, S, q_start=0)) and convert.from_torch_sdpa() == Full()


def test_conventions_by_name():
    import sparsetile
    assert all(getattr(sparsetile, name) is getattr(convert, name) for name in vars(convert) if name.startswith("from_"))
    T, S = 6, 10
    assert np.array_equal(convert.from_flash_attention(3, 1).mask(T, S), mask_of(lambda i, j: i + S - T - 3 <= j <= i + S - T + 1, T, S))
    assert convert.from_flash_attention() == Full() and convert.from_flash_attention(causal=True) == Causal() and convert.from_flash_attention(7, 3, causal=True) == Window(7) and convert.from_flash_attention(-1, 2) == Window(None, 2)
    assert convert.from_huggingface_longformer(512) == Window(256, 256) and convert.from_longformer_code(256) == Window(256, 256)
    assert convert.from_longformer_code(4, 2).mask(40, 40)[20].sum() == 9 and convert.from_sparse_transformer(8).mask(20, 20)[15].sum() == 9


# ------------------------------------------------------------------------------------------------ plans
plan = LayerPlan.of([(range(0, 11), presets.longformer(512, globals=[0])), (range(11, 21), Selector(top_k=64, pool=4, force_last=2)), (range(21, 31), presets.longformer(512, globals=[0])), (31, presets.dense())])


def test_layer_plan():
    assert len(plan) == 32 and plan[10] == plan[21] == presets.longformer(512, globals=[0]) and plan[11] == Selector(top_k=64, pool=4, force_last=2) and plan[31] == Full() and list(plan)[0] == plan[0]
    again = LayerPlan.from_yaml(plan.to_yaml())
    assert again == plan and hash(again) == hash(plan) and LayerPlan.from_data(plan.to_data()) == plan and "layers 11-20" in str(plan)
    assert plan[11].arguments() == dict(top_k=64, pool=4, force_first=0, force_last=2, causal=True)
    T = 600
    assert plan.pairs(T, T) == 21 * plan[0].pairs(T, T) + T * T + 10 * sum(min(256, t + 1) for t in range(T))
    assert LayerPlan.of([(0, PerHead([Full(), Causal(), Window(0), Window(0)])), (1, Full())]).pairs(10, 10) == (100 + 55 + 10 + 10) // 4 + 100  # of one head each
    assert LayerPlan.of([(0, PerHead([Full(), Causal()]) & Blocks(np.eye(2, dtype=bool), 4, 4)), (1, presets.bigbird(8, layer=1))]) == LayerPlan.from_yaml(
        LayerPlan.of([(0, PerHead([Full(), Causal()]) & Blocks(np.eye(2, dtype=bool), 4, 4)), (1, presets.bigbird(8, layer=1))]).to_yaml())


def test_a_plan_with_a_call():
    mixed = LayerPlan.of([(0, Window(3)), (1, Call("performer_attention", features=64, causal=True)), (2, Causal())])
    assert LayerPlan.from_yaml(mixed.to_yaml()) == mixed and mixed.pairs(20, 20) == Window(3).pairs(20, 20) + Causal().pairs(20, 20) and "performer_attention(causal=True, features=64)" in str(mixed)
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 9, 4))
    import sparsetile as st
    assert np.array_equal(mixed[1].run(q, k, v), st.performer_attention(q, k, v, features=64, causal=True))
    with pytest.raises(ValueError, match="Call: function must be a public function of sparsetile, got 'import_module'"):
        Call("import_module").run(q, k, v)


def reach_by_walking(masks, T):
    """Layers until everyone has heard of everyone, or of every earlier one: sets, one layer after the other."""
    heard, causal = [{p} for p in range(T)], not any(np.triu(mask, 1).any() for mask in masks)
    for n, mask in enumerate(masks, 1):
        heard = [heard[p].union(*(heard[s] for s in range(T) if mask[p, s])) for p in range(T)]
        if all(len(heard[p]) == (p + 1 if causal else T) for p in range(T)):
            return n
    return None


@pytest.mark.parametrize("rules", [
    [Window(3)] * 6 + [Causal()], [Window(7)] * 2, [Window(7)] * 4, [Causal()], [presets.longformer(4, globals=[0])] * 3, [Window(2, 2)] * 3 + [Full()], [Window(20), Window(1)] * 2, [Window(1, 0), Window(0, 1)] * 12,
    [presets.sparse_transformer_strided(5)] * 3, [PerHead([Window(2), presets.sparse_transformer_fixed(5, 1)])] * 3], ids=str)
def test_reach_of_a_plan(rules):
    T = 21
    masks = [np.logical_or.reduce([part.mask(T, T) for part in rule.rules()]) for rule in rules]
    assert LayerPlan.of(list(enumerate(rules))).hops(T) == reach_by_walking(masks, T)
    if len(set(rules)) == 1 and rules[0].hops(T) and rules[0].hops(T) <= len(rules):
        assert LayerPlan.of(list(enumerate(rules))).hops(T) == rules[0].hops(T)


def test_reach_of_what_content_decides():
    """Surely: forced blocks, and all where there are no more than top_k. At best: everything."""
    T = 24
    few, forced = Selector(top_k=3, pool=4), Selector(top_k=3, pool=4, force_first=1, force_last=1)
    first = [[s for s in range(T) if row[s]] for row in forced.sure(T)]
    assert first[11] == [*range(12)] and first[12] == [0, 1, 2, 3, 12] and first[23] == [0, 1, 2, 3, 20, 21, 22, 23] and few.sure(T)[23].sum() == 0
    assert Selector(top_k=2, pool=4, causal=False, force_last=1).sure(T)[0].nonzero()[0].tolist() == [20, 21, 22, 23] and Selector(top_k=6, pool=4, causal=False).sure(T).all()
    plan = LayerPlan.of([(0, Window(3)), (1, forced), (2, Causal())])
    assert (plan.hops(T), plan.hops(T, chosen="any"), plan.hops(1)) == (3, 2, 0)
    state = LayerPlan.of([(0, Call("linear_attention", causal=True)), (1, Window(3))])
    assert (state.hops(T), state.hops(T, chosen="any")) == (None, 1)
    assert LayerPlan.of([(0, Call("linear_attention")), (1, Window(3))]).hops(T, chosen="any") == 1  # both ways: everyone hears of everyone


@pytest.mark.parametrize("call, word", [
    (lambda: Call("a b"), "function must be the name"), (lambda: Call("f", x=[1]), "x must be a number"), (lambda: LayerPlan.from_yaml("- {layers: 0, call: {features: 3}}"), r"plan\[0\].call"),
    (lambda: plan.hops(8, chosen="some"), 'chosen: expected "none" or "any"'),
    (lambda: LayerPlan.of([(range(3), Full()), (2, Causal())]), "layer 2 is given twice"), (lambda: LayerPlan.of([(range(2), Full()), (4, Causal())]), "layer 2 is missing"), (lambda: LayerPlan.of([(0, "x")]), "Selector"),
    (lambda: LayerPlan.of([(-1, Full())]), "layer"), (lambda: Selector(top_k=0), "top_k"), (lambda: Selector("lsh"), "kind"), (lambda: Selector(causal=1), "causal"), (lambda: LayerPlan.from_yaml("a: 1"), "list"),
    (lambda: LayerPlan.from_yaml("- {layers: 0}"), r"plan\[0\]"), (lambda: LayerPlan.from_yaml("- {layers: [0, -1], pattern: full}"), r"plan\[0\].layers"),
    (lambda: LayerPlan.from_yaml("- {layers: 0, pattern: {windw: {}}}"), r"plan\[0\].pattern"), (lambda: LayerPlan.from_yaml("- {layers: 0, selector: {topk: 3}}"), r"plan\[0\].selector")])
def test_bad_plans_name_the_entry(call, word):
    with pytest.raises((ValueError, TypeError), match=word):
        call()


# ------------------------------------------------------------------------------------------------ pictures
def test_plots(tmp_path):
    text = presets.sparse_transformer_strided(4).plot(8, 8)
    assert text.splitlines()[2:] == ["|█       |", "|██      |", "|███     |", "|████    |", "|█████   |", "| █████  |", "|  █████ |", "|   █████|"]
    assert "28 of" not in text and f"{presets.sparse_transformer_strided(4).pairs(8, 8)} of 64 pairs" in text
    large = presets.streaming_llm(4, 1020).plot(100000, 100000)
    assert max(map(len, large.splitlines()[2:])) == 66 and "(no pairs)" in Full().plot(0, 3)
    pytest.importorskip("matplotlib")
    for name, rule in (("a", presets.bigbird(8, random=2)), ("b", presets.longformer(8, dilation=(1, 2), globals=[0])), ("c", RandomBlocks(1, 8) & Causal())):
        rule.plot(64, 64, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
