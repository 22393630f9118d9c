//! `POST /v1/chat/completions`: conversations.

use std::sync::Arc;

use axum::{body::Body, extract::State, http::Request as HttpRequest, response::Response};
use serde_json::{Map, Value, json};

use super::{
    answer::{Answer, Shape, finish_reason},
    app::{App, Loaded, off_the_loop},
    error::{ApiError, Result},
    fields::Fields,
    generation::Generation,
    messages::messages,
};
use crate::{
    serve::request::{Done, Token},
    text::chat_template::RenderOptions,
};

pub async fn chat_completions(State(app): State<Arc<App>>, request: HttpRequest<Body>) -> Result<Response> {
    let loaded = app.loaded()?;
    let fields = app.fields(request).await?;
    let log = app.settings.log_prompts;
    let answer = off_the_loop(move || take(fields, loaded, log)).await?;
    answer.respond().await
}

fn take(mut fields: Fields, loaded: Arc<Loaded>, log: bool) -> Result<Answer<Chat>> {
    let messages = messages(&mut fields)?;
    let mut generation = Generation::take(&mut fields, &loaded)?;
    let asked: Option<bool> = fields.take("logprobs")?;
    let top = fields.count("top_logprobs", 0..=20)?;
    if top.is_some() && asked != Some(true) {
        return Err(ApiError::field("top_logprobs", "only with \"logprobs\": true"));
    }
    generation.logprobs = asked.unwrap_or(false).then_some(top.unwrap_or(0));
    let variables: Option<Map<String, Value>> = fields.take("chat_template_kwargs")?;
    fields.only("modalities", &[json!(["text"])])?;
    fields.only("response_format", &[json!({"type": "text"})])?;
    fields.only("tools", &[json!([])])?;
    fields.only("tool_choice", &[json!("none"), json!("auto")])?;
    fields.only("parallel_tool_calls", &[json!(true), json!(false)])?;
    fields.finish()?;
    let options = RenderOptions {
        add_generation_prompt: true,
        variables: variables.unwrap_or_default(),
        ..RenderOptions::default()
    };
    let template = loaded.template.as_ref().ok_or_else(|| {
        ApiError::field(
            "messages",
            "the model has no chat template: start the server with --template FILE, or use /v1/completions",
        )
    })?;
    let text = template.render(&messages, &options);
    let text = text.map_err(|e| ApiError::field("messages", e))?;
    if log {
        crate::progress::note(&format!("prompt {text:?}"));
    }
    let prompt = loaded.engine.tokenizer().encode_as_is(&text);
    let prompt = prompt.map_err(|e| ApiError::field("messages", e))?;
    let requests = generation.requests(&loaded, &prompt, "messages")?;
    Ok(Answer {
        shape: Chat {
            loaded: Arc::clone(&loaded),
            logprobs: generation.logprobs.is_some(),
        },
        loaded,
        generation,
        requests,
    })
}

struct Chat {
    loaded: Arc<Loaded>,
    logprobs: bool,
}

impl Chat {
    fn logprobs(&self, tokens: &[Token]) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        let tokenizer = self.loaded.engine.tokenizer();
        let entry = |id: u32, logprob: f32| {
            let text = tokenizer.decode(&[id]).unwrap_or_default();
            let bytes = self.loaded.token_bytes.as_ref().and_then(|all| all.get(id as usize));
            json!({"token": text, "logprob": logprob, "bytes": bytes.map(|b| &b.bytes)})
        };
        let content = tokens.iter().filter_map(|token| {
            let found = token.logprobs.as_ref()?;
            let mut told = entry(token.id, found.chosen);
            let top: Vec<Value> = found.top.iter().map(|&(id, x)| entry(id, x)).collect();
            if let Some(told) = told.as_object_mut() {
                told.insert("top_logprobs".to_owned(), Value::Array(top));
            }
            Some(told)
        });
        json!({"content": content.collect::<Vec<_>>(), "refusal": null})
    }

    fn delta(index: usize, delta: Value, logprobs: Value, finish: Option<&str>) -> Value {
        json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish})
    }
}

impl Shape for Chat {
    const OBJECTS: [&'static str; 2] = ["chat.completion", "chat.completion.chunk"];
    const PREFIX: &'static str = "chatcmpl";

    fn choice(&mut self, index: usize, tokens: Vec<Token>, done: &Done) -> Value {
        let text: String = tokens.iter().map(|t| t.text.as_str()).collect();
        json!({
            "index": index,
            "message": {"role": "assistant", "content": text + &done.text, "refusal": null},
            "logprobs": self.logprobs(&tokens),
            "finish_reason": finish_reason(done.finish),
        })
    }

    fn opens(&mut self, index: usize) -> Option<Value> {
        let delta = json!({"role": "assistant", "content": ""});
        Some(Self::delta(index, delta, Value::Null, None))
    }

    fn goes_on(&mut self, index: usize, token: Token) -> Vec<Value> {
        if token.text.is_empty() && !self.logprobs {
            return Vec::new();
        }
        let logprobs = self.logprobs(std::slice::from_ref(&token));
        vec![Self::delta(index, json!({"content": token.text}), logprobs, None)]
    }

    fn ends(&mut self, index: usize, done: &Done) -> Vec<Value> {
        let text = (!done.text.is_empty()).then(|| json!({"content": done.text}));
        let text = text.map(|delta| Self::delta(index, delta, Value::Null, None));
        let end = Self::delta(index, json!({}), Value::Null, Some(finish_reason(done.finish)));
        text.into_iter().chain([end]).collect()
    }
}
