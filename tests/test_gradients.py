"""Gradients of the indexer and of the latent's products by torch autograd, on every backend that has them, against closed forms in float64."""
import ml_dtypes
import numpy as np
import oracle
import pytest
from drivers import EVERY, arrays
from judge import normal, seen_keys
from numeric import assert_close, assert_same_bits, plain

import sparsetile as st

torch = pytest.importorskip("torch")
KINDS = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def differentiate(on, call, inputs, rng, twice=True):
    """(gradients of sum(output * random) by each input, what each output was multiplied with); the same bits twice."""
    leaves = [on.tensor(x, True) for x in inputs]
    try:
        outs = call(*leaves)
        outs = outs if isinstance(outs, tuple) else (outs,)
        given = [normal(rng, tuple(out.shape), inputs[0].dtype if out.dtype == leaves[0].dtype else np.float32) for out in outs]
        got = [arrays(*torch.autograd.grad(outs, leaves, [on.tensor(g) for g in given], retain_graph=True)) for _ in range(2 if twice else 1)]
    except st.Unsupported as refusal:
        pytest.skip(f"{on.backend}: {refusal}")
    for first, second in zip(*got) if twice else ():
        assert_same_bits("gradient", first, second)
    return got[0], given


CASES = {"causal": (2, 3, 9, 21, 16, {}), "window": (2, 5, 13, 60, 24, dict(causal=False)), "one head": (1, 1, 33, 50, 8, {}), "negative start": (1, 2, 10, 7, 33, {}),
         "plain products": (1, 4, 7, 30, 16, dict(activation=None)), "one query": (2, 8, 1, 100, 40, {})}


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_indexer_scores(on, backend, kind, case, rng):
    B, H, T, S, D, options = CASES[case]
    q, k, weights = normal(rng, (B, H, T, D), KINDS[kind]), normal(rng, (B, S, D), KINDS[kind]), normal(rng, (B, H, T), np.float32)
    scale, window = np.abs(normal(rng, (B, S), np.float32)), {}
    if case == "window":  # some windows empty, some past the end, a gap that no query sees
        start = rng.integers(-5, S // 2 - 6, (B, T)).astype(np.int32)
        start[:, ::2] += S // 2
        window = dict(key_start=start, key_end=start + rng.integers(0, 8, (B, T)).astype(np.int32))
    causal, activation = options.get("causal", True), options.get("activation", "relu")
    seen = seen_keys(B, T, S, causal=causal, **window)
    spoiled = k.copy()
    spoiled[~seen.any(axis=1)] = np.nan
    call = lambda q, k, w: st.indexer_scores(q, k, w, k_scale=on.tensor(scale), backend=on.backend, **options, **{n: on.tensor(x) for n, x in window.items()})
    got, (dscores,) = differentiate(on, call, (q, spoiled, weights), rng)
    truths = oracle.indexer_gradients(q, k, weights, dscores, k_scale=scale, seen=seen, activation=activation)
    measures = plain.indexer_gradients(q, k, weights, dscores, k_scale=scale, visible=seen, activation=activation)
    for name, g, truth, measure, x, length in zip(("dq", "dk", "dweights"), got, truths, measures, (q, k, weights), (S + D, H * T + D, S + D)):
        assert_close(name, g, truth, measure.astype(x.dtype), reduction=length)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("pool, forced, tied", [(1, 0, False), (4, 1, False), (4, 1, True)], ids=["keys", "blocks", "blocks, keys in pairs"])
def test_chosen_scores(on, backend, pool, forced, tied, rng, monkeypatch):
    """A block's gradient goes to the first of its best keys."""
    from sparsetile.ops import torch_gradients
    monkeypatch.setattr(torch_gradients, "SCORES", 200)  # queries in several runs
    B, H, T, S, D, top_k = 2, 3, 11, 39, 16, 5
    q, k, weights = normal(rng, (B, H, T, D), np.float32), normal(rng, (B, S, D), np.float32), normal(rng, (B, H, T), np.float32)
    k[:, 1::2] = k[:, 0:S - 1:2] if tied else k[:, 1::2]
    chosen = []

    def call(q, k, w):
        selection, best = st.indexer_topk(q, k, w, top_k, pool=pool, force_last=forced, return_scores=True, backend=on.backend)
        chosen.append(arrays(selection.indices)[0][:, 0])
        return best
    got, (dbest,) = differentiate(on, call, (q, k, weights), rng)
    seen = seen_keys(B, T, S, causal=True)
    scores = np.pad(oracle.indexer_scores(q, k, weights, seen=seen), ((0, 0), (0, 0), (0, -S % pool)), constant_values=-np.inf)
    dscores = np.zeros((B, T, S))
    for b, t, n in np.ndindex(B, T, top_k):
        entry = chosen[0][b, t, n]
        if entry >= 0:
            dscores[b, t, entry * pool + np.argmax(scores[b, t, entry * pool:entry * pool + pool])] = dbest[b, 0, t, n]
    truths, measures = oracle.indexer_gradients(q, k, weights, dscores, seen=seen), plain.indexer_gradients(q, k, weights, dscores, visible=seen)
    for name, g, truth, measure in zip(("dq", "dk", "dweights"), got, truths, measures):
        assert_close(name, g, truth, measure, reduction=S + H * T + D)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("kind", [*KINDS, "float64"])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("sizes", [(2, 29, 3, 140, 12, 20, 6), (1, 50, 3, 256, 64, 128, 8)], ids=["odd", "in-place"])  # the second: heads are summed in place where a kernel does
def test_latent_decompress(on, backend, kind, scaled, sizes, rng, monkeypatch):
    from sparsetile.ops import torch_gradients
    monkeypatch.setattr(torch_gradients, "ROWS", 24)  # sums in several runs
    B, S, H, R, Dn, Dv, P = sizes
    made = KINDS.get(kind, np.float64)
    inputs = normal(rng, (B, S, R), made), normal(rng, (H, R, Dn), made), normal(rng, (H, R, Dv), made), normal(rng, (B, S, P), made)
    scale = np.abs(normal(rng, (B, S, 2), np.float32)) if scaled else None
    call = lambda c, uk, uv, rope: st.latent_decompress(c, uk, uv, k_rope=rope, latent_scale=None if scale is None else on.tensor(scale), backend=on.backend)
    got, (dk, dv) = differentiate(on, call, inputs, rng)
    how = dict(k_rope=inputs[3], latent_scale=scale)
    truths, measures = oracle.latent_gradients(dk, dv, *inputs[:3], **how), plain.latent_gradients(dk, dv, *inputs[:3], **how)
    for name, g, truth, measure, length in zip(("dlatent", "dw_uk", "dw_uv", "dk_rope"), got, truths, measures, (H * (Dn + Dv), B * S, B * S, H)):
        assert_close(name, g, truth, measure, reduction=length)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("kind", [*KINDS, "float64"])
def test_grouped_matmul(on, backend, kind, rng):
    from sparsetile.ops.latent import absorb
    B, H, T, N, M, P = 2, 3, 19, 20, 33, 5
    made = KINDS.get(kind, np.float64)
    inputs = normal(rng, (B, H, T, N), made), normal(rng, (H, M, N), made), normal(rng, (B, H, T, P), made)
    got, (dout,) = differentiate(on, lambda x, w, tail: absorb(x, w, tail, on.backend), inputs, rng)
    truths, measures = oracle.grouped_gradients(dout[..., :M], *inputs[:2]), plain.grouped_gradients(dout[..., :M], *inputs[:2])
    for name, g, truth, measure, length in zip(("dx", "dw"), got, truths, measures, (M, B * T)):
        assert_close(name, g, truth, measure, reduction=length)
    assert_same_bits("dtail", got[2], dout[..., M:])
