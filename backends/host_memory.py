"""Memory of CPU results: whole cache lines, taken again by a result of the same size once nobody holds it."""
import math

import numpy as np

_LEFT = {}  # size -> memory of results that nobody holds any more, the latest last
MOST_LEFT = 64 << 20  # bytes


class _Lines:
    """Memory in whole cache lines; when the last array over it is gone it waits for a result of the same size. A kernel's first touch of new pages costs more than
    a tenth of a sparse call, and several times that on a virtual machine whose host takes back what is free."""

    def __init__(self, memory):
        self.memory, self.__array_interface__ = memory, memory.__array_interface__

    def __del__(self):
        size = len(self.memory)
        if size <= MOST_LEFT:
            _LEFT.setdefault(size, []).append(self.memory)
            for old in list(_LEFT):  # in the order in which sizes came
                if sum(each * len(waiting) for each, waiting in list(_LEFT.items())) > MOST_LEFT:
                    _LEFT.pop(old, None)


def in_lines(shape, dtype, make):
    """make(shape, dtype) on the CPU, but a large array begins on a cache line (NumPy begins 16 bytes behind one, and every vector that is stored would straddle two), in
    memory that a result before it left, if one of its size did. If none did, what waits is given back: memory waits for calls that repeat their shapes."""
    size = math.prod(shape) * dtype.itemsize
    if size < 1 << 16:
        return make(shape, dtype)
    try:
        memory = _LEFT[size].pop()  # one step: another thread may ask for it
        if make is np.zeros:
            memory.fill(0)
    except (KeyError, IndexError):
        _LEFT.clear()
        memory = make(size + 64, np.uint8)
        first = -memory.__array_interface__["data"][0] % 64
        memory = memory[first:first + size]
    return np.asarray(_Lines(memory)).view(dtype).reshape(shape)
