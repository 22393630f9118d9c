//! Reads what is added to an attention's scores: scores of 0 show the bias, scores of 1 what they are multiplied
//! with.

use super::bias::{ScoreBias, ScorePlaces, gain, read_places};
use crate::{
    eval::{Env, GraphSlice, Tensor, fused_scores},
    prove::{
        call_invariant::{MAX_CHAIN, others_are_call_invariant},
        call_shape::CallShape,
        candidate::{AttentionCandidate, ScoreSource},
        refusal::Unread,
        sample_calls::SampleCalls,
    },
};
use retro_onnx::{DataType, NodeProto};
use std::{cell::Cell, rc::Rc};

/// Numbers that are computed for one mask.
const MAX_COMPUTED: usize = 1 << 30;
/// Tokens of calls that are made once for the whole graph; of larger ones what a mask needs is computed alone.
const SMALL_CALL: usize = 16;
/// Operators that take each number by itself.
const BY_NUMBER: [&str; 11] = [
    "Add", "Sub", "Mul", "Div", "Where", "Cast", "CastLike", "Tanh", "Identity", "Max", "Min",
];

/// Reads the bias of an attention's scores.
pub struct BiasReader<'p, 'a> {
    samples: &'p SampleCalls<'a>,
    candidate: &'p AttentionCandidate<'a>,
    /// What the scores and what is added to them are computed from.
    slice: GraphSlice<'a>,
    /// Scores are known to be multiplied with one number everywhere.
    even: bool,
    /// What lies between the products and the Softmax takes each number by itself, so that one head tells of all whose mask is
    /// the same.
    by_number: bool,
    /// Numbers that were computed.
    computed: Cell<usize>,
}

impl<'p, 'a> BiasReader<'p, 'a> {
    pub fn new(samples: &'p SampleCalls<'a>, candidate: &'p AttentionCandidate<'a>) -> Self {
        let targets: Vec<&str> = match candidate.scores {
            ScoreSource::Decomposed { masked, .. } => vec![masked],
            ScoreSource::Fused(node) => node
                .input
                .iter()
                .map(String::as_str)
                .filter(|i| !i.is_empty())
                .collect(),
        };
        let by_number = |node: &NodeProto| node.op_domain().is_empty() && BY_NUMBER.contains(&node.op_type());
        let path = path_to_scores(samples, candidate);
        Self {
            samples,
            candidate,
            slice: samples.program().slice_to(&targets),
            even: path.as_ref().is_some_and(|path| is_scaled_evenly(samples, path)),
            by_number: path.is_some_and(|path| path.iter().all(|(node, _)| by_number(node))),
            computed: Cell::new(0),
        }
    }

    /// What is added to the scores in a call, at some places, and what scores are multiplied with.
    ///
    /// # Errors
    /// It can't be computed, or takes too long, or the model does not take such a call.
    pub fn read(&self, call: CallShape, places: ScorePlaces) -> Result<ScoreBias, Unread> {
        if self.computed.get() > MAX_COMPUTED {
            return Err(Unread::Long);
        }
        let env = match call.total() {
            0..=SMALL_CALL => self.samples.run(call)?,
            _ => Rc::new(self.samples.run_slice(call, &self.slice)?),
        };
        self.computed.set(self.computed.get() + env.computed());
        match self.candidate.scores {
            ScoreSource::Fused(node) => self.read_node(&env, places, node),
            ScoreSource::Decomposed { product, masked } => self.read_nodes(&env, call, places, product, masked),
        }
    }

    fn read_node(&self, env: &Env<'a>, places: ScorePlaces, node: &NodeProto) -> Result<ScoreBias, Unread> {
        let mut inputs = Vec::new();
        for name in &node.input {
            inputs.push(if name.is_empty() {
                None
            } else {
                Some(env.need(name)?.clone())
            });
        }
        let scores = fused_scores(node, &inputs)?;
        Ok(ScoreBias {
            data: self.places(&scores.bias, scores.shape, &places)?,
            heads: scores.shape[1],
            places,
            gain: None,
        })
    }

    fn read_nodes(
        &self,
        env: &Env<'a>,
        call: CallShape,
        places: ScorePlaces,
        product: &'a str,
        masked: &str,
    ) -> Result<ScoreBias, Unread> {
        let mut shape = env.shape(product)?.to_vec();
        if self.by_number && shape.len() == 4 {
            shape[1] = 1;
        }
        let scored = |x: f64| -> Result<Env<'a>, Unread> {
            let scores = Tensor::filled(shape.clone(), DataType::Float, x)?;
            Ok(self
                .samples
                .program()
                .substitute(env, vec![(product, scores)], &[masked]))
        };
        let tried = scored(0.0)?;
        let zeros = match (tried.need(masked), env.get(masked)) {
            (Ok(zeros), _) | (Err(_), Some(zeros)) => zeros,
            (Err(why), None) => return Err(why.into()),
        };
        let unknown = || Unread::DependsOnMore {
            name: masked.to_owned(),
        };
        let n: usize = zeros.shape.iter().product();
        let each = call.b * call.s * call.total();
        let tokens = zeros.shape.get(zeros.shape.len().saturating_sub(2)..);
        if tokens != Some(&[call.s, call.total()]) || each == 0 || !n.is_multiple_of(each) {
            return Err(Unread::Shape {
                name: masked.to_owned(),
                shape: zeros.shape.clone(),
            });
        }
        let full = [call.b, n / each, call.s, call.total()];
        if !zeros.has_numbers() {
            return Err(unknown());
        }
        let data = self.places(zeros, full, &places)?;
        let gain = if !self.even && call.b == 1 && call.pad == 0 {
            let ones = scored(1.0)?;
            let ones = ones.get(masked).filter(|t| t.has_numbers()).ok_or_else(unknown)?;
            let ones = self.places(ones, full, &places)?;
            gain(&data, &ones)
        } else {
            None
        };
        Ok(ScoreBias {
            data,
            heads: full[1],
            places,
            gain,
        })
    }

    fn places(&self, tensor: &Tensor, full: [usize; 4], places: &ScorePlaces) -> Result<Vec<f64>, Unread> {
        let data = read_places(tensor, full, places).ok_or(Unread::Long)?;
        self.computed.set(self.computed.get() + data.len());
        Ok(data)
    }
}

/// The nodes between the Softmax and the products, each with the value that it hands on from them; empty for fused ones.
fn path_to_scores<'a>(
    samples: &SampleCalls<'a>,
    candidate: &AttentionCandidate<'a>,
) -> Option<Vec<(&'a NodeProto, &'a str)>> {
    let ScoreSource::Decomposed { product, masked } = candidate.scores else {
        return Some(Vec::new());
    };
    let mut name = masked;
    let mut path = Vec::new();
    while name != product {
        let node = samples.view.producer(name).filter(|_| path.len() < MAX_CHAIN)?;
        name = node
            .input
            .iter()
            .map(String::as_str)
            .find(|i| samples.program().is_data_dependent(i))?;
        path.push((node, name));
    }
    Some(path)
}

/// Whether nothing but masks and sums between the products and the Softmax depends on the position.
fn is_scaled_evenly(samples: &SampleCalls, path: &[(&NodeProto, &str)]) -> bool {
    const ADDS: [&str; 2] = ["Add", "Where"];
    path.iter().all(|(node, data)| {
        let adds = node.op_domain().is_empty() && ADDS.contains(&node.op_type());
        adds || others_are_call_invariant(samples, node, data)
    })
}
