"""Tensor maps: how Hopper's copy engine sees an array. The driver encodes one in about 3 us; they are kept by what they depend on."""
import ctypes
import ctypes.util
from functools import lru_cache

BYTES = {"float8_e4m3fn": 1, "float16": 2, "bfloat16": 2, "float32": 4}
_KIND = {"float8_e4m3fn": 0, "float16": 6, "float32": 7, "bfloat16": 9}  # CUtensorMapDataType: UINT8, FLOAT16, FLOAT32, BFLOAT16


@lru_cache(1)
def _encode():
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        driver = ctypes.CDLL(ctypes.util.find_library("cuda") or "nvcuda.dll")
    return driver.cuTensorMapEncodeTiled


def tensor_map(place, x, shape: tuple, strides: tuple, box: tuple) -> bytes:
    """128 bytes for a `const __grid_constant__` struct. Axes innermost first, the first contiguous; strides in elements; 128-byte swizzle; zeros outside."""
    encode = getattr(place, "tensor_map", encoded)  # tests bring their own copy engine
    return encode(x.ptr, x.dtype, shape, strides, box)


@lru_cache(4096)
def encoded(ptr: int, dtype: str, shape: tuple, strides: tuple, box: tuple) -> bytes:
    rank, size = len(shape), BYTES[dtype]
    raw = ctypes.create_string_buffer(128 + 64)
    at = (ctypes.addressof(raw) + 63) & ~63
    dims = (ctypes.c_uint64 * rank)(*shape)
    steps = (ctypes.c_uint64 * max(rank - 1, 1))(*(s * size for s in strides[1:]))
    boxes, ones = (ctypes.c_uint32 * rank)(*box), (ctypes.c_uint32 * rank)(*(1,) * rank)
    no_interleave, swizzle_128, l2_256, zeros = 0, 3, 3, 0
    status = _encode()(ctypes.c_void_p(at), _KIND[dtype], rank, ctypes.c_void_p(ptr), dims, steps, boxes, ones, no_interleave, swizzle_128, l2_256, zeros)
    if status:
        raise RuntimeError(f"cuTensorMapEncodeTiled: error {status} for shape {shape}, strides {strides}, box {box} of {dtype}")
    return ctypes.string_at(at, 128)


def can_map(x) -> bool:
    """Base and strides at multiples of 16 bytes, last axis contiguous, as the copy engine asks; an axis of one element may have any stride."""
    size = BYTES.get(x.dtype)
    return size is not None and x.ptr % 16 == 0 and (x.strides[-1] == 1 or x.shape[-1] == 1) and all(n == 1 or (s > 0 and s * size % 16 == 0) for n, s in zip(x.shape[:-1], x.strides))


def can_map_weight(w, k_axis: int, n_axis: int) -> bool:
    """The same for a matrix of each head, whichever of its axes is contiguous."""
    return w.ptr % 16 == 0 and all(s > 0 and s % 8 == 0 for s in (w.strides[0], *(s for s in (w.strides[k_axis], w.strides[n_axis]) if s != 1)))


def steps(x) -> tuple:
    """Strides of x for a tensor map: where an axis has one element its stride counts for nothing, but has to be legal."""
    legal = max(16, -(-x.shape[-1] // 16) * 16)
    return tuple(s if n > 1 else legal for n, s in zip(x.shape[:-1], x.strides))
