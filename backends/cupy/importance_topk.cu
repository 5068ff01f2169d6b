// What compressed keys got of a query's attention -> importances of blocks of keys: each compressed key before the row's end counts as often as its strides lie in the block.
#include "mma.cuh"

#ifndef THREADS
#define THREADS 256
#endif

struct Params {
  const float* shares; const int* ends; float* out;  // row i at shares + i * shares_row, out + i * out_row, its end at ends[first_row + i]
  i64 shares_row, out_row, first_row;
  int blocks, reach, step, parts;                    // strides of a compressed key, strides of a block; parts: blocks of threads that share a row
};

extern "C" __global__ void __launch_bounds__(THREADS) sum_blocks(const __grid_constant__ Params p) {
  const i64 i = blockIdx.x / p.parts;
  const int j = (int)(blockIdx.x % p.parts) * THREADS + threadIdx.x, end = p.ends[p.first_row + i];
  if (j >= p.blocks) return;
  const float* x = p.shares + i * p.shares_row;
  const i64 first = (i64)j * p.step - p.reach + 1;
  const int wide = p.step + p.reach - 1, most = imin(p.step, p.reach);
  float total = 0.f;
  for (int n = 0; n < wide; n++)
    if (first + n >= 0 && first + n < end) total = fmaf((float)imin(imin(n + 1, wide - n), most), x[first + n], total);
  p.out[i * p.out_row + j] = total;
}
