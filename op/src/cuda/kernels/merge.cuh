// Joins the splits of every row, then ends it: steps 3 to 5. Ignored rows become 0, those of a broken sequence NaN.
//
// Grid (Hq, B, blocks of rows), 8 warps; in a decoding step (Hq + Hkv, B, blocks of rows), where the last Hkv note
// which pages it loaded, and end the step's progress. In a decoding step a block ends one row, with all its warps; but
// the newest position takes the output cache's slot of the oldest one when the window is full, so these two rows share
// the first block, which reads both before it writes. In a prefill a block ends 8 rows, or where only the last ones are
// asked for, one.
//
// So small that a block is on a multiprocessor beside two that attend, before they end.
#pragma once
#include "finish.cuh"

template <class T> DEVICE void fill_row(const Params& p, int b, int s, int head, float value) {
  T* out = static_cast<T*>(p.output) + ((size_t(b) * p.tokens + s) * p.heads + head) * p.head_size;
#pragma unroll 1
  for (int c = threadIdx.x % 32; c < p.head_size; c += 32) narrow(value, out[c]);
}

// A of every page that a step loaded becomes its newest position; a dense layer has seen every page. The list of those
// that were chosen is cleared. A at or behind the newest position is left over from tokens that a rewind took back: the
// page counts as loaded just before the rows that the step feeds (docs/method.md, Truncation).
DEVICE void note_steps(const Params& p, const Sequence& s, int b, int kv_head) {
  constexpr int AT_ONCE = 8;
  const int pair = b * p.kv_heads + kv_head, newest = s.len - 1;
  const Candidates all = candidates(p, s, b);
  int* const steps = page_steps_of(p, pair);
  int* const list = p.pages + size_t(pair) * p.max_pages;
  const bool chosen = chooses(p, all);
  const int count = chosen ? listed_pages(p, all) : 0;
  if (!chosen) {
    // What score_output.cuh does where pages are scored. Attention takes both numbers alike (ReadTokens::from).
#pragma unroll 4
    for (int page = threadIdx.x; page < all.pages; page += MERGE_THREADS)
      if (steps[page] >= newest) steps[page] = s.first - 1;
    __syncthreads();
  }
  wait_for_previous();
  let_next_start();
  if (threadIdx.x == 0) p.progress[pair] = 0;
  if (chosen) {
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += AT_ONCE * MERGE_THREADS) {
      int listed[AT_ONCE];
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++) listed[k] = i + k * MERGE_THREADS < count ? list[i + k * MERGE_THREADS] : 0;
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++)
        if (listed[k]) steps[listed[k] - 1] = newest, list[i + k * MERGE_THREADS] = 0;
    }
    return;
  }
  const int recent = p.mode == STREAMING || p.mode == PERIODIC ? recent_from(p, all) : all.from;
  const int period = between(p, all, recent).period;
#pragma unroll 1
  for (int page = (p.mode == DENSE ? 0 : all.from) + threadIdx.x; page < all.pages; page += MERGE_THREADS)
    if (p.mode == DENSE || page >= recent || page < p.sink_pages || (period && page % period == 0))
      steps[page] = newest;
}

// The warps that end a row, a power of two of them, and this warp's part: each joins every so many-th split.
struct RowTeam {
  int size, member, token;
};

// A prefill ends a row with each warp. A decoding step ends one with all, apart from the first block, which ends the
// oldest and the newest row.
DEVICE RowTeam row_team(const Params& p, int tokens) {
  const int warp = threadIdx.x / 32;
  int size = MERGE_WARPS, token = blockIdx.z;
  if (p.phase == PREFILL && !p.last_tokens) {
    size = 1;
    token = blockIdx.z * MERGE_WARPS + warp;
  } else if (p.phase == DECODE && tokens > 1 && token == 0) {
    size = MERGE_WARPS / 2;
    token = warp >= size ? tokens - 1 : 0;
  }
  return {size, warp & (size - 1), token};
}

// A row's largest logit (base 2) and sum of weights over all splits, and this warp's part of the outputs: a lane has
// four neighbouring elements, and the four that lie 128 further.
struct RowSum {
  float top, sum, x[8];
};

// `part`: the row's first split. `weights`: of this warp, a weight a split.
DEVICE RowSum join_splits(const Params& p, const RowTeam& team, size_t part, float* weights /* [MAX_SPLITS] */) {
  // The first outputs are asked for before it is known what they weigh.
  constexpr int AHEAD = 8;
  const int lane = threadIdx.x % 32, d = p.head_size;
  float m = NEG_INF, sum = 0.f;
  float4 ahead[AHEAD];
  const float* const outputs = p.part_outputs + part * d;
  const int next = p.rows * d;  // of the next split
  const int element0 = min(4 * lane, d - 4);
#pragma unroll
  for (int i = 0; i < AHEAD; i++)
    if (team.member + i * team.size < p.splits)
      ahead[i] = *reinterpret_cast<const float4*>(outputs + size_t(team.member + i * team.size) * next + element0);
#pragma unroll 1
  for (int i = lane; i < p.splits; i += 32) {
    const float2 of_split = *reinterpret_cast<const float2*>(p.part_stats + (part + size_t(i) * p.rows) * 2);
    const float top = fmaxf(m, of_split.x);
    // Without a largest logit the sum is 0, or NaN if all were, which must not be lost.
    if (top == NEG_INF)
      sum += of_split.y;
    else
      sum = sum * (m == NEG_INF ? 1.f : exp2_fast(m - top)) +
            of_split.y * (of_split.x == NEG_INF ? 1.f : exp2_fast(of_split.x - top)),
      m = top;
    weights[i] = of_split.x;
  }
  const float mine = m;
  m = warp_max(m);
  sum = warp_sum(mine == NEG_INF ? sum : sum * exp2_fast(mine - m));
  // A lane's own logits become weights.
#pragma unroll 1
  for (int i = lane; i < p.splits; i += 32) weights[i] = m == NEG_INF ? 0.f : exp2_fast(weights[i] - m);
  __syncwarp();
  RowSum row = {m, sum, {}};
  auto add = [&](int c, int split, float4 o) {
    const float weight = weights[split];
    row.x[4 * c] = fmaf(weight, o.x, row.x[4 * c]);
    row.x[4 * c + 1] = fmaf(weight, o.y, row.x[4 * c + 1]);
    row.x[4 * c + 2] = fmaf(weight, o.z, row.x[4 * c + 2]);
    row.x[4 * c + 3] = fmaf(weight, o.w, row.x[4 * c + 3]);
  };
#pragma unroll
  for (int i = 0; i < AHEAD; i++)
    if (team.member + i * team.size < p.splits) add(0, team.member + i * team.size, ahead[i]);
#pragma unroll
  for (int c = 0; c < 2; c++) {
    const int element = 128 * c + 4 * lane;
    if (element >= d) break;
#pragma unroll 2
    for (int i = team.member + (c ? 0 : AHEAD * team.size); i < p.splits; i += team.size)
      add(c, i, *reinterpret_cast<const float4*>(outputs + size_t(i) * next + element));
  }
  return row;
}

template <class T> DEVICE void merge_kernel(const Params& p) {
  __shared__ float weights[MERGE_WARPS][MAX_SPLITS];
  __shared__ __align__(16) float parts[MERGE_WARPS][MAX_HEAD_SIZE];
  const int head = blockIdx.x, b = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32, d = p.head_size;
  const Sequence s = sequence(p, b);
  if (head >= p.heads) {
    if (blockIdx.z > 0) return;
    if (s.valid) return note_steps(p, s, b, head - p.heads);
    wait_for_previous();
    return let_next_start();
  }
  if (p.write_output) {
    const int dead = s.valid ? s.skipped : p.tokens;
#pragma unroll 1
    for (int row = blockIdx.z * MERGE_WARPS + warp; row < dead; row += gridDim.z * MERGE_WARPS)
      fill_row<T>(p, b, row, head, s.valid ? 0.f : NOT_A_NUMBER);
  }
  // The end of this kernel is the end of the step.
  if (!s.valid || !p.part_outputs) return wait_for_previous();
  const int kv_head = token_of(p, head), pair = b * p.kv_heads + kv_head;
  const int token0 = first_token(p, s), tokens = s.fed - token0;
  // The first block ends the newest row of a step.
  if (p.phase == DECODE && tokens > 1 && int(blockIdx.z) == tokens - 1) return wait_for_previous();
  const RowTeam team = row_team(p, tokens);
  const bool there = team.token < tokens;
  const Row row = row_of(p, s, b, head, token0 + team.token);
  const size_t slot = slot_of(p, row);
  // Of a row that a team ends, a thread ends one element, or two; of others a lane ends four neighbours, and four more.
  const int thread = 32 * team.member + lane, threads = 32 * team.size;
  // The output cache is read before the attention ends, and every slot before one is written.
  float cached[2] = {}, other = NEG_INF;
  if (there) {
    other = joined_with<T>(p, row);
#pragma unroll
    for (int c = 0; c < 2; c++)
      if (!row.complete && thread + c * threads < d) cached[c] = p.cached_outputs[slot * d + thread + c * threads];
  }
  wait_for_previous();
  // Not before: the next step's first kernels read state that this one's first kernels wrote before they wait for its
  // last.
  let_next_start();
  const int r = team.token * p.group + head - kv_head * p.group;
  const RowSum all =
      there ? join_splits(p, team, size_t(pair) * p.splits * p.rows + r, weights[warp]) : RowSum{NEG_INF, 0.f, {}};
  const Joined j = there ? join(p, s, row, all.top, all.sum, other) : Joined{};
  T* out = static_cast<T*>(p.output) + ((size_t(b) * p.tokens + row.s) * p.heads + head) * d;
  auto end = [&](int c, float value) {
    if (p.write_output) narrow(value, out[c]);
    if (j.cached) p.cached_outputs[slot * d + c] = value;
  };
  if (team.size == 1) {
    // Rows of a prefill are complete.
    if (!there) return;
#pragma unroll
    for (int c = 0; c < 8; c++) {
      const int at = 128 * (c / 4) + 4 * lane + c % 4;
      if (at < d) end(at, all.x[c] * j.scale);
    }
  } else {
#pragma unroll
    for (int c = 0; c < 2; c++)
      if (128 * c < d)
        *reinterpret_cast<float4*>(&parts[warp][128 * c + 4 * lane]) = {all.x[4 * c], all.x[4 * c + 1],
                                                                        all.x[4 * c + 2], all.x[4 * c + 3]};
    __syncthreads();  // every slot is read before one is written, too
    if (!there) return;
#pragma unroll
    for (int c = 0; c < 2; c++) {
      const int at = thread + c * threads;
      if (at >= d) break;
      float sum_of_parts = 0.f;
#pragma unroll 4
      for (int w = 0; w < team.size; w++) sum_of_parts += parts[warp - team.member + w][at];
      end(at, sum_of_parts * j.scale + j.keep * cached[c]);
    }
  }
  if (j.cached && team.member == 0 && lane == 0) p.cached_lse[slot] = j.lse;
}
