// importance_topk in one launch on Hopper's own instructions: shares, sums over blocks and the choice; nothing of it but the answer is ever in device memory.
//
// A product holds 64 compressed keys (rows) x the heads of a few neighbouring queries (128 columns), so that a share's sum over heads stays in a thread's registers
// and ends in exchanges over four lanes; what a key that nobody sees holds stays in its own row. A warpgroup walks the keys of its queries once: while a tile is
// multiplied, the exponentials of the one before are made. Shares pass through a ring in shared memory, where each thread sums some of the blocks that are complete; the
// sums of all blocks stay there until each warp has chosen for its queries. Two warpgroups are at work on a multiprocessor, so that one chooses while the other multiplies:
// two blocks of threads, or, where queries and sums leave no room for that, one whose groups share each tile of keys.
// Defines: KIND, WIDTH (D rounded up to 16), HEADS (of a group, at most 32), STEP and REACH (strides of a block and of a compressed key, together at most 66), STAGES,
// GROUPS (1 or 2).
#include "quad.cuh"
#include "select.cuh"
#include "wgmma.cuh"

#ifndef KIND
#define KIND BFLOAT16
#endif
#ifndef WIDTH
#define WIDTH 128
#endif
#ifndef HEADS
#define HEADS 16
#endif
#ifndef STEP
#define STEP 4
#endif
#ifndef REACH
#define REACH 2
#endif
#ifndef STAGES
#define STAGES 4
#endif
#ifndef GROUPS
#define GROUPS 2
#endif

constexpr int HP = HEADS > 16 ? 32 : HEADS > 8 ? 16 : 8, QB = 128 / HP, KEYS = 64;  // columns of a query, queries of a warpgroup, keys of a tile
constexpr int SLABS = (WIDTH + 63) / 64, Q_SLAB = 128 * 128, K_SLAB = KEYS * 128, QUERY_BYTES = SLABS * Q_SLAB, KEY_BYTES = SLABS * K_SLAB;
constexpr int RING = 4 * KEYS, RING_ROW = RING + 9;  // shares: the tile being written, the one being summed and the one before; rows spread over the banks
constexpr int EACH = QB / 4, PAIR = EACH < 2 ? 1 : 2;   // queries of a warp, and those it chooses for at once
constexpr u32 TAKEN = ~0u;                            // in place of a sum: the block has been chosen

struct Params {
  TensorMap q, k;      // [B, Hk, T, G, D], boxes of QB queries x HP heads x 64 columns; [B, Hk, C, D], boxes of 64 keys x 64 columns
  const float* lse; const int* key_end; const int* block_end;
  int* out; int* lengths; float* chosen;
  int Hk, T, C, blocks, row, items, top_k, force_first, force_last, take_all;  // row: floats from one query's sums to the next one's
  float factor;        // the scale, for base 2
};

// n queries of a key head, QB for each warpgroup; late ones first, because they see most
struct Place {
  int head, t, n;
  __device__ __forceinline__ Place(const Params& p, int number) {
    constexpr int ALL = GROUPS * QB;
    const int pieces = (p.T + ALL - 1) / ALL, heads = p.items / pieces;
    head = number % heads; t = (pieces - 1 - number / heads) * ALL; n = imin(ALL, p.T - t);
  }
};
// Lane i < n keeps what query i asks for: blocks and compressed keys before these (no keys where all blocks are taken); tiles and most: what the queries together ask for
struct Item : Place {
  int blocks, keys, tiles, most;
  using Place::Place;
};

__device__ __forceinline__ Item open_item(const Params& p, int number) {
  const int lane = threadIdx.x & 31;
  Item x(p, number);
  x.blocks = x.keys = 0;
  if (lane < x.n) {
    const i64 row = (i64)x.head * p.T + x.t + lane;
    const int keys = __ldg(p.key_end + row);
    x.blocks = clamp(__ldg(p.block_end + row), 0, p.blocks);
    if (!p.take_all || x.blocks > p.top_k) x.keys = clamp(keys, 0, p.C);
  }
  x.tiles = ((int)warp_max((u32)x.keys) + KEYS - 1) / KEYS;
  x.most = (int)warp_max((u32)x.blocks);
  return x;
}

// This lane's lse of a warpgroup's columns: heads 8 c + 2 me and the next of each query
__device__ __forceinline__ void load_lse(const Params& p, int number, int group, float (&w)[32]) {
  const Place x(p, number);
  const int me = threadIdx.x & 3;
#pragma unroll
  for (int c = 0; c < 16; c++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int query = imin(group * QB + 8 * c / HP, x.n - 1), head = imin(8 * c % HP + 2 * me + e, HEADS - 1);
      w[2 * c + e] = __ldg(p.lse + ((i64)x.head * HEADS + head) * p.T + x.t + query);
    }
}

// Shares of a tile's keys, summed over heads, into the ring; `key` is this lane's first
__device__ __forceinline__ void store_shares(const float (&a)[64], const float (&w)[32], float factor, float* ring, int key) {
  const int me = threadIdx.x & 3;
#pragma unroll
  for (int g = 0; g < EACH; g++) {
    float r[4][2], z[2];
#pragma unroll
    for (int q = 0; q < 4; q++) {
#pragma unroll
      for (int i = 0; i < HP / 4; i++) {
        const int column = (4 * g + q) * (HP / 8) + i / 2, e = i % 2;
        const bool there = HEADS % HP == 0 || 8 * (i / 2) + 2 * me + e < HEADS;  // a padded head must not turn an infinite key into NaN
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const float part = there ? ex2(fmaf(a[4 * column + 2 * h + e], factor, -w[2 * column + e])) : 0.f;
          r[q][h] = i ? r[q][h] + part : part;
        }
      }
    }
    exchange(r, me, z);
    float* to = ring + (4 * g + me) * RING_ROW;
    to[key & (RING - 1)] = z[0];
    to[(key + 8) & (RING - 1)] = z[1];
  }
}

// Blocks first .. last - 1 of all queries: each compressed key before the query's end counts as often as its strides lie in the block. This thread's query is thread % QB.
__device__ __forceinline__ void sum_blocks(const float* ring, float* sums, int row, int first, int last, int end, int thread) {
  const float* shares = ring + thread % QB * RING_ROW;
#pragma unroll 1
  for (int j = first + thread / QB; j < last; j += 128 / QB) {
    const int key = j * STEP, at = key & (RING - 1);
    float total = 0.f;
#pragma unroll
    for (int i = 1 - REACH; i < STEP; i++) {
      const int where = RING % STEP || i < 0 ? (key + i) & (RING - 1) : at + i;
      if ((i >= 0 || key + i >= 0) && key + i < end) total = fmaf((float)imin(imin(i + REACH, STEP - i), imin(STEP, REACH)), shares[where], total);
    }
    sums[thread % QB * row + j] = total >= 0.f ? total : nan_();
  }
}

// Sorts like the sum; 0: not to be chosen (NaN, or chosen before)
__device__ __forceinline__ u32 rank_of(u32 bits) { return bits <= 0x7f800000u ? bits + 1 : 0; }

// Forced blocks around the chosen ones, which are ordered by counting; then -1
__device__ __forceinline__ void write_choice(const Params& p, const Choice& c, i64 row, const u32* sums, int at, u32 kept, int rounds) {
  const int lane = threadIdx.x & 31, chosen = __popc(__ballot_sync(~0u, kept != 0)), n = c.nfirst + chosen + c.nlast;
  int before = c.nfirst;
  for (int i = 0; i < rounds; i++) {
    const int other = __shfl_sync(~0u, at, i);
    if (i < chosen && other < at) before++;
  }
  int* out = p.out + row * p.top_k;
  float* scores = p.chosen ? p.chosen + row * p.top_k : nullptr;
  const auto put = [&](int i, int j, u32 bits) { out[i] = j; if (scores) scores[i] = __int_as_float((int)bits); };
  if (kept) put(before, at, kept - 1);
  for (int i = lane; i < c.nfirst; i += 32) put(i, i, sums[i]);
  for (int i = lane; i < c.nlast; i += 32) put(c.nfirst + chosen + i, c.last + i, sums[c.last + i]);
  for (int i = n + lane; i < p.top_k; i += 32) put(i, -1, 0xff800000u);
  if (lane == 0) p.lengths[row] = n;
}

// A warp chooses for PAIR queries at once: each lane knows the best of a run of blocks; the best of all is taken and its run looked through again, at most 32 times.
__device__ __forceinline__ void choose(const Params& p, const Item& x, u32* sums, int group, int first) {
  const int lane = threadIdx.x & 31, rows = (x.most + 31) / 32, words = (rows + 31) / 32;  // a run is `words` rows of 32 blocks
  Choice c[PAIR];
  u32 best[PAIR], kept[PAIR], *mine[PAIR];  // kept, at: what round number `lane` took
  int at[PAIR], rounds = 0;
#pragma unroll
  for (int u = 0; u < PAIR; u++) {
    mine[u] = sums + (first + u) * p.row;
    c[u] = choice_of(0, __shfl_sync(~0u, x.blocks, group * QB + first + u), p.top_k, p.force_first, p.force_last, p.take_all);
    if (c[u].lo < c[u].hi) rounds = imax(rounds, c[u].k);
    best[u] = kept[u] = at[u] = 0;
  }
  const auto look = [&](int u, int j) { return j >= c[u].lo && j < c[u].hi ? rank_of(mine[u][j]) : 0; };
  if (rounds)
#pragma unroll 4
    for (int row = 0; row < rows; row++)
#pragma unroll
      for (int u = 0; u < PAIR; u++) {
        const u32 top = warp_max(look(u, row * 32 + lane));
        if (row >= lane * words && row < (lane + 1) * words && top > best[u]) best[u] = top;
      }
  for (int round = 0; round < rounds; round++) {
    u32 top[PAIR], rest[PAIR];
    int run[PAIR], found[PAIR];
#pragma unroll
    for (int u = 0; u < PAIR; u++) {
      top[u] = warp_max(best[u]);
      run[u] = __ffs(__ballot_sync(~0u, best[u] == top[u])) - 1;
      rest[u] = 0; found[u] = top[u] && round < c[u].k ? -1 : 0;  // -1: still to be found
    }
    for (int i = 0; i < words; i++)
#pragma unroll
      for (int u = 0; u < PAIR; u++) {
        const int j = (run[u] * words + i) * 32 + lane;
        const u32 rank = look(u, j), alike = __ballot_sync(~0u, found[u] < 0 && rank == top[u]);
        const bool taken = alike && lane == __ffs(alike) - 1;  // the smaller index first
        if (taken) mine[u][j] = TAKEN;
        if (alike) found[u] = j - lane + __ffs(alike) - 1;
        if (!taken && rank > rest[u]) rest[u] = rank;
      }
#pragma unroll
    for (int u = 0; u < PAIR; u++) {
      rest[u] = warp_max(rest[u]);
      if (lane == run[u]) best[u] = rest[u];
      if (lane == round && top[u] && round < c[u].k) { at[u] = found[u]; kept[u] = top[u]; }
    }
    __syncwarp();
  }
#pragma unroll
  for (int u = 0; u < PAIR; u++)
    if (group * QB + first + u < x.n) write_choice(p, c[u], (i64)x.head * p.T + x.t + group * QB + first + u, mine[u], at[u], kept[u], rounds);
}

struct Bars {
  u32 at;
  __device__ __forceinline__ u32 full(int s) const { return at + 8 * s; }
  __device__ __forceinline__ u32 free(int s) const { return at + 8 * (STAGES + s); }
  __device__ __forceinline__ u32 full_q(int g) const { return at + 16 * STAGES + 8 * g; }
  __device__ __forceinline__ u32 free_q(int g) const { return at + 16 * STAGES + 8 * (GROUPS + g); }
};

// One warp brings the keys of all items, one for each warpgroup its queries: no group waits for what another still multiplies.
__device__ __forceinline__ void load_keys(const Params& p, u32 keys, Bars bars) {
  u32 patience = PATIENCE, s = 0, phase = 0;
  for (int number = blockIdx.x; number < p.items; number += gridDim.x) {
    const Item x = open_item(p, number);
    if (threadIdx.x % 32) continue;
    for (int tile = 0; tile < x.tiles; tile++) {
      bar_wait(bars.free(s), phase ^ 1, patience);
      bar_expect(bars.full(s), KEY_BYTES);
#pragma unroll
      for (int c = 0; c < SLABS; c++) tma_load(keys + s * KEY_BYTES + c * K_SLAB, &p.k, bars.full(s), 64 * c, tile * KEYS, x.head % p.Hk, x.head / p.Hk);
      advance<STAGES>(s, phase);
    }
  }
}
__device__ __forceinline__ void load_queries(const Params& p, u32 queries, Bars bars, int group) {
  u32 patience = PATIENCE, m = 0;
  for (int number = blockIdx.x; number < p.items; number += gridDim.x) {
    const Item x = open_item(p, number);
    if (threadIdx.x % 32 || !x.tiles) continue;
    bar_wait(bars.free_q(group), (m++ & 1) ^ 1, patience);
    bar_expect(bars.full_q(group), QUERY_BYTES);
#pragma unroll
    for (int c = 0; c < SLABS; c++) tma_load(queries + c * Q_SLAB, &p.q, bars.full_q(group), 64 * c, 0, x.t + group * QB, x.head % p.Hk, x.head / p.Hk);
  }
}

__device__ __forceinline__ void multiply_items(const Params& p, u32 queries, u32 keys, Bars bars, float* ring, float* sums, int group) {
  const int tid = threadIdx.x % 128, warp = uniform(tid / 32), lane = tid & 31, first = warp * 16 + lane / 4;
  const u64 dq = descriptor(queries), dk = descriptor(keys);
  float a[64], b[64], w[32];
  u32 patience = PATIENCE, s = 0, phase = 0, done = 0, m = 0;  // stage of the next product, stage of the one before
  load_lse(p, blockIdx.x, group, w);
  Item x = open_item(p, blockIdx.x);
  for (int number = blockIdx.x; number < p.items; number += gridDim.x) {
    const int end = __shfl_sync(~0u, x.keys, group * QB + tid % QB);
    int summed = 0;
    const auto multiply = [&](float (&d)[64]) {
      bar_wait(bars.full(s), phase, patience);
      const u64 at = dk + (u64)(uniform(s) * (KEY_BYTES >> 4));
      hold(d);
      wgmma_fence();
#pragma unroll
      for (int c = 0; c < WIDTH / 16; c++) wgmma<KIND, K_MAJOR>(d, at + c / 4 * (K_SLAB >> 4) + c % 4 * 2, dq + c / 4 * (Q_SLAB >> 4) + c % 4 * 2, c != 0);
      wgmma_commit();
      advance<STAGES>(s, phase);
    };
    const auto share = [&](float (&d)[64], int tile) {
      hold(d);
      if (tid == 0) bar_arrive(bars.free(done));
      if (++done == STAGES) done = 0;
      if (tid == 0 && tile + 1 == x.tiles) bar_arrive(bars.free_q(group));
      store_shares(d, w, p.factor, ring, tile * KEYS + first);
      named_sync(1 + group, 128);
      const int complete = imin((tile + 1) * KEYS / STEP, x.most);
      sum_blocks(ring, sums, p.row, summed, complete, end, tid);
      summed = complete;
    };
    if (x.tiles) {
#pragma unroll
      for (int i = 0; i < 32; i++) w[i] *= LOG2E;
      bar_wait(bars.full_q(group), m++ & 1, patience);
      multiply(a);
      for (int tile = 0;;) {
        if (tile + 1 == x.tiles) { wgmma_wait<0>(); share(a, tile); break; }
        multiply(b);
        wgmma_wait<1>();
        share(a, tile++);
        if (tile + 1 == x.tiles) { wgmma_wait<0>(); share(b, tile); break; }
        multiply(a);
        wgmma_wait<1>();
        share(b, tile++);
      }
    }
    sum_blocks(ring, sums, p.row, summed, x.most, end, tid);
    const int next = imin(number + (int)gridDim.x, p.items - 1);
    load_lse(p, next, group, w);  // on its way while this item's blocks are chosen
    const Item then = open_item(p, next);
    named_sync(1 + group, 128);
#pragma unroll 1
    for (int query = EACH * warp; query < EACH * (warp + 1); query += PAIR) choose(p, x, (u32*)sums, group, query);
    named_sync(1 + group, 128);
    x = then;
  }
}

extern "C" __global__ void __launch_bounds__(128 * (GROUPS + 1), 3 - GROUPS) importance_topk_hopper(const __grid_constant__ Params p) {
  SWIZZLED_SHARED(raw);
  const u32 base = uniform(shared_address(raw)), keys = base + GROUPS * QUERY_BYTES;
  const Bars bars = {keys + STAGES * KEY_BYTES};
  const int group = uniform(threadIdx.x / 128), warp = uniform(threadIdx.x / 32 - 4 * GROUPS);
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) { bar_init(bars.full(s), 1); bar_init(bars.free(s), GROUPS); }
    for (int g = 0; g < GROUPS; g++) { bar_init(bars.full_q(g), 1); bar_init(bars.free_q(g), 1); }
    bar_fence();
  }
  __syncthreads();
  if (group == GROUPS) {
    fewer_registers<40>();
    if (warp == 0) load_keys(p, keys, bars);
    else if (warp <= GROUPS) load_queries(p, base + (warp - 1) * QUERY_BYTES, bars, warp - 1);
  } else {
    more_registers<GROUPS == 2 ? 232 : 216>();
    float* ring = (float*)(raw + GROUPS * QUERY_BYTES + STAGES * KEY_BYTES + 16 * (STAGES + GROUPS)) + group * QB * (RING_ROW + p.row);
    multiply_items(p, base + group * QUERY_BYTES, keys, bars, ring, ring + QB * RING_ROW, group);
  }
}
