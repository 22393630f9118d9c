/// An input of the model that no sample call can be made for.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum InputRefusal {
    #[error("inputs_embeds has no declared width, and nothing in the graph tells it")]
    EmbeddingWidth,
    #[error("the input attention_mask has {rank} dimensions, not 2 (batch, tokens): the caller makes the mask")]
    MaskRank { rank: usize },
}
