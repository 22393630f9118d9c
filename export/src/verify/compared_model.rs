//! One model as a caller sees it: fed tokens, it keeps its caches and gives logits.

use super::{Plan, host_tensor::Value, other_inputs::OtherInput, runtime::Runtime, schedule::CAPACITY};
use crate::rules::{ATTENTION_MASK, INPUT_IDS, INPUTS_EMBEDS, POSITION_IDS};
use anyhow::{Context, Result, anyhow, bail};
use ort::{
    session::{Session, SessionInputValue},
    value::{TensorElementType, ValueType},
};
use retro_contract::{
    graph::{PAGE_BUDGET, RETRO_LENGTH},
    pages_for,
};
use retro_runtime::one_line;
use std::{borrow::Cow, collections::HashMap};

/// A cache of the source: its names, its sizes, and how it is kept.
#[derive(Clone, Debug)]
pub struct CacheFacts {
    pub past: String,
    pub present: String,
    pub heads: usize,
    pub head_size: usize,
    /// A sliding-window cache, which has its size from the beginning; others grow.
    pub sliding: bool,
    /// Of a layer that stays as it is, with a past as long as what was fed, in the converted model too.
    pub grows: bool,
}

/// Of how many tokens, the newest ones, there are to be logits. All that is looked at is the newest one's; 0 stands for all in
/// some models and for none in others.
pub const LOGITS_TO_KEEP: [&str; 2] = ["num_logits_to_keep", "logits_to_keep"];

/// What is fed at once: `count` tokens of each sequence, the last at `total` - 1.
pub struct Feed<'f> {
    /// `[B][total]`.
    pub ids: &'f [Vec<i64>],
    pub count: usize,
    pub total: usize,
    /// Padding at the beginning of the last sequence.
    pub pad: usize,
    pub retro: i32,
}

/// Sizes that a model's inputs are declared with once and for all; none: they are open.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fixed {
    /// Sequences a call.
    pub batch: Option<usize>,
    /// Tokens a call.
    pub tokens: Option<usize>,
    /// Tokens in all: rows of caches, width of the mask.
    pub rows: Option<usize>,
    /// The mask is one width, with zeros for what is still to come: there is no telling them from padding.
    pub mask: bool,
}

impl Fixed {
    fn of(session: &Session, caches: &[CacheFacts]) -> Self {
        let mut fixed = Self::default();
        let at_most = |known: &mut Option<usize>, new: Option<usize>| {
            *known = [*known, new].into_iter().flatten().min();
        };
        for input in session.inputs() {
            let shape = input.dtype().tensor_shape().map_or(&[][..], |s| &**s);
            let dim = |axis: usize| shape.get(axis).and_then(|d| usize::try_from(*d).ok());
            match (input.name(), shape.len()) {
                (INPUT_IDS, 2) | (INPUTS_EMBEDS, 3) => {
                    at_most(&mut fixed.batch, dim(0));
                    at_most(&mut fixed.tokens, dim(1));
                }
                (ATTENTION_MASK, 2) => {
                    at_most(&mut fixed.batch, dim(0));
                    at_most(&mut fixed.rows, dim(1));
                    fixed.mask = dim(1).is_some();
                }
                (name, 4) => {
                    if let Some(cache) = caches.iter().find(|c| c.past == name) {
                        at_most(&mut fixed.batch, dim(0));
                        at_most(&mut fixed.rows, dim(2).filter(|_| !cache.sliding));
                    }
                }
                _ => {}
            }
        }
        fixed
    }
}

pub struct Model {
    session: Session,
    caches: Vec<CacheFacts>,
    /// Inputs that may be fed anything.
    idle: Vec<String>,
    others: Vec<OtherInput>,
    pub fixed: Fixed,
    state: HashMap<String, Value>,
    /// Rows of converted caches; none: an original, whose caches grow.
    capacity: Option<usize>,
    page_size: usize,
}

impl Model {
    /// `converted`: the page size of a converted model.
    pub fn new(session: Session, plan: &Plan, converted: Option<usize>) -> Self {
        let fixed = Fixed::of(&session, plan.caches);
        Self {
            session,
            caches: plan.caches.to_vec(),
            idle: plan.idle.to_vec(),
            others: plan.others.to_vec(),
            state: HashMap::new(),
            capacity: converted.map(|_| fixed.rows.unwrap_or(CAPACITY)),
            fixed,
            page_size: converted.unwrap_or(1),
        }
    }

    /// It takes one token a call, by its declared shape.
    pub fn single(&self) -> bool {
        self.fixed.tokens == Some(1)
    }

    /// What of it does not run on the device asked for.
    ///
    /// # Errors
    /// The operator itself doesn't.
    pub fn elsewhere(&self, runtime: &Runtime) -> Result<Option<String>> {
        runtime.elsewhere(&self.session)
    }

    /// Forgets everything and prepares for `batch` sequences.
    pub fn start(&mut self, batch: usize) -> Result<()> {
        self.state.clear();
        for input in self.session.inputs() {
            let (name, ValueType::Tensor { ty, shape, .. }) = (input.name(), input.dtype()) else {
                continue;
            };
            let fixed = |axis: usize| shape.get(axis).and_then(|d| usize::try_from(*d).ok());
            let shape: Vec<usize> = if let Some(cache) = self.caches.iter().find(|c| c.past == name) {
                let rows = match self.capacity {
                    _ if cache.grows => 0,
                    Some(capacity) => capacity,
                    None if cache.sliding => CAPACITY,
                    None => 0,
                };
                vec![batch, cache.heads, fixed(2).unwrap_or(rows), cache.head_size]
            } else if name.starts_with("past_retro.") {
                let pages = pages_for(self.capacity.unwrap_or(0), self.page_size);
                let size = self.caches.first().map_or(1, |c| c.head_size);
                let fill = |(axis, d): (usize, &i64)| match (axis, usize::try_from(*d)) {
                    (0, _) => batch,
                    (_, Ok(d)) => d,
                    (2, _) if name.contains(".page_") => pages,
                    _ => size,
                };
                shape.iter().enumerate().map(fill).collect()
            } else if let Some(other) = self.others.iter().find(|o| o.name == name && o.carried().is_some()) {
                other.sizes.iter().map(|size| size.of(batch, 1, 0)).collect()
            } else {
                continue;
            };
            self.state.insert(name.to_owned(), Value::zeros(*ty, &shape)?);
        }
        Ok(())
    }

    /// Keeps only the first `tokens` rows of caches that grow. Whether it can.
    pub fn rewind(&mut self, tokens: usize) -> Result<bool> {
        let carries = self.others.iter().any(|o| o.carried().is_some());
        if carries || self.fixed.rows.is_some() || self.caches.iter().any(|c| c.sliding) {
            return Ok(false);
        }
        for cache in &self.caches {
            if let Some(value) = self.state.get_mut(&cache.past) {
                *value = value.first_tokens(tokens)?;
            }
        }
        Ok(true)
    }

    /// Feeds tokens; the newest token's logits of each sequence.
    pub fn feed(&mut self, feed: &Feed) -> Result<Vec<Vec<f32>>> {
        if !self.single() || feed.retro > 0 {
            return self.feed_at_once(feed);
        }
        let mut logits = Vec::new();
        for total in feed.total - feed.count..feed.total {
            logits = self.feed_at_once(&Feed {
                count: 1,
                total: total + 1,
                ..*feed
            })?;
        }
        Ok(logits)
    }

    /// What an input is fed.
    fn value(&self, name: &str, ty: TensorElementType, shape: &[i64], feed: &Feed) -> Result<Value> {
        let (batch, first) = (feed.ids.len(), feed.total - feed.count);
        let start = |b: usize| if b + 1 == batch { feed.pad } else { 0 };
        let rows = |f: &dyn Fn(usize, usize) -> i64, from: usize, to: usize| -> Vec<i64> {
            (0..batch)
                .flat_map(|b| (from..to).map(move |j| (b, j)))
                .map(|(b, j)| f(b, j))
                .collect()
        };
        let id = |b: usize, j: usize| feed.ids.get(b).and_then(|r| r.get(j)).copied().unwrap_or(0);
        Ok(match name {
            INPUT_IDS => Value::numbers(ty, &[batch, feed.count], &rows(&id, first, feed.total))?,
            ATTENTION_MASK => {
                // One of fixed width has zeros for what is still to come.
                let fixed = shape.get(1).filter(|_| shape.len() == 2);
                let width = fixed.and_then(|d| usize::try_from(*d).ok()).unwrap_or(feed.total);
                let seen = |b: usize, j: usize| i64::from(j >= start(b) && j < feed.total);
                Value::numbers(ty, &[batch, width], &rows(&seen, 0, width))?
            }
            POSITION_IDS => {
                let position = |b: usize, j: usize| j.saturating_sub(start(b)) as i64;
                let positions = rows(&position, first, feed.total);
                if shape.len() == 3 {
                    let n = shape.first().and_then(|d| usize::try_from(*d).ok()).unwrap_or(3);
                    Value::numbers(ty, &[n, batch, feed.count], &positions.repeat(n))?
                } else {
                    Value::numbers(ty, &[batch, feed.count], &positions)?
                }
            }
            RETRO_LENGTH => Value::numbers(ty, &[1], &[i64::from(feed.retro)])?,
            PAGE_BUDGET => {
                let all = pages_for(self.capacity.unwrap_or(0), self.page_size);
                Value::numbers(ty, &[1], &[all as i64])?
            }
            _ if LOGITS_TO_KEEP.contains(&name) => Value::numbers(ty, &whole(shape), &[1])?,
            _ if self.idle.iter().any(|i| i == name) => Value::zeros(ty, &whole(shape))?,
            _ => {
                if let Some(value) = self.state.get(name) {
                    return Ok(value.clone());
                }
                let other = self.others.iter().find(|o| o.name == name);
                // What chose a branch that is the graph now.
                if other.is_none() && ty == TensorElementType::Bool {
                    return Value::numbers(ty, &whole(shape), &[i64::from(first > 0)]);
                }
                let other =
                    other.with_context(|| format!("the model takes {name}, which this comparison can't make"))?;
                other.value(ty, feed)?
            }
        })
    }

    fn feed_at_once(&mut self, feed: &Feed) -> Result<Vec<Vec<f32>>> {
        let mut inputs: Vec<(Cow<str>, SessionInputValue)> = Vec::new();
        for input in self.session.inputs() {
            let name = input.name();
            let ValueType::Tensor { ty, shape, .. } = input.dtype() else {
                bail!("the input {name} is no tensor")
            };
            let value = self.value(name, *ty, shape, feed)?;
            inputs.push((Cow::Owned(name.to_owned()), value.to_ort()?.into()));
        }
        // Overridable initializers are no inputs that a session lists.
        if self.capacity.is_some() {
            let set: Vec<&str> = inputs.iter().map(|(name, _)| name.as_ref()).collect();
            let missing: Vec<&str> = [RETRO_LENGTH, PAGE_BUDGET]
                .into_iter()
                .filter(|n| !set.contains(n))
                .collect();
            for name in missing {
                let all = pages_for(self.capacity.unwrap_or(0), self.page_size) as i64;
                let number = if name == RETRO_LENGTH {
                    i64::from(feed.retro)
                } else {
                    all
                };
                let value = Value::numbers(TensorElementType::Int32, &[1], &[number])?;
                inputs.push((Cow::Borrowed(name), value.to_ort()?.into()));
            }
        }
        let names: Vec<String> = self.session.outputs().iter().map(|o| o.name().to_owned()).collect();
        let outputs = self.session.run(inputs).map_err(|e| anyhow!("{}", one_line(&e)))?;
        let mut logits = None;
        for name in &names {
            let value = outputs
                .get(name.as_str())
                .with_context(|| format!("the output {name} is missing"))?;
            let past = match self.caches.iter().find(|c| c.present == *name) {
                Some(cache) => cache.past.clone(),
                None if name.starts_with("present_retro.") => name.replacen("present_", "past_", 1),
                None if name == "logits" => {
                    logits = Some(Value::from_ort(value)?);
                    continue;
                }
                None => match self.others.iter().find(|o| o.carried() == Some(name)) {
                    Some(other) => other.name.clone(),
                    None => continue,
                },
            };
            self.state.insert(past, Value::from_ort(value)?);
        }
        let logits = logits.context("no output is named logits")?;
        let (b, rows, vocabulary) = match *logits.shape.as_slice() {
            [b, rows, vocabulary] => (b, rows, vocabulary),
            // The newest token's alone.
            [b, vocabulary] => (b, 1, vocabulary),
            _ => bail!("logits of shape {:?}", logits.shape),
        };
        let data = logits.floats()?;
        (0..b)
            .map(|b| {
                let end = (b + 1) * rows * vocabulary;
                Ok(data.get(end - vocabulary..end).context("too few logits")?.to_vec())
            })
            .collect()
    }
}

/// A declared shape with 1 for what it leaves open.
fn whole(shape: &[i64]) -> Vec<usize> {
    shape.iter().map(|d| usize::try_from(*d).unwrap_or(1)).collect()
}
