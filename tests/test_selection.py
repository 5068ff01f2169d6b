"""Selections: what their entries stand for, restriction by patterns, and what bad ones get."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pattern_cases import rules

from sparsetile.ops.patterns import Blocks, Causal, Documents, Full, Global, PerHead, Window
from sparsetile.ops.selection import Selection

quick = settings(max_examples=60, deadline=None)


@st.composite
def selections(draw):
    """(indices, granularity, lengths, causal, S): holes, garbage and duplicates anywhere."""
    B, G, T, K = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 6)), draw(st.integers(0, 6))
    S, g = draw(st.integers(1, 50)), draw(st.sampled_from([1, 1, 4, 7]))
    rng = np.random.default_rng(draw(st.integers(0, 2 ** 32 - 1)))
    indices = rng.integers(-3, S // g + 3, (B, G, T, K)).astype(np.int32)
    wild = rng.random(indices.shape) < 0.1
    indices[wild] = rng.choice(np.array([2 ** 31 - 1, -2 ** 31, -123456, S, 2 ** 30], np.int64), wild.sum()).astype(np.int32)
    lengths = rng.integers(-2, K + 3, (B, G, T)).astype(np.int32) if draw(st.booleans()) else None
    return indices, g, lengths, draw(st.booleans()), S


def counted(indices, g, lengths, causal, S, q_start):
    """How often each key counts, one entry at a time."""
    B, G, T, K = indices.shape
    out = np.zeros((B, G, T, S), int)
    for b, h, t in np.ndindex(B, G, T):
        for e in indices[b, h, t, :K if lengths is None else max(0, min(K, int(lengths[b, h, t])))].tolist():
            for s in range(e * g, e * g + g) if 0 <= e <= S else ():
                if s < S and (not causal or s <= q_start + t):
                    out[b, h, t, s] += 1
    return out


@quick
@given(selections(), st.sampled_from([None, 0, 5, -3]))
def test_entries(case, q_start):
    indices, g, lengths, causal, S = case
    selection, start = Selection(indices, g, lengths, causal), S - indices.shape[2] if q_start is None else q_start
    want = counted(*case, start)
    assert np.array_equal(selection.counts(None, S, q_start), want) and np.array_equal(selection.mask(indices.shape[2], S, q_start), want > 0)
    flat = selection.to_tokens()
    assert flat.granularity == 1 and np.array_equal(flat.counts(None, S, q_start), want)


@quick
@given(selections(), st.one_of(rules, st.lists(rules, min_size=2, max_size=2).map(PerHead), st.lists(rules, min_size=4, max_size=4).map(PerHead)), st.sampled_from([None, 0, 5, -3]), st.booleans())
def test_restricted_by_a_pattern(case, rule, q_start, on_torch):
    indices, g, lengths, causal, S = case
    T = indices.shape[2]
    start = S - T if q_start is None else q_start
    want, mask = counted(*case, start), rule.mask(T, S, q_start)
    if mask.ndim == 3:
        heads = max(want.shape[1], len(mask))
        want, mask = want.repeat(heads // want.shape[1], 1), mask.repeat(heads // len(mask), 0)
    for device_start in (False, True):
        if on_torch:
            torch = pytest.importorskip("torch")
            if "RandomBlocks" in rule.canonical() and start > S:  # on a device they know the queries that begin at S or before
                return
            selection = Selection(torch.from_numpy(indices), g, None if lengths is None else torch.from_numpy(lengths), causal)
            at = torch.full((len(indices),), start, dtype=torch.int32) if device_start else q_start
        else:
            selection, at = Selection(indices, g, lengths, causal), np.full(len(indices), start, np.int32) if device_start else q_start
        resolved = (rule & selection).resolve(S, at)
        assert resolved.restriction is None and np.array_equal(resolved.counts(T, S, q_start), want * mask)
        assert np.array_equal((selection & rule).counts(T, S, q_start), want * mask)


def test_causal_stays_a_flag():
    selection = Selection(np.zeros((1, 1, 2, 3), np.int32), 64)
    assert (selection & Causal()).causal and (selection & Causal()).restriction is None and (selection & Causal()).granularity == 64
    both = selection & (Causal() & Window(5))
    assert both.causal and both.restriction == Window(5) and (both & Documents([3])).restriction == Window(5) & Documents([3])
    assert (selection & Full()).resolve(100).indices.shape == (1, 1, 2, 192) and (selection & Full()).resolve(10).granularity == 1
    assert selection.resolve(10) is selection


def test_positions_by_length():
    indices = np.tile(np.arange(8, dtype=np.int32), (2, 1, 3, 1))
    resolved = (Selection(indices) & Window(1)).resolve(8, kv_length=np.array([8, 5], np.int32))
    assert resolved.indices[:, 0, 2].tolist() == [[-1] * 6 + [6, 7], [-1] * 3 + [3, 4] + [-1] * 3]


def test_fits_a_call():
    selection = Selection(np.zeros((2, 4, 3, 5), np.int32))
    selection.check(2, 8, 4, 3)
    selection.check(2, 4, 2, 3)
    for sizes in ((1, 8, 4, 3), (2, 8, 2, 3), (2, 8, 4, 7)):
        with pytest.raises(ValueError, match="pattern.indices: expected"):
            selection.check(*sizes)
    with pytest.raises(ValueError, match="got 3"):
        (selection & Blocks(np.ones((3, 1, 1), bool))).check(2, 8, 4, 3)


good = np.zeros((1, 1, 2, 3), np.int32)
BAD = [
    (lambda: Selection(good[0]), "indices", "[B,G,T,K]"), (lambda: Selection(good.astype(np.int64)), "indices", "int32"), (lambda: Selection(good.astype(np.float32)), "indices", "int32"),
    (lambda: Selection(3), "indices", "array"), (lambda: Selection(good, 0), "granularity", ">= 1"), (lambda: Selection(good, 2.5), "granularity", "integer"), (lambda: Selection(good, 1, good), "lengths", "[B,G,T]"),
    (lambda: Selection(good, 1, np.zeros((1, 1, 3), np.int32)), "lengths", "[1, 1, 2]"), (lambda: Selection(good, 1, np.zeros((1, 1, 2), bool)), "lengths", "int32"), (lambda: Selection(good, restriction="x"), "restriction", "selection & pattern"),
    (lambda: Selection(good).mask(), "S", "number of keys"), (lambda: Selection(good).mask(5, 9), "T = 2", "T 5"), (lambda: Selection(good) & 3, "unsupported operand", ""),
    (lambda: (Selection(np.zeros((1, 3, 2, 3), np.int32)) & PerHead([Global([1]), Full()])).resolve(9), "heads", "divide"),
]


@pytest.mark.parametrize("call, argument, remedy", BAD, ids=range(len(BAD)))
def test_bad_arguments_are_named_with_a_remedy(call, argument, remedy):
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert argument in str(caught.value) and remedy in str(caught.value)
