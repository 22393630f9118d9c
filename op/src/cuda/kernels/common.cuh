// What all kernels share: one sequence's lengths, rotary embedding, warp helpers.
//
// The parameters of a call and all constants that the host knows too: params.cuh, which the build script writes.
// No header of the toolkit is needed, so that NVRTC can compile the same text on a machine that has the driver only.
#pragma once

#include "ptx.cuh"

// Eight neighbouring elements, 16-byte aligned, widened.
DEVICE void load8(const F32* p, float* x) {
  const float4 a = *reinterpret_cast<const float4*>(p), b = *reinterpret_cast<const float4*>(p + 4);
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}
template <class T> DEVICE void load8(const T* p, float* x) {
  const uint4 a = *reinterpret_cast<const uint4*>(p);
  const u32 w[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    x[2 * i] = widen(T{u16(w[i])});
    x[2 * i + 1] = widen(T{u16(w[i] >> 16)});
  }
}

// The other way.
DEVICE void store8(F32* p, const float (&x)[8]) {
  reinterpret_cast<float4*>(p)[0] = {x[0], x[1], x[2], x[3]},
  reinterpret_cast<float4*>(p)[1] = {x[4], x[5], x[6], x[7]};
}
template <class T> DEVICE void store8(T* p, const float (&x)[8]) {
  u32 w[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    T low, high;
    narrow(x[2 * i], low), narrow(x[2 * i + 1], high);
    w[i] = low.v | u32(high.v) << 16;
  }
  *reinterpret_cast<uint4*>(p) = {w[0], w[1], w[2], w[3]};
}

// NVRTC has no constant for it.
#define NEG_INF __uint_as_float(0xff800000u)
#define NOT_A_NUMBER __uint_as_float(0x7fffffffu)
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

// One sequence of a call.
struct Sequence {
  int len;      // valid tokens after the call
  int fed;      // rows that count: the last `fed` of the S
  int first;    // position of the first of them
  int skipped;  // leading rows to ignore
  bool valid;   // a sequence whose lengths break the contract gets NaN outputs and keeps its state
};

DEVICE Sequence sequence(const Params& p, int b) {
  Sequence s;
  const int last = p.seqlens_k[b];
  s.len = last + 1;
  const int count = p.retro_count ? p.retro_count[b * p.count_stride] : p.retro[p.ragged ? b : 0];
  // What was counted on the device is checked there.
  const int retro = max(min(count, p.tokens - 1), 0);
  s.fed = p.phase == PREFILL ? min(p.tokens, max(s.len, 1)) : retro + 1;
  s.first = s.len - s.fed;
  s.skipped = p.tokens - s.fed;
  s.valid = last >= 0 && last < p.capacity && s.len <= p.total && s.first >= 0;
  if (p.retro_count) s.valid = s.valid && count == retro && count < p.window;
  if (p.cos) s.valid = s.valid && s.len <= p.rotary_rows;
  if (p.page_budget) s.valid = s.valid && p.page_budget[b * p.budget_stride] >= 0;
  return s;
}

DEVICE int pages_for(const Params& p, int tokens) { return (tokens + (1 << p.page_shift) - 1) >> p.page_shift; }

// Pages per KV head that a step may load.
DEVICE int budget_pages(const Params& p, int b, int len) {
  const int all = pages_for(p, len);
  const int asked = p.page_budget ? p.page_budget[b * p.budget_stride] : 0;
  if (asked > 0) return min(asked, all);
  // 2^-shift: exact, and no division.
  const double inverse = __longlong_as_double((1023ll - p.page_shift) << 52);
  const double relative = ceil(p.budget_ratio * len * inverse - 1e-9);
  return min(max(int(fmax(relative, 0.0)), p.budget_min_pages), all);
}

// The first fed row that attention covers.
DEVICE int first_token(const Params& p, const Sequence& s) { return p.last_tokens ? max(s.fed - p.last_tokens, 0) : 0; }

// The oldest position that a query sees.
DEVICE int seen_from(const Params& p, int position) {
  return p.local_window ? max(position + 1 - p.local_window, 0) : 0;
}

// The first page that a step may read; the last one holds the newest token.
DEVICE int first_candidate(const Params& p, const Sequence& s) {
  return seen_from(p, p.mode == DENSE ? s.first : s.len - 1) >> p.page_shift;
}

// What a step chooses from: pages from..pages.
struct Candidates {
  int from, pages, count, budget;
  int sinks;   // of the candidates, forced ones at the start
  int forced;  // the newest page included
};

DEVICE Candidates candidates(const Params& p, const Sequence& s, int b) {
  Candidates c;
  c.from = first_candidate(p, s), c.pages = pages_for(p, s.len), c.count = c.pages - c.from;
  c.budget = budget_pages(p, b, s.len);
  c.sinks = min(max(p.sink_pages - c.from, 0), c.count);
  c.forced = c.sinks + (c.pages - 1 >= p.sink_pages);
  return c;
}

// Scores that are stored of a page: of every head, or the group's largest.
DEVICE int scores_a_page(const Params& p) { return p.group_score == SOFTMAX ? stored_heads(p.group) : 1; }

// Blocks that score a head's pages, those that own what the step touches among them.
DEVICE int all_score_blocks(const Params& p) { return p.score_blocks + p.touched; }

// Whether a step has to choose among them: it takes all, or the first and the last, otherwise.
DEVICE bool chooses(const Params& p, const Candidates& c) { return p.mode == RETRO && c.budget < c.count; }

// A of every page of a KV head: the newest position of the step that loaded it last.
DEVICE int* page_steps_of(const Params& p, int pair) { return p.page_steps + size_t(pair) * p.cache_pages; }

// What the sinks leave of the budget: the newest page at least.
DEVICE int beside_sinks(const Candidates& c) { return max(c.budget - c.sinks + (c.sinks == c.forced), 1); }

// The first page of those at the end that the modes "streaming" and "periodic" read; the latter half as many, rounded
// up.
DEVICE int recent_from(const Params& p, const Candidates& c) {
  const int left = beside_sinks(c);
  return max(c.from + c.sinks, c.pages - (p.mode == PERIODIC ? (left + 1) / 2 : left));
}

// The pages that mode "periodic" reads between the sinks and page `recent`: `count` multiples of `period`, from
// `first * period` on. The period is the least whose multiples fit; 0: there is no room for any.
struct Between {
  int period, first, count;
};
DEVICE Between between(const Params& p, const Candidates& c, int recent) {
  Between b = {};
  const int most = p.mode == PERIODIC ? beside_sinks(c) / 2 : 0, from = c.from + c.sinks;
  if (most == 0) return b;
  // So many pages have at least as many multiples as whole periods.
  b.period = (recent - from) / (most + 1);
  do {
    b.period++;
    b.first = (from + b.period - 1) / b.period;
    b.count = (recent + b.period - 1) / b.period - b.first;
  } while (b.count > most);
  return b;
}

// Pages that a step lists for a KV head: known before they are chosen.
DEVICE int listed_pages(const Params& p, const Candidates& c) {
  if (p.mode == STREAMING || p.mode == PERIODIC) {
    const int recent = recent_from(p, c);
    return c.sinks + between(p, c, recent).count + c.pages - recent;
  }
  return p.mode == DENSE || c.budget >= c.count ? c.count : max(c.budget, c.forced);
}

// Element d of a head's row, and the one that rotary embedding joins it with.
struct Pair {
  float x, y;
};
DEVICE bool rotates(const Params& p, int d) { return p.cos && d < 2 * p.rotary_half; }
DEVICE bool is_low(const Params& p, int d) { return p.rotary_interleaved ? !(d & 1) : d < p.rotary_half; }
template <class T> DEVICE Pair pair_of(const Params& p, const T* row, int d) {
  const float x = widen(row[d]);
  if (!rotates(p, d)) return {x, 0.f};
  return {x, widen(row[p.rotary_interleaved ? d ^ 1 : is_low(p, d) ? d + p.rotary_half : d - p.rotary_half])};
}
// The element after rotary embedding at `position`.
template <class T> DEVICE float rotated(const Params& p, Pair of, int d, int position) {
  if (!rotates(p, d)) return of.x;
  const bool low = is_low(p, d);
  const size_t at = size_t(position) * p.rotary_half + (p.rotary_interleaved ? d >> 1 : low ? d : d - p.rotary_half);
  const float c = widen(static_cast<const T*>(p.cos)[at]), s = widen(static_cast<const T*>(p.sin)[at]);
  return low ? of.x * c - of.y * s : of.x * c + of.y * s;
}
template <class T> DEVICE float rotated(const Params& p, const T* row, int d, int position) {
  return rotated<T>(p, pair_of(p, row, d), d, position);
}

// Element by element. Out of line: instructions that are in the way cost a step more than those that it runs.
template <class T> RARE void read_elements(const Params& p, const T* row, int d, int position, float* x) {
#pragma unroll 1
  for (int i = 0; i < 8; i++) x[i] = rotated<T>(p, row, d + i, position);
}
// Eight neighbouring elements of a head's row from `d` on, a multiple of eight, after rotary embedding at `position`.
// What does not depend on it is read first.
template <class T> DEVICE void read_vec8(const Params& p, const T* row, int d, int position, float (&x)[8]) {
  if (!p.vec8) {
    float slow[8];
    read_elements(p, row, d, position, slow);
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = slow[i];
    return;
  }
  load8(row + d, x);
  if (!rotates(p, d)) return;
  const bool low = is_low(p, d);
  float y[8], c[8], s[8];
  load8(row + (low ? d + p.rotary_half : d - p.rotary_half), y);
  const size_t at = size_t(position) * p.rotary_half + (low ? d : d - p.rotary_half);
  load8(static_cast<const T*>(p.cos) + at, c);
  load8(static_cast<const T*>(p.sin) + at, s);
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] = low ? x[i] * c[i] - y[i] * s[i] : x[i] * c[i] + y[i] * s[i];
}

template <class T> DEVICE const T* query_row(const Params& p, int b, int s, int head) {
  return static_cast<const T*>(p.query) + (size_t(b) * p.tokens + s) * p.query_stride + size_t(head) * p.head_size;
}
template <class T> DEVICE const T* kv_row(const Params& p, const void* rows, int b, int s, int head) {
  return static_cast<const T*>(rows) + (size_t(b) * p.tokens + s) * p.kv_stride + size_t(head) * p.head_size;
}

// The token of a row, of which each has as many as a group has query heads: without a division.
DEVICE int token_of(const Params& p, int row) { return p.group == 1 ? row : int(__umulhi(row, p.group_inverse)); }

// What the i-th of several takes of things in a row: so many, and one more if it is among the first `more`.
struct Share {
  int begin, end;
};
DEVICE Share share_of(int each, int more, int i) {
  const int begin = each * i + min(i, more);
  return {begin, begin + each + (i < more)};
}

// Some of a block's threads.
struct Team {
  int member, members;
};
DEVICE Team whole_block() { return {int(threadIdx.x), int(blockDim.x)}; }

// A kernel need not wait for the whole one before it: what a block has written before it announces it, others may read
// after they have waited for so many. Every thread of a block calls these. Blocks that are waited for are on the device
// already, as a kernel starts no earlier than every block of the one before has let it.
DEVICE void announce(u32* progress) {
  __syncthreads();
  if (threadIdx.x == 0) add_progress(progress);
}
DEVICE void wait_until(const u32* progress, int count) {
  if (threadIdx.x == 0) {
    while (read_progress(progress) < u32(count)) {
    }
  }
  __syncthreads();
}

constexpr u32 ALL_LANES = 0xffffffffu;

// An order of unsigned numbers, none of them 0, that is the order of the numbers. A NaN ranks as -inf; scores are none
// (or_first).
DEVICE u32 ordered(float x) {
  if (!(x == x)) x = NEG_INF;
  const u32 bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The number again.
DEVICE float number_of(u32 key) { return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key); }

// Faster than five shuffles.
DEVICE float warp_max(float x) { return number_of(__reduce_max_sync(ALL_LANES, ordered(x))); }
DEVICE float warp_min(float x) { return -warp_max(-x); }
DEVICE float warp_sum(float x) {
#pragma unroll
  for (int m = 16; m; m >>= 1) x += __shfl_xor_sync(ALL_LANES, x, m);
  return x;
}

// A score; where there is none (a NaN among the page's keys, or a number beyond f32's range) the largest: the page is
// read first, so that what is wrong with it shows, as with dense attention.
DEVICE float or_first(float score) { return score == score ? score : -NEG_INF; }
// Such a page leaves the others' shares of its heads alone.
DEVICE float if_number(float score) { return score == -NEG_INF ? NEG_INF : score; }

// A largest value and the sum of e^(x - largest) over the others, joined with another such pair. Without the largest,
// so that what little the others have is not lost beside its 1.
DEVICE float2 joined_rest(float2 a, float2 b) {
  const bool first = a.x >= b.x;
  const float top = first ? a.x : b.x, rest = first ? a.y : b.y, low = first ? b.x : a.x;
  const float e = low == top ? 1.f : __expf(low - top);
  return {top, fmaf(first ? b.y : a.y, e, rest + e)};
}

// The logarithm (base 2) of 1 + x for x >= 0, to 2^-12 of it however small x is.
DEVICE float log2_1p(float x) { return x < 0x1p-11f ? x * LOG2E : log2_fast(1.f + x); }
