//! Keys to sketches.

use std::ops::Range;

use half::bf16;

use super::block::{BlockLayout, PART, ROWS};
use crate::method::element::Element;
use crate::selector::Written;
use crate::selector::rotation::rotate;
use crate::simd::{Isa, Simd, dispatched};

/// Makes the centres of the blocks that a call begins, each the mean of the 128 rows before it. The first block's is 0
/// and not kept.
pub(super) fn centres<E: Element>(
    layout: BlockLayout,
    written: Written,
    keys: &[E],
    state: &mut [u8],
    scratch: &mut Vec<f32>,
) {
    let d = layout.head_size;
    for block in written.appended.div_ceil(ROWS).max(1)..layout.blocks(written.len) {
        scratch.clear();
        scratch.resize(2 * d, 0.0);
        let (sum, buffer) = scratch.split_at_mut(d);
        for key in keys[(block - 1) * ROWS * d..block * ROWS * d].chunks_exact(d) {
            sum.iter_mut().zip(E::widen(key, buffer)).for_each(|(sum, x)| *sum += x);
        }
        sum.iter_mut().for_each(|sum| *sum *= 1.0 / ROWS as f32);
        layout.write_centre::<E>(&mut state[block * layout.bytes..][..layout.bytes], sum);
    }
}

/// Sketches rows.
pub(super) fn rows<E: Element>(
    layout: BlockLayout,
    rows: Range<usize>,
    keys: &[E],
    state: &mut [u8],
    scratch: &mut Vec<f32>,
) {
    rows_kernel::<E>(Isa::detect(), layout, rows, keys, state, scratch);
}

dispatched! {
    fn rows_kernel<E: Element>(
        layout: BlockLayout, rows: Range<usize>, keys: &[E], state: &mut [u8], scratch: &mut Vec<f32>,
    ) = rows_body
}

/// # Safety
/// The machine has the instruction set.
#[inline(always)]
#[expect(
    clippy::extra_unused_type_parameters,
    reason = "plain loops, compiled for the instruction set that it stands for"
)]
unsafe fn rows_body<S: Simd, E: Element>(
    layout: BlockLayout,
    rows: Range<usize>,
    keys: &[E],
    state: &mut [u8],
    scratch: &mut Vec<f32>,
) {
    let d = layout.head_size;
    scratch.clear();
    scratch.resize(2 * d + (d + layout.width).div_ceil(4), 0.0);
    let (centre, rest) = scratch.split_at_mut(d);
    let (key, codes) = rest.split_at_mut(d);
    // SAFETY: floats are four bytes each, and any bits are bytes.
    let bytes = unsafe { std::slice::from_raw_parts_mut(codes.as_mut_ptr().cast::<u8>(), d + layout.width) };
    let (codes, packed) = bytes.split_at_mut(d);
    let mut centre_of = None;
    for row in rows {
        let (block, within) = (row / ROWS, row % ROWS);
        let state = &mut state[block * layout.bytes..][..layout.bytes];
        if centre_of != Some(block) {
            centre.fill(0.0);
            if block > 0 {
                let mut part = [0.0; PART];
                for at in (0..d).step_by(PART) {
                    let count = layout.centre::<E>(state, at, &mut part);
                    centre[at..][..count].copy_from_slice(&part[..count]);
                }
            }
            centre_of = Some(block);
        }
        E::widen_into(&keys[row * d..][..d], key);
        key.iter_mut().zip(centre.iter()).for_each(|(x, c)| *x -= c);
        rotate(key);
        let factor = match layout.bits {
            1 => encode::<1>(key, codes, packed),
            _ => encode::<2>(key, codes, packed),
        };
        layout.write_row(state, within, packed, factor);
    }
}

/// The codes of a rotated key, a byte each and packed, and its factor. Code c stands for the odd number
/// `2 c + 1 - 2^BITS`.
#[inline(always)]
fn encode<const BITS: usize>(key: &[f32], codes: &mut [u8], packed: &mut [u8]) -> bf16 {
    let squares = sum(key, |x| x * x);
    let tau = (squares / key.len() as f32).sqrt();
    // A number that is none has any code: its factor says so. -3, -1, 1 and 3 are 0 to 3.
    for (code, &x) in codes.iter_mut().zip(key) {
        let (positive, far) = (u8::from(x >= 0.0), u8::from(x.abs() >= tau));
        *code = if BITS == 1 {
            positive
        } else {
            positive << 1 | u8::from(positive == far)
        };
    }
    for (byte, codes) in packed.iter_mut().zip(codes.chunks_exact(8 / BITS)) {
        *byte = codes.iter().rev().fold(0, |byte, code| byte << BITS | code);
    }
    if squares == 0.0 {
        return bf16::ZERO;
    }
    // Each element's sign is its code's.
    let along = sum(key, |x| {
        let x = x.abs();
        if BITS == 2 && x >= tau { 3.0 * x } else { x }
    });
    let factor = squares / along;
    if factor.is_finite() {
        bf16::from_f32(factor)
    } else {
        bf16::NAN
    }
}

/// The sum of a function of the elements, in eight lanes.
#[inline(always)]
fn sum(key: &[f32], of: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; 8];
    let (whole, rest) = key.as_chunks::<8>();
    for chunk in whole {
        lanes.iter_mut().zip(chunk).for_each(|(lane, &x)| *lane += of(x));
    }
    lanes.iter_mut().zip(rest).for_each(|(lane, &x)| *lane += of(x));
    lanes.iter().sum()
}
