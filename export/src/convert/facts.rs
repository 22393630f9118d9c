//! What a comparison of the converted model with its original needs to know of the original's graph.

use crate::{
    rewrite::reads_mask,
    rules::{Attention, AttentionMatch, Conversion, LengthSource, carried},
    verify::{CacheFacts, DYNAMIC, OtherInput, PaddingCheck, graph_facts, other_inputs, ulp},
};
use retro_onnx::{DataType, graph::GraphView};

/// Operators that read weights of few bits.
const QUANTIZED: [&str; 5] = ["MatMulNBits", "MatMulInteger", "DequantizeLinear", "QMoE", "MatMulBnb4"];
/// The number of token ids to draw from where the logits' shape doesn't tell the vocabulary.
const FEW_TOKENS: usize = 32;

/// What a comparison needs to know of a model.
pub struct Facts {
    pub caches: Vec<CacheFacts>,
    /// Inputs that may be fed anything.
    pub unused_inputs: Vec<String>,
    pub other_inputs: Vec<OtherInput>,
    /// What comes out of attention, where a graph quantises activations.
    pub perturbed: Vec<(String, DataType)>,
    pub vocabulary: usize,
    pub padding: PaddingCheck,
    /// Of some attention the source told lengths by the shape of its cache.
    pub lengths_from_mask: bool,
    /// All attention is converted and there is no other state, so that tokens may be fed again.
    pub takes_tokens_again: bool,
    pub quantized: bool,
    /// Activations are quantised by ranges over all tokens fed together.
    pub dynamic_quantization: bool,
    /// Attention is float32 throughout.
    pub single_precision: bool,
}

impl Facts {
    pub fn new(view: &GraphView, found: &[Attention], conversions: &[Conversion]) -> Self {
        let matches: Vec<&AttentionMatch> = found.iter().filter_map(|a| a.found.as_deref().ok()).collect();
        let uses = |ops: &[&str]| view.graph.node.iter().any(|n| ops.contains(&n.op_type()));
        let all_converted = conversions.len() == found.len();
        let mut caches: Vec<CacheFacts> = matches.iter().flat_map(|matched| caches(view, matched)).collect();
        let grows = found.iter().any(|a| a.found.is_err() && !a.takes_tokens_again);
        caches.extend(graph_facts::other_caches(view, &caches, grows));
        let unused_inputs = graph_facts::handed_on(view);
        let taken = caches.iter().map(|c| &c.past).chain(&unused_inputs).map(String::as_str);
        let other_inputs = other_inputs(view, found, &taken.collect::<Vec<_>>());
        let carries = carried(view, found).is_some();
        // Padding is no matter of the mask alone.
        let padding_enters = carries || other_inputs.iter().any(OtherInput::counts_tokens);
        let perturbed = if ulp::quantizes_activations(view) {
            matches
                .iter()
                .map(|matched| (matched.output.clone(), matched.typed(matched.output_type)))
                .collect()
        } else {
            Vec::new()
        };
        Self {
            padding: padding(view, &matches, all_converted && !padding_enters),
            lengths_from_mask: matches.iter().any(|m| m.length_source != LengthSource::FromGraph),
            other_inputs,
            caches,
            unused_inputs,
            perturbed,
            vocabulary: view
                .declared_from_end("logits", 1)
                .and_then(|v| usize::try_from(v).ok())
                .unwrap_or(FEW_TOKENS),
            takes_tokens_again: all_converted && !carries && graph_facts::tokens_at_once(view).is_none(),
            quantized: uses(&QUANTIZED),
            dynamic_quantization: uses(&DYNAMIC),
            single_precision: matches.iter().all(|matched| is_single_precision(matched)),
        }
    }
}

/// An attention's key and value cache.
fn caches(view: &GraphView, matched: &AttentionMatch) -> [CacheFacts; 2] {
    let cache = |past: &str, present: &str| {
        let declared = |axis: usize| view.declared_from_end(past, axis).and_then(|d| usize::try_from(d).ok());
        CacheFacts {
            past: past.to_owned(),
            present: present.to_owned(),
            heads: usize::try_from(matched.kv_heads).unwrap_or(1),
            head_size: matched
                .head_size
                .and_then(|d| usize::try_from(d).ok())
                .or_else(|| declared(1))
                .or_else(|| graph_facts::head_size(view, matched))
                .unwrap_or(1),
            sliding: matched.sliding_cache,
            grows: false,
        }
    };
    [
        cache(&matched.past_key, &matched.present_key),
        cache(&matched.past_value, &matched.present_value),
    ]
}

/// `mask_alone`: all attention is converted, and padding enters it by the mask alone.
fn padding(view: &GraphView, matches: &[&AttentionMatch], mask_alone: bool) -> PaddingCheck {
    // Lengths that the mask's ones are counted for, not ones that a caller gives.
    let counted = |matched: &AttentionMatch| {
        matched.length_source == LengthSource::FromGraph && reads_mask(view, &matched.seqlens_k)
    };
    if matches
        .iter()
        .all(|matched| matched.length_source == LengthSource::FromMask { padding: true })
    {
        PaddingCheck::Both
    } else if mask_alone && matches.iter().all(|matched| counted(matched)) {
        PaddingCheck::Alone
    } else {
        PaddingCheck::None
    }
}

fn is_single_precision(matched: &AttentionMatch) -> bool {
    let inside = [matched.query_type, matched.kv_type, matched.output_type];
    let single = |t: &DataType| matches!(t, DataType::Float | DataType::Undefined);
    matched.data_type == DataType::Float && inside.iter().all(single)
}
