//! How many pages a step may load.

use std::{fmt, str::FromStr};

/// Pages that hold `tokens` tokens.
pub const fn pages_for(tokens: usize, page_size: usize) -> usize {
    tokens.div_ceil(page_size)
}

/// Pages per KV head for a step with `valid_tokens` tokens in the cache, the newest included:
/// `max(min_pages, ceil(ratio * valid_tokens / page_size - 1e-9))`, never more than the valid pages.
pub fn budget_pages(ratio: f64, min_pages: usize, valid_tokens: usize, page_size: usize) -> usize {
    let relative = (ratio * valid_tokens as f64 / page_size as f64 - 1e-9).ceil().max(0.0) as usize;
    relative.max(min_pages).min(pages_for(valid_tokens, page_size))
}

/// A budget as users write it: a share of the context (`0.15`) or a number of tokens (`2048`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// Share of the valid tokens, in (0, 1].
    Ratio(f64),
    /// Tokens, at least 1; rounded up to whole pages.
    Tokens(usize),
}

impl Budget {
    /// Pages per KV head for a step, as [`budget_pages`]; `min_pages` is a floor for a relative budget only.
    pub fn pages(self, min_pages: usize, valid_tokens: usize, page_size: usize) -> usize {
        match self {
            Self::Ratio(ratio) => budget_pages(ratio, min_pages, valid_tokens, page_size),
            Self::Tokens(tokens) => pages_for(tokens, page_size).min(pages_for(valid_tokens, page_size)),
        }
    }

    /// The operator's attributes `(budget_ratio, budget_min_pages)` that express this budget.
    pub fn attributes(self, min_pages: usize, page_size: usize) -> (f32, usize) {
        match self {
            Self::Ratio(ratio) => (ratio as f32, min_pages),
            Self::Tokens(tokens) => (0.0, pages_for(tokens, page_size)),
        }
    }
}

impl fmt::Display for Budget {
    /// Written so that [`FromStr`] reads it back: a ratio always has a decimal point.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ratio(ratio) => write!(f, "{ratio:?}"),
            Self::Tokens(tokens) => write!(f, "{tokens}"),
        }
    }
}

impl FromStr for Budget {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        if let Ok(tokens) = s.parse::<usize>() {
            return if tokens >= 1 {
                Ok(Self::Tokens(tokens))
            } else {
                Err("a budget in tokens must be at least 1".to_owned())
            };
        }
        match s.parse::<f64>() {
            Ok(ratio) if ratio > 0.0 && ratio <= 1.0 => Ok(Self::Ratio(ratio)),
            _ => Err(format!(
                "budget {s:?} is neither a share of the context in (0, 1] like 0.15 nor a number of tokens like 2048"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_budget_rounds_up_but_not_past_an_exact_quotient() {
        assert_eq!(budget_pages(0.15, 4, 1024, 16), 10); // 9.6
        assert_eq!(budget_pages(0.25, 1, 1024, 16), 16); // exactly 16, not 17 by rounding noise
        assert_eq!(budget_pages(0.15, 4, 100, 16), 4); // the floor
        assert_eq!(budget_pages(0.15, 4, 20, 16), 2); // only two pages are valid
        assert_eq!(budget_pages(0.0, 8, 4096, 16), 8);
    }

    #[test]
    fn budgets_parse_and_print() {
        assert_eq!("0.15".parse(), Ok(Budget::Ratio(0.15)));
        assert_eq!("1.0".parse(), Ok(Budget::Ratio(1.0)));
        assert_eq!("2048".parse(), Ok(Budget::Tokens(2048)));
        assert_eq!("1".parse(), Ok(Budget::Tokens(1)));
        for bad in ["0", "1.5", "-1", "nan", "x", ""] {
            assert!(bad.parse::<Budget>().is_err(), "{bad}");
        }
        for b in [Budget::Ratio(1.0), Budget::Ratio(0.15), Budget::Tokens(1)] {
            assert_eq!(b.to_string().parse(), Ok(b));
        }
        assert_eq!(Budget::Tokens(100).attributes(4, 16), (0.0, 7));
        assert_eq!(Budget::Tokens(100).pages(4, 4096, 16), 7);
    }
}
