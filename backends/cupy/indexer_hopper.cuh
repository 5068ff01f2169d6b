// The one score function of Hopper's indexer kernels: e4m3, 64 heads of width 128. indexer_scores_hopper.cu stores what it gives, indexer_topk_hopper.cu selects
// from it; the same bits. A product holds 64 keys (a consumer group's rows) x the heads of two queries (128 columns); four queries are in work at a time, or one
// (QUERIES 1, 64 columns), where a call has no more: the sums are the same, in the same order.
// relu(x) w is fma(x + |x|, w / 2, sum): one addition with a free modifier instead of the half-rate maximum (products of e4m3 are far from overflowing).
#pragma once
#include "quad.cuh"
#include "wgmma.cuh"
#include "window.cuh"

#ifndef RELU
#define RELU 1
#endif

#ifndef QUERIES
#define QUERIES 4
#endif

constexpr int HEADS = 64, QB = QUERIES, KB = 128, KEY_BYTES = KB * 128, QUERY_BYTES = QB * HEADS * 128, SUMS = QB == 1 ? 32 : 64;  // SUMS: of a product, in a lane

// This lane's weights of all queries: heads 8 c + 2 me and the next.
__device__ __forceinline__ void load_weights(float (&w)[16 * QB], const float* from, i64 w_h, i64 w_t, int queries, int me) {
#pragma unroll
  for (int q = 0; q < QB; q++)
#pragma unroll
    for (int c = 0; c < 8; c++)
#pragma unroll
      for (int e = 0; e < 2; e++) w[q * 16 + 2 * c + e] = (RELU ? 0.5f : 1.f) * from[imin(q, queries - 1) * w_t + (8 * c + 2 * me + e) * w_h];
}

// Sums over the heads of a product's queries, from q on, in this lane: r[query][row].
__device__ __forceinline__ void sum_heads(const float (&a)[SUMS], const float (&w)[16 * QB], int q, float (&r)[QB][2]) {
#pragma unroll
  for (int j = 0; j < SUMS / 32; j++) {
    float s0 = 0, s1 = 0, u0 = 0, u1 = 0;
#pragma unroll
    for (int c = 0; c < 8; c++) {
      const float* x = a + (8 * j + c) * 4;
      const float* y = w + (q + j) * 16 + 2 * c;
#if RELU
      s0 = fmaf(x[0] + fabsf(x[0]), y[0], s0); u0 = fmaf(x[1] + fabsf(x[1]), y[1], u0);
      s1 = fmaf(x[2] + fabsf(x[2]), y[0], s1); u1 = fmaf(x[3] + fabsf(x[3]), y[1], u1);
#else
      s0 = fmaf(x[0], y[0], s0); u0 = fmaf(x[1], y[1], u0);
      s1 = fmaf(x[2], y[0], s1); u1 = fmaf(x[3], y[1], u1);
#endif
    }
    r[q + j][0] = s0 + u0; r[q + j][1] = s1 + u1;
  }
}

// The sums over four lanes (quad.cuh); of the one query there is they are all lanes'.
__device__ __forceinline__ void exchange(const float (&r)[1][2], int, float (&z)[2]) {
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const float v = r[0][e] + __shfl_xor_sync(~0u, r[0][e], 2);
    z[e] = v + __shfl_xor_sync(~0u, v, 1);
  }
}
