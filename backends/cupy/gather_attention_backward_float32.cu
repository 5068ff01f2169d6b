// Backward of attention over selected keys in float32 by fused multiply-adds: gather_attention_backward.cu's two kernels without tensor cores.
// Defines: KIND (float32), OUT_KIND, BH (32), TK (32), TQ (32), TC, DP, DVP, DQS, DKS, DVS, SOFTCAP.
#include "gather_backward.cuh"
#include "simt.cuh"

constexpr int QS = DP + 1, VS = DVP + 1, ROW_THREADS = 4 * BH;
static_assert(TK == STREAMED && TQ == STREAMED && BH % 32 == 0, "tiles");

extern "C" __global__ void __launch_bounds__(ROW_THREADS) rows(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(raw);
  float *sq = (float*)raw, *so = sq + BH * QS, *chunk = so + BH * VS, *ds = chunk + CHUNK_FLOATS;
  int* keys = (int*)(ds + BH * WEIGHT_STRIDE);  // [TK]
  u32* word = (u32*)(keys + TK);
  const int slice = blockIdx.x % p.slices;
  const Group x(p.list, p.at.T, p.Hq, p.group, BH, blockIdx.x / p.slices);
  const Entries list(p.list, p.at, x.b, x.g, x.t);
  const float *q = (const float*)p.q + x.b * p.qb + x.head * p.qh + x.t * p.qt, *dout = (const float*)p.dout + x.b * p.ob + x.head * p.oh + x.t * p.ot;
  const float *k = (const float*)p.k + x.b * p.kb + x.key_head * p.kh, *v = (const float*)p.v + x.b * p.vb + x.key_head * p.vh;
  copy_tile<float, BH, DP, 4, ROW_THREADS>(sq, QS, q, p.D, p.qd, [&](int r) { return r < x.rows ? q + r * p.qh : nullptr; });
  copy_tile<float, BH, DVP, 4, ROW_THREADS>(so, VS, dout, p.Dv, p.od, [&](int r) { return r < x.rows ? dout + r * p.oh : nullptr; });
  const int tx = threadIdx.x % 16, row = threadIdx.x / 16 * 4;
  const i64 head = ((i64)x.b * p.Hq + x.head) * p.at.T + x.t;
  float dq[4][DQS / 16] = {}, lse[4], delta[4];
#pragma unroll
  for (int e = 0; e < 4; e++) {
    lse[e] = row + e < x.rows ? lse_of(p.lse, head + (i64)(row + e) * p.at.T) : inf();
    delta[e] = row + e < x.rows ? __ldg(p.delta + head + (i64)(row + e) * p.at.T) : 0.f;
  }
  for (i64 first = 0; first < list.slots; first += TK) {
    __syncthreads();
    find_keys<TK, ROW_THREADS>(list, first, keys, word);
    __syncthreads();
    float s[4][2] = {}, dp[4][2] = {};
    add_dots<DP, ROW_THREADS>(s, sq, QS, chunk, k, p.D, p.kd, [&](int r) { return keys[r] < 0 ? nullptr : k + keys[r] * p.kt; });
    add_dots<DVP, ROW_THREADS>(dp, so, VS, chunk, v, p.Dv, p.vd, [&](int r) { return keys[r] < 0 ? nullptr : v + keys[r] * p.vt; });
#pragma unroll
    for (int e = 0; e < 4; e++)
#pragma unroll
      for (int f = 0; f < 2; f++) {
        const Score y = probability(p, s[e][f], lse[e]);
        ds[(row + e) * WEIGHT_STRIDE + tx + 16 * f] = *word >> (tx + 16 * f) & 1 ? y.p * (dp[e][f] - delta[e]) * y.slope : 0.f;
      }
    add_rows<DQS, ROW_THREADS>(dq, ds, chunk, k, p.D - slice * DQS, p.kd, [&](int r) { return keys[r] < 0 ? nullptr : k + keys[r] * p.kt + slice * DQS * p.kd; });
  }
#pragma unroll
  for (int e = 0; e < 4; e++) {
    if (row + e >= x.rows) continue;
    Element<OUT_KIND>* out = (Element<OUT_KIND>*)p.dq + (head + (i64)(row + e) * p.at.T) * p.D;
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
  const Rows<TQ> who(ds + TK * WEIGHT_STRIDE);
  Bin<TK, TQ, TC, COLUMN_THREADS> bin(who.end());
  const int Hk = p.Hq / p.group, slice = blockIdx.x % p.slices, x = blockIdx.x / p.slices, tile = x % p.tiles, b = x / p.tiles / Hk, key_head = x / p.tiles % Hk;
  const float *k = (const float*)p.k + b * p.kb + key_head * p.kh, *v = (const float*)p.v + b * p.vb + key_head * p.vh;
  const int limit = key_limit(p.at, b), lists = p.list.G == p.Hq ? p.group : 1, heads = p.group / lists, tx = threadIdx.x % 16, row = threadIdx.x / 16 * 4;
  float dk[4][DKS / 16] = {}, dv[4][DVS / 16] = {};
  copy_tile<float, TK, DP, 4, COLUMN_THREADS>(sk, QS, k, p.D, p.kd, [&](int r) { return tile * TK + r < limit ? k + (tile * TK + r) * p.kt : nullptr; });
  copy_tile<float, TK, DVP, 4, COLUMN_THREADS>(sv, VS, v, p.Dv, p.vd, [&](int r) { return tile * TK + r < limit ? v + (tile * TK + r) * p.vt : nullptr; });
  for (int l = 0; l < lists; l++) {
    const int h0 = key_head * p.group + l, list = p.list.G == 1 ? 0 : p.list.G == p.Hq ? h0 : key_head;
    for (int part = 0; part < p.chunks; part++) {
      const int n = bin.open(p, (((i64)b * p.list.G + list) * p.tiles + tile) * p.chunks + part);
      for (int y0 = 0; y0 < n * heads; y0 += TQ) {
        const int low = y0 / heads, high = imin((y0 + TQ - 1) / heads + 1, n);
        __syncthreads();
        who.find<COLUMN_THREADS>(p, b, h0, heads, y0, n * heads, low, part * TC, bin.query);
        bin.count(low, high - low);
        __syncthreads();
        const auto query_row = [&](int y) { return who.query[y] < 0 ? nullptr : (const float*)p.q + b * p.qb + who.head[y] * p.qh + who.query[y] * p.qt; };
        const auto dout_row = [&](int y) { return who.query[y] < 0 ? nullptr : (const float*)p.dout + b * p.ob + who.head[y] * p.oh + who.query[y] * p.ot; };
        float s[4][2] = {}, dp[4][2] = {};  // keys by rows
        add_dots<DP, COLUMN_THREADS>(s, sk, QS, chunk, (const float*)p.q, p.D, p.qd, query_row);
        add_dots<DVP, COLUMN_THREADS>(dp, sv, VS, chunk, (const float*)p.dout, p.Dv, p.od, dout_row);
#pragma unroll
        for (int e = 0; e < 4; e++)
#pragma unroll
          for (int f = 0; f < 2; f++) {
            const int y = tx + 16 * f;
            const u32 times = who.query[y] < 0 ? 0u : bin.times[who.slot[y] * TK + row + e];
            const Score z = probability(p, s[e][f], who.lse[y]);
            sp[(row + e) * WEIGHT_STRIDE + y] = times ? z.p * (float)times : 0.f;
            ds[(row + e) * WEIGHT_STRIDE + y] = times ? z.p * (float)times * (dp[e][f] - who.delta[y]) * z.slope : 0.f;
          }
        add_rows<DVS, COLUMN_THREADS>(dv, sp, chunk, (const float*)p.dout, p.Dv - slice * DVS, p.od, [&](int y) { const float* z = dout_row(y); return z ? z + slice * DVS * p.od : nullptr; });
        add_rows<DKS, COLUMN_THREADS>(dk, ds, chunk, (const float*)p.q, p.D - slice * DKS, p.qd, [&](int y) { const float* z = query_row(y); return z ? z + slice * DKS * p.qd : nullptr; });
      }
    }
  }
  const i64 head = (i64)b * Hk + key_head;
#pragma unroll
  for (int e = 0; e < 4; e++) {
    const int s = tile * TK + row + e;
    if (s >= p.at.S) continue;
    Element<OUT_KIND>*to_k = (Element<OUT_KIND>*)p.dk + (head * p.at.S + s) * p.D, *to_v = (Element<OUT_KIND>*)p.dv + (head * p.at.S + s) * p.Dv;
#pragma unroll
    for (int m = 0; m < DKS / 16; m++) {
      const int col = slice * DKS + tx + 16 * m;
      if (col < p.D) to_k[col] = from_float<OUT_KIND>(dk[e][m] * p.scale);
    }
#pragma unroll
    for (int m = 0; m < DVS / 16; m++) {
      const int col = slice * DVS + tx + 16 * m;
      if (col < p.Dv) to_v[col] = from_float<OUT_KIND>(dv[e][m]);
    }
  }
}
