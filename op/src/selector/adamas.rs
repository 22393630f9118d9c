//! Selectors `adamas` and `adamas_rms`, for comparison: queries and keys in two bits an element after the rotation, and
//! the distance between their codes.
//!
//! Source: Adamas (arXiv 2510.18413) and its code. docs/method.md states the arithmetic. A page is scored by its best
//! token, so that pages of one token are the paper's tokens.

use std::ops::Range;

use retro_contract::SKETCH_BLOCK;

use super::rotation::rotate;
use super::{CacheSize, PageSelector, Scoring, Selector, Written};
use crate::method::element::Element;
use crate::simd::Isa;

/// How thresholds follow a vector's size.
pub trait Thresholds: Send + Sync + 'static {
    /// The selector that has them.
    const ID: Selector;
    /// The outer threshold for a rotated vector; the others are 0 and its negative.
    fn outer(rotated: &[f32]) -> f32;
}

/// At -10, 0 and 10, whatever the vector: as published.
pub struct Published;

impl Thresholds for Published {
    const ID: Selector = Selector::Adamas;

    fn outer(_: &[f32]) -> f32 {
        10.0
    }
}

/// At 0 and 0.6 of the vector's root mean square to either side.
pub struct RootMeanSquare;

impl Thresholds for RootMeanSquare {
    const ID: Selector = Selector::AdamasRms;

    fn outer(rotated: &[f32]) -> f32 {
        let squares: f32 = rotated.iter().map(|x| x * x).sum();
        0.6 * (squares / rotated.len() as f32).sqrt()
    }
}

/// Codes of two bits an element for every cached row, and a bit that says whether all its elements are numbers.
pub struct AdamasWith<T>(std::marker::PhantomData<T>);

/// With thresholds as published.
pub type Adamas = AdamasWith<Published>;
/// With thresholds at 0.6 of the root mean square.
pub type AdamasRms = AdamasWith<RootMeanSquare>;

/// Bytes of a word of 32 codes' high or low bits.
const WORD: usize = 4;
/// Bytes of a block's marks of rows that hold a NaN or an infinity.
const MARKS: usize = SKETCH_BLOCK / 8;

/// Words of a head's high bits, and of its low ones.
fn words(head_size: usize) -> usize {
    head_size.div_ceil(8 * WORD)
}

/// Bytes of a block: codes of its rows, the high bits of each before the low ones, then marks.
fn block_bytes(head_size: usize) -> usize {
    SKETCH_BLOCK * 2 * WORD * words(head_size) + MARKS
}

/// Calls `each` with every word of a vector's codes: its place, the high bits, the low ones. `vector` is rotated.
///
/// A code counts the thresholds below an element. Elements that there are not have the code 0, as a row's and a query's
/// alike.
fn encode<T: Thresholds>(vector: &mut [f32], mut each: impl FnMut(usize, u32, u32)) {
    rotate(vector);
    let outer = T::outer(vector);
    for (word, elements) in vector.chunks(8 * WORD).enumerate() {
        let (mut high, mut low) = (0, 0);
        for (bit, &x) in elements.iter().enumerate() {
            let code = u32::from(x > -outer) + u32::from(x > 0.0) + u32::from(x > outer);
            high |= (code >> 1) << bit;
            low |= (code & 1) << bit;
        }
        each(word, high, low);
    }
}

/// Floats of a prepared head: 0, or NaN for a query with an element that is no number; then, of each word of codes, the
/// bits where the code is at least 1, 2 and 3.
fn prepared_len(head_size: usize) -> usize {
    1 + 3 * words(head_size)
}

impl<T: Thresholds> PageSelector for AdamasWith<T> {
    const ID: Selector = T::ID;
    type State<E: Element> = u8;

    fn update<E: Element>(size: &CacheSize, written: Written, keys: &[E], state: &mut [u8], scratch: &mut Vec<f32>) {
        let (d, words, bytes) = (size.head_size, words(size.head_size), block_bytes(size.head_size));
        scratch.clear();
        scratch.resize(d, 0.0);
        for row in written.from..written.len {
            let (block, within) = (row / SKETCH_BLOCK, row % SKETCH_BLOCK);
            let (codes, marks) = state[block * bytes..][..bytes].split_at_mut(bytes - MARKS);
            E::widen_into(&keys[row * d..][..d], scratch);
            let broken = !scratch.iter().fold(true, |all, x| all & x.is_finite());
            let mark = &mut marks[within / 8];
            *mark = *mark & !(1 << (within % 8)) | u8::from(broken) << (within % 8);
            let (highs, lows) = codes[within * 2 * WORD * words..][..2 * WORD * words].split_at_mut(WORD * words);
            encode::<T>(scratch, |word, high, low| {
                highs[WORD * word..][..WORD].copy_from_slice(&high.to_le_bytes());
                lows[WORD * word..][..WORD].copy_from_slice(&low.to_le_bytes());
            });
        }
    }

    fn is_finite<E: Element>(size: &CacheSize, len: usize, state: &[u8], _: &mut Vec<f32>) -> bool {
        let bytes = block_bytes(size.head_size);
        (0..len).all(|row| !is_marked(&state[row / SKETCH_BLOCK * bytes..][..bytes], row % SKETCH_BLOCK))
    }

    fn prepare(scoring: &Scoring, query: &[f32], prepared: &mut Vec<f32>) {
        let (d, len) = (scoring.head_size, prepared_len(scoring.head_size));
        prepared.clear();
        for head in query.chunks_exact(d) {
            let start = prepared.len();
            prepared.resize(start + len + d, 0.0);
            let (own, rotated) = prepared[start..].split_at_mut(len);
            rotated.copy_from_slice(head);
            let numbers = head.iter().fold(true, |all, x| all & x.is_finite());
            own[0] = if numbers { 0.0 } else { f32::NAN };
            encode::<T>(rotated, |word, high, low| {
                own[1 + 3 * word..][..3].copy_from_slice(&[high | low, high, high & low].map(f32::from_bits));
            });
            prepared.truncate(start + len);
        }
    }

    fn score_heads<E: Element>(
        _: Isa,
        scoring: &Scoring,
        prepared: &[f32],
        state: &[u8],
        pages: Range<usize>,
        scores: &mut [f32],
    ) {
        let (d, bytes) = (scoring.head_size, block_bytes(scoring.head_size));
        let row_bytes = 2 * WORD * words(d);
        let oldest = scoring.local_window.map_or(0, |w| scoring.len.saturating_sub(w));
        let count = pages.len();
        for (head, query) in prepared.chunks_exact(prepared_len(d)).enumerate() {
            let (number, query) = (query[0], query[1..].as_chunks::<3>().0);
            for (score, page) in scores[head * count..][..count].iter_mut().zip(pages.clone()) {
                let start = page * scoring.page_size;
                let rows = start.max(oldest)..(start + scoring.page_size).min(scoring.len);
                let mut nearest = u32::MAX;
                let mut broken = number.is_nan();
                for row in rows {
                    let block = &state[row / SKETCH_BLOCK * bytes..][..bytes];
                    let within = row % SKETCH_BLOCK;
                    nearest = nearest.min(distance(query, &block[within * row_bytes..][..row_bytes]));
                    broken |= is_marked(block, within);
                }
                *score = if broken { f32::NAN } else { -(nearest as f32) };
            }
        }
    }

    /// Negative distances can be compared as they are.
    fn finish_scores(_: &Scoring, _: &mut [f32], _: Range<usize>) {}
}

/// Whether a row of a block holds a NaN or an infinity.
fn is_marked(block: &[u8], row: usize) -> bool {
    block[block.len() - MARKS + row / 8] >> (row % 8) & 1 == 1
}

/// The sum of the differences between a query's codes and a row's: for each of the numbers 1 to 3, the elements of which
/// one reaches it and the other does not.
fn distance(query: &[[f32; 3]], row: &[u8]) -> u32 {
    let (highs, lows) = row.as_chunks::<WORD>().0.split_at(query.len());
    let mut sum = 0;
    for ((query, &high), &low) in query.iter().zip(highs).zip(lows) {
        let (high, low) = (u32::from_le_bytes(high), u32::from_le_bytes(low));
        let [one, two, three] = query.map(f32::to_bits);
        sum += (one ^ (high | low)).count_ones() + (two ^ high).count_ones() + (three ^ (high & low)).count_ones();
    }
    sum
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;
    use crate::selector::GroupScore;

    fn numbers(count: usize, seed: usize) -> Vec<f32> {
        let number = |i: usize| ((i * 7919 + seed * 104_729 + i / 97 * 31 + 13) % 1009) as f32 / 504.0 - 1.0;
        (0..count).map(number).collect()
    }

    fn size<E>(capacity: usize, head_size: usize) -> CacheSize {
        CacheSize {
            capacity,
            pages: capacity,
            page_size: 1,
            head_size,
            sketch_bits: 2,
            cache_element: size_of::<E>(),
        }
    }

    fn scoring(head_size: usize, page_size: usize, len: usize) -> Scoring {
        Scoring {
            group_score: GroupScore::Max,
            scale: 0.5,
            lambda: 0.0,
            correlation: 0.0,
            page_size,
            head_size,
            len,
            softcap: 0.0,
            local_window: None,
            sketch_bits: 2,
        }
    }

    fn coded<P: PageSelector<State<E> = u8>, E: Element>(size: &CacheSize, keys: &[E], len: usize) -> Vec<u8> {
        let mut state = vec![0xff; P::layout(size).len()];
        let written = Written {
            from: 0,
            appended: 0,
            len,
        };
        P::update::<E>(size, written, keys, &mut state, &mut Vec::new());
        state
    }

    fn scores<P: PageSelector<State<f32> = u8>>(s: &Scoring, query: &[f32], state: &[u8]) -> Vec<f32> {
        let (mut prepared, pages) = (Vec::new(), 0..s.len.div_ceil(s.page_size));
        P::prepare(s, query, &mut prepared);
        let mut scores = vec![f32::NAN; query.len() / s.head_size * pages.len()];
        P::score_heads::<f32>(Isa::detect(), s, &prepared, state, pages, &mut scores);
        scores
    }

    /// A code for each element, as docs/method.md says it.
    fn codes(vector: &[f32], outer: impl Fn(&[f32]) -> f32) -> Vec<i32> {
        let mut rotated = vector.to_vec();
        rotate(&mut rotated);
        let outer = outer(&rotated);
        let below = |x: &f32| [-outer, 0.0, outer].iter().filter(|threshold| *x > **threshold).count() as i32;
        rotated.iter().map(below).collect()
    }

    fn apart(a: &[i32], b: &[i32]) -> f32 {
        a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum::<i32>() as f32
    }

    /// A key of one element at 2 turns into a row of +-x/sqrt(8): all of it within the root mean square, which is |x| /
    /// sqrt(8) too, and so beyond 0.6 of it. Only a large one is beyond 10.
    #[test]
    fn codes_by_hand() {
        let mut key = [0.0f32; 8];
        key[2] = 1.0;
        let state = coded::<AdamasRms, f32>(&size::<f32>(1, 8), &key, 1);
        // The signs are - - + + - - + +: codes 0 and 3, high and low bits alike; sketch/rotation.rs has the rotation.
        assert_eq!(state[..8], [0b1100_1100, 0, 0, 0, 0b1100_1100, 0, 0, 0]);
        let state = coded::<Adamas, f32>(&size::<f32>(1, 8), &key, 1);
        // Codes 1 and 2.
        assert_eq!(state[..8], [0b1100_1100, 0, 0, 0, 0b0011_0011, 0, 0, 0]);
        key[2] = 40.0;
        let state = coded::<Adamas, f32>(&size::<f32>(1, 8), &key, 1);
        assert_eq!(state[..8], [0b1100_1100, 0, 0, 0, 0b1100_1100, 0, 0, 0]);
    }

    #[test]
    fn pages_are_scored_by_their_best_token() {
        fn check<P: PageSelector<State<f32> = u8>>(outer: impl Fn(&[f32]) -> f32 + Copy) {
            for d in [4, 20, 33, 64, 96, 128] {
                let len = 301;
                // Large enough for every code to occur.
                let keys: Vec<f32> = numbers(len * d, d).iter().map(|x| 15.0 * x).collect();
                let query: Vec<f32> = numbers(3 * d, 7).iter().map(|x| 12.0 * x).collect();
                let state = coded::<P, f32>(&size::<f32>(len, d), &keys, len);
                let rows: Vec<Vec<i32>> = keys.chunks_exact(d).map(|key| codes(key, outer)).collect();
                for local_window in [None, Some(130)] {
                    for page_size in [1, 2, 8, 128] {
                        let s = Scoring {
                            local_window,
                            ..scoring(d, page_size, len)
                        };
                        let got = scores::<P>(&s, &query, &state);
                        let pages = len.div_ceil(page_size);
                        let oldest = local_window.map_or(0, |w| len - w);
                        for (i, got) in got.iter().enumerate() {
                            let asked = codes(&query[i / pages * d..][..d], outer);
                            let (start, end) = (i % pages * page_size, ((i % pages + 1) * page_size).min(len));
                            if end <= oldest {
                                // No candidate.
                                continue;
                            }
                            let visible = &rows[start.max(oldest)..end];
                            let best = visible.iter().map(|row| -apart(&asked, row)).fold(f32::MIN, f32::max);
                            assert_eq!(*got, best, "D {d} page {} of {page_size}", i % pages);
                        }
                    }
                }
            }
        }
        check::<Adamas>(|_| 10.0);
        check::<AdamasRms>(|y| 0.6 * (y.iter().map(|x| x * x).sum::<f32>() / y.len() as f32).sqrt());
    }

    #[test]
    fn a_row_written_again_changes_its_own_codes_alone() {
        let (d, len) = (64, 200);
        let size = size::<f16>(256, d);
        let mut keys: Vec<f16> = numbers(len * d, 1).iter().map(|&x| f16::from_f32(x)).collect();
        let mut state = coded::<AdamasRms, f16>(&size, &keys, len);
        keys[130 * d..131 * d].reverse();
        keys[130 * d] = f16::NAN;
        let before = state.clone();
        let written = Written {
            from: 130,
            appended: len,
            len: 131,
        };
        AdamasRms::update::<f16>(&size, written, &keys, &mut state, &mut Vec::new());
        let bytes = block_bytes(d);
        let (row, mark) = (bytes + 2 * 16..bytes + 3 * 16, bytes + 128 * 16);
        for (at, (before, after)) in before.iter().zip(&state).enumerate() {
            assert!(before == after || row.contains(&at) || at == mark, "byte {at}");
        }
        assert_eq!(state[mark], before[mark] | 1 << 2);
        assert!(!AdamasRms::is_finite::<f16>(&size, len, &state, &mut Vec::new()));
        assert!(AdamasRms::is_finite::<f16>(&size, 130, &state, &mut Vec::new()));
        // And a number again.
        keys[130 * d] = f16::ONE;
        AdamasRms::update::<f16>(&size, written, &keys, &mut state, &mut Vec::new());
        assert!(AdamasRms::is_finite::<f16>(&size, len, &state, &mut Vec::new()));
    }

    #[test]
    fn keys_and_queries_that_are_no_numbers_surface() {
        let (d, len) = (32, 140);
        for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut keys = numbers(len * d, 3);
            keys[37 * d + 5] = broken;
            let state = coded::<Adamas, f32>(&size::<f32>(len, d), &keys, len);
            for page_size in [1, 4, 128] {
                let got = scores::<Adamas>(&scoring(d, page_size, len), &numbers(d, 4), &state);
                for (page, score) in got.iter().enumerate() {
                    assert_eq!(score.is_nan(), page == 37 / page_size, "{broken} {page} of {page_size}");
                }
            }
            let mut query = numbers(2 * d, 5);
            query[3] = broken;
            let got = scores::<Adamas>(&scoring(d, 1, len), &query, &state);
            let (first, second) = got.split_at(len);
            assert!(first.iter().all(|score| score.is_nan()));
            assert_eq!(second.iter().filter(|score| score.is_nan()).count(), 1);
        }
    }
}
