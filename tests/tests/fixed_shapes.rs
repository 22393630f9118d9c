//! A program of its own, because ONNX Runtime has one environment a process and `retro-run`'s library makes it here.

use retro_run::{Model, OpenOptions, Runtime};
use retro_tests::{paths, zoo};

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
    let runtime = Runtime::load(Some(&paths::onnxruntime())).unwrap();
    let open = |fixed_buffers| {
        let options = OpenOptions {
            plugin: Some(paths::plugin()),
            fixed_buffers,
            ..OpenOptions::default()
        };
        Model::open(&runtime, &target, &options)
    };
    assert!(open(false).unwrap().retro.unwrap().lengths_from_width);
    let error = format!("{:#}", open(true).err().expect("a refusal"));
    assert!(
        error.contains("width") && error.contains("without --cuda-graph"),
        "{error}"
    );
}
