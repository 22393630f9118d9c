//! `POST /tokenize` and `/detokenize`, as llama-server has them.

use std::sync::Arc;

use axum::{Json, body::Body, extract::State, http::Request};
use serde_json::{Value, json};

use super::{
    app::App,
    error::{ApiError, Result},
    fields::Fields,
};

pub async fn tokenize(State(app): State<Arc<App>>, request: Request<Body>) -> Result<Json<Value>> {
    let loaded = app.loaded()?;
    let take = move |mut fields: Fields| {
        let content: String = fields.demand("content")?;
        let special = fields.take("add_special")?.unwrap_or(false);
        let pieces = fields.take("with_pieces")?.unwrap_or(false);
        fields.only("parse_special", &[json!(true)])?;
        fields.finish()?;
        loaded.fits("content", &content)?;
        if content.is_empty() && !special {
            return Ok(Json(json!({"tokens": []})));
        }
        let tokenizer = loaded.engine.tokenizer();
        let tokens = if special {
            tokenizer.encode(&content)
        } else {
            tokenizer.encode_as_is(&content)
        };
        let tokens = tokens.map_err(|e| ApiError::field("content", e))?;
        if !pieces {
            return Ok(Json(json!({"tokens": tokens})));
        }
        // What is no text of its own, such as a part of a letter, is told as bytes.
        let known = loaded.token_bytes.as_deref().unwrap_or_default();
        let piece = |id: u32| match known.get(id as usize) {
            Some(token) if str::from_utf8(&token.bytes).is_err() => json!(token.bytes),
            _ => json!(tokenizer.decode(&[id]).unwrap_or_default()),
        };
        let tokens = tokens.into_iter().map(|id| json!({"id": id, "piece": piece(id)}));
        let tokens: Vec<Value> = tokens.collect();
        Ok(Json(json!({"tokens": tokens})))
    };
    app.take(request, take).await
}

pub async fn detokenize(State(app): State<Arc<App>>, request: Request<Body>) -> Result<Json<Value>> {
    let loaded = app.loaded()?;
    let take = move |mut fields: Fields| {
        let tokens: Vec<u32> = fields.demand("tokens")?;
        fields.finish()?;
        let text = loaded.engine.tokenizer().decode(&tokens);
        let content = text.map_err(|e| ApiError::field("tokens", e))?;
        Ok(Json(json!({"content": content})))
    };
    app.take(request, take).await
}
