//! Inputs beside tokens, mask, positions and caches, and what they are fed: embeddings, adapters, flags, what an encoder gave, state
//! that comes back. Both models get the same, so any numbers will do that the original takes.

use super::{compared_model::Feed, host_tensor::Value};
use crate::rules::{
    ATTENTION_MASK, Attention, AttentionMatch, INPUT_IDS, POSITION_IDS, Size, all_carried, named_sizes, noise, sizes,
};
use anyhow::Result;
use ort::value::TensorElementType;
use retro_contract::graph::{PAGE_BUDGET, RETRO_LENGTH};
use retro_onnx::{DataType, ValueInfoProto, graph::GraphView};

/// What an input is fed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fed {
    /// Numbers that look random: the same for a token whenever it is fed, and for a sequence in every call.
    Noise,
    Zeros,
    /// Whether there is a past.
    HasPast,
    Ones,
    /// Positions of the tokens fed.
    Positions,
    /// How many tokens there are in all, plus this.
    Length(i64),
    /// How many tokens came before.
    Past,
    /// What came back as this output.
    Carried(String),
}

/// An input.
#[derive(Clone, Debug)]
pub struct OtherInput {
    pub name: String,
    pub sizes: Vec<Size>,
    pub fed: Fed,
}

impl OtherInput {
    /// The output that it comes back as.
    pub fn carried(&self) -> Option<&str> {
        match &self.fed {
            Fed::Carried(present) => Some(present),
            _ => None,
        }
    }

    /// It counts tokens, those of padding too.
    pub fn counts(&self) -> bool {
        matches!(self.fed, Fed::Positions | Fed::Length(_) | Fed::Past)
    }

    pub fn shape(&self, feed: &Feed) -> Vec<usize> {
        let past = feed.total - feed.count;
        self.sizes
            .iter()
            .map(|s| s.of(feed.ids.len(), feed.count, past))
            .collect()
    }

    pub fn value(&self, ty: TensorElementType, feed: &Feed) -> Result<Value> {
        let shape = self.shape(feed);
        let n: usize = shape.iter().product();
        match self.fed {
            Fed::Noise => Value::reals(ty, &shape, &self.noise(&shape, feed)),
            Fed::Length(more) => Value::numbers(ty, &shape, &vec![feed.total as i64 + more; n]),
            Fed::Past => Value::numbers(ty, &shape, &vec![(feed.total - feed.count) as i64; n]),
            Fed::Positions => {
                let positions: Vec<i64> = (feed.total - feed.count..feed.total).map(|j| j as i64).collect();
                Value::numbers(ty, &shape, &positions.repeat(n / positions.len().max(1)))
            }
            Fed::HasPast => Value::numbers(ty, &shape, &vec![i64::from(feed.total > feed.count); n]),
            Fed::Ones => Value::numbers(ty, &shape, &vec![1; n]),
            Fed::Zeros | Fed::Carried(_) => Value::zeros(ty, &shape),
        }
    }

    fn noise(&self, shape: &[usize], feed: &Feed) -> Vec<f64> {
        let seed = self.name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| {
            (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
        });
        let id = |b: usize, j: usize| feed.ids.get(b).and_then(|row| row.get(j)).map_or(0, |id| *id as u64);
        // A sequence is known by its last token: its place among others may differ from run to run.
        let last = |b: usize| feed.ids.get(b).and_then(|row| row.last()).map_or(0, |id| *id as u64);
        let row = |n: usize, of: u64| noise(n, seed.wrapping_add(of.wrapping_mul(0x9e37_79b9)));
        let first = feed.total - feed.count;
        let width = |axes: usize| shape.iter().skip(axes).product::<usize>();
        match self.sizes.as_slice() {
            [Size::Sequences, Size::Tokens, ..] => (0..feed.ids.len())
                .flat_map(|b| (first..feed.total).map(move |j| (b, j)))
                .flat_map(|(b, j)| row(width(2), id(b, j)))
                .collect(),
            [Size::Tokens, ..] => (first..feed.total).flat_map(|j| row(width(1), id(0, j))).collect(),
            [Size::Sequences, ..] => (0..feed.ids.len()).flat_map(|b| row(width(1), last(b))).collect(),
            // Weights, as adapters have them, are small; a number alone may be a factor.
            _ if width(0) > 1 => row(width(0), 0).into_iter().map(|x| 0.1 * x).collect(),
            _ => row(1, 0).into_iter().map(|x| 1.0 + 0.1 * x).collect(),
        }
    }
}

/// What a graph takes beside tokens, mask, positions and the inputs named, as far as it can be made.
pub fn other_inputs(view: &GraphView, found: &[Attention], known: &[&str]) -> Vec<OtherInput> {
    let names = named_sizes(view);
    let carried = all_carried(view, found);
    let matches: Vec<&AttentionMatch> = found.iter().filter_map(|a| a.found.as_deref().ok()).collect();
    let lengths: Vec<&str> = matches.iter().filter_map(|s| source(view, &s.seqlens_k)).collect();
    let totals: Vec<&str> = matches
        .iter()
        .filter_map(|s| source(view, &s.total_sequence_length))
        .collect();
    let mine = |input: &&ValueInfoProto| {
        let name = input.name();
        let usual = [INPUT_IDS, ATTENTION_MASK, POSITION_IDS, RETRO_LENGTH, PAGE_BUDGET];
        !usual.contains(&name) && !known.contains(&name) && view.initializer(name).is_none()
    };
    view.graph
        .input
        .iter()
        .filter(mine)
        .filter_map(|input| {
            let name = input.name();
            let sizes = sizes(view, &names, input)?;
            let one = sizes.iter().all(|s| *s == Size::Number(1));
            let fed = match input.data_type()? {
                _ if lengths.contains(&name) => Fed::Length(-1),
                _ if totals.contains(&name) => Fed::Length(0),
                _ if carried.iter().any(|[past, _]| *past == name) => {
                    let present = carried.iter().find(|[past, _]| *past == name)?[1];
                    Fed::Carried(present.to_owned())
                }
                DataType::Float | DataType::Float16 | DataType::Bfloat16 | DataType::Double => Fed::Noise,
                DataType::Bool if one && name.contains("use_cache") => Fed::HasPast,
                DataType::Bool if one => Fed::Ones,
                DataType::Int64 | DataType::Int32 => match sizes.as_slice() {
                    [Size::Tokens] => Fed::Positions,
                    _ if name == "cache_position" => Fed::Positions,
                    _ if one && name.contains("total") => Fed::Length(0),
                    _ if one && name.contains("past") => Fed::Past,
                    _ => Fed::Zeros,
                },
                _ => Fed::Zeros,
            };
            // A name of its own for the number of tokens.
            let sizes = match (&fed, sizes.as_slice()) {
                (Fed::Positions, [_]) => vec![Size::Tokens],
                _ => sizes,
            };
            Some(OtherInput {
                name: name.to_owned(),
                sizes,
                fed,
            })
        })
        .collect()
}

/// The input of the graph that a value is, whatever its shape and type were turned to.
fn source<'a>(view: &GraphView<'a>, value: &'a str) -> Option<&'a str> {
    const TURNS: [&str; 6] = ["Cast", "Identity", "Squeeze", "Unsqueeze", "Reshape", "Flatten"];
    let mut name = value;
    for _ in 0..8 {
        if view.is_input(name) {
            return Some(name);
        }
        name = view.producer(name).filter(|n| TURNS.contains(&n.op_type()))?.input(0);
    }
    None
}
