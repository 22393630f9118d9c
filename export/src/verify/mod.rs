//! The original and the converted model on the same tokens: with a budget of all pages they must give the same logits.

mod difference;
pub(crate) mod known;
mod model;
pub mod nudge;
mod runtime;
mod value;

use difference::{Difference, Own};
pub use model::{CacheFacts, LOGITS_TO_KEEP};
use model::{Feed, Model};
pub use runtime::Runtime;

use anyhow::{Context, Result};
use serde::Serialize;
use std::{fmt, path::Path};

const PROMPT: usize = 21;
const STEPS: usize = 11;
const CHUNKS: [usize; 3] = [8, 15, PROMPT];
const PADDING: usize = 3;
const CAPACITY: usize = PROMPT + STEPS + 5;
/// What rounding does to the original is believed up to this many times the tolerance, in the middle of all positions: where more
/// moves, something else is wrong.
const MOST_ROUNDING: f32 = 5.0;
/// Drawings of other tokens in padding.
const PADDINGS: u64 = 2;
/// Operators that take a range for all tokens fed together.
pub(crate) const DYNAMIC: [&str; 3] = ["DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"];

/// How padding on the left is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Padding {
    /// The converted model does not take it.
    Not,
    /// Both models are fed the padded batch.
    Both,
    /// The original reads padding as tokens (GroupQueryAttention): it is fed each sequence alone, without padding.
    Alone,
}

/// What is compared.
#[derive(Clone, Debug)]
pub struct Plan<'p> {
    pub original: &'p Path,
    /// Converted with a window of at least the largest of `windows`.
    pub converted: &'p Path,
    pub windows: &'p [usize],
    pub caches: &'p [CacheFacts],
    /// Inputs that may be fed anything.
    pub idle: &'p [String],
    pub page_size: usize,
    pub vocabulary: usize,
    /// How padding on the left is compared.
    pub padding: Padding,
    /// The original's numbers depend on which tokens are fed together (dynamic quantisation), padding among them: how much, is
    /// measured, and the converted model may differ as much.
    pub together: bool,
    /// The original with its attention rounded otherwise, where more may come of that than rounding: how much, is measured too.
    pub nudged: Option<&'p Path>,
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
    /// In the middle of all positions.
    pub median_difference: f32,
    /// How much the original differs from itself where nothing changes that is a fault, if its activations are quantised.
    pub own_difference: Option<f32>,
    /// What made that difference.
    pub own_difference_by: Option<String>,
    /// Up to what the largest difference is no fault.
    pub allowed: f32,
    /// The same of the one in the middle.
    pub allowed_median: f32,
    pub passed: bool,
    /// Share of positions where both have the same most likely token.
    pub greedy_agreement: f32,
    pub positions: usize,
}

/// A comparison that the original could not be run for.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Skipped {
    pub window: usize,
    pub batch: usize,
    pub prefill: &'static str,
    pub why: String,
}

/// All comparisons.
#[derive(Clone, Debug, Serialize)]
pub struct Verification {
    pub runtime: std::path::PathBuf,
    /// Where both models ran: "cpu" or "cuda:N".
    pub device: String,
    pub compared: Vec<Compared>,
    /// What could not be compared.
    pub skipped: Vec<Skipped>,
    /// How a run was not as asked: nodes on another device, an original that takes a prompt's rest only token by token.
    pub notes: Vec<String>,
    pub largest_logit: f32,
    pub tolerance: f32,
    pub passed: bool,
}

impl Verification {
    /// Adds what another run compared.
    pub fn join(&mut self, other: Self) {
        self.compared.extend(other.compared);
        self.compared.sort_by_key(|c| c.window);
        self.skipped.extend(other.skipped);
        self.skipped.sort_by_key(|c| c.window);
        for note in other.notes {
            if !self.notes.contains(&note) {
                self.notes.push(note);
            }
        }
        self.largest_logit = self.largest_logit.max(other.largest_logit);
        self.tolerance = self.tolerance.min(other.tolerance);
        self.passed &= other.passed;
    }

    /// Largest difference with a window.
    pub fn largest_difference(&self, window: usize) -> f32 {
        let of = self.compared.iter().filter(|c| c.window == window);
        of.map(|c| c.largest_difference).fold(0.0, f32::max)
    }

    /// Of what is too much, the largest difference, of which positions, and what is allowed.
    pub fn worst(&self) -> (f32, &'static str, f32) {
        let over = |c: &&Compared| c.largest_difference > c.allowed;
        let by = |a: &&Compared, b: &&Compared| a.largest_difference.total_cmp(&b.largest_difference);
        if let Some(c) = self.compared.iter().filter(over).max_by(by) {
            return (c.largest_difference, "", c.allowed);
        }
        let failed = self.compared.iter().filter(|c| !c.passed).max_by(by);
        failed.map_or((0.0, "", 0.0), |c| {
            (c.median_difference, " at most positions", c.allowed_median)
        })
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
            match c.own_difference.zip(c.own_difference_by.as_ref()) {
                Some((own, by)) => writeln!(f, "; the original itself, {by}: {own:.1e}")?,
                None => writeln!(f)?,
            }
        }
        for s in &self.skipped {
            writeln!(
                f,
                "verify   w = {}, batch {}, prompt {:<8} NOT COMPARED: {}",
                s.window, s.batch, s.prefill, s.why
            )?;
        }
        for note in &self.notes {
            writeln!(f, "verify   {note}")?;
        }
        let verdict = if self.passed { "equal" } else { "DIFFERENT" };
        writeln!(
            f,
            "verify   {verdict} on {}: tolerance {:.1e}, logits up to {:.1}",
            self.device, self.tolerance, self.largest_logit
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

/// Runs both models. What the original can't be run for is skipped, and said to be.
///
/// # Errors
/// One of them doesn't load, or the converted one doesn't run.
pub fn compare(runtime: &Runtime, plan: &Plan) -> Result<Verification> {
    let capacity = CAPACITY;
    let open = |path, sizes| Model::open(runtime, path, plan.caches, plan.idle, sizes);
    let mut original = open(plan.original, None).context("the original")?;
    let mut converted = open(plan.converted, Some((capacity, plan.page_size))).context("the converted model")?;
    let mut compared = Vec::new();
    let mut skipped = Vec::new();
    let mut notes: Vec<String> = [("the original", &original), ("the converted model", &converted)]
        .into_iter()
        .filter_map(|(which, model)| Some(format!("{which}: {}", model.elsewhere.as_ref()?)))
        .collect();
    let mut nudged = match plan.nudged.map(|path| open(path, None)).transpose() {
        Ok(model) => model,
        Err(why) => {
            notes.push(format!("what rounding moves in the original is not known: {why:#}"));
            None
        }
    };
    // A property of the model, not of a way of feeding it: few tokens in a few ways hit the step of a quantisation.
    let mut rounding = Own::default();
    let mut largest_logit = 0.0f32;
    for way in WAYS.iter().filter(|w| w.pad == 0 || plan.padding != Padding::Not) {
        let ids = tokens(plan.seed, way.batch, PROMPT + STEPS, plan.vocabulary);
        let mut skip = |window: usize, why: String| {
            skipped.push(Skipped {
                window,
                batch: way.batch,
                prefill: way.name,
                why,
            });
        };
        if way.pad > 0 && original.single {
            let why = "the model takes one token a call, and some calls would be padding alone";
            plan.windows.iter().for_each(|w| skip(*w, why.to_owned()));
            continue;
        }
        let expected = match original_gives(&mut original, &ids, way, 1, plan.padding) {
            Ok(run) if !comparable(&run.logits) => {
                let why = "the original's logits are no numbers";
                plan.windows.iter().for_each(|w| skip(*w, why.to_owned()));
                continue;
            }
            Ok(run) => run,
            Err(why) => {
                let why = format!("the original doesn't run: {why:#}");
                plan.windows.iter().for_each(|w| skip(*w, why.clone()));
                continue;
            }
        };
        notes.extend(expected.one_by_one.filter(|note| !notes.contains(note)));
        let expected = expected.logits;
        largest_logit = expected
            .iter()
            .flatten()
            .fold(largest_logit, |most, x| most.max(x.abs()));
        if let Some(model) = &mut nudged
            && let Ok(other) = original_gives(model, &ids, way, 1, plan.padding)
            && comparable(&other.logits)
        {
            rounding.take(&Difference::between(&expected, &other.logits)?, "rounded otherwise");
        }
        let padded = if plan.together && way.pad > 0 {
            of_padding(&mut original, &ids, way, plan, &expected).context("the original")?
        } else {
            Own::default()
        };
        for window in plan.windows {
            let mut own = padded.clone();
            if plan.together && *window > 1 {
                match original_gives(&mut original, &ids, way, *window, plan.padding) {
                    Ok(run) => {
                        let difference = Difference::between(&expected, &run.logits)?;
                        own.take(&difference, &format!("fed {window} together"));
                    }
                    Err(why) => {
                        skip(
                            *window,
                            format!(
                                "the original, whose numbers depend on which tokens are fed together, doesn't take {window}: {why:#}"
                            ),
                        );
                        continue;
                    }
                }
            }
            let got = run(&mut converted, &ids, way, *window).context("the converted model")?;
            let difference = Difference::between(&expected, &got)?;
            compared.push((*window, way, expected.len(), difference, own));
        }
    }
    let tolerance = plan.tolerance * largest_logit.max(1.0);
    if rounding.median > MOST_ROUNDING * tolerance {
        notes.push(format!(
            "rounding moves the original by {:.1e} at most positions: that explains nothing",
            rounding.median
        ));
        rounding = Own::default();
    }
    let compared: Vec<Compared> = compared
        .into_iter()
        .map(|(window, way, positions, difference, mut own)| {
            if let Some(by) = &rounding.changed {
                own.take(&rounding.difference(), by);
            }
            Compared {
                window,
                batch: way.batch,
                prefill: way.name,
                largest_difference: difference.largest,
                median_difference: difference.median,
                own_difference: own.changed.is_some().then_some(own.largest),
                allowed: own.allows(tolerance),
                allowed_median: own.allows_most(tolerance),
                passed: own.explains(&difference, tolerance),
                own_difference_by: own.changed,
                greedy_agreement: difference.same as f32 / positions.max(1) as f32,
                positions,
            }
        })
        .collect();
    let passed = compared.iter().all(|c| c.passed);
    Ok(Verification {
        runtime: runtime.library().to_owned(),
        device: runtime.device.to_string(),
        compared,
        skipped,
        notes,
        largest_logit,
        tolerance,
        passed,
    })
}

/// Whether logits are such as others can be compared with. Masks of minus infinity give none for padding, for instance; what is
/// masked among tokens may be infinite.
fn comparable(logits: &[Vec<f32>]) -> bool {
    let mut numbers = logits.iter().flatten();
    numbers.clone().any(|x| x.is_finite()) && !numbers.any(|x| x.is_nan())
}

/// How far the original moves when nothing but what it reads beside a sequence changes: the tokens in padding, or, where it is
/// fed each sequence alone, the other sequence.
fn of_padding(original: &mut Model, ids: &[Vec<i64>], way: &Way, plan: &Plan, expected: &[Vec<f32>]) -> Result<Own> {
    let mut own = Own::default();
    if plan.padding == Padding::Alone {
        let alone = Way { pad: 0, ..*way };
        if let (Ok(together), Ok(apart)) = (reference(original, ids, &alone, 1, 0), apart(original, ids, &alone, 1)) {
            own.take(
                &Difference::between(&together.logits, &apart.logits)?,
                "fed each sequence alone",
            );
        }
        return Ok(own);
    }
    for drawing in 1..=PADDINGS {
        let mut ids = ids.to_vec();
        let other = tokens(plan.seed.wrapping_add(1000 * drawing), 1, way.pad, plan.vocabulary);
        if let Some((row, other)) = ids.last_mut().zip(other.first()) {
            row.iter_mut().zip(other).for_each(|(id, other)| *id = *other);
        }
        if let Ok(run) = original_gives(original, &ids, way, 1, plan.padding) {
            own.take(
                &Difference::between(expected, &run.logits)?,
                "with other tokens in its padding",
            );
        }
    }
    Ok(own)
}

/// What the original gave.
struct Reference {
    /// After the prompt's pieces and after each step.
    logits: Vec<Vec<f32>>,
    /// Why a piece of the prompt was fed token by token, if one was.
    one_by_one: Option<String>,
}

/// What the original gives for a way of feeding, or what it gives for its sequences alone.
fn original_gives(
    model: &mut Model,
    ids: &[Vec<i64>],
    way: &Way,
    window: usize,
    padding: Padding,
) -> Result<Reference> {
    if way.pad == 0 || padding == Padding::Both {
        return reference(model, ids, way, window, 0);
    }
    apart(model, ids, way, window)
}

/// Each sequence alone, without its padding.
fn apart(model: &mut Model, ids: &[Vec<i64>], way: &Way, window: usize) -> Result<Reference> {
    let mut rows = Vec::new();
    for (b, row) in ids.iter().enumerate() {
        let skip = if b + 1 == ids.len() { way.pad } else { 0 };
        let alone = vec![row.get(skip..).unwrap_or_default().to_vec()];
        rows.push(reference(model, &alone, &Way { pad: 0, ..*way }, window, skip)?);
    }
    // Sequence by sequence to call by call.
    let calls = rows.iter().map(|r| r.logits.len()).min().unwrap_or(0);
    let logits = (0..calls).flat_map(|call| rows.iter().filter_map(move |r| r.logits.get(call).cloned()));
    Ok(Reference {
        logits: logits.collect(),
        one_by_one: rows.iter().find_map(|r| r.one_by_one.clone()),
    })
}

/// Runs the original. `skip`: how many tokens shorter than usual the prompt is. `window`: tokens fed together in steps, from a cache cut back.
fn reference(model: &mut Model, ids: &[Vec<i64>], way: &Way, window: usize, skip: usize) -> Result<Reference> {
    let feed = |count: usize, total: usize| Feed {
        ids,
        count,
        total,
        pad: way.pad,
        retro: 0,
    };
    model.start(ids.len())?;
    let (mut logits, mut one_by_one) = (Vec::new(), None);
    let mut from = 0;
    for end in way.ends.iter().map(|end| end - skip) {
        match model.feed(&feed(end - from, end)) {
            Ok(piece) => logits.extend(piece),
            Err(why) if from > 0 => {
                one_by_one = Some(format!(
                    "the original was fed a prompt's rest token by token, as together: {why:#}"
                ));
                for t in from..end {
                    let piece = model.feed(&feed(1, t + 1))?;
                    if t + 1 == end {
                        logits.extend(piece);
                    }
                }
            }
            Err(why) => return Err(why),
        }
        from = end;
    }
    for t in PROMPT - skip..PROMPT - skip + STEPS {
        let again = (window - 1).min(t);
        let again = if again > 0 && model.rewind(t - again)? {
            again
        } else {
            0
        };
        logits.extend(model.feed(&feed(again + 1, t + 1))?);
    }
    Ok(Reference { logits, one_by_one })
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
