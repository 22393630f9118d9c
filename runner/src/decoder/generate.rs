//! Text generation from one prompt.

use std::time::{Duration, Instant};

use crate::{
    decoder::{
        decode_loop::{Decoder, Policy, prefill_rest},
        error::{Error, Result, require},
        logits::Logits,
        model::Model,
        sampling::{Sampler, Sampling},
        stats::Stats,
        step::DecoderState,
    },
    interrupt::Interrupt,
    text::{Detokenizer, ModelTokenizer, StopFilter},
};

/// Cache capacity and output length of a generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContextPlan {
    /// Cache capacity in tokens.
    pub capacity: usize,
    /// Maximum number of tokens to generate, at least 1.
    pub max_new: usize,
}

/// Decides cache capacity and output length before anything runs. `context`: as asked for; `model`: the model's
/// maximum.
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
        require!(c <= most, Error::Context { asked: c, most });
    }
    require!(n_predict != Some(0), Error::NoTokens);
    require!(context != Some(0), Error::NoContext);
    let limit = context.or(model);
    let what = if context.is_some() {
        "the context asked for with -c"
    } else {
        "the model's context"
    };
    match (n_predict, limit) {
        (Some(n), Some(limit)) => {
            let total = prompt.saturating_add(n);
            let exceeds = Error::OutputExceeds {
                prompt,
                new: n,
                what,
                limit,
            };
            require!(total <= limit, exceeds);
            Ok(ContextPlan {
                capacity: context.unwrap_or(total),
                max_new: n,
            })
        }
        (None, Some(limit)) => {
            require!(prompt < limit, Error::NoRoom { prompt, what, limit });
            Ok(ContextPlan {
                capacity: limit,
                max_new: limit - prompt,
            })
        }
        (Some(n), None) => {
            let capacity = prompt.checked_add(n).ok_or(Error::TooManyTokens)?;
            Ok(ContextPlan { capacity, max_new: n })
        }
        (None, None) => Err(Error::UnknownContext),
    }
}

/// Options of a generation.
#[derive(Clone, Debug)]
pub struct Generation {
    /// Capacity, and the most tokens to generate.
    pub plan: ContextPlan,
    /// Window and budget.
    pub policy: Policy,
    /// Prompt tokens per prefill chunk.
    pub chunk: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Stop strings; they are not part of the text.
    pub stops: Vec<String>,
    /// Tokens that end the text besides those that the model's configuration names.
    pub more_ends: Vec<u32>,
    /// Continue past all of them.
    pub ignore_eos: bool,
    /// Stops the generation between two steps or two chunks of the prompt.
    pub interrupt: Interrupt,
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// End-of-text token.
    Eos,
    /// A stop string appeared.
    Stop,
    /// Maximum number of tokens, or end of the context.
    Length,
    /// [`Generation::interrupt`] was raised.
    Interrupted,
}

/// The result of a generation.
#[derive(Clone, Debug)]
pub struct Output {
    /// The generated text.
    pub text: String,
    /// Generated token ids, without the end-of-text token.
    pub tokens: Vec<u32>,
    /// How many tokens of the prompt and the output the cache holds: the last one may not have been fed.
    pub held: usize,
    /// How many of these are as dense attention makes them: the prompt, and what rectifying passes rewrote.
    pub dense: usize,
    /// Why it ended.
    pub finish: Finish,
    /// Times, and what the steps read.
    pub stats: Stats,
}

/// Progress of a generation.
pub enum Event<'a> {
    /// So many tokens of the prompt are to be prefilled.
    Reads(usize),
    /// So many more tokens of the prompt are prefilled.
    Prompt(usize),
    /// A token was generated; the text that is now final, possibly none.
    Text(&'a str),
}

/// Generates from one prompt.
///
/// # Errors
/// When the model or `observe` fails.
pub fn generate<E: From<Error>>(
    model: &mut Model,
    tokenizer: &ModelTokenizer,
    prompt: &[u32],
    options: &Generation,
    observe: &mut dyn FnMut(Event<'_>) -> Result<(), E>,
) -> Result<Output, E> {
    let mut state = model.new_state(1, options.plan.capacity)?;
    generate_from(model, tokenizer, (&mut state, 0), prompt, options, observe)
}

/// As [`generate`], on a state that holds the prompt's first tokens, so many. Whatever else it holds is forgotten.
///
/// # Errors
/// As [`generate`], and when nothing of the prompt is left to read. The state's contents are unknown then.
pub fn generate_from<E: From<Error>>(
    model: &mut Model,
    tokenizer: &ModelTokenizer,
    (state, held): (&mut DecoderState, usize),
    prompt: &[u32],
    options: &Generation,
    observe: &mut dyn FnMut(Event<'_>) -> Result<(), E>,
) -> Result<Output, E> {
    options.sampling.check()?;
    observe(Event::Reads(prompt.len().saturating_sub(held)))?;
    let start = Instant::now();
    let mut read = 0;
    let prefilled = prefill_rest(model, state, prompt, held, options.chunk, |n| {
        read += n;
        observe(Event::Prompt(n)).map_err(Stop::Failed)?;
        match options.interrupt.raised() {
            Some(_) => Err(Stop::Interrupted),
            None => Ok(()),
        }
    });
    let (kv_bytes, state_bytes) = state.kv().sizes();
    let stats = Stats {
        prompt_tokens: read,
        prompt_time: start.elapsed(),
        kv_bytes,
        state_bytes,
        ..Stats::default()
    };
    let first = match prefilled {
        // No output, but figures of what was prefilled.
        Err(Stop::Interrupted) => {
            return Ok(Output {
                text: String::new(),
                tokens: Vec::new(),
                held: held + read,
                dense: held + read,
                finish: Finish::Interrupted,
                stats,
            });
        }
        Err(Stop::Failed(e)) => return Err(e),
        Ok(logits) => Prompted { logits, start, stats },
    };
    decode(model, tokenizer, state, prompt, first, options, observe)
}

/// A prompt that was read.
struct Prompted {
    /// Of its last token.
    logits: Logits,
    /// When reading it began.
    start: Instant,
    stats: Stats,
}

fn decode<E: From<Error>>(
    model: &mut Model,
    tokenizer: &ModelTokenizer,
    state: &mut DecoderState,
    prompt: &[u32],
    prompted: Prompted,
    options: &Generation,
    observe: &mut dyn FnMut(Event<'_>) -> Result<(), E>,
) -> Result<Output, E> {
    let Prompted {
        mut logits,
        start,
        mut stats,
    } = prompted;
    let mut ends = tokenizer.ends(&model.folder);
    ends.extend(&options.more_ends);
    let mut sampler = Sampler::new(options.sampling);
    // On a GPU, copying the page steps back would cost as much as a step.
    let measure = model.gpu.is_none();
    let mut decoder = Decoder::new(model, state, &[prompt], options.policy)?;
    if !measure {
        decoder.measure_nothing();
    }
    let mut writer = Writer {
        tokenizer,
        detokenizer: Detokenizer::after(prompt),
        filter: StopFilter::new(&options.stops),
        text: String::new(),
        observe,
    };
    let mut sampling_time = Duration::ZERO;
    let mut tokens = Vec::new();
    let finish = loop {
        if options.interrupt.raised().is_some() {
            break Finish::Interrupted;
        }
        let choosing = Instant::now();
        let token = sampler.choose(logits.row(0), decoder.tokens(0))?;
        if tokens.is_empty() {
            stats.first_token = Some(start.elapsed());
        } else {
            sampling_time += choosing.elapsed();
        }
        if !options.ignore_eos && ends.contains(&token) {
            break Finish::Eos;
        }
        tokens.push(token);
        decoder.push(0, token);
        writer.push(token)?;
        if writer.filter.stopped() {
            break Finish::Stop;
        }
        if tokens.len() >= options.plan.max_new {
            break Finish::Length;
        }
        logits = decoder.step()?;
    };
    stats.generated_tokens = tokens.len();
    stats.decoded_tokens = decoder.steps();
    stats.decode_time = decoder.time + sampling_time;
    stats.reading = decoder.reading();
    stats.passes = decoder.passes();
    let rectified = decoder.rectified();
    (stats.kv_bytes, stats.state_bytes) = state.kv().sizes();
    Ok(Output {
        text: writer.finish()?,
        held: prompt.len() + stats.decoded_tokens,
        dense: prompt.len() + rectified,
        tokens,
        finish,
        stats,
    })
}

/// Why a prefill ended early.
enum Stop<E> {
    Interrupted,
    Failed(E),
}

impl<E: From<Error>> From<Error> for Stop<E> {
    fn from(error: Error) -> Self {
        Self::Failed(error.into())
    }
}

/// Decodes tokens and passes their text on once it is final.
struct Writer<'a, E> {
    tokenizer: &'a ModelTokenizer,
    detokenizer: Detokenizer,
    filter: StopFilter,
    text: String,
    observe: &'a mut dyn FnMut(Event<'_>) -> Result<(), E>,
}

impl<E: From<Error>> Writer<'_, E> {
    fn push(&mut self, token: u32) -> Result<(), E> {
        let piece = self.detokenizer.push(self.tokenizer, token).map_err(Error::from)?;
        let piece = self.filter.push(&piece);
        self.emit(&piece)
    }

    /// Passes on what was held back; returns the whole text.
    fn finish(mut self) -> Result<String, E> {
        let last = self.detokenizer.finish(self.tokenizer).map_err(Error::from)?;
        for piece in [self.filter.push(&last), self.filter.finish()] {
            self.emit(&piece)?;
        }
        Ok(self.text)
    }

    fn emit(&mut self, piece: &str) -> Result<(), E> {
        (self.observe)(Event::Text(piece))?;
        self.text.push_str(piece);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
