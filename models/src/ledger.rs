//! The generator of the task `ledger`: documents of shuffled facts and numbered problems with one long output each.
//!
//! The same documents as `models/ledger/recipe/task.py` for a seed: it draws from CPython's `random.Random`, so that is
//! reproduced in `python_random`, the Mersenne Twister and what `random`, `sample` and `shuffle` make of it.

use std::collections::HashSet;

use serde_json::{Value, json};

use crate::{
    error::{Error, Result},
    python_random::Random,
};

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
    /// 46 to 48 people, 22 to 24 cities, 178 to 184 problems: more labels than models/ledger knows.
    Long,
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
            Self::Long => ((46, 48), (22, 24), (178, 184), (48, 24)),
        };
        Ranges {
            people,
            cities,
            problems,
            pool,
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

/// What is known of a person.
#[derive(Clone, Copy)]
struct Person {
    name: &'static str,
    coins: usize,
    friend: &'static str,
    home: &'static str,
}

/// People, cities with their taxes, and colors, in the order in which they are drawn.
struct World {
    names: Vec<&'static str>,
    people: Vec<Person>,
    taxes: Vec<(&'static str, usize)>,
    colors: Vec<&'static str>,
}

impl World {
    fn draw(random: &mut Random, ranges: &Ranges, people: usize, cities: usize) -> Self {
        let list = |text: &'static str| text.split_whitespace().collect::<Vec<&'static str>>();
        let names = random.sample(&list(NAMES)[..ranges.pool.0], people);
        let cities = random.sample(&list(CITIES)[..ranges.pool.1], cities);
        let all_colors = list(COLORS);
        let colors = random.sample(&all_colors, all_colors.len());
        let mut person = |name: &'static str| {
            let coins = random.between((1, 9));
            let mut friend = random.pick(&names);
            while friend == name {
                friend = random.pick(&names);
            }
            let home = random.pick(&cities);
            Person {
                name,
                coins,
                friend,
                home,
            }
        };
        let people = names.iter().map(|name| person(name)).collect();
        let taxes = cities.iter().map(|city| (*city, random.between((1, 9)))).collect();
        Self {
            names,
            people,
            taxes,
            colors,
        }
    }

    /// All of it in words, a line a fact.
    fn facts(&self) -> Vec<Vec<String>> {
        let of_person = |p: &Person| {
            [
                fact("coins", p.name, &p.coins.to_string()),
                fact("friend", p.name, p.friend),
                fact("home", p.name, p.home),
            ]
        };
        let of_city = |(city, tax): &(&'static str, usize)| fact("tax", city, &tax.to_string());
        let people = self.people.iter().flat_map(of_person);
        people.chain(self.taxes.iter().map(of_city)).collect()
    }

    fn person(&self, name: &str) -> Person {
        let found = self.people.iter().find(|p| p.name == name);
        *found.unwrap_or(&self.people[0])
    }

    fn tax(&self, city: &str) -> usize {
        let found = self.taxes.iter().find(|(name, _)| *name == city);
        found.unwrap_or(&self.taxes[0]).1
    }
}

/// Values that later problems may ask for, by name.
#[derive(Default)]
struct Values {
    /// Answers that are numbers.
    numeric: Vec<(String, usize)>,
    /// Those of one digit.
    small: Vec<(String, usize)>,
    /// Colors that stand for a number.
    bound: Vec<(&'static str, usize)>,
}

/// A problem in words: what is asked, the steps to the answer, the answer.
struct Problem {
    question: String,
    steps: Vec<String>,
    answer: String,
}

impl Problem {
    /// One whose answer is the last of a chain of facts: what, of whom, value.
    fn chain(question: String, facts: &[(&str, &str, &str)]) -> Self {
        Self {
            question,
            steps: facts
                .iter()
                .flat_map(|(what, of, value)| fact(what, of, value))
                .collect(),
            answer: facts
                .last()
                .map_or_else(String::new, |(_, _, value)| (*value).to_owned()),
        }
    }
}

/// A kind of problem, drawn by how often it comes, or the one that takes its place where it can't be asked yet.
fn draw_kind(random: &mut Random, world: &World, values: &Values) -> char {
    // As the recipe sums: from the first on, anew for each.
    let cumulative = |i: usize| KINDS[..=i].iter().fold(0.0, |sum, k| sum + k.1);
    let u = random.unit() * cumulative(KINDS.len() - 1);
    let mut i = 0;
    while u > cumulative(i) {
        i += 1;
    }
    match KINDS[i].0 {
        'd' if values.numeric.is_empty() => 'a',
        'j' if values.numeric.len() < 2 || values.small.is_empty() => 'c',
        'e' if values.bound.len() >= world.colors.len() => 'c',
        'f' if values.bound.is_empty() => 'e',
        kind => kind,
    }
}

fn draw_problem(random: &mut Random, world: &World, values: &mut Values, kind: char) -> Problem {
    let person = world.person(random.pick(&world.names));
    let name = person.name;
    let friend = world.person(person.friend);
    match kind {
        'a' => Problem::chain(
            format!("coins of friend of {name} ?"),
            &[
                ("friend", name, friend.name),
                ("coins", friend.name, &friend.coins.to_string()),
            ],
        ),
        'b' => Problem::chain(
            format!("tax of home of {name} ?"),
            &[
                ("home", name, person.home),
                ("tax", person.home, &world.tax(person.home).to_string()),
            ],
        ),
        'g' => Problem::chain(
            format!("tax of home of friend of {name} ?"),
            &[
                ("friend", name, friend.name),
                ("home", friend.name, friend.home),
                ("tax", friend.home, &world.tax(friend.home).to_string()),
            ],
        ),
        'h' => Problem::chain(
            format!("home of friend of {name} ?"),
            &[("friend", name, friend.name), ("home", friend.name, friend.home)],
        ),
        'e' => {
            let color = world.colors[values.bound.len()];
            values.bound.push((color, person.coins));
            let coins = person.coins.to_string();
            Problem::chain(
                format!("let {color} be coins of {name} ?"),
                &[("coins", name, &coins), ("value", color, &coins)],
            )
        }
        _ => draw_sum(random, world, values, kind, person),
    }
}

/// A problem that adds two numbers or takes one from the other. `kind` says what the first one is, and whether the
/// second one is an earlier answer.
fn draw_sum(random: &mut Random, world: &World, values: &Values, kind: char, person: Person) -> Problem {
    let answer_of = |random: &mut Random, answers: &[(String, usize)]| {
        let i = (random.unit() * answers.len() as f64) as usize;
        let (label, value) = &answers[i];
        ("value", label.clone(), *value)
    };
    let (what, of, a) = match kind {
        'c' => ("coins", person.name.to_owned(), person.coins),
        'f' => {
            let (color, value) = random.pick(&values.bound);
            ("value", color.to_owned(), value)
        }
        _ => answer_of(random, &values.numeric),
    };
    let (what2, of2, b) = if kind == 'j' {
        answer_of(random, &values.small)
    } else {
        let other = world.person(random.pick(&world.names));
        ("coins", other.name.to_owned(), other.coins)
    };
    let minus = a >= b && (a + b > MAX_NUMBER || random.unit() < 0.35);
    let (value, sign) = if minus { (a - b, "minus") } else { (a + b, "plus") };
    let mut steps = fact(what, &of, &a.to_string());
    steps.extend(fact(what2, &of2, &b.to_string()));
    steps.extend(words(&format!("{a} {sign} {b} is {value} .")));
    Problem {
        question: format!("{what} of {of} {sign} {what2} of {of2} ?"),
        steps,
        answer: value.to_string(),
    }
}

fn document(random: &mut Random, ranges: &Ranges) -> Document {
    let people = random.between(ranges.people);
    let cities = random.between(ranges.cities);
    let problems = random.between(ranges.problems);
    let world = World::draw(random, ranges, people, cities);
    let mut values = Values::default();
    let (mut questions, mut output, mut kinds, mut answers) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for k in 1..=problems {
        let label = format!("#{k}");
        let kind = draw_kind(random, &world, &values);
        let Problem {
            question,
            steps,
            answer,
        } = draw_problem(random, &world, &mut values, kind);
        questions.push(words(&format!("problem {label} : {question}")).collect::<Vec<_>>());
        output.extend(words(&format!("answer {label} :")));
        output.extend(steps);
        output.extend(words(&format!("so value of {label} {answer} .")));
        if let Ok(value) = answer.parse::<usize>() {
            values.numeric.push((label.clone(), value));
            if (1..=9).contains(&value) {
                values.small.push((label, value));
            }
        }
        kinds.push(kind);
        answers.push(answer);
    }
    output.push("<eos>".to_owned());
    Document {
        prompt: draw_prompt(random, world.facts(), questions),
        output,
        kinds,
        answers,
    }
}

/// Facts in random order, problems in order, at random places.
fn draw_prompt(random: &mut Random, mut facts: Vec<Vec<String>>, questions: Vec<Vec<String>>) -> Vec<String> {
    random.shuffle(&mut facts);
    let (total, problems) = (facts.len() + questions.len(), questions.len());
    let places: HashSet<usize> = random
        .sample(&(0..total).collect::<Vec<_>>(), problems)
        .into_iter()
        .collect();
    let (mut facts, mut questions) = (facts.into_iter(), questions.into_iter());
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
    prompt
}

/// `count` documents as lines of a documents file: id, prompt, answers, kinds, reference.
///
/// # Errors
/// When no document is asked for.
pub fn documents(seed: u64, count: usize, size: Size) -> Result<impl Iterator<Item = Value>> {
    if count == 0 {
        return Err(Error::NoDocuments);
    }
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
    fn long_documents_are_the_recipe_s_word_for_word() {
        // FNV-1a of three documents of task.py: too long to be stored.
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        for document in documents(4242, 3, Size::Long).unwrap() {
            let [prompt, reference] = ["prompt", "reference"].map(|key| document[key].as_str().unwrap().to_owned());
            for byte in format!("{prompt}\n{reference}\n").bytes() {
                hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
            }
        }
        assert_eq!(hash, 0x5d4f_bcc2_f15c_74dc);
    }

    #[test]
    fn sizes_and_counts_that_do_not_exist_are_refused() {
        let names: Vec<_> = Size::value_variants()
            .iter()
            .filter_map(Size::to_possible_value)
            .collect();
        let names: Vec<&str> = names.iter().map(|name| name.get_name()).collect();
        assert_eq!(names, ["xxs", "xs", "s", "m", "l", "eval", "long"]);
        assert!(Size::from_str("huge", false).is_err());
        assert!(documents(1, 0, Size::Xxs).is_err());
        assert_eq!(documents(1, 3, Size::Xxs).unwrap().count(), 3);
    }
}
