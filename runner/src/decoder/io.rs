//! Names and shapes of a graph's inputs and outputs, by their meaning: tokens, mask, positions, caches, state.
//!
//! B batch, C cache capacity in tokens, P pages of the cache.

use ort::{
    session::Session,
    value::{Outlet, TensorElementType, ValueType},
};
use retro_contract::graph::{PAGE_BUDGET, RETRO_LENGTH, State};
use retro_export::verify::LOGITS_TO_KEEP;
use retro_model_io::present_names;

use crate::{
    decoder::{
        error::{Error, Result, require},
        integers::{INTEGERS, MASKS},
    },
    model_folder::ModelFolder,
};

/// What a past/present pair holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotKind {
    /// Keys or values `[B, Hkv, C, D]`.
    Cache,
    /// State of a convolution or a recurrent layer: declared dimensions except B, zeros at first.
    Recurrent,
    /// State of the operator, `[B, ...]`; page summaries and page steps have P as third dimension.
    Retro(State),
}

/// One past/present pair.
#[derive(Clone, Debug, PartialEq)]
pub struct StateSlot {
    /// Name of the input.
    pub past: String,
    /// Name of the output.
    pub present: String,
    /// What the buffer holds.
    pub kind: SlotKind,
    /// The layer's number.
    pub layer: usize,
    /// Element type of both.
    pub element: TensorElementType,
    /// Fixed dimensions; `None` stands for B, C or P.
    pub dims: Vec<Option<usize>>,
}

impl StateSlot {
    /// The shape for a batch and a capacity in tokens and pages. Capacity 0 is an empty past.
    pub fn shape(&self, batch: usize, capacity: usize, pages: usize) -> Vec<usize> {
        let open = |axis: usize| match (self.kind, axis) {
            (_, 0) | (SlotKind::Recurrent, _) => batch,
            (SlotKind::Cache, _) => capacity,
            (SlotKind::Retro(_), _) => pages,
        };
        self.dims
            .iter()
            .enumerate()
            .map(|(axis, d)| d.unwrap_or_else(|| open(axis)))
            .collect()
    }

    /// The declared capacity of a cache, in tokens.
    fn capacity(&self) -> Option<usize> {
        match self.kind {
            SlotKind::Cache => self.dims.get(2).copied().flatten(),
            _ => None,
        }
    }
}

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
            page_budget: budgets(session),
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

fn budgets(session: &Session) -> Option<BudgetInput> {
    let optional = session.overridable_initializers();
    let declared = session.inputs().iter().map(|i| (i.name(), i.dtype()));
    let mut declared = declared.chain(optional.iter().map(|o| (o.name(), o.dtype())));
    let (_, dtype) = declared.find(|(name, _)| *name == PAGE_BUDGET)?;
    // A fixed dimension is enforced by ONNX Runtime; an open one (-1) takes as many as there are sequences.
    let one = dtype.tensor_shape().is_some_and(|shape| shape.first() == Some(&1));
    Some(if one {
        BudgetInput::PerBatch
    } else {
        BudgetInput::PerSequence
    })
}

fn slot(input: &Outlet, outputs: &[Outlet], folder: &ModelFolder) -> Result<StateSlot> {
    let name = input.name();
    let ValueType::Tensor {
        ty,
        shape,
        dimension_symbols,
    } = input.dtype()
    else {
        return Err(Error::UnknownNotATensor(name.to_owned()));
    };
    let candidates = match retro(name) {
        Some((_, present)) => vec![present],
        None => present_names(name, &folder.names.caches),
    };
    let present = candidates
        .iter()
        .find_map(|c| outputs.iter().find(|o| o.name() == c.as_str()));
    let present = present.ok_or_else(|| Error::UnknownInput(name.to_owned()))?;
    let kind = match retro(name) {
        Some((state, _)) => SlotKind::Retro(state),
        None => kind(name, shape, &folder.names.caches),
    };
    let rank = match kind {
        SlotKind::Recurrent => shape.len(),
        SlotKind::Cache | SlotKind::Retro(State::Outputs) => 4,
        SlotKind::Retro(State::PageSummary) => 5,
        SlotKind::Retro(State::PageSteps | State::Lse) => 3,
    };
    if shape.len() != rank {
        return Err(Error::StateRank {
            name: name.to_owned(),
            got: shape.len(),
            expected: rank,
        });
    }
    returns_as_it_came(input, present)?;
    let mut dims = Vec::with_capacity(rank);
    for (axis, &declared) in shape.iter().enumerate() {
        let symbol = dimension_symbols.get(axis).map_or("", |s| s.as_str());
        let declared = usize::try_from(declared).ok();
        let ours = match kind {
            SlotKind::Cache | SlotKind::Retro(State::PageSummary | State::PageSteps) => [0, 2].contains(&axis),
            SlotKind::Retro(State::Outputs | State::Lse) => axis == 0,
            SlotKind::Recurrent => axis == 0 || symbol.to_lowercase().contains("batch"),
        };
        if ours {
            // ONNX Runtime enforces a declared capacity. The batch size is checked when a state is made.
            let sequences = axis == 0 && kind != SlotKind::Recurrent;
            dims.push(declared.filter(|_| !sequences));
            continue;
        }
        // Some exporters write fixed dimensions as names: "32" is 32.
        let known = declared.or_else(|| symbol.parse().ok()).or(match (kind, axis) {
            (SlotKind::Cache, 1) | (SlotKind::Retro(State::PageSummary | State::PageSteps), 1) => folder.kv_heads,
            (SlotKind::Cache, 3) | (SlotKind::Retro(State::PageSummary), 4) | (SlotKind::Retro(State::Outputs), 3) => {
                folder.head_dim
            }
            (SlotKind::Retro(State::PageSummary), 3) => Some(2),
            _ => None,
        });
        let unknown = || Error::UnknownDimension {
            name: name.to_owned(),
            axis,
        };
        dims.push(Some(known.ok_or_else(unknown)?));
    }
    Ok(StateSlot {
        past: name.to_owned(),
        present: present.name().to_owned(),
        kind,
        layer: number(name),
        element: *ty,
        dims,
    })
}

/// Checks that a present output can be the next past input: same element type, no contradicting dimensions.
fn returns_as_it_came(past: &Outlet, present: &Outlet) -> Result<()> {
    let (a, b) = (past.dtype(), present.dtype());
    if a.tensor_type() != b.tensor_type() {
        return Err(Error::PresentType {
            past: past.name().to_owned(),
            got: a.tensor_type(),
            present: present.name().to_owned(),
        });
    }
    let Some((a, b)) = a.tensor_shape().zip(b.tensor_shape()) else {
        return Ok(());
    };
    let differ = a.iter().zip(b.iter()).any(|(a, b)| *a > 0 && *b > 0 && a != b);
    // An output without a declared shape has no dimensions.
    if b.is_empty() || (a.len() == b.len() && !differ) {
        return Ok(());
    }
    Err(Error::PresentShape {
        past: past.name().to_owned(),
        past_shape: a.to_vec(),
        present: present.name().to_owned(),
        present_shape: b.to_vec(),
    })
}

/// Which state of the operator an input is, by its name, and the name of its output.
fn retro(name: &str) -> Option<(State, String)> {
    State::ALL.into_iter().find_map(|state| {
        let layer = name.strip_prefix("past_retro.")?;
        let layer = layer.strip_suffix(&format!(".{}", state.as_str()))?;
        Some((state, format!("present_retro.{layer}.{}", state.as_str())))
    })
}

/// Tells caches of keys and values from other state, by the name or by an open third dimension.
fn kind(name: &str, shape: &[i64], templates: &[(String, String)]) -> SlotKind {
    let named = templates.iter().filter_map(|(past, _)| past.split_once("%d"));
    let by_template = named.into_iter().any(|(a, b)| name.starts_with(a) && name.ends_with(b));
    let rest = name.to_lowercase().replace("past_key_values", "");
    let mut words = rest.split(|c: char| !c.is_ascii_alphabetic());
    let by_word = words.any(|w| ["key", "value", "keys", "values", "k", "v"].contains(&w));
    let open = shape.len() == 4 && shape.get(2).is_some_and(|d| *d < 0);
    if by_template || by_word || open {
        SlotKind::Cache
    } else {
        SlotKind::Recurrent
    }
}

/// The layer: the first number in a name.
fn number(name: &str) -> usize {
    let digits = name.split(|c: char| !c.is_ascii_digit()).find(|s| !s.is_empty());
    digits.and_then(|d| d.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn caches_and_other_state_are_told_apart() {
        let templates = [("kv.%d.a".to_owned(), "out.%d.a".to_owned())];
        let kind = |name: &str, shape: &[i64]| kind(name, shape, &templates);
        let (open, fixed) = ([-1, 2, -1, 64], [-1, 4, 16, 16]);
        for name in [
            "past_key_values.0.key",
            "kv.3.a",
            "cache.v.0",
            "past_value_2",
            "input.past.layers.0.keys",
        ] {
            assert_eq!(kind(name, &fixed), SlotKind::Cache, "{name}: of declared capacity");
        }
        for name in [
            "past_key_values.0.recurrent_state",
            "past_key_values.0.conv_state",
            "past.0.conv",
            "past_recurrent.1",
        ] {
            assert_eq!(kind(name, &fixed), SlotKind::Recurrent, "{name}");
            assert_eq!(kind(name, &[-1, 128, 3]), SlotKind::Recurrent, "{name}");
        }
        assert_eq!(kind("past_0", &open), SlotKind::Cache);
        assert_eq!(
            retro("past_retro.4.page_steps"),
            Some((State::PageSteps, "present_retro.4.page_steps".into()))
        );
        assert_eq!(number("past_key_values.17.value"), 17);
    }

    #[test]
    fn open_dimensions_are_filled_by_kind() {
        let slot = |kind, dims: &[Option<usize>]| StateSlot {
            past: String::new(),
            present: String::new(),
            kind,
            layer: 0,
            element: TensorElementType::Float32,
            dims: dims.to_vec(),
        };
        let cache = slot(SlotKind::Cache, &[None, Some(2), None, Some(64)]);
        assert_eq!(cache.shape(3, 100, 7), [3, 2, 100, 64]);
        let steps = slot(SlotKind::Retro(State::PageSteps), &[None, Some(2), None]);
        assert_eq!(steps.shape(3, 100, 7), [3, 2, 7]);
        let conv = slot(SlotKind::Recurrent, &[None, Some(128), Some(3)]);
        assert_eq!((conv.shape(2, 100, 7), conv.capacity()), (vec![2, 128, 3], None));
        let fixed = slot(SlotKind::Cache, &[None, Some(2), Some(32), Some(64)]);
        assert_eq!(
            (fixed.shape(1, 100, 7), fixed.capacity()),
            (vec![1, 2, 32, 64], Some(32))
        );
    }
}
