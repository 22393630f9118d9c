// Steps 1 and 2 of a decoding step: append keys and values, bring the state of the pages they touch up to date, score
// pages.
//
// Grid (score_blocks + touched, Hkv, B). The first blocks score the pages that the step does not touch; each of the
// others owns one that it touches (a page, or of sketches a block of rows): it writes the fed rows that lie in it,
// makes its state from its rows and scores it. What waits for a head's scores (select.cuh) is on the device before they
// are there.
#pragma once
#include "selectors.cuh"  // every file of selector/: written by op/build/params.rs

template <class T, int DP, class SELECTOR> DEVICE void score_kernel(const Params& p) {
  extern __shared__ __align__(1024) u8 raw[];
  SELECTOR::template score_step<T, DP>(p, blockIdx.z, blockIdx.y, raw);
}
