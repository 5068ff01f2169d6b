"""What only the Numba backend promises of attention: no dependence on threads, float64 where float32 overflows, lanes shared by heads."""
import ml_dtypes
import numpy as np
import pytest

numba = pytest.importorskip("numba")

from drivers import Driver  # noqa: E402
from judge import attention, gradients  # noqa: E402
from oracle import selection_count, visible  # noqa: E402

import sparsetile as st  # noqa: E402

PATTERNS = {"causal": st.Causal(), "window": st.Window(20, 5), "strided": st.Causal() & (st.Window(4) | st.Strided(8)), "global": st.Window(5, 5) | st.Global([0, 17])}


def tensors(seed, Hq=4, Hk=2, T=150, S=150, D=40, Dv=24, scale=1.0):
    rng = np.random.default_rng(seed)
    return tuple((scale * rng.normal(size=(2, h, n, d))).astype(np.float32) for h, n, d in ((Hq, T, D), (Hk, S, D), (Hk, S, Dv)))


@pytest.fixture
def threads():
    before = numba.get_num_threads()
    yield numba.set_num_threads
    numba.set_num_threads(before)


@pytest.mark.parametrize("name", PATTERNS)
def test_bits_do_not_depend_on_threads(threads, name):
    torch = pytest.importorskip("torch")
    results = []
    for count in (1, numba.config.NUMBA_NUM_THREADS, 1):
        threads(count)
        q, k, v = (torch.from_numpy(x).requires_grad_() for x in tensors(0, T=260, S=260))
        out, lse = st.sparse_attention(q, k, v, PATTERNS[name], return_lse=True, backend="numba")
        (out.sum() + lse.sum()).backward()
        results.append([x.detach().numpy().tobytes() for x in (out, lse, q.grad, k.grad, v.grad)])
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("size, scale, value", [(1e19, 1.0, 1.0), (1e25, 1e-48, 1.0), (1e15, -1.0, 1e37), (1.0, 0.2, 3e37), (1e-30, 1.0, 1e-38), (1.0, 0.0, 1.0)])
def test_every_finite_input(size, scale, value):
    """Scores past 3e38 before scaling, and values whose weighted sums pass it before the division."""
    q, k, v = tensors(1)
    q, k, v = np.float32(size / 8) * q, np.float32(size / 8) * k, np.float32(value) * v
    attention(Driver("numba"), q, k, v, st.Causal(), visible(2, 150, 150, rule=lambda p, s: s <= p), scale=scale)
    entries = np.random.default_rng(2).integers(0, 150, (2, 4, 150, 9)).astype(np.int32)
    entries[:, :, ::2, 1:] = -1  # one key, whatever its score
    attention(Driver("numba"), q, k, v, st.Selection(entries), selection_count(entries, 150, 4), scale=scale, name="selection: ")


def test_scores_that_float32_holds_beside_some_below_it():
    """Products of -4e39 that the scale makes -1: in float32 their share of the row would be 0, and nothing else of the row looks odd."""
    q, k, v = tensors(4)
    q, k = np.abs(q) * np.float32(1.25e19), -np.abs(k) * np.float32(1.25e19)
    k[:, :, ::2] *= np.float32(1e-20)
    entries = np.random.default_rng(2).integers(0, 150, (2, 4, 150, 9)).astype(np.int32)
    for name, rule, count in (("pattern: ", st.Causal(), visible(2, 150, 150, rule=lambda p, s: s <= p)), ("selection: ", st.Selection(entries), selection_count(entries, 150, 4))):
        attention(Driver("numba"), q, k, v, rule, count, scale=2.5e-40, name=name)


@pytest.mark.parametrize("T", [1, 3, 20])
@pytest.mark.parametrize("groups", [3, 17, 40])
def test_heads_share_lanes_when_queries_are_few(T, groups):
    q, k, v = tensors(2, Hq=2 * groups, T=T)
    sinks = np.linspace(-3, 3, 2 * groups).astype(np.float32)
    for pattern, rule in ((st.Causal(), lambda p, s: s <= p), (st.Window(30) | st.Sink(4), lambda p, s: (s < 4) | (s <= p) & (s >= p - 30))):
        attention(Driver("numba"), q, k, v, pattern, visible(2, T, 150, rule=rule), sink_logits=sinks)


@pytest.mark.parametrize("T", [8, 16, 32])
def test_heads_share_lanes_when_queries_start_inside_a_block(T):
    """The second head's rows then stand where their numbers in the block say, and the first head's do not."""
    q, k, v = tensors(6, Hq=4, T=T, S=2 * T)
    attention(Driver("numba"), q, k, v, st.Causal(), visible(2, T, 2 * T, rule=lambda p, s: s <= p))


def test_unseen_nan_between_seen_keys():
    """Keys that no query of the call sees lie inside of chunks that are read."""
    q, k, v = tensors(3, T=64, S=64)
    seen = np.arange(64) % 8 < 3
    pattern = st.Global(np.flatnonzero(seen).tolist(), symmetric=False)
    clean = st.sparse_attention(q, k, v, pattern, backend="numba")
    k[:, :, ~seen], v[:, :, ~seen] = np.nan, np.inf
    assert np.array_equal(clean, st.sparse_attention(q, k, v, pattern, backend="numba"))


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("groups, T, D, Dv", [(1, 1, 64, 64), (5, 1, 40, 72), (3, 4, 128, 20)])
def test_few_queries_of_long_keys(threads, kind, groups, T, D, Dv):
    """Keys in several shares, some rows past their end, poison where no query sees; the same bits from one thread."""
    S, length, reach = 20000, 19001, 17500  # three shares; a share that ends inside a block
    kind = {"bfloat16": ml_dtypes.bfloat16}.get(kind, kind)
    rng = np.random.default_rng(7)
    q, k, v = (rng.normal(size=(1, h, n, d)).astype(kind) for h, n, d in ((2 * groups, T, D), (2, S, D), (2, S, Dv)))
    k[:, :, length:], v[:, :, length:], k[:, :, :length - reach - T] = np.nan, np.inf, np.nan
    pattern, seen = st.Window(reach), visible(1, T, S, kv_length=[length], rule=lambda p, s: (s <= p) & (s >= p - reach))
    got = []
    for count in (1, numba.config.NUMBA_NUM_THREADS):
        threads(count)
        got.append([x.tobytes() for x in attention(Driver("numba"), q, k, v, pattern, seen, kv_length=np.array([length], np.int32), softcap=20.0 if T == 4 else None)])
    assert got[0] == got[1]


def test_gradients_of_heads_in_groups(monkeypatch):
    """Long keys: the sums of a few key heads at a time, here of two of six."""
    pytest.importorskip("torch")
    from sparsetile.backends.numba import block_attention_backward
    rng = np.random.default_rng(4)
    q, k, v = (rng.normal(size=(2, h, n, d)).astype(np.float32) for h, n, d in ((6, 150, 40), (3, 170, 40), (3, 170, 24)))
    monkeypatch.setattr(block_attention_backward, "SPARE", 2 * 4 * (192 + 32) * (48 + 32))
    gradients(Driver("numba"), q, k, v, st.Window(30), visible(2, 150, 170, rule=lambda p, s: (s <= p) & (s >= p - 30)), rng)


@pytest.mark.parametrize("left, right, T, D, Dv", [(33, 77, 130, 64, 64), (64, 64, 192, 40, 24), (32, 31, 160, 128, 64), (127, 0, 200, 64, 64), (50, 6, 190, 64, 36)])
def test_corners_that_some_vectors_of_lanes_see(left, right, T, D, Dv):
    """Some keys of a block are seen by the first or the last queries of a panel only; gradients are summed where they will stand (widths in whole vectors), or apart."""
    pytest.importorskip("torch")
    rng = np.random.default_rng(5)
    q, k, v = (rng.normal(size=(1, h, T, d)).astype(np.float32) for h, d in ((2, D), (1, D), (1, Dv)))
    rule, seen = st.Window(left, right), visible(1, T, T, rule=lambda p, s: (s <= p + right) & (s >= p - left))
    attention(Driver("numba"), q, k, v, rule, seen)
    gradients(Driver("numba"), q, k, v, rule, seen, rng)


@pytest.mark.parametrize("kind, Dv", [("float32", 64), ("float32", 24), ("bfloat16", 40)])
def test_delta_made_on_the_way_is_the_same(kind, Dv):
    """A gradient of 0 for the lse takes the kernel of its own."""
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(x).to(getattr(torch, kind)).requires_grad_() for x in tensors(9, Dv=Dv))
    grads = []
    for also in (False, True):
        out, lse = st.sparse_attention(q, k, v, st.Window(40, 9), return_lse=True, backend="numba", kv_length=torch.tensor([150, 90], dtype=torch.int32))
        seen = torch.where(torch.isfinite(lse), lse, 0.0)
        grads.append(torch.autograd.grad((out * torch.arange(Dv)).sum() + (0 * seen.sum() if also else 0), (q, k, v)))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_runs_of_keys_that_nobody_sees():
    """Between keys of a chunk that are seen, and for some queries only: no product, and no weight."""
    pytest.importorskip("torch")
    rng = np.random.default_rng(8)
    q, k, v = (rng.normal(size=(1, h, 130, 64)).astype(np.float32) for h in (2, 1, 1))
    there = [0, 1, 2, 40, 41, 63, 64, 100]
    k[:, :, 3:40], v[:, :, 3:40] = np.nan, np.inf
    rule, seen = st.Causal() & st.Global(there, symmetric=False), visible(1, 130, 130, rule=lambda p, s: (s <= p) & np.isin(s, there))
    attention(Driver("numba"), q, k, v, rule, seen)
    gradients(Driver("numba"), q, k, v, rule, seen, rng)


def test_rows_without_gradient_beside_memory_that_results_left():
    """Rows without keys, and rows in no block of the layout, in memory that held something else before."""
    torch = pytest.importorskip("torch")
    q, k, v = (torch.randn(1, 2, 320, 64).requires_grad_() for _ in range(3))
    mask = np.ones((5, 5), bool)
    mask[2] = False
    for rule in (st.Full(), st.Blocks(mask, 64, 64)):
        dq, = torch.autograd.grad(st.sparse_attention(q, k, v, rule, backend="numba").sum(), q)
    assert (dq[:, :, 128:192] == 0).all() and (dq[:, :, :128] != 0).any()


@pytest.mark.parametrize("left, right, T", [(7, 0, 130), (33, 77, 257), (64, 64, 192)])
def test_gradients_do_not_depend_on_what_memory_held(monkeypatch, left, right, T):
    """Register tiles reach past the keys of a block, into keys that another share adds up."""
    pytest.importorskip("torch")
    from sparsetile.backends import arrays, places
    from sparsetile.backends.numba import block_attention_backward
    poison = lambda self, shape, dtype: np.full(shape, np.nan, arrays.numpy_dtype(dtype))
    monkeypatch.setattr(places.NumpyPlace, "empty", poison)
    monkeypatch.setattr(block_attention_backward, "take", lambda size: np.full(size // 4, np.nan, np.float32))
    rng = np.random.default_rng(6)
    q, k, v = (rng.normal(size=(1, h, T, 64)).astype(np.float32) for h in (2, 1, 1))
    gradients(Driver("numba"), q, k, v, st.Window(left, right), visible(1, T, T, rule=lambda p, s: (s <= p + right) & (s >= p - left)), rng)
