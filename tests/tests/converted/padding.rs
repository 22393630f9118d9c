//! Attention masks with zeros: padding on the left gives what the tokens give without it; whatever the operator would
//! read otherwise is an error when the model runs.

use retro_tests::{compare, decoder::Decoder, host, paths};

use crate::convert::{convert, default_page};

const TOKENS: [i64; 6] = [5, 6, 7, 8, 9, 10];
const CAPACITY: usize = 24;

/// A case of tests/data/zoo.tar.xz, converted.
struct Case(tempfile::TempDir);

impl Case {
    fn convert(name: &str, options: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        convert(&paths::zoo(name), &folder.path().join("model"), options).expect("it converts");
        Self(folder)
    }

    fn open(&self) -> Decoder {
        Decoder::open(&self.0.path().join("model"), true, CAPACITY, default_page(), false)
    }
}

fn ones(n: usize) -> Vec<i64> {
    vec![1; n]
}

/// Padding in front, a prompt and a step, against the same without padding. Relative positions are all that counts.
fn left_padding_is_right(case: &Case) {
    let (mut plain, mut padded) = (case.open(), case.open());
    let (pad, fed) = ([0, 0], [[99, 98].as_slice(), &TOKENS].concat());
    let expected = plain.feed(&TOKENS, 6, Some(-1), None);
    let got = padded
        .feed_masked(&fed, &[pad.as_slice(), &ones(6)].concat(), Some(-1), None)
        .unwrap();
    compare::assert_close("a padded prompt", &got, &expected, 1e-4);
    let expected = plain.feed(&[11], 7, Some(0), None);
    let got = padded
        .feed_masked(&[11], &[pad.as_slice(), &ones(7)].concat(), Some(0), None)
        .unwrap();
    compare::assert_close("a step after a padded prompt", &got, &expected, 1e-4);
}

/// On CUDA, where lengths lie on the device and nothing waits for it, NaN logits say so.
fn is_an_error(case: &Case, mask: &[i64]) {
    let result = case.open().feed_masked(&TOKENS, mask, Some(-1), None);
    if host::on_gpu() {
        let logits = result.expect("nothing waits for the device");
        return assert!(logits.iter().all(|x| x.is_nan()), "{mask:?}: {logits:?}");
    }
    let error = result.expect_err("a mask that is not understood");
    assert!(
        error.contains("attention mask of sequence 0 is not understood"),
        "{mask:?}: {error}"
    );
    assert!(error.contains("Pad on the left"), "{mask:?}: {error}");
}

#[test]
fn masks_that_are_added_to_scores() {
    let case = Case::convert("genai040-old_llama-fp32-cuda", &[]);
    left_padding_is_right(&case);
    for mask in [
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 1],
        [0, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0],
    ] {
        is_an_error(&case, &mask);
    }
}

/// GroupQueryAttention gets a count of ones. The original takes a prompt padded on the right, and gives wrong logits
/// for one padded on the left; the converted model the other way round, and says so.
#[test]
fn masks_whose_ones_are_counted() {
    // Opsets 22 and 14.
    for name in ["genai-llama-fp32-cpu", "genai040-old_llama-fp32-cpu"] {
        let case = Case::convert(name, &[]);
        left_padding_is_right(&case);
        for mask in [
            [1, 1, 1, 1, 0, 0],
            [1, 1, 0, 0, 1, 1],
            [0, 1, 1, 1, 1, 0],
            [1, 0, 1, 0, 1, 0],
            [0, 0, 0, 0, 0, 0],
        ] {
            is_an_error(&case, &mask);
        }
        // Of a cache's width: fewer ones than tokens fed are no prompt of that many tokens.
        is_an_error(&case, &[ones(4), vec![0; CAPACITY - 4]].concat());
        is_an_error(&case, &[ones(7), vec![0], ones(CAPACITY - 8)].concat());
    }
}

/// With a window of 1 its sliding-window layer stays GroupQueryAttention, which reads padding on the left as tokens.
#[test]
fn padding_where_a_group_query_attention_is_left() {
    if host::on_gpu() {
        return println!("not tested: ONNX Runtime has no float32 GroupQueryAttention on CUDA");
    }
    let case = Case::convert("genai-gemma2-fp32-cpu", &["--window", "1"]);
    for mask in [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]] {
        // The layer that is left comes first, and may refuse the count of ones before the converted one refuses the
        // mask.
        let error = case.open().feed_masked(&TOKENS, &mask, Some(-1), None);
        let error = error.expect_err("the layers read the mask differently");
        assert!(
            error.contains("seqlens_k") || error.contains("attention mask"),
            "{mask:?}: {error}"
        );
    }
    case.open().feed_masked(&TOKENS, &ones(6), Some(-1), None).unwrap();
}

#[test]
fn masks_as_wide_as_a_cache() {
    let case = Case::convert("genai-llama-fp32-cpu", &[]);
    let (mut plain, mut wide) = (case.open(), case.open());
    let mask = |n: usize| [ones(n), vec![0; CAPACITY - n]].concat();
    let expected = plain.feed(&TOKENS, 6, Some(-1), None);
    compare::assert_close(
        "a prompt",
        &wide.feed_masked(&TOKENS, &mask(6), Some(-1), None).unwrap(),
        &expected,
        1e-6,
    );
    for (n, token) in [(7, 11), (8, 12)] {
        let expected = plain.feed(&[token], n, Some(0), None);
        compare::assert_close(
            "a step",
            &wide.feed_masked(&[token], &mask(n), Some(0), None).unwrap(),
            &expected,
            1e-6,
        );
    }
}
