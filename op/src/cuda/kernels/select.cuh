// The pages of a step, per KV head: forced ones, then the best by score, ties to the lower index; ascending.
//
// Grid (Hkv, B). A histogram over the range of the scores says in which bin the k-th largest lies; the few scores in that bin
// are compared with one another. A bin with too many (ties, outliers that stretch the range) is searched digit by digit.
#pragma once
#include "common.cuh"

constexpr int SELECT_THREADS = 1024;
constexpr int SELECT_WARPS = SELECT_THREADS / 32;

// Bins of the histogram: also the values of a digit.
constexpr int DIGIT = 11, BINS = 1 << DIGIT;
// Scores of a bin that are compared with one another, each by FINALIST_LANES threads.
constexpr int FINALISTS = 256, FINALIST_LANES = SELECT_THREADS / FINALISTS;

struct SelectShared {
  u32 histogram[BINS];
  u32 counts[2][SELECT_WARPS];
  u32 least[SELECT_WARPS], most[SELECT_WARPS];
  u32 finalists[FINALISTS];
  u32 bin, left, in_bin, finalist_count, threshold, ties;
  float largest[SELECT_WARPS][16], sum[SELECT_WARPS][16], lse[16];
};

// An order of unsigned numbers that is the order of the scores; 0 stands for "not a candidate". A NaN (a broken model) ranks
// as -inf.
DEVICE u32 ordered(float score) {
  if (!(score == score)) score = NEG_INF;
  const u32 bits = __float_as_uint(score);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The score again.
DEVICE float score_of(u32 key) { return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key); }

// The bins of the histogram, equally wide between the least and the largest finite score. Larger scores never lie in a lower bin.
struct Bins {
  float least, scale;
  DEVICE Bins(u32 least_key, u32 most_key) {
    const float most = score_of(most_key);
    least = score_of(least_key);
    scale = float(BINS - 1) / (most - least);
    // No range, or one that f32 does not hold: a single bin.
    if (!(scale > 0.f) || scale == -NEG_INF) scale = 0.f;
  }
  DEVICE u32 of(u32 key) const {
    const float at = (score_of(key) - least) * scale;
    return at > 0.f ? min(u32(at), u32(BINS - 1)) : 0u;
  }
};

DEVICE u32 reduce_add(u32 x) { return __reduce_add_sync(ALL_LANES, x); }

// The log-sum-exp of every head over the candidate pages, from the parts that the scoring blocks left.
DEVICE void joined_lse(const Params& p, int pair, SelectShared& sh) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int h = warp; h < p.group; h += SELECT_WARPS) {
    float m = NEG_INF, sum = 0.f;
    for (int i = lane; i < p.score_parts; i += 32) {
      const float2 part = p.score_stats[(size_t(pair) * p.score_parts + i) * p.group + h];
      const float top = fmaxf(m, part.x);
      if (top != NEG_INF) sum = sum * expf(m - top) + part.y * expf(part.x - top);
      m = top;
    }
    const float top = warp_max(m);
    sum = warp_sum(m == NEG_INF ? 0.f : sum * expf(m - top));
    if (lane == 0) sh.lse[h] = top + logf(sum);
  }
  __syncthreads();
}

// The same from the scores themselves.
DEVICE void page_lse(const Params& p, const float* scores, int from, int count, SelectShared& sh) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int h = 0; h < p.group; h++) {
    float m = NEG_INF, sum = 0.f;
    const float* of_head = scores + size_t(h) * p.max_pages + from;
    for (int i = threadIdx.x; i < count; i += SELECT_THREADS) {
      const float x = of_head[i], n = fmaxf(m, x);
      sum = sum * (m == n ? 1.f : expf(m - n)) + (x == n ? 1.f : expf(x - n));
      m = n;
    }
    const float top = warp_max(m);
    sum = warp_sum(m == NEG_INF ? 0.f : sum * expf(m - top));
    if (lane == 0) sh.largest[warp][h] = top, sh.sum[warp][h] = sum;
  }
  __syncthreads();
  for (int h = warp; h < p.group; h += SELECT_WARPS) {
    const float m = sh.largest[lane][h], top = warp_max(m);
    const float sum = warp_sum(m == NEG_INF ? 0.f : sh.sum[lane][h] * expf(m - top));
    if (lane == 0) sh.lse[h] = top + logf(sum);
  }
  __syncthreads();
}

// The group's score of candidate i: the stored maximum, or the logarithm of the sum over heads of each head's softmax.
DEVICE float group_score(const Params& p, const float* scores, int page, const SelectShared& sh) {
  if (p.group_score == MAX) return scores[page];
  float best = NEG_INF, sum = 0.f;
  for (int h = 0; h < p.group; h++) {
    const float x = scores[size_t(h) * p.max_pages + page] - sh.lse[h];
    const float n = fmaxf(best, x);
    if (n != NEG_INF) sum = sum * expf(best - n) + expf(x - n);
    best = n;
  }
  return best == NEG_INF ? best : best + logf(sum) + 0.f;
}

// KEYS: those that a thread keeps in registers; of more pages than KEYS * 1024, the others are read again.
template <int KEYS> DEVICE void select_kernel(const Params& p) {
  __shared__ SelectShared sh;
  let_next_start();
  const int head = blockIdx.x, b = blockIdx.y, pair = b * p.kv_heads + head;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Sequence s = sequence(p, b);
  if (!s.valid) return;
  const Candidates all = candidates(p, s, b);
  const int from = all.from, count = all.count, newest = all.pages - 1;
  int* steps = p.page_steps + size_t(pair) * p.cache_pages;
  Listed* list = p.pages + size_t(pair) * p.max_pages;
  const int rounds = (count + SELECT_THREADS - 1) / SELECT_THREADS;
  // Each warp owns neighbouring candidates, so that ballots count in page order.
  const int base = warp * rounds * 32 + lane;

  // A of every page that the step loads becomes its newest position; a dense layer has seen every page.
  auto take = [&](int at, int page, int step) {
    list[at] = {page, p.mode == DENSE ? 0 : max(min(step, s.len - 2) + 1, 0)};
    steps[page] = s.len - 1;
  };
  auto forced = [&](int page) { return page == newest || page < p.sink_pages; };
  const int recent = recent_from(all);
  const bool scored = p.mode == RETRO && all.budget < count;
  u32 keys[KEYS], threshold = 0xffffffffu, ties = 0;
  float* scores = p.scores + size_t(pair) * p.max_pages * (p.group_score == SOFTMAX ? p.group : 1);
  // The page steps are nobody's to write before this kernel: they are asked for while the scores are made.
  int before[KEYS];
#pragma unroll
  for (int r = 0; r < KEYS; r++) before[r] = base + r * 32 < count && r < rounds ? steps[from + base + r * 32] : 0;
  wait_for_previous();
  if (scored) {
    const int wanted = all.budget - all.forced;
    if (p.group_score == SOFTMAX) {
      if (p.score_parts)
        joined_lse(p, pair, sh);
      else
        page_lse(p, scores, from, count, sh);
    }
    auto fresh = [&](int i) {
      return i < count && !forced(from + i) ? ordered(group_score(p, scores, from + i, sh)) : 0u;
    };
    if (p.group_score == MAX) {
      // All loads before the first use.
      float score[KEYS];
#pragma unroll
      for (int r = 0; r < KEYS; r++)
        score[r] = base + r * 32 < count && r < rounds ? scores[from + base + r * 32] : 0.f;
#pragma unroll
      for (int r = 0; r < KEYS; r++)
        keys[r] = base + r * 32 < count && r < rounds && !forced(from + base + r * 32) ? ordered(score[r]) : 0u;
    } else {
      // As group_score, a head at a time, so that each head's loads are under way together.
      float best[KEYS], sum[KEYS];
#pragma unroll
      for (int r = 0; r < KEYS; r++) best[r] = NEG_INF, sum[r] = 0.f;
      for (int h = 0; h < p.group; h++) {
        const float* of_head = scores + size_t(h) * p.max_pages + from + base;
        float x[KEYS];
#pragma unroll
        for (int r = 0; r < KEYS; r++) x[r] = base + r * 32 < count && r < rounds ? of_head[r * 32] : NEG_INF;
#pragma unroll
        for (int r = 0; r < KEYS; r++) {
          // The larger of the two has weight 1.
          const float y = x[r] - sh.lse[h], n = fmaxf(best[r], y), e = expf(fminf(best[r], y) - n);
          if (n != NEG_INF) sum[r] = y > best[r] ? sum[r] * e + 1.f : sum[r] + e;
          if (!(y == y)) sum[r] = y;
          best[r] = n;
        }
      }
#pragma unroll
      for (int r = 0; r < KEYS; r++) {
        const float score = best[r] == NEG_INF ? NEG_INF : best[r] + logf(sum[r]) + 0.f;
        keys[r] = base + r * 32 < count && r < rounds && !forced(from + base + r * 32) ? ordered(score) : 0u;
      }
    }
    auto for_keys = [&](auto&& visit) {
#pragma unroll
      for (int r = 0; r < KEYS; r++)
        if (r < rounds) visit(keys[r]);
      for (int r = KEYS; r < rounds; r++) visit(fresh(base + r * 32));
    };
    if (wanted > 0) {
      // -inf stays out of the range.
      const u32 lowest = ordered(NEG_INF) + 1;
      u32 least = 0xffffffffu, most = 0;
      for_keys([&](u32 key) {
        if (key >= lowest) least = min(least, key), most = max(most, key);
      });
      least = __reduce_min_sync(ALL_LANES, least), most = __reduce_max_sync(ALL_LANES, most);
      if (lane == 0) sh.least[warp] = least, sh.most[warp] = most;
      for (int i = threadIdx.x; i < BINS; i += SELECT_THREADS) sh.histogram[i] = 0;
      if (threadIdx.x == 0) sh.finalist_count = 0;
      __syncthreads();
      const Bins bins(__reduce_min_sync(ALL_LANES, sh.least[lane]), __reduce_max_sync(ALL_LANES, sh.most[lane]));
      for_keys([&](u32 key) {
        if (key) atomicAdd(&sh.histogram[bins.of(key)], 1u);
      });
      // Finds the bin in which the `left`-th key from the top lies, and its rank there.
      auto find_bin = [&](u32 left) {
        __syncthreads();
        // Bins from the top: each thread has two neighbours; whoever holds the wanted key's bin says so.
        const int top = BINS - 1 - 2 * int(threadIdx.x);
        const u32 high = sh.histogram[top], low = sh.histogram[top - 1], mine = high + low;
        u32 upto = mine;
#pragma unroll
        for (int i = 1; i < 32; i <<= 1) {
          const u32 other = __shfl_up_sync(ALL_LANES, upto, i);
          if (lane >= i) upto += other;
        }
        if (lane == 31) sh.counts[0][warp] = upto;
        __syncthreads();
        const u32 before_mine = reduce_add(lane < warp ? sh.counts[0][lane] : 0u) + upto - mine;
        if (left > before_mine && left <= before_mine + mine) {
          const bool in_high = left <= before_mine + high;
          sh.bin = in_high ? top : top - 1;
          sh.left = left - before_mine - (in_high ? 0 : high);
          sh.in_bin = in_high ? high : low;
        }
        __syncthreads();
      };
      find_bin(wanted);
      const u32 bin = sh.bin;
      if (sh.in_bin <= FINALISTS) {
        const u32 left = sh.left, count = sh.in_bin;
        for_keys([&](u32 key) {
          if (key && bins.of(key) == bin) sh.finalists[atomicAdd(&sh.finalist_count, 1u)] = key;
        });
        __syncthreads();
        const u32 i = threadIdx.x / FINALIST_LANES, key = i < count ? sh.finalists[i] : 0u;
        u32 larger = 0, equal = 0;
        for (u32 j = threadIdx.x % FINALIST_LANES; j < count; j += FINALIST_LANES) {
          const u32 other = sh.finalists[j];
          larger += other > key, equal += other == key;
        }
#pragma unroll
        for (int m = 1; m < FINALIST_LANES; m <<= 1) {
          larger += __shfl_xor_sync(ALL_LANES, larger, m);
          equal += __shfl_xor_sync(ALL_LANES, equal, m);
        }
        // Equal keys say the same.
        if (i < count && larger < left && left <= larger + equal) sh.threshold = key, sh.ties = left - larger;
        __syncthreads();
        threshold = sh.threshold, ties = sh.ties;
      } else {
        threshold = 0;
        for (int open = 32; open > 0;) {
          const int bits = min(open, DIGIT), shift = open - bits;
          const u32 left = sh.left;
          __syncthreads();
          for (int i = threadIdx.x; i < BINS; i += SELECT_THREADS) sh.histogram[i] = 0;
          __syncthreads();
          for_keys([&](u32 key) {
            if (key && bins.of(key) == bin && (open == 32 || (key ^ threshold) >> open == 0))
              atomicAdd(&sh.histogram[(key >> shift) & ((1u << bits) - 1)], 1u);
          });
          find_bin(left);
          threshold |= sh.bin << shift;
          open = shift;
        }
        ties = sh.left;
      }
    }
  }

  // 2: taken, 1: taken while ties last, 0: not taken.
  auto verdict = [&](int r, u32 key) {
    const int i = base + r * 32, page = from + i;
    if (r >= rounds || i >= count) return 0;
    if (!scored) return p.mode != STREAMING || page >= recent || page < p.sink_pages ? 2 : 0;
    if (forced(page) || key > threshold) return 2;
    return key == threshold ? 1 : 0;
  };
  auto key_of = [&](int r) {
    const int i = base + r * 32;
    return scored && i < count && !forced(from + i) ? ordered(group_score(p, scores, from + i, sh)) : 0u;
  };
  u32 sure = 0, tied = 0;
#pragma unroll
  for (int r = 0; r < KEYS; r++) {
    const int v = verdict(r, scored ? keys[r] : 0u);
    sure += v == 2, tied += v == 1;
  }
  for (int r = KEYS; r < rounds; r++) {
    const int v = verdict(r, key_of(r));
    sure += v == 2, tied += v == 1;
  }
  sure = reduce_add(sure), tied = reduce_add(tied);
  __syncthreads();
  if (lane == 0) sh.counts[0][warp] = sure, sh.counts[1][warp] = tied;
  __syncthreads();
  const u32 sure_before = reduce_add(lane < warp ? sh.counts[0][lane] : 0u);
  u32 tied_before = reduce_add(lane < warp ? sh.counts[1][lane] : 0u);
  u32 at = sure_before + min(tied_before, ties);
  const u32 below = (1u << lane) - 1;
  auto place = [&](int r, u32 key, int step) {
    const int v = verdict(r, key);
    const u32 tie_ballot = __ballot_sync(ALL_LANES, v == 1);
    const bool chosen = v == 2 || (v == 1 && tied_before + __popc(tie_ballot & below) < ties);
    const u32 ballot = __ballot_sync(ALL_LANES, chosen);
    if (chosen) take(at + __popc(ballot & below), from + base + r * 32, step);
    tied_before += __popc(tie_ballot);
    at += __popc(ballot);
  };
#pragma unroll
  for (int r = 0; r < KEYS; r++)
    if (r < rounds) place(r, scored ? keys[r] : 0u, before[r]);
  for (int r = KEYS; r < rounds; r++)
    place(r, key_of(r), base + r * 32 < count ? steps[from + base + r * 32] : 0);
  if (p.mode == DENSE)
    for (int page = threadIdx.x; page < from; page += SELECT_THREADS) steps[page] = s.len - 1;
}
