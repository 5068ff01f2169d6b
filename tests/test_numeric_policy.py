"""The checkers are tested on wrong answers: each must fail on every one of them, and pass on the plain formula's own."""
import numpy as np
import oracle
import pytest
from drivers import numpy_dtype
from numeric import assert_chosen, assert_close, assert_same_bits, assert_topk, plain

B, HQ, HK, T, S, D, DV = 2, 4, 2, 33, 47, 24, 16
SCALE = D ** -0.5


def case(dtype, rng):
    kind = numpy_dtype(dtype)
    q, k, v = (rng.standard_normal(shape).astype(kind) for shape in ((B, HQ, T, D), (B, HK, S, D), (B, HK, S, DV)))
    seen = oracle.visible(B, T, S, rule=lambda p, s: (s <= p) & (s >= p - 20))
    return q, k, v, seen, rng.standard_normal(HQ).astype(np.float32)


def shifted(seen):
    return np.roll(seen, 1, axis=-1)


# name -> the wrong answer, from q, k, v, seen, sinks and the right plain answer
WRONG = {
    "nan": lambda q, k, v, seen, sinks, out: np.where(np.arange(out.size).reshape(out.shape) == 77, np.nan, out.astype(np.float32)).astype(out.dtype),
    "all nan": lambda q, k, v, seen, sinks, out: np.full_like(out, np.nan),
    "infinite": lambda q, k, v, seen, sinks, out: np.where(np.arange(out.size).reshape(out.shape) == 5, np.inf, out.astype(np.float32)).astype(out.dtype),
    "zeros": lambda q, k, v, seen, sinks, out: np.zeros_like(out),
    "empty": lambda q, k, v, seen, sinks, out: out[:, :, :0],
    "transposed": lambda q, k, v, seen, sinks, out: out.swapaxes(1, 2),
    "transposed in memory": lambda q, k, v, seen, sinks, out: np.ascontiguousarray(out.swapaxes(1, 2)).reshape(out.shape),
    "heads swapped": lambda q, k, v, seen, sinks, out: out[:, ::-1],
    "one row off": lambda q, k, v, seen, sinks, out: np.roll(out, 1, axis=2),
    "mask off by one": lambda q, k, v, seen, sinks, out: plain.attention(q, k, v, shifted(seen), scale=SCALE, sink_logits=sinks)[0],
    "no mask": lambda q, k, v, seen, sinks, out: plain.attention(q, k, v, np.ones_like(seen), scale=SCALE, sink_logits=sinks)[0],
    "no scale": lambda q, k, v, seen, sinks, out: plain.attention(q, k, v, seen, scale=1.0, sink_logits=sinks)[0],
    "scale of another width": lambda q, k, v, seen, sinks, out: plain.attention(q, k, v, seen, scale=(D + 8) ** -0.5, sink_logits=sinks)[0],
    "no sink": lambda q, k, v, seen, sinks, out: plain.attention(q, k, v, seen, scale=SCALE)[0],
    "sink scaled": lambda q, k, v, seen, sinks, out: plain.attention(q, k, v, seen, scale=SCALE, sink_logits=sinks * SCALE)[0],
    "sinks of other heads": lambda q, k, v, seen, sinks, out: plain.attention(q, k, v, seen, scale=SCALE, sink_logits=sinks[::-1])[0],
    "softcap": lambda q, k, v, seen, sinks, out: plain.attention(q, k, v, seen, scale=SCALE, sink_logits=sinks, softcap=2.0)[0],
    "base 2": lambda q, k, v, seen, sinks, out: plain.attention(q, k, v, seen, scale=SCALE * np.log(2), sink_logits=sinks)[0],
    "wrong group": lambda q, k, v, seen, sinks, out: plain.attention(q, k[:, ::-1], v[:, ::-1], seen, scale=SCALE, sink_logits=sinks)[0],
    "last key forgotten": lambda q, k, v, seen, sinks, out: plain.attention(q, k, v, seen & (np.arange(S) < S - 1), scale=SCALE, sink_logits=sinks)[0],
    "narrower type": lambda q, k, v, seen, sinks, out: out.astype(numpy_dtype("float8_e4m3fn")).astype(out.dtype),
    "another type": lambda q, k, v, seen, sinks, out: out.astype(np.float32 if out.dtype != np.float32 else np.float16),
    "biased by a percent": lambda q, k, v, seen, sinks, out: (out.astype(np.float64) * 1.01).astype(out.dtype),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_wrong_outputs_fail(dtype, wrong, rng):
    q, k, v, seen, sinks = case(dtype, rng)
    truth, _ = oracle.attention(q, k, v, seen, scale=SCALE, sink_logits=sinks)
    out, _ = plain.attention(q, k, v, seen, scale=SCALE, sink_logits=sinks)
    assert_close("out", out, truth, out, reduction=S)
    assert_close("out", truth.astype(np.float32).astype(out.dtype), truth, out, reduction=S)
    with pytest.raises(AssertionError, match="out"):
        assert_close("out", WRONG[wrong](q, k, v, seen, sinks, out), truth, out, reduction=S)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_a_tiled_kernel_passes(dtype, rng):
    """An online softmax in tiles, base 2, other order: what every kernel here does."""
    q, k, v, seen, sinks = case(dtype, rng)
    truth, truth_lse = oracle.attention(q, k, v, seen, scale=SCALE, sink_logits=sinks)
    out, lse = plain.attention(q, k, v, seen, scale=SCALE, sink_logits=sinks)
    wide, log2e = plain.working(q), np.log2(np.e)
    wk, wv = plain.spread(k, HQ), plain.spread(v, HQ)
    top, total, acc = np.full((B, HQ, T, 1), -np.inf, wide), np.zeros((B, HQ, T, 1), wide), np.zeros((B, HQ, T, DV), wide)
    for start in range(0, S, 16):
        tile = slice(start, start + 16)
        x = np.where(seen[..., tile], q.astype(wide) @ wk[:, :, tile].swapaxes(-1, -2) * wide(SCALE * log2e), -np.inf).astype(wide)
        higher = np.maximum(top, x.max(axis=-1, keepdims=True))
        base = np.where(np.isfinite(higher), higher, 0)
        p, shrink = np.exp2(x - base), np.exp2(top - base)
        top, total, acc = higher, total * shrink + p.sum(axis=-1, keepdims=True), acc * shrink + p.astype(v.dtype).astype(wide) @ wv[:, :, tile]
    natural = top[..., 0] / wide(log2e) + np.log(total[..., 0])
    with_sink = total + np.exp2(sinks[:, None, None].astype(wide) * wide(log2e) - top)
    assert_close("out", (acc / with_sink).astype(q.dtype), truth, out, reduction=S)
    assert_close("lse", natural.astype(lse.dtype), truth_lse, lse, reduction=S + D)


WRONG_LSE = {
    "base 2": lambda lse, with_sink: lse * np.float32(np.log2(np.e)),
    "sink inside": lambda lse, with_sink: with_sink,
    "empty rows +inf": lambda lse, with_sink: np.where(lse == -np.inf, np.inf, lse).astype(lse.dtype),
    "empty rows nan": lambda lse, with_sink: np.where(lse == -np.inf, np.nan, lse).astype(lse.dtype),
    "empty rows -1e30": lambda lse, with_sink: np.where(lse == -np.inf, -1e30, lse).astype(lse.dtype),
    "empty rows 0": lambda lse, with_sink: np.where(lse == -np.inf, 0, lse).astype(lse.dtype),
    "transposed": lambda lse, with_sink: lse.swapaxes(1, 2),
    "a key too much": lambda lse, with_sink: np.logaddexp(lse, np.float32(-3)),
}


@pytest.mark.parametrize("wrong", WRONG_LSE)
def test_wrong_lse_fails(wrong, rng):
    q, k, v, seen, sinks = case("bfloat16", rng)
    seen[:, :, 7] = False
    _, truth = oracle.attention(q, k, v, seen, scale=SCALE)
    _, lse = plain.attention(q, k, v, seen, scale=SCALE)
    assert_close("lse", lse, truth, lse, reduction=S + D)
    with pytest.raises(AssertionError, match="lse"):
        assert_close("lse", WRONG_LSE[wrong](lse, np.logaddexp(lse, sinks[:, None])), truth, lse, reduction=S + D)


WRONG_GRADIENTS = {
    "delta forgotten": lambda call: call(dout_shift=True),
    "scale forgotten": lambda call: tuple(g.astype(np.float32).astype(g.dtype) if i == 2 else (g.astype(np.float32) / SCALE).astype(g.dtype) for i, g in enumerate(call())),
    "sink forgotten": lambda call: call(sink_logits=None),
    "softcap's slope forgotten": lambda call: call(softcap=None),
    "mask off by one": lambda call: call(shift=True),
    "zero": lambda call: tuple(np.zeros_like(g) for g in call()),
    "nan in one place": lambda call: tuple(np.where(np.arange(g.size).reshape(g.shape) == 3, np.nan, g.astype(np.float32)).astype(g.dtype) for g in call()),
    "lse's gradient forgotten": lambda call: call(dlse=None),
}


@pytest.mark.parametrize("wrong", WRONG_GRADIENTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wrong_gradients_fail(dtype, wrong, rng):
    q, k, v, seen, sinks = case(dtype, rng)
    seen[:, :, 7] = False
    dout, dlse = rng.standard_normal((B, HQ, T, DV)).astype(q.dtype), rng.standard_normal((B, HQ, T)).astype(np.float32)
    options = dict(dlse=dlse, scale=SCALE, sink_logits=sinks, softcap=3.0)

    def call(dout_shift=False, shift=False, **changed):
        rule = shifted(seen) if shift else seen
        if not dout_shift:
            return plain.attention_gradients(q, k, v, rule, dout, **(options | changed))[:3]
        centred = np.array(dout)
        centred[..., 0] += 1
        return plain.attention_gradients(q, k, v, rule, centred, **(options | changed))[:3]

    truth = oracle.attention_gradients(q, k, v, seen, dout, **options)[:3]
    right = call()
    for name, t, p in zip(("dq", "dk", "dv"), truth, right):
        assert_close(name, p, t, p, reduction=S + D)
    failed = 0
    for name, g, t, p in zip(("dq", "dk", "dv"), WRONG_GRADIENTS[wrong](call), truth, right):
        try:
            assert_close(name, g, t, p, reduction=S + D)
        except AssertionError:
            failed += 1
    assert failed >= (2 if wrong in ("scale forgotten", "softcap's slope forgotten", "lse's gradient forgotten") else 3)


def test_the_policy_forgives_no_more_with_an_unknown_accumulator():
    with pytest.raises(ValueError, match="accumulator"):
        assert_close("x", np.zeros(3, np.float32), np.zeros(3), np.zeros(3, np.float32), reduction=1, accumulator="float16")


def test_same_bits():
    x = np.array([0.0, np.nan, 1.0], np.float32)
    assert_same_bits("x", x, x.copy())
    for other in (np.array([-0.0, np.nan, 1.0], np.float32), x[:2], x.astype(np.float64), np.nextafter(x, np.float32(2))):
        with pytest.raises(AssertionError, match="x"):
            assert_same_bits("x", x, other)


def right_topk(scores, k):
    index = np.full((*scores.shape[:-1], k), -1, np.int32)
    lengths = np.zeros(scores.shape[:-1], np.int32)
    for at in np.ndindex(lengths.shape):
        eligible = [s for s in range(scores.shape[-1]) if scores[at][s] > -np.inf]
        best = sorted(sorted(eligible, key=lambda s: (-scores[at][s], s))[:k])
        index[at][:len(best)], lengths[at] = best, len(best)
    return index, lengths


def replace(index, at, value):
    index = index.copy()
    index[at] = value
    return index


WRONG_TOPK = {
    "padded while keys remain": lambda i, n, s: (replace(i, (0, 0, -1), -1), n - (np.arange(n.size).reshape(n.shape) == 0).astype(np.int32)),
    "a worse key": lambda i, n, s: (np.sort(replace(i, (0, 1, 2), int(s[0, 1].argmin())), axis=-1), n),
    "a duplicate": lambda i, n, s: (replace(i, (0, 0, 1), i[0, 0, 0]), n),
    "descending": lambda i, n, s: (i[..., ::-1].copy(), n),
    "past the end": lambda i, n, s: (replace(i, (1, 0, -1), s.shape[-1]), n),
    "negative": lambda i, n, s: (replace(i, (1, 0, 0), -5), n),
    "uninitialised": lambda i, n, s: (replace(i, (1, 1, -1), 2 ** 31 - 1), n),
    "length too small": lambda i, n, s: (i, n - 1),
    "length too large": lambda i, n, s: (i, n + 1),
    "rows swapped": lambda i, n, s: (i[:, ::-1].copy(), n),
    "empty": lambda i, n, s: (i[..., :0], n),
    "64 bit": lambda i, n, s: (i.astype(np.int64), n),
    "the smallest": lambda i, n, s: right_topk(-s, i.shape[-1]),
    "first keys": lambda i, n, s: (np.broadcast_to(np.arange(i.shape[-1], dtype=np.int32), i.shape).copy(), n),
}


@pytest.mark.parametrize("wrong", WRONG_TOPK)
@pytest.mark.parametrize("judge", ["exact", "banded"])
def test_wrong_indices_fail(judge, wrong, rng):
    scores = rng.standard_normal((2, 3, 40)).astype(np.float32)
    index, lengths = right_topk(scores, 8)

    def check(i, n):
        if judge == "exact":
            assert_topk("topk", i, n, scores, 8)
        else:
            assert_chosen("topk", i, n, scores.astype(np.float64), scores, 8, visible=np.ones(scores.shape, bool), reduction=64)
    check(index, lengths)
    with pytest.raises(AssertionError, match="topk"):
        check(*WRONG_TOPK[wrong](index, lengths, scores))


def test_ties_are_exact_for_given_scores_only(rng):
    scores = np.zeros((1, 1, 10), np.float32)
    later = np.array([[[7, 8, 9]]], np.int32), np.array([[3]], np.int32)
    with pytest.raises(AssertionError, match="missing"):
        assert_topk("topk", *later, scores, 3)
    assert_chosen("topk", *later, scores.astype(np.float64), scores, 3, visible=np.ones(scores.shape, bool), reduction=1)


def test_hidden_nan_and_forced_entries(rng):
    scores = rng.standard_normal((1, 1, 12))
    seen = np.ones(scores.shape, bool)
    seen[..., 10:] = False
    forced = np.zeros(scores.shape, bool)
    forced[..., int(scores[0, 0, :10].argmin())] = True

    def check(chosen, k, **options):
        index = np.full((1, 1, k), -1, np.int32)
        index[0, 0, :len(chosen)] = sorted(chosen)
        assert_chosen("pool", index, np.array([[len(chosen)]], np.int32), scores, scores.astype(np.float32), k, visible=seen, reduction=1, **options)

    order = np.argsort(-scores[0, 0, :10]).tolist()
    check(order[:4], 4)
    check([*order[:3], order[-1]], 4, forced=forced)
    check(order, 10)
    for chosen, k, options in ((order[:4], 4, {"forced": forced}), ([*order[:3], 11], 4, {}), ([*order[:3], order[-1]], 4, {}), (order[:9], 10, {})):
        with pytest.raises(AssertionError, match="pool"):
            check(chosen, k, **options)
    scores[0, 0, order[0]] = np.nan
    check(order[1:5], 4)
    check(order, 10)
    with pytest.raises(AssertionError, match="pool"):
        check(order[:4], 4)
