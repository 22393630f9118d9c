//! Random layers and histories.

use proptest::prelude::*;
use retro_attention::contract::Attributes;
use retro_contract::{GroupScore, Mode, Selector};

use crate::bed::Shape;

/// What a batch goes through: lengths after the first chunk (ragged), then calls for all sequences.
#[derive(Clone, Debug)]
pub struct History {
    pub firsts: Vec<usize>,
    pub calls: Vec<Next>,
    pub seed: u64,
}

#[derive(Clone, Debug)]
pub enum Next {
    /// A chunk of so many tokens: more of the prompt, or the next turn of a chat.
    Chunk(usize),
    /// A step: how much each sequence would like to feed again, as drawn, and pages a KV head (0: from the attributes).
    Step {
        retro: Vec<usize>,
        budget: Option<Vec<i32>>,
    },
}

impl History {
    /// Tokens that the longest sequence ends with.
    pub fn capacity(&self) -> usize {
        let grown = |c: &Next| match c {
            Next::Chunk(n) => *n,
            Next::Step { .. } => 1,
        };
        self.firsts.iter().max().unwrap_or(&0) + self.calls.iter().map(grown).sum::<usize>()
    }
}

/// Attributes within the operator's ranges, mode "retro"; small enough for an obvious oracle.
pub fn shape() -> impl Strategy<Value = Shape> {
    let heads = (1usize..=3, prop_oneof![1usize..=4, Just(7), Just(16)]);
    let sizes = (
        prop_oneof![Just(8usize), Just(12), Just(16), Just(20), Just(33), Just(64)],
        prop_oneof![2 => Just(1usize), 1 => Just(2), 2 => Just(4), 3 => Just(8), 3 => Just(16), 1 => Just(32), 1 => Just(64), 1 => Just(128)],
        prop_oneof![2 => Just(1usize), 6 => 2usize..=9, 1 => Just(64)],
    );
    let budget = (0usize..=30, 0usize..=3, 0usize..=2);
    let scores = (
        proptest::sample::select(Selector::ALL),
        prop_oneof![Just(GroupScore::Max), Just(GroupScore::Softmax)],
        prop_oneof![Just(2.5f32), 0.0f32..4.0],
        prop_oneof![Just(0.2f32), 0.0f32..1.0],
        1usize..=2,
    );
    let softmax = (
        prop_oneof![2 => Just(None), 1 => (0.05f32..1.0).prop_map(Some)],
        prop_oneof![3 => Just(0.0f32), 1 => 0.5f32..20.0],
        prop_oneof![3 => Just(None), 1 => (1usize..150).prop_map(Some)],
        any::<bool>(),
    );
    let rotary = (0usize..=2, 1usize..=32, any::<bool>());
    (heads, sizes, budget, scores, softmax, rotary).prop_map(
        |(
            (kv_heads, group),
            (head_size, page_size, window),
            (percent, min_pages, sink_pages),
            scores,
            softmax,
            rotary,
        )| {
            // A sketch's row is whole bytes.
            let head_size = match (scores.0, head_size) {
                (Selector::Sketch, 33) => 40,
                (_, any) => any,
            };
            let sketch_bits = if head_size.is_multiple_of(8) { scores.4 } else { 2 };
            Shape {
                attributes: Attributes {
                    heads: kv_heads * group,
                    kv_heads,
                    scale: softmax.0,
                    softcap: softmax.1,
                    do_rotary: rotary.0 > 0,
                    rotary_interleaved: rotary.0 == 2,
                    local_window: softmax.2,
                    page_size: page_size.max(*scores.0.page_sizes().start()),
                    window,
                    budget_ratio: percent as f64 / 100.0,
                    budget_min_pages: min_pages,
                    sink_pages,
                    selector: scores.0,
                    group_score: scores.1,
                    selector_lambda: scores.2,
                    selector_correlation: scores.3,
                    sketch_bits,
                    mode: Mode::Retro,
                    step_rows: 0,
                },
                head_size,
                packed: rotary.2,
                rotary_half: rotary.1.min(head_size / 2),
                has_sink: softmax.3,
            }
        },
    )
}

/// Every selector that keeps something of each row.
pub fn of_rows() -> impl Strategy<Value = Selector> {
    prop_oneof![
        Just(Selector::Sketch),
        Just(Selector::Adamas),
        Just(Selector::AdamasRms)
    ]
}

/// Every mode.
pub fn mode() -> impl Strategy<Value = Mode> {
    prop_oneof![
        4 => Just(Mode::Retro),
        1 => Just(Mode::Dense),
        1 => Just(Mode::Streaming),
        1 => Just(Mode::Periodic),
    ]
}

pub fn history(most_sequences: usize) -> impl Strategy<Value = History> {
    (1..=most_sequences).prop_flat_map(|batch| {
        let budget = prop_oneof![
            2 => Just(None),
            1 => (0i32..6).prop_map(|k| Some(vec![k])),
            1 => prop::collection::vec(0i32..6, batch).prop_map(Some),
        ];
        let step = (prop::collection::vec(0usize..64, batch), budget);
        let call = prop_oneof![
            1 => (1usize..40).prop_map(Next::Chunk),
            12 => step.prop_map(|(retro, budget)| Next::Step { retro, budget }),
        ];
        (
            prop::collection::vec(1usize..160, batch),
            prop::collection::vec(call, 1..24),
            any::<u64>(),
        )
            .prop_map(|(firsts, calls, seed)| History { firsts, calls, seed })
    })
}
