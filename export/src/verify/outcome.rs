//! What came of a comparison, as text and as JSON.

use super::difference::Variation;
use serde::Serialize;
use std::fmt;

/// One comparison.
#[derive(Clone, Debug, Serialize)]
pub struct Compared {
    /// w, tokens fed a step.
    pub window: usize,
    /// Sequences.
    pub batch: usize,
    /// "whole", "chunked" or "padded": how the prompt was fed.
    pub prefill: &'static str,
    /// The largest difference of any logit.
    pub largest_difference: f32,
    /// Median over all positions.
    pub median_difference: f32,
    /// How much the original differs from itself where nothing changes that is a fault, if its activations are quantised.
    pub own_difference: Option<f32>,
    /// What made that difference.
    pub own_difference_by: Option<Variation>,
    /// Largest difference allowed.
    pub allowed: f32,
    /// The same of the one in the middle.
    pub allowed_median: f32,
    /// The difference is allowed.
    pub passed: bool,
    /// Share of positions where both have the same most likely token.
    pub greedy_agreement: f32,
    /// Positions that have logits of both models.
    pub positions: usize,
}

/// A comparison that the original could not be run for.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Skipped {
    /// w, tokens fed a step.
    pub window: usize,
    /// Sequences.
    pub batch: usize,
    /// As [`Compared::prefill`].
    pub prefill: &'static str,
    /// Why the original doesn't run.
    pub why: String,
}

/// All comparisons.
#[derive(Clone, Debug, Serialize)]
pub struct Verification {
    /// ONNX Runtime's library.
    pub runtime: std::path::PathBuf,
    /// Where both models ran: "cpu" or "cuda:N".
    pub device: String,
    /// What was compared.
    pub compared: Vec<Compared>,
    /// What could not be compared.
    pub skipped: Vec<Skipped>,
    /// Why the converted model does not load, or not run where the original does.
    pub broken: Option<String>,
    /// How a run was not as asked: nodes on another device, an original that takes a prompt's rest only token by token.
    pub notes: Vec<String>,
    /// The largest absolute value of the original's logits.
    pub largest_logit: f32,
    /// The largest difference that is rounding: what was asked for, times the largest logit if that is above 1.
    pub tolerance: f32,
    /// The converted model runs where its original does, and every difference is within what is allowed.
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
        self.broken = self.broken.take().or(other.broken);
        self.largest_logit = self.largest_logit.max(other.largest_logit);
        self.tolerance = self.tolerance.min(other.tolerance);
        self.passed &= other.passed;
    }

    /// Largest difference with a window.
    pub fn largest_difference(&self, window: usize) -> f32 {
        let of = self.compared.iter().filter(|c| c.window == window);
        of.map(|c| c.largest_difference).fold(0.0, f32::max)
    }

    /// Why the converted model is not to be used, if it isn't.
    pub fn fault(&self) -> Option<String> {
        if self.passed {
            return None;
        }
        if let Some(why) = &self.broken {
            return Some(format!("does not do what its original does: {why}"));
        }
        let over = |c: &&Compared| c.largest_difference > c.allowed;
        let by = |a: &&Compared, b: &&Compared| a.largest_difference.total_cmp(&b.largest_difference);
        let (difference, of, allowed) = if let Some(c) = self.compared.iter().filter(over).max_by(by) {
            (c.largest_difference, "", c.allowed)
        } else {
            let failed = self.compared.iter().filter(|c| !c.passed).max_by(by);
            failed.map_or((0.0, "", 0.0), |c| {
                (c.median_difference, " (median over positions)", c.allowed_median)
            })
        };
        Some(format!(
            "differs from its original by {difference:.1e} in a logit{of}, more than {allowed:.1e}"
        ))
    }

    /// Share of all positions where both have the same most likely token.
    pub fn greedy_agreement(&self) -> f32 {
        let (same, all) = self.compared.iter().fold((0.0, 0), |(same, all), c| {
            (same + c.greedy_agreement * c.positions as f32, all + c.positions)
        });
        if all == 0 { 1.0 } else { same / all as f32 }
    }

    /// What a comparison allows besides the tolerance, and why: one line; none where it is the tolerance alone.
    fn allowance(&self) -> Option<String> {
        let own = |c: &Compared| c.own_difference.zip(c.own_difference_by);
        let mut causes: Vec<(f32, Variation)> = Vec::new();
        for (own, by) in self.compared.iter().filter_map(own) {
            match causes.iter_mut().find(|(_, known)| *known == by) {
                Some((most, _)) => *most = most.max(own),
                None => causes.push((own, by)),
            }
        }
        if causes.is_empty() {
            return None;
        }
        let causes: Vec<String> = causes.iter().map(|(own, by)| format!("{own:.1e} {by}")).collect();
        Some(format!(
            "activations are quantised, so that the original differs from itself: by up to {}. Twice that is allowed beside the \
             tolerance",
            causes.join(", ")
        ))
    }
}

impl fmt::Display for Verification {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in &self.compared {
            let over = |over: bool| if over { " TOO MUCH" } else { "" };
            write!(
                f,
                "verify   w = {}, batch {}, prompt {:<8} largest logit difference {:.1e} of {:.1e} allowed{}",
                c.window,
                c.batch,
                c.prefill,
                c.largest_difference,
                c.allowed,
                over(c.largest_difference > c.allowed),
            )?;
            if c.own_difference.is_some() || c.median_difference > c.allowed_median {
                write!(
                    f,
                    ", median {:.1e} of {:.1e}{}",
                    c.median_difference,
                    c.allowed_median,
                    over(c.median_difference > c.allowed_median)
                )?;
            }
            writeln!(
                f,
                ", greedy agreement {:.0} % of {}",
                100.0 * c.greedy_agreement,
                c.positions
            )?;
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
        if let Some(why) = &self.broken {
            writeln!(f, "verify   BROKEN: {why}")?;
        }
        if self.compared.is_empty() {
            return Ok(());
        }
        if let Some(why) = self.allowance() {
            writeln!(f, "verify   {why}")?;
        }
        let results = if self.compared.iter().all(|c| c.passed) {
            "equal"
        } else {
            "DIFFERENT"
        };
        writeln!(
            f,
            "verify   {results} on {}: logits up to {:.1}, tolerance {:.1e}{}",
            self.device,
            self.largest_logit,
            self.tolerance,
            match self.compared.iter().map(|c| c.allowed).fold(0.0, f32::max) {
                most if most > self.tolerance => format!(", up to {most:.1e} allowed"),
                _ => String::new(),
            }
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compared(window: usize, difference: f32, own: Option<(f32, Variation)>) -> Compared {
        let allowed = 0.7 + 2.0 * own.map_or(0.0, |(own, _)| own);
        Compared {
            window,
            batch: 1,
            prefill: "whole",
            largest_difference: difference,
            median_difference: 0.1,
            own_difference: own.map(|(own, _)| own),
            own_difference_by: own.map(|(_, by)| by),
            allowed,
            allowed_median: 0.7,
            passed: difference <= allowed,
            greedy_agreement: 1.0,
            positions: 12,
        }
    }

    fn verification(compared: Vec<Compared>, broken: Option<&str>) -> Verification {
        Verification {
            runtime: "libonnxruntime.so".into(),
            device: "cpu".into(),
            passed: broken.is_none() && compared.iter().all(|c| c.passed),
            compared,
            skipped: Vec::new(),
            broken: broken.map(str::to_owned),
            notes: Vec::new(),
            largest_logit: 35.0,
            tolerance: 0.7,
        }
    }

    #[test]
    fn what_is_allowed_is_said_and_why() {
        let own = Some((0.4, Variation::RoundedOtherwise));
        let text = verification(vec![compared(1, 1.1, own), compared(2, 0.2, own)], None).to_string();
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].contains("difference 1.1e0 of 1.5e0 allowed"), "{text}");
        assert!(
            lines[2].contains("the original differs from itself") && lines[2].contains("4.0e-1 rounded otherwise"),
            "{text}"
        );
        assert!(
            lines[3].contains("equal on cpu") && lines[3].contains("tolerance 7.0e-1, up to 1.5e0 allowed"),
            "{text}"
        );
        let plain = verification(vec![compared(1, 0.1, None)], None).to_string();
        assert!(
            plain.lines().count() == 2 && plain.ends_with("tolerance 7.0e-1\n"),
            "{plain}"
        );
        let failed = verification(vec![compared(1, 0.1, None), compared(2, 0.9, None)], None);
        assert!(
            failed.to_string().contains("9.0e-1 of 7.0e-1 allowed TOO MUCH"),
            "{failed}"
        );
        assert_eq!(
            failed.fault().unwrap(),
            "differs from its original by 9.0e-1 in a logit, more than 7.0e-1"
        );
    }

    #[test]
    fn what_does_not_run_has_failed() {
        let broken = verification(Vec::new(), Some("why"));
        assert!(broken.fault().unwrap().ends_with("why"));
        let mut all = verification(vec![compared(1, 0.1, None)], None);
        assert_eq!(all.fault(), None);
        all.join(broken);
        assert!(!all.passed && all.fault().unwrap().contains("why"), "{all}");
    }
}
