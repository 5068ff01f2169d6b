"""Caches where keys are expected: decode step by step and prefill by chunks equal one full pass; garbage in page tables is not read; holes do not exist."""
import cache_format
import ml_dtypes
import numpy as np
import oracle
import paged_keys
import pytest
from drivers import EVERY, LARGE, arrays
from numeric import assert_close, assert_same_bits, plain, to_numpy

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


PAGED = [  # rule, T, Hq, Hk, D, Dv, lengths, page size, holes (batch, page)
    (st.Causal(), 1, 4, 2, 16, 16, (90, 41), 16, [(0, 2)]), (st.Window(25) | st.Sink(3) & st.Causal(), 3, 6, 2, 24, 40, (70, 5), 32, [(0, 1)]),
    (st.Full(), 2, 2, 1, 80, 48, (65, 0), 128, []), (st.Causal(), 16, 4, 4, 16, 8, (60, 33), 1, [(0, 59), (1, 0)]),
    (st.Window(40), 37, 4, 2, 16, 16, (90, 37), 3, [(0, 20), (0, 21), (1, 12)]), (st.Causal() & st.Strided(3), 20, 2, 2, 16, 16, (64, 20), 5, [(0, 0)]),
]


@every
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", PAGED, ids=lambda c: f"{c[0].kind}-T{c[1]}-page{c[7]}")
def test_keys_are_read_through_the_table(on, backend, rng, case, dtype):
    """Pages in any order, holes among them, garbage behind them, NaN in all rows that no sequence holds and in all keys that no query sees; sinks, and a kv_length that is shorter than one of the sequences."""
    rule, T, Hq, Hk, D, Dv, lengths, page, holes = case
    kind, B, S = BF16 if dtype == "bfloat16" else np.dtype(dtype), 2, max(lengths)
    q, k, v = normal(rng, B, Hq, T, D, dtype=kind), normal(rng, B, Hk, S, D, dtype=kind), normal(rng, B, Hk, S, Dv, dtype=kind)
    shorter, sink = np.minimum(lengths, S - 2), rng.standard_normal(Hq).astype(np.float32)
    seen = rule.visible(shorter[:, None, None] - T + np.arange(T)[:, None], np.arange(S), S) & paged_keys.there(shorter, S, page, holes)[:, None]
    for b in range(B):
        k[b, :, ~seen[b].any(0)] = v[b, :, ~seen[b].any(0)] = np.nan
    pools, table = paged_keys.scatter((k, v), lengths, page, rng, holes)
    cache = st.PagedKV(*(on.put(np.ascontiguousarray(pool.swapaxes(1, 2))) for pool in pools), on.put(table), on.put(np.array(lengths, np.int32)))
    out, lse = arrays(*on.sparse_attention(q, cache, pattern=rule, sink_logits=sink, kv_length=np.full(B, S - 2, np.int32), return_lse=True))
    count = np.repeat(seen[:, None], Hq, 1).astype(int)
    for name, x, truth, one in zip(("out", "lse"), (out, lse), *(f.attention(q, k, v, count, scale=D ** -0.5, sink_logits=sink) for f in (oracle, plain))):
        assert_close(name, x, truth, one, reduction=S + D)


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


FLOAT8 = [  # rule or None (a selection), T, H, R, P, lengths, page size, holes (batch, page), element type of the queries
    (st.Causal(), 1, 16, 128, 16, (70, 33), 16, [(0, 1)], "bfloat16"), (st.Window(9), 3, 5, 256, 6, (45, 20), 7, [(1, 2)], "float16"),
    (st.Full(), 18, 2, 128, 64, (40, 0), 64, [], "bfloat16"), (st.Window(5), 20, 1, 128, 8, (50, 33), 16, [(0, 2)], "bfloat16"), (st.Causal(), 2, 3, 128, 0, (33, 33), 1, [(0, 32)], "bfloat16"),
    (None, 3, 20, 128, 32, (50, 21), 8, [(0, 0), (1, 1)], "bfloat16"), (None, 1, 3, 256, 2, (30, 30), 5, [], "float16"),
    (None, 2, 17, 128, 16, (40, 37), 8, [(0, 0), (1, 1)], "float32"), (st.Causal(), 3, 3, 256, 6, (0, 41), 7, [(1, 2)], "float32"),
    (None, 2, 17, 512, 64, (40, 37), 8, [(0, 0), (1, 1)], "bfloat16"), (None, 1, 66, 512, 64, (36, 34), 16, [(1, 0)], "float16"),
]


@every
@pytest.mark.parametrize("case", FLOAT8, ids=lambda c: f"{'selection' if c[0] is None else c[0].kind}-T{c[1]}-H{c[2]}-R{c[3]}-P{c[4]}-page{c[6]}")
def test_float8_latents_are_read_where_they_lie(on, backend, rng, case):
    """Tokens that an independent quantiser wrote, against float64 of what they store; rounding to the queries' type is what the formula may do. Bytes of NaN wherever nobody may look."""
    rule, T, H, R, P, lengths, page, holes, dtype = case
    kind, B, S = BF16 if dtype == "bfloat16" else np.dtype(dtype), 2, max(lengths)
    q = normal(rng, B, H, T, R + P, dtype=kind)
    rows = np.array([[np.frombuffer(cache_format.latent_token(normal(rng, R), normal(rng, P), False), np.uint8) for _ in range(S)] for _ in range(B)])
    stored = (rows[..., :R].copy().view(ml_dtypes.float8_e4m3fn).astype(np.float64).reshape(B, S, -1, 128) * rows[..., R:R + R // 32].copy().view(np.float32)[..., None]).reshape(B, S, R)
    keys = np.concatenate([stored, rows[..., R + R // 32:].copy().view(BF16).astype(np.float64)], -1)[:, None]
    there, at = paged_keys.there(lengths, S, page, holes)[:, None], np.array(lengths)[:, None, None] - T + np.arange(T)[:, None]
    if rule is None:
        chosen = np.array([[rng.permutation(S)[:12 if R < 512 else 35] for _ in range(T)] for _ in range(B)], np.int32)
        seen = (chosen[..., None] == np.arange(S)).any(2) & there & (np.arange(S) <= at)
        pattern = on.selection(chosen[:, None], causal=True)
    else:
        seen, pattern = rule.visible(at, np.arange(S), S) & there, rule
    bytes_ = np.where(seen.any(1)[..., None], rows, np.nan)[:, None]
    (pool,), table = paged_keys.scatter((bytes_,), lengths, page, rng, holes)
    pool = np.where(np.isnan(pool), 0x7F, pool).astype(np.uint8)[:, 0]
    cache = st.PagedLatent(on.put(pool), on.put(table), on.put(np.array(lengths, np.int32)), rank=R, rotary=P)
    out, lse = arrays(*on.sparse_attention(q, cache, pattern=pattern, scale=0.1, return_lse=True))
    count, given = np.repeat(seen[:, None], H, 1).astype(int), [x.astype(kind) for x in (keys, keys[..., :R])]
    for name, x, truth, one in zip(("out", "lse"), (out, lse), oracle.attention(q, keys, keys[..., :R], count, scale=0.1), plain.attention(q, *given, count, scale=0.1)):
        assert_close(name, x, truth, one, reduction=S + R + P)


@pytest.mark.parametrize("kind", [np.float32, np.float16, BF16], ids=["float32", "float16", "bfloat16"])
def test_float8_latents_on_the_cpu_are_those_of_gather(kind, rng):
    """The rows that numba makes of the bytes have gather()'s bits, so the answers do: selections with repeated entries, patterns, a kv_length that ends within a page; thousands of rows, of which threads take runs."""
    cache = st.PagedLatent.empty(np.zeros(1, np.float32), sequences=2, pages=40, page_size=16, rank=256, rotary=10, dtype="float8")
    cache.append(normal(rng, 2, 300, 256), normal(rng, 2, 300, 10), [300, 123], backend="numba")
    latent, rope = cache.gather(np.dtype(kind).name)
    keys, q = np.concatenate([latent, rope], -1)[:, None], normal(rng, 2, 17, 3, 266, dtype=kind)
    entries, length = rng.integers(-3, 330, (2, 1, 3, 400)).astype(np.int32), np.array([290, 77], np.int32)
    entries[1, entries[1] >= 123] = -1
    for pattern in (st.Selection(entries), st.Selection(entries[..., :1] * 0 - 1), st.Causal()):
        for given in ({}, dict(kv_length=length)):
            have = given or dict(kv_length=np.array([300, 123], np.int32))
            for one, two in zip(st.sparse_attention(q, cache, None, pattern, return_lse=True, backend="numba", **given),
                                st.sparse_attention(q, keys, None, pattern, value_width=256, return_lse=True, backend="numba", **have)):
                assert_same_bits("bytes", one, two)
    with pytest.raises(st.Unsupported, match="not float64"):
        st.sparse_attention(q.astype(np.float64), cache, None, pattern, backend="numba")


def test_growing_lengths_build_nothing_anew(rng):
    """Twenty steps of decode make lists once or twice, not each time."""
    from sparsetile.ops import attention_call
    cache = st.PagedKV.empty(np.zeros(1, np.float32), sequences=1, pages=16, page_size=16, heads=1, width=8, max_pages=16)
    attention_call._lists.clear()
    for _ in range(20):
        cache.append(*(normal(rng, 1, 1, 1, 8) for _ in "kv"), backend="numba")
        st.sparse_attention(normal(rng, 1, 1, 1, 8), cache, pattern=st.Window(5), backend="numba")
    assert len(attention_call._lists) == 1


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
