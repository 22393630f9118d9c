//! Whether a model's decoding steps may be captured as a CUDA graph, as far as its file tells: a captured step has the
//! same shapes at every length, so its mask is as wide as the cache.

use retro_contract::metadata;
use retro_export::takes_wide_masks;
use retro_onnx::{graph::GraphView, read_model};

use crate::{
    decoder::error::{NotCapturable, Result},
    model_folder::ModelFolder,
};

/// Checks that a model's numbers do not change with the width of its mask.
///
/// # Errors
/// They do, or it cannot be told.
pub(crate) fn check(folder: &ModelFolder) -> Result<(), NotCapturable> {
    let model = read_model(&folder.graph).map_err(NotCapturable::Unreadable)?.model;
    if model.metadata(metadata::LENGTHS) == Some(metadata::MASK_WIDTH) {
        return Err(NotCapturable::MaskWidth);
    }
    // There the width also tells how many rows the graph works on, which the conversion has seen to.
    if model.metadata(metadata::WINDOW_IN_GRAPH).is_some() {
        return Ok(());
    }
    let opset = model.onnx_opset();
    let Some(graph) = &model.graph else { return Ok(()) };
    let names = &folder.names;
    Ok(takes_wide_masks(
        &GraphView::new(graph, opset),
        &names.attention_mask,
        &names.input_ids,
    )?)
}
