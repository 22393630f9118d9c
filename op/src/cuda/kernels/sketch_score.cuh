// Log masses of pages from sketches: exact integer products of codes with queries in 16 bits, on tensor cores.
//
// A query's element is q = 256 high + low, two signed bytes. In the product of 16 rows of a block with 8 columns, the
// columns are high and low of four heads; codes are the bytes of A, shifted to the top of each byte, so that a slot
// becomes an operand by a shift and a mask.
#pragma once
#include "score_output.cuh"
#include "sketch_rows.cuh"

// Elements of a query are quantised to so many steps: the high byte fits.
constexpr float SKETCH_LARGEST = 127.f * 256.f;
constexpr int SKETCH_HEADS = 4;  // of a product

// A scoring block's shared memory, for head sizes up to DP; what abi.rs calls sketch_bytes.
template <int DP> struct SketchQueries {
  static constexpr int WORDS = DP / 4 + 4;
  float* plain;   // [heads, DP], after RoPE and rounded to T
  u32* bytes;     // [heads / 4, 8, WORDS]: columns high and low of each head
  float2* logit;  // [heads]: what a sum of codes and the sum of the query's elements stand for
  float4* stats;  // [heads / 4, SCORE_WARPS, 32]: of this lane's head (score_output.cuh)
  u8* codes;      // [SKETCH_BLOCK / 2, DP / 4]: of the rows that a block appends
  u8* ring;       // [SCORE_WARPS, SKETCH_BLOCK DP bits / 8]: the codes of a block of rows, of each warp
  DEVICE SketchQueries(u8* raw, int heads /* a multiple of four */) {
    stats = reinterpret_cast<float4*>(raw);
    plain = reinterpret_cast<float*>(stats + heads / 4 * SCORE_THREADS);
    bytes = reinterpret_cast<u32*>(plain + heads * DP);
    logit = reinterpret_cast<float2*>(bytes + heads * 2 * WORDS);
    codes = reinterpret_cast<u8*>(logit + heads);
    ring = codes + SKETCH_BLOCK / 2 * (DP / 4);
  }
};

// A warp prepares a head's query. Of a query that is not finite every score is NaN.
template <class T, int DP>
DEVICE void prepare_query(const Params& p, int b, int kv_head, int h, int position,
                          const Rotation<(DP + 127) / 128>& rotation, const SketchQueries<DP>& queries) {
  constexpr int PARTS = (DP + 127) / 128;
  const int lane = threadIdx.x % 32, d = p.head_size;
  float* const plain = queries.plain + h * DP;
  // Heads that fill the last four are 0.
  const bool there = h < p.group;
  float x[8] = {};
  if (8 * lane < DP) {
    if (there && 8 * lane < d)
      read_vec8(p, query_row<T>(p, b, p.tokens - 1, kv_head * p.group + h), 8 * lane, position, x);
#pragma unroll
    for (int k = 0; k < 8; k++) x[k] = rounded<T>(x[k]);
    store8(reinterpret_cast<F32*>(plain) + 8 * lane, x);
  }
  Columns<PARTS> row = columns_of<PARTS>(x);
  rotation.apply(row);
  float top = 0.f, sound = 0.f;
  Columns<PARTS>::each([&](int k, int e) { top = fmaxf(top, fabsf(row.x[k][e])), sound += 0.f * row.x[k][e]; });
  top = warp_max(top), sound = warp_sum(sound);
  const float step = top / SKETCH_LARGEST;
  // A step that is too small to divide by rounds to nothing.
  float by = step > 0.f ? 1.f / step : 0.f;
  if (!(by < 3e38f)) by = 0.f;
  int sum = 0;
  u32* const columns = queries.bytes + (h / SKETCH_HEADS * 8 + h % SKETCH_HEADS * 2) * SketchQueries<DP>::WORDS;
#pragma unroll
  for (int k = 0; k < PARTS; k++) {
    u32 high = 0, low = 0;
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int q = int(rintf(fminf(fmaxf(row.x[k][e] * by, -SKETCH_LARGEST), SKETCH_LARGEST)));
      const int upper = (q + 128) >> 8;
      sum += q;
      high |= (u32(upper) & 255u) << (8 * e), low |= (u32(q - 256 * upper) & 255u) << (8 * e);
    }
    const int at = 32 * k + lane;
    if (at < DP / 4) columns[at] = high, columns[SketchQueries<DP>::WORDS + at] = low;
  }
  sum = __reduce_add_sync(ALL_LANES, sum);
  // Sums are of codes at the top of their bytes, and s = 2 code + 1 - 2^bits.
  const float unit = p.scale * (p.softcap > 0.f ? 1.f : LOG2E) * step;
  const float of_codes = unit * (p.sketch_bits == 1 ? 2.f / 128.f : 2.f / 64.f);
  const float of_sum = unit * (p.sketch_bits == 1 ? -1.f : -3.f) * float(sum);
  if (lane == 0) queries.logit[h] = {of_codes, sound == 0.f ? of_sum : NOT_A_NUMBER};
}

// Four neighbouring elements of a centre, as they lie in memory: converting them would wait for them.
template <class T> struct RawFour {
  uint2 bits;
  DEVICE void load(const T* p) { bits = *reinterpret_cast<const uint2*>(p); }
  DEVICE float4 value() const {
    return {widen(T{u16(bits.x)}), widen(T{u16(bits.x >> 16)}), widen(T{u16(bits.y)}), widen(T{u16(bits.y >> 16)})};
  }
};
template <> struct RawFour<F32> {
  float4 bits;
  DEVICE void load(const F32* p) { bits = *reinterpret_cast<const float4*>(p); }
  DEVICE float4 value() const { return bits; }
};

// A lane's part of what a block of rows has beside the codes: the factors of its 16 rows, and its part of the centre.
template <class T, int PARTS> struct BesideCodes {
  uint4 factors[2];
  RawFour<T> centre[PARTS];

  // Of block `number`.
  DEVICE void load(const Params& p, const SketchLayout& layout, const u8* block, int number) {
    const int lane = threadIdx.x % 32;
    const uint4* const of_rows = reinterpret_cast<const uint4*>(block + layout.factors + lane / 4 * 32);
    factors[0] = __ldcg(of_rows), factors[1] = __ldcg(of_rows + 1);
#pragma unroll
    for (int k = 0; k < PARTS; k++) {
      const int element = 128 * k + 4 * lane;
      // The first block's is 0, and not kept.
      centre[k] = {};
      if (number > 0 && element < p.head_size)
        centre[k].load(reinterpret_cast<const T*>(block + layout.centre) + element);
    }
  }
};

// What a lane has of blocks of rows: the codes of half of its 16 rows, and what the next block has beside them. WHOLE:
// D = DP, and codes come by way of the warp's ring, a block ahead.
template <class T, int DP, int BITS, bool WHOLE> struct LaneBlock {
  static constexpr int PARTS = (DP + 127) / 128, SLOTS = DP / 16;
  static constexpr int CHUNKS = WHOLE ? SLOTS * BITS / 4 : 1;  // of half of the rows
  uint4 codes[CHUNKS];
  BesideCodes<T, PARTS> next;
  u8* ring;  // this lane's first chunk; only this lane reads what it copied there

  DEVICE explicit LaneBlock(u8* of_block) : ring(of_block) {
    if (WHOLE) ring += (threadIdx.x / 32 * 2 * CHUNKS * 32 + threadIdx.x % 32) * 16;
  }
  DEVICE void ask_codes(const u8* block, int half, bool there) {
    if (!WHOLE) return;
    const u8* const from = block + threadIdx.x % 32 * 16;
    if (there) {
#pragma unroll
      for (int i = 0; i < CHUNKS; i++) copy_chunk(ring + (half * CHUNKS + i) * 512, from + (half * CHUNKS + i) * 512);
    }
    commit_copies();
  }
  // After ask_codes of this half; `behind`: the other half, which need not be there, was asked for after it.
  DEVICE void wait_for_codes(bool behind) const {
    if (WHOLE) wait_for_copies(behind);
  }
  DEVICE void take_codes(int half) {
    if (!WHOLE) return;
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) codes[i] = *reinterpret_cast<const uint4*>(ring + (half * CHUNKS + i) * 512);
  }
  DEVICE void load(const Params& p, const SketchLayout& layout, const u8* block, int number) {
    ask_codes(block, 0, true), ask_codes(block, 1, true);
    next.load(p, layout, block, number);
  }

  // Slot `slot` of row `row` of eight, every code at the top of its byte.
  DEVICE u32 operand(const Params& p, const SketchLayout& layout, const u8* block, int half, int row, int slot) const {
    if constexpr (WHOLE) {
      constexpr int IN_WORD = 8 / BITS;
      constexpr u32 TOP = BITS == 1 ? 0x80808080u : 0xc0c0c0c0u;
      const int at = row * SLOTS + slot, word = at / IN_WORD;
      const uint4 four = codes[word / 4];
      const u32 x = word % 4 == 0 ? four.x : word % 4 == 1 ? four.y : word % 4 == 2 ? four.z : four.w;
      return x << (8 - BITS - BITS * (at % IN_WORD)) & TOP;
    } else {
      const int lane = threadIdx.x % 32, quad = lane % 4, bits = p.sketch_bits;
      row += SKETCH_HALF * half;
      if (slot < layout.slots) {
        // Eight slots have `bits` words.
        const int at = (row * layout.slots + slot) * bits;
        const u32 x = reinterpret_cast<const u32*>(block)[sketch_word(layout.words, at / 8, lane)];
        return x << (8 - bits - at % 8) & (bits == 1 ? 0x80808080u : 0xc0c0c0c0u);
      }
      if (16 * slot >= p.head_size || quad > 1) return 0;
      const u8* const tail = block + layout.tail + (lane / 4 * SKETCH_LANE_ROWS + row) * bits;
      return bits == 1 ? spread_codes<1>(u32(tail[0]) >> (4 * quad) & 15u) << 7 : spread_codes<2>(tail[quad]) << 6;
    }
  }

  // Of row `row` of eight.
  static DEVICE float factor(const uint4& eight, int row) {
    const u32 two = row / 2 == 0 ? eight.x : row / 2 == 1 ? eight.y : row / 2 == 2 ? eight.z : eight.w;
    return __uint_as_float(row % 2 ? two & 0xffff0000u : two << 16);
  }

  // The product of head `first` + lane % 4's query with the centre.
  static DEVICE float centre_product(const RawFour<T> (&centre)[PARTS], const float* plain /* [heads, DP] */,
                                     int first) {
    const int lane = threadIdx.x % 32;
    float v[4] = {};
#pragma unroll
    for (int k = 0; k < PARTS; k++) {
      const int element = 128 * k + 4 * lane;
      if (element >= DP) continue;
      const float4 c = centre[k].value();
#pragma unroll
      for (int h = 0; h < 4; h++) {
        const float4 q = *reinterpret_cast<const float4*>(plain + (first + h) * DP + element);
        v[h] = fmaf(q.x, c.x, fmaf(q.y, c.y, fmaf(q.z, c.z, fmaf(q.w, c.w, v[h]))));
      }
    }
    const bool odd = lane & 1, upper = lane & 2;
    const float a = (odd ? v[1] : v[0]) + __shfl_xor_sync(ALL_LANES, odd ? v[0] : v[1], 1);
    const float b = (odd ? v[3] : v[2]) + __shfl_xor_sync(ALL_LANES, odd ? v[2] : v[3], 1);
    float x = (upper ? b : a) + __shfl_xor_sync(ALL_LANES, upper ? a : b, 2);
#pragma unroll
    for (int i = 4; i < 32; i <<= 1) x += __shfl_xor_sync(ALL_LANES, x, i);
    return x;
  }
};

// Where a lane's scores go.
struct SketchScores {
  float* first;     // of page 0 and the lane's first head
  int stride;       // to the next page's
  int from, pages;  // candidates begin there; pages of the sequence
  DEVICE SketchScores(const Params& p, const Sequence& s, int pair)
      : first(&score_at(p, pair, 0, p.group_score == SOFTMAX ? threadIdx.x % SKETCH_HEADS : 0)),
        stride(scores_a_page(p)),
        from(first_candidate(p, s)),
        pages(pages_for(p, s.len)) {}
};

// Stores the score of head `h` for a page, and counts it if it is a candidate. All lanes call it.
DEVICE void leave_score(const Params& p, const SketchScores& of, int page, int h, bool writes, float score,
                        float4& stats) {
  score = or_first(score);
  const bool there = h < p.group;
  if (p.group_score == SOFTMAX) {
    if (writes && there && page < of.pages) {
      of.first[page * of.stride + (h & ~(SKETCH_HEADS - 1))] = score;
      if (page >= of.from) add_score(stats, score);
    }
    return;
  }
  // Over the four heads of this product, and those before.
  float& stored = of.first[page];
  score = there ? score : NEG_INF;
  score = fmaxf(score, __shfl_xor_sync(ALL_LANES, score, 1));
  score = fmaxf(score, __shfl_xor_sync(ALL_LANES, score, 2)) + 0.f;
  if (!writes || threadIdx.x % 4 || page >= of.pages) return;
  if (h >= SKETCH_HEADS) score = fmaxf(score, stored);
  stored = score;
  if (page >= of.from && h + SKETCH_HEADS >= p.group)
    stats.x = fmaxf(stats.x, score), stats.z = score == NEG_INF ? stats.z : fminf(stats.z, score);
}

// The masses of a lane's pages of PAGE tokens, at most eight, from its rows' logits (base 2).
template <int PAGE>
DEVICE void leave_masses(const Params& p, const SketchScores& of, int h, int row0, const float (&x)[SKETCH_HALF],
                         float4& stats) {
#pragma unroll
  for (int i = 0; i < SKETCH_HALF; i += PAGE) {
    const int page = u32(row0 + i) / PAGE;
    if (PAGE == 1) {
      leave_score(p, of, page, h, true, x[i] * LN2, stats);
      continue;
    }
    float top = x[i], sum = 0.f;
#pragma unroll
    for (int k = 1; k < PAGE; k++) top = fmaxf(top, x[i + k]);
    const float base = top == NEG_INF ? 0.f : top;
#pragma unroll
    for (int k = 0; k < PAGE; k++) sum += exp2_fast(x[i + k] - base);
    leave_score(p, of, page, h, true, (base + log2_fast(sum)) * LN2, stats);
  }
}

// The same of pages of 16 and more, which both halves of one lane or of several have. `before`: what the first half
// left for the second, largest logit and sum.
DEVICE void leave_wide_mass(const Params& p, const SketchScores& of, int h, int row0, const float (&x)[SKETCH_HALF],
                            int half, float2& before, float4& stats) {
  const int lanes = 4 << (p.page_shift - 4);
  float top = half ? before.x : x[0];
#pragma unroll
  for (int k = 0; k < SKETCH_HALF; k++) top = fmaxf(top, x[k]);
  if (half)
    for (int i = 4; i < lanes; i <<= 1) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, i));
  const float base = top == NEG_INF ? 0.f : top;
  float sum = half ? before.y * exp2_fast(before.x - base) : 0.f;
#pragma unroll
  for (int k = 0; k < SKETCH_HALF; k++) sum += exp2_fast(x[k] - base);
  before = {top, sum};
  if (!half) return;
  for (int i = 4; i < lanes; i <<= 1) sum += __shfl_xor_sync(ALL_LANES, sum, i);
  leave_score(p, of, row0 >> p.page_shift, h, (threadIdx.x & 31 & (lanes - 1)) < 4, (base + log2_fast(sum)) * LN2,
              stats);
}

DEVICE void leave_rows(const Params& p, const SketchScores& of, int h, int row0, const float (&x)[SKETCH_HALF],
                       int half, float2& before, float4& stats) {
  switch (p.page_shift) {
    case 0:
      return leave_masses<1>(p, of, h, row0, x, stats);
    case 1:
      return leave_masses<2>(p, of, h, row0, x, stats);
    case 2:
      return leave_masses<4>(p, of, h, row0, x, stats);
    case 3:
      return leave_masses<8>(p, of, h, row0, x, stats);
    default:
      return leave_wide_mass(p, of, h, row0, x, half, before, stats);
  }
}

// Scores block `number`, and asks for block `next`, if there is one, as soon as there is room. Half of a lane's rows at
// a time: a loop that is long takes longer to fetch than to run.
template <class T, int DP, int BITS, bool WHOLE>
DEVICE void score_block(const Params& p, const Sequence& s, const SketchLayout& layout, const SketchScores& scores,
                        int number, const u8* block, bool more, const u8* next_block, const SketchQueries<DP>& queries,
                        LaneBlock<T, DP, BITS, WHOLE>& lane_block) {
  using Lane = LaneBlock<T, DP, BITS, WHOLE>;
  constexpr int SLOTS = DP / 16, WORDS = SketchQueries<DP>::WORDS, TILES = SKETCH_HALF / 2;
  const int lane = threadIdx.x % 32, quad = lane % 4, column = lane / 4;
  const int row0 = number * SKETCH_BLOCK + column * SKETCH_LANE_ROWS;
  const int oldest = seen_from(p, s.len - 1);
  const bool partly = number * SKETCH_BLOCK < oldest || (number + 1) * SKETCH_BLOCK > s.len;
  const auto beside = lane_block.next;
  if (more) lane_block.next.load(p, layout, next_block, number + 1);
#pragma unroll 1
  for (int first = 0; first < p.group; first += SKETCH_HEADS) {
    const bool last = first + SKETCH_HEADS >= p.group;
    const u32* const column_bytes = queries.bytes + (first * 2 + column) * WORDS + quad;
    u32 q[WHOLE ? SLOTS : 1];
    if (WHOLE) {
#pragma unroll
      for (int i = 0; i < SLOTS; i++) q[i] = column_bytes[4 * i];
    }
    const float2 logit = queries.logit[first + quad];
    const float base =
        Lane::centre_product(beside.centre, queries.plain, first) * p.scale * (p.softcap > 0.f ? 1.f : LOG2E);
    float4& stats = queries.stats[first / SKETCH_HEADS * SCORE_THREADS + threadIdx.x];
    float4 all = stats;
    float2 before = {NEG_INF, 0.f};
    uint4 factors = beside.factors[0];
#pragma unroll 1
    for (int half = 0; half < 2; half++) {
      // Behind the second half comes the next block's first one, if this pass has asked for it.
      if (first == 0) lane_block.wait_for_codes(half == 0 || last);
      lane_block.take_codes(half);
      float x[SKETCH_HALF];
#pragma unroll
      for (int t = 0; t < TILES; t++) {
        int sums[4] = {};
        auto add = [&](int i, u32 low, u32 high) {
          auto operand = [&](int row, int slot) { return lane_block.operand(p, layout, block, half, row, slot); };
          const u32 a[4] = {operand(2 * t, i), operand(2 * t + 1, i), operand(2 * t, i + 1), operand(2 * t + 1, i + 1)};
          add_byte_products(sums, a, low, high);
        };
        if constexpr (WHOLE) {
#pragma unroll
          for (int i = 0; i < SLOTS; i += 2) add(i, q[i], q[i + 1]);
        } else {
#pragma unroll 1
          for (int i = 0; 16 * i < p.head_size; i += 2) add(i, column_bytes[4 * i], column_bytes[4 * i + 4]);
        }
#pragma unroll
        for (int e = 0; e < 2; e++)
          x[2 * t + e] = fmaf(Lane::factor(factors, 2 * t + e),
                              fmaf(float(256 * sums[2 * e] + sums[2 * e + 1]), logit.x, logit.y), base);
      }
      factors = beside.factors[1];
      if (last) lane_block.ask_codes(next_block, half, more);
      const int first_row = row0 + SKETCH_HALF * half;
      if (p.softcap > 0.f) {
#pragma unroll
        for (int k = 0; k < SKETCH_HALF; k++) x[k] = p.softcap * tanhf(x[k] / p.softcap) * LOG2E;
      }
      if (partly) {
#pragma unroll
        for (int k = 0; k < SKETCH_HALF; k++)
          if (first_row + k < oldest || first_row + k >= s.len) x[k] = NEG_INF;
      }
      leave_rows(p, scores, first + quad, first_row, x, half, before, all);
    }
    stats = all;
  }
}

// Joins what the lanes of a scoring block know of their scores, which are all written before they are announced.
template <int DP> DEVICE void leave_statistics(const Params& p, int pair, const SketchQueries<DP>& queries) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const size_t part = size_t(pair) * p.score_parts + blockIdx.x;
  __syncthreads();
  if (p.group_score == SOFTMAX) {
#pragma unroll 1
    for (int h = warp; h < p.group; h += SCORE_WARPS) {
      // Eight lanes of every warp have it.
      const float4* const of_head = queries.stats + h / SKETCH_HEADS * SCORE_THREADS + h % SKETCH_HEADS;
      const float4 all = joined_over<32>(joined_stats(of_head[4 * lane], of_head[4 * lane + 128]));
      if (lane == 0) p.score_stats[part * p.group + h] = all;
    }
  } else if (warp == 0) {
    const float4* const of_all = queries.stats + (p.group - 1) / SKETCH_HEADS * SCORE_THREADS;
    const float4 a = of_all[4 * lane], b = of_all[4 * lane + 128];
    const float top = warp_max(fmaxf(a.x, b.x)), least = warp_min(fminf(a.z, b.z));
    if (lane == 0) p.score_stats[part] = {top, 0.f, least, 0.f};
  }
  announce(&p.progress[pair]);
}
