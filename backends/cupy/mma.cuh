// Tensor cores the portable way (sm_80 and later): mma.sync m16n8k16, ldmatrix, cp.async, and copies of tiles into shared memory.
//
// Who holds what (PTX ISA, "Matrix Fragments for mma.m16n8k16"), with g = lane / 4, t = lane % 4:
//   A 16x16: a0 row g columns 2t 2t+1, a1 row g+8, a2 row g columns 2t+8 2t+9, a3 row g+8 columns 2t+8 2t+9
//   B 16x8:  b0 rows 2t 2t+1 of column g, b1 rows 2t+8 2t+9
//   C 16x8:  c0 c1 row g columns 2t 2t+1, c2 c3 row g+8
// So C of one product, packed in pairs, is A of the next: columns 16k.. come from the n-tiles 2k (a0, a1) and 2k+1 (a2, a3).
// Rows in shared memory are 16 bytes longer than their data: with a width that is a multiple of 16 elements, their stride is an odd number
// of 16-byte units and the 8 rows of one ldmatrix fall into 8 different groups of banks.
#pragma once
#include "numbers.cuh"
constexpr int PAD = 8;  // elements of 2 bytes

#ifdef SPARSETILE_EMULATE
#define DYNAMIC_SHARED(name) unsigned char* name = emulate_shared()
#else
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

__device__ __forceinline__ u32 shared_address(const void* p) {
#ifdef SPARSETILE_EMULATE
  return 0;
#else
  return (u32)__cvta_generic_to_shared(p);
#endif
}

template <int Kind> __device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#ifdef SPARSETILE_EMULATE
  emulate_mma(c, a, b0, b1, Kind == BFLOAT16);
#else
  if constexpr (Kind == BFLOAT16)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// four 8x8 matrices; lanes 8i .. 8i+7 give the rows of matrix i, register i of a lane holds row lane / 4, columns 2 (lane % 4) and the next
__device__ __forceinline__ void ldmatrix(u32 (&r)[4], const void* row) {
#ifdef SPARSETILE_EMULATE
  emulate_ldmatrix(r, row, false);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
#endif
}

// the same, each matrix transposed
__device__ __forceinline__ void ldmatrix_trans(u32 (&r)[4], const void* row) {
#ifdef SPARSETILE_EMULATE
  emulate_ldmatrix(r, row, true);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
#endif
}

// Fragments from tiles [rows][stride] in shared memory. `A`: 16 rows from r, 16 columns from c.
__device__ __forceinline__ void load_a(u32 (&a)[4], const u16* tile, int stride, int r, int c) {
  const int lane = threadIdx.x & 31;
  ldmatrix(a, tile + (r + (lane & 15)) * stride + c + (lane >> 4) * 8);
}
// B of two n-tiles where the tile's rows are B's columns (scores: a row is a key): b[0], b[1] belong to rows n .. n+7, b[2], b[3] to n+8 .. n+15
__device__ __forceinline__ void load_b_rows(u32 (&b)[4], const u16* tile, int stride, int n, int k) {
  const int lane = threadIdx.x & 31;
  ldmatrix(b, tile + (n + (lane & 7) + (lane >> 4) * 8) * stride + k + ((lane >> 3) & 1) * 8);
}
// B of two n-tiles where the tile's rows are B's rows (output: a row is a key, summed over): b[0], b[1] belong to columns n .. n+7, b[2], b[3] to n+8 .. n+15
__device__ __forceinline__ void load_b_columns(u32 (&b)[4], const u16* tile, int stride, int k, int n) {
  const int lane = threadIdx.x & 31;
  ldmatrix_trans(b, tile + (k + (lane & 15)) * stride + n + (lane >> 4) * 8);
}

// ------------------------------------------------------------------------------------------------------------------ copies
template <int Bytes> __device__ __forceinline__ void cp_async(void* to, const void* from, bool exists) {
#ifdef SPARSETILE_EMULATE
  emulate_cp_async(to, from, Bytes, exists);
#else
  if constexpr (Bytes == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(shared_address(to)), "l"(from), "r"(exists ? 16 : 0) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" :: "r"(shared_address(to)), "l"(from), "r"(exists ? Bytes : 0), "n"(Bytes) : "memory");
#endif
}
__device__ __forceinline__ void cp_commit() {
#ifdef SPARSETILE_EMULATE
  emulate_cp_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int Left> __device__ __forceinline__ void cp_wait() {
#ifdef SPARSETILE_EMULATE
  emulate_cp_wait(Left);
#else
  asm volatile("cp.async.wait_group %0;" :: "n"(Left) : "memory");
#endif
}

// Rows rows of `width` elements of type E into shared memory, columns width .. Columns zeroed, rows at `stride`.
// `row(r)` gives the row's first element, or null: a row of zeros (`base` is any address of the same memory). Copy bytes at a time divide width, pointers and strides (16, 8, 4: asynchronous);
// Copy = sizeof(E) for 2-byte elements goes element by element, `step` elements apart.
template <class E, int Rows, int Columns, int Copy, int Threads, class Row>
__device__ __forceinline__ void copy_tile(E* to, int stride, const E* base, int width, i64 step, Row row) {
  constexpr int N = Copy / (int)sizeof(E), CHUNKS = Columns / N, TOTAL = Rows * CHUNKS;
  static_assert(N >= 1 && Columns % N == 0, "a chunk must not straddle the padded width");
#pragma unroll (TOTAL / Threads <= 16 ? (TOTAL + Threads - 1) / Threads : 4)
  for (int i = threadIdx.x; i < TOTAL; i += Threads) {
    const int r = i / CHUNKS, c = (i % CHUNKS) * N;
    const E* from = row(r);
    const bool exists = from != nullptr && c < width;
    if constexpr (Copy >= 4 && N > 1) cp_async<Copy>(to + r * stride + c, exists ? from + c : base, exists);
    else to[r * stride + c] = exists ? from[c * step] : E(0);
  }
}
