// New rows of a cache, quantised and scattered through a page table, in one pass. copy_rows: a block of threads copies one row of all heads. quantise_rows: a warp
// makes the float8 values and the scale of one group; behind the groups of a latent it rounds the rotary part.
// Defines: KIND of the rows, COPY (bytes copied at once), GROUP (values of a scale), PLANAR (scales stand behind the keys of a page), POWER (scales are powers of two).
#include "numbers.cuh"

struct Where {
  const int* table; const int* lengths; const int* counts;
  i64 table_b, lengths_b;
  int rows, n, pages, N, page, pinned, window, pad;  // rows of the call: B * n
};
struct Row { i64 b, i, page, offset; bool ok; };

// Row `row` of the call: whose it is, and where it goes.
__device__ __forceinline__ Row row_of(const Where& w, int row) {
  Row r = {row / w.n, row % w.n, 0, 0, false};
  const int count = w.counts ? clamp(w.counts[r.b], 0, w.n) : w.n;
  const i64 start = w.lengths[r.b * w.lengths_b], p = start + r.i;
  if (r.i >= count || p < 0) return r;
  i64 slot = p;
  if (w.window && p >= w.pinned) {
    if (p + w.window < start + count) return r;  // a later row falls on the same slot
    slot = w.pinned + (p - w.pinned) % w.window;
  }
  if (slot / w.page >= w.pages) return r;
  r.page = w.table[r.b * w.table_b + slot / w.page];
  r.offset = slot % w.page;
  r.ok = r.page >= 0 && r.page < w.N;
  return r;
}

template <int Bytes> struct Piece;
template <> struct Piece<2> { using type = u16; };
template <> struct Piece<4> { using type = u32; };
template <> struct Piece<8> { using type = u64; };
template <> struct Piece<16> { using type = uint4; };

struct Copy {
  const u8* from; u8* to;
  i64 from_b, from_n, from_h, to_b, to_n, to_h;  // bytes
  int H, bytes;                                  // of one head
  Where where;
};

extern "C" __global__ void __launch_bounds__(128) copy_rows(const __grid_constant__ Copy p) {
  using P = typename Piece<COPY>::type;
  const Row r = row_of(p.where, blockIdx.x);
  if (!r.ok) return;
  const u8* from = p.from + r.b * p.from_b + r.i * p.from_n;
  u8* to = p.to + r.page * p.to_b + r.offset * p.to_n;
  const int each = p.bytes / COPY;
  for (int x = threadIdx.x; x < p.H * each; x += 128) *((P*)(to + x / each * p.to_h) + x % each) = *((const P*)(from + x / each * p.from_h) + x % each);
}

// float32 of at most 448 in size -> e4m3fn, nearest even; without the chip's own conversion, which sm_80 lacks
__device__ __forceinline__ u8 e4m3_of(float x) {
  const u32 bits = __float_as_int(x), size = bits & 0x7fffffff;
  const u32 normal = (size - (120u << 23) + ((size >> 20) & 1) + 0x7ffff) >> 20;
  const u32 tiny = (u32)__float_as_int(__int_as_float(size) + 16384.f) - (141u << 23);  // below 2^-6 multiples of 2^-9 stand in the low bits
  return (u8)((size < (121u << 23) ? tiny : normal) | ((bits >> 24) & 0x80));
}

struct Quantise {
  const Element<KIND>* rows; const Element<KIND>* rotary; u8* pool;
  i64 rows_b, rows_n, rotary_b, rotary_n, page_bytes;
  int D, P;
  Where where;
};

extern "C" __global__ void __launch_bounds__(128) quantise_rows(const __grid_constant__ Quantise p) {
  const int lane = threadIdx.x % 32, groups = p.D / GROUP, parts = groups + (p.P > 0);
  const i64 task = (i64)blockIdx.x * 4 + threadIdx.x / 32;
  if (task >= (i64)p.where.rows * parts) return;
  const Row r = row_of(p.where, (int)(task / parts));
  if (!r.ok) return;
  const int g = task % parts;
  u8* page = p.pool + r.page * p.page_bytes;
  u8* values = page + r.offset * (PLANAR ? p.D : p.D + 4 * groups + 2 * p.P);
  float* scale_at = (float*)(PLANAR ? page + (i64)p.where.page * p.D + 4 * r.offset : values + p.D + 4 * g);
  if (g == groups) {
    const Element<KIND>* from = p.rotary + r.b * p.rotary_b + r.i * p.rotary_n;
    for (int d = lane; d < p.P; d += 32) ((u16*)(values + p.D + 4 * groups))[d] = (u16)pack<BFLOAT16>(to_float<KIND>(from[d]), 0.f);
    return;
  }
  const Element<KIND>* from = p.rows + r.b * p.rows_b + r.i * p.rows_n + g * GROUP;
  u32 top = 0;  // of floats without signs bits order as numbers, NaN above all
  for (int d = lane; d < GROUP; d += 32) {
    const u32 size = __float_as_int(to_float<KIND>(from[d])) & 0x7fffffff;
    top = size > top ? size : top;
  }
  for (int m = 16; m; m /= 2) {
    const u32 other = __shfl_xor_sync(~0u, top, m);
    top = other > top ? other : top;
  }
  const bool bad = top >= 0x7f800000;
  float scale = fmaxf(__int_as_float(bad ? 0 : top) / 448.f, 1.1754943508222875e-38f);
  if (POWER && (__float_as_int(scale) & 0x7fffff)) scale = __int_as_float((__float_as_int(scale) & 0x7f800000) + 0x800000);
  if (lane == 0) *scale_at = bad ? __int_as_float(0x7fc00000) : scale;
  for (int d = lane; d < GROUP; d += 32) values[g * GROUP + d] = bad ? 0x7f : e4m3_of(fminf(fmaxf(to_float<KIND>(from[d]) / scale, -448.f), 448.f));
}
