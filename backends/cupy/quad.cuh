// Sums over the four lanes that share a row of a product.
#pragma once
#include "numbers.cuh"

// r[query][row] in each of four lanes, exchanged transposed: lane `me` ends with query `me`, rows lane / 4 and + 8.
__device__ __forceinline__ void exchange(const float (&r)[4][2], int me, float (&z)[2]) {
  float v[2][2];
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const float send = me & 2 ? r[i][e] : r[i + 2][e], keep = me & 2 ? r[i + 2][e] : r[i][e];
      v[i][e] = keep + __shfl_xor_sync(~0u, send, 2);
    }
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const float send = me & 1 ? v[0][e] : v[1][e], keep = me & 1 ? v[1][e] : v[0][e];
    z[e] = keep + __shfl_xor_sync(~0u, send, 1);
  }
}
