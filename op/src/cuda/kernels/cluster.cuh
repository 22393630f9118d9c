// Thread block clusters (compute capability 9.0 on): blocks that read each other's shared memory. Before, every block is one.
#pragma once
#include "common.cuh"

// Blocks of a cluster at most.
constexpr int CLUSTER = 8;

DEVICE int cluster_block() {
#if __CUDA_ARCH__ >= 900
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

DEVICE int cluster_blocks() {
#if __CUDA_ARCH__ >= 900
  u32 blocks;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
#else
  return 1;
#endif
}

// What a block has written before it arrives, the others may read after they have waited. All threads of a block call these.
DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
// Where nothing has been written that the others read.
DEVICE void cluster_arrive_only() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
DEVICE void cluster_sync() {
  if (cluster_blocks() == 1) return __syncthreads();
  cluster_arrive();
  cluster_wait();
}

// The value of a variable in shared memory, in the block of that rank.
template <class T> DEVICE T of_block(const void* variable, u32 rank) {
#if __CUDA_ARCH__ >= 900
  u32 address = __cvta_generic_to_shared(variable);
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(address), "r"(rank));
  T x;
  if constexpr (sizeof(T) == 8)
    asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(x) : "r"(address) : "memory");
  else
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
#else
  return *static_cast<const T*>(variable);
#endif
}
