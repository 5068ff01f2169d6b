// Attention over block lists for few queries with a latent 576 wide whose first 512 columns are the values, by Hopper's own instructions (latent_hopper.cuh): an item is one
// query and up to 64 heads, its keys are split over the chip (split.cuh). The blocks of threads of a row of `parts` take the same share, each for its own 64 heads, so that keys
// come from memory once. One warp loads tiles of 32 keys through the copy engine, and makes zeros where the query does not see the key: 0 * NaN would reach a product.
// Of the fp8 layout (latents.cuh) the group's four warps load the bytes of eight keys each and make elements of them: those that multiply have no time to.
// Defines: KIND, BQ, BK (blocks of the lists), PAGE (pages.cuh; a multiple of 32, so that a page holds all keys of a tile), LATENT (0, or 512: the fp8 layout, behind pages only).
#include "hopper.cuh"
#include "latents.cuh"
#include "split.cuh"

struct Params {
  TensorMap q;  // boxes of 32 rows (heads; keys) x 9 chunks of 64 columns: one copy a tile
#if LATENT
  const u8* k;
#else
  TensorMap k;
#endif
  void* out;
  float* lse;
  const float* sink;
  ListArrays lists;
  Positions at;
  Split split;
  int Hq, parts;
  float scale, scale2;
#if PAGE
  Pages pages;
#endif
};
#if LATENT
#include "latent_bytes_hopper.cuh"
#else
#define SLOTS 5  // six are 1-2 % slower
#include "latent_hopper.cuh"
#endif

struct Job {
  Run run;
  int b, t, row;  // row: of the query in its tile of the lists
  __device__ __forceinline__ Job(const Params& p, int job) {
    b = job / p.at.T;
    t = job - b * p.at.T;
    const i64 position = (i64)first_position(p.at, b) + t;
    const i64 tile = position >= 0 ? position / BQ : -1 - (-1 - position) / BQ;
    row = (int)(position - tile * BQ);
    run = open_run<BK>(p.lists, __ldg(p.lists.list_of + b * p.lists.list_b), tile - p.lists.first, key_limit(p.at, b));
  }
};

// the first warp; on bytes each warp of the group
#if LATENT
__device__ __forceinline__ void stream(const Params& p, unsigned char* raw, u32 base, u32 bars, Share share, Bytes& bytes) {
#else
__device__ __forceinline__ void stream(const Params& p, unsigned char* raw, u32 base, u32 bars, Share share) {
  u32 slot = 0, phase = 1, patience = PATIENCE, landed = 0;
#endif
  const int part = (int)blockIdx.x % p.parts;
  int scratch = 2 * (blockIdx.x - part) + part;
  for (; share.units > 0; scratch = 2 * (blockIdx.x - part) + p.parts + part, share.job++, share.at = 0) {
    const Job job(p, share.job);
    const int take = imin(share.units, job.run.n - share.at);
    if (take == 0) continue;
    share.units -= take;
#if !LATENT
#pragma unroll 1
    for (int half = 0; half < 2; half++) {
      bar_wait(FREE(slot), phase, patience);
      if (threadIdx.x == 0) load_tile(base + slot * TILE, &p.q, FULL(slot), part * BH + half * N, job.t, job.b);
      advance<SLOTS>(slot, phase);
    }
#endif
#pragma unroll 1
    for (int i = 0; i < take * (BK / N); i++) {
      const int x = share.at + i / (BK / N), e = job.run.entry(x), c = i % (BK / N) * N, key = __ldg(p.lists.cols + e) * BK + c;
#if PAGE
      const int row = (int)p.pages.row(job.b, key < job.run.limit ? key : -1);
      const bool masked = row < 0 || x >= job.run.plain;
#else
      const bool masked = x >= job.run.plain;
#endif
      u32 word = ~0u;
      if (masked) word = kind_word<BQ, BK>(p.lists, x < job.run.full ? -1 : __ldg(p.lists.kinds + e), job.row, c) & range_bits(0, job.run.limit - key);
#if PAGE
      if (row < 0) word = 0;
#endif
      const int left = take * (BK / N) - 1 - i;
      const Found found = {word, left || share.units ? left : -1, share.job * p.parts + part, take == job.run.n ? -1 : scratch};
#if LATENT
      ask(p, raw, base, bars, bytes, found, [&](u32 to, u32 loaded) {
        warp_bulk_load(to, p.k + ((i64)imax(row, 0) + 8 * bytes.warp) * ROW, OWN, loaded);
      });
#else
      bar_wait(FREE(slot), phase, patience);
      if (threadIdx.x == 0) {
        ((Found*)(raw + FOUND))[slot] = found;
#if PAGE
        load_tile(base + slot * TILE, &p.k, masked ? LANDED : FULL(slot), imax(row, 0), 0, 0);
#else
        load_tile(base + slot * TILE, &p.k, masked ? LANDED : FULL(slot), key, 0, job.b);
#endif
      }
      if (masked) {
        bar_wait(LANDED, landed, patience);
        landed ^= 1;
#pragma unroll 1
        for (u32 holes = ~word; holes; holes &= holes - 1) {
          unsigned char* to = raw + slot * TILE + (__ffs(holes) - 1) * 128;
#pragma unroll 1
          for (int n = threadIdx.x; n < 72; n += 32) *(uint4*)(to + n / 8 * CHUNK + n % 8 * 16) = make_uint4(0, 0, 0, 0);
        }
        shared_to_copy_engine();
        __syncwarp();
        if (threadIdx.x == 0) bar_arrive(FULL(slot));
      }
      advance<SLOTS>(slot, phase);
#endif
    }
  }
}

extern "C" __global__ void __launch_bounds__(512, 1) attend_latent(const __grid_constant__ Params p) {
  SWIZZLED_SHARED(raw);
  const u32 base = shared_address(raw), bars = base + BARS;
  const Share share = share_of_rows<512>(p.split, p.parts, (int*)raw, [&](int job) { return Job(p, job).run.n; });
  if (share.units <= 0) return;
#if LATENT
  run_roles_on_bytes(p, raw, base, bars, [&](Bytes& bytes) { stream(p, raw, base, bars, share, bytes); });
#else
  run_roles(p, raw, base, bars, 1, [&] { if (threadIdx.x < 32) stream(p, raw, base, bars, share); });
#endif
}
