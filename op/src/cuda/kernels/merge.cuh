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
  int* const steps = p.page_steps + size_t(pair) * p.cache_pages;
  int* const list = p.pages + size_t(pair) * p.max_pages;
  const bool chosen = chooses(p, all);
  const int count = chosen ? listed_pages(p, all) : 0;
  if (!chosen) {
    // What scores.cuh does where pages are scored. Attention takes both numbers alike (Groups::from).
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
  const int recent = p.mode == STREAMING ? recent_from(all) : all.from;
#pragma unroll 1
  for (int page = (p.mode == DENSE ? 0 : all.from) + threadIdx.x; page < all.pages; page += MERGE_THREADS)
    if (p.mode == DENSE || page >= recent || page < p.sink_pages) steps[page] = newest;
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
  // Warps a row, a power of two; each takes every so many-th split.
  int team = MERGE_WARPS, token = blockIdx.z;
  if (p.phase == PREFILL && !p.last_tokens) {
    team = 1;
    token = blockIdx.z * MERGE_WARPS + warp;
  } else if (p.phase == DECODE && tokens > 1) {
    if (token == 0) {
      team = MERGE_WARPS / 2;
      token = warp >= team ? tokens - 1 : 0;
    } else if (token == tokens - 1) {
      return wait_for_previous();
    }
  }
  const int member = warp & (team - 1);
  const bool there = token < tokens;
  const Row row = row_of(p, s, b, head, token0 + token);
  const size_t slot = slot_of(p, row);
  // Of a row that a team ends, a thread ends one element, or two; of others a lane ends four neighbours, and four more.
  const int thread = 32 * member + lane, threads = 32 * team;
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
  float m = NEG_INF, sum = 0.f, x[8] = {};
  const int r = token * p.group + head - kv_head * p.group;
  const size_t part = size_t(pair) * p.splits * p.rows + r;
  if (there) {
    // The first outputs are asked for before it is known what they weigh.
    constexpr int AHEAD = 8;
    float4 ahead[AHEAD];
    const float* const outputs = p.part_outputs + part * d;
    const int next = p.rows * d;  // of the next split
    const int element0 = min(4 * lane, d - 4);
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
      if (member + i * team < p.splits)
        ahead[i] = *reinterpret_cast<const float4*>(outputs + size_t(member + i * team) * next + element0);
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
      weights[warp][i] = of_split.x;
    }
    const float mine = m;
    m = warp_max(m);
    sum = warp_sum(mine == NEG_INF ? sum : sum * exp2_fast(mine - m));
    // A lane's own logits become weights.
#pragma unroll 1
    for (int i = lane; i < p.splits; i += 32) weights[warp][i] = m == NEG_INF ? 0.f : exp2_fast(weights[warp][i] - m);
    __syncwarp();
    auto add = [&](int c, int split, float4 o) {
      const float weight = weights[warp][split];
      x[4 * c] = fmaf(weight, o.x, x[4 * c]);
      x[4 * c + 1] = fmaf(weight, o.y, x[4 * c + 1]);
      x[4 * c + 2] = fmaf(weight, o.z, x[4 * c + 2]);
      x[4 * c + 3] = fmaf(weight, o.w, x[4 * c + 3]);
    };
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
      if (member + i * team < p.splits) add(0, member + i * team, ahead[i]);
#pragma unroll
    for (int c = 0; c < 2; c++) {
      const int element = 128 * c + 4 * lane;
      if (element >= d) break;
#pragma unroll 2
      for (int i = member + (c ? 0 : AHEAD * team); i < p.splits; i += team)
        add(c, i, *reinterpret_cast<const float4*>(outputs + size_t(i) * next + element));
    }
  }
  const Joined j = there ? join(p, s, row, m, sum, other) : Joined{};
  T* out = static_cast<T*>(p.output) + ((size_t(b) * p.tokens + row.s) * p.heads + head) * d;
  auto end = [&](int c, float value) {
    if (p.write_output) narrow(value, out[c]);
    if (j.cached) p.cached_outputs[slot * d + c] = value;
  };
  if (team == 1) {
    // Rows of a prefill are complete.
    if (!there) return;
#pragma unroll
    for (int c = 0; c < 8; c++) {
      const int at = 128 * (c / 4) + 4 * lane + c % 4;
      if (at < d) end(at, x[c] * j.scale);
    }
  } else {
#pragma unroll
    for (int c = 0; c < 2; c++)
      if (128 * c < d)
        *reinterpret_cast<float4*>(&parts[warp][128 * c + 4 * lane]) = {x[4 * c], x[4 * c + 1], x[4 * c + 2],
                                                                        x[4 * c + 3]};
    __syncthreads();  // every slot is read before one is written, too
    if (!there) return;
#pragma unroll
    for (int c = 0; c < 2; c++) {
      const int at = thread + c * threads;
      if (at >= d) break;
      float sum_of_parts = 0.f;
#pragma unroll 4
      for (int w = 0; w < team; w++) sum_of_parts += parts[warp - member + w][at];
      end(at, sum_of_parts * j.scale + j.keep * cached[c]);
    }
  }
  if (j.cached && member == 0 && lane == 0) p.cached_lse[slot] = j.lse;
}
