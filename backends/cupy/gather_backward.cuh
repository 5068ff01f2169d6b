// What the backward kernels over selections share: arguments, and the walk of a key tile over the queries that chose any of its keys.
#pragma once
#include "selections.cuh"

struct Params {
  const void *q, *k, *v, *dout;
  const float *lse, *delta;
  void *dq, *dk, *dv;
  const int* starts;
  const u32* items;
  const int4* parts;   // gather_bins.cu; their sums: [extra][TK][D], [extra][TK][Dv]
  float *dk_parts, *dv_parts;
  Selected list;
  Positions at;
  i64 qb, qh, qt, qd, kb, kh, kt, kd, vb, vh, vt, vd, ob, oh, ot, od;
  int Hq, group, D, Dv, tiles, slices, chunks, share, extra, unused;
  float scale, softcap;
};
#include "probability.cuh"

// What a CTA of `columns` works on: a tile of keys of a head, chunks first .. end - 1 of their queries; `slot` of a part of a long tile, or -1. idle: nothing.
struct Keys {
  int b, key_head, tile, first, end, slot, part, parts, same;  // part i of so many; same: key heads that share a list, whose slots stand side by side
  bool idle;
  __device__ __forceinline__ Keys(const Params& p, int x) : first(0), end(p.chunks), slot(x < p.extra ? x : -1), part(0), parts(1), idle(false) {
    const int Hk = p.Hq / p.group, G = p.list.G;
    same = G == 1 ? Hk : 1;
    if (slot >= 0) {
      const int4 y = __ldg(p.parts + x / same);
      const int list = y.x / p.tiles;
      tile = y.x - list * p.tiles;
      b = list / G;
      key_head = G == 1 ? x % same : list - b * G;
      part = y.y;
      parts = y.z;
      idle = parts == 0;
      if (idle) return;
      first = cut(p, y.x, part, parts);
      end = cut(p, y.x, part + 1, parts);
      return;
    }
    x -= p.extra;
    tile = x % p.tiles;
    b = x / p.tiles / Hk;
    key_head = x / p.tiles % Hk;
    idle = p.extra && items(p, (b * G + (G == 1 ? 0 : key_head)) * p.tiles + tile, p.chunks) > p.share;  // its parts do it
  }
  static __device__ __forceinline__ int items(const Params& p, int tile, int chunks) { return __ldg(p.starts + (i64)tile * p.chunks + chunks) - __ldg(p.starts + (i64)tile * p.chunks); }
  // the first chunk of part i of n: as many items before it as come to i of n shares
  static __device__ __forceinline__ int cut(const Params& p, int tile, int i, int n) {
    if (i == n) return p.chunks;
    const int before = (int)((i64)items(p, tile, p.chunks) * i / n);
    int lo = 0, hi = p.chunks;
    while (lo < hi) {
      const int middle = (lo + hi) / 2;
      if (items(p, tile, middle) < before) lo = middle + 1; else hi = middle;
    }
    return lo;
  }
};

// One bin opened: its queries in ascending order, and how often each chose each key. All of it in shared memory.
template <int Tk, int Tq, int Tc, int Threads> struct Bin {
  static constexpr int WORDS = Tc / 32, INTS = WORDS + Tc + 4 + Tq * Tk;
  u32* hit;        // [WORDS] queries of the chunk that chose any key of the tile
  int* query;      // [Tc] the n-th of them
  int* total;      // how many; [4] keeps what follows aligned
  u32* times;      // [Tq][Tk]: of queries `low` and on
  const u32 *first, *last;

  __device__ __forceinline__ explicit Bin(int* memory) : hit((u32*)memory), query(memory + WORDS), total(memory + WORDS + Tc), times((u32*)(memory + WORDS + Tc + 4)), first(nullptr), last(nullptr) {}

  // queries of the bin; all threads get it
  __device__ __forceinline__ int open(const Params& p, i64 bin) {
    first = p.items + __ldg(p.starts + bin);
    last = p.items + __ldg(p.starts + bin + 1);
    if (first == last) return 0;
    __syncthreads();
    for (int i = threadIdx.x; i < WORDS; i += Threads) hit[i] = 0;
    __syncthreads();
    for (const u32* i = first + threadIdx.x; i < last; i += Threads) atomicOr(hit + (__ldg(i) >> 21), 1u << (__ldg(i) >> 16 & 31));
    __syncthreads();
    for (int t = threadIdx.x; t < Tc; t += Threads)
      if (hit[t / 32] >> (t & 31) & 1) query[rank(t)] = t;
    if (threadIdx.x == 0) *total = rank(Tc - 1) + (hit[WORDS - 1] >> 31);
    __syncthreads();
    return *total;
  }
  // how many chosen queries stand before t
  __device__ __forceinline__ int rank(int t) const {
    int n = __popc(hit[t / 32] & ((1u << (t & 31)) - 1));
    for (int i = 0; i < t / 32; i++) n += __popc(hit[i]);
    return n;
  }
  // times[i][s]: how often query `low + i` chose key s, for i < n; integers, so that the order of the items does not matter
  __device__ __forceinline__ void count(int low, int n) {
    for (int i = threadIdx.x; i < n * Tk; i += Threads) times[i] = 0;
    __syncthreads();
    for (const u32* i = first + threadIdx.x; i < last; i += Threads) {
      const u32 item = __ldg(i);
      const int r = rank(item >> 16) - low;
      if (r < 0 || r >= n) continue;
      for (int s = item & 255; s <= (int)(item >> 8 & 255); s++) atomicAdd(times + r * Tk + s, 1u);
    }
  }
};

// The rows of one step of `columns`: pairs of a query of the bin and a head, query by query. All of it in shared memory.
template <int Tq> struct Rows {
  static constexpr int INTS = 5 * Tq;
  float *lse, *delta;
  int *query, *head, *slot;  // query -1: no row; slot: its place in Bin::times

  __device__ __forceinline__ explicit Rows(float* memory) : lse(memory), delta(memory + Tq), query((int*)memory + 2 * Tq), head((int*)memory + 3 * Tq), slot((int*)memory + 4 * Tq) {}
  __device__ __forceinline__ int* end() const { return slot + Tq; }
  template <int Threads> __device__ __forceinline__ void find(const Params& p, int b, int first_head, int heads, int y0, int all, int low, int first_query, const int* chosen) const {
    for (int y = threadIdx.x; y < Tq; y += Threads) {
      const int i = (y0 + y) / heads, h = first_head + (y0 + y) % heads, t = y0 + y < all ? first_query + chosen[i] : -1;
      const i64 at = ((i64)b * p.Hq + h) * p.at.T + t;
      query[y] = t;
      head[y] = h;
      slot[y] = i - low;
      lse[y] = t < 0 ? inf() : lse_of(p.lse, at);
      delta[y] = t < 0 ? 0.f : __ldg(p.delta + at);
    }
  }
};
