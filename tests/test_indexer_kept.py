"""indexer_topk of Triton where only scores that may be chosen are stored (path kept): the same set as by way of all scores, whatever the rows look like."""
from unittest import mock

import numpy as np
import pytest
from drivers import EVERY, arrays, numpy_dtype, through
from judge import normal
from numeric import assert_same_bits

from sparsetile.backends.contract import Problem
from sparsetile.ci import misled

on_triton = pytest.mark.parametrize("backend", EVERY[2:3])
KEPT = dict(path="kept", capacity=512, sample=512, select_warps=4, queries=4)
WHERE = "triton.index_keep.launch"


def same(on, q, k, w, top_k, rescued=None, rows=None, **options):
    """Indices of the call, after they were compared with topk's of the scores. rescued: whether rows must (not) have lost their bound."""
    from sparsetile.backends.triton import index_keep
    lost, launch = [], index_keep.relaunch.launch

    def watched(fn, grid, place, pointers, numbers, fixed, *rest):
        if fn is index_keep.rescue_rows:
            count, bound = pointers[-1][:grid[0], 0], pointers[-1][:grid[0], 4]
            lost.append(int(((count > fixed["CAPACITY"]) | ((count < top_k) & (bound != 0))).sum()))
        launch(fn, grid, place, pointers, numbers, fixed, *rest)

    with through(WHERE), mock.patch.object(index_keep.relaunch, "launch", watched), mock.patch.object(index_keep, "rows_at_once", lambda *_: rows) if rows else mock.MagicMock():
        kept = on.indexer_topk(q, k, w, top_k, config=KEPT | dict(capacity=1024, sample=1024) if top_k > 200 else KEPT, **options)
    two = on.topk(on.indexer_scores(q, k, w, **options), top_k)
    assert_same_bits("lengths", kept.lengths, two.lengths)
    assert_same_bits("indices", kept.indices, two.indices)
    assert rescued is None or rescued == (sum(lost) > 0), f"{lost} rows had no bound that holds"
    return arrays(kept.indices)[0]


def problem(rng, dtype="float16", B=1, H=16, T=6, S=1300, D=32):
    return normal(rng, (B, H, T, D), numpy_dtype(dtype)), normal(rng, (B, S, D), numpy_dtype(dtype)), normal(rng, (B, H, T), np.float32)


@on_triton
@pytest.mark.parametrize("rows", [None, 4, 5, 12], ids=lambda n: f"{n} rows at once")
@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn"])
def test_like_the_scores(on, backend, dtype, rows, rng):
    q, k, w = problem(rng, dtype, B=2, H=20, D=40)
    same(on, q, k, w, 40, k_scale=(rng.random(k.shape[:2]) + 0.3).astype(np.float32), causal=False, rescued=False, rows=rows)


@on_triton
@pytest.mark.parametrize("start", [1280, -3, 100, "each"])
def test_causal(on, backend, start, rng):
    q, k, w = problem(rng, B=2)
    same(on, q, k, w, 40, q_start=np.array([1270, 7], np.int32) if start == "each" else start, activation=None, rows=4)


@on_triton
def test_windows_with_nan_outside(on, backend, rng):
    q, k, w = problem(rng, B=2)
    start, end = rng.integers(20, 600, (2, 6)).astype(np.int32), rng.integers(500, 1290, (2, 6)).astype(np.int32)
    start[0, 1], end[0, 1] = 900, 20  # a row that sees nothing
    k[:, :20], k[:, 1290:] = np.nan, np.nan
    same(on, q, k, w, 40, key_start=start, key_end=end, causal=False)


@on_triton
@pytest.mark.parametrize("top_k", [1, 33, 500])
def test_equal_scores(on, backend, top_k, rng):
    q, k, w = problem(rng)
    q[:], k[:], w[:] = 1, 0, 1
    assert (same(on, q, k, w, top_k, causal=False) == np.arange(top_k)).all()
    k[:, ::3] = 1
    best = np.r_[0:1300:3, 1:1300:3, 2:1300:3]
    want = np.sort(np.r_[best[:434], np.sort(best[434:])][:top_k])
    assert (same(on, q, k, w, top_k, causal=False) == want).all()


@on_triton
def test_nan_and_few_finite_scores(on, backend, rng):
    q, k, w = problem(rng)
    k[:, 5::7] = np.nan
    scale = np.ones(k.shape[:2], np.float32)
    scale[0, [3, 9, 700]] = np.inf
    same(on, q, k, w, 40, k_scale=scale, causal=False)
    k[:, 30:] = np.nan
    same(on, q, k, w, 40, causal=False)


@on_triton
@pytest.mark.parametrize("slope", [1, -1, 0], ids=["rising", "falling", "equal"])
@pytest.mark.parametrize("few", [True, False], ids=["the sample is better", "the sample is worse"])
def test_a_sample_that_misleads(on, backend, few, slope, rng):
    """Scores made against the sample: too few pass the bound, or more than there is room for."""
    q, k, w = problem(rng)
    q[:], k[:], w[:] = 1, 1, 1
    same(on, q, k, w, 100, k_scale=misled.factors(1300, 100, "triton", 4, few, slope)[None], causal=False, rescued=True)


def test_every_key_is_dealt_once():
    for S in (600, 1300, 131072, 131073, 50001):
        at = misled.dealt(S)
        assert (np.sort(at.ravel()) == np.arange(at.size)).all()


def test_tiles_in_a_row_lie_evenly():
    """The sample is the first tiles: with gaps in each stretch of at most 8 times the mean (6.5 in all lengths up to 33000), it speaks for keys between them, also where neighbours score alike."""
    for length in (*range(130, 9000, 7), 960, 7440, 8160, 131072 // 128):
        at = np.sort(np.arange(64) * misled.step_of(length, True) % length)
        assert np.diff(at, append=at[0] + length).max() <= 8 * length / 64, length


def test_which_problems():
    from sparsetile.backends.triton import indexer_topk as kernel

    def path(T=4096, S=131072, H=64, D=128, K=2048, arch="sm_90a", features=("scale",), kind="float8_e4m3fn"):
        about = Problem.of("indexer_topk", dict(B=1, H=H, T=T, S=S, D=D, K=K), dict(q=kind, k=kind), arch, features)
        config = kernel.default_config(about)
        assert not isinstance(kernel.resources(about, config), str)
        forced = kernel.resources(about, {**config, "path": "kept"})
        return config["path"], forced if isinstance(forced, str) else ""

    assert path() == path(S=32768, T=2048) == path(kind="bfloat16") == ("kept", "")
    for other in (dict(T=1), dict(H=8), dict(H=128), dict(D=576), dict(features=["scale", "pool"]), dict(features=["return_scores"]), dict(features=["paged"]), dict(arch="gfx942")):
        chosen, why = path(**other)
        assert chosen == "stored" and "take path stored" in why
    assert "take more of either" in path(K=30000)[1]
