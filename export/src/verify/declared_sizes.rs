//! Sizes that a model's inputs are declared with.

use super::comparison::CacheFacts;
use crate::rules::{ATTENTION_MASK, INPUT_IDS, INPUTS_EMBEDS};
use ort::session::Session;

/// Sizes that a model's inputs are declared with once and for all; none: they are open.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeclaredSizes {
    /// Sequences a call.
    pub batch: Option<usize>,
    /// Tokens a call.
    pub tokens: Option<usize>,
    /// Tokens in all: rows of caches, width of the mask.
    pub rows: Option<usize>,
    /// The mask is one width, with zeros for what is still to come: there is no telling them from padding.
    pub mask: bool,
}

impl DeclaredSizes {
    pub fn of(session: &Session, caches: &[CacheFacts]) -> Self {
        let mut sizes = Self::default();
        let at_most = |known: &mut Option<usize>, new: Option<usize>| {
            *known = [*known, new].into_iter().flatten().min();
        };
        for input in session.inputs() {
            let shape = input.dtype().tensor_shape().map_or(&[][..], |s| &**s);
            let dim = |axis: usize| shape.get(axis).and_then(|d| usize::try_from(*d).ok());
            match (input.name(), shape.len()) {
                (INPUT_IDS, 2) | (INPUTS_EMBEDS, 3) => {
                    at_most(&mut sizes.batch, dim(0));
                    at_most(&mut sizes.tokens, dim(1));
                }
                (ATTENTION_MASK, 2) => {
                    at_most(&mut sizes.batch, dim(0));
                    at_most(&mut sizes.rows, dim(1));
                    sizes.mask = dim(1).is_some();
                }
                (name, 4) => {
                    if let Some(cache) = caches.iter().find(|c| c.past == name) {
                        at_most(&mut sizes.batch, dim(0));
                        at_most(&mut sizes.rows, dim(2).filter(|_| !cache.sliding));
                    }
                }
                _ => {}
            }
        }
        sizes
    }
}
