// The scores that a selecting block chooses by, and their range: those of the group, joined from the heads' where the
// group score needs the scores of all pages.
#pragma once
#include "select_shared.cuh"

// A head's largest score and the logarithm (base 2) of 1 and the sum of e^(score - largest) over the others. From these
// the logarithm of a page's share, exact for the page that has all but nothing of the head.
DEVICE float log_share(float score, float most, float rest) { return fmaf(score - most, LOG2E, -rest); }
struct HeadSums {
  float most, rest;
  // Of no scores every share is 0.
  DEVICE explicit HeadSums(float2 sums)
      : most(sums.x == NEG_INF ? 0.f : sums.x), rest(sums.x == NEG_INF ? 0.f : log2_1p(sums.y)) {}
  DEVICE float share(float score) const { return log_share(score, most, rest); }
};

// Joined over a warp: the largest first, so that a lane needs one exponential.
DEVICE float2 warp_sums(float2 a) {
  const float top = warp_max(a.x);
  return {top, warp_sum(part_of_rest<32>(a, top))};
}

// Two bounds that the group's scores of a KV head's candidates lie between.
struct Range {
  float lowest, highest;
};

// The sums of every head over the candidate pages, and its least and largest logarithm of a share, from the parts that
// the scoring blocks left.
DEVICE void joined_heads(const Params& p, int pair, SelectShared& sh) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
  for (int h = warp; h < p.group; h += SELECT_WARPS) {
    float2 sums = {NEG_INF, 0.f};
    float least = -NEG_INF;
#pragma unroll 1
    for (int i = lane; i < p.score_parts; i += 32) {
      const float4 part = p.score_stats[(size_t(pair) * p.score_parts + i) * p.group + h];
      sums = joined_rest(sums, {part.x, part.y});
      least = fminf(least, part.z);
    }
    sums = warp_sums(sums);
    least = warp_min(least);
    const HeadSums head(sums);
    if (lane > 0) continue;
    sh.most[h] = head.most, sh.rest[h] = head.rest;
    sh.lowest[h] = head.share(least), sh.highest[h] = head.share(sums.x);
  }
  __syncthreads();
}

// The sums alone, from the scores themselves.
RARE void page_sums(const Params& p, const float* scores, int from, int pages, SelectShared* shared) {
  SelectShared& sh = *shared;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
  for (int h = 0; h < p.group; h++) {
    float2 sums = {NEG_INF, 0.f};
    for (int i = from + threadIdx.x; i < pages; i += SELECT_THREADS)
      sums = joined_rest(sums, {if_number(scores[size_t(i) * scores_a_page(p) + h]), 0.f});
    sums = warp_sums(sums);
    if (lane == 0) sh.part[warp] = sums;
    __syncthreads();
    if (warp == 0) {
      sums = warp_sums(lane < SELECT_WARPS ? sh.part[lane] : float2{NEG_INF, 0.f});
      const HeadSums head(sums);
      if (lane == 0) sh.most[h] = head.most, sh.rest[h] = head.rest;
    }
    __syncthreads();
  }
}

// The range of the group's scores from the parts that the scoring blocks left, and the heads' sums that they need.
template <Choice CHOICE> DEVICE Range joined_range(const Params& p, int pair, SelectShared& sh) {
  Range range = {NEG_INF, NEG_INF};
  if (softmax_over_pages<CHOICE>(p)) {
    joined_heads(p, pair, sh);
    // A page's score is at least that of each head, and at most the largest of them and log g.
#pragma unroll 1
    for (int h = 0; h < p.group; h++)
      range.lowest = fmaxf(range.lowest, sh.lowest[h]), range.highest = fmaxf(range.highest, sh.highest[h]);
    range.highest += log2_fast(float(p.group));
    return range;
  }
  float least = -NEG_INF;
  // Two at once. Whatever is read again changes nothing.
  const float4* const parts = p.score_stats + size_t(pair) * p.score_parts;
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < p.score_parts; i += 64) {
    const float4 a = parts[i], b = parts[min(i + 32, p.score_parts - 1)];
    range.highest = fmaxf(range.highest, fmaxf(a.x, b.x)), least = fminf(least, fminf(a.z, b.z));
  }
  return {warp_min(least), warp_max(range.highest)};
}

// The scores of four heads of pages that are SELECT_THREADS apart.
constexpr int JOINED_AT_ONCE = 4;
struct HeadScores {
  float4 four[JOINED_AT_ONCE];
  DEVICE void ask(const Params& p, const float* scores, int page, int count, int h) {
#pragma unroll
    for (int i = 0; i < JOINED_AT_ONCE; i++)
      four[i] = *reinterpret_cast<const float4*>(
          scores + size_t(max(min(page + i * SELECT_THREADS, count - 1), 0)) * scores_a_page(p) + h);
  }
};

// The group's scores of the candidates from the heads': the logarithms (base 2) of the sums over heads of each head's
// softmax. Of other pages any number. `asked`: the first heads' of the first pages.
DEVICE void join_heads(const Params& p, const float* scores /* from the first page on */, HeadScores& asked,
                       float* joined, int count, const SelectShared& sh) {
#pragma unroll 1
  for (int page = threadIdx.x; page < count; page += JOINED_AT_ONCE * SELECT_THREADS) {
    // The largest share of a page's heads, and the sum over the others as of `joined_rest`.
    float top[JOINED_AT_ONCE], rest[JOINED_AT_ONCE];
#pragma unroll 1
    for (int h = 0; h < p.group; h += 4) {
      const HeadScores four = asked;
      // The next ones, while these are joined.
      if (h + 4 < p.group)
        asked.ask(p, scores, page, count, h + 4);
      else if (page + JOINED_AT_ONCE * SELECT_THREADS < count)
        asked.ask(p, scores, page + JOINED_AT_ONCE * SELECT_THREADS, count, 0);
      const float4 most = *reinterpret_cast<const float4*>(&sh.most[h]),
                   less = *reinterpret_cast<const float4*>(&sh.rest[h]);
      // Of heads that are not there -inf.
      auto share = [&](int j, float score, float most, float rest) {
        return h + j < p.group ? log_share(score, most, rest) : NEG_INF;
      };
#pragma unroll
      for (int i = 0; i < JOINED_AT_ONCE; i++) {
        const float4 of = four.four[i];
        const float a = share(0, of.x, most.x, less.x), b = share(1, of.y, most.y, less.y),
                    c = share(2, of.z, most.z, less.z), d = share(3, of.w, most.w, less.w);
        const float ab = fmaxf(a, b), cd = fmaxf(c, d);
        // Not -inf, which would make NaNs.
        const float n = fmaxf(fmaxf(ab, cd), -1e30f);
        const float sum = exp2_fast(fminf(a, b) - n) + exp2_fast(fminf(c, d) - n) + exp2_fast(fminf(ab, cd) - n);
        if (h == 0) {
          top[i] = n, rest[i] = sum;
        } else {
          const bool first = top[i] >= n;
          const float e = exp2_fast(first ? n - top[i] : top[i] - n);
          rest[i] = first ? fmaf(sum, e, rest[i] + e) : fmaf(rest[i], e, sum + e);
          top[i] = fmaxf(top[i], n);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < JOINED_AT_ONCE; i++)
      if (page + i * SELECT_THREADS < count)
        joined[page + i * SELECT_THREADS] = or_first(top[i] + log2_1p(rest[i]) + 0.f);
  }
  __syncthreads();
}
