//! Names of the graph inputs and outputs that a converted model gains.

/// Graph input: int32 `[1]` (or `[B]`), an initializer 0 as its default.
pub const RETRO_LENGTH: &str = "retro_length";
/// Graph input: int32 `[1]` (or `[B]`), an initializer 0 as its default (0: the budget of the attributes).
pub const PAGE_BUDGET: &str = "retro_page_budget";

/// Graph input of a model that keeps its window itself: int32 `[B, N]`, zeros at first. How many tokens the next step
/// feeds again, the valid tokens after the last call, then of the last w - 1 tokens the ids and the positions, as far as
/// the graph takes these. [`PRESENT_WINDOW`] is what the next call takes.
pub const PAST_WINDOW: &str = "past_retro.window";
/// Graph output of a model that keeps its window itself, as [`PAST_WINDOW`].
pub const PRESENT_WINDOW: &str = "present_retro.window";
/// Graph input of a model that keeps its window itself and takes embeddings: those of the last w - 1 tokens,
/// `[B, w - 1, hidden]`.
pub const PAST_WINDOW_EMBEDS: &str = "past_retro.window_embeds";
/// Graph output, as [`PAST_WINDOW_EMBEDS`].
pub const PRESENT_WINDOW_EMBEDS: &str = "present_retro.window_embeds";

/// The state of a layer, beside its keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// What pages are scored from, as the selector lays it out.
    PageSummary,
    /// The step that read each page last, int32 `[B, Hkv, P]`.
    PageSteps,
    /// Outputs of the last w - 1 positions, float32 `[B, R, Hq, D]`.
    Outputs,
    /// Their log-sum-exps, float32 `[B, R, Hq]`.
    Lse,
}

impl State {
    /// In the order of the operator's inputs and outputs.
    pub const ALL: [State; 4] = [State::PageSummary, State::PageSteps, State::Outputs, State::Lse];

    /// The last part of its names in a graph.
    pub const fn as_str(self) -> &'static str {
        match self {
            State::PageSummary => "page_summary",
            State::PageSteps => "page_steps",
            State::Outputs => "outputs",
            State::Lse => "lse",
        }
    }
}

/// Name of a layer's state input: `past_retro.N.page_summary` and so on.
pub fn past(layer: usize, state: State) -> String {
    format!("past_retro.{layer}.{}", state.as_str())
}

/// Name of a layer's state output: `present_retro.N.page_summary` and so on.
pub fn present(layer: usize, state: State) -> String {
    format!("present_retro.{layer}.{}", state.as_str())
}
