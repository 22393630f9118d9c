// The pages of a step, per KV head: forced ones, then the best by score, ties to the lower index; ascending.
//
// Grid (Hkv, B). A histogram over the range of the scores says in which bin the k-th largest lies; the few scores in
// that bin are compared with one another. A bin with too many (ties, outliers that stretch the range) is searched digit
// by digit. The list has the forced pages first, then those above the bin, then those of it by rank; each is announced
// as soon as its place is known.
//
// The group score "max" is joined over heads while pages are scored (page_vectors.cuh); "softmax" needs the scores of
// all pages first, and is joined here (join_heads).
//
// Nothing else happens on the device while this runs, so all of it is short: a block a KV head that is there before the
// scores are, no barrier between blocks, one pass over the scores, two over their bins, and as few instructions as
// possible, as each is fetched for the first time.
#pragma once
#include "common.cuh"

constexpr int SELECT_WARPS = SELECT_THREADS / 32;

// Bins of the histogram: also the values of a digit.
constexpr int DIGIT = 11, BINS = 1 << DIGIT;
// Scores of a bin that are compared with one another.
constexpr int FINALISTS = 256;
// What stands for a page instead of the number of its score's bin, which is 1..BINS: that it does not compete; that it
// is taken.
constexpr u32 NONE = 0, TAKEN = 0x7fff;
// Neighbouring pages of a thread. Their bins are a uint4: of page i and page i + 4 in the halves of word i.
constexpr int VEC8 = 8;
constexpr int BINS_A_THREAD = BINS / SELECT_THREADS;
static_assert(BINS_A_THREAD == 4, "a thread looks at four bins");

// What a kernel is made for: every case, or one group score with statistics of the scoring blocks and shared memory for
// all pages.
enum Choice { ANY, BY_MAX, BY_SOFTMAX };
template <Choice CHOICE> DEVICE bool softmax_over_pages(const Params& p) {
  return CHOICE == BY_SOFTMAX || (CHOICE == ANY && p.group_score == SOFTMAX);
}

struct SelectShared {
  __align__(16) u32 histogram[BINS];
  u32 finalists[FINALISTS];
  int finalist_pages[FINALISTS];
  u32 finalist_count;
  u32 counts[SELECT_WARPS], more_counts[SELECT_WARPS];
  float2 part[SELECT_WARPS];
  __align__(16) float lse[MAX_GROUP];
  float lowest[MAX_GROUP], highest[MAX_GROUP];
  u32 bin, left, in_bin;
};
static_assert(sizeof(SelectShared) + BLOCK_RESERVED <= SELECT_VARIABLES, "the host leaves room for it");

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

// The log-sum-exp (base 2) of scores with this largest one and sum. An infinite one is all of it.
DEVICE float lse_of(float most, float sum) { return most == -NEG_INF ? most : most + log2_fast(sum); }

// Joined over a warp: the largest first, so that a lane needs one exponential.
DEVICE float2 warp_sums(float2 a) {
  const float top = warp_max(a.x);
  return {top, warp_sum(top == NEG_INF ? 0.f : a.y * __expf(a.x - top))};
}

// Two bounds that the group's scores of a KV head's candidates lie between.
struct Range {
  float lowest, highest;
};

// The log-sum-exp (base 2) of every head over the candidate pages, and its least and largest logarithm of a share, from
// the parts that the scoring blocks left.
DEVICE void joined_lse(const Params& p, int pair, SelectShared& sh) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
  for (int h = warp; h < p.group; h += SELECT_WARPS) {
    float2 sums = {NEG_INF, 0.f};
    float least = -NEG_INF;
#pragma unroll 1
    for (int i = lane; i < p.score_parts; i += 32) {
      const float4 part = p.score_stats[(size_t(pair) * p.score_parts + i) * p.group + h];
      sums = joined_sums(sums, {part.x, part.y});
      least = fminf(least, part.z);
    }
    sums = warp_sums(sums);
    least = warp_min(least);
    const float most = sums.x * LOG2E, lse = lse_of(most, sums.y);
    if (lane == 0) sh.lse[h] = lse, sh.lowest[h] = least * LOG2E - lse, sh.highest[h] = most - lse;
  }
  __syncthreads();
}

// The log-sum-exps alone, from the scores themselves.
RARE void page_lse(const Params& p, const float* scores, int from, int pages, SelectShared* shared) {
  SelectShared& sh = *shared;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
  for (int h = 0; h < p.group; h++) {
    float2 sums = {NEG_INF, 0.f};
    for (int i = from + threadIdx.x; i < pages; i += SELECT_THREADS)
      sums = joined_sums(sums, {scores[size_t(i) * scores_a_page(p) + h], 1.f});
    sums = warp_sums(sums);
    if (lane == 0) sh.part[warp] = sums;
    __syncthreads();
    if (warp == 0) {
      sums = warp_sums(lane < SELECT_WARPS ? sh.part[lane] : float2{NEG_INF, 0.f});
      if (lane == 0) sh.lse[h] = lse_of(sums.x * LOG2E, sums.y);
    }
    __syncthreads();
  }
}

// The range of the group's scores from the parts that the scoring blocks left, and the log-sum-exps that they need.
template <Choice CHOICE> DEVICE Range joined_range(const Params& p, int pair, SelectShared& sh) {
  Range range = {NEG_INF, NEG_INF};
  if (softmax_over_pages<CHOICE>(p)) {
    joined_lse(p, pair, sh);
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
          scores + size_t(min(page + i * SELECT_THREADS, count - 1)) * scores_a_page(p) + h);
  }
};

// The group's scores of the candidates from the heads': the logarithms (base 2) of the sums over heads of each head's
// softmax. Of other pages any number. `asked`: the first heads' of the first pages.
DEVICE void join_heads(const Params& p, const float* scores /* from the first page on */, HeadScores& asked,
                       float* joined, int count, const SelectShared& sh) {
#pragma unroll 1
  for (int page = threadIdx.x; page < count; page += JOINED_AT_ONCE * SELECT_THREADS) {
    // Not -inf, which would make NaNs.
    float top[JOINED_AT_ONCE], sum[JOINED_AT_ONCE];
#pragma unroll
    for (int i = 0; i < JOINED_AT_ONCE; i++) top[i] = -1e30f, sum[i] = 0.f;
#pragma unroll 1
    for (int h = 0; h < p.group; h += 4) {
      if (h || page >= SELECT_THREADS) asked.ask(p, scores, page, count, h);
      const float4 less = *reinterpret_cast<const float4*>(&sh.lse[h]);
      // Of heads that are not there -inf.
      auto share = [&](int j, float score, float lse) { return h + j < p.group ? fmaf(score, LOG2E, -lse) : NEG_INF; };
#pragma unroll
      for (int i = 0; i < JOINED_AT_ONCE; i++) {
        const float4 of = asked.four[i];
        const float a = share(0, of.x, less.x), b = share(1, of.y, less.y), c = share(2, of.z, less.z),
                    d = share(3, of.w, less.w);
        const float n = fmaxf(fmaxf(fmaxf(a, b), fmaxf(c, d)), top[i]),
                    before = h ? sum[i] * exp2_fast(top[i] - n) : 0.f;
        sum[i] = before + exp2_fast(a - n) + exp2_fast(b - n) + exp2_fast(c - n) + exp2_fast(d - n);
        top[i] = n;
      }
    }
#pragma unroll
    for (int i = 0; i < JOINED_AT_ONCE; i++)
      if (page + i * SELECT_THREADS < count)
        joined[page + i * SELECT_THREADS] = or_first(top[i] + log2_fast(sum[i]) + 0.f);
  }
  __syncthreads();
}

// Finds the bin in which the `left`-th score lies, from the top, and its rank there, into `sh`, and clears the
// histogram.
DEVICE void find_bin(SelectShared& sh, u32 left) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int lowest = BINS - BINS_A_THREAD - BINS_A_THREAD * int(threadIdx.x);
  uint4& quad = *reinterpret_cast<uint4*>(&sh.histogram[lowest]);
  const uint4 bins = quad;
  quad = {0, 0, 0, 0};
  const u32 mine = bins.x + bins.y + bins.z + bins.w, upto = sum_upto(mine);
  if (lane == 31) sh.more_counts[warp] = upto;
  __syncthreads();
  u32 before = reduce_add(lane < warp ? sh.more_counts[lane] : 0u) + upto - mine;
  if (left > before && left <= before + mine) {
    const u32 counts[BINS_A_THREAD] = {bins.w, bins.z, bins.y, bins.x};
    bool found = false;
#pragma unroll
    for (int i = 0; i < BINS_A_THREAD; i++) {
      if (!found && left <= before + counts[i]) {
        found = true;
        sh.bin = lowest + BINS_A_THREAD - 1 - i, sh.left = left - before, sh.in_bin = counts[i];
      }
      before += counts[i];
    }
  }
  __syncthreads();
}

// What a block keeps of the pages from `begin` on. A thread looks after every SELECT_THREADS-th group of eight.
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
  __syncthreads();
  return {number_of(least), number_of(most)};
}

// Marks the `sh.left` best pages of a bin as taken, digit by digit: where it holds more than FINALISTS. Out of line:
// see read_elements.
RARE void search_digits(const Kept kept, u32 bin, SelectShared* shared) {
  SelectShared& sh = *shared;
  u32 threshold = 0;
#pragma unroll 1
  for (int open = 32; open > 0;) {
    const int bits = min(open, DIGIT), shift = open - bits;
    const u32 left = sh.left;
#pragma unroll 1
    for (int i = threadIdx.x; i < VEC8 * kept.count; i += SELECT_THREADS) {
      const u32 key = kept.key(i);
      if (kept.bin(i) == bin && (open == 32 || (key ^ threshold) >> open == 0))
        atomicAdd(&sh.histogram[(key >> shift) & ((1u << bits) - 1)], 1u);
    }
    __syncthreads();
    find_bin(sh, left);
    threshold |= sh.bin << shift;
    open = shift;
  }
  // Larger keys are taken, and the first of the equal ones: in the order of the pages, a warp's worth of them at a
  // time.
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const u32 left = sh.left;
  u32 seen = 0;
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
  __syncthreads();
}

// Lists the pages whose bin is above `bin`, and behind the `sure` of them, where there are finalists, the `sh.left`
// best pages of that bin.
DEVICE void list_pages(const Kept& kept, u32 bin, bool finalists, int* list, int sure, SelectShared& sh) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  u32 mine = 0;
  kept.vec8s([&](int vec8, uint4 eight) {
    const u32 mask = at_least(eight, bin + 1);
    mine += __popc(mask);
    if (finalists)
      for_pages(vec8, at_least(eight, bin) ^ mask, [&](int page) {
        const u32 at = atomicAdd(&sh.finalist_count, 1u);
        sh.finalist_pages[at] = page, sh.finalists[at] = kept.key(page);
      });
  });
  const u32 upto = sum_upto(mine);
  if (lane == 31) sh.counts[warp] = upto;
  __syncthreads();
  int* next = list + reduce_add(lane < warp ? sh.counts[lane] : 0u) + upto - mine;
  kept.vec8s([&](int vec8, uint4 eight) {
    for_pages(vec8, at_least(eight, bin + 1), [&](int page) { announce_page(next++, kept.begin + page); });
  });
  // A warp ranks one of them.
  const u32 count = sh.finalist_count, left = sh.left;
#pragma unroll 1
  for (u32 i = warp; i < count; i += SELECT_WARPS) {
    const int page = sh.finalist_pages[i];
    const u32 key = sh.finalists[i];
    u32 rank = 0;
#pragma unroll 1
    for (u32 j = lane; j < count; j += 32) {
      const u32 other = sh.finalists[j];
      rank += other > key || (other == key && sh.finalist_pages[j] < page);
    }
    rank = reduce_add(rank);
    if (lane == 0 && rank < left) announce_page(list + sure + rank, kept.begin + page);
  }
}

template <Choice CHOICE> DEVICE void select_kernel(const Params& p) {
  __shared__ SelectShared sh;
  extern __shared__ __align__(16) float memory[];
  let_next_start();
  const int b = blockIdx.y, pair = b * p.kv_heads + blockIdx.x;
  const Sequence s = sequence(p, b);
  const Candidates all = candidates(p, s, b);
  if (!s.valid || !chooses(p, all)) return wait_for_previous();
  const float* scores = p.scores + size_t(pair) * scored_page_count(p.max_pages) * scores_a_page(p);
  Kept kept;
  kept.scores = CHOICE != ANY || !p.kept ? memory : p.kept + size_t(pair) * kept_floats(p.keys);
  kept.bins = reinterpret_cast<uint4*>(kept.scores + p.keys);
  kept.begin = all.from & ~(VEC8 - 1);
  kept.count = (all.pages - kept.begin + VEC8 - 1) / VEC8;
  *reinterpret_cast<uint4*>(&sh.histogram[BINS_A_THREAD * threadIdx.x]) = {0, 0, 0, 0};
  if (threadIdx.x == 0) sh.finalist_count = 0;
  // Those that compete; the newest page is forced, and so are the sinks.
  const int first = all.from + all.sinks, competing = max(all.pages - 1 - first, 0), wanted = all.budget - all.forced;
  int* const list = p.pages + size_t(pair) * p.max_pages;
#pragma unroll 1
  for (int i = threadIdx.x; i < all.forced; i += SELECT_THREADS)
    announce_page(list + i, i < all.sinks ? all.from + i : all.pages - 1);
  wait_until(&p.progress[pair], all_score_blocks(p));
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
    page_lse(p, scores, all.from, all.pages, &sh);
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
  __syncthreads();
  if (!with_stats) {
    const Range range = range_of(kept, sh);
    bins = Bins(range.lowest, range.highest);
#pragma unroll 1
    for (int i = threadIdx.x; i < competing; i += SELECT_THREADS) {
      const int page = first - kept.begin + i;
      const u32 bin = bins.of(number_of(kept.key(page)));
      kept.bin(page) = bin;
      atomicAdd(&sh.histogram[bin - 1], 1u);
    }
    __syncthreads();
  }
  find_bin(sh, wanted);
  const u32 bin = sh.bin + 1;
  const bool finalists = sh.in_bin <= FINALISTS;
  if (!finalists) search_digits(kept, bin, &sh);
  list_pages(kept, bin, finalists, list + all.forced, wanted - int(sh.left), sh);
  wait_for_previous();
}
