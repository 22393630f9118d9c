//! The graph of a model of the Llama family, node for node as onnxruntime-genai's builder 0.18 writes it for the CPU:
//! packed q/k/v projection, `com.microsoft::GroupQueryAttention` with RoPE inside, fused residual norms, SwiGLU.
//!
//! B batch, S tokens fed, `past` and `total` lengths of the cache: all symbolic dimensions of the inputs and outputs.

mod quantised;

use quantised::Quantiser;
use retro_onnx::{
    AttributeProto, DataType, Dimension, GraphBuilder, GraphProto, NodeBuilder, TensorProto, ValueInfoProto,
};

use crate::{
    config::{Family, LlamaConfig},
    dtype::Dtype,
    initializer::{Content, Initializer},
    part::Part,
    quantised::Activations,
    source::Source,
};

/// Everything of the model but the weights' bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Llama {
    /// The graph without its initializers.
    pub graph: GraphProto,
    /// What the graph's initializers are made of, in the order of the file.
    pub initializers: Vec<Initializer>,
}

const COS: &str = "cos_cache";
const SIN: &str = "sin_cache";
const MASK: &str = "/model/attn_mask_reformat/attn_mask_subgraph";
const EMBED: &str = "model.embed_tokens.weight";

/// The graph of `config` with elements of type `dtype`.
///
/// Inputs: input_ids int64 `[B, S]`, attention_mask int64 `[B, total]`, past_key_values.N.key and .value `[B, Hkv,
/// past, D]`. Outputs: logits `[B, S, V]`, present.N.key and .value `[B, Hkv, total, D]`.
pub fn llama(config: &LlamaConfig, dtype: Dtype) -> Llama {
    build(config, dtype, None)
}

/// The graph of `config` whose linear layers, embedding and head have weights of 4 and 8 bits, of the formats that
/// `source` has them in. Everything else is of the activations' type, in f16 the embedding too. Inputs and outputs are those of [`llama`].
pub(crate) fn quantised_llama(config: &LlamaConfig, source: &Source, activations: Activations) -> Llama {
    build(config, activations.dtype(), Some(Quantiser::new(source, activations)))
}

fn build(config: &LlamaConfig, dtype: Dtype, quantiser: Option<Quantiser<'_>>) -> Llama {
    let mut b = LlamaBuilder {
        graph: GraphBuilder::new("main_graph"),
        initializers: Vec::new(),
        config,
        dtype,
        quantiser,
    };
    b.interface();
    b.mask();
    let embedded = b.embedding();
    let mut residual = embedded;
    let mut branch: Option<String> = None;
    for layer in 0..config.layers {
        let (normed, sum) = b.norm(layer, "input_layernorm", &residual, branch.as_deref());
        residual = sum;
        let attended = b.attention(layer, &normed);
        let (normed, sum) = b.norm(layer, "post_attention_layernorm", &residual, Some(&attended));
        residual = sum;
        branch = Some(b.mlp(layer, &normed));
    }
    let (normed, _) = b.norm(config.layers, "final_norm_layernorm", &residual, branch.as_deref());
    b.lm_head(&normed);
    Llama {
        graph: b.graph.into_graph(),
        initializers: b.initializers,
    }
}

struct LlamaBuilder<'a> {
    graph: GraphBuilder,
    initializers: Vec<Initializer>,
    config: &'a LlamaConfig,
    dtype: Dtype,
    quantiser: Option<Quantiser<'a>>,
}

impl LlamaBuilder<'_> {
    fn interface(&mut self) {
        let (layers, dtype) = (self.config.layers, self.dtype.onnx());
        let size = |n: usize| Dimension::from(n as i64);
        let (kv_heads, head_dim) = (size(self.config.kv_heads), size(self.config.head_dim));
        let cache = |name: String, length: &str| {
            let dims = ["batch_size".into(), kv_heads.clone(), length.into(), head_dim.clone()];
            ValueInfoProto::tensor(&name, dtype, dims)
        };
        for (name, length) in [
            ("input_ids", "sequence_length"),
            ("attention_mask", "total_sequence_length"),
        ] {
            let dims = ["batch_size".into(), length.into()];
            self.graph.input(ValueInfoProto::tensor(name, DataType::Int64, dims));
        }
        let dims = [
            "batch_size".into(),
            "sequence_length".into(),
            size(self.config.vocab_size),
        ];
        self.graph.output(ValueInfoProto::tensor("logits", dtype, dims));
        // All keys, then all values, as builder 0.18 orders them.
        for kind in ["key", "value"] {
            for layer in 0..layers {
                let past = format!("past_key_values.{layer}.{kind}");
                self.graph.input(cache(past, "past_sequence_length"));
                let present = format!("present.{layer}.{kind}");
                self.graph.output(cache(present, "total_sequence_length"));
            }
        }
    }

    /// seqlens_k = number of ones of each row - 1, total_sequence_length = width of the mask, both int32.
    fn mask(&mut self) {
        let (list, scalar) = ("/model/constants/INT64/[1]", "/model/constants/INT64/1");
        let path = |op: &str| format!("{MASK}/{op}");
        let out = |op: &str| format!("{MASK}/{op}/output_0");
        let to = i64::from(i32::from(DataType::Int32));
        self.one(&[1], "[1]", list);
        let sum = self.graph.node("ReduceSum", &["attention_mask", list]);
        sum.int("keepdims", 0).named(&path("ReduceSum"), &[&out("ReduceSum")]);
        let sub = self.graph.node("Sub", &[&out("ReduceSum"), list]);
        sub.named(&path("Sub"), &[&out("Sub")]);
        let cast = self.graph.node("Cast", &[&out("Sub")]).int("to", to);
        cast.named(&path("Sub/Cast"), &[&out("Sub/Cast")]);
        let shape = self.graph.node("Shape", &["attention_mask"]);
        shape.named(&path("Shape"), &[&out("Shape")]);
        self.one(&[], "1", scalar);
        let gather = self.graph.node("Gather", &[&out("Shape"), scalar]).int("axis", 0);
        gather.named(&path("Gather"), &[&out("Gather")]);
        let cast = self.graph.node("Cast", &[&out("Gather")]).int("to", to);
        cast.named(&path("Gather/Cast"), &[&out("Gather/Cast")]);
    }

    /// A constant 1, int64.
    fn one(&mut self, dims: &[i64], name: &str, output: &str) {
        self.constant(dims, &[1], &format!("/model/constant_nodes/INT64/{name}"), output);
    }

    fn constant(&mut self, dims: &[i64], values: &[i64], name: &str, output: &str) {
        let value = AttributeProto::tensor("value", TensorProto::int64s("", dims, values));
        let node = self.graph.node("Constant", &[]).attribute(value);
        node.named(name, &[output]);
    }

    fn embedding(&mut self) -> String {
        let c = self.config;
        for (name, sin) in [(COS, false), (SIN, true)] {
            self.initializer(name, vec![c.max_positions, c.head_dim / 2], Content::Rope { sin }, None);
        }
        if let Some(quantiser) = self.quantiser.as_ref().filter(|q| q.packs_embedding()) {
            let part = Part::whole(EMBED.to_owned(), c.vocab_size);
            return quantiser.embedding(&mut self.graph, &mut self.initializers, part, c.hidden_size);
        }
        let std = 1.0; // RMSNorm makes the scale of the residual stream's start a matter of taste
        self.initializer(
            EMBED,
            vec![c.vocab_size, c.hidden_size],
            Content::Copy(EMBED.into()),
            Some(std),
        );
        let out = "/model/embed_tokens/Gather/output_0";
        let gather = self.graph.node("Gather", &[EMBED, "input_ids"]);
        gather.named("/model/embed_tokens/Gather", &[out]);
        out.into()
    }

    /// RMSNorm of `residual + branch`; returns the normed value and the sum, which goes on as the residual stream.
    fn norm(&mut self, layer: usize, which: &str, residual: &str, branch: Option<&str>) -> (String, String) {
        let weight = format!("model.layers.{layer}.{which}.weight");
        let source = if layer == self.config.layers {
            "model.norm.weight".into()
        } else {
            weight.clone()
        };
        self.initializer(&weight, vec![self.config.hidden_size], Content::Copy(source), None);
        let path = format!("/model/layers.{layer}/{which}");
        let (normed, sum) = (format!("{path}/output_0"), format!("{path}/output_3"));
        let epsilon = self.config.rms_norm_eps as f32;
        match branch {
            None => {
                let norm = self.graph.node("SimplifiedLayerNormalization", &[residual, &weight]);
                let norm = norm.float("epsilon", epsilon).int("axis", -1).int("stash_type", 1);
                norm.named(&format!("{path}/LayerNorm"), &[&normed]);
                (normed, residual.into())
            }
            Some(branch) => {
                let last = layer == self.config.layers;
                let inputs = [residual, branch, &weight];
                let norm = self.microsoft("SkipSimplifiedLayerNormalization", &inputs);
                let norm = norm.float("epsilon", epsilon);
                let all = [normed.as_str(), "", "", sum.as_str()];
                let outputs = if last { &all[..1] } else { &all[..] };
                norm.named(&format!("{path}/SkipLayerNorm"), outputs);
                (normed, sum)
            }
        }
    }

    fn attention(&mut self, layer: usize, x: &str) -> String {
        let c = self.config;
        let [query, key, value] = self.queries_keys_values(layer, x);
        let path = format!("/model/layers.{layer}/attn/GroupQueryAttention");
        let out = format!("{path}/output_0");
        let past = |kind: &str| format!("past_key_values.{layer}.{kind}");
        let present = |kind: &str| format!("present.{layer}.{kind}");
        let (seqlens, total) = (
            format!("{MASK}/Sub/Cast/output_0"),
            format!("{MASK}/Gather/Cast/output_0"),
        );
        let (past_key, past_value) = (past("key"), past("value"));
        let inputs = [
            &query,
            &key,
            &value,
            &past_key,
            &past_value,
            &seqlens,
            &total,
            COS,
            SIN,
            "",
            "",
            "",
        ]
        .map(|s: &str| s);
        let (key, value) = (present("key"), present("value"));
        let node = self.microsoft("GroupQueryAttention", &inputs);
        let node = node
            .int("num_heads", c.heads as i64)
            .int("kv_num_heads", c.kv_heads as i64);
        let node = node.float("scale", (1.0 / (c.head_dim as f64).sqrt()) as f32);
        let window = c.sliding_window.map_or(-1, |n| n as i64);
        let node = node.int("local_window_size", window).float("softcap", 0.0);
        let node = node.int("do_rotary", 1).int("rotary_interleaved", 0);
        node.named(&path, &[&out, &key, &value]);
        let parts = vec![Part::whole(
            format!("model.layers.{layer}.self_attn.o_proj.weight"),
            c.hidden_size,
        )];
        let module = format!("model.layers.{layer}.attn.o_proj");
        self.matmul(&module, &out, c.heads * c.head_dim, parts)
    }

    /// What attention takes: one packed value and two absent ones, or three where heads are normed by themselves.
    fn queries_keys_values(&mut self, layer: usize, x: &str) -> [String; 3] {
        let c = self.config;
        let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let hf = |p: &str, kind: &str| format!("model.layers.{layer}.self_attn.{p}_proj.{kind}");
        let module = |p: &str| format!("model.layers.{layer}.attn.{p}_proj");
        let parts = |kind: &str| {
            [("q", q), ("k", kv), ("v", kv)]
                .map(|(p, rows)| Part::whole(hf(p, kind), rows))
                .to_vec()
        };
        match c.family {
            Family::Qwen3 => {
                let [query, key, value] = [("q", q), ("k", kv), ("v", kv)].map(|(p, rows)| {
                    let part = vec![Part::whole(hf(p, "weight"), rows)];
                    self.matmul(&module(p), x, c.hidden_size, part)
                });
                let query = self.head_norm(layer, "q", &query, q);
                let key = self.head_norm(layer, "k", &key, kv);
                [query, key, value]
            }
            Family::Phi3 => {
                let part = vec![Part::whole(hf("qkv", "weight"), c.qkv_width())];
                let packed = self.matmul(&module("qkv"), x, c.hidden_size, part);
                [packed, String::new(), String::new()]
            }
            Family::Llama | Family::Mistral | Family::Qwen2 => {
                let mut packed = self.matmul(&module("qkv"), x, c.hidden_size, parts("weight"));
                if c.family == Family::Qwen2 {
                    packed = self.bias(&module("qkv"), &packed, parts("bias"));
                }
                [packed, String::new(), String::new()]
            }
        }
    }

    /// RMSNorm of each head of a query or key of `width` elements.
    fn head_norm(&mut self, layer: usize, which: &str, x: &str, width: usize) -> String {
        let c = self.config;
        let path = format!("/model/layers.{layer}/attn/{which}_norm");
        let weight = format!("model.layers.{layer}.attn.{which}_norm.layernorm.weight");
        let source = format!("model.layers.{layer}.self_attn.{which}_norm.weight");
        self.initializer(&weight, vec![c.head_dim], Content::Copy(source), None);
        let rows = self.reshape(&format!("{path}/Reshape_1"), x, c.head_dim);
        let norm = format!("{path}/SimplifiedLayerNormalization");
        let normed = format!("{norm}/output_0");
        let node = self.graph.node("SimplifiedLayerNormalization", &[&rows, &weight]);
        let node = node.float("epsilon", c.rms_norm_eps as f32);
        let node = node.int("axis", -1).int("stash_type", 1);
        node.named(&norm, &[&normed]);
        self.reshape(&format!("{path}/Reshape_2"), &normed, width)
    }

    /// `x` as `[B, rows, columns]`, with as many rows as it takes.
    fn reshape(&mut self, path: &str, x: &str, columns: usize) -> String {
        let (shape, out) = (format!("{path}/shape"), format!("{path}/output_0"));
        // 0: the batch as it is.
        self.constant(&[3], &[0, -1, columns as i64], &shape, &shape);
        self.graph.node("Reshape", &[x, &shape]).named(path, &[&out]);
        out
    }

    fn mlp(&mut self, layer: usize, x: &str) -> String {
        let c = self.config;
        let name = |p: &str| format!("model.layers.{layer}.mlp.{p}_proj");
        let whole = |p: &str, rows| vec![Part::whole(format!("{}.weight", name(p)), rows)];
        let f = c.intermediate_size;
        let [gate, up] = match c.family {
            // One tensor: first all of gate, then all of up.
            Family::Phi3 => [0, f].map(|first| {
                vec![Part {
                    tensor: format!("{}.weight", name("gate_up")),
                    first,
                    rows: f,
                    of: 2 * f,
                }]
            }),
            _ => [whole("gate", f), whole("up", f)],
        };
        let gate = self.matmul(&name("gate"), x, c.hidden_size, gate);
        let up = self.matmul(&name("up"), x, c.hidden_size, up);
        let path = format!("/model/layers.{layer}/mlp");
        let (sigmoid, act, product) = (
            format!("{path}/act_fn/Sigmoid"),
            format!("{path}/act_fn/Mul"),
            format!("{path}/Mul"),
        );
        let out = |p: &str| format!("{p}/output_0");
        let node = self.graph.node("Sigmoid", &[&gate]);
        node.named(&sigmoid, &[&out(&sigmoid)]);
        let node = self.graph.node("Mul", &[&gate, &out(&sigmoid)]);
        node.named(&act, &[&out(&act)]);
        let node = self.graph.node("Mul", &[&out(&act), &up]);
        node.named(&product, &[&out(&product)]);
        let down = whole("down", c.hidden_size);
        self.matmul(&name("down"), &out(&product), f, down)
    }

    fn lm_head(&mut self, x: &str) {
        let c = self.config;
        if let Some(quantiser) = &mut self.quantiser {
            let tensor = if c.tie_word_embeddings { EMBED } else { "lm_head.weight" };
            let part = Part::whole(tensor.to_owned(), c.vocab_size);
            return quantiser.head(&mut self.graph, &mut self.initializers, x, c.hidden_size, part);
        }
        let weight = if c.tie_word_embeddings {
            // One copy of the embedding in the file, as the builder's shared embeddings have it.
            let out = "/lm_head/Transpose/output_0";
            self.graph
                .node("Transpose", &[EMBED])
                .named("/lm_head/Transpose", &[out]);
            out.to_owned()
        } else {
            let name = "lm_head.MatMul.weight";
            let parts = vec![Part::whole("lm_head.weight".to_owned(), c.vocab_size)];
            self.linear(name, c.hidden_size, parts);
            name.to_owned()
        };
        let node = self.graph.node("MatMul", &[x, &weight]);
        node.named("/lm_head/MatMul", &["logits"]);
    }

    /// `x` times the side-by-side transposes of `parts`, as the node and initializer names of `module`.
    fn matmul(&mut self, module: &str, x: &str, inner: usize, parts: Vec<Part>) -> String {
        if let Some(quantiser) = &mut self.quantiser {
            let (graph, initializers) = (&mut self.graph, &mut self.initializers);
            return quantiser.linear(graph, initializers, (module, &path(module)), x, inner, parts);
        }
        let weight = format!("{module}.MatMul.weight");
        self.linear(&weight, inner, parts);
        let path = format!("{}/MatMul", path(module));
        let out = format!("{path}/output_0");
        self.graph.node("MatMul", &[x, &weight]).named(&path, &[&out]);
        out
    }

    /// `x` plus the biases `parts`, one after the other.
    fn bias(&mut self, module: &str, x: &str, parts: Vec<Part>) -> String {
        let bias = format!("{module}.Add.bias");
        let width = parts.iter().map(|part| part.rows).sum();
        self.initializer(&bias, vec![width], Content::Joined(parts), Some(0.02));
        let path = format!("{}/Add", path(module));
        let out = format!("{path}/output_0");
        self.graph.node("Add", &[x, &bias]).named(&path, &[&out]);
        out
    }

    fn linear(&mut self, name: &str, inner: usize, parts: Vec<Part>) {
        let outer = parts.iter().map(|part| part.rows).sum();
        let std = Some(1.0 / (inner as f32).sqrt());
        self.initializer(name, vec![inner, outer], Content::Transposed(parts), std);
    }

    fn initializer(&mut self, name: &str, dims: Vec<usize>, content: Content, std: Option<f32>) {
        self.initializers.push(Initializer {
            name: name.into(),
            dims,
            content,
            std,
            same_as: None,
        });
    }

    /// A node of one of ONNX Runtime's contrib operators.
    fn microsoft(&mut self, op_type: &str, inputs: &[&str]) -> NodeBuilder<'_> {
        self.graph.node(op_type, inputs).domain("com.microsoft")
    }
}

/// "model.layers.0.attn.o_proj" is in the paths of nodes "/model/layers.0/attn/o_proj".
fn path(module: &str) -> String {
    format!("/{}", module.replace('.', "/").replacen("layers/", "layers.", 1))
}
