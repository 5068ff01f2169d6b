// Backward of attention over block lists, float16 and bfloat16, without atomics: `rows` makes dQ from the lists by query, `columns` dK and dV from the
// lists by key. Both rebuild P = exp(s - lse) and dS = P * (dO . v - delta). What nobody in a tile sees is zeroed before it meets a product (0 * NaN).
// Defines: KIND, OUT_KIND, BQ, BK (blocks of the lists), TK (keys a step of `rows`, keys of a CTA of `columns`), TQ (queries a step of `columns`),
// DP, DVP (padded widths), DQS (columns of dQ a CTA makes), DKS, DVS (of dK and dV), STAGES (1, or 2: the next tiles arrive meanwhile), COPY, SOFTCAP, Q_ORDER, K_ORDER.
#include "tiles.cuh"
#include "block_backward.cuh"

constexpr int QS = DP + PAD, VS = DVP + PAD, TW = TK / 32;
static_assert(BQ % 32 == 0 && BK % TK == 0 && TK % 32 == 0 && BQ % TQ == 0 && TQ % 16 == 0, "tiles");

constexpr int ROW_THREADS = 2 * BQ, NT = TK / 8, RING = STAGES + 1;
using KeyWalk = Walk<BK, TK, K_ORDER>;

extern "C" __global__ void __launch_bounds__(ROW_THREADS) rows(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(raw);
  u16 *sq = (u16*)raw, *so = sq + BQ * QS, *sk = so + BQ * VS, *sv = sk + STAGES * TK * QS;
  u32 *words = (u32*)(sv + STAGES * TK * VS), *seen = words + RING * BQ * TW;
  int* at = (int*)(seen + RING * TW);
  const int slice = blockIdx.x % p.slices, x = blockIdx.x / p.slices, tile = p.tiles - 1 - x % p.tiles, head = x / p.tiles, b = head / p.Hq, h = head % p.Hq;
  const int limit = key_limit(p.at, b), start = first_position(p.at, b);
  const i64 n = Q_ORDER ? tile : (i64)floor_div(start, BQ) + tile;
  if (!Q_ORDER && n * BQ > (i64)start + p.at.T - 1) return;
  const int i = (int)(Q_ORDER ? n : n - p.lists.first);
  for (int r = threadIdx.x; r < BQ; r += ROW_THREADS) at[r] = query_of<BQ, Q_ORDER>(p.lists, i, r, start, p.at.T);
  if (threadIdx.x < RING * TW) seen[threadIdx.x] = 0;
  __syncthreads();

  const u16 *q = (const u16*)p.q + b * p.qb + h * p.qh, *dout = (const u16*)p.dout + b * p.ob + h * p.oh;
  const u16 *k = (const u16*)p.k + b * p.kb + h / p.group * p.kh, *v = (const u16*)p.v + b * p.vb + h / p.group * p.vh;
  const auto load = [&](const KeyWalk& w, int step) {
    const bool masked = w.masked();
    const u32* shown = seen + step % RING * TW;
    const auto key = [&](int r) { return masked && !(shown[r >> 5] >> (r & 31) & 1) ? -1 : key_of<BK, K_ORDER>(p.lists, w.block, w.c + r, limit); };
    copy_tile<u16, TK, DP, COPY, ROW_THREADS>(sk + step % STAGES * TK * QS, QS, k, p.D, p.kd, [&](int r) { const int s = key(r); return s < 0 ? nullptr : k + s * p.kt; });
    copy_tile<u16, TK, DVP, COPY, ROW_THREADS>(sv + step % STAGES * TK * VS, VS, v, p.Dv, p.vd, [&](int r) { const int s = key(r); return s < 0 ? nullptr : v + s * p.vt; });
  };
  const auto prepare = [&](const KeyWalk& w, int step) {
    if (w.valid() && w.masked()) make_words<BQ, BK, TK, K_ORDER, ROW_THREADS>(p.lists, w, at, words + step % RING * BQ * TW, seen + step % RING * TW);
  };

  const int lane = threadIdx.x & 31, row = threadIdx.x / 32 * 16, g = row + lane / 4, c0 = 2 * (lane & 3);
  float dq[DQS / 8][4] = {}, lse2[2], delta[2];
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const int t = at[g + 8 * e];
    lse2[e] = t < 0 ? inf() : lse_of(p.lse, (i64)head * p.at.T + t);
    delta[e] = t < 0 ? 0.f : __ldg(p.delta + (i64)head * p.at.T + t);
  }
  KeyWalk ring[2];  // the step after this one, and (with two stages) the one after that
  KeyWalk w;
  if (i >= 0 && i < p.lists.nq) w = KeyWalk(p.lists, __ldg(p.lists.list_of + b * p.lists.list_b + h * p.lists.list_h), i, limit);
  if (w.valid()) {
    copy_tile<u16, BQ, DP, COPY, ROW_THREADS>(sq, QS, q, p.D, p.qd, [&](int r) { return at[r] < 0 ? nullptr : q + at[r] * p.qt; });
    copy_tile<u16, BQ, DVP, COPY, ROW_THREADS>(so, VS, dout, p.Dv, p.od, [&](int r) { return at[r] < 0 ? nullptr : dout + at[r] * p.ot; });
    ring[0] = w; ring[0].next();
    prepare(w, 0);
    if constexpr (STAGES == 2) {
      ring[1] = ring[0];
      if (ring[1].valid()) ring[1].next();
      prepare(ring[0], 1);
      __syncthreads();
      load(w, 0);
    }
    cp_commit();
  }
  for (int step = 0; w.valid(); step++) {
    if constexpr (STAGES == 2) cp_wait<0>();
    __syncthreads();  // what the last step read may be overwritten; words of the next steps are here
    if constexpr (STAGES == 2) {
      if (ring[0].valid()) load(ring[0], step + 1);
      cp_commit();
      prepare(ring[1], step + 2);
    } else {
      load(w, step);
      cp_commit();
      prepare(ring[0], step + 1);
      cp_wait<0>();
      __syncthreads();
    }
    if (threadIdx.x < TW) seen[step % RING * TW + threadIdx.x] = 0;
    const u16 *keys = sk + step % STAGES * TK * QS, *values = sv + step % STAGES * TK * VS;
    float s[NT][4], dp[NT][4];
    products<KIND, DP>(s, sq, QS, row, keys, QS, 0);
    products<KIND, DVP>(dp, so, VS, row, values, VS, 0);
    const bool masked = w.masked();
    const u32* now = words + (step % RING * BQ + g) * TW;
#pragma unroll
    for (int m = 0; m < NT; m++) {
      const u32 low = (masked ? now[m / 4] : ~0u) >> (8 * (m % 4) + c0), high = (masked ? now[8 * TW + m / 4] : ~0u) >> (8 * (m % 4) + c0);
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const Score y = probability(p, s[m][e], lse2[e / 2]);
        s[m][e] = (e < 2 ? low : high) >> (e % 2) & 1 ? y.p * (dp[m][e] - delta[e / 2]) * y.slope : 0.f;
      }
    }
    add_products<KIND>(dq, s, keys, 0, QS, slice * DQS);
    w = ring[0];
    if constexpr (STAGES == 2) {
      ring[0] = ring[1];
      if (ring[1].valid()) ring[1].next();
    } else if (ring[0].valid()) {
      ring[0].next();
    }
  }
  Element<OUT_KIND>* out = (Element<OUT_KIND>*)p.dq + (i64)head * p.at.T * p.D;
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const int t = at[g + 8 * e];
    if (t < 0) continue;
#pragma unroll
    for (int m = 0; m < DQS / 8; m++) {
      const int col = slice * DQS + 8 * m + c0;
      if (col < p.D) store_pair<OUT_KIND>(out + (i64)t * p.D + col, dq[m][2 * e] * p.scale, dq[m][2 * e + 1] * p.scale, col + 1 < p.D, p.D % 2 == 0);
    }
  }
}

constexpr int COLUMN_THREADS = 2 * TK, MT = TQ / 8;
using Queries = QueryWalk<BQ, TQ, Q_ORDER>;

template <int N> __device__ __forceinline__ void store_keys(void* to, const float (&c)[N][4], int e, i64 row, int width, int first, bool exists, float scale) {
  Element<OUT_KIND>* out = (Element<OUT_KIND>*)to + row * width;
#pragma unroll
  for (int m = 0; m < N; m++) {
    const int col = first + 8 * m;
    if (col < width) store_pair<OUT_KIND>(out + col, exists ? c[m][2 * e] * scale : 0.f, exists ? c[m][2 * e + 1] * scale : 0.f, col + 1 < width, width % 2 == 0);
  }
}

extern "C" __global__ void __launch_bounds__(COLUMN_THREADS) columns(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(raw);
  u16 *sk = (u16*)raw, *sv = sk + TK * QS, *sq = sv + TK * VS, *so = sq + STAGES * TQ * QS;
  float *lses = (float*)(so + STAGES * TQ * VS), *deltas = lses + STAGES * TQ;
  u32* words = (u32*)(deltas + STAGES * TQ);  // [STAGES][TQ][TW]
  const int Hk = p.Hq / p.group, slice = blockIdx.x % p.slices, x = blockIdx.x / p.slices, tile = x % p.tiles, b = x / p.tiles / Hk, key_head = x / p.tiles % Hk;
  const int limit = key_limit(p.at, b), start = first_position(p.at, b), j = tile / (BK / TK), c = tile % (BK / TK) * TK;
  const u16 *k = (const u16*)p.k + b * p.kb + key_head * p.kh, *v = (const u16*)p.v + b * p.vb + key_head * p.vh;
  const auto key = [&](int r) { return key_of<BK, K_ORDER>(p.lists, j, c + r, limit); };
  const auto load = [&](const Queries& w, int stage) {
    const int h = key_head * p.group + w.head();
    const i64 head = (i64)b * p.Hq + h;
    const u16 *q = (const u16*)p.q + b * p.qb + h * p.qh, *dout = (const u16*)p.dout + b * p.ob + h * p.oh;
    const auto query = [&](int r) { return query_of<BQ, Q_ORDER>(p.lists, w.block, w.c + r, start, p.at.T); };
    copy_tile<u16, TQ, DP, COPY, COLUMN_THREADS>(sq + stage * TQ * QS, QS, q, p.D, p.qd, [&](int r) { const int t = query(r); return t < 0 ? nullptr : q + t * p.qt; });
    copy_tile<u16, TQ, DVP, COPY, COLUMN_THREADS>(so + stage * TQ * VS, VS, dout, p.Dv, p.od, [&](int r) { const int t = query(r); return t < 0 ? nullptr : dout + t * p.ot; });
    cp_commit();
    const int kind = w.kind(p);
    for (int y = threadIdx.x; y < TQ; y += COLUMN_THREADS) {
      const int t = query(y);
      lses[stage * TQ + y] = t < 0 ? inf() : lse_of(p.lse, head * p.at.T + t);  // P of a row that is no query: 0
      deltas[stage * TQ + y] = t < 0 ? 0.f : __ldg(p.delta + head * p.at.T + t);
      if (kind >= 0) {
#pragma unroll
        for (int n = 0; n < TW; n++) words[(stage * TQ + y) * TW + n] = t < 0 ? 0u : kind_word<BQ, BK>(p.lists, kind, w.c + y, c + 32 * n);
      }
    }
  };

  const int lane = threadIdx.x & 31, row = threadIdx.x / 32 * 16, g = row + lane / 4, c0 = 2 * (lane & 3);
  float dk[DKS / 8][4] = {}, dv[DVS / 8][4] = {};
  Queries w(p, b, key_head, j, start);
  if (!K_ORDER && j * BK + c >= limit) w.left = 0;
  if (w.valid()) {
    copy_tile<u16, TK, DP, COPY, COLUMN_THREADS>(sk, QS, k, p.D, p.kd, [&](int r) { const int s = key(r); return s < 0 ? nullptr : k + s * p.kt; });
    copy_tile<u16, TK, DVP, COPY, COLUMN_THREADS>(sv, VS, v, p.Dv, p.vd, [&](int r) { const int s = key(r); return s < 0 ? nullptr : v + s * p.vt; });
    if constexpr (STAGES == 2) load(w, 0);
    else cp_commit();
  }
  for (int stage = 0; w.valid(); stage ^= STAGES - 1) {
    const int kind = w.kind(p);
    Queries next = w;
    next.next(p, j);
    if constexpr (STAGES == 2) {
      cp_wait<0>();
      __syncthreads();
      if (next.valid()) load(next, stage ^ 1);
    } else {
      __syncthreads();
      load(w, 0);
      cp_wait<0>();
      __syncthreads();
    }
    const u16 *queries = sq + stage * TQ * QS, *douts = so + stage * TQ * VS;
    float s[MT][4], dp[MT][4];  // keys by queries
    products<KIND, DP>(s, sk, QS, row, queries, QS, 0);
    products<KIND, DVP>(dp, sv, VS, row, douts, VS, 0);
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int y = stage * TQ + 8 * m + c0 + e % 2;
        const bool visible = kind < 0 || (words[y * TW + row / 32] >> (row % 32 + lane / 4 + e / 2 * 8) & 1);
        const Score z = probability(p, s[m][e], lses[y]);
        s[m][e] = visible ? z.p : 0.f;
        dp[m][e] = visible ? z.p * (dp[m][e] - deltas[y]) * z.slope : 0.f;
      }
    add_products<KIND>(dv, s, douts, 0, VS, slice * DVS);
    add_products<KIND>(dk, dp, queries, 0, QS, slice * DKS);
    w = next;
  }
  const i64 head = (i64)b * Hk + key_head;
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const int s = K_ORDER ? __ldg(p.lists.k_order + (i64)j * BK + c + g + 8 * e) : j * BK + c + g + 8 * e;
    if (s < 0 || s >= p.at.S) continue;
    store_keys(p.dk, dk, e, head * p.at.S + s, p.D, slice * DKS + c0, s < limit, p.scale);
    store_keys(p.dv, dv, e, head * p.at.S + s, p.Dv, slice * DVS + c0, s < limit, 1.f);
  }
}
