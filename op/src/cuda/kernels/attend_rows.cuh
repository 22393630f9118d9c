// What both attention kernels share (attend.cuh, attend_f32.cuh): a block's rows, the tokens that they read, and how a
// row ends.
//
// Grid (row blocks, splits, B * Hkv). Row r is query head r % g of fed token r / g: the newest token's group and
// those of the retrospective ones are served by one pass over the pages, with a mask a row. Running maxima, so that the
// warps' results are joined at the end, and the splits' by merge.cuh.
#pragma once
#include "finish.cuh"

// The fed token of the block's first row, and how many rows there are in all.
struct RowBlock {
  int token0, rows, start;
};
DEVICE RowBlock row_block(const Params& p, const Sequence& s, int block, int size) {
  const int token0 = first_token(p, s);
  return {token0, (s.fed - token0) * p.group, block * size};
}

// Tokens that a block reads, by their numbers: of the pages that were chosen, of those that a step takes without
// choosing, or of those that a prefill's rows see.
struct ReadTokens {
  const int* list;   // the chosen pages
  const int* steps;  // A of every page (merge.cuh writes it), where a query may have seen pages
  int sinks, first_page, recent, newest, count, page_shift;
  int period, first_multiple, before_recent /* pages */;  // mode "periodic": common.cuh, Between
  // 1 and the number of a token's page; 0: it has not been chosen yet.
  DEVICE int ask(int token) const {
    const int i = token >> page_shift;
    if (list) return announced_page(list + i);
    return 1 + (i < sinks           ? first_page + i
                : i < before_recent ? (first_multiple + i - sinks) * period
                                    : recent + i - before_recent);
  }
  // The position of a token whose page was asked for.
  DEVICE int position(int token, int asked) const {
    while (!asked) asked = ask(token);
    return ((asked - 1) << page_shift) + (token & ((1 << page_shift) - 1));
  }
  // The least position of a query that may take the token: the first behind the step that loaded its page. A page step
  // at or behind the newest position is left over from tokens that a rewind took back: every query may.
  DEVICE int from(int position) const {
    const int step = steps ? steps[position >> page_shift] : -1;
    return step < newest ? max(step + 1, 0) : 0;
  }
};
DEVICE ReadTokens tokens_of(const Params& p, const Sequence& s, const RowBlock& rb, int size, int b, int pair) {
  ReadTokens t = {};
  t.page_shift = p.page_shift;
  if (p.phase == DECODE) {
    const Candidates all = candidates(p, s, b);
    if (chooses(p, all)) t.list = p.pages + size_t(pair) * p.max_pages;
    // The newest query takes every page.
    if (p.mode != DENSE && s.fed > 1) t.steps = page_steps_of(p, pair);
    const bool pattern = p.mode == STREAMING || p.mode == PERIODIC;
    t.sinks = pattern ? all.sinks : 0;
    t.first_page = all.from;
    t.recent = pattern ? recent_from(p, all) : all.from;
    const Between between_them = between(p, all, t.recent);
    t.period = between_them.period, t.first_multiple = between_them.first;
    t.before_recent = t.sinks + between_them.count;
    t.newest = s.len - 1;
    t.count = listed_pages(p, all) << p.page_shift;
  } else {
    const int oldest = s.first + rb.token0 + token_of(p, rb.start);
    const int newest = s.first + rb.token0 + token_of(p, min(rb.start + size, rb.rows) - 1);
    t.first_page = t.recent = seen_from(p, oldest) >> p.page_shift;
    t.count = newest + 1 - (t.first_page << p.page_shift);
  }
  return t;
}

// Pages that are chosen are listed one by one (ReadTokens::position waits for each), after the scores of all: so the
// rows that the step has appended are there too. The kernel that chooses them must have ended when this one ends, so
// that whoever waits for this one has waited for all.
DEVICE void wait_for_pages(const Params& p, const ReadTokens& tokens, int pair) {
  if (tokens.list)
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
