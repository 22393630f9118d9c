//! The one table of operators.

use super::{OpCall, Outputs, attention, creation, elementwise, indexing, matmul, quant, reduce, shape};
use crate::eval::{Error, Tensor};
use elementwise::truth;
use retro_onnx::{DataType, NodeProto};
use std::{collections::HashMap, sync::LazyLock};

/// ONNX's own operators. ONNX Runtime has some of its own in this domain too (SimplifiedLayerNormalization).
const ONNX: &str = "";
/// [ONNX Runtime's contributed operators](https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md).
const MICROSOFT: &str = "com.microsoft";
/// What [TensorRT's parser](https://github.com/onnx/onnx-tensorrt) reads and NVIDIA's Model Optimizer writes.
const TENSORRT: &str = "trt";
/// [AMD's Quark](https://quark.docs.amd.com), and the domain that it had before, with other names for the same operators.
const QUARK: &str = "com.amd.quark";
const VITIS: &str = "com.vai.quantize";

/// How an operator's outputs are computed.
#[derive(Clone, Copy)]
enum Kernel {
    /// The first output, from the whole call.
    One(fn(&OpCall) -> Result<Tensor, Error>),
    /// All outputs, from the whole call.
    All(fn(&OpCall) -> Result<Outputs, Error>),
    /// A number from each number.
    Unary(fn(f64) -> f64),
    /// A truth value from each number.
    Test(fn(f64) -> bool),
    /// A number from the numbers at the same place of all inputs, broadcast.
    Binary(fn(f64, f64) -> f64),
    /// A truth value from the same.
    Compare(fn(f64, f64) -> bool),
    /// The first output has the first input's shape and type. Its numbers are not computed.
    SameShape,
}

/// An operator's entry.
#[derive(Clone, Copy)]
pub(super) struct Operator {
    domain: &'static str,
    op_type: &'static str,
    kernel: Kernel,
    /// It computes numbers when they are asked for, where there are many; others get theirs stored.
    on_demand: bool,
    /// It makes other numbers than it reads, which its type may round.
    calculates: bool,
    /// Large constants that it reads are weights.
    weights: bool,
}

impl Operator {
    const fn new(op_type: &'static str, kernel: Kernel) -> Self {
        Self {
            domain: ONNX,
            op_type,
            kernel,
            on_demand: false,
            calculates: false,
            weights: false,
        }
    }

    const fn of(self, domain: &'static str) -> Self {
        Self { domain, ..self }
    }

    const fn on_demand(self) -> Self {
        Self {
            on_demand: true,
            ..self
        }
    }

    /// On demand, and other numbers than it reads.
    const fn calculating(self) -> Self {
        Self {
            on_demand: true,
            calculates: true,
            ..self
        }
    }

    const fn weights(self) -> Self {
        Self { weights: true, ..self }
    }

    pub fn is_on_demand(&self) -> bool {
        self.on_demand
    }

    pub fn calculates(&self) -> bool {
        self.calculates
    }

    pub fn reads_weights(&self) -> bool {
        self.weights
    }

    pub fn compute(&self, call: &OpCall) -> Result<Outputs, Error> {
        let bool = Some(DataType::Bool);
        let one = match self.kernel {
            Kernel::All(f) => return f(call),
            Kernel::One(f) => f(call)?,
            Kernel::Unary(f) => {
                let t = call.need(0)?;
                elementwise::map(t, t.data_type, f)?
            }
            Kernel::Test(f) => elementwise::map(call.need(0)?, DataType::Bool, move |x| truth(f(x)))?,
            Kernel::Binary(f) => elementwise::fold(call, None, f)?,
            Kernel::Compare(f) => elementwise::fold(call, bool, move |a, b| truth(f(a, b)))?,
            Kernel::SameShape => {
                let first = call.need(0)?;
                Tensor::unknown(first.shape.clone(), first.data_type)
            }
        };
        Ok(vec![Some(one)])
    }
}

const fn one(op_type: &'static str, f: fn(&OpCall) -> Result<Tensor, Error>) -> Operator {
    Operator::new(op_type, Kernel::One(f))
}

const fn all(op_type: &'static str, f: fn(&OpCall) -> Result<Outputs, Error>) -> Operator {
    Operator::new(op_type, Kernel::All(f))
}

const fn unary(op_type: &'static str, f: fn(f64) -> f64) -> Operator {
    Operator::new(op_type, Kernel::Unary(f)).calculating()
}

const fn test(op_type: &'static str, f: fn(f64) -> bool) -> Operator {
    Operator::new(op_type, Kernel::Test(f)).calculating()
}

const fn binary(op_type: &'static str, f: fn(f64, f64) -> f64) -> Operator {
    Operator::new(op_type, Kernel::Binary(f)).calculating()
}

const fn compare(op_type: &'static str, f: fn(f64, f64) -> bool) -> Operator {
    Operator::new(op_type, Kernel::Compare(f)).calculating()
}

const OPERATORS: &[Operator] = &[
    // Made from nothing.
    one("Constant", creation::constant),
    one("ConstantOfShape", creation::constant_of_shape).on_demand(),
    one("EyeLike", creation::eye_like).on_demand(),
    one("Range", creation::range),
    // Shapes and elements that move.
    one("Identity", shape::identity).on_demand(),
    one("Dropout", shape::identity).on_demand(),
    one("Shape", shape::shape).on_demand(),
    one("Size", shape::element_count).on_demand(),
    one("Reshape", shape::reshape).on_demand(),
    one("Flatten", shape::flatten).on_demand(),
    one("Unsqueeze", shape::unsqueeze).on_demand(),
    one("Squeeze", shape::squeeze).on_demand(),
    one("Transpose", shape::transpose).on_demand(),
    one("Expand", shape::expand).on_demand(),
    one("Tile", shape::tile).on_demand(),
    one("Concat", shape::concat).on_demand(),
    all("Split", shape::split).on_demand(),
    one("Pad", shape::pad).on_demand(),
    // Elements that indices choose.
    one("Slice", indexing::slice).on_demand(),
    one("Gather", indexing::gather).on_demand().weights(),
    one("GatherND", indexing::gather_nd).on_demand(),
    one("GatherElements", indexing::gather_elements),
    one("ScatterND", indexing::scatter_nd).on_demand(),
    one("NonZero", indexing::non_zero),
    // Each number by itself.
    one("Cast", elementwise::cast).calculating(),
    one("CastLike", elementwise::cast_like).calculating(),
    one("Clip", elementwise::clip).calculating(),
    unary("Neg", |x| -x),
    unary("Abs", f64::abs),
    unary("Sqrt", f64::sqrt),
    unary("Exp", f64::exp),
    unary("Log", f64::ln),
    unary("Cos", f64::cos),
    unary("Sin", f64::sin),
    unary("Tanh", f64::tanh),
    unary("Reciprocal", f64::recip),
    unary("Floor", f64::floor),
    unary("Ceil", f64::ceil),
    unary("Round", f64::round_ties_even),
    unary("Sigmoid", |x| 1.0 / (1.0 + (-x).exp())),
    unary("Sign", |x| if x == 0.0 { 0.0 } else { x.signum() }),
    unary("Relu", |x| x.max(0.0)),
    test("IsNaN", f64::is_nan),
    test("IsInf", f64::is_infinite),
    test("Not", |x| x == 0.0),
    // Numbers at the same place.
    binary("Add", |a, b| a + b),
    binary("Sum", |a, b| a + b),
    binary("Sub", |a, b| a - b),
    binary("Mul", |a, b| a * b),
    one("Div", elementwise::div).calculating(),
    one("Mod", elementwise::modulo).calculating(),
    binary("Pow", f64::powf),
    binary("Max", f64::max),
    binary("Min", f64::min),
    one("BitShift", elementwise::bit_shift).calculating(),
    binary("BitwiseAnd", |a, b| (a as i64 & b as i64) as f64),
    binary("BitwiseOr", |a, b| (a as i64 | b as i64) as f64),
    binary("BitwiseXor", |a, b| (a as i64 ^ b as i64) as f64),
    compare("And", |a, b| a != 0.0 && b != 0.0),
    compare("Or", |a, b| a != 0.0 || b != 0.0),
    compare("Xor", |a, b| (a != 0.0) != (b != 0.0)),
    compare("Equal", |a, b| a == b),
    compare("Less", |a, b| a < b),
    compare("LessOrEqual", |a, b| a <= b),
    compare("Greater", |a, b| a > b),
    compare("GreaterOrEqual", |a, b| a >= b),
    one("PRelu", elementwise::broadcast_shape).calculating(),
    one("Mean", elementwise::broadcast_shape).calculating(),
    one("Where", elementwise::select).on_demand(),
    one("Trilu", elementwise::trilu).on_demand(),
    // Along axes.
    one("ReduceSum", reduce::sum),
    one("ReduceMean", reduce::mean),
    one("ReduceMax", reduce::max).on_demand(),
    one("ReduceMin", reduce::min).on_demand(),
    one("ReduceProd", reduce::product),
    one("ReduceSumSquare", reduce::shape_only),
    one("ReduceL1", reduce::shape_only),
    one("ReduceL2", reduce::shape_only),
    one("ReduceLogSum", reduce::shape_only),
    one("ReduceLogSumExp", reduce::shape_only),
    one("ArgMax", reduce::arg_max),
    one("ArgMin", reduce::arg_min),
    one("CumSum", reduce::cumsum),
    one("Softmax", reduce::softmax),
    all("TopK", reduce::top_k),
    // Products.
    one("MatMul", matmul::matmul).weights(),
    one("MatMulInteger", matmul::matmul).weights(),
    one("FusedMatMul", matmul::fused_matmul).of(MICROSOFT),
    one("Gemm", matmul::gemm).weights(),
    one("Einsum", matmul::einsum),
    one("Conv", matmul::conv).weights(),
    // Quantised.
    one("MatMulNBits", quant::matmul_packed).of(MICROSOFT).weights(),
    one("MatMulNBits", quant::matmul_packed)
        .of(retro_contract::DOMAIN)
        .weights(),
    one("MatMulBnb4", quant::matmul_packed).of(MICROSOFT),
    one("MatMulFpQ4", quant::matmul_packed).of(MICROSOFT),
    one("MatMulIntegerToFloat", quant::matmul_to_float).of(MICROSOFT),
    one("DynamicQuantizeMatMul", quant::matmul_to_float).of(MICROSOFT),
    one("QLinearMatMul", quant::qlinear_matmul),
    one("GatherBlockQuantized", quant::gather_block_quantized)
        .of(MICROSOFT)
        .weights(),
    one("DequantizeLinear", quant::dequantize).weights(),
    one("DequantizeLinear", quant::dequantize).of(MICROSOFT).weights(),
    one("QuantizeLinear", quant::quantize),
    one("QuantizeLinear", quant::quantize).of(MICROSOFT),
    all("DynamicQuantizeLinear", quant::dynamic_quantize),
    one("TRT_FP8DequantizeLinear", quant::dequantize).of(TENSORRT).weights(),
    one("TRT_INT4DequantizeLinear", quant::dequantize)
        .of(TENSORRT)
        .weights(),
    one("ExtendedDequantizeLinear", quant::dequantize).of(QUARK).weights(),
    one("VitisDequantizeLinear", quant::dequantize).of(VITIS).weights(),
    one("TRT_FP8QuantizeLinear", quant::quantize).of(TENSORRT),
    one("TRT_INT4QuantizeLinear", quant::quantize).of(TENSORRT),
    one("ExtendedQuantizeLinear", quant::quantize).of(QUARK),
    one("VitisQuantizeLinear", quant::quantize).of(VITIS),
    // Whole attentions and what stands around them.
    all("Attention", attention::fused).on_demand(),
    all("MultiHeadAttention", attention::fused).of(MICROSOFT).on_demand(),
    all("GroupQueryAttention", attention::grouped).of(MICROSOFT),
    one("Attention", attention::packed).of(MICROSOFT),
    all("SkipLayerNormalization", attention::skip_norm).of(MICROSOFT),
    all("SkipSimplifiedLayerNormalization", attention::skip_norm).of(MICROSOFT),
];

/// Operators whose first output has the first input's shape and type, by domain. A wrong entry would let shapes through that are not
/// so, up to where they no longer fit: only what its definition says belongs here.
const SHAPE_PRESERVING: &[(&str, &[&str])] = &[
    (
        ONNX,
        &[
            // Norms.
            "BatchNormalization",
            "GroupNormalization",
            "InstanceNormalization",
            "LRN",
            "LayerNormalization",
            "LpNormalization",
            "MeanVarianceNormalization",
            "RMSNormalization",
            "SimplifiedLayerNormalization",
            // Activations.
            "Celu",
            "Elu",
            "Gelu",
            "HardSigmoid",
            "HardSwish",
            "Hardmax",
            "LeakyRelu",
            "LogSoftmax",
            "Mish",
            "Selu",
            "Shrink",
            "Softplus",
            "Softsign",
            "Swish",
            "ThresholdedRelu",
            // Functions of each number that no proof has needed.
            "Acos",
            "Acosh",
            "Asin",
            "Asinh",
            "Atan",
            "Atanh",
            "BitwiseNot",
            "Cosh",
            "Erf",
            "Sinh",
            "Tan",
            // Positions, and elements written into a tensor.
            "ReverseSequence",
            "RotaryEmbedding",
            "Scatter",
            "ScatterElements",
            "TensorScatter",
            // Noise.
            "Bernoulli",
            "RandomNormalLike",
            "RandomUniformLike",
        ],
    ),
    (
        MICROSOFT,
        &[
            "BiasAdd",
            "BiasDropout",
            "BiasGelu",
            "BiasSoftmax",
            "BitmaskBiasDropout",
            "BitmaskDropout",
            "CausalConvWithState",
            "FastGelu",
            "Gelu",
            "GroupNorm",
            "MoE",
            "QLinearLeakyRelu",
            "QLinearSigmoid",
            "QLinearSoftmax",
            "QMoE",
            "QuickGelu",
            "RotaryEmbedding",
            "SkipGroupNorm",
        ],
    ),
    // Numbers that are quantised and dequantised at once.
    (QUARK, &["BFPQuantizeDequantize", "MXQuantizeDequantize"]),
    (VITIS, &["FixNeuron"]),
    // [QONNX](https://github.com/fastmachinelearning/qonnx), which Brevitas exports; its domain was Brevitas' own at first.
    ("onnx.brevitas", &["BipolarQuant", "Quant", "Trunc"]),
    ("qonnx.custom_op.general", &["BipolarQuant", "Quant", "Trunc"]),
    // A converted layer.
    (retro_contract::DOMAIN, &[retro_contract::OP_TYPE]),
];

/// By name; few names are in two domains.
static INDEX: LazyLock<HashMap<&str, Vec<Operator>>> = LazyLock::new(|| {
    let preserving = SHAPE_PRESERVING.iter().flat_map(|(domain, names)| {
        let same = |name: &&'static str| Operator::new(name, Kernel::SameShape).of(domain).on_demand();
        names.iter().map(same)
    });
    let entries = OPERATORS.iter().copied().chain(preserving);
    let mut index: HashMap<&str, Vec<Operator>> = HashMap::new();
    entries.for_each(|o| index.entry(o.op_type).or_default().push(o));
    index
});

/// A node's operator, if it is known.
pub(super) fn find(node: &NodeProto) -> Option<&'static Operator> {
    let named = INDEX.get(node.op_type())?;
    named.iter().find(|o| o.domain == node.op_domain())
}

/// All of them.
#[cfg(test)]
pub(super) fn names() -> impl Iterator<Item = (&'static str, &'static str)> {
    INDEX.values().flatten().map(|o| (o.domain, o.op_type))
}
