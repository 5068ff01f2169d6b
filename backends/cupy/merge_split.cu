// The parts that shares of a split left in scratch (split.cuh), added in the order of their keys: a block of threads for each row of the output. Rows whose item was one
// share's alone are there already; rows of items without keys become out 0, lse -inf. One sequence may have a part in every share: weights are a thread's each.
// Defines: KIND, BQ (queries of a job, 0: each is its own), ROWS, COLUMNS of a slot.
#include "mma.cuh"
#include "split.cuh"

struct Params {
  void* out;
  float* lse;
  const float* sink;
  Split split;
  Positions at;
  int Hq, Dv, pack, heads, tiles, parts, lanes, unused;  // lanes: slots that stand side by side, one for each tile of rows of the same keys
};

constexpr int THREADS = 256, QUADS = COLUMNS / 4, GROUPS = THREADS / QUADS;  // threads of a group hold four columns each, groups take parts in turn
static_assert(COLUMNS % 4 == 0 && GROUPS > 0, "columns");

extern "C" __global__ void __launch_bounds__(THREADS) merge(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(raw);
  float4* shared_sums = (float4*)raw;                               // [GROUPS][QUADS]
  float* shared_total = (float*)(shared_sums + GROUPS * QUADS);     // [GROUPS]
  float* tops = shared_total + GROUPS;                              // [THREADS / 32]
  float2* parts = (float2*)(raw + (GROUPS * (QUADS * 16 + 4) + THREADS / 8 + 7) / 8 * 8);  // [parts] largest score, then weight; sum
  const i64 line = blockIdx.x;
  const int t = line % p.at.T, h = line / p.at.T % p.Hq, b = line / p.at.T / p.Hq;
  int tile = t, first = t;
  if (BQ) {
    constexpr int block = BQ ? BQ : 1;
    const int start = first_position(p.at, b), row = start - floor_div(start, block) * block;
    tile = (row + t) / block;
    first = tile ? tile * block - row : 0;
  }
  const int job = (b * p.heads + (p.heads > 1 ? h : 0)) * p.tiles + tile, y = (t - first) * p.pack + h % p.pack, member = (p.heads > 1 ? 0 : h / p.pack * p.parts) + y / ROWS;
  const int start = p.split.starts[job], n = p.split.starts[job + 1] - start;
  const i64 share = share_of(p.split, p.split.starts[p.split.jobs]), from = (i64)start * p.split.members + (i64)n * (member / p.lanes);
  const i64 c = n ? from / share : 0, last = n ? (from + n - 1) / share : 0;
  if (n && c == last) return;  // uniform in the block

  const int group = threadIdx.x / QUADS, quad = threadIdx.x % QUADS, row = y % ROWS;
  const auto slot = [&](i64 x) { return ((2 * x + (x == c && c * share < from)) * p.lanes + member % p.lanes) * ROWS + row; };
  const int count = n ? (int)(last - c) + 1 : 0;
  float top = -inf(), total = 0.f;
  float4 sum = {0.f, 0.f, 0.f, 0.f};
  for (int i = threadIdx.x; i < count; i += THREADS) {
    parts[i] = __ldg((const float2*)p.split.rows + slot(c + i));
    top = fmaxf(top, parts[i].x);
  }
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, lanes));
  if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < THREADS / 32; w++) top = fmaxf(top, tops[w]);
  for (int i = threadIdx.x; i < count; i += THREADS) {
    const float2 part = parts[i];
    parts[i].x = part.x == -inf() && part.y == 0.f ? 0.f : ex2((part.x - (top == -inf() ? 0.f : top)) * LOG2E);
  }
  __syncthreads();
  if (n && group < GROUPS) {
#pragma unroll 8
    for (int i = group; i < count; i += GROUPS) {
      const float4 values = __ldg((const float4*)(p.split.sums + slot(c + i) * COLUMNS) + quad);
      const float weight = parts[i].x;
      total = fmaf(weight, parts[i].y, total);
      sum.x = fmaf(weight, values.x, sum.x); sum.y = fmaf(weight, values.y, sum.y); sum.z = fmaf(weight, values.z, sum.z); sum.w = fmaf(weight, values.w, sum.w);
    }
    shared_sums[group * QUADS + quad] = sum;
    if (quad == 0) shared_total[group] = total;
  }
  __syncthreads();
  if (group > 0) return;
  for (int i = 1; n && i < GROUPS; i++) {
    const float4 other = shared_sums[i * QUADS + quad];
    sum.x += other.x; sum.y += other.y; sum.z += other.z; sum.w += other.w;
    total += shared_total[i];
  }
  const bool empty = top == -inf() && total == 0.f;
  const float inverse = empty ? 0.f : 1.f / (total + (p.sink ? ex2((__ldg(p.sink + h) - top) * LOG2E) : 0.f));
  if (p.lse && quad == 0) p.lse[line] = empty ? -inf() : top + logf(total);
  u16* out = (u16*)p.out + line * p.Dv + 4 * quad;
  const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
  for (int e = 0; e < 4; e += 2)
    if (4 * quad + e < p.Dv)
      store_pair<KIND>(out + e, empty ? 0.f : values[e] * inverse, empty ? 0.f : values[e + 1] * inverse, 4 * quad + e + 1 < p.Dv, p.Dv % 2 == 0);
}
