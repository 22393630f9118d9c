//! Greedy generation with a converted model from Rust, on the CPU, with nothing but the crate `ort`. Every call copies the caches;
//! `generate.py` and `generate.cc` beside this file bind them in place.
//!
//!     cargo build --release --example generate
//!     target/release/examples/generate libonnxruntime.so libretro_attention.so OUT/model.onnx 100 1,2,3
//!
//! The arguments: ONNX Runtime 1.24 or newer, the plugin, a model in float32 that retro-export wrote, how many tokens to make, and
//! the prompt's token numbers. `ORT_DISABLE_TELEMETRY=1` in the environment keeps ONNX Runtime from recording telemetry.

use std::{collections::HashMap, error::Error, process::ExitCode};

use ort::{
    session::Session,
    value::{DynValue, Outlet, Tensor, TensorElementType, ValueType},
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[String]) -> Result<String> {
    let [library, plugin, model, count, ids] = arguments else {
        return Err("usage: generate LIBONNXRUNTIME PLUGIN MODEL.onnx N_PREDICT ID,ID,...".into());
    };
    let count: usize = count.parse()?;
    let ids = ids
        .split(',')
        .map(str::parse)
        .collect::<std::result::Result<Vec<i64>, _>>()?;
    let environment = ort::init_from(library)?.build()?;
    let mut session = ort::session::Session::builder(&environment)?
        .with_operator_library(plugin)?
        .commit_from_file(model)?;
    let mut generator = Generator::new(&mut session, ids.len() + count)?;
    let made = generator.generate(ids, count)?;
    Ok(made.iter().map(i64::to_string).collect::<Vec<_>>().join(","))
}

struct Generator<'a> {
    session: &'a mut Session,
    window: usize,
    /// Else the graph keeps its window and feeds the tokens of it again by itself: to it each step is one token.
    feeds_window: bool,
    /// Integer inputs, and whether they are int32 instead of int64.
    fed: HashMap<String, bool>,
    /// Caches and state, by the names of the inputs.
    past: HashMap<String, DynValue>,
}

impl<'a> Generator<'a> {
    /// For a sequence of up to `capacity` tokens.
    fn new(session: &'a mut Session, capacity: usize) -> Result<Self> {
        let (window, page_size, feeds_window) = {
            let metadata = session.metadata()?;
            let number = |key: &str| -> Result<usize> {
                let value = metadata
                    .custom(key)
                    .ok_or("the model was not converted by retro-export")?;
                Ok(value.parse()?)
            };
            let feeds_window = metadata.custom("retro.window_in_graph").is_none();
            let window = if feeds_window { number("retro.window")? } else { 1 };
            (window, number("retro.page_size")?, feeds_window)
        };
        let (mut fed, mut past) = (HashMap::new(), HashMap::new());
        for input in session.inputs() {
            let ValueType::Tensor { ty, .. } = input.dtype() else {
                return Err(format!("the input {} is no tensor", input.name()).into());
            };
            let name = input.name().to_owned();
            if !name.starts_with("past_") {
                fed.insert(name, *ty == TensorElementType::Int32);
                continue;
            }
            // Codes of keys lie in blocks of 128 tokens, all else of pages page by page.
            let rows = match ty {
                TensorElementType::Uint8 => 128,
                _ if name.contains(".page_") => page_size,
                _ => 1,
            };
            let shape = shape(input, session.inputs(), capacity.div_ceil(rows))?;
            let size = shape.iter().product();
            let zeros: DynValue = match ty {
                TensorElementType::Float32 => Tensor::from_array((shape, vec![0f32; size]))?.into_dyn(),
                TensorElementType::Int32 => Tensor::from_array((shape, vec![0i32; size]))?.into_dyn(),
                TensorElementType::Uint8 => Tensor::from_array((shape, vec![0u8; size]))?.into_dyn(),
                other => {
                    return Err(format!("the input {name} is a {other}, and this example takes float32 only").into());
                }
            };
            past.insert(name, zeros);
        }
        Ok(Self {
            session,
            window,
            feeds_window,
            fed,
            past,
        })
    }

    fn generate(&mut self, mut ids: Vec<i64>, count: usize) -> Result<Vec<i64>> {
        let (prompt, mut retro) = (ids.len(), 0);
        let mut token = self.feed(&ids, ids.len(), -1)?;
        while ids.len() < prompt + count {
            ids.push(token);
            // The last few tokens are fed again, for the pages that the new one loads to correct them.
            token = self.feed(&ids[ids.len() - 1 - retro..], ids.len(), i32::try_from(retro)?)?;
            retro = (retro + 1).min(self.window - 1);
        }
        Ok(ids.split_off(prompt))
    }

    /// Feeds tokens of which the last is number `length`; gives the likeliest next one.
    fn feed(&mut self, tokens: &[i64], length: usize, retro_length: i32) -> Result<i64> {
        // Tokens that are fed again keep the positions they had.
        let positions = (length - tokens.len()..length).map(|p| p as i64).collect();
        let integers = [
            ("input_ids", tokens.to_vec()),
            ("attention_mask", vec![1; length]),
            ("position_ids", positions),
        ];
        let mut inputs: Vec<(String, DynValue)> = self.past.drain().collect();
        for (name, numbers) in integers {
            let shape = [1, numbers.len()];
            let value = match self.fed.get(name) {
                None => continue,
                Some(true) => {
                    let narrow: Vec<i32> = numbers
                        .into_iter()
                        .map(i32::try_from)
                        .collect::<std::result::Result<_, _>>()?;
                    Tensor::from_array((shape, narrow))?.into_dyn()
                }
                Some(false) => Tensor::from_array((shape, numbers))?.into_dyn(),
            };
            inputs.push((name.to_owned(), value));
        }
        if self.feeds_window {
            let retro_length = Tensor::from_array(([1], vec![retro_length]))?;
            inputs.push(("retro_length".to_owned(), retro_length.into_dyn()));
        }

        let mut next = None;
        for (name, value) in self.session.run(inputs)? {
            if name == "logits" {
                let (shape, logits) = value.try_extract_tensor::<f32>()?;
                let vocabulary = shape.last().map_or(0, |size| *size as usize);
                let newest = logits[logits.len() - vocabulary..].iter().enumerate();
                next = newest.max_by(|x, y| x.1.total_cmp(y.1)).map(|(token, _)| token as i64);
            } else {
                let past = match name.strip_prefix("present_retro.") {
                    Some(rest) => format!("past_retro.{rest}"),
                    None => name.replacen("present", "past_key_values", 1),
                };
                self.past.insert(past, value);
            }
        }
        next.ok_or_else(|| "the model has no logits".into())
    }
}

/// What is not declared: the batch, the number of tokens, pages or blocks, and head sizes that an exporter has only named.
fn shape(input: &Outlet, inputs: &[Outlet], count: usize) -> Result<Vec<usize>> {
    let name = input.name();
    let declared = |outlet: &Outlet| {
        outlet
            .dtype()
            .tensor_shape()
            .map(|shape| shape.to_vec())
            .unwrap_or_default()
    };
    let layer = name.split('.').nth(1).unwrap_or_default();
    let outputs = inputs
        .iter()
        .find(|i| i.name() == format!("past_retro.{layer}.outputs"));
    let head_size = outputs.and_then(|outputs| usize::try_from(*declared(outputs).get(3)?).ok());
    let sizes = declared(input)
        .into_iter()
        .enumerate()
        .map(|(axis, size)| match (usize::try_from(size), axis) {
            (Ok(size), _) => Some(size),
            (_, 0) => Some(1),
            (_, 2) => Some(count),
            (_, 3) => head_size,
            _ => None,
        });
    let shape: Option<Vec<usize>> = sizes.collect();
    shape.ok_or_else(|| format!("the sizes of {name} are not all declared").into())
}
