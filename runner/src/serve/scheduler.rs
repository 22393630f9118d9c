//! Continuous batching: requests join and leave between steps.
//!
//! Each round admits requests that wait to slots that are free, reads at most one chunk of prompts, and then makes one
//! decoding step of all slots that decode. So an answer that is being generated stalls for one chunk at most, however
//! many prompts come in. Slots that decode need not lie side by side: [`steps`] says which run together. What prompts
//! begin with alike is read once ([`shared_prompts`]).

mod shared_prompts;
mod steps;

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        mpsc::{Receiver, Sender, TryRecvError, channel},
    },
    time::Instant,
};

use retro_contract::limits;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::{
    Feed, ModelTokenizer,
    decoder::{Error, Result, cache_rows::CacheRows, generate::Finish},
    serve::{
        metrics::{Metrics, Waiting},
        request::{Event, Failure, Refusal, Request, Submission},
        slot::{Held, Running, Slot},
    },
};

/// Tokens that a slot must have in common with a prompt to be chosen for that.
const WORTH_KEEPING: usize = 16;

/// Where requests are handed in. Clones share the scheduler, which ends with the last of them.
#[derive(Clone)]
pub struct Handle {
    submissions: Sender<Submission>,
    waiting: Arc<Waiting>,
    most_waiting: usize,
    metrics: Arc<Metrics>,
}

impl Handle {
    /// Hands in requests, all or none; gives what comes of each. One whose receiver is dropped is cancelled.
    ///
    /// # Errors
    /// When too many wait, or the server is stopping.
    pub fn submit(&self, requests: Vec<Request>) -> Result<Vec<UnboundedReceiver<Event>>, Refusal> {
        let (count, most) = (requests.len() as u64, self.most_waiting as u64);
        let taken = self.waiting.enter(count, most);
        taken.map_err(|waiting| {
            for _ in 0..count {
                self.metrics.ended("refused");
            }
            Refusal::Full {
                waiting: waiting as usize,
            }
        })?;
        self.metrics.waiting.inc_by(count as i64);
        let since = Instant::now();
        let hand_in = |request: Request| {
            let (events, receiver) = unbounded_channel();
            let submission = Submission { request, events, since };
            let sent = self.submissions.send(submission);
            sent.map(|()| receiver).map_err(|_| Refusal::Stopping)
        };
        requests.into_iter().map(hand_in).collect()
    }
}

/// Serves requests on the rows of a cache.
pub struct Scheduler {
    rows: CacheRows,
    tokenizer: Arc<ModelTokenizer>,
    metrics: Arc<Metrics>,
    waiting: Arc<Waiting>,
    submissions: Receiver<Submission>,
    queue: VecDeque<Submission>,
    slots: Vec<Slot>,
    /// Tokens of prompts that are read in a round.
    chunk: usize,
    page_size: usize,
    grouping: steps::Grouping,
    /// Slots whose page steps are measured.
    measured: Vec<usize>,
    /// The slot whose prompt is read next.
    turn: usize,
    requests: u64,
    /// Nothing more is handed in.
    closed: bool,
}

impl Scheduler {
    /// A scheduler, and where requests are handed in: `most_waiting` at a time beside those that run.
    pub fn new(
        rows: CacheRows,
        tokenizer: Arc<ModelTokenizer>,
        metrics: Arc<Metrics>,
        chunk: usize,
        most_waiting: usize,
    ) -> (Self, Handle) {
        let (sender, submissions) = channel();
        let waiting = Arc::new(Waiting::default());
        let model = rows.model();
        // On a GPU, copying the page steps back would cost as much as a step.
        let measured = if model.gpu.is_some() {
            Vec::new()
        } else {
            model.page_step_slots()
        };
        metrics.slots.set(rows.rows() as i64);
        metrics.cache_capacity.set((rows.rows() * rows.capacity()) as i64);
        let handle = Handle {
            submissions: sender,
            waiting: Arc::clone(&waiting),
            most_waiting,
            metrics: Arc::clone(&metrics),
        };
        let scheduler = Self {
            chunk: model.io.input_ids.width.unwrap_or(chunk).max(1),
            grouping: steps::Grouping::of(model),
            page_size: model.retro.as_ref().map_or(limits::PAGE_SIZE, |r| r.page_size),
            measured,
            slots: (0..rows.rows()).map(|_| Slot::default()).collect(),
            rows,
            tokenizer,
            metrics,
            waiting,
            submissions,
            queue: VecDeque::new(),
            turn: 0,
            requests: 0,
            closed: false,
        };
        (scheduler, handle)
    }

    /// Serves until every [`Handle`] is dropped and what they handed in is done.
    pub fn run(mut self) {
        while self.round() {}
    }

    /// One round; false once nothing is left to do and nothing more can come.
    fn round(&mut self) -> bool {
        if !self.receive() {
            return false;
        }
        self.sweep();
        self.admit();
        self.take_over();
        self.read_prompts();
        self.step();
        let held: usize = self.slots.iter().map(|s| s.held.tokens.len()).sum();
        self.metrics.cache_tokens.set(held as i64);
        true
    }

    /// Takes what was handed in; waits for it if there is nothing else to do.
    fn receive(&mut self) -> bool {
        let idle = self.queue.is_empty() && self.slots.iter().all(|s| s.running.is_none());
        if idle {
            match self.submissions.recv() {
                Ok(submission) => self.queue.push_back(submission),
                Err(_) => return false,
            }
        }
        while !self.closed {
            match self.submissions.try_recv() {
                Ok(submission) => self.queue.push_back(submission),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => self.closed = true,
            }
        }
        true
    }

    /// Ends requests that nobody listens to any more, and those whose time is up.
    fn sweep(&mut self) {
        let now = Instant::now();
        let (waiting, metrics) = (&self.waiting, &self.metrics);
        self.queue.retain(|submission| {
            let goes = ends_early(submission, now, metrics);
            if goes {
                waiting.leave(1);
                metrics.waiting.dec();
            }
            !goes
        });
        for slot in &mut self.slots {
            let running = slot.running.as_ref();
            if running.is_some_and(|r| ends_early(&r.submission, now, metrics)) {
                slot.running = None;
                metrics.slots_busy.dec();
            }
        }
    }

    /// Gives free slots to requests, first come first served.
    fn admit(&mut self) {
        while let Some(next) = self.queue.front() {
            let Some(free) = self.slot_for(&next.request.prompt) else {
                break;
            };
            let Some((submission, slot)) = self.queue.pop_front().zip(self.slots.get_mut(free)) else {
                break;
            };
            self.waiting.leave(1);
            self.metrics.waiting.dec();
            self.metrics.slots_busy.inc();
            self.requests += 1;
            slot.begin(submission, self.rows.model(), self.page_size, self.requests);
            let cached = slot.running.as_ref().map_or(0, |r| r.cached);
            self.metrics.cached_tokens.inc_by(cached as u64);
            self.follow(free);
        }
    }

    /// The free slot for a prompt: the one with the most of it, else the one beside busy ones that was used longest ago.
    fn slot_for(&self, prompt: &[u32]) -> Option<usize> {
        let busy: Vec<usize> = (0..self.slots.len()).filter(|&i| self.is_busy(i)).collect();
        let free = (0..self.slots.len()).filter(|&i| !self.is_busy(i));
        free.min_by_key(|&i| {
            let slot = self.slots.get(i);
            let common = slot.map_or(0, |s| s.held.common(prompt));
            let common = if common < WORTH_KEEPING { 0 } else { common };
            let used = slot.map_or(0, |s| s.held.used);
            (std::cmp::Reverse(common), steps::distance(i, &busy), used)
        })
    }

    fn is_busy(&self, slot: usize) -> bool {
        self.slots.get(slot).is_some_and(|s| s.running.is_some())
    }

    /// Reads a chunk of prompts and of rectifying passes: of one, or of several short ones, which take turns.
    fn read_prompts(&mut self) {
        let mut left = self.chunk;
        while left > 0 {
            let count = self.slots.len();
            let order = (0..count).map(|i| (self.turn + i) % count);
            let Some(row) = order.into_iter().find(|&i| self.slots.get(i).is_some_and(Slot::reads)) else {
                return;
            };
            let read = self.read(row, left);
            self.turn = row + 1;
            match read {
                Ok(read) => left -= read.min(left),
                Err(e) => self.fail(row, &e),
            }
        }
    }

    /// Reads up to `most` tokens of a slot's prompt or rectifying pass; gives how many.
    fn read(&mut self, row: usize, most: usize) -> Result<usize> {
        let Some((held, running)) = running(&mut self.slots, row) else {
            return Ok(most);
        };
        let end = running.to_read.min(running.read + most);
        let part = running.tokens.get(running.read..end).unwrap_or(&[]);
        let feed = Feed {
            ids: part.iter().map(|&id| i64::from(id)).collect(),
            lengths: vec![end],
            retro_length: -1,
            ..Feed::default()
        };
        let logits = self.rows.run(row..row + 1, &feed)?;
        held.rewind(running.read);
        held.tokens.extend_from_slice(part);
        held.dense = end;
        let count = end - running.read;
        running.read = end;
        // What a rectifying pass reads is no prompt, and its last token's successor is there already.
        if running.generated() == 0 {
            self.metrics.prompt_tokens.inc_by(count as u64);
            if end == running.to_read {
                self.choose(row, logits.row(0))?;
            }
        }
        Ok(count)
    }

    /// One decoding step of all slots that decode.
    fn step(&mut self) {
        let decoding: Vec<usize> = (0..self.slots.len())
            .filter(|&i| self.slots.get(i).is_some_and(Slot::decodes))
            .collect();
        for rows in self.grouping.steps(&decoding, self.slots.len()) {
            let (capacity, captures) = (self.rows.capacity(), self.rows.captures());
            let feed = steps::feed(rows.clone(), &mut self.slots, capacity, captures);
            let captured = self.rows.captured_steps();
            let logits = match self.rows.run(rows.clone(), &feed) {
                Ok(logits) => logits,
                Err(e) => {
                    let rows = rows.filter(|i| decoding.contains(i));
                    rows.for_each(|row| self.fail(row, &e));
                    continue;
                }
            };
            self.metrics.steps.inc();
            let captured = self.rows.captured_steps() - captured;
            self.metrics.steps_captured.inc_by(captured);
            for row in rows.clone().filter(|i| decoding.contains(i)) {
                let taken = self.stepped(row).and_then(|()| {
                    let place = row - rows.start;
                    self.choose(row, logits.row(place))
                });
                if let Err(e) = taken {
                    self.fail(row, &e);
                }
            }
        }
    }

    /// Notes what a slot's step fed and read.
    fn stepped(&mut self, row: usize) -> Result<()> {
        let Some((held, running)) = running(&mut self.slots, row) else {
            return Ok(());
        };
        let length = running.tokens.len();
        if held.dense == held.tokens.len() && running.planner.reads_all(length) {
            held.dense = length;
        }
        let fed = running.tokens.get(held.tokens.len()..).unwrap_or(&[]);
        held.tokens.extend_from_slice(fed);
        running.open += 1;
        running.meter.reading.step(length);
        let mut head0 = 0;
        for &measured in &self.measured {
            let heads = self.rows.page_steps(measured, row, length.div_ceil(self.page_size))?;
            for (head, pages) in heads.iter().enumerate() {
                running.meter.take(head0 + head, pages, length - 1);
            }
            head0 += heads.len();
        }
        Ok(())
    }

    /// Takes a slot's next token.
    fn choose(&mut self, row: usize, logits: &[f32]) -> Result<()> {
        let Some((_, running)) = running(&mut self.slots, row) else {
            return Ok(());
        };
        let Some(finish) = running.take(logits, &self.tokenizer)? else {
            running.rectify();
            return Ok(());
        };
        let usage = running.usage();
        self.metrics.generated_tokens.inc_by(usage.generated as u64);
        self.metrics.first_token.observe(usage.first_token.as_secs_f64());
        if usage.generated > 1 {
            let each = usage.decoding.as_secs_f64() / (usage.generated - 1) as f64;
            self.metrics.per_token.observe(each);
        }
        let (read, valid) = usage.reading.page_sums();
        self.metrics.pages_read.inc_by(read);
        self.metrics.pages_valid.inc_by(valid);
        self.metrics
            .ended(if finish == Finish::Length { "length" } else { "stop" });
        self.metrics.slots_busy.dec();
        if let Some(slot) = self.slots.get_mut(row) {
            slot.running = None;
        }
        Ok(())
    }

    /// Fails a slot's request. What the slot holds is unknown then.
    fn fail(&mut self, row: usize, error: &Error) {
        let Some(slot) = self.slots.get_mut(row) else { return };
        slot.held.rewind(0);
        if let Some(running) = slot.running.take() {
            running.fail(match error {
                Error::Constraint(_) => Failure::Constraint(error.to_string()),
                _ => Failure::Model(error.to_string()),
            });
            self.metrics.ended("failed");
            self.metrics.slots_busy.dec();
        }
    }
}

/// A slot with its request.
fn running(slots: &mut [Slot], row: usize) -> Option<(&mut Held, &mut Running)> {
    let Slot { held, running } = slots.get_mut(row)?;
    Some((held, running.as_mut()?))
}

/// Whether a request ends before it is complete; who listens is told.
fn ends_early(submission: &Submission, now: Instant, metrics: &Metrics) -> bool {
    if submission.is_cancelled() {
        metrics.ended("cancelled");
        return true;
    }
    if submission.is_late(now) {
        metrics.ended("failed");
        submission.send(Event::Failed(Failure::Deadline));
        return true;
    }
    false
}
