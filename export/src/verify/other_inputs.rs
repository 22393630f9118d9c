//! Inputs beside tokens, mask, positions and caches, and what they are fed: embeddings, adapters, flags, what an encoder gave, state
//! that comes back. Both models get the same, so any numbers will do that the original takes.

use super::{error::Error, feed::Feed, host_tensor::HostTensor};
use crate::rules::{
    ATTENTION_MASK, Attention, AttentionMatch, INPUT_IDS, POSITION_IDS, Size, all_carried, named_sizes, noise, sizes,
};
use ort::value::TensorElementType;
use retro_contract::graph::{PAGE_BUDGET, RETRO_LENGTH};
use retro_onnx::{DataType, ValueInfoProto, graph::GraphView};

/// What an input is fed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InputFill {
    /// Numbers that look random: the same for a token whenever it is fed, and for a sequence in every call.
    Noise,
    /// Zeros.
    Zeros,
    /// Whether there is a past.
    HasPast,
    /// Ones.
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

/// An input beside tokens, mask, positions and caches.
#[derive(Clone, Debug)]
pub struct OtherInput {
    /// Its name in the graph.
    pub name: String,
    /// Its shape.
    pub sizes: Vec<Size>,
    /// What it is fed.
    pub fill: InputFill,
}

impl OtherInput {
    /// The output that it comes back as.
    pub fn carried(&self) -> Option<&str> {
        match &self.fill {
            InputFill::Carried(present) => Some(present),
            _ => None,
        }
    }

    /// It counts tokens, those of padding too.
    pub fn counts_tokens(&self) -> bool {
        matches!(self.fill, InputFill::Positions | InputFill::Length(_) | InputFill::Past)
    }

    /// It has a row for each token fed, or says how many came before.
    pub fn moves_with_tokens(&self) -> bool {
        matches!(self.fill, InputFill::Positions | InputFill::Past) || self.sizes.contains(&Size::Tokens)
    }

    fn shape(&self, feed: &Feed) -> Vec<usize> {
        self.sizes
            .iter()
            .map(|s| s.of(feed.ids.len(), feed.count, feed.past()))
            .collect()
    }

    pub(super) fn tensor(&self, ty: TensorElementType, feed: &Feed) -> Result<HostTensor, Error> {
        let shape = self.shape(feed);
        let n: usize = shape.iter().product();
        match self.fill {
            InputFill::Noise => HostTensor::from_floats(ty, &shape, &self.noise(&shape, feed)),
            InputFill::Length(more) => HostTensor::from_ints(ty, &shape, &vec![feed.total as i64 + more; n]),
            InputFill::Past => HostTensor::from_ints(ty, &shape, &vec![feed.past() as i64; n]),
            InputFill::Positions => {
                let positions: Vec<i64> = (feed.past()..feed.total).map(|j| j as i64).collect();
                HostTensor::from_ints(ty, &shape, &positions.repeat(n / positions.len().max(1)))
            }
            InputFill::HasPast => HostTensor::from_ints(ty, &shape, &vec![i64::from(feed.past() > 0); n]),
            InputFill::Ones => HostTensor::from_ints(ty, &shape, &vec![1; n]),
            InputFill::Zeros | InputFill::Carried(_) => HostTensor::zeros(ty, &shape),
        }
    }

    fn noise(&self, shape: &[usize], feed: &Feed) -> Vec<f64> {
        let seed = self.name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| {
            (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
        });
        let id = |b: usize, j: usize| feed.id(b, j) as u64;
        // A sequence is known by its last token: its place among others may differ from run to run.
        let last = |b: usize| feed.ids.get(b).and_then(|row| row.last()).map_or(0, |id| *id as u64);
        let row = |n: usize, of: u64| noise(n, seed.wrapping_add(of.wrapping_mul(0x9e37_79b9)));
        let first = feed.past();
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
            let fill = match input.data_type()? {
                _ if lengths.contains(&name) => InputFill::Length(-1),
                _ if totals.contains(&name) => InputFill::Length(0),
                _ if carried.iter().any(|[past, _]| *past == name) => {
                    let present = carried.iter().find(|[past, _]| *past == name)?[1];
                    InputFill::Carried(present.to_owned())
                }
                DataType::Float | DataType::Float16 | DataType::Bfloat16 | DataType::Double => InputFill::Noise,
                DataType::Bool if one && name.contains("use_cache") => InputFill::HasPast,
                DataType::Bool if one => InputFill::Ones,
                DataType::Int64 | DataType::Int32 => match sizes.as_slice() {
                    [Size::Tokens] => InputFill::Positions,
                    _ if name == "cache_position" => InputFill::Positions,
                    _ if one && name.contains("total") => InputFill::Length(0),
                    _ if one && name.contains("past") => InputFill::Past,
                    _ => InputFill::Zeros,
                },
                _ => InputFill::Zeros,
            };
            // A name of its own for the number of tokens.
            let sizes = match (&fill, sizes.as_slice()) {
                (InputFill::Positions, [_]) => vec![Size::Tokens],
                _ => sizes,
            };
            Some(OtherInput {
                name: name.to_owned(),
                sizes,
                fill,
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
