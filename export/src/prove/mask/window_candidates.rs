//! The constants of a mask's computation: numbers, and tables with their sizes. A window may be either, be computed from
//! several, or lie inside a table.

use crate::{
    eval::{Tensor, reads, windows},
    prove::{
        call_shape::CallShape,
        candidate::{AttentionCandidate, ScoreSource},
        sample_calls::SampleCalls,
    },
};
use retro_onnx::{GraphProto, NodeProto, graph::subgraphs};
use std::collections::{BTreeSet, HashSet};

/// Constants up to this many elements are numbers of their own; larger ones are tables.
pub const FEW: usize = 8;
const MAX_VALUES: usize = 20_000;
/// Past tokens of calls that are read whatever the constants are: a window may be computed from other numbers. The larger ones are
/// primes: what recurs with any smaller period shows there too.
const FAR: [usize; 7] = [64, 256, 1024, 4096, 9001, 30_011, 131_071];
/// Tokens that a table may be for.
const SIZES: std::ops::RangeInclusive<usize> = 10..=1_000_000;
/// Numbers that may bound what a token sees: no model takes more tokens.
const BOUNDS: std::ops::RangeInclusive<f64> = 2.0..=2_097_152.0;
/// Calls in which numbers are computed.
pub const COMPUTED: [CallShape; 2] = [CallShape::new(1, 1, 9, 0), CallShape::new(1, 3, 5, 0)];
/// Computed numbers up to this may be the sizes of those calls; the calls of a mask's proof show windows of so few tokens anyway.
const SMALL: usize = 16;

/// What may bound what a token sees.
#[derive(Default)]
pub struct WindowCandidates {
    /// Integers, and their neighbours, that may be a window.
    pub numbers: Vec<usize>,
    /// Sizes of tables.
    pub sizes: Vec<usize>,
}

#[derive(Default)]
struct Mentioned {
    numbers: BTreeSet<usize>,
    sizes: BTreeSet<usize>,
}

impl Mentioned {
    fn constant(&mut self, t: &Tensor) {
        match &t.data {
            Some(data) if data.len() <= FEW => data.iter().for_each(|x| self.number(*x, 0)),
            _ => self.sizes.extend(t.shape.iter().copied().filter(|d| SIZES.contains(d))),
        }
    }

    /// A number, whole or not; also what it is the square or the reciprocal of, where distances are squared or scaled.
    fn number(&mut self, x: f64, above: usize) {
        let x = x.abs();
        let square = Some(x.sqrt()).filter(|root| x > *BOUNDS.end() && root.fract() == 0.0);
        let reciprocal = (x > 0.0 && x < 1.0).then(|| x.recip());
        for x in [Some(x), square, reciprocal].into_iter().flatten() {
            for bound in [x.floor(), x.ceil()] {
                if BOUNDS.contains(&bound) && bound as usize > above {
                    self.numbers.insert(bound as usize);
                }
            }
        }
    }

    /// A value that was computed, if it is one number or a few.
    fn computed(&mut self, t: &Tensor) {
        let Some(data) = t.data.as_ref() else { return };
        let first = data.first().copied().unwrap_or_default();
        if data.len() <= FEW {
            data.iter().for_each(|x| self.number(*x, SMALL));
        } else if data.iter().all(|x| *x == first) {
            self.number(first, SMALL);
        }
    }

    /// Constants of graphs inside a node.
    fn inside(&mut self, node: &NodeProto) {
        let mut open: Vec<&GraphProto> = subgraphs(node).collect();
        while let Some(graph) = open.pop() {
            let tensors = graph.initializer.iter().filter_map(Tensor::small);
            tensors.for_each(|t| self.constant(&t));
            for inner in &graph.node {
                if inner.is("", "Constant")
                    && let Some(t) = Tensor::of_constant(inner)
                {
                    self.constant(&t);
                }
                open.extend(subgraphs(inner));
            }
        }
    }
}

/// What a mask is computed from, beside the scores.
fn roots<'a>(candidate: &AttentionCandidate<'a>) -> Vec<&'a str> {
    match candidate.scores {
        ScoreSource::Decomposed { masked, .. } => vec![masked],
        ScoreSource::Fused(node) => node.input.iter().skip(3).map(String::as_str).collect(),
    }
}

impl WindowCandidates {
    /// Walks through what computes an attention's mask.
    pub fn find(samples: &SampleCalls, candidate: &AttentionCandidate) -> Self {
        let program = samples.program();
        let calls: Vec<_> = COMPUTED.iter().filter_map(|z| samples.run(*z).ok()).collect();
        let mut open = roots(candidate);
        let mut seen: HashSet<&str> = HashSet::new();
        let mut found = Mentioned::default();
        if let ScoreSource::Fused(node) = candidate.scores {
            for side in windows(node).into_iter().flatten().flatten() {
                found.number(side as f64, 0);
            }
        }
        while let Some(name) = open.pop() {
            if name.is_empty() || !seen.insert(name) || seen.len() > MAX_VALUES {
                continue;
            }
            match program.constant(name) {
                Some(constant) => found.constant(constant),
                None => calls
                    .iter()
                    .filter_map(|env| env.get(name))
                    .for_each(|t| found.computed(t)),
            }
            let Some(node) = samples.view.producer(name) else {
                continue;
            };
            found.inside(node);
            let scores = matches!(candidate.scores, ScoreSource::Decomposed { product, .. } if product == name);
            if !scores && !node.is("", "Shape") {
                open.extend(reads(node));
            }
        }
        Self {
            numbers: found.numbers.into_iter().collect(),
            sizes: found.sizes.into_iter().collect(),
        }
    }

    /// Past tokens of calls of one token that show a window that is no constant: a few distances, and the last rows of tables.
    pub fn far(&self) -> Vec<usize> {
        let ends = self.sizes.iter().flat_map(|d| [d - 1, *d]);
        let far: BTreeSet<usize> = FAR.into_iter().chain(ends).collect();
        far.into_iter().collect()
    }
}
