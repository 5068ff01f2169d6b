"""Triton's gather attention by blocks (path blocks): pairs sorted by entry, each tile of them on one block, the parts of a row merged."""
import numpy as np
import oracle
import pytest
from judge import attention, gradients, normal
from numeric import assert_same_bits

import sparsetile as st
from sparsetile.backends.contract import Problem
from sparsetile.ops import dispatch

B, Hq, Hk, T, S, K, D, DV = 2, 4, 2, 21, 150, 3, 24, 16
CASES = {"each head": dict(G=4, granularity=64, causal=True), "key heads, ragged": dict(G=2, granularity=64, causal=True, lengths=True, kv_length=True, sink=True),
         "one list, starts": dict(G=1, granularity=96, kv_length=True, q_start=True, softcap=2.0), "one block, few heads at a time": dict(G=4, granularity=512, causal=True, scale=-0.3, scratch=13000)}


def entries_of(rng, G, granularity):
    """Holes, repeats, entries past the end, and some that would overflow."""
    entries = rng.integers(-1, -(-S // granularity) + 1, (B, G, T, K)).astype(np.int32)
    entries[0, 0, :2, 0], entries[0, 0, 2] = (2 ** 31 - 1, -2 ** 31), 0
    return entries


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", [pytest.param("triton", id="triton", marks=pytest.mark.interp)])
def test_rows_of_one_block_share_a_tile(on, backend, case, rng, monkeypatch):
    from sparsetile.backends.triton import gather_blocks
    ran, some = [], gather_blocks.some
    monkeypatch.setattr(gather_blocks, "some", lambda *x: ran.append(1) or some(*x))
    how = dict(CASES[case])
    G, granularity, causal = how.pop("G"), how.pop("granularity"), how.pop("causal", False)
    monkeypatch.setattr(gather_blocks, "SCRATCH", how.pop("scratch", 1 << 20))
    if on.interpreted:  # so that small cases have several tiles of each kind; on a GPU as they are
        for name, size in (("ROWS", 16), ("KEYS", 32), ("CHUNK", 32)):
            monkeypatch.setattr(gather_blocks, name, size)
    q, k, v = (normal(rng, (B, heads, n, width), np.float16) for heads, n, width in ((Hq, T, D), (Hk, S, D), (Hk, S, DV)))
    entries, lengths = entries_of(rng, G, granularity), rng.integers(-2, K + 3, (B, G, T)).astype(np.int32) if how.pop("lengths", False) else None
    places = dict(kv_length=np.array([S + 9, 70], np.int32) if how.pop("kv_length", False) else None, q_start=np.array([100, -3], np.int32) if how.pop("q_start", False) else None)
    how["sink_logits"] = rng.standard_normal(Hq).astype(np.float32) if how.pop("sink", False) else None
    count = oracle.selection_count(entries, S, Hq, lengths=lengths, granularity=granularity, causal=causal, **places)
    if places["kv_length"] is not None:
        k[1, :, 70:] = v[1, :, 70:] = np.nan
    call = lambda: attention(on, q, k, v, on.selection(entries, lengths, granularity=granularity, causal=causal), count, config=dict(path="blocks"), **places, **how)  # noqa: E731
    first = call()
    assert ran
    for name, x, y in zip(("out", "lse"), first, call()):
        assert_same_bits(name, x, y)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", [pytest.param("triton", id="triton", marks=pytest.mark.interp)])
def test_gradients_of_sorted_pairs(on, backend, case, rng, monkeypatch):
    from sparsetile.backends.triton import gather_blocks, gather_blocks_backward
    ran, run, how = [], gather_blocks_backward.run, dict(CASES[case])
    monkeypatch.setattr(gather_blocks_backward, "run", lambda *x, **y: ran.append(1) or run(*x, **y))
    monkeypatch.setattr(gather_blocks, "pays", lambda problem: True)
    G, granularity, causal = how.pop("G"), how.pop("granularity"), how.pop("causal", False)
    monkeypatch.setattr(gather_blocks, "SCRATCH", how.pop("scratch", 1 << 20))
    if on.interpreted:
        for module, name, size in ((gather_blocks, "ROWS", 16), (gather_blocks, "KEYS", 32), (gather_blocks, "CHUNK", 32), (gather_blocks_backward, "KEYS", 32), (gather_blocks_backward, "QUERIES", 16), (gather_blocks_backward, "STEP", 32)):
            monkeypatch.setattr(module, name, size)
    q, k, v = (normal(rng, (B, heads, n, width), np.float16) for heads, n, width in ((Hq, T, D), (Hk, S, D), (Hk, S, DV)))
    entries, lengths = entries_of(rng, G, granularity), rng.integers(-2, K + 3, (B, G, T)).astype(np.int32) if how.pop("lengths", False) else None
    places = dict(kv_length=np.array([S + 9, 70], np.int32) if how.pop("kv_length", False) else None, q_start=np.array([100, -3], np.int32) if how.pop("q_start", False) else None)
    how["sink_logits"] = rng.standard_normal(Hq).astype(np.float32) if how.pop("sink", False) else None
    count = oracle.selection_count(entries, S, Hq, lengths=lengths, granularity=granularity, causal=causal, **places)
    rule = lambda: st.Selection(on.tensor(entries), granularity, None if lengths is None else on.tensor(lengths), causal)  # noqa: E731
    options = {name: x for name, x in places.items() if x is not None} | how
    gradients(on, q, k, v, rule(), count, rng, with_lse=True, **options)
    assert ran


def test_where_it_is_the_first_choice():
    """Lists of each head over long blocks that many rows share; not for few queries, short blocks, other types, one list for all heads."""
    pytest.importorskip("triton")
    from sparsetile.backends.triton import gather_attention
    sizes, kinds, words = dict(B=1, Hq=32, Hk=8, T=16384, S=16384, D=128, Dv=128, K=4), dict.fromkeys("qkv", "bfloat16"), ["per_head", "causal"]
    path = lambda sizes, kinds, words, granularity: gather_attention.default_config(Problem.of("gather_attention", sizes, kinds, "sm_90a", words, 1.0, granularity))["path"]  # noqa: E731
    assert path(sizes, kinds, words, 512) == "blocks" and path(sizes | dict(T=65536, K=8), kinds, words, 512) == "blocks"
    others = (sizes | dict(T=1), kinds, words, 512), (sizes, kinds, words, 64), (sizes, dict.fromkeys("qkv", "float32"), words, 512), (sizes, kinds, [], 512), (sizes | dict(D=192), kinds, words, 512)
    others += (sizes | dict(T=65536, K=9), kinds, words, 512), (sizes | dict(T=65536, S=1 << 20, K=8, D=64, Dv=64), kinds, words, 128)  # rows of pairs, and counts, past the scratch
    assert all(path(*other) == "portable" for other in others)


def test_a_named_path_that_cannot_run_says_why():
    pytest.importorskip("triton")
    from sparsetile.backends.triton import gather_attention
    problem = Problem.of("gather_attention", dict(B=1, Hq=32, Hk=8, T=64, S=64, D=128, Dv=128, K=4), dict.fromkeys("qkv", "float32"), "sm_90a")
    with pytest.raises(st.Unsupported, match="path blocks takes queries and keys of 16 bits"):
        dispatch.check_config(gather_attention, problem, dict(path="blocks"), "config")


def test_scratch_is_a_bound():
    """Of rows and of counts, and so many lists as a grid has rows."""
    pytest.importorskip("triton")
    from sparsetile.backends.triton import gather_blocks
    zeros = lambda *shape: np.broadcast_to(np.float16(0), shape)  # noqa: E731
    takes = lambda T, S, K, D, DV, granularity: gather_blocks.takes(zeros(1, 32, T, D), zeros(1, 8, S, D), zeros(1, 8, S, DV), zeros(1, 32, T, K), None, granularity)  # noqa: E731
    assert takes(65536, 65536, 8, 128, 64, 512) and takes(65536, 1 << 19, 8, 64, 64, 128)
    assert not any((takes(65536, 65536, 9, 128, 64, 512), takes(65536, 65536, 9, 64, 128, 512), takes(65536, 1 << 20, 8, 64, 64, 128)))
    assert gather_blocks.lists_at_once(1, 16, 1) == 65535
