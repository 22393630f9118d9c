//! Steps that are fed from fixed buffers, as a CUDA graph wants them, make the same text as others. On the CPU, so that
//! everything but the capture itself is tested without a GPU.

use std::{
    path::{Path, PathBuf},
    sync::OnceLock,
};

use retro_run::{
    Logits, Model, OpenOptions, Runtime,
    bench::{room::require_room, selector_state::StatePattern, synthetic_cache::DecodeAtDepth},
    decoder::{self, batch::Prefilled, decode_loop::Policy, sampling::argmax, session::Steps},
    runtime::find_plugin,
};

/// The program's one environment, whichever test comes first.
fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| Runtime::load(None).unwrap())
}

/// `ledger`, and what it is converted to with a window of 4.
fn ledger(folder: &Path) -> (PathBuf, PathBuf) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let (source, target) = (folder.join("ledger"), folder.join("retro"));
    retro_models::build(&root.join("models/ledger"), &source, &retro_models::Options::default()).unwrap();
    // Quest's selection: a small budget shows in the text.
    let settings = retro_export::Settings {
        window: 4,
        ..retro_export::Settings::paper()
    };
    retro_export::convert(&retro_export::Options {
        source: source.clone(),
        target: Some(target.clone()),
        settings,
        ..Default::default()
    })
    .unwrap();
    (source, target)
}

/// What benchmarks at a depth do, for one sequence and several.
#[test]
fn several_sequences_decode_behind_synthetic_caches() {
    let folder = tempfile::tempdir().unwrap();
    let (source, target) = ledger(folder.path());
    for steps in [Steps::Plain, Steps::FixedBuffers] {
        for (folder, window) in [(&source, 1), (&target, 1), (&target, 3)] {
            let options = OpenOptions {
                threads: Some(2),
                plugin: find_plugin(None).unwrap(),
                steps,
                ..OpenOptions::default()
            };
            let mut model = Model::open(runtime(), folder, &options).unwrap();
            let pattern = StatePattern::of_model(runtime(), &options, &model).unwrap();
            let policy = Policy::new(&model, Some(window), None).unwrap();
            for batch in [1, 3] {
                let run = DecodeAtDepth {
                    batch,
                    depth: 700,
                    warm_up: 2,
                    steps: 4,
                };
                assert!(!run.run(&mut model, pattern.bytes(), policy).unwrap().is_zero());
                let capacity = run.capacity(&model, window).unwrap();
                assert_eq!(capacity, 700 + window - 1 + 2 + 4 + 1);
                let (kv, state) = model.new_state(batch, capacity).unwrap().kv().sizes();
                assert_eq!(model.state_bytes(batch, capacity), Some(kv + state));
                require_room(&model, kv + state).unwrap();
            }
            assert_eq!(model.state_bytes(usize::MAX, 1000), None);
            if cfg!(target_os = "linux") {
                let error = require_room(&model, usize::MAX).unwrap_err().to_string();
                assert!(
                    error.contains("GiB on cpu, where") && error.contains("fewer sequences"),
                    "{error}"
                );
            }
        }
    }
}

#[test]
fn fixed_buffers_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (source, target) = ledger(folder.path());
    let runtime = runtime();
    let plugin = find_plugin(None).unwrap();
    let prompt = |length: u32, seed: u32| (0..length).map(|i| 3 + (i * seed) % 90).collect::<Vec<u32>>();
    for (folder, windows) in [(&source, &[1][..]), (&target, &[1, 2, 4])] {
        for prompts in [
            vec![prompt(900, 7)],
            vec![prompt(70, 11), prompt(33, 5), prompt(120, 13)],
        ] {
            let texts = [Steps::Plain, Steps::FixedBuffers].map(|steps| {
                let options = OpenOptions {
                    threads: Some(2),
                    plugin: plugin.clone(),
                    steps,
                    ..OpenOptions::default()
                };
                let mut model = Model::open(runtime, folder, &options).unwrap();
                model.folder.eos.clear();
                let layers = model.io.layers();
                let op = if model.retro.is_some() {
                    "RetroAttention"
                } else {
                    "GroupQueryAttention"
                };
                let placed = model.placement().unwrap();
                let attention = placed
                    .iter()
                    .filter(|n| n.op_type == op && n.provider == "CPUExecutionProvider");
                assert_eq!(attention.count(), layers, "{placed:?}");
                let mut ready =
                    Prefilled::new(&mut model, prompts.clone(), 960, 128, |_| Ok::<(), decoder::Error>(())).unwrap();
                // Given tokens: where steps are fed from buffers, logits are looked at while the next step runs.
                let policy = Policy::new(&model, Some(1), None).unwrap();
                let given: Vec<Vec<u32>> = (0..prompts.len()).map(|row| prompt(20 + 3 * row as u32, 17)).collect();
                let mut seen = Vec::new();
                let mut observe = |at: usize, logits: &Logits| {
                    let rows = given.iter().enumerate().filter(|(_, text)| at < text.len());
                    seen.push(
                        rows.map(|(row, _)| argmax(logits.row(row)).unwrap())
                            .collect::<Vec<u32>>(),
                    );
                    Ok::<(), decoder::Error>(())
                };
                let given: Vec<&[u32]> = given.iter().map(Vec::as_slice).collect();
                ready
                    .force(&mut model, policy, &given, || Ok(()), &mut observe)
                    .unwrap();
                // Again from the same prompts: what the mask shows must shrink.
                let mut decode = |window: usize, budget| {
                    let policy = Policy::new(&model, Some(window), budget).unwrap();
                    ready
                        .decode(&mut model, policy, 30, |_| Ok::<(), decoder::Error>(()))
                        .unwrap()
                        .outputs
                };
                let mut texts: Vec<Vec<Vec<u32>>> = windows.iter().map(|&w| decode(w, None)).collect();
                if windows.len() > 1 {
                    texts.push(decode(2, Some("1.0".parse().unwrap())));
                    // A budget is forgotten when it is not asked for again.
                    texts.push(decode(2, None));
                    assert!(texts[4] == texts[1] && texts[3] != texts[1]);
                }
                (texts, seen)
            });
            assert!(texts[0] == texts[1], "{}: {} prompts", folder.display(), prompts.len());
            let [(texts, seen), _] = texts;
            assert!(texts.iter().flatten().all(|text| text.len() == 30));
            assert_eq!(seen.len(), 20 + 3 * (prompts.len() - 1));
        }
    }
}
