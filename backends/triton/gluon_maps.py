"""Tensor maps as Gluon wants them: with the layout of the blocks in shared memory, of 16-bit elements swizzled over 128 bytes."""
from functools import lru_cache

import triton.experimental.gluon.language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparsetile.backends.triton.maps import steps


class Map(TensorDescriptor):
    """maps.Map with a layout."""

    def __init__(self, x, rows: int, columns: int):
        self.base, self.shape, self.strides, self.padding = x, list(x.shape), steps(x), "zero"
        self.block_shape, self.layout = [1] * (x.ndim - 2) + [rows, columns], _layout(x.ndim)


@lru_cache
def _layout(rank: int):
    return gl.NVMMASharedLayout(128, 16, rank)


def described(pointer: str, rank: int, rows: int, columns: int) -> str:
    """The type of such a map of elements that `pointer` points to, to compile ahead."""
    return f"tensordesc<{pointer[1:]}{[1] * (rank - 2) + [rows, columns]},{_layout(rank)!r}>"
