// out [B,T,M] float32 = sum over heads of x[h] [T,N] w[h]^T [N,M], by warpgroup products: heads are inner elements of one product, read where they lie.
// A cluster of two blocks takes 128 rows each and the same 256 columns: each loads half of the weights' rows for both. N is a multiple of 64, M of 256; 16-bit x and w.
// Where rows are few, heads are taken in two parts that are added to zeros: 0 + a + b has the same bits in either order, which three would not have.
// Defines: KIND, CLUSTER (2, or 1: a block by itself).
#include "cluster.cuh"
#include "wgmma.cuh"

struct Params {
  TensorMap x, w;  // boxes of 128 rows x 64: x by N, T, H, B; w by N, M, H
  float* out;
  int T, H, M, steps;            // steps: of 64 values of N
  int blocks, items, each, adds; // blocks of CLUSTER * 128 rows of one batch entry; items: H / each * B * blocks * M / 256, of `each` heads; adds: out is zeros
};

constexpr int STAGES = 4, A = 128 * 128, STAGE = 3 * A;  // a stage: 128 rows of x, 256 of w

// one read-modify-write in memory: parts may end at the same time
__device__ __forceinline__ void add_pair(float* to, float2 x) {
#ifdef SPARSETILE_EMULATE
  to[0] += x.x; to[1] += x.y;
#else
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" :: "l"(to), "f"(x.x), "f"(x.y) : "memory");
#endif
}
__device__ __forceinline__ void put_pair(float* to, float2 x, int adds) {
  if (adds) add_pair(to, x);
  else *(float2*)to = x;
}

struct Item {
  int b, row, column, head, steps;  // the first ones of this block
  __device__ __forceinline__ Item(const Params& p, int item, u32 rank) {
    const int parts = (p.H + p.each - 1) / p.each, columns = p.M / 256, part = item % parts, m = item / parts / columns;
    column = (item / parts - m * columns) * 256;
    b = m / p.blocks;
    row = ((m - b * p.blocks) * CLUSTER + rank) * 128;
    head = part * p.each;
    steps = imin(p.each, p.H - head) * p.steps;
  }
};

extern "C" __global__ void CLUSTER_DIMS __launch_bounds__(384, 1) grouped_sum_hopper(const __grid_constant__ Params p) {
  SWIZZLED_SHARED(raw);
  const u32 ring = shared_address(raw), bars = ring + STAGES * STAGE, rank = cluster_rank();
#define FULL(s) (bars + 8 * (s))
#define FREE(s) (bars + 8 * (STAGES + (s)))
  const int group = uniform(threadIdx.x / 128), tid = threadIdx.x % 128, clusters = gridDim.x / CLUSTER;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) { bar_init(FULL(s), 1); bar_init(FREE(s), 2 * CLUSTER); }
    bar_fence();
  }
  __syncthreads();
  cluster_sync();
  u32 slot = 0, patience = PATIENCE;
  if (group == 0) {
    fewer_registers<40>();
    u32 phase = 1;
    for (int item = blockIdx.x / CLUSTER; threadIdx.x == 0 && item < p.items; item += clusters) {
      const Item x(p, item, rank);
#pragma unroll 1
      for (int i = 0, head = x.head, c = 0; i < x.steps; i++) {
        bar_wait(FREE(slot), phase, patience);
        bar_expect(FULL(slot), STAGE);
        tma_load(ring + slot * STAGE, &p.x, FULL(slot), c * 64, x.row, head, x.b);
        for (u32 half = CLUSTER > 1 ? rank : 0; half < (CLUSTER > 1 ? rank + 1 : 2); half++) load_for_all(ring + slot * STAGE + A + half * A, &p.w, FULL(slot), c * 64, x.column + half * 128, head);
        if (++c == p.steps) { c = 0; head++; }
        advance<STAGES>(slot, phase);
      }
    }
  } else {
    more_registers<232>();
    const int half = group - 1, lane = tid & 31;
    u32 phase = 0;
    float o[2][64];
    for (int item = blockIdx.x / CLUSTER; item < p.items; item += clusters) {
      const Item x(p, item, rank);
      u32 last = 0;
#pragma unroll 1
      for (int i = 0; i < x.steps; i++) {
        bar_wait(FULL(slot), phase, patience);
        const u64 a = descriptor(ring + slot * STAGE + half * A / 2), b = descriptor(ring + slot * STAGE + A);
        hold(o[0]); hold(o[1]); wgmma_fence();
#pragma unroll
        for (int k = 0; k < 8; k++) wgmma<KIND, K_MAJOR>(o[k & 1], a + (k >> 1) * 2, b + (k >> 1) * 2 + (k & 1) * (A >> 4), i > 0 || k > 1);
        wgmma_commit();
        if (i > 0) {
          wgmma_wait<1>();
          arrive_at(FREE(last), tid % CLUSTER, tid < CLUSTER);
        }
        last = slot;
        advance<STAGES>(slot, phase);
      }
      wgmma_wait<0>(); hold(o[0]); hold(o[1]);
      arrive_at(FREE(last), tid % CLUSTER, tid < CLUSTER);
      const int row = x.row + half * 64 + tid / 32 * 16 + lane / 4;
      float* out = p.out + ((i64)x.b * p.T + row) * p.M + x.column + 2 * (lane & 3);
#pragma unroll
      for (int e = 0; e < 2; e++)
#pragma unroll
        for (int j = 0; j < 16; j++) {
          const float* y = &o[e][4 * j];
          if (row < p.T) put_pair(out + e * 128 + 8 * j, make_float2(y[0], y[1]), p.adds);
          if (row + 8 < p.T) put_pair(out + (i64)8 * p.M + e * 128 + 8 * j, make_float2(y[2], y[3]), p.adds);
        }
    }
  }
  __syncwarp();
  cluster_sync();
}
