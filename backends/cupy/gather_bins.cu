// A selection sorted by keys, for the backward: bins of (list, tile of TK keys, chunk of TC queries) hold what their queries chose of their keys.
// The order within a bin is accidental; its reader only counts, so the sums that follow do not depend on it. Memory: one word an entry.
#include "selections.cuh"

struct Params {
  Selected list;
  Positions at;
  int *counts, *starts;  // [bins], [bins + 1]; counts become cursors
  u32* items;            // query within its chunk << 16 | last key within the tile << 8 | first key
  i64 entries, bins;
  int tiles, chunks;
};
constexpr int THREADS = 256, SCANNERS = 1024;
static_assert(TK <= 256 && TC <= 65536, "items are packed in 32 bits");

template <class F> __device__ __forceinline__ void each_item(const Params& p, F f) {
  const i64 x = (i64)blockIdx.x * THREADS + threadIdx.x;
  if (x >= p.entries) return;
  const i64 row = x / p.list.K;
  const int j = (int)(x - row * p.list.K), t = (int)(row % p.at.T), g = (int)(row / p.at.T % p.list.G), b = (int)(row / p.at.T / p.list.G);
  const Entries list(p.list, p.at, b, g, t);
  if ((i64)j * list.granularity >= list.slots) return;
  const int e = __ldg(list.entries + j);
  if (e < 0 || e >= list.blocks) return;
  const int low = e * list.granularity, high = low + imin(list.granularity, list.limit - low);
  for (int tile = low / TK; tile * TK < high; tile++) {
    const i64 bin = (((i64)b * p.list.G + g) * p.tiles + tile) * p.chunks + t / TC;
    f(bin, (u32)(t % TC) << 16 | (u32)(imin(high - tile * TK, TK) - 1) << 8 | (u32)imax(low - tile * TK, 0));
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) count(const __grid_constant__ Params p) {
  each_item(p, [&](i64 bin, u32) { atomicAdd(p.counts + bin, 1); });
}

// exclusive prefix sums by one block; counts become the bins' first places
extern "C" __global__ void __launch_bounds__(SCANNERS) scan(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(raw);
  int* sums = (int*)raw;  // [32] of warps, then the block's
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  int before = 0;
  for (i64 base = 0; base < p.bins; base += 4 * SCANNERS) {
    const i64 at = base + 4 * threadIdx.x;
    int n[4], own = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) own += n[i] = at + i < p.bins ? p.counts[at + i] : 0;
    int upto = own;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int y = __shfl_up_sync(~0u, upto, d);
      if (lane >= d) upto += y;
    }
    if (lane == 31) sums[warp] = upto;
    __syncthreads();
    int warps = sums[lane], all = warps;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int y = __shfl_up_sync(~0u, all, d);
      if (lane >= d) all += y;
    }
    const int mine = before + __shfl_sync(~0u, all, warp) - __shfl_sync(~0u, warps, warp) + upto - own;
    int place = mine;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (at + i < p.bins) p.starts[at + i] = p.counts[at + i] = place;
      place += n[i];
    }
    before += __shfl_sync(~0u, all, 31);
    __syncthreads();
  }
  if (threadIdx.x == 0) p.starts[p.bins] = before;
}

extern "C" __global__ void __launch_bounds__(THREADS) scatter(const __grid_constant__ Params p) {
  each_item(p, [&](i64 bin, u32 item) { p.items[atomicAdd(p.counts + bin, 1)] = item; });
}
