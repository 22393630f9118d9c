//! `POST /v1/completions`: texts that go on.

use std::sync::Arc;

use axum::{body::Body, extract::State, http::Request as HttpRequest, response::Response};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{
    answer::{Answer, Shape, finish_reason},
    app::{App, Loaded},
    error::{ApiError, Result},
    fields::Fields,
    generation::Generation,
    tools::constraint,
};
use crate::serve::request::{Done, Token};

/// The most prompts of a request.
const MOST_PROMPTS: usize = 32;

/// A prompt or several, as text or as tokens.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a text, a list of texts, or of tokens")]
enum Prompts {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    TokenLists(Vec<Vec<u32>>),
}

pub async fn completions(State(app): State<Arc<App>>, request: HttpRequest<Body>) -> Result<Response> {
    let loaded = app.loaded()?;
    let log = app.settings.log_prompts;
    let answer = app.take(request, move |fields| take(fields, loaded, log)).await?;
    answer.respond().await
}

fn take(mut fields: Fields, loaded: Arc<Loaded>, log: bool) -> Result<Answer<Completion>> {
    let prompts = match fields.demand("prompt")? {
        Prompts::Text(text) => vec![encode(&loaded, &text)?],
        Prompts::Texts(texts) if texts.len() > MOST_PROMPTS => return Err(prompts_error()),
        Prompts::Texts(texts) => texts.iter().map(|t| encode(&loaded, t)).collect::<Result<_>>()?,
        Prompts::Tokens(tokens) => vec![tokens],
        Prompts::TokenLists(lists) => lists,
    };
    if prompts.is_empty() || prompts.len() > MOST_PROMPTS {
        return Err(prompts_error());
    }
    let vocabulary = loaded.engine.tokenizer().size();
    if prompts.iter().any(Vec::is_empty) {
        return Err(ApiError::field("prompt", "it has no token"));
    }
    if prompts.iter().flatten().any(|&id| id as usize >= vocabulary) {
        return Err(ApiError::field(
            "prompt",
            format!("tokens are numbers below {vocabulary}"),
        ));
    }
    let mut generation = Generation::take(&mut fields, &loaded)?;
    generation.logprobs = fields.count("logprobs", 0..=20)?;
    generation.constraint = constraint(&mut fields, None, &loaded)?;
    fields.only("echo", &[json!(false)])?;
    fields.only("suffix", &[json!("")])?;
    fields.only("best_of", &[json!(1), json!(generation.n)])?;
    fields.finish()?;
    if log {
        for prompt in &prompts {
            let text = loaded.engine.tokenizer().decode(prompt).unwrap_or_default();
            crate::progress::note(&format!("prompt {text:?}"));
        }
    }
    let requests = prompts.iter().map(|p| generation.requests(&loaded, p, "prompt"));
    let requests: Vec<_> = requests.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
    let offsets = vec![0; requests.len()];
    Ok(Answer {
        shape: Completion {
            loaded: Arc::clone(&loaded),
            logprobs: generation.logprobs.is_some(),
            offsets,
        },
        loaded,
        generation,
        requests,
    })
}

fn prompts_error() -> ApiError {
    ApiError::field("prompt", format!("expected 1 to {MOST_PROMPTS} prompts"))
}

fn encode(loaded: &Loaded, text: &str) -> Result<Vec<u32>> {
    loaded.fits("prompt", text)?;
    let tokens = loaded.engine.tokenizer().encode(text);
    tokens.map_err(|e| ApiError::field("prompt", e))
}

struct Completion {
    loaded: Arc<Loaded>,
    logprobs: bool,
    /// Characters of each text so far.
    offsets: Vec<usize>,
}

impl Completion {
    fn logprobs(&mut self, index: usize, tokens: &[Token]) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        let text = |id: u32| self.loaded.engine.tokenizer().decode(&[id]).unwrap_or_default();
        let offset = self.offsets.get_mut(index);
        let mut at = offset.as_ref().map_or(0, |o| **o);
        let mut lists: [Vec<Value>; 4] = Default::default();
        let [texts, logprobs, tops, offsets] = &mut lists;
        for token in tokens {
            let piece = text(token.id);
            let found = token.logprobs.as_ref();
            offsets.push(json!(at));
            at += piece.chars().count();
            texts.push(json!(piece));
            logprobs.push(json!(found.map(|l| l.chosen)));
            let top = found.map(|l| l.top.as_slice()).unwrap_or_default();
            let top: Map<String, Value> = top.iter().map(|&(id, x)| (text(id), json!(x))).collect();
            tops.push(Value::Object(top));
        }
        if let Some(offset) = offset {
            *offset = at;
        }
        let [texts, logprobs, tops, offsets] = lists;
        json!({"tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets})
    }
}

impl Shape for Completion {
    const OBJECTS: [&'static str; 2] = ["text_completion", "text_completion"];
    const PREFIX: &'static str = "cmpl";

    fn choice(&mut self, index: usize, tokens: Vec<Token>, done: &Done) -> Value {
        let text: String = tokens.iter().map(|t| t.text.as_str()).collect();
        json!({
            "index": index,
            "text": text + &done.text,
            "logprobs": self.logprobs(index, &tokens),
            "finish_reason": finish_reason(done.finish),
        })
    }

    fn opens(&mut self, _index: usize) -> Option<Value> {
        None
    }

    fn goes_on(&mut self, index: usize, token: Token) -> Vec<Value> {
        if token.text.is_empty() && !self.logprobs {
            return Vec::new();
        }
        let logprobs = self.logprobs(index, std::slice::from_ref(&token));
        vec![json!({"index": index, "text": token.text, "logprobs": logprobs, "finish_reason": null})]
    }

    fn ends(&mut self, index: usize, done: &Done) -> Vec<Value> {
        let finish = finish_reason(done.finish);
        vec![json!({"index": index, "text": done.text, "logprobs": null, "finish_reason": finish})]
    }
}
