//! Needles in a haystack: facts hidden in a text, and a question about one of them.

use super::{
    Case, Made,
    draw::Draw,
    filler::{Filler, Needle},
    words::{ADJECTIVES, CITIES, NOUNS},
};
use crate::eval::scorer::Scorer;

/// Needles of the tasks with several.
const SEVERAL: usize = 4;

/// RULER's needles: numbers of seven digits, each of a key of two words.
pub struct Niah {
    needles: Vec<Needle>,
    key: String,
    values: Vec<String>,
    start: f64,
}

/// Which keys and values are hidden.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// One key with one value.
    Single,
    /// Several keys with one value each, of which one is asked for.
    MultiKey,
    /// One key with several values, all of which are asked for.
    MultiValue,
}

impl Niah {
    pub fn draw(draw: &mut Draw, kind: Kind) -> Self {
        let (keys, values) = match kind {
            Kind::Single => (1, 1),
            Kind::MultiKey => (SEVERAL, 1),
            Kind::MultiValue => (1, SEVERAL),
        };
        let keys = draw.distinct(keys, two_words);
        let numbers = draw.numbers(keys.len() * values, 7);
        let mut needles = Vec::new();
        for (key, values) in keys.iter().zip(numbers.chunks(values)) {
            for value in values {
                needles.push(Needle {
                    text: format!("One of the special magic numbers for {key} is: {value}."),
                    depth: draw.fraction(),
                });
            }
        }
        let asked = draw.below(keys.len());
        Self {
            needles,
            key: keys.into_iter().nth(asked).unwrap_or_default(),
            values: numbers.chunks(values).nth(asked).unwrap_or(&[]).to_vec(),
            start: draw.fraction(),
        }
    }
}

impl Case for Niah {
    fn make(&self, filler: &Filler, words: usize) -> Made {
        let text = filler.with(words, self.start, &self.needles);
        let (what, is) = if self.values.len() == 1 {
            ("What is the special magic number", "The special magic number")
        } else {
            ("What are all the special magic numbers", "The special magic numbers")
        };
        let are = if self.values.len() == 1 { "is" } else { "are" };
        let key = &self.key;
        Made {
            prompt: format!(
                "Some special magic numbers are hidden within the following text. Make sure to memorize them. I will \
                 quiz you about the numbers afterwards.\n{text}\n"
            ),
            question: format!(
                "{what} for {key} mentioned in the provided text? {is} for {key} mentioned in the provided text {are}"
            ),
        }
    }

    fn answers(&self) -> Vec<String> {
        self.values.clone()
    }

    fn n_predict(&self) -> usize {
        32 * self.values.len()
    }
}

/// A look-up: one fact of two words in a real text.
pub struct LookUp {
    city: &'static str,
    fact: String,
    needle: Needle,
    start: f64,
}

impl LookUp {
    pub fn draw(draw: &mut Draw) -> Self {
        let city = pick(draw, CITIES);
        let fact = draw.distinct(2, |draw| pick(draw, NOUNS).to_owned()).join(" ");
        Self {
            city,
            needle: Needle {
                text: format!("The secret password of {city} is {fact}."),
                depth: draw.fraction(),
            },
            fact,
            start: draw.fraction(),
        }
    }
}

impl Case for LookUp {
    fn make(&self, filler: &Filler, words: usize) -> Made {
        let text = filler.with(words, self.start, std::slice::from_ref(&self.needle));
        let city = self.city;
        Made {
            prompt: format!("Here is a text.\n\n{text}\n\n"),
            question: format!(
                "Question: What is the secret password of {city}?\nAnswer: The secret password of {city} is"
            ),
        }
    }

    fn answers(&self) -> Vec<String> {
        vec![self.fact.clone()]
    }

    fn scorer(&self) -> Scorer {
        Scorer::Prefix
    }

    fn n_predict(&self) -> usize {
        16
    }
}

fn pick(draw: &mut Draw, words: &'static str) -> &'static str {
    let words: Vec<&str> = words.split_whitespace().collect();
    draw.pick(&words).unwrap_or_default()
}

/// "quiet-harbor".
pub fn two_words(draw: &mut Draw) -> String {
    format!("{}-{}", pick(draw, ADJECTIVES), pick(draw, NOUNS))
}
