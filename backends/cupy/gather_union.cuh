// What the kernels share in which neighbouring queries read selected blocks of keys once: an item is the neighbouring queries of one key head that 15 warps hold, 16 heads
// to a warp. One more warp makes the union of their lists, block by block in ascending order with a bit for each query, and the copy engine brings each block of it once;
// a warp multiplies the blocks that its own query chose, whatever its neighbours did. Sixteen warps in all: a seventeenth would leave each 96 registers, as many as its sums and scores.
// Why not warpgroup products: their 64 rows are four queries, which would all multiply every block of the union; `mma.sync` has the 16 rows of one.
// Include after `struct Params` (k, v, list, at, Hq, group, parts, tiles, items, span); defines KIND, WIDTH, VALUES, KEYS, STAGES, and OWN_SLABS, what a warp keeps of its query.
#pragma once
#include "hopper.cuh"
#include "selections.cuh"
#include "tiles.cuh"

constexpr int WARPS = 15, THREADS = 32 * (WARPS + 1), WINDOW = 1024, MOST = 1024;  // blocks that a table holds; blocks that a list may stand for
constexpr int SLAB = KEYS * 128, OWN_SLAB = 16 * 128, K_SLABS = (WIDTH + 63) / 64, V_SLABS = (VALUES + 63) / 64, STAGE = (K_SLABS + V_SLABS) * SLAB;  // a slab: rows of 64 columns
constexpr int OWN = (OWN_SLABS) * OWN_SLAB, QUERIES = STAGES * STAGE, TABLE = QUERIES + WARPS * OWN, WAITING = TABLE + WINDOW * 4, FOUND = WAITING + WARPS * MOST / 8, BARS = FOUND + STAGES * 8;
#define FULL(s) (bars + 8 * (s))
#define FREE(s) (bars + 8 * (STAGES + (s)))

struct Found { int block; u32 queries; };  // what a stage holds, and a bit for each query that chose it
constexpr u32 END = 1u << 31;              // no block: the item is over

struct Item {
  int b, key_head, list, t;  // t: the first query
  __device__ __forceinline__ Item(const Params& p, int it) {
    const int x = p.items - 1 - it, y = x / p.tiles, heads = p.Hq / p.group;  // late queries have long rows: first
    t = (x - y * p.tiles) * (WARPS / p.parts);
    b = y / heads;
    key_head = y - b * heads;
    list = p.list.G == 1 ? 0 : key_head;
  }
};

// ---------------------------------------------------------------------------------------------------------------- bringing
// The block that step y of query r's list stands for, from the table's first on, or -1: no block, no key that the query sees, or one for another table.
__device__ __forceinline__ int block_of(const Params& p, const Item& x, int r, int y, int first) {
  if (x.t + r >= p.at.T) return -1;
  const Entries list(p.list, p.at, x.b, x.list, x.t + r);
  const int n = y / p.span;
  if ((i64)n * list.granularity >= list.slots) return -1;
  const int entry = __ldg(list.entries + n);
  if ((u32)entry >= (u32)list.blocks) return -1;
  const int block = entry * p.span + (y - n * p.span);
  return block - first < WINDOW && block < list.limit / KEYS + (list.limit % KEYS != 0) ? imax(block - first, -1) : -1;
}

// Sets the queries' bits of the blocks that they chose. A bit that is set already has to wait for the next round (an entry given twice counts twice): `waiting` keeps which.
// Whether any does.
__device__ __forceinline__ bool mark(const Params& p, const Item& x, int first, bool again, u32* table, u32* waiting) {
  constexpr int AHEAD = 8;  // entries a lane asks for at a time
  const int lane = threadIdx.x & 31, each = p.list.K * p.span, n = WARPS / p.parts * each;
  u32 any = 0;
#pragma unroll 1
  for (int from = 0; from < n; from += 32 * AHEAD) {
    int block[AHEAD], r[AHEAD];
#pragma unroll
    for (int j = 0; j < AHEAD; j++) {
      const int i = from + 32 * j + lane;
      r[j] = i / each;
      block[j] = i < n && (!again || waiting[i / 32] >> lane & 1) ? block_of(p, x, r[j], i - r[j] * each, first) : -1;
    }
#pragma unroll
    for (int j = 0; j < AHEAD; j++) {
      const u32 word = __ballot_sync(~0u, block[j] >= 0 && atomicOr(table + block[j], 1u << r[j]) >> r[j] & 1);
      if (lane == 0 && from + 32 * j < n) waiting[from / 32 + j] = word;
      any |= word;
    }
  }
  __syncwarp();
  return any;
}

struct Ring { u32 slot, phase, patience; };

// the blocks that the table holds, which is empty afterwards
__device__ __forceinline__ void bring_marked(const Params& p, const Item& x, unsigned char* raw, u32 base, u32 bars, Ring& ring, int first, int blocks, u32* table) {
  const int lane = threadIdx.x & 31;
#pragma unroll 1
  for (int at = 0; at < blocks; at += 32) {
    const u32 mine = table[at + lane];
    table[at + lane] = 0;
#pragma unroll 1
    for (u32 left = __ballot_sync(~0u, mine != 0); left; left &= left - 1) {
      const int from = __ffs(left) - 1, block = first + at + from;
      const u32 queries = __shfl_sync(~0u, mine, from), to = base + ring.slot * STAGE;
      bar_wait(FREE(ring.slot), ring.phase, ring.patience);
      if (lane == 0) {
        ((Found*)(raw + FOUND))[ring.slot] = {block, queries};
        bar_expect(FULL(ring.slot), STAGE);
#pragma unroll
        for (int c = 0; c < K_SLABS; c++) tma_load(to + c * SLAB, &p.k, FULL(ring.slot), 64 * c, block * KEYS, x.key_head, x.b);
#pragma unroll
        for (int c = 0; c < V_SLABS; c++) tma_load(to + (K_SLABS + c) * SLAB, &p.v, FULL(ring.slot), 64 * c, block * KEYS, x.key_head, x.b);
      }
      advance<STAGES>(ring.slot, ring.phase);
    }
  }
  __syncwarp();
}

__device__ __forceinline__ void bring(const Params& p, unsigned char* raw, u32 base, u32 bars) {
  const int lane = threadIdx.x & 31;
  u32 *table = (u32*)(raw + TABLE), *waiting = (u32*)(raw + WAITING);
  Ring ring = {0, 1, PATIENCE};
  for (int i = lane; i < WINDOW; i += 32) table[i] = 0;
  __syncwarp();
  for (int it = blockIdx.x; it < p.items && ring.patience; it += gridDim.x) {
    const Item x(p, it);
    const int limit = key_limit(p.at, x.b), blocks = limit / KEYS + (limit % KEYS != 0);
#pragma unroll 1
    for (int first = 0; first < blocks; first += WINDOW)
      for (bool more = false, again = false; !again || more; again = true) {
        more = mark(p, x, first, again, table, waiting);
        bring_marked(p, x, raw, base, bars, ring, first, imin(blocks - first, WINDOW), table);
      }
    bar_wait(FREE(ring.slot), ring.phase, ring.patience);
    if (lane == 0) {
      ((Found*)(raw + FOUND))[ring.slot] = {0, END};
      bar_arrive(FULL(ring.slot));
    }
    advance<STAGES>(ring.slot, ring.phase);
  }
}

// ---------------------------------------------------------------------------------------------------------------- multiplying
// Where a lane's 16 bytes of a fragment begin in a tile: row `r`, of two neighbouring pieces of 16 bytes the first or the second. Two pieces further is ^ 32 within 128 bytes.
__device__ __forceinline__ u32 piece(u32 tile, int r, int second) { return tile + r * 128 + ((second ^ (r & 7)) << 4); }

// c[n] = this warp's 16 rows of W columns times rows 8 n .. 8 n + 7 of a stage's tile
template <int W, int N> __device__ __forceinline__ void multiply_rows(float (&c)[N][4], u32 own, u32 tile) {
  const int lane = threadIdx.x & 31;
  const u32 a = piece(own, lane & 15, lane >> 4), b = piece(tile, (lane & 7) + (lane >> 4) * 8, lane >> 3 & 1);
#pragma unroll
  for (int n = 0; n < N; n++) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0.f;
#pragma unroll
  for (int k = 0; k < W / 16; k++) {
    u32 x[4];
    ldmatrix_at(x, (a ^ k % 4 * 32) + k / 4 * OWN_SLAB);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      u32 y[4];
      ldmatrix_at(y, (b ^ k % 4 * 32) + k / 4 * SLAB + n * 1024);
      mma<KIND>(c[n], x, y[0], y[1]);
      mma<KIND>(c[n + 1], x, y[2], y[3]);
    }
  }
}

// c += x, of 8 N keys, times their rows of a stage's tile, of which this query sees the first `seen`: what it does not see may hold anything
template <bool Masked, int M, int N> __device__ __forceinline__ void add_columns(float (&c)[M][4], const float (&x)[N][4], u32 tile, int seen) {
  const int lane = threadIdx.x & 31;
  const u32 b = piece(tile, lane & 15, lane >> 4);
#pragma unroll
  for (int k = 0; k < N / 2; k++) {
    const u32 a[4] = {pack<KIND>(x[2 * k][0], x[2 * k][1]), pack<KIND>(x[2 * k][2], x[2 * k][3]), pack<KIND>(x[2 * k + 1][0], x[2 * k + 1][1]), pack<KIND>(x[2 * k + 1][2], x[2 * k + 1][3])};
    u32 there[2];  // of the keys that a lane's registers hold
    if (Masked)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int left = seen - 16 * k - 8 * h - 2 * (lane & 3);
        there[h] = left >= 2 ? ~0u : left == 1 ? 0xffffu : 0u;
      }
#pragma unroll
    for (int m = 0; m < M; m += 2) {
      u32 y[4];
      ldmatrix_trans_at(y, (b ^ m / 2 % 4 * 32) + m / 8 * SLAB + k * 2048);
      if (Masked) { y[0] &= there[0]; y[1] &= there[1]; y[2] &= there[0]; y[3] &= there[1]; }
      mma<KIND>(c[m], a, y[0], y[1]);
      mma<KIND>(c[m + 1], a, y[2], y[3]);
    }
  }
}

struct Rows {  // a warp's: its query, the first of its heads, how many
  int t, head, rows;
  __device__ __forceinline__ Rows(const Params& p, const Item& x, int warp) {
    const int query = warp / p.parts, first = (warp - query * p.parts) * 16;
    t = x.t + query;
    head = x.key_head * p.group + first;
    rows = query < WARPS / p.parts && t < p.at.T ? imin(p.group - first, 16) : 0;
  }
};

// 16 rows of W columns into a warp's own tile, zeros where there is none. `from`: row 0, or any address if there are no rows
template <int W> __device__ __forceinline__ void fetch_rows(u32 own, const u16* from, i64 stride, int rows, int width) {
#pragma unroll
  for (int i = threadIdx.x & 31; i < 2 * W; i += 32) {
    const int row = i / (W / 8), c = i % (W / 8);
    const bool exists = row < rows && 8 * c < width;
    fetch(own + c / 8 * OWN_SLAB + row * 128 + ((c ^ row) & 7) * 16, (const char*)(exists ? from + row * stride + 8 * c : from), exists);
  }
}

// 16 rows times their factors to memory, through a warp's own tile: whole rows at a time
template <int M> __device__ __forceinline__ void store_rows(u16* to, i64 stride, int rows, int width, unsigned char* raw, u32 base, u32 own, const float (&c)[M][4], const float (&factor)[2]) {
  const int lane = threadIdx.x & 31;
  __syncwarp();
  const u32 staged = piece(own, lane & 15, lane >> 4);
#pragma unroll
  for (int m = 0; m < M; m += 2)
    stmatrix_at((staged ^ m / 2 % 4 * 32) + m / 8 * OWN_SLAB, pack<KIND>(c[m][0] * factor[0], c[m][1] * factor[0]), pack<KIND>(c[m][2] * factor[1], c[m][3] * factor[1]),
                pack<KIND>(c[m + 1][0] * factor[0], c[m + 1][1] * factor[0]), pack<KIND>(c[m + 1][2] * factor[1], c[m + 1][3] * factor[1]));
  __syncwarp();
#pragma unroll 4
  for (int i = lane; i < 16 * M; i += 32) {
    const int row = i / M, n = i % M;
    if (row < rows && 8 * n < width) *(uint4*)(to + row * stride + 8 * n) = *(const uint4*)(raw + (own - base) + n / 8 * OWN_SLAB + row * 128 + ((n ^ row) & 7) * 16);
  }
  __syncwarp();
}

// each(block, stage) for the blocks of this item that a query chose, in ascending order, repeats last
template <class Each> __device__ __forceinline__ void walk(unsigned char* raw, u32 base, u32 bars, Ring& ring, int query, Each each) {
  u32 queries;
  do {
    bar_wait(FULL(ring.slot), ring.phase, ring.patience);
    const Found found = ((const Found*)(raw + FOUND))[ring.slot];
    queries = found.queries;
    if (queries >> query & 1) {
      each(found.block, base + ring.slot * STAGE);
      __syncwarp();
    }
    if ((threadIdx.x & 31) == 0) bar_arrive(FREE(ring.slot));
    advance<STAGES>(ring.slot, ring.phase);
  } while (queries != END && ring.patience);
}

// attend(warp) for the warps that hold queries
template <class Attend> __device__ __forceinline__ void run_roles(const Params& p, unsigned char* raw, u32 base, u32 bars, Attend attend) {
  const int warp = uniform(threadIdx.x / 32);
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) { bar_init(FULL(s), 1); bar_init(FREE(s), WARPS); }
    bar_fence();
  }
  __syncthreads();
  if (warp == WARPS) bring(p, raw, base, bars);
  else attend(warp);
}
