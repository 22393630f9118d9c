//! Models to run, a way to run them, and the libraries that this takes.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::OnceLock,
};

use serde_json::Value;

/// The repository: `$RETRO_TEST_ROOT` for tests that were carried to another machine.
pub fn root() -> PathBuf {
    let built = || Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned();
    std::env::var_os("RETRO_TEST_ROOT").map_or_else(built, PathBuf::from)
}

/// The program, with a user's cache folder of the tests' own.
pub fn retro_run() -> Command {
    assert!(
        std::env::var_os("ORT_DYLIB_PATH").is_some() || root().join(".cache/onnxruntime").is_dir(),
        "these tests need ONNX Runtime: set ORT_DYLIB_PATH, or run scripts/onnxruntime once, or use `make test`"
    );
    let built = || env!("CARGO_BIN_EXE_retro-run").into();
    let mut command = Command::new(std::env::var_os("RETRO_COMMAND_RETRO_RUN").unwrap_or_else(built));
    command.env("XDG_CACHE_HOME", models().join("cache"));
    command
}

/// Runs the program and gives everything it did.
pub fn run(arguments: &[&str]) -> Output {
    retro_run().args(arguments).output().unwrap()
}

/// Runs `retro-run run` on a model, which must succeed; gives stdout.
pub fn text(model: &Path, arguments: &[&str]) -> String {
    let output = retro_run().arg("run").arg(model).args(arguments).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// Runs `retro-run run --json` on a model.
pub fn json(model: &Path, arguments: &[&str]) -> Value {
    let arguments = [&["--json"], arguments].concat();
    serde_json::from_str(&text(model, &arguments)).unwrap()
}

/// The one line on stderr of a command that must fail.
pub fn error(arguments: &[&str]) -> String {
    let output = run(arguments);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {errors}");
    assert!(output.stdout.is_empty(), "{arguments:?}");
    let lines: Vec<&str> = errors.lines().filter(|l| l.starts_with("error: ")).collect();
    assert_eq!(lines.len(), 1, "{arguments:?}: {errors}");
    assert!(errors.ends_with(&format!("{}\n", lines[0])), "{arguments:?}: {errors}");
    lines[0].to_owned()
}

/// A folder for this run of the tests, empty at first, with models made once.
fn models() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let make = || {
        let built = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let folder = if built.is_dir() {
            built.to_owned()
        } else {
            std::env::temp_dir()
        }
        .join("retro-run-cli");
        if folder.exists() {
            std::fs::remove_dir_all(&folder).unwrap();
        }
        std::fs::create_dir_all(&folder).unwrap();
        folder
    };
    FOLDER.get_or_init(make)
}

/// The graph of `models/ledger`.
pub fn ledger() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let build = || {
        let folder = models().join("ledger");
        retro_models::build(
            &root().join("models/ledger"),
            &folder,
            &retro_models::Options::default(),
        )
        .unwrap();
        folder
    };
    BUILT.get_or_init(build).clone()
}

/// The same, converted for windows up to 8, 0.15 of the context, and little enough at least for short ones.
pub fn ledger_retro() -> PathBuf {
    static CONVERTED: OnceLock<PathBuf> = OnceLock::new();
    let convert = || {
        let folder = models().join("ledger-retro");
        let settings = retro_export::Settings {
            window: 8,
            budget: retro_contract::Budget::Ratio(0.15),
            min_pages: Some(4),
            page_size: 16,
            ..Default::default()
        };
        let (source, target) = (ledger(), Some(folder.clone()));
        retro_export::convert(&retro_export::Options {
            source,
            target,
            settings,
            ..Default::default()
        })
        .unwrap();
        folder
    };
    CONVERTED.get_or_init(convert).clone()
}

/// Whether `RETRO_TEST_DEVICE` asks for a GPU, as it does for the tests of `tests/`.
pub fn on_gpu() -> bool {
    std::env::var("RETRO_TEST_DEVICE").is_ok_and(|device| device.starts_with("cuda"))
}

pub fn documents() -> String {
    root()
        .join("models/ledger/documents.jsonl")
        .to_str()
        .unwrap()
        .to_owned()
}

/// Document N as the program takes it.
pub fn document(n: usize) -> String {
    format!("{}:{n}", documents())
}

/// Words of a document's right output, the end-of-text mark left out.
pub fn reference(n: usize) -> Vec<String> {
    let text = std::fs::read_to_string(documents()).unwrap();
    let line: Value = serde_json::from_str(text.lines().nth(n).unwrap()).unwrap();
    let words = line["reference"].as_str().unwrap().split_whitespace();
    words.filter(|w| *w != "<eos>").map(str::to_owned).collect()
}
