// Attention in float16 and bfloat16, on tensor cores: a block of query rows over the listed pages (a decoding step) or
// over every page up to each row (prefill). The grid: attend_rows.cuh.
#pragma once
#include "attend_rows.cuh"
#include "mma.cuh"

// Shape of a block: ROW_GROUPS warps take 8 rows each, TOKEN_GROUPS times over; those share the tiles of 16 tokens.
template <int DP, int BLOCK_ROWS> struct Shape : AttendShape<DP, BLOCK_ROWS> {
  using Host = AttendShape<DP, BLOCK_ROWS>;
  using Host::THREADS, Host::TOKENS;
  static constexpr int TILES = TOKENS / ATTEND_TILE / Host::TOKEN_GROUPS;
  static constexpr int CHUNKS = DP / 8;  // 16-byte chunks of a row
  static_assert(TILES >= 1, "every warp has a tile");
  static_assert(TOKENS <= THREADS && TOKENS % 32 == 0, "warps read ahead, a thread a token");
};
// How far a logit (base 2) may lie above the maximum that its weight is relative to.
constexpr float SLACK = 8.f;

// Where a token stands, and the least position of a query that may take it.
struct Placed {
  int at, from;
};

DEVICE void load_transposed(u32 (&x)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address));
}

// The block's query rows, rotated, into shared memory; zeros beyond the last row and beyond D.
template <class T, class S, int DP>
DEVICE void load_queries(const Params& p, const Sequence& s, const RowBlock& rb, int b, int kv_head,
                         T (&query)[S::ROWS][DP + 8]) {
  const int d = p.head_size;
#pragma unroll
  for (int i = 0; i < (S::ROWS * S::CHUNKS + S::THREADS - 1) / S::THREADS; i++) {
    const int at = threadIdx.x + i * S::THREADS, n = at / S::CHUNKS, d0 = at % S::CHUNKS * 8, r = rb.start + n,
              token = token_of(p, r);
    float x[8] = {};
    if (r < rb.rows && d0 < d)
      read_vec8(p, query_row<T>(p, b, s.skipped + rb.token0 + token, kv_head * p.group + r - token * p.group), d0,
                s.first + rb.token0 + token, x);
    if (n < S::ROWS) store8(&query[n][d0], x);
  }
}

// Products of a warp's tiles of keys with its 8 queries. The tiles side by side, so that one's latencies hide
// another's.
template <class T, class S, int DP>
DEVICE void key_products(float (&logits)[S::TILES][4], const u32 (&query)[DP / 16][2], u32 keys) {
#pragma unroll
  for (int i = 0; i < S::TILES; i++) {
    // Two sums, so that one product need not wait for the one before.
    float even[4] = {}, odd[4] = {};
#pragma unroll
    for (int k = 0; k < DP / 16; k++) {
      u32 a[4];
      load_matrices(a, (keys + i * 16 * S::CHUNKS * 16) ^ (2 * k * 16));
      if (k % 2)
        Mma<T>::add(odd, a[0], a[1], a[2], a[3], query[k][0], query[k][1]);
      else
        Mma<T>::add(even, a[0], a[1], a[2], a[3], query[k][0], query[k][1]);
    }
#pragma unroll
    for (int e = 0; e < 4; e++) logits[i][e] = even[e] + odd[e];
  }
}

// Softcap, sliding window and mask: what a query does not see becomes -inf, the rest is in base 2. Returns how far a
// logit lies above its row's maximum.
template <int TILES>
DEVICE float mask_logits(const Params& p, float (&logits)[TILES][4], const Placed* placed, const int (&position)[2],
                         const float (&top)[2], float to_base2) {
  const int fragment_row = threadIdx.x % 32 / 4;
  float above = NEG_INF;
#pragma unroll
  for (int i = 0; i < TILES; i++) {
    const Placed two[2] = {placed[16 * i + fragment_row], placed[16 * i + 8 + fragment_row]};
    if (p.softcap > 0.f) {
#pragma unroll
      for (int e = 0; e < 4; e++) logits[i][e] = softcapped_fast(p, logits[i][e]);
    }
    if (p.local_window) {
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (two[e / 2].at < seen_from(p, position[e % 2])) logits[i][e] = NEG_INF;
    }
#pragma unroll
    for (int e = 0; e < 4; e++) {
      logits[i][e] = position[e % 2] >= max(two[e / 2].at, two[e / 2].from) ? logits[i][e] * to_base2 : NEG_INF;
      above = fmaxf(above, logits[i][e] - top[e % 2]);
    }
  }
  return above;
}

// Weights of the logits, and outputs of the values: V^T P^T.
template <class T, class S, int DP>
DEVICE void add_values(float (&logits)[S::TILES][4], const float (&base)[2], float (&sum)[2], float (&out)[DP / 16][4],
                       u32 values) {
  u32 weights[S::TILES][2];
#pragma unroll
  for (int i = 0; i < S::TILES; i++) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      logits[i][e] = exp2_fast(logits[i][e] - base[e % 2]);
      sum[e % 2] += logits[i][e];
    }
    weights[i][0] = transpose8x8(Mma<T>::pack(logits[i][0], logits[i][1]));
    weights[i][1] = transpose8x8(Mma<T>::pack(logits[i][2], logits[i][3]));
  }
#pragma unroll
  for (int i = 0; i < S::TILES; i++)
#pragma unroll
    for (int j = 0; j < DP / 16; j++) {
      u32 a[4];
      load_transposed(a, (values + i * 16 * S::CHUNKS * 16) ^ (2 * j * 16));
      Mma<T>::add(out[j], a[0], a[1], a[2], a[3], weights[i][0], weights[i][1]);
    }
}

// Larger maxima for this warp's two rows: sums and outputs become relative to them.
template <int TILES, int PARTS>
DEVICE void raise_maxima(const float (&logits)[TILES][4], float (&top)[2], float (&base)[2], float (&sum)[2],
                         float (&out)[PARTS][4]) {
  float shrink[2];
#pragma unroll
  for (int e = 0; e < 2; e++) {
    float m = top[e];
#pragma unroll
    for (int i = 0; i < TILES; i++) m = fmaxf(m, fmaxf(logits[i][e], logits[i][e + 2]));
#pragma unroll
    for (int x = 4; x < 32; x <<= 1) m = fmaxf(m, __shfl_xor_sync(ALL_LANES, m, x));
    base[e] = m == NEG_INF ? 0.f : m;
    shrink[e] = exp2_fast(top[e] - base[e]);
    top[e] = m;
    sum[e] *= shrink[e];
  }
#pragma unroll
  for (int j = 0; j < PARTS; j++)
#pragma unroll
    for (int e = 0; e < 4; e++) out[j][e] *= shrink[e % 2];
}

// Joins the lanes of a warp and leaves its rows' maxima, sums and outputs in the block's memory.
template <int DP, int ROWS, int GROUPS>
DEVICE void leave_partial(Block<DP, ROWS, GROUPS>& block, int my_tiles, int my_rows, const float (&top)[2],
                          float (&sum)[2], const float (&out)[DP / 16][4]) {
  const int lane = threadIdx.x % 32, quad = lane % 4, fragment_row = lane / 4;
#pragma unroll
  for (int e = 0; e < 2; e++) {
#pragma unroll
    for (int x = 4; x < 32; x <<= 1) sum[e] += __shfl_xor_sync(ALL_LANES, sum[e], x);
    if (fragment_row == 0) {
      float* stats = block.stats[my_tiles][my_rows + 2 * quad + e];
      stats[0] = top[e], stats[1] = sum[e];
    }
  }
  __syncthreads();
  float scale[2];
#pragma unroll
  for (int e = 0; e < 2; e++) {
    float m = NEG_INF;
#pragma unroll
    for (int w = 0; w < GROUPS; w++) m = fmaxf(m, block.stats[w][my_rows + 2 * quad + e][0]);
    scale[e] = top[e] == NEG_INF ? 0.f : exp2_fast(top[e] - m);
  }
#pragma unroll
  for (int j = 0; j < DP / 16; j++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      block.outputs[my_tiles][my_rows + 2 * quad + e % 2][16 * j + fragment_row + e / 2 * 8] = out[j][e] * scale[e % 2];
  __syncthreads();
}

// A block's share of the tokens. Of places behind its end the position is `len`.
struct TokenPlaces {
  const ReadTokens& tokens;
  int begin, end, len;

  DEVICE int ask(int place) const { return begin + place < end ? tokens.ask(begin + place) : 0; }
  DEVICE int at(int place, int asked) const {
    return begin + place < end ? tokens.position(begin + place, asked) : len;
  }
  DEVICE int from(int at) const { return at < len ? tokens.from(at) : 0; }
};

// Copies a stage's rows of keys and values into its slot of the ring. Rows beyond the end are 0 (the last page's tokens
// not yet written may hold anything, even a NaN, which a weight of 0 would not silence); the mask takes them out. A
// thread copies one chunk of every so many-th row.
template <class T, class S, int DP> struct StageCopies {
  const T* key;  // this thread's chunk of row 0
  long long to_value;
  u32 ring;
  int d, len;

  DEVICE StageCopies(const Params& p, const Sequence& s, int pair, u32 ring) : ring(ring), d(p.head_size), len(s.len) {
    const T* keys = static_cast<const T*>(p.key_cache) + size_t(pair) * p.capacity * d;
    const T* values = static_cast<const T*>(p.value_cache) + size_t(pair) * p.capacity * d;
    key = keys + min(8 * int(threadIdx.x % S::CHUNKS), d - 8);
    to_value = values - keys;
  }
  DEVICE void start(const Placed* placed, int slot) const {
    constexpr int STRIDE = S::THREADS / S::CHUNKS;
    const int copy_row = threadIdx.x / S::CHUNKS, copy_chunk = threadIdx.x % S::CHUNKS;
    const bool copies = 8 * copy_chunk < d;
#pragma unroll
    for (int i = 0; i < S::TOKENS / STRIDE; i++) {
      const int row = i * STRIDE + copy_row, at = placed[row].at;
      const bool there = copies && at < len;
      const T* from = key + size_t(u32(there ? at : 0)) * u32(d);
      const u32 target = ring + slot * S::STAGE + (row * S::CHUNKS + (copy_chunk ^ (row % 8))) * 16;
      copy_async(target, from, there);
      copy_async(target + S::TOKENS * DP * 2, from + to_value, there);
    }
  }
};

// Keys and values stream through shared memory in stages of p.stages; logits are K Q^T (16 tokens x 8 rows), outputs
// V^T P^T (16 elements x 8 rows), so that a query group of 8 rows wastes nothing. Chunks of a row are swizzled against
// bank conflicts.
template <class T, int DP, int ROWS> DEVICE void attend_mma(const Params& p) {
  using S = Shape<DP, ROWS>;
  struct Shared {
    Placed placed[MAX_STAGES + 1][S::TOKENS];
    T query[S::ROWS][DP + 8];
  };
  static_assert(sizeof(Shared) == S::BESIDE, "the host asks for as much");
  extern __shared__ __align__(1024) u8 raw[];
  Shared& sh = *reinterpret_cast<Shared*>(raw + p.stages * S::STAGE);
  using Joint = Block<DP, S::ROWS, S::TOKEN_GROUPS>;
  Joint& block = *reinterpret_cast<Joint*>(raw);
  static_assert(sizeof(Joint) <= 2 * S::STAGE, "the ring's memory becomes the block's");
  const u32 ring = __cvta_generic_to_shared(raw);
  start_attention(p);
  const int pair = blockIdx.z, b = p.batch > 1 ? pair / p.kv_heads : 0, kv_head = pair - b * p.kv_heads,
            d = p.head_size;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane % 4, fragment_row = lane / 4;
  const int my_rows = warp % S::ROW_GROUPS * 8, my_tiles = warp / S::ROW_GROUPS;
  const Sequence s = sequence(p, b);
  const RowBlock rb = row_block(p, s, gridDim.x - 1 - blockIdx.x /* the longest first */, S::ROWS);
  if (!s.valid || rb.start >= rb.rows) return;

  load_queries<T, S, DP>(p, s, rb, b, kv_head, sh.query);
  int position[2];
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const int r = rb.start + my_rows + 2 * quad + e;
    position[e] = r < rb.rows ? s.first + rb.token0 + token_of(p, r) : -1;
  }
  const ReadTokens tokens = tokens_of(p, s, rb, S::ROWS, b, pair);
  wait_for_pages(p, tokens, pair);
  // This block's share: neighbouring tokens, by eight.
  const int vec8s = (tokens.count + 7) / 8;
  const Share share = share_of(vec8s / int(gridDim.y), vec8s % int(gridDim.y), blockIdx.y);
  const TokenPlaces places = {tokens, 8 * share.begin, min(8 * share.end, tokens.count), s.len};
  const int last = (places.end - places.begin + S::TOKENS - 1) / S::TOKENS;
  // The list is read ahead of the keys, and A ahead of it, so that their latencies do not add to the keys'. At first by
  // a thread for each place of the first stages, then by one for each of the stage behind them.
  const bool reads_ahead = threadIdx.x < S::TOKENS;
  int asked = reads_ahead ? places.ask(p.stages * S::TOKENS + threadIdx.x) : 0;
  for (int i = threadIdx.x; i < p.stages * S::TOKENS; i += S::THREADS)
    sh.placed[i / S::TOKENS][i % S::TOKENS].at = places.at(i, places.ask(i));
  __syncthreads();

  const StageCopies<T, S, DP> copies(p, s, pair, ring);
  auto fetch = [&](int stage, int slot, int list) {
    if (stage < last) copies.start(sh.placed[list], slot);
    commit_copies();
  };
  for (int i = 0; i < p.stages - 1; i++) fetch(i, i, i);
  // The first keys do not wait for A.
  for (int i = threadIdx.x; i < p.stages * S::TOKENS; i += S::THREADS) {
    Placed& placed = sh.placed[i / S::TOKENS][i % S::TOKENS];
    placed.from = places.from(placed.at);
  }

  u32 query[DP / 16][2];
#pragma unroll
  for (int k = 0; k < DP / 16; k++)
#pragma unroll
    for (int half = 0; half < 2; half++)
      query[k][half] = *reinterpret_cast<const u32*>(&sh.query[my_rows + fragment_row][16 * k + 8 * half + 2 * quad]);
  float top[2] = {NEG_INF, NEG_INF}, base[2] = {}, sum[2] = {}, out[DP / 16][4] = {};
  const float to_base2 = p.softcap > 0.f ? 1.f : p.scale * LOG2E;
  // Byte offsets in a stage of what this lane hands to ldmatrix: of its first chunk of its key row and its value row in
  // the warp's first tile. The others differ in the bits of the chunk's number only, as rows begin at multiples of
  // their length.
  const u32 key_at = (16 * my_tiles * S::TILES + lane % 16) * S::CHUNKS * 16 + ((lane / 16) ^ (lane % 8)) * 16;
  const u32 value_at = S::TOKENS * DP * 2 + (16 * my_tiles * S::TILES + lane % 8 + lane / 16 * 8) * S::CHUNKS * 16 +
                       ((lane / 8 % 2) ^ (lane % 8)) * 16;

  // Stages go round in the ring, lists in theirs, which is one longer.
  int slot = 0, list = 0;
  const int lists = p.stages + 1;
  for (int stage = 0; stage < last; stage++) {
    wait_for_copies(p.stages - 2);
    __syncthreads();
    // The slot before this one is free now; the list before this one is written at the end of this step.
    const int free_slot = slot ? slot - 1 : p.stages - 1, free_list = list ? list - 1 : lists - 1;
    Placed ahead;
    if (reads_ahead) {
      const int place = (stage + p.stages) * S::TOKENS + threadIdx.x;
      ahead.at = places.at(place, asked);
      ahead.from = places.from(ahead.at);
      asked = places.ask(place + S::TOKENS);
    }
    fetch(stage + p.stages - 1, free_slot, free_list ? free_list - 1 : lists - 1);
    const u32 stored = ring + slot * S::STAGE;
    const Placed* placed = sh.placed[list] + 16 * my_tiles * S::TILES;
    float logits[S::TILES][4];
    key_products<T, S, DP>(logits, query, stored + key_at);
    const float above = mask_logits<S::TILES>(p, logits, placed, position, top, to_base2);
    // A maximum that is a little too small serves as well, and the lanes need not agree on one in every stage.
    if (__any_sync(ALL_LANES, above > SLACK)) {
      raise_maxima<S::TILES>(logits, top, base, sum, out);
    }
    add_values<T, S, DP>(logits, base, sum, out, stored + value_at);
    if (reads_ahead) sh.placed[free_list][threadIdx.x] = ahead;
    slot = slot + 1 == p.stages ? 0 : slot + 1;
    list = list + 1 == lists ? 0 : list + 1;
  }
  __syncthreads();  // the ring's memory becomes the block's
  leave_partial<DP>(block, my_tiles, my_rows, top, sum, out);
  write_rows<T, DP, S::ROWS, S::TOKEN_GROUPS>(p, s, rb, b, kv_head, block);
  wait_for_previous();
}
