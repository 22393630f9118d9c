//! From what the scheduler sends to a response: whole, or as a stream of events.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    Json,
    response::{
        IntoResponse, Response,
        sse::{self, KeepAlive, Sse},
    },
};
use futures_util::{Stream, StreamExt, stream};
use serde_json::{Map, Value, json};
use tokio::sync::mpsc::UnboundedReceiver;

use super::{
    app::{Loaded, now},
    error::{ApiError, Result},
    generation::Generation,
};
use crate::{
    decoder::generate::Finish,
    serve::request::{Done, Event, Request, Token, Usage},
};

/// A comment is sent so often while nothing else is, so that proxies keep the connection.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// How an endpoint writes an answer.
pub trait Shape: Send + Sized + 'static {
    /// What responses and events say they are.
    const OBJECTS: [&'static str; 2];
    /// What identifiers begin with.
    const PREFIX: &'static str;

    /// A whole choice.
    fn choice(&mut self, index: usize, tokens: Vec<Token>, done: &Done) -> Value;

    /// The choice of the first event, before any token.
    fn opens(&mut self, index: usize) -> Option<Value>;

    /// The choices of the events for a token: none where nothing can be said yet.
    fn goes_on(&mut self, index: usize, token: Token) -> Vec<Value>;

    /// The choices of the last events.
    fn ends(&mut self, index: usize, done: &Done) -> Vec<Value>;
}

/// What OpenAI calls the end of a text.
pub fn finish_reason(finish: Finish) -> &'static str {
    match finish {
        Finish::Eos | Finish::Stop => "stop",
        Finish::Length | Finish::Interrupted => "length",
    }
}

/// The requests of one response, and what is said of them.
pub struct Answer<S> {
    pub loaded: Arc<Loaded>,
    pub generation: Generation,
    pub shape: S,
    /// The requests, those of one prompt one after another.
    pub requests: Vec<Request>,
}

impl<S: Shape> Answer<S> {
    /// Hands the requests in and responds.
    pub async fn respond(self) -> Result<Response> {
        let handle = self.loaded.engine.handle();
        let Self {
            generation,
            shape,
            requests,
            ..
        } = self;
        // More than may wait would be told to come back for ever.
        let (count, most) = (requests.len(), self.loaded.engine.options().queue);
        if count > most {
            let message = format!("{count} answers at once are more than the {most} that may wait (--queue)");
            return Err(ApiError::field("n", message));
        }
        let prompts = requests.iter().step_by(generation.n).map(|r| r.prompt.len()).sum();
        let events = handle.submit(requests)?;
        let budget = generation.policy.budget.or(self.loaded.engine.budget());
        let head = Head {
            budget: budget.map(|b| b.to_string()),
            id: format!(
                "{}-{:016x}{:016x}",
                S::PREFIX,
                rand::random::<u64>(),
                rand::random::<u64>()
            ),
            created: now(),
            model: self.loaded.name.clone(),
            prompts,
            generation,
        };
        if head.generation.stream {
            let events = head.events(shape, events);
            let keep = KeepAlive::new().interval(KEEP_ALIVE);
            return Ok(Sse::new(events).keep_alive(keep).into_response());
        }
        head.whole(shape, events).await.map(|value| Json(value).into_response())
    }
}

/// What is the same in all events of a response.
struct Head {
    id: String,
    created: u64,
    model: String,
    /// Tokens of all prompts.
    prompts: usize,
    budget: Option<String>,
    generation: Generation,
}

impl Head {
    fn object(&self, object: &str, choices: Vec<Value>) -> Map<String, Value> {
        let fields = [
            ("id", json!(self.id)),
            ("object", json!(object)),
            ("created", json!(self.created)),
            ("model", json!(self.model)),
            ("choices", Value::Array(choices)),
        ];
        fields
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect()
    }

    /// What it took: of each answer, `None` where nothing has come of it yet.
    fn usage(&self, usages: &[Option<Usage>]) -> Value {
        let begun = || usages.iter().flatten();
        let generated: usize = begun().map(|u| u.generated).sum();
        // Of each prompt once, by its first answer: the others take over what that one has read.
        let first_of_each = usages.iter().step_by(self.generation.n).flatten();
        let cached: usize = first_of_each.map(|u| u.cached).sum();
        let mut reading = crate::decoder::page_reads::PageReads::default();
        begun().for_each(|u| reading.add(&u.reading));
        let first = begun().map(|u| u.first_token).min();
        let decoding = begun().map(|u| u.decoding).max().unwrap_or_default();
        let steps: usize = begun().map(|u| u.generated.saturating_sub(1)).sum();
        let rate = (steps > 0 && !decoding.is_zero()).then(|| steps as f64 / decoding.as_secs_f64());
        let policy = self.generation.policy;
        json!({
            "prompt_tokens": self.prompts,
            "completion_tokens": generated,
            "total_tokens": self.prompts + generated,
            "prompt_tokens_details": {"cached_tokens": cached},
            "retro": {
                "window": policy.window,
                "budget": self.budget,
                "rectify": policy.rectify,
                "pages_per_kv_head_and_step": reading.pages(),
                "share_of_valid_pages": reading.share(),
                "effective_exposure": reading.exposure(),
                "time_to_first_token_ms": first.map(|time| time.as_secs_f64() * 1e3),
                "decode_tokens_per_second": rate,
            },
        })
    }

    async fn whole<S: Shape>(self, mut shape: S, events: Vec<UnboundedReceiver<Event>>) -> Result<Value> {
        let mut choices = Vec::with_capacity(events.len());
        let mut usages = Vec::with_capacity(events.len());
        for (index, mut events) in events.into_iter().enumerate() {
            let mut tokens = Vec::new();
            let done = loop {
                match events.recv().await {
                    Some(Event::Token(token)) => tokens.push(token),
                    Some(Event::Done(done)) => break done,
                    Some(Event::Failed(failure)) => return Err(failure.into()),
                    None => return Err(ApiError::internal("the scheduler ended")),
                }
            };
            choices.push(shape.choice(index, tokens, &done));
            usages.push(Some(done.usage));
        }
        let usage = self.usage(&usages);
        let mut object = self.object(S::OBJECTS[0], choices);
        object.insert("usage".to_owned(), usage);
        Ok(Value::Object(object))
    }

    /// The events of a stream. Dropping it drops the receivers, which cancels the requests.
    fn events<S: Shape>(
        self,
        shape: S,
        events: Vec<UnboundedReceiver<Event>>,
    ) -> impl Stream<Item = Result<sse::Event, Infallible>> + Send + 'static {
        let count = events.len();
        let each = events.into_iter().enumerate().map(|(index, receiver)| {
            let next = move |mut receiver: UnboundedReceiver<Event>| async move {
                let event = receiver.recv().await?;
                Some(((index, event), receiver))
            };
            stream::unfold(receiver, next).boxed()
        });
        let teller = Teller {
            head: self,
            shape,
            usages: vec![None; count],
            left: count,
        };
        let opening = stream::iter((0..count).map(|index| (index, None)));
        let all = stream::select_all(each).map(|(index, event)| (index, Some(event)));
        let told = opening.chain(all).scan(teller, |teller, (index, event)| {
            let told = if teller.is_over() {
                None
            } else {
                Some(teller.tell(index, event))
            };
            std::future::ready(told)
        });
        told.flat_map(stream::iter)
            .map(|data| Ok(sse::Event::default().data(data)))
    }
}

/// Makes events of what comes.
struct Teller<S> {
    head: Head,
    shape: S,
    /// What each answer took so far.
    usages: Vec<Option<Usage>>,
    /// Answers that have not ended.
    left: usize,
}

impl<S: Shape> Teller<S> {
    fn is_over(&self) -> bool {
        self.left == 0
    }

    /// The data of the events that something makes.
    fn tell(&mut self, index: usize, event: Option<Event>) -> Vec<String> {
        let choices = match event {
            None => self.shape.opens(index).into_iter().collect(),
            Some(Event::Token(mut token)) => {
                if let Some(usage) = token.usage.take() {
                    self.takes(index, usage);
                }
                self.shape.goes_on(index, token)
            }
            Some(Event::Done(done)) => {
                self.left -= 1;
                let choices = self.shape.ends(index, &done);
                self.takes(index, done.usage);
                choices
            }
            Some(Event::Failed(failure)) => {
                // One answer that fails ends them all: a stream has no other way to say so.
                self.left = 0;
                return vec![ApiError::from(failure).json().to_string()];
            }
        };
        let live = self.head.generation.live;
        let chunk = |choice| {
            let usage = live.then(|| self.head.usage(&self.usages));
            self.chunk(vec![choice], usage)
        };
        let mut data: Vec<String> = choices.into_iter().map(chunk).collect();
        if self.left == 0 {
            if self.head.generation.include_usage {
                let usage = self.head.usage(&self.usages);
                data.push(self.chunk(Vec::new(), Some(usage)));
            }
            data.push("[DONE]".to_owned());
        }
        data
    }

    fn takes(&mut self, index: usize, usage: Usage) {
        if let Some(place) = self.usages.get_mut(index) {
            *place = Some(usage);
        }
    }

    fn chunk(&self, choices: Vec<Value>, usage: Option<Value>) -> String {
        let mut object = self.head.object(S::OBJECTS[1], choices);
        if self.head.generation.include_usage {
            object.insert("usage".to_owned(), usage.unwrap_or(Value::Null));
        }
        Value::Object(object).to_string()
    }
}
