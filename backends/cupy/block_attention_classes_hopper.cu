// Attention over a layout whose parts hold other queries in a tile (residue classes, then contiguous queries), in one launch, by Hopper's own instructions: float16 and bfloat16.
//
// A unit is 64 queries of one head, its steps 64 keys. Each group of threads of a block works on units of its own, so that products of one stand beside exponentials of the others and
// nobody waits for a unit's beginning and end. The first pass leaves normalised sums and logsumexps in float32; a unit of the second adds those of its queries to its own, last of all.
// Units of both passes take turns, the second pass some way behind the first: the sums between them are still in the second-level cache, and the inputs' second reading finds the first one's.
// A unit of it waits, by counters, for the chunks of the first pass that hold its queries; tickets ascend, so those that it waits for were taken before.
//
// What a unit is was laid down on the host (hopper_classes.py): 32 bytes a unit and 32 an entry.
// Defines: as block_forward_hopper.cuh; PARTS, SLOTS (of the ring of each group). D and Dv up to 128: three groups have 152 registers a thread.
#define PARTED 1
#define ROWS 64
#define STEP 64
#define TABLE_ROWS 128
#define TILES 1
#include "block_forward_hopper.cuh"
#include "ordered.cuh"

#ifndef PARTS
#define PARTS 2
#endif

constexpr int TEAMS = 3;  // groups of threads, each with units, a ring and a loading thread of its own
static_assert(SLOTS <= 6);
constexpr int SLOT = K_BYTES > V_BYTES ? K_BYTES : V_BYTES, HALF = 32 * VALUES * 4;  // HALF: the sums of 32 queries

struct KeyAxis { TensorMap k, v; };  // boxes of 64 keys x 64 columns
struct Params {
  TensorMap q[3], out;     // of each pass and of the first one's short classes; boxes of 64 rows x 64 columns
  KeyAxis keys[PARTS];
  void* result;            // out again, for units that begin before the call
  float* lse;
  const float* sink;
  float *partial, *before; // [heads,rows,VALUES] sums and [heads,rows] logsumexps of the first pass; row t + shift is query t, columns stand as lanes hold them (for_quads)
  int* ticket;
  int* counters;           // [heads,chunks]: units of the first pass that are written
  const int4 *items, *entries;
  const int *members;      // [chunks]: units of a chunk
  const int* intervals;
  const u32* bitmaps;
  int row_step[2], key_steps[PARTS];  // between a unit's rows; of an axis of two, 0 where it is one
  int T, Hq, group, Dv, heads, tiles, rows, shift, chunks, all;  // heads = B * Hq; tiles: units of a head; all: tickets
  float scale, exponent;   // exponent = scale * log2(e)
};

// Of 64 keys: the first one, kind, how many keys of their block exist; the part; which keys some row sees; where they and the unit's rows stand in the table of masks
struct Entry {
  int key, kind, left, part;
  u32 seen[2];
  int word, row;
};
// t is the query of row 0, negative where the unit begins before the call; of n entries the first `plain` need no mask. The chunk that it belongs to (first pass), or those that it waits for. n = -1: no more units.
struct Item { int t, pass, n, plain, head, chunk, chunk_end; };

// Where a group's ring, queries and barriers stand
struct Team : Tiles {
  u32 sums;
  __device__ __forceinline__ Team(const Tiles& all, int w) : Tiles(all) {
    const u32 end = q + TEAMS * (Q_BYTES + SLOTS * SLOT);
    k = q + TEAMS * Q_BYTES + w * SLOTS * SLOT;
    q += w * Q_BYTES;
    bars = end + w * 1024;
    sums = bars + 256;
  }
  __device__ __forceinline__ u32 slot(int s) const { return k + s * SLOT; }
  __device__ __forceinline__ u32 full(int s) const { return bars + 8 * s; }
  __device__ __forceinline__ u32 free(int s) const { return bars + 8 * (SLOTS + s); }
  __device__ __forceinline__ u32 full_q() const { return bars + 16 * SLOTS; }
  __device__ __forceinline__ u32 free_q() const { return bars + 16 * SLOTS + 8; }
  __device__ __forceinline__ u32 written() const { return bars + 16 * SLOTS + 16; }
  __device__ __forceinline__ u32 published() const { return bars + 16 * SLOTS + 24; }
  __device__ __forceinline__ int* counter() const { return at<int>(bars + 16 * SLOTS + 32); }  // the one to be raised, or -1: no more
  __device__ __forceinline__ const float* lse(int i) const { return at<float>(sums) + 64 * i; }  // of the first pass, for unit i & 1
  __device__ __forceinline__ Item* item(int i) const { return at<Item>(sums + 512) + i; }
  __device__ __forceinline__ Entry* entry(int s) const { return at<Entry>(sums + 576) + s; }
};

__device__ __forceinline__ int row_step(const Params& p, const Item& x) { return x.pass == 1 ? p.row_step[1] : p.row_step[0]; }
__device__ __forceinline__ int query(const Params& p, const Item& x, int r) { return x.t + r * row_step(p, x); }
__device__ __forceinline__ bool first_pass(const Item& x) { return x.pass != 1; }

// --------------------------------------------------------------------------------------------------------------------- loading
// Takes units and brings what they need: queries, keys, the values of the keys before, and in the second pass the sums of the first, as late as they are wanted.
__device__ __forceinline__ void load_items(const Params& p, const Team& m, u32& patience) {
  u32 slot = 0, phase = 0;
  const auto next_slot = [&] { const u32 s = slot; bar_wait(m.free(s), phase ^ 1, patience); advance<SLOTS>(slot, phase); return s; };
  int next = atomicAdd(p.ticket, 1);
  for (u32 i = 0;; i++) {
    int4 a, b;
    int head = -1;
    for (; next < p.all; next = atomicAdd(p.ticket, 1)) {
      const int rank = next % p.tiles;
      a = __ldg(p.items + 2 * rank), b = __ldg(p.items + 2 * rank + 1);  // t, pass, first, n; plain, how many heads behind, chunk, the last one's end
      head = next / p.tiles - b.y;
      if (head >= 0 && head < p.heads) break;
    }
    const bool more = next < p.all && patience;
    next = more ? atomicAdd(p.ticket, 1) : next;
    bar_wait(m.free_q(), i & 1 ^ 1, patience);
    Item& x = *m.item(i & 1);
    x = {a.x, a.y, more ? a.w : -1, b.x, head, b.z, b.w};
    if (!more || a.w == 0) bar_arrive(m.full_q());
    if (!more) return;
    const int n = a.w, h = head % p.Hq, hk = h / p.group, batch = head / p.Hq, step = row_step(p, x);
    if (n) load_slabs<K_SLABS, Q_SLAB>(m.q, &p.q[a.y], m.full_q(), a.x, step > 1 ? step : 0, h, batch);
    int key = 0, part = 0;
    for (int e = 0; e <= n && n; e++) {
      const int key_before = key, part_before = part;
      if (e < n) {
        const int4 c = __ldg(p.entries + 2 * (i64)(a.z + e)), d = __ldg(p.entries + 2 * (i64)(a.z + e) + 1);
        key = c.x; part = c.w;
        const u32 s = next_slot();
        *m.entry(s) = {c.x, c.y, c.z, c.w, {(u32)d.x, (u32)d.y}, d.z, d.w};
        load_slabs<K_SLABS>(m.slot(s), &p.keys[part].k, m.full(s), key, p.key_steps[part], hk, batch);
      }
      if (e > 0) {
        const u32 s = next_slot();
        load_slabs<V_SLABS>(m.slot(s), &p.keys[part_before].v, m.full(s), key_before, p.key_steps[part_before], hk, batch);
      }
    }
    if (first_pass(x)) continue;
    const i64 line = (i64)head * p.rows + a.x + p.shift;
    for (int half = 0; half < 2; half++) {
      const u32 s = next_slot();
      for (int c = b.z; c < b.w && !half; c++) wait_turn(p.counters + (i64)head * p.chunks + c, __ldg(p.members + c), patience);
      bar_expect(m.full(s), HALF + (half ? 0 : 256));
      bulk_load(m.slot(s), p.partial + (line + 32 * half) * VALUES, HALF, m.full(s));
      if (!half) bulk_load(m.sums + 256 * (i & 1), p.before + line, 256, m.full(s));
    }
  }
}

// Counts the units of the first pass that are written, for all groups. By a thread that does nothing else: until all that was written is seen by the whole chip takes as long as a product.
#ifdef SPARSETILE_EMULATE
inline void raise_counter(int* counter) { ++*counter; }
#else
__device__ __forceinline__ void raise_counter(int* counter) { asm volatile("red.release.gpu.global.add.s32 [%0], 1;" :: "l"(counter) : "memory"); }
#endif
__device__ __forceinline__ void raise_counters(const Params& p, const Tiles& all, u32& patience) {
  u32 turns = 0, running = (1 << TEAMS) - 1;
  for (u32 since = (u32)clock(); running && (u32)clock() - since < patience;)
#pragma unroll
    for (int w = 0; w < TEAMS; w++) {
      const Team m(all, w);
      if (!(running >> w & 1) || !bar_test(m.written(), turns >> w & 1)) continue;
      since = (u32)clock();
      turns ^= 1 << w;
      const int counter = *(volatile int*)m.counter();
      bar_arrive(m.published());
      if (counter < 0) running &= ~(1 << w);
      else raise_counter(p.counters + counter);
    }
}

// ---------------------------------------------------------------------------------------------------------------- multiplying
__device__ __forceinline__ int queries(const Params& p) { return p.T; }
__device__ __forceinline__ const float* sinks(const Params& p, const Item& x) { return p.sink; }
// What the first pass leaves: rows of the scratch, no sink
struct Between { float* lse; int rows, shift, Hq, step; float scale; };
__device__ __forceinline__ int queries(const Between& p) { return p.rows; }
__device__ __forceinline__ const float* sinks(const Between&, const Item&) { return nullptr; }
__device__ __forceinline__ int query(const Between& p, const Item& x, int r) { return x.t + r * p.step + p.shift; }

// Of two rows of a lane: 16 bytes are columns 16 j + 2 (lane % 4), the next, and both 8 further on, o[8 j + 2 h ..]. Odd rows have neighbours of 64 bytes exchanged: lanes of two rows read
// other banks of shared memory.
template <class F> __device__ __forceinline__ void for_quads(int h, int row, F f) {
#pragma unroll
  for (int j = 0; j < VALUES / 16; j++) f(8 * j + 2 * h, 4 * (j ^ row & 1) + (thread_again() & 3));
}

__device__ __forceinline__ void multiply_items(const Params& p, const Team& m, int w, u32& patience) {
  const bool leader = threadIdx.x % 128 == 0;
  const auto tid = [] { return thread_again() % 128; };  // seldom wanted: not worth a register
  const auto row = [tid] { const int t = tid(); return t / 32 * 16 + t % 32 / 4; };
  const u64 dq = descriptor(m.q), dk0 = descriptor(m.k), dv0 = descriptor_columns<SLAB>(m.k);
  float s[STEP / 2], o[VALUES / 2], most[2], sum[2], factor[2];
  u32 pr[STEP / 4], slot = 0, phase = 0, turn = 0;
  bool owed = false;                                                               // a unit's output is on its way from the slot before this one
  bool clears = false, clears_next = false, clearing = false, clearing_next = false;  // this thread's key of the values at hand, and of those to come, is seen by nobody; some key is
  Sight sight;
  int word = 0;
  const auto free_slot = [&](u32 s) { __syncwarp(); if (tid() % 32 == 0) bar_arrive(m.free(s)); };  // by every warp: each reads what stands there
  const auto see = [&](u32 s) {  // of the masked keys in this slot, before it is given back
    const Entry& y = *m.entry(s);
    sight = look_at(p, y.kind, y.left, y.row + row());
    word = y.word;
    clearing_next = (y.seen[0] & y.seen[1]) != ~0u;
    clears_next = tid() < STEP && !(y.seen[tid() / 32 & 1] >> (tid() & 31) & 1);
  };
  // Values that no row of the unit sees are made zero: what nobody sees must not reach a product (0 * NaN).
  const auto clear_values = [&](u32 s) {
    if (clearing) {
      if (clears)
        for (int c = 0; c < 8 * V_SLABS; c++) *m.at<uint4>(m.slot(s) + c / 8 * SLAB + tid() * 128 + c % 8 * 16) = make_uint4(0, 0, 0, 0);
      shared_to_copy_engine();
      named_sync(4 + w, 128);
    }
  };
  const auto pass_on = [&] { clears = clears_next; clearing = clearing_next; clears_next = clearing_next = false; };
  const auto settle = [&] {  // the slot that an output leaves from is free once it has been read
    if (owed && leader) tma_store_wait_read();
    if (owed) free_slot((slot + SLOTS - 1) % SLOTS);
    owed = false;
  };
  const auto leave = [&](int counter) {  // a unit's sums for the second pass are written, or there are no more
    if (leader) { bar_wait(m.published(), turn ^ 1, patience); *(volatile int*)m.counter() = counter; }
    turn ^= 1;
    __syncwarp();
    if (tid() % 32 == 0) bar_arrive(m.written());
  };
  for (u32 i = 0;; i++) {
    bar_wait(m.full_q(), i & 1, patience);
    const Item& x = *m.item(i & 1);
    const int n = uniform(x.n), plain = uniform(x.plain);
    if (n < 0 || !patience) break;
#pragma unroll
    for (int h = 0; h < 2; h++) { most[h] = -inf(); sum[h] = 0.f; }
    if (n) {
      const u32 first = uniform(slot);
      bar_wait(m.full(first), phase, patience);
      hold(s);
      wgmma_fence();
      multiply_scores(s, dq, dk0 + first * (SLOT >> 4));
      if (plain == 0) see(first);
      wgmma_wait<0>();
      hold(s);
      settle();
      free_slot(first);
      advance<SLOTS>(slot, phase);
      if (plain == 0) mask(s, p, sight, row(), word);
      soften(s, most, sum, factor, p.exponent);
      round(pr, s);
      pass_on();
      for (int e = 1; e < n; e++) {
        const u32 keys = uniform(slot);
        bar_wait(m.full(keys), phase, patience);
        advance<SLOTS>(slot, phase);
        const u32 values = uniform(slot);
        hold(s); hold(o);
        wgmma_fence();
        multiply_scores(s, dq, dk0 + keys * (SLOT >> 4));
        bar_wait(m.full(values), phase, patience);
        advance<SLOTS>(slot, phase);
        clear_values(values);
        wgmma_fence();
        multiply_values(o, pr, dv0 + values * (SLOT >> 4), e > 1);
        if (e >= plain) see(keys);
        wgmma_wait<1>();
        hold(s);
        free_slot(keys);
        if (e >= plain) mask(s, p, sight, row(), word);
        soften(s, most, sum, factor, p.exponent);
        if (sum[0] + sum[1] < 0.f) bar_wait(m.full_q(), i & 1, patience);  // never: a branch on the sums keeps the exponentials before the wait
        wgmma_wait<0>();
        hold(o);
        free_slot(values);
        if (__any_sync(~0u, factor[0] != 1.f || factor[1] != 1.f)) {
#pragma unroll
          for (int j = 0; j < VALUES / 2; j++) o[j] *= factor[j >> 1 & 1];
        }
        round(pr, s);
        pass_on();
      }
    }
    if (leader) bar_arrive(m.free_q());
    if (n) {
      const u32 values = uniform(slot);
      bar_wait(m.full(values), phase, patience);
      advance<SLOTS>(slot, phase);
      clear_values(values);
      hold(o);
      wgmma_fence();
      multiply_values(o, pr, dv0 + values * (SLOT >> 4), n > 1);
      wgmma_wait<0>();
      hold(o);
      free_slot(values);
    } else {
      settle();
#pragma unroll
      for (int j = 0; j < VALUES / 2; j++) o[j] = 0.f;
    }
    if (first_pass(x)) {
      const Between between{p.before, p.rows, p.shift, p.Hq, row_step(p, x), p.scale};
      finish(between, x, most, sum, factor, row());
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int t = query(p, x, row() + 8 * h);
        float4* line = (float4*)p.partial + ((i64)x.head * p.rows + t + p.shift) * (VALUES / 4);
        if (t >= 0 && t < p.T)
          for_quads(h, t + p.shift, [&](int j, int c) { line[c] = make_float4(o[j] * factor[h], o[j + 1] * factor[h], o[j + 4] * factor[h], o[j + 5] * factor[h]); });
      }
      leave((int)x.head * p.chunks + x.chunk);
      continue;
    }
    // The sums of the first pass count as one more key.
    const u32 low = uniform(slot);
    bar_wait(m.full(low), phase, patience);
    advance<SLOTS>(slot, phase);
    const u32 high = uniform(slot);
    bar_wait(m.full(high), phase, patience);
    advance<SLOTS>(slot, phase);
    float z[4] = {-inf(), -inf(), -inf(), -inf()};
    if ((thread_again() & 3) == 0) { z[0] = m.lse(i & 1)[row()] / p.scale; z[2] = m.lse(i & 1)[row() + 8] / p.scale; }
    soften(z, most, sum, factor, p.exponent);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float weight = __shfl_sync(~0u, z[2 * h], thread_again() & 28);
      const int r = row() + 8 * h;
      const float4* line = m.at<float4>(m.slot(tid() / 64 ? high : low)) + r % 32 * (VALUES / 4);
      for_quads(h, r, [&](int j, int c) {
        const float4 y = line[c];
        const auto add = [&](float& to, float y) { to = weight != 0.f ? fmaf(y, weight, to * factor[h]) : to * factor[h]; };
        add(o[j], y.x); add(o[j + 1], y.y); add(o[j + 4], y.z); add(o[j + 5], y.w);
      });
    }
    finish(p, x, most, sum, factor, row());
    shared_to_copy_engine();  // before the slot is filled again the sums have been read: else the loads may still be under way
    free_slot(low);
    named_sync(4 + w, 128);
    store_rows(p, x, m, m.slot(high), o, factor, 0, tid(), 4 + w);
    owed = true;
  }
  settle();
  if (leader) tma_store_wait();
  leave(-1);
}

extern "C" __global__ void __launch_bounds__(128 + 128 * TEAMS, 1) forward(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(raw);
  const Tiles all(raw);
  if (threadIdx.x == 0) {
    for (int w = 0; w < TEAMS; w++) {
      const Team m(all, w);
      for (int s = 0; s < SLOTS; s++) { bar_init(m.full(s), 1); bar_init(m.free(s), 4); }
      bar_init(m.full_q(), 1); bar_init(m.free_q(), 1);
      bar_init(m.written(), 4); bar_init(m.published(), 1);
    }
    bar_fence();
  }
  __syncthreads();
  u32 patience = PATIENCE;
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (group == 0) {
    fewer_registers<56>();
    if (threadIdx.x == 96) raise_counters(p, all, patience);
    else if (threadIdx.x % 32 == 0 && threadIdx.x / 32 < TEAMS) load_items(p, Team(all, threadIdx.x / 32), patience);
  } else {
    more_registers<152>();
    multiply_items(p, Team(all, group - 1), group - 1, patience);
  }
}
