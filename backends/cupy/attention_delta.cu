// What the backward of attention needs of each row: LANES threads a row; and the gradient of the sinks, one block a head, in a fixed order.
// Defines: KIND (out), DOUT_KIND, VECTOR (elements a lane loads at once), LANES (a power of two, at most 32).
#include "vectors.cuh"

struct Params {
  const void *out, *dout;
  const float *lse, *dlse, *sink;
  float *lse_total, *delta, *term, *dsink;
  i64 ob, oh, ot, od, db, dh, dt, dd, lb, lh, lt;  // strides of out, dout, dlse
  int B, H, T, Dv;
};
constexpr int WARPS = 8, THREADS = 256;

// lse_total = logaddexp(lse, sink); delta = sum(dout * out) - dlse * exp(lse_total - lse); term = exp(sink - lse_total) * sum(dout * out)
extern "C" __global__ void __launch_bounds__(THREADS) rows(const __grid_constant__ Params p) {
  const u32 rows = (u32)p.B * p.H * p.T, mine = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES, row = mine < rows ? mine : rows - 1;  // 32 bits: a division of 64 takes longer than the row
  const u32 t = row % (u32)p.T, bh = row / (u32)p.T, h = bh % (u32)p.H, b = bh / (u32)p.H, lane = threadIdx.x % LANES;
  const float lse = p.lse[row], sink = p.sink ? p.sink[h] : -inf();
  const Element<KIND>* out = (const Element<KIND>*)p.out + b * p.ob + h * p.oh + t * p.ot;
  const Element<DOUT_KIND>* dout = (const Element<DOUT_KIND>*)p.dout + b * p.db + h * p.dh + t * p.dt;
  float sum = 0.f;
  for (int c = lane * VECTOR; c < p.Dv; c += LANES * VECTOR) {
    float x[VECTOR], y[VECTOR];
    load_floats<KIND, VECTOR>(x, out, c, p.od);
    load_floats<DOUT_KIND, VECTOR>(y, dout, c, p.dd);
#pragma unroll
    for (int i = 0; i < VECTOR; i++) sum = fmaf(x[i], y[i], sum);
  }
#pragma unroll
  for (int m = LANES / 2; m; m /= 2) sum += __shfl_xor_sync(~0u, sum, m);
  if (lane || mine >= rows) return;
  const float high = fmaxf(lse, sink), low = fminf(lse, sink);
  const float total = lse != lse ? lse : high == -inf() || high == inf() ? high : high + log1pf(expf(low - high));  // fmaxf drops NaN
  // The keys' share of the whole is exp(lse - total). Where a huge sink makes it vanish, P = exp(s - total) would underflow and with it what dlse brings:
  // then P is taken relative to e^60 times the keys' sum, small enough to be nothing in dV and still a normal number.
  float dlse = p.dlse ? p.dlse[b * p.lb + h * p.lh + t * p.lt] : 0.f;
  const float reference = dlse != 0.f && lse != -inf() && total - lse > 60.f ? lse + 60.f : total;
  if (dlse != 0.f) dlse *= expf(reference - lse);
  p.lse_total[row] = reference;
  p.delta[row] = lse == -inf() ? 0.f : sum - dlse;
  if (p.term) p.term[row] = lse == -inf() || sink == -inf() || sink == inf() ? 0.f : expf(sink - total) * sum;
}

// dsink[h] = -sum over b, t of term
extern "C" __global__ void __launch_bounds__(THREADS) sinks(const __grid_constant__ Params p) {
#ifdef SPARSETILE_EMULATE
  float* part = (float*)emulate_shared();
#else
  __shared__ float part[WARPS];
#endif
  const int h = blockIdx.x;
  float sum = 0.f;
  for (int b = 0; b < p.B; b++)
    for (int t = threadIdx.x; t < p.T; t += THREADS) sum += p.term[((i64)b * p.H + h) * p.T + t];
  sum = warp_sum(sum);
  if ((threadIdx.x & 31) == 0) part[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0.f;
    for (int w = 0; w < WARPS; w++) sum += part[w];
    p.dsink[h] = -sum;
  }
}
