// float8_e4m3fn keys and values of attention, with a scale for 128 keys that follow each other; FLOAT8 is 0 where keys are elements of q's type, 1 where they are float8, 2 where queries are too.
//
// Tiles in shared memory hold them as 16-bit elements, exactly: K in KIND, the type of the products with Q (float16 for float8 queries), V in bfloat16, whose range holds what
// v_scale makes of a probability. Scores are multiplied by the scales of their query and key in float32, probabilities by that of their value before they are rounded.
#pragma once
#include "lists.cuh"
#include "mma.cuh"
#ifndef FLOAT8
#define FLOAT8 0
#endif

constexpr int VALUE_KIND = FLOAT8 ? BFLOAT16 : KIND;
using Key = Element<FLOAT8 ? FLOAT8_E4M3FN : KIND>;
using Query = Element<FLOAT8 == 2 ? FLOAT8_E4M3FN : KIND>;

struct Scales {  // packed behind the other fields; null: 1
  const float *q, *k, *v;
};

__device__ __forceinline__ float scale_at(const float* scales, i64 at) { return scales ? __ldg(scales + at) : 1.f; }

template <int Kind> __device__ __forceinline__ uint2 exact_four(u32 x) {
#if !defined(SPARSETILE_EMULATE) && __CUDA_ARCH__ >= 890
  u32 a, b;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.rn.f16x2.e4m3x2 %0, l; cvt.rn.f16x2.e4m3x2 %1, h;}" : "=r"(a), "=r"(b) : "r"(x));
  if constexpr (Kind == FLOAT16) return make_uint2(a, b);
  else return make_uint2(pack<Kind>(half_to_float((u16)a), half_to_float((u16)(a >> 16))), pack<Kind>(half_to_float((u16)b), half_to_float((u16)(b >> 16))));
#else
  return make_uint2(pack<Kind>(e4m3_to_float((u8)x), e4m3_to_float((u8)(x >> 8))), pack<Kind>(e4m3_to_float((u8)(x >> 16)), e4m3_to_float((u8)(x >> 24))));
#endif
}

// the two bytes in the middle of a word change places
__device__ __forceinline__ u32 turn_middle(u32 x) {
#ifdef SPARSETILE_EMULATE
  return (x & 0xff0000ff) | (x >> 8 & 0xff00) | (x << 8 & 0xff0000);
#else
  return __byte_perm(x, 0, 0x3120);
#endif
}

template <int Kind> __device__ __forceinline__ uint4 exact_eight(u32 x, u32 y) {
  const uint2 a = exact_four<Kind>(x), b = exact_four<Kind>(y);
  return make_uint4(a.x, a.y, b.x, b.y);
}

template <int Kind> __device__ __forceinline__ void store_sixteen(u16* to, uint4 x) {
  *(uint4*)to = exact_eight<Kind>(x.x, x.y);
  *(uint4*)(to + 8) = exact_eight<Kind>(x.z, x.w);
}

// copy_tile (mma.cuh) of float8 rows, converted on the way.
template <int Kind, int Rows, int Columns, int Copy, int Threads, class Row> __device__ __forceinline__ void copy_float8(u16* to, int stride, int width, i64 step, Row row) {
  constexpr int N = Copy == 16 ? 16 : Copy >= 4 ? 4 : 1, CHUNKS = Columns / N, TOTAL = Rows * CHUNKS;
#pragma unroll 4
  for (int i = threadIdx.x; i < TOTAL; i += Threads) {
    const int r = i / CHUNKS, c = i % CHUNKS * N;
    const u8* from = row(r);
    const bool exists = from != nullptr && c < width;
    u16* at = to + r * stride + c;
    if constexpr (N == 16) store_sixteen<Kind>(at, exists ? __ldg((const uint4*)(from + c)) : make_uint4(0, 0, 0, 0));
    else if constexpr (N == 4) *(uint2*)at = exact_four<Kind>(exists ? __ldg((const u32*)(from + c)) : 0);
    else *at = from_float<Kind>(exists ? e4m3_to_float(from[c * step]) : 0.f);
  }
}
