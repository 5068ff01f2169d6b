// Attention over selected keys in float32 by fused multiply-adds (simt.cuh): a CTA works on one query and up to BH heads that share its list and its keys.
// Defines: OUT_KIND, BH (32), DP, DVP, SOFTCAP.
#include "gather_forward.cuh"
#include "simt.cuh"

constexpr int THREADS = 4 * BH, QS = DP + 1;

extern "C" __global__ void __launch_bounds__(THREADS) forward(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(raw);
  float *sq = (float*)raw, *chunk = sq + BH * QS, *weights = chunk + CHUNK_FLOATS;
  int* keys = (int*)(weights + BH * WEIGHT_STRIDE);  // [STREAMED]
  u32* word = (u32*)(keys + STREAMED);
  const int slice = blockIdx.x % p.slices;
  const Group x(p.list, p.at.T, p.Hq, p.group, BH, blockIdx.x / p.slices);
  const Entries list(p.list, p.at, x.b, x.g, x.t);
  const float *q = (const float*)p.q + x.b * p.qb + x.head * p.qh + x.t * p.qt, *k = (const float*)p.k + x.b * p.kb + x.key_head * p.kh;
  const float* v = (const float*)p.v + x.b * p.vb + x.key_head * p.vh + (i64)slice * DVP * p.vd;
  copy_tile<float, BH, DP, 4, THREADS>(sq, QS, q, p.D, p.qd, [&](int r) { return r < x.rows ? q + r * p.qh : nullptr; });

  const int tx = threadIdx.x % 16, row = threadIdx.x / 16 * 4;
  float o[4][DVP / 16] = {}, most[4], sum[4];
#pragma unroll
  for (int i = 0; i < 4; i++) most[i] = -inf(), sum[i] = 0.f;
  for (i64 first = 0; first < list.slots; first += STREAMED) {
    __syncthreads();
    find_keys<STREAMED, THREADS>(list, first, keys, word);
    __syncthreads();
    float s[4][2] = {};
    add_dots<DP, THREADS>(s, sq, QS, chunk, k, p.D, p.kd, [&](int r) { return keys[r] < 0 ? nullptr : k + keys[r] * p.kt; });
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const float y = SOFTCAP ? p.softcap * tanhf(s[i][e] * p.scale / p.softcap) : __fmul_rn(s[i][e], p.scale);
        s[i][e] = *word >> (tx + 16 * e) & 1 ? y : -inf();
      }
      const float top = max16(fmaxf(most[i], fmaxf(s[i][0], s[i][1]))), zero = top == -inf() ? 0.f : top, factor = expf(most[i] - zero);
      most[i] = top;
      s[i][0] = expf(s[i][0] - zero);
      s[i][1] = expf(s[i][1] - zero);
      sum[i] = sum[i] * factor + (s[i][0] + s[i][1]);
      weights[(row + i) * WEIGHT_STRIDE + tx] = s[i][0];
      weights[(row + i) * WEIGHT_STRIDE + tx + 16] = s[i][1];
#pragma unroll
      for (int c = 0; c < DVP / 16; c++) o[i][c] *= factor;
    }
    add_rows<DVP, THREADS>(o, weights, chunk, v, p.Dv - slice * DVP, p.vd, [&](int r) { return keys[r] < 0 ? nullptr : v + keys[r] * p.vt; });
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    sum[i] = sum16(sum[i]);
    if (row + i >= x.rows) continue;
    const bool empty = most[i] == -inf() && sum[i] == 0.f;
    const float inverse = 1.f / (sum[i] + (p.sink && !empty ? expf(__ldg(p.sink + x.head + row + i) - most[i]) : 0.f));
    const i64 at = ((i64)x.b * p.Hq + x.head + row + i) * p.at.T + x.t;
    if (p.lse && slice == 0 && tx == 0) p.lse[at] = empty ? -inf() : most[i] + logf(sum[i]);
#pragma unroll
    for (int c = 0; c < DVP / 16; c++) {
      const int col = slice * DVP + tx + 16 * c;
      if (col < p.Dv) ((Element<OUT_KIND>*)p.out)[at * p.Dv + col] = from_float<OUT_KIND>(empty ? 0.f : o[i][c] * inverse);
    }
  }
}
