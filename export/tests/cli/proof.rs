//! The way back, and looking at models.

use crate::support::{convert, copy_of, names, refusal, run, zoo};
use serde_json::Value;
use std::{fs, path::Path};

#[test]
fn a_folder_comes_back_byte_for_byte() {
    let folder = tempfile::tempdir().unwrap();
    for case in [
        "genai-gemma2-fp32-cpu",
        "genai-qwen2-int4-cpu",
        "genai040-old_llama-fp32-cuda",
    ] {
        let source = copy_of(case, folder.path());
        let [target, back] = ["converted", "back"].map(|n| folder.path().join(format!("{case}-{n}")));
        convert(&[&source, Path::new("-o"), &target]);
        let said = convert(&[&target, Path::new("--revert"), Path::new("-o"), &back]);
        assert!(said.contains("byte for byte"), "{said}");
        assert_eq!(names(&source), names(&back), "{case}");
        for name in names(&source) {
            assert!(
                fs::read(source.join(&name)).unwrap() == fs::read(back.join(&name)).unwrap(),
                "{case}: {name}"
            );
        }
    }
}

#[test]
fn only_converted_models_go_back() {
    let folder = tempfile::tempdir().unwrap();
    let source = zoo("genai-llama-fp32-cpu");
    let error = refusal(&[
        source.as_path(),
        Path::new("--revert"),
        Path::new("-o"),
        &folder.path().join("back"),
    ]);
    assert!(error.contains("not converted by retro-export"), "{error}");
}

#[test]
fn inspect_tells_what_a_model_is() {
    let folder = tempfile::tempdir().unwrap();
    let source = zoo("genai040-old_llama-fp32-cuda");
    let look = |path: &Path| -> Value {
        let output = run(&["inspect".as_ref(), path.as_os_str(), "--json".as_ref()]);
        assert!(output.status.success());
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let found = look(&source);
    assert_eq!(found["converted"], Value::Null);
    assert_eq!(found["attention"][1]["rule"], "mha");
    assert_eq!(found["attention"][1]["action"], "convertible");
    assert_eq!(found["inputs"][0]["name"], "input_ids");
    let target = folder.path().join("converted");
    convert(&[&source, Path::new("-o"), &target]);
    let found = look(&target);
    assert_eq!((&found["retro_nodes"], &found["revertible"]), (&2.into(), &true.into()));
    assert_eq!(found["converted"]["retro.window"], "2");
    assert!(
        found["converted"]["retro.original"].is_null(),
        "the record is not for reading"
    );
    // 2 bits an element, a factor and a 128th of a centre, of heads of 32 in float32.
    let bytes = 128.0 * (32.0 * 2.0 / 8.0 + 2.0) + 32.0 * 4.0;
    assert_eq!(found["state_share"]["selector"], bytes / (128.0 * 2.0 * 32.0 * 4.0));
    let text = run(&["inspect".as_ref(), target.as_os_str()]);
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(
        text.contains("--revert gives the original back") && text.contains("% of the cache's bytes"),
        "{text}"
    );
    let broken = look(&zoo("genai-llama-fp32-cuda"));
    assert!(broken["unsound"].as_str().unwrap().contains("RotaryEmbedding"));
}
