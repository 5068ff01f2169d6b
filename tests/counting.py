"""A place that counts bytes and makes none."""
import numpy as np

from sparsetile.backends.arrays import ITEMSIZE, View


class Memory:
    """An array of no bytes, which its place counts as long as somebody holds it."""

    def __init__(self, place, size: int):
        self.place, self.size = place, size
        place.alive += size
        place.most = max(place.most, place.alive)

    def __del__(self):
        self.place.alive -= self.size


class CountingPlace:
    arch, sms, device, stream = "sm_90a", 132, 0, 0
    alive = most = 0

    def empty(self, shape, dtype):
        steps = np.cumprod((1, *shape[:0:-1]))[::-1].tolist()
        return View(4096, tuple(shape), tuple(steps), dtype, 0, Memory(self, int(np.prod(shape)) * ITEMSIZE[dtype]))

    zeros = empty

    def upload(self, x):
        """What is kept with the layout: no call's scratch."""
        return View(4096, x.shape, (1,) * x.ndim, "int32", 0, x)

    def tensor_map(self, *about):
        return b""
