"""The oracle backend against PyTorch's scaled_dot_product_attention with boolean masks, against torch.topk, and against sets written by hand."""
from importlib import import_module

import numpy as np
import oracle
import pytest
from block_lists import build
from drivers import numpy_dtype
from numeric import assert_close, plain

torch = pytest.importorskip("torch")
KERNEL = {name: import_module(f"sparsetile.backends.reference.{name}").run for name in (
    "block_attention", "block_attention_backward", "gather_attention", "gather_attention_backward", "attention_delta", "merge_attention",
    "indexer_scores", "indexer_topk", "topk", "latent_decompress", "grouped_matmul", "layout")}


def same(a, b, name="value"):
    """float64 against float64: the policy with PyTorch in the place of the plain formula and the whole answer as one row."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape, name
    assert_close(name, a.reshape(-1), b.reshape(-1).astype(np.longdouble), b.reshape(-1), reduction=4096)


def same_gradients(got, expected):
    """dq, dk, dv together: one of them may be nothing but cancellation (a query that sees one key has dq = 0)."""
    for a, b in zip(got, expected):
        assert a.shape == b.shape
    same(np.concatenate([np.asarray(a).reshape(-1) for a in got]), np.concatenate([np.asarray(b).reshape(-1).astype(np.float64) for b in expected]), "gradients")


def tensors(rng, B=2, Hq=4, Hk=2, T=19, S=33, D=12, Dv=9):
    return [torch.tensor(rng.standard_normal(s), requires_grad=True) for s in ((B, Hq, T, D), (B, Hk, S, D), (B, Hk, S, Dv))]


def numpys(*xs):
    return tuple(x.detach().numpy() for x in xs)


def window(T, S, left, right):
    p, s = np.arange(S - T, S)[:, None], np.arange(S)
    return (s >= p - left) & (s <= p + right)


MASKS = {
    "full": lambda T, S, rng: np.ones((T, S), bool),
    "causal": lambda T, S, rng: window(T, S, S, 0),
    "window": lambda T, S, rng: window(T, S, 7, 3),
    "random": lambda T, S, rng: rng.random((T, S)) < 0.3,
    "self": lambda T, S, rng: window(T, S, 0, 0),
    "one row empty": lambda T, S, rng: window(T, S, S, 0) & (np.arange(T) != 4)[:, None],
}


def lists_for(mask, T, S, style, rng):
    """The same mask as lists of every kind: orders are permutations with holes."""
    if style == "orders":
        q = np.full(-(-S // 16) * 16 + 16, -1)
        k = np.full(-(-S // 32) * 32 + 32, -1)
        q[rng.permutation(len(q))[:S]], k[rng.permutation(len(k))[:S]] = rng.permutation(S), rng.permutation(S)
        absolute = np.zeros((1, S, S), bool)
        absolute[0, S - T:] = mask
        return build(absolute, 0, 16, 32, q_order=q, k_order=k)
    return build(mask[None], S - T, 16, 32, bitmaps=style == "bitmaps", full=style != "bitmaps")


@pytest.mark.parametrize("style", ["mixed", "bitmaps", "orders"])
@pytest.mark.parametrize("name", MASKS)
def test_block_attention_is_sdpa(name, style, rng):
    q, k, v = tensors(rng)
    T, S = q.shape[2], k.shape[2]
    mask = MASKS[name](T, S, rng)
    alive = mask.any(axis=1)
    expected = torch.nn.functional.scaled_dot_product_attention(q[:, :, alive], k, v, attn_mask=torch.tensor(mask[alive]), enable_gqa=True)
    dout = torch.tensor(rng.standard_normal((*q.shape[:3], v.shape[3])))
    expected.backward(dout[:, :, alive])
    lists, scale = lists_for(mask, T, S, style, rng), q.shape[3] ** -0.5
    out, lse = KERNEL["block_attention"](*numpys(q, k, v), lists, scale=scale)
    same(out[:, :, alive], expected.detach(), "out")
    assert (out[:, :, ~alive] == 0).all() and (lse[:, :, ~alive] == -np.inf).all()
    scores = torch.einsum("bhtd,bhsd->bhts", q, k.repeat_interleave(2, 1)) * scale
    same(lse[:, :, alive], torch.logsumexp(scores.masked_fill(~torch.tensor(mask), -torch.inf), -1).detach()[:, :, alive], "lse")
    total, delta, _ = KERNEL["attention_delta"](out, dout.numpy(), lse)
    same_gradients(KERNEL["block_attention_backward"](*numpys(q, k, v), lists, total, delta, dout.numpy(), scale=scale), (q.grad, k.grad, v.grad))


@pytest.mark.parametrize("sinks", [None, "finite", "large", "off", "infinite"])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_sinks_softcap_and_lse_gradients_are_autograd(sinks, softcap, rng):
    """An explicit softmax with a sink column in torch float64; lse over keys alone, and its gradient."""
    q, k, v = tensors(rng)
    T, S, Hq = q.shape[2], k.shape[2], q.shape[1]
    mask = MASKS["window"](T, S, rng)
    values = {None: None, "finite": rng.standard_normal(Hq), "large": np.array([1e4, 20.0, -1e4, 0]), "off": np.full(Hq, -np.inf), "infinite": np.array([np.inf, 0.0, 1.0, -np.inf])}[sinks]
    values = None if values is None else values.astype(np.float32).astype(np.float64)
    scale = 0.4
    logits = torch.einsum("bhtd,bhsd->bhts", q, k.repeat_interleave(2, 1)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~torch.tensor(mask), -torch.inf)
    lse = torch.logsumexp(logits, -1)
    if values is None:
        p, sink = torch.softmax(logits, -1), None
    else:
        sink = torch.tensor(values, requires_grad=True)
        p = torch.softmax(torch.cat([logits, sink.nan_to_num(posinf=1e300, neginf=-1e300)[None, :, None, None].expand(*logits.shape[:3], 1)], -1), -1)[..., :-1]
    out = p @ v.repeat_interleave(2, 1)
    dout, dlse = torch.tensor(rng.standard_normal(out.shape)), torch.tensor(rng.standard_normal(lse.shape))
    # A huge sink takes the whole row: the kernels' one factor for both gradients then cannot carry that of the lse (attention_delta says so).
    with_lse = sinks in (None, "finite", "off")
    ((out * dout).sum() + ((lse * dlse).sum() if with_lse else 0)).backward()
    lists = lists_for(mask, T, S, "mixed", rng)
    got, got_lse = KERNEL["block_attention"](*numpys(q, k, v), lists, scale=scale, softcap=softcap, sink_logits=values)
    same(got, out.detach(), "out")
    same(got_lse, lse.detach(), "lse")
    total, delta, dsink = KERNEL["attention_delta"](got, dout.numpy(), got_lse, sink_logits=values, dlse=dlse.numpy() if with_lse else None)
    grads = KERNEL["block_attention_backward"](*numpys(q, k, v), lists, total, delta, dout.numpy(), scale=scale, softcap=softcap)
    same_gradients(grads, (q.grad, k.grad, v.grad))
    if values is not None:
        reference = np.where(np.isfinite(values), sink.grad.numpy(), 0)
        assert_close("dsink", dsink, reference, reference.astype(np.float32), reduction=T)
    # The tests' own oracle, written apart, says the same.
    truth, truth_lse = oracle.attention(*numpys(q, k, v), mask, scale=scale, softcap=softcap, sink_logits=values)
    same(got, truth.astype(np.float64), "oracle's out")
    same(got_lse, truth_lse.astype(np.float64), "oracle's lse")
    truths = oracle.attention_gradients(*numpys(q, k, v), mask, dout.numpy(), dlse=dlse.numpy() if with_lse else None, scale=scale, softcap=softcap, sink_logits=values)
    same_gradients(grads, truths[:3])


@pytest.mark.parametrize("Hq, Hk", [(1, 1), (3, 1), (6, 2), (7, 7), (12, 4)])
def test_heads_share_keys_as_torch_does(Hq, Hk, rng):
    q, k, v = tensors(rng, B=1, Hq=Hq, Hk=Hk, T=5, S=9)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    mask = np.ones((5, 9), bool)
    same(KERNEL["block_attention"](*numpys(q, k, v), build(mask[None], 4, 16, 32), scale=12 ** -0.5)[0], expected.detach())
    every = np.tile(np.arange(9, dtype=np.int32), (1, 1, 5, 1))
    same(KERNEL["gather_attention"](*numpys(q, k, v), every, scale=12 ** -0.5)[0], expected.detach())


def test_lists_per_batch_and_head(rng):
    q, k, v = numpys(*tensors(rng, Hk=4))
    T, S = 19, 33
    rules = rng.random((3, T, S)) < 0.5
    list_of = np.array([[0, 1, 2, 0], [2, 2, 1, 0]])
    out, _ = KERNEL["block_attention"](q, k, v, build(rules, S - T, 16, 32, list_of=list_of), scale=0.3)
    for b in range(2):
        for h in range(4):
            expected, _ = oracle.attention(q[b:b + 1, h:h + 1], k[b:b + 1, h:h + 1], v[b:b + 1, h:h + 1], rules[list_of[b, h]], scale=0.3)
            same(out[b:b + 1, h:h + 1], expected.astype(np.float64))


def test_lengths_and_positions_by_hand():
    """One head of width 1, all scores equal: the output is the mean of the visible values."""
    v = np.arange(8.0).reshape(1, 1, 8, 1)
    q, k = np.zeros((1, 1, 3, 1)), np.zeros((1, 1, 8, 1))
    causal = build(np.tril(np.ones((8, 8), bool))[None], 0, 16, 32)

    def means(**options):
        return KERNEL["block_attention"](q, k, v, causal, scale=1.0, **options)[0][0, 0, :, 0].round(12).tolist()
    assert means() == [2.5, 3.0, 3.5]                                        # positions 5, 6, 7
    assert means(q_start=0) == [0.0, 0.5, 1.0]
    assert means(q_start=np.array([2])) == [1.0, 1.5, 2.0]
    assert means(kv_length=np.array([4], np.int32)) == [0.5, 1.0, 1.5]       # positions 1, 2, 3
    assert means(kv_length=np.array([4], np.int32), q_start=5) == [1.5, 1.5, 1.5]
    assert means(kv_length=np.array([0], np.int32)) == [0.0, 0.0, 0.0]
    assert means(kv_length=np.array([-9], np.int32), q_start=5) == [0.0, 0.0, 0.0]
    assert means(kv_length=np.array([2 ** 31 - 1], np.int32)) == [2.5, 3.0, 3.5]
    assert means(q_start=-1) == [0.0, 0.0, 0.5]                              # position -1 sees nothing
    assert means(q_start=6)[2] == 0.0                                        # position 8 is in no list


def test_selections_by_hand():
    v = np.arange(10.0).reshape(1, 1, 10, 1)
    q, k = np.zeros((1, 1, 1, 1)), np.zeros((1, 1, 10, 1))

    def mean(entries, **options):
        return round(float(KERNEL["gather_attention"](q, k, v, np.array([[[entries]]], np.int32), scale=1.0, **options)[0][0, 0, 0, 0]), 12)
    assert mean([3, 5]) == 4.0
    assert mean([3, 5, 5]) == round(13 / 3, 12)                               # a key named twice counts twice
    assert mean([-1, 3, -123456, 5, 10, 2 ** 31 - 1, -2 ** 31]) == 4.0
    assert mean([-1, -1]) == 0.0
    assert mean([3, 5, 9], lengths=np.array([[[2]]], np.int32)) == 4.0
    assert mean([3, 5, 9], lengths=np.array([[[-7]]], np.int32)) == 0.0
    assert mean([3, 5, 9], lengths=np.array([[[2 ** 31 - 1]]], np.int32)) == round(17 / 3, 12)
    assert mean([0, 3], granularity=3) == round((0 + 1 + 2 + 9) / 4, 12)      # block 3 holds keys 9 alone
    assert mean([0, 4], granularity=3) == 1.0
    assert mean([2 ** 31 - 1, 0], granularity=2 ** 20) == 4.5                 # all ten keys, no wrap-around
    assert mean([0, 1], granularity=4, causal=True, q_start=5) == 2.5         # keys 0..5
    assert mean([0, 1], granularity=4, causal=True, kv_length=np.array([3], np.int32)) == 1.0
    assert mean([7], causal=True, q_start=5) == 0.0


@pytest.mark.parametrize("G", [1, 2, 4])
def test_gather_is_sdpa_with_gathered_keys(G, rng):
    q, k, v = tensors(rng)
    B, Hq, T, D = q.shape
    S, K = k.shape[2], 6
    indices = np.stack([rng.choice(S, K, replace=False) for _ in range(B * G * T)]).reshape(B, G, T, K).astype(np.int32)
    mask = np.zeros((B, Hq, T, S), bool)
    np.put_along_axis(mask, np.repeat(indices, Hq // G, axis=1), True, axis=-1)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=torch.tensor(mask), enable_gqa=True)
    dout = torch.tensor(rng.standard_normal(expected.shape))
    expected.backward(dout)
    out, lse = KERNEL["gather_attention"](*numpys(q, k, v), indices, scale=D ** -0.5)
    same(out, expected.detach())
    total, delta, _ = KERNEL["attention_delta"](out, dout.numpy(), lse)
    same_gradients(KERNEL["gather_attention_backward"](*numpys(q, k, v), indices, total, delta, dout.numpy(), scale=D ** -0.5), (q.grad, k.grad, v.grad))


def test_duplicates_are_keys_given_twice(rng):
    q, k, v = tensors(rng, B=1, Hq=2, Hk=1, T=3, S=5)
    indices = np.array([[[[0, 0, 3], [4, 4, 4], [1, -1, 2]]]], np.int32)
    out, lse = KERNEL["gather_attention"](*numpys(q, k, v), indices, scale=1.0)
    for t, keys in enumerate(([0, 0, 3], [4, 4, 4], [1, 2])):
        expected = torch.nn.functional.scaled_dot_product_attention(q[:, :, t:t + 1], k[:, :, keys], v[:, :, keys], scale=1.0, enable_gqa=True)
        same(out[:, :, t:t + 1], expected.detach())
    count = oracle.selection_count(indices, 5, 2)
    truth, truth_lse = oracle.attention(*numpys(q, k, v), count, scale=1.0)
    same(out, truth.astype(np.float64)), same(lse, truth_lse.astype(np.float64))
    dout = rng.standard_normal(out.shape)
    total, delta, _ = KERNEL["attention_delta"](out, dout, lse)
    truths = oracle.attention_gradients(*numpys(q, k, v), count, dout, scale=1.0)
    same_gradients(KERNEL["gather_attention_backward"](*numpys(q, k, v), indices, total, delta, dout, scale=1.0), truths[:3])


@pytest.mark.parametrize("what", [np.nan, np.inf, -np.inf])
def test_unseen_keys_do_not_leak(what, rng):
    q, k, v = numpys(*tensors(rng))
    T, S = q.shape[2], k.shape[2]
    mask = MASKS["window"](T, S, rng)
    mask[5:9] = False
    mask[:, 20] = False
    lists, indices = build(mask[None], S - T, 16, 32), np.where(mask, np.arange(S), -1).astype(np.int32)[None, None].repeat(2, 0)
    bad_k, bad_v = k.copy(), v.copy()
    bad_k[:, :, ~mask.any(axis=0)] = bad_v[:, :, ~mask.any(axis=0)] = what
    dout = rng.standard_normal((*q.shape[:3], v.shape[3]))
    for forward, backward, keys in (("block_attention", "block_attention_backward", lists), ("gather_attention", "gather_attention_backward", indices)):
        good, lse = KERNEL[forward](q, k, v, keys, scale=0.3)
        out, bad_lse = KERNEL[forward](q, bad_k, bad_v, keys, scale=0.3)
        np.testing.assert_array_equal(good, out)
        np.testing.assert_array_equal(lse, bad_lse)
        total, delta, _ = KERNEL["attention_delta"](out, dout, lse)
        for a, b in zip(KERNEL[backward](q, k, v, keys, total, delta, dout, scale=0.3), KERNEL[backward](q, bad_k, bad_v, keys, total, delta, dout, scale=0.3)):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_low_precision_is_rounded_once(dtype, rng):
    q, k, v = (x.astype(numpy_dtype(dtype)) for x in numpys(*tensors(rng)))
    mask = MASKS["causal"](19, 33, rng)
    out, lse = KERNEL["block_attention"](q, k, v, build(mask[None], 14, 16, 32), scale=0.3)
    truth, truth_lse = oracle.attention(q, k, v, mask, scale=0.3)
    np.testing.assert_array_equal(out, truth.astype(np.float32).astype(q.dtype) if dtype != "float16" else truth.astype(np.float16))
    np.testing.assert_array_equal(lse, truth_lse.astype(np.float32))
    measure, measure_lse = plain.attention(q, k, v, mask, scale=0.3)
    assert_close("out", out, truth, measure, reduction=33), assert_close("lse", lse, truth_lse, measure_lse, reduction=33)


# ------------------------------------------------------------------------------------------------------------------- the rest
def torch_topk(row, k):
    """The contract's ties by torch.sort, stable and descending; torch.topk promises nothing about ties."""
    x = torch.tensor(row).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    order = torch.sort(x, descending=True, stable=True).indices[:k]
    return sorted(int(i) for i in order if x[i] > -torch.inf)


@pytest.mark.parametrize("kind", ["normal", "ties", "specials", "zeros"])
@pytest.mark.parametrize("k", [1, 7, 40, 64])
def test_topk_is_torch(kind, k, rng):
    scores = rng.standard_normal((2, 3, 40)).astype(np.float32)
    if kind == "ties":
        scores = np.round(scores)
    if kind == "specials":
        scores[rng.random(scores.shape) < 0.4] = np.nan
        scores[rng.random(scores.shape) < 0.2] = np.inf
        scores[rng.random(scores.shape) < 0.2] = -np.inf
    if kind == "zeros":
        scores = np.where(rng.random(scores.shape) < 0.5, np.float32(-0.0), np.float32(0.0))
    indices, lengths = KERNEL["topk"](scores, k)
    for b, t in np.ndindex(2, 3):
        expected = torch_topk(scores[b, t], k)
        assert indices[b, t].tolist() == expected + [-1] * (k - len(expected)) and lengths[b, t] == len(expected)
    if kind == "normal" and k <= 40:
        values = np.take_along_axis(scores, indices.astype(np.int64), -1)
        np.testing.assert_array_equal(np.sort(values, -1)[..., ::-1], torch.topk(torch.tensor(scores), k).values)


def test_topk_windows_by_hand():
    scores = np.array([[[5, 4, 3, 2, 1]] * 5], np.float32)
    start, end = np.array([[0, 2, -5, 4, 3]], np.int32), np.array([[5, 4, 1, 2, 99]], np.int32)
    indices, lengths = KERNEL["topk"](scores, 2, key_start=start, key_end=end)
    assert indices[0].tolist() == [[0, 1], [2, 3], [0, -1], [-1, -1], [3, 4]] and lengths[0].tolist() == [2, 2, 1, 0, 2]


def test_indexer_by_hand():
    """Width 1, two heads: score = 2 relu(q0 k) + 1 relu(q1 k), times the key's scale."""
    q = np.array([1.0, -1.0]).reshape(1, 2, 1, 1).astype(np.float32)
    k = np.array([[[1.0], [-3.0], [2.0], [0.5]]], np.float32)
    weights, scale = np.array([2.0, 1.0], np.float32).reshape(1, 2, 1), np.array([[1.0, 1.0, 1.0, 10.0]], np.float32)
    run = KERNEL["indexer_scores"]
    assert run(q, k, weights, causal=False).tolist() == [[[2.0, 3.0, 4.0, 1.0]]]
    assert run(q, k, weights, causal=False, k_scale=scale).tolist() == [[[2.0, 3.0, 4.0, 10.0]]]
    assert run(q, k, weights, causal=False, activation=None).tolist() == [[[1.0, -3.0, 2.0, 0.5]]]
    assert run(q, k, weights, q_start=1).tolist() == [[[2.0, 3.0, -np.inf, -np.inf]]]
    assert run(q, k, weights, q_start=np.array([2]), key_start=np.array([[1]]), key_end=np.array([[9]])).tolist() == [[[-np.inf, 3.0, 4.0, -np.inf]]]
    top = KERNEL["indexer_topk"]
    assert [x.tolist() for x in top(q, k, weights, 2, causal=False)[:2]] == [[[[1, 2]]], [[2]]]
    assert top(q, k, weights, 2, causal=False, return_scores=True)[2].tolist() == [[[3.0, 4.0]]]
    assert top(q, k, weights, 3, q_start=1, return_scores=True)[2].tolist() == [[[2.0, 3.0, -np.inf]]]
    assert top(q, k, weights, 1, causal=False, pool=2)[0].tolist() == [[[1]]]                       # blocks {0, 1}: 3, {2, 3}: 4
    assert top(q, k, weights, 1, q_start=1, pool=2)[0].tolist() == [[[0]]]
    assert top(q, k, weights, 1, causal=False, force_first=1)[0].tolist() == [[[0]]]
    assert top(q, k, weights, 2, causal=False, force_last=1)[0].tolist() == [[[2, 3]]]
    assert top(q, k, weights, 3, causal=False, force_first=1, force_last=1)[0].tolist() == [[[0, 2, 3]]]
    assert top(q, k, weights, 2, key_start=np.array([[1]]), causal=False, force_first=1)[0].tolist() == [[[1, 2]]]
    k[0, 0] = np.nan
    assert top(q, k, weights, 4, causal=False)[1].tolist() == [[4]]                                  # all of them: no score is computed
    assert [x.tolist() for x in top(q, k, weights, 4, causal=False, return_scores=True)[:2]] == [[[[1, 2, 3, -1]]], [[3]]]
    assert top(q, k, weights, 2, causal=False, force_first=1)[0].tolist() == [[[0, 2]]]


def test_indexer_topk_is_topk_of_scores(rng):
    q, k, w = (rng.standard_normal(s).astype(np.float32) for s in ((2, 3, 9, 8), (2, 40, 8), (2, 3, 9)))
    scores = KERNEL["indexer_scores"](q, k, w, q_start=31)
    for fused, plain_topk in zip(KERNEL["indexer_topk"](q, k, w, 5, q_start=31), KERNEL["topk"](scores, 5)):
        np.testing.assert_array_equal(fused, plain_topk)
    expected = torch.einsum("bths,bht->bts", torch.relu(torch.einsum("bhtd,bsd->bths", *map(torch.tensor, (q, k))).double()), torch.tensor(w).double())
    truth = oracle.indexer_scores(q, k, w, seen=np.isfinite(scores))
    measure = plain.indexer_scores(q, k, w, visible=np.isfinite(scores))
    assert_close("scores", scores, truth, measure, reduction=24)
    assert_close("scores", scores, np.where(np.isfinite(scores), expected.numpy(), -np.inf), measure, reduction=24)


def test_latent_by_torch(rng):
    latent, w_uk, w_uv, rope = (torch.tensor(rng.standard_normal(s)) for s in ((2, 7, 140), (3, 140, 6), (3, 140, 5), (2, 7, 4)))
    scale = torch.tensor(rng.random((2, 7, 2)))
    k, v = KERNEL["latent_decompress"](*numpys(latent, w_uk, w_uv), k_rope=rope.numpy(), latent_scale=scale.numpy())
    c = latent * scale.repeat_interleave(128, -1)[..., :140]
    same(k[..., :6], torch.einsum("bsr,hrd->bhsd", c, w_uk)), same(v, torch.einsum("bsr,hrd->bhsd", c, w_uv))
    assert (k[..., 6:] == rope.numpy()[:, None]).all()
    x, tail = rng.standard_normal((2, 3, 4, 6)), rng.standard_normal((2, 3, 4, 2))
    got = KERNEL["grouped_matmul"](x, w_uk.numpy(), tail=tail)
    same(got[..., :140], torch.einsum("bhtn,hmn->bhtm", torch.tensor(x), w_uk))
    assert (got[..., 140:] == tail).all()
    same(KERNEL["grouped_matmul"](x, w_uk.numpy().swapaxes(1, 2).copy().swapaxes(1, 2)), torch.einsum("bhtn,hmn->bhtm", torch.tensor(x), w_uk))


def test_absorbed_is_decompressed(rng):
    """The two modes of the latent are one formula: (q w_uk^T) . c = q . (c w_uk)."""
    B, H, T, S, R, Dn, P, Dv = 1, 3, 4, 9, 16, 6, 4, 5
    q_nope, q_rope, latent, rope = (rng.standard_normal(s) for s in ((B, H, T, Dn), (B, H, T, P), (B, S, R), (B, S, P)))
    w_uk, w_uv = rng.standard_normal((H, R, Dn)), rng.standard_normal((H, R, Dv))
    causal = oracle.visible(B, T, S, rule=lambda p, s: s <= p)
    truth, _ = oracle.latent_attention(q_nope, q_rope, latent, rope, w_uk, w_uv, causal, scale=0.3)
    for mode in ("absorbed", "decompressed"):
        same(plain.latent_attention(q_nope, q_rope, latent, rope, w_uk, w_uv, causal, mode=mode, scale=0.3)[0], truth.astype(np.float64), mode)


@pytest.mark.parametrize("sinks", [None, "finite", "infinite"])
def test_merge_is_attention_over_the_union(sinks, rng):
    q, k, v = numpys(*tensors(rng))
    whole = MASKS["one row empty"](19, 33, rng)
    values = {None: None, "finite": rng.standard_normal(4), "infinite": np.array([np.inf, -np.inf, 1e4, 3e38])}[sinks]
    share = rng.integers(0, 3, (19, 33))
    parts = [KERNEL["block_attention"](q, k, v, build((whole & (share == n))[None], 14, 16, 32), scale=0.3) for n in range(3)]
    out, lse = KERNEL["merge_attention"]([o for o, _ in parts], [e for _, e in parts], sink_logits=values)
    expected, expected_lse = KERNEL["block_attention"](q, k, v, build(whole[None], 14, 16, 32), scale=0.3, sink_logits=values)
    same(out, expected), same(lse, expected_lse)
    assert np.isfinite(out).all() and (lse[:, :, 4] == -np.inf).all()


def test_layout_lists_by_hand():
    made = KERNEL["layout"](np.array([[[1, 0, 1], [0, 0, 0]]], bool))
    assert made["offsets"].tolist() == [0, 2, 2, 2, 2] and made["cols"][:2].tolist() == [0, 2] and (made["kinds"] == -1).all()
    assert made["by_key_offsets"].tolist() == [0, 1, 1, 1, 1, 2, 2] and made["by_key_rows"][:2].tolist() == [0, 0]
    assert len(made["cols"]) == 7
