//! The cache of an attention: which graph inputs it comes in as, which outputs it goes out as, and that it grows by the
//! tokens fed.

use super::{
    cache_aliases,
    call_invariant::invariant_chain,
    candidate::AttentionCandidate,
    refusal::{CacheRefusal, OperandKind, Refusal},
    sample_calls::SampleCalls,
};
use crate::eval::Env;
use retro_onnx::graph::GraphView;

/// A cache and what is appended to it: keys, then values.
pub struct KvCache<'a> {
    /// Graph inputs, `[B, Hkv, past, D]`.
    pub past: [&'a str; 2],
    /// Past and new together, `[B, Hkv, past + S, D]`.
    pub total: [&'a str; 2],
    /// Of the tokens fed, in whichever layout the append takes them.
    pub new: [&'a str; 2],
}

impl<'a> KvCache<'a> {
    /// The cache of a candidate: of the node itself, or that nodes before it put together.
    ///
    /// # Errors
    /// Its past is not an input of the graph; nothing is appended to it; or it can't take what is appended in a later call.
    pub fn find(samples: &SampleCalls<'a>, candidate: &AttentionCandidate<'a>) -> Result<Self, Refusal> {
        let cache = match candidate.cache {
            Some(cache) => {
                let [key, value] = cache.past.map(|past| {
                    source(samples, past).ok_or_else(|| CacheRefusal::NotAnInputOf4Dimensions { past: past.to_owned() })
                });
                Self {
                    past: [key?, value?],
                    total: cache.present,
                    new: [candidate.key, candidate.value],
                }
            }
            None => {
                let [past_key, total_key, new_key] = appended(samples, OperandKind::Keys, candidate.key)?;
                let [past_value, total_value, new_value] = appended(samples, OperandKind::Values, candidate.value)?;
                Self {
                    past: [past_key, past_value],
                    total: [total_key, total_value],
                    new: [new_key, new_value],
                }
            }
        };
        cache.takes_any_length(samples.view)?;
        Ok(cache)
    }

    /// A cache that is declared with so many tokens and gets more in each call doesn't fit the next one.
    fn takes_any_length(&self, view: &GraphView) -> Result<(), Refusal> {
        for (past, total) in self.past.into_iter().zip(self.total) {
            let axis = view
                .producer(total)
                .filter(|n| n.is("", "Concat"))
                .map(|n| n.attribute("axis"));
            let by_tokens = axis.is_none_or(|axis| axis.is_some_and(|axis| [2, -2].contains(&axis.i())));
            if let Some(tokens) = view.declared_from_end(past, 2).filter(|_| by_tokens) {
                let past = past.to_owned();
                return Err(CacheRefusal::OneLength { past, tokens }.into());
            }
        }
        Ok(())
    }

    /// Heads and head size of the past keys and of the past values, in a call.
    ///
    /// # Errors
    /// A past does not have 4 dimensions.
    pub fn past_sizes(&self, env: &Env) -> Result<[(usize, usize); 2], Refusal> {
        let sizes = |past: &str| -> Result<(usize, usize), Refusal> {
            match *env.shape(past)? {
                [_, h, _, d] => Ok((h, d)),
                ref other => Err(CacheRefusal::Shape {
                    past: past.to_owned(),
                    shape: other.to_vec(),
                }
                .into()),
            }
        };
        Ok([sizes(self.past[0])?, sizes(self.past[1])?])
    }

    /// Refuses a cache of keys that has another shape than this with the new tokens.
    ///
    /// # Errors
    /// Names both shapes.
    pub fn has_total(&self, env: &Env, expected: [usize; 4]) -> Result<(), Refusal> {
        let total = env.shape(self.total[0])?;
        if total == expected {
            return Ok(());
        }
        let found = total.to_vec();
        Err(CacheRefusal::TotalShape { found, expected }.into())
    }

    /// The graph outputs that past and new together become, by whatever name.
    ///
    /// # Errors
    /// Keys or values don't leave the graph, or in another type than they come in.
    pub fn presents(&self, samples: &SampleCalls<'a>) -> Result<[&'a str; 2], Refusal> {
        let output = |total: &'a str| {
            let output = cache_aliases::output(samples.view, total).map(|(output, _)| output);
            output.ok_or_else(|| CacheRefusal::NotAnOutput {
                present: total.to_owned(),
            })
        };
        let presents = [output(self.total[0])?, output(self.total[1])?];
        for (past, present) in self.past.into_iter().zip(presents) {
            cache_aliases::same_type(samples.view, past, present)?;
        }
        Ok(presents)
    }
}

/// Past, total and new of keys or values that the graph puts together before an attention reads them.
fn appended<'a>(samples: &SampleCalls<'a>, kind: OperandKind, operand: &'a str) -> Result<[&'a str; 3], Refusal> {
    let total = invariant_chain(samples, operand).last().copied().unwrap_or(operand);
    let node = samples.view.producer(total).filter(|n| n.is("", "Concat"));
    let inputs: Option<[&str; 2]> =
        node.and_then(|n| n.input.iter().map(String::as_str).collect::<Vec<_>>().try_into().ok());
    let cache = inputs.and_then(|[past, new]| Some([source(samples, past)?, total, new]));
    cache.ok_or_else(|| {
        if samples.caches().next().is_none() {
            return CacheRefusal::GraphHasNone.into();
        }
        let by = samples
            .view
            .producer(total)
            .map_or("an input of the graph", |n| n.op_type());
        CacheRefusal::NotAppended {
            kind,
            total: total.to_owned(),
            by: by.to_owned(),
        }
        .into()
    })
}

/// The cache of the graph that a value is, itself or by another name.
fn source<'a>(samples: &SampleCalls<'a>, name: &'a str) -> Option<&'a str> {
    let names = cache_aliases::back(samples.view, name);
    names.into_iter().find(|name| samples.is_cache(name))
}
