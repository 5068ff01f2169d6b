// Exact deterministic top-k of float32 rows, one block of threads a row. Two kernels with one meaning:
//   topk_fast  a sample gives a lower bound, one streaming read keeps the candidates in shared memory, radix select, bitmap, ascending indices; a bound that
//              fails (adversarial rows) ends in radix passes over the row. k at most CAP - 100 and at most WORDS.
//   topk_any   any k and length: radix passes over the row for the exact bound, then one read that writes in order.
// Rows need no alignment: positions count from the 16-byte boundary at or before the row, and groups of four that a window cuts are read one by one.
#include "mma.cuh"  // for DYNAMIC_SHARED
#include "select.cuh"
#include "window.cuh"

#ifndef NT
#define NT 256      // threads
#endif
#ifndef AHEAD
#define AHEAD 4     // groups of four a thread loads ahead
#endif
#ifndef CTAS
#define CTAS 4      // blocks a multiprocessor should hold
#endif
#ifndef CAP
#define CAP 4608    // candidates
#endif
#ifndef WORDS
#define WORDS 4096  // words of the bitmap: 131072 positions at a time
#endif

__device__ __forceinline__ float4 load4(const float4* p) {  // read once: keep it out of L1
#ifdef SPARSETILE_EMULATE
  return *p;
#else
  float4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p));
  return v;
#endif
}

constexpr int L = 31;  // bits of a position: fixed, because a variable shift costs more than the longer integers
constexpr u64 mask = (1ull << L) - 1;

// scores row i at scores + (i / period) * stride_b + (i % period) * stride_t; its query is row first_row + i of [B * T].
// S counts keys, pool of them share one score: positions below are pooled ones. chosen (or null): the scores of the indices, -inf where the index is -1.
struct Params {
  const float* scores; const int* starts; const int* ends; const int* q_starts; int* out; int* lengths; float* chosen;
  i64 stride_b, stride_t, first_row;
  int period, T, S, pool, q_start, causal, k, force_first, force_last, take_all;
};

// One row: kept in shared memory, because registers are short while it streams.
struct Row {
  const float* x; int* out; float* chosen; int* length; Choice c;
  int skew, start, end;  // positions of the selection count from the 16-byte boundary at or before the row
};
struct Fast { u32 bits[WORDS]; Meeting<NT> m; Row row; u64 list[CAP]; };
struct Any { u32 bins[BINS]; Meeting<NT> m; Row row; };
static_assert(WORDS >= BINS, "bitmap and bins share their memory");
static_assert(WORDS % (4 * NT) == 0, "a thread reads its words of the bitmap four at once");

__device__ __forceinline__ Choice open_row(const Params& p, Row& kept) {
  const i64 i = blockIdx.x, row = p.first_row + i;
  Window w = window_of(row, p.T, p.S, p.starts, p.ends, p.q_starts, p.q_start, p.causal);
  if (w.lo >= w.hi) w = {0, 0};
  else if (p.pool > 1) { w.lo = w.lo / p.pool; w.hi = (w.hi - 1) / p.pool + 1; }
  const Choice c = choice_of(w.lo, w.hi, p.k, p.force_first, p.force_last, p.take_all);
  if (threadIdx.x == 0) {
    const float* x = p.scores + (i / p.period) * p.stride_b + (i % p.period) * p.stride_t;
    const int skew = (int)((size_t)x / 4 & 3);
    kept = {x, p.out + row * p.k, p.chosen ? p.chosen + row * p.k : nullptr, p.lengths + row, c, skew, c.lo + skew, c.hi + skew};
  }
  __syncthreads();
  return c;
}

// The forced entries around the `done` selected ones, -1 behind them, and the scores.
__device__ __forceinline__ void finish(const Row& r, int k, int done) {
  const Choice& c = r.c;
  for (int i = threadIdx.x; i < c.nfirst; i += NT) r.out[i] = c.first + i;
  for (int i = threadIdx.x; i < c.nlast; i += NT) r.out[c.nfirst + done + i] = c.last + i;
  const int n = c.nfirst + done + c.nlast;
  for (int i = n + threadIdx.x; i < k; i += NT) r.out[i] = -1;
  if (threadIdx.x == 0) *r.length = n;
  if (r.chosen) {
    __syncthreads();
    for (int i = threadIdx.x; i < k; i += NT) r.chosen[i] = i < n ? r.x[r.out[i]] : -inf();
  }
}

// Reads a row in groups of four: whole groups ga <= g < gb, and those that the window [start, end) cuts, which hold NaN outside it.
struct Groups {
  const float4* x; const int &start, &end; int ga, gb;
  __device__ __forceinline__ Groups(const Row& r) : x((const float4*)(r.x - r.skew)), start(r.start), end(r.end), ga((r.start + 3) / 4), gb(r.end / 4) {}
  // the cut group that this thread reads, or -1
  __device__ __forceinline__ int mine() const {
    if (threadIdx.x == 0 && (start & 3)) return start / 4;
    if (threadIdx.x == 32 && (end & 3) && (gb >= ga || !(start & 3))) return gb;
    return -1;
  }
  __device__ __forceinline__ float4 cut(int g) const {
    float e[4];
#pragma unroll
    for (int j = 0; j < 4; j++) e[j] = 4 * g + j >= start && 4 * g + j < end ? ((const float*)x)[4 * (i64)g + j] : nan_();
    return make_float4(e[0], e[1], e[2], e[3]);
  }
  __device__ __forceinline__ float4 whole(int g) const {
    const float none = nan_();
    return g < gb ? load4(x + g) : make_float4(none, none, none, none);
  }
};

// What `bound` searches: the integers of a list (0 is none), or of a row's eligible scores.
struct List {
  const u64* x; int n;
  template <class F> __device__ __forceinline__ void operator()(F f) const { for (int i = threadIdx.x; i < n; i += NT) { const u64 v = x[i]; if (v) f(v); } }
};
template <int DEPTH> struct Scores {
  const Groups& row;
  template <class F> __device__ __forceinline__ void four(float4 v, int g, F f) const {
    const float e[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 4; j++) if (eligible(e[j])) f((u64)key_of(e[j]) << L | (mask - (4 * g + j)));
  }
  template <class F> __device__ __forceinline__ void operator()(F f) const {
    const int c = row.mine();
    if (c >= 0) four(row.cut(c), c, f);
    for (int g = row.ga + threadIdx.x; g < row.gb; g += NT * DEPTH) {
      float4 b[DEPTH];
#pragma unroll
      for (int u = 0; u < DEPTH; u++) b[u] = row.whole(g + u * NT);
#pragma unroll
      for (int u = 0; u < DEPTH; u++) four(b[u], g + u * NT, f);
    }
  }
};

extern "C" __global__ void __launch_bounds__(NT, CTAS) topk_fast(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(raw);
  Fast& s = *(Fast*)raw;
  const int t = threadIdx.x;
  const Choice choice = open_row(p, s.row);
  if (choice.k <= 0 || choice.lo >= choice.hi) { finish(s.row, p.k, 0); return; }
  const int &need = s.row.c.k, &start = s.row.start, &end = s.row.end;  // read again where they are used: registers are short in the loop
  const int n = choice.hi - choice.lo;
  const Groups row(s.row);
  for (int i = t; i < WORDS / 4; i += NT) ((uint4*)s.bits)[i] = make_uint4(0, 0, 0, 0);
  if (t == 0) { s.m.count = 0; s.m.top = 0; }
  u64 base = 0;
  if (n > CAP) {  // sample: groups spread over the window; 4.5 standard deviations below the rank it should have
    const int SAMPLE = n > 65536 && CAP >= 4096 ? 4096 : 2048, groups = row.gb - row.ga;
    for (int i = t; i < SAMPLE / 4; i += NT) {
      const int g = row.ga + (int)((i64)i * (groups - 1) / (SAMPLE / 4 - 1));
      const float4 v = row.whole(g);
      const float e[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int j = 0; j < 4; j++) s.list[j * (SAMPLE / 4) + i] = eligible(e[j]) ? (u64)key_of(e[j]) << L | (mask - (4 * g + j)) : 0;
    }
    __syncthreads();
    const float mean = (float)need * SAMPLE / n;
    const int rank = (int)(mean + 4.5f * sqrtf(mean) + 3.f);
    base = bound<NT>(s.m, s.bits, List{s.list, SAMPLE}, rank, rank / 8, 0, 32 + L);
  }
  __syncthreads();
  for (;;) {
    // every entry at or above the bound; among equal scores whole groups of four up to the bound's position
    u32 kb = (u32)(base >> L);
    int cut = (int)(mask - (base & mask));
    if (kb < LOWEST) { kb = LOWEST; cut = 0x7fffffff; }
    const float upto = value_of(kb), behind = value_of(kb + 1);
    auto take = [&](float4 v, int g) {  // nearly every warp finds some in every 128: as they are, keys come later
      const float lim = 4 * g <= cut ? upto : behind;
      const bool h0 = v.x >= lim, h1 = v.y >= lim, h2 = v.z >= lim, h3 = v.w >= lim;
      if (h0 | h1 | h2 | h3) {
        const int c = h0 + h1 + h2 + h3, at = atomicAdd(&s.m.count, c);
        if (at + c <= CAP) {
          uint2* to = (uint2*)s.list + at;
          if (h0) *to++ = {(u32)(4 * g), (u32)__float_as_int(v.x)};
          if (h1) *to++ = {(u32)(4 * g + 1), (u32)__float_as_int(v.y)};
          if (h2) *to++ = {(u32)(4 * g + 2), (u32)__float_as_int(v.z)};
          if (h3) *to = {(u32)(4 * g + 3), (u32)__float_as_int(v.w)};
        }
      }
    };
    { const int g = row.mine(); if (g >= 0) take(row.cut(g), g); }
    float4 a[AHEAD];
    int g = row.ga + t;
#pragma unroll
    for (int u = 0; u < AHEAD; u++) a[u] = row.whole(g + u * NT);
#pragma unroll (AHEAD < 4 ? 2 : 1)
    for (; g < row.gb - (2 * AHEAD - 1) * NT; g += NT * AHEAD) {
      float4 b[AHEAD];
#pragma unroll
      for (int u = 0; u < AHEAD; u++) b[u] = load4(row.x + g + (AHEAD + u) * NT);
#pragma unroll
      for (int u = 0; u < AHEAD; u++) take(a[u], g + u * NT);
#pragma unroll
      for (int u = 0; u < AHEAD; u++) a[u] = b[u];
      if (*(volatile int*)&s.m.count > CAP) break;
    }
#pragma unroll 1
    for (; g < row.gb && *(volatile int*)&s.m.count <= CAP; g += NT * AHEAD) {
      float4 b[AHEAD];
#pragma unroll
      for (int u = 0; u < AHEAD; u++) b[u] = row.whole(g + (AHEAD + u) * NT);
#pragma unroll
      for (int u = 0; u < AHEAD; u++) take(a[u], g + u * NT);
#pragma unroll
      for (int u = 0; u < AHEAD; u++) a[u] = b[u];
    }
    __syncthreads();
    const int got = s.m.count;
    if (got <= CAP && (got >= need || base == 0)) break;
    // radix passes over the row until what is left fits
    __syncthreads();
    if (t == 0) s.m.count = 0;
    base = bound<NT>(s.m, s.bits, Scores<AHEAD>{row}, need, CAP - 4 - need, 0, 32 + L);  // 4: groups of equal scores are kept whole
    __syncthreads();
  }
  const int c = s.m.count;
  u32 top = 0;
  for (int i = t; i < c; i += NT) {
    const uint2 raw = ((uint2*)s.list)[i];
    const u32 key = key_of(__int_as_float((int)raw.y));
    top = key > top ? key : top;
    s.list[i] = (u64)key << L | (mask - raw.x);
  }
  top = warp_max(top);
  if ((t & 31) == 0) atomicMax(&s.m.top, top);
  __syncthreads();
  const u64 low = base - (base < 3 ? base : 3);  // whole groups of four may lie up to 3 positions below the bound
  base = c <= need ? 0 : bound<NT>(s.m, s.bits, List{s.list, c}, need, 0, low, 64 - leading_zeros(((u64)s.m.top << L | mask) - low));
  // ascending indices through a bitmap, 32 * WORDS positions at a time
  int done = 0;
  int* o = s.row.out + s.row.c.nfirst;
  for (int w0 = start & ~31; w0 < end; w0 += 32 * WORDS) {
    __syncthreads();
    if (w0 != (start & ~31)) { for (int i = t; i < WORDS; i += NT) s.bits[i] = 0; __syncthreads(); }
    for (int i = t; i < c; i += NT) {
      const u64 v = s.list[i];
      const u32 p = (u32)(mask - (v & mask)) - w0;
      if (v >= base && p < 32 * WORDS) atomicOr(&s.bits[p / 32], 1u << (p & 31));
    }
    __syncthreads();
    constexpr int PER = WORDS / NT;
    u32 b[PER];
    int sum = 0, total;
#pragma unroll
    for (int j = 0; j < PER / 4; j++) { const uint4 v = ((uint4*)s.bits)[t * (PER / 4) + j]; b[4 * j] = v.x; b[4 * j + 1] = v.y; b[4 * j + 2] = v.z; b[4 * j + 3] = v.w; }
#pragma unroll
    for (int j = 0; j < PER; j++) sum += __popc(b[j]);
    int at = block_scan<NT>(s.m, sum, total);
#pragma unroll
    for (int j = 0; j < PER; j++) for (u32 m = b[j]; m; m &= m - 1) s.bits[at++] = w0 + (t * PER + j) * 32 + __ffs(m) - 1 - s.row.skew;
    __syncthreads();
    for (int i = t; i < total; i += NT) o[done + i] = s.bits[i];  // staged: scattered 4-byte stores cost more than the selection
    done += total;
  }
  finish(s.row, p.k, done);
}

extern "C" __global__ void __launch_bounds__(NT) topk_any(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(raw);
  Any& s = *(Any*)raw;
  const int t = threadIdx.x;
  const Choice choice = open_row(p, s.row);
  if (choice.k <= 0 || choice.lo >= choice.hi) { finish(s.row, p.k, 0); return; }
  const int need = choice.k, start = s.row.start, end = s.row.end;
  const Groups row(s.row);
  for (int i = t; i < BINS; i += NT) s.bins[i] = 0;
  __syncthreads();
  u64 base = bound<NT>(s.m, s.bins, Scores<4>{row}, need, 0, 0, 32 + L);
  if (base == 0) base = 1;  // fewer than asked for: every eligible one (their integers are above 0)
  int done = 0;
  int* o = s.row.out + choice.nfirst;
  for (int g0 = start / 4; 4 * g0 < end; g0 += NT) {
    const int g = g0 + t;
    float4 v = make_float4(-inf(), -inf(), -inf(), -inf());
    if (4 * g < end) v = g >= row.ga && g < row.gb ? row.whole(g) : row.cut(g);
    const float e[4] = {v.x, v.y, v.z, v.w};
    u32 hits = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) if (eligible(e[j]) && ((u64)key_of(e[j]) << L | (mask - (4 * g + j))) >= base) hits |= 1u << j;
    int total, at = done + block_scan<NT>(s.m, __popc(hits), total);
    for (; hits; hits &= hits - 1) o[at++] = 4 * g + __ffs(hits) - 1 - s.row.skew;
    done += total;
    __syncthreads();
  }
  finish(s.row, p.k, done);
}
