// Attention over selected keys, float16 and bfloat16: a CTA works on one query and up to BH heads that share its list and its keys; a step gathers TK keys.
// Rows of BH are the tensor cores' rows: KW warps share 16 heads by taking every KWth part of a step's keys, and merge at the end.
// Defines: KIND, OUT_KIND, BH, TK, KW, DP, DVP (value columns of a CTA), STAGES (2: the next keys arrive meanwhile), SHARED_KV (values are the first
// columns of the keys: nothing is read twice), COPY, SOFTCAP, LATENT (latents.cuh; then SHARED_KV).
#include "tiles.cuh"
#include "latents.cuh"
#include "gather_forward.cuh"

constexpr int RW = BH / 16, WARPS = RW * KW, THREADS = 32 * WARPS, TW = TK / 32, PART = TK / KW, NT = PART / 8, VT = DVP / 8, RING = STAGES + 1;
constexpr int QS = DP + PAD, VS = SHARED_KV ? QS : DVP + PAD;
static_assert(BH % 16 == 0 && TK % 32 == 0 && PART % 16 == 0, "tiles");

extern "C" __global__ void __launch_bounds__(THREADS) forward(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(raw);
  u16 *sq = (u16*)raw, *sk = sq + BH * QS, *sv = SHARED_KV ? sk : sk + STAGES * TK * QS;
  int* keys = (int*)(SHARED_KV ? sk + STAGES * TK * QS : sv + STAGES * TK * VS);  // [RING][TK]
  u32* words = (u32*)(keys + RING * TK);                                           // [RING][TW]
  const int slice = blockIdx.x % p.slices;
  const Group x(p.list, p.at.T, p.Hq, p.group, BH, blockIdx.x / p.slices);
  const Entries list(p.list, p.at, x.b, x.g, x.t);
  const u16 *q = (const u16*)p.q + x.b * p.qb + x.head * p.qh + x.t * p.qt, *k = (const u16*)p.k + x.b * p.kb + x.key_head * p.kh;
  const u16* v = (const u16*)p.v + x.b * p.vb + x.key_head * p.vh + (i64)slice * DVP * p.vd;
  const auto load = [&](int step) {
    const int* now = keys + step % RING * TK;
#if LATENT
    copy_latents<KIND, TK, DP, COPY, THREADS>(sk + step % STAGES * TK * QS, QS, 0, p.D, [&](int r) { return now[r] < 0 ? nullptr : (const u8*)p.k + now[r] * p.kt; });
#else
    copy_tile<u16, TK, DP, COPY, THREADS>(sk + step % STAGES * TK * QS, QS, k, p.D, p.kd, [&](int r) { return now[r] < 0 ? nullptr : k + now[r] * p.kt; });
    if constexpr (!SHARED_KV)
      copy_tile<u16, TK, DVP, COPY, THREADS>(sv + step % STAGES * TK * VS, VS, v, p.Dv - slice * DVP, p.vd, [&](int r) { return now[r] < 0 ? nullptr : v + now[r] * p.vt; });
#endif
  };
  const auto find = [&](int step) {
    if ((i64)step * TK < list.slots) find_keys<TK, THREADS>(list, (i64)step * TK, keys + step % RING * TK, words + step % RING * TW);
  };

  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31, row = warp % RW * 16, first = warp / RW * PART;
  float o[VT][4] = {}, most[2] = {-inf(), -inf()}, sum[2] = {};
  const int steps = (int)((list.slots + TK - 1) / TK);
  if (steps) {
    copy_tile<u16, BH, DP, COPY, THREADS>(sq, QS, q, p.D, p.qd, [&](int r) { return r < x.rows ? q + r * p.qh : nullptr; });
    find(0);
    if constexpr (STAGES == 2) {
      find(1);
      __syncthreads();
      load(0);
    }
    cp_commit();
  }
  for (int step = 0; step < steps; step++) {
    if constexpr (STAGES == 2) cp_wait<0>();
    __syncthreads();  // what the last step read may be overwritten; the next steps' keys are known
    if constexpr (STAGES == 2) {
      if (step + 1 < steps) load(step + 1);
      cp_commit();
      find(step + 2);
    } else {
      load(step);
      cp_commit();
      find(step + 1);
      cp_wait<0>();
      __syncthreads();
    }
    const u32* word = words + step % RING * TW;
    bool whole = true;
#pragma unroll
    for (int w = 0; w < TW; w++) whole &= word[w] == ~0u;
    float s[NT][4], factor[2];
    products<KIND, DP>(s, sq, QS, row, sk + step % STAGES * TK * QS, QS, first);
    softmax<SOFTCAP>(s, most, sum, factor, p.scale, p.softcap, !whole, word, word, first);
    if (__any_sync(~0u, factor[0] != 1.f || factor[1] != 1.f)) {
#pragma unroll
      for (int n = 0; n < VT; n++) {
        o[n][0] *= factor[0]; o[n][1] *= factor[0];
        o[n][2] *= factor[1]; o[n][3] *= factor[1];
      }
    }
    add_products<KIND>(o, s, sv + step % STAGES * TK * VS, first, VS, SHARED_KV ? slice * DVP : 0);
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
    sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
  }
  if constexpr (KW > 1) {  // the first warp of a row group takes the others' sums in, one after the other
    float *other = (float*)raw + row * (DVP + 2);  // [16][DVP + 2]: the row's columns, maximum, sum
    for (int w = 1; w < KW; w++) {
      __syncthreads();
      if (warp / RW == w) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          float* to = other + (lane / 4 + 8 * h) * (DVP + 2);
#pragma unroll
          for (int n = 0; n < VT; n++) {
            to[8 * n + 2 * (lane & 3)] = o[n][2 * h];
            to[8 * n + 2 * (lane & 3) + 1] = o[n][2 * h + 1];
          }
          if ((lane & 3) == 0) to[DVP] = most[h], to[DVP + 1] = sum[h];
        }
      }
      __syncthreads();
      if (warp / RW == 0) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const float* from = other + (lane / 4 + 8 * h) * (DVP + 2);
          const float top = fmaxf(most[h], from[DVP]), zero = top == -inf() ? 0.f : top, mine = ex2((most[h] - zero) * LOG2E), theirs = ex2((from[DVP] - zero) * LOG2E);
          most[h] = top;
          sum[h] = sum[h] * mine + from[DVP + 1] * theirs;
#pragma unroll
          for (int n = 0; n < VT; n++) {
            o[n][2 * h] = o[n][2 * h] * mine + from[8 * n + 2 * (lane & 3)] * theirs;
            o[n][2 * h + 1] = o[n][2 * h + 1] * mine + from[8 * n + 2 * (lane & 3) + 1] * theirs;
          }
        }
      }
    }
    if (warp / RW) return;
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int r = row + lane / 4 + 8 * h;
    if (r >= x.rows) continue;
    const bool empty = most[h] == -inf() && sum[h] == 0.f;
    const float inverse = 1.f / (sum[h] + (p.sink && !empty ? ex2((__ldg(p.sink + x.head + r) - most[h]) * LOG2E) : 0.f));
    const i64 at = ((i64)x.b * p.Hq + x.head + r) * p.at.T + x.t;
    if (p.lse && slice == 0 && (lane & 3) == 0) p.lse[at] = empty ? -inf() : most[h] + logf(sum[h]);
    Element<OUT_KIND>* out = (Element<OUT_KIND>*)p.out + at * p.Dv;
#pragma unroll
    for (int n = 0; n < VT; n++) {
      const int col = slice * DVP + 8 * n + 2 * (lane & 3);
      if (col < p.Dv) store_pair<OUT_KIND>(out + col, empty ? 0.f : o[n][2 * h] * inverse, empty ? 0.f : o[n][2 * h + 1] * inverse, col + 1 < p.Dv, p.Dv % 2 == 0);
    }
  }
}
