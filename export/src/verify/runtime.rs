//! The two shared libraries that a comparison needs: ONNX Runtime and the operator's plugin.

use anyhow::{Result, anyhow};
use ort::{
    environment::Environment,
    logging::LogLevel,
    session::{Session, builder::GraphOptimizationLevel},
};
use std::{
    env, fs,
    path::{Path, PathBuf},
    sync::OnceLock,
};

const PLUGIN: &str = "libretro_attention.so";
const HINT: &str = "set ORT_DYLIB_PATH=PATH/libonnxruntime.so (scripts/onnxruntime finds or fetches one)";

/// ONNX Runtime with the plugin at hand.
pub struct Runtime {
    environment: &'static Environment,
    pub library: PathBuf,
    plugin: PathBuf,
}

impl Runtime {
    /// Finds both: ONNX Runtime by `ORT_DYLIB_PATH`, beside the program, or in `.cache/onnxruntime` of a folder above it; the
    /// plugin by `RETRO_ATTENTION_PLUGIN` or beside the program.
    ///
    /// # Errors
    /// One isn't found or doesn't load; then there is nothing to compare with.
    pub fn find() -> Result<Self> {
        let plugin = named("RETRO_ATTENTION_PLUGIN")?.or_else(|| {
            folders()
                .into_iter()
                .take(2)
                .map(|f| f.join(PLUGIN))
                .find(|p| p.is_file())
        });
        let plugin = plugin.ok_or_else(|| {
            anyhow!("the plugin {PLUGIN} is neither named by RETRO_ATTENTION_PLUGIN nor beside this program (make build makes it)")
        })?;
        let library = named("ORT_DYLIB_PATH")?.or_else(|| folders().iter().find_map(|f| library_in(f)));
        let library = library.ok_or_else(|| anyhow!("no ONNX Runtime is found; {HINT}"))?;
        static LOADED: OnceLock<Result<Environment, String>> = OnceLock::new();
        let loaded = LOADED.get_or_init(|| {
            let builder = ort::init_from(&library).map_err(|e| e.to_string())?;
            let environment = builder.with_name("retro-export").build().map_err(|e| e.to_string())?;
            if env::var_os("ORT_LOG").is_none() {
                environment.set_log_level(LogLevel::Fatal);
            }
            Ok(environment)
        });
        match loaded {
            Ok(environment) => Ok(Self {
                environment,
                library,
                plugin,
            }),
            Err(why) => Err(anyhow!("cannot use ONNX Runtime {}: {why}; {HINT}", library.display())),
        }
    }

    /// Opens a model. `plugin`: it is a converted one.
    pub fn open(&self, model: &Path, plugin: bool) -> Result<Session> {
        let failed =
            |e: &dyn std::fmt::Display| anyhow!("ONNX Runtime does not load {}: {}", model.display(), one_line(e));
        let mut builder = Session::builder(self.environment).map_err(|e| failed(&e))?;
        // As written: a fused or folded graph rounds otherwise.
        builder = builder
            .with_optimization_level(GraphOptimizationLevel::Level1)
            .map_err(|e| failed(&e))?;
        if plugin {
            builder = builder.with_operator_library(&self.plugin).map_err(|e| failed(&e))?;
        }
        builder.commit_from_file(model).map_err(|e| failed(&e))
    }
}

/// A message of several lines as one.
pub fn one_line(error: &dyn std::fmt::Display) -> String {
    error.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

fn named(variable: &str) -> Result<Option<PathBuf>> {
    match env::var_os(variable).filter(|v| !v.is_empty()).map(PathBuf::from) {
        Some(path) if path.is_file() => Ok(Some(path)),
        Some(path) => Err(anyhow!("{variable} names no file: {}", path.display())),
        None => Ok(None),
    }
}

/// The folder of this program and those above it.
fn folders() -> Vec<PathBuf> {
    let program = env::current_exe().and_then(|p| p.canonicalize());
    program.map_or_else(|_| Vec::new(), |p| p.ancestors().skip(1).map(Path::to_owned).collect())
}

fn library_in(folder: &Path) -> Option<PathBuf> {
    let in_folder = |folder: &Path| {
        let entries = fs::read_dir(folder).ok()?.flatten().map(|e| e.path());
        entries.filter(|p| p.is_file()).find(|p| {
            p.file_name().is_some_and(|n| {
                let name = n.to_string_lossy();
                name == "libonnxruntime.so" || name.starts_with("libonnxruntime.so.")
            })
        })
    };
    in_folder(folder).or_else(|| {
        let mut versions: Vec<_> = fs::read_dir(folder.join(".cache/onnxruntime"))
            .ok()?
            .flatten()
            .map(|e| e.path())
            .collect();
        versions.sort();
        versions.iter().rev().find_map(|v| in_folder(v))
    })
}
