//! Names of the inputs that every language model has.

/// Inputs by which language models are called; runners and exporters agree on these names.
pub const INPUT_IDS: &str = "input_ids";
pub const INPUTS_EMBEDS: &str = "inputs_embeds";
pub const ATTENTION_MASK: &str = "attention_mask";
pub const POSITION_IDS: &str = "position_ids";
