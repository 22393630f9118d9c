//! Whether paths lead to the same place.

use super::Error;
use retro_onnx::{folder_of, map_file};
use std::{
    fs::{self, Metadata},
    path::{Path, PathBuf},
};

/// Whether a file of a folder is one elsewhere that links lead to. ONNX Runtime doesn't load weights through such a link, unless
/// the model is a link into the same place, as in Hugging Face's cache.
pub fn leads_out(file: &Path, folder: &Path) -> bool {
    match (fs::canonicalize(file), fs::canonicalize(folder)) {
        (Ok(file), Ok(folder)) => !file.starts_with(folder),
        _ => false,
    }
}

/// A path whose folder is resolved but which need not exist.
pub fn absolute(path: &Path) -> Result<PathBuf, Error> {
    if let Ok(resolved) = fs::canonicalize(path) {
        return Ok(resolved);
    }
    let name = path.file_name().ok_or_else(|| Error::NoFolderName(path.to_owned()))?;
    let folder = folder_of(path);
    Ok(fs::canonicalize(folder).map_err(Error::read_folder(folder))?.join(name))
}

/// Whether two paths are one file or folder, by any name.
pub fn same_file(a: &Path, b: &Path) -> bool {
    match (fs::metadata(a), fs::metadata(b)) {
        (Ok(ma), Ok(mb)) => is_one_inode(&ma, &mb).unwrap_or_else(|| same_path(a, b)),
        _ => false,
    }
}

/// Whether two paths lead to one place after links are resolved. A hard link is another place: replacing it by renaming
/// leaves the other as it is.
pub fn same_path(a: &Path, b: &Path) -> bool {
    matches!((fs::canonicalize(a), fs::canonicalize(b)), (Ok(a), Ok(b)) if a == b)
}

/// Whether two files hold the same bytes.
pub fn same_content(a: &Path, b: &Path) -> bool {
    map_file(a).is_ok_and(|a| map_file(b).is_ok_and(|b| a == b))
}

/// Whether there is something of this name, be it a link to nothing.
pub fn is_taken(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

#[cfg(unix)]
fn is_one_inode(a: &Metadata, b: &Metadata) -> Option<bool> {
    use std::os::unix::fs::MetadataExt;
    Some((a.dev(), a.ino()) == (b.dev(), b.ino()))
}

#[cfg(not(unix))]
fn is_one_inode(_: &Metadata, _: &Metadata) -> Option<bool> {
    None
}
