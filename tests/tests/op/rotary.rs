//! Rotary embedding inside the operator: the same as outside it.

use retro_tests::{
    attrs::Attrs,
    compare,
    golden::Rows,
    layer::{Binding, Constants, KEY, Layer, State},
    node::Slots,
    random::Random,
    tensor::Dtype,
};

use crate::drive;

/// Cosines and sines of `positions` positions for `half` pairs.
pub fn caches(half: usize, positions: usize) -> (Vec<f32>, Vec<f32>) {
    let angle = |i: usize| (i / half) as f64 * 100f64.powf(-((i % half) as f64) / half as f64);
    let each = |f: fn(f64) -> f64| (0..positions * half).map(|i| f(angle(i)) as f32).collect();
    (each(f64::cos), each(f64::sin))
}

/// Rotates `[count, heads, head_size]` whose first row stands at `position`.
fn rotate(data: &[f32], size: usize, heads: usize, position: usize, half: usize, interleaved: bool) -> Vec<f32> {
    let (cos, sin) = caches(half, position + data.len() / (size * heads));
    let mut out = data.to_vec();
    for (row, head) in out.chunks_mut(size).enumerate() {
        let at = (position + row / heads) * half;
        for pair in 0..half {
            let (a, b) = if interleaved {
                (2 * pair, 2 * pair + 1)
            } else {
                (pair, pair + half)
            };
            let (c, s) = (f64::from(cos[at + pair]), f64::from(sin[at + pair]));
            let (x, y) = (f64::from(head[a]), f64::from(head[b]));
            (head[a], head[b]) = ((x * c - y * s) as f32, (x * s + y * c) as f32);
        }
    }
    out
}

/// `half` pairs are rotated; fewer than half the head: partial rotary.
fn inside_equals_outside(attrs: &Attrs, half: usize, interleaved: bool, packed: bool) {
    let what = format!(
        "half {half} interleaved {interleaved} packed {packed} window {}",
        attrs.window
    );
    let inside = Attrs {
        do_rotary: true,
        rotary_interleaved: interleaved,
        ..attrs.clone()
    };
    let constants = Constants {
        rotary: Some(caches(half, 300)),
        rotary_half: half,
        head_sink: None,
    };
    let with = Layer::with(
        &inside,
        Dtype::F32,
        Slots {
            packed,
            ..Slots::default()
        },
        &constants,
    );
    let without = Layer::new(attrs, Dtype::F32);
    let (prompt, steps) = (130, 20);
    for binding in Binding::BOTH {
        let mut random = Random::new(9);
        let mut states: Vec<State> = (0..2)
            .map(|_| State::new(attrs, Dtype::F32, 1, prompt + steps))
            .collect();
        let mut both = |rows: &Rows, length: usize, retro: i32| {
            let first = length - rows.count;
            let (size, heads, kv_heads) = (attrs.head_size, attrs.heads, attrs.kv_heads);
            let rotated = Rows {
                count: rows.count,
                query: rotate(&rows.query, size, heads, first, half, interleaved),
                key: rotate(&rows.key, size, kv_heads, first, half, interleaved),
                value: rows.value.clone(),
            };
            let a = with.run(&mut states[0], &drive::feed(rows, length, retro, None), binding);
            let b = without.run(&mut states[1], &drive::feed(&rotated, length, retro, None), binding);
            compare::assert_close(&format!("{what}: to {length}"), &a, &b, 2e-5);
            let pages = attrs.pages(length);
            assert_eq!(
                states[0].page_steps(0, pages),
                states[1].page_steps(0, pages),
                "{what}: to {length}"
            );
        };
        both(&drive::rows(&mut random, attrs, 100), 100, -1);
        both(&drive::rows(&mut random, attrs, 30), prompt, -1);
        for t in prompt..prompt + steps {
            both(
                &drive::rows(&mut random, attrs, attrs.window),
                t + 1,
                attrs.window as i32 - 1,
            );
        }
        let keys: Vec<_> = states.iter().map(|s| s.rows(KEY, 0, prompt + steps)).collect();
        compare::assert_close(&format!("{what}: keys"), &keys[0], &keys[1], 2e-6);
    }
}

#[test]
fn half_and_interleaved() {
    for window in [1, 4] {
        let attrs = Attrs {
            window,
            ..Attrs::new(4, 2, 32).budget(0.2, 3)
        };
        for interleaved in [false, true] {
            for packed in [false, true] {
                inside_equals_outside(&attrs, 16, interleaved, packed);
            }
        }
    }
}

#[test]
fn partial() {
    let attrs = Attrs {
        window: 4,
        ..Attrs::new(4, 2, 32).budget(0.2, 3)
    };
    for half in [8, 4] {
        for interleaved in [false, true] {
            inside_equals_outside(&attrs, half, interleaved, false);
        }
    }
}
