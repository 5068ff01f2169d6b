// Backward of attention over selected keys by Hopper's own instructions, keys: dK + dV of the latent from the images that gather_backward_queries_hopper.cu left.
// `keys` makes each query's contributions to its keys, scale dS^T Q + P^T dO over its heads, and adds them as 32-bit integers: whatever the order, the same bits. A key's unit
// comes from the bound of all contributions to it (`units`), so that no sum overflows; `finish` turns integers into floats after each chunk of queries, and at the end into dK.
// An item of `keys` is one query and a third of the columns: 192. Two warpgroups take turns of 64 entries: while one multiplies, the other converts; a thread of a third brings the
// images. Rows are added by the copy engine.
// Sums lie as [3][B * S][192], within 16 columns in the order of the accumulators: lane i of four has 2 i, 2 i + 1, 2 i + 8, 2 i + 9.
#include "gather_backward_hopper.cuh"

#ifndef OUT_KIND
#define OUT_KIND KIND
#endif

struct Params {
  const void *q, *dout, *tiles;
  const float* units;      // [B,S]
  int* sums;
  Selected list;
  Positions at;
  i64 qb, qh, qt, ob, oh, ot, rows;  // bytes; rows: B * S
  int Hq, groups, items, first, count, places;  // groups: of BLOCKS blocks of 64 heads
  float scale, unused;
};

constexpr int COLUMNS = 192, CHUNK = BLOCKS * BH * 128, GROUPS = 2, ROW = COLUMNS * 4 + 64;  // ROW: in the staging area, 64 bytes more so that eight lanes meet all banks
constexpr int GRADIENT = 3 * CHUNK, RING = 6 * CHUNK, STAGING = RING + GROUPS * TILE_BYTES, BARS = STAGING + GROUPS * 32 * ROW;
#define FULL(g) (bars + 8 * (g))
#define FREE(g) (bars + 8 * (GROUPS + (g)))

struct Item {
  int part, group, heads, t, b;  // heads: of the group
  i64 place;                     // of its images
  __device__ __forceinline__ Item(const Params& p, int it) {
    const int each = p.items / 3, x = each - 1 - it % each, y = x / p.groups;  // third by third, so that the sums under way stay in L2; late queries first
    part = it / each;
    group = x - y * p.groups;
    heads = imin(p.Hq - group * BLOCKS * BH, BLOCKS * BH);
    b = y / p.count;
    t = p.first + y - b * p.count;
    place = (i64)x * p.places;
  }
};

__device__ __forceinline__ void bring(const Params& p, u32 base, u32 bars) {
  u32 turn = 0, phase = 1, patience = PATIENCE;
  for (int it = blockIdx.x; it < p.items; it += gridDim.x) {
    const Item x(p, it);
    const char* from = (const char*)p.tiles + x.place * TILE_BYTES;
    for (int n = (int)((Entries(p.list, p.at, x.b, 0, x.t).slots + 63) / 64); n; n--, from += TILE_BYTES) {
      bar_wait(FREE(turn), phase, patience);
      bar_expect(FULL(turn), TILE_BYTES);
      bulk_load(base + RING + turn * TILE_BYTES, from, TILE_BYTES, FULL(turn));
      advance<GROUPS>(turn, phase);
    }
  }
}

// `chunks` chunks of 64 columns of all heads of the group, zeros in the third where it is no column of dO
__device__ __forceinline__ void fetch_heads(u32 to, const char* from, i64 stride, int heads, int chunks, int tid) {
  for (int r = tid / 8; r < BLOCKS * BH; r += 16 * GROUPS) {
    const char* row = from + (r < heads ? r * stride : 0) + tid % 8 * 16;
#pragma unroll
    for (int c = 0; c < 3; c++) fetch(to + c * CHUNK + r * 128 + ((tid ^ r) & 7) * 16, row + (c < chunks ? c * 128 : 0), r < heads && c < chunks);
  }
}

// Eight of this warp's keys, rows lane / 4 + 8 h of the accumulators, to integers, and on their way. `to`: where the sums of lane % 8's key begin (null: no key), `unit`: of lane / 4's key.
__device__ __forceinline__ void add_rows(unsigned char* raw, const float (&dk)[96], const float (&dv)[96], int h, int* to, float unit, float scale, u32 staged, u32 shared, int lane) {
  tma_store_wait_read();  // what was staged before
  __syncwarp();
#pragma unroll
  for (int m = 0; m < COLUMNS / 16; m++) {
    int v[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int from = 8 * m + i / 2 * 4 + 2 * h + (i & 1);
      v[i] = __float2int_rn(fmaf(dk[from], unit * scale, dv[from] * unit));
    }
    *(int4*)(raw + staged + lane / 4 * ROW + m * 64 + (lane & 3) * 16) = {v[0], v[1], v[2], v[3]};
  }
  shared_to_copy_engine();
  __syncwarp();
  if (to && lane < 8) bulk_add(to, shared + staged + lane * ROW, COLUMNS * 4);
  tma_store_commit();
}

__device__ __forceinline__ void multiply(const Params& p, unsigned char* raw, u32 base, u32 bars, int group) {
  const int all = threadIdx.x, tid = all % 128, lane = tid & 31;
  const u32 tile = base + RING + group * TILE_BYTES;
  const u64 a = descriptor_of(tile, BLOCKS * PAIR, 512, SWIZZLE_64), q = descriptor_of(base, CHUNK, 1024, SWIZZLE_128), o = descriptor_of(base + GRADIENT, CHUNK, 1024, SWIZZLE_128);
  u32 phase = 0, turn = 0, patience = PATIENCE;
  float dk[96], dv[96];
  for (int it = blockIdx.x; it < p.items; it += gridDim.x) {
    const Item x(p, it);
    const Entries list(p.list, p.at, x.b, 0, x.t);
    const int *entries = list.entries, slots = (int)list.slots, limit = list.limit, tiles = (slots + 63) / 64;
    if (tiles == 0) continue;
    named_sync(1, 256);  // nobody reads the last item's heads any more
    fetch_heads(base, (const char*)p.q + x.b * p.qb + x.group * BLOCKS * BH * p.qh + x.t * p.qt + x.part * 384, p.qh, x.heads, 3, all);
    fetch_heads(base + GRADIENT, (const char*)p.dout + x.b * p.ob + x.group * BLOCKS * BH * p.oh + x.t * p.ot + x.part * 384, p.oh, x.heads, x.part == 2 ? 2 : 3, all);
    cp_commit();
    cp_wait<0>();
    shared_to_copy_engine();
    named_sync(1, 256);
    int* sums = p.sums + (x.part * p.rows + (i64)x.b * p.at.S) * COLUMNS;
    const float* units = p.units + (i64)x.b * p.at.S;
    for (int n = (turn ^ group) & 1; n < tiles; n += 2) {
      const int e = n * 64 + tid / 32 * 16 + lane, entry = lane < 16 && e < slots ? __ldg(entries + e) : -1;
      const int key = (u32)entry < (u32)limit ? entry : -1;
      const float unit = key < 0 ? 0.f : __ldg(units + key);
      bar_wait(FULL(group), phase, patience);
      hold(dk); hold(dv); wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4 * BLOCKS; k++) {
        const u64 image = a + (k >> 2) * (PAIR >> 4) + (k & 3) * 64;
        wgmma<KIND, N_MAJOR, M_MAJOR>(dk, image + (IMAGE >> 4), q + k * 128, k != 0);
        wgmma<KIND, N_MAJOR, M_MAJOR>(dv, image, o + k * 128, k != 0);
      }
      wgmma_commit(); wgmma_wait<0>(); hold(dk); hold(dv);
      if (tid == 0) bar_arrive(FREE(group));
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int eighth = __shfl_sync(~0u, key, lane % 8 + 8 * h);
        add_rows(raw, dk, dv, h, eighth < 0 ? nullptr : sums + (i64)eighth * COLUMNS, __shfl_sync(~0u, unit, lane / 4 + 8 * h), p.scale, STAGING + all / 32 * 8 * ROW, base, lane);
      }
      phase ^= 1;
    }
    turn += tiles;
  }
  tma_store_wait();
}

extern "C" __global__ void __launch_bounds__(384, 1) keys(const __grid_constant__ Params p) {
  SWIZZLED_SHARED(raw);
  const u32 base = shared_address(raw), bars = base + BARS;
  const int group = uniform(threadIdx.x / 128);
  if (threadIdx.x == 0) {
    for (int g = 0; g < GROUPS; g++) { bar_init(FULL(g), 1); bar_init(FREE(g), 1); }
    bar_fence();
  }
  __syncthreads();
  if (group < GROUPS) {
    more_registers<240>();
    multiply(p, raw, base, bars, group);
  } else {
    fewer_registers<24>();
    if (threadIdx.x == GROUPS * 128) bring(p, base, bars);
  }
}

// ------------------------------------------------------------------------------------------------------------------ units and the end
struct UnitParams {
  u64* bounds;   // [rows][BINS], cleared for the next chunk
  float* units;
  i64 rows;
};
// A power of two for each key by which the sum of its bounds becomes at most 2^30; NaN where a bound is not finite.
extern "C" __global__ void __launch_bounds__(256) units(const __grid_constant__ UnitParams p) {
  const i64 row = (i64)blockIdx.x * 256 + threadIdx.x;
  if (row >= p.rows) return;
  u64* bins = p.bounds + row * BINS;
  double sum = 0, worth = 0x1p-135;
  for (int i = 0; i < 8; i++, worth *= 0x1p32) {
    sum += (double)bins[i] * worth;
    bins[i] = 0;
  }
  const bool finite = bins[8] == 0;
  bins[8] = 0;
  float unit = 0x1p126f;
  for (double most = 0x1p-96; most < sum && unit > 0x1p-126f; most *= 2) unit *= 0.5f;
  p.units[row] = finite ? unit : __int_as_float(0x7fc00000);
}

struct FinishParams {
  int* sums;           // cleared for the next chunk
  const float* units;
  float* before;       // of the chunks before this one, as the sums; null: there is one chunk only
  void* dk;            // [B,1,S,576], null: more chunks follow
  i64 rows;
  int first, unused;
};
extern "C" __global__ void __launch_bounds__(256) finish(const __grid_constant__ FinishParams p) {
  const i64 x = (i64)blockIdx.x * 256 + threadIdx.x, line = x / 48, row = line % p.rows;
  if (line >= 3 * p.rows) return;
  const float quantum = 1.f / p.units[row];
  const int4 sum = ((const int4*)p.sums)[x];
  float4 y = make_float4((float)sum.x * quantum, (float)sum.y * quantum, (float)sum.z * quantum, (float)sum.w * quantum);
  if (!p.first) {
    const float4 z = ((const float4*)p.before)[x];
    y = make_float4(z.x + y.x, z.y + y.y, z.z + y.z, z.w + y.w);
  }
  ((int4*)p.sums)[x] = {0, 0, 0, 0};
  if (!p.dk) {
    ((float4*)p.before)[x] = y;
    return;
  }
  const int place = (int)(x % 48);
  Element<OUT_KIND>* out = (Element<OUT_KIND>*)p.dk + row * 576 + line / p.rows * COLUMNS + place / 4 * 16 + place % 4 * 2;
  store_pair<OUT_KIND>(out, y.x, y.y, true, true);
  store_pair<OUT_KIND>(out + 8, y.z, y.w, true, true);
}
