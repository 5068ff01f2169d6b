// Clusters of CLUSTER blocks of threads (1: a block by itself) that share what the copy engine brings: each loads a part for all of them, and a place in shared memory is free
// when all have left it. Ends with cluster_sync: nobody may leave while another may still arrive at its barriers.
#pragma once
#include "hopper.cuh"

#ifdef SPARSETILE_EMULATE
inline void arrive_at(u32 bar, u32, bool doit) { if (doit) emulate_barrier_arrive(bar); }
inline void load_for_all(u32 to, const TensorMap* map, u32 bar, int x, int y, int z) { tma_load(to, map, bar, x, y, z); }
inline void cluster_sync() { __syncthreads(); }
inline u32 cluster_rank() { return 0; }
#else
// at `bar` of block `cta` of the cluster, by the threads that say so; predicated inside, so that ptxas sees no divergent branch between products
__device__ __forceinline__ void arrive_at(u32 bar, u32 cta, bool doit) {
  asm volatile("{.reg .b32 r; .reg .pred p; setp.ne.b32 p, %2, 0; mapa.shared::cluster.u32 r, %0, %1; @p mbarrier.arrive.shared::cluster.b64 _, [r];}" :: "r"(bar), "r"(cta), "r"((int)doit) : "memory");
}
// to the same place of every block of the cluster; each has to expect the bytes at its own barrier
__device__ __forceinline__ void load_for_all(u32 to, const TensorMap* map, u32 bar, int x, int y, int z) {
  if constexpr (CLUSTER == 1) tma_load(to, map, bar, x, y, z);
  else asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;"
    :: "r"(to), "l"(map), "r"(bar), "r"(x), "r"(y), "r"(z), "h"((u16)((1 << CLUSTER) - 1)) : "memory");
}
__device__ __forceinline__ void cluster_sync() { asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ __forceinline__ u32 cluster_rank() { u32 x; asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(x)); return x; }
#endif
#if CLUSTER > 1
#define CLUSTER_DIMS __cluster_dims__(CLUSTER, 1, 1)  // of an entry
#else
#define CLUSTER_DIMS
#endif
