// Scores of keys -> scores of blocks of `pool` keys: the maximum over a block's keys in the query's window, NaN passed over, -inf where nothing is left.
// A power of two of lanes shares a block; a block of threads takes THREADS / lanes of them.
// With PAGE instead: entries without a key leave the rows that were answered with all of their window, for there no score told.
#include "mma.cuh"
#include "pages.cuh"
#include "window.cuh"

#ifndef THREADS
#define THREADS 256
#endif

#if !PAGE
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
#else
struct Params : Pages {
  int* indices; int* lengths;  // [B * T, top_k], [B * T]
  const int* starts; const int* ends; const int* q_starts;
  int T, S, pool, top_k, q_start, causal;
};

// whether any key of an entry lies in a page
__device__ __forceinline__ bool exists(const Params& p, int b, const Window& w, int entry) {
  const i64 from = (i64)entry * p.pool, lo = from > w.lo ? from : w.lo, hi = from + p.pool < w.hi ? from + p.pool : w.hi;
  for (i64 s = lo; s < hi; s = (s / PAGE + 1) * PAGE)
    if (p.row(b, (int)s) >= 0) return true;
  return false;
}

extern "C" __global__ void __launch_bounds__(THREADS) drop_holes(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(raw);
  int* counts = (int*)raw;  // [THREADS / 32]
  const int row = blockIdx.x, lane = threadIdx.x & 31, warp = threadIdx.x / 32, n = p.lengths[row];
  const Window w = window_of(row, p.T, p.S, p.starts, p.ends, p.q_starts, p.q_start, p.causal);
  if (w.lo >= w.hi || (w.hi - 1) / p.pool - w.lo / p.pool >= p.top_k) return;
  int* indices = p.indices + (i64)row * p.top_k;
  int kept = 0;
  for (int first = 0; first < n; first += THREADS) {
    const int i = first + threadIdx.x, entry = i < n ? indices[i] : -1;
    const bool keep = i < n && exists(p, row / p.T, w, entry);
    const u32 ballot = __ballot_sync(~0u, keep);
    if (lane == 0) counts[warp] = __popc(ballot);
    __syncthreads();  // everyone has read its entry: those before may be written over
    int at = kept + __popc(ballot & ((1u << lane) - 1));
    for (int x = 0; x < THREADS / 32; x++) {
      if (x < warp) at += counts[x];
      kept += counts[x];
    }
    if (keep) indices[at] = entry;
    __syncthreads();
  }
  for (int i = kept + threadIdx.x; i < n; i += THREADS) indices[i] = -1;
  if (threadIdx.x == 0) p.lengths[row] = kept;
}
#endif
