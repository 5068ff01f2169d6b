// Attention over selected keys by Hopper's own instructions, for keys of width 576 whose first 512 columns are the values (DeepSeek's latent), float16 and bfloat16:
// an item is one query and up to 64 heads that share its list (latent_hopper.cuh). A warpgroup gathers its keys; holes are zeros in the tile: nothing is read for them.
// LATENT 512: keys are rows of bytes, the fp8 layout of a latent cache (latent_bytes_hopper.cuh): each warp of it goes through all lists and gathers its eight rows of a tile. SPLIT: for few queries their lists are split over the chip (split.cuh), the blocks of threads of a row of `parts` take the same share.
#include "hopper.cuh"
#include "selections.cuh"
#include "split.cuh"

#ifndef KIND
#define KIND BFLOAT16
#endif
#ifndef SPLIT
#define SPLIT 0
#endif
#ifndef LATENT
#define LATENT 0
#endif

struct Params {
#if LATENT
  TensorMap q;
#else
  const void* q;
#endif
  const void* k;
  void* out;
  float* lse;
  const float* sink;
  Selected list;
  Positions at;
  Split split;
  i64 qb, qh, qt, kb;      // bytes
  int Hq, parts, items;    // parts: of 64 heads
  u32 kt;                  // bytes, too
  float scale, scale2;     // above 0; the second is for powers of two
};

#if LATENT
#include "latent_bytes_hopper.cuh"
#else
#define EARLY 0
#include "latent_hopper.cuh"

// 32 rows into a tile of 9 chunks of 64 columns: eight threads to a row, each thread rows r and r + 16 (`to` is its place in the first)
__device__ __forceinline__ void fetch_rows(u32 to, const char* a, const char* b, int a_exists, int b_exists) {
#pragma unroll
  for (int c = 0; c < 9; c++) { fetch(to + c * CHUNK, a + c * 128, a_exists); fetch(to + c * CHUNK + 2048, b + c * 128, b_exists); }
}
#endif
__device__ __forceinline__ int tiles_of(i64 slots) { return imax(((int)slots + N - 1) / N, 1); }  // a query without keys has one tile of holes

#if LATENT
using Ring = Bytes;
#else
struct Ring { u32 slot, phase, patience; };
#endif

// The query of an item and at most `most` tiles of its keys, from tile `at`. How many they were; `more`: another item comes, or units of this share are left.
__device__ __forceinline__ int gather_item(const Params& p, unsigned char* raw, u32 base, u32 here, u32 bars, Ring& ring, int number, int at, int most, int scratch, bool more) {
  const int tid = threadIdx.x % 128;
  const Item x(p, number);
#if !LATENT
  const int r = tid / 8, column = tid % 8 * 16;
  const char* from = (const char*)p.q + x.b * p.qb + (x.head + r) * p.qh + x.t * p.qt + column;
#pragma unroll 1
  for (int half = 0, rows = x.rows - r; half < 2; half++, rows -= N, from += N * p.qh) {
    bar_wait(FREE(ring.slot), ring.phase, ring.patience);
    fetch_rows(here + ring.slot * TILE, rows > 0 ? from : (const char*)p.q, rows > 16 ? from + 16 * p.qh : (const char*)p.q, rows > 0, rows > 16);
    copies_arrive(FULL(ring.slot));
    if (tid == 0) bar_arrive(FULL(ring.slot));
    advance<SLOTS>(ring.slot, ring.phase);
  }
#endif
  const Entries list(p.list, p.at, x.b, 0, x.t);
  const int *next = list.entries + at * N + tid % 32, limit = list.limit;
  int to_come = (int)list.slots - at * N - tid % 32, left = uniform(tiles_of(list.slots)) - at, entry = to_come > 0 ? __ldg(next) : -1;
  if (SPLIT) {
    if (at == 0 && left <= most) scratch = -1;
    more = left < most;
    left = most = imin(left, most);
  }
#if LATENT
  const char* from = (const char*)p.k + x.b * p.kb;
#else
  from = (const char*)p.k + x.b * p.kb + column;
#endif
#pragma unroll 1
  while (left) {
    const int key = (u32)entry < (u32)limit ? entry : -1;
    const u32 word = __ballot_sync(~0u, key >= 0);
    next += N; to_come -= N; left--;
    entry = to_come > 0 ? __ldg(next) : -1;  // asked for a tile ahead
    const Found found = {word, left || more ? left : -1, number, scratch};
#if LATENT
    ask(p, raw, base, bars, ring, found, [&](u32 to, u32 loaded) {
      const int there = imax(key, 0);  // a row comes for holes too, and nobody looks at it: a condition for each costs more
#pragma unroll
      for (int r = 0; r < 8; r++) warp_bulk_load(to + r * ROW, from + (u64)(u32)__shfl_sync(~0u, there, 8 * ring.warp + r) * p.kt, ROW, loaded);
    });
#else
    const int a = __shfl_sync(~0u, key, r), b = __shfl_sync(~0u, key, r + 16);
    bar_wait(FREE(ring.slot), ring.phase, ring.patience);
    fetch_rows(here + ring.slot * TILE, from + (u64)(u32)imax(a, 0) * p.kt, from + (u64)(u32)imax(b, 0) * p.kt, a >= 0, b >= 0);
    copies_arrive(FULL(ring.slot));
    if (tid == 0) {
      ((Found*)(raw + FOUND))[ring.slot] = found;
      bar_arrive(FULL(ring.slot));
    }
    advance<SLOTS>(ring.slot, ring.phase);
#endif
  }
  return most;
}

__device__ __forceinline__ void gather(const Params& p, unsigned char* raw, u32 base, u32 bars, Share share, Ring& ring) {
  const int tid = threadIdx.x % 128, r = tid / 8;
  const u32 here = base + r * 128 + (tid % 8 * 16 ^ (r & 7) << 4);
#if SPLIT
  const int part = (int)blockIdx.x % p.parts;
  for (int scratch = 2 * (blockIdx.x - part) + part; share.units > 0; scratch = 2 * (blockIdx.x - part) + p.parts + part, share.job++, share.at = 0)
    share.units -= gather_item(p, raw, base, here, bars, ring, share.job * p.parts + part, share.at, share.units, scratch, false);
#else
  for (int it = blockIdx.x; it < p.items; it += gridDim.x)  // late queries have long rows: first
    gather_item(p, raw, base, here, bars, ring, p.items - 1 - it, 0, 0, -1, it + (int)gridDim.x < p.items);
#endif
}

extern "C" __global__ void __launch_bounds__(512, 1) gather_attention_hopper(const __grid_constant__ Params p) {
  SWIZZLED_SHARED(raw);
  const u32 base = shared_address(raw), bars = base + BARS;
  Share share = {0, 0, 0};
#if SPLIT
  share = share_of_rows<512>(p.split, p.parts, (int*)raw, [&](int y) { return tiles_of(Entries(p.list, p.at, y / p.at.T, 0, y % p.at.T).slots); });
  if (share.units <= 0) return;
#endif
#if LATENT
  run_roles_on_bytes(p, raw, base, bars, [&](Ring& ring) { gather(p, raw, base, bars, share, ring); });
#else
  run_roles(p, raw, base, bars, 129, [&] {
    Ring ring = {0, 1, PATIENCE};
    gather(p, raw, base, bars, share, ring);
  });
#endif
}
