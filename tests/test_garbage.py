"""Garbage from the device never crashes, is never believed and never read past: every input lies between guard bands of NaN (rows too), every output between bands of its own.

Lengths, positions, entries and bounds of any value mean what the contract's clamping says. The bands catch what the oracle cannot: a read outside spoils the result, a write
outside spoils a band, and inputs must be bit for bit what they were.
"""
import numpy as np
import oracle
import pytest
from drivers import EVERY, Driver, arrays, numpy_dtype, to_torch
from judge import attention, gradients, indexer_scores, indexer_topk, normal
from numeric import assert_close, plain

import sparsetile as st
from sparsetile.backends import arrays as memory
from sparsetile.backends import places

every = pytest.mark.parametrize("backend", EVERY)
INT_MIN, INT_MAX = -2 ** 31, 2 ** 31 - 1
BAND = 4096                                                                          # elements on each side


def bits(x):
    """All bytes of a flat array of any framework."""
    return x.view(np.uint8) if not hasattr(x, "untyped_storage") else x.view(dtype=__import__("torch").uint8)


def poison(base, whole_numbers):
    bits(base)[...] = 0x7F if whole_numbers else 0xFF                                # floats: NaN in every type; integers: far away
    return base


class Guarded(Driver):
    """A backend's driver whose arrays lie in poisoned memory; `gaps` between rows too."""

    def __init__(self, backend, gaps):
        super().__init__(backend)
        self.gaps, self.inputs, self.outputs = gaps, [], []

    def _guard(self, x, carry):
        gap = self.gaps if x.ndim > 1 and x.dtype.kind not in "iu" else 0             # tables of integers are packed by the call
        lead = int(np.prod(x.shape[:-1], dtype=np.int64))
        width = (x.shape[-1] if x.ndim else 1) + gap
        base = poison(np.empty(2 * BAND + lead * width, x.dtype), x.dtype.kind in "iu")
        inner = lambda flat: flat[BAND:BAND + lead * width].reshape(*x.shape[:-1], width)[..., :width - gap]
        inner(base)[...] = x
        base = carry(base)
        self.inputs.append((base, bits(base).copy() if isinstance(base, np.ndarray) else bits(base).clone()))
        return inner(base)

    def put(self, x):
        return self._guard(x, super().put) if isinstance(x, np.ndarray) else x

    def tensor(self, x, gradient=False):
        x = self._guard(x, lambda base: to_torch(base, "cpu" if self.interpreted or self.backend in ("reference", "numba") else "cuda"))
        return x.detach().requires_grad_() if gradient else x

    def watch(self, monkeypatch):
        """Every array that a call allocates through its place is poisoned, with bands."""
        def wrap(kind, plain):
            def empty(place, shape, dtype):
                shape = tuple(shape)
                n = int(np.prod(shape, dtype=np.int64))
                whole = plain(place, (n + 2 * BAND,), dtype)
                base = poison(whole.owner if isinstance(whole, memory.View) else whole, "int" in dtype)
                self.outputs.append((base, n, "int" in dtype))
                inner = base[BAND:BAND + n].reshape(shape)
                return memory.view(inner) if isinstance(whole, memory.View) else inner

            def full(place, shape, dtype, value):
                x = empty(place, shape, dtype)
                (x.owner if isinstance(x, memory.View) else x)[...] = value
                return x
            monkeypatch.setattr(kind, "empty", empty)
            monkeypatch.setattr(kind, "full", full)
            monkeypatch.setattr(kind, "zeros", lambda place, shape, dtype: full(place, shape, dtype, 0))
        for kind in (places.NumpyPlace, places.TorchPlace, places.ViewPlace):
            wrap(kind, kind.empty)

    def check(self):
        for base, before in self.inputs:
            assert bool((bits(base) == before).all()), "an input or the memory around it was written"
        for base, n, whole_numbers in self.outputs:
            for band in (base[:BAND], base[BAND + n:]):
                assert bool((bits(band) == (0x7F if whole_numbers else 0xFF)).all()), "memory around an output was written"


@pytest.fixture(params=[0, 3], ids=["bands", "gaps"])
def guarded(on, request, monkeypatch):
    driver = Guarded(on.backend, request.param)
    driver.watch(monkeypatch)
    yield driver
    driver.check()
    assert driver.inputs


@pytest.mark.parametrize("fault", ["input", "band", "output"])
def test_the_guard_sees_a_write(fault, monkeypatch):
    driver = Guarded("reference", 3)
    driver.watch(monkeypatch)
    x = driver.put(np.ones((3, 5), np.float32))
    out = places.NumpyPlace("numpy").zeros((2, 3), "float32")
    driver.check()
    assert not out.any() and np.isnan(x.base).any() and (x == 1).all() and not x.flags.c_contiguous
    target = {"input": x[2:, 4:], "band": np.lib.stride_tricks.as_strided(x, (1, 6))[:, 5:], "output": np.lib.stride_tricks.as_strided(out, (2, 4))[1:, 3:]}[fault]
    target[...] = 0
    with pytest.raises(AssertionError, match="was written"):
        driver.check()


# --------------------------------------------------------------------------------------------------------------- attention
RULES = {
    "full": (lambda: st.Full(), lambda p, s: s == s),
    "causal": (lambda: st.Causal(), lambda p, s: s <= p),
    "window": (lambda: st.Window(6, 2), lambda p, s: (s >= p - 6) & (s <= p + 2)),
    "strided": (lambda: st.Causal() & (st.Window(2) | st.Strided(8)), lambda p, s: (s <= p) & ((s >= p - 2) | ((p - s) % 8 == 0))),
    "sink": (lambda: st.Sink(3) | st.Window(4), lambda p, s: (s < 3) | ((s >= p - 4) & (s <= p))),
    "blocks": (lambda: st.Blocks(np.eye(3, dtype=bool), 16, 16), lambda p, s: (p >= 0) & (p < 48) & (p // 16 == s // 16)),
}
rules = pytest.mark.parametrize("rule", RULES)
Hq, Hk, T, S, D, Dv = 2, 1, 5, 37, 20, 12
LENGTHS = np.array([INT_MIN, -1, 0, 3, S, S + 1, INT_MAX], np.int32)


def qkv(rng, B, dtype=np.float16):
    return normal(rng, (B, Hq, T, D), dtype), normal(rng, (B, Hk, S, D), dtype), normal(rng, (B, Hk, S, Dv), dtype)


def spoiled(x, lengths, value=np.nan):
    """Keys past each sample's length hold NaN."""
    x = x.copy()
    for b, length in enumerate(np.clip(lengths.astype(np.int64), 0, S)):
        x[b, :, length:] = value
    return x


@every
@rules
def test_lengths(guarded, backend, rule, rng):
    q, k, v = qkv(rng, len(LENGTHS))
    make, sees = RULES[rule]
    count = oracle.visible(len(LENGTHS), T, S, kv_length=LENGTHS, rule=sees)
    attention(guarded, q, spoiled(k, LENGTHS), spoiled(v, LENGTHS, np.inf), make(), count, kv_length=LENGTHS, sink_logits=normal(rng, Hq, np.float32))


@every
@pytest.mark.parametrize("rule", ["causal", "strided"])
def test_lengths_backward(guarded, backend, rule, rng):
    pytest.importorskip("torch")
    lengths = np.tile(LENGTHS, 4)                                                     # the largest error stands in the short rows: a sample of many
    q, k, v = qkv(rng, len(lengths))
    make, sees = RULES[rule]
    count = oracle.visible(len(lengths), T, S, kv_length=lengths, rule=sees)
    gradients(guarded, q, k, v, make(), count, rng, kv_length=lengths, poison=lambda x: spoiled(x, lengths), with_lse=True)


STARTS = np.array([INT_MIN, INT_MIN + 7, -3, 0, S + 9, INT_MAX - T - 99, INT_MAX - T + 1], np.int32)


@every
@rules
def test_starts(guarded, backend, rule, rng):
    starts = np.array([-T, -3, 0, S - T, S], np.int32)                                # as far as a pattern's lists reach when positions are known on the device only
    q, k, v = qkv(rng, len(starts))
    make, sees = RULES[rule]
    count = oracle.visible(len(starts), T, S, q_start=starts, rule=sees)
    attention(guarded, q, k, v, make(), count, q_start=starts)


def judged(out, lse, q, k, v, count, where):
    """Rows `where` by the policy."""
    how = dict(scale=D ** -0.5)
    for name, got, truth, measure in zip(("out", "lse"), (out, lse), oracle.attention(q, k, v, count, **how), plain.attention(q, k, v, count, **how)):
        flat = lambda x: np.where(np.reshape(where, np.shape(where) + (1,) * (x.ndim - np.ndim(where))), x, 0).astype(x.dtype).reshape(len(x), -1)  # noqa: E731
        assert_close(name, flat(got), flat(truth), flat(measure), reduction=S + D)


@every
@rules
def test_far_starts(guarded, backend, rule, rng):
    """Past the lists a query sees what its rule shows, or nothing."""
    q, k, v = qkv(rng, len(STARTS))
    make, sees = RULES[rule]
    out, lse = arrays(*guarded.sparse_attention(q, k, v, make(), q_start=STARTS, return_lse=True))
    count, nothing = oracle.visible(len(STARTS), T, S, q_start=STARTS, rule=sees), np.isneginf(lse)
    assert (out[nothing] == 0).all()
    judged(out, lse, q, k, v, count, ~nothing)


@every
@pytest.mark.parametrize("rule", ["causal", "window", "strided"])
@pytest.mark.parametrize("start", [INT_MIN, INT_MAX - T + 1])
def test_a_far_start_from_the_host(guarded, backend, rule, start, rng):
    q, k, v = qkv(rng, 1)
    make, sees = RULES[rule]
    attention(guarded, q, k, v, make(), oracle.visible(1, T, S, q_start=start, rule=sees), q_start=start)


@every
@pytest.mark.parametrize("rule", ["causal", "window", "blocks", "selection"])
def test_positions_past_the_last_integer(guarded, backend, rule, rng):
    """They mean nothing in particular; they spoil neither the other samples nor the process."""
    q, k, v = qkv(rng, 2)
    starts = np.array([INT_MAX, 9], np.int32)
    chosen = lambda: guarded.selection(rng.integers(-1, S, (2, 1, T, 6)).astype(np.int32), causal=True) if rule == "selection" else RULES[rule][0]()
    pattern = chosen()
    out, lse = arrays(*guarded.sparse_attention(q, k, v, pattern, q_start=starts, kv_length=np.array([S, S], np.int32), return_lse=True))
    assert np.isfinite(out.astype(np.float32)).all() and not np.isnan(lse).any() and (out[np.isneginf(lse)] == 0).all()
    where = dict(q_start=starts[1:], kv_length=np.array([S], np.int32))
    count = oracle.selection_count(arrays(pattern.indices)[0][1:], S, Hq, causal=True, **where) if rule == "selection" else oracle.visible(1, T, S, rule=RULES[rule][1], **where)
    judged(out[1:], lse[1:], q[1:], k[1:], v[1:], count, True)


@every
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("G, granularity, causal", [(1, 1, False), (2, 16, True), (2, 1, True), (1, 5, False)])
def test_entries(guarded, backend, G, granularity, causal, gradient, rng):
    B, K = 2, 70
    q, k, v = qkv(rng, B)
    lengths = rng.choice([INT_MIN, -1, 0, 1, 33, K, K + 1, INT_MAX], (B, G, T)).astype(np.int32)
    entries = rng.integers(INT_MIN, INT_MAX, (B, G, T, K), endpoint=True)
    legal = rng.random(entries.shape) < 0.3
    entries = np.where(legal, rng.integers(-2, -(-S // granularity) + 2, entries.shape), entries).astype(np.int32)
    kv = np.array([INT_MAX, 11], np.int32)
    where = dict(kv_length=kv, q_start=np.array([4, INT_MAX - T + 1], np.int32))
    count = oracle.selection_count(entries, S, Hq, lengths=lengths, granularity=granularity, causal=causal, **where)
    how = dict(granularity=granularity, causal=causal)
    if gradient:
        pytest.importorskip("torch")
        rule = st.Selection(guarded.tensor(entries), lengths=guarded.tensor(lengths), **how)
        gradients(guarded, q, k, v, rule, count, rng, poison=lambda x: spoiled(x, kv), **where)
    else:
        attention(guarded, q, spoiled(k, kv), spoiled(v, kv, -np.inf), guarded.selection(entries, lengths, **how), count, **where)


@every
def test_restricted_entries(guarded, backend, rng):
    q, k, v = qkv(rng, 2)
    entries = np.where(rng.random((2, 1, T, 30)) < 0.5, rng.integers(0, S, (2, 1, T, 30)), rng.integers(INT_MIN, INT_MAX, (2, 1, T, 30))).astype(np.int32)
    kv = np.array([INT_MAX, 20], np.int32)
    count = oracle.selection_count(entries, S, Hq, kv_length=kv) * oracle.visible(2, T, S, q_start=np.array([S - T, 20 - T]), rule=RULES["window"][1])
    attention(guarded, q, k, v, guarded.selection(entries) & st.Window(6, 2), count, kv_length=np.array([S, 20], np.int32))


@every
@pytest.mark.parametrize("made", ["documents", "cu_seqlens", "tokens"])
def test_layouts_from_garbage(guarded, backend, made, rng):
    """A layout made of any integers is one that kernels can run."""
    pytest.importorskip("torch")
    far = guarded.tensor(np.array([INT_MAX, -7, 9, INT_MIN, 5, INT_MAX, 3], np.int32))
    if made == "tokens":
        layout = st.Layout.from_global_tokens(far.reshape(1, 7), S, S, 32, 32, window=2)
    else:
        layout = st.Layout.from_documents(**{"lengths" if made == "documents" else made: far}, total=S, block_q=32, block_k=32, causal=True)
    q, k, v = (guarded.tensor(normal(rng, (1, 2, S, D), np.float16)) for _ in range(3))
    try:
        out, lse = arrays(*st.sparse_attention(q, k, v, layout, return_lse=True, backend=guarded.backend))
    except st.Unsupported as refusal:
        pytest.skip(str(refusal))
    assert np.isfinite(out).all() and not np.isnan(lse).any()
    if made == "tokens":
        seen = (st.Window(2, 2) | st.Global([3, 5, 9])).mask(S, S)
        assert (layout.mask(S, S) == seen).all()


# ----------------------------------------------------------------------------------------------------------------- indexer
BOUNDS = np.array([INT_MIN, INT_MIN + 1, -5, 0, 1, 17, S - 1, S, S + 1, INT_MAX - 1, INT_MAX], np.int64)


def index(rng, B, dtype):
    return normal(rng, (B, 3, T, D), dtype), normal(rng, (B, S, D), dtype), normal(rng, (B, 3, T), np.float32)


@every
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("how", ["scores", "topk", "pooled"])
def test_windows_of_the_indexer(guarded, backend, dtype, how, rng):
    B = len(STARTS)
    q, k, w = index(rng, B, numpy_dtype(dtype))
    options = dict(key_start=rng.choice(BOUNDS, (B, T)).astype(np.int32), key_end=rng.choice(BOUNDS, (B, T)).astype(np.int32), q_start=STARTS, k_scale=(rng.random((B, S)) + 0.5).astype(np.float32))
    options["key_start"][:, -1], options["key_end"][:, -1] = INT_MIN, INT_MAX
    if how == "scores":
        indexer_scores(guarded, q, k, w, **options)
        return
    indexer_topk(guarded, q, k, w, 4, **options, **(dict(pool=8, force_last=1, force_first=1) if how == "pooled" else {}))


@every
@pytest.mark.parametrize("pool", [1, 8])
def test_keys_out_of_sight_of_the_indexer(guarded, backend, pool, rng):
    """NaN and inf in keys and scales that no query of a sample sees reach neither scores nor choices."""
    q, k, w = index(rng, 2, np.float32)
    end = np.array([[9] * T, [20] * T], np.int32)
    scale = (rng.random((2, S)) + 0.5).astype(np.float32)
    spoil_k, spoil_scale = k.copy(), scale.copy()
    for b, stop in enumerate(end[:, 0]):
        spoil_k[b, stop:], spoil_scale[b, stop:] = np.nan, np.inf
        spoil_k[b, stop + 2:] = np.inf
    options = dict(key_end=end, causal=False)
    clean, spoiled_ = (arrays(guarded.indexer_scores(q, a, w, k_scale=s, **options))[0] for a, s in ((k, scale), (spoil_k, spoil_scale)))
    assert (clean == spoiled_).all()
    (one, best), (two, best_two) = (guarded.indexer_topk(q, a, w, 3, k_scale=s, pool=pool, return_scores=True, **options) for a, s in ((k, scale), (spoil_k, spoil_scale)))
    for a, b in zip(arrays(one.indices, one.lengths, best), arrays(two.indices, two.lengths, best_two)):
        assert (a == b).all()


@every
def test_positions_of_the_indexer_past_the_last_integer(guarded, backend, rng):
    q, k, w = index(rng, 2, np.float16)
    starts = np.array([INT_MAX, 30], np.int32)
    scores, = arrays(guarded.indexer_scores(q, k, w, q_start=starts))
    chosen = guarded.indexer_topk(q, k, w, 4, q_start=starts)
    indices, lengths = arrays(chosen.indices, chosen.lengths)
    assert not np.isnan(scores).any() and ((indices >= -1) & (indices < S)).all() and ((lengths >= 0) & (lengths <= 4)).all()
    assert np.isfinite(scores[1, :, :31]).all() and np.isneginf(scores[1, 0, 31:]).all()


@every
@pytest.mark.parametrize("K", [1, 8, 50])
def test_windows_of_topk(guarded, backend, K, rng):
    B = 4
    scores = normal(rng, (B, T, S), np.float32)
    scores[0, 0], scores[1, :, 3:20] = np.nan, np.inf
    lo, hi = (rng.choice(BOUNDS, (B, T)).astype(np.int32) for _ in range(2))
    chosen = guarded.topk(scores, K, key_start=lo, key_end=hi)
    indices, lengths = arrays(chosen.indices, chosen.lengths)
    for b in range(B):
        for t in range(T):
            keys = [s for s in range(S) if lo[b, t] <= s < hi[b, t] and scores[b, t, s] > -np.inf]
            best = sorted(sorted(keys, key=lambda s: (-scores[b, t, s], s))[:K])
            assert indices[b, 0, t].tolist() == best + [-1] * (K - len(best)) and lengths[b, 0, t] == len(best)


# -------------------------------------------------------------------------------------------------------- latent and merge
@every
@pytest.mark.parametrize("dtype, scaled", [("float32", False), ("bfloat16", True), ("float16", False)])
def test_latent(guarded, backend, dtype, scaled, rng):
    B, R, H, Dn, P = 2, 150, 3, 12, 4
    kind = numpy_dtype(dtype)
    latent = normal(rng, (B, S, R), numpy_dtype("float8_e4m3fn") if scaled else kind)
    w_uk, w_uv, rope = normal(rng, (H, R, Dn), kind, R ** -0.5), normal(rng, (H, R, Dv), kind, R ** -0.5), normal(rng, (B, S, P), kind)
    how = dict(k_rope=rope, latent_scale=(rng.random((B, S, 2)) + 0.3).astype(np.float32) if scaled else None)
    got, truth, measure = arrays(*guarded.latent_decompress(latent, w_uk, w_uv, **how)), oracle.latent_decompress(latent, w_uk, w_uv, **how), plain.latent_decompress(latent, w_uk, w_uv, **how)
    for name, g, a, b in zip("kv", got, truth, measure):
        assert_close(name, g, a, b, reduction=R)
    if scaled:
        return
    q_nope, q_rope = normal(rng, (B, H, T, Dn), kind), normal(rng, (B, H, T, P), kind)
    lengths = np.array([INT_MAX, 11], np.int32)
    count = oracle.visible(B, T, S, kv_length=lengths, rule=RULES["causal"][1])
    for mode in ("absorbed", "decompressed"):
        out, = arrays(guarded.latent_attention(q_nope, q_rope, latent, rope, w_uk, w_uv, st.Causal(), mode=mode, kv_length=lengths))
        args, scale = (q_nope, q_rope, latent, rope, w_uk, w_uv, count), (Dn + P) ** -0.5
        assert_close("out", out, oracle.latent_attention(*args, scale=scale)[0], plain.latent_attention(*args, mode=mode, scale=scale)[0], reduction=R + S)


@every
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merge(guarded, backend, dtype, rng):
    outs = [normal(rng, (2, 3, T, Dv), numpy_dtype(dtype)) for _ in range(3)]
    lses = [normal(rng, (2, 3, T), np.float32, 4) for _ in range(3)]
    for out, lse in zip(outs, lses):
        out[:, :, 1], lse[:, :, 1] = 0, -np.inf
    sinks = np.array([0.5, -np.inf, 3e38], np.float32)
    got = arrays(*guarded.merge_attention([guarded.put(o) for o in outs], [guarded.put(e) for e in lses], sink_logits=sinks))
    for name, g, a, b in zip(("out", "lse"), got, oracle.merge_attention(outs, lses, sink_logits=sinks), plain.merge_attention(outs, lses, sink_logits=sinks)):
        assert_close(name, g, a, b, reduction=3)
