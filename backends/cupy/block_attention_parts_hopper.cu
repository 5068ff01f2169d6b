// Attention over all parts of a layout in one launch, by Hopper's own instructions: float16 and bfloat16, tiles of 128 queries of one head, key blocks of 128.
//
// Parts whose tiles hold the same queries are one pass: their blocks are entries of one item. Where rows differ (residue classes, then contiguous queries), the first pass leaves
// normalised sums and logsumexps in float32, and the second starts from them as if from one more key. The second pass of a head follows the first pass of the next one; an item of it waits
// for the head's first pass by a counter; tickets ascend, so those that it waits for were taken before.
//
// What an item is was laid down on the host (hopper_parts.py): 32 bytes an item and 32 an entry, fetched ahead; a block has no more to look up than its row of the table of masks.
// Defines: as block_forward_hopper.cuh, PARTS.
#define PARTED 1
#include "block_forward_hopper.cuh"
#include "ordered.cuh"

#ifndef PARTS
#define PARTS 2
#endif

constexpr int ITEMS = 4, INLINE = 2;  // entries that come with their item
constexpr int READERS = 1 + 5 * GROUPS;  // of an item: the loading thread, the multiplying warps, those that raise counters

struct KeyAxis { TensorMap k, v; };  // boxes of a block's keys x 64 columns
struct Params {
  TensorMap q[3], out;     // of each pass and of the first one's short classes, boxes of a tile's rows x 64 columns; out: 64 x 64
  KeyAxis keys[PARTS];
  void* result;            // out again, for tiles without keys
  float* lse;
  const float* sink;
  float* partial;          // [B,Hq,T,VALUES] of the first pass; columns stand as lanes hold them (for_quads)
  int* ticket;
  int* counters;           // [B * Hq]: multiplying groups that are through with a tile of the first pass
  const int4 *items, *entries;
  const int* intervals;
  const u32* bitmaps;
  int row_step[2], key_steps[PARTS];  // between a tile's rows; of an axis of two, 0 where it is one
  int T, Hq, group, Dv, heads, tiles, steps, section, all;  // heads = B * Hq; `section` steps at a time, each the items of a head; all: items of all steps
  float scale, exponent;   // exponent = scale * log2(e)
};

// Entry of a list: the first key, kind, how many keys of the block exist; its part; which keys some row sees
struct Entry {
  int key, kind, left, part;
  uint4 seen;
};
// A query tile: t is the query of its row 0, negative where it starts before the call; of n entries the first `plain` need no mask. wait: how often the head's counter
// is raised before the sums that it starts from are there, or 0; raises: whether it leaves sums. n = -1: no more items.
struct Item {
  int t, pass, first, n, plain, head, wait, raises;
  Entry entries[INLINE];
};

struct Shared : Tiles {
  using Tiles::Tiles;
  __device__ __forceinline__ u32 full_q(int s) const { return bars + 32 * STAGES + 8 * s; }
  __device__ __forceinline__ u32 free_q(int s) const { return bars + 32 * STAGES + 16 + 8 * s; }
  __device__ __forceinline__ u32 full_item(int s) const { return bars + 32 * STAGES + 32 + 8 * s; }
  __device__ __forceinline__ u32 free_item(int s) const { return bars + 32 * STAGES + 32 + 8 * (ITEMS + s); }
  __device__ __forceinline__ u32 written(int w) const { return bars + 32 * STAGES + 32 + 16 * ITEMS + 8 * w; }  // a group's sums for the next pass
  __device__ __forceinline__ Entry* entry(int s) const { return at<Entry>(bars + 32 * STAGES + 48 + 16 * ITEMS) + s; }  // what stands in stage s of the keys
  __device__ __forceinline__ Item* item(int s) const { return at<Item>(bars + 32 * STAGES + 48 + 16 * ITEMS + STAGES * sizeof(Entry)) + s; }
};

__device__ __forceinline__ int row_step(const Params& p, const Item& x) { return x.pass == 1 ? p.row_step[1] : p.row_step[0]; }
__device__ __forceinline__ int query(const Params& p, const Item& x, int r) { return x.t + r * row_step(p, x); }

__device__ __forceinline__ Entry fetch_entry(const Params& p, int n) {
  const int4 a = __ldg(p.entries + 2 * (i64)n), b = __ldg(p.entries + 2 * (i64)n + 1);
  return {a.x, a.y, a.z, a.w, {(u32)b.x, (u32)b.y, (u32)b.z, (u32)b.w}};
}

// ---------------------------------------------------------------------------------------------------------------- taking items
__device__ __forceinline__ bool open_item(const Params& p, int number, Item& x) {
  const int from = number / (p.section * p.tiles) * p.section, together = imin(p.section, p.steps - from), y = number - from * p.tiles, rank = y / together;
  const int4 a = __ldg(p.items + 2 * (i64)rank), b = __ldg(p.items + 2 * (i64)rank + 1);  // t, pass, first, n; plain, how many heads behind, wait, raises
  const int head = from + y % together + b.y;
  if (head < 0 || head >= p.heads) return false;
  x.t = a.x; x.pass = a.y; x.first = a.z; x.n = a.w;
  x.plain = b.x; x.head = head; x.wait = b.z; x.raises = b.w;
#pragma unroll
  for (int e = 0; e < INLINE; e++) x.entries[e] = fetch_entry(p, a.z + imin(e, imax(a.w - 1, 0)));
  return true;
}

__device__ __forceinline__ void take_items(const Params& p, const Shared& m, u32& patience) {
  for (u32 i = 0;; i++) {
    Item& x = *m.item(i % ITEMS);
    bar_wait(m.free_item(i % ITEMS), parity<ITEMS>(i) ^ 1, patience);
    int number;
    do number = atomicAdd(p.ticket, 1); while (number < p.all && !open_item(p, number, x));
    const bool more = number < p.all && patience;
    if (!more) x.n = -1;
    bar_arrive(m.full_item(i % ITEMS));
    if (!more) return;
  }
}

// --------------------------------------------------------------------------------------------------------------------- loading
// K of a block, then V of the block before: values are wanted one product later
__device__ __forceinline__ void load_items(const Params& p, const Shared& m, u32& patience) {
  u32 k = 0, v = 0;
  for (u32 i = 0;; i++) {
    bar_wait(m.full_item(i % ITEMS), parity<ITEMS>(i), patience);
    const Item& x = *m.item(i % ITEMS);
    const int n = x.n, first = x.first;
    if (n < 0 || !patience) return;
    const int b = x.head / p.Hq, h = x.head % p.Hq, hk = h / p.group, step = row_step(p, x);
    bar_wait(m.free_q(i % TILES), parity<TILES>(i) ^ 1, patience);
    if (x.wait) wait_turn(p.counters + x.head, x.wait, patience);
    if (n) load_slabs<K_SLABS>(m.q + i % TILES * Q_BYTES, &p.q[x.pass], m.full_q(i % TILES), x.t, step > 1 ? step : 0, h, b);
    else bar_arrive(m.full_q(i % TILES));
    int key = 0, part = 0;
    for (int e = 0; e <= n && n; e++) {
      const int before = key, part_before = part;
      if (e < n) {
        const Entry y = e < INLINE ? x.entries[e] : fetch_entry(p, first + e);
        key = y.key; part = y.part;
        bar_wait(m.free_k(k % STAGES), parity<STAGES>(k) ^ 1, patience);
        *m.entry(k % STAGES) = y;
        load_slabs<K_SLABS>(m.k + k % STAGES * K_BYTES, &p.keys[part].k, m.full_k(k % STAGES), key, p.key_steps[part], hk, b);
        k++;
      }
      if (e > 0) {
        bar_wait(m.free_v(v % STAGES), parity<STAGES>(v) ^ 1, patience);
        load_slabs<V_SLABS>(m.v + v % STAGES * V_BYTES, &p.keys[part_before].v, m.full_v(v % STAGES), before, p.key_steps[part_before], hk, b);
        v++;
      }
    }
    bar_arrive(m.free_item(i % ITEMS));
  }
}

// ---------------------------------------------------------------------------------------------------------------- multiplying
__device__ __forceinline__ int queries(const Params& p) { return p.T; }
__device__ __forceinline__ const float* sinks(const Params& p, const Item& x) { return x.raises ? nullptr : p.sink; }
__device__ __forceinline__ bool in_call(const Params& p, int t) { return t >= 0 && t < p.T; }

// What lies between float32 rows of the sums between passes and two rows of a lane: 16 bytes are columns 16 j + 2 (lane % 4), the next, and both 8 further on, o[8 j + 2 h ..].
template <class F> __device__ __forceinline__ void for_quads(const Params& p, const Item& x, int row, F f) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int t = query(p, x, row + 8 * h);
    float4* line = (float4*)p.partial + ((i64)x.head * p.T + t) * (VALUES / 4) + (thread_again() & 3);
#pragma unroll
    for (int j = 0; j < VALUES / 16; j++) f(8 * j + 2 * h, line + 4 * j, in_call(p, t));
  }
}

// Another block of threads wrote it under this kernel: not through the first-level cache.
#ifdef SPARSETILE_EMULATE
template <class T> inline T fresh(const T* x) { return *x; }
inline void raise_counter(int* counter) { ++*counter; }
#else
template <class T> __device__ __forceinline__ T fresh(const T* x) { return __ldcg(x); }
__device__ __forceinline__ void raise_counter(int* counter) { asm volatile("red.release.gpu.global.add.s32 [%0], 1;" :: "l"(counter) : "memory"); }
#endif

// Counts the tiles that group w has written for the next pass. By a thread that does nothing else: until all that was written is seen by the whole chip takes as long as a product.
__device__ __forceinline__ void raise_counters(const Params& p, const Shared& m, int w, u32& patience) {
  u32 turn = 0;
  for (u32 i = 0;; i++) {
    bar_wait(m.full_item(i % ITEMS), parity<ITEMS>(i), patience);
    const Item& x = *m.item(i % ITEMS);
    if (x.n < 0 || !patience) return;
    if (x.raises) {
      bar_wait(m.written(w), turn, patience);
      turn ^= 1;
      raise_counter(p.counters + x.head);
    }
    bar_arrive(m.free_item(i % ITEMS));
  }
}

// a tile without keys: this group's 64 rows of the first pass, or of the last
__device__ __forceinline__ void store_nothing(const Params& p, const Item& x, int w, int tid) {
  const int n = x.raises ? VALUES / 4 : p.Dv / 8;
  uint4* to = x.raises ? (uint4*)p.partial : (uint4*)p.result;
  for (int i = tid; i < 64 * n; i += 128) {
    const int t = query(p, x, 64 * w + i / n);
    if (in_call(p, t)) to[((i64)x.head * p.T + t) * n + i % n] = make_uint4(0, 0, 0, 0);
  }
  const int t = query(p, x, 64 * w + tid);
  if (p.lse && tid < 64 && in_call(p, t)) p.lse[(i64)x.head * p.T + t] = -inf();
}

__device__ __forceinline__ void multiply_items(const Params& p, const Shared& m, int w, u32& patience) {
  const bool leader = threadIdx.x % 128 == 0;
  const auto tid = [] { return thread_again() % 128; };  // seldom wanted: not worth a register
  const auto row = [w, tid] { const int t = tid(); return w * 64 + t / 32 * 16 + t % 32 / 4; };
  const u64 dq0 = descriptor(m.q + w * 64 * 128), dk0 = descriptor(m.k), dv0 = descriptor_columns<SLAB>(m.v);
  float s[64], o[VALUES / 2], most[2], sum[2], factor[2];
  u32 pr[32], i = 0, k = 0;  // turns: item, key block; values are one block behind
  int n, plain;
  bool owed = false;                         // the output of the item before is on its way
  bool clears = false, clears_next = false;  // this thread's key of the values at hand, and of those to come, is seen by nobody
  bool clearing = false, clearing_next = false;  // some key is
  Sight sight;
  const auto uniform = [](u32 x) { return __shfl_sync(~0u, x, 0); };
  u32 at_q, at_k, at_v;
  const auto aim = [&](u32 i) {  // known to be uniform, and before the waits: a shuffle takes 30 clocks
    at_q = uniform(i % TILES) * (Q_BYTES >> 4);
    at_k = uniform(k % STAGES) * (K_BYTES >> 4);
    at_v = uniform((k - 1) % STAGES) * (V_BYTES >> 4);
  };
  const auto see = [&] {  // of the masked block that stands at this turn; before its stage is given back
    const Entry& y = *m.entry(k % STAGES);
    sight = look_at(p, y.kind, y.left, row());
    const u32 word = tid() / 32 == 0 ? y.seen.x : tid() / 32 == 1 ? y.seen.y : tid() / 32 == 2 ? y.seen.z : y.seen.w;
    clearing_next = (y.seen.x & y.seen.y & y.seen.z & y.seen.w) != ~0u;
    clears_next = !(word >> (tid() & 31) & 1);
  };
  // Values that no row of the tile sees are made zero: what nobody sees must not reach a product (0 * NaN). Both groups do, so that neither waits for the other.
  const auto clear_values = [&] {
    if (clearing) {
      if (clears)
        for (int c = 0; c < 8 * V_SLABS; c++) *m.at<uint4>(m.v + (k - 1) % STAGES * V_BYTES + c / 8 * SLAB + tid() * 128 + c % 8 * 16) = make_uint4(0, 0, 0, 0);
      shared_to_copy_engine();
      named_sync(4 + w, 128);
    }
  };
  // The block's scores are made: its values are next.
  const auto pass_on = [&] {
    clears = clears_next; clearing = clearing_next; clears_next = clearing_next = false;
    k++;
  };
  const auto free_values = [&] { if (leader) bar_arrive(m.free_v((k - 1) % STAGES)); };
  const auto await_values = [&] { bar_wait(m.full_v((k - 1) % STAGES), parity<STAGES>(k - 1), patience); };
  const auto begin = [&](const float (&before)[2]) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      most[h] = before[h] / p.scale;
      sum[h] = most[h] != -inf() && (thread_again() & 3) == 0 ? 1.f : 0.f;
    }
  };
  const auto free_keys = [&] { __syncwarp(); if (tid() % 32 == 0) bar_arrive(m.free_k(k % STAGES)); };  // by every warp: each reads what stands there
  float before[2];
  const auto know = [&](u32 i) -> const Item& {  // item i
    bar_wait(m.full_item(i % ITEMS), parity<ITEMS>(i), patience);
    const Item& x = *m.item(i % ITEMS);
    n = uniform(x.n);
    plain = uniform(x.plain);
    return x;
  };
  const auto await_tiles = [&](u32 i) {  // item i's queries, and with them the sums that it starts from; its first keys
    bar_wait(m.full_q(i % TILES), parity<TILES>(i), patience);
    bar_wait(m.full_k(k % STAGES), parity<STAGES>(k), patience);
  };
  const auto ask_before = [&](const Item& x) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int t = query(p, x, row() + 8 * h);
      before[h] = x.wait && in_call(p, t) ? fresh(p.lse + (i64)x.head * p.T + t) : -inf();
    }
  };
  const auto ask_sums = [&](const Item& x) {
    if (!x.wait) return;
    for_quads(p, x, row(), [&](int j, const float4* from, bool there) {
      const float4 y = there ? fresh(from) : make_float4(0.f, 0.f, 0.f, 0.f);
      o[j] = y.x; o[j + 1] = y.y; o[j + 4] = y.z; o[j + 5] = y.w;
    });
  };
  const auto see_first = [&] {
    clears_next = clearing_next = false;
    if (plain == 0) see();
  };
  const auto open = [&] {  // item i, once it is known, and its first scores; the sums that it starts from come meanwhile
    const Item& x = know(i);
    if (n == 0) bar_wait(m.full_q(i % TILES), parity<TILES>(i), patience);
    if (n <= 0) return;
    await_tiles(i);
    aim(i);
    ask_before(x);
    ask_sums(x);
    hold(s);
    wgmma_fence();
    multiply_scores(s, dq0 + at_q, dk0 + at_k);
    see_first();
    wgmma_wait<0>();
    hold(s);
  };
  // May the first scores of item y go along with the last product of item x? Not where y may wait for x, or for one that waits for x in turn: heads wait for themselves alone.
  const auto goes_along = [&](const Item& x, const Item& y) { return TILES == 2 && n > 0 && (!x.raises || !y.wait || y.head < x.head); };
  const auto written = [&] { __syncwarp(); if (tid() % 32 == 0) bar_arrive(m.written(w)); };
  const auto close = [&](u32 i) { __syncwarp(); if (tid() % 32 == 0) bar_arrive(m.free_item(i % ITEMS)); };
  const auto settle = [&](u32 i) {  // the query tile is free once its output has been read
    if (leader) { tma_store_wait_read(); bar_arrive(m.free_q(i % TILES)); }
    owed = false;
  };
  open();
  while (n >= 0) {
    if (n == 0) {
      const Item& x = *m.item(i % ITEMS);
      store_nothing(p, x, w, tid());
      if (x.raises) written();
      close(i);
      if (owed) settle(i - 1);
      settle(i++);
      open();
      continue;
    }
    free_keys();
    begin(before);
    if (plain == 0) mask(s, p, sight, row());
    soften(s, most, sum, factor, p.exponent);
    round(pr, s);
    pass_on();
    if (owed) settle(i - 1);
    bool more = m.item(i % ITEMS)->wait;
    if (more) {
#pragma unroll
      for (int j = 0; j < VALUES / 2; j++) o[j] *= factor[j >> 1 & 1];
    }
    for (int e = 1; e < n; e++) {
      bar_wait(m.full_k(k % STAGES), parity<STAGES>(k), patience);
      aim(i);
      hold(s); hold(o);
      wgmma_fence();
      multiply_scores(s, dq0 + at_q, dk0 + at_k);
      await_values();
      clear_values();
      wgmma_fence();
      multiply_values(o, pr, dv0 + at_v, more);
      if (e >= plain) see();
      wgmma_wait<1>();
      hold(s);
      if (e >= plain) mask(s, p, sight, row());
      free_keys();
      soften(s, most, sum, factor, p.exponent);
      if (sum[0] + sum[1] < 0.f) bar_wait(m.full_q(i % TILES), parity<TILES>(i), patience);  // never: a branch on the sums keeps the exponentials before the wait
      wgmma_wait<0>();
      hold(o);
      free_values();
      if (__any_sync(~0u, factor[0] != 1.f || factor[1] != 1.f)) {
#pragma unroll
        for (int j = 0; j < VALUES / 2; j++) o[j] *= factor[j >> 1 & 1];
      }
      more = true;
      round(pr, s);
      pass_on();
    }
    const Item &x = *m.item(i % ITEMS), &y = know(i + 1);
    const bool along = goes_along(x, y);
    if (along) {
      await_tiles(i + 1);
      aim(i + 1);
      ask_before(y);
      hold(s); hold(o);
      wgmma_fence();
      multiply_scores(s, dq0 + at_q, dk0 + at_k);
      await_values();
      clear_values();
      wgmma_fence();
      multiply_values(o, pr, dv0 + at_v, more);
      see_first();
      finish(p, x, most, sum, factor, row());
      wgmma_wait<0>();
      hold(s); hold(o);
    } else {
      aim(i);
      await_values();
      clear_values();
      hold(o);
      wgmma_fence();
      multiply_values(o, pr, dv0 + at_v, more);
      finish(p, x, most, sum, factor, row());
      wgmma_wait<0>();
      hold(o);
    }
    free_values();
    if (x.raises) {
      for_quads(p, x, row(), [&](int j, float4* to, bool there) {
        if (there) *to = make_float4(o[j] * factor[j >> 1 & 1], o[j + 1] * factor[j >> 1 & 1], o[j + 4] * factor[j >> 1 & 1], o[j + 5] * factor[j >> 1 & 1]);
      });
      written();
    } else {
      store_rows(p, x, m, m.q + i % TILES * Q_BYTES, o, factor, w, tid());
    }
    close(i);
    if (TILES == 1) settle(i); else owed = true;
    i++;
    if (along) ask_sums(y); else open();
  }
  if (leader) tma_store_wait();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) forward(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(raw);
  const Shared m(raw);
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) { bar_init(m.full_k(s), 1); bar_init(m.free_k(s), 4 * GROUPS); bar_init(m.full_v(s), 1); bar_init(m.free_v(s), GROUPS); }
    for (int s = 0; s < TILES; s++) { bar_init(m.full_q(s), 1); bar_init(m.free_q(s), GROUPS); }
    for (int w = 0; w < GROUPS; w++) bar_init(m.written(w), 4);
    for (int s = 0; s < ITEMS; s++) { bar_init(m.full_item(s), 1); bar_init(m.free_item(s), READERS); }
    bar_fence();
  }
  __syncthreads();
  u32 patience = PATIENCE;
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (group == 0) {
    fewer_registers<40>();
    if (threadIdx.x == 0) load_items(p, m, patience);
    else if (threadIdx.x == 32) take_items(p, m, patience);
    else if (threadIdx.x == 64 || threadIdx.x == 96) raise_counters(p, m, threadIdx.x / 32 - 2, patience);
  } else {
    more_registers<232>();
    multiply_items(p, m, group - 1, patience);
  }
}
