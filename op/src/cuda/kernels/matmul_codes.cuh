// Weights of 4 and 8 bits as floats for tensor cores.
#pragma once
#include "mma.cuh"

// X & MASK | BITS, in one instruction.
#define MASKED(X, MASK, BITS)                                                                 \
  ([&] {                                                                                      \
    u32 y;                                                                                    \
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(X), "n"(int(MASK)), "n"(int(BITS))); \
    return y;                                                                                 \
  }())

// A word of codes as pairs of floats, in the order of the pairs of A's elements that they are multiplied with: 4 bits:
// elements (0, 4), (1, 5), (2, 6), (3, 7) of eight; 8 bits: (0, 1), (2, 3) of four.
//
// A code c stands for c - 2^(BITS - 1). Setting a code into a float's mantissa is one instruction, but makes it larger
// by a power of two. `offset` is what must be added to a pair of such floats. Added to the sums, by products of their
// own, it costs two instructions where adding it to each weight costs sixteen; the sums are in f32, and what they lose
// is 2^-16 of the largest term, less than rounding a weight to float16 does.
template <class T, int BITS> struct Codes;

template <> struct Codes<F16, 4> {
  static constexpr int PAIRS = 4;
  static constexpr bool HAS_OFFSET = true;
  static DEVICE void unpack(u32 w, u32 (&x)[4]) {
    // 1024 + c in steps of 1; 64 + c in steps of 1/16.
    x[0] = MASKED(w, 0x000f000f, 0x64006400), x[1] = MASKED(w, 0x00f000f0, 0x54005400);
    w >>= 8;
    x[2] = MASKED(w, 0x000f000f, 0x64006400), x[3] = MASKED(w, 0x00f000f0, 0x54005400);
  }
  // -1032, -72
  static DEVICE u32 offset(int pair) { return pair & 1 ? 0xd480d480u : 0xe408e408u; }
};

template <> struct Codes<BF16, 4> {
  static constexpr int PAIRS = 4;
  static constexpr bool HAS_OFFSET = true;
  static DEVICE void unpack(u32 w, u32 (&x)[4]) {
    // 128 + c in steps of 1; 16 + c in steps of 1/8.
    x[0] = MASKED(w, 0x000f000f, 0x43004300), x[1] = MASKED(w >> 1, 0x00780078, 0x41804180);
    x[2] = MASKED(w >> 8, 0x000f000f, 0x43004300), x[3] = MASKED(w >> 9, 0x00780078, 0x41804180);
  }
  // -136, -24
  static DEVICE u32 offset(int pair) { return pair & 1 ? 0xc1c0c1c0u : 0xc308c308u; }
};

template <> struct Codes<F16, 8> {
  static constexpr int PAIRS = 2;
  static constexpr bool HAS_OFFSET = true;
  static DEVICE void unpack(u32 w, u32 (&x)[2]) {
    // 1024 + c
    x[0] = __byte_perm(w, 0x64646464u, 0x4140), x[1] = __byte_perm(w, 0x64646464u, 0x4342);
  }
  // -1152
  static DEVICE u32 offset(int) { return 0xe480e480u; }
};

template <> struct Codes<BF16, 8> {
  static constexpr int PAIRS = 2;
  static constexpr bool HAS_OFFSET = false;
  static DEVICE void unpack(u32 w, u32 (&x)[2]) {
    // The mantissa has eight bits: enough for c - 128, and not for more. By way of 2^23 + c in f32.
    float f[4];
#pragma unroll
    for (int i = 0; i < 4; i++) f[i] = __uint_as_float(__byte_perm(w, 0x4b000000u, 0x7650 | i)) - 8388736.f;
    x[0] = Mma<BF16>::pack(f[0], f[1]), x[1] = Mma<BF16>::pack(f[2], f[3]);
  }
  static DEVICE u32 offset(int) { return 0; }
};

// A pair of ones.
DEVICE u32 ones(F16) { return 0x3c003c00u; }
DEVICE u32 ones(BF16) { return 0x3f803f80u; }
