//! The bytes that each token of a vocabulary stands for.

use std::collections::HashMap;

use serde_json::Value;

use crate::text::tokenizer::ModelTokenizer;

/// A token's bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenBytes {
    /// What it adds to a text; of a special token its name. Empty for numbers without a token.
    pub bytes: Vec<u8>,
    /// Its name is no text.
    pub special: bool,
}

/// How a vocabulary writes bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spelling {
    /// A printable character stands for each byte (GPT-2).
    ByteLevel,
    /// Text, with U+2581 for a space and `<0x0A>` for a byte (SentencePiece).
    Metaspace,
}

/// The bytes of all tokens, by their numbers. `None` for a vocabulary whose tokens are words, not bytes: what a token
/// adds depends on those around it there.
pub fn token_bytes(tokenizer: &ModelTokenizer) -> Option<Vec<TokenBytes>> {
    let inner = tokenizer.inner();
    let spelling = spelling(&serde_json::to_value(inner.get_decoder()?).ok()?)?;
    let bytes = byte_characters();
    let added = inner.get_added_tokens_decoder();
    let token = |id: u32| {
        let Some(text) = inner.id_to_token(id) else {
            return TokenBytes::default();
        };
        if let Some(token) = added.get(&id) {
            return TokenBytes {
                bytes: text.into_bytes(),
                special: token.special,
            };
        }
        let bytes = match spelling {
            Spelling::ByteLevel => text.chars().filter_map(|c| bytes.get(&c).copied()).collect(),
            Spelling::Metaspace => match byte(&text) {
                Some(byte) => vec![byte],
                None => text.replace('\u{2581}', " ").into_bytes(),
            },
        };
        TokenBytes { bytes, special: false }
    };
    let size = u32::try_from(tokenizer.size()).ok()?;
    Some((0..size).map(token).collect())
}

/// How a decoder, as tokenizer.json has it, spells bytes.
fn spelling(decoder: &Value) -> Option<Spelling> {
    let kind = decoder.get("type").and_then(Value::as_str);
    match kind {
        Some("ByteLevel") => Some(Spelling::ByteLevel),
        Some("Metaspace" | "ByteFallback") => Some(Spelling::Metaspace),
        Some("Sequence") => {
            let steps = decoder.get("decoders").and_then(Value::as_array)?;
            steps.iter().find_map(spelling)
        }
        _ => None,
    }
}

/// The byte of a token such as `<0x0A>`.
fn byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2)
        .then(|| u8::from_str_radix(digits, 16).ok())
        .flatten()
}

/// The character of each byte in byte-level vocabularies: its own if it is printable, else the next free one.
fn byte_characters() -> HashMap<char, u8> {
    let mut free = 256u32;
    let character = |byte: u8| {
        let own = matches!(byte, 33..=126 | 161..=172 | 174..=255);
        let code = if own {
            u32::from(byte)
        } else {
            free += 1;
            free - 1
        };
        (char::from_u32(code).unwrap_or_default(), byte)
    };
    (0..=255).map(character).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::text::tokenizer::tests::{bytes, words};

    #[test]
    fn byte_level_tokens_are_their_bytes() {
        let found = token_bytes(&bytes()).unwrap();
        let text = |i: usize| found[i].bytes.as_slice();
        assert_eq!(
            (text(0), text(1), text(2), text(3)),
            (&b"a"[..], &[0xc3][..], &[0xa9][..], &b" "[..])
        );
        assert!(found[5].special && !found[4].special);
        assert_eq!(token_bytes(&words()), None);
    }

    #[test]
    fn spellings_are_told_by_the_decoder() {
        let sequence = json!({"type": "Sequence", "decoders": [{"type": "Replace"}, {"type": "ByteFallback"}]});
        assert_eq!(spelling(&sequence), Some(Spelling::Metaspace));
        assert_eq!(spelling(&json!({"type": "WordPiece"})), None);
        assert_eq!((byte("<0x0A>"), byte("<0x>"), byte("0x0A")), (Some(10), None, None));
        let all: std::collections::HashSet<u8> = byte_characters().into_values().collect();
        assert_eq!(all.len(), 256);
    }
}
