// One matrix for each head, out[b, h, t] = [x[b, h, t] w[h]^T | tail[b, h, t]], where rows are few and weights are what is read: 128 rows at a time against each matrix, by warpgroup products.
// A block of threads asks the copy engine for all it will read at once, as far as shared memory goes (of DeepSeek's q W_UK all of it, 160 KB): a kernel of ten microseconds has no time to ask twice.
// Rows are T queries of one batch entry after the other; those of a tile that do not exist hold what memory held, and are not stored. 16-bit x, w, tail and out of one type.
// Defines: KIND, STEPS (64 values of N each), STAGES (tiles of 128 columns x 64 of w in flight), W_ROWS (1: N is w's contiguous axis, 0: M is), TAIL (0 or 1).
#include "wgmma.cuh"

struct Params {
  TensorMap x, w, out, tail, tail_out;  // boxes of 64 columns x `times` x 1 x `batches`: by N, M or P, T, H, B; of w 64 x 64 by its contiguous axis, the other, H
  int batches, times, time_tiles, row_tiles;
  int span, tiles, parts, unused;       // a block has `span` of `tiles` column tiles
};

constexpr int TILE = 128 * 128;

#ifdef SPARSETILE_EMULATE
inline void tma_store(const TensorMap* map, u32 from, int x, int y, int z, int w) { const int at[4] = {x, y, z, w}; emulate_tma_store(map, from, at, 4); }
#else
__device__ __forceinline__ void tma_store(const TensorMap* map, u32 from, int x, int y, int z, int w) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" :: "l"(map), "r"(from), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}
#endif

struct Item {
  int h, b, t, first, last;  // of the rows; of the column tiles
  __device__ __forceinline__ Item(const Params& p, int item) {
    const int y = item / p.parts, rows = y % p.row_tiles;
    h = y / p.row_tiles;
    b = rows / p.time_tiles * p.batches;
    t = rows % p.time_tiles * p.times;
    first = (item - y * p.parts) * p.span;
    last = imin(first + p.span, p.tiles);
  }
};

extern "C" __global__ void __launch_bounds__(288, 1) grouped_matmul_hopper(const __grid_constant__ Params p) {
  SWIZZLED_SHARED(raw);
  const u32 rows = shared_address(raw), ring = rows + STEPS * TILE, staged = ring + STAGES * TILE, tail = staged + 2 * TILE, bars = tail + TAIL * TILE;
#define FULL(s) (bars + 8 * (s))
#define FREE(s) (bars + 8 * (STAGES + (s)))
#define ROWS(c) (bars + 8 * (2 * STAGES + (c)))
  const u32 full_tail = ROWS(STEPS);
  const Item x(p, blockIdx.x);
  const int group = uniform(threadIdx.x / 128), bytes = p.batches * p.times * 128;
  u32 slot = 0, patience = PATIENCE;
  if (threadIdx.x == 256) {
    for (int s = 0; s < STAGES; s++) { bar_init(FULL(s), 1); bar_init(FREE(s), 2); }
    for (int c = 0; c <= STEPS; c++) bar_init(ROWS(c), 1);
    bar_fence();
  }
  __syncthreads();
  if (group == 2) {
    if (threadIdx.x == 256) {
      u32 phase = 1;
#pragma unroll 1
      for (int n = x.first; n < x.last; n++)
#pragma unroll 1
        for (int c = 0; c < STEPS; c++) {
          if (n == x.first) {
            bar_expect(ROWS(c), bytes);
            tma_load(rows + c * TILE, &p.x, ROWS(c), c * 64, x.t, x.h, x.b);
          }
          bar_wait(FREE(slot), phase, patience);
          bar_expect(FULL(slot), TILE);
          for (int half = 0; half < 2; half++)
            tma_load(ring + slot * TILE + half * (TILE / 2), &p.w, FULL(slot), W_ROWS ? c * 64 : n * 128 + half * 64, W_ROWS ? n * 128 + half * 64 : c * 64, x.h);
          advance<STAGES>(slot, phase);
        }
      if (TAIL && x.last == p.tiles) {
        bar_expect(full_tail, bytes);
        tma_load(tail, &p.tail, full_tail, 0, x.t, x.h, x.b);
        bar_wait(full_tail, 0, patience);
        tma_store(&p.tail_out, tail, 0, x.t, x.h, x.b);
        tma_store_commit();
        tma_store_wait();
      }
    }
    return;
  }
  const int lane = threadIdx.x & 31, row = threadIdx.x / 32 * 16 + (lane & 15);
  u32 phase = 0;
  float d[64];
#pragma unroll 1
  for (int n = x.first; n < x.last; n++) {
#pragma unroll 1
    for (int c = 0; c < STEPS; c++) {
      bar_wait(ROWS(c), 0, patience);
      bar_wait(FULL(slot), phase, patience);
      const u64 a = descriptor(rows + c * TILE + group * (TILE / 2)), b = W_ROWS ? descriptor(ring + slot * TILE) : descriptor_columns(ring + slot * TILE);
      hold(d); wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; k++) wgmma<KIND, W_ROWS ? K_MAJOR : N_MAJOR>(d, a + 2 * k, b + k * (W_ROWS ? 2 : 128), c != 0 || k != 0);
      wgmma_commit(); wgmma_wait<0>(); hold(d);
      if (threadIdx.x % 128 == 0) bar_arrive(FREE(slot));
      advance<STAGES>(slot, phase);
    }
    if (threadIdx.x == 0) tma_store_wait_read();
    named_sync(1, 256);
#pragma unroll
    for (int j = 0; j < 8; j++)
      stmatrix_at(staged + (j >> 2) * TILE + row * 128 + (((2 * (j & 3) + (lane >> 4)) ^ (row & 7)) << 4),
                  pack<KIND>(d[8 * j], d[8 * j + 1]), pack<KIND>(d[8 * j + 2], d[8 * j + 3]), pack<KIND>(d[8 * j + 4], d[8 * j + 5]), pack<KIND>(d[8 * j + 6], d[8 * j + 7]));
    shared_to_copy_engine();
    named_sync(1, 256);
    if (threadIdx.x == 0) {
      for (int half = 0; half < 2; half++) tma_store(&p.out, staged + half * TILE, n * 128 + half * 64, x.t, x.h, x.b);
      tma_store_commit();
    }
  }
  if (threadIdx.x == 0) tma_store_wait();
}
