// Selectors whose state is a page summary: two vectors of D a page, and a score that comes from products with them.
//
// A selector SELF has: SQUARES, whether the second product is with the squares of the second vector; LINE, whether it
// needs the query's product with the second vector too; LOG_MASS, whether a score counts the page's tokens; prepare(),
// the query's two elements; score(), from the products; summarize() by a block and summarize_by_warp().
#pragma once
#include "mma.cuh"
#include "page_rows.cuh"
#include "score_output.cuh"

// Groups of pages that a warp scores at once: enough loads in flight to hide the memory's latency.
constexpr int SCORE_UNROLL = 4;

// A page's summary, [2, D].
template <class T> DEVICE T* page_summary(const Params& p, int pair, int page) {
  return static_cast<T*>(p.page_state) + (size_t(pair) * p.cache_pages + page) * 2 * p.head_size;
}

// Stores element c of a page's two vectors, and what the cache's type makes of it in `stored`, [2, D].
template <class T> DEVICE void store_vectors(T* summary, float* stored, int d, int c, float a, float b) {
  T ra, rb;
  narrow(a, ra), narrow(b, rb);
  summary[c] = ra, summary[d + c] = rb;
  stored[c] = widen(ra), stored[d + c] = widen(rb);
}

DEVICE float page_log_count(const Params& p, const Sequence& s, int page) {
  return logf(float(min(s.len - (page << p.page_shift), 1 << p.page_shift)));
}

// The two vectors of a head that turn its score into products with the page's two.
template <class S, class T, int DP>
DEVICE void prepare_queries(const Params& p, const Sequence& s, int b, int head, Team team, float* prepared) {
#pragma unroll 1
  for (int i = team.member; i < p.group * (DP / 8); i += team.members) {
    const int h = i / (DP / 8), d = i % (DP / 8) * 8;
    float x[8] = {};
    if (d < p.head_size) read_vec8(p, query_row<T>(p, b, p.tokens - 1, head * p.group + h), d, s.len - 1, x);
#pragma unroll
    for (int k = 0; k < 8; k++)
      S::prepare(rounded<T>(x[k]), prepared[2 * h * DP + d + k], prepared[2 * h * DP + DP + d + k]);
  }
}

// Sums four values over groups of `LANES` lanes. Lane bits LANES/2 and LANES/4 say which of the four a lane ends up
// with.
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
template <class S, int DP> DEVICE void score_pages_f32(const Params& p, int b, int head, float* prepared) {
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
  const PageStep step = first_page_step(p, s, pair, warp);
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
      prepare_queries<S, T, DP>(p, s, b, head, whole_block(), prepared);
      __syncthreads();
      ready = true;
      if (group * GROUP >= untouched) break;
    }
    // Which of the four pages this lane ends up with.
    const int mine = ((in_page & (LANES / 2)) ? 2 : 0) + ((in_page & (LANES / 4)) ? 1 : 0);
    const int page = group * GROUP + mine * PAGES + lane / LANES;
    const bool writes = in_page % (LANES / 4) == 0 && page < untouched;
    const float log_count = S::LOG_MASS ? logf(float(1 << p.page_shift)) : 0.f;
    float best = NEG_INF;
#pragma unroll 1
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
          y[u] = fmaf(qb[i], S::SQUARES ? v * v : v, y[u]);
          if (S::LINE) z[u] = fmaf(qa[i], v, z[u]);
        }
      }
      float score;
      if constexpr (S::SQUARES) {
        const float along = sum_four<LANES>(x, in_page), spread = sum_four<LANES>(y, in_page);
        score = S::score(p, along, spread, S::LINE ? sum_four<LANES>(z, in_page) : 0.f, log_count);
      } else {
#pragma unroll
        for (int u = 0; u < SCORE_UNROLL; u++) x[u] += y[u];
        score = S::score(p, sum_four<LANES>(x, in_page), 0.f, 0.f, log_count);
      }
      best = p.group_score == SOFTMAX ? score : fmaxf(best, score);
      if (writes) store_score(p, pair, h, page, best);
    }
  }
  forget_future(p, s, pair, warps, step);
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

// The queries of a KV head as the tensor cores take them, heads in the rows: what the first and the second vector of a
// page are multiplied with, and what bfloat16 leaves out of the squares.
template <class S, int DP> struct MmaQueries {
  static constexpr int HEADS = MAX_GROUP, PITCH = query_pitch(DP);
  using Rows = u16[HEADS][PITCH];
  u16 first[HEADS][PITCH], second[HEADS][PITCH], rest[S::SQUARES ? HEADS : 1][PITCH];
};

// Written by the whole block.
template <class S, class T, int DP>
DEVICE void stage_queries(const Params& p, const Sequence& s, int b, int head, bool wide, MmaQueries<S, DP>& queries) {
  constexpr int HEADS = MmaQueries<S, DP>::HEADS;
  const int d = p.head_size;
#pragma unroll 1
  for (int i = threadIdx.x; i < (wide ? HEADS : HEADS / 2) * (DP / 8); i += SCORE_THREADS) {
    const int h = i / (DP / 8), c = i % (DP / 8) * 8;
    float x[8] = {}, y[8];
    // Where the length is not valid any position will do: nothing is scored.
    if (h < p.group && c < d)
      read_vec8(p, query_row<T>(p, b, p.tokens - 1, head * p.group + h), c,
                min(max(s.len - 1, 0), max(p.rotary_rows - 1, 0)), x);
#pragma unroll
    for (int k = 0; k < 8; k++) {
      S::prepare(rounded<T>(x[k]), x[k], y[k]);
    }
    store8(reinterpret_cast<T*>(&queries.first[h][c]), x);
    if constexpr (S::SQUARES) {
      BF16* const squares = reinterpret_cast<BF16*>(&queries.second[h][c]);
      store8(squares, y);
#pragma unroll
      for (int k = 0; k < 8; k++) y[k] -= rounded<BF16>(y[k]);
      store8(reinterpret_cast<BF16*>(&queries.rest[h][c]), y);
    } else {
      store8(reinterpret_cast<T*>(&queries.second[h][c]), y);
    }
  }
}

// Adds the products of 32 elements of 8 pages with 16 heads: x of the first vectors, y of the second ones (squared, if
// the selector wants squares), z of the second ones with the first queries. `wide`: more than 8 heads.
template <class S, class T, int DP>
DEVICE void add_page_products(const MmaQueries<S, DP>& queries, int c, bool wide, uint4 u, uint4 v, float (&x)[4],
                              float (&y)[4], float (&z)[4]) {
  const int quad = threadIdx.x % 4, fragment_row = threadIdx.x % 32 / 4;
  auto row = [&](const typename MmaQueries<S, DP>::Rows& rows, int half) {
    if (half && !wide) return uint4{0, 0, 0, 0};
    return *reinterpret_cast<const uint4*>(&rows[fragment_row + 8 * half][32 * c + 8 * quad]);
  };
  const uint4 q = row(queries.first, 0), q8 = row(queries.first, 1), r = row(queries.second, 0),
              r8 = row(queries.second, 1);
  Mma<T>::add(x, q.x, q8.x, q.y, q8.y, u.x, u.y);
  Mma<T>::add(x, q.z, q8.z, q.w, q8.w, u.z, u.w);
  if constexpr (S::SQUARES) {
    if constexpr (S::LINE) {
      Mma<T>::add(z, q.x, q8.x, q.y, q8.y, v.x, v.y);
      Mma<T>::add(z, q.z, q8.z, q.w, q8.w, v.z, v.w);
    }
    const uint4 t = row(queries.rest, 0);
    const Squares<T> a(v.x), b(v.y), e(v.z), f(v.w);
    Mma<BF16>::add(y, r.x, r8.x, r.y, r8.y, a.rest, b.rest);
    Mma<BF16>::add(y, r.z, r8.z, r.w, r8.w, e.rest, f.rest);
    if (wide) {
      const uint4 t8 = row(queries.rest, 1);
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
}

// Stores the scores of 8 pages below `limit` and counts those of candidates, which begin at `from`. A lane has two
// pages of two heads.
template <class S>
DEVICE void store_page_scores(const Params& p, int pair, int page0, int limit, int from, float log_count,
                              const float (&x)[4], const float (&y)[4], const float (&z)[4], float4 (&stats)[2]) {
  const int quad = threadIdx.x % 4, fragment_row = threadIdx.x % 32 / 4;
  const bool softmax = p.group_score == SOFTMAX;
  float best[2] = {NEG_INF, NEG_INF};
#pragma unroll
  for (int e = 0; e < 4; e++) {
    const int page = page0 + 2 * quad + e % 2, h = fragment_row + e / 2 * 8;
    if (h >= p.group) continue;
    const float score = S::score(p, x[e], y[e], z[e], log_count);
    if (!softmax) {
      best[e % 2] = fmaxf(best[e % 2], score);
    } else if (page < limit) {
      score_at(p, pair, page, h) = score;
      if (page >= from) add_score(stats[e / 2], score);
    }
  }
  if (softmax) return;
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

// float16 and bfloat16: on tensor cores, heads in the rows, 8 pages a warp in the columns. Summaries go from memory to
// registers: a lane takes 8 neighbouring elements of its page, queries are permuted alike. Squares of standard
// deviations and of queries may lie far outside float16's range: each is the sum of two bfloat16, which keeps 16 bits
// of it, and a product of two squares three products.
template <class S, class T, int DP> DEVICE void score_pages_mma(const Params& p, int b, int head, u8* raw) {
  constexpr int PAGES = SCORE_PAGES, CHUNKS = DP / 32, WARPS = SCORE_WARPS;
  using Queries = MmaQueries<S, DP>;
  static_assert(sizeof(Queries) <= queries_bytes(DP), "the host asks for as much");
  Queries& queries = *reinterpret_cast<Queries*>(raw);
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
    const T* page =
        summary + size_t(max(min(page0 + fragment_row, end - 1), 0)) * 2 * d + min(32 * c + 8 * quad, d - 8);
    first[c] = __ldcs(reinterpret_cast<const uint4*>(page));
    second[c] = __ldcs(reinterpret_cast<const uint4*>(page + d));
  };
  // Neither the lengths nor the queries hold the first loads up.
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) load(begin, c);

  // Summaries of untouched pages were complete before this kernel could start (merge.cuh); queries and lengths were
  // perhaps not.
  start_step();
  const bool wide = p.group > 8;
  const Sequence s = sequence(p, b);
  stage_queries<S, T, DP>(p, s, b, head, wide, queries);
  if (!s.valid || !step_is_scored(p, s, b)) return;
  const int limit = min(s.first >> p.page_shift /* the first touched page */, end), from = first_candidate(p, s);
  const PageStep step = first_page_step(p, s, pair, warp);
  __syncthreads();
  const float log_count = logf(float(1 << p.page_shift));
  // Of this lane's two heads.
  float4 stats[2] = {no_scores(), no_scores()};
#pragma unroll 1
  for (int page0 = begin; page0 < limit; page0 += PAGES) {
    float x[4] = {}, y[4] = {}, z[4] = {};
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      add_page_products<S, T, DP>(queries, c, wide, first[c], second[c], x, y, z);
      // The next pages' part takes its place at once.
      load(page0 + PAGES, c);
    }
    if (S::SQUARES && !wide) y[0] += y[2], y[1] += y[3];
    store_page_scores<S>(p, pair, page0, limit, from, log_count, x, y, z, stats);
  }
  forget_future(p, s, pair, p.score_blocks * WARPS, step);
  __syncthreads();  // the queries' memory becomes the statistics'
  if (p.group_score == SOFTMAX)
    leave_sums(p, pair, reinterpret_cast<float4*>(raw), stats[0], stats[1]);
  else
    leave_range(p, pair, reinterpret_cast<float4*>(raw), stats[0]);
}

// Often the last of a head's blocks to end, and what short contexts wait for: the fed rows, the page's rows from before
// and the queries are read at the same time, by other warps.
template <class S, class T, int DP>
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
      append<T>(p, s, b, head, fresh, end, {int(threadIdx.x), 32 * WARPS / 4},
                copy ? copy + (fresh - start) * d : nullptr);
    } else if (warp < WARPS / 2) {
      if (scored)
        prepare_queries<S, T, DP>(p, s, b, head, {int(threadIdx.x) - 32 * WARPS / 4, 32 * WARPS / 4}, prepared);
    } else if (copy) {
      // D is a multiple of 8.
      constexpr int ELEMENTS = 16 / sizeof(T);
#pragma unroll 2
      for (int i = threadIdx.x - 32 * WARPS / 2; i < (fresh - start) * d / ELEMENTS; i += 32 * WARPS / 2)
        reinterpret_cast<uint4*>(copy)[i] = reinterpret_cast<const uint4*>(keys)[i];
    }
    __syncthreads();
    if (!scored && chosen_from && warp == 0) leave_page(p, pair, page, touched, false, nullptr);
    S::summarize(copy ? copy : keys, d, end - start, page_summary<T>(p, pair, page), stored);
    __syncthreads();
    if (!scored) return;
#pragma unroll 1
    for (int h = warp; h < p.group; h += WARPS) {
      float x = 0.f, y = 0.f, z = 0.f;
#pragma unroll 4
      for (int c = lane; c < d; c += 32) {
        const float first = stored[c], second = stored[d + c], q = prepared[2 * h * DP + c];
        if (S::LINE) z = fmaf(q, second, z);
        x = fmaf(q, first, x);
        y = fmaf(prepared[2 * h * DP + DP + c], S::SQUARES ? second * second : second, y);
      }
      x = warp_sum(x), y = warp_sum(y);
      if (S::LINE) z = warp_sum(z);
      if (lane == 0) of_heads[h] = S::score(p, x, y, z, S::LOG_MASS ? page_log_count(p, s, page) : 0.f);
    }
    __syncthreads();
  }
  if (chosen_from && warp == 0)
    leave_page(p, pair, page, touched, there && page >= first_candidate(p, s), there ? of_heads : nullptr);
}

// What the kernels ask of a selector.
template <class SELF> struct PageVectors {
  // A prompt's state is made page by page.
  static constexpr bool BY_BLOCK = false;
  static constexpr int STATE_THREADS = PAGES_THREADS;

  // A block scores pages that the step does not touch; or it appends the rows of a page that the step touches, brings
  // its summary up to date and scores it.
  template <class T, int DP> static DEVICE void score_step(const Params& p, int b, int head, u8* raw) {
    if (blockIdx.x >= p.score_blocks) {
      start_step();
      const Sequence s = sequence(p, b);
      if (s.valid) touch_page<SELF, T, DP>(p, s, b, head, int(blockIdx.x) - p.score_blocks, raw);
    } else if constexpr (sizeof(T) == sizeof(float)) {
      score_pages_f32<SELF, DP>(p, b, head, reinterpret_cast<float*>(raw));
    } else {
      score_pages_mma<SELF, T, DP>(p, b, head, raw);
    }
  }

  // A warp summarises a page of a prompt from its valid rows, for head sizes up to 128 PARTS.
  template <class T, int PARTS>
  static DEVICE void end_page(const Params& p, int pair, int page, int rows, const T* keys) {
    Columns<PARTS> a, b;
    // Rows of 256 elements would not fit in registers.
    constexpr int KEPT = PARTS == 1 ? 16 : 0;
    if (KEPT > 0 && p.page_shift <= 4)
      SELF::template summarize_by_warp<T, PARTS, KEPT>(keys, p.head_size, rows, a, b);
    else
      SELF::template summarize_by_warp<T, PARTS, 0>(keys, p.head_size, rows, a, b);
    T* const summary = page_summary<T>(p, pair, page);
    a.store(summary, p.head_size), b.store(summary + p.head_size, p.head_size);
  }
};
