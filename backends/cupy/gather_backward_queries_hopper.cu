// Backward of attention over selected keys by Hopper's own instructions, queries: dQ, and what the keys' kernel needs: probabilities, dS, and for each key a bound of the sum of
// all contributions to it. Keys of width 576 whose first 512 columns are the values (DeepSeek's latent), float16 and bfloat16. An item is one query and up to 64 heads.
// Persistent, four warpgroups: one gathers tiles of 32 keys into a ring of two, one makes scores, dP, probabilities and dS, two hold 64 x 320 and 64 x 256 sums of dQ.
// The query and its dO stay in shared memory. Holes are zeros in the tile, in the probabilities and in dS.
#include "gather_backward_hopper.cuh"

struct Params {
  const void *q, *k, *dout;
  const float *lse, *delta;
  void *dq, *tiles;        // tiles: the images, for queries first .. first + count - 1 of each batch entry
  u64* bounds;             // [B,S,BINS]
  Selected list;
  Positions at;
  i64 qb, qh, qt, ob, oh, ot, kb;  // bytes
  int Hq, parts, items, first, count, places;  // parts: of 64 heads, a multiple of BLOCKS; places: tiles of 64 entries
  u32 kt;                  // bytes, too
  float scale;
};

constexpr int N = 32, CHUNK = N * 128, TILE = 9 * CHUNK, SLOTS = 2, PIECE = BH * 128;
constexpr int GRADIENT = 9 * PIECE, KEYS = GRADIENT + 8 * PIECE, IMAGES = KEYS + SLOTS * TILE, WEIGHTS = IMAGES + SLOTS * PAIR, FOUND = WEIGHTS + 2 * BH * 4, BARS = FOUND + SLOTS * 136;
constexpr float MARGIN = 1.0625f;  // of a bound: what the roundings of its parts may bring
#define FULL(s) (bars + 8 * (s))
#define FREE(s) (bars + 8 * (SLOTS + (s)))
#define READY(s) (bars + 8 * (2 * SLOTS + (s)))
#define ARRIVED (bars + 8 * (3 * SLOTS))      // the query and its dO
#define WEIGHED (bars + 8 * (3 * SLOTS + 1))  // the largest of each row is known
#define LEFT (bars + 8 * (3 * SLOTS + 2))     // the query and its dO are not read any more

struct Found { int key[N]; u32 word; int left; };  // a tile's keys (-1: none), which exist, how many tiles of the item follow

struct Item {
  int head, rows, t, b, part, place;  // head: the first of `rows`; place: the query's among the images
  __device__ __forceinline__ Item(const Params& p, int it) {
    const int x = p.items - 1 - it;  // late queries have long rows: first
    place = x / p.parts;
    part = x - place * p.parts;
    head = part * BH;
    rows = imin(p.Hq - head, BH);
    b = place / p.count;
    t = p.first + place - b * p.count;
  }
  __device__ __forceinline__ char* image(const Params& p) const { return (char*)p.tiles + ((i64)place * (p.parts / BLOCKS) + part / BLOCKS) * p.places * TILE_BYTES + part % BLOCKS * PAIR; }
};

template <int Chunks> __device__ __forceinline__ void fetch_heads(u32 to, const char* from, i64 stride, int rows) {  // rows r, r + 16, ... of 64; `from` and `to` are in row r
#pragma unroll 1
  for (int n = 0; n < 4; n++, rows -= 16) {
    const char* row = rows > 0 ? from + n * 16 * stride : from;
#pragma unroll
    for (int c = 0; c < Chunks; c++) fetch(to + n * 2048 + c * PIECE, row + c * 128, rows > 0);
  }
}

__device__ __forceinline__ void gather(const Params& p, unsigned char* raw, u32 base, u32 bars) {
  const int tid = threadIdx.x % 128, r = tid / 8, column = tid % 8 * 16;
  const u32 here = base + r * 128 + (column ^ (r & 7) << 4);
  u32 slot = 0, phase = 1, turn = 1, patience = PATIENCE;
  for (int it = blockIdx.x; it < p.items; it += gridDim.x, turn ^= 1) {
    const Item x(p, it);
    const int row = x.rows > r ? x.head + r : 0;  // an address that exists
    bar_wait(LEFT, turn, patience);
    fetch_heads<9>(here, (const char*)p.q + x.b * p.qb + row * p.qh + x.t * p.qt + column, p.qh, x.rows - r);
    fetch_heads<8>(here + GRADIENT, (const char*)p.dout + x.b * p.ob + row * p.oh + x.t * p.ot + column, p.oh, x.rows - r);
    copies_arrive(ARRIVED);
    const Entries list(p.list, p.at, x.b, 0, x.t);
    const int *next = list.entries + tid % 32, limit = list.limit;
    int to_come = (int)list.slots - tid % 32, left = uniform(imax(((int)list.slots + N - 1) / N, 1)), entry = to_come > 0 ? __ldg(next) : -1;
    const char* from = (const char*)p.k + x.b * p.kb + column;
#pragma unroll 1
    while (left) {
      const int key = (u32)entry < (u32)limit ? entry : -1, a = __shfl_sync(~0u, key, r), b = __shfl_sync(~0u, key, r + 16);
      const u32 word = __ballot_sync(~0u, key >= 0), to = here + KEYS + slot * TILE;
      const char *row_a = from + (u64)(u32)imax(a, 0) * p.kt, *row_b = from + (u64)(u32)imax(b, 0) * p.kt;
      next += N; to_come -= N; left--;
      entry = to_come > 0 ? __ldg(next) : -1;  // asked for a tile ahead
      bar_wait(FREE(slot), phase, patience);
#pragma unroll
      for (int c = 0; c < 9; c++) { fetch(to + c * CHUNK, row_a + c * 128, a >= 0); fetch(to + c * CHUNK + 2048, row_b + c * 128, b >= 0); }
      copies_arrive(FULL(slot));
      if (tid < 32) {
        Found& found = ((Found*)(raw + FOUND))[slot];
        found.key[tid] = key;
        if (tid == 0) { found.word = word; found.left = left; }
        __syncwarp();
        if (tid == 0) bar_arrive(FULL(slot));
      }
      advance<SLOTS>(slot, phase);
    }
  }
}

// Sums of eight values over the eight lanes that share lane % 4; each lane gets the value that its upper bits name.
__device__ __forceinline__ float sum_columns(const float (&v)[8], int lane) {
  float four[4], two[2];
  const bool b4 = lane & 16, b3 = lane & 8, b2 = lane & 4;
#pragma unroll
  for (int i = 0; i < 4; i++) four[i] = (b4 ? v[4 + i] : v[i]) + __shfl_xor_sync(~0u, b4 ? v[i] : v[4 + i], 16);
#pragma unroll
  for (int i = 0; i < 2; i++) two[i] = (b3 ? four[2 + i] : four[i]) + __shfl_xor_sync(~0u, b3 ? four[i] : four[2 + i], 8);
  return (b2 ? two[1] : two[0]) + __shfl_xor_sync(~0u, b2 ? two[0] : two[1], 4);
}

// 16 rows of 32 columns of an image by one warp; `at`: of the first unit of 16 bytes of this lane's row
__device__ __forceinline__ void store_image(u32 at, const float (&x)[16]) {
  stmatrix_at(at, pack<KIND>(x[0], x[1]), pack<KIND>(x[2], x[3]), pack<KIND>(x[4], x[5]), pack<KIND>(x[6], x[7]));
  stmatrix_at(at ^ 32, pack<KIND>(x[8], x[9]), pack<KIND>(x[10], x[11]), pack<KIND>(x[12], x[13]), pack<KIND>(x[14], x[15]));
}

__device__ __forceinline__ void scores(const Params& p, unsigned char* raw, u32 base, u32 bars) {
  const int tid = threadIdx.x % 128, lane = tid & 31, r = tid / 32 * 16 + lane / 4, r16 = tid / 32 * 16 + (lane & 15);
  u32 slot = 0, phase = 0, turn = 0, patience = PATIENCE;
  float s[16], d[16];  // scores, then probabilities; dP, then dS
  for (int it = blockIdx.x; it < p.items; it += gridDim.x, turn ^= 1) {
    const Item x(p, it);
    float lse[2], delta[2], weight[2][2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const i64 row = ((i64)x.b * p.Hq + x.head + r + 8 * h) * p.at.T + x.t;
      const float y = r + 8 * h < x.rows ? __ldg(p.lse + row) : -inf();
      lse[h] = y == -inf() ? inf() : y;
      delta[h] = r + 8 * h < x.rows ? __ldg(p.delta + row) : 0.f;
    }
    u64* bounds = p.bounds + (i64)x.b * p.at.S * BINS;
    bar_wait(ARRIVED, turn, patience);
    int left;
    bool first = true;
    do {
      const u64 query = descriptor(base), gradient = descriptor(base + GRADIENT), keys = descriptor(base + KEYS + slot * TILE);
      bar_wait(FULL(slot), phase, patience);
      const Found& found = ((const Found*)(raw + FOUND))[slot];
      left = uniform(found.left);
      shared_to_copy_engine();
      hold(s); hold(d); wgmma_fence();
#pragma unroll
      for (int k = 0; k < 36; k++) wgmma<KIND, K_MAJOR>(s, query + (k & 3) * 2 + (k >> 2) * (PIECE >> 4), keys + (k & 3) * 2 + (k >> 2) * (CHUNK >> 4), k != 0);
      wgmma_commit();
#pragma unroll
      for (int k = 0; k < 32; k++) wgmma<KIND, K_MAJOR>(d, gradient + (k & 3) * 2 + (k >> 2) * (PIECE >> 4), keys + (k & 3) * 2 + (k >> 2) * (CHUNK >> 4), k != 0);
      wgmma_commit(); wgmma_wait<1>(); hold(s);
      if (first) {
        bar_wait(WEIGHED, turn, patience);
#pragma unroll
        for (int h = 0; h < 2; h++) { weight[0][h] = ((const float*)(raw + WEIGHTS))[r + 8 * h]; weight[1][h] = ((const float*)(raw + WEIGHTS))[BH + r + 8 * h]; }
        first = false;
      }
      const u32 word = found.word >> 2 * (lane & 3), to = base + IMAGES + slot * PAIR + r16 * 64 + (((lane >> 4) ^ (r16 >> 1 & 3)) << 4);
      const int key = found.key[(lane >> 3) * 8 + 2 * (lane & 3) + (lane >> 2 & 1)];
      float bound[8] = {};
#pragma unroll
      for (int i = 0; i < 16; i++) {  // the score rounded exactly as in the forward; while dP is made
        const int h = i / 2 % 2;
        s[i] = word >> (i / 4 * 8 + (i & 1)) & 1 ? ex2((__fmul_rn(s[i], p.scale) - lse[h]) * LOG2E) : 0.f;
        bound[i / 4 * 2 + (i & 1)] += s[i] * weight[1][h];
      }
      store_image(to, s);
      wgmma_wait<0>(); hold(d);
      if (!left) {
        named_sync(1, 128);  // every warp has its weights
        if (tid == 0) bar_arrive(LEFT);
      }
#pragma unroll
      for (int i = 0; i < 16; i++) {
        const int h = i / 2 % 2;
        d[i] = word >> (i / 4 * 8 + (i & 1)) & 1 ? s[i] * (d[i] - delta[h]) : 0.f;
        bound[i / 4 * 2 + (i & 1)] += fabsf(d[i]) * weight[0][h];
      }
      store_image(to + IMAGE, d);
      shared_to_copy_engine();
      bar_arrive(READY(slot));
      const float mine = sum_columns(bound, lane);
      if (key >= 0 && mine != 0.f) add_bound(bounds + (i64)key * BINS, mine);
      advance<SLOTS>(slot, phase);
    } while (left);
  }
}

// The largest magnitude of each row of `Chunks` pieces: what a contribution may be at most for each unit of dS or of a probability.
template <int Chunks> __device__ __forceinline__ void weigh(const unsigned char* from, float* to, float scale, int tid) {
#pragma unroll 1
  for (int row = tid / 8; row < BH; row += 16) {
    u32 most = 0;
#pragma unroll
    for (int c = 0; c < Chunks; c++) {
      const uint4 x = *(const uint4*)(from + c * PIECE + row * 128 + tid % 8 * 16);
      const u32 words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int i = 0; i < 4; i++) {  // bits of magnitudes are ordered as the magnitudes
        const u32 high = words[i] & 0x7fffffff, low = words[i] << 16 & 0x7fffffff;
        most = most > high ? most : high;
        most = most > low ? most : low;
      }
    }
#pragma unroll
    for (int lanes = 1; lanes < 8; lanes *= 2) {
      const u32 other = __shfl_xor_sync(~0u, most, lanes);
      most = most > other ? most : other;
    }
    if (tid % 8 == 0) to[row] = to_float<KIND>((u16)(most >> 16)) * scale;
  }
}

// 64 rows of W columns of dQ through this warpgroup's own part of the item's last tile, warp by warp, coalesced.
template <int W> __device__ __forceinline__ void store(const Params& p, unsigned char* raw, u32 base, const float (&o)[W / 2], const Item& x, u32 staged, int column, int tid) {
  constexpr int UNITS = W / 8;  // of 16 bytes a row
  const int lane = tid & 31, first = tid / 32 * 16;
  staged += tid / 32 * 4096;  // its own
#pragma unroll
  for (int j = 0; j < W / 16; j++) {
    const float* y = &o[8 * j];
    stmatrix_at(base + staged + (lane & 15) * W * 2 + (((2 * j + (lane >> 4)) ^ (lane & 7)) << 4), pack<KIND>(y[0] * p.scale, y[1] * p.scale), pack<KIND>(y[2] * p.scale, y[3] * p.scale),
                pack<KIND>(y[4] * p.scale, y[5] * p.scale), pack<KIND>(y[6] * p.scale, y[7] * p.scale));
  }
  __syncwarp();
#pragma unroll 1
  for (int row = lane / UNITS; row < imin(16, x.rows - first); row += 32 / UNITS)
    *(uint4*)((u16*)p.dq + (((i64)x.b * p.Hq + x.head + first + row) * p.at.T + x.t) * 576 + column + lane % UNITS * 8) =
      *(const uint4*)(raw + staged + row * W * 2 + ((lane % UNITS) ^ (row & 7)) * 16);
  __syncwarp();
}

// Half 0: columns 0 .. 319, half 1: the rest
template <int Half> __device__ __forceinline__ void sums(const Params& p, unsigned char* raw, u32 base, u32 bars) {
  constexpr int FIRST = Half ? 5 : 0;
  const int tid = threadIdx.x % 128, lane = tid & 31;
  u32 slot = 0, phase = 0, turn = 0, patience = PATIENCE;
  for (int it = blockIdx.x; it < p.items; it += gridDim.x, turn ^= 1) {
    char* image = Item(p, it).image(p);
    bar_wait(ARRIVED, turn, patience);
    if constexpr (Half) weigh<8>(raw + GRADIENT, (float*)(raw + WEIGHTS) + BH, MARGIN, tid);
    else weigh<9>(raw, (float*)(raw + WEIGHTS), MARGIN * p.scale, tid);
    __syncwarp();
    if (lane == 0) bar_arrive(WEIGHED);
    float o[2][64] = {}, o4[32] = {};  // o4: columns 256 .. 319
    int left;
    do {
      bar_wait(READY(slot), phase, patience);
      left = uniform(((const Found*)(raw + FOUND))[slot].left);
      if (Half && tid == 0) {
        bulk_store(image, base + IMAGES + slot * PAIR, PAIR);
        tma_store_commit();
      }
      image += BLOCKS * PAIR;
      const u64 a = descriptor_of(base + IMAGES + slot * PAIR + IMAGE, 16, 512, SWIZZLE_64), b = descriptor_of(base + KEYS + slot * TILE + FIRST * CHUNK, CHUNK, 1024, SWIZZLE_128);
      hold(o[0]); hold(o[1]);
      if constexpr (!Half) hold(o4);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 2; k++) {
        wgmma<KIND, N_MAJOR>(o[0], a + 2 * k, b + k * 128, 1);
        wgmma<KIND, N_MAJOR>(o[1], a + 2 * k, b + k * 128 + 2 * (CHUNK >> 4), 1);
        if constexpr (!Half) wgmma<KIND, N_MAJOR>(o4, a + 2 * k, b + k * 128 + 4 * (CHUNK >> 4), 1);
      }
      wgmma_commit(); wgmma_wait<0>(); hold(o[0]); hold(o[1]);
      if constexpr (!Half) hold(o4);
      if (!left) {
        const Item x(p, it);
        const u32 staged = KEYS + slot * TILE + FIRST * CHUNK;
        named_sync(2 + Half, 128);
        store<128>(p, raw, base, o[0], x, staged, FIRST * 64, tid);
        store<128>(p, raw, base, o[1], x, staged, FIRST * 64 + 128, tid);
        if constexpr (!Half) store<64>(p, raw, base, o4, x, staged, 256, tid);
      }
      if (Half && tid == 0) tma_store_wait_read();
      if (lane == 0) bar_arrive(FREE(slot));
      advance<SLOTS>(slot, phase);
    } while (left);
  }
  if (Half && tid == 0) tma_store_wait();
}

extern "C" __global__ void __launch_bounds__(512, 1) queries(const __grid_constant__ Params p) {
  SWIZZLED_SHARED(raw);
  const u32 base = shared_address(raw), bars = base + BARS;
  const int group = uniform(threadIdx.x / 128);
  if (threadIdx.x == 0) {
    for (int s = 0; s < SLOTS; s++) { bar_init(FULL(s), 129); bar_init(FREE(s), 8); bar_init(READY(s), 128); }
    bar_init(ARRIVED, 128); bar_init(WEIGHED, 8); bar_init(LEFT, 1);
    bar_fence();
  }
  __syncthreads();
  if (group == 0) {
    fewer_registers<40>();
    gather(p, raw, base, bars);
  } else if (group == 1) {
    fewer_registers<88>();
    scores(p, raw, base, bars);
  } else if (group == 2) {
    more_registers<208>();
    sums<0>(p, raw, base, bars);
  } else {
    more_registers<176>();
    sums<1>(p, raw, base, bars);
  }
}
