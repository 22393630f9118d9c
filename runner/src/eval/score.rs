//! Documents with known answers, and scoring.

use std::{fs, path::Path};

use clap::ValueEnum;
use serde::Deserialize;

use super::{Error, Result};
use crate::decoder::require;

/// A document: one line of a JSON-lines file.
#[derive(Clone, Debug, Deserialize)]
pub struct Document {
    /// Name of the document, for the reader.
    #[serde(default)]
    pub id: String,
    /// The prompt.
    pub prompt: String,
    /// The right answers, in order.
    #[serde(default)]
    pub answers: Vec<String>,
    /// A complete right output; it sets the output length.
    #[serde(default)]
    pub reference: Option<String>,
}

/// Reads the documents of a JSON-lines file, at most `limit`.
///
/// # Errors
/// When the file cannot be read, a line is no document, or there is none.
pub fn read_documents(path: &Path, limit: usize) -> Result<Vec<Document>> {
    let text = fs::read_to_string(path).map_err(|source| Error::Read {
        path: path.to_owned(),
        source,
    })?;
    let lines = text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
        .take(limit);
    let parse = |(i, line): (usize, &str)| {
        serde_json::from_str(line).map_err(|source| Error::NotADocument {
            path: path.to_owned(),
            line: i + 1,
            source,
        })
    };
    let documents: Vec<Document> = lines.map(parse).collect::<Result<_>>()?;
    require!(!documents.is_empty(), Error::NoDocuments(path.to_owned()));
    Ok(documents)
}

/// How answers are scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Scorer {
    /// The k-th answer is the word after the first "so value of #k".
    Ledger,
}

impl Scorer {
    /// For each of `answers`, whether the output has it.
    pub fn judge(self, output: &str, answers: &[String]) -> Vec<bool> {
        match self {
            Self::Ledger => ledger(output, answers),
        }
    }
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

/// Mean and standard error of one number per document; the error of fewer than two is NaN.
pub fn mean_and_error(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n.max(1.0);
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    let error = if values.len() > 1 {
        (squares / (n - 1.0)).sqrt() / n.sqrt()
    } else {
        f64::NAN
    };
    (mean, error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(output: &str) -> Vec<bool> {
        Scorer::Ledger.judge(output, &["Lyon".into(), "9".into(), "2".into()])
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
    fn errors_are_over_documents() {
        let (mean, error) = mean_and_error(&[0.0, 1.0, 0.5, 0.5]);
        assert_eq!(mean, 0.5);
        assert!((error - (0.5f64 / 3.0).sqrt() / 2.0).abs() < 1e-12);
        assert!(mean_and_error(&[1.0]).1.is_nan());
    }

    #[test]
    fn bad_lines_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.jsonl");
        fs::write(&path, "{\"prompt\": \"a\"}\n\n{\"x\": 1}\n").unwrap();
        assert_eq!(read_documents(&path, 1).unwrap()[0].prompt, "a");
        assert!(format!("{:#}", read_documents(&path, 9).unwrap_err()).contains("line 3"));
        fs::write(&path, "").unwrap();
        assert!(read_documents(&path, 9).is_err());
    }
}
