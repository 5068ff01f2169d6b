// Keys in the fp8 layout of a latent cache (latents.cuh) for latent_hopper.cuh: of the group that brings tiles each warp has eight rows of every tile. It asks for their bytes
// STAGES tiles ahead, makes elements of them, zeros where a key is not seen, and needs no word from the other warps. Include after `struct Params`, whose q is a map of boxes
// of 32 heads x 9 chunks of 64 columns.
#pragma once
#include "latents.cuh"
#define SLOTS 4
#define HELD 24
#define BRING_REGISTERS 48
#include "latent_hopper.cuh"

// Behind the barriers of the tiles, for each warp: barriers of its stages, what is to be known of their tiles, the bytes of its rows; and a row of zeros for keys that are not seen.
constexpr int STAGES = 2, ROW = LATENT + LATENT / 32 + 128, OWN = 8 * ROW, STAGE_BARS = BARS + 8 * (4 * SLOTS + 1), COMING = (STAGE_BARS + 4 * STAGES * 8 + 15) / 16 * 16;
constexpr int ZEROS = COMING + 4 * STAGES * 16, STAGED = (ZEROS + ROW + 127) / 128 * 128;
#define LOADED(i) (base + STAGE_BARS + 8 * (i))

struct Bytes {
  u32 slot, phase, patience, asked, made;  // the ring of tiles; tiles that were asked for, and those that were made
  int warp;
  bool begins;                             // an item
  __device__ __forceinline__ int stage(u32 n) const { return warp * STAGES + n % STAGES; }
};

// Sixteen bytes of a row are two units of 16 bytes of a chunk: lanes are eight rows by four of them, so that neither reads nor swizzled writes meet in a bank.
__device__ __forceinline__ void convert(unsigned char* to, const unsigned char* row, int lane) {
  const int r = lane & 7, piece = lane / 8;
  const float4 scales = *(const float4*)(row + LATENT);
  const float scale[4] = {scales.x, scales.y, scales.z, scales.w};
  unsigned char *even = to + r * 128 + (2 * piece ^ r) * 16, *odd = to + r * 128 + ((2 * piece + 1) ^ r) * 16;
  const unsigned char* rotary = row + LATENT + LATENT / 32 + piece * 32;
  const uint4 x = *(const uint4*)rotary, y = *(const uint4*)(rotary + 16);
  const u32 eight[8] = {x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w};
  u32 e[8];
#pragma unroll
  for (int i = 0; i < 8; i++) e[i] = KIND == BFLOAT16 ? eight[i] : pack<FLOAT16>(to_float<BFLOAT16>((u16)eight[i]), to_float<BFLOAT16>((u16)(eight[i] >> 16)));
  *(uint4*)(even + 8 * CHUNK) = make_uint4(e[0], e[1], e[2], e[3]);
  *(uint4*)(odd + 8 * CHUNK) = make_uint4(e[4], e[5], e[6], e[7]);
  row += piece * 16;
  uint4 next = *(const uint4*)row;  // a chunk ahead
#pragma unroll
  for (int c = 0; c < 8; c++) {
    const uint4 now = next;
    if (c < 7) next = *(const uint4*)(row + c * 64 + 64);
    const u32 four[4] = {now.x, now.y, now.z, now.w};
#pragma unroll
    for (int i = 0; i < 4; i++) scaled_four<KIND>(four[i], scale[c / 2], e[2 * i], e[2 * i + 1]);
    *(uint4*)(even + c * CHUNK) = make_uint4(e[0], e[1], e[2], e[3]);
    *(uint4*)(odd + c * CHUNK) = make_uint4(e[4], e[5], e[6], e[7]);
  }
}

// The queries of an item, as two tiles of the ring.
__device__ __forceinline__ void bring_queries(const Params& p, u32 base, u32 bars, Bytes& b, int item) {
  const Item x(p, item);
#pragma unroll 1
  for (int half = 0; half < 2; half++) {
    bar_wait(FREE(b.slot), b.phase, b.patience);
    if (threadIdx.x == 0) load_tile(base + b.slot * TILE, &p.q, FULL(b.slot), x.head + half * N, x.t, x.b);
    else if (threadIdx.x % 32 == 0) bar_arrive(FULL(b.slot));
    advance<SLOTS>(b.slot, b.phase);
  }
  b.begins = false;
}

// The oldest tile that was asked for. What it writes is fenced by those who multiply: a fence here would wait for all writes of the group.
__device__ __forceinline__ void make_tile(unsigned char* raw, u32 base, u32 bars, Bytes& b, const Found& found) {
  const int lane = thread_again() & 31, stage = b.stage(b.made);  // again: kept from tile to tile, a lane's places leave the conversion too few registers
  const bool seen = found.word >> (8 * b.warp + (lane & 7)) & 1;
  bar_wait(LOADED(stage), b.made / STAGES & 1, b.patience);
  bar_wait(FREE(b.slot), b.phase, b.patience);
  convert(raw + b.slot * TILE + b.warp * 1024, raw + (seen ? STAGED + stage * OWN + (lane & 7) * ROW : ZEROS), lane);
  if (threadIdx.x == 0) ((Found*)(raw + FOUND))[b.slot] = found;
  __syncwarp();
  if (thread_again() % 32 == 0) bar_arrive(FULL(b.slot));
  advance<SLOTS>(b.slot, b.phase);
  b.made++;
  b.begins = found.left == 0;
}

// Asks for a tile's bytes: load(where this warp's eight rows go, their barrier). Then the oldest tile is made where no stage is left, behind the last tile all are.
template <class Load> __device__ __forceinline__ void ask(const Params& p, unsigned char* raw, u32 base, u32 bars, Bytes& b, const Found& found, const Load& load) {
  const int stage = b.stage(b.asked);
  if (threadIdx.x % 32 == 0) {
    ((Found*)(raw + COMING))[stage] = found;
    bar_expect(LOADED(stage), OWN);
  }
  __syncwarp();
  load(base + STAGED + stage * OWN, LOADED(stage));
  b.asked++;
  const bool last = found.left < 0;
#pragma unroll 1
  do {
    const Found oldest = ((const Found*)(raw + COMING))[b.stage(b.made)];
    if (b.begins) bring_queries(p, base, bars, b, oldest.item);  // the first beside the first keys
    if (last || b.asked - b.made == STAGES) make_tile(raw, base, bars, b, oldest);
  } while (last && b.made != b.asked);
}

template <class Stream> __device__ __forceinline__ void run_roles_on_bytes(const Params& p, unsigned char* raw, u32 base, u32 bars, const Stream& stream) {
  if (threadIdx.x == 0)
    for (int i = 0; i < 4 * STAGES; i++) bar_init(LOADED(i), 1);
  if (threadIdx.x < ROW / 16) ((uint4*)(raw + ZEROS))[threadIdx.x] = make_uint4(0, 0, 0, 0);
  run_roles(p, raw, base, bars, 4, [&] {
    Bytes b = {0, 1, PATIENCE, 0, 0, uniform(threadIdx.x / 32), true};
    stream(b);
  });
}
