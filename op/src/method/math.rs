//! The few vector primitives that everything else is made of, compiled for the machine at hand.
//!
//! Each primitive is written once, as loops over fixed lanes that the compiler turns into SIMD, and compiled twice: for
//! the baseline and for AVX2 with FMA. [`Isa::detect`] picks at run time.

/// Instruction sets that the primitives are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    Baseline,
    #[cfg(target_arch = "x86_64")]
    Avx2,
}

impl Isa {
    /// The best one that this machine has.
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
            return Self::Avx2;
        }
        Self::Baseline
    }
}

/// Defines `fn name(isa, args...)`, which runs `$body` compiled for `isa`; `$body` is generic over `const FMA: bool`.
macro_rules! dispatched {
    ($(#[$doc:meta])* $vis:vis fn $name:ident $(<$($g:ident : $bound:path),+>)? ($($arg:ident : $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:ident) => {
        $(#[$doc])*
        #[inline]
        #[allow(clippy::too_many_arguments)]
        $vis fn $name $(<$($g: $bound),+>)? (isa: $crate::method::math::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            #[allow(clippy::too_many_arguments)]
            fn avx2 $(<$($g: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? {
                $body::<true $($(, $g)+)?>($($arg),*)
            }
            match isa {
                $crate::method::math::Isa::Baseline => $body::<false $($(, $g)+)?>($($arg),*),
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `Isa::detect` returns Avx2 only where AVX2 and FMA are there.
                $crate::method::math::Isa::Avx2 => unsafe { avx2($($arg),*) },
            }
        }
    };
}
pub(crate) use dispatched;

const LANES: usize = 16;

/// a * b + c: fused where the instruction set has it (a libm call elsewhere, hence the switch).
#[inline(always)]
pub(crate) fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

#[inline(always)]
fn reduce(mut lanes: [f32; LANES]) -> f32 {
    let mut n = LANES;
    while n > 1 {
        n /= 2;
        for i in 0..n {
            lanes[i] += lanes[i + n];
        }
    }
    lanes[0]
}

/// Dot product of two slices of the same length.
#[inline(always)]
pub(crate) fn dot<const FMA: bool>(a: &[f32], b: &[f32]) -> f32 {
    let mut acc = [0.0; LANES];
    let (a, a_tail) = a.as_chunks::<LANES>();
    let (b, b_tail) = b.as_chunks::<LANES>();
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            acc[i] = fma::<FMA>(a[i], b[i], acc[i]);
        }
    }
    let tail: f32 = a_tail.iter().zip(b_tail).map(|(a, b)| a * b).sum();
    reduce(acc) + tail
}

/// Adds `sum_j weights[j] * rows[j]` to `acc`; `rows` holds `weights.len()` rows of `acc.len()` elements.
#[inline(always)]
pub(crate) fn add_weighted_rows<const FMA: bool>(acc: &mut [f32], weights: &[f32], rows: &[f32]) {
    let d = acc.len();
    let (chunks, tail) = acc.as_chunks_mut::<{ 2 * LANES }>();
    let done = chunks.len() * 2 * LANES;
    for (c, chunk) in chunks.iter_mut().enumerate() {
        let mut sum = *chunk;
        for (&w, row) in weights.iter().zip(rows.chunks_exact(d)) {
            let row = &row[c * 2 * LANES..][..2 * LANES];
            for i in 0..2 * LANES {
                sum[i] = fma::<FMA>(w, row[i], sum[i]);
            }
        }
        *chunk = sum;
    }
    for (&w, row) in weights.iter().zip(rows.chunks_exact(d)) {
        for (a, &v) in tail.iter_mut().zip(&row[done..]) {
            *a += w * v;
        }
    }
}

/// Multiplies every element.
#[inline(always)]
pub(crate) fn scale_all(values: &mut [f32], by: f32) {
    for v in values {
        *v *= by;
    }
}

/// e^x in f32 to 2 units in the last place for x <= 0, the range of softmax; 0 below -87.3 and at -inf, NaN of NaN.
/// Written without calls or branches so that loops over it vectorise (Cephes' polynomial).
#[inline(always)]
pub(crate) fn exp_nonpositive<const FMA: bool>(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
    const LOWEST: f32 = -87.3;
    // Not `max`, which would turn the NaN of a broken model into a small weight.
    let clamped = if x < LOWEST { LOWEST } else { x };
    let n = fma::<FMA>(clamped, LOG2_E, ROUND) - ROUND;
    let r = fma::<FMA>(n, -LN2_HIGH, clamped);
    let r = fma::<FMA>(n, -LN2_LOW, r);
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = fma::<FMA>(p, r, c);
    }
    let p = fma::<FMA>(p, r * r, r + 1.0);
    // n is an integer in -126..=0: 2^n by its exponent bits.
    let power = f32::from_bits((((n as i32) + 127) << 23) as u32);
    if x < LOWEST { 0.0 } else { p * power }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_and_ends_at_zero() {
        for i in 0..=87_000 {
            let x = -(i as f32) * 1e-3;
            for got in [exp_nonpositive::<false>(x), exp_nonpositive::<true>(x)] {
                let want = f64::from(x).exp();
                assert!((f64::from(got) - want).abs() <= 2.5e-7 * want, "{x}: {got} {want}");
            }
        }
        assert_eq!(exp_nonpositive::<false>(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp_nonpositive::<false>(-1000.0), 0.0);
        assert_eq!(exp_nonpositive::<false>(0.0), 1.0);
        assert!(exp_nonpositive::<false>(f32::NAN).is_nan());
    }

    #[test]
    fn primitives_take_any_length() {
        for n in [1, 7, 16, 31, 32, 33, 80, 128] {
            let a: Vec<f32> = (0..n).map(|i| i as f32 * 0.5 - 3.0).collect();
            let b: Vec<f32> = (0..n).map(|i| 2.0 - i as f32 * 0.25).collect();
            let want: f32 = a.iter().zip(&b).map(|(x, y)| x * y).sum();
            assert!((dot::<false>(&a, &b) - want).abs() <= 1e-4 * want.abs().max(1.0));
            let rows: Vec<f32> = a.iter().chain(&b).copied().collect();
            let mut acc = vec![1.0; n];
            add_weighted_rows::<false>(&mut acc, &[2.0, -1.0], &rows);
            for i in 0..n {
                assert!((acc[i] - (1.0 + 2.0 * a[i] - b[i])).abs() < 1e-4);
            }
        }
    }
}
