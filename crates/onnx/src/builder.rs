//! Builds graphs: new ones, and parts to add to one that is there.

use crate::{
    AttributeProto, DataType, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, ValueInfoProto,
    fresh_names::FreshNames,
};
use bytes::Bytes;

/// Builds a graph node by node, and gives values names that nothing has yet.
///
/// ```
/// use retro_onnx::{DataType, GraphBuilder, ValueInfoProto};
///
/// let mut b = GraphBuilder::new("double");
/// b.input(ValueInfoProto::tensor("x", DataType::Float, ["n".into()]));
/// let two = b.floats("two", &[], &[2.0]);
/// b.node("Mul", &["x", &two]).named("double", &["y"]);
/// b.output(ValueInfoProto::tensor("y", DataType::Float, ["n".into()]));
/// let model = b.into_model(10, &[("", 22)]);
/// assert_eq!(model.graph.unwrap().node[0].input, ["x", "two"]);
/// ```
pub struct GraphBuilder {
    /// What was built and not taken yet.
    built: GraphProto,
    names: FreshNames,
    prefix: String,
}

impl GraphBuilder {
    /// Begins a new graph, which has this name.
    pub fn new(name: &str) -> Self {
        Self {
            built: GraphProto {
                name: Some(name.to_owned()),
                ..Default::default()
            },
            names: FreshNames::default(),
            prefix: String::new(),
        }
    }

    /// Begins a part to add to `graph`: fresh names are those that neither the graph nor its subgraphs have. The graph
    /// takes the part by [`Self::take_nodes`] and [`Self::take_initializers`].
    pub fn part_of(graph: &GraphProto) -> Self {
        Self {
            built: GraphProto::default(),
            names: FreshNames::of(graph),
            prefix: String::new(),
        }
    }

    /// What fresh names begin with from now on.
    pub fn set_prefix(&mut self, prefix: impl Into<String>) {
        self.prefix = prefix.into();
    }

    /// The prefix and `base`, with `_2`, `_3`, ... after them where something has that name already.
    pub fn fresh_name(&mut self, base: &str) -> String {
        self.names.name(&format!("{}{base}", self.prefix))
    }

    /// Declares an input of the graph.
    pub fn input(&mut self, value: ValueInfoProto) {
        self.names.take(value.name());
        self.built.input.push(value);
    }

    /// Declares an output of the graph.
    pub fn output(&mut self, value: ValueInfoProto) {
        self.built.output.push(value);
    }

    /// Adds an initializer by the name that it has.
    pub fn initializer(&mut self, tensor: TensorProto) {
        self.names.take(tensor.name());
        self.built.initializer.push(tensor);
    }

    /// Adds an int64 initializer, row-major; returns its fresh name.
    pub fn int64s(&mut self, base: &str, dims: &[i64], values: &[i64]) -> String {
        self.constant(base, |name| TensorProto::int64s(name, dims, values))
    }

    /// Adds an int32 initializer, row-major; returns its fresh name.
    pub fn int32s(&mut self, base: &str, dims: &[i64], values: &[i32]) -> String {
        self.constant(base, |name| TensorProto::int32s(name, dims, values))
    }

    /// Adds a float32 initializer, row-major; returns its fresh name.
    pub fn floats(&mut self, base: &str, dims: &[i64], values: &[f32]) -> String {
        self.constant(base, |name| TensorProto::floats(name, dims, values))
    }

    /// Adds an initializer of any type from its little-endian bytes, row-major; returns its fresh name.
    pub fn raw(&mut self, base: &str, data_type: DataType, dims: &[i64], bytes: Bytes) -> String {
        self.constant(base, |name| TensorProto::raw(name, data_type, dims, bytes))
    }

    fn constant(&mut self, base: &str, tensor: impl FnOnce(&str) -> TensorProto) -> String {
        let name = self.fresh_name(base);
        self.built.initializer.push(tensor(&name));
        name
    }

    /// Begins a node of one of [ONNX's own operators](https://onnx.ai/onnx/operators/). It is added when its outputs
    /// get their names. `inputs`: names of values; "" for an optional one that is absent.
    pub fn node(&mut self, op_type: &str, inputs: &[&str]) -> NodeBuilder<'_> {
        NodeBuilder {
            node: NodeProto::new("", op_type, "", inputs, &[]),
            graph: self,
        }
    }

    /// Adds a [Cast](https://onnx.ai/onnx/operators/onnx__Cast.html); returns its output's fresh name.
    pub fn cast(&mut self, from: &str, to: DataType, base: &str) -> String {
        let to = i64::from(i32::from(to));
        self.node("Cast", &[from]).int("to", to).output(base)
    }

    /// Adds a node as it is.
    pub fn push(&mut self, node: NodeProto) {
        self.names.take(node.name());
        node.output.iter().for_each(|output| self.names.take(output));
        self.built.node.push(node);
    }

    /// Gives the first output of the node added last another name, which its reader expects.
    pub fn rename_last_output(&mut self, name: &str) {
        if let Some(output) = self.built.node.last_mut().and_then(|node| node.output.first_mut()) {
            name.clone_into(output);
        }
    }

    /// Takes the nodes added since they were taken last, in order.
    pub fn take_nodes(&mut self) -> Vec<NodeProto> {
        std::mem::take(&mut self.built.node)
    }

    /// Takes the initializers added since they were taken last, in order.
    pub fn take_initializers(&mut self) -> Vec<TensorProto> {
        std::mem::take(&mut self.built.initializer)
    }

    /// The graph.
    pub fn into_graph(self) -> GraphProto {
        self.built
    }

    /// A model of the graph. `ir_version`: version of the ONNX format; `opsets`: domains of operators ("" is ONNX's
    /// own) and their versions.
    pub fn into_model(self, ir_version: i64, opsets: &[(&str, i64)]) -> ModelProto {
        let opsets = opsets.iter();
        ModelProto {
            ir_version: Some(ir_version),
            opset_import: opsets
                .map(|(domain, version)| OperatorSetIdProto::new(domain, *version))
                .collect(),
            graph: Some(self.built),
            ..Default::default()
        }
    }
}

/// A node that is not in its graph yet: [`Self::output`] and [`Self::named`] add it.
#[must_use = "a node is added when its outputs get their names"]
pub struct NodeBuilder<'b> {
    graph: &'b mut GraphBuilder,
    node: NodeProto,
}

impl NodeBuilder<'_> {
    /// Whose operator it is, if not ONNX's own: `com.microsoft`.
    pub fn domain(mut self, domain: &str) -> Self {
        self.node.domain = (!domain.is_empty()).then(|| domain.to_owned());
        self
    }

    /// Adds an attribute.
    pub fn attribute(mut self, attribute: AttributeProto) -> Self {
        self.node.attribute.push(attribute);
        self
    }

    /// Adds attributes.
    pub fn attributes(mut self, attributes: impl IntoIterator<Item = AttributeProto>) -> Self {
        self.node.attribute.extend(attributes);
        self
    }

    /// Adds an attribute that is a whole number.
    pub fn int(self, name: &str, value: i64) -> Self {
        self.attribute(AttributeProto::int(name, value))
    }

    /// Adds an attribute that is a list of whole numbers.
    pub fn ints(self, name: &str, values: &[i64]) -> Self {
        self.attribute(AttributeProto::ints(name, values))
    }

    /// Adds an attribute that is a number.
    pub fn float(self, name: &str, value: f32) -> Self {
        self.attribute(AttributeProto::float(name, value))
    }

    /// Adds the node with one output. Both have one fresh name, which is returned.
    pub fn output(self, base: &str) -> String {
        let name = self.graph.fresh_name(base);
        self.named(&name, &[&name]);
        name
    }

    /// Adds the node by exactly these names. "" stands for an optional output that is absent.
    pub fn named(mut self, name: &str, outputs: &[&str]) {
        self.node.name = (!name.is_empty()).then(|| name.to_owned());
        self.node.output = outputs.iter().map(|output| (*output).to_owned()).collect();
        self.graph.push(self.node);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_has_names_that_its_graph_does_not_have() {
        let inner = GraphProto {
            node: vec![NodeProto::new("", "Neg", "inner", &["h"], &["z"])],
            ..Default::default()
        };
        let graph = GraphProto {
            node: vec![
                NodeProto::new("", "If", "if", &["c"], &["y"]).with(AttributeProto::graph("then_branch", inner)),
            ],
            ..Default::default()
        };
        let mut part = GraphBuilder::part_of(&graph);
        assert_eq!(part.fresh_name("new"), "new");
        assert_eq!(part.node("Neg", &["y"]).output("y"), "y_2");
        assert_eq!(part.int64s("z", &[1], &[1]), "z_2", "subgraphs count");
        assert_eq!(
            part.cast("y", DataType::Int32, "inner"),
            "inner_2",
            "names of nodes count"
        );
        part.set_prefix("p/");
        assert_eq!(part.fresh_name("y"), "p/y");
        part.rename_last_output("y");
        let nodes = part.take_nodes();
        assert_eq!((nodes[1].name(), nodes[1].output(0)), ("inner_2", "y"));
        assert!(part.take_nodes().is_empty());
        assert_eq!(part.take_initializers().len(), 1);
    }

    #[test]
    fn exact_names_are_taken() {
        let mut b = GraphBuilder::new("g");
        b.input(ValueInfoProto::tensor("x", DataType::Float, []));
        b.initializer(TensorProto::floats("w", &[1], &[0.0]));
        b.node("Split", &["x"]).int("axis", -1).named("s", &["a", "", "b"]);
        for name in ["x", "w", "s", "a", "b"] {
            assert_eq!(b.fresh_name(name), format!("{name}_2"));
        }
        let graph = b.into_graph();
        assert_eq!(graph.node[0].output, ["a", "", "b"]);
    }
}
