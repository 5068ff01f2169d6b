// Attention over selected keys for few heads, by Hopper's own instructions: keys of width 576 whose first 512 columns are the values (DeepSeek's latent), float16 and
// bfloat16. Tokens are the rows of both products, heads their columns, so that HEADS = 8, 16 or 32 are not padded to 64:
//   S^T [64 tokens, HEADS] = K Q^T        O^T [512, HEADS] += V^T P^T
//
// Persistent, four warpgroups: one gathers, one makes scores and probabilities of 64 tokens at a time, one holds the sums, a thread of the fourth announces what has landed.
// A slot of the ring is a third of a step, 192 columns of 64 tokens: scores begin when the first columns are there, values give back third by third, and memory that is no whole step
// still holds what is on its way. With slots of 32 whole tokens a step's way from its gathering to its values bound the kernel; slots of 64 columns ask for three times the waits and
// arrivals, which cost as much as products. The query passes through the ring and stands beside it from then on.
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

constexpr int N = 64, PART = N * 128, SLOT = 3 * PART, SLOTS = HEADS == 32 ? 7 : 8, CHUNK = HEADS * 128;  // PART, CHUNK: 64 columns of a slot and of the query
constexpr int QUERY_SLOTS = (9 * CHUNK + SLOT - 1) / SLOT, QUERY_PARTS = (9 * CHUNK + PART - 1) / PART, COLUMNS = HEADS / 4;
constexpr int QUERY = SLOTS * SLOT, WEIGHTS = QUERY + 9 * CHUNK, TOPS = WEIGHTS + 2 * CHUNK, ENDS = TOPS + 4 * HEADS * 4, FACTORS = ENDS + 4 * HEADS * 8, INVERSE = FACTORS + 2 * HEADS * 4;
constexpr int FOUND = INVERSE + 2 * HEADS * 4, MADE = FOUND + SLOTS * 16, BARS = MADE + 2 * 16;
constexpr float LOWEST = -3.4028235e38f, LAZY = 8.f, WIDE = 1024.f;  // as in latent_hopper.cuh
#define FULL(s) (bars + 8 * (s))
#define FREE(s) (bars + 8 * (SLOTS + (s)))
#define LANDED(s) (bars + 8 * (2 * SLOTS + (s)))
#define READY(s) (bars + 8 * (3 * SLOTS + (s)))
#define DONE(s) (bars + 8 * (3 * SLOTS + 2 + (s)))

struct Found { u32 words[2]; int left, item; };      // of a step's 64 tokens those that are seen; how many steps of the item follow, -1: no step at all
struct Made { int moved, left, item, unused; };      // of a step's probabilities; moved: earlier sums take a factor first
__device__ __forceinline__ u32 slot_after(u32 slot, u32 n) { return slot + n < SLOTS ? slot + n : slot + n - SLOTS; }
__device__ __forceinline__ u32 part_after(u32 slot, int c) { return slot_after(slot, c / 3) * SLOT + c % 3 * PART; }  // where part c of what begins with a slot stands

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

// 16 bytes of each of four rows of a part, 16 rows apart
__device__ __forceinline__ void fetch_rows(u32 to, const char* const (&rows)[4], int column, u32 exist) {
#pragma unroll
  for (int m = 0; m < 4; m++) fetch<true>(to + m * 2048, rows[m] + column, exist >> m & 1);
}

__device__ __forceinline__ void gather(const Params& p, unsigned char* raw, u32 base, u32 bars) {
  const int tid = threadIdx.x, lane = tid & 31, r = tid / 8, column = tid % 8 * 16;
  const u32 here = base + r * 128 + (column ^ (r & 7) << 4);
  u32 slot = 0, phase = 1, patience = PATIENCE;
  for (int it = blockIdx.x; it < p.items; it += gridDim.x) {
    const int number = p.items - 1 - it;  // late queries have long rows: first
    const Item x(p, number);
    const Entries list(p.list, p.at, x.b, 0, x.t);
    const int *next = list.entries + lane, limit = list.limit;
    int to_come = (int)list.slots - lane, left = uniform(imax(((int)list.slots + N - 1) / N, 1));  // without keys: one step of holes
    int low = to_come > 0 ? __ldg(next) : -1, high = to_come > 32 ? __ldg(next + 32) : -1;
    const char* rows[4];
#pragma unroll 1
    for (int part = 0; part < QUERY_PARTS; part++) {
      const char* from = (const char*)p.q + x.b * p.qb + x.head * p.qh + x.t * p.qt + column;
      u32 exist = 0;
#pragma unroll
      for (int m = 0; m < 4; m++) {
        const int row = part * N + m * 16 + r, chunk = row / HEADS, head = row % HEADS, is = chunk < 9 && head < x.rows;
        rows[m] = is ? from + head * p.qh + chunk * 128 : (const char*)p.q;
        exist |= is << m;
      }
      if (part % 3 == 0) bar_wait(FREE(slot), phase, patience);
      fetch_rows(here + slot * SLOT + part % 3 * PART, rows, 0, exist);
      if (part % 3 == 2 || part == QUERY_PARTS - 1) {
        copies_arrive(FULL(slot));
        if (tid == 0) bar_arrive(FULL(slot));
        advance<SLOTS>(slot, phase);
      }
    }
#pragma unroll 1
    while (left) {
      low = (u32)low < (u32)limit ? low : -1;
      high = (u32)high < (u32)limit ? high : -1;
      u32 exist = 0;
#pragma unroll
      for (int m = 0; m < 4; m++) {
        const int key = __shfl_sync(~0u, m < 2 ? low : high, m % 2 * 16 + r);
        rows[m] = (const char*)p.k + x.b * p.kb + column + (u64)(u32)imax(key, 0) * p.kt;
        exist |= (key >= 0) << m;
      }
      const u32 seen[2] = {__ballot_sync(~0u, low >= 0), __ballot_sync(~0u, high >= 0)};
      next += N; to_come -= N; left--;
      low = to_come > 0 ? __ldg(next) : -1, high = to_come > 32 ? __ldg(next + 32) : -1;  // asked for a step ahead
#pragma unroll
      for (int n = 0; n < 3; n++) {
        bar_wait(FREE(slot), phase, patience);
#pragma unroll
        for (int c = 0; c < 3; c++) fetch_rows(here + slot * SLOT + c * PART, rows, (3 * n + c) * 128, exist);
        copies_arrive(FULL(slot));
        if (tid == 0) {
          if (n == 0) ((Found*)(raw + FOUND))[slot] = {{seen[0], seen[1]}, left || it + (int)gridDim.x < p.items ? left : -1, number};
          bar_arrive(FULL(slot));
        }
        advance<SLOTS>(slot, phase);
      }
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
__device__ __forceinline__ void finish(const Params& p, unsigned char* raw, const Item& x, float* inverse, Heads& h, int warp, int lane) {
  float2* ends = (float2*)(raw + ENDS);  // not TOPS: a warp behind may still read there
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

// Probabilities of a warp's 16 tokens, a row for each head: K-major for the second product.
__device__ __forceinline__ void store_probabilities(u32 weights, const float (&s)[HEADS / 2], int warp, int lane) {
  const u32 row = lane & 7, part = HEADS == 8 ? 0 : lane >> 4, to = weights + part * 1024 + row * 128 + ((warp * 2 + (lane >> 3 & 1) ^ row) << 4);
#pragma unroll
  for (int j = 0; j < HEADS / 8; j += 2) {
    const float *x = &s[4 * j], *y = HEADS == 8 ? x : x + 4;  // 8 heads: the same twice
    stmatrix_transposed_at(to + j * 1024, pack<KIND>(x[0], x[1]), pack<KIND>(x[2], x[3]), pack<KIND>(y[0], y[1]), pack<KIND>(y[2], y[3]));
  }
}

// Hears of what has landed and says so, with the fence that the tensor cores ask for: between products it would hold them up. Of the query, too: nobody gives back what was not
// announced, so that no slot is filled twice before the herald heard of it.
__device__ __forceinline__ void herald(unsigned char* raw, u32 bars) {
  u32 slot = 0, phase = 0, patience = PATIENCE;
  const auto announce = [&] {
    bar_wait(FULL(slot), phase, patience);
    shared_to_copy_engine();
    bar_arrive(LANDED(slot));
    advance<SLOTS>(slot, phase);
  };
  for (int left = 0; left >= 0;) {
    for (int n = 0; n < QUERY_SLOTS; n++) announce();
    do {
      bar_wait(FULL(slot), phase, patience);
      left = ((const Found*)(raw + FOUND))[slot].left;
      for (int n = 0; n < 3; n++) announce();
    } while (left > 0);
  }
}

__device__ __forceinline__ void scores(const Params& p, unsigned char* raw, u32 base, u32 bars) {
  const int tid = threadIdx.x % 128, warp = tid / 32, lane = tid & 31;
  const u64 query = descriptor_of(base + QUERY, 16, 1024, SWIZZLE_128);
  u32 slot = 0, phase = 0, made = 0, turn = 1, patience = PATIENCE;
  for (int left = 0; left >= 0;) {
#pragma unroll 1
    for (int part = 0; part < QUERY_SLOTS; part++) {
      bar_wait(LANDED(slot), phase, patience);
#pragma unroll
      for (int i = tid; i < SLOT / 16; i += 128)
        if (part * (SLOT / 16) + i < 9 * CHUNK / 16) ((uint4*)(raw + QUERY + part * SLOT))[i] = ((const uint4*)(raw + slot * SLOT))[i];
      __syncwarp();
      if (lane < 2) bar_arrive(FREE(slot));  // for the other group, too
      advance<SLOTS>(slot, phase);
    }
    shared_to_copy_engine();
    named_sync(1, 128);
    Heads h = {};
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) { h.top[i] = -inf(); h.m[i] = LOWEST; }
    bool first = true;
    do {
      const u32 begin = uniform(slot);
      float s[HEADS / 2];
      hold(s);
#pragma unroll
      for (int c = 0; c < 9; c++) {
        if (c % 3 == 0) {
          bar_wait(LANDED(slot), phase, patience);
          advance<SLOTS>(slot, phase);
          wgmma_fence();
        }
        const u64 keys = descriptor_of(base + part_after(begin, c), 16, 1024, SWIZZLE_128);
#pragma unroll
        for (int k = 0; k < 4; k++) wgmma<KIND, K_MAJOR>(s, keys + 2 * k, query + c * (CHUNK >> 4) + 2 * k, c || k);
      }
      wgmma_commit();
      const Found* found = (const Found*)(raw + FOUND) + begin;
      const u32 word = found->words[warp / 2] >> (16 * (warp & 1) + lane / 4);
      const int item = found->item;
      left = uniform(found->left);
      bar_wait(DONE(made), turn, patience);
      wgmma_wait<0>(); hold(s);
      __syncwarp();
      if (lane < 3) bar_arrive(FREE(slot_after(begin, lane)));  // for this group; the other gives back what it has added
#pragma unroll
      for (int i = 0; i < HEADS / 2; i++)
        if (!(word >> (i & 2) * 4 & 1)) s[i] = -inf();
      float factor[COLUMNS];
      const bool moved = probabilities(raw, s, h, factor, p.scale2, warp, lane);
      if (moved && warp == 0 && lane < 4)
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) ((float*)(raw + FACTORS))[made * HEADS + head_of(lane, i)] = factor[i];
      store_probabilities(base + WEIGHTS + made * CHUNK, s, warp, lane);
      if (tid == 0) ((Made*)(raw + MADE))[made] = {moved && !first, left, item, 0};
      if (left <= 0) finish(p, raw, Item(p, item), (float*)(raw + INVERSE) + made * HEADS, h, warp, lane);
      __syncwarp();
      if (lane == 0) bar_arrive(READY(made));
      advance<2>(made, turn);
      first = false;
    } while (left > 0);
  }
}

// Sums out through slots whose values nobody needs any more, eight heads to a part: rows of a head, coalesced.
__device__ __forceinline__ void store(const Params& p, unsigned char* raw, u32 base, const float (&o)[8][HEADS / 2], const float* inverse, const Item& x, u32 slot, int tid) {
  const int warp = tid / 32, lane = tid & 31, row = lane & 7, part = HEADS == 8 ? 0 : lane >> 4;
  float f[COLUMNS];
#pragma unroll
  for (int i = 0; i < COLUMNS; i++) f[i] = inverse[head_of(lane, i)];
  named_sync(2, 128);
#pragma unroll
  for (int c = 0; c < 8; c++)
#pragma unroll
    for (int j = 0; j < HEADS / 8; j += 2) {
      const u32 to = base + part_after(slot, j + part) + row * 1024 + ((8 * c + 2 * warp + (lane >> 3 & 1) ^ row) << 4);
      const int j2 = HEADS == 8 ? j : j + 1;
      const float *y = &o[c][4 * j], *z = &o[c][4 * j2], *fy = &f[2 * j], *fz = &f[2 * j2];
      stmatrix_transposed_at(to, pack<KIND>(y[0] * fy[0], y[1] * fy[1]), pack<KIND>(y[2] * fy[0], y[3] * fy[1]), pack<KIND>(z[0] * fz[0], z[1] * fz[1]), pack<KIND>(z[2] * fz[0], z[3] * fz[1]));
    }
  named_sync(2, 128);
  char* out = (char*)p.out + (((i64)x.b * p.Hq + x.head) * p.at.T + x.t) * 1024 + tid % 64 * 16;
#pragma unroll 4
  for (int head = tid / 64; head < x.rows; head += 2)
    *(uint4*)(out + (i64)head * p.at.T * 1024) = *(const uint4*)(raw + part_after(slot, head / 8) + (head & 7) * 1024 + (tid % 64 ^ (head & 7)) * 16);
}

__device__ __forceinline__ void values(const Params& p, unsigned char* raw, u32 base, u32 bars) {
  const int tid = threadIdx.x % 128, lane = tid & 31;
  u32 slot = 0, made = 0, turn = 0, patience = PATIENCE;
  float o[8][HEADS / 2];
  for (int left = 0; left >= 0;) {
    slot = slot_after(slot, QUERY_SLOTS);
    bool first = true;
    do {
      bar_wait(READY(made), turn, patience);
      const Made step = ((const Made*)(raw + MADE))[made];
      left = uniform(step.left);
      if (step.moved) {
        float f[COLUMNS];
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) f[i] = ((const float*)(raw + FACTORS))[made * HEADS + head_of(lane, i)];
#pragma unroll
        for (int c = 0; c < 8; c++)
#pragma unroll
          for (int i = 0; i < HEADS / 2; i++) o[c][i] *= f[i / 4 * 2 + i % 2];
      }
      shared_to_copy_engine();  // here, where nobody waits for it
      const u32 begin = uniform(slot);
      const u64 weights = descriptor_of(base + WEIGHTS + (u32)uniform(made) * CHUNK, 16, 1024, SWIZZLE_128);
      const int kept = left <= 0 ? (HEADS + 23) / 24 : 0;  // slots that the sums leave through
#pragma unroll
      for (int c = 0; c < 8; c++) hold(o[c]);
#pragma unroll
      for (int c = 0; c < 8; c++) {
        wgmma_fence();
        const u64 v = descriptor_of(base + part_after(begin, c), PART, 1024, SWIZZLE_128);
#pragma unroll
        for (int k = 0; k < 4; k++) wgmma<KIND, K_MAJOR, M_MAJOR>(o[c], v + k * 128, weights + 2 * k, !first || k);
        wgmma_commit();
        if (c) {
          wgmma_wait<1>();
          if (c % 3 == 0 && lane == 0 && c / 3 - 1 >= kept) bar_arrive(FREE(slot_after(begin, c / 3 - 1)));
        }
      }
      wgmma_wait<0>();
#pragma unroll
      for (int c = 0; c < 8; c++) hold(o[c]);
      if (left <= 0) store(p, raw, base, o, (const float*)(raw + INVERSE) + made * HEADS, Item(p, step.item), begin, tid);
      __syncwarp();
      if (lane == 0) {
        for (int c = 0; c < kept; c++) bar_arrive(FREE(slot_after(begin, c)));
        bar_arrive(FREE(slot_after(begin, 2)));
        bar_arrive(DONE(made));
      }
      first = false;
      slot = slot_after(slot, 3);
      advance<2>(made, turn);
    } while (left > 0);
  }
}

extern "C" __global__ void __launch_bounds__(512, 1) gather_tokens_hopper(const __grid_constant__ Params p) {
  SWIZZLED_SHARED(raw);
  const u32 base = shared_address(raw), bars = base + BARS;
  const int group = uniform(threadIdx.x / 128);
  if (threadIdx.x == 0) {
    for (int s = 0; s < SLOTS; s++) { bar_init(FULL(s), 129); bar_init(FREE(s), 8); bar_init(LANDED(s), 1); }
    for (int s = 0; s < 2; s++) { bar_init(READY(s), 4); bar_init(DONE(s), 4); }
    bar_fence();
  }
  __syncthreads();
  if (group == 0) {
    fewer_registers<72>();
    gather(p, raw, base, bars);
  } else if (group == 1) {
    more_registers<208>();
    scores(p, raw, base, bars);
  } else if (group == 2) {
    more_registers<208>();
    values(p, raw, base, bars);
  } else {
    fewer_registers<24>();
    if (threadIdx.x == 384) herald(raw, bars);
  }
}
