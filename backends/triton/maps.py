"""Tensor maps: arrays as the copy engine of Hopper and later reads them, in blocks of [rows, columns] of the last two axes, with zeros outside."""
from triton.tools.tensor_descriptor import TensorDescriptor


def can_map(x) -> bool:
    """Base and strides at multiples of 16 bytes; an axis of one element may have any stride."""
    size = x.element_size()
    return x.data_ptr() % 16 == 0 and all(n == 1 or s > 0 and s * size % 16 == 0 for n, s in zip(x.shape[:-1], x.stride()))


def steps(x) -> list[int]:
    """The strides of x; where an axis has one element its stride counts for nothing, but has to be legal."""
    return [s if n > 1 else -(-x.shape[-1] // 16) * 16 for n, s in zip(x.shape[:-1], x.stride())] + [1]


class Map(TensorDescriptor):
    """Made at every call, so without the checks of its parent, which `can_map` has made."""

    def __init__(self, x, rows: int, columns: int):
        self.base, self.shape, self.strides, self.padding = x, list(x.shape), steps(x), "zero"
        self.block_shape = [1] * (x.ndim - 2) + [rows, columns]
