//! Whatever is given as a model ends in one clear line: no panic, no output.

use crate::support::{copy_of, names, refusal, zoo};
use retro_export::{Options, convert};
use retro_onnx::{ModelProto, read_model, write_model};
use std::{fs, path::Path};

const CASE: &str = "genai-llama-fp32-cpu";

fn refused(source: &Path, target: &Path) -> String {
    let error = refusal(&[source, Path::new("-o"), target].map(Path::as_os_str));
    assert!(!target.exists(), "{error}");
    error
}

#[test]
fn files_that_are_no_models() {
    let folder = tempfile::tempdir().unwrap();
    let (source, target) = (folder.path().join("m.onnx"), folder.path().join("out.onnx"));
    assert!(refused(&source, &target).contains("doesn't exist"));
    for (bytes, says) in [
        (&b""[..], "is empty"),
        (b"hello, this is text\n", "is not an ONNX model"),
        (&[8, 10], "no graph"),
    ] {
        fs::write(&source, bytes).unwrap();
        assert!(refused(&source, &target).contains(says), "{says}");
    }
    fs::remove_file(&source).unwrap();
    let empty = folder.path().join("empty");
    fs::create_dir(&empty).unwrap();
    assert!(refused(&empty, &folder.path().join("out")).contains("no ONNX model"));
    assert_eq!(names(folder.path()), ["empty"], "nothing is left behind");
}

#[test]
fn a_truncated_model_is_refused_at_every_length() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = fs::read(zoo(CASE).join("model.onnx")).unwrap();
    let source = folder.path().join("m.onnx");
    for len in (1..bytes.len()).step_by(97) {
        fs::write(&source, &bytes[..len]).unwrap();
        let options = Options {
            source: source.clone(),
            dry_run: true,
            ..Options::default()
        };
        assert!(convert(&options).is_err(), "{len} of {} bytes", bytes.len());
    }
}

#[test]
fn damaged_models_never_panic() {
    let folder = tempfile::tempdir().unwrap();
    let copy = copy_of(CASE, folder.path());
    let good = fs::read(copy.join("model.onnx")).unwrap();
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut random = |n: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % n as u64) as usize
    };
    for round in 0..2000 {
        let mut bytes = good.clone();
        for _ in 0..1 + round % 3 {
            let at = random(bytes.len());
            bytes[at] = random(256) as u8;
        }
        fs::write(copy.join("model.onnx"), &bytes).unwrap();
        // Either result is right; what matters is that there is one.
        let _ = convert(&Options {
            source: copy.clone(),
            dry_run: true,
            partial: true,
            ..Options::default()
        });
    }
}

fn changed(folder: &Path, change: impl FnOnce(&mut ModelProto)) -> String {
    let copy = copy_of(CASE, folder);
    let path = copy.join("model.onnx");
    let mut model = read_model(&path).unwrap().model;
    change(&mut model);
    write_model(&model, &path, true).unwrap();
    let error = refused(&copy, &folder.join("out"));
    fs::remove_dir_all(copy).unwrap();
    assert!(names(folder).is_empty(), "nothing is left behind");
    error
}

#[test]
fn external_data_must_be_inside_the_folder_and_complete() {
    let folder = tempfile::tempdir().unwrap();
    fn set(model: &mut ModelProto, key: &str, value: &str) {
        let tensors = &mut model.graph.as_mut().unwrap().initializer;
        let tensor = tensors.iter_mut().find(|t| t.is_external()).unwrap();
        let entry = tensor.external_data.iter_mut().find(|e| e.key() == key).unwrap();
        entry.value = Some(value.to_owned());
    }
    for location in ["/etc/passwd", "../model.onnx.data", "a/../../b"] {
        let error = changed(folder.path(), |m| set(m, "location", location));
        assert!(error.contains("not inside the model's folder"), "{error}");
    }
    let error = changed(folder.path(), |m| set(m, "offset", "99999999999"));
    assert!(
        error.contains("model.onnx.data has 1346048 bytes, but the model's weights in it need "),
        "{error}"
    );
    let error = changed(folder.path(), |m| set(m, "location", "absent.data"));
    assert!(error.contains("absent.data, which can't be read"), "{error}");
}

#[test]
fn a_converted_model_is_not_converted_again() {
    let folder = tempfile::tempdir().unwrap();
    let once = folder.path().join("once");
    crate::support::convert(&[&zoo(CASE), Path::new("-o"), &once].map(Path::as_os_str));
    let error = refused(&once, &folder.path().join("twice"));
    assert!(error.contains("converted already"), "{error}");
}

#[test]
fn settings_out_of_range_and_unknown_layers() {
    let source = zoo(CASE);
    for (flag, value, says) in [
        ("--window", "65", "window is 65"),
        ("--page-size", "12", "page size is 12"),
        ("--min-pages", "0", "pages is 0"),
        ("--selector-lambda", "NaN", "lambda is NaN"),
        (
            "--dense-layers",
            "0,7",
            "--dense-layers names layer 7; the layers to convert are 0, 1",
        ),
    ] {
        let error = refusal(&[source.to_str().unwrap(), "-n", flag, value]);
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn a_model_that_converts_in_part_needs_to_be_asked() {
    let folder = tempfile::tempdir().unwrap();
    let copy = copy_of(CASE, folder.path());
    let path = copy.join("model.onnx");
    let mut model = read_model(&path).unwrap().model;
    let nodes = &mut model.graph.as_mut().unwrap().node;
    let node = nodes
        .iter_mut()
        .rfind(|n| n.op_type() == "GroupQueryAttention")
        .unwrap();
    node.attribute.push(retro_onnx::AttributeProto::int("qk_output", 1));
    write_model(&model, &path, true).unwrap();
    let target = folder.path().join("out");
    let error = refused(&copy, &target);
    assert!(
        error.contains("1 of 2") && error.contains("qk_output = 1") && error.contains("--partial"),
        "{error}"
    );
    let args = [&copy, Path::new("-o"), &target, Path::new("--partial")];
    let report = crate::support::convert(&args.map(Path::as_os_str));
    assert!(report.contains("kept: attribute qk_output = 1"), "{report}");
    assert_eq!(
        read_model(&target.join("model.onnx"))
            .unwrap()
            .model
            .metadata("retro.layers"),
        Some("0")
    );
}

#[test]
fn a_tolerance_is_a_number() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("m.onnx");
    let source = zoo("genai-llama-fp32-cpu").join("model.onnx");
    for (tolerance, shown) in [("nan", "NaN"), ("inf", "inf"), ("-0.1", "-0.1"), ("-inf", "-inf")] {
        let error = refusal(&[
            source.as_os_str(),
            "-o".as_ref(),
            target.as_os_str(),
            format!("--tolerance={tolerance}").as_ref(),
        ]);
        assert!(error.contains(&format!("tolerance is {shown}")), "{error}");
    }
    assert!(names(folder.path()).is_empty());
}
