// Backward of attention over selected keys, float16 and bfloat16, without float atomics: `rows` makes dQ query by query as the forward does, `columns`
// dK and dV key tile by key tile over the bins of gather_bins.cu, queries ascending; a key chosen twice counts twice.
// Defines: KIND, OUT_KIND, BH (heads of a CTA of `rows`), TK (keys a step of `rows`, keys of a CTA of `columns`), KW (warps of `rows` that share 16 heads),
// TQ (rows, that is query and head, a step of `columns`), TC (queries of a bin), DP, DVP, DQS, DKS, DVS (columns of dQ, dK, dV a CTA makes), SHARED_KV, COPY, SOFTCAP.
#include "tiles.cuh"
#include "gather_backward.cuh"

constexpr int QS = DP + PAD, VS = DVP + PAD, KVS = SHARED_KV ? QS : VS;
constexpr int RW = BH / 16, ROW_THREADS = 32 * RW * KW, PART = TK / KW, NT = PART / 8;
static_assert(BH % 16 == 0 && TK % 32 == 0 && PART % 16 == 0 && TQ % 16 == 0 && TC % 32 == 0, "tiles");

extern "C" __global__ void __launch_bounds__(ROW_THREADS) rows(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(raw);
  u16 *sq = (u16*)raw, *so = sq + BH * QS, *sk = so + BH * VS, *sv = SHARED_KV ? sk : sk + TK * QS;
  int* keys = (int*)(SHARED_KV ? sk + TK * QS : sv + TK * VS);  // [2][TK]
  u32* words = (u32*)(keys + 2 * TK);
  const int slice = blockIdx.x % p.slices;
  const Group x(p.list, p.at.T, p.Hq, p.group, BH, blockIdx.x / p.slices);
  const Entries list(p.list, p.at, x.b, x.g, x.t);
  const u16 *q = (const u16*)p.q + x.b * p.qb + x.head * p.qh + x.t * p.qt, *dout = (const u16*)p.dout + x.b * p.ob + x.head * p.oh + x.t * p.ot;
  const u16 *k = (const u16*)p.k + x.b * p.kb + x.key_head * p.kh, *v = (const u16*)p.v + x.b * p.vb + x.key_head * p.vh;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31, row = warp % RW * 16, first = warp / RW * PART, c0 = 2 * (lane & 3);
  const i64 head = ((i64)x.b * p.Hq + x.head) * p.at.T + x.t;
  float dq[DQS / 8][4] = {}, lse[2], delta[2];
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const int r = row + lane / 4 + 8 * e;
    lse[e] = r < x.rows ? lse_of(p.lse, head + (i64)r * p.at.T) : inf();
    delta[e] = r < x.rows ? __ldg(p.delta + head + (i64)r * p.at.T) : 0.f;
  }
  const int steps = (int)((list.slots + TK - 1) / TK);
  if (steps) {
    copy_tile<u16, BH, DP, COPY, ROW_THREADS>(sq, QS, q, p.D, p.qd, [&](int r) { return r < x.rows ? q + r * p.qh : nullptr; });
    copy_tile<u16, BH, DVP, COPY, ROW_THREADS>(so, VS, dout, p.Dv, p.od, [&](int r) { return r < x.rows ? dout + r * p.oh : nullptr; });
    find_keys<TK, ROW_THREADS>(list, 0, keys, words);
  }
  for (int step = 0; step < steps; step++) {
    const int* now = keys + step % 2 * TK;
    const u32* word = words + step % 2 * (TK / 32);
    __syncthreads();  // what the last step read may be overwritten; this step's keys are known
    copy_tile<u16, TK, DP, COPY, ROW_THREADS>(sk, QS, k, p.D, p.kd, [&](int r) { return now[r] < 0 ? nullptr : k + now[r] * p.kt; });
    if constexpr (!SHARED_KV) copy_tile<u16, TK, DVP, COPY, ROW_THREADS>(sv, VS, v, p.Dv, p.vd, [&](int r) { return now[r] < 0 ? nullptr : v + now[r] * p.vt; });
    cp_commit();
    if (step + 1 < steps) find_keys<TK, ROW_THREADS>(list, (i64)(step + 1) * TK, keys + (step + 1) % 2 * TK, words + (step + 1) % 2 * (TK / 32));
    cp_wait<0>();
    __syncthreads();
    float s[NT][4], dp[NT][4];
    products<KIND, DP>(s, sq, QS, row, sk, QS, first);
    products<KIND, DVP>(dp, so, VS, row, sv, KVS, first);
#pragma unroll
    for (int m = 0; m < NT; m++) {
      const u32 seen = word[(first + 8 * m) / 32] >> ((first + 8 * m) % 32 + c0);
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const Score y = probability(p, s[m][e], lse[e / 2]);
        s[m][e] = seen >> (e % 2) & 1 ? y.p * (dp[m][e] - delta[e / 2]) * y.slope : 0.f;
      }
    }
    add_products<KIND>(dq, s, sk, first, QS, slice * DQS);
  }
  if constexpr (KW > 1) {  // the first warp of a row group adds the others', one after the other
    float* other = (float*)raw + row * DQS;
    for (int w = 1; w < KW; w++) {
      __syncthreads();
#pragma unroll
      for (int m = 0; m < DQS / 8; m++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (warp / RW == w) other[(lane / 4 + e / 2 * 8) * DQS + 8 * m + c0 + e % 2] = dq[m][e];
      __syncthreads();
#pragma unroll
      for (int m = 0; m < DQS / 8; m++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (warp / RW == 0) dq[m][e] += other[(lane / 4 + e / 2 * 8) * DQS + 8 * m + c0 + e % 2];
    }
    if (warp / RW) return;
  }
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const int r = row + lane / 4 + 8 * e;
    if (r >= x.rows) continue;
    Element<OUT_KIND>* out = (Element<OUT_KIND>*)p.dq + (head + (i64)r * p.at.T) * p.D;
#pragma unroll
    for (int m = 0; m < DQS / 8; m++) {
      const int col = slice * DQS + 8 * m + c0;
      if (col < p.D) store_pair<OUT_KIND>(out + col, dq[m][2 * e] * p.scale, dq[m][2 * e + 1] * p.scale, col + 1 < p.D, p.D % 2 == 0);
    }
  }
}

constexpr int COLUMN_THREADS = 2 * TK, MT = TQ / 8;

template <int Kind, int N> __device__ __forceinline__ void store_keys(void* to, const float (&c)[N][4], int e, i64 row, int width, int first, float scale) {
  Element<Kind>* out = (Element<Kind>*)to + row * width;
#pragma unroll
  for (int m = 0; m < N; m++) {
    const int col = first + 8 * m;
    if (col < width) store_pair<Kind>(out + col, c[m][2 * e] * scale, c[m][2 * e + 1] * scale, col + 1 < width, width % 2 == 0);
  }
}

extern "C" __global__ void __launch_bounds__(COLUMN_THREADS) columns(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(raw);
  u16 *sk = (u16*)raw, *sv = SHARED_KV ? sk : sk + TK * QS, *sq = SHARED_KV ? sk + TK * QS : sv + TK * VS, *so = sq + TQ * QS;
  const Rows<TQ> who((float*)(so + TQ * VS));
  Bin<TK, TQ, TC, COLUMN_THREADS> bin(who.end());
  const Keys x(p, blockIdx.x / p.slices);
  if (x.idle) return;
  const int Hk = p.Hq / p.group, slice = blockIdx.x % p.slices, tile = x.tile, b = x.b, key_head = x.key_head;
  const u16 *k = (const u16*)p.k + b * p.kb + key_head * p.kh, *v = (const u16*)p.v + b * p.vb + key_head * p.vh;
  const int limit = key_limit(p.at, b), lists = p.list.G == p.Hq ? p.group : 1, heads = p.group / lists;  // every head its own list, or one for all
  const int lane = threadIdx.x & 31, row = threadIdx.x / 32 * 16, g = row + lane / 4, c0 = 2 * (lane & 3);
  float dk[DKS / 8][4] = {}, dv[DVS / 8][4] = {};
  copy_tile<u16, TK, DP, COPY, COLUMN_THREADS>(sk, QS, k, p.D, p.kd, [&](int r) { return tile * TK + r < limit ? k + (tile * TK + r) * p.kt : nullptr; });
  if constexpr (!SHARED_KV) copy_tile<u16, TK, DVP, COPY, COLUMN_THREADS>(sv, VS, v, p.Dv, p.vd, [&](int r) { return tile * TK + r < limit ? v + (tile * TK + r) * p.vt : nullptr; });
  cp_commit();
  for (int l = 0; l < lists; l++) {
    const int h0 = key_head * p.group + l, list = p.list.G == 1 ? 0 : p.list.G == p.Hq ? h0 : key_head;
    for (int chunk = x.first; chunk < x.end; chunk++) {
      const int n = bin.open(p, (((i64)b * p.list.G + list) * p.tiles + tile) * p.chunks + chunk);
      for (int y0 = 0, counted = -1; y0 < n * heads; y0 += TQ) {
        const int low = y0 / heads, high = imin((y0 + TQ - 1) / heads + 1, n);
        __syncthreads();  // nobody reads the last step's tiles any more
        who.find<COLUMN_THREADS>(p, b, h0, heads, y0, n * heads, low, chunk * TC, bin.query);
        __syncthreads();
        copy_tile<u16, TQ, DP, COPY, COLUMN_THREADS>(sq, QS, (const u16*)p.q, p.D, p.qd,
          [&](int y) { return who.query[y] < 0 ? nullptr : (const u16*)p.q + b * p.qb + who.head[y] * p.qh + who.query[y] * p.qt; });
        copy_tile<u16, TQ, DVP, COPY, COLUMN_THREADS>(so, VS, (const u16*)p.dout, p.Dv, p.od,
          [&](int y) { return who.query[y] < 0 ? nullptr : (const u16*)p.dout + b * p.ob + who.head[y] * p.oh + who.query[y] * p.ot; });
        cp_commit();
        if (counted != low || high - low > 1) bin.count(low, high - low);  // a step within one query of many heads counts once
        counted = high - low == 1 ? low : -1;
        cp_wait<0>();
        __syncthreads();
        float s[MT][4], dp[MT][4];  // keys by rows
        products<KIND, DP>(s, sk, QS, row, sq, QS, 0);
        products<KIND, DVP>(dp, sv, KVS, row, so, VS, 0);
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const int y = 8 * m + c0 + e % 2;
            const u32 times = who.query[y] < 0 ? 0u : bin.times[who.slot[y] * TK + g + e / 2 * 8];
            const Score z = probability(p, s[m][e], who.lse[y]);
            s[m][e] = times ? z.p * (float)times : 0.f;
            dp[m][e] = times ? z.p * (float)times * (dp[m][e] - who.delta[y]) * z.slope : 0.f;
          }
        add_products<KIND>(dv, s, so, 0, VS, slice * DVS);
        add_products<KIND>(dk, dp, sq, 0, QS, slice * DKS);
      }
    }
  }
  const i64 head = (i64)b * Hk + key_head;
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const int s = tile * TK + g + 8 * e;
    if (s >= p.at.S) continue;
    if (x.slot >= 0) {
      store_keys<FLOAT32>(p.dk_parts, dk, e, (i64)x.slot * TK + g + 8 * e, p.D, slice * DKS + c0, p.scale);
      store_keys<FLOAT32>(p.dv_parts, dv, e, (i64)x.slot * TK + g + 8 * e, p.Dv, slice * DVS + c0, 1.f);
    } else {
      store_keys<OUT_KIND>(p.dk, dk, e, head * p.at.S + s, p.D, slice * DKS + c0, p.scale);
      store_keys<OUT_KIND>(p.dv, dv, e, head * p.at.S + s, p.Dv, slice * DVS + c0, 1.f);
    }
  }
}

// The sums of a tile's parts, in their order
__device__ __forceinline__ void add_parts(void* to, const float* from, const Keys& x, const Params& p, int width) {
  const int rows = imin(TK, p.at.S - x.tile * TK);
  Element<OUT_KIND>* out = (Element<OUT_KIND>*)to + (((i64)x.b * (p.Hq / p.group) + x.key_head) * p.at.S + x.tile * TK) * width;
  from += (i64)x.slot * TK * width;
  for (int i = threadIdx.x; i < rows * width; i += COLUMN_THREADS) {
    float sum = 0.f;
    for (int n = 0; n < x.parts; n++) sum += from[(i64)n * x.same * TK * width + i];
    out[i] = from_float<OUT_KIND>(sum);
  }
}

extern "C" __global__ void __launch_bounds__(COLUMN_THREADS) join(const __grid_constant__ Params p) {
  const Keys x(p, blockIdx.x);
  if (x.idle || x.part) return;
  add_parts(p.dk, p.dk_parts, x, p, p.D);
  add_parts(p.dv, p.dv_parts, x, p, p.Dv);
}
