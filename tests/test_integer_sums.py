"""Triton's backward over a selection of latents (path gluon): units of the integer sums of a key, and what the sums are worth; the kernels around them run on Hopper only (test_gpu.py)."""
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from sparsetile.backends.triton import interpreted  # noqa: E402

pytestmark = [pytest.mark.interp, pytest.mark.skipif(not interpreted() and not torch.cuda.is_available(), reason="neither a GPU nor TRITON_INTERPRET=1")]
DEVICE = "cpu" if interpreted() else "cuda"


def test_no_sum_within_its_bound_leaves_31_bits(rng):
    """Bounds of every size in bins, zeros, what is not finite: the unit is a power of two by which all of them come to 2^28 .. 2^30; the bins are cleared."""
    from sparsetile.backends.triton.gather_backward_gluon import BINS, units
    x = np.exp(rng.standard_normal((5, 300)) * 8).astype(np.float32)
    x[:, 5], x[2, 7], x[:, 8] = 0, np.inf, 1e30
    exponent, bins = x.view(np.int32) >> 23, np.zeros((BINS, 300), np.int64)
    part = ((x.view(np.int32) & 0x7FFFFF) >> 15).astype(np.int64) + 257 << exponent % 32
    for row in range(5):
        np.add.at(bins, (np.where(exponent[row] == 255, 8, exponent[row] // 32), np.arange(300)), np.where(x[row] == 0, 0, np.where(exponent[row] == 255, 1, part[row])))
    bounds, unit = torch.from_numpy(bins).to(DEVICE), torch.zeros(300, device=DEVICE)
    units[(2,)](bounds, unit, 300, BK=256)
    unit, total, seen = unit.cpu().numpy(), x.astype(float).sum(0), np.arange(300) != 5
    assert not bounds.any() and np.isnan(unit[7]) and unit[5] == 2.0 ** 126
    seen[7] = False
    worth = (unit * total)[seen]
    assert (np.frexp(unit[seen])[0] == 0.5).all() and (worth <= 2 ** 30).all() and (worth > 2 ** 28).all()


@pytest.mark.parametrize("first, last", [(True, True), (True, False), (False, True)])
def test_integers_become_floats(first, last, rng):
    """Signs of all kinds; chunks add up; the sums are cleared."""
    from sparsetile.backends.triton.gather_backward_gluon import finish
    whole = rng.integers(-2 ** 29, 2 ** 29, (5, 576)).astype(np.int32)
    sums = torch.from_numpy(whole.copy()).to(DEVICE)
    unit, before, dk = (x.to(DEVICE) for x in (torch.tensor([2.0, 4.0, 0.5, 1.0, 8.0]), torch.ones(5, 576), torch.zeros(5, 576)))
    finish[(2,)](sums, unit, before, dk, 5 * 576, FIRST=first, LAST=last, BK=2048)
    truth = whole.astype(np.float32) / unit.cpu().numpy()[:, None] + np.float32(not first)
    assert not sums.any() and np.array_equal((dk if last else before).cpu().numpy(), truth)
