// Products in float32 by fused multiply-adds, for kernels that may not use TF32. Threads stand 16 to a row group: thread (tx, ty) = (threadIdx % 16, / 16)
// owns rows 4 ty .. 4 ty + 3 of what stays, and every 16th row or column from tx of what streams, 32 rows and 64 columns at a time, through `chunk`.
#pragma once
#include "mma.cuh"
constexpr int STREAMED = 32, CHUNK = 64, CHUNK_STRIDE = CHUNK + 1, WEIGHT_STRIDE = STREAMED + 1;  // odd strides: 16 rows fall into 16 banks
constexpr int CHUNK_FLOATS = STREAMED * CHUNK_STRIDE;

// s[i][e] += row 4 ty + i of a (in shared memory) . streamed row tx + 16 e, over Width padded columns. `row(r)` gives a row's address or null.
template <int Width, int Threads, class Row>
__device__ __forceinline__ void add_dots(float (&s)[4][2], const float* a, int stride, float* chunk, const float* base, int width, i64 step, Row row) {
  const int tx = threadIdx.x % 16;
  a += threadIdx.x / 16 * 4 * stride;
#pragma unroll 1
  for (int c = 0; c < Width; c += CHUNK) {
    __syncthreads();
    copy_tile<float, STREAMED, CHUNK, 4, Threads>(chunk, CHUNK_STRIDE, base, width - c, step, [&](int r) {
      const float* p = row(r);
      return p ? p + c * step : nullptr;
    });
    __syncthreads();
    const int n = imin(CHUNK, Width - c);
#pragma unroll 8
    for (int d = 0; d < n; d++) {
      const float x = chunk[tx * CHUNK_STRIDE + d], y = chunk[(tx + 16) * CHUNK_STRIDE + d];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float z = a[i * stride + c + d];
        s[i][0] = fmaf(z, x, s[i][0]);
        s[i][1] = fmaf(z, y, s[i][1]);
      }
    }
  }
}

// o[i][j] += sum over streamed rows r of weights[4 ty + i][r] * column tx + 16 j of row r, for Columns padded columns of which `width` exist.
template <int Columns, int Threads, class Row>
__device__ __forceinline__ void add_rows(float (&o)[4][Columns / 16], const float* weights, float* chunk, const float* base, int width, i64 step, Row row) {
  const int tx = threadIdx.x % 16;
  weights += threadIdx.x / 16 * 4 * WEIGHT_STRIDE;
#pragma unroll
  for (int c = 0; c < Columns; c += CHUNK) {
    __syncthreads();
    copy_tile<float, STREAMED, CHUNK, 4, Threads>(chunk, CHUNK_STRIDE, base, width - c, step, [&](int r) {
      const float* p = row(r);
      return p ? p + c * step : nullptr;
    });
    __syncthreads();
#pragma unroll 4
    for (int r = 0; r < STREAMED; r++) {
      float w[4];
#pragma unroll
      for (int i = 0; i < 4; i++) w[i] = weights[i * WEIGHT_STRIDE + r];
#pragma unroll
      for (int j = 0; j < (Columns - c < CHUNK ? Columns - c : CHUNK) / 16; j++) {
        const float y = chunk[r * CHUNK_STRIDE + tx + 16 * j];
#pragma unroll
        for (int i = 0; i < 4; i++) o[i][c / 16 + j] = fmaf(w[i], y, o[i][c / 16 + j]);
      }
    }
  }
}

__device__ __forceinline__ float max16(float x) {  // over the threads of a row group
#pragma unroll
  for (int m = 1; m < 16; m *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, m));
  return x;
}
__device__ __forceinline__ float sum16(float x) {
#pragma unroll
  for (int m = 1; m < 16; m *= 2) x += __shfl_xor_sync(~0u, x, m);
  return x;
}
