// Attention over selected keys for few heads, by Hopper's own instructions: keys of width 576 whose first 512 columns are the values (DeepSeek's latent), float16 and bfloat16.
// Heads are the rows of the first product and the columns of the second, HEADS = 8, 16 or 32, which are not padded to 64 there:
//   S [64, 64 tokens] = Q K^T        O^T [512, HEADS] += V^T P^T
// Q stands in registers for an item. Of the 16 rows of a warp eight are heads and eight are empty: shared memory, which bounds the kernel, is read for the keys alone, and a thread makes
// probabilities of one head.
//
// Persistent, four warpgroups: one gathers, one makes scores and probabilities of 64 tokens at a time, one holds the sums, a thread of the fourth announces what has landed.
// A slot of the ring is 64 columns of 64 tokens, so that scores begin when the first columns are there, values give back column by column, and memory that is no whole step still
// holds what is on its way: with slots of 32 whole tokens a step's way from its gathering to its values bound the kernel. The query passes through the ring.
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

constexpr int N = 64, SLOT = N * 128, SLOTS = 27, CHUNK = HEADS * 128;  // CHUNK: 64 columns of the query, probabilities of 64 tokens
constexpr int QUERY_SLOTS = (9 * CHUNK + SLOT - 1) / SLOT, WARPS = HEADS / 8, COLUMNS = HEADS / 4;  // WARPS: those that have heads
constexpr int WEIGHTS = SLOTS * SLOT, FACTORS = WEIGHTS + 2 * CHUNK, INVERSE = FACTORS + 2 * HEADS * 4, FOUND = INVERSE + 2 * HEADS * 4, MADE = FOUND + SLOTS * 16, BARS = MADE + 2 * 32;
constexpr int NEWS = 12;  // announcements, of a query or of three slots: more than the ring can hold
constexpr float LOWEST = -3.4028235e38f, LAZY = 8.f, WIDE = 1024.f;  // as in latent_hopper.cuh
#define FULL(s) (bars + 8 * (s))
#define FREE(s) (bars + 8 * (SLOTS + (s)))
#define READY(s) (bars + 8 * (2 * SLOTS + (s)))
#define DONE(s) (bars + 8 * (2 * SLOTS + 2 + (s)))
#define LANDED(n) (bars + 8 * (2 * SLOTS + 4 + (n)))

struct Found { u32 words[2]; int left, item; };      // of a step's 64 tokens those that are seen; how many steps of the item follow, -1: no step at all
struct Made { int moved[4], left, item, unused[2]; };  // of a step's probabilities; moved: earlier sums of a warp's heads take a factor first
__device__ __forceinline__ u32 slot_after(u32 slot, u32 n) { return slot + n < SLOTS ? slot + n : slot + n - SLOTS; }

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

// 16 bytes of each of four rows of a slot, 16 rows apart
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
    for (int part = 0; part < QUERY_SLOTS; part++) {
      const char* from = (const char*)p.q + x.b * p.qb + x.head * p.qh + x.t * p.qt + column;
      u32 exist = 0;
#pragma unroll
      for (int m = 0; m < 4; m++) {
        const int row = part * N + m * 16 + r, chunk = row / HEADS, head = row % HEADS, is = chunk < 9 && head < x.rows;
        rows[m] = is ? from + head * p.qh + chunk * 128 : (const char*)p.q;
        exist |= is << m;
      }
      bar_wait(FREE(slot), phase, patience);
      fetch_rows(here + slot * SLOT, rows, 0, exist);
      copies_arrive(FULL(slot));
      if (tid == 0) bar_arrive(FULL(slot));
      advance<SLOTS>(slot, phase);
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
      for (int c = 0; c < 9; c++) {
        bar_wait(FREE(slot), phase, patience);
        fetch_rows(here + slot * SLOT, rows, c * 128, exist);
        copies_arrive(FULL(slot));
        if (tid == 0) {
          if (c == 0) ((Found*)(raw + FOUND))[slot] = {{seen[0], seen[1]}, left || it + (int)gridDim.x < p.items ? left : -1, number};
          bar_arrive(FULL(slot));
        }
        advance<SLOTS>(slot, phase);
      }
    }
  }
}

// Of a lane's head: the largest product this lane has seen, the reference m of the sums (powers of two), the sum of this lane's tokens.
struct Head { float top, m, sum; bool wide; };

// The four lanes of a head
__device__ __forceinline__ float largest_of(float x) { x = fmaxf(x, __shfl_xor_sync(~0u, x, 1)); return fmaxf(x, __shfl_xor_sync(~0u, x, 2)); }
__device__ __forceinline__ float sum_of(float x) { x += __shfl_xor_sync(~0u, x, 1); return x + __shfl_xor_sync(~0u, x, 2); }

// Products of 64 tokens become probabilities relative to 2^m (latent_hopper.cuh has the reasons). Whether a reference moved: then `factor` is for what was summed before.
__device__ __forceinline__ bool probabilities(float (&s)[N / 2], Head& h, float& factor, float scale2) {
#pragma unroll
  for (int c = 0; c < 8; c++) h.top = fmaxf(h.top, fmaxf(s[4 * c], s[4 * c + 1]));
  factor = 1.f;
  const bool moved = __any_sync(~0u, fmaf(h.top, scale2, -LAZY) > h.m);
  if (moved) {
    h.top = largest_of(h.top);
    const float m = __fmul_rn(h.top, scale2);
    if (m > h.m) {
      factor = ex2(h.m - m);
      h.m = m;
      h.sum *= factor;
    }
    h.wide = __any_sync(~0u, fabsf(h.m) > WIDE && h.top != -inf());
  }
  float unit = scale2;
  if (h.wide) {
    unit = 1.f;
#pragma unroll
    for (int c = 0; c < 8; c++) { s[4 * c] = __fmul_rn(s[4 * c], scale2); s[4 * c + 1] = __fmul_rn(s[4 * c + 1], scale2); }
  }
#pragma unroll
  for (int c = 0; c < 8; c++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      s[4 * c + e] = ex2(fmaf(s[4 * c + e], unit, -h.m));
      h.sum += s[4 * c + e];
    }
  return moved;
}

// At the end of an item: sums relative to 2^m become sums relative to the head's largest score, in natural units and rounded once as the backward does.
__device__ __forceinline__ void finish(const Params& p, const Item& x, float* inverse, const Head& h, int head, int lane) {
  const float top = largest_of(h.top), sum = sum_of(h.sum);
  if (lane & 3) return;
  const bool empty = top == -inf() && sum == 0.f;
  const float largest = __fmul_rn(top, p.scale), unit = ex2(h.wide ? h.m - __fmul_rn(top, p.scale2) : -fmaf(top, p.scale2, -h.m)), total = sum * unit;
  const float sink = p.sink && head < x.rows ? ex2((__ldg(p.sink + x.head + head) - largest) * LOG2E) : 0.f;
  inverse[head] = empty ? 0.f : unit / (total + sink);
  if (p.lse && head < x.rows) p.lse[((i64)x.b * p.Hq + x.head + head) * p.at.T + x.t] = empty ? -inf() : largest + logf(total);
}

// Probabilities of a warp's heads, 64 tokens a row: K-major for the second product
__device__ __forceinline__ void store_probabilities(u32 weights, const float (&s)[N / 2], int warp, int lane) {
  const u32 row = lane & 7, to = weights + warp * 1024 + row * 128;
#pragma unroll
  for (int c = 0; c < 8; c += 4)
    stmatrix_at(to + ((c + (lane >> 3) ^ row) << 4), pack<KIND>(s[4 * c], s[4 * c + 1]), pack<KIND>(s[4 * c + 4], s[4 * c + 5]), pack<KIND>(s[4 * c + 8], s[4 * c + 9]), pack<KIND>(s[4 * c + 12], s[4 * c + 13]));
}

// Hears of what has landed and says so, with the fence that the tensor cores ask for: between products it would hold them up. Of the query, too: nobody gives back what was not
// announced, so that no slot is filled twice before the herald heard of it.
__device__ __forceinline__ void herald(unsigned char* raw, u32 bars) {
  u32 slot = 0, phase = 0, news = 0, unused = 0, patience = PATIENCE;
  const auto announce = [&](int slots) {
    for (int n = 0; n < slots; n++) {
      bar_wait(FULL(slot), phase, patience);
      advance<SLOTS>(slot, phase);
    }
    shared_to_copy_engine();
    bar_arrive(LANDED(news));
    advance<NEWS>(news, unused);
  };
  for (int left = 0; left >= 0;) {
    announce(QUERY_SLOTS);
    do {
      bar_wait(FULL(slot), phase, patience);
      left = ((const Found*)(raw + FOUND))[slot].left;
      for (int n = 0; n < 3; n++) announce(3);
    } while (left > 0);
  }
}

// Zeros, too, have registers of their own from here on: a product takes four that stand side by side, and would wait for their copies.
__device__ __forceinline__ void hold(u32 (&a)[4]) { asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3])); }

// The query of a warp's heads from the ring: A of the products over 16 columns each
__device__ __forceinline__ void take_query(u32 base, u32 begin, u32 (&q)[36][4], int warp, int lane) {
  const u32 row = warp * 8 + (lane & 7), here = base + row * 128;
#pragma unroll
  for (int c = 0; c < 9; c++) {
    const u32 from = here + slot_after(begin, c * HEADS / N) * SLOT + c * HEADS % N * 128;
#pragma unroll
    for (int k = 0; k < 4; k += 2) {
      u32 x[4] = {};
      if (warp < WARPS) ldmatrix_at(x, from + ((2 * k + (lane >> 3) ^ row & 7) << 4));
#pragma unroll
      for (int i = 0; i < 4; i++) { q[4 * c + k + i / 2][i % 2 * 2] = x[i]; q[4 * c + k + i / 2][i % 2 * 2 + 1] = 0; }
      hold(q[4 * c + k]);
      hold(q[4 * c + k + 1]);
    }
  }
}

__device__ __forceinline__ void scores(const Params& p, unsigned char* raw, u32 base, u32 bars) {
  const int tid = threadIdx.x % 128, warp = uniform(tid / 32), lane = tid & 31, head = warp * 8 + lane / 4;
  u32 slot = 0, phase = 0, news = 0, heard = 0, made = 0, turn = 1, patience = PATIENCE;
  for (int left = 0; left >= 0;) {
    bar_wait(LANDED(news), heard, patience);
    advance<NEWS>(news, heard);
    u32 q[36][4];
    take_query(base, slot, q, warp, lane);
    __syncwarp();
    for (int n = 0; n < QUERY_SLOTS; n++) {
      if (lane == 0) bar_arrive(FREE(slot));
      advance<SLOTS>(slot, phase);
    }
    Head h = {-inf(), LOWEST, 0.f, false};
    bool first = true;
    do {
      const u32 begin = uniform(slot);
      float s[N / 2];
      hold(s);
#pragma unroll
      for (int c = 0; c < 9; c++) {
        if (c % 3 == 0) {
          bar_wait(LANDED(news), heard, patience);
          advance<NEWS>(news, heard);
          wgmma_fence();
        }
        const u64 keys = descriptor_of(base + slot_after(begin, c) * SLOT, 16, 1024, SWIZZLE_128);
#pragma unroll
        for (int k = 0; k < 4; k++) wgmma<KIND, K_MAJOR>(s, q[4 * c + k], keys + 2 * k, c || k);
      }
      wgmma_commit();
      const Found found = ((const Found*)(raw + FOUND))[begin];
      left = uniform(found.left);
      slot = slot_after(slot, 9);
      bar_wait(DONE(made), turn, patience);
      wgmma_wait<0>(); hold(s);
      __syncwarp();
      if (lane == 0) bar_arrive(FREE(slot_after(begin, 8)));  // the last columns are no values
      if (warp < WARPS) {
        if ((found.words[0] & found.words[1]) != ~0u)
#pragma unroll
          for (int c = 0; c < 8; c++)
#pragma unroll
            for (int e = 0; e < 2; e++)
              if (!(found.words[c / 4] >> (c % 4 * 8 + 2 * (lane & 3) + e) & 1)) s[4 * c + e] = -inf();
        float factor;
        const bool moved = probabilities(s, h, factor, p.scale2);
        store_probabilities(base + WEIGHTS + made * CHUNK, s, warp, lane);
        if (lane % 4 == 0) ((float*)(raw + FACTORS))[made * HEADS + head] = factor;
        if (lane == 0) ((Made*)(raw + MADE))[made].moved[warp] = moved && !first;
        if (left <= 0) finish(p, Item(p, found.item), (float*)(raw + INVERSE) + made * HEADS, h, head, lane);
      }
      if (tid == 0) { ((Made*)(raw + MADE))[made].left = left; ((Made*)(raw + MADE))[made].item = found.item; }
      bar_arrive(READY(made));
      advance<2>(made, turn);
      first = false;
    } while (left > 0);
  }
}

// Which head a lane's sums with index 4 j + e (and + 2) are of, i = 2 j + e
__device__ __forceinline__ int head_of(int lane, int i) { return i / 2 * 8 + 2 * (lane & 3) + (i & 1); }

// Sums out through slots whose values nobody needs any more, eight heads each: rows of a head, coalesced.
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
      const u32 to = base + slot_after(slot, j + part) * SLOT + row * 1024 + ((8 * c + 2 * warp + (lane >> 3 & 1) ^ row) << 4);
      const int j2 = HEADS == 8 ? j : j + 1;
      const float *y = &o[c][4 * j], *z = &o[c][4 * j2], *fy = &f[2 * j], *fz = &f[2 * j2];
      stmatrix_transposed_at(to, pack<KIND>(y[0] * fy[0], y[1] * fy[1]), pack<KIND>(y[2] * fy[0], y[3] * fy[1]), pack<KIND>(z[0] * fz[0], z[1] * fz[1]), pack<KIND>(z[2] * fz[0], z[3] * fz[1]));
    }
  named_sync(2, 128);
  char* out = (char*)p.out + (((i64)x.b * p.Hq + x.head) * p.at.T + x.t) * 1024 + tid % 64 * 16;
#pragma unroll 4
  for (int head = tid / 64; head < x.rows; head += 2)
    *(uint4*)(out + (i64)head * p.at.T * 1024) = *(const uint4*)(raw + slot_after(slot, head / 8) * SLOT + (head & 7) * 1024 + (tid % 64 ^ (head & 7)) * 16);
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
      bool moved = false;
      for (int w = 0; w < WARPS; w++) moved |= step.moved[w] != 0;
      if (moved) {
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
      const int kept = left <= 0 ? HEADS / 8 : 0;  // slots that the sums leave through
#pragma unroll
      for (int c = 0; c < 8; c++) hold(o[c]);
#pragma unroll
      for (int c = 0; c < 8; c++) {
        wgmma_fence();
        const u64 v = descriptor_of(base + slot_after(begin, c) * SLOT, SLOT, 1024, SWIZZLE_128);
#pragma unroll
        for (int k = 0; k < 4; k++) wgmma<KIND, K_MAJOR, M_MAJOR>(o[c], v + k * 128, weights + 2 * k, !first || k);
        wgmma_commit();
        if (c) {
          wgmma_wait<1>();
          if (lane == 0 && c - 1 >= kept) bar_arrive(FREE(slot_after(begin, c - 1)));
        }
      }
      wgmma_wait<0>();
#pragma unroll
      for (int c = 0; c < 8; c++) hold(o[c]);
      if (left <= 0) store(p, raw, base, o, (const float*)(raw + INVERSE) + made * HEADS, Item(p, step.item), begin, tid);
      __syncwarp();
      if (lane == 0) {
        for (int c = 0; c < kept; c++) bar_arrive(FREE(slot_after(begin, c)));
        bar_arrive(FREE(slot_after(begin, 7)));
        bar_arrive(DONE(made));
      }
      first = false;
      slot = slot_after(slot, 9);
      advance<2>(made, turn);
    } while (left > 0);
  }
}

extern "C" __global__ void __launch_bounds__(512, 1) gather_tokens_hopper(const __grid_constant__ Params p) {
  SWIZZLED_SHARED(raw);
  const u32 base = shared_address(raw), bars = base + BARS;
  const int group = uniform(threadIdx.x / 128);
  if (threadIdx.x == 0) {
    for (int s = 0; s < SLOTS; s++) { bar_init(FULL(s), 129); bar_init(FREE(s), 4); }
    for (int s = 0; s < 2; s++) { bar_init(READY(s), 128); bar_init(DONE(s), 4); }
    for (int s = 0; s < NEWS; s++) bar_init(LANDED(s), 1);
    bar_fence();
  }
  __syncthreads();
  if (group == 0) {
    fewer_registers<72>();
    gather(p, raw, base, bars);
  } else if (group == 1) {
    more_registers<224>();
    scores(p, raw, base, bars);
  } else if (group == 2) {
    more_registers<192>();
    values(p, raw, base, bars);
  } else {
    fewer_registers<24>();
    if (threadIdx.x == 384) herald(raw, bars);
  }
}
