//! Comparing attention policies: answers in free generation on documents, KL divergence from dense attention on texts.

pub mod converted_models;
pub mod documents;
mod error;
pub mod figure;
pub mod html;
pub mod journal;
pub mod perplexity;
pub mod policy;
pub mod score;
pub mod scorer;
pub mod summary;
pub mod tasks;

pub use error::{Error, Result};
