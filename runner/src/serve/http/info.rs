//! What the server says of itself: `GET /v1/models`, `/health`, `/metrics`, `/props`.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State, rejection::PathRejection},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use super::{
    app::{App, Loaded},
    error::{ApiError, Result},
};

/// The media type of Prometheus' text format.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

fn model_of(loaded: &Loaded) -> Value {
    json!({
        "id": loaded.name,
        "object": "model",
        "created": loaded.created,
        "owned_by": "retro-run",
        "max_model_len": loaded.engine.context(),
    })
}

pub async fn models(State(app): State<Arc<App>>) -> Result<Json<Value>> {
    let loaded = app.loaded()?;
    Ok(Json(json!({"object": "list", "data": [model_of(&loaded)]})))
}

pub async fn model(
    State(app): State<Arc<App>>,
    name: std::result::Result<Path<String>, PathRejection>,
) -> Result<Json<Value>> {
    let loaded = app.loaded()?;
    let Path(name) = name.map_err(|e| ApiError::no_such_path(&format!("such model: {}", e.body_text())))?;
    if name != loaded.name {
        return Err(ApiError::no_such_path(&format!(
            "model {name}: this server has {}",
            loaded.name
        )));
    }
    Ok(Json(model_of(&loaded)))
}

pub async fn health(State(app): State<Arc<App>>) -> Result<Json<Value>> {
    if !app.loaded()?.engine.is_alive() {
        return Err(ApiError::internal("the scheduler has ended: start the server again"));
    }
    Ok(Json(json!({"status": "ok"})))
}

pub async fn metrics(State(app): State<Arc<App>>) -> Response {
    let headers = [(header::CONTENT_TYPE, OPEN_METRICS)];
    (StatusCode::OK, headers, app.metrics.text()).into_response()
}

/// The number as it was written: in decimals, not in what bits make of them.
fn decimal(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}

pub async fn props(State(app): State<Arc<App>>) -> Result<Json<Value>> {
    let loaded = app.loaded()?;
    let engine = &loaded.engine;
    let (options, sampling) = (engine.options(), loaded.sampling);
    Ok(Json(json!({
        "model_alias": loaded.name,
        "model_path": loaded.path,
        "total_slots": options.parallel,
        "default_generation_settings": {
            "n_ctx": engine.context(),
            "window": options.policy.window,
            "budget": engine.budget().map(|b| b.to_string()),
            "params": {
                "temperature": decimal(sampling.temperature),
                "top_k": sampling.top_k,
                "top_p": decimal(sampling.top_p),
                "min_p": decimal(sampling.min_p),
                "repeat_penalty": decimal(sampling.repeat_penalty),
            },
        },
        "chat_template": loaded.template.is_some(),
        "converted": engine.is_converted(),
        "window": {"max": engine.most_window()},
        "budget": engine.takes_budget(),
        "build_info": concat!("retro-run ", env!("CARGO_PKG_VERSION")),
    })))
}
