"""Caches: formats byte for byte, allocation, sharing, what a bad call gets, and accounting."""
from pathlib import Path

import cache_format
import ml_dtypes
import numpy as np
import pytest
from drivers import EVERY, to_torch
from numeric import to_numpy

import sparsetile as st

GOLDEN = Path(__file__).with_name("float8_caches.golden")
BF16 = np.dtype(ml_dtypes.bfloat16)
GARBAGE = np.array([-1, -2 ** 31, 2 ** 31 - 1, 12345], np.int32)


def made(on, kind, **sizes):
    """An empty cache whose memory is the driver's."""
    return kind.empty(on.put(np.zeros(1, np.float32)), **sizes)


def golden():
    return dict(line.split(": ") for line in GOLDEN.read_text().splitlines() if not line.startswith("#"))


def test_the_golden_file_is_what_the_format_says():
    assert golden() == cache_format.golden_lines()


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("power_of_two", [False, True], ids=["arbitrary", "power-of-two"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float8_caches_are_the_golden_bytes(on, backend, power_of_two, dtype):
    latent, rotary, keys = (x.astype(BF16 if dtype == "bfloat16" else dtype) for x in cache_format.golden_inputs())
    word, want = "power_of_two" if power_of_two else "arbitrary", golden()
    cache = made(on, st.PagedLatent, sequences=1, pages=3, page_size=2, dtype="float8", power_of_two=power_of_two)
    cache.append(on.put(latent[None]), on.put(rotary[None]), backend=backend)
    got = to_numpy(cache.pools[0]).reshape(-1, 656)
    assert [row.tobytes().hex() for row in got[:4]] == [want[f"latent {word} {n}"] for n in range(4)] and not got[4:].any()
    indexer = made(on, st.IndexerKeys, sequences=1, pages=2, page_size=4, power_of_two=power_of_two)
    indexer.append(on.put(keys[None]), backend=backend)
    assert to_numpy(indexer.pools[0])[0].tobytes().hex() == want[f"indexer {word} page"]
    back, rope = map(to_numpy, cache.gather("float32"))
    scale = np.abs(latent.astype(np.float32)).reshape(4, 4, 128).max(-1, keepdims=True) / 448
    assert (np.abs(back - latent.astype(np.float32)).reshape(4, 4, 128) <= 16 * scale * (2 if power_of_two else 1) * 1.0001).all() and (rope == rotary.astype(np.float32)).all()


@pytest.mark.parametrize("backend", EVERY)
def test_groups_of_any_size_and_of_no_number(on, backend, rng):
    """Magnitudes from denormal to huge, zeros, NaN and inf: byte for byte."""
    x = (rng.standard_normal((2, 5, 128)) * np.exp2(rng.integers(-150, 120, (2, 5, 1)))).astype(np.float32)
    x[0, 1, 7], x[0, 2, 9], x[0, 3, 0], x[1, 0] = np.nan, np.inf, -np.inf, 0
    for power_of_two in (False, True):
        cache = made(on, st.IndexerKeys, sequences=2, pages=2, page_size=5, power_of_two=power_of_two)
        cache.append(on.put(x), backend=backend)
        pages = to_numpy(cache.page_table)[:, 0]
        for b in range(2):
            assert to_numpy(cache.pools[0])[pages[b]].tobytes() == cache_format.indexer_page(x[b], power_of_two)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16], ids=["float32", "float16", "bfloat16"])
def test_rows_come_back_as_they_went_in(on, backend, rng, dtype):
    """Ragged appends in chunks, odd widths, strided inputs."""
    cache = made(on, st.PagedKV, sequences=3, pages=12, page_size=3, heads=2, width=5, value_width=7, dtype=np.dtype(dtype).name)
    k, v = (rng.standard_normal((3, 2, 9, 2 * width)).astype(dtype)[..., :width] for width in (5, 7))
    held = [0, 0, 0]
    for counts in ([4, 0, 1], [2, 1, 3], [3, 1, 0]):
        rows = [np.stack([np.roll(x[b], -held[b], axis=1)[:, :5] for b in range(3)]) for x in (k, v)]
        cache.append(*map(on.put, rows), counts, backend=backend)
        held = [a + b for a, b in zip(held, counts)]
    for got, x in zip(cache.gather(), (k, v)):
        got = to_numpy(got)
        assert got.shape[2] == max(held)
        for b, n in enumerate(held):
            assert (got[b, :, :n] == x[b, :, :n]).all() and not got[b, :, n:].astype(np.float32).any()


@pytest.mark.parametrize("backend", EVERY)
def test_garbage_in_the_page_table_is_never_written_through(on, backend, rng):
    cache = made(on, st.PagedKV, sequences=4, pages=4, page_size=2, heads=1, width=8)
    cache = st.PagedKV(*cache.pools, cache.page_table, cache.lengths)  # another owner hands out its pages
    guard = [pool.copy() if isinstance(pool, np.ndarray) else pool.clone() for pool in cache.pools]
    cache.page_table[:, :4] = on.put(np.tile(GARBAGE[:, None], 4))
    cache.lengths[:] = on.put(np.array([0, -7, 2 ** 31 - 2, 3], np.int32))
    cache.write(*(on.put(np.ones((4, 1, 3, 8), np.float32)) for _ in "kv"), backend=backend)
    assert all((to_numpy(pool) == to_numpy(old)).all() for pool, old in zip(cache.pools, guard))


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("pinned", [0, 3])
def test_a_rolling_window_keeps_the_first_and_the_last(on, backend, rng, pinned):
    cache = made(on, st.RollingKV, sequences=2, window=4, pinned=pinned, heads=1, width=2)
    k = rng.standard_normal((2, 1, 30, 2)).astype(np.float32)
    done = [0, 0]
    for counts in ([1, 2], [1, 0], [5, 1], [0, 9], [1, 1], [2, 1], [9, 3]):
        rows = np.stack([np.roll(k[b], -done[b], axis=1)[:, :9] for b in range(2)])
        cache.append(on.put(rows), on.put(-rows), counts, backend=backend)
        done = [a + b for a, b in zip(done, counts)]
        got, values, where, rank = map(to_numpy, (*cache.gather(), cache.positions(), cache.positions(in_cache=True)))
        for b, n in enumerate(done):
            kept = [p for p in range(n) if p < pinned or p >= max(pinned, n - 4)]
            assert (got[b, 0, :len(kept)] == k[b, 0, kept]).all() and (values[b] == -got[b]).all()
            assert sorted(where[b][where[b] >= 0]) == kept and [kept.index(p) if p >= 0 else -1 for p in where[b]] == list(rank[b])
            assert (to_numpy(cache.pools[0])[b, where[b] >= 0, 0] == k[b, 0, where[b][where[b] >= 0]]).all()


def paged(**sizes):
    return st.PagedKV.empty(np.zeros(1, np.float32), **dict(dict(sequences=3, pages=4, page_size=2, heads=1, width=1), **sizes))


def row(*values):
    return np.array(values, np.float32).reshape(len(values), 1, 1, 1)


def test_a_fork_shares_pages_until_one_writes():
    cache = paged()
    cache.append(*[np.arange(9, dtype=np.float32).reshape(3, 1, 3, 1)] * 2, [3, 0, 0])
    cache.fork(0, 1)
    assert cache.book.allocator.free == 2 and cache.book.pages[0] == cache.book.pages[1]
    cache.append(row(10, 20, 0), row(10, 20, 0), [1, 1, 0])
    assert cache.book.allocator.free == 1 and cache.book.pages[0][0] == cache.book.pages[1][0] and cache.book.pages[0][1] != cache.book.pages[1][1]
    k = cache.gather()[0][:, 0, :, 0]
    assert k[:2].tolist() == [[0, 1, 2, 10], [0, 1, 2, 20]]
    cache.evict(0)
    assert cache.gather()[0][1, 0, :, 0].tolist() == [0, 1, 2, 20] and cache.book.allocator.free == 2


def reserved_then_forked(kind, put=lambda x: x):
    """Three tokens and one more reserved in the page of the last, which a fork then shares."""
    cache = kind.empty(put(np.zeros(1, np.float32)), sequences=3, pages=6, page_size=2, **(dict(heads=1, width=1) if kind is st.PagedKV else dict(width=4)))
    given = lambda *x: [put(np.array(x, np.float32).reshape(3, 1, -1, 1))] * 2 if kind is st.PagedKV else [put(np.repeat(np.array(x, np.float32).reshape(3, -1, 1), 4, 2))]  # noqa: E731
    cache.append(*given(*range(1, 10)), [3, 0, 0])
    cache.reserve([1, 0, 0])
    cache.fork(0, 1)
    return cache, given


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("kind", [st.PagedKV, st.IndexerKeys], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("writer", [0, 1])
def test_no_write_lands_in_a_page_that_two_share(on, backend, kind, writer):
    """Room that was reserved before a fork is none after it: the write stores nothing, advance says so, and reserve copies."""
    cache, given = reserved_then_forked(kind, on.put)
    pools, one = [to_numpy(pool).copy() for pool in cache.pools], [int(b == writer) for b in range(3)]
    counts = on.put(np.array(one, np.int32))
    cache.write(*given(50, 60, 0), counts, backend=backend)
    assert all((to_numpy(pool) == before).all() for pool, before in zip(cache.pools, pools))
    with pytest.raises(ValueError, match=f"tokens: expected at most 0 for sequence {writer}, which has so much room of its own, got 1; reserve first, after a fork again"):
        cache.advance(one)
    assert to_numpy(cache.lengths).tolist() == [3, 3, 0] == cache.book.lengths
    cache.reserve(one)
    cache.write(*given(50, 60, 0), counts, backend=backend)
    cache.advance(one)
    k = to_numpy(cache.gather()[0]).astype(np.float32)
    scale = to_numpy(cache.gather()[1]) if kind is st.IndexerKeys else 1
    k = k[:, 0, :, 0] if kind is st.PagedKV else k[..., 0] * scale
    want = np.array([[1, 2, 3, 0], [1, 2, 3, 0]], np.float32)
    want[writer, 3] = (50, 60)[writer]
    np.testing.assert_array_almost_equal_nulp(k[:2], want, 2)


def test_a_sequence_cut_into_a_shared_page_reserves_before_it_writes():
    cache, given = reserved_then_forked(st.PagedKV)
    cache.evict(1, 1)
    cache.write(*given(0, 60, 0), np.array([0, 1, 0], np.int32))
    with pytest.raises(ValueError, match="sequence 1"):
        cache.advance([0, 1, 0])
    cache.append(*given(0, 60, 0), [0, 1, 0])
    assert cache.gather()[0][:2, 0, :, 0].tolist() == [[1, 2, 3], [1, 60, 0]]


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("kind", ["paged", "rolling"])
def test_counts_of_the_device_are_clamped_to_the_rows(on, backend, kind):
    cache = made(on, st.PagedKV, sequences=3, pages=6, page_size=2, heads=1, width=1) if kind == "paged" else made(on, st.RollingKV, sequences=3, window=4, heads=1, width=1)
    if kind == "paged":
        cache.reserve(2)
    cache.write(*[on.put(np.ones((3, 1, 2, 1), np.float32))] * 2, on.put(np.array([-5, 1, 2 ** 31 - 1], np.int32)), backend=backend)
    assert to_numpy(cache.lengths).tolist() == [0, 1, 2]
    cache.advance([0, 1, 2])
    assert to_numpy(cache.gather()[0])[:, 0, :, 0].tolist() == [[0, 0], [1, 0], [1, 1]]


def test_one_count_is_for_all_sequences():
    for cache in (paged(pages=6), st.RollingKV.empty(np.zeros(1, np.float32), sequences=3, window=4, heads=1, width=1)):
        cache.append(*[np.arange(6, dtype=np.float32).reshape(3, 1, 2, 1)] * 2, 1)
        assert cache.lengths.tolist() == [1, 1, 1] and cache.gather()[0][:, 0, :, 0].tolist() == [[0], [2], [4]]


def test_a_rolling_window_over_given_tensors_knows_its_lengths():
    made = st.RollingKV.empty(np.zeros(1, np.float32), sequences=2, window=4, heads=1, width=1)
    made.append(*[np.arange(6, dtype=np.float32).reshape(2, 1, 3, 1)] * 2, [3, 2])
    cache = st.RollingKV(*made.pools, made.lengths)
    assert cache.gather()[0][:, 0, :, 0].tolist() == [[0, 1, 2], [3, 4, 0]]
    cache.write(*[np.full((2, 1, 1, 1), 9, np.float32)] * 2)
    cache.evict(0)  # the other's tokens stay, told of or not
    assert cache.lengths.tolist() == [0, 3]
    with pytest.raises(ValueError, match="tokens: expected one number, or a list of one for each of 2"):
        cache.advance([1])


def test_options_without_a_meaning_are_refused():
    like, sizes = np.zeros(1, np.float32), dict(sequences=1, pages=1, page_size=2)
    floats, bytes_ = st.PagedLatent.empty(like, **sizes), st.PagedLatent.empty(like, dtype="float8", **sizes)
    for cache in (floats, bytes_):
        cache.append(np.ones((1, 2, 512), np.float32), np.ones((1, 2, 64), np.float32))
    assert [x.dtype for x in floats.gather()] == [np.float32] * 2 and [x.dtype for x in floats.gather("float16")] == [np.float16] * 2
    assert [x.dtype for x in bytes_.gather()] == [BF16] * 2 and [x.dtype for x in bytes_.gather("float32")] == [np.float32] * 2
    for call, words in ((lambda: floats.gather(quantised=True), "quantised: expected False for a cache of float32, got True"),
                        (lambda: bytes_.gather("float16", quantised=True), "dtype: expected None with quantised=True, got 'float16'"),
                        (lambda: floats.gather("float8"), "dtype: expected one of"),
                        (lambda: st.PagedLatent.empty(like, power_of_two=True, **sizes), "power_of_two: expected False for a pool of float32"),
                        (lambda: st.bytes_per_token("latent", rank=100, dtype="float8"), "rank: expected a multiple of 128"),
                        (lambda: st.bytes_per_token("indexer", width=7), "width: expected a multiple of 4"), (lambda: st.bytes_per_token("indexer", dtype="int7"), "dtype: expected one of"),
                        (lambda: st.bytes_per_token("kv", dtype="float8"), "dtype: expected one of")):
        with pytest.raises(ValueError, match=words):
            call()


class CuPyLike:
    """An array whose framework is CuPy, as far as a refusal looks."""
    __module__ = "cupy"
    dtype, shape, ndim = np.dtype(np.uint8), (1, 264), 2


def test_float8_is_refused_in_cupy_before_anything_is_stored():
    for call in (lambda: st.IndexerKeys(CuPyLike(), None, None), lambda: st.IndexerKeys.empty(CuPyLike(), sequences=1, pages=1),
                 lambda: st.PagedLatent(CuPyLike(), None, None, rank=512, rotary=64), lambda: st.PagedLatent.empty(CuPyLike(), sequences=1, pages=1, dtype="float8")):
        with pytest.raises(st.Unsupported, match="CuPy has no arrays of float8_e4m3fn.*torch"):
            call()


def test_a_full_cache_loses_nothing():
    cache = paged()
    cache.append(*[np.ones((3, 1, 2, 1), np.float32)] * 2)
    before = [pool.copy() for pool in cache.pools], cache.page_table.copy(), cache.lengths.copy(), [list(p) for p in cache.book.pages], cache.book.allocator.free
    with pytest.raises(st.CacheFull, match=r"expected 3 free pages, got 1 of 4; evict"):
        cache.append(*[np.zeros((3, 1, 1, 1), np.float32)] * 2)
    with pytest.raises(st.CacheFull, match="sequence 1: expected at most 2 tokens, got 0 and 3 more"):
        paged(max_pages=1).reserve([2, 3, 0])
    after = [pool.copy() for pool in cache.pools], cache.page_table.copy(), cache.lengths.copy(), [list(p) for p in cache.book.pages], cache.book.allocator.free
    assert all((a == b).all() for a, b in zip(before[0], after[0])) and (before[1] == after[1]).all() and (before[2] == after[2]).all() and before[3:] == after[3:]


@pytest.mark.parametrize("call, words", [
    (lambda c: c.book.allocator.give([3]), "page 3, which is free; it was given back twice"),
    (lambda c: c.book.allocator.give([0, 0]), "page 0, which is free"),
    (lambda c: c.book.allocator.give([4]), "expected pages of this cache, 0 to 3, got 4"),
    (lambda c: c.book.allocator.share([-1]), "expected pages of this cache, 0 to 3, got -1"),
    (lambda c: c.evict(0, -1), "keep: expected an integer from 0 to 3, got -1"), (lambda c: c.evict(0, 4), "keep: expected an integer from 0 to 3, got 4"),
    (lambda c: c.evict(3), "sequence: expected an integer from 0 to 2, got 3"), (lambda c: c.reserve(-1), "tokens: expected an integer from 0"),
    (lambda c: c.reserve([1, 2]), "tokens: expected one number, or a list of one for each of 3"), (lambda c: c.advance(4), "tokens: expected at most 1 for sequence 0"),
    (lambda c: c.fork(1, 0), "target: expected an empty sequence, got 0, which holds 2 pages; evict it first"),
    (lambda c: c.append(row(1, 2, 3), row(1, 2, 3), [1, 2, 0]), "counts: expected an integer from 0 to 1, got 2"),
    (lambda c: c.append(row(1, 2, 3), row(1, 2, 3), [1, 1]), "counts: expected one number, or a list of one for each of 3"),
    (lambda c: c.write(row(1, 2, 3), row(1, 2, 3), np.array([1, 1, 1])), "counts: expected element type int32, got int64"),
    (lambda c: c.write(row(1, 2, 3), row(1, 2, 3), np.zeros(2, np.int32)), r"counts: expected shape \[B\] \[3\], got \[2\]"),
    (lambda c: c.append(row(1, 2), row(1, 2)), r"k: expected shape \[3, 1, 1, 1\], got \[2, 1, 1, 1\]"),
    (lambda c: c.append(row(1, 2, 3).astype(np.float16), row(1, 2, 3)), "k: expected element type float32, got float16"),
    (lambda c: st.PagedKV(*c.pools, c.page_table, c.lengths).evict(0), "book: expected a cache made by empty"),
    (lambda c: st.PagedKV(*c.pools, c.page_table[:2], c.lengths), "page_table: expected one row for each"),
    (lambda c: st.PagedKV(c.pools[0], c.pools[1][:3], c.page_table, c.lengths), "v: expected shape"),
    (lambda c: st.PagedKV(c.pools[0][::2], c.pools[1][::2], c.page_table, c.lengths), "k: expected a contiguous array"),
    (lambda c: st.IndexerKeys(np.zeros(265, np.uint8)[1:].reshape(1, 264), c.page_table, c.lengths), "pool: expected memory that starts at a multiple of 4 bytes"),
    (lambda c: st.PagedLatent.empty(c.lengths, sequences=1, pages=1, rank=96, dtype="float8"), "multiples of 128"),
    (lambda c: st.PagedKV.empty(3, sequences=1, pages=1, heads=1, width=1), "like: expected a NumPy, PyTorch, CuPy or JAX array, got int"),
])
def test_misuse_is_named_and_changes_nothing(call, words):
    cache = paged()
    cache.append(*[np.arange(9, dtype=np.float32).reshape(3, 1, 3, 1)] * 2, [3, 0, 0])
    before = [list(p) for p in cache.book.pages], list(cache.book.lengths), list(cache.book.allocator.owners), cache.gather()[0].tolist()
    with pytest.raises((ValueError, TypeError), match=words):
        call(cache)
    assert before == ([list(p) for p in cache.book.pages], list(cache.book.lengths), list(cache.book.allocator.owners), cache.gather()[0].tolist())


def test_jax_arrays_are_refused():
    jnp = pytest.importorskip("jax.numpy")
    with pytest.raises(st.Unsupported, match="JAX arrays are immutable"):
        st.PagedKV.empty(jnp.zeros(1), sequences=1, pages=1, heads=1, width=1)


@pytest.mark.parametrize("kind", ["kv", "latent", "float8", "indexer", "rolling"])
def test_torch_caches_hold_what_numpy_caches_hold(rng, kind):
    pytest.importorskip("torch")
    k, v, latent, rope = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 2, 5, 8), (2, 2, 5, 8), (2, 5, 128), (2, 5, 4)))
    got = []
    for put in (lambda x: x, to_torch):
        like, sizes = put(np.zeros(1, np.float32)), dict(sequences=3, pages=9, page_size=2)
        if kind in ("kv", "rolling"):
            cache = st.PagedKV.empty(like, heads=2, width=8, **sizes) if kind == "kv" else st.RollingKV.empty(like, sequences=3, window=3, pinned=1, heads=2, width=8)
            rows = k, v
        elif kind == "indexer":
            cache, rows = st.IndexerKeys.empty(like, **sizes), (latent,)
        else:
            cache, rows = st.PagedLatent.empty(like, rank=128, rotary=4, dtype="float8" if kind == "float8" else None, **sizes), (latent, rope)
        rows = [put(np.concatenate([x, x[:1]])) for x in rows]
        cache.append(*rows, [5, 3, 0])
        cache.fork(0, 2)
        cache.append(*rows, [1, 0, 3])
        cache.evict(1) if kind == "rolling" else cache.evict(1, 1)
        got.append([to_numpy(x) for x in (*cache.gather(), *cache.pools, cache.lengths)])
    for a, b in zip(*got):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()


def test_bytes_of_a_token():
    assert st.bytes_per_token("latent", dtype="float8") == 656 and st.bytes_per_token("indexer") == 132 and st.bytes_per_token("latent") == 1152
    assert st.bytes_per_token("kv", heads=8, layers=3) == 3 * 8 * 256 * 2
    table = st.compare_memory()
    assert [row.name for row in table][:4] == ["MHA, 32 heads", "GQA, 8 key heads", "MQA", "MLA"] and round(table[3].saved, 3) == 0.930
    assert round(1 - st.bytes_per_token("latent", layers=60) * 6 / 16 / st.bytes_per_token("kv", heads=8, layers=95), 3) == 0.933  # DeepSeek-V2's own comparison
    assert "| MLA | 36864 | 4.50 | 93.0% |" in str(table)
    for cache, size in ((st.PagedLatent.empty(np.zeros(1), sequences=1, pages=2, dtype="float8"), 656), (st.IndexerKeys.empty(np.zeros(1), sequences=1, pages=2), 132),
                        (st.PagedKV.empty(np.zeros(1, BF16), sequences=1, pages=2, heads=8, width=128), 4096)):
        assert sum(pool.nbytes for pool in cache.pools) == 2 * 64 * size
    with pytest.raises(ValueError, match="kind: expected one of 'kv', 'latent', 'indexer', got 'mla'"):
        st.bytes_per_token("mla")
