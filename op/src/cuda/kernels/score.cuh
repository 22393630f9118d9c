// Steps 1 and 2 of a decoding step: append keys and values, recompute the summaries of the pages they touch, score pages.
//
// Grid (score_blocks + touched pages, Hkv, B). The first blocks score the pages that the step does not touch; each of the
// others owns one touched page: it writes the fed rows that lie in it, recomputes its summary from its rows and scores it.
// What waits for a head's scores (select.cuh) is on the device before they are there.
#pragma once
#include "mma.cuh"
#include "summary.cuh"

// Groups of pages that a warp scores at once: enough loads in flight to hide the memory's latency.
constexpr int SCORE_UNROLL = 4;

template <class T> DEVICE float rounded(float x) {
  T y;
  narrow(x, y);
  return widen(y);
}

// The two vectors of a head that turn its score into products with the page's two: bounds: min(q, 0) and max(q, 0), as
// sum_d max(q kmin, q kmax) = min(q, 0) . kmin + max(q, 0) . kmax; moments: q and q^2.
template <class T, int DP, bool MOMENT>
DEVICE void prepare_queries(const Params& p, const Sequence& s, int b, int head, Team team, float* prepared) {
#pragma unroll 1
  for (int i = team.member; i < p.group * (DP / 8); i += team.members) {
    const int h = i / (DP / 8), d = i % (DP / 8) * 8;
    float x[8] = {};
    if (d < p.head_size) read_vec8(p, query_row<T>(p, b, p.tokens - 1, head * p.group + h), d, s.len - 1, x);
#pragma unroll
    for (int k = 0; k < 8; k++) {
      const float q = rounded<T>(x[k]);
      prepared[2 * h * DP + d + k] = is_bounds<MOMENT>(p) ? fminf(q, 0.f) : q;
      prepared[2 * h * DP + DP + d + k] = is_bounds<MOMENT>(p) ? fmaxf(q, 0.f) : q * q;
    }
  }
}

// A head's score from its two products and, with signed moments, that of the query with the signed deviations.
template <bool MOMENT> DEVICE float head_score(const Params& p, float first, float second, float line, float log_count) {
  if (!is_bounds<MOMENT>(p)) {
    if (p.selector == SIGNED_MOMENTS) second = p.correlation * line * line + (1.f - p.correlation) * second;
    return or_first(p.scale * (first + p.lambda * sqrt_fast(second)) + log_count);
  }
  return or_first(p.group_score == SOFTMAX ? p.scale * (first + second) : first + second);
}

// The inputs are there; the next kernels read them, and so may start no earlier.
DEVICE void start_step() {
  wait_for_previous();
  let_next_start();
}

DEVICE bool step_is_scored(const Params& p, const Sequence& s, int b) { return chooses(p, candidates(p, s, b)); }

DEVICE float page_log_count(const Params& p, const Sequence& s, int page) {
  return logf(float(min(s.len - (page << p.page_shift), 1 << p.page_shift)));
}

// Where the score of a head is stored.
DEVICE float& score_at(const Params& p, int pair, int page, int h) {
  return p.scores[(size_t(pair) * scored_page_count(p.max_pages) + page) * scores_a_page(p) + h];
}

// Adding 0 turns -0 into 0, so that the two tie.
DEVICE void store_score(const Params& p, int pair, int h, int page, float score) {
  if (p.group_score == SOFTMAX)
    score_at(p, pair, page, h) = score;
  else if (h == p.group - 1)
    score_at(p, pair, page, 0) = score + 0.f;
}

// Sums four values over groups of `LANES` lanes. Lane bits LANES/2 and LANES/4 say which of the four a lane ends up with.
template <int LANES> DEVICE float sum_four(float (&v)[4], int lane) {
  const bool upper = lane & (LANES / 2);
  float a = upper ? v[2] : v[0], b = upper ? v[3] : v[1];
  a += __shfl_xor_sync(ALL_LANES, upper ? v[0] : v[2], LANES / 2);
  b += __shfl_xor_sync(ALL_LANES, upper ? v[1] : v[3], LANES / 2);
  const bool odd = lane & (LANES / 4);
  float x = odd ? b : a;
  x += __shfl_xor_sync(ALL_LANES, odd ? a : b, LANES / 4);
#pragma unroll
  for (int m = LANES / 8; m; m >>= 1) x += __shfl_xor_sync(ALL_LANES, x, m);
  return x;
}

// float32: sums in f32, eight elements a lane.
template <int DP> DEVICE void score_pages_f32(const Params& p, int b, int head, float* prepared) {
  start_step();
  const Sequence s = sequence(p, b);
  if (!s.valid || !step_is_scored(p, s, b)) return;
  using T = F32;
  constexpr int LANES = DP / 8, PAGES = 32 / LANES, GROUP = PAGES * SCORE_UNROLL;
  const int pair = b * p.kv_heads + head, d = p.head_size;
  const int lane = threadIdx.x % 32, in_page = lane % LANES, at = in_page * 8;
  const int untouched = s.first >> p.page_shift;
  const int warps = p.score_blocks * SCORE_WARPS, warp = blockIdx.x * SCORE_WARPS + threadIdx.x / 32;
  const T* summary = static_cast<const T*>(p.page_state) + size_t(pair) * p.cache_pages * 2 * d;
  bool ready = false;
  for (int group = first_candidate(p, s) / GROUP + warp; !ready || group * GROUP < untouched; group += warps) {
    float first[SCORE_UNROLL][8], second[SCORE_UNROLL][8];
#pragma unroll
    for (int u = 0; u < SCORE_UNROLL; u++) {
      const int page = group * GROUP + u * PAGES + lane / LANES;
      if (page < untouched && at < d) {
        load8(summary + size_t(page) * 2 * d + at, first[u]);
        load8(summary + size_t(page) * 2 * d + d + at, second[u]);
      } else {
#pragma unroll
        for (int i = 0; i < 8; i++) first[u][i] = second[u][i] = 0.f;
      }
    }
    if (!ready) {
      // The queries do not wait for the summaries: the first loads are under way.
      prepare_queries<T, DP, true>(p, s, b, head, whole_block(), prepared);
      __syncthreads();
      ready = true;
      if (group * GROUP >= untouched) break;
    }
    // Which of the four pages this lane ends up with.
    const int mine = ((in_page & (LANES / 2)) ? 2 : 0) + ((in_page & (LANES / 4)) ? 1 : 0);
    const int page = group * GROUP + mine * PAGES + lane / LANES;
    const bool writes = in_page % (LANES / 4) == 0 && page < untouched;
    const float log_count = p.selector != BOUNDS ? logf(float(1 << p.page_shift)) : 0.f;
    float best = NEG_INF;
    for (int h = 0; h < p.group; h++) {
      const float4* q = reinterpret_cast<const float4*>(prepared + 2 * h * DP + at);
      const float4 a0 = q[0], a1 = q[1], b0 = q[DP / 4], b1 = q[DP / 4 + 1];
      const float qa[8] = {a0.x, a0.y, a0.z, a0.w, a1.x, a1.y, a1.z, a1.w};
      const float qb[8] = {b0.x, b0.y, b0.z, b0.w, b1.x, b1.y, b1.z, b1.w};
      float x[4], y[4], z[4];
#pragma unroll
      for (int u = 0; u < SCORE_UNROLL; u++) {
        x[u] = y[u] = z[u] = 0.f;
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const float v = second[u][i];
          x[u] = fmaf(qa[i], first[u][i], x[u]);
          y[u] = fmaf(qb[i], p.selector == BOUNDS ? v : v * v, y[u]);
          if (p.selector == SIGNED_MOMENTS) z[u] = fmaf(qa[i], v, z[u]);
        }
      }
      float score;
      if (p.selector != BOUNDS) {
        const float along = sum_four<LANES>(x, in_page), spread = sum_four<LANES>(y, in_page);
        const float line = p.selector == SIGNED_MOMENTS ? sum_four<LANES>(z, in_page) : 0.f;
        score = head_score<true>(p, along, spread, line, log_count);
      } else {
#pragma unroll
        for (int u = 0; u < SCORE_UNROLL; u++) x[u] += y[u];
        score = head_score<true>(p, sum_four<LANES>(x, in_page), 0.f, 0.f, 0.f);
      }
      best = p.group_score == SOFTMAX ? score : fmaxf(best, score);
      if (writes) store_score(p, pair, h, page, best);
    }
  }
  announce(&p.progress[pair]);
}

// The squares of two neighbouring elements, each as a bfloat16 and what that leaves out.
template <class T> struct Squares {
  u32 most, rest;
  DEVICE explicit Squares(u32 two) {
    const float low = widen(T{u16(two)}), high = widen(T{u16(two >> 16)}), a = low * low, b = high * high;
    most = Mma<BF16>::pack(a, b);
    rest = Mma<BF16>::pack(a - widen(BF16{u16(most)}), b - widen(BF16{u16(most >> 16)}));
  }
};

// What the scoring blocks leave of a head's scores over the candidates among their pages: {largest, sum of e^(score - largest),
// least finite}. Without a softmax over pages the group's score stands for the head, and the sum is not used.
DEVICE float4 no_scores() { return {NEG_INF, 0.f, -NEG_INF, 0.f}; }
DEVICE float4 joined_stats(float4 a, float4 b) {
  const float2 sums = joined_sums({a.x, a.y}, {b.x, b.y});
  return {sums.x, sums.y, fminf(a.z, b.z), 0.f};
}

// Of so many neighbouring lanes.
template <int LANES> DEVICE float4 joined_over(float4 mine) {
  float top = mine.x, least = mine.z;
#pragma unroll
  for (int i = 1; i < LANES; i <<= 1)
    top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, i)), least = fminf(least, __shfl_xor_sync(ALL_LANES, least, i));
  float sum = top == NEG_INF ? 0.f : mine.y * __expf(mine.x - top);
#pragma unroll
  for (int i = 1; i < LANES; i <<= 1) sum += __shfl_xor_sync(ALL_LANES, sum, i);
  return {top, sum, least, 0.f};
}

DEVICE float4 of_score(float score) { return {score, 1.f, score == NEG_INF ? -NEG_INF : score, 0.f}; }

// The larger of the two has weight 1.
DEVICE void add_score(float4& all, float score) {
  const float n = fmaxf(all.x, score), e = n == NEG_INF ? 0.f : __expf(fminf(all.x, score) - n);
  all.y = !(score == score) ? score : score > all.x ? fmaf(all.y, e, 1.f) : all.y + e;
  all.x = n, all.z = score == NEG_INF ? all.z : fminf(all.z, score);
}

// Heads whose scores select.cuh needs one by one.
DEVICE int scored_heads(const Params& p) { return p.group_score == SOFTMAX ? p.group : 1; }

// Joins what the warps of a scoring block know of their scores, which are all written before the first warp announces them.
DEVICE void leave_range(const Params& p, int pair, float4* of_warps /* [SCORE_WARPS] */, float4 mine) {
  const float top = warp_max(mine.x), least = warp_min(mine.z);
  const int lane = threadIdx.x % 32;
  if (lane == 0) of_warps[threadIdx.x / 32] = {top, 0.f, least, 0.f};
  __syncthreads();
  if (threadIdx.x >= 32) return;
  mine = of_warps[lane % SCORE_WARPS];
  const float of_all = warp_max(mine.x), least_of_all = warp_min(mine.z);
  if (lane > 0) return;
  p.score_stats[size_t(pair) * p.score_parts + blockIdx.x] = {of_all, 0.f, least_of_all, 0.f};
  add_progress(&p.progress[pair]);
}

// The same for a softmax over pages: of every head.
RARE void leave_sums(const Params& p, int pair, float4* of_warps /* [16, SCORE_WARPS] */, float4 low, float4 high /* of this lane's two heads */) {
  const int lane = threadIdx.x % 32, quad = lane % 4, fragment_row = lane / 4, heads = p.group > 8 ? 16 : 8;
#pragma unroll 1
  for (int head = fragment_row; head < heads; head += 8) {
    const float4 all = joined_over<4>(head < 8 ? low : high);
    if (quad == 0) of_warps[head * SCORE_WARPS + threadIdx.x / 32] = all;
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;
  // Two or four lanes a head.
  const int lanes = 32 / heads, head = lane / lanes;
  const float4* const of_head = of_warps + head * SCORE_WARPS;
  float4 all = of_head[lane % lanes];
#pragma unroll 1
  for (int w = lane % lanes + lanes; w < SCORE_WARPS; w += lanes) all = joined_stats(all, of_head[w]);
  all = lanes == 4 ? joined_over<4>(all) : joined_over<2>(all);
  if (lane % lanes == 0 && head < p.group) p.score_stats[(size_t(pair) * p.score_parts + blockIdx.x) * p.group + head] = all;
  __syncwarp();
  if (lane == 0) add_progress(&p.progress[pair]);
}

// float16 and bfloat16: on tensor cores, heads in the rows, 8 pages a warp in the columns. Summaries go from memory to registers:
// a lane takes 8 neighbouring elements of its page, queries are permuted alike. Squares of standard deviations and of queries may
// lie far outside float16's range: each is the sum of two bfloat16, which keeps 16 bits of it, and a product of two squares
// three products.
template <class T, int DP, bool MOMENT> DEVICE void score_pages_mma(const Params& p, int b, int head, u8* raw) {
  constexpr int PAGES = SCORE_PAGES, HEADS = MAX_GROUP, PITCH = query_pitch(DP), CHUNKS = DP / 32, WARPS = SCORE_WARPS;
  struct Shared {
    u16 first[HEADS][PITCH], second[HEADS][PITCH], rest[MOMENT ? HEADS : 1][PITCH];
  };
  static_assert(sizeof(Shared) <= queries_bytes(DP), "the host asks for as much");
  Shared& sh = *reinterpret_cast<Shared*>(raw);
  const int pair = b * p.kv_heads + head, d = p.head_size;
  const int lane = threadIdx.x % 32, quad = lane % 4, fragment_row = lane / 4;
  // Neighbouring pages, equally many for every warp.
  const int warp = blockIdx.x * WARPS + threadIdx.x / 32;
  const Share share = share_of(p.warp_pages, p.more_pages, warp);
  const int begin = share.begin, end = share.end;
  const T* summary = static_cast<const T*>(p.page_state) + size_t(pair) * p.cache_pages * 2 * d;
  uint4 first[CHUNKS], second[CHUNKS];
  // Beyond the end the last page is read again, and not stored; past d the query is 0.
  auto load = [&](int page0, int c) {
    const T* page = summary + size_t(max(min(page0 + fragment_row, end - 1), 0)) * 2 * d + min(32 * c + 8 * quad, d - 8);
    first[c] = __ldcs(reinterpret_cast<const uint4*>(page));
    second[c] = __ldcs(reinterpret_cast<const uint4*>(page + d));
  };
  // Neither the lengths nor the queries hold the first loads up.
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) load(begin, c);

  // Summaries of untouched pages were complete before this kernel could start (merge.cuh); queries and lengths were perhaps not.
  start_step();
  const bool with_line = p.selector == SIGNED_MOMENTS, softmax = p.group_score == SOFTMAX, wide = p.group > 8;
  const Sequence s = sequence(p, b);
#pragma unroll 1
  for (int i = threadIdx.x; i < (wide ? HEADS : HEADS / 2) * (DP / 8); i += SCORE_THREADS) {
    const int h = i / (DP / 8), c = i % (DP / 8) * 8;
    float x[8] = {}, y[8];
    // Where the length is not valid any position will do: nothing is scored.
    if (h < p.group && c < d)
      read_vec8(p, query_row<T>(p, b, p.tokens - 1, head * p.group + h), c, min(max(s.len - 1, 0), max(p.rotary_rows - 1, 0)), x);
#pragma unroll
    for (int k = 0; k < 8; k++) {
      const float q = rounded<T>(x[k]);
      x[k] = MOMENT ? q : fminf(q, 0.f), y[k] = MOMENT ? q * q : fmaxf(q, 0.f);
    }
    store8(reinterpret_cast<T*>(&sh.first[h][c]), x);
    if constexpr (MOMENT) {
      BF16* const squares = reinterpret_cast<BF16*>(&sh.second[h][c]);
      store8(squares, y);
#pragma unroll
      for (int k = 0; k < 8; k++) y[k] -= rounded<BF16>(y[k]);
      store8(reinterpret_cast<BF16*>(&sh.rest[h][c]), y);
    } else {
      store8(reinterpret_cast<T*>(&sh.second[h][c]), y);
    }
  }
  if (!s.valid || !step_is_scored(p, s, b)) return;
  const int limit = min(s.first >> p.page_shift /* the first touched page */, end), from = first_candidate(p, s);
  __syncthreads();
  const float log_count = logf(float(1 << p.page_shift));
  // Of this lane's two heads.
  float4 stats[2] = {no_scores(), no_scores()};
  auto row = [&](const u16 (&rows)[HEADS][PITCH], int half, int c) {
    if (half && !wide) return uint4{0, 0, 0, 0};
    return *reinterpret_cast<const uint4*>(&rows[fragment_row + 8 * half][32 * c + 8 * quad]);
  };
#pragma unroll 1
  for (int page0 = begin; page0 < limit; page0 += PAGES) {
    float x[4] = {}, y[4] = {}, z[4] = {};
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      const uint4 q = row(sh.first, 0, c), q8 = row(sh.first, 1, c), r = row(sh.second, 0, c), r8 = row(sh.second, 1, c);
      const uint4 u = first[c], v = second[c];
      Mma<T>::add(x, q.x, q8.x, q.y, q8.y, u.x, u.y);
      Mma<T>::add(x, q.z, q8.z, q.w, q8.w, u.z, u.w);
      if constexpr (MOMENT) {
        if (with_line) {
          Mma<T>::add(z, q.x, q8.x, q.y, q8.y, v.x, v.y);
          Mma<T>::add(z, q.z, q8.z, q.w, q8.w, v.z, v.w);
        }
        const uint4 t = row(sh.rest, 0, c);
        const Squares<T> a(v.x), b(v.y), e(v.z), f(v.w);
        Mma<BF16>::add(y, r.x, r8.x, r.y, r8.y, a.rest, b.rest);
        Mma<BF16>::add(y, r.z, r8.z, r.w, r8.w, e.rest, f.rest);
        if (wide) {
          const uint4 t8 = row(sh.rest, 1, c);
          Mma<BF16>::add(y, r.x, r8.x, r.y, r8.y, a.most, b.most);
          Mma<BF16>::add(y, r.z, r8.z, r.w, r8.w, e.most, f.most);
          Mma<BF16>::add(y, t.x, t8.x, t.y, t8.y, a.most, b.most);
          Mma<BF16>::add(y, t.z, t8.z, t.w, t8.w, e.most, f.most);
        } else {
          // The rows of the heads that are not there take what the queries' squares leave out.
          Mma<BF16>::add(y, r.x, t.x, r.y, t.y, a.most, b.most);
          Mma<BF16>::add(y, r.z, t.z, r.w, t.w, e.most, f.most);
        }
      } else {
        Mma<T>::add(y, r.x, r8.x, r.y, r8.y, v.x, v.y);
        Mma<T>::add(y, r.z, r8.z, r.w, r8.w, v.z, v.w);
      }
      // The next pages' part takes its place at once.
      load(page0 + PAGES, c);
    }
    if (MOMENT && !wide) y[0] += y[2], y[1] += y[3];
    float best[2] = {NEG_INF, NEG_INF};
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int page = page0 + 2 * quad + e % 2, h = fragment_row + e / 2 * 8;
      if (h >= p.group) continue;
      const float score = head_score<MOMENT>(p, x[e], y[e], z[e], log_count);
      if (!softmax) {
        best[e % 2] = fmaxf(best[e % 2], score);
      } else if (page < limit) {
        score_at(p, pair, page, h) = score;
        if (page >= from) add_score(stats[e / 2], score);
      }
    }
    if (!softmax) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float m = best[e];
#pragma unroll
        for (int i = 4; i < 32; i <<= 1) m = fmaxf(m, __shfl_xor_sync(ALL_LANES, m, i));
        const int page = page0 + 2 * quad + e;
        if (page >= limit) continue;
        if (fragment_row == 0) score_at(p, pair, page, 0) = m + 0.f;
        if (page >= from) stats[0].x = fmaxf(stats[0].x, m), stats[0].z = m == NEG_INF ? stats[0].z : fminf(stats[0].z, m);
      }
    }
  }
  __syncthreads();  // the queries' memory becomes the statistics'
  if (softmax)
    leave_sums(p, pair, reinterpret_cast<float4*>(raw), stats[0], stats[1]);
  else
    leave_range(p, pair, reinterpret_cast<float4*>(raw), stats[0]);
}

// Writes the fed rows from..to (positions) of one KV head into the caches, and the keys to `copy` too, if there is one.
template <class T>
DEVICE void append(const Params& p, const Sequence& s, int b, int head, int from, int to, Team team, T* copy = nullptr /* of row `from` */) {
  const int d = p.head_size, vec8s = d / 8, pair = b * p.kv_heads + head;
  T* keys = static_cast<T*>(p.key_cache) + size_t(pair) * p.capacity * d;
  T* values = static_cast<T*>(p.value_cache) + size_t(pair) * p.capacity * d;
#pragma unroll 1
  for (int i = team.member; i < (to - from) * vec8s; i += team.members) {
    const int position = from + i / vec8s, c = i % vec8s * 8, row = s.skipped + position - s.first;
    const T* value = kv_row<T>(p, p.value, b, row, head) + c;
    float key[8], of_value[8];
    if (p.vec8) {
      load8(value, of_value);
    } else {
#pragma unroll
      for (int k = 0; k < 8; k++) of_value[k] = widen(value[k]);
    }
    read_vec8(p, kv_row<T>(p, p.key, b, row, head), c, position, key);
    store8(keys + size_t(position) * d + c, key);
    store8(values + size_t(position) * d + c, of_value);
    if (copy) store8(copy + 8 * i, key);
  }
}

// Stores a page's scores and its statistics, where it is a candidate, and announces it: by one warp, after a barrier.
DEVICE void leave_page(const Params& p, int pair, int page, int touched, bool counts, const float* of_heads /* null: no page */) {
  const int lane = threadIdx.x % 32, heads = scored_heads(p);
  float score = of_heads && lane < p.group ? of_heads[lane] : NEG_INF;
  // Adding 0 turns -0 into 0, so that the two tie.
  if (p.group_score != SOFTMAX) score = warp_max(score) + 0.f;
  if (lane < heads) {
    if (of_heads) score_at(p, pair, page, lane) = score;
    if (p.score_parts)
      p.score_stats[(size_t(pair) * p.score_parts + p.score_blocks + touched) * heads + lane] = counts ? of_score(score) : no_scores();
  }
  __syncwarp();
  if (lane == 0) add_progress(&p.progress[pair]);
}

// Often the last of a head's blocks to end, and what short contexts wait for: the fed rows, the page's rows from before and the
// queries are read at the same time, by other warps.
template <class T, int DP, bool MOMENT>
DEVICE void touch_page(const Params& p, const Sequence& s, int b, int head, int touched, u8* raw) {
  constexpr int WARPS = SCORE_WARPS;
  const int pair = b * p.kv_heads + head, d = p.head_size, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool chosen_from = step_is_scored(p, s, b);
  const int page = (s.first >> p.page_shift) + touched, last = (s.len - 1) >> p.page_shift;
  // The newest page is taken whatever its score, which only a softmax over pages needs.
  const bool scored = chosen_from && (page != last || p.group_score == SOFTMAX);
  __shared__ float of_heads[MAX_GROUP];
  const bool there = page <= last;
  if (there) {
    const int start = page << p.page_shift, end = min(start + (1 << p.page_shift), s.len), fresh = max(start, s.first);
    float* const prepared = reinterpret_cast<float*>(raw);
    float* const stored = prepared + 2 * p.group * DP;
    const T* keys = page_keys<T>(p, pair, page);
    T* const copy = p.copies_page ? reinterpret_cast<T*>(prepared + touched_floats(p.group, DP, d)) : nullptr;
    if (warp < WARPS / 4) {
      append<T>(p, s, b, head, fresh, end, {int(threadIdx.x), 32 * WARPS / 4}, copy ? copy + (fresh - start) * d : nullptr);
    } else if (warp < WARPS / 2) {
      if (scored) prepare_queries<T, DP, MOMENT>(p, s, b, head, {int(threadIdx.x) - 32 * WARPS / 4, 32 * WARPS / 4}, prepared);
    } else if (copy) {
      // D is a multiple of 8.
      constexpr int ELEMENTS = 16 / sizeof(T);
#pragma unroll 2
      for (int i = threadIdx.x - 32 * WARPS / 2; i < (fresh - start) * d / ELEMENTS; i += 32 * WARPS / 2)
        reinterpret_cast<uint4*>(copy)[i] = reinterpret_cast<const uint4*>(keys)[i];
    }
    __syncthreads();
    if (!scored && chosen_from && warp == 0) leave_page(p, pair, page, touched, false, nullptr);
    summarize<T, MOMENT>(p, pair, page, end - start, copy ? copy : keys, stored);
    __syncthreads();
    if (!scored) return;
#pragma unroll 1
    for (int h = warp; h < p.group; h += WARPS) {
      float x = 0.f, y = 0.f, z = 0.f;
#pragma unroll 4
      for (int c = lane; c < d; c += 32) {
        const float first = stored[c], second = stored[d + c], q = prepared[2 * h * DP + c];
        z = fmaf(q, second, z);
        x = fmaf(q, first, x);
        y = fmaf(prepared[2 * h * DP + DP + c], is_bounds<MOMENT>(p) ? second : second * second, y);
      }
      x = warp_sum(x), y = warp_sum(y);
      if (!is_bounds<MOMENT>(p)) z = warp_sum(z);
      if (lane == 0) of_heads[h] = head_score<MOMENT>(p, x, y, z, is_bounds<MOMENT>(p) ? 0.f : page_log_count(p, s, page));
    }
    __syncthreads();
  }
  if (chosen_from && warp == 0) leave_page(p, pair, page, touched, there && page >= first_candidate(p, s), there ? of_heads : nullptr);
}

template <class T, int DP, bool MOMENT> struct ScorePages {
  static DEVICE void run(const Params& p, int b, int head, u8* raw) { score_pages_mma<T, DP, MOMENT>(p, b, head, raw); }
};
template <int DP, bool MOMENT> struct ScorePages<F32, DP, MOMENT> {
  static DEVICE void run(const Params& p, int b, int head, u8* raw) {
    score_pages_f32<DP>(p, b, head, reinterpret_cast<float*>(raw));
  }
};

// MOMENT: a selector that needs squares (float16 and bfloat16; in float32 one kernel serves all).
template <class T, int DP, bool MOMENT> DEVICE void score_kernel(const Params& p) {
  extern __shared__ __align__(1024) u8 raw[];
  const int head = blockIdx.y, b = blockIdx.z;
  if (blockIdx.x < p.score_blocks) return ScorePages<T, DP, MOMENT>::run(p, b, head, raw);
  start_step();
  const Sequence s = sequence(p, b);
  if (s.valid) touch_page<T, DP, MOMENT>(p, s, b, head, int(blockIdx.x) - p.score_blocks, raw);
}
