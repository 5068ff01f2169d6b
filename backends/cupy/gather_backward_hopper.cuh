// How the two Hopper kernels of the backward over selected keys meet. For each query, tile of 64 entries, half of it and block of 64 heads the first leaves two
// images [64 heads][32 entries], swizzled by 64 bytes: probabilities, then dS; the blocks of BLOCKS a group, so that a tile of all of them is one piece.
#pragma once
#include "wgmma.cuh"
#include "selections.cuh"

#ifndef KIND
#define KIND BFLOAT16
#endif
#ifndef BLOCKS
#define BLOCKS 2
#endif
constexpr int BH = 64, IMAGE = BH * 64, PAIR = 2 * IMAGE, TILE_BYTES = 2 * BLOCKS * PAIR;

// A key's sum of bounds, whatever their exponents and order: positive floats add up in eight integers, by the upper three bits of their exponents, rounded up to 9 bits.
// The ninth counts those that are not finite.
constexpr int BINS = 9;
__device__ __forceinline__ void add_bound(u64* bins, float x) {
  const u32 bits = __float_as_int(x), e = bits >> 23 & 255;
  if (e == 255) atomicAdd(bins + 8, (u64)1);
  else atomicAdd(bins + e / 32, (u64)(((bits & 0x7fffff) >> 15) + 257) << e % 32);
}
