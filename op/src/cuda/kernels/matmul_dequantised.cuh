// What ai.retro::MatMulNBits does beside the host's own product where its rows are many: dequantises the weights, adds
// the bias.
#pragma once
#include "common.cuh"

// The code of 4 or 8 bits at place i.
DEVICE int code_at(const MatmulParams& p, const u8* codes, int i) {
  return p.bits == 8 ? codes[i] : (codes[i >> 1] >> 4 * (i & 1)) & 15;
}

// Weights `[N, K]` of 4 or 8 bits as T. The grid's x has a row for each, its y the depth, by eight a thread.
template <class T> DEVICE void dequantise_weights(const MatmulParams& p) {
  wait_for_previous();
  const int n = blockIdx.x, first = 8 * (blockIdx.y * blockDim.x + threadIdx.x);
  if (first >= p.k) return;
  const u8* codes = static_cast<const u8*>(p.b) + size_t(n) * p.b_stride;
  const u8* zeros = static_cast<const u8*>(p.zeros) + size_t(n) * p.zero_stride;
  const T* scales = static_cast<const T*>(p.scales) + size_t(n) * p.blocks;
  T* row = static_cast<T*>(p.dequantised) + size_t(n) * p.k + first;
  float x[8];
  int block = -1;
  float zero = 0.f, scale = 0.f;
  const int count = min(8, p.k - first);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    if (i >= count) break;
    const int of = p.block_of ? p.block_of[first + i] : (first + i) / p.block_size;
    if (of != block) {
      block = of;
      // Only g_idx can name a block that there is not.
      const bool there = block >= 0 && block < p.blocks;
      const int at = there ? block : 0;
      zero = p.zero_points == NO_ZERO_POINTS      ? 1 << (p.bits - 1)
             : p.zero_points == FLOAT_ZERO_POINTS ? widen(reinterpret_cast<const T*>(zeros)[at])
                                                  : code_at(p, zeros, at);
      scale = there ? widen(scales[at]) : NOT_A_NUMBER;
    }
    x[i] = (code_at(p, codes, first + i) - zero) * scale;
  }
  // Rows begin at a multiple of 16 bytes then.
  if (p.k % 8 == 0) {
    store8(row, x);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; i++)
    if (i < count) narrow(x[i], row[i]);
}

// Y `[rows, N]` += bias. The grid's x has the rows.
template <class T> DEVICE void add_bias(const MatmulParams& p) {
  wait_for_previous();
  const int n = blockIdx.y * blockDim.x + threadIdx.x;
  if (n >= p.n) return;
  T& y = static_cast<T*>(p.y)[size_t(blockIdx.x) * p.n + n];
  narrow(widen(y) + widen(static_cast<const T*>(p.bias)[n]), y);
}
