//! Vectors of f32, one implementation an instruction set, and the choice among them at run time.
//!
//! A kernel is written once, generic over [`Simd`], and compiled for every instruction set by the macro `dispatched!`,
//! whose functions carry the target features that make the intrinsics inside them single instructions.

#[expect(
    clippy::needless_range_loop,
    reason = "indices over small arrays that stay in registers"
)]
mod codes;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

pub(crate) use codes::{CodeIsa, Codes, GROUP, LARGEST, MOST_QUERIES, code_sums, place, query_place, query_words};
#[cfg(target_arch = "aarch64")]
pub(crate) use neon::Neon;
pub(crate) use portable::Portable;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

use std::sync::OnceLock;

use half::f16;

/// Instruction sets that the kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// Whatever every machine of the architecture has.
    Portable,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F besides.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "aarch64")]
    Neon,
}

impl Isa {
    /// The best one that this machine has.
    pub fn detect() -> Self {
        // Asked once: a virtual machine takes microseconds for an answer.
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| {
            let all = Self::all();
            #[cfg(target_arch = "x86_64")]
            if all.contains(&Self::Avx512) && x86::halves_wide_vectors() {
                return Self::Avx2;
            }
            all.last().copied().unwrap_or(Self::Portable)
        })
    }

    /// All that this machine has.
    pub fn all() -> &'static [Self] {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            if has!("avx2") && has!("fma") && has!("f16c") {
                const ALL: [Isa; 3] = [Isa::Portable, Isa::Avx2, Isa::Avx512];
                return if has!("avx512f") { &ALL } else { &ALL[..2] };
            }
        }
        #[cfg(target_arch = "aarch64")]
        if std::arch::is_aarch64_feature_detected!("neon") {
            return &[Self::Portable, Self::Neon];
        }
        &[Self::Portable]
    }

    /// The one to use for rows of `d` elements: wide vectors gain nothing where every row ends in a piece of one.
    pub fn for_rows(self, d: usize) -> Self {
        #[cfg(target_arch = "x86_64")]
        if self == Self::Avx512 && !d.is_multiple_of(16) {
            return Self::Avx2;
        }
        let _ = d;
        self
    }
}

/// Vectors of [`Simd::LANES`] floats.
///
/// # Safety
/// Every function needs the instruction set that the implementor stands for. Pointers need not be aligned; loads and
/// stores access [`Simd::LANES`] elements.
#[expect(
    clippy::missing_safety_doc,
    reason = "the trait's own section holds for every function"
)]
pub trait Simd: Copy {
    type V: Copy;
    const LANES: usize;

    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    /// Widens half floats.
    unsafe fn load_half(p: *const f16) -> Self::V;
    /// Integers as floats.
    unsafe fn load_int(p: *const i32) -> Self::V;
    /// Bytes as floats.
    unsafe fn load_byte(p: *const u8) -> Self::V;
    /// The lower and the upper halves of bytes, each as `(half - zero) * scale`.
    unsafe fn decode_halves(p: *const u8, zero: Self::V, scale: Self::V) -> [Self::V; 2];
    unsafe fn store(p: *mut f32, v: Self::V);
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// a * b + c, rounded once where the instruction set can.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger, lane by lane; `b` where one is NaN.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// 0 where `x < limit`, else `v`, also where `x` is NaN.
    unsafe fn unless_below(x: Self::V, limit: Self::V, v: Self::V) -> Self::V;
    /// 2^n for integers n in -126..=127; any number for others.
    unsafe fn power_of_2(n: Self::V) -> Self::V;
    /// `x` times 2^n, with n as in [`Simd::power_of_2`].
    unsafe fn times_power_of_2(x: Self::V, n: Self::V) -> Self::V;
    /// The integer n for which a positive normal number is `2^n` times one between sqrt(1/2) and sqrt(2).
    unsafe fn exponent(x: Self::V) -> Self::V;
    /// The sums of the lanes of four vectors, all added in one order.
    unsafe fn sums(v: [Self::V; 4]) -> [f32; 4];
    /// The largest lane.
    unsafe fn largest(v: Self::V) -> f32;
    /// Asks for the cache line at `p`, which may be any address, in the second-level cache. Not in the first: what is
    /// on its way there holds one of its few miss buffers for as long as memory takes, which bounds a core to half of
    /// what memory gives it (measured on Zen 4: 10 against 24 GB/s).
    unsafe fn prefetch(p: *const u8);
}

/// 1.5 * 2^23: adding it rounds to an integer.
const ROUND: f32 = 12_582_912.0;

/// e^x for x <= 0 to 2 units in the last place, the range of softmax; 0 below -87.3 and at
/// -inf, NaN of NaN, so that a broken model does not look whole (Cephes' polynomial).
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
pub(crate) unsafe fn exp<S: Simd>(x: S::V) -> S::V {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // SAFETY: the caller's promise.
    unsafe {
        let lowest = S::splat(-87.3);
        let round = S::splat(ROUND);
        // In this order: a NaN stays one.
        let clamped = S::max(lowest, x);
        let n = S::sub(S::fma(clamped, S::splat(std::f32::consts::LOG2_E), round), round);
        let r = S::fma(n, S::splat(-LN2_HIGH), clamped);
        let r = S::fma(n, S::splat(-LN2_LOW), r);
        let mut p = S::splat(1.987_569_1e-4);
        for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            p = S::fma(p, r, S::splat(c));
        }
        let p = S::fma(p, S::mul(r, r), S::add(r, S::splat(1.0)));
        S::unless_below(x, lowest, S::times_power_of_2(p, n))
    }
}

/// e^x for x <= 0 to 4e-6 and 1 for 0, in fewer steps than [`exp`]: for estimates, which are far further off. 0 below -87.3
/// and at -inf, NaN of NaN.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
pub(crate) unsafe fn exp_of_estimate<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the caller's promise.
    unsafe {
        let t = S::mul(x, S::splat(std::f32::consts::LOG2_E));
        let n = S::sub(S::add(t, S::splat(ROUND)), S::splat(ROUND));
        let f = S::sub(t, n);
        // 2^f - 1 = f p(f), by the least largest error on -1/2 to 1/2.
        let mut p = S::splat(9.582_853e-3);
        for c in [5.590_642_5e-2, 2.402_41e-1, 6.931_242e-1, 1.0] {
            p = S::fma(p, f, S::splat(c));
        }
        S::unless_below(x, S::splat(-87.3), S::times_power_of_2(p, n))
    }
}

/// The bits of sqrt(1/2).
const ROOT: u32 = 0x3f35_04f3;

/// The natural logarithm of a positive normal number to 2 units in the last place, NaN of NaN and of infinity (Cephes'
/// polynomial).
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
pub(crate) unsafe fn ln<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the caller's promise.
    unsafe {
        let (zero, n) = (S::splat(0.0), S::exponent(x));
        let f = S::sub(S::mul(x, S::power_of_2(S::sub(zero, n))), S::splat(1.0));
        ln_of_parts::<S>(x, n, f)
    }
}

/// The natural logarithm of 1 + x for x >= 0, as [`ln`]: for small x as exact as x.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
pub(crate) unsafe fn ln_1p<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the caller's promise.
    unsafe {
        let n = S::exponent(S::add(S::splat(1.0), x));
        let scale = S::power_of_2(S::sub(S::splat(0.0), n));
        // Exactly x where n is 0.
        let f = S::fma(x, scale, S::sub(scale, S::splat(1.0)));
        ln_of_parts::<S>(x, n, f)
    }
}

/// The natural logarithm of `2^n (1 + f)`, NaN where `x` is no number.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
unsafe fn ln_of_parts<S: Simd>(x: S::V, n: S::V, f: S::V) -> S::V {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // SAFETY: the caller's promise.
    unsafe {
        let mut p = S::splat(7.037_683_6e-2);
        for c in [
            -1.151_461e-1,
            1.167_699_9e-1,
            -1.242_014_1e-1,
            1.424_932_3e-1,
            -1.666_805_8e-1,
            2.000_071_5e-1,
            -2.499_999_4e-1,
            3.333_333e-1,
        ] {
            p = S::fma(p, f, S::splat(c));
        }
        let square = S::mul(f, f);
        let rest = S::fma(n, S::splat(LN2_LOW), S::mul(S::splat(-0.5), square));
        let rest = S::fma(S::mul(p, f), square, rest);
        let ln = S::fma(n, S::splat(LN2_HIGH), S::add(f, rest));
        // What is no number stays none.
        S::fma(S::splat(0.0), x, ln)
    }
}

/// Defines `fn name(isa, args...)`, which runs `body::<S, T, ...>` compiled for `isa`. `$body` is an `unsafe fn` that
/// is always inlined and asks of its caller nothing but the instruction set.
macro_rules! dispatched {
    ($(#[$doc:meta])* $vis:vis fn $name:ident $(<$($g:ident : $bound:path),+>)? ($($arg:ident : $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:ident) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name $(<$($g: $bound),+>)? (isa: $crate::simd::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            #[allow(clippy::too_many_arguments)]
            fn avx2 $(<$($g: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: this function's own target features.
                unsafe { $body::<$crate::simd::Avx2 $($(, $g)+)?>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx2,fma,f16c")]
            #[allow(clippy::too_many_arguments)]
            fn avx512 $(<$($g: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: this function's own target features.
                unsafe { $body::<$crate::simd::Avx512 $($(, $g)+)?>($($arg),*) }
            }
            match isa {
                // SAFETY: what every machine of the architecture has.
                $crate::simd::Isa::Portable => unsafe { $body::<$crate::simd::Portable $($(, $g)+)?>($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `Isa::detect` gives Avx2 only where these features are.
                $crate::simd::Isa::Avx2 => unsafe { avx2$(::<$($g),+>)?($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                $crate::simd::Isa::Avx512 => unsafe { avx512$(::<$($g),+>)?($($arg),*) },
                #[cfg(target_arch = "aarch64")]
                // SAFETY: NEON is part of the architecture's baseline.
                $crate::simd::Isa::Neon => unsafe { $body::<$crate::simd::Neon $($(, $g)+)?>($($arg),*) },
            }
        }
    };
}
pub(crate) use dispatched;

/// Implements [`Simd`] from one expression a function.
macro_rules! implement {
    ($set:ty, $vector:ty, $lanes:literal, { $(fn $name:ident($($arg:ident : $ty:ty),*) $(-> $ret:ty)? = $body:expr;)* }) => {
        impl $crate::simd::Simd for $set {
            type V = $vector;
            const LANES: usize = $lanes;
            $(
                #[inline(always)]
                unsafe fn $name($($arg: $ty),*) $(-> $ret)? {
                    // SAFETY: the caller has the instruction set, and promises valid pointers.
                    #[allow(unused_unsafe)]
                    unsafe { $body }
                }
            )*
        }
    };
}
use implement;

#[cfg(test)]
mod tests {
    use super::*;

    dispatched! {
        fn exp_all(values: &mut [f32]) = exp_all_body
    }

    #[inline(always)]
    unsafe fn exp_all_body<S: Simd>(values: &mut [f32]) {
        for chunk in values.chunks_exact_mut(S::LANES) {
            // SAFETY: the chunk has LANES elements; the instruction set is the caller's promise.
            unsafe { S::store(chunk.as_mut_ptr(), exp::<S>(S::load(chunk.as_ptr()))) };
        }
    }

    /// What a passing test prints with `println!` is shown to nobody.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn loops_that_this_machine_has_no_instructions_for_are_named() {
        use std::io::Write;
        for isa in [Isa::Avx2, Isa::Avx512] {
            if !Isa::all().contains(&isa) {
                let _ = writeln!(
                    std::io::stderr(),
                    "NOT TESTED: the loops for {isa:?}, which this machine does not have"
                );
            }
        }
    }

    dispatched! {
        fn exp_all_of_estimates(values: &mut [f32]) = exp_all_of_estimates_body
    }

    #[inline(always)]
    unsafe fn exp_all_of_estimates_body<S: Simd>(values: &mut [f32]) {
        for chunk in values.chunks_exact_mut(S::LANES) {
            // SAFETY: the chunk has LANES elements; the instruction set is the caller's promise.
            unsafe { S::store(chunk.as_mut_ptr(), exp_of_estimate::<S>(S::load(chunk.as_ptr()))) };
        }
    }

    #[test]
    fn exp_is_close_and_ends_at_zero() {
        check_exp(exp_all, 2.5e-7, 0.0);
        // Its argument in powers of two is rounded once.
        check_exp(exp_all_of_estimates, 4e-6, 1.2e-7);
    }

    /// `error`: how far it may be off, and how much further for each unit of x.
    fn check_exp(exp_all: fn(Isa, &mut [f32]), error: f64, growth: f64) {
        let inputs: Vec<f32> = (0..87_200).map(|i| -(i as f32) * 1e-3).collect();
        for &isa in Isa::all() {
            let mut got = inputs.clone();
            exp_all(isa, &mut got);
            for (x, got) in inputs.iter().zip(got) {
                let want = f64::from(*x).exp();
                assert!(
                    (f64::from(got) - want).abs() <= (error - growth * f64::from(*x)) * want,
                    "{isa:?} {x}: {got} {want}"
                );
            }
            let mut ends = [-1000.0; 16];
            ends[1] = f32::NEG_INFINITY;
            ends[2] = 0.0;
            exp_all(isa, &mut ends);
            assert_eq!(ends[..3], [0.0, 0.0, 1.0], "{isa:?}");
            let mut nan = [f32::NAN; 16];
            exp_all(isa, &mut nan);
            assert!(nan.iter().all(|x| x.is_nan()), "{isa:?}");
        }
    }

    dispatched! {
        fn ln_1p_all(values: &mut [f32]) = ln_1p_all_body
    }

    #[inline(always)]
    unsafe fn ln_1p_all_body<S: Simd>(values: &mut [f32]) {
        for chunk in values.chunks_exact_mut(S::LANES) {
            // SAFETY: the chunk has LANES elements; the instruction set is the caller's promise.
            unsafe { S::store(chunk.as_mut_ptr(), ln_1p::<S>(S::load(chunk.as_ptr()))) };
        }
    }

    #[test]
    fn ln_1p_is_close_however_small() {
        let inputs: Vec<f32> = (0..4096).map(|i| (1e-37 * 1.022f64.powi(i)) as f32).collect();
        assert!(inputs[4095] > 16.0 && inputs[4095] < 1e6, "{}", inputs[4095]);
        for &isa in Isa::all() {
            let mut got = inputs.clone();
            ln_1p_all(isa, &mut got);
            for (x, got) in inputs.iter().zip(got) {
                let want = f64::from(*x).ln_1p();
                assert!(
                    (f64::from(got) - want).abs() <= 3e-7 * want,
                    "{isa:?} {x}: {got} {want}"
                );
            }
            let mut ends = [0.0; 16];
            (ends[1], ends[2]) = (f32::NAN, f32::INFINITY);
            ln_1p_all(isa, &mut ends);
            assert_eq!(ends[0], 0.0, "{isa:?}");
            assert!(ends[1].is_nan() && ends[2].is_nan(), "{isa:?}");
        }
    }

    dispatched! {
        fn ln_all(values: &mut [f32]) = ln_all_body
    }

    #[inline(always)]
    unsafe fn ln_all_body<S: Simd>(values: &mut [f32]) {
        for chunk in values.chunks_exact_mut(S::LANES) {
            // SAFETY: the chunk has LANES elements; the instruction set is the caller's promise.
            unsafe { S::store(chunk.as_mut_ptr(), ln::<S>(S::load(chunk.as_ptr()))) };
        }
    }

    #[test]
    fn ln_is_close() {
        let inputs: Vec<f32> = (0..200_000)
            .map(|i| 1e-3 * 1.0001f32.powi(i % 150_000) + i as f32 * 1e-3)
            .collect();
        for &isa in Isa::all() {
            let mut got = inputs.clone();
            ln_all(isa, &mut got);
            for (x, got) in inputs.iter().zip(got) {
                let want = f64::from(*x).ln();
                assert!(
                    (f64::from(got) - want).abs() <= 2.5e-7 * want.abs().max(0.1),
                    "{isa:?} {x}: {got} {want}"
                );
            }
            let mut ends = [1.0; 16];
            (ends[1], ends[2]) = (f32::NAN, f32::INFINITY);
            ln_all(isa, &mut ends);
            assert_eq!(ends[0], 0.0, "{isa:?}");
            assert!(ends[1].is_nan() && ends[2].is_nan(), "{isa:?}");
        }
    }

    dispatched! {
        fn all_sums(values: &[f32]) -> [f32; 4] = sums_body
    }

    #[inline(always)]
    unsafe fn sums_body<S: Simd>(values: &[f32]) -> [f32; 4] {
        let n = values.len() / 4;
        // SAFETY: four runs of 16 elements, LANES at most; the instruction set is the caller's promise.
        unsafe {
            let load = |i: usize| {
                let mut sum = S::splat(0.0);
                for at in (0..n).step_by(S::LANES) {
                    sum = S::add(sum, S::load(values[i * n + at..].as_ptr()));
                }
                sum
            };
            S::sums([load(0), load(1), load(2), load(3)])
        }
    }

    #[test]
    fn sums_add_every_lane() {
        let values: Vec<f32> = (0..64).map(|i| (i * i % 37) as f32).collect();
        let want: Vec<f32> = values.chunks(16).map(|c| c.iter().sum()).collect();
        for &isa in Isa::all() {
            assert_eq!(all_sums(isa, &values).to_vec(), want, "{isa:?}");
        }
    }
}
