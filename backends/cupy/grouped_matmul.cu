// One matrix for each head: out[b, h, t] = [x[b, h, t] w[h]^T | tail[b, h, t]]. The queries of all batches are the rows of one product.
#include "gemm.cuh"

struct Params {
  const Element<A_KIND>* x; const Element<W_KIND>* w; const Element<TAIL_KIND>* tail; Element<OUT_KIND>* out;
  i64 x_b, x_h, x_t, w_h, w_stride, tail_b, tail_h, tail_t;
  int B, T, H, N, M, P, m_tiles, n_tiles;  // n_tiles: column tiles of one head
};

struct Rows { i64 x[BM], out[BM], tail[BM]; };

__device__ __forceinline__ void find_rows(Rows& rows, const Params& p, int row_tile, int h) {
  for (int r = threadIdx.x; r < BM; r += THREADS) {
    const i64 m = (i64)row_tile * BM + r, b = m / p.T, t = m % p.T;
    const bool exists = b < p.B;
    rows.x[r] = exists ? b * p.x_b + h * p.x_h + t * p.x_t : -1;
    rows.out[r] = exists ? ((b * p.H + h) * p.T + t) * (p.M + p.P) : -1;
    rows.tail[r] = b * p.tail_b + h * p.tail_h + t * p.tail_t;
  }
  __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS) grouped_matmul(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(raw);
  Rows& rows = *(Rows*)raw;
  Cell* ring = (Cell*)(raw + (sizeof(Rows) + 15) / 16 * 16);
  const int2 tile = tile_of(blockIdx.x, p.m_tiles, p.H * p.n_tiles);
  const int h = tile.y / p.n_tiles, part = tile.y % p.n_tiles, n0 = part * BN;
  find_rows(rows, p, tile.x, h);
  const Operands o = {p.x, rows.x, p.w + h * p.w_h + (W_ROWS ? n0 * p.w_stride : n0), p.w_stride, p.M - n0, p.N, nullptr, nullptr, 0};
  float sum[MI][NI][4];
  multiply(sum, ring, o);
  store_tile(sum, ring, p.out + n0, rows.out, p.M - n0);
  if (p.P && part == p.n_tiles - 1) copy_tail(p.tail, rows.tail, p.out + p.M, rows.out, p.P);
}

// The tail alone, behind a product that another library has written: one block for each tile of rows of one head.
extern "C" __global__ void __launch_bounds__(THREADS) copy_tails(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(raw);
  Rows& rows = *(Rows*)raw;
  find_rows(rows, p, blockIdx.x % p.m_tiles, blockIdx.x / p.m_tiles);
  copy_tail(p.tail, rows.tail, p.out + p.M, rows.out, p.P);
}
