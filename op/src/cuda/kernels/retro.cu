// Every kernel of the CUDA execution provider, for every element type and head size: op/src/cuda/op_kernel.rs names them.
#include "attend.cuh"
#include "merge.cuh"
#include "prefill.cuh"
#include "score.cuh"
#include "select.cuh"

#define KERNEL(NAME, THREADS, BLOCKS, BODY)                                                                            \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) NAME(const __grid_constant__ Params p) { BODY; }

KERNEL(retro_select, SELECT_THREADS, 2, select_kernel<ANY>(p))
KERNEL(retro_select_max, SELECT_THREADS, 2, select_kernel<BY_MAX>(p))
KERNEL(retro_select_softmax, SELECT_THREADS, 2, select_kernel<BY_SOFTMAX>(p))

#define OF_TYPE(TYPE, T)                                                                                               \
  KERNEL(retro_merge_##TYPE, MERGE_THREADS, 4, merge_kernel<T>(p))                                                     \
  KERNEL(retro_append_##TYPE, 128, 1, append_kernel<T>(p))                                                             \
  KERNEL(retro_pages_##TYPE##_128, PAGES_THREADS, 5, (pages_kernel<T, 1>(p)))                                          \
  KERNEL(retro_pages_##TYPE##_256, PAGES_THREADS, 4, (pages_kernel<T, 2>(p)))                                          \
  KERNEL(retro_clear_##TYPE, 128, 1, clear_kernel<T>(p))

OF_TYPE(f32, F32)
OF_TYPE(f16, F16)
OF_TYPE(bf16, BF16)

// Head size 128: as if the blocks had 64 threads more, so that beside two of them there are registers for one that selects pages,
// and none starts late.
#define OF_HALF_TYPE(TYPE, T)                                                                                          \
  KERNEL(retro_score_##TYPE##_64_bounds, SCORE_THREADS, 3, (score_kernel<T, 64, false>(p)))                            \
  KERNEL(retro_score_##TYPE##_64_moments, SCORE_THREADS, 3, (score_kernel<T, 64, true>(p)))                            \
  KERNEL(retro_score_##TYPE##_128_bounds, SCORE_THREADS, 2, (score_kernel<T, 128, false>(p)))                          \
  KERNEL(retro_score_##TYPE##_128_moments, SCORE_THREADS, 2, (score_kernel<T, 128, true>(p)))                          \
  KERNEL(retro_score_##TYPE##_256_bounds, SCORE_THREADS, 1, (score_kernel<T, 256, false>(p)))                          \
  KERNEL(retro_score_##TYPE##_256_moments, SCORE_THREADS, 1, (score_kernel<T, 256, true>(p)))                          \
  KERNEL(retro_attend_##TYPE##_64_8, (Shape<64, 8>::THREADS), 4, (attend_mma<T, 64, 8>(p)))                            \
  KERNEL(retro_attend_##TYPE##_64_16, (Shape<64, 16>::THREADS), 3, (attend_mma<T, 64, 16>(p)))                         \
  KERNEL(retro_attend_##TYPE##_64_32, (Shape<64, 32>::THREADS), 3, (attend_mma<T, 64, 32>(p)))                         \
  KERNEL(retro_attend_##TYPE##_128_16, (Shape<128, 16>::THREADS + 64), 2, (attend_mma<T, 128, 16>(p)))                 \
  KERNEL(retro_attend_##TYPE##_128_32, (Shape<128, 32>::THREADS + 64), 2, (attend_mma<T, 128, 32>(p)))                 \
  KERNEL(retro_attend_##TYPE##_256_16, (Shape<256, 16>::THREADS), 2, (attend_mma<T, 256, 16>(p)))                      \
  KERNEL(retro_attend_##TYPE##_256_32, (Shape<256, 32>::THREADS), 1, (attend_mma<T, 256, 32>(p)))

OF_HALF_TYPE(f16, F16)
OF_HALF_TYPE(bf16, BF16)

KERNEL(retro_score_f32_64, SCORE_THREADS, 2, (score_kernel<F32, 64, true>(p)))
KERNEL(retro_score_f32_128, SCORE_THREADS, 2, (score_kernel<F32, 128, true>(p)))
KERNEL(retro_score_f32_256, SCORE_THREADS, 1, (score_kernel<F32, 256, true>(p)))
KERNEL(retro_attend_f32_64_8, 32 * F32_WARPS, 3, attend_f32<64>(p))
KERNEL(retro_attend_f32_128_8, 32 * F32_WARPS, 3, attend_f32<128>(p))
KERNEL(retro_attend_f32_256_8, 32 * F32_WARPS, 2, attend_f32<256>(p))
