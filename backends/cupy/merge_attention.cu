// Parts of one attention over disjoint keys into the whole, in the order given: one warp a row. Defines: KIND, OUT_KIND, VECTOR (elements a lane loads at once).
#include "vectors.cuh"

constexpr int MOST = 24, WARPS = 8, THREADS = 256;  // 24 parts a launch: the arguments stay under 2 KiB
struct Part {
  const void* out;
  const float* lse;
  i64 b, h, t, d, lb, lh, lt;
};
struct Params {
  void* out;
  float* lse;
  const float* sink;
  int H, T, Dv, parts;
  i64 rows;
  Part part[MOST];
};

extern "C" __global__ void __launch_bounds__(THREADS) merge(const __grid_constant__ Params p) {
  const i64 row = (i64)blockIdx.x * WARPS + threadIdx.x / 32;
  if (row >= p.rows) return;
  const int t = row % p.T, h = row / p.T % p.H, lane = threadIdx.x & 31;
  const i64 b = row / p.T / p.H;
  float top = -inf(), sum = 0.f;
  for (int i = 0; i < p.parts; i++) top = fmaxf(top, p.part[i].lse[b * p.part[i].lb + h * p.part[i].lh + t * p.part[i].lt]);
  for (int i = 0; i < p.parts; i++) {
    const float lse = p.part[i].lse[b * p.part[i].lb + h * p.part[i].lh + t * p.part[i].lt];
    if (lse != -inf()) sum += expf(lse - top);  // NaN stays NaN
  }
  const bool empty = sum == 0.f;
  const float inverse = 1.f / (sum + (p.sink && !empty ? expf(p.sink[h] - top) : 0.f));
  if (lane == 0) p.lse[row] = empty ? -inf() : top + logf(sum);
  Element<OUT_KIND>* out = (Element<OUT_KIND>*)p.out + row * p.Dv;
  for (int c = lane * VECTOR; c < p.Dv; c += 32 * VECTOR) {
    float y[VECTOR] = {};
    for (int i = 0; i < p.parts; i++) {
      const Part& part = p.part[i];
      const float lse = part.lse[b * part.lb + h * part.lh + t * part.lt];
      if (lse == -inf()) continue;
      float x[VECTOR];
      load_floats<KIND, VECTOR>(x, (const Element<KIND>*)part.out + b * part.b + h * part.h + t * part.t, c, part.d);
      const float weight = expf(lse - top);
#pragma unroll
      for (int e = 0; e < VECTOR; e++) y[e] = fmaf(weight, x[e], y[e]);
    }
#pragma unroll
    for (int e = 0; e < VECTOR; e++) out[c + e] = from_float<OUT_KIND>(empty ? 0.f : y[e] * inverse);
  }
}
