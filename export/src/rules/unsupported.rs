//! Attention that no rule converts, so that a report can name it.

use super::shown::shown;
use crate::prove::OperatorRefusal;
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
pub fn attention(view: &GraphView, node: &NodeProto) -> Option<OperatorRefusal> {
    if FUSED.iter().any(|(domain, op_type)| node.is(domain, op_type)) {
        return Some(fused(view, node));
    }
    (node.is("", "Softmax") && weighs_values(view, node)).then_some(OperatorRefusal::Decomposed)
}

/// Why an operator for attention stays as it is.
fn fused(view: &GraphView, node: &NodeProto) -> OperatorRefusal {
    let merged = node.input(4);
    if node.is("com.microsoft", "Attention") && !merged.is_empty() {
        return OperatorRefusal::MergedCache {
            cache: shown(view, merged),
        };
    }
    let about = match node.op_type() {
        "Attention" if node.is("com.microsoft", "Attention") => {
            "; it projects queries, keys and values itself and keeps no cache, as encoders do"
        }
        "DecoderAttention" | "DecoderMaskedMultiHeadAttention" | "DecoderMaskedSelfAttention" => {
            ": it is for beam search, with caches of its own kind"
        }
        "PagedAttention" | "SparsePagedAttention" => {
            ": its cache is paged, blocks of a pool that all sequences share, not [B, H, T, D]"
        }
        "SparseAttention" | "DynamicSparseAttention" => ": it is sparse already, in a way of its own",
        "LongformerAttention" | "PackedAttention" | "PackedMultiHeadAttention" => {
            ": it is an encoder's, which keeps no cache"
        }
        _ => "",
    };
    let domain = match node.op_domain() {
        "" => "ai.onnx",
        domain => domain,
    };
    OperatorRefusal::Unsupported {
        domain: domain.to_owned(),
        op_type: node.op_type().to_owned(),
        about,
    }
}

/// Whether a Softmax's output, perhaps cast or guarded on the way, is multiplied with something that depends on the input.
pub fn weighs_values(view: &GraphView, softmax: &NodeProto) -> bool {
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
        attention(&GraphView::new(&graph, 21), &graph.node[0]).map(|why| why.to_string())
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
                .contains("decomposed attention")
        );
        assert_eq!(
            reason(vec![softmax.clone(), cast, weights]),
            None,
            "a router or a classifier"
        );
        assert_eq!(reason(vec![softmax]), None);
    }
}
