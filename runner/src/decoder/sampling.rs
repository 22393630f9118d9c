//! Sampling: the next token from its logits.

use std::cmp::Ordering;

use rand::{RngExt, SeedableRng, rngs::StdRng};
use retro_model_io::SamplingDefaults;

use crate::decoder::error::{Error, Result, require};

/// Number of last tokens that the repetition penalty applies to.
pub const PENALTY_WINDOW: usize = 64;

/// Sampling options, applied in llama.cpp's order: repetition penalty, top-k, top-p, min-p, temperature.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy decoding.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the most likely tokens up to this cumulative probability; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens with at least this share of the top token's probability; 0 keeps all.
    pub min_p: f32,
    /// Logits of the last 64 tokens are divided by it (if positive, else multiplied); 1 is off.
    pub repeat_penalty: f32,
    /// Random seed.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repeat_penalty: 1.0,
            seed: 0,
        }
    }
}

impl Sampling {
    /// As a model's generation_config.json says. As in transformers, tokens are drawn only where it says so, and
    /// repetition is penalised whether or not. To be checked ([`Sampling::check`]).
    ///
    /// # Errors
    /// When its top_k is no whole number from 0 on.
    pub fn of_model(said: &SamplingDefaults) -> Result<Self> {
        let mut sampling = Self {
            repeat_penalty: said.repetition_penalty.unwrap_or(1.0) as f32,
            ..Self::default()
        };
        if said.do_sample == Some(true) {
            sampling.draws(said)?;
        }
        Ok(sampling)
    }

    /// As servers take a model's generation_config.json, vLLM among them: what it names holds whether or not it says that
    /// tokens are drawn, and what it does not name is as in OpenAI's API, whose temperature is 1. To be checked
    /// ([`Sampling::check`]).
    ///
    /// # Errors
    /// When its top_k is no whole number from 0 on.
    pub fn of_server(said: &SamplingDefaults) -> Result<Self> {
        let mut sampling = Self {
            repeat_penalty: said.repetition_penalty.unwrap_or(1.0) as f32,
            ..Self::default()
        };
        sampling.draws(said)?;
        Ok(sampling)
    }

    /// Draws tokens as a model's generation_config.json says.
    fn draws(&mut self, said: &SamplingDefaults) -> Result<()> {
        let top_k = said.top_k.unwrap_or(0.0);
        let whole = top_k.fract() == 0.0 && (0.0..=f64::from(u32::MAX)).contains(&top_k);
        let fault = Error::Sampling {
            option: "--top-k",
            got: top_k as f32,
            expected: "a whole number, 0 (keeps all) or more",
        };
        require!(whole, fault);
        self.temperature = said.temperature.unwrap_or(1.0) as f32;
        self.top_k = top_k as usize;
        self.top_p = said.top_p.unwrap_or(1.0) as f32;
        self.min_p = said.min_p.unwrap_or(0.0) as f32;
        Ok(())
    }

    /// The options in words.
    pub fn describe(&self) -> String {
        let mut parts = Vec::new();
        if self.temperature == 0.0 {
            parts.push("the likeliest token".to_owned());
        } else {
            parts.push(format!("temperature {}", self.temperature));
            let filters = [
                (self.top_k > 0, format!("top-k {}", self.top_k)),
                (self.top_p < 1.0, format!("top-p {}", self.top_p)),
                (self.min_p > 0.0, format!("min-p {}", self.min_p)),
            ];
            parts.extend(filters.into_iter().filter(|(on, _)| *on).map(|(_, text)| text));
        }
        if self.repeat_penalty != 1.0 {
            parts.push(format!("repetition penalty {}", self.repeat_penalty));
        }
        parts.join(", ")
    }

    /// Checks the ranges.
    ///
    /// # Errors
    /// When an option is out of range.
    pub fn check(&self) -> Result<()> {
        let Self {
            temperature,
            top_p,
            min_p,
            repeat_penalty,
            ..
        } = *self;
        let allowed = |option, got, allowed: bool, expected| {
            require!(allowed, Error::Sampling { option, got, expected });
            Ok(())
        };
        let finite = temperature >= 0.0 && temperature.is_finite();
        allowed("--temp", temperature, finite, "0 (greedy) or more")?;
        allowed("--top-p", top_p, top_p > 0.0 && top_p <= 1.0, "more than 0, at most 1")?;
        allowed("--min-p", min_p, (0.0..=1.0).contains(&min_p), "0 to 1")?;
        let positive = repeat_penalty > 0.0 && repeat_penalty.is_finite();
        allowed("--repeat-penalty", repeat_penalty, positive, "more than 0")
    }
}

/// A sampler with its random generator: the same seed gives the same tokens.
pub struct Sampler {
    options: Sampling,
    random: StdRng,
}

impl Sampler {
    /// A sampler; [`Sampling::check`] checks its options.
    pub fn new(options: Sampling) -> Self {
        Self {
            options,
            random: StdRng::seed_from_u64(options.seed),
        }
    }

    /// Chooses a token from the logits `[vocab]`, given the tokens so far.
    ///
    /// # Errors
    /// When no logit is finite.
    pub fn choose(&mut self, logits: &[f32], history: &[u32]) -> Result<u32> {
        let o = self.options;
        let penalised;
        let logits = if o.repeat_penalty == 1.0 {
            logits
        } else {
            penalised = penalise(logits, history, o.repeat_penalty);
            &penalised
        };
        let best = argmax(logits).ok_or(Error::NoFiniteScore)?;
        if o.temperature == 0.0 {
            return Ok(best);
        }
        let mut ranked = Ranked::new(logits);
        let kept = kept(&mut ranked, &o);
        let total = ranked.total(kept, o.temperature);
        let mut left = self.random.random::<f64>() * total;
        for i in 0..kept {
            let Some((token, x)) = ranked.get(i) else { break };
            left -= ranked.weight(x, o.temperature);
            if left < 0.0 {
                return Ok(token);
            }
        }
        // Rounding errors: the weights sum to a little less than their total.
        let last = kept.checked_sub(1).and_then(|i| ranked.get(i));
        Ok(last.map_or(best, |(token, _)| token))
    }
}

/// The token of the largest finite logit, the first of equals; `None` when none is finite.
pub fn argmax(logits: &[f32]) -> Option<u32> {
    // In lanes, so that the compiler vectorizes: a vocabulary has 10^5 tokens.
    const LANES: usize = 16;
    let finite = |x: f32| if x < f32::INFINITY { x } else { f32::NEG_INFINITY };
    let (chunks, rest) = logits.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for (best, &x) in lanes.iter_mut().zip(chunk) {
            let x = finite(x);
            *best = if x > *best { x } else { *best };
        }
    }
    let rest = rest.iter().map(|&x| finite(x));
    let best = lanes.into_iter().chain(rest).fold(f32::NEG_INFINITY, f32::max);
    let found = || logits.iter().position(|&x| x == best);
    (best > f32::NEG_INFINITY).then(found).flatten().map(|i| i as u32)
}

fn penalise(logits: &[f32], history: &[u32], penalty: f32) -> Vec<f32> {
    let mut out = logits.to_vec();
    let mut recent = history
        .get(history.len().saturating_sub(PENALTY_WINDOW)..)
        .unwrap_or(&[])
        .to_vec();
    recent.sort_unstable();
    recent.dedup();
    for token in recent {
        if let Some(x) = out.get_mut(token as usize) {
            *x = if *x > 0.0 { *x / penalty } else { *x * penalty };
        }
    }
    out
}

/// Tokens with finite logits, most likely first. They are put in order only as far as somebody looks: of a vocabulary
/// of 10^5 tokens that is a few hundred as a rule, and sorting all would take longer than a small model's step.
struct Ranked {
    tokens: Vec<(u32, f32)>,
    /// So many are in their places.
    sorted: usize,
    best: f32,
}

impl Ranked {
    /// Tokens that are put in order at first.
    const FIRST: usize = 256;

    fn new(logits: &[f32]) -> Self {
        let finite = logits.iter().enumerate().filter(|(_, x)| x.is_finite());
        let tokens: Vec<(u32, f32)> = finite.map(|(i, &x)| (i as u32, x)).collect();
        let best = tokens.iter().map(|t| t.1).fold(f32::NEG_INFINITY, f32::max);
        Self {
            tokens,
            sorted: 0,
            best,
        }
    }

    /// The token at a place of the order.
    fn get(&mut self, place: usize) -> Option<(u32, f32)> {
        self.sort(place + 1);
        self.tokens.get(place).copied()
    }

    /// Puts at least `count` tokens in their places.
    fn sort(&mut self, count: usize) {
        // Best first, equals by id: the order does not depend on the sort.
        let order =
            |a: &(u32, f32), b: &(u32, f32)| b.1.partial_cmp(&a.1).unwrap_or(Ordering::Equal).then(a.0.cmp(&b.0));
        while self.sorted < count.min(self.tokens.len()) {
            let rest = self.tokens.get_mut(self.sorted..).unwrap_or_default();
            let more = (3 * self.sorted).max(Self::FIRST).min(rest.len());
            if more < rest.len() {
                rest.select_nth_unstable_by(more - 1, order);
            }
            rest.get_mut(..more).unwrap_or_default().sort_unstable_by(order);
            self.sorted += more;
        }
    }

    /// What a logit weighs against the best one's 1.
    fn weight(&self, x: f32, temperature: f32) -> f64 {
        (f64::from(x - self.best) / f64::from(temperature)).exp()
    }

    /// What the first `count` tokens weigh together.
    fn total(&mut self, count: usize, temperature: f32) -> f64 {
        if count < self.tokens.len() {
            self.sort(count);
        }
        let tokens = self.tokens.get(..count).unwrap_or(&self.tokens);
        tokens.iter().map(|t| self.weight(t.1, temperature)).sum()
    }
}

/// How many tokens top-k, top-p and min-p leave, the most likely ones; at least one if there is any.
fn kept(ranked: &mut Ranked, o: &Sampling) -> usize {
    let mut kept = ranked.tokens.len();
    if o.top_k > 0 {
        kept = kept.min(o.top_k);
    }
    if o.top_p < 1.0 {
        let enough = ranked.total(kept, 1.0) * f64::from(o.top_p);
        let mut sum = 0.0;
        let mut within = 0;
        while within < kept
            && sum < enough
            && let Some((_, x)) = ranked.get(within)
        {
            sum += ranked.weight(x, 1.0);
            within += 1;
        }
        kept = kept.min(within.max(1));
    }
    if o.min_p > 0.0 {
        // p / p_best >= min_p in logs; the best itself always stays.
        let least = ranked.best + o.min_p.ln();
        let mut within = 0;
        while within < kept && ranked.get(within).is_some_and(|(_, x)| x >= least) {
            within += 1;
        }
        kept = kept.min(within.max(1));
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Probabilities 0.1, 0.4, 0.2, 0.3 of tokens 0 to 3.
    fn logits() -> Vec<f32> {
        [0.1f32, 0.4, 0.2, 0.3].iter().map(|p| p.ln()).collect()
    }

    fn kept(o: Sampling) -> Vec<u32> {
        let mut ranked = Ranked::new(&logits());
        let count = super::kept(&mut ranked, &o);
        (0..count).map(|i| ranked.get(i).unwrap().0).collect()
    }

    /// In order as far as it is looked at, whatever the vocabulary.
    #[test]
    fn the_order_is_that_of_a_sort() {
        let mut random = StdRng::seed_from_u64(7);
        for length in [0, 1, 255, 256, 257, 5000] {
            let logits: Vec<f32> = (0..length).map(|_| random.random_range(-40i8..40).into()).collect();
            let mut sorted: Vec<(u32, f32)> = logits.iter().enumerate().map(|(i, &x)| (i as u32, x)).collect();
            sorted.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap().then(a.0.cmp(&b.0)));
            let mut ranked = Ranked::new(&logits);
            for (place, expected) in sorted.iter().enumerate() {
                assert_eq!(ranked.get(place), Some(*expected), "{place} of {length}");
            }
            assert_eq!(ranked.get(length), None);
        }
    }

    #[test]
    fn the_best_of_many_is_the_first_of_the_largest_finite_ones() {
        let mut random = StdRng::seed_from_u64(5);
        let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 0.0];
        for length in 0..100 {
            // Few values, so that there are ties.
            let logits: Vec<f32> = (0..length)
                .map(|_| match random.random_range(0..12usize) {
                    i if i < odd.len() => odd[i],
                    i => i as f32 - 14.0,
                })
                .collect();
            let finite = logits.iter().enumerate().filter(|(_, x)| x.is_finite());
            let best = finite.fold(None, |best: Option<(usize, f32)>, (i, &x)| match best {
                Some((_, b)) if x <= b => best,
                _ => Some((i, x)),
            });
            assert_eq!(argmax(&logits), best.map(|(i, _)| i as u32), "{logits:?}");
        }
    }

    #[test]
    fn greedy_takes_the_best_and_the_lower_of_equals() {
        let mut s = Sampler::new(Sampling::default());
        assert_eq!(s.choose(&[1.0, 3.0, 3.0, 2.0], &[]).unwrap(), 1);
        assert_eq!(s.choose(&[f32::NAN, f32::NEG_INFINITY, -5.0], &[]).unwrap(), 2);
        assert!(s.choose(&[f32::NAN], &[]).is_err());
        assert!(s.choose(&[], &[]).is_err());
    }

    #[test]
    fn filters_keep_what_they_should() {
        let d = Sampling {
            temperature: 1.0,
            ..Sampling::default()
        };
        assert_eq!(kept(d), [1, 3, 2, 0]);
        assert_eq!(kept(Sampling { top_k: 2, ..d }), [1, 3]);
        assert_eq!(kept(Sampling { top_k: 9, ..d }), [1, 3, 2, 0]);
        // 0.4 < 0.65, 0.7 is enough.
        assert_eq!(kept(Sampling { top_p: 0.65, ..d }), [1, 3]);
        assert_eq!(kept(Sampling { top_p: 0.75, ..d }), [1, 3, 2]);
        assert_eq!(kept(Sampling { top_p: 0.01, ..d }), [1]);
        // 0.3 / 0.4 = 0.75 and 0.2 / 0.4 = 0.5.
        assert_eq!(kept(Sampling { min_p: 0.6, ..d }), [1, 3]);
        assert_eq!(kept(Sampling { min_p: 0.45, ..d }), [1, 3, 2]);
        assert_eq!(kept(Sampling { min_p: 1.0, ..d }), [1]);
        // Top-k first: of 0.4 and 0.3 alone, 0.4 is 0.57.
        assert_eq!(
            kept(Sampling {
                top_k: 2,
                top_p: 0.5,
                ..d
            }),
            [1]
        );
    }

    #[test]
    fn temperature_bends_the_distribution_as_computed_by_hand() {
        // At temperature 0.5 probabilities are squared: 0.16, 0.09, 0.04, 0.01 over 0.30.
        let mut all = Ranked::new(&logits());
        let sum = all.total(4, 0.5);
        let sorted: Vec<f32> = (0..4).map(|i| all.get(i).unwrap().1).collect();
        let p = sorted.iter().map(|&x| all.weight(x, 0.5) / sum);
        for (got, want) in p.zip([0.16, 0.09, 0.04, 0.01]) {
            assert!((got - want / 0.30).abs() < 1e-6, "{got} {want}");
        }
    }

    #[test]
    fn frequencies_follow_the_probabilities_and_the_seed_decides() {
        let o = Sampling {
            temperature: 1.0,
            seed: 5,
            ..Sampling::default()
        };
        let draw = |o: Sampling| -> Vec<u32> {
            let mut s = Sampler::new(o);
            (0..20_000).map(|_| s.choose(&logits(), &[]).unwrap()).collect()
        };
        let drawn = draw(o);
        for (token, p) in [0.1, 0.4, 0.2, 0.3].iter().enumerate() {
            let share = drawn.iter().filter(|&&t| t as usize == token).count() as f64 / 20_000.0;
            assert!((share - p).abs() < 0.015, "{token}: {share}");
        }
        assert_eq!(drawn, draw(o));
        assert_ne!(drawn, draw(Sampling { seed: 6, ..o }));
    }

    #[test]
    fn repetition_is_penalised_on_both_sides_of_zero_and_forgotten_after_a_while() {
        assert_eq!(penalise(&[2.0, -2.0, 1.0], &[0, 1, 0], 2.0), [1.0, -4.0, 1.0]);
        let mut long = vec![0];
        long.extend([2; PENALTY_WINDOW]);
        assert_eq!(penalise(&[2.0, -2.0, 1.0], &long, 2.0), [2.0, -2.0, 0.5]);
        let mut s = Sampler::new(Sampling {
            repeat_penalty: 1.5,
            ..Sampling::default()
        });
        assert_eq!(s.choose(&[2.0, 1.5], &[0, 99]).unwrap(), 1);
    }

    #[test]
    fn a_models_configuration_is_taken_as_transformers_takes_it() {
        let said = SamplingDefaults {
            do_sample: Some(true),
            temperature: Some(0.6),
            top_k: Some(20.0),
            top_p: Some(0.95),
            repetition_penalty: Some(1.1),
            ..Default::default()
        };
        let drawn = Sampling::of_model(&said).unwrap();
        let text = "temperature 0.6, top-k 20, top-p 0.95, repetition penalty 1.1";
        assert_eq!(drawn.describe(), text);
        // Nothing is drawn unless it says so; the penalty holds all the same.
        for do_sample in [None, Some(false)] {
            let greedy = Sampling::of_model(&SamplingDefaults { do_sample, ..said }).unwrap();
            assert_eq!(greedy.describe(), "the likeliest token, repetition penalty 1.1");
        }
        let plain = SamplingDefaults {
            do_sample: Some(true),
            ..Default::default()
        };
        assert_eq!(Sampling::of_model(&plain).unwrap().describe(), "temperature 1");
        assert_eq!(
            Sampling::of_model(&SamplingDefaults::default()).unwrap(),
            Sampling::default()
        );
        for top_k in [-1.0, 2.5, f64::NAN, 1e18] {
            let top_k = Some(top_k);
            assert!(Sampling::of_model(&SamplingDefaults { top_k, ..said }).is_err());
        }
    }

    /// What the file names holds, and tokens are drawn as OpenAI's API draws them.
    #[test]
    fn servers_take_what_a_models_configuration_names() {
        let told = |said: &SamplingDefaults| Sampling::of_server(said).map(|s| s.describe());
        let said = SamplingDefaults {
            temperature: Some(0.6),
            top_k: Some(20.0),
            repetition_penalty: Some(1.1),
            ..Default::default()
        };
        for do_sample in [None, Some(false), Some(true)] {
            let said = SamplingDefaults { do_sample, ..said };
            let text = "temperature 0.6, top-k 20, repetition penalty 1.1";
            assert_eq!(told(&said).unwrap(), text);
        }
        assert_eq!(told(&SamplingDefaults::default()).unwrap(), "temperature 1");
        let top_k = Some(-1.0);
        assert!(told(&SamplingDefaults { top_k, ..said }).is_err());
    }

    #[test]
    fn ranges_are_checked() {
        let d = Sampling::default();
        assert!(d.check().is_ok());
        for bad in [
            Sampling { temperature: -1.0, ..d },
            Sampling {
                temperature: f32::NAN,
                ..d
            },
            Sampling { top_p: 0.0, ..d },
            Sampling { min_p: 1.5, ..d },
            Sampling {
                repeat_penalty: 0.0,
                ..d
            },
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
    }
}
