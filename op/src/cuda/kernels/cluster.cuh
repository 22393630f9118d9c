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
DEVICE uint2 read_of(const uint2& mine, int rank) {
  uint2 x;
  asm volatile("ld." OF_CLUSTER ".v2.u32 {%0, %1}, [%2];"
               : "=r"(x.x), "=r"(x.y)
               : "r"(address_of(mine, rank))
               : "memory");
  return x;
}

// Letters: numbers that blocks write into one another's memory, each of which counts itself in the receiver's box, so
// that nobody waits for a whole block, nor for what it has written elsewhere, as a barrier of the cluster does. A box
// is used again only behind such a barrier.
struct Letterbox {
  u64 barrier;

  // By one thread, before the first barrier of the cluster, of which cluster_opened is the first half.
  DEVICE void open() {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(address()) : "memory");
#endif
  }
  // By one thread: so many bytes come to this block.
  DEVICE void expect(u32 bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes) : "memory");
#endif
  }
  // Into block `rank`'s copy of a variable, and counts it in its copy of this box.
  DEVICE void send(u32& mine, int rank, u32 value) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(address_of(mine, rank)),
        "r"(value), "r"(address_of(barrier, rank))
        : "memory");
#endif
  }
  DEVICE void send(uint2& mine, int rank, uint2 value) {
#if __CUDA_ARCH__ >= 900
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(
                     address_of(mine, rank)),
                 "r"(value.x), "r"(value.y), "r"(address_of(barrier, rank))
                 : "memory");
#endif
  }
  DEVICE void send(u64& mine, int rank, u64 value) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(address_of(mine, rank)),
        "l"(value), "r"(address_of(barrier, rank))
        : "memory");
#endif
  }
  // Until all that was expected the `time`-th time is there, from 0 on.
  DEVICE void wait(u32 time) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n"
        ".reg .pred there;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 there, [%0], %1;\n"
        "@there bra done;\n"
        "bra again;\n"
        "done:\n"
        "}" ::"r"(address()),
        "r"(time & 1u)
        : "memory");
#endif
  }

 private:
  DEVICE u32 address() { return u32(__cvta_generic_to_shared(&barrier)); }
};
// Shows the boxes that this block has opened to the others; cluster_wait ends it.
DEVICE void cluster_opened() {
#if __CUDA_ARCH__ >= 900
  if (cluster_size() == 1) return;
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}
