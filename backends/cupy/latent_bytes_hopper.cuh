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
constexpr int STAGES = 2, AHEAD = PAIR * STAGES, ROW = LATENT + LATENT / 32 + 128, OWN = 8 * ROW, STAGE_BARS = BARS + 8 * (4 * SLOTS + 1), COMING = (STAGE_BARS + 4 * STAGES * 8 + 15) / 16 * 16;
constexpr int ZEROS = COMING + 4 * AHEAD * 16, STAGED = (ZEROS + ROW + 127) / 128 * 128;
#define LOADED(i) (base + STAGE_BARS + 8 * (i))

struct Bytes {
  u32 slot, phase, patience, asked, made;  // the ring of tiles; tiles that were asked for, and those that were made
  int warp, rank;
  bool begins;                             // an item
  __device__ __forceinline__ int known(u32 n) const { return warp * AHEAD + n % AHEAD; }
  __device__ __forceinline__ int stage(u32 n) const { return warp * STAGES + n / PAIR % STAGES; }
  __device__ __forceinline__ bool own(u32 n) const { return PAIR == 1 || n % PAIR == rank; }
};

__device__ __forceinline__ void put(unsigned char* to, u32 a, u32 b, u32 c, u32 d, u32 beyond, u32 full) {
  *(uint4*)to = make_uint4(a, b, c, d);
#if PAIR > 1
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" :: "r"(beyond), "r"(a), "r"(b), "r"(c), "r"(d), "r"(full) : "memory");
#endif
}

// Sixteen bytes of a row are two units of 16 bytes of a chunk: lanes are eight rows by four of them, so that neither reads nor swizzled writes meet in a bank.
// In a pair they go to the other block as well, whose barrier `full` counts the bytes.
__device__ __forceinline__ void convert(unsigned char* to, const unsigned char* row, int lane, u32 beyond, u32 full) {
  const int r = lane & 7, piece = lane / 8;
  const float4 scales = *(const float4*)(row + LATENT);
  const float scale[4] = {scales.x, scales.y, scales.z, scales.w};
  const int even = r * 128 + (2 * piece ^ r) * 16, odd = r * 128 + ((2 * piece + 1) ^ r) * 16;
  row += piece * 16;
  uint4 next = *(const uint4*)row;  // a chunk ahead
#pragma unroll
  for (int c = 0; c < 8; c++) {
    const uint4 x = next;
    if (c < 7) next = *(const uint4*)(row + c * 64 + 64);
    const u32 four[4] = {x.x, x.y, x.z, x.w};
    u32 e[8];
#pragma unroll
    for (int i = 0; i < 4; i++) scaled_four<KIND>(four[i], scale[c / 2], e[2 * i], e[2 * i + 1]);
    put(to + even + c * CHUNK, e[0], e[1], e[2], e[3], beyond + even + c * CHUNK, full);
    put(to + odd + c * CHUNK, e[4], e[5], e[6], e[7], beyond + odd + c * CHUNK, full);
  }
  row += LATENT + LATENT / 32 + piece * 16;
  const uint4 x = *(const uint4*)row, y = *(const uint4*)(row + 16);
  const u32 eight[8] = {x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w};
  u32 e[8];
#pragma unroll
  for (int i = 0; i < 8; i++) e[i] = KIND == BFLOAT16 ? eight[i] : pack<FLOAT16>(to_float<BFLOAT16>((u16)eight[i]), to_float<BFLOAT16>((u16)(eight[i] >> 16)));
  put(to + even + 8 * CHUNK, e[0], e[1], e[2], e[3], beyond + even + 8 * CHUNK, full);
  put(to + odd + 8 * CHUNK, e[4], e[5], e[6], e[7], beyond + odd + 8 * CHUNK, full);
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

// The oldest tile that was asked for.
__device__ __forceinline__ void make_tile(unsigned char* raw, u32 base, u32 bars, Bytes& b, const Found& found) {
  const int lane = threadIdx.x & 31, stage = b.stage(b.made);
  const bool own = b.own(b.made), seen = found.word >> (8 * b.warp + (lane & 7)) & 1;
  if (own) bar_wait(LOADED(stage), b.made / AHEAD & 1, b.patience);
  bar_wait(FREE(b.slot), b.phase, b.patience);
  if (own) {
    const u32 at = b.slot * TILE + b.warp * 1024;
#if PAIR > 1
    const u32 beyond = peer(base + at), full = peer(FULL(b.slot));
#else
    const u32 beyond = 0, full = 0;
#endif
    convert(raw + at, raw + (seen ? STAGED + stage * OWN + (lane & 7) * ROW : ZEROS), lane, beyond, full);
  }
  if (threadIdx.x == 0) ((Found*)(raw + FOUND))[b.slot] = found;
  shared_to_copy_engine();
  __syncwarp();
  if (!own && threadIdx.x == 0) bar_expect(FULL(b.slot), TILE);
  else if (lane == 0) bar_arrive(FULL(b.slot));
  advance<SLOTS>(b.slot, b.phase);
  b.made++;
  b.begins = found.left == 0;
}

// Asks for a tile's bytes: load(where this warp's eight rows go, their barrier) for `bytes` of them. Then the oldest tile is made where no stage is left, behind the last tile all are.
template <class Load> __device__ __forceinline__ void ask(const Params& p, unsigned char* raw, u32 base, u32 bars, Bytes& b, const Found& found, int bytes, const Load& load) {
  const int stage = b.stage(b.asked);
  const bool own = b.own(b.asked);
  if (threadIdx.x % 32 == 0) {
    ((Found*)(raw + COMING))[b.known(b.asked)] = found;
    if (own) bar_expect(LOADED(stage), bytes);
  }
  __syncwarp();
  if (own) load(base + STAGED + stage * OWN, LOADED(stage));
  b.asked++;
  const bool last = found.left < 0;
#pragma unroll 1
  do {
    const Found oldest = ((const Found*)(raw + COMING))[b.known(b.made)];
    if (b.begins) bring_queries(p, base, bars, b, oldest.item);  // the first beside the first keys
    if (last || b.asked - b.made == AHEAD) make_tile(raw, base, bars, b, oldest);
  } while (last && b.made != b.asked);
}

template <class Stream> __device__ __forceinline__ void run_roles_on_bytes(const Params& p, unsigned char* raw, u32 base, u32 bars, const Stream& stream) {
  if (threadIdx.x == 0)
    for (int i = 0; i < 4 * STAGES; i++) bar_init(LOADED(i), 1);
  if (threadIdx.x < ROW / 16) ((uint4*)(raw + ZEROS))[threadIdx.x] = make_uint4(0, 0, 0, 0);
  run_roles(p, raw, base, bars, 4, [&] {
    Bytes b = {0, 1, PATIENCE, 0, 0, uniform(threadIdx.x / 32), (int)blockIdx.x % PAIR, true};
    stream(b);
  });
}
