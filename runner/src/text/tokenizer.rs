//! Text to token ids and back.

use tokenizers::Tokenizer;

use crate::{
    model_folder::ModelFolder,
    runtime::one_line,
    text::{
        error::{Error, Result},
        tokenizer_config::{BosEos, Loaded, load},
    },
};

/// A model's tokenizer, with the BOS and EOS tokens it adds.
pub struct ModelTokenizer {
    tokenizer: Tokenizer,
    /// Replaces the tokens of the post-processor.
    bos_eos: Option<BosEos>,
}

impl ModelTokenizer {
    /// Loads the tokenizer of a model folder.
    ///
    /// # Errors
    /// When there is no tokenizer or it cannot be read.
    pub fn open(folder: &ModelFolder) -> Result<Self> {
        let Loaded { tokenizer, bos_eos } = load(folder)?;
        Ok(Self { tokenizer, bos_eos })
    }

    /// Token ids of a prompt, with the special tokens that transformers adds.
    ///
    /// # Errors
    /// When the tokenizer fails or there is no token.
    pub fn encode(&self, prompt: &str) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode(prompt, self.bos_eos.is_none());
        let encoding = encoding.map_err(|e| Error::Encode(one_line(&e)))?;
        let BosEos { bos, eos } = self.bos_eos.unwrap_or_default();
        let own = encoding.get_ids().iter().copied();
        let ids: Vec<u32> = bos.into_iter().chain(own).chain(eos).collect();
        if ids.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        Ok(ids)
    }

    /// Token ids of a text that has its special tokens in it, as a rendered chat template does: none are added.
    ///
    /// # Errors
    /// When the tokenizer fails or there is no token.
    pub fn encode_as_is(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode(text, false);
        let encoding = encoding.map_err(|e| Error::Encode(one_line(&e)))?;
        match encoding.get_ids() {
            [] => Err(Error::EmptyPrompt),
            ids => Ok(ids.to_vec()),
        }
    }

    /// Token ids of a prompt and of what follows it, together those of both as one text: a token that reaches over the
    /// border belongs to what follows.
    ///
    /// # Errors
    /// When the tokenizer fails or there is no token.
    pub fn encode_after(&self, prompt: &str, rest: &str) -> Result<(Vec<u32>, Vec<u32>)> {
        let before = self.encode(prompt)?;
        let mut whole = self.encode(&(prompt.to_owned() + rest))?;
        let common = whole.iter().zip(&before).take_while(|(a, b)| a == b).count();
        let rest = whole.split_off(common);
        Ok((whole, rest))
    }

    /// Text of token ids, without special tokens.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.tokenizer
            .decode(ids, true)
            .map_err(|e| Error::Decode(one_line(&e)))
    }

    /// End-of-text tokens: of the model's configuration, else the tokenizer's.
    pub fn ends(&self, folder: &ModelFolder) -> Vec<u32> {
        if !folder.eos.is_empty() {
            return folder.eos.clone();
        }
        let token = folder.eos_token.as_deref();
        token.and_then(|token| self.id(token)).into_iter().collect()
    }

    /// Numbers of tokens: all are less.
    pub fn size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    pub(super) fn inner(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The id of a token, by its text in the vocabulary.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// Whether a token is one that no text of a user is made of, such as the end of a turn.
    pub fn is_special(&self, id: u32) -> bool {
        let added = self.tokenizer.get_added_tokens_decoder();
        added.get(&id).is_some_and(|token| token.special)
    }

    /// The token's text in the vocabulary.
    pub fn token(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn text(json: &str) -> ModelTokenizer {
        ModelTokenizer {
            tokenizer: json.parse().unwrap(),
            bos_eos: None,
        }
    }

    /// Byte-level tokens: "é" is two of them.
    pub fn bytes() -> ModelTokenizer {
        text(
            r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [
            {"id": 5, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
            "normalizer": null,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
            "post_processor": null,
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "vocab": {"a": 0, "Ã": 1, "©": 2, "Ġ": 3, "b": 4}, "merges": []}}"#,
        )
    }

    pub fn words() -> ModelTokenizer {
        text(
            r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": {"so": 0, "value": 1, "of": 2}, "unk_token": "so"}}"#,
        )
    }

    #[test]
    fn two_parts_are_the_tokens_of_the_whole() {
        let mut t = bytes();
        assert_eq!(t.encode_after("a", "b a").unwrap(), (vec![0], vec![4, 3, 0]));
        assert_eq!(t.encode_after("ab", "").unwrap(), (vec![0, 4], vec![]));
        // Tokens at the end of a text stand behind both.
        t.bos_eos = Some(BosEos {
            bos: Some(5),
            eos: Some(3),
        });
        assert_eq!(t.encode_after("a", "b").unwrap(), (vec![5, 0], vec![4, 3]));
        // A token over the border: "a" and "b" are one where they meet.
        let merging = text(
            r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": null, "post_processor": null, "decoder": null,
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}}"#,
        );
        assert_eq!(merging.encode_after("ba", "ba").unwrap(), (vec![1], vec![2, 0]));
    }

    /// As transformers does it: what is asked for is added, whatever the prompt begins with.
    #[test]
    fn tokens_around_a_text_are_added() {
        let mut t = bytes();
        assert_eq!(t.encode("ab").unwrap(), [0, 4]);
        assert!(t.encode("").is_err());
        t.bos_eos = Some(BosEos {
            bos: Some(5),
            eos: None,
        });
        assert_eq!(t.encode("ab").unwrap(), [5, 0, 4]);
        assert_eq!(t.encode("<s>ab").unwrap(), [5, 5, 0, 4]);
        assert_eq!(t.encode("").unwrap(), [5]);
        assert_eq!(t.encode_as_is("<s>ab").unwrap(), [5, 0, 4]);
        assert!(t.encode_as_is("").is_err());
        assert!(t.is_special(5) && !t.is_special(0));
    }
}
