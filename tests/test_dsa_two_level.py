"""The indexer in two levels against its definition written out (naive_dsa.py): which blocks, which keys in them, what it may miss and what it never does."""
import ml_dtypes
import naive_dsa as naive
import numpy as np
import pytest
from drivers import EVERY, arrays
from numeric import assert_same_bits, to_numpy

import sparsetile as st

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
every, cpu = pytest.mark.parametrize("backend", EVERY), pytest.mark.parametrize("backend", ["reference", "numba"])


def made(rng, B=1, H=3, T=6, S=61, D=8, kind=np.float32):
    """index_q, index_k, index_weights: small integers, so that scores of keys and of the means of 2, 4 or 8 of them are exact and often equal."""
    whole = lambda *shape: rng.integers(-3, 4, shape).astype(kind)  # noqa: E731
    return whole(B, H, T, D), whole(B, S, D), whole(B, H, T).astype(np.float32)


def check(on, index, top_k, block, blocks, **where):
    """The keys are those of the definition."""
    (B, _, T, _), S = index[0].shape, index[1].shape[1]
    given = {name: np.asarray(x, np.int32) if isinstance(x, tuple) else x for name, x in where.items()}
    seen = naive.visible(T, S, B=B, **given)
    spoiled = index[1].copy()
    spoiled[~seen.any(1)] = np.nan
    chosen = on.dsa_two_level_selection(index[0], spoiled, index[2], top_k=top_k, block=block, blocks=blocks, **given)
    found, lengths = arrays(chosen.indices, chosen.lengths)
    want = naive.two_levels(*index, seen, top_k, block, blocks)
    assert found.shape == (B, 1, T, min(top_k, S)) and chosen.granularity == 1 and chosen.causal and chosen.distinct
    for row, n, kept in zip(found.reshape(B * T, -1), lengths.ravel(), want.reshape(B * T, S)):
        assert row[:n].tolist() == np.flatnonzero(kept).tolist() and (row[n:] == -1).all()
    return want, seen


CASES = {"ragged": ({}, {}), "T = S": (dict(T=40, S=40), {}), "one query": (dict(T=1, H=17), {}), "two sequences, lengths": (dict(B=2), dict(kv_length=(61, 40))),
         "an empty sequence": (dict(B=2, T=3), dict(kv_length=(0, 59))), "before the start": ({}, dict(q_start=-2)), "past the keys": (dict(T=3), dict(q_start=70)),
         "lengths and starts": (dict(B=2, T=3), dict(kv_length=(50, 61), q_start=(48, 20)))}


@every
@pytest.mark.parametrize("case", CASES)
def test_blocks_then_keys(on, backend, case, rng):
    sizes, where = CASES[case]
    check(on, made(rng, **sizes), 7, 4, 3, **where)


@every
@pytest.mark.parametrize("top_k, block, blocks", [(1, 2, 1), (5, 8, 1), (32, 8, 4), (9, 4, 13)])
@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_any_sizes(on, backend, kind, top_k, block, blocks, rng):
    check(on, made(rng, kind=kind), top_k, block, blocks)


@pytest.mark.parametrize("backend", EVERY[:2])
def test_many_queries(on, backend, rng):
    """More queries than a launch grid's second axis takes; most rows see whole blocks only, or one key."""
    T = 70_000 if backend == "numba" else 2000
    q, k, weights = made(rng, H=1, T=T, S=64, D=2)
    check(on, (q, k, weights), 5, 4, 3, q_start=64 - T)


@every
def test_float8_in_one_piece_and_in_pages(on, backend, rng):
    """Keys along sixteen axes at right angles, whatever their scales: means, scores and ties are exact in float8 too. Pages in any order hold what the arrays hold; garbage past the tokens is not read."""
    B, S, D, block = 2, 78, 16, 8
    axes = np.array([[(-1) ** bin(i & j).count("1") for i in range(D)] for j in range(D)], np.float32)
    along = np.arange(-(-S // block)) % 5
    k = (axes[along].repeat(block, 0)[:S] * rng.choice([1, 2, 4, 8], (B, S, 1))).astype(np.float32)
    q, weights = axes[rng.integers(0, 6, (B, 2, 3))].astype(E4M3), rng.integers(1, 4, (B, 2, 3)).astype(np.float32)
    scale = 2.0 ** rng.integers(-2, 3, (B, S)).astype(np.float32)
    given = dict(top_k=11, block=block, blocks=3)
    one = on.dsa_two_level_selection(q, (k / scale[..., None]).astype(E4M3), weights, index_scale=scale, **given)
    want = naive.two_levels(q, k, weights, naive.visible(3, S, B=B), 11, block, 3)
    assert [sorted(row[row >= 0].tolist()) for row in to_numpy(one.indices).reshape(-1, 11)] == [np.flatnonzero(row).tolist() for row in want.reshape(-1, S)]
    for page_size in (4, 8):
        cache = st.IndexerKeys.empty(on.put(np.zeros(1, np.float32)), sequences=B, pages=64, page_size=page_size, width=D)
        cache.append(on.put(k[:, :30]), [30, 11], backend=backend)
        cache.append(on.put(np.stack([k[0, 30:], k[1, 11:59]])), backend=backend)
        held = {page for pages in cache.book.pages for page in pages}
        for page in set(range(64)) - held:
            cache.pools[0][page] = 0x7F
        for b, pages in enumerate(cache.book.pages):
            cache.page_table[b, len(pages):] = on.put(np.resize(np.array([-1, 2 ** 31 - 1, 999], np.int32), cache.page_table.shape[1] - len(pages)))
        paged = on.dsa_two_level_selection(q, cache, weights, **given)
        whole, scales = cache.gather()
        again = on.dsa_two_level_selection(q, whole, weights, index_scale=scales, kv_length=np.array([78, 59], np.int32), **given)
        assert_same_bits("pages", paged.indices, again.indices), assert_same_bits("pages", paged.lengths, again.lengths)
        assert_same_bits("the first sequence", paged.indices[:1], one.indices[:1])


@every
def test_all_blocks_are_exact_and_few_are_not(on, backend, rng):
    """An anti-cheat pair: it says what dsa_selection says where every block is taken, and where a few are it misses keys."""
    index = made(rng, T=20, S=64)
    exact, = arrays(on.dsa_selection(*index, top_k=8).indices)
    assert_same_bits("all blocks", on.dsa_two_level_selection(*index, top_k=8, block=4, blocks=16).indices, exact)
    few, = arrays(on.dsa_two_level_selection(*index, top_k=8, block=4, blocks=3).indices)
    shared = [len(set(a[a >= 0]) & set(b[b >= 0])) / 8 for a, b in zip(exact[0, 0], few[0, 0])]
    assert 0.2 < np.mean(shared) < 0.9


@cpu
def test_later_keys_have_no_say(on, backend, rng):
    """Keys past a query's position, inside its own block too, may be anything: NaN where nobody looks, other keys where others do."""
    q, k, weights = made(rng, T=30, S=60)
    first, = arrays(on.dsa_two_level_selection(q, k, weights, top_k=6, block=8, blocks=3).indices)
    for t in (0, 5, 13, 28):
        other = k.copy()
        other[:, 31 + t:] = np.nan if t % 2 else 3
        again, = arrays(on.dsa_two_level_selection(q, other, weights, top_k=6, block=8, blocks=3).indices)
        assert_same_bits(f"queries up to {t}", first[:, :, :t + 1], again[:, :, :t + 1])


@cpu
def test_a_key_that_is_not_a_number_is_not_chosen(on, backend, rng):
    """Its block is passed over, but for the queries whose own it is: they see the others in it."""
    q, k, weights = made(rng, T=4, S=64)
    k[:, 9], k[:, 61] = np.nan, np.nan
    chosen, = arrays(on.dsa_two_level_selection(q, k, weights, top_k=16, block=8, blocks=4).indices)
    assert not np.isin(chosen, [*range(8, 16), 61]).any() and np.isin(60, chosen)


def test_every_framework(rng):
    index = made(rng, T=12, S=61)
    given = dict(top_k=7, block=4, blocks=3, backend="numba")
    want = st.dsa_two_level_selection(*index, **given).indices
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")
    for put, kind in ((torch.from_numpy, torch.Tensor), (jax.numpy.asarray, jax.Array)):
        got = st.dsa_two_level_selection(*map(put, index), **given, kv_length=put(np.array([61], np.int32))).indices
        assert isinstance(got, kind)
        assert_same_bits("indices", got, want)


def test_it_goes_where_a_selection_goes(rng):
    """Attention over it, forward and backward, is attention over its keys."""
    torch = pytest.importorskip("torch")
    index = [torch.from_numpy(x) for x in made(rng, T=12, S=61)]
    q, k, v = (torch.from_numpy(rng.standard_normal((1, h, n, 16)).astype(np.float32)).requires_grad_() for h, n in ((4, 12), (2, 61), (2, 61)))
    chosen = st.dsa_two_level_selection(*[x.requires_grad_() for x in index], top_k=7, block=4, blocks=3, backend="numba")
    assert not chosen.indices.requires_grad
    out = st.sparse_attention(q, k, v, chosen, backend="numba")
    mask = torch.from_numpy(naive.two_levels(*[x.detach().numpy() for x in index], naive.visible(12, 61), 7, 4, 3))[:, None]
    want = torch.nn.functional.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), mask)
    for one, two in zip(torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(want.sum(), (q, k, v))):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("change, error, words", [
    (dict(blocks=1), ValueError, r"blocks: expected blocks \* block >= top_k = 7, got 1 \* 4"), (dict(block=0), ValueError, "block"), (dict(top_k=0), ValueError, "top_k"),
    (dict(kv_length=np.zeros(2, np.int32)), ValueError, "kv_length"), (dict(block=2.5), TypeError, "block")])
def test_bad_arguments_are_named(change, error, words, rng):
    with pytest.raises(error, match=words):
        st.dsa_two_level_selection(*made(rng), **dict(top_k=7, block=4, blocks=3, backend="numba") | change)


def test_what_it_cannot_take_says_so(rng):
    keys = st.IndexerKeys.empty(np.zeros(1), sequences=1, pages=9, page_size=6, width=8)
    with pytest.raises(ValueError, match="block: expected a multiple of the cache's page_size 6, got 4"):
        st.dsa_two_level_selection(made(rng)[0].astype(E4M3), keys, made(rng)[2], top_k=7, block=4, blocks=3)
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")
    with pytest.raises(Exception, match="not traced by torch.compile"):  # in PyTorch's words around ours
        torch.compile(lambda *x: st.dsa_two_level_selection(*x, top_k=7, block=4, blocks=3).indices, fullgraph=True, backend="eager")(*map(torch.from_numpy, made(rng)))
    with pytest.raises(st.Unsupported, match="jax.jit"):
        jax.jit(lambda *x: st.dsa_two_level_selection(*x, top_k=7, block=4, blocks=3).indices)(*made(rng))
