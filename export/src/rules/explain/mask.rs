//! Masks that depend on what no caller is known to give.

use super::trace::Origin;
use crate::{
    prove::{ATTENTION_MASK, INPUT_IDS, INPUTS_EMBEDS, MaskRefusal, POSITION_IDS, SampleCalls},
    rules::shown::shown,
};
use retro_onnx::graph::GraphView;

/// A mask, or anything else of the size of scores, that the caller computes.
pub fn made_by_caller(view: &GraphView, origin: &Origin) -> Option<MaskRefusal> {
    let rank = view.declared_dims(origin.input)?.len();
    if rank < 3 || [INPUT_IDS, INPUTS_EMBEDS, POSITION_IDS].contains(&origin.input) {
        return None;
    }
    Some(MaskRefusal::MadeByCaller {
        input: shown(view, origin.input),
        data_type: view.data_type(origin.input),
        rank,
    })
}

/// An input that a mask depends on and no caller is known to give.
pub fn other_input(samples: &SampleCalls, origin: &Origin) -> Option<MaskRefusal> {
    let known = [INPUT_IDS, INPUTS_EMBEDS, POSITION_IDS, ATTENTION_MASK];
    if known.contains(&origin.input) || samples.is_cache(origin.input) {
        return None;
    }
    Some(MaskRefusal::OtherInput {
        input: shown(samples.view, origin.input),
    })
}
