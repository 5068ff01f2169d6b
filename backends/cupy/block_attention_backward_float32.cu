// Backward of attention over block lists in float32 by fused multiply-adds: block_attention_backward.cu's two kernels, lists and masks, without tensor cores.
// Defines: OUT_KIND, BQ, BK, TK (32: keys a step, and keys of a CTA of `columns`), TQ (32), DP, DVP, DQS, DKS, DVS, SOFTCAP, Q_ORDER, K_ORDER.
#include "block_backward.cuh"
#include "simt.cuh"

constexpr int QS = DP + 1, VS = DVP + 1;
static_assert(TK == STREAMED && TQ == STREAMED && BK % TK == 0 && BQ % TQ == 0, "tiles");

constexpr int ROW_THREADS = 4 * BQ;

extern "C" __global__ void __launch_bounds__(ROW_THREADS) rows(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(raw);
  float *sq = (float*)raw, *so = sq + BQ * QS, *chunk = so + BQ * VS, *ds = chunk + CHUNK_FLOATS;
  u32 *words = (u32*)(ds + BQ * WEIGHT_STRIDE), *seen = words + BQ;
  int* at = (int*)(seen + 1);
  const int slice = blockIdx.x % p.slices, x = blockIdx.x / p.slices, tile = p.tiles - 1 - x % p.tiles, head = x / p.tiles, b = head / p.Hq, h = head % p.Hq;
  const int limit = key_limit(p.at, b), start = first_position(p.at, b);
  const i64 n = Q_ORDER ? tile : (i64)floor_div(start, BQ) + tile;
  if (!Q_ORDER && n * BQ > (i64)start + p.at.T - 1) return;
  const int i = (int)(Q_ORDER ? n : n - p.lists.first);
  for (int r = threadIdx.x; r < BQ; r += ROW_THREADS) at[r] = query_of<BQ, Q_ORDER>(p.lists, i, r, start, p.at.T);
  __syncthreads();
  const float *q = (const float*)p.q + b * p.qb + h * p.qh, *dout = (const float*)p.dout + b * p.ob + h * p.oh;
  const float *k = (const float*)p.k + b * p.kb + h / p.group * p.kh, *v = (const float*)p.v + b * p.vb + h / p.group * p.vh;
  copy_tile<float, BQ, DP, 4, ROW_THREADS>(sq, QS, q, p.D, p.qd, [&](int r) { return at[r] < 0 ? nullptr : q + at[r] * p.qt; });
  copy_tile<float, BQ, DVP, 4, ROW_THREADS>(so, VS, dout, p.Dv, p.od, [&](int r) { return at[r] < 0 ? nullptr : dout + at[r] * p.ot; });

  const int tx = threadIdx.x % 16, row = threadIdx.x / 16 * 4;
  float dq[4][DQS / 16] = {}, lse[4], delta[4];
#pragma unroll
  for (int e = 0; e < 4; e++) {
    const int t = at[row + e];
    lse[e] = t < 0 ? inf() : lse_of(p.lse, (i64)head * p.at.T + t);
    delta[e] = t < 0 ? 0.f : p.delta[(i64)head * p.at.T + t];
  }
  Walk<BK, TK, K_ORDER> w;
  if (i >= 0 && i < p.lists.nq) w = Walk<BK, TK, K_ORDER>(p.lists, p.lists.list_of[b * p.lists.list_b + h * p.lists.list_h], i, limit);
  for (; w.valid(); w.next()) {
    const bool masked = w.masked();
    __syncthreads();
    if (threadIdx.x == 0) seen[0] = 0;
    __syncthreads();
    if (masked) make_words<BQ, BK, TK, K_ORDER, ROW_THREADS>(p.lists, w, at, words, seen);
    __syncthreads();
    const auto key = [&](int r) { return masked && !(seen[0] >> r & 1) ? -1 : key_of<BK, K_ORDER>(p.lists, w.block, w.c + r, limit); };
    const auto key_row = [&](int r) { const int s = key(r); return s < 0 ? nullptr : k + s * p.kt; };
    float s[4][2] = {}, dp[4][2] = {};
    add_dots<DP, ROW_THREADS>(s, sq, QS, chunk, k, p.D, p.kd, key_row);
    add_dots<DVP, ROW_THREADS>(dp, so, VS, chunk, v, p.Dv, p.vd, [&](int r) { const int s = key(r); return s < 0 ? nullptr : v + s * p.vt; });
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const u32 word = masked ? words[row + e] : ~0u;
#pragma unroll
      for (int f = 0; f < 2; f++) {
        const Score y = probability(p, s[e][f], lse[e]);
        ds[(row + e) * WEIGHT_STRIDE + tx + 16 * f] = word >> (tx + 16 * f) & 1 ? y.p * (dp[e][f] - delta[e]) * y.slope : 0.f;
      }
    }
    add_rows<DQS, ROW_THREADS>(dq, ds, chunk, k, p.D - slice * DQS, p.kd, [&](int r) { const float* y = key_row(r); return y ? y + slice * DQS * p.kd : nullptr; });
  }
#pragma unroll
  for (int e = 0; e < 4; e++) {
    const int t = at[row + e];
    if (t < 0) continue;
    Element<OUT_KIND>* out = (Element<OUT_KIND>*)p.dq + ((i64)head * p.at.T + t) * p.D;
#pragma unroll
    for (int c = 0; c < DQS / 16; c++) {
      const int col = slice * DQS + tx + 16 * c;
      if (col < p.D) out[col] = from_float<OUT_KIND>(dq[e][c] * p.scale);
    }
  }
}

constexpr int COLUMN_THREADS = 128;

extern "C" __global__ void __launch_bounds__(COLUMN_THREADS) columns(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(raw);
  float *sk = (float*)raw, *sv = sk + TK * QS, *chunk = sv + TK * VS, *sp = chunk + CHUNK_FLOATS, *ds = sp + TK * WEIGHT_STRIDE;
  float *lses = ds + TK * WEIGHT_STRIDE, *deltas = lses + TQ;
  u32* words = (u32*)(deltas + TQ);
  int* at = (int*)(words + TQ);
  const int Hk = p.Hq / p.group, slice = blockIdx.x % p.slices, x = blockIdx.x / p.slices, tile = x % p.tiles, b = x / p.tiles / Hk, key_head = x / p.tiles % Hk;
  const int limit = key_limit(p.at, b), start = first_position(p.at, b), j = tile / (BK / TK), c = tile % (BK / TK) * TK;
  const float *k = (const float*)p.k + b * p.kb + key_head * p.kh, *v = (const float*)p.v + b * p.vb + key_head * p.vh;
  const auto key = [&](int r) { return key_of<BK, K_ORDER>(p.lists, j, c + r, limit); };
  QueryWalk<BQ, TQ, Q_ORDER> w(p, b, key_head, j, start);
  if (!K_ORDER && j * BK + c >= limit) w.left = 0;
  if (w.valid()) {
    copy_tile<float, TK, DP, 4, COLUMN_THREADS>(sk, QS, k, p.D, p.kd, [&](int r) { const int s = key(r); return s < 0 ? nullptr : k + s * p.kt; });
    copy_tile<float, TK, DVP, 4, COLUMN_THREADS>(sv, VS, v, p.Dv, p.vd, [&](int r) { const int s = key(r); return s < 0 ? nullptr : v + s * p.vt; });
  }
  const int tx = threadIdx.x % 16, row = threadIdx.x / 16 * 4;
  float dk[4][DKS / 16] = {}, dv[4][DVS / 16] = {};
  for (; w.valid(); w.next(p, j)) {
    const int kind = w.kind(p), h = key_head * p.group + w.head();
    const i64 head = (i64)b * p.Hq + h;
    const float *q = (const float*)p.q + b * p.qb + h * p.qh, *dout = (const float*)p.dout + b * p.ob + h * p.oh;
    __syncthreads();
    for (int r = threadIdx.x; r < TQ; r += COLUMN_THREADS) {
      const int t = at[r] = query_of<BQ, Q_ORDER>(p.lists, w.block, w.c + r, start, p.at.T);
      lses[r] = t < 0 ? inf() : lse_of(p.lse, head * p.at.T + t);
      deltas[r] = t < 0 ? 0.f : p.delta[head * p.at.T + t];
      words[r] = t < 0 ? 0u : kind_word<BQ, BK>(p.lists, kind, w.c + r, c);
    }
    __syncthreads();
    const auto query_row = [&](int r) { return at[r] < 0 ? nullptr : q + at[r] * p.qt; };
    const auto dout_row = [&](int r) { return at[r] < 0 ? nullptr : dout + at[r] * p.ot; };
    float s[4][2] = {}, dp[4][2] = {};  // keys by queries
    add_dots<DP, COLUMN_THREADS>(s, sk, QS, chunk, q, p.D, p.qd, query_row);
    add_dots<DVP, COLUMN_THREADS>(dp, sv, VS, chunk, dout, p.Dv, p.od, dout_row);
#pragma unroll
    for (int e = 0; e < 4; e++)
#pragma unroll
      for (int f = 0; f < 2; f++) {
        const int y = tx + 16 * f;
        const bool visible = words[y] >> (row + e) & 1;
        const Score z = probability(p, s[e][f], lses[y]);
        sp[(row + e) * WEIGHT_STRIDE + y] = visible ? z.p : 0.f;
        ds[(row + e) * WEIGHT_STRIDE + y] = visible ? z.p * (dp[e][f] - deltas[y]) * z.slope : 0.f;
      }
    add_rows<DVS, COLUMN_THREADS>(dv, sp, chunk, dout, p.Dv - slice * DVS, p.od, [&](int r) { const float* y = dout_row(r); return y ? y + slice * DVS * p.od : nullptr; });
    add_rows<DKS, COLUMN_THREADS>(dk, ds, chunk, q, p.D - slice * DKS, p.qd, [&](int r) { const float* y = query_row(r); return y ? y + slice * DKS * p.qd : nullptr; });
  }
  const i64 head = (i64)b * Hk + key_head;
#pragma unroll
  for (int e = 0; e < 4; e++) {
    const int s = K_ORDER ? p.lists.k_order[(i64)j * BK + c + row + e] : j * BK + c + row + e;
    if (s < 0 || s >= p.at.S) continue;
    const bool exists = s < limit;
    Element<OUT_KIND>*to_k = (Element<OUT_KIND>*)p.dk + (head * p.at.S + s) * p.D, *to_v = (Element<OUT_KIND>*)p.dv + (head * p.at.S + s) * p.Dv;
#pragma unroll
    for (int m = 0; m < DKS / 16; m++) {
      const int col = slice * DKS + tx + 16 * m;
      if (col < p.D) to_k[col] = from_float<OUT_KIND>(exists ? dk[e][m] * p.scale : 0.f);
    }
#pragma unroll
    for (int m = 0; m < DVS / 16; m++) {
      const int col = slice * DVS + tx + 16 * m;
      if (col < p.Dv) to_v[col] = from_float<OUT_KIND>(exists ? dv[e][m] : 0.f);
    }
  }
}
