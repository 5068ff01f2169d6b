// What the backward kernels over selections share: arguments, and the walk of a key tile over the queries that chose any of its keys.
#pragma once
#include "selections.cuh"

struct Params {
  const void *q, *k, *v, *dout;
  const float *lse, *delta;
  void *dq, *dk, *dv;
  const int* starts;
  const u32* items;
  Selected list;
  Positions at;
  i64 qb, qh, qt, qd, kb, kh, kt, kd, vb, vh, vt, vd, ob, oh, ot, od;
  int Hq, group, D, Dv, tiles, slices, chunks, unused;
  float scale, softcap;
};
#include "probability.cuh"

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
