"""A place with Hopper's copy engine and warpgroup products on the CPU (hopper_on_cpu.hpp)."""
import struct

from cuda_on_cpu import CpuPlace

from sparsetile.backends.cupy.hopper import BYTES


class HopperPlace(CpuPlace):
    arch, sms, cluster = "sm_90a", 3, 1

    def tensor_map(self, ptr, dtype, shape, strides, box):
        five = lambda x: (*x, *(1,) * (5 - len(x)))  # noqa: E731
        size = BYTES[dtype]
        assert ptr % 16 == 0 and all(s * size % 16 == 0 for s in strides[1:]) and all(1 <= b <= 256 for b in box) and strides[0] == 1
        return struct.pack("@Qii5I5I5q32x", ptr, len(shape), size, *five(shape), *five(box), *(s * size for s in (*strides, *(0,) * (5 - len(strides)))))
