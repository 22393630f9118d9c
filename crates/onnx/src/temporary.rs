//! Temporary files and folders beside what they are for. Whoever makes one holds a lock on it as long as it has its
//! temporary name, so that those of a killed run can be told from a live one's and removed.
//! [`write_model`](crate::write_model) makes its file so too, whoever calls it: so all that takes part in the locking
//! is here, although the converter alone stages folders and links.

use crate::{
    platform::{is_at, leave_to_umask, open_to_lock},
    read::folder_of,
};
use std::{
    fs::{self, File, TryLockError},
    io,
    path::{Path, PathBuf},
};
use tempfile::{NamedTempFile, TempDir};

const PREFIX: &str = ".retro-export-";
const SUFFIX: &str = ".tmp";
/// Times that a new file is made when another run, which cleans up, was faster than its lock.
const TRIES: usize = 16;

/// Whether a file or folder is a temporary one, by its name.
pub fn is_temporary(name: &std::ffi::OsStr) -> bool {
    let name = name.as_encoded_bytes();
    name.starts_with(PREFIX.as_bytes()) && name.ends_with(SUFFIX.as_bytes())
}

/// A temporary file in the target's folder; it is removed again unless it is persisted.
///
/// # Errors
/// The folder is absent, or may not be written.
pub fn new_file_beside(target: &Path) -> io::Result<NamedTempFile> {
    for _ in 0..TRIES {
        let mut builder = tempfile::Builder::new();
        leave_to_umask(&mut builder, 0o666);
        let file = builder.prefix(PREFIX).suffix(SUFFIX).tempfile_in(folder_of(target))?;
        if holds(file.as_file(), file.path()) {
            return Ok(file);
        }
    }
    Err(io::Error::other("temporary files are removed as soon as they are made"))
}

/// A temporary folder; it is removed again unless it is kept.
pub struct NewFolder {
    folder: TempDir,
    _lock: File,
}

impl NewFolder {
    /// A temporary folder inside a folder.
    ///
    /// # Errors
    /// The folder is absent, or may not be written.
    pub fn inside(folder: &Path) -> io::Result<Self> {
        for _ in 0..TRIES {
            let mut builder = tempfile::Builder::new();
            leave_to_umask(&mut builder, 0o777);
            let new = builder.prefix(PREFIX).suffix(SUFFIX).tempdir_in(folder)?;
            match open_to_lock(new.path()) {
                Ok(lock) if holds(&lock, new.path()) => {
                    return Ok(Self {
                        folder: new,
                        _lock: lock,
                    });
                }
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
        Err(io::Error::other(
            "temporary folders are removed as soon as they are made",
        ))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Leaves what has the temporary name, which may be another folder by now.
    pub fn keep(self) -> PathBuf {
        self.folder.keep()
    }
}

/// A file on its way to its place.
pub enum Staged {
    /// A new file.
    File(NamedTempFile),
    /// A hard link, in a folder that is locked in its place: a lock on the file itself would be one on the file it is a
    /// link of.
    Link(NewFolder, PathBuf),
}

impl Staged {
    /// A hard link of a file, in a folder.
    ///
    /// # Errors
    /// The file system has no hard links, or not from there to here.
    pub fn link(source: &Path, folder: &Path) -> io::Result<Self> {
        let new = NewFolder::inside(folder)?;
        let place = new.path().join("link");
        fs::hard_link(source, &place)?;
        Ok(Self::Link(new, place))
    }

    /// Puts it where nothing is.
    ///
    /// # Errors
    /// Something is there, or the file system refuses.
    pub fn persist_noclobber(self, place: &Path) -> io::Result<()> {
        match self {
            Self::File(file) => file.persist_noclobber(place).map(drop).map_err(|e| e.error),
            Self::Link(_folder, link) => fs::hard_link(link, place),
        }
    }
}

/// Takes the lock of a file or folder just made. Whether it is still there under its name.
fn holds(file: &File, path: &Path) -> bool {
    match file.try_lock() {
        // Where a file system has no locks, nobody can tell files of live runs, and nobody removes any.
        Ok(()) | Err(TryLockError::Error(_)) => is_at(file, path),
        Err(TryLockError::WouldBlock) => false,
    }
}

/// Removes what killed runs have left in a folder. What can't be removed stays.
pub fn remove_abandoned(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten().filter(|e| is_temporary(&e.file_name())) {
        let path = entry.path();
        if entry.file_type().is_ok_and(|t| t.is_file() || t.is_dir()) {
            let Ok(file) = open_to_lock(&path) else {
                continue;
            };
            // The lock is held until it is gone.
            if file.try_lock().is_ok() && is_at(&file, &path) {
                let _ = if file.metadata().is_ok_and(|m| m.is_dir()) {
                    fs::remove_dir_all(&path)
                } else {
                    fs::remove_file(&path)
                };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap().flatten();
        let mut names: Vec<_> = entries.map(|e| e.file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn what_a_killed_run_left_is_removed_and_a_live_ones_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let here = folder.path();
        let target = here.join("model.onnx");
        fs::write(here.join("weights"), b"weights").unwrap();
        let file = new_file_beside(&target).unwrap();
        let inside = NewFolder::inside(here).unwrap();
        fs::write(inside.path().join("model.onnx"), b"half").unwrap();
        let link = Staged::link(&here.join("weights"), here).unwrap();
        let live = names(here);
        assert_eq!(live.len(), 4);
        // Those of killed runs: nobody holds them. What only looks like one stays.
        fs::write(here.join(".retro-export-dead.tmp"), b"half").unwrap();
        fs::create_dir_all(here.join(".retro-export-dead2.tmp/deep")).unwrap();
        fs::write(here.join(".retro-export-dead2.tmp/deep/file"), b"half").unwrap();
        fs::hard_link(here.join("weights"), here.join(".retro-export-dead3.tmp")).unwrap();
        std::os::unix::fs::symlink(here.join("weights"), here.join(".retro-export-link.tmp")).unwrap();
        fs::create_dir(here.join(".retro-export-replaced-old")).unwrap();
        remove_abandoned(here);
        let mut expected = live;
        expected.extend([".retro-export-link.tmp", ".retro-export-replaced-old"].map(str::to_owned));
        expected.sort();
        assert_eq!(names(here), expected);
        link.persist_noclobber(&here.join("linked")).unwrap();
        assert!(
            Staged::link(&here.join("weights"), here)
                .unwrap()
                .persist_noclobber(&here.join("linked"))
                .is_err()
        );
        drop((file, inside));
        assert_eq!(fs::read(here.join("linked")).unwrap(), b"weights");
        assert_eq!(
            names(here),
            [
                ".retro-export-link.tmp",
                ".retro-export-replaced-old",
                "linked",
                "weights"
            ]
        );
    }
}
