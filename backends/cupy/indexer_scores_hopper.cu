// indexer_scores for e4m3, 64 heads of width 128, on Hopper's own matrix instructions. Same meaning, same arguments; its sums have an order of their own, the
// same for every call with such inputs. Persistent: one producer thread, two consumer groups of 64 keys each, four queries (256 columns) at a time, or one.
// With PAGE (a divisor or a multiple of a tile's 128 keys) keys and scales stand in pages of a cache, steps of the map and scale_b apart (pages.cuh); what lies in no page scores -inf.
#include "indexer_hopper.cuh"
#include "pages.cuh"

#ifndef STAGES
#define STAGES 6
#endif

constexpr int AHEAD = 3;
constexpr int BOX = PAGE && PAGE < KB ? PAGE : KB;  // keys of one copy

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

__device__ __forceinline__ void load_keys(const Params& p, u32 to, u32 bar, int key, int b) {
#if PAGE
#pragma unroll
  for (int i = 0; i < KB / BOX; i++) {
    const int s = key + i * BOX;
    const i64 row = s < p.S ? p.pages.row(b, s) : -1;
    tma_load(to + i * BOX * 128, &p.k, bar, 0, row < 0 ? 0 : (int)(row % PAGE), row < 0 ? p.pages.count : (int)(row / PAGE));  // past the last page: zeros
  }
#else
  tma_load(to, &p.k, bar, 0, key, b);
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
  const u32 base = (shared_address(raw) + 1023) & ~1023u, queries = base, keys = base + QUERY_BYTES, bars = keys + STAGES * KEY_BYTES;
  auto full = [&](int s) { return bars + 8 * s; };
  auto free_ = [&](int s) { return bars + 8 * (STAGES + s); };
  const u32 full_q = bars + 16 * STAGES, free_q = full_q + 8;
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0), tid = threadIdx.x % 128;  // known to be uniform: 6 to 8 %
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) { bar_init(full(s), 1); bar_init(free_(s), 2); }
    bar_init(full_q, 1); bar_init(free_q, 2);
    bar_fence();
  }
  __syncthreads();
  u32 patience = PATIENCE, n = 0, m = 0;
  if (group == 0) {
    fewer_registers<40>();
    if (threadIdx.x == 0)
      for (int number = blockIdx.x; number < p.items; number += gridDim.x) {
        const Item x = open_item(p, number, 0);
        if (x.v0 >= x.v1) continue;
        bar_wait(free_q, (m & 1) ^ 1, patience); m++;
        bar_expect(full_q, QUERY_BYTES);
        tma_load(queries, &p.q, full_q, 0, 0, x.t, x.b);
        for (int tile = x.v0; tile < x.v1; tile++, n++) {
          const int s = n % STAGES;
          bar_wait(free_(s), ((n / STAGES) & 1) ^ 1, patience);
          bar_expect(full(s), KEY_BYTES);
          load_keys(p, keys + s * KEY_BYTES, full(s), tile * KB, x.b);
        }
      }
  } else {
    more_registers<232>();
    const int g = group - 1, lane = tid & 31, row = g * 64 + (tid / 32) * 16 + lane / 4, me = lane & 3;
    float a[SUMS], b[SUMS], w[16 * QB], r[QB][2];
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
#if QUERIES == 1  // the products are short: a tile's run while the sums of the one before are made, and scales are asked for AHEAD tiles early
      Scale next[AHEAD][2];
#pragma unroll
      for (int i = 0; i < AHEAD; i++)
#pragma unroll
        for (int e = 0; e < 2; e++) next[i][e] = scale_of(p, x.b, (x.v0 + i) * KB + row + 8 * e);
      const auto multiply = [&](float (&y)[SUMS], bool there) {  // without a tile they are nobody's
        const int s = n % STAGES;
        if (there) bar_wait(full(s), (n / STAGES) & 1, patience);
        const u64 dk = descriptor(keys + s * KEY_BYTES + g * 64 * 128);
        hold(y); wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; k++) wgmma_e4m3(y, dk + 2 * k, dq0 + 2 * k, k != 0);
        wgmma_commit();
      };
      const auto await = [&](float (&y)[SUMS], bool there) {
        wgmma_wait<0>(); hold(y);
        if (there && tid == 0) bar_arrive(free_(n % STAGES));
        n += there;
      };
      const auto step = [&](float (&y)[SUMS], float (&after)[SUMS], int tile) {
        const int key = tile * KB + row;
        const Scale scale[2] = {next[0][0], next[0][1]};
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
#pragma unroll
          for (int e = 0; e < 2; e++) next[i][e] = i + 1 < AHEAD ? next[i + 1][e] : scale_of(p, x.b, key + AHEAD * KB + 8 * e);
        multiply(after, tile + 1 < x.v1);
        float z[2];
        sum_heads(y, w, 0, r);
        exchange(r, me, z);
        await(after, tile + 1 < x.v1);
        store(out, x, key, z, scale, mine, p.S);
      };
      multiply(a, true); await(a, true);
      for (int tile = x.v0; tile < x.v1; tile += 2) {
        step(a, b, tile);
        if (tile + 1 < x.v1) step(b, a, tile + 1);
      }
#else
      for (int tile = x.v0; tile < x.v1; tile++, n++) {
        const int s = n % STAGES, key = tile * KB + row;
        const Scale scale[2] = {scale_of(p, x.b, key), scale_of(p, x.b, key + 8)};
        bar_wait(full(s), (n / STAGES) & 1, patience);
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
        if (tid == 0) bar_arrive(free_(s));
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
