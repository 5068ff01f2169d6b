// Element types without CUDA's headers: NVRTC then needs no include folder, and the same text compiles with g++ for the tests on a CPU (SPARSETILE_EMULATE).
#pragma once
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;

enum { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2, FLOAT8_E4M3FN = 3 };  // as arrays.py's callers number them: compile.KINDS

template <int Kind> struct Bits { using type = u16; };
template <> struct Bits<FLOAT32> { using type = float; };
template <> struct Bits<FLOAT8_E4M3FN> { using type = u8; };
template <int Kind> using Element = typename Bits<Kind>::type;

__device__ __forceinline__ float inf() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ int imin(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int imax(int a, int b) { return a > b ? a : b; }
__device__ __forceinline__ int clamp(int x, int lo, int hi) { return x < lo ? lo : x > hi ? hi : x; }
// rounds towards minus infinity: positions before 0 belong to tiles before 0
__device__ __forceinline__ int floor_div(int a, int b) { return a >= 0 ? a / b : -1 - (-1 - a) / b; }

__device__ __forceinline__ float half_to_float(u16 x) {
#ifdef SPARSETILE_EMULATE
  return emulate_half_to_float(x);
#else
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
#endif
}

// two floats rounded to nearest even, the first in the low half
template <int Kind> __device__ __forceinline__ u32 pack(float lo, float hi) {
#ifdef SPARSETILE_EMULATE
  return emulate_round(lo, Kind == BFLOAT16) | (u32)emulate_round(hi, Kind == BFLOAT16) << 16;
#else
  u32 r;
  if constexpr (Kind == BFLOAT16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
#endif
}

// e4m3fn: 448 is the largest, 0x7f and 0xff are NaN, no infinity; exact by an exponent shift (denormals are multiples of 2^-9)
__device__ __forceinline__ float e4m3_to_float(u8 x) {
  const u32 magnitude = x & 0x7f;
  float y = magnitude < 8 ? magnitude * 0.001953125f : __int_as_float((magnitude << 20) + (120u << 23));
  if (magnitude == 0x7f) y = __int_as_float(0x7fffffff);
  return x & 0x80 ? -y : y;
}

template <int Kind> __device__ __forceinline__ float to_float(Element<Kind> x) {
  if constexpr (Kind == FLOAT32) return x;
  else if constexpr (Kind == FLOAT16) return half_to_float(x);
  else if constexpr (Kind == BFLOAT16) return __int_as_float((u32)x << 16);
  else return e4m3_to_float(x);
}

template <int Kind> __device__ __forceinline__ Element<Kind> from_float(float x) {
  if constexpr (Kind == FLOAT32) return x;
  else return (u16)pack<Kind>(x, 0.f);
}

// two neighbouring outputs; `both` says that the second exists, `aligned` that the pair may be written at once
template <int Kind> __device__ __forceinline__ void store_pair(Element<Kind>* p, float x, float y, bool both, bool aligned) {
  if constexpr (Kind == FLOAT32) {
    if (both && aligned) { *(float2*)p = make_float2(x, y); return; }
    p[0] = x;
    if (both) p[1] = y;
  } else {
    const u32 v = pack<Kind>(x, y);
    if (both && aligned) { *(u32*)p = v; return; }
    p[0] = (u16)v;
    if (both) p[1] = (u16)(v >> 16);
  }
}

__device__ __forceinline__ float ex2(float x) {
#ifdef SPARSETILE_EMULATE
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
