//! Numbers that are computed when they are asked for. A mask of all tokens by all tokens has billions of numbers, of which a proof
//! reads a few rows: storing them, as an array does, is out of the question.

use std::rc::Rc;

/// Steps that are worth doing for numbers that are asked for together.
const MAX_STEPS: f64 = 4e8;

/// Gives a number by its place in row-major order; NaN where there is none.
#[derive(Clone)]
pub struct Lazy {
    number: Rc<dyn Fn(usize) -> f64>,
    /// Steps that a number takes: values that are read several times are computed as often, which may double with each node.
    steps_each: f64,
    /// Steps that the first number of a row takes besides.
    steps_row: f64,
}

impl Lazy {
    /// `of`: the numbers that one of these is computed from.
    pub(super) fn new(of: &[&Self], number: impl Fn(usize) -> f64 + 'static) -> Self {
        Self {
            number: Rc::new(number),
            steps_each: 1.0 + of.iter().map(|l| l.steps_each).sum::<f64>(),
            steps_row: of.iter().map(|l| l.steps_row).sum(),
        }
    }

    /// Numbers that are computed from whole rows of `d` others, once a row.
    pub(super) fn of_rows(of: &Self, d: usize, number: impl Fn(usize) -> f64 + 'static) -> Self {
        Self {
            number: Rc::new(number),
            steps_each: 1.0,
            steps_row: of.steps_row + of.steps_each * d as f64,
        }
    }

    /// The number at a place.
    pub fn at(&self, place: usize) -> f64 {
        (self.number)(place)
    }

    /// Whether so many numbers of so many rows are worth computing.
    pub fn is_affordable(&self, numbers: usize, rows: usize) -> bool {
        self.steps_each * numbers as f64 + self.steps_row * rows as f64 <= MAX_STEPS
    }

    /// A function of each number.
    pub(super) fn map(self, f: impl Fn(f64) -> f64 + 'static) -> Self {
        let of = self.clone();
        Self::new(&[&of], move |place| f(self.at(place)))
    }
}

impl std::fmt::Debug for Lazy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("numbers on demand")
    }
}
