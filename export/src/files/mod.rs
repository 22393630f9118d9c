//! Where a model comes from and where it goes: single files, and folders with all that lies beside the model.

mod stale;

use self::stale::stale;
use crate::{report::ExternalReport, source::Source, spill::SPILLED};
use anyhow::{Context, Result, bail, ensure};
use retro_model_io::locate;
use retro_onnx::{
    Bytes, Content, ExternalFile, ModelProto, NewFolder, Staged, folder_of, inside, is_temporary, map_file,
    new_file_beside, persist, remove_abandoned, sync_folder, write_placed,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File, Metadata},
    io,
    path::{Path, PathBuf},
    str::FromStr,
};

/// With hard links asked for, files at least this long are linked into an output folder, smaller ones copied.
const LARGE: u64 = 1 << 20;
/// Folders inside folders.
const MAX_DEPTH: usize = 16;

/// What becomes of weights in files of their own. They are never rewritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExternalMode {
    /// The output lies beside them and refers to them.
    Reference,
    /// Hard links in the output's folder; copies where the file system can't. They take no time and no space, but Python's
    /// onnx package (1.23) refuses to load weights from a file with several hard links, the original's too.
    Link,
    /// Copies in the output's folder, which share their blocks where the file system can.
    Copy,
}

impl ExternalMode {
    pub const VALUES: [&'static str; 3] = ["reference", "link", "copy"];
}

impl FromStr for ExternalMode {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "reference" => Ok(Self::Reference),
            "link" => Ok(Self::Link),
            "copy" => Ok(Self::Copy),
            _ => Err(format!("{s:?} is none of {}", Self::VALUES.join(", "))),
        }
    }
}

/// A place to write to, checked before the work starts.
pub struct Output<'a> {
    source: &'a Source,
    target: PathBuf,
    external: ExternalMode,
    force: bool,
    /// The file for weights that don't fit in the model's own.
    spill_name: String,
}

/// What was written.
#[derive(Default)]
pub struct Written {
    pub bytes: u64,
    pub external: Vec<ExternalReport>,
    pub files: Vec<PathBuf>,
    pub skipped: Vec<String>,
}

impl<'a> Output<'a> {
    /// # Errors
    /// The target is the source, is there and `force` is not set, isn't the same kind of thing as the source, or doesn't
    /// suit what is asked for external data.
    pub fn plan(source: &'a Source, target: &Path, external: Option<ExternalMode>, force: bool) -> Result<Self> {
        let external = match &source.named_folder {
            Some(folder) => plan_folder(source, folder, target, external, force)?,
            None => plan_file(source, target, external, force)?,
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

    /// A name for weights beside the output that replaces nothing: an older model there may need what has the usual name, until
    /// its own file is replaced.
    fn free_name(&self, usual: &Path) -> Result<PathBuf> {
        let folder = folder_of(&self.target);
        let taken = |name: &Path| fs::symlink_metadata(folder.join(name)).is_ok();
        if !taken(usual) || (!self.force && !leads_out(&folder.join(usual), folder)) {
            return Ok(usual.to_owned());
        }
        let end = usual
            .extension()
            .map_or_else(String::new, |e| format!(".{}", e.to_string_lossy()));
        let stem = usual.file_stem().unwrap_or_default().to_string_lossy();
        let mut names = (2..10_000).map(|n| usual.with_file_name(format!("{stem}-{n}{end}")));
        let free = names.find(|name| !taken(name));
        free.with_context(|| {
            format!(
                "there are too many files named {} already",
                folder.join(usual).display()
            )
        })
    }

    /// Names for the weights that the output gets copies or links of, where the usual ones are taken: usual name and new one.
    pub(crate) fn settle(&self, external: &mut [ExternalFile]) -> Result<BTreeMap<PathBuf, PathBuf>> {
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

    /// Writes into a model which of its weights were brought for it, as name here: name in the original. Those are this
    /// program's to remove when the model is replaced.
    pub(crate) fn mark(&self, model: &mut ModelProto, external: &[ExternalFile], renamed: &BTreeMap<PathBuf, PathBuf>) {
        if self.source.named_folder.is_some() {
            return;
        }
        let folder = folder_of(&self.target);
        let usual: BTreeMap<_, _> = renamed.iter().map(|(old, new)| (new, old)).collect();
        let brought = external
            .iter()
            .filter(|f| !same_file(&folder.join(&f.location), &f.source));
        let names: serde_json::Map<_, _> = brought
            .map(|f| {
                let usual = usual.get(&f.location).map_or(&f.location, |old| *old);
                (
                    f.location.to_string_lossy().into_owned(),
                    usual.to_string_lossy().into(),
                )
            })
            .collect();
        if !names.is_empty() {
            model.set_metadata(BROUGHT, serde_json::Value::Object(names).to_string());
        }
    }

    /// The file that will hold the converted model.
    pub fn model_path(&self) -> PathBuf {
        match &self.source.named_folder {
            Some(_) => self.target.join(self.source.relative()),
            None => self.target.clone(),
        }
    }

    /// The model within the folder that was written, where that stands for another graph or for none.
    pub(crate) fn to_choose(&self) -> Option<PathBuf> {
        self.source.named_folder.as_ref()?;
        let stands_for = locate(&self.target, None).ok().map(|located| located.graph);
        let itself = stands_for.is_some_and(|graph| same_path(&graph, &self.model_path()));
        (!itself).then(|| self.source.relative().to_owned())
    }

    /// The file for weights that don't fit in the model's own.
    pub fn spill_name(&self) -> &str {
        &self.spill_name
    }

    fn spill_report(&self, spilled: &[(u64, Bytes)]) -> ExternalReport {
        ExternalReport {
            location: self.spill_name.as_str().into(),
            bytes: spilled.last().map_or(0, |(at, bytes)| at + bytes.len() as u64),
            how: "moved out of the model",
        }
    }

    /// Writes the model and what belongs to it, whole or not at all.
    /// `spilled`: weights that go to a file of their own, [`Self::spill_name`], and where in it.
    pub(crate) fn write(
        &self,
        model: &Content,
        external: &[ExternalFile],
        spilled: &[(u64, Bytes)],
    ) -> Result<Written> {
        let bytes = model.byte_len()?;
        let target = match &self.source.named_folder {
            Some(_) => absolute(&self.target)?,
            None => self.target.clone(),
        };
        remove_abandoned(folder_of(&target));
        let written = match &self.source.named_folder {
            Some(folder) => self.write_folder(folder, model, external, spilled)?,
            None => self.write_file(model, external, spilled)?,
        };
        Ok(Written { bytes, ..written })
    }

    /// Everything goes to temporary files first; then the weights are put in place, where nothing is, and the model last. A model
    /// that it replaces keeps its weights up to then.
    fn write_file(&self, model: &Content, external: &[ExternalFile], spilled: &[(u64, Bytes)]) -> Result<Written> {
        let folder = folder_of(&self.target);
        let mut written = Written::default();
        let mut staged = Vec::new();
        for file in external {
            let report = |how| ExternalReport {
                location: file.location.clone(),
                bytes: file.len,
                how,
            };
            let place = folder.join(&file.location);
            ensure!(
                place != self.target && !same_path(&place, &self.target),
                "the output {} would replace the weights it needs; name another file",
                place.display()
            );
            if same_file(&place, &file.source) {
                written.external.push(report(match self.external {
                    ExternalMode::Reference => "referenced",
                    _ => "already there",
                }));
                continue;
            }
            if fs::symlink_metadata(&place).is_ok() {
                ensure!(
                    self.force,
                    "{} exists already; use --force to replace it",
                    place.display()
                );
                ensure!(
                    same_content(&place, &file.source),
                    "{} exists already and holds other weights, but the model must name it so; name an output in another folder",
                    place.display()
                );
                written.external.push(report("already there"));
                continue;
            }
            let parent = folder_of(&place);
            fs::create_dir_all(parent).with_context(|| format!("cannot make the folder {}", parent.display()))?;
            let how = match self.external {
                // Of another name than the model's: a restored original beside its converted model, or weights elsewhere that the
                // folder has only a link to.
                ExternalMode::Reference => ExternalMode::Copy,
                asked => asked,
            };
            let (temp, how) = bring(&file.source, parent, how)
                .with_context(|| format!("cannot bring the weights to {}", place.display()))?;
            staged.push((temp, place));
            written.external.push(report(how));
        }
        let shown = self.target.display();
        if !spilled.is_empty() {
            let place = folder.join(&self.spill_name);
            ensure!(
                fs::symlink_metadata(&place).is_err(),
                "{} exists already; use --force to replace it",
                place.display()
            );
            let mut temp = new_file_beside(&place).with_context(|| format!("cannot write {}", place.display()))?;
            write_spilled(temp.as_file_mut(), spilled).with_context(|| format!("cannot write {}", place.display()))?;
            written.external.push(self.spill_report(spilled));
            staged.push((Staged::File(temp), place));
        }
        let mut temp = new_file_beside(&self.target).with_context(|| format!("cannot write {shown}"))?;
        model
            .write_to(temp.as_file_mut())
            .with_context(|| format!("cannot write {shown}"))?;
        temp.as_file()
            .sync_all()
            .with_context(|| format!("cannot write {shown}"))?;
        let stale = if self.force {
            stale(&self.target, external, &self.spill_name)
        } else {
            Vec::new()
        };
        let mut new = Vec::new();
        let placed = staged.into_iter().try_for_each(|(temp, place)| {
            temp.persist_noclobber(&place)
                .with_context(|| format!("cannot write {}", place.display()))?;
            sync_folder(folder_of(&place));
            new.push(place);
            Ok(())
        });
        let done = placed.and_then(|()| Ok(persist(temp, &self.target, self.force)?));
        if done.is_err() {
            // Weights without a model are of no use; what was there before is not touched.
            new.iter().for_each(|place| drop(fs::remove_file(place)));
        } else {
            // Nobody needs them any more; that they can't be removed does no harm.
            stale.iter().for_each(|place| drop(fs::remove_file(place)));
        }
        done.map(|()| written)
    }

    /// A whole folder is made beside the target and renamed.
    fn write_folder(
        &self,
        folder: &Path,
        model: &Content,
        external: &[ExternalFile],
        spilled: &[(u64, Bytes)],
    ) -> Result<Written> {
        let shown = self.target.display();
        let target = absolute(&self.target)?;
        let parent = folder_of(&target);
        let temp = NewFolder::inside(parent).with_context(|| format!("cannot write {shown}"))?;
        let mut written = Written::default();
        let mut brought = Brought {
            how: self.external,
            external,
            model: &self.source.model,
            model_folder: folder_of(self.source.relative()),
            behind: &self.source.behind,
            written: &mut written,
        };
        if self.source.alone {
            brought.weights(folder, temp.path())?;
        } else {
            brought.folder(folder, temp.path(), Path::new(""), 0)?;
        }
        let place = temp.path().join(self.source.relative());
        if !spilled.is_empty() {
            let place = place.with_file_name(&self.spill_name);
            let file = File::create_new(&place);
            file.and_then(|mut file| write_spilled(&mut file, spilled))
                .with_context(|| format!("cannot write {shown}"))?;
            written.external.push(self.spill_report(spilled));
        }
        let mut file = File::create_new(place).with_context(|| format!("cannot write {shown}"))?;
        model
            .write_to(&mut file)
            .and_then(|()| file.sync_all())
            .with_context(|| format!("cannot write {shown}"))?;
        sync_folder(temp.path());
        // At once, where the file system can; what was replaced then has the temporary name.
        let old = if exchange(temp.path(), &target) {
            Some(temp.keep())
        } else {
            let old = set_aside(&target)?;
            if let Err(e) = fs::rename(temp.path(), &target) {
                if let Some(old) = old {
                    let _ = fs::rename(&old, &target);
                }
                return Err(e).with_context(|| format!("cannot write {shown}"));
            }
            let _ = temp.keep();
            old
        };
        if let Some(old) = old {
            match fs::remove_dir_all(&old) {
                // Another run, which cleans up, was faster.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                done => done.with_context(|| format!("cannot remove what was replaced, {}", old.display()))?,
            }
        }
        sync_folder(parent);
        written.files.sort();
        written.external.sort_by(|a, b| a.location.cmp(&b.location));
        Ok(written)
    }
}

fn write_spilled(file: &mut File, spilled: &[(u64, Bytes)]) -> io::Result<()> {
    write_placed(file, spilled)?;
    file.sync_all()
}

/// Metadata: weights that were copied or linked for a converted model, an object of name here: name in the original.
const BROUGHT: &str = "retro.weights_brought";

/// Weights that were brought for a model, as name here: name in the original. Names that leave the folder are none of ours.
pub(crate) fn brought(model: &ModelProto) -> BTreeMap<PathBuf, PathBuf> {
    let names = model.metadata(BROUGHT).and_then(|text| serde_json::from_str(text).ok());
    let names: BTreeMap<String, String> = names.unwrap_or_default();
    names
        .iter()
        .filter_map(|(here, usual)| Some((inside(here)?, inside(usual)?)))
        .collect()
}

/// Whether two files hold the same bytes.
fn same_content(a: &Path, b: &Path) -> bool {
    map_file(a).is_ok_and(|a| map_file(b).is_ok_and(|b| a == b))
}

/// Lets two folders change places, in one step that nothing can come between. Whether it was done.
fn exchange(a: &Path, b: &Path) -> bool {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    fs::symlink_metadata(b).is_ok_and(|there| there.is_dir())
        && renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE).is_ok()
}

/// Moves an existing folder out of the way, beside itself; an empty one is simply replaced.
fn set_aside(target: &Path) -> Result<Option<PathBuf>> {
    let is_empty = |folder: &Path| fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none());
    if fs::symlink_metadata(target).is_err() || is_empty(target) {
        return Ok(None);
    }
    let place = tempfile::Builder::new()
        .prefix(".retro-export-replaced-")
        .tempdir_in(folder_of(target))
        .map(tempfile::TempDir::keep)
        .and_then(|place| fs::rename(target, &place).map(|()| place));
    place
        .map(Some)
        .with_context(|| format!("cannot replace {}", target.display()))
}

/// Brings along what lies in the source's folder.
struct Brought<'a> {
    how: ExternalMode,
    external: &'a [ExternalFile],
    model: &'a Path,
    /// The model's folder within the source's, which its weights are named from.
    model_folder: &'a Path,
    /// What is not brought along.
    behind: &'a BTreeSet<PathBuf>,
    written: &'a mut Written,
}

impl Brought<'_> {
    /// The model's weights alone.
    fn weights(&mut self, from: &Path, to: &Path) -> Result<()> {
        for file in self.external {
            let path = from.join(&file.location);
            let place = to.join(&file.location);
            let folder = folder_of(&place);
            fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
            let meta = fs::metadata(&path).with_context(|| format!("cannot read {}", path.display()))?;
            self.file(&path, &meta, folder, &file.location)?;
        }
        Ok(())
    }

    fn folder(&mut self, from: &Path, to: &Path, relative: &Path, depth: usize) -> Result<()> {
        ensure!(
            depth < MAX_DEPTH,
            "{} has more than {MAX_DEPTH} folders inside one another",
            from.display()
        );
        let cannot = || format!("cannot read {}", from.display());
        let entries: io::Result<Vec<_>> = fs::read_dir(from).with_context(cannot)?.collect();
        let mut entries = entries.with_context(cannot)?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let (path, name) = (entry.path(), entry.file_name());
            let relative = relative.join(&name);
            let mut skip = |why: &str| self.written.skipped.push(format!("{}: {why}", relative.display()));
            let is_link = entry.file_type().is_ok_and(|t| t.is_symlink());
            match fs::metadata(&path) {
                _ if same_path(&path, self.model) || is_temporary(&name) => {}
                Ok(_) if self.behind.contains(&relative) => skip("of another variant of the graph"),
                Err(_) if is_link => skip("a symbolic link to nothing"),
                Err(e) => return Err(e).with_context(|| format!("cannot read {}", path.display())),
                Ok(meta) if meta.is_dir() && is_link => skip("a symbolic link to a folder"),
                Ok(meta) if meta.is_dir() && name.as_encoded_bytes().starts_with(b".") => skip("a hidden folder"),
                Ok(meta) if meta.is_dir() => {
                    let inner = to.join(&name);
                    fs::create_dir(&inner).with_context(|| format!("cannot make the folder {}", inner.display()))?;
                    self.folder(&path, &inner, &relative, depth + 1)?;
                }
                Ok(meta) if meta.is_file() => self.file(&path, &meta, to, &relative)?,
                Ok(_) => skip("not a file"),
            }
        }
        Ok(())
    }

    fn file(&mut self, path: &Path, meta: &Metadata, to: &Path, relative: &Path) -> Result<()> {
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
        let cannot = || format!("cannot bring {} along", path.display());
        let source = fs::canonicalize(path).with_context(cannot)?;
        let name = path.file_name().context("a file without a name").with_context(cannot)?;
        let (temp, how) = bring(&source, to, how).with_context(cannot)?;
        temp.persist_noclobber(&to.join(name)).with_context(cannot)?;
        match weights {
            Some(file) => {
                let report = ExternalReport {
                    location: file.location.clone(),
                    bytes: file.len,
                    how,
                };
                self.written.external.push(report);
            }
            None => self.written.files.push(relative.to_owned()),
        }
        Ok(())
    }
}

/// A link to, or a copy of, a file under a temporary name in a folder, and which of the two.
fn bring(source: &Path, folder: &Path, how: ExternalMode) -> io::Result<(Staged, &'static str)> {
    if how != ExternalMode::Copy
        && let Ok(linked) = Staged::link(source, folder)
    {
        return Ok((linked, "linked"));
    }
    let mut temp = new_file_beside(&folder.join("copy"))?;
    io::copy(&mut File::open(source)?, temp.as_file_mut())?;
    temp.as_file().sync_all()?;
    Ok((Staged::File(temp), "copied"))
}

fn plan_file(source: &Source, target: &Path, external: Option<ExternalMode>, force: bool) -> Result<ExternalMode> {
    let shown = target.display();
    ensure!(
        !target.is_dir(),
        "{shown} is a folder, but the model to convert is a file; name a file to write"
    );
    ensure!(target.file_name().is_some(), "{shown} is not a file's name");
    ensure!(
        !same_path(target, &source.model),
        "the output is the model itself ({shown}); name another file"
    );
    let folder = folder_of(target);
    ensure!(folder.is_dir(), "the folder {} doesn't exist", folder.display());
    let exists = fs::symlink_metadata(target).is_ok();
    // A device or a pipe would be gone, whatever else uses it.
    ensure!(
        !exists || target.is_file(),
        "{shown} is there and is not a file (a device, a pipe, a link to nothing); name another output"
    );
    ensure!(force || !exists, "{shown} exists already; use --force to replace it");
    let beside = same_file(folder, source.folder());
    match external {
        None if beside => Ok(ExternalMode::Reference),
        None => Ok(ExternalMode::Copy),
        Some(ExternalMode::Reference) if !beside => {
            bail!(
                "--external-data reference needs an output in the model's own folder, {}",
                source.folder().display()
            )
        }
        Some(ExternalMode::Link | ExternalMode::Copy) if beside => {
            bail!(
                "the output is in the model's own folder and shares its weights; --external-data copy or link needs another"
            )
        }
        Some(mode) => Ok(mode),
    }
}

fn plan_folder(
    source: &Source,
    folder: &Path,
    target: &Path,
    external: Option<ExternalMode>,
    force: bool,
) -> Result<ExternalMode> {
    let shown = target.display();
    let (from, to) = (
        fs::canonicalize(folder).with_context(|| format!("cannot read {}", folder.display()))?,
        absolute(target)?,
    );
    ensure!(
        from != to,
        "the output is the model's own folder ({shown}); name another"
    );
    ensure!(
        !to.starts_with(&from),
        "the output {shown} is inside the model's folder; name one outside"
    );
    ensure!(
        !from.starts_with(&to),
        "the model's folder is inside the output {shown}; name another"
    );
    let parent = folder_of(&to);
    ensure!(parent.is_dir(), "the folder {} doesn't exist", parent.display());
    if let Ok(meta) = fs::symlink_metadata(&to) {
        ensure!(
            meta.is_dir(),
            "{shown} is not a folder, but a folder is to be written; name another output"
        );
        let entries = fs::read_dir(&to)
            .with_context(|| format!("cannot read {shown}"))?
            .count();
        ensure!(
            force || entries == 0,
            "{shown} exists already and is a folder with files in it; use --force to replace it"
        );
        let holds_model = to.join(source.relative()).is_file();
        ensure!(
            entries == 0 || holds_model,
            "{shown} is a folder without a {}; --force replaces only folders of a converted model",
            source.relative().display()
        );
    }
    match external {
        Some(ExternalMode::Reference) => bail!("--external-data reference needs a single file as output, not a folder"),
        mode => Ok(mode.unwrap_or(ExternalMode::Copy)),
    }
}

/// Whether a file of a folder is one elsewhere that links lead to. ONNX Runtime doesn't load weights through such a link, unless
/// the model is a link into the same place, as in Hugging Face's cache.
fn leads_out(file: &Path, folder: &Path) -> bool {
    match (fs::canonicalize(file), fs::canonicalize(folder)) {
        (Ok(file), Ok(folder)) => !file.starts_with(folder),
        _ => false,
    }
}

/// A path whose folder is resolved but which need not exist.
fn absolute(path: &Path) -> Result<PathBuf> {
    let shown = path.display();
    if let Ok(resolved) = fs::canonicalize(path) {
        return Ok(resolved);
    }
    let name = path
        .file_name()
        .with_context(|| format!("{shown} is not a name to write to"))?;
    let folder = folder_of(path);
    let folder = fs::canonicalize(folder).with_context(|| format!("the folder {} can't be read", folder.display()))?;
    Ok(folder.join(name))
}

/// Whether two paths are one file or folder, by any name.
fn same_file(a: &Path, b: &Path) -> bool {
    match (fs::metadata(a), fs::metadata(b)) {
        (Ok(ma), Ok(mb)) => is_one_inode(&ma, &mb).unwrap_or_else(|| same_path(a, b)),
        _ => false,
    }
}

/// Whether two paths lead to one place after links are resolved. A hard link is another place: replacing it by renaming
/// leaves the other as it is.
fn same_path(a: &Path, b: &Path) -> bool {
    matches!((fs::canonicalize(a), fs::canonicalize(b)), (Ok(a), Ok(b)) if a == b)
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
