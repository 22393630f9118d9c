//! Tasks whose documents are made here: RULER's synthetic ones (Hsieh et al. 2024, arXiv 2404.06654), and look-ups in
//! real text. The same documents for a seed, as long as asked for in tokens of the model's.

mod common_words;
mod draw;
mod filler;
mod needles;
mod tracking;
mod words;

use std::{fmt, ops::RangeInclusive, str::FromStr};

use clap::ValueEnum;

use self::{
    common_words::CommonWords,
    draw::Draw,
    filler::Filler,
    needles::{Kind, LookUp, Niah},
    tracking::Tracking,
};
use super::{score::Document, scorer::Scorer};
use crate::text;

/// A task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Task {
    /// One number in a text, to be found by its key.
    NiahSingle,
    /// Four numbers of four keys; one is asked for.
    NiahMultiKey,
    /// Four numbers of one key; all are asked for.
    NiahMultiValue,
    /// A value that is passed on from variable to variable; all five that have it are asked for.
    VariableTracking,
    /// A list of words in which ten come more often; they are asked for.
    CommonWords,
    /// One fact of two words in a real text (--text).
    LookUp,
}

impl Task {
    /// Whether it hides its answers in a text.
    fn takes_texts(self) -> bool {
        self != Self::CommonWords
    }

    /// Its name on the command line.
    pub fn name(self) -> String {
        let value = self.to_possible_value();
        value.map(|v| v.get_name().to_owned()).unwrap_or_default()
    }
}

/// Tokens of a document, or a range that the documents are spread over: `4096`, `4k`, `4k-7k` (k is 1024).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lengths(RangeInclusive<usize>);

impl Lengths {
    /// Tokens of case `i` of `count`.
    fn of(&self, i: usize, count: usize) -> usize {
        let (low, high) = (*self.0.start(), *self.0.end());
        low + (high - low) * i / count.saturating_sub(1).max(1)
    }
}

impl fmt::Display for Lengths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (low, high) = (self.0.start(), self.0.end());
        if low == high {
            write!(f, "{low}")
        } else {
            write!(f, "{low} to {high}")
        }
    }
}

impl FromStr for Lengths {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let one = |s: &str| {
            let (digits, unit) = match s.strip_suffix(['k', 'K']) {
                Some(digits) => (digits, 1024),
                None => (s, 1),
            };
            let number = digits.parse::<usize>().ok().and_then(|n| n.checked_mul(unit));
            number.filter(|n| (1..=MOST_TOKENS).contains(n))
        };
        let (low, high) = s.split_once('-').unwrap_or((s, s));
        match (one(low), one(high)) {
            (Some(low), Some(high)) if low <= high => Ok(Self(low..=high)),
            _ => Err(format!("{s:?}: expected tokens as 4096, 4k or 4k-7k, at most 1024k")),
        }
    }
}

const MOST_TOKENS: usize = 1 << 20;

/// What is to be made.
pub struct TaskOptions<'a> {
    /// Which task.
    pub task: Task,
    /// Tokens of prompt and question.
    pub lengths: &'a Lengths,
    /// Number of documents.
    pub cases: usize,
    /// Decides everything that is drawn.
    pub seed: u64,
    /// Texts to hide in; noise where there are none.
    pub texts: &'a [String],
}

/// Why documents cannot be made.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum TaskError {
    #[error("the task look-up hides facts in real text: name files with --text")]
    NoText,
    #[error("the task common-words hides nothing in a text: leave out --text")]
    TakesNoText,
    #[error("a case of {task} has {least} tokens at least, but {length} are asked for: give a larger --length")]
    TooShort { task: String, least: usize, length: usize },
    #[error("the texts have {most} tokens where {length} are asked for: name longer ones with --text, or more")]
    TextTooShort { most: usize, length: usize },
    #[error("a list of common-words has {most} tokens at most, but {length} are asked for: give a smaller --length")]
    ListTooShort { most: usize, length: usize },
    #[error("no case of {task} comes nearer to {length} tokens than {near}: give a larger --length")]
    Uneven { task: String, length: usize, near: usize },
    #[error("the texts hold the answers of case {0} already: name others with --text")]
    Known(usize),
    #[error(transparent)]
    Tokens(#[from] text::Error),
}

/// A case: what was drawn for it.
trait Case {
    /// Its text with so much filler: words, or for a list other words than the common ones.
    fn make(&self, filler: &Filler, amount: usize) -> Made;
    /// Most filler that there is.
    fn most(&self, filler: &Filler) -> usize {
        filler.most()
    }
    fn answers(&self) -> Vec<String>;
    fn scorer(&self) -> Scorer {
        Scorer::Contains
    }
    fn n_predict(&self) -> usize;
}

/// The text of a case.
struct Made {
    prompt: String,
    question: String,
}

impl Made {
    fn text(&self) -> String {
        format!("{}{}", self.prompt, self.question)
    }
}

/// Makes a task's documents; `count` gives the tokens of a text.
///
/// # Errors
/// When the lengths, the texts or the tokenizer do not allow it.
pub fn documents(
    options: &TaskOptions<'_>,
    mut count: impl FnMut(&str) -> Result<usize, text::Error>,
) -> Result<Vec<Document>, TaskError> {
    let TaskOptions { task, texts, .. } = *options;
    if task == Task::LookUp && texts.is_empty() {
        return Err(TaskError::NoText);
    }
    if !task.takes_texts() && !texts.is_empty() {
        return Err(TaskError::TakesNoText);
    }
    let filler = if texts.is_empty() {
        Filler::noise()
    } else {
        Filler::of_texts(texts)
    };
    let mut fit = Fit {
        filler: &filler,
        real: !texts.is_empty(),
        task: task.name(),
        rate: 1.5,
    };
    let make = |i: usize| {
        let length = options.lengths.of(i, options.cases);
        let case = case(options, i, length);
        let made = fit.make(case.as_ref(), length, &mut count)?;
        let answers = case.answers();
        // A text that says an answer by itself would be no test.
        let once = |answer: &String| made.prompt.matches(answer.as_str()).count() == 1;
        if matches!(
            task,
            Task::NiahSingle | Task::NiahMultiKey | Task::NiahMultiValue | Task::LookUp
        ) && !answers.iter().all(once)
        {
            return Err(TaskError::Known(i));
        }
        Ok(Document {
            id: format!("{}-{}-{i}", fit.task, options.seed),
            prompt: made.prompt,
            question: Some(made.question),
            answers,
            scorer: Some(case.scorer()),
            n_predict: Some(case.n_predict()),
            ..Document::default()
        })
    };
    (0..options.cases).map(make).collect()
}

fn case(options: &TaskOptions<'_>, i: usize, length: usize) -> Box<dyn Case> {
    let mut draw = Draw::new(options.seed, options.task as u64, i);
    let niah = |kind, draw: &mut Draw| Box::new(Niah::draw(draw, kind));
    match options.task {
        Task::NiahSingle => niah(Kind::Single, &mut draw),
        Task::NiahMultiKey => niah(Kind::MultiKey, &mut draw),
        Task::NiahMultiValue => niah(Kind::MultiValue, &mut draw),
        Task::VariableTracking => Box::new(Tracking::draw(&mut draw)),
        Task::LookUp => Box::new(LookUp::draw(&mut draw)),
        // A word in a list, its number and its point are four tokens at least.
        Task::CommonWords => Box::new(CommonWords::draw(&mut draw, options.seed, i, length / 12)),
    }
}

/// Finds the amount of filler that makes a length.
struct Fit<'a> {
    filler: &'a Filler<'a>,
    /// Whether the filler is real text.
    real: bool,
    task: String,
    /// Tokens that an amount of one makes, from the last case.
    rate: f64,
}

impl Fit<'_> {
    /// The case with at most `length` tokens and at least 98 % of them.
    fn make(
        &mut self,
        case: &dyn Case,
        length: usize,
        count: &mut impl FnMut(&str) -> Result<usize, text::Error>,
    ) -> Result<Made, TaskError> {
        let mut tokens = |amount: usize| -> Result<(Made, usize), TaskError> {
            let made = case.make(self.filler, amount);
            let n = count(&made.text())?;
            Ok((made, n))
        };
        let (mut best, mut least) = tokens(0)?;
        let task = || self.task.clone();
        if least > length {
            return Err(TaskError::TooShort {
                task: task(),
                least,
                length,
            });
        }
        // More than one token an amount cannot be asked for.
        let most = case.most(self.filler).min(length);
        let (base, goal) = (least as f64, length as f64 * 0.995);
        let (mut low, mut high, mut rate) = (0, most + 1, self.rate);
        while high - low > 1 && (least as f64) < length as f64 * 0.99 {
            let guess = ((goal - base) / rate.max(1e-3)) as usize;
            // The guess, or halves where it leaves what is known.
            let amount = if (low + 1..high).contains(&guess) {
                guess
            } else {
                low + (high - low).div_ceil(2)
            };
            let (made, n) = tokens(amount)?;
            rate = ((n as f64 - base) / amount as f64).max(1e-3);
            if n <= length {
                (best, least, low) = (made, n, amount);
            } else {
                high = amount;
            }
        }
        self.rate = rate;
        if (least as f64) < length as f64 * 0.98 {
            let most = least;
            return Err(if low < case.most(self.filler) {
                TaskError::Uneven {
                    task: self.task.clone(),
                    length,
                    near: least,
                }
            } else if self.real {
                TaskError::TextTooShort { most, length }
            } else {
                TaskError::ListTooShort { most, length }
            });
        }
        Ok(best)
    }
}

#[cfg(test)]
mod tests;
