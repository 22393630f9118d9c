//! The server's HTTP: OpenAI's API, and what the server says of itself.
//!
//! - `bodies.rs` reads bodies, `fields.rs` takes one apart, `error.rs` says which field is wrong
//! - `generation.rs` is what chats and completions have in common, `answer.rs` how answers become responses and streams
//! - `tools.rs` is the form that an answer must have, `tool_calls.rs` the calls in it
//! - `chat.rs` with `messages.rs`, `completions.rs`, `text.rs`, `info.rs`, `page.rs` are the endpoints
//! - `guard.rs` is what every request passes, `connections.rs` how long one may last,
//!   `server.rs` the server around all of them

mod answer;
mod app;
mod bodies;
mod chat;
mod completions;
mod connections;
mod error;
mod fields;
mod generation;
mod guard;
mod info;
mod messages;
mod page;
mod server;
mod text;
mod tool_calls;
mod tools;

pub use app::{Loaded, Settings, now};
pub use server::{Server, ServerError};
