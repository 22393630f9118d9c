// Attention of a block of query rows over the listed pages (a decoding step) or over every page up to each row
// (prefill).
//
// Grid (row blocks, splits, B * Hkv). Row r is query head r % g of fed token r / g: the newest token's group and
// those of the retrospective ones are served by one pass over the pages, with a mask a row. Running maxima, so that the
// warps' results are joined at the end, and the splits' by merge.cuh.
#pragma once
#include "finish.cuh"
#include "mma.cuh"

// The fed token of the block's first row, and how many rows there are in all.
struct RowBlock {
  int token0, rows, start;
};
DEVICE RowBlock row_block(const Params& p, const Sequence& s, int block, int size) {
  const int token0 = first_token(p, s);
  return {token0, (s.fed - token0) * p.group, block * size};
}

// Groups of 8 tokens that the block reads: of the pages that were chosen, of those that a step takes without choosing,
// or of those that a prefill's rows see.
struct Groups {
  const int* list;   // the chosen pages
  const int* steps;  // A of every page (merge.cuh writes it), where a query may have seen pages
  int sinks, first_page, recent, newest, count, shift /* log2 of groups a page */;
  int period, first_multiple, before_recent /* pages */;  // mode "periodic": common.cuh, Between
  // 1 and the number of the page; 0: it has not been chosen yet.
  DEVICE int ask(int group) const {
    const int i = group >> shift;
    if (list) return announced_page(list + i);
    return 1 + (i < sinks           ? first_page + i
                : i < before_recent ? (first_multiple + i - sinks) * period
                                    : recent + i - before_recent);
  }
  // The page that was asked for.
  DEVICE int page(int group, int asked) const {
    while (!asked) asked = ask(group);
    return asked - 1;
  }
  // The least position of a query that may take the page: the first behind the step that loaded it. A page step at or
  // behind the newest position is left over from tokens that a rewind took back: every query may.
  DEVICE int from(int page) const {
    const int step = steps ? steps[page] : -1;
    return step < newest ? max(step + 1, 0) : 0;
  }
};
DEVICE Groups groups_of(const Params& p, const Sequence& s, const RowBlock& rb, int size, int b, int pair) {
  Groups g = {};
  g.shift = p.page_shift - 3;
  if (p.phase == DECODE) {
    const Candidates all = candidates(p, s, b);
    if (chooses(p, all)) g.list = p.pages + size_t(pair) * p.max_pages;
    // The newest query takes every page.
    if (p.mode != DENSE && s.fed > 1) g.steps = page_steps_of(p, pair);
    const bool pattern = p.mode == STREAMING || p.mode == PERIODIC;
    g.sinks = pattern ? all.sinks : 0;
    g.first_page = all.from;
    g.recent = pattern ? recent_from(p, all) : all.from;
    const Between b = between(p, all, g.recent);
    g.period = b.period, g.first_multiple = b.first, g.before_recent = g.sinks + b.count;
    g.newest = s.len - 1;
    g.count = listed_pages(p, all) << g.shift;
  } else {
    const int oldest = s.first + rb.token0 + token_of(p, rb.start);
    const int newest = s.first + rb.token0 + token_of(p, min(rb.start + size, rb.rows) - 1);
    g.first_page = g.recent = seen_from(p, oldest) >> p.page_shift;
    g.count = (newest / 8 + 1) - (g.first_page << g.shift);
  }
  return g;
}

// Pages that are chosen are listed one by one (Groups::page waits for each), after the scores of all: so the rows that
// the step has appended are there too. The kernel that chooses them must have ended when this one ends, so that whoever
// waits for this one has waited for all.
DEVICE void wait_for_pages(const Params& p, const Groups& groups, int pair) {
  if (groups.list)
    wait_until(&p.progress[pair], all_score_blocks(p));
  else
    wait_for_previous();
}

// Where the rows of warps that share them are joined: each one's maxima (base 2), sums and scaled outputs.
template <int DP, int ROWS, int PARTS> struct Block {
  float stats[PARTS][ROWS][2];
  float outputs[PARTS][ROWS][DP + 4];
};

// Without splits (a prefill) a row ends at once: four of its elements.
template <class T>
RARE void end_elements(const Params& p, const Sequence& s, int b, int kv_head, int token0, int r, int c, float m,
                       float sum, float4 o) {
  const int token = token_of(p, r), head = kv_head * p.group + r - token * p.group, d = p.head_size;
  const Row row = row_of(p, s, b, head, token0 + token);
  const Joined j = join(p, s, row, m, sum, joined_with<T>(p, row));
  const float x[4] = {o.x * j.scale, o.y * j.scale, o.z * j.scale, o.w * j.scale};
  if (p.write_output) {
    T* out = static_cast<T*>(p.output) + ((size_t(b) * p.tokens + row.s) * p.heads + head) * d + c;
#pragma unroll
    for (int k = 0; k < 4; k++) narrow(x[k], out[k]);
  }
  if (j.cached) {
    const size_t slot = slot_of(p, row);
    *reinterpret_cast<float4*>(p.cached_outputs + slot * d + c) = {x[0], x[1], x[2], x[3]};
    if (c == 0) p.cached_lse[slot] = j.lse;
  }
}

// After the warps have been joined into `block`: the row's part, or its end.
template <class T, int DP, int ROWS, int PARTS>
DEVICE void write_rows(const Params& p, const Sequence& s, const RowBlock& rb, int b, int kv_head,
                       Block<DP, ROWS, PARTS>& block) {
  const int pair = b * p.kv_heads + kv_head, d = p.head_size;
  for (int i = threadIdx.x; i < ROWS * (DP / 4); i += blockDim.x) {
    const int n = i / (DP / 4), c = i % (DP / 4) * 4, r = rb.start + n;
    if (r >= rb.rows || c >= d) continue;
    float m = NEG_INF, sum = 0.f;
#pragma unroll
    for (int w = 0; w < PARTS; w++) m = fmaxf(m, block.stats[w][n][0]);
#pragma unroll
    for (int w = 0; w < PARTS; w++) {
      const float of = block.stats[w][n][1];
      // Without a largest logit it is 0, or NaN if all were, which must not be lost.
      sum += block.stats[w][n][0] == NEG_INF ? of : of * exp2_fast(block.stats[w][n][0] - m);
    }
    float4 o = {};
#pragma unroll
    for (int w = 0; w < PARTS; w++) {
      const float4 x = *reinterpret_cast<const float4*>(&block.outputs[w][n][c]);
      o = {o.x + x.x, o.y + x.y, o.z + x.z, o.w + x.w};
    }
    if (p.part_outputs) {
      const size_t part = (size_t(pair) * p.splits + blockIdx.y) * p.rows + r;
      *reinterpret_cast<float4*>(p.part_outputs + part * d + c) = o;
      if (c == 0) *reinterpret_cast<float2*>(p.part_stats + part * 2) = {m, sum};
      continue;
    }
    end_elements<T>(p, s, b, kv_head, rb.token0, r, c, m, sum, o);
  }
}

// In a prefill the next kernel reads the keys as they are now (prefill.cuh).
DEVICE void start_attention(const Params& p) {
  if (p.phase == PREFILL) wait_for_previous();
  let_next_start();
}

// The logit of a product, in base 2.
DEVICE float softcapped(const Params& p, float dot) { return p.softcap * tanhf(dot * p.scale / p.softcap) * LOG2E; }
// The same on tensor cores' sums, whose error is larger than this one's, some 1e-7 of the cap: tanh x = 1 - 2 / (e^2x +
// 1).
DEVICE float softcapped_fast(const Params& p, float dot) {
  const float e = exp2_fast(dot * __fdividef(2.f * LOG2E * p.scale, p.softcap));
  return p.softcap * LOG2E * (1.f - __fdividef(2.f, e + 1.f));
}
DEVICE float logit(const Params& p, float dot) { return p.softcap > 0.f ? softcapped(p, dot) : dot * p.scale * LOG2E; }

// ---- Tensor cores: float16 and bfloat16 ----

// Shape of a block: ROW_GROUPS warps take 8 rows each, TOKEN_GROUPS times over; those share the tiles of 16 tokens.
template <int DP, int BLOCK_ROWS> struct Shape : AttendShape<DP, BLOCK_ROWS> {
  using Host = AttendShape<DP, BLOCK_ROWS>;
  using Host::THREADS, Host::TOKENS;
  static constexpr int GROUPS = TOKENS / 8;
  static constexpr int TILES = TOKENS / ATTEND_TILE / Host::TOKEN_GROUPS;
  static constexpr int CHUNKS = DP / 8;  // 16-byte chunks of a row
  static_assert(TILES >= 1, "every warp has a tile");
  static_assert((MAX_STAGES + 1) * GROUPS <= THREADS, "a thread for each place of the first stages and one more");
};
// How far a logit (base 2) may lie above the maximum that its weight is relative to.
constexpr float SLACK = 8.f;

// Where a group of 8 tokens stands, and the least position of a query that may take its page.
struct Placed {
  int at, from;
};

DEVICE void load_matrices(u32 (&x)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address));
}
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
    const Placed two[2] = {placed[2 * i], placed[2 * i + 1]};
    if (p.softcap > 0.f) {
#pragma unroll
      for (int e = 0; e < 4; e++) logits[i][e] = softcapped_fast(p, logits[i][e]);
    }
    if (p.local_window) {
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (two[e / 2].at + fragment_row < seen_from(p, position[e % 2])) logits[i][e] = NEG_INF;
    }
#pragma unroll
    for (int e = 0; e < 4; e++) {
      logits[i][e] =
          position[e % 2] >= max(two[e / 2].at + fragment_row, two[e / 2].from) ? logits[i][e] * to_base2 : NEG_INF;
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

// The block's share of the groups, in stages, as a thread reads it: one place of every stage. Empty places have
// position s.len.
template <class S> struct StagePlaces {
  const Params& p;
  const Sequence& s;
  const Groups& groups;
  int begin, end, place;

  DEVICE int group(int stage) const { return begin + stage * S::GROUPS + place; }
  DEVICE int ask(int stage) const { return group(stage) < end ? groups.ask(group(stage)) : 0; }
  DEVICE int page(int stage, int asked) const { return group(stage) < end ? groups.page(group(stage), asked) : -1; }
  DEVICE int position(int stage, int page) const {
    return page < 0 ? s.len : (page << p.page_shift) + (group(stage) & ((1 << groups.shift) - 1)) * 8;
  }
  DEVICE int least_query(int page) const { return page < 0 ? 0 : groups.from(page); }
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
      const int row = i * STRIDE + copy_row, at = placed[row / 8].at + row % 8;
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
    Placed placed[MAX_STAGES + 1][S::GROUPS];
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
  const Groups groups = groups_of(p, s, rb, S::ROWS, b, pair);
  wait_for_pages(p, groups, pair);
  // This block's share: neighbouring groups, in stages.
  const Share share = share_of(groups.count / int(gridDim.y), groups.count % int(gridDim.y), blockIdx.y);
  const int begin = share.begin, end = share.end;
  const int last = (end - begin + S::GROUPS - 1) / S::GROUPS;
  // The list is read ahead of the keys, and A ahead of it, so that their latencies do not add to the keys'. At first by
  // a thread for each place of the first stages and the one behind them, then by those of the latter.
  const int its_stage = threadIdx.x / S::GROUPS, place = threadIdx.x % S::GROUPS;
  const bool reads_ahead = its_stage == p.stages;
  const StagePlaces<S> places = {p, s, groups, begin, end, place};
  int asked = 0, page = -1;
  if (its_stage <= p.stages) asked = places.ask(its_stage);
  if (its_stage < p.stages)
    page = places.page(its_stage, asked), sh.placed[its_stage][place].at = places.position(its_stage, page);
  __syncthreads();

  const StageCopies<T, S, DP> copies(p, s, pair, ring);
  auto fetch = [&](int stage, int slot, int list) {
    if (stage < last) copies.start(sh.placed[list], slot);
    commit_copies();
  };
  for (int i = 0; i < p.stages - 1; i++) fetch(i, i, i);
  // The first keys do not wait for A.
  if (its_stage < p.stages) sh.placed[its_stage][place].from = places.least_query(page);

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
      const int page = places.page(stage + p.stages, asked);
      ahead = {places.position(stage + p.stages, page), places.least_query(page)};
      asked = places.ask(stage + p.stages + 1);
    }
    fetch(stage + p.stages - 1, free_slot, free_list ? free_list - 1 : lists - 1);
    const u32 stored = ring + slot * S::STAGE;
    const Placed* placed = sh.placed[list] + 2 * my_tiles * S::TILES;
    float logits[S::TILES][4];
    key_products<T, S, DP>(logits, query, stored + key_at);
    const float above = mask_logits<S::TILES>(p, logits, placed, position, top, to_base2);
    // A maximum that is a little too small serves as well, and the lanes need not agree on one in every stage.
    if (__any_sync(ALL_LANES, above > SLACK)) {
      raise_maxima<S::TILES>(logits, top, base, sum, out);
    }
    add_values<T, S, DP>(logits, base, sum, out, stored + value_at);
    if (reads_ahead) sh.placed[free_list][place] = ahead;
    slot = slot + 1 == p.stages ? 0 : slot + 1;
    list = list + 1 == lists ? 0 : list + 1;
  }
  __syncthreads();  // the ring's memory becomes the block's
  leave_partial<DP>(block, my_tiles, my_rows, top, sum, out);
  write_rows<T, DP, S::ROWS, S::TOKEN_GROUPS>(p, s, rb, b, kv_head, block);
  wait_for_previous();
}

// ---- float32: no tensor core is exact enough ----

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
  const Groups groups = groups_of(p, s, rb, ROWS, b, pair);
  wait_for_pages(p, groups, pair);
  const int tiles = (groups.count + 1) / 2;
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
    int at[2], from[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int group = 2 * tile + half, inside = (group & ((1 << groups.shift) - 1)) * 8;
      const int page = group < groups.count ? groups.page(group, 0) : -1;
      at[half] = page < 0 ? s.len : (page << p.page_shift) + inside;
      from[half] = page < 0 ? 0 : groups.from(page);
    }
    const int token = lane / 2, mine = (token < 8 ? at[0] : at[1]) + token % 8, limit = token < 8 ? from[0] : from[1];
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
      const int row = (i < 8 ? at[0] : at[1]) + i % 8;
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
