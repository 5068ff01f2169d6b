// Exact selection among float32 scores: keys that sort like the scores, sums over a block of threads, the radix search for a lower bound.
// A score and its position are one integer, (key << L | ~position): ties need no code of their own, the smaller position is the larger integer.
#pragma once
#include "numbers.cuh"

constexpr int BINS = 2048;               // 11 bits a pass
constexpr u32 LOWEST = 0x00800000u;      // key of -FLT_MAX: nothing below it is ever chosen (-inf, NaN with its sign set)

// Larger score, larger key; -0.0 and 0.0 share one. NaN never gets here: `chosen` is asked first.
__device__ __forceinline__ u32 key_of(float x) { const int b = __float_as_int(x + 0.f); return (u32)(b ^ ((b >> 31) & 0x7fffffff)) ^ 0x80000000u; }
__device__ __forceinline__ float value_of(u32 k) { const int b = (int)(k ^ 0x80000000u); return __int_as_float(b ^ ((b >> 31) & 0x7fffffff)); }
__device__ __forceinline__ bool eligible(float x) { return x > -inf(); }  // false for NaN
__device__ __forceinline__ float nan_() { return __int_as_float(0x7fffffff); }

#ifdef SPARSETILE_EMULATE
inline int warp_sum(int x) { for (int o = 1; o < 32; o *= 2) x += __shfl_xor_sync(~0u, x, o); return x; }
inline u32 warp_max(u32 x) { for (int o = 1; o < 32; o *= 2) { const u32 y = __shfl_xor_sync(~0u, x, o); x = x > y ? x : y; } return x; }
inline int leading_zeros(u64 x) { return x ? __builtin_clzll(x) : 64; }
#else
__device__ __forceinline__ int warp_sum(int x) { return __reduce_add_sync(~0u, x); }
__device__ __forceinline__ u32 warp_max(u32 x) { return __reduce_max_sync(~0u, x); }
__device__ __forceinline__ int leading_zeros(u64 x) { return __clzll((long long)x); }
#endif

// Where the sums of a block's warps meet, and what a radix pass found.
template <int THREADS> struct Meeting { int warps[THREADS / 32]; int bin, above, inside, count; u32 top; };

// Exclusive sum over the block's threads; `total` gets the sum. A barrier must stand between two calls.
template <int THREADS> __device__ __forceinline__ int block_scan(Meeting<THREADS>& m, int v, int& total) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  int in = v;
#pragma unroll
  for (int o = 1; o < 32; o *= 2) { const int y = __shfl_up_sync(~0u, in, o); if (lane >= o) in += y; }
  if (lane == 31) m.warps[warp] = in;
  __syncthreads();
  const int w = lane < THREADS / 32 ? m.warps[lane] : 0;
  total = warp_sum(w);
  return warp_sum(lane < warp ? w : 0) + in - v;
}

// The largest lower bound that keeps between need and need + slack of the distinct integers that each() names, all in [lo, lo + 2^bits);
// 0 when there are no more than `need`. bins [BINS] is zero before and after. Each pass settles 11 bits: at most six.
template <int THREADS, class Each> __device__ __forceinline__ u64 bound(Meeting<THREADS>& m, u32* bins, Each each, int need, int slack, u64 lo, int bits) {
  constexpr int PER = BINS / THREADS;
  for (bool first = true;; first = false) {
    const int shift = imax(bits - 11, 0);
    const u32 used = 1u << imin(bits, 11);
    each([&](u64 v) { const u64 d = (v - lo) >> shift; if (d < used) atomicAdd(&bins[BINS - 1 - (int)d], 1u); });
    __syncthreads();
    int h[PER], sum = 0, total;
#pragma unroll
    for (int j = 0; j < PER; j++) { h[j] = bins[threadIdx.x * PER + j]; bins[threadIdx.x * PER + j] = 0; sum += h[j]; }
    int before = block_scan<THREADS>(m, sum, total);
    if (first && total <= need) { __syncthreads(); return 0; }
    if (before < need && need <= before + sum) {
#pragma unroll
      for (int j = 0; j < PER; j++) {
        if (before < need && need <= before + h[j]) { m.bin = BINS - 1 - (threadIdx.x * PER + j); m.above = before; m.inside = h[j]; }
        before += h[j];
      }
    }
    __syncthreads();
    lo += (u64)m.bin << shift; need -= m.above; bits = shift;
    const int inside = m.inside;
    if (inside - need <= slack) return lo;
    __syncthreads();  // the next pass writes bin, above and inside again
  }
}

// What a row takes without asking (the first and last forced ones, or everything when no more is there than asked for), and what is left to select.
struct Choice { int first, nfirst, last, nlast, lo, hi, k; };

__device__ __forceinline__ Choice choice_of(int lo, int hi, int k, int force_first, int force_last, int take_all) {
  Choice c = {lo, 0, hi, 0, lo, lo, 0};
  const int n = imax(hi - lo, 0);
  if (take_all && n <= k) { c.nfirst = n; return c; }
  c.nfirst = imin(imin(force_first, n), k);
  c.nlast = imin(imin(force_last, n - c.nfirst), k - c.nfirst);
  c.last = hi - c.nlast;
  c.lo = lo + c.nfirst; c.hi = lo + n - c.nlast; c.k = k - c.nfirst - c.nlast;
  return c;
}
