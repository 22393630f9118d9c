// What the parts of a selecting block share: its memory, and sums over a warp.
#pragma once
#include "cluster.cuh"

constexpr int SELECT_WARPS = SELECT_THREADS / 32;

// Bins of the histogram: also the values of a digit.
constexpr int DIGIT = 11, BINS = 1 << DIGIT;
// Scores of a bin that are compared with one another at most, by one block and by several.
constexpr int FINALISTS_ALONE = 256, FINALISTS = 512;
// What stands for a page instead of the number of its score's bin, which is 1..BINS: that it does not compete; that it
// is taken.
constexpr u32 NONE = 0, TAKEN = 0x7fff;
// Neighbouring pages of a thread. Their bins are a uint4: of page i and page i + 4 in the halves of word i.
constexpr int VEC8 = 8;
constexpr int BINS_A_THREAD = BINS / SELECT_THREADS;
// Neighbouring bins whose counts are also kept together.
constexpr int COARSE = BINS / 32;
static_assert(BINS_A_THREAD == 4, "a thread looks at four bins, which it reads at once");

// What a kernel is made for: every case, or one group score with statistics of the scoring blocks and shared memory for
// all pages.
enum Choice { ANY, BY_MAX, BY_SOFTMAX };
template <Choice CHOICE> DEVICE bool softmax_over_pages(const Params& p) {
  return CHOICE == BY_SOFTMAX || (CHOICE == ANY && p.group_score == SOFTMAX);
}

struct SelectShared {
  __align__(16) u32 histogram[BINS];  // of the block's own pages
  u32 coarse[BINS / COARSE];          // the sums of so many of its bins
  u32 coarse_of[MAX_CLUSTER][32];     // of every block of the cluster, from the top
  uint2 fine_of[MAX_CLUSTER][32];     // of one coarse bin, two bins each
  Letterbox coarse_box, fine_box, finalist_box;
  u64 finalists[FINALISTS];  // of the whole cluster: see finalist()
  u32 finalist_count;        // of the block
  u32 counts[SELECT_WARPS], more_counts[SELECT_WARPS];
  uint2 told;  // what the other blocks of the cluster read
  float2 part[SELECT_WARPS];
  __align__(16) float most[MAX_GROUP], rest[MAX_GROUP];  // of a head's scores: see HeadSums
  float lowest[MAX_GROUP], highest[MAX_GROUP];
  // The decisive bin; the pages of it that are taken, and all of them, over the cluster; those in blocks before this
  // one.
  u32 bin, left, in_bin, in_bin_before;
  u32 taken_before;  // of that bin, in blocks before this one, where digits decide
};
static_assert(sizeof(SelectShared) + BLOCK_RESERVED <= SELECT_VARIABLES, "the host leaves room for it");

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
