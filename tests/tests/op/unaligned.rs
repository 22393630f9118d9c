//! Memory at any address: what a host binds, and weights that ONNX Runtime maps from a file at any offset.

use prost::Message;
use retro_onnx::{ModelProto, StringStringEntryProto, TensorProto};
use retro_tests::{
    attrs::Attrs,
    compare, host,
    layer::{Binding, Constants, Layer, STATE, State},
    node::{self, Slots},
    random::Random,
    tensor::Tens,
};

use crate::drive;

fn attrs() -> Attrs {
    Attrs {
        window: 4,
        do_rotary: true,
        ..Attrs::new(4, 2, 32).budget(0.2, 3)
    }
}

fn constants() -> Constants {
    let half = 16;
    let angle = |i: usize| (i / half) as f32 * 0.3f32.powi((i % half) as i32);
    let table = |f: fn(f32) -> f32| (0..120 * half).map(|i| f(angle(i))).collect();
    Constants {
        rotary: Some((table(f32::cos), table(f32::sin))),
        rotary_half: half,
        head_sink: Some(vec![0.5, -1.0, 0.25, 2.0]),
    }
}

/// A prompt and steps; `call` makes each of them.
fn outputs(
    layer: &Layer,
    state: &mut State,
    mut call: impl FnMut(&mut State, &retro_tests::layer::Feed) -> Vec<f32>,
) -> Vec<f32> {
    let mut random = Random::new(3);
    let rows = drive::rows(&mut random, &layer.attrs, 60);
    let mut all = call(state, &drive::prefill_feed(&rows, 60));
    for t in 60..70 {
        let r = (t - 60).min(3);
        let rows = drive::rows(&mut random, &layer.attrs, r + 1);
        all.extend(call(state, &drive::feed(&rows, t + 1, r as i32, None)));
    }
    all
}

/// Every input and output at addresses that are multiples of 1, 2, 4 and 8 bytes and no more.
#[test]
fn tensors_anywhere_in_memory() {
    for &dtype in host::dtypes() {
        for (slots, constants) in [
            (
                Slots {
                    page_budget: true,
                    ..Slots::default()
                },
                constants(),
            ),
            (
                Slots {
                    packed: true,
                    ..Slots::default()
                },
                constants(),
            ),
            // ONNX Runtime's own operator may make the prompt's outputs.
            (
                Slots::default(),
                Constants {
                    head_sink: None,
                    ..constants()
                },
            ),
        ] {
            let layer = Layer::with(&attrs(), dtype, slots, &constants);
            let mut state = State::new(&layer.attrs, dtype, 1, 80);
            let expected = outputs(&layer, &mut state, |state, feed| {
                layer.run(state, feed, Binding::InPlace)
            });
            for offset in [1, 2, 3, 4, 6, 8] {
                for binding in Binding::BOTH {
                    let mut moved = State::new(&layer.attrs, dtype, 1, 80);
                    let got = outputs(&layer, &mut moved, |state, feed| {
                        let owned = layer.inputs(feed);
                        let mut inputs: Vec<(&str, &Tens)> = owned.iter().map(|(name, t)| (*name, t)).collect();
                        inputs.extend(layer.constants());
                        let mut result = layer.output(feed);
                        let mut out = vec![("output", &mut result)];
                        match binding {
                            Binding::InPlace => {
                                let mut state: Vec<_> = STATE
                                    .iter()
                                    .zip(&mut state.tensors)
                                    .map(|(n, t)| (n.0, n.1, t))
                                    .collect();
                                host::run_at(offset, &layer.session, &inputs, &mut out, &mut state)
                                    .expect("the call succeeds");
                            }
                            Binding::Copying => {
                                let past = state.duplicate();
                                inputs.extend(STATE.iter().zip(&past.tensors).map(|(n, t)| (n.0, t)));
                                out.extend(STATE.iter().zip(&mut state.tensors).map(|(n, t)| (n.1, t)));
                                host::run_at(offset, &layer.session, &inputs, &mut out, &mut [])
                                    .expect("the call succeeds");
                            }
                        }
                        result.read()
                    });
                    let what = format!("{dtype:?} {slots:?} {binding:?} at {offset}");
                    // On CUDA what lies elsewhere may be read, and a prefill be made, in another way.
                    let tolerance = if !host::on_gpu() {
                        0.0
                    } else {
                        dtype.tolerance().max(2e-5) * 2.0
                    };
                    compare::assert_close(&what, &got, &expected, tolerance);
                }
            }
        }
    }
}

/// Weights in a file behind an odd number of bytes.
#[test]
fn weights_at_any_offset_of_a_file() {
    for &dtype in host::dtypes() {
        let constants = constants();
        let slots = Slots {
            page_budget: true,
            ..Slots::default()
        };
        let layer = Layer::with(&attrs(), dtype, slots, &constants);
        let mut state = State::new(&layer.attrs, dtype, 1, 80);
        let expected = outputs(&layer, &mut state, |state, feed| {
            layer.run(state, feed, Binding::InPlace)
        });
        for offset in [1usize, 2, 3, 7] {
            let folder = tempfile::tempdir().expect("a folder");
            let slots = Slots {
                rotary: true,
                head_sink: true,
                ..slots
            };
            let made = node::retro(node::attributes(&layer.attrs), slots, dtype);
            let mut model = ModelProto::decode(made.as_slice()).expect("a model");
            let graph = model.graph.as_mut().expect("a graph");
            let mut data = vec![0x5a; offset];
            for (name, tensor) in layer.constants() {
                graph.input.retain(|v| v.name.as_deref() != Some(name));
                let entry = |key: &str, value: String| StringStringEntryProto {
                    key: Some(key.to_owned()),
                    value: Some(value),
                };
                graph.initializer.push(TensorProto {
                    name: Some(name.to_owned()),
                    dims: tensor.shape().iter().map(|&n| n as i64).collect(),
                    data_type: Some(node::data_type(dtype).into()),
                    data_location: Some(1),
                    external_data: vec![
                        entry("location", "weights".to_owned()),
                        entry("offset", data.len().to_string()),
                        entry("length", tensor.bytes().len().to_string()),
                    ],
                    ..Default::default()
                });
                data.extend_from_slice(tensor.bytes());
                // The next one is as badly off.
                data.resize(data.len().next_multiple_of(8) + offset, 0x5a);
            }
            std::fs::write(folder.path().join("weights"), &data).expect("weights are written");
            let file = folder.path().join("model.onnx");
            std::fs::write(&file, model.encode_to_vec()).expect("a model is written");
            let session = host::open_file(&file, true).expect("a session");
            let mut state = State::new(&layer.attrs, dtype, 1, 80);
            let got = outputs(&layer, &mut state, |state, feed| {
                let owned = layer.inputs(feed);
                let inputs: Vec<(&str, &Tens)> = owned.iter().map(|(name, t)| (*name, t)).collect();
                let mut result = layer.output(feed);
                let mut state: Vec<_> = STATE
                    .iter()
                    .zip(&mut state.tensors)
                    .map(|(n, t)| (n.0, n.1, t))
                    .collect();
                host::run(&session, &inputs, &mut [("output", &mut result)], &mut state).expect("the call succeeds");
                result.read()
            });
            compare::assert_close(&format!("{dtype:?} at {offset}"), &got, &expected, 0.0);
        }
    }
}
