//! The way back: a converted model carries how its original was written, all but the weights, which it has itself. From both
//! come the original's bytes.

mod record;

pub use record::{RECORD, RecordError, record};

use crate::{
    convert::undo_host,
    error::chain,
    files::{self, ExternalMode, Output, Parts, copied_weights, write},
    source::{self, find_source},
    spill::SPILLED,
};
use record::Record;
use retro_onnx::{Content, LoadedModel, Sink, external_files, read_model, stay_inside};
use std::{
    io,
    path::{Path, PathBuf},
};

/// Why the original isn't restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no model, or it isn't clear which.
    #[error(transparent)]
    Source(#[from] source::Error),
    /// The output can't be written where it was asked for.
    #[error(transparent)]
    Files(#[from] files::Error),
    /// The model can't be read, or is no ONNX model.
    #[error(transparent)]
    Read(#[from] retro_onnx::Error),
    /// A file of weights is not there, too short, or out of the model's folder.
    #[error("{}", .path.display())]
    Weights {
        /// The converted model's file.
        path: PathBuf,
        /// Which tensor, and why.
        source: Box<retro_onnx::Error>,
    },
    /// The model has no record of its original, or not the weights that go with it.
    #[error("{}", .path.display())]
    Record {
        /// The converted model's file.
        path: PathBuf,
        /// The reason.
        source: Box<RecordError>,
    },
}

/// Takes bytes and forgets them.
struct Nowhere;

impl Sink for Nowhere {
    fn take(&mut self, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
}

/// Restores the original of a converted model, a file or a folder. Gives the model's path and the bytes written.
///
/// # Errors
/// The model is no converted one, what it was converted from can't be restored exactly, or the output can't be written.
pub fn revert(
    source: &Path,
    graph: Option<&str>,
    target: &Path,
    external: Option<ExternalMode>,
    force: bool,
) -> Result<(PathBuf, u64), Error> {
    let source = find_source(source, graph, Some(target))?;
    let output = Output::plan(&source, target, external, force)?;
    let LoadedModel { model, len, .. } = read_model(&source.model)?;
    let weights = |source_error| Error::Weights {
        path: source.model.clone(),
        source: Box::new(source_error),
    };
    let record_error = |source_error| Error::Record {
        path: source.model.clone(),
        source: Box::new(source_error),
    };
    stay_inside(&model, &source.model, source.folder()).map_err(weights)?;
    // Weights are only looked up where a conversion would have put them.
    let mut files = external_files(&model, source.folder()).map_err(weights)?;
    let spilled = model.metadata(SPILLED);
    // Weights that were moved out of the model are in a file of their own.
    let len = files.iter().fold(len, |sum, file| sum.saturating_add(file.len));
    let record = Record::of(&model, source.folder(), len).map_err(record_error)?;
    // Whether it is what it says is known before anything is written.
    let len = record.give(&mut Nowhere).map_err(record_error)?;
    files.retain(|f| spilled.is_none_or(|s| f.location != Path::new(s)));
    let copied = copied_weights(&model);
    for file in &mut files {
        if let Some(usual) = copied.get(&file.location) {
            file.location.clone_from(usual);
        }
    }
    let fill = |sink: &mut dyn Sink| record.give(sink).map(drop).map_err(|e| io::Error::other(chain(&e)));
    let parts = Parts {
        model: &Content::Bytes(len, &fill),
        external: &files,
        spilled: &[],
        folder: &undo_host(&model, source.named_folder.as_deref()),
    };
    let written = write(&output, &parts)?;
    Ok((output.model_path(), written.bytes))
}
