// What the Hopper backward kernels over block lists share: a block of threads that plans, loads and multiplies one key block after the other, 64 queries a step. Include after
// `struct Params` and `constexpr bool ADDS`: whether dQ leaves as float32 sums to be added.
// Defines: KIND, WIDTH (D rounded up to 64, 128 or 192), VALUES (Dv likewise, at most 128).
#pragma once
#include "wgmma.cuh"
#include "parts.cuh"

#ifndef KIND
#define KIND BFLOAT16
#endif
#ifndef WIDTH
#define WIDTH 128
#endif
#ifndef VALUES
#define VALUES 128
#endif

constexpr int ROWS = 128, STEP = 64, SLAB = 128 * 128, PART = 64 * 128;  // a slab: 64 columns of a key block; a part: 64 columns of 64 queries
constexpr int Q_PARTS = WIDTH / 64, V_PARTS = VALUES / 64;
constexpr int SUMS = ADDS ? STEP * WIDTH * 4 : 0, LINE = 3 * STEP + 4;               // bytes of a step's dQ; floats of a step's rows
constexpr bool WIDE = WIDTH + VALUES > 256;
constexpr int PLANS = 4, READERS = ADDS ? 5 : 4;                                     // of a plan: the loading thread, two adding threads or one that stores dS, two groups
constexpr float FAR = 100.f;                                                         // logsumexps past which scores are rounded before the subtraction, as in the forward

enum { FIRST = 1, LAST = 2, CLEAR = 4, EMPTY = 8, STOP = 16, SECOND = 32, SECTION = 64 };  // SECOND: adds to the second sum; SECTION: key_head is the place of its part
// A query tile of an item. row: head * tiles + tile; t: query of its row 0, negative where it starts before the call; state: bits above, from bit 8 on how many keys of the block exist and, where nothing is added, `quarters`.
struct Plan { int row, t, head, key_head, block, kind, rank, state; };
enum { KEY_HEAD = 3, BLOCK, KIND_OF, RANK, STATE };  // its fields
// Quarters of a block, 64 queries b by 64 keys w, as bits 2 b + w of a state: of which some key is seen, then those of b = 0 of the item's next block, then which are seen entirely.
constexpr int SEEN = 16, COMING = 20, WHOLE = 24;

struct Shared {
  u32 base, k, v, q, dout, ds, sums, rows, plans, bars;
  unsigned char* raw;
  __device__ __forceinline__ explicit Shared(unsigned char* raw) : base(shared_address(raw)), raw(raw) {
    k = __shfl_sync(~0u, (base + 1023) & ~1023u, 0);  // known to be uniform: descriptors stay in uniform registers
    v = k + Q_PARTS * SLAB; q = v + V_PARTS * SLAB; dout = q + 2 * Q_PARTS * PART; ds = dout + 2 * V_PARTS * PART; sums = ds + 4 * PART;
    rows = sums + 2 * SUMS; plans = rows + 2 * LINE * 4; bars = plans + PLANS * sizeof(Plan);
  }
  __device__ __forceinline__ u32 full_q(int s) const { return bars + 8 * s; }
  __device__ __forceinline__ u32 free_q(int s) const { return bars + 16 + 8 * s; }
  __device__ __forceinline__ u32 full_ds(int s) const { return bars + 32 + 8 * s; }
  __device__ __forceinline__ u32 full_sums(int s) const { return bars + 48 + 8 * s; }
  __device__ __forceinline__ u32 free_sums(int s) const { return bars + 64 + 8 * s; }
  __device__ __forceinline__ u32 free_ds(int s) const { return full_sums(s); }  // where dS leaves instead of sums
  __device__ __forceinline__ u32 kept() const { return free_sums(0); }  // the item's keys have left
  __device__ __forceinline__ u32 full_plan(u32 n) const { return bars + 80 + 8 * (n % PLANS); }  // of plan n
  __device__ __forceinline__ u32 free_plan(u32 n) const { return bars + 80 + 8 * (PLANS + n % PLANS); }
  __device__ __forceinline__ u32 full_keys() const { return bars + 80 + 16 * PLANS; }
  __device__ __forceinline__ u32 free_keys() const { return bars + 88 + 16 * PLANS; }
  __device__ __forceinline__ u32 landed() const { return bars + 96 + 16 * PLANS; }  // keys and values of which some must be cleared
  __device__ __forceinline__ u32 item() const { return bars + 80 + 16 * PLANS + 24; }
  template <class T> __device__ __forceinline__ T* at(u32 address) const { return (T*)(raw + (address - base)); }
  __device__ __forceinline__ u32 plan_at(u32 n, int field) const { return plans + n % PLANS * sizeof(Plan) + 4 * field; }
  __device__ __forceinline__ Plan* plan(u32 n) const { return at<Plan>(plan_at(n, 0)); }
};

// ------------------------------------------------------------------------------------------------------------------- planning
// of query tile i of the lists: the query of its row 0, its place among the tiles of the call, and how many rows come before the call's last query
__device__ __forceinline__ int first_query(const Params& p, int i, int start) {
  return row_steps(p) ? __ldg(p.lists.q_order + (i64)i * ROWS) - start : (p.lists.first + i) * ROWS - start;
}
__device__ __forceinline__ int tile_of(const Params& p, int i, int start) { return row_steps(p) ? i : p.lists.first + i - floor_div(start, ROWS); }
__device__ __forceinline__ int end_row(const Params& p, int t) { return imin(ROWS, PARTED ? (p.at.T - t + row_step(p) - 1) / row_step(p) : p.at.T - t); }

// of the lists' query tiles, those that hold queries of the call: first .. end - 1
__device__ __forceinline__ int2 rows_of_call(const Params& p, int start) {
  if (row_steps(p)) return make_int2(0, p.lists.nq);
  const i64 low = (i64)start - (i64)p.lists.first * ROWS, high = low + p.at.T, all = (i64)p.lists.nq * ROWS;
  return low >= all || high <= 0 ? make_int2(0, 0) : make_int2((int)((low < 0 ? 0 : low) / ROWS), (int)(((high < all ? high : all) + ROWS - 1) / ROWS));
}

// What an item is: the constructor is the kernel's own. slot: the place of a section's sums, or -1.
struct Item {
  int key_head, b, hk, block, slot, start, limit, first_row, end_row;  // tiles first_row .. end_row - 1 of the lists hold queries
  int first_of_section, end_of_section;                                // where nothing is added: those that a section walks through
  __device__ __forceinline__ Item(const Params& p, int number);
  __device__ __forceinline__ int list(const Params& p, int r) const { return __ldg(p.lists.list_of + b * p.lists.list_b + (hk * p.group + r) * p.lists.list_h); }
};

__device__ __forceinline__ bool known_whole(const Params& p, const Item& x);  // is every key of the block seen by some query of the call? The kernel's own; false: not known

struct Planner {
  const Params& p;
  const Shared& m;
  const int lane;
  u32 patience = PATIENCE, n = 0, turn = 0;  // plans made; parity of `landed`
  bool open = false;

  __device__ __forceinline__ void publish(int flags) {
    if (!open) return;
    open = false;
    if (lane == 0) {
      if (flags) m.plan(n)->state |= flags;
      bar_arrive(m.full_plan(n));
    }
    __syncwarp();
    n++;
  }
  __device__ __forceinline__ void write(const Plan& x) {
    bar_wait(m.free_plan(n), n / PLANS & 1 ^ 1, patience);
    if (lane == 0) *m.plan(n) = x;
    __syncwarp();
    open = true;
  }
  // Makes K and V zero where no query of the call sees the key: what nobody sees must not reach a product (0 * NaN). Only partial blocks leave such keys. Once the item's first
  // plan is out: then the loading thread loads.
  __device__ __forceinline__ void clear(const Item& x, bool whole);
  __device__ __forceinline__ bool whole(const Item& x);  // is every key seen, as far as that is known without looking at masks?
  __device__ __forceinline__ void item(int number);
};

// Whether a section walks through this row of the lists. What is seen of its keys all rows say; where sums are added the item has no others.
__device__ __forceinline__ bool in_section(const Item& x, int row) {
  return ADDS || x.slot < 0 || (row >= x.first_of_section && row < x.end_of_section);
}

// entries of the walk for head r of an item's group, those whose rows the item has; all lanes of a warp together
struct Entries {
  int e, until;
  u32 found;  // of the 32 entries before e, those still to come
  __device__ __forceinline__ Entries(const Params& p, const Item& x, int r) : found(0) {
    const int* o = p.by_key_offsets + 2 * ((i64)x.list(p, r) * p.lists.nk + x.block);
    e = x.first_row < x.end_row ? __ldg(o) : 0;
    until = x.first_row < x.end_row ? __ldg(o + 2) : 0;
  }
  __device__ __forceinline__ bool next(const Params& p, const Item& x, int lane, int4& w, bool all = false) {
    while (!found) {
      if (e >= until) return false;
      const int row = e + lane < until ? p.walk[e + lane].x : -1;
      found = __ballot_sync(~0u, row >= x.first_row && row < x.end_row && (all || in_section(x, row)));
      e += 32;
    }
    w = p.walk[e - 33 + __ffs(found)];
    found &= found - 1;
    return true;
  }
};

__device__ __forceinline__ bool Planner::whole(const Item& x) {
  if (known_whole(p, x)) return true;
  int4 w;
  for (int r = 0; r < (p.lists.list_h ? p.group : 1); r++)
    for (Entries all(p, x, r); all.next(p, x, lane, w, true);)
      if (w.y < 0) return true;
  return false;
}

__device__ __forceinline__ void Planner::clear(const Item& x, bool whole) {
  u32 word = whole ? ~0u : 0u;  // keys 32 (lane % 4) .. of the block, by every eighth row
  const auto together = [](u32 word) {
    for (int n = 4; n < 32; n *= 2) word |= __shfl_xor_sync(~0u, word, n);
    return word;
  };
  int4 w;
  for (int r = 0; !whole && r < (p.lists.list_h ? p.group : 1); r++) {
    for (Entries all(p, x, r); !whole && all.next(p, x, lane, w, true);) {
      const int t = first_query(p, w.x, x.start);
#pragma unroll 1
      for (int y = imax(-t, 0) + lane / 4; y < end_row(p, t); y += 8) word |= kind_word<ROWS, KEYS>(p.lists, w.y, y, lane % 4 * 32);
      whole = __all_sync(~0u, together(word) == ~0u);  // global keys are seen by hundreds of tiles
    }
  }
  word = together(word);
  bar_wait(m.landed(), turn & 1, patience);
  turn ^= 1;
#pragma unroll 1
  for (int n = 0; n < 4; n++) {
    const u32 seen = __shfl_sync(~0u, word, n) & range_bits(0, existing_keys(p, x.block, x.limit) - 32 * n);
#pragma unroll 1
    for (int y = lane / 8; y < 32 && seen != ~0u; y += 4)
      if (!(seen >> y & 1))
        for (int c = 0; c < Q_PARTS + V_PARTS; c++) *m.at<uint4>(m.k + c * SLAB + (32 * n + y) * 128 + lane % 8 * 16) = make_uint4(0, 0, 0, 0);
  }
  shared_to_copy_engine();
  __syncwarp();
  if (lane == 0) bar_arrive(m.full_keys());
}

__device__ __forceinline__ void Planner::item(int number) {
  Item& x = *m.at<Item>(m.item());  // not in registers: these warps have few
  __syncwarp();
  if (lane == 0) x = Item(p, number);
  __syncwarp();
  if (x.block < 0) return;
  const int left = imin(PARTED ? imax(existing_keys(p, x.block, x.limit), 0) : existing_keys(p, x.block, x.limit), KEYS);
  const bool all = whole(x), clears = !all || (left < KEYS && x.limit < p.at.S);
  Entries some(p, x, 0);
  for (int made = 0, r = 0;; made++) {
    int4 w;
    bool found = some.next(p, x, lane, w);
    while (!found && ++r < p.group) {
      some = Entries(p, x, r);
      found = some.next(p, x, lane, w);
    }
    if (!found && !made && (!ADDS || x.slot < 0)) write({0, 0, 0, ADDS || x.slot < 0 ? x.key_head : x.slot, x.block, -1, 0, ADDS || x.slot < 0 ? EMPTY : EMPTY | SECTION});
    publish(!found ? LAST : ADDS ? 0 : (w.w & 3) << COMING);
    if (made == 1 && clears) clear(x, all);
    if (!found) return;
    const int head = x.b * p.Hq + x.hk * p.group + r;
    write({head * p.tiles + tile_of(p, w.x, x.start), first_query(p, w.x, x.start), head, x.slot < 0 ? x.key_head : x.slot, x.block, w.y, w.z,
           (made ? 0 : clears ? FIRST | CLEAR : FIRST) | (!ADDS ? (w.w & 15) << SEEN | w.w >> 4 << WHOLE : w.w ? SECOND : 0) | (x.slot < 0 ? 0 : SECTION) | left << 8});
  }
}

__device__ __forceinline__ void plan_items(const Params& p, const Shared& m) {
  Planner planner = {p, m, (int)(threadIdx.x & 31)};
  for (;;) {
    int number = 0;
    if (planner.lane == 0) number = atomicAdd(p.ticket, 1);
    number = __shfl_sync(~0u, number, 0);
    if (number >= p.items || !planner.patience) break;
    planner.item(number);
  }
  planner.write({0, 0, 0, 0, 0, -1, 0, STOP});
  planner.publish(0);
}

__device__ __forceinline__ Plan next_plan(const Shared& m, u32& n, u32& patience) {
  bar_wait(m.full_plan(n), n / PLANS & 1, patience);
  const Plan x = *m.plan(n);
  bar_arrive(m.free_plan(n++));
  return x;
}

// ------------------------------------------------------------------------------------------------------------ loading, adding
__device__ __forceinline__ void load_items(const Params& p, const Shared& m) {
  u32 patience = PATIENCE, n = 0, turn = 1, items = 0;
  for (;;) {
    const Plan x = next_plan(m, n, patience);
    if (x.state & STOP || !patience) return;
    if (x.state & EMPTY) continue;
    const int b = x.head / p.Hq, h = x.head % p.Hq;
    if (x.state & FIRST) {
      const u32 bar = x.state & CLEAR ? m.landed() : m.full_keys();
      bar_wait(m.free_keys(), items & 1 ^ 1, patience);
      items = (items + 1) % 2;
      bar_expect(bar, (Q_PARTS + V_PARTS) * SLAB);
      const int key = first_key(p, x.block);
      for (int c = 0; c < Q_PARTS; c++) load_box(m.k + c * SLAB, p.k, bar, 64 * c, key, key_steps(p), p.at.S, h / p.group, b);
      for (int c = 0; c < V_PARTS; c++) load_box(m.v + c * SLAB, p.v, bar, 64 * c, key, key_steps(p), p.at.S, h / p.group, b);
    }
    for (int s = 0; s < 2; s++) {
      bar_wait(m.free_q(s), turn, patience);
      if (!ADDS && !(x.state >> (SEEN + 2 * s) & 3)) { bar_arrive(m.full_q(s)); continue; }
      bar_expect(m.full_q(s), (Q_PARTS + V_PARTS) * PART + LINE * 4);
      for (int c = 0; c < Q_PARTS; c++) load_box(m.q + (s * Q_PARTS + c) * PART, p.q, m.full_q(s), 64 * c, x.t + s * STEP * row_step(p), row_steps(p), p.at.T, h, b);
      bulk_load(m.rows + s * LINE * 4, p.rows + ((i64)x.row * 2 + s) * LINE, LINE * 4, m.full_q(s));
      for (int c = 0; c < V_PARTS; c++) load_box(m.dout + (s * V_PARTS + c) * PART, p.dout, m.full_q(s), 64 * c, x.t + s * STEP * row_step(p), row_steps(p), p.at.T, h, b);
    }
    turn ^= 1;
  }
}

// ---------------------------------------------------------------------------------------------------------------- multiplying
// What rows 2 lane and the next of a step see of a block, as the tables have it: their intervals, or the words of the bitmap that hold this warp's 16 keys. The step begins at
// row `first` of the tile. One load a lane, under way while the scores are multiplied; a load for each of a lane's scores after them cost two thirds of a step.
__device__ __forceinline__ int4 load_mask(const ListArrays& lists, int kind, int first) {
  const int tid = thread_again();
  const i64 row = (i64)(kind >> 1) * ROWS + first + 2 * (tid & 31);
  if (kind < 0) return make_int4(0, KEYS, 0, KEYS);
  if (!(kind & 1)) return __ldg((const int4*)lists.intervals + row / 2);
  const u32* words = lists.bitmaps + row * (KEYS / 32) + (tid / 32 - 4) / 2;
  return make_int4(__ldg(words), 0, __ldg(words + KEYS / 32), 0);
}

// queries 8 j + 2 (lane % 4) and the next, keys lane / 4 and 8 more of the warp's as s[4 j ..]; `left` keys of the block exist
__device__ __forceinline__ void mask(float (&s)[32], int4 rows, int kind, int left) {
  const int tid = thread_again(), key = (tid / 32 - 4) * 16;
  const bool bits = kind >= 0 && kind & 1;
  const u32 exist = range_bits(0, left - key) & 0xffff;
  const u32 low = bits ? (u32)rows.x >> (key & 31) : range_bits(rows.x - key, rows.y - key), high = bits ? (u32)rows.z >> (key & 31) : range_bits(rows.z - key, rows.w - key);
  const u32 word = (low & exist) | (high & exist) << 16;
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const u32 seen = __shfl_sync(~0u, word, 4 * j + (tid & 3)) >> (tid % 32 / 4);
    if (!(seen & 1)) s[4 * j] = -inf();
    if (!(seen & 1 << 16)) s[4 * j + 1] = -inf();
    if (!(seen & 1 << 8)) s[4 * j + 2] = -inf();
    if (!(seen & 1 << 24)) s[4 * j + 3] = -inf();
  }
}

// accumulators of [key][query] products start from a value per query
__device__ __forceinline__ void start_from(float (&d)[32], u32 from) {
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const float2 x = shared_pair(from + j * 32);
    d[4 * j] = d[4 * j + 2] = x.x;
    d[4 * j + 1] = d[4 * j + 3] = x.y;
  }
  hold(d);
}

// this group's 64 keys without any query
__device__ __forceinline__ void store_nothing(const Params& p, int key_head, int from, int tid) {
  const int n = imin(64, p.at.S - from);
  const i64 line = (i64)key_head * p.at.S + from;
  for (int i = tid; i < n * (p.D / 8); i += 128) ((uint4*)p.dk_out)[line * (p.D / 8) + i] = make_uint4(0, 0, 0, 0);
  for (int i = tid; i < n * (p.Dv / 8); i += 128) ((uint4*)p.dv_out)[line * (p.Dv / 8) + i] = make_uint4(0, 0, 0, 0);
}

// this group's rows of a key tile; `row` is the one this lane gives the address of
template <int N> __device__ __forceinline__ void write_keys(const float (&d)[N], float scale, u32 to, int row, int lane) {
#pragma unroll
  for (int j = 0; j < N / 8; j++) {
    const int c = 2 * j + (lane >> 4);  // 16 bytes each
    const float* y = d + 8 * j;
    stmatrix_at(to + (c >> 3) * SLAB + row * 128 + (((c & 7) ^ (row & 7)) << 4), pack<KIND>(y[0] * scale, y[1] * scale), pack<KIND>(y[2] * scale, y[3] * scale),
                pack<KIND>(y[4] * scale, y[5] * scale), pack<KIND>(y[6] * scale, y[7] * scale));
  }
}

// ------------------------------------------------------------------------------------------------------------- before and after
// What a step of 64 rows starts from: minus lse / scale, minus delta, lse; a last word says that some lse is far, and then the first is 0. P of rows that do not exist
// or see no key is 0. A block of STEP threads each.
__device__ __forceinline__ void start_rows(const Params& p) {
  const int half = blockIdx.x & 1, tile = blockIdx.x / 2 % p.tiles, head = blockIdx.x / 2 / p.tiles, start = first_position(p.at, head / p.Hq);
  const int t = (row_steps(p) ? first_query(p, tile, start) : (floor_div(start, ROWS) + tile) * ROWS - start) + (half * STEP + threadIdx.x) * row_step(p);
  const i64 at = (i64)head * p.at.T + t;
  const bool exists = t >= 0 && t < p.at.T;
  float lse = exists ? __ldg(p.lse + at) : inf();
  if (lse == -inf()) lse = inf();
  const bool far = __syncthreads_or(fabsf(lse) > FAR && lse != inf());
  float* line = p.rows + (i64)blockIdx.x * LINE + threadIdx.x;
  line[0] = lse == inf() ? -inf() : far ? 0.f : -lse / p.scale;
  line[STEP] = exists ? -__ldg(p.delta + at) : 0.f;
  line[2 * STEP] = lse;
  if (threadIdx.x < 4) line[3 * STEP] = far;
}

// of n ascending numbers, how many lie below the bound
__device__ __forceinline__ int count_below(const int* a, int n, int bound) {
  int from = 0;
  while (from < n) {
    const int middle = (from + n) / 2;
    if (__ldg(a + middle) < bound) from = middle + 1; else n = middle;
  }
  return from;
}
