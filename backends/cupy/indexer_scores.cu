// Scores of a lightning indexer: score[t, s] = k_scale[s] * sum_h weights[h, t] * act(q[h, t] . k[s]).
// Keys stand on the rows of the products, (query, head) pairs on the columns, so that the sum over heads stays in a thread's registers and ends in three
// exchanges over four lanes. A block of threads keeps QUERIES queries (all heads) in shared memory and walks over its key tiles.
// With SHARE score[t, s] = sum_h exp(scale * q[h, t] . k[s] - weights[h, t]), what a key got of the attention that has these lse: importance_topk.
// indexer_topk runs this same kernel into its scratch: one score function, the same bits. The order of summation is fixed by the problem alone: widths in
// steps of 16 (float32: one by one), heads in steps of 8 within a lane, then lanes two apart, then neighbours. No tile size enters it.
// With PAGE keys and scales stand in pages of a cache, steps k_b and scale_b apart (pages.cuh); what lies in no page scores -inf.
#include "mma.cuh"
#include "pages.cuh"
#include "window.cuh"

#ifndef KIND
#define KIND BFLOAT16
#endif
#ifndef HEADS
#define HEADS 64
#endif
#ifndef WIDTH
#define WIDTH 128
#endif
#ifndef COPY
#define COPY 16      // bytes that a copy of q or k may take at once
#endif
#ifndef WARPS
#define WARPS 4
#endif
#ifndef ROW_TILES
#define ROW_TILES 2  // 16 keys each, a warp
#endif
#ifndef QUERIES
#define QUERIES 2
#endif
#ifndef COLUMNS
#define COLUMNS 128  // (query, head) pairs held at a time: a multiple of 16
#endif
#ifndef RELU
#define RELU 1
#endif
#ifndef SHARE
#define SHARE 0
#endif

constexpr int THREADS = 32 * WARPS, MI = ROW_TILES, BK = 16 * MI * WARPS, DP = (WIDTH + 15) / 16 * 16;
constexpr int HP = HEADS > 8 ? (HEADS + 7) / 8 * 8 : HEADS > 4 ? 8 : HEADS > 2 ? 4 : HEADS;  // columns of a query
constexpr int ALL = (QUERIES * HP + COLUMNS - 1) / COLUMNS * COLUMNS, NI = COLUMNS % 32 ? 2 : 4;
constexpr bool TENSOR = KIND != FLOAT32, RESIDENT = TENSOR && DP * MI <= 256;                 // a warp's keys stay in its registers
constexpr int MMA = KIND == BFLOAT16 ? BFLOAT16 : FLOAT16;                                    // e4m3 becomes float16, exactly
template <bool T> struct Pick { using type = u16; };
template <> struct Pick<false> { using type = float; };
using Cell = Pick<TENSOR>::type;
using In = Element<KIND>;
constexpr int LD = DP + (TENSOR ? PAD : 4);

struct Params : Pages {
  const In* q; const In* k; const float* weights; const float* k_scale;
  const int* starts; const int* ends; const int* q_starts;
  float* out;                                   // row (b - b0) * nt + (t - t0), `out_row` elements apart
  i64 q_b, q_h, q_t, k_b, k_s, w_b, w_h, w_t, scale_b, scale_s, out_row;
  int T, S, b0, nb, t0, nt, per;                // batches b0 .. b0 + nb - 1, queries t0 .. t0 + nt - 1; per: key tiles of one block of threads
  int q_start, causal;
  int enough;                                   // queries that see no more keys than this need no scores (-1: all need them)
  int fill;                                     // write -inf where a whole tile is outside every window
  float factor;                                 // SHARE: the scale, for base 2
};

// Two e4m3 as two float16: the exponent shifts by 8; denormals come right because float16 has them too.
__device__ __forceinline__ u32 e4m3_pair(u32 x) {
  const u32 lo = x & 0xff, hi = x >> 8 & 0xff;
#if !defined(SPARSETILE_EMULATE) && __CUDA_ARCH__ >= 890
  u32 r;
  const u16 both = (u16)x;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"(both));
  return r;
#else
  return pack<FLOAT16>(e4m3_to_float((u8)lo), e4m3_to_float((u8)hi));
#endif
}

// ROWS rows into shared memory as cells, zeros right of WIDTH and in rows that are not there. Asynchronous where the element type allows it.
template <int ROWS, class Row> __device__ __forceinline__ void load_rows(Cell* to, const In* base, Row row) {
  if constexpr (KIND != FLOAT8_E4M3FN) copy_tile<Cell, ROWS, DP, COPY, THREADS>(to, LD, base, WIDTH, 1, row);
  else {
    constexpr int N = COPY == 16 ? 16 : COPY >= 4 ? 4 : 1, CHUNKS = DP / N;
#pragma unroll 4
    for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
      const int r = i / CHUNKS, c = i % CHUNKS * N;
      const u8* from = row(r);
      const bool exists = from != nullptr && c < WIDTH;
      u16* at = (u16*)to + r * LD + c;
      if constexpr (N == 16) {
        const uint4 v = exists ? *(const uint4*)(from + c) : make_uint4(0, 0, 0, 0);
        ((uint4*)at)[0] = make_uint4(e4m3_pair(v.x), e4m3_pair(v.x >> 16), e4m3_pair(v.y), e4m3_pair(v.y >> 16));
        ((uint4*)at)[1] = make_uint4(e4m3_pair(v.z), e4m3_pair(v.z >> 16), e4m3_pair(v.w), e4m3_pair(v.w >> 16));
      } else if constexpr (N == 4) {
        const u32 v = exists ? *(const u32*)(from + c) : 0;
        ((u32*)at)[0] = e4m3_pair(v); ((u32*)at)[1] = e4m3_pair(v >> 16);
      } else at[0] = (u16)e4m3_pair(exists ? from[c] : 0);
    }
  }
}

__device__ __forceinline__ float act(float x) {
#if RELU
  return x < 0.f ? 0.f : x;  // NaN stays NaN
#else
  return x;
#endif
}

// A product's part of a sum over heads.
__device__ __forceinline__ float weighed(float sum, float product, float weight, float factor) {
#if SHARE
  const float x = fmaf(product, factor, -weight);
  return sum + (TENSOR ? ex2(x) : exp2f(x));
#else
  return fmaf(act(product), weight, sum);
#endif
}

// acc[mi][j] of 16 keys x 8 columns each: this warp's rows of `keys` times columns n .. n + 8 NI - 1 of `heads`
template <class Fragments> __device__ __forceinline__ void products(float (&acc)[MI][NI][4], const Cell* keys, const Cell* heads, const Fragments& held, int n) {
  const int lane = threadIdx.x & 31, rows = (threadIdx.x / 32) * 16 * MI;
#pragma unroll
  for (int mi = 0; mi < MI; mi++)
#pragma unroll
    for (int j = 0; j < NI; j++) acc[mi][j][0] = acc[mi][j][1] = acc[mi][j][2] = acc[mi][j][3] = 0.f;
  if constexpr (TENSOR) {
#pragma unroll (DP <= 256 ? DP / 16 : 4)
    for (int kk = 0; kk < DP / 16; kk++) {
      u32 b[NI / 2][4];
#pragma unroll
      for (int j = 0; j < NI / 2; j++) load_b_rows(b[j], (const u16*)heads, LD, n + 16 * j, 16 * kk);
#pragma unroll
      for (int mi = 0; mi < MI; mi++) {
        u32 a[4];
        if constexpr (RESIDENT) { a[0] = held[kk][mi][0]; a[1] = held[kk][mi][1]; a[2] = held[kk][mi][2]; a[3] = held[kk][mi][3]; }
        else load_a(a, (const u16*)keys, LD, rows + 16 * mi, 16 * kk);
#pragma unroll
        for (int j = 0; j < NI / 2; j++) { mma<MMA>(acc[mi][2 * j], a, b[j][0], b[j][1]); mma<MMA>(acc[mi][2 * j + 1], a, b[j][2], b[j][3]); }
      }
    }
  } else {
    const int g = lane / 4, l = lane % 4;
    for (int d = 0; d < DP; d += 4) {
      float4 b[NI][2];
#pragma unroll
      for (int j = 0; j < NI; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) b[j][e] = *(const float4*)(heads + (n + 8 * j + 2 * l + e) * LD + d);
#pragma unroll
      for (int mi = 0; mi < MI; mi++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const float4 a = *(const float4*)(keys + (rows + 16 * mi + 8 * e + g) * LD + d);
#pragma unroll
          for (int j = 0; j < NI; j++)
#pragma unroll
            for (int f = 0; f < 2; f++) {
              float& c = acc[mi][j][2 * e + f];
              c = fmaf(a.x, b[j][f].x, c); c = fmaf(a.y, b[j][f].y, c); c = fmaf(a.z, b[j][f].z, c); c = fmaf(a.w, b[j][f].w, c);
            }
        }
    }
  }
}

struct Output {  // where one tile's scores go
  const Params& p; const int* lo; const int* hi; const float* k_scale; int key0, b, nt; float* rows;
  __device__ __forceinline__ void operator()(int query, int row, float score) const {
    const int key = key0 + row;
    if (query >= QUERIES || query >= nt || key >= p.S) return;
    if constexpr (PAGE != 0) {
      const i64 at = p.place(b, key >= lo[query] && key < hi[query] ? key : -1, p.scale_b, p.scale_s);
      rows[query * p.out_row + key] = at < 0 ? -inf() : k_scale ? score * k_scale[at] : score;
    } else {
      if (k_scale) score *= k_scale[key * p.scale_s];
      rows[query * p.out_row + key] = key >= lo[query] && key < hi[query] ? score : -inf();
    }
  }
};

// One step of NI n-tiles: weights, sum over heads, and the scores of queries whose last head this was. n8: number of the first n-tile; r: sums under way.
template <class Out> __device__ __forceinline__ void sum_heads(const float (&acc)[MI][NI][4], const float* weights, int n8, float (&r)[MI][2], const Out& out) {
  const int lane = threadIdx.x & 31, g = lane / 4, l = lane % 4, row0 = (threadIdx.x / 32) * 16 * MI;
  const float factor = SHARE ? out.p.factor : 0.f;
#pragma unroll
  for (int j = 0; j < NI; j++) {
    const int at = n8 + j;
    const float2 w = *(const float2*)(weights + 8 * at + 2 * l);
    if constexpr (HP >= 8) {
      constexpr int EACH = HP / 8;
      const int part = at % EACH, h = 8 * part + 2 * l;
#pragma unroll
      for (int mi = 0; mi < MI; mi++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          // a padded head must not turn an infinite key into NaN
          if (HEADS % 8 == 0 || h < HEADS) r[mi][e] = weighed(r[mi][e], acc[mi][j][2 * e], w.x, factor);
          if (HEADS % 8 == 0 || h + 1 < HEADS) r[mi][e] = weighed(r[mi][e], acc[mi][j][2 * e + 1], w.y, factor);
        }
      if (part == EACH - 1) {  // lane l ends with rows 8 l + g (one row tile: 8 (l & 1) + g)
        float x[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
          if constexpr (MI == 2) x[e] = (l & 2 ? r[1][e] : r[0][e]) + __shfl_xor_sync(~0u, l & 2 ? r[0][e] : r[1][e], 2);
          else x[e] = r[0][e] + __shfl_xor_sync(~0u, r[0][e], 2);
        }
        const float sum = (l & 1 ? x[1] : x[0]) + __shfl_xor_sync(~0u, l & 1 ? x[0] : x[1], 1);
        if (MI == 2 || l < 2) out(at / EACH, row0 + 8 * (MI == 2 ? l : l & 1) + g, sum);
#pragma unroll
        for (int mi = 0; mi < MI; mi++) r[mi][0] = r[mi][1] = 0.f;
      }
    } else {  // several queries in one n-tile
#pragma unroll
      for (int mi = 0; mi < MI; mi++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int row = row0 + 16 * mi + 8 * e + g;
          const float x = weighed(0.f, acc[mi][j][2 * e], w.x, factor), y = acc[mi][j][2 * e + 1];
          if constexpr (HP == 1) { out(8 * at + 2 * l, row, x); out(8 * at + 2 * l + 1, row, weighed(0.f, y, w.y, factor)); }
          else if constexpr (HP == 2) out(4 * at + l, row, weighed(x, y, w.y, factor));
          else {
            float sum = 2 * (l & 1) + 1 < HEADS ? weighed(x, y, w.y, factor) : x;
            sum += __shfl_xor_sync(~0u, sum, 1);
            if (!(l & 1)) out(2 * at + l / 2, row, sum);
          }
        }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) indexer_scores(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(raw);
  Cell* keys = (Cell*)raw;                                 // [BK][LD]
  Cell* heads = keys + BK * LD;                            // [COLUMNS][LD]
  float* weights = (float*)(heads + COLUMNS * LD);         // [ALL]
  int *lo = (int*)(weights + ALL), *hi = lo + QUERIES;
  const int groups = (p.nt + QUERIES - 1) / QUERIES, group = blockIdx.x % groups, rest = blockIdx.x / groups, batch = rest % p.nb, split = rest / p.nb;
  const int b = p.b0 + batch, t = p.t0 + group * QUERIES, nt = p.nt - group * QUERIES;  // queries t .. t + min(nt, QUERIES) - 1
  if (threadIdx.x < QUERIES) {
    Window w = {0, 0};
    if ((int)threadIdx.x < nt) w = window_of((i64)b * p.T + t + threadIdx.x, p.T, p.S, p.starts, p.ends, p.q_starts, p.q_start, p.causal);
    if (w.lo >= w.hi || w.hi - w.lo <= p.enough) w = {0, 0};
    lo[threadIdx.x] = w.lo; hi[threadIdx.x] = w.hi;
  }
  for (int c = threadIdx.x; c < ALL; c += THREADS) {
    const int query = c / HP, h = c % HP;
    weights[c] = query < QUERIES && query < nt && h < HEADS ? p.weights[b * p.w_b + h * p.w_h + (t + query) * p.w_t] * (SHARE ? LOG2E : 1.f) : 0.f;
  }
  __syncthreads();
  int first = p.S, last = 0;
  for (int i = 0; i < QUERIES; i++) if (lo[i] < hi[i]) { first = imin(first, lo[i]); last = imax(last, hi[i]); }
  const int tiles = (p.S + BK - 1) / BK, begin = split * p.per, end = imin(begin + p.per, tiles);
  const int v0 = first < last ? imax(begin, first / BK) : end, v1 = first < last ? imin(end, (last - 1) / BK + 1) : end;
  float* rows = p.out + ((i64)batch * p.nt + group * QUERIES) * p.out_row;
  if (p.fill)
    for (int tile = begin; tile < end; tile++)
      if (tile < v0 || tile >= v1)
        for (int i = threadIdx.x; i < QUERIES * BK; i += THREADS) {
          const int query = i / BK, key = tile * BK + i % BK;
          if (query < nt && key < p.S) rows[query * p.out_row + key] = -inf();
        }
  if (v0 >= v1) return;

  const In* kb = p.k + (PAGE ? 0 : b * p.k_b);
  const In* qb = p.q + b * p.q_b + t * p.q_t;
#if PAGE
  auto load_keys = [&](int tile) {
    load_rows<BK>(keys, kb, [&](int r) {
      const i64 at = p.place(b, tile * BK + r < last ? tile * BK + r : -1, p.k_b, p.k_s);
      return at < 0 ? nullptr : kb + at;
    });
  };
#else
  auto load_keys = [&](int tile) { load_rows<BK>(keys, kb, [&](int r) { const int s = tile * BK + r; return s < p.S ? kb + s * p.k_s : nullptr; }); };
#endif
  auto load_heads = [&](int c0) {
    load_rows<COLUMNS>(heads, qb, [&](int r) {
      const int c = c0 + r, query = c / HP, h = c % HP;
      return query < QUERIES && query < nt && h < HEADS ? qb + h * p.q_h + query * p.q_t : nullptr;
    });
  };
  if (ALL == COLUMNS) load_heads(0);
  load_keys(v0);
  cp_commit();
  u32 held[RESIDENT ? DP / 16 : 1][MI][4];
  for (int tile = v0; tile < v1; tile++) {
    cp_wait<0>();
    __syncthreads();
    if constexpr (RESIDENT) {  // the keys' place is free again: the next tile is on its way while this one is multiplied
#pragma unroll
      for (int kk = 0; kk < DP / 16; kk++)
#pragma unroll
        for (int mi = 0; mi < MI; mi++) load_a(held[kk][mi], (const u16*)keys, LD, (threadIdx.x / 32) * 16 * MI + 16 * mi, 16 * kk);
      __syncthreads();
      if (tile + 1 < v1) load_keys(tile + 1);
      cp_commit();
    }
    const Output out = {p, lo, hi, p.k_scale ? p.k_scale + (PAGE ? 0 : b * p.scale_b) : nullptr, tile * BK, b, nt, rows};
    float r[MI][2] = {};
    for (int c0 = 0; c0 < ALL; c0 += COLUMNS) {
      if constexpr (ALL > COLUMNS) {
        __syncthreads();
        load_heads(c0);
        cp_commit(); cp_wait<0>();
        __syncthreads();
      }
#pragma unroll 1
      for (int n = 0; n < COLUMNS; n += 8 * NI) {
        float acc[MI][NI][4];
        products(acc, keys, heads, held, n);
        sum_heads(acc, weights, (c0 + n) / 8, r, out);
      }
    }
    if constexpr (!RESIDENT) {
      __syncthreads();
      if (tile + 1 < v1) load_keys(tile + 1);
      cp_commit();
    }
  }
}
