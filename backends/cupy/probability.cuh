// Probabilities rebuilt in a backward kernel. Include after `struct Params` (scale, softcap).
#pragma once
#include "numbers.cuh"

struct Score {
  float p, slope;  // probability; derivative of the capped score by the uncapped
};
// The score is rounded exactly as in the forward (no fused product), so that score - lse is right however large both are.
// lse is the row's logsumexp from lse_of, +inf for rows that see no key.
__device__ __forceinline__ Score probability(const Params& p, float dot, float lse) {
  float slope = 1.f, x;
  if constexpr (SOFTCAP) {
    const float t = tanhf(dot * p.scale / p.softcap);
    slope = 1.f - t * t;
    x = p.softcap * t;
  } else {
    x = __fmul_rn(dot, p.scale);
  }
  return {KIND == FLOAT32 ? expf(x - lse) : ex2((x - lse) * LOG2E), slope};
}
__device__ __forceinline__ float lse_of(const float* lse, i64 at) {
  const float x = __ldg(lse + at);
  return x == -inf() ? inf() : x;
}
