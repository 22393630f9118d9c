//! What a second row of activations costs in a model's products, by their kind.

use super::{PackedProducts, packed_products::Target};
use crate::logits::Logits;
use retro_contract::matmul_nbits::{self, attribute, input};
use retro_onnx::{DataType, NodeProto, graph::GraphView};

/// MatMulNBits' attribute accuracy_level of products in 8 bits.
const PRODUCTS_OF_BYTES: i64 = 4;

/// How a product takes several rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// MatMul and Gemm.
    Float,
    /// MatMulNBits that multiplies floats: all weights are dequantised first, if there are several rows.
    Dequantised,
    /// MatMulNBits that multiplies 8-bit integers on the CPU.
    Bytes,
    /// The operator's own MatMulNBits, which decodes weights once for all rows.
    Decoded,
}

/// A product of constant weights that computes a row for every token fed.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    /// Elements of its weights.
    pub weights: f64,
    kind: Kind,
    /// Activations are in float16 or bfloat16.
    half: bool,
}

impl Product {
    /// Tokens of context that pay for a second token in a step, where there is one weight for each element of a query
    /// (query heads times head size, over all layers): as measured on two CPU cores (docs/performance.md).
    pub fn pays(&self) -> f64 {
        match self.kind {
            Kind::Float => 0.3,
            Kind::Dequantised => 1.2,
            Kind::Bytes => 0.12,
            Kind::Decoded => 0.15,
        }
    }

    /// Whether a second row costs far more than a few percent of the first. On CUDA ONNX Runtime has a kernel for one row
    /// and does not look at the accuracy level; where nothing says what a model is for, those in 16 bits are for CUDA.
    fn is_costly(&self, target: Option<Target>) -> bool {
        match self.kind {
            Kind::Dequantised => true,
            Kind::Bytes => target.map_or(self.half, |target| target == Target::Cuda),
            Kind::Float | Kind::Decoded => false,
        }
    }
}

/// The products of a graph, but for an lm_head that computes the newest token's row alone.
pub fn products_of_every_row(
    view: &GraphView,
    packed: &PackedProducts,
    logits: &Logits,
) -> impl Iterator<Item = Product> {
    let lm_head = match logits {
        Logits::Newest { products, .. } => products.as_slice(),
        _ => &[],
    };
    let nodes = view.graph.node.iter().enumerate();
    nodes
        .filter(|(_, node)| !node.output.iter().any(|name| lm_head.contains(name)))
        .filter_map(|(index, node)| product(view, node, packed.replaced.contains(&index)))
}

/// `replaced`: it becomes the operator's.
fn product(view: &GraphView, node: &NodeProto, replaced: bool) -> Option<Product> {
    let elements = |dims: &[i64]| dims.iter().map(|&d| d.max(0) as f64).product::<f64>();
    if node.is("", "MatMul") || node.is("", "Gemm") {
        let dims = view.tensor_dims(node.input(1)).filter(|dims| dims.len() == 2)?;
        return Some(Product {
            weights: elements(dims),
            kind: Kind::Float,
            half: false,
        });
    }
    if !matmul_nbits::is(node.op_domain(), node.op_type()) {
        return None;
    }
    let number = |name: &str| node.attribute(name).map_or(0, |a| a.i.unwrap_or(0));
    let kind = match number(attribute::ACCURACY_LEVEL) {
        _ if replaced => Kind::Decoded,
        PRODUCTS_OF_BYTES => Kind::Bytes,
        _ => Kind::Dequantised,
    };
    // The activations have the scales' type.
    let scales = view.initializer(node.input(input::SCALES));
    let half = [DataType::Float16, DataType::Bfloat16].map(|t| t as i32);
    Some(Product {
        weights: elements(&[number(attribute::K), number(attribute::N)]),
        kind,
        half: scales.is_some_and(|tensor| half.contains(&tensor.data_type())),
    })
}

/// The share of the weights that are in products with a costly second row, 0 to 1. `target`: what the model is for.
pub fn costly_share(view: &GraphView, packed: &PackedProducts, logits: &Logits, target: Option<Target>) -> f64 {
    let (mut costly, mut all) = (0.0, 0.0);
    for product in products_of_every_row(view, packed, logits) {
        all += product.weights;
        if product.is_costly(target) {
            costly += product.weights;
        }
    }
    if all > 0.0 { costly / all } else { 0.0 }
}
