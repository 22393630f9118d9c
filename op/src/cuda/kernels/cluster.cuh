// Blocks that work together: a cluster along the grid's x, of a power of two of them. They are on the device at the
// same time, wait for one another and read and write one another's shared memory. Where the device has no clusters, or
// one block does the work, the grid's x is 1.
#pragma once
#include "common.cuh"

DEVICE int cluster_size() { return gridDim.x; }
DEVICE int cluster_rank() { return blockIdx.x; }

// Every thread of the cluster calls these; what was written before is seen behind them. cluster_arrive and cluster_wait
// are a barrier in two halves, and nothing where there is one block.
DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  if (cluster_size() > 1) asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  if (cluster_size() > 1) asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}
DEVICE void cluster_sync() {
  if (cluster_size() > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }
}

// The address of a variable of this block's shared memory in that of another block.
template <class V> DEVICE u32 address_of(const V& mine, int rank) {
  u32 address = u32(__cvta_generic_to_shared(&mine));
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(rank));
#endif
  return address;
}
#if __CUDA_ARCH__ >= 900
#define OF_CLUSTER "shared::cluster"
#else
#define OF_CLUSTER "shared"
#endif
// Another block's copy of a variable.
DEVICE u32 read_of(const u32& mine, int rank) {
  u32 x;
  asm volatile("ld." OF_CLUSTER ".u32 %0, [%1];" : "=r"(x) : "r"(address_of(mine, rank)) : "memory");
  return x;
}
DEVICE uint2 read_of(const uint2& mine, int rank) {
  uint2 x;
  asm volatile("ld." OF_CLUSTER ".v2.u32 {%0, %1}, [%2];"
               : "=r"(x.x), "=r"(x.y)
               : "r"(address_of(mine, rank))
               : "memory");
  return x;
}
DEVICE void write_of(u64& mine, int rank, u64 value) {
  asm volatile("st." OF_CLUSTER ".u64 [%0], %1;" ::"r"(address_of(mine, rank)), "l"(value) : "memory");
}
