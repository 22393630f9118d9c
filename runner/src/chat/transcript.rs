//! Messages, and conversations as files.

use std::{
    fs::File,
    io::{Read, Write},
    path::Path,
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::error::{Error, Result};

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Who sets the rules of the conversation.
    System,
    /// Who asks.
    User,
    /// Who answers: the model.
    Assistant,
}

/// What one of them said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// Who.
    pub role: Role,
    /// What.
    pub content: String,
}

impl Message {
    /// A message.
    pub fn new(role: Role, content: &str) -> Self {
        let content = content.to_owned();
        Self { role, content }
    }

    /// As a template takes it.
    pub(super) fn json(&self) -> Value {
        json!({"role": self.role, "content": self.content})
    }
}

/// What files of conversations say they are.
pub const FORMAT: &str = "retro-run chat 1";

/// The most bytes that are read of one: more than any context holds.
const MOST: u64 = 64 << 20;

#[derive(Serialize, Deserialize)]
struct Conversation {
    format: String,
    messages: Vec<Message>,
}

/// Writes messages to a temporary file and renames it, so that a failure leaves the old file. Only the user may read
/// it.
///
/// # Errors
/// When the file cannot be written.
pub fn write(path: &Path, messages: &[Message]) -> Result<()> {
    let failed = |source| Error::Write {
        path: path.to_owned(),
        source,
    };
    let conversation = Conversation {
        format: FORMAT.to_owned(),
        messages: messages.to_vec(),
    };
    let mut text = serde_json::to_vec_pretty(&conversation).map_err(|e| failed(e.into()))?;
    text.push(b'\n');
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty());
    let mut file = tempfile::NamedTempFile::new_in(folder.unwrap_or(Path::new("."))).map_err(failed)?;
    file.write_all(&text).map_err(failed)?;
    file.persist(path).map_err(|e| failed(e.error))?;
    Ok(())
}

/// Reads messages that [`write()`] wrote.
///
/// # Errors
/// When the file cannot be read, is no conversation, or its messages are none that a conversation can have.
pub fn read(path: &Path) -> Result<Vec<Message>> {
    let failed = |source| Error::Read {
        path: path.to_owned(),
        source,
    };
    let foreign = |reason: String| Error::Foreign {
        path: path.to_owned(),
        reason,
    };
    // Opening a pipe would wait for who writes it.
    if !path.metadata().map_err(failed)?.is_file() {
        return Err(foreign("it is no file".to_owned()));
    }
    let mut text = Vec::new();
    let file = File::open(path).map_err(failed)?;
    file.take(MOST + 1).read_to_end(&mut text).map_err(failed)?;
    if text.len() as u64 > MOST {
        return Err(foreign(format!("it is longer than {} MiB", MOST >> 20)));
    }
    let conversation: Conversation = serde_json::from_slice(&text).map_err(|e| foreign(e.to_string()))?;
    if conversation.format != FORMAT {
        return Err(foreign(format!(
            "its format is {:?}, not {FORMAT:?}",
            conversation.format
        )));
    }
    match fault(&conversation.messages) {
        Some(reason) => Err(foreign(reason)),
        None => Ok(conversation.messages),
    }
}

/// What messages have that no conversation has: after the system's, user and assistant take turns, and the assistant is
/// last.
fn fault(messages: &[Message]) -> Option<String> {
    let system = messages.first().is_some_and(|m| m.role == Role::System);
    let turns = messages.get(usize::from(system)..).unwrap_or(&[]);
    let expected = [Role::User, Role::Assistant].into_iter().cycle();
    let strays = turns.iter().zip(expected).position(|(m, role)| m.role != role);
    match strays {
        Some(at) => {
            let number = at + 1 + usize::from(system);
            Some(format!("message {number} is out of turn"))
        }
        None if turns.len() % 2 == 1 => Some("its last message has no answer".to_owned()),
        None => None,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn conversation() -> Vec<Message> {
        vec![
            Message::new(Role::System, "Be \"brief\"."),
            Message::new(Role::User, "Grüße\n🙂"),
            Message::new(Role::Assistant, ""),
        ]
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("conversation.json");
        for messages in [conversation(), conversation()[1..].to_vec(), Vec::new()] {
            write(&path, &messages).unwrap();
            assert_eq!(read(&path).unwrap(), messages);
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        let error = write(&dir.path().join("none/conversation.json"), &conversation()).unwrap_err();
        assert!(error.to_string().contains("none/conversation.json"), "{error}");
    }

    #[test]
    fn what_is_no_talk_is_refused_in_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("conversation.json");
        let user = r#"{"role": "user", "content": "a"}"#;
        let of = |messages: &str| format!(r#"{{"format": "{FORMAT}", "messages": [{messages}]}}"#);
        for (text, reason) in [
            (String::new(), "EOF"),
            ("[1, 2".to_owned(), "expected"),
            (r#"{"messages": []}"#.to_owned(), "format"),
            (r#"{"format": "other", "messages": []}"#.to_owned(), "\"other\""),
            (of(user), "no answer"),
            (of(&format!("{user}, {user}")), "message 2 is out of turn"),
            (of(r#"{"role": "tool", "content": "a"}"#), "tool"),
            (of(r#"{"role": "user", "content": 7}"#), "string"),
            (of(&"[".repeat(100_000)), "expected"),
        ] {
            fs::write(&path, text).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains("conversation.json") && error.contains(reason), "{error}");
            assert_eq!(error.lines().count(), 1);
        }
        assert!(read(dir.path()).unwrap_err().to_string().contains("no file"));
        assert!(read(&dir.path().join("none")).is_err());
    }
}
