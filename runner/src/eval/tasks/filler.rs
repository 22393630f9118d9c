//! Filler: the text that needles are hidden in.

/// Sentences that say nothing, RULER's noise.
const NOISE: &str = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n";

/// A long text in pieces, a word with the space behind it each.
pub struct Filler<'a> {
    pieces: Vec<&'a str>,
    /// Whether it may be read over again: noise may, a text may not.
    endless: bool,
}

impl Filler<'static> {
    /// Noise.
    pub fn noise() -> Self {
        Self {
            pieces: pieces(NOISE).collect(),
            endless: true,
        }
    }
}

impl<'a> Filler<'a> {
    /// Real text, one after another.
    pub fn of_texts(texts: &'a [String]) -> Self {
        Self {
            pieces: texts.iter().flat_map(|t| pieces(t)).collect(),
            endless: false,
        }
    }

    /// Most words that it has.
    pub fn most(&self) -> usize {
        if self.endless { usize::MAX } else { self.pieces.len() }
    }

    /// `words` words from a place on, a fraction of the whole, with each of `needles` at its depth, a fraction of the
    /// words, between two sentences or lines. A text that ends goes on from its beginning.
    pub fn with(&self, words: usize, start: f64, needles: &[Needle]) -> String {
        let count = self.pieces.len().max(1);
        let start = if self.endless {
            0
        } else {
            // A line's beginning, where one is.
            let from = (start * count as f64) as usize;
            let later = (from..count).find(|&i| i == 0 || self.ends_line(i - 1));
            later.unwrap_or(0)
        };
        let piece = |i: usize| self.pieces.get((start + i) % count).copied().unwrap_or_default();
        let mut order: Vec<&Needle> = needles.iter().collect();
        order.sort_by(|a, b| a.depth.total_cmp(&b.depth));
        let mut order = order.into_iter().peekable();
        let mut out = String::new();
        for i in 0..words {
            if i == 0 || ends(piece(i - 1)) {
                while let Some(needle) = order.next_if(|n| n.depth * words as f64 <= i as f64) {
                    out += &needle.text;
                    out += if i == 0 { "\n" } else { space(piece(i - 1)) };
                }
            }
            out += piece(i);
            if !piece(i).ends_with(char::is_whitespace) && i + 1 < words {
                out += END_OF_TEXT;
            }
        }
        // Those that no end of a sentence came behind.
        let mut out = out.trim_end().to_owned();
        for needle in order {
            out.push('\n');
            out += &needle.text;
        }
        out
    }

    fn ends_line(&self, i: usize) -> bool {
        self.pieces.get(i).is_some_and(|p| p.contains('\n'))
    }
}

/// What is hidden, and where.
#[derive(Clone, Debug)]
pub struct Needle {
    /// A sentence.
    pub text: String,
    /// Place in the filler, from 0 to 1.
    pub depth: f64,
}

/// Words with the space behind each.
fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text.trim_start();
    std::iter::from_fn(move || {
        let word = rest.find(char::is_whitespace).unwrap_or(rest.len());
        let tail = rest.get(word..)?;
        let space = tail.find(|c: char| !c.is_whitespace()).unwrap_or(tail.len());
        let (piece, next) = rest.split_at_checked(word + space)?;
        rest = next;
        (!piece.is_empty()).then_some(piece)
    })
}

/// What stands behind a text's last word.
const END_OF_TEXT: &str = "\n\n";

fn space(piece: &str) -> &str {
    let space = piece.get(piece.trim_end().len()..).unwrap_or_default();
    if space.is_empty() { END_OF_TEXT } else { space }
}

fn ends(piece: &str) -> bool {
    space(piece).contains('\n') || piece.trim_end().ends_with(['.', '!', '?'])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn needle(text: &str, depth: f64) -> Needle {
        Needle {
            text: text.to_owned(),
            depth,
        }
    }

    #[test]
    fn needles_stand_between_sentences() {
        let texts = ["One two. Three four.\n  five six\nseven".to_owned()];
        let filler = Filler::of_texts(&texts);
        assert_eq!(filler.most(), 7);
        let hidden = |depth| filler.with(7, 0.0, &[needle("N.", depth)]);
        assert_eq!(hidden(0.0), "N.\nOne two. Three four.\n  five six\nseven");
        assert_eq!(hidden(0.2), "One two. N. Three four.\n  five six\nseven");
        assert_eq!(hidden(0.5), "One two. Three four.\n  N.\n  five six\nseven");
        assert_eq!(hidden(0.99), "One two. Three four.\n  five six\nseven\nN.");
        assert_eq!(filler.with(0, 0.0, &[needle("N.", 0.5)]).trim(), "N.");
        let apart = ["One.\n\nTwo. ".to_owned(), "Three.".to_owned()];
        assert_eq!(Filler::of_texts(&apart).with(3, 0.0, &[]), "One.\n\nTwo. Three.");
        // From a line's beginning, around its end.
        assert_eq!(filler.with(4, 0.4, &[]), "five six\nseven\n\nOne");
    }

    #[test]
    fn noise_has_no_end_and_keeps_the_order_of_needles() {
        let text = Filler::noise().with(1000, 0.7, &[needle("B", 0.4), needle("A", 0.1), needle("C", 0.4)]);
        let order: String = text.matches(['A', 'B', 'C']).collect();
        assert_eq!(order, "ABC");
        assert_eq!(text.split_whitespace().count(), 1003);
    }
}
