//! Queries as the scores need them: as they are, for the products with centres; and rotated, in 16 bits, for those with
//! codes.

use crate::selector::rotation::rotate;
use crate::simd::{Isa, LARGEST, Simd, dispatched, query_place, query_words};

/// A head's query, prepared.
#[derive(Clone, Copy)]
pub(super) struct Prepared<'a> {
    /// D elements, after RoPE and not scaled.
    pub plain: &'a [f32],
    /// What a step of the quantised elements stands for.
    pub step: f32,
    /// The sum of the quantised elements.
    pub total: f32,
    /// The quantised elements' high bytes, then their low ones, as `code_sums` takes them.
    pub quantised: &'a [i32],
}

const NUMBERS: usize = 2;

fn words(head_size: usize, bits: usize) -> usize {
    query_words(head_size * bits / 8, bits)
}

/// Floats of a prepared head.
pub(super) fn prepared_len(head_size: usize, bits: usize) -> usize {
    head_size + NUMBERS + 2 * words(head_size, bits)
}

/// Head `head` of those in `prepared`.
pub(super) fn of_head(prepared: &[f32], head: usize, head_size: usize, bits: usize) -> Prepared<'_> {
    let len = prepared_len(head_size, bits);
    let (plain, rest) = prepared[head * len..][..len].split_at(head_size);
    let (numbers, quantised) = rest.split_at(NUMBERS);
    Prepared {
        plain,
        step: numbers[0],
        total: numbers[1],
        // SAFETY: floats and integers of 32 bits have one size and alignment, and any bits are an integer.
        quantised: unsafe { std::slice::from_raw_parts(quantised.as_ptr().cast::<i32>(), quantised.len()) },
    }
}

/// Appends a head's query, prepared. A query with a NaN or an infinity has the step NaN, and so do all its scores.
pub(super) fn prepare_head(isa: Isa, query: &[f32], bits: usize, prepared: &mut Vec<f32>) {
    head_kernel(isa, query, bits, prepared);
}

dispatched! {
    fn head_kernel(query: &[f32], bits: usize, prepared: &mut Vec<f32>) = head_body
}

/// # Safety
/// The machine has the instruction set.
#[inline(always)]
#[expect(
    clippy::extra_unused_type_parameters,
    reason = "plain loops, compiled for the instruction set that it stands for"
)]
unsafe fn head_body<S: Simd>(query: &[f32], bits: usize, prepared: &mut Vec<f32>) {
    let (d, start, words) = (query.len(), prepared.len(), words(query.len(), bits));
    prepared.extend_from_slice(query);
    rotate(&mut prepared[start..]);
    let rotated = &mut prepared[start..];
    let finite = rotated.iter().fold(true, |all, x| all & x.is_finite());
    let largest = rotated
        .iter()
        .fold(0.0f32, |most, x| if x.abs() > most { x.abs() } else { most });
    let step = if finite { largest / LARGEST as f32 } else { f32::NAN };
    let by = if step > 0.0 { 1.0 / step } else { 0.0 };
    // A step that is too small to divide by rounds to nothing.
    let by = if by.is_finite() { by } else { 0.0 };
    let limit = LARGEST as f32;
    rotated
        .iter_mut()
        .for_each(|x| *x = (*x * by).round_ties_even().clamp(-limit, limit));
    prepared.extend([step, 0.0]);
    prepared.resize(start + prepared_len(d, bits), 0.0);
    let (rotated, rest) = prepared[start..].split_at_mut(d);
    let (numbers, quantised) = rest.split_at_mut(NUMBERS);
    let mut total = 0;
    for (e, &x) in rotated.iter().enumerate() {
        // 0 of a NaN.
        let q = x as i32;
        total += q;
        let high = (q + 128) >> 8;
        let (word, byte) = query_place(e, bits);
        for (word, part) in [(word, high), (words + word, q - 256 * high)] {
            let bits = quantised[word].to_bits() | u32::from(part as i8 as u8) << (8 * byte);
            quantised[word] = f32::from_bits(bits);
        }
    }
    numbers[1] = total as f32;
    rotated.copy_from_slice(query);
}
