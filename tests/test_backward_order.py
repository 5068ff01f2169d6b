"""Triton's one-pass backward (path gluon_ordered): which turn each addition to dQ has, and dQ from its sums; the kernel between them runs on Hopper only (test_gpu.py, test_lists.py)."""
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

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
