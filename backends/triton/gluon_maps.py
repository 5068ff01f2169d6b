"""Tensor maps (maps.py) as Gluon wants them: with the layout of the blocks in shared memory."""
from functools import lru_cache

import triton.experimental.gluon.language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparsetile.backends.triton.maps import steps


class Map(TensorDescriptor):
    """Made at every call, so without the checks of its parent, which `can_map` has made."""

    def __init__(self, x, rows: int, columns: int):
        self.base, self.shape, self.strides, self.padding = x, list(x.shape), steps(x), "zero"
        self.block_shape, self.layout = [1] * (x.ndim - 2) + [rows, columns], map_layout(x.ndim, 8 * x.element_size(), columns)


@lru_cache
def map_layout(rank: int, bits: int = 16, columns: int = 64):
    return gl.NVMMASharedLayout(min(columns * bits // 8, 128), bits, rank)


def map_type(pointer: str, block: list[int], bits: int = 16) -> str:
    """A map of these blocks in the signature of a kernel that is compiled ahead; pointer: of its elements."""
    return f"tensordesc<{pointer[1:]}{block},{map_layout(len(block), bits, block[-1])!r}>"
