//! Caches and other state: pairs of an input and an output, told apart by their names and shapes.
//!
//! B batch, C cache capacity in tokens, P pages of the cache.

use ort::value::{Outlet, TensorElementType, ValueType};
use retro_contract::{
    StateElement,
    graph::{PAST_WINDOW, PRESENT_WINDOW, State},
};
use retro_model_io::present_names;

use crate::{
    decoder::error::{Error, Result},
    model_folder::ModelFolder,
};

/// What a past/present pair holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotKind {
    /// Keys or values `[B, Hkv, C, D]`.
    Cache,
    /// State of a convolution or a recurrent layer: declared dimensions except B, zeros at first.
    Recurrent,
    /// What a graph that keeps its window knows of the last tokens, `[B, ...]`: declared dimensions except B, zeros at first.
    Window,
    /// State of the operator, `[B, ...]`; page summaries and page steps have P as third dimension, sketches
    /// the number of blocks of rows.
    Retro(State),
}

impl SlotKind {
    /// Whether a step reads and replaces it, so that a step run twice differs from one run once. (Keys, values and page
    /// summaries of the tokens fed are computed anew.)
    pub(crate) fn is_replaced_by_steps(self) -> bool {
        matches!(
            self,
            Self::Window | Self::Retro(State::PageSteps | State::Outputs | State::Lse)
        )
    }
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
    /// Fixed dimensions; `None` stands for B, C, P or the number of blocks of rows.
    pub dims: Vec<Option<usize>>,
}

impl StateSlot {
    /// The shape for a batch and a capacity in tokens and pages. Capacity 0 is an empty past.
    pub fn shape(&self, batch: usize, capacity: usize, pages: usize) -> Vec<usize> {
        let open = |axis: usize| match (self.kind, axis) {
            (_, 0) | (SlotKind::Recurrent | SlotKind::Window, _) => batch,
            (SlotKind::Cache, _) => capacity,
            (SlotKind::Retro(_), _) if self.is_sketch() => StateElement::Byte.entries(capacity, pages),
            (SlotKind::Retro(_), _) => pages,
        };
        self.dims
            .iter()
            .enumerate()
            .map(|(axis, d)| d.unwrap_or_else(|| open(axis)))
            .collect()
    }

    /// Whether it holds sketches: bytes, a block of rows after another, not pages.
    pub fn is_sketch(&self) -> bool {
        self.kind == SlotKind::Retro(State::PageSummary) && self.element == TensorElementType::Uint8
    }

    /// The declared capacity of a cache, in tokens.
    pub(super) fn capacity(&self) -> Option<usize> {
        match self.kind {
            SlotKind::Cache => self.dims.get(2).copied().flatten(),
            _ => None,
        }
    }
}

/// The pair of an input that is none of tokens, mask and positions.
pub(super) fn slot(input: &Outlet, outputs: &[Outlet], folder: &ModelFolder) -> Result<StateSlot> {
    let name = input.name();
    let ValueType::Tensor {
        ty,
        shape,
        dimension_symbols,
    } = input.dtype()
    else {
        return Err(Error::UnknownNotATensor(name.to_owned()));
    };
    let candidates = match (retro(name), name) {
        (Some((_, present)), _) => vec![present],
        (None, PAST_WINDOW) => vec![PRESENT_WINDOW.to_owned()],
        (None, _) => present_names(name, &folder.names.caches),
    };
    let present = candidates
        .iter()
        .find_map(|c| outputs.iter().find(|o| o.name() == c.as_str()));
    let present = present.ok_or_else(|| Error::UnknownInput(name.to_owned()))?;
    let kind = match retro(name) {
        Some((state, _)) => SlotKind::Retro(state),
        None if name == PAST_WINDOW => SlotKind::Window,
        None => kind(name, shape, &folder.names.caches),
    };
    let sketch = *ty == TensorElementType::Uint8;
    let rank = match kind {
        SlotKind::Retro(State::PageSummary) if sketch => 4,
        SlotKind::Recurrent | SlotKind::Window => shape.len(),
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
            SlotKind::Retro(State::Outputs | State::Lse) | SlotKind::Window => axis == 0,
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
            (SlotKind::Retro(State::PageSummary), 3) if !sketch => Some(2),
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
