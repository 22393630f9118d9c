// What a prefill writes beside its outputs: keys and values, page summaries, page steps.
#pragma once
#include "page_rows.cuh"
#include "selectors.cuh"  // every file of selector/: written by op/build/params.rs

// Grid (tokens, Hkv, B): one fed row a block, where ONNX Runtime's own operator has not written it.
template <class T> DEVICE void append_kernel(const Params& p) {
  const int head = blockIdx.y, b = blockIdx.z;
  const Sequence s = sequence(p, b);
  const int position = s.first + int(blockIdx.x) - s.skipped;
  if (s.valid && position >= s.first) append<T>(p, s, b, head, position, position + 1, whole_block());
}

// Grid (1, Hkv, B), before ONNX Runtime's own operator appends: the value rows that follow the sequence's tokens in its
// blocks of keys become 0. Its kernels multiply them by weights of 0, and memory that was never written may hold a NaN.
template <class T> DEVICE void clear_kernel(const Params& p) {
  constexpr int BLOCK = 256;
  wait_for_previous();
  const int head = blockIdx.y, b = blockIdx.z, d = p.head_size;
  const Sequence s = sequence(p, b);
  if (!s.valid) return;
  const int end = min((s.len + BLOCK - 1) / BLOCK * BLOCK, p.capacity);
  T* values = static_cast<T*>(p.value_cache) + size_t(b * p.kv_heads + head) * p.capacity * d;
  for (size_t i = size_t(s.len) * d + threadIdx.x; i < size_t(end) * d; i += blockDim.x) narrow(0.f, values[i]);
}

// The state of a page that a fed row lies in, by one warp; A of every page that holds a token becomes the newest
// position: the queries so far have seen everything.
template <class T, int PARTS, class SELECTOR>
DEVICE void end_page(const Params& p, int page, int b, int head, T* copy /* of the page's keys */) {
  const int pair = b * p.kv_heads + head, lane = threadIdx.x % 32;
  const Sequence s = sequence(p, b);
  if (!s.valid || page >= pages_for(p, s.len)) return;
  if (lane == 0) page_steps_of(p, pair)[page] = s.len - 1;
  if (page < s.first >> p.page_shift) return;
  const int rows = min(s.len - (page << p.page_shift), 1 << p.page_shift);
  const T* keys = page_keys<T>(p, pair, page);
  if (p.copies_page) {
    // Rows are read once. D is a multiple of 8.
    constexpr int ELEMENTS = 16 / sizeof(T);
#pragma unroll 8
    for (int i = lane; i < rows * p.head_size / ELEMENTS; i += 32)
      reinterpret_cast<uint4*>(copy)[i] = reinterpret_cast<const uint4*>(keys)[i];
    keys = copy;
    __syncwarp();
  }
  SELECTOR::template end_page<T, PARTS>(p, pair, page, rows, keys);
}

// The state of a block of rows that fed rows lie in, by a block of threads, and A of its pages.
template <class T, int PARTS, class SELECTOR>
DEVICE void end_block(const Params& p, int block, int b, int head, u8* raw) {
  const Sequence s = sequence(p, b);
  if (!s.valid) return;
  const int first = block * SKETCH_BLOCK >> p.page_shift, pages = SKETCH_BLOCK >> p.page_shift;
  const int page = first + threadIdx.x;
  static_assert(SELECTOR::STATE_THREADS >= SKETCH_BLOCK, "a thread a page");
  if (threadIdx.x < pages && page < pages_for(p, s.len)) page_steps_of(p, b * p.kv_heads + head)[page] = s.len - 1;
  SELECTOR::template end_rows<T, PARTS>(p, s, b, head, block, raw);
}

// Grid (pages by PAGES_WARPS or blocks of rows, Hkv, B), for head sizes up to 128 PARTS. Runs concurrently with the
// attention kernel, if there is one before it, which starts this when the keys are there (PDL); completion implies that
// both have finished.
template <class T, int PARTS, class SELECTOR> DEVICE void pages_kernel(const Params& p) {
  extern __shared__ __align__(1024) u8 raw[];
  const bool beside_attention = p.rows > 0;
  const int warp = threadIdx.x / 32;
  if (!beside_attention) wait_for_previous();
  if constexpr (SELECTOR::BY_BLOCK)
    end_block<T, PARTS, SELECTOR>(p, blockIdx.x, blockIdx.z, blockIdx.y, raw);
  else
    end_page<T, PARTS, SELECTOR>(p, blockIdx.x * PAGES_WARPS + warp, blockIdx.z, blockIdx.y,
                                 reinterpret_cast<T*>(raw) + (warp << p.page_shift) * p.head_size);
  if (beside_attention && blockIdx.x + blockIdx.y + blockIdx.z == 0) wait_for_previous();
}
