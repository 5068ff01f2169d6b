"""cuBLAS through CuPy's binding: one product of 16-bit matrices for each of a row of heads."""
import threading
from functools import lru_cache

import numpy as np

_TYPES = {"float32": 0, "float16": 2, "bfloat16": 14}  # cudaDataType
_SUMS, _ANY_ALGORITHM = 68, -1  # CUBLAS_COMPUTE_32F: sums in float32
_SUMS_STAY_WIDE = 16            # CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION: parts of a sum are not rounded to the output's type
_ONE, _ZERO = np.ones((), np.float32), np.zeros((), np.float32)
_local = threading.local()


@lru_cache(1)
def missing() -> str | None:
    """Why cuBLAS is not to be had here."""
    try:
        from cupy_backends.cuda.libs import cublas
    except ImportError as error:
        return f"path cublas: CuPy's binding does not load ({error}); take portable"
    return None if hasattr(cublas, "gemmStridedBatchedEx") else "path cublas: this CuPy has no gemmStridedBatchedEx; take portable"


def _handle(device: int) -> int:
    """One of our own for each thread: the math mode is the handle's, and CuPy's belongs to its user."""
    from cupy_backends.cuda.libs import cublas
    held = _local.__dict__.setdefault("held", {})
    if device not in held:
        held[device] = cublas.create()
        cublas.setMathMode(held[device], _SUMS_STAY_WIDE)
    return held[device]


def products(place, x: tuple, w: tuple, out: tuple, rows: int, M: int, N: int, heads: int, w_rows: int, kinds: tuple) -> None:
    """out[h] [rows,M] = x[h] [rows,N] w[h]^T. x, w, out: (address, elements from row to row, from head to head); w_rows: N is w's contiguous axis, else M is;
    kinds: of the operands and of out. cuBLAS counts by columns, so a row of ours is one of its columns."""
    from cupy.cuda import Device, ExternalStream
    from cupy_backends.cuda.libs import cublas
    a, c = _TYPES[kinds[0]], _TYPES[kinds[1]]
    with Device(place.device), ExternalStream(place.stream):  # the binding takes CuPy's current stream
        cublas.gemmStridedBatchedEx(_handle(place.device), int(w_rows), 0, M, rows, N, _ONE.ctypes.data, w[0], a, w[1], w[2], x[0], a, x[1], x[2],
                                    _ZERO.ctypes.data, out[0], c, out[1], out[2], heads, _SUMS, _ANY_ALGORITHM)
