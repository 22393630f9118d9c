//! A slot: a row of the caches, what it holds, and the request that runs in it.

use std::time::{Duration, Instant};

use crate::{
    Model, ModelTokenizer,
    decoder::{Result, decode_loop::held_of_prompt, generate::Finish, page_reads::PageMeter, step_plan::StepPlanner},
    serve::{
        choose::{Chooser, logprobs},
        request::{Done, Event, Failure, Submission, Token, Usage},
    },
    text::{Detokenizer, StopFilter},
};

/// A row of the caches, and the request that runs in it.
#[derive(Default)]
pub(super) struct Slot {
    pub held: Held,
    pub running: Option<Running>,
}

/// What a row holds, of this request or the one before.
#[derive(Default)]
pub(super) struct Held {
    /// The tokens whose keys and values it has.
    pub tokens: Vec<u32>,
    /// So many of them, from the first on, were read densely: a prompt, or steps that read everything. What follows is
    /// not what reading it anew would make, so another request does not begin with it.
    pub dense: usize,
    /// When a request last ran in it: a count of requests.
    pub used: u64,
}

/// A request in a slot.
pub(super) struct Running {
    pub submission: Submission,
    /// Prompt and output.
    pub tokens: Vec<u32>,
    /// Tokens of the prompt that a slot held when the request came.
    pub cached: usize,
    /// The slot that reads what the prompt begins with; until it has, this one waits.
    pub leader: Option<Leader>,
    /// Tokens that it holds, where there are some to be read.
    pub read: usize,
    /// Tokens that it is to hold before it decodes: the prompt, or those of a rectifying pass and before.
    pub to_read: usize,
    /// Decoding steps since the prompt or the last rectifying pass.
    pub open: usize,
    /// What its steps feed and read.
    pub planner: StepPlanner,
    pub meter: PageMeter,
    chooser: Chooser,
    detokenizer: Detokenizer,
    filter: StopFilter,
    first: Option<Instant>,
}

/// A slot that reads what another one's prompt begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Leader {
    pub row: usize,
    /// The number of its request ([`Held::used`]).
    pub request: u64,
    /// Tokens that the two prompts have in common.
    pub tokens: usize,
}

impl Held {
    /// Tokens of a prompt that need not be read.
    pub fn common(&self, prompt: &[u32]) -> usize {
        held_of_prompt(self.tokens.get(..self.dense).unwrap_or(&self.tokens), prompt)
    }

    /// Holds these tokens, as a prompt is held.
    pub fn hold(&mut self, tokens: &[u32]) {
        self.tokens.clear();
        self.tokens.extend_from_slice(tokens);
        self.dense = tokens.len();
    }

    /// Forgets what lies behind the first `keep` tokens.
    pub fn rewind(&mut self, keep: usize) {
        self.tokens.truncate(keep);
        self.dense = self.dense.min(keep);
    }
}

impl Slot {
    /// Puts a request into the slot, which goes back to what both have in common.
    pub fn begin(&mut self, submission: Submission, model: &Model, page_size: usize, used: u64) {
        let request = &submission.request;
        let keep = self.held.common(&request.prompt);
        self.held.rewind(keep);
        self.held.used = used;
        self.running = Some(Running {
            tokens: request.prompt.clone(),
            cached: keep,
            leader: None,
            read: keep,
            to_read: request.prompt.len(),
            open: 0,
            planner: StepPlanner::new(model, request.policy),
            meter: PageMeter::new(request.policy.window, page_size),
            chooser: Chooser::new(&request.choosing, request.constraint.clone()),
            detokenizer: Detokenizer::after(&request.prompt),
            filter: StopFilter::new(&request.stops),
            first: None,
            submission,
        });
    }

    /// Tokens of a prompt that need not be read once this slot has read the prompt of its own.
    pub fn will_have(&self, prompt: &[u32]) -> usize {
        let own = self.running.as_ref().map(|r| r.submission.request.prompt.as_slice());
        let read = held_of_prompt(own.unwrap_or_default(), prompt);
        read.max(self.held.common(prompt))
    }

    /// Whether a request's prompt is not read yet, or a rectifying pass not done, and nothing stands against it.
    pub fn reads(&self) -> bool {
        let running = self.running.as_ref();
        running.is_some_and(|r| r.leader.is_none() && r.read < r.to_read)
    }

    /// Whether a request's tokens are being decoded.
    pub fn decodes(&self) -> bool {
        self.running
            .as_ref()
            .is_some_and(|r| r.leader.is_none() && r.read >= r.to_read)
    }
}

impl Running {
    /// After a token: begins a rectifying pass if one is due. The tokens of the last steps are then read densely, as
    /// those of a prompt are, which closes the window.
    pub fn rectify(&mut self) {
        let Some(count) = self.submission.request.policy.rectify.filter(|&n| n == self.open) else {
            return;
        };
        // All but the newest, which no step has fed.
        self.to_read = self.tokens.len().saturating_sub(1);
        self.read = self.to_read.saturating_sub(count);
        self.open = 0;
        self.planner.close();
        self.meter.pass(self.to_read.saturating_sub(1));
    }

    /// Tokens generated so far.
    pub fn generated(&self) -> usize {
        self.tokens.len() - self.submission.request.prompt.len()
    }

    /// Time to the first token; `None` before it.
    pub fn first_token(&self) -> Option<Duration> {
        Some(self.first?.duration_since(self.submission.since))
    }

    /// Takes the next token from its logits, and sends it. Gives how the text ended, if it did.
    pub fn take(&mut self, logits: &[f32], tokenizer: &ModelTokenizer) -> Result<Option<Finish>> {
        let request = &self.submission.request;
        let id = self.chooser.choose(logits, &self.tokens)?;
        self.first.get_or_insert_with(Instant::now);
        if !request.ignore_eos && request.ends.contains(&id) {
            return self.end(Finish::Eos, tokenizer);
        }
        let logprobs = request.logprobs.map(|count| logprobs(logits, id, count));
        self.tokens.push(id);
        let text = self.detokenizer.push(tokenizer, id)?;
        let text = self.filter.push(&text);
        let usage = self.submission.request.live.then(|| self.usage());
        self.submission.send(Event::Token(Token {
            id,
            text,
            logprobs,
            usage,
        }));
        if self.filter.stopped() {
            return self.end(Finish::Stop, tokenizer);
        }
        if self.chooser.is_complete() {
            return self.end(Finish::Eos, tokenizer);
        }
        if self.generated() >= self.submission.request.max_new {
            return self.end(Finish::Length, tokenizer);
        }
        Ok(None)
    }

    fn end(&mut self, finish: Finish, tokenizer: &ModelTokenizer) -> Result<Option<Finish>> {
        let last = self.detokenizer.finish(tokenizer)?;
        let text = self.filter.push(&last) + &self.filter.finish();
        // What the last text held may itself be a stop string.
        let finish = if self.filter.stopped() { Finish::Stop } else { finish };
        self.submission.send(Event::Done(Done {
            text,
            finish,
            usage: self.usage(),
        }));
        Ok(Some(finish))
    }

    /// What the request took so far.
    pub fn usage(&self) -> Usage {
        Usage {
            prompt: self.submission.request.prompt.len(),
            cached: self.cached,
            generated: self.generated(),
            reading: self.meter.reading,
            first_token: self.first_token().unwrap_or_default(),
            decoding: self.first.map(|first| first.elapsed()).unwrap_or_default(),
        }
    }

    pub fn fail(&self, failure: Failure) {
        self.submission.send(Event::Failed(failure));
    }
}
