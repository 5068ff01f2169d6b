// Runs one .cu of backends/cupy on the CPU, exactly as written: one fiber per CUDA thread, barriers by yielding, tensor-core instructions by their
// definition in the PTX manual. Slow, deterministic, and strict: shared memory starts as NaN, and asynchronous copies land as late as the waits allow
// (or at once, SPARSETILE_EMULATE_EAGER=1), so a missing wait or barrier gives a wrong answer. SPARSETILE_EMULATE_SLOW=n: of 64 turns warpgroup n gets one.
// A launch in which nobody can go on, or that takes more than SPARSETILE_EMULATE_SECONDS (300) of the processor, ends with a report of which threads stand where.
#pragma once
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <string>
#include <vector>
#undef isnan
#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
#define __align__(n) alignas(n)
#define SPARSETILE_EMULATE 1
using std::isnan;
struct dim3 { unsigned x = 1, y = 1, z = 1; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct uint2 { unsigned x, y; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static dim3 threadIdx, blockIdx, gridDim, blockDim;

namespace emulate {
struct Copy { void* to; const void* from; int bytes; bool exists; };
struct Fiber {
  jmp_buf at; ucontext_t start; bool started = false, done = false;
  std::vector<std::vector<Copy>> groups; std::vector<Copy> open;
  const char* what; long long which;  // stands there, and at which of them
};
struct Barrier { int count = 0; unsigned generation = 0; };
struct Deposit { const uint32_t *a, *b; float* c; uint32_t b0, b1; const void* row; uint32_t* out; uint32_t value; int lane; };
constexpr int MOST = 1024; constexpr size_t STACK = 256 << 10;
static Fiber fibers[MOST]; static jmp_buf home; static ucontext_t home_context; static int now, threads; static unsigned long long steps, still;  // still: turns of all since somebody arrived anywhere
static Barrier block, warp[MOST / 32]; static Deposit deposit[MOST]; static unsigned char* shared; static char* stacks;
static bool eager; static int slow; static void (*body)(const void*); static const void* arguments;

static void yield(const char* what, long long which) {
  fibers[now].what = what; fibers[now].which = which;
  if (!_setjmp(fibers[now].at)) _longjmp(home, 1);
}
template <class F> static void arrive(Barrier& b, int n, F last, const char* what, long long which = 0) {  // the last to arrive works for all
  const unsigned g = b.generation;
  still = 0;
  if (++b.count == n) { last(); b.count = 0; b.generation++; }
  else while (b.generation == g) yield(what, which);
}
static int lanes() { return threads - now / 32 * 32 < 32 ? threads - now / 32 * 32 : 32; }
template <class F> static void warp_do(F f) { arrive(warp[now / 32], lanes(), f, "an instruction of warp", now / 32); }
static void run(const Copy& c) { if (c.exists) memcpy(c.to, c.from, c.bytes); else memset(c.to, 0, c.bytes); }
static void entry() { body(arguments); fibers[now].done = true; still = 0; _longjmp(home, 1); }

static std::string report;
static const char* where(const Fiber& f) { return f.done ? "their end" : f.what; }
static void stuck(const char* why) {  // threads that stand at one place together
  char line[200];
  snprintf(line, sizeof line, "%s: block (%u, %u, %u)", why, blockIdx.x, blockIdx.y, blockIdx.z);
  report = line;
  for (int i = 0, j; i < threads; i = j) {
    for (j = i + 1; j < threads && !strcmp(where(fibers[j]), where(fibers[i])) && (fibers[i].done || fibers[j].which == fibers[i].which);) j++;
    snprintf(line, sizeof line, ", threads %d to %d at %s", i, j - 1, where(fibers[i]));
    report += line;
    if (!fibers[i].done) report += " " + std::to_string(fibers[i].which);
  }
}
static bool block_of_threads(int n, double until) {  // whether it ended
  threads = n; steps = still = 0; block = Barrier(); for (auto& w : warp) w = Barrier();
  for (int i = 0; i < n; i++) { Fiber& f = fibers[i]; f.started = f.done = false; f.what = "their beginning"; f.which = 0; f.groups.clear(); f.open.clear(); }
  for (int left = n; left;) {
    left = 0;
    for (int i = 0; i < n; i++) {
      Fiber& f = fibers[i];
      if (f.done) continue;
      if (i / 128 == slow && steps % 64) { left++; continue; }
      now = i; threadIdx = {(unsigned)i, 0, 0};
      if (!_setjmp(home)) {
        if (f.started) _longjmp(f.at, 1);
        f.started = true;
        getcontext(&f.start); f.start.uc_stack.ss_sp = stacks + i * STACK; f.start.uc_stack.ss_size = STACK; f.start.uc_link = nullptr;
        makecontext(&f.start, entry, 0); setcontext(&f.start);
      }
      left += !f.done;
    }
    if (++still > 1000) { stuck("nobody can go on"); return false; }
    if (++steps % 1024 == 0 && clock() / (double)CLOCKS_PER_SEC > until) { stuck("too slow, or without an end"); return false; }
  }
  return true;
}
static float half(uint16_t h) {
  const int e = h >> 10 & 31, m = h & 1023; float y = e == 31 ? (m ? NAN : INFINITY) : e ? ldexpf(1024 + m, e - 25) : ldexpf(m, -24);
  return h & 0x8000 ? -y : y;
}
static float wide(uint16_t x, bool bf16) { if (!bf16) return half(x); uint32_t u = (uint32_t)x << 16; float y; memcpy(&y, &u, 4); return y; }
}  // namespace emulate

static inline void __syncthreads() { emulate::arrive(emulate::block, emulate::threads, [] {}, "__syncthreads", 0); }
static inline void __syncwarp(unsigned = ~0u) { emulate::warp_do([] {}); }
template <class T> static T emulate_exchange(T x, int from) {
  using namespace emulate;
  uint32_t out = 0; memcpy(&deposit[now].value, &x, 4); deposit[now].lane = from; deposit[now].out = &out;
  const int base = now / 32 * 32, n = lanes();
  warp_do([=] { for (int i = 0; i < n; i++) *deposit[base + i].out = deposit[base + (deposit[base + i].lane < n ? deposit[base + i].lane : i)].value; });
  T y; memcpy(&y, &out, 4); return y;
}
template <class T> static T __shfl_xor_sync(unsigned, T x, int m) { return emulate_exchange(x, (emulate::now & 31) ^ m); }
template <class T> static T __shfl_sync(unsigned, T x, int l) { return emulate_exchange(x, l & 31); }
template <class T> static T __shfl_down_sync(unsigned, T x, int d) { const int l = emulate::now & 31; return emulate_exchange(x, l + d < 32 ? l + d : l); }
template <class T> static T __shfl_up_sync(unsigned, T x, int d) { const int l = emulate::now & 31; return emulate_exchange(x, l >= d ? l - d : l); }
template <class F> static uint32_t emulate_reduce(uint32_t x, F f) {
  using namespace emulate;
  uint32_t out; deposit[now].value = x; deposit[now].out = &out;
  const int base = now / 32 * 32, n = lanes();
  warp_do([=] { uint32_t y = 0; for (int i = 0; i < n; i++) y = f(y, deposit[base + i].value, i); for (int i = 0; i < n; i++) *deposit[base + i].out = y; });
  return out;
}
static inline uint32_t __ballot_sync(unsigned, int p) { return emulate_reduce(p != 0, [](uint32_t y, uint32_t v, int i) { return y | v << i; }); }
static inline bool __any_sync(unsigned m, int p) { return __ballot_sync(m, p) != 0; }
static inline bool __all_sync(unsigned m, int p) { return __ballot_sync(m, !p) == 0; }
static inline uint32_t __reduce_or_sync(unsigned, uint32_t x) { return emulate_reduce(x, [](uint32_t y, uint32_t v, int) { return y | v; }); }
static inline bool __syncthreads_or(int p) { static int any; __syncthreads(); any = 0; __syncthreads(); any |= p; __syncthreads(); return any; }
static inline int __popc(uint32_t x) { return __builtin_popcount(x); }
static inline int __ffs(uint32_t x) { return __builtin_ffs(x); }
static inline int __clz(uint32_t x) { return x ? __builtin_clz(x) : 32; }
static inline float __int_as_float(int x) { float y; memcpy(&y, &x, 4); return y; }
static inline int __float_as_int(float x) { int y; memcpy(&y, &x, 4); return y; }
static inline uint32_t __float_as_uint(float x) { uint32_t y; memcpy(&y, &x, 4); return y; }
template <class T> static T __ldg(const T* p) { return *p; }
static inline int __float2int_rn(float x) { return isnan(x) ? 0 : x >= 2147483648.f ? 2147483647 : x < -2147483648.f ? -2147483647 - 1 : (int)lrintf(x); }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdividef(float a, float b) { return a / b; }
template <class T> static T atomicOr(T* p, T v) { T old = *p; *p |= v; return old; }
template <class T> static T atomicAdd(T* p, T v) { T old = *p; *p += v; return old; }
template <class T> static T atomicMax(T* p, T v) { T old = *p; if (v > old) *p = v; return old; }
static inline unsigned char* emulate_shared() { return emulate::shared; }
static inline float emulate_half_to_float(uint16_t x) { return emulate::half(x); }
static inline uint32_t emulate_round(float x, bool bf16) {
  uint32_t u; memcpy(&u, &x, 4);
  if (bf16) return x != x ? 0x7fffu : (u + 0x7fff + (u >> 16 & 1)) >> 16;
  _Float16 h = (_Float16)x; uint16_t r; memcpy(&r, &h, 2); return r;
}
static inline void emulate_mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bf16) {
  using namespace emulate;
  Deposit& d = deposit[now]; d.a = a; d.c = c; d.b0 = b0; d.b1 = b1;
  const int base = now / 32 * 32;
  warp_do([=] {
    float A[16][16], B[16][8];
    for (int l = 0; l < 32; l++) {
      const Deposit& x = deposit[base + l]; const int g = l / 4, t = l % 4;
      for (int h = 0; h < 2; h++) {
        for (int r = 0; r < 4; r++) A[g + 8 * (r & 1)][2 * t + h + 8 * (r >> 1)] = wide(x.a[r] >> 16 * h, bf16);
        B[2 * t + h][g] = wide(x.b0 >> 16 * h, bf16); B[2 * t + h + 8][g] = wide(x.b1 >> 16 * h, bf16);
      }
    }
    for (int l = 0; l < 32; l++) for (int r = 0; r < 4; r++) {
      const int m = l / 4 + 8 * (r >> 1), n = 2 * (l % 4) + (r & 1);
      float s = deposit[base + l].c[r];
      for (int k = 0; k < 16; k++) s += A[m][k] * B[k][n];
      deposit[base + l].c[r] = s;
    }
  });
}
static inline void emulate_ldmatrix(uint32_t (&r)[4], const void* row, bool trans) {
  using namespace emulate;
  if ((uintptr_t)row & 15) { fprintf(stderr, "ldmatrix: unaligned row\n"); abort(); }
  deposit[now].row = row; deposit[now].out = r;
  const int base = now / 32 * 32;
  warp_do([=] {
    for (int l = 0; l < 32; l++) for (int m = 0; m < 4; m++) {
      uint16_t x[2];
      for (int h = 0; h < 2; h++) {
        const int i = trans ? 2 * (l % 4) + h : l / 4, j = trans ? l / 4 : 2 * (l % 4) + h;
        x[h] = ((const uint16_t*)deposit[base + 8 * m + i].row)[j];
      }
      deposit[base + l].out[m] = x[0] | (uint32_t)x[1] << 16;
    }
  });
}
static inline void emulate_cp_async(void* to, const void* from, int bytes, bool exists) {
  if ((uintptr_t)to % bytes || (exists && (uintptr_t)from % bytes)) { fprintf(stderr, "cp.async: unaligned\n"); abort(); }
  emulate::Copy c{to, from, bytes, exists};
  if (emulate::eager) emulate::run(c); else emulate::fibers[emulate::now].open.push_back(c);
}
static inline void emulate_cp_commit() { auto& f = emulate::fibers[emulate::now]; f.groups.push_back(std::move(f.open)); f.open.clear(); }
static inline void emulate_cp_wait(int n) {
  auto& f = emulate::fibers[emulate::now];
  while ((int)f.groups.size() > n) { for (auto& c : f.groups.front()) emulate::run(c); f.groups.erase(f.groups.begin()); }
}

// Launches KERNEL(Params) over a grid; `extra` bytes behind the shared memory are watched.
template <class P, void (*KERNEL)(P)> static int emulate_launch(int x, int y, int z, int n, int bytes, const void* p) {
  using namespace emulate;
  if (!stacks) stacks = (char*)mmap(nullptr, MOST * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  eager = getenv("SPARSETILE_EMULATE_EAGER") != nullptr;
  slow = getenv("SPARSETILE_EMULATE_SLOW") ? atoi(getenv("SPARSETILE_EMULATE_SLOW")) : -1;
  unsigned char* raw = (unsigned char*)aligned_alloc(1024, (bytes + 1024 + 1023) / 1024 * 1024);
  shared = raw; arguments = p; body = [](const void* q) { KERNEL(*(const P*)q); };
  gridDim = {(unsigned)x, (unsigned)y, (unsigned)z}; blockDim = {(unsigned)n, 1, 1};
  bool ended = true, bad = false;
  const double until = clock() / (double)CLOCKS_PER_SEC + (getenv("SPARSETILE_EMULATE_SECONDS") ? atoi(getenv("SPARSETILE_EMULATE_SECONDS")) : 300);
  report.clear();
  for (int k = 0; k < z; k++) for (int j = 0; j < y; j++) for (int i = 0; i < x && ended; i++) {
    memset(raw, 0xff, bytes); memset(raw + bytes, 0xa5, 512);
    blockIdx = {(unsigned)i, (unsigned)j, (unsigned)k};
    ended = block_of_threads(n, until);
    for (int b = 0; b < 512; b++) bad |= raw[bytes + b] != 0xa5;
  }
  if (ended && bad) report = "the kernel wrote behind its shared memory";
  free(raw);
  return !ended || bad;
}
template <class P> struct emulate_parameter;
template <class P> struct emulate_parameter<void (*)(P)> { using type = std::remove_const_t<P>; };
#define EMULATE(name) extern "C" int emulate_##name(int x, int y, int z, int n, int bytes, const void* p) { \
  using P = emulate_parameter<decltype(&name)>::type; return emulate_launch<P, name>(x, y, z, n, bytes, p); } \
  extern "C" const char* emulate_report() { return emulate::report.c_str(); }
#include "hopper_on_cpu.hpp"
