//! The method on plain slices, apart from ONNX Runtime: page summaries, selection, attention over pages, merging.
//!
//! Source: Choi, Kang, Jo, Kim, "Retrospective Sparse Attention for Efficient Long-Context Generation", arXiv
//! 2508.09001; page selection: Tang et al., "Quest", ICML 2024. docs/method.md states the arithmetic exactly.

pub mod attend;
pub mod element;
pub mod group_score;
pub mod merge;
pub mod oracle;
pub mod rope;
pub mod select;
#[expect(
    clippy::needless_range_loop,
    reason = "indices over small arrays that stay in registers"
)]
pub(crate) mod tile;
