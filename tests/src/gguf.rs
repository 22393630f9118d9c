//! Tiny models in GGUF files, of every architecture and tensor type that `retro-models build` reads. Their weights are
//! numbers of a generator: the same on every run.

use half::f16;
use retro_gguf::{TensorType, Writer};

/// A tiny model's name and what is particular about it.
#[derive(Clone, Copy, Debug)]
pub struct TinyGguf {
    /// Name of the file, without its ending.
    pub name: &'static str,
    /// `general.architecture`.
    pub architecture: &'static str,
    /// Head size D; `None`: hidden size / heads, and not said in the file.
    pub head_dim: Option<usize>,
    /// The output projection is a tensor of its own.
    pub head: bool,
    /// RoPE's frequencies are divided by a tensor's numbers.
    pub divisors: bool,
    /// RoPE's positions are divided by this.
    pub linear: Option<f32>,
    /// The tokenizer is SentencePiece's, not byte-level BPE.
    pub sentencepiece: bool,
    /// The embedding's type; all matrices then have codes.
    pub coded: Option<TensorType>,
}

/// A model with SentencePiece's tokenizer, and so with more tokens than those of [`TINY_GGUFS`].
pub const SENTENCEPIECE: TinyGguf = TinyGguf {
    sentencepiece: true,
    ..TinyGguf::of("sentencepiece", "llama")
};

/// All of them.
pub const TINY_GGUFS: [TinyGguf; 6] = [
    TinyGguf::of("llama", "llama"),
    TinyGguf {
        head: true,
        divisors: true,
        ..TinyGguf::of("llama3", "llama")
    },
    TinyGguf {
        linear: Some(4.0),
        ..TinyGguf::of("linear", "llama")
    },
    TinyGguf::of("qwen2", "qwen2"),
    TinyGguf {
        head_dim: Some(32),
        ..TinyGguf::of("qwen3", "qwen3")
    },
    TinyGguf {
        head: true,
        ..TinyGguf::of("phi3", "phi3")
    },
];

/// Width of the residual stream: a block of the smaller types.
pub const HIDDEN: usize = 32;
/// Width of the feed-forward layer: a block of the K types.
pub const FFN: usize = 256;
/// Query heads.
pub const HEADS: usize = 2;
/// KV heads.
pub const KV_HEADS: usize = 1;
/// Decoder layers.
pub const LAYERS: usize = 3;

impl TinyGguf {
    const fn of(name: &'static str, architecture: &'static str) -> Self {
        Self {
            name,
            architecture,
            head_dim: None,
            head: false,
            divisors: false,
            linear: None,
            sentencepiece: false,
            coded: None,
        }
    }

    /// The same model with an embedding of this type, and types with codes where it has F16 and BF16.
    pub const fn coded(self, embedding: TensorType) -> Self {
        Self {
            coded: Some(embedding),
            ..self
        }
    }

    /// Tokens.
    pub const fn vocabulary(&self) -> usize {
        if self.sentencepiece { 294 } else { 64 }
    }

    /// The file's bytes.
    pub fn bytes(&self) -> Vec<u8> {
        self.writer().finish()
    }

    /// The file, to which more may be added.
    pub fn writer(&self) -> Writer {
        let mut file = Writer::new();
        self.metadata(&mut file);
        if self.sentencepiece {
            sentencepiece(&mut file);
        } else {
            byte_level(&mut file);
        }
        self.tensors(&mut file);
        file
    }

    fn metadata(&self, file: &mut Writer) {
        let key = |name: &str| format!("{}.{name}", self.architecture);
        file.string("general.architecture", self.architecture)
            .string("general.name", "tiny");
        for (name, value) in [
            ("block_count", LAYERS),
            ("context_length", 512),
            ("embedding_length", HIDDEN),
            ("feed_forward_length", FFN),
            ("attention.head_count", HEADS),
            ("attention.head_count_kv", KV_HEADS),
        ] {
            file.u32(&key(name), value as u32);
        }
        let head_dim = self.head_dim.unwrap_or(HIDDEN / HEADS) as u32;
        file.u32(&key("rope.dimension_count"), head_dim);
        if self.head_dim.is_some() {
            file.u32(&key("attention.key_length"), head_dim)
                .u32(&key("attention.value_length"), head_dim);
        }
        file.f32(&key("attention.layer_norm_rms_epsilon"), 1e-5)
            .f32(&key("rope.freq_base"), 1000.0);
        if let Some(factor) = self.linear {
            file.string(&key("rope.scaling.type"), "linear")
                .f32(&key("rope.scaling.factor"), factor);
        }
    }

    fn tensors(&self, file: &mut Writer) {
        let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15 ^ self.name.len() as u64);
        let mut add = |name: &str, shape: &[usize], kind: TensorType| {
            let blocks = numbers.tensor(shape, kind);
            file.tensor(name, shape, kind, &blocks);
        };
        let head_dim = self.head_dim.unwrap_or(HIDDEN / HEADS);
        let (q, kv) = (HEADS * head_dim, KV_HEADS * head_dim);
        let embedding = self.coded.unwrap_or(TensorType::Q5_1);
        let [half, bf16] = match self.coded {
            Some(_) => [TensorType::Q4_1, TensorType::Q5_1],
            None => [TensorType::F16, TensorType::Bf16],
        };
        add("token_embd.weight", &[self.vocabulary(), HIDDEN], embedding);
        add("output_norm.weight", &[HIDDEN], TensorType::F32);
        if self.head {
            add("output.weight", &[self.vocabulary(), HIDDEN], TensorType::Q8_0);
        }
        let down = [TensorType::Q4K, TensorType::Q5K, TensorType::Q6K];
        for (layer, down) in down.into_iter().enumerate() {
            let name = |tensor: &str| format!("blk.{layer}.{tensor}");
            add(&name("attn_norm.weight"), &[HIDDEN], TensorType::F32);
            add(&name("ffn_norm.weight"), &[HIDDEN], TensorType::F32);
            if self.architecture == "phi3" {
                add(&name("attn_qkv.weight"), &[q + 2 * kv, HIDDEN], TensorType::Q4_0);
                add(&name("ffn_up.weight"), &[2 * FFN, HIDDEN], TensorType::Q5_0);
            } else {
                add(&name("attn_q.weight"), &[q, HIDDEN], TensorType::Q4_0);
                add(&name("attn_k.weight"), &[kv, HIDDEN], TensorType::Q4_1);
                add(&name("attn_v.weight"), &[kv, HIDDEN], TensorType::Q8_0);
                add(&name("ffn_gate.weight"), &[FFN, HIDDEN], bf16);
                add(&name("ffn_up.weight"), &[FFN, HIDDEN], TensorType::Q5_0);
            }
            if self.architecture == "qwen2" {
                add(&name("attn_q.bias"), &[q], TensorType::F32);
                add(&name("attn_k.bias"), &[kv], TensorType::F32);
                add(&name("attn_v.bias"), &[kv], TensorType::F32);
            }
            if self.architecture == "qwen3" {
                add(&name("attn_q_norm.weight"), &[head_dim], TensorType::F32);
                add(&name("attn_k_norm.weight"), &[head_dim], TensorType::F32);
            }
            add(&name("attn_output.weight"), &[HIDDEN, q], half);
            add(&name("ffn_down.weight"), &[HIDDEN, FFN], down);
        }
        if self.divisors {
            let divisors = (0..head_dim / 2).flat_map(|j| (1.0 + j as f32 * 2.5).to_le_bytes());
            let divisors: Vec<u8> = divisors.collect();
            file.tensor("rope_freqs.weight", &[head_dim / 2], TensorType::F32, &divisors);
        }
    }
}

/// SentencePiece: three tokens with a meaning, the bytes, and pieces of which those listed first score best.
fn sentencepiece(file: &mut Writer) {
    let mut tokens: Vec<(String, i32)> = vec![("<unk>".into(), 2), ("<s>".into(), 3), ("</s>".into(), 3)];
    tokens.extend((0..256).map(|byte| (format!("<0x{byte:02X}>"), 6)));
    let pieces = "th in he ▁t ▁the ▁th the ing ▁in er ▁s si ▁si ▁sing sing ▁▁ ▁ a b c d e f g h i n o r s t u . ,";
    tokens.extend(pieces.split(' ').map(|piece| (piece.to_owned(), 1)));
    tokens.push(("<turn>".into(), 4));
    let (texts, kinds): (Vec<String>, Vec<i32>) = tokens.into_iter().unzip();
    let scores: Vec<f32> = (0..texts.len()).map(|id| 259.0 - id as f32).collect();
    file.string("tokenizer.ggml.model", "llama")
        .strings("tokenizer.ggml.tokens", &texts)
        .f32s("tokenizer.ggml.scores", &scores)
        .i32s("tokenizer.ggml.token_type", &kinds)
        .u32("tokenizer.ggml.bos_token_id", 1)
        .u32("tokenizer.ggml.eos_token_id", 2)
        .u32("tokenizer.ggml.unknown_token_id", 0);
}

/// Byte-level BPE: three tokens with a meaning, 57 characters, four merges.
fn byte_level(file: &mut Writer) {
    let mut tokens: Vec<String> = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        .map(str::to_owned)
        .to_vec();
    tokens.extend("ĠĊ.,!?'-0123456789".chars().map(String::from));
    tokens.extend(('A'..='M').chain('a'..='z').map(String::from));
    tokens.extend(["th", "the", "Ġthe", "in"].map(str::to_owned));
    let kinds: Vec<i32> = (0..tokens.len()).map(|id| if id < 3 { 3 } else { 1 }).collect();
    file.string("tokenizer.ggml.model", "gpt2")
        .string("tokenizer.ggml.pre", "smollm")
        .strings("tokenizer.ggml.tokens", &tokens)
        .i32s("tokenizer.ggml.token_type", &kinds)
        .strings("tokenizer.ggml.merges", &["t h", "th e", "Ġ the", "i n"])
        .u32("tokenizer.ggml.bos_token_id", 1)
        .u32("tokenizer.ggml.eos_token_id", 2)
        .string("tokenizer.chat_template", "{{ messages[0].content }}");
}

/// A linear congruential generator.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        self.0 >> 33
    }

    /// Evenly between -1 and 1.
    fn even(&mut self) -> f32 {
        (self.next() % 65536) as f32 / 32768.0 - 1.0
    }

    /// A matrix's elements have a deviation of about 1 / sqrt(columns). Vectors are norms' scales and biases.
    fn tensor(&mut self, shape: &[usize], kind: TensorType) -> Vec<u8> {
        let elements: usize = shape.iter().product();
        if shape.len() == 1 {
            let values = (0..elements).flat_map(|_| (1.0 + 0.3 * self.even()).to_le_bytes());
            return values.collect();
        }
        let deviation = 1.0 / (shape[1] as f32).sqrt();
        (0..elements / kind.block())
            .flat_map(|_| self.block(kind, deviation))
            .collect()
    }

    fn block(&mut self, kind: TensorType, deviation: f32) -> Vec<u8> {
        // What one step of the codes is, by the deviation of even codes; each block's is another.
        let scale = deviation * (1.0 + 0.5 * self.even());
        let half = |x: f32| f16::from_f32(x).to_le_bytes();
        let value = 1.7 * self.even() * deviation;
        let mut bytes: Vec<u8> = (0..kind.block_bytes()).map(|_| self.next() as u8).collect();
        let mut put = |at: usize, new: [u8; 2]| bytes[at..at + 2].copy_from_slice(&new);
        match kind {
            TensorType::F32 => return value.to_le_bytes().to_vec(),
            TensorType::F16 => return half(value).to_vec(),
            TensorType::Bf16 => return half::bf16::from_f32(value).to_le_bytes().to_vec(),
            TensorType::Q8_0 => put(0, half(scale / 74.0)),
            TensorType::Q4_0 => put(0, half(scale / 4.6)),
            TensorType::Q5_0 => put(0, half(scale / 9.2)),
            TensorType::Q4_1 => {
                put(0, half(scale / 4.6));
                put(2, half(-7.5 * scale / 4.6));
            }
            TensorType::Q5_1 => {
                put(0, half(scale / 9.2));
                put(2, half(-15.5 * scale / 9.2));
            }
            TensorType::Q4K => {
                put(0, half(scale / (32.0 * 4.6)));
                put(2, half(7.5 * scale / (32.0 * 4.6)));
            }
            TensorType::Q5K => {
                put(0, half(scale / (32.0 * 9.2)));
                put(2, half(15.5 * scale / (32.0 * 9.2)));
            }
            TensorType::Q6K => put(208, half(scale / (74.0 * 18.5))),
        }
        bytes
    }
}
