//! What a line that a user types means.

use std::path::PathBuf;

/// A line of a conversation.
#[derive(Debug, PartialEq, Eq)]
pub enum Line {
    /// Nothing but blanks.
    Blank,
    /// Something to say to the model.
    Say(String),
    /// A command to the program.
    Do(Command),
}

/// What begins with a slash.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    Help,
    Exit,
    Clear,
    /// Sets the system prompt; `None` shows it.
    System(Option<String>),
    Save(PathBuf),
    Load(PathBuf),
    Stats,
}

/// The commands' names.
pub const NAMES: [&str; 7] = ["/help", "/exit", "/clear", "/system", "/save", "/load", "/stats"];

/// What /help prints.
pub const HELP: [&str; 11] = [
    "/help         this list",
    "/exit         ends the conversation, as Ctrl-D does",
    "/clear        begins anew; the system prompt stays",
    "/system TEXT  sets the system prompt; without TEXT shows it",
    "/save FILE    writes the conversation as JSON",
    "/load FILE    goes on with a conversation that /save wrote",
    "/stats        what the last answer read and took, and the context in use",
    "//TEXT        says TEXT with a slash before it",
    "Ctrl-C        stops an answer and keeps what came of it",
    "Alt-Enter     begins another line, as a \\ at the end of one does",
    "Up, Ctrl-R    earlier lines",
];

/// Reads a line.
///
/// # Errors
/// One line for the user, where a command is unknown or lacks its file.
pub fn parse(line: &str) -> Result<Line, String> {
    let text = line.trim();
    if text.is_empty() {
        return Ok(Line::Blank);
    }
    if !text.starts_with('/') {
        return Ok(Line::Say(text.to_owned()));
    }
    if let Some(rest) = text.strip_prefix("//") {
        return Ok(Line::Say(format!("/{rest}")));
    }
    let (name, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    let rest = rest.trim();
    let file = || match rest {
        "" => Err(format!("{name}: name a file")),
        path => Ok(at_home(path)),
    };
    let plain = |command: Command| match rest {
        "" => Ok(command),
        _ => Err(format!("{name} takes nothing after it")),
    };
    let command = match name {
        "/help" => plain(Command::Help)?,
        "/exit" => plain(Command::Exit)?,
        "/clear" => plain(Command::Clear)?,
        "/stats" => plain(Command::Stats)?,
        "/system" => Command::System((!rest.is_empty()).then(|| rest.to_owned())),
        "/save" => Command::Save(file()?),
        "/load" => Command::Load(file()?),
        _ => {
            return Err(format!(
                "there is no command {name}: /help lists them, and //TEXT says a text that begins with a slash"
            ));
        }
    };
    Ok(Line::Do(command))
}

/// A path as a shell would read it: `~/` is the user's folder.
fn at_home(path: &str) -> PathBuf {
    let home = std::env::var_os("HOME").map(PathBuf::from);
    match (path.strip_prefix("~/"), home) {
        (Some(rest), Some(home)) => home.join(rest),
        _ => PathBuf::from(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_texts_or_commands() {
        let say = |text: &str| Ok(Line::Say(text.to_owned()));
        let command = |command| Ok(Line::Do(command));
        assert_eq!(parse(" \t"), Ok(Line::Blank));
        assert_eq!(parse(" what is 1/2?\n"), say("what is 1/2?"));
        assert_eq!(parse("two\nlines"), say("two\nlines"));
        assert_eq!(parse("//etc is what?"), say("/etc is what?"));
        assert_eq!(parse("/stats "), command(Command::Stats));
        assert_eq!(parse("/system"), command(Command::System(None)));
        assert_eq!(
            parse("/system  Be brief. "),
            command(Command::System(Some("Be brief.".to_owned())))
        );
        assert_eq!(
            parse("/save my conversation.json"),
            command(Command::Save("my conversation.json".into()))
        );
    }

    #[test]
    fn what_is_no_command_is_said_in_one_line() {
        for (line, part) in [
            ("/what now", "no command /what"),
            ("/save", "name a file"),
            ("/load  ", "name a file"),
            ("/clear all", "/clear takes nothing"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(part) && error.lines().count() == 1, "{error}");
        }
    }

    #[test]
    fn help_has_every_command() {
        for name in NAMES {
            assert_eq!(
                HELP.iter().filter(|line| line.split(' ').next() == Some(name)).count(),
                1
            );
            assert!(!parse(name).is_err_and(|e| e.contains("no command")), "{name}");
        }
    }
}
