// Block lists and positions as every attention kernel of this folder reads them (contract.Lists): which keys a row of a tile sees, as words of bits.
#pragma once
#include "pages.cuh"

struct ListArrays {  // packed by operands.py in this order
  const int *offsets, *cols, *kinds, *intervals;
  const u32* bitmaps;
  const int *list_of, *q_order, *k_order;
  int list_b, list_h;  // strides of list_of, 0 where it is shared
  int first, nq, nk, unused;
};

struct Positions {  // packed by operands.py in this order
  const int *kv_length, *q_start;
  int T, S, q_start_value, q_start_from;  // from: 0 the value, 1 the array, 2 kv_length - T
};

// keys at or past it do not exist
__device__ __forceinline__ int key_limit(const Positions& p, int b) { return p.kv_length ? clamp(__ldg(p.kv_length + b), 0, p.S) : p.S; }
// the position of query 0
__device__ __forceinline__ int first_position(const Positions& p, int b) {
  return p.q_start_from == 0 ? p.q_start_value : p.q_start_from == 1 ? __ldg(p.q_start + b) : key_limit(p, b) - p.T;
}

// how many of n ascending key blocks start before the limit
template <int Bk> __device__ __forceinline__ int blocks_before(const int* cols, int n, int limit) {
  const int blocks = limit / Bk + (limit % Bk != 0);
  if (n == 0 || __ldg(cols + n - 1) < blocks) return n;
  int lo = 0, hi = n - 1;
  while (lo < hi) {
    const int middle = (lo + hi) / 2;
    if (__ldg(cols + middle) < blocks) lo = middle + 1; else hi = middle;
  }
  return lo;
}

// bits lo .. hi-1 of a word, whatever lo and hi
__device__ __forceinline__ u32 range_bits(int lo, int hi) {
  lo = imax(lo, 0);
  hi = imin(hi, 32);
  return lo < hi ? (~0u >> (32 - hi)) & (~0u << lo) : 0u;
}

// which of the keys c .. c+31 of a block row r of the tile sees, by the block's kind alone
template <int Bq, int Bk> __device__ __forceinline__ u32 kind_word(const ListArrays& a, int kind, int r, int c) {
  if (kind < 0) return ~0u;
  if (kind & 1) return __ldg(a.bitmaps + ((i64)(kind >> 1) * Bq + r) * (Bk / 32) + (c >> 5));
  const int2 range = __ldg((const int2*)a.intervals + (i64)(kind >> 1) * Bq + r);
  return range_bits(range.x - c, range.y - c);
}

// key c of key block j, or -1
template <int Bk, bool Order> __device__ __forceinline__ int key_of(const ListArrays& a, int j, int c, int limit) {
  const int key = Order ? __ldg(a.k_order + (i64)j * Bk + c) : j * Bk + c;
  return key < limit ? key : -1;
}

// Which of the keys c .. c+31 of key block j exist. With an order or pages all 32 lanes of the warp must call it together.
template <int Bk, bool Order> __device__ __forceinline__ u32 exist_word(const ListArrays& a, int j, int c, int limit, const Pages& pages, int b) {
  if constexpr (PAGE != 0) {
    return __ballot_sync(~0u, pages.row(b, key_of<Bk, Order>(a, j, c + (threadIdx.x & 31), limit)) >= 0);
  } else if constexpr (Order) {
    const int key = __ldg(a.k_order + (i64)j * Bk + c + (threadIdx.x & 31));
    return __ballot_sync(~0u, key >= 0 && key < limit);
  } else {
    return range_bits(0, limit - (j * Bk + c));
  }
}

// The row of the call's queries that row r of tile i is, or -1. Without an order tile i holds positions (first + i) * Bq + r.
template <int Bq, bool Order> __device__ __forceinline__ int query_of(const ListArrays& a, int i, int r, int start, int T) {
  i64 p = ((i64)a.first + i) * Bq + r;
  if constexpr (Order) {
    p = __ldg(a.q_order + (i64)i * Bq + r);
    if (p < 0) return -1;
  }
  p -= start;
  return p >= 0 && p < T ? (int)p : -1;
}

// Steps through one list, Tk keys at a time. Columns ascend within the full and within the partial entries, so that without an order the first block
// past the last key ends its section.
template <int Bk, int Tk, bool Order> struct Walk {
  const int *cols, *kinds;
  int e, middle, end, c, block, limit;

  __device__ __forceinline__ Walk(const ListArrays& a, int list, int i, int limit_) : cols(a.cols), kinds(a.kinds), c(0), block(0), limit(limit_) {
    const int* o = a.offsets + 2 * ((i64)list * a.nq + i);
    e = __ldg(o); middle = __ldg(o + 1); end = __ldg(o + 2);
    settle();
  }
  __device__ __forceinline__ Walk() : cols(nullptr), kinds(nullptr), e(0), middle(0), end(0), c(0), block(0), limit(0) {}
  __device__ __forceinline__ bool valid() const { return e < end; }
  __device__ __forceinline__ int kind() const { return e < middle ? -1 : __ldg(kinds + e); }
  __device__ __forceinline__ bool masked() const { return Order || PAGE % Tk || e >= middle || block * Bk + c + Tk > limit; }
  __device__ __forceinline__ void settle() {
    while (e < end) {
      block = __ldg(cols + e);
      if (Order || block * Bk < limit) return;
      e = e < middle ? middle : end;
    }
  }
  __device__ __forceinline__ void next() {
    c += Tk;
    if (c < Bk && (Order || block * Bk + c < limit)) return;
    c = 0;
    e++;
    settle();
  }
};

// Words of a step for all rows of a tile, and the keys that any row of the call sees: what nobody sees must not reach a product (0 * NaN).
// `words` [Bq][Tk / 32]; `seen` [Tk / 32] was zeroed before; `rows` [Bq] are query_of. Bq is a multiple of 32: a warp works on one word column.
template <int Bq, int Bk, int Tk, bool Order, int Threads, class W>
__device__ __forceinline__ void make_words(const ListArrays& a, const W& w, const int* rows, u32* words, u32* seen, const Pages& pages = {}, int b = 0) {
  const int kind = w.kind();
  for (int x = threadIdx.x; x < Bq * (Tk / 32); x += Threads) {
    const int r = x % Bq, n = x / Bq;
    u32 word = exist_word<Bk, Order>(a, w.block, w.c + 32 * n, w.limit, pages, b);
    word = rows[r] < 0 ? 0u : word & kind_word<Bq, Bk>(a, kind, r, w.c + 32 * n);
    words[r * (Tk / 32) + n] = word;
    word = __reduce_or_sync(~0u, word);
    if ((threadIdx.x & 31) == 0 && word) atomicOr(seen + n, word);
  }
}
