//! Names and shapes of a graph's inputs and outputs, by their meaning: tokens, mask, positions, caches, state.
//!
//! B batch, C cache capacity in tokens, P pages of the cache.

use ort::{
    session::Session,
    value::{Outlet, TensorElementType, ValueType},
};
use retro_contract::graph::{PAGE_BUDGET, RETRO_LENGTH};
use retro_export::verify::LOGITS_TO_KEEP;

use crate::{
    decoder::{
        error::{Error, Result, require},
        integers::{INTEGERS, MASKS},
        state_slot::{SlotKind, StateSlot, slot},
    },
    model_folder::ModelFolder,
};

/// An integer input, or the mask, that each step sets.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenInput {
    /// Name of the input.
    pub name: String,
    /// Element type that the graph declares.
    pub element: TensorElementType,
    /// Leading dimension before `[B, S]`: multimodal models take three positions per token.
    pub planes: Option<usize>,
    /// The declared S, if it is fixed.
    pub width: Option<usize>,
}

impl TokenInput {
    /// The shape for a batch and a number of tokens.
    pub(crate) fn shape(&self, batch: usize, tokens: usize) -> Vec<usize> {
        self.planes.into_iter().chain([batch, tokens]).collect()
    }

    /// The values for [`Self::shape`], from those for `[B, S]`.
    pub(crate) fn numbers(&self, of_all: Vec<i64>) -> Vec<i64> {
        of_all.repeat(self.planes.unwrap_or(1))
    }
}

/// A graph's inputs and outputs by their meaning.
#[derive(Clone, Debug)]
pub struct ModelIo {
    /// Token ids, `[B, S]`.
    pub input_ids: TokenInput,
    /// Ones for valid tokens, `[B, T]`; `None`: the graph takes no mask.
    pub attention_mask: Option<TokenInput>,
    /// Positions of the tokens fed, `[B, S]`; `None`: the graph computes them.
    pub position_ids: Option<TokenInput>,
    /// Name of the logits output, `[B, S, vocab]` or `[B, 1, vocab]`.
    pub logits: String,
    /// Element type of the logits.
    pub logits_type: TensorElementType,
    /// Caches and other state.
    pub slots: Vec<StateSlot>,
    /// Inputs that are the same in every call.
    pub constants: Vec<ConstantInput>,
    /// The graph takes `retro_length` (it was converted).
    pub retro_length: bool,
    /// `retro_length` may be one number a sequence.
    pub retro_lengths: bool,
    /// What `retro_page_budget` takes; `None`: the graph has no such input.
    pub page_budget: Option<BudgetInput>,
    /// The declared batch size, if it is fixed.
    pub batch: Option<usize>,
    /// The smallest declared cache capacity in tokens, if any is fixed.
    pub capacity: Option<usize>,
}

/// An input with the same value in every call.
#[derive(Clone, Debug, PartialEq)]
pub struct ConstantInput {
    /// Name of the input.
    pub name: String,
    /// Element type that the graph declares.
    pub element: TensorElementType,
    /// Dimensions, all 1; none for a scalar.
    pub shape: Vec<usize>,
    /// The value.
    pub value: i64,
}

/// Suffix of the inputs for a layer's sliding window in transformers' own exports.
const SLIDING_WINDOW: &str = "_sliding_window_tensor";

/// What the input `retro_page_budget` takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BudgetInput {
    /// One budget for the batch.
    PerBatch,
    /// One budget per sequence.
    PerSequence,
}

impl ModelIo {
    /// Reads the inputs and outputs of a session. Dimensions that the graph does not declare come from the folder's
    /// configuration.
    ///
    /// # Errors
    /// When an input is unknown, or a cache input has no matching output.
    pub fn read(session: &Session, folder: &ModelFolder) -> Result<Self> {
        let names = &folder.names;
        let outputs = session.outputs();
        let find = |name: &str| session.inputs().iter().find(|i| i.name() == name);
        let hint = find("inputs_embeds").map_or("", |_| " (it takes inputs_embeds, which another graph makes)");
        let ids = find(&names.input_ids).ok_or_else(|| Error::NoTokenInput {
            name: names.input_ids.clone(),
            hint,
        })?;
        let input_ids = fed(ids, &INTEGERS)?;
        let attention_mask = find(&names.attention_mask).map(|i| fed(i, &MASKS)).transpose()?;
        let position_ids = find(&names.position_ids).map(|i| fed(i, &INTEGERS)).transpose()?;
        require!(
            input_ids.planes.is_none() && attention_mask.as_ref().is_none_or(|m| m.planes.is_none()),
            Error::TokenPlanes
        );
        if let Some(width) = input_ids.width.filter(|&n| n != 1) {
            return Err(Error::TokensPerCall(width));
        }
        let logits = outputs.iter().find(|o| o.name() == names.logits);
        let logits = logits.ok_or_else(|| Error::NoOutput(names.logits.clone()))?;
        let optional: Vec<String> = session
            .overridable_initializers()
            .iter()
            .map(|o| o.name().to_owned())
            .collect();
        let takes = |name: &str| find(name).is_some() || optional.iter().any(|o| o == name);
        let known = [&names.input_ids, &names.attention_mask, &names.position_ids];
        let (mut slots, mut constants) = (Vec::<StateSlot>::new(), Vec::new());
        for input in session.inputs() {
            let name = input.name();
            if known.iter().any(|k| *k == name) || name == RETRO_LENGTH || name == PAGE_BUDGET {
                continue;
            }
            if let Some(constant) = constant(input, folder) {
                constants.push(constant);
                continue;
            }
            let slot = slot(input, outputs, folder)?;
            if let Some(other) = slots.iter().find(|other| other.present == slot.present) {
                return Err(Error::TwoInputsOneOutput {
                    first: other.past.clone(),
                    second: name.to_owned(),
                    output: slot.present,
                });
            }
            slots.push(slot);
        }
        let logits_type = logits.dtype().tensor_type().ok_or(Error::LogitsNotATensor)?;
        Ok(Self {
            batch: batch(session, &slots)?,
            capacity: slots.iter().filter_map(StateSlot::capacity).min(),
            input_ids,
            attention_mask,
            position_ids,
            logits: names.logits.clone(),
            logits_type,
            slots,
            constants,
            retro_length: takes(RETRO_LENGTH),
            retro_lengths: one_a_sequence(session, RETRO_LENGTH) == Some(true),
            page_budget: one_a_sequence(session, PAGE_BUDGET).map(|each| match each {
                true => BudgetInput::PerSequence,
                false => BudgetInput::PerBatch,
            }),
        })
    }

    /// Number of layers with a cache.
    pub fn layers(&self) -> usize {
        let layers: std::collections::BTreeSet<usize> = self
            .slots
            .iter()
            .filter(|s| s.kind == SlotKind::Cache)
            .map(|s| s.layer)
            .collect();
        layers.len()
    }
}

/// An input `[B, S]` or `[planes, B, S]` of one of these element types.
fn fed(input: &Outlet, types: &[TensorElementType]) -> Result<TokenInput> {
    let name = input.name();
    let (element, shape) = match input.dtype() {
        ValueType::Tensor { ty, shape, .. } => (*ty, shape),
        _ => return Err(Error::NotATensor(name.to_owned())),
    };
    if !types.contains(&element) {
        let types: Vec<String> = types.iter().map(ToString::to_string).collect();
        return Err(Error::InputType {
            name: name.to_owned(),
            got: element,
            expected: types.join(", "),
        });
    }
    let fixed = |axis: usize| shape.get(axis).and_then(|&d| usize::try_from(d).ok());
    let (planes, width) = match shape.len() {
        // No shape is declared.
        0 => (None, None),
        2 => (None, fixed(1)),
        3 => (Some(fixed(0).unwrap_or(3)), fixed(2)),
        got => {
            return Err(Error::InputRank {
                name: name.to_owned(),
                got,
            });
        }
    };
    Ok(TokenInput {
        name: name.to_owned(),
        element,
        planes,
        width,
    })
}

/// The batch size that the declared shapes fix.
fn batch(session: &Session, slots: &[StateSlot]) -> Result<Option<usize>> {
    let mut batch = None;
    for input in session.inputs() {
        let shape = input.dtype().tensor_shape();
        let first = shape
            .and_then(|s| s.first().copied())
            .and_then(|d| usize::try_from(d).ok());
        let slot = slots.iter().find(|s| s.past == input.name());
        let ids = shape.is_some_and(|s| s.len() == 2) && slot.is_none();
        let fixed = match slot {
            // State without a batch dimension is of one sequence.
            Some(s) if s.kind == SlotKind::Recurrent => s.dims.first().is_none_or(Option::is_some).then_some(1),
            Some(_) => first,
            None if ids => first,
            None => None,
        };
        if let Some(n) = fixed
            && let Some(other) = batch.replace(n).filter(|&other| other != n)
        {
            return Err(Error::TwoBatches(n, other));
        }
    }
    Ok(batch)
}

fn constant(input: &Outlet, folder: &ModelFolder) -> Option<ConstantInput> {
    let (name, ValueType::Tensor { ty, shape, .. }) = (input.name(), input.dtype()) else {
        return None;
    };
    let value = if LOGITS_TO_KEEP.contains(&name) {
        1
    } else if name.ends_with(SLIDING_WINDOW) {
        folder.sliding_window.and_then(|n| i64::try_from(n).ok()).unwrap_or(0)
    } else {
        return None;
    };
    let integer = matches!(ty, TensorElementType::Int64 | TensorElementType::Int32);
    let one = shape.len() <= 1 && shape.iter().all(|d| *d == 1 || *d == -1);
    (integer && one).then(|| ConstantInput {
        name: name.to_owned(),
        element: *ty,
        shape: vec![1; shape.len()],
        value,
    })
}

/// Whether an input takes one number for each sequence, or one for the batch; `None`: the graph has no such input.
fn one_a_sequence(session: &Session, name: &str) -> Option<bool> {
    let optional = session.overridable_initializers();
    let declared = session.inputs().iter().map(|i| (i.name(), i.dtype()));
    let mut declared = declared.chain(optional.iter().map(|o| (o.name(), o.dtype())));
    let (_, dtype) = declared.find(|(declared, _)| *declared == name)?;
    // A fixed dimension is enforced by ONNX Runtime; an open one (-1) takes as many as there are sequences.
    Some(dtype.tensor_shape().is_none_or(|shape| shape.first() != Some(&1)))
}
