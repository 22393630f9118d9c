//! What the computation of a mask mentions: numbers, and tables with their sizes. A window may be either, or lie inside a table.

use super::{
    core::{Core, Scores},
    probe::{Probes, Setting},
};
use crate::eval::{Tensor, reads};
use std::collections::HashSet;

/// Constants up to this many elements are numbers that are mentioned; larger ones are tables.
const FEW: usize = 8;
const MAX_VALUES: usize = 20_000;
/// Past tokens of calls that are looked at whatever is mentioned: a window may be computed from other numbers.
const FAR: [usize; 4] = [64, 256, 1024, 4096];
/// A mask of all tokens by all tokens is made for one row: numbers that may be added from the first of these calls to the third.
const MUCH: usize = 1 << 21;
const MODERATE: usize = FAR[2];
/// Tokens that a table may be for.
const SIZES: std::ops::RangeInclusive<usize> = 10..=1_000_000;

/// What may bound what a token sees.
#[derive(Default)]
pub struct Mentioned {
    /// Integers, and their neighbours, that may be a window.
    pub numbers: Vec<usize>,
    /// Sizes of tables.
    pub sizes: Vec<usize>,
}

impl Mentioned {
    /// Walks through what computes an attention's mask.
    pub fn find(probes: &Probes, core: &Core) -> Self {
        let program = probes.program();
        let mut open: Vec<&str> = match core.scores {
            Scores::Spelled { masked, .. } => vec![masked],
            Scores::Fused(node) => node.input.iter().skip(3).map(String::as_str).collect(),
        };
        let mut seen: HashSet<&str> = HashSet::new();
        let (mut numbers, mut sizes) = (HashSet::new(), HashSet::new());
        let mut take = |t: &Tensor| match &t.data {
            Some(data) if data.len() <= FEW => {
                let whole = data
                    .iter()
                    .filter(|x| x.fract() == 0.0 && (2.0..=1e6).contains(&x.abs()));
                numbers.extend(whole.map(|x| x.abs() as usize));
            }
            _ => sizes.extend(t.shape.iter().copied().filter(|d| SIZES.contains(d))),
        };
        while let Some(name) = open.pop() {
            if name.is_empty() || !seen.insert(name) || seen.len() > MAX_VALUES {
                continue;
            }
            if let Some(constant) = program.constant(name) {
                take(constant);
            }
            let Some(node) = probes.view.producer(name) else {
                continue;
            };
            let scores = matches!(core.scores, Scores::Spelled { product, .. } if product == name);
            if !scores && !node.is("", "Shape") {
                open.extend(reads(node));
            }
        }
        let sorted = |found: HashSet<usize>| {
            let mut found: Vec<usize> = found.into_iter().collect();
            found.sort_unstable();
            found
        };
        Self {
            numbers: sorted(numbers),
            sizes: sorted(sizes),
        }
    }

    /// Past tokens of calls of one token that show a window that no number mentions: a few distances, and the last rows of tables.
    pub fn far(&self, probes: &Probes) -> Vec<usize> {
        let spent = |past: usize| probes.run(Setting::new(1, 1, past, 0)).map_or(0, |env| env.spent());
        let grows = spent(MODERATE).saturating_sub(spent(FAR[0])) > MUCH;
        let ends = self.sizes.iter().flat_map(|d| [d - 1, *d]);
        let mut far: Vec<usize> = FAR.into_iter().chain(ends).collect();
        far.retain(|past| !grows || *past <= MODERATE);
        far.sort_unstable();
        far.dedup();
        far
    }
}
