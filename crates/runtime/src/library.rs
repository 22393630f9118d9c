//! Finding and loading the two shared libraries: ONNX Runtime and the plugin.

use std::{
    env::consts::{DLL_PREFIX, DLL_SUFFIX},
    ffi::OsStr,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use ort::{environment::Environment, logging::LogLevel};

use crate::{
    Error, Result,
    device::{self, Device},
    one_line,
};

/// File name of the plugin on this system.
pub const PLUGIN: &str = if cfg!(windows) {
    "retro_attention.dll"
} else if cfg!(target_vendor = "apple") {
    "libretro_attention.dylib"
} else {
    "libretro_attention.so"
};
/// Names a library for the whole shell session.
pub const PLUGIN_VARIABLE: &str = "RETRO_ATTENTION_PLUGIN";
/// As in every program that uses the `ort` crate.
pub const RUNTIME_VARIABLE: &str = "ORT_DYLIB_PATH";

/// ONNX Runtime's file name on this system. As a bare name, the system's loader looks where it looks.
pub(crate) const ONNX_RUNTIME: &str = if cfg!(windows) {
    "onnxruntime.dll"
} else if cfg!(target_vendor = "apple") {
    "libonnxruntime.dylib"
} else {
    "libonnxruntime.so"
};

/// A loaded ONNX Runtime; one per process.
pub struct Runtime {
    environment: Environment,
    /// Where it came from, for messages.
    pub path: PathBuf,
}

impl Runtime {
    /// Loads ONNX Runtime: from `explicit`, else from `ORT_DYLIB_PATH`, from beside this program, from
    /// `.cache/onnxruntime` of a folder above it (where `make` puts it), else wherever the system's loader finds it.
    ///
    /// # Errors
    /// When none is found, the file is no ONNX Runtime, it is older than 1.24, or one was loaded already.
    pub fn load(explicit: Option<&Path>) -> Result<Self> {
        Self::load_for(Device::Cpu, explicit)
    }

    /// As [`Self::load`], with the libraries that a device needs.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_for(device: Device, explicit: Option<&Path>) -> Result<Self> {
        let path = find_runtime(explicit)?;
        if device != Device::Cpu {
            device::preload_libraries(&path);
        }
        let builder = ort::init_from(&path).map_err(|e| {
            let reason = one_line(&e);
            if path == Path::new(ONNX_RUNTIME) {
                Error::NoRuntime(reason)
            } else {
                Error::UnusableRuntime {
                    path: path.clone(),
                    reason,
                }
            }
        })?;
        let environment = builder.with_name("retro-attention").build().map_err(|e| Error::Start {
            path: path.clone(),
            error: e.into(),
        })?;
        if std::env::var_os("ORT_LOG").is_none() {
            environment.set_log_level(LogLevel::Fatal);
        }
        Ok(Self { environment, path })
    }

    /// What sessions are made in.
    pub fn environment(&self) -> &Environment {
        &self.environment
    }
}

fn find_runtime(explicit: Option<&Path>) -> Result<PathBuf> {
    if let Some(path) = explicit {
        return named("--ort", path);
    }
    if let Some(value) = variable(RUNTIME_VARIABLE) {
        return named(RUNTIME_VARIABLE, Path::new(&value));
    }
    for folder in program_folders() {
        let beside = newest_runtime(&folder).or_else(|| {
            let versions = folders_in(&folder.join(".cache/onnxruntime"));
            versions
                .iter()
                .filter_map(|version| newest_runtime(version))
                .max_by_key(|p| version_of(p))
        });
        if let Some(path) = beside {
            return Ok(path);
        }
    }
    Ok(PathBuf::from(ONNX_RUNTIME))
}

/// The library among a folder's files with the highest version in its name.
fn newest_runtime(folder: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(folder).ok()?;
    let files = entries.flatten().map(|e| e.path()).filter(|p| p.is_file());
    files
        .filter_map(|p| Some((version_of(&p)?, p)))
        .max_by(|(a, _), (b, _)| a.cmp(b))
        .map(|(_, path)| path)
}

/// The numbers in the name of a file that is ONNX Runtime: libonnxruntime.so.1.31.1, libonnxruntime.1.31.1.dylib,
/// onnxruntime.dll. `None` where it is another file.
fn version_of(path: &Path) -> Option<Vec<u32>> {
    let name = path.file_name().and_then(OsStr::to_str)?;
    let rest = name.strip_prefix(DLL_PREFIX)?.strip_prefix("onnxruntime")?;
    let version = rest
        .strip_suffix(DLL_SUFFIX)
        .or_else(|| rest.strip_prefix(DLL_SUFFIX))?;
    let numbers = match version {
        "" => "",
        _ => version.strip_prefix('.')?,
    };
    Some(numbers.split('.').filter_map(|n| n.parse().ok()).collect())
}

fn folders_in(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|e| e.path()).filter(|p| p.is_dir()).collect()
}

/// The folder of this program and those above it: a build lies in target/release of its tree.
fn program_folders() -> Vec<PathBuf> {
    let program = std::env::current_exe().and_then(|p| p.canonicalize());
    program.map_or_else(|_| Vec::new(), |p| p.ancestors().skip(1).map(Path::to_owned).collect())
}

/// Finds the plugin: `explicit`, else `RETRO_ATTENTION_PLUGIN`, else beside this program. `None`: there is none.
///
/// # Errors
/// When a plugin that was asked for by name does not exist.
pub fn find_plugin(explicit: Option<&Path>) -> Result<Option<PathBuf>> {
    if let Some(path) = explicit {
        return named("--plugin", path).map(Some);
    }
    if let Some(value) = variable(PLUGIN_VARIABLE) {
        return named(PLUGIN_VARIABLE, Path::new(&value)).map(Some);
    }
    // Test programs lie in target/release/deps, the library one folder above.
    let places = program_folders().into_iter().take(2);
    Ok(places.map(|folder| folder.join(PLUGIN)).find(|p| p.is_file()))
}

fn variable(name: &str) -> Option<std::ffi::OsString> {
    std::env::var_os(name).filter(|v| !v.is_empty())
}

/// The absolute path of a file that an option or variable names.
fn named(option: &'static str, path: &Path) -> Result<PathBuf> {
    if !path.is_file() {
        return Err(Error::NoFile {
            option,
            path: path.to_owned(),
        });
    }
    path.canonicalize().map_err(|error| Error::Open {
        path: path.to_owned(),
        error,
    })
}

/// Makes a session while no other is made through this. ONNX Runtime adds a custom operator's domain to a table of the
/// process with a check and an insertion that are not one: of two sessions that are made at the same moment the second
/// may fail.
pub fn alone<T>(make: impl FnOnce() -> T) -> T {
    static MAKING: Mutex<()> = Mutex::new(());
    let _held = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
    make()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_version_wins() {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            "libonnxruntime.so.1.9.0",
            "libonnxruntime.so.1.31.1",
            "libonnxruntime_providers_shared.so",
            "x",
        ] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let found = newest_runtime(dir.path()).unwrap();
        assert_eq!(found.file_name().unwrap(), "libonnxruntime.so.1.31.1");
    }
}
