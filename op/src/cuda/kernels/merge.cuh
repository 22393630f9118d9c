// Joins the splits of every row, then ends it: steps 3 to 5. Ignored rows become 0, those of a broken sequence NaN.
//
// Grid (Hq, B, blocks of rows), 16 warps; in a decoding step (Hq + Hkv, B, blocks of rows), where the last Hkv note which pages it
// loaded, and end the step's progress. In a decoding step a block ends one row, with all its warps; but the newest position
// takes the output cache's slot of the oldest one when the window is full, so these two rows share the first block, which
// reads both before it writes. In a prefill a block ends 16 rows.
#pragma once
#include "finish.cuh"

constexpr int MERGE_WARPS = 16;
constexpr int MERGE_THREADS = 32 * MERGE_WARPS;
// Splits of a row.
constexpr int MAX_SPLITS = 256;

template <class T> DEVICE void fill_row(const Params& p, int b, int s, int head, float value) {
  T* out = static_cast<T*>(p.output) + ((size_t(b) * p.tokens + s) * p.heads + head) * p.head_size;
  for (int c = threadIdx.x % 32; c < p.head_size; c += 32) narrow(value, out[c]);
}

// A of every page that a step loaded becomes its newest position; a dense layer has seen every page.
DEVICE void note_steps(const Params& p, const Sequence& s, int b, int kv_head) {
  const int pair = b * p.kv_heads + kv_head;
  const Candidates all = candidates(p, s, b);
  int* steps = p.page_steps + size_t(pair) * p.cache_pages;
  if (chooses(p, all)) {
    const int* list = p.pages + size_t(pair) * p.max_pages;
    const int count = listed_pages(p, all);
#pragma unroll 4
    for (int i = threadIdx.x; i < count; i += blockDim.x) steps[list[i]] = s.len - 1;
    return;
  }
  const int recent = p.mode == STREAMING ? recent_from(all) : all.from;
  for (int page = (p.mode == DENSE ? 0 : all.from) + threadIdx.x; page < all.pages; page += blockDim.x)
    if (p.mode == DENSE || page >= recent || page < p.sink_pages) steps[page] = s.len - 1;
}

template <class T> DEVICE void merge_kernel(const Params& p) {
  __shared__ float weights[MERGE_WARPS][MAX_SPLITS];
  __shared__ float parts[MERGE_WARPS][256];
  const int head = blockIdx.x, b = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32, d = p.head_size;
  const Sequence s = sequence(p, b);
  if (head >= p.heads) {
    wait_for_previous();
    let_next_start();
    if (blockIdx.z) return;
    if (threadIdx.x < 2) p.progress[2 * (b * p.kv_heads + head - p.heads) + threadIdx.x] = 0;
    if (s.valid) note_steps(p, s, b, head - p.heads);
    return;
  }
  if (p.write_output) {
    const int dead = s.valid ? s.skipped : p.tokens;
    for (int row = blockIdx.z * MERGE_WARPS + warp; row < dead; row += gridDim.z * MERGE_WARPS)
      fill_row<T>(p, b, row, head, s.valid ? 0.f : __uint_as_float(0x7fffffffu));
  }
  // The end of this kernel is the end of the step.
  if (!s.valid || !p.part_outputs) return wait_for_previous();
  const int kv_head = head / p.group, pair = b * p.kv_heads + kv_head;
  const int token0 = first_token(p, s), tokens = s.fed - token0;
  // Warps a row, a power of two; each takes every so many-th split.
  int team, token;
  if (p.phase == DECODE) {
    const int block = blockIdx.z;
    if (tokens == 1 || block) {
      team = MERGE_WARPS;
      token = block < tokens - 1 || tokens == 1 ? block : tokens;
    } else {
      team = MERGE_WARPS / 2;
      token = warp / team ? tokens - 1 : 0;
    }
  } else {
    team = 1;
    token = blockIdx.z * MERGE_WARPS + warp;
  }
  const int member = warp % team;
  const bool there = token < tokens;
  const Row row = row_of(p, s, b, head, token0 + token);
  const bool ends = there && member == 0;
  const size_t slot = slot_of(p, row);
  // The output cache is read before the attention ends, and every slot before one is written.
  float cached[8] = {}, other = NEG_INF;
  if (ends) {
    other = joined_with<T>(p, row);
    if (!row.complete) {
#pragma unroll
      for (int c = 0; c < 8; c++) {
        const int element = 128 * (c / 4) + 4 * lane + c % 4;
        if (element < d) cached[c] = p.cached_outputs[slot * d + element];
      }
    }
  }
  wait_for_previous();
  // Not before: the next step's first kernels read state that this one's first kernels wrote before they wait for its last.
  let_next_start();
  float m = NEG_INF, sum = 0.f, x[8] = {};
  const int r = token * p.group + head % p.group;
  const size_t part = size_t(pair) * p.splits * p.rows + r;
  if (there) {
    // The first outputs are asked for before it is known what they weigh.
    constexpr int AHEAD = 4;
    float4 ahead[AHEAD];
    const int element0 = min(4 * lane, d - 4);
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      const int split = min(member + i * team, p.splits - 1);
      ahead[i] = *reinterpret_cast<const float4*>(p.part_outputs + (part + size_t(split) * p.rows) * d + element0);
    }
    for (int i = lane; i < p.splits; i += 32) {
      const float2 of_split = *reinterpret_cast<const float2*>(p.part_stats + (part + size_t(i) * p.rows) * 2);
      const float top = fmaxf(m, of_split.x);
      if (top != NEG_INF) {
        sum = sum * exp2f(m - top) + of_split.y * exp2f(of_split.x - top);
        m = top;
      }
      weights[warp][i] = of_split.x;
    }
    const float mine = m;
    m = warp_max(m);
    sum = warp_sum(mine == NEG_INF ? 0.f : sum * exp2f(mine - m));
    __syncwarp();
    auto weigh = [&](int split) {
      const float of_split = weights[warp][split];
      return of_split == NEG_INF ? 0.f : exp2f(of_split - m);
    };
    auto add = [&](int c, float weight, float4 o) {
      x[4 * c] = fmaf(weight, o.x, x[4 * c]);
      x[4 * c + 1] = fmaf(weight, o.y, x[4 * c + 1]);
      x[4 * c + 2] = fmaf(weight, o.z, x[4 * c + 2]);
      x[4 * c + 3] = fmaf(weight, o.w, x[4 * c + 3]);
    };
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
      if (member + i * team < p.splits) add(0, weigh(member + i * team), ahead[i]);
#pragma unroll
    for (int c = 0; c < 2; c++) {
      const int element = 128 * c + 4 * lane;
      if (element >= d) break;
#pragma unroll 4
      for (int i = member + (c ? 0 : AHEAD * team); i < p.splits; i += team)
        add(c, weigh(i),
            *reinterpret_cast<const float4*>(p.part_outputs + (part + size_t(i) * p.rows) * d + element));
    }
  }
  if (team > 1) {
    const int elements = d > 128 ? 8 : 4;
#pragma unroll
    for (int c = 0; c < 8; c++)
      if (c < elements) parts[warp][32 * c + lane] = x[c];
    __syncthreads();
    if (member == 0)
      for (int w = 1; w < team; w++)
#pragma unroll
        for (int c = 0; c < 8; c++)
          if (c < elements) x[c] += parts[warp + w][32 * c + lane];
  }
  Joined j = {};
  if (ends) {
    j = join(p, s, row, m, sum, other);
#pragma unroll
    for (int c = 0; c < 8; c++) x[c] = x[c] * j.scale + j.keep * cached[c];
  }
  __syncthreads();  // every slot is read before one is written
  if (!ends) return;
  T* out = static_cast<T*>(p.output) + ((size_t(b) * p.tokens + row.s) * p.heads + head) * d;
#pragma unroll
  for (int c = 0; c < 8; c++) {
    const int element = 128 * (c / 4) + 4 * lane + c % 4;
    if (element >= d) continue;
    if (p.write_output) narrow(x[c], out[element]);
    if (j.cached) p.cached_outputs[slot * d + element] = x[c];
  }
  if (j.cached && lane == 0) p.cached_lse[slot] = j.lse;
}
