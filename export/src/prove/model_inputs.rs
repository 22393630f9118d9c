//! Names of the inputs by which language models are called. Runners and exporters agree on them.

/// Token ids, `[B, S]` of int64.
pub const INPUT_IDS: &str = "input_ids";
/// Embeddings of tokens, `[B, S, hidden size]`.
pub const INPUTS_EMBEDS: &str = "inputs_embeds";
/// 1 for a token, 0 for padding: `[B, past + S]`.
pub const ATTENTION_MASK: &str = "attention_mask";
/// Positions of the tokens fed, `[B, S]`.
pub const POSITION_IDS: &str = "position_ids";
