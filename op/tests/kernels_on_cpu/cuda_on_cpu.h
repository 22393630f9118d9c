// As much of CUDA C++ as the sketch's kernels use, on the CPU: a block's threads are fibers of one thread, which take
// turns where they wait for one another. For tests: it shows what a kernel computes, not how it behaves in time.
//
// Kernels have no shared memory of their own here, only what they are launched with.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <vector>

#define RETRO_ON_CPU
#define DEVICE inline
#define RARE inline
#define __host__
#define __device__
#define __shared__
#define __align__(bytes) __attribute__((aligned(bytes)))

struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
};

extern dim3 blockIdx, blockDim, gridDim;
// Of the thread whose turn it is.
unsigned this_thread();
struct ThreadIndex {
  unsigned x;
};
#define threadIdx (ThreadIndex{this_thread()})

// Runs a block of threads to its end.
void launch_block(unsigned threads, const std::function<void()>& kernel);
// Blocks that were launched so far.
unsigned blocks_launched();

void __syncthreads();
// Waits for the other threads of the warp.
void wait_for_warp();
// Memory that the lanes of a warp exchange values through: of this lane, and of any. Two in turn, so that nobody writes
// what others still read.
struct Lanes {
  uint64_t words[32][4];
};
Lanes& next_exchange();
inline void __syncwarp() { wait_for_warp(); }

// Every lane's value, once all have given theirs.
template <class T> struct Exchanged {
  const Lanes& lanes;
  T operator[](unsigned lane) const {
    T value;
    memcpy(&value, lanes.words[lane], sizeof value);
    return value;
  }
};
template <class T> Exchanged<T> exchange(T mine) {
  static_assert(sizeof(T) <= sizeof(Lanes::words[0]), "it fits");
  Lanes& lanes = next_exchange();
  memcpy(lanes.words[this_thread() % 32], &mine, sizeof mine);
  wait_for_warp();
  return {lanes};
}

template <class T> T __shfl_xor_sync(unsigned, T value, unsigned mask) {
  return exchange(value)[(this_thread() ^ mask) % 32];
}
template <class T> T __shfl_sync(unsigned, T value, unsigned lane) { return exchange(value)[lane % 32]; }
template <class T> T __shfl_up_sync(unsigned, T value, unsigned by) {
  const unsigned lane = this_thread() % 32;
  return exchange(value)[lane < by ? lane : lane - by];
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  const auto all = exchange(vote);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < 32; lane++) votes |= unsigned(all[lane]) << lane;
  return votes;
}
inline int __ffs(unsigned bits) { return __builtin_ffs(int(bits)); }
template <class T, class F> T reduced(T value, F join) {
  const auto all = exchange(value);
  T result = all[0];
  for (unsigned lane = 1; lane < 32; lane++) result = join(result, all[lane]);
  return result;
}
template <class T> T __reduce_add_sync(unsigned, T value) {
  return reduced(value, [](T a, T b) { return T(a + b); });
}
template <class T> T __reduce_max_sync(unsigned, T value) {
  return reduced(value, [](T a, T b) { return a > b ? a : b; });
}
template <class T> T __reduce_min_sync(unsigned, T value) {
  return reduced(value, [](T a, T b) { return a < b ? a : b; });
}

inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline double __longlong_as_double(long long bits) {
  double x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
template <class T> T __ldcg(const T* from) { return *from; }
template <class T> T __ldcs(const T* from) { return *from; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
