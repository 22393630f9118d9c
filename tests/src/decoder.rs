//! A whole language model in genai's form, converted or not, decoded token by token with everything bound in place.

use std::{collections::BTreeMap, fs, path::Path};

use ort::value::{TensorElementType, ValueType};
use retro_contract::{SKETCH_BLOCK, graph, pages_for};
use serde_json::Value;

use crate::{
    host,
    tensor::{Dtype, Tens},
};

pub struct Decoder {
    session: host::Opened,
    /// Past and present names with their one buffer.
    state: Vec<(String, String, Tens)>,
    has_position_ids: bool,
    logits: Dtype,
    vocabulary: usize,
    /// A converted model gives the newest token's logits only, unless it was asked for all.
    all_logits: bool,
}

fn dtype(value: &ValueType) -> Dtype {
    match value {
        ValueType::Tensor {
            ty: TensorElementType::Float32,
            ..
        } => Dtype::F32,
        ValueType::Tensor {
            ty: TensorElementType::Float16,
            ..
        } => Dtype::F16,
        ValueType::Tensor {
            ty: TensorElementType::Bfloat16,
            ..
        } => Dtype::Bf16,
        ValueType::Tensor {
            ty: TensorElementType::Int32,
            ..
        } => Dtype::I32,
        ValueType::Tensor {
            ty: TensorElementType::Int64,
            ..
        } => Dtype::I64,
        ValueType::Tensor {
            ty: TensorElementType::Uint8,
            ..
        } => Dtype::U8,
        other => panic!("unexpected {other:?}"),
    }
}

impl Decoder {
    /// Opens `folder`/model.onnx with a cache of `capacity` tokens, all of it poison.
    pub fn open(folder: &Path, converted: bool, capacity: usize, page: usize, all_logits: bool) -> Self {
        let text = fs::read_to_string(folder.join("genai_config.json")).expect("genai_config.json");
        let config: Value = serde_json::from_str(&text).expect("genai_config.json");
        let decoder = &config["model"]["decoder"];
        let number = |value: &Value| value.as_u64().expect("a number") as i64;
        let kv_shape = [
            1,
            number(&decoder["num_key_value_heads"]),
            capacity as i64,
            number(&decoder["head_size"]),
        ];
        let session = host::open_file(&folder.join("model.onnx"), converted)
            .unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        let outputs: BTreeMap<&str, &ValueType> = session.outputs().iter().map(|o| (o.name(), o.dtype())).collect();
        let mut state = Vec::new();
        for input in session.inputs() {
            let past = input.name();
            let present = if past.starts_with("past_retro.") {
                past.replacen("past_retro.", "present_retro.", 1)
            } else if past.starts_with("past_key_values.") {
                past.replacen("past_key_values.", "present.", 1)
            } else {
                continue;
            };
            assert!(outputs.contains_key(present.as_str()), "{past} has no {present}");
            let shape = if past.starts_with("past_retro.") {
                retro_shape(past, input.dtype(), capacity, page)
            } else {
                kv_shape.map(|n| n as usize).to_vec()
            };
            let mut tensor = Tens::poisoned(dtype(input.dtype()), &shape);
            if !converted {
                // GroupQueryAttention's own kernel reads, and multiplies by 0, what is not valid.
                tensor.write(0, &vec![0.0; tensor.len()]);
            }
            state.push((past.to_owned(), present, tensor));
        }
        Self {
            has_position_ids: session.inputs().iter().any(|i| i.name() == "position_ids"),
            logits: dtype(outputs["logits"]),
            vocabulary: number(&config["model"]["vocab_size"]) as usize,
            session,
            state,
            all_logits: all_logits || !converted,
        }
    }

    /// Feeds tokens that end at position `length` - 1; their logits, or those of the newest. `retro`: for converted
    /// models.
    pub fn feed(&mut self, tokens: &[i64], length: usize, retro: Option<i32>, budget: Option<usize>) -> Vec<f32> {
        self.feed_masked(tokens, &vec![1; length], retro, budget)
            .unwrap_or_else(|e| panic!("{} tokens to {length}, retro {retro:?}: {e}", tokens.len()))
    }

    /// As [`Self::feed`] with an attention mask as long as what is known afterwards; the error is ONNX Runtime's.
    pub fn feed_masked(
        &mut self,
        tokens: &[i64],
        mask: &[i64],
        retro: Option<i32>,
        budget: Option<usize>,
    ) -> Result<Vec<f32>, String> {
        let (count, length) = (tokens.len(), mask.len());
        let first = (length - count) as i64;
        let positions: Vec<i64> = (first..length as i64).collect();
        let mut owned = vec![
            ("input_ids", Tens::longs(&[1, count], tokens)),
            ("attention_mask", Tens::longs(&[1, length], mask)),
        ];
        if self.has_position_ids {
            owned.push(("position_ids", Tens::longs(&[1, count], &positions)));
        }
        if let Some(retro) = retro {
            owned.push((graph::RETRO_LENGTH, Tens::ints(&[1], &[retro])));
        }
        if let Some(budget) = budget {
            owned.push((graph::PAGE_BUDGET, Tens::ints(&[1], &[budget as i32])));
        }
        let inputs: Vec<(&str, &Tens)> = owned.iter().map(|(name, t)| (*name, t)).collect();
        let rows = if self.all_logits { count } else { 1 };
        let mut logits = Tens::poisoned(self.logits, &[1, rows, self.vocabulary]);
        let in_place = self
            .state
            .iter_mut()
            .map(|(past, present, t)| (past.as_str(), present.as_str(), t));
        let mut in_place: Vec<_> = in_place.collect();
        host::run(&self.session, &inputs, &mut [("logits", &mut logits)], &mut in_place)?;
        Ok(logits.read())
    }

    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    pub fn state(&self, past: &str) -> &Tens {
        let found = self.state.iter().find(|(name, ..)| name == past);
        &found.unwrap_or_else(|| panic!("no input {past}")).2
    }
}

/// The declared shape with its free dimensions filled in: the batch is 1, the pages follow from the capacity.
fn retro_shape(name: &str, value: &ValueType, capacity: usize, page: usize) -> Vec<usize> {
    let ValueType::Tensor { ty, shape, .. } = value else {
        panic!("{name} is no tensor")
    };
    let fill = |(axis, &size): (usize, &i64)| match (axis, size) {
        (0, _) => 1,
        (_, 1..) => size as usize,
        (2, _) if *ty == TensorElementType::Uint8 => capacity.div_ceil(SKETCH_BLOCK),
        (2, _) if name.contains(".page_") => pages_for(capacity, page),
        _ => panic!("{name}: axis {axis} of {shape:?} is free"),
    };
    shape.iter().enumerate().map(fill).collect()
}
