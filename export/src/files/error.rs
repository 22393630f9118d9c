//! Why an output can't be written.

use std::{
    io,
    path::{Path, PathBuf},
};

/// Each is one line that says what is wrong, where, and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model to convert is a file, and its output a folder.
    #[error("{0} is a folder, but the model to convert is a file; name a file to write")]
    TargetIsFolder(PathBuf),
    /// The model to convert is a folder, and its output something else.
    #[error("{0} is not a folder, but a folder is to be written; name another output")]
    TargetIsNoFolder(PathBuf),
    /// The path ends in `..` or is the root.
    #[error("{0} is not a file's name")]
    NoFileName(PathBuf),
    /// As [`Self::NoFileName`], of a folder.
    #[error("{0} is not a name to write to")]
    NoFolderName(PathBuf),
    /// The output would replace the model that is read.
    #[error("the output is the model itself ({0}); name another file")]
    TargetIsSource(PathBuf),
    /// The output would replace the folder that is read.
    #[error("the output is the model's own folder ({0}); name another")]
    TargetIsSourceFolder(PathBuf),
    /// The output would become part of the folder that is read.
    #[error("the output {0} is inside the model's folder; name one outside")]
    TargetInsideSource(PathBuf),
    /// The output would replace a folder above the one that is read.
    #[error("the model's folder is inside the output {0}; name another")]
    SourceInsideTarget(PathBuf),
    /// The folder of the output.
    #[error("the folder {0} doesn't exist")]
    NoFolder(PathBuf),
    /// A device or a pipe would be gone, whatever else uses it.
    #[error("{0} is there and is not a file (a device, a pipe, a link to nothing); name another output")]
    TargetIsSpecial(PathBuf),
    /// A file is there, and `--force` is not given.
    #[error("{0} exists already; use --force to replace it")]
    Exists(PathBuf),
    /// A folder is there, and `--force` is not given.
    #[error("{0} exists already and is a folder with files in it; use --force to replace it")]
    FolderExists(PathBuf),
    /// A folder is there that holds something else than a converted model.
    #[error("{} is a folder without a {}; --force replaces only folders of a converted model", .target.display(), .model.display())]
    NotAModelFolder {
        /// The folder.
        target: PathBuf,
        /// The model's file that it should hold.
        model: PathBuf,
    },
    /// Files of weights can be referred to from their own folder alone.
    #[error("--external-data reference needs an output in the model's own folder, {0}")]
    ReferenceFromElsewhere(PathBuf),
    /// A folder gets all files of the model.
    #[error("--external-data reference needs a single file as output, not a folder")]
    ReferenceFromFolder,
    /// Copies beside the originals would need other names.
    #[error(
        "the output is in the model's own folder and shares its weights; --external-data copy or link needs another"
    )]
    CopyBesideOriginal,
    /// No name is left for weights beside the output.
    #[error("there are too many files named {0} already")]
    NoFreeName(PathBuf),
    /// A file of weights and the model would have the same name.
    #[error("the output {0} would replace the weights it needs; name another file")]
    ReplacesWeights(PathBuf),
    /// A restored original must find its weights under their old name.
    #[error(
        "{0} exists already and holds other weights, but the model must name it so; name an output in another folder"
    )]
    OtherWeights(PathBuf),
    /// A circle of folders, or something that is no model's folder.
    #[error("{} has more than {max} folders inside one another", .folder.display())]
    TooDeep {
        /// Where reading stopped.
        folder: PathBuf,
        /// The most that are read.
        max: usize,
    },
    /// Reading a file or folder fails.
    #[error("cannot read {}", .path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Resolving the output's folder fails.
    #[error("the folder {} can't be read", .path.display())]
    ReadFolder {
        /// The folder.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Writing fails.
    #[error("cannot write {}", .path.display())]
    Write {
        /// The output, or a file of weights beside it.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Making a folder fails.
    #[error("cannot make the folder {}", .path.display())]
    MakeFolder {
        /// The folder.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Copying or linking a file of weights fails.
    #[error("cannot bring the weights to {}", .path.display())]
    BringWeights {
        /// Where they were to be.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Copying or linking another file of the model's folder fails.
    #[error("cannot bring {} along", .path.display())]
    BringAlong {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Moving the old folder out of the way fails.
    #[error("cannot replace {}", .path.display())]
    Replace {
        /// The output.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Removing the old folder fails; the new one is in place.
    #[error("cannot remove what was replaced, {}", .path.display())]
    RemoveReplaced {
        /// The old folder under its temporary name.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The model can't be an ONNX file, or its file can't be put in place.
    #[error(transparent)]
    Model(#[from] retro_onnx::Error),
}

macro_rules! at {
    ($($name:ident: $variant:ident),+) => {
        impl Error {
            $(pub(super) fn $name(path: &Path) -> impl Fn(io::Error) -> Self + '_ {
                move |source| Self::$variant { path: path.to_owned(), source }
            })+
        }
    };
}

at!(read: Read, read_folder: ReadFolder, write: Write, make_folder: MakeFolder, bring_weights: BringWeights, bring_along: BringAlong, replace: Replace, remove_replaced: RemoveReplaced);
