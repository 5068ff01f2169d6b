"""The CuPy backend's lists of blocks, run on the CPU as they are written (cuda_on_cpu.py): those of the reference, which is judged by hand."""
import numpy as np
import pytest
from cuda_on_cpu import CXX, CpuPlace
from test_layout import GRIDS, assert_same_lists, grid_of

from sparsetile.backends.cupy import layout
from sparsetile.backends.reference import layout as reference

pytestmark = pytest.mark.skipif(CXX is None, reason="g++ compiles the kernels for the CPU, and is not there")


@pytest.mark.parametrize("shape", [*GRIDS, (1, 40, 33), (3, 2, 300), (1, 1100, 2)], ids=str)
@pytest.mark.parametrize("kind", ["kinds", "mask", "turned"])
def test_lists(shape, kind, rng):
    """Kinds with rows of a table, a mask of bytes, and kinds whose columns lie in memory as rows."""
    place, grid = CpuPlace(), grid_of(rng, shape)
    grid = (grid != -2).astype(np.uint8) if kind == "mask" else np.ascontiguousarray(grid.swapaxes(1, 2)).swapaxes(1, 2) if kind == "turned" else grid
    got = layout.run(place.put(grid), place=place, config={"threads": 1024})
    assert_same_lists({name: place.get(x) for name, x in got.items()}, reference.run(grid))
