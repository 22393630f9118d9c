//! Where things lie in the state: blocks of 128 rows, each with the codes of its rows (in groups, as `simd/codes.rs`
//! reads them, every eighth row a group), their factors in bfloat16 in the order of the rows, and its centre in the
//! cache's type.

use std::ptr;

use half::bf16;
use retro_contract::SKETCH_BLOCK;

use crate::method::element::Element;
use crate::simd::{GROUP, place};

/// Rows of a block.
pub(super) const ROWS: usize = SKETCH_BLOCK;

/// Elements of a centre that are widened at once.
pub(super) const PART: usize = 64;

/// Groups of rows whose codes lie together.
pub(super) const GROUPS: usize = ROWS / GROUP;

/// Where a row of a block lies among its codes: group `r % 8`, lane `r / 8`. So the rows of a page of up to 8 are one
/// lane of as many vectors, and those of longer pages whole lanes side by side.
const fn slot(row: usize) -> usize {
    row % GROUPS * GROUP + row / GROUPS
}

/// Sizes and places of a block.
#[derive(Clone, Copy)]
pub(super) struct BlockLayout {
    /// D.
    pub head_size: usize,
    /// Bits of a code.
    pub bits: usize,
    /// Bytes of a row's codes.
    pub width: usize,
    /// Bytes of a block.
    pub bytes: usize,
}

impl BlockLayout {
    pub fn new<E: Element>(head_size: usize, bits: usize) -> Self {
        let width = head_size * bits / 8;
        Self {
            head_size,
            bits,
            width,
            bytes: ROWS * (width + 2) + head_size * size_of::<E>(),
        }
    }

    /// Blocks that hold `len` rows.
    pub fn blocks(&self, len: usize) -> usize {
        len.div_ceil(ROWS)
    }

    /// Rows of a block among the first `len` of all.
    pub fn rows_of(&self, block: usize, len: usize) -> usize {
        len.saturating_sub(block * ROWS).min(ROWS)
    }

    /// Writes a row's codes and factor into its block.
    pub fn write_row(&self, block: &mut [u8], row: usize, codes: &[u8], factor: bf16) {
        let slot = slot(row);
        let group = &mut block[slot / GROUP * GROUP * self.width..][..GROUP * self.width];
        for (byte, &code) in codes.iter().enumerate() {
            group[place(self.width, byte, slot % GROUP)] = code;
        }
        block[ROWS * self.width + 2 * row..][..2].copy_from_slice(&factor.to_bits().to_le_bytes());
    }

    /// The factors of a block's rows.
    #[inline(always)]
    pub fn factors<'a>(&self, block: &'a [u8]) -> impl Iterator<Item = f32> + 'a {
        let factors = block[ROWS * self.width..][..2 * ROWS].as_chunks::<2>().0;
        factors
            .iter()
            .map(|&bits| f32::from_bits(u32::from(u16::from_le_bytes(bits)) << 16))
    }

    /// The factors of a block's rows in the order of their codes.
    #[inline(always)]
    pub fn factors_of_slots(&self, block: &[u8], factors: &mut [f32; ROWS]) {
        let lanes = block[ROWS * self.width..][..2 * ROWS].as_chunks::<4>().0;
        // Two rows a word.
        for (pair, words) in factors.chunks_exact_mut(2 * GROUP).enumerate() {
            let (even, odd) = words.split_at_mut(GROUP);
            for (lane, (even, odd)) in even.iter_mut().zip(odd).enumerate() {
                let word = u32::from_le_bytes(lanes[lane * (GROUPS / 2) + pair]);
                (*even, *odd) = (f32::from_bits(word << 16), f32::from_bits(word & 0xffff_0000));
            }
        }
    }

    /// Writes a block's centre, rounded to `E`.
    pub fn write_centre<E: Element>(&self, block: &mut [u8], centre: &[f32]) {
        let size = size_of::<E>();
        let bytes = &mut block[ROWS * (self.width + 2)..][..self.head_size * size];
        for (numbers, bytes) in centre.chunks(PART).zip(bytes.chunks_mut(PART * size)) {
            let mut rounded = [E::default(); PART];
            E::narrow(numbers, &mut rounded[..numbers.len()]);
            // SAFETY: as many elements as the bytes hold; elements are plain numbers without padding.
            unsafe { ptr::copy_nonoverlapping(rounded.as_ptr().cast(), bytes.as_mut_ptr(), bytes.len()) };
        }
    }

    /// A block's centre: D elements, at any address.
    #[inline(always)]
    pub fn centre_bytes<'a, E>(&self, block: &'a [u8]) -> &'a [u8] {
        &block[ROWS * (self.width + 2)..][..self.head_size * size_of::<E>()]
    }

    /// Elements of a block's centre from `at` on, as many as are there of `numbers`: how many.
    #[inline(always)]
    pub fn centre<E: Element>(&self, block: &[u8], at: usize, numbers: &mut [f32; PART]) -> usize {
        let size = size_of::<E>();
        let count = PART.min(self.head_size - at);
        let bytes = &block[ROWS * (self.width + 2) + at * size..][..count * size];
        let mut elements = [E::default(); PART];
        // SAFETY: as many bytes as so many elements have; any bits are an element.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), elements.as_mut_ptr().cast(), bytes.len()) };
        E::widen_into(&elements[..count], &mut numbers[..count]);
        count
    }
}
