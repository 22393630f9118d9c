//! AVX2 with FMA and F16C, and AVX-512.

use std::arch::x86_64::*;

use half::f16;

use super::{ROOT, implement};

#[derive(Clone, Copy)]
pub(crate) struct Avx2;

#[derive(Clone, Copy)]
pub(crate) struct Avx512;

/// The sums of the lanes of four vectors.
///
/// # Safety
/// Needs AVX2.
#[inline(always)]
unsafe fn sums_256(v: [__m256; 4]) -> [f32; 4] {
    let mut out = [0.0; 4];
    // SAFETY: the caller's promise; `out` has four floats.
    unsafe {
        let pairs = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
        let sum = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps::<1>(pairs));
        _mm_storeu_ps(out.as_mut_ptr(), sum);
    }
    out
}

/// The largest of the lanes.
///
/// # Safety
/// Needs AVX2.
#[inline(always)]
unsafe fn largest_256(v: __m256) -> f32 {
    // SAFETY: the caller's promise.
    unsafe {
        let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
    }
}

/// Whether 512-bit operations run as two of 256 bits each: on AMD's Zen 4 (family 19h), where AVX2 then measured 10 to
/// 25 % faster in these kernels.
pub(super) fn halves_wide_vectors() -> bool {
    let vendor = __cpuid(0);
    let family = {
        let id = __cpuid(1).eax;
        ((id >> 8) & 0xf) + ((id >> 20) & 0xff)
    };
    vendor.ebx == u32::from_le_bytes(*b"Auth") && family == 0x19
}

implement!(Avx2, __m256, 8, {
    fn splat(x: f32) -> __m256 = _mm256_set1_ps(x);
    fn load(p: *const f32) -> __m256 = _mm256_loadu_ps(p);
    fn load_half(p: *const f16) -> __m256 = _mm256_cvtph_ps(_mm_loadu_si128(p.cast()));
    fn load_int(p: *const i32) -> __m256 = _mm256_cvtepi32_ps(_mm256_loadu_si256(p.cast()));
    fn load_byte(p: *const u8) -> __m256 = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast())));
    fn decode_halves(p: *const u8, zero: __m256, scale: __m256) -> [__m256; 2] = {
        let bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()));
        let halves = [_mm256_and_si256(bytes, _mm256_set1_epi32(15)), _mm256_srli_epi32::<4>(bytes)];
        halves.map(|half| Self::mul(Self::sub(_mm256_cvtepi32_ps(half), zero), scale))
    };
    fn store(p: *mut f32, v: __m256) = _mm256_storeu_ps(p, v);
    fn add(a: __m256, b: __m256) -> __m256 = _mm256_add_ps(a, b);
    fn sub(a: __m256, b: __m256) -> __m256 = _mm256_sub_ps(a, b);
    fn mul(a: __m256, b: __m256) -> __m256 = _mm256_mul_ps(a, b);
    fn fma(a: __m256, b: __m256, c: __m256) -> __m256 = _mm256_fmadd_ps(a, b, c);
    fn max(a: __m256, b: __m256) -> __m256 = _mm256_max_ps(a, b);
    fn unless_below(x: __m256, limit: __m256, v: __m256) -> __m256 = _mm256_and_ps(_mm256_cmp_ps::<_CMP_NLT_UQ>(x, limit), v);
    fn power_of_2(n: __m256) -> __m256 = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(
        _mm256_cvtps_epi32(n),
        _mm256_set1_epi32(127),
    )));
    fn times_power_of_2(x: __m256, n: __m256) -> __m256 = Self::mul(x, Self::power_of_2(n));
    fn exponent(x: __m256) -> __m256 = {
        let bits = _mm256_sub_epi32(_mm256_castps_si256(x), _mm256_set1_epi32(ROOT as i32));
        _mm256_cvtepi32_ps(_mm256_srai_epi32::<23>(bits))
    };
    fn sums(v: [__m256; 4]) -> [f32; 4] = sums_256(v);
    fn largest(v: __m256) -> f32 = largest_256(v);
    fn prefetch(p: *const u8) = _mm_prefetch::<_MM_HINT_T1>(p.cast());
});

/// The lower and the upper half.
///
/// # Safety
/// Needs AVX-512 F.
#[inline(always)]
unsafe fn halves(v: __m512) -> (__m256, __m256) {
    // SAFETY: the caller's promise.
    unsafe {
        let upper = _mm512_extractf64x4_pd::<1>(_mm512_castps_pd(v));
        (_mm512_castps512_ps256(v), _mm256_castpd_ps(upper))
    }
}

/// The upper half added to the lower.
///
/// # Safety
/// Needs AVX-512 F.
#[inline(always)]
unsafe fn fold(v: __m512) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe {
        let (lower, upper) = halves(v);
        _mm256_add_ps(lower, upper)
    }
}

implement!(Avx512, __m512, 16, {
    fn splat(x: f32) -> __m512 = _mm512_set1_ps(x);
    fn load(p: *const f32) -> __m512 = _mm512_loadu_ps(p);
    fn load_half(p: *const f16) -> __m512 = _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()));
    fn load_int(p: *const i32) -> __m512 = _mm512_cvtepi32_ps(_mm512_loadu_si512(p.cast()));
    fn load_byte(p: *const u8) -> __m512 = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast())));
    // What each of the 16 codes stands for, looked up: a permutation reads the lowest 4 bits of its indices alone.
    fn decode_halves(p: *const u8, zero: __m512, scale: __m512) -> [__m512; 2] = {
        let codes = _mm512_setr_ps(0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0);
        let weights = Self::mul(Self::sub(codes, zero), scale);
        let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()));
        [_mm512_permutexvar_ps(bytes, weights), _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(bytes), weights)]
    };
    fn store(p: *mut f32, v: __m512) = _mm512_storeu_ps(p, v);
    fn add(a: __m512, b: __m512) -> __m512 = _mm512_add_ps(a, b);
    fn sub(a: __m512, b: __m512) -> __m512 = _mm512_sub_ps(a, b);
    fn mul(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps(a, b);
    fn fma(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmadd_ps(a, b, c);
    fn max(a: __m512, b: __m512) -> __m512 = _mm512_max_ps(a, b);
    fn unless_below(x: __m512, limit: __m512, v: __m512) -> __m512 = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, limit), v);
    fn power_of_2(n: __m512) -> __m512 = _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_add_epi32(
        _mm512_cvtps_epi32(n),
        _mm512_set1_epi32(127),
    )));
    fn times_power_of_2(x: __m512, n: __m512) -> __m512 = _mm512_scalef_ps(x, n);
    fn exponent(x: __m512) -> __m512 = {
        let bits = _mm512_sub_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(ROOT as i32));
        _mm512_cvtepi32_ps(_mm512_srai_epi32::<23>(bits))
    };
    fn sums(v: [__m512; 4]) -> [f32; 4] = sums_256([fold(v[0]), fold(v[1]), fold(v[2]), fold(v[3])]);
    fn largest(v: __m512) -> f32 = {
        let (lower, upper) = halves(v);
        largest_256(_mm256_max_ps(lower, upper))
    };
    fn prefetch(p: *const u8) = _mm_prefetch::<_MM_HINT_T1>(p.cast());
});
