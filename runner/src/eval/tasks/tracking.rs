//! Variable tracking: a value goes from variable to variable, and all that have it are asked for.

use super::{
    Case, Made,
    draw::Draw,
    filler::{Filler, Needle},
};

/// Times that the value is passed on.
const HOPS: usize = 4;

/// One chain of assignments.
pub struct Tracking {
    value: String,
    names: Vec<String>,
    needles: Vec<Needle>,
    start: f64,
    /// An example with its answer, which stands before the case.
    example: (String, Vec<String>),
}

impl Tracking {
    pub fn draw(draw: &mut Draw) -> Self {
        // The example's are none of the case's.
        let mut values = draw.numbers(2, 5);
        let mut names = draw.distinct(2 * (HOPS + 1), name);
        let (other, value) = (values.pop().unwrap_or_default(), values.pop().unwrap_or_default());
        let others = names.split_off(HOPS + 1);
        let mut depths: Vec<f64> = names.iter().map(|_| draw.fraction()).collect();
        depths.sort_by(f64::total_cmp);
        let needles = assignments(&value, &names).zip(depths);
        Self {
            needles: needles.map(|(text, depth)| Needle { text, depth }).collect(),
            value,
            names,
            start: draw.fraction(),
            example: (other, others),
        }
    }
}

impl Case for Tracking {
    fn make(&self, filler: &Filler, words: usize) -> Made {
        let (value, names) = &self.example;
        let lines: Vec<String> = assignments(value, names).collect();
        let example = format!(
            "{}{}{} {}\n\n",
            instruction(&lines.join("\n")),
            question(value),
            answer(value, names.len()),
            names.join(" ")
        );
        let text = filler.with(words, self.start, &self.needles);
        Made {
            prompt: example + &instruction(&text),
            question: question(&self.value) + &answer(&self.value, self.names.len()),
        }
    }

    fn answers(&self) -> Vec<String> {
        self.names.clone()
    }

    fn n_predict(&self) -> usize {
        64
    }
}

fn instruction(text: &str) -> String {
    format!("Memorize and track the chain of variable assignments hidden in the following text.\n\n{text}\n")
}

fn question(value: &str) -> String {
    format!("Question: Find all variables that are assigned the value {value} in the text above.")
}

fn answer(value: &str, count: usize) -> String {
    format!(
        " Answer: According to the chain of variable assignments in the text above, {count} variables are assigned the \
         value {value}, they are:"
    )
}

/// "VAR A = 12345", "VAR B = VAR A" and so on.
fn assignments<'a>(value: &'a str, names: &'a [String]) -> impl Iterator<Item = String> + 'a {
    let sources = std::iter::once(value.to_owned()).chain(names.iter().map(|n| format!("VAR {n}")));
    names
        .iter()
        .zip(sources)
        .map(|(name, from)| format!("VAR {name} = {from}"))
}

/// Five capitals.
fn name(draw: &mut Draw) -> String {
    (0..5).map(|_| char::from(b'A' + draw.below(26) as u8)).collect()
}
