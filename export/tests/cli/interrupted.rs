//! Killed at any moment, or with a full disk: the old output or the new one is there, never a broken one.

use crate::support::{command, convert, copy_of, names};
use retro_export::onnx::read_model;
use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

#[test]
fn killed_at_any_moment_it_leaves_the_old_output_or_the_new_one() {
    let folder = tempfile::tempdir().unwrap();
    let source = copy_of("genai040-old_llama-fp32-cuda", folder.path()).join("model.onnx");
    let target = source.with_file_name("converted.onnx");
    convert(&[&source, Path::new("-o"), &target, Path::new("--window"), Path::new("1")]);
    let old = fs::read(&target).unwrap();
    let (mut kept, mut replaced) = (0, 0);
    for moment in 0..60u64 {
        fs::write(&target, &old).unwrap();
        let mut command = command();
        command
            .arg(&source)
            .arg("-o")
            .arg(&target)
            .args(["--force", "--no-verify", "--window", "8"]);
        let mut running = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        thread::sleep(Duration::from_micros(moment * 500));
        running.kill().unwrap(); // SIGKILL
        running.wait().unwrap();
        if fs::read(&target).unwrap() == old {
            kept += 1;
        } else {
            let model = read_model(&target).expect("a whole model").model;
            assert_eq!(model.metadata("retro.window"), Some("8"));
            replaced += 1;
        }
    }
    println!("killed 60 times: the old output was kept {kept} times, replaced {replaced} times");
    assert!(kept > 0, "it was never killed before its end");
}

/// RLIMIT_FSIZE: writing past it fails as on a full disk (EFBIG instead of ENOSPC; SIGXFSZ is ignored by the shell).
#[test]
fn a_file_that_can_not_be_written_in_full_leaves_the_old_output() {
    let folder = tempfile::tempdir().unwrap();
    let source = copy_of("genai-llama-fp32-cpu", folder.path()).join("model.onnx");
    let target = source.with_file_name("converted.onnx");
    fs::write(&target, b"old").unwrap();
    let before = names(source.parent().unwrap());
    let script = format!(
        "trap '' XFSZ; ulimit -f 8; exec {} \"$@\"",
        env!("CARGO_BIN_EXE_retro-export")
    );
    let output = Command::new("bash")
        .args(["-c", &script, "-"])
        .arg(&source)
        .arg("-o")
        .arg(&target)
        .args(["--force", "--no-verify"])
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(
        error.starts_with("error: cannot write") && error.lines().count() == 1,
        "{error}"
    );
    assert_eq!(fs::read(&target).unwrap(), b"old");
    assert_eq!(names(source.parent().unwrap()), before, "nothing is left behind");
}
