//! A server that speaks OpenAI's API: many requests at a time on one model.
//!
//! - `request.rs` is what the scheduler is asked for, and what comes of it; `choose.rs` how tokens are chosen, `constraint.rs`
//!   which may be
//! - `slot.rs` is a row of the caches with the request in it, `scheduler.rs` the loop over all of them
//! - `engine.rs` runs it in a thread of its own; `http` is the server around it
//! - `metrics.rs` has figures for Prometheus

mod choose;
mod constraint;
mod engine;
pub mod http;
mod metrics;
mod request;
mod scheduler;
mod slot;

pub use choose::{Choosing, Logprobs};
pub use constraint::{Constraint, GrammarError, Grammars};
pub use engine::{Engine, EngineOptions};
pub use metrics::{Metrics, Outcome};
pub use request::{Done, Event, Failure, Refusal, Request, Token, Usage};
pub use scheduler::{Handle, Scheduler};
