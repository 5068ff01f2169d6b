// Attention over block lists for few queries, float16 and bfloat16: the heads of a group and the queries of a tile are rows of one tile, so that each key is read once,
// and the keys of all of them are split over the chip (split.cuh).
//
// Of a step's keys a warp makes the scores of a quarter for all rows, then the output of a quarter of the value columns for all keys: maxima and probabilities pass through
// shared memory. Only keys that some row sees are read; copies of the next steps are in flight meanwhile, and bytes are what it is bound by.
// Defines: KIND, BK (block of the lists), BQ, TK (keys a step), MT (16-row tiles), DP, DVP (padded widths), STAGES, COPY (bytes that divide every row), SHARED_KV (values are
// the first columns of the keys), SOFTCAP, PAGE (pages.cuh), LATENT (latents.cuh; then SHARED_KV), FLOAT8 (float8.cuh; then OUT_KIND and COPY8, of k and v: stages hold
// bytes, which become elements in the registers of the warp that multiplies by them).
#include "split.cuh"
#include "latents.cuh"
#include "float8.cuh"
#include "mma.cuh"

struct Params : Pages {
  const void *q, *k, *v;
  void* out;
  float* lse;
  const float* sink;
  ListArrays lists;
  Positions at;
  Split split;
  i64 qb, qh, qt, qd, kb, kh, kt, kd, vb, vh, vt, vd;
  int Hq, group, pack, heads, tiles, parts, D, Dv;  // pack: heads in a tile; heads: 1, or Hq where each has a list of its own; parts: tiles of rows
  float scale, softcap;
#if FLOAT8
  Scales scales;
#endif
};
#ifndef OUT_KIND
#define OUT_KIND KIND
#endif

constexpr int WARPS = 4, THREADS = 32 * WARPS, ROWS = 16 * MT, KS = DP + PAD, VS = DVP + PAD, PS = TK + PAD, KEYS = TK / WARPS, NT = KEYS / 8, COLUMNS = DVP / WARPS, VT = COLUMNS / 8;
constexpr int VBS = DVP + 16;  // a row of float8 values: rows at odd multiples of 16 bytes fall into different banks
constexpr int STAGE = FLOAT8 ? TK * (DP + VBS) / 2 : TK * (SHARED_KV ? KS : KS + VS), CHAINS = MT * NT < 4 ? 4 / (MT * NT) : 3 - NT;  // chains: sums of every so many k-steps, where one alone would wait for itself
constexpr bool WHOLE = PAGE && PAGE % TK == 0;  // a page holds all keys of a step: one look tells where they are
constexpr u64 ALL = TK == 64 ? ~0ull : (1ull << 32) - 1;
static_assert(TK == 32 || TK == 64, "a lane's word of keys");
static_assert(DVP % (16 * WARPS) == 0 && BK % TK == 0 && (!SHARED_KV || DVP <= DP && !FLOAT8), "tiles");

struct Job {
  int b, head, t, row, count;  // of its first query: its number and its row in the tile of the lists; head: the first of its list
  Run run;
  __device__ __forceinline__ Job(const Params& p, int job) {
    const int tile = job % p.tiles;
    head = job / p.tiles % p.heads;
    b = job / p.tiles / p.heads;
    const int start = first_position(p.at, b);
    const i64 n = (i64)floor_div(start, BQ) + tile, from = n * BQ - start;
    t = (int)(from > 0 ? from : 0);
    row = (int)(t - from);
    count = (int)(from + BQ < p.at.T ? from + BQ : p.at.T) - t;
    run = {0, 0, 0, 0, 0, 0};
    if (count > 0) run = open_run<BK>(p.lists, __ldg(p.lists.list_of + b * p.lists.list_b + head * p.lists.list_h), n - p.lists.first, key_limit(p.at, b));
  }
};

// Steps through entries x .. end - 1, TK keys at a time, past those that no query sees. `mine`: the keys that query `lane` of the tile sees.
struct Steps {
  int x, end, c, block;
  u64 mine, seen;
#if PAGE
  int row;  // of the step's first key, where a page holds them all
#endif
  __device__ __forceinline__ void settle(const Params& p, const Job& job) {
    for (; x < end; advance()) {
      const int e = job.run.entry(x), lane = threadIdx.x & 31;
      block = __ldg(p.lists.cols + e);
      mine = seen = ALL;
#if PAGE
      if constexpr (WHOLE) {
        row = (int)p.row(job.b, block * BK + c < job.run.limit ? block * BK + c : -1);
        if (row < 0) continue;
      }
#endif
      if ((!PAGE || WHOLE) && x < job.run.plain) return;
      const int kind = x < job.run.full ? -1 : __ldg(p.lists.kinds + e), left = job.run.limit - block * BK - c;
      u32 word[2] = {0, 0}, any[2];
#pragma unroll
      for (int n = 0; n < TK / 32; n++) {
        const u32 exist = PAGE && !WHOLE ? exist_word<BK, false>(p.lists, block, c + 32 * n, job.run.limit, p, job.b) : range_bits(0, left - 32 * n);
        if (lane < job.count) word[n] = kind_word<BQ, BK>(p.lists, kind, job.row + lane, c + 32 * n) & exist;
        any[n] = __reduce_or_sync(~0u, word[n]);
      }
      mine = word[0] | (u64)word[1] << 32;
      seen = any[0] | (TK == 64 ? (u64)any[TK / 64] << 32 : 0);
      if (seen) return;
    }
  }
  __device__ __forceinline__ void advance() {
    c += TK;
    if (c == BK) { c = 0; x++; }
  }
};

struct Tile {  // rows of a tile: row r is row first + r of the job's queries x heads
  int head, first, rows, pack;
  __device__ __forceinline__ int query(int r) const { return (first + r) / pack; }
  __device__ __forceinline__ int head_of(int r) const { return head + (first + r) % pack; }
};

// raw products of this warp's keys with all rows
__device__ __forceinline__ void scores(float (&s)[MT][NT][4], const u16* sq, const u16* sk, int warp) {
  const int lane = threadIdx.x & 31;
  float c[CHAINS][MT][NT][4] = {};
#pragma unroll (DP <= 256 ? DP / 16 : 4 / CHAINS)
  for (int k = 0; k < (DP / 16 + CHAINS - 1) / CHAINS; k++) {
    u32 b[4];
#pragma unroll
    for (int e = 0; e < CHAINS; e++) {
      const int step = k * CHAINS + e;
      if (step >= DP / 16) break;
      if (NT == 2) load_b_rows(b, sk, KS, KEYS * warp, 16 * step);
      else if (e % 2 == 0) ldmatrix(b, sk + (KEYS * warp + (lane & 7)) * KS + 16 * step + (lane >> 3) * 8);  // two steps of eight keys; past the last there is shared memory still
#pragma unroll
      for (int m = 0; m < MT; m++) {
        u32 a[4];
        load_a(a, sq, KS, 16 * m, 16 * step);
#pragma unroll
        for (int n = 0; n < NT; n++) mma<KIND>(c[e][m][n], a, b[2 * (NT == 2 ? n : e % 2)], b[2 * (NT == 2 ? n : e % 2) + 1]);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int i = 0; i < 4 * NT; i++) {
      float sum = c[0][m][i / 4][i % 4];
#pragma unroll
      for (int e = 1; e < CHAINS; e++) sum += c[e][m][i / 4][i % 4];
      s[m][i / 4][i % 4] = sum;
    }
}

#if FLOAT8
// Rows of a step's keys that some query sees, `row` bytes apart, into rows of Stride bytes; the others become zeros.
template <int Columns, int Stride> __device__ __forceinline__ void copy_keys(u8* to, const u8* from, i64 row, int width, i64 step, u64 seen) {
  constexpr int CHUNKS = Columns / 16, TOGETHER = CHUNKS < THREADS ? THREADS / CHUNKS : 1;
  if constexpr (COPY8 == 16 && THREADS % CHUNKS == 0 && TK % TOGETHER == 0) {  // a thread stays in its column: addresses by one addition
    const int r = threadIdx.x / CHUNKS, c = threadIdx.x % CHUNKS * 16;
    const u8* x = from + r * row + c;
    seen = c < width ? seen >> r : 0;
#pragma unroll
    for (int n = 0; n < TK; n += TOGETHER, x += TOGETHER * row) {
      const bool exists = seen >> n & 1;
      cp_async<16>(to + (r + n) * Stride + c, exists ? x : from, exists);
    }
  } else {
    copy_tile<u8, TK, Columns, COPY8, THREADS>(to, Stride, from, width, step, [&](int r) { return seen >> r & 1 ? from + r * row : nullptr; });
  }
}

// As `scores`, of rows of float8. A lane has some bytes of a key that follow each other for several products: the order of columns in a sum is free while queries are read in the same.
__device__ __forceinline__ void scores(float (&s)[MT][NT][4], const u16* sq, const u8* sk, int warp) {
  constexpr int WORDS = DP % 64 == 0 ? 4 : DP % 32 == 0 ? 2 : 1, SPAN = 16 * WORDS, SUMS = WORDS < CHAINS ? WORDS : CHAINS;
  const int g = (threadIdx.x & 31) / 4, column = 4 * WORDS * (threadIdx.x & 3);
  float c[SUMS][MT][NT][4] = {};
#pragma unroll (DP <= 256 ? DP / SPAN : 1)
  for (int k = 0; k < DP; k += SPAN) {
    u32 b[NT][WORDS];
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const u8* key = sk + (KEYS * warp + 8 * n + g) * DP + k + column;
      if constexpr (WORDS == 4) *(uint4*)b[n] = *(const uint4*)key;
      else if constexpr (WORDS == 2) *(uint2*)b[n] = *(const uint2*)key;
      else b[n][0] = *(const u32*)key;
    }
#pragma unroll
    for (int j = 0; j < WORDS; j++) {
      uint2 y[NT];
#pragma unroll
      for (int n = 0; n < NT; n++) y[n] = exact_four<KIND>(b[n][j]);
#pragma unroll
      for (int m = 0; m < MT; m++) {
        const uint2 low = *(const uint2*)(sq + (16 * m + g) * KS + k + column + 4 * j), high = *(const uint2*)(sq + (16 * m + 8 + g) * KS + k + column + 4 * j);
        const u32 a[4] = {low.x, high.x, low.y, high.y};
#pragma unroll
        for (int n = 0; n < NT; n++) mma<KIND>(c[j % SUMS][m][n], a, y[n].x, y[n].y);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int i = 0; i < 4 * NT; i++) {
      float sum = c[0][m][i / 4][i % 4];
#pragma unroll
      for (int e = 1; e < SUMS; e++) sum += c[e][m][i / 4][i % 4];
      s[m][i / 4][i % 4] = sum;
    }
}

// Outputs += probabilities times values of float8. Pairs of bytes are turned over as elements of 16 bits: of 16 columns the even ones are an n-tile and the odd ones the next.
__device__ __forceinline__ void add_values(float (&o)[MT][VT][4], const u16* sp, const u8* sv, int warp) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int c = 0; c < TK; c += 32) {
    u32 a[MT][2][4];
#pragma unroll
    for (int m = 0; m < MT; m++) { load_a(a[m][0], sp, PS, 16 * m, c); load_a(a[m][1], sp, PS, 16 * m, c + 16); }
#pragma unroll
    for (int n = 0; n < VT; n += 2) {
      u32 b[4];
      uint2 y[4];
      ldmatrix_trans(b, sv + (c + lane) * VBS + warp * COLUMNS + 8 * n);
#pragma unroll
      for (int i = 0; i < 4; i++) y[i] = exact_four<VALUE_KIND>(turn_middle(b[i]));
#pragma unroll
      for (int m = 0; m < MT; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          mma<VALUE_KIND>(o[m][n], a[m][i], y[2 * i].x, y[2 * i + 1].x);
          mma<VALUE_KIND>(o[m][n + 1], a[m][i], y[2 * i].y, y[2 * i + 1].y);
        }
    }
  }
}
#endif

__device__ __forceinline__ float natural(const Params& p, float dot) { return SOFTCAP ? p.softcap * tanhf(dot * p.scale / p.softcap) : __fmul_rn(dot, p.scale); }

extern "C" __global__ void __launch_bounds__(THREADS, 1) attend(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(raw);
  u16 *sq = (u16*)raw, *stages = sq + ROWS * KS, *sp = stages + STAGES * STAGE;
  float *tops = (float*)(sp + ROWS * PS), *sums = tops + WARPS * ROWS;  // [WARPS][ROWS] each
  int* box = (int*)(sums + WARPS * ROWS);
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, g = lane / 4, column = warp * COLUMNS + (FLOAT8 ? 4 : 2) * (lane & 3);
  const auto column_of = [&](int n) { return column + (FLOAT8 ? n / 2 * 16 + n % 2 * 2 : 8 * n); };  // a lane's n-th pair of output columns
  const auto pair_of = [](const float (&o)[VT][4], int n, int h) { return FLOAT8 ? make_float2(o[n & ~1][2 * h + n % 2], o[n | 1][2 * h + n % 2]) : make_float2(o[n][2 * h], o[n][2 * h + 1]); };

  const auto units = [&](int job) { return Job(p, job).run.n; };
  Start found;
  const int total = scan_jobs<THREADS>(p.split, units, -1, blockIdx.x == 0 ? p.split.starts : nullptr, box, found);
  const i64 share = share_of(p.split, total), begin = blockIdx.x * share, whole = (i64)total * p.split.members, end = begin + share < whole ? begin + share : whole;
  if (begin >= end) return;
  scan_jobs<THREADS>(p.split, units, begin, nullptr, box, found);

  int number = found.job;
  Job job(p, number);
  int member = (int)((begin - (i64)found.start * p.split.members) / job.run.n), x = (int)((begin - (i64)found.start * p.split.members) % job.run.n);
  for (i64 at = begin; at < end;) {
    const int take = (int)(end - at < job.run.n - x ? end - at : job.run.n - x);
    const bool complete = take == job.run.n;
    Tile tile;
    tile.head = job.head + member / p.parts * p.pack;
    tile.first = member % p.parts * ROWS;
    tile.rows = imin(job.count * p.pack - tile.first, ROWS);
    tile.pack = p.pack;
    const Query* q = (const Query*)p.q + job.b * p.qb;
    const Key* k = (const Key*)p.k + job.b * p.kb + (tile.head / p.group) * p.kh;
    const Key* v = (const Key*)p.v + job.b * p.vb + (tile.head / p.group) * p.vh;
    const auto load = [&](const Steps& y, int stage) {
      u16* to = stages + stage * STAGE;
      const i64 first = y.block * BK + y.c;
#if PAGE
      const auto at = [&](int r) { return WHOLE ? (i64)y.row + r : p.row(job.b, first + r); };
#endif
#if LATENT
      copy_latents<KIND, TK, DP, COPY, THREADS, MT == 1 ? 4 : 1>(to, KS, 0, p.D, [&](int r) { return y.seen >> r & 1 ? (const u8*)p.k + at(r) * p.kt : nullptr; });
#elif FLOAT8
      copy_keys<DP, DP>((u8*)to, k + first * p.kt, p.kt, p.D, p.kd, y.seen);
      copy_keys<DVP, VBS>((u8*)to + TK * DP, v + first * p.vt, p.vt, p.Dv, p.vd, y.seen);
#elif PAGE
      copy_tile<u16, TK, DP, COPY, THREADS>(to, KS, k, p.D, p.kd, [&](int r) { return y.seen >> r & 1 ? k + at(r) * p.kt : nullptr; });
      if constexpr (!SHARED_KV)
        copy_tile<u16, TK, DVP, COPY, THREADS>(to + TK * KS, VS, v, p.Dv, p.vd, [&](int r) { return y.seen >> r & 1 ? v + at(r) * p.vt : nullptr; });
#else
      copy_tile<u16, TK, DP, COPY, THREADS>(to, KS, k, p.D, p.kd, [&](int r) { return y.seen >> r & 1 ? k + (first + r) * p.kt : nullptr; });
      if constexpr (!SHARED_KV)
        copy_tile<u16, TK, DVP, COPY, THREADS>(to + TK * KS, VS, v, p.Dv, p.vd, [&](int r) { return y.seen >> r & 1 ? v + (first + r) * p.vt : nullptr; });
#endif
    };

    float o[MT][VT][4] = {}, most[MT][2], sum[MT][2];
#pragma unroll
    for (int m = 0; m < MT; m++) most[m][0] = most[m][1] = -inf(), sum[m][0] = sum[m][1] = 0.f;
    Steps now = {x, x + take, 0, 0, 0, 0};
    now.settle(p, job);
    Steps ahead = now;
#if FLOAT8
    const i64 groups = ((i64)job.b * (p.Hq / p.group) + tile.head / p.group) * ((p.at.S + 127) / 128);
    float by_query[MT][2];
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int row = 16 * m + 8 * h + g;
        by_query[m][h] = row < tile.rows ? scale_at(p.scales.q, ((i64)job.b * p.Hq + tile.head_of(row)) * p.at.T + job.t + tile.query(row)) : 1.f;
      }
#endif
#if FLOAT8 == 2
    copy_float8<KIND, ROWS, DP, COPY, THREADS>(sq, KS, p.D, p.qd, [&](int r) { return r < tile.rows ? q + tile.head_of(r) * p.qh + (job.t + tile.query(r)) * p.qt : nullptr; });
#else
    copy_tile<u16, ROWS, DP, COPY, THREADS>(sq, KS, q, p.D, p.qd, [&](int r) { return r < tile.rows ? q + tile.head_of(r) * p.qh + (job.t + tile.query(r)) * p.qt : nullptr; });
#endif
    for (int s = 0; s < STAGES - 1; s++) {
      if (ahead.x < ahead.end) {
        load(ahead, s);
        ahead.advance();
        ahead.settle(p, job);
      }
      cp_commit();
    }
    for (int stage = 0; now.x < now.end; stage = stage + 1 == STAGES ? 0 : stage + 1) {
      cp_wait<STAGES - 2>();
      __syncthreads();  // this step's keys are here, and nobody reads those of the step before any more
      if (ahead.x < ahead.end) {
        load(ahead, stage == 0 ? STAGES - 1 : stage - 1);
        ahead.advance();
        ahead.settle(p, job);
      }
      cp_commit();
#if FLOAT8
      const i64 at_scale = groups + (now.block * BK + now.c) / 128;
      const float by_key = scale_at(p.scales.k, at_scale), by_value = scale_at(p.scales.v, at_scale);
      const u8 *sk = (const u8*)(stages + stage * STAGE), *sv = sk + TK * DP;
#else
      const u16 *sk = stages + stage * STAGE, *sv = SHARED_KV ? sk : sk + TK * KS;
#endif
      float s[MT][NT][4];
      scores(s, sq, sk, warp);
      const bool masked = PAGE && !WHOLE || now.x >= job.run.plain;
      const u32 bits = (u32)(now.mine >> KEYS * warp);
#pragma unroll
      for (int m = 0; m < MT; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int row = 16 * m + 8 * h + g;
          const u32 word = masked ? __shfl_sync(~0u, bits, tile.query(row) & 31) >> 2 * (lane & 3) : ~0u;
          float top = -inf();
#pragma unroll
          for (int e = 0; e < 2 * NT; e++) {
            float& y = s[m][e / 2][2 * h + e % 2];
#if FLOAT8
            y *= by_query[m][h] * by_key;
#endif
            y = word >> (e / 2 * 8 + e % 2) & 1 ? natural(p, y) : -inf();
            top = fmaxf(top, y);
          }
          top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
          top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
          if ((lane & 3) == 0) tops[warp * ROWS + row] = top;
        }
      __syncthreads();
#pragma unroll
      for (int m = 0; m < MT; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int row = 16 * m + 8 * h + g;
          float top = most[m][h];
#pragma unroll
          for (int w = 0; w < WARPS; w++) top = fmaxf(top, tops[w * ROWS + row]);
          const float zero = top == -inf() ? 0.f : top, factor = ex2((most[m][h] - zero) * LOG2E);  // no key so far: every exponent is -inf, not NaN
          most[m][h] = top;
          sum[m][h] *= factor;
#pragma unroll
          for (int n = 0; n < NT; n++) {
            const float a = ex2((s[m][n][2 * h] - zero) * LOG2E), b = ex2((s[m][n][2 * h + 1] - zero) * LOG2E);
            sum[m][h] += a + b;
#if FLOAT8
            *(u32*)(sp + row * PS + KEYS * warp + 8 * n + 2 * (lane & 3)) = pack<VALUE_KIND>(a * by_value, b * by_value);
#else
            *(u32*)(sp + row * PS + KEYS * warp + 8 * n + 2 * (lane & 3)) = pack<KIND>(a, b);
#endif
          }
#pragma unroll
          for (int n = 0; n < VT; n++) { o[m][n][2 * h] *= factor; o[m][n][2 * h + 1] *= factor; }
        }
      __syncthreads();
#if FLOAT8
      add_values(o, sp, sv, warp);
#else
#pragma unroll
      for (int c = 0; c < TK / 16; c++) {
        u32 a[MT][4];
#pragma unroll
        for (int m = 0; m < MT; m++) load_a(a[m], sp, PS, 16 * m, 16 * c);
#pragma unroll
        for (int n = 0; n < VT; n += 2) {
          u32 b[4];
          load_b_columns(b, sv, SHARED_KV ? KS : VS, 16 * c, warp * COLUMNS + 8 * n);
#pragma unroll
          for (int m = 0; m < MT; m++) {
            mma<KIND>(o[m][n], a[m], b[0], b[1]);
            mma<KIND>(o[m][n + 1], a[m], b[2], b[3]);
          }
        }
      }
#endif
      now.advance();
      now.settle(p, job);
    }
    // ---- sums of all warps, then the answer or this share's part of it
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        sum[m][h] += __shfl_xor_sync(~0u, sum[m][h], 1);
        sum[m][h] += __shfl_xor_sync(~0u, sum[m][h], 2);
        if ((lane & 3) == 0) sums[warp * ROWS + 16 * m + 8 * h + g] = sum[m][h];
      }
    __syncthreads();
    const i64 slot = 2 * (i64)blockIdx.x + (at != begin);
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int row = 16 * m + 8 * h + g;
        if (row >= tile.rows) continue;
        float all = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) all += sums[w * ROWS + row];
        const float top = most[m][h];
        if (!complete) {
          float* to = p.split.sums + (slot * ROWS + row) * DVP;
#pragma unroll
          for (int n = 0; n < VT; n++) *(float2*)(to + column_of(n)) = pair_of(o[m], n, h);
          if (column == 0) *(float2*)(p.split.rows + (slot * ROWS + row) * 2) = make_float2(top, all);
          continue;
        }
        const bool empty = top == -inf() && all == 0.f;
        const int head = tile.head_of(row);
        const float inverse = empty ? 0.f : 1.f / (all + (p.sink ? ex2((__ldg(p.sink + head) - top) * LOG2E) : 0.f));
        const i64 line = ((i64)job.b * p.Hq + head) * p.at.T + job.t + tile.query(row);
        if (p.lse && column == 0) p.lse[line] = empty ? -inf() : top + logf(all);
#pragma unroll
        for (int n = 0; n < VT; n++) {
          const int at = column_of(n);
          const float2 y = pair_of(o[m], n, h);
          if (at < p.Dv) store_pair<OUT_KIND>((Element<OUT_KIND>*)p.out + line * p.Dv + at, empty ? 0.f : y.x * inverse, empty ? 0.f : y.y * inverse, at + 1 < p.Dv, p.Dv % 2 == 0);
        }
      }
    // ---- the next item
    at += take;
    x = 0;
    if (at >= end) break;
    if (++member == p.split.members) {
      member = 0;
      do job = Job(p, ++number); while (job.run.n == 0);
    }
    __syncthreads();
  }
}
