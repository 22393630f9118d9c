// Sketches of rows: the fixed rotation, codes, factors, and where they lie in a block of 128 rows
// (docs/method.md, "Selector sketch"; op/src/selector/sketch/).
//
// A block of Z bytes: the codes of its rows, their factors (bfloat16), its centre (T).
//
// Codes lie as tensor cores take them. Lane l of a warp scores rows 16 (l / 4) to 16 (l / 4) + 15 of the block, and of
// each 16 elements the four from 4 (l % 4) on. These four are a slot: a byte of a word for each, and in every byte the
// slot's bits. A lane's slots, row by row and in a row 16 elements further each, fill its words; neighbouring lanes'
// words lie side by side, four at a time, so that a warp loads 512 bytes in a row. Where D is an odd multiple of 8, the
// last 8 elements of every row follow, row by row.
#pragma once
#include "page_rows.cuh"

constexpr int SKETCH_LANE_ROWS = SKETCH_BLOCK / 8, SKETCH_HALF = SKETCH_LANE_ROWS / 2;

// Sizes of a block.
struct SketchLayout {
  int slots;    // of a row: its 16 elements, D / 16 times
  int words;    // of a lane
  int tail;     // where the last 8 elements of each row lie, in bytes
  int factors;  // where the factors lie, in bytes
  int centre;   // where the centre lies, in bytes
  int bytes;    // Z
};
template <class T> DEVICE SketchLayout sketch_layout(int d, int bits) {
  SketchLayout of;
  of.slots = d / 16;
  of.words = 2 * of.slots * bits;
  of.tail = 128 * of.words;
  of.factors = SKETCH_BLOCK * d * bits / 8;
  of.centre = of.factors + 2 * SKETCH_BLOCK;
  of.bytes = of.centre + d * sizeof(T);
  return of;
}

// The blocks of a KV head.
DEVICE u8* sketch_blocks(const Params& p, const SketchLayout& layout, int pair) {
  return static_cast<u8*>(p.page_state) + size_t(pair) * p.state_blocks * layout.bytes;
}

// Where word `w` of a lane's lies, in words. The last two of a number that four does not divide lie in pairs.
DEVICE int sketch_word(int words, int w, int lane) {
  const int fours = words & ~3;
  return w < fours ? ((w >> 2) * 32 + lane) * 4 + (w & 3) : fours * 32 + lane * 2 + (w & 1);
}

// The codes of a slot, BITS each from the lowest on, one in every byte of a word.
template <int BITS> DEVICE u32 spread_codes(u32 x) {
  return BITS == 1 ? (x | x << 7 | x << 14 | x << 21) & 0x01010101u : (x | x << 6 | x << 12 | x << 18) & 0x03030303u;
}

// The rotation of a row that a warp holds (Columns): signs, then in each of the descending powers of two that D is
// split into a Hadamard matrix, scaled to be orthogonal.
template <int PARTS> struct Rotation {
  int size[PARTS];   // the power of two that this lane's elements belong to; 0 beyond D
  u32 signs[PARTS];  // of the four elements, the first in bit 3
  float scale[PARTS];
  bool across;  // D = 256 joins both parts

  DEVICE explicit Rotation(int d) : across(PARTS > 1 && d == 256) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < PARTS; k++) {
      const int element = 128 * k + 4 * lane;
      size[k] = 0;
      int start = 0;
#pragma unroll
      for (int bit = 256; bit >= 8; bit >>= 1) {
        if (!(d & bit)) continue;
        if (element >= start && element < start + bit) size[k] = bit;
        start += bit;
      }
      scale[k] = size[k] ? rsqrtf(float(size[k])) : 0.f;
      // The fraction of pi.
      const u64 word = k == 0 ? (lane < 16 ? 0x243F6A8885A308D3ull : 0x13198A2E03707344ull)
                              : (lane < 16 ? 0xA4093822299F31D0ull : 0x082EFA98EC4E6C89ull);
      signs[k] = u32(word >> (60 - 4 * (lane % 16))) & 15u;
    }
  }

  DEVICE void apply(Columns<PARTS>& row) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < PARTS; k++) {
      float (&x)[4] = row.x[k];
#pragma unroll
      for (int e = 0; e < 4; e++) x[e] = signs[k] >> (3 - e) & 1u ? -x[e] : x[e];
      const float a = x[0] + x[1], b = x[0] - x[1], c = x[2] + x[3], d = x[2] - x[3];
      x[0] = a + c, x[1] = b + d, x[2] = a - c, x[3] = b - d;
#pragma unroll
      for (int i = 1; i < 32; i <<= 1) {
        const bool joined = 4 * i < size[k];
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const float other = __shfl_xor_sync(ALL_LANES, x[e], i);
          if (joined) x[e] = lane & i ? other - x[e] : other + x[e];
        }
      }
    }
    if (PARTS > 1 && across) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const float a = row.x[0][e], b = row.x[PARTS - 1][e];
        row.x[0][e] = a + b, row.x[PARTS - 1][e] = a - b;
      }
    }
    Columns<PARTS>::each([&](int k, int e) { row.x[k][e] *= scale[k]; });
  }
};

// The columns of a row of which a lane has eight neighbours, `x`, from 8 lane on.
template <int PARTS> DEVICE Columns<PARTS> columns_of(const float (&x)[8]) {
  Columns<PARTS> row;
#pragma unroll
  for (int k = 0; k < PARTS; k++) {
    const int lane = threadIdx.x % 32, from = 16 * k + lane / 2;
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const float low = __shfl_sync(ALL_LANES, x[e], from), high = __shfl_sync(ALL_LANES, x[4 + e], from);
      row.x[k][e] = lane % 2 ? high : low;
    }
  }
  return row;
}

// The codes of a rotated row, a byte a slot, and its factor.
template <int BITS, int PARTS> DEVICE BF16 encode_row(const Columns<PARTS>& row, int d, u8* codes /* [D / 4] */) {
  float squares = 0.f, along = 0.f;
  Columns<PARTS>::each([&](int k, int e) { squares = fmaf(row.x[k][e], row.x[k][e], squares); });
  squares = warp_sum(squares);
  const float tau = sqrtf(squares / float(d));
#pragma unroll
  for (int k = 0; k < PARTS; k++) {
    u32 slot = 0;
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const float x = row.x[k][e];
      const bool positive = x >= 0.f, far = fabsf(x) >= tau;
      // Code c stands for 2 c + 1 - 2^BITS. A number that is none has any: its factor says so.
      const int code = BITS == 1 ? positive : positive ? 2 + far : !far;
      slot |= u32(code) << (BITS * e);
      along = fmaf(x, float(2 * code + 1 - (1 << BITS)), along);
    }
    const int at = 32 * k + threadIdx.x % 32;
    if (4 * at < d) codes[at] = slot;
  }
  along = warp_sum(along);
  BF16 factor;
  narrow(squares == 0.f ? 0.f : squares / along, factor);
  return factor;
}

// Writes the codes of neighbouring rows of a block, from row `first` on. Words that they share with rows before and
// behind keep those rows' codes.
template <int BITS>
DEVICE void write_codes(u8* block, const SketchLayout& layout, int d, int first, int count,
                        const u8* codes /* [count, pitch] */, int pitch, Team team) {
  constexpr int IN_WORD = 8 / BITS;
  constexpr u32 MASK = BITS == 1 ? 0x01010101u : 0x03030303u;
  const int slots = layout.slots, of_row = slots / IN_WORD + 2;
  u32* const words = reinterpret_cast<u32*>(block);
#pragma unroll 1
  for (int i = team.member; i < count * 4 * of_row; i += team.members) {
    const int row = first + i / (4 * of_row), quad = i % 4, lane_row = row % SKETCH_LANE_ROWS;
    const int w = lane_row * slots / IN_WORD + i / 4 % of_row;
    if (w * IN_WORD >= (lane_row + 1) * slots) continue;
    u32& word = words[sketch_word(layout.words, w, row / SKETCH_LANE_ROWS * 4 + quad)];
    u32 value = 0, written = 0;
#pragma unroll
    for (int k = 0; k < IN_WORD; k++) {
      const int slot = w * IN_WORD + k, other = row - lane_row + slot / slots - first;
      if (u32(other) >= u32(count)) continue;
      value |= spread_codes<BITS>(codes[other * pitch + slot % slots * 4 + quad]) << (BITS * k);
      written |= MASK << (BITS * k);
    }
    word = written == ~0u ? value : (word & ~written) | value;
  }
  if (d % 16 == 0) return;
#pragma unroll 1
  for (int i = team.member; i < count; i += team.members) {
    const u8* const last = codes + i * pitch + slots * 4;
    u8* const tail = block + layout.tail + (first + i) * BITS;
    if (BITS == 1)
      tail[0] = last[0] | last[1] << 4;
    else
      tail[0] = last[0], tail[1] = last[1];
  }
}

// A warp sketches a row that it holds: its codes go to `codes`, its factor to the block.
template <int PARTS>
DEVICE void sketch_row(const Params& p, const Rotation<PARTS>& rotation, Columns<PARTS>& row,
                       const Columns<PARTS>& centre, u8* codes, u8* factor) {
  Columns<PARTS>::each([&](int k, int e) { row.x[k][e] -= centre.x[k][e]; });
  rotation.apply(row);
  const BF16 of = p.sketch_bits == 1 ? encode_row<1>(row, p.head_size, codes) : encode_row<2>(row, p.head_size, codes);
  if (threadIdx.x % 32 == 0) *reinterpret_cast<u16*>(factor) = of.v;
}
