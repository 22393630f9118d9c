//! The original and the converted model on the same tokens: with a budget of all pages they must give the same logits.

mod compared_model;
mod difference;
pub(crate) mod graph_facts;
mod host_tensor;
mod other_inputs;
mod outcome;
mod runtime;
mod schedule;
pub mod ulp;

pub use compared_model::{CacheFacts, LOGITS_TO_KEEP};
use compared_model::{Feed, Model};
use difference::{Difference, Own};
pub use other_inputs::{Fed, OtherInput, other_inputs};
pub use outcome::{Compared, Skipped, Verification};
pub use runtime::Runtime;
use schedule::Way;

use anyhow::{Context, Result};
use std::path::Path;

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
    /// Inputs beside tokens, mask, positions and caches.
    pub others: &'p [OtherInput],
    pub page_size: usize,
    pub vocabulary: usize,
    /// How padding on the left is compared.
    pub padding: Padding,
    /// The original's numbers depend on which tokens are fed together (dynamic quantisation), padding among them: how much, is
    /// measured, and the converted model may differ as much.
    pub together: bool,
    /// The original with its attention rounded otherwise, where more may come of that than rounding: how much, is measured too.
    pub perturbed: Option<&'p Path>,
    /// Largest difference that is rounding, for logits of up to 1; larger ones allow as much more.
    pub tolerance: f32,
    pub seed: u64,
}

/// Runs both models. What the original can't be run for is skipped, and said to be; where the original runs and the converted model
/// doesn't, the comparison says so and has failed.
///
/// # Errors
/// The original doesn't load, or the operator isn't on the device asked for: there is nothing to compare.
pub fn compare(runtime: &Runtime, plan: &Plan) -> Result<Verification> {
    let opened = |path| runtime.open(path, false).map(|session| Model::new(session, plan, None));
    let mut original = opened(plan.original).context("the original")?;
    let converted = runtime.open(plan.converted, true);
    let converted = converted.map(|session| Model::new(session, plan, Some(plan.page_size)));
    let mut notes = Vec::new();
    for (which, model) in [
        ("the original", Some(&original)),
        ("the converted model", converted.as_ref().ok()),
    ] {
        let elsewhere = model.map(|m| m.elsewhere(runtime)).transpose().context(which)?;
        notes.extend(elsewhere.flatten().map(|what| format!("{which}: {what}")));
    }
    let mut perturbed = match plan.perturbed.map(opened).transpose() {
        Ok(model) => model,
        Err(why) => {
            notes.push(format!("what rounding moves in the original is not known: {why:#}"));
            None
        }
    };
    let mut run = Run {
        plan,
        converted,
        notes,
        skipped: Vec::new(),
        broken: None,
        found: Vec::new(),
        rounding: Own::default(),
        largest_logit: 0.0,
    };
    for way in schedule::ways(&original.fixed, plan.padding) {
        run.compare(&way, &mut original, perturbed.as_mut())?;
        if run.broken.is_some() {
            break;
        }
    }
    Ok(run.finish(runtime))
}

/// A comparison under way.
struct Run<'p> {
    plan: &'p Plan<'p>,
    converted: Result<Model>,
    notes: Vec<String>,
    skipped: Vec<Skipped>,
    broken: Option<String>,
    /// For a window and a way: how many positions were compared, the difference, what the original makes of the same changes.
    found: Vec<(usize, Way, usize, Difference, Own)>,
    /// What rounding moves in the original. A property of the model, not of a way of feeding it: few tokens in a few ways hit the step of
    /// a quantisation.
    rounding: Own,
    largest_logit: f32,
}

impl Run<'_> {
    fn skip(&mut self, window: usize, way: &Way, why: &str) {
        self.skipped.push(Skipped {
            window,
            batch: way.batch,
            prefill: way.name,
            why: why.to_owned(),
        });
    }

    fn skip_all(&mut self, way: &Way, why: &str) {
        for window in self.plan.windows {
            self.skip(*window, way, why);
        }
    }

    fn compare(&mut self, way: &Way, original: &mut Model, perturbed: Option<&mut Model>) -> Result<()> {
        let plan = self.plan;
        let ids = tokens(plan.seed, way.batch, way.tokens(), plan.vocabulary);
        if way.pad > 0 && original.single() {
            self.skip_all(
                way,
                "the model takes one token a call, and some calls would be padding alone",
            );
            return Ok(());
        }
        if let Some(batch) = original.fixed.batch.filter(|b| *b != way.batch) {
            let why = format!(
                "the original doesn't run: by its declared shapes it takes {batch} sequence(s) a call, no other number"
            );
            self.skip_all(way, &why);
            return Ok(());
        }
        let expected = match original_gives(original, &ids, way, 1, plan.padding) {
            Ok(run) if !comparable(&run.logits) => {
                self.skip_all(way, "the original's logits are no numbers");
                return Ok(());
            }
            Ok(run) => run,
            Err(why) => {
                self.skip_all(way, &format!("the original doesn't run: {why:#}"));
                return Ok(());
            }
        };
        self.notes
            .extend(expected.one_by_one.filter(|note| !self.notes.contains(note)));
        let expected = expected.logits;
        self.largest_logit = expected
            .iter()
            .flatten()
            .fold(self.largest_logit, |most, x| most.max(x.abs()));
        if let Some(model) = perturbed
            && let Ok(other) = original_gives(model, &ids, way, 1, plan.padding)
            && comparable(&other.logits)
        {
            self.rounding
                .take(&Difference::between(&expected, &other.logits)?, "rounded otherwise");
        }
        let padded = if plan.together && way.pad > 0 {
            of_padding(original, &ids, way, plan, &expected).context("the original")?
        } else {
            Own::default()
        };
        for window in plan.windows {
            let mut own = padded.clone();
            if plan.together && *window > 1 {
                match original_gives(original, &ids, way, *window, plan.padding) {
                    Ok(run) => {
                        let difference = Difference::between(&expected, &run.logits)?;
                        own.take(&difference, &format!("fed {window} together"));
                    }
                    Err(why) => {
                        let why = format!(
                            "the original, whose numbers depend on which tokens are fed together, doesn't take {window}: {why:#}"
                        );
                        self.skip(*window, way, &why);
                        continue;
                    }
                }
            }
            let got = match &mut self.converted {
                Ok(converted) => run(converted, &ids, way, *window)
                    .and_then(|got| Difference::between(&expected, &got))
                    .map_err(|why| {
                        format!(
                            "with w = {window}, batch {}, prompt {} the original runs, and the converted model doesn't: {why:#}",
                            way.batch, way.name
                        )
                    }),
                Err(why) => Err(format!("the original runs, and of the converted model {why:#}")),
            };
            match got {
                Ok(difference) => self.found.push((*window, way.clone(), expected.len(), difference, own)),
                Err(why) => {
                    self.broken = Some(why);
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn finish(mut self, runtime: &Runtime) -> Verification {
        let tolerance = self.plan.tolerance * self.largest_logit.max(1.0);
        if self.rounding.median > MOST_ROUNDING * tolerance {
            self.notes.push(format!(
                "rounding moves the original by {:.1e} in a logit (median over positions): that explains nothing",
                self.rounding.median
            ));
            self.rounding = Own::default();
        }
        let rounding = self.rounding;
        let compared = |(window, way, positions, difference, mut own): (usize, Way, usize, Difference, Own)| {
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
        };
        let compared: Vec<Compared> = self.found.into_iter().map(compared).collect();
        Verification {
            runtime: runtime.library().to_owned(),
            device: runtime.device.to_string(),
            passed: self.broken.is_none() && compared.iter().all(|c| c.passed),
            compared,
            skipped: self.skipped,
            broken: self.broken,
            notes: self.notes,
            largest_logit: self.largest_logit,
            tolerance,
        }
    }
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
        let alone = way.unpadded();
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

/// Each sequence alone, without its padding; as often as a model takes sequences that is made for one number of them.
fn apart(model: &mut Model, ids: &[Vec<i64>], way: &Way, window: usize) -> Result<Reference> {
    let mut rows = Vec::new();
    for (b, row) in ids.iter().enumerate() {
        let skip = if b + 1 == ids.len() { way.pad } else { 0 };
        let copies = model.fixed.batch.unwrap_or(1);
        let alone = vec![row.get(skip..).unwrap_or_default().to_vec(); copies];
        let mut run = reference(model, &alone, &way.unpadded(), window, skip)?;
        run.logits = run.logits.into_iter().step_by(copies.max(1)).collect();
        rows.push(run);
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
    for t in way.prompt() - skip..way.tokens() - skip {
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
    for end in way.ends.iter().copied() {
        logits.extend(model.feed(&Feed {
            ids,
            count: end - from,
            total: end,
            pad: way.pad,
            retro: -1,
        })?);
        from = end;
    }
    for t in way.prompt()..way.tokens() {
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
