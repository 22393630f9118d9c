//! Logits of the tiny models against llama.cpp's of the same files, widened.

use ndarray::{Array3, Axis};
use retro_models::{Dtype, Options};
use retro_tests::{compare, decoder::Decoder, gguf::TINY_GGUFS, paths};

use crate::build_file;

/// As in expected.py.
const IDS: [i64; 16] = [1, 22, 47, 3, 9, 61, 30, 2, 55, 14, 33, 33, 8, 60, 5, 40];

fn expected() -> Array3<f32> {
    ndarray_npy::read_npy(paths::data("gguf/expected_logits.npy")).unwrap()
}

/// llama.cpp's keys and values are f16: its logits, of up to 5, are good to about 5e-3.
const TOLERANCE: f32 = 1e-2;

#[test]
fn every_architecture_computes_what_llama_cpp_computes() {
    let expected = expected();
    let folder = tempfile::tempdir().unwrap();
    for (tiny, expected) in TINY_GGUFS.iter().zip(expected.axis_iter(Axis(0))) {
        for (dtype, tolerance) in [(Dtype::F32, TOLERANCE), (Dtype::F16, 4.0 * TOLERANCE)] {
            let out = folder.path().join(format!("{}-{dtype:?}", tiny.name));
            let options = Options {
                dtype,
                ..Options::default()
            };
            build_file(&tiny.bytes(), &out, &options).unwrap();
            let mut model = Decoder::open(&out, false, IDS.len(), 16, true);
            // A prompt, and then a token at a time.
            let mut logits = model.feed(&IDS[..10], 10, None, None);
            for at in 10..IDS.len() {
                logits.extend(model.feed(&IDS[at..=at], at + 1, None, None));
            }
            let expected: Vec<f32> = expected.iter().copied().collect();
            let what = format!("{} in {dtype:?}", tiny.name);
            compare::assert_close(&what, &logits, &expected, tolerance);
        }
    }
}

/// The tolerance above tells the models' peculiarities apart: without them, or with others', it is exceeded by far.
#[test]
fn the_expected_logits_of_two_models_differ_by_more_than_the_tolerance() {
    let expected = expected();
    for (i, a) in expected.axis_iter(Axis(0)).enumerate() {
        for b in expected.axis_iter(Axis(0)).skip(i + 1) {
            let difference = a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
            assert!(difference > 100.0 * TOLERANCE, "{difference}");
        }
    }
}

#[test]
fn every_architecture_converts() {
    let folder = tempfile::tempdir().unwrap();
    for tiny in TINY_GGUFS {
        let out = folder.path().join(tiny.name);
        build_file(&tiny.bytes(), &out, &Options::default()).unwrap();
        let report = retro_export::convert(&retro_export::Options {
            source: out,
            target: Some(folder.path().join(format!("{}-retro", tiny.name))),
            ..Default::default()
        });
        assert!(report.is_ok(), "{}", tiny.name);
    }
}
