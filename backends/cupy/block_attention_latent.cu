// Attention over block lists for few queries with a latent 576 wide whose first 512 columns are the values, by Hopper's own instructions (latent_hopper.cuh): an item is one
// query and up to 64 heads, its keys are split over the chip (split.cuh). The blocks of threads of a row of `parts` take the same share, each for its own 64 heads, so that keys
// come from memory once. One warp loads tiles of 32 keys through the copy engine, and makes zeros where the query does not see the key: 0 * NaN would reach a product.
// Of the fp8 layout (latents.cuh) it loads bytes, which the three warps beside it make elements of: those that multiply have no time to.
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
#define SLOTS 3
#define HELD 24
#define BRING_REGISTERS 48
#endif
#include "latent_hopper.cuh"

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

#if LATENT
// Behind the barriers of the tiles: those of the stages of bytes, what is to be known of each, and the bytes.
constexpr int STAGES = 4, ROW = LATENT + LATENT / 32 + 128, BYTES = N * ROW, STAGE_BARS = BARS + 8 * (4 * SLOTS + 1), COMING = (STAGE_BARS + 16 * STAGES + 15) / 16 * 16, STAGED = (COMING + 16 * STAGES + 127) / 128 * 128;
#define LOADED(s) (base + STAGE_BARS + 8 * (s))
#define EMPTY(s) (base + STAGE_BARS + 8 * (STAGES + (s)))
#endif

__device__ __forceinline__ void load_tile(u32 to, const TensorMap* map, u32 bar, int row, int y, int z) {
  bar_expect(bar, TILE);
  tma_load(to, map, bar, 0, row, 0, y, z);
}

// the first warp
__device__ __forceinline__ void stream(const Params& p, unsigned char* raw, u32 base, u32 bars, Share share) {
  u32 slot = 0, phase = 1, patience = PATIENCE;
  const int part = (int)blockIdx.x % p.parts;
  int scratch = 2 * (blockIdx.x - part) + part;
#if !LATENT
  u32 landed = 0;
#endif
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
      bar_wait(EMPTY(slot), phase, patience);
      if (threadIdx.x == 0) {
        ((Found*)(raw + COMING))[slot] = found;
        bar_expect(LOADED(slot), BYTES);
        bulk_load(base + STAGED + slot * BYTES, p.k + (i64)imax(row, 0) * ROW, BYTES, LOADED(slot));
      }
      advance<STAGES>(slot, phase);
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

#if LATENT
// Sixteen bytes of a row, eight rows at a time, become 16 elements: two units of 16 bytes of a chunk.
__device__ __forceinline__ void convert_chunk(unsigned char* tile, const unsigned char* bytes, int chunk, u32 word, int lane) {
  const int r = lane & 7, piece = lane / 8;
#pragma unroll
  for (int g = 0; g < 4; g++) {
    const bool seen = word >> (8 * g + r) & 1;
    const unsigned char* from = bytes + (8 * g + r) * ROW;
    unsigned char* to = tile + chunk * CHUNK + g * 1024 + r * 128;
    u32 e[8];
    if (chunk < 8) {
      const uint4 x = *(const uint4*)(from + chunk * 64 + piece * 16);
      const float scale = *(const float*)(from + LATENT + chunk / 2 * 4);
      const u32 four[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int i = 0; i < 4; i++) { e[2 * i] = scaled_pair<KIND>(four[i], scale); e[2 * i + 1] = scaled_pair<KIND>(four[i] >> 16, scale); }
    } else {
      const uint4 x = *(const uint4*)(from + LATENT + LATENT / 32 + piece * 32), y = *(const uint4*)(from + LATENT + LATENT / 32 + piece * 32 + 16);
      const u32 eight[8] = {x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w};
#pragma unroll
      for (int i = 0; i < 8; i++) e[i] = KIND == BFLOAT16 ? eight[i] : pack<FLOAT16>(to_float<BFLOAT16>((u16)eight[i]), to_float<BFLOAT16>((u16)(eight[i] >> 16)));
    }
#pragma unroll
    for (int i = 0; i < 8; i++) e[i] = seen ? e[i] : 0;
    *(uint4*)(to + (2 * piece ^ r) * 16) = make_uint4(e[0], e[1], e[2], e[3]);
    *(uint4*)(to + ((2 * piece + 1) ^ r) * 16) = make_uint4(e[4], e[5], e[6], e[7]);
  }
}

// the other three warps of the group: each three chunks of a tile
__device__ __forceinline__ void convert(const Params& p, unsigned char* raw, u32 base, u32 bars) {
  u32 slot = 0, phase = 1, stage = 0, loaded = 0, patience = PATIENCE;
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 - 1;
  bool begins = true;
  for (int left = 0; left >= 0; begins = left == 0) {
    bar_wait(LOADED(stage), loaded, patience);
    const Found found = ((const Found*)(raw + COMING))[stage];
    left = uniform(found.left);
    if (begins) {
      const Item x(p, found.item);
#pragma unroll 1
      for (int half = 0; half < 2; half++) {
        bar_wait(FREE(slot), phase, patience);
        if (threadIdx.x == 32) load_tile(base + slot * TILE, &p.q, FULL(slot), x.head + half * N, x.t, x.b);
        else if (lane == 0) bar_arrive(FULL(slot));
        advance<SLOTS>(slot, phase);
      }
    }
    bar_wait(FREE(slot), phase, patience);
#pragma unroll 1
    for (int chunk = warp; chunk < 9; chunk += 3) convert_chunk(raw + slot * TILE, raw + STAGED + stage * BYTES, chunk, found.word, lane);
    if (threadIdx.x == 32) ((Found*)(raw + FOUND))[slot] = found;
    shared_to_copy_engine();
    __syncwarp();
    if (lane == 0) { bar_arrive(EMPTY(stage)); bar_arrive(FULL(slot)); }
    advance<STAGES>(stage, loaded);
    advance<SLOTS>(slot, phase);
  }
}
#endif

extern "C" __global__ void __launch_bounds__(512, 1) attend_latent(const __grid_constant__ Params p) {
  SWIZZLED_SHARED(raw);
  const u32 base = shared_address(raw), bars = base + BARS;
  const Share share = share_of_rows<512>(p.split, p.parts, (int*)raw, [&](int job) { return Job(p, job).run.n; });
  if (share.units <= 0) return;
#if LATENT
  if (threadIdx.x == 0)
    for (int s = 0; s < STAGES; s++) { bar_init(LOADED(s), 1); bar_init(EMPTY(s), 3); }
  run_roles(p, raw, base, bars, 3, [&] {
    if (threadIdx.x < 32) stream(p, raw, base, bars, share);
    else convert(p, raw, base, bars);
  });
#else
  run_roles(p, raw, base, bars, 1, [&] { if (threadIdx.x < 32) stream(p, raw, base, bars, share); });
#endif
}
