//! The original and the converted model on the same tokens: with a budget of all pages they must give the same logits.

mod model;
mod runtime;
mod value;

pub use model::CacheFacts;
use model::{Feed, Model};
pub use runtime::Runtime;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use std::{fmt, path::Path};

const PROMPT: usize = 21;
const STEPS: usize = 11;
const CHUNKS: [usize; 3] = [8, 15, PROMPT];
const PADDING: usize = 3;
const CAPACITY: usize = PROMPT + STEPS + 5;

/// What is compared.
#[derive(Clone, Debug)]
pub struct Plan<'p> {
    pub original: &'p Path,
    /// Converted with a window of at least the largest of `windows`.
    pub converted: &'p Path,
    pub windows: &'p [usize],
    pub caches: &'p [CacheFacts],
    pub page_size: usize,
    pub vocabulary: usize,
    /// Whether padding on the left can be compared too.
    pub padding: bool,
    /// The original's numbers depend on which tokens are fed together (dynamic quantisation): how much, is measured, and the
    /// converted model may differ as much when it feeds several.
    pub together: bool,
    /// Largest difference that is rounding, for logits of up to 1; larger ones allow as much more.
    pub tolerance: f32,
    pub seed: u64,
}

/// One comparison.
#[derive(Clone, Debug, Serialize)]
pub struct Compared {
    pub window: usize,
    pub batch: usize,
    /// "whole", "chunked" or "padded": how the prompt was fed.
    pub prefill: &'static str,
    pub largest_difference: f32,
    /// How much the original differs from itself when it is fed as many tokens together, where that matters.
    pub own_difference: Option<f32>,
    /// Share of positions where both have the same most likely token.
    pub greedy_agreement: f32,
    pub positions: usize,
}

/// All comparisons.
#[derive(Clone, Debug, Serialize)]
pub struct Verification {
    pub runtime: std::path::PathBuf,
    pub compared: Vec<Compared>,
    pub largest_logit: f32,
    pub tolerance: f32,
    pub passed: bool,
}

impl Verification {
    /// Adds what another run compared.
    pub fn join(&mut self, other: Self) {
        self.compared.extend(other.compared);
        self.compared.sort_by_key(|c| c.window);
        self.largest_logit = self.largest_logit.max(other.largest_logit);
        self.tolerance = self.tolerance.min(other.tolerance);
        self.passed &= other.passed;
    }

    /// Largest difference with a window.
    pub fn largest_difference(&self, window: usize) -> f32 {
        let of = self.compared.iter().filter(|c| c.window == window);
        of.map(|c| c.largest_difference).fold(0.0, f32::max)
    }

    pub fn greedy_agreement(&self) -> f32 {
        let (same, all) = self.compared.iter().fold((0.0, 0), |(same, all), c| {
            (same + c.greedy_agreement * c.positions as f32, all + c.positions)
        });
        if all == 0 { 1.0 } else { same / all as f32 }
    }
}

impl fmt::Display for Verification {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in &self.compared {
            write!(
                f,
                "verify   w = {}, batch {}, prompt {:<8} largest logit difference {:.1e}, greedy agreement {:.0} % of {}",
                c.window,
                c.batch,
                c.prefill,
                c.largest_difference,
                100.0 * c.greedy_agreement,
                c.positions
            )?;
            match c.own_difference {
                Some(own) => writeln!(f, "; the original itself, fed {} together: {own:.1e}", c.window)?,
                None => writeln!(f)?,
            }
        }
        let verdict = if self.passed { "equal" } else { "DIFFERENT" };
        writeln!(
            f,
            "verify   {verdict}: tolerance {:.1e}, logits up to {:.1}",
            self.tolerance, self.largest_logit
        )
    }
}

/// How a prompt is fed: name, sequences, where its pieces end, padding.
struct Way {
    name: &'static str,
    batch: usize,
    ends: &'static [usize],
    pad: usize,
}

const WAYS: [Way; 4] = [
    Way {
        name: "whole",
        batch: 1,
        ends: &[PROMPT],
        pad: 0,
    },
    Way {
        name: "chunked",
        batch: 1,
        ends: &CHUNKS,
        pad: 0,
    },
    Way {
        name: "whole",
        batch: 2,
        ends: &[PROMPT],
        pad: 0,
    },
    Way {
        name: "padded",
        batch: 2,
        ends: &[PROMPT],
        pad: PADDING,
    },
];

/// Runs both models.
///
/// # Errors
/// One of them doesn't load or run.
pub fn compare(runtime: &Runtime, plan: &Plan) -> Result<Verification> {
    let capacity = CAPACITY;
    let mut original = Model::open(runtime, plan.original, plan.caches, None).context("the original")?;
    let mut converted = Model::open(runtime, plan.converted, plan.caches, Some((capacity, plan.page_size)))
        .context("the converted model")?;
    let mut compared = Vec::new();
    let mut largest_logit = 0.0f32;
    for way in WAYS.iter().filter(|w| w.pad == 0 || plan.padding) {
        let ids = tokens(plan.seed, way.batch, PROMPT + STEPS, plan.vocabulary);
        let expected = reference(&mut original, &ids, way, 1)?;
        largest_logit = expected
            .iter()
            .flatten()
            .fold(largest_logit, |most, x| most.max(x.abs()));
        for window in plan.windows {
            let got = run(&mut converted, &ids, way, *window).context("the converted model")?;
            let (largest_difference, same) = difference(&expected, &got)?;
            let own_difference = if plan.together && *window > 1 {
                Some(difference(&expected, &reference(&mut original, &ids, way, *window)?)?.0)
            } else {
                None
            };
            compared.push(Compared {
                window: *window,
                batch: way.batch,
                prefill: way.name,
                largest_difference,
                own_difference,
                greedy_agreement: same as f32 / expected.len().max(1) as f32,
                positions: expected.len(),
            });
        }
    }
    let tolerance = plan.tolerance * largest_logit.max(1.0);
    // Rounding that differs twice, once in each model.
    let allowed = |c: &Compared| tolerance + c.own_difference.map_or(0.0, |own| 2.0 * own);
    let passed = compared.iter().all(|c| c.largest_difference <= allowed(c));
    Ok(Verification {
        runtime: runtime.library.clone(),
        compared,
        largest_logit,
        tolerance,
        passed,
    })
}

/// The largest difference of a logit, and how many positions have the same most likely token.
fn difference(expected: &[Vec<f32>], got: &[Vec<f32>]) -> Result<(f32, usize)> {
    ensure!(
        expected.len() == got.len(),
        "the two models give different numbers of logits"
    );
    let (mut worst, mut same) = (0.0f32, 0);
    for (a, b) in expected.iter().zip(got) {
        ensure!(
            a.len() == b.len(),
            "the two models have {} and {} logits",
            a.len(),
            b.len()
        );
        for (a, b) in a.iter().zip(b) {
            // Not a number anywhere is a difference, unless both have it.
            let d = if a.is_nan() && b.is_nan() || a == b {
                0.0
            } else {
                (a - b).abs()
            };
            worst = worst.max(if d.is_nan() { f32::INFINITY } else { d });
        }
        same += usize::from(best(a) == best(b));
    }
    Ok((worst, same))
}

/// The original's logits after the prompt and after each step. `window`: tokens fed together, from a cache cut back.
fn reference(model: &mut Model, ids: &[Vec<i64>], way: &Way, window: usize) -> Result<Vec<Vec<f32>>> {
    model.start(ids.len()).context("the original")?;
    let mut logits = Vec::new();
    let mut from = 0;
    for end in way.ends {
        let piece = model.feed(&Feed {
            ids,
            count: end - from,
            total: *end,
            pad: way.pad,
            retro: 0,
        });
        match piece {
            Ok(piece) => logits.extend(piece),
            // An original that takes several tokens only without a past is fed the prompt's rest one by one.
            Err(_) if from > 0 => {
                for t in from..*end {
                    let piece = model.feed(&Feed {
                        ids,
                        count: 1,
                        total: t + 1,
                        pad: way.pad,
                        retro: 0,
                    });
                    let piece = piece.context("the original")?;
                    if t + 1 == *end {
                        logits.extend(piece);
                    }
                }
            }
            Err(e) => return Err(e.context("the original")),
        }
        from = *end;
    }
    for t in PROMPT..PROMPT + STEPS {
        let again = (window - 1).min(t);
        let again = if again > 0 && model.rewind(t - again)? {
            again
        } else {
            0
        };
        let step = model.feed(&Feed {
            ids,
            count: again + 1,
            total: t + 1,
            pad: way.pad,
            retro: 0,
        });
        logits.extend(step.context("the original")?);
    }
    Ok(logits)
}

fn run(model: &mut Model, ids: &[Vec<i64>], way: &Way, window: usize) -> Result<Vec<Vec<f32>>> {
    model.start(ids.len())?;
    let mut logits = Vec::new();
    let mut from = 0;
    for end in way.ends {
        logits.extend(model.feed(&Feed {
            ids,
            count: end - from,
            total: *end,
            pad: way.pad,
            retro: -1,
        })?);
        from = *end;
    }
    for t in PROMPT..PROMPT + STEPS {
        let again = (window - 1).min(t);
        let feed = Feed {
            ids,
            count: again + 1,
            total: t + 1,
            pad: way.pad,
            retro: again as i32,
        };
        logits.extend(model.feed(&feed)?);
    }
    Ok(logits)
}

fn tokens(seed: u64, batch: usize, count: usize, vocabulary: usize) -> Vec<Vec<i64>> {
    let low = 3.min(vocabulary.saturating_sub(1));
    let span = (vocabulary - low).max(1) as f64;
    let row = |b: usize| {
        let numbers = crate::rules::noise(count, seed.wrapping_add(b as u64));
        numbers
            .into_iter()
            .map(|x| low as i64 + ((x + 1.0) / 2.0 * span) as i64)
            .collect()
    };
    (0..batch).map(row).collect()
}

fn best(logits: &[f32]) -> Option<usize> {
    let by = |a: &(usize, &f32), b: &(usize, &f32)| a.1.total_cmp(b.1);
    logits.iter().enumerate().max_by(by).map(|(i, _)| i)
}
