"""Patterns: their meaning against the definitions pair by pair, their algebra, text, YAML, counts and reach, and what bad arguments get."""
import itertools
import pickle
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pattern_cases import brute, drawn, rules

from sparsetile.ops.patterns import (Blocks, Causal, Compressed, Dilated, Documents, Fixed, Full, Global, Pattern, PerHead, RandomBlocks, Sink, Strided, Window)

quick = settings(max_examples=60, deadline=None)
small = st.tuples(st.integers(0, 20), st.integers(0, 24), st.sampled_from([None, None, 0, -9, 30]))
EACH = [Full(), Causal(), Window(0), Window(3), Window(2, 2), Window(None, 3), Window(2, None), Window(1, 0, block=4), Window(None, 0, block=5), Dilated(6, 4, 2), Dilated(None, None, 3), Strided(5),
        Compressed(32, 16), Compressed(3, 5), Fixed(4, 1), Fixed(4, 0), Fixed(4, 4), Global([]), Global([2, 5, 5]), Global(range(30)), Global([1, 9], symmetric=False), Global(range(0, 24, 2)), Sink(0), Sink(3), Sink(99),
        Documents([3, 0, 9, 4]), Documents([]), Blocks(np.eye(4, dtype=bool), 5, 6), RandomBlocks(2, 4, 1), RandomBlocks(2, 4, 1, causal=True), RandomBlocks(3, 5, 7, exclude=[Window(1, 1, block=5)]),
        Causal() & (Window(3) | Strided(4)), ~Window(2) & Causal(), PerHead([Causal(), Window(1), Causal(), Full()]), Blocks(np.arange(8).reshape(2, 2, 2) % 3 == 0, 6, 7) & Causal()]


# ------------------------------------------------------------------------------------------------ meaning
@pytest.mark.parametrize("rule", EACH, ids=lambda r: repr(r)[:60])
@pytest.mark.parametrize("T, S, q_start", [(9, 20, None), (20, 9, None), (1, 17, None), (12, 20, 30), (8, 8, -4), (0, 5, None), (5, 0, None)])
def test_mask_is_the_definition(rule, T, S, q_start):
    assert np.array_equal(rule.mask(T, S, q_start), brute(rule, T, S, q_start))


@quick
@given(rules, small)
def test_mask_of_expressions(rule, size):
    assert np.array_equal(rule.mask(*size), brute(rule, *size))


@pytest.mark.parametrize("rule, rows", [
    (Window(1), ["x...", "xx..", ".xx.", "..xx"]), (Window(0), ["x...", ".x..", "..x.", "...x"]), (Window(9), ["x...", "xx..", "xxx.", "xxxx"]),
    (Window(1, 1), ["xx..", "xxx.", ".xxx", "..xx"]), (Strided(2), ["x.x.", ".x.x", "x.x.", ".x.x"]), (Causal() & Fixed(2, 1), ["x...", "xx..", ".xx.", ".xxx"]), (Compressed(2, 1), ["....", "x...", "xx..", "xxx."]),
    (Global([1]), [".x..", "xxxx", ".x..", ".x.."]), (Global([1], symmetric=False), [".x.."] * 4), (Documents([1, 3]), ["x...", ".xxx", ".xxx", ".xxx"]),
    (Dilated(2, 2, 2), ["x.x.", ".x.x", "x.x.", ".x.x"]), (Sink(1) | Window(0), ["x...", "xx..", "x.x.", "x..x"]), (~Causal(), [".xxx", "..xx", "...x", "...."]),
])
def test_pictures_drawn_by_hand(rule, rows):
    assert ["".join(".x"[int(x)] for x in row) for row in rule.mask(4, 4)] == rows


def test_queries_stand_bottom_right():
    assert np.array_equal(Causal().mask(2, 5), [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    assert np.array_equal(Causal().mask(4, 2), [[0, 0], [0, 0], [1, 0], [1, 1]])
    whole = (Causal() & (Window(3) | Strided(5))).mask(30, 30)
    for p in range(30):
        assert np.array_equal((Causal() & (Window(3) | Strided(5))).mask(1, 30, q_start=p)[0], whole[p])


@pytest.mark.parametrize("rule", EACH, ids=lambda r: repr(r)[:60])
@pytest.mark.parametrize("framework", ["torch", "jax", "int"])
def test_visible_in_other_frameworks(rule, framework):
    p, s = np.arange(15, 24), np.arange(24)
    if framework == "int":
        assert np.array_equal(np.asarray(rule.visible(17, 3, 24)).reshape(-1), rule.mask(9, 24)[..., 2, 3].reshape(-1))
        return
    if framework == "torch":
        torch = pytest.importorskip("torch")
        got = rule.visible(torch.from_numpy(p)[:, None].int(), torch.from_numpy(s).int(), 24).numpy()
    else:
        jnp = pytest.importorskip("jax.numpy")
        got = np.asarray(rule.visible(jnp.asarray(p)[:, None], jnp.asarray(s), 24))
    assert np.array_equal(got, rule.mask(9, 24))


# ------------------------------------------------------------------------------------------------ algebra
@quick
@given(rules, rules, rules)
def test_laws(a, b, c):
    assert a & b == b & a and a | b == b | a and (a & b) & c == a & (b & c) and (a | b) | c == a | (b | c)
    assert a & a == a and a | a == a and ~~a == a and a | Full() == Full() and a & Full() == a
    assert hash(a & b) == hash(b & a) and {a | b: 1}[b | a] == 1


def test_names_for_one_thing():
    assert Causal() == Window(None, 0) and Full() == Window(None, None) == Window(None, None, block=4) and repr(Window(None, 0)) == "Causal()"
    assert Global([3, 1, 1]) == Global((1, 3)) == Global(np.array([1, 3])) != Global([1, 3], symmetric=False)
    assert Global(range(64)) == Global(list(range(64))) and Window(3) != Window(4) and Strided(2) != Dilated(None, None, 2)
    assert Blocks(np.eye(2, dtype=bool), 4, 4) == Blocks(np.eye(2, dtype=np.int64), 4, 4) != Blocks(np.eye(2, dtype=bool), 4, 8)
    assert PerHead([Causal(), Full()]) & Causal() == PerHead([Causal(), Causal()]) and ~PerHead([Causal()]) == PerHead([~Causal()])
    assert PerHead([Causal(), Full()]) | PerHead([Sink(1), Sink(2), Sink(3), Sink(4)]) == PerHead([Causal() | Sink(1), Causal() | Sink(2), Full(), Full()])


def test_frozen_and_pickled():
    for rule in EACH:
        assert pickle.loads(pickle.dumps(rule)) == rule
        with pytest.raises(AttributeError):
            rule.left = 3


# ------------------------------------------------------------------------------------------------ text and YAML
@quick
@given(rules)
def test_text_and_yaml_round_trip(rule):
    for back in (Pattern.parse(rule.canonical()), Pattern.from_yaml(rule.to_yaml()), Pattern.from_data(rule.to_data()), Pattern.from_data(rule.canonical())):
        assert back == rule and hash(back) == hash(rule) and back.canonical() == rule.canonical()


@pytest.mark.parametrize("rule", EACH, ids=lambda r: repr(r)[:60])
def test_text_and_yaml_of_each(rule):
    assert Pattern.parse(rule.canonical()) == rule == Pattern.from_yaml(rule.to_yaml())
    assert rule.has_tensors == any(name in rule.canonical() for name in ("Blocks('", "Documents"))


@pytest.mark.parametrize("text", ["", "1", "Window(", "Causal() + Full()", "__import__('os')", "Causal().mask", "open('x')", "Window(-1)", "Window(1, 2, 3, 4)", "Window(x=1)", "Nothing()", "not Causal()",
                                  "[Causal()]", "range(3)", "Global(range(10**30))", "(" * 5000, "Blocks('2x2:!!', 1, 1)", "Blocks('99999x99999:eJw=', 1, 1)", "lambda: 1", "Window(**{'left': 1})"])
def test_bad_text_is_one_error(text):
    with pytest.raises(ValueError):
        Pattern.parse(text)


@pytest.mark.parametrize("text", ["a: [", "- causal", "window: {left: -1}", "window: {lft: 1}", "window: 3", "strided: {}", "nothing: {}", "and: []", "and: {a: 1}", "{causal: null, full: null}", "3",
                                  "!!python/object/apply:os.system ['true']", "and: [&x causal, *x]", "global: {tokens: [[0, 99999999999]]}", "global: {tokens: 3}", "sink: {n: true}", "sink: {n: 1.5}",
                                  "random_blocks: {count: 1, block: 4, exclude: causal}", "blocks: {mask: abc}"])
def test_bad_yaml_is_one_error(text):
    with pytest.raises(ValueError):
        Pattern.from_yaml(text)


# ------------------------------------------------------------------------------------------------ counts
@quick
@given(rules, st.tuples(st.sampled_from([0, 1, 7, 64, 130, 300]), st.sampled_from([0, 1, 31, 100, 257]), st.sampled_from([None, 0, -50, 60])))
def test_pairs_are_those_of_the_mask(rule, size):
    assert rule.pairs(*size) == rule.mask(*size).sum()


def test_pairs_density_flops_at_any_length():
    N = 2 ** 20
    assert Causal().pairs(N, N) == N * (N + 1) // 2 and Full().pairs(3, N) == 3 * N
    assert Window(1023).pairs(N, N) == 1024 * N - 1023 * 1024 // 2
    assert (Causal() & Strided(1000)).pairs(N, N) == sum(N - d for d in range(0, N, 1000))
    assert (Documents([N, 5]) & Causal()).pairs(N + 5, N + 5) == N * (N + 1) // 2 + 15  # position by position no longer
    assert Full().density(5, 7) == 1.0 and Causal().density(0, 7) == 0.0 and Causal().density(1, 8) == 1.0
    assert Causal().flops(4, 4, Hq=3, D=8, Dv=2) == 2 * 10 * 3 * 10
    heads = PerHead([Causal(), Full()])
    assert heads.pairs(4, 4) == 26 and heads.density(4, 4) == 26 / 32 and heads.flops(4, 4, Hq=4, D=1, Dv=1) == 2 * 26 * 2 * 2


# ------------------------------------------------------------------------------------------------ reach
def slow_hops(rule, T):
    edges = np.eye(T, dtype=bool)
    for mask in rule.mask(T, T).reshape(-1, T, T):
        edges |= mask
    goal = np.ones((T, T), bool) if np.triu(edges, 1).any() else np.tril(np.ones((T, T), bool))
    reach = np.eye(T, dtype=bool)
    for layers in range(T + 1):
        if (reach & goal == goal).all():
            return layers
        reach = reach @ edges
    return None


@quick
@given(rules, st.integers(1, 24))
def test_hops_by_matrix_powers(rule, T):
    assert rule.hops(T) == slow_hops(rule, T)


def test_hops_by_hand():
    assert [Full().hops(5), Causal().hops(5), Window(1, 1).hops(9), Window(2).hops(9), Full().hops(1)] == [1, 1, 8, 4, 0]
    assert Strided(2).hops(6) is None and (Window(1, 1) | Global([0])).hops(50) == 2 and (Causal() & (Window(7) | Strided(8))).hops(64) == 2
    start = time.perf_counter()
    assert Window(256, 256).hops(4096) == 16 and time.perf_counter() - start < 60


# ------------------------------------------------------------------------------------------------ random blocks
def test_random_blocks_are_the_same_everywhere():
    """Written down once: any machine, backend or version that answers otherwise breaks trained models."""
    rule = RandomBlocks(3, 4, seed=7)
    assert [sorted(drawn(rule, i, 64)) for i in range(5)] == GOLDEN
    assert [sorted(set((np.flatnonzero(row) // 4).tolist())) for row in rule.mask(20, 64, 0)[::4]] == GOLDEN


GOLDEN = [[4, 5, 8], [1, 5, 12], [1, 2, 13], [0, 9, 12], [1, 9, 14]]


@quick
@given(st.integers(0, 5), st.integers(1, 9), st.integers(0, 2 ** 63 - 1), st.booleans(), st.sampled_from([(), (Window(1, 1, block=6),), (Global(range(12)), Window(0, 0, block=4)), (Window(8),)]))
def test_random_blocks_are_distinct_and_outside_what_is_excluded(count, block, seed, causal, exclude):
    """What is free by definition: not every pair of the block (if causal: that is not later than its query) is excluded already."""
    rule, S = RandomBlocks(count, block, seed, causal, exclude), 96
    mask, n = rule.mask(S, S), -(-S // block)
    covered = np.zeros((n * block, n * block), bool)
    for part in exclude:
        covered |= part.mask(n * block, n * block)
    covered = (covered | causal & (np.tri(n * block) == 0)).reshape(n, block, n, block).all((1, 3))
    for i in range(0, S // block):
        seen = mask[i * block]
        blocks = {s // block for s in np.flatnonzero(seen).tolist()}
        assert all(seen[s] == (s // block in blocks) for s in range(S)) and (mask[i * block:(i + 1) * block] == seen).all()
        free = {j for j in range(i + 1 if causal else n) if not covered[i, j]}
        assert len(blocks) == min(count, len(free)) and blocks <= free


def test_random_blocks_do_not_depend_on_keys_they_do_not_hold():
    from sparsetile.ops.random_blocks import draws
    for count, exclude in itertools.product((1, 3), ((), (Window(1, 1, block=4),))):
        rule = RandomBlocks(count, 4, 5, exclude=exclude)
        for n, fewer in itertools.combinations(range(64, 2, -5), 2):
            now, then = draws(rule, 0, 64, n), draws(rule, 0, 64, fewer)
            inside = (now < fewer).all(1) & (now >= 0).all(1)
            assert np.array_equal(now[inside], then[inside])
        causal = RandomBlocks(count, 4, 5, causal=True, exclude=exclude)
        assert np.array_equal(causal.mask(100, 200, 0)[:, :100], causal.mask(100, 100, 0))


def test_random_blocks_are_spread_evenly():
    from sparsetile.ops.random_blocks import draws
    table = draws(RandomBlocks(3, 64, seed=1), 0, 4000, 20)
    assert np.abs(np.bincount(table.reshape(-1), minlength=20) - 600).max() < 120  # about five standard deviations
    assert (np.sort(table, 1)[:, 1:] > np.sort(table, 1)[:, :-1]).all()
    assert not np.array_equal(table, draws(RandomBlocks(3, 64, seed=2), 0, 4000, 20))


# ------------------------------------------------------------------------------------------------ bad arguments
BAD = [
    (lambda: Window(-1), "left", "from_flash_attention"), (lambda: Window(1.5), "left", "integer"), (lambda: Window(True), "left", "integer"), (lambda: Window("3"), "left", "integer"),
    (lambda: Window(1, -2), "right", "None"), (lambda: Window(1, block=0), "block", ">= 1"), (lambda: Dilated(1, 1, 0), "step", ">= 1"), (lambda: Dilated(-1, 1, 2), "left", "None"),
    (lambda: Strided(0), "stride", ">= 1"), (lambda: Fixed(4, 5), "summary", "0..4"), (lambda: Fixed(0, 0), "stride", ">= 1"), (lambda: Global([-1]), "tokens", "count from 0"),
    (lambda: Global("abc"), "tokens", "list"), (lambda: Global([1.5]), "tokens", "integer"), (lambda: Global(range(-3, 3)), "tokens", "count from 0"), (lambda: Sink(-1), "n", ">= 0"),
    (lambda: RandomBlocks(-1, 4), "count", ">= 0"), (lambda: RandomBlocks(1, 0), "block", ">= 1"), (lambda: RandomBlocks(1, 4, -1), "seed", ">= 0"), (lambda: RandomBlocks(1, 4, exclude=["x"]), "exclude", "PerHead"),
    (lambda: RandomBlocks(1, 4, exclude=[PerHead([Full()])]), "exclude", "PerHead"), (lambda: Blocks(np.ones((2, 2)) * 0.5), "mask", "mask > 0"), (lambda: Blocks(np.ones(3, bool)), "mask", "[nq, nk]"),
    (lambda: Blocks(np.ones((2, 2), bool), 0), "block_q", ">= 1"), (lambda: Documents([3, -1]), "lengths", "tokens of each"), (lambda: Documents([1.5]), "lengths", "tokens of each"),
    (lambda: Documents(3), "lengths", "list"), (lambda: PerHead([]), "patterns", "one per"), (lambda: PerHead([Causal(), "x"]), "patterns[1]", "plain pattern"), (lambda: PerHead([PerHead([Full()])]), "patterns[0]", "plain pattern"),
    (lambda: PerHead([Full()] * 2) & PerHead([Full()] * 3), "2 and 3", "divisor"), (lambda: Causal().mask(-1, 3), "T", ">= 0"), (lambda: Causal().mask(3, 2.5), "S", "integer"),
    (lambda: Causal().mask(3, 3, "x"), "q_start", "integer"), (lambda: Causal().hops(0), "T", ">= 1"), (lambda: PerHead([Full()] * 2).flops(4, 4, Hq=3), "Hq", "multiple"),
    (lambda: PerHead([Full()] * 3).check(4, 2), "Hq = 4", "Hk = 2"), (lambda: RandomBlocks(1, 4).visible(np.arange(3), np.arange(3)), "S", "give S="), (lambda: Causal().layout(3, 3, 128, 40), "block_k", "multiple of 32"),
]


@pytest.mark.parametrize("call, argument, remedy", BAD, ids=range(len(BAD)))
def test_bad_arguments_are_named_with_a_remedy(call, argument, remedy):
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert argument in str(caught.value) and remedy in str(caught.value)


def test_made_inside_torch_compile():
    torch = pytest.importorskip("torch")

    def text(x):
        rule = Causal() & (Window(127) | Strided(128)) | Global(range(4)) | Fixed(8, 2)
        return x + len(rule.canonical())
    assert torch.compile(text, fullgraph=True, backend="eager")(torch.zeros(1)) == text(torch.zeros(1))
