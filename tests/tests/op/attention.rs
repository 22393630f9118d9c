//! What no golden vector covers, against the oracle: selectors, modes, softcap, sliding windows, head sinks. And dense
//! nodes against ONNX Runtime's own GroupQueryAttention, whose conventions they follow.

use retro_contract::{GroupScore, Mode, Selector};
use retro_tests::{
    attrs::Attrs,
    compare, host,
    layer::{Binding, Constants, Layer, State},
    node::{self, Slots},
    random::Random,
    tensor::{Dtype, Tens},
};

use crate::drive::{self, Duel};

fn everywhere(duel: Duel) {
    for &dtype in host::dtypes() {
        for binding in Binding::BOTH {
            Duel {
                dtype,
                attrs: duel.attrs.clone(),
                head_sink: duel.head_sink.clone(),
                ..duel
            }
            .run(binding);
        }
    }
}

fn small() -> Attrs {
    let mut attrs = Attrs::new(4, 2, 32).budget(0.2, 3);
    attrs.window = 4;
    attrs
}

#[test]
fn every_selector_and_group_score() {
    for selector in host::selectors() {
        for group_score in [GroupScore::Max, GroupScore::Softmax] {
            for (window, lambda, page) in [(1, 2.5, 16), (4, 1.0, 8), (8, 3.0, 32)] {
                let attrs = Attrs {
                    selector,
                    group_score,
                    window,
                    lambda,
                    page,
                    ..small()
                };
                everywhere(Duel::new(attrs, 210, 20));
            }
        }
    }
}

#[test]
fn page_sizes_and_windows_to_the_limits() {
    for (page, window, prompt) in [(8, 64, 100), (64, 3, 300), (128, 2, 700), (16, 40, 1)] {
        everywhere(Duel::new(
            Attrs {
                page,
                window,
                ..small()
            },
            prompt,
            if window > 10 { 70 } else { 12 },
        ));
    }
}

/// Every selector's pages below 8 tokens; but for adamas_rms, whose codes lie too near their thresholds here for one
/// choice alone to be right.
fn small_page_sizes() -> impl Iterator<Item = (Selector, usize)> {
    let sizes = |selector: Selector| {
        [1, 2, 4]
            .into_iter()
            .filter(move |page| selector.page_sizes().contains(page))
    };
    host::selectors()
        .into_iter()
        .filter(|&selector| selector != Selector::AdamasRms)
        .flat_map(move |selector| sizes(selector).map(move |page| (selector, page)))
}

#[test]
fn small_pages() {
    for (selector, page) in small_page_sizes() {
        for (group_score, window) in [
            (GroupScore::Softmax, 4),
            (GroupScore::Max, 1),
            (GroupScore::Softmax, 64),
        ] {
            let attrs = Attrs {
                selector,
                page,
                group_score,
                window,
                ..small()
            };
            everywhere(Duel::new(attrs, 140, if window > 10 { 70 } else { 20 }));
        }
    }
}

/// What a step reads without choosing, and what a sliding window and a group of heads leave.
#[test]
fn small_pages_in_every_mode() {
    for (selector, page) in small_page_sizes() {
        let attrs = Attrs {
            selector,
            page,
            ..small()
        };
        for mode in [Mode::Dense, Mode::Streaming, Mode::Periodic] {
            for (window, local_window_size) in [(1, -1), (4, -1), (4, 33), (64, -1)] {
                let attrs = Attrs {
                    mode,
                    window,
                    local_window_size,
                    sink_pages: usize::from(local_window_size < 0),
                    ..attrs.clone()
                };
                everywhere(Duel::new(attrs, 131, if window > 10 { 66 } else { 12 }));
            }
        }
        everywhere(Duel::new(attrs.clone().full_budget(), 70, 20));
        for local_window_size in [1, 7, 50] {
            let attrs = Attrs {
                local_window_size,
                sink_pages: 0,
                ..attrs.clone()
            };
            everywhere(Duel::new(attrs, 150, 12));
        }
        for (heads, kv_heads, head_size) in [(7, 1, 80), (16, 1, 128), (3, 1, 256)] {
            let attrs = Attrs {
                heads,
                kv_heads,
                head_size,
                ..attrs.clone()
            };
            everywhere(Duel::new(attrs, 90, 8));
        }
    }
}

#[test]
fn odd_shapes() {
    // The CUDA kernels have the head sizes that models have.
    let shapes = if host::on_gpu() {
        [
            (1, 1, 32),
            (3, 1, 96),
            (6, 6, 64),
            (7, 1, 80),
            (5, 5, 256),
            (16, 1, 128),
        ]
    } else {
        [(1, 1, 8), (3, 1, 40), (6, 6, 24), (7, 1, 80), (5, 5, 256), (16, 1, 128)]
    };
    for (heads, kv_heads, head_size) in shapes {
        let attrs = Attrs {
            heads,
            kv_heads,
            head_size,
            ..small()
        };
        everywhere(Duel::new(attrs, 90, 10));
    }
}

#[test]
fn softcap() {
    for window in [1, 4] {
        everywhere(Duel::new(
            Attrs {
                softcap: 2.0,
                window,
                ..small()
            },
            150,
            16,
        ));
    }
}

#[test]
fn head_sink_counts_once() {
    let head_sink = Some(vec![0.5, -1.0, 3.0, 4.5]);
    for window in [1, 4] {
        let attrs = Attrs { window, ..small() };
        everywhere(Duel {
            head_sink: head_sink.clone(),
            ..Duel::new(attrs, 150, 16)
        });
    }
}

/// Pages wholly outside the window are never candidates. Without sink pages, which a window leaves behind.
#[test]
fn sliding_window() {
    for local_window_size in [1, 20, 50, 64, 1000] {
        for window in [1, 4] {
            let attrs = Attrs {
                local_window_size,
                window,
                sink_pages: 0,
                ..small()
            };
            everywhere(Duel::new(attrs, 150, 20));
        }
    }
}

/// With the whole budget the sink page makes no difference to a sliding window.
#[test]
fn sliding_window_with_the_whole_budget_is_dense() {
    let mut attrs = Attrs {
        local_window_size: 40,
        window: 1,
        ..small()
    }
    .full_budget();
    let mut random = Random::new(11);
    let prompt = drive::rows(&mut random, &attrs, 100);
    let steps: Vec<_> = (0..20).map(|_| drive::rows(&mut random, &attrs, 1)).collect();
    let outputs = [Mode::Retro, Mode::Dense].map(|mode| {
        attrs.mode = mode;
        let layer = Layer::new(&attrs, Dtype::F32);
        let mut state = State::new(&attrs, Dtype::F32, 1, 128);
        let mut all = layer.run(&mut state, &drive::prefill_feed(&prompt, 100), Binding::InPlace);
        for (i, rows) in steps.iter().enumerate() {
            all.extend(layer.run(&mut state, &drive::feed(rows, 101 + i, 0, None), Binding::InPlace));
        }
        all
    });
    compare::assert_close("full budget against dense", &outputs[0], &outputs[1], 2e-5);
}

#[test]
fn mode_dense_attends_to_everything() {
    for window in [1, 4, 8] {
        everywhere(Duel::new(
            Attrs {
                mode: Mode::Dense,
                window,
                ..small()
            },
            150,
            16,
        ));
    }
    let head_sink = Some(vec![0.5, -1.0, 3.0, 4.5]);
    let attrs = Attrs {
        mode: Mode::Dense,
        softcap: 3.0,
        local_window_size: 33,
        ..small()
    };
    everywhere(Duel {
        head_sink,
        ..Duel::new(attrs, 150, 16)
    });
}

#[test]
fn mode_streaming_keeps_the_sinks_and_the_newest() {
    for (window, sink_pages) in [(1, 1), (1, 2), (4, 1), (2, 0)] {
        everywhere(Duel::new(
            Attrs {
                mode: Mode::Streaming,
                window,
                sink_pages,
                ..small()
            },
            210,
            24,
        ));
    }
}

/// With and without pages between, also where a sliding window has left page 0 behind.
#[test]
fn mode_periodic_keeps_the_sinks_the_newest_and_every_pith() {
    for (window, sink_pages, ratio, local_window_size) in [
        (1, 1, 0.2, -1),
        (1, 2, 0.5, -1),
        (4, 1, 0.4, -1),
        (2, 0, 0.1, -1),
        (4, 1, 0.4, 150),
    ] {
        let attrs = Attrs {
            mode: Mode::Periodic,
            window,
            sink_pages,
            local_window_size,
            ..small()
        };
        everywhere(Duel::new(attrs.budget(ratio, 1), 330, 24));
    }
}

/// Unchanged queries, keys and values: a token's output is attention over all pages loaded since it was new. So with
/// the whole budget every window is dense attention.
#[test]
fn the_whole_budget_is_dense_attention_whatever_the_window() {
    for window in [1, 2, 8, 33] {
        everywhere(Duel::new(Attrs { window, ..small() }.full_budget(), 60, 40));
    }
}

/// Runs the GroupQueryAttention node in place.
fn run_gqa(session: &host::Opened, inputs: &[(&str, &Tens)], result: &mut Tens, kv: &mut [Tens; 2]) {
    let known = |name: &str| node::GQA_INPUTS.contains(&name);
    let inputs: Vec<_> = inputs.iter().copied().filter(|(name, _)| known(name)).collect();
    let [key, value] = kv;
    let mut in_place = [("past_key", "present_key", key), ("past_value", "present_value", value)];
    host::run(session, &inputs, &mut [("output", result)], &mut in_place).expect("GroupQueryAttention runs");
}

/// Prompt, chunk, single tokens: a dense node gives what GroupQueryAttention gives.
#[test]
fn dense_nodes_follow_group_query_attention() {
    let plain = Attrs {
        mode: Mode::Dense,
        window: 1,
        ..small()
    };
    let variants = [
        ("plain", plain.clone(), false),
        (
            "scale",
            Attrs {
                scale: 0.4,
                ..plain.clone()
            },
            false,
        ),
        (
            "softcap",
            Attrs {
                softcap: 2.0,
                ..plain.clone()
            },
            false,
        ),
        (
            "sliding window",
            Attrs {
                local_window_size: 21,
                ..plain.clone()
            },
            false,
        ),
        ("head sink", plain.clone(), true),
        (
            "all",
            Attrs {
                softcap: 2.0,
                local_window_size: 21,
                do_rotary: true,
                ..plain.clone()
            },
            true,
        ),
        (
            "rotary",
            Attrs {
                do_rotary: true,
                ..plain.clone()
            },
            false,
        ),
        (
            "interleaved",
            Attrs {
                do_rotary: true,
                rotary_interleaved: true,
                ..plain.clone()
            },
            false,
        ),
    ];
    // On the CPU, where GroupQueryAttention has these two types.
    for dtype in [Dtype::F32, Dtype::F16] {
        for (what, attrs, sink) in &variants {
            let mut random = Random::new(5);
            let rotary = attrs.do_rotary.then(|| crate::rotary::caches(attrs.head_size / 2, 256));
            let constants = Constants {
                rotary,
                rotary_half: attrs.head_size / 2,
                head_sink: sink.then(|| vec![0.5, -1.0, 3.0, 4.5]),
            };
            let layer = Layer::with(attrs, dtype, Slots::default(), &constants);
            let slots = Slots {
                rotary: attrs.do_rotary,
                head_sink: *sink,
                ..Slots::default()
            };
            let gqa = host::open_on_cpu(&node::gqa(attrs, slots, dtype)).expect("a GroupQueryAttention session");
            let capacity = 140;
            let mut state = State::new(attrs, dtype, 1, capacity);
            let mut kv = [0, 1].map(|_| {
                let shape = [1, attrs.kv_heads, capacity, attrs.head_size];
                Tens::floats(dtype, &shape, &vec![0.0; shape.iter().product()])
            });
            let mut length = 0;
            for count in [70, 1, 13, 1, 1, 1, 30, 1] {
                length += count;
                let rows = drive::rows(&mut random, attrs, count);
                let feed = drive::prefill_feed(&rows, length);
                let retro = if count == 1 { 0 } else { -1 };
                let got = layer.run(&mut state, &drive::feed(&rows, length, retro, None), Binding::InPlace);
                let owned = layer.inputs(&feed);
                let mut inputs: Vec<(&str, &Tens)> = owned.iter().map(|(name, t)| (*name, t)).collect();
                inputs.extend(layer.constants());
                let mut result = layer.output(&feed);
                run_gqa(&gqa, &inputs, &mut result, &mut kv);
                let expected = result.read();
                let tolerance = if dtype == Dtype::F16 { 4e-3 } else { 2e-5 };
                compare::assert_close(&format!("{what} {dtype:?} to {length}"), &got, &expected, tolerance);
            }
        }
    }
}

/// A broken model shows, as with dense attention (more in broken.rs): what a NaN or an infinite key touches is NaN, not
/// some finite number.
#[test]
fn broken_keys_are_not_hidden() {
    for broken in [f32::NAN, f32::INFINITY] {
        for dtype in [Dtype::F32, Dtype::F16] {
            let attrs = small();
            let layer = Layer::new(&attrs, dtype);
            let mut random = Random::new(5);
            let mut state = State::new(&attrs, dtype, 1, 60);
            let prompt = drive::rows(&mut random, &attrs, 40);
            layer.run(&mut state, &drive::prefill_feed(&prompt, 40), Binding::InPlace);
            let mut rows = drive::rows(&mut random, &attrs, 1);
            rows.key.fill(broken);
            let feed = drive::feed(&rows, 41, 0, None);
            let owned = layer.inputs(&feed);
            let inputs: Vec<_> = owned.iter().map(|(name, t)| (*name, t)).collect();
            let mut result = layer.output(&feed);
            layer
                .call_in_place(&inputs, &mut result, &mut state)
                .expect("the call succeeds");
            let output = result.read();
            assert!(output.iter().all(|x| x.is_nan()), "{dtype:?} {broken}: {output:?}");
        }
    }
}
