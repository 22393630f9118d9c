//! A conversation with a model: messages, and the cache that holds what was read of them.
//!
//! Every turn renders the whole conversation with the chat template. What the cache holds of it already, the longest
//! common prefix of the two, is not read again; behind it the cache goes back, where a template changes what was sent
//! (Qwen 3 drops the thinking of earlier turns).

mod error;
mod transcript;
pub(crate) mod turn_end;

use crate::{
    DecoderState, Interrupt, Model, ModelTokenizer,
    decoder::{
        self,
        decode_loop::{CHUNK, Policy, held_of_prompt},
        generate::{ContextPlan, Event, Finish, Generation, generate_from},
        sampling::Sampling,
        stats::Stats,
    },
    text::chat_template::{ChatTemplate, RenderOptions},
};

pub use error::{Error, Result};
pub use transcript::{FORMAT, Message, Role, read, write};

pub use crate::decoder::model::CONTEXT;

/// How a conversation is led.
#[derive(Clone, Debug)]
pub struct ChatOptions {
    /// Window and budget.
    pub policy: Policy,
    /// Tokens that the cache holds; `None`: the model's context, [`CONTEXT`] at most.
    pub context: Option<usize>,
    /// The most tokens of an answer; `None`: as the context has room.
    pub max_answer: Option<usize>,
    /// Tokens of a prompt that are read at a time.
    pub chunk: usize,
    /// How tokens are chosen. Each answer has a seed of its own, made of this one.
    pub sampling: Sampling,
    /// Strings that end an answer.
    pub stops: Vec<String>,
    /// Variables for the template, and its tools and documents.
    pub rendering: RenderOptions,
    /// Stops an answer; the conversation goes on.
    pub interrupt: Interrupt,
}

impl ChatOptions {
    /// The defaults under a policy.
    pub fn new(policy: Policy) -> Self {
        Self {
            policy,
            context: None,
            max_answer: None,
            chunk: CHUNK,
            sampling: Sampling::default(),
            stops: Vec::new(),
            rendering: RenderOptions::default(),
            interrupt: Interrupt::default(),
        }
    }
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Its text.
    pub text: String,
    /// Why it ended.
    pub finish: Finish,
    /// Times, and what its steps read. The prompt's tokens are those that the cache did not hold.
    pub stats: Stats,
    /// Tokens of the conversation up to the answer's end.
    pub used: usize,
}

/// A conversation with a model.
pub struct Chat {
    model: Model,
    tokenizer: ModelTokenizer,
    template: ChatTemplate,
    options: ChatOptions,
    capacity: usize,
    /// Ends of turns that the template writes.
    ends: Vec<u32>,
    messages: Vec<Message>,
    /// Made with the first turn.
    state: Option<DecoderState>,
    /// The tokens that the state holds.
    held: Vec<u32>,
    answers: u64,
    last: Option<Answer>,
}

impl Chat {
    /// A conversation without messages.
    ///
    /// # Errors
    /// When the context exceeds the model's or is unknown, or an option is out of range.
    pub fn new(
        model: Model,
        tokenizer: ModelTokenizer,
        template: ChatTemplate,
        mut options: ChatOptions,
    ) -> Result<Self> {
        options.sampling.check()?;
        let capacity = model.cache_context(options.context)?.ok_or(Error::UnknownContext)?;
        options.policy.fits(capacity)?;
        if options.max_answer == Some(0) {
            return Err(decoder::Error::NoTokens.into());
        }
        // One date for the whole conversation: what was read with another would have to be read again.
        options.rendering.now.get_or_insert_with(jiff::Zoned::now);
        let ends = turn_end::written(&template, &tokenizer, &options.rendering);
        Ok(Self {
            model,
            tokenizer,
            template,
            options,
            capacity,
            ends: ends.into_iter().collect(),
            messages: Vec::new(),
            state: None,
            held: Vec::new(),
            answers: 0,
            last: None,
        })
    }

    /// The model that answers.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// How tokens are chosen.
    pub fn sampling(&self) -> &Sampling {
        &self.options.sampling
    }

    /// Tokens that the cache can hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Tokens that the cache holds.
    pub fn held(&self) -> &[u32] {
        &self.held
    }

    /// The messages so far, the system's first.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// The last answer.
    pub fn last(&self) -> Option<&Answer> {
        self.last.as_ref()
    }

    /// The system prompt.
    pub fn system(&self) -> Option<&str> {
        let first = self.messages.first().filter(|m| m.role == Role::System);
        first.map(|m| m.content.as_str())
    }

    /// Sets or removes the system prompt. What follows it stays, and is read again with the next turn.
    pub fn set_system(&mut self, text: Option<&str>) {
        if self.system().is_some() {
            self.messages.remove(0);
        }
        if let Some(text) = text {
            self.messages.insert(0, Message::new(Role::System, text));
        }
    }

    /// Forgets all messages but the system's.
    pub fn clear(&mut self) {
        self.messages.retain(|m| m.role == Role::System);
        self.last = None;
    }

    /// Takes other messages in place of these. They are read with the next turn.
    pub fn set_messages(&mut self, messages: Vec<Message>) {
        self.messages = messages;
        self.last = None;
    }

    /// Says something and gets the answer, which `observe` sees as it comes. Both become messages of the conversation;
    /// an interrupted answer as far as it came, and neither if nothing of it came.
    ///
    /// # Errors
    /// When the conversation does not fit the context any more, or the template, the model or `observe` fails. The
    /// messages are as before then.
    pub fn say<E>(&mut self, text: &str, observe: &mut dyn FnMut(Event<'_>) -> Result<(), E>) -> Result<&Answer, E>
    where
        E: From<Error> + From<decoder::Error>,
    {
        self.messages.push(Message::new(Role::User, text));
        match self.answer(observe) {
            Ok(answer) if answer.finish == Finish::Interrupted && answer.text.is_empty() => {
                self.messages.pop();
                Ok(self.last.insert(answer))
            }
            Ok(answer) => {
                self.messages.push(Message::new(Role::Assistant, &answer.text));
                Ok(self.last.insert(answer))
            }
            Err(e) => {
                self.messages.pop();
                Err(e)
            }
        }
    }

    fn answer<E>(&mut self, observe: &mut dyn FnMut(Event<'_>) -> Result<(), E>) -> Result<Answer, E>
    where
        E: From<Error> + From<decoder::Error>,
    {
        let prompt = self.prompt()?;
        let plan = self.plan(prompt.len())?;
        let (mut state, held) = self.state_for(&prompt)?;
        let sampling = Sampling {
            seed: self.options.sampling.seed.wrapping_add(self.answers),
            ..self.options.sampling
        };
        let options = Generation {
            plan,
            policy: self.options.policy,
            chunk: self.options.chunk,
            sampling,
            stops: self.options.stops.clone(),
            more_ends: self.ends.clone(),
            ignore_eos: false,
            interrupt: self.options.interrupt.clone(),
        };
        let from = (&mut state, held);
        let output = generate_from(&mut self.model, &self.tokenizer, from, &prompt, &options, observe)?;
        self.answers += 1;
        let used = prompt.len() + output.tokens.len();
        self.held = prompt;
        self.held.extend(&output.tokens);
        // With rectifying passes no turn sees what a sparse step wrote: the next one reads the rest of this answer anew.
        let keep = match self.options.policy.rectify {
            Some(_) => output.dense,
            None => output.held,
        };
        self.held.truncate(keep);
        self.state = Some(state);
        Ok(Answer {
            text: output.text,
            finish: output.finish,
            stats: output.stats,
            used,
        })
    }

    /// The tokens of the conversation, up to where the answer begins.
    fn prompt(&self) -> Result<Vec<u32>> {
        let options = RenderOptions {
            add_generation_prompt: true,
            ..self.options.rendering.clone()
        };
        let messages: Vec<_> = self.messages.iter().map(Message::json).collect();
        let text = self.template.render(&messages, &options)?;
        Ok(self.tokenizer.encode_as_is(&text)?)
    }

    fn plan(&self, prompt: usize) -> Result<ContextPlan> {
        let capacity = self.capacity;
        let room = capacity.checked_sub(prompt).filter(|&room| room > 0);
        let room = room.ok_or(Error::Full {
            tokens: prompt,
            capacity,
            larger: self.model.context_length().is_none_or(|most| most > capacity),
        })?;
        let max_new = self.options.max_answer.map_or(room, |most| most.min(room));
        Ok(ContextPlan { capacity, max_new })
    }

    /// The state to read the prompt into, and how many of the prompt's tokens it holds. It is taken out of `self`, so
    /// that one whose contents an error made unknown is not used again.
    fn state_for(&mut self, prompt: &[u32]) -> Result<(DecoderState, usize)> {
        let keep = held_of_prompt(&self.held, prompt);
        let held = std::mem::take(&mut self.held);
        let fits = |state: &DecoderState| keep == held.len() || state.kv().can_go_back();
        match self.state.take().filter(fits) {
            Some(state) => Ok((state, keep)),
            None => Ok((self.model.new_state(1, self.capacity)?, 0)),
        }
    }
}
