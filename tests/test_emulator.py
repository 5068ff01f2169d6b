"""The GPU on the CPU (cuda_on_cpu.hpp) says where threads stand when a kernel cannot end, and runs the next one."""
import numpy as np
import pytest
from cuda_on_cpu import CXX, CpuPlace

from sparsetile.backends.cupy import compile as nvrtc

pytestmark = pytest.mark.skipif(CXX is None, reason="g++ compiles the kernels for the CPU, and is not there")
KERNEL = f"""#include "{nvrtc.FOLDER}/hopper.cuh"
#include "{nvrtc.FOLDER}/ordered.cuh"
struct Params {{ const int* counter; int turn; }};
extern "C" __global__ void waits(const __grid_constant__ Params p) {{
  u32 patience = 0;
  if (threadIdx.x == 0) bar_init(64, 1);
  do __syncthreads(); while (p.turn == 9);
  if (threadIdx.x < 32 || *p.counter == p.turn) return;
  if (threadIdx.x < 96) named_sync(3, 128);
  else if (threadIdx.x < 128) bar_wait(64, 0, patience);
  else if (threadIdx.x < 130) wait_turn(p.counter, p.turn, patience);
  else __syncwarp();
}}
"""


def test_a_kernel_that_cannot_end_says_where_its_threads_stand(tmp_path, monkeypatch):
    (tmp_path / "waits.cu").write_text(KERNEL)
    monkeypatch.setattr(nvrtc, "FOLDER", tmp_path)
    kernel, counter = CpuPlace(tmp_path).compile("waits", "waits", "Qi4x", {}), np.zeros(1, np.int32)
    with pytest.raises(AssertionError) as said:
        kernel((1, 2, 1), 160, 128, 0, counter.ctypes.data, 7)
    assert str(said.value) == ("nobody can go on: block (0, 0, 0), threads 0 to 31 at their end, threads 32 to 95 at named barrier 3, threads 96 to 127 at a barrier's first phase, shared memory 64, "
                               "threads 128 to 129 at a counter in memory that is not yet 7, threads 130 to 159 at an instruction of warp 4")
    monkeypatch.setenv("SPARSETILE_EMULATE_SECONDS", "0")
    with pytest.raises(AssertionError, match="too slow, or without an end: block .0, 0, 0., threads 0 to [0-9]+ at __syncthreads"):
        kernel((1, 2, 1), 160, 128, 0, counter.ctypes.data, 9)
    monkeypatch.delenv("SPARSETILE_EMULATE_SECONDS")
    kernel((1, 2, 1), 160, 128, 0, counter.ctypes.data, 0)
