use half::{bf16, f16};

use super::*;
use crate::selector::GroupScore;

fn numbers(count: usize, seed: usize) -> Vec<f32> {
    let number = |i: usize| ((i * 7919 + seed * 104_729 + i / 97 * 31 + 13) % 1009) as f32 / 504.0 - 1.0;
    (0..count).map(number).collect()
}

fn size<E>(capacity: usize, head_size: usize, sketch_bits: usize) -> CacheSize {
    CacheSize {
        capacity,
        pages: capacity,
        page_size: 1,
        head_size,
        sketch_bits,
        cache_element: size_of::<E>(),
    }
}

fn scoring(size: &CacheSize, page_size: usize, len: usize) -> Scoring {
    Scoring {
        group_score: GroupScore::Max,
        scale: 0.5,
        lambda: 0.0,
        correlation: 0.0,
        page_size,
        head_size: size.head_size,
        len,
        softcap: 0.0,
        local_window: None,
        sketch_bits: size.sketch_bits,
    }
}

fn sketched<E: Element>(size: &CacheSize, keys: &[E], len: usize) -> Vec<u8> {
    let mut state = vec![0xff; Sketch::layout(size).len()];
    let written = Written {
        from: 0,
        appended: 0,
        len,
    };
    Sketch::update::<E>(size, written, keys, &mut state, &mut Vec::new());
    state
}

fn scores<E: Element>(isa: Isa, s: &Scoring, query: &[f32], state: &[u8], pages: Range<usize>) -> Vec<f32> {
    let mut prepared = Vec::new();
    Sketch::prepare(s, query, &mut prepared);
    let mut scores = vec![f32::NAN; query.len() / s.head_size * pages.len()];
    Sketch::score_heads::<E>(isa, s, &prepared, state, pages, &mut scores);
    scores
}

/// Signs of the first eight elements: + + - + + - + +. A key of one element at 2 is minus the third column of the
/// matrix, + + - - + + - -, over sqrt 8: so its codes have the signs - - + + - - + +, and along them lies all of it.
#[test]
fn one_key_by_hand() {
    let mut key = [0.0f32; 8];
    key[2] = 3.0;
    let size = size::<f32>(4, 8, 1);
    let state = sketched(&size, &key, 1);
    assert_eq!(state.len(), 128 * 3 + 32);
    assert_eq!(state[0], 0b1100_1100, "from the lowest bit on");
    let layout = BlockLayout::new::<f32>(8, 1);
    assert_eq!(
        layout.factors(&state).next(),
        Some(bf16::from_f32(3.0 / 8f32.sqrt()).to_f32())
    );
}

/// With pages of one token the score is the estimate: exact for the part of a key that its codes are parallel to.
#[test]
fn estimates_are_near_the_products_and_without_bias() {
    for (bits, most) in [(1, 0.8), (2, 0.4)] {
        let (d, len) = (64, 300);
        let size = size::<f32>(len, d, bits);
        let keys = numbers(len * d, 1);
        let state = sketched(&size, &keys, len);
        let query = numbers(d, 2);
        let s = Scoring {
            scale: 1.0,
            ..scoring(&size, 1, len)
        };
        let got = scores::<f32>(Isa::detect(), &s, &query, &state, 0..len);
        let errors: Vec<f32> = got
            .iter()
            .zip(keys.chunks_exact(d))
            .map(|(got, key)| got - key.iter().zip(&query).map(|(k, q)| k * q).sum::<f32>())
            .collect();
        let length = |v: &[f32]| v.iter().map(|x| x * x).sum::<f32>().sqrt();
        let typical = length(&query) * length(&keys[..d]) / (d as f32).sqrt();
        let deviation = length(&errors) / (len as f32).sqrt();
        assert!(deviation < most * typical, "{bits}: {deviation} {typical}");
        let mean = errors.iter().sum::<f32>() / len as f32;
        assert!(
            mean.abs() < 4.0 * deviation / (len as f32).sqrt(),
            "{bits}: {mean} {deviation}"
        );
    }
}

/// Whatever the page size, window, softcap, range of pages and instruction set: the log of the sum of the tokens'
/// masses.
#[test]
fn pages_add_up_their_tokens() {
    fn check<E: Element>(d: usize, bits: usize) {
        let len = 301;
        let size = size::<E>(len + 90, d, bits);
        let keys: Vec<E> = numbers(len * d, d).iter().map(|&x| E::from_f32(x + 0.5)).collect();
        let state = sketched(&size, &keys, len);
        for heads in [1, 3, 4, 6] {
            let query = numbers(heads * d, heads);
            for (softcap, local_window) in [
                (0.0, None),
                (1.5, None),
                (0.0, Some(130)),
                (3.0, Some(1)),
                (0.0, Some(999)),
            ] {
                let plain = Scoring {
                    softcap,
                    local_window,
                    ..scoring(&size, 1, len)
                };
                let open = Scoring {
                    local_window: None,
                    softcap: 0.0,
                    ..plain
                };
                let logits = scores::<E>(Isa::Portable, &open, &query, &state, 0..len);
                let cap = |x: f32| {
                    if softcap > 0.0 {
                        softcap * (x / softcap).tanh()
                    } else {
                        x
                    }
                };
                let oldest = local_window.map_or(0, |w| len.saturating_sub(w));
                for page_size in [1, 2, 4, 8, 16, 32, 64, 128] {
                    let s = Scoring { page_size, ..plain };
                    let all = oldest / page_size..len.div_ceil(page_size);
                    let cut = all.start + all.len() / 3;
                    for pages in [all.clone(), all.start..cut, cut..all.end, cut..cut] {
                        for &isa in Isa::all() {
                            let got = scores::<E>(isa, &s, &query, &state, pages.clone());
                            for (i, got) in got.iter().enumerate() {
                                let (head, page) = (i / pages.len(), pages.start + i % pages.len());
                                let rows = (page * page_size).max(oldest)..((page + 1) * page_size).min(len);
                                let mass: f32 = rows.map(|row| cap(logits[head * len + row]).exp()).sum();
                                let want = mass.ln();
                                assert!(
                                    (got - want).abs() <= 3e-5 * want.abs().max(1.0),
                                    "{isa:?} D {d} bits {bits} {softcap} {local_window:?} pages of {page_size}: {got} {want}"
                                );
                            }
                        }
                    }
                }
            }
        }
    }
    check::<f32>(64, 2);
    check::<f32>(80, 1);
    check::<f16>(20, 2);
    check::<f16>(96, 1);
}

/// Masses of which every share of the best one is 0 in f32 keep their order.
#[test]
fn masses_far_below_the_best_are_told_apart() {
    let size = size::<f32>(16, 8, 2);
    let mut keys = vec![0.0f32; 16 * 8];
    for (row, key) in keys.chunks_exact_mut(8).enumerate() {
        key.fill(100.0 * row as f32);
    }
    let state = sketched(&size, &keys, 16);
    for page_size in [2, 4] {
        let got = scores::<f32>(
            Isa::detect(),
            &scoring(&size, page_size, 16),
            &[1.0; 8],
            &state,
            0..16 / page_size,
        );
        assert!(got.is_sorted() && got.windows(2).all(|w| w[1] > w[0] + 90.0), "{got:?}");
    }
}

#[test]
fn keys_that_are_no_numbers_surface() {
    for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for bits in [1, 2] {
            let (d, len) = (32, 140);
            let size = size::<f32>(256, d, bits);
            let mut keys = numbers(len * d, 3);
            assert!(Sketch::is_finite::<f32>(
                &size,
                len,
                &sketched(&size, &keys, len),
                &mut Vec::new()
            ));
            keys[37 * d + 5] = broken;
            let state = sketched(&size, &keys, len);
            assert!(
                !Sketch::is_finite::<f32>(&size, len, &state, &mut Vec::new()),
                "{broken}"
            );
            assert!(Sketch::is_finite::<f32>(&size, 37, &state, &mut Vec::new()), "{broken}");
            for page_size in [1, 4, 128] {
                let s = scoring(&size, page_size, len);
                let got = scores::<f32>(Isa::detect(), &s, &numbers(d, 4), &state, 0..len.div_ceil(page_size));
                for (page, score) in got.iter().enumerate() {
                    // The second block's centre is the mean of the first one's keys.
                    let touched = page == 37 / page_size || page * page_size >= 128;
                    assert_eq!(score.is_nan(), touched, "{broken} page {page} of {page_size}: {score}");
                }
            }
        }
    }
}

/// A call that appends row 128 makes the second block's centre; one that rewrites it leaves it.
#[test]
fn centres_are_made_once() {
    let (d, capacity) = (16, 300);
    let size = size::<f32>(capacity, d, 2);
    let layout = BlockLayout::new::<f32>(d, 2);
    let mut keys = numbers(capacity * d, 5);
    let mut state = sketched(&size, &keys, 128);
    let centre = |state: &[u8]| {
        let mut all = Vec::new();
        let mut part = [0.0; block::PART];
        let count = layout.centre::<f32>(&state[layout.bytes..], 0, &mut part);
        all.extend_from_slice(&part[..count]);
        all
    };
    let call = |keys: &[f32], state: &mut [u8], from, appended, len| {
        Sketch::update::<f32>(&size, Written { from, appended, len }, keys, state, &mut Vec::new());
    };
    assert!(centre(&state)[0].is_nan(), "no row of the block is there yet");
    // The step overwrites two rows before the one it appends: the centre is that of the rows as they are then.
    keys[126 * d..128 * d].fill(2.0);
    call(&keys, &mut state, 126, 128, 129);
    let mean: f32 = keys[..128 * d].iter().step_by(d).sum::<f32>() / 128.0;
    let made = centre(&state);
    assert!((made[0] - mean).abs() < 1e-6, "{} {mean}", made[0]);
    keys[100 * d..129 * d].fill(-7.0);
    call(&keys, &mut state, 100, 129, 130);
    assert_eq!(centre(&state), made, "a row rewritten");
    call(&keys, &mut state, 128, 128, 131);
    assert_ne!(centre(&state), made, "a row fed as new again");
}
