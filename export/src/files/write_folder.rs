//! Writes a model as a folder: with everything that lies in its own, or with its weights alone.

use super::{
    Error, ExternalMode,
    parts::{FolderFiles, Parts, Written},
    paths::{absolute, same_path},
    plan::Output,
    stage::{bring, exchange, set_aside, write_spilled},
};
use crate::report::ExternalReport;
use retro_onnx::{ExternalFile, NewFolder, folder_of, is_temporary, sync_folder};
use std::{
    collections::BTreeSet,
    fs::{self, File, Metadata},
    io::{self, Write},
    path::{Path, PathBuf},
};

/// With hard links asked for, other files than weights that are at least this long are linked too, smaller ones copied.
const LARGE: u64 = 1 << 20;
/// The maximum depth of directories.
const MAX_DEPTH: usize = 16;

/// Makes a folder beside the target and renames it. `folder`: the source's.
pub fn write_folder(output: &Output, folder: &Path, parts: &Parts) -> Result<Written, Error> {
    let target = absolute(&output.target)?;
    let parent = folder_of(&target);
    let temp = NewFolder::inside(parent).map_err(Error::write(&output.target))?;
    let mut written = Written::default();
    let mut copy = FolderCopy {
        how: output.external,
        external: parts.external,
        model: &output.source.model,
        model_folder: folder_of(output.source.relative()),
        behind: &output.source.behind,
        instead: parts.folder,
        written: &mut written,
    };
    if output.source.alone {
        copy.weights(folder, temp.path())?;
    } else {
        copy.folder(folder, temp.path(), Path::new(""), 0)?;
    }
    copy.instead(&target, temp.path())?;
    let place = temp.path().join(output.source.relative());
    if !parts.spilled.is_empty() {
        let place = place.with_file_name(&output.spill_name);
        let file = File::create_new(&place);
        file.and_then(|mut file| write_spilled(&mut file, parts.spilled))
            .map_err(Error::write(&output.target))?;
        written.external.push(parts.spill_report(&output.spill_name));
    }
    let mut file = File::create_new(place).map_err(Error::write(&output.target))?;
    parts
        .model
        .write_to(&mut file)
        .and_then(|()| file.sync_all())
        .map_err(Error::write(&output.target))?;
    sync_folder(temp.path());
    put_in_place(temp, &target, &output.target)?;
    sync_folder(parent);
    written.files.sort();
    written.external.sort_by(|a, b| a.location.cmp(&b.location));
    Ok(written)
}

/// Lets the new folder take its place, and removes what it replaced. `shown`: the target as it was named.
fn put_in_place(temp: NewFolder, target: &Path, shown: &Path) -> Result<(), Error> {
    // At once, where the file system can; what was replaced then has the temporary name.
    let old = if exchange(temp.path(), target) {
        Some(temp.keep())
    } else {
        let old = set_aside(target)?;
        if let Err(e) = fs::rename(temp.path(), target) {
            if let Some(old) = old {
                let _ = fs::rename(&old, target);
            }
            return Err(Error::write(shown)(e));
        }
        let _ = temp.keep();
        old
    };
    let Some(old) = old else { return Ok(()) };
    match fs::remove_dir_all(&old) {
        // Another run, which cleans up, was faster.
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done.map_err(Error::remove_replaced(&old)),
    }
}

/// Brings along what lies in the source's folder.
struct FolderCopy<'a> {
    how: ExternalMode,
    external: &'a [ExternalFile],
    model: &'a Path,
    /// The model's folder within the source's, which its weights are named from.
    model_folder: &'a Path,
    /// What is not copied.
    behind: &'a BTreeSet<PathBuf>,
    /// What is there instead.
    instead: &'a FolderFiles,
    written: &'a mut Written,
}

impl FolderCopy<'_> {
    /// The model's weights alone.
    fn weights(&mut self, from: &Path, to: &Path) -> Result<(), Error> {
        for file in self.external {
            let path = from.join(&file.location);
            let place = to.join(&file.location);
            let folder = folder_of(&place);
            fs::create_dir_all(folder).map_err(Error::make_folder(folder))?;
            let meta = fs::metadata(&path).map_err(Error::read(&path))?;
            self.file(&path, &meta, folder, &file.location)?;
        }
        Ok(())
    }

    /// A folder and what is inside. `relative`: `from` within the source's folder.
    fn folder(&mut self, from: &Path, to: &Path, relative: &Path, depth: usize) -> Result<(), Error> {
        if depth >= MAX_DEPTH {
            return Err(Error::TooDeep {
                folder: from.to_owned(),
                max: MAX_DEPTH,
            });
        }
        let entries: io::Result<Vec<_>> = fs::read_dir(from).map_err(Error::read(from))?.collect();
        let mut entries = entries.map_err(Error::read(from))?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let (path, name) = (entry.path(), entry.file_name());
            let relative = relative.join(&name);
            let mut skip = |why: &str| self.written.skipped.push(format!("{}: {why}", relative.display()));
            let is_link = entry.file_type().is_ok_and(|t| t.is_symlink());
            match fs::metadata(&path) {
                _ if same_path(&path, self.model) || is_temporary(&name) => {}
                Ok(_) if self.instead.replaces(&relative) => {}
                Ok(_) if self.behind.contains(&relative) => skip("of another variant of the graph"),
                Err(_) if is_link => skip("a symbolic link to nothing"),
                Err(e) => return Err(Error::read(&path)(e)),
                Ok(meta) if meta.is_dir() && is_link => skip("a symbolic link to a folder"),
                Ok(meta) if meta.is_dir() && name.as_encoded_bytes().starts_with(b".") => skip("a hidden folder"),
                Ok(meta) if meta.is_dir() => {
                    let inner = to.join(&name);
                    fs::create_dir(&inner).map_err(Error::make_folder(&inner))?;
                    self.folder(&path, &inner, &relative, depth + 1)?;
                }
                Ok(meta) if meta.is_file() => self.file(&path, &meta, to, &relative)?,
                Ok(_) => skip("not a file"),
            }
        }
        Ok(())
    }

    /// Files that don't come from the source's folder. `shown`: the target as it was named.
    fn instead(&mut self, shown: &Path, to: &Path) -> Result<(), Error> {
        for (name, bytes) in &self.instead.written {
            let file = File::create_new(to.join(name));
            file.and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
                .map_err(Error::write(shown))?;
            self.written.files.push(name.clone());
        }
        for (name, from) in &self.instead.copied {
            fs::copy(from, to.join(name)).map_err(Error::bring_along(from))?;
            self.written.files.push(name.clone());
        }
        Ok(())
    }

    fn file(&mut self, path: &Path, meta: &Metadata, to: &Path, relative: &Path) -> Result<(), Error> {
        let in_model_folder = match self.model_folder {
            here if here == Path::new(".") => Some(relative),
            below => relative.strip_prefix(below).ok(),
        };
        let weights = self.external.iter().find(|e| in_model_folder == Some(&e.location));
        let how = if weights.is_none() && meta.len() < LARGE {
            ExternalMode::Copy
        } else {
            self.how
        };
        let name = path.file_name().ok_or_else(|| Error::NoFileName(path.to_owned()))?;
        let source = fs::canonicalize(path).map_err(Error::bring_along(path))?;
        let (temp, placement) = bring(&source, to, how).map_err(Error::bring_along(path))?;
        temp.persist_noclobber(&to.join(name))
            .map_err(Error::bring_along(path))?;
        match weights {
            Some(file) => {
                let report = ExternalReport {
                    location: file.location.clone(),
                    bytes: file.len,
                    how: placement,
                };
                self.written.external.push(report);
            }
            None => self.written.files.push(relative.to_owned()),
        }
        Ok(())
    }
}
