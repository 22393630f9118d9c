//! ai.onnx::Attention (opset 23 and 24): with the cache as its own inputs or put together before it.

use super::{
    Rule, Verdict,
    core::{Core, InnerCache, Scores, only_known_attributes, site},
    probe::Probes,
};
use crate::{graph::GraphView, onnx::NodeProto};

/// The rule.
pub struct OnnxAttention;

const KNOWN: [&str; 7] = [
    "is_causal",
    "kv_num_heads",
    "q_num_heads",
    "scale",
    "softcap",
    "softmax_precision",
    "qk_matmul_output_mode",
];

impl Rule for OnnxAttention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn look<'a>(&self, _: &GraphView<'a>, probes: &Probes<'a>, node: &'a NodeProto) -> Verdict {
        if !node.is("", "Attention") {
            return Verdict::NotMine;
        }
        match core(node).and_then(|core| site(probes, core)) {
            Ok(site) => Verdict::Site(Box::new(site)),
            Err(why) => Verdict::Refused(why),
        }
    }
}

fn core(node: &NodeProto) -> Result<Core<'_>, String> {
    if !node.input(6).is_empty() {
        return Err(format!(
            "it takes nonpad_kv_seqlen ({}), for a cache of another kind",
            node.input(6)
        ));
    }
    if !node.output(3).is_empty() {
        return Err(format!(
            "it returns its scores ({}), which page selection doesn't compute",
            node.output(3)
        ));
    }
    only_known_attributes(node, &KNOWN)?;
    let cache = InnerCache::read(node, [4, 5])?;
    Ok(Core {
        query: node.input(0),
        key: node.input(1),
        value: node.input(2),
        output: node.output(0),
        scores: Scores::Fused(node),
        cache,
        bias: "",
        sink: None,
    })
}
