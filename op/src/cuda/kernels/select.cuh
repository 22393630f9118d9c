// The pages of a step, per KV head: forced ones, then the best by score, ties to the lower index; ascending.
//
// Grid (n, Hkv, B): the n blocks of a KV head are a thread block cluster (from compute capability 9.0 on; one block before),
// and each has a slice of the pages. A histogram over the range of the scores says in which bin the k-th largest lies; the
// few scores in that bin are compared with one another. A bin with too many (ties, outliers that stretch the range) is
// searched digit by digit.
#pragma once
#include "cluster.cuh"

constexpr int SELECT_THREADS = 1024;  // at most; at least 256
constexpr int SELECT_WARPS = SELECT_THREADS / 32;
// Keys that a thread keeps in registers; of more pages than that the others are read again.
constexpr int KEYS = 8;

// Bins of the histogram: also the values of a digit.
constexpr int DIGIT = 9, BINS = 1 << DIGIT;
// Scores of a bin that are compared with one another.
constexpr int FINALISTS = 256;

struct SelectShared {
  // What the other blocks of the cluster read.
  u32 histogram[2][BINS];
  u32 finalists[FINALISTS];
  u32 least, most, finalist_count, sure, tied;
  float2 of_head[16];  // largest score of the slice, and the sum of e^(score - largest)
  // The block's own.
  u32 all_finalists[FINALISTS];
  u32 counts[2][SELECT_WARPS];
  float2 part[SELECT_WARPS][16];
  float lse[16];
  u32 bin, left, in_bin, threshold, ties;
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

// The bins of the histogram, equally wide between the least and the largest score. Larger scores never lie in a lower bin.
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

// The sum over the lanes up to this one.
DEVICE u32 sum_upto(u32 x) {
#pragma unroll
  for (int i = 1; i < 32; i <<= 1) {
    const u32 other = __shfl_up_sync(ALL_LANES, x, i);
    if (threadIdx.x % 32 >= i) x += other;
  }
  return x;
}

// A largest value and the sum of e^(x - largest), joined with another such pair.
DEVICE float2 joined_sums(float2 a, float2 b) {
  const float top = fmaxf(a.x, b.x);
  if (top == NEG_INF) return {top, 0.f};
  return {top, a.y * expf(a.x - top) + b.y * expf(b.x - top)};
}
DEVICE float2 warp_sums(float2 a) {
#pragma unroll
  for (int m = 16; m; m >>= 1)
    a = joined_sums(a, {__shfl_xor_sync(ALL_LANES, a.x, m), __shfl_xor_sync(ALL_LANES, a.y, m)});
  return a;
}

// The log-sum-exp of every head over the candidate pages, from the parts that the scoring blocks left.
DEVICE void joined_lse(const Params& p, int pair, SelectShared& sh) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int h = warp; h < p.group; h += blockDim.x / 32) {
    float2 sums = {NEG_INF, 0.f};
    for (int i = lane; i < p.score_parts; i += 32)
      sums = joined_sums(sums, p.score_stats[(size_t(pair) * p.score_parts + i) * p.group + h]);
    sums = warp_sums(sums);
    if (lane == 0) sh.lse[h] = sums.x + logf(sums.y);
  }
  __syncthreads();
}

// The same from the scores themselves, of which this block takes `begin..end`.
DEVICE void page_lse(const Params& p, const float* scores, int begin, int end, SelectShared& sh) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int h = 0; h < p.group; h++) {
    float2 sums = {NEG_INF, 0.f};
    for (int i = begin + threadIdx.x; i < end; i += blockDim.x)
      sums = joined_sums(sums, {scores[size_t(h) * p.max_pages + i], 1.f});
    sums = warp_sums(sums);
    if (lane == 0) sh.part[warp][h] = sums;
  }
  __syncthreads();
  for (int h = warp; h < p.group; h += warps) {
    const float2 sums = warp_sums(lane < warps ? sh.part[lane][h] : float2{NEG_INF, 0.f});
    if (lane == 0) sh.of_head[h] = sums;
  }
  cluster_sync();
  if (threadIdx.x < p.group) {
    float2 sums = {NEG_INF, 0.f};
    for (u32 rank = 0; rank < cluster_blocks(); rank++) {
      const u64 two = of_block<u64>(&sh.of_head[threadIdx.x], rank);
      sums = joined_sums(sums, {__uint_as_float(u32(two)), __uint_as_float(u32(two >> 32))});
    }
    sh.lse[threadIdx.x] = sums.x + logf(sums.y);
  }
  __syncthreads();
}

// The group's score of a page: the stored maximum, or the logarithm of the sum over heads of each head's softmax.
DEVICE float group_score(const Params& p, const float* scores, int page, const SelectShared& sh) {
  if (p.group_score == MAX) return scores[page];
  float2 sums = {NEG_INF, 0.f};
  for (int h = 0; h < p.group; h++) {
    const float x = scores[size_t(h) * p.max_pages + page] - sh.lse[h];
    // The larger of the two has weight 1.
    const float n = fmaxf(sums.x, x), e = expf(fminf(sums.x, x) - n);
    if (n != NEG_INF) sums.y = x > sums.x ? sums.y * e + 1.f : sums.y + e;
    if (!(x == x)) sums.y = x;
    sums.x = n;
  }
  return sums.x == NEG_INF ? NEG_INF : sums.x + logf(sums.y) + 0.f;
}

// Finds the bin in which the `left`-th key of the cluster lies, from the top, and its rank there, into `sh`.
DEVICE void find_bin(SelectShared& sh, int buffer, u32 left) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // Each of the first threads has two neighbouring bins; whoever holds the wanted key's bin says so.
  const int top = BINS - 1 - 2 * int(threadIdx.x);
  u32 high = 0, low = 0;
  if (top > 0) {
    // All loads before the first use.
    u64 two[CLUSTER];
#pragma unroll
    for (int rank = 0; rank < CLUSTER; rank++)
      two[rank] = rank < cluster_blocks() ? of_block<u64>(&sh.histogram[buffer][top - 1], rank) : 0;
#pragma unroll
    for (int rank = 0; rank < CLUSTER; rank++) low += u32(two[rank]), high += u32(two[rank] >> 32);
  }
  const u32 mine = high + low, upto = sum_upto(mine);
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
}

// Among the finalists of the whole cluster the `sh.left`-th largest, and how many equal ones count, into `sh`.
DEVICE void compare_finalists(SelectShared& sh) {
  const u32 left = sh.left, count = sh.in_bin, lane = threadIdx.x % 32;
  // Finalists of the blocks up to the one that a lane stands for.
  const u32 upto = sum_upto(lane < cluster_blocks() ? of_block<u32>(&sh.finalist_count, lane) : 0u);
  u32 rank = 0, start = 0;
#pragma unroll
  for (int r = 0; r < CLUSTER - 1; r++) {
    const u32 end = __shfl_sync(ALL_LANES, upto, r);
    if (threadIdx.x >= end) rank = r + 1, start = end;
  }
  if (threadIdx.x < count) sh.all_finalists[threadIdx.x] = of_block<u32>(&sh.finalists[threadIdx.x - start], rank);
  __syncthreads();
  const u32 lanes = blockDim.x / FINALISTS, i = threadIdx.x / lanes, key = i < count ? sh.all_finalists[i] : 0u;
  u32 larger = 0, equal = 0;
  for (u32 j = threadIdx.x % lanes; j < count; j += lanes) {
    const u32 other = sh.all_finalists[j];
    larger += other > key, equal += other == key;
  }
  for (u32 m = 1; m < lanes; m <<= 1) {
    larger += __shfl_xor_sync(ALL_LANES, larger, m);
    equal += __shfl_xor_sync(ALL_LANES, equal, m);
  }
  // Equal keys say the same.
  if (i < count && larger < left && left <= larger + equal) sh.threshold = key, sh.ties = left - larger;
  __syncthreads();
}

DEVICE void select_kernel(const Params& p) {
  __shared__ SelectShared sh;
  let_next_start();
  const int head = blockIdx.y, b = blockIdx.z, pair = b * p.kv_heads + head;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = cluster_block(), blocks = cluster_blocks();
  const Sequence s = sequence(p, b);
  if (!s.valid) return;
  const Candidates all = candidates(p, s, b);
  const int from = all.from, count = all.count, newest = all.pages - 1;
  int* steps = p.page_steps + size_t(pair) * p.cache_pages;
  Listed* list = p.pages + size_t(pair) * p.max_pages;
  // The block's slice of the candidates; each warp owns neighbours, so that ballots count in page order.
  const int slice = (count + 32 * blocks - 1) / (32 * blocks) * 32, begin = rank * slice, end = min(begin + slice, count);
  const int rounds = (slice + int(blockDim.x) - 1) / int(blockDim.x);
  const int base = begin + warp * rounds * 32 + lane;
  auto there = [&](int r) { return r < rounds && base + r * 32 < end; };

  // A of every page that the step loads becomes its newest position; a dense layer has seen every page.
  auto take = [&](int at, int page, int step) {
    list[at] = {page, p.mode == DENSE ? 0 : max(min(step, s.len - 2) + 1, 0)};
    steps[page] = s.len - 1;
  };
  auto forced = [&](int page) { return page == newest || page < p.sink_pages; };
  const int recent = recent_from(all);
  const bool scored = p.mode == RETRO && all.budget < count;
  u32 keys[KEYS], threshold = 0xffffffffu, ties = 0;
  const float* scores = p.scores + size_t(pair) * p.max_pages * (p.group_score == SOFTMAX ? p.group : 1);
  // The page steps are nobody's to write before this kernel: they are asked for while the scores are made.
  int before[KEYS];
#pragma unroll
  for (int r = 0; r < KEYS; r++) before[r] = there(r) ? steps[from + base + r * 32] : 0;
  for (int i = threadIdx.x; i < 2 * BINS; i += blockDim.x) (&sh.histogram[0][0])[i] = 0;
  if (threadIdx.x == 0) sh.finalist_count = 0;
  wait_for_previous();
  auto fresh = [&](int r) {
    const int page = from + base + r * 32;
    return there(r) && !forced(page) ? ordered(group_score(p, scores, page, sh)) : 0u;
  };
  if (scored) {
    if (p.group_score == MAX) {
      // All loads before the first use.
      float score[KEYS];
#pragma unroll
      for (int r = 0; r < KEYS; r++) score[r] = there(r) ? scores[from + base + r * 32] : 0.f;
#pragma unroll
      for (int r = 0; r < KEYS; r++) keys[r] = there(r) && !forced(from + base + r * 32) ? ordered(score[r]) : 0u;
    } else {
      if (p.score_parts)
        joined_lse(p, pair, sh);
      else
        page_lse(p, scores, from + begin, from + end, sh);
#pragma unroll
      for (int r = 0; r < KEYS; r++) keys[r] = fresh(r);
    }
    auto for_keys = [&](auto&& visit) {
#pragma unroll
      for (int r = 0; r < KEYS; r++)
        if (r < rounds) visit(keys[r]);
      for (int r = KEYS; r < rounds; r++) visit(fresh(r));
    };
    const int wanted = all.budget - all.forced;
    if (wanted > 0) {
      // -inf stays out of the range.
      const u32 lowest = ordered(NEG_INF) + 1;
      u32 least = 0xffffffffu, most = 0;
      for_keys([&](u32 key) {
        if (key >= lowest) least = min(least, key), most = max(most, key);
      });
      least = __reduce_min_sync(ALL_LANES, least), most = __reduce_max_sync(ALL_LANES, most);
      if (lane == 0) sh.counts[0][warp] = least, sh.counts[1][warp] = most;
      __syncthreads();
      if (warp == 0) {
        const bool counts = lane < int(blockDim.x) / 32;
        least = __reduce_min_sync(ALL_LANES, counts ? sh.counts[0][lane] : 0xffffffffu);
        most = __reduce_max_sync(ALL_LANES, counts ? sh.counts[1][lane] : 0u);
        if (lane == 0) sh.least = least, sh.most = most;
      }
      cluster_sync();
      least = lane < blocks ? of_block<u32>(&sh.least, lane) : 0xffffffffu;
      most = lane < blocks ? of_block<u32>(&sh.most, lane) : 0u;
      const Bins bins(__reduce_min_sync(ALL_LANES, least), __reduce_max_sync(ALL_LANES, most));
      for_keys([&](u32 key) {
        if (key) atomicAdd(&sh.histogram[0][bins.of(key)], 1u);
      });
      cluster_sync();
      find_bin(sh, 0, wanted);
      const u32 bin = sh.bin;
      if (sh.in_bin <= FINALISTS) {
        for_keys([&](u32 key) {
          if (key && bins.of(key) == bin) sh.finalists[atomicAdd(&sh.finalist_count, 1u)] = key;
        });
        cluster_sync();
        compare_finalists(sh);
        threshold = sh.threshold, ties = sh.ties;
      } else {
        threshold = 0;
        int buffer = 0;
        for (int open = 32; open > 0;) {
          const int bits = min(open, DIGIT), shift = open - bits;
          const u32 left = sh.left;
          buffer ^= 1;
          for_keys([&](u32 key) {
            if (key && bins.of(key) == bin && (open == 32 || (key ^ threshold) >> open == 0))
              atomicAdd(&sh.histogram[buffer][(key >> shift) & ((1u << bits) - 1)], 1u);
          });
          cluster_sync();
          // Everyone has read the other buffer.
          for (int i = threadIdx.x; i < BINS; i += blockDim.x) sh.histogram[buffer ^ 1][i] = 0;
          find_bin(sh, buffer, left);
          threshold |= sh.bin << shift;
          open = shift;
        }
        ties = sh.left;
      }
    }
  }

  // 2: taken, 1: taken while ties last, 0: not taken.
  auto verdict = [&](int r, u32 key) {
    if (!there(r)) return 0;
    const int page = from + base + r * 32;
    if (!scored) return p.mode != STREAMING || page >= recent || page < p.sink_pages ? 2 : 0;
    if (forced(page) || key > threshold) return 2;
    return key == threshold ? 1 : 0;
  };
  u32 sure = 0, tied = 0;
#pragma unroll
  for (int r = 0; r < KEYS; r++) {
    const int v = verdict(r, scored ? keys[r] : 0u);
    sure += v == 2, tied += v == 1;
  }
  for (int r = KEYS; r < rounds; r++) {
    const int v = verdict(r, scored ? fresh(r) : 0u);
    sure += v == 2, tied += v == 1;
  }
  sure = reduce_add(sure), tied = reduce_add(tied);
  __syncthreads();
  if (lane == 0) sh.counts[0][warp] = sure, sh.counts[1][warp] = tied;
  __syncthreads();
  // Those of the warps before, and of the blocks before.
  u32 sure_before = reduce_add(lane < warp ? sh.counts[0][lane] : 0u);
  u32 tied_before = reduce_add(lane < warp ? sh.counts[1][lane] : 0u);
  if (blocks > 1) {
    if (warp == int(blockDim.x) / 32 - 1 && lane == 0) sh.sure = sure_before + sure, sh.tied = tied_before + tied;
    cluster_sync();
    sure_before += reduce_add(lane < rank ? of_block<u32>(&sh.sure, lane) : 0u);
    tied_before += reduce_add(lane < rank ? of_block<u32>(&sh.tied, lane) : 0u);
    cluster_arrive_only();
  }
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
  for (int r = KEYS; r < rounds; r++) place(r, scored ? fresh(r) : 0u, there(r) ? steps[from + base + r * 32] : 0);
  if (p.mode == DENSE)
    for (int page = rank * blockDim.x + threadIdx.x; page < from; page += blocks * blockDim.x) steps[page] = s.len - 1;
  // No block ends while another may still read its memory.
  if (blocks > 1) cluster_wait();
}
