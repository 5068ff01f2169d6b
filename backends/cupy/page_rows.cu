// Entries of a selection as rows of a cache's pool, in one pass: a block of threads takes CHUNK key slots of one list. What is no key, or lies in no page, is -1.
// Defines: PAGE (pages.cuh).
#include "pages.cuh"
#include "selections.cuh"

constexpr int CHUNK = 256;

struct Params : Pages {
  Selected list;
  Positions at;
  int* rows;  // [B,G,T,slots]
  int slots, chunks;
};

extern "C" __global__ void __launch_bounds__(CHUNK) page_rows(const __grid_constant__ Params p) {
  const int x = blockIdx.x / p.chunks, first = blockIdx.x % p.chunks * CHUNK, t = x % p.at.T, g = x / p.at.T % p.list.G, b = x / p.at.T / p.list.G;
  const Entries list(p.list, p.at, b, g, t);
  const int slot = first + threadIdx.x;
  if (slot < p.slots) p.rows[(i64)x * p.slots + slot] = (int)p.row(b, list.key(slot));
}
