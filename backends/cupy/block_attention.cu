// Attention over block lists, float16 and bfloat16: one CTA per tile of BQ queries of one head, online softmax over key tiles of TK.
//
// Loads and products alternate: while the scores of a key tile are made its values arrive, while the output product runs the next keys arrive
// (the schedule of FlashAttention-2). A full block inside the keys runs no mask code; any other gets words of bits, one bit per key and row.
// Defines: KIND, OUT_KIND, BQ, BK (blocks of the lists), TK (keys a step), MT (16-row tiles a warp), DP, DVP (padded widths; a CTA makes DVP columns of
// the output, blockIdx tells which), COPY (bytes that divide every row, numbers.cuh), SOFTCAP, Q_ORDER, K_ORDER, PAGE (pages.cuh), LATENT (latents.cuh), FLOAT8 (float8.cuh; then COPY8, of k and v).
#include "tiles.cuh"
#include "latents.cuh"
#include "float8.cuh"
#include "block_forward.cuh"

constexpr int WARPS = BQ / (16 * MT), THREADS = 32 * WARPS, TW = TK / 32, QS = DP + PAD, VS = DVP + PAD, NT = TK / 8, VT = DVP / 8;
constexpr bool Q_IN_REGISTERS = MT * DP <= 128;
static_assert(BQ % 32 == 0 && BQ % (16 * MT) == 0 && BK % TK == 0 && TK % 32 == 0 && DP % 16 == 0 && DVP % 16 == 0, "tiles");

// scores of this warp's rows against the key tile
__device__ __forceinline__ void scores(float (&s)[MT][NT][4], const u32 (&qf)[MT][Q_IN_REGISTERS ? DP / 16 : 1][4], const u16* sq, const u16* sk, int row) {
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) s[m][n][e] = 0.f;
#pragma unroll (DP <= 256 ? DP / 16 : 4)
  for (int k = 0; k < DP / 16; k++) {
    u32 a[MT][4];
#pragma unroll
    for (int m = 0; m < MT; m++) {
      if constexpr (Q_IN_REGISTERS) {
#pragma unroll
        for (int e = 0; e < 4; e++) a[m][e] = qf[m][k][e];
      } else {
        load_a(a[m], sq, QS, row + 16 * m, 16 * k);
      }
    }
#pragma unroll
    for (int n = 0; n < NT; n += 2) {
      u32 b[4];
      load_b_rows(b, sk, QS, 8 * n, 16 * k);
#pragma unroll
      for (int m = 0; m < MT; m++) {
        mma<KIND>(s[m][n], a[m], b[0], b[1]);
        mma<KIND>(s[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

__device__ __forceinline__ void add_values(float (&o)[MT][VT][4], const float (&s)[MT][NT][4], const u16* sv) {
#pragma unroll
  for (int k = 0; k < TK / 16; k++) {
    u32 a[MT][4];
#pragma unroll
    for (int m = 0; m < MT; m++) {
      a[m][0] = pack<VALUE_KIND>(s[m][2 * k][0], s[m][2 * k][1]);
      a[m][1] = pack<VALUE_KIND>(s[m][2 * k][2], s[m][2 * k][3]);
      a[m][2] = pack<VALUE_KIND>(s[m][2 * k + 1][0], s[m][2 * k + 1][1]);
      a[m][3] = pack<VALUE_KIND>(s[m][2 * k + 1][2], s[m][2 * k + 1][3]);
    }
#pragma unroll
    for (int n = 0; n < VT; n += 2) {
      u32 b[4];
      load_b_columns(b, sv, VS, 16 * k, 8 * n);
#pragma unroll
      for (int m = 0; m < MT; m++) {
        mma<VALUE_KIND>(o[m][n], a[m], b[0], b[1]);
        mma<VALUE_KIND>(o[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

#if FLOAT8
// Scores or probabilities times the scales of their keys, and of their rows; `shown`: the keys of the step that some row sees (of those that none does, a scale may be NaN), or null: all.
__device__ __forceinline__ void scale_by_key(float (&s)[MT][NT][4], const float* scales, const float (&row)[MT][2], const Params& p, const Walk<BK, TK, K_ORDER>& w, const u32* shown) {
  u32 any = shown ? 0 : 1;
  for (int n = 0; shown && n < TW; n++) any |= shown[n];
  const float step = K_ORDER || !any ? 1.f : scale_at(scales, (w.block * BK + w.c) / 128);
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int c = 8 * n + 2 * (threadIdx.x & 3) + e;
      float by = step;
      if (K_ORDER && shown[c >> 5] >> (c & 31) & 1) by = scale_at(scales, key_of<BK, K_ORDER>(p.lists, w.block, w.c + c, w.limit) / 128);
#pragma unroll
      for (int m = 0; m < MT; m++) { s[m][n][e] *= row[m][0] * by; s[m][n][e + 2] *= row[m][1] * by; }
    }
}
#endif

__device__ __forceinline__ void store_rows(const Params& p, const float (&o)[MT][VT][4], const float (&most)[MT][2], const float (&sums)[MT][2], const int* rows, int row, int head, int slice) {
  const int lane = threadIdx.x & 31, h = head % p.Hq, c = 2 * (lane & 3);
  const float sink = p.sink ? __ldg(p.sink + h) : -inf();
  Element<OUT_KIND>* out = (Element<OUT_KIND>*)p.out + (i64)head * p.at.T * p.Dv;
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float sum = sums[m][half];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const float top = most[m][half];
      const bool empty = top == -inf() && sum == 0.f;
      const float inverse = 1.f / (sum + (p.sink && !empty ? ex2((sink - top) * LOG2E) : 0.f));
      const int t = rows[row + 16 * m + 8 * half + lane / 4];
      if (t < 0) continue;
      if (p.lse && slice == 0 && c == 0) p.lse[(i64)head * p.at.T + t] = empty ? -inf() : top + logf(sum);
#pragma unroll
      for (int n = 0; n < VT; n++) {
        const int col = slice * DVP + 8 * n + c;
        if (col < p.Dv)
          store_pair<OUT_KIND>(out + (i64)t * p.Dv + col, empty ? 0.f : o[m][n][2 * half] * inverse, empty ? 0.f : o[m][n][2 * half + 1] * inverse, col + 1 < p.Dv, p.Dv % 2 == 0);
      }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) forward(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(raw);
  u16 *sq = (u16*)raw, *sk = sq + BQ * QS, *sv = sk + TK * QS;
  u32 *words = (u32*)(sv + TK * VS), *seen = words + 2 * BQ * TW;  // [2][BQ][TW], [2][TW]
  int* rows = (int*)(seen + 2 * TW);                                // [BQ]

  const Tile x(p);
  if (!x.exists) return;
  for (int r = threadIdx.x; r < BQ; r += THREADS) rows[r] = query_of<BQ, Q_ORDER>(p.lists, x.i, r, x.start, p.at.T);
  if (threadIdx.x < 2 * TW) seen[threadIdx.x] = 0;
  __syncthreads();

  Walk<BK, TK, K_ORDER> w = x.walk(p);
  const Query* q = (const Query*)p.q + x.b * p.qb + x.h * p.qh;
  const Key* k = (const Key*)p.k + x.b * p.kb + (x.h / p.group) * p.kh;
  const Key* v = (const Key*)p.v + x.b * p.vb + (x.h / p.group) * p.vh + (i64)x.slice * DVP * p.vd;
  const auto load_keys = [&](const Walk<BK, TK, K_ORDER>& y) {
#if LATENT
    copy_latents<KIND, TK, DP, COPY, THREADS>(sk, QS, 0, p.D, [&](int r) {
      const auto key = p.row(x.b, key_of<BK, K_ORDER>(p.lists, y.block, y.c + r, x.limit));
      return key < 0 ? nullptr : (const u8*)p.k + key * p.kt;
    });
#elif FLOAT8
    copy_float8<KIND, TK, DP, COPY8, THREADS>(sk, QS, p.D, p.kd, [&](int r) {
      const auto key = key_of<BK, K_ORDER>(p.lists, y.block, y.c + r, x.limit);
      return key < 0 ? nullptr : k + key * p.kt;
    });
#else
    copy_tile<u16, TK, DP, COPY, THREADS>(sk, QS, k, p.D, p.kd, [&](int r) {
      const auto key = p.row(x.b, key_of<BK, K_ORDER>(p.lists, y.block, y.c + r, x.limit));
      return key < 0 ? nullptr : k + key * p.kt;
    });
#endif
    cp_commit();
  };

  const int row = (threadIdx.x / 32) * 16 * MT, lane = threadIdx.x & 31;
  float o[MT][VT][4] = {}, most[MT][2], sum[MT][2];
#pragma unroll
  for (int m = 0; m < MT; m++) most[m][0] = most[m][1] = -inf(), sum[m][0] = sum[m][1] = 0.f;

#if FLOAT8
  const i64 groups = ((i64)x.b * (p.Hq / p.group) + x.h / p.group) * ((p.at.S + 127) / 128);
  const float *k_scale = p.scales.k ? p.scales.k + groups : nullptr, *v_scale = p.scales.v ? p.scales.v + groups : nullptr;
  float by_query[MT][2], one[MT][2];
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int t = rows[row + 16 * m + 8 * half + lane / 4];
      by_query[m][half] = t < 0 ? 1.f : scale_at(p.scales.q, (i64)x.head * p.at.T + t);
      one[m][half] = 1.f;
    }
#endif
  if (w.valid()) {
#if FLOAT8 == 2
    copy_float8<KIND, BQ, DP, COPY, THREADS>(sq, QS, p.D, p.qd, [&](int r) { return rows[r] < 0 ? nullptr : q + rows[r] * p.qt; });
#else
    copy_tile<u16, BQ, DP, COPY, THREADS>(sq, QS, q, p.D, p.qd, [&](int r) { return rows[r] < 0 ? nullptr : q + rows[r] * p.qt; });
#endif
    if (w.masked()) make_words<BQ, BK, TK, K_ORDER, THREADS>(p.lists, w, rows, words, seen, p, x.b);
    load_keys(w);
    cp_wait<0>();
    __syncthreads();
    u32 qf[MT][Q_IN_REGISTERS ? DP / 16 : 1][4];
    if constexpr (Q_IN_REGISTERS) {
#pragma unroll
      for (int m = 0; m < MT; m++)
#pragma unroll
        for (int c = 0; c < DP / 16; c++) load_a(qf[m][c], sq, QS, row + 16 * m, 16 * c);
    }
    for (int odd = 0; w.valid(); odd ^= 1) {
      const bool masked = w.masked();
      u32 *now = words + odd * BQ * TW, *shown = seen + odd * TW;
      cp_wait<0>();
      __syncthreads();  // keys and words are here; nobody reads the values of the last step any more
#if LATENT
      copy_latents<KIND, TK, DVP, COPY, THREADS>(sv, VS, x.slice * DVP, p.Dv, [&](int r) {
        const auto key = p.row(x.b, key_of<BK, K_ORDER>(p.lists, w.block, w.c + r, x.limit));
        return key < 0 || !(shown[r >> 5] >> (r & 31) & 1) ? nullptr : (const u8*)p.k + key * p.kt;
      });
#elif FLOAT8
      copy_float8<VALUE_KIND, TK, DVP, COPY8, THREADS>(sv, VS, p.Dv - x.slice * DVP, p.vd, [&](int r) {
        const auto key = key_of<BK, K_ORDER>(p.lists, w.block, w.c + r, x.limit);
        return key < 0 || (masked && !(shown[r >> 5] >> (r & 31) & 1)) ? nullptr : v + key * p.vt;
      });
#else
      copy_tile<u16, TK, DVP, COPY, THREADS>(sv, VS, v, p.Dv - x.slice * DVP, p.vd, [&](int r) {
        const auto key = p.row(x.b, key_of<BK, K_ORDER>(p.lists, w.block, w.c + r, x.limit));
        return key < 0 || (masked && !(shown[r >> 5] >> (r & 31) & 1)) ? nullptr : v + key * p.vt;
      });
#endif
      cp_commit();
      if (threadIdx.x < TW) seen[(odd ^ 1) * TW + threadIdx.x] = 0;
      float s[MT][NT][4];
      scores(s, qf, sq, sk, row);
#if FLOAT8
      scale_by_key(s, k_scale, by_query, p, w, masked ? shown : nullptr);
#endif
#pragma unroll
      for (int m = 0; m < MT; m++) {
        float factor[2];
        const u32* word = now + (row + 16 * m + lane / 4) * TW;
        softmax<SOFTCAP>(s[m], most[m], sum[m], factor, p.scale, p.softcap, masked, word, word + 8 * TW, 0);
#pragma unroll
        for (int c = 0; c < VT; c++) {
          o[m][c][0] *= factor[0]; o[m][c][1] *= factor[0];
          o[m][c][2] *= factor[1]; o[m][c][3] *= factor[1];
        }
      }
#if FLOAT8
      scale_by_key(s, v_scale, one, p, w, masked ? shown : nullptr);
#endif
      cp_wait<0>();
      __syncthreads();  // values are here; nobody reads the keys any more
      w.next();
      if (w.valid()) {
        if (w.masked()) make_words<BQ, BK, TK, K_ORDER, THREADS>(p.lists, w, rows, words + (odd ^ 1) * BQ * TW, seen + (odd ^ 1) * TW, p, x.b);
        load_keys(w);
      }
      add_values(o, s, sv);
    }
  }
  store_rows(p, o, most, sum, rows, row, x.head, x.slice);
}
