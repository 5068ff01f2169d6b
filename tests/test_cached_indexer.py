"""Indexer keys in pages: scores and selections are those of the same keys in one piece; garbage is not read, holes score -inf; sparse attention over both caches."""
import ml_dtypes
import numpy as np
import pytest
from drivers import EVERY
from judge import indexer_scores, indexer_topk
from numeric import to_numpy

import sparsetile as st

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
GARBAGE = np.array([-1, -2 ** 31, 2 ** 31 - 1, 999], np.int32)
every = pytest.mark.parametrize("backend", EVERY)


def setup(on, rng, lengths, page_size=6, H=4, T=3, D=16):
    """An IndexerKeys with garbage past each sequence, and its keys, scales, queries and weights."""
    B, S = len(lengths), max(lengths)
    cache = st.IndexerKeys.empty(on.put(np.zeros(1, np.float32)), sequences=B, pages=sum(-(-n // page_size) for n in lengths) + 2, page_size=page_size, width=D)
    cache.append(on.put(rng.standard_normal((B, S, D)).astype(np.float32)), list(lengths), backend=on.backend)
    k, scale = map(to_numpy, cache.gather())
    held = {page for pages in cache.book.pages for page in pages}
    for page in set(range(cache.pools[0].shape[0])) - held:
        cache.pools[0][page] = 0x7F
    for b, pages in enumerate(cache.book.pages):
        cache.page_table[b, len(pages):] = on.put(np.resize(GARBAGE, cache.page_table.shape[1] - len(pages)))
    q = rng.standard_normal((B, H, T, D)).astype(E4M3)
    return cache, k, scale, q, rng.standard_normal((B, H, T)).astype(np.float32)


@every
@pytest.mark.parametrize("causal, H, T", [(True, 4, 3), (False, 4, 3), (True, 16, 2)])
def test_scores_are_those_of_the_same_keys_in_one_piece(on, backend, rng, causal, H, T):
    cache, k, scale, q, weights = setup(on, rng, (40, 29), H=H, T=T)
    got = to_numpy(on.indexer_scores(q, cache, weights, causal=causal))
    assert got.shape[2] == cache.capacity
    for b, n in enumerate((40, 29)):
        one = slice(b, b + 1)
        want = indexer_scores(on, q[one], k[one, :n], weights[one], k_scale=scale[one, :n], causal=causal)
        assert got[one, :, :n].tobytes() == want.tobytes() and (got[b, :, n:] == -np.inf).all()


@every
@pytest.mark.parametrize("top_k, pool", [(7, 1), (64, 1), (3, 4)])
def test_selections_are_those_of_the_same_keys_in_one_piece(on, backend, rng, top_k, pool):
    cache, k, scale, q, weights = setup(on, rng, (40, 29))
    got = on.indexer_topk(q, cache, weights, top_k, pool=pool)
    for b, n in enumerate((40, 29)):
        one = slice(b, b + 1)
        want, _ = indexer_topk(on, q[one], k[one, :n], weights[one], top_k, k_scale=scale[one, :n], pool=pool)
        assert (to_numpy(got.indices)[b, 0] == want[0]).all()


@every
def test_holes_score_nothing_and_are_not_chosen(on, backend, rng):
    cache, k, scale, q, weights = setup(on, rng, (30,))
    cache.page_table[0, 1], cache.page_table[0, 3] = 2 ** 31 - 1, -5
    hole = np.isin(np.arange(30) // 6, (1, 3))
    got = to_numpy(on.indexer_scores(q, cache, weights, causal=False))[0, :, :30]
    whole = to_numpy(on.indexer_scores(q, on.put(k), weights, k_scale=scale, causal=False))[0]
    assert (got[:, hole] == -np.inf).all() and got[:, ~hole].tobytes() == whole[:, ~hole].tobytes()
    for top_k in (4, 40):
        chosen = to_numpy(on.indexer_topk(q, cache, weights, top_k, causal=False).indices)
        assert not np.isin(chosen, np.flatnonzero(hole)).any() and (np.sort(chosen)[..., -min(top_k, 18):] >= 0).all()


@every
def test_key_end_and_lengths_both_end_the_keys(on, backend, rng):
    cache, _, _, q, weights = setup(on, rng, (20, 11))
    got = to_numpy(on.indexer_scores(q, cache, weights, causal=False, key_end=np.array([5, 15, 3], np.int32)))
    assert [(np.isfinite(row).sum()) for row in got.reshape(-1, got.shape[2])] == [5, 15, 3, 5, 11, 3]


@every
def test_sparse_attention_of_deepseek_over_its_two_caches(on, backend, rng):
    """Select by paged indexer keys, attend over paged latents by the selection's own indices: as with both in one piece."""
    cache, k, scale, q, weights = setup(on, rng, (40, 29))
    latent, rope = (rng.standard_normal((2, 40, n)).astype(np.float32) for n in (32, 8))
    latents = st.PagedLatent.empty(on.put(np.zeros(1, np.float32)), sequences=2, pages=20, page_size=4, rank=32, rotary=8)
    latents.append(on.put(latent), on.put(rope), [40, 29], backend=backend)
    queries = rng.standard_normal((2, 2, 3, 40)).astype(np.float32)
    chosen = on.indexer_topk(q, cache, weights, 7)
    got = to_numpy(on.sparse_attention(queries, latents, pattern=chosen))
    keys = np.concatenate([latent, rope], -1)[:, None]
    for b, n in enumerate((40, 29)):
        one, part = slice(b, b + 1), st.Selection(chosen.indices[b:b + 1], lengths=chosen.lengths[b:b + 1], causal=True)
        want = to_numpy(on.sparse_attention(queries[one], keys[one, :, :n], pattern=part, value_width=32))
        assert got[one].tobytes() == want.tobytes()


def test_what_cannot_read_pages_says_so():
    """A page hole at the end of a row's window would be a forced block without a key."""
    pytest.importorskip("triton")
    from sparsetile.backends.contract import Problem
    from sparsetile.ops import dispatch
    dims, kinds = dict(B=1, H=4, T=1, S=64, D=64, K=8), dict(q="bfloat16", k="bfloat16")
    for backend in ("triton", "cupy"):
        supports = dispatch.kernel(backend, "indexer_topk").supports
        assert "cache.gather()" in supports(Problem.of("indexer_topk", dims, kinds, "sm_90a", ["paged", "pool", "force_last"]))
        assert supports(Problem.of("indexer_topk", dims, kinds, "sm_90a", ["paged", "pool"])) is None


def test_misuse_is_named(rng):
    cache = st.IndexerKeys.empty(np.zeros(1), sequences=1, pages=1, width=16)
    q, weights = np.zeros((1, 1, 1, 16), E4M3), np.zeros((1, 1, 1), np.float32)
    with pytest.raises(ValueError, match="k_scale: expected None"):
        st.indexer_scores(q, cache, weights, k_scale=np.zeros((1, 1), np.float32))
    with pytest.raises(ValueError, match="k: expected element type of q float16, got float8_e4m3fn"):
        st.indexer_scores(q.astype(np.float16), cache, weights)
    with pytest.raises(st.Unsupported, match="PagedKV holds no keys of an indexer"):
        st.indexer_scores(q, st.PagedKV.empty(np.zeros(1), sequences=1, pages=1, heads=1, width=4), weights)
    with pytest.raises(st.Unsupported, match="IndexerKeys holds no keys of attention"):
        st.sparse_attention(np.zeros((1, 1, 1, 16)), cache)
