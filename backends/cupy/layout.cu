// Block lists from a grid of blocks, by row and by column, in three launches: count, running sums, fill. Nothing comes back to the host.
// A row of the grid is read by one warp, 32 entries at a time. 32 columns are read side by side by the 32 warps of a block, each a slice of the rows, so that
// reads are coalesced both ways; the slices' counts give each warp its place. Lists ascend by construction.
#include "mma.cuh"

#ifndef TABLE
#define TABLE 0  // 1: the grid holds int32 kinds (-2 absent, -1 full, else a row of a table); 0: bytes, kept or not
#endif

template <int T> struct GridCell { using type = u8; };
template <> struct GridCell<1> { using type = int; };
using Cell = GridCell<TABLE>::type;

struct Params {
  const Cell* grid;
  int* offsets; int* cols; int* kinds; int* by_key_offsets; int* by_key_rows; int* by_key_kinds;
  i64 grid_l, grid_q, grid_k;
  int L, nq, nk, row_groups;  // blocks of threads before `row_groups` take 32 rows each, those behind 32 columns of one list
};

__device__ __forceinline__ int kind_of(Cell x) { return TABLE ? (int)x : x ? -1 : -2; }

// One row by one warp. FILL: entries go where offsets[0], offsets[1] (full, partial) say; else their numbers go to offsets[1], offsets[2].
template <bool FILL> __device__ __forceinline__ void row_of_blocks(const Params& p, int x) {
  const int lane = threadIdx.x & 31, l = x / p.nq, i = x % p.nq;
  const Cell* row = p.grid + l * p.grid_l + i * p.grid_q;
  int* offsets = p.offsets + 2 * (i64)x;
  int full = FILL ? offsets[0] : 0, part = FILL ? offsets[1] : 0;
  for (int j0 = 0; j0 < p.nk; j0 += 32) {
    const int j = j0 + lane, kind = j < p.nk ? kind_of(row[j * p.grid_k]) : -2;
    const u32 fulls = __ballot_sync(~0u, kind == -1), parts = __ballot_sync(~0u, kind >= 0), before = (1u << lane) - 1;
    if (FILL && kind >= -1) {
      const int at = kind == -1 ? full + __popc(fulls & before) : part + __popc(parts & before);
      p.cols[at] = j; p.kinds[at] = kind;
    }
    full += __popc(fulls); part += __popc(parts);
  }
  if (!FILL && lane == 0) { offsets[1] = full; offsets[2] = part; }
}

// 32 columns by 32 warps; lane: the column, warp: a slice of the rows.
template <bool FILL> __device__ __forceinline__ void columns_of_blocks(const Params& p, int group, int* counts) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, per_list = (p.nk + 31) / 32, l = group / per_list, j = group % per_list * 32 + lane;
  const int slice = (p.nq + 31) / 32, begin = imin(warp * slice, p.nq), end = imin(begin + slice, p.nq);
  const Cell* column = p.grid + l * p.grid_l + j * p.grid_k;
  int full = 0, part = 0;
  if (j < p.nk)
    for (int i = begin; i < end; i++) { const int kind = kind_of(column[i * p.grid_q]); full += kind == -1; part += kind >= 0; }
  counts[warp * 32 + lane] = full; counts[1024 + warp * 32 + lane] = part;
  __syncthreads();
  if (j >= p.nk) return;
  int* offsets = p.by_key_offsets + 2 * ((i64)l * p.nk + j);
  if (!FILL) {
    if (warp) return;
    full = part = 0;
    for (int w = 0; w < 32; w++) { full += counts[w * 32 + lane]; part += counts[1024 + w * 32 + lane]; }
    offsets[1] = full; offsets[2] = part;
    return;
  }
  full = offsets[0]; part = offsets[1];
  for (int w = 0; w < warp; w++) { full += counts[w * 32 + lane]; part += counts[1024 + w * 32 + lane]; }
  for (int i = begin; i < end; i++) {
    const int kind = kind_of(column[i * p.grid_q]);
    if (kind < -1) continue;
    const int at = kind == -1 ? full++ : part++;
    p.by_key_rows[at] = i; p.by_key_kinds[at] = kind;
  }
}

template <bool FILL> __device__ __forceinline__ void lines(const Params& p) {
  DYNAMIC_SHARED(raw);
  if ((int)blockIdx.x >= p.row_groups) { columns_of_blocks<FILL>(p, blockIdx.x - p.row_groups, (int*)raw); return; }
  const int x = blockIdx.x * 32 + threadIdx.x / 32;
  if (x < p.L * p.nq) row_of_blocks<FILL>(p, x);
}

extern "C" __global__ void __launch_bounds__(1024) count_lines(const __grid_constant__ Params p) { lines<false>(p); }
extern "C" __global__ void __launch_bounds__(1024) fill_lines(const __grid_constant__ Params p) { lines<true>(p); }

// In place: offsets[0] = 0, offsets[i] = the sum of what stood at 1 .. i. Block 0: by row, block 1: by column.
extern "C" __global__ void __launch_bounds__(1024) add_up(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(raw);
  int* sums = (int*)raw;  // [32]
  int* x = blockIdx.x ? p.by_key_offsets : p.offsets;
  const int n = 2 * p.L * (blockIdx.x ? p.nk : p.nq) + 1, lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  int carry = 0;
  for (int i0 = 0; i0 < n; i0 += 1024) {
    const int i = i0 + threadIdx.x;
    int v = i > 0 && i < n ? x[i] : 0;
#pragma unroll
    for (int o = 1; o < 32; o *= 2) { const int y = __shfl_up_sync(~0u, v, o); if (lane >= o) v += y; }
    if (lane == 31) sums[warp] = v;
    __syncthreads();
    int before = 0, all = 0;
    for (int w = 0; w < 32; w++) { if (w < warp) before += sums[w]; all += sums[w]; }
    if (i < n) x[i] = carry + before + v;
    carry += all;
    __syncthreads();
  }
}
