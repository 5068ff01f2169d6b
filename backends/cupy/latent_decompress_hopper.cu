// latent_decompress by Hopper's own instructions: 16-bit latents and weights of one type, R 512, Dn = Dv = 128, rotary width up to 64.
// A block of threads keeps 128 latent rows in registers (two groups of 64 rows x 512: 128 registers a thread) and streams weight tiles of 512 x 128 through a ring
// of 16 KB stages; the two blocks of a cluster hold neighbouring rows and load half of each stage for both. The groups go through the stages beside each other: when they took
// turns of a tile's eight, each stage was held twice as long, too little was on its way, and all of it took 3 to 6 % longer.
// Each warp stores its own 16 rows; the rotary part goes out of one resident tile. Rows that do not exist are zeros on the way in and dropped on the way out.
#ifndef KIND
#define KIND BFLOAT16
#endif
#ifndef CLUSTER
#define CLUSTER 2   // blocks that share weights: 1 or 2
#endif
#ifndef STAGES
#define STAGES 11   // 8 or more: a block's latents stand in as many at once
#endif
#ifndef W_ROWS
#define W_ROWS 0    // 1: the weights' rows are output columns, k is contiguous; 0: n is
#endif
#include "cluster.cuh"
#include "wgmma.cuh"

constexpr int STAGE = 16384, STEPS = 8, OUT_BYTES = 16384;  // a step: 64 values of k

struct Params {
  TensorMap latent, w_uk, w_uv, rope, k, v;  // boxes: 128 rows x 64; 64 x 64 (weights); 128 rows x 64; 16 rows x 64 (both outputs)
  int H, blocks, each, tiles, width, P;      // blocks of CLUSTER * 128 rows, `each` of them in one batch; tiles = 2 H; width: column tiles of a window
};

// Order of work: windows of `width` column tiles (a tile: the 128 columns of one head of w_uk, then of w_uv), within a window row block by row block; each cluster
// takes an equal, contiguous piece: tiles t0 .. t1 - 1 of one block.
struct Work {
  int clusters, blocks, tiles, width, c, g, u, u1, block, t0, t1;
  __device__ __forceinline__ void window() { const i64 at = (c + 2 * g) % clusters, n = (i64)blocks * width; u = (int)(at * n / clusters); u1 = (int)((at + 1) * n / clusters); }
  __device__ __forceinline__ Work(const Params& p) : clusters(gridDim.x / CLUSTER), blocks(p.blocks), tiles(p.tiles), width(p.width), c(blockIdx.x / CLUSTER), g(0) { window(); }
  __device__ __forceinline__ bool next() {
    while (u >= u1) { if ((++g) * width >= tiles) return false; window(); }
    block = u / width;
    const int e = imin(u1, (block + 1) * width);
    t0 = g * width + u - block * width; t1 = t0 + e - u; u = e;
    return true;
  }
};

extern "C" __global__ void CLUSTER_DIMS __launch_bounds__(384, 1) latent_decompress_hopper(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(raw);
  const u32 ring = (shared_address(raw) + 1023) & ~1023u, staged = ring + STAGES * STAGE, rotary = staged + 2 * OUT_BYTES, bars = rotary + 16384;
#define FULL(s) (bars + 8 * (s))
#define FREE(s) (bars + 8 * (STAGES + (s)))
  const u32 full_r = bars + 16 * STAGES, free_r = full_r + 8;
  const u32 rank = cluster_rank();
  const int group = uniform(threadIdx.x / 128), tid = threadIdx.x % 128;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) { bar_init(FULL(s), 1); bar_init(FREE(s), 2 * CLUSTER); }
    bar_init(full_r, 1); bar_init(free_r, 8);
    bar_fence();
  }
  __syncthreads();
  cluster_sync();
  Work work(p);
  u32 patience = PATIENCE;
  if (group == 0) {
    fewer_registers<40>();
    if (threadIdx.x == 0) {  // the rows of a block come through the ring, then its weights
      int s = 0;
      u32 ph = 1;
      while (work.next()) {
        const int b = work.block / p.each, row = (work.block % p.each * CLUSTER + rank) * 128;
#pragma unroll 1
        for (int c = 0; c < STEPS; c++) {
          bar_wait(FREE(s), ph, patience);
          bar_expect(FULL(s), STAGE);
          tma_load(ring + s * STAGE, &p.latent, FULL(s), c * 64, row, b);
          if (++s == STAGES) { s = 0; ph ^= 1; }
        }
#pragma unroll 1
        for (int t = work.t0, c = 0; t < work.t1; c == STEPS - 1 ? (c = 0, t++) : c++) {
          const TensorMap* m = t & 1 ? &p.w_uv : &p.w_uk;
          bar_wait(FREE(s), ph, patience);
          bar_expect(FULL(s), STAGE);
          for (u32 half = CLUSTER > 1 ? rank : 0; half < (CLUSTER > 1 ? rank + 1 : 2); half++)  // 64 of the 128 columns from each block
            load_for_all(ring + s * STAGE + half * 8192, m, FULL(s), W_ROWS ? c * 64 : half * 64, W_ROWS ? half * 64 : c * 64, t >> 1);
          if (++s == STAGES) { s = 0; ph ^= 1; }
        }
      }
    } else if (threadIdx.x == 32 && p.P) {  // rotary columns of the block's rows
      u32 ph = 1;
      while (work.next()) {
        bar_wait(free_r, ph, patience); ph ^= 1;
        bar_expect(full_r, 16384);
        tma_load(rotary, &p.rope, full_r, 0, (work.block % p.each * CLUSTER + rank) * 128, work.block / p.each);
      }
    }
  } else {
    more_registers<232>();
    const int w = group - 1, lane = tid & 31, warp = tid / 32;
    const u32 r16 = (lane & 7) + ((lane >> 3) & 1) * 8;                // row of ldmatrix and stmatrix within the warp's 16
    const u32 am = ring + (w * 64 + warp * 16 + r16) * 128;            // this lane's row in a stage of latents
    const u32 so = staged + w * OUT_BYTES + (warp * 16 + r16) * 128;   // and in the staging buffer (halves 8192 apart)
    const u64 db = W_ROWS ? descriptor(uniform(ring)) : descriptor_columns(uniform(ring));
    const int peer = tid % CLUSTER;
    float d[64];
    u32 a[128];
    int s = 0;
    u32 ph = 0, visit = 0;
    for (; uniform(work.next()); visit++) {
      const int ta = uniform(work.t0), tb = uniform(work.t1), block = uniform(work.block), b = block / p.each;
      const int row = (block % p.each * CLUSTER + rank) * 128 + w * 64 + warp * 16, s0 = s;
#pragma unroll
      for (int c = 0; c < STEPS; c++) {
        bar_wait(FULL(s), ph, patience);
        const u32 at = am + s * STAGE;
#pragma unroll
        for (int k = 0; k < 4; k++) {
          u32 x[4];
          ldmatrix_at(x, at + (((2 * k + (lane >> 4)) ^ (r16 & 7)) << 4));
          a[c * 16 + k * 4] = x[0]; a[c * 16 + k * 4 + 1] = x[1]; a[c * 16 + k * 4 + 2] = x[2]; a[c * 16 + k * 4 + 3] = x[3];
        }
        if (++s == STAGES) { s = 0; ph ^= 1; }
      }
      named_sync(4 + w, 128);
      { int x = s0 + (tid / CLUSTER) % STEPS; if (x >= STAGES) x -= STAGES; arrive_at(FREE(x), tid % CLUSTER, tid < STEPS * CLUSTER); }
      __syncwarp();
#pragma unroll 1
      for (int t = ta; t < tb; t++) {
        int last = 0;
#pragma unroll
        for (int c = 0; c < STEPS; c++) {
          const u64 ds = db + (u64)(u32)(uniform(s) * (STAGE >> 4));  // uniform registers: 3 instead of 9 instructions between two products
          bar_wait(FULL(s), ph, patience);
          wgmma_fence();
#pragma unroll
          for (int k = 0; k < 4; k++) wgmma<KIND, W_ROWS ? K_MAJOR : N_MAJOR>(d, a + c * 16 + k * 4, ds + k * (W_ROWS ? 2 : 128), c != 0 || k != 0);
          wgmma_commit();
          if (c) {
            wgmma_wait<1>();
            arrive_at(FREE(last), peer, tid < CLUSTER);
          }
          last = s;
          if (++s == STAGES) { s = 0; ph ^= 1; }
        }
        wgmma_wait<0>();
        arrive_at(FREE(last), peer, tid < CLUSTER);
        hold(d);
        if (lane == 0) tma_store_wait_read();
        __syncwarp();
#pragma unroll
        for (int j = 0; j < 8; j++)
          stmatrix_at(so + (j >> 2) * 8192 + (((2 * (j & 3) + (lane >> 4)) ^ (r16 & 7)) << 4),
                      pack<KIND>(d[8 * j], d[8 * j + 1]), pack<KIND>(d[8 * j + 2], d[8 * j + 3]), pack<KIND>(d[8 * j + 4], d[8 * j + 5]), pack<KIND>(d[8 * j + 6], d[8 * j + 7]));
        shared_to_copy_engine();
        __syncwarp();
        if (lane == 0) {
          const TensorMap* m = t & 1 ? &p.v : &p.k;
          const int head = b * p.H + (t >> 1);
          const u32 from = staged + w * OUT_BYTES + warp * 2048;
          tma_store(m, from, 0, row, head); tma_store(m, from + 8192, 64, row, head);
          if (!(t & 1) && p.P) { bar_wait(full_r, visit & 1, patience); tma_store(m, rotary + (w * 64 + warp * 16) * 128, 128, row, head); }
          tma_store_commit();
        }
        __syncwarp();
      }
      if (lane == 0 && p.P) {  // the rotary rows may be replaced
        bar_wait(full_r, visit & 1, patience);
        tma_store_wait_read();
        bar_arrive(free_r);
      }
      __syncwarp();
    }
    if (lane == 0) tma_store_wait();
  }
  __syncwarp();
  cluster_sync();
}
