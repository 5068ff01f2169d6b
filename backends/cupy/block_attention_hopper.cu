// Attention over block lists by Hopper's own instructions: float16 and bfloat16, tiles of 128 or 192 queries of one head, key blocks of 128.
//
// A persistent block of threads has four roles. One thread takes items (a tile of a head, longest first, by an atomic ticket), one loads them through the copy
// engine, one warp clears values that no row of the tile sees, and groups of 64 rows multiply: while one group's products run, another makes exponentials. Nothing
// ties a group's own exponentials to its products: a branch that did cost 4-10 %. Where two query tiles fit, the next item starts while this one's output leaves.
// A full block inside the keys runs no mask code. Rows that do not exist are zeros on the way in and dropped on the way out.
//
// float8 keys and values (block_float8_hopper.cuh): the copy engine brings boxes of bytes, one more warpgroup makes of them, exactly, the tiles that the products read.
//
// PARTED: one part of a layout of several (parts.cuh). An item starts from what the parts before it gave (`before`, as if one more key), and leaves float32 for the next (`partial`).
// Defines: KIND, WIDTH (D rounded up to 16, at most 192), VALUES (Dv rounded up to 64 or 128), ROWS (queries of a tile), STAGES, TILES (query tiles held: 1 or 2), PARTED, FLOAT8 (float8.cuh), SLOTS, OUT_KIND.
#include "block_forward_hopper.cuh"

constexpr int ITEMS = 2;
constexpr bool EARLY = GROUPS == 2;      // what a masked block shows is read before its scores are there; three groups lack the registers
constexpr int LOOKS = GROUPS == 2 ? 4 : 1;  // rows that a lane of the clearing warp reads together
constexpr int WRITERS = FLOAT8 ? 4 : 1;  // of a tile: the copy engine's thread, or four warps that convert
constexpr int READERS = 2 + 4 * GROUPS + (FLOAT8 ? 4 : 0);  // of an item: the loading thread, the clearing warp, the multiplying warps, those that convert

struct Params {
  TensorMap q, k, v, out;  // boxes of a tile's rows x 64 columns; out: 64 x 64
  void* result;            // out again, for tiles without keys
  float* lse;
  const float* sink;
  const float *before, *before_lse;  // [B,Hq,T,Dv], [B,Hq,T] of the parts before, or null
  float* partial;                    // the same for the next part, instead of the result, or null
  int* ticket;             // 0, or null where every block of threads has one item
  const int* order;        // [L, tiles] tiles of a list, longest first, or null: last tile first
  ListArrays lists;
  Positions at;
  int row_step, key_step, key_run, whole;         // 1, KEYS, KEYS where they are contiguous; whole: every key of every block exists
  int heads, Hq, group, Dv, tiles, ahead, section, items;  // heads = B * Hq; the `ahead` longest tiles of all heads first, then so many heads at a time as the cache holds
  float scale, exponent;                          // exponent = scale * log2(e)
#if FLOAT8
  Scales scales;
#endif
};

// Entries first .. first + n - 1 of the list, `gap` left out behind the `full` full ones; those from `plain` on need a mask. head = b * Hq + h; n = -1: no more items.
struct Item {
  int head, t, first, n, full, plain, gap, limit;  // t: query of row 0, negative where the tile starts before the call
  __device__ __forceinline__ int entry(int x) const { return first + x + (x >= full ? gap : 0); }
};

struct Shared : Tiles {
  using Tiles::Tiles;
  __device__ __forceinline__ Shared again() const {  // addresses computed where they stand instead of kept in registers
    Shared x = *this;
#ifndef SPARSETILE_EMULATE
    asm volatile("" : "+r"(x.bars), "+r"(x.v));
#endif
    return x;
  }
  __device__ __forceinline__ u32 landed(int s) const { return bars + 8 * (4 * STAGES + s); }  // values of a masked block, not yet cleared
  __device__ __forceinline__ u32 full_q(int s) const { return bars + 40 * STAGES + 8 * s; }
  __device__ __forceinline__ u32 free_q(int s) const { return bars + 40 * STAGES + 16 + 8 * s; }
  __device__ __forceinline__ u32 full_item(int s) const { return bars + 40 * STAGES + 32 + 8 * s; }
  __device__ __forceinline__ u32 free_item(int s) const { return bars + 40 * STAGES + 48 + 8 * s; }
  __device__ __forceinline__ Item* item(int s) const { return at<Item>(bars + 40 * STAGES + 64) + s; }
  // of float8: boxes of bytes, and the scales of a key block and of its values; twice as many as stages, for a stage's return says nothing of a slow warp's reads of them
  __device__ __forceinline__ u32 full_box(int s) const { return bars + 40 * STAGES + 128 + 8 * s; }
  __device__ __forceinline__ u32 free_box(int s) const { return bars + 40 * STAGES + 128 + 8 * (SLOTS + s); }
  __device__ __forceinline__ float2* scales(u32 k) const { return at<float2>(bars + 40 * STAGES + 128 + 16 * SLOTS) + k % (2 * STAGES); }
};

__device__ __forceinline__ int queries(const Params& p) { return p.at.T; }
__device__ __forceinline__ int row_step(const Params& p, const Item&) { return row_step(p); }
__device__ __forceinline__ const float* sinks(const Params& p, const Item&) { return p.sink; }
// the query of a tile's row, and the rows first_row .. end_row - 1 that the call has
__device__ __forceinline__ int query(const Params& p, const Item& x, int r) { return x.t + (PARTED ? r * p.row_step : r); }
__device__ __forceinline__ int first_row(const Item& x) { return imax(-x.t, 0); }
__device__ __forceinline__ int end_row(const Params& p, const Item& x) { return imin(ROWS, PARTED ? (p.at.T - x.t + p.row_step - 1) / p.row_step : p.at.T - x.t); }

// ---------------------------------------------------------------------------------------------------------------- taking items
__device__ __forceinline__ Item open_item(const Params& p, int number) {
  const int before = p.ahead * p.heads, each = p.tiles - p.ahead, m = number - before;
  const int from = m < 0 ? 0 : m / (p.section * each) * p.section, heads = m < 0 ? p.heads : imin(p.section, p.heads - from), y = m < 0 ? number : m - from * each;
  const int rank = y / heads + (m < 0 ? 0 : p.ahead);
  Item x;
  x.head = from + y % heads;
  const int b = x.head / p.Hq, h = x.head % p.Hq, list = __ldg(p.lists.list_of + b * p.lists.list_b + h * p.lists.list_h);
  const int tile = p.order ? __ldg(p.order + (i64)list * p.tiles + rank) : p.tiles - 1 - rank, start = first_position(p.at, b);
  i64 n = (i64)floor_div(start, ROWS) + tile, i = n - p.lists.first;
  x.limit = key_limit(p.at, b);
  x.t = (int)(n * ROWS - start);
  if (PARTED && p.row_step > 1) {
    i = tile;
    x.t = __ldg(p.lists.q_order + i * ROWS) - start;
  }
  x.first = x.n = x.full = x.plain = x.gap = 0;
  if (i < 0 || i >= p.lists.nq || x.t >= p.at.T) return x;
  const int* o = p.lists.offsets + 2 * ((i64)list * p.lists.nq + i);
  const int middle = __ldg(o + 1), end = __ldg(o + 2);
  x.first = __ldg(o);
  if (PARTED) {
    x.full = middle - x.first;
    x.n = end - x.first;
    x.plain = p.whole ? x.full : 0;
    return x;
  }
  x.full = blocks_before<KEYS>(p.lists.cols + x.first, middle - x.first, x.limit);
  x.n = x.full + blocks_before<KEYS>(p.lists.cols + middle, end - middle, x.limit);
  x.gap = middle - x.first - x.full;
  x.plain = x.full - (x.full && x.limit - __ldg(p.lists.cols + x.first + x.full - 1) * KEYS < KEYS);
  return x;
}

__device__ __forceinline__ void take_items(const Params& p, const Shared& m, u32& patience) {
  int number = blockIdx.x;
  for (u32 i = 0;; i++) {
    Item& x = *m.item(i % ITEMS);
    bar_wait(m.free_item(i % ITEMS), parity<ITEMS>(i) ^ 1, patience);
    if (i) number = p.ticket ? gridDim.x + atomicAdd(p.ticket, 1) : p.items;  // not before there is room: what one block of threads has drawn, no other can take at the end
    const bool more = number < p.items && patience;
    if (more) x = open_item(p, number); else x.n = -1;
    bar_arrive(m.full_item(i % ITEMS));
    if (!more) return;
  }
}

// ---------------------------------------------------------------------------------------------------------------- loading, clearing
// K of a block, then V of the block before: values are wanted one product later
__device__ __forceinline__ void load_items(const Params& p, const Shared& m, u32& patience) {
  const int q_steps = row_steps(p), k_steps = key_steps(p);
  u32 k = 0, v = 0;
  for (u32 i = 0;; i++) {
    bar_wait(m.full_item(i % ITEMS), parity<ITEMS>(i), patience);
    const Item x = *m.item(i % ITEMS);
    bar_arrive(m.free_item(i % ITEMS));
    if (x.n < 0 || !patience) return;
    const int b = x.head / p.Hq, h = x.head % p.Hq, hk = h / p.group;
    bar_wait(m.free_q(i % TILES), parity<TILES>(i) ^ 1, patience);
    if (x.n) load_slabs<K_SLABS, Q_SLAB>(m.q + i % TILES * Q_BYTES, &p.q, m.full_q(i % TILES), x.t, q_steps, h, b);
    else bar_arrive(m.full_q(i % TILES));
    for (int e = 0, last = 0; e <= x.n && x.n; e++) {
      int row = 0;
      if (e < x.n) {
        row = first_key(p, __ldg(p.lists.cols + x.entry(e)));
        bar_wait(m.free_k(k % STAGES), parity<STAGES>(k) ^ 1, patience);
        load_slabs<K_SLABS>(m.k + k % STAGES * K_BYTES, &p.k, m.full_k(k % STAGES), row, k_steps, hk, b);
        k++;
      }
      if (e > 0) {
        bar_wait(m.free_v(v % STAGES), parity<STAGES>(v) ^ 1, patience);
        load_slabs<V_SLABS>(m.v + v % STAGES * V_BYTES, &p.v, e - 1 < x.plain ? m.full_v(v % STAGES) : m.landed(v % STAGES), last, k_steps, hk, b);
        v++;
      }
      last = row;
    }
  }
}

#if FLOAT8
#include "block_float8_hopper.cuh"
#endif

// Lane n of a warp gets the word of keys 32 n ..: which of an item's entry e some row of the tile sees.
__device__ __forceinline__ u32 seen_by_some(const Params& p, const Item& x, int e, int lane) {
  const int entry = x.entry(e), kind = __ldg(p.lists.kinds + entry), left = existing_keys(p, __ldg(p.lists.cols + entry), x.limit), r0 = first_row(x), r1 = end_row(p, x);
  u32 seen[KEYS / 32] = {}, mine = ~0u;
  if (kind >= 0 && kind & 1) {
#pragma unroll 1
    for (int r = r0 + lane; r < r1; r += 32)
#pragma unroll
      for (int n = 0; n < KEYS / 32; n++) seen[n] |= __ldg(p.lists.bitmaps + ((i64)(kind >> 1) * ROWS + r) * (KEYS / 32) + n);
  } else {
#pragma unroll 1
    for (int j = lane; j < ROWS; j += 32 * LOOKS) {
      int2 range[LOOKS];
#pragma unroll
      for (int i = 0; i < LOOKS; i++) range[i] = kind < 0 ? make_int2(0, KEYS) : __ldg((const int2*)p.lists.intervals + (i64)(kind >> 1) * ROWS + j + 32 * i);
#pragma unroll
      for (int i = 0; i < LOOKS; i++)
#pragma unroll
        for (int n = 0; n < KEYS / 32; n++) seen[n] |= j + 32 * i >= r0 && j + 32 * i < r1 ? range_bits(range[i].x - 32 * n, range[i].y - 32 * n) : 0;
    }
  }
#pragma unroll
  for (int n = 0; n < KEYS / 32; n++) {
    seen[n] = __reduce_or_sync(~0u, seen[n]) & range_bits(-32 * n, left - 32 * n);
    if (lane == n) mine = seen[n];
  }
  return mine;
}

// A warp makes the values of masked blocks zero where no row of the tile sees the key: what nobody sees must not reach a product (0 * NaN).
// What is seen of a block is known before the one ahead of it has landed, so that most are passed on at once.
__device__ __forceinline__ void clear_values(const Params& p, const Shared& shared, u32& patience) {
  const auto lane = [] { return thread_again() & 31; };  // few registers
  u32 turns = 0, s = 0;
  for (u32 i = 0;; i++) {
    const Shared m = shared.again();
    bar_wait(m.full_item(i % ITEMS), parity<ITEMS>(i), patience);
    const Item& x = *m.item(i % ITEMS);
    if (x.n < 0 || !patience) return;
    s = (s + x.plain) % STAGES;
    u32 seen = x.plain < x.n ? seen_by_some(p, x, x.plain, lane()) : 0;
    for (int e = x.plain; e < x.n; e++, s = (s + 1) % STAGES) {
      const u32 next = e + 1 < x.n ? seen_by_some(p, x, e + 1, lane()) : 0;
      bar_wait(m.landed(s), turns >> s & 1, patience);
      turns ^= 1u << s;
      if (__any_sync(~0u, seen != ~0u)) {
#pragma unroll 1
        for (int n = 0; n < KEYS / 32; n++) {
          const u32 word = __shfl_sync(~0u, seen, n);
#pragma unroll 1
          for (int r = lane() / 8; r < 32 && word != ~0u; r += 4)
            if (!(word >> r & 1))
              for (int c = 0; c < V_SLABS; c++) *m.at<uint4>(m.v + s * V_BYTES + c * SLAB + (32 * n + r) * 128 + lane() % 8 * 16) = make_uint4(0, 0, 0, 0);
        }
        shared_to_copy_engine();
        __syncwarp();
      }
      if (lane() < WRITERS) bar_arrive(m.full_v(s));
      seen = next;
    }
    __syncwarp();
    if (lane() == 0) bar_arrive(m.free_item(i % ITEMS));
  }
}

// ---------------------------------------------------------------------------------------------------------------- multiplying
__device__ __forceinline__ Sight look(const Params& p, const Item& x, int e, int row) {
  const int entry = x.entry(e), kind = __ldg(p.lists.kinds + entry), left = existing_keys(p, __ldg(p.lists.cols + entry), x.limit);
  return look_at(p.lists, kind, left, row);
}

// a tile without keys: this group's 64 rows
__device__ __forceinline__ void store_nothing(const Params& p, const Item& x, int w, int tid) {
  const int r0 = imax(first_row(x), 64 * w), r1 = imin(end_row(p, x), 64 * w + 64), n = p.Dv / (PARTED && p.partial ? 4 : 8);
  const i64 line = (i64)x.head * p.at.T;
  uint4* to = (uint4*)(PARTED && p.partial ? (void*)p.partial : p.result);
  for (int i = r0 * n + tid; i < r1 * n; i += 128) to[(line + query(p, x, i / n)) * n + i % n] = make_uint4(0, 0, 0, 0);
  if (p.lse && r0 + tid < r1) p.lse[line + query(p, x, r0 + tid)] = -inf();
}

// What lies between float32 rows in memory and two rows of a lane: columns 8 j + 2 (lane % 4) and the next are o[4 j ..].
template <class F> __device__ __forceinline__ void for_pairs(const Params& p, const Item& x, int row, F f) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int t = query(p, x, row + 8 * h), c = 2 * (thread_again() & 3);
    const i64 line = ((i64)x.head * p.at.T + t) * p.Dv + c;
#pragma unroll
    for (int j = 0; j < VALUES / 8; j++) f(4 * j + 2 * h, line + 8 * j, t >= 0 && t < p.at.T && 8 * j < p.Dv);
  }
}

// out through this group's rows of the item's query tile
template <int N> __device__ __forceinline__ void store(const Params& p, const Item& x, const Shared& m, u32 tile, const float (&o)[N], const float (&factor)[2], int w, int tid) {
  if (PARTED && p.partial) {
    for_pairs(p, x, w * 64 + tid / 32 * 16 + tid % 32 / 4, [&](int i, i64 at, bool there) {
      if (there) *(float2*)(p.partial + at) = make_float2(o[i] * factor[i >> 1 & 1], o[i + 1] * factor[i >> 1 & 1]);
    });
    return;
  }
  store_rows(p, x, m, tile, o, factor, w, tid);
}

__device__ __forceinline__ void multiply_items(const Params& p, const Shared& m, int w, u32& patience) {
  const bool leader = threadIdx.x % 128 == 0;
  const auto tid = [] { return thread_again() % 128; };  // seldom wanted: not worth a register
  const auto row = [w, tid] { const int t = tid(); return w * 64 + t / 32 * 16 + t % 32 / 4; };
  const u64 dq0 = descriptor(m.q + w * 64 * 128), dk0 = descriptor(m.k), dv0 = descriptor_columns<SLAB>(m.v);
  float s[64], o[VALUES / 2], most[2], sum[2], factor[2], by_row[2];
  float2 by;  // of float8: scales of a step's keys and of its values
  u32 pr[32], i = 0, k = 0;  // turns: item, key block; values are one block behind
  int n, plain;
  bool owed = false;  // the output of the item before is on its way
  Sight sight;
  const auto uniform = [](u32 x) { return __shfl_sync(~0u, x, 0); };
  u32 at_q, at_k, at_v;
  const auto aim = [&] {  // known to be uniform, and before the waits: a shuffle takes 30 clocks
    at_q = uniform(i % TILES) * (Q_BYTES >> 4);
    at_k = uniform(k % STAGES) * (K_BYTES >> 4);
    at_v = uniform((k - 1) % STAGES) * (V_BYTES >> 4);
  };
  const auto begin = [&] {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      most[h] = -inf();
      sum[h] = 0.f;
#if FLOAT8 == 2
      const Item& y = *m.item(i % ITEMS);
      const int q = query(p, y, row() + 8 * h);
      by_row[h] = q >= 0 && q < p.at.T ? scale_at(p.scales.q, (i64)y.head * p.at.T + q) : 1.f;
#endif
      if (PARTED && p.before) {
        const Item& x = *m.item(i % ITEMS);
        const int t = query(p, x, row() + 8 * h);
        if (t >= 0 && t < p.at.T) most[h] = __ldg(p.before_lse + (i64)x.head * p.at.T + t) / p.scale;
        if (most[h] != -inf() && (thread_again() & 3) == 0) sum[h] = 1.f;
      }
    }
  };
  const auto weigh = [&](bool masked) {  // scores to what their values are multiplied by
#if FLOAT8
    scale_scores(s, by.x, by_row, masked);
#endif
    if (masked) {
      mask(s, p.lists, sight, row());
#if FLOAT8
      settle_values(s, by.y);
#endif
    }
    soften(s, most, sum, factor, p.exponent, FLOAT8 ? by.x : 1.f);
  };
  const auto resume = [&] {  // the sums of the parts before, as this part's first maximum wants them; false: there are none
    if (!PARTED || !p.before) return false;
    for_pairs(p, *m.item(i % ITEMS), row(), [&](int j, i64 at, bool there) {
      const float2 x = there ? *(const float2*)(p.before + at) : make_float2(0.f, 0.f);
      o[j] = x.x * factor[j >> 1 & 1];
      o[j + 1] = x.y * factor[j >> 1 & 1];
    });
    return true;
  };
  const auto open = [&] {  // item i, once it is known, and its first scores
    bar_wait(m.full_item(i % ITEMS), parity<ITEMS>(i), patience);
    n = uniform(m.item(i % ITEMS)->n);
    plain = uniform(m.item(i % ITEMS)->plain);
    aim();
    if (n >= 0) bar_wait(m.full_q(i % TILES), parity<TILES>(i), patience);
    if (n <= 0) return;
    bar_wait(m.full_k(k % STAGES), parity<STAGES>(k), patience);
    if (FLOAT8) by = *m.scales(k);
    hold(s);
    wgmma_fence();
    multiply_scores(s, dq0 + at_q, dk0 + at_k);
    if (EARLY && plain == 0) sight = look(p, *m.item(i % ITEMS), 0, row());
    wgmma_wait<0>();
    hold(s);
  };
  const auto close = [&](u32 i) { __syncwarp(); if (tid() % 32 == 0) bar_arrive(m.free_item(i % ITEMS)); };
  const auto settle = [&](u32 i) {  // the query tile is free once its output has been read
    if (leader) { tma_store_wait_read(); bar_arrive(m.free_q(i % TILES)); }
    owed = false;
  };
  open();
  while (n >= 0) {
    if (n == 0) {
      store_nothing(p, *m.item(i % ITEMS), w, tid());
      close(i);
      if (owed) settle(i - 1);
      settle(i++);
      open();
      continue;
    }
    if (leader) bar_arrive(m.free_k(k % STAGES));
    k++;
    begin();
    if (!EARLY && plain == 0) sight = look(p, *m.item(i % ITEMS), 0, row());
    weigh(plain == 0);
    round(pr, s, FLOAT8 ? by.y : 1.f);
    if (owed) settle(i - 1);
    bool more = resume();
    for (int e = 1; e < n; e++, k++) {
      aim();
      bar_wait(m.full_k(k % STAGES), parity<STAGES>(k), patience);
      if (FLOAT8) by = *m.scales(k);
      hold(s); hold(o);
      wgmma_fence();
      multiply_scores(s, dq0 + at_q, dk0 + at_k);
      bar_wait(m.full_v((k - 1) % STAGES), parity<STAGES>(k - 1), patience);
      wgmma_fence();
      multiply_values(o, pr, dv0 + at_v, more);
      if (EARLY && e >= plain) sight = look(p, *m.item(i % ITEMS), e, row());
      wgmma_wait<1>();
      hold(s);
      if (leader) bar_arrive(m.free_k(k % STAGES));
      if (!EARLY && e >= plain) sight = look(p, *m.item(i % ITEMS), e, row());
      weigh(e >= plain);
      wgmma_wait<0>();
      hold(o);
      if (leader) bar_arrive(m.free_v((k - 1) % STAGES));
#pragma unroll
      for (int j = 0; j < VALUES / 2; j++) o[j] *= factor[j >> 1 & 1];
      more = true;
      round(pr, s, FLOAT8 ? by.y : 1.f);
    }
    aim();
    bar_wait(m.full_v((k - 1) % STAGES), parity<STAGES>(k - 1), patience);
    hold(o);
    wgmma_fence();
    multiply_values(o, pr, dv0 + at_v, more);
    const Item& x = *m.item(i % ITEMS);
    finish(p, x, most, sum, factor, row());
    wgmma_wait<0>();
    hold(o);
    if (leader) bar_arrive(m.free_v((k - 1) % STAGES));
    store(p, x, m, m.q + i % TILES * Q_BYTES, o, factor, w, tid());
    close(i);
    if (TILES == 1) settle(i); else owed = true;
    i++;
    open();
  }
  if (leader) tma_store_wait();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) forward(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(raw);
  const Shared m(raw);
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      bar_init(m.full_k(s), WRITERS); bar_init(m.free_k(s), GROUPS);
      bar_init(m.full_v(s), WRITERS); bar_init(m.free_v(s), GROUPS); bar_init(m.landed(s), WRITERS);
    }
    for (int s = 0; s < TILES; s++) { bar_init(m.full_q(s), FLOAT8 == 2 ? WRITERS : 1); bar_init(m.free_q(s), GROUPS); }
    for (int s = 0; s < ITEMS; s++) { bar_init(m.full_item(s), 1); bar_init(m.free_item(s), READERS); }
    for (int s = 0; s < SLOTS; s++) { bar_init(m.full_box(s), 1); bar_init(m.free_box(s), WRITERS); }
    bar_fence();
  }
  __syncthreads();
  u32 patience = PATIENCE;
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (group == 0) {
    fewer_registers<GROUPS == 2 ? 40 : 32>();
#if FLOAT8
    if (threadIdx.x == 0) load_boxes(p, m, patience);
#else
    if (threadIdx.x == 0) load_items(p, m, patience);
#endif
    else if (threadIdx.x == 32) take_items(p, m, patience);
    else if (threadIdx.x / 32 == 2) clear_values(p, m, patience);
#if FLOAT8
  } else if (group == GROUPS + 1) {
    fewer_registers<72>();
    convert_items(p, m, patience);
#endif
  } else {
    more_registers<FLOAT8 ? 200 : GROUPS == 2 ? 232 : 160>();
    multiply_items(p, m, group - 1, patience);
  }
}
