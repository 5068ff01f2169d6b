// Hopper's own instructions for cuda_on_cpu.hpp: barriers that count bytes, tensor copies with their 128-byte swizzle, warpgroup products by their definition.
// Addresses in shared memory are offsets from its start. A TensorMap holds what hopper_on_cpu.py wrote there.
#pragma once

struct EmulatedMap { const unsigned char* base; int rank, size; unsigned extent[5], box[5]; long long step[5]; };  // steps in bytes, axes innermost first
struct EmulatedBarrier { short arrivals, pending; int phase_and_bytes; };                                          // bit 0: the phase under way; above: bytes to come

static inline EmulatedBarrier& emulate_barrier(uint32_t at) {
  if (at % 8) { fprintf(stderr, "barrier: not at a multiple of 8\n"); abort(); }
  return *(EmulatedBarrier*)(emulate_shared() + at);
}
static inline void emulate_barrier_settle(EmulatedBarrier& b) {
  emulate::still = 0;
  if (b.pending == 0 && b.phase_and_bytes >> 1 == 0) { b.phase_and_bytes ^= 1; b.pending = b.arrivals; }
}
namespace emulate {
static Barrier named[16], warpgroup[MOST / 128];
struct Landing { uint32_t bar; std::vector<Copy> copies; };  // an arrival that follows a thread's asynchronous copies: they land when somebody waits for it, not before
static std::vector<Landing> landings;
}
static inline void emulate_barrier_init(uint32_t at, int arrivals) {  // the first thing a kernel does: barriers of the block before may have arrivals left
  for (auto& b : emulate::named) b.count = 0;
  for (auto& b : emulate::warpgroup) b.count = 0;
  emulate::landings.clear();
  emulate_barrier(at) = {(short)arrivals, (short)arrivals, 0};
}
static inline void emulate_barrier_bytes(uint32_t at, int bytes) { auto& b = emulate_barrier(at); b.phase_and_bytes += 2 * bytes; emulate_barrier_settle(b); }
static inline void emulate_barrier_arrive(uint32_t at) {
  auto& b = emulate_barrier(at);
  if (b.pending <= 0) { fprintf(stderr, "barrier: more arrivals than it was made for\n"); abort(); }
  b.pending--;
  emulate_barrier_settle(b);
}
static inline void emulate_copies_land(uint32_t at) {
  auto& all = emulate::landings;
  for (size_t i = 0; i < all.size();) {
    if (all[i].bar != at) { i++; continue; }
    for (auto& c : all[i].copies) emulate::run(c);
    all.erase(all.begin() + i);
    emulate_barrier_arrive(at);
  }
}
static inline void emulate_copies_arrive(uint32_t at) {
  auto& open = emulate::fibers[emulate::now].open;
  emulate::landings.push_back({at, std::move(open)});
  open.clear();
  if (emulate::eager) emulate_copies_land(at);
}
static inline void emulate_barrier_wait(uint32_t at, uint32_t parity) {
  while ((emulate_barrier(at).phase_and_bytes & 1) == (int)parity) {
    emulate_copies_land(at);
    if ((emulate_barrier(at).phase_and_bytes & 1) == (int)parity) emulate::yield(parity ? "a barrier's second phase, shared memory" : "a barrier's first phase, shared memory", at);
  }
}

// where byte `column` of 128-byte row `row` stands in a swizzled tile
static inline uint32_t emulate_swizzle(uint32_t row, uint32_t column) { return row * 128 + ((column / 16 ^ (row & 7)) * 16) + column % 16; }

static inline void emulate_tma_load(uint32_t to, const void* map, uint32_t bar, const int* at, int rank) {
  const EmulatedMap& m = *(const EmulatedMap*)map;
  if (m.rank != rank || to % 1024 || m.box[0] * m.size != 128) { fprintf(stderr, "tensor copy: wrong rank, box or address\n"); abort(); }
  uint32_t row = 0;
  for (unsigned v = 0; v < (rank > 4 ? m.box[4] : 1); v++) for (unsigned w = 0; w < (rank > 3 ? m.box[3] : 1); w++)
  for (unsigned z = 0; z < (rank > 2 ? m.box[2] : 1); z++) for (unsigned y = 0; y < m.box[1]; y++, row++) {
    const long long c[5] = {at[0], at[1] + y, rank > 2 ? at[2] + z : 0, rank > 3 ? at[3] + w : 0, rank > 4 ? at[4] + v : 0};
    bool inside = true;
    for (int i = 1; i < rank; i++) inside &= c[i] >= 0 && c[i] < m.extent[i];
    for (unsigned x = 0; x < 128; x++) {
      const bool there = inside && c[0] + x / m.size < m.extent[0];
      emulate_shared()[to + emulate_swizzle(row, x)] = there ? m.base[(c[0] * m.size + x) + c[1] * m.step[1] + c[2] * m.step[2] + c[3] * m.step[3] + c[4] * m.step[4]] : 0;
    }
  }
  emulate_barrier_bytes(bar, -(int)(row * 128));
}

static inline void emulate_tma_store(const void* map, uint32_t from, const int* at, int rank = 3) {
  const EmulatedMap& m = *(const EmulatedMap*)map;
  if (m.rank != rank || from % 128 || m.box[0] * m.size != 128) { fprintf(stderr, "tensor copy: wrong rank, box or address\n"); abort(); }
  uint32_t row = 0;
  for (unsigned w = 0; w < (rank > 3 ? m.box[3] : 1); w++) for (unsigned z = 0; z < m.box[2]; z++) for (unsigned y = 0; y < m.box[1]; y++, row++) {
    const long long c[4] = {at[0], at[1] + y, at[2] + z, rank > 3 ? at[3] + w : 0};
    bool inside = true;
    for (int i = 1; i < rank; i++) inside &= c[i] >= 0 && c[i] < m.extent[i];
    if (!inside) continue;
    const uint32_t first = from / 128 % 8;  // the pattern follows the address
    for (unsigned x = 0; x < 128; x++)
      if (c[0] + x / m.size < m.extent[0])
        ((unsigned char*)m.base)[c[0] * m.size + x + c[1] * m.step[1] + c[2] * m.step[2] + c[3] * m.step[3]] = emulate_shared()[from - first * 128 + emulate_swizzle(first + row, x)];
  }
}
static inline void emulate_stmatrix(uint32_t at, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  using namespace emulate;
  static uint32_t given[MOST][5];
  const uint32_t mine[5] = {a, b, c, d, at};
  memcpy(given[now], mine, sizeof mine);
  const int base = now / 32 * 32;
  warp_do([=] {
    for (int m = 0; m < 4; m++) for (int l = 0; l < 32; l++) memcpy(emulate_shared() + given[base + 8 * m + l / 4][4] + 4 * (l % 4), &given[base + l][m], 4);
  });
}
static inline void emulate_named_sync(int id, int n) { emulate::arrive(emulate::named[id], n, [] {}, "named barrier", id); }
static inline bool emulate_named_or(int id, int n, bool mine) {
  static bool coming[16], came[16];
  coming[id] |= mine;
  emulate::arrive(emulate::named[id], n, [=] { came[id] = coming[id]; coming[id] = false; }, "named barrier", id);
  return came[id];
}
static inline void emulate_named_arrive(int id, int n) { auto& b = emulate::named[id]; emulate::still = 0; if (++b.count == n) { b.count = 0; b.generation++; } }

namespace emulate {
struct Product { float* d; uint64_t a, b; int acc; };
static Product product[MOST];
static float e4m3(uint8_t x) {
  const int e = x >> 3 & 15, m = x & 7;
  const float y = (x & 127) == 127 ? NAN : e ? ldexpf(8 + m, e - 10) : ldexpf(m, -9);
  return x & 128 ? -y : y;
}
static uint32_t tile_of_descriptor(uint64_t d) { return (d & 0x3fff) << 4; }  // as emulated addresses are below 256 KiB
}  // namespace emulate

// N columns; both operands e4m3, K-major, 128-byte swizzle, 32 values of k from the descriptor's address on
template <int N> static inline void emulate_wgmma_e4m3(float (&d)[N / 2], uint64_t a, uint64_t b, int acc) {
  using namespace emulate;
  product[now] = {d, a, b, acc};
  const int first = now / 128 * 128;
  arrive(warpgroup[now / 128], 128, [=] {
    static float A[64][32], B[N][32];
    const uint32_t at[2] = {tile_of_descriptor(product[first].a), tile_of_descriptor(product[first].b)};
    for (int o = 0; o < 2; o++) for (int r = 0; r < (o ? N : 64); r++) for (int k = 0; k < 32; k++) {
      const uint32_t tile = at[o] & ~1023u, column = (at[o] & 127) + k;
      (o ? B[r][k] : A[r][k]) = e4m3(emulate_shared()[tile + emulate_swizzle(r, column)]);
    }
    for (int t = 0; t < 128; t++) for (int i = 0; i < N / 2; i++) {
      const int row = t / 32 * 16 + t % 32 / 4 + (i & 2) * 4, column = i / 4 * 8 + t % 4 * 2 + (i & 1);
      float s = product[first + t].acc ? product[first + t].d[i] : 0.f;
      for (int k = 0; k < 32; k++) s += A[row][k] * B[column][k];
      product[first + t].d[i] = s;
    }
  }, "a product of warpgroup", now / 128);
}

// Element (row, k) of an operand of 16-bit values as its descriptor says; rows are M or N. columns: the tile's rows are k, as many columns each as the swizzle is wide.
static inline float emulate_element(uint64_t descriptor, int row, int k, bool columns, bool bf16) {
  const uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4, swizzle = descriptor >> 62;
  const uint32_t width = 256 >> swizzle;  // 128, 64 or 32 bytes a row
  uint32_t at = columns ? start + row / (width / 2) * leading + k / 8 * stride + k % 8 * width + row % (width / 2) * 2 : start + row / 8 * stride + row % 8 * width + k * 2;
  at ^= (at >> 7 & (width / 16 - 1)) << 4;  // the pattern follows the address
  uint16_t x; memcpy(&x, emulate_shared() + at, 2);
  return emulate::wide(x, bf16);
}

// N columns, 16 values of k: A in registers (a) or in shared memory (da; a_columns: its rows are k), B in shared memory
template <int N> static inline void emulate_wgmma(float (&d)[N / 2], const uint32_t* a, uint64_t da, uint64_t db, int acc, bool bf16, bool columns, bool a_columns = false) {
  using namespace emulate;
  static uint32_t given[MOST][4];
  if (a) memcpy(given[now], a, 16);
  product[now] = {d, da, db, acc};
  const int first = now / 128 * 128;
  const bool held = a != nullptr;
  arrive(warpgroup[now / 128], 128, [=] {
    static float A[64][16], B[16][N];
    for (int t = 0; held && t < 128; t++) for (int r = 0; r < 4; r++) for (int h = 0; h < 2; h++)
      A[t / 32 * 16 + t % 32 / 4 + 8 * (r & 1)][t % 4 * 2 + h + 8 * (r >> 1)] = wide(given[first + t][r] >> 16 * h, bf16);
    for (int m = 0; !held && m < 64; m++) for (int k = 0; k < 16; k++) A[m][k] = emulate_element(product[first].a, m, k, a_columns, bf16);
    for (int k = 0; k < 16; k++) for (int n = 0; n < N; n++) B[k][n] = emulate_element(product[first].b, n, k, columns, bf16);
    for (int t = 0; t < 128; t++) for (int i = 0; i < N / 2; i++) {
      const int row = t / 32 * 16 + t % 32 / 4 + (i & 2) * 4, column = i / 4 * 8 + t % 4 * 2 + (i & 1);
      float s = product[first + t].acc ? product[first + t].d[i] : 0.f;
      for (int k = 0; k < 16; k++) s += A[row][k] * B[k][column];
      product[first + t].d[i] = s;
    }
  }, "a product of warpgroup", now / 128);
}

// N columns, 32 values of k: A in registers, of every four columns the first two in a warp's rows 0 .. 7 and the last two in its rows 8 .. 15; B in shared memory, K-major
template <int N> static inline void emulate_wgmma_pairs(float (&d)[N / 2], const uint32_t* a, uint64_t db, int acc, bool bf16) {
  using namespace emulate;
  static uint32_t given[MOST][4];
  memcpy(given[now], a, 16);
  product[now] = {d, 0, db, acc};
  const int first = now / 128 * 128;
  arrive(warpgroup[now / 128], 128, [=] {
    static float A[64][16], B[32][N];
    for (int t = 0; t < 128; t++) for (int r = 0; r < 4; r++) for (int h = 0; h < 2; h++)
      A[t / 32 * 16 + t % 32 / 4 + 8 * (r & 1)][t % 4 * 2 + h + 8 * (r >> 1)] = wide(given[first + t][r] >> 16 * h, bf16);
    for (int k = 0; k < 32; k++) for (int n = 0; n < N; n++) B[k][n] = emulate_element(product[first].b, n, k, false, bf16);
    for (int t = 0; t < 128; t++) for (int i = 0; i < N / 2; i++) {
      const int row = t / 32 * 16 + t % 32 / 4 + (i & 2) * 4, column = i / 4 * 8 + t % 4 * 2 + (i & 1);
      float s = product[first + t].acc ? product[first + t].d[i] : 0.f;
      for (int k = 0; k < 16; k++) s += A[row][k] * B[k / 2 * 4 + k % 2 + (i & 2)][column];
      product[first + t].d[i] = s;
    }
  }, "a product of warpgroup", now / 128);
}

// Plain bulk copies, and waiting for a counter that another thread of the grid raises (blocks run one after the other, so it was raised or a thread of this one will)
static inline void emulate_bulk_load(uint32_t to, const void* from, int bytes, uint32_t bar) {
  if (to % 16 || bytes % 16 || (uintptr_t)from % 16) { fprintf(stderr, "bulk copy: unaligned\n"); abort(); }
  memcpy(emulate_shared() + to, from, bytes);
  emulate_barrier_bytes(bar, -bytes);
}
template <class T> static inline void emulate_bulk_store(T* to, uint32_t from, int bytes, bool add) {
  if (from % 16 || bytes % 16 || (uintptr_t)to % 16) { fprintf(stderr, "bulk copy: unaligned\n"); abort(); }
  const T* x = (const T*)(emulate_shared() + from);
  for (int i = 0; i < bytes / (int)sizeof(T); i++) to[i] = add ? to[i] + x[i] : x[i];
}
static inline void emulate_wait_equal(const int* counter, int value) { while (*(const volatile int*)counter != value) emulate::yield("a counter in memory that is not yet", value); }
static inline void emulate_stmatrix_transposed(uint32_t at, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  using namespace emulate;
  static uint32_t given[MOST][5];
  const uint32_t mine[5] = {a, b, c, d, at};
  memcpy(given[now], mine, sizeof mine);
  const int base = now / 32 * 32;
  warp_do([=] {
    for (int m = 0; m < 4; m++) for (int l = 0; l < 32; l++) for (int h = 0; h < 2; h++)
      memcpy(emulate_shared() + given[base + 8 * m + l % 4 * 2 + h][4] + l / 4 * 2, (const char*)&given[base + l][m] + 2 * h, 2);
  });
}
