//! Where the output goes, checked before the work starts.

use super::{
    Error, ExternalMode,
    paths::{absolute, is_taken, leads_out, same_file, same_path},
};
use crate::source::Source;
use retro_model_io::locate;
use retro_onnx::{ExternalFile, folder_of};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// A place to write to.
pub struct Output<'a> {
    pub(super) source: &'a Source,
    pub(super) target: PathBuf,
    pub(super) external: ExternalMode,
    /// What is there may be replaced.
    pub(super) force: bool,
    /// The file for weights that don't fit in the model's own.
    pub(super) spill_name: String,
}

impl<'a> Output<'a> {
    /// # Errors
    /// The target is the source, is there and `force` is not set, isn't the same kind of thing as the source, or doesn't
    /// suit what is asked for external data.
    pub fn plan(source: &'a Source, target: &Path, external: Option<ExternalMode>, force: bool) -> Result<Self, Error> {
        let external = match &source.named_folder {
            Some(folder) => {
                check_folder(source, folder, target, force)?;
                external_mode_of_folder(external)?
            }
            None => {
                check_file(source, target, force)?;
                external_mode_of_file(source, target, external)?
            }
        };
        let mut output = Self {
            source,
            target: target.to_owned(),
            external,
            force,
            spill_name: String::new(),
        };
        let model = output.model_path();
        let name = format!("{}.data", model.file_name().unwrap_or_default().to_string_lossy());
        output.spill_name = match &source.named_folder {
            Some(_) => name,
            None => output.free_name(Path::new(&name))?.to_string_lossy().into_owned(),
        };
        Ok(output)
    }

    /// The file that will hold the converted model.
    pub fn model_path(&self) -> PathBuf {
        match &self.source.named_folder {
            Some(_) => self.target.join(self.source.relative()),
            None => self.target.clone(),
        }
    }

    /// The file for weights that don't fit in the model's own.
    pub fn spill_name(&self) -> &str {
        &self.spill_name
    }

    /// The model within the folder that was written, where that stands for another graph or for none.
    pub fn to_choose(&self) -> Option<PathBuf> {
        self.source.named_folder.as_ref()?;
        let stands_for = locate(&self.target, None).ok().map(|located| located.graph);
        let itself = stands_for.is_some_and(|graph| same_path(&graph, &self.model_path()));
        (!itself).then(|| self.source.relative().to_owned())
    }

    /// Names for the weights that the output gets copies or links of, where the usual ones are taken: usual name and new one.
    pub fn rename_taken(&self, external: &mut [ExternalFile]) -> Result<BTreeMap<PathBuf, PathBuf>, Error> {
        let mut renamed = BTreeMap::new();
        if self.source.named_folder.is_some() {
            return Ok(renamed);
        }
        let folder = folder_of(&self.target);
        for file in external {
            let place = folder.join(&file.location);
            let there = self.external == ExternalMode::Reference || same_file(&place, &file.source);
            if (there && !leads_out(&place, folder)) || same_path(&place, &self.target) {
                continue;
            }
            let name = self.free_name(&file.location)?;
            if name != file.location {
                renamed.insert(std::mem::replace(&mut file.location, name.clone()), name);
            }
        }
        Ok(renamed)
    }

    /// A name for weights beside the output that replaces nothing: an older model there may need what has the usual name, until
    /// its own file is replaced.
    fn free_name(&self, usual: &Path) -> Result<PathBuf, Error> {
        let folder = folder_of(&self.target);
        let taken = |name: &Path| is_taken(&folder.join(name));
        if !taken(usual) || (!self.force && !leads_out(&folder.join(usual), folder)) {
            return Ok(usual.to_owned());
        }
        let end = usual
            .extension()
            .map_or_else(String::new, |e| format!(".{}", e.to_string_lossy()));
        let stem = usual.file_stem().unwrap_or_default().to_string_lossy();
        let mut names = (2..10_000).map(|n| usual.with_file_name(format!("{stem}-{n}{end}")));
        let free = names.find(|name| !taken(name));
        free.ok_or_else(|| Error::NoFreeName(folder.join(usual)))
    }
}

/// Whether a file may be written.
fn check_file(source: &Source, target: &Path, force: bool) -> Result<(), Error> {
    let owned = || target.to_owned();
    if target.is_dir() {
        return Err(Error::TargetIsFolder(owned()));
    }
    if target.file_name().is_none() {
        return Err(Error::NoFileName(owned()));
    }
    if same_path(target, &source.model) {
        return Err(Error::TargetIsSource(owned()));
    }
    let folder = folder_of(target);
    if !folder.is_dir() {
        return Err(Error::NoFolder(folder.to_owned()));
    }
    let exists = is_taken(target);
    if exists && !target.is_file() {
        return Err(Error::TargetIsSpecial(owned()));
    }
    if exists && !force {
        return Err(Error::Exists(owned()));
    }
    Ok(())
}

/// Whether a folder may be written.
fn check_folder(source: &Source, folder: &Path, target: &Path, force: bool) -> Result<(), Error> {
    let owned = || target.to_owned();
    let from = fs::canonicalize(folder).map_err(Error::read(folder))?;
    let to = absolute(target)?;
    if from == to {
        return Err(Error::TargetIsSourceFolder(owned()));
    }
    if to.starts_with(&from) {
        return Err(Error::TargetInsideSource(owned()));
    }
    if from.starts_with(&to) {
        return Err(Error::SourceInsideTarget(owned()));
    }
    let parent = folder_of(&to);
    if !parent.is_dir() {
        return Err(Error::NoFolder(parent.to_owned()));
    }
    let Ok(meta) = fs::symlink_metadata(&to) else {
        return Ok(());
    };
    if !meta.is_dir() {
        return Err(Error::TargetIsNoFolder(owned()));
    }
    let is_empty = fs::read_dir(&to).map_err(Error::read(target))?.next().is_none();
    if !is_empty && !force {
        return Err(Error::FolderExists(owned()));
    }
    if !is_empty && !to.join(source.relative()).is_file() {
        return Err(Error::NotAModelFolder {
            target: owned(),
            model: source.relative().to_owned(),
        });
    }
    Ok(())
}

fn external_mode_of_file(source: &Source, target: &Path, asked: Option<ExternalMode>) -> Result<ExternalMode, Error> {
    let beside = same_file(folder_of(target), source.folder());
    match asked {
        None if beside => Ok(ExternalMode::Reference),
        None => Ok(ExternalMode::Copy),
        Some(ExternalMode::Reference) if !beside => Err(Error::ReferenceFromElsewhere(source.folder().to_owned())),
        Some(ExternalMode::Link | ExternalMode::Copy) if beside => Err(Error::CopyBesideOriginal),
        Some(mode) => Ok(mode),
    }
}

fn external_mode_of_folder(asked: Option<ExternalMode>) -> Result<ExternalMode, Error> {
    match asked {
        Some(ExternalMode::Reference) => Err(Error::ReferenceFromFolder),
        mode => Ok(mode.unwrap_or(ExternalMode::Copy)),
    }
}
