// What the Hopper forward kernels over block lists share: tiles in shared memory, masks, products, a step of the softmax, and how a tile leaves. A group of 64 rows multiplies by 128
// keys; a lane holds two rows, lane / 4 and 8 further on of its warp's 16. Include before `struct Params`.
// Defines: KIND, WIDTH (D rounded up to 16, at most 192), VALUES (Dv rounded up to 64 or 128), ROWS (queries of a tile), STAGES, TILES (query tiles held: 1 or 2), PARTED (parts.cuh), FLOAT8 (float8.cuh), SLOTS (boxes of
// float8 held), OUT_KIND where it is not KIND.
#pragma once
#include "wgmma.cuh"
#include "parts.cuh"

#ifndef KIND
#define KIND BFLOAT16
#endif
#ifndef OUT_KIND
#define OUT_KIND KIND
#endif
#include "float8.cuh"
#ifndef WIDTH
#define WIDTH 128
#endif
#ifndef VALUES
#define VALUES 128
#endif
#ifndef ROWS
#define ROWS 128
#endif
#ifndef STAGES
#define STAGES 2
#endif
#ifndef TILES
#define TILES 2
#endif
#ifndef SLOTS
#define SLOTS 0
#endif

constexpr int SLAB = KEYS * 128, Q_SLAB = ROWS * 128;  // a slab: rows of 64 columns, as the copy engine writes them
constexpr int K_SLABS = (WIDTH + 63) / 64, V_SLABS = VALUES / 64, K_BYTES = K_SLABS * SLAB, V_BYTES = V_SLABS * SLAB, Q_BYTES = (K_SLABS > V_SLABS ? K_SLABS : V_SLABS) * Q_SLAB;
constexpr int BOX = FLOAT8 ? 128 * 128 : 0;  // bytes of float8: rows of 128 columns
constexpr int GROUPS = ROWS / 64, THREADS = 128 * (GROUPS + 1 + (FLOAT8 ? 1 : 0));
constexpr float FAR = 256.f;   // exponents of 2 past which the reference is subtracted before the multiplication

// Turn n of N places (1, 2 or 4) stands at n % N; the parity of its barrier.
template <int N> __device__ __forceinline__ u32 parity(u32 n) { return n / N & 1; }

struct Tiles {  // in shared memory, and the barriers of keys and values; others follow at bars + 32 * STAGES
  u32 base, q, k, v, boxes, bars;
  unsigned char* raw;
  __device__ __forceinline__ explicit Tiles(unsigned char* raw) : base(shared_address(raw)), raw(raw) {
    q = __shfl_sync(~0u, (base + 1023) & ~1023u, 0);  // known to be uniform: descriptors stay in uniform registers
    k = q + TILES * Q_BYTES; v = k + STAGES * K_BYTES; boxes = v + STAGES * V_BYTES; bars = boxes + SLOTS * BOX;
  }
  __device__ __forceinline__ u32 full_k(int s) const { return bars + 8 * s; }
  __device__ __forceinline__ u32 free_k(int s) const { return bars + 8 * (STAGES + s); }
  __device__ __forceinline__ u32 full_v(int s) const { return bars + 8 * (2 * STAGES + s); }
  __device__ __forceinline__ u32 free_v(int s) const { return bars + 8 * (3 * STAGES + s); }
  template <class T> __device__ __forceinline__ T* at(u32 address) const { return (T*)(raw + (address - base)); }
};

template <int Slabs, int Bytes = SLAB> __device__ __forceinline__ void load_slabs(u32 to, const TensorMap* map, u32 bar, int at, int step, int h, int b) {
  bar_expect(bar, Slabs * Bytes);
#pragma unroll
  for (int c = 0; c < Slabs; c++) load_box(to + c * Bytes, map, bar, 64 * c, at, step, h, b);
}

// ----------------------------------------------------------------------------------------------------------------------- masks
struct Sight { int kind; int2 range[2]; };  // of a masked block: its kind, and where the keys lie that two rows of a lane may see

// bits of the keys 32 n .. 32 n + 31 of a block of this kind that row r sees. Tables: intervals and bitmaps of contract.Lists
template <class Tables> __device__ __forceinline__ u32 seen_word(const Tables& tables, int kind, int2 range, int r, int n) {
  const u32 word = range_bits(range.x - 32 * n, range.y - 32 * n);
  return kind >= 0 && kind & 1 ? word & __ldg(tables.bitmaps + ((i64)(kind >> 1) * ROWS + r) * (KEYS / 32) + n) : word;
}
template <class Tables> __device__ __forceinline__ int2 seen_range(const Tables& tables, int kind, int left, int r) {
  const int2 range = kind >= 0 && !(kind & 1) ? __ldg((const int2*)tables.intervals + (i64)(kind >> 1) * ROWS + r) : make_int2(0, KEYS);
  return make_int2(range.x, imin(range.y, left));
}
template <class Tables> __device__ __forceinline__ Sight look_at(const Tables& tables, int kind, int left, int row) {
  return {kind, {seen_range(tables, kind, left, row), seen_range(tables, kind, left, row + 8)}};
}

// keys 8 j + 2 (lane % 4) and the next of a step are s[4 j ..]; its first keys are those of word `first` of the block
template <int N, class Tables> __device__ __forceinline__ void mask(float (&s)[N], const Tables& tables, const Sight& y, int row, int first = 0) {
#pragma unroll
  for (int n = 0; n < N / 16; n++) {
    u32 a = seen_word(tables, y.kind, y.range[0], row, first + n), b = seen_word(tables, y.kind, y.range[1], row + 8, first + n);
    if (__all_sync(~0u, (a & b) == ~0u)) continue;
    a >>= 2 * (thread_again() & 3);
    b >>= 2 * (thread_again() & 3);
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

// --------------------------------------------------------------------------------------------------------- products and softmax
template <int N> __device__ __forceinline__ void multiply_scores(float (&s)[N], u64 q, u64 k) {
#pragma unroll
  for (int c = 0; c < WIDTH / 16; c++) wgmma<KIND, K_MAJOR>(s, q + c / 4 * (Q_SLAB >> 4) + c % 4 * 2, k + c / 4 * (SLAB >> 4) + c % 4 * 2, c != 0);
  wgmma_commit();
}
template <int N> __device__ __forceinline__ void multiply_values(float (&o)[VALUES / 2], const u32 (&pr)[N], u64 v, bool more) {
#pragma unroll
  for (int c = 0; c < N / 4; c++) wgmma<VALUE_KIND, N_MAJOR>(o, pr + 4 * c, v + c * 128, more || c != 0);
  wgmma_commit();
}
template <int N> __device__ __forceinline__ void round(u32 (&pr)[N], const float (&s)[2 * N], float by = 1.f) {
#pragma unroll
  for (int c = 0; c < N; c++) pr[c] = pack<VALUE_KIND>(s[2 * c] * by, s[2 * c + 1] * by);
}

__device__ __forceinline__ bool is_far(float z) { return fabsf(z) > FAR && z != -inf(); }

// Raw products to probabilities; `most` are raw maxima, `factor` is for what was summed before. A row's reference is z = round(most * c), subtracted inside one
// multiply-add: every score is rounded once, after the subtraction, and the rounding of z is common to the row and so cancels; it moves the largest from 1 by
// 2^-17 at most. Where |z| passes FAR that would not hold: there the raw maximum is subtracted first, and the largest gives exactly 1.
// `by`, of float8: what these raw products count beside those of other steps, 0 or more; `most` are raw maxima times that.
template <int N> __device__ __forceinline__ void soften(float (&s)[N], float (&most)[2], float (&sum)[2], float (&factor)[2], float c, float by = 1.f) {
  float top[2] = {FLOAT8 ? -inf() : most[0], FLOAT8 ? -inf() : most[1]}, z[2], step = c * by;
#pragma unroll
  for (int j = 0; j < N; j += 4) { top[0] = fmaxf(top[0], fmaxf(s[j], s[j + 1])); top[1] = fmaxf(top[1], fmaxf(s[j + 2], s[j + 3])); }
  bool some_far = false;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 1));
    top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 2));
    if constexpr (FLOAT8) top[h] = fmaxf(most[h], __fmul_rn(top[h], by));
    const float before = most[h] * c;
    z[h] = top[h] * c;
    some_far |= is_far(before) | is_far(z[h]);
    if (z[h] == -inf()) z[h] = 0.f;  // no key so far: every exponent is -inf, not NaN
    factor[h] = ex2(before - z[h]);
  }
  if (__any_sync(~0u, some_far)) {
    step = c;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float before = most[h] * c, old = is_far(before) ? most[h] : 0.f, now = is_far(top[h] * c) ? top[h] : 0.f;
      if (now != 0.f) z[h] = 0.f;
      factor[h] = ex2(fmaf(old - now, c, (old != 0.f ? 0.f : before) - z[h]));
#pragma unroll
      for (int j = 0; j < N; j += 4)
        for (int i = j + 2 * h; i < j + 2 * h + 2; i++) s[i] = (FLOAT8 ? __fmul_rn(s[i], by) : s[i]) - now;
    }
  }
  float total[2] = {0.f, 0.f};
#pragma unroll
  for (int j = 0; j < N; j += 4)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      s[j + 2 * h] = ex2(fmaf(s[j + 2 * h], step, -z[h]));
      s[j + 2 * h + 1] = ex2(fmaf(s[j + 2 * h + 1], step, -z[h]));
      total[h] += s[j + 2 * h] + s[j + 2 * h + 1];
    }
#pragma unroll
  for (int h = 0; h < 2; h++) { most[h] = top[h]; sum[h] = sum[h] * factor[h] + total[h]; }
}

// ---------------------------------------------------------------------------------------------------------------- what leaves
// Of the kernel: queries(p), T; query(p, item, row), the call's query of a tile's row, which it has where 0 <= query < T; row_step(p, item), between a tile's rows; sinks(p, item), of each head, or null.
// Factors of the sums of two rows, and their lse.
template <class P, class X> __device__ __forceinline__ void finish(const P& p, const X& x, const float (&most)[2], float (&sum)[2], float (&factor)[2], int row) {
  const float sink = sinks(p, x) ? __ldg(sinks(p, x) + x.head % p.Hq) : -inf();
#pragma unroll
  for (int h = 0; h < 2; h++) {
    sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
    sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
    const bool empty = most[h] == -inf() && sum[h] == 0.f;
    const float top = __fmul_rn(most[h], p.scale);  // rounded as the backward rounds its scores
    factor[h] = empty ? 0.f : 1.f / (sum[h] + (sinks(p, x) ? ex2((sink - top) * LOG2E) : 0.f));
    const int t = query(p, x, row + 8 * h);
    if (p.lse && (thread_again() & 3) == 0 && t >= 0 && t < queries(p)) p.lse[(i64)x.head * queries(p) + t] = empty ? -inf() : top + logf(sum[h]);
  }
}

// this group's rows from their tile, those that the call has; two threads a row
template <class P, class X> __device__ __forceinline__ void store_inside(const P& p, const X& x, const Tiles& m, u32 tile, int w, int tid) {
  const int n = p.Dv / 8, r = w * 64 + tid / 2, t = query(p, x, r);
  if (t < 0 || t >= queries(p)) return;
  uint4* to = (uint4*)p.result + ((i64)x.head * queries(p) + t) * n;
#pragma unroll 1
  for (int c = tid % 2; c < n; c += 2) to[c] = *m.at<uint4>(tile + (c >> 3) * Q_SLAB + r * 128 + (((c & 7) ^ (r & 7)) << 4));
}

// out through this group's rows of the item's query tile
template <int N, class P, class X> __device__ __forceinline__ void store_rows(const P& p, const X& x, const Tiles& m, u32 tile, const float (&o)[N], const float (&factor)[2], int w, int tid) {
  const int lane = tid & 31, r = w * 64 + tid / 32 * 16 + (lane & 15);
#pragma unroll
  for (int j = 0; j < N / 8; j++) {
    const int c = 2 * j + (lane >> 4);  // 16 bytes each
    const float* y = o + 8 * j;
    stmatrix_at(tile + (c >> 3) * Q_SLAB + r * 128 + (((c & 7) ^ (r & 7)) << 4), pack<OUT_KIND>(y[0] * factor[0], y[1] * factor[0]), pack<OUT_KIND>(y[2] * factor[1], y[3] * factor[1]),
                pack<OUT_KIND>(y[4] * factor[0], y[5] * factor[0]), pack<OUT_KIND>(y[6] * factor[1], y[7] * factor[1]));
  }
  shared_to_copy_engine();
  named_sync(4 + w, 128);
  if (x.t + 64 * w < 0 || row_step(p, x) > 1) {  // the copy engine zero-fills rows before the first on the way in, but takes none on the way out (illegal instruction)
    store_inside(p, x, m, tile, w, tid);
    named_sync(4 + w, 128);
  } else if (tid == 0) {
#pragma unroll
    for (int c = 0; c < V_SLABS; c++) tma_store(&p.out, tile + c * Q_SLAB + w * 64 * 128, 64 * c, x.t + 64 * w, x.head);
    tma_store_commit();
  }
}
