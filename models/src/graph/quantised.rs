//! The nodes of quantised linear layers, of the embedding and of the head.

use std::collections::HashMap;

use retro_onnx::{AttributeProto, DataType, GraphBuilder, NodeBuilder, TensorProto};

use crate::{
    initializer::{Content, Initializer},
    part::Part,
    quantised::{Activations, Format, Half, Packed, What},
    source::Source,
};

const EMBED: &str = "model.embed_tokens";
const HEAD: &str = "lm_head.MatMul";

/// Adds such nodes and their initializers.
pub struct Quantiser<'a> {
    source: &'a Source,
    activations: Activations,
    /// The sums of an input over groups of a size, which several layers take.
    sums: HashMap<(String, usize), String>,
}

/// Where new parts go.
struct Target<'t> {
    graph: &'t mut GraphBuilder,
    initializers: &'t mut Vec<Initializer>,
}

/// Weights of one format and what the names of their initializers begin with.
struct Weights {
    name: String,
    parts: Vec<Part>,
    inner: usize,
    format: Format,
}

impl<'a> Quantiser<'a> {
    pub fn new(source: &'a Source, activations: Activations) -> Self {
        Self {
            source,
            activations,
            sums: HashMap::new(),
        }
    }

    /// Whether the embedding has codes. Exports for CUDA have it in f16: a lookup reads few of its rows.
    pub fn packs_embedding(&self) -> bool {
        self.activations != Activations::F16
    }

    /// The rows of input_ids of `part`.
    pub fn embedding(
        &self,
        graph: &mut GraphBuilder,
        initializers: &mut Vec<Initializer>,
        part: Part,
        inner: usize,
    ) -> String {
        // 8 bits, for the same reason as the head.
        let format = Format::of(self.source, &part.tensor, false);
        let mut target = Target { graph, initializers };
        let weights = Weights::new(EMBED, inner, vec![part], format);
        let halves = format.halves(self.activations).iter();
        let rows = halves.map(|&half| target.gather(&weights, half)).collect();
        let rows = target.sum(rows, "/model/embed_tokens", None);
        if format.has_min() {
            target.gathered_mins(&weights, &rows)
        } else {
            rows
        }
    }

    /// The logits of `x`. The head is `part`, which may be the embedding.
    pub fn head(
        &mut self,
        graph: &mut GraphBuilder,
        initializers: &mut Vec<Initializer>,
        x: &str,
        inner: usize,
        part: Part,
    ) {
        // On the CPU it gets 8 bits, as it weighs more in the result than in the model's size. Exports for CUDA have 4.
        let four_bits = self.activations == Activations::F16;
        let format = Format::of(self.source, &part.tensor, four_bits);
        let weights = Weights::new(HEAD, inner, vec![part], format);
        let mut target = Target { graph, initializers };
        self.product(&mut target, &weights, "/lm_head", x, Some("logits"));
    }

    /// `x` times the transposes of `parts`, side by side. `names`: of the module and the path of its nodes.
    pub fn linear(
        &mut self,
        graph: &mut GraphBuilder,
        initializers: &mut Vec<Initializer>,
        (module, path): (&str, &str),
        x: &str,
        inner: usize,
        parts: Vec<Part>,
    ) -> String {
        let mut runs: Vec<(Format, Vec<Part>)> = Vec::new();
        for part in parts {
            let format = Format::of(self.source, &part.tensor, true);
            match runs.last_mut() {
                Some((last, parts)) if *last == format => parts.push(part),
                _ => runs.push((format, vec![part])),
            }
        }
        let mut target = Target { graph, initializers };
        let whole = format!("{path}/MatMul/output_0");
        let single = runs.len() == 1;
        let products = runs.into_iter().enumerate().map(|(i, (format, parts))| {
            let number = if single { String::new() } else { format!(".{i}") };
            let weights = Weights::new(&format!("{module}{number}.MatMul"), inner, parts, format);
            let output = single.then_some(whole.as_str());
            self.product(&mut target, &weights, &format!("{path}{number}"), x, output)
        });
        let products: Vec<String> = products.collect();
        if !single {
            let inputs: Vec<&str> = products.iter().map(String::as_str).collect();
            let node = target.graph.node("Concat", &inputs).int("axis", -1);
            node.named(&format!("{path}/Concat"), &[&whole]);
        }
        whole
    }

    /// `x` times weights of one format. `output`: the name of the product.
    fn product(
        &mut self,
        target: &mut Target<'_>,
        weights: &Weights,
        path: &str,
        x: &str,
        output: Option<&str>,
    ) -> String {
        let halves = weights.format.halves(self.activations);
        let alone = halves.len() == 1 && !weights.format.has_min();
        let mut terms = Vec::new();
        for &half in halves {
            let output = output.filter(|_| alone);
            terms.push(target.matmul_nbits(weights, half, self.activations, path, x, output));
        }
        if weights.format.has_min() {
            let group = weights.format.group();
            let sums = self.sums.entry((x.to_owned(), group));
            let sums = sums.or_insert_with(|| target.group_sums(path, x, weights.inner, group));
            let mins = target.packed(weights, What::Mins, "_mins", None);
            let out = format!("{path}/mins/MatMul/output_0");
            let node = target.graph.node("MatMul", &[sums, &mins]);
            node.named(&format!("{path}/mins/MatMul"), &[&out]);
            terms.push(out);
        }
        target.sum(terms, path, output)
    }
}

impl Weights {
    fn new(name: &str, inner: usize, parts: Vec<Part>, format: Format) -> Self {
        Self {
            name: format!("{name}.weight"),
            parts,
            inner,
            format,
        }
    }

    fn codes_name(&self, half: Half) -> String {
        format!("{}_Q{}{}", self.name, self.format.stored_bits(half), half.suffix())
    }
}

impl Target<'_> {
    /// Adds an initializer by the name of the weights and `suffix`. Where `same_as` is there, it has the same bytes.
    fn packed(&mut self, weights: &Weights, what: What, suffix: &str, same_as: Option<String>) -> String {
        let name = match what {
            What::Codes(half) | What::Table(half) => weights.codes_name(half),
            What::Scales(_) | What::Mins | What::TableMins => format!("{}{suffix}", weights.name),
        };
        let packed = Packed {
            parts: weights.parts.clone(),
            inner: weights.inner,
            format: weights.format,
            what,
        };
        self.add(&name, packed.dims(), Content::Packed(packed), same_as);
        name
    }

    fn add(&mut self, name: &str, dims: Vec<usize>, content: Content, same_as: Option<String>) {
        self.initializers.push(Initializer {
            name: name.to_owned(),
            dims,
            content,
            std: None,
            same_as,
        });
    }

    /// An initializer that has these contents already.
    fn existing(&self, weights: &Weights, what: What) -> Option<String> {
        let same = |init: &&Initializer| match &init.content {
            Content::Packed(packed) => packed.what == what && packed.parts == weights.parts,
            _ => false,
        };
        self.initializers.iter().find(same).map(|init| init.name.clone())
    }

    fn scales(&mut self, weights: &Weights, half: Half) -> String {
        let what = What::Scales(half);
        let existing = self.existing(weights, what);
        existing.unwrap_or_else(|| self.packed(weights, what, &format!("_scales{}", half.suffix()), None))
    }

    /// One half of the rows of input_ids.
    fn gather(&mut self, weights: &Weights, half: Half) -> String {
        let table = self.packed(weights, What::Table(half), "", None);
        let scales = self.scales(weights, half);
        let bits = weights.format.stored_bits(half);
        let mut inputs = vec![table, "input_ids".to_owned(), scales];
        // Without them, they are 0 for 4 bits and 128 for 8.
        if bits == 4 && half != Half::Low {
            let name = format!("{}_zero_points{}", weights.name, half.suffix());
            let outer = weights.parts.iter().map(|part| part.rows).sum();
            let dims = vec![outer, weights.inner / weights.format.group()];
            let content = Content::Constant(DataType::Uint4, 0x88);
            self.add(&name, dims, content, None);
            inputs.push(name);
        }
        let path = format!("/model/embed_tokens/GatherBlockQuantized{}", half.suffix());
        let out = format!("{path}/output_0");
        let mut node = self.microsoft("GatherBlockQuantized", &inputs);
        if bits == 8 {
            node = node.int("bits", bits);
        }
        let node = node.int("block_size", weights.format.group() as i64);
        let node = node.int("gather_axis", 0).int("quantize_axis", 1);
        node.named(&path, &[&out]);
        out
    }

    /// `rows`, which were gathered by input_ids, plus the minimums of their groups.
    fn gathered_mins(&mut self, weights: &Weights, rows: &str) -> String {
        let path = "/model/embed_tokens/mins";
        let out = |op: &str| format!("{path}/{op}/output_0");
        let mins = self.packed(weights, What::TableMins, "_mins", None);
        let gather = self.graph.node("Gather", &[&mins, "input_ids"]);
        gather.named(&format!("{path}/Gather"), &[&out("Gather")]);
        let axes = self.constant(&format!("{path}/axes"), &[-1]);
        let unsqueeze = self.graph.node("Unsqueeze", &[&out("Gather"), &axes]);
        unsqueeze.named(&format!("{path}/Unsqueeze"), &[&out("Unsqueeze")]);
        let grouped = self.grouped(path, rows, weights.inner, weights.format.group());
        let add = self.graph.node("Add", &[&grouped, &out("Unsqueeze")]);
        add.named(&format!("{path}/Add"), &[&out("Add")]);
        let dims = [0, 0, weights.inner as i64];
        let shape = self.constant(&format!("{path}/whole_shape"), &dims);
        let reshape = self.graph.node("Reshape", &[&out("Add"), &shape]);
        reshape.named(&format!("{path}/Reshape_1"), &[&out("Reshape_1")]);
        out("Reshape_1")
    }

    /// `x` with groups of its last dimension in a dimension of their own.
    fn grouped(&mut self, path: &str, x: &str, inner: usize, group: usize) -> String {
        let dims = [0, 0, (inner / group) as i64, group as i64];
        let shape = self.constant(&format!("{path}/shape"), &dims);
        let reshape = format!("{path}/Reshape");
        let out = format!("{reshape}/output_0");
        self.graph.node("Reshape", &[x, &shape]).named(&reshape, &[&out]);
        out
    }

    /// `x` times one half of the weights.
    fn matmul_nbits(
        &mut self,
        weights: &Weights,
        half: Half,
        activations: Activations,
        path: &str,
        x: &str,
        output: Option<&str>,
    ) -> String {
        let table = self.existing(weights, What::Table(half));
        let codes = self.packed(weights, What::Codes(half), "", table);
        let scales = self.scales(weights, half);
        let mut inputs = vec![x.to_owned(), codes, scales];
        let (outer, inner) = (weights.parts.iter().map(|part| part.rows).sum(), weights.inner);
        let group = weights.format.group();
        // Without them, they are 8 for 4 bits and 128 for 8.
        if half == Half::Low {
            let name = format!("{}_zero_points{}", weights.name, half.suffix());
            let dims = vec![outer, (inner / group).div_ceil(2)];
            self.add(&name, dims, Content::Constant(DataType::Uint8, 0), None);
            inputs.push(name);
        }
        let bits = weights.format.stored_bits(half);
        let node_path = format!("{path}/MatMul_Q{bits}{}", half.suffix());
        let out = output.map_or_else(|| format!("{node_path}/output_0"), str::to_owned);
        let node = self.microsoft("MatMulNBits", &inputs);
        let node = node.int("K", inner as i64).int("N", outer as i64);
        let node = node.int("accuracy_level", activations.accuracy_level());
        let node = node.int("bits", bits).int("block_size", group as i64);
        node.named(&node_path, &[&out]);
        out
    }

    /// Sums of `x` over groups of its last dimension.
    fn group_sums(&mut self, path: &str, x: &str, inner: usize, group: usize) -> String {
        let path = format!("{path}/mins");
        let grouped = self.grouped(&path, x, inner, group);
        let axes = self.constant(&format!("{path}/axes"), &[-1]);
        let sum = format!("{path}/ReduceSum");
        let out = format!("{sum}/output_0");
        let node = self.graph.node("ReduceSum", &[&grouped, &axes]).int("keepdims", 0);
        node.named(&sum, &[&out]);
        out
    }

    /// The sum of terms. `output`: its name, which a single term has already.
    fn sum(&mut self, terms: Vec<String>, path: &str, output: Option<&str>) -> String {
        let last = terms.len().saturating_sub(1);
        let mut terms = terms.into_iter().enumerate();
        let Some((_, mut all)) = terms.next() else {
            return String::new();
        };
        for (i, term) in terms {
            let node = format!("{path}/Add_{i}");
            let own = format!("{node}/output_0");
            let out = output.filter(|_| i == last).unwrap_or(&own);
            self.graph.node("Add", &[&all, &term]).named(&node, &[out]);
            all = out.to_owned();
        }
        all
    }

    fn constant(&mut self, name: &str, values: &[i64]) -> String {
        let tensor = TensorProto::int64s("", &[values.len() as i64], values);
        let node = self.graph.node("Constant", &[]);
        let node = node.attribute(AttributeProto::tensor("value", tensor));
        node.named(name, &[name]);
        name.to_owned()
    }

    fn microsoft(&mut self, op_type: &str, inputs: &[String]) -> NodeBuilder<'_> {
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        self.graph.node(op_type, &inputs).domain("com.microsoft")
    }
}
