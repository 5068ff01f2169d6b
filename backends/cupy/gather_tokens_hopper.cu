// Attention over selected keys for few heads, by Hopper's own instructions: keys of width 576 whose first 512 columns are the values (DeepSeek's latent), float16 and
// bfloat16. Tokens are the rows of both products, heads their columns, so that HEADS = 8, 16 or 32 are not padded to 64:
//   S^T [64 tokens, HEADS] = K Q^T        O^T [512, HEADS] += V^T P^T
//
// Persistent, three warpgroups: one gathers tiles of 32 tokens into a ring, one makes scores and probabilities of two tiles at a time, one holds the sums. A tile stands as
// groups of 8 tokens with all their columns (9 chunks of 8 x 128 bytes), so that two tiles in neighbouring slots are 64 rows of one operand. Where only one tile is
// there (the last slot of the ring, the last tile of a query), the other 32 rows are whatever its neighbour holds, and masked. The query arrives as a tile of the ring and
// stands beside it from then on; probabilities overwrite the last 64 columns of their own tile, which no value needs.
#include "selections.cuh"
#include "wgmma.cuh"

#ifndef KIND
#define KIND BFLOAT16
#endif
#ifndef HEADS
#define HEADS 16
#endif

struct Params {
  const void *q, *k;
  void* out;
  float* lse;
  const float* sink;
  Selected list;
  Positions at;
  i64 qb, qh, qt, kb;      // bytes
  int Hq, parts, items;    // parts: of HEADS heads
  u32 kt;                  // bytes, too
  float scale, scale2;     // above 0; the second is for powers of two
};

constexpr int N = 32, GROUP = 9 * 1024, TILE = N / 8 * GROUP, SLOTS = HEADS == 8 ? 6 : 4, LAST = 8 * 1024;  // SLOTS: even, so that tiles stand in pairs; LAST: the ninth chunk of a group
constexpr int QUERY = SLOTS * TILE, TOPS = QUERY + HEADS / 8 * GROUP, ENDS = TOPS + 4 * HEADS * 4, FACTORS = ENDS + 4 * HEADS * 8, INVERSE = FACTORS + HEADS * 4, FOUND = INVERSE + HEADS * 4;
constexpr int MOVED = FOUND + SLOTS * 16, BARS = MOVED + (SLOTS + 1) / 2 * 8, COLUMNS = HEADS / 4;
constexpr int CHAINS = 4;  // sums of a score: narrow products that add to the same registers wait for one another
constexpr float LOWEST = -3.4028235e38f, LAZY = 8.f, WIDE = 1024.f;  // as in latent_hopper.cuh
#define FULL(s) (bars + 8 * (s))
#define FREE(s) (bars + 8 * (SLOTS + (s)))
#define READY(s) (bars + 8 * (2 * SLOTS + (s)))

struct Found { u32 word; int left, item, unused; };  // which of a tile's 32 tokens are seen; how many tiles of the item follow, -1: no tile at all

struct Item {
  int head, rows, t, b;  // head: the first of `rows`
  __device__ __forceinline__ Item(const Params& p, int x) {
    const int y = x / p.parts;
    head = (x - y * p.parts) * HEADS;
    rows = imin(p.Hq - head, HEADS);
    b = y / p.at.T;
    t = y - b * p.at.T;
  }
};

// 16 bytes of each of 9 chunks of two rows, 16 rows apart
__device__ __forceinline__ void fetch_rows(u32 to, const char* a, const char* b, int a_exists, int b_exists) {
#pragma unroll
  for (int c = 0; c < 9; c++) { fetch<true>(to + c * 1024, a + c * 128, a_exists); fetch<true>(to + c * 1024 + 2 * GROUP, b + c * 128, b_exists); }
}

__device__ __forceinline__ void gather(const Params& p, unsigned char* raw, u32 base, u32 bars) {
  const int tid = threadIdx.x, r = tid / 8, column = tid % 8 * 16;
  const u32 here = base + r / 8 * GROUP + r % 8 * 128 + (column ^ (r & 7) << 4);
  u32 slot = 0, phase = 1, patience = PATIENCE;
  for (int it = blockIdx.x; it < p.items; it += gridDim.x) {
    const int number = p.items - 1 - it;  // late queries have long rows: first
    const Item x(p, number);
    const char* from = (const char*)p.q + x.b * p.qb + (x.head + r) * p.qh + x.t * p.qt + column;
    bar_wait(FREE(slot), phase, patience);
    fetch_rows(here + slot * TILE, r < x.rows ? from : (const char*)p.q, r + 16 < x.rows ? from + 16 * p.qh : (const char*)p.q, r < x.rows, r + 16 < x.rows);
    copies_arrive(FULL(slot));
    if (tid == 0) bar_arrive(FULL(slot));
    advance<SLOTS>(slot, phase);
    const Entries list(p.list, p.at, x.b, 0, x.t);
    const int *next = list.entries + tid % 32, limit = list.limit;
    int to_come = (int)list.slots - tid % 32, left = uniform(imax(((int)list.slots + N - 1) / N, 1)), entry = to_come > 0 ? __ldg(next) : -1;  // without keys: one tile of holes
    from = (const char*)p.k + x.b * p.kb + column;
#pragma unroll 1
    while (left) {
      const int key = (u32)entry < (u32)limit ? entry : -1, a = __shfl_sync(~0u, key, r), b = __shfl_sync(~0u, key, r + 16);
      const u32 word = __ballot_sync(~0u, key >= 0);
      next += N; to_come -= N; left--;
      entry = to_come > 0 ? __ldg(next) : -1;  // asked for a tile ahead
      bar_wait(FREE(slot), phase, patience);
      fetch_rows(here + slot * TILE, from + (u64)(u32)imax(a, 0) * p.kt, from + (u64)(u32)imax(b, 0) * p.kt, a >= 0, b >= 0);
      copies_arrive(FULL(slot));
      if (tid == 0) {
        ((Found*)(raw + FOUND))[slot] = {word, left || it + (int)gridDim.x < p.items ? left : -1, number, 0};
        bar_arrive(FULL(slot));
      }
      advance<SLOTS>(slot, phase);
    }
  }
}

// Of the heads of a lane (8 j + 2 (lane % 4) + e is the one with index 2 j + e): the largest product this lane has seen, the reference m of the sums (powers of two), the sum of its tokens.
struct Heads { float top[COLUMNS], m[COLUMNS], sum[COLUMNS]; bool wide; };
__device__ __forceinline__ int head_of(int lane, int i) { return i / 2 * 8 + 2 * (lane & 3) + (i & 1); }

// The largest of all lanes and warps that hold a head; the group's votes keep two exchanges apart.
__device__ __forceinline__ void exchange_tops(unsigned char* raw, Heads& h, int warp, int lane) {
  float* tops = (float*)(raw + TOPS);
#pragma unroll
  for (int i = 0; i < COLUMNS; i++) {
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) h.top[i] = fmaxf(h.top[i], __shfl_xor_sync(~0u, h.top[i], lanes));
    if (lane < 4) tops[warp * HEADS + head_of(lane, i)] = h.top[i];
  }
  named_sync(1, 128);
#pragma unroll
  for (int i = 0; i < COLUMNS; i++)
#pragma unroll
    for (int w = 0; w < 4; w++) h.top[i] = fmaxf(h.top[i], tops[w * HEADS + head_of(lane, i)]);
}

// Products of 64 tokens become probabilities relative to 2^m (latent_hopper.cuh has the reasons). Whether a reference moved: then `factor` is for what was summed before.
__device__ __forceinline__ bool probabilities(unsigned char* raw, float (&s)[HEADS / 2], Heads& h, float (&factor)[COLUMNS], float scale2, int warp, int lane) {
  bool above = false;
#pragma unroll
  for (int i = 0; i < COLUMNS; i++) {
    factor[i] = 1.f;
    h.top[i] = fmaxf(h.top[i], fmaxf(s[i / 2 * 4 + i % 2], s[i / 2 * 4 + 2 + i % 2]));
    above |= fmaf(h.top[i], scale2, -LAZY) > h.m[i];
  }
  const bool moved = named_or(1, 128, above);  // and from here on all four warps' products are done with the tile
  if (moved) {
    exchange_tops(raw, h, warp, lane);
    bool wide = false;
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) {
      const float m = __fmul_rn(h.top[i], scale2);
      if (m > h.m[i]) {
        factor[i] = ex2(h.m[i] - m);
        h.m[i] = m;
        h.sum[i] *= factor[i];
      }
      wide |= fabsf(h.m[i]) > WIDE && h.top[i] != -inf();
    }
    h.wide = __any_sync(~0u, wide);
  }
  float unit = scale2;
  if (h.wide) {
    unit = 1.f;
#pragma unroll
    for (int i = 0; i < HEADS / 2; i++) s[i] = __fmul_rn(s[i], scale2);
  }
#pragma unroll
  for (int i = 0; i < HEADS / 2; i++) {
    s[i] = ex2(fmaf(s[i], unit, -h.m[i / 4 * 2 + i % 2]));
    h.sum[i / 4 * 2 + i % 2] += s[i];
  }
  return moved;
}

// At the end of an item, a thread for each head: sums relative to 2^m become sums relative to the head's largest score, in natural units and rounded once as the backward does.
__device__ __forceinline__ void finish(const Params& p, unsigned char* raw, const Item& x, Heads& h, int warp, int lane) {
  float2* ends = (float2*)(raw + ENDS);  // not TOPS: a warp behind may still read there
  float* inverse = (float*)(raw + INVERSE);
#pragma unroll
  for (int i = 0; i < COLUMNS; i++) {
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) {
      h.sum[i] += __shfl_xor_sync(~0u, h.sum[i], lanes);
      h.top[i] = fmaxf(h.top[i], __shfl_xor_sync(~0u, h.top[i], lanes));
    }
    if (lane < 4) {
      const int head = head_of(lane, i);
      ends[warp * HEADS + head] = make_float2(h.top[i], h.sum[i]);
      if (warp == 0) inverse[head] = h.m[i];
    }
  }
  named_sync(1, 128);
  const int head = warp * 32 + lane;
  if (head < HEADS) {
    const float m = inverse[head];
    float top = -inf(), sum = 0.f;
#pragma unroll
    for (int w = 0; w < 4; w++) { top = fmaxf(top, ends[w * HEADS + head].x); sum += ends[w * HEADS + head].y; }
    const bool empty = top == -inf() && sum == 0.f;
    const float largest = __fmul_rn(top, p.scale), unit = ex2(h.wide ? m - __fmul_rn(top, p.scale2) : -fmaf(top, p.scale2, -m)), total = sum * unit;
    const float sink = p.sink && head < x.rows ? ex2((__ldg(p.sink + x.head + head) - largest) * LOG2E) : 0.f;
    inverse[head] = empty ? 0.f : unit / (total + sink);
    if (p.lse && head < x.rows) p.lse[((i64)x.b * p.Hq + x.head + head) * p.at.T + x.t] = empty ? -inf() : largest + logf(total);
  }
}

// Probabilities of a warp's 16 tokens into the last chunk of their tile, a row for each head: K-major for the second product.
__device__ __forceinline__ void store_probabilities(u32 tile, const float (&s)[HEADS / 2], int warp, int lane) {
  const u32 row = lane & 7, part = HEADS == 8 ? 0 : lane >> 4, to = tile + part * GROUP + LAST + row * 128 + (((warp & 1) * 2 + (lane >> 3 & 1) ^ row) << 4);
#pragma unroll
  for (int j = 0; j < HEADS / 8; j += 2) {
    const float *x = &s[4 * j], *y = HEADS == 8 ? x : x + 4;  // 8 heads: the same twice
    stmatrix_transposed_at(to + j * GROUP, pack<KIND>(x[0], x[1]), pack<KIND>(x[2], x[3]), pack<KIND>(y[0], y[1]), pack<KIND>(y[2], y[3]));
  }
}

__device__ __forceinline__ void scores(const Params& p, unsigned char* raw, u32 base, u32 bars) {
  const int tid = threadIdx.x % 128, warp = tid / 32, lane = tid & 31;
  const u64 query = descriptor_of(base + QUERY, 16, GROUP, SWIZZLE_128);
  u32 slot = 0, phase = 0, patience = PATIENCE;
  for (int left = 0; left >= 0;) {
    bar_wait(FULL(slot), phase, patience);
#pragma unroll
    for (int j = 0; j < HEADS / 8 * GROUP / 16; j += 128)
      if (j + tid < HEADS / 8 * GROUP / 16) ((uint4*)(raw + QUERY))[j + tid] = ((const uint4*)(raw + slot * TILE))[j + tid];
    shared_to_copy_engine();
    named_sync(1, 128);
    bar_arrive(READY(slot));
    advance<SLOTS>(slot, phase);
    Heads h = {};
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) { h.top[i] = -inf(); h.m[i] = LOWEST; }
    bool first = true;
    do {
      bar_wait(FULL(slot), phase, patience);
      const Found *found = (const Found*)(raw + FOUND);
      left = uniform(found[slot].left);
      const int item = found[slot].item, two = left > 0 && slot + 1 < SLOTS, rows = slot + 1 < SLOTS ? slot : SLOTS - 2;  // rows: the slot whose tile is rows 0 .. 31
      if (two) {
        bar_wait(FULL(slot + 1), phase, patience);
        left = uniform(found[slot + 1].left);
      }
      const u32 mine = rows + warp / 2;  // the slot of this warp's tokens
      const bool seen = mine == slot || two;
      const u32 word = seen ? found[mine].word >> (16 * (warp & 1) + lane / 4) : 0;
      const u64 keys = descriptor_of(base + (u32)uniform(rows) * TILE, 16, GROUP, SWIZZLE_128);
      float part[CHAINS][HEADS / 2], s[HEADS / 2];
      shared_to_copy_engine();
#pragma unroll
      for (int c = 0; c < CHAINS; c++) hold(part[c]);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 36; k++) wgmma<KIND, K_MAJOR>(part[k % CHAINS], keys + (k & 3) * 2 + (k >> 2) * 64, query + (k & 3) * 2 + (k >> 2) * 64, k >= CHAINS);
      wgmma_commit(); wgmma_wait<0>();
#pragma unroll
      for (int c = 0; c < CHAINS; c++) hold(part[c]);
#pragma unroll
      for (int i = 0; i < HEADS / 2; i++) s[i] = word >> (i & 2) * 4 & 1 ? (part[0][i] + part[1][i]) + (part[2][i] + part[3][i]) : -inf();
      float factor[COLUMNS];
      const bool moved = probabilities(raw, s, h, factor, p.scale2, warp, lane);
      if (moved || first) {  // factors before these have been applied, and nobody needs the heads' inverses of the item before
        const u32 before = slot == 0 ? SLOTS - 1 : slot - 1;
        bar_wait(FREE(before), slot == 0 ? phase ^ 1 : phase, patience);
        if (warp == 0 && lane < 4)
#pragma unroll
          for (int i = 0; i < COLUMNS; i++) ((float*)(raw + FACTORS))[head_of(lane, i)] = factor[i];
      }
      if (seen) store_probabilities(base + mine * TILE, s, warp, lane);
      if (tid == 0) {
        ((int*)(raw + MOVED))[slot] = moved && !first;
        if (two) ((int*)(raw + MOVED))[slot + 1] = 0;
      }
      if (left <= 0) finish(p, raw, Item(p, item), h, warp, lane);
      shared_to_copy_engine();
      for (int tiles = 0; tiles <= two; tiles++) {
        bar_arrive(READY(slot));
        advance<SLOTS>(slot, phase);
      }
      first = false;
    } while (left > 0);
  }
}

// Sums out through the item's last tile, whose values nobody needs any more: rows of a head, coalesced.
__device__ __forceinline__ void store(const Params& p, unsigned char* raw, u32 base, const float (&o)[8][HEADS / 2], const Item& x, u32 slot, int tid) {
  const int warp = tid / 32, lane = tid & 31, row = lane & 7, part = HEADS == 8 ? 0 : lane >> 4;
  float f[COLUMNS];
#pragma unroll
  for (int i = 0; i < COLUMNS; i++) f[i] = ((const float*)(raw + INVERSE))[head_of(lane, i)];
  named_sync(2, 128);
#pragma unroll
  for (int c = 0; c < 8; c++)
#pragma unroll
    for (int j = 0; j < HEADS / 8; j += 2) {
      const u32 to = base + slot * TILE + ((j + part) * 8 + row) * 1024 + ((8 * c + 2 * warp + (lane >> 3 & 1) ^ row) << 4);
      const int j2 = HEADS == 8 ? j : j + 1;
      const float *y = &o[c][4 * j], *z = &o[c][4 * j2], *fy = &f[2 * j], *fz = &f[2 * j2];
      stmatrix_transposed_at(to, pack<KIND>(y[0] * fy[0], y[1] * fy[1]), pack<KIND>(y[2] * fy[0], y[3] * fy[1]), pack<KIND>(z[0] * fz[0], z[1] * fz[1]), pack<KIND>(z[2] * fz[0], z[3] * fz[1]));
    }
  named_sync(2, 128);
  char* out = (char*)p.out + (((i64)x.b * p.Hq + x.head) * p.at.T + x.t) * 1024 + tid % 64 * 16;
#pragma unroll 4
  for (int head = tid / 64; head < x.rows; head += 2) *(uint4*)(out + (i64)head * p.at.T * 1024) = *(const uint4*)(raw + slot * TILE + head * 1024 + (tid % 64 ^ (head & 7)) * 16);
}

__device__ __forceinline__ void values(const Params& p, unsigned char* raw, u32 base, u32 bars) {
  const int tid = threadIdx.x % 128, lane = tid & 31;
  u32 slot = 0, phase = 0, patience = PATIENCE;
  float o[8][HEADS / 2];
  for (int left = 0; left >= 0;) {
    bar_wait(READY(slot), phase, patience);  // the query passes by
    if (lane == 0) bar_arrive(FREE(slot));
    advance<SLOTS>(slot, phase);
    bool first = true;
    do {
      bar_wait(READY(slot), phase, patience);
      const Found found = ((const Found*)(raw + FOUND))[slot];
      left = uniform(found.left);
      if (((const int*)(raw + MOVED))[slot]) {
        float f[COLUMNS];
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) f[i] = ((const float*)(raw + FACTORS))[head_of(lane, i)];
#pragma unroll
        for (int c = 0; c < 8; c++)
#pragma unroll
          for (int i = 0; i < HEADS / 2; i++) o[c][i] *= f[i / 4 * 2 + i % 2];
      }
      const u64 a = descriptor_of(base + slot * TILE, 1024, GROUP, SWIZZLE_128), b = descriptor_of(base + slot * TILE + LAST, 16, GROUP, SWIZZLE_128);
#pragma unroll
      for (int c = 0; c < 8; c++) hold(o[c]);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 2; k++)
#pragma unroll
        for (int c = 0; c < 8; c++) wgmma<KIND, K_MAJOR, M_MAJOR>(o[c], a + k * (2 * GROUP >> 4) + c * 64, b + 2 * k, !first || k);
      wgmma_commit(); wgmma_wait<0>();
#pragma unroll
      for (int c = 0; c < 8; c++) hold(o[c]);
      if (left <= 0) store(p, raw, base, o, Item(p, found.item), slot, tid);
      __syncwarp();
      if (lane == 0) bar_arrive(FREE(slot));
      first = false;
      advance<SLOTS>(slot, phase);
    } while (left > 0);
  }
}

extern "C" __global__ void __launch_bounds__(384, 1) gather_tokens_hopper(const __grid_constant__ Params p) {
  SWIZZLED_SHARED(raw);
  const u32 base = shared_address(raw), bars = base + BARS;
  const int group = uniform(threadIdx.x / 128);
  if (threadIdx.x == 0) {
    for (int s = 0; s < SLOTS; s++) { bar_init(FULL(s), 129); bar_init(FREE(s), 4); bar_init(READY(s), 128); }
    bar_fence();
  }
  __syncthreads();
  if (group == 0) gather(p, raw, base, bars);
  else if (group == 1) scores(p, raw, base, bars);
  else values(p, raw, base, bars);
}
