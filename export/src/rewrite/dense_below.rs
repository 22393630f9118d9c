//! Up to which context a step does better to read everything, one token a step: the other tokens of the window go
//! through all linear layers, and the longer the context is, the more reading a part of it saves.

use super::{PackedProducts, Settings, second_row::products_of_every_row};
use crate::{logits::Logits, rules::Conversion};
use retro_contract::{Budget, Mode, metadata::ONE_TOKEN_DENSE_BELOW};
use retro_onnx::graph::GraphView;

/// The length is no more exact than this.
const MULTIPLE: usize = 128;

/// Up to how many tokens contexts are read whole; 0: none are.
pub fn dense_below(
    view: &GraphView,
    conversions: &[Conversion],
    products: &PackedProducts,
    logits: &Logits,
    settings: &Settings,
) -> usize {
    if let Some(asked) = settings.dense_below {
        return asked;
    }
    // Whoever sets the floor, or reads a fixed number of tokens, has said what short contexts read.
    let relative = matches!(settings.budget, Budget::Ratio(_)) && settings.min_pages.is_none();
    if settings.mode != Mode::Retro || !relative {
        return 0;
    }
    if settings.window == 1 {
        return ONE_TOKEN_DENSE_BELOW;
    }
    let cost: f64 = products_of_every_row(view, products, logits)
        .map(|product| product.pays() * product.weights)
        .sum();
    let attention: f64 = conversions
        .iter()
        .filter(|c| c.mode == Mode::Retro)
        .map(|c| query_elements(view, c))
        .sum();
    if attention <= 0.0 {
        return 0;
    }
    let tokens = (cost / attention).min(1e9) as usize;
    tokens.next_multiple_of(MULTIPLE).max(ONE_TOKEN_DENSE_BELOW)
}

/// Elements of a layer's query: what attention costs for each token of the context.
fn query_elements(view: &GraphView, conversion: &Conversion) -> f64 {
    let matched = conversion.matched;
    let head_size = matched
        .head_size
        .or_else(|| view.declared_from_end(&matched.past_key, 1));
    (matched.q_heads.max(0) * head_size.unwrap_or(0).max(0)) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        logits::KeepAll,
        rules::{SampleCalls, find_attention},
        testing::gqa_model,
    };
    use retro_onnx::{AttributeProto, DataType, GraphProto, NodeProto, TensorProto};

    /// The length for a model with more nodes and weights.
    fn length(settings: &Settings, add: impl Fn(&mut GraphProto)) -> usize {
        let mut model = gqa_model(1);
        add(model.graph.as_mut().unwrap());
        let view = GraphView::new(model.graph.as_ref().unwrap(), 21);
        let found = find_attention(&model, &SampleCalls::new(&view, None));
        let conversions = found.iter().map(|attention| Conversion {
            attention,
            matched: attention.found.as_ref().unwrap(),
            node: attention.node.unwrap(),
            mode: Mode::Retro,
        });
        let conversions: Vec<_> = conversions.collect();
        let products = PackedProducts {
            replaced: (view.graph.node.iter().enumerate())
                .filter(|(_, node)| node.name() == "ours")
                .map(|(index, _)| index)
                .collect(),
            ..Default::default()
        };
        dense_below(&view, &conversions, &products, &Logits::All(KeepAll::Asked), settings)
    }

    /// Adds `count` products with the weights of 1000 x 1000 floats.
    fn products(count: usize) -> impl Fn(&mut GraphProto) {
        move |graph| {
            graph.initializer.push(TensorProto {
                dims: vec![1000, 1000],
                data_type: Some(DataType::Float as i32),
                name: Some("w".into()),
                ..Default::default()
            });
            let node = |i: usize| NodeProto::new("", "MatMul", &format!("m{i}"), &["x", "w"], &[&format!("y{i}")]);
            graph.node.extend((0..count).map(node));
        }
    }

    fn quantised(level: i64) -> impl Fn(&mut GraphProto) {
        move |graph| {
            let node = NodeProto::new("com.microsoft", "MatMulNBits", "q", &["x", "b", "s"], &["z"]);
            let numbers = [("K", 1000), ("N", 1000), ("accuracy_level", level)];
            let node = numbers
                .into_iter()
                .fold(node, |n, (k, v)| n.with(AttributeProto::int(k, v)));
            graph.node.push(node);
        }
    }

    #[test]
    fn it_grows_with_the_weights_by_their_kind() {
        let settings = Settings::default();
        assert_eq!(length(&settings, |_| {}), ONE_TOKEN_DENSE_BELOW);
        let one = length(&settings, products(1));
        let four = length(&settings, products(4));
        let dequantised = length(&settings, quantised(1));
        assert!(one > ONE_TOKEN_DENSE_BELOW, "{one}");
        assert!(four.abs_diff(4 * one) <= 4 * MULTIPLE, "{one} {four}");
        assert!(dequantised.abs_diff(4 * one) <= 4 * MULTIPLE, "{one} {dequantised}");
        assert_eq!(length(&settings, quantised(0)), dequantised);
        let ours = length(&settings, |graph| {
            quantised(0)(graph);
            graph.node.last_mut().unwrap().name = Some("ours".to_owned());
        });
        assert!(ours.abs_diff(dequantised / 8) <= MULTIPLE, "{ours} {dequantised}");
        let bytes = length(&settings, quantised(4));
        assert!(bytes.abs_diff(dequantised / 10) <= MULTIPLE, "{bytes} {dequantised}");
    }

    #[test]
    fn what_is_asked_for_decides() {
        let of = |change: fn(&mut Settings)| {
            let mut settings = Settings::default();
            change(&mut settings);
            length(&settings, products(4))
        };
        assert!(of(|_| {}) > 0);
        assert_eq!(of(|s| s.dense_below = Some(77)), 77);
        assert_eq!(of(|s| s.dense_below = Some(0)), 0);
        assert_eq!(of(|s| s.window = 1), 1024);
        assert_eq!(of(|s| s.min_pages = Some(4)), 0);
        assert_eq!(of(|s| s.budget = Budget::Tokens(2048)), 0);
        assert_eq!(of(|s| s.mode = Mode::Streaming), 0);
    }
}
