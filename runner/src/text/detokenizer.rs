//! Streaming detokenizer.

use crate::text::{error::Result, tokenizer::ModelTokenizer};

/// Decodes token by token. The bytes of a character may be spread over several tokens, and a token's text may depend on
/// the one before it, so text comes out once it can no longer change.
#[derive(Default)]
pub struct Detokenizer {
    ids: Vec<u32>,
    /// Tokens from here on are decoded for context.
    context: usize,
    /// Text of tokens from here on has not come out yet.
    fresh: usize,
}

impl Detokenizer {
    /// Starts after a prompt, whose last tokens are context: tokenizers decode the first word of a text differently.
    pub fn after(prompt: &[u32]) -> Self {
        let tail = prompt.len().saturating_sub(6);
        let ids = prompt.get(tail..).unwrap_or(&[]).to_vec();
        let fresh = ids.len();
        Self { ids, context: 0, fresh }
    }

    /// Adds a token; returns the text that is now final, often empty.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn push(&mut self, text: &ModelTokenizer, id: u32) -> Result<String> {
        self.ids.push(id);
        self.settle(text, false)
    }

    /// The text still held back, at the end.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn finish(&mut self, text: &ModelTokenizer) -> Result<String> {
        self.settle(text, true)
    }

    fn settle(&mut self, text: &ModelTokenizer, all: bool) -> Result<String> {
        let before = text.decode(self.ids.get(self.context..self.fresh).unwrap_or(&[]))?;
        let now = text.decode(self.ids.get(self.context..).unwrap_or(&[]))?;
        // U+FFFD at the end: an incomplete character.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tokenizer::tests::{bytes, words};

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
}
