// A selection sorted by keys, for the backward: bins of (list, tile of TK keys, chunk of TC queries) hold what their queries chose of their keys.
// The order within a bin is accidental; its reader only counts, so the sums that follow do not depend on it. Memory: one word an entry.
// A tile of keys that far more queries chose than others (a block that every query is given) would be one long chain of sums: `parts` cuts it.
#include "selections.cuh"

struct Params {
  Selected list;
  Positions at;
  int *counts, *starts;  // [bins], [bins + 1]; counts become cursors
  u32* items;            // query within its chunk << 16 | last key within the tile << 8 | first key
  int4* parts;           // [most] list and tile, part, of how many; zeros behind the last
  i64 entries, bins;
  int tiles, chunks, share, most;  // share: items of a tile from which on it is cut into parts of so many
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

// Exclusive prefix sums of count(0 .. n - 1) by one block of threads: each(i, count, sum of those before). The sum of all.
template <class Count, class Each> __device__ __forceinline__ int scan_by_block(i64 n, int* sums, Count count, Each each) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  int before = 0;
  for (i64 base = 0; base < n; base += 4 * SCANNERS) {
    const i64 at = base + 4 * threadIdx.x;
    int x[4], own = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) own += x[i] = at + i < n ? count(at + i) : 0;
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
    int place = before + __shfl_sync(~0u, all, warp) - __shfl_sync(~0u, warps, warp) + upto - own;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (at + i < n) each(at + i, x[i], place);
      place += x[i];
    }
    before += __shfl_sync(~0u, all, 31);
    __syncthreads();
  }
  return before;
}

// counts become the bins' first places; the parts of tiles with many items
extern "C" __global__ void __launch_bounds__(SCANNERS) scan(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(raw);
  const int all = scan_by_block(p.bins, (int*)raw, [&](i64 i) { return p.counts[i]; }, [&](i64 i, int, int place) { p.starts[i] = p.counts[i] = place; });
  if (threadIdx.x == 0) p.starts[p.bins] = all;
  if (!p.most) return;
  __syncthreads();
  scan_by_block(p.bins / p.chunks, (int*)raw, [&](i64 y) {
    const int items = p.starts[(y + 1) * p.chunks] - p.starts[y * p.chunks];
    return items > p.share ? (items + p.share - 1) / p.share : 0;
  }, [&](i64 y, int n, int place) {
    for (int i = 0; i < n && place + i < p.most; i++) p.parts[place + i] = make_int4((int)y, i, n, 0);
  });
}

extern "C" __global__ void __launch_bounds__(THREADS) scatter(const __grid_constant__ Params p) {
  each_item(p, [&](i64 bin, u32 item) { p.items[atomicAdd(p.counts + bin, 1)] = item; });
}
