// Attention over selected keys for few heads, by Hopper's own instructions: keys of width 576 whose first 512 columns are the values (DeepSeek's latent), float16 and
// bfloat16. Tokens are the rows of the second product, heads its columns, so that HEADS = 8, 16 or 32 are not padded to 64; of the first tokens (gather_tokens_by_token.cuh) or, with 32
// heads, heads, each of them twice (gather_tokens_by_head.cuh):
//   S^T [64 tokens, HEADS] = K Q^T or S [2 x 32, 64 tokens] = Q K^T        O^T [512, HEADS] += V^T P^T
//
// Persistent, four or five warpgroups: one gathers, one or two (GROUPS) make scores and probabilities of 64 tokens at a time, one holds the sums, a thread of the last announces what has
// landed.
// A slot of the ring is a third of a step, 192 columns of 64 tokens: scores begin when the first columns are there, values give back third by third, and memory that is no whole step
// still holds what is on its way. With slots of 32 whole tokens a step's way from its gathering to its values bound the kernel; slots of 64 columns ask for three times the waits and
// arrivals, which cost as much as products. The query passes through the ring, too.
#include "selections.cuh"
#include "wgmma.cuh"
#include "rounded.cuh"
#define RARE(x) __builtin_expect(x, 0)

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

constexpr int N = 64, PART = N * 128, SLOT = 3 * PART, SLOTS = HEADS == 32 ? 9 : 8, CHUNK = HEADS * 128;  // PART, CHUNK: 64 columns of a slot and of the query
constexpr int GROUPS = HEADS == 32 ? 1 : 2, MOVERS = HEADS == 32 ? 4 : 1;  // groups that make scores; who of one says for itself that its references moved
constexpr int QUERY_SLOTS = (9 * CHUNK + SLOT - 1) / SLOT, QUERY_PARTS = (9 * CHUNK + PART - 1) / PART, COLUMNS = HEADS / 4;
constexpr int QUERY = SLOTS * SLOT, WEIGHTS = QUERY + (HEADS == 32 ? 0 : 9 * CHUNK), TOPS = WEIGHTS + 2 * CHUNK, ENDS = TOPS + 4 * GROUPS * HEADS * 4;
constexpr int FACTORS = ENDS + 4 * GROUPS * HEADS * 8, INVERSE = FACTORS + 2 * HEADS * 4, REFERENCES = INVERSE + 2 * HEADS * 4;
constexpr int FOUND = REFERENCES + HEADS * 4, ABOUT = FOUND + SLOTS * 16, MADE = ABOUT + 16, BARS = MADE + 2 * (GROUPS == 1 ? 32 : 16);
constexpr float LOWEST = -3.4028235e38f, LAZY = 8.f, WIDE = 1024.f;  // as in latent_hopper.cuh
#define FULL(s) (bars + 8 * (s))
#define FREE(s) (bars + 8 * (SLOTS + (s)))
#define LANDED(s) (bars + 8 * (2 * SLOTS + (s)))
#define READY(s) (bars + 8 * (3 * SLOTS + (s)))
#define DONE(s) (bars + 8 * (3 * SLOTS + 2 + (s)))

enum { OWN = 1, VALUES = 3, QUERY_THERE, QUERY_FREE };  // named barriers: OWN and the next are the two groups' that make scores

// Of a step's 64 tokens those that are seen; how many steps of the item follow, -1: no step at all. With two groups of a query: how many steps; whether another item follows.
struct Found { u32 words[2]; int left, item; };
struct alignas(16) Made { int moved[MOVERS], left, item, reference; };  // of a step's probabilities; moved: earlier sums take a factor first; reference: two groups' is a new one
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

// Whether it has come already: asked in front of products and answered behind them, where a wait would take 90 clocks even so. The wait is then for what had not come.
__device__ __forceinline__ u32 bar_test(u32 bar, u32 parity) {
#ifdef SPARSETILE_EMULATE
  return 0;
#else
  u32 there;
  asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}" : "=r"(there) : "r"(bar), "r"(parity) : "memory");
  return there;
#endif
}
__device__ __forceinline__ void bar_wait_unless(u32 there, u32 bar, u32 parity, u32& patience) {  // one asm, as bar_wait
#ifdef SPARSETILE_EMULATE
  bar_wait(bar, parity, patience);
#else
  asm volatile("{.reg .pred p, q; .reg .u32 t, u; setp.ne.u32 p, %3, 0; @p bra E; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; @p bra E; mov.u32 t, %%clock;"
    "W: mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; @p bra E; mov.u32 u, %%clock; sub.u32 u, u, t; setp.lt.u32 q, u, %0; @q bra W; mov.u32 %0, 0; E:}"
    : "+r"(patience) : "r"(bar), "r"(parity), "r"(there) : "memory");
#endif
}

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
        if (tid == 0) {
          if (GROUPS == 2 && part < 3) ((Found*)(raw + FOUND))[slot] = {{0, 0}, left, it + (int)gridDim.x < p.items};
          bar_arrive(FULL(slot));
        }
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

// Which head a lane's sums with index 4 j + e and 4 j + 2 + e are of, i = 2 j + e
__device__ __forceinline__ int head_of(int lane, int i) { return i / 2 * 8 + 2 * (lane & 3) + (i & 1); }

#if HEADS == 32
#include "gather_tokens_by_head.cuh"
#else
#include "gather_tokens_by_token.cuh"
#endif

// Sums out through slots whose values nobody needs any more, eight heads to a part: rows of a head, coalesced.
__device__ __forceinline__ void store(const Params& p, unsigned char* raw, u32 base, const float (&o)[8][HEADS / 2], const float* inverse, const Item& x, u32 slot, int tid) {
  const int warp = tid / 32, lane = tid & 31, row = lane & 7, part = HEADS == 8 ? 0 : lane >> 4;
  float f[COLUMNS];
#pragma unroll
  for (int i = 0; i < COLUMNS; i++) f[i] = inverse[head_of(lane, i)];
  named_sync(VALUES, 128);
#pragma unroll
  for (int c = 0; c < 8; c++)
#pragma unroll
    for (int j = 0; j < HEADS / 8; j += 2) {
      const u32 to = base + part_after(slot, j + part) + row * 1024 + ((8 * c + 2 * warp + (lane >> 3 & 1) ^ row) << 4);
      const int j2 = HEADS == 8 ? j : j + 1;
      const float *y = &o[c][4 * j], *z = &o[c][4 * j2], *fy = &f[2 * j], *fz = &f[2 * j2];
      stmatrix_transposed_at(to, pack<KIND>(y[0] * fy[0], y[1] * fy[1]), pack<KIND>(y[2] * fy[0], y[3] * fy[1]), pack<KIND>(z[0] * fz[0], z[1] * fz[1]), pack<KIND>(z[2] * fz[0], z[3] * fz[1]));
    }
  named_sync(VALUES, 128);
  char* out = (char*)p.out + (((i64)x.b * p.Hq + x.head) * p.at.T + x.t) * 1024 + tid % 64 * 16;
#pragma unroll 4
  for (int head = tid / 64; head < x.rows; head += 2)
    *(uint4*)(out + (i64)head * p.at.T * 1024) = *(const uint4*)(raw + part_after(slot, head / 8) + (head & 7) * 1024 + (tid % 64 ^ (head & 7)) * 16);
}

__device__ __forceinline__ void values(const Params& p, unsigned char* raw, u32 base, u32 bars) {
  const int tid = threadIdx.x % 128, lane = tid & 31;
  u32 slot = 0, made = 0, turn = 0, patience = PATIENCE, ready = 0;
  float o[8][HEADS / 2];
  for (int left = 0; left >= 0;) {
    slot = slot_after(slot, QUERY_SLOTS);
    bool first = true;
    do {
      bar_wait_unless(ready, READY(made), turn, patience);
      const Made step = ((const Made*)(raw + MADE))[made];
      left = uniform(step.left);
      int moved = 0;
#pragma unroll
      for (int w = 0; w < MOVERS; w++) moved |= step.moved[w];
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
        if (c == 7) ready = bar_test(READY(made ^ 1), made ? turn ^ 1 : turn);
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

extern "C" __global__ void __launch_bounds__((3 + GROUPS) * 128, 1) gather_tokens_hopper(const __grid_constant__ Params p) {
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
  } else if (GROUPS == 1 ? group == 1 : group < 3) {
    if constexpr (GROUPS == 1) more_registers<232>();  // two stay with the 96 of the launch
    scores(p, raw, base, bars, group - 1);
  } else if (group == GROUPS + 1) {
    more_registers<GROUPS == 1 ? 184 : 192>();
    values(p, raw, base, bars);
  } else {
    fewer_registers<24>();
    if (threadIdx.x == (GROUPS + 2) * 128) herald(raw, bars);
  }
}
