// What every selector does in a step beside scoring: appends rows, stores scores, and tells the selection what they are
// like.
#pragma once
#include "common.cuh"

template <class T> DEVICE float rounded(float x) {
  T y;
  narrow(x, y);
  return widen(y);
}

// The inputs are there; the next kernels read them, and so may start no earlier.
DEVICE void start_step() {
  wait_for_previous();
  let_next_start();
}

DEVICE bool step_is_scored(const Params& p, const Sequence& s, int b) { return chooses(p, candidates(p, s, b)); }

// Page steps at or behind the newest position are left over from tokens that a rewind took back: such a page counts as
// loaded just before the rows that the step feeds (docs/method.md, Truncation). Attention takes both numbers alike
// (ReadTokens::from), so that nobody waits for this. Where pages are not scored, merge.cuh does it.
struct PageStep {
  int page, step;
};

// A lane's first page step, asked for before the scores are made. Lanes of all scoring warps share the pages.
DEVICE PageStep first_page_step(const Params& p, const Sequence& s, int pair, int warp) {
  const int page = 32 * warp + threadIdx.x % 32;
  return {page, page < pages_for(p, s.len) ? page_steps_of(p, pair)[page] : -1};
}

DEVICE void forget_future(const Params& p, const Sequence& s, int pair, int warps, PageStep at) {
  const int pages = pages_for(p, s.len);
#pragma unroll 1
  while (at.page < pages) {
    if (at.step >= s.len - 1) page_steps_of(p, pair)[at.page] = s.first - 1;
    at.page += 32 * warps;
    if (at.page < pages) at.step = page_steps_of(p, pair)[at.page];
  }
}

// Where the score of a head is stored.
DEVICE float& score_at(const Params& p, int pair, int page, int h) {
  return p.scores[(size_t(pair) * scored_page_count(p.max_pages) + page) * scores_a_page(p) + h];
}

// Adding 0 turns -0 into 0, so that the two tie.
DEVICE void store_score(const Params& p, int pair, int h, int page, float score) {
  if (p.group_score == SOFTMAX)
    score_at(p, pair, page, h) = score;
  else if (h == p.group - 1)
    score_at(p, pair, page, 0) = score + 0.f;
}

// What the scoring blocks leave of a head's scores over the candidates among their pages: {largest, sum of e^(score -
// largest) over the others, least finite}. Without a softmax over pages the group's score stands for the head, and the
// sum is not used.
DEVICE float4 no_scores() { return {NEG_INF, 0.f, -NEG_INF, 0.f}; }
DEVICE float4 joined_stats(float4 a, float4 b) {
  const float2 sums = joined_rest({a.x, a.y}, {b.x, b.y});
  return {sums.x, sums.y, fminf(a.z, b.z), 0.f};
}

// A lane's part of such a sum over so many neighbouring lanes: all but one of those that have the largest count it.
template <int LANES> DEVICE float part_of_rest(float2 mine, float top) {
  const int lane = threadIdx.x % 32, first = lane & ~(LANES - 1);
  const u32 largest = __ballot_sync(ALL_LANES, mine.x == top) >> first;
  const float e = mine.x == top ? 1.f : __expf(mine.x - top);
  return fmaf(mine.y, e, __ffs(largest) - 1 == lane - first ? 0.f : e);
}

// Of so many neighbouring lanes.
template <int LANES> DEVICE float4 joined_over(float4 mine) {
  float top = mine.x, least = mine.z;
#pragma unroll
  for (int i = 1; i < LANES; i <<= 1)
    top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, i)), least = fminf(least, __shfl_xor_sync(ALL_LANES, least, i));
  float sum = part_of_rest<LANES>({mine.x, mine.y}, top);
#pragma unroll
  for (int i = 1; i < LANES; i <<= 1) sum += __shfl_xor_sync(ALL_LANES, sum, i);
  return {top, sum, least, 0.f};
}

DEVICE float4 of_score(float score) {
  score = if_number(score);
  return {score, 0.f, score == NEG_INF ? -NEG_INF : score, 0.f};
}

// The one that is not the largest counts.
DEVICE void add_score(float4& all, float score) {
  score = if_number(score);
  const float n = fmaxf(all.x, score), base = n == NEG_INF ? 0.f : n;
  const float e = exp2_fast((fminf(all.x, score) - base) * LOG2E);
  all.y = score > all.x ? fmaf(all.y, e, e) : all.y + e;
  all.x = n, all.z = score == NEG_INF ? all.z : fminf(all.z, score);
}

// Heads whose scores select.cuh needs one by one.
DEVICE int scored_heads(const Params& p) { return p.group_score == SOFTMAX ? p.group : 1; }

// Joins what the warps of a scoring block know of their scores, which are all written before the first warp announces
// them.
DEVICE void leave_range(const Params& p, int pair, float4* of_warps /* [SCORE_WARPS] */, float4 mine) {
  const float top = warp_max(mine.x), least = warp_min(mine.z);
  const int lane = threadIdx.x % 32;
  if (lane == 0) of_warps[threadIdx.x / 32] = {top, 0.f, least, 0.f};
  __syncthreads();
  if (threadIdx.x >= 32) return;
  mine = of_warps[lane % SCORE_WARPS];
  const float of_all = warp_max(mine.x), least_of_all = warp_min(mine.z);
  if (lane > 0) return;
  p.score_stats[size_t(pair) * p.score_parts + blockIdx.x] = {of_all, 0.f, least_of_all, 0.f};
  add_progress(&p.progress[pair]);
}

// The same for a softmax over pages: of every head.
RARE void leave_sums(const Params& p, int pair, float4* of_warps /* [16, SCORE_WARPS] */, float4 low,
                     float4 high /* of this lane's two heads */) {
  const int lane = threadIdx.x % 32, quad = lane % 4, fragment_row = lane / 4, heads = p.group > 8 ? 16 : 8;
#pragma unroll 1
  for (int head = fragment_row; head < heads; head += 8) {
    const float4 all = joined_over<4>(head < 8 ? low : high);
    if (quad == 0) of_warps[head * SCORE_WARPS + threadIdx.x / 32] = all;
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;
  // Two or four lanes a head.
  const int lanes = 32 / heads, head = lane / lanes;
  const float4* const of_head = of_warps + head * SCORE_WARPS;
  float4 all = of_head[lane % lanes];
#pragma unroll 1
  for (int w = lane % lanes + lanes; w < SCORE_WARPS; w += lanes) all = joined_stats(all, of_head[w]);
  all = lanes == 4 ? joined_over<4>(all) : joined_over<2>(all);
  if (lane % lanes == 0 && head < p.group)
    p.score_stats[(size_t(pair) * p.score_parts + blockIdx.x) * p.group + head] = all;
  __syncwarp();
  if (lane == 0) add_progress(&p.progress[pair]);
}

// Eight neighbouring elements of a fed row of values.
template <class T> DEVICE void read_value8(const Params& p, const T* value, float (&x)[8]) {
  if (p.vec8) {
    load8(value, x);
  } else {
#pragma unroll
    for (int k = 0; k < 8; k++) x[k] = widen(value[k]);
  }
}

// Writes the fed rows from..to (positions) of one KV head into the caches, and the keys to `copy` too, if there is one.
template <class T>
DEVICE void append(const Params& p, const Sequence& s, int b, int head, int from, int to, Team team,
                   T* copy = nullptr /* of row `from` */) {
  const int d = p.head_size, vec8s = d / 8, pair = b * p.kv_heads + head;
  T* keys = static_cast<T*>(p.key_cache) + size_t(pair) * p.capacity * d;
  T* values = static_cast<T*>(p.value_cache) + size_t(pair) * p.capacity * d;
#pragma unroll 1
  for (int i = team.member; i < (to - from) * vec8s; i += team.members) {
    const int position = from + i / vec8s, c = i % vec8s * 8, row = s.skipped + position - s.first;
    float key[8], of_value[8];
    read_value8(p, kv_row<T>(p, p.value, b, row, head) + c, of_value);
    read_vec8(p, kv_row<T>(p, p.key, b, row, head), c, position, key);
    store8(keys + size_t(position) * d + c, key);
    store8(values + size_t(position) * d + c, of_value);
    if (copy) store8(copy + 8 * i, key);
  }
}

// Stores a page's scores and its statistics, where it is a candidate, and announces it: by one warp, after a barrier.
DEVICE void leave_page(const Params& p, int pair, int page, int touched, bool counts,
                       const float* of_heads /* null: no page */) {
  const int lane = threadIdx.x % 32, heads = scored_heads(p);
  float score = of_heads && lane < p.group ? of_heads[lane] : NEG_INF;
  // Adding 0 turns -0 into 0, so that the two tie.
  if (p.group_score != SOFTMAX) score = warp_max(score) + 0.f;
  if (lane < heads) {
    if (of_heads) score_at(p, pair, page, lane) = score;
    if (p.score_parts)
      p.score_stats[(size_t(pair) * p.score_parts + p.score_blocks + touched) * heads + lane] =
          counts ? of_score(score) : no_scores();
  }
  __syncwarp();
  if (lane == 0) add_progress(&p.progress[pair]);
}
