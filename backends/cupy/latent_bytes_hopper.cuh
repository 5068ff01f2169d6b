// Keys in the fp8 layout of a latent cache (latents.cuh) for latent_hopper.cuh: of the group that brings tiles one warp brings bytes into stages, the three beside it make
// elements of them, zeros where a key is not seen, and bring the queries. Include after `struct Params`, whose q is a map of boxes of 32 heads x 9 chunks of 64 columns.
#pragma once
#include "latents.cuh"
#define SLOTS 3
#define HELD 24
#define BRING_REGISTERS 48
#include "latent_hopper.cuh"

// Behind the barriers of the tiles: those of the stages of bytes, what is to be known of each, and the bytes.
constexpr int STAGES = 4, ROW = LATENT + LATENT / 32 + 128, BYTES = N * ROW, STAGE_BARS = BARS + 8 * (4 * SLOTS + 1), COMING = (STAGE_BARS + 16 * STAGES + 15) / 16 * 16, STAGED = (COMING + 16 * STAGES + 127) / 128 * 128;
#define LOADED(s) (base + STAGE_BARS + 8 * (s))
#define EMPTY(s) (base + STAGE_BARS + 8 * (STAGES + (s)))

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

template <class Stream> __device__ __forceinline__ void run_roles_on_bytes(const Params& p, unsigned char* raw, u32 base, u32 bars, const Stream& stream) {
  if (threadIdx.x == 0)
    for (int s = 0; s < STAGES; s++) { bar_init(LOADED(s), 1); bar_init(EMPTY(s), 3); }
  run_roles(p, raw, base, bars, 3, [&] {
    if (threadIdx.x < 32) stream();
    else convert(p, raw, base, bars);
  });
}
