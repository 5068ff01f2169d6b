"""DeepSeek sparse attention against the paper's equations written out (naive_dsa.py): what is chosen, what comes out, both phases of training, caches, conventions."""

import judge
import ml_dtypes
import naive_dsa as naive
import numpy as np
import oracle
import pytest
from drivers import EVERY, LARGE, arrays
from judge import normal
from numeric import assert_close, assert_same_bits, plain

import sparsetile as st

every, cpu = pytest.mark.parametrize("backend", EVERY), pytest.mark.parametrize("backend", ["reference", "numba"])
HI, DI = 3, 8


def made(rng, B=1, Hq=4, Hk=2, T=6, S=21, D=13, Dv=9, kind=np.float32):
    """q, k, v, and the indexer's arrays: small integers, so that its scores are exact and often equal."""
    whole = lambda *shape: rng.integers(-3, 4, shape).astype(kind)  # noqa: E731
    q, k, v = normal(rng, (B, Hq, T, D), kind), normal(rng, (B, Hk, S, D), kind), normal(rng, (B, Hk, S, Dv), kind)
    return (q, k, v), dict(index_q=whole(B, HI, T, DI), index_k=whole(B, S, DI), index_weights=whole(B, HI, T))


def lengths(**options):
    return {name: np.asarray(x, np.int32) if isinstance(x, tuple) else x for name, x in options.items()}


# ------------------------------------------------------------------------------------------------------------------- attention
CASES = {"ragged": ({}, {}), "T = S": (dict(T=19, S=19), {}), "one query": (dict(T=1, Hq=5, Hk=1, S=40), {}), "many heads": (dict(Hq=17, Hk=1), {}),
         "lengths": (dict(B=2, T=4), dict(kv_length=(21, 9))), "lengths, an empty one": (dict(B=2, T=3), dict(kv_length=(0, 15))), "start": ({}, dict(q_start=3)),
         "before the start": ({}, dict(q_start=-2)), "past the keys": (dict(T=3), dict(q_start=25)), "lengths and starts": (dict(B=2, T=3), dict(kv_length=(12, 21), q_start=(11, 4)))}


@pytest.mark.parametrize("backend", LARGE)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_paper(on, backend, case, rng):
    """Rows with more keys than top_k see the best of them, others all: dense attention, in the same call."""
    sizes, options = CASES[case]
    (q, k, v), index = made(rng, **sizes)
    options, (B, _, T, _), S = lengths(**options), q.shape, k.shape[2]
    seen = naive.visible(T, S, B=B, **options)
    kept = naive.chosen(*index.values(), seen, 7)
    out, lse, chosen = on.dsa_attention(q, k, v, **index, top_k=7, return_lse=True, return_selection=True, **options)
    judge.answer(*arrays(out, lse), q, k, v, kept[:, None])
    found, = arrays(chosen.indices)
    assert found.shape == (B, 1, T, 7) and [[sorted(e for e in row if e >= 0) for row in rows] for rows in found[:, 0].tolist()] == [[np.flatnonzero(row).tolist() for row in rows] for rows in kept]
    assert_same_bits("without its selection", on.dsa_attention(q, k, v, **index, top_k=7, **options), out)


@every
@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_every_backend_over_a_latent(on, backend, kind, rng):
    """The one latent as key and value, as 2D of MLA's absorbed form."""
    (q, k, _), index = made(rng, Hq=5, Hk=1, T=3, S=19, D=16, kind=kind)
    kept = naive.chosen(*index.values(), naive.visible(3, 19), 6)
    out, lse = arrays(*on.dsa_attention(q, k, None, value_width=11, **index, top_k=6, return_lse=True, scale=0.4))
    judge.answer(out, lse, q, k, k[..., :11], kept[:, None], scale=0.4)


@cpu
@pytest.mark.parametrize("top_k", [5, 30])
def test_mla(on, backend, top_k, rng):
    (B, H, T, S, R, P, Dn, Dv), kind = (2, 3, 4, 17, 12, 4, 8, 6), np.float32
    model = [normal(rng, shape, kind) for shape in ((B, H, T, Dn), (B, H, T, P), (B, S, R), (B, S, P), (H, R, Dn), (H, R, Dv))]
    _, index = made(rng, B=B, T=T, S=S)
    kept = naive.chosen(*index.values(), naive.visible(T, S, B=B), top_k)[:, None]
    out, chosen = on.dsa_latent_attention(*model, **index, top_k=top_k, return_selection=True)
    assert (arrays(chosen.lengths)[0][:, 0] == kept[:, 0].sum(-1)).all()
    how = dict(scale=(Dn + P) ** -0.5)
    measure = plain.latent_attention(*model, kept, mode="absorbed" if top_k < S else "decompressed", **how)[0]
    assert_close("out", arrays(out)[0], oracle.latent_attention(*model, kept, **how)[0], measure, reduction=S + R + Dn)


@every
def test_all_keys_are_dense_attention_and_few_are_not(on, backend, rng, monkeypatch):
    """S <= top_k: the same kernel as causal attention, the same bits, and the indexer does not run."""
    from sparsetile.ops import dispatch
    (q, k, v), index = made(rng, T=4, S=9, D=8, Dv=8)
    dense = on.sparse_attention(q, k, v, st.Causal())
    taken, choose = [], dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda op, problem, *more: taken.append(problem.op) or choose(op, problem, *more))
    dispatch.clear_plans()
    assert_same_bits("out", on.dsa_attention(q, k, v, **index, top_k=9), dense)
    assert "indexer_topk" not in taken and "gather_attention" not in taken
    few, = arrays(on.dsa_attention(q, k, v, **index, top_k=3))
    assert np.abs(few - arrays(dense)[0]).max() > 0.01


@cpu
def test_caches(on, backend, rng):
    """A prompt, then tokens one by one, from a PagedLatent and IndexerKeys: what the arrays of their gather() give."""
    torch = pytest.importorskip("torch")
    if backend == "reference":
        pytest.skip("reference: float8 queries are checked against numba's by the indexer's own tests")
    B, R, P, H, kind = 2, 32, 8, 3, torch.float32
    new = lambda *shape: torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(kind)  # noqa: E731
    keys = st.IndexerKeys.empty(new(1), sequences=B, pages=8, width=DI, page_size=8)
    latents = st.PagedLatent.empty(new(1), sequences=B, pages=8, rank=R, rotary=P, page_size=8)
    w_uk, w_uv = new(H, R, 16), new(H, R, 12)
    for n in (19, 1, 1):
        keys.append(new(B, n, DI)), latents.append(new(B, n, R), new(B, n, P))
        index = dict(index_q=new(B, HI, n, DI).to(torch.float8_e4m3fn), index_weights=new(B, HI, n))
        q = new(B, H, n, 16), new(B, H, n, P)
        out, chosen = st.dsa_latent_attention(*q, latents, None, w_uk, w_uv, index_k=keys, **index, top_k=6, return_selection=True, backend=backend)
        c, rope = latents.gather()
        whole, scale = keys.gather()
        again, same = st.dsa_latent_attention(*q, c, rope, w_uk, w_uv, index_k=whole, index_scale=scale, **index, top_k=6, return_selection=True, backend=backend)
        assert_same_bits("choice", chosen.indices, same.indices), assert_same_bits("out", out, again)
    shorter = torch.tensor([21, 9], dtype=torch.int32)
    q, index = (new(B, H, 1, 16), new(B, H, 1, P)), dict(index_q=new(B, HI, 1, DI).to(torch.float8_e4m3fn), index_weights=new(B, HI, 1))
    out = st.dsa_latent_attention(*q, latents, None, w_uk, w_uv, index_k=keys, **index, top_k=6, kv_length=shorter, backend=backend)
    assert_same_bits("shorter", out, st.dsa_latent_attention(*q, c, rope, w_uk, w_uv, index_k=whole, index_scale=scale, **index, top_k=6, kv_length=shorter, backend=backend))


@every
@pytest.mark.parametrize("cached", [False, True], ids=["arrays", "caches"])
@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_a_window_beside_selected_keys_of_a_second_segment(on, backend, kind, cached, rng):
    """As DeepSeek-V4 attends: the latest tokens as they are and chosen ones of another, compressed array are one softmax with one sink; rows that have neither, or one of both."""
    (B, H, T, R, D), lengths, sinks = (2, 5, 4, 16, 24), (30, 17), np.array([0.5, -1, -np.inf, 3, 0], np.float32)
    q, near, far = normal(rng, (B, H, T, D), kind), normal(rng, (B, 1, 30, D), kind), normal(rng, (B, 1, 9, D), kind)
    start, indices = np.array(lengths) - T, rng.integers(-2, 12, (B, 1, T, 6)).astype(np.int32)
    start[1] = -2                                                                    # two queries before the window's first key
    indices[:, :, 1], indices[1, :, 0, :5], indices[1, :, 0, 5] = -1, (99, -2 ** 31, -1, 9, 2 ** 31 - 1), 4
    rule, chosen, where = st.Window(3), on.selection(indices), dict(q_start=start.astype(np.int32))
    count = np.concatenate([oracle.visible(B, T, 30, rule=lambda p, s: (s <= p) & (s >= p - 3), **where), oracle.selection_count(indices, 9, 1)], -1)
    how = dict(scale=0.3, return_lse=True)
    if cached:
        held = []
        for x in (near, far):
            held.append(st.PagedLatent.empty(on.put(np.zeros(1, kind)), sequences=B, pages=40, page_size=4, rank=R, rotary=D - R))
            held[-1].append(*(on.put(part[:, 0]) for part in (x[..., :R], x[..., R:])), backend=backend)
        parts = on.sparse_attention(q, held[0], None, rule, **how, **where), on.sparse_attention(q, held[1], None, chosen, **how)
    else:
        parts = on.sparse_attention(q, near, None, rule, value_width=R, **how, **where), on.sparse_attention(q, far, None, chosen, value_width=R, **how)
    out, lse = arrays(*on.merge_attention(*zip(*parts), sink_logits=sinks))
    keys = np.concatenate([near, far], 2)
    judge.answer(out, lse, q, keys, keys[..., :R], count, scale=0.3, sink_logits=sinks)
    assert (count[1, 0, 1] == 0).all() and (out[1, :, 1] == 0).all() and np.isneginf(lse[1, :, 1]).all()


@every
def test_gradients_through_a_second_segment(on, backend, rng):
    torch = pytest.importorskip("torch")
    q, near, far, sinks = normal(rng, (1, 3, 6, 16), np.float32), normal(rng, (1, 1, 20, 16), np.float32), normal(rng, (1, 1, 9, 16), np.float32), np.array([0.5, -1, 2], np.float32)
    indices = rng.integers(-2, 12, (1, 1, 6, 4)).astype(np.int32)
    leaves, dout = [on.tensor(x, True) for x in (q, near, far, sinks)], normal(rng, q.shape, np.float32)
    try:
        made = [st.sparse_attention(leaves[0], k, k, rule, return_lse=True, backend=backend) for k, rule in zip(leaves[1:3], (st.Window(3), st.Selection(on.tensor(indices))))]
        got = arrays(*torch.autograd.grad(st.merge_attention(*zip(*made), sink_logits=leaves[3], backend=backend)[0], leaves, on.tensor(dout)))
    except st.Unsupported as refusal:
        pytest.skip(f"{backend}: {refusal}")
    keys = np.concatenate([near, far], 2)
    count = np.concatenate([oracle.visible(1, 6, 20, rule=lambda p, s: (s <= p) & (s >= p - 3)), oracle.selection_count(indices, 9, 1)], -1)
    both = [f.attention_gradients(q, keys, keys, count, dout, scale=0.25, sink_logits=sinks) for f in (oracle, plain)]
    both = [(dq, (dk + dv)[:, :, :20], (dk + dv)[:, :, 20:], dsink) for dq, dk, dv, dsink in both]
    for name, *triple in zip(("dq", "dnear", "dfar", "dsink"), got, *both):
        assert_close(name, *triple, reduction=29 + 6 * 3 + 32)


# -------------------------------------------------------------------------------------------------------------------- training
def measured(q, k, index_q, index_k, index_weights, kept, dkl, *, scale, sink_logits=None):
    """The plain formula: divergence float32 and the indexer's gradients in its arrays' types."""
    f = np.float32
    with np.errstate(all="ignore"):
        x = np.where(kept[:, None], q.astype(f) @ plain.spread(k, q.shape[1]).swapaxes(-1, -2) * f(scale), -np.inf)
        _, lse, total = plain._softmax(x, np.broadcast_to(kept[:, None], x.shape).astype(int), sink_logits)
        p = np.where(kept[:, None], np.exp(x - np.where(np.isfinite(total), total, 0)[..., None]), 0).sum(1)
        p = p / np.maximum(p.sum(-1, keepdims=True), np.finfo(f).tiny)
        scores = plain.indexer_scores(index_q, index_k, index_weights, visible=kept)
        top = np.where(kept.any(-1), scores.max(-1, initial=-np.inf), 0)[..., None]
        e = np.where(kept, np.exp(scores - top), 0)
        share = e / np.maximum(e.sum(-1, keepdims=True), np.finfo(f).tiny)
        log_share = scores - top - np.log(e.sum(-1, keepdims=True))
        found = np.where(kept & (p > 0), p * (np.log(p) - log_share), 0).sum(-1)
        grads = plain.indexer_gradients(index_q, index_k, index_weights, (share - p) * dkl[..., None], visible=kept)
    return found, *(g.astype(x.dtype) for g, x in zip(grads, (index_q, index_k, index_weights)))


def trained(on, rng, x, index, kept, function, scale=None, sink_logits=None, dense=False, **options):
    """out and divergence of a phase, and every gradient, by the policy."""
    import torch
    leaves, of_indexer = [on.tensor(y, True) for y in x], {name: on.tensor(y, True) for name, y in index.items()}
    sink = None if sink_logits is None else on.tensor(sink_logits, True)
    try:
        out, div = function(*leaves, **of_indexer, scale=scale, sink_logits=sink, backend=on.backend, **options)
        dout, ddiv = normal(rng, tuple(out.shape), x[0].dtype), normal(rng, tuple(div.shape), np.float32)
        apart = torch.autograd.grad(div.sum(), leaves, retain_graph=True, allow_unused=True)
        torch.autograd.backward([out, div], [on.tensor(dout), on.tensor(ddiv)])
    except st.Unsupported as refusal:
        pytest.skip(f"{on.backend}: {refusal}")
    assert apart == (None,) * len(leaves), "the model is a constant of the divergence"
    q, k, v = x
    scale, S = q.shape[-1] ** -0.5 if scale is None else scale, k.shape[2]
    how = dict(scale=scale, sink_logits=sink_logits)
    truth, their = naive.divergence(q, k, *index.values(), kept, **how)
    truth.backward(torch.from_numpy(ddiv.astype(np.float64)))
    measure = measured(q, k, *index.values(), kept, ddiv, **how)
    rows = S + q.shape[3] + q.shape[1] + HI * DI
    got = arrays(div, *(y.grad for y in of_indexer.values()))
    for name, mine, true, plainly in zip(("divergence", "dindex_q", "dindex_k", "dindex_weights"), got, [truth.detach().numpy(), *(y.grad.numpy() for y in their)], measure):
        assert_close(name, mine, true, plainly, reduction=rows + q.shape[2] * HI)
    truths, plains = oracle.attention(q, k, v, kept[:, None], **how)[0], plain.attention(q, k, v, kept[:, None], **how)[0]
    assert_close("out", arrays(out)[0], truths, plains, reduction=S + q.shape[3])
    truths, plains = oracle.attention_gradients(q, k, v, kept[:, None], dout, **how), plain.attention_gradients(q, k, v, kept[:, None], dout, **how)
    for name, leaf, true, plainly in zip(("dq", "dk", "dv"), leaves, truths, plains):
        assert_close(name, arrays(leaf.grad)[0], true, plainly, reduction=S + q.shape[2] * q.shape[1] + sum(x[2].shape[-1:]) + q.shape[3])
    return got


PHASES = {"warm-up": (lambda *x, **o: st.dsa_warmup(*x, **o), None), "training": (lambda *x, **o: st.dsa_training(*x, top_k=5, **o), 5)}
phases = pytest.mark.parametrize("phase", PHASES)
SHAPES = {"ragged": ({}, {}), "T = S": (dict(T=14, S=14, B=2), {}), "one key head": (dict(Hq=5, Hk=1), dict(scale=0.3)), "before the start": ({}, dict(q_start=-2)),
          "starts": (dict(B=2, T=3), dict(q_start=(2, 9))), "few keys": (dict(T=4, S=4), {})}


def kept_of(x, index, top_k, **options):
    seen = naive.visible(x[0].shape[2], x[1].shape[2], B=len(x[0]), **options)
    return seen if top_k is None else naive.chosen(*index.values(), seen, top_k)


@phases
@pytest.mark.parametrize("backend", LARGE)
@pytest.mark.parametrize("shape", SHAPES)
def test_both_phases(on, backend, phase, shape, rng):
    pytest.importorskip("torch")
    (sizes, options), (function, top_k) = SHAPES[shape], PHASES[phase]
    x, index = made(rng, **sizes)
    start = lengths(**{name: value for name, value in options.items() if name == "q_start"})
    given = {name: on.tensor(value) if isinstance(value, np.ndarray) else value for name, value in start.items()}
    trained(on, rng, x, index, kept_of(x, index, top_k, **start), function, scale=options.get("scale"), **given)


@phases
@every
@pytest.mark.parametrize("kind", ["bfloat16", "float32, sinks"])
def test_both_phases_on_every_backend(on, backend, phase, kind, rng):
    pytest.importorskip("torch")
    function, top_k = PHASES[phase]
    x, index = made(rng, Hq=4, Hk=1, T=5, S=14, D=16, Dv=16, kind=ml_dtypes.bfloat16 if kind == "bfloat16" else np.float32)
    trained(on, rng, x, index, kept_of(x, index, top_k), function, sink_logits=None if kind == "bfloat16" else np.array([0.5, -1, -np.inf, 3], np.float32))


@phases
def test_a_few_queries_at_a_time(phase, rng, monkeypatch):
    """The warm-up never holds T x S weights; runs of any length give what one run gives, by the policy; the same bits twice."""
    pytest.importorskip("torch")
    from drivers import Driver
    from sparsetile.systems import dsa_training
    function, top_k = PHASES[phase]
    x, index = made(rng, B=2, T=40, S=40)
    most = []
    inner = dsa_training._normalised
    monkeypatch.setattr(dsa_training, "_normalised", lambda sums: most.append(sums.shape) or inner(sums))
    monkeypatch.setattr(dsa_training, "HELD", 2 ** 10)
    state = rng.bit_generator.state
    first = trained(Driver("numba"), rng, x, index, kept_of(x, index, top_k), function)
    if phase == "warm-up":
        assert len(most) > 2 * 40 // 4 and all(shape[1] <= 3 for shape in most)
    rng.bit_generator.state = state
    for one, two in zip(first, trained(Driver("numba"), rng, x, index, kept_of(x, index, top_k), function)):
        assert_same_bits("again", one, two)


@pytest.mark.parametrize("B, T, S", [(1, 0, 5), (1, 3, 0), (0, 3, 5), (1, 5, 3)])
def test_nothing_to_attend_to(B, T, S):
    """No query, no key, no sequence, more queries than keys: zeros of the right shapes, and gradients of zero."""
    torch = pytest.importorskip("torch")
    leaf = lambda *shape: torch.ones(shape, requires_grad=True)  # noqa: E731
    x, index = [leaf(B, 4, T, 8), leaf(B, 2, S, 8), leaf(B, 2, S, 8)], dict(index_q=leaf(B, 2, T, 4), index_k=leaf(B, S, 4), index_weights=leaf(B, 2, T))
    assert st.dsa_attention(*x, **index, top_k=2).shape == (B, 4, T, 8)
    for chosen in (st.dsa_selection(*index.values(), top_k=2), st.dsa_two_level_selection(*index.values(), top_k=2, block=1, blocks=2)):
        assert chosen.indices.shape == (B, 1, T, min(2, max(S, 1))) and (chosen.lengths <= S).all()
    for out, divergence in (st.dsa_warmup(*x, **index), st.dsa_training(*x, **index, top_k=2)):
        assert out.shape == (B, 4, T, 8) and divergence.shape == (B, T) and torch.isfinite(divergence).all()
        (out.sum() + divergence.sum()).backward()
    assert all(torch.isfinite(y.grad).all() for y in (*x, *index.values()) if y.grad is not None)


@every
def test_gradients_of_scores_by_products(on, backend, rng):
    """indexer_scores' own gradients, with windows, scales and NaN in keys that nobody scores: on a GPU they are products."""
    torch = pytest.importorskip("torch")
    B, T, S = 2, 4, 11
    q, k, w = normal(rng, (B, HI, T, DI), np.float32), normal(rng, (B, S, DI), np.float32), normal(rng, (B, HI, T), np.float32)
    scale, low, high = rng.random((B, S)).astype(np.float32), np.array([[0, 1, 2, 3], [4, 0, 9, 2]], np.int32), np.array([9, 9, 3, 10], np.int32)
    for activation in ("relu", None):
        seen = judge.seen_keys(B, T, S, causal=True, key_start=low, key_end=high)
        poisoned = np.where(seen.any(1)[..., None], k, np.nan).astype(np.float32)
        leaves = [on.tensor(x, True) for x in (q, poisoned, w)]
        scores = st.indexer_scores(*leaves, k_scale=on.tensor(scale), key_start=on.tensor(low), key_end=on.tensor(high), activation=activation, backend=backend)
        dscores = normal(rng, (B, T, S), np.float32)
        got = arrays(*torch.autograd.grad(scores, leaves, on.tensor(dscores)))
        truth = oracle.indexer_gradients(q, k, w, dscores, k_scale=scale, seen=seen, activation=activation)
        measure = plain.indexer_gradients(q, k, w, dscores, k_scale=scale, visible=seen, activation=activation)
        for name, *triple in zip(("dq", "dk", "dweights"), got, truth, measure):
            assert_close(name, *triple, reduction=S + T * HI + DI)


# ------------------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("change, error, words", [
    (dict(top_k=0), ValueError, "top_k"), (dict(index_q=np.zeros((1, 3, 5, 8), np.float32)), ValueError, r"index_q: expected batch size and number of queries \[B, T\] of q \[1, 6\], got \[1, 5\]"),
    (dict(index_k=np.zeros((1, 20, 8), np.float32)), ValueError, "index_k: expected number of keys S of k 21, got 20"), (dict(index_weights=np.zeros((1, 2, 6), np.float32)), ValueError, "weights"),
    (dict(return_selection=1), TypeError, "return_selection"), (dict(kv_length=np.zeros(2, np.int32)), ValueError, "kv_length"), (dict(index_k=np.zeros((1, 21, 9), np.float32)), ValueError, "k: expected"),
])
def test_bad_arguments_are_named(change, error, words, rng):
    x, index = made(rng)
    with pytest.raises(error, match=words):
        st.dsa_attention(*x, **dict(index, top_k=4, backend="numba") | change)


def test_what_training_cannot_take_is_named(rng):
    torch = pytest.importorskip("torch")
    x, index = made(rng)
    with pytest.raises(TypeError, match="q: expected a PyTorch tensor"):
        st.dsa_warmup(*x, **index)
    x, index = [torch.from_numpy(y) for y in x], {name: torch.from_numpy(y) for name, y in index.items()}
    with pytest.raises(st.Unsupported, match="softcap"):
        st.dsa_training(*x, **index, softcap=3.0)
    with pytest.raises(st.Unsupported, match="index_q: float8"):
        st.dsa_training(*x, **{name: y.to(torch.float8_e4m3fn) if name != "index_weights" else y for name, y in index.items()})
    with pytest.raises(ValueError, match="mode"):
        st.dsa_latent_attention(*[x[0]] * 6, **index, mode="auto")


# ------------------------------------------------------------------------------------------------------------------ frameworks
def test_torch_compile_takes_the_whole_call(rng):
    """One graph, the model's gradients with it; lengths on the device too."""
    torch = pytest.importorskip("torch")
    torch.compiler.reset()
    x, index = made(rng, B=2)
    x, index = [torch.from_numpy(y).requires_grad_() for y in x], {name: torch.from_numpy(y) for name, y in index.items()}
    length = torch.tensor([21, 13], dtype=torch.int32)
    call = lambda *x: st.dsa_attention(*x, **index, top_k=5, kv_length=length, backend="numba")  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for one, two in zip(*([f(*x)] + list(torch.autograd.grad(f(*x).sum(), x)) for f in (call, compiled))):
        assert_same_bits("compiled", one, two)


def test_jax_eager_and_traced(rng):
    jax = pytest.importorskip("jax")
    x, index = made(rng, B=2)
    call = lambda x, index, length: st.dsa_attention(*x, **index, top_k=5, kv_length=length, backend="numba")  # noqa: E731
    length = np.array([21, 13], np.int32)
    ours, theirs = call(x, index, length), jax.tree.map(jax.numpy.asarray, (x, index, length))
    for got in (call(*theirs), jax.jit(call)(*theirs)):
        assert isinstance(got, jax.Array)
        assert_same_bits("jax", np.asarray(got), ours)
