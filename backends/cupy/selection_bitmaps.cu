// A selection as bitmaps of blocks: a block of threads gathers the bits of one row in shared memory, WINDOW keys at a time, and writes all its words.
// Defines: WHOLE (1: entries are whole words of 32 keys, set at once; 0: key after key).
#include "selections.cuh"

constexpr int THREADS = 128, WINDOW = 32768;

struct Params {
  Selected list;
  Positions at;
  u32* bitmaps;  // [B*G*nq*nk, block_q, block_k / 32]
  int* kinds;    // [B*G, nq, nk]
  int nq, nk, block_q, block_words;
};

__device__ __forceinline__ void set_bits(const Entries& list, u32* words, int first, int last) {
#if WHOLE
  for (i64 x = threadIdx.x; x < list.slots / 32; x += THREADS) {
    const int key = list.key(x * 32), seen = imin(list.limit - key, 32);
    if (key >= first && key < last) words[(key - first) / 32] = ~0u >> (32 - seen);  // given twice: the same bits
  }
#else
  for (i64 x = threadIdx.x; x < list.slots; x += THREADS) {
    const int key = list.key(x);
    if (key >= first && key < last) atomicOr(words + (key - first) / 32, 1u << (key & 31));
  }
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS) selection_bitmaps(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(raw);
  u32* words = (u32*)raw;  // [WINDOW / 32]
  const int t = blockIdx.x % p.at.T, l = blockIdx.x / p.at.T;
  const Entries list(p.list, p.at, l / p.list.G, l % p.list.G, t);
  const i64 block = ((i64)l * p.nq + t / p.block_q) * p.nk;
  const int all = p.nk * p.block_words;
  for (int w0 = 0; w0 < all; w0 += WINDOW / 32) {
    const int count = imin(all - w0, WINDOW / 32);
    for (int w = threadIdx.x; w < count; w += THREADS) words[w] = 0;
    __syncthreads();
    set_bits(list, words, w0 * 32, (w0 + count) * 32);
    __syncthreads();
    for (int w = threadIdx.x; w < count; w += THREADS) {
      const i64 column = block + (w0 + w) / p.block_words;
      p.bitmaps[(column * p.block_q + t % p.block_q) * p.block_words + (w0 + w) % p.block_words] = words[w];
      if (words[w]) p.kinds[column] = 2 * (int)column + 1;
    }
    __syncthreads();
  }
}
