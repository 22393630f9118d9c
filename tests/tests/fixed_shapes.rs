//! A program of its own, because ONNX Runtime has one environment a process and `retro-run`'s library makes it here.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use prost::Message;
use retro_onnx::{AttributeProto, DataType, GraphProto, NodeProto, TensorProto};
use retro_run::{
    Device, Logits, Model, OpenOptions, Runtime,
    decoder::{self, batch::Prefilled, decode_loop::Policy, session::Steps},
};
use retro_tests::{host, paths, zoo};

/// The program's one environment, whichever test comes first.
fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| Runtime::load_for(host::device(), Some(&paths::onnxruntime())).unwrap())
}

fn convert(source: &Path, target: &Path, window: usize) {
    let settings = retro_export::Settings {
        window,
        ..Default::default()
    };
    retro_export::convert(&retro_export::Options {
        source: source.to_owned(),
        target: Some(target.to_owned()),
        settings,
        ..Default::default()
    })
    .unwrap();
}

/// What a model makes of prompts, the second time from the state of the first.
fn outputs(runtime: &Runtime, folder: &Path, prompts: &[Vec<u32>], window: usize, steps: Steps) -> Vec<Vec<u32>> {
    let options = OpenOptions {
        threads: Some(1),
        plugin: Some(paths::plugin()),
        steps,
        ..OpenOptions::default()
    };
    let mut model = Model::open(runtime, folder, &options).unwrap();
    model.folder.eos.clear();
    let budget = model.retro.is_some().then(|| "1.0".parse().unwrap());
    let policy = Policy::new(&model, Some(window), budget).unwrap();
    let mut ready = Prefilled::new(&mut model, prompts.to_vec(), 120, 16, |_| Ok::<(), decoder::Error>(())).unwrap();
    let mut decode = || {
        ready
            .decode(&mut model, policy, 20, |_| Ok::<(), decoder::Error>(()))
            .unwrap()
            .outputs
    };
    let first = decode();
    assert_eq!(decode(), first, "the state of the prompts is restored");
    first
}

/// In buffers that stay where they are, numbers lie in their declared types, and state that is not updated in place is carried.
#[test]
fn declared_types_and_other_state_are_fed_from_fixed_buffers() {
    let runtime = runtime();
    let prompt = |length: u32, seed: u32| (0..length).map(|i| 3 + (i * seed) % 250).collect::<Vec<u32>>();
    let batches = [vec![prompt(40, 7)], vec![prompt(30, 11), prompt(17, 5)]];
    let genai = |folder: &Path, change: &dyn Fn(&mut GraphProto)| {
        fs::create_dir(folder).unwrap();
        for name in ["genai_config.json", "model.onnx", "model.onnx.data"] {
            fs::copy(paths::zoo("genai-llama-fp32-cpu").join(name), folder.join(name)).unwrap();
        }
        zoo::change(&folder.join("model.onnx"), change);
    };
    let folder = tempfile::tempdir().unwrap();
    let plain = folder.path().join("plain");
    genai(&plain, &|_| {});
    for (i, (ids, mask)) in [(DataType::Int32, DataType::Bool), (DataType::Int32, DataType::Float16)]
        .into_iter()
        .enumerate()
    {
        let typed = folder.path().join(format!("typed{i}"));
        genai(&typed, &|graph| {
            zoo::retype(graph, "input_ids", ids);
            zoo::retype(graph, "attention_mask", mask);
        });
        let converted = folder.path().join(format!("converted{i}"));
        convert(&typed, &converted, 2);
        for prompts in &batches {
            let expected = outputs(runtime, &plain, prompts, 1, Steps::Plain);
            for fixed in [Steps::Plain, Steps::FixedBuffers] {
                assert_eq!(
                    outputs(runtime, &typed, prompts, 1, fixed),
                    expected,
                    "{ids:?} {mask:?} {fixed:?}"
                );
                assert_eq!(
                    outputs(runtime, &converted, prompts, 2, fixed),
                    expected,
                    "{ids:?} {mask:?} {fixed:?}"
                );
            }
        }
    }
    let (hybrid, converted) = (folder.path().join("hybrid"), folder.path().join("hybrid-converted"));
    zoo::runnable("genai-lfm2", &hybrid);
    convert(&hybrid, &converted, 1);
    for prompts in &batches {
        // The original's caches grow, so it decodes one at a time, and once.
        let expected: Vec<Vec<u32>> = prompts
            .iter()
            .map(|prompt| {
                let mut model = Model::open(runtime, &hybrid, &OpenOptions::default()).unwrap();
                let policy = Policy::new(&model, None, None).unwrap();
                let mut ready = Prefilled::new(&mut model, vec![prompt.clone()], 120, 16, |_| {
                    Ok::<(), decoder::Error>(())
                })
                .unwrap();
                ready
                    .decode(&mut model, policy, 20, |_| Ok::<(), decoder::Error>(()))
                    .unwrap()
                    .outputs
                    .remove(0)
            })
            .collect();
        for fixed in [Steps::Plain, Steps::FixedBuffers] {
            assert_eq!(
                outputs(runtime, &converted, prompts, 1, fixed),
                expected,
                "hybrid, {fixed:?}"
            );
        }
    }
}

fn open_on(device: Device, folder: &Path, steps: Steps) -> decoder::Result<Model> {
    let options = OpenOptions {
        threads: Some(1),
        plugin: Some(paths::plugin()),
        device,
        steps,
        ..OpenOptions::default()
    };
    Model::open(runtime(), folder, &options)
}

fn open(folder: &Path, steps: Steps) -> decoder::Result<Model> {
    open_on(Device::Cpu, folder, steps)
}

/// The logits of given tokens behind prompts, position by position.
fn logits(model: &mut Model, prompts: &[Vec<u32>], window: usize) -> Vec<Vec<f32>> {
    let policy = Policy::new(model, Some(window), Some("1.0".parse().unwrap())).unwrap();
    let mut ready = Prefilled::new(model, prompts.to_vec(), 80, 16, |_| Ok::<(), decoder::Error>(())).unwrap();
    let texts: Vec<Vec<u32>> = (0..prompts.len() as u32)
        .map(|row| (0..12 + row).map(|i| 3 + (i * 29 + row) % 250).collect())
        .collect();
    let texts: Vec<&[u32]> = texts.iter().map(Vec::as_slice).collect();
    let mut seen = Vec::new();
    let mut observe = |at: usize, logits: &Logits| {
        let rows = texts.iter().enumerate().filter(|(_, text)| at < text.len());
        seen.push(rows.flat_map(|(row, _)| logits.row(row)).copied().collect());
        Ok::<(), decoder::Error>(())
    };
    ready.force(model, policy, &texts, || Ok(()), &mut observe).unwrap();
    seen
}

fn converted(case: &str, folder: &Path) -> PathBuf {
    let (source, target) = (folder.join(case), folder.join(format!("{case}-converted")));
    zoo::runnable(case, &source);
    convert(&source, &target, 4);
    target
}

/// Exports whose attention is of several nodes, and which take their positions as an input.
const CASES: [&str; 8] = [
    "optimum-llama-fp32",
    "optimum-gpt2-fp32",
    "optimum-phi3-fp32",
    "optimum-qwen2-fp32",
    "optimum120-old_llama-fp32",
    "ortopt-llama-fp32",
    "quant-llama-q4",
    "torchscript-llama-sdpa-op17",
];

/// One prompt, and two of different lengths.
fn batches() -> [Vec<Vec<u32>>; 2] {
    let prompt = |length: u32, seed: u32| (0..length).map(|i| 3 + (i * seed) % 250).collect::<Vec<u32>>();
    [vec![prompt(40, 7)], vec![prompt(30, 11), prompt(17, 5)]]
}

/// Models that came without GroupQueryAttention, fed masks as wide as their caches, as a captured step has them.
#[test]
fn attention_of_several_nodes_is_fed_from_fixed_buffers() {
    let folder = tempfile::tempdir().unwrap();
    for case in CASES {
        let target = converted(case, folder.path());
        for prompts in &batches() {
            for window in [1, 3] {
                let of = |steps| {
                    let rows = logits(&mut open(&target, steps).unwrap(), prompts, window);
                    assert!(rows.iter().all(|row| !row.is_empty()));
                    rows.iter().flatten().map(|x| x.to_bits()).collect::<Vec<u32>>()
                };
                assert!(
                    of(Steps::Plain) == of(Steps::FixedBuffers),
                    "{case}, w = {window}, {} prompts",
                    prompts.len()
                );
            }
        }
    }
}

/// On a GPU (`RETRO_TEST_DEVICE=cuda`) the steps of these models are captured without being asked for, and give what they
/// give elsewhere; those of models that read their mask's width are not.
#[test]
fn attention_of_several_nodes_is_captured_on_a_gpu() {
    if !host::on_gpu() {
        return println!("not tested: RETRO_TEST_DEVICE does not name a GPU");
    }
    let folder = tempfile::tempdir().unwrap();
    for case in CASES {
        let target = converted(case, folder.path());
        let of = |steps| {
            let mut model = open_on(host::device(), &target, steps).unwrap();
            let line = model.device_line().unwrap();
            let captured = line.contains("steps as a CUDA graph");
            assert_eq!(captured, steps == Steps::CapturedIfPossible, "{case}: {line}");
            let run = |prompts| logits(&mut model, prompts, 3);
            batches()
                .iter()
                .map(Vec::as_slice)
                .flat_map(run)
                .flatten()
                .collect::<Vec<f32>>()
        };
        let (plain, captured) = (of(Steps::Plain), of(Steps::CapturedIfPossible));
        assert_eq!(plain.len(), captured.len(), "{case}");
        let largest = plain.iter().fold(1.0f32, |most, x| most.max(x.abs()));
        for (a, b) in plain.iter().zip(&captured) {
            assert!((a - b).abs() <= 1e-3 * largest, "{case}: {a} and {b}");
        }
    }
    let target = converted("tfexp-llama-fp32", folder.path());
    let model = open_on(host::device(), &target, Steps::CapturedIfPossible).unwrap();
    let line = model.device_line().unwrap();
    assert!(
        line.contains("without a CUDA graph: ") && line.contains("width"),
        "{line}"
    );
}

/// NonZero waits for the GPU, which forbids to capture a step: ONNX Runtime says so at the first one alone.
#[test]
fn steps_that_fail_to_be_captured_run_without() {
    if !host::on_gpu() {
        return println!("not tested: RETRO_TEST_DEVICE does not name a GPU");
    }
    let folder = tempfile::tempdir().unwrap();
    let target = converted("optimum-llama-fp32", folder.path());
    let plain = logits(
        &mut open_on(host::device(), &target, Steps::Plain).unwrap(),
        &batches()[0],
        3,
    );
    zoo::change(&target.join("model.onnx"), |graph| {
        let last = graph
            .node
            .iter_mut()
            .flat_map(|n| &mut n.output)
            .find(|o| *o == "logits");
        "every".clone_into(last.expect("logits"));
        graph.initializer.push(TensorProto::floats("nothing", &[1], &[0.0]));
        let float = AttributeProto::int("to", i64::from(i32::from(DataType::Float)));
        let node =
            |op_type: &str, inputs: &[&str], output: &str| NodeProto::new("", op_type, output, inputs, &[output]);
        graph.node.extend([
            node("NonZero", &["input_ids"], "places"),
            node("Cast", &["places"], "numbers").with(float),
            node("ReduceSum", &["numbers"], "sum").with(AttributeProto::int("keepdims", 0)),
            node("Mul", &["sum", "nothing"], "zero"),
            node("Add", &["every", "zero"], "logits"),
        ]);
    });
    let mut model = open_on(host::device(), &target, Steps::CapturedIfPossible).unwrap();
    let line = model.device_line().unwrap();
    assert!(line.contains("without a CUDA graph: the first try failed"), "{line}");
    assert!(logits(&mut model, &batches()[0], 3) == plain);
}

/// Steps are captured where the graph shows that the mask's width is no matter. Others say why they are not.
#[test]
fn a_model_that_reads_its_masks_width_refuses_them() {
    let folder = tempfile::tempdir().unwrap();
    // Positions are made from the width, or from the mask's numbers.
    for case in ["tfexp-llama-fp32", "optimum-gemma2-fp32", "optimum120-old_opt-fp32"] {
        let target = converted(case, folder.path());
        assert!(
            open(&target, Steps::Plain).unwrap().retro.unwrap().lengths_from_width,
            "{case}"
        );
        refuses(&target, "width");
    }
    // One that was converted before masks as wide as the cache were taken.
    let older = converted("optimum-llama-fp32", folder.path());
    assert!(
        !open(&older, Steps::FixedBuffers)
            .unwrap()
            .retro
            .unwrap()
            .lengths_from_width
    );
    let graph = older.join("model.onnx");
    let mut model = retro_onnx::read_model(&graph).unwrap().model;
    model.set_metadata("retro.lengths", "mask_width");
    let bytes = model.encode_to_vec();
    drop(model);
    fs::remove_file(&graph).unwrap();
    fs::write(&graph, bytes).unwrap();
    refuses(&older, "width");
    // One that nobody converted.
    let original = folder.path().join("positions");
    zoo::runnable("optimum120-old_opt-fp32", &original);
    refuses(&original, "width");
}

fn refuses(folder: &Path, says: &str) {
    let error = format!("{:#}", open(folder, Steps::FixedBuffers).err().expect("a refusal"));
    assert!(
        error.contains(says) && error.contains("without --cuda-graph"),
        "{error}"
    );
}
