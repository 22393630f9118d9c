//! What is asked of the scheduler, and what it answers with.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::mpsc::UnboundedSender;

use crate::{
    decoder::{decode_loop::Policy, generate::Finish, page_reads::PageReads},
    serve::{
        choose::{Choosing, Logprobs},
        constraint::Constraint,
    },
};

/// One text to generate.
#[derive(Clone, Debug)]
pub struct Request {
    /// The prompt's tokens, at least one.
    pub prompt: Vec<u32>,
    /// The most tokens to generate, at least 1. Prompt and output together fit a slot.
    pub max_new: usize,
    /// Window and budget.
    pub policy: Policy,
    /// How tokens are chosen.
    pub choosing: Choosing,
    /// What the text must follow; it ends where nothing may follow.
    pub constraint: Option<Constraint>,
    /// Stop strings; they are not part of the text.
    pub stops: Vec<String>,
    /// Tokens that end the text.
    pub ends: Arc<[u32]>,
    /// Continue past them.
    pub ignore_eos: bool,
    /// Report each token's log-probability, and those of so many likeliest tokens.
    pub logprobs: Option<usize>,
    /// Report with each token what the answer took so far.
    pub live: bool,
    /// The answer fails if it is not complete by then.
    pub deadline: Option<Instant>,
}

/// What comes of a request, in order: tokens, then one of the other two.
#[derive(Clone, Debug)]
pub enum Event {
    /// A token.
    Token(Token),
    /// The text is complete.
    Done(Done),
    /// Nothing more comes.
    Failed(Failure),
}

/// A token that was generated.
#[derive(Clone, Debug)]
pub struct Token {
    /// Its number.
    pub id: u32,
    /// Text that is now final, often none.
    pub text: String,
    /// Log-probabilities, if they were asked for.
    pub logprobs: Option<Logprobs>,
    /// What the answer took so far, if that was asked for.
    pub usage: Option<Usage>,
}

/// How a text ended.
#[derive(Clone, Debug)]
pub struct Done {
    /// Text that was held back.
    pub text: String,
    /// Why it ended.
    pub finish: Finish,
    /// What it took.
    pub usage: Usage,
}

/// What a request took.
#[derive(Clone, Debug, Default)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Those of them that the slot held already.
    pub cached: usize,
    /// Tokens generated, the one that ended the text left out.
    pub generated: usize,
    /// What the decoding steps read.
    pub reading: PageReads,
    /// From the request to its first token.
    pub first_token: Duration,
    /// From the first token to the last.
    pub decoding: Duration,
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// Its time is up.
    #[error("the request took longer than its time limit")]
    Deadline,
    /// What the answer must follow has become too large, or nothing follows it.
    #[error("{0}")]
    Constraint(String),
    /// The model failed.
    #[error("{0}")]
    Model(String),
}

/// Why a request is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// As many wait as may.
    #[error("{waiting} requests wait already: try again later")]
    Full {
        /// Requests that wait.
        waiting: usize,
    },
    /// The server is stopping.
    #[error("the server is stopping")]
    Stopping,
}

/// A request on its way to a slot.
pub(super) struct Submission {
    pub request: Request,
    pub events: UnboundedSender<Event>,
    pub since: Instant,
}

impl Submission {
    /// Whether nobody listens any more.
    pub fn is_cancelled(&self) -> bool {
        self.events.is_closed()
    }

    pub fn is_late(&self, now: Instant) -> bool {
        self.request.deadline.is_some_and(|deadline| now >= deadline)
    }

    /// Sends what came of it. Nobody may be listening any more, which is noticed before the next step.
    pub fn send(&self, event: Event) {
        let _: Result<(), _> = self.events.send(event);
    }
}
