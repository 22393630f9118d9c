//! The two loops that all time goes to, on a tile that stays in registers: products of R rows with K keys, and sums of
//! weighted values for R rows. A key or value is loaded, and converted if it is a half float, once for all R rows.

use super::element::Element;
use crate::simd::Simd;

/// Rows of a tile at most.
pub(crate) const ROWS: usize = 4;

/// Longest vector of any instruction set.
const MOST_LANES: usize = 16;

/// Keys of a tile, and vectors of a value: as many as the registers hold.
pub(crate) const fn keys_of_tile<S: Simd>() -> usize {
    // Sixteen registers with 8 lanes (AVX2), thirty-two with 16 (AVX-512) and with 4 (NEON).
    if S::LANES == 8 { 2 } else { 4 }
}

/// Rows that are needed soon. They are asked for a few cache lines at a time, between the arithmetic on those before
/// them: many at once wait for one another, and what is computed for them.
#[derive(Clone, Copy)]
pub(crate) struct Ahead<'a, E> {
    pub cache: *const E,
    /// Where they begin in the cache.
    pub rows: &'a [usize],
}

impl<E> Ahead<'_, E> {
    /// Nothing is known to be needed.
    pub const NONE: Self = Self {
        cache: std::ptr::null(),
        rows: &[],
    };

    /// Whether rows are asked for line by line within the loops: vectors as long as a line have the instructions to
    /// spare; for shorter ones a row's lines are asked for together.
    const fn is_spread<S: Simd>() -> bool {
        S::LANES >= 16
    }

    /// Asks for the `count` elements from `at` on of row `t`, if there is one.
    ///
    /// # Safety
    /// The machine has the instruction set.
    #[inline(always)]
    unsafe fn ask<S: Simd>(self, t: usize, at: usize, count: usize) {
        let (from, bytes) = (at * size_of::<E>(), count * size_of::<E>());
        // Not once more for each piece of a line.
        if bytes < 64 && from % 64 >= bytes {
            return;
        }
        let Some(&row) = self.rows.get(t) else { return };
        let row = self.cache.wrapping_add(row).cast::<u8>();
        for line in (0..bytes).step_by(64) {
            // SAFETY: a hint, for any address.
            unsafe { S::prefetch(row.wrapping_add(from + line)) };
        }
    }
}

/// The first `n` elements at `p`, then zeros.
///
/// # Safety
/// `p` points to `n` elements, `n` is less than `S::LANES`, and the machine has the instruction set.
#[inline(always)]
unsafe fn load_some<S: Simd, E: Element>(p: *const E, n: usize) -> S::V {
    let mut buffer = [E::default(); MOST_LANES];
    // SAFETY: the buffer is as long as any vector.
    unsafe {
        std::ptr::copy_nonoverlapping(p, buffer.as_mut_ptr(), n);
        E::load::<S>(buffer.as_ptr())
    }
}

/// Products of R rows of `d` floats, `stride` apart, with K keys: `[row][key]`. Every product is summed in the same
/// order. With `SQUARED` of the keys' squares. Asks for K rows `ahead` meanwhile.
///
/// # Safety
/// Rows and keys have `d` elements, and the machine has the instruction set.
#[inline(always)]
pub(crate) unsafe fn products<S: Simd, E: Element, const R: usize, const K: usize, const SQUARED: bool>(
    rows: *const f32,
    stride: usize,
    keys: [*const E; K],
    d: usize,
    ahead: Ahead<'_, E>,
) -> [[f32; K]; R] {
    // SAFETY: the caller's promise; `at` stays below `d`.
    unsafe {
        if !Ahead::<E>::is_spread::<S>() {
            for j in 0..K {
                ahead.ask::<S>(j, 0, d);
            }
        }
        let mut sums = [[S::splat(0.0); K]; R];
        let whole = d - d % S::LANES;
        let mut at = 0;
        while at < whole {
            if Ahead::<E>::is_spread::<S>() {
                for j in 0..K {
                    ahead.ask::<S>(j, at, S::LANES);
                }
            }
            let mut k = [S::splat(0.0); K];
            for j in 0..K {
                k[j] = E::load::<S>(keys[j].add(at));
                if SQUARED {
                    k[j] = S::mul(k[j], k[j]);
                }
            }
            for r in 0..R {
                let q = S::load(rows.add(r * stride + at));
                for j in 0..K {
                    sums[r][j] = S::fma(q, k[j], sums[r][j]);
                }
            }
            at += S::LANES;
        }
        if at < d {
            for j in 0..K {
                let mut k = load_some::<S, E>(keys[j].add(at), d - at);
                if SQUARED {
                    k = S::mul(k, k);
                }
                for r in 0..R {
                    let q = load_some::<S, f32>(rows.add(r * stride + at), d - at);
                    sums[r][j] = S::fma(q, k, sums[r][j]);
                }
            }
        }
        let mut out = [[0.0; K]; R];
        let mut i = 0;
        while i < R * K {
            let of = |n: usize| {
                let n = if i + n < R * K { i + n } else { i };
                sums[n / K][n % K]
            };
            let four = S::sums([of(0), of(1), of(2), of(3)]);
            let mut n = 0;
            while n < 4 && i + n < R * K {
                out[(i + n) / K][(i + n) % K] = four[n];
                n += 1;
            }
            i += 4;
        }
        out
    }
}

/// `acc[r] = shrink[r] * acc[r] + sum over t of weights[r][t] * values[t]` for R rows of `d` floats. Asks
/// for as many rows `ahead` meanwhile.
///
/// # Safety
/// `acc` has R rows of `d` floats, `weights` R rows of a float a token, `weights_stride` apart, `starts` says where in
/// `values` the tokens' rows of `d` elements begin, and the machine has the instruction set.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "the operands of one loop")]
pub(crate) unsafe fn accumulate<S: Simd, E: Element, const R: usize>(
    acc: *mut f32,
    shrink: [f32; R],
    weights: *const f32,
    weights_stride: usize,
    values: *const E,
    starts: &[usize],
    d: usize,
    ahead: Ahead<'_, E>,
) {
    // SAFETY: the caller's promise; `at` and the vectors from it on stay below `d`.
    unsafe {
        let operands = (acc, shrink, weights, weights_stride, values, starts, d);
        let mut at = 0;
        while at + 4 * S::LANES <= d && keys_of_tile::<S>() == 4 {
            columns::<S, E, R, 4>(operands, ahead, at);
            at += 4 * S::LANES;
        }
        while at + 2 * S::LANES <= d {
            columns::<S, E, R, 2>(operands, ahead, at);
            at += 2 * S::LANES;
        }
        while at + S::LANES <= d {
            columns::<S, E, R, 1>(operands, ahead, at);
            at += S::LANES;
        }
        while at < d {
            for (r, shrink) in shrink.iter().enumerate() {
                let mut sum = *acc.add(r * d + at) * shrink;
                for (t, &start) in starts.iter().enumerate() {
                    sum += *weights.add(r * weights_stride + t) * (*values.add(start + at)).to_f32();
                }
                *acc.add(r * d + at) = sum;
            }
            at += 1;
        }
    }
}

type Operands<'a, E, const R: usize> = (*mut f32, [f32; R], *const f32, usize, *const E, &'a [usize], usize);

/// [`accumulate`] for C vectors from element `at` on.
///
/// # Safety
/// As [`accumulate`], and `at + C * S::LANES` is at most `d`.
#[inline(always)]
unsafe fn columns<S: Simd, E: Element, const R: usize, const C: usize>(
    operands: Operands<'_, E, R>,
    ahead: Ahead<'_, E>,
    at: usize,
) {
    let (acc, shrink, weights, weights_stride, values, starts, d) = operands;
    // SAFETY: the caller's promise.
    unsafe {
        if !Ahead::<E>::is_spread::<S>() {
            // This group's share of the rows.
            for t in at * starts.len() / d..(at + C * S::LANES) * starts.len() / d {
                ahead.ask::<S>(t, 0, d);
            }
        }
        let mut sums = [[S::splat(0.0); C]; R];
        for r in 0..R {
            for c in 0..C {
                sums[r][c] = S::mul(S::load(acc.add(r * d + at + c * S::LANES)), S::splat(shrink[r]));
            }
        }
        for (t, &start) in starts.iter().enumerate() {
            if Ahead::<E>::is_spread::<S>() {
                ahead.ask::<S>(t, at, C * S::LANES);
            }
            let value = values.add(start + at);
            let mut v = [S::splat(0.0); C];
            for c in 0..C {
                v[c] = E::load::<S>(value.add(c * S::LANES));
            }
            for r in 0..R {
                let w = S::splat(*weights.add(r * weights_stride + t));
                for c in 0..C {
                    sums[r][c] = S::fma(w, v[c], sums[r][c]);
                }
            }
        }
        for r in 0..R {
            for c in 0..C {
                S::store(acc.add(r * d + at + c * S::LANES), sums[r][c]);
            }
        }
    }
}
