// Page summaries (docs/method.md): bounds of a page's keys; or their mean and standard deviation, with the signs of about the first
// principal direction, as the CPU's method/summary.rs finds it.
//
// By a block, where one page holds a step up, or by a warp, where a prefill has many: the same sums in the same order.
#pragma once
#include "common.cuh"

// Rounds of the power iteration that finds the principal direction.
constexpr int ROUNDS = 2;
// Elements of 0 but for rounding count as positive.
constexpr float LEAST_NEGATIVE = -1e-5f;
// A row that is farther than another one but for rounding is not, so that every execution provider starts from the same one.
constexpr float FARTHER = 1.00001f;

// Whether the selector is bounds. A kernel without MOMENT knows.
template <bool MOMENT> DEVICE bool is_bounds(const Params& p) { return !MOMENT || p.selector == BOUNDS; }

// The rows of a page in the cache.
template <class T> DEVICE T* page_keys(const Params& p, int pair, int page) {
  return static_cast<T*>(p.key_cache) + (size_t(pair) * p.capacity + (size_t(page) << p.page_shift)) * p.head_size;
}
// Its summary, [2, D].
template <class T> DEVICE T* page_summary(const Params& p, int pair, int page) {
  return static_cast<T*>(p.page_state) + (size_t(pair) * p.cache_pages + page) * 2 * p.head_size;
}

// Four neighbouring elements, aligned.
DEVICE void load4(const F32* p, float (&x)[4]) {
  const float4 a = *reinterpret_cast<const float4*>(p);
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
}
template <class T> DEVICE void load4(const T* p, float (&x)[4]) {
  const uint2 a = *reinterpret_cast<const uint2*>(p);
  x[0] = widen(T{u16(a.x)}), x[1] = widen(T{u16(a.x >> 16)}), x[2] = widen(T{u16(a.y)}), x[3] = widen(T{u16(a.y >> 16)});
}
DEVICE void store4(F32* p, const float (&x)[4]) { *reinterpret_cast<float4*>(p) = {x[0], x[1], x[2], x[3]}; }
template <class T> DEVICE void store4(T* p, const float (&x)[4]) {
  T y[4];
#pragma unroll
  for (int e = 0; e < 4; e++) narrow(x[e], y[e]);
  *reinterpret_cast<uint2*>(p) = {y[0].v | u32(y[1].v) << 16, y[2].v | u32(y[3].v) << 16};
}

// ---- by a block ------------------------------------------------------------------------------------------------------

// Which of a page's deviations are negative.
template <class T> DEVICE void principal_signs(const T* keys, const float* mean /* [D] */, int d, int rows, bool* negative /* [D] */) {
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

// Recomputes a page's summary from its valid rows; every thread takes whole columns.
template <class T, bool MOMENT>
DEVICE void summarize(const Params& p, int pair, int page, int rows, const T* keys, float* stored /* [2, D] */) {
  const int d = p.head_size;
  T* const summary = page_summary<T>(p, pair, page);
  __shared__ float mean[MAX_HEAD_SIZE];
  __shared__ bool negative[MAX_HEAD_SIZE];
  if (!is_bounds<MOMENT>(p)) {
#pragma unroll 1
    for (int c = threadIdx.x; c < d; c += blockDim.x) {
      float sum = 0.f;
#pragma unroll 4
      for (int r = 0; r < rows; r++) sum += widen(keys[size_t(r) * d + c]);
      mean[c] = sum * (1.f / float(rows));
    }
    __syncthreads();
    if (p.selector == SIGNED_MOMENTS) principal_signs<T>(keys, mean, d, rows, negative);
  }
#pragma unroll 1
  for (int c = threadIdx.x; c < d; c += blockDim.x) {
    float a, b;
    if (is_bounds<MOMENT>(p)) {
      a = b = widen(keys[c]);
#pragma unroll 4
      for (int r = 1; r < rows; r++) {
        const float x = widen(keys[size_t(r) * d + c]);
        // A NaN stays: the page's score becomes NaN too.
        a = min_or_nan(a, x), b = max_or_nan(b, x);
      }
    } else {
      float square = 0.f;
      a = mean[c];
#pragma unroll 4
      for (int r = 0; r < rows; r++) {
        const float x = widen(keys[size_t(r) * d + c]) - a;
        square = fmaf(x, x, square);
      }
      b = sqrtf(square * (1.f / float(rows)));
      if (p.selector == SIGNED_MOMENTS && negative[c]) b = -b;
    }
    T ra, rb;
    narrow(a, ra), narrow(b, rb);
    summary[c] = ra, summary[d + c] = rb;
    stored[c] = widen(ra), stored[d + c] = widen(rb);
  }
}

// ---- by a warp -------------------------------------------------------------------------------------------------------

// What a lane has of a row of up to 128 PARTS elements: columns 4 lane to 4 lane + 3, and those 128 further on.
template <int PARTS> struct Columns {
  float x[PARTS][4];

  // visit(part, element).
  template <class V> static DEVICE void each(V&& visit) {
#pragma unroll
    for (int k = 0; k < PARTS; k++)
#pragma unroll
      for (int e = 0; e < 4; e++) visit(k, e);
  }
  DEVICE void fill(float value) {
    each([&](int k, int e) { x[k][e] = value; });
  }
  // Zeros beyond the row's end.
  template <class T> DEVICE void load(const T* row, int d) {
#pragma unroll
    for (int k = 0; k < PARTS; k++) {
      const int c = 128 * k + threadIdx.x % 32 * 4;
      if (c < d)
        load4(row + c, x[k]);
      else
        x[k][0] = x[k][1] = x[k][2] = x[k][3] = 0.f;
    }
  }
  template <class T> DEVICE void store(T* row, int d) const {
#pragma unroll
    for (int k = 0; k < PARTS; k++) {
      const int c = 128 * k + threadIdx.x % 32 * 4;
      if (c < d) store4(row + c, x[k]);
    }
  }
  DEVICE float dot(const Columns& other) const {
    float sum = 0.f;
    each([&](int k, int e) { sum = fmaf(other.x[k][e], x[k][e], sum); });
    return warp_sum(sum);
  }
};

// The deviations of a page's rows from their mean: of up to KEPT rows in registers, where KEPT is not 0; else computed when asked for.
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

  // The direction whose negative elements are those of principal_signs.
  DEVICE Columns<PARTS> principal_direction() const {
    int farthest = 0;
    float most = 0.f;
    each_row([&](int r) {
      const Columns<PARTS> of = row(r);
      const float far = of.dot(of);
      if (far > most * FARTHER) farthest = r, most = far;
    });
    Columns<PARTS> direction = deviation(farthest);
#pragma unroll 1
    for (int round = 0; round < ROUNDS; round++) {
      Columns<PARTS> next;
      next.fill(0.f);
      each_row([&](int r) {
        const Columns<PARTS> of = row(r);
        const float along = of.dot(direction);
        Columns<PARTS>::each([&](int k, int e) { next.x[k][e] = fmaf(along, of.x[k][e], next.x[k][e]); });
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
};

// Recomputes a page's summary from its valid rows.
template <class T, int PARTS, int KEPT> DEVICE void summarize_by_warp(const Params& p, int pair, int page, int rows, const T* keys) {
  const int d = p.head_size;
  // Lower and upper bounds, or mean and deviation.
  Columns<PARTS> a, b;
  if (p.selector == BOUNDS) {
    a.load(keys, d), b = a;
#pragma unroll 4
    for (int r = 1; r < rows; r++) {
      Columns<PARTS> row;
      row.load(keys + size_t(r) * d, d);
      Columns<PARTS>::each([&](int k, int e) { a.x[k][e] = min_or_nan(a.x[k][e], row.x[k][e]), b.x[k][e] = max_or_nan(b.x[k][e], row.x[k][e]); });
    }
  } else {
    const Deviations<T, PARTS, KEPT> deviations(keys, d, rows);
    a = deviations.mean, b = deviations.spread();
    if (p.selector == SIGNED_MOMENTS) {
      const Columns<PARTS> direction = deviations.principal_direction();
      Columns<PARTS>::each([&](int k, int e) {
        if (direction.x[k][e] < LEAST_NEGATIVE) b.x[k][e] = -b.x[k][e];
      });
    }
  }
  T* const summary = page_summary<T>(p, pair, page);
  a.store(summary, d), b.store(summary + d, d);
}
