//! Common words extraction: a long list in which ten words come more often than the others.

use super::{
    Case, Made,
    draw::Draw,
    filler::Filler,
    needles::two_words,
    words::{ADJECTIVES, NOUNS},
};

/// Words that are common.
const COMMON: usize = 10;
/// How often a common word comes, and another.
const OFTEN: usize = 30;
const SELDOM: usize = 3;
/// The same in the example.
const OFTEN_IN_EXAMPLE: usize = 3;
const SELDOM_IN_EXAMPLE: usize = 1;
/// Words of the example: the common ones and as many others.
const EXAMPLE: usize = 2 * COMMON;

/// A list of words in random order.
pub struct CommonWords {
    /// The example's words, the common ones, then the others.
    words: Vec<String>,
    seed: u64,
    case: usize,
}

impl CommonWords {
    /// A case with as many words as `--length` may ask for: `most` others than the common ones.
    pub fn draw(draw: &mut Draw, seed: u64, case: usize, most: usize) -> Self {
        let mut words: Vec<String> = (ADJECTIVES.split_whitespace().chain(NOUNS.split_whitespace()))
            .map(str::to_owned)
            .collect();
        draw.shuffle(&mut words);
        // Long lists have words of two: there are not enough others.
        if most + EXAMPLE + COMMON > words.len() {
            let mut made = std::collections::HashSet::new();
            words.clear();
            while words.len() < (most + EXAMPLE + COMMON).min(MOST) {
                let next = two_words(draw);
                if made.insert(next.clone()) {
                    words.push(next);
                }
            }
        }
        Self { words, seed, case }
    }

    /// The words of the case, the common ones first.
    fn own(&self) -> &[String] {
        self.words.get(EXAMPLE..).unwrap_or(&[])
    }

    fn common(&self) -> &[String] {
        self.own().get(..COMMON).unwrap_or(&[])
    }

    /// A numbered list in which the common words and the others come as often as asked for.
    fn list(&self, common: &[String], others: &[String], often: usize, seldom: usize) -> String {
        let times = |words: &[String], n| words.iter().flat_map(move |w| vec![w.clone(); n]).collect();
        let mut all: Vec<String> = times(common, often);
        all.extend::<Vec<String>>(times(others, seldom));
        Draw::new(self.seed, ORDER, self.case).shuffle(&mut all);
        let numbered = all.iter().zip(1..).map(|(word, i)| format!("{i}. {word}"));
        numbered.collect::<Vec<_>>().join(" ")
    }
}

/// Words of two that a list draws from at most: half of all there are.
pub const MOST: usize = 20_000;
/// Sets the order's draws apart from those of the words.
const ORDER: u64 = 0x6f72_6465_7200;

impl Case for CommonWords {
    fn make(&self, _: &Filler, others: usize) -> Made {
        let (common, rest) = self.words.get(..EXAMPLE).unwrap_or(&[]).split_at(COMMON);
        let example = self.list(common, rest, OFTEN_IN_EXAMPLE, SELDOM_IN_EXAMPLE);
        let numbered: Vec<String> = common.iter().zip(1..).map(|(w, i)| format!("{i}. {w}")).collect();
        let (own, others) = (self.common(), self.own().get(COMMON..COMMON + others).unwrap_or(&[]));
        Made {
            prompt: format!(
                "{}{QUESTION} {}\n\n{}",
                instruction(&example),
                numbered.join(" "),
                instruction(&self.list(own, others, OFTEN, SELDOM))
            ),
            question: QUESTION.to_owned(),
        }
    }

    fn most(&self, _: &Filler) -> usize {
        self.own().len() - COMMON
    }

    fn answers(&self) -> Vec<String> {
        self.common().to_vec()
    }

    fn n_predict(&self) -> usize {
        128
    }
}

const QUESTION: &str = "Question: What are the 10 most common words in the above list? Answer: The top 10 words that \
                        appear most often in the list are:";

fn instruction(list: &str) -> String {
    format!(
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that \
         appear most often.\n{list}\n"
    )
}
