//! Writes a model that is a file of its own, and its weights beside it.

use super::{
    Error, ExternalMode,
    parts::{Parts, Written},
    paths::{is_taken, same_content, same_file, same_path},
    plan::Output,
    stage::{bring, write_spilled},
    stale::stale,
};
use crate::report::{ExternalReport, Placement};
use retro_onnx::{Content, ExternalFile, Staged, folder_of, new_file_beside, persist, sync_folder};
use std::{
    fs,
    path::{Path, PathBuf},
};
use tempfile::NamedTempFile;

/// A file under a temporary name, and its place.
type StagedFile = (Staged, PathBuf);

/// Everything goes to temporary files first; then the weights are put in place, where nothing is, and the model last. A model
/// that it replaces keeps its weights up to then.
pub fn write_file(output: &Output, parts: &Parts) -> Result<Written, Error> {
    let mut written = Written::default();
    let mut staged = Vec::new();
    for file in parts.external {
        let (placement, weights) = stage_weights(output, file)?;
        staged.extend(weights);
        written.external.push(ExternalReport {
            location: file.location.clone(),
            bytes: file.len,
            how: placement,
        });
    }
    if !parts.spilled.is_empty() {
        staged.push(stage_spilled(output, parts)?);
        written.external.push(parts.spill_report(&output.spill_name));
    }
    let model = stage_model(&output.target, parts.model)?;
    let stale = if output.force {
        stale(&output.target, parts.external, &output.spill_name)
    } else {
        Vec::new()
    };
    put_in_place(output, staged, model)?;
    // Nobody needs them any more; that they can't be removed does no harm.
    stale.iter().for_each(|place| drop(fs::remove_file(place)));
    Ok(written)
}

/// What becomes of a file of weights, and the file where it is copied or linked.
fn stage_weights(output: &Output, file: &ExternalFile) -> Result<(Placement, Option<StagedFile>), Error> {
    let place = folder_of(&output.target).join(&file.location);
    if place == output.target || same_path(&place, &output.target) {
        return Err(Error::ReplacesWeights(place));
    }
    if same_file(&place, &file.source) {
        let placement = match output.external {
            ExternalMode::Reference => Placement::Referenced,
            _ => Placement::AlreadyThere,
        };
        return Ok((placement, None));
    }
    if is_taken(&place) {
        if !output.force {
            return Err(Error::Exists(place));
        }
        if !same_content(&place, &file.source) {
            return Err(Error::OtherWeights(place));
        }
        return Ok((Placement::AlreadyThere, None));
    }
    let parent = folder_of(&place);
    fs::create_dir_all(parent).map_err(Error::make_folder(parent))?;
    let how = match output.external {
        // Of another name than the model's: a restored original beside its converted model, or weights elsewhere that the
        // folder has only a link to.
        ExternalMode::Reference => ExternalMode::Copy,
        asked => asked,
    };
    let (temp, placement) = bring(&file.source, parent, how).map_err(Error::bring_weights(&place))?;
    Ok((placement, Some((temp, place))))
}

fn stage_spilled(output: &Output, parts: &Parts) -> Result<StagedFile, Error> {
    let place = folder_of(&output.target).join(&output.spill_name);
    if is_taken(&place) {
        return Err(Error::Exists(place));
    }
    let mut temp = new_file_beside(&place).map_err(Error::write(&place))?;
    write_spilled(temp.as_file_mut(), parts.spilled).map_err(Error::write(&place))?;
    Ok((Staged::File(temp), place))
}

fn stage_model(target: &Path, model: &Content) -> Result<NamedTempFile, Error> {
    let mut temp = new_file_beside(target).map_err(Error::write(target))?;
    model.write_to(temp.as_file_mut()).map_err(Error::write(target))?;
    temp.as_file().sync_all().map_err(Error::write(target))?;
    Ok(temp)
}

/// Weights first, the model last. Where that fails, what was put in place is removed.
fn put_in_place(output: &Output, staged: Vec<StagedFile>, model: NamedTempFile) -> Result<(), Error> {
    let mut new = Vec::new();
    let placed = staged.into_iter().try_for_each(|(temp, place)| {
        temp.persist_noclobber(&place).map_err(Error::write(&place))?;
        sync_folder(folder_of(&place));
        new.push(place);
        Ok(())
    });
    let done = placed.and_then(|()| Ok(persist(model, &output.target, output.force)?));
    if done.is_err() {
        // Weights without a model are of no use; what was there before is not touched.
        new.iter().for_each(|place| drop(fs::remove_file(place)));
    }
    done
}
