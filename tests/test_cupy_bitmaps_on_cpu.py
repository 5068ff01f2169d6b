"""CuPy's bitmaps of a selection, executed on the CPU, are the reference's."""
import numpy as np
import pytest
from cuda_on_cpu import CXX, CpuPlace
from test_selected_blocks import CASES, S, made, same_bits

from sparsetile.backends.cupy import selection_bitmaps as cupy
from sparsetile.backends.reference import selection_bitmaps as reference


@pytest.mark.skipif(CXX is None, reason="g++ compiles the kernel for the CPU, and is not there")
@pytest.mark.parametrize("case", CASES)
def test_bits_of_a_selection(case, rng):
    place, (entries, how) = CpuPlace(), made(rng, **CASES[case])
    arrays = {name: place.put(x) if isinstance(x, np.ndarray) else x for name, x in how.items()}
    got = cupy.run(place.put(entries), place=place, config={}, S=S, block_q=128, block_k=128, **arrays)
    same_bits([place.get(x) for x in got], reference.run(entries, S=S, block_q=128, block_k=128, **how))
