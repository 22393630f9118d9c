//! Option values that several benchmarks share.

use std::{fmt, str::FromStr};

use retro_contract::{GroupScore, Selector};

/// A number of tokens: `4096`, or `128k` for 128 times 1024.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenCount(pub usize);

impl FromStr for TokenCount {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let (digits, unit) = s.strip_suffix(['k', 'K']).map_or((s, 1), |d| (d, 1024));
        match digits.parse::<usize>().ok().and_then(|n| n.checked_mul(unit)) {
            Some(n @ 1..=0x100_0000) => Ok(Self(n)),
            _ => Err(format!("{s:?}: expected a number of tokens like 4096 or 128k")),
        }
    }
}

/// Page selection: a selector and a group score, written `moments+softmax`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageSelection {
    /// What a page summary holds.
    pub selector: Selector,
    /// Reduction of page scores over a KV head's query group.
    pub group_score: GroupScore,
}

impl PageSelection {
    /// The form and all values, for help texts.
    pub fn help() -> String {
        format!(
            "Page selections as SELECTOR+GROUP_SCORE: {}, with {}",
            one_of(Selector::VALUES),
            one_of(GroupScore::VALUES)
        )
    }
}

/// `a`, `a or b`, `a, b or c`.
fn one_of(values: &[&str]) -> String {
    match values {
        [others @ .., last] if !others.is_empty() => format!("{} or {last}", others.join(", ")),
        _ => values.concat(),
    }
}

impl FromStr for PageSelection {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let (selector, score) = s
            .split_once('+')
            .ok_or(format!("{s:?}: expected SELECTOR+SCORE, as bounds+max"))?;
        Ok(Self {
            selector: selector.parse().map_err(|e| format!("{e}"))?,
            group_score: score.parse().map_err(|e| format!("{e}"))?,
        })
    }
}

impl fmt::Display for PageSelection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.selector, self.group_score)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_may_be_thousands_and_selections_round_trip() {
        assert_eq!("128k".parse(), Ok(TokenCount(131_072)));
        assert_eq!("4096".parse(), Ok(TokenCount(4096)));
        for bad in ["", "0", "k", "1m", "999999999k"] {
            assert!(bad.parse::<TokenCount>().is_err(), "{bad}");
        }
        let selection: PageSelection = "moments+softmax".parse().unwrap();
        assert_eq!(selection.to_string(), "moments+softmax");
        assert!("moments".parse::<PageSelection>().unwrap_err().contains("bounds+max"));
        for name in Selector::VALUES.iter().chain(GroupScore::VALUES) {
            assert!(PageSelection::help().contains(name), "{name}");
        }
        assert_eq!(
            [one_of(&["a"]), one_of(&["a", "b"]), one_of(&["a", "b", "c"])],
            ["a", "a or b", "a, b or c"]
        );
        assert!("x+max".parse::<PageSelection>().unwrap_err().contains("bounds"));
    }
}
