// Selector bounds: elementwise minimum and maximum of a page's keys (op/src/selector/bounds.rs).
#pragma once
#include "page_vectors.cuh"

struct Bounds : PageVectors<Bounds> {
  // The score is the sum of both products, and needs no scale without a softmax over pages.
  static constexpr bool SQUARES = false, LINE = false, LOG_MASS = false;

  // sum_d max(q kmin, q kmax) = min(q, 0) . kmin + max(q, 0) . kmax
  static DEVICE void prepare(float q, float& first, float& second) { first = fminf(q, 0.f), second = fmaxf(q, 0.f); }

  static DEVICE float score(const Params& p, float first, float second, float, float) {
    return or_first(p.group_score == SOFTMAX ? p.scale * (first + second) : first + second);
  }

  template <class T> static DEVICE void summarize(const T* keys, int d, int rows, T* summary, float* stored) {
#pragma unroll 1
    for (int c = threadIdx.x; c < d; c += blockDim.x) {
      float a, b;
      a = b = widen(keys[c]);
#pragma unroll 4
      for (int r = 1; r < rows; r++) {
        const float x = widen(keys[size_t(r) * d + c]);
        // A NaN stays: the page's score becomes NaN too.
        a = min_or_nan(a, x), b = max_or_nan(b, x);
      }
      store_vectors(summary, stored, d, c, a, b);
    }
  }

  template <class T, int PARTS, int KEPT>
  static DEVICE void summarize_by_warp(const T* keys, int d, int rows, Columns<PARTS>& a, Columns<PARTS>& b) {
    a.load(keys, d), b = a;
#pragma unroll 4
    for (int r = 1; r < rows; r++) {
      Columns<PARTS> row;
      row.load(keys + size_t(r) * d, d);
      Columns<PARTS>::each([&](int k, int e) {
        a.x[k][e] = min_or_nan(a.x[k][e], row.x[k][e]), b.x[k][e] = max_or_nan(b.x[k][e], row.x[k][e]);
      });
    }
  }
};
