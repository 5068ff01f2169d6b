"""Repairs of Triton 3.6's interpreter (TRITON_INTERPRET=1), for tests on a CPU only.

The interpreter holds bfloat16 as uint16 bit patterns and computes on the patterns: no error, wrong numbers. `apply` makes products of bfloat16 tiles right
(operands widened exactly, float32 sums) and casts from float32 round to nearest even, as devices do. Elementwise arithmetic on bfloat16 stays broken: kernels
convert to float32 first. A fused multiply-add it rounds twice; here once, as devices do. NumPy 2.4 also refuses `int()` of one-element arrays, which the interpreter needs for loops with bounds computed on the device.
Stores by tensor maps refuse what a chip does. Once per process, before the first launch; safe to call again.
"""
import inspect

import numpy as np

_done = False


def widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns as float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(x: np.ndarray) -> np.ndarray:
    """float32 as bfloat16 bit patterns, to nearest even; a NaN stays a NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    up = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), (bits >> 16).astype(np.uint16) | np.uint16(0x40), up).reshape(np.shape(x))


def apply():
    global _done
    if _done:
        return
    _done = True
    import triton.language as tl
    import triton.runtime.interpreter as interpreter
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    dot, cast = builder.create_dot, builder.cast_impl

    def create_dot(self, a, b, d, *rest):
        if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return dot(self, a, b, d, *rest)
        x, y = (widened(t.data) if t.dtype.scalar == tl.bfloat16 else t.data for t in (a, b))
        return handle(np.matmul(x, y, dtype=d.data.dtype) + d.data, d.dtype.scalar)

    def cast_impl(self, source, kind):
        if source.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
            return handle(rounded(source.data), tl.bfloat16)
        return cast(self, source, kind)

    def create_fma(self, x, y, z):
        wide = [t.data.astype(np.float64) for t in (x, y, z)]
        return handle((wide[0] * wide[1] + wide[2]).astype(z.data.dtype), z.dtype.scalar)

    store = builder.create_descriptor_store

    def create_descriptor_store(self, description, value, indices):
        first = [int(np.squeeze(i.data)) for i in indices]
        assert min(first) >= 0, f"a store by a tensor map at {first}: on a chip a negative coordinate is an illegal instruction"
        return store(self, description, value, indices)

    builder.create_dot, builder.cast_impl, builder.create_fma, builder.create_descriptor_store = create_dot, cast_impl, create_fma, create_descriptor_store
    for name in ("create_fp_trunc", "create_fp_ext"):  # bound to the old cast_impl when the class was made
        if name in vars(builder):
            setattr(builder, name, lambda self, source, kind: self.cast_impl(source, kind))
    patch = interpreter._patch_lang_tensor
    if "squeeze" not in inspect.getsource(patch):
        def patched(tensor, *args, **kwargs):
            patch(tensor, *args, **kwargs)
            tensor.__index__ = lambda self: int(np.squeeze(self.handle.data))
        interpreter._patch_lang_tensor = patched
