// Scores of keys -> scores of blocks of `pool` keys: the maximum over a block's keys in the query's window, NaN passed over, -inf where nothing is left.
// A power of two of lanes shares a block; a block of threads takes THREADS / lanes of them.
#include "mma.cuh"
#include "window.cuh"

#ifndef THREADS
#define THREADS 256
#endif

struct Params {
  const float* scores; float* pooled;   // row i at scores + i * scores_row, pooled + i * pooled_row: query first_row + i of [B * T]
  const int* starts; const int* ends; const int* q_starts;
  i64 scores_row, pooled_row, first_row;
  int T, S, pool, blocks, lanes, q_start, causal, parts;  // parts: blocks of threads that share a row
};

extern "C" __global__ void __launch_bounds__(THREADS) pool_scores(const __grid_constant__ Params p) {
  const i64 i = blockIdx.x / p.parts;
  const int lane = threadIdx.x % p.lanes, block = (int)(blockIdx.x % p.parts) * (THREADS / p.lanes) + threadIdx.x / p.lanes;
  const Window w = window_of(p.first_row + i, p.T, p.S, p.starts, p.ends, p.q_starts, p.q_start, p.causal);
  const float* x = p.scores + i * p.scores_row;
  float best = -inf();
  if (block < p.blocks) {
    const i64 from = (i64)block * p.pool, lo = from > w.lo ? from : w.lo, hi = from + p.pool < w.hi ? from + p.pool : w.hi;
    for (i64 s = lo + lane; s < hi; s += p.lanes) best = fmaxf(best, x[s]);  // fmaxf passes over NaN
  }
  for (int o = p.lanes / 2; o; o /= 2) best = fmaxf(best, __shfl_xor_sync(~0u, best, o));
  if (block < p.blocks && lane == 0) p.pooled[i * p.pooled_row + block] = best;
}
