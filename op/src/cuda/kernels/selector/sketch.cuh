// Selector sketch: the estimated attention mass of a page's tokens, from the codes of their keys
// (op/src/selector/sketch/).
#pragma once
#include "sketch_score.cuh"

// The centre of a block that a call begins, by a block of threads: the mean of the 128 rows before it as this call
// leaves them. `fed_key(position, element, eight numbers)` reads a row that another block may be writing.
template <class T, int DP, class F>
RARE void make_centre(const Params& p, int fed /* rows from there on */, int pair, int block,
                      float* sums /* [threads / 32, DP] */, T* centre, F fed_key) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32, d = p.head_size;
  const T* const keys = static_cast<const T*>(p.key_cache) + size_t(pair) * p.capacity * d;
  float sum[8] = {};
  if (8 * lane < d) {
#pragma unroll 2
    for (int i = warp; i < SKETCH_BLOCK; i += warps) {
      const int position = (block - 1) * SKETCH_BLOCK + i;
      float x[8];
      if (position < fed) {
        load8(keys + size_t(position) * d + 8 * lane, x);
      } else {
        fed_key(position, 8 * lane, x);
      }
#pragma unroll
      for (int e = 0; e < 8; e++) sum[e] += x[e];
    }
    store8(reinterpret_cast<F32*>(sums) + warp * DP + 8 * lane, sum);
  }
  __syncthreads();
  for (int c = threadIdx.x; c < d; c += blockDim.x) {
    float all = 0.f;
    for (int w = 0; w < warps; w++) all += sums[w * DP + c];
    narrow(all * (1.f / SKETCH_BLOCK), centre[c]);
  }
  __syncthreads();
}

struct Sketch {
  // A prompt's state is made by blocks of rows.
  static constexpr bool BY_BLOCK = true;
  static constexpr int STATE_THREADS = SKETCH_THREADS;

  template <int PARTS, class T> static DEVICE Columns<PARTS> centre_of(const Params& p, const T* centre, int block) {
    Columns<PARTS> of;
    of.fill(0.f);
    if (block > 0) of.load(centre, p.head_size);
    return of;
  }

  // Writes the fed rows of a block that the step touches, and their sketches; prepares the queries, if pages are to be
  // chosen. What short contexts wait for: rows and queries are read at the same time, by other warps.
  template <class T, int DP>
  static DEVICE void append_rows(const Params& p, const Sequence& s, int b, int head, int block, bool scored,
                                 const SketchQueries<DP>& queries) {
    constexpr int PARTS = (DP + 127) / 128, WARPS = SCORE_WARPS;
    const int pair = b * p.kv_heads + head, d = p.head_size, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int start = block * SKETCH_BLOCK, end = min(start + SKETCH_BLOCK, s.len), fresh = max(start, s.first);
    T* const keys = static_cast<T*>(p.key_cache) + size_t(pair) * p.capacity * d;
    T* const values = static_cast<T*>(p.value_cache) + size_t(pair) * p.capacity * d;
    const SketchLayout layout = sketch_layout<T>(d, p.sketch_bits);
    u8* const state = sketch_blocks(p, layout, pair) + size_t(block) * layout.bytes;
    T* const centre = reinterpret_cast<T*>(state + layout.centre);
    const bool sketched = p.mode == RETRO;
    const int to_row = s.skipped - s.first;
    auto fed_row = [&p, b, head, to_row](const void* rows, int position) {
      return kv_row<T>(p, rows, b, position + to_row, head);
    };
    auto fed_key = [&p, fed_row](int position, int c, float (&x)[8]) {
      read_vec8(p, fed_row(p.key, position), c, position, x);
#pragma unroll
      for (int e = 0; e < 8; e++) x[e] = rounded<T>(x[e]);
    };
    // Only the newest token is appended: the others are there from before.
    if (sketched && block > 0 && s.len - 1 == start)
      make_centre<T, DP>(p, s.first, pair, block, reinterpret_cast<float*>(queries.stats), centre, fed_key);
    const Rotation<PARTS> rotation(d);
    const Columns<PARTS> of_block = centre_of<PARTS>(p, centre, block);
#pragma unroll 1
    for (int row = fresh + warp; row < end; row += WARPS) {
      float x[8] = {};
      if (8 * lane < d) {
        fed_key(row, 8 * lane, x);
        store8(keys + size_t(row) * d + 8 * lane, x);
      }
      if (!sketched) continue;
      Columns<PARTS> key = columns_of<PARTS>(x);
      sketch_row(p, rotation, key, of_block, queries.codes + (row - fresh) * (DP / 4),
                 state + layout.factors + 2 * (row - start));
    }
    if (scored) {
#pragma unroll 1
      for (int h = WARPS - 1 - warp; h < stored_heads(p.group); h += WARPS)
        prepare_query<T, DP>(p, b, head, h, s.len - 1, rotation, queries);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < (end - fresh) * (d / 8); i += SCORE_THREADS) {
      const int position = fresh + i / (d / 8), c = i % (d / 8) * 8;
      float x[8];
      read_value8(p, fed_row(p.value, position) + c, x);
      store8(values + size_t(position) * d + c, x);
    }
    if (!sketched) return;
    __syncthreads();
    if (p.sketch_bits == 1)
      write_codes<1>(state, layout, d, fresh - start, end - fresh, queries.codes, DP / 4, whole_block());
    else
      write_codes<2>(state, layout, d, fresh - start, end - fresh, queries.codes, DP / 4, whole_block());
    __syncthreads();
  }

  // A block of threads scores blocks of rows that the step does not touch, each warp some; or appends the rows of one
  // that it touches, and scores that. WHOLE: D = DP; else BITS is 0, and both are read.
  template <class T, int DP, int BITS, bool WHOLE>
  static DEVICE void score_rows(const Params& p, int b, int head, u8* raw) {
    constexpr int PARTS = (DP + 127) / 128;
    const SketchQueries<DP> queries(raw, stored_heads(p.group));
    const SketchLayout layout = sketch_layout<T>(WHOLE ? DP : p.head_size, BITS ? BITS : p.sketch_bits);
    const int pair = b * p.kv_heads + head, warp = threadIdx.x / 32;
    const u8* const state = sketch_blocks(p, layout, pair);
    auto at = [&](int block) { return state + size_t(block) * layout.bytes; };
    const bool touches = int(blockIdx.x) >= p.score_blocks;
    LaneBlock<T, DP, BITS, WHOLE> lane_block(queries.ring);
    const int all_warps = p.score_blocks * SCORE_WARPS, this_warp = blockIdx.x * SCORE_WARPS + warp;
    Share share = {0, 0};
    if (!touches) {
      share = share_of(p.warp_pages, p.more_pages, this_warp);
      // Neither the lengths nor the queries hold the first loads up: blocks that a step does not touch were complete
      // before this kernel could start (merge.cuh).
      if (share.begin < share.end) lane_block.load(p, layout, at(share.begin), share.begin);
    }
    start_step();
    const Sequence s = sequence(p, b);
    if (!s.valid) return;
    const bool scored = step_is_scored(p, s, b);
    const int first_touched = s.first / SKETCH_BLOCK;
    PageStep step = {};
    if (!touches) {
      if (!scored) return;
      step = first_page_step(p, s, pair, this_warp);
      const Rotation<PARTS> rotation(p.head_size);
#pragma unroll 1
      for (int h = warp; h < stored_heads(p.group); h += SCORE_WARPS)
        prepare_query<T, DP>(p, b, head, h, s.len - 1, rotation, queries);
      share.end = min(share.end, first_touched);
    } else {
      const int block = first_touched + int(blockIdx.x) - p.score_blocks;
      if (block <= (s.len - 1) / SKETCH_BLOCK) {
        append_rows<T, DP>(p, s, b, head, block, scored, queries);
        if (!scored) return;
        if (warp == 0) {
          share = {block, block + 1};
          lane_block.load(p, layout, at(block), block);
        }
      }
      if (!scored) return;
    }
    for (int i = threadIdx.x; i < stored_heads(p.group) / SKETCH_HEADS * SCORE_THREADS; i += SCORE_THREADS)
      queries.stats[i] = no_scores();
    __syncthreads();
    // What a sliding window has left behind is no candidate.
    const SketchScores scores(p, s, pair);
    const int seen = seen_from(p, s.len - 1) / SKETCH_BLOCK;
    if (share.begin < seen) {
      share.begin = seen;
      if (WHOLE) wait_for_copies(0);
      if (seen < share.end) lane_block.load(p, layout, at(seen), seen);
    }
#pragma unroll 1
    for (int block = share.begin; block < share.end; block++)
      score_block<T, DP, BITS, WHOLE>(p, s, layout, scores, block, at(block), block + 1 < share.end, at(block + 1),
                                      queries, lane_block);
    if (!touches) forget_future(p, s, pair, all_warps, step);
    leave_statistics<DP>(p, pair, queries);
  }

  // For every head size up to DP and number of bits.
  template <class T, int DP> static DEVICE void score_step(const Params& p, int b, int head, u8* raw) {
    score_rows<T, DP, 0, false>(p, b, head, raw);
  }

  // A block of threads sketches a block of a prompt's rows, for head sizes up to 128 PARTS.
  template <class T, int PARTS>
  static DEVICE void end_rows(const Params& p, const Sequence& s, int b, int head, int block, u8* raw) {
    // Rows are asked for several at a time, so that their loads are waited for together.
    constexpr int DP = 128 * PARTS, WARPS = SKETCH_WARPS, AT_ONCE = 4;
    const int pair = b * p.kv_heads + head, d = p.head_size, warp = threadIdx.x / 32;
    const int start = block * SKETCH_BLOCK, end = min(start + SKETCH_BLOCK, s.len), fresh = max(start, s.first);
    if (fresh >= end || p.mode != RETRO) return;
    float* const sums = reinterpret_cast<float*>(raw);
    u8* const codes = reinterpret_cast<u8*>(sums + WARPS * DP);
    const SketchLayout layout = sketch_layout<T>(d, p.sketch_bits);
    u8* const state = sketch_blocks(p, layout, pair) + size_t(block) * layout.bytes;
    T* const centre = reinterpret_cast<T*>(state + layout.centre);
    const T* const keys = static_cast<const T*>(p.key_cache) + size_t(pair) * p.capacity * d;
    if (block > 0 && s.first <= start)
      make_centre<T, DP>(p, s.first, pair, block, sums, centre,
                         [keys, d](int position, int c, float (&x)[8]) { load8(keys + size_t(position) * d + c, x); });
    const Rotation<PARTS> rotation(d);
    const Columns<PARTS> of_block = centre_of<PARTS>(p, centre, block);
#pragma unroll 1
    for (int first = fresh + warp; first < end; first += AT_ONCE * WARPS) {
      Columns<PARTS> of_rows[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++)
        if (first + i * WARPS < end) of_rows[i].load(keys + size_t(first + i * WARPS) * d, d);
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
        const int row = first + i * WARPS;
        if (row < end)
          sketch_row(p, rotation, of_rows[i], of_block, codes + (row - fresh) * (DP / 4),
                     state + layout.factors + 2 * (row - start));
      }
    }
    __syncthreads();
    if (p.sketch_bits == 1)
      write_codes<1>(state, layout, d, fresh - start, end - fresh, codes, DP / 4, whole_block());
    else
      write_codes<2>(state, layout, d, fresh - start, end - fresh, codes, DP / 4, whole_block());
  }
};

// The scoring kernel for head size DP and so many bits alone.
template <int BITS> struct SketchOf {
  template <class T, int DP> static DEVICE void score_step(const Params& p, int b, int head, u8* raw) {
    Sketch::score_rows<T, DP, BITS, true>(p, b, head, raw);
  }
};
