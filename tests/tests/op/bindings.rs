//! In place is the same as copied, to the last bit: random layers and histories, a batch of sequences of one length.

use proptest::prelude::*;
use retro_contract::{GroupScore, Mode};
use retro_tests::{
    attrs::Attrs,
    host,
    layer::{Binding, Feed, Layer, State},
    random::Random,
    tensor::Dtype,
};

fn attrs() -> impl Strategy<Value = Attrs> {
    let sizes = (
        1usize..=3,
        1usize..=4,
        prop_oneof![Just(8usize), Just(24), Just(64)],
        3u32..=6,
        1usize..=8,
    );
    let choices = (
        proptest::sample::select(host::selectors()),
        prop_oneof![Just(GroupScore::Max), Just(GroupScore::Softmax)],
        prop_oneof![3 => Just(Mode::Retro), 1 => Just(Mode::Dense), 1 => Just(Mode::Streaming), 1 => Just(Mode::Periodic)],
        prop_oneof![2 => Just(-1i64), 1 => 1i64..80],
    );
    (sizes, choices).prop_map(
        |((kv_heads, group, head_size, page, window), (selector, group_score, mode, local_window_size))| Attrs {
            page: 1 << page,
            window,
            selector,
            group_score,
            mode,
            local_window_size,
            ..Attrs::new(kv_heads * group, kv_heads, head_size).budget(0.2, 2)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn in_place_is_copied(
        attrs in attrs(), half in any::<bool>(), batch in 1usize..=3, prompt in 1usize..100, steps in 1usize..12, seed: u64,
    ) {
        let dtype = if half { Dtype::F16 } else { Dtype::F32 };
        let layer = Layer::new(&attrs, dtype);
        let mut states = Binding::BOTH.map(|_| State::new(&attrs, dtype, batch, prompt + steps + 2));
        let mut random = Random::new(seed);
        for call in 0..=steps {
            let length = prompt + call;
            let retro = (attrs.window - 1).min(call.saturating_sub(1));
            let tokens = if call == 0 { prompt } else { retro + 1 };
            let mut rows = |heads: usize| random.exact(batch * tokens * heads * attrs.head_size);
            let feed = Feed {
                tokens,
                query: rows(attrs.heads),
                key: rows(attrs.kv_heads),
                value: rows(attrs.kv_heads),
                lengths: vec![length; batch],
                retro: vec![if call == 0 { -1 } else { retro as i32 }],
                budget: None,
                total: None,
            };
            let mut bits = Binding::BOTH.iter().zip(&mut states).map(|(&binding, state)| {
                let output = layer.run(state, &feed, binding);
                (output.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), state.bytes())
            });
            let (one, other) = (bits.next(), bits.next());
            prop_assert!(one == other, "call {call} differs");
        }
    }
}
