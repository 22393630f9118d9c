use std::{
    ffi::OsStr,
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::LazyLock,
};

/// Real exports, shared with the tests of the whole.
pub fn zoo(case: &str) -> PathBuf {
    static FOLDER: LazyLock<PathBuf> =
        LazyLock::new(|| retro_zoo::folder(Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()));
    FOLDER.join(case)
}

pub fn command() -> Command {
    Command::new(env!("CARGO_BIN_EXE_retro-export"))
}

pub fn run<S: AsRef<OsStr>>(args: &[S]) -> Output {
    // Comparing has tests of its own; --verify among the arguments takes it up.
    let asked = args.iter().any(|a| {
        ["--verify", "--revert", "inspect"]
            .iter()
            .any(|w| a.as_ref() == OsStr::new(w))
    });
    let mut command = command();
    if !asked {
        command.arg("--no-verify");
    }
    command.args(args).output().expect("retro-export starts")
}

/// Runs and expects success; gives what it printed.
pub fn convert<S: AsRef<OsStr>>(args: &[S]) -> String {
    let output = run(args);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    assert_eq!(error, "", "nothing on stderr");
    String::from_utf8(output.stdout).unwrap()
}

/// Runs and expects exactly one line that says what is wrong.
pub fn refusal<S: AsRef<OsStr>>(args: &[S]) -> String {
    let output = run(args);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(output.stdout.is_empty(), "nothing on stdout");
    assert!(error.starts_with("error: ") && error.ends_with('\n'), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");
    error
}

/// A copy of a case's files that a test may change.
pub fn copy_of(case: &str, to: &Path) -> PathBuf {
    let folder = to.join(case);
    fs::create_dir(&folder).unwrap();
    for entry in fs::read_dir(zoo(case)).unwrap().flatten() {
        if entry.file_name() != "io.npz" {
            fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
        }
    }
    folder
}

/// Names in a folder, sorted; temporary files that were left behind would show.
pub fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Says on stderr what a test could not test here. What a passing test prints with `println!` is shown to nobody.
pub fn not_tested(what: &str) {
    let _ = writeln!(io::stderr(), "NOT TESTED: {what}");
}
