"""importance_topk on every backend against the float64 sum of its definition, under the numeric policy; traps of positions, groups, widths and ties."""
import numpy as np
import oracle
import pytest
from drivers import EVERY, arrays, numpy_dtype
from importances import ends, importances, shares
from judge import normal
from numeric import assert_chosen, assert_close, assert_same_bits

import sparsetile as st

every = pytest.mark.parametrize("backend", EVERY)


def case(dtype, B=1, Hq=4, Hk=2, T=5, S=90, D=32, k=3, block=8, stride=4, select_block=16, **features):
    return pytest.param(dtype, (B, Hq, Hk, T, S, D), k, (block, stride, select_block), features,
                        id="-".join(map(str, (dtype, f"h{Hq}:{Hk}", f"{T}x{S}", f"d{D}", f"k{k}", f"{block}/{stride}/{select_block}", *features))))


CASES = [
    case("float32", Hq=3, Hk=1, D=31), case("bfloat16", Hq=16, Hk=1, D=64, S=100, k=4), case("float16", B=2, Hq=6, Hk=2, D=72, lengths=True), case("bfloat16", Hq=7, Hk=1, T=1, S=77, D=192, k=4),
    case("float16", Hq=12, Hk=1, T=3, D=40, force_first=0, force_last=0), case("float32", Hq=2, Hk=2, T=12, S=20, k=1, force_first=0, force_last=1), case("bfloat16", B=2, starts=True, S=70),
    case("float32", Hq=4, Hk=4, block=16, stride=16, select_block=16), case("bfloat16", Hq=4, Hk=1, S=200, block=32, stride=16, select_block=64, k=2, force_last=1),
    case("float16", Hq=32, Hk=2, T=4, D=16, block=16, stride=4, select_block=4, k=9), case("float32", T=4, S=60, at=55), case("float32", T=4, S=6, k=4), case("bfloat16", T=12, S=9, k=3, select_block=4),
]


@every
@pytest.mark.parametrize("dtype, sizes, top_k, cut, features", CASES)
def test_indices_and_scores(on, backend, dtype, sizes, top_k, cut, features, rng):
    judged(on, dtype, sizes, top_k, cut, features, True, rng)


@every
@pytest.mark.parametrize("dtype, sizes, top_k, cut, features", CASES[1:3] + CASES[5:6])
def test_indices_alone(on, backend, dtype, sizes, top_k, cut, features, rng):
    judged(on, dtype, sizes, top_k, cut, features, False, rng)


@pytest.mark.parametrize("backend, path", [pytest.param("triton", "select", id="triton-select", marks=pytest.mark.interp), pytest.param("cupy", "fused", id="cupy-fused")])
@pytest.mark.parametrize("return_scores", (False, True))
@pytest.mark.parametrize("dtype, sizes, top_k, cut, features", CASES[1:2] + CASES[8:9])
def test_the_path_that_small_calls_do_not_take(on, backend, path, dtype, sizes, top_k, cut, features, return_scores, rng):
    judged(on, dtype, sizes, top_k, cut, features, return_scores, rng, config=dict(path=path))


def judged(on, dtype, sizes, top_k, cut, features, return_scores, rng, config=None):
    (B, Hq, Hk, T, S, D), (block, stride, select_block) = sizes, cut
    C = max(0, (S - block) // stride + 1)
    q, k = normal(rng, (B, Hq, T, D), numpy_dtype(dtype)), normal(rng, (B, Hk, C, D), numpy_dtype(dtype))
    where = {"kv_length": rng.integers(0, S + 1, B).astype(np.int32)} if "lengths" in features else {}
    where |= {"q_start": rng.integers(-T, S, B).astype(np.int32)} if "starts" in features else {"q_start": features["at"]} if "at" in features else {}
    key_end, block_end = ends(B, T, S, C, block, stride, select_block, where.get("kv_length"), where.get("q_start"))
    seen = np.arange(C) < key_end[..., None]                                        # [B,1,T,C]
    _, lse = oracle.attention(q, k, k, np.broadcast_to(seen, (B, Hq, T, C)), scale=D ** -0.5)
    lse = lse.astype(np.float32)
    first, last = features.get("force_first", 1), features.get("force_last", 2)
    got = on.importance_topk(q, k, lse, top_k, block=block, stride=stride, select_block=select_block, keys=S, force_first=first, force_last=last, return_scores=return_scores,
                             config=config, **where)
    selection, best = got if return_scores else (got, None)
    assert selection.granularity == select_block and selection.causal
    truth, plain = (importances(shares(q, k, lse, D ** -0.5, kind), key_end, block, stride, select_block, S) for kind in (np.float64, np.float32))
    j = np.arange(truth.shape[-1])
    forced = (j < first) | (j >= block_end[..., None] - last)
    (indices, lengths), reduction = arrays(selection.indices, selection.lengths), Hq // Hk * D
    assert_chosen("blocks", indices, lengths, truth, plain, top_k, visible=j < block_end[..., None], forced=forced, take_all=not return_scores, reduction=reduction)
    if return_scores:
        best, = arrays(best)
        picked = lambda x: np.where(indices >= 0, np.take_along_axis(x, np.maximum(indices, 0).astype(np.int64), -1), x.dtype.type(-np.inf))  # noqa: E731
        assert_close("importance", best, picked(truth), picked(plain), reduction=reduction)


@every
def test_equal_importances_go_to_the_smaller_index_and_nothing_unseen_is_read(on, backend):
    """All keys alike, and NaN in those that no query sees. The last compressed key of the first query's sight ends exactly at it."""
    q, k, lengths = np.zeros((1, 2, 3, 16), np.float32), np.full((1, 1, 21, 16), np.nan, np.float32), np.array([70], np.int32)
    k[:, :, :16] = 1  # keys 0 .. 15 end at 67 or before, the last at position 67
    lse = np.log(np.full((1, 2, 3), 16, np.float32))
    # block 0 gets 7 strides' worth (no compressed key overlaps it from the left), blocks 1 to 3 get 8
    for top_k, expected in ((4, [1, 2, 3, 4]), (3, [1, 2, 4])):
        chosen = on.importance_topk(q, k, lse, top_k, block=8, stride=4, select_block=16, keys=88, kv_length=lengths, force_first=0, force_last=1)
        assert (arrays(chosen.indices)[0] == expected).all()


@every
def test_the_same_bits_twice_and_for_a_permuted_batch(on, backend, rng):
    q, k = normal(rng, (2, 4, 2, 16), np.float16), normal(rng, (2, 2, 20, 16), np.float16)
    lse = normal(rng, (2, 4, 2), np.float32) + 3
    options, order = dict(block=8, stride=4, select_block=16, keys=84, return_scores=True), np.array([1, 0])
    (one, best), (two, again), (other, moved) = (on.importance_topk(*x, 4, **options) for x in ((q, k, lse), (q, k, lse), (q[order], k[order], lse[order])))
    for name, a, b in (("indices", one.indices, two.indices), ("importance", best, again), ("permuted", arrays(one.indices)[0][order], other.indices), ("permuted importance", arrays(best)[0][order], moved)):
        assert_same_bits(name, a, b)


@pytest.mark.parametrize("change, error, words", [
    (dict(block=6), ValueError, "block: expected a multiple of stride"), (dict(keys=83), ValueError, "keys: expected 84 to 87"), (dict(keys=88), ValueError, "keys: expected 84 to 87"),
    (dict(force_first=3), ValueError, "force_first"), (dict(lse=np.zeros((1, 2, 6), np.float32)), ValueError, "lse"), (dict(lse=np.zeros((1, 2, 5))), TypeError, "lse"),
    (dict(k=np.zeros((1, 3, 20, 8), np.float32)), ValueError, "divides"), (dict(top_k=0), ValueError, "top_k"), (dict(return_scores=1), TypeError, "return_scores"),
])
def test_bad_arguments_are_named(change, error, words):
    good = dict(q=np.zeros((1, 2, 5, 8), np.float32), k=np.zeros((1, 1, 20, 8), np.float32), lse=np.zeros((1, 2, 5), np.float32), top_k=4, block=8, stride=4, select_block=16, backend="numba")
    with pytest.raises(error, match=words):
        st.importance_topk(**good | change)
    st.importance_topk(**good)
