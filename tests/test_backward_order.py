"""Around Triton's backwards for Hopper: which turn each addition to dQ has and dQ from its sums (path gluon_ordered), partial blocks as keys see them and sums of sections (path gluon); the kernels
between them run on Hopper only (test_gpu.py, test_lists.py)."""
import numpy as np
import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")
tl = triton.language

from sparsetile.backends.triton import interpreted  # noqa: E402

pytestmark = [pytest.mark.interp, pytest.mark.skipif(not interpreted() and not torch.cuda.is_available(), reason="neither a GPU nor TRITON_INTERPRET=1")]
DEVICE = "cpu" if interpreted() else "cuda"


def lists_of(blocks):
    """Offsets, columns and what stands at them, full blocks (1) before partial ones (2), of blocks [L, rows, columns]."""
    offsets, columns, where = [0], [], []
    for place in np.ndindex(blocks.shape[:2]):
        for kind in (1, 2):
            found = np.flatnonzero(blocks[place] == kind)
            columns += [*found]
            where += [(*place, c) for c in found]
            offsets.append(len(columns))
    return np.array(offsets), np.array(columns), where


@pytest.mark.parametrize("ascending", [False, True])
@pytest.mark.parametrize("past", [0, 2])
def test_every_addition_has_its_turn(ascending, past, rng):
    """Key blocks add to a row in the order in which they are taken, whichever row they come to first; the last key blocks of the lists may lie past the call's keys."""
    from sparsetile.backends.triton.block_backward_order import order
    L, nq, nk = 2, 9, 7
    blocks = rng.integers(0, 3, (L, nq, nk))
    blocks[:, 4] = blocks[:, :, 3] = 0
    blocks[1, 5], blocks[1, 6] = 1, 2
    offsets, cols, _ = lists_of(blocks)
    by_key, rows, where = lists_of(blocks.transpose(0, 2, 1))
    kinds = np.array([-1 if blocks[l, i, j] == 1 else 100 * l + 10 * i + j for l, j, i in where])
    made = [torch.from_numpy(x.astype(np.int32)).to(DEVICE) for x in (offsets, cols, by_key, rows, kinds)]
    walk, its_kind, ranks = (torch.full((len(rows),), -9, dtype=torch.int32, device=DEVICE) for _ in range(3))
    order[(L * nk,)](*made, walk, its_kind, ranks, nq, nk, nk - past, 4, ASCENDING=ascending, N=4)
    taken = [[] for _ in range(L * nq)]
    for l in range(L):
        for j in (range(nk - past - 1, -1, -1) if ascending else range(nk - past)):
            part, i = slice(by_key[2 * (l * nk + j)], by_key[2 * (l * nk + j) + 2]), np.flatnonzero(blocks[l, :, j])
            i = i if ascending else i[::-1]
            assert walk[part].tolist() == i.tolist()
            assert its_kind[part].tolist() == [-1 if blocks[l, x, j] == 1 else 100 * l + 10 * x + j for x in i]
            for x, rank in zip(i, ranks[part].tolist()):
                taken[l * nq + x].append(rank)
    assert all(x == [*range(len(x))] for x in taken)


@pytest.mark.parametrize("abreast", [0, 1])
@pytest.mark.parametrize("count, group", [(5, 4), (1, 3), (4, 1), (1, 1)])
def test_every_head_walks_every_entry(count, group, abreast):
    from sparsetile.backends.triton.block_backward_order import following

    @triton.jit
    def steps(out, count, group, abreast, following: tl.constexpr):
        m = 0
        e = 0
        for n in range(count * group):
            tl.store(out + 2 * n, m)
            tl.store(out + 2 * n + 1, e)
            m, e = following(m, e, count, group, abreast)
        tl.store(out + 2 * count * group, e)  # the readers load the entry of a step that does not come
    out = torch.full((2 * count * group + 1,), -9, dtype=torch.int32, device=DEVICE)
    steps[(1,)](out, count, group, abreast, following)
    expected = [(m, e) for e in range(count) for m in range(group)] if abreast else [(m, e) for m in range(group) for e in range(count)]
    assert out[:-1].reshape(-1, 2).tolist() == [list(x) for x in expected] and 0 <= out[-1] < count


@pytest.mark.parametrize("sizes, features, expected", [
    (dict(Hk=8, T=8192, S=8192), ["causal"], "abreast"),
    (dict(Hk=8, T=32768, S=32768), ["causal+documents"], "abreast"),
    (dict(Hk=8, T=131072, S=131072), ["causal"], "descending"),  # what its rounds read falls out of the cache
    (dict(Hk=8, T=2048, S=8192), ["causal"], "descending"),
    (dict(Hk=8, T=8192, S=8192), ["causal", "per_head"], "descending"),  # heads of a group go by lists of their own
    (dict(Hk=32, T=8192, S=8192), ["causal"], "descending")])
def test_walks_of_groups_of_heads(sizes, features, expected):
    from sparsetile.backends.contract import Problem
    from sparsetile.backends.triton import block_attention_backward
    problem = Problem.of("block_attention_backward", dict(B=1, Hq=32, D=128, Dv=128, **sizes), dict.fromkeys("qkv", "bfloat16"), "sm_90a", [*features, "static", "gradient"])
    config = block_attention_backward.default_config(problem)
    assert (config["path"], config["walk"]) == ("gluon_ordered", expected)
    refused = isinstance(block_attention_backward.resources(problem, {**config, "walk": "abreast"}), str)
    assert refused == (sizes["Hk"] == 32 or "per_head" in features)


def test_sums_become_gradients(rng):
    """Tiles that begin before the first query and end past the last, widths below 128; rows to which nobody added are 0, whatever their sums hold."""
    from sparsetile.backends.triton.block_backward_order import finish
    B, Hq, T, D, start, tiles = 1, 2, 150, 72, -70, 2
    sums, turns = rng.standard_normal((Hq, tiles * 2, 64, 128)).astype(np.float32), rng.integers(1, 9, (Hq, tiles * 2)).astype(np.int32)
    turns[0, 2], sums[0, 2] = 0, np.nan
    dq = torch.full((B, Hq, T, D), 7.0, dtype=torch.float16, device=DEVICE)
    finish[(Hq * tiles * 2,)](torch.from_numpy(sums).to(DEVICE), torch.from_numpy(turns).to(DEVICE), dq, None, None, Hq, T, 200, tiles, start, 0.5, D=D, FROM_LENGTH=False)
    sums[0, 2] = 0
    truth = (sums.reshape(Hq, tiles * 2, 4, 64, 32).transpose(0, 1, 3, 2, 4).reshape(Hq, tiles * 128, 128)[:, start % 128:start % 128 + T, :D] * np.float32(0.5)).astype(np.float16)
    assert np.array_equal(dq[0].cpu().numpy(), truth)


@pytest.mark.parametrize("intervals, bitmaps", [(3, 0), (0, 2), (2, 3), (4, 12)])
def test_kinds_as_keys_see_them(intervals, bitmaps, rng):
    """Path gluon: which queries see each key of a partial block, and which quarters of it hold a pair, or nothing else."""
    from sparsetile.backends.triton.block_backward_kinds import TOGETHER, turn_kinds
    seen = np.zeros((2 * max(intervals, bitmaps), 128, 128), bool)
    ends = np.sort(rng.integers(0, 129, (intervals, 128, 2)), 2)
    ends[:1, 64:], ends[:1, :64, 0], ends[:1, :64, 1] = 64, 0, 80  # a quarter seen entirely, one in part, two not at all
    bits = rng.integers(0, 2, (bitmaps, 128, 128)).astype(bool)
    bits[:1, :64, :64], bits[:1, 64:, 64:], bits[1:2] = False, True, False
    seen[:2 * intervals:2] = (ends[..., :1] <= np.arange(128)) & (np.arange(128) < ends[..., 1:])
    seen[1:2 * bitmaps:2] = bits
    each, n = 512 if intervals and bitmaps else 256, intervals + bitmaps
    words, quarters = (torch.full((size,), -9, dtype=torch.int32, device=DEVICE) for size in (len(seen) * each + 512 - each, len(seen)))
    tables = [torch.from_numpy(x).to(DEVICE) if len(x) else None for x in (ends.astype(np.int32), np.packbits(bits, -1, "little").view(np.int32))]
    turn_kinds[(-(-n // TOGETHER),)](*tables, words, quarters, intervals, n, INTERVALS=intervals > 0, BITMAPS=bitmaps > 0, EACH=each, TOGETHER=TOGETHER, num_warps=TOGETHER // 2)
    for kind in [*range(0, 2 * intervals, 2), *range(1, 2 * bitmaps, 2)]:
        own = words[kind * each:kind * each + 512].cpu().numpy()
        assert np.array_equal(np.unpackbits(own.view(np.uint8), bitorder="little").reshape(128, 128).T, seen[kind]) if seen[kind].any() else (own == -9).all()
        parts = seen[kind].reshape(2, 64, 2, 64)
        assert quarters[kind].item() == sum(int(parts[i, :, j].any()) << 2 * i + j | int(parts[i, :, j].all()) << 4 + 2 * i + j for i in (0, 1) for j in (0, 1))


@pytest.mark.parametrize("D, Dv", [(72, 40), (168, 64)])
def test_sections_become_gradients(D, Dv, rng):
    """Path gluon: sums of the sections of far longer blocks, to where the block's rows stand; keys past the last are 0, queries outside of the call are left alone."""
    from sparsetile.backends.triton.block_backward_kinds import join_keys, join_queries
    B, Hq, Hk, T, S, start, nq, nk, far, sections = 2, 4, 2, 300, 290, 70, 3, 3, 2, 3
    D0, D1, V0 = 128, 64 if D > 128 else 0, 64
    list_of, lengths = np.array([[0], [1]], np.int32), np.array([290, 200], np.int32)
    order_q, order_k = np.array([[2, 0, 1], [1, 0, 2]], np.int32), np.array([[2, 1, 0], [0, 2, 1]], np.int32)
    sums_q, sums_k = (rng.standard_normal((sections, far, B * H, 128, width)).astype(np.float32) for H, width in ((Hq, D0 + D1), (Hk, D0 + D1 + V0)))
    dq, dk, dv = (torch.full((B, H, n, width), 7.0, dtype=torch.float16, device=DEVICE) for H, n, width in ((Hq, T, D), (Hk, S, D), (Hk, S, Dv)))
    at = [torch.from_numpy(x).to(DEVICE) for x in (sums_q, sums_k, list_of, order_q, order_k, lengths)]
    shape = dict(D=D, D0=D0, D1=D1, R=64)
    join_queries[(B * Hq * far * 2,)](at[0], dq, at[2], at[3], 1, 0, B * Hq, Hq, T, nq, 0, B * Hq * far, sections, start, **shape)
    join_keys[(B * Hk * far * 2,)](at[1], dk, dv, at[2], at[4], at[5], None, 1, 0, B * Hk, Hk, Hq // Hk, T, S, nk, B * Hk * far, sections, start, **shape, DV=Dv, V0=V0, FROM_LENGTH=False)
    for got, sums, order, heads, width, begin, skip in ((dq, sums_q, order_q, Hq, D, 0, start), (dk, sums_k, order_k, Hk, D, 0, 0), (dv, sums_k, order_k, Hk, Dv, D0 + D1, 0)):
        total = sums[0] + sums[1] + sums[2]
        truth = np.full(got.shape, 7.0, np.float16)
        for b, h, rank in np.ndindex(B, heads, far):
            for r, row in enumerate(range(order[b, rank] * 128 - skip, order[b, rank] * 128 - skip + 128)):
                if 0 <= row < truth.shape[2]:
                    truth[b, h, row] = total[rank, b * heads + h, r, begin:begin + width] if skip or row < lengths[b] else 0
        assert np.array_equal(got.cpu().numpy(), truth)
