//! The tokenizer, chat templates, the streaming detokenizer, and stop strings.

pub mod chat_template;
mod detokenizer;
mod error;
mod stop_filter;
mod token_bytes;
mod tokenizer;
mod tokenizer_config;

pub use detokenizer::Detokenizer;
pub use error::{Error, Result};
pub use stop_filter::StopFilter;
pub use token_bytes::{TokenBytes, token_bytes};
pub use tokenizer::ModelTokenizer;
