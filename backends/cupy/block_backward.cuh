// What the backward kernels over block lists share: arguments, and the walk of a key tile over the queries that see it.
#pragma once
#include "lists.cuh"

struct Params {
  const void *q, *k, *v, *dout;
  const float *lse, *delta;
  void *dq, *dk, *dv;
  const int *by_key_offsets, *by_key_rows, *by_key_kinds;
  ListArrays lists;
  Positions at;
  i64 qb, qh, qt, qd, kb, kh, kt, kd, vb, vh, vt, vd, ob, oh, ot, od;
  int Hq, group, D, Dv, tiles, slices;
  float scale, softcap;
};

#include "probability.cuh"

// Queries that see key block j, Tq rows at a time, head after head of the group; rows outside the call's queries are skipped.
template <int Bq, int Tq, bool Order> struct QueryWalk {
  int list_at, group, left, e, middle, end, c, block, low, high;  // rows low .. high-1 of all tiles, counted from the lists' first, are queries

  __device__ __forceinline__ QueryWalk(const Params& p, int b, int key_head, int j, int start) : group(p.group), left(p.group), e(0), middle(0), end(0), c(0), block(0) {
    const i64 at = (i64)start - (i64)p.lists.first * Bq, to = at + p.at.T, all = (i64)p.lists.nq * Bq;
    low = Order ? 0 : (int)(at < 0 ? 0 : at < all ? at : all);
    high = Order ? (int)all : (int)(to < 0 ? 0 : to < all ? to : all);
    list_at = b * p.lists.list_b + key_head * p.group * p.lists.list_h;
    if (j >= p.lists.nk || low >= high) left = 0;
    else open(p, j);
    settle(p, j);
  }
  __device__ __forceinline__ bool valid() const { return left > 0; }
  __device__ __forceinline__ int head() const { return group - left; }  // within the group
  __device__ __forceinline__ int kind(const Params& p) const { return e < middle ? -1 : __ldg(p.by_key_kinds + e); }
  __device__ __forceinline__ void open(const Params& p, int j) {
    const int* o = p.by_key_offsets + 2 * ((i64)__ldg(p.lists.list_of + list_at) * p.lists.nk + j);
    e = __ldg(o); middle = __ldg(o + 1); end = __ldg(o + 2);
  }
  __device__ __forceinline__ void settle(const Params& p, int j) {
    while (left) {
      while (e < end) {
        block = __ldg(p.by_key_rows + e);
        if (block * Bq >= high) { e = e < middle ? middle : end; continue; }
        if ((block + 1) * Bq > low) {
          c = Order || block * Bq >= low ? 0 : (low - block * Bq) / Tq * Tq;
          return;
        }
        e++;
      }
      if (--left) {
        list_at += p.lists.list_h;
        open(p, j);
      }
    }
  }
  __device__ __forceinline__ void next(const Params& p, int j) {
    c += Tq;
    if (c < Bq && block * Bq + c < high) return;
    e++;
    settle(p, j);
  }
};
