//! Progress on stderr: a bar on a terminal, elsewhere a line every ten seconds for long work.

use std::{
    cell::RefCell,
    io::{self, IsTerminal, Write},
    time::{Duration, Instant},
};

use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Writes a line to stderr. Errors (a closed pipe, a full disk) are ignored: they must not end the work.
pub fn note(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// A progress bar of `total` tokens, hidden if stderr is no terminal or `show` is false.
pub fn bar(total: usize, what: &str, show: bool) -> ProgressBar {
    if !show || !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::with_draw_target(Some(total as u64), ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("{prefix} [{bar:30}] {pos}/{len} tokens, {per_sec}, {eta} left");
    if let Ok(style) = style {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.with_prefix(what.to_owned())
}

/// Time between two lines where there is no terminal.
const BETWEEN_LINES: Duration = Duration::from_secs(10);

/// Progress of `total` items that take long.
pub struct Items {
    bar: ProgressBar,
    /// Only where no bar is drawn.
    lines: Option<RefCell<Lines>>,
}

impl Items {
    /// Of `total` items, called `what`; `verb` begins the lines.
    pub fn new(verb: &'static str, total: usize, what: &'static str) -> Self {
        if !io::stderr().is_terminal() {
            let lines = Lines::new(verb, total, what);
            note(&lines.line(Duration::ZERO));
            let lines = Some(RefCell::new(lines));
            let bar = ProgressBar::hidden();
            return Self { bar, lines };
        }
        let bar = ProgressBar::with_draw_target(Some(total as u64), ProgressDrawTarget::stderr());
        let template = format!("{{prefix}} [{{bar:30}}] {{pos}}/{{len}} {what}, {{elapsed}}, {{eta}} left");
        if let Ok(style) = ProgressStyle::with_template(&template) {
            bar.set_style(style.progress_chars("=> "));
        }
        Self { bar, lines: None }
    }

    /// `count` items are done.
    pub fn inc(&self, count: usize) {
        self.bar.inc(count as u64);
        self.update(|lines| lines.done += count);
    }

    /// Work goes on, but no item is done yet.
    pub fn tick(&self) {
        self.bar.tick();
        self.update(|_| ());
    }

    /// Sets what is being worked on.
    pub fn set_prefix(&self, prefix: &str) {
        self.bar.set_prefix(prefix.to_owned());
        self.update(|lines| prefix.clone_into(&mut lines.prefix));
    }

    /// Removes the bar, or writes a last line.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
        if let Some(lines) = &self.lines {
            let mut lines = lines.borrow_mut();
            lines.prefix.clear();
            note(&lines.line(lines.start.elapsed()));
        }
    }

    fn update(&self, change: impl FnOnce(&mut Lines)) {
        if let Some(lines) = &self.lines {
            let mut lines = lines.borrow_mut();
            change(&mut lines);
            let elapsed = lines.start.elapsed();
            if let Some(line) = lines.due(elapsed) {
                note(&line);
            }
        }
    }
}

struct Lines {
    verb: &'static str,
    what: &'static str,
    prefix: String,
    done: usize,
    total: usize,
    start: Instant,
    /// When the last line was written, counted from the start.
    last: Duration,
}

impl Lines {
    fn new(verb: &'static str, total: usize, what: &'static str) -> Self {
        Self {
            verb,
            what,
            prefix: String::new(),
            done: 0,
            total,
            start: Instant::now(),
            last: Duration::ZERO,
        }
    }

    /// The line to write `elapsed` after the start, if it is time for one.
    fn due(&mut self, elapsed: Duration) -> Option<String> {
        if elapsed < self.last + BETWEEN_LINES {
            return None;
        }
        self.last = elapsed;
        Some(self.line(elapsed))
    }

    fn line(&self, elapsed: Duration) -> String {
        let mut line = format!("{}: {} of {} {}", self.verb, self.done, self.total, self.what);
        if !self.prefix.is_empty() {
            line += &format!(", at {}", self.prefix);
        }
        if !elapsed.is_zero() {
            line += &format!(", {}", HumanDuration(elapsed));
        }
        let left = self.total.saturating_sub(self.done);
        if self.done > 0 && left > 0 {
            let left = elapsed.mul_f64(left as f64 / self.done as f64);
            line += &format!(", about {} left", HumanDuration(left));
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_at_intervals_and_say_what_is_left() {
        let mut lines = Lines::new("eval", 8, "documents");
        assert_eq!(lines.line(Duration::ZERO), "eval: 0 of 8 documents");
        assert_eq!(lines.due(Duration::from_secs(9)), None);
        lines.done = 2;
        lines.prefix = "Quest (w = 1)".into();
        let line = lines.due(Duration::from_secs(20)).unwrap();
        assert_eq!(
            line,
            "eval: 2 of 8 documents, at Quest (w = 1), 20 seconds, about 60 seconds left"
        );
        assert_eq!(lines.due(Duration::from_secs(29)), None);
        assert!(lines.due(Duration::from_secs(30)).is_some());
    }
}
