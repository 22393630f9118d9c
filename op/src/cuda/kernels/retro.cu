// Every kernel of the CUDA execution provider, for every element type and head size: op/src/cuda/kernel_set.rs finds
// them by name, and op/src/cuda/abi.rs has the lists (SCORE_HALF and so on) and the launch bounds.
#include "attend.cuh"
#include "attend_f32.cuh"
#include "matmul_nbits.cuh"
#include "matmul_dequantised.cuh"
#include "merge.cuh"
#include "prefill.cuh"
#include "score_kernel.cuh"
#include "select.cuh"

#define KERNEL(NAME, THREADS, BLOCKS, BODY) \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) NAME(const __grid_constant__ Params p) { BODY; }

KERNEL(retro_select, SELECT_THREADS, SELECT_BLOCKS, select_kernel<ANY>(p))
KERNEL(retro_select_max, SELECT_THREADS, SELECT_BLOCKS, select_kernel<BY_MAX>(p))
KERNEL(retro_select_softmax, SELECT_THREADS, SELECT_BLOCKS, select_kernel<BY_SOFTMAX>(p))

#define PAGES_OF(ID, SELECTOR, PARTS, LARGEST, BLOCKS, TYPE, T)          \
  KERNEL(retro_pages_##TYPE##_##LARGEST##_##ID, SELECTOR::STATE_THREADS, \
         BLOCKS* PAGES_THREADS / SELECTOR::STATE_THREADS, (pages_kernel<T, PARTS, SELECTOR>(p)))
#define PAGES(...) SELECTORS(PAGES_OF, __VA_ARGS__)
#define OF_TYPE(TYPE, T)                                                      \
  KERNEL(retro_merge_##TYPE, MERGE_THREADS, MERGE_BLOCKS, merge_kernel<T>(p)) \
  KERNEL(retro_append_##TYPE, APPEND_THREADS, 1, append_kernel<T>(p))         \
  KERNEL(retro_clear_##TYPE, CLEAR_THREADS, 1, clear_kernel<T>(p))            \
  PAGES_SHAPES(PAGES, TYPE, T)

OF_TYPE(f32, F32)
OF_TYPE(f16, F16)
OF_TYPE(bf16, BF16)

#define SCORE_OF(ID, SELECTOR, DP, BLOCKS, TYPE, T) \
  KERNEL(retro_score_##TYPE##_##DP##_##ID, SCORE_THREADS, BLOCKS, (score_kernel<T, DP, SELECTOR>(p)))
#define SCORE(...) SELECTORS(SCORE_OF, __VA_ARGS__)
SCORE_HALF(SCORE, f16, F16)
SCORE_HALF(SCORE, bf16, BF16)
SCORE_F32(SCORE, f32, F32)

// Sketches of one head size and number of bits, whose codes stay in registers.
#define SKETCHES(DP, BLOCKS, TYPE, T)                 \
  SCORE_OF(sketch1, SketchOf<1>, DP, BLOCKS, TYPE, T) \
  SCORE_OF(sketch2, SketchOf<2>, DP, BLOCKS, TYPE, T)
SCORE_SKETCH(SKETCHES, f16, F16)
SCORE_SKETCH(SKETCHES, bf16, BF16)
SCORE_SKETCH(SKETCHES, f32, F32)

#define ATTEND(DP, ROWS, THREADS, BLOCKS, TYPE, T) \
  KERNEL(retro_attend_##TYPE##_##DP##_##ROWS, THREADS, BLOCKS, (attend_mma<T, DP, ROWS>(p)))
ATTEND_HALF(ATTEND, f16, F16)
ATTEND_HALF(ATTEND, bf16, BF16)

#define ATTEND_SCALAR(DP, ROWS, THREADS, BLOCKS, TYPE) \
  KERNEL(retro_attend_##TYPE##_##DP##_##ROWS, THREADS, BLOCKS, attend_f32<DP>(p))
ATTEND_F32(ATTEND_SCALAR, f32)

// Products of packed weights, for up to 8 and 16 rows at once.
#define MATMUL_KERNEL(NAME, THREADS, BODY) \
  extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(const __grid_constant__ MatmulParams p) { BODY; }
#define MATMUL_TILES(NAME, ...)                                              \
  MATMUL_KERNEL(NAME##_8, MATMUL_THREADS, (matmul_nbits<__VA_ARGS__, 1>(p))) \
  MATMUL_KERNEL(NAME##_16, MATMUL_THREADS, (matmul_nbits<__VA_ARGS__, 2>(p)))
#define MATMUL_ZEROS(NAME, ...)          \
  MATMUL_TILES(NAME, __VA_ARGS__, false) \
  MATMUL_TILES(NAME##_zeros, __VA_ARGS__, true)
#define MATMUL(TYPE, T)                                                                        \
  MATMUL_ZEROS(retro_matmul4_##TYPE, T, 4, false)                                              \
  MATMUL_ZEROS(retro_matmul4_halves_##TYPE, T, 4, true)                                        \
  MATMUL_ZEROS(retro_matmul8_##TYPE, T, 8, false)                                              \
  MATMUL_KERNEL(retro_dequantise_weights_##TYPE, MATMUL_ROW_THREADS, dequantise_weights<T>(p)) \
  MATMUL_KERNEL(retro_add_bias_##TYPE, MATMUL_ROW_THREADS, add_bias<T>(p))
MATMUL(f16, F16)
MATMUL(bf16, BF16)
