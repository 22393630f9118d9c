//! What a graph wants and gives, found out from the session: which inputs are tokens, masks, caches, state.
//!
//! B batch, C cache capacity in tokens, P pages of the cache.

use anyhow::{Context, Result, bail, ensure};
use ort::{
    session::Session,
    value::{Outlet, TensorElementType, ValueType},
};
use retro_contract::graph::{PAGE_BUDGET, RETRO_LENGTH, State};
use retro_export::verify::LOGITS_TO_KEEP;

use crate::model::ModelFolder;

/// What the third dimension of a buffer counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Keys or values `[B, Hkv, C, D]`.
    Cache,
    /// State of the operator, `[B, ...]`, with P where the layout says.
    Retro(State),
}

/// One past/present pair.
#[derive(Clone, Debug, PartialEq)]
pub struct Slot {
    pub past: String,
    pub present: String,
    pub kind: Kind,
    pub layer: usize,
    pub element: TensorElementType,
    /// Fixed dimensions; `None` stands for B, C or P.
    pub dims: Vec<Option<usize>>,
}

impl Slot {
    /// The buffer's shape for a batch and a capacity in tokens and pages; a cache length of 0 is an empty past.
    pub fn shape(&self, batch: usize, capacity: usize, pages: usize) -> Vec<usize> {
        let open = |axis: usize| match (self.kind, axis) {
            (_, 0) => batch,
            (Kind::Cache, _) => capacity,
            (Kind::Retro(_), _) => pages,
        };
        self.dims
            .iter()
            .enumerate()
            .map(|(axis, d)| d.unwrap_or_else(|| open(axis)))
            .collect()
    }
}

/// A graph's inputs and outputs by their meaning.
#[derive(Clone, Debug)]
pub struct Interface {
    pub input_ids: String,
    pub attention_mask: Option<String>,
    pub position_ids: Option<String>,
    pub logits: String,
    pub logits_type: TensorElementType,
    pub slots: Vec<Slot>,
    pub constants: Vec<Constant>,
    /// The graph takes `retro_length` (it was converted).
    pub retro_length: bool,
    pub page_budget: Option<Budgets>,
}

/// An input that is the same number in every call.
#[derive(Clone, Debug, PartialEq)]
pub struct Constant {
    pub name: String,
    pub element: TensorElementType,
    /// A single number has none.
    pub shape: Vec<usize>,
    pub value: i64,
}

/// The window of a layer's cache, which transformers' own exports take and hand on.
const SLIDING_WINDOW: &str = "_sliding_window_tensor";

/// What the input `retro_page_budget` takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Budgets {
    /// One number for the whole batch.
    One,
    /// One number a sequence.
    EachSequence,
}

impl Interface {
    /// Reads the interface of a loaded graph, with the folder's configuration for what the graph leaves open.
    ///
    /// # Errors
    /// When an input cannot be given a meaning, or a cache input has no output that goes with it.
    pub fn read(session: &Session, folder: &ModelFolder) -> Result<Self> {
        let names = &folder.names;
        let outputs = session.outputs();
        let has = |name: &str| session.inputs().iter().any(|i| i.name() == name);
        ensure!(
            has(&names.input_ids),
            "the graph has no input {:?}: it is no text decoder",
            names.input_ids
        );
        let logits = outputs.iter().find(|o| o.name() == names.logits);
        let logits = logits.with_context(|| format!("the graph has no output {:?}", names.logits))?;
        let optional: Vec<String> = session
            .overridable_initializers()
            .iter()
            .map(|o| o.name().to_owned())
            .collect();
        let takes = |name: &str| has(name) || optional.iter().any(|o| o == name);
        let known = [&names.input_ids, &names.attention_mask, &names.position_ids];
        let (mut slots, mut constants) = (Vec::new(), Vec::new());
        for input in session.inputs() {
            let name = input.name();
            if known.iter().any(|k| *k == name) || name == RETRO_LENGTH || name == PAGE_BUDGET {
                continue;
            }
            match constant(input, folder) {
                Some(constant) => constants.push(constant),
                None => slots.push(slot(input, outputs, folder)?),
            }
        }
        let logits_type = logits.dtype().tensor_type().context("the logits are no tensor")?;
        Ok(Self {
            input_ids: names.input_ids.clone(),
            attention_mask: has(&names.attention_mask).then(|| names.attention_mask.clone()),
            position_ids: has(&names.position_ids).then(|| names.position_ids.clone()),
            logits: names.logits.clone(),
            logits_type,
            slots,
            constants,
            retro_length: takes(RETRO_LENGTH),
            page_budget: budgets(session),
        })
    }

    /// Layers that have a cache.
    pub fn layers(&self) -> usize {
        let layers: std::collections::BTreeSet<usize> = self
            .slots
            .iter()
            .filter(|s| s.kind == Kind::Cache)
            .map(|s| s.layer)
            .collect();
        layers.len()
    }
}

fn constant(input: &Outlet, folder: &ModelFolder) -> Option<Constant> {
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
    (integer && one).then(|| Constant {
        name: name.to_owned(),
        element: *ty,
        shape: vec![1; shape.len()],
        value,
    })
}

fn budgets(session: &Session) -> Option<Budgets> {
    let optional = session.overridable_initializers();
    let declared = session.inputs().iter().map(|i| (i.name(), i.dtype()));
    let mut declared = declared.chain(optional.iter().map(|o| (o.name(), o.dtype())));
    let (_, dtype) = declared.find(|(name, _)| *name == PAGE_BUDGET)?;
    // A fixed dimension is enforced by ONNX Runtime; an open one (-1) takes as many as there are sequences.
    let one = dtype.tensor_shape().is_some_and(|shape| shape.first() == Some(&1));
    Some(if one { Budgets::One } else { Budgets::EachSequence })
}

fn slot(input: &Outlet, outputs: &[Outlet], folder: &ModelFolder) -> Result<Slot> {
    let name = input.name();
    let ValueType::Tensor {
        ty,
        shape,
        dimension_symbols,
    } = input.dtype()
    else {
        bail!("the graph wants the input {name:?}, which is no tensor: retro-run does not know what to give it");
    };
    let (kind, candidates) = meaning(name, &folder.names.caches);
    let present = candidates
        .iter()
        .find(|c| outputs.iter().any(|o| o.name() == c.as_str()));
    let present = present.with_context(|| {
        format!("the graph wants the input {name:?} and has no output that goes with it: retro-run does not know what to give it")
    })?;
    // Some exporters write fixed dimensions as names: "32" is 32.
    let fixed = |axis: usize, d: i64| {
        usize::try_from(d)
            .ok()
            .or_else(|| dimension_symbols.get(axis)?.parse().ok())
    };
    let mut dims: Vec<Option<usize>> = shape.iter().enumerate().map(|(axis, &d)| fixed(axis, d)).collect();
    let rank = match kind {
        Kind::Cache | Kind::Retro(State::Outputs) => 4,
        Kind::Retro(State::PageSummary) => 5,
        Kind::Retro(State::PageSteps | State::Lse) => 3,
    };
    ensure!(
        dims.len() == rank,
        "input {name:?} has {} dimensions, expected {rank}",
        dims.len()
    );
    // Declared lengths lie (a capacity is ours to choose); heads and sizes do not.
    let open: &[usize] = match kind {
        Kind::Cache | Kind::Retro(State::PageSummary | State::PageSteps) => &[0, 2],
        Kind::Retro(State::Outputs | State::Lse) => &[0],
    };
    for (axis, dim) in dims.iter_mut().enumerate() {
        if open.contains(&axis) {
            *dim = None;
            continue;
        }
        let from_config = match (kind, axis) {
            (Kind::Cache, 1) | (Kind::Retro(State::PageSummary | State::PageSteps), 1) => folder.kv_heads,
            (Kind::Cache, 3) | (Kind::Retro(State::PageSummary), 4) | (Kind::Retro(State::Outputs), 3) => {
                folder.head_dim
            }
            (Kind::Retro(State::PageSummary), 3) => Some(2),
            _ => None,
        };
        *dim = dim.or(from_config);
        ensure!(
            dim.is_some(),
            "dimension {axis} of input {name:?} is known neither from the graph nor from the folder's configuration"
        );
    }
    Ok(Slot {
        past: name.to_owned(),
        present: present.clone(),
        kind,
        layer: number(name),
        element: *ty,
        dims,
    })
}

/// What an input is, judged by its name, and the names that its output may have.
fn meaning(name: &str, templates: &[(String, String)]) -> (Kind, Vec<String>) {
    for state in State::ALL {
        if let Some(layer) = name
            .strip_prefix("past_retro.")
            .and_then(|n| n.strip_suffix(&format!(".{}", state.as_str())))
        {
            return (
                Kind::Retro(state),
                vec![format!("present_retro.{layer}.{}", state.as_str())],
            );
        }
    }
    let mut candidates = Vec::new();
    for (past, present) in templates {
        if let Some((before, after)) = past.split_once("%d") {
            let layer = name.strip_prefix(before).and_then(|n| n.strip_suffix(after));
            if let Some(layer) = layer.filter(|l| l.bytes().all(|b| b.is_ascii_digit())) {
                candidates.push(present.replace("%d", layer));
            }
        }
    }
    // past_key_values.0.key -> present.0.key; input.past_key_values.layers.0.keys -> output.past_key_values.layers.0.keys
    candidates.push(name.replacen("past_key_values", "present", 1));
    candidates.push(name.replacen("past", "present", 1));
    if let Some(rest) = name.strip_prefix("input.") {
        candidates.push(format!("output.{rest}"));
    }
    candidates.retain(|c| c != name);
    (Kind::Cache, candidates)
}

/// The first number in a name: the layer.
fn number(name: &str) -> usize {
    let digits = name.split(|c: char| !c.is_ascii_digit()).find(|s| !s.is_empty());
    digits.and_then(|d| d.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exporters_names_find_their_outputs() {
        let templates = [("kv.%d.k".to_owned(), "out.%d.k".to_owned())];
        let first = |name: &str| meaning(name, &templates);
        assert_eq!(first("kv.12.k"), (Kind::Cache, vec!["out.12.k".into()]));
        assert!(first("past_key_values.3.key").1.contains(&"present.3.key".to_owned()));
        assert!(first("past_0").1.contains(&"present_0".to_owned()));
        let torch = first("input.past_key_values.layers.1.keys").1;
        assert!(torch.contains(&"output.past_key_values.layers.1.keys".to_owned()));
        let (kind, names) = first("past_retro.4.page_steps");
        assert_eq!(
            (kind, names),
            (Kind::Retro(State::PageSteps), vec!["present_retro.4.page_steps".into()])
        );
        assert_eq!(number("past_key_values.17.value"), 17);
    }

    #[test]
    fn open_dimensions_are_filled_by_kind() {
        let slot = |kind, dims: &[Option<usize>]| Slot {
            past: String::new(),
            present: String::new(),
            kind,
            layer: 0,
            element: TensorElementType::Float32,
            dims: dims.to_vec(),
        };
        let cache = slot(Kind::Cache, &[None, Some(2), None, Some(64)]);
        assert_eq!(cache.shape(3, 100, 7), [3, 2, 100, 64]);
        let steps = slot(Kind::Retro(State::PageSteps), &[None, Some(2), None]);
        assert_eq!(steps.shape(3, 100, 7), [3, 2, 7]);
    }
}
