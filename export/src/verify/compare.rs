//! Compares two models, schedule by schedule and window by window.

use super::{
    compared_model::ComparedModel,
    comparison::Comparison,
    difference::{LogitDifference, OwnDifference, Variation},
    error::Error,
    feeding::{ConvertedFeeding, Reference, draw_tokens, feed_converted, feed_original, own_difference_of_padding},
    outcome::{Compared, Skipped, Verification},
    runtime::ComparisonRuntime,
    schedule::{FeedSchedule, schedules},
};
use crate::error::chain;

/// What rounding does to the original is believed up to this many times the tolerance, in the middle of all positions: where more
/// moves, something else is wrong.
const MOST_ROUNDING: f32 = 5.0;

/// Runs both models. What the original can't be run for is skipped, and said to be; where the original runs and the converted model
/// doesn't, the comparison says so and has failed.
///
/// # Errors
/// The original doesn't load, or the operator isn't on the device asked for: there is nothing to compare.
pub fn compare(runtime: &ComparisonRuntime, comparison: &Comparison) -> Result<Verification, Error> {
    let original_error = |why| Error::Original(Box::new(why));
    let open_original = |path| {
        let session = runtime.open(path, false)?;
        Ok(ComparedModel::original(session, comparison))
    };
    let mut original = open_original(comparison.original).map_err(original_error)?;
    let converted = runtime.open(comparison.converted, true);
    let converted = converted.map(|session| ComparedModel::converted(session, comparison));
    let mut notes = Vec::new();
    if let Some(what) = original.elsewhere(runtime).map_err(original_error)? {
        notes.push(format!("the original: {what}"));
    }
    if let Ok(model) = &converted {
        let elsewhere = model
            .elsewhere(runtime)
            .map_err(|why| Error::Converted(Box::new(why)))?;
        notes.extend(elsewhere.map(|what| format!("the converted model: {what}")));
    }
    let mut perturbed = match comparison.perturbed.map(open_original).transpose() {
        Ok(model) => model,
        Err(why) => {
            let why = chain(&why);
            notes.push(format!("what rounding moves in the original is not known: {why}"));
            None
        }
    };
    let mut run = ComparisonRun {
        comparison,
        converted,
        notes,
        skipped: Vec::new(),
        broken: None,
        measured: Vec::new(),
        rounding: OwnDifference::default(),
        largest_logit: 0.0,
    };
    for schedule in schedules(&original.declared, comparison.padding) {
        run.compare(&schedule, &mut original, perturbed.as_mut())?;
        if run.broken.is_some() {
            break;
        }
    }
    Ok(run.finish(runtime))
}

/// A comparison under way.
struct ComparisonRun<'c> {
    comparison: &'c Comparison<'c>,
    /// Or why it doesn't load.
    converted: Result<ComparedModel, Error>,
    notes: Vec<String>,
    skipped: Vec<Skipped>,
    broken: Option<String>,
    measured: Vec<Measured>,
    /// What rounding moves in the original. A property of the model, not of a schedule: few tokens in a few schedules hit the step
    /// of a quantisation.
    rounding: OwnDifference,
    largest_logit: f32,
}

/// What was measured for a window and a schedule.
struct Measured {
    window: usize,
    schedule: FeedSchedule,
    positions: usize,
    difference: LogitDifference,
    /// What the original makes of the same changes.
    own: OwnDifference,
}

impl ComparisonRun<'_> {
    fn skip(&mut self, window: usize, schedule: &FeedSchedule, why: &str) {
        self.skipped.push(Skipped {
            window,
            batch: schedule.batch,
            prefill: schedule.name,
            why: why.to_owned(),
        });
    }

    fn skip_all(&mut self, schedule: &FeedSchedule, why: &str) {
        for window in self.comparison.windows {
            self.skip(*window, schedule, why);
        }
    }

    fn compare(
        &mut self,
        schedule: &FeedSchedule,
        original: &mut ComparedModel,
        perturbed: Option<&mut ComparedModel>,
    ) -> Result<(), Error> {
        let comparison = self.comparison;
        let ids = draw_tokens(
            comparison.seed,
            schedule.batch,
            schedule.tokens(),
            comparison.vocabulary,
        );
        let Some(expected) = self.expected(schedule, original, &ids) else {
            return Ok(());
        };
        self.measure_rounding(schedule, perturbed, &ids, &expected)?;
        let of_padding = if comparison.dynamic_quantization && schedule.padding > 0 {
            own_difference_of_padding(original, &ids, schedule, comparison, &expected)
                .map_err(|why| Error::Original(Box::new(why)))?
        } else {
            OwnDifference::default()
        };
        for window in comparison.windows.iter().copied() {
            let mut own = of_padding.clone();
            if comparison.dynamic_quantization && window > 1 {
                match feed_original(original, &ids, schedule, window, comparison.padding) {
                    Ok(run) => {
                        let difference = LogitDifference::between(&expected.logits, &run.logits)?;
                        own.include(&difference, Variation::FedTogether(window));
                    }
                    Err(why) => {
                        let why = format!(
                            "the original, whose numbers depend on which tokens are fed together, doesn't take {window}: {}",
                            chain(&why)
                        );
                        self.skip(window, schedule, &why);
                        continue;
                    }
                }
            }
            match self.difference(schedule, &ids, window, &expected) {
                Ok(difference) => self.measured.push(Measured {
                    window,
                    schedule: schedule.clone(),
                    positions: expected.logits.len(),
                    difference,
                    own,
                }),
                Err(why) => {
                    self.broken = Some(why);
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// What the original gives; none where it doesn't run so, which is skipped.
    fn expected(
        &mut self,
        schedule: &FeedSchedule,
        original: &mut ComparedModel,
        ids: &[Vec<i64>],
    ) -> Option<Reference> {
        if schedule.padding > 0 && original.takes_single_tokens() {
            let why = "the model takes one token a call, and some calls would be padding alone";
            self.skip_all(schedule, why);
            return None;
        }
        if let Some(batch) = original.declared.batch.filter(|b| *b != schedule.batch) {
            let why = format!(
                "the original doesn't run: by its declared shapes it takes {batch} sequence(s) a call, no other number"
            );
            self.skip_all(schedule, &why);
            return None;
        }
        match feed_original(original, ids, schedule, 1, self.comparison.padding) {
            Ok(run) if !run.is_comparable() => {
                self.skip_all(schedule, "the original's logits are no numbers");
                None
            }
            Ok(run) => {
                let note = run.one_by_one.clone();
                self.notes.extend(note.filter(|note| !self.notes.contains(note)));
                let logits = run.logits.iter().flatten();
                self.largest_logit = logits.fold(self.largest_logit, |most, x| most.max(x.abs()));
                Some(run)
            }
            Err(why) => {
                self.skip_all(schedule, &format!("the original doesn't run: {}", chain(&why)));
                None
            }
        }
    }

    fn measure_rounding(
        &mut self,
        schedule: &FeedSchedule,
        perturbed: Option<&mut ComparedModel>,
        ids: &[Vec<i64>],
        expected: &Reference,
    ) -> Result<(), Error> {
        if let Some(model) = perturbed
            && let Ok(other) = feed_original(model, ids, schedule, 1, self.comparison.padding)
            && other.is_comparable()
        {
            let difference = LogitDifference::between(&expected.logits, &other.logits)?;
            self.rounding.include(&difference, Variation::RoundedOtherwise);
        }
        Ok(())
    }

    /// How far the converted model is from what is expected; or why it doesn't run.
    fn difference(
        &mut self,
        schedule: &FeedSchedule,
        ids: &[Vec<i64>],
        window: usize,
        expected: &Reference,
    ) -> Result<LogitDifference, String> {
        let converted = match &mut self.converted {
            Ok(converted) => converted,
            Err(why) => return Err(format!("the original runs, and of the converted model {}", chain(why))),
        };
        let takes_wide_masks = converted.takes_wide_masks();
        let mut difference = |wide_masks: bool| {
            let feeding = ConvertedFeeding {
                window,
                in_graph: self.comparison.window_in_graph,
                wide_masks,
            };
            let run = feed_converted(converted, ids, schedule, feeding);
            let difference = run.and_then(|logits| LogitDifference::between(&expected.logits, &logits));
            difference.map_err(|why| {
                let masks = if wide_masks { ", masks as wide as the caches" } else { "" };
                format!(
                    "with w = {window}, batch {}, prompt {}{masks} the original runs, and the converted model doesn't: {}",
                    schedule.batch,
                    schedule.name,
                    chain(&why)
                )
            })
        };
        let usual = difference(false)?;
        // One window is enough: the widths' difference ends in the lengths, before attention.
        let widest = self.comparison.windows.iter().max() == Some(&window);
        if widest && takes_wide_masks {
            return Ok(usual.worst(difference(true)?));
        }
        Ok(usual)
    }

    fn finish(mut self, runtime: &ComparisonRuntime) -> Verification {
        let tolerance = self.comparison.tolerance * self.largest_logit.max(1.0);
        if self.rounding.median > MOST_ROUNDING * tolerance {
            self.notes.push(format!(
                "rounding moves the original by {:.1e} in a logit (median over positions): that explains nothing",
                self.rounding.median
            ));
            self.rounding = OwnDifference::default();
        }
        let rounding = self.rounding;
        let compared: Vec<Compared> = self
            .measured
            .into_iter()
            .map(|measured| measured.judge(&rounding, tolerance))
            .collect();
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

impl Measured {
    /// `tolerance`: what is rounding for the logits at hand.
    fn judge(self, rounding: &OwnDifference, tolerance: f32) -> Compared {
        let Self {
            difference, mut own, ..
        } = self;
        own.include_all(rounding);
        Compared {
            window: self.window,
            batch: self.schedule.batch,
            prefill: self.schedule.name,
            largest_difference: difference.largest,
            median_difference: difference.median,
            own_difference: own.cause.is_some().then_some(own.largest),
            own_difference_by: own.cause,
            allowed: own.largest_allowed(tolerance),
            allowed_median: own.median_allowed(tolerance),
            passed: own.explains(&difference, tolerance),
            greedy_agreement: difference.same_token as f32 / self.positions.max(1) as f32,
            positions: self.positions,
        }
    }
}
