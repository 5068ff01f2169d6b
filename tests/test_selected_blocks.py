"""Selections as bitmaps of blocks: every backend's bits are the reference's, the reference's are the selection's own mask, and attention under them is attention over the entries."""
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from drivers import LARGE
from judge import attention, gradients, normal

import oracle
import sparsetile as st
from sparsetile.backends import devices, places
from sparsetile.backends.reference import selection_bitmaps as reference
from sparsetile.backends.triton import interpreted
from sparsetile.ops import attention as attention_op
from sparsetile.ops import dispatch, selected_blocks
from sparsetile.ops.layout import Layout

large = pytest.mark.parametrize("backend", LARGE)

B, G, T, K, S, FEW = 2, 2, 130, 7, 260, 18
CASES = {"keys": dict(), "keys, causal": dict(causal=True, q_start=150), "threes, ragged": dict(granularity=3, causal=True, kv_length=True, lengths=True, q_start=True),
         "words": dict(granularity=64, causal=True, kv_length=True, lengths=True), "words, starts": dict(granularity=32, causal=True, q_start=True), "one block": dict(granularity=512, causal=True, q_start=5)}


def made(rng, granularity=1, causal=False, lengths=False, kv_length=False, q_start=None):
    """Entries with holes and repeats, and what stands beside them."""
    entries = rng.integers(-3, S // granularity + 3, (B, G, T, K)).astype(np.int32)
    entries[0, 0, :2, 0] = 2 ** 31 - 1, -2 ** 31
    return entries, dict(granularity=granularity, causal=causal, lengths=rng.integers(-2, K + 3, (B, G, T)).astype(np.int32) if lengths else None,
                         kv_length=np.array([S + 50, 131], np.int32) if kv_length else None, q_start=np.array([40, -3], np.int32) if q_start is True else q_start)


@pytest.mark.parametrize("case", CASES)
def test_bits_are_the_selections_mask(case, rng):
    entries, how = made(rng, **CASES[case])
    bitmaps, kinds = reference.run(entries, S=S, block_q=128, block_k=128, **how)
    for b in range(B):
        limit = S if how["kv_length"] is None else int(np.clip(how["kv_length"][b], 0, S))
        start = limit - T if how["q_start"] is None else int(np.ravel(how["q_start"])[b % np.size(how["q_start"])])
        want = st.Selection(entries[b:b + 1], how["granularity"], None if how["lengths"] is None else how["lengths"][b:b + 1], how["causal"]).mask(T, limit, start)[0]
        for g in range(G):
            grid = kinds[b * G + g]
            seen = np.zeros((256, 384), bool)
            for i, j in zip(*np.nonzero(grid != -2)):
                assert grid[i, j] % 2 == 1
                seen[i * 128:i * 128 + 128, j * 128:j * 128 + 128] = np.unpackbits(bitmaps[grid[i, j] // 2].view(np.uint8), axis=-1, bitorder="little")
            assert np.array_equal(seen[:T, :limit], want[g]) and not seen[T:].any() and not seen[:, limit:].any()
            assert all(seen[i * 128:i * 128 + 128, j * 128:j * 128 + 128].any() for i, j in zip(*np.nonzero(grid != -2)))


def same_bits(got, want):
    """As far as kinds speak of them."""
    assert np.array_equal(got[1], want[1])
    rows = want[1][want[1] >= 0] // 2
    assert np.array_equal(got[0][rows], want[0][rows])


@pytest.mark.interp
@pytest.mark.parametrize("case", CASES)
def test_tritons_bits(case, rng):
    torch = pytest.importorskip("torch")
    on_cpu = interpreted()
    if not on_cpu and not torch.cuda.is_available():
        pytest.skip("neither a GPU nor TRITON_INTERPRET=1")
    device, (entries, how) = "cpu" if on_cpu else "cuda", made(rng, **CASES[case])
    entries, how["lengths"] = (np.sort(entries, -1) if "threes" in case else entries)[:, :, :FEW].copy(), None if how["lengths"] is None else how["lengths"][:, :, :FEW].copy()
    arrays = {name: torch.from_numpy(x).to(device) if isinstance(x, np.ndarray) else x for name, x in how.items()}
    got = dispatch.kernel("triton", "selection_bitmaps").run(torch.from_numpy(entries).to(device), place=places.place_for("torch", "torch", None if on_cpu else 0), config={"entries": 256}, S=S,
                                                              block_q=16, block_k=128, **arrays)
    same_bits([x.cpu().numpy() for x in got], reference.run(entries, S=S, block_q=16, block_k=128, **how))


# ------------------------------------------------------------------------------------------------------------------- the op
@pytest.fixture
def as_blocks(monkeypatch, backend):
    """Every selection runs as blocks, the bitmaps by the reference where the backend has no kernel. Yields how often block attention ran."""
    find, ran = dispatch.find, []

    def maker(op, problem, device, name=None, fixed=None):
        assert problem.op != "layout" or (op, name) == ("sparse_attention", backend)  # what makes the lists is asked of the same backend
        missing = problem.op == "selection_bitmaps" and not dispatch.has_kernel(backend, problem.op)
        return dispatch.choose(op, problem, device, "reference") if missing else find(op, problem, device, name, fixed)
    monkeypatch.setattr(selected_blocks, "pays", lambda call: True)
    monkeypatch.setattr(dispatch, "find", maker)
    for name in ("block_attention", "block_attention_backward"):
        kernel = dispatch.kernel(backend, name) if dispatch.has_kernel(backend, name) else None
        if kernel is not None:
            monkeypatch.setattr(kernel, "run", lambda *x, run=kernel.run, **y: ran.append(1) or run(*x, **y))
    return ran


def case(rng, lists, granularity, kind):
    """q, k, v; distinct entries in ascending order after holes."""
    blocks = -(-S // granularity)
    entries = np.sort(np.stack([rng.permutation(blocks + 1)[:min(K, blocks)] - 1 for _ in range(B * lists * T)])).reshape(B, lists, T, -1).astype(np.int32)
    return [normal(rng, (B, heads, n, 16), kind) for heads, n in ((4, T), (2, S), (2, S))], entries


@large
@pytest.mark.parametrize("lists, granularity, causal", [(4, 1, True), (2, 64, True), (1, 5, False), (4, 128, True)])
def test_attention_under_bits_is_attention_over_entries(on, backend, lists, granularity, causal, as_blocks, rng):
    """Lengths, sinks, a cap; queries that see nothing; what stands past the length is NaN."""
    ((q, k, v), entries), lengths, sinks = case(rng, lists, granularity, np.float32), np.array([S, 131], np.int32), rng.standard_normal(4).astype(np.float32)
    count = oracle.selection_count(entries, S, 4, granularity=granularity, causal=causal, kv_length=lengths)
    k[1, :, 131:] = v[1, :, 131:] = np.nan
    attention(on, q, k, v, on.selection(entries, granularity=granularity, causal=causal, distinct=True), count, kv_length=lengths, sink_logits=sinks, softcap=3.0)
    assert as_blocks


@pytest.mark.parametrize("backend", LARGE[1:])
def test_gradients_under_bits(on, backend, as_blocks, rng):
    (q, k, v), entries = case(rng, 4, 32, np.float32)
    count = oracle.selection_count(entries, S, 4, granularity=32, causal=True)
    gradients(on, q, k, v, st.Selection(on.tensor(entries), 32, causal=True, distinct=True), count, rng, with_lse=True)
    assert len(as_blocks) == 2


def test_where_blocks_pay():
    """Lists of each head over few keys for what they hold; on a GPU, of 16 bits, where entries are distinct and nobody named a config. Not where a group fills a tile's rows, nor for short calls."""
    def pays(Hq=32, Hk=8, G=32, T=16384, S=16384, K=2048, granularity=1, kind=ml_dtypes.bfloat16, distinct=True, **more):
        rule = SimpleNamespace(indices=SimpleNamespace(shape=(1, G, T, K)), granularity=granularity, distinct=distinct)
        call = dict(rule=rule, sizes=(1, Hq, Hk, T, S, 128, 128), device=0, config=None, table=None, latent=None, q=np.zeros(1, kind)) | more
        return selected_blocks.pays(SimpleNamespace(**call))
    assert pays() and pays(K=4, granularity=2 ** 28) and pays(K=4, granularity=512) and pays(S=65536) and pays(G=8, K=32, granularity=64)
    assert not any((pays(S=65537), pays(distinct=False), pays(device=None), pays(config={}), pays(table=0), pays(latent=(512, 64)), pays(kind=np.float32), pays(T=100), pays(T=1024, S=1024, K=256),
                    pays(Hq=64, Hk=4, G=4, S=1024, T=1024, K=16, granularity=64), pays(T=65536, S=65536, K=4, granularity=512), pays(T=65536, S=65536), pays(K=4, granularity=2 ** 29)))


@pytest.mark.parametrize("direction, arch, D, fits", [("", "sm_90a", 128, True), ("", "sm_120", 128, True), ("", "sm_120", 256, False), ("_backward", "sm_80", 128, True), ("_backward", "sm_80", 256, False)])
def test_where_blocks_do_not_fit_gather_attention_runs(direction, arch, D, fits, monkeypatch):
    """Blocks of 128 x 128 of wide rows ask for more shared memory than there is. Where they fit, the backend that was named makes bitmaps and lists, and an explanation tells."""
    monkeypatch.setattr(devices, "device_info", lambda device: SimpleNamespace(arch=arch, name=arch))
    monkeypatch.setattr(dispatch, "refusal", lambda name, problem, device: dispatch.kernel(name, problem.op).supports(problem))
    monkeypatch.setenv("SPARSETILE_TUNE", "off")
    zeros = lambda kind, *shape: np.broadcast_to(np.zeros(1, kind), shape)  # noqa: E731
    q, k = zeros(ml_dtypes.bfloat16, 1, 32, 16384, D), zeros(ml_dtypes.bfloat16, 1, 8, 16384, D)
    rule = st.Selection(zeros(np.int32, 1, 32, 16384, 2048), distinct=True)
    call = attention_op.Call(q, k, k, rule, 1.0, None, None, None, 0, D, True, "cupy", None, "cupy", 0)
    with dispatch.explaining():
        got = selected_blocks.where_they_pay(call, lambda call, keys: attention_op.problem_of(call, f"{keys}_attention{direction}"))
        assert dispatch._explaining.get() == (dict(selection_bitmaps="cupy", layout="cupy") if fits else {})
    assert isinstance(got.rule, Layout) if fits else got is call
