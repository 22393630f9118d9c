/// An input of the model that no sample call can be made for.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum InputRefusal {
    /// The size of an embedding is neither declared nor told by the weights.
    #[error("inputs_embeds has no declared width, and nothing in the graph tells it")]
    EmbeddingWidth,
    /// The attention mask has another rank than `[B, T]`.
    #[error("the input attention_mask has {rank} dimensions, not 2 (batch, tokens): the caller makes the mask")]
    MaskRank {
        /// Its dimensions.
        rank: usize,
    },
}
