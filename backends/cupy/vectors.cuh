// Rows of a few elements at a time, as floats: for kernels that only stream.
#pragma once
#include "numbers.cuh"

// `N` elements from p + at * step into floats; aligned loads of N elements where N > 1 (then step is 1)
template <int Kind, int N> __device__ __forceinline__ void load_floats(float (&x)[N], const Element<Kind>* p, int at, i64 step) {
  if constexpr (N == 1) {
    x[0] = to_float<Kind>(p[at * step]);
  } else {
    struct alignas(sizeof(Element<Kind>) * N) Vector { Element<Kind> e[N]; };
    const Vector v = *(const Vector*)(p + at);
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = to_float<Kind>(v.e[i]);
  }
}

__device__ __forceinline__ float warp_sum(float x) {  // the same order whatever the data
#pragma unroll
  for (int m = 16; m; m /= 2) x += __shfl_xor_sync(~0u, x, m);
  return x;
}

// and back, rounded once: one store of N elements, aligned as a whole where N > 1
template <int Kind, int N> __device__ __forceinline__ void store_floats(Element<Kind>* p, const float (&x)[N]) {
  struct alignas(sizeof(Element<Kind>) * N) Vector { Element<Kind> e[N]; };
  Vector v;
#pragma unroll
  for (int i = 0; i < N; i++) v.e[i] = from_float<Kind>(x[i]);
  *(Vector*)p = v;
}
