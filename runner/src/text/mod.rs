//! Text in and out: the tokenizer, text that grows token by token, and strings that end it.

mod tokenizer;

use anyhow::{Result, anyhow};
use tokenizers::Tokenizer;

use crate::{
    model_folder::ModelFolder,
    runtime::one_line,
    text::tokenizer::{BosEos, Loaded, load},
};

/// A folder's tokenizer and what it writes around a text.
pub struct ModelTokenizer {
    tokenizer: Tokenizer,
    /// Instead of what the tokenizer's post-processor adds.
    bos_eos: Option<BosEos>,
}

impl ModelTokenizer {
    /// Loads the tokenizer of a model folder.
    ///
    /// # Errors
    /// When there is none or it is damaged.
    pub fn open(folder: &ModelFolder) -> Result<Self> {
        let Loaded { tokenizer, bos_eos } = load(folder)?;
        Ok(Self { tokenizer, bos_eos })
    }

    /// The prompt's tokens, the special ones with them that transformers puts around a text.
    ///
    /// # Errors
    /// When the tokenizer fails or gives no token at all.
    pub fn encode(&self, prompt: &str) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode(prompt, self.bos_eos.is_none());
        let encoding = encoding.map_err(|e| anyhow!("the tokenizer refuses the prompt: {}", one_line(&e)))?;
        let BosEos { bos, eos } = self.bos_eos.unwrap_or_default();
        let own = encoding.get_ids().iter().copied();
        let ids: Vec<u32> = bos.into_iter().chain(own).chain(eos).collect();
        if ids.is_empty() {
            return Err(anyhow!("the prompt is empty"));
        }
        Ok(ids)
    }

    /// Text of some tokens, special tokens left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.tokenizer
            .decode(ids, true)
            .map_err(|e| anyhow!("the tokenizer cannot decode: {}", one_line(&e)))
    }

    /// Tokens that end a text: those of the model's configuration, else the tokenizer's.
    pub fn ends(&self, folder: &ModelFolder) -> Vec<u32> {
        if !folder.eos.is_empty() {
            return folder.eos.clone();
        }
        let token = folder.eos_token.as_deref();
        token.and_then(|token| self.id(token)).into_iter().collect()
    }

    /// The id of a token, by its text in the vocabulary.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// The text in the vocabulary of a token.
    pub fn token(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }
}

/// Text of a growing list of tokens. A character's bytes may be spread over tokens and a token's text may depend on the one
/// before it, so text comes out once it can no longer change.
#[derive(Default)]
pub struct Detokenizer {
    ids: Vec<u32>,
    /// Tokens from here on are decoded for context.
    context: usize,
    /// Tokens from here on have given no text yet.
    fresh: usize,
}

impl Detokenizer {
    /// Starts after a prompt, whose last tokens are context: the first generated word knows that it is not the first of all.
    pub fn after(prompt: &[u32]) -> Self {
        let tail = prompt.len().saturating_sub(6);
        let ids = prompt.get(tail..).unwrap_or(&[]).to_vec();
        let fresh = ids.len();
        Self { ids, context: 0, fresh }
    }

    /// Takes one token; returns the text that became certain, often empty.
    pub fn push(&mut self, text: &ModelTokenizer, id: u32) -> Result<String> {
        self.ids.push(id);
        self.settle(text, false)
    }

    /// The text still held back when nothing follows.
    pub fn finish(&mut self, text: &ModelTokenizer) -> Result<String> {
        self.settle(text, true)
    }

    fn settle(&mut self, text: &ModelTokenizer, all: bool) -> Result<String> {
        let before = text.decode(self.ids.get(self.context..self.fresh).unwrap_or(&[]))?;
        let now = text.decode(self.ids.get(self.context..).unwrap_or(&[]))?;
        // U+FFFD at the end: a character whose other bytes are still to come.
        if !all && now.ends_with('\u{fffd}') {
            return Ok(String::new());
        }
        let Some(new) = now.strip_prefix(&before).filter(|new| !new.is_empty()) else {
            return Ok(String::new());
        };
        let new = new.to_owned();
        self.context = self.fresh;
        self.fresh = self.ids.len();
        Ok(new)
    }
}

/// Passes text on until one of several strings appears in it, holding back what could be the beginning of one.
#[derive(Default)]
pub struct StopFilter {
    stops: Vec<String>,
    held: String,
    stopped: bool,
}

impl StopFilter {
    pub fn new(stops: &[String]) -> Self {
        let stops = stops.iter().filter(|s| !s.is_empty()).cloned().collect();
        Self {
            stops,
            ..Self::default()
        }
    }

    /// Takes new text; returns what may be shown. Nothing more comes out once [`Self::stopped`].
    pub fn push(&mut self, text: &str) -> String {
        if self.stopped {
            return String::new();
        }
        self.held.push_str(text);
        if let Some(at) = self.stops.iter().filter_map(|s| self.held.find(s.as_str())).min() {
            self.stopped = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let keep = self.stops.iter().map(|s| overlap(&self.held, s)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        std::mem::replace(&mut self.held, rest)
    }

    /// The held text, when the end came without a stop string.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Whether a stop string appeared.
    pub fn stopped(&self) -> bool {
        self.stopped
    }
}

/// Bytes at the end of `text` that are a beginning of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let lengths = stop.char_indices().map(|(at, _)| at).skip(1);
    lengths
        .filter(|&n| stop.get(..n).is_some_and(|head| text.ends_with(head)))
        .max()
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(json: &str) -> ModelTokenizer {
        ModelTokenizer {
            tokenizer: json.parse().unwrap(),
            bos_eos: None,
        }
    }

    /// Byte-level tokens: "é" is two of them.
    fn bytes() -> ModelTokenizer {
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

    fn words() -> ModelTokenizer {
        text(
            r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": {"so": 0, "value": 1, "of": 2}, "unk_token": "so"}}"#,
        )
    }

    #[test]
    fn a_character_in_two_tokens_comes_out_once_and_whole() {
        let t = bytes();
        let mut d = Detokenizer::default();
        let out: Vec<String> = [0, 1, 2, 3, 4].iter().map(|&id| d.push(&t, id).unwrap()).collect();
        assert_eq!(out, ["a", "", "é", " ", "b"]);
        assert_eq!(d.finish(&t).unwrap(), "");
    }

    #[test]
    fn half_a_character_at_the_end_is_replaced_not_lost() {
        let t = bytes();
        let mut d = Detokenizer::default();
        d.push(&t, 4).unwrap();
        assert_eq!(d.push(&t, 1).unwrap(), "");
        assert_eq!(d.finish(&t).unwrap(), "\u{fffd}");
    }

    #[test]
    fn words_are_joined_as_in_one_decode_and_special_tokens_are_silent() {
        let t = words();
        let mut d = Detokenizer::after(&t.encode("so value").unwrap());
        let out: String = [2, 0, 1].iter().map(|&id| d.push(&t, id).unwrap()).collect();
        assert_eq!(out, " of so value");
        let t = bytes();
        let mut d = Detokenizer::default();
        let out: Vec<String> = [0, 5, 4].iter().map(|&id| d.push(&t, id).unwrap()).collect();
        assert_eq!(out, ["a", "", "b"]);
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
    }

    #[test]
    fn stop_strings_are_found_across_pieces_and_false_starts_come_out() {
        let mut f = StopFilter::new(&["END".into(), "xyz".into()]);
        assert_eq!(f.push("hello E"), "hello ");
        assert_eq!(f.push("N"), "");
        assert_eq!(f.push("T E"), "ENT ");
        assert_eq!(f.push("ND tail"), "");
        assert!(f.stopped());
        assert_eq!(f.push("more"), "");
        let mut f = StopFilter::new(&["ab".into()]);
        assert_eq!(f.push("xa"), "x");
        assert_eq!(f.finish(), "a");
        assert!(!f.stopped());
    }

    #[test]
    fn the_earliest_of_several_stop_strings_wins_and_bytes_are_not_split() {
        let mut f = StopFilter::new(&["zz".into(), "b".into()]);
        assert_eq!(f.push("abzz"), "a");
        let mut f = StopFilter::new(&["éé".into(), String::new()]);
        assert_eq!(f.push("xé"), "x");
        assert_eq!(f.push("y"), "éy");
    }
}
