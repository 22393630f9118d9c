//! Weights instead of a graph: a folder with config.json and model.safetensors is built and converted on the fly, once, into a
//! cache folder.

use std::{
    fs::{self, File, TryLockError},
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
    if complete(&folder) {
        say(&using(path, &folder));
        return Ok(folder);
    }
    let parent = folder.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).with_context(|| {
        format!(
            "cannot make the cache folder {}; set XDG_CACHE_HOME to one that can be written",
            parent.display()
        )
    })?;
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    // Programs that start at once take turns: the first one makes the model, the others use it.
    let owned = own(&parent.join(format!(".{name}.lock")), path, say)?;
    if complete(&folder) {
        say(&using(path, &folder));
        return Ok(folder);
    }
    if owned.is_some() {
        remove_remains(parent, &name, &folder);
    }
    say(&format!(
        "{} holds weights; making a graph of them in {}",
        path.display(),
        folder.display()
    ));
    // Made beside and renamed: half a model is never found. A name of its own, where no lock keeps others away.
    let part = tempfile::Builder::new()
        .prefix(&format!(".{name}."))
        .suffix(PART)
        .tempdir_in(parent)
        .with_context(|| format!("cannot make a folder in {}", parent.display()))?;
    let made = part.path().join("model");
    make(path, &made, &part.path().join("dense"), window, convert)?;
    match fs::rename(&made, &folder) {
        // Another program made the same model in the meantime.
        Err(_) if complete(&folder) => {}
        other => other.with_context(|| format!("cannot make the folder {}", folder.display()))?,
    }
    Ok(folder)
}

/// What names of unfinished folders end with.
const PART: &str = ".part";

fn using(path: &Path, folder: &Path) -> String {
    format!(
        "{} holds weights; using the graph made of them in {}",
        path.display(),
        folder.display()
    )
}

fn complete(folder: &Path) -> bool {
    folder.join("genai_config.json").is_file() && folder.join("model.onnx").is_file()
}

/// Waits until no other program makes the same model. The lock ends with the file that is given back, at the latest with the
/// program. `None` where the file system has no locks: then programs that start at once each make the model.
fn own(lock: &Path, path: &Path, say: &mut dyn FnMut(&str)) -> Result<Option<File>> {
    let cannot = || format!("cannot open {}", lock.display());
    let file = File::options()
        .create(true)
        .append(true)
        .open(lock)
        .with_context(cannot)?;
    let locked = match file.try_lock() {
        Err(TryLockError::WouldBlock) => {
            say(&format!(
                "{} holds weights; waiting for another retro-run that makes a graph of them",
                path.display()
            ));
            file.lock()
        }
        Err(TryLockError::Error(e)) => Err(e),
        Ok(()) => Ok(()),
    };
    Ok(locked.is_ok().then_some(file))
}

/// Removes what killed programs left: of this model, which nobody else works on now, and of others whose lock is free. That
/// something could not be removed changes nothing, unless it is in the model's place, which then says so.
fn remove_remains(parent: &Path, name: &str, folder: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let found = entry.file_name();
        // .NAME.RANDOM.part
        let of = found
            .to_str()
            .and_then(|f| f.strip_prefix('.')?.strip_suffix(PART)?.rsplit_once('.'));
        let Some((of, _)) = of else { continue };
        let lock = (of != name).then(|| File::open(parent.join(format!(".{of}.lock"))));
        let free = match &lock {
            None => true,
            Some(lock) => lock.as_ref().is_ok_and(|lock| lock.try_lock().is_ok()),
        };
        if free {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    let _ = fs::remove_dir_all(folder);
}

/// Makes the model in `out`; `dense` is a place for what it is converted from.
fn make(weights: &Path, out: &Path, dense: &Path, window: usize, convert: bool) -> Result<()> {
    let options = retro_models::Options::default();
    if convert {
        convert_built(weights, out, dense, window, &options)
    } else {
        retro_models::build(weights, out, &options).map(drop)
    }
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
