//! Greedy decoding of several documents as a batch.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use crate::decoder::{
    decode_loop::{Decoder, Policy, prefill},
    error::{Error, Result},
    kv_cache::Snapshot,
    logits::Logits,
    model::Model,
    page_reads::PageReads,
    sampling::argmax,
    stats::{Passes, Stats},
    step::DecoderState,
};

/// Prefilled documents, to be decoded under one or several policies.
pub struct Prefilled {
    prompts: Vec<Vec<u32>>,
    state: DecoderState,
    /// The way back to the state after the prefill; `None` for growing caches, which are decoded once.
    snapshot: Option<Snapshot>,
    /// Logits of each sequence's first token.
    first: Logits,
    time: Duration,
}

/// Called with a position in the texts and the logits of the tokens there, a row for each text; those of a text that has
/// ended mean nothing. It may stop the work with an error of its own type.
pub type Observer<'a, E> = dyn FnMut(usize, &Logits) -> Result<(), E> + Send + 'a;

/// The result of decoding a batch.
pub struct Decoded {
    /// Token ids generated for each prompt, without the end-of-text token.
    pub outputs: Vec<Vec<u32>>,
    /// Page reads of each sequence.
    pub readings: Vec<PageReads>,
    /// Statistics of the whole batch.
    pub stats: Stats,
}

/// What teacher forcing of a batch took.
pub struct Forced {
    /// Page reads of each sequence.
    pub readings: Vec<PageReads>,
    /// Time of the decoding steps.
    pub time: Duration,
    /// The rectifying passes, whose time is part of that; `None` where there were to be none.
    pub passes: Option<Passes>,
}

impl Prefilled {
    /// Prefills the prompts one at a time (they differ in length) and copies their states into a batch.
    ///
    /// # Errors
    /// When a prompt does not fit `capacity`, or the model or `progress` fails.
    pub fn new<E: From<Error>>(
        model: &mut Model,
        prompts: Vec<Vec<u32>>,
        capacity: usize,
        chunk: usize,
        mut progress: impl FnMut(usize) -> Result<(), E>,
    ) -> Result<Self, E> {
        let mut state = model.new_state(prompts.len(), capacity)?;
        let mut time = Duration::ZERO;
        let mut first = Logits::default();
        if prompts.len() == 1 {
            for prompt in &prompts {
                let start = Instant::now();
                first = prefill(model, &mut state, prompt, chunk, &mut progress)?;
                time += start.elapsed();
            }
        } else {
            let mut single = model.new_state(1, capacity)?;
            for (row, prompt) in prompts.iter().enumerate() {
                single.kv_mut().clear()?;
                let start = Instant::now();
                let logits = prefill(model, &mut single, prompt, chunk, &mut progress)?;
                time += start.elapsed();
                state.kv_mut().copy_row(row, single.kv(), 0)?;
                first.vocab = logits.vocab;
                Arc::make_mut(&mut first.values).extend_from_slice(&logits.values);
            }
        }
        let snapshot = model.fixed_capacity.then(|| state.kv().snapshot()).transpose()?;
        Ok(Self {
            prompts,
            state,
            snapshot,
            first,
            time,
        })
    }

    /// Whether [`decode`](Self::decode) may be called again.
    pub fn reusable(&self) -> bool {
        self.snapshot.is_some()
    }

    /// Decodes every document greedily up to an end-of-text token or `max_new` tokens.
    ///
    /// # Errors
    /// When the model or `progress` fails.
    pub fn decode<E: From<Error>>(
        &mut self,
        model: &mut Model,
        policy: Policy,
        max_new: usize,
        progress: impl FnMut(usize) -> Result<(), E>,
    ) -> Result<Decoded, E> {
        self.decode_after(model, policy, &[], max_new, progress)
    }

    /// As [`decode`](Self::decode), but each prompt is followed by the tokens of `questions` (a row without any has
    /// none), which are fed one by one under the policy and are no part of the output.
    ///
    /// # Errors
    /// When the model or `progress` fails.
    pub fn decode_after<E: From<Error>>(
        &mut self,
        model: &mut Model,
        policy: Policy,
        questions: &[&[u32]],
        max_new: usize,
        mut progress: impl FnMut(usize) -> Result<(), E>,
    ) -> Result<Decoded, E> {
        let question = |row: usize| questions.get(row).copied().unwrap_or(&[]);
        if let Some(snapshot) = &self.snapshot {
            self.state.kv_mut().restore(snapshot)?;
        }
        let eos = model.folder.eos.clone();
        let prompts: Vec<&[u32]> = self.prompts.iter().map(Vec::as_slice).collect();
        let rows = prompts.len();
        let mut decoder = Decoder::new(model, &mut self.state, &prompts, policy)?;
        let mut logits = std::borrow::Cow::Borrowed(&self.first);
        let mut decoded = 0;
        loop {
            let mut active = 0;
            for row in 0..rows {
                if decoder.finished(row) {
                    continue;
                }
                let asked = question(row);
                let given = asked.get(decoder.output(row).len()).copied();
                let token = match given {
                    Some(token) => token,
                    None => argmax(logits.row(row)).ok_or(Error::NoFiniteScore)?,
                };
                decoder.push(row, token);
                let ends = given.is_none() && eos.contains(&token);
                if ends || decoder.output(row).len() >= asked.len() + max_new {
                    decoder.finish(row);
                } else {
                    active += 1;
                }
            }
            if active == 0 {
                break;
            }
            logits = std::borrow::Cow::Owned(decoder.step()?);
            decoded += active;
            progress(active)?;
        }
        let outputs: Vec<Vec<u32>> = (0..rows)
            .map(|row| {
                decoder
                    .output(row)
                    .iter()
                    .copied()
                    .skip(question(row).len())
                    .take_while(|t| !eos.contains(t))
                    .collect()
            })
            .collect();
        let (reading, decode_time, passes) = (decoder.reading(), decoder.time, decoder.passes());
        let readings = decoder.readings().copied().collect();
        let (kv_bytes, state_bytes) = self.state.kv().sizes();
        let stats = Stats {
            prompt_tokens: self.prompts.iter().map(Vec::len).sum(),
            prompt_time: self.time,
            first_token: Some(self.time),
            generated_tokens: outputs.iter().map(Vec::len).sum(),
            decoded_tokens: decoded,
            decode_time,
            passes,
            reading,
            kv_bytes,
            state_bytes,
        };
        Ok(Decoded {
            outputs,
            readings,
            stats,
        })
    }

    /// Teacher forcing: feeds the tokens of `texts` after each prompt and shows `observe` the logits of every position,
    /// on a GPU while the next step runs. The first logits come from the prefill. `progress` is called before each.
    ///
    /// # Errors
    /// When the model, `progress` or `observe` fails.
    pub fn force<E: From<Error> + Send>(
        &mut self,
        model: &mut Model,
        policy: Policy,
        texts: &[&[u32]],
        mut progress: impl FnMut() -> Result<(), E>,
        observe: &mut Observer<'_, E>,
    ) -> Result<Forced, E> {
        if let Some(snapshot) = &self.snapshot {
            self.state.kv_mut().restore(snapshot)?;
        }
        let prompts: Vec<&[u32]> = self.prompts.iter().map(Vec::as_slice).collect();
        // On the CPU the step needs all cores, and is timed.
        let beside = model.feeds_from_buffers();
        let mut decoder = Decoder::new(model, &mut self.state, &prompts, policy)?;
        let mut logits = self.first.clone();
        let longest = texts.iter().map(|t| t.len()).max().unwrap_or(0);
        for at in 0..longest {
            progress()?;
            for (row, text) in texts.iter().enumerate() {
                let Some(&token) = text.get(at) else { continue };
                decoder.push(row, token);
                if at + 1 == text.len() {
                    decoder.finish(row);
                }
            }
            let mut step = || (at + 1 < longest).then(|| decoder.step()).transpose();
            let (next, seen) = if beside {
                let (mut next, mut seen) = (Ok(None), Ok(()));
                rayon::in_place_scope(|scope| {
                    scope.spawn(|_| seen = observe(at, &logits));
                    next = step();
                });
                (next, seen)
            } else {
                let seen = observe(at, &logits);
                (step(), seen)
            };
            seen?;
            if let Some(next) = next? {
                logits = next;
            }
        }
        Ok(Forced {
            readings: decoder.readings().copied().collect(),
            time: decoder.time,
            passes: decoder.passes(),
        })
    }
}
