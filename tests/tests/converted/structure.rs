//! Models whose structure is not a plain decoder's: what imports they have, state beside caches, an encoder's keys and
//! values.

use std::{fs, path::Path};

use ort::value::ValueType;
use prost::Message;
use retro_contract::{SKETCH_BLOCK, graph, pages_for};
use retro_onnx::{ModelProto, OperatorSetIdProto, ValueInfoProto, read_model};
use retro_tests::{
    host::{self, Opened},
    paths,
    tensor::{Dtype, Tens},
    zoo,
};

use crate::{
    convert::{convert, default_page},
    verify::compared,
};

const CASE: &str = "genai-llama-fp32-cpu";

/// The case's folder with its model changed.
fn variant(change: impl FnOnce(&mut ModelProto)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(paths::zoo(CASE)).unwrap().flatten() {
        fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    let path = folder.path().join("model.onnx");
    let mut model = read_model(&path).unwrap().model;
    change(&mut model);
    // The bytes that were read may be those of the file itself.
    let bytes = model.encode_to_vec();
    fs::remove_file(&path).unwrap();
    fs::write(&path, bytes).unwrap();
    folder
}

fn converts(change: impl FnOnce(&mut ModelProto)) {
    let folder = variant(change);
    let verification = compared(&folder.path().join("model.onnx"));
    assert!(
        verification["compared"].as_array().unwrap().len() >= 9,
        "{verification}"
    );
}

fn is_onnx(import: &OperatorSetIdProto) -> bool {
    ["", "ai.onnx"].contains(&import.domain())
}

#[test]
fn without_an_import_of_onnx_operators() {
    converts(|model| model.opset_import.retain(|import| !is_onnx(import)));
}

#[test]
fn onnx_by_its_other_name() {
    converts(|model| {
        let mut imports = model.opset_import.iter_mut();
        imports.find(|i| is_onnx(i)).expect("ONNX").domain = Some("ai.onnx".to_owned());
    });
}

#[test]
fn the_last_of_several_imports_counts() {
    converts(|model| model.opset_import.insert(0, OperatorSetIdProto::new("", 7)));
}

#[test]
fn without_an_import_of_contributed_operators() {
    converts(|model| model.opset_import.retain(|import| import.domain() != "com.microsoft"));
}

/// Initializers that are inputs were constants there, so that `retro_length` could not be fed.
#[test]
fn format_of_version_3() {
    converts(|model| {
        model.ir_version = Some(3);
        let graph = model.graph.as_mut().expect("a graph");
        for tensor in &graph.initializer {
            let dims = tensor.dims.iter().map(|d| (*d).into()).collect::<Vec<_>>();
            let value = ValueInfoProto::tensor(tensor.name(), tensor.data_type().try_into().expect("a type"), dims);
            graph.input.push(value);
        }
    });
}

#[test]
fn imports_that_no_runtime_takes_are_refused() {
    let refused = |change: fn(&mut ModelProto), says: &str| {
        let folder = variant(change);
        let target = folder.path().join("converted.onnx");
        let why = convert(&folder.path().join("model.onnx"), &target, &[]).expect_err(says);
        assert!(why.contains(says) && !target.exists(), "{why}");
    };
    refused(|model| model.opset_import.clear(), "imports no operator set");
    refused(
        |model| {
            model
                .opset_import
                .iter_mut()
                .filter(|i| is_onnx(i))
                .for_each(|i| i.version = Some(0))
        },
        "version 0 of ONNX's operators",
    );
}

const CAPACITY: usize = 48;
/// Tokens that the encoder of an encoder-decoder saw.
const ENCODED: usize = 9;

/// A model that is fed tokens, whatever it carries on.
struct Model {
    session: Opened,
    converted: bool,
    state: Vec<(String, String, Tens)>,
    /// What an encoder gave, the same in each call.
    given: Vec<(String, Tens)>,
    vocabulary: usize,
}

fn dims(value: &ValueType) -> Vec<i64> {
    value.tensor_shape().expect("a tensor").to_vec()
}

/// Numbers that look random.
fn noise(count: usize, seed: usize) -> Vec<f32> {
    let number = |i: usize| ((i * 7919 + seed * 104_729 + 13) % 2003) as f32 / 1001.5 - 1.0;
    (0..count).map(number).collect()
}

impl Model {
    fn open(path: &Path, converted: bool) -> Self {
        let session = host::open_file(path, converted).expect("it loads");
        let (mut state, mut given) = (Vec::new(), Vec::new());
        for (index, input) in session.inputs().iter().enumerate() {
            let past = input.name().to_owned();
            if !past.starts_with("past_") {
                continue;
            }
            let encoded = past.contains(".encoder.");
            let rows = match (encoded, converted) {
                (true, _) => ENCODED,
                (false, true) if past.ends_with("page_summary") => CAPACITY.div_ceil(SKETCH_BLOCK),
                (false, true) if past.ends_with("page_steps") => pages_for(CAPACITY, default_page()),
                (false, true) => CAPACITY,
                (false, false) => 0,
            };
            let shape = dims(input.dtype()).into_iter().enumerate();
            let size = |(axis, d): (usize, i64)| usize::try_from(d).unwrap_or(if axis == 0 { 1 } else { rows });
            let shape: Vec<usize> = shape.map(size).collect();
            let count = shape.iter().product();
            if encoded {
                given.push((past, Tens::floats(Dtype::F32, &shape, &noise(count, index))));
                continue;
            }
            let present = past
                .replacen("past_retro", "present_retro", 1)
                .replacen("past_key_values", "present", 1);
            let tensor = if past.ends_with("page_steps") {
                Tens::ints(&shape, &vec![0; count])
            } else if past.ends_with("page_summary") {
                Tens::poisoned(Dtype::U8, &shape)
            } else {
                Tens::floats(Dtype::F32, &shape, &vec![0.0; count])
            };
            state.push((past, present, tensor));
        }
        let logits = session.outputs().iter().find(|o| o.name() == "logits").expect("logits");
        let vocabulary = *dims(logits.dtype()).last().expect("a vocabulary") as usize;
        Self {
            session,
            converted,
            state,
            given,
            vocabulary,
        }
    }

    /// The newest token's logits.
    fn feed(&mut self, tokens: &[i64], total: usize, retro: i32) -> Vec<f32> {
        let (count, first) = (tokens.len(), (total - tokens.len()) as i64);
        let takes = |name: &str| self.session.inputs().iter().any(|i| i.name() == name);
        let positions: Vec<i64> = (first..total as i64).collect();
        let mut owned = vec![("input_ids", Tens::longs(&[1, count], tokens))];
        if takes("attention_mask") {
            owned.push(("attention_mask", Tens::longs(&[1, total], &vec![1; total])));
        }
        if takes("position_ids") {
            owned.push(("position_ids", Tens::longs(&[1, count], &positions)));
        }
        if self.converted {
            owned.push((graph::RETRO_LENGTH, Tens::ints(&[1], &[retro])));
            let all = pages_for(CAPACITY, default_page()) as i32;
            owned.push((graph::PAGE_BUDGET, Tens::ints(&[1], &[all])));
        }
        let mut inputs: Vec<(&str, &Tens)> = owned.iter().map(|(name, t)| (*name, t)).collect();
        inputs.extend(self.given.iter().map(|(name, t)| (name.as_str(), t)));
        inputs.extend(self.state.iter().map(|(past, _, t)| (past.as_str(), t)));
        let mut new: Vec<(String, Tens)> = Vec::new();
        for (past, present, old) in &self.state {
            let mut shape = old.shape().to_vec();
            // A cache of an original grows.
            if !self.converted && (past.ends_with("key") || past.ends_with("value")) {
                shape[2] = total;
            }
            let tensor = if past.ends_with("page_steps") {
                Tens::ints(&shape, &vec![0; shape.iter().product()])
            } else {
                Tens::poisoned(old.dtype(), &shape)
            };
            new.push((present.clone(), tensor));
        }
        let rows = if self.converted { 1 } else { count };
        let mut logits = Tens::poisoned(Dtype::F32, &[1, rows, self.vocabulary]);
        let mut outputs: Vec<(&str, &mut Tens)> = vec![("logits", &mut logits)];
        outputs.extend(new.iter_mut().map(|(name, t)| (name.as_str(), t)));
        host::run(&self.session, &inputs, &mut outputs, &mut []).expect("it runs");
        for ((_, _, old), (_, new)) in self.state.iter_mut().zip(new) {
            *old = new;
        }
        let logits = logits.read();
        logits[logits.len() - self.vocabulary..].to_vec()
    }
}

/// What a model gives for a prompt in two pieces and steps that feed up to `window` tokens.
fn logits(model: &mut Model, window: usize) -> Vec<f32> {
    let token = |i: usize| 3 + (i * 37 % 200) as i64;
    let tokens: Vec<i64> = (0..CAPACITY).map(token).collect();
    let mut all = model.feed(&tokens[..11], 11, -1);
    all.extend(model.feed(&tokens[11..17], 17, -1));
    let mut retro = 0;
    for t in 17..CAPACITY {
        all.extend(model.feed(&tokens[t - retro..=t], t + 1, retro as i32));
        retro = (retro + 1).min(window - 1);
    }
    all
}

fn equal(case: &str, options: &[&str], windows: &[usize]) {
    if host::on_gpu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let [source, target] = ["source.onnx", "converted.onnx"].map(|n| folder.path().join(n));
    zoo::restore(&paths::data("zoo-graphs").join(format!("{case}.onnx.xz")), &source);
    let expected = logits(&mut Model::open(&source, false), 1);
    let largest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
    for window in windows {
        let width = window.to_string();
        convert(&source, &target, &[&["--window", &width, "--force"], options].concat()).expect("it converts");
        let got = logits(&mut Model::open(&target, true), *window);
        assert_eq!(expected.len(), got.len());
        let difference = expected
            .iter()
            .zip(&got)
            .fold(0f32, |most, (a, b)| most.max((a - b).abs()));
        println!("{case}, w = {window}: {difference:.1e} of {largest:.1}");
        assert!(
            difference <= 1e-4 * largest.max(1.0),
            "{case}, w = {window}: {difference} of {largest}"
        );
    }
}

/// Convolution and recurrent state beside attention.
#[test]
fn a_hybrid_gives_its_originals_logits() {
    equal("mobius-qwen35", &[], &[1]);
}

/// The decoder with a past of an encoder-decoder: attention to the encoder's keys stays, and takes a token as often as
/// it is fed.
#[test]
fn self_attention_beside_cross_attention_gives_its_originals_logits() {
    equal("optimum-whisper-with_past", &["--partial"], &[1, 2, 4]);
}
