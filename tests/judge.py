"""One call of a public function on one backend, judged by the float64 oracle under the numeric policy. Returns what was got, for more to be asked of it.

`count` says, from a source of its own, how often each query sees each key: [B,Hq,T,S] or what broadcasts to it.
"""
import numpy as np
import oracle
from drivers import arrays
from numeric import assert_chosen, assert_close, plain


def normal(rng, shape, dtype, scale=1.0):
    return (rng.standard_normal(shape) * scale).astype(dtype)


def attention(on, q, k, v, rule, count, *, scale=None, softcap=None, sink_logits=None, value_width=None, name="", op="sparse_attention", **options):
    """sparse_attention's out and lse, or those of a system that takes its arguments (op, with rule None). v=None: the first value_width columns of k."""
    width, rule = None if v is not None else value_width, () if rule is None else (rule,)
    out, lse = arrays(*getattr(on, op)(q, k, v, *rule, scale=scale, softcap=softcap, sink_logits=sink_logits, value_width=width, return_lse=True, **options))
    scales = {x: options[x] for x in ("q_scale", "k_scale", "v_scale") if x in options}
    answer(out, lse, q, k, k[..., :value_width] if v is None else v, count, scale=scale, softcap=softcap, sink_logits=sink_logits, name=name, **scales)
    return out, lse


LEADS = dict(bfloat16=7.0054, float16=7.00069)  # just above a power of two by half of what the type keeps there: what is rounded most


def decided_late(rng, kind, heads, T, S, *, first=3, late=140):
    """q [1,heads,T,576], latent [1,1,S,576], scale: key `late` decides, by just so many powers of two over key `first` that a kernel whose reference may lag behind as far has to round its probability. The
    others have no say."""
    q, latent = np.zeros((1, heads, T, 576), kind), rng.standard_normal((1, 1, S, 576)).astype(kind)
    q[..., 575], latent[..., 512:], latent[..., 575] = 1, 0, -8
    latent[..., first, 575], latent[..., late, 575] = 0, 1
    return q, latent, LEADS[np.dtype(kind).name] * float(np.log(2))


def answer(out, lse, q, k, v, count, *, scale=None, softcap=None, sink_logits=None, name="", q_scale=None, k_scale=None, v_scale=None):
    """An attention's out and lse by the policy."""
    how, float8 = dict(scale=q.shape[-1] ** -0.5 if scale is None else scale, softcap=softcap, sink_logits=sink_logits), {}
    exact = q, k, v
    if "float8" in k.dtype.name:
        exact = [oracle.dequantised(x, x_scale, rows) for x, x_scale, rows in ((q, q_scale, 1), (k, k_scale, 128), (v, v_scale, 128))]
        float8 = dict(q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, out_dtype=out.dtype)
    (truth, truth_lse), (measure, measure_lse) = oracle.attention(*exact, count, **how), plain.attention(q, k, v, count, **how, **float8)
    S, D = k.shape[2:]
    assert_close(name + "out", out, truth, measure, reduction=S + D)
    rows = lambda x: x.reshape(len(x), -1)  # one number a query: its row is the sample, for an lse may be nothing but cancellation
    assert lse.shape == truth_lse.shape, f"{name}lse: shape {lse.shape}"
    assert_close(name + "lse", rows(lse), rows(truth_lse), rows(measure_lse), reduction=S + D)


def gradients(on, q, k, v, rule, count, rng, *, scale=None, softcap=None, sink_logits=None, with_lse=False, poison=None, deterministic=True, op="sparse_attention", **options):
    """Gradients of sum(out * dout) [+ sum(lse * dlse)] by torch autograd. poison: a function that spoils k and v where no query sees them."""
    import sparsetile
    put_k, put_v = (k, v) if poison is None else (poison(k), poison(v))
    tensors = [on.tensor(x, True) for x in (q, put_k, put_v)]
    sink = None if sink_logits is None else on.tensor(sink_logits, True)
    options = {name: on.tensor(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    try:
        out, lse = getattr(sparsetile, op)(*tensors, *([] if rule is None else [rule]), scale=scale, softcap=softcap, sink_logits=sink, return_lse=True,
                                           deterministic=deterministic, backend=on.backend, **options)
        dout = normal(rng, tuple(out.shape), q.dtype)
        dlse = normal(rng, tuple(lse.shape), np.float64 if q.dtype == np.float64 else np.float32) if with_lse else None
        import torch
        torch.autograd.backward([out, lse] if with_lse else [out], [on.tensor(dout), on.tensor(dlse)] if with_lse else [on.tensor(dout)])
    except sparsetile.Unsupported as refusal:
        import pytest
        pytest.skip(f"{on.backend}: {refusal}")
    forward = dict(scale=q.shape[-1] ** -0.5 if scale is None else scale, softcap=softcap)
    how = dict(forward, dlse=dlse, sink_logits=sink_logits)
    truths, measures = oracle.attention_gradients(q, k, v, count, dout, **how), plain.attention_gradients(q, k, v, count, dout, **how)
    (Hq, T, D), (Hk, S, Dv) = q.shape[1:], v.shape[1:]
    got = arrays(*(x.grad for x in tensors), None if sink is None else sink.grad)
    for name, g, truth, measure, reduction in zip(("dq", "dk", "dv", "dsink"), got, truths, measures, (S + D + Dv, T * Hq // Hk + D + Dv, T * Hq // Hk + D, T * q.shape[0] * Dv)):
        if g is None:
            continue
        if name == "dsink":  # from the op's own rounded output, as delta is: one number a head is too small a sample of what rounding another output does
            truth, measure = (_sink_gradient(x, dout, arrays(out)[0], lse_of(q, k, v, count, **forward), sink_logits) for x, lse_of in
                              ((np.float64, lambda *a, **h: oracle.attention(*a, **h)[1]), (plain.working(q), lambda *a, **h: plain.attention(*a, **h)[1])))
            measure = measure.astype(np.float32)
        assert_close(name, g, truth, measure, reduction=reduction)
    return got


def _sink_gradient(dtype, dout, out, lse, sink_logits):
    """-sum over rows of the sink's share times dout . out; lse [B,Hq,T] over keys -> [Hq]"""
    with np.errstate(all="ignore"):
        sink = sink_logits.astype(dtype)[None, :, None]
        share = np.where(np.isfinite(sink), np.exp(sink - np.logaddexp(lse.astype(dtype), sink)), 0)
        return -(share * (dout.astype(dtype) * out.astype(dtype)).sum(axis=-1)).sum(axis=(0, 2))


def seen_keys(B, T, S, *, causal, q_start=None, key_start=None, key_end=None):
    """[B,T,S] booleans of an indexer's window."""
    start = np.broadcast_to(S - T if q_start is None else q_start, (B,))[:, None, None]
    s, t = np.arange(S), np.arange(T)[:, None]
    seen = np.ones((B, T, S), bool) if not causal else np.broadcast_to(s <= start + t, (B, T, S)).copy()
    for bound, keeps in ((key_start, lambda x: s >= x), (key_end, lambda x: s < x)):
        if bound is not None:
            seen &= keeps(np.broadcast_to(bound, (B, T))[..., None])
    return seen


def _scores(q, k, weights, k_scale, activation, seen):
    return (oracle.indexer_scores(q, k, weights, k_scale=k_scale, seen=seen, activation=activation),
            plain.indexer_scores(q, k, weights, k_scale=k_scale, visible=seen, activation=activation))


def _accumulator(q):
    return dict(reduction=q.shape[1] * q.shape[3], accumulator="float8" if "float8" in q.dtype.name else "float32")


def indexer_scores(on, q, k, weights, *, k_scale=None, activation="relu", causal=True, **window):
    got, = arrays(on.indexer_scores(q, k, weights, k_scale=k_scale, activation=activation, causal=causal, **window))
    truth, measure = _scores(q, k, weights, k_scale, activation, seen_keys(q.shape[0], q.shape[2], k.shape[1], causal=causal, **window))
    assert_close("scores", got, truth, measure, **_accumulator(q))
    return got


def selection_arrays(selection):
    indices, lengths = arrays(selection.indices, selection.lengths)
    assert indices.shape[1] == lengths.shape[1] == 1, "a selector chooses once for all heads"
    return indices[:, 0], lengths[:, 0]


def indexer_topk(on, q, k, weights, top_k, *, k_scale=None, activation="relu", causal=True, pool=1, force_first=0, force_last=0, return_scores=False, **window):
    """Indices by their float64 scores; scores asked for, by the policy."""
    got = on.indexer_topk(q, k, weights, top_k, k_scale=k_scale, activation=activation, causal=causal, pool=pool, force_first=force_first, force_last=force_last,
                          return_scores=return_scores, **window)
    selection, best = got if return_scores else (got, None)
    assert selection.granularity == pool and selection.causal == causal
    indices, lengths = selection_arrays(selection)
    seen = seen_keys(q.shape[0], q.shape[2], k.shape[1], causal=causal, **window)
    truth, measure = _scores(q, k, weights, k_scale, activation, seen)
    if pool > 1:
        (truth, blocks), (measure, _) = oracle.pooled(truth, seen, pool), oracle.pooled(measure, seen, pool)
        seen = blocks
    rank = np.cumsum(seen, axis=-1)
    forced = seen & ((rank <= force_first) | (rank > rank[..., -1:] - force_last))
    assert_chosen("indices", indices, lengths, truth, measure, top_k, visible=seen, forced=forced, take_all=not return_scores, **_accumulator(q))
    if return_scores:
        best, = arrays(best)
        picked = lambda x, fill: np.where(indices >= 0, np.take_along_axis(x, np.maximum(indices, 0).astype(np.int64), -1), fill)
        assert_close("best", best[:, 0], picked(truth, -np.inf), picked(measure, np.float32(-np.inf)).astype(np.float32), **_accumulator(q))
    return indices, lengths
