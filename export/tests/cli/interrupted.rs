//! Killed at any moment, or with a full disk: the old output or the new one is there, never a broken one.

use crate::support::{command, convert, copy_of, names, not_tested, zoo};
use retro_onnx::{external_files, read_model};
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
    convert(&[
        source.as_os_str(),
        "-o".as_ref(),
        target.as_os_str(),
        "--force".as_ref(),
    ]);
    let left: Vec<String> = names(source.parent().unwrap())
        .into_iter()
        .filter(|n| n.starts_with('.'))
        .collect();
    assert!(
        left.is_empty(),
        "the next run removes what the killed ones left: {left:?}"
    );
}

/// A model of the zoo with weights of its own, and one like it with others: folders.
fn two_sources(folder: &Path) -> [std::path::PathBuf; 2] {
    ["first", "second"].map(|name| {
        let place = folder.join(name);
        fs::create_dir(&place).unwrap();
        let source = copy_of("genai-llama-fp32-cpu", &place);
        if name == "second" {
            let path = source.join("model.onnx.data");
            let mut weights = fs::read(&path).unwrap();
            weights.iter_mut().step_by(4).for_each(|x| *x ^= 1);
            fs::write(path, weights).unwrap();
        }
        source
    })
}

fn copy_folder(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    fs::create_dir(to).unwrap();
    for name in names(from) {
        fs::copy(from.join(&name), to.join(&name)).unwrap();
    }
}

/// Starts a conversion again and again and kills it, at moments spread over the time that it takes. `reset` before each, `check`
/// after each says whether the output is the new one.
fn kill(command: &dyn Fn() -> Command, reset: &dyn Fn(), check: &dyn Fn() -> bool) {
    reset();
    let started = std::time::Instant::now();
    assert!(command().stdout(Stdio::null()).status().unwrap().success());
    let takes = started.elapsed();
    assert!(check());
    let (mut kept, mut replaced) = (0, 0);
    for moment in 0..80u32 {
        reset();
        let mut running = command().stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        thread::sleep(takes * moment / 70);
        running.kill().unwrap(); // SIGKILL
        running.wait().unwrap();
        if check() {
            replaced += 1;
        } else {
            kept += 1;
        }
    }
    println!("killed 80 times: the old output was kept {kept} times, replaced {replaced} times");
    assert!(kept > 0, "it was never killed before its end");
}

/// Whether a folder's model is the second source's, converted with a window of 8; else it must be the first's, with one of 1. Its
/// weights must be its own.
fn is_second(folder: &Path, sources: &[std::path::PathBuf; 2]) -> bool {
    let model = read_model(&folder.join("model.onnx")).expect("a whole model").model;
    let second = match model.metadata("retro.window") {
        Some("8") => true,
        Some("1") => false,
        other => panic!("{other:?}"),
    };
    let weights = external_files(&model, folder).expect("its weights are there");
    let expected = fs::read(sources[usize::from(second)].join("model.onnx.data")).unwrap();
    assert!(
        fs::read(&weights[0].source).unwrap() == expected,
        "a model with another's weights"
    );
    second
}

#[test]
fn killed_at_any_moment_a_model_has_its_own_weights() {
    let folder = tempfile::tempdir().unwrap();
    let sources = two_sources(folder.path());
    let [old, out] = ["old", "out"].map(|name| folder.path().join(name));
    // A file with its weights copied beside it, and a whole folder.
    for file in ["model.onnx", ""] {
        let _ = fs::remove_dir_all(&old);
        if !file.is_empty() {
            fs::create_dir(&old).unwrap();
        }
        let place = |folder: &Path| {
            if file.is_empty() {
                folder.to_owned()
            } else {
                folder.join(file)
            }
        };
        convert(&[
            place(&sources[0]).as_os_str(),
            "-o".as_ref(),
            place(&old).as_os_str(),
            "--window".as_ref(),
            "1".as_ref(),
        ]);
        let command = || {
            let mut command = command();
            command.arg(place(&sources[1])).arg("-o").arg(place(&out));
            command.args(["--force", "--no-verify", "--window", "8"]);
            command
        };
        kill(&command, &|| copy_folder(&old, &out), &|| is_second(&out, &sources));
    }
}

#[test]
fn replaced_weights_go_when_nobody_names_them() {
    let folder = tempfile::tempdir().unwrap();
    let sources = two_sources(folder.path());
    let out = folder.path().join("out");
    fs::create_dir(&out).unwrap();
    let replace = |source: usize, window: &str| {
        let [from, to] = [&sources[source], &out].map(|f| f.join("model.onnx"));
        let words = ["-o", "--window", window, "--force"].map(std::ffi::OsStr::new);
        convert(&[from.as_os_str(), words[0], to.as_os_str(), words[1], words[2], words[3]]);
    };
    replace(0, "1");
    assert_eq!(names(&out), ["model.onnx", "model.onnx.data"]);
    replace(1, "8");
    assert_eq!(names(&out), ["model.onnx", "model.onnx-2.data"]);
    assert!(is_second(&out, &sources));
    // The original has its weights under their own name again, also beside its converted model.
    let back = folder.path().join("back");
    fs::create_dir(&back).unwrap();
    for place in [back.join("model.onnx"), out.join("original.onnx")] {
        convert(&[&out.join("model.onnx"), Path::new("--revert"), Path::new("-o"), &place]);
        for name in ["model.onnx", "model.onnx.data"] {
            let there = if name == "model.onnx" {
                place.clone()
            } else {
                place.with_file_name(name)
            };
            assert!(
                fs::read(there).unwrap() == fs::read(sources[1].join(name)).unwrap(),
                "{name}"
            );
        }
    }
    // Another model names them.
    fs::remove_file(out.join("original.onnx")).unwrap();
    fs::remove_file(out.join("model.onnx.data")).unwrap();
    fs::copy(out.join("model.onnx"), out.join("other.onnx")).unwrap();
    replace(0, "1");
    assert_eq!(
        names(&out),
        ["model.onnx", "model.onnx-2.data", "model.onnx.data", "other.onnx"]
    );
    assert!(!is_second(&out, &sources));
    // A model that isn't ours may have brought nothing.
    fs::remove_file(out.join("other.onnx")).unwrap();
    fs::copy(sources[0].join("model.onnx"), out.join("model.onnx")).unwrap();
    replace(1, "8");
    assert_eq!(
        names(&out),
        [
            "model.onnx",
            "model.onnx-2.data",
            "model.onnx-3.data",
            "model.onnx.data"
        ]
    );
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

/// Converts on file systems of growing size, from one that only the source and an old output fit on to one where all fits. `sh`
/// runs in a namespace of its own, where it may mount a tmpfs.
const ON_FULL_DISKS: &str = r#"
mount -t tmpfs -o size=64m none "$DISK" 2>/dev/null || exit 77
umount "$DISK"
# Pages of 4096 bytes, in steps of $STEP.
pages=$FIRST
while [ $pages -le $LAST ]; do
    mount -t tmpfs -o size=$((pages * 4096)) none "$DISK" || exit 77
    mkdir "$DISK/source" "$DISK/out"
    cp "$CASE/model.onnx" "$CASE/model.onnx.data" "$CASE/genai_config.json" "$DISK/source" && cp "$OLD"/* "$DISK/out" || exit 78
    "$EXPORT" "$DISK/source$INPUT" -o "$DISK/out$OUTPUT" --force --no-verify $OPTIONS >/dev/null 2>"$ERRORS"
    echo "$pages|$?|$(cat "$ERRORS" | tr '\n' '~')|$(cd "$DISK/out" && cat * | cksum)|$(ls -A "$DISK" "$DISK/out" | tr '\n' ' ')"
    umount "$DISK"
    pages=$((pages + STEP))
done
"#;

/// One line for each size: pages, exit code, what was on stderr, checksum of what is there afterwards, names.
struct OnFullDisks {
    folder: tempfile::TempDir,
    /// Before the run: an older output's files.
    old: std::path::PathBuf,
}

impl OnFullDisks {
    /// `input`, `output`: what is appended to the source's and the target's folder to name them.
    fn run(&self, [input, output]: [&str; 2], options: &str, sizes: [u64; 3]) -> Option<Vec<String>> {
        let disk = self.folder.path().join("disk");
        fs::create_dir_all(&disk).unwrap();
        let run = Command::new("unshare")
            .args(["--user", "--map-root-user", "--mount", "sh", "-c", ON_FULL_DISKS])
            .env("DISK", &disk)
            .env("CASE", zoo("genai-llama-fp32-cpu"))
            .env("OLD", &self.old)
            .env("EXPORT", env!("CARGO_BIN_EXE_retro-export"))
            .env("ERRORS", self.folder.path().join("errors"))
            .envs([("INPUT", input), ("OUTPUT", output), ("OPTIONS", options)])
            .envs([("FIRST", sizes[0]), ("LAST", sizes[1]), ("STEP", sizes[2])].map(|(n, x)| (n, x.to_string())))
            .output();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match run {
            Ok(run) if run.status.success() => Some(text(&run.stdout).lines().map(str::to_owned).collect()),
            Ok(run) if run.status.code() != Some(78) => {
                not_tested(&format!("no tmpfs can be mounted here: {}", text(&run.stderr).trim()));
                None
            }
            Ok(run) => panic!("the first size is too small: {}", text(&run.stderr)),
            Err(e) => {
                not_tested(&format!("unshare doesn't start: {e}"));
                None
            }
        }
    }

    /// `old`, `new`: the names in an untouched and in a finished output.
    fn check(lines: &[String], [old, new]: [&str; 2]) {
        let fields: Vec<Vec<&str>> = lines.iter().map(|l| l.split('|').collect()).collect();
        let (first, last) = (&fields[0], &fields[fields.len() - 1]);
        assert_eq!(
            (first[1], last[1]),
            ("1", "0"),
            "from a full disk to one with room: {lines:#?}"
        );
        for line in &fields {
            let &[_, code, error, sum, there] = line.as_slice() else {
                panic!("{line:?}")
            };
            let names = if code == "0" { new } else { old };
            assert_eq!(there.trim(), names, "nothing is left behind: {line:?}");
            if code == "0" {
                assert_eq!((error, sum), ("", last[3]), "a whole new output: {line:?}");
            } else {
                assert_eq!((code, sum), ("1", first[3]), "the old output: {line:?}");
                assert!(
                    error.starts_with("error: cannot ") && error.contains("No space left on device"),
                    "{line:?}"
                );
                assert_eq!(error.matches('~').count(), 1, "one line: {line:?}");
            }
        }
        println!(
            "{} of {} disks were full",
            fields.iter().filter(|l| l[1] == "1").count(),
            fields.len()
        );
        assert_ne!(first[3], last[3]);
    }
}

/// ENOSPC itself. Where no tmpfs can be mounted the test above, which always runs, stands in for it.
#[test]
fn a_full_disk_leaves_the_old_output_or_the_new_one() {
    let folder = tempfile::tempdir().unwrap();
    let old = folder.path().join("old");
    fs::create_dir(&old).unwrap();
    for name in ["model.onnx", "model.onnx.data"] {
        fs::write(old.join(name), b"old").unwrap();
    }
    let disks = OnFullDisks { folder, old };
    // A file, with its weights copied beside it: about 340 pages for the source's, as many for the output's.
    let modes = "--external-data copy";
    let Some(lines) = disks.run(["/model.onnx", "/model.onnx"], modes, [345, 695, 7]) else {
        return;
    };
    let disk = disks.folder.path().join("disk");
    let disk = disk.display();
    let names = |out: &str| format!("{disk}: out source  {disk}/out: {out}");
    // What is no model of ours keeps what may be its weights.
    let [old, new] = [
        "model.onnx model.onnx.data",
        "model.onnx model.onnx-2.data model.onnx.data",
    ]
    .map(names);
    OnFullDisks::check(&lines, [&old, &new]);
    // A whole folder.
    let Some(lines) = disks.run(["", ""], modes, [345, 695, 7]) else {
        return;
    };
    let fields: Vec<Vec<&str>> = lines.iter().map(|l| l.split('|').collect()).collect();
    for line in fields.iter().filter(|l| l[1] == "1") {
        assert_eq!(
            (line[3], line[4].trim()),
            (fields[0][3], names("model.onnx model.onnx.data").as_str()),
            "{line:?}"
        );
    }
    let last = &fields[fields.len() - 1];
    assert_eq!((fields[0][1], last[1]), ("1", "0"), "{lines:#?}");
    assert_eq!(last[4].trim(), names("genai_config.json model.onnx model.onnx.data"));
}
