// Keys and values out of the shared latent, each written once, in the layout that attention reads: k[b, h, s] = [latent[b, s] w_uk[h] | k_rope[b, s]],
// v[b, h, s] = latent[b, s] w_uv[h]. The tokens of all batches are the rows of one product; a column tile belongs to one head's keys or values.
#include "gemm.cuh"

struct Params {
  const Element<A_KIND>* latent; const Element<W_KIND>* w_uk; const Element<W_KIND>* w_uv; const Element<TAIL_KIND>* k_rope; const float* scales;
  Element<OUT_KIND>* k; Element<OUT_KIND>* v;
  i64 latent_b, latent_s, uk_h, uk_stride, uv_h, uv_stride, rope_b, rope_s;
  int B, S, H, R, Dn, Dv, P, groups, m_tiles, k_tiles, v_tiles, pad;  // k_tiles, v_tiles: column tiles of one head
};

struct Rows { i64 latent[BM], out[BM], v[BM], rope[BM]; int scale[BM]; };

extern "C" __global__ void __launch_bounds__(THREADS) latent_decompress(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(raw);
  Rows& rows = *(Rows*)raw;
  Cell* ring = (Cell*)(raw + (sizeof(Rows) + 15) / 16 * 16);
  const int each = p.k_tiles + p.v_tiles;
  const int2 tile = tile_of(blockIdx.x, p.m_tiles, p.H * each);
  const int h = tile.y / each, part = tile.y % each;
  const bool keys = part < p.k_tiles;
  const int n0 = (keys ? part : part - p.k_tiles) * BN, width = keys ? p.Dn : p.Dv, stride = keys ? p.Dn + p.P : p.Dv;
  for (int r = threadIdx.x; r < BM; r += THREADS) {
    const i64 m = (i64)tile.x * BM + r, b = m / p.S, s = m % p.S;
    const bool exists = b < p.B;
    rows.latent[r] = exists ? b * p.latent_b + s * p.latent_s : -1;
    rows.out[r] = exists ? ((b * p.H + h) * p.S + s) * stride : -1;
    rows.rope[r] = b * p.rope_b + s * p.rope_s;
    rows.scale[r] = exists ? (int)m : -1;
  }
  __syncthreads();
  const i64 w_stride = keys ? p.uk_stride : p.uv_stride;
  const Element<W_KIND>* w = keys ? p.w_uk + h * p.uk_h : p.w_uv + h * p.uv_h;
  const Operands o = {p.latent, rows.latent, w + (W_ROWS ? n0 * w_stride : n0), w_stride, width - n0, p.R, p.scales, rows.scale, p.groups};
  Element<OUT_KIND>* out = keys ? p.k : p.v;
  if (width > n0) {  // a head without columns still has its rotary part
    float sum[MI][NI][4];
    multiply(sum, ring, o);
    store_tile(sum, ring, out + n0, rows.out, width - n0);
  }
  if (keys && p.P && part == p.k_tiles - 1) copy_tail(p.k_rope, rows.rope, out + p.Dn, rows.out, p.P);
}
