// float8 keys and values for block_attention_hopper.cu: boxes of 128 rows x 128 bytes by the copy engine, and a warpgroup that makes of each, exactly, a swizzled tile of 16-bit elements.
//
// K of a block, then V of the block before, as the kernel wants them; of float8 queries the item's queries first. A thread reads 16 bytes of a row and writes 32: eight lanes stand in
// eight rows, so that neither meets in a bank. 32768 elements of a block cost about 520 issue slots of each quarter of an SM, its products 2048 clocks.
// Include behind `struct Shared`.
#pragma once

constexpr int Q_BOXES = FLOAT8 == 2 ? (K_SLABS + 1) / 2 : 0, K_BOXES = (K_SLABS + 1) / 2, V_BOXES = (V_SLABS + 1) / 2;
static_assert(ROWS == 128 && !PARTED, "a box has 128 rows, and a scale 128 keys that follow each other");

struct Ring { u32 slot = 0, phase = 0; };

template <int Boxes> __device__ __forceinline__ void load_boxes_of(const Shared& m, const TensorMap* map, Ring& ring, int at, int h, int b, u32& patience) {
#pragma unroll
  for (int c = 0; c < Boxes; c++) {
    bar_wait(m.free_box(ring.slot), ring.phase ^ 1, patience);
    bar_expect(m.full_box(ring.slot), BOX);
    load_box(m.boxes + ring.slot * BOX, map, m.full_box(ring.slot), 128 * c, at, 0, h, b);
    advance<SLOTS>(ring.slot, ring.phase);
  }
}

__device__ __forceinline__ void load_boxes(const Params& p, const Shared& m, u32& patience) {
  Ring ring;
  for (u32 i = 0;; i++) {
    bar_wait(m.full_item(i % ITEMS), parity<ITEMS>(i), patience);
    const Item x = *m.item(i % ITEMS);
    bar_arrive(m.free_item(i % ITEMS));
    if (x.n < 0 || !patience) return;
    const int b = x.head / p.Hq, h = x.head % p.Hq, hk = h / p.group;
    if (FLOAT8 == 1) {
      bar_wait(m.free_q(i % TILES), parity<TILES>(i) ^ 1, patience);
      if (x.n) load_slabs<K_SLABS, Q_SLAB>(m.q + i % TILES * Q_BYTES, &p.q, m.full_q(i % TILES), x.t, 0, h, b);
      else bar_arrive(m.full_q(i % TILES));
    } else if (x.n) {
      load_boxes_of<Q_BOXES>(m, &p.q, ring, x.t, h, b, patience);
    }
    for (int e = 0, last = 0; e <= x.n && x.n; e++) {
      const int row = e < x.n ? __ldg(p.lists.cols + x.entry(e)) * KEYS : 0;
      if (e < x.n) load_boxes_of<K_BOXES>(m, &p.k, ring, row, hk, b, patience);
      if (e > 0) load_boxes_of<V_BOXES>(m, &p.v, ring, last, hk, b, patience);
      last = row;
    }
  }
}

// A box -> `Slabs` slabs of 64 columns, negated or not; thread t of the warpgroup. The box is free once it has been read.
template <int Kind, int Slabs> __device__ __forceinline__ void convert_box(const Shared& m, u32 to, bool negate, Ring& ring, u32 t, u32& patience) {
  const u32 y = t & 7, j = t >> 3 & 3, row = (t >> 5) * 4096 + y * 128, from = m.boxes + ring.slot * BOX + row + ((j ^ y) << 4);
  to += row + ((2 * j ^ y) << 4);
  uint4 x[4 * Slabs];
  bar_wait(m.full_box(ring.slot), ring.phase, patience);
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int c = 0; c < Slabs; c++) x[i * Slabs + c] = *m.at<uint4>((from ^ c << 6) + i * 1024);
  shared_to_copy_engine();  // after reads too: without it the copy engine wrote the next box over what was still to be read
  __syncwarp();
  if (t % 32 == 0) bar_arrive(m.free_box(ring.slot));
  if (negate)
#pragma unroll
    for (int i = 0; i < 4 * Slabs; i++) x[i] = make_uint4(x[i].x ^ 0x80808080, x[i].y ^ 0x80808080, x[i].z ^ 0x80808080, x[i].w ^ 0x80808080);
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int c = 0; c < Slabs; c++) {
      const uint4 a = x[i * Slabs + c];
      *m.at<uint4>(to + c * SLAB + i * 1024) = exact_eight<Kind>(a.x, a.y);
      *m.at<uint4>((to ^ 16) + c * SLAB + i * 1024) = exact_eight<Kind>(a.z, a.w);
    }
  advance<SLOTS>(ring.slot, ring.phase);
}

template <int Kind, int Slabs> __device__ __forceinline__ void convert_tile_of(const Shared& m, u32 to, bool negate, u32 bar, Ring& ring, u32 t, u32& patience) {
  if constexpr (Slabs == 1) convert_box<Kind, 1>(m, to, negate, ring, t, patience);
  else convert_box<Kind, 2>(m, to, negate, ring, t, patience);
  if constexpr (Slabs == 3) convert_box<Kind, 1>(m, to + 2 * SLAB, negate, ring, t, patience);
  shared_to_copy_engine();
  __syncwarp();
  if (t % 32 == 0) bar_arrive(bar);
}

// the scales of the keys and of the values of an item's entry
__device__ __forceinline__ float2 scales_of(const Params& p, const Item& x, int e) {
  const i64 at = ((i64)(x.head / p.Hq) * (p.Hq / p.group) + x.head % p.Hq / p.group) * ((p.at.S + KEYS - 1) / KEYS) + __ldg(p.lists.cols + x.entry(e));
  return make_float2(scale_at(p.scales.k, at), scale_at(p.scales.v, at));
}

__device__ __forceinline__ void convert_items(const Params& p, const Shared& shared, u32& patience) {
  const u32 t = threadIdx.x % 128;
  Ring ring;
  u32 k = 0, v = 0;
  for (u32 i = 0;; i++) {
    const Shared m = shared.again();
    bar_wait(m.full_item(i % ITEMS), parity<ITEMS>(i), patience);
    const Item& x = *m.item(i % ITEMS);
    const int n = x.n, plain = x.plain;
    if (n < 0 || !patience) return;
    float2 by = n ? scales_of(p, x, 0) : make_float2(1.f, 1.f);  // read one block ahead
    if (FLOAT8 == 2) {
      bar_wait(m.free_q(i % TILES), parity<TILES>(i) ^ 1, patience);
      if (n) convert_tile_of<KIND, K_SLABS>(m, m.q + i % TILES * Q_BYTES, false, m.full_q(i % TILES), ring, t, patience);
      else if (t % 32 == 0) bar_arrive(m.full_q(i % TILES));
    }
    for (int e = 0; e <= n && n; e++) {
      if (e < n) {
        bar_wait(m.free_k(k % STAGES), parity<STAGES>(k) ^ 1, patience);
        const bool negate = FLOAT8 == 1 && by.x < 0.f;
        if (t == 0) *m.scales(k) = make_float2(negate ? -by.x : by.x, by.y);
        if (e + 1 < n) by = scales_of(p, x, e + 1);
        convert_tile_of<KIND, K_SLABS>(m, m.k + k % STAGES * K_BYTES, negate, m.full_k(k % STAGES), ring, t, patience);
        k++;
      }
      if (e > 0) {
        bar_wait(m.free_v(v % STAGES), parity<STAGES>(v) ^ 1, patience);
        convert_tile_of<VALUE_KIND, V_SLABS>(m, m.v + v % STAGES * V_BYTES, false, e - 1 < plain ? m.full_v(v % STAGES) : m.landed(v % STAGES), ring, t, patience);
        v++;
      }
    }
    __syncwarp();
    if (t % 32 == 0) bar_arrive(m.free_item(i % ITEMS));
  }
}

// ---------------------------------------------------------------------------------------------------------------- scales
// Scores are multiplied by the scale of their keys inside the softmax, where it may be 0 but not negative (then the keys were turned over); here where queries have scales
// too, and in masked blocks where it is no number to multiply -inf by: `by` is left 1. Plain steps have no branch around so much: their exponentials stand beside products.
__device__ __forceinline__ void scale_scores(float (&s)[64], float& by, const float (&by_row)[2], bool masked) {
  if (FLOAT8 == 1 && (!masked || by > 0.f && by < inf())) return;
#pragma unroll
  for (int j = 0; j < 64; j++) s[j] *= FLOAT8 == 2 ? by * by_row[j >> 1 & 1] : by;
  by = 1.f;
}
// The scale of values that no row of this warp sees may be NaN, in masked blocks.
__device__ __forceinline__ void settle_values(const float (&s)[64], float& by) {
  if (fabsf(by) < inf()) return;
  bool some = false;
#pragma unroll
  for (int j = 0; j < 64; j++) some |= s[j] != -inf();
  if (!__any_sync(~0u, some)) by = 1.f;
}
