"""PyTorch's tensors that are more than their memory: lazily negated, zeros without memory, with a tangent, in a batch that vmap runs over. Right, or refused in words."""
import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad

import sparsetile as st
from sparsetile.autotune import numeric
from sparsetile.backends import arrays
from sparsetile.ops.merge import weighted_sum

SELECTION = st.Selection(torch.tensor([[[[0, 2], [1, -1], [3, 0], [4, 2], [0, 1]]]], dtype=torch.int32))
ATTENTION = lambda rule: lambda q, k, v: st.sparse_attention(q, k, v, rule)  # noqa: E731
OPS = {  # shapes of the differentiable inputs; the call
    "pattern": (((1, 2, 5, 8),) * 3, ATTENTION(st.Causal())), "selection": (((1, 2, 5, 8),) * 3, ATTENTION(SELECTION)), "layout": (((1, 2, 5, 8),) * 3, ATTENTION(st.Causal().layout(5, 5, 32, 32))),
    "lse": (((1, 2, 5, 8),) * 3, lambda q, k, v: st.sparse_attention(q, k, v, st.Causal(), return_lse=True)[1]),
    "sink": (((1, 2, 5, 8), (1, 2, 5, 8), (2,)), lambda q, k, sink: st.sparse_attention(q, k, k, st.Causal(), sink_logits=sink)),
    "scores": (((1, 2, 5, 8), (1, 7, 8), (1, 2, 5)), lambda q, k, w: st.indexer_scores(q, k, w, causal=False)),
    "chosen": (((1, 2, 5, 8), (1, 7, 8), (1, 2, 5)), lambda q, k, w: st.indexer_topk(q, k, w, 3, causal=False, return_scores=True)[1]),
    "decompressed": (((1, 7, 16), (2, 16, 8), (2, 16, 4), (1, 7, 4)), lambda c, uk, uv, rope: torch.cat(st.latent_decompress(c, uk, uv, k_rope=rope), -1)),
    "absorbed": (((1, 2, 5, 8), (1, 2, 5, 4), (1, 7, 20), (2, 16, 8), (2, 16, 6)),
                 lambda q, rope, c, uk, uv: st.latent_attention(q, rope, c[..., :16], c[..., 16:], uk, uv, mode="absorbed")),
    "merge": (((1, 2, 5, 8), (1, 2, 5, 8), (1, 2, 5), (1, 2, 5)), lambda a, b, x, y: st.merge_attention([a, b], [x, y])[0]),
    "weighted": (((1, 2, 5, 8), (1, 2, 5, 8), (1, 2, 5), (1, 2, 5)), lambda a, b, x, y: weighted_sum([a, b], [x, y])),
}
CHOICES = {"topk": (((1, 5, 9),), lambda x: st.topk(x, 3).indices), "importance": (((1, 2, 5, 8), (1, 1, 3, 8), (1, 2, 5)), lambda q, k, lse: st.importance_topk(
    q, k, lse, 2, block=4, stride=2, select_block=4, keys=8, force_first=0, force_last=1).indices)}


def made(rng, op):
    shapes, call = {**OPS, **CHOICES}[op]
    return [torch.from_numpy(rng.standard_normal(shape).astype(np.float32)) for shape in shapes], call


def strange(kind, x):
    """A tensor that reads as x (of zeros as 0), and a plain one of the same values."""
    if kind == "negated":
        return torch._neg_view(x), -x
    return torch._efficientzerotensor(x.shape, dtype=x.dtype, device=x.device), torch.zeros_like(x)


@pytest.mark.parametrize("kind", ["negated", "zeros"])
@pytest.mark.parametrize("op", OPS)
def test_gradients_of_outputs_may_be_lazy(rng, op, kind):
    inputs, call = made(rng, op)
    leaves = [x.requires_grad_() for x in inputs]
    lazy, plain = strange(kind, torch.ones_like(call(*leaves)))
    got, want = (torch.autograd.grad(call(*leaves), leaves, dout, allow_unused=True) for dout in (lazy, plain))
    for a, b in zip(got, want):
        assert (a is None) == (b is None)
        if a is not None:
            numeric.assert_same_bits(op, arrays.held(a) + 0, b + 0)  # torch's own products keep zeros without memory, and those have no sign


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", ["negated", "zeros"])
@pytest.mark.parametrize("op", [*OPS, *CHOICES])
def test_inputs_may_be_lazy(rng, op, kind, grad):
    """Each of them in turn, also where a call of its like is known already."""
    inputs, call = made(rng, op)
    for n, x in enumerate(inputs):
        lazy, plain = ([(y.detach().requires_grad_() if grad and m != n else y) for m, y in enumerate([*inputs[:n], one, *inputs[n + 1:]])] for one in strange(kind, x))
        assert lazy[n].is_neg() or lazy[n]._is_zerotensor()
        want = call(*plain)
        for _ in range(2):
            numeric.assert_same_bits(f"{op}, input {n}", call(*lazy), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_both_gradients_of_attention_may_be_lazy(rng, dtype):
    """dout and dlse, of any type, in memory of any order."""
    q, k, v = (torch.from_numpy(rng.standard_normal((1, 5, 2, 8))).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3))
    outputs = st.sparse_attention(q, k, v, st.Window(2), return_lse=True)
    for kinds in (("negated", "negated"), ("zeros", "negated"), ("negated", "zeros")):
        lazy, plain = zip(*(strange(kind, torch.ones_like(x)) for kind, x in zip(kinds, outputs)))
        for a, b in zip(*(torch.autograd.grad(outputs, (q, k, v), douts, retain_graph=True) for douts in (lazy, plain))):
            numeric.assert_same_bits(str(kinds), a, b)


def test_a_part_of_a_conjugate_is_read_by_its_values(rng):
    q, k, v = (torch.from_numpy(rng.standard_normal((1, 2, 5, 8)).astype(np.float32)) for _ in range(3))
    negated = torch.complex(q, -q).conj().imag
    assert negated.is_neg()
    numeric.assert_same_bits("imag", st.sparse_attention(negated, k, v, st.Causal()), st.sparse_attention(q, k, v, st.Causal()))


def test_memory_that_is_written_in_place_must_hold_its_values():
    pool, table, lengths = torch.zeros(2, 8, 24), torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    for bad in (torch._neg_view(pool), torch._efficientzerotensor(pool.shape)):
        with pytest.raises(TypeError, match="^pool: expected .* written in place, got a lazily negated view or zeros without memory; clone it first"):
            st.PagedLatent(bad, table, lengths, rank=16, rotary=8)


def test_plain_tensors_are_held_as_they_are(rng):
    x = torch.ones(3, 4)[:, ::2]
    assert arrays.held(x) is x


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_nested_tensors_are_refused(rng):
    q, k, v = (torch.ones(2, 2, 5, 8) for _ in range(3))
    for layout in (torch.strided, torch.jagged):
        with pytest.raises(TypeError, match="^q: expected a dense array"):
            st.sparse_attention(torch.nested.nested_tensor(list(q), layout=layout), k, v, st.Causal())


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("op", [*OPS, *CHOICES])
def test_a_tangent_is_refused_not_dropped(rng, op, grad):
    """Of each input in turn, also where a call of its like is known already; without a tangent a call is served at a level of forward-mode AD too."""
    inputs, call = made(rng, op)
    leaves = [x.requires_grad_(grad) for x in inputs]
    want = call(*leaves)
    with forward_ad.dual_level():
        numeric.assert_same_bits("no tangent", call(*leaves), want)
        for n, x in enumerate(leaves):
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            with pytest.raises(st.Unsupported, match="^forward-mode AD .* is not supported by any backend; take gradients with torch.autograd, in reverse"):
                call(*leaves[:n], dual, *leaves[n + 1:])
    numeric.assert_same_bits("after", call(*leaves), want)


def test_tangents_of_scales_are_refused(rng):
    q, k, w = (torch.from_numpy(rng.standard_normal(shape).astype(np.float32)) for shape in ((1, 2, 5, 8), (1, 7, 8), (1, 2, 5)))
    c, uk, uv = (torch.from_numpy(rng.standard_normal(shape).astype(np.float32)) for shape in ((1, 7, 128), (2, 128, 8), (2, 128, 4)))
    coded, scale = torch.ones(1, 2, 5, 16).to(torch.float8_e4m3fn), torch.ones(1, 2, 1)
    calls = {"scores": lambda s: st.indexer_scores(q, k, w, k_scale=s[:, 0].expand(1, 7)), "chosen": lambda s: st.indexer_topk(q, k, w, 3, k_scale=s[:, 0].expand(1, 7)),
             "latent": lambda s: st.latent_decompress(c, uk, uv, latent_scale=s[:, :1].expand(1, 7, 1)),
             "attention": lambda s: st.sparse_attention(coded, coded, coded, st.Causal(), q_scale=torch.ones(1, 2, 5), k_scale=s, v_scale=scale)}
    for name, call in calls.items():
        call(scale)
        with forward_ad.dual_level(), pytest.raises(st.Unsupported, match="^forward-mode AD"):
            call(forward_ad.make_dual(scale, torch.ones_like(scale)))
            pytest.fail(name)


BATCHES = "^gradients of a batch of outputs' gradients at once .*; call torch.autograd.grad for one at a time, or jacobian with vectorize=False"


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("how", ["is_grads_batched", "vmap"])
@pytest.mark.parametrize("op", OPS)
def test_batches_of_gradients_are_right_or_refused(rng, op, how):
    inputs, call = made(rng, op)
    leaves = [x.requires_grad_() for x in inputs]
    out = call(*leaves)
    douts = torch.from_numpy(rng.standard_normal((2, *out.shape)).astype(np.float32))
    back = lambda dout: torch.autograd.grad(out, leaves, dout, retain_graph=True)  # noqa: E731
    try:
        got = torch.autograd.grad(out, leaves, douts, is_grads_batched=True, retain_graph=True) if how == "is_grads_batched" else torch.func.vmap(back)(douts)
    except st.Unsupported as error:
        assert str(error).startswith(("gradients of a batch", "a call inside torch.func"))
        return
    for n, dout in enumerate(douts):
        for a, b in zip(got, back(dout)):
            numeric.assert_same_bits(op, a[n], b)


@pytest.mark.parametrize("op", ["pattern", "selection", "layout", "lse", "absorbed"])
def test_a_jacobian_is_refused_in_a_batch_and_made_one_by_one(rng, op):
    inputs, call = made(rng, op)
    jacobian = lambda **o: torch.autograd.functional.jacobian(lambda q: call(q, *inputs[1:]).square().sum((0, 1, 3) if op != "lse" else (0, 1)), inputs[0], **o)  # noqa: E731
    with pytest.raises(st.Unsupported, match=BATCHES):
        jacobian(vectorize=True)
    assert jacobian().shape == (5, *inputs[0].shape)


def test_a_cache_is_made_in_a_compiled_function():
    """torch.compile cannot ask what memory holds; it does not have to."""
    made = lambda k, v, table, lengths: st.PagedKV(k, v, table, lengths).lengths + 1  # noqa: E731
    k, table, lengths = torch.zeros(3, 4, 2, 8), torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([5], dtype=torch.int32)
    assert torch.equal(torch.compile(made, fullgraph=True, backend="eager")(k, k, table, lengths), made(k, k, table, lengths))
