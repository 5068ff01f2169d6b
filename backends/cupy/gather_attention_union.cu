// Attention over selected blocks of keys where neighbouring queries share what they read (Native Sparse Attention), float16 and bfloat16, sm_90a: an item is the
// neighbouring queries of one key head that 15 warps hold, 16 heads to a warp. One more warp makes the union of their lists, block by block in ascending order with a bit
// for each query, and the copy engine brings each block of it once; a warp multiplies the blocks that its own query chose, whatever its neighbours did.
// Sixteen warps in all, because a seventeenth would leave each 96 registers, and the sums and scores of a warp take 96.
// Why not warpgroup products: their 64 rows are four queries, which would all multiply every block of the union; `mma.sync` has the 16 rows of one.
// Defines: KIND, WIDTH and VALUES (D and Dv rounded up to 16, at most 128), KEYS (of a step: 16, 32 or 64, divides the granularity), STAGES, SOFTCAP.
#include "hopper.cuh"
#include "selections.cuh"
#include "tiles.cuh"

#ifndef KIND
#define KIND BFLOAT16
#endif
#ifndef WIDTH
#define WIDTH 128
#endif
#ifndef VALUES
#define VALUES 128
#endif
#ifndef KEYS
#define KEYS 64
#endif
#ifndef STAGES
#define STAGES 4
#endif
#ifndef SOFTCAP
#define SOFTCAP 0
#endif

constexpr int WARPS = 15, THREADS = 32 * (WARPS + 1), WINDOW = 1024, MOST = 1024;  // blocks that a table holds; blocks that a list may stand for
constexpr int SLAB = KEYS * 128, OWN_SLAB = 16 * 128, K_SLABS = (WIDTH + 63) / 64, V_SLABS = (VALUES + 63) / 64, STAGE = (K_SLABS + V_SLABS) * SLAB;  // a slab: rows of 64 columns
constexpr int OWN = (K_SLABS > V_SLABS ? K_SLABS : V_SLABS) * OWN_SLAB, QUERIES = STAGES * STAGE, TABLE = QUERIES + WARPS * OWN, WAITING = TABLE + WINDOW * 4, FOUND = WAITING + WARPS * MOST / 8, BARS = FOUND + STAGES * 8;
#define FULL(s) (bars + 8 * (s))
#define FREE(s) (bars + 8 * (STAGES + (s)))

struct Params {
  TensorMap k, v;     // boxes of KEYS rows x 64 columns
  const void* q;
  void* out;
  float* lse;
  const float* sink;
  Selected list;
  Positions at;
  i64 qb, qh, qt;
  int Hq, group, D, Dv, parts, tiles, items, span;  // parts: warps that share a query's heads; span: steps that an entry stands for
  float scale, softcap;
};

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

// s = this warp's rows times the keys of a stage
__device__ __forceinline__ void multiply_scores(float (&s)[KEYS / 8][4], u32 own, u32 keys) {
  const int lane = threadIdx.x & 31;
  const u32 a = piece(own, lane & 15, lane >> 4), b = piece(keys, (lane & 7) + (lane >> 4) * 8, lane >> 3 & 1);
#pragma unroll
  for (int n = 0; n < KEYS / 8; n++) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.f;
#pragma unroll
  for (int k = 0; k < WIDTH / 16; k++) {
    u32 x[4];
    ldmatrix_at(x, (a ^ k % 4 * 32) + k / 4 * OWN_SLAB);
#pragma unroll
    for (int n = 0; n < KEYS / 8; n += 2) {
      u32 y[4];
      ldmatrix_at(y, (b ^ k % 4 * 32) + k / 4 * SLAB + n * 1024);
      mma<KIND>(s[n], x, y[0], y[1]);
      mma<KIND>(s[n + 1], x, y[2], y[3]);
    }
  }
}

// o += probabilities times the values of a stage, of which this query sees the first `seen`: what it does not see may hold anything
template <bool Masked> __device__ __forceinline__ void multiply_values(float (&o)[VALUES / 8][4], const float (&s)[KEYS / 8][4], u32 values, int seen) {
  const int lane = threadIdx.x & 31;
  const u32 b = piece(values, lane & 15, lane >> 4);
#pragma unroll
  for (int k = 0; k < KEYS / 16; k++) {
    const u32 x[4] = {pack<KIND>(s[2 * k][0], s[2 * k][1]), pack<KIND>(s[2 * k][2], s[2 * k][3]), pack<KIND>(s[2 * k + 1][0], s[2 * k + 1][1]), pack<KIND>(s[2 * k + 1][2], s[2 * k + 1][3])};
    u32 there[2];  // of the keys that a lane's registers hold
    if (Masked)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int left = seen - 16 * k - 8 * h - 2 * (lane & 3);
        there[h] = left >= 2 ? ~0u : left == 1 ? 0xffffu : 0u;
      }
#pragma unroll
    for (int n = 0; n < VALUES / 8; n += 2) {
      u32 y[4];
      ldmatrix_trans_at(y, (b ^ n / 2 % 4 * 32) + n / 8 * SLAB + k * 2048);
      if (Masked) { y[0] &= there[0]; y[1] &= there[1]; y[2] &= there[0]; y[3] &= there[1]; }
      mma<KIND>(o[n], x, y[0], y[1]);
      mma<KIND>(o[n + 1], x, y[2], y[3]);
    }
  }
}

struct Rows { int t, head, rows; };  // a warp's: its query, the first of its heads, how many

// 16 rows of q, zeros where there is none
__device__ __forceinline__ void fetch_rows(const Params& p, const Item& x, const Rows& r, u32 own) {
  const u16* q = (const u16*)p.q + x.b * p.qb;
#pragma unroll
  for (int i = threadIdx.x & 31; i < 2 * WIDTH; i += 32) {
    const int row = i / (WIDTH / 8), c = i % (WIDTH / 8);
    const bool exists = row < r.rows && 8 * c < p.D;
    fetch(own + c / 8 * OWN_SLAB + row * 128 + ((c ^ row) & 7) * 16, (const char*)(exists ? q + (r.head + row) * p.qh + r.t * p.qt + 8 * c : q), exists);
  }
  cp_commit();
  cp_wait<0>();
  __syncwarp();
}

// out by whole rows through this warp's own tile, and lse
__device__ __forceinline__ void store(const Params& p, const Item& x, const Rows& r, unsigned char* raw, u32 base, u32 own, const float (&o)[VALUES / 8][4], const float (&most)[2], float (&sum)[2]) {
  const int lane = threadIdx.x & 31;
  const i64 line = ((i64)x.b * p.Hq + r.head) * p.at.T + r.t;
  float factor[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int row = lane / 4 + 8 * h;
    sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
    sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
    const bool empty = most[h] == -inf() && sum[h] == 0.f;
    factor[h] = empty ? 0.f : 1.f / (sum[h] + (p.sink && row < r.rows ? ex2((__ldg(p.sink + r.head + row) - most[h]) * LOG2E) : 0.f));
    if (p.lse && row < r.rows && (lane & 3) == 0) p.lse[line + (i64)row * p.at.T] = empty ? -inf() : most[h] + logf(sum[h]);
  }
  __syncwarp();
  const u32 to = piece(own, lane & 15, lane >> 4);
#pragma unroll
  for (int n = 0; n < VALUES / 8; n += 2)
    stmatrix_at((to ^ n / 2 % 4 * 32) + n / 8 * OWN_SLAB, pack<KIND>(o[n][0] * factor[0], o[n][1] * factor[0]), pack<KIND>(o[n][2] * factor[1], o[n][3] * factor[1]),
                pack<KIND>(o[n + 1][0] * factor[0], o[n + 1][1] * factor[0]), pack<KIND>(o[n + 1][2] * factor[1], o[n + 1][3] * factor[1]));
  __syncwarp();
#pragma unroll 4
  for (int i = lane; i < 2 * VALUES; i += 32) {
    const int row = i / (VALUES / 8), c = i % (VALUES / 8);
    if (row < r.rows && 8 * c < p.Dv)
      *(uint4*)((u16*)p.out + (line + (i64)row * p.at.T) * p.Dv + 8 * c) = *(const uint4*)(raw + (own - base) + c / 8 * OWN_SLAB + row * 128 + ((c ^ row) & 7) * 16);
  }
  __syncwarp();
}

__device__ __forceinline__ void attend(const Params& p, unsigned char* raw, u32 base, u32 bars, int warp) {
  const int query = warp / p.parts, head = (warp - query * p.parts) * 16;
  const u32 own = base + QUERIES + warp * OWN;
  u32 slot = 0, phase = 0, patience = PATIENCE;
  for (int it = blockIdx.x; it < p.items && patience; it += gridDim.x) {
    const Item x(p, it);
    Rows r = {x.t + query, x.key_head * p.group + head, query < WARPS / p.parts && x.t + query < p.at.T ? imin(p.group - head, 16) : 0};
    fetch_rows(p, x, r, own);
    const int limit = r.rows ? Entries(p.list, p.at, x.b, x.list, r.t).limit : 0;
    float o[VALUES / 8][4] = {}, most[2] = {-inf(), -inf()}, sum[2] = {};
    u32 queries;
    do {
      bar_wait(FULL(slot), phase, patience);
      const Found found = ((const Found*)(raw + FOUND))[slot];
      queries = found.queries;
      if (queries >> query & 1) {
        const u32 keys = base + slot * STAGE;
        const int seen = limit - found.block * KEYS;
        float s[KEYS / 8][4], factor[2];
        multiply_scores(s, own, keys);
        const u32 words[2] = {range_bits(0, seen), range_bits(0, seen - 32)};
        softmax<SOFTCAP>(s, most, sum, factor, p.scale, p.softcap, seen < KEYS, words, words, 0);
        if (__any_sync(~0u, factor[0] != 1.f || factor[1] != 1.f)) {
#pragma unroll
          for (int n = 0; n < VALUES / 8; n++) {
            o[n][0] *= factor[0]; o[n][1] *= factor[0];
            o[n][2] *= factor[1]; o[n][3] *= factor[1];
          }
        }
        if (seen < KEYS) multiply_values<true>(o, s, keys + K_SLABS * SLAB, seen);
        else multiply_values<false>(o, s, keys + K_SLABS * SLAB, seen);
        __syncwarp();
      }
      if ((threadIdx.x & 31) == 0) bar_arrive(FREE(slot));
      advance<STAGES>(slot, phase);
    } while (queries != END && patience);
    if (r.rows) store(p, x, r, raw, base, own, o, most, sum);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) forward(const __grid_constant__ Params p) {
  SWIZZLED_SHARED(raw);
  const u32 base = shared_address(raw), bars = base + BARS;
  const int warp = uniform(threadIdx.x / 32);
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) { bar_init(FULL(s), 1); bar_init(FREE(s), WARPS); }
    bar_fence();
  }
  __syncthreads();
  if (warp == WARPS) bring(p, raw, base, bars);
  else attend(p, raw, base, bars, warp);
}
