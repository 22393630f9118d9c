//! What goes into an output, and what became of it.

use crate::report::{ExternalReport, Placement};
use retro_onnx::{Bytes, Content, ExternalFile};
use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

/// What is to be written.
pub struct Parts<'p> {
    /// The model's file.
    pub model: &'p Content<'p>,
    /// Files of weights that it needs.
    pub external: &'p [ExternalFile],
    /// Weights that go to a file of their own, and their offsets in it.
    pub spilled: &'p [(u64, Bytes)],
    /// What is in an output's folder instead of what is in the source's.
    pub folder: &'p FolderFiles,
}

/// Files of a folder that don't come from the source's as they are, by their names in it.
#[derive(Default)]
pub struct FolderFiles {
    /// New contents.
    pub written: Vec<(PathBuf, Vec<u8>)>,
    /// Copies of files elsewhere.
    pub copied: Vec<(PathBuf, PathBuf)>,
    /// Not there.
    pub left_out: BTreeSet<PathBuf>,
}

impl FolderFiles {
    /// Whether the source's file of this name stays behind.
    pub fn replaces(&self, name: &Path) -> bool {
        let written = self.written.iter().any(|(other, _)| other == name);
        let copied = self.copied.iter().any(|(other, _)| other == name);
        written || copied || self.left_out.contains(name)
    }
}

impl Parts<'_> {
    /// The report of the file that spilled weights go to.
    pub fn spill_report(&self, name: &str) -> ExternalReport {
        let end = self.spilled.last().map_or(0, |(at, bytes)| at + bytes.len() as u64);
        ExternalReport {
            location: name.into(),
            bytes: end,
            how: Placement::MovedOut,
        }
    }
}

/// What was written.
#[derive(Default)]
pub struct Written {
    /// Length of the model's file.
    pub bytes: u64,
    pub external: Vec<ExternalReport>,
    /// Other files of the model's folder that came along.
    pub files: Vec<PathBuf>,
    /// What did not come along, and why.
    pub skipped: Vec<String>,
}
