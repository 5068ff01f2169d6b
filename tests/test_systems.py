"""The systems of the literature on every backend: each equals its paper in loops (naive_systems.py) under the numeric policy, forward and backward.

Each selector has its anti-cheat pair: everything chosen equals dense, a small choice differs from it.
"""
import tracemalloc

import judge
import ml_dtypes
import naive_systems as naive
import numpy as np
import oracle
import published_moba
import pytest
from drivers import EVERY, LARGE, arrays
from judge import normal
from numeric import assert_close, assert_same_bits, plain

import sparsetile as st

KINDS = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float64": np.float64}
# name -> small knobs, knobs that choose everything (for T = S = 20)
SMALL = {"moba": dict(block=8, top_k=2), "exact_topk": dict(top_k=5), "infllm_v2": dict(block=4, stride=2, select_block=4, top_k=3, force_last=1),
         "vertical_slash": dict(vertical=3, slash=5, last_q=4, force_vertical=1, force_slash=2)}
ALL = {"moba": dict(block=8, top_k=3), "exact_topk": dict(top_k=20), "infllm_v2": dict(block=4, stride=2, select_block=4, top_k=5, force_last=1),
       "vertical_slash": dict(vertical=20, slash=1, last_q=4, force_vertical=1, force_slash=1)}
# name -> B, Hq, Hk, T, S, D, Dv, options of the call
CASES = {"ragged": (1, 2, 1, 7, 21, 13, 9, {}), "batch of lengths": (2, 2, 2, 5, 20, 8, 8, dict(kv_length=[20, 11])), "before the start": (1, 1, 1, 6, 17, 5, 3, dict(q_start=-3)),
         "past the keys": (1, 3, 1, 4, 18, 7, 7, dict(q_start=15)), "starts": (2, 1, 1, 3, 19, 8, 4, dict(kv_length=[0, 19], q_start=[4, 9])), "one query": (1, 4, 2, 1, 30, 16, 8, {}), "beyond the length": (1, 4, 1, 6, 24, 8, 8, dict(kv_length=[11], q_start=20))}


def made(rng, case, kind=np.float32):
    B, Hq, Hk, T, S, D, Dv, options = CASES[case]
    options = {name: np.asarray(x, np.int32) if isinstance(x, list) else x for name, x in options.items()}
    return normal(rng, (B, Hq, T, D), kind), normal(rng, (B, Hk, S, D), kind), normal(rng, (B, Hk, S, Dv), kind), options


def spoiled(x, kv_length):
    """Keys past the length hold NaN, or what many queries would like best: nothing may read them."""
    x = x.copy()
    for b, n in enumerate([] if kv_length is None else kv_length):
        x[b, :, n:] *= 1e3
        x[b, :, n + 1::2] = np.nan
    return x


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("system", SMALL)
def test_every_backend(on, backend, system, rng):
    q, k, v = normal(rng, (1, 2, 3, 8), np.float32), normal(rng, (1, 1, 19, 8), np.float32), normal(rng, (1, 1, 19, 5), np.float32)
    judge.attention(on, q, k, v, None, getattr(naive, system)(q, k, **SMALL[system]), op=system, **SMALL[system])


@pytest.mark.parametrize("backend", LARGE)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("system", SMALL)
def test_equals_the_paper(on, backend, system, case, rng):
    q, k, v, options = made(rng, case)
    bad_k, bad_v = (spoiled(x, options.get("kv_length")) for x in (k, v))
    out, lse = arrays(*getattr(on, system)(q, bad_k, bad_v, return_lse=True, **SMALL[system], **options))
    judge.answer(out, lse, q, k, v, getattr(naive, system)(q, k, **SMALL[system], **options))
    chosen = getattr(on, f"{system}_selection")(q, bad_k, **SMALL[system], **options)
    assert np.array_equal(arrays(on.sparse_attention(q, k, v, chosen, **options))[0], out), "the selection alone is the system"


@pytest.mark.parametrize("backend", LARGE)
@pytest.mark.parametrize("kind", ["bfloat16", "float64"])
@pytest.mark.parametrize("system", SMALL)
def test_types(on, backend, system, kind, rng):
    q, k, v, options = made(rng, "ragged", KINDS[kind])
    judge.attention(on, q, k, v, None, getattr(naive, system)(q, k, **SMALL[system]), op=system, **SMALL[system])


@pytest.mark.parametrize("backend", LARGE)
@pytest.mark.parametrize("system", [system for system in SMALL if system != "moba"])
def test_the_choice_is_by_scaled_products(on, backend, system, rng):
    """A scale below zero turns the order around."""
    q, k, v, _ = made(rng, "ragged")
    judge.attention(on, q, k, v, None, getattr(naive, system)(q, k, scale=-0.7, **SMALL[system]), op=system, scale=-0.7, **SMALL[system])


@pytest.mark.parametrize("backend", LARGE)
@pytest.mark.parametrize("system", SMALL)
def test_gradients(on, backend, system, rng):
    pytest.importorskip("torch")
    q, k, v, _ = made(rng, "ragged", np.float32)
    judge.gradients(on, q, k, v, None, getattr(naive, system)(q, k, **SMALL[system]), rng, op=system, with_lse=True, sink_logits=np.zeros(2, np.float32), **SMALL[system])


@pytest.mark.parametrize("backend", LARGE)
@pytest.mark.parametrize("system", SMALL)
def test_all_is_dense_and_few_are_not(on, backend, system, rng):
    q, k, v = (normal(rng, (1, 2, 20, 8), np.float32) for _ in range(3))
    causal = oracle.visible(1, 20, 20, rule=lambda p, s: s <= p)
    dense, _ = judge.attention(on, q, k, v, None, causal, op=system, **ALL[system])
    few = arrays(getattr(on, system)(q, k, v, **SMALL[system]))[0]
    assert np.abs(few - dense).max() > 0.01


@pytest.mark.parametrize("backend", EVERY)
def test_moba_of_one_block_sees_its_own_alone(on, backend, rng):
    """k = 1 is no dense attention (as published code has it): position 13 of chunks of 8 sees 8 to 13."""
    q, k, v = normal(rng, (1, 2, 6, 8), np.float32), normal(rng, (1, 1, 19, 8), np.float32), normal(rng, (1, 1, 19, 8), np.float32)
    own = oracle.visible(1, 6, 19, rule=lambda p, s: (s <= p) & (s // 8 == p // 8))
    judge.attention(on, q, k, v, None, own, op="moba", block=8, top_k=1)


@pytest.mark.parametrize("top_k", [2, 3, 9])
def test_moba_equals_flash_linear_attentions(top_k, rng, monkeypatch):
    """Published code on two packed sequences; out and gradients of both within the policy of the same definition."""
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("fla.ops.moba.parallel", reason="flash-linear-attention's code is not installed (pip install fla-core einops)")
    lengths, (H, D, block) = (27, 14), (2, 8, 4)
    q, k, v, dout = (normal(rng, (1, sum(lengths), H, D), np.float32) for _ in range(4))
    theirs = [torch.from_numpy(x).requires_grad_() for x in (q, k, v)]
    out = published_moba.moba(monkeypatch, module, *theirs, lengths, block=block, top_k=top_k)
    published = [out, *torch.autograd.grad(out, theirs, torch.from_numpy(dout))]
    for a, b in ((0, 27), (27, 41)):
        cut = lambda x: np.ascontiguousarray(x[:, a:b].swapaxes(1, 2))  # noqa: E731, B023
        leaves, dy = [torch.from_numpy(cut(x)).requires_grad_() for x in (q, k, v)], cut(dout)
        mine = st.moba(*leaves, block=block, top_k=top_k, backend="numba")
        count = naive.moba(cut(q), cut(k), block=block, top_k=top_k)
        given, how = (cut(q), cut(k), cut(v), count), dict(scale=D ** -0.5)
        truths = oracle.attention(*given, **how)[0], *oracle.attention_gradients(*given, dy, **how)[:3]
        measures = plain.attention(*given, **how)[0], *plain.attention_gradients(*given, dy, **how)[:3]
        for name, one, two, truth, measure in zip(("out", "dq", "dk", "dv"), [mine, *torch.autograd.grad(mine, leaves, torch.from_numpy(dy))], published, truths, measures):
            assert_close(name, *arrays(one), truth, measure, reduction=b - a + 2 * D), assert_close("published " + name, cut(*arrays(two)), truth, measure, reduction=b - a + 2 * D)


@pytest.mark.parametrize("backend", LARGE)
def test_scores_of_a_few_queries_at_a_time(on, backend, rng, monkeypatch):
    from sparsetile.systems import infllm
    monkeypatch.setattr(infllm, "SCORES", 2 ** 7)
    q, k, v, options = made(rng, "batch of lengths")
    knobs = dict(block=4, stride=2, select_block=4, top_k=2, force_first=0, force_last=0)
    judge.attention(on, q, k, v, None, naive.infllm_v2(q, k, **knobs, q_start=-1), op="infllm_v2", q_start=-1, **knobs)


POOLED = {"square": (1, 2, 1, 70, 70, {}), "later queries": (2, 2, 2, 40, 104, {}), "given start": (1, 2, 1, 33, 100, dict(q_start=32)), "lengths": (2, 6, 2, 70, 70, dict(kv_length=[66, 37], q_start=0))}


@pytest.mark.parametrize("backend", LARGE)
@pytest.mark.parametrize("case", POOLED)
def test_pooled_blocks(on, backend, case, rng):
    pytest.importorskip("torch")
    B, Hq, Hk, T, S, options = POOLED[case]
    options = {name: np.asarray(x, np.int32) if isinstance(x, list) else x for name, x in options.items()}
    q, k, v = normal(rng, (B, Hq, T, 9), np.float32), normal(rng, (B, Hk, S, 9), np.float32), normal(rng, (B, Hk, S, 5), np.float32)
    knobs = dict(block=32, top_k=2)
    count = naive.pooled_blocks(q, k, **knobs, **options)
    bad_k, bad_v = (spoiled(x, options.get("kv_length")) for x in (k, v))
    judge.answer(*arrays(*on.pooled_blocks(q, bad_k, bad_v, return_lse=True, **knobs, **options)), q, k, v, count)
    judge.gradients(on, q, k, v, None, count, rng, op="pooled_blocks", **knobs, **options)


@pytest.mark.parametrize("backend", EVERY)
def test_all_blocks_are_dense_and_few_are_not(on, backend, rng):
    q, k, v = (normal(rng, (1, 1, 40, 8), np.float32) for _ in range(3))
    dense, _ = judge.attention(on, q, k, v, None, oracle.visible(1, 40, 40, rule=lambda p, s: s <= p), op="pooled_blocks", block=32)
    assert np.abs(arrays(on.pooled_blocks(q, k, v, block=32, top_k=1))[0] - dense).max() > 0.01


# ---------------------------------------------------------------------------------------------------------------- Routing Transformer
def judged(out, leaves, answer, rng, reduction):
    """Out and the gradients of its leaves, against answer(dtype) -> out, leaves in float64 and, as the measure, float32."""
    import torch
    dout = normal(rng, out.shape, np.float32)
    results = []
    for one, ends, kind in ((out, leaves, torch.float32), *((*answer(kind), kind) for kind in (torch.float64, torch.float32))):
        results.append(arrays(one, *torch.autograd.grad(one, ends, torch.from_numpy(dout).to(one.device, kind), materialize_grads=True)))
    for n, (mine, truth, measure) in enumerate(zip(*results)):
        assert_close(["out", "dq", "dk", "dv"][n] if len(leaves) == 3 else ["out", "dq", "dv"][n], mine, truth, measure, reduction=reduction)


ROUTES = {"ragged": ("ragged", 2, {}), "T = S": ("square", 2, {}), "one head of centroids": ("batch of lengths", 1, {}), "unit": ("one query", 4, dict(normalize="unit")),
          "both ways": ("batch of lengths", 2, dict(causal=False)), "as given": ("starts", 1, dict(normalize=None)), "before the start": ("long before the start", 1, {}),
          "beyond the length": ("beyond the length", 4, dict(causal=False)), "fewer than a cluster": ("short", 2, {}), "fewer, both ways": ("short", 2, dict(causal=False))}
CASES |= {"long before the start": (1, 1, 1, 12, 17, 5, 3, dict(q_start=-3)), "square": (2, 2, 2, 15, 15, 6, 4, {}), "short": (2, 2, 1, 12, 12, 6, 4, dict(kv_length=[3, 12], q_start=0))}


@pytest.mark.parametrize("backend", LARGE)
@pytest.mark.parametrize("route", ROUTES)
def test_routing(on, backend, route, rng):
    pytest.importorskip("torch")
    case, H, how = ROUTES[route]
    q, k, v, options = made(rng, case)
    centroids, size, lengths = normal(rng, (H, 3, q.shape[3]), np.float32), 4, options.get("kv_length")

    leaves = [on.tensor(x, True) for x in (q, spoiled(k, lengths), spoiled(v, lengths))]
    given = {name: on.tensor(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    out = st.routing(*leaves, centroids=on.tensor(centroids), cluster_size=size, backend=backend, **how, **given)
    judged(out, leaves, lambda kind: naive.routing(q, k, v, centroids, size, dtype=kind, **how, **options), rng, k.shape[2] + q.shape[3] + v.shape[3])


@pytest.mark.parametrize("backend", LARGE)
def test_routing_of_shared_queries_and_keys(on, backend, rng):
    torch = pytest.importorskip("torch")
    q, v, centroids = normal(rng, (2, 2, 15, 6), np.float32), normal(rng, (2, 2, 15, 4), np.float32), normal(rng, (2, 3, 6), np.float32)
    shared, values, apart = on.tensor(q, True), on.tensor(v, True), [on.tensor(x, True) for x in (q, q, v)]
    one = st.routing(shared, shared, values, centroids=on.tensor(centroids), cluster_size=6, backend=backend)
    two = st.routing(*apart, centroids=on.tensor(centroids), cluster_size=6, backend=backend)
    naive_out, _ = naive.routing(q, q, v, centroids, 6, dtype=torch.float64)
    measure, _ = naive.routing(q, q, v, centroids, 6, dtype=torch.float32)
    assert_close("shared", arrays(one)[0], *arrays(naive_out, measure), reduction=21), assert_close("apart", arrays(two)[0], *arrays(naive_out, measure), reduction=21)


@pytest.mark.parametrize("backend", EVERY)
def test_one_cluster_is_dense_and_more_are_not(on, backend, rng):
    q, k, v = (normal(rng, (1, 2, 9, 8), np.float32) for _ in range(3))
    out = arrays(on.routing(q, k, v, centroids=normal(rng, (1, 1, 8), np.float32)))[0]
    causal = oracle.visible(1, 9, 9, rule=lambda p, s: s <= p)
    truth, measure = oracle.attention(q, k, v, causal, scale=8 ** -0.5)[0], plain.attention(q, k, v, causal, scale=8 ** -0.5)[0]
    assert_close("out", out, truth, measure, reduction=17)
    assert np.abs(arrays(on.routing(q, k, v, centroids=normal(rng, (1, 3, 8), np.float32)))[0] - truth).max() > 0.01


# ---------------------------------------------------------------------------------------------------------------------------- Reformer
HASHED = {"trax": {}, "trax, both ways": dict(causal=False, chunks_after=1), "trax, ragged": dict(chunk=5), "trax, lengths": dict(kv_length=[12, 7]), "strict": dict(same_bucket=True),
          "strict, ragged": dict(same_bucket=True, chunk=5, chunks_before=2), "strict, both ways": dict(same_bucket=True, causal=False, chunk=3, chunks_after=1),
          "strict, lengths": dict(same_bucket=True, kv_length=[5, 12]), "trax, both ways, lengths": dict(causal=False, kv_length=[1, 9]),
          "strict, both ways, one bucket": dict(same_bucket=True, causal=False)}


@pytest.mark.parametrize("backend", LARGE)
@pytest.mark.parametrize("case", HASHED)
def test_reformer(on, backend, case, rng):
    pytest.importorskip("torch")
    q, v, buckets = normal(rng, (2, 2, 12, 7), np.float32), normal(rng, (2, 2, 12, 5), np.float32), rng.integers(0, 1 if "one bucket" in case else 3, (2, 2, 3, 12)).astype(np.int32)
    options = dict(chunk=4) | HASHED[case]
    lengths = options.get("kv_length")
    count = naive.reformer(buckets, **options)
    if lengths:
        options["kv_length"] = on.tensor(np.asarray(lengths, np.int32))
        count[:, :, :, 0] += count.sum(3) == 0  # rows past the end, which are not compared
    leaves = [on.tensor(q, True), on.tensor(v, True)]
    out = st.reformer(leaves[0], None, leaves[1], buckets=on.tensor(buckets), backend=backend, **options)
    there = np.ones((2, 1, 12, 1), bool) if lengths is None else (np.arange(12) < np.array(lengths)[:, None])[:, None, :, None]
    cut = lambda x: x * on.tensor(there.astype(np.float32)).to(x)  # noqa: E731

    def answer(kind):
        out, leaves = naive.shared_attention(q, v, count, dtype=kind)
        return cut(out), leaves
    judged(cut(out), leaves, answer, rng, 24)


@pytest.mark.parametrize("backend", LARGE)
@pytest.mark.parametrize("decoder", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize("T, chunk", [(24, 4), (24, 8), (6, 8)])
def test_reformer_equals_hugging_face(on, backend, decoder, T, chunk, rng):
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.reformer.modeling_reformer", reason="transformers is not installed: pip install 'sparsetile[demo]'")
    from transformers import ReformerConfig
    B, H, R, D = 2, 2, 3, 6
    config = ReformerConfig(attention_head_size=D, num_attention_heads=H, hidden_size=H * D, lsh_attn_chunk_length=chunk, lsh_num_chunks_before=1,
                            lsh_num_chunks_after=0 if decoder else 1, num_hashes=R, num_buckets=4, is_decoder=decoder, lsh_attention_probs_dropout_prob=0.0)
    x, weight, buckets = normal(rng, (B, T, H * D), np.float32), normal(rng, (H * D, H * D), np.float32), rng.integers(0, 4, (B, H, R, T)).astype(np.int32)
    heads = lambda x: x.unflatten(2, (H, D)).transpose(1, 2)  # noqa: E731

    def answer(kind):
        module, hidden = modeling.LSHSelfAttention(config, layer_idx=0).eval().to(kind), torch.tensor(x, dtype=kind, requires_grad=True)
        with torch.no_grad():
            module.query_key.weight.copy_(torch.eye(H * D)), module.value.weight.copy_(torch.from_numpy(weight))
        offset = torch.from_numpy(buckets + 4 * np.arange(R)[:, None]).long().reshape(B, H, R * T)
        got = module(hidden, num_hashes=R, buckets=offset)
        return heads(got.hidden_states), (hidden,)
    hidden = on.tensor(x, True)
    q, v = heads(hidden), heads(hidden @ on.tensor(weight).mT)
    out = st.reformer(q, None, v, buckets=on.tensor(buckets), chunk=chunk, chunks_after=0 if decoder else 1, causal=decoder, backend=backend)
    judged(out, (hidden,), answer, rng, 3 * chunk * R + D)


@pytest.mark.parametrize("knobs", [dict(vertical=1, slash=2, force_vertical=5, force_slash=9), dict(vertical=2, slash=3)], ids=["cut", "published"])
def test_forced_lines_are_cut_to_the_first_and_the_nearest(knobs, rng):
    q, k, v, options = made(rng, "ragged")
    seen = naive.vertical_slash(q, k, last_q=4, **dict(force_vertical=30, force_slash=100) | knobs)
    p, s = np.arange(14, 21)[:, None], np.arange(21)
    assert np.array_equal(seen[0, 0], ((s < knobs["vertical"]) | (p - s < knobs["slash"])) & (s <= p))
    out, lse = st.vertical_slash(q, k, v, last_q=4, return_lse=True, **knobs)
    judge.answer(out, lse, q, k, v, seen)


def test_a_block_longer_than_the_keys(rng):
    """Queries past the keys, as q_start may put them, are in the one block there is; those of the next block may choose it."""
    q, k, v = normal(rng, (1, 2, 3, 8), np.float32), normal(rng, (1, 1, 4, 8), np.float32), normal(rng, (1, 1, 4, 8), np.float32)
    for knobs in (dict(block=512), dict(block=7), dict(block=7, top_k=1)):
        seen = naive.moba(q, k, q_start=5, **dict(top_k=3) | knobs)
        assert [row.any() for row in seen[0, 0]] == [True, True, knobs.get("top_k") != 1]
        judge.answer(*st.moba(q, k, v, q_start=5, return_lse=True, **knobs), q, k, v, seen)


@pytest.mark.parametrize("options", [{}, dict(kv_length=np.array([7], np.int32)), dict(top_k=3)], ids=repr)
def test_moba_past_the_keys_sees_every_block_it_may_choose(options, rng):
    """The own block of a query past the keys does not exist, and takes no other's place."""
    q, k, v = normal(rng, (1, 2, 8, 8), np.float32), normal(rng, (1, 1, 16, 8), np.float32), normal(rng, (1, 1, 16, 8), np.float32)
    knobs = dict(block=8, top_k=5, q_start=15) | options
    judge.answer(*st.moba(q, k, v, return_lse=True, **knobs), q, k, v, naive.moba(q, k, **knobs))


@pytest.mark.parametrize("B, T, S", [(0, 4, 4), (1, 0, 4), (1, 4, 0), (1, 0, 0)])
@pytest.mark.parametrize("system", [*SMALL, "pooled_blocks", "routing", "reformer", "native_sparse_attention"])
def test_nothing_in_is_nothing_out(system, B, T, S):
    q, k, gates = (np.ones((B, H, n, width), np.float32) for H, n, width in ((2, T, 8), (1, S, 8), (2, T, 3)))
    if system == "reformer":
        out = st.reformer(q, None, q, n_buckets=2, chunk=2)
    else:
        more = dict(centroids=np.ones((1, 2, 8), np.float32)) if system == "routing" else dict(q_start=0) if system == "pooled_blocks" else {}
        out = getattr(st, system)(q, k, k, *[gates] * (system == "native_sparse_attention"), **more)
    assert out.shape == (B, 2, T, 8) and (system == "reformer" or S or not out.any())


@pytest.mark.parametrize("backend", EVERY)
def test_buckets(on, backend, rng):
    q, rotations = normal(rng, (1, 2, 3, 8), np.float32), normal(rng, (2, 8, 2, 3), np.float32)
    turned = np.einsum("bhtd,hdrn->bhrtn", q.astype(np.float64), rotations)
    assert np.array_equal(arrays(on.lsh_buckets(q, rotations=rotations))[0], np.concatenate([turned, -turned], -1).argmax(-1))
    first, again, other = (arrays(on.lsh_buckets(q, n_buckets=16, seed=seed))[0] for seed in (1, 1, 2))
    assert np.array_equal(first, again) and (first != other).any() and first.shape == (1, 2, 1, 3)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("same_bucket", [False, True])
def test_one_bucket_is_dense_and_more_are_not(on, backend, same_bucket, rng):
    q, v = normal(rng, (1, 1, 8, 8), np.float32), normal(rng, (1, 1, 8, 8), np.float32)
    k = q / np.sqrt((q * q).mean(-1, keepdims=True) + np.float32(1e-6)) / np.float32(8 ** 0.5)
    seen = oracle.visible(1, 8, 8, rule=lambda p, s: (s < p) | ((s == 0) & (p == 0)))
    buckets = np.zeros((1, 1, 1, 8), np.int32)
    call = lambda **options: arrays(*on.reformer(q, None, v, same_bucket=same_bucket, return_lse=True, **options))  # noqa: E731
    out, lse = call(buckets=buckets, chunk=8)
    judge.answer(out, lse, q, k, v, seen, scale=1.0)
    assert np.abs(call(buckets=rng.integers(0, 4, (1, 1, 2, 8)).astype(np.int32), chunk=2)[0] - out).max() > 0.01


LONG = {"moba": dict(block=64, top_k=4), "exact_topk": dict(top_k=32), "infllm_v2": dict(top_k=12, force_last=2), "vertical_slash": dict(vertical=16, slash=16), "pooled_blocks": dict(top_k=8),
        "routing": dict(centroids=np.random.default_rng(0).standard_normal((1, 64, 16)).astype(np.float32)), "reformer": dict(chunk=16),
        # as many blocks and compressed keys as half the keys
        "native_sparse_attention": dict(gates=np.ones((1, 1, 6144, 3), np.float32), block=4, stride=2, select_block=2, top_k=8, window=8)}


@pytest.mark.parametrize("system", LONG)
def test_memory_is_less_than_one_byte_a_pair(system, rng, monkeypatch):
    from sparsetile.backends.numba import importance_topk
    from sparsetile.systems import infllm
    monkeypatch.setattr(infllm, "SCORES", 2 ** 20)
    monkeypatch.setattr(importance_topk, "SCRATCH", 2 ** 20)
    T = 6144
    q, k, v = (normal(rng, (1, 1, T, 16), np.float32) for _ in range(3))
    cut = lambda x, n: x[:, :, :n] if isinstance(x, np.ndarray) and x.shape[2] == T else x  # noqa: E731
    call = lambda n: getattr(st, system)(cut(q, n), None if system == "reformer" else cut(k, n), cut(v, n), backend="numba", **{name: cut(x, n) for name, x in LONG[system].items()})  # noqa: E731
    call(256)  # what is compiled or drawn once
    tracemalloc.start()
    try:
        call(T)
        assert tracemalloc.get_traced_memory()[1] < T * T
    finally:
        tracemalloc.stop()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cupy"])
@pytest.mark.parametrize("system", [*SMALL, "pooled_blocks", "routing", "reformer"])
def test_a_cuda_graph_holds_the_choice(on, backend, system, rng):
    """Nothing comes back to the host: a replay with other inputs chooses anew, and gives the bits of a call."""
    import torch
    q, k, v = (on.tensor(normal(rng, (2, 2, 64, 16), np.float32)) for _ in range(3))
    more = dict(buckets=on.tensor(rng.integers(0, 4, (2, 2, 1, 64)).astype(np.int32)), chunk=8) if system == "reformer" else \
        dict(centroids=on.tensor(normal(rng, (1, 4, 16), np.float32))) if system == "routing" else dict(block=32, top_k=1) if system == "pooled_blocks" else SMALL[system]
    call = lambda: getattr(on, system)(q, None if system == "reformer" else k, v, **more)  # noqa: E731
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for x in (q, k, v):
        x.copy_(on.tensor(normal(rng, tuple(x.shape), np.float32)))
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(system, captured, call())


JAX = {**SMALL, "reformer": dict(n_buckets=4, chunk=3, rounds=2, same_bucket=True), "routing": dict(centroids=np.eye(3, 13, dtype=np.float32)[None], cluster_size=4)}


@pytest.mark.parametrize("system", JAX)
def test_jax(system, rng):
    jax = pytest.importorskip("jax", reason="JAX is not installed: pip install 'sparsetile[jax]'")
    q, k, v, _ = made(rng, "square" if system == "reformer" else "ragged")
    own = {name: x for name, x in JAX[system].items() if not isinstance(x, np.ndarray)}
    tables = {name: x for name, x in JAX[system].items() if isinstance(x, np.ndarray)}
    call = lambda q, k, v, tables: getattr(st, system)(q, None if system == "reformer" else k, v, **own, **tables)  # noqa: E731
    measure, truth, given = call(q, k, v, tables), call(*(x.astype(np.float64) for x in (q, k, v)), tables), jax.tree.map(jax.numpy.asarray, (q, k, v, tables))
    for run in (jax.jit(call), call) if system == "moba" else (jax.jit(call),):  # eager JAX compiles every operator by itself
        got = run(*given)
        assert isinstance(got, jax.Array)
        assert_close("JAX", np.asarray(got), truth, measure, reduction=21)


@pytest.mark.parametrize("system", ["moba", "routing", "pooled_blocks"])
def test_compiled_whole(system, rng):
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(normal(rng, (1, 2, 40, 8), np.float32)) for _ in range(3))
    centroids = torch.from_numpy(normal(rng, (1, 3, 8), np.float32))
    options = {"moba": dict(block=8, q_start=0), "routing": dict(centroids=centroids), "pooled_blocks": dict(block=32, top_k=1, q_start=0)}[system]
    call = lambda q, k, v: getattr(st, system)(q, k, v, **options)  # noqa: E731
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    for T in (40, 39) if system == "pooled_blocks" else (40,):  # a layout at a length that is kept as a symbol
        x = [x[:, :, :T] for x in (q, k, v)]
        assert torch.equal(compiled(*x), call(*x))


@pytest.mark.parametrize("system", SMALL)
def test_explained_by_its_attention(system, rng):
    q, k, v, _ = made(rng, "ragged")
    said = st.explain(system, q, k, v, **SMALL[system])
    assert said.backend == "numba" and said == st.explain(st.sparse_attention, q, k, v, getattr(st, f"{system}_selection")(q, k, **SMALL[system]))


CACHE = st.PagedKV.empty(np.zeros(1, np.float32), sequences=1, pages=1, heads=1, width=13)
BAD = [("moba", dict(block=0), ValueError, "block: expected an integer from 1"), ("moba", dict(top_k=1.5), TypeError, "top_k: expected an integer"),
       ("exact_topk", dict(top_k=0), ValueError, "top_k: expected an integer from 1"), ("exact_topk", dict(causal=1), TypeError, "causal: expected True or False"),
       ("infllm_v2", dict(block=24), ValueError, "block: expected a multiple of stride = 16"), ("infllm_v2", dict(top_k=20), ValueError, "force_first: expected .* <= top_k = 20"),
       ("pooled_blocks", dict(block=48), ValueError, "block: expected a multiple of 32"), ("pooled_blocks", dict(block=32, q_start=7), ValueError, "q_start: expected an integer that is a multiple"),
       ("vertical_slash", dict(slash=0), ValueError, "slash: expected an integer from 1"), ("reformer", {}, ValueError, "k: expected None"),
       ("moba", dict(k=CACHE), st.Unsupported, "k: a selector looks at keys in one piece, got a PagedKV"), ("routing", dict(k=CACHE, centroids=np.ones((1, 2, 13), np.float32)), st.Unsupported, "cache.gather"),
       ("reformer", dict(k=None, chunk=2, n_buckets=4, buckets=np.zeros((1, 2, 1, 7), np.int32)), ValueError, "n_buckets: expected None beside buckets"),
       ("native_sparse_attention", dict(k=CACHE, gates=np.ones((1, 2, 7, 3), np.float32)), st.Unsupported, "k: expected arrays, got a PagedKV"),
       ("native_sparse_attention", dict(gates=np.ones((1, 2, 7, 3), np.float32), return_selection=1), TypeError, "return_selection: expected True or False"),
       ("routing", dict(centroids=np.ones((3, 2, 13), np.float32)), ValueError, "centroids: expected .* with H in"), ("routing", dict(centroids=np.ones((1, 2, 12), np.float32)), ValueError, "centroids: expected width D"),
       ("routing", dict(centroids=np.ones((1, 2, 13), np.float32), return_lse=True), ValueError, "return_lse: expected False"),
       ("routing", dict(centroids=np.ones((1, 2, 13), np.float32), normalize="batch"), ValueError, "normalize: expected one of")]


@pytest.mark.parametrize("system, options, error, says", BAD, ids=range(len(BAD)))
def test_bad_arguments(system, options, error, says, rng):
    q, k, v, _ = made(rng, "ragged")
    with pytest.raises(error, match=says):
        getattr(st, system)(**dict(q=q, k=k, v=v) | options)


def test_what_rotations_say_is_not_asked_for_again(rng):
    with pytest.raises(ValueError, match="n_buckets: expected None beside rotations, got 8"):
        st.lsh_buckets(normal(rng, (1, 1, 4, 8), np.float32), rotations=normal(rng, (1, 8, 1, 2), np.float32), n_buckets=8)


@pytest.mark.parametrize("system", SMALL)
def test_arguments_of_the_attention_are_checked_before_the_choice(system, rng):
    q, k, v, _ = made(rng, "ragged")
    for options, says in ((dict(kv_length=np.array([3.0])), "kv_length: expected element type int32"), (dict(backend="cuda"), "backend: expected one of")):
        with pytest.raises((TypeError, ValueError), match=says):
            getattr(st, system)(q, k, v, **options)
    with pytest.raises(ValueError, match="k: expected width D of q"):
        getattr(st, system)(q, k[..., 1:], v)
    assert getattr(st, system)(q, k[:, :, :0], v[:, :, :0]).shape == (1, 2, 7, 9), "no keys: zeros"
