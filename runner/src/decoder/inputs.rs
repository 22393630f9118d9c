//! The inputs of a step other than caches: token ids, mask, positions, and those that the operator adds.

use ort::value::{DynValue, Tensor};
use retro_contract::graph;

use crate::{
    decoder::{
        error::{Error, Result, require},
        integers,
        io::{BudgetInput, ModelIo, TokenInput},
    },
    runtime::ort_error,
};

/// The tokens of one step, or of one chunk of a prompt: S tokens of each of B sequences.
#[derive(Clone, Debug, Default)]
pub struct Feed {
    /// Token ids, `[B, S]`.
    pub ids: Vec<i64>,
    /// Valid tokens of each of the B sequences after the step.
    pub lengths: Vec<usize>,
    /// Retrospective tokens among the S, or -1 for prefill. Ignored by models that were not converted.
    pub retro_length: i32,
    /// Retrospective tokens of each sequence of a step, `[B]`, where they differ: S is the largest and one more, and a
    /// sequence with fewer ignores its leading tokens. `None`: [`Self::retro_length`] holds for all.
    pub retro_lengths: Option<Vec<i32>>,
    /// Pages that each KV head of a sequence reads, `[B]`; `None`: as converted.
    pub budgets: Option<Vec<i32>>,
    /// The steps to come have the same shape: as many tokens, as many of them retrospective. Such steps share a CUDA
    /// graph.
    pub graph_capturable: bool,
}

impl Feed {
    /// Tokens of the longest sequence after the step.
    pub(crate) fn longest(&self) -> usize {
        self.lengths.iter().copied().max().unwrap_or(0)
    }

    /// Positions of the tokens fed, `[B, S]`.
    pub(crate) fn positions(&self) -> Vec<i64> {
        let fed = self.ids.len() / self.lengths.len().max(1);
        // Tokens before the first are padding: any position will do that the graph can look up.
        let row = |&n: &usize| (0..fed).map(move |i| (n + i).saturating_sub(fed) as i64);
        self.lengths.iter().flat_map(row).collect()
    }

    /// Values of the input for page budgets; 0 means the operator's attributes.
    pub(crate) fn page_budgets(&self, takes: BudgetInput) -> Vec<i32> {
        let budgets = self.budgets.clone().unwrap_or_else(|| vec![0; self.lengths.len()]);
        match takes {
            BudgetInput::PerSequence => budgets,
            // The longest sequence's: others of the batch then read a few pages more.
            BudgetInput::PerBatch => vec![budgets.iter().copied().max().unwrap_or(0)],
        }
    }
}

/// Names and values of these inputs, with the attention mask or without.
pub(crate) fn inputs<'a>(io: &'a ModelIo, batch: usize, feed: &Feed, mask: bool) -> Result<Vec<(&'a str, DynValue)>> {
    let (fed, longest) = (feed.ids.len() / batch, feed.longest());
    let ids = &io.input_ids;
    let give = |input: &TokenInput, tokens: usize, numbers: Vec<i64>| {
        let numbers = input.numbers(numbers).into_iter();
        integers::tensor(input.element, &input.shape(batch, tokens), numbers)
    };
    let mut inputs = vec![(ids.name.as_str(), give(ids, fed, feed.ids.clone())?)];
    if let Some(input) = io.attention_mask.as_ref().filter(|_| mask) {
        let numbers = match input.width {
            // As wide as the cache: ones for the part that is filled.
            Some(width) => {
                require!(longest <= width, Error::ExceedsMask { tokens: longest, width });
                let row = |&n: &usize| (0..width).map(move |i| i64::from(i < n));
                feed.lengths.iter().flat_map(row).collect()
            }
            // Shorter sequences are padded on the left.
            None => {
                let row = |&n: &usize| (0..longest).map(move |i| i64::from(i + n >= longest));
                feed.lengths.iter().flat_map(row).collect()
            }
        };
        inputs.push((&input.name, give(input, input.width.unwrap_or(longest), numbers)?));
    }
    if let Some(input) = &io.position_ids {
        inputs.push((&input.name, give(input, fed, feed.positions())?));
    }
    for constant in &io.constants {
        let value = integers::tensor(constant.element, &constant.shape, std::iter::once(constant.value))?;
        inputs.push((&constant.name, value));
    }
    if io.retro_length {
        let lengths = match &feed.retro_lengths {
            None => vec![feed.retro_length],
            Some(lengths) => {
                require!(io.retro_lengths, Error::OneRetroLength);
                lengths.clone()
            }
        };
        inputs.push((graph::RETRO_LENGTH, int32([lengths.len()], lengths)?));
    }
    if let Some(takes) = io.page_budget {
        // Bound in every step: a binding keeps its last value.
        let budgets = feed.page_budgets(takes);
        inputs.push((graph::PAGE_BUDGET, int32([budgets.len()], budgets)?));
    }
    Ok(inputs)
}

fn int32<const N: usize>(shape: [usize; N], data: Vec<i32>) -> Result<DynValue> {
    Ok(Tensor::from_array((shape, data)).map_err(ort_error)?.into_dyn())
}
