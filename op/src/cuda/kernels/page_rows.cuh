// Rows of a page's keys, read by a block or by a warp: what selectors make their state from.
#pragma once
#include "common.cuh"

// The rows of a page in the cache.
template <class T> DEVICE T* page_keys(const Params& p, int pair, int page) {
  return static_cast<T*>(p.key_cache) + (size_t(pair) * p.capacity + (size_t(page) << p.page_shift)) * p.head_size;
}

// Four neighbouring elements, aligned.
DEVICE void load4(const F32* p, float (&x)[4]) {
  const float4 a = *reinterpret_cast<const float4*>(p);
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
}
template <class T> DEVICE void load4(const T* p, float (&x)[4]) {
  const uint2 a = *reinterpret_cast<const uint2*>(p);
  x[0] = widen(T{u16(a.x)}), x[1] = widen(T{u16(a.x >> 16)}), x[2] = widen(T{u16(a.y)}),
  x[3] = widen(T{u16(a.y >> 16)});
}
DEVICE void store4(F32* p, const float (&x)[4]) { *reinterpret_cast<float4*>(p) = {x[0], x[1], x[2], x[3]}; }
template <class T> DEVICE void store4(T* p, const float (&x)[4]) {
  T y[4];
#pragma unroll
  for (int e = 0; e < 4; e++) narrow(x[e], y[e]);
  *reinterpret_cast<uint2*>(p) = {y[0].v | u32(y[1].v) << 16, y[2].v | u32(y[3].v) << 16};
}

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
