// Attention with a latent 576 wide whose first 512 columns are the values (DeepSeek's), up to 64 heads of one query an item, by warpgroup products: what the kernels
// over selections (gather_attention_hopper.cu) and over block lists (block_attention_latent.cu) share. They differ in who brings a tile's 32 keys.
//
// Persistent, four warpgroups: one brings tiles of 32 keys into a ring, one makes scores and probabilities with most of the query's 36 k-steps in registers, two hold
// 64 x 256 sums of values each. The query itself arrives as two more tiles of the ring, and the probabilities of a tile overwrite its last 64 columns, which no value needs.
// Keys that nobody sees are zeros in the tile and -inf in the scores. The order of waits is the speed: values of tile i are multiplied while the probabilities of tile
// i + 1 are made, not beside its scores. Include after `struct Params` (out, lse, sink, at, split, Hq, parts, scale, scale2).
#pragma once
#include "wgmma.cuh"
#include "rounded.cuh"
#include "split.cuh"

#ifndef SLOTS
#define SLOTS 6             // tiles in shared memory
#endif
#ifndef HELD
#define HELD 31             // k-steps of the query in registers: 31, or whole chunks of four
#define BRING_REGISTERS 24  // of a thread of the group that brings tiles
#endif
#ifndef EARLY
#define EARLY 1  // values of a tile start when all products of the next one's scores are asked for; 0: when all but four have ended
#endif
#ifndef PAIR
#define PAIR 1  // 2: the blocks of threads of a cluster go through the same tiles for different heads, and each makes every other tile for both
#endif
constexpr int BH = 64, N = 32, CHUNK = N * 128, TILE = 9 * CHUNK, LEFT = HELD == 31 ? 8 : HELD / 4;  // from chunk LEFT on the query stays in shared memory
constexpr int QUERY = SLOTS * TILE, STEP31 = QUERY + (9 - LEFT) * BH * 128, FACTORS = STEP31 + (HELD == 31) * BH * 32, INVERSE = FACTORS + BH * 4, FOUND = INVERSE + BH * 4, MOVED = FOUND + SLOTS * 16, BARS = (MOVED + SLOTS * 4 + 7) / 8 * 8;
constexpr float LOWEST = -3.4028235e38f, LAZY = 8.f;  // the reference of a row moves to its maximum when that has grown by 2^8: nothing is rescaled otherwise
constexpr float WIDE = 1024.f;                        // from here on a fused product is too far from its rounded twin: the largest has to give 1 in 16 bits
#define FULL(s) (bars + 8 * (s))
#define FREE(s) (bars + 8 * (SLOTS + (s)))
#define READY(s) (bars + 8 * (2 * SLOTS + (s)))
#define START(s) (bars + 8 * (3 * SLOTS + (s)))
#define LANDED (bars + 8 * 4 * SLOTS)  // block lists: a tile with a mask, not yet cleared

#if PAIR == 1
__device__ __forceinline__ void free_slot(u32 bar) { bar_arrive(bar); }
__device__ __forceinline__ void sync_blocks() { __syncthreads(); }
#else
__device__ __forceinline__ u32 peer(u32 at) {  // the same place in the other block
  u32 there;
  asm("{.reg .u32 r; mov.u32 r, %%cluster_ctarank; xor.b32 r, r, 1; mapa.shared::cluster.u32 %0, %1, r;}" : "=r"(there) : "r"(at));
  return there;
}
__device__ __forceinline__ void free_slot(u32 bar) {
  bar_arrive(bar);
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" :: "r"(peer(bar)) : "memory");
}
__device__ __forceinline__ void sync_blocks() { asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
#endif

struct Found { u32 word; int left, item, slot; };  // which of a tile's 32 keys are seen; how many tiles of the item follow, -1: no tile at all; the item; its slot of scratch, or -1: it is whole

struct Item {
  int head, rows, t, b;  // head: the first of `rows`
  __device__ __forceinline__ Item(const Params& p, int x) {
    const int y = x / p.parts;
    head = (x - y * p.parts) * BH;
    rows = imin(p.Hq - head, BH);
    b = y / p.at.T;
    t = y - b * p.at.T;
  }
};

// Through a map of boxes of 32 rows x 9 chunks of 64 columns
__device__ __forceinline__ void load_tile(u32 to, const TensorMap* map, u32 bar, int row, int y, int z) {
  bar_expect(bar, TILE);
  tma_load(to, map, bar, 0, row, 0, y, z);
}

// Of two rows, those of a lane: the largest product so far (this lane's keys), the reference m of the sums (powers of two), and the sums (this lane's keys).
struct Rows { float top[2], m[2], sum[2]; bool wide; };

__device__ __forceinline__ void raise_tops(const float (&s)[16], const Rows& r, float (&top)[2]) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    top[h] = r.top[h];
#pragma unroll
    for (int j = 0; j < 4; j++) top[h] = fmaxf(top[h], fmaxf(s[4 * j + 2 * h], s[4 * j + 2 * h + 1]));
  }
}
__device__ __forceinline__ bool outgrown(const Rows& r, const float (&top)[2], float scale2) {
  return __any_sync(~0u, fmaf(top[0], scale2, -LAZY) > r.m[0] || fmaf(top[1], scale2, -LAZY) > r.m[1]);
}

// Products of a tile become probabilities relative to 2^m; `seen`: its keys. Whether a reference of this warp's rows moved: then `factor` is for what was summed before.
// Where one key of a row decides, ahead of m by less than 2^8, its probability is rounded for the product; its sum follows at the end (with_rounded).
// Everything rare stands behind one branch: this is the longest chain of a tile, and each branch costs it 1-3 %, taken or not.
template <class Tell> __device__ __forceinline__ bool probabilities(float (&s)[16], Rows& r, u32 seen, float scale2, const Tell& tell) {
  float top[2], unit = scale2;
  bool moved = false;
  raise_tops(s, r, top);  // of keys that are not seen, too: those are zeros, which may only take us there for nothing
  if (outgrown(r, top, scale2) || seen != ~0u || r.wide) {
    const u32 word = seen >> 2 * (thread_again() & 3);
#pragma unroll
    for (int i = 0; i < 16; i++) if (!(word >> (i / 4 * 8 + (i & 1)) & 1)) s[i] = -inf();
    raise_tops(s, r, top);
    moved = outgrown(r, top, scale2);
    if (moved) {
      float factor[2] = {1.f, 1.f};
#pragma unroll
      for (int h = 0; h < 2; h++) {
        top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 1));
        top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 2));
        const float m = __fmul_rn(top[h], scale2);
        if (m > r.m[h]) {
          factor[h] = ex2(r.m[h] - m);
          r.m[h] = m;
          r.sum[h] *= factor[h];
        }
      }
      r.wide = __any_sync(~0u, fabsf(r.m[0]) > WIDE || fabsf(r.m[1]) > WIDE);
      tell(factor);
    }
    if (r.wide) {  // a fused product would not give the largest its own reference back
      unit = 1.f;
#pragma unroll
      for (int i = 0; i < 16; i++) s[i] = __fmul_rn(s[i], scale2);
    }
  }
  r.top[0] = top[0]; r.top[1] = top[1];
#pragma unroll
  for (int i = 0; i < 16; i++) {
    s[i] = ex2(fmaf(s[i], unit, -r.m[i / 2 % 2]));
    r.sum[i / 2 % 2] += s[i];
  }
  return moved;
}

// A row at the end: sums relative to 2^m become sums relative to the row's largest score, in natural units and rounded once as the backward rounds it: where one
// key decides, its score is the lse, however large. A share's part of an item leaves that score and the sum.
__device__ __forceinline__ void finish(const Params& p, unsigned char* raw, const Item& x, int slot, int row, float top, float m, float sum, bool wide) {
#pragma unroll
  for (int lanes = 1; lanes < 4; lanes *= 2) {
    sum += __shfl_xor_sync(~0u, sum, lanes);
    top = fmaxf(top, __shfl_xor_sync(~0u, top, lanes));
  }
  const bool empty = top == -inf() && sum == 0.f;
  const float ahead = wide ? __fmul_rn(top, p.scale2) - m : fmaf(top, p.scale2, -m), largest = __fmul_rn(top, p.scale), unit = ex2(-ahead), total = sum * unit;
  const float rounded = with_rounded<KIND>(sum, ex2(ahead));  // ex2(ahead): as it was multiplied, for the reference of the largest is the last
  if (threadIdx.x % 4) return;
  if (slot >= 0) {
    ((float*)(raw + INVERSE))[row] = empty ? 0.f : total / rounded;
    *(float2*)(p.split.rows + 2 * ((i64)slot * BH + row)) = make_float2(empty ? -inf() : largest, empty ? 0.f : total);
    return;
  }
  const float sink = p.sink && row < x.rows ? ex2((__ldg(p.sink + x.head + row) - largest) * LOG2E) : 0.f;
  ((float*)(raw + INVERSE))[row] = empty ? 0.f : total / ((total + sink) * rounded);
  if (p.lse && row < x.rows) p.lse[((i64)x.b * p.Hq + x.head + row) * p.at.T + x.t] = empty ? -inf() : largest + logf(total);
}

// By one thread of the group. Where the copy engine brings the tiles, EARLY: waiting costs 3 %; but nine products earlier both are slowed down by a quarter. Where threads gather
// rows of 16 bits EARLY costs 10 %, and waiting for the last four products 1 %; where they convert bytes it makes no difference. Predicated inside, so that ptxas sees no divergent branch between products.
__device__ __forceinline__ void start_values(u32 bar, bool doit) {
#ifdef SPARSETILE_EMULATE
  if (doit && threadIdx.x % 128 == 0) bar_arrive(bar);
#else
  asm volatile("{.reg .pred p; setp.ne.b32 p, %1, 0; @p mbarrier.arrive.shared::cta.b64 _, [%0];}" :: "r"(bar), "r"((int)(doit && thread_again() % 128 == 0)) : "memory");
#endif
}

__device__ __forceinline__ void scores(const Params& p, unsigned char* raw, u32 base, u32 bars) {
  const u64 query = descriptor(base + QUERY), step31 = descriptor_of(base + STEP31, 16, 256, SWIZZLE_32);
  u32 q[HELD][4], slot = 0, phase = 0, patience = PATIENCE;
  float s[16];
  for (int left = 0; left >= 0;) {
    {
      const int tid = thread_again() % 128, lane = tid & 31, r = (tid / 32 & 1) * 16 + (lane & 15), r2 = tid / 2;
      const u32 low = slot;
      bar_wait(FULL(slot), phase, patience);
      advance<SLOTS>(slot, phase);
      bar_wait(FULL(slot), phase, patience);
      const u32 tile = (tid < 64 ? low : slot) * TILE;
#pragma unroll
      for (int k = 0; k < HELD; k++) ldmatrix_at(q[k], base + tile + r * 128 + (k >> 2) * CHUNK + (((2 * (k & 3) + (lane >> 4)) ^ (r & 7)) << 4));
#pragma unroll
      for (int j = 0; j < 4 * (9 - LEFT); j++) *(uint4*)(raw + QUERY + j / 4 * 2 * CHUNK + tid / 64 * CHUNK + tid % 64 * 16 + j % 4 * 1024) = *(const uint4*)(raw + tile + LEFT * CHUNK + tid % 64 * 16 + j * 1024);
      if (HELD == 31) *(uint4*)(raw + STEP31 + r2 * 32 + ((tid & 1) ^ (r2 / 4 & 1)) * 16) = *(const uint4*)(raw + tile + 7 * CHUNK + r2 % 32 * 128 + ((6 + (tid & 1)) ^ (r2 & 7)) * 16);
      shared_to_copy_engine();
      named_sync(1, 128);
      bar_arrive(READY(low)); bar_arrive(READY(slot));
      if (tid == 0) { bar_arrive(START(low)); bar_arrive(START(slot)); }
      advance<SLOTS>(slot, phase);
    }
    Rows rows = {{-inf(), -inf()}, {LOWEST, LOWEST}, {0.f, 0.f}, false};
    bool first = true;
    do {
      const u32 before = slot == 0 ? SLOTS - 1 : slot - 1;
      const u64 keys = descriptor(base + slot * TILE);
      bar_wait(FULL(slot), phase, patience);
      const Found found = ((const Found*)(raw + FOUND))[slot];
      shared_to_copy_engine();
      if (!first) bar_arrive(READY(before));  // of the tile before: the fence serves both
      hold(s); wgmma_fence();
#pragma unroll
      for (int k = 0; k < 36; k++) {
        const u64 b = keys + (k & 3) * 2 + (k >> 2) * (CHUNK >> 4);
        if (!EARLY && k == 32) wgmma_commit();
        if (k < HELD) wgmma<KIND, K_MAJOR>(s, q[k], b, k != 0);
        else wgmma<KIND, K_MAJOR>(s, k < 4 * LEFT ? step31 : query + (k & 3) * 2 + ((k >> 2) - LEFT) * (2 * CHUNK >> 4), b, 1);
      }
      wgmma_commit();
      if (!EARLY) wgmma_wait<1>();
      start_values(START(before), !first);
      wgmma_wait<0>(); hold(s);
      const int tid = thread_again() % 128, lane = tid & 31, r = tid / 32 * 16 + lane / 4;  // read again each time: no address may live through the products
      left = uniform(found.left);
      if (lane == 0) raw[MOVED + slot * 4 + tid / 32] = 0;
      const bool moved = probabilities(s, rows, found.word, p.scale2, [&](const float (&factor)[2]) {
        if (first) return;
        bar_wait(FREE(before), slot == 0 ? phase ^ 1 : phase, patience);  // the factors before these have been applied
        if ((lane & 3) == 0) { ((float*)(raw + FACTORS))[r] = factor[0]; ((float*)(raw + FACTORS))[r + 8] = factor[1]; }
        if (lane == 0) raw[MOVED + slot * 4 + tid / 32] = 1;
      }) && !first;
      const u32 r16 = tid / 32 * 16 + (lane & 15), to = base + slot * TILE + 8 * CHUNK + r16 * 64;
#pragma unroll
      for (int j = 0; j < 2; j++)
        stmatrix_at(to + (((2 * j + (lane >> 4)) ^ (r16 >> 1 & 3)) << 4), pack<KIND>(s[8 * j], s[8 * j + 1]), pack<KIND>(s[8 * j + 2], s[8 * j + 3]),
                    pack<KIND>(s[8 * j + 4], s[8 * j + 5]), pack<KIND>(s[8 * j + 6], s[8 * j + 7]));
      if (left <= 0) {
        const Item x(p, found.item);
        if (!moved) bar_wait(FREE(before), slot == 0 ? phase ^ 1 : phase, patience);  // the item before has been stored: a short one may have followed it closely
#pragma unroll
        for (int h = 0; h < 2; h++) finish(p, raw, x, found.slot, r + 8 * h, rows.top[h], rows.m[h], rows.sum[h], rows.wide);
        shared_to_copy_engine();
        bar_arrive(READY(slot));
        if (tid == 0) bar_arrive(START(slot));
      }
      first = false;
      advance<SLOTS>(slot, phase);
    } while (left > 0);
  }
}

// A share's sums, as they are held.
__device__ __forceinline__ void store_part(const Params& p, unsigned char* raw, const float (&o)[2][64], int slot, int half, int tid) {
  const int lane = tid & 31, row = tid / 32 * 16 + lane / 4;
  const float f0 = ((const float*)(raw + INVERSE))[row], f1 = ((const float*)(raw + INVERSE))[row + 8];
  float* to = p.split.sums + ((i64)slot * BH + row) * 512 + half * 256 + 2 * (lane & 3);
#pragma unroll
  for (int e = 0; e < 2; e++)
#pragma unroll
    for (int j = 0; j < 16; j++) {
      const float* y = &o[e][4 * j];
      *(float2*)(to + e * 128 + 8 * j) = make_float2(y[0] * f0, y[1] * f0);
      *(float2*)(to + 8 * 512 + e * 128 + 8 * j) = make_float2(y[2] * f1, y[3] * f1);
    }
}

// Sums out through this group's half of the item's last tile, warp by warp: rows of 256 bytes, coalesced.
__device__ __forceinline__ void store(const Params& p, unsigned char* raw, u32 base, const float (&o)[2][64], const Item& x, u32 slot, int half, int tid) {
  const int lane = tid & 31, first = tid / 32 * 16, r16 = first + (lane & 15);
  const float f0 = ((const float*)(raw + INVERSE))[first + lane / 4], f1 = ((const float*)(raw + INVERSE))[first + lane / 4 + 8];
  const u32 staged = slot * TILE + half * 4 * CHUNK;
  named_sync(2 + half, 128);
#pragma unroll
  for (int e = 0; e < 2; e++) {
    char* out = (char*)p.out + ((((i64)x.b * p.Hq + x.head + first + lane / 16) * p.at.T + x.t) * 512 + half * 256 + e * 128 + lane % 16 * 8) * 2;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const float* y = &o[e][8 * j];
      stmatrix_at(base + staged + r16 * 256 + (((2 * j + (lane >> 4)) ^ (r16 & 7)) << 4), pack<KIND>(y[0] * f0, y[1] * f0), pack<KIND>(y[2] * f1, y[3] * f1),
                  pack<KIND>(y[4] * f0, y[5] * f0), pack<KIND>(y[6] * f1, y[7] * f1));
    }
    __syncwarp();
#pragma unroll 1
    for (int n = 0; n < 8; n += 4) {
      uint4 line[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = first + lane / 16 + 2 * (n + i);
        line[i] = *(const uint4*)(raw + staged + row * 256 + ((lane & 15) ^ (row & 7)) * 16);
      }
#pragma unroll
      for (int i = 0; i < 4; i++, out += (i64)p.at.T * 2048)
        if (first + lane / 16 + 2 * (n + i) < x.rows) *(uint4*)out = line[i];
    }
    __syncwarp();
  }
}

__device__ __forceinline__ void values(const Params& p, unsigned char* raw, u32 base, u32 bars, int half) {
  const int tid = threadIdx.x % 128, lane = tid & 31, r = tid / 32 * 16 + lane / 4;
  u32 slot = 0, phase = 0, patience = PATIENCE;
  float o[2][64];  // two products of 128 columns: ptxas takes none of 256 where the entry has 128 registers
  for (int left = 0; left >= 0;) {
    for (int t = 0; t < 2; t++) {  // the query's tiles pass by
      bar_wait(READY(slot), phase, patience);
      if (lane == 0) free_slot(FREE(slot));
      advance<SLOTS>(slot, phase);
    }
    bool first = true;
    do {
      bar_wait(READY(slot), phase, patience);
      left = uniform(((const Found*)(raw + FOUND))[slot].left);
      if (raw[MOVED + slot * 4 + tid / 32]) {
        const float f0 = ((const float*)(raw + FACTORS))[r], f1 = ((const float*)(raw + FACTORS))[r + 8];
#pragma unroll
        for (int i = 0; i < 128; i++) o[i / 64][i % 64] *= i & 2 ? f1 : f0;
      }
      bar_wait(START(slot), phase, patience);
      const u64 a = descriptor_of(base + slot * TILE + 8 * CHUNK, 16, 512, SWIZZLE_64), b = descriptor_of(base + slot * TILE + half * 4 * CHUNK, CHUNK, 1024, SWIZZLE_128);
      hold(o[0]); hold(o[1]); wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; k++) wgmma<KIND, N_MAJOR>(o[k & 1], a + (k >> 1) * 2, b + (k >> 1) * 128 + (k & 1) * 2 * (CHUNK >> 4), !first || k > 1);
      wgmma_commit(); wgmma_wait<0>(); hold(o[0]); hold(o[1]);
      if (left <= 0) {
        const Found last = ((const Found*)(raw + FOUND))[slot];
        const Item x(p, last.item);
        if (last.slot < 0) store(p, raw, base, o, x, slot, half, tid);
        else if (tid / 32 * 16 < x.rows) store_part(p, raw, o, last.slot, half, tid);  // a warp has 16 rows
        shared_to_copy_engine();  // which may write this tile next
      }
      if (lane == 0) free_slot(FREE(slot));
      first = false;
      advance<SLOTS>(slot, phase);
    } while (left > 0);
  }
}

// The last arguments of a role: of how many threads FULL counts arrivals, and who brings the tiles
template <class Bring> __device__ __forceinline__ void run_roles(const Params& p, unsigned char* raw, u32 base, u32 bars, int bringers, const Bring& bring) {
  const int group = uniform(threadIdx.x / 128);
  if (threadIdx.x == 0) {
    for (int s = 0; s < SLOTS; s++) { bar_init(FULL(s), bringers); bar_init(FREE(s), 8 * PAIR); bar_init(READY(s), 128); bar_init(START(s), 1); }
    bar_init(LANDED, 1);
    bar_fence();
  }
  sync_blocks();
  if (group == 0) {
    fewer_registers<BRING_REGISTERS>();
    bring();
  } else if (group == 1) {
    more_registers<192 - BRING_REGISTERS>();
    scores(p, raw, base, bars);
  } else {
    more_registers<160>();
    values(p, raw, base, bars, group - 2);
  }
  if (PAIR > 1) sync_blocks();  // nobody leaves while the other may write to it
}
