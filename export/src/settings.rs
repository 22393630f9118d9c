//! What a converted model's attention is set to.

use anyhow::{Result, ensure};
use retro_contract::{Budget, GroupScore, Mode, Selector, limits};
use std::collections::BTreeSet;

/// Settings of the operator; they become attributes and metadata.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// w: tokens fed a step at most, 1 to 64; 1 is Quest.
    pub window: usize,
    pub budget: Budget,
    /// Floor of a relative budget, in pages.
    pub min_pages: usize,
    /// Tokens a page: a power of two, 4 to 128, or 1 to 128 with the selector `sketch`; on CUDA 8 and more.
    pub page_size: usize,
    pub sink_pages: usize,
    pub selector: Selector,
    pub group_score: GroupScore,
    /// Standard deviations added to the mean by the selectors `moments` and `signed_moments`.
    pub selector_lambda: f32,
    /// Share of the spread that the selector `signed_moments` takes from the principal direction, 0 to 1.
    pub selector_correlation: f32,
    /// Bits of an element of a key's sketch with the selector `sketch`, 1 or 2.
    pub sketch_bits: usize,
    /// Which pages the layers read that are not named in `dense_layers`.
    pub mode: Mode,
    /// Layers that attend to everything.
    pub dense_layers: BTreeSet<usize>,
}

impl Default for Settings {
    /// The paper's window, budget and pages with the page selection that the evaluation recommends.
    fn default() -> Self {
        Self {
            window: limits::WINDOW,
            budget: Budget::Ratio(0.15),
            min_pages: limits::BUDGET_MIN_PAGES,
            page_size: limits::PAGE_SIZE,
            sink_pages: limits::SINK_PAGES,
            selector: Selector::SignedMoments,
            group_score: GroupScore::Softmax,
            selector_lambda: 2.0,
            selector_correlation: limits::SELECTOR_CORRELATION,
            sketch_bits: limits::SKETCH_BITS,
            mode: Mode::Retro,
            dense_layers: BTreeSet::new(),
        }
    }
}

impl Settings {
    /// The paper's own settings: Quest's page selection, and w = 2 at 15 % of the context.
    pub fn paper() -> Self {
        Self {
            selector: Selector::Bounds,
            group_score: GroupScore::Max,
            selector_lambda: limits::SELECTOR_LAMBDA,
            ..Self::default()
        }
    }

    /// # Errors
    /// A setting that the operator would refuse.
    pub fn check(&self) -> Result<()> {
        let Self {
            window,
            page_size,
            min_pages,
            sink_pages,
            selector_lambda: lambda,
            selector_correlation: correlation,
            sketch_bits,
            ..
        } = *self;
        let max = limits::WINDOW_MAX;
        ensure!(
            (1..=max).contains(&window),
            "the window is {window}; it must be 1 to {max}"
        );
        let sizes = self.selector.page_sizes();
        ensure!(
            page_size.is_power_of_two() && sizes.contains(&page_size),
            "the page size is {page_size}; with the selector {} it must be a power of two, {} to {}",
            self.selector,
            sizes.start(),
            sizes.end()
        );
        let most = limits::SKETCH_BITS_MAX;
        ensure!(
            (1..=most).contains(&sketch_bits),
            "the bits of a sketch are {sketch_bits}; they must be 1 to {most}"
        );
        ensure!(
            (1..=1 << 20).contains(&min_pages),
            "the least number of pages is {min_pages}; it must be at least 1"
        );
        ensure!(
            sink_pages <= 1 << 20,
            "the number of sink pages is {sink_pages}, more than any context has"
        );
        ensure!(
            lambda.is_finite() && lambda >= 0.0,
            "the selector's lambda is {lambda}; it must be at least 0"
        );
        ensure!(
            (0.0..=1.0).contains(&correlation),
            "the selector's correlation is {correlation}; it must be 0 to 1"
        );
        if let Budget::Tokens(tokens) = self.budget {
            ensure!(
                tokens <= 1 << 30,
                "the budget is {tokens} tokens, more than any context has"
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_out_of_range_are_refused_with_their_value() {
        assert!(Settings::default().check().is_ok());
        let refused = |change: fn(&mut Settings), what: &str| {
            let mut settings = Settings::default();
            change(&mut settings);
            let why = settings.check().unwrap_err().to_string();
            assert!(why.contains(what), "{why}");
        };
        refused(|s| s.window = 0, "window is 0");
        refused(|s| s.window = 65, "window is 65");
        refused(|s| s.page_size = 24, "page size is 24");
        refused(|s| s.page_size = 256, "page size is 256");
        refused(|s| s.page_size = 2, "page size is 2; with the selector signed_moments");
        refused(|s| s.sketch_bits = 3, "bits of a sketch are 3");
        let tokens = Settings {
            selector: Selector::Sketch,
            page_size: 1,
            ..Settings::default()
        };
        assert!(tokens.check().is_ok());
        refused(|s| s.min_pages = 0, "pages is 0");
        refused(|s| s.selector_lambda = f32::NAN, "lambda is NaN");
        refused(|s| s.selector_correlation = 1.5, "correlation is 1.5");
        refused(|s| s.budget = Budget::Tokens(usize::MAX), "budget is");
    }
}
