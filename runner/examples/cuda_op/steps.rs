//! How many steps a measurement takes, and the room for them.

/// Runs before the timed ones; a CUDA graph is captured in the first.
pub const WARM_UP: usize = 3;

/// Room behind the context for the steps that are timed.
pub const ROOM: usize = 256;

/// Tokens of a chunk of the prefill that computes summaries.
pub const PREFILL_CHUNK: usize = 2048;

/// An upper bound of the steps that so many timed runs take; capturing a graph takes steps, too.
pub fn most_steps(runs: usize) -> usize {
    WARM_UP + runs + 8
}
