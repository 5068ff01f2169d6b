"""Native Sparse Attention against the paper's equations written out (naive_nsa.py): what is chosen, what comes out, all gradients, caches, conventions."""
import naive_nsa
import numpy as np
import oracle
import pytest
import torch
from drivers import EVERY, LARGE, arrays, numpy_dtype
from numeric import assert_close, assert_same_bits, plain

import sparsetile as st

every, cpu = pytest.mark.parametrize("backend", EVERY), pytest.mark.parametrize("backend", ["reference", "numba"])
SMALL = dict(block=8, stride=4, select_block=16, top_k=4, window=12)


def naive_names(o):
    return dict(l=o["block"], d=o["stride"], l2=o["select_block"], n=o["top_k"], window=o["window"], first=o.get("force_first", 1), last=o.get("force_last", 2), scale=o.get("scale"))


def mean(rows):
    return rows.mean(0)


def made(rng, B, Hq, Hk, T, S, D, Dv, separate=False, dtype=torch.float64):
    new = lambda *shape: torch.from_numpy(rng.standard_normal(shape)).to(dtype).requires_grad_()  # noqa: E731
    q = new(B, Hq, T, D)
    k, v = ([new(B, Hk, S, width) for _ in range(3)] if separate else [new(B, Hk, S, width)] * 3 for width in (D, Dv))
    return q, k, v, torch.from_numpy(rng.random((B, Hq, T, 3))).to(dtype).requires_grad_()


def blocks_of(selection):
    indices, lengths = arrays(selection.indices, selection.lengths)
    return [[[[int(e) for e in row[:n]] for row, n in zip(head, count)] for head, count in zip(batch, counts)] for batch, counts in zip(indices, lengths)]


def case(Hq=4, Hk=2, T=9, S=75, B=1, D=16, Dv=12, separate=False, at=None, lengths=None, **options):
    what = "-".join([f"h{Hq}:{Hk}", f"{T}x{S}", f"d{D}:{Dv}"] + ["separate"] * separate + ["starts"] * (at is not None) + ["lengths"] * (lengths is not None)
                    + [f"{k}{v}" for k, v in options.items()])
    return pytest.param((B, Hq, Hk, T, S, D, Dv, separate), at, lengths, SMALL | options, id=what)


CASES = [
    case(Hq=2, Hk=2, T=45, S=45), case(Hq=2, Hk=1, T=5, D=72), case(Hq=6, Hk=2, T=9, separate=True), case(Hq=7, Hk=1, T=5, S=76), case(Hq=12, Hk=1, T=3, S=77, D=192, Dv=64),
    case(Hq=16, Hk=1, T=4, S=90), case(T=1, S=80), case(T=6, S=5), case(T=7, S=7), case(T=25, S=12), case(T=4, S=64, at=30), case(T=5, S=40, at=50), case(T=6, S=40, at=-3),
    case(B=2, T=3, S=70, lengths=(70, 33)), case(B=3, T=2, S=60, lengths=(0, 1, 9)), case(B=2, T=3, S=70, lengths=(70, 41), at=(20, 39)),
    case(block=16, stride=16, select_block=16, top_k=3), case(block=4, stride=4, select_block=8), case(block=16, stride=4, select_block=4, top_k=6), case(S=150, T=9, top_k=16),
    case(top_k=1, force_first=0, force_last=0), case(force_first=0, force_last=1), case(force_first=2, force_last=2), case(window=1), case(window=500), case(scale=0.7),
]


@cpu
@pytest.mark.parametrize("sizes, at, lengths, options", CASES)
def test_the_papers_equations(on, backend, sizes, at, lengths, options, rng):
    """Output, choice and every gradient in float64."""
    q, k, v, gates = made(rng, *sizes)
    where = dict(kv_length=None if lengths is None else torch.tensor(lengths, dtype=torch.int32), q_start=torch.tensor(at, dtype=torch.int32) if isinstance(at, tuple) else at)
    shared = k[0] is k[1]
    out, chosen = st.native_sparse_attention(q, k[0] if shared else k, v[0] if shared else v, gates, return_selection=True, backend=backend, **where, **options)
    truth, blocks = naive_nsa.nsa(q, k, v, gates, mean, mean, start=at, lengths=lengths, **naive_names(options))
    assert blocks_of(chosen) == blocks
    assert chosen.granularity == options["select_block"] and chosen.causal
    close(out, truth)
    wanted = [q, *k, *v, gates] if not shared else [q, k[0], v[0], gates]
    dout = torch.from_numpy(rng.standard_normal(tuple(out.shape)))
    for got, true in zip(torch.autograd.grad(out, wanted, dout, retain_graph=True), torch.autograd.grad(truth, wanted, dout, allow_unused=True)):
        close(got, torch.zeros_like(got) if true is None else true)


def close(got, truth):
    """float64 against float64: the same sums in another order."""
    got, truth = got.detach(), truth.detach()
    assert got.shape == truth.shape and got.dtype == truth.dtype and torch.isfinite(got).all()
    assert (got - truth).abs().max() <= 2 ** -52 * 2 ** 10 * max(1.0, float(truth.abs().max())) if got.numel() else True


@every
@pytest.mark.parametrize("dtype, heads", [("bfloat16", (4, 2)), ("float16", (7, 1)), ("float32", (2, 2))])
def test_every_backend_within_the_policy(on, backend, dtype, heads, rng):
    """Each branch rounded, weighed and added in float32, rounded once; keys whose means are exact, so that only attention rounds."""
    (Hq, Hk), T, S, D, kind = heads, 3, 50, 16, numpy_dtype(dtype)
    q, k, v = (rng.integers(-4, 5, (2, h, n, D)).astype(np.float32) / 4 for h, n in ((Hq, T), (Hk, S), (Hk, S)))
    ck, cv = (np.stack([x[:, :, i:i + 8].mean(2) for i in range(0, S - 7, 4)], 2).astype(kind) for x in (k, v))
    (q, k, v), gates = (x.astype(kind) for x in (q, k, v)), rng.random((2, Hq, T, 3)).astype(np.float32)
    out, chosen = on.native_sparse_attention(q, k, v, gates, return_selection=True, **SMALL)
    (out,), (indices, lengths) = arrays(out), arrays(chosen.indices, chosen.lengths)
    p = S - T + np.arange(T)[:, None]
    counts = (np.broadcast_to(np.arange(ck.shape[2]) * 4 + 7 <= p, (2, Hq, T, ck.shape[2])), oracle.selection_count(indices, S, Hq, lengths=lengths, granularity=16, causal=True),
              np.broadcast_to((np.arange(S) <= p) & (np.arange(S) > p - 12), (2, Hq, T, S)))
    parts = [(keys, values, count) for (keys, values), count in zip(((ck, cv), (k, v), (k, v)), counts)]
    truth = sum(gates[..., n, None] * oracle.attention(q, *part, scale=D ** -0.5)[0] for n, part in enumerate(parts))
    measure = sum(gates[..., n, None] * plain.attention(q, *part, scale=D ** -0.5)[0].astype(np.float32) for n, part in enumerate(parts)).astype(kind)
    assert_close("out", out, truth, measure, reduction=S + D)


@pytest.mark.parametrize("backend", LARGE)
@pytest.mark.parametrize("heads, separate", [((7, 1), False), ((4, 2), True)], ids=["one array, group of 7", "three arrays, group of 2"])
def test_gradients_on_every_backend(on, backend, heads, separate, rng):
    """float32 against float64, by the blocks that this backend chose; what is chosen is judged above."""
    (Hq, Hk), sizes = heads, (6, 70, 16, 12)
    q, k, v, gates = made(rng, 1, Hq, Hk, *sizes, separate=separate, dtype=torch.float32)
    place = lambda x: on.tensor(x.detach().numpy(), True)  # noqa: E731
    mine = [place(x) for x in ((q, *k, *v, gates) if separate else (q, k[0], v[0], gates))]
    q_, k_, v_ = mine[0], mine[1:4] if separate else mine[1], mine[4:7] if separate else mine[2]
    out, chosen = st.native_sparse_attention(q_, k_, v_, mine[-1], return_selection=True, backend=backend, **SMALL)
    dout = rng.standard_normal(tuple(out.shape)).astype(np.float32)
    got = [out, *torch.autograd.grad(out, mine, on.tensor(dout))]

    def by_the_paper(dtype):
        leaves = [x.detach().cpu().to(dtype).requires_grad_() for x in mine]
        parts = (leaves[1:4], leaves[4:7]) if separate else ([leaves[1]] * 3, [leaves[2]] * 3)
        out, _ = naive_nsa.nsa(leaves[0], *parts, leaves[-1], mean, mean, blocks=blocks_of(chosen), **naive_names(SMALL))
        return [out, *torch.autograd.grad(out, leaves, torch.from_numpy(dout).to(dtype))]
    for n, (one, truth, measure) in enumerate(zip(got, by_the_paper(torch.float64), by_the_paper(torch.float32))):
        assert_close(["out", "dq", *["dk"] * len(k[:1 + 2 * separate]), *["dv"] * len(v[:1 + 2 * separate]), "dgates"][n], *arrays(one, truth, measure), reduction=70 + 16 + 12)


# ---------------------------------------------------------------------------------------------------------------- conventions
def test_the_defaults_are_the_papers(rng):
    """Block 32, stride 16, 16 blocks of 64 with the first and two local ones, window 512; separate keys and values, learned compression; gradients of its weights."""
    q, k, v, gates = made(rng, 1, 4, 2, 5, 1500, 16, 16, separate=True)
    new = lambda *shape: (torch.from_numpy(rng.standard_normal(shape)) / shape[-2] ** 0.5).requires_grad_()  # noqa: E731
    weights = [[new(32, 16), new(32 * 16, 24), new(1, 24), new(24, 16), new(1, 16)] for _ in "kv"]

    def learned(position, w1, b1, w2, b2):
        return lambda rows: (torch.nn.functional.gelu((rows + position).reshape(-1) @ w1 + b1[0], approximate="tanh") @ w2 + b2[0])
    out = st.native_sparse_attention(q, k, v, gates, compression=tuple(st.CompressionMLP(*w) for w in weights), backend="numba")
    truth, _ = naive_nsa.nsa(q, k, v, gates, *(learned(*w) for w in weights))
    close(out, truth)
    leaves = [q, *k, *v, gates, *weights[0], *weights[1]]
    for got, true in zip(torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(truth.sum(), leaves)):
        close(got, true)


@cpu
def test_a_callable_a_module_and_weights_per_head(on, backend, rng):
    q, k, v, gates = made(rng, 2, 4, 2, 4, 60, 8, 8)
    module = torch.nn.Conv1d(8, 8, 8).double()
    by_module = lambda blocks: module(blocks.flatten(0, 2).transpose(1, 2)).reshape(*blocks.shape[:3], 8)  # noqa: E731
    w1 = torch.from_numpy(rng.standard_normal((2, 64, 8))).requires_grad_()
    out = st.native_sparse_attention(q, k[0], v[0], gates, compression=(by_module, st.CompressionMLP(None, w1)), backend=backend, **SMALL)
    per_head = []
    for j in range(2):
        heads = slice(2 * j, 2 * j + 2)
        parts = [[x[:, j:j + 1] for x in xs] for xs in (k, v)]
        per_head.append(naive_nsa.nsa(q[:, heads], *parts, gates[:, heads], lambda rows: module(rows.t()[None])[0, :, 0], lambda rows: rows.reshape(-1) @ w1[j], **naive_names(SMALL))[0])
    truth = torch.cat(per_head, 1)
    close(out, truth)
    leaves = [q, k[0], v[0], gates, w1, *module.parameters()]
    for got, true in zip(torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(truth.sum(), leaves)):
        close(got, true)


def test_numpy_has_the_same_compression(rng):
    from sparsetile.systems.compression import compress
    x, position, w1, w2 = (rng.standard_normal(shape) for shape in ((2, 3, 50, 6), (3, 8, 6), (48, 20), (20, 6)))
    for how, same in (("mean", "mean"), (st.CompressionMLP(position, w1, None, w2), st.CompressionMLP(*(torch.from_numpy(y) if y is not None else None for y in (position, w1, None, w2))))):
        close(torch.from_numpy(compress("k", x, how, 8, 4)), compress("k", torch.from_numpy(x), same, 8, 4))


def test_branches_that_are_left_out(rng):
    q, k, v, gates = made(rng, 1, 4, 2, 6, 70, 8, 8)
    one = lambda n, **o: st.native_sparse_attention(q, k[0], v[0], [gates[..., m] if m == n else None for m in range(3)], backend="numba", **SMALL | o)  # noqa: E731
    whole = st.native_sparse_attention(q, k[0], v[0], gates, backend="numba", **SMALL)
    close(one(0) + one(1) + one(2), whole)
    close(st.native_sparse_attention(q, k[0], v[0], gates, backend="numba", **SMALL | dict(window=0)), one(0) + one(1))


def test_flash_linear_attentions_convention(rng):
    """Block = stride = selection block, mean pooling, shared keys and values, blocks {0, own, previous} forced, against its own plain code: blocks, output, all gradients."""
    naive = pytest.importorskip("fla.ops.nsa.naive", reason="flash-linear-attention's plain code is not installed (pip install fla-core)")
    S, first = 70, lambda x: x.transpose(1, 2)
    q, k, v, gates = (x.detach().requires_grad_() for x in (lambda m: (m[0], m[1][0], m[2][0], m[3][..., :2]))(made(rng, 1, 16, 1, S, S, 12, 12, dtype=torch.float32)))
    dout = torch.from_numpy(rng.standard_normal((1, 16, S, 12)).astype(np.float32))
    grad = lambda out, x: [out, *torch.autograd.grad(out, x, dout.to(out.dtype))]  # noqa: E731
    out, chosen = st.native_sparse_attention(q, k, v, [gates[..., 0], gates[..., 1], None], block=8, stride=8, select_block=8, top_k=5, window=0, return_selection=True, backend="numba")
    ours = grad(out, (q, k, v, gates))
    pooled = [torch.stack([part.mean(2) for part in x.split(8, 2)], 1) for x in (k, v)]           # [B,C,Hk,D], the last one of fewer keys
    coarse, _ = naive.naive_nsa_compression(first(q), *pooled, 8, 12 ** -0.5)
    with torch.no_grad():
        theirs = naive.naive_nsa_topk(first(q), pooled[0], 5, 8, 12 ** -0.5)                       # [B,T,Hk,5]
    assert_same_bits("blocks", torch.sort(torch.where(theirs < 0, S, theirs), -1).values.transpose(1, 2).int(), torch.where(chosen.indices < 0, S, chosen.indices))
    published = grad(first(coarse * first(gates[..., 0])[..., None] + naive.naive_nsa_selection(first(q), first(k), first(v), theirs, 8) * first(gates[..., 1])[..., None]), (q, k, v, gates))

    def by_the_paper(dtype):
        q_, k_, v_, g = (x.detach().to(dtype).requires_grad_() for x in (q, k, v, gates))
        three = torch.cat([g, torch.zeros_like(g[..., :1])], -1)
        return grad(naive_nsa.nsa(q_, [k_] * 3, [v_] * 3, three, mean, mean, l=8, d=8, l2=8, window=1, blocks=blocks_of(chosen))[0], (q_, k_, v_, g))
    for name, mine, other, truth, measure in zip(("out", "dq", "dk", "dv", "dgates"), ours, published, by_the_paper(torch.float64), by_the_paper(torch.float32)):
        truth, measure = arrays(truth, measure)
        assert_close(name, *arrays(mine), truth, measure, reduction=S + 24), assert_close("published " + name, *arrays(other), truth, measure, reduction=S + 24)


# ----------------------------------------------------------------------------------------------------------------- anti-cheat
@every
def test_all_blocks_are_causal_attention_and_few_are_not(on, backend, rng):
    """The selected branch alone, gates of one: with every block it is dense attention."""
    q, k, v = (rng.standard_normal((1, heads, n, 16)).astype(np.float32) for heads, n in ((6, 4), (2, 70), (2, 70)))
    call = lambda **o: arrays(on.native_sparse_attention(q, k, v, [None, on.put(np.ones((1, 6, 4), np.float32)), None], **SMALL | o))[0]  # noqa: E731
    dense, causal = call(top_k=5), oracle.visible(1, 4, 70, rule=lambda p, s: s <= p)
    truth, measure = oracle.attention(q, k, v, causal, scale=0.25)[0], plain.attention(q, k, v, causal, scale=0.25)[0]
    assert_close("all", dense, truth, measure, reduction=70 + 16)
    assert np.abs(call() - truth).max() > 0.1


# --------------------------------------------------------------------------------------------------------------------- caches
@cpu
@pytest.mark.parametrize("framework", ["torch", "numpy"])
def test_a_cache_answers_as_the_whole_does(on, backend, framework, rng):
    """Prefill of unequal lengths, then tokens one by one and in small groups, at every offset of a stride; keys, values and gates of the past are never given again."""
    B, Hq, Hk, D, lengths, steps = 2, 4, 2, 8, (21, 34), [1] * 9 + [3, 5, 9, 1, 1]
    total = 34 + sum(steps)
    q, k, v, gates = (x.detach().numpy() if torch.is_tensor(x) else x[0].detach().numpy() for x in made(rng, B, Hq, Hk, total, total, D, D))
    put = torch.from_numpy if framework == "torch" else lambda x: x
    options = {name: SMALL[name] for name in ("select_block", "top_k", "window")} | dict(backend=backend)
    cache = st.NativeSparseCache(put(k[:, :, :1]), put(v[:, :, :1]), total, block=8, stride=4)
    first = np.stack([np.concatenate([x[b, :, :n], np.full((Hk, 34 - n, D), np.nan)], 1) for x in (k, v) for b, n in enumerate(lengths)]).reshape(2, B, Hk, 34, D)
    cache.append(*map(put, first), lengths=put(np.array(lengths, np.int32)))
    at = list(lengths)
    for step in steps:
        piece = lambda x: put(np.stack([x[b, :, n:n + step] for b, n in enumerate(at)]))  # noqa: E731, B023
        cache.append(piece(k), piece(v))
        got = cache.attend(piece(q), piece(gates), **options)
        for b in range(B):
            end = at[b] + step
            whole = st.native_sparse_attention(*(put(np.ascontiguousarray(x)) for x in (q[b:b + 1, :, at[b]:end], k[b:b + 1, :, :end], v[b:b + 1, :, :end], gates[b:b + 1, :, at[b]:end])),
                                               block=8, stride=4, **options)
            close(*(torch.as_tensor(x) for x in (got[b:b + 1], whole)))
        at = [n + step for n in at]
    with pytest.raises(ValueError, match="at most 0 more positions, got 1"):
        cache.append(put(k[:, :, :1]), put(v[:, :, :1]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["triton", "cupy"])
def test_append_and_attend_stand_in_a_cuda_graph(backend, rng):
    """Prefill, then tokens by replays of one graph: each answers as the whole call on all keys so far does, by the blocks that were chosen."""
    B, Hq, Hk, D, steps = 2, 6, 2, 16, 6
    total = 50 + steps + 1
    q, k, v, gates = (x.detach().cuda() if torch.is_tensor(x) else x[0].detach().cuda() for x in made(rng, B, Hq, Hk, total, total, D, D, dtype=torch.float32))
    cache, knobs = st.NativeSparseCache(k, v, total, block=8, stride=4), dict(select_block=16, top_k=3, window=12, return_selection=True, backend=backend)
    cache.append(k[:, :, :49], v[:, :, :49])
    inputs = [x[:, :, 49:50].clone() for x in (q, k, v, gates)]

    def step():
        cache.append(inputs[1], inputs[2])
        return cache.attend(inputs[0], inputs[3], **knobs)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, chosen = step()
    for n in range(50, total):
        for held, x in zip(inputs, (q, k, v, gates)):
            held.copy_(x[:, :, n:n + 1])
        graph.replay()
        torch.cuda.synchronize()
        assert cache.lengths.tolist() == [n + 1] * B
        past = lambda dtype: [x[:, :, :n + 1].cpu().to(dtype) for x in (k, v)]  # noqa: E731, B023
        answers = [naive_nsa.nsa(inputs[0].cpu().to(dtype), *([x] * 3 for x in past(dtype)), inputs[3].cpu().to(dtype), mean, mean, blocks=blocks_of(chosen), **naive_names(SMALL | dict(top_k=3)))[0]
                   for dtype in (torch.float64, torch.float32)]
        assert_close(f"token {n}", *arrays(out, *answers), reduction=total + D)


@pytest.mark.parametrize("framework", ["torch", "numpy"])
def test_a_cache_drops_what_a_replay_brings_past_its_capacity(framework, rng):
    """The host does not count a replay: on the device the last key stays what it is, and so do the lengths."""
    put = torch.from_numpy if framework == "torch" else lambda x: x
    k = rng.standard_normal((2, 1, 12, 4)).astype(np.float32)
    cache = st.NativeSparseCache(put(k), put(k), 9, block=4, stride=2)
    cache.append(put(k[:, :, :8]), put(k[:, :, :8]))
    cache.filled = 0  # as after replays of a captured append
    cache.append(put(k[:, :, 8:11]), put(k[:, :, 8:11]))
    assert list(map(int, cache.lengths)) == [9, 9]
    q, gates = put(rng.standard_normal((2, 2, 1, 4)).astype(np.float32)), put(np.ones((2, 2, 1, 3), np.float32))
    knobs = dict(select_block=4, top_k=3, window=3, backend="numba")
    whole = st.native_sparse_attention(q, put(k[:, :, :9].copy()), put(k[:, :, :9].copy()), gates, block=4, stride=2, **knobs)
    assert_same_bits("out", cache.attend(q, gates, **knobs), whole)


@pytest.mark.parametrize("wrong, error, words", [
    (lambda c, x: c.append(x[:1], x[:1]), ValueError, r"k: expected shape \[B,Hk,T,D\] \[2, 2, 3, 4\], got \[1, 2, 3, 4\]"), (lambda c, x: c.append(x[:, :1], x), ValueError, "k: expected shape"),
    (lambda c, x: c.append(x, x[..., :1]), ValueError, "v: expected shape"), (lambda c, x: c.append(x.double(), x), ValueError, "k: expected element type torch.float32"),
    (lambda c, x: c.append(x, x[:, :, :1]), ValueError, "v: expected number of positions of k 3, got 1"), (lambda c, x: c.append([x] * 3, x), ValueError, "k: expected number of arrays 1, got 3"),
    (lambda c, x: c.append(x, x, torch.zeros(2)), TypeError, "lengths: expected element type int32"),
    (lambda c, x: st.NativeSparseCache(x, x, 8, compression="max"), TypeError, "compression: expected"),
    (lambda c, x: st.NativeSparseCache(x, x, 8, block=2, stride=1, compression=lambda blocks: blocks).append(x, x), ValueError, "compression: expected .*one row"),
])
def test_what_a_cache_cannot_take_is_named(wrong, error, words):
    x = torch.zeros(2, 2, 3, 4)
    cache = st.NativeSparseCache(x, x, 8, block=2, stride=1)
    with pytest.raises(error, match=words):
        wrong(cache, x)
    assert cache.filled == 0 and not cache.lengths.any()


# ----------------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("change, error, words", [
    (dict(block=10), ValueError, "block: expected a multiple of stride"), (dict(select_block=6), ValueError, "select_block: expected a multiple of stride"),
    (dict(top_k=2), ValueError, "force_first"), (dict(window=-1), ValueError, "window"), (dict(stride=0), ValueError, "stride"),
    (dict(gates=torch.zeros(1, 2, 5)), ValueError, "gates"), (dict(gates=torch.zeros(1, 2, 5, 2)), ValueError, "gates"), (dict(gates=[None] * 3), ValueError, "at least one branch"),
    (dict(gates=np.zeros((1, 2, 5, 3), np.float32)), ValueError, "gates: expected a torch array on the CPU as q is"),
    (dict(gates=[np.zeros((1, 2, 5), np.float32), None, None]), ValueError, r"gates \(compressed\): expected a torch array"),
    (dict(k=[torch.zeros(1, 1, 40, 8)] * 2), ValueError, "k: expected one array or three"), (dict(compression="max"), TypeError, "compression"),
    (dict(compression=lambda x: x), ValueError, "one row"), (dict(kv_length=torch.zeros(2, dtype=torch.int32)), ValueError, "kv_length"),
])
def test_bad_arguments_are_named(change, error, words):
    q, k, v = torch.zeros(1, 2, 5, 8), torch.zeros(1, 1, 40, 8), torch.zeros(1, 1, 40, 8)
    arguments = dict(q=q, k=k, v=v, gates=torch.zeros(1, 2, 5, 3), backend="numba") | SMALL | change
    with pytest.raises(error, match=words):
        st.native_sparse_attention(**arguments)


# ---------------------------------------------------------------------------------------------------------------- frameworks
def test_torch_compile_takes_the_whole_call(rng):
    torch.compiler.reset()
    q, k, v, gates = made(rng, 1, 4, 2, 6, 70, 8, 8, dtype=torch.float32)
    call = lambda *x: st.native_sparse_attention(*x, backend="numba", **SMALL)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for one, two in zip(*([f(q, k[0], v[0], gates)] + list(torch.autograd.grad(f(q, k[0], v[0], gates).sum(), (q, k[0], v[0], gates))) for f in (call, compiled))):
        assert_same_bits("compiled", one, two)


def test_jax_eager_and_traced(rng):
    jax = pytest.importorskip("jax")
    q, k, v, gates = (x.detach().numpy() for x in (lambda m: (m[0], m[1][0], m[2][0], m[3]))(made(rng, 1, 4, 2, 6, 70, 8, 8, dtype=torch.float32)))
    call = lambda *x: st.native_sparse_attention(*x, backend="numba", **SMALL)  # noqa: E731
    ours, theirs = call(q, k, v, gates), [jax.numpy.asarray(x) for x in (q, k, v, gates)]
    for got in (call(*theirs), jax.jit(call)(*theirs)):
        assert isinstance(got, jax.Array)
        assert_close("out", np.asarray(got), ours.astype(np.float64), ours, reduction=70)
