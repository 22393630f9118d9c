//! Files and folders under temporary names, which are put in place when they are whole.

use super::{Error, ExternalMode};
use crate::report::Placement;
use retro_onnx::{Bytes, Staged, folder_of, new_file_beside, write_placed};
use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

/// A link to, or a copy of, a file under a temporary name in a folder, and which of the two. Where links are asked for and the
/// file system can't make one, it is a copy.
pub fn bring(source: &Path, folder: &Path, how: ExternalMode) -> io::Result<(Staged, Placement)> {
    if how != ExternalMode::Copy
        && let Ok(linked) = Staged::link(source, folder)
    {
        return Ok((linked, Placement::Linked));
    }
    let mut temp = new_file_beside(&folder.join("copy"))?;
    io::copy(&mut File::open(source)?, temp.as_file_mut())?;
    temp.as_file().sync_all()?;
    Ok((Staged::File(temp), Placement::Copied))
}

/// Writes weights at their places in a file, down to the disk.
pub fn write_spilled(file: &mut File, spilled: &[(u64, Bytes)]) -> io::Result<()> {
    write_placed(file, spilled)?;
    file.sync_all()
}

/// Lets two folders change places, in one step that nothing can come between. Whether it was done.
#[cfg(any(target_os = "linux", target_vendor = "apple"))]
pub fn exchange(a: &Path, b: &Path) -> bool {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    fs::symlink_metadata(b).is_ok_and(|there| there.is_dir())
        && renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE).is_ok()
}

/// Other systems have no such step.
#[cfg(not(any(target_os = "linux", target_vendor = "apple")))]
pub fn exchange(_: &Path, _: &Path) -> bool {
    false
}

/// Moves an existing folder out of the way, beside itself; an empty one is simply replaced.
pub fn set_aside(target: &Path) -> Result<Option<PathBuf>, Error> {
    let is_empty = |folder: &Path| fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none());
    if fs::symlink_metadata(target).is_err() || is_empty(target) {
        return Ok(None);
    }
    let place = tempfile::Builder::new()
        .prefix(".retro-export-replaced-")
        .tempdir_in(folder_of(target))
        .map(tempfile::TempDir::keep)
        .and_then(|place| fs::rename(target, &place).map(|()| place));
    place.map(Some).map_err(Error::replace(target))
}
