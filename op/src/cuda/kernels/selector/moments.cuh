// Selector moments: mean and standard deviation of a page's keys (op/src/selector/moments.rs).
//
// By a block, where one page holds a step up, or by a warp, where a prefill has many: the same sums in the same order.
#pragma once
#include "page_vectors.cuh"

// The deviations of a page's rows from their mean: of up to KEPT rows in registers, where KEPT is not 0; else computed
// when asked for.
template <class T, int PARTS, int KEPT> struct Deviations {
  const T* keys;
  int d, rows;
  Columns<PARTS> mean, kept[KEPT ? KEPT : 1];

  // visit(row's number), of registers those without a row too, which hold zeros: no branch, so that rows' sums overlap.
  template <class V> DEVICE void each_row(V&& visit) const {
    if constexpr (KEPT > 0) {
#pragma unroll
      for (int r = 0; r < KEPT; r++) visit(r);
    } else {
#pragma unroll 4
      for (int r = 0; r < rows; r++) visit(r);
    }
  }
  DEVICE Columns<PARTS> load(int r) const {
    Columns<PARTS> row;
    row.load(keys + size_t(min(r, rows - 1)) * d, d);
    if (r >= rows) row.fill(0.f);
    return row;
  }
  DEVICE Columns<PARTS> deviation(int r) const {
    Columns<PARTS> row = load(r);
    Columns<PARTS>::each([&](int k, int e) { row.x[k][e] = r < rows ? row.x[k][e] - mean.x[k][e] : 0.f; });
    return row;
  }
  DEVICE Columns<PARTS> row(int r) const {
    if constexpr (KEPT > 0)
      return kept[r];
    else
      return deviation(r);
  }
  DEVICE Deviations(const T* keys, int d, int rows) : keys(keys), d(d), rows(rows) {
    mean.fill(0.f);
    each_row([&](int r) {
      const Columns<PARTS> of = load(r);
      if constexpr (KEPT > 0) kept[r] = of;
      Columns<PARTS>::each([&](int k, int e) { mean.x[k][e] += of.x[k][e]; });
    });
    const float share = 1.f / float(rows);
    Columns<PARTS>::each([&](int k, int e) { mean.x[k][e] *= share; });
    if constexpr (KEPT > 0)
      each_row([&](int r) {
        Columns<PARTS>::each([&](int k, int e) { kept[r].x[k][e] = r < rows ? kept[r].x[k][e] - mean.x[k][e] : 0.f; });
      });
  }

  // The square roots of the mean squares.
  DEVICE Columns<PARTS> spread() const {
    Columns<PARTS> square;
    square.fill(0.f);
    each_row([&](int r) {
      const Columns<PARTS> of = row(r);
      Columns<PARTS>::each([&](int k, int e) { square.x[k][e] = fmaf(of.x[k][e], of.x[k][e], square.x[k][e]); });
    });
    const float share = 1.f / float(rows);
    Columns<PARTS>::each([&](int k, int e) { square.x[k][e] = sqrtf(square.x[k][e] * share); });
    return square;
  }
};

// The mean of a page's rows, by a block, which has it after a barrier.
template <class T> DEVICE void mean_of(const T* keys, int d, int rows, float* mean /* [D] */) {
#pragma unroll 1
  for (int c = threadIdx.x; c < d; c += blockDim.x) {
    float sum = 0.f;
#pragma unroll 4
    for (int r = 0; r < rows; r++) sum += widen(keys[size_t(r) * d + c]);
    mean[c] = sum * (1.f / float(rows));
  }
  __syncthreads();
}

// The standard deviation of element c.
template <class T> DEVICE float deviation_of(const T* keys, int d, int rows, int c, float mean) {
  float square = 0.f;
#pragma unroll 4
  for (int r = 0; r < rows; r++) {
    const float x = widen(keys[size_t(r) * d + c]) - mean;
    square = fmaf(x, x, square);
  }
  return sqrtf(square * (1.f / float(rows)));
}

struct Moments : PageVectors<Moments> {
  // The second product is with squares; a score is a log mass, which counts the page's tokens.
  static constexpr bool SQUARES = true, LINE = false, LOG_MASS = true;

  static DEVICE void prepare(float q, float& first, float& second) { first = q, second = q * q; }

  static DEVICE float score(const Params& p, float first, float second, float, float log_count) {
    return or_first(p.scale * (first + p.lambda * sqrt_fast(second)) + log_count);
  }

  template <class T> static DEVICE void summarize(const T* keys, int d, int rows, T* summary, float* stored) {
    __shared__ float mean[MAX_HEAD_SIZE];
    mean_of(keys, d, rows, mean);
#pragma unroll 1
    for (int c = threadIdx.x; c < d; c += blockDim.x)
      store_vectors(summary, stored, d, c, mean[c], deviation_of(keys, d, rows, c, mean[c]));
  }

  template <class T, int PARTS, int KEPT>
  static DEVICE void summarize_by_warp(const T* keys, int d, int rows, Columns<PARTS>& a, Columns<PARTS>& b) {
    const Deviations<T, PARTS, KEPT> deviations(keys, d, rows);
    a = deviations.mean, b = deviations.spread();
  }
};
