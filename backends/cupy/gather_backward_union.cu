// Backward of attention over selected blocks of keys, dQ, where neighbouring queries share what they read (gather_union.cuh): float16 and bfloat16, sm_90a. A warp keeps q and dO of its
// query in shared memory; a block is multiplied 32 keys at a time, so that scores, their gradients and the sums of dQ fit the registers. dK and dV are the portable path's.
// Defines: KIND, WIDTH and VALUES (D and Dv rounded up to 16, at most 128), KEYS (of a step: 16, 32 or 64, divides the granularity), STAGES, SOFTCAP.
#include "hopper.cuh"
#include "selections.cuh"

#ifndef KIND
#define KIND BFLOAT16
#endif
#ifndef WIDTH
#define WIDTH 128
#endif
#ifndef VALUES
#define VALUES 128
#endif
#ifndef KEYS
#define KEYS 64
#endif
#ifndef STAGES
#define STAGES 3
#endif
#ifndef SOFTCAP
#define SOFTCAP 0
#endif

struct Params {
  TensorMap k, v;     // boxes of KEYS rows x 64 columns
  const void *q, *dout;
  const float *lse, *delta;
  void* dq;
  Selected list;
  Positions at;
  i64 qb, qh, qt, ob, oh, ot;
  int Hq, group, D, Dv, parts, tiles, items, span;  // parts: warps that share a query's heads; span: steps that an entry stands for
  float scale, softcap;
};

#define OWN_SLABS (K_SLABS + V_SLABS)
#include "gather_union.cuh"
#include "probability.cuh"

constexpr int HALF = KEYS < 32 ? KEYS : 32;

__device__ __forceinline__ void attend(const Params& p, unsigned char* raw, u32 base, u32 bars, int warp) {
  const u32 own = base + QUERIES + warp * OWN, own_dout = own + K_SLABS * OWN_SLAB;
  Ring ring = {0, 0, PATIENCE};
  for (int it = blockIdx.x; it < p.items && ring.patience; it += gridDim.x) {
    const Item x(p, it);
    const Rows r(p, x, warp);
    const u16 *q = (const u16*)p.q + x.b * p.qb, *dout = (const u16*)p.dout + x.b * p.ob;
    fetch_rows<WIDTH>(own, r.rows ? q + r.head * p.qh + r.t * p.qt : q, p.qh, r.rows, p.D);
    fetch_rows<VALUES>(own_dout, r.rows ? dout + r.head * p.oh + r.t * p.ot : dout, p.oh, r.rows, p.Dv);
    cp_commit();
    const i64 line = ((i64)x.b * p.Hq + r.head) * p.at.T + r.t;
    float dq[WIDTH / 8][4] = {}, lse[2], delta[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = (threadIdx.x & 31) / 4 + 8 * h;
      lse[h] = row < r.rows ? lse_of(p.lse, line + (i64)row * p.at.T) : inf();
      delta[h] = row < r.rows ? __ldg(p.delta + line + (i64)row * p.at.T) : 0.f;
    }
    const int limit = r.rows ? Entries(p.list, p.at, x.b, x.list, r.t).limit : 0;
    cp_wait<0>();
    __syncwarp();
    walk(raw, base, bars, ring, warp / p.parts, [&](int block, u32 keys) {
      int seen = limit - block * KEYS;
#pragma unroll 1
      for (int half = 0; half < KEYS && seen > 0; half += HALF, seen -= HALF, keys += HALF * 128) {
        float s[HALF / 8][4], dp[HALF / 8][4];
        multiply_rows<WIDTH>(s, own, keys);
        multiply_rows<VALUES>(dp, own_dout, keys + K_SLABS * SLAB);
#pragma unroll
        for (int n = 0; n < HALF / 8; n++)
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const Score y = probability(p, s[n][e], lse[e / 2]);
            s[n][e] = 8 * n + 2 * (threadIdx.x & 3) + e % 2 < seen ? y.p * (dp[n][e] - delta[e / 2]) * y.slope : 0.f;
          }
        if (seen < HALF) add_columns<true>(dq, s, keys, seen);
        else add_columns<false>(dq, s, keys, seen);
      }
    });
    const float factor[2] = {p.scale, p.scale};
    if (r.rows) store_rows((u16*)p.dq + line * p.D, (i64)p.at.T * p.D, r.rows, p.D, raw, base, own, dq, factor);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) rows(const __grid_constant__ Params p) {
  SWIZZLED_SHARED(raw);
  const u32 base = shared_address(raw), bars = base + BARS;
  run_roles(p, raw, base, bars, [&](int warp) { attend(p, raw, base, bars, warp); });
}
