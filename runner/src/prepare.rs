//! Weights instead of a graph: a folder with config.json and model.safetensors is built and converted on the fly, once, into a
//! cache folder.

use std::{
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

use anyhow::{Context, Result, ensure};

use crate::model::is_weights_folder;

/// The folder to open for what the user named: itself if it has a graph, else one built from its weights, converted for
/// windows up to `window` when `convert` says so (the plugin is there). `say` gets a line for people when something is made.
///
/// # Errors
/// When there is nothing at `path`, the weights cannot be built or converted, or the cache folder cannot be written.
pub fn prepare(path: &Path, window: usize, convert: bool, say: &mut dyn FnMut(&str)) -> Result<PathBuf> {
    ensure!(path.exists(), "there is no model at {}", path.display());
    if !is_weights_folder(path) {
        return Ok(path.to_owned());
    }
    let kind = if convert {
        format!("w{window}")
    } else {
        "dense".to_owned()
    };
    let folder = cache_folder()?.join(format!("{}-{kind}", key(path)?));
    if folder.join("genai_config.json").is_file() && folder.join("model.onnx").is_file() {
        say(&format!(
            "{} holds weights; using the graph made of them in {}",
            path.display(),
            folder.display()
        ));
        return Ok(folder);
    }
    say(&format!(
        "{} holds weights; making a graph of them in {}",
        path.display(),
        folder.display()
    ));
    let parent = folder.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).with_context(|| format!("cannot make the cache folder {}", parent.display()))?;
    // Made beside and renamed: two programs that do so at once do not meet, and half a model is never found.
    let part = parent.join(format!(
        ".{}.{}",
        folder.file_name().unwrap_or_default().to_string_lossy(),
        std::process::id()
    ));
    let made = make(path, &part, window, convert);
    let moved = made.and_then(|()| match fs::rename(&part, &folder) {
        Ok(()) => Ok(()),
        Err(_) if folder.join("model.onnx").is_file() => Ok(()),
        Err(e) => Err(e).with_context(|| format!("cannot make the folder {}", folder.display())),
    });
    if moved.is_err() || part.exists() {
        // What is left of a failure is of no use; that it could not be removed changes nothing.
        let _ = fs::remove_dir_all(&part);
    }
    moved.map(|()| folder)
}

fn make(weights: &Path, out: &Path, window: usize, convert: bool) -> Result<()> {
    let options = retro_models::Options::default();
    if !convert {
        retro_models::build(weights, out, &options)?;
        return Ok(());
    }
    // Beside the output: a conversion does not write into the folder that it reads.
    let dense = out.with_extension("dense");
    let made = convert_built(weights, out, &dense, window, &options);
    if dense.exists() {
        // Its weights live on through the link; that it could not be removed changes nothing.
        let _ = fs::remove_dir_all(&dense);
    }
    made
}

fn convert_built(
    weights: &Path,
    out: &Path,
    dense: &Path,
    window: usize,
    options: &retro_models::Options,
) -> Result<()> {
    retro_models::build(weights, dense, options)?;
    let settings = retro_export::Settings {
        window,
        ..Default::default()
    };
    retro_export::convert(&retro_export::Options {
        source: dense.to_owned(),
        target: Some(out.to_owned()),
        settings,
        // Linked, so that the weights outlive the graph that they were made for.
        external_data: Some(retro_export::ExternalMode::Link),
        force: true,
        ..Default::default()
    })?;
    Ok(())
}

/// `retro-attention` in the user's cache folder.
fn cache_folder() -> Result<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let base = variable("XDG_CACHE_HOME").or_else(|| variable("HOME").map(|home| home.join(".cache")));
    let base = base.context("no place for a cache: set HOME or XDG_CACHE_HOME")?;
    Ok(base.join("retro-attention"))
}

/// The folder's name and a number that changes with its place, its files' sizes and times, and this program's version.
pub(crate) fn key(folder: &Path) -> Result<String> {
    let place = folder
        .canonicalize()
        .with_context(|| format!("cannot open {}", folder.display()))?;
    let mut hasher = DefaultHasher::new();
    (env!("CARGO_PKG_VERSION"), &place).hash(&mut hasher);
    let mut files: Vec<_> = fs::read_dir(&place)
        .with_context(|| format!("cannot read {}", folder.display()))?
        .flatten()
        .collect();
    files.sort_by_key(fs::DirEntry::file_name);
    for file in files {
        let Ok(metadata) = file.metadata() else { continue };
        if metadata.is_file() {
            let time = metadata.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
            (file.file_name(), metadata.len(), time).hash(&mut hasher);
        }
    }
    let name = place.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(format!("{name}-{:016x}", hasher.finish()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_changes_with_the_weights() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("model.safetensors"), "a").unwrap();
        let one = key(dir.path()).unwrap();
        assert_eq!(one, key(dir.path()).unwrap());
        fs::write(dir.path().join("model.safetensors"), "ab").unwrap();
        assert_ne!(one, key(dir.path()).unwrap());
    }

    #[test]
    fn a_folder_with_a_graph_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("model.onnx"), "").unwrap();
        let got = prepare(dir.path(), 2, true, &mut |_| panic!("nothing to say")).unwrap();
        assert_eq!(got, dir.path());
        assert!(prepare(Path::new("/no/such"), 2, true, &mut |_| {}).is_err());
    }
}
