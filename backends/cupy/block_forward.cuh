// What the two forward kernels over block lists share: their arguments, and which tile a CTA works on.
#pragma once
#include "lists.cuh"
#ifndef FLOAT8  // float8.cuh
#define FLOAT8 0
#endif

struct Params : Pages {
  const void *q, *k, *v;
  void* out;
  float* lse;
  const float* sink;
  ListArrays lists;
  Positions at;
  i64 qb, qh, qt, qd, kb, kh, kt, kd, vb, vh, vt, vd;
  int Hq, group, D, Dv, tiles, slices;
  float scale, softcap;
#if FLOAT8
  Scales scales;
#endif
};

struct Tile {
  bool exists;
  int slice, head, b, h, i, limit, start;  // head = b * Hq + h; tile i of the lists, possibly outside them

  __device__ __forceinline__ Tile(const Params& p) {
    const int x = blockIdx.x / p.slices, tile = p.tiles - 1 - x % p.tiles;  // late tiles first: causal ones are the longest
    slice = blockIdx.x % p.slices;
    head = x / p.tiles; b = head / p.Hq; h = head % p.Hq;
    limit = key_limit(p.at, b);
    start = first_position(p.at, b);
    const i64 n = Q_ORDER ? tile : (i64)floor_div(start, BQ) + tile;
    exists = Q_ORDER || n * BQ <= (i64)start + p.at.T - 1;
    i = (int)(Q_ORDER ? n : n - p.lists.first);
  }
  __device__ __forceinline__ Walk<BK, TK, K_ORDER> walk(const Params& p) const {
    if (i < 0 || i >= p.lists.nq) return Walk<BK, TK, K_ORDER>();
    return Walk<BK, TK, K_ORDER>(p.lists, __ldg(p.lists.list_of + b * p.lists.list_b + h * p.lists.list_h), i, limit);
  }
};
