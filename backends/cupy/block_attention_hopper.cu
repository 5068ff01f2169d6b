// Attention over block lists by Hopper's own instructions: float16 and bfloat16, tiles of 128 queries of one head, key blocks of 128.
//
// A persistent block of threads has four roles. One thread takes items (a tile of a head, longest first, by an atomic ticket), one loads them through the copy
// engine, one warp clears values that no row of the tile sees, and two groups of 64 rows multiply: while the output product of one key block runs, the
// exponentials of the next are made. A full block inside the keys runs no mask code. Rows that do not exist are zeros on the way in and dropped on the way out.
// Defines: KIND, WIDTH (D rounded up to 16, at most 192), VALUES (Dv rounded up to 64 or 128).
#include "wgmma.cuh"
#include "lists.cuh"

#ifndef KIND
#define KIND BFLOAT16
#endif
#ifndef WIDTH
#define WIDTH 128
#endif
#ifndef VALUES
#define VALUES 128
#endif

constexpr int ROWS = 128, KEYS = 128, STAGES = 2, SLAB = 128 * 128;  // a slab: 128 rows of 64 columns, as the copy engine writes them
constexpr int Q_SLABS = (WIDTH + 63) / 64, V_SLABS = VALUES / 64, K_BYTES = Q_SLABS * SLAB, V_BYTES = V_SLABS * SLAB, Q_BYTES = K_BYTES > V_BYTES ? K_BYTES : V_BYTES;
constexpr int READERS = 10;    // of an item: the loading thread, the clearing warp, eight multiplying warps
constexpr float FAR = 256.f;   // exponents of 2 past which the reference is subtracted before the multiplication

struct Params {
  TensorMap q, k, v, out;  // boxes of 128 rows x 64 columns; out: 64 x 64
  void* result;            // out again, for tiles without keys
  float* lse;
  const float* sink;
  int* ticket;             // 0, or null where every block of threads has one item
  const int* order;        // [L, tiles] tiles of a list, longest first, or null: last tile first
  ListArrays lists;
  Positions at;
  int heads, Hq, group, Dv, tiles, ahead, items;  // heads = B * Hq; the `ahead` longest tiles of all heads come before everything else
  float scale, exponent;                          // exponent = scale * log2(e)
};

// Entries first .. first + n - 1 of the list, `gap` left out behind the `full` full ones; those from `plain` on need a mask. head = b * Hq + h, -1: no more items.
struct Item {
  int head, t, first, n, full, plain, gap, limit;  // t: query of row 0, negative where the tile starts before the call
  __device__ __forceinline__ int entry(int x) const { return first + x + (x >= full ? gap : 0); }
};

struct Shared {
  u32 base, q, k, v, bars;
  unsigned char* raw;
  __device__ __forceinline__ explicit Shared(unsigned char* raw) : base(shared_address(raw)), raw(raw) {
    q = __shfl_sync(~0u, (base + 1023) & ~1023u, 0);  // known to be uniform: descriptors stay in uniform registers
    k = q + Q_BYTES; v = k + STAGES * K_BYTES; bars = v + STAGES * V_BYTES;
  }
  __device__ __forceinline__ u32 full_k(int s) const { return bars + 8 * s; }
  __device__ __forceinline__ u32 free_k(int s) const { return bars + 8 * (STAGES + s); }
  __device__ __forceinline__ u32 full_v(int s) const { return bars + 8 * (2 * STAGES + s); }
  __device__ __forceinline__ u32 free_v(int s) const { return bars + 8 * (3 * STAGES + s); }
  __device__ __forceinline__ u32 landed(int s) const { return bars + 8 * (4 * STAGES + s); }  // values of a masked block, not yet cleared
  __device__ __forceinline__ u32 full_q() const { return bars + 40 * STAGES; }
  __device__ __forceinline__ u32 free_q() const { return bars + 40 * STAGES + 8; }
  __device__ __forceinline__ u32 full_item() const { return bars + 40 * STAGES + 16; }
  __device__ __forceinline__ u32 free_item() const { return bars + 40 * STAGES + 24; }
  template <class T> __device__ __forceinline__ T* at(u32 address) const { return (T*)(raw + (address - base)); }
  __device__ __forceinline__ Item* item() const { return at<Item>(bars + 40 * STAGES + 32); }
};

// ---------------------------------------------------------------------------------------------------------------- taking items
// how many of n ascending blocks start before the limit
__device__ __forceinline__ int existing(const int* cols, int n, int limit) {
  const int blocks = limit / KEYS + (limit % KEYS != 0);
  if (n == 0 || __ldg(cols + n - 1) < blocks) return n;
  int lo = 0, hi = n - 1;
  while (lo < hi) {
    const int middle = (lo + hi) / 2;
    if (__ldg(cols + middle) < blocks) lo = middle + 1; else hi = middle;
  }
  return lo;
}

__device__ __forceinline__ Item open_item(const Params& p, int number) {
  const int before = p.ahead * p.heads, each = number < before ? p.ahead : p.tiles - p.ahead, m = number < before ? number : number - before;
  const int rank = m % each + (number < before ? 0 : p.ahead);
  Item x;
  x.head = m / each;
  const int b = x.head / p.Hq, h = x.head % p.Hq, list = __ldg(p.lists.list_of + b * p.lists.list_b + h * p.lists.list_h);
  const int tile = p.order ? __ldg(p.order + (i64)list * p.tiles + rank) : p.tiles - 1 - rank, start = first_position(p.at, b);
  const i64 n = (i64)floor_div(start, ROWS) + tile, i = n - p.lists.first;
  x.limit = key_limit(p.at, b);
  x.t = (int)(n * ROWS - start);
  x.first = x.n = x.full = x.plain = x.gap = 0;
  if (i < 0 || i >= p.lists.nq || x.t >= p.at.T) return x;
  const int* o = p.lists.offsets + 2 * ((i64)list * p.lists.nq + i);
  const int middle = __ldg(o + 1), end = __ldg(o + 2);
  x.first = __ldg(o);
  x.full = existing(p.lists.cols + x.first, middle - x.first, x.limit);
  x.n = x.full + existing(p.lists.cols + middle, end - middle, x.limit);
  x.gap = middle - x.first - x.full;
  x.plain = x.full - (x.full && x.limit - __ldg(p.lists.cols + x.first + x.full - 1) * KEYS < KEYS);
  return x;
}

__device__ __forceinline__ void take_items(const Params& p, const Shared& m, u32& patience) {
  for (int number = blockIdx.x, turn = 1;; turn ^= 1) {
    bar_wait(m.free_item(), turn, patience);
    const bool more = number < p.items && patience;
    if (more) *m.item() = open_item(p, number); else m.item()->head = -1;
    bar_arrive(m.full_item());
    if (!more) return;
    number = p.ticket ? gridDim.x + atomicAdd(p.ticket, 1) : p.items;
  }
}

// The next item for a warp, or for one thread of it that `arrives`.
__device__ __forceinline__ Item next_item(const Shared& m, u32& turn, u32& patience, bool arrives) {
  bar_wait(m.full_item(), turn, patience);
  turn ^= 1;
  const Item x = *m.item();
  __syncwarp();
  if (arrives) bar_arrive(m.free_item());
  return x;
}

// ---------------------------------------------------------------------------------------------------------------- loading, clearing
struct Ring {  // which stage, and the parity of its turn
  u32 s, turn;
  __device__ __forceinline__ void next() { if (++s == STAGES) { s = 0; turn ^= 1; } }
};

template <int Slabs> __device__ __forceinline__ void load_slabs(u32 to, const TensorMap* map, u32 bar, int row, int h, int b) {
  bar_expect(bar, Slabs * SLAB);
#pragma unroll
  for (int c = 0; c < Slabs; c++) tma_load(to + c * SLAB, map, bar, 64 * c, row, h, b);
}

// K of a block, then V of the block before: values are wanted one product later
__device__ __forceinline__ void load_items(const Params& p, const Shared& m, u32& patience) {
  Ring k = {0, 1}, v = {0, 1};
  u32 turn = 0, turn_q = 1;
  for (;;) {
    bar_wait(m.full_item(), turn, patience);
    turn ^= 1;
    const Item x = *m.item();
    bar_arrive(m.free_item());
    if (x.head < 0 || !patience) return;
    if (x.n == 0) continue;
    const int b = x.head / p.Hq, h = x.head % p.Hq, hk = h / p.group;
    bar_wait(m.free_q(), turn_q, patience);
    turn_q ^= 1;
    load_slabs<Q_SLABS>(m.q, &p.q, m.full_q(), x.t, h, b);
    for (int e = 0, last = 0; e <= x.n; e++) {
      int row = 0;
      if (e < x.n) {
        row = __ldg(p.lists.cols + x.entry(e)) * KEYS;
        bar_wait(m.free_k(k.s), k.turn, patience);
        load_slabs<Q_SLABS>(m.k + k.s * K_BYTES, &p.k, m.full_k(k.s), row, hk, b);
        k.next();
      }
      if (e > 0) {
        bar_wait(m.free_v(v.s), v.turn, patience);
        load_slabs<V_SLABS>(m.v + v.s * V_BYTES, &p.v, e - 1 < x.plain ? m.full_v(v.s) : m.landed(v.s), last, hk, b);
        v.next();
      }
      last = row;
    }
  }
}

// A warp makes the values of masked blocks zero where no row of the tile sees the key: what nobody sees must not reach a product (0 * NaN).
__device__ __forceinline__ void clear_values(const Params& p, const Shared& m, u32& patience) {
  const int lane = threadIdx.x & 31;
  u32 turn = 0, turns = 0, s = 0;
  for (;;) {
    const Item x = next_item(m, turn, patience, lane == 0);
    if (x.head < 0 || !patience) return;
    s = (s + x.plain) % STAGES;
    for (int e = x.plain; e < x.n; e++, s = (s + 1) % STAGES) {
      const int at = x.entry(e), kind = __ldg(p.lists.kinds + at), left = x.limit - __ldg(p.lists.cols + at) * KEYS;
      bar_wait(m.landed(s), turns >> s & 1, patience);
      turns ^= 1u << s;
#pragma unroll 1
      for (int n = 0; n < KEYS; n += 32) {
        u32 word = 0;
#pragma unroll 1
        for (int r = imax(-x.t, 0) + lane; r < imin(ROWS, p.at.T - x.t); r += 32) word |= kind_word<ROWS, KEYS>(p.lists, kind, r, n);
        word = __reduce_or_sync(~0u, word) & range_bits(0, left - n);
#pragma unroll 1
        for (int r = lane / 8; r < 32 && word != ~0u; r += 4)
          if (!(word >> r & 1))
            for (int c = 0; c < V_SLABS; c++) *m.at<uint4>(m.v + s * V_BYTES + c * SLAB + (n + r) * 128 + lane % 8 * 16) = make_uint4(0, 0, 0, 0);
      }
      shared_to_copy_engine();
      __syncwarp();
      if (lane == 0) bar_arrive(m.full_v(s));
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------- multiplying
// two rows of a lane, keys 8 j + 2 (lane % 4) and the next as s[4 j ..]; `left` keys of the block exist
__device__ __forceinline__ void mask(float (&s)[64], const ListArrays& lists, int kind, int left, int row, int lane) {
#pragma unroll
  for (int n = 0; n < 4; n++) {
    const u32 exist = range_bits(0, left - 32 * n);
    const u32 a = (kind_word<ROWS, KEYS>(lists, kind, row, 32 * n) & exist) >> 2 * (lane & 3), b = (kind_word<ROWS, KEYS>(lists, kind, row + 8, 32 * n) & exist) >> 2 * (lane & 3);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      float* x = s + 4 * (4 * n + j);
      if (!(a >> 8 * j & 1)) x[0] = -inf();
      if (!(a >> 8 * j & 2)) x[1] = -inf();
      if (!(b >> 8 * j & 1)) x[2] = -inf();
      if (!(b >> 8 * j & 2)) x[3] = -inf();
    }
  }
}

__device__ __forceinline__ bool is_far(float z) { return fabsf(z) > FAR && z != -inf(); }

// Raw products to probabilities; `most` are raw maxima, `factor` is for what was summed before. A row's reference is z = round(most * c), subtracted inside one
// multiply-add: every score is rounded once, after the subtraction, and the rounding of z is common to the row and so cancels; it moves the largest from 1 by
// 2^-17 at most. Where |z| passes FAR that would not hold: there the raw maximum is subtracted first, and the largest gives exactly 1.
__device__ __forceinline__ void soften(float (&s)[64], float (&most)[2], float (&sum)[2], float (&factor)[2], float c) {
  float top[2] = {most[0], most[1]}, z[2];
#pragma unroll
  for (int j = 0; j < 64; j += 4) { top[0] = fmaxf(top[0], fmaxf(s[j], s[j + 1])); top[1] = fmaxf(top[1], fmaxf(s[j + 2], s[j + 3])); }
  bool some_far = false;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 1));
    top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 2));
    const float before = most[h] * c;
    z[h] = top[h] * c;
    some_far |= is_far(before) | is_far(z[h]);
    if (z[h] == -inf()) z[h] = 0.f;  // no key so far: every exponent is -inf, not NaN
    factor[h] = ex2(before - z[h]);
  }
  if (__any_sync(~0u, some_far)) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float before = most[h] * c, old = is_far(before) ? most[h] : 0.f, now = is_far(top[h] * c) ? top[h] : 0.f;
      if (now != 0.f) z[h] = 0.f;
      factor[h] = ex2(fmaf(old - now, c, (old != 0.f ? 0.f : before) - z[h]));
#pragma unroll
      for (int j = 0; j < 64; j += 4) { s[j + 2 * h] -= now; s[j + 2 * h + 1] -= now; }
    }
  }
  float total[2] = {0.f, 0.f};
#pragma unroll
  for (int j = 0; j < 64; j += 4)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      s[j + 2 * h] = ex2(fmaf(s[j + 2 * h], c, -z[h]));
      s[j + 2 * h + 1] = ex2(fmaf(s[j + 2 * h + 1], c, -z[h]));
      total[h] += s[j + 2 * h] + s[j + 2 * h + 1];
    }
#pragma unroll
  for (int h = 0; h < 2; h++) { most[h] = top[h]; sum[h] = sum[h] * factor[h] + total[h]; }
}

// a tile without keys: this group's 64 rows
__device__ __forceinline__ void store_nothing(const Params& p, const Item& x, int w, int tid) {
  const int from = imax(x.t + 64 * w, 0), until = imin(x.t + 64 * w + 64, p.at.T), n = p.Dv / 8;
  const i64 line = (i64)x.head * p.at.T;
  for (int i = tid; i < (until - from) * n; i += 128) ((uint4*)p.result)[(line + from) * n + i] = make_uint4(0, 0, 0, 0);
  if (p.lse && from + tid < until) p.lse[line + from + tid] = -inf();
}

// this group's rows from their tile, those that the call has; two threads a row
__device__ __forceinline__ void store_inside(const Params& p, const Item& x, const Shared& m, int w, int tid) {
  const int n = p.Dv / 8, r = w * 64 + tid / 2, t = x.t + r;
  if (t < 0 || t >= p.at.T) return;
  uint4* to = (uint4*)p.result + ((i64)x.head * p.at.T + t) * n;
#pragma unroll 1
  for (int c = tid % 2; c < n; c += 2) to[c] = *m.at<uint4>(m.q + (c >> 3) * SLAB + r * 128 + (((c & 7) ^ (r & 7)) << 4));
}

// factors of the sums of two rows, and their lse
__device__ __forceinline__ void finish(const Params& p, const Item& x, const float (&most)[2], float (&sum)[2], float (&factor)[2], int row, int lane) {
  const float sink = p.sink ? __ldg(p.sink + x.head % p.Hq) : -inf();
#pragma unroll
  for (int h = 0; h < 2; h++) {
    sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
    sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
    const bool empty = most[h] == -inf() && sum[h] == 0.f;
    const float top = __fmul_rn(most[h], p.scale);  // rounded as the backward rounds its scores
    factor[h] = empty ? 0.f : 1.f / (sum[h] + (p.sink ? ex2((sink - top) * LOG2E) : 0.f));
    const int t = x.t + row + 8 * h;
    if (p.lse && (lane & 3) == 0 && t >= 0 && t < p.at.T) p.lse[(i64)x.head * p.at.T + t] = empty ? -inf() : top + logf(sum[h]);
  }
}

__device__ __forceinline__ void multiply_items(const Params& p, const Shared& m, int w, u32& patience) {
  const int tid = threadIdx.x % 128, lane = tid & 31, row = w * 64 + tid / 32 * 16 + lane / 4;
  const u64 dq = descriptor(m.q + w * 64 * 128), dk0 = descriptor(m.k), dv0 = descriptor_columns<SLAB>(m.v);
  float s[64], o[VALUES / 2], most[2], sum[2], factor[2];
  u32 pr[32], turn = 0, turn_q = 0;
  Ring k = {0, 0}, v = {0, 0};
  const auto multiply_scores = [&] {
    const u64 dk = dk0 + (u64)(k.s * (K_BYTES >> 4));
#pragma unroll
    for (int c = 0; c < WIDTH / 16; c++) multiply_keys<KIND>(s, dq + c / 4 * (SLAB >> 4) + c % 4 * 2, dk + c / 4 * (SLAB >> 4) + c % 4 * 2, c != 0);
    wgmma_commit();
  };
  const auto multiply_output = [&](bool more) {
    const u64 dv = dv0 + (u64)(v.s * (V_BYTES >> 4));
#pragma unroll
    for (int c = 0; c < 8; c++) multiply_values<KIND>(o, pr + 4 * c, dv + c * 128, more || c != 0);
    wgmma_commit();
  };
  const auto round = [&] {
#pragma unroll
    for (int c = 0; c < 32; c++) pr[c] = pack<KIND>(s[2 * c], s[2 * c + 1]);
  };
  for (;;) {
    const Item x = next_item(m, turn, patience, lane == 0);
    const int n = __shfl_sync(~0u, x.n, 0), plain = __shfl_sync(~0u, x.plain, 0);
    if (__shfl_sync(~0u, x.head, 0) < 0) break;
    if (n == 0) { store_nothing(p, x, w, tid); continue; }
    most[0] = most[1] = -inf();
    sum[0] = sum[1] = 0.f;
    bar_wait(m.full_q(), turn_q, patience);
    turn_q ^= 1;
    bar_wait(m.full_k(k.s), k.turn, patience);
    hold(s);
    wgmma_fence();
    multiply_scores();
    int kind = -1, left = KEYS;
    if (plain == 0) { kind = __ldg(p.lists.kinds + x.entry(0)); left = x.limit - __ldg(p.lists.cols + x.entry(0)) * KEYS; }
    wgmma_wait<0>();
    hold(s);
    if (tid == 0) bar_arrive(m.free_k(k.s));
    k.next();
    if (plain == 0) mask(s, p.lists, kind, left, row, lane);
    soften(s, most, sum, factor, p.exponent);
    round();
    for (int e = 1; e < n; e++) {
      if (e >= plain) { kind = __ldg(p.lists.kinds + x.entry(e)); left = x.limit - __ldg(p.lists.cols + x.entry(e)) * KEYS; }
      bar_wait(m.full_k(k.s), k.turn, patience);
      hold(s); hold(o);
      wgmma_fence();
      multiply_scores();
      bar_wait(m.full_v(v.s), v.turn, patience);
      wgmma_fence();
      multiply_output(e != 1);
      wgmma_wait<1>();
      hold(s);
      if (tid == 0) bar_arrive(m.free_k(k.s));
      k.next();
      if (e >= plain) mask(s, p.lists, kind, left, row, lane);
      soften(s, most, sum, factor, p.exponent);
      if (sum[0] + sum[1] < 0.f) bar_wait(m.full_q(), turn_q ^ 1, patience);  // never: a branch on the sums keeps the exponentials before the wait
      wgmma_wait<0>();
      hold(o);
      if (tid == 0) bar_arrive(m.free_v(v.s));
      v.next();
      if (__any_sync(~0u, factor[0] != 1.f || factor[1] != 1.f)) {
#pragma unroll
        for (int j = 0; j < VALUES / 2; j++) o[j] *= factor[j >> 1 & 1];
      }
      round();
    }
    bar_wait(m.full_v(v.s), v.turn, patience);
    hold(o);
    wgmma_fence();
    multiply_output(n != 1);
    finish(p, x, most, sum, factor, row, lane);
    wgmma_wait<0>();
    hold(o);
    if (tid == 0) bar_arrive(m.free_v(v.s));
    v.next();
    // out through this group's half of the query tile
    const int r = w * 64 + tid / 32 * 16 + (lane & 15);
#pragma unroll
    for (int j = 0; j < VALUES / 16; j++) {
      const int c = 2 * j + (lane >> 4);  // 16 bytes each
      const float* y = o + 8 * j;
      stmatrix_at(m.q + (c >> 3) * SLAB + r * 128 + (((c & 7) ^ (r & 7)) << 4), pack<KIND>(y[0] * factor[0], y[1] * factor[0]), pack<KIND>(y[2] * factor[1], y[3] * factor[1]),
                  pack<KIND>(y[4] * factor[0], y[5] * factor[0]), pack<KIND>(y[6] * factor[1], y[7] * factor[1]));
    }
    shared_to_copy_engine();
    named_sync(4 + w, 128);
    const bool outside = x.t + 64 * w < 0;  // the copy engine zero-fills rows before the first on the way in, but takes none on the way out (illegal instruction)
    if (outside) {
      store_inside(p, x, m, w, tid);
      named_sync(4 + w, 128);
    }
    if (tid == 0) {
      if (!outside) {
#pragma unroll
        for (int c = 0; c < V_SLABS; c++) tma_store(&p.out, m.q + c * SLAB + w * 64 * 128, 64 * c, x.t + 64 * w, x.head);
        tma_store_commit();
        tma_store_wait_read();
      }
      bar_arrive(m.free_q());
    }
  }
  if (tid == 0) tma_store_wait();
}

extern "C" __global__ void __launch_bounds__(384, 1) forward(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(raw);
  const Shared m(raw);
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      bar_init(m.full_k(s), 1); bar_init(m.free_k(s), 2);
      bar_init(m.full_v(s), 1); bar_init(m.free_v(s), 2); bar_init(m.landed(s), 1);
    }
    bar_init(m.full_q(), 1); bar_init(m.free_q(), 2);
    bar_init(m.full_item(), 1); bar_init(m.free_item(), READERS);
    bar_fence();
  }
  __syncthreads();
  u32 patience = PATIENCE;
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (group == 0) {
    fewer_registers<40>();
    if (threadIdx.x == 0) load_items(p, m, patience);
    else if (threadIdx.x == 32) take_items(p, m, patience);
    else if (threadIdx.x / 32 == 2) clear_values(p, m, patience);
  } else {
    more_registers<232>();
    multiply_items(p, m, group - 1, patience);
  }
}
