//! Stop strings.

/// Passes text through until a stop string appears, holding back what could be the beginning of one.
#[derive(Default)]
pub struct StopFilter {
    stops: Vec<String>,
    held: String,
    stopped: bool,
}

impl StopFilter {
    /// A filter for these strings; empty ones are left out.
    pub fn new(stops: &[String]) -> Self {
        let stops = stops.iter().filter(|s| !s.is_empty()).cloned().collect();
        Self {
            stops,
            ..Self::default()
        }
    }

    /// Adds text; returns what is certain to come before a stop string. Nothing more comes out once [`Self::stopped`].
    pub fn push(&mut self, text: &str) -> String {
        if self.stopped {
            return String::new();
        }
        self.held.push_str(text);
        if let Some(at) = self.stops.iter().filter_map(|s| self.held.find(s.as_str())).min() {
            self.stopped = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let keep = self.stops.iter().map(|s| overlap(&self.held, s)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        std::mem::replace(&mut self.held, rest)
    }

    /// The text held back, at the end.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Whether a stop string appeared.
    pub fn stopped(&self) -> bool {
        self.stopped
    }
}

/// Length of the longest suffix of `text` that is a proper prefix of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let lengths = stop.char_indices().map(|(at, _)| at).skip(1);
    lengths
        .filter(|&n| stop.get(..n).is_some_and(|head| text.ends_with(head)))
        .max()
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stop_strings_are_found_across_pieces_and_false_starts_come_out() {
        let mut f = StopFilter::new(&["END".into(), "xyz".into()]);
        assert_eq!(f.push("hello E"), "hello ");
        assert_eq!(f.push("N"), "");
        assert_eq!(f.push("T E"), "ENT ");
        assert_eq!(f.push("ND tail"), "");
        assert!(f.stopped());
        assert_eq!(f.push("more"), "");
        let mut f = StopFilter::new(&["ab".into()]);
        assert_eq!(f.push("xa"), "x");
        assert_eq!(f.finish(), "a");
        assert!(!f.stopped());
    }

    #[test]
    fn the_earliest_of_several_stop_strings_wins_and_bytes_are_not_split() {
        let mut f = StopFilter::new(&["zz".into(), "b".into()]);
        assert_eq!(f.push("abzz"), "a");
        let mut f = StopFilter::new(&["éé".into(), String::new()]);
        assert_eq!(f.push("xé"), "x");
        assert_eq!(f.push("y"), "éy");
    }
}
