"""Memory around and inside every array that a call allocates, filled with NaN: a value that is not written shows, and so does one that is written outside."""
import contextlib

import numpy as np

from sparsetile.backends import arrays, places

BYTES = 4096  # on each side; keeps every alignment that kernels ask for
NAN, NUMBER = 0xFF, 0x7F  # each byte of floats, and of whole numbers


class Overwritten(AssertionError):
    """A kernel wrote outside the arrays it was given."""


@contextlib.contextmanager
def around():
    """Within it every place allocates between bands; they are looked at when it ends."""
    held, kinds = [], (places.NumpyPlace, places.TorchPlace, places.ViewPlace)
    plain = {kind: kind.empty for kind in kinds}
    try:
        for kind in kinds:
            kind.empty = _between(plain[kind], held)
        yield
    finally:
        for kind in kinds:
            kind.empty = plain[kind]
    for whole, size, fill in held:
        for band in (whole[:BYTES], whole[BYTES + size:]):
            if not bool((band == fill).all()):
                raise Overwritten("memory around an output was written")


def _between(plain, held):
    def empty(place, shape, dtype):
        size = int(np.prod(shape, dtype=np.int64)) * arrays.ITEMSIZE[dtype]
        made = plain(place, (size + 2 * BYTES,), "uint8")
        whole = getattr(made, "owner", made)
        fill = NUMBER if "int" in dtype else NAN
        whole[...] = fill
        held.append((whole, size, fill))
        inside = whole[BYTES:BYTES + size]
        inside = inside.view(arrays.torch_dtype(dtype) if type(whole).__module__ == "torch" else arrays.numpy_dtype(dtype)).reshape(tuple(shape))
        return arrays.view(inside) if made is not whole else inside
    return empty
