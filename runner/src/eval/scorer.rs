//! Scorers: which answers of a document an output has.

use clap::ValueEnum;
use regex::{Regex, RegexBuilder};
use serde::{Deserialize, Serialize};

/// Most bytes that a compiled pattern may take: far more than questions need, little enough for thousands of lines.
const PATTERN_BYTES: usize = 1 << 20;

/// How outputs are scored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scorer {
    /// The k-th answer is the word after the first "so value of #k".
    #[default]
    Ledger,
    /// The output is one of the answers. Spaces and line ends around it don't count.
    Exact,
    /// The output begins with one of the answers.
    Prefix,
    /// Every answer that stands in the output, in small letters or capitals, is a right one.
    Contains,
    /// Every answer is a pattern; those that match somewhere in the output are right ones.
    Regex,
}

/// Why answers cannot be scored.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum AnswerError {
    #[error("it has no answers, which its scorer needs: give \"answers\": [\"...\"]")]
    None,
    #[error("answer {0} is empty, so every output would have it")]
    Empty(usize),
    #[error("answer {number} is no pattern: {reason}")]
    Pattern { number: usize, reason: String },
}

/// A document's answers, ready to be looked for.
#[derive(Clone, Debug)]
pub struct Answers {
    scorer: Scorer,
    texts: Vec<String>,
    /// Compiled answers of [`Scorer::Regex`], empty for the others.
    patterns: Vec<Regex>,
}

impl Answers {
    /// Prepares `texts` for `scorer`.
    ///
    /// # Errors
    /// When there are none, one is empty, or one is no pattern. `ledger` takes any.
    pub fn new(scorer: Scorer, texts: Vec<String>) -> Result<Self, AnswerError> {
        let mut patterns = Vec::new();
        if scorer != Scorer::Ledger {
            if texts.is_empty() {
                return Err(AnswerError::None);
            }
            if let Some(empty) = texts.iter().position(|t| t.trim().is_empty()) {
                return Err(AnswerError::Empty(empty + 1));
            }
        }
        if scorer == Scorer::Regex {
            for (text, number) in texts.iter().zip(1..) {
                let built = RegexBuilder::new(text).size_limit(PATTERN_BYTES).build();
                patterns.push(built.map_err(|e| AnswerError::Pattern {
                    number,
                    reason: last_line(&e.to_string()),
                })?);
            }
        }
        Ok(Self {
            scorer,
            texts,
            patterns,
        })
    }

    /// The answers as the document has them.
    pub fn texts(&self) -> &[String] {
        &self.texts
    }

    /// How they are scored.
    pub fn scorer(&self) -> Scorer {
        self.scorer
    }

    /// Whether the output has each answer, in their order. `exact` and `prefix` take any of them, so that is one.
    pub fn judge(&self, output: &str) -> Vec<bool> {
        let any = |is: &dyn Fn(&str) -> bool| vec![self.texts.iter().any(|t| is(t.trim()))];
        match self.scorer {
            Scorer::Ledger => ledger(output, &self.texts),
            Scorer::Exact => any(&|answer| output.trim() == answer),
            Scorer::Prefix => any(&|answer| output.trim_start().starts_with(answer)),
            Scorer::Contains => {
                let output = output.to_lowercase();
                let has = |answer: &String| output.contains(&answer.trim().to_lowercase());
                self.texts.iter().map(has).collect()
            }
            Scorer::Regex => self.patterns.iter().map(|p| p.is_match(output)).collect(),
        }
    }
}

/// The reason at the end of a pattern's error, which begins with a drawing of several lines.
fn last_line(text: &str) -> String {
    let line = text.lines().last().unwrap_or(text).trim();
    line.strip_prefix("error: ").unwrap_or(line).to_owned()
}

fn ledger(output: &str, answers: &[String]) -> Vec<bool> {
    let words: Vec<&str> = output.split_whitespace().collect();
    let mut said: Vec<Option<&str>> = vec![None; answers.len()];
    for window in words.windows(5) {
        let &["so", "value", "of", label, value] = window else {
            continue;
        };
        let number = label.strip_prefix('#').and_then(|n| n.parse::<usize>().ok());
        if let Some(slot) = number.and_then(|k| said.get_mut(k.checked_sub(1)?)) {
            slot.get_or_insert(value);
        }
    }
    said.iter()
        .zip(answers)
        .map(|(said, answer)| *said == Some(answer.as_str()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(scorer: Scorer, texts: &[&str]) -> Answers {
        Answers::new(scorer, texts.iter().map(|&t| t.to_owned()).collect()).unwrap()
    }

    fn judge(output: &str) -> Vec<bool> {
        answers(Scorer::Ledger, &["Lyon", "9", "2"]).judge(output)
    }

    #[test]
    fn the_first_saying_counts() {
        assert_eq!(
            judge("answer #1 : x . so value of #1 Lyon . so value of #2 8 . so value of #2 9 ."),
            [true, false, false]
        );
        assert_eq!(judge("so value of #3 2 . so value of #2 9"), [false, true, true]);
        assert_eq!(
            judge("so value of #0 2 . so value of #4 9 . so value of #x 1 . so value of #1"),
            [false; 3]
        );
        assert_eq!(judge(""), [false; 3]);
    }

    #[test]
    fn one_of_the_answers_is_the_output_or_its_beginning() {
        let exact = answers(Scorer::Exact, &["Paris", "in Paris"]);
        for (output, right) in [
            (" Paris\n", true),
            ("in Paris", true),
            ("paris", false),
            ("Paris.", false),
            ("", false),
        ] {
            assert_eq!(exact.judge(output), [right], "{output:?}");
        }
        let prefix = answers(Scorer::Prefix, &["Paris", "the capital"]);
        for (output, right) in [
            (" Paris is", true),
            ("the capital", true),
            ("It is Paris", false),
            ("Par", false),
        ] {
            assert_eq!(prefix.judge(output), [right], "{output:?}");
        }
    }

    #[test]
    fn every_answer_counts_by_itself_where_several_can_be_in_an_output() {
        let contains = answers(Scorer::Contains, &["4711", "Äpfel ", "x y"]);
        assert_eq!(contains.judge("they are 47110 and äpfel, x  y"), [true, true, false]);
        let regex = answers(Scorer::Regex, &[r"\b42\b", "(?i)yes|no", "^a"]);
        assert_eq!(regex.judge(" 42, NO"), [true, true, false]);
        assert_eq!(regex.judge("a 421"), [false, false, true]);
    }

    #[test]
    fn answers_that_cannot_be_scored_say_why() {
        let error = |scorer, texts: &[&str]| {
            let texts = texts.iter().map(|&t| t.to_owned()).collect();
            Answers::new(scorer, texts).unwrap_err().to_string()
        };
        assert!(error(Scorer::Exact, &[]).contains("no answers"));
        assert!(error(Scorer::Contains, &["a", " "]).contains("answer 2 is empty"));
        let line = error(Scorer::Regex, &["a", "(b"]);
        assert!(
            line.contains("answer 2 is no pattern: unclosed group") && !line.contains('\n'),
            "{line}"
        );
        assert!(
            error(Scorer::Regex, &[r"(\w{300}){300}"]).contains("size limit"),
            "bounded"
        );
        assert!(answers(Scorer::Ledger, &[]).judge("x").is_empty());
    }
}
