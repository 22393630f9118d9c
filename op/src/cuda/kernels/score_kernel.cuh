// Steps 1 and 2 of a decoding step: append keys and values, bring the state of the pages they touch up to date, score
// pages.
//
// Grid (score_blocks + touched pages, Hkv, B). The first blocks score the pages that the step does not touch; each of
// the others owns one touched page: it writes the fed rows that lie in it, makes its state from its rows and scores it.
// What waits for a head's scores (select.cuh) is on the device before they are there.
#pragma once
#include "selectors.cuh"  // every file of selector/: written by op/build/params.rs

template <class T, int DP, class SELECTOR> DEVICE void score_kernel(const Params& p) {
  extern __shared__ __align__(1024) u8 raw[];
  const int head = blockIdx.y, b = blockIdx.z;
  if (blockIdx.x < p.score_blocks) return SELECTOR::template score_pages<T, DP>(p, b, head, raw);
  start_step();
  const Sequence s = sequence(p, b);
  if (s.valid) SELECTOR::template touch_page<T, DP>(p, s, b, head, int(blockIdx.x) - p.score_blocks, raw);
}
