// Probabilities rebuilt in a backward kernel. Include after `struct Params` (scale, softcap).
#pragma once
#include "numbers.cuh"
constexpr bool EXACT = KIND == FLOAT32;  // float32 keeps natural units and expf, the others log2 and ex2.approx

struct Score {
  float p, slope;  // probability; derivative of the capped score by the uncapped
};
// lse is the row's logsumexp from lse_of, +inf for rows that see no key
__device__ __forceinline__ Score probability(const Params& p, float dot, float lse) {
  constexpr float unit = EXACT ? 1.f : LOG2E;
  float slope = 1.f, x;
  if constexpr (SOFTCAP) {
    const float t = tanhf(dot * p.scale / p.softcap);
    slope = 1.f - t * t;
    x = p.softcap * unit * t;
  } else {
    x = dot * (p.scale * unit);
  }
  return {EXACT ? expf(x - lse) : ex2(x - lse), slope};
}
__device__ __forceinline__ float lse_of(const float* lse, i64 at) {
  const float x = __ldg(lse + at);
  return x == -inf() ? inf() : EXACT ? x : x * LOG2E;
}
