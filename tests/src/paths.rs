//! Where the tests find what they need. Nothing here knows an absolute path.

use std::{
    env,
    path::{Path, PathBuf},
    sync::LazyLock,
};

/// The repository: `$RETRO_TEST_ROOT`, else where this test was built, else, for a test that was carried to another
/// machine, the current folder.
pub fn root() -> PathBuf {
    if let Some(path) = env::var_os("RETRO_TEST_ROOT") {
        return path.into();
    }
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    let here = || env::current_dir().expect("there is a current folder");
    built
        .filter(|p| p.join("tests/data").is_dir())
        .map_or_else(here, Path::to_owned)
}

/// A file or folder in tests/data.
pub fn data(relative: &str) -> PathBuf {
    root().join("tests/data").join(relative)
}

/// A case of the real exports, `tests/data/zoo.tar.xz`, or a file of one.
pub fn zoo(relative: &str) -> PathBuf {
    static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| retro_zoo::folder(&root()));
    FOLDER.join(relative)
}

/// The plugin under test: `$RETRO_ATTENTION_PLUGIN`, or the one built beside this test.
pub fn plugin() -> PathBuf {
    existing(
        "RETRO_ATTENTION_PLUGIN",
        "libretro_attention.so",
        "build it with `cargo build --release`",
    )
}

/// A command of the workspace, built beside this test.
pub fn command(name: &str) -> PathBuf {
    existing(
        &format!("RETRO_COMMAND_{}", name.to_uppercase().replace('-', "_")),
        name,
        "build it with `cargo build --release`",
    )
}

/// ONNX Runtime's library: `$ORT_DYLIB_PATH`, or the one that scripts/onnxruntime fetched.
pub fn onnxruntime() -> PathBuf {
    if let Some(path) = env::var_os("ORT_DYLIB_PATH") {
        return path.into();
    }
    let fetched = root().join(".cache/onnxruntime");
    let versions = std::fs::read_dir(&fetched).into_iter().flatten().flatten();
    versions
        .flat_map(|version| std::fs::read_dir(version.path()).into_iter().flatten().flatten())
        .map(|file| file.path())
        .find(|path| {
            path.file_name()
                .is_some_and(|n| n.to_string_lossy().starts_with("libonnxruntime.so"))
        })
        .unwrap_or_else(|| panic!("no ONNX Runtime: set ORT_DYLIB_PATH, or run scripts/onnxruntime, which fetches one"))
}

/// Cargo puts tests into target/PROFILE/deps and libraries and commands into target/PROFILE.
fn existing(variable: &str, file: &str, advice: &str) -> PathBuf {
    if let Some(path) = env::var_os(variable) {
        let path = PathBuf::from(path);
        assert!(path.exists(), "{variable} names no file: {}", path.display());
        return path;
    }
    let test = env::current_exe().expect("the test knows its own path");
    test.ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join(file))
        .find(|path| path.exists())
        .unwrap_or_else(|| {
            panic!(
                "{file} is not beside {}: {advice}, or set {variable}",
                test.parent().unwrap().display()
            )
        })
}
