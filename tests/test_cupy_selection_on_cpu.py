"""The CuPy backend's top-k and indexer kernels, run on the CPU as they are written (cuda_on_cpu.py): every trap of top-k, every shape of the indexer."""
import ml_dtypes
import numpy as np
import pytest
from cuda_on_cpu import CXX, CpuPlace
from hopper_on_cpu import HopperPlace
from importances import importances, shares
from numeric import assert_chosen, assert_close, assert_same_bits, assert_topk, plain

import oracle
from sparsetile.backends.contract import Problem
from sparsetile.backends.cupy import importance_topk, indexer_scores, indexer_topk, topk

pytestmark = pytest.mark.skipif(CXX is None, reason="g++ compiles the kernels for the CPU, and is not there")
TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float8_e4m3fn": ml_dtypes.float8_e4m3fn}
SMALL = dict(threads=256, ahead=2, ctas=6, candidates=3584)


@pytest.fixture(scope="module")
def place():
    return CpuPlace()


def row(name, rng, N):
    x = rng.standard_normal((3, N)).astype(np.float32)
    u = rng.random((3, N))
    special = {
        "normal": lambda: x, "half zeros": lambda: np.maximum(x, 0), "ascending": lambda: np.sort(x, 1), "descending": lambda: -np.sort(-x, 1),
        "signed zeros": lambda: np.where(u < 0.5, -0.0, 0.0), "equal": lambda: np.full_like(x, 1.5), "narrow band": lambda: 10 + x * 1e-3,
        "beyond float16": lambda: x * 1e30, "all -inf": lambda: np.full_like(x, -np.inf), "all +inf": lambda: np.full_like(x, np.inf),
        "100 winners, then ties": lambda: np.where(np.arange(N) % (N // 100) == 0, 1 + u, 0),
        "NaN and inf": lambda: np.select([u < 0.05, u > 0.9, (u > 0.5) & (u < 0.51)], [np.nan, -np.inf, np.inf], x),
        "almost all NaN": lambda: np.where(np.arange(N) % 97 == 0, 1.0, np.nan + x),
        "hidden from the sample": lambda: x + 100 * (np.arange(N) % 512 == 20),
    }
    return special[name]().astype(np.float32)


ROWS = ("normal", "half zeros", "ascending", "descending", "signed zeros", "equal", "narrow band", "beyond float16", "all -inf", "all +inf",
        "100 winners, then ties", "NaN and inf", "almost all NaN", "hidden from the sample")


@pytest.mark.parametrize("name", ROWS)
def test_topk_is_exact(name, rng, place):
    """Unaligned rows, widths that are no multiple of four, windows that are negative, empty, too long; k in and beyond what the fast kernel holds."""
    start, end = np.array([[0, -5, 17]], np.int32), np.array([[2 ** 31 - 1, -3, 4990]], np.int32)
    for N, k in ((1003, 7), (5003, 133), (5003, 2048), (9001, 1152), (5000, 4000), (301, 1000)):
        for offset in (0, 1):
            x = row(name, rng, N + 3)[None, :, offset:offset + N]
            got = topk.run(place.put(x), k, place=place, config=SMALL, key_start=place.put(start), key_end=place.put(end))
            s = np.arange(N)
            assert_topk(f"{name} {N} {k}", *map(place.get, got), x, k, visible=(s >= start[..., None]) & (s < end[..., None]))


def test_topk_reads_rows_in_place(rng, place):
    """A transposed and an expanded array, no window."""
    x = rng.standard_normal((5, 2, 700)).astype(np.float32)
    for view in (x.transpose(1, 0, 2), np.broadcast_to(x[:1, :1], (2, 5, 700))):
        assert_topk("strided", *map(place.get, topk.run(place.put(view), 100, place=place, config=SMALL)), view, 100)


def inputs(rng, kind, B, H, T, S, D, columns=0):
    """columns: more than D lie in memory, so that rows are not aligned."""
    q, k = (rng.standard_normal(shape).astype(TYPES[kind])[..., :D] for shape in ((B, H, T, D + columns), (B, S, D + columns)))
    return q, k, rng.standard_normal((B, H, T)).astype(np.float32), (rng.random((B, S)) + 0.5).astype(np.float32)


def windows(rng, B, T, S):
    start, end = rng.integers(-5, S // 3 + 1, (B, T)).astype(np.int32), rng.integers(S // 2, S + 9, (B, T)).astype(np.int32)
    end[..., 0] = -7
    q_start = rng.integers(-2, S, B).astype(np.int32)
    s = np.arange(S)
    seen = (s >= start[..., None]) & (s < end[..., None]) & (s <= (q_start[:, None] + np.arange(T))[..., None])
    return dict(key_start=start, key_end=end, q_start=q_start), seen


def problem(op, kind, B, H, T, S, D, **more):
    return Problem.of(op, dict(B=B, H=H, T=T, S=S, D=D, **more), dict(q=kind, k=kind), "sm_80")


CASES = [("bfloat16", 64, 128, 0), ("float8_e4m3fn", 64, 128, 0), ("float16", 17, 100, 4), ("bfloat16", 12, 31, 2), ("float8_e4m3fn", 5, 72, 1), ("float32", 8, 100, 0),
         ("float32", 3, 31, 2), ("bfloat16", 16, 320, 0), ("float16", 1, 32, 0), ("float16", 2, 32, 0), ("float16", 3, 32, 0), ("float16", 4, 32, 0)]


@pytest.mark.parametrize("kind, H, D, columns", CASES)
def test_indexer_scores(kind, H, D, columns, rng, place):
    B, T, S = 2, 5, 150
    q, k, w, scale = inputs(rng, kind, B, H, T, S, D, columns)
    bounds, seen = windows(rng, B, T, S)
    p = problem("indexer_scores", kind, B, H, T, S, D)
    assert indexer_scores.supports(p) is None
    for activation in ("relu", None):
        got = indexer_scores.run(*map(place.put, (q, k, w)), place=place, config=indexer_scores.default_config(p), k_scale=place.put(scale), activation=activation,
                                 **{name: place.put(x) for name, x in bounds.items()})
        given = dict(k_scale=scale, activation=activation)
        assert_close(f"{kind} {H} {D} {activation}", place.get(got), oracle.indexer_scores(q, k, w, seen=seen, **given),
                     plain.indexer_scores(q, k, w, visible=seen, **given), reduction=H * D)


@pytest.mark.parametrize("kind, H, D, columns", [case for case in CASES if case[0] != "float8_e4m3fn"])
def test_an_infinite_key_is_no_nan_of_a_padded_head(kind, H, D, columns, rng, place):
    q, k, w, _ = inputs(rng, kind, 1, H, 3, 70, D, columns)
    q, w = abs(q) + q.dtype.type(0.1), abs(w) + np.float32(0.1)
    k[0, 33, D - 1], k[0, 5, 0] = np.inf, -np.inf
    got = place.get(indexer_scores.run(*map(place.put, (q, k, w)), place=place, config=indexer_scores.default_config(problem("indexer_scores", kind, 1, H, 3, 70, D)), causal=False))
    seen = np.ones((1, 3, 70), bool)
    assert np.isposinf(got[..., 33]).all() and not np.isnan(got).any()
    assert_close("scores", got, oracle.indexer_scores(q, k, w, seen=seen), plain.indexer_scores(q, k, w, visible=seen), reduction=H * D)


def test_no_knob_changes_a_bit(rng, place):
    q, k, w, scale = inputs(rng, "bfloat16", 1, 24, 5, 200, 96)
    configs = [dict(warps=a, row_tiles=b, queries=c) for a, b, c in ((4, 2, 2), (2, 1, 4), (8, 1, 1), (1, 2, 8))]
    first, *others = [place.get(indexer_scores.run(*map(place.put, (q, k, w)), place=place, config=c, k_scale=place.put(scale), causal=False)) for c in configs]
    for other in others:
        assert_same_bits("scores", first, other)


OPTIONS = [dict(), dict(return_scores=True), dict(pool=16, force_first=1, force_last=2), dict(pool=7, force_first=1, force_last=2, return_scores=True), dict(pool=33, force_first=2, force_last=1),
           dict(pool=97, force_first=3, force_last=3, return_scores=True)]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}{v}" for k, v in o.items()) or "plain")
@pytest.mark.parametrize("pieces", (False, True), ids=("one-piece", "pieces"))
def test_indexer_topk_selects_from_the_same_bits(options, pieces, rng, place, monkeypatch):
    """NaN, inf and equal scores among them; more keys than asked for, and fewer; the scratch holds all rows, or three."""
    if pieces:
        monkeypatch.setattr(indexer_topk, "rows_held", lambda S, config: 3)
    B, H, T, S, D = 2, 8, 7, 300, 64
    q, k, w, scale = inputs(rng, "float16", B, H, T, S, D)
    for value in (0, np.nan, np.inf, -np.inf):
        scale[:, rng.integers(0, S, 20)] = value
    bounds, seen = windows(rng, B, T, S)
    bounds = {name: place.put(x) for name, x in bounds.items()}
    for top_k in (6, 40, 400):
        config = indexer_topk.default_config(problem("indexer_topk", "float16", B, H, T, S, D, K=top_k))
        arguments = dict(place=place, config=config, k_scale=place.put(scale), **bounds)
        scores = place.get(indexer_scores.run(*map(place.put, (q, k, w)), **arguments))
        indices, lengths, chosen = indexer_topk.run(*map(place.put, (q, k, w)), top_k, **arguments, **options)
        expected, counts = expected_choice(scores, seen, top_k, **options)
        assert np.array_equal(place.get(lengths), counts)
        assert np.array_equal(place.get(indices), expected)
        if options.get("return_scores"):
            entries = oracle.pooled(scores, seen, options.get("pool", 1))[0] if options.get("pool", 1) > 1 else scores
            found = np.take_along_axis(entries, np.maximum(expected, 0), axis=2)
            assert np.array_equal(place.get(chosen), np.where(expected < 0, -np.inf, found), equal_nan=True)


def test_blocks_that_begin_before_the_window(rng, place, monkeypatch):
    """Whatever the scratch held: keys before a row's window are of no block, though their tile may never have been scored."""
    monkeypatch.setattr(type(place), "empty", lambda self, shape, dtype, empty=type(place).empty: self.full(shape, dtype, 1e30) if dtype == "float32" else empty(self, shape, dtype))
    B, H, T, S, D = 1, 8, 4, 700, 64
    q, k, w, _ = inputs(rng, "float16", B, H, T, S, D)
    bounds = dict(key_start=np.array([[150, 290, 513, 690]], np.int32), key_end=np.array([[400, 580, 640, 699]], np.int32))
    seen = (np.arange(S) >= bounds["key_start"][..., None]) & (np.arange(S) < bounds["key_end"][..., None])
    config = indexer_topk.default_config(problem("indexer_topk", "float16", B, H, T, S, D, K=5))
    arguments = dict(place=place, config=config, causal=False, **{name: place.put(x) for name, x in bounds.items()})
    scores = place.get(indexer_scores.run(*map(place.put, (q, k, w)), **arguments))
    indices, lengths, chosen = indexer_topk.run(*map(place.put, (q, k, w)), 5, pool=300, return_scores=True, **arguments)
    expected, counts = expected_choice(scores, seen, 5, pool=300, return_scores=True)
    assert np.array_equal(place.get(lengths), counts) and np.array_equal(place.get(indices), expected)
    found = np.take_along_axis(oracle.pooled(scores, seen, 300)[0], np.maximum(expected, 0), axis=2)
    assert np.array_equal(place.get(chosen), np.where(expected < 0, -np.inf, found))


def expected_choice(scores, seen, top_k, pool=1, force_first=0, force_last=0, return_scores=False):
    """Row by row, by sorting."""
    if pool > 1:
        scores, seen = oracle.pooled(scores, seen, pool)
    indices, counts = np.full((*scores.shape[:2], top_k), -1, np.int32), np.zeros(scores.shape[:2], np.int32)
    for b, t in np.ndindex(scores.shape[:2]):
        here = np.flatnonzero(seen[b, t]).tolist()
        if len(here) <= top_k and not return_scores:
            best = here
        else:
            forced = dict.fromkeys(here[:force_first] + here[len(here) - min(force_last, len(here)):])
            rest = [s for s in here if s not in forced and scores[b, t, s] > -np.inf]
            best = sorted([*forced, *sorted(rest, key=lambda s: (-scores[b, t, s], s))[:top_k - len(forced)]])
        indices[b, t, :len(best)], counts[b, t] = best, len(best)
    return indices, counts


@pytest.mark.parametrize("pieces", (False, True), ids=("one-piece", "pieces"))
@pytest.mark.parametrize("kind, B, Hq, Hk, T, C, D, K", [("bfloat16", 2, 16, 1, 5, 70, 64, 4), ("float16", 1, 14, 2, 3, 41, 72, 6), ("float32", 1, 12, 1, 4, 33, 40, 3), ("bfloat16", 1, 3, 1, 9, 50, 32, 5),
                                                         ("float16", 2, 2, 2, 6, 90, 24, 7), ("float32", 1, 4, 2, 7, 20, 16, 40), ("bfloat16", 1, 2, 1, 3, 0, 16, 3)])
def test_importance_topk(kind, B, Hq, Hk, T, C, D, K, pieces, rng, place, monkeypatch):
    """Groups of every kind of column, rows that see nothing, NaN in keys that nobody sees, blocks of three strides and keys of two."""
    if pieces:
        monkeypatch.setattr(importance_topk, "rows_held", lambda C, blocks, config: 3)
    chosen_as_defined(place, "scratch", kind, (B, Hq, Hk, T, C, D), K, 3, 2, rng)


FUSED_IMPORTANCE = [("bfloat16", (2, 16, 1, 11, 200, 128), 4, 4, 2), ("float16", (1, 28, 2, 5, 150, 72), 6, 3, 2), ("float16", (1, 3, 1, 20, 141, 40), 3, 1, 1), ("bfloat16", (1, 32, 1, 6, 300, 16), 32, 1, 4),
                    ("bfloat16", (1, 17, 1, 6, 300, 136), 3, 40, 20), ("bfloat16", (1, 2, 2, 1, 4, 32), 5, 4, 2), ("bfloat16", (1, 16, 1, 3, 1300, 16), 9, 1, 2), ("bfloat16", (1, 16, 1, 10, 3300, 16), 9, 1, 1), ("float16", (1, 16, 1, 20, 1000, 136), 5, 1, 1)]


@pytest.mark.parametrize("kind, sizes, K, step, reach", FUSED_IMPORTANCE)
def test_importance_topk_on_hopper(kind, sizes, K, step, reach, rng):
    """Shares, sums and the choice in one kernel: padded heads, ragged queries and tiles, blocks that begin in the tile before, runs of more than 32 blocks, one query; two warpgroups to a block of threads, or one."""
    place = HopperPlace()
    place.refused = "indexer_scores"
    chosen_as_defined(place, "fused", kind, sizes, K, step, reach, rng)


def chosen_as_defined(place, path, kind, sizes, K, step, reach, rng):
    """The kernel's answer by its float64 definition, with NaN in the last three keys, which nobody sees."""
    B, Hq, Hk, T, C, D = sizes
    stride, select_block, keys = 4, 4 * step, 4 * (C + reach - 1)
    q, k = rng.standard_normal((B, Hq, T, D)).astype(TYPES[kind]), rng.standard_normal((B, Hk, C, D)).astype(TYPES[kind])
    lse, scale, blocks = (rng.standard_normal((B, Hq, T)) + 3).astype(np.float32), D ** -0.5, -(-keys // select_block)
    k[:, :, C - 3:] = np.nan
    key_end = np.broadcast_to(rng.integers(0, max(C - 2, 1), (B, 1, T)), (B, Hk, T)).astype(np.int32)
    block_end = np.broadcast_to(rng.integers(0, blocks + 2, (B, 1, T)), (B, Hk, T)).astype(np.int32)
    p = Problem.of("importance_topk", dict(B=B, Hq=Hq, Hk=Hk, T=T, S=keys, C=C, D=D, K=K), dict(q=kind, k=kind), place.arch, (), 1.0, select_block)
    config = {**importance_topk.default_config(p), "path": path}
    assert importance_topk.supports(p) is None and not isinstance(importance_topk.resources(p, config), str)
    truth, measure = (importances(shares(q, k[:, :, :max(C - 3, 0)], lse, scale, x), key_end, stride * reach, stride, select_block, keys) for x in (np.float64, np.float32))
    j = np.arange(blocks)
    for first, last, return_scores in ((1, 2, False), (0, 0, True)):
        indices, lengths, chosen = importance_topk.run(*map(place.put, (q, k, lse)), K, place=place, config=config, key_end=place.put(key_end.copy()),
                                                       block_end=place.put(block_end.copy()), blocks=blocks, reach=reach, step=step, scale=scale, force_first=first, force_last=last,
                                                       return_scores=return_scores)
        seen = j < np.minimum(block_end, blocks)[..., None]
        forced = (j < first) | (j >= np.minimum(block_end, blocks)[..., None] - last)
        found = place.get(indices)
        assert_chosen("blocks", found, place.get(lengths), truth, measure, K, visible=seen, forced=forced, take_all=not return_scores, reduction=Hq // Hk * D)
        if return_scores:
            picked = lambda x: np.where(found >= 0, np.take_along_axis(x, np.maximum(found, 0).astype(np.int64), -1), x.dtype.type(-np.inf))  # noqa: E731
            assert_close("importance", place.get(chosen), picked(truth), picked(measure), reduction=Hq // Hk * D)


@pytest.mark.parametrize("path", ("fused", "scratch"))
def test_equal_importances_go_to_the_smaller_block(path):
    """Shares alike in every key and NaN where nobody looks: blocks 1 to 15 tie, block 0 lacks a stride, block 17 is forced; NaN in one head of one query takes that query's blocks only."""
    place = HopperPlace()
    q, k, lse = np.zeros((1, 16, 9, 64), np.float16), np.ones((1, 1, 70, 64), np.float16), np.full((1, 16, 9), np.log(64), np.float32)
    k[:, :, 66:], q[0, 3, 4] = np.nan, np.nan
    ends = [place.put(np.full((1, 1, 9), n, np.int32)) for n in (66, 18)]
    p = Problem.of("importance_topk", dict(B=1, Hq=16, Hk=1, T=9, S=284, C=70, D=64, K=4), dict(q="float16", k="float16"), "sm_90a", (), 1.0, 16)
    indices, lengths, _ = importance_topk.run(*map(place.put, (q, k, lse)), 4, place=place, config={**importance_topk.default_config(p), "path": path}, key_end=ends[0], block_end=ends[1], blocks=18,
                                              reach=2, step=4, scale=1.0, force_last=1)
    expected = np.where(np.arange(9)[:, None] == 4, [17, -1, -1, -1], [1, 2, 3, 17])
    assert np.array_equal(place.get(indices)[0, 0], expected) and np.array_equal(place.get(lengths)[0, 0], (expected >= 0).sum(1))


@pytest.mark.parametrize("B, T, S, token_major", [(1, 4, 256, False), (2, 7, 1000, False), (3, 9, 700, True), (1, 1, 129, True)])
def test_indexer_scores_on_hopper(B, T, S, token_major, rng):
    """DeepSeek's indexer by warpgroup products: the kernel's barriers, tiles and ragged ends; queries in place whichever way they lie."""
    place = HopperPlace()
    q, k, w, scale = inputs(rng, "float8_e4m3fn", B, 64, T, S, 128)
    q = np.ascontiguousarray(q.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) if token_major else q
    bounds, seen = windows(rng, B, T, S)
    for activation in ("relu", None):
        got = indexer_scores.run(*map(place.put, (q, k, w)), place=place, config={}, k_scale=place.put(scale), activation=activation, **{name: place.put(x) for name, x in bounds.items()})
        given = dict(k_scale=scale, activation=activation)
        assert_close(f"hopper {activation}", place.get(got), oracle.indexer_scores(q, k, w, seen=seen, **given), plain.indexer_scores(q, k, w, visible=seen, **given), reduction=64 * 128)


def test_one_query_alone_has_the_scores_it_has_among_others(rng):
    """A quarter of the products, the same bits: what selects by fours agrees with what scores one by one."""
    place = HopperPlace()
    q, k, w, scale = inputs(rng, "float8_e4m3fn", 2, 64, 3, 200, 128)
    run = lambda q, w: place.get(indexer_scores.run(*map(place.put, (np.ascontiguousarray(q), k, np.ascontiguousarray(w))), place=place, config={}, k_scale=place.put(scale), causal=False))  # noqa: E731
    assert_same_bits("scores", np.concatenate([run(q[:, :, t:t + 1], w[:, :, t:t + 1]) for t in range(3)], 1), run(q, w))


FUSED = [("normal", 2, 5, 1500, 100), ("NaN and inf", 1, 3, 5000, 300), ("ascending", 1, 4, 9000, 200), ("equal", 1, 4, 6000, 128), ("zeros", 1, 4, 6000, 128), ("trap", 1, 2, 9000, 512), ("as many as asked for", 1, 6, 1500, 100)]


@pytest.mark.parametrize("path", ("fused", "scratch"))
@pytest.mark.parametrize("name, B, T, S, K", FUSED)
def test_indexer_topk_on_hopper(name, B, T, S, K, path, rng):
    """Scores and selection in one kernel choose what sorting the stored scores gives; so does the other path, whose scores are the same."""
    place = HopperPlace()
    q, k, w, scale = inputs(rng, "float8_e4m3fn", B, 64, T, S, 128)
    if name == "NaN and inf":
        for value in (np.nan, np.inf, -np.inf):
            scale[:, rng.integers(0, S, S // 4 if np.isnan(value) else 5)] = value
    elif name == "ascending":
        scale, w = np.sort(scale, axis=1) ** 8, np.abs(w)
    elif name == "equal":
        k[:], scale[:] = k[:, :1], 1
    elif name == "zeros":
        w[:] = 0
    elif name == "trap":  # the best stand together, and most prefixes have seen none
        scale[:] = 1e-3
        scale[:, S // 2:S // 2 + K // 2] = 1
    bounds, seen = windows(rng, B, T, S)
    if name == "as many as asked for":  # no score is computed, so a NaN keeps nobody out; with a key more it does
        scale[:, ::3] = np.nan
        bounds = dict(key_start=np.arange(T, dtype=np.int32)[None] * 200, q_start=np.full(B, S, np.int32))
        bounds["key_end"] = bounds["key_start"] + K + np.arange(-2, T - 2, dtype=np.int32) // 2
        seen = (np.arange(S) >= bounds["key_start"][..., None]) & (np.arange(S) < bounds["key_end"][..., None])
    arguments = dict(place=place, k_scale=place.put(scale), **{name: place.put(x) for name, x in bounds.items()})
    p = Problem.of("indexer_topk", dict(B=B, H=64, T=T, S=S, D=128, K=K), dict(q="float8_e4m3fn", k="float8_e4m3fn"), "sm_90a")
    config = {**indexer_topk.default_config(p), "path": path}
    assert not isinstance(indexer_topk.resources(p, config), str)
    scores = place.get(indexer_scores.run(*map(place.put, (q, k, w)), config=config, **arguments))
    indices, lengths, _ = indexer_topk.run(*map(place.put, (q, k, w)), K, config=config, **arguments)
    expected, counts = expected_choice(scores, seen, K)
    assert np.array_equal(place.get(lengths), counts)
    assert np.array_equal(place.get(indices), expected)
