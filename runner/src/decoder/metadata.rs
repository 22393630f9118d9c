//! Metadata of a converted model.

use std::{fmt::Display, str::FromStr};

use ort::session::Session;
use retro_contract::{Budget, GroupScore, Selector, limits, metadata};

use crate::{
    decoder::error::{Error, Result, require},
    runtime::ort_error,
};

/// The metadata of a converted model: the settings it was converted with.
#[derive(Clone, Debug, PartialEq)]
pub struct RetroMetadata {
    /// The largest window: tokens that a step may feed.
    pub window: usize,
    /// Tokens a page.
    pub page_size: usize,
    /// Default budget of a step.
    pub budget: Option<Budget>,
    /// Minimum pages of a budget that is a share of the context.
    pub min_pages: usize,
    /// Contexts of up to so many tokens are better read whole, one token a step, on a CPU.
    pub dense_below: usize,
    /// What a page summary holds.
    pub selector: Option<Selector>,
    /// Reduction of page scores over a KV head's query group.
    pub group_score: Option<GroupScore>,
    /// Layers that carry the operator.
    pub layers: Vec<usize>,
    /// Those of them that attend to every page.
    pub dense_layers: Vec<usize>,
    /// The graph feeds the tokens of the window by itself.
    pub window_in_graph: bool,
    /// Tokens that its state is made for, where a host makes it by declared sizes.
    pub context: Option<usize>,
    /// The graph takes the sequence length from the width of the attention mask.
    pub lengths_from_width: bool,
}

impl RetroMetadata {
    /// Reads a session's metadata; `None` for a model that was not converted.
    ///
    /// # Errors
    /// When the model was converted for another version of the operator, or a value cannot be parsed.
    pub fn read(session: &Session) -> Result<Option<Self>> {
        let found = session.metadata().map_err(|e| Error::Metadata(ort_error(e)))?;
        let Some(version) = found.custom(metadata::VERSION) else {
            return Ok(None);
        };
        require!(
            version.parse() == Ok(retro_contract::OPSET_VERSION),
            Error::OperatorVersion(version)
        );
        let number = |key: &str, default: usize| -> Result<usize> {
            let Some(text) = found.custom(key) else {
                return Ok(default);
            };
            let n = text.parse().ok().filter(|&n| n >= 1);
            n.ok_or_else(|| Error::MetadataNumber {
                key: key.to_owned(),
                got: text,
            })
        };
        let list = |key: &str| -> Vec<usize> {
            found
                .custom(key)
                .unwrap_or_default()
                .split(',')
                .filter_map(|n| n.trim().parse().ok())
                .collect()
        };
        Ok(Some(Self {
            window: number(metadata::WINDOW, limits::WINDOW)?,
            page_size: number(metadata::PAGE_SIZE, limits::PAGE_SIZE)?,
            budget: choice(metadata::BUDGET, found.custom(metadata::BUDGET))?,
            min_pages: number(metadata::MIN_PAGES, limits::BUDGET_MIN_PAGES)?,
            dense_below: number(metadata::DENSE_BELOW, 0)?,
            selector: choice(metadata::SELECTOR, found.custom(metadata::SELECTOR))?,
            group_score: choice(metadata::GROUP_SCORE, found.custom(metadata::GROUP_SCORE))?,
            layers: list(metadata::LAYERS),
            dense_layers: list(metadata::DENSE_LAYERS),
            window_in_graph: found.custom(metadata::WINDOW_IN_GRAPH).is_some(),
            context: Some(number(metadata::CONTEXT, 0)?).filter(|&n| n > 0),
            lengths_from_width: found.custom(metadata::LENGTHS).as_deref() == Some(metadata::MASK_WIDTH),
        }))
    }
}

/// Parses an optional value.
fn choice<T: FromStr<Err: Display>>(key: &str, text: Option<String>) -> Result<Option<T>> {
    let parse = |text: String| {
        text.parse().map_err(|e: T::Err| Error::MetadataChoice {
            key: key.to_owned(),
            reason: e.to_string(),
        })
    };
    text.map(parse).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_values_are_refused_and_missing_ones_are_none() {
        assert_eq!(choice::<Selector>("k", None).unwrap(), None);
        let moments = choice("k", Some("moments".into())).unwrap();
        assert_eq!(moments, Some(Selector::Moments));
        let error = choice::<Selector>("k", Some("median".into())).unwrap_err().to_string();
        assert!(error.contains("metadata k") && error.contains("bounds"), "{error}");
        assert!(choice::<Budget>("k", Some("?".into())).is_err());
    }
}
