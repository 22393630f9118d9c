//! Prefill and the windowed decoding loop, for one sequence or a batch.
//!
//! A step at position t feeds the r+1 tokens at t-r..t: the newest and the r before it, embedded again so that the pages which
//! the newest one selects correct them. r grows by one a step from 0 to w-1 and never reaches into the prompt.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use retro_contract::{Budget, limits};

use crate::{
    decoder::{
        kv_cache::State,
        model::{Feed, Logits, Model, sparse_layers},
        page_reads::{PageMeter, PageReads},
        sampling::{Sampler, Sampling},
        stats::Stats,
    },
    interrupt::{Interrupt, Interrupted},
    text::{Detokenizer, ModelTokenizer, StopFilter},
};

/// Tokens of a prompt that are fed at a time.
pub const CHUNK: usize = 512;

/// How much a decoding step feeds and reads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Policy {
    /// w: 1 is Quest, without correction.
    pub window: usize,
    /// `None`: as converted.
    pub budget: Option<Budget>,
}

impl Policy {
    /// The policy that was asked for, completed from what the model was converted with.
    ///
    /// # Errors
    /// When the model has no room for the window, or cannot take a budget at run time.
    pub fn new(model: &Model, window: Option<usize>, budget: Option<Budget>) -> Result<Self> {
        let window = model.window(window)?;
        if budget.is_some() {
            ensure!(
                model.retro.is_some(),
                "--budget: the model was not converted; convert it with retro-export"
            );
            ensure!(
                model.io.page_budget.is_some(),
                "--budget: this model takes no budget at run time; convert it again with retro-export --budget"
            );
        }
        Ok(Self { window, budget })
    }
}

/// Room for a prompt and what follows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContextPlan {
    /// Tokens that the cache must hold.
    pub capacity: usize,
    /// Tokens to generate at most, at least 1.
    pub max_new: usize,
}

/// Decides the cache's capacity and the most tokens to generate, before anything runs.
///
/// # Errors
/// When prompt and output exceed `context` (-c) or what the model can hold, or neither is known.
pub fn plan(
    prompt: usize,
    n_predict: Option<usize>,
    context: Option<usize>,
    model: Option<usize>,
) -> Result<ContextPlan> {
    if let (Some(c), Some(most)) = (context, model) {
        ensure!(c <= most, "-c {c} exceeds the model's context of {most} tokens");
    }
    ensure!(n_predict != Some(0), "-n 0: ask for at least one token");
    ensure!(context != Some(0), "-c 0: a context has at least one token");
    let limit = context.or(model);
    let what = if context.is_some() {
        "the context asked for with -c"
    } else {
        "the model's context"
    };
    match (n_predict, limit) {
        (Some(n), Some(limit)) => {
            let total = prompt.saturating_add(n);
            ensure!(
                total <= limit,
                "a prompt of {prompt} tokens and {n} more (-n) exceed {what}, {limit} tokens"
            );
            Ok(ContextPlan {
                capacity: context.unwrap_or(total),
                max_new: n,
            })
        }
        (None, Some(limit)) => {
            ensure!(
                prompt < limit,
                "a prompt of {prompt} tokens leaves no room in {what}, {limit} tokens"
            );
            Ok(ContextPlan {
                capacity: limit,
                max_new: limit - prompt,
            })
        }
        (Some(n), None) => {
            let capacity = prompt.checked_add(n).context("-n is too large")?;
            Ok(ContextPlan { capacity, max_new: n })
        }
        (None, None) => anyhow::bail!("the model does not say how long its context is: give -n or -c"),
    }
}

/// Runs a prompt through a fresh state of batch 1, in chunks; returns the newest token's logits. `progress` hears of every
/// chunk and may end the work with an error.
///
/// # Errors
/// When ONNX Runtime or `progress` fails.
pub fn prefill(
    model: &mut Model,
    state: &mut State,
    prompt: &[u32],
    chunk: usize,
    mut progress: impl FnMut(usize) -> Result<()>,
) -> Result<Logits> {
    ensure!(!prompt.is_empty(), "the prompt is empty");
    ensure!(chunk >= 1, "--chunk 0: a chunk has at least one token");
    // A graph may take a token a call, by its declared shape.
    let chunk = model.io.input_ids.width.unwrap_or(chunk);
    let mut logits = Logits::default();
    let mut done = 0;
    for part in prompt.chunks(chunk) {
        done += part.len();
        let ids = part.iter().map(|&id| i64::from(id)).collect();
        logits = model.run(
            state,
            &Feed {
                ids,
                lengths: vec![done],
                retro_length: -1,
                ..Feed::default()
            },
        )?;
        progress(part.len())?;
    }
    Ok(logits)
}

/// One sequence of a batch that is being decoded.
struct Sequence {
    /// Prompt and output.
    tokens: Vec<u32>,
    prompt: usize,
    /// A finished one is fed as before, so that the batch keeps its shape; nobody looks at its rows.
    finished: bool,
    meter: PageMeter,
}

/// The decoding loop of a batch whose prompts are in the state already and which starts together.
pub struct Decoder<'a> {
    model: &'a mut Model,
    state: &'a mut State,
    policy: Policy,
    sequences: Vec<Sequence>,
    steps: usize,
    /// Slots of the layers that select pages.
    measured: Vec<usize>,
    /// Time in the steps themselves.
    pub time: Duration,
}

impl<'a> Decoder<'a> {
    /// A decoder for the prompts that `state` holds, one a row.
    ///
    /// # Errors
    /// When the model has no room for the policy's window, or cannot take a budget at run time.
    pub fn new(model: &'a mut Model, state: &'a mut State, prompts: &[&[u32]], policy: Policy) -> Result<Self> {
        ensure!(
            prompts.len() == state.batch(),
            "{} prompts for a batch of {}",
            prompts.len(),
            state.batch()
        );
        let policy = Policy::new(model, Some(policy.window), policy.budget)?;
        let page_size = model.retro.as_ref().map_or(limits::PAGE_SIZE, |r| r.page_size);
        let measured = sparse_layers(model);
        let sequence = |prompt: &&[u32]| Sequence {
            tokens: prompt.to_vec(),
            prompt: prompt.len(),
            finished: false,
            meter: PageMeter::new(policy.window, page_size),
        };
        let sequences = prompts.iter().map(sequence).collect();
        Ok(Self {
            model,
            state,
            policy,
            sequences,
            steps: 0,
            measured,
            time: Duration::ZERO,
        })
    }

    /// Does not look at which pages steps read.
    pub fn measure_nothing(&mut self) {
        self.measured.clear();
    }

    /// Appends the token chosen for a sequence.
    pub fn push(&mut self, row: usize, token: u32) {
        if let Some(s) = self.sequences.get_mut(row).filter(|s| !s.finished) {
            s.tokens.push(token);
        }
    }

    /// Takes a sequence out of the counting; it must have got its last token.
    pub fn finish(&mut self, row: usize) {
        if let Some(s) = self.sequences.get_mut(row) {
            s.finished = true;
        }
    }

    pub fn finished(&self, row: usize) -> bool {
        self.sequences.get(row).is_none_or(|s| s.finished)
    }

    /// Prompt and output of a sequence.
    pub fn tokens(&self, row: usize) -> &[u32] {
        self.sequences.get(row).map_or(&[], |s| &s.tokens)
    }

    /// Output of a sequence.
    pub fn output(&self, row: usize) -> &[u32] {
        self.sequences
            .get(row)
            .and_then(|s| s.tokens.get(s.prompt..))
            .unwrap_or(&[])
    }

    /// Feeds the last tokens of every sequence, each of which got one since the last step; returns the logits of the next.
    ///
    /// # Errors
    /// When a sequence outgrows the cache or ONNX Runtime fails.
    pub fn step(&mut self) -> Result<Logits> {
        let r = retrospective(self.policy.window, self.steps);
        let lengths: Vec<usize> = self.sequences.iter().map(|s| s.tokens.len()).collect();
        let mut ids = Vec::with_capacity(self.sequences.len() * (r + 1));
        for s in &self.sequences {
            let start = s
                .tokens
                .len()
                .checked_sub(r + 1)
                .context("a sequence is shorter than the window")?;
            ids.extend(s.tokens.get(start..).unwrap_or(&[]).iter().map(|&id| i64::from(id)));
        }
        let budgets = self
            .policy
            .budget
            .zip(self.model.retro.as_ref())
            .map(|(budget, retro)| {
                let pages = |&n: &usize| budget.pages(retro.min_pages, n, retro.page_size).max(1);
                lengths
                    .iter()
                    .map(|n| i32::try_from(pages(n)).unwrap_or(i32::MAX))
                    .collect()
            });
        let start = Instant::now();
        let logits = self.model.run(
            self.state,
            &Feed {
                ids,
                lengths,
                retro_length: r as i32,
                budgets,
                graph_capturable: r + 1 == self.policy.window,
            },
        )?;
        self.time += start.elapsed();
        self.steps += 1;
        self.measure();
        Ok(logits)
    }

    fn measure(&mut self) {
        for s in self.sequences.iter_mut().filter(|s| !s.finished) {
            s.meter.reading.step(s.tokens.len());
        }
        let mut head0 = 0;
        for &slot in &self.measured {
            let Some((steps, [_, heads, pages])) = self.state.page_steps(slot) else {
                continue;
            };
            for (row, s) in self.sequences.iter_mut().enumerate().filter(|(_, s)| !s.finished) {
                for head in 0..heads {
                    let start = (row * heads + head) * pages;
                    let own = steps.get(start..start + pages).unwrap_or(&[]);
                    s.meter.take(head0 + head, own, s.tokens.len() - 1);
                }
            }
            head0 += heads;
        }
    }

    /// What all sequences read so far.
    pub fn reading(&self) -> PageReads {
        let mut sum = PageReads::default();
        self.readings().for_each(|r| sum.add(r));
        sum
    }

    /// What each sequence read so far.
    pub fn readings(&self) -> impl Iterator<Item = &PageReads> {
        self.sequences.iter().map(|s| &s.meter.reading)
    }
}

/// Retrospective tokens of step number `step`, counted from 0: the step at t = n + `step` may look back to the prompt's end.
fn retrospective(window: usize, step: usize) -> usize {
    window.saturating_sub(1).min(step)
}

/// How a generation is to go.
#[derive(Clone, Debug)]
pub struct Generation {
    pub plan: ContextPlan,
    pub policy: Policy,
    pub chunk: usize,
    pub sampling: Sampling,
    pub stops: Vec<String>,
    pub ignore_eos: bool,
    /// Ends the generation between two steps, or two chunks of the prompt.
    pub interrupt: Interrupt,
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The model ended the text.
    Eos,
    /// A stop string appeared.
    Stop,
    /// The most tokens asked for, or the context's end.
    Length,
    /// [`Generation::interrupt`] asked for it.
    Interrupted,
}

/// What came out.
#[derive(Clone, Debug)]
pub struct Output {
    pub text: String,
    /// Generated tokens, the end-of-text token left out.
    pub tokens: Vec<u32>,
    pub finish: Finish,
    pub stats: Stats,
}

/// What happens on the way.
pub enum Event<'a> {
    /// That many tokens of the prompt are done.
    Prompt(usize),
    /// A token was made; the text that became certain with it, possibly none.
    Text(&'a str),
}

/// Generates from one prompt.
///
/// # Errors
/// When the model fails or `observe` does (then at once).
pub fn generate(
    model: &mut Model,
    text: &ModelTokenizer,
    prompt: &[u32],
    options: &Generation,
    observe: &mut dyn FnMut(Event<'_>) -> Result<()>,
) -> Result<Output> {
    options.sampling.check()?;
    let mut state = model.new_state(1, options.plan.capacity)?;
    let eos = text.ends(&model.folder);
    let start = Instant::now();
    let mut read = 0;
    let prefilled = prefill(model, &mut state, prompt, options.chunk, |n| {
        read += n;
        observe(Event::Prompt(n))?;
        Ok(options.interrupt.check()?)
    });
    let prompt_time = start.elapsed();
    let mut logits = match prefilled {
        // What was read so far is all that there is to tell.
        Err(e) if e.is::<Interrupted>() => {
            let (kv_bytes, state_bytes) = state.sizes();
            return Ok(Output {
                text: String::new(),
                tokens: Vec::new(),
                finish: Finish::Interrupted,
                stats: Stats {
                    prompt_tokens: read,
                    prompt_time,
                    kv_bytes,
                    state_bytes,
                    ..Stats::default()
                },
            });
        }
        other => other?,
    };
    let mut sampler = Sampler::new(options.sampling);
    // On a GPU, looking at which pages were read would cost as much as reading them.
    let measure = model.gpu().is_none();
    let mut decoder = Decoder::new(model, &mut state, &[prompt], options.policy)?;
    if !measure {
        decoder.measure_nothing();
    }
    let mut detokenizer = Detokenizer::after(prompt);
    let mut filter = StopFilter::new(&options.stops);
    let mut out = String::new();
    let mut sampling_time = Duration::ZERO;
    let mut first_token = None;
    let mut tokens = Vec::new();
    let mut emit = |piece: String, observe: &mut dyn FnMut(Event<'_>) -> Result<()>| -> Result<()> {
        observe(Event::Text(&piece))?;
        out.push_str(&piece);
        Ok(())
    };
    let finish = loop {
        if options.interrupt.raised().is_some() {
            break Finish::Interrupted;
        }
        let choosing = Instant::now();
        let token = sampler.choose(logits.row(0), decoder.tokens(0))?;
        if tokens.is_empty() {
            first_token = Some(start.elapsed());
        } else {
            sampling_time += choosing.elapsed();
        }
        if !options.ignore_eos && eos.contains(&token) {
            break Finish::Eos;
        }
        tokens.push(token);
        decoder.push(0, token);
        emit(filter.push(&detokenizer.push(text, token)?), observe)?;
        if filter.stopped() {
            break Finish::Stop;
        }
        if tokens.len() >= options.plan.max_new {
            break Finish::Length;
        }
        logits = decoder.step()?;
    };
    let last = detokenizer.finish(text)?;
    emit(filter.push(&last), observe)?;
    emit(filter.finish(), observe)?;
    let (reading, decode_time, decoded_tokens) = (decoder.reading(), decoder.time + sampling_time, decoder.steps);
    let (kv_bytes, state_bytes) = state.sizes();
    let stats = Stats {
        prompt_tokens: prompt.len(),
        prompt_time,
        first_token,
        generated_tokens: tokens.len(),
        decoded_tokens,
        decode_time,
        reading,
        kv_bytes,
        state_bytes,
    };
    Ok(Output {
        text: out,
        tokens,
        finish,
        stats,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_fills_one_token_a_step() {
        let r: Vec<usize> = (0..6).map(|step| retrospective(4, step)).collect();
        assert_eq!(r, [0, 1, 2, 3, 3, 3]);
        assert_eq!(retrospective(1, 9), 0);
    }

    #[test]
    fn plans_hold_the_prompt_and_what_is_asked_for() {
        assert_eq!(
            plan(100, Some(50), None, Some(2048)).unwrap(),
            ContextPlan {
                capacity: 150,
                max_new: 50
            }
        );
        assert_eq!(
            plan(100, Some(50), Some(512), Some(2048)).unwrap(),
            ContextPlan {
                capacity: 512,
                max_new: 50
            }
        );
        assert_eq!(
            plan(100, None, None, Some(2048)).unwrap(),
            ContextPlan {
                capacity: 2048,
                max_new: 1948
            }
        );
        assert_eq!(
            plan(100, None, Some(101), None).unwrap(),
            ContextPlan {
                capacity: 101,
                max_new: 1
            }
        );
        assert_eq!(
            plan(100, Some(5), None, None).unwrap(),
            ContextPlan {
                capacity: 105,
                max_new: 5
            }
        );
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_numbers() {
        let error = |p, n, c, m| plan(p, n, c, m).unwrap_err().to_string();
        assert!(error(2000, Some(100), None, Some(2048)).contains("2048"));
        assert!(error(2048, None, None, Some(2048)).contains("no room"));
        assert!(error(10, None, Some(4096), Some(2048)).contains("-c 4096"));
        assert!(error(10, Some(10), Some(15), None).contains("-c"));
        assert!(error(10, Some(usize::MAX), None, None).contains("-n"));
        assert!(error(10, None, None, None).contains("-n or -c"));
        assert!(error(10, Some(0), None, None).contains("-n 0"));
    }
}
