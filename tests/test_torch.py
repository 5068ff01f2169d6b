"""PyTorch: registered operators, fake kernels, autograd, torch.compile(fullgraph=True), strides, on the CPU."""
import numpy as np
import pytest
import torch

import sparsetile as st
from sparsetile.autotune import numeric
from sparsetile.ops import attention, torch_ops

B, HQ, HK, T, S, D, DV = 2, 4, 2, 45, 70, 24, 20


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()  # each case is another constant; the limit on recompilations is for programs


@pytest.fixture
def tensors(rng):
    make = lambda *shape: torch.from_numpy(rng.standard_normal(shape).astype(np.float32))  # noqa: E731
    return make(B, HQ, T, D), make(B, HK, S, D), make(B, HK, S, DV), make(HQ)


@pytest.fixture
def rules(rng):
    indices = np.stack([rng.choice(S, 9, replace=False) for _ in range(B * T)]).reshape(B, 1, T, 9).astype(np.int32)
    pattern = st.Window(16) | st.Sink(3)
    return {"pattern": pattern, "selection": st.Selection(torch.from_numpy(indices), causal=True), "layout": pattern.layout(T, S, 32, 32),
            "documents": st.Documents([30, 40]) & st.Causal(), "fine": st.Causal() & (st.Window(8) | st.Strided(8)), "per head": st.PerHead([st.Causal(), st.Window(5)])}


RULES = ("pattern", "selection", "layout", "documents", "fine", "per head")


def call(q, k, v, sink, rule):
    return st.sparse_attention(q, k, v, rule, sink_logits=sink, return_lse=True)


def leaves(tensors):
    return [x.clone().requires_grad_() for x in tensors]


def grads(function, tensors, rule):
    inputs = leaves(tensors)
    out, lse = function(*inputs, rule)
    (out.square().sum() + torch.where(lse > -1e30, lse, 0).sum()).backward()
    return [x.grad for x in inputs]


@pytest.mark.parametrize("name", RULES)
def test_compiles_whole_and_gives_the_same_bits(tensors, rules, name):
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for a, b in zip(call(*tensors, rules[name]), compiled(*tensors, rules[name])):
        numeric.assert_same_bits(name, a, b)
    for a, b in zip(grads(call, tensors, rules[name]), grads(compiled, tensors, rules[name])):
        numeric.assert_same_bits(name, a, b)


@pytest.mark.parametrize("name", RULES)
def test_opcheck(tensors, rules, name):
    inputs = leaves(tensors)
    checked = attention.check(*inputs[:3], rules[name], None, inputs[3], None, None, None, None, True, None, None)
    rule, tables = torch_ops.encode(checked.rule)
    arguments = (*inputs[:3], rule, tables, inputs[3], None, None, S - T, 0.2, 0.0, DV, True, "", "")
    torch.library.opcheck(torch.ops.sparsetile.attention.default, arguments)


def test_opcheck_of_the_other_operators(rng):
    make = lambda *shape: torch.from_numpy(rng.standard_normal(shape).astype(np.float32))  # noqa: E731
    ops = torch.ops.sparsetile
    torch.library.opcheck(ops.merge.default, ([make(1, 2, 5, 8).requires_grad_(), make(1, 2, 5, 8)], [make(1, 2, 5), make(1, 2, 5)], make(2), ""))
    torch.library.opcheck(ops.weighted_sum.default, (leaves([make(1, 2, 5, 8), make(1, 2, 5, 8)]), [make(1, 2, 5).requires_grad_(), make(1, 2, 5, 2)[..., 1]], ""))
    window = (None, True, None, 11, None, None, "relu", "", "")
    torch.library.opcheck(ops.indexer_scores.default, (*leaves([make(1, 2, 5, 8), make(1, 16, 8), make(1, 2, 5)]), *window))
    select = 4, 1, 0, 0, True, *window
    torch.library.opcheck(ops.indexer_topk.default, (make(1, 2, 5, 8), make(1, 16, 8), make(1, 2, 5), *select))
    basic = "test_schema", "test_autograd_registration", "test_faketensor"  # the rest of opcheck adds all outputs into the first, an integer here
    torch.library.opcheck(ops.indexer_topk.default, (*leaves([make(1, 2, 5, 8), make(1, 16, 8), make(1, 2, 5)]), *select), test_utils=basic)
    torch.library.opcheck(ops.topk.default, (make(1, 5, 16), 4, None, None, ""))
    torch.library.opcheck(ops.latent_decompress.default, (*leaves([make(1, 7, 16), make(2, 16, 8), make(2, 16, 4), make(1, 7, 4)]), None, ""))
    torch.library.opcheck(ops.grouped_matmul.default, (*leaves([make(1, 2, 5, 8), make(2, 6, 8), make(1, 2, 5, 3)]), ""))


def test_every_op_compiles_whole(rng):
    make = lambda *shape: torch.from_numpy(rng.standard_normal(shape).astype(np.float32))  # noqa: E731
    q, k, w = make(1, 4, 20, 16), make(1, 40, 16), make(1, 4, 20)
    latent, w_uk, w_uv, rope = make(1, 40, 32), make(4, 32, 16), make(4, 32, 12), make(1, 40, 8)
    cases = {
        "indexer_scores": lambda: st.indexer_scores(q, k, w),
        "indexer_topk": lambda: st.indexer_topk(q, k, w, 7).indices,
        "topk": lambda: st.topk(make_scores, 5).indices,
        "latent_decompress": lambda: st.latent_decompress(latent, w_uk, w_uv, k_rope=rope)[0],
        "absorbed": lambda: st.latent_attention(q, make_rope, latent, rope, w_uk, w_uv, causal, mode="absorbed"),
        "decompressed": lambda: st.latent_attention(q, make_rope, latent, rope, w_uk, w_uv, causal, mode="decompressed"),
        "merge": lambda: st.merge_attention([q, q], [lse, lse])[0],
    }
    make_scores, make_rope, lse, causal = make(1, 6, 30), make(1, 4, 20, 8), make(1, 4, 20), st.Causal()
    for name, function in cases.items():
        numeric.assert_same_bits(name, function(), torch.compile(function, fullgraph=True, backend="aot_eager")())


def test_gradients_of_indexer_and_latent_compile_whole(rng):
    make = lambda *shape: torch.from_numpy(rng.standard_normal(shape).astype(np.float32))  # noqa: E731
    q, k, w = make(1, 4, 20, 16), make(1, 40, 16), make(1, 4, 20)
    latent = make(1, 4, 20, 8), make(1, 40, 32), make(1, 40, 8), make(4, 32, 16), make(4, 32, 12)
    cases = {"indexer_scores": ((q, k, w), lambda *x: torch.where(torch.isfinite(y := st.indexer_scores(*x)), y, 0)), "indexer_topk": ((q, k, w), lambda *x: st.indexer_topk(*x, 5, return_scores=True)[1]),
             "absorbed": ((q, *latent), lambda *x: st.latent_attention(*x, st.Causal(), mode="absorbed")),
             "decompressed": ((q, *latent), lambda *x: st.latent_attention(*x, st.Causal(), mode="decompressed"))}
    for name, (inputs, function) in cases.items():
        got, again = ([torch.autograd.grad(f(*x).square().sum(), x) for x in [leaves(inputs)]][0] for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")))
        for a, b in zip(got, again):
            numeric.assert_same_bits(name, a, b)


def test_gradients_match_sdpa(rng):
    wide = [torch.from_numpy(rng.standard_normal((1, 4, 40, 16)).astype(np.float32)).double().requires_grad_() for _ in range(3)]
    mask = torch.from_numpy(st.Causal().mask(40, 40))

    def sdpa(inputs):
        return torch.autograd.grad(torch.nn.functional.scaled_dot_product_attention(*inputs, mask).square().sum(), inputs)
    narrow = leaves([x.detach().float() for x in wide])
    got = torch.autograd.grad(st.sparse_attention(*narrow, st.Causal()).square().sum(), narrow)
    for name, a, truth, plain in zip("qkv", got, sdpa(wide), sdpa(narrow)):
        numeric.assert_close(name, a, truth.numpy(), plain, reduction=40)


def test_expanded_keys_get_gradients(rng):
    q = torch.from_numpy(rng.standard_normal((2, 4, 9, 8))).requires_grad_()
    k = torch.from_numpy(rng.standard_normal((1, 1, 9, 8))).requires_grad_()
    shared, copied = k.expand(2, 4, 9, 8), k.repeat(2, 4, 1, 1)
    got = torch.autograd.grad(st.sparse_attention(q, shared, shared, st.Causal()).square().sum(), k)[0]
    want = torch.autograd.grad(st.sparse_attention(q, copied, copied, st.Causal()).square().sum(), k)[0]
    numeric.assert_same_bits("k", got, want)


def test_only_one_gradient_wanted(tensors):
    q, k, v, sink = tensors
    v = v.clone().requires_grad_()
    st.sparse_attention(q, k, v, st.Causal(), sink_logits=sink).sum().backward()
    assert v.grad is not None and torch.isfinite(v.grad).all()


def test_shared_latent_gradient_is_the_sum_of_both_roles(rng):
    q = torch.from_numpy(rng.standard_normal((1, 4, 9, 8)))
    k = torch.from_numpy(rng.standard_normal((1, 1, 11, 8))).requires_grad_()
    got = torch.autograd.grad(st.sparse_attention(q, k, None, st.Causal(), value_width=5, backend="reference").square().sum(), k)[0]
    want = torch.autograd.grad(st.sparse_attention(q, k, k[..., :5], st.Causal(), backend="reference").square().sum(), k)[0]
    numeric.assert_close("dk", got.numpy(), want.numpy(), want.numpy(), reduction=9)


def test_merge_gradients_match_autograd_of_the_formula(rng):
    make = lambda *shape: torch.from_numpy(rng.standard_normal(shape).astype(np.float32))  # noqa: E731
    inputs = [*(make(1, 2, 5, 4) for _ in range(3)), *(make(1, 2, 5) for _ in range(3)), torch.tensor([0.3, -0.7])]

    def formula(*x):
        outs, lses, sink = x[:3], x[3:6], x[6]
        lse = torch.stack(lses).logsumexp(0)
        total = torch.logaddexp(lse, sink[:, None])
        return sum((e - total).exp()[..., None] * o for o, e in zip(outs, lses)), lse

    def ours(*x):
        return st.merge_attention(x[:3], x[3:6], sink_logits=x[6])

    def gradients(function, x):
        x = leaves(x)
        return torch.autograd.grad(sum(y.square().sum() for y in function(*x)), x)
    for n, (got, truth, plain) in enumerate(zip(gradients(ours, inputs), gradients(formula, [x.double() for x in inputs]), gradients(formula, inputs))):
        numeric.assert_close(str(n), got, truth.numpy(), plain, reduction=5)


def test_missing_gradients_are_refused_in_words(rng):
    make = lambda *shape: torch.from_numpy(rng.standard_normal(shape).astype(np.float32))  # noqa: E731
    scores = st.indexer_scores(make(1, 2, 3, 4).to(torch.float8_e4m3fn), make(1, 5, 4).to(torch.float8_e4m3fn), make(1, 2, 3).requires_grad_(), causal=False)
    with pytest.raises(st.Unsupported, match="gradient"):
        scores.sum().backward()


def test_transposed_views_are_read_in_place(tensors):
    q, k, v, _ = tensors
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    numeric.assert_same_bits("out", st.sparse_attention(q, k, v, st.Causal()), st.sparse_attention(*views, st.Causal()))


def test_results_are_torch_tensors_of_q_s_type(tensors):
    q, k, v, _ = (x.bfloat16() for x in tensors)
    out, lse = st.sparse_attention(q, k, v, st.Causal(), return_lse=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32 and out.device == q.device
