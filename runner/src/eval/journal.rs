//! The file of results: one JSON line each, appended as they come, so that an interrupted run can be resumed.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io::{self, BufRead, BufReader, Seek, Write},
    path::Path,
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{Error, Result};
use crate::decoder::require;

/// The first line of the file: what the results belong to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// The program's version.
    pub retro_run: String,
    /// The model: name and hash of its folder.
    pub model: String,
    /// The documents or texts, and options that change results.
    pub data: String,
}

#[derive(Serialize, Deserialize)]
struct JournalLine<T> {
    policy: String,
    item: usize,
    result: T,
}

/// Results by policy and item (document or text).
pub struct Journal<T> {
    known: HashMap<(String, usize), T>,
    file: Option<File>,
}

impl<T: Clone + Serialize + DeserializeOwned> Journal<T> {
    /// A journal without a file.
    pub fn in_memory() -> Self {
        Self {
            known: HashMap::new(),
            file: None,
        }
    }

    /// Opens the journal at `path`, with the results it has; creates it if there is none.
    ///
    /// # Errors
    /// When the file cannot be read or written, is no journal, or belongs to another model, other documents or options.
    pub fn open(path: &Path, header: &Header) -> Result<Self> {
        let owned = || path.to_owned();
        let unread = |source| Error::Read { path: owned(), source };
        let unwritten = |source| Error::WriteResults { path: owned(), source };
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(path)
            .map_err(|source| Error::OpenResults { path: owned(), source })?;
        let mut known = HashMap::new();
        let mut lines = BufReader::new(&file).lines();
        let mut good = 0u64;
        if let Some(first) = lines.next() {
            let first = first.map_err(unread)?;
            let found: Header = serde_json::from_str(&first).map_err(|_| Error::NoResults(owned()))?;
            let run = |header: &Header| format!("{}, {}", header.model, header.data);
            require!(
                found == *header,
                Error::OtherRun {
                    path: owned(),
                    found: run(&found),
                    asked: run(header),
                }
            );
            good += first.len() as u64 + 1;
            for line in lines {
                let line = line.map_err(unread)?;
                // A killed run may leave an incomplete last line.
                let Ok(JournalLine { policy, item, result }) = serde_json::from_str::<JournalLine<T>>(&line) else {
                    break;
                };
                good += line.len() as u64 + 1;
                known.insert((policy, item), result);
            }
            let length = file.metadata().map_or(good, |m| m.len());
            if good < length {
                let shortened = file.set_len(good);
                shortened.map_err(|source| Error::ShortenResults { path: owned(), source })?;
            } else if good > length {
                // Only the last line's end is missing.
                file.write_all(b"\n").map_err(unwritten)?;
            }
            file.seek(io::SeekFrom::End(0)).map_err(unwritten)?;
        } else {
            write_line(&mut file, header).map_err(unwritten)?;
        }
        Ok(Self {
            known,
            file: Some(file),
        })
    }

    /// The result of an item, if it is known.
    pub fn get(&self, policy: &str, item: usize) -> Option<&T> {
        self.known.get(&(policy.to_owned(), item))
    }

    /// Adds a result.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn put(&mut self, policy: &str, item: usize, result: T) -> Result<()> {
        let policy = policy.to_owned();
        if let Some(file) = &mut self.file {
            let line = JournalLine {
                policy: policy.clone(),
                item,
                result: result.clone(),
            };
            write_line(file, &line).map_err(Error::AddResult)?;
        }
        self.known.insert((policy, item), result);
        Ok(())
    }
}

fn write_line(file: &mut File, line: &impl Serialize) -> io::Result<()> {
    let mut text = serde_json::to_string(line)?;
    text.push('\n');
    file.write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(data: &str) -> Header {
        Header {
            retro_run: "1".into(),
            model: "m".into(),
            data: data.into(),
        }
    }

    #[test]
    fn results_survive_and_half_a_line_does_no_harm() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.jsonl");
        let mut journal = Journal::<f64>::open(&path, &header("d")).unwrap();
        journal.put("quest", 0, 1.5).unwrap();
        journal.put("quest", 1, 2.5).unwrap();
        drop(journal);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, &text[..text.len() - 6]).unwrap();
        let mut journal = Journal::<f64>::open(&path, &header("d")).unwrap();
        assert_eq!((journal.get("quest", 0), journal.get("quest", 1)), (Some(&1.5), None));
        journal.put("quest", 1, 3.5).unwrap();
        drop(journal);
        // A last line that lacks its end only.
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.trim_end()).unwrap();
        let mut journal = Journal::<f64>::open(&path, &header("d")).unwrap();
        assert_eq!(journal.get("quest", 1), Some(&3.5));
        journal.put("quest", 2, 4.5).unwrap();
        drop(journal);
        let journal = Journal::<f64>::open(&path, &header("d")).unwrap();
        assert_eq!(
            (journal.get("quest", 1), journal.get("quest", 2)),
            (Some(&3.5), Some(&4.5))
        );
    }

    #[test]
    fn results_of_something_else_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.jsonl");
        drop(Journal::<f64>::open(&path, &header("d")).unwrap());
        let error = |data: &str| Journal::<f64>::open(&path, &header(data)).err().unwrap().to_string();
        assert!(error("e").contains("another run"));
        std::fs::write(&path, "text\n").unwrap();
        assert!(error("d").contains("no file of results"));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "text\n", "nothing is lost");
    }
}
