// indexer_scores for e4m3, 64 heads of width 128, on Hopper's own matrix instructions. Same meaning, same arguments; its sums have an order of their own, the
// same for every call with such inputs. Persistent: one producer thread, two consumer groups of 64 keys each, four queries (256 columns) at a time, or one.
// With PAGE (a divisor or a multiple of a tile's 128 keys) keys and scales stand in pages of a cache, steps of the map and scale_b apart (pages.cuh); what lies in no page scores -inf.
// SCALES: they come through the copy engine beside their keys, which asks that they follow one another at multiples of 16 bytes.
#include "indexer_hopper.cuh"
#include "pages.cuh"

#ifndef STAGES
#define STAGES 6
#endif

#ifndef SCALES
#define SCALES 0
#endif
constexpr int BOX = PAGE && PAGE < KB ? PAGE : KB, BOXES = KB / BOX;  // keys of one copy; copies of a tile

struct Params {
  TensorMap q, k;                               // [B, T, H, 128] (boxes of QB queries), [B, S, 128] or [pages, PAGE, 128] (boxes of BOX keys)
  const float* weights; const float* k_scale; const int* starts; const int* ends; const int* q_starts;
  float* out;                                   // row (b - b0) * nt + (t - t0), `out_row` elements apart
  i64 w_b, w_h, w_t, scale_b, scale_s, out_row;
  int T, S, b0, nb, t0, nt, per, items;         // per: key tiles of one item
  int q_start, causal, enough, fill;
#if PAGE
  Pages pages;
#endif
};

// One piece of work: QB queries and a run of key tiles.
struct Item { int b, t, nt, v0, v1, begin, end, lo, hi; i64 row; };

__device__ __forceinline__ Item open_item(const Params& p, int number, int me) {
  const int it = p.items - 1 - number, groups = (p.nt + QB - 1) / QB, group = it % groups, rest = it / groups, batch = rest % p.nb, split = rest / p.nb;  // late queries first
  Item x;
  x.b = p.b0 + batch; x.t = p.t0 + group * QB; x.nt = p.nt - group * QB; x.lo = x.hi = 0;
  x.row = (i64)batch * p.nt + group * QB;
  int first = p.S, last = 0;
  for (int i = 0; i < QB; i++) {
    if (i >= x.nt) continue;
    Window w = window_of((i64)x.b * p.T + x.t + i, p.T, p.S, p.starts, p.ends, p.q_starts, p.q_start, p.causal);
    if (w.lo >= w.hi || w.hi - w.lo <= p.enough) continue;
    first = imin(first, w.lo); last = imax(last, w.hi);
    if (i == me) { x.lo = w.lo; x.hi = w.hi; }
  }
  x.begin = split * p.per; x.end = imin(x.begin + p.per, (p.S + KB - 1) / KB);
  x.v0 = first < last ? imax(x.begin, first / KB) : x.end;
  x.v1 = first < last ? imin(x.end, (last - 1) / KB + 1) : x.end;
  return x;
}

// One warp: the row of a box for each lane, looked up ahead, then a tile at a time by the lanes whose boxes it has.
__device__ __forceinline__ i64 box_row(const Params& p, int b, int tile, int lane) {
  const int s = (tile + lane / BOXES) * KB + lane % BOXES * BOX;
#if PAGE
  return s < p.S ? p.pages.row(b, s) : -1;
#else
  return s < p.S ? s : -1;
#endif
}

__device__ __forceinline__ void load_box(const Params& p, u32 keys, u32 scales, u32 bar, i64 row, int b, int bytes) {
#if PAGE
  tma_load(keys, &p.k, bar, 0, row < 0 ? 0 : (int)(row % PAGE), row < 0 ? p.pages.count : (int)(row / PAGE));  // past the last page: zeros
  if (SCALES && row >= 0) bulk_load(scales, p.k_scale + row / PAGE * p.scale_b + row % PAGE, bytes, bar);
#else
  tma_load(keys, &p.k, bar, 0, (int)row, b);
  if (SCALES) bulk_load(scales, p.k_scale + b * p.scale_b + row, bytes, bar);
#endif
}

// Of a key: its scale, and whether there is such a key.
struct Scale { float x; bool exists; };
__device__ __forceinline__ Scale scale_of(const Params& p, int b, int key) {
#if PAGE
  const i64 at = key < p.S ? p.pages.place(b, key, p.scale_b, p.scale_s) : -1;
  return {p.k_scale && at >= 0 ? __ldg(p.k_scale + at) : 1.f, at >= 0};
#else
  return {p.k_scale && key < p.S ? __ldg(p.k_scale + b * p.scale_b + key * p.scale_s) : 1.f, true};
#endif
}

__device__ __forceinline__ void store(float* out, const Item& x, int key, const float (&z)[2], const Scale (&scale)[2], bool mine, int S) {
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const int at = key + 8 * e;
    if (mine && at < S) out[at] = at >= x.lo && at < x.hi && scale[e].exists ? z[e] * scale[e].x : -inf();
  }
}

extern "C" __global__ void __launch_bounds__(384, 1) indexer_scores_hopper(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(raw);
  const u32 base = (shared_address(raw) + 1023) & ~1023u, queries = base, keys = base + QUERY_BYTES, scales = keys + STAGES * KEY_BYTES, bars = scales + STAGES * (KB * 4 + 4);
  auto full = [&](int s) { return bars + 8 * s; };
  auto free_ = [&](int s) { return bars + 8 * (STAGES + s); };
  const u32 full_q = bars + 16 * STAGES, free_q = full_q + 8;
  float* stored = (float*)(raw + (scales - shared_address(raw)));
  u32* flags = (u32*)(stored + STAGES * KB);  // which boxes of a stage exist
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0), tid = threadIdx.x % 128;  // known to be uniform: 6 to 8 %
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) { bar_init(full(s), 1); bar_init(free_(s), 8); }
    bar_init(full_q, 1); bar_init(free_q, 2);
    bar_fence();
  }
  __syncthreads();
  u32 patience = PATIENCE, n = 0, m = 0;
  if (group == 0) {
    fewer_registers<40>();
    const int lane = threadIdx.x;
    if (lane < 32)
      for (int number = blockIdx.x; number < p.items; number += gridDim.x) {
        const Item x = open_item(p, number, 0);
        if (x.v0 >= x.v1) continue;
        bar_wait(free_q, (m & 1) ^ 1, patience); m++;
        if (lane == 0) {
          bar_expect(full_q, QUERY_BYTES);
          tma_load(queries, &p.q, full_q, 0, 0, x.t, x.b);
        }
        i64 next = box_row(p, x.b, x.v0, lane);
        for (int first = x.v0; first < x.v1; first += 32 / BOXES) {
          const i64 row = next;
          const u32 exist = __ballot_sync(~0u, row >= 0);
          next = box_row(p, x.b, first + 32 / BOXES, lane);
#pragma unroll 1
          for (int i = 0; i < 32 / BOXES && first + i < x.v1; i++, n++) {
            const int s = n % STAGES, box = lane - i * BOXES;
            const u32 mine = exist >> i * BOXES & (BOXES == 32 ? ~0u : (1u << BOXES) - 1);
            const int bytes = PAGE ? BOX * 4 : imin(KB, p.S - (first + i) * KB) * 4;  // of a box's scales
            bar_wait(free_(s), ((n / STAGES) & 1) ^ 1, patience);
            if (lane == 0) {
              flags[s] = mine;
              bar_expect(full(s), KEY_BYTES + SCALES * __popc(mine) * bytes);
            }
            __syncwarp();
            if (box >= 0 && box < BOXES) load_box(p, keys + s * KEY_BYTES + box * BOX * 128, scales + s * KB * 4 + box * BOX * 4, full(s), row, x.b, bytes);
          }
        }
      }
  } else {
    more_registers<232>();
    const int g = group - 1, lane = tid & 31, row = g * 64 + (tid / 32) * 16 + lane / 4, me = lane & 3;
    float a[SUMS], b[SUMS], w[16 * QB], r[QB][2];
    const auto scale_at = [&](int s, int b, int key) -> Scale {  // of a tile that has landed
#if SCALES
      return {stored[s * KB + key % KB], !PAGE || flags[s] >> key % KB / BOX & 1};
#else
      return scale_of(p, b, key);
#endif
    };
    const u64 dq0 = descriptor(queries);
#if QUERIES == 4
    const u64 dq1 = descriptor(queries + 128 * 128);
#endif
    for (int number = blockIdx.x; number < p.items; number += gridDim.x) {
      const Item x = open_item(p, number, me);
      float* out = p.out + (x.row + me) * p.out_row;
      const bool mine = me < imin(x.nt, QB);
      if (p.fill)
        for (int tile = x.begin; tile < x.end; tile++)
          if ((tile < x.v0 || tile >= x.v1) && mine)
            for (int e = 0; e < 2; e++) if (tile * KB + row + 8 * e < p.S) out[tile * KB + row + 8 * e] = -inf();
      if (x.v0 >= x.v1) continue;
      load_weights(w, p.weights + x.b * p.w_b + x.t * p.w_t, p.w_h, p.w_t, x.nt, me);
      bar_wait(full_q, m & 1, patience); m++;
#if QUERIES == 1  // the products are short: a tile's run while the sums of the one before are made
      Scale next[2], scale[2];
      const auto multiply = [&](float (&y)[SUMS], bool there) {  // without a tile they are nobody's
        const int s = n % STAGES;
        if (there) bar_wait(full(s), (n / STAGES) & 1, patience);
        const u64 dk = descriptor(keys + s * KEY_BYTES + g * 64 * 128);
        hold(y); wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; k++) wgmma_e4m3(y, dk + 2 * k, dq0 + 2 * k, k != 0);
        wgmma_commit();
      };
      const auto await = [&](float (&y)[SUMS], int tile) {
        const bool there = tile < x.v1;
        if (there)
          for (int e = 0; e < 2; e++) next[e] = scale_at(n % STAGES, x.b, tile * KB + row + 8 * e);
        wgmma_wait<0>(); hold(y);
        __syncwarp();
        if (there && lane == 0) bar_arrive(free_(n % STAGES));
        n += there;
      };
      const auto step = [&](float (&y)[SUMS], float (&after)[SUMS], int tile) {
        for (int e = 0; e < 2; e++) scale[e] = next[e];
        multiply(after, tile + 1 < x.v1);
        float z[2];
        sum_heads(y, w, 0, r);
        exchange(r, me, z);
        await(after, tile + 1);
        store(out, x, tile * KB + row, z, scale, mine, p.S);
      };
      multiply(a, true); await(a, x.v0);
      for (int tile = x.v0; tile < x.v1; tile += 2) {
        step(a, b, tile);
        if (tile + 1 < x.v1) step(b, a, tile + 1);
      }
#else
      for (int tile = x.v0; tile < x.v1; tile++, n++) {
        const int s = n % STAGES, key = tile * KB + row;
#if !SCALES
        const Scale scale[2] = {scale_of(p, x.b, key), scale_of(p, x.b, key + 8)};  // asked for before they are needed
#endif
        bar_wait(full(s), (n / STAGES) & 1, patience);
#if SCALES
        const Scale scale[2] = {scale_at(s, x.b, key), scale_at(s, x.b, key + 8)};
#endif
        const u64 dk = descriptor(keys + s * KEY_BYTES + g * 64 * 128);
        hold(b); hold(a); wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; k++) wgmma_e4m3(a, dk + 2 * k, dq0 + 2 * k, k != 0);
        wgmma_commit();
#pragma unroll
        for (int k = 0; k < 4; k++) wgmma_e4m3(b, dk + 2 * k, dq1 + 2 * k, k != 0);
        wgmma_commit();
        wgmma_wait<1>(); hold(a);
        sum_heads(a, w, 0, r);
        wgmma_wait<0>(); hold(b);
        __syncwarp();
        if (lane == 0) bar_arrive(free_(s));
        sum_heads(b, w, 2, r);
        float z[2];
        exchange(r, me, z);
        store(out, x, key, z, scale, mine, p.S);
      }
#endif
      if (tid == 0) bar_arrive(free_q);
    }
  }
}
