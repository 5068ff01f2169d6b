"""Attention over selections and its backward where the best systems break, or conventions collide, on every backend."""
import numpy as np
import oracle
import pytest
from drivers import EVERY, LARGE, arrays, numpy_dtype
from judge import attention, gradients, normal
from numeric import assert_close, plain

import sparsetile as st

every, large = pytest.mark.parametrize("backend", EVERY), pytest.mark.parametrize("backend", LARGE)
INT_MIN, INT_MAX = -2 ** 31, 2 ** 31 - 1


def qkv(rng, B=1, Hq=2, Hk=1, T=6, S=50, D=32, Dv=32, dtype=np.float16):
    return normal(rng, (B, Hq, T, D), dtype), normal(rng, (B, Hk, S, D), dtype), normal(rng, (B, Hk, S, Dv), dtype)


def check(on, q, k, v, indices, rng, gradient=False, G=1, **options):
    """Entries [T,K] or [B,G,T,K]."""
    indices = np.asarray(indices, np.int32)
    indices = np.broadcast_to(indices, (q.shape[0], G, *indices.shape)).copy() if indices.ndim == 2 else indices
    how = {name: options.pop(name) for name in ("lengths", "granularity", "causal") if name in options}
    where = {name: options[name] for name in ("kv_length", "q_start") if name in options}
    count = oracle.selection_count(indices, k.shape[2], q.shape[1], **how, **where)
    if gradient:
        pytest.importorskip("torch")
        lengths = how.pop("lengths", None)
        return gradients(on, q, k, v, st.Selection(on.tensor(indices), lengths=None if lengths is None else on.tensor(lengths), **how), count, rng, **options)
    return attention(on, q, k, v, on.selection(indices, **how), count, **options)


@every
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("granularity", [1, 3, 16])
def test_entries_that_mean_nothing(on, backend, granularity, gradient, rng):
    q, k, v = qkv(rng)
    blocks = -(-50 // granularity)
    bad = [-1, INT_MIN, -123456, blocks, blocks + 1, INT_MAX, INT_MAX - 1, INT_MAX // granularity, INT_MAX // granularity + 1, 2 ** 30, -granularity]
    rows = np.full((6, 40), -1)
    rows[0, :11] = bad
    rows[1] = rng.choice(bad, 40)
    rows[1, 17] = 0                                                                  # padding in the middle
    rows[2, -1] = blocks - 1                                                         # all holes, then one entry
    rows[3] = bad[5]                                                                 # a row with none
    rows[4, ::2] = np.arange(20) % blocks
    rows[5, 33:] = bad[:7]
    check(on, q, k, v, rows, rng, gradient, granularity=granularity)


@every
def test_many_tiles_of_holes_before_the_first_entry(on, backend, rng):
    q, k, v = qkv(rng, T=3, D=64, Dv=64)
    rows = np.full((3, 700), -1)
    rows[0, 699], rows[1, 350:353], rows[2, 128] = 7, [1, 49, 3], 20
    check(on, q, k, v, rows, rng)
    check(on, q, k, v, rows, rng, gradient=True)


@every
def test_lengths_of_every_kind(on, backend, rng):
    q, k, v = qkv(rng, T=7)
    rows = np.stack([rng.permutation(50)[:20] for _ in range(7)])
    lengths = np.array([0, -1, INT_MIN, 20, 21, INT_MAX, 3], np.int32)[None, None]
    check(on, q, k, v, rows, rng, lengths=lengths)
    check(on, q, k, v, rows, rng, gradient=True, lengths=lengths)


@every
@pytest.mark.parametrize("what", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("way", ["selection", "blocks", "pattern", "window", "kv_length"])
def test_keys_that_nobody_sees_do_not_leak(on, backend, way, what, rng):
    """0 * NaN is NaN: such keys may not even be multiplied by 0."""
    T = 10 if way in ("selection", "blocks") else 40
    q, k, v = qkv(rng, Hq=8, Hk=2, T=T, S=70)
    options, g = {}, 1
    if way in ("selection", "blocks"):
        g = 1 if way == "selection" else 8
        used = np.array([0, 3, 4, 8]) if g > 1 else np.array([1, 2, 30, 31, 33, 69])
        indices = rng.choice(np.append(used, -1), (1, 1, T, 9)).astype(np.int32)
        count, rule = oracle.selection_count(indices, 70, 8, granularity=g), lambda put: st.Selection(put(indices), granularity=g)
    elif way == "kv_length":
        options = {"kv_length": np.array([37], np.int32)}
        count, rule = oracle.visible(1, 40, 70, rule=lambda p, s: s <= p, **options), lambda put: st.Causal()
    elif way == "window":
        options = {"q_start": 25}
        count, rule = oracle.visible(1, 40, 70, rule=lambda p, s: (s <= p) & (s >= p - 5), **options), lambda put: st.Window(5)
    else:
        mask = np.zeros((3, 5), bool)
        mask[[0, 1, 2, 2], [0, 3, 3, 1]] = True
        options = {"q_start": 0}
        count, rule = oracle.visible(1, 40, 70, rule=lambda p, s: mask[np.minimum(p // 16, 2), np.minimum(s // 16, 4)], **options), lambda put: st.Blocks(mask, 16, 16)
    unseen = ~(np.broadcast_to(count, (1, 8, T, 70)) > 0).reshape(1, 2, 4, T, 70).any(axis=(2, 3))
    assert unseen.any()

    def poison(x):
        x = x.copy()
        x[unseen] = float(what)
        return x
    attention(on, q, poison(k), poison(v), rule(on.put), count, **options)
    pytest.importorskip("torch")
    gradients(on, q, k, v, rule(on.tensor), count, rng, poison=poison, **options)


@every
def test_empty_rows_have_no_gradient_and_no_nan(on, backend, rng):
    q, k, v = qkv(rng, T=30, S=20)                                                   # positions -10 .. 19: the first ten see nothing
    count = oracle.visible(1, 30, 20, rule=lambda p, s: s <= p)
    out, lse = attention(on, q, k, v, st.Causal(), count, sink_logits=np.array([0.5, np.inf], np.float32))
    assert (out[:, :, :10] == 0).all() and np.isneginf(lse[:, :, :10]).all()
    for sinks in (None, np.array([0.5, -2], np.float32)):
        dq, *rest = gradients(on, q, k, v, st.Causal(), count, rng, sink_logits=sinks, with_lse=True)
        assert (dq[:, :, :10] == 0).all() and all(np.isfinite(g.astype(np.float32)).all() for g in rest if g is not None)


@pytest.mark.parametrize("backend", ["numba", "reference"])
@pytest.mark.parametrize("rule", ["pattern", "selection"])
def test_what_stands_in_an_empty_row_stays_there(on, backend, rule, rng):
    """NaN in the queries and in the gradients of rows without keys, beside a sink and an LSE that is asked for: it meets no product."""
    pytest.importorskip("torch")
    q, k, v = qkv(rng, T=20)
    q[:, :, :7] = np.nan
    entries = np.where(np.arange(20)[:, None] < 7, -1, rng.integers(0, 50, (20, 9)))[None, None].astype(np.int32)
    chosen = (st.Causal(), dict(q_start=-7)) if rule == "pattern" else (st.Selection(on.tensor(entries)), {})
    x, sink = [on.tensor(a, True) for a in (q, k, v)], on.tensor(np.array([0.5, -2.0], np.float32), True)
    try:
        out, lse = st.sparse_attention(*x, chosen[0], sink_logits=sink, return_lse=True, backend=backend, **chosen[1])
    except st.Unsupported as refusal:
        pytest.skip(f"{backend}: {refusal}")
    dout, dlse = normal(rng, q.shape[:3] + v.shape[3:], np.float16), normal(rng, q.shape[:3], np.float32)
    dout[:, :, :7], dlse[:, :, :7] = np.nan, np.nan
    import torch
    torch.autograd.backward([out, lse], [on.tensor(dout), on.tensor(dlse)])
    out, lse, dq, *others = arrays(out, lse, *(a.grad for a in (*x, sink)))
    assert (out[:, :, :7] == 0).all() and np.isneginf(lse[:, :, :7]).all() and (dq[:, :, :7] == 0).all()
    assert all(np.isfinite(np.asarray(a, np.float32)).all() for a in (out, lse[:, :, 7:], dq, *others))


@every
def test_no_query_sees_any_key(on, backend, rng):
    q, k, v = qkv(rng, T=5)
    count = np.zeros((1, 2, 5, 50), int)
    nothing = np.full((5, 7), -1)
    check(on, q, k, v, nothing, rng)
    attention(on, q, k, v, st.Causal(), count, q_start=-100)
    attention(on, q, k, v, st.Full(), count, kv_length=np.array([0], np.int32))
    attention(on, q, k, v, st.Full(), count, kv_length=np.array([INT_MIN], np.int32))
    pytest.importorskip("torch")
    for rule, options in ((st.Selection(on.tensor(np.full((1, 1, 5, 7), -1, np.int32))), {}), (st.Causal(), {"q_start": -100})):
        assert all((np.asarray(g, np.float32) == 0).all() for g in gradients(on, q, k, v, rule, count, rng, with_lse=True, **options) if g is not None)


SINKS = [1e4, 3e38, -3e38, np.inf, -np.inf, 0.0, 80.0, -1e4]


@every
@pytest.mark.parametrize("rule", ["pattern", "selection"])
def test_sinks_of_every_size(on, backend, rule, rng):
    q, k, v = qkv(rng, Hq=8, Hk=8, T=20)
    sinks = np.array(SINKS, np.float32)
    if rule == "pattern":
        out, _ = attention(on, q, k, v, st.Causal(), oracle.visible(1, 20, 50, rule=lambda p, s: s <= p), sink_logits=sinks)
    else:
        out, _ = check(on, q, k, v, rng.integers(-1, 50, (20, 9)), rng, sink_logits=sinks)
    assert (out[:, [0, 1, 3]] == 0).all()


@every
@pytest.mark.parametrize("rule", ["pattern", "selection"])
def test_gradients_with_sinks_of_every_size(on, backend, rule, rng):
    q, k, v = qkv(rng, Hq=8, Hk=8, T=8)
    sinks = np.array(SINKS, np.float32)
    if rule == "pattern":
        gradients(on, q, k, v, st.Causal(), oracle.visible(1, 8, 50, rule=lambda p, s: s <= p), rng, sink_logits=sinks)
    else:
        check(on, q, k, v, rng.integers(-1, 50, (8, 9)), rng, gradient=True, sink_logits=sinks)


@every
def test_lse_and_sink_gradients_together(on, backend, rng):
    """The lse does not hold the sink: its gradient goes through the keys' own softmax, whatever share of the output the sink took."""
    q, k, v = qkv(rng, Hq=4, Hk=2, T=20, dtype=np.float32)
    gradients(on, q, k, v, st.Causal(), oracle.visible(1, 20, 50, rule=lambda p, s: s <= p), rng, sink_logits=np.array([3.0, -np.inf, 12.0, -2.0], np.float32), with_lse=True)


@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_an_lse_far_below_the_sink_has_no_gradient(on, backend, rng):
    """Where the sink holds all but exp(-80) of a row, every P is 0 in float32: nothing is left to carry the gradient, and 0 times anything stays 0."""
    q, k, v = qkv(rng, Hq=8, Hk=8, T=8, dtype=np.float32)
    pytest.importorskip("torch")
    for rule in (st.Causal(), st.Selection(on.tensor(rng.integers(-1, 50, (1, 1, 8, 9)).astype(np.int32)))):
        x = [on.tensor(a, True) for a in (q, k, v)]
        out, lse = st.sparse_attention(*x, rule, sink_logits=on.tensor(np.array(SINKS, np.float32)), return_lse=True, backend=backend)
        lse.nan_to_num(0, 0, 0).sum().backward()
        grads = arrays(*(a.grad for a in x))
        assert all(np.isfinite(g).all() for g in grads) and (grads[0][:, [0, 1, 3]] == 0).all() and (grads[0][:, [2, 4, 5, 7]] != 0).any((0, 2, 3)).all()


@every
def test_merging_two_empty_halves(on, backend, rng):
    outs, lses = [np.zeros((1, 2, 5, 32), np.float16) for _ in range(2)], [np.full((1, 2, 5), -np.inf, np.float32) for _ in range(2)]
    for sinks in (None, np.array([1.0, -np.inf], np.float32), np.array([np.inf, 3e38], np.float32)):
        out, lse = arrays(*on.merge_attention([on.put(o) for o in outs], [on.put(e) for e in lses], sink_logits=sinks))
        assert (out == 0).all() and np.isneginf(lse).all()
    outs[0][...] = np.nan                                                            # what an empty half holds is not read
    lses[1][..., :3] = 2.0
    outs[1][..., :3, :] = normal(rng, (1, 2, 3, 32), np.float16)
    out, lse = arrays(*on.merge_attention([on.put(o) for o in outs], [on.put(e) for e in lses]))
    np.testing.assert_array_equal(out, outs[1])
    np.testing.assert_array_equal(lse, lses[1])


@every
def test_merged_halves_are_the_whole(on, backend, rng):
    q, k, v = qkv(rng, T=30, S=60, dtype=np.float32)
    sinks = np.array([0.5, -1], np.float32)
    left, right = (on.sparse_attention(q, k, v, rule, return_lse=True) for rule in (st.Causal() & ~st.Window(10, None), st.Window(10)))
    out, lse = arrays(*on.merge_attention([left[0], right[0]], [left[1], right[1]], sink_logits=sinks))
    count = oracle.visible(1, 30, 60, rule=lambda p, s: s <= p)
    how = dict(scale=32 ** -0.5, sink_logits=sinks)
    for name, got, truth, measure in zip(("out", "lse"), (out, lse), oracle.attention(q, k, v, count, **how), plain.attention(q, k, v, count, **how)):
        assert_close(name, got, truth, measure, reduction=60 + 32)


@every
def test_a_key_given_twice_counts_twice(on, backend, rng):
    q, k, v = qkv(rng, T=4)
    rows = np.array([[3, 3, 7, 7, 7, 9], [0, 0, 0, 0, 0, 0], [1, -1, 1, -1, 49, 49], [5, 6, 7, 8, 9, 10]])
    check(on, q, k, v, rows, rng)
    check(on, q, k, v, rows, rng, gradient=True)
    check(on, q, k, v, rows % 6, rng, granularity=9, causal=True, q_start=30)


# Head counts, groups and widths that no table of instantiations holds all of, each once.
HEADS = [(1, 1), (2, 1), (3, 1), (5, 5), (7, 1), (8, 4), (12, 1), (16, 1), (17, 17)]
MANY_HEADS = [(24, 2), (31, 31), (33, 11), (40, 20), (96, 8), (128, 8), (128, 128)]
WIDTHS = [(1, 1), (31, 31), (72, 64), (96, 96), (100, 7), (192, 128), (256, 256), (320, 33), (576, 512), (64, 576)]


@every
@pytest.mark.parametrize("Hq, Hk", HEADS)
def test_head_counts(on, backend, Hq, Hk, rng):
    q, k, v = qkv(rng, Hq=Hq, Hk=Hk, T=2, S=20, D=16, Dv=16)
    attention(on, q, k, v, st.Window(6), oracle.visible(1, 2, 20, rule=lambda p, s: (s <= p) & (s >= p - 6)))
    check(on, q, k, v, rng.integers(-2, 22, (2, 5)), rng)


@large
@pytest.mark.parametrize("Hq, Hk", MANY_HEADS)
def test_many_heads(on, backend, Hq, Hk, rng):
    q, k, v = qkv(rng, Hq=Hq, Hk=Hk, T=3, S=40, D=16, Dv=16)
    attention(on, q, k, v, st.Window(6), oracle.visible(1, 3, 40, rule=lambda p, s: (s <= p) & (s >= p - 6)))
    check(on, q, k, v, rng.integers(-2, 42, (3, 5)), rng)
    check(on, q, k, v, rng.integers(-2, 42, (3, 5)), rng, gradient=True)


@large
@pytest.mark.parametrize("D, Dv", WIDTHS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_widths(on, backend, D, Dv, dtype, rng):
    q, k, v = qkv(rng, Hq=4, Hk=2, T=30, S=40, D=D, Dv=Dv, dtype=numpy_dtype(dtype))
    count = oracle.visible(1, 30, 40, rule=lambda p, s: s <= p)
    attention(on, q, k, v, st.Causal(), count)
    check(on, q, k, v, rng.integers(-2, 42, (30, 11)), rng)


@large
@pytest.mark.parametrize("D, Dv", WIDTHS)
@pytest.mark.parametrize("rule", ["pattern", "selection"])
def test_widths_backward(on, backend, D, Dv, rule, rng):
    q, k, v = qkv(rng, Hq=4, Hk=2, T=30, S=40, D=D, Dv=Dv, dtype=numpy_dtype("bfloat16"))
    if rule == "pattern":
        gradients(on, q, k, v, st.Causal(), oracle.visible(1, 30, 40, rule=lambda p, s: s <= p), rng)
    else:
        check(on, q, k, v, rng.integers(-2, 42, (30, 11)), rng, gradient=True)


@large
@pytest.mark.parametrize("rule", ["pattern", "selection"])
def test_more_queries_than_a_grid_axis_holds(on, backend, rule, rng):
    T, S = 70_000, 24
    q, k, v = qkv(rng, Hq=1, T=T, S=S, D=8, Dv=8)
    if rule == "pattern":
        got, = arrays(on.sparse_attention(q, k, v, st.Full()))
        count = np.ones((1, 1, T, S), int)
    else:
        indices = rng.integers(-1, S, (1, 1, T, 3)).astype(np.int32)
        got, = arrays(on.sparse_attention(q, k, v, on.selection(indices)))
        count = np.zeros((1, 1, T, S + 1), int)
        np.add.at(count[0, 0], (np.arange(T)[:, None], indices[0, 0]), 1)
        count = count[..., :S]
    how = dict(scale=8 ** -0.5)
    assert_close("out", got, oracle.attention(q, k, v, count, **how)[0], plain.attention(q, k, v, count, **how)[0], reduction=S + 8)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cupy"])
def test_offsets_past_two_to_the_31(on, backend, rng):
    """3.8 million keys of width 576: the last ones lie past 2**31 elements."""
    torch = pytest.importorskip("torch")
    S, D, Dv = 3_800_000, 576, 512
    k = torch.empty((1, 1, S, D), dtype=torch.bfloat16, device="cuda").normal_(generator=torch.Generator("cuda").manual_seed(1))
    rows = np.concatenate([rng.integers(S - 5000, S, (4, 30)), rng.integers(0, S, (4, 10))], axis=1).astype(np.int32)
    q = normal(rng, (1, 16, 4, D), numpy_dtype("bfloat16"))
    selection = st.Selection(torch.from_numpy(rows)[None, None].cuda())
    out, = arrays(st.sparse_attention(on.put(q), k, None, selection, value_width=Dv, backend=backend))
    small, = arrays(k[0, 0][torch.from_numpy(rows.reshape(-1)).long().cuda()][None, None])
    count = np.zeros((1, 1, 4, rows.size), int)
    for t in range(4):
        count[0, 0, t, t * 40:t * 40 + 40] = 1
    how = dict(scale=D ** -0.5)
    assert_close("out", out, oracle.attention(q, small, small[..., :Dv], count, **how)[0], plain.attention(q, small, small[..., :Dv], count, **how)[0], reduction=40 + D)


@pytest.mark.parametrize("way", ["selection", "window"])
@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_offsets_past_two_to_the_31_on_the_cpu(on, backend, way, rng, tmp_path):
    """The same in a file of holes: only the pages that are touched exist."""
    S, D, Dv, seen = 3_800_000, 576, 512, 40
    k = np.memmap(tmp_path / "keys", np.float16, "w+", shape=(1, 1, S, D))
    rows = np.sort(np.append(rng.choice(S, seen // 2, replace=False), np.arange(S - seen // 2, S))) if way == "selection" else np.arange(S - seen, S)
    small, q = normal(rng, (1, 1, seen, D), np.float16), normal(rng, (1, 16, 1, D), np.float16)
    k[0, 0, rows] = small[0, 0]
    rule = st.Selection(rows.astype(np.int32)[None, None, None]) if way == "selection" else st.Window(seen - 1)
    out = on.sparse_attention(q, k, None, rule, value_width=Dv)
    how = dict(scale=D ** -0.5)
    assert_close("out", out, oracle.attention(q, small, small[..., :Dv], 1, **how)[0], plain.attention(q, small, small[..., :Dv], 1, **how)[0], reduction=seen + D)


@every
def test_the_absorbed_scale_is_that_of_the_rebuilt_width(on, backend, rng):
    """192 = 128 + 64 for DeepSeek, never 576: here 24 against 40."""
    B, H, T, S, R, Dn, P, Dv = 1, 2, 3, 20, 32, 16, 8, 16
    x = [normal(rng, s, np.float32) for s in ((B, H, T, Dn), (B, H, T, P), (B, S, R), (B, S, P), (H, R, Dn), (H, R, Dv))]
    x[4], x[5] = x[4] * R ** -0.5, x[5] * R ** -0.5
    count = oracle.visible(B, T, S, rule=lambda p, s: s <= p)
    truth, _ = oracle.latent_attention(*x, count, scale=24 ** -0.5)
    for mode in ("absorbed", "decompressed"):
        got, = arrays(on.latent_attention(*x, st.Causal(), mode=mode))
        assert_close(mode, got, truth, plain.latent_attention(*x, count, mode=mode, scale=24 ** -0.5)[0], reduction=R + S)


@every
def test_the_lse_is_natural_and_leaves_the_sink_out(on, backend):
    """All scores 0: the lse is log(number of keys), whatever the sink."""
    q, k, v = (np.zeros((1, 1, 8, 16), np.float16) for _ in range(3))
    truth = np.log(np.arange(1, 9.0))[None, None]
    rows = np.where(np.tri(8, dtype=bool), np.arange(8), -1).astype(np.int32)[None, None]
    for rule in (st.Causal(), on.selection(rows)):
        _, lse = arrays(*on.sparse_attention(q, k, v, rule, sink_logits=np.array([5.0], np.float32), return_lse=True))
        assert_close("lse", lse, truth, truth.astype(np.float32), reduction=8)


@every
def test_new_lengths_need_no_new_metadata(on, backend, rng):
    """The same shapes with other lengths, one call after the other: nothing of the first may be remembered."""
    q, k, v = qkv(rng, B=2, T=1, S=90)
    for lengths in ([90, 1], [5, 70], [0, 64], [33, 32], [90, 90]):
        lengths = np.array(lengths, np.int32)
        attention(on, q, k, v, st.Window(20) | st.Sink(2), oracle.visible(2, 1, 90, kv_length=lengths, rule=lambda p, s: (s <= p) & ((s >= p - 20) | (s < 2)) | (s < 2)), kv_length=lengths)


@every
def test_decode_at_every_offset(on, backend, rng):
    q, k, v = qkv(rng, T=1, S=70)
    for start in (0, 1, 15, 16, 31, 32, 33, 63, 64, 65, 69, 70, 200):
        attention(on, q, k, v, st.Window(8), oracle.visible(1, 1, 70, q_start=start, rule=lambda p, s: (s <= p) & (s >= p - 8)), q_start=start)


@every
@pytest.mark.parametrize("window", [0, 3, 69, 70, 1000])
@pytest.mark.parametrize("T, S", [(70, 70), (20, 70), (70, 33), (5, 70)])
def test_windows_and_ragged_sizes(on, backend, window, T, S, rng):
    q, k, v = qkv(rng, T=T, S=S)
    attention(on, q, k, v, st.Window(window), oracle.visible(1, T, S, rule=lambda p, s: (s <= p) & (s >= p - window)))


@every
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_scores_of_every_size(on, backend, dtype, rng):
    """A softmax of huge scores is one key; of equal ones the mean: the policy holds for every finite input."""
    B = 1 if on.interpreted else 8                                                   # where scores are huge few rows have any error: many rows
    q, k, v = qkv(rng, B=B, Hq=16, T=20, S=60, dtype=numpy_dtype(dtype))
    count = oracle.visible(B, 20, 60, rule=lambda p, s: s <= p)
    for scale in (0.0, 1e-4, 5.0, 300.0, -1.0):
        attention(on, q, k, v, st.Causal(), count, scale=scale, name=f"scale {scale}: ")
        check(on, q, k, v, rng.integers(-1, 60, (20, 9)), rng, scale=scale)


@every
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("scale", [0.0, 5.0, -30.0])
def test_gradients_of_scores_of_every_size(on, backend, dtype, scale, rng):
    """P = exp(score - lse) of scores rounded in the backward as in the forward: where one key is all of a row it is 1."""
    pytest.importorskip("torch")
    q, k, v = qkv(rng, Hq=8, T=20, S=60, dtype=numpy_dtype(dtype))
    gradients(on, q, k, v, st.Causal(), oracle.visible(1, 20, 60, rule=lambda p, s: s <= p), rng, scale=scale)


@every
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("scale", [5.0, -30.0])
def test_gradients_of_an_only_key_beside_holes(on, backend, scale, dtype, rng):
    """Its P is 1 whatever its score. That may lie hundreds below a hole's, which is 0: nothing of the hole may be multiplied, not even by 0."""
    pytest.importorskip("torch")
    q, k, v = qkv(rng, Hq=8, T=20, S=60, dtype=numpy_dtype(dtype))
    rows = rng.integers(-1, 60, (20, 9))
    rows[::2, 1:] = -1
    check(on, q, k, v, rows, rng, gradient=True, scale=scale)
    check(on, q, k, v, rows // 4, rng, gradient=True, scale=scale, granularity=4, causal=True, q_start=45)


@every
def test_values_of_every_size(on, backend, rng):
    q, k, v = qkv(rng, T=20, S=60, dtype=numpy_dtype("bfloat16"))
    count = oracle.visible(1, 20, 60, rule=lambda p, s: s <= p)
    for size in (1e-30, 1e30):
        attention(on, q, k, (v.astype(np.float32) * size).astype(v.dtype), st.Causal(), count, name=f"values {size}: ")
    wide = (k.astype(np.float32) * 3e4).astype(k.dtype)                              # past float16's range where a bfloat16 op must not be
    attention(on, q, wide, v, st.Causal(), count, scale=1e-5, name="wide keys: ")


@every
@pytest.mark.parametrize("granularity", [1, 4])
def test_causal_inside_a_block(on, backend, granularity, rng):
    q, k, v = qkv(rng, Hq=4, Hk=2, T=20, S=40)
    rows = np.tile(np.arange(-(-40 // granularity)), (20, 1))
    check(on, q, k, v, rows, rng, granularity=granularity, causal=True)
    check(on, q, k, v, rows, rng, gradient=True, granularity=granularity, causal=True)
    check(on, q, k, v, rows, rng, granularity=granularity, causal=True, kv_length=np.array([25], np.int32))


@every
@pytest.mark.parametrize("granularity", [1, 4])
@pytest.mark.parametrize("start", [2 ** 31 - 3, -2 ** 31, -2, 2 ** 31 - 6], ids=str)
def test_positions_at_the_ends_of_int32(on, backend, start, granularity, rng):
    """Query t stands at start + t, past 2^31 too: it sees all keys, or none; given as a number and on the device."""
    q, k, v = qkv(rng, B=2, Hq=4, Hk=2, T=5, S=40)
    rows = rng.integers(-1, -(-40 // granularity), (5, 7))
    for q_start in (start, np.array([start, 3], np.int32)):
        check(on, q, k, v, rows, rng, granularity=granularity, causal=True, q_start=q_start)


@every
def test_gradients_through_expanded_inputs(on, backend, rng):
    torch = pytest.importorskip("torch")
    base = [normal(rng, (1, 1, 30, 32), np.float32) for _ in range(3)]
    leaves = [on.tensor(x, True) for x in base]
    q, k, v = (x.expand(2, 4, 30, 32) for x in leaves)
    try:
        out = st.sparse_attention(q, k, v, st.Causal(), backend=on.backend)
        dout = normal(rng, (2, 4, 30, 32), np.float32)
        out.backward(on.tensor(dout))
    except st.Unsupported as refusal:
        pytest.skip(f"{backend}: {refusal}")
    full = [np.broadcast_to(x, (2, 4, 30, 32)).copy() for x in base]
    count, how = oracle.visible(2, 30, 30, rule=lambda p, s: s <= p), dict(scale=32 ** -0.5)
    for leaf, truth, measure in zip(leaves, oracle.attention_gradients(*full, count, dout, **how), plain.attention_gradients(*full, count, dout, **how)):
        assert_close("gradient", arrays(leaf.grad)[0], truth.sum((0, 1), keepdims=True), measure.sum((0, 1), keepdims=True), reduction=30 * 8 + 64)
    assert torch.isfinite(leaves[0].grad).all()


@every
@pytest.mark.parametrize("deterministic", [True, False])
def test_both_orders_of_additions(on, backend, deterministic, rng):
    pytest.importorskip("torch")
    q, k, v = qkv(rng, Hq=4, T=50, dtype=numpy_dtype("bfloat16"), D=64, Dv=64)
    gradients(on, q, k, v, st.Causal(), oracle.visible(1, 50, 50, rule=lambda p, s: s <= p), rng, deterministic=deterministic)
