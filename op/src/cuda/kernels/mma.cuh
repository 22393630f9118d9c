// Tensor cores: D = A B + C on 16 x 8 x 16 tiles of float16 or bfloat16, summed in f32.
//
// In a fragment, lane l holds of A (16 x 16) rows l / 4 and l / 4 + 8, of B (16 x 8) column l / 4, both at depths 2 (l
// % 4) + {0, 1} and 8 more; of C (16 x 8) rows l / 4 and l / 4 + 8 at columns 2 (l % 4) + {0, 1}.
#pragma once
#include "common.cuh"

template <class T> struct Mma;
#define DEFINE_MMA(T, NAME)                                                                 \
  template <> struct Mma<T> {                                                               \
    static DEVICE void add(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) { \
      asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                            \
          ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "                                    \
          "{%0,%1,%2,%3};"                                                                  \
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                  \
          : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                          \
    }                                                                                       \
    static DEVICE u32 pack(float low, float high) {                                         \
      u32 x;                                                                                \
      asm("cvt.rn." NAME "x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));             \
      return x;                                                                             \
    }                                                                                       \
  };
DEFINE_MMA(F16, "f16")
DEFINE_MMA(BF16, "bf16")

DEVICE u32 transpose8x8(u32 x) {
  u32 y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Four 8 x 8 matrices of 16-bit elements from shared memory. Lane l gives the address of row l % 8 of matrix l / 8, and
// gets of each matrix elements 2 (l % 4) + {0, 1} of row l / 4.
DEVICE void load_matrices(u32 (&x)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address));
}
