//! Attention that no rule converts, so that a report can name it.

use super::explain::shown;
use retro_onnx::{NodeProto, graph::GraphView};
use std::collections::HashSet;

const FUSED: [(&str, &str); 13] = [
    ("", "Attention"),
    ("com.microsoft", "Attention"),
    ("com.microsoft", "DecoderAttention"),
    ("com.microsoft", "DecoderMaskedMultiHeadAttention"),
    ("com.microsoft", "DecoderMaskedSelfAttention"),
    ("com.microsoft", "DynamicSparseAttention"),
    ("com.microsoft", "LongformerAttention"),
    ("com.microsoft", "MultiHeadAttention"),
    ("com.microsoft", "PackedAttention"),
    ("com.microsoft", "PackedMultiHeadAttention"),
    ("com.microsoft", "PagedAttention"),
    ("com.microsoft", "SparseAttention"),
    ("com.microsoft", "SparsePagedAttention"),
];

/// Why a node is an attention that stays as it is; none if it isn't an attention.
pub(super) fn attention(view: &GraphView, node: &NodeProto) -> Option<String> {
    if FUSED.iter().any(|(domain, op_type)| node.is(domain, op_type)) {
        let domain = if node.op_domain().is_empty() {
            "ai.onnx"
        } else {
            node.op_domain()
        };
        let more = match node.op_type() {
            "Attention" if node.is("com.microsoft", "Attention") => match node.input(4) {
                "" => "; it projects queries, keys and values itself and keeps no cache, as encoders do".to_owned(),
                past => format!(
                    ": keys and values are merged in one cache, {}; export it without this fusion, or with GroupQueryAttention",
                    shown(view, past)
                ),
            },
            "DecoderAttention" | "DecoderMaskedMultiHeadAttention" | "DecoderMaskedSelfAttention" => {
                ": it is for beam search, with caches of its own kind".to_owned()
            }
            "PagedAttention" | "SparsePagedAttention" => {
                ": its cache is paged, blocks of a pool that all sequences share, not [B, H, T, D]".to_owned()
            }
            "SparseAttention" | "DynamicSparseAttention" => ": it is sparse already, in a way of its own".to_owned(),
            "LongformerAttention" | "PackedAttention" | "PackedMultiHeadAttention" => {
                ": it is an encoder's, which keeps no cache".to_owned()
            }
            _ => String::new(),
        };
        return Some(format!(
            "{domain}::{} is not supported by this version{more}",
            node.op_type()
        ));
    }
    (node.is("", "Softmax") && weighs_values(view, node))
        .then(|| "attention spelled out as MatMul, Softmax, MatMul".to_owned())
}

/// Whether a Softmax's output, perhaps cast or guarded on the way, is multiplied with something that depends on the input.
pub(super) fn weighs_values(view: &GraphView, softmax: &NodeProto) -> bool {
    let mut open = vec![softmax.output(0)];
    let mut seen = HashSet::new();
    for _ in 0..32 {
        let Some(name) = open.pop() else { return false };
        if !seen.insert(name) {
            continue;
        }
        for reader in view.readers(name) {
            let mixed = || {
                reader
                    .input
                    .iter()
                    .any(|i| i != name && !i.is_empty() && !view.is_constant(i))
            };
            match reader.op_type() {
                "MatMul" | "FusedMatMul" | "Einsum" if mixed() => return true,
                "Cast" | "Dropout" | "Where" | "Identity" | "Mul" | "Reshape" | "Slice" | "Transpose" | "Unsqueeze"
                | "Squeeze" => open.push(reader.output(0)),
                _ => {}
            }
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use retro_onnx::{GraphProto, TensorProto};

    fn reason(nodes: Vec<NodeProto>) -> Option<String> {
        let graph = GraphProto {
            node: nodes,
            initializer: vec![TensorProto::floats("w", &[2, 2], &[0.; 4])],
            ..Default::default()
        };
        attention(&GraphView::new(&graph, 21), &graph.node[0])
    }

    #[test]
    fn fused_attention_is_named() {
        let why = reason(vec![NodeProto::new(
            "com.microsoft",
            "MultiHeadAttention",
            "a",
            &["q"],
            &["y"],
        )]);
        assert_eq!(
            why.unwrap(),
            "com.microsoft::MultiHeadAttention is not supported by this version"
        );
        let why = reason(vec![NodeProto::new("ai.onnx", "Attention", "a", &["q"], &["y"])]);
        assert_eq!(why.unwrap(), "ai.onnx::Attention is not supported by this version");
        assert_eq!(
            reason(vec![NodeProto::new("other", "Attention", "a", &["q"], &["y"])]),
            None
        );
    }

    #[test]
    fn a_softmax_is_attention_when_it_weighs_values() {
        let softmax = NodeProto::new("", "Softmax", "s", &["x"], &["p"]);
        let cast = NodeProto::new("", "Cast", "c", &["p"], &["pc"]);
        let values = NodeProto::new("", "MatMul", "m", &["pc", "v"], &["y"]);
        let weights = NodeProto::new("", "MatMul", "m", &["pc", "w"], &["y"]);
        assert!(
            reason(vec![softmax.clone(), cast.clone(), values])
                .unwrap()
                .contains("spelled out")
        );
        assert_eq!(
            reason(vec![softmax.clone(), cast, weights]),
            None,
            "a router or a classifier"
        );
        assert_eq!(reason(vec![softmax]), None);
    }
}
