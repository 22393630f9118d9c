//! The sizes of a call of a model.

/// A call: B sequences of S tokens after a past of `past`; the last sequence begins with `pad` tokens of padding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CallShape {
    pub b: usize,
    pub s: usize,
    pub past: usize,
    pub pad: usize,
}

impl CallShape {
    pub const fn new(b: usize, s: usize, past: usize, pad: usize) -> Self {
        Self { b, s, past, pad }
    }

    pub const fn total(&self) -> usize {
        self.past + self.s
    }

    /// Several tokens after a past.
    pub const fn continues(&self) -> bool {
        self.s > 1 && self.past > 0
    }

    /// First valid row of a sequence.
    pub const fn first(&self, b: usize) -> usize {
        if b + 1 == self.b { self.pad } else { 0 }
    }
}

impl std::fmt::Display for CallShape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} token(s) after {}", self.s, self.past)?;
        if self.pad > 0 {
            write!(f, ", {} of padding", self.pad)
        } else {
            Ok(())
        }
    }
}
