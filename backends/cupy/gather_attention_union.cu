// Attention over selected blocks of keys where neighbouring queries share what they read (Native Sparse Attention), float16 and bfloat16, sm_90a (gather_union.cuh).
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
#define STAGES 4
#endif
#ifndef SOFTCAP
#define SOFTCAP 0
#endif


struct Params {
  TensorMap k, v;     // boxes of KEYS rows x 64 columns
  const void* q;
  void* out;
  float* lse;
  const float* sink;
  Selected list;
  Positions at;
  i64 qb, qh, qt;
  int Hq, group, D, Dv, parts, tiles, items, span;  // parts: warps that share a query's heads; span: steps that an entry stands for
  float scale, softcap;
};

#define OWN_SLABS (K_SLABS > V_SLABS ? K_SLABS : V_SLABS)
#include "gather_union.cuh"

// factors of the sums of two rows, and their lse
__device__ __forceinline__ void finish(const Params& p, const Item& x, const Rows& r, const float (&most)[2], float (&sum)[2], float (&factor)[2]) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int row = lane / 4 + 8 * h;
    sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
    sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
    const bool empty = most[h] == -inf() && sum[h] == 0.f;
    factor[h] = empty ? 0.f : 1.f / (sum[h] + (p.sink && row < r.rows ? ex2((__ldg(p.sink + r.head + row) - most[h]) * LOG2E) : 0.f));
    if (p.lse && row < r.rows && (lane & 3) == 0) p.lse[((i64)x.b * p.Hq + r.head + row) * p.at.T + r.t] = empty ? -inf() : most[h] + logf(sum[h]);
  }
}

__device__ __forceinline__ void attend(const Params& p, unsigned char* raw, u32 base, u32 bars, int warp) {
  const u32 own = base + QUERIES + warp * OWN;
  Ring ring = {0, 0, PATIENCE};
  for (int it = blockIdx.x; it < p.items && ring.patience; it += gridDim.x) {
    const Item x(p, it);
    const Rows r(p, x, warp);
    const u16* q = (const u16*)p.q + x.b * p.qb;
    fetch_rows<WIDTH>(own, r.rows ? q + r.head * p.qh + r.t * p.qt : q, p.qh, r.rows, p.D);
    cp_commit();
    cp_wait<0>();
    __syncwarp();
    const int limit = r.rows ? Entries(p.list, p.at, x.b, x.list, r.t).limit : 0;
    float o[VALUES / 8][4] = {}, most[2] = {-inf(), -inf()}, sum[2] = {}, factor[2];
    walk(raw, base, bars, ring, warp / p.parts, [&](int block, u32 keys) {
      const u32 values = keys + K_SLABS * SLAB;
      const int seen = limit - block * KEYS;
      const u32 words[2] = {range_bits(0, seen), range_bits(0, seen - 32)};
      float s[KEYS / 8][4];
      multiply_rows<WIDTH>(s, own, keys);
      softmax<SOFTCAP>(s, most, sum, factor, p.scale, p.softcap, seen < KEYS, words, words, 0);
      if (__any_sync(~0u, factor[0] != 1.f || factor[1] != 1.f)) {
#pragma unroll
        for (int n = 0; n < VALUES / 8; n++) {
          o[n][0] *= factor[0]; o[n][1] *= factor[0];
          o[n][2] *= factor[1]; o[n][3] *= factor[1];
        }
      }
      if (seen < KEYS) add_columns<true>(o, s, values, seen);
      else add_columns<false>(o, s, values, seen);
    });
    finish(p, x, r, most, sum, factor);
    if (r.rows) store_rows((u16*)p.out + (((i64)x.b * p.Hq + r.head) * p.at.T + r.t) * p.Dv, (i64)p.at.T * p.Dv, r.rows, p.Dv, raw, base, own, o, factor);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) forward(const __grid_constant__ Params p) {
  SWIZZLED_SHARED(raw);
  const u32 base = shared_address(raw), bars = base + BARS;
  run_roles(p, raw, base, bars, [&](int warp) { attend(p, raw, base, bars, warp); });
}
