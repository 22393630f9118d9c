// The end of a row: join it with its head sink or with what the output cache holds, write the output, fill the cache.
#pragma once
#include "common.cuh"

// A row that has been attended to: which token of the call, whose head.
struct Row {
  int b, head, s /* row of the call */, position;
  bool complete;  // its output is this attention alone: the newest token, a prefill, a dense layer
};

DEVICE Row row_of(const Params& p, const Sequence& s, int b, int head, int token) {
  return {b, head, s.skipped + token, s.first + token, p.phase == PREFILL || p.mode == DENSE || token == s.fed - 1};
}

// The output cache's slot of a row.
DEVICE size_t slot_of(const Params& p, const Row& r) {
  return (size_t(r.b) * p.ring + r.position % p.ring) * p.heads + r.head;
}

// What a row becomes: `out = keep * cached + scale * acc`, with this log-sum-exp.
struct Joined {
  float scale, keep, lse;
  bool cached;  // the output cache takes the row
};

// The log-sum-exp that a row's attention is joined with: the output cache's, a head sink, or none (-inf).
template <class T> DEVICE float joined_with(const Params& p, const Row& r) {
  if (!r.complete) return p.cached_lse[slot_of(p, r)];
  return p.head_sink ? widen(static_cast<const T*>(p.head_sink)[r.head]) : NEG_INF;
}

// `sum` of e^(x - m) over the row's tokens and m in units of log2; a row that saw nothing has sum 0.
DEVICE Joined join(const Params& p, const Sequence& s, const Row& r, float m, float sum, float other) {
  const float lse = sum > 0.f ? (m + log2_fast(sum)) * LN2 : sum == 0.f ? NEG_INF : sum;
  // A complete row has seen its own token at least: a sum of 0 comes of logits of -inf alone, for which a softmax is 0
  // / 0.
  const float inverse = sum == 0.f ? (r.complete && other == NEG_INF ? NOT_A_NUMBER : 0.f) : __fdividef(1.f, sum);
  const bool cached = p.window > 1 && r.position > s.len - p.window;
  if (other == NEG_INF) return {inverse, 0.f, lse, cached};
  const float top = fmaxf(lse, other), a = __expf(lse - top), b = __expf(other - top), share = __fdividef(1.f, a + b);
  return {inverse * a * share, r.complete ? 0.f : b * share, top + log2_fast(a + b) * LN2, cached};
}
