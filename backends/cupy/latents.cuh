// Rows of a latent cache in the layout of DeepSeek-V3.2 (ops/caches/latent.py) as 16-bit elements in shared memory: LATENT float8_e4m3fn, a float32 scale for each 128 of them,
// then bfloat16 rotary values. A value is one product in float32, rounded once. LATENT is 0 where keys are elements of q's type.
#pragma once
#include "mma.cuh"
#ifndef LATENT
#define LATENT 0
#endif

// Four e4m3 times the scale of their group, as two pairs of elements.
template <int Kind> __device__ __forceinline__ void scaled_four(u32 x, float scale, u32& lo, u32& hi) {
#if !defined(SPARSETILE_EMULATE) && __CUDA_ARCH__ >= 890
  u32 a, b;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.rn.f16x2.e4m3x2 %0, l; cvt.rn.f16x2.e4m3x2 %1, h;}" : "=r"(a), "=r"(b) : "r"(x));
  lo = pack<Kind>(half_to_float((u16)a) * scale, half_to_float((u16)(a >> 16)) * scale);
  hi = pack<Kind>(half_to_float((u16)b) * scale, half_to_float((u16)(b >> 16)) * scale);
#else
  lo = pack<Kind>(e4m3_to_float((u8)x) * scale, e4m3_to_float((u8)(x >> 8)) * scale);
  hi = pack<Kind>(e4m3_to_float((u8)(x >> 16)) * scale, e4m3_to_float((u8)(x >> 24)) * scale);
#endif
}

// Columns first .. first + Columns - 1 of rows of `width` = LATENT + P values; zeros past them, and in rows that are null. Rows start at multiples of 4 bytes, and of Copy.
// Loads of a thread go out FLIGHT at a time, without a branch between them: one after the other each would wait for memory.
template <int Kind, int Rows, int Columns, int Copy, int Threads, int FLIGHT = 4, class Row>
__device__ __forceinline__ void copy_latents(u16* to, int stride, int first, int width, Row row) {
  constexpr int N = Copy == 16 ? 16 : 4, WIDE = Columns < LATENT ? Columns : LATENT, CHUNKS = WIDE / N, TOTAL = Rows * CHUNKS, PAIRS = (Columns - WIDE) / 2;
#pragma unroll (4 / FLIGHT)
  for (int i = threadIdx.x; i < TOTAL; i += FLIGHT * Threads) {
    u32 raw[FLIGHT][N / 4];
    float scale[FLIGHT];
#pragma unroll
    for (int f = 0; f < FLIGHT; f++) {
      const int x = i + f * Threads, c = first + x % CHUNKS * N;
      const u8* from = x < TOTAL ? row(x / CHUNKS) : nullptr;
      scale[f] = from ? __ldg((const float*)(from + LATENT) + c / 128) : 0.f;
      if constexpr (N == 16) {
        const uint4 y = from ? __ldg((const uint4*)(from + c)) : make_uint4(0, 0, 0, 0);
        raw[f][0] = y.x; raw[f][1] = y.y; raw[f][2] = y.z; raw[f][3] = y.w;
      } else raw[f][0] = from ? __ldg((const u32*)(from + c)) : 0;
    }
#pragma unroll
    for (int f = 0; f < FLIGHT; f++) {
      const int x = i + f * Threads;
      if (x >= TOTAL) break;
      u32* at = (u32*)(to + x / CHUNKS * stride + x % CHUNKS * N);
#pragma unroll
      for (int e = 0; e < N / 4; e++) {
        u32 lo, hi;
        scaled_four<Kind>(raw[f][e], scale[f], lo, hi);
        *(uint2*)(at + 2 * e) = make_uint2(lo, hi);
      }
    }
  }
  if constexpr (PAIRS > 0) {
#pragma unroll 4
    for (int i = threadIdx.x; i < Rows * PAIRS; i += Threads) {
      const int e = i % PAIRS;
      const u8* from = WIDE + 2 * e < width ? row(i / PAIRS) : nullptr;
      u32 pair = from ? __ldg((const u32*)(from + LATENT + LATENT / 32) + e) : 0;
      if constexpr (Kind == FLOAT16) pair = pack<FLOAT16>(to_float<BFLOAT16>((u16)pair), to_float<BFLOAT16>((u16)(pair >> 16)));
      *(u32*)(to + i / PAIRS * stride + WIDE + 2 * e) = pair;
    }
  }
}
