// The parts that shares of a split left in scratch (split.cuh), added in the order of their keys. Rows whose item was one share's alone are there already; rows of items
// without keys become out 0, lse -inf. Few rows (LINES 1): a block of threads each, because one sequence may have a part in every share: weights are a thread's each.
// Many rows (LINES 8): a warp each, for their parts are few and what counts is how many bytes are under way.
// Defines: KIND, BQ (queries of a job, 0: each is its own), ROWS, COLUMNS of a slot, LINES of a block of threads.
#include "mma.cuh"
#include "split.cuh"

struct Params {
  void* out;
  float* lse;
  const float* sink;
  Split split;
  Positions at;
  int Hq, Dv, pack, heads, tiles, parts, lanes, total;  // lanes: slots that stand side by side, one for each tile of rows of the same keys; total: rows
};

constexpr int THREADS = 256, WIDTH = THREADS / LINES, QUADS = COLUMNS / 4;  // a thread holds four columns at a time
static_assert(COLUMNS % 4 == 0 && QUADS <= THREADS, "columns");

struct Line {
  i64 line, first, share, from;  // first: the share of its first part
  int h, row, member, lanes, count;
  __device__ __forceinline__ Line(const Params& p, i64 line_) : line(line_) {
    const int t = line % p.at.T, b = line / p.at.T / p.Hq;
    h = line / p.at.T % p.Hq;
    int tile = t, begin = t;
    if (BQ) {
      constexpr int block = BQ ? BQ : 1;
      const int start = first_position(p.at, b), r = start - floor_div(start, block) * block;
      tile = (r + t) / block;
      begin = tile ? tile * block - r : 0;
    }
    const int job = (b * p.heads + (p.heads > 1 ? h : 0)) * p.tiles + tile, y = (t - begin) * p.pack + h % p.pack;
    member = (p.heads > 1 ? 0 : h / p.pack * p.parts) + y / ROWS;
    row = y % ROWS;
    lanes = p.lanes;
    const int start = p.split.starts[job], n = p.split.starts[job + 1] - start;
    share = share_of(p.split, p.split.starts[p.split.jobs]);
    from = (i64)start * p.split.members + (i64)n * (member / lanes);
    first = n ? from / share : 0;
    count = n ? (int)((from + n - 1) / share - first) + 1 : 0;
  }
  __device__ __forceinline__ i64 slot(int i) const { return ((2 * (first + i) + (i == 0 && first * share < from)) * lanes + member % lanes) * ROWS + row; }
  __device__ __forceinline__ float2 part(const Params& p, int i) const { return __ldg((const float2*)p.split.rows + slot(i)); }  // largest score, sum of probabilities relative to it
  __device__ __forceinline__ float4 values(const Params& p, int i, int quad) const { return __ldg((const float4*)(p.split.sums + slot(i) * COLUMNS) + quad); }
};

__device__ __forceinline__ float weight_of(float2 part, float top) { return part.x == -inf() && part.y == 0.f ? 0.f : ex2((part.x - (top == -inf() ? 0.f : top)) * LOG2E); }
__device__ __forceinline__ void add(float4& sum, float weight, float4 x) { sum.x = fmaf(weight, x.x, sum.x); sum.y = fmaf(weight, x.y, sum.y); sum.z = fmaf(weight, x.z, sum.z); sum.w = fmaf(weight, x.w, sum.w); }

__device__ __forceinline__ void store(const Params& p, const Line& x, int quad, float top, float total, float4 sum) {
  const bool empty = top == -inf() && total == 0.f;
  const float inverse = empty ? 0.f : 1.f / (total + (p.sink ? ex2((__ldg(p.sink + x.h) - top) * LOG2E) : 0.f));
  if (p.lse && quad == 0) p.lse[x.line] = empty ? -inf() : top + logf(total);
  u16* out = (u16*)p.out + x.line * p.Dv + 4 * quad;
  const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
  for (int e = 0; e < 4; e += 2)
    if (4 * quad + e < p.Dv)
      store_pair<KIND>(out + e, empty ? 0.f : values[e] * inverse, empty ? 0.f : values[e + 1] * inverse, 4 * quad + e + 1 < p.Dv, p.Dv % 2 == 0);
}

#if LINES > 1
constexpr int EACH = (QUADS + WIDTH - 1) / WIDTH;  // quads of a thread

extern "C" __global__ void __launch_bounds__(THREADS) merge(const __grid_constant__ Params p) {
  const i64 line = (i64)blockIdx.x * LINES + threadIdx.x / WIDTH;
  if (line >= p.total) return;
  const Line x(p, line);
  if (x.count == 1) return;
  float top = -inf();
#pragma unroll 4
  for (int i = 0; i < x.count; i++) top = fmaxf(top, x.part(p, i).x);
  float4 sum[EACH] = {};
  float total = 0.f;
#pragma unroll 1
  for (int i = 0; i < x.count; i++) {
    const float2 part = x.part(p, i);
    const float weight = weight_of(part, top);
    total = fmaf(weight, part.y, total);
#pragma unroll
    for (int e = 0, quad = threadIdx.x % WIDTH; e < EACH; e++, quad += WIDTH)
      if (quad < QUADS) add(sum[e], weight, x.values(p, i, quad));
  }
#pragma unroll
  for (int e = 0, quad = threadIdx.x % WIDTH; e < EACH; e++, quad += WIDTH)
    if (quad < QUADS) store(p, x, quad, top, total, sum[e]);
}
#else
constexpr int GROUPS = THREADS / QUADS;  // groups of threads take parts in turn

extern "C" __global__ void __launch_bounds__(THREADS) merge(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(raw);
  float4* shared_sums = (float4*)raw;                            // [GROUPS][QUADS]
  float* shared_total = (float*)(shared_sums + GROUPS * QUADS);  // [GROUPS]
  float* tops = shared_total + GROUPS;                           // [THREADS / 32]
  float2* parts = (float2*)(raw + (GROUPS * (QUADS * 16 + 4) + THREADS / 8 + 7) / 8 * 8);  // [count] largest score, then weight; sum
  const Line x(p, blockIdx.x);
  if (x.count == 1) return;  // uniform in the block
  const int group = threadIdx.x / QUADS, quad = threadIdx.x % QUADS;
  float top = -inf(), total = 0.f;
  float4 sum = {0.f, 0.f, 0.f, 0.f};
  for (int i = threadIdx.x; i < x.count; i += THREADS) {
    parts[i] = x.part(p, i);
    top = fmaxf(top, parts[i].x);
  }
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, lanes));
  if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < THREADS / 32; w++) top = fmaxf(top, tops[w]);
  for (int i = threadIdx.x; i < x.count; i += THREADS) parts[i].x = weight_of(parts[i], top);
  __syncthreads();
  if (group < GROUPS) {
#pragma unroll 8
    for (int i = group; i < x.count; i += GROUPS) {
      total = fmaf(parts[i].x, parts[i].y, total);
      add(sum, parts[i].x, x.values(p, i, quad));
    }
    shared_sums[group * QUADS + quad] = sum;
    if (quad == 0) shared_total[group] = total;
  }
  __syncthreads();
  if (group > 0) return;
  for (int i = 1; i < GROUPS; i++) {
    add(sum, 1.f, shared_sums[i * QUADS + quad]);
    total += shared_total[i];
  }
  store(p, x, quad, top, total, sum);
}
#endif
