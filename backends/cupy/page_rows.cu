// Entries of a selection as rows of a cache's pool, in one pass: a block of threads takes CHUNK key slots of one list. What is no key, or lies in no page, is -1.
// Defines: PAGE (pages.cuh).
#include "pages.cuh"
#include "selections.cuh"

constexpr int CHUNK = 1024;

struct Params : Pages {
  Selected list;
  Positions at;
  int* rows;  // [B,G,T,slots]
  int slots, chunks;
};

extern "C" __global__ void __launch_bounds__(256) page_rows(const __grid_constant__ Params p) {
  const int x = blockIdx.x / p.chunks, first = blockIdx.x % p.chunks * CHUNK, t = x % p.at.T, g = x / p.at.T % p.list.G, b = x / p.at.T / p.list.G;
  const Entries list(p.list, p.at, b, g, t);
  int* to = p.rows + (i64)x * p.slots;
#pragma unroll
  for (int i = 0; i < CHUNK; i += 256) {
    const int slot = first + i + threadIdx.x;
    if (slot < p.slots) to[slot] = (int)p.row(b, list.key(slot));
  }
}
