// Selector signed_moments: as moments, each deviation with the sign of about the first principal direction
// (op/src/selector/signed_moments.rs).
#pragma once
#include "selector/moments.cuh"

// Rounds of the power iteration that finds the principal direction.
constexpr int ROUNDS = 2;
// Elements of 0 but for rounding count as positive.
constexpr float LEAST_NEGATIVE = -1e-5f;
// A row that is farther than another one but for rounding is not, so that every execution provider starts from the same
// one.
constexpr float FARTHER = 1.00001f;

// Which of a page's deviations are negative.
template <class T>
DEVICE void principal_signs(const T* keys, const float* mean /* [D] */, int d, int rows, bool* negative /* [D] */) {
  __shared__ float direction[MAX_HEAD_SIZE], along[MAX_PAGE_SIZE], tops[32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
#pragma unroll 1
  for (int round = 0; round <= ROUNDS; round++) {
    // Every row's product with the direction, at first with itself.
#pragma unroll 1
    for (int r = warp; r < rows; r += warps) {
      float sum = 0.f;
#pragma unroll 1
      for (int c = 4 * lane; c < d; c += 128) {
        float x[4];
        load4(keys + size_t(r) * d + c, x);
#pragma unroll
        for (int e = 0; e < 4; e++) {
          x[e] -= mean[c + e];
          sum = fmaf(round ? direction[c + e] : x[e], x[e], sum);
        }
      }
      sum = warp_sum(sum);
      if (lane == 0) along[r] = sum;
    }
    __syncthreads();
    if (round == 0) {
      int farthest = 0;
      float most = 0.f;
#pragma unroll 2
      for (int r = 0; r < rows; r++)
        if (along[r] > most * FARTHER) farthest = r, most = along[r];
#pragma unroll 1
      for (int c = threadIdx.x; c < d; c += blockDim.x) direction[c] = widen(keys[size_t(farthest) * d + c]) - mean[c];
    } else {
      float top = 0.f;
#pragma unroll 1
      for (int c = threadIdx.x; c < d; c += blockDim.x) {
        float next = 0.f;
#pragma unroll 4
        for (int r = 0; r < rows; r++) next = fmaf(along[r], widen(keys[size_t(r) * d + c]) - mean[c], next);
        direction[c] = next;
        top = fmaxf(top, fabsf(next));
      }
      top = warp_max(top);
      if (lane == 0) tops[warp] = top;
      __syncthreads();
      // Kept in range: each round multiplies by a variance.
      top = warp_max(lane < warps ? tops[lane] : 0.f);
      const float inverse = top > 0.f ? 1.f / top : 0.f;
#pragma unroll 1
      for (int c = threadIdx.x; c < d; c += blockDim.x) direction[c] *= inverse;
    }
    __syncthreads();
  }
#pragma unroll 1
  for (int c = threadIdx.x; c < d; c += blockDim.x) negative[c] = direction[c] < LEAST_NEGATIVE;
}

// The direction whose negative elements are those of principal_signs.
template <class T, int PARTS, int KEPT>
DEVICE Columns<PARTS> principal_direction(const Deviations<T, PARTS, KEPT>& of) {
  int farthest = 0;
  float most = 0.f;
  of.each_row([&](int r) {
    const Columns<PARTS> row = of.row(r);
    const float far = row.dot(row);
    if (far > most * FARTHER) farthest = r, most = far;
  });
  Columns<PARTS> direction = of.deviation(farthest);
#pragma unroll 1
  for (int round = 0; round < ROUNDS; round++) {
    Columns<PARTS> next;
    next.fill(0.f);
    of.each_row([&](int r) {
      const Columns<PARTS> row = of.row(r);
      const float along = row.dot(direction);
      Columns<PARTS>::each([&](int k, int e) { next.x[k][e] = fmaf(along, row.x[k][e], next.x[k][e]); });
    });
    float top = 0.f;
    Columns<PARTS>::each([&](int k, int e) { top = fmaxf(top, fabsf(next.x[k][e])); });
    top = warp_max(top);
    const float inverse = top > 0.f ? 1.f / top : 0.f;
    // Kept in range, as above.
    Columns<PARTS>::each([&](int k, int e) { direction.x[k][e] = next.x[k][e] * inverse; });
  }
  return direction;
}

struct SignedMoments : PageVectors<SignedMoments> {
  // Also the query's product with the signed deviations.
  static constexpr bool SQUARES = true, LINE = true, LOG_MASS = true;

  static DEVICE void prepare(float q, float& first, float& second) { Moments::prepare(q, first, second); }

  static DEVICE float score(const Params& p, float first, float second, float line, float log_count) {
    return Moments::score(p, first, p.correlation * line * line + (1.f - p.correlation) * second, 0.f, log_count);
  }

  template <class T> static DEVICE void summarize(const T* keys, int d, int rows, T* summary, float* stored) {
    __shared__ float mean[MAX_HEAD_SIZE];
    __shared__ bool negative[MAX_HEAD_SIZE];
    mean_of(keys, d, rows, mean);
    principal_signs<T>(keys, mean, d, rows, negative);
#pragma unroll 1
    for (int c = threadIdx.x; c < d; c += blockDim.x) {
      const float deviation = deviation_of(keys, d, rows, c, mean[c]);
      store_vectors(summary, stored, d, c, mean[c], negative[c] ? -deviation : deviation);
    }
  }

  template <class T, int PARTS, int KEPT>
  static DEVICE void summarize_by_warp(const T* keys, int d, int rows, Columns<PARTS>& a, Columns<PARTS>& b) {
    const Deviations<T, PARTS, KEPT> deviations(keys, d, rows);
    a = deviations.mean, b = deviations.spread();
    const Columns<PARTS> direction = principal_direction(deviations);
    Columns<PARTS>::each([&](int k, int e) {
      if (direction.x[k][e] < LEAST_NEGATIVE) b.x[k][e] = -b.x[k][e];
    });
  }
};
