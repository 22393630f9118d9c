//! The generator of the task `ledger`: documents of shuffled facts and numbered problems with one long output each.
//!
//! The same documents as `models/ledger/recipe/task.py` for a seed: it draws from CPython's `random.Random`, so that is
//! reproduced here, the Mersenne Twister and what `random`, `sample` and `shuffle` make of it.

use std::collections::HashSet;

use anyhow::{Result, ensure};
use rand_mt::Mt;
use serde_json::{Value, json};

const NAMES: &str = "Anna Ben Carl Dora Emil Fay Gus Hana Ivan Jane Kurt Lena Mia Nils Olga Paul Quin Rosa Sven Tara \
    Udo Vera Walt Xena Yuri Zoe Abel Bella Cora Dean Elsa Finn Gina Hugo Iris Jack Kate Leon Maya Noah Opal \
    Pia Ralf Sara Toni Ursa Vito Wanda Axel Bruno Clara David Edith Frank Greta Heidi Igor Julia Klaus Linda \
    Marco Nora Oscar Petra Ricky Simon Thea Ulla Viktor Wilma Agnes Boris Celia Dario Erika Felix Gerda Henry \
    Irma Jonas Karin Louis Marta Nadia Otto Peggy Robin Silke Timo Ulrich Vince Willy Alma Basil Chloe Derek";
const CITIES: &str = "Oslo Rome Paris Lima Cairo Delhi Kiev Bonn Bern Graz Linz Turin Lyon Nice Porto Genoa Milan \
    Quito Tokyo Osaka Seoul Hanoi Perth Sofia Varna Tunis Accra Lagos Dakar Rabat Basra Mecca Amman Haifa Doha \
    Dubai Minsk Vilnius Riga Turku Malmo Bergen Cork Leeds Derby York Bath Dover";
const COLORS: &str = "red blue green black white pink gray brown gold silver amber coral ivory olive plum teal navy \
    lime ruby jade pearl mint peach rust";
/// All values are 0 to this.
const MAX_NUMBER: usize = 60;
/// Kinds of problems and how often they come.
const KINDS: [(char, f64); 9] = [
    ('a', 0.13),
    ('b', 0.10),
    ('c', 0.14),
    ('d', 0.20),
    ('e', 0.08),
    ('f', 0.10),
    ('g', 0.12),
    ('h', 0.06),
    ('j', 0.07),
];

/// How long documents are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Size {
    /// 3 to 4 people, 2 cities, 3 to 4 problems.
    Xxs,
    /// 4 to 6 people, 2 to 3 cities, 3 to 5 problems.
    Xs,
    /// 7 to 10 people, 3 to 5 cities, 7 to 9 problems.
    S,
    /// 14 to 19 people, 6 to 8 cities, 15 to 20 problems.
    M,
    /// 26 to 38 people, 9 to 14 cities, 28 to 40 problems.
    L,
    /// 36 to 38 people, 13 to 14 cities, 38 to 40 problems.
    Eval,
}

/// What documents of a size are drawn from.
struct Ranges {
    people: (usize, usize),
    cities: (usize, usize),
    problems: (usize, usize),
    /// How many of the names and of the cities are in use.
    pool: (usize, usize),
}

impl Size {
    fn ranges(self) -> Ranges {
        let (people, cities, problems, pool) = match self {
            Self::Xxs => ((3, 4), (2, 2), (3, 4), (8, 4)),
            Self::Xs => ((4, 6), (2, 3), (3, 5), (12, 6)),
            Self::S => ((7, 10), (3, 5), (7, 9), (24, 12)),
            Self::M => ((14, 19), (6, 8), (15, 20), (40, 20)),
            Self::L => ((26, 38), (9, 14), (28, 40), (48, 24)),
            Self::Eval => ((36, 38), (13, 14), (38, 40), (48, 24)),
        };
        Ranges {
            people,
            cities,
            problems,
            pool,
        }
    }
}

/// CPython's `random.Random(seed)`.
struct Random(Mt);

impl Random {
    fn new(seed: u64) -> Self {
        // The seed's 32-bit words, lowest first, at least one.
        let words = [seed as u32, (seed >> 32) as u32];
        let used = if words[1] == 0 { 1 } else { 2 };
        Self(Mt::new_with_key(words.into_iter().take(used)))
    }

    /// `random()`: 53 bits in [0, 1).
    fn unit(&mut self) -> f64 {
        let (a, b) = (self.0.next_u32() >> 5, self.0.next_u32() >> 6);
        (f64::from(a) * 67_108_864.0 + f64::from(b)) / 9_007_199_254_740_992.0
    }

    /// `_randbelow(n)`, n at least 1 and below 2^32.
    fn below(&mut self, n: usize) -> usize {
        let bits = usize::BITS - n.leading_zeros();
        loop {
            let r = (self.0.next_u32() >> (32 - bits.min(32))) as usize;
            if r < n {
                return r;
            }
        }
    }

    /// The recipe's own draw: `low + int(random() * (high - low + 1))`.
    fn between(&mut self, (low, high): (usize, usize)) -> usize {
        low + (self.unit() * (high - low + 1) as f64) as usize
    }

    /// The recipe's own choice: `list[int(random() * len(list))]`.
    fn pick<T: Copy>(&mut self, list: &[T]) -> T {
        list[(self.unit() * list.len() as f64) as usize]
    }

    /// `sample(population, k)`, k at most the population.
    fn sample<T: Copy>(&mut self, population: &[T], k: usize) -> Vec<T> {
        let n = population.len();
        let mut set_size = 21;
        if k > 5 {
            set_size += 4usize.pow(((k as f64 * 3.0).ln() / 4f64.ln()).ceil() as u32);
        }
        if n <= set_size {
            let mut pool = population.to_vec();
            return (0..k)
                .map(|i| {
                    let j = self.below(n - i);
                    let taken = pool[j];
                    pool[j] = pool[n - i - 1];
                    taken
                })
                .collect();
        }
        let mut taken = HashSet::new();
        (0..k)
            .map(|_| {
                loop {
                    let j = self.below(n);
                    if taken.insert(j) {
                        return population[j];
                    }
                }
            })
            .collect()
    }

    fn shuffle<T>(&mut self, list: &mut [T]) {
        for i in (1..list.len()).rev() {
            let j = self.below(i + 1);
            list.swap(i, j);
        }
    }
}

/// One document, in words.
struct Document {
    prompt: Vec<String>,
    output: Vec<String>,
    kinds: Vec<char>,
    answers: Vec<String>,
}

/// "coins of Anna 7 ."
fn fact(what: &str, of: &str, value: &str) -> Vec<String> {
    [what, "of", of, value, "."].map(str::to_owned).to_vec()
}

fn words(text: &str) -> impl Iterator<Item = String> + '_ {
    text.split_whitespace().map(str::to_owned)
}

fn document(random: &mut Random, ranges: &Ranges) -> Document {
    let list = |text: &'static str| text.split_whitespace().collect::<Vec<&str>>();
    let (people, cities, problems) = (
        random.between(ranges.people),
        random.between(ranges.cities),
        random.between(ranges.problems),
    );
    let names = random.sample(&list(NAMES)[..ranges.pool.0], people);
    let cities = random.sample(&list(CITIES)[..ranges.pool.1], cities);
    let all_colors = list(COLORS);
    let colors = random.sample(&all_colors, all_colors.len());
    let mut lines = Vec::new();
    // Per person: coins, friend, home; per city: tax. In the order of `names` and `cities`.
    let mut person = Vec::new();
    for name in &names {
        let coins = random.between((1, 9));
        let mut friend = random.pick(&names);
        while friend == *name {
            friend = random.pick(&names);
        }
        let home = random.pick(&cities);
        person.push((coins, friend, home));
        lines.push(fact("coins", name, &coins.to_string()));
        lines.push(fact("friend", name, friend));
        lines.push(fact("home", name, home));
    }
    let mut taxes = Vec::new();
    for city in &cities {
        let tax = random.between((1, 9));
        taxes.push(tax);
        lines.push(fact("tax", city, &tax.to_string()));
    }
    let at = |name: &str| names.iter().position(|n| *n == name).unwrap_or(0);
    let coins = |name: &str| person[at(name)].0;
    let friend = |name: &str| person[at(name)].1;
    let home = |name: &str| person[at(name)].2;
    let tax = |city: &str| taxes[cities.iter().position(|c| *c == city).unwrap_or(0)];

    let mut cumulative = Vec::new();
    for i in 0..KINDS.len() {
        // As the recipe sums: from the first on, anew for each.
        cumulative.push(KINDS[..=i].iter().fold(0.0, |sum, k| sum + k.1));
    }
    let whole = cumulative[KINDS.len() - 1];
    let (mut questions, mut outputs, mut kinds, mut answers) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut numeric: Vec<(String, usize)> = Vec::new();
    let mut small: Vec<(String, usize)> = Vec::new();
    let mut bound: Vec<(&str, usize)> = Vec::new();
    for k in 1..=problems {
        let label = format!("#{k}");
        let u = random.unit() * whole;
        let mut i = 0;
        while u > cumulative[i] {
            i += 1;
        }
        let mut kind = KINDS[i].0;
        if kind == 'd' && numeric.is_empty() {
            kind = 'a';
        }
        if kind == 'j' && (numeric.len() < 2 || small.is_empty()) {
            kind = 'c';
        }
        if kind == 'e' && bound.len() >= colors.len() {
            kind = 'c';
        }
        if kind == 'f' && bound.is_empty() {
            kind = 'e';
        }
        let name = random.pick(&names);
        let question;
        let mut out: Vec<String> = Vec::new();
        let answer;
        match kind {
            'a' => {
                let m = friend(name);
                question = format!("coins of friend of {name} ?");
                out.extend(fact("friend", name, m));
                answer = coins(m).to_string();
                out.extend(fact("coins", m, &answer));
            }
            'b' => {
                let c = home(name);
                question = format!("tax of home of {name} ?");
                out.extend(fact("home", name, c));
                answer = tax(c).to_string();
                out.extend(fact("tax", c, &answer));
            }
            'g' => {
                let m = friend(name);
                let c = home(m);
                question = format!("tax of home of friend of {name} ?");
                out.extend(fact("friend", name, m));
                out.extend(fact("home", m, c));
                answer = tax(c).to_string();
                out.extend(fact("tax", c, &answer));
            }
            'h' => {
                let m = friend(name);
                answer = home(m).to_owned();
                question = format!("home of friend of {name} ?");
                out.extend(fact("friend", name, m));
                out.extend(fact("home", m, &answer));
            }
            'e' => {
                let color = colors[bound.len()];
                let v = coins(name);
                question = format!("let {color} be coins of {name} ?");
                answer = v.to_string();
                out.extend(fact("coins", name, &answer));
                out.extend(fact("value", color, &answer));
                bound.push((color, v));
            }
            _ => {
                let (what, of, a) = match kind {
                    'c' => ("coins", name.to_owned(), coins(name)),
                    'f' => {
                        let (color, v) = random.pick(&bound);
                        ("value", color.to_owned(), v)
                    }
                    _ => {
                        let i = (random.unit() * numeric.len() as f64) as usize;
                        let (label, v) = &numeric[i];
                        ("value", label.clone(), *v)
                    }
                };
                out.extend(fact(what, &of, &a.to_string()));
                let (what2, of2, b) = if kind == 'j' {
                    let i = (random.unit() * small.len() as f64) as usize;
                    let (label, v) = &small[i];
                    ("value", label.clone(), *v)
                } else {
                    let m = random.pick(&names);
                    ("coins", m.to_owned(), coins(m))
                };
                let minus = a >= b && (a + b > MAX_NUMBER || random.unit() < 0.35);
                let (v, sign) = if minus { (a - b, "minus") } else { (a + b, "plus") };
                question = format!("{what} of {of} {sign} {what2} of {of2} ?");
                answer = v.to_string();
                out.extend(fact(what2, &of2, &b.to_string()));
                out.extend(words(&format!("{a} {sign} {b} is {v} .")));
            }
        }
        questions.push(words(&format!("problem {label} : {question}")).collect::<Vec<_>>());
        outputs.extend(words(&format!("answer {label} :")));
        outputs.extend(out);
        outputs.extend(words(&format!("so value of {label} {answer} .")));
        if let Ok(value) = answer.parse::<usize>() {
            numeric.push((label.clone(), value));
            if (1..=9).contains(&value) {
                small.push((label, value));
            }
        }
        kinds.push(kind);
        answers.push(answer);
    }
    outputs.push("<eos>".to_owned());
    // Facts in random order, problems in order, at random places.
    random.shuffle(&mut lines);
    let total = lines.len() + problems;
    let places: HashSet<usize> = random
        .sample(&(0..total).collect::<Vec<_>>(), problems)
        .into_iter()
        .collect();
    let (mut facts, mut questions) = (lines.into_iter(), questions.into_iter());
    let mut prompt: Vec<String> = words("<bos> facts :").collect();
    for place in 0..total {
        let next = if places.contains(&place) {
            questions.next()
        } else {
            facts.next()
        };
        prompt.extend(next.unwrap_or_default());
    }
    prompt.extend(words("solve :"));
    Document {
        prompt,
        output: outputs,
        kinds,
        answers,
    }
}

/// `count` documents as lines of a documents file: id, prompt, answers, kinds, reference.
///
/// # Errors
/// When no document is asked for.
pub fn documents(seed: u64, count: usize, size: Size) -> Result<impl Iterator<Item = Value>> {
    ensure!(count >= 1, "0 documents: ask for at least one");
    let mut random = Random::new(seed);
    let ranges = size.ranges();
    Ok((0..count).map(move |i| {
        let d = document(&mut random, &ranges);
        json!({
            "id": format!("{seed}-{i}"),
            "prompt": d.prompt.join(" "),
            "answers": d.answers,
            "kinds": d.kinds.iter().collect::<String>(),
            "reference": d.output.join(" "),
        })
    }))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::ValueEnum;

    use super::*;

    /// First numbers of CPython's `random.Random(4242)` and of `random.Random(2**40 + 7)`.
    #[test]
    fn numbers_are_those_of_python() {
        let mut random = Random::new(4242);
        assert_eq!(
            [random.unit(), random.unit()],
            [0.8624508153567833, 0.41569372364698065]
        );
        let mut random = Random::new((1 << 40) + 7);
        assert_eq!(random.unit(), 0.6137037779936511);
        let mut random = Random::new(1);
        assert_eq!(random.sample(&(0..100).collect::<Vec<_>>(), 5), [17, 72, 97, 8, 32]);
        let mut list: Vec<i32> = (0..8).collect();
        random.shuffle(&mut list);
        assert_eq!(list, [7, 2, 0, 4, 5, 6, 3, 1]);
    }

    #[test]
    fn documents_are_the_recipe_s_word_for_word() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("ledger/documents.jsonl");
        let text = std::fs::read_to_string(path).unwrap();
        let stored: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(stored.len(), 96);
        let size = Size::from_str("eval", false).unwrap();
        for (made, stored) in documents(4242, 96, size).unwrap().zip(&stored) {
            assert_eq!(made, *stored);
        }
    }

    #[test]
    fn sizes_and_counts_that_do_not_exist_are_refused() {
        let names: Vec<_> = Size::value_variants()
            .iter()
            .filter_map(Size::to_possible_value)
            .collect();
        let names: Vec<&str> = names.iter().map(|name| name.get_name()).collect();
        assert_eq!(names, ["xxs", "xs", "s", "m", "l", "eval"]);
        assert!(Size::from_str("huge", false).is_err());
        assert!(documents(1, 0, Size::Xxs).is_err());
        assert_eq!(documents(1, 3, Size::Xxs).unwrap().count(), 3);
    }
}
