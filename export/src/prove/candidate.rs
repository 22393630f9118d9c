//! An attention as a rule names it, before anything of it is proved.

use super::refusal::{AttributeRefusal, CacheRefusal, Refusal};
use retro_onnx::NodeProto;

/// Where an attention's scores come from.
#[derive(Clone, Copy)]
pub enum ScoreSource<'a> {
    /// Nodes of the graph.
    Decomposed {
        /// The product of queries and keys, `[B, Hq, S, T]`.
        product: &'a str,
        /// What the Softmax takes, `[B, Hq, S, T]`.
        masked: &'a str,
    },
    /// The inside of one node.
    Fused(&'a NodeProto),
}

/// Past and present of a node that appends to its cache itself: keys, then values.
#[derive(Clone, Copy)]
pub struct NodeCache<'a> {
    /// `[B, Hkv, past, D]`.
    pub past: [&'a str; 2],
    /// `[B, Hkv, past + S, D]`.
    pub present: [&'a str; 2],
}

impl<'a> NodeCache<'a> {
    /// The cache of a node with these input slots of past key and value, whose presents are its outputs 1 and 2; none for
    /// a node without a past.
    ///
    /// # Errors
    /// Some of the four are absent.
    pub fn read(node: &'a NodeProto, [key, value]: [usize; 2]) -> Result<Option<Self>, Refusal> {
        let past = [node.input(key), node.input(value)];
        let present = [node.output(1), node.output(2)];
        if past == ["", ""] {
            return Ok(None);
        }
        if past.iter().chain(&present).any(|name| name.is_empty()) {
            return Err(CacheRefusal::Incomplete.into());
        }
        Ok(Some(Self { past, present }))
    }
}

/// An attention as a rule names it. Names of values; "" is an absent one.
#[derive(Clone, Copy)]
pub struct AttentionCandidate<'a> {
    /// What the scores are computed from, in any layout: the queries as the product takes them.
    pub query: &'a str,
    /// The keys, likewise.
    pub key: &'a str,
    /// What the probabilities weigh.
    pub value: &'a str,
    /// What attention gives: the product of probabilities and values, or the node's first output.
    pub output: &'a str,
    /// Where the scores come from.
    pub scores: ScoreSource<'a>,
    /// Where the node appends to its cache; none where nodes before it do.
    pub cache: Option<NodeCache<'a>>,
    /// Biases that the node adds to queries, keys and values, in one: `[(Hq+2*Hkv)*D]`.
    pub bias: &'a str,
    /// Logits that stand beside the scores without a value.
    pub sink: Option<&'a str>,
}

/// Refuses a node with an attribute that this version does not support.
///
/// # Errors
/// Names the first such attribute.
pub fn only_supported_attributes(node: &NodeProto, supported: &[&str]) -> Result<(), Refusal> {
    match node.attribute.iter().find(|a| !supported.contains(&a.name())) {
        Some(other) => Err(AttributeRefusal::Unknown {
            name: other.name().to_owned(),
        }
        .into()),
        None => Ok(()),
    }
}
