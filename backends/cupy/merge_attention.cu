// Parts of one attention over disjoint keys into the whole, in the order given: LANES threads a row. Defines: KIND, OUT_KIND, VECTOR (elements a lane loads at once),
// LANES (a power of two), PARTS (their number where it is small: every load is under way before the first is needed; 0: any number),
// WEIGHTS (-1: parts weigh as their lses say; else the element type of weights that stand in the lses' place, and no lse is made).
#include "vectors.cuh"

constexpr bool GIVEN = WEIGHTS >= 0;
using Weight = Element<(GIVEN ? WEIGHTS : 0)>;
constexpr int MOST = 24, THREADS = 256;  // 24 parts a launch: the arguments stay under 2 KiB
struct Part {
  const void* out;
  const void* lse;
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
  const i64 row = (i64)blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;
  if (row >= p.rows) return;
  const u32 t = (u32)row % (u32)p.T, bh = (u32)row / (u32)p.T, h = bh % (u32)p.H, b = bh / (u32)p.H, lane = threadIdx.x % LANES;
  const int parts = PARTS ? PARTS : p.parts;
  auto lse_of = [&](int i) { const Part& part = p.part[i]; return to_float<(GIVEN ? WEIGHTS : 0)>(((const Weight*)part.lse)[b * part.lb + h * part.lh + t * part.lt]); };
  float top = -inf(), sum = 0.f;
#pragma unroll
  for (int i = 0; i < parts && !GIVEN; i++) top = fmaxf(top, lse_of(i));
#pragma unroll
  for (int i = 0; i < parts && !GIVEN; i++) {
    const float lse = lse_of(i);
    if (lse != -inf()) sum += expf(lse - top);  // NaN stays NaN
  }
  const bool empty = !GIVEN && sum == 0.f;
  const float inverse = GIVEN ? 1.f : 1.f / (sum + (p.sink && !empty ? expf(p.sink[h] - top) : 0.f));
  if (!GIVEN && lane == 0) p.lse[row] = empty ? -inf() : top + logf(sum);
  for (int c = lane * VECTOR; c < p.Dv; c += LANES * VECTOR) {
    float y[VECTOR] = {};
#pragma unroll
    for (int i = 0; i < parts; i++) {
      const Part& part = p.part[i];
      const float lse = lse_of(i);
      float x[VECTOR];
      load_floats<KIND, VECTOR>(x, (const Element<KIND>*)part.out + b * part.b + h * part.h + t * part.t, c, part.d);
      const float weight = GIVEN ? lse : expf(lse - top);
#pragma unroll
      for (int e = 0; e < VECTOR; e++) y[e] = !GIVEN && lse == -inf() ? y[e] : fmaf(weight, x[e], y[e]);  // an empty part may hold anything
    }
#pragma unroll
    for (int e = 0; e < VECTOR; e++) y[e] = empty ? 0.f : y[e] * inverse;
    store_floats<OUT_KIND, VECTOR>((Element<OUT_KIND>*)p.out + row * p.Dv + c, y);
  }
}
