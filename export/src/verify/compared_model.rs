//! One model as a caller sees it: fed tokens, it keeps its caches and gives logits.
//!
//! This is not the runner's way of running a model, and can't be. `export` knows no runner, which has models converted by it. And
//! it must run what the runner refuses: originals, whose caches grow or shift, with whatever other inputs and state they have. It
//! copies caches to the host after every call, so that they can be cut back; speed is no matter here.

use super::{
    comparison::{CacheFacts, Comparison},
    declared_sizes::DeclaredSizes,
    error::Error,
    feed::Feed,
    host_tensor::HostTensor,
    other_inputs::OtherInput,
    runtime::ComparisonRuntime,
    schedule::CAPACITY,
};
use crate::{
    host_state,
    rules::{ATTENTION_MASK, INPUT_IDS, POSITION_IDS},
};
use ort::{
    session::{Session, SessionInputValue},
    value::{TensorElementType, ValueType},
};
use retro_contract::{
    StateElement,
    graph::{PAGE_BUDGET, RETRO_LENGTH},
    metadata, pages_for,
};
use retro_runtime::one_line;
use std::{borrow::Cow, collections::HashMap};

/// Names of the input that says of how many tokens, the newest ones, there are to be logits. All that is looked at is the newest
/// one's; 0 stands for all in some models and for none in others.
pub const LOGITS_TO_KEEP: [&str; 2] = ["num_logits_to_keep", "logits_to_keep"];

/// An original or a converted model under comparison.
pub struct ComparedModel {
    session: Session,
    caches: Vec<CacheFacts>,
    /// Inputs that may be fed anything.
    unused_inputs: Vec<String>,
    other_inputs: Vec<OtherInput>,
    /// Sizes that its inputs are declared with.
    pub declared: DeclaredSizes,
    /// Caches and other state, by the input's name.
    state: HashMap<String, HostTensor>,
    /// What a converted model has beside an original.
    converted: Option<Converted>,
}

/// Sizes of a converted model.
#[derive(Clone, Copy)]
struct Converted {
    /// Rows of its caches, in tokens.
    capacity: usize,
    /// Tokens in a page.
    page_size: usize,
    /// It takes no `retro_length`.
    window_in_graph: bool,
    /// Masks may be as wide as the caches.
    wide_masks: bool,
}

impl Converted {
    fn pages(self) -> usize {
        pages_for(self.capacity, self.page_size)
    }

    /// Third dimension of a state of this type.
    fn state_entries(self, ty: TensorElementType) -> usize {
        let element = match ty {
            TensorElementType::Uint8 => StateElement::Byte,
            _ => StateElement::Cache,
        };
        element.entries(self.capacity, self.pages())
    }
}

impl ComparedModel {
    /// The source of a conversion, whose caches grow.
    pub fn original(session: Session, comparison: &Comparison) -> Self {
        let declared = DeclaredSizes::of(&session, comparison.caches);
        Self {
            session,
            caches: comparison.caches.to_vec(),
            unused_inputs: comparison.unused_inputs.to_vec(),
            other_inputs: comparison.other_inputs.to_vec(),
            state: HashMap::new(),
            declared,
            converted: None,
        }
    }

    /// The result of a conversion, whose caches have their capacity from the beginning.
    pub fn converted(session: Session, comparison: &Comparison) -> Self {
        let model = Self::original(session, comparison);
        let says = |key| model.session.metadata().ok()?.custom(key);
        let of_width = says(metadata::LENGTHS).as_deref() == Some(metadata::MASK_WIDTH);
        Self {
            converted: Some(Converted {
                capacity: model.declared.rows.unwrap_or(CAPACITY),
                page_size: comparison.page_size,
                window_in_graph: comparison.window_in_graph,
                wide_masks: comparison.lengths_from_mask && !of_width,
            }),
            ..model
        }
    }

    /// Whether it was converted to take masks as wide as its caches.
    pub fn takes_wide_masks(&self) -> bool {
        !self.declared.mask && self.converted.is_some_and(|c| c.wide_masks)
    }

    /// It takes one token a call, by its declared shape.
    pub fn takes_single_tokens(&self) -> bool {
        self.declared.tokens == Some(1)
    }

    /// What of it does not run on the device asked for.
    ///
    /// # Errors
    /// The operator itself doesn't.
    pub fn elsewhere(&self, runtime: &ComparisonRuntime) -> Result<Option<String>, Error> {
        runtime.elsewhere(&self.session)
    }

    /// Forgets everything and prepares for `batch` sequences.
    pub fn start(&mut self, batch: usize) -> Result<(), Error> {
        self.state.clear();
        for input in self.session.inputs() {
            let (name, ValueType::Tensor { ty, shape, .. }) = (input.name(), input.dtype()) else {
                continue;
            };
            if let Some(shape) = self.initial_shape(name, *ty, shape, batch) {
                self.state.insert(name.to_owned(), HostTensor::zeros(*ty, &shape)?);
            }
        }
        Ok(())
    }

    /// The shape of a cache or other state before anything is fed; none for other inputs.
    fn initial_shape(&self, name: &str, ty: TensorElementType, declared: &[i64], batch: usize) -> Option<Vec<usize>> {
        let fixed = |axis: usize| declared.get(axis).and_then(|d| usize::try_from(*d).ok());
        if let Some(cache) = self.caches.iter().find(|c| c.past == name) {
            let rows = match self.converted {
                _ if cache.grows => 0,
                Some(converted) => converted.capacity,
                None if cache.sliding => CAPACITY,
                None => 0,
            };
            return Some(vec![batch, cache.heads, fixed(2).unwrap_or(rows), cache.head_size]);
        }
        if name.starts_with("past_retro.") {
            let pages = self.converted.map_or(0, |converted| converted.state_entries(ty));
            let size = self.caches.first().map_or(1, |c| c.head_size);
            let fill = |(axis, d): (usize, &i64)| match (axis, usize::try_from(*d)) {
                (0, _) => batch,
                (_, Ok(d)) => d,
                (2, _) if name.contains(".page_") => pages,
                _ => size,
            };
            return Some(declared.iter().enumerate().map(fill).collect());
        }
        let mut others = self.other_inputs.iter();
        if let Some(carried) = others.find(|o| o.name == name && o.carried().is_some()) {
            return Some(carried.sizes.iter().map(|size| size.of(batch, 1, 0)).collect());
        }
        self.converted.filter(|_| host_state::is_past(name))?;
        let sizes = declared.iter().skip(1).map(|d| usize::try_from(*d).unwrap_or(1));
        Some(std::iter::once(batch).chain(sizes).collect())
    }

    /// Keeps only the first `tokens` rows of caches that grow. Whether it can.
    pub fn rewind(&mut self, tokens: usize) -> Result<bool, Error> {
        let carries = self.other_inputs.iter().any(|o| o.carried().is_some());
        if carries || self.declared.rows.is_some() || self.caches.iter().any(|c| c.sliding) {
            return Ok(false);
        }
        for cache in &self.caches {
            if let Some(tensor) = self.state.get_mut(&cache.past) {
                *tensor = tensor.first_tokens(tokens)?;
            }
        }
        Ok(true)
    }

    /// Feeds tokens; the newest token's logits of each sequence, `[B][V]`.
    pub fn feed(&mut self, feed: &Feed) -> Result<Vec<Vec<f32>>, Error> {
        if !self.takes_single_tokens() || feed.retro_length > 0 {
            return self.feed_at_once(feed);
        }
        let mut logits = Vec::new();
        for total in feed.past()..feed.total {
            logits = self.feed_at_once(&Feed {
                count: 1,
                total: total + 1,
                ..*feed
            })?;
        }
        Ok(logits)
    }

    fn feed_at_once(&mut self, feed: &Feed) -> Result<Vec<Vec<f32>>, Error> {
        let inputs = self.inputs(feed)?;
        let names: Vec<String> = self.session.outputs().iter().map(|o| o.name().to_owned()).collect();
        let outputs = self.session.run(inputs).map_err(|e| Error::Run(one_line(&e)))?;
        let mut logits = None;
        for name in &names {
            let value = outputs.get(name.as_str());
            let value = value.ok_or_else(|| Error::MissingOutput(name.clone()))?;
            if let Some(past) = past_of(name, &self.caches, &self.other_inputs) {
                self.state.insert(past, HostTensor::from_ort(value)?);
            } else if name == "logits" {
                logits = Some(HostTensor::from_ort(value)?);
            }
        }
        newest_logits(&logits.ok_or(Error::NoLogits)?)
    }

    /// What all inputs are fed.
    fn inputs(&self, feed: &Feed) -> Result<Vec<(Cow<'static, str>, SessionInputValue<'static>)>, Error> {
        let mut inputs: Vec<(Cow<str>, SessionInputValue)> = Vec::new();
        for input in self.session.inputs() {
            let name = input.name();
            let ValueType::Tensor { ty, shape, .. } = input.dtype() else {
                return Err(Error::InputNoTensor(name.to_owned()));
            };
            let tensor = self.input(name, *ty, shape, feed)?;
            inputs.push((Cow::Owned(name.to_owned()), tensor.to_ort()?.into()));
        }
        // Overridable initializers are no inputs that a session lists.
        if let Some(converted) = self.converted {
            let listed = |name: &str| self.session.inputs().iter().any(|input| input.name() == name);
            let pages = converted.pages() as i64;
            for (name, number) in [(RETRO_LENGTH, i64::from(feed.retro_length)), (PAGE_BUDGET, pages)] {
                let taken = name != RETRO_LENGTH || !converted.window_in_graph;
                if taken && !listed(name) {
                    let tensor = HostTensor::from_ints(TensorElementType::Int32, &[1], &[number])?;
                    inputs.push((Cow::Borrowed(name), tensor.to_ort()?.into()));
                }
            }
        }
        Ok(inputs)
    }

    /// What an input is fed.
    fn input(&self, name: &str, ty: TensorElementType, shape: &[i64], feed: &Feed) -> Result<HostTensor, Error> {
        let batch = feed.ids.len();
        let first = |b: usize| if b + 1 == batch { feed.padding } else { 0 };
        let rows = |f: &dyn Fn(usize, usize) -> i64, from: usize, to: usize| -> Vec<i64> {
            (0..batch)
                .flat_map(|b| (from..to).map(move |j| (b, j)))
                .map(|(b, j)| f(b, j))
                .collect()
        };
        match name {
            INPUT_IDS => {
                let ids = rows(&|b, j| feed.id(b, j), feed.past(), feed.total);
                HostTensor::from_ints(ty, &[batch, feed.count], &ids)
            }
            ATTENTION_MASK => {
                if let Some(converted) = self.converted.filter(|_| feed.wide_mask) {
                    let width = converted.capacity;
                    let seen = |b: usize, j: usize| i64::from(j < feed.total - first(b));
                    return HostTensor::from_ints(ty, &[batch, width], &rows(&seen, 0, width));
                }
                // One of fixed width has zeros for what is still to come.
                let fixed = shape.get(1).filter(|_| shape.len() == 2);
                let width = fixed.and_then(|d| usize::try_from(*d).ok()).unwrap_or(feed.total);
                let seen = |b: usize, j: usize| i64::from(j >= first(b) && j < feed.total);
                HostTensor::from_ints(ty, &[batch, width], &rows(&seen, 0, width))
            }
            POSITION_IDS => {
                let position = |b: usize, j: usize| j.saturating_sub(first(b)) as i64;
                let positions = rows(&position, feed.past(), feed.total);
                if shape.len() == 3 {
                    let n = shape.first().and_then(|d| usize::try_from(*d).ok()).unwrap_or(3);
                    HostTensor::from_ints(ty, &[n, batch, feed.count], &positions.repeat(n))
                } else {
                    HostTensor::from_ints(ty, &[batch, feed.count], &positions)
                }
            }
            RETRO_LENGTH => HostTensor::from_ints(ty, &[1], &[i64::from(feed.retro_length)]),
            PAGE_BUDGET => {
                let all = self.converted.map_or(0, Converted::pages);
                HostTensor::from_ints(ty, &[1], &[all as i64])
            }
            _ if LOGITS_TO_KEEP.contains(&name) => HostTensor::from_ints(ty, &closed(shape), &[1]),
            _ if self.unused_inputs.iter().any(|i| i == name) => HostTensor::zeros(ty, &closed(shape)),
            _ => self.state_or_other(name, ty, shape, feed),
        }
    }

    fn state_or_other(
        &self,
        name: &str,
        ty: TensorElementType,
        shape: &[i64],
        feed: &Feed,
    ) -> Result<HostTensor, Error> {
        if let Some(tensor) = self.state.get(name) {
            return Ok(tensor.clone());
        }
        match self.other_inputs.iter().find(|o| o.name == name) {
            Some(other) => other.tensor(ty, feed),
            // What chose a branch that is the graph now.
            None if ty == TensorElementType::Bool => {
                HostTensor::from_ints(ty, &closed(shape), &[i64::from(feed.past() > 0)])
            }
            None => Err(Error::UnknownInput(name.to_owned())),
        }
    }
}

/// The input that an output comes back as in the next call, if it does.
fn past_of(output: &str, caches: &[CacheFacts], other_inputs: &[OtherInput]) -> Option<String> {
    if let Some(cache) = caches.iter().find(|c| c.present == output) {
        return Some(cache.past.clone());
    }
    if output.starts_with("present_retro.") {
        return Some(output.replacen("present_", "past_", 1));
    }
    let mut others = other_inputs.iter();
    if let Some(other) = others.find(|o| output != "logits" && o.carried() == Some(output)) {
        return Some(other.name.clone());
    }
    host_state::past_of(output)
}

/// The newest token's logits of each sequence, `[B][V]`.
fn newest_logits(logits: &HostTensor) -> Result<Vec<Vec<f32>>, Error> {
    let (batch, rows, vocabulary) = match *logits.shape.as_slice() {
        [b, rows, vocabulary] => (b, rows, vocabulary),
        // The newest token's alone.
        [b, vocabulary] => (b, 1, vocabulary),
        _ => return Err(Error::LogitsShape(logits.shape.clone())),
    };
    let data = logits.to_f32()?;
    let row = |b: usize| {
        let end = (b + 1) * rows * vocabulary;
        let newest = end.checked_sub(vocabulary).and_then(|start| data.get(start..end));
        newest
            .map(<[f32]>::to_vec)
            .ok_or_else(|| Error::LogitsShape(logits.shape.clone()))
    };
    (0..batch).map(row).collect()
}

/// A declared shape with 1 for what it leaves open.
fn closed(shape: &[i64]) -> Vec<usize> {
    shape.iter().map(|d| usize::try_from(*d).unwrap_or(1)).collect()
}
