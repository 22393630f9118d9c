//! Comparing policies: free generation over documents with known answers, and teacher-forced fidelity to dense attention.

pub mod converted_models;
pub mod documents;
pub mod html;
pub mod journal;
pub mod perplexity;
pub mod policy;
pub mod score;
pub mod summary;
