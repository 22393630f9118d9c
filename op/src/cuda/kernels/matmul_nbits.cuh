// ai.retro::MatMulNBits for a few rows: Y = A B^T + bias. A `[rows, K]` and Y `[rows, N]` of float16 or bfloat16, B
// `[N, K]` of 4 or 8 bits, with a scale, and perhaps a zero point, for each block of so many elements of a row of B.
//
// B comes from memory once, whatever the rows. A thread block has 32 rows of B, which are columns of Y; its warps share
// the depth K in chunks. Each warp copies its own chunks into shared memory, the next one while it multiplies one, so
// that no warp waits for another before their sums are joined. Tensor cores multiply B's codes, which are exact as
// floats (matmul_codes.cuh), by A; the sum over a block of B is scaled in f32.
#pragma once
#include "matmul_codes.cuh"

// Copies `bytes` of 16 bytes into shared memory (an address there), and zeros behind them.
DEVICE void copy_part(u32 target, const void* source, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(bytes) : "memory");
}
DEVICE uint4 shared_16(u32 address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
DEVICE uint2 shared_8(u32 address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
  return v;
}
DEVICE u16 shared_2(u32 address) {
  u16 v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address) : "memory");
  return v;
}
DEVICE u32 shared_1(u32 address) {
  u32 v;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}

// HALVES: blocks of 16 elements of 4 bits, of which 16 bytes hold two. ZEROS: there are zero points. TILES: of eight
// rows of A.
template <class T, int BITS, bool HALVES, bool ZEROS, int TILES> struct Matmul {
  static constexpr int PAIRS = Codes<T, BITS>::PAIRS;
  static constexpr int ROWS = 8 * TILES;
  // A piece is 16 bytes of a row of B.
  static constexpr int PIECE = matmul_piece_depth(BITS), CHUNK = matmul_chunk_depth(BITS);
  static constexpr int B_BYTES = 16 * MATMUL_PIECES;
  static constexpr int A_STRIDE = matmul_a_stride(BITS);
  // 16 bytes of a row of A.
  static constexpr int A_PARTS = CHUNK / 8;
  // Of a fragment's sums, lane l has columns l / 4 + 8 i of Y (i = 0 to 3), for rows 8 t + 2 (l % 4) + {0, 1}: [m][t]
  // [2 (i % 2) + {0, 1}] with m = i / 2.
  using Sums = float[2][TILES][4];

  const MatmulParams& p;
  const int warp, lane;
  // The first column and row of Y, and its rows.
  const int column, row, rows;
  // Shared memory of the warp: two slots of B's chunks, with scales and zero points; one or two of A's.
  const u32 ring, a_ring;
  // What a lane copies from and to, and reads, but for chunk and slot.
  const u8 *b_source, *a_source;
  u32 b_target, a_target, a_place, scale_start;

  DEVICE Matmul(const MatmulParams& p, u32 shared)
      : p(p),
        warp(threadIdx.x >> 5),
        lane(threadIdx.x & 31),
        // The last thread block repeats columns of the one before rather than have fewer.
        column(min(int(blockIdx.x) * MATMUL_COLUMNS, p.n - MATMUL_COLUMNS)),
        row(blockIdx.y * MATMUL_ROWS),
        rows(min(p.rows - row, ROWS)),
        ring(shared + warp * p.warp_bytes),
        a_ring(ring + 2 * p.slot_bytes) {
    const int of_b = lane / MATMUL_PIECES, piece = lane % MATMUL_PIECES;
    b_source = static_cast<const u8*>(p.b) + size_t(column + of_b) * p.b_stride + 16 * piece;
    b_target = swizzled(of_b, piece);
    const int of_a = lane / A_PARTS, part = lane % A_PARTS;
    a_source = static_cast<const u8*>(p.a) + 2 * (size_t(row + of_a) * p.k + 8 * part);
    a_target = of_a * A_STRIDE + 16 * part;
    a_place = (lane & 3) * (BITS == 4 ? 16 : 8);
    scale_start = 2 * (column + lane) * p.blocks;
  }

  // Where a chunk's slot has a piece of a row: eight rows' lie in different banks.
  static DEVICE u32 swizzled(int row, int piece) { return row * B_BYTES + ((piece ^ (row & 7)) << 4); }
  DEVICE u32 b_slot(int i) const { return ring + (i & 1) * p.slot_bytes; }
  DEVICE u32 a_slot(int i) const { return a_ring + (p.a_slots == 1 ? 0 : i & 1) * p.a_bytes; }
  DEVICE int first_block(int chunk) const {
    return HALVES ? 2 * chunk * MATMUL_PIECES : (chunk * MATMUL_PIECES) >> p.block_shift;
  }
  DEVICE u32 zero_bytes_before(int block) const {
    return p.zero_points == FLOAT_ZERO_POINTS ? 2 * block : (block * BITS) >> 3;
  }

  // A row's scales or zero points of a chunk, from the 16 bytes on in which they begin.
  static DEVICE void copy_beside(u32 target, const void* base, u32 total, u32 start, int copies) {
    u32 at = start & ~15u;
#pragma unroll 1
    for (int i = 0; i < copies; i++, at += 16, target += 16) {
      const bool there = at < total;
      copy_part(target, static_cast<const u8*>(base) + (there ? at : 0), there ? min(total - at, 16u) : 0);
    }
  }
  DEVICE void copy_b(u32 slot, int chunk) const {
    constexpr int AT_ONCE = 32 / MATMUL_PIECES;
    const u32 from = chunk * B_BYTES;
    const bool there = from + 16 * (lane % MATMUL_PIECES) < p.b_stride;
    const u8* source = b_source + (there ? from : 0);
#pragma unroll
    for (int i = 0; i < MATMUL_PIECES; i++, source += AT_ONCE * p.b_stride)
      // The swizzle of rows that are four away.
      copy_async(slot + (b_target ^ (i % 2 * 64)) + i * AT_ONCE * B_BYTES, source, there);
    const int block = first_block(chunk);
    const u32 beside = slot + MATMUL_COLUMNS * B_BYTES;
    copy_beside(beside + lane * 16 * p.scale_copies, p.scales, p.scale_bytes, scale_start + 2 * block, p.scale_copies);
    if (ZEROS)
      copy_beside(beside + MATMUL_COLUMNS * 16 * p.scale_copies + lane * 16 * p.zero_copies, p.zeros, p.zero_bytes,
                  u32(column + lane) * p.zero_stride + zero_bytes_before(block), p.zero_copies);
  }
  DEVICE void copy_a(u32 slot, int chunk) const {
    constexpr int AT_ONCE = 32 / A_PARTS;
    const bool there = chunk * CHUNK + 8 * (lane % A_PARTS) < p.k;
    const u8* source = a_source + (there ? size_t(2 * chunk * CHUNK) : 0);
    u32 target = slot + a_target;
    for (int i = lane / A_PARTS; i < rows; i += AT_ONCE) {
      copy_async(target, source, there);
      source += size_t(2 * AT_ONCE) * p.k, target += AT_ONCE * A_STRIDE;
    }
  }

  // Where a lane reads of a chunk: of A rows l / 4 + 8 t, of B the scales and zero points of rows l / 4 + 8 i.
  struct Places {
    u32 b, a[TILES], scale[4], zero[4];
    int block;
  };
  DEVICE Places places(u32 b, u32 a, int chunk) const {
    const int g = lane >> 2;
    const u32 beside = b + MATMUL_COLUMNS * B_BYTES;
    Places at;
    at.b = b, at.block = first_block(chunk);
    // In the place of rows that there are not, the last one: nobody reads what comes of it.
#pragma unroll
    for (int t = 0; t < TILES; t++) at.a[t] = a + min(g + 8 * t, rows - 1) * A_STRIDE + a_place;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int of_b = g + 8 * i;
      at.scale[i] = beside + of_b * 16 * p.scale_copies + (2 * ((column + of_b) * p.blocks + at.block) & 15);
      if (ZEROS) {
        const u32 start = u32(column + of_b) * p.zero_stride + zero_bytes_before(at.block);
        at.zero[i] = beside + MATMUL_COLUMNS * 16 * p.scale_copies + of_b * 16 * p.zero_copies + (start & 15);
      }
    }
    return at;
  }

  static DEVICE void load_a(const Places& at, int piece, u32 (&x)[TILES][PAIRS]) {
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      const u32 place = at.a[t] + piece * 2 * PIECE;
      if constexpr (BITS == 4) {
        const uint4 v = shared_16(place);
        x[t][0] = __byte_perm(v.x, v.z, 0x5410), x[t][1] = __byte_perm(v.x, v.z, 0x7632);
        x[t][2] = __byte_perm(v.y, v.w, 0x5410), x[t][3] = __byte_perm(v.y, v.w, 0x7632);
      } else {
        const uint2 v = shared_8(place);
        x[t][0] = v.x, x[t][1] = v.y;
      }
    }
  }
  DEVICE void load_codes(const Places& at, int piece, u32 (&codes)[4][PAIRS]) const {
    u32 b[4];
    load_matrices(b, at.b + swizzled(lane, piece));
#pragma unroll
    for (int i = 0; i < 4; i++) Codes<T, BITS>::unpack(b[i], codes[i]);
  }

  // Sums over a piece, or half of one, unscaled and with the default zero point.
  static DEVICE void multiply_codes(const u32 (&codes)[4][PAIRS], const u32 (&x)[TILES][PAIRS], Sums& part) {
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      float start[4] = {};
      if constexpr (Codes<T, BITS>::HAS_OFFSET) {
#pragma unroll
        for (int i = 0; i < PAIRS; i += 2) {
          const u32 low = Codes<T, BITS>::offset(i), high = Codes<T, BITS>::offset(i + 1);
          Mma<T>::add(start, low, low, high, high, x[t][i], x[t][i + 1]);
        }
      }
#pragma unroll
      for (int m = 0; m < 2; m++)
#pragma unroll
        for (int i = 0; i < 4; i++) part[m][t][i] = start[i];
    }
#pragma unroll
    for (int i = 0; i < PAIRS; i += 2)
#pragma unroll
      for (int m = 0; m < 2; m++)
#pragma unroll
        for (int t = 0; t < TILES; t++)
          Mma<T>::add(part[m][t], codes[2 * m][i], codes[2 * m + 1][i], codes[2 * m][i + 1], codes[2 * m + 1][i + 1],
                      x[t][i], x[t][i + 1]);
  }

  DEVICE float zero_point(u32 place, int block) const {
    constexpr float DEFAULT = 1 << (BITS - 1);
    if (p.zero_points == FLOAT_ZERO_POINTS) return widen(T{shared_2(place)}) - DEFAULT;
    const u32 byte = shared_1(place);
    return float(BITS == 8 ? byte : (byte >> 4 * (block & 1)) & 15) - DEFAULT;
  }
  // What a zero point is away from the default, times the sum of A's elements.
  DEVICE void subtract_zeros(const Places& at, int block, const u32 (&x)[TILES][PAIRS], Sums& part) const {
    const u32 away = zero_bytes_before(block) - zero_bytes_before(at.block);
    float zero[4];
#pragma unroll
    for (int i = 0; i < 4; i++) zero[i] = zero_point(at.zero[i] + away, block);
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      float total[4] = {};
#pragma unroll
      for (int i = 0; i < PAIRS; i += 2)
        Mma<T>::add(total, ones(T{}), ones(T{}), ones(T{}), ones(T{}), x[t][i], x[t][i + 1]);
#pragma unroll
      for (int m = 0; m < 2; m++)
#pragma unroll
        for (int i = 0; i < 4; i++) part[m][t][i] = fmaf(-zero[2 * m + i / 2], total[i % 2], part[m][t][i]);
    }
  }
  static DEVICE void add_scaled(const float (&scale)[4], const Sums& part, Sums& sums) {
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) sums[m][t][i] = fmaf(scale[2 * m + i / 2], part[m][t][i], sums[m][t][i]);
  }

  DEVICE void multiply_piece(const Places& at, int chunk, int piece, Sums& sums) const {
    u32 x[TILES][PAIRS], codes[4][PAIRS];
    load_a(at, piece, x);
    load_codes(at, piece, codes);
#pragma unroll
    for (int half = 0; half < 1 + HALVES; half++) {
      const int all = chunk * MATMUL_PIECES + piece, block = HALVES ? 2 * all + half : all >> p.block_shift;
      u32 of_block[TILES][PAIRS];
      Sums part;
      float scale[4];
#pragma unroll
      for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int i = 0; i < PAIRS; i++) of_block[t][i] = !HALVES || (lane & 3) >> 1 == half ? x[t][i] : 0;
      multiply_codes(codes, of_block, part);
      if constexpr (ZEROS) subtract_zeros(at, block, of_block, part);
#pragma unroll
      for (int i = 0; i < 4; i++) scale[i] = widen(T{shared_2(at.scale[i] + 2 * (block - at.block))});
      add_scaled(scale, part, sums);
    }
  }
  // All of a chunk whose pieces are blocks, and whose scales are 16 bytes a row in their place.
  DEVICE void multiply_regular(const Places& at, Sums& sums) const {
    uint4 scales[4];
#pragma unroll
    for (int i = 0; i < 4; i++) scales[i] = shared_16(at.scale[i]);
#pragma unroll
    for (int piece = 0; piece < MATMUL_PIECES; piece++) {
      u32 x[TILES][PAIRS], codes[4][PAIRS];
      Sums part;
      float scale[4];
      load_a(at, piece, x);
      load_codes(at, piece, codes);
      multiply_codes(codes, x, part);
      if constexpr (ZEROS) subtract_zeros(at, at.block + piece, x, part);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const u32 two[4] = {scales[i].x, scales[i].y, scales[i].z, scales[i].w};
        scale[i] = widen(T{u16(two[piece / 2] >> 16 * (piece % 2))});
      }
      add_scaled(scale, part, sums);
    }
  }
  DEVICE void multiply(u32 b, u32 a, int chunk, Sums& sums) const {
    const Places at = places(b, a, chunk);
    if (BITS == 4 && !HALVES && p.regular) return multiply_regular(at, sums);
    // In the last chunk scales behind a row's last may be anything.
    const int pieces = min(MATMUL_PIECES, (p.k - chunk * CHUNK + PIECE - 1) / PIECE);
#pragma unroll 1
    for (int piece = 0; piece < pieces; piece++) multiply_piece(at, chunk, piece, sums);
  }

  // The warp's chunks: every so many, from its own number on.
  DEVICE void multiply_all(Sums& sums) const {
    const int warps = blockDim.x >> 5, count = max(p.chunks - warp + warps - 1, 0) / warps;
    const auto chunk = [&](int i) { return warp + i * warps; };
    const bool one_slot = p.a_slots == 1;
    // Weights are there before the kernel that makes A has ended.
    const int early = min(count, one_slot ? 2 : 1);
    if (!p.b_is_constant) wait_for_previous();
    for (int i = 0; i < early; i++) copy_b(b_slot(i), chunk(i));
    if (p.b_is_constant) wait_for_previous();
    if (count > 0) copy_a(a_slot(0), chunk(0));
    commit_copies();
#pragma unroll 1
    for (int i = 0; i < count; i++) {
      // All, but for a chunk of B that is for later.
      wait_for_copies(one_slot && i > 0 ? 1 : 0);
      __syncwarp();
      if (!one_slot) {
        if (i + 1 < count) copy_b(b_slot(i + 1), chunk(i + 1)), copy_a(a_slot(i + 1), chunk(i + 1));
        commit_copies();
        multiply(b_slot(i), a_slot(i), chunk(i), sums);
        continue;
      }
      multiply(b_slot(i), a_slot(i), chunk(i), sums);
      __syncwarp();
      if (i + 1 < count) copy_a(a_slot(i + 1), chunk(i + 1));
      commit_copies();
      if (i + 2 < count) copy_b(b_slot(i + 2), chunk(i + 2));
      commit_copies();
    }
    wait_for_copies(0);
  }

  // Joins the warps' sums, in shared memory as [warp][row][column], in the order of the warps.
  DEVICE void write(const Sums& sums, float* joined) const {
    constexpr int PITCH = MATMUL_COLUMNS + 1;
    const int g = lane >> 2, q = lane & 3, warps = blockDim.x >> 5;
    __syncthreads();
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          joined[(warp * ROWS + 8 * t + 2 * q + i % 2) * PITCH + 16 * m + g + 8 * (i / 2)] = sums[m][t][i];
    __syncthreads();
    for (int r = warp; r < rows; r += warps) {
      float total = p.bias ? widen(static_cast<const T*>(p.bias)[column + lane]) : 0.f;
      for (int w = 0; w < warps; w++) total += joined[(w * ROWS + r) * PITCH + lane];
      narrow(total, static_cast<T*>(p.y)[size_t(row + r) * p.n + column + lane]);
    }
  }
};

template <class T, int BITS, bool HALVES, bool ZEROS, int TILES> DEVICE void matmul_nbits(const MatmulParams& p) {
  extern __shared__ uint4 matmul_shared[];
  using Job = Matmul<T, BITS, HALVES, ZEROS, TILES>;
  const Job job(p, u32(__cvta_generic_to_shared(matmul_shared)));
  let_next_start();
  typename Job::Sums sums = {};
  job.multiply_all(sums);
  job.write(sums, reinterpret_cast<float*>(matmul_shared));
}
