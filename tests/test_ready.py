"""Calls that came before (ops/ready.py): the short way gives what the long way gives, and only where nothing that matters changed."""
import pytest

torch = pytest.importorskip("torch")

import sparsetile as st  # noqa: E402
from sparsetile.ops import dispatch, ready  # noqa: E402

RULE = st.Window(5) | st.Sink(2)


def tensors(seed=0, Dv=24, **kind):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, **kind) for shape in ((2, 4, 9, 16), (2, 2, 13, 16), (2, 2, 13, Dv))]


@pytest.fixture(autouse=True)
def forgotten():
    dispatch.clear_plans()
    yield
    dispatch.clear_plans()


def count(monkeypatch):
    """How many calls took the long way."""
    from sparsetile.ops import attention
    long, check = [], attention.check
    monkeypatch.setattr(attention, "check", lambda *a, **k: long.append(1) or check(*a, **k))
    return long


def test_the_second_call_is_short_and_reads_its_own_memory(monkeypatch):
    long = count(monkeypatch)
    st.sparse_attention(*tensors(0), RULE)
    got = st.sparse_attention(*tensors(1), RULE)
    assert len(long) == 1
    assert torch.equal(got, st.sparse_attention(*tensors(1), RULE, backend="numba")) and len(long) == 2


CHANGES = {
    "pattern": dict(pattern=st.Window(6)), "scale": dict(scale=0.5), "softcap": dict(softcap=3.0), "sink": dict(sink_logits=torch.zeros(4)), "lengths": dict(kv_length=torch.tensor([3, 9], dtype=torch.int32)),
    "start": dict(q_start=2), "backend": dict(backend="reference"), "lse": dict(return_lse=True), "shared": dict(v=None, value_width=8),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_the_answer_changes_the_key(name):
    q, k, v = tensors()
    plain = st.sparse_attention(q, k, v, RULE)
    call = dict(v=v, pattern=RULE) | CHANGES[name]
    first = st.sparse_attention(q, k, **call)
    second = st.sparse_attention(q, k, **call)  # the short way
    if name == "lse":
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1]) and torch.equal(first[0], plain)
    else:
        assert torch.equal(first, second) and (name == "backend" or first.shape != plain.shape or not torch.equal(first, plain))


def test_lengths_are_read_anew():
    q, k, v = tensors()
    lengths = torch.tensor([3, 9], dtype=torch.int32)
    st.sparse_attention(q, k, v, RULE, kv_length=lengths)
    lengths[:] = torch.tensor([13, 1], dtype=torch.int32)
    got = st.sparse_attention(q, k, v, RULE, kv_length=lengths)
    dispatch.clear_plans()
    assert torch.equal(got, st.sparse_attention(q, k, v, RULE, kv_length=lengths))


def test_strides_and_types_are_of_the_key(monkeypatch):
    long = count(monkeypatch)
    q, k, v = tensors()
    st.sparse_attention(q, k, v, RULE)
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(st.sparse_attention(turned, k, v, RULE), st.sparse_attention(q, k, v, RULE)) and len(long) == 2
    assert st.sparse_attention(q.double(), k.double(), v.double(), RULE).dtype == torch.float64 and len(long) == 3


def test_errors_gradients_and_explanations_take_the_long_way(monkeypatch):
    q, k, v = tensors()
    st.sparse_attention(q, k, v, RULE, return_lse=True)
    with pytest.raises(TypeError, match="return_lse"):
        st.sparse_attention(q, k, v, RULE, return_lse=1)
    with pytest.raises(ValueError, match="q_scale"):
        st.sparse_attention(q, k, v, RULE, return_lse=True, q_scale=torch.ones(2, 4, 9))
    with pytest.raises(ValueError, match="out_dtype"):
        st.sparse_attention(q, k, v, RULE, return_lse=True, out_dtype="float16")
    assert st.sparse_attention(q.requires_grad_(), k, v, RULE, return_lse=True)[0].requires_grad
    with torch.no_grad():
        assert not st.sparse_attention(q, k, v, RULE, return_lse=True)[0].requires_grad
    q = q.detach()
    assert st.explain("sparse_attention", q, k, v, RULE).kernel == "block_attention"


def test_the_environment_is_of_the_key(monkeypatch):
    q, k, v = tensors()
    st.sparse_attention(q, k, v, RULE)
    monkeypatch.setenv("SPARSETILE_BACKEND", "cupy")
    with pytest.raises(st.Unsupported):
        st.sparse_attention(q, k, v, RULE)
    monkeypatch.setenv("SPARSETILE_BACKEND_SPARSE_ATTENTION", "reference")
    assert st.sparse_attention(q, k, v, RULE).shape == q.shape[:3] + (24,)


def test_shapes_that_come_and_go_are_forgotten(monkeypatch):
    monkeypatch.setattr(ready, "MOST", 4)
    q, k, v = tensors()
    for T in range(1, 9):
        st.sparse_attention(q[:, :, :T], k, v, RULE)
    assert len(ready._calls) <= 4


def chosen(seed=0, T=9, **how):
    g = torch.Generator().manual_seed(seed)
    return st.Selection(torch.randint(-1, 14, (2, 2, T, 5), generator=g, dtype=torch.int32), **how)


def test_selections_are_short_too_and_their_entries_are_read_anew(monkeypatch):
    long, (q, k, v) = count(monkeypatch), tensors()
    lengths = torch.full((2, 2, 9), 3, dtype=torch.int32)
    changes = [dict(), dict(causal=True), dict(granularity=3), dict(lengths=lengths), dict(distinct=True)]
    for how in changes:
        st.sparse_attention(q, k, v, chosen(0, **how), return_lse=True)
    assert len(long) == len(changes)
    for how in changes:
        got = st.sparse_attention(q, k, v, chosen(1, **how), return_lse=True)
        assert len(long) == len(changes)
        want = st.sparse_attention(*(x.numpy() for x in (q, k, v)), st.Selection(chosen(1).indices.numpy(), how.get("granularity", 1), lengths.numpy() if "lengths" in how else None, "causal" in how), return_lse=True)
        assert all(torch.equal(x, torch.from_numpy(y)) for x, y in zip(got, want))
        del long[len(changes):]
    with pytest.raises(ValueError, match="T = 9"):
        st.sparse_attention(q, k, v, chosen(T=8))
    st.sparse_attention(q, k, v, chosen() & st.Window(3))
    st.sparse_attention(q, k, v, chosen() & st.Window(3))
    assert len(long) == len(changes) + 3


def test_importance_and_weighted_sums(monkeypatch):
    """Positions that the host knows, and such as stand on the device and are read anew."""
    from sparsetile.ops import importance, merge
    q, k, _ = tensors()
    lse, long, check = torch.rand(2, 4, 9) + 3, [], importance.check
    monkeypatch.setattr(importance, "check", lambda *a, **more: long.append(1) or check(*a, **more))
    how = dict(block=4, stride=2, select_block=4, force_last=1)
    for more in (dict(), dict(q_start=3), dict(return_scores=True), dict(kv_length=True), dict(q_start=True)):
        put = lambda seed: {name: torch.tensor([5 + seed, 20 - seed], dtype=torch.int32) if value is True and name != "return_scores" else value for name, value in more.items()}  # noqa: B023, E731
        st.importance_topk(q, k, lse, 3, **how, **put(0))
        before = len(long)
        got = st.importance_topk(q.flip(0), k, lse, 3, **how, **put(2))
        assert len(long) == before
        dispatch.clear_plans()
        want = st.importance_topk(q.flip(0), k, lse, 3, **how, **put(2))
        assert len(long) == before + 1
        (a, *scores), (b, *right) = (x if "return_scores" in more else (x,) for x in (got, want))
        assert torch.equal(a.indices, b.indices) and torch.equal(a.lengths, b.lengths) and all(map(torch.equal, scores, right))
    with pytest.raises(TypeError, match="return_scores"):
        st.importance_topk(q, k, lse, 3, **how, return_scores=1)
    whole, gates = q.round(), (torch.arange(144.0).reshape(2, 4, 9, 2) / 8).unbind(-1)  # products and sums that are exact
    merge.weighted_sum((whole, whole), gates)
    assert torch.equal(merge.weighted_sum((whole, whole + 1), gates[::-1]), whole * gates[1][..., None] + (whole + 1) * gates[0][..., None])
