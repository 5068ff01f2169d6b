// Hopper's own instructions (sm_90a): barriers that count bytes, tensor copies into swizzled tiles, warpgroup products.
// Tiles are K-major with 128-byte swizzle: a row of 128 bytes, 8 rows 1024 bytes, tiles at multiples of 1024; 32 bytes further along K is + 2 in a descriptor.
#pragma once
#include "mma.cuh"

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
inline void bulk_store(void* to, u32 from, int bytes) { emulate_bulk_store((char*)to, from, bytes, false); }
inline void bulk_add(float* to, u32 from, int bytes) { emulate_bulk_store(to, from, bytes, true); }
inline void bulk_add(int* to, u32 from, int bytes) { emulate_bulk_store(to, from, bytes, true); }
inline void tma_store_commit() {}
inline void tma_store_wait_read() {}
inline void tma_store_wait() {}
inline void shared_to_copy_engine() {}
inline void named_sync(int id, int n) { emulate_named_sync(id, n); }
inline void named_arrive(int id, int n) { emulate_named_arrive(id, n); }
inline void ldmatrix_at(u32 (&r)[4], u32 at) { emulate_ldmatrix(r, emulate_shared() + at, false); }
inline void stmatrix_at(u32 at, u32 a, u32 b, u32 c, u32 d) { emulate_stmatrix(at, a, b, c, d); }
#else
__device__ __forceinline__ void bulk_load(u32 to, const void* from, int bytes, u32 bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" :: "r"(to), "l"(from), "r"(bytes), "r"(bar) : "memory");
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
__device__ __forceinline__ void ldmatrix_at(u32 (&r)[4], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
__device__ __forceinline__ void stmatrix_at(u32 at, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" :: "r"(at), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
#endif

// Tiles whose rows are k: 64 columns to a row of 128 bytes, the next 64 columns `Next` bytes on; 16 rows further is + 128 in the descriptor
template <int Next = 8192> __device__ __forceinline__ u64 descriptor_columns(u32 tile) { return (u64)((tile & 0x3FFFF) >> 4) | ((u64)(Next >> 4) << 16) | (64ull << 32) | (1ull << 62); }
__device__ __forceinline__ u64 descriptor(u32 tile) { return (u64)((tile & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62); }
#ifdef SPARSETILE_EMULATE
inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int N> inline void wgmma_wait() {}
template <int N> inline void hold(float (&)[N]) {}
template <int N> inline void fewer_registers() {}
template <int N> inline void more_registers() {}
#else
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory"); }
template <int N> __device__ __forceinline__ void hold(float (&d)[N]) {  // accumulators are read or written from here on, not before
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i]) :: "memory");
}

template <int N> __device__ __forceinline__ void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(N)); }
template <int N> __device__ __forceinline__ void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(N)); }
#endif

// d (+)= A x B, A 64 x 32, B 128 x 32, both e4m3 in shared memory; acc 0: d is overwritten. Lane l of warp w holds rows 16 w + l / 4 (and + 8), columns 8 c + 2 (l % 4) and + 1
// as d[4 c .. 4 c + 3].
__device__ __forceinline__ void wgmma_e4m3_n128(float (&d)[64], u64 a, u64 b, int acc) {
#ifdef SPARSETILE_EMULATE
  emulate_wgmma_e4m3<128>(d, a, b, acc);
#else
  asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {"
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, "
    "%26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "
    "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
    "}, %64, %65, p, 1, 1;}"
    : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), 
      "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), 
      "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), 
      "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), 
      "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), 
      "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
    : "l"(a), "l"(b), "r"(acc));
#endif
}

// d (+)= A x B with A 64 x 16 in registers (as in mma.m16n8k16, 16 rows a warp), B 16 x 128 in shared memory; Columns: B's rows are k (descriptor_columns).
template <int Kind, bool Columns> __device__ __forceinline__ void wgmma_n128(float (&d)[64], const u32* a, u64 b, int acc) {
#ifdef SPARSETILE_EMULATE
  emulate_wgmma_registers<128>(d, a, b, acc, Kind == BFLOAT16, Columns);
#else
  if constexpr (Kind == BFLOAT16 && Columns)
    asm volatile("{.reg .pred p; setp.ne.b32 p, %69, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, "
    "%26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "
    "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
    "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), 
      "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), 
      "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), 
      "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), 
      "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), 
      "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(acc));
  else if constexpr (Kind == BFLOAT16)
    asm volatile("{.reg .pred p; setp.ne.b32 p, %69, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, "
    "%26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "
    "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
    "}, {%64, %65, %66, %67}, %68, p, 1, 1, 0;}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), 
      "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), 
      "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), 
      "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), 
      "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), 
      "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(acc));
  else if constexpr (Columns)
    asm volatile("{.reg .pred p; setp.ne.b32 p, %69, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, "
    "%26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "
    "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
    "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), 
      "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), 
      "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), 
      "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), 
      "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), 
      "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(acc));
  else
    asm volatile("{.reg .pred p; setp.ne.b32 p, %69, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, "
    "%26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "
    "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
    "}, {%64, %65, %66, %67}, %68, p, 1, 1, 0;}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), 
      "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), 
      "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), 
      "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), 
      "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), 
      "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(acc));
#endif
}

// ------------------------------------------------------------------------------------------------------------------ copies and products of gathered tiles
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

__device__ __forceinline__ void fetch(u32 to, const char* from, int exists) {  // 16 bytes, zeros where nothing is to be read
#ifdef SPARSETILE_EMULATE
  emulate_cp_async(emulate_shared() + to, from, 16, exists);
#else
  asm volatile("{.reg .pred p; setp.eq.s32 p, %2, 0; cp.async.cg.shared.global.L2::256B [%0], [%1], 16, p;}" :: "r"(to), "l"(from), "r"(exists) : "memory");
#endif
}
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }  // known to be: addresses stay in uniform registers
template <int Slots> __device__ __forceinline__ void advance(u32& slot, u32& phase) { if (++slot == Slots) { slot = 0; phase ^= 1; } }  // around a ring

// Any tile: K-major rows of as many bytes as the swizzle is wide (`stride`: 8 rows), or rows of k with 64 columns each (`leading`: the next 64 columns; `stride`: 8 rows)
enum : u64 { SWIZZLE_128 = 1, SWIZZLE_64 = 2, SWIZZLE_32 = 3 };
__device__ __forceinline__ u64 descriptor_of(u32 tile, u32 leading, u32 stride, u64 swizzle) {
  return (u64)((tile & 0x3FFFF) >> 4) | (u64)(leading >> 4) << 16 | (u64)(stride >> 4) << 32 | swizzle << 62;
}

#define SPARSETILE_D16 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}"
#define SPARSETILE_OUT8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define SPARSETILE_OUT64(d) SPARSETILE_OUT8(d, 0), SPARSETILE_OUT8(d, 8), SPARSETILE_OUT8(d, 16), SPARSETILE_OUT8(d, 24), SPARSETILE_OUT8(d, 32), SPARSETILE_OUT8(d, 40), SPARSETILE_OUT8(d, 48), SPARSETILE_OUT8(d, 56)

// d (+)= A x B, A 64 x 16 in registers, B 32 x 16, K-major, in shared memory
template <int Kind> __device__ __forceinline__ void wgmma_n32(float (&d)[16], const u32 (&a)[4], u64 b, int acc) {
#ifdef SPARSETILE_EMULATE
  emulate_wgmma<32>(d, a, 0, b, acc, Kind == BFLOAT16, false);
#else
#define SPARSETILE_MMA(type) asm volatile("{.reg .pred p; setp.ne.b32 p, %21, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type " " SPARSETILE_D16 ", {%16, %17, %18, %19}, %20, p, 1, 1, 0;}" \
    : SPARSETILE_OUT8(d, 0), SPARSETILE_OUT8(d, 8) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(acc))
  if constexpr (Kind == BFLOAT16) SPARSETILE_MMA("bf16");
  else SPARSETILE_MMA("f16");
#undef SPARSETILE_MMA
#endif
}
// the same, A too in shared memory
template <int Kind> __device__ __forceinline__ void wgmma_n32(float (&d)[16], u64 a, u64 b, int acc) {
#ifdef SPARSETILE_EMULATE
  emulate_wgmma<32>(d, nullptr, a, b, acc, Kind == BFLOAT16, false);
#else
#define SPARSETILE_MMA(type) asm volatile("{.reg .pred p; setp.ne.b32 p, %18, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type " " SPARSETILE_D16 ", %16, %17, p, 1, 1, 0, 0;}" \
    : SPARSETILE_OUT8(d, 0), SPARSETILE_OUT8(d, 8) : "l"(a), "l"(b), "r"(acc))
  if constexpr (Kind == BFLOAT16) SPARSETILE_MMA("bf16");
  else SPARSETILE_MMA("f16");
#undef SPARSETILE_MMA
#endif
}
// d (+)= A x B, A 64 x 16, K-major, B 16 x 128, rows of k, both in shared memory
template <int Kind> __device__ __forceinline__ void wgmma_n128_columns(float (&d)[64], u64 a, u64 b, int acc) {
#ifdef SPARSETILE_EMULATE
  emulate_wgmma<128>(d, nullptr, a, b, acc, Kind == BFLOAT16, true);
#else
#define SPARSETILE_MMA(type) asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63" \
    "}, %64, %65, p, 1, 1, 0, 1;}" : SPARSETILE_OUT64(d) : "l"(a), "l"(b), "r"(acc))
  if constexpr (Kind == BFLOAT16) SPARSETILE_MMA("bf16");
  else SPARSETILE_MMA("f16");
#undef SPARSETILE_MMA
#endif
}

// a tensor copy of five axes
__device__ __forceinline__ void tma_load(u32 to, const TensorMap* map, u32 bar, int x, int y, int z, int w, int v) {
#ifdef SPARSETILE_EMULATE
  const int at[5] = {x, y, z, w, v};
  emulate_tma_load(to, map, bar, at, 5);
#else
  asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], [%2];"
    :: "r"(to), "l"(map), "r"(bar), "r"(x), "r"(y), "r"(z), "r"(w), "r"(v) : "memory");
#endif
}
