// Warpgroup products of 16-bit tiles for attention: scores from two tiles in shared memory, output from probabilities in registers and values in shared memory.
// Lane l of warp w holds rows 16 w + l / 4 (and + 8) of the accumulator, columns 8 c + 2 (l % 4) and + 1 as d[4 c .. 4 c + 3]; acc 0: d is overwritten.
#pragma once
#include "hopper.cuh"

#ifndef SPARSETILE_EMULATE
#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D16(i) D4(i), D4(i + 4), D4(i + 8), D4(i + 12)
#define D32 D16(0), D16(16)
#define D64 D32, D16(32), D16(48)
#define LIST16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define LIST32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LIST64 LIST32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA(N, TYPE, ACC, LIST, A, B, ENDS) "{.reg .pred p; setp.ne.b32 p, %" ACC ", 0; wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" LIST "}, " A ", %" B ", p, 1, 1, " ENDS ";}"
#endif

// d (+)= A x B: A 64 x 16, B 128 x 16, rows along k (descriptor)
template <int Kind> __device__ __forceinline__ void multiply_keys(float (&d)[64], u64 a, u64 b, int acc) {
#ifdef SPARSETILE_EMULATE
  emulate_wgmma<128>(d, nullptr, a, b, acc, Kind == BFLOAT16, false);
#else
  if constexpr (Kind == BFLOAT16) asm volatile(WGMMA("128", "bf16", "66", LIST64, "%64", "65", "0, 0") : D64 : "l"(a), "l"(b), "r"(acc));
  else asm volatile(WGMMA("128", "f16", "66", LIST64, "%64", "65", "0, 0") : D64 : "l"(a), "l"(b), "r"(acc));
#endif
}

// d (+)= A x B: A 64 x 16 in registers (as in mma.m16n8k16, 16 rows a warp), B 16 x N whose rows are k (descriptor_columns)
template <int Kind> __device__ __forceinline__ void multiply_values(float (&d)[64], const u32* a, u64 b, int acc) {
#ifdef SPARSETILE_EMULATE
  emulate_wgmma<128>(d, a, 0, b, acc, Kind == BFLOAT16, true);
#else
  if constexpr (Kind == BFLOAT16)
    asm volatile(WGMMA("128", "bf16", "69", LIST64, "{%64, %65, %66, %67}", "68", "1") : D64 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(acc));
  else
    asm volatile(WGMMA("128", "f16", "69", LIST64, "{%64, %65, %66, %67}", "68", "1") : D64 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(acc));
#endif
}
template <int Kind> __device__ __forceinline__ void multiply_values(float (&d)[32], const u32* a, u64 b, int acc) {
#ifdef SPARSETILE_EMULATE
  emulate_wgmma<64>(d, a, 0, b, acc, Kind == BFLOAT16, true);
#else
  if constexpr (Kind == BFLOAT16)
    asm volatile(WGMMA("64", "bf16", "37", LIST32, "{%32, %33, %34, %35}", "36", "1") : D32 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(acc));
  else
    asm volatile(WGMMA("64", "f16", "37", LIST32, "{%32, %33, %34, %35}", "36", "1") : D32 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(acc));
#endif
}

// d (+)= A x B: A 64 x 16, B 64 x 16, rows along k (descriptor)
template <int Kind> __device__ __forceinline__ void multiply_keys(float (&d)[32], u64 a, u64 b, int acc) {
#ifdef SPARSETILE_EMULATE
  emulate_wgmma<64>(d, nullptr, a, b, acc, Kind == BFLOAT16, false);
#else
  if constexpr (Kind == BFLOAT16) asm volatile(WGMMA("64", "bf16", "34", LIST32, "%32", "33", "0, 0") : D32 : "l"(a), "l"(b), "r"(acc));
  else asm volatile(WGMMA("64", "f16", "34", LIST32, "%32", "33", "0, 0") : D32 : "l"(a), "l"(b), "r"(acc));
#endif
}
// d (+)= A x B: A 64 x 16, rows along k (descriptor), B 16 x N whose rows are k (descriptor_columns)
template <int Kind> __device__ __forceinline__ void multiply_columns(float (&d)[32], u64 a, u64 b, int acc) {
#ifdef SPARSETILE_EMULATE
  emulate_wgmma<64>(d, nullptr, a, b, acc, Kind == BFLOAT16, true);
#else
  if constexpr (Kind == BFLOAT16) asm volatile(WGMMA("64", "bf16", "34", LIST32, "%32", "33", "0, 1") : D32 : "l"(a), "l"(b), "r"(acc));
  else asm volatile(WGMMA("64", "f16", "34", LIST32, "%32", "33", "0, 1") : D32 : "l"(a), "l"(b), "r"(acc));
#endif
}
template <int Kind> __device__ __forceinline__ void multiply_columns(float (&d)[16], u64 a, u64 b, int acc) {
#ifdef SPARSETILE_EMULATE
  emulate_wgmma<32>(d, nullptr, a, b, acc, Kind == BFLOAT16, true);
#else
  if constexpr (Kind == BFLOAT16) asm volatile(WGMMA("32", "bf16", "18", LIST16, "%16", "17", "0, 1") : D16(0) : "l"(a), "l"(b), "r"(acc));
  else asm volatile(WGMMA("32", "f16", "18", LIST16, "%16", "17", "0, 1") : D16(0) : "l"(a), "l"(b), "r"(acc));
#endif
}
