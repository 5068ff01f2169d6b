// Scores and exact top-k in one kernel, e4m3, 64 heads of width 128, top_k up to 2048: neither scores nor candidates reach device memory.
// Four queries a block of threads. Keys are visited in 8 interleaved runs stepped by 0.618 of the range, so that every prefix spreads over the window and a rank in what
// was seen is a lower bound; sorted input is harmless. Candidates stay in shared memory, thinned at two fixed times and else only when the producer sees that
// a list might overflow. Too few in the end: the item once more, thinned to top_k only. A second kernel puts each row's positions in order.
#include "indexer_hopper.cuh"
#include "select.cuh"

#ifndef STAGES
#define STAGES 3
#endif
#ifndef CAP
#define CAP 4096     // candidates of a query
#endif
#ifndef EARLY
#define EARLY 18     // tiles before the first thinning: their scores all have a place
#endif
#ifndef UNROLL
#define UNROLL 6     // tiles between two times when no product is under way (the back edge of the loop)
#endif

constexpr int NEARLY_FULL = CAP - (STAGES + 1 + UNROLL) * KB;
static_assert(EARLY * KB <= CAP && EARLY % UNROLL == 0, "the first tiles fill their places, and end at a back edge");
static_assert(UNROLL % (2 * STAGES) == 0, "which buffer, and which of its turns, are constants of the unrolled loop");

struct Params {
  TensorMap q, k;                               // [B, T, H, 128] (boxes of 4 queries), [B, S, 128] (boxes of 16 keys)
  const float* weights; const float* k_scale; const int* starts; const int* ends; const int* q_starts; int* out; int* lengths;
  i64 w_b, w_h, w_t, scale_b, scale_s;
  int T, S, items, top_k, q_start, causal;
};

struct Half { int warps[4], bin, above, inside, kept; u32 top; };
struct Shared {
  u64 lists[QB][CAP]; u32 bins[2][BINS]; u64 base[QB]; int count[QB], event[STAGES], redo;
  Half half[2];
};

__device__ __forceinline__ void sync_consumers() { named_sync(1, 256); }
__device__ __forceinline__ void sync_group(int g) { named_sync(2 + g, 128); }

// Below: the 128 threads of consumer group g.
// The largest lower bound that keeps between need and need + slack of the c > need entries (all >= lo, or 0 for none). bins is zero before and after.
__device__ __noinline__ u64 list_bound(Half& h, u32* bins, const u64* list, int c, int g, int t, int need, int slack, u64 lo, int L) {
  u32 top = 0;
  for (int i = t; i < c; i += 128) { const u32 x = (u32)(list[i] >> 32); top = x > top ? x : top; }
  top = warp_max(top);
  if (t == 0) h.top = 0;
  sync_group(g);
  if ((t & 31) == 0) atomicMax(&h.top, top);
  sync_group(g);
  int bits = 64 - leading_zeros(((u64)h.top << 32 | 0xffffffff) - lo);
  for (;;) {
    if (bits <= 32 && !(u32)lo) bits = imin(bits, L);  // positions have L bits
    const int shift = imax(bits - 11, 0);
    const u32 used = 1u << imin(bits, 11);
#pragma unroll 4
    for (int i = t; i < c; i += 128) { const u64 d = (list[i] - lo) >> shift; if (d < used) atomicAdd(&bins[BINS - 1 - (int)d], 1u); }
    sync_group(g);
    int n[16], sum = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      uint4* at = (uint4*)bins + t * 4 + j;
      const uint4 v = *at;
      *at = make_uint4(0, 0, 0, 0);
      n[4 * j] = v.x; n[4 * j + 1] = v.y; n[4 * j + 2] = v.z; n[4 * j + 3] = v.w;
      sum += v.x + v.y + v.z + v.w;
    }
    int before = sum;
    const int lane = t & 31;
#pragma unroll
    for (int o = 1; o < 32; o *= 2) { const int y = __shfl_up_sync(~0u, before, o); if (lane >= o) before += y; }
    if (lane == 31) h.warps[t / 32] = before;
    sync_group(g);
    before -= sum;
    for (int w = 0; w < t / 32; w++) before += h.warps[w];
    if (before < need && need <= before + sum) {
#pragma unroll
      for (int j = 0; j < 16; j++) { if (before < need && need <= before + n[j]) { h.bin = BINS - 1 - (t * 16 + j); h.above = before; h.inside = n[j]; } before += n[j]; }
    }
    sync_group(g);
    lo += (u64)h.bin << shift; need -= h.above; bits = shift;
    const int inside = h.inside;
    sync_group(g);
    if (inside - need <= slack || !shift) return lo;  // !shift: empty places, all of them 0
  }
}

// Keeps about `rank` of the candidates of query q and raises its bound.
__device__ __noinline__ void thin(Shared& s, int q, int g, int t, int rank, int L) {
  const int c = s.count[q];
  u64* list = s.lists[q];
  if (c > rank) {
    const u64 base = list_bound(s.half[g], s.bins[g], list, c, g, t, rank, rank / 16, s.base[q], L);
    u64 e[(CAP + 127) / 128];
#pragma unroll
    for (int j = 0; j < (CAP + 127) / 128; j++) e[j] = j * 128 + t < c ? list[j * 128 + t] : 0;
    sync_group(g);
    if (t == 0) { s.count[q] = 0; s.base[q] = base; }
    sync_group(g);
#pragma unroll
    for (int j = 0; j < (CAP + 127) / 128; j++) if (e[j] >= base && e[j]) list[atomicAdd(&s.count[q], 1)] = e[j];
  }
  sync_group(g);
}

// The top_k best of query q, in any order.
__device__ __noinline__ void emit(Shared& s, int q, int g, int t, int k, u32 mask, int L, int* out, int* length) {
  const int c = s.count[q];
  const u64* list = s.lists[q];
  const u64 base = c > k ? list_bound(s.half[g], s.bins[g], list, c, g, t, k, 0, s.base[q], L) : 0;
  if (t == 0) s.half[g].kept = 0;
  sync_group(g);
  for (int i = t; i < c; i += 128) { const u64 v = list[i]; if (v >= base && v) out[atomicAdd(&s.half[g].kept, 1)] = mask - (u32)v; }
  sync_group(g);
  const int kept = s.half[g].kept;
  for (int i = kept + t; i < k; i += 128) out[i] = -1;
  if (t == 0) *length = kept;
  sync_group(g);
}

// A row that sees no more than top_k keys: all of them.
__device__ __forceinline__ void emit_all(Window w, int t, int k, int* out, int* length) {
  const int n = imax(w.hi - w.lo, 0);
  for (int i = t; i < k; i += 128) out[i] = i < n ? w.lo + i : -1;
  if (t == 0) *length = n;
}

// about 0.618 of the tiles, no common divisor
__device__ __forceinline__ int stride_of(int tiles) {
  for (int a = imax((int)(tiles * 0.6180339f), 1);; a++) { int x = a, y = tiles; while (y) { const int z = x % y; x = y; y = z; } if (x == 1) return a; }
}

__device__ __forceinline__ int afresh(int x) { asm volatile("" : "+r"(x)); return x; }  // what depends on it is computed where it stands: kept over the loop it would spill

struct Rows { int b, t, n; i64 first; };        // queries t .. t + n - 1 (four at most are in work) of one batch entry
struct Item { int lo, tiles, step; u32 mask; Window mine; };

__device__ __forceinline__ Window query_window(const Params& p, i64 row) { return window_of(row, p.T, p.S, p.starts, p.ends, p.q_starts, p.q_start, p.causal); }

__device__ __forceinline__ Rows rows_of(const Params& p, int number) {
  const int it = p.items - 1 - number, groups = (p.T + QB - 1) / QB, b = it / groups, t = it % groups * QB;  // late queries first
  return {b, t, p.T - t, (i64)b * p.T + t};
}

__device__ __forceinline__ Item open_item(const Params& p, const Rows& r, int me) {
  Item x;
  x.mine = {0, 0};
  int lo = p.S, hi = 0;
  for (int i = 0; i < QB; i++) {
    if (i >= r.n) continue;
    const Window w = query_window(p, r.first + i);
    if (w.lo >= w.hi || w.hi - w.lo <= p.top_k) continue;  // all its keys, no scores
    lo = imin(lo, w.lo); hi = imax(hi, w.hi);
    if (i == me) x.mine = w;
  }
  x.lo = lo;
  x.tiles = (int)(((i64)imax(hi - lo, 0) + UNROLL * KB - 1) / (UNROLL * KB) * UNROLL);
  x.step = x.tiles ? stride_of(x.tiles) : 1;
  x.mask = ~0u >> __clz(imax(hi - 1, 1));
  return x;
}

extern "C" __global__ void __launch_bounds__(384, 1) indexer_topk_hopper(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(raw);
  const u32 base0 = (shared_address(raw) + 1023) & ~1023u, queries = base0, keys = queries + QUERY_BYTES, bars = keys + STAGES * KEY_BYTES;
  Shared& s = *(Shared*)(raw + (bars + 16 * STAGES + 32 - shared_address(raw)));
#define FULL(i) (bars + 8 * (i))
#define FREE(i) (bars + 8 * (STAGES + (i)))
  const u32 full_q = bars + 16 * STAGES, free_q = full_q + 8, verdict = full_q + 16;
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0), tid = threadIdx.x % 128;  // known to be uniform: 6 to 8 %
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) { bar_init(FULL(i), 1); bar_init(FREE(i), 2); s.event[i] = 0; }
    bar_init(full_q, 1); bar_init(free_q, 1); bar_init(verdict, 1);
    for (int q = 0; q < QB; q++) s.count[q] = 0;
    bar_fence();
  }
  for (int i = threadIdx.x; i < 2 * BINS; i += 384) (&s.bins[0][0])[i] = 0;
  __syncthreads();
  u32 patience = PATIENCE, m = 0;
  if (group == 0) {
    fewer_registers<24>();
    if (threadIdx.x == 0) {
      u32 n = 0, v = 0;
      for (int number = blockIdx.x; number < p.items; number += gridDim.x) {
        const Rows rows = rows_of(p, number);
        const Item x = open_item(p, rows, 0);
        if (!x.tiles) continue;
        bar_wait(free_q, (m & 1) ^ 1, patience); m++;
        bar_expect(full_q, QUERY_BYTES);
        tma_load(queries, &p.q, full_q, 0, 0, rows.t, rows.b);
        do {
          for (int t = 0, at = 0; t < x.tiles; t++, n++) {
            const int i = n % STAGES;
            bar_wait(FREE(i), ((n / STAGES) & 1) ^ 1, patience);
            volatile int* c = s.count;
            *(volatile int*)&s.event[i] = imax(imax(c[0], c[1]), imax(c[2], c[3])) > NEARLY_FULL;
            bar_expect(FULL(i), KEY_BYTES);
            for (int j = 0; j < 8; j++) tma_load(keys + i * KEY_BYTES + j * 2048, &p.k, FULL(i), 0, x.lo + (j * x.tiles + at) * 16, rows.b);
            at += x.step; if (at >= x.tiles) at -= x.tiles;
          }
          bar_wait(verdict, v & 1, patience); v++;
        } while (*(volatile int*)&s.redo && patience);
      }
    }
  } else {
    more_registers<240>();
    const int g = group - 1, lane = tid & 31, me = lane & 3, t256 = threadIdx.x - 128, chunk = t256 / 32, row = chunk * 16 + lane / 4, k = p.top_k;
    float a[64], b[64], w[64], r[4][2];
    bool safe = false;
    for (int number = blockIdx.x; number < p.items;) {
      const Rows rows = rows_of(p, number);
      Item x = open_item(p, rows, me);
      x.lo = uniform(x.lo); x.tiles = uniform(x.tiles); x.step = uniform(x.step);
      if (!safe)  // rows that need no scores
        for (int q = 2 * g; q < 2 * g + 2; q++)
          if (q < rows.n) { const Window all = query_window(p, rows.first + q); if (all.hi - (i64)all.lo <= k) emit_all(all, tid, k, p.out + (rows.first + q) * k, p.lengths + rows.first + q); }
      if (!x.tiles) { number += gridDim.x; continue; }
      const int qs = x.mine.lo, qn = imax(x.mine.hi - x.mine.lo, 0), late = x.tiles / 4 / UNROLL * UNROLL;
      const u32 mask = x.mask;
      load_weights(w, p.weights + rows.b * p.w_b + rows.t * p.w_t, p.w_h, p.w_t, rows.n, me);
      const float* scales = p.k_scale ? p.k_scale + rows.b * p.scale_b : nullptr;
      float lim = value_of(LOWEST);
      float2 ks = make_float2(0, 0);
      int key = 0, slot = 0, cut = 0x7fffffff;
      bool pending = false;
      if (t256 < QB) s.base[t256] = 0;
      sync_consumers();
      bar_wait(full_q, m & 1, patience);
      const u64 dq0 = descriptor(uniform(queries)), dq1 = dq0 + (128 * 128 >> 4), dk0 = descriptor(uniform(keys + g * 64 * 128));  // uniform registers
      auto finish = [&]() {
        float z[2];
        exchange(r, me, z);
        z[0] *= ks.x; z[1] *= ks.y;
        u64* list = s.lists[me];
        const bool i0 = (u32)(key - qs) < (u32)qn, i1 = (u32)(key + 8 - qs) < (u32)qn;
        if (slot < EARLY * KB) {  // the sample: every score has its place
          list[slot + row] = i0 && z[0] >= lim ? (u64)key_of(z[0]) << 32 | (mask - key) : 0;
          list[slot + row + 8] = i1 && z[1] >= lim ? (u64)key_of(z[1]) << 32 | (mask - key - 8) : 0;
        } else {
          const bool h0 = z[0] >= lim && i0 && (z[0] > lim || key <= cut), h1 = z[1] >= lim && i1 && (z[1] > lim || key + 8 <= cut);
          if (h0 | h1) {
            int at = atomicAdd(&s.count[me], h0 + h1);
            if (h0) list[at++] = (u64)key_of(z[0]) << 32 | (mask - key);
            if (h1) list[at] = (u64)key_of(z[1]) << 32 | (mask - key - 8);
          }
        }
      };
      for (int t = 0, at = 0; t < x.tiles; t += UNROLL) {
        bar_wait(FULL(0), 0, patience);
        const bool plan = t == EARLY || (t == late && t > 2 * EARLY);
        if (plan || *(volatile int*)&s.event[0]) {
          if (pending) finish();
          pending = false;
          if (t == EARLY && t256 < QB) s.count[t256] = EARLY * KB;
          sync_consumers();
          const bool go = plan || imax(imax(s.count[0], s.count[1]), imax(s.count[2], s.count[3])) > NEARLY_FULL;
          sync_consumers();
          if (go) {
            const float f = (float)k * t / x.tiles;
            const int rank = safe ? k : imin((int)(f + 4.5f * sqrtf(f) + 3.f), k);
            for (int q = 2 * g; q < 2 * g + 2; q++) thin(s, q, g, tid, rank, __popc(mask));
            sync_consumers();
            u32 kb = (u32)(s.base[me] >> 32);
            cut = (int)(mask - (u32)s.base[me]);
            if (kb < LOWEST) { kb = LOWEST; cut = 0x7fffffff; }
            if (kb == 0x7fffffff) { kb++; cut = 0x7fffffff; }  // -0.0 does not occur
            lim = value_of(kb);
          }
        }
        auto issue = [&](float (&d)[64], u64 dq, int stage) {
          const u64 dk = dk0 + stage * (KEY_BYTES >> 4);
          hold(d); wgmma_fence();
#pragma unroll
          for (int c = 0; c < 4; c++) wgmma_e4m3(d, dk + 2 * c, dq + 2 * c, c != 0);
          wgmma_commit();
        };
        issue(a, dq0, 0); issue(b, dq1, 0);
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
          const int where = x.lo + (chunk * x.tiles + at) * 16 + lane / 4;
          at += x.step; if (at >= x.tiles) at -= x.tiles;
          float2 next = make_float2(1.f, 1.f);
          if (scales) { next.x = __ldg(scales + imin(where, p.S - 1)); next.y = __ldg(scales + imin(where + 8, p.S - 1)); }
          if (u || pending) finish();  // the tile before, while this one's products run
          ks = next; key = where; slot = (t + u) * KB;
          const int next_stage = (u + 1) % STAGES;
          wgmma_wait<1>(); hold(a);
          sum_heads(a, w, 0, r);
          if (u + 1 < UNROLL) { bar_wait(FULL(next_stage), (u + 1) / STAGES & 1, patience); issue(a, dq0, next_stage); wgmma_wait<1>(); } else wgmma_wait<0>();
          hold(b);
          if (tid == 0) bar_arrive(FREE(u % STAGES));
          sum_heads(b, w, 2, r);
          if (u + 1 < UNROLL) issue(b, dq1, next_stage);
        }
        pending = true;
      }
      if (pending) finish();
      if (x.tiles <= EARLY && t256 < QB) s.count[t256] = x.tiles * KB;
      sync_consumers();
      bool few = false;
      for (int q = 0; q < QB; q++) few |= s.count[q] < k && s.base[q];
      const bool redo = few && !safe;
      sync_consumers();
      if (t256 == 0) { s.redo = redo; bar_arrive(verdict); if (!redo) bar_arrive(free_q); }
      safe = redo;
      if (!redo) {
        const Rows again = rows_of(p, afresh(number));
        for (int q = 2 * g; q < 2 * g + 2; q++)
          if (q < again.n) {
            const Window all = query_window(p, again.first + q);
            if (all.hi - (i64)all.lo > k) emit(s, q, g, tid, k, mask, __popc(mask), p.out + (again.first + q) * k, p.lengths + again.first + q);
          }
        number += gridDim.x; m++;
      }
      sync_consumers();
      if (t256 < QB) s.count[t256] = 0;
    }
  }
}

// The positions of each row in ascending order, through a bitmap, 131072 positions at a time.
struct Ordering { u32 bits[4096]; int positions[2048]; Meeting<256> m; };

extern "C" __global__ void __launch_bounds__(256) order_rows(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(raw);
  Ordering& s = *(Ordering*)raw;
  const int t = threadIdx.x, n = p.lengths[blockIdx.x];
  int* o = p.out + (i64)blockIdx.x * p.top_k;
  const Window w = query_window(p, blockIdx.x);
  if (n == 0 || w.hi - (i64)w.lo <= p.top_k) return;  // written in order
  for (int i = t; i < n; i += 256) s.positions[i] = o[i];
  int done = 0;
  for (int w0 = w.lo & ~31; w0 < w.hi && done < n; w0 += 131072) {
    for (int i = t; i < 1024; i += 256) ((uint4*)s.bits)[i] = make_uint4(0, 0, 0, 0);
    __syncthreads();
    for (int i = t; i < n; i += 256) { const u32 at = s.positions[i] - w0; if (at < 131072) atomicOr(&s.bits[at / 32], 1u << (at & 31)); }
    __syncthreads();
    u32 b[16];
    int sum = 0, total;
#pragma unroll
    for (int j = 0; j < 16; j++) { b[j] = s.bits[t * 16 + j]; sum += __popc(b[j]); }
    int at = block_scan<256>(s.m, sum, total);
#pragma unroll
    for (int j = 0; j < 16; j++) for (u32 m = b[j]; m; m &= m - 1) s.bits[at++] = w0 + (t * 16 + j) * 32 + __ffs(m) - 1;
    __syncthreads();
    for (int i = t; i < total; i += 256) o[done + i] = s.bits[i];
    done += total;
    __syncthreads();
  }
}
