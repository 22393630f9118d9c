// What ptx.cuh writes in PTX, for the CPU. It is included there.
#pragma once

inline float widen(F16 x) {
  _Float16 half;
  memcpy(&half, &x.v, sizeof half);
  return float(half);
}
inline void narrow(float x, F16& y) {
  const _Float16 half = _Float16(x);
  memcpy(&y.v, &half, sizeof half);
}
inline void narrow(float x, BF16& y) {
  const u32 bits = __float_as_uint(x);
  y.v = x == x ? u16((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16) : u16(0x7fff);
}

// Kernels and blocks run one after another.
inline void let_next_start() {}
inline void wait_for_previous() {}
inline void add_progress(u32* progress) { *progress += 1; }
inline u32 read_progress(const u32* progress) { return *progress; }

// Of each thread, the groups of copies that are under way: what is copied is there when its group has been waited for,
// and not before.
struct CopiesUnderWay {
  struct Copy {
    void* target;
    const void* source;
  };
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
  unsigned of_block = 0;
};
inline CopiesUnderWay& copies_under_way() {
  static std::map<unsigned, CopiesUnderWay> of_threads;
  auto& mine = of_threads[this_thread()];
  if (mine.of_block != blocks_launched()) mine = {{}, {}, blocks_launched()};
  return mine;
}
inline void copy_chunk(void* target, const void* source) { copies_under_way().open.push_back({target, source}); }
inline void commit_copies() {
  auto& mine = copies_under_way();
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}
inline void wait_for_copies(int left) {
  auto& groups = copies_under_way().groups;
  for (; groups.size() > size_t(left); groups.pop_front())
    for (const auto& copy : groups.front()) memcpy(copy.target, copy.source, 16);
}

inline float exp2_fast(float x) { return exp2f(x); }
inline float log2_fast(float x) { return log2f(x); }
inline float sqrt_fast(float x) { return sqrtf(x); }
inline float min_or_nan(float a, float b) { return a == a && b == b ? fminf(a, b) : NAN; }
inline float max_or_nan(float a, float b) { return a == a && b == b ? fmaxf(a, b) : NAN; }

inline void add_byte_products(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  struct Fragment {
    u32 a[4], b[2];
  };
  const auto all = exchange(Fragment{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const unsigned lane = this_thread() % 32;
  for (unsigned e = 0; e < 4; e++) {
    const unsigned row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
    for (unsigned k = 0; k < 32; k++) {
      const unsigned quad = k % 16 / 4, shift = 8 * (k % 4);
      const u32 x = all[row % 8 * 4 + quad].a[k / 16 * 2 + row / 8] >> shift & 255u;
      c[e] += int(x) * int8_t(all[column * 4 + quad].b[k / 16] >> shift & 255u);
    }
  }
}
