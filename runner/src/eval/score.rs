//! Documents with known answers: files of JSON lines.

use std::{fs, path::Path};

use serde::{Deserialize, Serialize};

use super::{
    Error, Result,
    scorer::{Answers, Scorer},
};
use crate::decoder::require;

/// A document: one line of a JSON-lines file.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Document {
    /// Name of the document, for the reader.
    #[serde(default)]
    pub id: String,
    /// The prompt.
    pub prompt: String,
    /// What follows the prompt, and is decoded token by token under the policy instead of being prefilled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub question: Option<String>,
    /// The right answers, in order.
    #[serde(default)]
    pub answers: Vec<String>,
    /// A complete right output; it sets the output length.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    /// How answers are scored, where it is not as the command line says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scorer: Option<Scorer>,
    /// Maximum tokens to generate; it goes before the reference's length.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub n_predict: Option<usize>,
    /// The line of the file that it stands in, from 1; 0 for one that was made here.
    #[serde(skip)]
    pub line: usize,
}

impl Document {
    /// Prompt and question as one text.
    pub fn text(&self) -> String {
        self.prompt.clone() + self.question.as_deref().unwrap_or_default()
    }
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
        let parsed = serde_json::from_str::<Document>(line).map_err(|source| Error::NotADocument {
            path: path.to_owned(),
            line: i + 1,
            source,
        })?;
        require!(
            parsed.n_predict != Some(0),
            Error::NothingToPredict {
                path: path.to_owned(),
                line: i + 1,
            }
        );
        Ok(Document { line: i + 1, ..parsed })
    };
    let documents: Vec<Document> = lines.map(parse).collect::<Result<_>>()?;
    require!(!documents.is_empty(), Error::NoDocuments(path.to_owned()));
    Ok(documents)
}

/// The answers of each document, scored as the document says, else by `scorer`.
///
/// # Errors
/// When a document's answers cannot be scored; the message names its line.
pub fn prepare_answers(path: &Path, documents: &[Document], scorer: Scorer) -> Result<Vec<Answers>> {
    let prepare = |d: &Document| {
        Answers::new(d.scorer.unwrap_or(scorer), d.answers.clone()).map_err(|source| Error::Answers {
            path: path.to_owned(),
            line: d.line,
            source,
        })
    };
    documents.iter().map(prepare).collect()
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
        fs::write(
            &path,
            "{\"prompt\": \"a\"}\n{\"prompt\": \"a\", \"scorer\": \"guess\"}\n",
        )
        .unwrap();
        let error = read_documents(&path, 9).unwrap_err();
        assert!(format!("{error:#}").contains("line 2"), "{error}");
        let reason = std::error::Error::source(&error).unwrap().to_string();
        assert!(
            reason.contains("`guess`, expected one of `ledger`, `exact`"),
            "{reason}"
        );
        fs::write(&path, "{\"prompt\": \"a\", \"n_predict\": 0}\n").unwrap();
        assert!(
            read_documents(&path, 9)
                .unwrap_err()
                .to_string()
                .contains("line 1: n_predict")
        );
        fs::write(&path, "").unwrap();
        assert!(read_documents(&path, 9).is_err());
    }

    /// A line's own scorer goes before the command line's, and answers that it cannot take name the line.
    #[test]
    fn scorers_are_chosen_line_by_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.jsonl");
        let lines = [
            r#"{"prompt": "a", "answers": ["x"]}"#,
            "",
            r#"{"prompt": "a", "question": "b", "answers": ["("], "scorer": "regex"}"#,
        ];
        fs::write(&path, lines.join("\n")).unwrap();
        let documents = read_documents(&path, 9).unwrap();
        assert_eq!((documents[1].text().as_str(), documents[1].line), ("ab", 3));
        let first = prepare_answers(&path, &documents[..1], Scorer::Exact).unwrap();
        assert_eq!(first[0].scorer(), Scorer::Exact);
        let error = prepare_answers(&path, &documents, Scorer::Exact).unwrap_err();
        assert!(error.to_string().contains("d.jsonl line 3"), "{error}");
    }
}
