//! `POST /v1/chat/completions`: conversations.

use std::sync::Arc;

use axum::{body::Body, extract::State, http::Request as HttpRequest, response::Response};
use serde_json::{Map, Value, json};

use super::{
    answer::{Answer, Shape, finish_reason},
    app::{App, Loaded},
    error::{ApiError, Result},
    fields::Fields,
    generation::Generation,
    messages::{messages, with_tools_as_text},
    tool_calls::{CallFinder, Parsed, parse},
    tools::{Tools, constraint},
};
use crate::{
    serve::request::{Done, Token},
    text::chat_template::RenderOptions,
};

pub async fn chat_completions(State(app): State<Arc<App>>, request: HttpRequest<Body>) -> Result<Response> {
    let loaded = app.loaded()?;
    let log = app.settings.log_prompts;
    let answer = app.take(request, move |fields| take(fields, loaded, log)).await?;
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
    let mut variables = variables.unwrap_or_default();
    // OpenAI's name for what templates know as a variable.
    if let Some(effort) = fields.take::<String>("reasoning_effort")? {
        variables.entry("reasoning_effort").or_insert(Value::String(effort));
    }
    fields.only("modalities", &[json!(["text"])])?;
    let tools = Tools::take(&mut fields)?;
    generation.constraint = constraint(&mut fields, tools.as_ref(), &loaded)?;
    fields.finish()?;
    let text = render(&loaded, messages, variables, tools.as_ref())?;
    if log {
        crate::progress::note(&format!("prompt {text:?}"));
    }
    loaded.fits("messages", &text)?;
    let prompt = loaded.engine.tokenizer().encode_as_is(&text);
    let prompt = prompt.map_err(|e| ApiError::field("messages", e))?;
    let requests = generation.requests(&loaded, &prompt, "messages")?;
    Ok(Answer {
        shape: Chat {
            loaded: Arc::clone(&loaded),
            logprobs: generation.logprobs.is_some(),
            finders: (0..generation.n)
                .map(|_| tools.as_ref().map(|_| CallFinder::default()))
                .collect(),
            tools,
        },
        loaded,
        generation,
        requests,
    })
}

/// The text of a conversation, tools included.
fn render(
    loaded: &Loaded,
    messages: Vec<Value>,
    variables: Map<String, Value>,
    tools: Option<&Tools>,
) -> Result<String> {
    let template = loaded.template.as_ref().ok_or_else(|| {
        ApiError::field(
            "messages",
            "the model has no chat template: start the server with --template FILE, or use /v1/completions",
        )
    })?;
    let plain = RenderOptions {
        add_generation_prompt: true,
        variables,
        ..RenderOptions::default()
    };
    let render = |messages: &[Value], options: &RenderOptions| {
        let text = template.render(messages, options);
        text.map_err(|e| ApiError::field("messages", e))
    };
    let Some(tools) = tools else {
        return render(&messages, &plain);
    };
    let with_tools = RenderOptions {
        tools: Some(tools.list.clone()),
        ..plain.clone()
    };
    // A template that writes the same with tools and without says nothing of them.
    let asks = [json!({"role": "user", "content": "Hello"})];
    if render(&asks, &plain)? == render(&asks, &with_tools)? {
        return render(&with_tools_as_text(messages, &tools.instructions()), &plain);
    }
    render(&messages, &with_tools)
}

struct Chat {
    loaded: Arc<Loaded>,
    logprobs: bool,
    tools: Option<Tools>,
    /// Of each answer that is streamed and may have calls.
    finders: Vec<Option<CallFinder>>,
}

/// Why an answer with calls or without ended.
fn finish_of(done: &Done, calls: bool) -> &'static str {
    match finish_reason(done.finish) {
        "stop" if calls => "tool_calls",
        other => other,
    }
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
        let text = text + &done.text;
        let parsed = match &self.tools {
            Some(tools) => tools.calls_taken(parse(&text, &tools.names)),
            None => Parsed {
                content: text,
                calls: Vec::new(),
            },
        };
        let said = parsed.calls.is_empty() || !parsed.content.is_empty();
        let mut message = json!({"role": "assistant", "content": said.then_some(parsed.content), "refusal": null});
        let calls: Vec<Value> = parsed.calls.iter().map(|c| c.json(None)).collect();
        let finish = finish_of(done, !calls.is_empty());
        if let Some(message) = message.as_object_mut().filter(|_| !calls.is_empty()) {
            message.insert("tool_calls".to_owned(), Value::Array(calls));
        }
        json!({
            "index": index,
            "message": message,
            "logprobs": self.logprobs(&tokens),
            "finish_reason": finish,
        })
    }

    fn opens(&mut self, index: usize) -> Option<Value> {
        let delta = json!({"role": "assistant", "content": ""});
        Some(Self::delta(index, delta, Value::Null, None))
    }

    fn goes_on(&mut self, index: usize, token: Token) -> Vec<Value> {
        let finder = self.finders.get_mut(index).and_then(Option::as_mut);
        let text = finder.map_or_else(|| token.text.clone(), |finder| finder.push(&token.text));
        if text.is_empty() && !self.logprobs {
            return Vec::new();
        }
        let logprobs = self.logprobs(std::slice::from_ref(&token));
        vec![Self::delta(index, json!({"content": text}), logprobs, None)]
    }

    fn ends(&mut self, index: usize, done: &Done) -> Vec<Value> {
        let finder = self.finders.get_mut(index).and_then(Option::take);
        let parsed = match (finder, &self.tools) {
            (Some(mut finder), Some(tools)) => {
                let more = finder.push(&done.text);
                let rest = tools.calls_taken(finder.finish(&tools.names));
                Parsed {
                    content: more + &rest.content,
                    calls: rest.calls,
                }
            }
            _ => Parsed {
                content: done.text.clone(),
                calls: Vec::new(),
            },
        };
        let text = (!parsed.content.is_empty()).then(|| json!({"content": parsed.content}));
        let calls = parsed.calls.iter().enumerate();
        let calls = calls.map(|(i, call)| json!({"tool_calls": [call.json(Some(i))]}));
        let deltas = text.into_iter().chain(calls);
        let deltas = deltas.map(|delta| Self::delta(index, delta, Value::Null, None));
        let finish = finish_of(done, !parsed.calls.is_empty());
        let end = Self::delta(index, json!({}), Value::Null, Some(finish));
        deltas.chain([end]).collect()
    }
}
