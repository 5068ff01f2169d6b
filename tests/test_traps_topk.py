"""Top-k where the best systems break: exact for given scores, on every backend."""
import numpy as np
import pytest
from drivers import EVERY, LARGE, arrays, numpy_dtype
from judge import indexer_scores, indexer_topk, normal, selection_arrays
from numeric import assert_same_bits, assert_topk

every, large = pytest.mark.parametrize("backend", EVERY), pytest.mark.parametrize("backend", LARGE)
INT_MIN, INT_MAX = -2 ** 31, 2 ** 31 - 1


def check(on, scores, k, **window):
    visible = None
    if window:
        s = np.arange(scores.shape[-1])
        visible = (s >= window.get("key_start", np.zeros(scores.shape[:2]))[..., None]) & (s < window.get("key_end", np.full(scores.shape[:2], INT_MAX))[..., None])
    indices, lengths = selection_arrays(on.topk(scores, k, **window))
    assert_topk("topk", indices, lengths, scores, k, visible=visible)
    return indices


# The whole range of sizes where a candidate buffer or a vector's tail could break; the interpreter takes the small ones.
NARROW = {"band": lambda rng, n: rng.uniform(10, 10.2, n), "normal 1e-3": lambda rng, n: rng.normal(3, 1e-3, n), "tiny": lambda rng, n: rng.normal(0, 1e-38, n),
          "one ulp apart": lambda rng, n: 1 + rng.integers(0, 3, n) * 2.0 ** -23, "huge": lambda rng, n: rng.normal(0, 1e37, n), "past fp16": lambda rng, n: 65504 + rng.integers(-3, 300, n),
          "both signs past fp16": lambda rng, n: rng.choice([-1, 1], n) * rng.uniform(65504, 65600, n), "denormal": lambda rng, n: rng.integers(0, 50, n) * 1.4e-45,
          "two clusters": lambda rng, n: np.where(rng.random(n) < 0.5, rng.normal(-50, 1e-4, n), rng.normal(50, 1e-4, n)), "ascending": lambda rng, n: np.arange(n), "descending": lambda rng, n: -np.arange(n)}


@every
@pytest.mark.parametrize("shape", NARROW)
def test_scores_that_share_their_top_bits(on, backend, shape, rng):
    check(on, np.stack([NARROW[shape](rng, 200) for _ in range(3)])[None].astype(np.float32), 64)


@large
@pytest.mark.parametrize("width", [5000, 40_003])
@pytest.mark.parametrize("shape", NARROW)
def test_scores_that_share_their_top_bits_in_wide_rows(on, backend, shape, width, rng):
    check(on, np.stack([NARROW[shape](rng, width) for _ in range(2)])[None].astype(np.float32), 2048)


def sprinkled(rng, shape):
    x = rng.standard_normal(shape)
    x[rng.random(shape) < 0.1] = np.nan
    x[rng.random(shape) < 0.02] = np.inf
    x[rng.random(shape) < 0.1] = -np.inf
    return x


ROWS = {"normal": lambda rng, n: rng.standard_normal(n), "most are zero": lambda rng, n: np.maximum(rng.standard_normal(n) - 1.5, 0), "narrow band": lambda rng, n: rng.uniform(10, 10.2, n),
        "equal": lambda rng, n: np.full(n, 2.5), "sorted up": lambda rng, n: np.sort(rng.standard_normal(n), -1), "sorted down": lambda rng, n: -np.sort(rng.standard_normal(n), -1),
        "blocks alike": lambda rng, n: np.repeat(rng.standard_normal((*n[:2], n[2] // 50)) * 3, 50, -1) + rng.standard_normal(n) * 0.01, "huge": lambda rng, n: rng.normal(0, 1e37, n),
        "tiny": lambda rng, n: rng.normal(0, 1e-38, n), "NaN and inf": sprinkled}


@pytest.mark.parametrize("backend", LARGE[1:])
@pytest.mark.parametrize("shape", ROWS)
def test_a_thousand_rows(on, backend, shape, rng):
    """One answer is right, ties included: all backends give it."""
    x, k = ROWS[shape](rng, (1, 1000, 3000)).astype(np.float32), 133
    order = np.argsort(-np.where(x > -np.inf, x, -np.inf), axis=-1, kind="stable")[..., :k]  # NaN is above nothing
    chosen = np.take_along_axis(x > -np.inf, order, -1)
    best = np.sort(np.where(chosen, order, x.shape[-1]), -1)
    indices, lengths = selection_arrays(on.topk(x, k))
    np.testing.assert_array_equal(lengths, chosen.sum(-1))
    np.testing.assert_array_equal(indices, np.where(best < x.shape[-1], best, -1))


@large
def test_a_narrow_band_of_256k_columns(on, backend, rng):
    check(on, rng.uniform(10, 10.2, (1, 2, 262_144)).astype(np.float32), 2048)


@every
@pytest.mark.parametrize("winners, ties, k", [(3, 250, 40), (0, 200, 64), (10, 10, 64), (40, 150, 41)])
def test_ties_go_to_the_smaller_index(on, backend, winners, ties, k, rng):
    row = np.concatenate([rng.uniform(1, 2, winners), np.zeros(ties), rng.uniform(-2, -1, 20)]).astype(np.float32)
    check(on, np.stack([rng.permutation(row) for _ in range(3)])[None], k)


@large
@pytest.mark.parametrize("winners, ties, k", [(100, 8220, 2048), (2047, 5000, 2048), (0, 9000, 2048), (3000, 5000, 2048)])
def test_thousands_of_ties_leave_no_padding(on, backend, winners, ties, k, rng):
    row = np.concatenate([rng.uniform(1, 2, winners), np.zeros(ties)]).astype(np.float32)
    indices = check(on, np.stack([rng.permutation(row) for _ in range(2)])[None], k)
    assert (indices >= 0).all()


@every
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 15, 17, 31, 63, 65, 127, 129, 130, 131, 255])
def test_widths_that_no_vector_divides(on, backend, width, rng):
    """The largest scores stand last, and what lies behind the row in memory is larger still."""
    wide = np.full((1, 3, width + 40), np.inf, np.float32)
    wide[..., :width] = np.sort(rng.standard_normal((1, 3, width)), -1)
    scores = on.put(wide)[:, :, :width]
    indices, lengths = selection_arrays(on.topk(scores, min(7, width + 1)))
    assert_topk("topk", indices, lengths, wide[..., :width], min(7, width + 1))


@every
def test_specials(on, backend, rng):
    x = rng.standard_normal((1, 12, 150)).astype(np.float32)
    x[0, 0] = np.nan
    x[0, 1, ::2] = np.nan
    x[0, 2] = -np.inf
    x[0, 3, :] = np.inf
    x[0, 4, [3, 70, 149]] = np.inf
    x[0, 5] = np.where(rng.random(150) < 0.5, 0.0, -0.0)
    x[0, 6] = np.where(rng.random(150) < 0.5, np.nan, -np.inf)
    x[0, 6, 77] = -3e38
    x[0, 7] = -np.nan
    x[0, 7, :3] = [-np.inf, np.inf, np.nan]
    x[0, 8] = np.float32(np.uint32(0x7FFFFFFF).view(np.float32))
    x[0, 9] = np.uint32(0xFF800001).view(np.float32)                                   # a signalling NaN with its sign set
    x[0, 9, 100:] = -1
    x[0, 10] = -rng.random(150)
    x[0, 11] = np.finfo(np.float32).max
    for k in (1, 10, 60, 150):
        check(on, x, k)


@every
def test_no_row_and_negative_bounds(on, backend, rng):
    x = rng.standard_normal((2, 4, 90)).astype(np.float32)
    start = np.array([[0, 5, 90, INT_MIN], [-7, 89, 200, 0]], np.int32)
    end = np.array([[0, -3, 90, INT_MAX], [90, 90, INT_MAX, INT_MIN]], np.int32)
    for k in (1, 20, 90):
        check(on, x, k, key_start=start, key_end=end)
    check(on, x, 9, key_end=end)
    check(on, x, 9, key_start=start)


@every
@pytest.mark.parametrize("k", [1, 7, 100, 133, 192, 300])
def test_any_k(on, backend, k, rng):
    check(on, rng.standard_normal((1, 2, 250)).astype(np.float32), k)


@large
@pytest.mark.parametrize("k", [1, 7, 100, 133, 192, 1152, 2048, 2049, 4000, 5000, 9000])
def test_any_k_of_wide_rows(on, backend, k, rng):
    check(on, rng.standard_normal((2, 3, 5001)).astype(np.float32), k)


@large
def test_the_same_set_in_every_run_and_in_any_order_of_rows(on, backend, rng):
    """bfloat16 values have many ties."""
    x = rng.standard_normal((4, 5, 6000)).astype(numpy_dtype("bfloat16")).astype(np.float32)
    first = arrays(on.topk(x, 700).indices)[0]
    for _ in range(3):
        assert_same_bits("again", first, arrays(on.topk(x, 700).indices)[0])
    order = np.array([3, 1, 0, 2])
    assert_same_bits("permuted batch", first[order], arrays(on.topk(x[order], 700).indices)[0])
    assert_same_bits("permuted rows", first[:, :, ::-1], arrays(on.topk(np.ascontiguousarray(x[:, ::-1]), 700).indices)[0])
    assert_topk("topk", *selection_arrays(on.topk(x, 700)), x, 700)


@large
def test_many_rows(on, backend, rng):
    """More rows than the second axis of a launch grid may have."""
    x = np.round(rng.standard_normal((1, 70_000, 9)) * 2).astype(np.float32)
    indices, lengths = selection_arrays(on.topk(x, 3))
    order = np.argsort(-x, axis=-1, kind="stable")[..., :3]
    np.testing.assert_array_equal(indices, np.sort(order, -1))
    assert (lengths == 3).all()


# ------------------------------------------------------------------------------------------------------ fused with the scores
@every
@pytest.mark.parametrize("k", [1, 7, 33, 90])
def test_fused_with_ties_at_the_cut(on, backend, k, rng):
    """Small integers: every sum is exact, so the set must be that of a stable sort on every backend."""
    q, keys = (rng.integers(-1, 2, s).astype(numpy_dtype("bfloat16")) for s in ((1, 2, 5, 32), (1, 80, 32)))
    weights = rng.integers(0, 3, (1, 2, 5)).astype(np.float32)
    indices, lengths = selection_arrays(on.indexer_topk(q, keys, weights, k, causal=False))
    dots = np.maximum(np.einsum("bhtd,bsd->bhts", q.astype(np.float32), keys.astype(np.float32)), 0)
    scores = np.einsum("bhts,bht->bts", dots, weights).astype(np.float32)
    if k >= 80:
        assert (lengths == 80).all() and (indices[..., :80] == np.arange(80)).all()
    else:
        assert_topk("topk", indices, lengths, scores, k)


@every
def test_fused_all_scores_equal(on, backend):
    q, keys, weights = np.zeros((1, 2, 4, 32), np.float16), np.zeros((1, 70, 32), np.float16), np.ones((1, 2, 4), np.float32)
    indices, lengths = selection_arrays(on.indexer_topk(q, keys, weights, 9, q_start=50))
    assert (indices == np.arange(9)).all() and (lengths == 9).all()


@every
def test_fused_with_nan_keys(on, backend, rng):
    q, keys, weights = normal(rng, (1, 2, 6, 32), np.float16), normal(rng, (1, 60, 32), np.float16), normal(rng, (1, 2, 6), np.float32)
    keys[0, ::3] = np.nan
    for k, pool in ((8, 1), (50, 1), (3, 4)):
        indexer_topk(on, q, keys, weights, k, causal=False, pool=pool)
        indexer_topk(on, q, keys, weights, k, causal=False, pool=pool, return_scores=True)
    weights[0, :, 2] = np.nan
    indexer_topk(on, q, keys, weights, 8, causal=False)
    indexer_topk(on, q, keys, weights, 5, causal=False, pool=4, force_first=1, force_last=1)


@every
def test_fused_with_infinite_scales(on, backend, rng):
    q, keys = abs(normal(rng, (1, 2, 5, 32), np.float16)), abs(normal(rng, (1, 40, 32), np.float16))
    weights, scale = np.ones((1, 2, 5), np.float32), (rng.random((1, 40)) + 0.5).astype(np.float32)
    scale[0, [3, 9, 30]] = np.inf
    scale[0, [4, 11]] = -np.inf
    for k in (2, 5, 39):
        indexer_topk(on, q, keys, weights, k, causal=False, k_scale=scale)


@every
def test_fused_blocks_that_begin_before_the_window(on, backend, rng):
    """Keys before a row's window are of no block, whatever an earlier call left in the memory of scores that this one does not make."""
    q, keys, weights = normal(rng, (1, 3, 4, 32), np.float16), normal(rng, (1, 700, 32), np.float16), normal(rng, (1, 3, 4), np.float32)
    window = dict(key_start=np.array([[150, 290, 513, 690]], np.int32), key_end=np.array([[400, 580, 640, 699]], np.int32))
    for scale in (np.float32(1e30), np.float32(1)):
        for k in (1, 2, 5):
            indexer_topk(on, q, keys, abs(weights) * scale, k, causal=False, pool=300, return_scores=True, **(window if scale == 1 else {}))


@pytest.mark.parametrize("backend", EVERY[2:3])
@pytest.mark.parametrize("call", ["scores", "top-k"])
def test_tiles_past_the_diagonal_are_not_computed(on, backend, call, rng, monkeypatch):
    """Products that the interpreter is asked for: of causal queries about half of those that all keys take, of a window those of its tiles."""
    if not on.interpreted:
        pytest.skip("products are counted in the interpreter")
    from triton.runtime.interpreter import InterpreterBuilder
    q, keys, weights, made = normal(rng, (1, 16, 256, 32), np.float16), normal(rng, (1, 256, 32), np.float16), normal(rng, (1, 16, 256), np.float32), []
    product = InterpreterBuilder.create_dot
    monkeypatch.setattr(InterpreterBuilder, "create_dot", lambda *x: made.append(1) or product(*x))

    def count(**options):
        made.clear()
        on.indexer_scores(q, keys, weights, **options) if call == "scores" else on.indexer_topk(q, keys, weights, 5, **options)
        return len(made)
    full, causal = count(causal=False), count()
    narrow = count(causal=False, key_start=np.full(256, 100, np.int32), key_end=np.full(256, 120, np.int32))
    assert 0 < causal <= 0.75 * full and 0 < narrow <= 0.5 * full


@every
@pytest.mark.parametrize("start", [2 ** 31 - 3, -2 ** 31], ids=str)
def test_fused_positions_at_the_ends_of_int32(on, backend, start, rng):
    """Query t stands at start + t, past 2^31 too: it sees all keys, or none; given as a number and on the device."""
    q, keys, weights = normal(rng, (2, 3, 5, 32), np.float16), normal(rng, (2, 40, 32), np.float16), normal(rng, (2, 3, 5), np.float32)
    for q_start in (start, np.array([start, 17], np.int32)):
        indexer_scores(on, q, keys, weights, q_start=q_start)
        for k, pool in ((4, 1), (3, 4)):
            indexer_topk(on, q, keys, weights, k, pool=pool, q_start=q_start)
            indexer_topk(on, q, keys, weights, k, pool=pool, q_start=q_start, return_scores=True)


@every
@pytest.mark.parametrize("pool", [1, 3])
def test_fused_with_more_forced_than_there_are(on, backend, pool, rng):
    """Rows of no entry, one, two ... up to seven: the first and the last forced ones meet and overlap, each is there once."""
    q, keys, weights = normal(rng, (1, 3, 8, 32), np.float16), normal(rng, (1, 21, 32), np.float16), normal(rng, (1, 3, 8), np.float32)
    end = np.arange(8, dtype=np.int32)[None] * pool
    for first, last, k in ((2, 3, 6), (0, 4, 4), (5, 0, 5), (3, 3, 6)):
        for wanted in (False, True):
            indices, lengths = indexer_topk(on, q, keys, weights, k, causal=False, pool=pool, key_end=end, force_first=first, force_last=last, return_scores=wanted)
            assert (lengths == np.minimum(np.arange(8), k)).all() and (indices[0, 1, 0] == 0)


@every
@pytest.mark.parametrize("H", [1, 3, 17, 20])
def test_fused_with_infinite_keys(on, backend, H, rng):
    """An infinite key scores +inf where its products say so and is chosen first, whatever number of heads a tile is padded to: a head that is not there has no say."""
    q, keys, weights = abs(normal(rng, (1, H, 3, 40), np.float16)) + np.float16(0.1), normal(rng, (1, 50, 40), np.float16), rng.random((1, H, 3)).astype(np.float32) + 0.1
    keys[0, [4, 30], 7], keys[0, [9, 44], 0] = np.inf, -np.inf
    assert np.isposinf(indexer_scores(on, q, keys, weights, causal=False)[..., [4, 30]]).all()
    for k in (2, 5, 49):
        indices, _ = indexer_topk(on, q, keys, weights, k, causal=False)
        assert np.isin([4, 30], indices[0, 0]).all() and np.isin([4, 30], indices[0, 2]).all()


@every
def test_fused_windows_that_hold_nothing(on, backend, rng):
    q, keys, weights = normal(rng, (2, 2, 3, 32), np.float16), normal(rng, (2, 50, 32), np.float16), normal(rng, (2, 2, 3), np.float32)
    start, end = np.array([[10, 50, INT_MIN], [49, 7, INT_MAX]], np.int32), np.array([[10, INT_MAX, INT_MAX], [50, -4, INT_MIN]], np.int32)
    for scores in (False, True):
        indexer_topk(on, q, keys, weights, 5, causal=False, key_start=start, key_end=end, return_scores=scores)
    indexer_topk(on, q, keys, weights, 5, q_start=np.array([-100, 48], np.int32))
    indexer_topk(on, q, keys, weights, 4, q_start=-2, pool=8, force_first=1, force_last=1)


@large
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("pool, force", [(1, 0), (1, 3), (16, 1)])
def test_fused_over_many_tiles(on, backend, dtype, pool, force, rng):
    q, keys = normal(rng, (1, 4, 70, 64), numpy_dtype(dtype)), normal(rng, (1, 3000, 64), numpy_dtype(dtype))
    weights = normal(rng, (1, 4, 70), np.float32)
    indexer_topk(on, q, keys, weights, 133 if pool == 1 else 20, pool=pool, force_first=force, force_last=force)


@large
@pytest.mark.parametrize("options", [{}, dict(pool=16, force_first=1, force_last=2), dict(force_last=3)], ids=["keys", "blocks", "forced"])
@pytest.mark.parametrize("T", [1, 3])
def test_fused_few_rows_of_many_keys(on, backend, T, options, rng):
    """Keys are dealt to all threads, or multiprocessors, and the shares' winners compete once more: small integers, so that cuts are full of ties; rows that see one share, or none."""
    B, S, k = 2, 20_011, 133
    q, keys = (rng.integers(-1, 2, s).astype(numpy_dtype("float16")) for s in ((B, 3, T, 32), (B, S, 32)))
    weights = rng.integers(0, 3, (B, 3, T)).astype(np.float32)
    start, end = np.full((B, T), 5, np.int32), np.array([[S, 9000, 0], [20_000, 140, 4096]], np.int32)[:, :T].copy()
    dots = np.maximum(np.einsum("bhtd,bsd->bhts", q.astype(np.float32), keys.astype(np.float32)), 0)
    scores = np.einsum("bhts,bht->bts", dots, weights)
    for window in ({}, dict(key_start=start, key_end=end)):
        for wanted in (False, True):
            indices, lengths = indexer_topk(on, q, keys, weights, k, causal=False, return_scores=wanted, **window, **options)
            if not options:
                s = np.arange(S)
                seen = (s >= (start if window else 0 * start)[..., None]) & (s < (end if window else 0 * end + S)[..., None])
                assert_topk("topk", indices, lengths, scores, k, visible=seen)


@pytest.mark.parametrize("backend", LARGE[1:])
def test_fused_more_queries_than_a_grid_axis_holds(on, backend, rng):
    """T = 70000 against 65535, ragged windows; scores and the choice among them."""
    H, T, S, k = 17, 70_000, 40, 7
    q, keys = (rng.integers(-2, 3, s).astype(numpy_dtype("bfloat16")) for s in ((1, H, T, 4), (1, S, 4)))
    weights, end = rng.integers(0, 3, (1, H, T)).astype(np.float32), rng.integers(-3, S + 9, (1, T)).astype(np.int32)
    dots = np.maximum(np.einsum("bhtd,bsd->bhts", q.astype(np.float32), keys.astype(np.float32)), 0)
    scores = np.where(np.arange(S) < end[..., None], np.einsum("bhts,bht->bts", dots, weights), -np.inf).astype(np.float32)
    got, = arrays(on.indexer_scores(q, keys, weights, causal=False, key_end=end))
    np.testing.assert_array_equal(got, scores)
    indices, lengths = selection_arrays(on.indexer_topk(q, keys, weights, k, causal=False, key_end=end))
    order = np.argsort(-scores, axis=-1, kind="stable")[..., :k]
    order = np.sort(np.where(np.take_along_axis(scores, order, -1) > -np.inf, order, S), -1)
    np.testing.assert_array_equal(indices, np.where(order < S, order, -1))
    np.testing.assert_array_equal(lengths, (order < S).sum(-1))


@large
def test_small_k_is_not_dense_and_all_is(on, backend, rng):
    """An anti-cheat pair: k = all equals dense attention, a small k differs from it."""
    import sparsetile as st
    q, k, v = (normal(rng, s, np.float32) for s in ((1, 2, 40, 32), (1, 2, 90, 32), (1, 2, 90, 32)))
    iq, ik, w = normal(rng, (1, 2, 40, 32), np.float32), normal(rng, (1, 90, 32), np.float32), normal(rng, (1, 2, 40), np.float32)
    dense, = arrays(on.sparse_attention(q, k, v, st.Causal()))
    every_key, = arrays(on.sparse_attention(q, k, v, on.indexer_topk(iq, ik, w, 90)))
    few, = arrays(on.sparse_attention(q, k, v, on.indexer_topk(iq, ik, w, 4)))
    assert abs(every_key - dense).max() < 1e-3 * abs(dense).max() < abs(few - dense).max()
