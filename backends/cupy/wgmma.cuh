// Warpgroup products (sm_90a): d (+)= A x B, A 64 x 16 from shared memory (its descriptor) or from registers (as in mma.m16n8k16, 16 rows a warp), B 16 x N from shared memory.
// K_MAJOR: rows stand along k; M_MAJOR, N_MAJOR: the tile's rows are k (descriptor_columns). acc 0: d is overwritten.
// Lane l of warp w holds rows 16 w + l / 4 (and + 8) of the sums, columns 8 c + 2 (l % 4) and + 1 as d[4 c .. 4 c + 3].
// Tiles have a 128-byte swizzle: a row of 128 bytes, 8 rows 1024 bytes, tiles at multiples of 1024; 32 bytes further along k is + 2 in a descriptor.
#pragma once
#include "hopper.cuh"

// Tiles whose rows are k: 64 columns to a row of 128 bytes, the next 64 columns `Next` bytes on; 16 rows further is + 128 in the descriptor
template <int Next = 8192> __device__ __forceinline__ u64 descriptor_columns(u32 tile) { return (u64)((tile & 0x3FFFF) >> 4) | ((u64)(Next >> 4) << 16) | (64ull << 32) | (1ull << 62); }
__device__ __forceinline__ u64 descriptor(u32 tile) { return (u64)((tile & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62); }
// Any tile: K-major rows of as many bytes as the swizzle is wide (`stride`: 8 rows), or rows of k with 64 columns each (`leading`: the next 64 columns; `stride`: 8 rows)
enum : u64 { SWIZZLE_128 = 1, SWIZZLE_64 = 2, SWIZZLE_32 = 3 };
__device__ __forceinline__ u64 descriptor_of(u32 tile, u32 leading, u32 stride, u64 swizzle) {
  return (u64)((tile & 0x3FFFF) >> 4) | (u64)(leading >> 4) << 16 | (u64)(stride >> 4) << 32 | swizzle << 62;
}

#ifdef SPARSETILE_EMULATE
inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int N> inline void wgmma_wait() {}
template <int N> inline void hold(float (&)[N]) {}
#else
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory"); }
template <int N> __device__ __forceinline__ void hold(float (&d)[N]) {  // accumulators are read or written from here on, not before
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i]) :: "memory");
}
#endif

enum Major : bool { K_MAJOR, N_MAJOR, M_MAJOR = true };
#ifdef SPARSETILE_EMULATE
template <int Kind, Major B, Major A = K_MAJOR, int Sums> inline void wgmma(float (&d)[Sums], u64 a, u64 b, int acc) { emulate_wgmma<2 * Sums>(d, nullptr, a, b, acc, Kind == BFLOAT16, B, A); }
template <int Kind, Major B, int Sums> inline void wgmma(float (&d)[Sums], const u32* a, u64 b, int acc) { emulate_wgmma<2 * Sums>(d, a, 0, b, acc, Kind == BFLOAT16, B); }
template <int Kind> inline void wgmma_pairs(float (&d)[32], const u32* a, u64 b, int acc) { emulate_wgmma_pairs<64>(d, a, b, acc, Kind == BFLOAT16); }
inline void wgmma_e4m3(float (&d)[64], u64 a, u64 b, int acc) { emulate_wgmma_e4m3<128>(d, a, b, acc); }
inline void wgmma_e4m3(float (&d)[32], u64 a, u64 b, int acc) { emulate_wgmma_e4m3<64>(d, a, b, acc); }
#else
#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D8(i) D4(i), D4(i + 4)
#define D16(i) D8(i), D8(i + 8)
#define D32(i) D16(i), D16(i + 16)
#define D64 D32(0), D32(32)
#define D96 D64, D32(64)
#define LIST4 "%0, %1, %2, %3"
#define LIST8 LIST4 ", %4, %5, %6, %7"
#define LIST16 LIST8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define LIST32 LIST16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LIST64 LIST32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LIST96 LIST64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA(SHAPE, TYPE, ACC, LIST, A, B, ENDS) "{.reg .pred p; setp.ne.b32 p, %" #ACC ", 0; wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPE "." TYPE " {" LIST "}, " A ", %" #B ", p, 1, 1" ENDS ";}"
// a0 .. a6: numbers of the operands after the sums
#define PRODUCTS(N, SUMS, LIST, a0, a1, a2, a3, a4, a5, a6) \
template <int Kind, Major B, Major A = K_MAJOR> __device__ __forceinline__ void wgmma(float (&d)[N / 2], u64 a, u64 b, int acc) { \
  if constexpr (Kind == BFLOAT16) asm volatile(WGMMA("m64n" #N "k16", "bf16", a2, LIST, "%" #a0, a1, ", %" #a3 ", %" #a4) : SUMS : "l"(a), "l"(b), "r"(acc), "n"((int)A), "n"((int)B)); \
  else asm volatile(WGMMA("m64n" #N "k16", "f16", a2, LIST, "%" #a0, a1, ", %" #a3 ", %" #a4) : SUMS : "l"(a), "l"(b), "r"(acc), "n"((int)A), "n"((int)B)); \
} \
template <int Kind, Major B> __device__ __forceinline__ void wgmma(float (&d)[N / 2], const u32* a, u64 b, int acc) { \
  if constexpr (Kind == BFLOAT16) asm volatile(WGMMA("m64n" #N "k16", "bf16", a5, LIST, "{%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}", a4, ", %" #a6) : SUMS : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(acc), "n"((int)B)); \
  else asm volatile(WGMMA("m64n" #N "k16", "f16", a5, LIST, "{%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}", a4, ", %" #a6) : SUMS : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(acc), "n"((int)B)); \
}
PRODUCTS(8, D4(0), LIST4, 4, 5, 6, 7, 8, 9, 10)
PRODUCTS(16, D8(0), LIST8, 8, 9, 10, 11, 12, 13, 14)
PRODUCTS(32, D16(0), LIST16, 16, 17, 18, 19, 20, 21, 22)
PRODUCTS(64, D32(0), LIST32, 32, 33, 34, 35, 36, 37, 38)
PRODUCTS(128, D64, LIST64, 64, 65, 66, 67, 68, 69, 70)
PRODUCTS(192, D96, LIST96, 96, 97, 98, 99, 100, 101, 102)
// Half the rows at twice the depth, by products whose A is sparse: A, 64 x 32, has two of every four columns, the first two in a warp's rows 0 .. 7 and the last two in its rows 8 .. 15.
// So 32 rows come whole where both hold the same ones, and a sum is d[4 c + e] + d[4 c + 2 + e] of one lane, which holds of its row l / 4 columns 4 (l % 4) .. + 3 in a[0] and a[1], those
// 16 further on in a[2] and a[3]. B, 64 x 32, is K-major in shared memory; 32 further along k is + 4 in its descriptor.
constexpr u32 PAIRS = 0xEEEE4444;  // which two of four a row has, a nibble for each four: rows 0 .. 7 in the low half, 8 .. 15 in the high one
#define WGMMA_PAIRS(TYPE) "{.reg .pred p; setp.ne.b32 p, %38, 0; wgmma.mma_async.sp.sync.aligned.m64n64k32.f32." TYPE "." TYPE " {" LIST32 "}, {%32, %33, %34, %35}, %36, %37, 0, p, 1, 1, 0;}"
template <int Kind> __device__ __forceinline__ void wgmma_pairs(float (&d)[32], const u32* a, u64 b, int acc) {
  if constexpr (Kind == BFLOAT16) asm volatile(WGMMA_PAIRS("bf16") : D32(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(PAIRS), "r"(acc));
  else asm volatile(WGMMA_PAIRS("f16") : D32(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(PAIRS), "r"(acc));
}
// A 64 x 32, B 128 x 32 or 64 x 32, both e4m3 in shared memory and K-major
__device__ __forceinline__ void wgmma_e4m3(float (&d)[64], u64 a, u64 b, int acc) { asm volatile(WGMMA("m64n128k32", "e4m3", 66, LIST64, "%64", 65, "") : D64 : "l"(a), "l"(b), "r"(acc)); }
__device__ __forceinline__ void wgmma_e4m3(float (&d)[32], u64 a, u64 b, int acc) { asm volatile(WGMMA("m64n64k32", "e4m3", 34, LIST32, "%32", 33, "") : D32(0) : "l"(a), "l"(b), "r"(acc)); }
#endif
