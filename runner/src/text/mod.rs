//! Text in and out: the tokenizer, text that grows token by token, and strings that end it.

mod detokenizer;
mod stop_filter;
mod tokenizer;
mod tokenizer_config;

pub use detokenizer::Detokenizer;
pub use stop_filter::StopFilter;
pub use tokenizer::ModelTokenizer;
