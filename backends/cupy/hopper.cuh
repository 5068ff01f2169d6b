// Hopper's own instructions (sm_90a), without its products (wgmma.cuh): barriers that count bytes, copies of the copy engine, registers that go from warpgroup to warpgroup.
#pragma once
#include "mma.cuh"

#ifdef SPARSETILE_EMULATE
#define SWIZZLED_SHARED(name) DYNAMIC_SHARED(name)
#else
#define SWIZZLED_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]  // as swizzled tiles stand, where nothing is left to align it by hand
#endif

struct alignas(64) TensorMap { u64 opaque[16]; };  // filled by the driver on the host

__device__ __forceinline__ void bar_init(u32 bar, int arrivals) {
#ifdef SPARSETILE_EMULATE
  emulate_barrier_init(bar, arrivals);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(bar), "r"(arrivals));
#endif
}
__device__ __forceinline__ void bar_fence() {
#ifndef SPARSETILE_EMULATE
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ __forceinline__ void bar_expect(u32 bar, int bytes) {
#ifdef SPARSETILE_EMULATE
  emulate_barrier_bytes(bar, bytes);
  emulate_barrier_arrive(bar);
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(bar), "r"(bytes) : "memory");
#endif
}
__device__ __forceinline__ void bar_arrive(u32 bar) {
#ifdef SPARSETILE_EMULATE
  emulate_barrier_arrive(bar);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(bar) : "memory");
#endif
}
// Gives up after `patience` clocks (and from then on at once): a mistake of ours ends as a wrong answer, not as a hung device. One asm, so that ptxas sees no
// divergent branch between two products.
__device__ __forceinline__ void bar_wait(u32 bar, u32 parity, u32& patience) {
#ifdef SPARSETILE_EMULATE
  emulate_barrier_wait(bar, parity);
#else
  asm volatile("{.reg .pred p, q; .reg .u32 t, u; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; @p bra E; mov.u32 t, %%clock;"
    "W: mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; @p bra E; mov.u32 u, %%clock; sub.u32 u, u, t; setp.lt.u32 q, u, %0; @q bra W; mov.u32 %0, 0; E:}"
    : "+r"(patience) : "r"(bar), "r"(parity) : "memory");
#endif
}
constexpr u32 PATIENCE = 2000000000;  // about a second

__device__ __forceinline__ void tma_load(u32 to, const TensorMap* map, u32 bar, int x, int y, int z) {
#ifdef SPARSETILE_EMULATE
  const int at[3] = {x, y, z};
  emulate_tma_load(to, map, bar, at, 3);
#else
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
    :: "r"(to), "l"(map), "r"(bar), "r"(x), "r"(y), "r"(z) : "memory");
#endif
}
__device__ __forceinline__ void tma_load(u32 to, const TensorMap* map, u32 bar, int x, int y, int z, int w) {
#ifdef SPARSETILE_EMULATE
  const int at[4] = {x, y, z, w};
  emulate_tma_load(to, map, bar, at, 4);
#else
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
    :: "r"(to), "l"(map), "r"(bar), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
#endif
}
__device__ __forceinline__ void tma_load(u32 to, const TensorMap* map, u32 bar, int x, int y, int z, int w, int v) {
#ifdef SPARSETILE_EMULATE
  const int at[5] = {x, y, z, w, v};
  emulate_tma_load(to, map, bar, at, 5);
#else
  asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], [%2];"
    :: "r"(to), "l"(map), "r"(bar), "r"(x), "r"(y), "r"(z), "r"(w), "r"(v) : "memory");
#endif
}

__device__ __forceinline__ void tma_store(const TensorMap* map, u32 from, int x, int y, int z) {
#ifdef SPARSETILE_EMULATE
  const int at[3] = {x, y, z};
  emulate_tma_store(map, from, at);
#else
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" :: "l"(map), "r"(from), "r"(x), "r"(y), "r"(z) : "memory");
#endif
}
// Bulk copies without a map: 16-byte aligned, and additions by the copy engine. Stores and additions end with the groups of tma_store_commit.
#ifdef SPARSETILE_EMULATE
inline void bulk_load(u32 to, const void* from, int bytes, u32 bar) { emulate_bulk_load(to, from, bytes, bar); }
inline void warp_bulk_load(u32 to, const void* from, int bytes, u32 bar) { if (threadIdx.x % 32 == 0) emulate_bulk_load(to, from, bytes, bar); }
inline void bulk_load_once(u32 to, const void* from, int bytes, u32 bar) { emulate_bulk_load(to, from, bytes, bar); }
inline void bulk_store(void* to, u32 from, int bytes) { emulate_bulk_store((char*)to, from, bytes, false); }
inline void bulk_add(float* to, u32 from, int bytes) { emulate_bulk_store(to, from, bytes, true); }
inline void bulk_add(int* to, u32 from, int bytes) { emulate_bulk_store(to, from, bytes, true); }
inline void tma_store_commit() {}
inline void tma_store_wait_read() {}
inline void tma_store_wait() {}
inline void shared_to_copy_engine() {}
inline void named_sync(int id, int n) { emulate_named_sync(id, n); }
inline void named_arrive(int id, int n) { emulate_named_arrive(id, n); }
inline bool named_or(int id, int n, bool mine) { return emulate_named_or(id, n, mine); }
inline void ldmatrix_at(u32 (&r)[4], u32 at) { emulate_ldmatrix(r, emulate_shared() + at, false); }
inline void ldmatrix_trans_at(u32 (&r)[4], u32 at) { emulate_ldmatrix(r, emulate_shared() + at, true); }
inline void stmatrix_at(u32 at, u32 a, u32 b, u32 c, u32 d) { emulate_stmatrix(at, a, b, c, d); }
inline void stmatrix_transposed_at(u32 at, u32 a, u32 b, u32 c, u32 d) { emulate_stmatrix_transposed(at, a, b, c, d); }
template <int N> inline void fewer_registers() {}
template <int N> inline void more_registers() {}
#else
__device__ __forceinline__ void bulk_load(u32 to, const void* from, int bytes, u32 bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" :: "r"(to), "l"(from), "r"(bytes), "r"(bar) : "memory");
}
// By a whole warp whose lanes say the same: straight code. Of lanes that copy a row each ptxas makes a loop of eight instructions and three moves to uniform registers a row.
__device__ __forceinline__ void warp_bulk_load(u32 to, const void* from, int bytes, u32 bar) {
  asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; @p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];}" :: "r"(to), "l"(from), "r"(bytes), "r"(bar) : "memory");
}
// What nobody reads again: it leaves the L2 cache first, and what others come back to stays.
__device__ __forceinline__ void bulk_load_once(u32 to, const void* from, int bytes, u32 bar) {
  u64 first;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(first));
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" :: "r"(to), "l"(from), "r"(bytes), "r"(bar), "l"(first) : "memory");
}
__device__ __forceinline__ void bulk_store(void* to, u32 from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" :: "l"(to), "r"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void bulk_add(float* to, u32 from, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" :: "l"(to), "r"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void bulk_add(int* to, u32 from, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.s32 [%0], [%1], %2;" :: "l"(to), "r"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
__device__ __forceinline__ void tma_store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }  // the tiles may be written again
__device__ __forceinline__ void tma_store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
__device__ __forceinline__ void shared_to_copy_engine() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }  // by every thread that wrote, before the store
__device__ __forceinline__ void named_sync(int id, int n) { asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(n) : "memory"); }
__device__ __forceinline__ void named_arrive(int id, int n) { asm volatile("bar.arrive %0, %1;" :: "r"(id), "r"(n) : "memory"); }
__device__ __forceinline__ bool named_or(int id, int n, bool mine) {  // whether it holds for one of them
  u32 any;
  asm volatile("{.reg .pred p, q; setp.ne.u32 p, %3, 0; bar.red.or.pred q, %1, %2, p; selp.u32 %0, 1, 0, q;}" : "=r"(any) : "r"(id), "r"(n), "r"((u32)mine) : "memory");
  return any;
}
__device__ __forceinline__ void ldmatrix_at(u32 (&r)[4], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
__device__ __forceinline__ void ldmatrix_trans_at(u32 (&r)[4], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
__device__ __forceinline__ void stmatrix_at(u32 at, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" :: "r"(at), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
__device__ __forceinline__ void stmatrix_transposed_at(u32 at, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" :: "r"(at), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
template <int N> __device__ __forceinline__ void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(N)); }
template <int N> __device__ __forceinline__ void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(N)); }
#endif

// `bar` gets this thread's arrival once its asynchronous copies so far have landed.
__device__ __forceinline__ void copies_arrive(u32 bar) {
#ifdef SPARSETILE_EMULATE
  emulate_copies_arrive(bar);
#else
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" :: "r"(bar) : "memory");
#endif
}
__device__ __forceinline__ u32 thread_again() {  // threadIdx.x, computed where it stands instead of kept in a register
#ifdef SPARSETILE_EMULATE
  return threadIdx.x;
#else
  u32 x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
#endif
}

// 16 bytes, zeros where nothing is to be read. Alone: what stands beside them is not asked for; rows of nine lines that stand apart would bring a tenth from memory
template <bool Alone = false> __device__ __forceinline__ void fetch(u32 to, const char* from, int exists) {
#ifdef SPARSETILE_EMULATE
  emulate_cp_async(emulate_shared() + to, from, 16, exists);
#else
  if constexpr (Alone) asm volatile("{.reg .pred p; setp.eq.s32 p, %2, 0; cp.async.cg.shared.global [%0], [%1], 16, p;}" :: "r"(to), "l"(from), "r"(exists) : "memory");
  else asm volatile("{.reg .pred p; setp.eq.s32 p, %2, 0; cp.async.cg.shared.global.L2::256B [%0], [%1], 16, p;}" :: "r"(to), "l"(from), "r"(exists) : "memory");
#endif
}
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }  // known to be: addresses stay in uniform registers
template <int Slots> __device__ __forceinline__ void advance(u32& slot, u32& phase) { if (++slot == Slots) { slot = 0; phase ^= 1; } }  // around a ring
