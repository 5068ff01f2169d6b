// Selections as the gather kernels read them: entry e of granularity g stands for keys e * g .. e * g + g - 1; whatever is no key is a hole.
#pragma once
#include "lists.cuh"
#include "mma.cuh"

struct Selected {  // packed by operands.py in this order
  const int *indices, *lengths;  // [B,G,T,K], [B,G,T] or null
  int G, K, granularity, causal;
};

// the list of one query: its entries, how many key slots they have, and the keys it may see
struct Entries {
  const int* entries;
  i64 slots;
  int granularity, limit, blocks;

  __device__ __forceinline__ Entries(const Selected& s, const Positions& at, int b, int g, int t) {
    const i64 row = ((i64)b * s.G + g) * at.T + t;
    entries = s.indices + row * s.K;
    granularity = s.granularity;
    slots = (i64)(s.lengths ? clamp(__ldg(s.lengths + row), 0, s.K) : s.K) * granularity;
    limit = key_limit(at, b);
    if (s.causal) {  // 64-bit sums: a position near the largest int does not wrap
      const i64 end = (i64)first_position(at, b) + t + 1;
      limit = end < 0 ? 0 : end < limit ? (int)end : limit;
    }
    blocks = (limit + granularity - 1) / granularity;  // entries from here on hold no key, and their first key may overflow
  }
  // the key in a slot, or -1
  __device__ __forceinline__ int key(i64 slot) const {
    if (slot >= slots) return -1;
    if (granularity == 1) {
      const int e = __ldg(entries + slot);
      return e >= 0 && e < limit ? e : -1;
    }
    const i64 i = slot / granularity;
    const int e = __ldg(entries + i);
    if (e < 0 || e >= blocks) return -1;
    const int s = e * granularity + (int)(slot - i * granularity);
    return s < limit ? s : -1;
  }
};

// Keys of one step into shared memory, and which of them exist as words. Tk is a multiple of 32: whole warps.
template <int Tk, int Threads> __device__ __forceinline__ void find_keys(const Entries& list, i64 first, int* keys, u32* words) {
  for (int x = threadIdx.x; x < Tk; x += Threads) {
    const int key = list.key(first + x);
    keys[x] = key;
    const u32 word = __ballot_sync(~0u, key >= 0);
    if ((x & 31) == 0) words[x >> 5] = word;
  }
}

// Which rows a CTA works on: heads that share their list and their keys stand together, `rows` of them. Queries follow one another before the next list does: what runs
// at a time reads the keys of one head, which the cache holds where it would not hold all heads' (4 heads of 64k keys, 128 + 128 wide, are 134 MB in 16 bits).
struct Group {
  int b, t, g, head, key_head, rows;  // head: the first

  __device__ __forceinline__ Group(const Selected& s, int T, int Hq, int group, int tile_rows, int x) {
    const int apart = s.G == Hq ? 1 : group, tiles = (apart + tile_rows - 1) / tile_rows, lists = Hq / apart;
    const int tile = x % tiles, y = x / tiles, list = y / T % lists;
    t = y % T;
    b = y / T / lists;
    head = list * apart + tile * tile_rows;
    rows = imin(apart - tile * tile_rows, tile_rows);
    key_head = head / group;
    g = s.G == 1 ? 0 : s.G == Hq ? head : key_head;
  }
};
