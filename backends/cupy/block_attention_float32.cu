// Attention over block lists in float32, every product a fused multiply-add (no TF32): block_attention.cu's lists and masks, without tensor cores.
//
// A CTA holds BQ queries whole and streams keys, 32 at a time, in chunks of 64 columns (simt.cuh). Defines: OUT_KIND, BQ, BK, TK (32), DP, DVP, COPY (4), SOFTCAP, Q_ORDER, K_ORDER, PAGE (pages.cuh).
#include "block_forward.cuh"
#include "simt.cuh"

constexpr int THREADS = 4 * BQ, QS = DP + 1;
static_assert(TK == STREAMED && BK % TK == 0 && BQ % 32 == 0, "tiles");

extern "C" __global__ void __launch_bounds__(THREADS) forward(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(raw);
  float *sq = (float*)raw, *chunk = sq + BQ * QS, *ss = chunk + CHUNK_FLOATS;  // [BQ][QS], a chunk, [BQ][WEIGHT_STRIDE]
  u32 *words = (u32*)(ss + BQ * WEIGHT_STRIDE), *seen = words + BQ;
  int* rows = (int*)(seen + 1);
  const Tile x(p);
  if (!x.exists) return;
  for (int r = threadIdx.x; r < BQ; r += THREADS) rows[r] = query_of<BQ, Q_ORDER>(p.lists, x.i, r, x.start, p.at.T);
  __syncthreads();
  const float* q = (const float*)p.q + x.b * p.qb + x.h * p.qh;
  const float* k = (const float*)p.k + x.b * p.kb + (x.h / p.group) * p.kh;
  const float* v = (const float*)p.v + x.b * p.vb + (x.h / p.group) * p.vh + (i64)x.slice * DVP * p.vd;
  copy_tile<float, BQ, DP, 4, THREADS>(sq, QS, q, p.D, p.qd, [&](int r) { return rows[r] < 0 ? nullptr : q + rows[r] * p.qt; });

  const int tx = threadIdx.x % 16, row = threadIdx.x / 16 * 4;
  float o[4][DVP / 16] = {}, most[4], sum[4];
#pragma unroll
  for (int i = 0; i < 4; i++) most[i] = -inf(), sum[i] = 0.f;
  for (Walk<BK, TK, K_ORDER> w = x.walk(p); w.valid(); w.next()) {
    const bool masked = w.masked();
    __syncthreads();
    if (threadIdx.x == 0) seen[0] = 0;
    __syncthreads();
    if (masked) make_words<BQ, BK, TK, K_ORDER, THREADS>(p.lists, w, rows, words, seen, p, x.b);
    float s[4][2] = {};
    add_dots<DP, THREADS>(s, sq, QS, chunk, k, p.D, p.kd, [&](int r) {
      const auto key = p.row(x.b, key_of<BK, K_ORDER>(p.lists, w.block, w.c + r, x.limit));
      return key < 0 ? nullptr : k + key * p.kt;
    });
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const u32 word = masked ? words[row + i] : ~0u;
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const float y = SOFTCAP ? p.softcap * tanhf(s[i][e] * p.scale / p.softcap) : __fmul_rn(s[i][e], p.scale);
        s[i][e] = word >> (tx + 16 * e) & 1 ? y : -inf();
      }
      const float top = max16(fmaxf(most[i], fmaxf(s[i][0], s[i][1])));
      const float zero = top == -inf() ? 0.f : top, factor = expf(most[i] - zero);
      most[i] = top;
      s[i][0] = expf(s[i][0] - zero);
      s[i][1] = expf(s[i][1] - zero);
      sum[i] = sum[i] * factor + (s[i][0] + s[i][1]);
      ss[(row + i) * WEIGHT_STRIDE + tx] = s[i][0];
      ss[(row + i) * WEIGHT_STRIDE + tx + 16] = s[i][1];
#pragma unroll
      for (int c = 0; c < DVP / 16; c++) o[i][c] *= factor;
    }
    add_rows<DVP, THREADS>(o, ss, chunk, v, p.Dv - x.slice * DVP, p.vd, [&](int r) {
      const auto key = p.row(x.b, key_of<BK, K_ORDER>(p.lists, w.block, w.c + r, x.limit));
      return key < 0 || (masked && !(seen[0] >> r & 1)) ? nullptr : v + key * p.vt;
    });
  }

  const float sink = p.sink ? __ldg(p.sink + x.h) : -inf();
  Element<OUT_KIND>* out = (Element<OUT_KIND>*)p.out + (i64)x.head * p.at.T * p.Dv;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    sum[i] = sum16(sum[i]);
    const bool empty = most[i] == -inf() && sum[i] == 0.f;
    const float inverse = 1.f / (sum[i] + (p.sink && !empty ? expf(sink - most[i]) : 0.f));
    const int t = rows[row + i];
    if (t < 0) continue;
    if (p.lse && x.slice == 0 && tx == 0) p.lse[(i64)x.head * p.at.T + t] = empty ? -inf() : most[i] + logf(sum[i]);
#pragma unroll
    for (int c = 0; c < DVP / 16; c++) {
      const int col = x.slice * DVP + tx + 16 * c;
      if (col < p.Dv) out[(i64)t * p.Dv + col] = from_float<OUT_KIND>(empty ? 0.f : o[i][c] * inverse);
    }
  }
}
