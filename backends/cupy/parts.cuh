// One part of a layout of several, where the copy engine can address its axes (hopper_axes.py): row r of a tile stands r * row_step after the tile's first, key c of a block
// c / key_run * key_step + c % key_run after the block's first. The copy engine sees such an axis as two. Defines: PARTED; without it rows and keys are contiguous.
#pragma once
#include "lists.cuh"
#include "hopper.cuh"

#ifndef PARTED
#define PARTED 0
#endif
constexpr int KEYS = 128;  // of a block

template <class P> __device__ __forceinline__ int row_step(const P& p) {
  if constexpr (PARTED) return p.row_step;
  return 1;
}
// the first key of a block, and how many of its keys exist (negative: the block lies behind the last key)
template <class P> __device__ __forceinline__ int first_key(const P& p, int block) { return PARTED && p.lists.k_order ? __ldg(p.lists.k_order + (i64)block * KEYS) : block * KEYS; }
template <class P> __device__ __forceinline__ int existing_keys(const P& p, int block, int limit) {
  const int left = limit - first_key(p, block);
  if constexpr (PARTED) return left > 0 ? left / p.key_step * p.key_run + imin(left % p.key_step, p.key_run) : left;
  return left;
}
// steps of an axis of two, 0 where it is one
template <class P> __device__ __forceinline__ int row_steps(const P& p) { return row_step(p) > 1 ? row_step(p) : 0; }
template <class P> __device__ __forceinline__ int key_steps(const P& p) {
  if constexpr (PARTED) return p.key_run < KEYS ? p.key_step : 0;
  return 0;
}
__device__ __forceinline__ void load_box(u32 to, const TensorMap* map, u32 bar, int column, int at, int steps, int h, int b) {
  if (PARTED) tma_load(to, map, bar, column, steps ? at % steps : at, steps ? at / steps : 0, h, b);
  else tma_load(to, map, bar, column, at, h, b);
}
// Of an axis of n positions. Where it ends within a step its first n % steps classes are longer by one than the others: boxes of the second of two views, the others of the first.
__device__ __forceinline__ const TensorMap* view_of(const TensorMap& only, int, int, int) { return &only; }
__device__ __forceinline__ const TensorMap* view_of(const TensorMap (&two)[2], int at, int steps, int n) { return two + (steps && at % steps < n % steps); }
template <class Views> __device__ __forceinline__ void load_box(u32 to, const Views& views, u32 bar, int column, int at, int steps, int n, int h, int b) {
  load_box(to, view_of(views, at, steps, n), bar, column, at, steps, h, b);
}
