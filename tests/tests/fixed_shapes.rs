//! A program of its own, because ONNX Runtime has one environment a process and `retro-run`'s library makes it here.

use std::{fs, path::Path, sync::OnceLock};

use retro_onnx::{DataType, GraphProto};
use retro_run::{
    Model, OpenOptions, Runtime,
    decoder::{self, batch::Prefilled, decode_loop::Policy, session::Steps},
};
use retro_tests::{paths, zoo};

/// The program's one environment, whichever test comes first.
fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| Runtime::load(Some(&paths::onnxruntime())).unwrap())
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

/// Such a model takes its length from its mask's width, and a CUDA graph replays one shape.
#[test]
fn a_model_that_reads_its_masks_width_refuses_them() {
    let folder = tempfile::tempdir().unwrap();
    let (source, target) = (folder.path().join("source"), folder.path().join("converted"));
    zoo::runnable("optimum-llama-fp32", &source);
    retro_export::convert(&retro_export::Options {
        source,
        target: Some(target.clone()),
        ..Default::default()
    })
    .unwrap();
    let runtime = runtime();
    let open = |steps| {
        let options = OpenOptions {
            plugin: Some(paths::plugin()),
            steps,
            ..OpenOptions::default()
        };
        Model::open(runtime, &target, &options)
    };
    assert!(open(Steps::Plain).unwrap().retro.unwrap().lengths_from_width);
    let error = format!("{:#}", open(Steps::FixedBuffers).err().expect("a refusal"));
    assert!(
        error.contains("width") && error.contains("without --cuda-graph"),
        "{error}"
    );
}
