//! The file of results: one JSON line each, appended as they come, so that an interrupted run can be resumed.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io::{BufRead, BufReader, Seek, Write},
    path::Path,
};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

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
        let shown = path.display();
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(path)
            .with_context(|| format!("cannot open {shown}"))?;
        let mut known = HashMap::new();
        let mut lines = BufReader::new(&file).lines();
        let mut good = 0u64;
        if let Some(first) = lines.next() {
            let first = first.with_context(|| format!("cannot read {shown}"))?;
            let found: Header = serde_json::from_str(&first)
                .ok()
                .with_context(|| format!("{shown} is no file of results: give --resume another name"))?;
            ensure!(
                found == *header,
                "{shown} holds results of another run (of {}, {}; asked for are {}, {}): give --resume another name",
                found.model,
                found.data,
                header.model,
                header.data
            );
            good += first.len() as u64 + 1;
            for line in lines {
                let line = line.with_context(|| format!("cannot read {shown}"))?;
                // A killed run may leave an incomplete last line.
                let Ok(JournalLine { policy, item, result }) = serde_json::from_str::<JournalLine<T>>(&line) else {
                    break;
                };
                good += line.len() as u64 + 1;
                known.insert((policy, item), result);
            }
            let length = file.metadata().map_or(good, |m| m.len());
            if good < length {
                file.set_len(good).with_context(|| format!("cannot shorten {shown}"))?;
            } else if good > length {
                // Only the last line's end is missing.
                file.write_all(b"\n").with_context(|| format!("cannot write {shown}"))?;
            }
            file.seek(std::io::SeekFrom::End(0))?;
        } else {
            write_line(&mut file, header).with_context(|| format!("cannot write {shown}"))?;
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
            write_line(file, &line).context("cannot write the file of results")?;
        }
        self.known.insert((policy, item), result);
        Ok(())
    }
}

fn write_line(file: &mut File, line: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_string(line)?;
    text.push('\n');
    file.write_all(text.as_bytes())?;
    Ok(())
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
