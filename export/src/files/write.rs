//! Writes a model and what belongs to it, whole or not at all.

use super::{
    Error,
    parts::{Parts, Written},
    paths::absolute,
    plan::Output,
    write_file::write_file,
    write_folder::write_folder,
};
use retro_onnx::{folder_of, remove_abandoned};

/// Writes a file, with its weights beside it, or a folder.
///
/// # Errors
/// The model is too large for an ONNX file, or the system refuses; what was at the output is there still.
pub fn write(output: &Output, parts: &Parts) -> Result<Written, Error> {
    let bytes = parts.model.byte_len()?;
    let target = match &output.source.named_folder {
        Some(_) => absolute(&output.target)?,
        None => output.target.clone(),
    };
    remove_abandoned(folder_of(&target));
    let written = match &output.source.named_folder {
        Some(folder) => write_folder(output, folder, parts)?,
        None => write_file(output, parts)?,
    };
    Ok(Written { bytes, ..written })
}
