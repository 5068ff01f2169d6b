// Pieces of attention on fragments of tensor cores (mma.cuh), for one warp and its 16 rows: products of tiles in shared memory, and the online softmax.
#pragma once
#include "mma.cuh"

// c[n] = rows r .. r+15 of a times rows first + 8 n .. of b: both row-major over the same Width columns, rows `as` and `bs` apart
template <int Kind, int Width, int N> __device__ __forceinline__ void products(float (&c)[N][4], const u16* a, int as, int r, const u16* b, int bs, int first) {
#pragma unroll
  for (int n = 0; n < N; n++) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0.f;
#pragma unroll (Width <= 256 ? Width / 16 : 4)  // wide rows in full: ptxas loads too far ahead and spills
  for (int k = 0; k < Width / 16; k++) {
    u32 x[4];
    load_a(x, a, as, r, 16 * k);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      u32 y[4];
      load_b_rows(y, b, bs, first + 8 * n, 16 * k);
      mma<Kind>(c[n], x, y[0], y[1]);
      mma<Kind>(c[n + 1], x, y[2], y[3]);
    }
  }
}

// c += a (an accumulator of N n-tiles, rounded) times rows first .. first + 8 N - 1 of b, columns from `column`
template <int Kind, int N, int M> __device__ __forceinline__ void add_products(float (&c)[M][4], const float (&a)[N][4], const u16* b, int first, int stride, int column) {
#pragma unroll
  for (int k = 0; k < N / 2; k++) {
    const u32 x[4] = {pack<Kind>(a[2 * k][0], a[2 * k][1]), pack<Kind>(a[2 * k][2], a[2 * k][3]), pack<Kind>(a[2 * k + 1][0], a[2 * k + 1][1]), pack<Kind>(a[2 * k + 1][2], a[2 * k + 1][3])};
#pragma unroll
    for (int m = 0; m < M; m += 2) {
      u32 y[4];
      load_b_columns(y, b, stride, first + 16 * k, column + 8 * m);
      mma<Kind>(c[m], x, y[0], y[1]);
      mma<Kind>(c[m + 1], x, y[2], y[3]);
    }
  }
}

// s: raw products of two half rows, N tiles of 8 keys. Scale, softcap, mask; s becomes probabilities relative to the new maximum; `factor` is for what was
// summed before. Scores stay in natural units, rounded once: however large they are, the largest gives exactly 1, here and again in the backward. `low`, `high`: words of the two rows, bit first + c is key c.
template <bool Softcap, int N>
__device__ __forceinline__ void softmax(float (&s)[N][4], float (&most)[2], float (&sum)[2], float (&factor)[2], float scale, float softcap, bool masked, const u32* low, const u32* high, int first) {
  const int t = 2 * (threadIdx.x & 3);
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      s[n][e] = Softcap ? softcap * tanhf(s[n][e] * scale / softcap) : __fmul_rn(s[n][e], scale);
    }
  if (masked) {
#pragma unroll
    for (int n = 0; n < N; n++) {
      const int bit = (first + 8 * n) % 32 + t;
      const u32 x = low[(first + 8 * n) / 32] >> bit, y = high[(first + 8 * n) / 32] >> bit;
      if (!(x & 1)) s[n][0] = -inf();
      if (!(x & 2)) s[n][1] = -inf();
      if (!(y & 1)) s[n][2] = -inf();
      if (!(y & 2)) s[n][3] = -inf();
    }
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float top = most[h], total = 0.f;
#pragma unroll
    for (int n = 0; n < N; n++) top = fmaxf(top, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    const float zero = top == -inf() ? 0.f : top;  // no key so far: every exponent is -inf, not NaN
    factor[h] = ex2((most[h] - zero) * LOG2E);
    most[h] = top;
#pragma unroll
    for (int n = 0; n < N; n++) {
      s[n][2 * h] = ex2((s[n][2 * h] - zero) * LOG2E);
      s[n][2 * h + 1] = ex2((s[n][2 * h + 1] - zero) * LOG2E);
      total += s[n][2 * h] + s[n][2 * h + 1];
    }
    sum[h] = sum[h] * factor[h] + total;
  }
}
