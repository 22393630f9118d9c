//! A converted model whose host goes back: the next turn after a stop, rejected drafts. It tells the model a shorter
//! length, and nothing of the tokens that it took back may be left.

use retro_models::Options;
use retro_tests::{compare, decoder::Decoder, host, paths};

use crate::convert::convert;

const PAGE: usize = 8;
const PROMPT: usize = 90;
const AHEAD: usize = 40;

/// Feeds tokens `from..to` one by one, with r from 0 on; their logits.
fn decode(model: &mut Decoder, tokens: &[i64], from: usize, to: usize, window: usize) -> Vec<f32> {
    let mut logits = Vec::new();
    for t in from..to {
        let retro = (window - 1).min(t - from);
        logits.extend(model.feed(&tokens[t - retro..=t], t + 1, Some(retro as i32), Some(4)));
    }
    logits
}

#[test]
fn after_a_rewind_logits_are_those_of_never_having_gone_there() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("source");
    retro_models::build(&paths::data("golden/model"), &source, &Options::default()).expect("the tiny Llama");
    for window in [2usize, 4, 8] {
        let target = folder.path().join(format!("w{window}"));
        let (w, p) = (window.to_string(), PAGE.to_string());
        // So little is read that pages are chosen.
        let selection = ["--budget", "0.15", "--min-pages", "4", "--selector", "signed_moments"];
        let options = [&["--window", &w, "--page-size", &p][..], &selection].concat();
        convert(&source, &target, &options).expect("it converts");
        let open = || Decoder::open(&target, true, PROMPT + AHEAD + 3, PAGE, false);
        let token = |i: usize, seed: usize| ((i * 7919 + seed * 104_729) % 61 + 1) as i64;
        let taken: Vec<i64> = (0..PROMPT + AHEAD).map(|i| token(i, 1)).collect();
        // The same prompt, another continuation.
        let abandoned: Vec<i64> = (0..PROMPT + AHEAD)
            .map(|i| token(i, if i < PROMPT { 1 } else { 2 }))
            .collect();

        let mut stayed = open();
        stayed.feed(&taken[..PROMPT], PROMPT, Some(-1), None);
        let expected = decode(&mut stayed, &taken, PROMPT, PROMPT + AHEAD, window);

        let mut went = open();
        went.feed(&abandoned[..PROMPT], PROMPT, Some(-1), None);
        decode(&mut went, &abandoned, PROMPT, PROMPT + AHEAD, window);
        let got = decode(&mut went, &taken, PROMPT, PROMPT + AHEAD, window);
        let tolerance = if host::on_gpu() { 1e-4 } else { 0.0 };
        compare::assert_close(&format!("w = {window}: after steps"), &got, &expected, tolerance);

        // A draft fed as a piece of a prompt, and taken back.
        let mut drafted = open();
        drafted.feed(&abandoned[..PROMPT], PROMPT, Some(-1), None);
        drafted.feed(&abandoned[PROMPT..], PROMPT + AHEAD, Some(-1), None);
        let got = decode(&mut drafted, &taken, PROMPT, PROMPT + AHEAD, window);
        compare::assert_close(&format!("w = {window}: after a draft"), &got, &expected, tolerance);
    }
}
