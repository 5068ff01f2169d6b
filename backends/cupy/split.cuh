// Keys split over the chip: the units of work of all jobs, laid end to end, are cut into equal shares, one for each block of threads (or row of them).
//
// A job is one tile of queries of a batch entry; each of its `members` (key heads, tiles of rows) has the same units: the entries of its list. Lengths on the device decide,
// the grid does not: a replayed graph balances anew. Who finds an item begun or left unfinished by its share writes sums to slot 2 share (its first item) or
// 2 share + 1 (its last), and merge_split.cu adds the slots of an item in the order of its keys: the same lengths give the same bits.
#pragma once
#include "lists.cuh"

struct Split {  // packed by split.py in this order
  float *sums, *rows;  // [slots, tile rows, columns] sums of values; [slots, tile rows, 2] largest score in natural units, sum of probabilities relative to it
  int* starts;         // [jobs + 1] units before each job, written by the first block of threads for the merge
  int jobs, members, shares, unused;
};

// Entries first .. first + n - 1 of a list, `gap` left out behind the `full` full ones: those that hold keys before the limit. From `plain` on they need a mask.
struct Run {
  int first, n, full, plain, gap, limit;
  __device__ __forceinline__ int entry(int x) const { return first + x + (x >= full ? gap : 0); }
};

template <int Bk> __device__ __forceinline__ Run open_run(const ListArrays& a, int list, i64 i, int limit) {
  if (i < 0 || i >= a.nq) return {0, 0, 0, 0, 0, limit};
  const int* o = a.offsets + 2 * ((i64)list * a.nq + i);
  const int first = __ldg(o), middle = __ldg(o + 1), end = __ldg(o + 2);
  const int full = blocks_before<Bk>(a.cols + first, middle - first, limit), n = full + blocks_before<Bk>(a.cols + middle, end - middle, limit);
  return {first, n, full, full - (full && limit - __ldg(a.cols + first + full - 1) * Bk < Bk), middle - first - full, limit};
}

struct Start { int job, start; };  // and the units before it

// Units of all jobs; `found` is the job that holds unit `wanted`, members counted. All threads call it together; `box` [Threads / 32 + 2] in shared memory.
template <int Threads, class Units> __device__ __forceinline__ int scan_jobs(const Split& s, const Units& units, i64 wanted, int* starts, int* box, Start& found) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  int before = 0;
  for (int base = 0; base < s.jobs; base += Threads) {
    const int job = base + threadIdx.x, n = job < s.jobs ? units(job) : 0;
    int sum = n, total = 0;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int x = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += x;
    }
    if (lane == 31) box[warp] = sum;
    __syncthreads();
    for (int w = 0; w < Threads / 32; w++) {
      if (w < warp) sum += box[w];
      total += box[w];
    }
    sum += before;
    if (starts && job < s.jobs) starts[job + 1] = sum;
    if (n && (i64)(sum - n) * s.members <= wanted && wanted < (i64)sum * s.members) { box[Threads / 32] = job; box[Threads / 32 + 1] = sum - n; }
    before += total;
    __syncthreads();
  }
  if (starts && threadIdx.x == 0) starts[0] = 0;
  found = {box[Threads / 32], box[Threads / 32 + 1]};
  return before;
}

__device__ __forceinline__ i64 share_of(const Split& s, int total) { return ((i64)total * s.members + s.shares - 1) / s.shares; }

struct Share { int job, at, units; };  // its first job, the unit of it to begin with, and how many in all

// The share of this block of threads, one of a row of `parts` that take the same; jobs have one member.
template <int Threads, class Units> __device__ __forceinline__ Share share_of_rows(const Split& s, int parts, int* box, const Units& units) {
  Start found;
  const int total = scan_jobs<Threads>(s, units, -1, blockIdx.x == 0 ? s.starts : nullptr, box, found);
  const i64 size = share_of(s, total), begin = (int)blockIdx.x / parts * size, end = begin + size < total ? begin + size : total;
  if (begin < end) scan_jobs<Threads>(s, units, begin, nullptr, box, found);
  __syncthreads();
  return {found.job, (int)(begin - found.start), (int)(end - begin)};
}
