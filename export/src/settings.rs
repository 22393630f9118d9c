//! What a converted model's attention is set to. Each setting is one field: its meaning, its flag of `retro-export`, how it is
//! read, and its default ([`Settings::default`]); [`Settings::check`] has its range.

use clap::{
    Args, ValueEnum,
    builder::{PossibleValue, PossibleValuesParser, TypedValueParser},
};
use retro_contract::{Budget, GroupScore, Mode, Selector, limits, pages_for};
use std::{collections::BTreeSet, str::FromStr};

/// Settings of the operator. They become attributes of its nodes and metadata of the model.
#[derive(Args, Clone, Debug, PartialEq)]
pub struct Settings {
    /// Most tokens fed in a decoding step, 1 to 64: the new one, and up to window - 1 earlier ones that are fed again and
    /// corrected; 1 is Quest. `--window`, which the command line adds.
    #[arg(skip = Self::default().window)]
    pub window: usize,

    /// How much of the cache a step reads: a share of the context (0.10) or a number of tokens (2048)
    #[arg(short, long, default_value_t = Self::default().budget, value_name = "SHARE|TOKENS")]
    pub budget: Budget,

    /// Fewest pages that a step reads where the budget is a share of the context [default: pages of 512 tokens in all]
    #[arg(long, value_name = "PAGES")]
    pub min_pages: Option<usize>,

    /// Contexts of up to so many tokens are read whole, one token a step, by hosts on a CPU; 0: none [default: where
    /// --min-pages is not given, up to the length from which the window pays, and 1024 at least]
    #[arg(long, value_name = "TOKENS")]
    pub dense_below: Option<usize>,

    /// Tokens in a page: a power of two, 4 to 128, from 1 on with --selector sketch, adamas or adamas_rms
    #[arg(long, default_value_t = Self::default().page_size, value_name = "TOKENS")]
    pub page_size: usize,

    /// First pages of the context, which every step reads
    #[arg(long, default_value_t = Self::default().sink_pages, value_name = "PAGES")]
    pub sink_pages: usize,

    /// State used for scoring pages
    #[arg(long, default_value_t = Self::default().selector, value_parser = choice(Selector::ALL, Selector::as_str, Selector::meaning))]
    pub selector: Selector,

    /// How the page scores of query heads that share a key/value head are combined
    #[arg(long, default_value_t = Self::default().group_score, value_parser = choice(GroupScore::ALL, GroupScore::as_str, GroupScore::meaning))]
    pub group_score: GroupScore,

    /// Standard deviations that the selectors moments and signed_moments add to the mean
    #[arg(long, default_value_t = Self::default().selector_lambda, value_name = "NUMBER")]
    pub selector_lambda: f32,

    /// Share of the standard deviation that the selector signed_moments takes from a page's principal direction, 0 to 1
    #[arg(long, default_value_t = Self::default().selector_correlation, value_name = "NUMBER")]
    pub selector_correlation: f32,

    /// Bits of an element of a key's sketch with the selector sketch: 1 or 2
    #[arg(long, default_value_t = Self::default().sketch_bits, value_name = "BITS")]
    pub sketch_bits: usize,

    /// How the pages that a step reads are chosen, in all layers but those of --dense-layers
    #[arg(long, default_value_t = Self::default().mode, value_parser = choice(Mode::ALL, Mode::as_str, Mode::meaning))]
    pub mode: Mode,

    /// The graph keeps the last tokens and feeds them again by itself, so that a host feeds each token once
    #[arg(long)]
    pub window_in_graph: bool,

    /// Make the output ready for a host, which needs no change: implies --window-in-graph
    #[arg(long, value_name = "HOST")]
    pub host: Option<Host>,

    /// Tokens of prompt and output together that the state of --host is made for [default: max_length of the model's
    /// genai_config.json]
    #[arg(long, value_name = "TOKENS", requires = "host")]
    pub context: Option<usize>,

    /// Layers that read the whole cache, by index: `--dense-layers`, which the command line adds.
    #[arg(skip)]
    pub dense_layers: BTreeSet<usize>,
}

/// A program that runs models and makes their state by its own rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Host {
    /// onnxruntime-genai: state as its recurrent state, the plugin and the settings that it needs in the folder
    Genai,
}

impl Host {
    /// As on the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Genai => "genai",
        }
    }
}

/// Reads one of the contract's choices; help and errors list them.
fn choice<T>(
    all: &'static [T],
    text: fn(T) -> &'static str,
    meaning: fn(T) -> &'static str,
) -> impl TypedValueParser<Value = T>
where
    T: Copy + FromStr<Err: std::error::Error + Send + Sync + 'static> + Send + Sync + 'static,
{
    let value = |choice: &T| PossibleValue::new(text(*choice)).help(meaning(*choice).trim_end_matches('.'));
    PossibleValuesParser::new(all.iter().map(value).collect::<Vec<_>>()).try_map(|text| text.parse())
}

/// A setting that the operator would refuse.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// [`Settings::window`].
    #[error("the window is {0}; it must be 1 to {max}", max = limits::WINDOW_MAX)]
    Window(usize),
    /// [`Settings::page_size`].
    #[error(
        "the page size is {page_size}; with the selector {selector} it must be a power of two, {low} to {high}",
        low = selector.page_sizes().start(), high = selector.page_sizes().end()
    )]
    PageSize {
        /// What was given.
        page_size: usize,
        /// [`Settings::selector`], which has the range.
        selector: Selector,
    },
    /// [`Settings::min_pages`].
    #[error("the least number of pages is {0}; it must be 1 to {MOST_PAGES}")]
    MinPages(usize),
    /// [`Settings::dense_below`].
    #[error("contexts to read whole are up to {0} tokens, more than any context has")]
    DenseBelow(usize),
    /// [`Settings::sink_pages`].
    #[error("the number of sink pages is {0}, more than any context has")]
    SinkPages(usize),
    /// [`Settings::selector_lambda`].
    #[error("the selector's lambda is {0}; it must be at least 0")]
    SelectorLambda(f32),
    /// [`Settings::selector_correlation`].
    #[error("the selector's correlation is {0}; it must be 0 to 1")]
    SelectorCorrelation(f32),
    /// [`Settings::sketch_bits`].
    #[error("the bits of a sketch are {0}; they must be 1 to {max}", max = limits::SKETCH_BITS_MAX)]
    SketchBits(usize),
    /// [`Settings::context`].
    #[error("the context is {0} tokens; it must be 1 to {MOST_TOKENS}")]
    Context(usize),
    /// [`Settings::budget`], a number of tokens.
    #[error("the budget is {0} tokens, more than any context has")]
    Budget(usize),
}

/// Tokens that a step reads at least, unless told otherwise: reading so few takes little time whatever the context.
pub const MIN_TOKENS: usize = 512;

/// More pages and tokens than any context has.
const MOST_PAGES: usize = 1 << 20;
const MOST_TOKENS: usize = 1 << 30;

impl Default for Settings {
    /// What the evaluation recommends (docs/accuracy.md).
    fn default() -> Self {
        Self {
            window: limits::WINDOW,
            budget: Budget::Ratio(0.1),
            min_pages: None,
            dense_below: None,
            page_size: 8,
            sink_pages: limits::SINK_PAGES,
            selector: Selector::Sketch,
            group_score: GroupScore::Softmax,
            selector_lambda: 2.0,
            selector_correlation: limits::SELECTOR_CORRELATION,
            sketch_bits: limits::SKETCH_BITS,
            mode: Mode::Retro,
            window_in_graph: false,
            host: None,
            context: None,
            dense_layers: BTreeSet::new(),
        }
    }
}

impl Settings {
    /// The paper's own settings: Quest's pages and page selection, and w = 2 at 15 % of the context.
    pub fn paper() -> Self {
        Self {
            window: limits::WINDOW,
            budget: Budget::Ratio(0.15),
            min_pages: Some(limits::BUDGET_MIN_PAGES),
            page_size: limits::PAGE_SIZE,
            sink_pages: limits::SINK_PAGES,
            selector: Selector::Bounds,
            group_score: GroupScore::Max,
            selector_lambda: limits::SELECTOR_LAMBDA,
            ..Self::default()
        }
    }

    /// Whether the graph feeds tokens again by itself. Without any to feed again there is no difference.
    pub fn keeps_window_in_graph(&self) -> bool {
        (self.window_in_graph || self.host.is_some()) && self.window > 1
    }

    /// Tokens that state is made for, where a host makes it by declared sizes.
    pub fn host_context(&self) -> Option<usize> {
        self.host.and(self.context)
    }

    /// Fewest pages that a step reads: [`Self::min_pages`], or those that hold 512 tokens.
    pub fn least_pages(&self) -> usize {
        self.min_pages.unwrap_or_else(|| pages_for(MIN_TOKENS, self.page_size))
    }

    /// # Errors
    /// A setting that the operator would refuse.
    pub fn check(&self) -> Result<(), Error> {
        let (lambda, correlation) = (self.selector_lambda, self.selector_correlation);
        if !(1..=limits::WINDOW_MAX).contains(&self.window) {
            return Err(Error::Window(self.window));
        }
        if !self.page_size.is_power_of_two() || !self.selector.page_sizes().contains(&self.page_size) {
            return Err(Error::PageSize {
                page_size: self.page_size,
                selector: self.selector,
            });
        }
        if let Some(pages) = self.min_pages.filter(|pages| !(1..=MOST_PAGES).contains(pages)) {
            return Err(Error::MinPages(pages));
        }
        if let Some(tokens) = self.dense_below.filter(|tokens| *tokens > MOST_TOKENS) {
            return Err(Error::DenseBelow(tokens));
        }
        if self.sink_pages > MOST_PAGES {
            return Err(Error::SinkPages(self.sink_pages));
        }
        if !lambda.is_finite() || lambda < 0.0 {
            return Err(Error::SelectorLambda(lambda));
        }
        if !(0.0..=1.0).contains(&correlation) {
            return Err(Error::SelectorCorrelation(correlation));
        }
        if !(1..=limits::SKETCH_BITS_MAX).contains(&self.sketch_bits) {
            return Err(Error::SketchBits(self.sketch_bits));
        }
        if let Some(context) = self.context.filter(|tokens| !(1..=MOST_TOKENS).contains(tokens)) {
            return Err(Error::Context(context));
        }
        match self.budget {
            Budget::Tokens(tokens) if tokens > MOST_TOKENS => Err(Error::Budget(tokens)),
            _ => Ok(()),
        }
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
        refused(
            |s| (s.page_size, s.selector) = (2, Selector::SignedMoments),
            "page size is 2; with the selector signed_moments",
        );
        refused(|s| s.sketch_bits = 3, "bits of a sketch are 3");
        let tokens = Settings {
            page_size: 1,
            ..Settings::default()
        };
        assert!(tokens.check().is_ok());
        refused(|s| s.min_pages = Some(0), "pages is 0");
        refused(|s| s.dense_below = Some(usize::MAX), "read whole");
        refused(|s| s.selector_lambda = f32::NAN, "lambda is NaN");
        refused(|s| s.selector_correlation = 1.5, "correlation is 1.5");
        refused(|s| s.budget = Budget::Tokens(usize::MAX), "budget is");
    }

    #[test]
    fn the_floor_is_a_number_of_tokens_unless_given_in_pages() {
        for page_size in [1, 4, 8, 128] {
            let settings = Settings {
                page_size,
                ..Settings::default()
            };
            assert_eq!(settings.least_pages() * page_size, 512);
        }
        let given = Settings {
            min_pages: Some(3),
            ..Settings::default()
        };
        assert_eq!(given.least_pages(), 3);
        assert_eq!(Settings::paper().least_pages(), 4);
    }
}
