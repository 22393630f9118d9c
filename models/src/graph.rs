//! The graph of a Llama, node for node as onnxruntime-genai's builder 0.18 writes it for the CPU:
//! packed q/k/v projection, `com.microsoft::GroupQueryAttention` with RoPE inside, fused residual norms, SwiGLU.
//!
//! B batch, S tokens fed, `past` and `total` lengths of the cache: all symbolic dimensions of the inputs and outputs.

use retro_onnx::DataType;

use crate::{
    config::LlamaConfig,
    dtype::Dtype,
    initializer::{Content, Initializer},
};

/// A node's attribute.
#[derive(Clone, Debug, PartialEq)]
pub enum Attribute {
    Int(i64),
    Float(f32),
    /// An int64 tensor, with its dimensions.
    Int64s(Vec<i64>, Vec<i64>),
}

#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    pub op_type: &'static str,
    pub domain: &'static str,
    pub name: String,
    pub inputs: Vec<String>,
    pub outputs: Vec<String>,
    pub attributes: Vec<(&'static str, Attribute)>,
}

/// A dimension of a graph input or output.
#[derive(Clone, Debug, PartialEq)]
pub enum Dim {
    Is(usize),
    Named(&'static str),
}

/// A typed graph input or output.
#[derive(Clone, Debug, PartialEq)]
pub struct Value {
    pub name: String,
    pub elem_type: DataType,
    pub dims: Vec<Dim>,
}

/// Everything of the model but the weights' bytes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Graph {
    pub nodes: Vec<Node>,
    pub inputs: Vec<Value>,
    pub outputs: Vec<Value>,
    pub initializers: Vec<Initializer>,
}

const MICROSOFT: &str = "com.microsoft";
const COS: &str = "cos_cache";
const SIN: &str = "sin_cache";
const MASK: &str = "/model/attn_mask_reformat/attn_mask_subgraph";
const EMBED: &str = "model.embed_tokens.weight";

/// The graph of `config` with elements of type `dtype`.
///
/// Inputs: input_ids int64 `[B, S]`, attention_mask int64 `[B, total]`, past_key_values.N.key and .value `[B, Hkv, past, D]`.
/// Outputs: logits `[B, S, V]`, present.N.key and .value `[B, Hkv, total, D]`.
pub fn llama(config: &LlamaConfig, dtype: Dtype) -> Graph {
    let mut b = Builder {
        graph: Graph::default(),
        config,
        dtype,
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
    b.graph
}

struct Builder<'a> {
    graph: Graph,
    config: &'a LlamaConfig,
    dtype: Dtype,
}

impl Builder<'_> {
    fn interface(&mut self) {
        let (kv_heads, head_dim, dtype) = (self.config.kv_heads, self.config.head_dim, self.dtype.onnx());
        let value = |name: String, elem_type, dims: Vec<Dim>| Value { name, elem_type, dims };
        let cache = |name: String, length| {
            value(
                name,
                dtype,
                vec![
                    Dim::Named("batch_size"),
                    Dim::Is(kv_heads),
                    Dim::Named(length),
                    Dim::Is(head_dim),
                ],
            )
        };
        let batch = Dim::Named("batch_size");
        let inputs = &mut self.graph.inputs;
        inputs.push(value(
            "input_ids".into(),
            DataType::Int64,
            vec![batch.clone(), Dim::Named("sequence_length")],
        ));
        inputs.push(value(
            "attention_mask".into(),
            DataType::Int64,
            vec![batch.clone(), Dim::Named("total_sequence_length")],
        ));
        let outputs = &mut self.graph.outputs;
        let logits = vec![batch, Dim::Named("sequence_length"), Dim::Is(self.config.vocab_size)];
        outputs.push(value("logits".into(), dtype, logits));
        // All keys, then all values, as builder 0.18 orders them.
        for kind in ["key", "value"] {
            for layer in 0..self.config.layers {
                inputs.push(cache(format!("past_key_values.{layer}.{kind}"), "past_sequence_length"));
                outputs.push(cache(format!("present.{layer}.{kind}"), "total_sequence_length"));
            }
        }
    }

    /// seqlens_k = number of ones of each row - 1, total_sequence_length = width of the mask, both int32.
    fn mask(&mut self) {
        let (list, scalar) = ("/model/constants/INT64/[1]", "/model/constants/INT64/1");
        let one = |dims| [("value", Attribute::Int64s(vec![1], dims))];
        let name = "/model/constant_nodes/INT64";
        self.node("Constant", "", &format!("{name}/[1]"), &[], &[list], &one(vec![1]));
        let path = |op: &str| format!("{MASK}/{op}");
        let out = |op: &str| format!("{MASK}/{op}/output_0");
        let keep = [("keepdims", Attribute::Int(0))];
        self.node(
            "ReduceSum",
            "",
            &path("ReduceSum"),
            &["attention_mask", list],
            &[&out("ReduceSum")],
            &keep,
        );
        self.node("Sub", "", &path("Sub"), &[&out("ReduceSum"), list], &[&out("Sub")], &[]);
        let to = [("to", Attribute::Int(DataType::Int32 as i64))];
        self.node("Cast", "", &path("Sub/Cast"), &[&out("Sub")], &[&out("Sub/Cast")], &to);
        self.node("Shape", "", &path("Shape"), &["attention_mask"], &[&out("Shape")], &[]);
        self.node("Constant", "", &format!("{name}/1"), &[], &[scalar], &one(vec![]));
        let axis = [("axis", Attribute::Int(0))];
        self.node(
            "Gather",
            "",
            &path("Gather"),
            &[&out("Shape"), scalar],
            &[&out("Gather")],
            &axis,
        );
        self.node(
            "Cast",
            "",
            &path("Gather/Cast"),
            &[&out("Gather")],
            &[&out("Gather/Cast")],
            &to,
        );
    }

    fn embedding(&mut self) -> String {
        let c = self.config;
        let std = 1.0; // RMSNorm makes the scale of the residual stream's start a matter of taste
        self.initializer(
            EMBED,
            vec![c.vocab_size, c.hidden_size],
            Content::Copy(EMBED.into()),
            Some(std),
        );
        let out = "/model/embed_tokens/Gather/output_0";
        self.node(
            "Gather",
            "",
            "/model/embed_tokens/Gather",
            &[EMBED, "input_ids"],
            &[out],
            &[],
        );
        for (name, sin) in [(COS, false), (SIN, true)] {
            self.initializer(name, vec![c.max_positions, c.head_dim / 2], Content::Rope { sin }, None);
        }
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
        let epsilon = ("epsilon", Attribute::Float(self.config.rms_norm_eps as f32));
        match branch {
            None => {
                let attributes = [epsilon, ("axis", Attribute::Int(-1)), ("stash_type", Attribute::Int(1))];
                let name = format!("{path}/LayerNorm");
                self.node(
                    "SimplifiedLayerNormalization",
                    "",
                    &name,
                    &[residual, &weight],
                    &[&normed],
                    &attributes,
                );
                (normed, residual.into())
            }
            Some(branch) => {
                let name = format!("{path}/SkipLayerNorm");
                let inputs = [residual, branch, &weight];
                let last = layer == self.config.layers;
                let all = [normed.as_str(), "", "", sum.as_str()];
                let outputs = if last { &all[..1] } else { &all[..] };
                self.node(
                    "SkipSimplifiedLayerNormalization",
                    MICROSOFT,
                    &name,
                    &inputs,
                    outputs,
                    &[epsilon],
                );
                (normed, sum)
            }
        }
    }

    fn attention(&mut self, layer: usize, x: &str) -> String {
        let c = self.config;
        let hf = |p: &str| format!("model.layers.{layer}.self_attn.{p}_proj.weight");
        let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let parts = vec![(hf("q"), q), (hf("k"), kv), (hf("v"), kv)];
        let qkv = self.matmul(&format!("model.layers.{layer}.attn.qkv_proj"), x, c.hidden_size, parts);
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
            &qkv,
            "",
            "",
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
        let attributes = [
            ("num_heads", Attribute::Int(c.heads as i64)),
            ("kv_num_heads", Attribute::Int(c.kv_heads as i64)),
            ("scale", Attribute::Float((1.0 / (c.head_dim as f64).sqrt()) as f32)),
            ("local_window_size", Attribute::Int(-1)),
            ("softcap", Attribute::Float(0.0)),
            ("do_rotary", Attribute::Int(1)),
            ("rotary_interleaved", Attribute::Int(0)),
        ];
        let outputs = [out.as_str(), &present("key"), &present("value")];
        self.node("GroupQueryAttention", MICROSOFT, &path, &inputs, &outputs, &attributes);
        self.matmul(
            &format!("model.layers.{layer}.attn.o_proj"),
            &out,
            q,
            vec![(hf("o"), c.hidden_size)],
        )
    }

    fn mlp(&mut self, layer: usize, x: &str) -> String {
        let c = self.config;
        let name = |p: &str| format!("model.layers.{layer}.mlp.{p}_proj");
        let part = |p: &str, out| vec![(format!("{}.weight", name(p)), out)];
        let gate = self.matmul(&name("gate"), x, c.hidden_size, part("gate", c.intermediate_size));
        let up = self.matmul(&name("up"), x, c.hidden_size, part("up", c.intermediate_size));
        let path = format!("/model/layers.{layer}/mlp");
        let (sigmoid, act, product) = (
            format!("{path}/act_fn/Sigmoid"),
            format!("{path}/act_fn/Mul"),
            format!("{path}/Mul"),
        );
        let out = |p: &str| format!("{p}/output_0");
        self.node("Sigmoid", "", &sigmoid, &[&gate], &[&out(&sigmoid)], &[]);
        self.node("Mul", "", &act, &[&gate, &out(&sigmoid)], &[&out(&act)], &[]);
        self.node("Mul", "", &product, &[&out(&act), &up], &[&out(&product)], &[]);
        let down = part("down", c.hidden_size);
        self.matmul(&name("down"), &out(&product), c.intermediate_size, down)
    }

    fn lm_head(&mut self, x: &str) {
        let c = self.config;
        let weight = if c.tie_word_embeddings {
            // One copy of the embedding in the file, as the builder's shared embeddings have it.
            let out = "/lm_head/Transpose/output_0";
            self.node("Transpose", "", "/lm_head/Transpose", &[EMBED], &[out], &[]);
            out.to_owned()
        } else {
            let name = "lm_head.MatMul.weight";
            let parts = vec![("lm_head.weight".to_owned(), c.vocab_size)];
            self.linear(name, c.hidden_size, parts);
            name.to_owned()
        };
        self.node("MatMul", "", "/lm_head/MatMul", &[x, &weight], &["logits"], &[]);
    }

    /// `x` times the side-by-side transposes of `parts`, as the node and initializer names of `module`.
    fn matmul(&mut self, module: &str, x: &str, inner: usize, parts: Vec<(String, usize)>) -> String {
        let weight = format!("{module}.MatMul.weight");
        self.linear(&weight, inner, parts);
        // "model.layers.0.attn.o_proj" names the node "/model/layers.0/attn/o_proj/MatMul".
        let path = format!("/{}/MatMul", module.replace('.', "/").replacen("layers/", "layers.", 1));
        let out = format!("{path}/output_0");
        self.node("MatMul", "", &path, &[x, &weight], &[&out], &[]);
        out
    }

    fn linear(&mut self, name: &str, inner: usize, parts: Vec<(String, usize)>) {
        let outer = parts.iter().map(|(_, n)| n).sum();
        let std = Some(1.0 / (inner as f32).sqrt());
        self.initializer(name, vec![inner, outer], Content::Transposed(parts), std);
    }

    fn initializer(&mut self, name: &str, dims: Vec<usize>, content: Content, std: Option<f32>) {
        self.graph.initializers.push(Initializer {
            name: name.into(),
            dims,
            content,
            std,
        });
    }

    fn node(
        &mut self,
        op_type: &'static str,
        domain: &'static str,
        name: &str,
        inputs: &[&str],
        outputs: &[&str],
        attributes: &[(&'static str, Attribute)],
    ) {
        let owned = |list: &[&str]| list.iter().map(|&s| s.to_owned()).collect();
        let (name, inputs, outputs) = (name.to_owned(), owned(inputs), owned(outputs));
        self.graph.nodes.push(Node {
            op_type,
            domain,
            name,
            inputs,
            outputs,
            attributes: attributes.to_vec(),
        });
    }
}
