// The pages of a step, per KV head: forced ones, then the best by score, ties to the lower index.
//
// Grid (blocks of a KV head, Hkv, B), where the blocks of a KV head are a cluster (cluster.cuh): each has a share of
// neighbouring pages. A histogram over the range of the scores, summed over the cluster, says in which bin the k-th
// largest lies; the few scores in that bin are compared with one another. A bin with too many (ties, outliers that
// stretch the range) is searched digit by digit. The list has the forced pages first, then those above the bin, block
// by block, then those of it by rank; each is announced as soon as its place is known.
//
// The group score "max" is joined over heads while pages are scored (page_vectors.cuh); "softmax" needs the scores of
// all pages first, and is joined here (join_heads).
//
// Nothing else happens on the device while this runs, so all of it is short: blocks that are there before the scores
// are, two barriers between those of a KV head where it has several, one pass over the scores, two over their bins, and
// as few instructions as possible, as each is fetched for the first time.
#pragma once
#include "select_scores.cuh"

// The bins of the histogram, equally wide between two bounds of the scores. Larger scores never lie in a lower bin.
struct Bins {
  // In whose range, up to twice as much, floats are whole numbers: adding it rounds.
  static constexpr float WHOLE = 8388608.f;
  float scale, offset;
  DEVICE Bins(float least, float most) {
    // Rounding may add a bin or two.
    scale = float(BINS - 4) / (most - least);
    // No range, or one that f32 does not hold: a single bin.
    if (!(scale > 0.f && scale < 1e30f && fabsf(least) < 1e30f)) scale = 0.f, least = 0.f;
    offset = fmaf(-least, scale, WHOLE);
  }
  // 1..BINS. Whatever is no number goes to the lowest.
  DEVICE u32 of(float score) const {
    return __float_as_uint(fminf(fmaxf(fmaf(score, scale, offset), WHOLE), WHOLE + float(BINS - 1))) -
           __float_as_uint(WHOLE) + 1u;
  }
};

DEVICE void clear_histogram(SelectShared& sh) {
  *reinterpret_cast<uint4*>(&sh.histogram[BINS_A_THREAD * threadIdx.x]) = {0, 0, 0, 0};
}

// A warp's lanes have counts, the first lane's of the largest scores. Where the `left`-th lies: in which lane, and how
// many are before it.
struct Place {
  int lane;
  u32 before;
};
DEVICE Place place_of(u32 left, u32 mine) {
  const u32 upto = sum_upto(mine);
  const int lane = min(__popc(__ballot_sync(ALL_LANES, upto < left)), 31);
  return {lane, __shfl_sync(ALL_LANES, upto - mine, lane)};
}

// Sums over the blocks of a cluster, and over those before this one.
struct OfCluster {
  u32 all = 0, before = 0;
  DEVICE void add(int rank, u32 count) { all += count, before += rank < cluster_rank() ? count : 0; }
};

// Finds the bin in which the `left`-th score of one block lies, from the top, and its rank there, into `sh`.
DEVICE void find_own_bin(SelectShared& sh, u32 left) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int lowest = BINS - BINS_A_THREAD - BINS_A_THREAD * int(threadIdx.x);
  const uint4 four = *reinterpret_cast<const uint4*>(&sh.histogram[lowest]);
  const u32 counts[BINS_A_THREAD] = {four.w, four.z, four.y, four.x};
  const u32 mine = four.x + four.y + four.z + four.w, upto = sum_upto(mine);
  if (lane == 31) sh.more_counts[warp] = upto;
  __syncthreads();
  u32 before = reduce_add(lane < warp ? sh.more_counts[lane] : 0u) + upto - mine;
  if (left <= before || left > before + mine) return;
  bool found = false;
#pragma unroll
  for (int i = 0; i < BINS_A_THREAD; i++) {
    if (!found && left <= before + counts[i]) {
      found = true;
      sh.bin = lowest + BINS_A_THREAD - 1 - i, sh.left = left - before, sh.in_bin = counts[i], sh.in_bin_before = 0;
    }
    before += counts[i];
  }
}

// The same of a cluster, by one warp, the `time`-th time: first in which of 32 coarse bins, then in which of its 64
// bins, two a lane. Returns this lane's part of a sum: the scores above that bin in the blocks before this one.
DEVICE u32 find_joint_bin(SelectShared& sh, u32 left, u32 time) {
  const int lane = threadIdx.x, from_top = 31 - lane, blocks = cluster_size();
  if (lane == 0) sh.coarse_box.expect(32 * 4 * blocks), sh.fine_box.expect(32 * 8 * blocks);
  const u32 mine = sh.coarse[from_top];
#pragma unroll 1
  for (int i = 0; i < blocks; i++) sh.coarse_box.send(sh.coarse_of[cluster_rank()][lane], i, mine);
  sh.coarse_box.wait(time);
  OfCluster coarse;
#pragma unroll 1
  for (int i = 0; i < blocks; i++) coarse.add(i, sh.coarse_of[i][lane]);
  const Place of_coarse = place_of(left, coarse.all);
  u32 above = lane < of_coarse.lane ? coarse.before : 0;
  left -= of_coarse.before;
  const int lower = COARSE * (31 - of_coarse.lane) + 2 * from_top;
  const uint2 two = *reinterpret_cast<const uint2*>(&sh.histogram[lower]);
#pragma unroll 1
  for (int i = 0; i < blocks; i++) sh.fine_box.send(sh.fine_of[cluster_rank()][lane], i, two);
  sh.fine_box.wait(time);
  OfCluster low, high;
#pragma unroll 1
  for (int i = 0; i < blocks; i++) low.add(i, sh.fine_of[i][lane].x), high.add(i, sh.fine_of[i][lane].y);
  const Place place = place_of(left, high.all + low.all);
  if (lane < place.lane) above += high.before + low.before;
  if (lane != place.lane) return above;
  left -= place.before;
  const bool in_high = left <= high.all;
  sh.bin = lower + in_high, sh.left = in_high ? left : left - high.all;
  sh.in_bin = in_high ? high.all : low.all, sh.in_bin_before = in_high ? high.before : low.before;
  return in_high ? above : above + high.before;
}

// Finds the bin in which the `left`-th score of the cluster lies, the `time`-th time. Returns this thread's part of the
// scores above that bin in the blocks before this one.
DEVICE u32 find_bin(SelectShared& sh, u32 left, u32 time) {
  static_assert(COARSE == 16 * BINS_A_THREAD, "half a warp's bins make a coarse one");
  __syncthreads();
  u32 above = 0;
  if (cluster_size() == 1) {
    find_own_bin(sh, left);
  } else {
    const uint4 four = *reinterpret_cast<const uint4*>(&sh.histogram[BINS_A_THREAD * threadIdx.x]);
    u32 sum = four.x + four.y + four.z + four.w;
#pragma unroll
    for (int i = 1; i < 16; i <<= 1) sum += __shfl_xor_sync(ALL_LANES, sum, i);
    if (threadIdx.x % 16 == 0) sh.coarse[threadIdx.x / 16] = sum;
    __syncthreads();
    if (threadIdx.x < 32) above = find_joint_bin(sh, left, time);
  }
  __syncthreads();
  return above;
}

// What a block keeps of its pages, from `begin` on. A thread looks after every SELECT_THREADS-th group of eight.
struct Kept {
  float* scores;
  uint4* bins;  // of eight neighbours each
  int begin;    // the first page, a multiple of eight
  int count;    // groups of eight pages

  // visit(group of eight, its bins) for this thread's.
  template <class V> DEVICE void vec8s(V&& visit) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += SELECT_THREADS) visit(i, bins[i]);
  }
  DEVICE u16& bin(int page) const { return reinterpret_cast<u16*>(&bins[page / VEC8])[page % 4 * 2 + page / 4 % 2]; }
  DEVICE u32 key(int page) const { return ordered(scores[page]); }
};

// Which of eight pages have a bin of at least `least`, at least 1.
DEVICE u32 at_least(uint4 eight, u32 least) {
  // The upper bit of a half stays where its bin is not less.
  constexpr u32 UPPER = 0x80008000u;
  const u32 both = least * 0x10001u;
  auto word = [&](u32 two) { return ((two | UPPER) - both) & UPPER; };
  const u32 mask = word(eight.x) >> 15 | word(eight.y) >> 14 | word(eight.z) >> 13 | word(eight.w) >> 12;
  return (mask | mask >> 12) & 0xffu;
}

// visit(page number from `begin`) for the pages of a mask.
template <class F> DEVICE void for_pages(int vec8, u32 mask, F&& visit) {
#pragma unroll 1
  for (; mask; mask &= mask - 1) visit(VEC8 * vec8 + __ffs(mask) - 1);
}

// The range of the scores that compete, where scoring left no statistics.
DEVICE Range range_of(const Kept& kept, SelectShared& sh) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  u32 least = 0xffffffffu, most = 0;
  for (int i = threadIdx.x; i < VEC8 * kept.count; i += SELECT_THREADS) {
    const u32 key = kept.key(i), bin = kept.bin(i);
    // -inf stays out of the range.
    if (bin != NONE && bin != TAKEN && key > ordered(NEG_INF)) least = min(least, key), most = max(most, key);
  }
  least = __reduce_min_sync(ALL_LANES, least), most = __reduce_max_sync(ALL_LANES, most);
  if (lane == 0) sh.counts[warp] = least, sh.more_counts[warp] = most;
  __syncthreads();
  least = __reduce_min_sync(ALL_LANES, lane < SELECT_WARPS ? sh.counts[lane] : 0xffffffffu);
  most = __reduce_max_sync(ALL_LANES, lane < SELECT_WARPS ? sh.more_counts[lane] : 0u);
  if (threadIdx.x == 0) sh.told = {least, most};
  cluster_sync();
  const uint2 of_rank = read_of(sh.told, min(lane, cluster_size() - 1));
  // Until all have read it.
  cluster_sync();
  return {number_of(__reduce_min_sync(ALL_LANES, of_rank.x)), number_of(__reduce_max_sync(ALL_LANES, of_rank.y))};
}

// The sum of two numbers of this thread over the block, in every thread.
DEVICE uint2 block_sums(SelectShared& sh, u32 a, u32 b) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  a = reduce_add(a), b = reduce_add(b);
  if (lane == 0) sh.counts[warp] = a, sh.more_counts[warp] = b;
  __syncthreads();
  const bool there = lane < SELECT_WARPS;
  return {reduce_add(there ? sh.counts[lane] : 0u), reduce_add(there ? sh.more_counts[lane] : 0u)};
}

// Marks the `sh.left` best pages of a bin as taken, digit by digit: where it holds more than FINALISTS. Out of line:
// see read_elements.
RARE void search_digits(const Kept kept, u32 bin, SelectShared* shared) {
  SelectShared& sh = *shared;
  u32 threshold = 0, time = 1;
#pragma unroll 1
  for (int open = 32; open > 0; time++) {
    const int bits = min(open, DIGIT), shift = open - bits;
    const u32 left = sh.left;
    // Every block has read its letters.
    cluster_sync();
    clear_histogram(sh);
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < VEC8 * kept.count; i += SELECT_THREADS) {
      const u32 key = kept.key(i);
      if (kept.bin(i) == bin && (open == 32 || (key ^ threshold) >> open == 0))
        atomicAdd(&sh.histogram[(key >> shift) & ((1u << bits) - 1)], 1u);
    }
    find_bin(sh, left, time);
    threshold |= sh.bin << shift;
    open = shift;
  }
  // Larger keys are taken, and the first of the equal ones, which those of the blocks before this one are.
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const u32 left = sh.left;
  u32 larger = 0, equal = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < VEC8 * kept.count; i += SELECT_THREADS)
    if (kept.bin(i) == bin) larger += kept.key(i) > threshold, equal += kept.key(i) == threshold;
  const uint2 mine = block_sums(sh, larger, equal);
  if (threadIdx.x == 0) sh.told = mine;
  cluster_sync();
  const uint2 of_rank = read_of(sh.told, min(lane, cluster_size() - 1));
  const uint2 before = {reduce_add(lane < cluster_rank() ? of_rank.x : 0u),
                        reduce_add(lane < cluster_rank() ? of_rank.y : 0u)};
  if (threadIdx.x == 0) sh.taken_before = before.x + min(before.y, left);
  // In the order of the pages, a warp's worth of them at a time.
  u32 seen = before.y;
#pragma unroll 1
  for (int first = 0; first < VEC8 * kept.count; first += SELECT_THREADS) {
    const int page = first + threadIdx.x;
    const bool in_bin = page < VEC8 * kept.count && kept.bin(page) == bin;
    const u32 key = in_bin ? kept.key(page) : 0;
    const bool tied = in_bin && key == threshold;
    const u32 of_warp = __ballot_sync(ALL_LANES, tied);
    __syncthreads();
    if (lane == 0) sh.counts[warp] = __popc(of_warp);
    __syncthreads();
    const u32 count = lane < SELECT_WARPS ? sh.counts[lane] : 0;
    const u32 rank = seen + reduce_add(lane < warp ? count : 0) + __popc(of_warp & ((1u << lane) - 1));
    seen += reduce_add(count);
    if (in_bin && (key > threshold || (tied && rank < left))) kept.bin(page) = TAKEN;
  }
  // Nobody reads another block's memory from here on.
  cluster_sync();
}

// A page of the decisive bin as a number: of two, the larger goes to the page that is taken first.
DEVICE u64 finalist(u32 key, int page) { return u64(key) << 32 | u32(~page); }
DEVICE int page_of(u64 finalist) { return int(~u32(finalist)); }

// Lists this block's pages whose bin is above `bin`, behind those of the blocks before it, and, where there are
// finalists, its own of the `sh.left` best pages of that bin behind the `sure` ones of all blocks. `above`: what
// find_bin returned.
DEVICE void list_pages(const Kept& kept, u32 bin, bool finalists, int* list, int sure, u32 above, SelectShared& sh) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  u32 mine = 0;
  kept.vec8s([&](int vec8, uint4 eight) {
    const u32 mask = at_least(eight, bin + 1);
    mine += __popc(mask);
    if (finalists)
      for_pages(vec8, at_least(eight, bin) ^ mask, [&](int page) {
        const u32 at = sh.in_bin_before + atomicAdd(&sh.finalist_count, 1u);
        const u64 number = finalist(kept.key(page), kept.begin + page);
        if (cluster_size() == 1) sh.finalists[at] = number;
#pragma unroll 1
        for (int rank = 0; rank < cluster_size() && cluster_size() > 1; rank++)
          sh.finalist_box.send(sh.finalists[at], rank, number);
      });
  });
  const u32 upto = sum_upto(mine);
  above = reduce_add(above);
  if (lane == 31) sh.counts[warp] = upto, sh.more_counts[warp] = above;
  if (threadIdx.x == 0 && finalists && cluster_size() > 1) sh.finalist_box.expect(8 * sh.in_bin);
  __syncthreads();
  int* next = list + sh.taken_before + upto - mine + reduce_add(lane < warp ? sh.counts[lane] : 0u) +
              reduce_add(lane < SELECT_WARPS ? sh.more_counts[lane] : 0u);
  kept.vec8s([&](int vec8, uint4 eight) {
    for_pages(vec8, at_least(eight, bin + 1), [&](int page) { announce_page(next++, kept.begin + page); });
  });
  // Of all blocks.
  if (finalists && cluster_size() > 1) sh.finalist_box.wait(0);
  // A warp ranks one of the block's own.
  const u32 own = sh.finalist_count, left = sh.left;
#pragma unroll 1
  for (u32 i = warp; i < own; i += SELECT_WARPS) {
    const u64 number = sh.finalists[sh.in_bin_before + i];
    u32 rank = 0;
#pragma unroll 1
    for (u32 j = lane; j < sh.in_bin; j += 32) rank += sh.finalists[j] > number;
    rank = reduce_add(rank);
    if (lane == 0 && rank < left) announce_page(list + sure + rank, page_of(number));
  }
}

// The block's pages of the candidates from..pages, and memory for them.
template <Choice CHOICE> DEVICE Kept own_pages(const Params& p, const Candidates& all, int pair, float* memory) {
  const int begin = all.from & ~(VEC8 - 1), vec8s = (all.pages - begin + VEC8 - 1) / VEC8, blocks = cluster_size();
  // A power of two.
  const int each = vec8s >> (31 - __clz(blocks));
  const Share share = share_of(each, vec8s - each * blocks, cluster_rank());
  Kept kept;
  kept.scores =
      CHOICE != ANY || !p.kept ? memory : p.kept + (size_t(pair) * blocks + cluster_rank()) * kept_floats(p.keys);
  kept.bins = reinterpret_cast<uint4*>(kept.scores + p.keys);
  // Of no pages the last ones, which may be read.
  kept.begin = begin + VEC8 * min(share.begin, vec8s - 1);
  kept.count = share.end - share.begin;
  return kept;
}

template <Choice CHOICE> DEVICE void select_kernel(const Params& p) {
  __shared__ SelectShared sh;
  extern __shared__ __align__(16) float memory[];
  let_next_start();
  const int b = blockIdx.z, pair = b * p.kv_heads + blockIdx.y;
  const Sequence s = sequence(p, b);
  const Candidates all = candidates(p, s, b);
  if (!s.valid || !chooses(p, all)) return wait_for_previous();
  const float* scores = p.scores + size_t(pair) * scored_page_count(p.max_pages) * scores_a_page(p);
  const Kept kept = own_pages<CHOICE>(p, all, pair, memory);
  clear_histogram(sh);
  if (threadIdx.x == 0) {
    sh.finalist_count = sh.taken_before = 0;
    sh.coarse_box.open(), sh.fine_box.open(), sh.finalist_box.open();
  }
  cluster_opened();
  // Those that compete; the newest page is forced, and so are the sinks.
  const int first = all.from + all.sinks, competing = max(all.pages - 1 - first, 0), wanted = all.budget - all.forced;
  int* const list = p.pages + size_t(pair) * p.max_pages;
  if (cluster_rank() == 0) {
#pragma unroll 1
    for (int i = threadIdx.x; i < all.forced; i += SELECT_THREADS)
      announce_page(list + i, i < all.sinks ? all.from + i : all.pages - 1);
  }
  wait_until(&p.progress[pair], all_score_blocks(p));
  cluster_wait();
  if (wanted <= 0) return wait_for_previous();

  const bool with_stats = CHOICE != ANY || p.score_parts;
  const float* read = scores + size_t(kept.begin) * scores_a_page(p);
  HeadScores asked;
  if (softmax_over_pages<CHOICE>(p)) asked.ask(p, read, threadIdx.x, VEC8 * kept.count, 0);
  Bins bins(0.f, 0.f);
  if (with_stats) {
    const Range range = joined_range<CHOICE>(p, pair, sh);
    bins = Bins(range.lowest, range.highest);
  } else if (softmax_over_pages<CHOICE>(p)) {
    page_sums(p, scores, all.from, all.pages, &sh);
  }
  if (softmax_over_pages<CHOICE>(p)) {
    join_heads(p, read, asked, kept.scores, VEC8 * kept.count, sh);
    read = kept.scores;
  }
#pragma unroll 1
  for (int vec8 = threadIdx.x; vec8 < kept.count; vec8 += SELECT_THREADS) {
    const int page0 = kept.begin + VEC8 * vec8;
    const float4 a = reinterpret_cast<const float4*>(read)[2 * vec8],
                 b = reinterpret_cast<const float4*>(read)[2 * vec8 + 1];
    if (read != kept.scores)
      reinterpret_cast<float4*>(kept.scores)[2 * vec8] = a, reinterpret_cast<float4*>(kept.scores)[2 * vec8 + 1] = b;
    const float eight[VEC8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    u32 in[VEC8];
#pragma unroll
    for (int i = 0; i < VEC8; i++) {
      const bool competes = u32(page0 + i - first) < u32(competing);
      in[i] = competes ? bins.of(eight[i]) : NONE;
      if (competes && with_stats) atomicAdd(&sh.histogram[in[i] - 1], 1u);
    }
    kept.bins[vec8] = {in[0] | in[4] << 16, in[1] | in[5] << 16, in[2] | in[6] << 16, in[3] | in[7] << 16};
  }
  if (!with_stats) {
    __syncthreads();
    const Range range = range_of(kept, sh);
    bins = Bins(range.lowest, range.highest);
#pragma unroll 1
    for (int page = threadIdx.x; page < VEC8 * kept.count; page += SELECT_THREADS) {
      if (kept.bin(page) == NONE) continue;
      const u32 bin = bins.of(number_of(kept.key(page)));
      kept.bin(page) = bin;
      atomicAdd(&sh.histogram[bin - 1], 1u);
    }
  }
  const u32 above = find_bin(sh, wanted, 0), bin = sh.bin + 1;
  const int sure = wanted - int(sh.left);
  const bool finalists = sh.in_bin <= (cluster_size() == 1 ? FINALISTS_ALONE : FINALISTS);
  if (!finalists) search_digits(kept, bin, &sh);
  list_pages(kept, bin, finalists, list + all.forced, sure, above, sh);
  wait_for_previous();
}
