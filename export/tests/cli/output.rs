//! Where the output goes and what comes along.

use crate::support::{command, convert, copy_of, names, refusal, zoo};
use prost::Message;
use retro_onnx::read_model;
use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
};

const CASE: &str = "genai-llama-int4-cpu";

fn args<'a>(source: &'a Path, target: &'a Path, more: &[&'a str]) -> Vec<&'a std::ffi::OsStr> {
    let mut args = vec![source.as_os_str(), "-o".as_ref(), target.as_os_str()];
    args.extend(more.iter().map(|s| std::ffi::OsStr::new(*s)));
    args
}

#[cfg(unix)]
fn inode(path: PathBuf) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(path).unwrap().ino()
}

#[test]
fn a_file_beside_the_model_refers_to_its_weights() {
    let folder = tempfile::tempdir().unwrap();
    let copy = copy_of(CASE, folder.path());
    let (source, target) = (copy.join("model.onnx"), copy.join("retro.onnx"));
    let report = convert(&args(&source, &target, &[]));
    assert!(report.contains("model.onnx.data referenced"), "{report}");
    assert_eq!(
        names(&copy),
        ["genai_config.json", "model.onnx", "model.onnx.data", "retro.onnx"]
    );
    for how in ["link", "copy"] {
        let error = refusal(&args(&source, &copy.join("other.onnx"), &["--external-data", how]));
        assert!(error.contains("shares its weights"), "{error}");
    }
}

#[cfg(unix)]
#[test]
fn a_file_elsewhere_gets_its_weights_as_asked() {
    let folder = tempfile::tempdir().unwrap();
    let copy = copy_of(CASE, folder.path());
    let source = copy.join("model.onnx");
    for (how, more, same) in [
        ("copied", &[][..], false),
        ("linked", &["--external-data", "link"], true),
        ("copied", &["--external-data", "copy"], false),
    ] {
        let place = folder.path().join("place");
        fs::create_dir(&place).unwrap();
        let target = place.join("m.onnx");
        let report = convert(&args(&source, &target, more));
        assert!(report.contains(how), "{report}");
        assert_eq!(names(&place), ["m.onnx", "model.onnx.data"]);
        assert_eq!(
            inode(place.join("model.onnx.data")) == inode(copy.join("model.onnx.data")),
            same
        );
        // Weights that are there already are taken only if they are the very same file.
        let second = place.join("second.onnx");
        let again = args(&source, &second, &["--external-data", "copy"]);
        if same {
            assert!(convert(&again).contains("already there"));
        } else {
            assert!(refusal(&again).contains("exists already"));
        }
        fs::remove_dir_all(place).unwrap();
    }
    let error = refusal(&args(
        &source,
        &folder.path().join("m.onnx"),
        &["--external-data", "reference"],
    ));
    assert!(error.contains("needs an output in the model's own folder"), "{error}");
}

#[test]
fn the_source_is_never_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let copy = copy_of(CASE, folder.path());
    let source = copy.join("model.onnx");
    let before = fs::read(&source).unwrap();
    let error = refusal(&args(&source, &source, &["--force"]));
    assert!(error.contains("is the model itself"), "{error}");
    let roundabout = copy.join("../").join(CASE).join("model.onnx");
    assert!(refusal(&args(&source, &roundabout, &["--force"])).contains("is the model itself"));
    assert!(refusal(&args(&copy, &copy, &["--force"])).contains("is the model's own folder"));
    assert!(refusal(&args(&copy, &copy.join("inner"), &["--force"])).contains("is inside the model's folder"));
    assert!(refusal(&args(&copy, folder.path(), &["--force"])).contains("is inside the output"));
    // Over its own weights.
    let weights = refusal(&args(&source, &copy.join("model.onnx.data"), &["--force"]));
    assert!(weights.contains("weights"), "{weights}");
    assert!(fs::read(&source).unwrap() == before);
    assert_eq!(names(&copy).len(), 3);
}

#[test]
fn an_existing_output_needs_force() {
    let folder = tempfile::tempdir().unwrap();
    let copy = copy_of(CASE, folder.path());
    let target = folder.path().join("out");
    convert(&args(&copy, &target, &["--window", "2"]));
    assert!(refusal(&args(&copy, &target, &[])).contains("--force"));
    fs::write(target.join("stale"), "x").unwrap();
    convert(&args(&copy, &target, &["--window", "3", "--force"]));
    assert_eq!(names(&target), ["genai_config.json", "model.onnx", "model.onnx.data"]);
    assert_eq!(names(folder.path()).len(), 2, "nothing is left behind");

    let file = folder.path().join("m.onnx");
    fs::write(&file, "old").unwrap();
    assert!(refusal(&args(&copy.join("model.onnx"), &file, &[])).contains("--force"));
    assert_eq!(fs::read(&file).unwrap(), b"old");
    convert(&args(&copy.join("model.onnx"), &file, &["--force"]));
    assert_ne!(fs::read(&file).unwrap(), b"old");
}

#[test]
fn force_does_not_remove_folders_of_other_things() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("documents");
    fs::create_dir(&target).unwrap();
    convert(&args(&zoo(CASE), &target, &[]));
    fs::remove_file(target.join("model.onnx")).unwrap();
    let error = refusal(&args(&zoo(CASE), &target, &["--force"]));
    assert!(error.contains("is a folder without a model.onnx"), "{error}");
    assert!(target.join("genai_config.json").exists());
}

#[test]
fn outputs_that_can_not_be() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "x").unwrap();
    let model = zoo(CASE).join("model.onnx");
    assert!(refusal(&args(&model, folder.path(), &[])).contains("is a folder"));
    assert!(refusal(&args(&model, &folder.path().join("no/m.onnx"), &[])).contains("doesn't exist"));
    assert!(refusal(&args(&model, &file.join("m.onnx"), &[])).contains("doesn't exist"));
    assert!(refusal(&args(&zoo(CASE), &file, &["--force"])).contains("is not a folder"));
    assert!(refusal(&args(&zoo(CASE), &folder.path().join("a/b"), &[])).contains("a can't be read"));
    assert_eq!(names(folder.path()), ["file"]);
}

#[cfg(unix)]
#[test]
fn a_folder_brings_everything_along() {
    use std::os::unix::fs::symlink;
    let folder = tempfile::tempdir().unwrap();
    let copy = copy_of(CASE, folder.path());
    fs::create_dir_all(copy.join("sub/deep")).unwrap();
    fs::create_dir(copy.join(".cache")).unwrap();
    fs::write(copy.join("sub/deep/template.jinja"), "{{x}}").unwrap();
    fs::write(folder.path().join("blob"), "tokens").unwrap();
    symlink("../blob", copy.join("tokenizer.json")).unwrap();
    symlink("nowhere", copy.join("dangling")).unwrap();
    symlink("..", copy.join("up")).unwrap();
    // As download caches have it: the model and its weights are links to blobs.
    fs::rename(copy.join("model.onnx"), folder.path().join("blob1")).unwrap();
    symlink("../blob1", copy.join("model.onnx")).unwrap();
    fs::rename(copy.join("model.onnx.data"), folder.path().join("blob2")).unwrap();
    symlink("../blob2", copy.join("model.onnx.data")).unwrap();
    let target = folder.path().join("out");
    let report = convert(&args(&copy, &target, &[]));
    assert_eq!(
        names(&target),
        [
            "genai_config.json",
            "model.onnx",
            "model.onnx.data",
            "sub",
            "tokenizer.json"
        ]
    );
    assert_eq!(fs::read(target.join("sub/deep/template.jinja")).unwrap(), b"{{x}}");
    for name in ["tokenizer.json", "model.onnx", "model.onnx.data"] {
        assert!(
            fs::symlink_metadata(target.join(name)).unwrap().is_file(),
            "{name} is a file of its own"
        );
    }
    for skipped in [
        "dangling: a symbolic link to nothing",
        "up: a symbolic link to a folder",
        ".cache: a hidden folder",
    ] {
        assert!(report.contains(skipped), "{report}");
    }
}

#[test]
fn the_model_of_a_folder_is_the_configured_one_else_the_only_one() {
    let folder = tempfile::tempdir().unwrap();
    let copy = copy_of(CASE, folder.path());
    let config = copy.join("genai_config.json");
    fs::rename(copy.join("model.onnx"), copy.join("decoder.onnx")).unwrap();
    let dry = |says: &str| {
        let error = refusal(&[copy.as_os_str(), "-n".as_ref()]);
        assert!(error.contains(says), "{error}");
    };
    dry("names the model model.onnx, which is not there");
    fs::write(&config, r#"{"model":{"decoder":{"filename":"../decoder.onnx"}}}"#).unwrap();
    dry("is not a file of that folder");
    fs::write(&config, "{").unwrap();
    dry("is not valid JSON");
    fs::write(&config, r#"{"model":{"decoder":{"filename":"decoder.onnx"}}}"#).unwrap();
    let target = folder.path().join("out");
    convert(&args(&copy, &target, &[]));
    assert!(target.join("decoder.onnx").is_file());
    fs::remove_file(&config).unwrap();
    convert(&args(&copy, &target, &["--force"]));
    fs::write(copy.join("second.onnx"), "x").unwrap();
    dry("there are 2 ONNX models");
    dry("(decoder.onnx, second.onnx)");
}

/// The configuration above, the graph and its weights in `onnx`.
#[test]
fn a_model_below_its_configuration_is_found_and_written_there() {
    let folder = tempfile::tempdir().unwrap();
    let copy = copy_of(CASE, folder.path());
    fs::rename(copy.join("genai_config.json"), copy.join("config.json")).unwrap();
    let below = copy.join("onnx");
    fs::create_dir(&below).unwrap();
    for name in ["model.onnx", "model.onnx.data"] {
        fs::rename(copy.join(name), below.join(name)).unwrap();
    }
    let [target, back] = ["out", "back"].map(|name| folder.path().join(name));
    let report = convert(&args(&copy, &target, &[]));
    assert!(report.contains("model.onnx.data copied"), "{report}");
    assert_eq!(names(&target), ["config.json", "onnx"]);
    assert_eq!(names(&target.join("onnx")), ["model.onnx", "model.onnx.data"]);
    assert!(convert(&["inspect".as_ref(), target.as_os_str()]).contains("retro.window"));
    convert(&args(&copy, &target, &["--force"]));
    convert(&args(&target, &back, &["--revert"]));
    assert!(fs::read(back.join("onnx/model.onnx")).unwrap() == fs::read(below.join("model.onnx")).unwrap());
    fs::copy(below.join("model.onnx"), below.join("model_q4.onnx")).unwrap();
    let error = refusal(&[copy.as_os_str(), "-n".as_ref()]);
    assert!(
        error.contains("(onnx/model.onnx, onnx/model_q4.onnx); name the one to convert"),
        "{error}"
    );
}

/// As in Hugging Face's cache: names are links to files elsewhere. ONNX Runtime loads no weights through them for a model that
/// isn't such a link itself.
#[cfg(unix)]
#[test]
fn weights_behind_a_link_out_of_the_folder_are_copied() {
    use std::os::unix::fs::symlink;
    let folder = tempfile::tempdir().unwrap();
    let blobs = copy_of(CASE, folder.path());
    let snapshot = folder.path().join("snapshot");
    fs::create_dir(&snapshot).unwrap();
    for name in ["model.onnx", "model.onnx.data"] {
        symlink(blobs.join(name), snapshot.join(name)).unwrap();
    }
    let (source, target) = (snapshot.join("model.onnx"), snapshot.join("retro.onnx"));
    let own = ["model.onnx", "model.onnx-2.data", "model.onnx.data", "retro.onnx"];
    for again in [&[][..], &["--force"]] {
        let report = convert(&args(&source, &target, again));
        assert!(report.contains("data copied"), "{report}");
        if again.is_empty() {
            assert_eq!(names(&snapshot), own);
        }
    }
    // The second one's have a name of their own, and the first one's are gone.
    assert_eq!(names(&snapshot)[1], "model.onnx-3.data");
    assert_eq!(names(&snapshot).len(), 4);
    assert!(
        !fs::symlink_metadata(snapshot.join("model.onnx-3.data"))
            .unwrap()
            .is_symlink()
    );
    let place = folder.path().join("back");
    fs::create_dir(&place).unwrap();
    convert(&args(&target, &place.join("model.onnx"), &["--revert"]));
    for name in ["model.onnx", "model.onnx.data"] {
        assert!(fs::read(place.join(name)).unwrap() == fs::read(blobs.join(name)).unwrap());
    }
    // A link that stays inside is as good as a file.
    for name in ["model.onnx.data", "model.onnx"] {
        fs::rename(blobs.join(name), blobs.join(format!("{name}.blob"))).unwrap();
        symlink(blobs.join(format!("{name}.blob")), blobs.join(name)).unwrap();
    }
    let report = convert(&args(&blobs.join("model.onnx"), &blobs.join("retro.onnx"), &[]));
    assert!(report.contains("model.onnx.data referenced"), "{report}");
}

/// A device or a pipe is neither replaced nor waited for. (Sockets stand for them: they need no rights, and nothing else uses them.)
#[cfg(unix)]
#[test]
fn only_files_are_read_and_replaced() {
    use std::os::unix::{fs::symlink, net::UnixListener};
    let folder = tempfile::tempdir().unwrap();
    let [socket, link, nowhere, pipe] = ["socket", "link", "nowhere", "pipe"].map(|name| folder.path().join(name));
    let _listener = UnixListener::bind(&socket).unwrap();
    symlink(&socket, &link).unwrap();
    symlink(folder.path().join("none"), &nowhere).unwrap();
    let made = std::process::Command::new("mkfifo").arg(&pipe).status();
    assert!(made.unwrap().success());
    let before = names(folder.path());
    let model = zoo("genai-llama-fp32-cpu").join("model.onnx");
    let target = folder.path().join("out.onnx");
    for special in [&socket, &link, &nowhere, &pipe] {
        for more in [&[][..], &["--force"]] {
            let error = refusal(&args(&model, special, more));
            assert!(
                error.contains("is not a file") && error.contains("name another output"),
                "{error}"
            );
        }
        if *special != nowhere {
            assert!(refusal(&args(special, &target, &[])).contains("is not a file"));
            assert!(refusal(&[std::ffi::OsStr::new("inspect"), special.as_os_str()]).contains("is not a file"));
        }
    }
    assert_eq!(names(folder.path()), before);
    // Neither does one among other files stop the work.
    let copy = copy_of(CASE, folder.path());
    fs::rename(&pipe, copy.join("pipe.onnx")).unwrap();
    let target = copy.join("retro.onnx");
    for more in [&[][..], &["--force"]] {
        convert(&args(&copy.join("model.onnx"), &target, more));
    }
    // A link to a file is replaced; the file stays.
    let linked = folder.path().join("linked.onnx");
    fs::write(copy.join("old.onnx"), "x").unwrap();
    symlink(copy.join("old.onnx"), &linked).unwrap();
    convert(&args(&model, &linked, &["--force"]));
    assert_eq!(fs::read(copy.join("old.onnx")).unwrap(), b"x");
    assert!(fs::symlink_metadata(&linked).unwrap().is_file());
}

#[test]
fn a_dry_run_writes_nothing_and_a_closed_pipe_is_no_error() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("out");
    let report = convert(&args(&zoo(CASE), &target, &["--dry-run"]));
    assert!(
        report.contains("nothing is written") && report.contains("2 of 2"),
        "{report}"
    );
    assert!(names(folder.path()).is_empty());
    let mut child = command()
        .arg(zoo(CASE))
        .arg("-n")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    assert!(child.wait().unwrap().success());
}

#[test]
fn help_names_every_setting() {
    let help = convert(&["--help"]);
    for flag in [
        "--window",
        "--budget",
        "--dense-layers",
        "--selector",
        "--external-data",
        "--json",
        "--sliding-cache",
    ] {
        assert!(help.contains(flag), "{flag}");
    }
}

/// Where ONNX Runtime refuses the original, because its weights lie elsewhere, nothing there is read.
#[cfg(unix)]
#[test]
fn weights_that_onnx_runtime_does_not_read_are_refused() {
    use std::os::unix::fs::symlink;
    let folder = tempfile::tempdir().unwrap();
    let [blobs, model] = ["blobs", "model"].map(|name| folder.path().join(name));
    fs::create_dir(&blobs).unwrap();
    fs::create_dir(&model).unwrap();
    fs::copy(zoo(CASE).join("model.onnx"), model.join("model.onnx")).unwrap();
    fs::copy(zoo(CASE).join("model.onnx.data"), blobs.join("data")).unwrap();
    let data = model.join("model.onnx.data");
    let target = folder.path().join("out.onnx");
    let refused = |what: &[&std::ffi::OsStr]| {
        let error = refusal(what);
        assert!(error.contains("outside the model's folder"), "{error}");
        assert_eq!(names(folder.path()), ["blobs", "model"]);
    };
    // A link to a file elsewhere, and one to a folder elsewhere.
    symlink(blobs.join("data"), &data).unwrap();
    for what in [&model, &model.join("model.onnx")] {
        refused(&args(what, &target, &[]));
        refused(&["inspect".as_ref(), what.as_os_str()]);
        refused(&[what.as_os_str(), "-n".as_ref()]);
    }
    fs::remove_file(&data).unwrap();
    fs::rename(blobs.join("data"), blobs.join("model.onnx.data")).unwrap();
    symlink(&blobs, model.join("weights")).unwrap();
    let mut graph = read_model(&model.join("model.onnx")).unwrap().model;
    for tensor in &mut graph.graph.as_mut().unwrap().initializer {
        for entry in tensor.external_data.iter_mut().filter(|e| e.key() == "location") {
            entry.value = Some("weights/model.onnx.data".into());
        }
    }
    let bytes = graph.encode_to_vec();
    fs::remove_file(model.join("model.onnx")).unwrap();
    fs::write(model.join("model.onnx"), bytes).unwrap();
    refused(&args(&model, &target, &[]));
}

/// What a killed run left is removed by the next one that writes there, and what a live one needs is not.
#[test]
fn what_killed_runs_left_is_removed() {
    let folder = tempfile::tempdir().unwrap();
    let source = copy_of(CASE, folder.path());
    let leave = |place: &Path| {
        fs::write(place.join(".retro-export-dead.tmp"), b"half").unwrap();
        fs::create_dir(place.join(".retro-export-dead2.tmp")).unwrap();
        fs::write(place.join(".retro-export-dead2.tmp/model.onnx"), b"half").unwrap();
        fs::write(place.join(".retro-export-live.tmp"), b"half").unwrap();
        let live = fs::File::open(place.join(".retro-export-live.tmp")).unwrap();
        live.try_lock().unwrap();
        live
    };
    let live = leave(&source);
    convert(&args(&source.join("model.onnx"), &source.join("retro.onnx"), &[]));
    let there = names(&source);
    assert_eq!(there[0], ".retro-export-live.tmp");
    assert!(!there[1].starts_with('.'), "{there:?}");
    drop(live);
    // Nor does it come along with a folder.
    let target = folder.path().join("converted");
    let live = leave(folder.path());
    convert(&args(&source, &target, &[]));
    assert!(
        names(&target).iter().all(|name| !name.starts_with('.')),
        "{:?}",
        names(&target)
    );
    assert_eq!(names(folder.path()), [".retro-export-live.tmp", "converted", CASE]);
    drop(live);
    convert(&args(&source, &target, &["--force"]));
    assert_eq!(names(folder.path()), ["converted", CASE]);
}
