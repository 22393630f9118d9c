//! Products of packed weights (`com.microsoft::MatMulNBits`) in the operator of that name in `ai.retro`, whose kernels
//! take the rows of a window at little more than the price of one. Both have the same inputs, outputs, attributes and
//! storage, so that the domain is all that changes.

use retro_contract::{
    DOMAIN,
    matmul_nbits::{self as contract, attribute, input, limits},
};
use retro_onnx::{DataType, GraphProto, NodeProto, graph::GraphView};
use std::collections::BTreeMap;

/// Why a product stays ONNX Runtime's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Kept {
    /// Nothing says what the model is for.
    #[error("they are replaced with {0}")]
    NoDevice(&'static str),
    /// ONNX Runtime multiplies 8-bit integers on the CPU, several rows too.
    #[error("accuracy_level 4 asks for 8-bit activations, which ONNX Runtime has on the CPU")]
    Bytes,
    /// `--no-matmul`.
    #[error("as asked")]
    Asked,
    /// Steps of one token have one row.
    #[error("with a window of 1 a step has one row")]
    OneRow,
    /// The activations are of another type than the kernel's.
    #[error("activations of {0}")]
    Activations(&'static str),
    /// A number that the kernel does not take.
    #[error("attribute {0} is {1}")]
    Attribute(&'static str, i64),
    /// An attribute that ai.retro::MatMulNBits does not have.
    #[error("attribute {0}")]
    UnknownAttribute(String),
    /// K is no whole number of the kernel's loads.
    #[error("K is {0}, no multiple of {1}")]
    Columns(i64, usize),
    /// An input that may be another in each call.
    #[error("{0} is no constant")]
    NoConstant(&'static str),
    /// Columns in another order.
    #[error("input g_idx")]
    Reordered,
    /// A tensor of another shape or type than ONNX Runtime's documentation has.
    #[error("{0} of another shape or type")]
    Storage(&'static str),
}

/// What the products of a model are replaced for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The CPU, where the operator multiplies float32 and float16.
    Cpu,
    /// CUDA.
    Cuda,
}

/// The products of packed weights of a graph: which become the operator, and why others don't.
#[derive(Clone, Debug, Default)]
pub struct PackedProducts {
    /// Indices of nodes that become `ai.retro::MatMulNBits`.
    pub replaced: Vec<usize>,
    /// How many stay, by the reason.
    pub kept: BTreeMap<Kept, usize>,
}

impl PackedProducts {
    /// Looks at every product. `target`: what they are replaced for, `None` where nothing says it; or why all of them
    /// stay.
    pub fn choose(view: &GraphView, target: &Result<Option<Target>, Kept>) -> Self {
        let mut products = Self::default();
        for (index, node) in view.graph.node.iter().enumerate() {
            if !node.is(contract::SOURCE_DOMAIN, contract::OP_TYPE) {
                continue;
            }
            let checked = |target: Option<Target>| match target {
                Some(target) => check(view, node, target),
                None => Err(without_device(view, node)),
            };
            match target.clone().and_then(checked) {
                Ok(()) => products.replaced.push(index),
                Err(why) => *products.kept.entry(why).or_default() += 1,
            }
        }
        products
    }

    /// Leaves as they are those that were to become the operator.
    pub fn keep_all(&mut self, why: Kept) {
        let count = std::mem::take(&mut self.replaced).len();
        if count > 0 {
            *self.kept.entry(why).or_default() += count;
        }
    }

    /// Puts the operator in the place of the products that were chosen, in the graph that they were chosen of.
    pub fn replace(&self, graph: &mut GraphProto) {
        for &index in &self.replaced {
            if let Some(node) = graph.node.get_mut(index) {
                node.domain = Some(DOMAIN.to_owned());
            }
        }
    }
}

/// Why a product stays where nothing says what the model is for: the devices that it would be replaced for, or why there
/// is none.
fn without_device(view: &GraphView, node: &NodeProto) -> Kept {
    let [cpu, cuda] = [Target::Cpu, Target::Cuda].map(|target| check(view, node, target));
    match (cpu, cuda) {
        (Ok(()), Ok(())) => Kept::NoDevice("--device cuda or --device cpu"),
        (Ok(()), Err(_)) => Kept::NoDevice("--device cpu"),
        (Err(_), Ok(())) => Kept::NoDevice("--device cuda"),
        (Err(why), Err(_)) => why,
    }
}

/// Whether the kernel of a target takes a product, and is the faster one.
fn check(view: &GraphView, node: &NodeProto, target: Target) -> Result<(), Kept> {
    let number = |name: &str, default: i64| node.attribute(name).map_or(default, |a| a.i());
    let unknown = node.attribute.iter().find(|a| !attribute::ALL.contains(&a.name()));
    if let Some(unknown) = unknown {
        return Err(Kept::UnknownAttribute(unknown.name().to_owned()));
    }
    let one_of = |name: &'static str, default: i64, values: &[usize]| {
        let value = number(name, default);
        let found = values.iter().copied().find(|&v| v as i64 == value);
        found.ok_or(Kept::Attribute(name, value))
    };
    let positive = |name: &'static str| {
        let value = number(name, 0);
        let size = i32::try_from(value).ok().filter(|v| *v > 0);
        size.map(|_| value).ok_or(Kept::Attribute(name, value))
    };
    let bits = one_of(attribute::BITS, limits::BITS_DEFAULT as i64, &limits::BITS)?;
    let block = one_of(attribute::BLOCK_SIZE, 0, &limits::BLOCK_SIZES)?;
    one_of(attribute::WEIGHT_PREPACKED, 0, &[0])?;
    let level = one_of(attribute::ACCURACY_LEVEL, 0, &[0, 1, 2, 3, limits::ACCURACY_LEVEL_MAX])?;
    let (k, n) = (positive(attribute::K)?, positive(attribute::N)?);
    let multiple = limits::cuda_k_multiple(bits);
    if target == Target::Cuda && k % multiple as i64 != 0 {
        return Err(Kept::Columns(k, multiple));
    }
    if !node.input(input::G_IDX).is_empty() {
        return Err(Kept::Reordered);
    }
    let weights = Weights { view, node };
    // The activations have the scales' type.
    let t = weights.data_type(input::SCALES)?;
    let taken: &[DataType] = match target {
        Target::Cpu => &[DataType::Float, DataType::Float16],
        Target::Cuda => &[DataType::Float16, DataType::Bfloat16],
    };
    if !taken.contains(&t) {
        return Err(Kept::Activations(t.label()));
    }
    // ONNX Runtime multiplies no bytes with zero points that are none.
    let zero_points = node.input(input::ZERO_POINTS);
    let bytes = zero_points.is_empty() || weights.data_type(input::ZERO_POINTS)? == DataType::Uint8;
    if target == Target::Cpu && level == limits::ACCURACY_LEVEL_MAX && bytes {
        return Err(Kept::Bytes);
    }
    let (bits, block) = (bits as i64, block as i64);
    let blocks = (k + block - 1) / block;
    weights.check(input::B, DataType::Uint8, &[&[n, blocks, block * bits / 8]])?;
    weights.check(input::SCALES, t, &[&[n, blocks], &[n * blocks]])?;
    if !zero_points.is_empty() {
        match weights.data_type(input::ZERO_POINTS)? {
            DataType::Uint8 => {
                let row = (blocks * bits + 7) / 8;
                weights.check(input::ZERO_POINTS, DataType::Uint8, &[&[n, row], &[n * row]])?;
            }
            _ => weights.check(input::ZERO_POINTS, t, &[&[n, blocks], &[n * blocks]])?,
        }
    }
    if !node.input(input::BIAS).is_empty() {
        weights.check(input::BIAS, t, &[&[n]])?;
    }
    Ok(())
}

/// The constant inputs of a product.
struct Weights<'v> {
    view: &'v GraphView<'v>,
    node: &'v NodeProto,
}

impl Weights<'_> {
    /// The element type of an initializer that no caller can feed.
    fn data_type(&self, slot: usize) -> Result<DataType, Kept> {
        let (name, what) = (self.node.input(slot), input::NAMES[slot]);
        match self.view.initializer(name).filter(|_| !self.view.is_input(name)) {
            Some(tensor) => DataType::try_from(tensor.data_type()).map_err(|_| Kept::Storage(what)),
            None => Err(Kept::NoConstant(what)),
        }
    }

    fn check(&self, slot: usize, data_type: DataType, shapes: &[&[i64]]) -> Result<(), Kept> {
        let dims = self.view.tensor_dims(self.node.input(slot)).unwrap_or_default();
        if self.data_type(slot)? != data_type || !shapes.contains(&dims) {
            return Err(Kept::Storage(input::NAMES[slot]));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use retro_onnx::{AttributeProto, TensorProto, ValueInfoProto};

    const K: i64 = 96;
    const N: i64 = 24;

    fn tensor(name: &str, data_type: DataType, dims: &[i64]) -> TensorProto {
        TensorProto {
            name: Some(name.to_owned()),
            data_type: Some(data_type.into()),
            dims: dims.to_vec(),
            ..Default::default()
        }
    }

    /// One product of 4 bits with everything but g_idx.
    fn graph() -> GraphProto {
        let inputs = ["x", "b", "scales", "zero_points", "", "bias"];
        let node = NodeProto::new(contract::SOURCE_DOMAIN, contract::OP_TYPE, "q", &inputs, &["y"]);
        let numbers = [
            ("K", K),
            ("N", N),
            ("bits", 4),
            ("block_size", 32),
            ("accuracy_level", 4),
        ];
        let node = numbers
            .into_iter()
            .fold(node, |n, (k, v)| n.with(AttributeProto::int(k, v)));
        let half = DataType::Float16;
        GraphProto {
            input: vec![ValueInfoProto::unshaped("x", half)],
            node: vec![node],
            initializer: vec![
                tensor("b", DataType::Uint8, &[N, 3, 16]),
                tensor("scales", half, &[N, 3]),
                tensor("zero_points", DataType::Uint8, &[N, 2]),
                tensor("bias", half, &[N]),
            ],
            ..Default::default()
        }
    }

    fn kept(change: impl FnOnce(&mut GraphProto)) -> String {
        let mut graph = graph();
        change(&mut graph);
        let products = PackedProducts::choose(&GraphView::new(&graph, 21), &Ok(Some(Target::Cuda)));
        let reasons: Vec<String> = products.kept.keys().map(ToString::to_string).collect();
        assert_eq!(products.replaced.len() + reasons.len(), 1);
        reasons.concat()
    }

    fn set(graph: &mut GraphProto, name: &str, value: i64) {
        crate::testing::set(&mut graph.node[0], AttributeProto::int(name, value));
    }

    #[test]
    fn only_the_domain_changes() {
        let mut replaced = graph();
        let products = PackedProducts::choose(&GraphView::new(&replaced, 21), &Ok(Some(Target::Cuda)));
        products.replace(&mut replaced);
        assert!(replaced.node[0].is(DOMAIN, contract::OP_TYPE));
        replaced.node[0].domain = Some(contract::SOURCE_DOMAIN.to_owned());
        assert_eq!(replaced, graph());
    }

    #[test]
    fn what_the_kernel_takes() {
        for change in [
            (|_| {}) as fn(&mut GraphProto),
            |g| g.initializer[1].dims = vec![N * 3],
            |g| {
                g.initializer[2].data_type = Some(DataType::Float16.into());
                g.initializer[2].dims = vec![N, 3];
            },
            |g| g.node[0].input.truncate(3),
            |g| g.node[0].attribute.retain(|a| a.name() != "bits"),
            |g| set(g, "weight_prepacked", 0),
            |g| {
                for tensor in g
                    .initializer
                    .iter_mut()
                    .filter(|t| t.data_type() == DataType::Float16 as i32)
                {
                    tensor.data_type = Some(DataType::Bfloat16.into());
                }
            },
        ] {
            assert_eq!(kept(change), "");
        }
    }

    #[test]
    fn what_it_does_not_take_stays_with_the_reason() {
        for (change, why) in [
            ((|g| set(g, "bits", 2)) as fn(&mut GraphProto), "attribute bits is 2"),
            (|g| set(g, "block_size", 256), "attribute block_size is 256"),
            (|g| set(g, "weight_prepacked", 1), "attribute weight_prepacked is 1"),
            (|g| set(g, "accuracy_level", 7), "attribute accuracy_level is 7"),
            (|g| set(g, "transposed", 1), "attribute transposed"),
            (|g| set(g, "K", 80), "K is 80, no multiple of 32"),
            (|g| set(g, "N", 0), "attribute N is 0"),
            (|g| g.node[0].input[4] = "g_idx".into(), "input g_idx"),
            (|g| g.node[0].input[2] = "x".into(), "scales is no constant"),
            (|g| drop(g.initializer.remove(0)), "B is no constant"),
            (
                |g| g.input.push(ValueInfoProto::unshaped("b", DataType::Uint8)),
                "B is no constant",
            ),
            (
                |g| g.initializer[1].data_type = Some(DataType::Float.into()),
                "activations of float32",
            ),
            (|g| g.initializer[0].dims = vec![N, 48], "B of another shape or type"),
            (
                |g| g.initializer[2].dims = vec![N, 3],
                "zero_points of another shape or type",
            ),
            (
                |g| g.initializer[2].data_type = Some(DataType::Float.into()),
                "zero_points of another shape or type",
            ),
            (|g| g.initializer[3].dims = vec![1], "bias of another shape or type"),
        ] {
            assert_eq!(kept(change), why);
        }
    }

    /// On the CPU: float32 and float16, any K, and nothing that ONNX Runtime multiplies in 8 bits.
    #[test]
    fn for_the_cpu_products_of_floats_are_replaced() {
        let of = |data_type: DataType, level: i64, k: i64| {
            let mut graph = graph();
            for tensor in &mut graph.initializer {
                if tensor.data_type() == DataType::Float16 as i32 {
                    tensor.data_type = Some(data_type.into());
                }
            }
            set(&mut graph, "accuracy_level", level);
            set(&mut graph, "K", k);
            graph
        };
        let kept = |graph: &GraphProto| {
            let products = PackedProducts::choose(&GraphView::new(graph, 21), &Ok(Some(Target::Cpu)));
            assert_eq!(products.replaced.len() + products.kept.len(), 1);
            products.kept.into_keys().next()
        };
        for data_type in [DataType::Float, DataType::Float16] {
            assert_eq!(kept(&of(data_type, 0, K)), None);
            assert_eq!(kept(&of(data_type, 1, K - 3)), None);
            assert_eq!(kept(&of(data_type, 4, K)), Some(Kept::Bytes));
            // It has no such product with zero points that are floats.
            let mut floats = of(data_type, 4, K);
            floats.initializer[2] = tensor("zero_points", data_type, &[N, 3]);
            assert_eq!(kept(&floats), None);
        }
        assert_eq!(kept(&of(DataType::Bfloat16, 0, K)), Some(Kept::Activations("bfloat16")));
    }

    #[test]
    fn other_nodes_are_not_looked_at() {
        let mut graph = graph();
        graph.node[0].op_type = Some("MatMulBnb4".to_owned());
        let products = PackedProducts::choose(&GraphView::new(&graph, 21), &Err(Kept::Asked));
        assert!(products.replaced.is_empty() && products.kept.is_empty());
    }
}
