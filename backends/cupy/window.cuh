// Which keys a query may choose from: [key_start, key_end) clipped to 0 .. S and, if causal, to what stands at or before the query.
#pragma once
#include "numbers.cuh"

struct Window { int lo, hi; };  // keys lo <= s < hi; nothing when lo >= hi

// row = b * T + t. starts, ends: int32 [B * T] or null; q_starts: int32 [B] or null (then q_start holds for all).
// Values are any int32: 64-bit sums, so that a position near the largest int does not wrap.
__device__ __forceinline__ Window window_of(i64 row, int T, int S, const int* __restrict__ starts, const int* __restrict__ ends,
                                            const int* __restrict__ q_starts, int q_start, int causal) {
  Window w = {0, S};
  if (starts) w.lo = imax(starts[row], 0);
  if (ends) w.hi = clamp(ends[row], 0, S);
  if (causal) {
    const i64 b = row / T, p = (i64)(q_starts ? q_starts[b] : q_start) + (row - b * T);
    if (p + 1 < w.hi) w.hi = p < 0 ? 0 : (int)(p + 1);
  }
  return w;
}
