// The pages of a step, per KV head: forced ones, then the best by score, ties to the lower index; ascending.
//
// Grid (n, Hkv, B): the n blocks of a KV head are a thread block cluster (from compute capability 9.0 on; one block before), and each
// has a slice of the pages. A histogram over the range of the scores says in which bin the k-th largest lies; the few scores in that
// bin are compared with one another. A bin with too many (ties, outliers that stretch the range) is searched digit by digit.
//
// Every warp runs through this once a step, mostly waiting: for memory, the cluster, and instructions. So the loops are not unrolled.
#pragma once
#include "cluster.cuh"

constexpr int SELECT_THREADS = 512;  // at most; at least 256
constexpr int SELECT_WARPS = SELECT_THREADS / 32;

// Bins of the histogram: also the values of a digit.
constexpr int DIGIT = 9, BINS = 1 << DIGIT;
// Scores of a bin that are compared with one another.
constexpr int FINALISTS = 256;
// The key of a page that every step loads: no score has it.
constexpr u32 FORCED = 0xffffffffu;
// Pages of a thread that are read at once.
constexpr int AT_ONCE = 4;

struct SelectShared {
  // What the other blocks of the cluster read.
  u32 histogram[2][BINS];
  u32 finalists[FINALISTS];
  u32 finalist_count, sure, tied;  // sure: keys that are taken whatever the finalists come to
  u32 least, most;
  float2 of_head[16];  // largest score of the slice, and the sum of e^(score - largest)
  // The block's own.
  __align__(16) u32 all_finalists[FINALISTS];
  u32 counts[2][SELECT_WARPS];
  float2 part[SELECT_WARPS];
  float lse[16], lowest[16], highest[16];
  u32 bin, left, in_bin, threshold, ties, sure_before, tied_before;
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

// The bins of the histogram, equally wide between two bounds, with what lies beyond them in the outermost. Larger scores never
// lie in a lower bin.
struct Bins {
  float least, scale;
  DEVICE Bins(float least, float most) : least(least) {
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

// The log-sum-exp of every head over the candidate pages, and its least and largest logarithm of a share, from the parts that the
// scoring blocks left.
DEVICE void joined_lse(const Params& p, int pair, SelectShared& sh) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int h = warp; h < p.group; h += blockDim.x / 32) {
    float2 sums = {NEG_INF, 0.f};
    float least = -NEG_INF;
    for (int i = lane; i < p.score_parts; i += 32) {
      const float4 part = p.score_stats[(size_t(pair) * p.score_parts + i) * p.group + h];
      sums = joined_sums(sums, {part.x, part.y});
      least = fminf(least, part.z);
    }
    sums = warp_sums(sums);
    least = -warp_max(-least);
    const float lse = sums.x + logf(sums.y);
    if (lane == 0) sh.lse[h] = lse, sh.lowest[h] = least - lse, sh.highest[h] = sums.x - lse;
  }
  __syncthreads();
}

// The same from the scores themselves, of which this block takes `begin..end`.
DEVICE void page_lse(const Params& p, const float* scores, int begin, int end, SelectShared& sh) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
#pragma unroll 1
  for (int h = 0; h < p.group; h++) {
    float2 sums = {NEG_INF, 0.f};
    for (int i = begin + threadIdx.x; i < end; i += blockDim.x)
      sums = joined_sums(sums, {scores[size_t(i) * scores_a_page(p) + h], 1.f});
    sums = warp_sums(sums);
    if (lane == 0) sh.part[warp] = sums;
    __syncthreads();
    sums = warp_sums(lane < warps ? sh.part[lane] : float2{NEG_INF, 0.f});
    if (threadIdx.x == 0) sh.of_head[h] = sums;
    __syncthreads();
  }
  cluster_sync();
  if (threadIdx.x < p.group) {
    float2 sums = {NEG_INF, 0.f};
#pragma unroll 1
    for (u32 rank = 0; rank < cluster_blocks(); rank++) {
      const u64 two = of_block<u64>(&sh.of_head[threadIdx.x], rank);
      sums = joined_sums(sums, {__uint_as_float(u32(two)), __uint_as_float(u32(two >> 32))});
    }
    sh.lse[threadIdx.x] = sums.x + logf(sums.y);
  }
  __syncthreads();
}

// The group's scores of so many pages, `stride` apart: the stored maximum, or the logarithm of the sum over heads of each head's
// softmax. Of pages from `end` on any number.
DEVICE void group_scores(const Params& p, const float* scores, int page, int stride, int end, const SelectShared& sh, float (&x)[AT_ONCE]) {
  if (p.group_score == MAX) {
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) x[i] = page + i * stride < end ? scores[page + i * stride] : 0.f;
    return;
  }
  float2 sums[AT_ONCE];
#pragma unroll
  for (int i = 0; i < AT_ONCE; i++) sums[i] = {NEG_INF, 0.f};
#pragma unroll 1
  for (int h = 0; h < p.group; h += 4) {
    float4 four[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const size_t at = size_t(min(page + i * stride, end - 1)) * scores_a_page(p) + h;
      four[i] = *reinterpret_cast<const float4*>(scores + at);
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (h + j >= p.group) break;
      const float lse = sh.lse[h + j];
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
        const float y = (j == 0 ? four[i].x : j == 1 ? four[i].y : j == 2 ? four[i].z : four[i].w) - lse;
        // The larger of the two has weight 1.
        const float n = fmaxf(sums[i].x, y), e = expf(fminf(sums[i].x, y) - n);
        if (n != NEG_INF) sums[i].y = y > sums[i].x ? sums[i].y * e + 1.f : sums[i].y + e;
        if (!(y == y)) sums[i].y = y;
        sums[i].x = n;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < AT_ONCE; i++) x[i] = sums[i].x == NEG_INF ? NEG_INF : sums[i].x + logf(sums[i].y) + 0.f;
}

// Finds the bin in which the `left`-th key of the cluster lies, from the top, and its rank there, into `sh`. Each of the first
// threads has two neighbouring bins; whoever holds the wanted key's says so.
DEVICE void find_bin(SelectShared& sh, int buffer, u32 left) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
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

// Among the finalists of the whole cluster the `sh.left`-th largest, how many equal ones count, and how many keys of the blocks
// before are larger and equal, into `sh`.
DEVICE void compare_finalists(SelectShared& sh) {
  const u32 left = sh.left, count = sh.in_bin, lane = threadIdx.x % 32;
  // Finalists of the blocks up to the one that a lane stands for.
  const bool stands = lane < cluster_blocks();
  const u32 upto = sum_upto(stands ? of_block<u32>(&sh.finalist_count, lane) : 0u);
  u32 rank = 0, start = 0;
#pragma unroll 1
  for (int r = 0; r < CLUSTER - 1; r++) {
    const u32 end = __shfl_sync(ALL_LANES, upto, r);
    if (threadIdx.x >= end) rank = r + 1, start = end;
  }
  const bool holds = threadIdx.x < count;
  const u32 key = holds ? of_block<u32>(&sh.finalists[threadIdx.x - start], rank) : 0u;
  // Zeros behind them, so that they can be read by four.
  if (threadIdx.x < FINALISTS) sh.all_finalists[threadIdx.x] = key;
  const u32 sure = reduce_add(stands && lane < cluster_block() ? of_block<u32>(&sh.sure, lane) : 0u);
  __syncthreads();
  u32 larger = 0, equal = 0;
  if (holds) {
#pragma unroll 2
    for (u32 j = 0; j < count; j += 4) {
      const uint4 other = *reinterpret_cast<const uint4*>(&sh.all_finalists[j]);
      larger += (other.x > key) + (other.y > key) + (other.z > key) + (other.w > key);
      equal += (other.x == key) + (other.y == key) + (other.z == key) + (other.w == key);
    }
    // Equal keys say the same.
    if (larger < left && left <= larger + equal) sh.threshold = key, sh.ties = left - larger;
  }
  __syncthreads();
  const bool before = holds && rank < cluster_block();
  const u32 threshold = sh.threshold;
  const u32 larger_before = __syncthreads_count(before && key > threshold);
  const u32 equal_before = __syncthreads_count(before && key == threshold);
  if (threadIdx.x == 0) sh.sure_before = sure + larger_before, sh.tied_before = equal_before;
}

DEVICE void select_kernel(const Params& p) {
  __shared__ SelectShared sh;
  extern __shared__ u32 keys[];  // of the block's pages, as many as p.keys
  let_next_start();
  const int b = blockIdx.z, pair = b * p.kv_heads + blockIdx.y;
  const Sequence s = sequence(p, b);
  const Candidates all = candidates(p, s, b);
  if (!s.valid || !chooses(p, all)) return wait_for_previous();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int rank = cluster_block(), blocks = cluster_blocks();
  const float* scores = p.scores + size_t(pair) * p.max_pages * scores_a_page(p);
  // The block's slice of the candidates; each warp owns neighbours, so that ballots count in page order.
  const int slice = (all.count + 32 * blocks - 1) / (32 * blocks) * 32;
  const int begin = all.from + min(rank * slice, all.count), end = min(begin + slice, all.pages);
  const int owned = (slice + int(blockDim.x) - 1) / int(blockDim.x) * 32;
  for (int i = threadIdx.x; i < 2 * BINS; i += blockDim.x) (&sh.histogram[0][0])[i] = 0;
  if (threadIdx.x == 0) sh.finalist_count = sh.sure = sh.tied = 0;
  wait_for_previous();
  __syncthreads();

  auto key_of = [&](int page, float score) {
    return page >= end ? 0u : page == all.pages - 1 || page < p.sink_pages ? FORCED : ordered(score);
  };
  // What a lane does with its keys, in the order of its pages; pages whose keys are not kept are read again. 0: none.
  auto for_keys = [&](auto&& visit) {
#pragma unroll 1
    for (int i = warp * owned + lane; i < (warp + 1) * owned; i += 32) {
      const int page = begin + i;
      if (i < p.keys) {
        visit(page, keys[i]);
      } else {
        float score[AT_ONCE];
        group_scores(p, scores, page, 32, min(page + 1, end), sh, score);
        visit(page, key_of(page, score[0]));
      }
    }
  };
  float lowest = -NEG_INF, highest = NEG_INF;
  if (p.group_score == SOFTMAX) {
    if (p.score_parts) {
      joined_lse(p, pair, sh);
      // A page's score is at least that of each head, and at most the largest of them and log g.
      lowest = NEG_INF;
      for (int h = 0; h < p.group; h++) lowest = fmaxf(lowest, sh.lowest[h]), highest = fmaxf(highest, sh.highest[h]);
      highest += logf(float(p.group));
    } else {
      page_lse(p, scores, begin, end, sh);
    }
  }
#pragma unroll 1
  for (int i = warp * owned + lane; i < min((warp + 1) * owned, p.keys); i += 32 * AT_ONCE) {
    float score[AT_ONCE];
    group_scores(p, scores, begin + i, 32, end, sh, score);
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++)
      if (i + 32 * j < min((warp + 1) * owned, p.keys)) keys[i + 32 * j] = key_of(begin + i + 32 * j, score[j]);
  }
  if (p.group_score == MAX && p.score_parts) {
    for (int i = lane; i < p.score_parts; i += 32) {
      const float4 part = p.score_stats[size_t(pair) * p.score_parts + i];
      highest = fmaxf(highest, part.x), lowest = fminf(lowest, part.z);
    }
    highest = warp_max(highest), lowest = -warp_max(-lowest);
  }
  if (!p.score_parts) {
    // -inf stays out of the range.
    u32 least = 0xffffffffu, most = 0;
    for_keys([&](int, u32 key) {
      if (key > ordered(NEG_INF) && key != FORCED) least = min(least, key), most = max(most, key);
    });
    least = __reduce_min_sync(ALL_LANES, least), most = __reduce_max_sync(ALL_LANES, most);
    if (lane == 0) sh.counts[0][warp] = least, sh.counts[1][warp] = most;
    __syncthreads();
    if (warp == 0) {
      least = __reduce_min_sync(ALL_LANES, lane < warps ? sh.counts[0][lane] : 0xffffffffu);
      most = __reduce_max_sync(ALL_LANES, lane < warps ? sh.counts[1][lane] : 0u);
      if (lane == 0) sh.least = least, sh.most = most;
    }
    cluster_sync();
    least = lane < blocks ? of_block<u32>(&sh.least, lane) : 0xffffffffu;
    most = lane < blocks ? of_block<u32>(&sh.most, lane) : 0u;
    lowest = score_of(__reduce_min_sync(ALL_LANES, least)), highest = score_of(__reduce_max_sync(ALL_LANES, most));
  }

  // Larger keys are taken, and the first `ties` of the equal ones.
  u32 threshold = FORCED - 1, ties = 0;
  const int wanted = all.budget - all.forced;
  bool finals = false;
  if (wanted > 0) {
    const Bins bins(lowest, highest);
    auto competes = [](u32 key) { return key != 0 && key != FORCED; };
    for_keys([&](int, u32 key) {
      if (competes(key)) atomicAdd(&sh.histogram[0][bins.of(key)], 1u);
    });
    cluster_sync();
    find_bin(sh, 0, wanted);
    const u32 bin = sh.bin;
    finals = sh.in_bin <= FINALISTS;
    if (finals) {
      u32 sure = 0;
      for_keys([&](int, u32 key) {
        const u32 of = competes(key) ? bins.of(key) : key ? BINS : 0u;
        sure += of > bin;
        if (of == bin && key) sh.finalists[atomicAdd(&sh.finalist_count, 1u)] = key;
      });
      sure = reduce_add(sure);
      if (lane == 0) atomicAdd(&sh.sure, sure);
      cluster_sync();
      compare_finalists(sh);
      threshold = sh.threshold, ties = sh.ties;
    } else {
      threshold = 0;
      int buffer = 0;
#pragma unroll 1
      for (int open = 32; open > 0;) {
        const int bits = min(open, DIGIT), shift = open - bits;
        const u32 left = sh.left;
        buffer ^= 1;
        for_keys([&](int, u32 key) {
          if (competes(key) && bins.of(key) == bin && (open == 32 || (key ^ threshold) >> open == 0))
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

  u32 sure = 0, tied = 0;
  for_keys([&](int, u32 key) { sure += key > threshold, tied += key == threshold; });
  sure = reduce_add(sure), tied = reduce_add(tied);
  __syncthreads();
  if (lane == 0) sh.counts[0][warp] = sure, sh.counts[1][warp] = tied;
  __syncthreads();
  // Those of the warps before, and of the blocks before.
  u32 sure_before = reduce_add(lane < warp ? sh.counts[0][lane] : 0u);
  u32 tied_before = reduce_add(lane < warp ? sh.counts[1][lane] : 0u);
  if (finals) {
    sure_before += sh.sure_before, tied_before += sh.tied_before;
  } else if (blocks > 1) {
    if (warp == warps - 1 && lane == 0) sh.sure = sure_before + sure, sh.tied = tied_before + tied;
    cluster_sync();
    sure_before += reduce_add(lane < rank ? of_block<u32>(&sh.sure, lane) : 0u);
    tied_before += reduce_add(lane < rank ? of_block<u32>(&sh.tied, lane) : 0u);
  }
  cluster_arrive_only();
  int* list = p.pages + size_t(pair) * p.max_pages;
  u32 at = sure_before + min(tied_before, ties);
  const u32 below = (1u << lane) - 1;
  for_keys([&](int page, u32 key) {
    const bool ties_with = key == threshold;
    const u32 tie_ballot = __ballot_sync(ALL_LANES, ties_with);
    const bool chosen = key > threshold || (ties_with && tied_before + __popc(tie_ballot & below) < ties);
    const u32 ballot = __ballot_sync(ALL_LANES, chosen);
    if (chosen) list[at + __popc(ballot & below)] = page;
    tied_before += __popc(tie_ballot);
    at += __popc(ballot);
  });
  // No block ends while another may still read its memory.
  cluster_wait();
}
