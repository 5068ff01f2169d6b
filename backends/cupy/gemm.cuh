// One tile of C[m, n] = sum_k A[m, k] W[n, k]: BM x BN by a block of threads, k in steps of DEPTH through a ring of STAGES. Rows of A stand anywhere (a table of
// offsets), W is read in place whichever of its two axes is contiguous. Sums are float32 and rounded once.
// float16 and bfloat16 W with A of the same type, or of e4m3 (exact in both), on tensor cores; every other mix as float32 by fused multiply-adds.
// With scales (one float for each row and 128 values of k) every 128 products are summed alone and then scaled: nothing is rounded in between.
#pragma once
#include "mma.cuh"

#ifndef A_KIND
#define A_KIND BFLOAT16
#endif
#ifndef W_KIND
#define W_KIND BFLOAT16
#endif
#ifndef OUT_KIND
#define OUT_KIND BFLOAT16
#endif
#ifndef TAIL_KIND
#define TAIL_KIND OUT_KIND
#endif
#ifndef A_COPY
#define A_COPY 16    // bytes at a time
#endif
#ifndef W_COPY
#define W_COPY 16
#endif
#ifndef OUT_COPY
#define OUT_COPY 16
#endif
#ifndef TAIL_COPY
#define TAIL_COPY 16
#endif
#ifndef W_ROWS
#define W_ROWS 0     // 1: k is W's contiguous axis, 0: n is
#endif
#ifndef SCALED
#define SCALED 0
#endif
#ifndef BM
#define BM 128
#endif
#ifndef BN
#define BN 128
#endif
#ifndef DEPTH
#define DEPTH 32
#endif
#ifndef STAGES
#define STAGES 3
#endif

constexpr int WARPS_M = BM >= 64 ? 2 : 1, WARPS_N = 4, THREADS = 32 * WARPS_M * WARPS_N;
constexpr int MI = BM / 16 / WARPS_M, NI = BN / 8 / WARPS_N;
constexpr bool TENSOR = (W_KIND == FLOAT16 || W_KIND == BFLOAT16) && (A_KIND == W_KIND || A_KIND == FLOAT8_E4M3FN);
constexpr int CELL_KIND = TENSOR ? W_KIND : FLOAT32;
using Cell = Element<CELL_KIND>;
constexpr int GAP = TENSOR ? PAD : 4, LDA = DEPTH + GAP, LDW = (W_ROWS ? DEPTH : BN) + GAP;
constexpr int A_CELLS = BM * LDA, W_CELLS = (W_ROWS ? BN : DEPTH) * LDW, LDO = BN + (OUT_KIND == FLOAT32 ? 4 : 8);
constexpr int SIZE_OF[4] = {4, 2, 2, 1};
static_assert(NI % 2 == 0 && 128 % DEPTH == 0 && DEPTH % 16 == 0, "two n-tiles are loaded at a time; a group of scales is a whole number of steps");

// ROWS x COLUMNS cells; columns from `width` on and rows that are null are 0. Asynchronous where nothing has to be converted.
template <int KIND, int ROWS, int COLUMNS, int COPY, class Row>
__device__ __forceinline__ void load_cells(Cell* to, int ld, const Element<KIND>* base, int width, Row row) {
  if constexpr (KIND == CELL_KIND) copy_tile<Cell, ROWS, COLUMNS, COPY, THREADS>(to, ld, base, width, 1, row);
  else {
    using In = Element<KIND>;
    constexpr int N = COPY / SIZE_OF[KIND], CHUNKS = COLUMNS / N;
    struct alignas(COPY) Chunk { In x[N]; };
#pragma unroll 2
    for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
      const int r = i / CHUNKS, c = i % CHUNKS * N;
      const In* from = row(r);
      Chunk v = {};
      if (from != nullptr && c < width) v = *(const Chunk*)(from + c);
#pragma unroll
      for (int j = 0; j < N; j++) to[r * ld + c + j] = from_float<CELL_KIND>(to_float<KIND>(v.x[j]));
    }
  }
}

struct Operands {
  const Element<A_KIND>* a; const i64* a_rows;        // row r of the tile at a + a_rows[r]; negative: no such row
  const Element<W_KIND>* w; i64 w_stride; int n_left; // the tile's first column at w; n_left columns are there
  int k;
  const float* scales; const int* scale_rows; int groups;  // scale of row r, group g at scales[scale_rows[r] * groups + g]
};

__device__ __forceinline__ void load_step(const Operands& o, Cell* stage, int k0) {
  if (k0 >= o.k) return;
  load_cells<A_KIND, BM, DEPTH, A_COPY>(stage, LDA, o.a, o.k - k0, [&](int r) { const i64 at = o.a_rows[r]; return at < 0 ? nullptr : o.a + at + k0; });
  if constexpr (W_ROWS)
    load_cells<W_KIND, BN, DEPTH, W_COPY>(stage + A_CELLS, LDW, o.w, o.k - k0, [&](int r) { return r < o.n_left ? o.w + r * o.w_stride + k0 : nullptr; });
  else
    load_cells<W_KIND, DEPTH, BN, W_COPY>(stage + A_CELLS, LDW, o.w, o.n_left, [&](int r) { return k0 + r < o.k ? o.w + (k0 + r) * o.w_stride : nullptr; });
}

__device__ __forceinline__ void multiply_step(float (&acc)[MI][NI][4], const Cell* a, const Cell* w) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, m = warp / WARPS_N * 16 * MI, n = warp % WARPS_N * 8 * NI;
  if constexpr (TENSOR) {
#pragma unroll
    for (int kk = 0; kk < DEPTH; kk += 16) {
      u32 x[MI][4], b[NI / 2][4];
#pragma unroll
      for (int i = 0; i < MI; i++) load_a(x[i], (const u16*)a, LDA, m + 16 * i, kk);
#pragma unroll
      for (int j = 0; j < NI / 2; j++) {
        if constexpr (W_ROWS) load_b_rows(b[j], (const u16*)w, LDW, n + 16 * j, kk);
        else load_b_columns(b[j], (const u16*)w, LDW, kk, n + 16 * j);
      }
#pragma unroll
      for (int i = 0; i < MI; i++)
#pragma unroll
        for (int j = 0; j < NI / 2; j++) { mma<CELL_KIND>(acc[i][2 * j], x[i], b[j][0], b[j][1]); mma<CELL_KIND>(acc[i][2 * j + 1], x[i], b[j][2], b[j][3]); }
    }
  } else {
    const int g = lane / 4, l = lane % 4;
#pragma unroll 2
    for (int d = 0; d < DEPTH; d++) {
      float b[NI][2];
#pragma unroll
      for (int j = 0; j < NI; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) b[j][e] = W_ROWS ? w[(n + 8 * j + 2 * l + e) * LDW + d] : w[d * LDW + n + 8 * j + 2 * l + e];
#pragma unroll
      for (int i = 0; i < MI; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const float x = a[(m + 16 * i + 8 * h + g) * LDA + d];
#pragma unroll
          for (int j = 0; j < NI; j++) { acc[i][j][2 * h] = fmaf(x, b[j][0], acc[i][j][2 * h]); acc[i][j][2 * h + 1] = fmaf(x, b[j][1], acc[i][j][2 * h + 1]); }
        }
    }
  }
}

__device__ __forceinline__ void clear(float (&acc)[MI][NI][4]) {
#pragma unroll
  for (int i = 0; i < MI; i++)
#pragma unroll
    for (int j = 0; j < NI; j++) acc[i][j][0] = acc[i][j][1] = acc[i][j][2] = acc[i][j][3] = 0.f;
}

// The whole tile. Every thread has arrived at a barrier after the last use of `ring`; nobody uses it when this returns.
__device__ __forceinline__ void multiply(float (&sum)[MI][NI][4], Cell* ring, const Operands& o) {
  constexpr int STAGE = A_CELLS + W_CELLS;
  clear(sum);
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) { load_step(o, ring + s * STAGE, s * DEPTH); cp_commit(); }
  float part[MI][NI][4];
  const int steps = (o.k + DEPTH - 1) / DEPTH;
  for (int step = 0, at = 0, to = STAGES - 1; step < steps; step++) {
    cp_wait<STAGES - 2>();
    __syncthreads();
    load_step(o, ring + to * STAGE, (step + STAGES - 1) * DEPTH);
    cp_commit();
    const Cell* a = ring + at * STAGE;
    if constexpr (SCALED) {
      if (step * DEPTH % 128 == 0) clear(part);
      multiply_step(part, a, a + A_CELLS);
      if ((step + 1) * DEPTH % 128 == 0 || step == steps - 1) {
        const int row0 = threadIdx.x / 32 / WARPS_N * 16 * MI + (threadIdx.x & 31) / 4;
#pragma unroll
        for (int i = 0; i < MI; i++)
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const int r = o.scale_rows[row0 + 16 * i + 8 * h];
            const float scale = r < 0 ? 0.f : __ldg(o.scales + (i64)r * o.groups + step * DEPTH / 128);
#pragma unroll
            for (int j = 0; j < NI; j++) { sum[i][j][2 * h] = fmaf(scale, part[i][j][2 * h], sum[i][j][2 * h]); sum[i][j][2 * h + 1] = fmaf(scale, part[i][j][2 * h + 1], sum[i][j][2 * h + 1]); }
          }
      }
    } else multiply_step(sum, a, a + A_CELLS);
    if (++at == STAGES) at = 0;
    if (++to == STAGES) to = 0;
  }
  cp_wait<0>();
  __syncthreads();
}

// sum -> rows of `out` (row r at out + rows[r], negative: none), columns 0 .. n_left - 1, through shared memory: whole lines, rounded once.
__device__ __forceinline__ void store_tile(const float (&sum)[MI][NI][4], void* ring, Element<OUT_KIND>* out, const i64* rows, int n_left) {
  using Out = Element<OUT_KIND>;
  Out* staged = (Out*)ring;
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, m = warp / WARPS_N * 16 * MI + lane / 4, n = warp % WARPS_N * 8 * NI + 2 * (lane % 4);
#pragma unroll
  for (int i = 0; i < MI; i++)
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int j = 0; j < NI; j++) store_pair<OUT_KIND>(staged + (m + 16 * i + 8 * h) * LDO + n + 8 * j, sum[i][j][2 * h], sum[i][j][2 * h + 1], true, true);
  __syncthreads();
  constexpr int N = OUT_COPY / SIZE_OF[OUT_KIND], CHUNKS = BN / N;
  struct alignas(OUT_COPY) Chunk { Out x[N]; };
  for (int i = threadIdx.x; i < BM * CHUNKS; i += THREADS) {
    const int r = i / CHUNKS, c = i % CHUNKS * N;
    if (rows[r] < 0 || c >= n_left) continue;
    Out* to = out + rows[r] + c;
    const Out* from = staged + r * LDO + c;
    if (c + N <= n_left) *(Chunk*)to = *(const Chunk*)from;
    else for (int j = 0; c + j < n_left; j++) to[j] = from[j];
  }
}

// `width` columns of other memory behind the product: bit for bit where the types are equal.
__device__ __forceinline__ void copy_tail(const Element<TAIL_KIND>* tail, const i64* tail_rows, Element<OUT_KIND>* out, const i64* rows, int width) {
  constexpr int N = TAIL_KIND == OUT_KIND ? TAIL_COPY / SIZE_OF[OUT_KIND] : 1;  // TAIL_COPY divides the width, and is aligned on both sides
  struct alignas(N * SIZE_OF[OUT_KIND]) Chunk { Element<OUT_KIND> x[N]; };
  const int chunks = width / N;
  for (int i = threadIdx.x; i < BM * chunks; i += THREADS) {
    const int r = i / chunks, c = i % chunks * N;
    if (rows[r] < 0) continue;
    if constexpr (TAIL_KIND == OUT_KIND) *(Chunk*)(out + rows[r] + c) = *(const Chunk*)(tail + tail_rows[r] + c);
    else out[rows[r] + c] = from_float<OUT_KIND>(to_float<TAIL_KIND>(tail[tail_rows[r] + c]));
  }
}

// Tiles in an order that reads little twice: eight row tiles take turns on each column tile. -> (row tile, column tile)
__device__ __forceinline__ int2 tile_of(i64 id, int m_tiles, int n_tiles) {
  constexpr int TURN = 8;
  const i64 group = id / ((i64)TURN * n_tiles), within = id % ((i64)TURN * n_tiles);
  const int first = (int)(group * TURN), size = imin(TURN, m_tiles - first);
  return make_int2(first + (int)(within % size), (int)(within / size));
}
