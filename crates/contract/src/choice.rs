//! String attributes with a fixed set of values.

use std::{fmt, ops::RangeInclusive, str::FromStr};

use crate::limits;
use crate::state::{CacheSize, StateElement, StateLayout};

/// A string that is none of an attribute's values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseChoiceError {
    what: &'static str,
    got: String,
    expected: &'static [&'static str],
}

impl fmt::Display for ParseChoiceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} is {:?}, expected one of: {}",
            self.what,
            self.got,
            self.expected.join(", ")
        )
    }
}

impl std::error::Error for ParseChoiceError {}

macro_rules! choice {
    ($(#[$doc:meta])* $name:ident, $what:literal, default $default:ident, { $(#[doc = $meaning:literal] $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $(#[doc = $meaning] $variant),+ }

        impl $name {
            /// Every choice, in the order of [`Self::VALUES`].
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The attribute's values, as written in a model.
            pub const VALUES: &'static [&'static str] = &[$($text),+];

            /// The attribute's value, as written in a model.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }

            /// What the choice means, for help texts.
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$variant => $meaning.trim_ascii()),+ }
            }
        }

        impl Default for $name {
            fn default() -> Self { Self::$default }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { f.write_str(self.as_str()) }
        }

        impl FromStr for $name {
            type Err = ParseChoiceError;
            fn from_str(s: &str) -> Result<Self, Self::Err> {
                match s {
                    $($text => Ok(Self::$variant),)+
                    _ => Err(ParseChoiceError { what: $what, got: s.to_owned(), expected: Self::VALUES }),
                }
            }
        }
    };
}

choice!(
    /// The state from which a query head scores a page (attribute `selector`).
    Selector, "selector", default Bounds, {
        /// Elementwise minimum and maximum of the page's keys (Quest).
        Bounds = "bounds",
        /// Mean and standard deviation of the page's keys.
        Moments = "moments",
        /// As moments, each element of the standard deviation signed by the page's principal direction.
        SignedMoments = "signed_moments",
        /// Every key again in one or two bits an element after a fixed rotation, to estimate attention mass.
        Sketch = "sketch",
        /// Adamas: keys and queries in two bits an element, thresholds as published, the distance of their codes; CPU only.
        Adamas = "adamas",
        /// As adamas, with thresholds at 0.6 of the root mean square; CPU only.
        AdamasRms = "adamas_rms",
    }
);

impl Selector {
    /// Shape and element type of a layer's state.
    pub fn layout(self, size: &CacheSize) -> StateLayout {
        match self {
            Self::Bounds | Self::Moments | Self::SignedMoments => StateLayout::page_vectors(size),
            Self::Sketch => StateLayout::sketches(size),
            Self::Adamas | Self::AdamasRms => StateLayout::codes(size),
        }
    }

    /// Element type of its state, as [`Self::layout`] says it too.
    pub const fn state_element(self) -> StateElement {
        match self {
            Self::Bounds | Self::Moments | Self::SignedMoments => StateElement::Cache,
            Self::Sketch | Self::Adamas | Self::AdamasRms => StateElement::Byte,
        }
    }

    /// What a head size must be a multiple of, with sketches of so many bits an element: a sketch is whole bytes.
    pub const fn head_size_multiple(self, sketch_bits: usize) -> usize {
        match self {
            Self::Sketch => 8 / sketch_bits,
            Self::Bounds | Self::Moments | Self::SignedMoments | Self::Adamas | Self::AdamasRms => 1,
        }
    }

    /// Page sizes that it has on the CPU, powers of two among them.
    pub const fn page_sizes(self) -> RangeInclusive<usize> {
        match self {
            Self::Bounds | Self::Moments | Self::SignedMoments => limits::PAGE_SIZE_MIN..=limits::PAGE_SIZE_MAX,
            Self::Sketch | Self::Adamas | Self::AdamasRms => 1..=limits::PAGE_SIZE_MAX,
        }
    }
}

choice!(
    /// How the scores of a query group's heads become the page's score (attribute `group_score`).
    GroupScore, "group_score", default Max, {
        /// Maximum over the heads (the paper's).
        Max = "max",
        /// Sum over the heads of each head's softmax over the valid pages.
        Softmax = "softmax",
    }
);

choice!(
    /// Which pages a decoding step reads (attribute `mode`).
    Mode, "mode", default Retro, {
        /// The best pages within the budget, with retrospective correction.
        Retro = "retro",
        /// Every page, for every token fed.
        Dense = "dense",
        /// Sink pages and the most recent ones within the budget (StreamingLLM).
        Streaming = "streaming",
        /// Sink pages, recent ones and every pi-th page between within the budget (pi-Attention's pattern).
        Periodic = "periodic",
    }
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_round_trip_and_the_error_names_them() {
        assert_eq!(Selector::ALL.len(), Selector::VALUES.len());
        for (v, choice) in Selector::VALUES.iter().zip(Selector::ALL) {
            assert_eq!(v.parse::<Selector>().unwrap(), *choice);
            assert_eq!(choice.as_str(), *v);
            let size = CacheSize {
                capacity: 100,
                pages: 7,
                page_size: 16,
                head_size: 8,
                sketch_bits: 2,
                cache_element: 4,
            };
            assert_eq!(choice.layout(&size).element, choice.state_element());
        }
        for v in Mode::VALUES {
            assert_eq!(v.parse::<Mode>().unwrap().to_string(), *v);
        }
        let e = "mean".parse::<GroupScore>().unwrap_err().to_string();
        assert_eq!(e, "group_score is \"mean\", expected one of: max, softmax");
    }
}
