//! The invariants of docs/method.md, on plain buffers: random attributes, chunks, budgets, windows, batches.
//!
//! `PROPTEST_CASES` sets how many cases a property gets, `PROPTEST_RNG_SEED` fixes which. What has failed once is kept
//! in `op/tests/properties/main.regressions` and tried first.

mod bed;
mod check;
mod histories;
mod one_sequence;
mod strategies;

use bed::Shape;
use half::f16;
use histories::{agrees_with_the_oracle, batch_is_each_alone, rewinds_agree_with_the_oracle};
use one_sequence::{
    cached_output_is_attention_over_the_union, chunked_prefill_is_one_prefill, full_budget_is_dense,
    one_token_is_quest_for_every_window, overwriting_changes_the_rows_own_sketches, truncation_forgets,
};
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;
use retro_contract::Mode;
use strategies::{history, mode, of_rows, shape};

/// `cases` cases, or what the environment asks for.
fn config(cases: u32) -> ProptestConfig {
    let default = ProptestConfig::default();
    ProptestConfig {
        cases: if std::env::var_os("PROPTEST_CASES").is_some() {
            default.cases
        } else {
            cases
        },
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        max_shrink_iters: 2000,
        ..default
    }
}

proptest! {
    #![proptest_config(config(80))]

    #[test]
    fn oracle_f32(shape in shape(), mode in mode(), history in history(4)) {
        agrees_with_the_oracle::<f32>(&with_mode(shape, mode), &history)?;
    }

    #[test]
    fn oracle_f16(shape in shape(), mode in mode(), history in history(4)) {
        agrees_with_the_oracle::<f16>(&with_mode(shape, mode), &history)?;
    }

    #[test]
    fn batch(shape in shape(), mode in mode(), history in history(4), half in any::<bool>()) {
        let shape = with_mode(shape, mode);
        if half { batch_is_each_alone::<f16>(&shape, &history)? } else { batch_is_each_alone::<f32>(&shape, &history)? }
    }

    #[test]
    fn full_budget(shape in shape(), prompt in 1usize..160, steps in 1usize..20, seed: u64, half in any::<bool>()) {
        // What a sliding window hides from the newest query is not loaded for older ones.
        let mut shape = shape;
        shape.attributes.local_window = None;
        if half { full_budget_is_dense::<f16>(&shape, prompt, steps, seed)? } else { full_budget_is_dense::<f32>(&shape, prompt, steps, seed)? }
    }

    #[test]
    fn union(shape in shape(), prompt in 1usize..120, steps in 1usize..16, seed: u64) {
        cached_output_is_attention_over_the_union(&shape, prompt, steps, seed)?;
    }

    #[test]
    fn chunks(shape in shape(), cuts in prop::collection::vec(1usize..70, 1..5), seed: u64, half in any::<bool>()) {
        if half { chunked_prefill_is_one_prefill::<f16>(&shape, &cuts, seed)? } else { chunked_prefill_is_one_prefill::<f32>(&shape, &cuts, seed)? }
    }

    #[test]
    fn quest(shape in shape(), mode in mode(), prompt in 1usize..160, steps in 1usize..12, seed: u64, half in any::<bool>()) {
        let shape = with_mode(shape, mode);
        if half { one_token_is_quest_for_every_window::<f16>(&shape, prompt, steps, seed)? } else { one_token_is_quest_for_every_window::<f32>(&shape, prompt, steps, seed)? }
    }

    #[test]
    fn truncation(shape in shape(), mode in mode(), prompt in 1usize..120, steps in 1usize..20, keep: usize, seed: u64, half in any::<bool>()) {
        let shape = with_mode(shape, mode);
        if half { truncation_forgets::<f16>(&shape, prompt, steps, keep, seed)? } else { truncation_forgets::<f32>(&shape, prompt, steps, keep, seed)? }
    }

    #[test]
    fn overwriting(
        shape in shape(), selector in of_rows(), prompt in 100usize..140, steps in 1usize..40, seed: u64,
        half in any::<bool>(),
    ) {
        if half {
            overwriting_changes_the_rows_own_sketches::<f16>(&shape, selector, prompt, steps, seed)?
        } else {
            overwriting_changes_the_rows_own_sketches::<f32>(&shape, selector, prompt, steps, seed)?
        }
    }

    #[test]
    fn rewinds(shape in shape(), mode in mode(), history in history(3), backs in prop::collection::vec(prop_oneof![2 => Just(0usize), 1 => 1usize..30], 1..6)) {
        rewinds_agree_with_the_oracle::<f32>(&with_mode(shape, mode), &history, &backs)?;
    }
}

fn with_mode(mut shape: Shape, mode: Mode) -> Shape {
    shape.attributes.mode = mode;
    shape
}
