// Attention in float32, for which no tensor core is exact enough.
#pragma once
#include "attend_rows.cuh"

// The block's query rows, rotated; zeros beyond the last row and beyond D.
template <int DP>
DEVICE void load_queries_f32(const Params& p, const Sequence& s, const RowBlock& rb, int b, int kv_head,
                             float (&query)[F32_ROWS][DP]) {
  for (int i = threadIdx.x; i < F32_ROWS * DP; i += 32 * F32_WARPS) {
    const int n = i / DP, c = i % DP, r = rb.start + n, of_row = token_of(p, r), token = rb.token0 + of_row;
    query[n][c] = r < rb.rows && c < p.head_size
                      ? rotated(p, query_row<F32>(p, b, s.skipped + token, kv_head * p.group + r - of_row * p.group), c,
                                s.first + token)
                      : 0.f;
  }
}

// Products of a key with every row. Two lanes a token, each with every other float4 of the key.
template <int DP>
DEVICE void key_products_f32(const float (&query)[F32_ROWS][DP], const float* key /* null: zeros */, int d,
                             float (&dot)[F32_ROWS]) {
#pragma unroll
  for (int n = 0; n < F32_ROWS; n++) dot[n] = 0.f;
  if (key) {
#pragma unroll 4
    for (int c = threadIdx.x % 2 * 4; c < d; c += 8) {
      const float4 k = *reinterpret_cast<const float4*>(key + c);
#pragma unroll
      for (int n = 0; n < F32_ROWS; n++) {
        const float4 q = *reinterpret_cast<const float4*>(&query[n][c]);
        dot[n] = fmaf(k.x, q.x, fmaf(k.y, q.y, fmaf(k.z, q.z, fmaf(k.w, q.w, dot[n]))));
      }
    }
  }
#pragma unroll
  for (int n = 0; n < F32_ROWS; n++) dot[n] += __shfl_xor_sync(ALL_LANES, dot[n], 1);
}

// Leaves a warp's maxima, sums and outputs in the block's memory.
template <int DP>
DEVICE void leave_partial_f32(Block<DP, F32_ROWS, F32_WARPS>& block, const float (&top)[F32_ROWS],
                              float (&sum)[F32_ROWS], const float (&out)[F32_ROWS][DP / 32]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < F32_ROWS; n++) {
    sum[n] = warp_sum(sum[n]);
    if (lane == 0) block.stats[warp][n][0] = top[n], block.stats[warp][n][1] = sum[n];
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < F32_ROWS; n++) {
    float m = NEG_INF;
#pragma unroll
    for (int x = 0; x < F32_WARPS; x++) m = fmaxf(m, block.stats[x][n][0]);
    const float scale = top[n] == NEG_INF ? 0.f : exp2f(top[n] - m);
#pragma unroll
    for (int c = 0; c < DP / 32; c++) block.outputs[warp][n][lane + 32 * c] = out[n][c] * scale;
  }
  __syncthreads();
}

template <int DP> DEVICE void attend_f32(const Params& p) {
  constexpr int ROWS = F32_ROWS, TOKENS = ATTEND_TILE;
  struct Shared {
    float query[ROWS][DP];
    float weights[F32_WARPS][TOKENS][ROWS];
    Block<DP, ROWS, F32_WARPS> block;
  };
  static_assert(sizeof(Shared) == f32_attend_bytes(ROWS, DP, F32_WARPS, TOKENS), "the host asks for as much");
  extern __shared__ __align__(1024) u8 raw[];
  Shared& sh = *reinterpret_cast<Shared*>(raw);
  start_attention(p);
  const int pair = blockIdx.z, b = p.batch > 1 ? pair / p.kv_heads : 0, kv_head = pair - b * p.kv_heads,
            d = p.head_size;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Sequence s = sequence(p, b);
  const RowBlock rb = row_block(p, s, gridDim.x - 1 - blockIdx.x /* the longest first */, ROWS);
  if (!s.valid || rb.start >= rb.rows) return;
  load_queries_f32<DP>(p, s, rb, b, kv_head, sh.query);
  __syncthreads();
  const ReadTokens tokens = tokens_of(p, s, rb, ROWS, b, pair);
  wait_for_pages(p, tokens, pair);
  const int tiles = (tokens.count + TOKENS - 1) / TOKENS;
  const float* keys = static_cast<const float*>(p.key_cache) + size_t(pair) * p.capacity * d;
  const float* values = static_cast<const float*>(p.value_cache) + size_t(pair) * p.capacity * d;
  int position[ROWS];
  float top[ROWS], sum[ROWS], out[ROWS][DP / 32];
#pragma unroll
  for (int n = 0; n < ROWS; n++) {
    const int r = rb.start + n;
    position[n] = r < rb.rows ? s.first + rb.token0 + token_of(p, r) : -1;
    top[n] = NEG_INF, sum[n] = 0.f;
#pragma unroll
    for (int c = 0; c < DP / 32; c++) out[n][c] = 0.f;
  }
  for (int tile = blockIdx.y * F32_WARPS + warp; tile < tiles; tile += gridDim.y * F32_WARPS) {
    const int token = lane / 2, number = TOKENS * tile + token;
    const int mine = number < tokens.count ? tokens.position(number, 0) : s.len;
    const int limit = mine < s.len ? tokens.from(mine) : 0;
    float dot[ROWS];
    key_products_f32<DP>(sh.query, mine < s.len ? keys + size_t(mine) * d : nullptr, d, dot);
#pragma unroll
    for (int n = 0; n < ROWS; n++) {
      const bool seen =
          position[n] >= max(mine, limit) && mine < s.len && (!p.local_window || mine >= seen_from(p, position[n]));
      const float x = seen ? logit(p, dot[n]) : NEG_INF;
      const float m = fmaxf(top[n], warp_max(x)), base = m == NEG_INF ? 0.f : m;
      const float shrink = exp2f(top[n] - base), weight = exp2f(x - base);
      top[n] = m;
      sum[n] = sum[n] * shrink + (lane % 2 ? 0.f : weight);
#pragma unroll
      for (int c = 0; c < DP / 32; c++) out[n][c] *= shrink;
      if (lane % 2 == 0) sh.weights[warp][token][n] = weight;
    }
    __syncwarp();
#pragma unroll 4
    for (int i = 0; i < TOKENS; i++) {
      const int row = __shfl_sync(ALL_LANES, mine, 2 * i);
      if (row >= s.len) continue;
      float weight[ROWS];
#pragma unroll
      for (int n = 0; n < ROWS; n++) weight[n] = sh.weights[warp][i][n];
#pragma unroll
      for (int c = 0; c < DP / 32; c++) {
        const int element = lane + 32 * c;
        const float v = element < d ? values[size_t(row) * d + element] : 0.f;
#pragma unroll
        for (int n = 0; n < ROWS; n++) out[n][c] = fmaf(weight[n], v, out[n][c]);
      }
    }
    __syncwarp();
  }
  leave_partial_f32<DP>(sh.block, top, sum, out);
  write_rows<F32, DP, ROWS, F32_WARPS>(p, s, rb, b, kv_head, sh.block);
  wait_for_previous();
}
