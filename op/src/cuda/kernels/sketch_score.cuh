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
  DEVICE SketchQueries(u8* raw, int heads /* a multiple of four */) {
    stats = reinterpret_cast<float4*>(raw);
    plain = reinterpret_cast<float*>(stats + heads / 4 * SCORE_THREADS);
    bytes = reinterpret_cast<u32*>(plain + heads * DP);
    logit = reinterpret_cast<float2*>(bytes + heads * 2 * WORDS);
    codes = reinterpret_cast<u8*>(logit + heads);
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

// What a lane has of a block: its codes, the factors of its 16 rows, and its part of the centre. WHOLE: D = DP, and the
// codes are in registers.
template <class T, int DP, int BITS, bool WHOLE> struct LaneBlock {
  static constexpr int PARTS = (DP + 127) / 128, SLOTS = DP / 16;
  static constexpr int CHUNKS = WHOLE ? 2 * SLOTS * BITS / 4 : 1;
  uint4 codes[CHUNKS], factors[2];
  RawFour<T> centre[PARTS];

  DEVICE void load_codes(const u8* block, int i) {
    if (WHOLE) codes[i] = __ldcg(reinterpret_cast<const uint4*>(block) + 32 * i + threadIdx.x % 32);
  }
  // Of block `number`.
  DEVICE void load_rest(const Params& p, const SketchLayout& layout, const u8* block, int number) {
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
  DEVICE void load(const Params& p, const SketchLayout& layout, const u8* block, int number) {
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) load_codes(block, i);
    load_rest(p, layout, block, number);
  }

  // Slot `slot` of row `row` of the lane's, every code at the top of its byte.
  DEVICE u32 operand(const Params& p, const SketchLayout& layout, const u8* block, int row, int slot) const {
    if constexpr (WHOLE) {
      constexpr int IN_WORD = 8 / BITS;
      constexpr u32 TOP = BITS == 1 ? 0x80808080u : 0xc0c0c0c0u;
      const int at = row * SLOTS + slot, word = at / IN_WORD;
      const uint4 four = codes[word / 4];
      const u32 x = word % 4 == 0 ? four.x : word % 4 == 1 ? four.y : word % 4 == 2 ? four.z : four.w;
      return x << (8 - BITS - BITS * (at % IN_WORD)) & TOP;
    } else {
      const int lane = threadIdx.x % 32, quad = lane % 4, bits = p.sketch_bits;
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

  DEVICE float factor(int row) const {
    const uint4 four = factors[row / 8];
    const u32 two = row / 2 % 4 == 0 ? four.x : row / 2 % 4 == 1 ? four.y : row / 2 % 4 == 2 ? four.z : four.w;
    return __uint_as_float(row % 2 ? two & 0xffff0000u : two << 16);
  }

  // The product of head `first` + lane % 4's query with the centre.
  DEVICE float centre_product(const float* plain /* [heads, DP] */, int first) const {
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

// Which pages a block's scores go to.
struct SketchPages {
  int pair, row0;   // this lane's first row
  int from, pages;  // candidates begin there; pages of the sequence
};

// Stores the score of a head for a page, and counts it if it is a candidate. All lanes call it.
DEVICE void leave_score(const Params& p, const SketchPages& of, int page, int h, bool writes, float score,
                        float4& stats) {
  score = or_first(score);
  if (p.group_score == SOFTMAX) {
    if (writes && h < p.group && page < of.pages) {
      score_at(p, of.pair, page, h) = score;
      if (page >= of.from) add_score(stats, score);
    }
    return;
  }
  // Over the four heads of this product, and those before.
  score = h < p.group ? score : NEG_INF;
  score = fmaxf(score, __shfl_xor_sync(ALL_LANES, score, 1));
  score = fmaxf(score, __shfl_xor_sync(ALL_LANES, score, 2)) + 0.f;
  if (!writes || threadIdx.x % 4 || page >= of.pages) return;
  if (h >= SKETCH_HEADS) score = fmaxf(score, score_at(p, of.pair, page, 0));
  score_at(p, of.pair, page, 0) = score;
  if (page >= of.from && h + SKETCH_HEADS >= p.group)
    stats.x = fmaxf(stats.x, score), stats.z = score == NEG_INF ? stats.z : fminf(stats.z, score);
}

// The masses of a lane's pages of PAGE tokens, at most 16, from its rows' logits (base 2).
template <int PAGE>
DEVICE void leave_masses(const Params& p, const SketchPages& of, int h, const float (&x)[SKETCH_LANE_ROWS],
                         float4& stats) {
#pragma unroll
  for (int i = 0; i < SKETCH_LANE_ROWS; i += PAGE) {
    const int page = (of.row0 + i) / PAGE;
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

// The mass of a page of more than 16 tokens, which several lanes have.
DEVICE void leave_wide_mass(const Params& p, const SketchPages& of, int h, const float (&x)[SKETCH_LANE_ROWS],
                            float4& stats) {
  const int lanes = 4 << (p.page_shift - 4);
  float top = x[0], sum = 0.f;
#pragma unroll
  for (int k = 1; k < SKETCH_LANE_ROWS; k++) top = fmaxf(top, x[k]);
  for (int i = 4; i < lanes; i <<= 1) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, i));
  const float base = top == NEG_INF ? 0.f : top;
#pragma unroll
  for (int k = 0; k < SKETCH_LANE_ROWS; k++) sum += exp2_fast(x[k] - base);
  for (int i = 4; i < lanes; i <<= 1) sum += __shfl_xor_sync(ALL_LANES, sum, i);
  leave_score(p, of, of.row0 >> p.page_shift, h, (threadIdx.x & 31 & (lanes - 1)) < 4, (base + log2_fast(sum)) * LN2,
              stats);
}

DEVICE void leave_rows(const Params& p, const SketchPages& of, int h, const float (&x)[SKETCH_LANE_ROWS],
                       float4& stats) {
  switch (p.page_shift) {
    case 0:
      return leave_masses<1>(p, of, h, x, stats);
    case 1:
      return leave_masses<2>(p, of, h, x, stats);
    case 2:
      return leave_masses<4>(p, of, h, x, stats);
    case 3:
      return leave_masses<8>(p, of, h, x, stats);
    case 4:
      return leave_masses<16>(p, of, h, x, stats);
    default:
      return leave_wide_mass(p, of, h, x, stats);
  }
}

// Scores block `number`, and asks for block `next` as soon as there is room.
template <class T, int DP, int BITS, bool WHOLE>
DEVICE void score_block(const Params& p, const Sequence& s, const SketchLayout& layout, int pair, int from, int number,
                        const u8* block, int next, const u8* next_block, const SketchQueries<DP>& queries,
                        LaneBlock<T, DP, BITS, WHOLE>& lane_block) {
  using Lane = LaneBlock<T, DP, BITS, WHOLE>;
  constexpr int SLOTS = DP / 16, WORDS = SketchQueries<DP>::WORDS, TILES = SKETCH_LANE_ROWS / 2;
  const int lane = threadIdx.x % 32, quad = lane % 4, column = lane / 4;
  const SketchPages of = {pair, number * SKETCH_BLOCK + column * SKETCH_LANE_ROWS, from, pages_for(p, s.len)};
  const int oldest = seen_from(p, s.len - 1);
  const bool partly = number * SKETCH_BLOCK < oldest || (number + 1) * SKETCH_BLOCK > s.len;
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
    const float base = lane_block.centre_product(queries.plain, first) * p.scale * (p.softcap > 0.f ? 1.f : LOG2E);
    float x[SKETCH_LANE_ROWS];
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      int sums[4] = {};
      auto add = [&](int i, u32 low, u32 high) {
        const u32 a[4] = {
            lane_block.operand(p, layout, block, 2 * t, i), lane_block.operand(p, layout, block, 2 * t + 1, i),
            lane_block.operand(p, layout, block, 2 * t, i + 1), lane_block.operand(p, layout, block, 2 * t + 1, i + 1)};
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
        x[2 * t + e] = fmaf(lane_block.factor(2 * t + e),
                            fmaf(float(256 * sums[2 * e] + sums[2 * e + 1]), logit.x, logit.y), base);
      // Chunks whose last word this was.
      constexpr int OF_TILE = 2 * SLOTS * BITS / TILES;
      if (WHOLE && last) {
#pragma unroll
        for (int i = 0; i < Lane::CHUNKS; i++)
          if ((t + 1) * OF_TILE >= 4 * (i + 1) && t * OF_TILE < 4 * (i + 1)) lane_block.load_codes(next_block, i);
      }
    }
    if (last) lane_block.load_rest(p, layout, next_block, next);
    if (p.softcap > 0.f) {
#pragma unroll
      for (int k = 0; k < SKETCH_LANE_ROWS; k++) x[k] = p.softcap * tanhf(x[k] / p.softcap) * LOG2E;
    }
    if (partly) {
#pragma unroll
      for (int k = 0; k < SKETCH_LANE_ROWS; k++)
        if (of.row0 + k < oldest || of.row0 + k >= s.len) x[k] = NEG_INF;
    }
    float4& stats = queries.stats[first / SKETCH_HEADS * SCORE_THREADS + threadIdx.x];
    float4 all = stats;
    leave_rows(p, of, first + quad, x, all);
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
