// Every kernel of the CUDA execution provider, for every element type and head size: op/src/cuda/kernel.rs names them.
#include "attend.cuh"
#include "merge.cuh"
#include "prefill.cuh"
#include "score.cuh"
#include "select.cuh"

#define KERNEL(NAME, THREADS, BLOCKS, BODY)                                                                            \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) NAME(const __grid_constant__ Params p) { BODY; }

KERNEL(retro_select, SELECT_THREADS, 1, select_kernel(p))

#define OF_TYPE(TYPE, T)                                                                                               \
  KERNEL(retro_merge_##TYPE, MERGE_THREADS, 1, merge_kernel<T>(p))                                                     \
  KERNEL(retro_append_##TYPE, 128, 1, append_kernel<T>(p))                                                             \
  KERNEL(retro_pages_##TYPE, 128, 1, pages_kernel<T>(p))                                                               \
  KERNEL(retro_clear_##TYPE, 128, 1, clear_kernel<T>(p))                                                               \
  KERNEL(retro_score_##TYPE##_64, SCORE_THREADS, 2, (score_kernel<T, 64>(p)))                                          \
  KERNEL(retro_score_##TYPE##_128, SCORE_THREADS, 2, (score_kernel<T, 128>(p)))                                        \
  KERNEL(retro_score_##TYPE##_256, SCORE_THREADS, 1, (score_kernel<T, 256>(p)))

OF_TYPE(f32, F32)
OF_TYPE(f16, F16)
OF_TYPE(bf16, BF16)

#define OF_HALF_TYPE(TYPE, T)                                                                                          \
  KERNEL(retro_attend_##TYPE##_64_8, (Shape<64, 1>::THREADS), 4, (attend_mma<T, 64, 1>(p)))                            \
  KERNEL(retro_attend_##TYPE##_64_16, (Shape<64, 2>::THREADS), 3, (attend_mma<T, 64, 2>(p)))                           \
  KERNEL(retro_attend_##TYPE##_64_32, (Shape<64, 4>::THREADS), 3, (attend_mma<T, 64, 4>(p)))                           \
  KERNEL(retro_attend_##TYPE##_128_8, (Shape<128, 1>::THREADS), 3, (attend_mma<T, 128, 1>(p)))                         \
  KERNEL(retro_attend_##TYPE##_128_16, (Shape<128, 2>::THREADS), 2, (attend_mma<T, 128, 2>(p)))                        \
  KERNEL(retro_attend_##TYPE##_128_32, (Shape<128, 4>::THREADS), 2, (attend_mma<T, 128, 4>(p)))                        \
  KERNEL(retro_attend_##TYPE##_256_16, (Shape<256, 2>::THREADS), 2, (attend_mma<T, 256, 2>(p)))                        \
  KERNEL(retro_attend_##TYPE##_256_32, (Shape<256, 4>::THREADS), 1, (attend_mma<T, 256, 4>(p)))

OF_HALF_TYPE(f16, F16)
OF_HALF_TYPE(bf16, BF16)

KERNEL(retro_attend_f32_64_8, 32 * F32_WARPS, 3, attend_f32<64>(p))
KERNEL(retro_attend_f32_128_8, 32 * F32_WARPS, 3, attend_f32<128>(p))
KERNEL(retro_attend_f32_256_8, 32 * F32_WARPS, 2, attend_f32<256>(p))
