// The kernels of selector sketch on the CPU against docs/method.md computed in doubles: random sizes and attributes,
// prompts in chunks, decoding steps with retrospective tokens. What is compared: keys and values, the scores of every
// candidate, the statistics that selection reads.
//
//   sketch SEED CASES     a line a case; exit code 1 where one is wrong
#include "cuda_on_cpu.h"
// The kernels.
#include "prefill.cuh"
#include "score_kernel.cuh"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

alignas(1024) u8 raw[1 << 17];

namespace {

using Doubles = std::vector<double>;

struct Random {
  std::mt19937_64 bits;
  double share() { return std::generate_canonical<double, 53>(bits); }
  int within(int least, int most) { return least + int(share() * (most - least + 1)); }
  double normal() { return std::sqrt(-2 * std::log(1 - share())) * std::cos(6.283185307179586 * share()); }
};

// Memory that begins `skipped` elements behind a multiple of 64 bytes.
template <class T> struct Memory {
  std::vector<u8> bytes;
  T* begin;
  Memory(size_t count, int skipped = 0) : bytes(count * sizeof(T) + 128, 0xcd) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(bytes.data());
    begin = reinterpret_cast<T*>((address + 63) / 64 * 64) + skipped;
  }
  T& operator[](size_t i) { return begin[i]; }
};

// R x, by definition.
Doubles rotated_by_definition(const Doubles& x) {
  constexpr uint64_t PI[4] = {0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89};
  const int d = int(x.size());
  Doubles y(d);
  for (int start = 0, size; start < d; start += size) {
    size = 1;
    while (2 * size <= d - start) size *= 2;
    for (int a = 0; a < size; a++) {
      double sum = 0;
      for (int b = 0; b < size; b++) {
        const int e = start + b;
        const bool negative = (PI[e / 64 % 4] >> (63 - e % 64) & 1) != (__builtin_popcount(a & b) % 2 == 1);
        sum += negative ? -x[e] : x[e];
      }
      y[start + a] = sum / std::sqrt(size);
    }
  }
  return y;
}

// A largest score and the sum of e^(score - largest).
struct Sum {
  double top = -INFINITY, sum = 0;
  void add(double score) {
    if (score == -INFINITY) return;
    const double most = std::max(top, score);
    sum = sum * std::exp(top - most) + std::exp(score - most), top = most;
  }
  double log() const { return top + std::log(sum); }
};

template <class T, int DP> struct Case {
  Random& random;
  Params p;
  int d, bits, blocks, len = 0, count = 0;
  Memory<T> keys, values;
  Memory<u8> state;
  Memory<float> scores;
  std::vector<int> steps;
  std::vector<float4> stats;
  std::vector<u32> progress;
  int last = 0, budget = 1;
  // The reference: centres of blocks, codes and factors of rows.
  std::vector<Doubles> centres, codes;
  Doubles factors, drift;
  long compared = 0, wrong = 0;
  double worst = 0;

  static Params attributes(Random& random, int d, int bits) {
    Params p = {};
    p.group = random.within(1, 16), p.kv_heads = random.within(1, 2), p.heads = p.group * p.kv_heads;
    p.group_inverse = ~0u / p.group + 1;
    p.head_size = d, p.sketch_bits = bits, p.batch = 1;
    p.page_shift = random.within(0, 7);
    p.capacity = random.within(260, 420);
    p.cache_pages = (p.capacity + (1 << p.page_shift) - 1) >> p.page_shift;
    // The state may have room for more.
    p.state_blocks = (p.capacity + SKETCH_BLOCK - 1) / SKETCH_BLOCK + random.within(0, 1);
    p.window = random.share() < 0.3 ? 64 : random.within(1, 8);
    p.sink_pages = random.within(0, 2);
    p.local_window = random.share() < 0.3 ? random.within(20, 250) : 0;
    p.group_score = random.share() < 0.6 ? SOFTMAX : MAX;
    p.mode = RETRO;
    p.scale = float(1 / std::sqrt(d)), p.softcap = random.share() < 0.3 ? 5.f : 0.f;
    // Rows that can be read 16 bytes at a time, or not.
    p.vec8 = random.share() < 0.7;
    p.query_stride = p.heads * d, p.kv_stride = p.kv_heads * d;
    return p;
  }

  Case(Random& random, int d, int bits)
      : random(random),
        p(attributes(random, d, bits)),
        d(d),
        bits(bits),
        blocks((p.capacity + SKETCH_BLOCK - 1) / SKETCH_BLOCK),
        keys(cached()),
        values(cached()),
        state(size_t(p.kv_heads) * p.state_blocks * sketch_layout<T>(d, bits).bytes),
        scores(size_t(p.kv_heads) * scored_page_count(p.cache_pages) * MAX_GROUP),
        steps(p.kv_heads * p.cache_pages, -1),
        stats(p.kv_heads * 16 * MAX_GROUP),
        progress(p.kv_heads),
        centres(p.kv_heads * blocks, Doubles(d)),
        codes(p.kv_heads * p.capacity),
        factors(codes.size()),
        drift(d) {
    p.key_cache = keys.begin, p.value_cache = values.begin, p.page_state = state.begin, p.page_steps = steps.data();
    p.scores = scores.begin, p.score_stats = stats.data(), p.progress = progress.data();
    p.seqlens_k = &last, p.page_budget = &budget;
    for (double& x : drift) x = random.normal();
  }

  size_t cached() const { return size_t(p.kv_heads) * p.capacity * p.head_size; }
  double key(int head, int row, int e) { return widen(keys[(size_t(head) * p.capacity + row) * d + e]); }

  void reference_centre(int block) {
    for (int h = 0; h < p.kv_heads; h++)
      for (int e = 0; e < d; e++) {
        double sum = 0;
        for (int i = 0; i < SKETCH_BLOCK; i++) sum += key(h, (block - 1) * SKETCH_BLOCK + i, e);
        T rounded;
        narrow(float(sum / SKETCH_BLOCK), rounded);
        centres[h * blocks + block][e] = widen(rounded);
      }
  }

  void reference_row(int head, int row) {
    Doubles x(d);
    for (int e = 0; e < d; e++) x[e] = key(head, row, e) - centres[head * blocks + row / SKETCH_BLOCK][e];
    const Doubles y = rotated_by_definition(x);
    double squares = 0, along = 0;
    for (double v : y) squares += v * v;
    const double tau = std::sqrt(squares / d);
    Doubles& s = codes[head * p.capacity + row];
    s.assign(d, 0);
    for (int e = 0; e < d; e++) {
      s[e] = std::copysign(bits == 1 || std::fabs(y[e]) < tau ? 1 : 3, y[e]);
      along += y[e] * s[e];
    }
    BF16 factor;
    narrow(squares == 0 ? 0.f : float(squares / along), factor);
    factors[head * p.capacity + row] = widen(factor);
  }

  void set_length(int length, int fed) {
    len = length, last = len - 1;
    p.tokens = fed, p.total = len, p.max_pages = pages_for(p, len);
  }

  // A prompt's chunk, whose rows ONNX Runtime's operator has written.
  void prefill(int fed) {
    const int first = len;
    for (int h = 0; h < p.kv_heads; h++)
      for (int row = first; row < first + fed; row++)
        for (int e = 0; e < d; e++)
          narrow(float(random.normal() + drift[e]), keys[(size_t(h) * p.capacity + row) * d + e]);
    set_length(first + fed, fed);
    p.phase = PREFILL;
    for (int b = 1; b * SKETCH_BLOCK < len; b++)
      if (b * SKETCH_BLOCK >= first) reference_centre(b);
    for (int h = 0; h < p.kv_heads; h++)
      for (int row = first; row < len; row++) reference_row(h, row);
    for (unsigned block = 0; int(block) * SKETCH_BLOCK < len; block++)
      for (unsigned h = 0; int(h) < p.kv_heads; h++) {
        blockIdx = {block, h, 0};
        launch_block(SKETCH_THREADS, [&] { pages_kernel<T, (DP + 127) / 128, Sketch>(p); });
      }
    for (int i = 0; i < int(steps.size()); i++) wrong += steps[i] != (i % p.cache_pages < p.max_pages ? len - 1 : -1);
  }

  // A decoding step that feeds `retro` tokens again. In some, rows come before them that do not count, as a number on
  // the device says.
  void decode(int retro) {
    const int skipped = p.vec8 ? 0 : 1, fed = retro + 1;
    const bool counted = random.share() < 0.5;
    const int leading = counted ? std::min(random.within(0, 3), len + 1 - fed) : 0, rows = leading + fed;
    Memory<T> query(size_t(rows) * p.heads * d, skipped), key(size_t(rows) * p.kv_heads * d, skipped),
        value(size_t(rows) * p.kv_heads * d, skipped);
    for (int i = 0; i < rows * p.heads * d; i++) narrow(float(random.normal()), query[i]);
    for (int i = 0; i < rows * p.kv_heads * d; i++)
      narrow(float(random.normal() + drift[i % d]), key[i]), narrow(float(random.normal()), value[i]);
    set_length(len + 1, rows);
    p.query = query.begin, p.key = key.begin, p.value = value.begin;
    count = retro, p.retro_count = counted ? &count : nullptr;
    p.phase = DECODE, p.retro[0] = u8(counted ? 0 : retro);
    p.score_blocks = random.within(1, 3), p.touched = touched_page_count(rows, 7);
    p.score_parts = p.score_blocks + p.touched;
    const int in_all = (len + SKETCH_BLOCK - 1) / SKETCH_BLOCK, warps = p.score_blocks * SCORE_WARPS;
    p.warp_pages = in_all / warps, p.more_pages = in_all % warps;
    std::fill(progress.begin(), progress.end(), 0);
    for (unsigned h = 0; int(h) < p.kv_heads; h++)
      for (unsigned x = 0; int(x) < p.score_parts; x++) {
        blockIdx = {x, h, 0};
        memset(raw, 0xee, sizeof raw);
        launch_block(SCORE_THREADS, [&] {
          if (d == DP && bits == 1)
            score_kernel<T, DP, SketchOf<1>>(p);
          else if (d == DP)
            score_kernel<T, DP, SketchOf<2>>(p);
          else
            score_kernel<T, DP, Sketch>(p);
        });
      }
    const int first = len - fed;
    for (int h = 0; h < p.kv_heads; h++)
      for (int i = 0; i < fed * d; i++) {
        const size_t from = (size_t(leading + i / d) * p.kv_heads + h) * d + i % d,
                     to = (size_t(h) * p.capacity + first) * d + i;
        wrong += memcmp(&keys[to], &key[from], sizeof(T)) || memcmp(&values[to], &value[from], sizeof(T));
      }
    if ((len - 1) % SKETCH_BLOCK == 0) reference_centre((len - 1) / SKETCH_BLOCK);
    for (int h = 0; h < p.kv_heads; h++)
      for (int row = first; row < len; row++) reference_row(h, row);
    for (int h = 0; h < p.kv_heads; h++) compare(h, &query[size_t(rows - 1) * p.heads * d]);
  }

  // The log mass of a page for a query.
  double mass(int head, const Doubles& query, const Doubles& rotated, int page) {
    Sum all;
    const int size = 1 << p.page_shift, oldest = p.local_window ? len - p.local_window : 0;
    for (int row = std::max(page * size, oldest); row < std::min(len, (page + 1) * size); row++) {
      double centre = 0, sketch = 0;
      for (int e = 0; e < d; e++) {
        centre += query[e] * centres[head * blocks + row / SKETCH_BLOCK][e];
        sketch += rotated[e] * codes[head * p.capacity + row][e];
      }
      const double logit = p.scale * (centre + factors[head * p.capacity + row] * sketch);
      all.add(p.softcap > 0 ? p.softcap * std::tanh(logit / p.softcap) : logit);
    }
    return all.log();
  }

  void check(double got, double expected, double tolerance) {
    const double off = std::fabs(got - expected) / std::max(1.0, std::fabs(expected));
    worst = std::max(worst, off), compared++;
    wrong += !(off < tolerance);
  }

  void compare(int head, const T* queries) {
    const Sequence s = sequence(p, 0);
    const Candidates all = candidates(p, s, 0);
    if (!chooses(p, all)) return;
    wrong += int(progress[head]) != p.score_parts;
    const bool softmax = p.group_score == SOFTMAX;
    Doubles largest(all.pages, -INFINITY);
    for (int h = 0; h < p.group; h++) {
      Doubles query(d);
      for (int e = 0; e < d; e++) query[e] = widen(queries[(head * p.group + h) * d + e]);
      const Doubles rotated = rotated_by_definition(query);
      Doubles scores;
      for (int page = all.from; page < all.pages; page++) {
        const double expected = mass(head, query, rotated, page);
        largest[page] = std::max(largest[page], expected);
        if (!softmax) continue;
        check(score_at(p, head, page, h), expected, 2e-3);
        scores.push_back(score_at(p, head, page, h));
      }
      if (!softmax) continue;
      // The largest score, and the sum over the others beside it.
      const auto largest_of_head = std::max_element(scores.begin(), scores.end());
      const double most = *largest_of_head;
      scores.erase(largest_of_head);
      double rest = 0, rest_of_parts = -1;
      for (const double score : scores) rest += std::exp(score - most);
      for (int i = 0; i < p.score_parts; i++) {
        const float4 part = stats[(head * p.score_parts + i) * p.group + h];
        rest_of_parts += part.y * std::exp(part.x - most) + std::exp(part.x - most);
        wrong += part.x > most;
      }
      check(rest_of_parts, rest, 1e-4);
    }
    if (softmax) return;
    double top = -INFINITY, highest = -INFINITY;
    for (int page = all.from; page < all.pages; page++) {
      const double score = score_at(p, head, page, 0);
      check(score, largest[page], 2e-3);
      highest = std::max(highest, score);
    }
    for (int i = 0; i < p.score_parts; i++) top = std::max(top, double(stats[head * p.score_parts + i].x));
    check(top, highest, 1e-6);
  }

  bool run() {
    const int prompt = random.within(60, 250);
    while (len < prompt) prefill(std::min(random.within(1, 140), prompt - len));
    // Over the end of a block, or a few steps.
    const int end = std::min(p.capacity, prompt % SKETCH_BLOCK > 90 ? prompt + 50 : prompt + 12);
    for (int retro = 0; len < end && wrong == 0;) {
      retro = std::max(0, std::min({retro + random.within(-3, 1), p.window - 1, len}));
      decode(retro);
    }
    printf(
        "%s T of %zu bytes, D %d, %d bits, %d x %d heads, pages of %d, w %d, window %d, %s, softcap %g, vec8 %d: %ld "
        "compared, worst %.2g\n",
        wrong ? "WRONG" : "ok   ", sizeof(T), d, bits, p.kv_heads, p.group, 1 << p.page_shift, p.window, p.local_window,
        p.group_score == SOFTMAX ? "softmax" : "max", p.softcap, p.vec8, compared, worst);
    return wrong == 0;
  }
};

template <class T> bool run(Random& random, int d, int bits) {
  if (d <= 64) return Case<T, 64>(random, d, bits).run();
  if (d <= 128) return Case<T, 128>(random, d, bits).run();
  return Case<T, 256>(random, d, bits).run();
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) {
    fprintf(stderr, "usage: %s SEED CASES\n", arguments[0]);
    return 2;
  }
  Random random = {std::mt19937_64(atoi(arguments[1]))};
  constexpr int SIZES[] = {8, 24, 64, 72, 80, 96, 104, 112, 120, 128, 136, 192, 200, 256};
  bool all = true;
  for (int i = 0; i < atoi(arguments[2]); i++) {
    // Every size in turn.
    const int d = SIZES[i % 14], bits = random.within(1, 2), type = random.within(0, 2);
    all &= type == 0 ? run<F32>(random, d, bits) : type == 1 ? run<F16>(random, d, bits) : run<BF16>(random, d, bits);
  }
  return all ? 0 : 1;
}
