//! `retro-run chat`, and prompts as turns.

use std::{
    fs::{self, File},
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{Arc, Mutex},
    thread::{sleep, spawn},
    time::{Duration, Instant},
};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use serde_json::{Value, json};

use crate::support::*;

const TEMPLATE: &str =
    "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %} <eos>{% endif %} {% endfor %}";

const FACTS: &str = "<bos> facts : problem #1 : coins of Ben ? coins of Ben 3 . coins of Jane 4 .";

/// A folder for a test, with a template in it.
fn folder() -> (tempfile::TempDir, String) {
    let dir = tempfile::tempdir().unwrap();
    let template = dir.path().join("template.jinja");
    fs::write(&template, TEMPLATE).unwrap();
    let template = template.to_str().unwrap().to_owned();
    (dir, template)
}

/// Says these lines to the converted model.
fn conversation(template: &str, arguments: &[&str], lines: &[u8]) -> Output {
    let mut command = retro_run();
    command
        .arg("chat")
        .arg(ledger_retro())
        .args(["--template", template, "-n", "20"]);
    command
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(lines).unwrap();
    child.wait_with_output().unwrap()
}

/// Standard output and standard error of a conversation that ended so.
fn ended(output: Output, code: i32) -> (String, String) {
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{errors}");
    (String::from_utf8(output.stdout).unwrap(), errors)
}

#[test]
fn without_a_terminal_a_line_is_a_turn_and_only_answers_are_on_stdout() {
    let (_dir, template) = folder();
    let second = "problem #2 : coins of Jane ?";
    let lines = format!("{FACTS}\n\n{second}\n/stats\n/help");
    let (answers, notes) = ended(conversation(&template, &[], lines.as_bytes()), 0);
    let answers: Vec<&str> = answers.lines().collect();
    assert_eq!(answers.len(), 2, "{answers:?}");
    let first = text(&ledger_retro(), &["-p", FACTS, "--template", &template, "-n", "20"]);
    assert_eq!(answers[0], first.trim_end_matches('\n'));
    // The second turn reads itself and the end of the first answer, at most the answer's last token with it.
    let read: Vec<usize> = notes
        .lines()
        .filter_map(|line| line.strip_prefix("[read ")?.split(',').next()?.parse().ok())
        .collect();
    let words = |line: &str| line.split_whitespace().count();
    assert_eq!(read[0], words(FACTS), "{notes}");
    assert!(read[1] <= words(second) + 2, "{notes}");
    for part in [
        "window 8",
        "tokens/s",
        "first token after",
        "pages per KV head and step",
        "exposure",
        "KV cache",
    ] {
        assert!(notes.contains(part), "{part}: {notes}");
    }
    assert!(
        notes.contains("4 messages; context ") && notes.contains("of 2048 tokens"),
        "{notes}"
    );
    assert!(notes.contains("/save FILE") && !notes.contains('\u{1b}'), "{notes}");
}

#[test]
fn what_fails_is_a_line_and_the_talk_goes_on() {
    let (dir, template) = folder();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("foreign.json"), r#"{"messages": []}"#).unwrap();
    let long = "coins ".repeat(60);
    let lines = format!(
        "{FACTS}\n/nope\n/load {}\n/load {}\n/save {}\n{long}\n/save {}\n/exit\nnot said\n",
        path("none.json"),
        path("foreign.json"),
        path("none/conversation.json"),
        path("conversation.json"),
    );
    let bytes = [lines.as_bytes(), b""].concat();
    let (answers, notes) = ended(conversation(&template, &["-c", "70"], &bytes), 1);
    assert_eq!(answers.lines().count(), 1);
    let errors: Vec<&str> = notes.lines().filter(|line| line.starts_with("error: ")).collect();
    for (line, part) in errors.iter().zip([
        "no command /nope",
        "none.json",
        "foreign.json holds no conversation",
        "none/conversation.json",
        "the context holds 70: /clear",
        "5 lines of standard input failed",
    ]) {
        assert!(line.contains(part), "{part}: {notes}");
    }
    assert_eq!(errors.len(), 6, "{notes}");
    let kept: Value = serde_json::from_slice(&fs::read(path("conversation.json")).unwrap()).unwrap();
    let roles: Vec<&Value> = kept["messages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| &m["role"])
        .collect();
    assert_eq!(roles, ["user", "assistant"]);
    let (answers, notes) = ended(conversation(&template, &[], b"facts \xff\nfacts :\n"), 1);
    assert_eq!(answers.lines().count(), 1);
    assert!(notes.contains("no UTF-8"), "{notes}");
}

#[test]
fn a_talk_that_was_saved_goes_on_as_if_it_had_not_ended() {
    let (dir, template) = folder();
    let file = dir.path().join("conversation.json").to_str().unwrap().to_owned();
    let next = "problem #2 : coins of Jane ?\n";
    let all = ["-b", "1.0", "--system", "problem"];
    let lines = format!("{FACTS}\n/save {file}\n{next}");
    let (whole, _) = ended(conversation(&template, &all, lines.as_bytes()), 0);
    let last = whole.lines().last().unwrap();
    for (arguments, lines) in [
        (&["-b", "1.0"][..], format!("/load {file}\n{next}")),
        (&["-b", "1.0", "--load", &file], next.to_owned()),
        (&all, format!("something\n/clear\n{FACTS}\n{next}")),
        (&["-b", "1.0"], format!("/system problem\n/system\n{FACTS}\n{next}")),
    ] {
        let (answers, notes) = ended(conversation(&template, arguments, lines.as_bytes()), 0);
        assert_eq!(answers.lines().last(), Some(last), "{lines}: {notes}");
    }
}

#[test]
fn talks_end_by_signals_and_streams_as_other_commands_do() {
    let (_dir, template) = folder();
    let start = |stdout: Stdio| -> Child {
        let mut command = retro_run();
        command
            .arg("chat")
            .arg(ledger())
            .args(["--template", &template, "-n", "20"]);
        command.stdin(Stdio::piped()).stdout(stdout).stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    // While it waits for a line.
    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        let mut child = start(Stdio::piped());
        let mut input = child.stdin.take().unwrap();
        writeln!(input, "{FACTS}").unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0; 10]).unwrap();
        sleep(Duration::from_millis(300));
        kill(&child, signal);
        assert_eq!(child.wait().unwrap().code(), Some(code));
    }
    let say = |mut child: Child| {
        writeln!(child.stdin.take().unwrap(), "{FACTS}\n{FACTS}").unwrap();
        child.wait_with_output().unwrap()
    };
    let (_, notes) = ended(
        say(start(File::options().write(true).open("/dev/full").unwrap().into())),
        1,
    );
    assert!(notes.contains("error: cannot write to stdout"), "{notes}");
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let (_, notes) = ended(say(start(writer.into())), 0);
    assert!(!notes.contains("error"), "{notes}");
}

fn kill(child: &Child, signal: &str) {
    let status = Command::new("kill")
        .args(["-s", signal, &child.id().to_string()])
        .status();
    assert!(status.unwrap().success());
}

/// A program at a terminal.
struct Seat {
    child: Child,
    keys: File,
    seen: Arc<Mutex<String>>,
}

impl Seat {
    fn take(data: &Path, arguments: &[&str]) -> Self {
        let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&terminal).unwrap();
        unlockpt(&terminal).unwrap();
        let name = ptsname(&terminal, Vec::new()).unwrap();
        let side = || {
            File::options()
                .read(true)
                .write(true)
                .open(name.to_str().unwrap())
                .unwrap()
        };
        let mut command = retro_run();
        command
            .arg("chat")
            .args(arguments)
            .env("XDG_DATA_HOME", data)
            .env("TERM", "xterm");
        let child = command.stdin(side()).stdout(side()).stderr(side()).spawn().unwrap();
        let keys = File::from(terminal);
        let (mut screen, seen) = (keys.try_clone().unwrap(), Arc::new(Mutex::new(String::new())));
        let all = Arc::clone(&seen);
        spawn(move || {
            let mut part = [0; 4096];
            // At the program's end the terminal reads as an error.
            while let Ok(n) = screen.read(&mut part) {
                all.lock().unwrap().push_str(&String::from_utf8_lossy(&part[..n]));
            }
        });
        Self { child, keys, seen }
    }

    /// Waits until this is on the screen, after what was waited for before.
    fn sees(&self, part: &str) {
        let start = Instant::now();
        loop {
            let mut seen = self.seen.lock().unwrap();
            if let Some(at) = seen.find(part) {
                seen.drain(..at + part.len());
                return;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "no {part:?} in {seen:?}");
            drop(seen);
            sleep(Duration::from_millis(10));
        }
    }

    fn types(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
    }

    fn leaves(mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }
}

#[test]
fn at_a_terminal_lines_are_edited_kept_and_answers_stopped() {
    let (dir, template) = folder();
    let long = dir.path().join("long.json");
    let messages = [("user", "coins ".repeat(1800)), ("assistant", "so".to_owned())];
    let messages: Vec<Value> = messages.iter().map(|(r, c)| json!({"role": r, "content": c})).collect();
    let conversation = json!({"format": "retro-run chat 1", "messages": messages});
    fs::write(&long, conversation.to_string()).unwrap();
    let (model, long) = (ledger_retro(), long.to_str().unwrap().to_owned());
    let arguments = [
        model.to_str().unwrap(),
        "--template",
        &template,
        "-n",
        "20",
        "--chunk",
        "1",
        "--load",
        &long,
    ];
    let history: PathBuf = dir.path().join("retro-attention/chat-history");
    let mut seat = Seat::take(dir.path(), &arguments);
    seat.sees("/help lists the commands");
    seat.sees("> ");
    // A backspace takes the last letter, a backslash at the end begins another line.
    seat.types("coinx\u{7f}s \\\rof Ben\r");
    sleep(Duration::from_millis(300));
    kill(&seat.child, "INT");
    seat.sees("stopped: your message is not part of the conversation");
    seat.sees("> ");
    seat.types("/clear\r");
    seat.sees("begins anew");
    seat.types("facts :\r");
    seat.sees("[read 2, wrote ");
    seat.types("/stats\r");
    seat.sees("2 messages; context ");
    seat.types("half a line\u{3}");
    seat.sees("Ctrl-D or /exit");
    seat.types("/nope\r");
    seat.sees("error: there is no command /nope");
    seat.sees("> ");
    seat.types("\u{4}");
    assert_eq!(seat.leaves(), Some(0));
    let kept = fs::read_to_string(&history).unwrap();
    assert!(kept.contains("facts :") && kept.contains("of Ben"), "{kept}");

    // Without history, none is read or written.
    let mut seat = Seat::take(dir.path(), &[&arguments[..], &["--no-history"]].concat());
    seat.sees("> ");
    seat.types("\u{1b}[A/exit\r");
    assert_eq!(seat.leaves(), Some(0));
    assert_eq!(fs::read_to_string(&history).unwrap(), kept);
}

/// A folder of `ledger` with this template.
fn with_template(dir: &Path) -> PathBuf {
    let folder = dir.join("model");
    fs::create_dir(&folder).unwrap();
    for file in fs::read_dir(ledger()).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), folder.join(file.file_name())).unwrap();
    }
    fs::write(
        folder.join("chat_template.jinja"),
        "<bos> facts : {{ messages[-1].content }} so",
    )
    .unwrap();
    folder
}

#[test]
fn a_prompt_is_a_turn_where_the_model_has_a_template() {
    let (dir, template) = folder();
    let model = with_template(dir.path());
    let model = model.to_str().unwrap();
    let prompt = dir.path().join("prompt.txt");
    fs::write(&prompt, "coins of Ben").unwrap();
    let prompt = prompt.to_str().unwrap();
    let run = |arguments: &[&str]| {
        let output = run(&[&["run", model, "-n", "10"], arguments].concat());
        ended(output, 0)
    };
    let (turn, notes) = run(&["-p", "<bos> facts : coins of Ben so", "--no-template"]);
    assert!(!notes.contains("user's turn"), "{notes}");
    let (plain, _) = run(&["-p", "coins of Ben", "--no-template"]);
    assert_ne!(turn, plain);
    for arguments in [
        &["-p", "coins of Ben"][..],
        &["-f", prompt],
        &["-p", "coins of Ben", "--chat"],
    ] {
        let (text, notes) = run(arguments);
        assert_eq!(text, turn, "{arguments:?}");
        let line = "the prompt is a user's turn, by the model's chat template; --no-template feeds it as it is";
        assert!(notes.lines().any(|l| l == line), "{notes}");
    }
    let (other, notes) = run(&["-p", "coins of Ben", "--template", &template]);
    assert_eq!(other, run(&["-p", "coins of Ben ", "--no-template"]).0);
    assert!(notes.contains(&template), "{notes}");
    // Documents are no turns unless asked for.
    let doc = document(0);
    assert!(!run(&["--document", &doc]).1.contains("user's turn"));
    assert!(run(&["--document", &doc, "--chat"]).1.contains("user's turn"));
}

#[test]
fn turns_are_sampled_as_the_model_says_and_options_overrule_it() {
    let (dir, _) = folder();
    let model = with_template(dir.path());
    let config = model.join("generation_config.json");
    let model = model.to_str().unwrap();
    let says = |text: &str| fs::write(&config, text).unwrap();
    let run = |arguments: &[&str]| {
        let prompt = ["run", model, "-n", "10", "-p", "coins of Ben"];
        ended(run(&[&prompt, arguments].concat()), 0)
    };
    let (greedy, notes) = run(&[]);
    assert!(!notes.contains("sampling"), "{notes}");

    says(r#"{"do_sample": true, "temperature": 5.0, "top_k": 40, "repetition_penalty": 1.5}"#);
    let (drawn, notes) = run(&[]);
    let line = "sampling by generation_config.json: temperature 5, top-k 40, repetition penalty 1.5";
    assert!(notes.lines().any(|l| l == line), "{notes}");
    let options = ["--temp", "5", "--top-k", "40", "--repeat-penalty", "1.5"];
    let (asked, notes) = run(&options);
    assert!(
        asked == drawn && drawn != greedy && !notes.contains("sampling"),
        "{notes}"
    );
    let (likeliest, notes) = run(&["--temp", "0", "--repeat-penalty", "1", "--top-k", "0"]);
    assert!(likeliest == greedy && !notes.contains("sampling"), "{notes}");
    // What is no turn is as it was.
    let (plain, notes) = run(&["--no-template"]);
    assert!(plain == run(&["--no-template", "--temp", "0"]).0 && !notes.contains("sampling"));

    let mut chat = retro_run();
    chat.args(["chat", model, "-n", "10"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = chat.spawn().unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(b"coins of Ben\n/stats\n")
        .unwrap();
    let (answer, notes) = ended(child.wait_with_output().unwrap(), 0);
    assert_eq!(answer, drawn);
    assert!(notes.lines().any(|l| l == line), "{notes}");
    let stats = "sampling: temperature 5, top-k 40, repetition penalty 1.5";
    assert!(notes.lines().any(|l| l == stats), "{notes}");

    says(r#"{"do_sample": false, "temperature": 5.0, "top_k": 40}"#);
    assert_eq!(run(&[]).0, greedy);
    for (wrong, part) in [("\"temperature\": -1", "--temp -1"), ("\"top_k\": 2.5", "--top-k 2.5")] {
        says(&format!("{{\"do_sample\": true, {wrong}}}"));
        for command in [&["chat", model][..], &["run", model, "-p", "x"]] {
            let line = error(command);
            assert!(line.contains("generation_config.json") && line.contains(part), "{line}");
        }
    }
}

#[test]
fn templates_that_are_missing_or_wrong_are_named() {
    let (dir, template) = folder();
    let model = ledger();
    let model = model.to_str().unwrap();
    let broken = dir.path().join("broken.jinja");
    fs::write(&broken, "{% for %}").unwrap();
    let broken = broken.to_str().unwrap();
    for arguments in [
        &["run", model, "-p", "x", "--chat"][..],
        &["chat", model],
        &["run", model, "-p", "x", "--system", "s"],
    ] {
        let line = error(arguments);
        assert!(
            line.contains("no chat template") && line.contains("--template FILE"),
            "{line}"
        );
    }
    for command in [&["chat", model][..], &["run", model, "-p", "x"]] {
        let with = |more: &[&str]| error(&[command, more].concat());
        assert!(with(&["--template", broken]).contains("broken.jinja"));
        assert!(with(&["--template", "/no/such"]).contains("/no/such"));
        let line = with(&["--template", &template, "--chat-template-kwargs", "[1]"]);
        assert!(
            line.contains("--chat-template-kwargs [1]: expected a JSON object"),
            "{line}"
        );
    }
    assert!(error(&["chat", model, "--template", &template, "-c", "9999"]).contains("-c 9999"));
    assert!(error(&["chat", model, "--template", &template, "--load", "/no/such"]).contains("/no/such"));
    assert!(error(&["chat", model, "--template", &template, "-n", "0"]).contains("-n 0"));
    assert_eq!(
        run(&["run", model, "-p", "x", "--no-template", "--chat"]).status.code(),
        Some(2)
    );
}
