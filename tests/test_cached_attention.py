"""Caches where keys are expected: decode step by step and prefill by chunks equal one full pass; garbage in page tables is not read; holes do not exist."""
import ml_dtypes
import numpy as np
import oracle
import pytest
from drivers import EVERY, LARGE, arrays
from numeric import assert_close, plain, to_numpy

import sparsetile as st

BF16 = np.dtype(ml_dtypes.bfloat16)
GARBAGE = np.array([-1, -2 ** 31, 2 ** 31 - 1, 999], np.int32)
every, large = pytest.mark.parametrize("backend", EVERY), pytest.mark.parametrize("backend", LARGE)


def normal(rng, *shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


def made(on, kind, dtype=np.float32, **sizes):
    return kind.empty(on.put(np.zeros(1, dtype)), **sizes)


def judged(name, got, q, k, v, count, scale=None):
    """out of queries q [B,Hq,T,D] against the float64 oracle, `count` saying what each query sees."""
    how = dict(scale=q.shape[-1] ** -0.5 if scale is None else scale)
    truth, measure = oracle.attention(q, k, v, count, **how)[0], plain.attention(q, k, v, count, **how)[0]
    assert_close(name, arrays(got)[0], truth, measure, reduction=k.shape[2] + q.shape[-1])


def spoil(on, cache):
    """Garbage behind the pages of each sequence, NaN in every row of the pool that no sequence holds."""
    for b, held in enumerate(cache.book.pages):
        rest = cache.page_table.shape[1] - len(held)
        cache.page_table[b, len(held):] = on.put(np.resize(GARBAGE, rest))
    held = np.zeros(tuple(cache.pools[0].shape[:2]), bool)
    for pages, length in zip(cache.book.pages, cache.book.lengths):
        for s in range(length):
            held[pages[s // cache.page_size], s % cache.page_size] = True
    for pool in cache.pools:
        pool[on.put(~held)] = float("nan")


RULES = {"full": st.Full(), "causal": st.Causal(), "window": st.Window(11), "sinks": st.Window(7) | st.Sink(2) & st.Causal(), "strided": st.Causal() & st.Strided(3)}


@large
@pytest.mark.parametrize("page_size", [3, 16, 64])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunks_and_steps_equal_one_full_pass(on, backend, rng, name, page_size, dtype):
    """Prefill chunks of 37 and 30, then steps of one query and of three, two sequences of unequal lengths: each against the pattern over the whole sequence."""
    kind = BF16 if dtype == "bfloat16" else np.dtype(dtype)
    B, Hq, Hk, D, Dv, S, rule = 2, 4, 2, 16, 12, 90, RULES[name]
    q, k, v = normal(rng, B, Hq, S, D, dtype=kind), normal(rng, B, Hk, S, D, dtype=kind), normal(rng, B, Hk, S, Dv, dtype=kind)
    cache = made(on, st.PagedKV, kind, sequences=B, pages=2 * -(-128 // page_size) + 3, page_size=page_size, heads=Hk, width=D, value_width=Dv, max_pages=-(-128 // page_size))
    cache.reserve([page_size, 0])
    cache.evict(0)  # pages come back in another order
    done, seen = [0, 0], rule.mask(S, S)
    for chunk, counts in ((37, [37, 30]), (30, [30, 30]), (1, [1, 1]), (3, [3, 3])):
        take = lambda x: np.stack([np.roll(x[b], -done[b], axis=1)[:, :chunk] for b in range(B)])  # noqa: B023, E731
        cache.append(on.put(take(k)), on.put(take(v)), counts, backend=backend)
        done = [a + b for a, b in zip(done, counts)]
        spoil(on, cache)
        T = min(counts)
        queries = np.stack([q[b, :, n - T:n] for b, n in enumerate(done)])
        got = on.sparse_attention(queries, cache, pattern=rule)
        for b, n in enumerate(done):
            judged(f"chunk {chunk} of sequence {b}", to_numpy(got)[b:b + 1], queries[b:b + 1], k[b:b + 1, :, :n], v[b:b + 1, :, :n], seen[n - T:n, :n])


def with_holes(on, backend, rng, T, dtype=np.float32):
    """A page table with entries outside 0 .. N - 1 below the length: cache, which of 40 keys are there, q, k, v."""
    B, H, D, page = 1, 2, 8, 4
    k, v, q = (normal(rng, B, H, n, D, dtype=dtype) for n in (40, 40, T))
    cache = made(on, st.PagedKV, dtype, sequences=B, pages=10, page_size=page, heads=H, width=D)
    cache.append(on.put(k), on.put(v), backend=backend)
    there = np.ones(40, bool)
    for hole, value in ((2, -1), (5, 2 ** 31 - 1), (9, -2 ** 31)):
        cache.page_table[0, hole] = int(value)
        there[hole * page:(hole + 1) * page] = False
    return cache, there, q, k, v


@large
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("T", [5, 33])
def test_holes_do_not_exist(on, backend, rng, T, dtype):
    if dtype == "float64" and backend in ("triton", "cupy"):
        with pytest.raises(st.Unsupported, match="append.* not float64; cast the rows"):
            with_holes(on, backend, rng, T, dtype)
        return
    cache, there, q, k, v = with_holes(on, backend, rng, T, dtype)
    for rule in (st.Full(), st.Window(20)):
        judged("holes", on.sparse_attention(q, cache, pattern=rule), q, np.where(there[:, None], k, 0), np.where(there[:, None], v, 0), rule.mask(T, 40) & there)


@every
def test_a_selection_sees_no_holes(on, backend, rng):
    cache, there, q, k, v = with_holes(on, backend, rng, 3)
    T, whole = 3, np.tile(np.arange(40, dtype=np.int32), (1, 1, 3, 1))
    judged("holes of a selection", on.sparse_attention(q, cache, pattern=on.selection(whole)), q, k, v, there[None].repeat(T, 0))


@every
@pytest.mark.parametrize("granularity, causal", [(1, False), (1, True), (4, True)])
def test_selections_find_their_rows(on, backend, rng, granularity, causal):
    """Random entries with garbage among them, restricted by a pattern, over two sequences of unequal lengths."""
    B, Hq, Hk, D, T, K = 2, 4, 2, 16, 3, 12
    lengths = [41, 23]
    k, v, q = normal(rng, B, Hk, 41, D), normal(rng, B, Hk, 41, D), normal(rng, B, Hq, T, D)
    cache = made(on, st.PagedKV, sequences=B, pages=16, page_size=6, heads=Hk, width=D)
    cache.append(on.put(k), on.put(v), lengths, backend=backend)
    spoil(on, cache)
    entries = 41 // granularity
    chosen = np.array([[np.resize(rng.permutation(entries), K) for _ in range(T)] for _ in range(B * Hk)], np.int32).reshape(B, Hk, T, K)
    chosen[..., 3], chosen[..., 7] = GARBAGE[1], GARBAGE[2] if granularity == 1 else -5
    count = np.zeros((B, Hk, T, 41), np.int64)
    for b, g, t in np.ndindex(B, Hk, T):
        for e in chosen[b, g, t].astype(np.int64):
            for s in range(e * granularity, e * granularity + granularity):
                if e >= 0 and s < lengths[b] and (not causal or s <= lengths[b] - T + t) and s % 2 == 0:
                    count[b, g, t, s] += 1
    got = on.sparse_attention(q, cache, pattern=on.selection(chosen, granularity=granularity, causal=causal) & EVEN)
    judged("selection", got, q, k, v, np.repeat(count, Hq // Hk, axis=1))


EVEN = st.Global(range(0, 64, 2), symmetric=False)


@large
def test_forked_sequences_attend_apart(on, backend, rng):
    k, v, q = normal(rng, 3, 1, 12, 8), normal(rng, 3, 1, 12, 8), normal(rng, 3, 2, 1, 8)
    cache = made(on, st.PagedKV, sequences=3, pages=8, page_size=4, heads=1, width=8)
    cache.append(on.put(k), on.put(v), [10, 0, 0], backend=backend)
    cache.fork(0, 1), cache.fork(0, 2)
    cache.append(on.put(k[:, :, 10:11]), on.put(v[:, :, 10:11]), [1, 1, 1], backend=backend)
    assert cache.book.allocator.free == 8 - 2 - 3
    got = to_numpy(on.sparse_attention(q, cache))
    for b in range(3):
        keys, values = (np.concatenate([x[:1, :, :10], x[b:b + 1, :, 10:11]], 2) for x in (k, v))
        judged(f"fork {b}", got[b:b + 1], q[b:b + 1], keys, values, np.ones((1, 11), bool))


@large
@pytest.mark.parametrize("pinned", [0, 3])
def test_a_rolling_window_is_its_pattern_over_the_whole_sequence(on, backend, rng, pinned):
    """Step by step past several turns of the ring, then three queries at once with a window of their own; two sequences of unequal lengths."""
    B, Hq, Hk, D, window = 2, 4, 2, 8, 10
    q, k, v = normal(rng, B, Hq, 60, D), normal(rng, B, Hk, 60, D), normal(rng, B, Hk, 60, D)
    cache = made(on, st.RollingKV, sequences=B, window=window, pinned=pinned, heads=Hk, width=D)
    for pool in cache.pools:
        pool[:] = float("nan")  # empty slots are never read
    done = [0, 0]
    for counts in ([1, 0], [1, 4], [1, 1], [7, 2], [1, 1], [20, 25], [1, 1]):
        rows = [np.stack([np.roll(x[b], -done[b], axis=1)[:, :max(counts)] for b in range(B)]) for x in (k, v)]
        cache.append(*map(on.put, rows), counts, backend=backend)
        done = [a + b for a, b in zip(done, counts)]
        for T, rule in ((1, None), (1, cache.pattern()), (1, st.Window(3)), (3, st.Window(4) | st.Sink(pinned) & st.Causal())):
            if min(done) < T:
                continue
            queries = np.stack([q[b, :, n - T:n] for b, n in enumerate(done)])
            got = to_numpy(on.sparse_attention(queries, cache, pattern=rule))
            for b, n in enumerate(done):
                seen = (cache.pattern() if rule is None else rule).mask(n, n)[n - T:]
                judged(f"{n} tokens", got[b:b + 1], queries[b:b + 1], k[b:b + 1, :, :n], v[b:b + 1, :, :n], seen)


@every
@pytest.mark.parametrize("selected", [pytest.param(False, id="pattern"), pytest.param(True, id="selection")])
def test_latents_are_one_head_of_keys_and_values(on, backend, rng, selected):
    B, H, R, P, page = 2, 3, 32, 8, 5
    latent, rope, q = normal(rng, B, 21, R), normal(rng, B, 21, P), normal(rng, B, H, 2, R + P)
    cache = made(on, st.PagedLatent, sequences=B, pages=12, page_size=page, rank=R, rotary=P)
    cache.append(on.put(latent), on.put(rope), [21, 17], backend=backend)
    spoil(on, cache)
    keys = np.concatenate([latent, rope], -1)[:, None]
    every = np.tile(np.arange(21, dtype=np.int32), (B, 1, 2, 1))
    got = to_numpy(on.sparse_attention(q, cache, pattern=on.selection(every, causal=True) if selected else st.Causal(), scale=0.1))
    for b, n in enumerate((21, 17)):
        judged(f"latent {b}", got[b:b + 1], q[b:b + 1], keys[b:b + 1, :, :n], keys[b:b + 1, :, :n, :R], st.Causal().mask(2, n), scale=0.1)


def test_growing_lengths_build_nothing_anew(rng):
    """Twenty steps of decode make lists once or twice, not each time."""
    from sparsetile.ops import attention
    cache = st.PagedKV.empty(np.zeros(1, np.float32), sequences=1, pages=16, page_size=16, heads=1, width=8, max_pages=16)
    attention._lists.clear()
    for _ in range(20):
        cache.append(*(normal(rng, 1, 1, 1, 8) for _ in "kv"), backend="numba")
        st.sparse_attention(normal(rng, 1, 1, 1, 8), cache, pattern=st.Window(5), backend="numba")
    assert len(attention._lists) == 1


@pytest.mark.parametrize("call, words", [
    (lambda q, c: st.sparse_attention(q, c, q), "v: expected None, got an array; a cache holds its own values"),
    (lambda q, c: st.sparse_attention(q[:, :, :, :3], c), "k: expected width D of q 3, got 4"),
    (lambda q, c: st.sparse_attention(np.concatenate([q, q]), c), "k: expected batch size of q 2, got 1"),
    (lambda q, c: st.sparse_attention(q, c, pattern=st.Selection(np.zeros((2, 1, 1, 1), np.int32))), "pattern.indices: expected"),
    (lambda q, c: st.sparse_attention(q, c, pattern=3), "pattern: expected a Pattern"),
    (lambda q, c: st.sparse_attention(q, c, kv_length=np.zeros(2, np.int32)), "kv_length: expected shape"),
])
def test_misuse_is_named(call, words):
    cache = st.PagedKV.empty(np.zeros(1, np.float32), sequences=1, pages=1, page_size=2, heads=1, width=4)
    with pytest.raises((ValueError, TypeError), match=words):
        call(np.zeros((1, 1, 1, 4), np.float32), cache)


def test_what_cannot_read_pages_says_so():
    torch = pytest.importorskip("torch")
    cache = st.PagedKV.empty(torch.zeros(1), sequences=1, pages=1, page_size=2, heads=1, width=4)
    with pytest.raises(st.Unsupported, match=r"call under torch.no_grad\(\), or pass cache.gather\(\)"):
        st.sparse_attention(torch.zeros(1, 1, 1, 4, requires_grad=True), cache)
    from sparsetile.backends.contract import Problem
    from sparsetile.ops import dispatch
    dims, kinds = dict(B=1, Hq=1, Hk=1, T=1, S=64, D=64, Dv=64), dict(q="float16", k="float16", v="float16")
    pytest.importorskip("triton")
    for backend in ("triton", "cupy"):
        assert "cache.gather()" in dispatch.kernel(backend, "block_attention").supports(Problem.of("block_attention", dims, kinds, "sm_90a", ["paged"]))
    small = st.PagedLatent.empty(torch.zeros(1), sequences=1, pages=1, dtype="float8")
    with pytest.raises(st.Unsupported, match=r"cache.gather\(\) makes arrays of 16 bits"):
        st.sparse_attention(torch.zeros(1, 1, 1, 576), small)
