//! com.microsoft::MultiHeadAttention: with the cache as its own inputs or put together before it, repeated heads, a bias on
//! queries, keys and values, a mask as padding, as scores, or causal.

use super::{
    Rule, Verdict,
    core::{Core, InnerCache, Scores, only_known_attributes, site},
    probe::Probes,
};
use crate::{graph::GraphView, onnx::NodeProto};

/// The rule.
pub struct MultiHeadAttention;

mod slot {
    pub const BIAS: usize = 3;
    pub const PAST_KEY: usize = 6;
    pub const PAST_VALUE: usize = 7;
    /// Later ones (cache_indirection, past_sequence_length) are of beam search and shared buffers.
    pub const COUNT: usize = 8;
}

const KNOWN: [&str; 4] = ["num_heads", "mask_filter_value", "scale", "unidirectional"];

impl Rule for MultiHeadAttention {
    fn name(&self) -> &'static str {
        "mha"
    }

    fn look<'a>(&self, _: &GraphView<'a>, probes: &Probes<'a>, node: &'a NodeProto) -> Verdict {
        if !node.is("com.microsoft", "MultiHeadAttention") {
            return Verdict::NotMine;
        }
        match core(node).and_then(|core| site(probes, core)) {
            Ok(site) => Verdict::Site(Box::new(site)),
            Err(why) => Verdict::Refused(why),
        }
    }
}

fn core(node: &NodeProto) -> Result<Core<'_>, String> {
    if node.input(1).is_empty() || node.input(2).is_empty() {
        return Err("its queries, keys and values come packed in one input, which is not understood".to_owned());
    }
    if let Some(extra) = node.input.iter().skip(slot::COUNT).find(|i| !i.is_empty()) {
        return Err(format!("it takes {extra}, which is for beam search or shared buffers"));
    }
    if let Some(extra) = node.output.iter().skip(3).find(|o| !o.is_empty()) {
        return Err(format!(
            "it returns its scores ({extra}), which page selection doesn't compute"
        ));
    }
    only_known_attributes(node, &KNOWN)?;
    let cache = InnerCache::read(node, [slot::PAST_KEY, slot::PAST_VALUE])?;
    Ok(Core {
        query: node.input(0),
        key: node.input(1),
        value: node.input(2),
        output: node.output(0),
        scores: Scores::Fused(node),
        cache,
        bias: node.input(slot::BIAS),
        sink: None,
    })
}
