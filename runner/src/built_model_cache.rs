//! The cache of built models: a folder of weights (config.json and model.safetensors) becomes a graph, and is
//! converted, once.

use std::{
    fs::{self, File, TryLockError},
    io,
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

use xxhash_rust::xxh3::xxh3_64;

use crate::{Device, decoder::require, model_folder::is_weights_folder};

/// The result of the cache's calls.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a model cannot be had from the cache. The cause, where there is one, is the error's source.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum Error {
    /// A graph cannot be built from the weights.
    #[error(transparent)]
    Build(#[from] retro_models::Error),
    /// It cannot be converted.
    #[error(transparent)]
    Convert(#[from] Box<retro_export::Error>),
    #[error("there is no model at {}", .0.display())]
    NoModel(PathBuf),
    #[error("no cache folder: set HOME or XDG_CACHE_HOME")]
    NoFolder,
    #[error("cannot make the cache folder {}; set XDG_CACHE_HOME to one that can be written", .path.display())]
    MakeCache { path: PathBuf, source: io::Error },
    #[error("cannot make a folder in {}", .path.display())]
    MakePart { path: PathBuf, source: io::Error },
    #[error("cannot make the folder {}", .path.display())]
    MakeFolder { path: PathBuf, source: io::Error },
    #[error("cannot open {}", .path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error("cannot read {}", .path.display())]
    Read { path: PathBuf, source: io::Error },
}

/// Puts an error of the system, and the path that it is about, into a variant: `.map_err(at!(Read, path))`.
macro_rules! at {
    ($variant:ident, $path:expr) => {
        |source| Error::$variant {
            path: $path.to_owned(),
            source,
        }
    };
}

/// The folder to open for the user's path: itself if it has a graph, else one built from its weights and, with
/// `convert`, converted for `device` and windows up to `window`. `say` gets a line for the user when something is built.
///
/// # Errors
/// When there is nothing at `path`, the weights cannot be built or converted, or the cache folder cannot be written.
pub fn prepare(
    path: &Path,
    window: usize,
    device: Device,
    convert: bool,
    say: &mut dyn FnMut(&str),
) -> Result<PathBuf> {
    require!(path.exists(), Error::NoModel(path.to_owned()));
    if !is_weights_folder(path) {
        return Ok(path.to_owned());
    }
    let kind = if convert {
        converted_kind(window, device)
    } else {
        "dense".to_owned()
    };
    let folder = cache_folder()?.join(format!("{}-{kind}", folder_key(path)?));
    if complete(&folder) {
        say(&using(path, &folder));
        return Ok(folder);
    }
    let parent = folder.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(at!(MakeCache, parent))?;
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    // Of several processes the first builds the model, the others wait and use it.
    let owned = own(&parent.join(format!(".{name}.lock")), path, say)?;
    if complete(&folder) {
        say(&using(path, &folder));
        return Ok(folder);
    }
    if owned.is_some() {
        remove_remains(parent, &name, &folder);
    }
    say(&format!(
        "{} holds weights; building a graph from them in {}",
        path.display(),
        folder.display()
    ));
    // Built in a temporary folder and renamed, so that no one finds half a model. The name is unique: file systems
    // without locks keep no one out.
    let part = tempfile::Builder::new()
        .prefix(&format!(".{name}."))
        .suffix(PART)
        .tempdir_in(parent)
        .map_err(at!(MakePart, parent))?;
    let made = part.path().join("model");
    if convert {
        convert_built(path, &made, &part.path().join("dense"), window, device)?;
    } else {
        retro_models::build(path, &made, &retro_models::Options::default())?;
    }
    match fs::rename(&made, &folder) {
        // Another process built the same model in the meantime.
        Err(_) if complete(&folder) => {}
        other => other.map_err(at!(MakeFolder, folder))?,
    }
    Ok(folder)
}

/// Suffix of folders that are being built.
const PART: &str = ".part";

fn using(path: &Path, folder: &Path) -> String {
    format!(
        "{} holds weights; using the graph built from them in {}",
        path.display(),
        folder.display()
    )
}

fn complete(folder: &Path) -> bool {
    folder.join("genai_config.json").is_file() && folder.join("model.onnx").is_file()
}

/// Waits until no other process builds the same model. The lock is held as long as the returned file is open. `None`
/// where the file system has no locks: then each process builds the model.
fn own(lock: &Path, path: &Path, say: &mut dyn FnMut(&str)) -> Result<Option<File>> {
    let file = File::options()
        .create(true)
        .append(true)
        .open(lock)
        .map_err(at!(Open, lock))?;
    let locked = match file.try_lock() {
        Err(TryLockError::WouldBlock) => {
            say(&format!(
                "{} holds weights; waiting for another retro-run that builds a graph from them",
                path.display()
            ));
            file.lock()
        }
        Err(TryLockError::Error(e)) => Err(e),
        Ok(()) => Ok(()),
    };
    Ok(locked.is_ok().then_some(file))
}

/// Removes what killed processes left: unfinished folders of this model and of others whose lock is free. Failing to
/// remove something is no error here; renaming to the model's folder reports it if it matters.
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

/// Names a conversion. A model that was converted with other settings, or for another device, is another one.
fn converted_kind(window: usize, device: Device) -> String {
    let settings = format!("{:?} {}", settings(window), kind_of(device));
    format!("w{window}-{:08x}", xxh3_64(settings.as_bytes()) as u32)
}

/// All GPUs run the same model.
fn kind_of(device: Device) -> &'static str {
    match device {
        Device::Cpu => "cpu",
        Device::Cuda(_) => "cuda",
    }
}

/// `retro-export`'s defaults.
fn settings(window: usize) -> retro_export::Settings {
    retro_export::Settings {
        window,
        ..Default::default()
    }
}

/// Builds the model in `dense`, a temporary folder, and converts it into `out`.
fn convert_built(weights: &Path, out: &Path, dense: &Path, window: usize, device: Device) -> Result<()> {
    retro_models::build(weights, dense, &retro_models::Options::default())?;
    retro_export::convert(&retro_export::Options {
        source: dense.to_owned(),
        target: Some(out.to_owned()),
        settings: settings(window),
        device: Some(device),
        // Linked: the temporary folder of the unconverted model goes, its weights stay.
        external_data: Some(retro_export::ExternalMode::Link),
        force: true,
        ..Default::default()
    })
    .map_err(Box::new)?;
    Ok(())
}

/// The folder `retro-attention` in the user's cache folder.
fn cache_folder() -> Result<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let base = variable("XDG_CACHE_HOME").or_else(|| variable("HOME").map(|home| home.join(".cache")));
    let base = base.ok_or(Error::NoFolder)?;
    Ok(base.join("retro-attention"))
}

/// The folder's name and a hash of its path, its files' sizes and times, and this program's version.
pub(crate) fn folder_key(folder: &Path) -> Result<String> {
    let place = folder.canonicalize().map_err(at!(Open, folder))?;
    // Hashed as text: std's Hash may feed a hasher otherwise with another compiler.
    let mut all = format!("{}\n{}\n", env!("CARGO_PKG_VERSION"), place.display());
    let mut files: Vec<_> = fs::read_dir(&place).map_err(at!(Read, folder))?.flatten().collect();
    files.sort_by_key(fs::DirEntry::file_name);
    for file in files {
        let Ok(metadata) = file.metadata() else { continue };
        if metadata.is_file() {
            let time = metadata.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
            all += &format!("{:?} {} {time:?}\n", file.file_name(), metadata.len());
        }
    }
    let name = place.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(format!("{name}-{:016x}", xxh3_64(all.as_bytes())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_changes_with_the_weights() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("model.safetensors"), "a").unwrap();
        let one = folder_key(dir.path()).unwrap();
        assert_eq!(one, folder_key(dir.path()).unwrap());
        fs::write(dir.path().join("model.safetensors"), "ab").unwrap();
        assert_ne!(one, folder_key(dir.path()).unwrap());
    }

    #[test]
    fn a_conversion_is_one_of_its_window_and_device() {
        let cpu = converted_kind(2, Device::Cpu);
        assert!(cpu.starts_with("w2-"), "{cpu}");
        assert_ne!(cpu, converted_kind(4, Device::Cpu));
        assert_ne!(cpu, converted_kind(2, Device::Cuda(0)));
        assert_eq!(converted_kind(2, Device::Cuda(0)), converted_kind(2, Device::Cuda(3)));
    }

    #[test]
    fn a_folder_with_a_graph_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("model.onnx"), "").unwrap();
        let got = prepare(dir.path(), 2, Device::Cpu, true, &mut |_| panic!("nothing to say")).unwrap();
        assert_eq!(got, dir.path());
        assert!(prepare(Path::new("/no/such"), 2, Device::Cpu, true, &mut |_| {}).is_err());
    }
}
