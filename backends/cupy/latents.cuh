// Rows of a latent cache in the layout of DeepSeek-V3.2 (ops/caches/latent.py) as 16-bit elements in shared memory: LATENT float8_e4m3fn, a float32 scale for each 128 of them,
// then bfloat16 rotary values. A value is one product in float32, rounded once. LATENT is 0 where keys are elements of q's type.
#pragma once
#include "mma.cuh"
#ifndef LATENT
#define LATENT 0
#endif

// Two e4m3 times the scale of their group, as two elements.
template <int Kind> __device__ __forceinline__ u32 scaled_pair(u32 x, float scale) {
#if !defined(SPARSETILE_EMULATE) && __CUDA_ARCH__ >= 890
  u32 r;
  const u16 both = (u16)x;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"(both));
  return pack<Kind>(half_to_float((u16)r) * scale, half_to_float((u16)(r >> 16)) * scale);
#else
  return pack<Kind>(e4m3_to_float((u8)x) * scale, e4m3_to_float((u8)(x >> 8)) * scale);
#endif
}

// Columns first .. first + Columns - 1 of rows of `width` = LATENT + P values; zeros past them, and in rows that are null. Rows start at multiples of 4 bytes, and of Copy.
template <int Kind, int Rows, int Columns, int Copy, int Threads, class Row>
__device__ __forceinline__ void copy_latents(u16* to, int stride, int first, int width, Row row) {
  constexpr int N = Copy == 16 ? 16 : 4, CHUNKS = Columns / N;
#pragma unroll 3  // divides the turns of 576 columns: with a rest to do ptxas spills
  for (int i = threadIdx.x; i < Rows * CHUNKS; i += Threads) {
    const int r = i / CHUNKS, c = first + i % CHUNKS * N;
    const u8* from = row(r);
    u32 pairs[N / 2] = {};
    if (from && c < LATENT) {
      u32 raw[N / 4];
      if constexpr (N == 16) {
        const uint4 x = __ldg((const uint4*)(from + c));
        raw[0] = x.x; raw[1] = x.y; raw[2] = x.z; raw[3] = x.w;
      } else raw[0] = __ldg((const u32*)(from + c));
      const float scale = __ldg((const float*)(from + LATENT) + c / 128);
#pragma unroll
      for (int e = 0; e < N / 4; e++) pairs[2 * e] = scaled_pair<Kind>(raw[e], scale), pairs[2 * e + 1] = scaled_pair<Kind>(raw[e] >> 16, scale);
    } else if (from) {
#pragma unroll
      for (int e = 0; e < N / 2; e++) {
        if (c + 2 * e >= width) break;
        pairs[e] = __ldg((const u32*)(from + LATENT + LATENT / 32) + (c - LATENT) / 2 + e);
        if constexpr (Kind == FLOAT16) pairs[e] = pack<FLOAT16>(to_float<BFLOAT16>((u16)pairs[e]), to_float<BFLOAT16>((u16)(pairs[e] >> 16)));
      }
    }
    u16* at = to + r * stride + c - first;
#pragma unroll
    for (int e = 0; e < N / 2; e += N / 4) {
      if constexpr (N == 16) *(uint4*)(at + 2 * e) = make_uint4(pairs[e], pairs[e + 1], pairs[e + 2], pairs[e + 3]); else *(u32*)(at + 2 * e) = pairs[e];
    }
  }
}
