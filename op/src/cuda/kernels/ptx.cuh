// Element types, and whatever C++ has no words for: inline PTX, all that the kernels but for attention and selection
// have.
//
// The tests compile the kernels' text for the CPU too (op/tests/kernels_on_cpu/), with other bodies for these.
#pragma once

#include "params.cuh"

#ifndef RETRO_ON_CPU
#define DEVICE __device__ __forceinline__
// What few steps run, out of the others' way.
#define RARE __device__ __noinline__
#endif

// Element types of caches and activations; arithmetic is in f32.
struct F32 {
  float v;
};
struct F16 {
  u16 v;
};
struct BF16 {
  u16 v;
};

DEVICE float widen(F32 x) { return x.v; }
DEVICE float widen(BF16 x) { return __uint_as_float(u32(x.v) << 16); }
DEVICE void narrow(float x, F32& y) { y.v = x; }

#ifdef RETRO_ON_CPU
#include "ptx_on_cpu.h"
#else

DEVICE float widen(F16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.v));
  return y;
}
DEVICE void narrow(float x, F16& y) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.v) : "f"(x)); }
DEVICE void narrow(float x, BF16& y) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.v) : "f"(x)); }

// Kernels of a step are launched so that one may start while the one before it drains (programmatic dependent launch).
// Whatever it reads of the other's results comes after wait_for_previous; older targets run the kernels one by one.
DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// What a block has written before it adds to a head's progress, others see who read it.
DEVICE void add_progress(u32* progress) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(progress) : "memory");
}
DEVICE u32 read_progress(const u32* progress) {
  u32 seen;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(progress) : "memory");
  return seen;
}

// A page that has been chosen tells so itself.
DEVICE void announce_page(int* listed, int page) {
  asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" ::"l"(listed), "r"(page + 1) : "memory");
}
// 0 as long as it has not been.
DEVICE int announced_page(const int* listed) {
  int page;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(page) : "l"(listed));
  return page;
}

// Copies 16 bytes into shared memory (an address there), or zeros; a thread waits until no more than `left` of its
// groups are under way, at most 2.
DEVICE void copy_async(u32 target, const void* source, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(there ? 16 : 0)
               : "memory");
}
DEVICE void copy_chunk(void* target /* in shared memory */, const void* source) {
  copy_async(u32(__cvta_generic_to_shared(target)), source, true);
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
DEVICE void wait_for_copies(int left) {
  if (left == 2)
    asm volatile("cp.async.wait_group 2;" ::: "memory");
  else if (left == 1)
    asm volatile("cp.async.wait_group 1;" ::: "memory");
  else
    asm volatile("cp.async.wait_group 0;" ::: "memory");
}

// To the last bit or two, and without the care for the smallest numbers: one instruction each.
DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float sqrt_fast(float x) {
  float y;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The lesser and the larger; NaN where one is.
DEVICE float min_or_nan(float a, float b) {
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
DEVICE float max_or_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// On tensor cores, D = A B + C on 16 x 8 x 32 tiles of integers: A of unsigned bytes, B of signed ones, sums in 32
// bits. In a fragment, lane l holds of A (16 x 32) rows l / 4 and l / 4 + 8, of B (32 x 8) column l / 4, both at depths
// 4 (l % 4) to 4 (l % 4) + 3 and 16 more, a byte each; of C (16 x 8) rows l / 4 and l / 4 + 8 at columns 2 (l % 4) +
// {0, 1}.
DEVICE void add_byte_products(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif
