"""PyTorch: registered operators, fake kernels, autograd, torch.compile(fullgraph=True), strides, on the CPU."""
import numpy as np
import pytest
import torch

import sparsetile as st
from sparsetile.autotune import numeric
from sparsetile.ops import attention, dispatch, torch_attention
from sparsetile.ops import latent as latent_op

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
    rule, tables = torch_attention.encode(checked.rule)
    arguments = (*inputs[:3], rule, tables, inputs[3], None, None, S - T, 0.2, 0.0, DV, True, "", "")
    torch.library.opcheck(torch.ops.sparsetile.attention.default, arguments)


def test_opcheck_of_the_other_operators(rng):
    make = lambda *shape: torch.from_numpy(rng.standard_normal(shape).astype(np.float32))  # noqa: E731
    ops = torch.ops.sparsetile
    torch.library.opcheck(ops.merge.default, ([make(1, 2, 5, 8).requires_grad_(), make(1, 2, 5, 8)], [make(1, 2, 5), make(1, 2, 5)], make(2), "", ""))
    torch.library.opcheck(ops.weighted_sum.default, (leaves([make(1, 2, 5, 8), make(1, 2, 5, 8)]), [make(1, 2, 5).requires_grad_(), make(1, 2, 5, 2)[..., 1]], ""))
    window = (None, True, None, 11, None, None, "relu", "", "")
    torch.library.opcheck(ops.indexer_scores.default, (*leaves([make(1, 2, 5, 8), make(1, 16, 8), make(1, 2, 5)]), *window))
    select = 4, 1, 0, 0, True, *window
    torch.library.opcheck(ops.indexer_topk.default, (make(1, 2, 5, 8), make(1, 16, 8), make(1, 2, 5), *select))
    basic = "test_schema", "test_autograd_registration", "test_faketensor"  # the rest of opcheck adds all outputs into the first, an integer here
    torch.library.opcheck(ops.indexer_topk.default, (*leaves([make(1, 2, 5, 8), make(1, 16, 8), make(1, 2, 5)]), *select), test_utils=basic)
    torch.library.opcheck(ops.topk.default, (make(1, 5, 16), 4, None, None, "", ""))
    torch.library.opcheck(ops.latent_decompress.default, (*leaves([make(1, 7, 16), make(2, 16, 8), make(2, 16, 4), make(1, 7, 4)]), None, "", ""))
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


def test_other_lengths_compile_whole_too(rng):
    """The second length makes torch.compile keep lengths as symbols; the mode of latents is chosen, and blocks are, with no number at hand."""
    make = lambda *shape: torch.from_numpy(rng.standard_normal(shape).astype(np.float32))  # noqa: E731
    small = dict(block=8, stride=4, select_block=16, top_k=4, window=12)
    cases = {"latent": (lambda T, S: (make(1, 4, T, 16), make(1, 4, T, 8), make(1, S, 32), make(1, S, 8), make(4, 32, 16), make(4, 32, 12)), lambda *x: st.latent_attention(*x, st.Causal())),
             "NSA": (lambda T, S: (make(1, 4, T, 16), make(1, 2, S, 16), make(1, 2, S, 16), make(1, 4, T, 3)), lambda *x: st.native_sparse_attention(*x, **small))}
    for name, (inputs, call) in cases.items():
        torch.compiler.reset()
        compiled = torch.compile(call, fullgraph=True, backend="eager")
        for T, S in ((4, 40), (5, 41)):
            x = inputs(T, S)
            numeric.assert_same_bits(f"{name} {T} x {S}", call(*x), compiled(*x))


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


def test_gradients_of_a_merge_do_not_read_empty_parts(rng):
    outs, lses = torch.from_numpy(rng.standard_normal((2, 1, 2, 5, 4)).astype(np.float32)), torch.from_numpy(rng.standard_normal((2, 1, 2, 5)).astype(np.float32))
    outs[1, :, :, 2:], lses[1, :, :, 2:], lses[0, :, :, 4] = torch.nan, -torch.inf, -torch.inf
    x = leaves([*outs, *lses])
    out, lse = st.merge_attention(x[:2], x[2:])
    (out.square().sum() + torch.where(torch.isfinite(lse), lse, 0).sum()).backward()
    assert torch.isfinite(out).all() and all(torch.isfinite(g.grad).all() for g in x) and all((g.grad[:, :, 2:] == 0).all() for g in x[1::2])


def test_missing_gradients_are_refused_in_words(rng):
    make = lambda *shape: torch.from_numpy(rng.standard_normal(shape).astype(np.float32))  # noqa: E731
    scores = st.indexer_scores(make(1, 2, 3, 4).to(torch.float8_e4m3fn), make(1, 5, 4).to(torch.float8_e4m3fn), make(1, 2, 3).requires_grad_(), causal=False)
    with pytest.raises(st.Unsupported, match="gradient"):
        scores.sum().backward()


def test_modes_that_watch_operators_see_ours(tensors, rules):
    """An eager call that nobody watches goes past its operator; the bits are the same."""
    from torch.utils._python_dispatch import TorchDispatchMode
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))
    straight = grads(call, tensors, rules["pattern"])
    with Watch():
        for a, b in zip(straight, grads(call, tensors, rules["pattern"])):
            numeric.assert_same_bits("gradient", a, b)
    assert {"sparsetile.attention.default", "sparsetile.attention_backward.default"} <= {*seen}


def test_gradients_of_gradients_are_refused_in_words(rng):
    """torch's answer for an operator without a formula is a warning, and 0."""
    make = lambda *shape: torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).requires_grad_()  # noqa: E731
    calls = {"pattern": lambda q: st.sparse_attention(q, q, q, st.Causal()), "selection": lambda q: st.sparse_attention(q, q, q, st.Selection(torch.zeros(1, 1, 5, 2, dtype=torch.int32))),
             "indexer": lambda q: st.indexer_scores(q, make(1, 7, 8), make(1, 2, 5), causal=False), "chosen": lambda q: st.indexer_topk(q, make(1, 7, 8), make(1, 2, 5), 3, causal=False, return_scores=True)[1],
             "absorbed": lambda q: st.latent_attention(q, None, make(1, 7, 16), None, make(2, 16, 8), make(2, 16, 8), mode="absorbed"),
             "decompressed": lambda q: st.latent_attention(make(1, 2, 5, 8), None, q[:, 0].repeat(1, 1, 2), None, make(2, 16, 8), make(2, 16, 8), mode="decompressed")}
    for name, call in calls.items():
        q = make(1, 2, 5, 8)
        once, = torch.autograd.grad(call(q).square().sum(), q, create_graph=True)
        with pytest.raises(st.Unsupported, match="gradients of gradients.*; leave create_graph"):
            once.sum().backward()
            pytest.fail(name)


@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_transforms_are_refused_in_words(tensors, transform):
    q, k, v, _ = tensors
    call = lambda q: st.sparse_attention(q, k, v, st.Causal()).sum()  # noqa: E731
    call(q)                                                                            # a call of its like is known already
    with pytest.raises(st.Unsupported, match=r"torch.func.*not supported.*; batch along B"):
        torch.func.grad(call)(q) if transform == "grad" else torch.vmap(call)(torch.stack([q, q]))


def test_a_config_is_obeyed_where_a_gradient_is_wanted(rng):
    make = lambda *shape: torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).requires_grad_()  # noqa: E731
    calls = (lambda **o: st.merge_attention([make(1, 2, 5, 8)], [make(1, 2, 5)], **o), lambda **o: st.topk(make(1, 5, 9), 3, **o),
             lambda **o: st.latent_decompress(make(1, 7, 16), make(2, 16, 8), make(2, 16, 4), **o), lambda **o: st.indexer_scores(make(1, 2, 5, 8), make(1, 7, 8), make(1, 2, 5), **o),
             lambda **o: st.indexer_topk(make(1, 2, 5, 8), make(1, 7, 8), make(1, 2, 5), 3, **o), lambda **o: st.sparse_attention(*[make(1, 2, 5, 8)] * 3, **o))
    for call in calls:
        assert call(config={}) is not None
        with pytest.raises(ValueError, match="config: expected knobs of .*'no_such_knob'"):
            call(config={"no_such_knob": 1})


def test_gradients_are_rounded_once(monkeypatch, rng):
    """Parts of a layout, and both roles of shared keys, are summed in float32."""
    kernel, asked = dispatch.kernel("reference", "block_attention_backward"), []
    run = kernel.run
    monkeypatch.setattr(kernel, "run", lambda *a, out_dtype=None, deterministic=None, **o: asked.append((out_dtype, deterministic)) or run(*a, out_dtype=out_dtype, **o))
    q, k, v = torch.from_numpy(rng.standard_normal((3, 1, 1, 512, 8)).astype(np.float32)).bfloat16()
    fine = st.Causal() & (st.Window(1) | st.Strided(16))
    assert len(fine.layout(512, 512, 64, 64).parts) > 1
    for rule, value, several in ((st.Causal(), v, False), (fine, v, True), (st.Causal(), None, True)):
        asked.clear()
        x = leaves([q, k])
        st.sparse_attention(*x, value, rule, value_width=None if value is not None else 5, deterministic=several, backend="reference").sum().backward()
        assert set(asked) == {("float32" if several else None, several)} and x[0].grad.dtype == torch.bfloat16, rule


@pytest.mark.parametrize("where", ["side by side", "apart", "overlapping"])
def test_latents_beside_their_rotary_parts_are_read_in_place(rng, where):
    """One array may hold both, in any strides: taken for one only where it is one."""
    make = lambda *shape: torch.from_numpy(rng.standard_normal(shape).astype(np.float32))  # noqa: E731
    q, rope, w_uk, w_uv, memory = make(1, 2, 5, 8), make(1, 2, 5, 4), make(2, 16, 8), make(2, 16, 6), make(1, 7, 20)
    latent, k_rope = {"side by side": (memory[..., :16], memory[..., 16:]), "apart": (make(1, 7, 16), make(1, 7, 4)),
                      "overlapping": (memory.view(-1)[:112].view(1, 7, 16), memory.view(-1)[16:44].view(1, 7, 4))}[where]
    joined = latent_op._joined(latent, k_rope, "torch", None)
    assert torch.equal(joined, torch.cat((latent, k_rope), -1)) and (joined.data_ptr() == latent.data_ptr()) == (where == "side by side")
    call = lambda c, r: st.latent_attention(q, rope, c, r, w_uk, w_uv, st.Causal(), mode="absorbed")  # noqa: E731
    numeric.assert_same_bits(where, call(latent, k_rope), call(latent.clone(), k_rope.clone()))


def test_transposed_views_are_read_in_place(tensors):
    q, k, v, _ = tensors
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    numeric.assert_same_bits("out", st.sparse_attention(q, k, v, st.Causal()), st.sparse_attention(*views, st.Causal()))


def test_results_are_torch_tensors_of_q_s_type(tensors):
    q, k, v, _ = (x.bfloat16() for x in tensors)
    out, lse = st.sparse_attention(q, k, v, st.Causal(), return_lse=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32 and out.device == q.device
