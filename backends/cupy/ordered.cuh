// Sums in device memory that several blocks of threads add to in a fixed order, tile by tile: the copy engine adds a tile of shared memory, a counter says whose turn it is.
#pragma once
#include "hopper.cuh"

#ifdef SPARSETILE_EMULATE
inline void wait_turn(const int* counter, int turn, u32&) { emulate_wait_equal(counter, turn); }
inline void end_turn(int* counter, int turn) { *counter = turn + 1; }
inline int shared_int(u32 at) { return *(int*)(emulate_shared() + at); }
inline float2 shared_pair(u32 at) { return *(float2*)(emulate_shared() + at); }
inline void shared_store(u32 at, float a, float b, float c, float d) { *(float4*)(emulate_shared() + at) = make_float4(a, b, c, d); }
#else
// What the turns before wrote is complete from here on, for the copy engine too. Gives up as bar_wait does.
__device__ __forceinline__ void wait_turn(const int* counter, int turn, u32& patience) {
  const u32 since = (u32)clock();
  for (int now;;) {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
    if (now == turn) break;
    if ((u32)clock() - since >= patience) { patience = 0; break; }
  }
  asm volatile("fence.proxy.async.global;" ::: "memory");
}
// after tma_store_wait: a bulk group that is complete has been written, but only release and acquire order it between processors
__device__ __forceinline__ void end_turn(int* counter, int turn) { asm volatile("st.release.gpu.global.s32 [%0], %1;" :: "l"(counter), "r"(turn + 1) : "memory"); }
// by 32-bit address, where a register more would be one too many
__device__ __forceinline__ int shared_int(u32 at) { int x; asm volatile("ld.shared.s32 %0, [%1];" : "=r"(x) : "r"(at)); return x; }
__device__ __forceinline__ float2 shared_pair(u32 at) { float2 x; asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(at)); return x; }
__device__ __forceinline__ void shared_store(u32 at, float a, float b, float c, float d) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" :: "r"(at), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}
#endif
