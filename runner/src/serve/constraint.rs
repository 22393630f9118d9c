//! Output that follows a JSON schema: which tokens may come next.

use std::{fmt, sync::Arc};

use llguidance::{
    Matcher, ParserFactory,
    api::TopLevelGrammar,
    toktrie::{ApproximateTokEnv, InferenceCapabilities, SimpleVob, TokEnv, TokRxInfo, TokTrie, TokenId},
};
use serde_json::{Value, json};

use crate::text::TokenBytes;

/// Marks a special token's name among the bytes of others.
const SPECIAL: u8 = 0xff;

/// The most bytes of a schema.
const MOST_SCHEMA: usize = 64 << 10;

/// Makes constraints for a vocabulary.
pub struct Grammars {
    factory: ParserFactory,
}

/// Which tokens may come next in one answer.
pub struct Constraint(Matcher);

impl fmt::Debug for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Constraint")
    }
}

impl Clone for Constraint {
    /// The copy shares nothing with its original: both go on in threads of their own.
    fn clone(&self) -> Self {
        Self(self.0.deep_clone())
    }
}

/// Why there is no constraint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// A text ends by no token.
    #[error("the model has no token that ends a text")]
    NoEnd,
    /// The library refuses the vocabulary.
    #[error("the vocabulary cannot be used: {0}")]
    Vocabulary(String),
    /// A schema that is too long.
    #[error("a schema has at most {MOST_SCHEMA} bytes")]
    TooLong,
    /// A schema that nothing follows, or that allows too much.
    #[error("no text follows the schema, or it is too large: {0}")]
    Unfollowable(String),
    /// A schema that cannot be followed.
    #[error("{0}")]
    Schema(String),
}

impl Grammars {
    /// For a vocabulary whose texts end with any of `ends`.
    ///
    /// # Errors
    /// When there is no such token, or the library refuses the vocabulary.
    pub fn new(tokens: &[TokenBytes], ends: &[u32]) -> Result<Self, GrammarError> {
        let words: Vec<Vec<u8>> = tokens
            .iter()
            .map(|token| match token.special {
                true => [&[SPECIAL][..], &token.bytes].concat(),
                false => token.bytes.clone(),
            })
            .collect();
        let ends: Vec<TokenId> = ends.iter().copied().filter(|&id| (id as usize) < words.len()).collect();
        let first = *ends.first().ok_or(GrammarError::NoEnd)?;
        let info = TokRxInfo::new(words.len() as u32, first);
        let trie = TokTrie::from(&info, &words).with_eos_tokens(&ends);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let factory = ParserFactory::new(
            &environment,
            InferenceCapabilities::default(),
            &llguidance::earley::SlicedBiasComputer::json_slices(),
        );
        let mut factory = factory.map_err(|e| GrammarError::Vocabulary(format!("{e:#}")))?;
        factory.quiet();
        factory.limits_mut().verbose_errors = false;
        Ok(Self { factory })
    }

    /// A constraint to one JSON object, whatever is in it.
    ///
    /// # Errors
    /// When the library fails.
    pub fn json_object(&self) -> Result<Constraint, GrammarError> {
        self.json_schema(&json!({"type": "object"}))
    }

    /// A constraint to JSON that a schema describes.
    ///
    /// # Errors
    /// When the schema is too long, is none, or uses what cannot be followed.
    pub fn json_schema(&self, schema: &Value) -> Result<Constraint, GrammarError> {
        if schema.to_string().len() > MOST_SCHEMA {
            return Err(GrammarError::TooLong);
        }
        let mut schema = schema.clone();
        // One space at most between values: a small model would fill an answer with them.
        if let Some(schema) = schema.as_object_mut() {
            let layout = json!({"whitespace_flexible": false, "item_separator": ", ", "key_separator": ": "});
            schema.insert("x-guidance".to_owned(), layout);
        }
        let parser = self.factory.create_parser(TopLevelGrammar::from_json_schema(schema));
        let refused = |e| GrammarError::Schema(one_line(&format!("{e:#}")));
        let matcher = Matcher::new(parser);
        match matcher.get_error() {
            Some(e) => Err(refused(e)),
            None => {
                let mut constraint = Constraint(matcher);
                // Some schemas are found wrong only by what they allow.
                constraint.allowed().map_err(GrammarError::Unfollowable)?;
                Ok(constraint)
            }
        }
    }
}

impl Constraint {
    /// The tokens that may come next.
    ///
    /// # Errors
    /// When the grammar has become too large.
    pub(super) fn allowed(&mut self) -> Result<SimpleVob, String> {
        let mask = self.0.compute_mask_or_eos();
        mask.map_err(|e| one_line(&format!("{e:#}")))
    }

    /// Notes the token that came.
    ///
    /// # Errors
    /// When it may not come.
    pub(super) fn take(&mut self, token: u32) -> Result<(), String> {
        let taken = self.0.consume_token(token);
        taken.map_err(|e| one_line(&format!("{e:#}")))
    }

    /// Whether nothing may follow.
    pub(super) fn is_complete(&self) -> bool {
        self.0.is_stopped()
    }
}

fn one_line(text: &str) -> String {
    // The library's mark for details that are left out.
    let text = text.replace("<non-verbose/>", "");
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A vocabulary of the printable characters, by their codes, and an end.
    fn characters() -> Vec<TokenBytes> {
        let token = |b: u8| TokenBytes {
            bytes: vec![b],
            special: false,
        };
        let end = TokenBytes {
            bytes: b"<end>".to_vec(),
            special: true,
        };
        (0..=127).map(token).chain([end]).collect()
    }

    const END: u32 = 128;

    /// The text that comes of always taking the first token of `wishes` that may come, or else the first that may.
    fn follow(mut constraint: Constraint, wishes: &[u8]) -> String {
        let mut text = String::new();
        for _ in 0..200 {
            let allowed = constraint.allowed().unwrap();
            let wish = wishes.iter().map(|&b| u32::from(b)).chain([END]).chain(32..127);
            let token = wish.into_iter().find(|&t| allowed.is_allowed(t)).unwrap();
            if token == END {
                return text;
            }
            constraint.take(token).unwrap();
            text.push(char::from(token as u8));
            if constraint.is_complete() {
                return text;
            }
        }
        panic!("{text}")
    }

    #[test]
    fn output_follows_the_schema_and_ends() {
        let grammars = Grammars::new(&characters(), &[END]).unwrap();
        let schema = json!({
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 3}, "age": {"type": "integer", "maximum": 99}},
            "required": ["name", "age"],
            "additionalProperties": false,
        });
        let text = follow(grammars.json_schema(&schema).unwrap(), b"ab7");
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["name"], "aaa", "{text}");
        assert!(value["age"].as_i64().unwrap() < 100, "{text}");
        let text = follow(grammars.json_object().unwrap(), b"}");
        assert_eq!(text, "{}");
        let mut constraint = grammars.json_object().unwrap();
        assert!(!constraint.allowed().unwrap().is_allowed(END));
        assert!(constraint.take(u32::from(b'[')).is_err());
    }

    #[test]
    fn what_cannot_be_followed_is_refused() {
        let grammars = Grammars::new(&characters(), &[END]).unwrap();
        assert!(matches!(Grammars::new(&characters(), &[999]), Err(GrammarError::NoEnd)));
        let refused = |schema: Value| grammars.json_schema(&schema).unwrap_err();
        assert!(matches!(refused(json!({"type": "nothing"})), GrammarError::Schema(_)));
        let circle = json!({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"});
        for schema in [json!({"$ref": "#"}), circle] {
            assert!(matches!(refused(schema), GrammarError::Unfollowable(_)));
        }
        assert_eq!(refused(json!({"const": "x".repeat(70_000)})), GrammarError::TooLong);
        // A pattern whose automaton is huge costs no more than its limits allow.
        let huge = json!({"type": "string", "pattern": "^(a|b|c)*a(a|b|c){1,4000}(x{1,999}y){1,999}$"});
        let started = std::time::Instant::now();
        let mut constraint = grammars.json_schema(&huge).unwrap();
        constraint.take(u32::from(b'"')).unwrap();
        for _ in 0..20 {
            if constraint.allowed().is_err() || constraint.take(u32::from(b'a')).is_err() {
                break;
            }
        }
        assert!(started.elapsed().as_secs() < 20);
    }
}
