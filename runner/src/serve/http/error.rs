//! Errors in OpenAI's form: what is wrong, and in which field.

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use crate::serve::request::{Failure, Refusal};

/// The most characters of a message.
const LONGEST: usize = 600;

/// The result of an endpoint.
pub type Result<T, E = ApiError> = std::result::Result<T, E>;

/// An error as clients get it.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiError {
    pub status: StatusCode,
    pub message: String,
    /// The field that is wrong.
    pub param: Option<String>,
    /// What programs tell it by.
    pub code: Option<&'static str>,
    /// Seconds after which to try again.
    retry_after: Option<u32>,
}

impl ApiError {
    fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self {
            status,
            message: shortened(message.into()),
            param: None,
            code: None,
            retry_after: None,
        }
    }

    /// A request that cannot be understood.
    pub fn request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// A field that is wrong.
    pub fn field(name: &str, message: impl std::fmt::Display) -> Self {
        Self {
            param: Some(shortened(name.to_owned())),
            ..Self::request(format!("{name}: {message}"))
        }
    }

    /// A prompt that leaves no room for an answer.
    pub fn too_long(param: &str, tokens: usize, context: usize) -> Self {
        Self {
            code: Some("context_length_exceeded"),
            ..Self::field(
                param,
                format!("{tokens} tokens leave no room for an answer in a context of {context}: shorten it"),
            )
        }
    }

    pub fn body_too_large(most: usize) -> Self {
        Self::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("the body is longer than {most} bytes (--max-body)"),
        )
    }

    /// A text of more bytes than the context's tokens have.
    pub fn too_many_bytes(param: &str, bytes: usize, context: usize) -> Self {
        Self {
            code: Some("context_length_exceeded"),
            ..Self::field(
                param,
                format!("{bytes} bytes are more than a context of {context} tokens can hold: shorten it"),
            )
        }
    }

    pub fn broken_body() -> Self {
        Self::request("the body does not arrive as it should: it is cut off, or its chunks are none")
    }

    /// Other requests' bodies fill the memory that there is for them.
    pub fn no_room() -> Self {
        Self {
            retry_after: Some(1),
            ..Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "too many long bodies are being read: try again later",
            )
        }
    }

    pub fn slow_body() -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "the body did not arrive in time")
    }

    pub fn not_json() -> Self {
        Self::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "the body must be JSON: send Content-Type: application/json",
        )
    }

    pub fn key() -> Self {
        Self {
            code: Some("invalid_api_key"),
            ..Self::new(
                StatusCode::UNAUTHORIZED,
                "the API key is missing or wrong: send Authorization: Bearer KEY",
            )
        }
    }

    pub fn foreign_host() -> Self {
        Self::new(
            StatusCode::FORBIDDEN,
            "this server answers to localhost and loopback addresses alone: give it --api-key, or another --host, to be \
             reached by other names",
        )
    }

    pub fn no_such_path(path: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, format!("there is no {path}"))
    }

    pub fn wrong_method() -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "this path takes another method")
    }

    pub fn loading() -> Self {
        Self {
            retry_after: Some(1),
            ..Self::new(StatusCode::SERVICE_UNAVAILABLE, "the model is being loaded")
        }
    }

    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    fn kind(&self) -> &'static str {
        match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            StatusCode::SERVICE_UNAVAILABLE => "unavailable_error",
            StatusCode::GATEWAY_TIMEOUT => "timeout_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// The body.
    pub fn json(&self) -> Value {
        json!({"error": {
            "message": self.message,
            "type": self.kind(),
            "param": self.param,
            "code": self.code,
        }})
    }
}

/// A message may quote what a client sent: the beginning tells it.
fn shortened(mut message: String) -> String {
    if let Some((end, _)) = message.char_indices().nth(LONGEST) {
        message.truncate(end);
        message.push('…');
    }
    message
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        let (status, code) = match refusal {
            Refusal::Full { .. } => (StatusCode::TOO_MANY_REQUESTS, Some("rate_limit_exceeded")),
            Refusal::Stopping => (StatusCode::SERVICE_UNAVAILABLE, None),
        };
        Self {
            code,
            retry_after: Some(1),
            ..Self::new(status, refusal.to_string())
        }
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        let status = match failure {
            Failure::Deadline => StatusCode::GATEWAY_TIMEOUT,
            Failure::Constraint(_) => StatusCode::BAD_REQUEST,
            Failure::Model(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::new(status, failure.to_string())
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.json())).into_response();
        if let Some(seconds) = self.retry_after {
            let headers = response.headers_mut();
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_quote_the_beginning_of_what_is_long() {
        let error = ApiError::field(&"ß".repeat(1 << 20), "it is unknown");
        assert_eq!(error.message.chars().count(), LONGEST + 1);
        assert_eq!(error.param.unwrap().chars().count(), LONGEST + 1);
        assert_eq!(ApiError::field("stop", "it is wrong").message, "stop: it is wrong");
    }
}
